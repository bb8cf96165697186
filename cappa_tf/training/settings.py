"""The numbers of a run, in the four objects that `train.train` takes.

Each is frozen and checked when it is made. A gin file binds them by name
(`settings.RunSettings.total_steps = 1000`), as gin/runs/pretrain.gin does.
"""

import dataclasses

from cappa_tf.utils import arguments

PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long a run trains, on how much at once, and how often it saves.

    Raises:
        ValueError: Naming the first that is of the wrong type or too small.
    """

    total_steps: int
    """Optimizer steps of the whole run."""

    batch_size: int
    """Examples a step, over all devices and microbatches."""

    accumulation_steps: int = 1
    """Microbatches whose gradients make one step."""

    steps_per_loop: int = 50
    """Most steps run on the device in one call."""

    log_steps: int = 50
    """Steps between log lines."""

    checkpoint_steps: int = 1000
    """Steps between checkpoints."""

    keep_checkpoints: int = 3
    """How many of them to keep."""

    seed: int = 0
    """Of initial weights and of the data order. (A captioner's own `seed`
    decides its draws.)"""

    def __post_init__(self):
        counts = dataclasses.asdict(self)
        arguments.check_integer("seed", counts.pop("seed"), 0)
        arguments.check_counts(**counts)

    @property
    def microbatch(self):
        """Examples that go through at once, over all devices."""
        return self.batch_size // self.accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When a run is measured, on what, and what is kept of it.

    Raises:
        ValueError: Naming the first that is of the wrong type or too small.
    """

    eval_steps: int | None = None
    """Steps between validations; None only at the end."""

    evaluator_steps: int | None = None
    """Steps between runs of the evaluators; None only at the end."""

    eval_batch_size: int | None = None
    """Examples at once in evaluation, over all devices; by default those of a
    training microbatch."""

    sample_images: int = 8
    """Evaluation images captioned at every validation, where the model
    captions; 0 for none."""

    final_evaluation: bool = True
    """Whether to caption the test split at the end, or, where the model does
    not caption, to measure on it what validation measures."""

    final_weights: str = "last"
    """Weights to end with: "last", or "best" by validation."""

    caption_metrics: bool = False
    """Whether the final evaluation computes BLEU and CIDEr of captions."""

    sheet_images: int = 24
    """Captioned images on the final sheet."""

    def __post_init__(self):
        arguments.check_counts(
            optional=True,
            eval_steps=self.eval_steps,
            evaluator_steps=self.evaluator_steps,
            eval_batch_size=self.eval_batch_size,
        )
        arguments.check_integer("sample_images", self.sample_images, 0)
        arguments.check_integer("sheet_images", self.sheet_images, 0)
        arguments.check_bool(
            final_evaluation=self.final_evaluation,
            caption_metrics=self.caption_metrics,
        )
        arguments.check_choice(
            ("last", "best"), final_weights=self.final_weights
        )

    def batch_size(self, settings):
        """Examples at once in evaluation.

        Args:
            settings: The run's `RunSettings`.
        """
        return self.eval_batch_size or settings.microbatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """What a run computes on, and how exactly.

    Raises:
        ValueError: Naming the first that is of the wrong type or unknown.
    """

    strategy: str = "auto"
    """"auto", "one", "mirrored", "multi_worker" or "tpu", see
    `make_strategy`."""

    devices: list | None = None
    """Device names for one or mirrored; None for all."""

    precision: str | None = None
    """Dtype policy: "float32", "mixed_bfloat16", "bfloat16"; None keeps the
    policy that is set."""

    jit_compile: bool | str = "auto"
    """True, False, or "auto": XLA where there is an accelerator that it
    compiles for."""

    deterministic: bool = False
    """Use deterministic kernels only: the same run gives the same weights, bit
    by bit, on the same kind of device."""

    def __post_init__(self):
        arguments.check_choice((None, *PRECISIONS), precision=self.precision)
        arguments.check_choice(
            (True, False, "auto"), jit_compile=self.jit_compile
        )
        arguments.check_bool(deterministic=self.deterministic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Where the first weights come from, and which are not trained.

    Parts are those of the model's `Task.parts`: "vision_encoder" and
    "text_decoder" of a captioner.

    Raises:
        ValueError: Naming the first that is of the wrong type.
    """

    initialize_from: str | None = None
    """Folder of a run, `.keras` file or npz file of big_vision that the
    weights are read from before the first step; None for random ones."""

    initialize_parts: list | tuple | None = None
    """The parts to read; None for all of the model."""

    frozen_parts: list | tuple = ()
    """Parts whose weights stay as they are: without gradients, decay or
    optimizer state, and computed as in inference (nothing is dropped)."""

    def __post_init__(self):
        path, parts = self.initialize_from, self.initialize_parts
        if path is not None and not (isinstance(path, str) and path):
            raise ValueError(
                "`initialize_from` must be a path or None. Received: "
                f"initialize_from={path!r}"
            )
        if parts is not None:
            arguments.check_names(initialize_parts=parts)
            if path is None or not parts:
                raise ValueError(
                    "`initialize_parts` must name parts to read from "
                    "`initialize_from`. Received: "
                    f"initialize_parts={parts!r}, initialize_from={path!r}"
                )
        arguments.check_names(frozen_parts=self.frozen_parts)
