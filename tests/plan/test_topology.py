"""Names of slices, their grids, and the network between their chips."""

import itertools

import pytest

from launch import accelerators
from sg4v_jax.plan import topology


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("v5e:8x8", "v5e:8x8"), ("v5litepod-64", "v5e:8x8"), ("v5e-32", "v5e:4x8"), ("v4-32", "v4:2x2x4"),
        ("v5p-128", "v5p:4x4x4"), ("v5p-32", "v5p:2x2x4"), ("v6e-256", "v6e:16x16"), ("v4-64", "v4:2x4x4"),
    ],
)  # fmt: skip
def test_names(name: str, found: str) -> None:
    assert topology.parse(name).name == found


@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_slices_are_those_that_launch_creates(generation: str) -> None:
    for size in accelerators.GENERATIONS[generation].topologies:
        if size not in (384, 768, 1536, 8192) and size >= 8:
            there = accelerators.find(f"{generation}-{size}")
            ours = topology.parse(there.name)
            assert ours.num_chips == there.chips
            assert ours.name.partition(":")[2] == there.topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7-8", "neither like v5e:8x8"), ("v5e:2x2x2", "v5e has 2 dimensions"), ("v4-7", "no power of two"),
        ("", "neither like"),
    ],
)  # fmt: skip
def test_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.parse(name)


def test_links_by_rings_and_lines() -> None:
    """Two links where a ring closes, one on a line; every axis that is spanned adds its own."""
    small, large = topology.parse("v5e:8x8"), topology.parse("v5e:16x16")
    link = small.chip.link_bandwidth
    everybody = {s.name: list(itertools.product(*map(range, s.grid))) for s in (small, large)}
    assert link == 200e9 / 4
    assert small.bandwidth(everybody["v5e:8x8"]) == 2 * link
    assert large.bandwidth(everybody["v5e:16x16"]) == 4 * link
    assert large.bandwidth([(0, y) for y in range(16)]) == 2 * link
    assert large.bandwidth([(0, y) for y in range(4)]) == link
    cube = topology.parse("v5p:4x4x4")
    assert cube.bandwidth([(x, y, 0) for x in range(4) for y in range(4)]) == 4 * cube.chip.link_bandwidth
    assert not topology.parse("v5p:2x2x4").wraps(2)
