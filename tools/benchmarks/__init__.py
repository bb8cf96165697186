"""Benchmarks of tools/benchmark.py, one per module, and what they share.

What is compared takes turns: a figure is the median over the turns, and a ratio
the median of the ratios within each turn, so that other load on the machine,
which drifts, affects both sides alike. CPU time is steadier than wall time on
a busy machine. Every contender has run once before the first turn.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from absl import flags

from cappa_tf.utils import cpu
from tools.benchmarks.workers import protocol

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TOOL = _ROOT / "tools" / "benchmark.py"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of a benchmark.

    Attributes:
        name: What was measured.
        value: The figure.
        unit: Its unit.
        baseline: Name of what it is compared with, or None.
        ratio: The figure divided by the baseline's, or None.
    """

    name: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


# -- Turns ---------------------------------------------------------------------


def turns_of(ways, rounds, measure):
    """Measures several methods repeatedly, in turn.

    Every other turn has them in reverse order.

    Args:
        ways: Names of the methods.
        rounds: Number of turns.
        measure: Function of a name that returns a dict of numbers.

    Returns:
        Dict name -> list of one dict per turn.
    """
    ways = list(ways)
    found = {way: [] for way in ways}
    for i in range(rounds):
        for way in ways if i % 2 == 0 else reversed(ways):
            found[way].append(measure(way))
    return found


def median(found, way, key):
    """The median of one number of a way, over the turns of `turns_of`."""
    return statistics.median(turn[key] for turn in found[way])


def ratio(found, way, baseline, key):
    """The median over the turns of a number divided by the baseline's."""
    return statistics.median(
        one[key] / other[key]
        for one, other in zip(found[way], found[baseline], strict=True)
    )


class Here:
    """A contender that runs in this process.

    Args:
        run: Function without arguments; returns once its result is there.
        **facts: What is known of it, such as `flops`.
    """

    def __init__(self, run, **facts):
        self.run, self.facts = run, facts

    def measure(self, count, save=None):
        """`protocol.measured`, without peak memory."""
        found = protocol.measured(self.run, count, save)
        del found["peak_bytes"]  # That of all contenders in this process.
        return found

    def close(self):
        """Nothing to do."""


