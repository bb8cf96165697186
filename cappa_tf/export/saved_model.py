"""Captioners and contrastive models as a SavedModel for TensorFlow Serving.

Everything is in the graph: decoding of image files, tokenizer, the model. A
server that loads it needs TensorFlow and TensorFlow Text's ops, which
`tensorflow_model_server` includes, and nothing of this project.

Abbreviations for dimensions:
    B: images of a request (or of several that a server has batched).
    T: texts to score for each image.
    H, W: height and width the model takes.
    L: length of a text in tokens.  P: patches.  D: width.
    C: width of the embeddings.  U: different texts of a request.
"""

import dataclasses
import os
import re

import tensorflow as tf

from cappa_tf.data import prompts
from cappa_tf.data.huggingface_tokenizer import HuggingFaceTokenizer
from cappa_tf.data.images import decode_resize
from cappa_tf.export import request_images, serving_files
from cappa_tf.models import likelihood
from cappa_tf.models.losses import cross_entropy
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_integer

# Texts in one pass: of each image in `score`, of all images in `zero_shot`.
TEXTS_PER_PASS = 64
# Maximum size of an image, if the run has no limit of its own.
MAX_PIXELS = 64_000_000
_GRAPH = "saved_model.pb"

IMAGE_BYTES = tf.TensorSpec([None], tf.string, "image_bytes")
TEXTS = tf.TensorSpec([None, None], tf.string, "texts")
PROMPT = tf.TensorSpec([None], tf.string, "prompt")
NOT_UTF8 = "texts: a text is not UTF-8"


class Service:
    """What the services of all models share.

    Attributes:
        kind: What the model is, and its name on a server by default.

    Args:
        model: A built `Task` with a vision encoder.
        tokenizer: The `Tokenizer` it was trained with.
        preprocessing: Its `ImagePreprocessing`.
        max_batch_size: Maximum number of images in a request.
        max_texts: Maximum number of texts per image.
        max_pixels: Images with more pixels are refused by their header; by
            default the limit of the run, or 64 million if it has none.
    """

    def __init__(
        self,
        model,
        tokenizer,
        preprocessing,
        *,
        max_batch_size=32,
        max_texts=1_000,
        max_pixels=None,
    ):
        if max_pixels is None:
            max_pixels = preprocessing.max_pixels or MAX_PIXELS
        self.max_batch_size = check_integer("max_batch_size", max_batch_size, 1)
        self.max_texts = check_integer("max_texts", max_texts, 1)
        self._preprocessing = dataclasses.replace(
            preprocessing, max_pixels=check_integer("max_pixels", max_pixels, 1)
        )
        self._model = model
        if isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError(
                "A SavedModel reads texts in its graph, which needs a "
                "SentencePiece vocabulary. The encoder alone can be exported. "
                f"Received: the tokenizer {tokenizer.path}"
            )
        self._tokenizer = tokenizer

    @property
    def image_size(self):
        """Size (H, W) of the images that the model takes."""
        return self._preprocessing.image_size

    @property
    def num_bytes(self):
        """Size of the weights in bytes."""
        return sum(v.shape.num_elements() * v.dtype.size for v in self.weights)

    @property
    def weights(self):
        """The TensorFlow variables of the parts of the model."""
        return [
            variable.value
            for part in self._model.parts.values()
            for variable in part.variables
        ]

    def resources(self):
        """Module of the objects that a SavedModel of the functions must hold.

        These are the variables without the Keras objects around them, and the
        vocabulary, which is tracked only if it is an attribute.
        """
        module = tf.Module(name="model")
        module.vocabulary = self._tokenizer.load()
        module.weights = self.weights
        return module

    def signatures(self):
        """Dict of the functions to export, by the name of the signature.

        A subclass defines `functions`, a dict from name to (method, inputs),
        of which the first is the default.
        """
        functions = {
            name: tf.function(method, input_signature=inputs, autograph=False)
            for name, (method, inputs) in self.functions().items()
        }
        default = tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
        return {default: next(iter(functions.values())), **functions}

    def _decode(self, image_bytes):
        """Images float32 [B, H, W, 3] in [-1, 1], and errors [B]."""
        most = self.max_batch_size
        image_bytes = _checked(
            image_bytes,
            1,
            lambda shape: (shape[0] >= 1) & (shape[0] <= most),
            f"image_bytes must be a list of 1 to {most} images.",
        )
        pixels, error = request_images.decode_request(
            image_bytes, self._preprocessing
        )
        return decode_resize.to_model_range(pixels), error

    def _spread(self, texts, count):
        """Checks texts, [B, T] or [1, T], and returns them as [B, T]."""
        most = self.max_texts
        texts = _checked(
            texts,
            2,
            lambda shape: (
                ((shape[0] == 1) | (shape[0] == count))
                & (shape[1] >= 1)
                & (shape[1] <= most)
            ),
            f"texts must be [images, or 1 for all, 1 to {most} texts].",
        )
        return tf.broadcast_to(texts, [count, tf.shape(texts)[1]])

    @staticmethod
    def _flag_texts(texts, error):
        """Errors [B] with those of texts [B, T] that are not UTF-8."""
        fine = tf.reduce_all(_is_utf8(texts), axis=1)
        return tf.where((error == "") & ~fine, NOT_UTF8, error)


