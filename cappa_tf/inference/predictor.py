"""Predictor: a trained model with its vocabulary and preprocessing.

    predictor = Predictor.open("runs/mine")
    predictor.capabilities  # ("features", "generate", "autoregressive", ...)
    predictor.prompts       # ("answer: {question}",), those it was trained with
    predictor.captions(images, ["answer: how many dogs are there"])

Abbreviations for dimensions:
    B: images per batch.                 H, W: image size in pixels.
    T: texts, the same for all images.   K: texts of one image.
    L: length of a text in tokens.       D: width of the features.
    C: width of the embeddings.
"""

import functools
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.huggingface_tokenizer import (
    HuggingFaceTokenizer,
    open_tokenizer,
)
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.inference import prompting
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.inference.text_embeddings import TextEmbeddings
from cappa_tf.models.contrastive import COSINE
from cappa_tf.saving import (
    big_vision,
    clip_jax,
    huggingface_tokenizer,
    preset_folder,
    run_folder,
    siglip,
)
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_choice, check_counts

# Capabilities of a predictor, besides the kinds of scores of its model.
FEATURES = "features"
GENERATE = "generate"
CLASSIFY = "classify"
SCORE = "score"  # of any kind

# Kinds of scores of captioners: left to right, as captions are generated; all
# tokens at once from MASK tokens and the image; left to right without an image,
# which is the likelihood of the text alone; and the first minus the third.
# Contrastive models score by COSINE, the cosine of the embeddings of image and
# text.
AUTOREGRESSIVE = "autoregressive"
PARALLEL = "parallel"
BLIND = "blind"
MINUS_BLIND = "minus_blind"

# Texts of an image scored in one pass; they share no memory.
_TEXTS_PER_PASS = 16
# Lengths are rounded up to a multiple of this, which limits shapes and graphs.
_LENGTH_MULTIPLE = 8
# Number of sets of texts whose graphs are kept, enough for one evaluator.
_GRAPHS = 4


