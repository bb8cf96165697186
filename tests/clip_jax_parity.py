"""Helpers of the tests with clip-jax's structures, and small models of them."""

import json
import pathlib

import numpy as np
import parity
import pytest

from cappa_tf.saving import big_vision, clip_jax
from cappa_tf.saving.big_vision_names import expected_shapes

GOLDEN = pathlib.Path(__file__).parent / "testdata/golden_clip_jax.npz"
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


def tree_of(params):
    """Nested parameters with the last key that flax' boxes add."""
    tree = {}
    for name, value in params.items():
        *folders, leaf = f"params/{name}/value".split("/")
        place = tree
        for key in folders:
            place = place.setdefault(key, {})
        place[leaf] = value
    return tree


def write_folder(folder, arrays, params, sharded=()):
    """A checkpoint folder as Orbax writes it.

    Args:
        folder: Folder to create.
        arrays: Arrays with the configuration.
        params: Weights by name.
        sharded: Names of those that TensorStore holds.
    """
    msgpack = optional("msgpack")
    default = folder / "1460000" / "default"
    default.mkdir(parents=True)
    (folder / "config.json").write_text(str(arrays["config"]))

    def packed(value):
        content = (value.shape, value.dtype.name, value.tobytes())
        return msgpack.ExtType(1, msgpack.packb(content))

    values = {name: packed(value) for name, value in params.items()}
    for name in sharded:
        dotted = f"params.{name}.value".replace("/", ".")
        values[name] = f"PLACEHOLDER://{dotted}"
    if sharded:
        tensorstore = optional("tensorstore")
        for name in sharded:
            store = {
                "driver": "ocdbt",
                "base": f"file://{default.resolve()}/",
                "path": values[name].removeprefix("PLACEHOLDER://") + "/",
            }
            spec = {"driver": "zarr", "kvstore": store}
            tensorstore.open(
                spec,
                create=True,
                dtype=params[name].dtype.name,
                shape=params[name].shape,
            ).result().write(params[name]).result()
    tree = {**tree_of(values), "opt_state": {"count": packed(np.int32(3))}}
    (default / "checkpoint").write_bytes(msgpack.packb(tree))
    return default


def read(name, path=GOLDEN):
    """Arrays of one structure, with the weights by their own names."""
    stored = np.load(path)
    arrays = {
        key.removeprefix(f"{name}/"): stored[key]
        for key in stored
        if key.startswith(f"{name}/")
    }
    params = {
        key.removeprefix("params/"): value
        for key, value in arrays.items()
        if key.startswith("params/")
    }
    return arrays, params


def load(arrays, params, **options):
    """The captioner of these arrays."""
    return clip_jax.load_captioner(params, clip_jax_config(arrays), **options)


def optional(module):
    """An optional package; skips the test if it is not installed."""
    reason = f"{module} needs the extra: pip install 'cappa-tf[clip_jax]'"
    return pytest.importorskip(module, reason=reason)


def write_tokenizer(folder):
    """Files of a tokenizer with the ids of `config`, as clip-jax's has."""
    tokenizers = optional("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=special, show_progress=False
    )
    texts = ["a dog runs on grass", "two cats sit", "the red boat"]
    made.train_from_iterator(texts, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
