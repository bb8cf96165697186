"""Tokenizer, captions to token ids and back, and vocabulary training.

Dimensions:
    N: number of captions.
    L: text length, `max_length` of the tokenizer.
"""

import io
import os
import re

import sentencepiece
import tensorflow as tf
import tensorflow_text as tf_text

from cappa_tf.utils import files

# Name of the vocabulary file in the folder of its data set.
FILE_NAME = "tokenizer.model"
PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2

# SentencePiece skips texts in training that have more bytes than this, or the
# character that it uses to mark unknown ones.
_MAX_BYTES = 4192
_RESERVED = "\u2585"


class Tokenizer(tf.Module):
    """SentencePiece ids of fixed length, computed in the TensorFlow graph.

    With max_length=3 and a vocabulary in which "a" is 5:

        sticky_eos=True     "" -> [1, 0, 0]     "a" -> [5, 1, 0]
                            "a a" -> [5, 5, 1]  "a a a" -> [5, 5, 1]
        sticky_eos=False    "a a" -> [5, 5, 1]  "a a a" -> [5, 5, 5]

    1 is the end of the caption (eos), 0 is padding. A sticky eos is kept when a
    caption is truncated, in place of its last token. CapPa trains with it
    (big_vision pp/ops_text.py, eos="sticky"); without it a model learns that a
    truncated caption has no end.

    The vocabulary file is opened at first use, not by the constructor, so that
    a configuration can name one that a preparation step has yet to train. The
    class is a `tf.Module`, so that an exported model includes the vocabulary.

    Args:
        path: A SentencePiece model file with pad 0 and eos 1, such as
            `train_tokenizer` writes, or the folder of a data set that holds
            one named tokenizer.model.
        max_length: L, maximum number of tokens of a caption including eos.
        lowercase: Whether to lower-case (Unicode; big_vision lower-cases
            ASCII only, which is the same for English).
        sticky_eos: Whether a truncated caption keeps eos.
    """

    # Of the vocabulary in a folder, and the arguments that a run keeps.
    file_name = FILE_NAME
    settings = ("max_length", "lowercase", "sticky_eos")

    def __init__(
        self,
        path: str | os.PathLike,
        max_length=64,
        lowercase=True,
        sticky_eos=True,
    ):
        super().__init__(name="tokenizer")
        if not isinstance(max_length, int) or max_length < 2:
            raise ValueError(
                "`max_length` must be an integer of at least 2 (one token and "
                f"eos). Received: max_length={max_length!r}"
            )
        self._path = os.fspath(path)
        self.max_length = max_length
        self.lowercase = lowercase
        self.sticky_eos = sticky_eos
        self._sentencepiece = None

    @property
    def path(self):
        """Path of the model file, even if its folder was given."""
        if tf.io.gfile.isdir(self._path):
            return os.path.join(self._path, self.file_name)
        return self._path

    @property
    def pad_id(self):
        """Id of padding."""
        return PAD_ID

    @property
    def eos_id(self):
        """Id of the end of a caption."""
        return EOS_ID

    @property
    def vocabulary_size(self):
        """Number of pieces, including pad, eos and unknown."""
        return int(self.load().vocab_size().numpy())

    def load(self):
        """Opens the vocabulary if it is not open; returns the TF Text op.

        Raises:
            ValueError: If there is no such file, or it is not a vocabulary
                with pad 0 and eos 1.
        """
        if self._sentencepiece is None:
            # The resource must not belong to a function that is being traced.
            with tf.init_scope():
                self._sentencepiece = tf_text.SentencepieceTokenizer(
                    model=_read_model(self.path)
                )
        return self._sentencepiece

    def __call__(self, strings):
        """Tokenizes captions.

        Args:
            strings: String tensor (or list) of any shape [...].

        Returns:
            int32 [..., L].
        """
        strings = tf.convert_to_tensor(strings, tf.string)
        return self._with_eos(self._tokens(strings), strings)

    def with_prompts(self, prompts, captions):
        """Tokenizes captions after the prompts that they answer.

        Both are tokenized on their own, so that the tokens of a prompt do not
        depend on the caption. With max_length=5 and "a" 5, "b" 6:

            "b", "a a" -> [6, 5, 5, 1, 0], 1    "", "a" -> [5, 1, 0, 0, 0], 0

        Args:
            prompts: String tensor (or list) of any shape [...].
            captions: Strings of the same shape.

        Returns:
            (int32 [..., L], the tokens of the prompt, of the caption and eos,
            cut as captions are; int32 [...], the length of the prompt).
        """
        prompts, captions = (
            tf.convert_to_tensor(strings, tf.string)
            for strings in (prompts, captions)
        )
        before = self._tokens(prompts)
        lengths = tf.cast(before.row_lengths(), tf.int32)
        lengths = tf.minimum(lengths, self.max_length)
        tokens = tf.concat([before, self._tokens(captions)], axis=1)
        return (
            self._with_eos(tokens, captions),
            tf.reshape(lengths, tf.shape(prompts)),
        )

    def encode_prompts(self, prompts):
        """Token ids of prompts, without eos.

        Args:
            prompts: String tensor (or list) [N].

        Returns:
            int32 [N, longest], padded.
        """
        prompts = tf.convert_to_tensor(prompts, tf.string)
        return self._tokens(prompts).to_tensor(self.pad_id)

    def count_tokens(self, strings):
        """Number of tokens of strings of any shape, without eos, int32."""
        strings = tf.convert_to_tensor(strings, tf.string)
        counts = tf.cast(self._tokens(strings).row_lengths(), tf.int32)
        return tf.reshape(counts, tf.shape(strings))

    def _tokens(self, strings):
        """Ids of N strings of any shape, ragged [N, (tokens)]."""
        flat = tf.reshape(strings, [-1])
        if self.lowercase:
            flat = tf.strings.lower(flat, encoding="utf-8")
        return self.load().tokenize(flat)

    def _with_eos(self, tokens, strings):
        """Ids [..., L] of ragged [N, (tokens)], of strings of shape [...]."""
        if self.sticky_eos:
            tokens = tokens[:, : self.max_length - 1]
        eos = tf.fill([tf.size(strings), 1], self.eos_id)
        ids = tf.concat([tokens, eos], axis=1).to_tensor(
            self.pad_id, shape=[None, self.max_length]
        )  # [N, L]
        shape = tf.concat([tf.shape(strings), [self.max_length]], 0)
        ids = tf.reshape(ids, shape)
        return tf.ensure_shape(ids, strings.shape + [self.max_length])

    def encode(self, text):
        """Tokenizes one text without truncation and without eos.

        Args:
            text: A string.

        Returns:
            (ids, unknown): a list of ids, and a list of the parts of the text
            that became the unknown piece.
        """
        if self.lowercase:
            with tf.init_scope():  # eager even while a graph is traced
                lowered = tf.strings.lower(text, encoding="utf-8")
            text = lowered.numpy().decode()
        processor = sentencepiece.SentencePieceProcessor(
            model_proto=_read_model(self.path)
        )
        ids = processor.encode(text, out_type=int)
        pieces = processor.encode(text, out_type=str)
        unknown = [
            piece.replace("\u2581", " ").strip()
            for i, piece in zip(ids, pieces)
            if i == UNKNOWN_ID
        ]
        return ids, unknown

    def pieces(self, ids):
        """The pieces of ids, a list of strings with spaces as such."""
        strings = self.load().id_to_string(ids).numpy()
        return [
            string.decode(errors="replace").replace("\u2581", " ")
            for string in strings
        ]

    def detokenize(self, ids):
        """Turns ids back into text: up to the first eos, without padding.

        Args:
            ids: Integers [N, any length].

        Returns:
            A list of N strings.
        """
        texts = self.detokenize_bytes(ids).numpy()
        return [text.decode(errors="replace") for text in texts]

    def detokenize_bytes(self, ids):
        """Does the same as `detokenize` in the graph, with bytes as result.

        Byte pieces that do not form a character are kept as they are, so the
        bytes need not be valid UTF-8.

        Args:
            ids: Integers [N, any length].

        Returns:
            string [N].
        """
        ids = tf.cast(tf.convert_to_tensor(ids), tf.int32)
        ended = tf.cumsum(tf.cast(ids == EOS_ID, tf.int32), axis=-1) > 0
        kept = tf.ragged.boolean_mask(ids, ~ended & (ids != PAD_ID))
        return self.load().detokenize(kept)


