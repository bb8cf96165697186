"""Block style: how the Transformer blocks of published models differ.

    style = BlockStyle(norm="rms_norm", post_norm=True, gated_mlp=True)
    encoder = VisionEncoder(style=style)

The default is big_vision's block, which CapPa uses.
"""

import dataclasses
import math

import keras
from keras import ops

from cappa_tf.models.norms import RMSNorm, layer_norm
from cappa_tf.utils.arguments import check_bool, check_choice

# gelu is about x sigmoid(x (a + b x^2)), as (1 + tanh(z)) / 2 = sigmoid(2 z).
_A = 2 * math.sqrt(2 / math.pi)
_B = 0.044715 * _A


def gelu_tanh(x):
    """The tanh approximation of gelu, of any shape.

    Under TensorFlow, `ops.gelu` is ten operations (with a power, the slowest),
    whose results are kept for the gradient: they took a seventh of the CPU time
    of a training step and a fifth of its memory. Here the gradient computes
    them again from x.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.gelu(x, approximate=True)
    return _gelu_tanh(x)


@ops.custom_gradient
def _gelu_tanh(x):
    # At least in float32, as CPUs compute a sigmoid of bfloat16 in twice the
    # time, and little would be left of 1 - sigmoid(z).
    dtype = x.dtype
    wider = keras.backend.result_type(dtype, "float32")

    def gradient(upstream):
        wide = ops.cast(x, wider)
        square = ops.square(wide)
        z = wide * (_A + _B * square)
        slope = 1.0 + wide * ops.sigmoid(-z) * (_A + 3.0 * _B * square)
        slope = ops.sigmoid(z) * slope
        return ops.cast(ops.cast(upstream, wider) * slope, dtype)

    wide = ops.cast(x, wider)
    y = wide * ops.sigmoid(wide * (_A + _B * ops.square(wide)))
    return ops.cast(y, dtype), gradient


_ACTIVATIONS = {
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "silu": ops.silu,
    "relu": ops.relu,
}
_NORMS = ("layer_norm", "rms_norm")


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """How the blocks of a tower are made, and its final norm.

    Attributes:
        norm: "layer_norm" or "rms_norm".
        norm_scale: Whether the norms at the beginning of each branch, in the
            MLP and at the end of the tower have a scale. (Others always have.)
        use_bias: Whether projections and LayerNorms have biases, all of the
            tower's but those of the output head and of a pooling head. None
            keeps the tower's own rule: everywhere in an encoder, as the
            argument `use_bias` says in a decoder.
        post_norm: Whether the output of each attention has a norm of its own
            before it is added, and the hidden layer of the MLP another one
            (NormFormer, arXiv 2110.09456).
        query_key_norm: Whether queries and keys of each head have an RMSNorm,
            whose scale the heads share.
        gated_mlp: Whether the hidden layer of the MLP is the product of an
            activated layer and a linear one (arXiv 2002.05202).
        activation: "gelu_tanh", "gelu" (exact), "silu" or "relu".
    """

    norm: str = "layer_norm"
    norm_scale: bool = True
    use_bias: bool | None = None
    post_norm: bool = False
    query_key_norm: bool = False
    gated_mlp: bool = False
    activation: str = "gelu_tanh"

    def __post_init__(self):
        check_choice(_NORMS, norm=self.norm)
        check_choice(tuple(_ACTIVATIONS), activation=self.activation)
        check_choice((None, True, False), use_bias=self.use_bias)
        check_bool(
            norm_scale=self.norm_scale,
            post_norm=self.post_norm,
            query_key_norm=self.query_key_norm,
            gated_mlp=self.gated_mlp,
        )

    @classmethod
    def of(cls, value):
        """A style from an argument: None, a style, or the dict of one.

        Raises:
            ValueError: If it is something else, or a field is unknown.
        """
        if value is None or isinstance(value, cls):
            return value or cls()
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or value.keys() - names:
            raise ValueError(
                f"`style` must be None, a BlockStyle or a dict of its fields "
                f"{sorted(names)}. Received: style={value!r}"
            )
        return cls(**value)

    def in_config(self):
        """The entry of a layer's configuration, a dict JSON can hold.

        It is empty for the default, so that what is derived from a
        configuration (the key of cached features) is as it was before there
        were styles.
        """
        if self == BlockStyle():
            return {}
        return {"style": dataclasses.asdict(self)}

    def bias(self, default):
        """Whether there are biases where the tower's own rule is `default`."""
        return default if self.use_bias is None else self.use_bias

    def make_norm(self, name, dtype, use_bias=True, use_scale=None):
        """Makes a norm layer of this style.

        Args:
            name: Name of the layer.
            dtype: Its dtype policy.
            use_bias: Whether the tower's own rule is a bias; RMSNorm has none.
            use_scale: Whether it has a scale; None for `norm_scale`.
        """
        scale = self.norm_scale if use_scale is None else use_scale
        if self.norm == "rms_norm":
            return RMSNorm(scale, name=name, dtype=dtype)
        return layer_norm(name, dtype, self.bias(use_bias), scale)

    def activate(self, x, fused=False):
        """The activation of x, of any shape.

        Args:
            x: A tensor.
            fused: Whether nothing else uses x, and it is the result of `linear`
                with a bias. Then TensorFlow fuses `ops.gelu` with that on CPUs.
        """
        if fused and self.activation == "gelu_tanh":
            return ops.gelu(x, approximate=True)
        return _ACTIVATIONS[self.activation](x)


def check_default_style(part, purpose):
    """Checks that a tower is made as big_vision's are.

    Args:
        part: A `VisionEncoder`, `TextDecoder` or other tower.
        purpose: What can hold no other one, for the message.

    Raises:
        ValueError: If its blocks, positions or registers are others.
    """
    wrong = []
    style = getattr(part, "style", BlockStyle())
    if style != BlockStyle():
        wrong.append(f"style={style}")
    if getattr(part, "position_embedding", None) in ("factorised", "rotary"):
        wrong.append(f"position_embedding={part.position_embedding!r}")
    elif getattr(part, "position_grid", None):
        wrong.append(f"position_grid={part.position_grid}")
    if getattr(part, "num_registers", 0):
        wrong.append(f"num_registers={part.num_registers}")
    if wrong:
        raise ValueError(
            f"{purpose} holds towers of the default block style, with learned "
            "or sincos2d positions and without registers. Received: "
            f"{part.name} with {', '.join(wrong)}"
        )
