"""A few evaluation pictures, captioned again and again as training goes on.

B: sample pictures.  H, W: height and width in pixels.
"""

import numpy as np
import tensorflow as tf

from cappa_tf.evaluation.captioning import CaptionDecoder


class Samples:
    """Captions the first pictures of a data set for TensorBoard.

    Args:
        model: Built captioner.
        data: Evaluation data set.
        count: How many pictures; 0 for none.
    """

    def __init__(self, model, data, count):
        self._count = count
        self._tokenizer = data.tokenizer
        if count:
            self._decoder = CaptionDecoder(model, data.tokenizer, count)
            self._take(next(iter(data.evaluate(count))))

    def _take(self, batch):
        real = batch["_mask"].numpy() > 0
        labels = batch["labels"].numpy()[real]
        if labels.ndim == 3:  # [B, K, L]: one reference is enough here
            labels = labels[:, 0]
        self._images = batch["image"].numpy()[real]  # [B, H, W, 3]
        self._references = self._tokenizer.detokenize(labels)

    def write(self, step, summaries):
        """Captions the pictures with the weights as they are."""
        if not self._count:
            return
        keys = [str(i) for i in range(len(self._images))]
        rows = self._decoder.decode(self._images, keys)
        lines = ["| | caption | reference | log-likelihood |", "|-|-|-|-|"]
        for row, reference in zip(rows, self._references):
            lines.append(
                f"| {row.key} | {row.caption} | {reference} | "
                f"{row.log_likelihood:.2f} |"
            )
        summaries.text(step, "samples/captions", "\n".join(lines))
        strip = np.concatenate(list(self._images), axis=1)  # [H, B * W, 3]
        strip = tf.saturate_cast((strip + 1.0) * 127.5, tf.uint8)
        summaries.picture(step, "samples/pictures", strip)
