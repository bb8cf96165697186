"""Captions pictures with a trained model.

    python tools/caption.py --checkpoint=runs/quickstart photo.jpg folder/
    python tools/caption.py --checkpoint=runs/flickr8k --format=jsonl photos/

One line per picture: its caption, the caption's log-likelihood (the sum over
its tokens, in nats) and the number of tokens, the end of the caption counted.
A picture that cannot be read is named on stderr (and is an `error` row of
jsonl), and the others go on. Exit code 0 if all were captioned, 1 if some
could not be read, 2 if there was nothing to caption.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tqdm
from absl import app, flags

FLAGS = flags.FLAGS


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string("checkpoint", None, "Folder of a run.", required=True)
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Which weights of the run: at its end, best by validation, of the "
        "newest checkpoint, or the first of these that is there.",
    )
    flags.DEFINE_enum("format", "table", ["table", "jsonl"], "Of the output.")
    flags.DEFINE_integer(
        "batch_size", 32, "Pictures captioned at once.", lower_bound=1
    )


def main(argv):
    """Loads the model and prints a line per picture."""
    # TensorFlow takes seconds to load: --help should not.
    from cappa_tf.data import picture_files
    from cappa_tf.evaluation import captioning, picture_captions
    from cappa_tf.training import workdir

    paths = picture_files.find_pictures(argv[1:])
    if not paths:
        print("Nothing to caption: give pictures or folders.", file=sys.stderr)
        return 2
    try:
        tokenizer, preprocessing = workdir.load_preprocessing(FLAGS.checkpoint)
        captioner = workdir.load_captioner(FLAGS.checkpoint, FLAGS.weights)
    except ValueError as error:
        raise SystemExit(f"--checkpoint: {error}") from None
    rows = picture_captions.caption_pictures(
        paths,
        picture_captions.PictureReader(**preprocessing),
        captioning.CaptionDecoder(captioner, tokenizer, FLAGS.batch_size),
    )
    if FLAGS.format == "table":
        print(f"{'log-lik.':>9} {'tok.':>4}  picture  caption")
    unreadable = 0
    for path, row, reason in tqdm.tqdm(rows, total=len(paths), unit="picture"):
        unreadable += row is None
        _print(path, row, reason)
    if unreadable:
        print(f"{unreadable} of {len(paths)} unreadable", file=sys.stderr)
    return 1 if unreadable else 0


def _print(path, row, reason):
    if row is None:
        print(f"{path}: {reason}", file=sys.stderr)
    if FLAGS.format == "jsonl":
        values = {"image": path, "error": reason}
        if row is not None:
            values = {
                "image": path,
                "caption": row.caption,
                "log_likelihood": row.log_likelihood,
                "tokens": len(row.pieces),
            }
        line = json.dumps(values, ensure_ascii=False)
    elif row is None:
        return
    else:
        line = (
            f"{row.log_likelihood:9.3f} {len(row.pieces):4d}  "
            f"{path}  {row.caption}"
        )
    # The bar on stderr steps aside while a line is printed.
    tqdm.tqdm.write(line, file=sys.stdout)


if __name__ == "__main__":
    define_flags()
    app.run(main)
