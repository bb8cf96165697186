"""Measures a trained model on a task.

    python tools/evaluate.py --task=fewshot --checkpoint=runs/mine \
        --data=pets --train_split=train --test_split=test

Tasks:
    fewshot  ridge regression on frozen features of few examples of each class;
             --data is a folder of labelled pictures (labels.jsonl with lines
             {"image": "a/1.jpg", "label": 3, "split": "train"}) or of TFRecords

--checkpoint is the folder of a run, a .keras file (captioner or vision
encoder) or an npz of big_vision. A table is printed, and the same figures are
written as JSON to --output, by default beside the checkpoint.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    flags.DEFINE_enum(
        "task", None, sorted(TASKS), "What to measure.", required=True, **where
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, .keras file or big_vision's npz.",
        required=True,
        **where,
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Which weights of a run: at its end, best by validation, of the "
        "newest checkpoint, or the first of these that is there.",
        **where,
    )
    flags.DEFINE_string(
        "data",
        None,
        "Folder of the pictures or TFRecords.",
        required=True,
        **where,
    )
    flags.DEFINE_string("train_split", "train", "Split to learn from.", **where)
    flags.DEFINE_string("test_split", "test", "Split to measure on.", **where)
    flags.DEFINE_integer(
        "batch_size", 64, "Pictures encoded at once.", lower_bound=1, **where
    )
    flags.DEFINE_string(
        "output",
        None,
        "JSON file to write; by default TASK.json in the folder of the run, "
        "or CHECKPOINT.TASK.json beside a file.",
        **where,
    )
    _define_fewshot_flags(where)


def _define_fewshot_flags(where):
    flags.DEFINE_list(
        "shots", ["1", "5", "10", "25"], "Examples of each class.", **where
    )
    flags.DEFINE_list(
        "l2", ["1024"], "Penalties of the regression, above 0.", **where
    )
    flags.DEFINE_integer(
        "num_seeds",
        3,
        "Draws of the examples to learn from.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_enum(
        "resize",
        "squash",
        ["squash", "resize_small"],
        "Before the central crop of 224 in 256: both sides to 256 (as the "
        "paper's numbers are taken), or only the shorter one.",
        **where,
    )


def load_encoder(path, weights="auto"):
    """The vision encoder of a run, a .keras file or an npz."""
    # TensorFlow takes seconds to load: --help need not wait for it.
    from cappa_tf.export import big_vision
    from cappa_tf.training import workdir

    if path.endswith(".npz"):
        return big_vision.load_vision_encoder(path)
    model = workdir.load_captioner(path, weights)
    return getattr(model, "vision_encoder", model)


def fewshot(options):
    """Few-shot accuracies of the features.

    Args:
        options: The parsed flags.

    Returns:
        (lines of a table, dict for the JSON file).
    """
    import tqdm

    from cappa_tf.evaluation import fewshot, labelled

    shots = _numbers("shots", options.shots, int)
    l2 = _numbers("l2", options.l2, float)
    encoder = load_encoder(options.checkpoint, options.weights)
    features, skipped = [], {}
    for split in (options.train_split, options.test_split):
        data = labelled.LabelledImages(
            options.data, split, encoder.image_size, options.resize
        )
        with tqdm.tqdm(desc=split, unit=" pictures") as progress:
            features.append(
                labelled.extract_features(
                    encoder, data, options.batch_size, progress.update
                )
            )
        skipped[split] = dict(data.skipped)
    results = fewshot.evaluate(*features, shots, l2, options.num_seeds)
    classes = max(int(labels.max()) for _, labels in features) + 1
    counts = [len(labels) for _, labels in features]
    table = [
        f"{classes} classes, {counts[0]} pictures to draw from, "
        f"{counts[1]} to test on",
        f"{'shots':>5}{'l2':>10}{'accuracy':>10}{'+-':>8}   each seed",
    ]
    for result in results:
        seeds = " ".join(f"{a:.2%}" for a in result.accuracies)
        table.append(
            f"{result.shots:>5}{result.l2:>10g}{result.mean:>10.2%}"
            f"{result.std:>8.2%}   {seeds}"
        )
    for split, reasons in skipped.items():
        table += [f"skipped of {split}: {n} x {r}" for r, n in reasons.items()]
    report = {
        "classes": classes,
        "examples": dict(zip(("train", "test"), counts)),
        "skipped": skipped,
        "resize": options.resize,
        "results": [
            {
                "shots": r.shots,
                "l2": r.l2,
                "mean": r.mean,
                "std": r.std,
                "accuracies": r.accuracies,
            }
            for r in results
        ],
    }
    return table, report


def _numbers(name, values, kind):
    """Positive numbers of a list flag."""
    try:
        numbers = [kind(value) for value in values]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < n < float("inf") for n in numbers):
        raise ValueError(
            f"--{name} must be numbers above 0, separated by commas. "
            f"Received: --{name}={','.join(values)}"
        )
    return numbers


# A task maps the parsed flags to (lines of a table, dict for the JSON file).
TASKS = {"fewshot": fewshot}


def evaluate(options):
    """Runs the task; prints its table and writes its JSON file.

    Returns:
        Path of the JSON file.
    """
    path = options.output or default_output(options.checkpoint, options.task)
    table, report = TASKS[options.task](options)
    print("\n".join(table))
    report = {
        "task": options.task,
        "checkpoint": options.checkpoint,
        "data": options.data,
        "splits": [options.train_split, options.test_split],
        **report,
    }
    with open(path, "w") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    print(f"written to {path}")
    return path


def default_output(checkpoint, task):
    """Path of the JSON file beside a checkpoint."""
    if os.path.isdir(checkpoint):
        return os.path.join(checkpoint, f"{task}.json")
    return f"{os.path.splitext(checkpoint)[0]}.{task}.json"


def main(argv):
    """Evaluates; errors of the input are one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    try:
        evaluate(flags.FLAGS)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate: {error}") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
