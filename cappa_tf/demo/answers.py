"""Answers of the demo: a model in this process, or one that is served.

Abbreviations for dimensions:
    N: images of a batch.  H, W: size of the images that the model takes.
"""

import base64
import io
import threading

import numpy as np
from PIL import Image

from cappa_tf.data.images import image_files
from cappa_tf.demo.batches import Batches
from cappa_tf.evaluation import prompts as zero_shot_prompts
from cappa_tf.evaluation.sheet import heat_layer, probability_color
from cappa_tf.export import serving_clients
from cappa_tf.inference import prompting
from cappa_tf.inference.attention_maps import (
    attention_maps,
    has_attention_maps,
)
from cappa_tf.inference.predictor import CLASSIFY, COSINE, GENERATE, SCORE

_NATS = "log-likelihood in nats"
_PROBABILITIES = "probability"
# What the page offers of `samplers.OPTIONS`; the others are special cases.
_SAMPLERS = ("greedy", "beam", "top_p")
# Files decoded at a time; a large one takes much memory.
_DECODERS = 4
_HEAT_PIXELS = 112  # longer side of an attention map on the page
_PREVIEW_PIXELS = 800


class RefusedError(Exception):
    """The model cannot do what a request asks for; the message says why."""


class ModelAnswers:
    """Answers of a model in this process.

    Args:
        pretrained: `presets.Pretrained`, with the largest batch as its
            predictor's batch size.
        name: What the page calls the model, by default the predictor's name.

    Raises:
        ValueError: If the model neither captions nor ranks labels.
    """

    def __init__(self, pretrained, name=None):
        self._pretrained = pretrained
        predictor = self._predictor = pretrained.predictor
        self._name = name or predictor.name
        self._captions = predictor.can(GENERATE)
        self._classifies = predictor.can(CLASSIFY)
        self._ranks = self._classifies or predictor.can(SCORE)
        if not self._captions and not self._ranks:
            predictor.require("The demo", GENERATE)
        self._maps = self._captions and has_attention_maps(predictor.model)
        self._decoding = threading.BoundedSemaphore(_DECODERS)
        self._batches = Batches(predictor.batch_size)

    def about(self):
        """What the model can do, for the page."""
        predictor = self._predictor
        captions = rank = prompt = None
        if self._captions:
            captions = {
                "samplers": _SAMPLERS,
                "words": True,
                "attention": self._maps,
            }
        if self._ranks:
            kind = _PROBABILITIES
            if not self._classifies:
                kind = COSINE if predictor.score_kinds[0] == COSINE else _NATS
            rank = {
                "kind": kind,
                "labels": not self._classifies,
                "template": _template(kind),
            }
        if predictor.prompts:
            prompt = {
                "templates": predictor.prompts,
                "required": "" not in predictor.prompts,
            }
        return {
            "name": self._name,
            "caption": captions,
            "rank": rank,
            "prompt": prompt,
        }

    def warm_up(self):
        """Captions a gray image, which compiles what the first one needs."""
        prompts = self._predictor.prompts
        # One with a place for a question is not worth an example of it.
        plain = [text for text in prompts if "{" not in text]
        if not self._captions or (prompts and not plain):
            return
        size = (*self._predictor.image_size, 3)
        item = (np.zeros(size, np.float32), "", plain[0] if plain else "")
        self._batches(lambda items: self._caption(items, {}), (), item)

    def caption(self, content, options):
        """Captions an image.

        Args:
            content: Bytes of an image file.
            options: `options.Options`.

        Returns:
            Dict of `captions`, best first (their `words` are None if the model
            does not tell); `part`, the part of the image that the model sees,
            of `ImagePreprocessing.used_part`; `preview`, a data URL or None.

        Raises:
            RefusedError: The model cannot do that.
            ValueError: An option is wrong.
            image_files.UnusableError: The image cannot be used.
            BusyError: Too many requests wait.
        """
        self._check(self._captions, "captions images", options)
        generation = options.generation
        self._predictor.model.plan_generation(**generation)
        # The same graph serves all seeds, as a sample depends on the key, too.
        key = f"{options.seed} {options.name}"
        return {
            "captions": self._batches(
                lambda items: self._caption(items, generation),
                ("caption", *sorted(generation.items())),
                (self._read(content), key, options.prompt),
            ),
            "part": self._part(content),
            "preview": preview(content) if options.preview else None,
        }

    def rank(self, content, options):
        """Ranks labels for an image.

        Args:
            content: Bytes of an image file.
            options: `options.Options`.

        Returns:
            Dict of `labels`, the best first; `kind` of their scores; `preview`.

        Raises:
            Exception: As `caption`.
        """
        self._check(self._ranks, "ranks labels", options)
        labels = options.labels or None
        if labels is None and not self._classifies:
            raise ValueError("Give at least one label to rank")

        def rank(pixels):
            ranked = self._pretrained.ranker(
                len(pixels),
                None if self._classifies else labels,
                (options.template,),
                options.prompt or None,
            )
            return ranked(np.stack(pixels))

        key = ("rank", labels, options.template, options.prompt)
        scores = self._batches(rank, key, self._read(content))
        kind = self.about()["rank"]["kind"]
        return {
            **_ranking(scores, kind),
            "preview": preview(content) if options.preview else None,
        }

    def close(self):
        """Finishes what is being computed; nothing else is begun."""
        self._batches.close()

    def _check(self, can, what, options):
        predictor = self._predictor
        if not can:
            raise RefusedError(f"This is no model that {what}")
        if self._captions:
            prompting.check(
                predictor.model, predictor.tokenizer, options.prompt
            )
        elif options.prompt:
            raise RefusedError("This model was trained without prompts")

    def _read(self, content):
        """float32 [H, W, 3] of the bytes of an image file."""
        with self._decoding:
            return self._predictor.preprocessing.read_bytes(content)

    def _part(self, content):
        preprocessing = self._predictor.preprocessing
        if preprocessing.resize == "squash":  # Whatever the image's size.
            return preprocessing.used_part(1, 1)
        return preprocessing.used_part(*_shown(content).size[::-1])

    def _caption(self, items, generation):
        """Captions of N (image [H, W, 3], key, prompt), in the one thread."""
        images, keys, prompts = zip(*items)
        decoder = self._pretrained.decoder(len(items), **generation)
        rows = decoder.decode(
            np.stack(images), list(keys), prompts=list(prompts)
        )
        rows = [[row, *row.others] for row in rows]
        return [
            [
                _caption(row, one)
                for row, one in zip(some, self._attention(image, some))
            ]
            for image, some in zip(images, rows)
        ]

    def _attention(self, image, rows):
        """Maps by word of captions of one image; None for each without."""
        if not self._maps:
            return [None] * len(rows)
        predictor = self._predictor
        images = np.repeat(image[None], len(rows), axis=0)
        return attention_maps(
            predictor.model, predictor.tokenizer, images, rows
        )


