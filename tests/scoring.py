"""Helpers of evaluator tests: a perfect model, and an untrained one."""

import json

import numpy as np
import tensorflow as tf
import tiny
from PIL import Image

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.inference.predictor import Predictor
from cappa_tf.saving import run_folder

PREPROCESSING = ImagePreprocessing(16, reduced_decode=False, max_pixels=None)
# As many colors as in `tiny.WORDS`.
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


class Knowing:
    """In place of a captioner: tells how red, green or blue an image is.

    A text with the name of a color scores the logarithm of how much of the
    image has that color, minus `prior` for each letter "e" of the text,
    which is its score of a text without an image.
    """

    score_kinds = ("autoregressive", "parallel", "blind")
    parts = {}

    def __init__(self, tokenizer, prior=0.0):
        self._tokenizer, self._prior = tokenizer, prior

    def score_texts(self, images, labels, kind):
        images = None if kind == "blind" else images
        count = 1 if images is None else images.shape[0]
        labels = np.repeat(np.asarray(labels)[None], count, axis=0)
        if images is None:
            return self.score_own_texts(None, labels, kind)
        return tf.numpy_function(
            lambda pictures: self.score_own_texts(pictures, labels, kind),
            [images],
            tf.float64,
        )

    def score_own_texts(self, images, labels, kind):
        scores = np.zeros(labels.shape[:2])
        for b, rows in enumerate(np.asarray(labels)):
            for k, text in enumerate(self._tokenizer.detokenize(rows)):
                scores[b, k] = -self._prior * text.count("e")
                if images is not None:
                    scores[b, k] += _match(images[b], text)
        return scores


def _match(image, text):
    """Log fraction of the image that has the colors in the text."""
    level = (image.mean((0, 1)) + 1) / 2
    share = level / max(level.sum(), 1e-6) + 1e-6
    return sum(
        np.log(share[i]) for i, name in enumerate(COLOURS) if name in text
    )


class KnowingEmbeddings:
    """In place of a contrastive model: embeds colors.

    An image has the embedding of its colors, a text of those that it names.
    """

    score_kinds = ("cosine",)
    can_generate = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.parts = {"vision_encoder": self._encode}
        self.texts = 0

    def _encode(self, images, training):
        del training
        return {"pre_logits": tf.reduce_mean(images, axis=[1, 2])}

    def embed_images(self, images):
        level = (tf.reduce_mean(images, axis=[1, 2]) + 1) / 2 + 1e-3
        return level / tf.norm(level, axis=1, keepdims=True)

    def embed_texts(self, labels):
        return tf.numpy_function(self._named, [labels], tf.float32)

    def _named(self, labels):
        self.texts += int((labels != 0).any(1).sum())
        texts = self._tokenizer.detokenize(labels)
        found = [[name in text for name in COLOURS] for text in texts]
        found = np.array(found, "float32") + 1e-3
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def contrastive_predictor(folder, batch_size=4):
    """`tiny.make_contrastive` with random weights and its vocabulary."""
    data = tiny.Data(folder)
    model = tiny.make_contrastive(tiny.vocabulary(folder)[1])
    model.build()
    return Predictor(model, data.tokenizer, PREPROCESSING, batch_size)


def tiny_predictor(folder, batch_size=4):
    """A model with random weights, its vocabulary and preprocessing."""
    data = tiny.Data(folder)
    return Predictor(
        random_model(folder), data.tokenizer, PREPROCESSING, batch_size
    )


def random_model(folder):
    """`tiny.make_model`, but the head does not start at zero."""
    model = tiny.make_model(tiny.vocabulary(folder)[1])
    model.build()
    kernel, bias = model.text_decoder.head_weights
    for i, weight in enumerate((kernel, bias)):
        weight.assign(tf.random.stateless_normal(weight.shape, [1, i]))
    return model


def knowing_predictor(folder, prior=0.0, batch_size=4):
    """Scores by `Knowing`."""
    tokenizer = tiny.Data(folder).tokenizer
    return Predictor(
        Knowing(tokenizer, prior), tokenizer, PREPROCESSING, batch_size
    )


def save_run(folder, vocabulary, model=None):
    """The folder of an untrained run."""
    model, data = model or random_model(vocabulary), tiny.Data(vocabulary)
    run_folder.describe_run(str(folder), model, data)
    run_folder.save_model(str(folder), model)
    return folder


def write_colours(folder, count=6):
    """Images in one color each; labels.jsonl and captions.jsonl.

    Image i has color i % 3, the captions "<color> square" and "square
    <color>", and the split "test" (the first six) or "train".
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels, captions = [], []
    for i in range(count):
        number = i % len(COLOURS)
        name = list(COLOURS)[number]
        Image.new("RGB", (20, 14), COLOURS[name]).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "split": "test" if i < 6 else "train"}
        labels.append(row | {"label": number, "class_name": name})
        texts = [f"{name} square", f"square {name}"]
        captions.append(row | {"captions": texts})
    for name, rows in (("labels", labels), ("captions", captions)):
        (folder / name).mkdir(exist_ok=True)
        lines = [
            json.dumps(row | {"image": f"../{row['image']}"}) for row in rows
        ]
        (folder / name / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


_EXPERT = """\
red.png\tblue.png#0\t1\t1\t2
red.png\tother.png#1\t4\t3\t4
red.png\tred.png#0\t4\t4\t4
blue.png\tred.png#0\t1\t1\t1
blue.png\tother.png#0\t4\t4\t4
"""


def write_judgments(folder):
    """A folder in Flickr8k's form: a red, a blue and a black image."""
    (folder / "judgments").mkdir(parents=True)
    texts = {
        "red": ["red square"],
        "blue": ["blue square"],
        "other": ["blue", "red"],
    }
    rows = []
    for name, captions in texts.items():
        colour = COLOURS.get(name, (0, 0, 0))
        Image.new("RGB", (9, 9), colour).save(folder / f"{name}.png")
        rows.append(json.dumps({"image": f"{name}.png", "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    (folder / "judgments" / "ExpertAnnotations.txt").write_text(_EXPERT)
