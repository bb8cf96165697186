r"""Trains a SentencePiece vocabulary on the captions of a data set.

    python tools/train_tokenizer.py --data=photos_prepared \
        --vocabulary_size=4000

reads the captions of the training split and writes
photos_prepared/tokenizer.model; --text=FILE reads one caption a line instead.
"""

import itertools
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

FLAGS = flags.FLAGS
SAMPLE = 2000


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string("data", None, "Folder of a prepared data set.")
    flags.DEFINE_string("split", "train", "Split of --data to read.")
    flags.DEFINE_string("text", None, "Text file, one caption a line.")
    flags.DEFINE_string(
        "output", None, "Model file to write; by default DATA/tokenizer.model."
    )
    flags.DEFINE_integer(
        "vocabulary_size", 32_000, "Number of pieces.", lower_bound=4
    )
    flags.DEFINE_bool("lowercase", True, "Lower-case captions first.")
    flags.DEFINE_float(
        "character_coverage",
        1.0,
        "Fraction of characters with a piece of their own; 0.9995 for many "
        "languages.",
        0.98,
        1.0,
    )
    flags.DEFINE_bool(
        "byte_fallback", False, "Spell unknown characters as bytes."
    )
    flags.DEFINE_integer(
        "max_captions", 1_000_000, "Captions to train on.", lower_bound=1
    )


def main(argv):
    """Trains; what cannot be done is one line, not a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    try:
        train()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_tokenizer: {error}") from None


def train():
    """Trains and prints, as the flags say."""
    # TensorFlow takes seconds to load: --help should not.
    from cappa_tf.data import tokenizer

    output = FLAGS.output
    if output is None:
        if FLAGS.data is None:
            raise ValueError("--text needs --output.")
        output = os.path.join(FLAGS.data, tokenizer.FILE_NAME)
    captions = list(
        itertools.islice(
            read_captions(FLAGS.data, FLAGS.split, FLAGS.text),
            FLAGS.max_captions,
        )
    )
    size = tokenizer.train_tokenizer(
        captions,
        output,
        FLAGS.vocabulary_size,
        lowercase=FLAGS.lowercase,
        character_coverage=FLAGS.character_coverage,
        byte_fallback=FLAGS.byte_fallback,
    )
    print(f"wrote {output}")
    if size < FLAGS.vocabulary_size:
        print(f"the captions give no more than {size} pieces")
    step = max(1, len(captions) // SAMPLE)
    print_coverage(output, captions[::step], FLAGS.lowercase)


def read_captions(data=None, split="train", text=None):
    """Captions of a data set's split, or the lines of a file."""
    if (data is None) == (text is None):
        raise ValueError("Give one of --data and --text.")
    if text is not None:
        with open(text, encoding="utf-8") as lines:
            yield from lines
        return
    from cappa_tf.data.records import PreparedData

    records = PreparedData(data).split(split)
    examples = records.read_examples()
    for example in tqdm.tqdm(
        examples, total=records.num_examples, unit=" pictures"
    ):
        yield from example.captions


def print_coverage(path, captions, lowercase):
    """Prints what the vocabulary makes of a sample of the captions."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [c.strip().lower() if lowercase else c.strip() for c in captions]
    ids = processor.encode(texts)
    lengths = sorted(len(i) + 1 for i in ids)
    total = sum(lengths)
    unknown = sum(i.count(processor.unk_id()) for i in ids)
    words = sum(len(text.split()) for text in texts)
    print(f"pieces                {processor.get_piece_size()}")
    print(f"captions sampled      {len(texts)}")
    print(f"unknown               {unknown / max(total, 1):.4%} of tokens")
    print(f"tokens a word         {(total - len(texts)) / max(words, 1):.2f}")
    print(
        f"tokens with eos       median {lengths[len(lengths) // 2]}, "
        f"99% {lengths[int(0.99 * (len(lengths) - 1))]}, "
        f"longest {lengths[-1]}"
    )
    for text in texts[:3]:
        print("  " + " ".join(processor.encode(text, out_type=str)))


if __name__ == "__main__":
    define_flags()
    app.run(main)
