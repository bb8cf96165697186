"""Which devices take part in a run, and how batches reach them.

`auto` takes every GPU there is (one device where there is none); `one` and
`mirrored` are explicit. An impossible choice is refused with what was found.
"""

import tensorflow as tf

STRATEGIES = ("auto", "one", "mirrored")


def make_strategy(name="auto", devices=None):
    """Returns the `tf.distribute.Strategy` a run works under.

    Args:
        name: "auto" (mirrored over all GPUs where there are several, one
            device otherwise), "one" or "mirrored".
        devices: Optional list of device names such as `["GPU:0", "GPU:1"]`;
            by default all GPUs, or all logical CPUs where there is no GPU.

    Raises:
        ValueError: If the choice is unknown, or the devices are not there.
    """
    if name not in STRATEGIES:
        raise ValueError(
            f"`strategy` must be one of {STRATEGIES}. Received: "
            f"strategy={name!r}"
        )
    devices = _check_devices(devices)
    if name == "auto":
        several = devices or _names("GPU")
        name = "mirrored" if len(several) > 1 else "one"
    if name == "one":
        return _one_device(devices)
    devices = devices or _names("GPU") or _names("CPU")
    if len(devices) < 2:
        raise ValueError(
            "`strategy='mirrored'` needs at least two devices of one kind. "
            f"Received: devices={devices}; this machine has {_found()}"
        )
    return tf.distribute.MirroredStrategy(devices)


def has_accelerator():
    """Whether a GPU or TPU is visible to TensorFlow."""
    return bool(_names("GPU") or _names("TPU"))


def check_batch_size(name, batch_size, replicas, accumulation_steps=1):
    """Refuses a global batch that replicas and microbatches cannot share.

    Raises:
        ValueError: If it is no multiple of replicas * accumulation_steps.
    """
    if batch_size % (replicas * accumulation_steps):
        raise ValueError(
            f"`{name}` must be divisible by the number of devices times "
            f"`accumulation_steps`. Received: {name}={batch_size}, "
            f"{replicas} device(s), accumulation_steps={accumulation_steps}"
        )


def training_iterator(strategy, make_dataset, batch_size):
    """Iterator over an endless training stream, dealt out to the replicas.

    Consecutive replica batches of the stream form one global batch: step s
    trains on the examples s * batch_size ... (s + 1) * batch_size - 1
    whatever the number of replicas.

    Args:
        strategy: The run's strategy.
        make_dataset: Function of a batch size that returns the stream.
        batch_size: Global batch size.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return iter(make_dataset(batch_size))
    return iter(
        strategy.distribute_datasets_from_function(
            lambda context: make_dataset(batch_size // replicas)
        )
    )


def evaluation_batches(strategy, dataset):
    """A finite data set of full (padded) batches, each split over replicas."""
    if strategy.num_replicas_in_sync == 1:
        return dataset
    return strategy.experimental_distribute_dataset(dataset)


def _one_device(devices):
    if devices and len(devices) > 1:
        raise ValueError(
            "`strategy='one'` takes at most one device. Received: "
            f"devices={devices}"
        )
    if devices:
        return tf.distribute.OneDeviceStrategy(devices[0])
    return tf.distribute.get_strategy()  # the default strategy


def _check_devices(devices):
    if devices is None:
        return None
    if not isinstance(devices, (list, tuple)) or not devices:
        raise ValueError(
            "`devices` must be a list of names such as 'GPU:0'. Received: "
            f"devices={devices!r}"
        )
    known = set(_names("CPU") + _names("GPU") + _names("TPU"))
    missing = [name for name in devices if name not in known]
    if missing:
        raise ValueError(
            f"`devices` names what is not there: {missing}. Received: "
            f"devices={list(devices)}; this machine has {_found()}"
        )
    return list(devices)


def _names(kind):
    found = tf.config.list_logical_devices(kind)
    return [device.name.replace("/device:", "") for device in found]


def _found():
    return _names("CPU") + _names("GPU") + _names("TPU")
