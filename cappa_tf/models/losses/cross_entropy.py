"""Cross-entropy over a large vocabulary, for real tokens only, in chunks.

The logits of a CapPa batch (8,192 captions x 64 positions x 32,000 tokens)
would take 67 GB, most of it for padding. Here the real positions are gathered,
and their logits are computed one chunk at a time and never stored: the backward
pass recomputes them. Time is proportional to the number of real tokens, memory
to one chunk.

Abbreviations for dimensions:
    R: positions (of all captions, concatenated).
    C: positions in a chunk.  D: width.  V: vocabulary.
"""

import tensorflow as tf

DEFAULT_CHUNK_SIZE = 2048
# Columns of the head whose logits are computed at a time for normalizers.
_COLUMNS = 1024


def token_cross_entropy(
    hidden,
    targets,
    valid,
    kernel,
    bias,
    *,
    label_smoothing=0.0,
    chunk_size=DEFAULT_CHUNK_SIZE,
):
    """Loss and negative log-likelihood of each position.

    Args:
        hidden: [R, D], the decoder's outputs.
        targets: int32 [R], the token to predict at each position.
        valid: bool [R], False for padding, where nothing is predicted.
        kernel: [D, V] of the output head.
        bias: [V] of the output head.
        label_smoothing: Fraction s of the target's probability that is spread
            over the whole vocabulary, in [0, 1).
        chunk_size: Positions whose logits are held in memory at a time.

    Returns:
        loss: float32 [R], 0 where not valid, differentiable in hidden, kernel
            and bias: (1 - s) * nll + s * (mean nll of all tokens).
        nll: float32 [R], 0 where not valid; carries no gradient.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            "`label_smoothing` must be in [0, 1). "
            f"Received: label_smoothing={label_smoothing!r}"
        )
    positions = tf.shape(hidden)[0]
    static_positions = hidden.shape[0]
    if static_positions is not None:
        chunk_size = min(chunk_size, static_positions)
    # Real positions come first; a stable sort keeps their order.
    order = tf.argsort(tf.cast(~valid, tf.int32), stable=True)
    chunks = -(-positions // chunk_size)
    order = tf.pad(order, [[0, chunks * chunk_size - positions]])
    count = tf.reduce_sum(tf.cast(valid, tf.int32))
    real = tf.range(chunks * chunk_size) < count
    loss, nll = _chunked(
        tf.gather(hidden, order),
        tf.convert_to_tensor(kernel),
        tf.convert_to_tensor(bias),
        tf.gather(targets, order),
        -(-count // chunk_size),
        chunk_size,
        label_smoothing,
    )
    scattered = tf.scatter_nd(
        order[:, None],
        tf.where(real[:, None], tf.stack([loss, nll], 1), 0.0),
        tf.stack([positions, 2]),
    )
    return scattered[:, 0], tf.stop_gradient(scattered[:, 1])


def log_normalizers(hidden, kernel, bias):
    """Log-sum-exp of each position's logits.

    The logits of some columns at a time stay in the processor's cache; the
    product takes most of the time then.

    Args:
        hidden: [R, D], the decoder's outputs.
        kernel: [D, V] of the output head.
        bias: [V] of the output head.

    Returns:
        float32 [R].
    """
    rows, (width, vocabulary) = tf.shape(hidden)[0], kernel.shape
    chunks = -(-vocabulary // _COLUMNS)
    size = -(-vocabulary // chunks)

    def step(i, most, sums):
        # The last chunk overlaps with the one before it.
        start = tf.minimum(i * size, vocabulary - size)
        is_new = start + tf.range(size) >= i * size
        some = tf.where(is_new, tf.slice(bias, [start], [size]), -1e30)
        logits = _logits(
            hidden, tf.slice(kernel, [0, start], [width, size]), some
        )
        now = tf.maximum(most, tf.reduce_max(logits, axis=-1))
        gained = tf.reduce_sum(tf.exp(logits - now[:, None]), axis=-1)
        return i + 1, now, sums * tf.exp(most - now) + gained

    state = (tf.fill([rows], -1e30), tf.zeros([rows]))
    _, most, sums = _loop(chunks, step, state)
    return most + tf.math.log(sums)


def _chunked(hidden, kernel, bias, targets, chunks, chunk_size, smoothing):
    """Loss and nll of the first `chunks` chunks; zeros for the others.

    Args:
        hidden: [R, D] with R a multiple of chunk_size.
        kernel: [D, V].
        bias: [V].
        targets: int32 [R].
        chunks: Scalar int32.
        chunk_size: Python int.
        smoothing: Python float.

    Returns:
        Two float32 [R].
    """

    def chunk(x, i):
        return tf.slice(
            x,
            [i * chunk_size] + [0] * (x.shape.rank - 1),
            [chunk_size] + x.shape.as_list()[1:],
        )

    @tf.custom_gradient
    def run(hidden, kernel, bias):
        def forward(i, loss, nll):
            logits = _logits(chunk(hidden, i), kernel, bias)
            parts = _losses(logits, chunk(targets, i), smoothing)
            where = (i * chunk_size + tf.range(chunk_size))[:, None]
            return (
                i + 1,
                tf.tensor_scatter_nd_update(loss, where, parts[0]),
                tf.tensor_scatter_nd_update(nll, where, parts[1]),
            )

        zeros = tf.zeros(tf.shape(targets), tf.float32)
        _, loss, nll = _loop(chunks, forward, (zeros, zeros))

        def backward(d_loss, unused_d_nll):
            def step(i, d_hidden, d_kernel, d_bias):
                x = chunk(hidden, i)
                logits = _logits(x, kernel, bias)
                d_logits = _logits_gradient(
                    logits, chunk(targets, i), smoothing, chunk(d_loss, i)
                )
                # In the compute dtype: the products are most of the cost.
                d = tf.cast(d_logits, x.dtype)
                d_x = tf.matmul(d, tf.cast(kernel, x.dtype), transpose_b=True)
                where = (i * chunk_size + tf.range(chunk_size))[:, None]
                product = tf.matmul(x, d, transpose_a=True)
                return (
                    i + 1,
                    tf.tensor_scatter_nd_update(d_hidden, where, d_x),
                    d_kernel + tf.cast(product, d_kernel.dtype),
                    d_bias + tf.reduce_sum(d_logits, 0),
                )

            zeros = (
                tf.zeros_like(hidden),
                tf.zeros_like(kernel),
                tf.zeros_like(bias),
            )
            return _loop(chunks, step, zeros)[1:]

        return (loss, nll), backward

    return run(hidden, kernel, bias)


def _loop(count, body, state):
    """Runs `body(i, *state)` for i in 0 ... count - 1."""
    return tf.while_loop(
        lambda i, *unused: i < count,
        body,
        (tf.constant(0), *state),
        parallel_iterations=1,
    )


def _logits(hidden, kernel, bias):
    """Logits float32 [C, V] of hidden states [C, D]."""
    product = tf.matmul(hidden, tf.cast(kernel, hidden.dtype))
    return tf.cast(product, tf.float32) + tf.cast(bias, tf.float32)


def _losses(logits, targets, smoothing):
    """Loss and nll [C] of logits [C, V] at targets [C]."""
    log_sum = tf.reduce_logsumexp(logits, axis=-1)
    nll = log_sum - tf.gather(logits, targets, batch_dims=1)
    if smoothing == 0.0:
        return nll, nll
    uniform = log_sum - tf.reduce_mean(logits, axis=-1)
    return (1.0 - smoothing) * nll + smoothing * uniform, nll


def _logits_gradient(logits, targets, smoothing, d_loss):
    """Gradient [C, V] of the loss, times the incoming gradient [C]."""
    vocabulary = logits.shape[-1]
    wanted = tf.one_hot(
        targets,
        vocabulary,
        on_value=1.0 - smoothing + smoothing / vocabulary,
        off_value=smoothing / vocabulary,
    )
    return (tf.nn.softmax(logits) - wanted) * d_loss[:, None]


def caption_mean(values, valid):
    """Mean over the real tokens of each caption.

    Captions count equally whatever their length, as in big_vision (utils.py
    `weighted_softmax_xent`), unlike in one mean over all tokens.

    Args:
        values: float32 [..., L], 0 where not valid.
        valid: bool [..., L].

    Returns:
        float32 [...], 0 for a caption without tokens.
    """
    tokens = tf.reduce_sum(tf.cast(valid, tf.float32), axis=-1)
    return tf.reduce_sum(values, axis=-1) / tf.maximum(tokens, 1.0)
