"""Turns a folder of captioned images into a data set of TFRecord shards.

    python tools/prepare_data.py --input=photos --output=photos_prepared

--input is a folder (or the captions file in it) in one of three forms:

    captions.jsonl   {"image": "a/1.jpg", "captions": ["...", "..."]} a line;
                     optional "split", "label" and "key"
    captions.csv     image,caption a row; optional columns as above
    a/1.jpg a/1.txt  a text file beside each image, one caption a line

Splits keep the names the captions file gives them ("train", "dev", "test",
...); without any, --split_fractions draws them. Unusable pictures and captions
are skipped, counted, and listed in OUTPUT/prepare_data.log.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

from cappa_tf.data import sources, tfrecord

LOG_NAME = "prepare_data.log"

_INPUT = flags.DEFINE_string(
    "input", None, "Folder or captions file.", required=True
)
_CAPTIONS = flags.DEFINE_string(
    "captions", None, "Captions file (.jsonl or .csv), if not to be guessed."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder to write to.", required=True
)
_NAME = flags.DEFINE_string(
    "name", None, "Name of the data set; by default that of --output."
)
_NUM_SHARDS = flags.DEFINE_integer(
    "num_shards", 8, "Shards of a split.", lower_bound=1
)
_SPLIT_FRACTIONS = flags.DEFINE_list(
    "split_fractions",
    None,
    "For example train=0.9,test=0.1; replaces the splits of the captions "
    "file. By default used for pictures without one: "
    + ",".join(f"{k}={v}" for k, v in sources.DEFAULT_SPLITS.items()),
)
_RESIZE = flags.DEFINE_integer(
    "resize",
    None,
    "Shrink pictures so that the shorter side is at most this long, and store "
    "them as JPEG. By default files are stored as they are.",
    lower_bound=1,
)
_MIN_SIDE = flags.DEFINE_integer(
    "min_side", 8, "Skip pictures with a shorter side.", lower_bound=1
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels",
    25_000_000,
    "Skip pictures of more pixels, unless --resize shrinks them.",
    lower_bound=1,
)
_MAX_CAPTION_CHARACTERS = flags.DEFINE_integer(
    "max_caption_characters", 1000, "Leave longer captions out.", lower_bound=1
)
_REQUIRE_CAPTIONS = flags.DEFINE_bool(
    "require_captions", True, "Skip pictures without a caption."
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    os.cpu_count(),
    "Threads that read and check images.",
    lower_bound=1,
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace another data set that lies in --output."
)


def parse_fractions(items):
    """{"train": 0.9, "test": 0.1} of ["train=0.9", "test=0.1"]."""
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
    """Prints the splits written and what was skipped, by reason."""
    print(f"{'split':<24}{'pictures':>10}{'captions':>10}{'shards':>8}")
    for split in description.splits:
        content = description.split(split)
        print(
            f"{split:<24}{content['num_examples']:>10}"
            f"{content['num_captions']:>10}{len(content['shards']):>8}"
        )
    if not skipped.counts:
        print("nothing skipped")
    for reason, count in skipped.counts.most_common():
        print(f"skipped: {reason:<45}{count:>7}")
    if skipped.counts:
        print(f"names: {os.path.join(description.directory, LOG_NAME)}")


def main(argv):
    """Reads, checks, writes; the flags say what."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    output = os.path.abspath(_OUTPUT.value)
    name = _NAME.value or os.path.basename(output)
    source = os.path.abspath(_CAPTIONS.value or _INPUT.value)
    fractions = _SPLIT_FRACTIONS.value and parse_fractions(
        _SPLIT_FRACTIONS.value
    )
    options = sources.Options(
        split_fractions=fractions,
        resize=_RESIZE.value,
        min_side=_MIN_SIDE.value,
        max_pixels=_MAX_PIXELS.value,
        max_caption_characters=_MAX_CAPTION_CHARACTERS.value,
        require_captions=_REQUIRE_CAPTIONS.value,
    )
    skipped = sources.Skipped()
    rows = sources.read_rows(_INPUT.value, _CAPTIONS.value, skipped)
    metadata = {"source": source}
    if classes := sources.class_names(rows):
        metadata["classes"] = classes
    with tqdm.tqdm(rows, unit=" pictures", smoothing=0.05) as progress:
        description = tfrecord.write_dataset(
            sources.read_examples(
                progress, skipped, options, _WORKERS.value, classes
            ),
            output,
            name,
            _NUM_SHARDS.value,
            metadata,
            _OVERWRITE.value,
        )
    log = pathlib.Path(output) / LOG_NAME
    log.write_text("".join(line + "\n" for line in skipped.lines))
    print_table(description, skipped)


def run():
    """Entry point: errors of input are one line, not a traceback."""
    app.run(_main_with_plain_errors)


def _main_with_plain_errors(argv):
    try:
        main(argv)
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: interrupted; nothing was written")


if __name__ == "__main__":
    run()
