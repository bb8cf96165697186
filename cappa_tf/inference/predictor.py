"""`Predictor`: a trained model in use, with its vocabulary and preprocessing.

    predictor = Predictor.open("runs/mine")
    predictor.capabilities  # ("features", "generate", "autoregressive", ...)

Abbreviations for dimensions:
    B: images that go through at once.   H, W: of the image in pixels.
    T: texts, the same for all images.   K: texts of one image.
    L: length of a text in tokens.       D: width of the features.
"""

import functools
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.saving import big_vision, run_folder
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_choice, check_counts

# What a predictor can do, beside the kinds of scores that its model has.
FEATURES = "features"
GENERATE = "generate"
SCORE = "score"  # of any kind

# Kinds of scores of captioners: left to right as captions are written; all
# tokens at once from MASK tokens and the image; and left to right without any
# image, which is what the model thinks of the text alone.
AUTOREGRESSIVE = "autoregressive"
PARALLEL = "parallel"
BLIND = "blind"
MINUS_BLIND = "minus_blind"

# Texts of an image that are scored at once, each by itself in memory.
_TEXTS_PER_PASS = 16
# Lengths are rounded up to these: few shapes, so few graphs.
_LENGTH_MULTIPLE = 8
# Sets of texts whose graphs are kept: those of one evaluator and a few more.
_GRAPHS = 4


