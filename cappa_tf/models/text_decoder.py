"""Text decoder that predicts captions, left to right or all at once.

Abbreviations for dimensions:
    B: batch (of images).      N: batch of captions, K captions per image.
    P: number of patches.      L: length of the text.
    M: `max_length`.           V: vocabulary.
    D: width.                  H: heads.  C: width of one head, D / H.
"""

import keras
from keras import ops

from cappa_tf.models import repeated_blocks
from cappa_tf.models.attention import by_head
from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.blocks import DecoderBlock
from cappa_tf.models.positions import PositionEmbedding, RotaryPositions
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.stateless_random import next_seeds, seed_generator
from cappa_tf.utils.arguments import (
    check_bool,
    check_choice,
    check_counts,
    check_fraction,
    check_number,
)


@keras.saving.register_keras_serializable("cappa_tf")
class TextDecoder(keras.Model):
    """Transformer decoder over token ids that attends to encoded patches.

    Args:
        vocabulary_size: Number of token ids V.
        max_length: Maximum length M of a text; the number of positions.
        hidden_dim: Width D.
        num_layers: Number of blocks.
        num_heads: Attention heads; divides D.
        mlp_dim: Hidden width of the MLPs.
        encoder_dim: Width E of the encoded patches; by default that of the
            encoder of its captioner, else `hidden_dim`.
        use_bias: Whether MLPs and the blocks' LayerNorms have biases. The
            final LayerNorm and the output head always have one, attention
            never has.
        dropout: Dropout rate of the blocks.
        special_tokens: `SpecialTokens`; by default CapPa's, with MASK as an
            input one past the vocabulary. Parallel prediction needs MASK.
        position_embedding: "learned", "sincos2d" (of a 1 x M grid) or
            "rotary" (of queries and keys in self-attention).
        style: `BlockStyle` of the blocks and the final norm (or a dict of its
            fields), by default big_vision's.
        embedding_stddev: Standard deviation of the initial token embeddings.
            At the reference's 1.0 they dominate the residual stream, and hide
            what attention adds, until long training has shrunk them. With
            0.05, runs of a few thousand steps use the image after the first
            hundred.
        remat: Whether training recomputes the activations inside a block for
            the gradient instead of storing them. This takes about a third
            more time and keeps one activation per block in memory.

    Reference: big_vision models/proj/cappa/cappa.py `Decoder`.
    """

    def __init__(
        self,
        vocabulary_size=32_000,
        max_length=64,
        *,
        hidden_dim=768,
        num_layers=6,
        num_heads=12,
        mlp_dim=3072,
        encoder_dim=None,
        use_bias=False,
        dropout=0.0,
        special_tokens: SpecialTokens | None = None,
        position_embedding="learned",
        style=None,
        embedding_stddev=1.0,
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
        check_bool(use_bias=use_bias, remat=remat)
        check_choice(
            ("learned", "sincos2d", "rotary"),
            position_embedding=position_embedding,
        )
        if special_tokens is None:
            special_tokens = SpecialTokens(mask=vocabulary_size)
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
        self._has_default_encoder_dim = encoder_dim is None
        self.encoder_dim = encoder_dim or hidden_dim
        check_counts(encoder_dim=self.encoder_dim)
        self.use_bias = use_bias
        self.dropout = dropout
        self.special_tokens = special_tokens
        self.position_embedding = position_embedding
        self.style = BlockStyle.of(style)
        self.embedding_stddev = check_number(
            "embedding_stddev", embedding_stddev, exclusive=True
        )
        self.remat = remat
        self.seed_generator = None
        if dropout > 0.0:
            self.seed_generator = seed_generator("decoder")
        self._make_layers()

    def _make_layers(self):
        dtype = self.dtype_policy
        self._embedding = keras.layers.Embedding(
            # MASK may be one past the predictable tokens.
            max(self.vocabulary_size, (self.special_tokens.mask or 0) + 1),
            self.hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=self.embedding_stddev
            ),
            name="tokens",
            dtype=dtype,
        )
        if self.position_embedding == "rotary":
            self._positions = RotaryPositions(name="positions", dtype=dtype)
        else:
            self._positions = PositionEmbedding(
                (1, self.max_length),
                self.position_embedding,
                name="positions",
                dtype=dtype,
            )
        self.blocks = [
            DecoderBlock(
                self.hidden_dim,
                self.num_heads,
                mlp_dim=self.mlp_dim,
                use_bias=self.use_bias,
                dropout=self.dropout,
                style=self.style,
                name=f"decoder_block_{i}",
                dtype=dtype,
            )
            for i in range(self.num_layers)
        ]
        self._norm = self.style.make_norm("decoder_norm", dtype)
        # float32 even under mixed precision, for exact log-probabilities.
        self._head = keras.layers.Dense(
            self.vocabulary_size,
            kernel_initializer="zeros",
            name="head",
            dtype="float32",
        )

    def default_encoder_dim(self, encoder_dim):
        """Sets the width of the encoded patches, if the constructor did not."""
        if self._has_default_encoder_dim and not self.built:
            self.encoder_dim = encoder_dim

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructor determines."""
        text = (None, self.max_length, self.hidden_dim)
        self._embedding.build((None, self.max_length))
        self._positions.build(text)
        for block in self.blocks:
            block.build(text, (None, None, self.encoder_dim))
        self._norm.build(text)
        self._head.build(text)
        self.built = True

    def build_from_config(self, config):
        """Builds a model that is being loaded."""
        del config
        self.build()

    @property
    def head_weights(self):
        """Kernel [D, V] and bias [V] of the output head."""
        return self._head.kernel, self._head.bias

    def shift_right(self, labels):
        """Decoder inputs that predict `labels` left to right.

        Args:
            labels: int [N, L].

        Returns:
            int [N, L], with the start token first and without the last token:
            [[5, 7, 1]] -> [[0, 5, 7]].
        """
        start = ops.full_like(labels[:, :1], self.special_tokens.start)
        return ops.concatenate([start, labels[:, :-1]], axis=1)

    def _embed(self, tokens, positions=None):
        """Embedded tokens [N, L, D], and the rotation of their positions.

        `positions` are int [1 or N, L]; by default 0, 1, ...
        """
        x = self._positions(self._embedding(tokens), positions)
        if positions is None:
            positions = ops.arange(ops.shape(tokens)[1])[None]
        head_dim = self.hidden_dim // self.num_heads
        return x, self._positions.rotation(head_dim, positions)

    def project_memory(self, encoded):
        """Cross-attention keys and values of encoded images, for each block.

        Args:
            encoded: [B, P, E].

        Returns:
            List of (keys, values), each [B, P, H, C].
        """
        encoded = ops.cast(encoded, self.compute_dtype)
        return [block.cross_attention.project(encoded) for block in self.blocks]

    def attention_mask(self, length, parallel=None):
        """Mask of the positions that each position may attend to.

        Args:
            length: L.
            parallel: None (all left to right) or bool [N], True for captions
                predicted all at once, which attend to every position.

        Returns:
            Bool [1, 1, L, L] or [N, 1, L, L].
        """
        position = ops.arange(length)
        causal = position[:, None] >= position[None, :]
        causal = causal[None, None]
        if parallel is None:
            return causal
        return ops.logical_or(causal, parallel[:, None, None, None])

    def call(
        self,
        tokens,
        memory=None,
        parallel=None,
        seeds=None,
        training=False,
        positions=None,
        attention_mask=None,
    ):
        """Hidden states of whole captions.

        Call arguments:
            tokens: int [N, L] inputs (already shifted or masked), L <= M.
            memory: From `project_memory`, of B images with N = B * K; None
                omits the image (the blind baseline).
            parallel: None or bool [N], as in `attention_mask`.
            seeds: uint32 [N], dropout seeds in training; by default from a
                `keras.random.SeedGenerator`.
            training: Whether to apply dropout.
            positions: Optional int [L], the position of each token in its
                text; 0, 1, ... by default.
            attention_mask: Optional bool, broadcastable to [N, H, L, L], in
                place of `self.attention_mask(L, parallel)`.

        Returns:
            [N, L, D] after the final LayerNorm.
        """
        if training and seeds is None and self.seed_generator is not None:
            seeds = next_seeds(self.seed_generator, ops.shape(tokens)[0])
        if positions is not None:
            positions = positions[None]
        x, rotation = self._embed(tokens, positions)
        mask = attention_mask
        if mask is None:
            mask = self.attention_mask(ops.shape(tokens)[1], parallel)

        def call_block(block, x, *keys_values):
            return block(
                x,
                keys_values or None,
                attention_mask=mask,
                seeds=seeds,
                training=training,
                rotation=rotation,
            )[0]

        for i, run in enumerate(
            repeated_blocks.callers(
                self.blocks, call_block, training, self.remat
            )
        ):
            x = run(x, *(() if memory is None else memory[i]))
        return self._norm(x)

    def image_attention(self, tokens, memory):
        """How much each position of captions attends to each patch.

        Args:
            tokens: int [N, L] inputs, left to right.
            memory: From `project_memory`, of B images with N = B * K.

        Returns:
            List of float32 [N, H, L, P], one for each block; they sum to 1
            over the patches.
        """
        mask = self.attention_mask(ops.shape(tokens)[1])
        (x, rotation), maps = self._embed(tokens), []
        for block, keys_values in zip(self.blocks, memory, strict=True):
            x, _, weights = block(
                x,
                keys_values,
                attention_mask=mask,
                with_weights=True,
                rotation=rotation,
            )
            maps.append(weights)
        return maps

    def empty_cache(self, batch_size, length=None):
        """Empty cache for the keys and values of captions being decoded.

        Args:
            batch_size: N.
            length: Positions to reserve, `max_length` by default.

        Returns:
            List of (keys, values) for each block, zeros [N, H, length, C] in
            the compute dtype.
        """
        head_dim = self.hidden_dim // self.num_heads
        positions = length or self.max_length
        shape = (batch_size, self.num_heads, positions, head_dim)
        zeros = ops.zeros(shape, dtype=self.compute_dtype)
        return [(zeros, zeros) for _ in self.blocks]

    def fill_cache(self, texts, memory, length):
        """Reads texts left to right, with room for captions after them.

        Args:
            texts: int [N, M], padded; M may be unknown.
            memory: From `project_memory`, of B images with N = B * K; or None.
            length: Positions of a caption to reserve.

        Returns:
            Hidden states [N, M, D] after the final LayerNorm, of which each
            predicts the text's token at its position; and a cache as of
            `empty_cache`, [N, H, M + length, C]: first the keys and values
            that lead to the last token of a text, from those of the start
            token on. Entries at and after a text's length have no meaning.
        """
        tokens = self.shift_right(texts)
        count = ops.shape(tokens)[1]
        x, rotation = self._embed(tokens)
        mask = self.attention_mask(count)
        filled = []
        for i, block in enumerate(self.blocks):
            keys_values = None if memory is None else memory[i]
            x, written = block(
                x, keys_values, attention_mask=mask, rotation=rotation
            )
            empty = [(0, 0), (0, 0), (0, length), (0, 0)]
            filled.append(tuple(ops.pad(by_head(w), empty) for w in written))
        return self._norm(x), filled

    def call_with_cache(
        self, tokens, memory, cache, index, positions=None, attention_mask=None
    ):
        """Hidden state of one position, given the cached ones before it.

        Args:
            tokens: int [N, 1], input at position `index`.
            memory: From `project_memory`, each tensor passed through
                `attention.by_head`; or None.
            cache: From `empty_cache`, filled up to `index`, or `fill_cache`.
            index: Scalar int, the position, and its place in the cache.
            positions: Optional int [N], the position of each token in its
                text, if it is not `index`.
            attention_mask: Optional bool, broadcastable to [N, H, 1, places of
                the cache]; by default all places up to `index`.

        Returns:
            [N, 1, D] after the final LayerNorm, and the cache filled up to and
            including this position.
        """
        if positions is None:
            positions = ops.reshape(index, (1,))
        x, rotation = self._embed(tokens, positions[:, None])
        mask = attention_mask
        if mask is None:
            places = ops.arange(cache[0][0].shape[2])
            mask = (places <= index)[None, None, None]
        filled = []
        for i, block in enumerate(self.blocks):
            keys_values = None if memory is None else memory[i]
            x, written = block(
                x,
                keys_values,
                attention_mask=mask,
                cache=(*cache[i], index),
                rotation=rotation,
            )
            filled.append(written)
        return self._norm(x), filled

    def logits(self, hidden):
        """Logits of all tokens: [N, L, D] -> float32 [N, L, V]."""
        return self._head(hidden)

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "vocabulary_size max_length hidden_dim num_layers num_heads "
            "mlp_dim encoder_dim use_bias dropout position_embedding "
            "embedding_stddev remat"
        ).split()
        config = {name: getattr(self, name) for name in names}
        base = {"name": self.name, "trainable": self.trainable}
        serialize = keras.saving.serialize_keras_object
        return {
            **base,
            "dtype": serialize(self.dtype_policy),
            "special_tokens": serialize(self.special_tokens),
            **config,
            **self.style.in_config(),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Builds a decoder from `get_config`'s result."""
        config = dict(config)
        if "use_mask_token" in config:  # Files of version 0.1.0.
            has_mask = config.pop("use_mask_token")
            mask = config["vocabulary_size"] if has_mask else None
            config["special_tokens"] = SpecialTokens(mask=mask)
        elif isinstance(config.get("special_tokens"), dict):
            config["special_tokens"] = keras.saving.deserialize_keras_object(
                config["special_tokens"], custom_objects=custom_objects
            )
        return cls(**config)
