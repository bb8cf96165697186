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
        --prompt="answer: what color is the car" photo.jpg

Prints one line per caption, the best of an image first: its log-likelihood (the
sum over its tokens, in nats), the number of tokens including the end of the
caption, and the caption; jsonl also has the log-probability of each token. An
image that cannot be read is reported on stderr (and as an `error` row of
jsonl), and the others are still captioned. The exit code is 0 if all were
captioned, 1 if some could not be read, 2 if there was nothing to caption.

Whole data sets: --data reads any data that training reads, and --output is a
data set to train on (DATA='data/recaptioned'): the same images, keys, labels
and splits with the new captions. --write=scores writes scores of the captions
that are there, or of --labels; --write=embeddings those of the images; and
--format=parquet a table without images. Shards are written by this process or,
with --runner, on Apache Beam, whose own options follow --:

    python tools/caption.py --checkpoint=runs/mine --data=data/mine \
        --output=data/recaptioned
    python tools/caption.py --checkpoint=runs/mine \
        --data="cc3m/{split}-*.tar" --splits=train --output=data/cc3m \
        --runner=DirectRunner -- --direct_running_mode=multi_processing \
        --direct_num_workers=8
    python tools/caption.py --preset=hf://user/name --data=tfds:coco_captions \
        --output=scores --write=scores --format=parquet

