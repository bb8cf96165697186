"""Captions images with a trained model.

    python tools/caption.py --checkpoint=runs/quickstart photo.jpg folder/
    python tools/caption.py --preset=scenes_mini --demo
    python tools/caption.py --checkpoint=runs/flickr8k --format=jsonl photos/
    python tools/caption.py --checkpoint=runs/flickr8k --sampler=beam \
        --num_captions=3 --prefix="a dog" --no_repeat_ngram=2 photo.jpg
    python tools/caption.py --checkpoint=runs/flickr8k --attention=where.png \
        photo.jpg
    python tools/caption.py --checkpoint=runs/flickr8k --sampler=top_p \
        --top_p=0.9 --temperature=0.8 --num_captions=5 --seed=1 photo.jpg
    python tools/caption.py --checkpoint=runs/decoder \
        --prompt="answer: what colour is the car" photo.jpg

Prints one line per caption, the best of an image first: its log-likelihood (the
sum over its tokens, in nats), the number of tokens including the end of the
caption, and the caption; jsonl also has the log-probability of each token. An
image that cannot be read is reported on stderr (and as an `error` row of
jsonl), and the others are still captioned. The exit code is 0 if all were
captioned, 1 if some could not be read, 2 if there was nothing to caption.
"""

import math
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

from cappa_tf.inference import samplers
from cappa_tf.utils import console, files

FLAGS = flags.FLAGS

_ATTENTION_IMAGES = 32
_DEMO_IMAGES = 8


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, or any other captioner that can be opened.",
    )
    flags.DEFINE_string(
        "preset",
        None,
        "A preset in place of a checkpoint: scenes_mini, which comes with this "
        "program, hf://user/name, or a folder.",
    )
    flags.DEFINE_bool(
        "demo",
        False,
        "Captions a few rendered scenes, whose file names are their true "
        "captions, in place of given images: what scenes_mini was trained on.",
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Weights of the run: at its end, best by validation, those of the "
        "newest checkpoint, or the first of these that exists.",
    )
    flags.DEFINE_enum("format", "table", ["table", "jsonl"], "Output format.")
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Images per batch; 32 by default, fewer for few images, so that "
        "results appear gradually.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "attention",
        None,
        "PNG file to write: where the model looked for each word of the first "
        f"{_ATTENTION_IMAGES} images.",
    )
    _define_generation_flags()


# The flags that each sampler uses. None of them has a default here, so that a
# flag without effect is detected.
_USES = {
    name: (*uses, "seed") if name in samplers.RANDOM else uses
    for name, uses in samplers.OPTIONS.items()
}
_OF_SAMPLERS = tuple(
    dict.fromkeys(name for uses in _USES.values() for name in uses)
)
_PLAIN = ("prefix", "min_length", "no_repeat_ngram", "num_captions")


def _define_generation_flags():
    flags.DEFINE_enum(
        "sampler", "greedy", list(_USES), "Method that chooses the tokens."
    )
    flags.DEFINE_float(
        "temperature", None, "Temperature of sampling; 1 by default."
    )
    flags.DEFINE_integer(
        "top_k", None, "Samples from the k best tokens; 5 by default of top_k."
    )
    flags.DEFINE_float(
        "top_p",
        None,
        "Samples from the best tokens with this total probability; 0.9 by "
        "default.",
    )
    flags.DEFINE_integer("seed", None, "Seed of sampling; 0 by default.")
    flags.DEFINE_integer("beams", None, "Number of beams; 4 by default.")
    flags.DEFINE_float(
        "length_penalty", None, "Length penalty of beams; 0.6 by default."
    )
    flags.DEFINE_string("prefix", None, "Beginning of every caption.")
    flags.DEFINE_string(
        "prompt",
        None,
        "What every caption answers, for a model that was trained with "
        "prompts (gin/transfer/decoder.gin): 'caption:', or 'answer: ' and a "
        "question.",
    )
    flags.DEFINE_integer(
        "min_length", 0, "Minimum number of tokens of a caption."
    )
    flags.DEFINE_integer(
        "no_repeat_ngram",
        0,
        "Size of n-grams that may occur only once; 0 for no such rule.",
    )
    flags.DEFINE_integer("num_captions", 1, "Captions per image.")


def _generation(captioner):
    """Options of `captioner.generate` according to the flags.

    An invalid value ends the program with a line that names the given flags.
    """
    given = {
        name: FLAGS[name].value
        for name in (*_PLAIN, "sampler", *_OF_SAMPLERS)
        if FLAGS[name].value != FLAGS[name].default
    }
    try:
        options = _options()
        plan = {name: x for name, x in options.items() if name != "seed"}
        captioner.plan_generation(**plan)
    except ValueError as error:
        words = " ".join(f"--{name}={value}" for name, value in given.items())
        raise SystemExit(f"caption: {words}: {error}") from None
    return options


def _options():
    given = {
        name: FLAGS[name].value
        for name in _OF_SAMPLERS
        if FLAGS[name].value is not None
    }
    vain = sorted(given.keys() - set(_USES[FLAGS.sampler]))
    if vain:
        raise app.UsageError(
            f"--sampler={FLAGS.sampler} does not use --{', --'.join(vain)}"
        )
    options = {
        name: FLAGS[name].value
        for name in _PLAIN
        if FLAGS[name].value != FLAGS[name].default
    }
    if "seed" in given:
        options["seed"] = given.pop("seed")
    if FLAGS.sampler != "greedy":
        options["sampler"] = samplers.make_sampler(FLAGS.sampler, **given)
    return options


