"""A trained model in strings: captions, scores, labels, embeddings of images.

    model = cappa_tf.from_preset("scenes_mini")   # comes with the package
    model = cappa_tf.from_preset("runs/mine")     # or hf://user/name, a folder
    model.caption(["photo.jpg", pillow_image])    # ["a dog on a beach", None]
    model.save_to_preset("preset", license="apache-2.0")
    model.push_to_hub("user/name")

Abbreviations for dimensions:
    N: images.  T: texts.  C: classes.  D: width of the features.
"""

import collections
import os
import tempfile
import warnings

import numpy as np
from PIL import Image

from cappa_tf.data.images.image_files import UnusableError
from cappa_tf.evaluation.prompts import DEFAULT_TEMPLATES
from cappa_tf.evaluation.zero_shot import class_scorer
from cappa_tf.inference.predictor import (
    CLASSIFY,
    COSINE,
    FEATURES,
    GENERATE,
    SCORE,
    Predictor,
)
from cappa_tf.saving import hub, preset_folder, run_folder
from cappa_tf.utils.arguments import check_choice

# Batches of few images are filled up to one of these sizes, or to `batch_size`:
# a graph for each size that occurs would take seconds each.
_SIZES = (1, 8)
# Number of compiled ways to caption, or to rank labels, that are kept.
_KEPT = 4


class BadImageWarning(UserWarning):
    """Some images of a call could not be used.

    Attributes:
        reasons: Dict from the number of an image in the call to the reason.
    """

    def __init__(self, message, reasons):
        super().__init__(message)
        self.reasons = reasons


def from_preset(path, weights="auto", *, tokenizer=None, batch_size=32):
    """Opens a trained model.

    Args:
        path: Name of a preset in this package ("scenes_mini"),
            `hf://user/name` (also `hf://user/name@revision`), the folder of a
            preset or of a run, or any other path that `Predictor.open` opens.
        weights: Weights of a run, as in `Predictor.open`.
        tokenizer: As in `Predictor.open`.
        batch_size: Images per batch.

    Returns:
        A `Pretrained`.

    Raises:
        ValueError: If there is no such model, a file of it is missing, damaged
            or of a newer version, or the Hub cannot be reached.
    """
    path = preset_folder.locate(path)
    predictor = Predictor.open(
        path, weights, tokenizer=tokenizer, batch_size=batch_size
    )
    return Pretrained(predictor, run_folder.training_facts(path))


