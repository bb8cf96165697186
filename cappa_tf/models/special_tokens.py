"""Special token ids, which have a meaning for the model, not in the text."""

import dataclasses

import keras

from cappa_tf.utils.arguments import check_integer


@keras.saving.register_keras_serializable("cappa_tf")
@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The special ids of a vocabulary, by default those of CapPa.

    Attributes:
        pad: Fills a caption up to the length of its batch; never predicted.
        start: Input at the first position, which predicts the first token.
            CapPa uses pad for it.
        eos: Ends a caption.
        mask: Replaces a hidden token in parallel prediction, or None. It may
            be one past the vocabulary, as in CapPa: then it is an input that
            can never be predicted.
    """

    pad: int = 0
    start: int = 0
    eos: int = 1
    mask: int | None = None

    def __post_init__(self):
        for name, value in self.get_config().items():
            if value is not None or name != "mask":
                check_integer(name, value, 0)
        if self.eos == self.pad or self.mask in (self.pad, self.eos):
            raise ValueError(
                "`pad`, `eos` and `mask` must differ from each other. "
                f"Received: {self}"
            )

    def check_vocabulary(self, vocabulary_size):
        """Checks that the ids exist in a vocabulary of this size.

        Args:
            vocabulary_size: Number of tokens that can be predicted.

        Raises:
            ValueError: If an id is beyond it; `mask` may be the next one.
        """
        most = max(self.pad, self.start, self.eos, (self.mask or 0) - 1)
        if most >= vocabulary_size:
            raise ValueError(
                "`pad`, `start` and `eos` must be below `vocabulary_size`, "
                "`mask` at most that. Received: "
                f"vocabulary_size={vocabulary_size}, {self}"
            )

    def require_mask(self):
        """Returns `mask`.

        Raises:
            ValueError: If it is None.
        """
        if self.mask is None:
            raise ValueError(
                "Parallel prediction needs a decoder with a MASK token. "
                f"Received: special_tokens={self}"
            )
        return self.mask

    def get_config(self):
        """Returns the constructor's arguments."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """Rebuilds the object from `get_config`'s result."""
        return cls(**config)
