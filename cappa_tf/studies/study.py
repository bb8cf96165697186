"""A study: methods x seeds x sizes x lengths, as runs to be made.

    study = Study(methods=[...], images=160_000, batch_size=64, ...)
    for cell in study.cells(flops_of): ...

A cell is one run of tools/train.py with its evaluations, in a folder of its
own. Methods are matched by the images they see, by the FLOPs of training or by
its time; the others are reported beside it.
"""

import dataclasses
import itertools
import json
import re

from cappa_tf.utils import arguments

MATCHED_BY = ("images", "flops", "time")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+*-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train an encoder.

    Raises:
        ValueError: If a field is of the wrong type; names it.
    """

    name: str
    """Name in tables, unique in the study."""

    gin_files: list | tuple
    """Files for tools/train.py; later files win."""

    gin_params: list | tuple = ()
    """Bindings "NAME = VALUE" that win over the files."""

    evaluation: list | tuple = ()
    """Gin files for tools/evaluate.py in place of those of the study."""

    untrained: bool = False
    """Whether to evaluate the random weights, the baseline of all methods."""

    series: str | None = None
    """Name of an ablation that this method is a point of, such as "parallel
    share"; the report plots its points over `value`."""

    value: float | None = None
    """Where in the series it is."""

    time: float | None = None
    """Time that an image takes in training, in any unit, for studies that are
    matched by time."""

    def __post_init__(self):
        _check_name("name", self.name)
        if self.time is not None:
            arguments.check_number("time", self.time, exclusive=True)
        for field in ("gin_files", "gin_params", "evaluation"):
            arguments.check_names(**{field: getattr(self, field)})
        if not self.gin_files:
            raise ValueError(
                f"`gin_files` of method {self.name!r} must name a file. "
                "Received: gin_files=[]"
            )
        arguments.check_bool(untrained=self.untrained)
        if (self.series is None) != (self.value is None):
            raise ValueError(
                "`series` and `value` go together. Received: "
                f"series={self.series!r}, value={self.value!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A size of the model: what is bound for every method."""

    name: str
    """Name in tables and folders."""

    gin_files: list | tuple = ()
    """Files such as gin/sizes/s16.gin."""

    gin_params: list | tuple = ()
    """Bindings "NAME = VALUE"."""

    def __post_init__(self):
        _check_name("name", self.name)
        arguments.check_names(
            gin_files=self.gin_files, gin_params=self.gin_params
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """A run that starts from the encoder of each cell, such as a probe.

    Its files read the macro ENCODER, the run of the cell.
    """

    name: str
    """Name in tables and folders."""

    gin_files: list | tuple
    """Files for tools/train.py, such as gin/transfer/linear_probe.gin."""

    gin_params: list | tuple = ()
    """Bindings "NAME = VALUE"."""

    def __post_init__(self):
        _check_name("name", self.name)
        arguments.check_names(
            gin_files=self.gin_files, gin_params=self.gin_params
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: Its folder below that of the study.
        group: Name of the cells that differ from it in the seed alone.
        contrast: What it shares with the cells that it is compared with: size
            and length.
        method: `Method`.
        seed: SEED of the run.
        size: Name of the size, or None.
        batch_size: Images per step.
        steps: Steps of training; 0 for random weights.
        flops: FLOPs of training, or None if they were not counted.
        gin_files: Files for tools/train.py.
        gin_params: Bindings for tools/train.py.
        evaluation: Gin files for tools/evaluate.py.
        evaluation_params: Bindings for it.
        transfer: `Transfer`s to run from its encoder.
    """

    name: str
    group: str
    contrast: tuple
    method: Method
    seed: int
    size: str | None
    batch_size: int
    steps: int
    flops: float | None
    gin_files: tuple
    gin_params: tuple
    evaluation: tuple
    evaluation_params: tuple
    transfer: tuple = ()

    @property
    def images(self):
        """Images seen in training, repetitions counted."""
        return self.steps * self.batch_size

    def description(self):
        """What defines the cell, JSON-able: it may not change once it ran."""
        evaluate = []
        if self.evaluation:
            evaluate = _flags(self.evaluation, self.evaluation_params)
        return {
            "train": _flags(self.gin_files, self.gin_params),
            "transfer": {
                one.name: _flags(
                    one.gin_files, [*one.gin_params, f"SEED = {self.seed}"]
                )
                for one in self.transfer
            },
            "evaluate": evaluate,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Methods to compare, and what is the same for all of them.

    Raises:
        ValueError: If a field cannot be used; names it.
    """

    name: str
    """Title of the report."""

    methods: list | tuple
    """`Method`s."""

    batch_size: int
    """Images per step of every method that binds no BATCH_SIZE itself."""

    images: int | list | tuple
    """Images that a method sees in training; several lengths for a scaling
    study."""

    matched_by: str = "images"
    """"images"; or "flops" or "time": every method then gets the FLOPs of
    training, or the time by its `time`, that the `reference` method spends on
    `images`."""

    reference: str | None = None
    """Name of the method that others are compared with; the first by
    default."""

    seeds: int | list | tuple = 3
    """Seeds of each method, or their number."""

    sizes: list | tuple = ()
    """`Size`s; empty to leave the size to the methods' files."""

    evaluation: list | tuple = ()
    """Gin files for tools/evaluate.py, run on every cell."""

    gin_params: list | tuple = ()
    """Bindings of every run, such as "DATA = 'data/mine'"."""

    evaluation_params: list | tuple = ()
    """Bindings of every evaluation."""

    transfer: list | tuple = ()
    """`Transfer`s, run from the encoder of every cell."""

    reached: dict | None = None
    """Dict from a metric that is measured during training to a level; the
    images seen until it is reached are a metric, too."""

    until: str | None = None
    """A metric that is measured during training, by its name in TensorBoard,
    such as "validation/nll_per_token". The wall time until a run is as good as
    the reference's of the same seed ever was is a metric, too."""

    metrics: list | tuple = ()
    """Metrics of the table, "EVALUATOR/METRIC", in this order; all of them are
    in the CSV file."""

    notes: list | tuple = ()
    """Sentences for the report: what was matched and what was not."""

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"`name` must be a title. Received: {self.name!r}")
        names = [getattr(method, "name", None) for method in self.methods]
        if not names or None in names or len(set(names)) < len(names):
            raise ValueError(
                "`methods` must be Methods of different names. Received: "
                f"methods={list(self.methods)!r}"
            )
        arguments.check_counts(batch_size=self.batch_size)
        arguments.check_choice(MATCHED_BY, matched_by=self.matched_by)
        for images in self.lengths:
            arguments.check_counts(images=images)
            if images < self.batch_size:
                raise ValueError(
                    "`images` must be at least `batch_size`. Received: "
                    f"images={images}, batch_size={self.batch_size}"
                )
        if not self.seed_list or not all(
            isinstance(s, int) and not isinstance(s, bool) and s >= 0
            for s in self.seed_list
        ):
            raise ValueError(
                "`seeds` must be a number of seeds, or seeds from 0. "
                f"Received: seeds={self.seeds!r}"
            )
        if self.reference is not None and self.reference not in names:
            raise ValueError(
                f"`reference` must be one of {names}. Received: "
                f"reference={self.reference!r}"
            )
        for field in ("evaluation", "gin_params", "evaluation_params"):
            arguments.check_names(**{field: getattr(self, field)})

    @property
    def reference_method(self):
        """The `Method` that others are compared with."""
        by_name = {method.name: method for method in self.methods}
        return by_name[self.reference or self.methods[0].name]

    @property
    def lengths(self):
        """List of numbers of images."""
        many = isinstance(self.images, list | tuple)
        return list(self.images) if many else [self.images]

    @property
    def seed_list(self):
        """List of seeds."""
        many = isinstance(self.seeds, list | tuple)
        return list(self.seeds) if many else list(range(self.seeds))

    def configuration(self, method, size=None):
        """Files and bindings of a method's runs, apart from seed and length.

        Args:
            method: `Method`.
            size: `Size` or None.

        Returns:
            (gin files, bindings), two lists.
        """
        files, params = list(method.gin_files), []
        if size is not None:
            files += size.gin_files
            params += size.gin_params
        bound = [p.partition("=")[0].strip() for p in method.gin_params]
        if "BATCH_SIZE" not in bound:
            params.append(f"BATCH_SIZE = {self.batch_size}")
        return files, [*self.gin_params, *params, *method.gin_params]

    def cells(self, flops_of):
        """All runs of the study, in the order in which they should be made.

        The first seed of everything comes first, so that an unfinished study
        has one of each.

        Args:
            flops_of: Function (gin files, bindings) -> FLOPs of training on
                one image, or None if they are unknown.

        Returns:
            List of `Cell`.

        Raises:
            ValueError: If FLOPs are to be matched and not known.
        """
        sizes = list(self.sizes) or [None]
        costs = {
            (method.name, size and size.name): flops_of(
                *self.configuration(method, size)
            )
            for method, size in itertools.product(self.methods, sizes)
        }
        cells = []
        for seed, length, size, method in itertools.product(
            self.seed_list, self.lengths, sizes, self.methods
        ):
            size_name = size and size.name
            cost = costs[method.name, size_name]
            images = length
            if self.matched_by != "images" and not method.untrained:
                unit = costs[self.reference_method.name, size_name]
                images *= self._cheaper(method, cost, unit)
            cells.append(
                self._cell(method, seed, size, length, round(images), cost)
            )
        return cells

    def _cheaper(self, method, cost, unit):
        """How many images a method gets for one of the reference's.

        Args:
            method: `Method`.
            cost: FLOPs of its training on an image, or None.
            unit: Those of the reference.
        """
        if self.matched_by == "time":
            cost, unit = method.time, self.reference_method.time
            rule = "where a method has no `time`"
        else:
            rule = "where FLOPs cannot be counted"
        if not cost or not unit:
            raise ValueError(
                f"`matched_by` must be 'images' {rule}. Received: "
                f"{self.matched_by!r} with {method.name!r}"
            )
        return unit / cost

    def _cell(self, method, seed, size, length, images, cost):
        files, params = self.configuration(method, size)
        batch_size = _last_integer(params, "BATCH_SIZE")
        steps = 0 if method.untrained else max(1, round(images / batch_size))
        params.append(f"SEED = {seed}")
        if method.untrained:
            # A step that changes nothing, after which the run is evaluated.
            params += ["TOTAL_STEPS = 1", "WARMUP_STEPS = 0"]
            params += ["LEARNING_RATE = 0.0", "WEIGHT_DECAY = 0.0"]
        else:
            params.append(f"TOTAL_STEPS = {steps}")
        name = method.name
        if size is not None:
            name += f"-{size.name}"
        if len(self.lengths) > 1:
            name += f"-{length}"
        return Cell(
            # A * would be a pattern to a shell.
            name=f"{name}-seed{seed}".replace("*", ""),
            group=name,
            contrast=(size and size.name, length),
            method=method,
            seed=seed,
            size=size and size.name,
            batch_size=batch_size,
            steps=steps,
            flops=cost and float(cost) * steps * batch_size,
            gin_files=tuple(files),
            gin_params=tuple(params),
            evaluation=tuple(method.evaluation or self.evaluation),
            evaluation_params=tuple(self.evaluation_params),
            transfer=tuple(self.transfer),
        )


def _flags(gin_files, gin_params):
    return [
        *(f"--gin_file={path}" for path in gin_files),
        *(f"--gin_param={param}" for param in gin_params),
    ]


def _last_integer(params, name):
    """Value of the last binding of a macro."""
    found = [p.partition("=")[2] for p in params if _macro(p) == name]
    try:
        value = json.loads(found[-1].strip().replace("_", ""))
    except ValueError:
        value = None
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} of a method must be a positive integer. Received: "
            f"{name} = {found[-1].strip()}"
        )
    return value


def _macro(param):
    return param.partition("=")[0].strip()


def _check_name(field, name):
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"`{field}` must consist of letters, digits and _.+*-, as it names "
            f"a folder. Received: {field}={name!r}"
        )
