"""The cycle counter: loops have their trip counts, transfers their time, and numbers repeat."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sg4v_jax.kernels.cycles import bundles, measure, operands, target
from sg4v_jax.kernels.cycles.machine import Machine

target.prepare()
MATRIX = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)


def product(steps):
    """A matrix product whose inner loop runs as often as the first argument says, at most `steps` times."""

    def kernel(count, a, b, out):
        out[...] = jnp.zeros_like(out)

        def body(_, carry):
            out[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
            return carry

        jax.lax.fori_loop(0, count[0], body, None)

    def run(count, a, b):
        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec((256, 256), lambda i, count: (i, 0)),
                pl.BlockSpec((256, 256), lambda i, count: (0, i)),
            ],
            out_specs=pl.BlockSpec((256, 256), lambda i, count: (i, i)),
        )
        shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=shape, name="product")(count, a, b)

    return run


def count(steps, trips, generation="v5e"):
    arguments = (jax.ShapeDtypeStruct((1,), jnp.int32), MATRIX, MATRIX)
    report = measure(product(steps), arguments, generation, values={0: np.array([trips], np.int32)})
    return next(kernel for kernel in report.kernels if kernel.name.startswith("product")), report


def test_trip_counts_come_from_the_data():
    one, _ = count(4, 1)
    five, _ = count(4, 5)
    nine, _ = count(4, 9)
    assert nine.scheduled - five.scheduled == five.scheduled - one.scheduled > 0
    # Eight more products of 256 x 256 x 256 in four steps, on four 128-wide units at one row a cycle.
    assert nine.scheduled - one.scheduled >= 8 * 4 * 256 * 2 * 2 / 4
    # v4 counts transfers in other units.
    assert one.bytes == five.bytes == count(4, 1, "v4")[0].bytes == 4 * (2 * 256 * 256 * 2 + 256 * 256 * 4)


def test_the_same_number_twice_and_waits_on_top():
    once, report = count(2, 1)
    again, _ = count(2, 1)
    assert (once.scheduled, once.total) == (again.scheduled, again.total)
    assert once.total > once.scheduled
    assert report.microseconds == pytest.approx(report.total / 1500)
    assert not any("product" in name for name in report.unknown)


def test_an_elementwise_pass_takes_the_memory_its_time():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    report = measure(lambda x: x + 1, (x,), "v6e")
    if tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3])) < (0, 0, 50):
        # It writes the transfers of XLA's own programs in another way; the report says so.
        assert report.unknown["size or flag of a transfer"]
        return
    assert not report.unknown
    assert (
        report.roofline(0, 2 * x.size * 4) <= report.microseconds < 1.3 * report.roofline(0, 2 * x.size * 4)
    )


def test_what_it_cannot_measure_is_an_error():
    with pytest.raises(ValueError, match="'v3' is not one of"):
        measure(lambda x: x, (MATRIX,), "v3")


def test_the_runtimes_words_are_nobody_elses():
    """A kernel among hundreds of allocations once found its number of the core counted up by the runtime."""
    text = """
        0   :  { %s3_s18 = reloc 4 }
      0x1   :  { %s4_s20 = scalar_lea.smem [#allocation0], %s3_s18 }
      0x2   :  { %5 = sst [smem:[%s4_s20]] 7 }
      0x3   :  {}
    """
    program = bundles.parse("counts", {target.SCHEDULE: text})
    machine = Machine(target.GENERATIONS["v5e"], {"counts": program}, {})
    machine.run(program)
    assert machine.issued == 4 and list(machine.memory.values()) == [7]
    places = [machine.region("other", f"#allocation{i}") for i in range(1000)]
    (written,) = machine.memory
    assert not any(place <= written < place + (1 << 15) for place in places)


def test_memory_images():
    x = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert operands.words(operands.memory_image(x, "1,0")) == [0, 1, 2, 3, 4, 5]
    assert operands.words(operands.memory_image(x, "0,1")) == [0, 3, 1, 4, 2, 5]
    assert operands.words(operands.memory_image(x, "1,0:T(2,2)")) == [0, 1, 3, 4, 2, 0, 5, 0]