class CaptionService(Service):
    """The signatures `caption`, `score` and `embed` of a captioner.

    All take `image_bytes` string [B] and return `ok` bool [B] and `error`
    string [B]. For an image that cannot be used, `ok` is false, `error` holds
    the reason, the caption is empty and all numbers are zero (NaN is not valid
    JSON); the other images of the request are answered. A request that is
    malformed as a whole fails with the name of the input.

    `caption` and `score` of a captioner that was trained with prompts also take
    `prompt` string [B], what the caption or the texts of an image answer. One
    that is unlike those of its training, or too long, is an error of its image.

    Args:
        captioner: A built `Captioner`.
        tokenizer: As of `Service`.
        preprocessing: As of `Service`.
        max_length: Maximum length of a caption in tokens; the decoder's by
            default.
        **limits: `max_batch_size`, `max_texts` and `max_pixels` of `Service`.
    """

    kind = "captioner"

    def __init__(
        self, captioner, tokenizer, preprocessing, *, max_length=None, **limits
    ):
        limit = captioner.text_decoder.max_length
        max_length = limit if max_length is None else max_length
        check_integer("max_length", max_length, 1)
        if max_length > limit:
            raise ValueError(
                f"`max_length` must be at most the decoder's {limit}. "
                f"Received: max_length={max_length}"
            )
        super().__init__(captioner, tokenizer, preprocessing, **limits)
        self._max_length = max_length

    def functions(self):
        """The methods and their inputs, see `Service.signatures`."""
        asked = [PROMPT] if self._model.prompts else []
        return {
            "caption": (self.caption, [IMAGE_BYTES, *asked]),
            "score": (self.score, [IMAGE_BYTES, TEXTS, *asked]),
            "embed": (self.embed, [IMAGE_BYTES]),
        }

    @property
    def example_prompt(self):
        """A prompt that the model knows, for requests that warm a server up."""
        return self._model.prompts[0].replace(prompts.QUESTION, "what is this")

    def caption(self, image_bytes, prompt=None):
        """Captions images.

        Args:
            image_bytes: string [B].
            prompt: string [B], if the captioner was trained with prompts.

        Returns:
            Dict of `caption` string [B]; `log_likelihood` float32 [B] of the
            caption including eos, given its prompt; `ok` and `error`.
        """
        images, error = self._decode(image_bytes)
        ids = None
        if prompt is not None:
            prompt, error = self._flag_prompts(prompt, error)
            ids = self._tokenizer.encode_prompts(prompt)
        output = self._model.generate(
            images, max_length=self._max_length, prompts=ids
        )
        captions = tf.strings.unicode_transcode(
            self._tokenizer.detokenize_bytes(output["tokens"]), "UTF-8", "UTF-8"
        )
        likelihood = tf.reduce_sum(output["log_probs"], axis=-1)
        return _answer(error, caption=captions, log_likelihood=likelihood)

    def score(self, image_bytes, texts, prompt=None):
        """Log-likelihood of texts for images.

        Args:
            image_bytes: string [B].
            texts: string [B, T], each image's own texts, or [1, T], the same
                texts for all. (With [T] a server that batches requests could
                not tell to which request they belong.)
            prompt: string [B], as of `caption`.

        Returns:
            Dict of `log_likelihood` float32 [B, T], summed over the tokens of
            a text including eos, all predicted at once if the captioner is not
            trained left to right; `ok` and `error`, of the image and its texts.
        """
        images, error = self._decode(image_bytes)
        texts = self._spread(texts, tf.shape(images)[0])
        error = self._flag_texts(texts, error)
        if prompt is None:
            scores = self._score(images, self._tokenizer(texts))
        else:
            prompt, error = self._flag_prompts(prompt, error)
            prompt = tf.broadcast_to(prompt[:, None], tf.shape(texts))
            scores = self._score(
                images, *self._tokenizer.with_prompts(prompt, texts)
            )
        return _answer(error, log_likelihood=scores)

    def _flag_prompts(self, prompt, error):
        """Prompts [B] without those that cannot be answered, and errors."""
        prompt = _checked(
            prompt,
            1,
            lambda shape: shape[0] == tf.size(error),
            "prompt must be a list with one prompt for each image.",
        )
        prompt = tf.strings.strip(prompt)
        most = self._model.text_decoder.max_length - 2
        known = ", ".join(map(repr, self._model.prompts))
        pattern = prompts.pattern(self._model.prompts)
        # What is not UTF-8 cannot be tokenized.
        text = tf.where(_is_utf8(prompt), prompt, "")
        for fine, message in (
            (_is_utf8(prompt), "prompt: it is not UTF-8"),
            (
                tf.strings.regex_full_match(text, pattern),
                f"prompt: the model was trained with other prompts: {known}",
            ),
            (
                self._tokenizer.count_tokens(text) <= most,
                f"prompt: more than {most} tokens",
            ),
        ):
            error = tf.where((error == "") & ~fine, message, error)
        return tf.where(error == "", text, ""), error

    def embed(self, image_bytes):
        """Features of images, the encoder's `pre_logits`.

        Args:
            image_bytes: string [B].

        Returns:
            Dict of `embedding` float32 [B, D]; `ok` and `error`.
        """
        images, error = self._decode(image_bytes)
        features = self._model.vision_encoder(images)["pre_logits"]
        return _answer(error, embedding=tf.cast(features, tf.float32))

    def _score(self, images, labels, prompt_lengths=None):
        """Log-likelihood [B, T] of labels [B, T, L], in several passes.

        `prompt_lengths` is int32 [B, T], or None.
        """
        captioner = self._model
        memory = captioner.text_decoder.project_memory(captioner.encode(images))
        longest = tf.reduce_max(tf.math.count_nonzero(labels, axis=-1))
        labels = labels[:, :, :longest]
        if captioner.score_kinds[0] == "parallel":
            return likelihood.score_parallel(
                captioner.text_decoder, memory, labels, prompt_lengths
            )
        count, texts = tf.shape(labels)[0], tf.shape(labels)[1]

        def one_pass(start, scores):
            part = slice(start, start + TEXTS_PER_PASS)
            lengths = prompt_lengths
            if lengths is not None:
                lengths = lengths[:, part]
            nll = _nll(captioner, memory, labels[:, part], lengths)
            return start + TEXTS_PER_PASS, tf.concat([scores, -nll], axis=1)

        _, scores = tf.while_loop(
            lambda start, scores: start < texts,
            one_pass,
            (tf.constant(0), tf.zeros([count, 0])),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None])),
        )
        return scores


