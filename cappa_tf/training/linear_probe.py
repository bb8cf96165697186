"""Linear probe: softmax regression on the features of a frozen encoder.

The features of each split are computed once and kept on disk. A sweep fits a
head for each setting and compares them on examples that are not those of the
test; the best setting is then fitted to all of train, and tested once.

It is an entry point of its own beside `train.train`, as it has no steps to
interrupt: killed, it starts again, with the features that it has. The result is
a run's folder, whose model is a `Classifier`.

Abbreviations for dimensions:
    N: examples.  D: width of the features.  C: classes.
"""

import dataclasses
import itertools
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.evaluation import classification
from cappa_tf.evaluation.evaluator import json_value, table
from cappa_tf.inference.feature_cache import FeatureCache
from cappa_tf.models.classifier import Classifier
from cappa_tf.saving.run_folder import describe_run, save_model
from cappa_tf.saving.run_lock import RunLock
from cappa_tf.training.construct import constructed, dtype_policy, seeded
from cappa_tf.training.settings import PRECISIONS, FeatureSettings
from cappa_tf.training.softmax_regression import SoftmaxRegression
from cappa_tf.utils import arguments, files

SOLVERS = ("lbfgs", "sgd")
DEFAULT_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)
DEFAULT_RATES = (0.3, 0.1, 0.03, 0.01)
_FEATURES = FeatureSettings(features="cached")
# Classes that a message names.
_MOST_NAMES = 20


