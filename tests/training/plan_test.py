"""A planned step is what a derivation on paper gives."""

import math

import pytest
import tensorflow as tf
import tiny

from cappa_tf.training import accelerators, construct, plan
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.muon import Muon

DEVICE = accelerators.Device(
    "mine",
    float32=50.0,
    bfloat16=100.0,
    bandwidth=10.0,
    memory=1000.0,
    interconnect=4.0,
    group=4,
    network=2.0,
    product_efficiency=0.5,
    memory_efficiency=1.0,
)
WORK = plan.Work(
    flops=30.0,
    fixed_flops=20.0,
    traffic=3.0,
    fixed_traffic=4.0,
    update_traffic=5.0,
    update_flops=25.0,
    gradients=8.0,
    gathered=1.0,
    memory=40.0,
    fixed_memory=100.0,
)


def test_a_step_takes_the_sum_of_its_parts():
    """16 examples on 4 devices in 2 microbatches: 4 each, 2 at a time."""
    found = plan.step(WORK, DEVICE, 4, 16, "bfloat16", 2)
    # The update is of float32, at half the rate.
    assert found.products == (4 * 30 + 20) / (100 * 0.5) + 25 / (50 * 0.5)
    assert found.memory == (4 * 3 + 2 * 4 + 5) / 10
    # A ring sends 3/4 of the gradients twice; embeddings go to 3 others.
    assert found.network == (2 * 3 / 4 * 8 + 3 * 4 * 1) / 4
    assert found.seconds == pytest.approx(3.8 + 2.5 + 6.0)
    assert found.bound == "network"
    assert found.bytes == 100 + 2 * 40
    # 22 examples of 40 bytes fit beside the 100, on each, in each part.
    assert found.largest == 22 * 4 * 2
    assert found.share == pytest.approx(140 / 12.3 / 100)


def test_one_device_sends_nothing_and_many_use_the_network():
    assert plan.step(WORK, DEVICE, 1, 4).network == 0.0
    five = plan.step(WORK, DEVICE, 5, 5)
    assert five.network == pytest.approx((2 * 4 / 5 * 8 + 4) / 2)
    small = accelerators.Device("small", 1.0, 1.0, 1.0, 99.0)
    assert plan.step(WORK, small, 1, 1).largest == 0
    with pytest.raises(ValueError, match="need `interconnect`"):
        plan.step(WORK, small, 2, 2)


def test_the_work_of_a_small_model():
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: tiny.make_model(40), Adafactor, strategy
    )
    found = plan.count_work(model, optimizer)
    # As in flops_test.py, at width 16 with 4 patches and 8 positions.
    encoder = 2 * 4 * 192 * 16
    encoder += 2 * 4 * 16**2 * 4 + 2 * 2 * 4**2 * 16 + 2 * 2 * 16 * 32 * 4
    memory = 2 * 2 * 16**2 * 4
    decoder = 2 * 6 * 16**2 * 8 + 2 * 2 * 8 * 16 * 12 + 2 * 2 * 16 * 32 * 8
    logits = 2 * 8 * 16 * 40
    pixels = 2 * 4 * 192 * 16
    assert found.flops == (
        3 * (encoder + memory + decoder + logits) - pixels + logits
    )
    assert found.fixed_flops == 0
    parameters = construct.parameter_counts(model)["total"]
    assert found.gradients == 4 * parameters
    assert found.gathered == 0
    # Weights in float32, and the optimizer's state.
    state = sum(
        math.prod(v.shape) * tf.as_dtype(v.dtype).size
        for v in optimizer.variables
    )
    assert found.fixed_memory >= 4 * parameters + state
    # Each gradient is read at least once, each weight read and written.
    assert found.update_traffic >= 12 * parameters
    assert found.update_flops == 0
    assert 0 < found.traffic < 10 * found.memory


def test_the_products_of_an_update_are_counted():
    """Muon's: in each of five steps two of n x n by n x m and one of n ** 3."""
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: tiny.make_model(40), Muon, strategy
    )
    found = plan.count_work(model, optimizer, memory=False)
    expected = 0
    for v in model.trainable_variables:
        if not optimizer.adapts(v):
            n, m = sorted((16, math.prod(v.shape) // 16))
            expected += 5 * (2 * 2 * n**2 * m + 2 * n**3)
    assert found.update_flops == expected > 0


def test_traffic_of_a_chain_is_what_enters_and_leaves_it():
    x, w = tf.ones([64, 32]), tf.ones([32, 16])
    big, small = 4 * 64 * 32, 4 * 64 * 16

    def function():
        y = tf.reshape(x * 2.0 + 1.0, [64, 32])  # Two operations; the reshape
        z = tf.matmul(y, w)  # moves nothing; a product counts as FLOPs.
        return tf.reduce_sum(tf.exp(z) - z, axis=1)

    ops = plan._recorded(function)
    rows = 4 * 64
    # Scalars are of a few bytes.
    each = 4 * big + 2 * small + 3 * small + (small + rows)
    assert plan.traffic(ops, fused=False) == pytest.approx(each, abs=20)
    # Read x, write y; read z, write the sums.
    chain = 2 * big + small + rows
    assert plan.traffic(ops, fused=True) == pytest.approx(chain, abs=20)


def test_devices_are_read_and_found():
    mine = accelerators.parse(
        "name=mine,bfloat16=4e14,bandwidth=2e12,memory=48e9,group=4,price=1.5"
    )
    assert mine.bfloat16 == 4e14 and mine.float32 == 2e14
    assert (mine.group, mine.price, mine.price_of) == (4, 1.5, "given")
    for bad in (
        "name=mine,bfloat16=4e14,bandwidth=2e12",
        "name=mine,bfloat16=much,bandwidth=2e12,memory=48e9",
        "name=mine,bfloat16=4e14,bandwidth=2e12,memory=48e9,speed=1",
        "name=mine,bfloat16=0,bandwidth=2e12,memory=48e9",
    ):
        with pytest.raises(ValueError, match="Received"):
            accelerators.parse(bad)
    known = accelerators.known_device("NVIDIA A100-SXM4-80GB")
    assert known is accelerators.DEVICES["A100"]
    assert accelerators.known_device("NVIDIA T4") is None
