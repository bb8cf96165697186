"""Task: the interface between a trainable method and the trainer.

The loop, its metrics, TensorBoard, validation, the memory estimate and the run
folder are written against this class; `Captioner` is one task.

Abbreviations for dimensions:
    B: batch (of examples).
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from cappa_tf.models import stateless_random

# The pooling head, the one layer that reads nothing but `encoded`.
_POOL = "vision_encoder/pool"


class ExampleLosses(NamedTuple):
    """The loss of each example, and its contributions to the metrics.

    Attributes:
        loss: float32 [B]. Training minimizes its mean over the global batch.
        metrics: Dict name -> (totals, weights), each float32 [B]. The metric
            is the sum of the totals divided by the sum of the weights, over
            all examples of the reported steps. It is omitted if all weights
            are zero.
        counts: Dict name -> float32 [B], quantities reported as a rate:
            "tokens" is reported as tokens_per_second.
    """

    loss: tf.Tensor
    metrics: dict
    counts: dict

    def times(self, weight):
        """The loss times a number; all other figures as they are."""
        return self._replace(loss=self.loss * weight)

    def plus(self, other):
        """The sum of two losses of the same examples, all figures of both."""
        return ExampleLosses(
            self.loss + other.loss,
            {**self.metrics, **other.metrics},
            {**self.counts, **other.counts},
        )


class Task(keras.Model):
    """Base class of the methods that can be trained.

    A subclass defines `example_losses`, `parts`, `batch_spec` and `shapes`,
    and overrides any of the other defaults.

    Attributes:
        selection_metric: Name of the validation metric that selects the best
            weights.
        selection_mode: "min" or "max", whichever value of it is best.
        short_names: Dict from the name of a metric to its name in log lines;
            None omits the metric there.
        can_generate: Whether the model has `generate`, which captions images.
            A run then writes captions of sample images and of the test split.
        predicts_texts: Whether the model predicts texts token by token from
            images, so that `text_nll` is defined. A run then reports how much
            the texts depend on the images.
        needs_whole_batch: Whether the loss of an example depends on the others
            of the global batch, as in a `WholeBatchTask`.
        texts_may_be_cut: Whether the loss is the same if padding at the end of
            all texts of a batch is cut off.
        frozen_parts: Names of the parts that `freeze` excludes from training.
        trained_parts: Names of what is trained inside frozen parts.
        takes_features: Whether a batch may have features of a frozen vision
            encoder in place of images, see `use_features`.
        feature_kind: The output of `VisionEncoder` that batches have in place
            of images, or None.
    """

    selection_metric = "loss"
    selection_mode = "min"
    short_names = {}
    can_generate = False
    predicts_texts = False
    needs_whole_batch = False
    texts_may_be_cut = False
    frozen_parts = ()
    trained_parts = ()
    takes_features = False
    feature_kind = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._fit_metrics = {}
        self._frozen_variables = frozenset()

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructors determine."""
        del input_shape
        for name, part in self.parts.items():
            if not part.built:
                part.build()
            stateless_random.set_salt_prefix(part, name)
        if not self._fit_metrics:
            names = dict.fromkeys(["loss", self.selection_metric])
            self._fit_metrics = {n: keras.metrics.Mean(n) for n in names}
        self.built = True

    def build_from_config(self, config):
        """Builds a model that is being loaded."""
        del config
        self.build()

    def freeze(self, names, trained=()):
        """Excludes parts from training, until the next call.

        Must be called before the optimizer is built. The weights of frozen
        parts are not trainable, so they get no gradient, decay or optimizer
        state, and their layers run as in inference. The choice is not saved: a
        model or part loaded from a file can be trained as a whole.

        Args:
            names: Names of `parts`, or of layers of them that have no dropout,
                such as "contrastive_head/image"; those of an earlier call are
                trained again.
            trained: Names of layers inside them that are trained all the same,
                such as "vision_encoder/pool". They run without dropout, too.

        Raises:
            ValueError: If a name is unknown, or nothing is left to train.
        """
        inside = {
            f"{part}/{layer.name}": layer
            for part, whole in self.parts.items()
            for layer in _layers_inside(whole)
        }
        known = {**self.parts, **inside}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                "`frozen_parts` must be among the parts of the model, "
                f"{list(self.parts)}, or layers of them such as "
                f"{next(iter(inside), None)!r}. Received: {unknown}"
            )
        inside = [name for name in inside if name.partition("/")[0] in names]
        unknown = [name for name in trained if name not in inside]
        if unknown:
            raise ValueError(
                "`trained_parts` (TRAINED_PARTS) must be among the layers of "
                f"the frozen parts, {inside}. Received: {unknown}, with "
                f"frozen_parts={list(names)}"
            )
        self.frozen_parts, self.trained_parts = tuple(names), tuple(trained)
        kept = {id(v) for name in trained for v in known[name].variables}
        self._frozen_variables = frozenset(
            id(variable)
            for name in names
            for variable in known[name].variables
            if id(variable) not in kept
        )
        if not self.trainable_variables:
            raise ValueError(
                "`frozen_parts` must leave something to train. Received: "
                f"frozen_parts={list(names)}"
            )

    @property
    def trainable_variables(self):
        """The trainable variables, without those of frozen parts."""
        frozen = self._frozen_variables
        return [v for v in super().trainable_variables if id(v) not in frozen]

    def how_trained(self, part):
        """Describes which layers of a part are trained, for reports.

        Args:
            part: Name of the part.

        Returns:
            "" if all are trained, "frozen", "frozen except pool" or "image
            frozen".
        """
        prefix = f"{part}/"
        frozen, trained = (
            [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
            for names in (self.frozen_parts, self.trained_parts)
        )
        if part in self.frozen_parts:
            except_for = f" except {', '.join(trained)}" if trained else ""
            return f"frozen{except_for}"
        return f"{', '.join(frozen)} frozen" if frozen else ""

    def trains(self, part, training):
        """Returns whether the layers of a part run as in training.

        Args:
            part: Name of the part.
            training: Whether the model as a whole is being trained.
        """
        return training and part not in self.frozen_parts

    def use_features(self):
        """From now on batches have `image_features` in place of `image`.

        These are what the frozen vision encoder gives for the images:
        `pre_logits`, or `encoded` where the pooling on top is trained.

        Raises:
            ValueError: If the method needs images, or more of the encoder is
                trained.
        """
        if not self.takes_features:
            raise ValueError(
                "FEATURES='cached' is for methods that need images for nothing "
                "but their features, such as Contrastive and Captioner. "
                "Received: "
                f"{type(self).__name__}"
            )
        name = "vision_encoder"
        trained = self.trained_parts
        trained = [part for part in trained if part.startswith(f"{name}/")]
        if name not in self.frozen_parts or trained not in ([], [_POOL]):
            raise ValueError(
                "FEATURES='cached' needs a frozen vision encoder: "
                f"FROZEN_PARTS=['{name}'], and TRAINED_PARTS=['{_POOL}'] or "
                f"none of it. Received: frozen_parts={list(self.frozen_parts)}"
                f", trained_parts={list(self.trained_parts)}"
            )
        self.feature_kind = self._kind_of_features(bool(trained))

    def _kind_of_features(self, pools):
        """The output of the frozen encoder that is needed in its place.

        Args:
            pools: Whether the pooling on top of it is trained.
        """
        return "encoded" if pools else "pre_logits"

    def image_spec(self, size):
        """The part of `batch_spec` that is images, or features of images."""
        encoder = self.parts["vision_encoder"]
        if self.feature_kind is None:
            shape = (size, *encoder.image_size, 3)
            return {"image": tf.TensorSpec(shape, tf.float32)}
        shape = (size, *encoder.output_shapes()[self.feature_kind])
        return {"image_features": tf.TensorSpec(shape, tf.float32)}

    def example_losses(self, batch, training):
        """Loss and metrics of each example in a batch.

        Args:
            batch: Dict of tensors as in `batch_spec`. In evaluation it also
                has `_mask` float32 [B], 0 for padding; the caller applies it.
            training: Whether to use the random choices and the dropout of
                training.

        Returns:
            `ExampleLosses`. In evaluation `selection_metric` must be "loss"
            or one of its metrics.
        """
        raise NotImplementedError

    @property
    def parts(self):
        """Dict name -> layer of the parts to count, load and freeze by name."""
        raise NotImplementedError

    def batch_spec(self, size, captions=1):
        """Shapes and types of a training batch.

        Args:
            size: B.
            captions: Captions per image.

        Returns:
            Dict name -> `tf.TensorSpec`.
        """
        raise NotImplementedError

    def shapes(self, size, captions=1):
        """Dict name -> tuple of the main shapes inside the model.

        Args:
            size: B.
            captions: Captions per image.
        """
        raise NotImplementedError

    def check_data(self, data, name):
        """Checks that a data set fits the model.

        Args:
            data: A data set such as `CaptionDataset`.
            name: Name of the argument that holds it, for the message.

        Raises:
            ValueError: If it does not; names the file and the bindings that
                disagree.
        """

    def adopt(self, data):
        """Takes from the training data what is part of the configuration.

        The trainer calls it whenever a run starts or resumes, before it writes
        the configuration.

        Args:
            data: The training data set.
        """

    def prepare(self, data):
        """Takes from the training data what is fixed before the first step.

        The trainer calls it once when a run starts, not when it resumes: what
        it finds belongs to the weights. Every host calls it.

        Args:
            data: The training data set.

        Returns:
            A log line, or None.
        """

    def better(self, value, best):
        """Whether a value of `selection_metric` beats the best so far."""
        if best is None:
            return True
        return value < best if self.selection_mode == "min" else value > best

    # Inference, as used by `inference.predictor.Predictor`.

    def encode_images(self, images):
        """Outputs of the vision encoder in inference, the image features.

        Args:
            images: float [B, H, W, 3] in [-1, 1].

        Returns:
            Dict of `encoded` and `pre_logits` as `VisionEncoder` returns it.
        """
        return self.parts["vision_encoder"](images, training=False)

    @property
    def score_kinds(self):
        """Kinds of text scores that the model supports.

        The first is the one to rank texts by.
        """
        return ()

    def score_texts(self, images, labels, kind):
        """Scores of every text for every image.

        Args:
            images: float [B, H, W, 3] in [-1, 1]; None is allowed for "blind"
                and counts as one image.
            labels: int32 [T, L] token ids, padded.
            kind: One of `score_kinds`.

        Returns:
            float32 [B, T]; for "blind" [1, T].
        """
        raise NotImplementedError

    def score_own_texts(self, images, labels, kind):
        """Scores of each image's own texts.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            labels: int32 [B, K, L] token ids, padded.
            kind: One of `score_kinds` other than "blind".

        Returns:
            float32 [B, K].
        """
        raise NotImplementedError

    def text_nll(self, batch, with_images=True):
        """Negative log-likelihood of the texts of each example.

        Args:
            batch: Dict of tensors as in evaluation, see `example_losses`.
            with_images: False leaves the images out.

        Returns:
            (nats, tokens): float32 [B], summed over the tokens of an example,
            and their number.
        """
        raise NotImplementedError

    # Keras' own training loop.

    @property
    def metrics(self):
        """Metrics that `fit` and `evaluate` report."""
        return list(self._fit_metrics.values())

    def train_step(self, batch):
        """One step of `fit` on a batch of the form `batch_spec`."""
        variables = self.trainable_variables
        # A frozen part must not be differentiated through.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables])
            losses = self.example_losses(batch, training=True)
            # Gradients are summed over replicas, so divide by their number.
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            loss = tf.reduce_mean(losses.loss) / replicas
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(
            scaled, [variable.value for variable in variables]
        )
        self.optimizer.apply_gradients(zip(gradients, variables))
        return self._update_metrics(losses)

    def test_step(self, batch):
        """One step of `evaluate`; ignores examples whose `_mask` is 0."""
        losses = self.example_losses(batch, training=False)
        return self._update_metrics(losses, batch.get("_mask"))

    def _update_metrics(self, losses, mask=None):
        mask = tf.ones_like(losses.loss) if mask is None else mask
        figures = {"loss": (losses.loss, tf.ones_like(mask)), **losses.metrics}
        for name, metric in self._fit_metrics.items():
            total, weight = figures[name]
            mean = tf.math.divide_no_nan(total, weight)
            metric.update_state(mean, weight * mask)
        return {metric.name: metric.result() for metric in self.metrics}


class WholeBatchTask(Task):
    """Base class of tasks whose loss compares the examples of a batch.

    The trainer calls `embed` on each device and microbatch, gathers the
    embeddings of the global batch, and passes all of them to `batch_losses`.
    The gradients are then those of the whole batch, however it is split.

    A subclass defines `embed` and `batch_losses` in place of `example_losses`.
    """

    needs_whole_batch = True

    @property
    def embedding_width(self):
        """Width C of the embeddings."""
        raise NotImplementedError

    def embed(self, batch, training):
        """Embeds the examples of a batch.

        Args:
            batch: Dict of tensors as in `batch_spec`.
            training: Whether to use the random choices and the dropout of
                training.

        Returns:
            (images, texts, losses): two float32 [B, C], and `ExampleLosses` of
            the part of the loss that does not depend on other examples.
        """
        raise NotImplementedError

    def batch_losses(self, images, texts, own, mask=None):
        """Losses that compare own examples with the global batch.

        Args:
            images: float32 [global batch, C], from `embed`.
            texts: float32 [global batch, C], from `embed`.
            own: (offset, B), the examples whose losses are returned.
            mask: Optional bool [global batch], False for padding, which is not
                compared with any example.

        Returns:
            `ExampleLosses` of the B examples.
        """
        raise NotImplementedError

    def example_losses(self, batch, training):
        """Losses of a batch whose examples are compared with each other."""
        mask = batch.get("_mask")
        return self.complete(*self.embed(batch, training), mask)

    def complete(self, images, texts, losses, mask=None):
        """Losses of all examples, once they are compared with each other.

        Args:
            images: float32 [global batch, C], from `embed`, as are the others.
            texts: float32 [global batch, C].
            losses: `ExampleLosses`.
            mask: Optional float32 [global batch], 0 for padding.

        Returns:
            `ExampleLosses`.
        """
        mask = None if mask is None else mask > 0
        own = (0, images.shape[0] or tf.shape(images)[0])
        return losses.plus(self.batch_losses(images, texts, own, mask))

    def train_step(self, batch):
        """One step of `fit`, on one device."""
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "`fit` compares the examples of one device alone. Train a "
                f"{type(self).__name__} on several with cappa_tf.train, which "
                "compares those of the global batch"
            )
        return super().train_step(batch)


def _layers_inside(part):
    """A part's own layers that have weights."""
    layers = part._flatten_layers(include_self=False, recursive=False)
    return [layer for layer in layers if layer.variables]
