"""Text in bytes: one rule for captions and tables, wherever they lie.

UTF-8 is read with or without a byte order mark, UTF-16 and UTF-32 with one.
Anything else is refused: which of many encodings it is, no rule tells.
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
        errors: What happens to bytes that are not UTF-8, as in
            `bytes.decode`. With "surrogateescape", `is_text` tells where they
            are; text with another mark is always decoded strictly.

    Returns:
        A string without a byte order mark.

    Raises:
        ValueError: The bytes are not text of these encodings.
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
    """`decode` in a TensorFlow graph.

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
            # Of the marked ones alone, as the others would be no such text.
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
    r"""The lines of a text, without their ends: \n, \r\n or \r.

    Not `str.splitlines`, which also ends lines at characters that occur
    inside captions, such as U+2028.
    """
    return (line.rstrip("\r\n") for line in io.StringIO(text, newline=""))


def is_text(value):
    """Whether a string can be written as UTF-8: no half of a pair in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value):
    """A string that can be printed: halves of pairs are written out."""
    return value.encode(errors="backslashreplace").decode()
