"""Batching of requests in the stand-in server, as in TensorFlow Serving.

Followed are, of tensorflow/serving: batching_session.cc, batching_util.cc; of
TensorFlow: shared_batch_scheduler.h.
"""

import collections
import concurrent.futures
import dataclasses
import os
import re
import threading
import time

import numpy as np

INVALID_ARGUMENT, RESOURCE_EXHAUSTED, FAILED_PRECONDITION = 3, 8, 9
INTERNAL, UNAVAILABLE = 13, 14


class RequestError(Exception):
    """A response with a gRPC status other than OK."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass
class Parameters:
    """BatchingParameters, with the scheduler's defaults."""

    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    num_batch_threads: int = os.cpu_count()
    pad_variable_length_inputs: bool = False
    allowed_batch_sizes: tuple = ()


def read_parameters(text):
    """Parses a batching_parameters.txt.

    Its proto (session_bundle_config.proto) is in no pip package. What is not
    of the form that this project writes is an error, as it is for the server.
    """
    values = {}
    for line in filter(None, text.splitlines()):
        scalar = re.fullmatch(r"(\w+) \{ value: (\d+) \}", line)
        plain = re.fullmatch(r"(\w+): (true|false|\d+)", line)
        if scalar:
            values[scalar[1]] = int(scalar[2])
        elif plain and plain[1] == "allowed_batch_sizes":
            values[plain[1]] = (*values.get(plain[1], ()), int(plain[2]))
        elif plain:
            values[plain[1]] = plain[2] == "true"
        else:
            raise ValueError(f"not a batching parameter: {line!r}")
    found = Parameters(**values)
    sizes = found.allowed_batch_sizes
    if sizes and sizes[-1] != found.max_batch_size:
        raise ValueError(
            "Last entry in allowed_batch_sizes must match max_batch_size; "
            f"last entry was {sizes[-1]}; expected {found.max_batch_size}"
        )
    return found


@dataclasses.dataclass
class Task:
    """A waiting request. `deadline` is in seconds of `time.monotonic`."""

    inputs: dict
    size: int
    deadline: float
    enqueued: float = dataclasses.field(default_factory=time.monotonic)
    future: concurrent.futures.Future = dataclasses.field(
        default_factory=concurrent.futures.Future
    )


class Queue:
    """Batches of one signature, the last of them open."""

    def __init__(self, scheduler, function):
        self.function = function
        self.batches = collections.deque()
        self._scheduler = scheduler

    def __call__(self, inputs, timeout=None):
        """Runs `function` on these inputs and those of other requests."""
        task = Task(
            inputs,
            _batch_size(inputs),
            time.monotonic() + timeout if timeout else float("inf"),
        )
        self._scheduler.submit(self, task)
        return task.future.result()


class Scheduler:
    """Threads that run the batches of all queues (SharedBatchScheduler)."""

    def __init__(self, parameters):
        self._parameters = parameters
        self._changed = threading.Condition()
        self._queues = []
        for _ in range(parameters.num_batch_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def queue(self, function):
        """A new queue for `function(inputs, timeout)`."""
        with self._changed:
            self._queues.append(Queue(self, function))
            return self._queues[-1]

    def submit(self, queue, task):
        most = self._parameters.max_batch_size
        if task.size > most:
            raise RequestError(
                INVALID_ARGUMENT,
                f"Task size {task.size} is larger than maximum input batch "
                f"size {most}",
            )
        with self._changed:
            batches = queue.batches
            if batches and _total(batches[-1]) + task.size <= most:
                batches[-1].append(task)
            elif len(batches) >= self._parameters.max_enqueued_batches:
                raise RequestError(
                    UNAVAILABLE,
                    "The batch scheduling queue to which this task was "
                    f"submitted is full; currently {len(batches)} batches "
                    "enqueued",
                )
            else:
                batches.append([task])
            self._changed.notify()

    def _work(self):
        while True:
            with self._changed:
                queue, wait = self._next()
                while queue is None:
                    self._changed.wait(wait)
                    queue, wait = self._next()
                tasks = queue.batches.popleft()
            self._run(queue, tasks)

    def _next(self):
        """A queue whose first batch is due, or the seconds until one is."""
        now, wait = time.monotonic(), None
        for queue in self._queues:
            if not queue.batches:
                continue
            due = queue.batches[0][0].enqueued
            due += self._parameters.batch_timeout_micros / 1e6
            full = _total(queue.batches[0]) >= self._parameters.max_batch_size
            if len(queue.batches) > 1 or full or due <= now:
                # The next time, the others come first.
                self._queues.remove(queue)
                self._queues.append(queue)
                return queue, None
            wait = due - now if wait is None else min(wait, due - now)
        return None, wait

    def _run(self, queue, tasks):
        try:
            outputs = self._outputs(queue.function, tasks)
        except Exception as error:
            for task in tasks:
                task.future.set_exception(error)
            return
        start = 0
        for task in tasks:
            part = slice(start, start + task.size)
            start += task.size
            task.future.set_result({k: v[part] for k, v in outputs.items()})

    def _outputs(self, function, tasks):
        timeout = max(task.deadline for task in tasks) - time.monotonic()
        if timeout <= 0:
            raise RequestError(
                RESOURCE_EXHAUSTED,
                "Run() timeout exceeded while waiting in batching queue",
            )
        total = _total(tasks)
        sizes = self._parameters.allowed_batch_sizes
        size = next((size for size in sizes if size >= total), total)
        merged = {
            name: merge(
                [task.inputs[name] for task in tasks],
                size - total,
                self._parameters.pad_variable_length_inputs,
            )
            for name in tasks[0].inputs
        }
        outputs = function(merged, None if timeout == np.inf else timeout)
        for value in outputs.values():
            if value.shape[:1] != (size,):
                raise RequestError(
                    FAILED_PRECONDITION,
                    "Batched output tensor's 0th dimension does not equal the "
                    "sum of the 0th dimension sizes of the input tensors",
                )
        return outputs


def merge(values, rows, pad):
    """Concatenates along dimension 0.

    Args:
        values: Arrays of strings.
        rows: Rows to add, copies of the last array's first one.
        pad: Whether the other dimensions are filled up to the largest.
    """
    if len({value.ndim for value in values}) > 1:
        raise RequestError(INTERNAL, "Tensor concat operation failed")
    shape = tuple(np.max([value.shape[1:] for value in values], 0).astype(int))
    padded = []
    for value in values:
        if not pad and value.shape[1:] != shape:
            raise RequestError(
                FAILED_PRECONDITION,
                "Tensors from different tasks have different shapes and "
                "padding is turned off. Set pad_variable_length_inputs to true",
            )
        if not value.size and value.shape[1:] != shape:
            raise RequestError(
                INVALID_ARGUMENT,
                "Got empty tensor in batch of non-empty tensors.",
            )
        # Filled up with the first element of the tensor.
        first = value.flat[0] if value.size else b""
        full = np.full((len(value), *shape), first, object)
        full[tuple(map(slice, value.shape))] = value
        padded.append(full)
    return np.concatenate([*padded, *[padded[-1][:1]] * rows])


def _batch_size(inputs):
    sizes = {value.shape[:1] for value in inputs.values()}
    if () in sizes:
        raise RequestError(
            INVALID_ARGUMENT,
            "Batching Run() input tensors must have at least one dimension",
        )
    if len(sizes) > 1:
        raise RequestError(
            INVALID_ARGUMENT,
            "Batching Run() input tensors must have equal 0th-dimension size",
        )
    ((size,),) = sizes
    return size


def _total(tasks):
    return sum(task.size for task in tasks)
