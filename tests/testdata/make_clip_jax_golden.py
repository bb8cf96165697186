"""Writes golden_clip_jax.npz: two small captioners of clip-jax's structures.

    python tests/testdata/make_clip_jax_golden.py

The numbers are this project's own: they hold what was found equal to clip-jax
on its arrays (tests/saving/clip_jax_test.py, if these are available), so that
the test needs them no more.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import clip_jax_parity as parity

from cappa_tf.saving import clip_jax

OUTPUT = pathlib.Path(__file__).with_name("golden_clip_jax.npz")


def make(name, arrays):
    """Adds the arrays of one structure."""
    config, rng = parity.config(name), np.random.default_rng(0)
    params = parity.random_arrays(config, rng)
    captioner = clip_jax.load_captioner(params, config)
    ids = np.array(
        [[1, 7, 5, 9, 8, 2], [1, 2, 3, 3, 3, 3], [1, 6, 6, 2, 3, 3]], np.int32
    )
    image = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    found = {
        "config": json.dumps(config),
        **{f"params/{key}": value for key, value in params.items()},
        "image": image,
        "input_ids": ids,
        "attention_mask": (ids != 3).astype(np.int32),
        "score_input_ids": ids,
    }
    found.update(parity.predictions(captioner, found))
    found.update(parity.gradients(captioner, found))
    arrays.update({f"{name}/{key}": value for key, value in found.items()})


def main():
    """Writes the file."""
    arrays = {}
    for name in parity.NAMES:
        make(name, arrays)
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