class Labelled(NamedTuple):
    """Features and labels of some examples.

    Attributes:
        features: float [N, D].
        labels: int64 [N].
    """

    features: np.ndarray
    labels: np.ndarray

    def at(self, rows):
        """The examples at some positions."""
        return Labelled(self.features[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Solver of a linear probe, and the settings that it chooses from.

    Raises:
        ValueError: If a field is of the wrong type or range; names it.
    """

    solver: str = "lbfgs"
    """"lbfgs" (full batch, needs SciPy) or "sgd" (momentum 0.9, cosine)."""

    weight_decays: list | tuple = DEFAULT_DECAYS
    """Values of the weight decay, for standardized features."""

    learning_rates: list | tuple = DEFAULT_RATES
    """First learning rates, for "sgd" only."""

    held_out: float = 0.2
    """Fraction of each class of train that the settings are compared on, if
    there is no split for it."""

    max_steps: int = 300
    """Maximum number of iterations of "lbfgs"."""

    epochs: int = 50
    """Passes over train of "sgd"."""

    batch_size: int = 512
    """Examples of a step of "sgd"."""

    seed: int = 0
    """Seed of the held-out part and of the order of "sgd"."""

    def __post_init__(self):
        arguments.check_choice(SOLVERS, solver=self.solver)
        arguments.check_fraction(held_out=self.held_out)
        arguments.check_integer("seed", self.seed, 0)
        arguments.check_counts(
            max_steps=self.max_steps,
            epochs=self.epochs,
            batch_size=self.batch_size,
        )
        for name in ("weight_decays", "learning_rates"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"`{name}` must not be empty. Received: []")
            for value in values:
                arguments.check_number(
                    name, value, exclusive=name == "learning_rates"
                )

    def settings(self):
        """List of dicts of the settings, from strong to weak decay."""
        decays = sorted(set(self.weight_decays), reverse=True)
        if self.solver == "lbfgs":
            return [{"weight_decay": decay} for decay in decays]
        rates = sorted(set(self.learning_rates))
        return [
            {"learning_rate": rate, "weight_decay": decay}
            for rate, decay in itertools.product(rates, decays)
        ]


_SWEEP = SweepSettings()


def linear_probe(
    vision_encoder,
    data: str | os.PathLike,
    workdir: str,
    *,
    train_split="train",
    test_split="test",
    eval_split: str | None = None,
    num_classes: int | None = None,
    resize="squash",
    sweep: SweepSettings = _SWEEP,
    features: FeatureSettings = _FEATURES,
    precision="float32",
    seed=0,
    dry_run=False,
    on_start=None,
    on_first_step=None,
):
    """Fits a linear head to the features of an encoder, and tests it.

    Args:
        vision_encoder: Built encoder, or its constructor.
        data: Folder of labeled images, or a source, as of `CaptionDataset`.
        workdir: Folder of the results; made if missing.
        train_split: Split to fit.
        test_split: Split to test on, once, with the chosen setting.
        eval_split: Split to choose the setting on; None holds out a part of
            train.
        num_classes: C; None for that of the data's class names, or without
            names for one more than the largest label of train.
        resize: How images are resized, as of `CaptionDataset`.
        sweep: Solver and settings.
        features: Where features are kept, and in which type.
        precision: Dtype policy in which the encoder computes.
        seed: Seed of the weights of an encoder with random ones.
        dry_run: Prints the sizes and stops before any data is read.
        on_start: Called with `workdir` before features are computed.
        on_first_step: Called with `workdir` and 0 once they are.

    Returns:
        The contents of results.json: `top_1`, `top_5` (with more than five
        classes) and the other figures of the test; `chosen`, the setting;
        `sweep`, the table of all settings.

    Raises:
        ValueError: If an argument, the encoder or a label cannot be used.
    """
    arguments.check_choice(PRECISIONS, precision=precision)
    arguments.check_bool(dry_run=dry_run)
    with seeded(seed), dtype_policy(precision):
        encoder = constructed(vision_encoder, "vision_encoder", "pool", "grid")
    width = _width(encoder)
    if dry_run:
        print(
            f"vision_encoder {encoder.count_params():,} parameters, features "
            f"of {width}, {len(sweep.settings())} settings to try"
        )
        return {"width": width, "settings": sweep.settings()}
    with RunLock(workdir) as lock, _Log(workdir) as log:
        if on_start is not None:
            on_start(workdir)
        splits = {"train": train_split, "test": test_split}
        if eval_split is not None:
            splits["eval"] = eval_split
        datasets = {
            name: CaptionDataset(
                data, split, None, encoder.image_size, resize=resize
            )
            for name, split in splits.items()
        }
        found, skipped = _features(encoder, datasets, workdir, features, log)
        lock.check()
        if on_first_step is not None:
            on_first_step(workdir, 0)
        names = getattr(datasets["train"].source, "class_names", [])
        classes = _count_classes(found, splits, num_classes, names)
        _report_classes(found["train"], classes, names, log)
        head, choice = _choose_and_fit(found, classes, sweep, log)
        result = classification.report(
            np.asarray(tf.nn.softmax(head.logits(found["test"].features))),
            found["test"].labels,
            names,
            skipped=skipped["test"],
            source=f"split {test_split!r} of {datasets['test'].path}",
        )
        log("\n".join(result.lines))
        lock.check()
        model = _classifier(encoder, classes, head, precision)
        describe_run(workdir, model, datasets["train"])
        save_model(workdir, model)
        counts = {name: len(split.labels) for name, split in found.items()}
        results = {
            **result.metrics,
            **choice,
            **result.details,
            "width": width,
            "examples": counts,
            "splits": splits,
            "skipped": {name: dict(n) for name, n in skipped.items()},
        }
        path = os.path.join(workdir, "results.json")
        files.write_json(path, json_value(results), indent=1)
        log(f"results in {path}")
        return results


def _width(encoder):
    shape = encoder.output_shapes().get("pre_logits")
    if shape is None:
        raise ValueError(
            "A linear probe needs an encoder that pools: set POOLING "
            f"(`pooling`). Received: pooling={encoder.pooling!r}"
        )
    return shape[-1]


class _Log:
    """Lines for the terminal and for train.log."""

    def __init__(self, workdir):
        self._file = files.LineFile(os.path.join(workdir, "train.log"))

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._file.close()

    def __call__(self, text):
        print(text, file=sys.stdout, flush=True)
        self._file.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def _features(encoder, datasets, workdir, settings, log):
    """(dict of `Labelled`, dict of Counters of what was left out) by split."""
    folder = settings.cache_folder or os.path.join(workdir, "features")
    found, skipped = {}, {}
    for name, dataset in datasets.items():
        cache = FeatureCache.open_or_compute(
            encoder,
            dataset,
            "pre_logits",
            folder=folder,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
        )
        log(cache.origin)
        features, labels, left_out = cache.labelled()
        skipped[name] = left_out
        for reason, count in left_out.items():
            log(f"skipped in {name}: {count} x {reason}")
        if not len(labels):
            raise ValueError(
                f"There is no labeled image in split {dataset.split!r} of "
                f"{dataset.path}. Received: skipped={dict(left_out)}"
            )
        features = np.asarray(features, np.float32)
        if not np.isfinite(features).all():
            raise ValueError(
                "Features must be finite: set FEATURE_TYPE or PRECISION to "
                f"'float32'. Received: {cache.path}"
            )
        found[name] = Labelled(features, labels)
    return found, skipped


def _count_classes(found, splits, num_classes, names):
    """C, which every label of every split must be below."""
    classes = num_classes or len(names) or int(found["train"].labels.max()) + 1
    for name, split in found.items():
        largest = int(split.labels.max())
        if largest >= classes:
            origin = (
                "NUM_CLASSES"
                if num_classes
                else "the class names"
                if names
                else f"the labels of {splits['train']!r}"
            )
            raise ValueError(
                f"Labels must be below the number of classes, {classes} "
                f"according to {origin}. Received: label {largest} in split "
                f"{splits[name]!r}"
            )
    if classes < 2:
        raise ValueError(
            "There must be at least two classes. Received: label 0 only"
        )
    return classes


def _report_classes(train, classes, names, log):
    """Logs the classes that nothing can be learned about."""
    counts = np.bincount(train.labels, minlength=classes)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        named = [
            " ".join([str(number), *names[number : number + 1]])
            for number in absent[:_MOST_NAMES].tolist()
        ]
        more = " ..." if len(absent) > _MOST_NAMES else ""
        log(
            f"no training image of {len(absent)} of {classes} classes, which "
            f"are never predicted: {', '.join(named)}{more}"
        )
    log(
        f"{len(train.labels):,} training images, {classes} classes of "
        f"{counts[counts > 0].min()} to {counts.max()}"
    )


def hold_out(labels, fraction, seed):
    """Splits examples at random, each class alike.

    Args:
        labels: int [N].
        fraction: Fraction of each class to hold out, rounded; at least one
            example of a class is kept.
        seed: Seed of the choice.

    Returns:
        (kept, held out): sorted positions.
    """
    generator = np.random.default_rng(seed)
    is_held_out = np.zeros(len(labels), bool)
    for one in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == one))
        count = min(round(fraction * len(rows)), len(rows) - 1)
        is_held_out[rows[:count]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _choose_and_fit(found, classes, sweep, log):
    """Compares all settings, and fits the best one to all of train.

    Returns:
        (the `Head`, what the results say about the choice).
    """
    train, settings = found["train"], sweep.settings()
    fitted, compared, where = _compared_on(found, sweep)
    if not len(compared.labels) and len(settings) > 1:
        raise ValueError(
            "There are no images to compare settings on: set EVAL_SPLIT, or "
            "give one setting only. Received: "
            f"held_out={sweep.held_out} of {len(train.labels)} images"
        )
    start = time.monotonic()
    rows, heads = _sweep(fitted, compared, classes, sweep, settings)
    seconds = time.monotonic() - start
    passes = sum(row["steps"] for row in rows)
    if sweep.solver == "sgd":
        passes = sweep.epochs * len(rows)
    rate = passes * len(fitted.labels) / seconds
    log(
        f"{len(settings)} settings in {seconds:.1f} s: {passes:,} passes over "
        f"{len(fitted.labels):,} images, {rate:,.0f} images/s"
    )
    # The first of equals has the strongest decay.
    best = max(range(len(rows)), key=lambda i: rows[i]["top_1"] or 0.0)
    chosen = settings[best]
    log(f"settings compared on {where}:")
    _log_sweep(rows, chosen, log)
    if not rows[best]["converged"]:
        log("the best setting took all steps: raise MAX_STEPS")
    head = heads[best]
    if "eval" not in found:
        head = _fit(
            SoftmaxRegression(*train, classes), sweep, chosen, heads[best]
        )
    told = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    log(f"chosen: {told}; fitted to all {len(train.labels):,} images of train")
    return head, {
        "solver": sweep.solver,
        "chosen": chosen,
        "chosen_top_1": rows[best]["top_1"],
        "compared_on": len(compared.labels),
        "held_out": None if "eval" in found else sweep.held_out,
        "images_per_second": rate,
        "sweep": rows,
    }


def _compared_on(found, sweep):
    """The images to fit the settings to and those to compare them on.

    Returns:
        (features to fit to, features to compare on, their description).
    """
    train = found["train"]
    if "eval" in found:
        compared = found["eval"]
        count = len(compared.labels)
        return train, compared, f"{count:,} images of the split for evaluation"
    kept, held_out = hold_out(train.labels, sweep.held_out, sweep.seed)
    where = f"{len(held_out):,} held-out images of train"
    return train.at(kept), train.at(held_out), where


def _log_sweep(rows, chosen, log):
    """Logs the table of all settings, and if the best is at the end of one."""
    names = list(chosen)
    log(
        "\n".join(
            table(
                (*names, "top-1", "nll", "steps"),
                [
                    (
                        *(f"{row[name]:g}" for name in names),
                        row["top_1"],
                        row["nll"],
                        row["steps"],
                    )
                    for row in rows
                ],
            )
        )
    )
    for name in names:
        values = [row[name] for row in rows]
        if len(set(values)) > 2 and chosen[name] in (min(values), max(values)):
            log(
                f"the best {name}, {chosen[name]:g}, is at the end of its "
                "range: others beyond it may be better"
            )


def _sweep(fitted, compared, classes, sweep, settings):
    """(row of results, `Head`) of each setting, as two lists."""
    problem = SoftmaxRegression(*fitted, classes)
    rows, heads, head = [], [], None
    for setting in settings:
        # The optimum of the decay before is near.
        head = _fit(problem, sweep, setting, head)
        heads.append(head)
        top_1 = nll = None
        if len(compared.labels):
            logits = head.logits(compared.features)
            top_1 = float((logits.argmax(1) == compared.labels).mean())
            nll = float(
                tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(
                        compared.labels, logits
                    )
                )
            )
        rows.append(
            {
                **setting,
                "top_1": top_1,
                "nll": nll,
                "steps": head.steps,
                "converged": head.converged,
            }
        )
    return rows, heads


def _fit(problem, sweep, setting, start):
    if sweep.solver == "lbfgs":
        return problem.lbfgs(
            setting["weight_decay"], sweep.max_steps, start=start
        )
    return problem.sgd(
        setting["learning_rate"],
        setting["weight_decay"],
        sweep.epochs,
        sweep.batch_size,
        sweep.seed,
    )


def _classifier(encoder, classes, head, precision):
    with dtype_policy(precision):
        model = Classifier(encoder, classes, name="classifier")
        model.build()
    model.head.set_weights([head.kernel, head.bias])
    return model
