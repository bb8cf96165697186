r"""Trains a SentencePiece vocabulary on the captions of a data set.

    python tools/train_tokenizer.py --data=photos_prepared \
        --vocabulary_size=4000

reads the captions of the training split and writes
photos_prepared/tokenizer.model and, beside it, how long the captions are
(tokenizer.lengths.json, for LENGTH_BUCKETS='auto'); --text=FILE reads one
caption per line instead.
Any other data is read as in training, with the gin files and parameters of
tools/train.py:

    python tools/train_tokenizer.py --gin_file=gin/cappa_b16.gin \
        --gin_file=gin/data/webdataset.gin \
        --gin_param="DATA='cc3m/{split}-*.tar'" --output=cc3m/tokenizer.model

Training then needs the same TOKENIZER (set by --output here) and the
VOCABULARY_SIZE given as --vocabulary_size here.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

from cappa_tf import config
from cappa_tf.utils import console, files

FLAGS = flags.FLAGS
SAMPLE = 20_000


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string("data", None, "Folder of a prepared data set.")
    flags.DEFINE_string("split", "train", "Split of --data to read.")
    flags.DEFINE_string("text", None, "Text file, one caption per line.")
    config.define_flags(runs=False)
    flags.adopt_module_key_flags(config)  # So that --help shows them.
    flags.DEFINE_string(
        "output",
        None,
        "Model file to write; by default DATA/tokenizer.model, or TOKENIZER of "
        "the gin files.",
    )
    flags.DEFINE_integer(
        "vocabulary_size", 32_000, "Number of pieces.", lower_bound=4
    )
    flags.DEFINE_bool("lowercase", True, "Lower-case captions first.")
    flags.DEFINE_float(
        "character_coverage",
        1.0,
        "Fraction of characters with a piece of their own; 0.9995 for "
        "languages with many characters.",
        0.98,
        1.0,
    )
    flags.DEFINE_bool(
        "byte_fallback", False, "Spell unknown characters as bytes."
    )
    flags.DEFINE_integer(
        "max_captions",
        1_000_000,
        "Maximum number of captions to train on.",
        lower_bound=1,
    )


def main(argv):
    """Trains a vocabulary; input errors are printed as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("train_tokenizer"):
        train()


def train():
    """Trains a vocabulary and prints its coverage, according to the flags."""
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.data import text_lengths, tokenizer

    captions, output = find_captions()
    files.check_output("output", output)
    texts, left_out = tokenizer.usable_captions(
        captions, FLAGS.lowercase, FLAGS.max_captions
    )
    if left_out:
        kind = "caption" if FLAGS.text is None else "line"
        words = tokenizer.describe_left_out(left_out, kind)
        if not texts:
            raise ValueError(f"No {kind} can be used. Left out: {words}")
        print(f"left out: {words}")
    size = tokenizer.train_tokenizer(
        texts,
        output,
        FLAGS.vocabulary_size,
        lowercase=FLAGS.lowercase,
        character_coverage=FLAGS.character_coverage,
        byte_fallback=FLAGS.byte_fallback,
    )
    print(f"wrote {output}")
    if size < FLAGS.vocabulary_size:
        print(f"the captions yield only {size} pieces")
    step = max(1, len(texts) // SAMPLE)
    text_lengths.write(output, print_coverage(output, texts[::step]))


def find_captions():
    """Returns an iterator of captions, and the path of the file to write."""
    from cappa_tf.data import tokenizer
    from cappa_tf.data.sources.prepared import PreparedData

    gin = FLAGS.gin_file or FLAGS.gin_param or None
    given = (FLAGS.data, FLAGS.text, gin)
    if sum(value is not None for value in given) != 1:
        raise ValueError("Give one of --data, --text and --gin_file.")
    if FLAGS.text is not None:
        if FLAGS.output is None:
            raise ValueError("--text needs --output.")
        return read_lines(FLAGS.text), FLAGS.output
    if FLAGS.data is not None:
        default = os.path.join(FLAGS.data, tokenizer.FILE_NAME)
        records = PreparedData(FLAGS.data).split(FLAGS.split)
        return read_captions(records), FLAGS.output or default
    params = list(FLAGS.gin_param)
    if FLAGS.output is not None:
        params.append(f"TOKENIZER = {FLAGS.output!r}")
    # No run is started, so nothing is written to the workdir.
    config.parse(FLAGS.gin_file, params, workdir="unused")
    data = config.arguments()["train_data"]
    return read_captions(data.records), data.tokenizer.path


def read_lines(path):
    """Lines of a text file; bytes that are not UTF-8 become surrogates."""
    from cappa_tf.data import text

    with console.naming("text", path):
        content = pathlib.Path(path).read_bytes()
        return text.lines(text.decode(content, "surrogateescape"))


def read_captions(records):
    """Yields the captions of a split's `Records`, and what they answer."""
    examples = records.read_examples()
    for example in tqdm.tqdm(
        examples, total=records.num_examples, unit=" images"
    ):
        yield from example.captions
        # A question may have several answers.
        yield from dict.fromkeys(filter(None, example.prompts or ()))


def print_coverage(path, texts):
    """Prints statistics of the vocabulary on a sample of the captions.

    Returns:
        The number of tokens of each, with eos.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(files.read_bytes(path))
    ids = processor.encode(texts)
    lengths = sorted(len(i) + 1 for i in ids)
    total = sum(lengths)
    unknown = sum(i.count(processor.unk_id()) for i in ids)
    words = sum(len(text.split()) for text in texts)
    print(f"pieces                {processor.get_piece_size()}")
    print(f"captions sampled      {len(texts)}")
    print(f"unknown               {unknown / max(total, 1):.4%} of tokens")
    print(f"tokens per word       {(total - len(texts)) / max(words, 1):.2f}")
    print(
        f"tokens with eos       median {lengths[len(lengths) // 2]}, "
        f"99% {lengths[int(0.99 * (len(lengths) - 1))]}, "
        f"longest {lengths[-1]}"
    )
    for text in texts[:3]:
        print("  " + " ".join(processor.encode(text, out_type=str)))
    return lengths


if __name__ == "__main__":
    console.run(main, define_flags)
