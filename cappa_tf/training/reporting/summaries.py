"""TensorBoard summaries of a run.  H, W: height and width in pixels."""

import os

import tensorflow as tf


class Summaries:
    """Writes scalars, texts and images below `<folder>/tensorboard`.

    Args:
        folder: The run's folder; None writes nothing (all but the chief).
    """

    def __init__(self, folder):
        self._writer = None
        if folder is not None:
            path = os.path.join(folder, "tensorboard")
            self._writer = tf.summary.create_file_writer(path)

    def scalars(self, step, values, prefix=""):
        """Writes a dict of numbers."""
        if self._writer is None:
            return
        with self._writer.as_default(step):
            for name, value in values.items():
                tf.summary.scalar(prefix + name, value)
        self._writer.flush()

    def text(self, step, name, text):
        """Writes a text (Markdown)."""
        if self._writer is not None:
            with self._writer.as_default(step):
                tf.summary.text(name, text)

    def image(self, step, name, pixels):
        """Writes one image, uint8 [H, W, 3]."""
        if self._writer is not None:
            with self._writer.as_default(step):
                tf.summary.image(name, pixels[None])
            self._writer.flush()

    def close(self):
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