Images that cannot be read are left out (a row with `error` in Parquet), counted
by reason, and listed in OUTPUT/annotation.log; the exit code is 0. A job that
was killed resumes with the same command. Data that need a gin file to be read
are given by --gin_file and --gin_param of their training in place of --data.
"""

import contextlib
import math
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

from cappa_tf import config
from cappa_tf.inference import samplers
from cappa_tf.utils import console, files
from cappa_tf.utils.arguments import check_extra

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
    flags.DEFINE_enum(
        "format",
        None,
        ["table", "jsonl", "tfrecord", "parquet"],
        "Output format: table (the default) or jsonl of images, tfrecord (the "
        "default) or parquet of --data.",
    )
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Images per batch; 32 by default, fewer for few images on the command "
        "line, so that results appear gradually.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "attention",
        None,
        "PNG file to write: where the model looked for each word of the first "
        f"{_ATTENTION_IMAGES} images.",
    )
    _define_generation_flags()
    _define_data_flags()


def _define_data_flags():
    config.define_flags(runs=False)
    flags.DEFINE_string(
        "data",
        None,
        "Data set in place of images: the folder of one (prepare_data's, of "
        "images, of tar or TFRecord shards or of TFDS), a pattern such as "
        "'cc3m/{split}-*.tar', or tfds:NAME.",
    )
    flags.DEFINE_list(
        "splits", None, "Splits of --data; by default all that it names."
    )
    flags.DEFINE_string("output", None, "Folder to write, for --data.")
    flags.DEFINE_enum(
        "write",
        "captions",
        ["captions", "scores", "embeddings"],
        "What to write about the images of --data.",
    )
    flags.DEFINE_bool(
        "keep_captions",
        False,
        "Keep the captions of --data, before the new ones.",
    )
    flags.DEFINE_string(
        "labels",
        None,
        "Text file with a text on each line, to score for each image; by "
        "default its own captions are scored.",
    )
    flags.DEFINE_string(
        "kind",
        None,
        "Kind of --write=scores: autoregressive, parallel, blind, minus_blind "
        "or cosine, by default the first that the model has; of "
        "--write=embeddings: features (the default) or cosine.",
    )
    flags.DEFINE_integer(
        "shard_size",
        1024,
        "Maximum number of images of a shard, which a kill loses at most.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "runner",
        None,
        "Apache Beam's DirectRunner, DataflowRunner, FlinkRunner, SparkRunner "
        "or PortableRunner (the extra 'beam'). By default this process writes.",
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace what --output holds of another job."
    )


# Flags that are only for data sets, and those that are only for images.
_OF_DATA = (
    "splits output write keep_captions labels kind shard_size runner overwrite "
    "gin_param"
).split()
_OF_IMAGES = ("demo", "attention")


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
    with _naming_generation():
        options = _with_sampler(_options())
        plan = {name: x for name, x in options.items() if name != "seed"}
        captioner.plan_generation(**plan)
    return options


@contextlib.contextmanager
def _naming_generation():
    try:
        yield
    except ValueError as error:
        given = _given((*_PLAIN, "sampler", *_OF_SAMPLERS))
        raise SystemExit(f"caption: {_words(given)}: {error}") from None


def _with_sampler(options):
    from cappa_tf.models import sampling

    if "sampler" not in options:
        return options
    sampler = samplers.make_sampler(**options["sampler"])
    sampling.search_of(sampler)  # Checks its options.
    return {**options, "sampler": sampler}


def _given(names):
    """Dict of the flags among some names that have other values than usual."""
    return {
        name: FLAGS[name].value
        for name in names
        if FLAGS[name].value != FLAGS[name].default
    }


def _words(given):
    return " ".join(f"--{name}={value}" for name, value in given.items())


def _options():
    """The flags of generation as JSON values, with a dict for a sampler."""
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
    options = _given(_PLAIN)
    if "seed" in given:
        options["seed"] = given.pop("seed")
    if FLAGS.sampler != "greedy":
        options["sampler"] = {"name": FLAGS.sampler, **given}
    return options


def main(argv):
    """Loads the model and captions the images."""
    with console.errors_as_lines("caption"):
        is_data = FLAGS.data is not None or FLAGS.gin_file
        _check_flags(is_data)
        if is_data:
            return _annotate(argv[1:])
        return _caption_all(argv[1:])


def _check_flags(is_data):
    """Refuses flags without effect."""
    vain = _given(_OF_IMAGES if is_data else _OF_DATA)
    if vain:
        other = "images on the command line" if is_data else "--data"
        raise app.UsageError(f"{_words(vain)} is for {other}.")
    kinds = ("tfrecord", "parquet") if is_data else ("table", "jsonl")
    if FLAGS.format not in (None, *kinds):
        raise app.UsageError(
            f"--format={FLAGS.format} is not one of {', '.join(kinds)}, those "
            f"of {'data sets' if is_data else 'images on the command line'}."
        )


# -- Data sets -----------------------------------------------------------------


def _annotate(beam_arguments):
    """Annotates a data set according to the flags; returns the exit code."""
    if beam_arguments and FLAGS.runner is None:
        raise app.UsageError(
            "Images are captioned without --data, and Beam's options need "
            f"--runner. Received: {beam_arguments}"
        )
    if not FLAGS.output:
        raise app.UsageError("--data needs --output, a folder to write.")
    if FLAGS.data is not None and (FLAGS.gin_file or FLAGS.gin_param):
        raise app.UsageError("Give either --data or --gin_file.")
    if FLAGS.runner is not None:
        check_extra("--runner", "beam", "apache_beam")
    if FLAGS.format == "parquet":
        check_extra("--format=parquet", "parquet", "pyarrow")
    flag = _model_flag()
    files.check_output("output", FLAGS.output, is_folder=True)
    from cappa_tf.inference import annotation

    with _naming_generation():
        generation = _options()
        _with_sampler(generation)
    options = annotation.AnnotationOptions(
        write=FLAGS.write,
        file_format=FLAGS.format or "tfrecord",
        batch_size=FLAGS.batch_size or 32,
        keep_captions=FLAGS.keep_captions,
        prompt=FLAGS.prompt,
        generation=generation,
        labels=_labels(),
        kind=FLAGS.kind,
    )
    with tqdm.tqdm(unit="image", disable=FLAGS.runner is not None) as bar:

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        report = annotation.annotate(
            _source(),
            FLAGS.output,
            FLAGS[flag].value,
            options,
            splits=FLAGS.splits,
            weights=FLAGS.weights,
            shard_size=FLAGS.shard_size,
            runner=FLAGS.runner,
            runner_arguments=beam_arguments,
            overwrite=FLAGS.overwrite,
            on_record=show,
        )
    _print_report(report)
    return 0


def _source():
    if FLAGS.data is not None:
        return FLAGS.data
    # No run is started, so nothing is written to the workdir.
    config.parse(FLAGS.gin_file, list(FLAGS.gin_param), workdir="unused")
    return config.arguments()["train_data"].source


def _labels():
    """The lines of --labels, or None."""
    if FLAGS.labels is None:
        return None
    from cappa_tf.data import text

    with console.naming("labels", FLAGS.labels):
        content = text.decode(files.read_bytes(FLAGS.labels))
        return [line.strip() for line in text.lines(content) if line.strip()]


def _print_report(report):
    """Prints the splits written, and the images left out by reason."""
    rows = "rows" if FLAGS.format == "parquet" else "images"
    print(f"{'split':<24}{rows:>10}{'shards':>8}")
    for split, (examples, shards) in report.splits.items():
        print(f"{split:<24}{examples:>10}{shards:>8}")
    for reason, count in report.skipped.counts.most_common():
        print(f"bad: {reason:<49}{count:>7}")
    if report.skipped.counts:
        print(f"all names: {os.path.join(FLAGS.output, 'annotation.log')}")
    else:
        print("no bad images")
    if report.reused:
        print(f"{report.reused} shards reused from an interrupted job")
    if report.was_complete:
        print(f"{FLAGS.output} was complete; nothing was done")


# -- Images --------------------------------------------------------------------


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
    if FLAGS.format != "jsonl":
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