def main(argv):
    """Loads the model and captions the images."""
    with console.errors_as_lines("caption"):
        return _caption_all(argv[1:])


def _caption_all(arguments):
    """Captions the images in the arguments; returns the exit code."""
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.data.images import image_files
    from cappa_tf.inference import prompting
    from cappa_tf.inference.predictor import GENERATE, Predictor

    if FLAGS.attention is not None:
        files.check_output("attention", FLAGS.attention)
    flag = _model_flag()
    if FLAGS.demo and arguments:
        raise app.UsageError(f"--demo takes no images. Received: {arguments}")
    paths = image_files.find_pictures(arguments)
    if not paths and not FLAGS.demo:
        print("Nothing to caption: give images or folders.", file=sys.stderr)
        return 2
    with console.naming(flag, FLAGS[flag].value):
        predictor = Predictor.open(FLAGS[flag].value, FLAGS.weights)
        predictor.require("Captioning", GENERATE)
    if FLAGS.demo:
        paths = _demo_images(predictor.image_size)
    generation = _generation(predictor.model)
    for name in ("prefix", "prompt"):
        _warn_of_unknown(name, FLAGS[name].value, predictor.tokenizer)
    with console.naming("prompt", FLAGS.prompt or ""):
        prompting.check(predictor.model, predictor.tokenizer, FLAGS.prompt)
    decoder = predictor.make_decoder(
        batch_size=_batch_size(len(paths)), prompt=FLAGS.prompt, **generation
    )
    rows = decoder.caption_files(paths, predictor.preprocessing)
    if FLAGS.format == "table":
        print(f"{'log-lik.':>9} {'tok.':>4}  image  caption")
    unreadable, shown = 0, []
    with tqdm.tqdm(total=len(paths), unit="image", miniters=1) as bar:
        for path, row, reason in rows:
            unreadable += row is None
            # Before the line, which redraws the bar below it.
            bar.update()
            _print(path, row, reason)
            if row is not None and len(shown) < _ATTENTION_IMAGES:
                shown.append((path, row))
    if FLAGS.attention is not None and shown:
        _write_attention(predictor, shown)
    if unreadable:
        print(f"{unreadable} of {len(paths)} unreadable", file=sys.stderr)
    return 1 if unreadable else 0


def _model_flag():
    """Which of the flags --checkpoint and --preset was given."""
    given = [x for x in ("checkpoint", "preset") if FLAGS[x].value is not None]
    if len(given) != 1:
        raise app.UsageError("Give either --checkpoint or --preset.")
    return given[0]


def _demo_images(image_size):
    """Paths of rendered scenes, of compositions that no training shows."""
    from cappa_tf.data.scenes import world

    folder = tempfile.mkdtemp(prefix="cappa_demo_")
    return world.write_pictures(folder, _DEMO_IMAGES, max(32, *image_size))


def _warn_of_unknown(name, text, tokenizer):
    """Says which parts of a flag's text the vocabulary lacks."""
    unknown = [] if text is None else tokenizer.encode(text)[1]
    if unknown:
        words = ", ".join(map(repr, dict.fromkeys(unknown)))
        print(
            f"--{name}={text}: the vocabulary of the model has no piece for "
            f"{words}, which becomes the unknown token",
            file=sys.stderr,
        )


def _write_attention(predictor, shown):
    """Writes the attention maps of (path, row) pairs to --attention."""
    import numpy as np

    from cappa_tf.evaluation.sheet import write_attention_sheet
    from cappa_tf.inference.attention_maps import attention_maps

    paths, rows = zip(*shown)
    images = np.stack([predictor.preprocessing.read(path) for path in paths])
    maps = attention_maps(predictor.model, predictor.tokenizer, images, rows)
    write_attention_sheet(FLAGS.attention, rows, images, maps)
    print(f"written to {FLAGS.attention}", file=sys.stderr)


def _batch_size(images):
    if FLAGS.batch_size is not None:
        return FLAGS.batch_size
    return min(32, -(-images // 8))


def _print(path, row, reason):
    if row is None:
        print(f"{path}: {reason}", file=sys.stderr)
        lines = [console.json_line({"image": path, "error": reason})]
        lines = lines if FLAGS.format == "jsonl" else []
    else:
        one = _json if FLAGS.format == "jsonl" else _line
        ranked = enumerate([row, *row.others], 1)
        lines = [one(path, rank, each) for rank, each in ranked]
    for line in lines:
        # Clears the bar on stderr while a line is printed.
        tqdm.tqdm.write(line, file=sys.stdout)


def _line(path, rank, row):
    del rank
    return (
        f"{row.log_likelihood:9.3f} {len(row.pieces):4d}  {path}  {row.caption}"
    )


def _json(path, rank, row):
    values = {
        "image": path,
        "error": None,
        "rank": rank,
        **({"prompt": row.prompt} if row.prompt else {}),
        "caption": row.caption,
        "log_likelihood": row.log_likelihood,
        "tokens": len(row.pieces),
        "pieces": row.pieces,
        # null if the probability is too small for float32.
        "log_probs": [math.log(p) if p else None for p in row.probabilities],
    }
    return console.json_line(values)


if __name__ == "__main__":
    console.run(main, define_flags)