class ContrastiveService(Service):
    """The signatures `embed_image`, `embed_text` and `zero_shot`.

    They take `image_bytes` string [B], `texts` string, or both, and return `ok`
    and `error` of each image (of each text for `embed_text`) as the signatures
    of `CaptionService` do.

    Args:
        model: A built `Contrastive`.
        tokenizer: As of `Service`; its texts have at most the length that the
            text encoder reads.
        preprocessing: As of `Service`.
        **limits: `max_batch_size` (of texts, too, in `embed_text`),
            `max_texts` (labels of `zero_shot`) and `max_pixels` of `Service`.
    """

    kind = "contrastive"

    def __init__(self, model, tokenizer, preprocessing, **limits):
        super().__init__(model, tokenizer, preprocessing, **limits)
        limit = model.text_encoder.max_length
        if tokenizer.max_length > limit:
            raise ValueError(
                f"A text must have at most the text encoder's {limit} tokens. "
                f"Received: a tokenizer of max_length={tokenizer.max_length}"
            )

    def functions(self):
        """The methods and their inputs, see `Service.signatures`."""
        return {
            "embed_image": (self.embed_image, [IMAGE_BYTES]),
            "embed_text": (
                self.embed_text,
                [tf.TensorSpec([None], tf.string, "texts")],
            ),
            "zero_shot": (self.zero_shot, [IMAGE_BYTES, TEXTS]),
        }

    def embed_image(self, image_bytes):
        """Normalized embeddings of images.

        Args:
            image_bytes: string [B].

        Returns:
            Dict of `embedding` float32 [B, C]; `ok` and `error`.
        """
        images, error = self._decode(image_bytes)
        return _answer(error, embedding=self._model.embed_images(images))

    def embed_text(self, texts):
        """Normalized embeddings of texts.

        Args:
            texts: string [T], at most `max_batch_size`.

        Returns:
            Dict of `embedding` float32 [T, C]; `ok` and `error`, of each text.
        """
        most = self.max_batch_size
        texts = _checked(
            texts,
            1,
            lambda shape: (shape[0] >= 1) & (shape[0] <= most),
            f"texts must be a list of 1 to {most} texts.",
        )
        error = tf.where(_is_utf8(texts), "", NOT_UTF8)
        embeddings = self._model.embed_texts(self._tokenizer(texts))
        return _answer(error, embedding=embeddings)

    def zero_shot(self, image_bytes, texts):
        """How well labels fit images.

        Args:
            image_bytes: string [B].
            texts: string [B, T], each image's own labels, or [1, T], the same
                labels for all, as of `CaptionService.score`. A label is read
                as it is: send "a photo of a dog" if that is what is meant.

        Returns:
            Dict of `score` float32 [B, T]; `similarity` float32 [B, T], the
            cosines; `ok` and `error`, of the image and its labels. The score
            of a model with the softmax loss is the probability of a label
            among those of the image, the softmax of the scaled similarities
            (a label that is repeated counts once, so that columns which a
            server adds when it batches requests change nothing). That of a
            model with the sigmoid loss is the probability that the label fits,
            whatever the other labels are.
        """
        images, error = self._decode(image_bytes)
        texts = self._spread(texts, tf.shape(images)[0])
        error = self._flag_texts(texts, error)
        unique, label = tf.unique(tf.reshape(texts, [-1]))
        label = tf.reshape(label, tf.shape(texts))  # -> [B, T], below U
        similarity = tf.matmul(
            self._model.embed_images(images),
            self._embed_many(unique),
            transpose_b=True,
        )  # -> [B, U]
        similarity = tf.gather(similarity, label, batch_dims=1)
        head = self._model.contrastive_head
        scale, bias = head.scale_and_bias
        logits = scale * similarity + bias
        if head.loss == "sigmoid":
            score = tf.sigmoid(logits)
        else:
            score = _softmax_once(logits, label)
        return _answer(error, score=score, similarity=similarity)

    def _embed_many(self, texts):
        """Embeddings [U, C] of texts [U], in several passes."""
        labels = self._tokenizer(texts)
        model, count = self._model, tf.shape(texts)[0]

        def one_pass(start, embeddings):
            some = model.embed_texts(labels[start : start + TEXTS_PER_PASS])
            return start + TEXTS_PER_PASS, tf.concat([embeddings, some], 0)

        width = model.embedding_width
        _, embeddings = tf.while_loop(
            lambda start, embeddings: start < count,
            one_pass,
            (tf.constant(0), tf.zeros([0, width])),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([None, width]),
            ),
        )
        return embeddings


