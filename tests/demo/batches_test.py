"""Batches: waiting calls are put together, errors reach all, it ends."""

import concurrent.futures
import threading
import time

import pytest

from cappa_tf.demo import batches as module
from cappa_tf.demo.batches import Batches, BusyError


class Slow:
    """A function whose first call waits until it is let go."""

    def __init__(self):
        self.calls = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, items):
        self.calls.append(items)
        self.begun.set()
        assert self.go.wait(60)
        return [item * 10 for item in items]


@pytest.fixture(name="batches")
def _batches():
    batches = Batches(3)
    yield batches
    batches.close()


def waiting(batches, count):
    while len(batches._waiting) < count:
        time.sleep(0.001)


def test_what_waits_is_put_together_by_its_key(batches):
    slow = Slow()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = ["a", "a", "b", "a", "a", "a"]
        futures = [pool.submit(batches, slow, "first", 0)]
        assert slow.begun.wait(60)
        for i, key in enumerate(keys, 1):
            futures.append(pool.submit(batches, slow, key, i))
            waiting(batches, i)
        slow.go.set()
        assert [one.result() for one in futures] == [10 * i for i in range(7)]
    assert slow.calls == [[0], [1, 2, 4], [3], [5, 6]]


def test_an_error_reaches_all_and_ends_nothing(batches):
    def fail(items):
        raise KeyError(*items)

    with pytest.raises(KeyError, match="7"):
        batches(fail, "a", 7)
    with pytest.raises(ValueError, match="shorter"):
        batches(lambda items: [], "a", 7)
    assert batches(lambda items: items, "a", 7) == 7


def test_too_many_are_refused(batches, monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING", 1)
    slow = Slow()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(batches, slow, "a", 1)
        assert slow.begun.wait(60)
        second = pool.submit(batches, slow, "a", 2)
        waiting(batches, 1)
        with pytest.raises(BusyError, match="waiting already"):
            batches(slow, "a", 3)
        slow.go.set()
        assert (first.result(), second.result()) == (10, 20)


def test_at_the_end_what_runs_is_finished_and_what_waits_refused():
    batches, slow = Batches(1), Slow()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(batches, slow, "a", 1)
        assert slow.begun.wait(60)
        second = pool.submit(batches, slow, "a", 2)
        waiting(batches, 1)
        closing = pool.submit(batches.close)
        while not batches._closed:
            time.sleep(0.001)
        slow.go.set()
        closing.result()
        assert first.result() == 10
        with pytest.raises(BusyError, match="being stopped"):
            second.result()
    with pytest.raises(BusyError, match="being stopped"):
        batches(slow, "a", 3)
