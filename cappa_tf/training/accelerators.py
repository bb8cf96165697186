"""Accelerators: their peak rates, on which the time of a step depends."""

import dataclasses
import re

from cappa_tf.utils import arguments

# Fraction of the peak that large products reach in practice, and of the memory
# bandwidth that elementwise operations reach. Assumptions, not measurements.
PRODUCT_EFFICIENCY = 0.6
MEMORY_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator, with its maker's figures.

    Attributes:
        name: Its name.
        float32: Peak of products of float32 as TensorFlow computes them by
            default (TF32 on GPUs, one pass of bfloat16 on TPUs), FLOP/s.
        bfloat16: Peak of products of bfloat16, FLOP/s.
        bandwidth: Of its memory, bytes/s.
        memory: Bytes.
        interconnect: Bytes/s that it can send to others of its group.
        group: Devices that are connected in that way.
        network: Bytes/s that it can send beyond them.
        price: Dollars an hour.
        price_of: Whose price, and when. Prices change: an assumption.
        product_efficiency: Fraction of the peak that products reach.
        memory_efficiency: Fraction of the bandwidth that is reached.
    """

    name: str
    float32: float
    bfloat16: float
    bandwidth: float
    memory: float
    interconnect: float = 0.0
    group: int = 8
    network: float = 0.0
    price: float = 0.0
    price_of: str = "given"
    product_efficiency: float = PRODUCT_EFFICIENCY
    memory_efficiency: float = MEMORY_EFFICIENCY


# Sources: NVIDIA's data sheets of the SXM versions (NVLink: half of the sum of
# both directions; network: InfiniBand of the DGX systems, 200 and 400 Gbit/s a
# GPU) and cloud.google.com/tpu/docs (interconnect: half of the bidirectional
# bandwidth).
_GPU_CLOUDS = "typical on demand at GPU clouds, early 2026"
_GOOGLE = "Google Cloud on demand, US, 2025"
DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100",
            float32=156e12,
            bfloat16=312e12,
            bandwidth=2.04e12,
            memory=80e9,
            interconnect=300e9,
            group=8,
            network=25e9,
            price=2.0,
            price_of=_GPU_CLOUDS,
        ),
        Device(
            "H100",
            float32=494e12,
            bfloat16=989e12,
            bandwidth=3.35e12,
            memory=80e9,
            interconnect=450e9,
            group=8,
            network=50e9,
            price=3.2,
            price_of=_GPU_CLOUDS,
        ),
        Device(
            "v4",
            float32=275e12,
            bfloat16=275e12,
            bandwidth=1.23e12,
            memory=34e9,
            interconnect=150e9,
            group=4096,
            network=6e9,
            price=3.22,
            price_of=_GOOGLE,
        ),
        Device(
            "v5e",
            float32=197e12,
            bfloat16=197e12,
            bandwidth=0.82e12,
            memory=16e9,
            interconnect=200e9,
            group=256,
            network=3e9,
            price=1.20,
            price_of=_GOOGLE,
        ),
        Device(
            "v6e",
            float32=918e12,
            bfloat16=918e12,
            bandwidth=1.64e12,
            memory=32e9,
            interconnect=400e9,
            group=256,
            network=12e9,
            price=2.70,
            price_of=_GOOGLE,
        ),
    )
}


def parse(text):
    """A `Device` of "name=mine,bfloat16=4e14,bandwidth=2e12,memory=48e9".

    Raises:
        ValueError: If a field is unknown, missing or not a positive number.
    """
    fields = {field.name: field for field in dataclasses.fields(Device)}
    given = dict(part.partition("=")[::2] for part in text.split(","))
    needed = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name != "float32"
    ]
    unknown = [name for name in given if name not in fields]
    missing = [name for name in needed if not given.get(name)]
    if unknown or missing:
        raise ValueError(
            "A device must be NAME=VALUE,... with "
            f"{', '.join(needed)}, and optionally "
            f"{', '.join(x for x in fields if x not in needed)}. "
            f"Received: {text!r}"
        )
    values = {}
    for name, value in given.items():
        if name in ("name", "price_of"):
            values[name] = value
            continue
        try:
            number = float(value)
        except ValueError:
            number = value
        arguments.check_number(name, number, 0.0, exclusive=name in needed)
        values[name] = int(number) if name == "group" else number
    values.setdefault("float32", values["bfloat16"] / 2)
    return Device(**values)


def known_device(name):
    """The `Device` that TensorFlow's name of a GPU or TPU stands for, or None.

    Args:
        name: Such as "NVIDIA A100-SXM4-80GB" or "TPU v4".
    """
    words = re.split(r"[\s-]+", name)
    return next((DEVICES[word] for word in words if word in DEVICES), None)
