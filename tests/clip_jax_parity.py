"""Helpers of the tests with clip-jax's structures, and small models of them."""

import json

import numpy as np
import parity

from cappa_tf.saving import big_vision, clip_jax
from cappa_tf.saving.big_vision_names import expected_shapes

NAMES = ("released", "configured")


def config(name):
    """A small configuration; "released" is as that of the public weights."""
    released = name == "released"
    both = {
        "activations": ["gelu", "linear"],
        "use_bias": False,
        "force_scale": False,
        "pool_type": None,
        "use_rmsnorm": released,
        "ln_type": "normformer" if released else "preln",
        "normalize_qk": not released,
        "hidden_size": 8,
        "num_heads": 2,
        "mlp_dim": 12,
        "num_layers": 2,
    }
    return {
        "vision_config": {
            **both,
            "position_embedding_type": "learnt",
            "position_embedding_factorized": not released,
            "position_embedding_shape": None if released else [3, 3],
            "use_causal_mask": False,
            "keep_registers": True,
            "registers": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "text_config": {
            **both,
            "position_embedding_type": "rotary",
            "use_causal_mask": True,
            "is_decoder": True,
            "masked_pred_prob": 0.75,
            "vocab_size": 12,
            "max_length": 6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
            "mask_token_id": 4,
        },
    }


def tables(config):
    """List of (prefix, part, rows, sizes) of a configuration."""
    vision, text = config["vision_config"], config["text_config"]
    width = vision["hidden_size"]
    return [
        ("vision/", "vision_encoder", *clip_jax.vision_rows(vision)),
        ("text/", "text_decoder", *clip_jax.text_rows(text, width)),
    ]


def random_arrays(config, rng):
    """Random weights by clip-jax's names, none of them zero."""
    return {
        name: rng.normal(size=shape).astype(np.float32) * 0.5
        for prefix, _, rows, sizes in tables(config)
        for name, shape in expected_shapes(rows, sizes, prefix).items()
    }


def predictions(captioner, arrays):
    """encoded, logits, scores and greedy captions, as the arrays have them."""
    labels = labels_of(arrays["input_ids"])
    scored = labels_of(arrays["score_input_ids"])[:, :-1]
    greedy = captioner.generate(arrays["image"])["tokens"]
    return {
        "encoded": captioner.encode(arrays["image"]).numpy(),
        **{
            f"logits_{mode}": captioner.logits(
                arrays["image"], labels, parallel=mode == "parallel"
            ).numpy()
            for mode in parity.MODES
        },
        "scores": captioner.score(arrays["image"], scored).numpy(),
        "greedy": np.pad(greedy, [[0, 0], [1, 0]], constant_values=1),
    }


def labels_of(input_ids, pad=3):
    """The labels of inputs that start with bos: shifted left."""
    return np.pad(input_ids[:, 1:], [[0, 0], [0, 1]], constant_values=pad)


def gradients(captioner, arrays):
    """Loss and gradients of both objectives by clip-jax's names."""
    config = clip_jax_config(arrays)
    labels = labels_of(arrays["input_ids"])
    found = {}
    for mode, batch in parity.batches_of(
        captioner, arrays["image"], labels
    ).items():
        loss, values = parity.loss_and_gradients(captioner, batch)
        # The original divides by the length, too.
        length = labels.shape[1]
        found[f"loss_{mode}"] = np.float32(loss / length)
        numbers = {
            id(v): np.asarray(g) / length
            for v, g in zip(captioner.trainable_variables, values)
        }
        for prefix, part, rows, _ in tables(config):
            for row, variables in big_vision.paired(
                rows, getattr(captioner, part)
            ):
                parts = [numbers[id(v)] for v in variables]
                value = parts[0] if row.axis is None else np.stack(parts)
                found[f"grads_{mode}/{prefix}{row.name}"] = value
    return found


def clip_jax_config(arrays):
    """The configuration in a file of arrays."""
    return json.loads(str(arrays["config"]))


def check_gradients(found, expected, mode):
    """`parity.check_gradients`; expected may have unused parameters.

    In parallel prediction all inputs of the decoder are equal, and so are the
    values of its self-attention, whatever the weights of the attention: the
    true gradient of queries and keys is zero, both sides have rounding noise.
    """
    prefix = f"grads_{mode}/"
    found = {k: v for k, v in found.items() if k.startswith(prefix)}
    expected = {
        k: v
        for k, v in expected.items()
        if k.startswith(prefix) and "/logit_" not in k
    }
    assert found.keys() == expected.keys()
    if mode == "parallel":
        total = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
        for name in sorted(expected):
            if _is_without_effect(name):
                for values in (found.pop(name), expected.pop(name)):
                    assert np.linalg.norm(values) <= 1e-5 * total, name
    parity.check_gradients(found, expected)


def _is_without_effect(name):
    place = "/text/encoder/layers/attention/"
    return place in name and any(part in name for part in ("query", "key"))
