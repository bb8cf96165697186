"""Contrastive losses of paired embeddings: softmax and sigmoid, in chunks.

Both compare the rows of one modality with all columns of the other. Only the
logits of one chunk of rows are held at a time, and the backward pass recomputes
them, so memory grows with the batch, not with its square.

Abbreviations for dimensions:
    R: rows (pairs of this device).  B: columns (pairs of the global batch).
    S: rows in a chunk.  C: width of the embeddings.
"""

import tensorflow as tf

# Rows per chunk; a batch of up to that size is one chunk.
DEFAULT_CHUNK_SIZE = 1024


def softmax_losses(images, texts, own, scale, *, mask=None, chunk_size=None):
    """Cross-entropy of finding the text of an image and the image of a text.

    Args:
        images: float32 [B, C], normalized embeddings of the global batch.
        texts: float32 [B, C]; text i belongs to image i.
        own: (offset, R): the losses of the pairs offset ... offset + R - 1 are
            returned.
        scale: float32 scalar, the factor of the similarities.
        mask: Optional bool [B]; a pair that is masked (False) is not used as a
            negative, and its own loss is 0.
        chunk_size: S, `DEFAULT_CHUNK_SIZE` by default.

    Returns:
        (losses, found), both float32 [R]: half the sum of both directions'
        negative log-likelihoods, differentiable in images, texts and scale;
        and 1 if an image's own text is the most similar one, else 0.

    Reference: arXiv 2103.00020; big_vision utils.py
    `bidirectional_contrastive_loss`.
    """
    zero = tf.zeros([])
    forth, found = _row_losses(
        images, texts, own, scale, zero, mask, chunk_size, _softmax
    )
    back, _ = _row_losses(
        texts, images, own, scale, zero, mask, chunk_size, _softmax
    )
    return 0.5 * (forth + back), found


def sigmoid_losses(
    images, texts, own, scale, bias, *, mask=None, chunk_size=None
):
    """Binary cross-entropy of every pair, summed over the texts.

    Args:
        images: float32 [B, C], normalized embeddings of the global batch.
        texts: float32 [B, C]; text i belongs to image i.
        own: (offset, R), as in `softmax_losses`.
        scale: float32 scalar, the factor of the similarities.
        bias: float32 scalar, added to the scaled similarities.
        mask: Optional bool [B], as in `softmax_losses`.
        chunk_size: S, `DEFAULT_CHUNK_SIZE` by default.

    Returns:
        (losses, found), both float32 [R], as in `softmax_losses`. The loss of
        the batch is the mean of `losses`: divided by B, not by B^2.

    Reference: arXiv 2303.15343; big_vision trainers/proj/image_text/siglip.py.
    """
    return _row_losses(
        images, texts, own, scale, bias, mask, chunk_size, _sigmoid
    )


def _softmax(logits, positive):
    """Losses [S] of logits [S, B] and their derivatives [S, B]."""
    normalizer = tf.reduce_logsumexp(logits, axis=1, keepdims=True)
    # `where` instead of a product with 0, as masked logits are -inf.
    right = tf.reduce_sum(tf.where(positive, logits, 0.0), axis=1)
    derivative = tf.exp(logits - normalizer) - tf.cast(positive, logits.dtype)
    return normalizer[:, 0] - right, derivative


def _sigmoid(logits, positive):
    """Losses [S] of logits [S, B] and their derivatives [S, B]."""
    sign = tf.where(positive, 1.0, -1.0)
    loss = tf.reduce_sum(tf.nn.softplus(-sign * logits), axis=1)
    return loss, -sign * tf.sigmoid(-sign * logits)


def _row_losses(rows, columns, own, scale, bias, mask, chunk_size, kind):
    """Losses of own rows against all columns, and whether each is found.

    Args:
        rows: float32 [B, C].
        columns: float32 [B, C].
        own: (offset, R).
        scale: Scalar.
        bias: Scalar.
        mask: Optional bool [B].
        chunk_size: S, or None.
        kind: `_softmax` or `_sigmoid`.

    Returns:
        float32 [R], with gradients; float32 [R].
    """
    offset, count = own
    size = min(chunk_size or DEFAULT_CHUNK_SIZE, count)
    chunks = -(-count // size)
    every = tf.range(tf.shape(columns)[0])
    kept = tf.ones_like(every, tf.bool) if mask is None else mask

    def chunk(i, rows, columns, scale, bias):
        """Rows [S, C], similarities [S, B], logits [S, B], positives."""
        index = i * size + tf.range(size)
        real = index < count
        index = offset + tf.minimum(index, count - 1)
        some = tf.gather(rows, index)
        similarity = tf.matmul(some, columns, transpose_b=True)
        logits = tf.where(kept[None], similarity * scale + bias, -float("inf"))
        return (
            index,
            tf.logical_and(real, tf.gather(kept, index)),
            some,
            similarity,
            logits,
            index[:, None] == every[None],
        )

    @tf.custom_gradient
    def losses(rows, columns, scale, bias):
        def forward(i, out):
            _, valid, _, _, logits, positive = chunk(
                i, rows, columns, scale, bias
            )
            loss, _ = kind(logits, positive)
            # A wrong column with the same score counts as better.
            right = tf.reduce_max(
                tf.where(positive, logits, -float("inf")), axis=1
            )
            wrong = tf.reduce_max(
                tf.where(positive, -float("inf"), logits), axis=1
            )
            found = tf.cast(right > wrong, tf.float32)
            both = tf.where(valid[:, None], tf.stack([loss, found], 1), 0.0)
            where = (i * size + tf.range(size))[:, None]
            return i + 1, tf.tensor_scatter_nd_update(out, where, both)

        out = tf.zeros([chunks * size, 2])
        out = _loop(chunks, forward, (out,))[1][:count]

        def backward(upstream, _):
            upstream = tf.pad(upstream, [[0, chunks * size - count]])

            def step(i, d_rows, d_columns, d_scale, d_bias):
                index, valid, some, similarity, logits, positive = chunk(
                    i, rows, columns, scale, bias
                )
                _, derivative = kind(logits, positive)
                weight = tf.where(valid, upstream[i * size :][:size], 0.0)
                # A masked column has a derivative of 0, its logit is -inf.
                derivative = tf.where(
                    tf.logical_and(valid[:, None], kept[None]),
                    derivative * weight[:, None],
                    0.0,
                )
                scaled = derivative * scale
                return (
                    i + 1,
                    tf.tensor_scatter_nd_add(
                        d_rows, index[:, None], tf.matmul(scaled, columns)
                    ),
                    d_columns + tf.matmul(scaled, some, transpose_a=True),
                    d_scale + tf.reduce_sum(derivative * similarity),
                    d_bias + tf.reduce_sum(derivative),
                )

            zeros = tf.zeros_like
            start = (zeros(rows), zeros(columns), zeros(scale), zeros(bias))
            return _loop(chunks, step, start)[1:]

        return (out[:, 0], tf.stop_gradient(out[:, 1])), backward

    loss, found = losses(
        rows,
        columns,
        tf.convert_to_tensor(scale, tf.float32),
        tf.convert_to_tensor(bias, tf.float32),
    )
    return loss, tf.stop_gradient(found)


def _loop(chunks, step, start):
    """Runs `step(i, *values)` for all chunks; a single one without a loop."""
    if chunks == 1:
        return step(0, *start)
    return tf.while_loop(
        lambda i, *_: i < chunks,
        step,
        (tf.constant(0), *start),
        maximum_iterations=chunks,
        parallel_iterations=1,
    )
