"""Cross-entropy of class labels.

Abbreviations for dimensions:
    B: batch.  C: number of classes.

Reference: big_vision utils.py `softmax_xent`, `sigmoid_xent`.
"""

from keras import ops

LOSSES = ("softmax", "sigmoid")


def class_targets(
    labels,
    num_classes,
    label_smoothing=0.0,
    mix_labels=None,
    mix_weights=None,
):
    """Target of each class.

    Args:
        labels: Integers [B] from 0 to C - 1 (all zeros for other numbers), or
            targets [B, C] of several classes.
        num_classes: C.
        label_smoothing: Fraction of the target that is spread evenly over all
            classes.
        mix_labels: Labels of the other image of each mixture, in the form of
            `labels`; None if images are not mixed.
        mix_weights: [B], the weight of the first image.

    Returns:
        float32 [B, C].
    """
    targets = _one_hot(labels, num_classes)
    if mix_labels is not None:
        weights = ops.expand_dims(mix_weights, 1)
        others = _one_hot(mix_labels, num_classes)
        targets = weights * targets + (1.0 - weights) * others
    return targets * (1.0 - label_smoothing) + label_smoothing / num_classes


def _one_hot(labels, num_classes):
    if len(labels.shape) == 2:
        return ops.cast(labels, "float32")
    return ops.one_hot(labels, num_classes, dtype="float32")


def softmax_cross_entropy(logits, targets):
    """Cross-entropy with the softmax of the logits.

    Args:
        logits: [B, C].
        targets: float32 [B, C], from `class_targets`.

    Returns:
        float32 [B].
    """
    logits = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    return -ops.sum(targets * logits, axis=-1)


def sigmoid_cross_entropy(logits, targets):
    """Binary cross-entropy of each class, summed over the classes.

    Args:
        logits: [B, C].
        targets: float32 [B, C], from `class_targets`.

    Returns:
        float32 [B].
    """
    logits = ops.cast(logits, "float32")
    return ops.sum(
        ops.binary_crossentropy(targets, logits, from_logits=True), axis=-1
    )
