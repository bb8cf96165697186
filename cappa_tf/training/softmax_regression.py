"""Softmax regression: the head of a linear probe, fitted to fixed features.

Abbreviations for dimensions:
    N: examples.  D: width of the features.  C: classes.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from cappa_tf.utils.arguments import check_extra

# Examples whose logits are held in memory at a time.
_CHUNK = 16_384


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear head on features that are not standardized.

    Attributes:
        kernel: float32 [D, C].
        bias: float32 [C].
        steps: Steps that were taken.
        converged: Whether another step would have changed hardly anything.
    """

    kernel: np.ndarray
    bias: np.ndarray
    steps: int
    converged: bool

    def logits(self, features):
        """Logits float32 [N, C] of features float [N, D]."""
        parts = [
            np.asarray(features[i : i + _CHUNK], np.float32) @ self.kernel
            for i in range(0, len(features), _CHUNK)
        ]
        return np.concatenate(parts) + self.bias


class SoftmaxRegression:
    """Cross-entropy of a linear head, plus decay / 2 of its squared weights.

    Features are standardized by their own mean and standard deviation, which
    the heads then contain; the decay is that of weights of standardized
    features. The bias is not decayed.

    Args:
        features: float [N, D].
        labels: int [N], from 0 to C - 1.
        num_classes: C.
    """

    def __init__(self, features, labels, num_classes):
        self._labels = np.asarray(labels, np.int64)
        self._shape = (features.shape[1], num_classes)
        # In float64, where a sum over a million rows is exact enough.
        total, squares = 0.0, 0.0
        for some in _chunks(features):
            some = some.astype(np.float64)
            total, squares = total + some.sum(0), squares + (some**2).sum(0)
        self._mean = total / len(features)
        variance = np.maximum(squares / len(features) - self._mean**2, 0.0)
        # A feature that never changes tells nothing.
        self._std = np.sqrt(variance) + 1e-6 * (1.0 + np.abs(self._mean))
        self._features = np.concatenate(
            [
                ((some - self._mean) / self._std).astype(np.float32)
                for some in _chunks(features)
            ]
        )

    def _head(self, kernel, bias, steps, converged):
        kernel = kernel / self._std[:, None]
        return Head(
            kernel.astype(np.float32),
            (bias - self._mean @ kernel).astype(np.float32),
            steps,
            converged,
        )

    # Full-batch L-BFGS.

    def lbfgs(self, decay, max_steps=300, start=None):
        """Finds the minimum with L-BFGS on the whole batch.

        Args:
            decay: Weight decay.
            max_steps: Maximum number of iterations.
            start: `Head` of a similar decay to start from; None for zeros.

        Returns:
            A `Head`.

        Raises:
            ImportError: If SciPy is not installed.
        """
        check_extra("The solver 'lbfgs'", "eval", "scipy")
        from scipy import optimize

        width, classes = self._shape
        initial = np.zeros((width + 1, classes))
        if start is not None:
            initial[:-1] = start.kernel * self._std[:, None]
            initial[-1] = start.bias + self._mean @ start.kernel
        loss_and_gradient = self._loss_and_gradient(decay)
        found = optimize.minimize(
            loss_and_gradient,
            initial.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_steps, "maxcor": 20, "gtol": 1e-5},
        )
        weights = found.x.reshape(width + 1, classes)
        return self._head(
            weights[:-1], weights[-1], int(found.nit), bool(found.success)
        )

    def _loss_and_gradient(self, decay):
        """Function of weights float64 [(D + 1) * C] to (loss, gradient)."""
        width, classes = self._shape
        data = tf.data.Dataset.from_tensor_slices(
            (self._features, self._labels)
        )
        chunks = list(data.batch(_CHUNK))  # On the device once.

        @tf.function(reduce_retracing=True, autograph=False)
        def of_chunk(weights, features, labels):
            # In float32 the line search fails before the minimum: losses that
            # it has to compare differ by less than they are rounded by.
            features = tf.cast(features, tf.float64)
            kernel, bias = weights[:-1], weights[-1]
            logits = features @ kernel + bias
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                labels, logits
            )
            wrong = tf.nn.softmax(logits)
            wrong -= tf.one_hot(labels, classes, dtype=tf.float64)
            gradient = tf.matmul(features, wrong, transpose_a=True)
            return tf.reduce_sum(losses), tf.concat(
                [gradient, tf.reduce_sum(wrong, axis=0)[None]], axis=0
            )

        def total(flat):
            weights = flat.reshape(width + 1, classes)
            found = tf.constant(weights, tf.float64)
            parts = [of_chunk(found, *chunk) for chunk in chunks]
            loss = sum(float(part[0]) for part in parts) / len(self._labels)
            gradient = sum(part[1].numpy().astype(np.float64) for part in parts)
            gradient /= len(self._labels)
            gradient[:-1] += decay * weights[:-1]
            loss += decay / 2 * float((weights[:-1] ** 2).sum())
            return loss, gradient.ravel()

        return total

    # Stochastic gradient descent.

    def sgd(self, learning_rate, decay, epochs=50, batch_size=512, seed=0):
        """Minimizes with momentum 0.9 and a cosine schedule.

        Args:
            learning_rate: First learning rate.
            decay: Weight decay.
            epochs: Passes over the examples.
            batch_size: Examples of a step.
            seed: Seed of the order.

        Returns:
            A `Head`.
        """
        width, classes = self._shape
        batch_size = min(batch_size, len(self._labels))
        per_epoch = len(self._labels) // batch_size
        steps = epochs * per_epoch
        kernel = keras.Variable("zeros", (width, classes), "float32")
        bias = keras.Variable("zeros", (classes,), "float32")
        optimizer = keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(learning_rate, steps), 0.9
        )
        optimizer.build([kernel, bias])

        @tf.function(autograph=False)
        def step(features, labels):
            weights = kernel.value
            logits = features @ weights + bias.value
            wrong = tf.nn.softmax(logits) - tf.one_hot(labels, classes)
            gradient = tf.matmul(features, wrong, transpose_a=True)
            optimizer.apply(
                [
                    gradient / batch_size + decay * weights,
                    tf.reduce_mean(wrong, axis=0),
                ]
            )

        for epoch in range(epochs):
            order = np.random.default_rng((seed, epoch)).permutation(
                len(self._labels)
            )
            for i in range(per_epoch):
                rows = order[i * batch_size : (i + 1) * batch_size]
                step(self._features[rows], self._labels[rows])
        return self._head(
            kernel.numpy().astype(np.float64),
            bias.numpy().astype(np.float64),
            steps,
            True,
        )


def _chunks(features):
    for start in range(0, len(features), _CHUNK):
        yield np.asarray(features[start : start + _CHUNK], np.float32)
