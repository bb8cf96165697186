"""Writes golden_captioner.npz: a small captioner and its expected outputs.

    python tests/testdata/make_golden.py

Everything comes from tests/numpy_reference.py (float64, no TensorFlow) and the
equations below: gradients are central differences over every single weight,
the six optimizer steps are Adafactor written out once more. It takes some
minutes; the file is committed, so that tests need not.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy_reference as reference

OUTPUT = pathlib.Path(__file__).with_name("golden_captioner.npz")

SIZES = reference.Sizes(
    width=8,
    depth=2,
    heads=2,
    mlp=12,
    patch=(4, 2),
    image=(8, 6),
    vocabulary=9,
    length=5,
    decoder_width=12,
    decoder_heads=3,
    decoder_bias=True,
)
# Axes of at least 8 are factored, so that this small model has both kinds.
SETTINGS = {
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
    "global_clip_norm": 0.5,
    "beta2_cap": 0.6,
    "min_dim_size_to_factor": 8,
}
WARMUP, TOTAL, STEPS = 2, 8, 6


def gradient(p, image, text, parallel, step=1e-5):
    """Central differences over every weight: dict of float64 arrays."""
    p = {k: v.astype(np.float64) for k, v in p.items()}
    result = {}
    for name, array in p.items():
        result[name] = np.zeros_like(array)
        for where in np.ndindex(array.shape):
            value, sides = array[where], []
            for distance in (step, -step):
                array[where] = value + distance
                sides.append(reference.loss(p, image, text, parallel))
            array[where] = value
            result[name][where] = (sides[0] - sides[1]) / (2 * step)
    return result


def bfloat16(x):
    """Rounds to bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)


def cosine(step):
    """Multiplier with warm-up, then half a cosine."""
    done = np.clip((step - WARMUP) / (TOTAL - WARMUP), 0, 1)
    return min(1, step / WARMUP) * 0.5 * (1 + np.cos(np.pi * done))


def scaled(g, state, name, step):
    """The gradient over the root of its (factored) second moment."""
    decay = min(SETTINGS["beta2_cap"], 1 - (step + 1) ** -0.8)
    square = g**2 + 1e-30
    order = np.argsort(g.shape, kind="stable")
    if g.ndim < 2 or g.shape[order[-2]] < SETTINGS["min_dim_size_to_factor"]:
        old = state.get(name, 0.0)
        state[name] = decay * old + (1 - decay) * square
        return g / np.sqrt(state[name])
    parts = []
    for axis in (order[-1], order[-2]):
        old = state.get((name, axis), 0.0)
        mean = square.mean(axis, keepdims=True)
        state[name, axis] = decay * old + (1 - decay) * mean
        parts.append(state[name, axis])
    rows, columns = parts
    rows = rows / rows.mean(order[-2], keepdims=True)
    return g / np.sqrt(rows * columns)


def train(p, image, text):
    """Six steps, even ones parallel: losses, and the weights at the end."""
    p = {k: v.astype(np.float64) for k, v in p.items()}
    state, momentum, losses = {}, {}, []
    for step in range(STEPS):
        parallel = step % 2 == 0
        losses.append(reference.loss(p, image, text, parallel))
        grads = gradient(p, image, text, parallel)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = min(1.0, SETTINGS["global_clip_norm"] / norm)
        for name, g in grads.items():
            direction = scaled(clip * g, state, name, step)
            past = bfloat16(0.9).item() * momentum.get(name, 0.0)
            average = 0.1 * direction + past
            momentum[name] = bfloat16(average).astype(np.float64)
            update = SETTINGS["learning_rate"] * average
            if name.endswith("/kernel"):
                update += SETTINGS["weight_decay"] * p[name]
            p[name] = p[name] - cosine(step) * update
        print(f"step {step}: loss {losses[-1]:.6f}, gradient {norm:.4f}")
    return np.array(losses), p


def main():
    """Computes and writes the file."""
    p = reference.random_captioner(SIZES, seed=7)
    image, text = reference.random_batch(SIZES, batch=3, seed=8)
    _, labels = reference.random_batch(SIZES, batch=4, seed=9)
    outputs = reference.vit(reference.below(p, "encoder/"), image)
    golden = {"image": image, "text": text, "score_labels": labels, **outputs}
    golden["scores"] = reference.scores(p, image, labels)
    golden |= {f"params/{k}": v for k, v in p.items()}
    for mode, parallel in (("autoregressive", False), ("parallel", True)):
        scores = reference.logits(p, image, text, parallel)
        golden[f"logits_{mode}"] = scores
        golden[f"loss_{mode}"] = reference.loss(p, image, text, parallel)
        for name, g in gradient(p, image, text, parallel).items():
            golden[f"grads_{mode}/{name}"] = g
        if not parallel:
            nll = reference.token_nll(scores, text).sum(1)
            golden["nll_per_caption"] = nll
    losses, trained = train(p, image, text)
    golden["optimizer/losses"] = losses
    golden |= {f"optimizer/params/{k}": v for k, v in trained.items()}
    for name, value in golden.items():
        if np.asarray(value).dtype.kind == "f":
            golden[name] = np.asarray(value, np.float32)
    np.savez_compressed(OUTPUT, **golden)


if __name__ == "__main__":
    main()
