"""Text decoding, by one rule for captions and tables of all sources.

UTF-8 is read with or without a byte order mark, UTF-16 and UTF-32 with one.
Anything else is an error, as no rule can tell which encoding it is.
"""

import codecs
import io

import tensorflow as tf

# The mark of UTF-32LE begins with that of UTF-16LE.
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)


def decode(content, errors="strict"):
    """Decodes text.

    Args:
        content: Bytes.
        errors: How to handle bytes that are not UTF-8, as in `bytes.decode`.
            With "surrogateescape", `is_text` detects them afterwards. Text
            with another mark is always decoded strictly.

    Returns:
        A string without a byte order mark.

    Raises:
        ValueError: If the bytes are not text in one of these encodings.
    """
    mark, encoding = next(
        (pair for pair in _MARKS if content.startswith(pair[0])),
        (b"", "UTF-8"),
    )
    content = content[len(mark) :]
    if encoding != "UTF-8":
        errors = "strict"
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text is not {encoding} (byte 0x{content[error.start]:02x} "
            f"at {error.start})"
            + ("; save it as UTF-8" if encoding == "UTF-8" else "")
        ) from None


def decode_in_graph(strings):
    """Does the same as `decode` in a TensorFlow graph.

    Args:
        strings: string [n].

    Returns:
        string [n], UTF-8. Bytes that are not text raise
        `tf.errors.InvalidArgumentError`.
    """

    def convert():
        left, result = tf.ones(tf.shape(strings), tf.bool), strings
        for mark, encoding in _MARKS:
            size = len(mark)
            marked = left & (tf.strings.substr(strings, 0, size) == mark)
            left &= ~marked
            # Only the marked ones, as the others have another encoding.
            text = tf.where(marked, tf.strings.substr(strings, size, -1), "")
            text = tf.strings.unicode_transcode(
                text, encoding, "UTF-8", errors="strict"
            )
            result = tf.where(marked, text, result)
        return result

    first = tf.strings.substr(strings, 0, 1)
    marks = (b"\xef", b"\xff", b"\xfe", b"\0")
    marked = tf.reduce_any([tf.reduce_any(first == mark) for mark in marks])
    strings = tf.cond(marked, convert, lambda: strings)
    return tf.strings.unicode_transcode(
        strings, "UTF-8", "UTF-8", errors="strict"
    )


def lines(text):
    r"""Yields the lines of a text, without their ends: \n, \r\n or \r.

    `str.splitlines` would also end lines at characters that occur inside
    captions, such as U+2028.
    """
    return (line.rstrip("\r\n") for line in io.StringIO(text, newline=""))


def is_text(value):
    """Returns whether a string is valid UTF-8, without lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value):
    """Makes a string printable by escaping lone surrogates."""
    return value.encode(errors="backslashreplace").decode()
