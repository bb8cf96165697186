"""Annotator: captions, scores or embeddings of records, a batch at a time.

Abbreviations for dimensions:
    B: images per batch.      H, W: image size in pixels.
    T: texts of `labels`.     D: width of an embedding.
"""

import base64
import dataclasses
import hashlib
import json

import keras
import numpy as np

from cappa_tf.data import prompts as prompts_lib
from cappa_tf.data import schema
from cappa_tf.data.images import image_files
from cappa_tf.data.stream import decoding, shuffling
from cappa_tf.inference import prompting, samplers
from cappa_tf.inference.predictor import COSINE, FEATURES, GENERATE, SCORE
from cappa_tf.saving import weights
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_bool, check_choice, check_counts

# A PNG file of one pixel.
_SMALLEST = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB5Sfe/AAA"
    "AABJRU5ErkJggg=="
)
WRITE = ("captions", "scores", "embeddings")
FORMATS = ("tfrecord", "parquet")


@dataclasses.dataclass(frozen=True)
class AnnotationOptions:
    """What to write about each image.

    Attributes:
        write: "captions", "scores" of texts, or "embeddings".
        file_format: "tfrecord": the records of `schema.py` with their images
            and what is written; or "parquet": a row for each record, without
            its image.
        batch_size: B. It is among the options as the last bits of a result
            may depend on it.
        keep_captions: Whether the captions of the records remain, before the
            new ones, in place of being replaced.
        prompt: What captions and scored texts answer, for a model that was
            trained with prompts; for scores with `{question}` in place of the
            question of the record.
        generation: Dict of the options of `captioner.generate`, with "sampler"
            a dict of arguments of `samplers.make_sampler`.
        labels: Texts to score for each image; None for the record's captions.
        kind: Kind of scores, by default the model's first; or of embeddings:
            "features" (the default) or "cosine".
    """

    write: str = "captions"
    file_format: str = "tfrecord"
    batch_size: int = 32
    keep_captions: bool = False
    prompt: str | None = None
    generation: dict = dataclasses.field(default_factory=dict)
    labels: tuple | list | None = None
    kind: str | None = None

    def __post_init__(self):
        check_choice(WRITE, write=self.write)
        check_choice(FORMATS, file_format=self.file_format)
        check_counts(batch_size=self.batch_size)
        check_bool(keep_captions=self.keep_captions)
        texts = self.labels
        if texts is not None and not (
            texts and all(isinstance(t, str) and t.strip() for t in texts)
        ):
            raise ValueError(
                "`labels` must be texts that are not empty. Received: "
                f"labels={texts!r}"
            )
        for name, write in (
            ("keep_captions", "captions"),
            ("generation", "captions"),
            ("labels", "scores"),
        ):
            if getattr(self, name) and self.write != write:
                raise ValueError(
                    f"`{name}` is for write={write!r}. Received: "
                    f"write={self.write!r}"
                )
        for name, write in (("kind", "captions"), ("prompt", "embeddings")):
            if getattr(self, name) is not None and self.write == write:
                raise ValueError(
                    f"`{name}` is not for write={write!r}. Received: "
                    f"{name}={getattr(self, name)!r}"
                )


@dataclasses.dataclass
class Annotation:
    """What is written about one record.

    Attributes:
        key: Key of the record; its split and number if it has none.
        example: The `schema.Example` to write, or None for a bad record.
        values: What is written beside it, by name: lists of floats, or a text.
        error: The reason why there is nothing to write, or None.
        name: Name of a bad record in the log.
    """

    key: str
    example: schema.Example | None
    values: dict
    error: str | None = None
    name: str = ""


