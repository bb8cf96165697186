"""Text encoder, the text tower of contrastive models.

Abbreviations for dimensions:
    N: batch of texts.  L: `max_length`.  D: width.
"""

import keras
from keras import ops

from cappa_tf.models import repeated_blocks
from cappa_tf.models.blocks import AttentionPooling, EncoderBlock
from cappa_tf.models.norms import layer_norm
from cappa_tf.models.positions import PositionEmbedding
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.stateless_random import (
    StatelessDropout,
    next_seeds,
    seed_generator,
)
from cappa_tf.utils.arguments import (
    check_bool,
    check_choice,
    check_counts,
    check_fraction,
)

POOLINGS = ("last", "first", "gap", "max", "map")


@keras.saving.register_keras_serializable("cappa_tf")
class TextEncoder(keras.Model):
    """Bidirectional transformer over token ids, pooled to a vector per text.

    There is no mask: every position attends to every other, including padding.
    A text is therefore always padded to `max_length`, so that its embedding
    does not depend on the other texts of a batch.

    Args:
        vocabulary_size: Number of token ids.
        max_length: Length L of all texts; the number of positions.
        hidden_dim: Width D.
        num_layers: Number of blocks.
        num_heads: Attention heads; divides D.
        mlp_dim: Hidden width of the MLPs.
        pooling: Kind of `pre_logits`: "last" or "first" (the position of that
            name), "gap" (mean over the positions), "max" (maximum over them)
            or "map" (attention pooling).
        dropout: Dropout rate of the embeddings and blocks.
        special_tokens: `SpecialTokens` of the labels; by default CapPa's.
        pad_with_eos: Whether padding is read as eos, as in the public CLIP and
            SigLIP files; the last position is then always eos. Otherwise it is
            read as `special_tokens.pad`.
        remat: Whether training recomputes the activations inside a block for
            the gradient instead of storing them. This takes about a third
            more time and keeps one activation per block in memory.

    Call arguments:
        labels: int [N, up to L] token ids, padded with `special_tokens.pad`.
        seeds: uint32 [N] (`stateless_random.example_seeds`), dropout seeds in
            training; by default from a `keras.random.SeedGenerator`.
        training: Whether to apply dropout.

    Returns:
        Dict with `encoded` [N, L, D] after the final LayerNorm and
        `pre_logits` [N, D].

    Reference: big_vision models/proj/image_text/text_transformer.py, whose
    public configurations have no dropout.
    """

    def __init__(
        self,
        vocabulary_size=32_000,
        max_length=64,
        *,
        hidden_dim=768,
        num_layers=12,
        num_heads=12,
        mlp_dim=3072,
        pooling="last",
        dropout=0.0,
        special_tokens: SpecialTokens | None = None,
        pad_with_eos=True,
        remat=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_counts(
            vocabulary_size=vocabulary_size,
            max_length=max_length,
            num_layers=num_layers,
            mlp_dim=mlp_dim,
        )
        check_fraction(dropout=dropout)
        check_choice(POOLINGS, pooling=pooling)
        check_bool(pad_with_eos=pad_with_eos, remat=remat)
        special_tokens = special_tokens or SpecialTokens()
        if not isinstance(special_tokens, SpecialTokens):
            raise ValueError(
                "`special_tokens` must be None or `SpecialTokens`. Received: "
                f"special_tokens={special_tokens!r}"
            )
        special_tokens.check_vocabulary(vocabulary_size)
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.pooling = pooling
        self.dropout = dropout
        self.special_tokens = special_tokens
        self.pad_with_eos = pad_with_eos
        self.remat = remat
        self.seed_generator = None
        if dropout > 0.0:
            self.seed_generator = seed_generator("text_encoder")
        self._make_layers()

    def _make_layers(self):
        dtype = self.dtype_policy
        self._embedding = keras.layers.Embedding(
            self.vocabulary_size,
            self.hidden_dim,
            # flax's default for embeddings: variance 1 / D.
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=self.hidden_dim**-0.5
            ),
            name="tokens",
            dtype=dtype,
        )
        self._positions = PositionEmbedding(
            (1, self.max_length), name="positions", dtype=dtype
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
                name=f"encoder_block_{i}",
                dtype=dtype,
            )
            for i in range(self.num_layers)
        ]
        self._norm = layer_norm("encoder_norm", dtype)
        self._pool = None
        if self.pooling == "map":
            self._pool = AttentionPooling(
                self.num_heads, mlp_dim=self.mlp_dim, name="pool", dtype=dtype
            )

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructor determines."""
        shape = (None, self.max_length, self.hidden_dim)
        self._embedding.build(shape[:2])
        pool = () if self._pool is None else (self._pool,)
        for layer in (self._positions, *self.blocks, self._norm, *pool):
            layer.build(shape)
        self.built = True

    def build_from_config(self, config):
        """Builds a model that is being loaded."""
        del config
        self.build()

    def pad(self, labels):
        """Pads labels [N, up to L] to the token ids [N, L] that are read.

        Raises:
            ValueError: If the labels are longer than `max_length`.
        """
        special = self.special_tokens
        labels = ops.convert_to_tensor(labels)
        length = labels.shape[1]
        if length is not None and length > self.max_length:
            raise ValueError(
                "Texts must have at most `max_length` tokens. Received: "
                f"labels of shape {labels.shape}, max_length={self.max_length}"
            )
        # The length may be open (`length_buckets`), so more padding than is
        # needed is added and cut.
        shape = (ops.shape(labels)[0], self.max_length)
        padding = ops.full(shape, special.pad, dtype=labels.dtype)
        labels = ops.concatenate([labels, padding], axis=1)
        labels = ops.reshape(
            labels[:, : self.max_length], (-1, self.max_length)
        )
        if not self.pad_with_eos:
            return labels
        return ops.where(labels == special.pad, special.eos, labels)

    def call(self, labels, seeds=None, training=False):
        """Encodes labels [N, up to L]; the class describes the outputs."""
        if training and seeds is None and self.seed_generator is not None:
            seeds = next_seeds(self.seed_generator, ops.shape(labels)[0])
        x = self._positions(self._embedding(self.pad(labels)))  # -> [N, L, D]
        x = self._embedding_dropout(x, seeds, training=training)

        def call_block(block, x):
            return block(x, seeds=seeds, training=training)

        for run in repeated_blocks.callers(
            self.blocks, call_block, training, self.remat
        ):
            x = run(x)
        x = self._norm(x)
        return {"encoded": x, "pre_logits": self._pooled(x)}

    def _pooled(self, x):
        if self.pooling == "map":
            return self._pool(x)
        if self.pooling == "gap":
            return ops.mean(x, axis=1)
        if self.pooling == "max":
            return ops.max(x, axis=1)
        return x[:, 0 if self.pooling == "first" else -1]

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "vocabulary_size max_length hidden_dim num_layers num_heads "
            "mlp_dim pooling dropout pad_with_eos remat"
        ).split()
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "special_tokens": serialize(self.special_tokens),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Rebuilds an encoder from `get_config`'s result."""
        special = config.get("special_tokens")
        if isinstance(special, dict):
            special = keras.saving.deserialize_keras_object(
                special, custom_objects=custom_objects
            )
        return cls(**{**config, "special_tokens": special})
