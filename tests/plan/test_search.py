"""Search, report and command, with plans that nobody compiled."""

import dataclasses
import pathlib

import pytest
from ml_collections import ConfigDict

from sg4v_jax import config as configs
from sg4v_jax.__main__ import main
from sg4v_jax.plan import report, search, topology
from sg4v_jax.plan.collectives import Collective
from sg4v_jax.plan.memory import Memory, OutOfMemory
from sg4v_jax.plan.plan import Plan
from sg4v_jax.plan.roofline import roofline
from sg4v_jax.plan.topology import GIB
from sg4v_jax.plan.work import Work

SLICE = topology.parse("v5e-64")


def made_up(config: ConfigDict, gib: float, seconds: float) -> Plan:
    """Of so much memory, and products that take so long."""
    work = Work(product_flops=seconds * SLICE.chip.flops, hbm_bytes=1e9, kernels={})
    found = [Collective("all-gather", 32, 2**20, (0, 1), True, "")]
    coordinates = [(x, y) for x in range(8) for y in range(8)]
    return Plan(
        step="train", topology=SLICE, mesh={"data": 1, "fsdp": 64, "tensor": 1}, rows=64, tokens=64 * 3072,
        remat=config.train.remat, memory=Memory(GIB, GIB, GIB, int(gib * GIB) - GIB, 0),
        arguments={"batch": GIB}, work=work, collectives=found, model_flops=1e15,
        roofline=roofline(SLICE, coordinates, work, found, {}), host_bytes=0,
        unknown_loops=[], compile_seconds=1.0, hlo="",
    )  # fmt: skip


def test_candidates_divide_and_are_ranked() -> None:
    config = configs.load("configs/pretrain.py:7b")
    found = search.candidates(config, SLICE)
    assert found
    for candidate in found:
        assert candidate.data * candidate.fsdp * candidate.tensor == 64
        assert 64 % (candidate.data * candidate.fsdp * candidate.accumulate) == 0
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    # 7B with its optimizer on one chip, or activations of everything, is not worth a compilation.
    assert not any(c.fsdp * c.tensor < 8 for c in found)
    # The guess is near what the compiler said of the recommended setting, 10.67 GiB.
    (known,) = (c for c in found if (c.fsdp, c.accumulate, c.remat) == (64, 1, "projections"))
    assert known.bytes / GIB == pytest.approx(10.67, rel=0.25)


