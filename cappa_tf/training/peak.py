"""Peak rate of matrix products on this machine, measured."""

import functools
import time

import tensorflow as tf


def product(dtype, size):
    """A function that multiplies two square matrices, and waits for it.

    Args:
        dtype: Name of their type.
        size: Their side; the function takes 2 * size ** 3 operations.
    """
    return product_of(dtype, [(size, size)] * 2)


def product_of(dtype, shapes, times=1, **options):
    """A function that multiplies two tensors several times, and waits.

    Args:
        dtype: Name of their type.
        shapes: Their shapes.
        times: How many products, each of another first tensor: more than one
            where a call of a function takes about as long as a product.
        **options: Of `tf.matmul`.
    """

    def normal(shape, seed):
        value = tf.random.stateless_normal(shape, (0, seed))
        return tf.cast(value, dtype)

    ones = [normal(shapes[0], i) for i in range(times)]
    other = normal(shapes[1], times)

    @tf.function(autograph=False)
    def multiply():
        products = [tf.matmul(one, other, **options) for one in ones]
        return tf.add_n([tf.reshape(x, [-1])[0] for x in products])

    def run():
        multiply().numpy()

    return run


@functools.cache
def measured_peak(dtype, size=1024, seconds=0.2):
    """Operations per second of products, the best of several.

    Args:
        dtype: Name of the type of the matrices.
        size: Their side.
        seconds: For how long to try.
    """
    run = product(dtype, size)
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best


def elementwise(kind, size, times=16):
    """A function of elementwise operations, and the bytes that it moves.

    Args:
        kind: "copy" (differences and products of two tensors) or a key of
            `plan.COSTLY`.
        size: Numbers of a tensor, float32, a multiple of 8,192.
        times: How many operations.

    Returns:
        (bytes that a call reads and writes, the function, which waits).
    """
    one, other = (tf.random.stateless_normal([size], (0, i)) for i in range(2))

    @tf.function(autograph=False)
    def change():
        x, sums = one, 0.0
        for i in range(times):
            if kind == "copy":  # Alternating, as equal ones would be merged.
                x = x * other if i % 2 else x - other
            elif kind == "tanh":
                x = tf.tanh(x)
            elif kind == "transpose":
                # As the heads of an attention.
                x = tf.reshape(x, [-1, 128, 8, 8])
                x = tf.transpose(x, [0, 2, 1, 3])
            else:
                x = tf.reshape(one, [-1, 64]) + float(i)
                sums += tf.reduce_sum(x, axis=i % 2)[0]
        return tf.reshape(x, [-1])[0] + sums

    def run():
        change().numpy()

    moved = {"copy": 3, "sum": 3}.get(kind, 2)
    return moved * 4 * size * times, run
