"""Labeled images whose classes a pixel's color tells, and encoders of them."""

import io

import keras
import numpy as np
from PIL import Image

from cappa_tf.data import schema

SIDE = 16


def example(number, label, noise=40):
    """A PNG of noise around the color of a class; none without a label."""
    random = np.random.RandomState(number)
    colors = np.random.RandomState(0).randint(40, 216, (64, 3))
    pixels = colors[label or 0] + random.randint(-noise, noise, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype("uint8")).save(file, "PNG")
    return schema.Example(f"{number}", file.getvalue(), [], label=label)


def write(folder, splits, **metadata):
    """Writes a data set.

    Args:
        folder: Where to.
        splits: Dict split -> list of labels, one an image.
        **metadata: Of its description, such as `classes`.
    """
    examples = {
        split: [example(100 * k + i, label) for i, label in enumerate(labels)]
        for k, (split, labels) in enumerate(splits.items())
    }
    schema.write_dataset(examples, str(folder), "colors", 2, metadata=metadata)
    return str(folder)


def keras_model(pool=True):
    """A convolution with batch normalization and dropout, as an encoder."""
    image = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(8, 8, strides=8, name="patches")(image)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    if pool:
        x = keras.layers.GlobalAveragePooling2D(name="pooled")(x)
    return keras.Model(image, x)
