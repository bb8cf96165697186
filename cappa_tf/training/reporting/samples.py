"""Sample captions of a few evaluation images, renewed during training.

B: sample images of one host.  H, W: height and width in pixels.
"""

import os

import numpy as np
import tensorflow as tf

from cappa_tf.evaluation.captioning import in_order
from cappa_tf.evaluation.sheet import attention_sheet, write_sheet
from cappa_tf.inference.attention_maps import (
    attention_maps,
    has_attention_maps,
)
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.utils import files

# Images whose attention maps are drawn.
_ATTENTION_IMAGES = 4


class Samples:
    """Captions the first images of a data set, for TensorBoard and a file.

    Args:
        folder: The run's folder, where samples.png is the newest sheet, and
            attention.png shows where the model looked for each word.
        model: Built captioner.
        data: Evaluation data set, with images.
        count: Number of images.
        hosts: The run's `Hosts`, each of which captions its part.
    """

    def __init__(self, folder, model, data, count, hosts):
        self._folder, self._model = folder, model
        self._data, self._count, self._hosts = data, count, hosts
        self._share = -(-count // hosts.count)
        self._decoder = CaptionDecoder(model, data.tokenizer, self._share)

    def open(self):
        """Reads this host's part of the images."""
        hosts = self._hosts
        batches = self._data.evaluate(self._share, hosts.index, hosts.count)
        self._take(next(iter(batches)))

    def _take(self, batch):
        real = batch["_mask"].numpy() > 0
        real &= batch["index"].numpy() < self._count
        labels = batch["labels"].numpy()[real][:, 0]  # one reference each
        self._images = batch["image"].numpy()[real]  # [B, H, W, 3]
        self._indices = batch["index"].numpy()[real].tolist()
        self._prompts = None
        if "prompt_lengths" in batch:
            lengths = batch["prompt_lengths"].numpy()[real][:, 0]
            in_prompt = np.arange(labels.shape[1]) < lengths[:, None]
            labels = np.where(in_prompt, self._data.tokenizer.pad_id, labels)
            # As text, which is what the decoder checks.
            examples = list(self._data.read_examples(self._count))
            self._prompts = [examples[i].prompts[0] for i in self._indices]
        texts = self._data.tokenizer.detokenize(labels)
        self._references = [[text] for text in texts]

    def write(self, step, summaries):
        """Captions the images with the current weights.

        Returns:
            The captions of all hosts' images, on each of them.
        """
        keys = [str(i) for i in range(len(self._images))]
        rows = self._decoder.decode(
            self._images, keys, self._references, self._prompts
        )
        for row, image in zip(rows, self._images, strict=True):
            row.image = _png(image)
        if self._hosts.is_chief and has_attention_maps(self._model):
            self._show_attention(step, summaries, rows[:_ATTENTION_IMAGES])
        rows = in_order(self._hosts.gather(list(zip(self._indices, rows))))
        if self._hosts.is_chief:
            self._show(step, summaries, rows)
        return [row.caption for row in rows]

    def _show_attention(self, step, summaries, rows):
        """Shows the attention to the first images of the first host."""
        images = self._images[: len(rows)]
        maps = attention_maps(self._model, self._data.tokenizer, images, rows)
        sheet = attention_sheet(rows, images, maps, title=f"step {step}")
        path = os.path.join(self._folder, "attention.png")
        with files.replacing(path) as unfinished:
            sheet.save(unfinished, "PNG", optimize=True)
        summaries.image(step, "samples/attention", np.asarray(sheet))

    def _show(self, step, summaries, rows):
        asked = "| prompt " if self._prompts else ""
        lines = [
            f"{asked}| caption | reference | log-likelihood |",
            f"{asked and '|-'}|-|-|-|",
        ]
        for row in rows:
            lines.append(
                f"{asked and f'| {row.prompt} '}| {row.caption} | "
                f"{row.references[0]} | {row.log_likelihood:.2f} |"
            )
        summaries.text(step, "samples/captions", "\n".join(lines))
        path = os.path.join(self._folder, "samples.png")
        write_sheet(path, rows, title=f"step {step}")
        sheet = tf.io.decode_png(tf.io.read_file(path), channels=3)
        summaries.image(step, "samples/sheet", sheet)


def _png(image):
    """PNG bytes of an image with values in [-1, 1]."""
    pixels = tf.saturate_cast(tf.round((image + 1.0) * 127.5), tf.uint8)
    return tf.io.encode_png(pixels).numpy()