class ContrastiveCaptionService(CaptionService, ContrastiveService):
    """The signatures of both, of a `ContrastiveCaptioner`."""

    def functions(self):
        """The methods and their inputs, see `Service.signatures`."""
        return {
            **CaptionService.functions(self),
            **ContrastiveService.functions(self),
        }


def service_class(model):
    """The class of the service of a model that scores texts."""
    captions = hasattr(model, "text_decoder")
    if hasattr(model, "text_encoder"):
        return ContrastiveCaptionService if captions else ContrastiveService
    return CaptionService


def export_saved_model(output, service, *, name=None, version=None):
    """Writes a model to `output`/VERSION, and configuration for servers.

    The folder of the version appears in one step, so that a server that
    watches `output` never sees an incomplete model. In a bucket this is not
    possible: there the server finds a version without a graph, and tries
    again later.

    Args:
        output: The model's folder, which holds its versions.
        service: `Service` of the model.
        name: Name of the model on the server, by default its `kind`.
        version: Positive integer; by default one more than the highest
            existing version.

    Returns:
        The path of the version.

    Raises:
        ValueError: If the version exists, or the name cannot be part of a URL.
        ImportError: If tensorflow-serving-api is not installed.
    """
    name = service.kind if name is None else name
    serving_files.check_name(name)
    serving_files.check_protos()
    output = os.fspath(output)
    with files.folder(output):
        version = _next_version(output) if version is None else version
        path = os.path.join(output, str(check_integer("version", version, 1)))
        if files.exists(path):
            raise ValueError(
                "`version` must not exist yet. Received: "
                f"version={version}, but {path} exists"
            )
        files.remove_abandoned(output)
        # A server looks for the graph, so in a bucket it is written last.
        with files.replacing_folder(path, [_GRAPH]) as unfinished:
            tf.saved_model.save(
                service.resources(), unfinished, signatures=service.signatures()
            )
            serving_files.write_warmup(unfinished, service, name)
            # Written first, so that no version exists without it.
            serving_files.write_configuration(output, service, name)
    return path