class Pretrained:
    """A trained model that takes images and texts as they are.

    An image is the path of a file (local or in a bucket), the bytes of one, a
    Pillow image, or a uint8 array [h, w, 3] ([h, w] and [h, w, 4], too). Files
    are decoded as in training: EXIF orientation, transparency on white, the
    first frame of an animation (of a Pillow image the current one).

    An image that cannot be used does not stop a call: its result is None (NaN
    in an array), and one `BadImageWarning` names all such images with their
    reasons.

    Args:
        predictor: The model's `Predictor`.
        facts: Dict of `model_card.run_facts`, for the model card.
    """

    def __init__(self, predictor, facts=None):
        self.predictor = predictor
        self.facts = dict(facts or {})
        self._sized = {predictor.batch_size: predictor}
        self._compiled = collections.OrderedDict()

    @property
    def model(self):
        """The Keras model."""
        return self.predictor.model

    def __repr__(self):
        can = ", ".join(self.predictor.capabilities)
        return f"<Pretrained {self.predictor.name}: {can}>"

    # -- Images in -------------------------------------------------------------

    def caption(self, images, prompt=None, **generation):
        """Captions images.

        Args:
            images: List of N images.
            prompt: What the captions answer, for a model that was trained with
                prompts: a string, or N of them.
            **generation: Options of `Captioner.generate` such as
                `sampler=BeamSearch(4)`, `prefix`, `min_length`, `max_length`
                or `no_repeat_ngram`; greedy by default.

        Returns:
            List of N strings, the best caption of each image, or None.

        Raises:
            ValueError: If the model does not caption, or an option is wrong.
        """
        self.predictor.require("Captioning", GENERATE)
        images = _as_list(images)
        prompts = [prompt] * len(images)
        if prompt is not None and not isinstance(prompt, str):
            prompts = list(prompt)
            if len(prompts) != len(images):
                raise ValueError(
                    "`prompt` must be a string, or one for each image. "
                    f"Received: {len(prompts)} for {len(images)} images"
                )
        predictor = self._of_size(len(images))
        decoder = self.decoder(len(images), **generation)

        def decode(pixels, numbers):
            rows = decoder.decode(
                pixels,
                [_name(images[i], i) for i in numbers],
                prompts=None
                if prompt is None
                else [prompts[i] for i in numbers],
            )
            return [row.caption for row in rows]

        return self._each(images, predictor, decode)

    def score(self, images, texts, kind=None, prompt=None):
        """Scores texts for images: log-likelihoods in nats, or cosines.

        Args:
            images: List of N images.
            texts: T strings, which are scored for every image.
            kind: One of `predictor.score_kinds`, by default the first.
            prompt: What all texts answer, for a model that was trained with
                prompts.

        Returns:
            float64 [N, T]; NaN for an image that cannot be used.

        Raises:
            ValueError: If the model does not score texts, or there is none.
        """
        self.predictor.require("Scoring texts", SCORE)
        images, texts = _as_list(images), _as_texts("texts", texts)
        predictor = self._of_size(len(images))
        rows = self._each(
            images,
            predictor,
            lambda pixels, _: predictor.score(pixels, texts, kind, prompt),
        )
        return _stacked(rows, len(texts), np.float64)

    def classify(
        self, images, labels=None, templates=DEFAULT_TEMPLATES, prompt=None
    ):
        """Ranks labels for each image.

        A classifier ranks the classes of its head by their probability; any
        other model ranks `labels` by its best score, as in zero-shot
        classification (`evaluation.zero_shot`): log-likelihood in nats or
        cosine of a label in its templates.

        Args:
            images: List of N images.
            labels: C strings. For a classifier the names of all its classes by
                number; None for those of its data set, else the numbers.
            templates: Texts with {} in place of the label, or the name of a
                set of them, see `evaluation.prompts`. Not for a classifier.
            prompt: What the labels answer, such as "classify:" with the
                template "{}", for a model that was trained with prompts.

        Returns:
            List of N dicts from label to score, the best first, or None.

        Raises:
            ValueError: If the model neither has classes nor scores texts, or
                the labels do not fit.
        """
        images = _as_list(images)
        ranked = self.ranker(len(images), labels, templates, prompt)
        return self._each(
            images, self._of_size(len(images)), lambda pixels, _: ranked(pixels)
        )

    def decoder(self, count, **generation):
        """What `caption` captions batches of preprocessed images with.

        Args:
            count: Number of images. Batches have as many, or the model's batch
                size if that is less.
            **generation: As of `caption`.

        Returns:
            A `CaptionDecoder`, the same one for calls with equal arguments.
        """
        predictor = self._of_size(count)
        key = (predictor.batch_size, *sorted(generation.items()))
        return self._keep(key, lambda: predictor.make_decoder(**generation))

    def ranker(
        self, count, labels=None, templates=DEFAULT_TEMPLATES, prompt=None
    ):
        """What `classify` ranks labels for batches of preprocessed images with.

        Args:
            count: As of `decoder`.
            labels: As of `classify`, like the rest.
            templates: Texts around a label.
            prompt: What the labels answer.

        Returns:
            A function from float32 [at most B, H, W, 3] in [-1, 1] to a list of
            dicts from label to score, the best first.
        """
        predictor = self._of_size(count)
        if predictor.can(CLASSIFY):
            labels = self._class_names(labels)
            scores = predictor.class_probabilities
        else:
            labels = _as_texts("labels", labels)
            templates = (
                templates if isinstance(templates, str) else tuple(templates)
            )
            key = (predictor.batch_size, labels, templates, prompt)
            scores = self._keep(
                key,
                lambda: class_scorer(
                    predictor, labels, templates, question=prompt
                ),
            )

        def ranked(images):
            found = []
            for row in np.asarray(scores(images), np.float64):
                order = np.argsort(-row, kind="stable")
                found.append({labels[i]: float(row[i]) for i in order})
            return found

        return ranked

    def embed(self, images, kind=FEATURES):
        """Embeds images as vectors.

        Args:
            images: List of N images.
            kind: "features", the pooled features of the vision encoder, for
                any model; or "cosine", normalized embeddings to be compared
                with `embed_texts`, of a contrastive model.

        Returns:
            float32 [N, D]; NaN for an image that cannot be used.

        Raises:
            ValueError: If the model has no such embeddings.
        """
        check_choice((FEATURES, COSINE), kind=kind)
        self.predictor.require("Embedding images", kind)
        images = _as_list(images)
        predictor = self._of_size(len(images))
        function = {
            FEATURES: predictor.features,
            COSINE: predictor.embed_images,
        }[kind]
        rows = self._each(images, predictor, lambda pixels, _: function(pixels))
        return _stacked(rows, self._width(kind), np.float32)

    def embed_texts(self, texts):
        """Normalized embeddings float32 [T, D] of texts, contrastive only."""
        return self.predictor.embed_texts(list(_as_texts("texts", texts)))

    def _width(self, kind):
        """Width of embeddings, None if only the model's output tells it."""
        names = {FEATURES: "hidden_dim", COSINE: "embedding_dim"}
        of = self.predictor.encoder if kind == FEATURES else self.model
        width = getattr(of, names[kind], None)
        return width if isinstance(width, int) else None

    def _class_names(self, labels):
        count = self.model.num_classes
        if labels is None:
            labels = self.facts.get("classes") or map(str, range(count))
        labels = _as_texts("labels", labels)
        if len(labels) != count:
            raise ValueError(
                f"`labels` of a classifier must be the names of its {count} "
                f"classes, each another one. Received: {list(labels)}"
            )
        return labels

    def _each(self, images, predictor, function):
        """Results of a function of batches, one an image; None for a bad one.

        Args:
            images: List of images.
            predictor: The `Predictor` of the batch size.
            function: Function of (float32 [at most B, H, W, 3], their numbers)
                that returns one result for each.
        """
        results, reasons = [None] * len(images), {}
        size = predictor.batch_size
        for start in range(0, len(images), size):
            good = {}
            for i in range(start, min(start + size, len(images))):
                try:
                    good[i] = _read(predictor.preprocessing, images[i], i)
                except UnusableError as error:
                    reasons[i] = error.reason
            if good:
                found = function(np.stack([*good.values()]), [*good])
                for i, result in zip(good, found):
                    results[i] = result
        if reasons:
            some = "; ".join(
                f"{_name(images[i], i)}: {reason}"
                for i, reason in reasons.items()
            )
            message = f"{len(reasons)} of {len(images)} images cannot be used: "
            warning = BadImageWarning(message + some, reasons)
            warnings.warn(warning, stacklevel=3)
        return results

    def _of_size(self, count):
        """The predictor for a number of images."""
        largest = self.predictor.batch_size
        size = min([n for n in _SIZES if count <= n] + [largest])
        if size not in self._sized:
            one = self.predictor
            self._sized[size] = Predictor(
                one.model,
                one.tokenizer,
                one.preprocessing,
                size,
                name=one.name,
            )
        return self._sized[size]

    def _keep(self, key, make):
        """What `make` returns, kept for calls with equal arguments."""
        try:
            hash(key)
        except TypeError:  # Such as a prefix given as a list of ids.
            return make()
        if key not in self._compiled:
            self._compiled[key] = make()
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    # -- Models out ------------------------------------------------------------

    def save_to_preset(self, folder, **options):
        """Writes a preset, the whole folder or nothing.

        `saving.preset_folder` describes its files, which are those of
        KerasHub. The model card (README.md) tells what is known of the run:
        data, steps, figures.

        Args:
            folder: Folder to write; it must not exist.
            **options: `license` (identifier, such as "apache-2.0"), `dtype`
                ("float16" halves the files), `max_shard_size` (GB),
                `overwrite` (an existing preset), as of `preset_folder.save`.

        Raises:
            ValueError: If the folder exists, or the model cannot be written.
        """
        save_preset(self.predictor, folder, facts=self.facts, **options)

    def push_to_hub(
        self, name, *, private=None, token=None, message=None, **options
    ):
        """Writes a preset and uploads it to the Hugging Face Hub.

        Needs the extra `hub`.

        Args:
            name: `user/name` of the repository, which is created if missing.
            private: Whether a new repository is private.
            token: Access token; None for that of `hf auth login` or HF_TOKEN.
            message: Commit message.
            **options: As of `save_to_preset`.

        Returns:
            URL of the commit.

        Raises:
            ValueError: If there is no token or it is refused, or the Hub
                cannot be reached.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = os.path.join(scratch, "preset")
            self.save_to_preset(folder, **options)
            return hub.upload(
                folder, name, private=private, token=token, message=message
            )


def save_preset(predictor, folder, **options):
    """Writes the model of a `Predictor` as a preset.

    Args:
        predictor: A `Predictor`.
        folder: Folder to write.
        **options: As of `preset_folder.save`.
    """
    tokenizer = predictor.tokenizer
    if tokenizer is not None:
        arguments = run_folder.caption_arguments(tokenizer)
        tokenizer = (arguments, tokenizer.path)
    image = predictor.preprocessing.to_json()
    preset_folder.save(folder, predictor.model, image, tokenizer, **options)


def _as_list(images):
    """The images of a call; a single one would be taken apart."""
    is_array = isinstance(images, np.ndarray)
    if isinstance(images, str | os.PathLike | bytes | Image.Image) or (
        is_array and images.ndim != 4
    ):
        raise ValueError(
            "`images` must be a list of images, also if there is one. "
            f"Received: a single {type(images).__name__}"
        )
    return list(images)


def _as_texts(name, texts):
    """A tuple of different, non-empty strings."""
    texts = () if texts is None or isinstance(texts, str) else tuple(texts)
    if (
        not texts
        or not all(isinstance(text, str) and text for text in texts)
        or len({*texts}) < len(texts)
    ):
        raise ValueError(
            f"`{name}` must be a list of different strings. Received: "
            f"{name}={list(texts)!r}"
        )
    return texts


def _read(preprocessing, image, number):
    if isinstance(image, str | os.PathLike):
        return preprocessing.read(image)
    if isinstance(image, bytes):
        return preprocessing.read_bytes(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(
                "An array must be a uint8 image [h, w, 3]. Received: "
                f"{image.dtype} {image.shape} as image {number}"
            )
        if 0 in image.shape or image.shape[2:] not in ((), (1,), (3,), (4,)):
            raise UnusableError(f"array of shape {image.shape}")
        image = Image.fromarray(
            image[..., 0] if image.shape[2:] == (1,) else image
        )
    if isinstance(image, Image.Image):
        return preprocessing.read_pillow(image)
    raise ValueError(
        "An image must be a path, bytes, a Pillow image or a uint8 array. "
        f"Received: a {type(image).__name__} as image {number}"
    )


def _name(image, number):
    """Name of an image in messages; its random numbers depend on it, too."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return f"image {number}"


def _stacked(rows, width, dtype):
    """Rows as an array [N, width], NaN for None."""
    for row in rows:
        if row is not None:
            width = len(row)
    missing = np.full(width or 0, np.nan)
    rows = [missing if row is None else row for row in rows]
    return np.array(rows, dtype).reshape(len(rows), width or 0)