class Predictor:
    """Computes features, captions and scores of images and texts.

    Args:
        model: A built `Task` or `VisionEncoder`.
        tokenizer: The `Tokenizer` it was trained with. None if it reads no
            texts or its vocabulary is missing; such a model has only features.
        preprocessing: The model's `ImagePreprocessing`.
        batch_size: B.
        hosts: The `Hosts` of a run on several hosts, for evaluators that share
            the work; None for a single process.
        name: Name of the model in error messages, by default its class.
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
        """Opens a trained model from any supported source.

        Args:
            path: Folder of a run; a preset (its folder, `hf://user/name` or
                the name of one in this package); `.keras` file of a task or
                of a vision encoder, in a run's folder or elsewhere; an npz
                file of big_vision; or a folder of transformers' SigLIP.
            weights: Weights of a run to load: "final", "best", "latest" or
                "auto", as in `run_folder.load_model`.
            tokenizer: `Tokenizer` of a model without a vocabulary beside it,
                or the path of its vocabulary, for texts as long as the model
                reads. A run has its own, and so has a folder with
                spiece.model.
            batch_size: B.

        Returns:
            A `Predictor`.

        Raises:
            ValueError: If there is no model, it is damaged, a file of the run
                is missing, or the tokenizer does not fit it.
        """
        path = preset_folder.locate(path)
        preprocessing = None
        if path.endswith(".npz"):
            model = _open_npz(path, tokenizer)
        elif clip_jax.is_clip_jax(path):
            model = clip_jax.load_captioner(path)
            if tokenizer is None and files.exists(
                os.path.join(path, HuggingFaceTokenizer.file_name)
            ):
                tokenizer = path
        elif siglip.is_siglip(path):
            model = _open_siglip(path)
            vocabulary = os.path.join(path, huggingface_tokenizer.VOCABULARY)
            if tokenizer is None and files.exists(vocabulary):
                tokenizer = vocabulary
        else:
            model = run_folder.load_model(path, weights)
            folder = path if files.isdir(path) else os.path.dirname(path)
            described = os.path.join(folder, "preprocessing.json")
            is_preset = preset_folder.is_preset(path)
            # An encoder's file may be in any folder, and it reads no texts.
            is_run = hasattr(model, "parts") and files.exists(described)
            if is_preset or is_run:
                own, preprocessing = run_folder.load_preprocessing(folder)
                if tokenizer is not None and own is not None:
                    raise ValueError(
                        "`tokenizer` is for a model without a vocabulary "
                        f"beside it. Received: {path}, which has its own"
                    )
                tokenizer = own
        tokenizer = _fitting(tokenizer, model, path)
        if tokenizer is not None and hasattr(model, "score_kinds"):
            model.tokenizer = tokenizer
        if preprocessing is None:
            preprocessing = ImagePreprocessing(_encoder(model).image_size)
        name = f"{path} ({type(model).__name__})"
        return cls(model, tokenizer, preprocessing, batch_size, name=name)

    # Capabilities.

    @property
    def score_kinds(self):
        """Kinds of text scores; the first is the one to rank texts by."""
        if self.tokenizer is None:
            return ()
        return getattr(self.model, "score_kinds", ())

    @property
    def capabilities(self):
        """Tuple of this model's capabilities, such as "features"."""
        found = []
        if self.encoder is not None:
            found.append(FEATURES)
        if self.tokenizer is not None and getattr(
            self.model, "can_generate", False
        ):
            found.append(GENERATE)
        has_head = getattr(self.model, "num_classes", None) is not None
        if has_head and hasattr(self.model, "probabilities"):
            found.append(CLASSIFY)
        return (*found, *self.score_kinds)

    def can(self, capability):
        """Returns whether this model has a capability, such as "features"."""
        if capability == SCORE:
            return bool(self.score_kinds)
        return capability in self.capabilities

    def require(self, user, *capabilities):
        """Checks that this model has all of some capabilities.

        Args:
            user: Name of the user of them, for the message.
            *capabilities: The capabilities; "score" is a score of any kind.

        Raises:
            ValueError: If one is missing; names the user and the model.
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
        elif self.score_kinds == (COSINE,) and missing != [FEATURES]:
            hint = (
                ": it compares the embeddings of an image and a text, and "
                "predicts no tokens"
            )
        raise ValueError(
            f"{user} needs a model that can: {', '.join(missing)}. Received: "
            f"{self.name}, which can: {', '.join(self.capabilities)}{hint}"
        )

    # Images.

    @property
    def prompts(self):
        """Templates of the prompts that the model was trained with, or ()."""
        return tuple(getattr(self.model, "prompts", ()))

    @property
    def encoder(self):
        """The vision encoder, or None."""
        return _encoder(self.model)

    @property
    def image_size(self):
        """Size (H, W) of the images that the model takes."""
        return self.preprocessing.image_size

    @functools.cached_property
    def decoder(self):
        """A `CaptionDecoder` for batches of B images, greedy."""
        return self.make_decoder()

    def make_decoder(self, **options):
        """Makes a `CaptionDecoder` of this model with other options."""
        self.require("Captioning", GENERATE)
        options = {"batch_size": self.batch_size, **options}
        return CaptionDecoder(self.model, self.tokenizer, **options)

    def captions(self, images, prompts=None):
        """Captions of images, or answers to questions about them, greedy.

        `decoder.decode` gives more: likelihoods, several captions of an image.

        Args:
            images: float [at most B, H, W, 3] in [-1, 1]; None for none (the
                blind decoder), with at most B prompts.
            prompts: A string for each image, such as "caption:"; None for a
                model that was trained without prompts.

        Returns:
            List of strings, one per image.

        Raises:
            ValueError: The model was trained with other prompts, or needs
                some; see `prompting.check`.
        """
        count = len(prompts if images is None else images)
        keys = [str(i) for i in range(count)]
        rows = self.decoder.decode(images, keys, prompts=prompts)
        return [row.caption for row in rows]

    def features(self, images):
        """Pooled features of images.

        Args:
            images: float [any number, H, W, 3] in [-1, 1].

        Returns:
            float32 [images, D]: `pre_logits`, or the mean of `encoded` if the
            encoder does not pool.
        """
        return self._features(tf.convert_to_tensor(images)).numpy()

    @functools.cached_property
    def _features(self):
        # A vision encoder alone is not a task.
        alone = functools.partial(self.encoder, training=False)
        encode = getattr(self.model, "encode_images", alone)
        # AutoGraph has nothing to convert here, but would take long.
        return tf.function(
            lambda images: _pooled(encode(images)),
            reduce_retracing=True,
            autograph=False,
        )

    def class_probabilities(self, images):
        """Probabilities of the classes of a classifier.

        Args:
            images: float [any number, H, W, 3] in [-1, 1].

        Returns:
            float32 [images, C], with C the number of its classes.

        Raises:
            ValueError: The model has no classes.
        """
        self.require("Classifying images", CLASSIFY)
        return self._class_probabilities(tf.convert_to_tensor(images)).numpy()

    @functools.cached_property
    def _class_probabilities(self):
        return tf.function(
            lambda images: self.model.probabilities(
                self.model(images, training=False)["logits"]
            ),
            reduce_retracing=True,
            autograph=False,
        )

    def embed_images(self, images):
        """Normalized embeddings of images, to be compared with texts.

        Args:
            images: float [any number, H, W, 3] in [-1, 1].

        Returns:
            float32 [images, C].

        Raises:
            ValueError: The model has no cosine score.
        """
        self.require("Embedding images", COSINE)
        parts = []
        for start in range(0, len(images), self.batch_size):
            some = images[start : start + self.batch_size]
            found = self._embed_images(tf.constant(self._filled(some)))
            parts.append(found.numpy()[: len(some)])
        return np.concatenate(parts)

    @functools.cached_property
    def _embed_images(self):
        return tf.function(
            lambda images: self.model.embed_images(images), autograph=False
        )

    # Texts.

    def embed_texts(self, texts):
        """Normalized embeddings of texts, to be compared with images.

        An embedding is kept until the weights change.

        Args:
            texts: T strings, at least one.

        Returns:
            float32 [T, C].

        Raises:
            ValueError: The model has no cosine score.
        """
        table, rows = self._text_embeddings.find(texts)
        return table[rows]

    def forget_texts(self):
        """Drops the embeddings of texts that `embed_texts` keeps.

        A text is embedded in a batch with others, so its last bits may depend
        on what was asked for before.
        """
        if self.can(COSINE):
            self._text_embeddings.forget()

    @functools.cached_property
    def _text_embeddings(self):
        self.require("Embedding texts", COSINE)
        return TextEmbeddings(self.model, self.tokenizer, self.batch_size)

    def cosines(self, embeddings, texts):
        """Cosine of each image and each text.

        Args:
            embeddings: float32 [any number, C], from `embed_images`.
            texts: T strings, at least one.

        Returns:
            float64 [images, T]; equal for texts of equal tokens.
        """
        table, rows = self._text_embeddings.find(texts)
        used, places = np.unique(rows, return_inverse=True)
        embeddings = np.asarray(embeddings, np.float64)
        return (embeddings @ table[used].astype(np.float64).T)[:, places]

    def _kind(self, kind):
        """The given kind after validation, by default the first."""
        self.require("A score", SCORE)
        kind = self.score_kinds[0] if kind is None else kind
        check_choice(self.score_kinds, kind=kind)
        return kind

    def tokens(self, texts):
        """Token ids int32 [T, L], with L rounded up to a multiple of 8."""
        return self._cut(np.asarray(self.tokenizer(list(texts)), np.int32))

    def _cut(self, ids):
        longest = int((ids != self.tokenizer.pad_id).sum(-1).max(initial=1))
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        return ids[:, :length]

    def _prompted(self, texts, prompts):
        """Token ids as of `tokens`, after prompts.

        Args:
            texts: T strings.
            prompts: T strings, or None.

        Returns:
            (ids int32 [T, L], lengths of the prompts int32 [T], or None).
        """
        prompts = [""] * len(texts) if prompts is None else prompts
        for prompt in dict.fromkeys(prompts):
            prompting.check(self.model, self.tokenizer, prompt)
        if not any(prompts):
            return self.tokens(texts), None
        ids, lengths = self.tokenizer.with_prompts(list(prompts), list(texts))
        return self._cut(ids.numpy()), lengths.numpy()

    def count_tokens(self, texts):
        """Number of tokens of each text including eos, int64 [T]."""
        return (self.tokens(texts) != self.tokenizer.pad_id).sum(-1)

    def score(self, images, texts, kind=None, prompt=None):
        """Scores of every text for every image.

        Those of a captioner are log-likelihoods in nats, summed over tokens
        including eos; those of a contrastive model are cosines.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: T strings.
            kind: One of `score_kinds`, by default the first.
            prompt: What all texts answer, such as "classify:", for a captioner
                that was trained with prompts.

        Returns:
            float64 [images, T].
        """
        kind = self._kind(kind)
        if kind == COSINE:
            return self.cosines(self.embed_images(images), texts)
        prompts = None if prompt is None else [prompt] * len(texts)
        count, (ids, lengths) = len(images), self._prompted(texts, prompts)
        lengths = _given(prompt_lengths=lengths)
        if kind == BLIND:
            scores = self.model.score_texts(None, ids, kind, **lengths)
            return np.repeat(np.asarray(scores, np.float64), count, axis=0)
        scores = self._compiled(ids, kind, lengths)(self._filled(images))
        return np.asarray(scores, np.float64)[:count]

    def _compiled(self, ids, kind, lengths):
        """Compiled scoring of fixed texts, whose prefixes are in the graph."""
        marks = [value.tobytes() for value in lengths.values()]
        key = (ids.shape, ids.tobytes(), kind, *marks)
        if key not in self._graphs:
            if len(self._graphs) >= _GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = tf.function(
                lambda images: self.model.score_texts(
                    images, ids, kind, **lengths
                ),
                autograph=False,
            )
        return self._graphs[key]

    def blind(self, texts, prompts=None):
        """Scores of texts without any image, float64 [T].

        Args:
            texts: T strings.
            prompts: T strings, what each of them answers, or None.
        """
        kind = self._kind(BLIND)
        ids, lengths = self._prompted(texts, prompts)
        lengths = _given(prompt_lengths=lengths)
        scores = self.model.score_texts(None, ids, kind, **lengths)  # -> [1, T]
        return np.asarray(scores, np.float64)[0]

    def score_captions(self, images, texts, kind=None, prompts=None):
        """Scores of each image's own texts.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: A list of texts, at least one, for each image.
            kind: One of `score_kinds`, by default the first.
            prompts: What the texts answer, for a captioner that was trained
                with prompts: for each image a string, or a list with one for
                each of its texts. None for no prompts.

        Returns:
            A list of float64 [K], one array per image.
        """
        kind = self._kind(kind)
        if len(images) != len(texts) or not all(texts):
            raise ValueError(
                "Each image needs a list of at least one text. Received: "
                f"{len(images)} images, lists of {[*map(len, texts)]} texts"
            )
        if prompts is not None:
            prompts = _parallel(prompts, texts)
        if kind in (BLIND, COSINE):
            # Texts that several images share are scored once.
            flat = [text for some in texts for text in some]
            ends = np.cumsum([len(some) for some in texts])
            if kind == BLIND:
                asked = prompts and [p for some in prompts for p in some]
                return np.split(self.blind(flat, asked), ends[:-1])
            scores = self.cosines(self.embed_images(images), flat)
            return [
                row[end - len(some) : end]
                for row, some, end in zip(scores, texts, ends)
            ]
        images = self._filled(images)
        most = max(map(len, texts))
        parts = []
        for start in range(0, most, _TEXTS_PER_PASS):
            part = slice(start, start + _TEXTS_PER_PASS)
            labels, lengths = self._padded(
                [some[part] for some in texts],
                prompts and [some[part] for some in prompts],
            )
            scores = self.model.score_own_texts(
                images, labels, kind, **_given(prompt_lengths=lengths)
            )
            parts.append(np.asarray(scores, np.float64))
        scores = np.concatenate(parts, axis=1)
        return [row[: len(some)] for row, some in zip(scores, texts)]

    def _padded(self, texts, prompts):
        """Labels int32 [B, K, L] of ragged lists, filled up with padding.

        Also lengths of their prompts int32 [B, K], or None.
        """
        ids, lengths = self._prompted(
            [text for some in texts for text in some],
            prompts and [prompt for some in prompts for prompt in some],
        )
        most = max(map(len, texts))
        shape = (self.batch_size, most, ids.shape[1])
        labels = np.full(shape, self.tokenizer.pad_id, np.int32)
        counts = np.array([len(some) for some in texts])
        filled = np.arange(most) < counts[:, None]
        labels[: len(texts)][filled] = ids
        if lengths is None:
            return labels, None
        by_image = np.zeros(shape[:2], np.int32)
        by_image[: len(texts)][filled] = lengths
        return labels, by_image

    def _filled(self, images):
        """Pads images to B with gray ones, so that one graph suffices."""
        images = np.asarray(images, np.float32)
        missing = self.batch_size - len(images)
        if missing < 0:
            raise ValueError(
                "There must be at most `batch_size` images. "
                f"Received: {len(images)} images, "
                f"batch_size={self.batch_size}"
            )
        return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])


def _given(**options):
    """The options that are not None; not every task knows of prompts."""
    return {name: x for name, x in options.items() if x is not None}


def _parallel(prompts, texts):
    """A prompt for each text: lists of the lengths of the lists `texts`."""
    prompts = [
        [some] * len(own) if isinstance(some, str) else some
        for some, own in zip(prompts, texts)
    ]
    if [*map(len, prompts)] != [*map(len, texts)]:
        raise ValueError(
            "Each image needs a prompt, or one for each of its texts. "
            f"Received: {[*map(len, prompts)]} prompts for "
            f"{[*map(len, texts)]} texts"
        )
    return prompts


def _open_npz(path, tokenizer):
    """A model of big_vision; its vision encoder if texts cannot be read."""
    if tokenizer is None:
        return big_vision.load_vision_encoder(path)
    arrays = big_vision.read_arrays(path)
    if big_vision.is_two_towers(arrays):
        return big_vision.load_two_towers(arrays)
    length = getattr(tokenizer, "max_length", None)
    return big_vision.load_captioner(arrays, max_length=length)


def _open_siglip(path):
    """A model of transformers, with its text tower if it has one."""
    if siglip.has_text(path):
        return siglip.load_siglip(path)
    return siglip.load_siglip_vision(path)


def _fitting(tokenizer, model, path):
    """The tokenizer of a model, made if it is the path of a vocabulary."""
    texts = getattr(model, "text_encoder", getattr(model, "text_decoder", None))
    limit = getattr(texts, "max_length", None)
    if isinstance(tokenizer, str | os.PathLike):
        if limit is None:
            raise ValueError(
                "`tokenizer` is for a model that reads texts. Received: "
                f"{path}, a {type(model).__name__}"
            )
        special = texts.special_tokens
        return open_tokenizer(
            tokenizer, limit, pad_id=special.pad, eos_id=special.eos
        )
    if tokenizer is not None and limit and tokenizer.max_length > limit:
        raise ValueError(
            f"Texts of {path} have at most {limit} tokens. Received: a "
            f"tokenizer with max_length={tokenizer.max_length}"
        )
    return tokenizer


def _encoder(model):
    """The vision encoder of a task, or None; an encoder itself."""
    parts = getattr(model, "parts", None)
    return model if parts is None else parts.get("vision_encoder")


def _pooled(outputs):
    if "pre_logits" in outputs:
        return tf.cast(outputs["pre_logits"], tf.float32)
    return tf.reduce_mean(tf.cast(outputs["encoded"], tf.float32), 1)
