"""Distribution strategies, and the distribution of batches to devices.

The strategy is chosen explicitly or found (`auto`). If a choice is impossible,
the error says what was found instead:

    one           one device of this process
    mirrored      several devices of this process
    multi_worker  one process per host, all of them named in TF_CONFIG, with
                  all GPUs of each host (or its CPU)
    tpu           the TPU that TPU_NAME names, or the one in this machine

B: global batch.  R: replicas, over all hosts.  H: hosts.
"""

import json
import os
import re

import tensorflow as tf
from absl import logging

STRATEGIES = ("auto", "one", "mirrored", "multi_worker", "tpu")

_TF_CONFIG_FORM = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def make_strategy(name="auto", devices=None):
    """Creates the `tf.distribute.Strategy` of a run.

    Must be called before TensorFlow has run anything, as several workers and
    TPUs have to be connected first.

    Args:
        name: "one", "mirrored", "multi_worker", "tpu", or "auto", which takes
            the first that is possible of "multi_worker" (if TF_CONFIG names
            several workers), "tpu", "mirrored" (with several GPUs) and "one".
        devices: Optional list of device names such as `["GPU:0", "GPU:1"]`
            for "one" or "mirrored"; by default all GPUs, or all logical CPUs
            if there is no GPU.

    Raises:
        ValueError: If the name is unknown or the devices are not available.
    """
    if name not in STRATEGIES:
        raise ValueError(
            f"`strategy` must be one of {STRATEGIES}. Received: "
            f"strategy={name!r}"
        )
    workers, index = tf_config_workers()
    if name == "auto":
        name = _best_choice(workers, devices)
    if name == "multi_worker":
        return _once(_multi_worker, tuple(workers), index, devices)
    if len(workers) > 1:
        raise ValueError(
            f"`strategy={name!r}` is for one process, and TF_CONFIG names "
            "several, which would all write to the same folder. Unset "
            "TF_CONFIG, or use strategy='multi_worker'. Received: TF_CONFIG="
            f"{os.environ['TF_CONFIG']}"
        )
    if name == "tpu":
        return _once(_tpu, devices)
    devices = _check_devices(devices)
    if name == "one":
        return _one_device(devices)
    return _mirrored(devices)


_made = {}


def _once(make, *arguments):
    """Connects to other machines once: TensorFlow cannot do it again."""
    key = repr((make.__name__, arguments))
    if key not in _made:
        _made[key] = make(*arguments)
    return _made[key]


def _best_choice(workers, devices):
    """The strategy's name that "auto" stands for on this machine."""
    if len(workers) > 1:
        return "multi_worker"
    if devices is None and _tpu_name() is not None:
        return "tpu"
    several = devices or _names("GPU")
    return "mirrored" if len(several) > 1 else "one"