class ServedAnswers:
    """Answers of a model behind TensorFlow Serving.

    Offers what the signatures of the model give: greedy captions without the
    probabilities of words, and labels.

    Args:
        client: Connected client of `serving_clients`.
        name: What the page calls the model.

    Raises:
        ValueError: If the model has no such signatures.
        serving_clients.NoServerError: If the server does not tell them.
    """

    def __init__(self, client, name):
        self._client, self._name = client, name
        self._inputs = client.signatures()
        self._caption, self._score, self._zero_shot = (
            name if name in self._inputs else None
            for name in ("caption", "score", "zero_shot")
        )
        self._rank = self._score or self._zero_shot
        if not self._caption and not self._rank:
            raise ValueError(
                "The demo needs a model with the signature caption, score or "
                f"zero_shot. Received: {name} with {sorted(self._inputs)}"
            )

    def about(self):
        """What the model can do, as `ModelAnswers.about`."""
        captions = {"samplers": ("greedy",), "words": False, "attention": False}
        kind = _NATS if self._score else _PROBABILITIES
        prompted = any("prompt" in names for names in self._inputs.values())
        return {
            "name": self._name,
            "caption": captions if self._caption else None,
            "rank": {
                "kind": kind,
                "labels": True,
                "template": _template(kind),
            }
            if self._rank
            else None,
            # Which prompts it was trained with, only its errors tell.
            "prompt": {"templates": (), "required": True} if prompted else None,
        }

    def warm_up(self):
        """Does nothing, as a server warms itself up."""

    def close(self):
        """Does nothing, as requests are the server's."""

    def caption(self, content, options):
        """Captions an image, as `ModelAnswers.caption`."""
        if options.generation:
            raise RefusedError("A model on a server captions greedily only")
        row = self._ask(self._caption, "captions images", content, options)
        found = {"words": None, "end": None, "prompt": options.prompt, **row}
        return {
            "captions": [found],
            "part": None,
            "preview": preview(content) if options.preview else None,
        }

    def rank(self, content, options):
        """Ranks labels for an image, as `ModelAnswers.rank`."""
        if not options.labels:
            raise ValueError("Give at least one label to rank")
        by_cosine = not self._score
        # The texts that zero-shot classification takes from the labels.
        texts = zero_shot_prompts.class_prompts(
            options.labels,
            [options.template],
            by_cosine,
            "first" if by_cosine else "whole",
        )
        texts = [one for (one,) in texts]
        row = self._ask(self._rank, "ranks labels", content, options, texts)
        scores = {
            label: row["scores"][text]
            for label, text in zip(options.labels, texts)
        }
        return {
            **_ranking(scores, _PROBABILITIES if by_cosine else _NATS),
            "preview": preview(content) if options.preview else None,
        }

    def _ask(self, signature, what, content, options, texts=()):
        if signature is None:
            raise RefusedError(f"This is no model that {what}")
        prompted = "prompt" in self._inputs[signature]
        if options.prompt and not prompted:
            raise RefusedError("This model was trained without prompts")
        # Rotated and converted, as a SavedModel reads few kinds of images.
        inputs = {"image_bytes": [image_files.check(content)]}
        if texts:
            inputs["texts"] = [list(dict.fromkeys(texts))]
        if prompted:
            inputs["prompt"] = [options.prompt]
        (row,) = serving_clients.ask(
            self._client, signature, inputs, inputs.get("texts", [()])[0]
        )
        if "error" in row:
            raise RefusedError(row["error"])
        return row


