"""Interruption of a run by Ctrl-C or SIGTERM, at the next step boundary."""

import contextlib
import os
import signal
import threading

import tensorflow as tf


class Interruption:
    """Context manager that catches Ctrl-C and SIGTERM during a training run.

    Many steps run inside one call into TensorFlow, during which Python runs
    no signal handler. So Python's C code writes the signal's number to a pipe
    right away, and a thread that reads it sets `stop`, which the compiled loop
    checks before each step. A second signal has its default effect.

    Attributes:
        stop: Boolean `tf.Variable`, true once the run should end.
        signal: Name of the signal received, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        with tf.device("CPU:0"):
            self.stop = tf.Variable(False, trainable=False)
        self.signal = None
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _listen(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in self.SIGNALS:
            previous = signal.signal(number, self._handle)
            self._stack.callback(signal.signal, number, previous)
        previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,))
        thread.daemon = True
        thread.start()
        # Undone in reverse order: no more wake-ups, pipe closed, thread ends.
        self._stack.callback(os.close, reader)
        self._stack.callback(thread.join)
        self._stack.callback(os.close, writer)
        self._stack.callback(signal.set_wakeup_fd, previous_fd)

    def _watch(self, reader):
        while received := os.read(reader, 1):
            if received[0] in self.SIGNALS:
                self.stop.assign(True)

    def _handle(self, number, frame):
        del frame
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name
        self.stop.assign(True)
