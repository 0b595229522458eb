import math

import pytest

from launch.accelerators import GENERATIONS, find

ALL = [f"{kind}-{size}" for kind, generation in GENERATIONS.items() for size in generation.topologies]


@pytest.mark.parametrize(
    ("name", "accelerator_type", "topology", "chips", "hosts"),
    [
        # The sizes that the recipes are made for, and the ends.
        ("v4-8", "v4-8", "2x2x1", 4, 1),
        ("v4-32", "v4-32", "2x2x4", 16, 4),
        ("v4-64", "v4-64", "2x4x4", 32, 8),
        ("v5e-1", "v5litepod-1", "1x1", 1, 1),
        ("v5e-8", "v5litepod-8", "2x4", 8, 1),
        ("v5e-16", "v5litepod-16", "4x4", 16, 4),
        ("v5e-64", "v5litepod-64", "8x8", 64, 16),
        ("v5e-256", "v5litepod-256", "16x16", 256, 64),
        ("v5p-32", "v5p-32", "2x2x4", 16, 4),
        ("v5p-128", "v5p-128", "4x4x4", 64, 16),
        ("v6e-8", "v6e-8", "2x4", 8, 1),
        ("v6e-32", "v6e-32", "4x8", 32, 8),
        ("v6e-256", "v6e-256", "16x16", 256, 64),
    ],
)
def test_known_slices(name: str, accelerator_type: str, topology: str, chips: int, hosts: int) -> None:
    found = find(name)
    assert (found.accelerator_type, found.topology, found.chips, found.hosts) == (
        accelerator_type,
        topology,
        chips,
        hosts,
    )
    assert find(accelerator_type) == found


@pytest.mark.parametrize("name", ALL)
def test_the_topology_has_the_chips(name: str) -> None:
    found = find(name)
    assert math.prod(map(int, found.topology.split("x"))) == found.chips
    assert found.chips_per_host * found.hosts == found.chips
    assert found.chips_per_host in (1, 4, 8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4-24", "no TPU slice 'v4-24'; the nearest are v4-16 and v4-32"),
        ("v5e-12", "v5e-8 and v5e-16"),
        ("v5e-512", "the nearest are v5e-256$"),
        ("v4-4", "the nearest are v4-8$"),
        ("v5p-100", "v5p-64 and v5p-128"),
        ("v3-8", "say one of v4, v5e, v5p, v6e"),
        ("v5e", "and a size, as v5e-64"),
        ("v5e-8x8", "and a size"),
        ("v5e--8", "and a size"),
    ],
)
def test_slices_there_are_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name)
