"""Text embeddings: each text is embedded once for the same weights.

Abbreviations for dimensions:
    B: texts per batch.      L: length of a text in tokens.
    T: requested texts.      U: distinct texts.  C: width of the embeddings.
"""

import numpy as np
import tensorflow as tf

# Number of texts kept: 300 MB at a width of 768.
_MOST_TEXTS = 100_000


class TextEmbeddings:
    """Embeds texts in batches of one shape and keeps the embeddings.

    An evaluator asks for the same texts with every batch of images. The
    embeddings are kept until the weights change, as they do between two
    evaluations of a model in training.

    Args:
        model: A built `Task` with `embed_texts`.
        tokenizer: Its `Tokenizer`.
        batch_size: B.
    """

    def __init__(self, model, tokenizer, batch_size):
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        # AutoGraph has nothing to convert here, but would take long.
        self._embed = tf.function(
            lambda labels: model.embed_texts(labels), autograph=False
        )
        self._sums = tf.function(self._sums_of_weights, autograph=False)
        self._weights = None
        self.forget()

    def forget(self):
        """Drops all embeddings."""
        self._row_of_text, self._row_of_tokens = {}, {}
        self._table = None

    def find(self, texts):
        """Returns embeddings of texts, computing those that are missing.

        Texts of equal tokens share a row, so that their scores are equal to
        the last bit: a tie is recognized as one.

        Args:
            texts: T strings, at least one.

        Returns:
            (table float32 [U, C], rows int64 [T]): `table[rows]` are the
            embeddings; the table may have more rows than were requested.
        """
        weights = self._sums().numpy()
        if not np.array_equal(weights, self._weights):
            self.forget()
            self._weights = weights
        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if text not in self._row_of_text]
        if len(self._row_of_text) + len(missing) > _MOST_TEXTS:
            self.forget()
            missing = list(distinct)
        if missing:
            self._add(missing)
        return self._table, np.array([self._row_of_text[t] for t in texts])

    def _add(self, texts):
        # The length is always L: a text encoder without a padding mask gives
        # another embedding at another length.
        ids = np.asarray(self._tokenizer(texts), np.int32)
        keys = [tokens.tobytes() for tokens in ids]
        new = {
            key: tokens
            for key, tokens in zip(keys, ids)
            if key not in self._row_of_tokens
        }
        if new:
            tables = [] if self._table is None else [self._table]
            tables.append(self._embeddings(np.stack([*new.values()])))
            self._table = np.concatenate(tables)
        for key in new:
            self._row_of_tokens[key] = len(self._row_of_tokens)
        for text, key in zip(texts, keys):
            self._row_of_text[text] = self._row_of_tokens[key]

    def _embeddings(self, ids):
        """Embeddings float32 [U, C] of token ids [U, L]."""
        parts = []
        for start in range(0, len(ids), self._batch_size):
            some = ids[start : start + self._batch_size]
            missing = self._batch_size - len(some)
            padded = np.pad(
                some,
                [(0, missing), (0, 0)],
                constant_values=self._tokenizer.pad_id,
            )
            found = self._embed(tf.constant(padded))
            parts.append(found.numpy()[: len(some)])
        return np.concatenate(parts)

    def _sums_of_weights(self):
        """A number for each weight that a text passes through.

        Other numbers mean other weights. It costs one pass over the weights,
        little compared with embedding a batch of images.
        """
        sums = [
            tf.reduce_sum(tf.cast(tf.convert_to_tensor(variable), tf.float32))
            for name, part in self._model.parts.items()
            if name != "vision_encoder"
            for variable in part.variables
        ]
        return tf.stack(sums) if sums else tf.zeros([0])