class Annotator:
    """Annotates batches of records with one model.

    Args:
        predictor: A `Predictor`, whose batch size becomes that of the options.
        options: `AnnotationOptions`.

    Raises:
        ValueError: The model lacks what the options need.
    """

    def __init__(self, predictor, options):
        self._predictor, self._options = predictor, options
        predictor.batch_size = options.batch_size
        self.kind, self._decoder = options.kind, None
        if options.write == "captions":
            self._prepare_captions()
        elif options.write == "scores":
            predictor.require("Scoring", SCORE)
            self.kind = options.kind or predictor.score_kinds[0]
            check_choice(predictor.score_kinds, kind=self.kind)
            if options.prompt is not None:
                prompts_lib.check_template(options.prompt)
            if options.labels is not None or not predictor.prompts:
                self._check_prompt(options.prompt)
        else:
            self.kind = options.kind or FEATURES
            check_choice((FEATURES, COSINE), kind=self.kind)
            predictor.require("Embedding", self.kind)
        self.key = model_key(predictor)
        # Its graph is traced here, once, and not by each of the threads.
        predictor.preprocessing.read_bytes(_SMALLEST)

    def _prepare_captions(self):
        generation = dict(self._options.generation)
        self._predictor.require("Captioning", GENERATE)
        if "sampler" in generation:
            generation["sampler"] = samplers.make_sampler(
                **generation["sampler"]
            )
        plan = {name: x for name, x in generation.items() if name != "seed"}
        self._predictor.model.plan_generation(**plan)
        self._check_prompt(self._options.prompt)
        self._decoder = self._predictor.make_decoder(
            prompt=self._options.prompt, **generation
        )

    def _check_prompt(self, prompt):
        model, tokenizer = self._predictor.model, self._predictor.tokenizer
        prompting.check(model, tokenizer, prompt)

    def check(self, records):
        """Checks that the model can read the texts of records.

        Args:
            records: `base.Records`.

        Raises:
            ValueError: It cannot.
        """
        options = self._options
        if options.write != "scores" or options.labels is not None:
            return
        records.check_captions()
        prompts_lib.check_questions(options.prompt, records)
        if records.has_prompts and not self._predictor.prompts:
            raise ValueError(
                f"The captions of {records.name} answer questions, and the "
                "model was trained without prompts. Received: "
                f"{self._predictor.name}"
            )

    # Reading.

    def read(self, records, serialized, key):
        """Reads a record and its image; may be called by several threads.

        Args:
            records: The `base.Records` that parse it.
            serialized: The record, bytes.
            key: Key of a record that has none.

        Returns:
            (`Annotation` without values, image float32 [H, W, 3] or None).
        """
        example = None
        try:
            if serialized.startswith(shuffling.LOST):
                raise ValueError("lost record")
            example = records.deserialize(serialized)
            example.key = example.key or key
            image = self._predictor.preprocessing.read_bytes(
                example.image, min_side=records.min_side
            )
        except ValueError as error:
            if example is not None:
                key = example.key
            if isinstance(error, image_files.UnusableError):
                key = error.name or key
                return Annotation(key, None, {}, error.reason, key), None
            reason, name = decoding.RecordDecoder(
                self._predictor.preprocessing, 0, None, records=records
            ).diagnose(serialized)
            return Annotation(key, None, {}, reason, f"{key}: {name}"), None
        return Annotation(example.key, example, {}), image

    # Annotation.

    def annotate(self, batch):
        """Annotates up to B records in place.

        Args:
            batch: List of what `read` returned. A record keeps its place in
                the batch whichever others are bad.
        """
        if all(image is None for _, image in batch):
            return
        images = np.zeros(
            (len(batch), *self._predictor.image_size, 3), np.float32
        )
        for place, (_, image) in zip(images, batch):
            if image is not None:
                place[:] = image
        annotations = [one for one, _ in batch]
        if self._options.write == "captions":
            self._caption(annotations, images)
        elif self._options.write == "embeddings":
            self._embed(annotations, images)
        elif self._options.labels is not None:
            self._score_labels(annotations, images)
        else:
            self._score_captions(annotations, images)

    def _caption(self, annotations, images):
        keys = [one.key for one in annotations]
        rows = self._decoder.decode(images, keys)
        for one, row in zip(annotations, rows):
            if one.example is None:
                continue
            ranked = [
                (x.caption.strip(), x.log_likelihood)
                for x in (row, *row.others)
                if x.caption.strip()
            ]
            if not ranked:
                _refuse(one, "empty caption")
                continue
            captions, likelihoods = map(list, zip(*ranked))
            old = one.example if self._options.keep_captions else None
            one.example = _with_captions(one.example, captions, old)
            known = [np.nan] * (len(one.example.captions) - len(captions))
            one.values["log_likelihoods"] = [*known, *likelihoods]

    def _embed(self, annotations, images):
        if self.kind == COSINE:
            found = self._predictor.embed_images(images)
        else:
            # Of one shape, as another may have other last bits.
            missing = self._options.batch_size - len(images)
            padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
            found = self._predictor.features(padded)
        for one, embedding in zip(annotations, found):
            if one.example is not None:
                one.values["embedding"] = embedding.tolist()

    def _score_labels(self, annotations, images):
        labels = list(self._options.labels)
        scores = self._predictor.score(
            images, labels, self.kind, self._options.prompt
        )
        for one, row in zip(annotations, scores):
            if one.example is not None:
                one.values["scores"] = row.tolist()
                one.values["best"] = labels[int(row.argmax())]

    def _score_captions(self, annotations, images):
        texts, prompts, places = [], [], []
        for one in annotations:
            asked = self._texts(one)
            # A batch has a text for each image, also for the bad ones.
            kept = [i for i, (text, _) in enumerate(asked) if text] or [-1]
            asked = asked or [("", self._any_prompt)]
            places.append(kept)
            texts.append([asked[i][0] for i in kept])
            prompts.append([asked[i][1] for i in kept])
        prompts = prompts if self._predictor.prompts else None
        if self.kind == COSINE:
            # In a batch with those of these images only.
            self._predictor.forget_texts()
        found = self._predictor.score_captions(
            images, texts, self.kind, prompts
        )
        for one, kept, row in zip(annotations, places, found):
            if one.example is not None:
                scores = np.full(len(one.example.captions), np.nan)
                scores[kept] = row
                one.values["scores"] = scores.tolist()

    def _texts(self, one):
        """(Caption, prompt) of each caption of a record; refuses one of none.

        A caption that cannot be scored is "".
        """
        if one.example is None:
            return []
        captions = [caption.strip() for caption in one.example.captions]
        if not self._predictor.prompts:
            asked = [(caption, "") for caption in captions]
        else:
            filled = prompts_lib.fill_in_example(
                self._options.prompt, one.example
            )
            asked = [
                (caption.strip() if self._answers(prompt) else "", prompt)
                for caption, prompt in zip(filled.captions, filled.prompts)
            ]
        if not any(captions):
            _refuse(one, "no caption")
        elif not any(caption for caption, _ in asked):
            _refuse(one, "no prompt that the model answers")
        return asked if one.example is not None else []

    def _answers(self, prompt):
        try:
            self._check_prompt(prompt)
        except ValueError:
            return False
        return True

    @property
    def _any_prompt(self):
        """A prompt that the model takes, for places without an image."""
        return next(
            (p.replace(prompts_lib.QUESTION, "x") for p in self._prompts), ""
        )

    @property
    def _prompts(self):
        return self._predictor.prompts