def train_tokenizer(
    captions,
    output_path,
    vocabulary_size,
    lowercase=True,
    character_coverage=1.0,
    byte_fallback=False,
    max_sentences=1_000_000,
):
    """Trains a SentencePiece (unigram) vocabulary and writes its model file.

    The same captions in the same order yield the same bytes. A corpus with
    too few different words for `vocabulary_size` pieces yields a smaller
    vocabulary.

    Args:
        captions: Iterable of strings, read once.
        output_path: Path of the model file, written atomically.
        vocabulary_size: Number of pieces, including the ids 0 (pad), 1 (eos)
            and 2 (unknown).
        lowercase: Whether captions are lower-cased first, as `Tokenizer` does.
        character_coverage: Fraction of characters that get a piece; 0.9995
            for languages with many characters.
        byte_fallback: Whether a character without a piece becomes its bytes
            (256 pieces) rather than unknown.
        max_sentences: Maximum number of captions to use, the first ones.

    Returns:
        The number of pieces.

    Raises:
        ValueError: If no caption is usable, or there are fewer pieces than
            characters in the text.
    """
    if not isinstance(vocabulary_size, int) or vocabulary_size < 4:
        raise ValueError(
            "`vocabulary_size` must be an integer of at least 4. Received: "
            f"vocabulary_size={vocabulary_size!r}"
        )
    texts, left_out = usable_captions(captions, lowercase, max_sentences)
    if not texts:
        raise ValueError(
            "A vocabulary needs at least one usable caption. "
            f"Received: {describe_left_out(left_out)}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            # Sums over threads depend on their number, so it is fixed.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            "SentencePiece cannot train a vocabulary from "
            f"{len(texts)} captions with vocabulary_size={vocabulary_size}: "
            f"{error}"
        ) from None
    files.write_bytes(output_path, model.getvalue())
    return sentencepiece.SentencePieceProcessor(
        model_proto=model.getvalue()
    ).get_piece_size()


