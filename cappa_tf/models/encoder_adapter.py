"""EncoderAdapter: any Keras vision model in the place of a `VisionEncoder`.

    keras_model = keras.saving.load_model("resnet.keras")
    encoder = EncoderAdapter(keras_model, output="conv5_block3_out",
                             value_range=(0, 255))

Abbreviations for dimensions:
    B: batch.  H, W: height and width of the image in pixels.
    P: number of patches.  N: tokens, P and those that are not patches.
    D: width.
"""

import importlib
import math

import keras
import numpy as np
from keras import ops

from cappa_tf.models.blocks import AttentionPooling
from cappa_tf.models.positions import side
from cappa_tf.utils.arguments import (
    check_choice,
    check_counts,
    check_integer,
    check_number,
    height_width,
)

# "none" is left out: features of any model can be pooled.
POOLINGS = ("gap", "map", "tok", "own")
# Packages whose classes Keras opens once they are imported.
_PACKAGES = ("keras_hub", "keras_cv")
_HEAD_WIDTH = 64


@keras.saving.register_keras_serializable("cappa_tf")
class EncoderAdapter(keras.Model):
    """A Keras model with the interface of a `VisionEncoder`.

    The model computes in its own precision and takes no dropout seeds: if it
    is trained and has dropout, that is Keras' own.

    Args:
        model: Built Keras model of images [B, H, W, 3], as its only input,
            that gives patches [B, N, D], a map [B, h, w, D], or a vector
            [B, D], which counts as one patch.
        image_size: Side of the images in pixels, or (height, width); needed
            if the model takes any size, else that of the model.
        output: Name of an output of the model, if there are several, or of
            one of its layers; None for its only output.
        pooling: Kind of `pre_logits`: "gap" (mean of the patches), "map"
            (attention pooling, whose weights are new), "tok" (the first
            token) or "own" (the vector that is the model's only output, while
            `output` names the layer of the patches).
        prefix_tokens: Tokens of the output before the patches, such as class
            token and registers: `encoded` has them, "gap" leaves them out.
        value_range: (low, high), the model's values for black and white.
        mean: Number, or one for each channel, subtracted from those values.
        std: Number or three that the difference is divided by.
        num_heads: Attention heads of "map", by default D / 64.

    Call arguments:
        images: [B, H, W, 3] in [-1, 1], as for `VisionEncoder`.
        seeds: Ignored.
        training: Whether the model runs as in training.

    Returns:
        Dict with `encoded` [B, N, D] and `pre_logits` [B, D].

    Raises:
        ValueError: If the model has other inputs or outputs.
    """

    def __init__(
        self,
        model,
        image_size=None,
        *,
        output=None,
        pooling="gap",
        prefix_tokens=0,
        value_range: tuple | list = (-1.0, 1.0),
        mean: float | tuple | list = 0.0,
        std: float | tuple | list = 1.0,
        num_heads=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_choice(POOLINGS, pooling=pooling)
        check_integer("prefix_tokens", prefix_tokens)
        check_counts(optional=True, num_heads=num_heads)
        self.image_size = _image_size(model, image_size)
        self.model, self.output_name = _at_output(
            model, output, pooling == "own"
        )
        self.pooling = pooling
        self.prefix_tokens = prefix_tokens
        self.value_range = _numbers("value_range", value_range, 2)
        self.mean = _numbers("mean", mean, 3)
        self.std = _numbers("std", std, 3)
        if min(self.std) <= 0.0 or self.value_range[0] == self.value_range[1]:
            raise ValueError(
                "`std` must be above 0, and `value_range` two different "
                f"numbers. Received: std={std}, value_range={value_range}"
            )
        self._set_sizes(pooling, prefix_tokens)
        self.num_heads = num_heads or max(1, self.hidden_dim // _HEAD_WIDTH)
        self._pool = None
        if pooling == "map":
            self._pool = AttentionPooling(
                self.num_heads, name="pool", dtype=self.dtype_policy
            )

    def _set_sizes(self, pooling, prefix_tokens):
        # The shapes that layers promise need not be those they give
        # (KerasHub's SigLIPVisionEmbedding counts a token too many).
        found = self._run(ops.zeros((1, *self.image_size, 3)))
        shape = tuple(_chosen(found, self.output_name).shape)
        if pooling == "own" and found["pre_logits"].shape[1:] != shape[-1:]:
            raise ValueError(
                "pooling='own' needs a model whose output is a vector of the "
                "width of its patches. Received: outputs of shape "
                f"{tuple(found['pre_logits'].shape)} and {shape}"
            )
        if len(shape) not in (2, 3, 4) or None in shape[1:]:
            raise ValueError(
                "The model of an encoder must give patches [B, N, D], a map "
                "[B, h, w, D] or a vector [B, D]. Received: output of shape "
                f"{shape}; `output` may name another layer"
            )
        self.hidden_dim = shape[-1]
        tokens = int(np.prod(shape[1:-1]))
        if prefix_tokens >= tokens or (prefix_tokens and len(shape) != 3):
            raise ValueError(
                "`prefix_tokens` must leave patches in an output [B, N, D]. "
                f"Received: prefix_tokens={prefix_tokens}, output of shape "
                f"{shape}"
            )
        if pooling == "tok" and len(shape) != 3:
            raise ValueError(
                "pooling='tok' takes the first token of an output [B, N, D]. "
                f"Received: output of shape {shape}"
            )
        patches = tokens - prefix_tokens
        root = side(patches)
        self.grid = (root, root) if root else (1, patches)
        if len(shape) == 4:
            self.grid = shape[1:3]
        self._tokens = tokens

    def build(self, input_shape=None):
        """Creates the weights of the pooling; the model has its own."""
        del input_shape
        if self._pool is not None and not self._pool.built:
            self._pool.build((None, self._tokens, self.hidden_dim))
        # Checkpoints know variables by their paths. Those of a model that was
        # made elsewhere may repeat, or depend on how many layers this process
        # has made.
        for i, variable in enumerate(self.model.weights):
            variable._path = f"{self.name}/model/{i:04d}_{variable.name}"
        self.built = True

    def build_from_config(self, config):
        """Builds an encoder that is being loaded."""
        del config
        self.build()

    def call(self, images, seeds=None, training=False):
        """Encodes images [B, H, W, 3]; the class describes the outputs."""
        del seeds
        if tuple(images.shape[1:]) != (*self.image_size, 3):
            raise ValueError(
                f"Images must be [B, {self.image_size[0]}, "
                f"{self.image_size[1]}, 3]. Received: shape={images.shape}"
            )
        outputs = self._run(images, training)
        shape = (-1, self._tokens, self.hidden_dim)
        encoded = _chosen(outputs, self.output_name)
        encoded = ops.cast(ops.reshape(encoded, shape), self.compute_dtype)
        if self.pooling == "own":
            pooled = ops.cast(outputs["pre_logits"], self.compute_dtype)
        else:
            pooled = self.pool(encoded)
        return {"encoded": encoded, "pre_logits": pooled}

    def _run(self, images, training=False):
        """The model's outputs for images in [-1, 1]."""
        low, high = self.value_range
        scale = (high - low) / 2.0 / np.array(self.std)
        offset = ((high + low) / 2.0 - np.array(self.mean)) / self.std
        x = ops.cast(images, "float32")
        if not (np.all(scale == 1.0) and np.all(offset == 0.0)):
            x = x * scale.astype("float32") + offset.astype("float32")
        return self.model(self._inputs(x), training=training)

    def _inputs(self, images):
        """Images in the structure of the model's input."""
        names = getattr(self.model, "input", None)
        return (
            dict.fromkeys(names, images) if isinstance(names, dict) else images
        )

    def pool(self, encoded):
        """Pools `encoded` [B, N, D] to `pre_logits` [B, D], if not "own"."""
        if self.pooling == "own":
            raise ValueError(
                "The model pools by itself. Received: pooling='own'; set "
                "`pooling` to 'gap' or 'map'"
            )
        if self.pooling == "map":
            return self._pool(encoded)
        if self.pooling == "tok":
            return encoded[:, 0]
        return ops.mean(encoded[:, self.prefix_tokens :], axis=1)

    def pooling_weights(self):
        """Arrays of the weights of the attention pooling."""
        return self._pool.get_weights()

    def set_pooling_weights(self, values):
        """Sets the weights of the attention pooling."""
        self._pool.set_weights(values)

    def output_shapes(self):
        """Dict name -> shape of an image's output in inference."""
        return {
            "encoded": (self._tokens, self.hidden_dim),
            "pre_logits": (self.hidden_dim,),
        }

    def get_config(self):
        """Returns the constructor's arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "model": serialize(self.model),
            "image_size": self.image_size,
            "output": self.output_name,
            "pooling": self.pooling,
            "prefix_tokens": self.prefix_tokens,
            "value_range": self.value_range,
            "mean": self.mean,
            "std": self.std,
            "num_heads": self.num_heads,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuilds the adapter and its model, with new weights."""
        model = config["model"]
        import_packages(str(model))
        model = keras.saving.deserialize_keras_object(model)
        return cls(**{**config, "model": model})


def import_packages(description):
    """Imports the packages whose classes a model consists of.

    Args:
        description: Text of the model's Keras configuration.

    Raises:
        ValueError: If one is not installed.
    """
    for name in _PACKAGES:
        if name in description:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ValueError(
                    f"The model consists of layers of {name}. Received: {error}"
                ) from error


def _image_size(model, image_size):
    """The size of a model's images, which it may leave open."""
    inputs = getattr(model, "inputs", None)
    own = (None, None)
    if inputs:
        shape = tuple(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or shape[3] not in (3, None):
            raise ValueError(
                "The model of an encoder must take images [B, H, W, 3] as its "
                "only input. Received: inputs of shape "
                f"{[tuple(x.shape) for x in inputs]}"
            )
        own = shape[1:3]
    if image_size is None:
        image_size = own
        if None in own:
            raise ValueError(
                "The model takes images of any size: set `image_size` "
                "(IMAGE_SIZE). Received: image_size=None"
            )
    size = height_width("image_size", image_size)
    if any(mine not in (None, given) for mine, given in zip(own, size)):
        raise ValueError(
            "The sizes of the images and of the model's input must be equal: "
            f"set `image_size` (IMAGE_SIZE) to {own}, as only the positions "
            "of a VisionEncoder are resampled. Received: "
            f"image_size={image_size}"
        )
    return size


def _at_output(model, output, keep=False):
    """Cuts a model off at a layer.

    Args:
        model: Keras model.
        output: Name of a layer or of an output, or None.
        keep: Whether to keep the model's own output as well.

    Returns:
        (the model, the name of the wanted output if it has several).
    """
    own = getattr(model, "output", None)
    if keep and isinstance(own, dict) and set(own) == {"encoded", "pre_logits"}:
        return model, "encoded"
    layers = getattr(model, "layers", ()) if own is not None else ()
    for layer in layers:
        if layer.name != output:
            continue
        outputs = layer.output
        if keep:
            outputs = {"encoded": layer.output, "pre_logits": own}
        elif outputs is own:
            return model, None
        model = keras.Model(model.input, outputs, name=model.name)
        return model, "encoded" if keep else None
    if keep:
        raise ValueError(
            "pooling='own' needs a functional model, and `output` to be its "
            f"layer of patches. Received: output={output!r}"
        )
    return model, output


def _chosen(outputs, name):
    """One output of a model that may have several."""
    if not isinstance(outputs, dict | list | tuple):
        if name is None:
            return outputs
        outputs = {}
    if not isinstance(outputs, dict):
        outputs = {str(i): value for i, value in enumerate(outputs)}
    if name is None and len(outputs) == 1:
        return next(iter(outputs.values()))
    if name not in outputs:
        raise ValueError(
            "`output` must be the name of one of the model's outputs or "
            f"layers. Received: output={name!r}, outputs {list(outputs)}"
        )
    return outputs[name]


def _numbers(name, value, count):
    """A tuple of `count` numbers, from as many or from one."""
    values = value if isinstance(value, list | tuple) else (value,) * count
    if len(values) != count:
        raise ValueError(
            f"`{name}` must be {count} numbers. Received: {name}={value!r}"
        )
    return tuple(check_number(name, one, -math.inf) for one in values)
