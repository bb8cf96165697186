"""A few evaluation pictures, captioned again and again as training goes on.

B: sample pictures.  H, W: height and width in pixels.
"""

import os

import tensorflow as tf

from cappa_tf.evaluation.captioning import CaptionDecoder
from cappa_tf.evaluation.sheet import write_sheet


class Samples:
    """Captions the first pictures of a data set, for TensorBoard and a file.

    Args:
        folder: The run's folder: the newest sheet is its samples.png.
        model: Built captioner.
        data: Evaluation data set.
        count: How many pictures; 0 for none.
    """

    def __init__(self, folder, model, data, count):
        self._count = count
        self._path = os.path.join(folder, "samples.png")
        self._tokenizer = data.tokenizer
        if count:
            self._decoder = CaptionDecoder(model, data.tokenizer, count)
            self._take(next(iter(data.evaluate(count))))

    def _take(self, batch):
        real = batch["_mask"].numpy() > 0
        labels = batch["labels"].numpy()[real]
        if labels.ndim == 3:  # [B, K, L]: one reference is enough here
            labels = labels[:, 0]
        texts = self._tokenizer.detokenize(labels)
        self._references = [[text] for text in texts]
        self._images = batch["image"].numpy()[real]  # [B, H, W, 3]

    def write(self, step, summaries):
        """Captions the pictures with the weights as they are."""
        if not self._count:
            return
        keys = [str(i) for i in range(len(self._images))]
        rows = self._decoder.decode(self._images, keys, self._references)
        lines = ["| caption | reference | log-likelihood |", "|-|-|-|"]
        for row, image in zip(rows, self._images, strict=True):
            row.image = _png(image)
            lines.append(
                f"| {row.caption} | {row.references[0]} | "
                f"{row.log_likelihood:.2f} |"
            )
        summaries.text(step, "samples/captions", "\n".join(lines))
        write_sheet(self._path, rows, title=f"step {step}")
        sheet = tf.io.decode_png(tf.io.read_file(self._path), channels=3)
        summaries.picture(step, "samples/sheet", sheet)


def _png(image):
    """Encoded bytes of an image in [-1, 1]."""
    pixels = tf.saturate_cast(tf.round((image + 1.0) * 127.5), tf.uint8)
    return tf.io.encode_png(pixels).numpy()
