"""Image files to what a model takes, and to captions.

B: batch size.  H, W: height and width the model takes.
"""

import numpy as np
import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.images import image_files
from cappa_tf.data.stream.decoding import RecordDecoder


class PictureReader:
    """Picture files to what the model takes.

    The same graph as the data sets' own: what is decoded here is a record.

    Args:
        image_size: (H, W).
        resize: "squash" or "resize_small_central_crop".
        resize_small: Length of the shorter side for the latter.
        antialias: Whether shrinking averages over all pixels.
        reduced_decode: Whether large JPEGs are decoded at a smaller scale.
        max_pixels: A picture with more is refused; None for any.
    """

    def __init__(
        self,
        image_size,
        resize,
        resize_small,
        antialias,
        reduced_decode,
        max_pixels,
    ):
        decoder = RecordDecoder(
            size=tuple(image_size),
            resize=resize,
            small=resize_small,
            antialias=antialias,
            max_pixels=max_pixels,
            num_captions=0,
            seed=None,
            reduced=reduced_decode,
        )
        self._max_pixels = max_pixels
        self._decode = tf.function(
            decoder.decode_one,
            input_signature=[tf.TensorSpec([], tf.string)],
        )

    def __call__(self, path, box=None):
        """Reads one file.

        Args:
            path: The file.
            box: (left, top, width, height) in pixels of the only part to
                take, or None for all of it.

        Returns:
            float32 [H, W, 3] in [-1, 1].

        Raises:
            picture_files.UnusableError: If it cannot be used.
        """
        content = image_files.read(path, max_pixels=self._max_pixels)
        if box is not None:
            content = image_files.cut(content, box)
        return self.decode(content)

    def decode(self, content):
        """Decodes the bytes of an image file.

        Returns:
            float32 [H, W, 3] in [-1, 1].

        Raises:
            picture_files.UnusableError: If it cannot be decoded.
        """
        example = schema.Example(key="", image=content, captions=[])
        try:
            image = self._decode(schema.serialize(example))["image"]
        except tf.errors.OpError as error:
            reason = "image cannot be decoded"
            raise image_files.UnusableError(reason) from error
        return image.numpy().astype("float32") / 127.5 - 1.0


def caption_pictures(paths, reader, decoder):
    """Captions files, a batch at a time.

    Args:
        paths: Files.
        reader: `PictureReader`.
        decoder: `CaptionDecoder`.

    Yields:
        (path, row, reason) in the order of `paths`: a `CaptionRow` and None,
        or None and why the file could not be read.
    """
    for start in range(0, len(paths), decoder.batch_size):
        some = paths[start : start + decoder.batch_size]
        pictures, reasons = {}, {}
        for path in some:
            try:
                pictures[path] = reader(path)
            except image_files.UnusableError as error:
                reasons[path] = error.reason
        rows = {}
        if pictures:
            images = np.stack(list(pictures.values()))  # [<= B, H, W, 3]
            decoded = decoder.decode(images, list(pictures))
            rows = {row.key: row for row in decoded}
        for path in some:
            yield path, rows.get(path), reasons.get(path)
