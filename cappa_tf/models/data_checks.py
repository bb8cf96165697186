"""Checks that a data set fits a model."""

from absl import logging

from cappa_tf.utils.arguments import height_width, ranges


def check_texts(data, tower, binding):
    """Checks that the vocabulary of a data set fits a part of a model.

    Args:
        data: A data set with `tokenizer`.
        tower: Part with `vocabulary_size`, `max_length` and `special_tokens`.
        binding: Name of its class, for the message.

    Raises:
        ValueError: If it does not; names the file and the bindings that
            disagree.
    """
    tokenizer = data.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"`{binding}` reads texts, which a data set gives with a "
            f"tokenizer. Received: {data.path} without a tokenizer"
        )
    pieces, rows = tokenizer.vocabulary_size, tower.vocabulary_size
    if pieces != rows:
        many = "more" if pieces > rows else "fewer"
        raise ValueError(
            f"The vocabulary {tokenizer.path} has {many} pieces than the "
            f"model: set VOCABULARY_SIZE ({binding}.vocabulary_size) to "
            "the number of pieces, or TOKENIZER (Tokenizer.path) to the "
            f"file that the model is for. Received: {pieces} pieces, "
            f"vocabulary_size={rows}"
        )
    special = tower.special_tokens
    if (tokenizer.pad_id, tokenizer.eos_id) != (special.pad, special.eos):
        raise ValueError(
            f"The vocabulary {tokenizer.path} must have the special ids "
            f"of the model ({binding}.special_tokens). Received: "
            f"pad={tokenizer.pad_id}, eos={tokenizer.eos_id} and {special}"
        )
    if tokenizer.max_length > tower.max_length:
        raise ValueError(
            "`Tokenizer.max_length` must be at most "
            f"`{binding}.max_length`. Received: "
            f"{tokenizer.max_length} and {tower.max_length}"
        )


def check_without_prompts(data, name, method):
    """Checks that the captions of a data set answer no prompts.

    Args:
        data: A data set.
        name: Name of the argument that holds it, for the message.
        method: Name of the class that reads texts as they are.

    Raises:
        ValueError: If they do.
    """
    prompts = getattr(data, "prompts", ())
    if prompts:
        raise ValueError(
            f"A {method} reads captions without prompts, which only a "
            f"Captioner is trained with. Received: `{name}` with "
            f"prompts={list(prompts)}"
        )


def check_image_size(data, name, vision_encoder):
    """Checks that the images of a data set have the encoder's size.

    Args:
        data: A data set with `image_size`.
        name: Name of the argument that holds it, for the message.
        vision_encoder: Encoder with `image_size`.

    Raises:
        ValueError: If the sizes differ; names both.
    """
    size = height_width("image_size", data.image_size)
    if size != tuple(vision_encoder.image_size):
        raise ValueError(
            f"`image_size` of `{name}` must be that of the model. "
            f"Received: {size} and VisionEncoder.image_size="
            f"{tuple(vision_encoder.image_size)}"
        )


def check_labels(data, num_classes):
    """Checks that the labels of a data set are classes of a model.

    A class without images is logged: it costs nothing, and is never predicted
    if it has none in training.

    Args:
        data: A data set; one without `check_labels` is not checked.
        num_classes: Number of classes of the model.

    Raises:
        ValueError: If labels are beyond them, or there is none at all.
    """
    if not hasattr(data, "check_labels"):
        return
    absent = data.check_labels(num_classes)
    if absent:
        logging.warning(
            "%s: no image of class %s (of %d)",
            f"{data.path} {data.split}",
            ranges(absent),
            num_classes,
        )
