"""Vision encoder as a file of its own, for every Keras backend.

    save_backbone(captioner.vision_encoder, "encoder.keras")
    encoder = load_backbone("encoder.keras", image_size=384)

Nothing here needs TensorFlow: with KERAS_BACKEND=jax or torch the file opens
even if TensorFlow is not installed.
"""

import keras

from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import preset_folder
from cappa_tf.saving.weights import PLAIN, rebuilt
from cappa_tf.utils import arguments
from cappa_tf.utils.files import replacing

# How a saved encoder keeps its weights and computes.
PRECISIONS = ("float32", "bfloat16", "int8")


def save_backbone(encoder, path, precision="float32"):
    """Writes an encoder without the options of its pretraining.

    The saved encoder has no dropout, and computes in the given precision,
    whatever the given encoder does: mixed precision and dropout belong to the
    run that used them.

    Args:
        encoder: A built `VisionEncoder`.
        path: Path of the file to write; must end in `.keras`.
        precision: "float32"; "bfloat16", for half the size; or "int8", for
            about a quarter: products of integers, all else in float32.

    Raises:
        ValueError: If the precision is not one of these.
    """
    arguments.check_choice(PRECISIONS, precision=precision)
    changes = dict(PLAIN)
    if precision == "bfloat16":
        changes["dtype"] = "bfloat16"
    plain = rebuilt(encoder, **changes)
    if precision == "int8":
        plain.quantize("int8")
    with replacing(path) as unfinished:
        plain.save(unfinished)


def load_backbone(path, image_size=None, dtype=None):
    """Loads an encoder that `save_backbone` wrote, or that of a preset.

    `keras.saving.load_model` loads the file as well, without changes of size
    or dtype.

    Args:
        path: Path of a `.keras` file of a `VisionEncoder`, or a preset: its
            folder, `hf://user/name` or the name of one in this package.
        image_size: Side of the images in pixels, or (height, width). Learned
            positions are resampled if the size differs from that of training.
        dtype: Keras dtype policy to compute in, such as "mixed_bfloat16".

    Returns:
        A built `VisionEncoder`.

    Raises:
        ValueError: If the file holds something else, a preset is damaged, or
            the size is not a multiple of the patch size.
    """
    path = preset_folder.locate(path)
    if preset_folder.is_preset(path):
        encoder = preset_folder.load_encoder(path)
    else:
        encoder = keras.saving.load_model(path, compile=False)
    if not isinstance(encoder, VisionEncoder):
        raise ValueError(
            "`path` must be the file of a vision encoder, as written by "
            "`cappa-export --what=backbone`. Received: "
            f"{path}, which holds a {type(encoder).__name__}"
        )
    changes = {"image_size": image_size, "dtype": dtype}
    changes = {k: v for k, v in changes.items() if v is not None}
    if changes and encoder.quantization is not None:
        raise ValueError(
            "A quantized encoder keeps the size and dtype that it was exported "
            f"with. Received: {changes}, {path} in {encoder.quantization}"
        )
    return rebuilt(encoder, **changes) if changes else encoder


def agreement(encoder, other, images):
    """How much the pooled features of two encoders agree.

    Args:
        encoder: A built `VisionEncoder`.
        other: Another one for images of the same size.
        images: float [B, H, W, 3] in [-1, 1].

    Returns:
        (mean, least) cosine of the features of an image.
    """
    found = []
    for one in (encoder, other):
        outputs = one(images, training=False)
        pooled = outputs.get("pre_logits")
        if pooled is None:
            pooled = keras.ops.mean(outputs["encoded"], axis=1)
        pooled = keras.ops.cast(pooled, "float32")
        found.append(keras.ops.normalize(pooled, axis=-1))
    cosines = keras.ops.sum(found[0] * found[1], axis=-1)
    return float(keras.ops.mean(cosines)), float(keras.ops.min(cosines))
