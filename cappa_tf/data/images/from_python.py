"""Functions of `decode_resize` for Python: bytes of a file in, NumPy out.

They may be called inside a `tf.numpy_function`. That holds one of the threads
in which TensorFlow runs graphs, so that a graph function called there would
wait for another one: forever if there is none, as on a machine with one CPU or
while all threads decode. The graphs here therefore run in a session with a
thread of its own. It is also several times as fast as `decode_resize.decode`
outside of a graph, whose conditions then run one by one.
"""

import functools

import tensorflow as tf

from cappa_tf.data.images import decode_resize, formats

_ENCODED = tf.TensorSpec([], tf.string)
_LIMIT = tf.TensorSpec([], tf.int64)


def header_size(content):
    """Height and width of an image as `decode_resize.header_size` reads them.

    Args:
        content: Bytes of a JPEG, PNG, GIF, BMP or WebP file.

    Returns:
        List of two integers.

    Raises:
        tf.errors.OpError: If they cannot be read, as in all functions here.
    """
    return _header(decode_resize.header_size)(content).tolist()


def pixels_to_decode(content):
    """Number of pixels, as `decode_resize.pixels_to_decode` counts them."""
    return int(_header(decode_resize.pixels_to_decode)(content))


def read_orientation(content):
    """EXIF orientation, 1 to 8, as of `decode_resize.read_orientation`."""
    return int(_header(decode_resize.read_orientation)(content))


def decode(content, max_pixels=None):
    """Decodes an image as `decode_resize.decode` does without Python.

    Args:
        content: Bytes of a JPEG, PNG, GIF, BMP or WebP file.
        max_pixels: As for `decode_resize.decode`.

    Returns:
        uint8 [h, w, 3].
    """
    kind, _ = formats.kind_of_bytes(content)
    function = _decoder(common=kind in (formats.JPEG, formats.PNG))
    return function(content, -1 if max_pixels is None else max_pixels)


@functools.cache
def _header(function):
    return _in_session(function, _ENCODED)


@functools.cache
def _decoder(common):
    """Decoder of JPEG and PNG files only, or of all, which loads slower."""

    def refuse(encoded, max_pixels):
        del encoded, max_pixels
        return tf.zeros([0, 0, 3], tf.uint8)

    def decode(encoded, max_pixels):
        others = refuse if common else None
        return decode_resize.decode(encoded, max_pixels, others=others)

    return _in_session(decode, _ENCODED, _LIMIT)


def _in_session(function, *signature):
    """A function of NumPy values that runs in a session's own thread."""
    traced = tf.function(function, input_signature=signature, autograph=False)
    concrete = traced.get_concrete_function()
    graph = tf.Graph()
    with graph.as_default(), tf.device("CPU:0"):
        tf.graph_util.import_graph_def(concrete.graph.as_graph_def(), name="")
    session = tf.compat.v1.Session(
        graph=graph,
        config=tf.compat.v1.ConfigProto(
            device_count={"GPU": 0},
            use_per_session_threads=True,
            inter_op_parallelism_threads=1,
            intra_op_parallelism_threads=1,
        ),
    )
    return session.make_callable(
        concrete.outputs[0].name, [x.name for x in concrete.inputs]
    )
