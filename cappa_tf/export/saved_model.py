"""Captioner as a SavedModel for TensorFlow Serving.

Everything is in the graph: decoding of image files, tokenizer, generation. A
server that loads it needs TensorFlow and TensorFlow Text's ops, which
`tensorflow_model_server` includes, and nothing of this project.

Abbreviations for dimensions:
    B: images of a request (or of several that a server has batched).
    T: texts to score for each image.
    H, W: height and width the model takes.
    L: length of a text in tokens.  P: patches.  D: width.
"""

import dataclasses
import os
import re

import tensorflow as tf

from cappa_tf.data.images import decode_resize
from cappa_tf.export import request_images, serving_files
from cappa_tf.models import likelihood
from cappa_tf.models.losses import cross_entropy
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_integer

# Texts of each image in one decoder pass of `score`.
TEXTS_PER_PASS = 64
# Maximum size of an image, if the run has no limit of its own.
MAX_PIXELS = 64_000_000
_GRAPH = "saved_model.pb"


class CaptionService:
    """The signatures `caption`, `score` and `embed`.

    All take `image_bytes` string [B] and return `ok` bool [B] and `error`
    string [B]. For an image that cannot be used, `ok` is false, `error` holds
    the reason, the caption is empty and all numbers are zero (NaN is not valid
    JSON); the other images of the request are answered. A request that is
    malformed as a whole fails with the name of the input.

    Args:
        captioner: A built `Captioner`.
        tokenizer: The `Tokenizer` it was trained with.
        preprocessing: Its `ImagePreprocessing`.
        max_length: Maximum length of a caption in tokens; the decoder's by
            default.
        max_batch_size: Maximum number of images in a request.
        max_texts: Maximum number of texts per image.
        max_pixels: Images with more pixels are refused by their header; by
            default the limit of the run, or 64 million if it has none.
    """

    def __init__(
        self,
        captioner,
        tokenizer,
        preprocessing,
        *,
        max_length=None,
        max_batch_size=32,
        max_texts=1_000,
        max_pixels=None,
    ):
        limit = captioner.text_decoder.max_length
        max_length = limit if max_length is None else max_length
        check_integer("max_length", max_length, 1)
        if max_length > limit:
            raise ValueError(
                f"`max_length` must be at most the decoder's {limit}. "
                f"Received: max_length={max_length}"
            )
        if max_pixels is None:
            max_pixels = preprocessing.max_pixels or MAX_PIXELS
        self._max_length = max_length
        self.max_batch_size = check_integer("max_batch_size", max_batch_size, 1)
        self.max_texts = check_integer("max_texts", max_texts, 1)
        self._preprocessing = dataclasses.replace(
            preprocessing, max_pixels=check_integer("max_pixels", max_pixels, 1)
        )
        self._captioner = captioner
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
        """The TensorFlow variables of encoder and decoder."""
        captioner = self._captioner
        return [
            variable.value
            for part in (captioner.vision_encoder, captioner.text_decoder)
            for variable in part.variables
        ]

    def resources(self):
        """Module of the objects that a SavedModel of the functions must hold.

        These are the variables without the Keras objects around them, and the
        vocabulary, which is tracked only if it is an attribute.
        """
        module = tf.Module(name="captioner")
        module.vocabulary = self._tokenizer.load()
        module.weights = self.weights
        return module

    def signatures(self):
        """Dict of the functions to export, by the name of the signature."""
        image_bytes = tf.TensorSpec([None], tf.string, "image_bytes")
        texts = tf.TensorSpec([None, None], tf.string, "texts")
        functions = {
            "caption": tf.function(
                self.caption, input_signature=[image_bytes], autograph=False
            ),
            "score": tf.function(
                self.score,
                input_signature=[image_bytes, texts],
                autograph=False,
            ),
            "embed": tf.function(
                self.embed, input_signature=[image_bytes], autograph=False
            ),
        }
        default = tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
        return {default: functions["caption"], **functions}

    def caption(self, image_bytes):
        """Captions images.

        Args:
            image_bytes: string [B].

        Returns:
            Dict of `caption` string [B]; `log_likelihood` float32 [B] of the
            caption including eos; `ok` and `error`.
        """
        images, error = self._decode(image_bytes)
        output = self._captioner.generate(images, max_length=self._max_length)
        captions = tf.strings.unicode_transcode(
            self._tokenizer.detokenize_bytes(output["tokens"]), "UTF-8", "UTF-8"
        )
        likelihood = tf.reduce_sum(output["log_probs"], axis=-1)
        return _answer(error, caption=captions, log_likelihood=likelihood)

    def score(self, image_bytes, texts):
        """Log-likelihood of texts for images.

        Args:
            image_bytes: string [B].
            texts: string [B, T], each image's own texts, or [1, T], the same
                texts for all. (With [T] a server that batches requests could
                not tell to which request they belong.)

        Returns:
            Dict of `log_likelihood` float32 [B, T], summed over the tokens of
            a text including eos, all predicted at once if the captioner is not
            trained left to right; `ok` and `error`, of the image and its texts.
        """
        images, error = self._decode(image_bytes)
        texts = self._spread(texts, tf.shape(images)[0])
        utf8 = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8") == texts
        error = tf.where(
            (error == "") & ~tf.reduce_all(utf8, axis=1),
            "texts: a text is not UTF-8",
            error,
        )
        scores = self._score(images, self._tokenizer(texts))
        return _answer(error, log_likelihood=scores)

    def embed(self, image_bytes):
        """Features of images, the encoder's `pre_logits`.

        Args:
            image_bytes: string [B].

        Returns:
            Dict of `embedding` float32 [B, D]; `ok` and `error`.
        """
        images, error = self._decode(image_bytes)
        features = self._captioner.vision_encoder(images)["pre_logits"]
        return _answer(error, embedding=tf.cast(features, tf.float32))

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

    def _score(self, images, labels):
        """Log-likelihood [B, T] of labels [B, T, L], in several passes."""
        captioner = self._captioner
        memory = captioner.text_decoder.project_memory(captioner.encode(images))
        longest = tf.reduce_max(tf.math.count_nonzero(labels, axis=-1))
        labels = labels[:, :, :longest]
        if not captioner.left_to_right:
            return likelihood.score_parallel(
                captioner.text_decoder, memory, labels
            )
        count, texts = tf.shape(labels)[0], tf.shape(labels)[1]

        def one_pass(start, scores):
            some = labels[:, start : start + TEXTS_PER_PASS]
            nll = _nll(captioner, memory, some)
            return start + TEXTS_PER_PASS, tf.concat([scores, -nll], axis=1)

        _, scores = tf.while_loop(
            lambda start, scores: start < texts,
            one_pass,
            (tf.constant(0), tf.zeros([count, 0])),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None])),
        )
        return scores


def export_saved_model(output, service, *, name="captioner", version=None):
    """Writes a model to `output`/VERSION, and configuration for servers.

    The folder of the version appears in one step, so that a server that
    watches `output` never sees an incomplete model. In a bucket this is not
    possible: there the server finds a version without a graph, and tries
    again later.

    Args:
        output: The model's folder, which holds its versions.
        service: `CaptionService`.
        name: Name of the model on the server.
        version: Positive integer; by default one more than the highest
            existing version.

    Returns:
        The path of the version.

    Raises:
        ValueError: If the version exists, or the name cannot be part of a URL.
        ImportError: If tensorflow-serving-api is not installed.
    """
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


def _nll(captioner, memory, labels):
    """Negative log-likelihood [B, K] of labels [B, K, L]."""
    decoder = captioner.text_decoder
    shape = tf.shape(labels)
    flat = tf.reshape(labels, [-1, shape[2]])  # -> [B * K, L]
    hidden = decoder(decoder.shift_right(flat), memory)
    _, nll = cross_entropy.token_cross_entropy(
        tf.reshape(hidden, [-1, decoder.hidden_dim]),
        tf.reshape(flat, [-1]),
        tf.reshape(flat, [-1]) != decoder.special_tokens.pad,
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