def preview(content):
    """An image file as a small JPEG, in a data URL."""
    image = _shown(content).convert("RGB")
    image.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
    return _data_url(image, "JPEG", quality=85)


def _shown(content):
    """The upright image of a file, opened by Pillow."""
    return Image.open(io.BytesIO(image_files.check(content)))


def _caption(row, maps):
    """JSON values of a `CaptionRow`; `maps` are its attention maps or None."""
    heat = [None] * len(row.words) if maps is None else [m for _, m in maps]
    return {
        "caption": row.caption,
        "prompt": row.prompt,
        "log_likelihood": row.log_likelihood,
        "words": [
            {
                "word": word,
                "probability": probability,
                "color": "#{:02x}{:02x}{:02x}".format(
                    *probability_color(probability)
                ),
                "heat": None if one is None else _heat_url(one),
            }
            for (word, probability), one in zip(row.words, heat, strict=True)
        ],
        "end": row.end_probability,
    }


def _heat_url(heat):
    """An attention map as a data URL of a transparent PNG."""
    rows, columns = heat.shape
    scale = _HEAT_PIXELS / max(rows, columns)
    size = (round(columns * scale), round(rows * scale))
    return _data_url(heat_layer(heat, size), "PNG")


def _data_url(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def _ranking(scores, kind):
    """JSON values of a dict from label to score."""
    labels = sorted(scores, key=lambda label: -scores[label])
    values = np.array([scores[label] for label in labels])
    if kind == _NATS:  # As if one of the labels were the caption.
        shares = np.exp(values - values.max())
        shares /= shares.sum()
    else:
        shares = np.clip(values, 0.0, 1.0)
    return {
        "kind": kind,
        "labels": [
            {"label": label, "score": float(score), "share": float(share)}
            for label, score, share in zip(labels, values, shares)
        ],
    }


def _template(kind):
    """The text around a label that fits most models with such scores."""
    return "{}" if kind == _NATS else zero_shot_prompts.DEFAULT_TEMPLATES[0]
