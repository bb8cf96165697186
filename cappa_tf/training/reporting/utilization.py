"""Model FLOP/s of a run, and the share of its devices' peak."""

import functools

import tensorflow as tf

from cappa_tf.training import accelerators, flops, peak


class Utilization:
    """FLOP/s that training reaches; counted once, after the first steps.

    The FLOPs are those of matrix products of a step without recomputed
    activations ("model FLOPs", arXiv 2204.02311, appendix B), except that what
    a loss recomputes by itself counts. With `remat` the products are counted
    as they run.

    Args:
        model: Built `Task`.
        captions: Captions per image; "all" reports nothing.
        devices: Number of devices.
        precision: Dtype policy of the run.
        peak_flops: `ComputeSettings.peak_flops`.
    """

    def __init__(self, model, captions, devices, precision, peak_flops):
        self._model, self._captions = model, captions
        self._devices = devices
        self._products = "float32" if precision == "float32" else "bfloat16"
        self._peak_flops = peak_flops
        self._flops = None

    def figures(self, rates):
        """Figures of a log line.

        Args:
            rates: Those of the interval: `images_per_second` and, if the task
                counts them, `tokens_per_second`.

        Returns:
            Dict of `gflops_per_second`, over all devices, and `peak_share` if
            the peak is known; empty without `images_per_second`.
        """
        images = rates.get("images_per_second")
        if None in (self._peak_flops, images) or self._captions == "all":
            return {}
        if self._flops is None:
            tokens = rates.get("tokens_per_second", 0.0) / images
            tokens = max(1, round(tokens / self._captions))
            # Where there is memory for it.
            with tf.device("CPU:0"):
                self._flops = flops.training_flops(
                    self._model, self._captions, tokens
                )
        rate = images * self._flops
        found = {"gflops_per_second": rate / 1e9}
        if self._peak is not None:
            found["peak_share"] = rate / (self._peak * self._devices)
        return found

    @functools.cached_property
    def _peak(self):
        """Peak of one device in FLOP/s; None if it is unknown."""
        if self._peak_flops != "auto":
            return self._peak_flops
        gpus = tf.config.get_visible_devices("GPU")
        if gpus:
            details = tf.config.experimental.get_device_details(gpus[0])
            known = accelerators.known_device(details.get("device_name", ""))
            return known and getattr(known, self._products)
        if tf.config.list_logical_devices("TPU") or self._devices > 1:
            return None  # Several CPU devices share the same cores.
        return peak.measured_peak(self._products)
