"""Settings of a run: the five objects that `train.train` takes.

Each is frozen and validated on construction. A gin file binds the fields by
name (`settings.RunSettings.total_steps = 1000`), as gin/runs/pretrain.gin does.
"""

import dataclasses

from cappa_tf.utils import arguments

FEATURE_TYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Length of a run, its batch size, and how often it logs and saves.

    Raises:
        ValueError: If a field is of the wrong type or too small; names it.
    """

    total_steps: int
    """Optimizer steps of the whole run."""

    batch_size: int
    """Examples per step, over all devices and microbatches."""

    accumulation_steps: int = 1
    """Microbatches whose gradients are summed for one step."""

    steps_per_loop: int = 50
    """Maximum number of steps run on the device in one call."""

    log_steps: int = 50
    """Steps between log lines."""

    checkpoint_steps: int = 1000
    """Steps between checkpoints."""

    keep_checkpoints: int = 3
    """Number of checkpoints to keep."""

    seed: int = 0
    """Seed of the initial weights and of the data order. (A captioner's own
    `seed` decides its random choices.)"""

    def __post_init__(self):
        counts = dataclasses.asdict(self)
        arguments.check_integer("seed", counts.pop("seed"), 0)
        arguments.check_counts(**counts)

    @property
    def microbatch(self):
        """Examples per forward pass, over all devices."""
        return self.batch_size // self.accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How often a run is evaluated, and what its final evaluation includes.

    Raises:
        ValueError: If a field is of the wrong type or too small; names it.
    """

    eval_steps: int | None = None
    """Steps between validations; None validates only at the end."""

    evaluator_steps: int | None = None
    """Steps between runs of the evaluators; None runs them only at the end."""

    eval_batch_size: int | None = None
    """Batch size of evaluation, over all devices; None uses the size of a
    training microbatch."""

    sample_images: int = 8
    """Number of evaluation images to caption at every validation, if the model
    can generate captions."""

    image_use_images: int = 64
    """Number of evaluation images whose captions are scored with their own
    image, with that of another example and with none at every validation, if
    the model predicts texts from images; 0 for no such report."""

    image_use_bound: float = 0.01
    """Nats per token that the own image must be worth more than that of another
    example; below, a warning says once that the decoder hardly uses the images.
    It is not given in the first tenth of a run; 0 gives none."""

    final_evaluation: bool = True
    """Whether to caption the test split at the end. The validation metrics are
    computed on it if the metric that selects the best weights is not among the
    figures of the captions, as for a model that generates none."""

    final_weights: str = "last"
    """Weights to finish with: "last", or "best" according to validation."""

    caption_metrics: bool = False
    """Whether the final evaluation computes BLEU and CIDEr of the captions."""

    sheet_images: int = 24
    """Number of captioned images on the final sheet."""

    sampler: object = None
    """How the final captions are searched, as for `Captioner.generate`, such as
    `cappa_tf.models.sampling.BeamSearch()`; None for greedy. The samples during
    training are greedy."""

    def __post_init__(self):
        if self.sampler is not None:
            # Here, so that an unknown one does not end the run at its end.
            from cappa_tf.models import sampling

            sampling.search_of(self.sampler)
        arguments.check_counts(
            optional=True,
            eval_steps=self.eval_steps,
            evaluator_steps=self.evaluator_steps,
            eval_batch_size=self.eval_batch_size,
        )
        arguments.check_integer("sample_images", self.sample_images, 0)
        arguments.check_integer("sheet_images", self.sheet_images, 0)
        arguments.check_integer("image_use_images", self.image_use_images, 0)
        arguments.check_number("image_use_bound", self.image_use_bound)
        arguments.check_bool(
            final_evaluation=self.final_evaluation,
            caption_metrics=self.caption_metrics,
        )
        arguments.check_choice(
            ("last", "best"), final_weights=self.final_weights
        )

    def batch_size(self, settings):
        """Returns the batch size of evaluation, over all devices.

        Args:
            settings: The run's `RunSettings`, for the default.
        """
        return self.eval_batch_size or settings.microbatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Devices of a run, numeric precision, compilation and determinism.

    Raises:
        ValueError: If a field is of the wrong type or unknown; names it.
    """

    strategy: str = "auto"
    """Distribution strategy: "auto", "one", "mirrored", "multi_worker" or
    "tpu", as `make_strategy` describes them."""

    devices: list | None = None
    """Device names for "one" or "mirrored"; None for all devices."""

    precision: str | None = None
    """Dtype policy: "float32", "mixed_bfloat16" or "bfloat16"; None keeps the
    current policy."""

    jit_compile: bool | str = "auto"
    """Whether to compile with XLA; "auto" does so if there is an accelerator
    that XLA supports."""

    deterministic: bool = False
    """Whether to use deterministic kernels only: the same run then gives
    bitwise the same weights on the same kind of device."""

    peak_flops: int | float | str | None = None
    """Peak of one device in FLOP/s, of which log lines and TensorBoard show the
    share that training reaches: a number, "auto" (known GPUs: the maker's
    figure; CPUs: measured once, in 0.2 s), or None to show neither this share
    nor model FLOP/s."""

    def __post_init__(self):
        arguments.check_choice((None, *PRECISIONS), precision=self.precision)
        if self.peak_flops not in (None, "auto"):
            arguments.check_number(
                "peak_flops", self.peak_flops, exclusive=True
            )
        arguments.check_choice(
            (True, False, "auto"), jit_compile=self.jit_compile
        )
        arguments.check_bool(deterministic=self.deterministic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Source of the initial weights, and the parts that are not trained.

    Parts are named as in the model's `Task.parts`: "vision_encoder" and
    "text_decoder" for a captioner; "vision_encoder", "text_encoder" and
    "contrastive_head" for a contrastive model.

    Raises:
        ValueError: If a field is of the wrong type; names it.
    """

    initialize_from: str | None = None
    """Run folder, `.keras` file, npz file of big_vision or folder of
    transformers' SigLIP from which to read the weights before the first step;
    None for random weights."""

    initialize_parts: list | tuple | None = None
    """Names of the parts to read; None for the whole model."""

    frozen_parts: list | tuple = ()
    """Names of the parts that are not trained: they get no gradients, decay or
    optimizer state, and run as in inference (without dropout)."""

    trained_parts: list | tuple = ()
    """Names of layers inside frozen parts that are trained all the same, such
    as "vision_encoder/pool", the attention pooling on frozen features."""

    def __post_init__(self):
        path, parts = self.initialize_from, self.initialize_parts
        arguments.check_paths(initialize_from=path)
        if parts is not None:
            arguments.check_names(initialize_parts=parts)
            if path is None or not parts:
                raise ValueError(
                    "`initialize_parts` must name parts to read from "
                    "`initialize_from`. Received: "
                    f"initialize_parts={parts!r}, initialize_from={path!r}"
                )
        arguments.check_names(
            frozen_parts=self.frozen_parts, trained_parts=self.trained_parts
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Whether a frozen vision encoder's features replace images in training.

    Raises:
        ValueError: If a field is of the wrong type or unknown; names it.
    """

    features: str | None = None
    """"cached" computes the features of all images once, keeps them on disk
    and trains on them; None encodes the images of each batch."""

    cache_folder: str | None = None
    """Folder of the caches, which runs may share; by default `features` below
    the run's. All hosts must see it, and it cannot be in a bucket."""

    dtype: str = "float32"
    """Type they are kept in: "float32", "float16" or "bfloat16"."""

    batch_size: int = 64
    """Images encoded at a time, by each host on one device."""

    def __post_init__(self):
        arguments.check_choice((None, "cached"), features=self.features)
        arguments.check_choice(FEATURE_TYPES, dtype=self.dtype)
        arguments.check_counts(batch_size=self.batch_size)
        folder = self.cache_folder
        if folder is not None and not (isinstance(folder, str) and folder):
            raise ValueError(
                "`cache_folder` (FEATURE_CACHE) must be a path or None. "
                f"Received: cache_folder={folder!r}"
            )
