"""Calls of a model from many threads, made by one thread in batches."""

import collections
import concurrent.futures
import threading
from typing import NamedTuple

# Calls that may wait. Their images are in memory.
_MOST_WAITING = 256
_SECONDS_TO_END = 30.0


class BusyError(Exception):
    """Too many calls wait already, or no more are made."""


class _Call(NamedTuple):
    function: object
    key: object
    item: object
    result: concurrent.futures.Future


class Batches:
    """Gathers what is waiting and calls a function with all of it.

    While one batch is being computed, further items arrive; those with the key
    of the one that has waited longest are the next batch. A model so runs in a
    single thread, and the more there is to do the larger its batches are.

    Args:
        size: Maximum number of items of a batch.
    """

    def __init__(self, size):
        self._size = size
        self._waiting = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(
            target=self._work, name="batches", daemon=True
        )
        self._thread.start()

    def __call__(self, function, key, item):
        """Waits for the result of one item.

        Args:
            function: Function of a list of items that returns a list of as
                many results.
            key: Items of equal keys may be in one batch; they have the same
                function.
            item: The item.

        Returns:
            Its result.

        Raises:
            BusyError: If too many wait, or `close` was called.
            Exception: What the function raised, for all items of the batch.
        """
        result = concurrent.futures.Future()
        with self._changed:
            if self._closed:
                raise BusyError("the demo is being stopped")
            if len(self._waiting) >= _MOST_WAITING:
                raise BusyError(
                    f"{_MOST_WAITING} requests are waiting already; try again"
                )
            self._waiting.append(_Call(function, key, item, result))
            self._changed.notify()
        return result.result()

    def close(self):
        """Finishes the batch that is being computed; no other begins."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_SECONDS_TO_END)

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
                calls = self._next()
            try:
                results = calls[0].function([call.item for call in calls])
                for call, result in zip(calls, results, strict=True):
                    call.result.set_result(result)
            except Exception as error:
                for call in calls:
                    call.result.set_exception(error)
        for call in self._waiting:
            call.result.set_exception(BusyError("the demo is being stopped"))

    def _next(self):
        """Takes the calls of the next batch from those that wait."""
        key = self._waiting[0].key
        same = [call for call in self._waiting if call.key == key]
        same = same[: self._size]
        taken = {id(call) for call in same}
        self._waiting = collections.deque(
            call for call in self._waiting if id(call) not in taken
        )
        return same