def _next_version(output):
    names = [n for n in files.listdir(output) if re.fullmatch(r"\d+", n)]
    return 1 + max(map(int, names), default=0)


def _checked(value, rank, is_right, rule):
    """The same tensor, after a check of its shape at run time.

    A server passes tensors to the graph without comparing their shapes with
    the signature's, so the static shape is discarded first.
    """
    unknown = tf.compat.v1.placeholder_with_default(value, None)
    shape = tf.shape(unknown)
    message = [f"{rule} Received the shape:", shape]
    check_rank = tf.debugging.Assert(tf.size(shape) == rank, message)
    with tf.control_dependencies([check_rank]):
        condition = is_right(tf.identity(shape))
    with tf.control_dependencies([tf.debugging.Assert(condition, message)]):
        return tf.ensure_shape(tf.identity(unknown), [None] * rank)


def _is_utf8(texts):
    """Whether each text is UTF-8, bool of the same shape."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8") == texts


def _softmax_once(logits, label):
    """Softmax over the labels of a row, of which a repeated one counts once.

    Args:
        logits: float32 [B, T], equal for equal labels of a row.
        label: int32 [B, T], the number of each label.

    Returns:
        float32 [B, T].
    """
    shape = tf.shape(label)
    rows = tf.range(shape[0])[:, None] * (tf.reduce_max(label) + 1)
    # Numbers that tell the pairs of row and label apart.
    _, pair = tf.unique(tf.reshape(rows + label, [-1]))
    position = tf.range(tf.size(pair))
    first = tf.math.unsorted_segment_min(
        position, pair, tf.reduce_max(pair) + 1
    )
    is_first = tf.reshape(tf.gather(first, pair) == position, shape)
    counted = tf.where(is_first, logits, -float("inf"))
    normalizer = tf.reduce_logsumexp(counted, axis=1, keepdims=True)
    return tf.exp(logits - normalizer)


def _nll(captioner, memory, labels, prompt_lengths):
    """Negative log-likelihood [B, K] of labels [B, K, L] after prompts."""
    decoder = captioner.text_decoder
    shape = tf.shape(labels)
    flat = tf.reshape(labels, [-1, shape[2]])  # -> [B * K, L]
    hidden = decoder(decoder.shift_right(flat), memory)
    scored = likelihood.scored_tokens(
        labels, prompt_lengths, decoder.special_tokens.pad
    )
    _, nll = cross_entropy.token_cross_entropy(
        tf.reshape(hidden, [-1, decoder.hidden_dim]),
        tf.reshape(flat, [-1]),
        tf.reshape(scored, [-1]),
        *decoder.head_weights,
        chunk_size=captioner.chunk_size,
    )
    return tf.reduce_sum(tf.reshape(nll, shape), axis=-1)


def _answer(error, **values):
    """The outputs of a signature, blank for images with an error."""
    ok = error == ""

    def blank_if_bad(value):
        rank = value.shape.rank
        mask = tf.reshape(ok, [-1] + [1] * (rank - 1))
        return tf.where(mask, value, "" if value.dtype == tf.string else 0.0)

    answer = {name: blank_if_bad(value) for name, value in values.items()}
    return {**answer, "ok": ok, "error": error}
