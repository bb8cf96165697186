"""The numbers of a run, checked."""

import dataclasses

from cappa_tf.utils import arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What `train.train` hands on to a run; there each is explained.

    Raises:
        ValueError: Naming the first that is of the wrong type or too small.
    """

    workdir: str
    total_steps: int
    batch_size: int
    accumulation_steps: int
    eval_batch_size: int | None
    steps_per_loop: int
    log_steps: int
    eval_steps: int | None
    evaluator_steps: int | None
    checkpoint_steps: int
    keep_checkpoints: int
    seed: int
    deterministic: bool
    jit_compile: bool | str
    sample_images: int
    final_evaluation: bool
    final_weights: str
    caption_metrics: bool
    sheet_images: int

    def __post_init__(self):
        if not isinstance(self.workdir, str) or not self.workdir:
            raise ValueError(
                f"`workdir` must be a path. Received: workdir={self.workdir!r}"
            )
        counts = (
            "total_steps batch_size accumulation_steps steps_per_loop "
            "log_steps checkpoint_steps keep_checkpoints"
        )
        arguments.check_counts(**self._named(counts))
        arguments.check_counts(
            optional=True,
            **self._named("eval_batch_size eval_steps evaluator_steps"),
        )
        for name, value in self._named(
            "seed sample_images sheet_images"
        ).items():
            arguments.check_integer(name, value, 0)
        arguments.check_bool(
            **self._named("deterministic final_evaluation caption_metrics")
        )
        arguments.check_choice(
            (True, False, "auto"), jit_compile=self.jit_compile
        )
        arguments.check_choice(
            ("last", "best"), final_weights=self.final_weights
        )

    def _named(self, names):
        return {name: getattr(self, name) for name in names.split()}

    @property
    def evaluation_batch(self):
        """Examples at once in evaluation, over all devices."""
        microbatch = self.batch_size // self.accumulation_steps
        return self.eval_batch_size or microbatch
