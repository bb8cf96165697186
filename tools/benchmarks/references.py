"""The authors' implementation in JAX, as a contender in benchmarks."""

import os

from absl import flags

from tools import benchmarks
from tools.benchmarks import models

NAME = "reference"


def check():
    """Returns (checkout, interpreter) of the reference, or None.

    Raises:
        ValueError: If only one of the flags is set, or is not what it says.
    """
    path, python = flags.FLAGS.reference, flags.FLAGS.reference_python
    if (path is None) != (python is None):
        raise ValueError(
            "--reference and --reference_python go together. Received: "
            f"--reference={path}, --reference_python={python}"
        )
    if path is None:
        return None
    if not os.path.isfile(os.path.join(path, "big_vision", "utils.py")):
        raise ValueError(
            "--reference must be a checkout of google-research/big_vision. "
            f"Received: --reference={path}"
        )
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        raise ValueError(
            "--reference_python must be a Python interpreter. "
            f"Received: --reference_python={python}"
        )
    return path, python


def start(benchmark, options, reference, folder, captioner=None, texts=None):
    """Starts the worker that runs the reference.

    Args:
        benchmark: "train", "embed" or "score".
        options: Dict of `models.SIZES`.
        reference: (checkout, interpreter), as `check` returns it.
        folder: Where its inputs are written, until it has started.
        captioner: Optional captioner whose weights it takes.
        texts: Optional int32 [T, L], the texts to score.

    Returns:
        `benchmarks.Process`.
    """
    import numpy as np

    from cappa_tf.saving import big_vision

    benchmarks.note(f"{NAME}: builds")
    path, python = reference
    inputs, weights = (
        os.path.join(folder, f"{name}.npz") for name in ("inputs", "weights")
    )
    arrays = {
        "images": models.make_images(options),
        "labels": models.make_labels(options),
    }
    if texts is not None:
        arrays["texts"] = texts
    np.savez(inputs, **arrays)
    if captioner is not None:
        big_vision.save_captioner(captioner, weights)
    return benchmarks.Process(
        "reference",
        {
            **options,
            **models.encoder_sizes(options),
            "benchmark": benchmark,
            "path": os.path.abspath(path),
            "inputs": inputs,
            "weights": weights,
        },
        python,
    )