def tf_config_workers():
    """Reads the workers from the environment variable TF_CONFIG.

    Returns:
        (addresses, index): a list, the chief first, and the index of this
        process in it; ([], 0) if the variable is not set or has no cluster.

    Raises:
        ValueError: If the variable is malformed.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text or "{}")
        cluster = dict(config.get("cluster", {}))
        jobs = {job: cluster.pop(job, []) for job in ("chief", "worker")}
        if cluster:
            raise ValueError(f"jobs {sorted(cluster)} are not supported")
        addresses = [*jobs["chief"], *jobs["worker"]]
        if not addresses:
            return [], 0
        kind, index = config["task"]["type"], int(config["task"]["index"])
        if kind not in jobs or not 0 <= index < len(jobs[kind]):
            raise ValueError(f"there is no {kind} {index} in the cluster")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "TF_CONFIG must name the chief and the workers, and which one this "
            f"process is, as in {_TF_CONFIG_FORM}. Received: TF_CONFIG={text} "
            f"({type(error).__name__}: {error})"
        ) from error
    return addresses, index + (len(jobs["chief"]) if kind == "worker" else 0)


def _multi_worker(workers, index, devices):
    if len(workers) < 2:
        raise ValueError(
            "`strategy='multi_worker'` needs the environment variable "
            "TF_CONFIG with at least two workers, as in "
            f"{_TF_CONFIG_FORM}, on every host with its own index. Received: "
            f"TF_CONFIG={os.environ.get('TF_CONFIG')}"
        )
    if devices is not None:
        raise ValueError(
            "`strategy='multi_worker'` takes all GPUs of each host; hide some "
            "with CUDA_VISIBLE_DEVICES. Received: "
            f"devices={devices!r}"
        )
    logging.info("worker %d of %s: waiting for the others", index, workers)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise ValueError(
            "`strategy='multi_worker'` must be created before TensorFlow has "
            f"run anything in this process. Received: {error}"
        ) from error


def _tpu_name():
    """TPU name for TensorFlow's resolver; None if there is no TPU.

    The resolver itself would query Google's metadata server to find out.
    """
    for variable in ("TPU_NAME", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS"):
        if os.environ.get(variable):
            return os.environ[variable]
    return "local" if tf.config.list_physical_devices("TPU") else None


def _tpu(devices):
    name = _tpu_name()
    if name is None:
        raise ValueError(
            "`strategy='tpu'` needs a TPU: in this machine, or named by the "
            "environment variable TPU_NAME ('local' on a TPU VM). Received: "
            "TPU_NAME is not set and this machine has "
            f"{_found()}"
        )
    if devices is not None:
        raise ValueError(
            "`strategy='tpu'` takes all cores of the TPU. Received: "
            f"devices={devices!r}"
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(
            name
        )
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(
            f"`strategy='tpu'` found no TPU under the name {name!r} "
            f"(TPU_NAME). Received: {type(error).__name__}: {error}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def _mirrored(devices):
    devices = devices or _names("GPU") or _names("CPU")
    if len(devices) < 2:
        raise ValueError(
            "`strategy='mirrored'` needs at least two devices of one kind. "
            f"Received: devices={devices}; this machine has {_found()}"
        )
    return tf.distribute.MirroredStrategy(devices)


def use_xla(jit_compile):
    """Returns whether to compile a step with XLA on this machine.

    On a GPU newer than those TensorFlow was built for, XLA aborts the process
    ("PTX version 8.5 does not support target 'sm_120'": tensorflow#111958,
    with the wheels of 2.20 and 2.21 on NVIDIA's Blackwell). Logs a warning for
    such a GPU.

    Args:
        jit_compile: True, False, or "auto": on TPUs and on GPUs that XLA
            supports.
    """
    unknown = _unknown_gpu() if jit_compile else None
    if jit_compile != "auto":
        if unknown:
            logging.warning(
                "jit_compile=True may abort the process; 'auto' leaves XLA "
                "off: %s",
                unknown,
            )
        return jit_compile
    if unknown:
        logging.warning("jit_compile='auto' leaves XLA off: %s", unknown)
        return False
    return has_accelerator()


def has_accelerator():
    """Whether TensorFlow sees a GPU or a TPU."""
    return bool(_names("GPU") or _names("TPU"))


def _unknown_gpu():
    """Description of a GPU that XLA does not support; None without one."""
    newest = _newest_compute_capability()
    for gpu in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        capability = details.get("compute_capability")
        if newest and capability and capability[0] > newest[0]:
            name = details.get("device_name", gpu.name)
            return (
                "{} has compute capability {}.{}, and this TensorFlow is built "
                "for {}.{} at most".format(name, *capability, *newest)
            )
    return None


def _newest_compute_capability():
    """(major, minor) of the newest GPUs TensorFlow was built for, or None."""
    built = tf.sysconfig.get_build_info().get("cuda_compute_capabilities", ())
    # Such as sm_89 or compute_120; some end in a letter (sm_90a).
    numbers = [int(re.search(r"\d+", name)[0]) for name in built]
    return divmod(max(numbers), 10) if numbers else None


def check_batch_size(name, batch_size, replicas, accumulation_steps=1):
    """Checks that replicas and microbatches divide the global batch evenly.

    Raises:
        ValueError: If it is not a multiple of replicas * accumulation_steps.
    """
    if batch_size % (replicas * accumulation_steps):
        raise ValueError(
            f"`{name}` must be divisible by the number of devices times "
            f"`accumulation_steps`. Received: {name}={batch_size}, "
            f"{replicas} device(s), accumulation_steps={accumulation_steps}"
        )


def training_iterator(strategy, make_dataset, batch_size):
    """Iterator over an endless training stream, distributed to the replicas.

    Step s trains on the examples s * B ... (s + 1) * B - 1 of the stream,
    whatever the number of hosts and replicas: a host reads its own positions
    (position modulo H), and its replicas take turns.

    Args:
        strategy: The run's strategy.
        make_dataset: Function of (batch size, host, number of hosts) that
            returns the host's part of the stream in batches of that size.
        batch_size: B.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return iter(make_dataset(batch_size, 0, 1))

    def one_host(context):
        stream = make_dataset(
            batch_size // replicas,
            context.input_pipeline_id,
            context.num_input_pipelines,
        )
        if isinstance(strategy, tf.distribute.TPUStrategy):
            check_static_shapes(stream.element_spec)
        # Without this the hosts would communicate before every batch about
        # whether the stream has ended.
        return stream.apply(
            tf.data.experimental.assert_cardinality(
                tf.data.INFINITE_CARDINALITY
            )
        )

    return iter(strategy.distribute_datasets_from_function(one_host))


def may_vary(strategy):
    """Whether the shapes of batches may vary from step to step.

    Several replicas would each have another one, and a TPU compiles for a long
    time.

    Args:
        strategy: The run's strategy.
    """
    on_tpu = isinstance(strategy, tf.distribute.TPUStrategy) or _names("TPU")
    return strategy.num_replicas_in_sync == 1 and not on_tpu


def check_static_shapes(spec):
    """Checks that all batches have one shape, so that a TPU compiles once.

    Args:
        spec: Dict of `tf.TensorSpec`, the element spec of a data set.

    Raises:
        ValueError: If a dimension is unknown, as with several text lengths.
    """
    shapes = {name: part.shape for name, part in spec.items()}
    if not all(shape.is_fully_defined() for shape in shapes.values()):
        raise ValueError(
            "On a TPU all batches must have the same shape; leave "
            f"`length_buckets` of the training data None. Received: {shapes}"
        )


def on_replicas(strategy, function, num_hosts=1):
    """Splits the batch of a function among the devices of this host.

    Evaluation needs nothing else: each host has its own examples and its own
    copy of the weights, and does not wait for another.

    Args:
        strategy: The run's strategy.
        function: Maps tensors (or dicts of them) with a leading batch
            dimension to tensors of the same kind.
        num_hosts: H.

    Returns:
        A compiled function with the same signature. The batch size must be
        divisible by the number of devices; their results are concatenated.
    """
    local = strategy.num_replicas_in_sync // num_hosts
    if local == 1:
        return tf.function(function, autograph=False, reduce_retracing=True)

    def share(tensor):
        context = tf.distribute.get_replica_context()
        parts = tf.stack(tf.split(tensor, local))  # [local, B / local, ...]
        return parts[context.replica_id_in_sync_group % local]

    def joined(value):
        parts = strategy.experimental_local_results(value)
        return tf.concat([tf.identity(part) for part in parts], axis=0)

    def call(*arguments):
        def replica(*whole):
            return function(*tf.nest.map_structure(share, whole))

        results = strategy.run(replica, args=arguments)
        return tf.nest.map_structure(joined, results)

    return tf.function(call, autograph=False, reduce_retracing=True)


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
            f"`devices` must name devices of this machine, not {missing}. "
            f"Received: devices={list(devices)}; this machine has {_found()}"
        )
    return list(devices)


def _names(kind):
    found = tf.config.list_logical_devices(kind)
    return [device.name.replace("/device:", "") for device in found]


def _found():
    return _names("CPU") + _names("GPU") + _names("TPU")