def _refuse(one, reason):
    one.example, one.error, one.name = None, reason, one.key


def _with_captions(example, captions, old=None):
    """The example with other captions, which answer no prompt.

    Args:
        example: `schema.Example`.
        captions: The captions.
        old: The example whose captions, and what they answer, remain before
            them; None for none.
    """
    parallel = {}
    for name in ("prompts", "question_types"):
        kept = old and getattr(old, name)
        parallel[name] = kept and [*kept, *[""] * len(captions)]
    before = [] if old is None else old.captions
    return dataclasses.replace(
        example, captions=[*before, *captions], **parallel
    )


def model_key(predictor):
    """All of a model that its results depend on: a JSON object.

    Args:
        predictor: The `Predictor`.
    """
    model, tokenizer = predictor.model, predictor.tokenizer
    config = json.loads(
        json.dumps(
            model.get_config(), default=keras.saving.serialize_keras_object
        )
    )
    config = json.dumps(_without_names(config), sort_keys=True)
    # By number, as names differ if a model is opened twice in a process.
    values = {f"{i:06d}": weight for i, weight in enumerate(model.weights)}
    texts = None
    if tokenizer is not None:
        texts = {name: getattr(tokenizer, name) for name in tokenizer.settings}
        texts["vocabulary"] = files.sha256(tokenizer.path)
    return {
        "weights": weights.digest(values),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "tokenizer": texts,
        "preprocessing": predictor.preprocessing.to_json(),
    }


def _without_names(config):
    """A Keras config without the names of layers, which Keras may number."""
    if isinstance(config, list):
        return [_without_names(value) for value in config]
    if not isinstance(config, dict):
        return config
    left_out = {"name"} if "trainable" in config else set()
    return {
        name: _without_names(value)
        for name, value in config.items()
        if name not in left_out
    }
