"""The vision encoder as a file of its own, for every Keras backend.

    save_backbone(captioner.vision_encoder, "encoder.keras")
    encoder = load_backbone("encoder.keras", image_size=384)

Nothing here needs TensorFlow: with KERAS_BACKEND=jax or torch the file opens
where TensorFlow is not installed.
"""

import keras

from cappa_tf.models.positions import resample_positions
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving.weights import to_numpy, variables_by_path
from cappa_tf.utils.arguments import height_width
from cappa_tf.utils.files import replacing

_POSITIONS = "positions/position_embedding"


def save_backbone(encoder, path):
    """Writes an encoder without what only its pretraining needed.

    The file's encoder computes in float32 and drops nothing in training,
    whatever the encoder at hand does: mixed precision and dropout belong to
    the run that used them, and dropout asks for the seeds of the examples,
    which `fit` does not give.

    Args:
        encoder: A built `VisionEncoder`.
        path: File to write; ends in `.keras`.
    """
    plain = rebuilt(
        encoder, dtype="float32", dropout=0.0, patch_dropout=0.0, remat=False
    )
    with replacing(path) as unfinished:
        plain.save(unfinished)


def load_backbone(path, image_size=None, dtype=None):
    """Opens what `save_backbone` wrote.

    `keras.saving.load_model` opens it as well, as it is.

    Args:
        path: A `.keras` file of a `VisionEncoder`.
        image_size: Side of the images in pixels, or (height, width); with
            another size than that of training, learned positions are
            resampled.
        dtype: Keras dtype policy to compute in, such as "mixed_bfloat16".

    Returns:
        A built `VisionEncoder`.

    Raises:
        ValueError: If the file holds something else, or the size is no
            multiple of the patch size.
    """
    encoder = keras.saving.load_model(path, compile=False)
    if not isinstance(encoder, VisionEncoder):
        raise ValueError(
            "`path` must be a file of a vision encoder, as `cappa-export "
            "--what=backbone` writes it. Received: "
            f"{path}, which holds a {type(encoder).__name__}"
        )
    changes = {"image_size": image_size, "dtype": dtype}
    changes = {k: v for k, v in changes.items() if v is not None}
    return rebuilt(encoder, **changes) if changes else encoder


def rebuilt(encoder, **changes):
    """The same weights in an encoder with other arguments.

    Args:
        encoder: A built `VisionEncoder`.
        **changes: Arguments of `VisionEncoder` that leave the shapes of the
            weights alone, and `image_size`: learned positions are resampled
            for it.

    Returns:
        Another built `VisionEncoder`.
    """
    if "image_size" in changes:
        changes["image_size"] = height_width(
            "image_size", changes["image_size"]
        )
    other = type(encoder).from_config({**encoder.get_config(), **changes})
    other.build()
    old = variables_by_path(encoder)
    for name, variable in variables_by_path(other).items():
        value = to_numpy(old[name])
        if name == _POSITIONS:
            value = resample_positions(value, other.grid, encoder.grid)
        variable.assign(value)
    return other
