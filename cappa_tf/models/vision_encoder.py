"""Vision encoder: the ViT that captioning pretrains.

Abbreviations for dimensions:
    B: batch.  H, W: height and width of the image in pixels.
    P: number of patches.  D: width.  R: number of registers.
"""

import warnings

import keras
from keras import ops

from cappa_tf.models import repeated_blocks
from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.blocks import AttentionPooling, EncoderBlock
from cappa_tf.models.patch_embedding import PatchEmbedding
from cappa_tf.models.positions import PositionEmbedding
from cappa_tf.models.stateless_random import (
    StatelessDropout,
    keep_tokens,
    next_seeds,
    num_kept,
    salt_of,
    seed_generator,
)
from cappa_tf.utils.arguments import (
    check_bool,
    check_choice,
    check_counts,
    check_fraction,
    check_integer,
    height_width,
)

POOLINGS = ("gap", "map", "tok", "none")


@keras.saving.register_keras_serializable("cappa_tf")
class VisionEncoder(keras.Model):
    """ViT: patches, positions, pre-LayerNorm blocks, final LayerNorm, pooling.

    Registers are learned inputs behind the patches and without a position, in
    which blocks can keep what belongs to no patch (arXiv 2309.16588). A decoder
    attends to them; pooling leaves them out.

    Args:
        hidden_dim: Width D.
        num_layers: Number of blocks.
        num_heads: Attention heads; divides D.
        mlp_dim: Hidden width of the MLPs.
        patch_size: Side of a patch in pixels, or (height, width).
        image_size: Side of the image in pixels, or (height, width); a
            multiple of the patch size.
        position_embedding: "learned", "sincos2d" or "factorised".
        position_grid: (rows, columns) of the tables of factorised positions,
            or of the grid to which sincos2d positions are stretched, as at a
            low resolution of which a higher one follows; by default the grid
            of patches.
        num_registers: Number of registers R.
        keep_registers: Whether `encoded` includes the registers.
        style: `BlockStyle` of the blocks and the final norm (or a dict of its
            fields), by default big_vision's. Without biases, patches have
            none either.
        dropout: Dropout rate of the embeddings and blocks.
        patch_dropout: Fraction of the patches left out in training, sampled
            for each example; `encoded` is then shorter. Not used in inference.
        stochastic_depth: Fraction of the examples that skip the last block's
            attention, or MLP, in training; it grows linearly from 0 in the
            first block.
        pooling: Kind of `pre_logits`: "gap" (mean of the patches, CapPa's),
            "map" (attention pooling), "tok" (a class token) or "none" (no
            `pre_logits`).
        remat: Whether training recomputes the activations inside a block for
            the gradient instead of storing them. This takes about a third
            more time and keeps one activation per block in memory.

    Call arguments:
        images: [B, H, W, 3] in [-1, 1].
        seeds: uint32 [B] (`stateless_random.example_seeds`), dropout seeds in
            training; by default from a `keras.random.SeedGenerator`.
        training: Whether to apply dropout.

    Returns:
        Dict with `encoded` [B, P, D] after the final LayerNorm (pooling
        "tok": [B, 1 + P, D], class token first; registers last: [B, P + R, D])
        and `pre_logits` [B, D]. A `Classifier` adds logits.

    Reference: big_vision models/vit.py. Patch dropout and stochastic depth
    are this project's own (the reference's captioner documents the former but
    never reads it).
    """

    # Mode of `quantize`.
    quantization = None

    def __init__(
        self,
        hidden_dim=768,
        num_layers=12,
        *,
        num_heads=12,
        mlp_dim=3072,
        patch_size=16,
        image_size=224,
        position_embedding="learned",
        position_grid=None,
        num_registers=0,
        keep_registers=True,
        style=None,
        dropout=0.0,
        patch_dropout=0.0,
        stochastic_depth=0.0,
        pooling="gap",
        remat=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_bool(remat=remat, keep_registers=keep_registers)
        check_integer("num_registers", num_registers)
        check_counts(num_layers=num_layers, mlp_dim=mlp_dim)
        check_fraction(
            dropout=dropout,
            patch_dropout=patch_dropout,
            stochastic_depth=stochastic_depth,
        )
        check_choice(POOLINGS, pooling=pooling)
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.patch_size = height_width("patch_size", patch_size)
        self.image_size = height_width("image_size", image_size)
        self.grid = self._grid()
        self.position_embedding = position_embedding
        self.position_grid = self._position_grid(position_grid)
        self.num_registers = num_registers
        self.keep_registers = keep_registers
        self.style = BlockStyle.of(style)
        self.dropout = dropout
        self.patch_dropout = patch_dropout
        self.stochastic_depth = stochastic_depth
        self.pooling = pooling
        self.remat = remat
        self.set_salt_prefix("encoder")
        self.seed_generator = None
        if max(dropout, patch_dropout, stochastic_depth) > 0.0:
            self.seed_generator = seed_generator("encoder")
        self._make_layers()

    def _grid(self):
        """(rows, columns) of patches."""
        (height, width), (h, w) = self.image_size, self.patch_size
        if height % h != 0 or width % w != 0:
            raise ValueError(
                "`image_size` must be a multiple of `patch_size`. Received: "
                f"image_size={self.image_size}, patch_size={self.patch_size}"
            )
        return height // h, width // w

    def _position_grid(self, position_grid):
        """(rows, columns) of the positions where that is not the patches'."""
        if self.position_embedding == "factorised":
            return height_width("position_grid", position_grid or self.grid)
        if position_grid is None:
            return None
        if self.position_embedding != "sincos2d":
            raise ValueError(
                "`position_grid` is for factorised and sincos2d positions. "
                f"Received: position_grid={position_grid!r}, "
                f"position_embedding={self.position_embedding!r}"
            )
        found = height_width("position_grid", position_grid)
        return None if found == self.grid else found

    def _make_layers(self):
        dtype = self.dtype_policy
        style = self.style
        self._patches = PatchEmbedding(
            self.hidden_dim,
            self.patch_size,
            use_bias=style.bias(True),
            name="patches",
            dtype=dtype,
        )
        self._positions = PositionEmbedding(
            self.grid,
            self.position_embedding,
            self.position_grid,
            name="positions",
            dtype=dtype,
        )
        self._embedding_dropout = StatelessDropout(
            self.dropout, "embedding", name="dropout", dtype=dtype
        )
        self.blocks = [
            EncoderBlock(
                self.hidden_dim,
                self.num_heads,
                mlp_dim=self.mlp_dim,
                dropout=self.dropout,
                stochastic_depth=self.stochastic_depth
                * (i / max(1, self.num_layers - 1)),
                style=style,
                name=f"encoder_block_{i}",
                dtype=dtype,
            )
            for i in range(self.num_layers)
        ]
        self._norm = style.make_norm("encoder_norm", dtype)
        self._pool = None
        if self.pooling == "map":
            self._pool = AttentionPooling(
                self.num_heads, mlp_dim=self.mlp_dim, name="pool", dtype=dtype
            )

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructor determines."""
        shape = (None, self.grid[0] * self.grid[1], self.hidden_dim)
        self._patches.build((None, *self.image_size, 3))
        self._positions.build(shape)
        if self.pooling == "tok":
            self.class_token = self.add_weight(
                name="class_token",
                shape=(1, 1, self.hidden_dim),
                initializer="zeros",
            )
        if self.num_registers > 0:
            self.registers = self.add_weight(
                name="registers",
                shape=(1, self.num_registers, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(
                    stddev=self.hidden_dim**-0.5
                ),
            )
        for layer in (*self.blocks, self._norm):
            layer.build(shape)
        if self._pool is not None:
            self._pool.build(shape)
        self.built = True

    def build_from_config(self, config):
        """Builds a model that is being loaded."""
        del config
        if not self.built:
            self.build()

    def quantize(self, mode, **kwargs):
        """Quantizes the weights of products: `quantize("int8")`.

        Keras quantizes an input when it is called, and computes the product of
        integers. What has no such product is left in float32.

        Args:
            mode: As in `keras.Model.quantize`, like all other arguments.
            **kwargs: Further arguments.
        """
        # Keras wants each layer to have been called.
        self(ops.zeros((1, *self.image_size, 3)), training=False)
        with warnings.catch_warnings():
            # Of layers that have nothing to quantize.
            warnings.filterwarnings("ignore", message=".*`quantize` method")
            super().quantize(mode, **kwargs)
        self.quantization = mode

    def call(self, images, seeds=None, training=False):
        """Encodes images [B, H, W, 3]; the class describes the outputs."""
        self._check_images(images)
        x = ops.cast(images, self.compute_dtype)
        x = self._positions(self._patches(x))  # -> [B, P, D]
        if training and seeds is None and self.seed_generator is not None:
            seeds = next_seeds(self.seed_generator, ops.shape(x)[0])
        if training and self.patch_dropout > 0.0:
            share = 1.0 - self.patch_dropout
            x = keep_tokens(x, share, seeds, self._patch_salt)
        if self.pooling == "tok":
            token = ops.cast(self.class_token, x.dtype)
            token = ops.broadcast_to(token, (ops.shape(x)[0], 1, x.shape[-1]))
            x = ops.concatenate([token, x], axis=1)
        if self.num_registers > 0:
            registers = ops.cast(self.registers, x.dtype)
            shape = (ops.shape(x)[0], *registers.shape[1:])
            registers = ops.broadcast_to(registers, shape)
            x = ops.concatenate([x, registers], axis=1)
        x = self._embedding_dropout(x, seeds, training=training)

        def call_block(block, x):
            return block(x, seeds=seeds, training=training)

        for run in repeated_blocks.callers(
            self.blocks, call_block, training, self.remat
        ):
            x = run(x)
        x = self._norm(x)
        if self.num_registers > 0 and not self.keep_registers:
            x = x[:, : -self.num_registers]
        return self._outputs(x)

    def _check_images(self, images):
        if tuple(images.shape[1:]) != (*self.image_size, 3):
            raise ValueError(
                f"Images must be [B, {self.image_size[0]}, "
                f"{self.image_size[1]}, 3]. Received: shape={images.shape}"
            )

    def set_salt_prefix(self, prefix):
        """Gives patch dropout a salt of its own within a model.

        Args:
            prefix: Name of this encoder in the model.
        """
        self._patch_salt = salt_of(f"{prefix}/patches")

    def num_kept_patches(self):
        """Number of patches of an image encoded in training, at least 1."""
        patches = self.grid[0] * self.grid[1]
        return num_kept(patches, 1.0 - self.patch_dropout)

    def _outputs(self, encoded):
        if self.pooling == "none":
            return {"encoded": encoded}
        return {"encoded": encoded, "pre_logits": self.pool(encoded)}

    @property
    def kept_registers(self):
        """Number of registers at the end of `encoded`."""
        return self.num_registers if self.keep_registers else 0

    def pool(self, encoded):
        """Pools `encoded` [B, P, D] to `pre_logits` [B, D]."""
        if self.kept_registers > 0:
            encoded = encoded[:, : -self.kept_registers]
        if self.pooling == "gap":
            return ops.mean(encoded, axis=1)
        if self.pooling == "tok":
            return encoded[:, 0]
        return self._pool(encoded)

    def output_shapes(self):
        """Dict name -> shape of an image's output in inference."""
        tokens = self.grid[0] * self.grid[1] + (self.pooling == "tok")
        tokens += self.kept_registers
        shapes = {"encoded": (tokens, self.hidden_dim)}
        if self.pooling != "none":
            shapes["pre_logits"] = (self.hidden_dim,)
        return shapes

    def export(self, filepath, *args, **kwargs):
        """Exports the encoder with `keras.Model.export`, for any batch size.

        Args:
            filepath: Path to write to.
            *args: Further arguments of `keras.Model.export`.
            **kwargs: Keyword arguments of `keras.Model.export`;
                `input_signature` defaults to one float32 [None, H, W, 3].
        """
        image = keras.InputSpec(shape=(None, *self.image_size, 3))
        image.dtype = "float32"
        kwargs.setdefault("input_signature", [image])
        super().export(filepath, *args, **kwargs)

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "hidden_dim num_layers num_heads mlp_dim patch_size image_size "
            "position_embedding dropout patch_dropout stochastic_depth pooling "
            "remat"
        ).split()
        config = {name: getattr(self, name) for name in names}
        base = {"name": self.name, "trainable": self.trainable}
        dtype = keras.saving.serialize_keras_object(self.dtype_policy)
        # Left out if it is the default, like `style`.
        special = {
            "quantization": (self.quantization, None),
            "position_grid": (self.position_grid, None),
            "num_registers": (self.num_registers, 0),
            "keep_registers": (self.keep_registers, True),
        }
        for name, (value, default) in special.items():
            if value != default:
                config[name] = value
        config.update(self.style.in_config())
        return {**base, "dtype": dtype, **config}

    @classmethod
    def from_config(cls, config):
        """Rebuilds an encoder, also one with a head from version 0.1.0."""
        heads = {
            name: config[name]
            for name in ("rep_size", "num_classes")
            if config.get(name) is not None
        }
        config = {
            name: value
            for name, value in config.items()
            if name not in ("rep_size", "num_classes")
        }
        mode = config.pop("quantization", None)
        if mode is not None:
            encoder = cls.from_config({**config, **heads})
            encoder.build()
            encoder.quantize(mode)
            return encoder
        if heads and cls is VisionEncoder:
            # Imported here because that module imports this one.
            from cappa_tf.models.classification_head import EncoderWithHead

            return EncoderWithHead(**config, **heads)
        return super().from_config({**config, **heads})