def usable_captions(captions, lowercase=True, max_captions=1_000_000):
    """Selects the captions that a vocabulary can be trained on.

    Args:
        captions: Iterable of strings.
        lowercase: Whether to lower-case the captions.
        max_captions: Maximum number of captions to use, the first ones.

    Returns:
        texts: The usable captions, each on one line.
        left_out: List of (number from 1, reason, beginning of the caption) of
            the others.
    """
    texts, left_out = [], []
    for number, caption in enumerate(captions, 1):
        text = re.sub(r"\s+", " ", caption).strip()
        text = text.lower() if lowercase else text
        reason = _reason_to_leave_out(text)
        if reason is None:
            texts.append(text)
        else:
            left_out.append((number, reason, text[:24]))
        if len(texts) == max_captions:
            break
    return texts, left_out


def _reason_to_leave_out(text):
    if not text:
        return "empty"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if size > _MAX_BYTES:
        return f"longer than {_MAX_BYTES} bytes"
    if _RESERVED in text:
        return f"with the reserved character {_RESERVED}"
    return None


def describe_left_out(left_out, kind="caption"):
    """Describes the captions that `usable_captions` left out.

    Args:
        left_out: The list; may be empty.
        kind: Name of the items that the numbers count.

    Returns:
        A string such as "2 empty (line 3, 8); 1 not UTF-8 (line 5: 'caf')".
    """
    if not left_out:
        return f"no {kind} at all"
    by_reason = {}
    for number, reason, text in left_out:
        by_reason.setdefault(reason, []).append((number, text))
    return "; ".join(
        f"{len(some)} {reason} ({kind} {_numbers(some)})"
        for reason, some in by_reason.items()
    )


def _numbers(some, most=5):
    """Numbers and beginnings of the first of these captions."""
    shown = [
        f"{number}: {ascii(text)}" if text else f"{number}"
        for number, text in some[:most]
    ]
    return ", ".join(shown + ["..."] * (len(some) > most))


def _read_model(path):
    """Reads and checks the bytes of a SentencePiece model."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            model = file.read()
    except (tf.errors.NotFoundError, tf.errors.FailedPreconditionError):
        raise ValueError(
            "The tokenizer's `path` must be a SentencePiece model file "
            f"(cappa-train-tokenizer writes one). Received: path={path!r}"
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a SentencePiece model: {error}"
        ) from None
    special = (processor.pad_id(), processor.eos_id())
    if special != (PAD_ID, EOS_ID):
        raise ValueError(
            f"The vocabulary {path} must have pad {PAD_ID} and eos {EOS_ID}. "
            f"Received: pad, eos = {special}"
        )
    return model
