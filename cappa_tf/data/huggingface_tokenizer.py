"""Tokenizer of a Hugging Face file, with the interface of `Tokenizer`.

N: number of captions.
"""

import json
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra, check_integer

FILE_NAME = "tokenizer.json"
# Where the names of the special tokens may be.
_NAMES = ("special_tokens_map.json", "tokenizer_config.json")


class HuggingFaceTokenizer(Tokenizer):
    """Ids of a tokenizer.json, as public models come with.

    A caption is its tokens and eos, then padding. The start token, which the
    file's post-processor may add, is left to the decoder, whose input it is.
    The file does not run in a TensorFlow graph: a pipeline calls it through
    Python, and an exported SavedModel cannot hold it.

    Args:
        path: A tokenizer.json, or a folder that holds one.
        max_length: As in `Tokenizer`.
        lowercase: Whether to lower-case first; by default the normalizer of
            the file alone decides.
        sticky_eos: As in `Tokenizer`.
        pad_id: Id of padding; by default that of the `pad_token` in
            special_tokens_map.json or tokenizer_config.json beside the file.
        eos_id: Id of the end of a caption; by default that of `eos_token`.
    """

    file_name = FILE_NAME
    settings = (*Tokenizer.settings, "pad_id", "eos_id")

    def __init__(
        self,
        path: str | os.PathLike,
        max_length=64,
        lowercase=False,
        sticky_eos=True,
        pad_id=None,
        eos_id=None,
    ):
        super().__init__(path, max_length, lowercase, sticky_eos)
        self._ids = {"pad": pad_id, "eos": eos_id}
        for name, value in self._ids.items():
            if value is not None:
                check_integer(f"{name}_id", value)
        self._tokenizer = None

    @property
    def pad_id(self):
        """Id of padding."""
        return self._special_id("pad")

    @property
    def eos_id(self):
        """Id of the end of a caption."""
        return self._special_id("eos")

    @property
    def vocabulary_size(self):
        """Number of pieces: the highest id and 1."""
        return 1 + max(self.load().get_vocab().values())

    def load(self):
        """Opens the file if it is not open; returns `tokenizers.Tokenizer`.

        Raises:
            ValueError: If there is no such file.
            ImportError: If tokenizers is not installed.
        """
        if self._tokenizer is None:
            self._tokenizer = _read(self.path)
        return self._tokenizer

    def _special_id(self, name):
        if self._ids[name] is None:
            self._ids[name] = self._id_of_name(f"{name}_token")
        return self._ids[name]

    def _id_of_name(self, field):
        folder = os.path.dirname(self.path)
        for file_name in _NAMES:
            path = os.path.join(folder, file_name)
            if not files.isfile(path):
                continue
            try:
                found = json.loads(files.read_text(path)).get(field)
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"Names of special tokens must be a JSON object. Received: "
                    f"{path} ({error})"
                ) from error
            if isinstance(found, dict):  # An `AddedToken`.
                found = found.get("content")
            number = None if found is None else self.load().token_to_id(found)
            if number is not None:
                return number
        raise ValueError(
            f"The files of a tokenizer must tell `{field}`, unless "
            f"{field.removesuffix('_token')}_id is given. Received: "
            f"{self.path}, without it in {' or '.join(_NAMES)} beside it"
        )

    def _tokens(self, strings):
        flat = tf.reshape(strings, [-1])
        values, lengths = tf.numpy_function(
            self._encode, [flat], [tf.int32, tf.int64], stateful=False
        )
        values.set_shape([None])
        lengths.set_shape([None])
        return tf.RaggedTensor.from_row_lengths(values, lengths)

    def _encode(self, strings):
        """Ids of N strings one after the other, and how many each has."""
        texts = [self._cleaned(s.decode(errors="replace")) for s in strings]
        rows = self.load().encode_batch(texts, add_special_tokens=False)
        rows = [row.ids for row in rows]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.array(sum(rows, []), np.int32), lengths

    def _cleaned(self, text):
        """A text without space around it, as clip-jax reads captions."""
        text = text.strip()
        return text.lower() if self.lowercase else text

    def encode(self, text):
        """Tokenizes one text, as `Tokenizer.encode`."""
        text = self._cleaned(text)
        found = self.load().encode(text, add_special_tokens=False)
        unknown = getattr(self.load().model, "unk_token", None)
        parts = [
            text[begin:end]
            for token, (begin, end) in zip(found.tokens, found.offsets)
            if token == unknown
        ]
        return found.ids, parts

    def pieces(self, ids):
        """The pieces of ids, a list of strings with spaces as such."""
        return [
            (self.load().id_to_token(int(i)) or "")
            .replace("\u2581", " ")
            .replace("\u0120", " ")
            for i in ids
        ]

    def detokenize_bytes(self, ids):
        """Texts of ids [N, any length], string [N]."""
        texts = tf.numpy_function(
            self._decode, [tf.cast(ids, tf.int32)], tf.string, stateful=False
        )
        texts.set_shape([None])
        return texts

    def _decode(self, ids):
        rows = []
        for row in ids.tolist():
            if self.eos_id in row:
                row = row[: row.index(self.eos_id)]
            rows.append([i for i in row if i != self.pad_id])
        texts = self.load().decode_batch(rows, skip_special_tokens=True)
        return np.array([text.strip().encode() for text in texts], object)


def open_tokenizer(path, max_length, **ids):
    """Opens a vocabulary of either kind.

    Args:
        path: A SentencePiece model or a tokenizer.json, or a folder that holds
            one named tokenizer.model or tokenizer.json.
        max_length: As in `Tokenizer`.
        **ids: `pad_id` and `eos_id` of a tokenizer.json.

    Returns:
        A `Tokenizer` or `HuggingFaceTokenizer`.
    """
    path = os.fspath(path)
    if path.endswith(".json"):
        return HuggingFaceTokenizer(path, max_length, **ids)
    own, foreign = (
        os.path.join(path, name) for name in (Tokenizer.file_name, FILE_NAME)
    )
    if not files.exists(own) and files.exists(foreign):
        return HuggingFaceTokenizer(path, max_length, **ids)
    return Tokenizer(path, max_length)


def _read(path):
    """A `tokenizers.Tokenizer` without truncation and padding of its own."""
    check_extra("A tokenizer.json", "clip_jax", "tokenizers")
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_str(files.read_text(path))
    # tokenizers raises the class Exception itself.
    except Exception as error:
        raise ValueError(
            "The tokenizer's `path` must be a tokenizer.json of Hugging Face. "
            f"Received: path={path!r} ({error})"
        ) from None
    found.no_truncation()
    found.no_padding()
    return found