def test_search_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`none` is out of memory, `projections` is above the limit, `mlp` is faster than the others."""
    seconds = {"full": 1.2, "attention": 1.1, "mlp": 0.9, "projections": 0.8, "dots": 1.0}

    def plan(config: ConfigDict, where: topology.Topology) -> Plan:
        if config.train.remat == "none":
            raise OutOfMemory(20 * GIB, 16 * GIB, [])
        return made_up(config, 16 if config.train.remat == "projections" else 10, seconds[config.train.remat])

    monkeypatch.setattr(search, "plan_train", plan)
    told: list[str] = []
    config = configs.load("configs/pretrain.py:7b")
    found, best = search.search(config, SLICE, 100, iter, told.append)
    assert found.train.remat == best.remat == "mlp" and config.train.remat == "full"
    assert any("DOES NOT FIT" in line for line in told) and told[-1].startswith("best: --config.mesh.data=")

    # What the config says comes first, so one try is that, however slow a guess calls it.
    config.mesh.data, config.mesh.fsdp, config.train.remat = 2, -1, "full"
    own, _ = search.search(config, SLICE, 1, iter, told.append)
    assert (own.mesh.data, own.mesh.fsdp, own.mesh.tensor, own.train.remat) == (2, 32, 1, "full")

    monkeypatch.setattr(search, "plan_train", lambda config, where: made_up(config, 20, 1.0))
    with pytest.raises(ValueError, match="none of 3 settings fits v5e:8x8"):
        search.search(config, SLICE, 3, iter, told.append)
    config.data.batch_size = 63
    with pytest.raises(ValueError, match=r"no mesh of v5e:8x8 divides config.data.batch_size.63 rows"):
        search.search(config, SLICE, 3, iter, told.append)


def test_times_add_up() -> None:
    """Hidden collectives are only felt where they are the longest, others always."""
    work = Work(product_flops=0.5 * SLICE.chip.flops, hbm_bytes=0.1 * SLICE.chip.hbm_bandwidth, kernels={})
    link = SLICE.chip.link_bandwidth
    # A pair of neighbours has one link: an all-gather of 2 x bytes sends half of them.
    pair = {"members": (0, 1), "runs": 1, "where": ""}
    hidden = Collective("all-gather", bytes=int(2 * link), hidden=True, **pair)
    exposed = Collective("all-reduce", bytes=int(0.25 * link), hidden=False, **pair)
    found = roofline(SLICE, [(0, 0), (0, 1)], work, [hidden, exposed], {"flash_forward": 0.1})
    assert found.compute == pytest.approx(0.6)
    assert (found.hidden, found.exposed) == (pytest.approx(1.0), pytest.approx(0.25))
    assert found.bound == pytest.approx(1.25) and found.limit == "network"
    assert found.expected == pytest.approx(1.25)
    assert found.network == pytest.approx(1.25)
    slower = dataclasses.replace(found, products=2.0)
    assert slower.bound == pytest.approx(2.1) and slower.expected == pytest.approx(2.35)


def test_a_sparse_core_hides_as_long_as_there_is_work_beside_it() -> None:
    """A second of transfers beside 0.3 s of products, and both runs of a kernel that takes 0.1 s for both."""
    work = Work(0.5 * SLICE.chip.flops, 0.0, {"flash_forward": 2})
    beside = Work(0.3 * SLICE.chip.flops, 0.0, {"flash_forward": 2})
    size = int(2 * SLICE.chip.link_bandwidth)
    gather = Collective("all-gather", 1, size, (0, 1), True, "", beside=beside)
    found = roofline(SLICE, [(0, 0), (0, 1)], work, [gather], {"flash_forward": 0.1})
    assert (found.exposed, found.hidden) == (pytest.approx(0.6), pytest.approx(0.4))
    assert found.expected == pytest.approx(0.6 + 0.6)
    gather = dataclasses.replace(gather, beside=work)  # Now there is 0.6 s of it.
    found = roofline(SLICE, [(0, 0), (0, 1)], work, [gather], {"flash_forward": 0.1})
    assert found.exposed == pytest.approx(0.4)


def test_permutes_of_both_ways_around_run_at_once() -> None:
    """A ring of 16 chips: each way has links of its own, so the second way costs no more time."""
    ring = topology.parse("v5e:16x16")
    coordinates = [(x, y) for x in range(16) for y in range(16)]
    right = tuple((16 * x + y, 16 * x + (y + 1) % 16) for x in range(16) for y in range(16))
    left = tuple((b, a) for a, b in right)
    size = int(ring.chip.link_bandwidth)  # A second on one link.

    def network(*ways: tuple[tuple[int, int], ...]) -> tuple[float, float]:
        found = [Collective("collective-permute", 1, size, way[0], True, "", way) for way in ways]
        times = roofline(ring, coordinates, Work(0.0, 0.0, {}), found, {})
        return times.bound, times.hidden

    assert network(right) == network(right, left) == (pytest.approx(1), pytest.approx(1))
    assert network(right, right) == (pytest.approx(2), pytest.approx(2))


def test_what_crosses_between_slices_is_counted_apart() -> None:
    """An all-reduce of two slices: each chip sends half of the array to be added up, and half of the sum."""
    two = topology.parse("2xv5e:2x2")
    size = int(two.chip.dcn_bandwidth)
    found = Collective("all-reduce", 1, size, (0,), True, "", between_slices=True)
    times = roofline(two, [(0, 0)], Work(0.0, 0.0, {}), [found], {})
    assert (times.slices, times.network) == (pytest.approx(1), 0)
    assert times.limit == "network between slices" and times.bound == times.expected == times.slices


def test_a_cache_is_read_at_the_memory_s_speed() -> None:
    times = roofline(SLICE, [(0, 0)], Work(0.0, 0.0, {}), [], {"decode": 0.2, "flash_forward": 0.1})
    assert (times.memory, times.compute, times.limit) == (0.2, 0.1, "memory")


def test_the_page_shows_what_does_not_fit() -> None:
    config = configs.load("configs/pretrain.py:7b")
    page = report.page([made_up(config, 10, 1.0), made_up(config, 20, 1.0)], "<7b>")
    assert page.count("<h2") == 2 and page.count("class='bad'") == 1
    assert "&lt;7b&gt;" in page and "DOES NOT FIT by 4.25 GiB" in page and "fits, 5.75 GiB left" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--topology=v5e:8x8", "--steps=train,fly"],
            "--steps 'fly' is not one of train, prefill, insert, decode, caption",
        ),
        (["--topology=v5e:8x8", "--output=plan.txt"], "ends neither in .html nor in .json"),
        (["--topology=mars"], "topology 'mars' is neither like v5e:8x8"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config=configs/pretrain.py:tiny", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err
