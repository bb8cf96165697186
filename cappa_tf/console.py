"""What programs print beside their own output."""

import logging as levels
import os

from absl import logging

_TENSORFLOW = f"{os.sep}tensorflow{os.sep}python{os.sep}"


def hide_tensorflow_info():
    """Keeps TensorFlow's messages of level INFO out of the log.

    They are for its developers (how long sharding took, how inputs were
    renamed), come with every checkpoint and tear the progress bar. Its
    warnings and this project's messages stay.
    """
    # Of the handler: TensorFlow logs under two names, one of them absl's own.
    logging.get_absl_handler().python_handler.addFilter(_is_wanted)


def _is_wanted(record):
    return record.levelno > levels.INFO or _TENSORFLOW not in record.pathname