class Predictor:
    """Images and texts to features, captions and scores.

    Args:
        model: A built `Task`, or a `VisionEncoder` alone.
        tokenizer: The `Tokenizer` it was trained with; None where it reads no
            texts, or its vocabulary is not there: such a model only gives
            features.
        preprocessing: The model's `ImagePreprocessing`.
        batch_size: B.
        hosts: The `Hosts` of a run on several, for evaluators that share the
            work; None where there is one process.
        name: What errors call the model: by default its class.
    """

    def __init__(
        self,
        model,
        tokenizer,
        preprocessing,
        batch_size=32,
        hosts=None,
        name=None,
    ):
        check_counts(batch_size=batch_size)
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.hosts = hosts
        self.name = name or type(model).__name__
        self._graphs = {}

    @classmethod
    def open(cls, path, weights="auto", *, tokenizer=None, batch_size=32):
        """Opens a trained model, wherever it comes from.

        Args:
            path: Folder of a run; a `.keras` file in it, or elsewhere, of a
                task or of a vision encoder; or an npz of big_vision.
            weights: Of a run, see `run_folder.load_model`.
            tokenizer: The `Tokenizer` of a model whose vocabulary does not
                lie beside it. That of a run is its own.
            batch_size: B.

        Returns:
            A `Predictor`.

        Raises:
            ValueError: There is no model, it is damaged, or a run lacks a
                file that belongs to it.
        """
        path = os.fspath(path)
        preprocessing = None
        if path.endswith(".npz"):
            model = big_vision.load_vision_encoder(path)
            if tokenizer is not None:
                model = big_vision.load_captioner(
                    path, max_length=tokenizer.max_length
                )
        else:
            model = run_folder.load_model(path, weights)
            folder = path if files.isdir(path) else os.path.dirname(path)
            described = os.path.join(folder, "preprocessing.json")
            # An encoder's file may lie in any folder, and reads no texts.
            if hasattr(model, "parts") and files.exists(described):
                tokenizer, preprocessing = run_folder.load_preprocessing(folder)
        if tokenizer is not None and hasattr(model, "score_kinds"):
            model.tokenizer = tokenizer
        if preprocessing is None:
            preprocessing = ImagePreprocessing(_encoder(model).image_size)
        name = f"{path} ({type(model).__name__})"
        return cls(model, tokenizer, preprocessing, batch_size, name=name)

    # What it can do.

    @property
    def score_kinds(self):
        """Kinds of scores of texts, the one that rankings go by first."""
        if self.tokenizer is None:
            return ()
        return getattr(self.model, "score_kinds", ())

    @property
    def capabilities(self):
        """All that this model can do, a tuple of words."""
        found = []
        if self.encoder is not None:
            found.append(FEATURES)
        if self.tokenizer is not None and getattr(
            self.model, "can_generate", False
        ):
            found.append(GENERATE)
        return (*found, *self.score_kinds)

    def can(self, capability):
        """Whether this model can do something, such as "features"."""
        if capability == SCORE:
            return bool(self.score_kinds)
        return capability in self.capabilities

    def require(self, user, *capabilities):
        """Refuses a model for what it lacks.

        Args:
            user: Who needs them, for the message.
            *capabilities: What is needed; "score" is a score of any kind.

        Raises:
            ValueError: Naming the user and the model.
        """
        missing = [one for one in capabilities if not self.can(one)]
        if not missing:
            return
        hint = ""
        if self.tokenizer is None and missing != [FEATURES]:
            hint = (
                ": it has no tokenizer, as preprocessing.json and "
                "tokenizer.model of a run are not beside it"
            )
        raise ValueError(
            f"{user} needs a model that can: {', '.join(missing)}. Received: "
            f"{self.name}, which can: {', '.join(self.capabilities)}{hint}"
        )

    # Images.

    @property
    def encoder(self):
        """The vision encoder; None where the model has none."""
        return _encoder(self.model)

    @property
    def image_size(self):
        """(H, W) of the images that the model takes."""
        return self.preprocessing.image_size

    @functools.cached_property
    def decoder(self):
        """Captions B images at once, greedily."""
        return self.make_decoder()

    def make_decoder(self, **options):
        """A `CaptionDecoder` of this model with other options."""
        self.require("Captioning", GENERATE)
        options = {"batch_size": self.batch_size, **options}
        return CaptionDecoder(self.model, self.tokenizer, **options)

    def features(self, images):
        """Pooled features of images.

        Args:
            images: float [any number, H, W, 3] in [-1, 1].

        Returns:
            float32 [images, D]: `pre_logits`, or the mean of `encoded` of an
            encoder that does not pool.
        """
        return self._features(tf.convert_to_tensor(images)).numpy()

    @functools.cached_property
    def _features(self):
        # An encoder alone is no task.
        alone = functools.partial(self.encoder, training=False)
        encode = getattr(self.model, "encode_images", alone)
        # AutoGraph would find nothing to convert, and take long over it.
        return tf.function(
            lambda images: _pooled(encode(images)),
            reduce_retracing=True,
            autograph=False,
        )

    # Texts.

    def _kind(self, kind):
        """The kind asked for, by default the first; refuses what is none."""
        self.require("A score", SCORE)
        kind = self.score_kinds[0] if kind is None else kind
        check_choice(self.score_kinds, kind=kind)
        return kind

    def tokens(self, texts):
        """Token ids int32 [T, L], L the longest text rounded up to 8."""
        ids = np.asarray(self.tokenizer(list(texts)), np.int32)
        longest = int((ids != self.tokenizer.pad_id).sum(-1).max(initial=1))
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        return ids[:, :length]

    def count_tokens(self, texts):
        """Tokens of each text, eos counted: int64 [T]."""
        return (self.tokens(texts) != self.tokenizer.pad_id).sum(-1)

    def score(self, images, texts, kind=None):
        """Scores of every text for every image.

        A captioner's are log-likelihoods in nats, summed over tokens, eos
        included.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: T strings.
            kind: One of `score_kinds`, by default the first.

        Returns:
            float64 [images, T].
        """
        kind = self._kind(kind)
        count, ids = len(images), self.tokens(texts)
        if kind == BLIND:
            scores = self.model.score_texts(None, ids, kind)  # -> [1, T]
            return np.repeat(np.asarray(scores, np.float64), count, axis=0)
        scores = self._compiled(ids, kind)(self._filled(images))
        return np.asarray(scores, np.float64)[:count]

    def _compiled(self, ids, kind):
        """Scores of fixed texts: their prefixes are part of the graph."""
        key = (ids.shape, ids.tobytes(), kind)
        if key not in self._graphs:
            if len(self._graphs) >= _GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = tf.function(
                lambda images: self.model.score_texts(images, ids, kind),
                autograph=False,
            )
        return self._graphs[key]

    def blind(self, texts):
        """Scores of texts without any image: float64 [T]."""
        return self.score([None], texts, BLIND)[0]

    def score_captions(self, images, texts, kind=None):
        """Scores of each image's own texts.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: A list of texts, at least one, for each image.
            kind: One of `score_kinds`, by default the first.

        Returns:
            A list of float64 [K], one array an image.
        """
        kind = self._kind(kind)
        if len(images) != len(texts) or not all(texts):
            raise ValueError(
                "Each image needs a list of at least one text. Received: "
                f"{len(images)} images, lists of {[*map(len, texts)]} texts"
            )
        if kind == BLIND:
            flat = self.blind([text for some in texts for text in some])
            ends = np.cumsum([len(some) for some in texts])[:-1]
            return np.split(flat, ends)
        images = self._filled(images)
        most = max(map(len, texts))
        parts = []
        for start in range(0, most, _TEXTS_PER_PASS):
            some = [t[start : start + _TEXTS_PER_PASS] for t in texts]
            scores = self.model.score_own_texts(
                images, self._padded(some), kind
            )
            parts.append(np.asarray(scores, np.float64))
        scores = np.concatenate(parts, axis=1)
        return [row[: len(some)] for row, some in zip(scores, texts)]

    def _padded(self, texts):
        """int32 [B, K, L] of ragged lists; what is missing is padding."""
        ids = self.tokens([text for some in texts for text in some])
        most = max(map(len, texts))
        shape = (self.batch_size, most, ids.shape[1])
        labels = np.full(shape, self.tokenizer.pad_id, np.int32)
        counts = np.array([len(some) for some in texts])
        labels[: len(texts)][np.arange(most) < counts[:, None]] = ids
        return labels

    def _filled(self, images):
        """The images, followed by grey ones up to B: one shape, one graph."""
        images = np.asarray(images, np.float32)
        missing = self.batch_size - len(images)
        if missing < 0:
            raise ValueError(
                "No more images than `batch_size` go through at once. "
                f"Received: {len(images)} images, "
                f"batch_size={self.batch_size}"
            )
        return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _encoder(model):
    """The vision encoder of a task, or the encoder itself; None for none."""
    parts = getattr(model, "parts", None)
    return model if parts is None else parts.get("vision_encoder")


def _pooled(outputs):
    if "pre_logits" in outputs:
        return tf.cast(outputs["pre_logits"], tf.float32)
    return tf.reduce_mean(tf.cast(outputs["encoded"], tf.float32), 1)
