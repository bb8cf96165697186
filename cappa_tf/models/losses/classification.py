"""Cross-entropy of class labels.

Abbreviations for dimensions:
    B: batch.  C: number of classes.
"""

import keras
from keras import ops


def softmax_cross_entropy(logits, labels, label_smoothing=0.0):
    """Cross-entropy of each example.

    Args:
        logits: [B, C].
        labels: Integers [B] from 0 to C - 1.
        label_smoothing: Fraction of the target that is spread evenly over all
            classes.

    Returns:
        float32 [B].
    """
    logits = ops.cast(logits, "float32")
    targets = ops.one_hot(labels, logits.shape[-1], dtype="float32")
    return keras.losses.categorical_crossentropy(
        targets, logits, from_logits=True, label_smoothing=label_smoothing
    )
