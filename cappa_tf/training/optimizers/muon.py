"""Muon: orthogonalized momentum for the matrices, AdamW for the rest.

The momentum of a matrix is replaced by the nearest (semi-)orthogonal matrix, so
that directions with small singular values are learned as fast as the others
(K. Jordan and others, "Muon: An optimizer for hidden layers in neural
networks", 2024, https://kellerjordan.github.io/posts/muon). The update is
scaled to the root mean square of AdamW's, so that both have the same learning
rate and decay (arXiv 2502.16982, section 2.2).
"""

import math

import keras
import tensorflow as tf
from keras import ops

from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.optimizers.base import moving_average
from cappa_tf.training.optimizers.multipliers import Multipliers
from cappa_tf.training.optimizers.schedules import Schedule
from cappa_tf.utils.arguments import check_names, check_number

# Of the polynomial a x + b x^3 + c x^5 that brings all singular values near 1
# in five steps, faster than one that converges to it.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# Root mean square of an update of AdamW, as measured in arXiv 2502.16982.
_SCALE = 0.2


@keras.saving.register_keras_serializable("cappa_tf")
class Muon(AdamW):
    """Muon with the clipping, decay and schedule of `ScheduledOptimizer`.

    Kernels of hidden layers are updated by Muon, in which case they have one
    moment; all else (embeddings, positions, biases, scales and the layers of
    `adamw_layers`) as by `AdamW`. A kernel of more than two dimensions is taken
    as the matrix from all its inputs to all its outputs, such as those of all
    heads. The direction of a matrix is computed in float32, in 15 products:
    FLOPs in proportion to its size times its smaller side, whatever the batch.

    Args:
        learning_rate: Base learning rate, one that suits AdamW.
        schedule: A `schedules.Schedule`; `None` for a constant multiplier 1.
        weight_decay: Decoupled decay of kernels, as of `AdamW`.
        global_clip_norm: Largest global gradient norm; `None` to not clip.
        momentum: Weight of the past in the momentum of matrices, in which
            Nesterov's form is used.
        adamw_layers: Names of layers whose kernels are no matrices between
            hidden features, but read pixels or yield logits.
        beta_1: Decay of the average gradient, of AdamW.
        beta_2: Decay of the average squared gradient, of AdamW.
        epsilon: Added to the root of the second moment, of AdamW.
        momentum_dtype: Type of the stored first moments, "float32" or
            "bfloat16".
        use_ema: If `True`, keeps a moving average of the weights.
        ema_momentum: Weight of the past in that average.
        name: Name of the optimizer.
        multipliers: `multipliers.Multipliers`, or `None`.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        schedule: Schedule | None = None,
        weight_decay=1e-4,
        global_clip_norm: float | None = 1.0,
        momentum=0.95,
        adamw_layers: list | tuple = ("head", "patches"),
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        momentum_dtype="float32",
        use_ema=False,
        ema_momentum=0.999,
        name="muon",
        multipliers: Multipliers | None = None,
    ):
        super().__init__(
            learning_rate=learning_rate,
            schedule=schedule,
            weight_decay=weight_decay,
            global_clip_norm=global_clip_norm,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            momentum_dtype=momentum_dtype,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            name=name,
            multipliers=multipliers,
        )
        self.momentum = check_number("momentum", momentum, 0.0, 1.0 - 1e-6)
        check_names(adamw_layers=adamw_layers)
        self.adamw_layers = tuple(adamw_layers)

    def adapts(self, variable):
        """Whether a variable is updated as by AdamW."""
        *layers, name = variable.path.split("/")
        is_matrix = name.split(":")[0] == "kernel" and len(variable.shape) > 1
        return not is_matrix or not set(layers).isdisjoint(self.adamw_layers)

    def direction(self, gradient, state, step):
        """Orthogonalized momentum of a matrix; the direction of AdamW else."""
        if len(state) == 2:
            return super().direction(gradient, state, step)
        (average,) = state
        average = moving_average(average, gradient, self.momentum)
        ahead = moving_average(average, gradient, self.momentum)
        return _SCALE * orthogonalized(ahead), (average,)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "adamw_layers": list(self.adamw_layers),
        }


def orthogonalized(kernel):
    """The kernel with all singular values near 1, times the root of its side.

    Args:
        kernel: float32 tensor of two or more dimensions, a matrix [inputs,
            outputs]: of more than two, either the first or the last dimension
            is one side of it, whichever is larger.

    Returns:
        Tensor of the same shape. The singular values of its matrix are 0.6 to
        1.3 times the root of the matrix's larger side, which makes the root
        mean square of its numbers about 1; those below a hundredth of the
        matrix's norm remain smaller.
    """
    shape = kernel.shape.as_list()
    first = shape[0] >= shape[-1]
    matrix = ops.reshape(kernel, [shape[0], -1] if first else [-1, shape[-1]])
    rows, columns = matrix.shape
    if rows > columns:
        matrix = ops.transpose(matrix)
    # The norm bounds the singular values by 1. A gradient of zeros stays one.
    x = matrix / (tf.norm(matrix) + 1e-12)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        square = tf.matmul(x, x, transpose_b=True)
        x = a * x + tf.matmul(b * square + c * tf.matmul(square, square), x)
    if rows > columns:
        x = ops.transpose(x)
    return ops.reshape(x, shape) * math.sqrt(max(rows, columns))
