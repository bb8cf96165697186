"""Converts a folder of captioned images to a data set of TFRecord shards.

    python tools/prepare_data.py --input=photos --output=photos_prepared

--input is a folder, or a table in it. Supported layouts:

    captions.jsonl        lines {"image": "a/1.jpg", "captions": ["...", ...]},
                          or "caption"; optional "split", "label", "key"
    captions.csv .tsv     a row per caption; comma, tab, semicolon or bar;
    .txt                  with a header, or image and caption
    metadata.jsonl .csv   Hugging Face's imagefolder (file_name, text), also
    .parquet              in train/, validation/ and test/
    .json                 a list of such rows, COCO's captions_*.json,
                          Karpathy's dataset_*.json with its splits, or one of
                          VQAv2, GQA and OCR-VQA
    .parquet              paths or images, Hugging Face's or img2dataset's
                          (the extra 'parquet')
    a/1.jpg a/1.txt       a text file beside each image, one caption per line

The column of the image may be called image, file_name, filename, filepath,
path, ...; that of the caption caption, captions, text, title, .... Rows of one
image are merged. Text is UTF-8, or UTF-16 with a byte order mark.

Questions are rows with question and answers (one or a list; also answer) in
place of captions, and optionally question_type; or one row an image with
"qa": [["what color is it?", "red"], ...]. VQAv2 needs questions.json and
annotations.json beside each other, or both under the published names:

    python tools/prepare_data.py --input=coco --output=vqav2 \
        --captions=vqa/v2_OpenEnded_mscoco_val2014_questions.json

Splits have the names of the captions file ("train", "dev", "test", ...). If it
has none, images are assigned to splits at random by --split_fractions. Images
and captions that cannot be used are skipped, counted, and listed in
OUTPUT/prepare_data.log.

A conversion that was killed resumes with the same command. --runner converts
on Apache Beam, with the same bytes as result; Beam's own options follow --:

    python tools/prepare_data.py --input=photos --output=photos_prepared \
        --num_shards=64 --runner=DirectRunner -- \
        --direct_running_mode=multi_processing --direct_num_workers=8
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

from cappa_tf.utils import console, files
from cappa_tf.utils.arguments import check_extra

FLAGS = flags.FLAGS
LOG_NAME = "prepare_data.log"
# Maximum number of names to print for each reason; the log has all.
MOST_NAMES = 5


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string(
        "input", None, "Folder or captions file.", required=True
    )
    flags.DEFINE_string(
        "captions",
        None,
        "Table of the captions, if it should not be guessed; image paths are "
        "then relative to --input.",
    )
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_string(
        "name", None, "Name of the data set; by default that of --output."
    )
    flags.DEFINE_integer("num_shards", 8, "Shards per split.", lower_bound=1)
    flags.DEFINE_list(
        "split_fractions",
        None,
        "For example train=0.9,test=0.1; replaces the splits of the captions "
        "file. By default images without a split are divided by "
        "train=0.9,validation=0.1.",
    )
    flags.DEFINE_integer(
        "resize",
        None,
        "Downsize images so that the shorter side is at most this long, and "
        "store them as JPEG. By default files are stored as they are.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "min_side", 8, "Skip images with a shorter side.", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_pixels",
        25_000_000,
        "Skip images of more pixels, unless --resize downsizes them.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "max_caption_characters",
        1000,
        "Leave longer captions, questions and answers out.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "require_captions", True, "Skip images without a caption."
    )
    flags.DEFINE_integer(
        "workers",
        None,
        "Threads that read and check images; by default one per core.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "runner",
        None,
        "Apache Beam's DirectRunner, DataflowRunner, FlinkRunner, SparkRunner "
        "or PortableRunner (the extra 'beam'). By default this process "
        "converts.",
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace another data set in --output."
    )


def main(argv):
    """Prepares the data; input errors are printed as one line."""
    if len(argv) > 1 and FLAGS.runner is None:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("prepare_data"):
        prepare(argv[1:])


def prepare(beam_arguments):
    """Plans, converts and publishes a data set according to the flags."""
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.data.prepare import conversion, dataset_writer
    from cappa_tf.data.sources import image_rows

    if FLAGS.runner is not None:
        check_extra("--runner", "beam", "apache_beam")
    for flag in ("input", "output", "captions"):
        if FLAGS[flag].value == "":
            raise ValueError(f"--{flag} must not be empty. Received: --{flag}=")
    output = files.absolute(FLAGS.output)
    name = FLAGS.name or os.path.basename(output)
    metadata = {"source": files.absolute(FLAGS.captions or FLAGS.input)}
    options = image_rows.Options(
        split_fractions=parse_fractions(FLAGS.split_fractions),
        resize=FLAGS.resize,
        min_side=FLAGS.min_side,
        max_pixels=FLAGS.max_pixels,
        max_caption_characters=FLAGS.max_caption_characters,
        require_captions=FLAGS.require_captions,
    )
    dataset_writer.check_name("name", name)
    dataset_writer.check_output(output, name, metadata, FLAGS.overwrite)
    skipped = image_rows.Skipped()
    rows = image_rows.read_rows(
        files.absolute(FLAGS.input), FLAGS.captions, skipped
    )
    classes = image_rows.class_names(rows) or image_rows.named_classes(rows)
    if classes:
        metadata["classes"] = classes
    plans = conversion.plan(rows, output, FLAGS.num_shards, options, skipped)
    convert(plans, beam_arguments)
    description, reused = conversion.finish(
        plans, output, name, metadata, skipped
    )
    lines = "".join(line + "\n" for line in skipped.lines)
    log = os.path.join(output, LOG_NAME)
    files.write_text(log, lines, errors="backslashreplace")
    print_table(description, skipped)
    if reused:
        print(f"{reused} shards reused from an interrupted conversion")


def convert(plans, beam_arguments):
    """Writes the shards, in this process or on Beam."""
    from cappa_tf.data.prepare import conversion

    if FLAGS.runner is None:
        total = sum(plan.num_rows for plan in plans)
        with tqdm.tqdm(total=total, unit=" images", smoothing=0.05) as progress:
            for plan in plans:
                conversion.convert(plan.path, FLAGS.workers, progress.update)
        return
    from cappa_tf.data.prepare import beam

    beam.convert(plans, FLAGS.runner, beam_arguments, FLAGS.workers)


def parse_fractions(items):
    """Parses ["train=0.9", "test=0.1"] to a dict; None for None."""
    if items is None:
        return None
    fractions = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            fractions[name] = float(value)
        except ValueError:
            fractions[name] = -1.0
    if any(f < 0 for f in fractions.values()) or not sum(fractions.values()):
        raise ValueError(
            "--split_fractions must be name=fraction,..., not all 0. "
            f"Received: --split_fractions={','.join(items)}"
        )
    return fractions


def print_table(description, skipped):
    """Prints the splits written, and the skipped items by reason."""
    asked = any(map(description.num_prompts, description.splits))
    answers = f"{'answers':>10}" if asked else ""
    print(f"{'split':<24}{'images':>10}{'captions':>10}{answers}{'shards':>8}")
    for split in description.splits:
        content = description.split(split)
        if asked:
            answers = f"{description.num_prompts(split):>10}"
        print(
            f"{split:<24}{content['num_examples']:>10}"
            f"{content['num_captions']:>10}{answers}"
            f"{len(content['shards']):>8}"
        )
    if not skipped.counts:
        print("nothing skipped")
    names = skipped.names(MOST_NAMES)
    for reason, count in skipped.counts.most_common():
        print(f"skipped: {reason:<45}{count:>7}")
        for name in names[reason]:
            print(f"    {name}")
        if count > MOST_NAMES:
            print(f"    and {count - MOST_NAMES} more")
    if skipped.counts:
        print(f"all names: {os.path.join(description.directory, LOG_NAME)}")


if __name__ == "__main__":
    console.run(main, define_flags)
