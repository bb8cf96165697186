"""A worker that runs the authors' implementation, in its own environment.

It needs a checkout of google-research/big_vision, and jax, flax, optax, einops
and ml_collections. Model, loss, optimizer and recipe are imported from there.
"""

import importlib
import importlib.util
import pathlib
import sys
import types

sys.path[0] = str(pathlib.Path(__file__).resolve().parent)

import protocol  # noqa: E402


def stand_in_for_tensorflow():
    """Lets big_vision's utils import the file functions of TensorFlow.

    Nothing here uses them, and TensorFlow itself takes time and memory that
    the reference would not need.
    """
    if importlib.util.find_spec("tensorflow") is not None:
        return
    parent = None
    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        module = types.ModuleType(name)
        sys.modules[name] = module
        if parent is not None:
            setattr(parent, name.rpartition(".")[2], module)
        parent = module


class Reference:
    """The model with weights, and what is measured of it.

    Args:
        options: Sizes, inputs (`inputs`: npz file of images, labels and
            texts to score; `weights`: npz file, for embed and score), and
            `path` of the checkout.
    """

    def __init__(self, options):
        sys.path.insert(0, options["path"])
        # These look for the real TensorFlow when they are imported.
        for name in ("flax.training.checkpoints", "optax", "ml_collections"):
            importlib.import_module(name)
        stand_in_for_tensorflow()
        from big_vision.configs.proj.cappa import pretrain
        from big_vision.models.proj.cappa import cappa

        self._options = options
        config = pretrain.get_config()
        patch, side = options["patch_size"], options["image_size"]
        config.model.update(
            num_layers=options["num_layers"],
            num_heads=options["num_heads"],
            mlp_dim=options["mlp_dim"],
            emb_dim=options["hidden_dim"],
            patches=(patch, patch),
            decoder_num_layers=options.get("decoder_layers", 1),
            vocab_size=options.get("vocabulary_size", 100),
            seq_len=options.get("length", 64),
        )
        self._config, self._side = config, side
        self._model = cappa.Model(**config.model)

    def _inputs(self):
        import jax.numpy as jnp
        import numpy as np

        with np.load(self._options["inputs"]) as arrays:
            return {name: jnp.asarray(arrays[name]) for name in arrays.files}

    def train(self):
        """A step of training."""
        import jax
        import jax.numpy as jnp
        import optax
        from big_vision import optax as bv_optax
        from big_vision import utils

        batch, config, model = self._inputs(), self._config, self._model
        keys = jax.random.split(jax.random.PRNGKey(0))
        labels = batch["labels"]
        params = jax.jit(model.init)(keys[0], batch["images"], labels)["params"]
        tx, _ = bv_optax.make(
            config,
            params,
            sched_kw={
                "total_steps": config.total_steps,
                "batch_size": config.input.batch_size,
                "data_size": 1_000_000,
            },
        )

        def norm(tree):
            return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))

        def step(params, state, key):
            key, used = jax.random.split(key)

            def loss(params):
                logits = model.apply(
                    {"params": params},
                    batch["images"],
                    labels,
                    train=True,
                    rngs={"dropout": used},
                )
                weights = jnp.where(labels != 0, 1.0, 0.0)
                return utils.weighted_softmax_xent(
                    logits=logits, labels=labels, weights=weights
                )

            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            # What its trainer measures in every step.
            trees = (gradients, params, updates)
            return params, state, key, (value, *map(norm, trees))

        compiled = jax.jit(step, donate_argnums=(0, 1))
        self._state = (params, jax.jit(tx.init)(params), keys[1])

        def run():
            *self._state, figures = compiled(*self._state)
            return float(figures[0])

        count = sum(x.size for x in jax.tree.leaves(params))
        return run, {"products": "float32", "parameters": int(count)}

    def embed(self):
        """Pooled features of a batch of images."""
        import jax

        images, params = self._inputs()["images"], self._weights()
        model = self._model

        @jax.jit
        def embed(params, images):
            _, out = model.apply(
                {"params": params}, images, None, return_enc_features=True
            )
            return out["pre_logits"]

        def run():
            return jax.device_get(embed(params, images))

        return run, {"products": "float32"}

    def score(self):
        """Likelihoods of texts for a batch of images, a pass for each text."""
        import jax
        import jax.numpy as jnp
        from big_vision import utils

        batch, params, model = self._inputs(), self._weights(), self._model

        @jax.jit
        def score(params, images, texts):
            given = {"params": params}
            encoded = model.apply(given, images, method=model.encode)

            def one(text):
                labels = jnp.tile(text, (len(encoded), 1))
                logits = model.apply(
                    given, encoded, labels, method=model.decode
                )
                return -utils.weighted_softmax_xent(
                    logits=logits,
                    labels=labels,
                    weights=(labels > 0).astype(jnp.float32),
                    reduction=False,
                    normalize=False,
                )

            return jax.lax.map(one, texts).T

        def run():
            return jax.device_get(
                score(params, batch["images"], batch["texts"])
            )

        return run, {"products": "float32"}

    def _weights(self):
        import jax
        from big_vision import utils

        params = utils.load_params(self._options["weights"])
        return jax.tree.map(jax.numpy.asarray, params)


def make(options):
    """What to measure, the method of the name in `benchmark`."""
    return getattr(Reference(options), options["benchmark"])()


if __name__ == "__main__":
    protocol.serve(make)
