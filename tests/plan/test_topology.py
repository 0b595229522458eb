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
        ("2xv5e-64", "2xv5e:8x8"), ("4xv5p:2x2x4", "4xv5p:2x2x4"), ("1xv5e-64", "v5e:8x8"),
    ],
)  # fmt: skip
def test_names(name: str, found: str) -> None:
    assert topology.parse(name).name == found
    assert topology.parse("2xv5e-64").num_chips == 2 * topology.parse("v5e-64").num_chips == 128


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
        ("0xv5e-64", "neither like"), ("v7-8", "neither like v5e:8x8"), ("v5e:2x2x2", "v5e has 2 dimensions"),
        ("v4-7", "no power of two"), ("", "neither like"),
    ],
)  # fmt: skip
def test_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.parse(name)


def test_links_by_rings_and_lines() -> None:
    """Two links where a ring closes, one on a line; every axis that is spanned adds its own."""
    small, large = topology.parse("v5e:8x8"), topology.parse("v5e:16x16")
    everybody = {s.name: list(itertools.product(*map(range, s.grid))) for s in (small, large)}
    assert small.chip.link_bandwidth == 200e9 / 4
    both = [(axis, sign) for axis in (0, 1) for sign in (1, -1)]
    assert small.gathering(everybody["v5e:8x8"]) == dict.fromkeys(both, 1 / 2)
    assert large.gathering(everybody["v5e:16x16"]) == dict.fromkeys(both, 1 / 4)
    assert large.gathering([(0, y) for y in range(16)]) == {(1, 1): 1 / 2, (1, -1): 1 / 2}
    assert large.gathering([(0, y) for y in range(4)]) == {(1, 1): 1, (1, -1): 1}
    cube = topology.parse("v5p:4x4x4")
    assert set(cube.gathering([(x, y, 0) for x in range(4) for y in range(4)]).values()) == {1 / 4}
    assert not topology.parse("v5p:2x2x4").wraps(2)


def test_a_permute_takes_one_direction() -> None:
    """On a closed ring it uses every link once; on a line the last chip's part goes all the way back."""
    ring, line = topology.parse("v5e:16x16"), topology.parse("v5e:8x8")
    around = {s: [((x, y), (x, (y + 1) % s.grid[1])) for x in range(s.grid[0]) for y in range(s.grid[1])]
              for s in (ring, line)}  # fmt: skip
    assert ring.permuting(around[ring]) == {(1, 1): 1}
    assert ring.permuting([(b, a) for a, b in around[ring]]) == {(1, -1): 1}
    assert line.permuting(around[line]) == {(1, 1): 1, (1, -1): 1}
    # Opposite chips of a ring reach each other both ways round: eight links, half of the bytes on each.
    across = [((x, y), ((x + 8) % 16, y)) for x in range(16) for y in range(16)]
    assert ring.permuting(across) == {(0, 1): 4, (0, -1): 4}
    assert ring.permuting([((0, 0), (0, 0))]) == {}