class Process:
    """A contender that runs in a process of its own, and waits between turns.

    Args:
        worker: Name of a module of `tools/benchmarks/workers`.
        options: What it is given, a dict that JSON can hold.
        python: Interpreter with the packages that it needs; this one by
            default.

    Raises:
        ValueError: If the process ends before it is ready; the last line that
            it printed is part of the message.
    """

    def __init__(self, worker, options, python=None):
        self._name = f"{python or sys.executable} {worker}"
        path = pathlib.Path(protocol.__file__).with_name(f"{worker}.py")
        self._process = subprocess.Popen(
            [python or sys.executable, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if python else None,
            text=True,
        )
        self.facts = self._ask(options)

    def measure(self, count, save=None):
        """`protocol.measured`, in that process."""
        return self._ask({"count": count, "save": save})

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _ask(self, request):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            errors = self._process.stderr
            lines = errors.read().strip().splitlines() if errors else []
            raise ValueError(
                f"The process {self._name} ended early. "
                f"Received: {lines[-1] if lines else 'no answer'}"
            )
        return json.loads(answer)


def own(benchmark, options):
    """A contender that is one way of a benchmark of this project.

    In a process of its own, or with --one_process in this one.

    Args:
        benchmark: Name of the benchmark, whose `make` takes the options.
        options: Dict with `way`.
    """
    note(f"{options['way']}: builds")
    if flags.FLAGS.one_process:
        module = importlib.import_module(f"{__name__}.{benchmark}")
        run, facts = module.make(options)
        return Here(run, **facts)
    return Process("own", {**options, "benchmark": benchmark})


def compete(contenders, rounds, count=1, saved=None):
    """Runs contenders in turns.

    Args:
        contenders: Dict name -> `Here` or `Process`.
        rounds: Number of turns.
        count: Runs of each in a turn.
        saved: Optional folder; the result of each contender's first run is
            saved there as NAME.npy.

    Returns:
        As `turns_of`; the numbers are per run.
    """
    for name, contender in contenders.items():
        note(f"{name}: first run")
        path = saved and os.path.join(saved, f"{name}.npy")
        contender.measure(1, path)

    def measure(name):
        found = contenders[name].measure(count)
        note(f"{name}: {found['wall']:.3f} s, {found['cpu']:.3f} CPU s")
        return found

    return turns_of(contenders, rounds, measure)


def speeds(found, contenders, baseline, items, unit="image"):
    """Rows of `compete`: rates, CPU time, share of the peak, peak memory.

    Args:
        found: What it returned.
        contenders: Its contenders. One with the fact `flops` (of a run) and,
            among the contenders, "matmul TYPE" of its fact `products` gets a
            row of its share of the peak.
        baseline: Name of the contender that others are compared with.
        items: Items, such as images, of a run.
        unit: What an item is.

    Returns:
        List of `Row`.
    """
    rows = []
    for name, contender in contenders.items():
        if name in MATMULS:
            rate = contender.facts["flops"] / median(found, name, "wall")
            rows.append(Row(name, rate / 1e9, "GFLOP/s"))
            continue
        facts, other = contender.facts, None if name == baseline else baseline
        rate = items / median(found, name, "wall")
        rows += [
            _row(found, name, other, rate, f"{unit}s/s", "wall", faster=True),
            _row(
                found,
                name,
                other,
                1e3 * median(found, name, "cpu") / items,
                f"CPU ms/{unit}",
                "cpu",
            ),
        ]
        peak = f"matmul {facts.get('products')}"
        if facts.get("flops") and peak in contenders:
            share = 1.0 / ratio(found, name, peak, "wall")
            share *= facts["flops"] / contenders[peak].facts["flops"]
            done = facts["flops"] / items * rate / 1e9
            rows.append(Row(name, done, "GFLOP/s", peak, share))
        if "peak_bytes" in found[name][0]:
            size = median(found, name, "peak_bytes") / 2**20
            row = _row(found, name, other, size, "MiB at most", "peak_bytes")
            rows.append(row)
    return rows


def _row(found, name, baseline, value, unit, key, faster=False):
    if baseline is None or key not in found[baseline][0]:
        return Row(name, value, unit)
    pair = (baseline, name) if faster else (name, baseline)
    return Row(name, value, unit, baseline, ratio(found, *pair, key))


def differences(folder, names, baseline):
    """Rows of the largest difference between results that `compete` saved.

    If some have more columns than others, the first columns are compared.

    Args:
        folder: Where they were saved.
        names: Names of contenders.
        baseline: Name of the contender that the others are compared with.
    """
    import numpy as np

    wanted = np.load(os.path.join(folder, f"{baseline}.npy"))
    rows = []
    for name in names:
        path = os.path.join(folder, f"{name}.npy")
        if name != baseline and os.path.exists(path):
            result = np.load(path)
            both = min(result.shape[-1], wanted.shape[-1])
            apart = np.abs(result[..., :both] - wanted[..., :both]).max()
            unit = f"largest difference to {baseline}"
            rows.append(Row(name, float(apart), unit))
    return rows


# -- The peak ------------------------------------------------------------------

MATMULS = ("matmul float32", "matmul bfloat16")


def matmuls(size):
    """Contenders that multiply two square matrices: the peak of products.

    Args:
        size: Their side; None for no contenders.
    """
    if size is None:
        return {}
    from cappa_tf.training import peak

    return {
        name: Here(peak.product(name.split()[1], size), flops=2 * size**3)
        for name in MATMULS
    }


# -- Processes -----------------------------------------------------------------


def in_a_process(name, **flags):
    """Runs a benchmark in a fresh process, so that peaks do not mix.

    Args:
        name: Name of the benchmark.
        **flags: Its flags; None leaves a flag out.

    Returns:
        The JSON value in the last line it prints.
    """
    given = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    note(" ".join([name, *given]))
    output = subprocess.run(
        [sys.executable, str(_TOOL), name, *given],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


peak_bytes = protocol.peak_bytes


# -- Report --------------------------------------------------------------------


def machine():
    """Dict that describes this machine and what else it was doing."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": f"{cpu.memory_bytes() / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "tensorflow": importlib.metadata.version("tensorflow"),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [x.partition(":")[2] for x in lines if x.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def table(rows):
    """Rows as lines of text."""
    width = max(len(row.name) for row in rows)
    units = max(len(row.unit) for row in rows)
    lines = []
    for row in rows:
        line = (
            f"{row.name:{width}}  {_number(row.value):>10} {row.unit:{units}}"
        )
        if row.ratio is not None:
            line += f"  {_number(row.ratio):>8} x {row.baseline}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(value):
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def note(text):
    """Prints what is being done, apart from the results."""
    print(text, file=sys.stderr, flush=True)
