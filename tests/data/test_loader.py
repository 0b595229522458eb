"""The loader: epochs, mixtures, state, and what a batch holds in the end."""

import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import grain
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sg4v_jax.data.build import build, decode_example, open_dataset
from sg4v_jax.data.elements import Elements
from sg4v_jax.data.loader import BatchIterator, Loader, LoaderConfig, dropped, reshard
from sg4v_jax.data.mixture import Replacement, Source
from sg4v_jax.data.reader import Reader
from sg4v_jax.data.sample import SampleFormat, make_sample
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.parallel.mesh import make_mesh
from tests.conftest import TinyWorld

FORM = SampleFormat(
    template="v1", aspect="pad", prompt="", image_size=12, image_tokens=4, length=512, image_slots=2
)


def loader(world: TinyWorld, shard: tuple[int, int] | None = None, **changes: Any) -> Loader:
    config = LoaderConfig(
        sources={"mix": Source(str(world.mix))},
        form=FORM,
        batch_size=3,
        packing=True,
        packing_window=8,
        seed=7,
        num_threads=2,
    )
    return Loader(dataclasses.replace(config, **changes), Tokenizer(world.tokenizer), shard)


def samples_of(batches: Any, count: int) -> list[bytes]:
    """The tokens of the first `count` samples, in order."""
    found: list[bytes] = []
    while len(found) < count:
        batch = next(batches)
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            found += [tokens[segments == i].tobytes() for i in range(1, segments.max() + 1)]
    return found


def expected_samples(world: TinyWorld, dataset: Any, **changes: Any) -> collections.Counter[bytes]:
    tokenizer, records = Tokenizer(world.tokenizer), open_dataset(dataset)
    form = dataclasses.replace(FORM, **changes)
    return collections.Counter(
        make_sample(*decode_example(records[i], "mix", i), form, tokenizer)["tokens"].tobytes()
        for i in range(len(records))
    )


@pytest.mark.parametrize("threads", [0, 2])
def test_every_sample_once_in_each_epoch(tiny_world: TinyWorld, threads: int) -> None:
    """In another order each time. One sample a row, so that the end of an epoch is a position."""
    one = loader(tiny_world, packing=False, batch_size=1, num_threads=threads)
    expected = expected_samples(tiny_world, tiny_world.mix)
    n = sum(expected.values())
    assert n == one.num_records == one.steps_per_epoch()
    found = samples_of(iter(one), 2 * n)
    first, second = found[:n], found[n : 2 * n]
    assert collections.Counter(first) == collections.Counter(second) == expected
    assert first != second


def test_packing_loses_no_sample(tiny_world: TinyWorld) -> None:
    expected = expected_samples(tiny_world, tiny_world.mix)
    n = sum(expected.values())
    # Open rows hold back samples of the epoch's end; two epochs later all of it has come out.
    found = collections.Counter(samples_of(iter(loader(tiny_world)), 3 * n))
    assert found.keys() == expected.keys()
    for sample, count in expected.items():
        assert abs(found[sample] - 3 * count) <= count


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("after", [1, 5])
def test_state_resumes_to_the_bit(tiny_world: TinyWorld, packing: bool, after: int) -> None:
    captions = {"mix": Source(str(tiny_world.mix)), "captions": Source(str(tiny_world.captions))}
    make = lambda: iter(loader(tiny_world, packing=packing, sources=captions))  # noqa: E731
    batches = make()
    for _ in range(after):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(4)]
    again = make()
    again.set_state(state)
    for batch in expected:
        assert equal(next(again), batch)
    assert isinstance(again, grain.DatasetIterator)


def test_seed_decides_the_order(tiny_world: TinyWorld) -> None:
    first = [next(iter(loader(tiny_world, seed=seed))) for seed in (7, 7, 8)]
    assert equal(first[0], first[1])
    assert not equal(first[0], first[2])


@pytest.mark.parametrize(
    ("weights", "share"), [((0.0, 0.0), None), ((1.0, 1.0), 0.5), ((3.0, 1.0), 0.75), ((1.0, 9.0), 0.1)]
)
def test_mixture_follows_the_weights(
    tiny_world: TinyWorld, weights: tuple[float, float], share: float | None
) -> None:
    """0 means the number of records."""
    directories = (tiny_world.captions, tiny_world.mix)
    captions, mix = (expected_samples(tiny_world, directory).keys() for directory in directories)
    captions = captions - mix  # One caption in four is in the mix as well.
    sources = {
        name: Source(str(directory), weight)
        for name, directory, weight in zip(("captions", "mix"), directories, weights, strict=True)
    }
    records = [len(open_dataset(directory)) for directory in directories]
    share = records[0] / sum(records) if share is None else share
    mixed = loader(tiny_world, sources=sources, packing=False, batch_size=1)
    assert mixed.num_records == sum(records)
    found = samples_of(iter(mixed), 300)
    only_captions = share * len(captions) / records[0]
    assert abs(sum(sample in captions for sample in found) / 300 - only_captions) < 0.06


def test_steps_per_epoch_estimates_the_packed_rows(tiny_world: TinyWorld) -> None:
    packed = loader(tiny_world)
    n = sum(expected_samples(tiny_world, tiny_world.mix).values())
    batches, seen, steps = iter(packed), 0, 0
    while seen < n:
        seen += int(next(batches).segment_ids.max(axis=1).sum())
        steps += 1
    assert abs(packed.steps_per_epoch() - steps) <= 0.25 * steps + 1


def test_what_is_cut_or_left_out_is_counted_by_source(tiny_world: TinyWorld) -> None:
    """And the counts are those of the batches handed out, so they survive a resume."""
    sources = {"mix": Source(str(tiny_world.mix)), "captions": Source(str(tiny_world.captions))}
    lengths = sorted(len(tokens) // 4 for tokens in expected_samples(tiny_world, tiny_world.mix))
    # The prompt alone is about as long as the shortest records.
    limit = lengths[0] - 1
    some = loader(tiny_world, sources=sources, form=dataclasses.replace(FORM, max_tokens=limit))
    batches, states = iter(some), []
    for _ in range(20):
        next(batches)
        states.append(batches.get_state())
    counts = states[-1]["counts"]
    assert set(counts) == set(sources)
    used = sum(source["used"] for source in counts.values())
    assert used + dropped(counts) + len(states[-1]["pending"]) == states[-1]["read"]
    assert counts["mix"]["nothing to learn"] > 0 < counts["mix"]["cut"]
    assert dropped(counts) == sum(source.get("nothing to learn", 0) for source in counts.values())
    resumed = iter(some)
    resumed.set_state(states[9])
    for state in states[10:]:
        next(resumed)
        assert resumed.get_state() == state


@pytest.mark.parametrize("packing", [False, True])
def test_an_unusable_dataset_is_an_error(tiny_world: TinyWorld, packing: bool) -> None:
    """Not an endless search for a good record."""
    none = loader(tiny_world, form=dataclasses.replace(FORM, length=8), packing=packing)
    with pytest.raises(ValueError, match=r"no record of mix can be used: .* within data\.seq_len=8"):
        next(iter(none))


def test_a_missing_dataset_says_what_to_do(tiny_world: TinyWorld) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset at /nowhere: build one with `sg4v data build`"):
        loader(tiny_world, sources={"mix": Source("/nowhere")})


# Several processes.

MIXTURES = st.sampled_from(
    [
        {"mix": {}},
        {"mix": {}, "captions": {}},
        {"mix": {"weight": 1.0}, "captions": {"weight": 3.0}},
        {"mix": {"epochs": 0.5}, "captions": {"epochs": 2.0, "aspect": "square", "template": "plain"}},
    ]
)
# The world's files don't change, and making a loader is what takes time.
STEADY = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sources_of(world: TinyWorld, mixture: dict[str, dict[str, Any]]) -> dict[str, Source]:
    return {name: Source(str(getattr(world, name)), **fields) for name, fields in mixture.items()}


def tokens_at(reader: Reader, positions: list[int]) -> collections.Counter[bytes]:
    elements = [reader(position) for position in positions]
    return collections.Counter(e["sample"]["tokens"].tobytes() for e in elements if "sample" in e)


def handed_out(batches: Any, count: int) -> collections.Counter[bytes]:
    found: collections.Counter[bytes] = collections.Counter()
    for _ in range(count):
        batch = next(batches)
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            found.update(tokens[segments == i].tobytes() for i in range(1, segments.max() + 1))
    return found


def positions_read(state: dict[str, Any]) -> list[int]:
    """By a process, from its share of what all read."""
    (index, count), leftover = state["shard"], state["leftover"]
    shared = leftover + [state["start"] + i for i in range(count * state["read"] + count)]
    return shared[index::count][: state["read"]]


@STEADY
@given(MIXTURES, st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(1, 5))
def test_processes_share_one_order(
    tiny_world: TinyWorld, mixture: dict, hosts: int, rows: int, packing: bool, steps: int
) -> None:
    """Slices are disjoint and complete: each process has handed out, or holds, what is at its positions."""
    options: dict[str, Any] = {
        "sources": sources_of(tiny_world, mixture),
        "batch_size": rows * hosts,
        "packing": packing,
    }
    one = loader(tiny_world, (0, hosts), **options)
    reader = one._reader
    for host in range(hosts):
        batches = BatchIterator(one._config, reader, (host, hosts))
        found = handed_out(batches, steps)
        state = batches.get_state()
        read = list(range(host, hosts * state["read"], hosts))
        assert positions_read(state) == read
        assert set(state["pending"]) <= set(read)
        assert found + tokens_at(reader, state["pending"]) == tokens_at(reader, read)


@STEADY
@given(MIXTURES, st.lists(st.sampled_from([1, 2, 3, 6]), min_size=2, max_size=4), st.integers(0, 3))
def test_another_number_of_processes_reads_every_record_once(
    tiny_world: TinyWorld, mixture: dict, hosts: list[int], extra: int
) -> None:
    """Through several restarts, also ones that come before the last one's leftover is used up."""
    options: dict[str, Any] = {"sources": sources_of(tiny_world, mixture), "batch_size": 6}
    one = loader(tiny_world, **options)
    reader = one._reader
    total: collections.Counter[bytes] = collections.Counter()
    states: list[dict[str, Any]] = []
    for count in hosts:
        iterators = [BatchIterator(one._config, reader, (host, count)) for host in range(count)]
        for host, iterator in enumerate(iterators):
            if states:
                iterator.set_state(reshard(states[::-1], (host, count)))
        for host, iterator in enumerate(iterators):
            # All hosts take as many steps; but one may have prefetched and not saved: no matter here.
            total += handed_out(iterator, 1 + (extra + host) % 2 if count == hosts[-1] else 1)
        states = [json.loads(json.dumps(iterator.get_state())) for iterator in iterators]
    # What is handed out or waits is all up to some position, and no record twice.
    last = reshard(states, (0, 1))
    waiting = last["leftover"]
    assert len(set(waiting)) == len(waiting)
    assert total + tokens_at(reader, waiting) == tokens_at(reader, list(range(last["start"])))
    counts: collections.Counter[str] = collections.Counter()
    for state in states:
        for source in state["counts"].values():
            counts["used"] += source["used"]
    assert counts["used"] == sum(total.values())


def test_states_that_do_not_belong_together(tiny_world: TinyWorld) -> None:
    states = [iter(loader(tiny_world, (host, 3))).get_state() for host in range(3)]
    with pytest.raises(ValueError, match=r"state is of process 1 of 3, this is 0 of 1; use Loader"):
        iter(loader(tiny_world)).set_state(states[1])
    with pytest.raises(ValueError, match=r"of 3 processes is needed; found those of 0, 2"):
        reshard([states[2], states[0]], (0, 2))
    with pytest.raises(ValueError, match="not of one run"):
        reshard([*states[:2], states[2] | {"start": 7}], (0, 2))
    with pytest.raises(ValueError, match="batch_size 3 does not divide by 2 processes"):
        loader(tiny_world, (0, 2))


def test_other_data_is_noticed(tiny_world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    state = iter(loader(tiny_world)).get_state()
    iter(loader(tiny_world)).set_state(state)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    iter(loader(tiny_world, seed=8)).set_state(state)
    assert "records may be read twice or not at all" in caplog.text


# Sources that differ, and captions that are replaced.


def test_each_source_has_its_own_form(tiny_world: TinyWorld) -> None:
    plain = {"template": "plain", "aspect": "square"}
    sources = sources_of(tiny_world, {"mix": {}, "captions": plain})
    found = samples_of(iter(loader(tiny_world, sources=sources)), 60)
    expected = {
        "mix": expected_samples(tiny_world, tiny_world.mix).keys(),
        "captions": expected_samples(tiny_world, tiny_world.captions, **plain).keys(),
    }
    assert all((sample in expected["mix"]) != (sample in expected["captions"]) for sample in found)
    assert {name for name, samples in expected.items() for sample in found if sample in samples} == set(
        expected
    )


def test_captions_are_replaced_and_counted(tiny_world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    """The mix's captions are those of `captions`: replaced by brief ones of the same image they differ."""
    brief, _ = build("brief", tiny_world.directory / "cap_brief.json", tiny_world.image_root,
                     tiny_world.directory / "datasets")  # fmt: skip
    replacement = Replacement("captions", str(brief), 0.5, ".")
    caplog.set_level("INFO", "sg4v_jax.data.reader")
    options: dict[str, Any] = {
        "sources": sources_of(tiny_world, {"captions": {}}),
        "packing": False,
        "batch_size": 1,
    }
    one = loader(tiny_world, replacement=replacement, **options)
    n = one.num_records
    batches = iter(one)
    found = handed_out(batches, n)
    dense = expected_samples(tiny_world, tiny_world.captions)
    new = expected_samples(tiny_world, brief)
    assert (found & new).total() == n // 2 and (found & dense).total() == n - n // 2
    assert batches.get_state()["counts"] == {"captions": {"used": n, "replaced": n // 2}}
    assert f"replacing {n // 2} of {n} captions of captions (asked for: 50.0 %)" in caplog.text
    with pytest.raises(ValueError, match=r"replace\.source='sft' is not in config\.data\.sources; there are"):
        loader(tiny_world, replacement=dataclasses.replace(replacement, source="sft"), **options)


# Worker processes, and ends that nobody planned.

WORKERS = {"num_workers": 2, "num_threads": 1, "packing_window": 12}


def digest(batch: Any) -> str:
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()


def both(world: TinyWorld) -> dict[str, Source]:
    return sources_of(world, {"mix": {"epochs": 0.7}, "captions": {"epochs": 1.3, "aspect": "square"}})


def stream(directories: list[str], output: str) -> None:
    """Writes digests and states of batches for ever, and the workers' process ids first."""
    world = TinyWorld(*map(pathlib.Path, directories))
    batches = iter(loader(world, sources=both(world), **WORKERS))
    with open(output, "a") as file:
        while True:
            line = {"digest": digest(next(batches)), "state": batches.get_state()}
            line["workers"] = [child.pid for child in multiprocessing.active_children()]
            file.write(json.dumps(line) + "\n")
            file.flush()


def alive(pid: int) -> bool:
    """Whether a process runs (and isn't only waiting for its parent to notice its end)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Any, seconds: float = 300) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_killed_with_workers_it_goes_on_with_the_same_batches(
    tiny_world: TinyWorld, tmp_path: pathlib.Path
) -> None:
    """At whatever moment the kill comes; with more, fewer or no workers after it. None is left behind."""
    output = tmp_path / "lines.jsonl"
    directories = [os.fspath(path) for path in vars(tiny_world).values()]
    script = f"from tests.data import test_loader; test_loader.stream({directories!r}, {os.fspath(output)!r})"
    environment = {**os.environ, "PYTHONPATH": os.fspath(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        assert eventually(lambda: output.exists() and output.read_text().count("\n") >= 5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = [json.loads(line) for line in output.read_text().splitlines() if line.endswith("}")]
    assert len(lines[-1]["workers"]) == WORKERS["num_workers"]
    assert eventually(lambda: not any(alive(pid) for pid in lines[-1]["workers"])), "orphaned workers"

    undisturbed = iter(loader(tiny_world, sources=both(tiny_world), num_threads=2, packing_window=12))
    expected = [digest(next(undisturbed)) for _ in range(len(lines) + 4)]
    assert [line["digest"] for line in lines] == expected[: len(lines)]
    for after, workers in ((len(lines), 0), (3, 1)):
        resumed = iter(loader(tiny_world, sources=both(tiny_world), **WORKERS | {"num_workers": workers}))
        resumed.set_state(lines[after - 1]["state"])
        assert [digest(next(resumed)) for _ in range(4)] == expected[after : after + 4]
        resumed.close()


@pytest.mark.slow
def test_dead_and_stuck_workers_are_replaced(tiny_world: TinyWorld, caplog: pytest.LogCaptureFixture) -> None:
    """And nobody sees it in the batches; a worker told to end by the notice to the whole job goes on."""
    before = set(multiprocessing.active_children())
    options = WORKERS | {"num_workers": 1}
    expected = iter(loader(tiny_world, **options | {"num_workers": 0}))
    batches = iter(loader(tiny_world, worker_timeout=4.0, **options))

    def worker() -> Any:
        (child,) = (child for child in multiprocessing.active_children() if child not in before)
        return child

    def same_until(replaced: Any) -> None:
        """What Grain has ready comes first."""
        for _ in range(1000):
            assert digest(next(batches)) == digest(next(expected))
            if worker().pid != replaced.pid:
                return
        raise AssertionError("the worker was never missed")

    assert digest(next(batches)) == digest(next(expected))
    first = worker()
    os.kill(first.pid, signal.SIGTERM)
    for _ in range(20):
        assert digest(next(batches)) == digest(next(expected))
    assert worker().pid == first.pid
    os.kill(first.pid, signal.SIGKILL)
    same_until(first)
    assert (
        "data worker process died (Worker process was terminated unexpectedly with exit code -9)"
        in caplog.text
    )
    second = worker()
    os.kill(second.pid, signal.SIGSTOP)
    same_until(second)
    assert "no record came from 1 data workers for 4 s (config.data.worker_timeout)" in caplog.text
    batches.close()
    assert eventually(lambda: not any(alive(child.pid) for child in (first, second)))


def test_a_worker_that_always_dies_is_an_error(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = iter(loader(tiny_world, **WORKERS))
    opened = []

    def dying(elements: Elements) -> Any:
        opened.append(None)
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs")
        yield

    monkeypatch.setattr(Elements, "_open", dying)
    with pytest.raises(RuntimeError, match=r"died .*exit code -9.*3 times .*fewer data\.num_workers"):
        next(batches)
    assert len(opened) == 3


def test_batches_ahead_on_the_devices_are_the_same(tiny_world: TinyWorld) -> None:
    """The state is that of the batch handed out, however many are ready behind it."""
    here, mesh = iter(loader(tiny_world)), make_mesh()
    ahead = loader(tiny_world, prefetch=3).on_devices(mesh)
    for _ in range(3):
        batch = next(ahead)
        assert equal(batch, next(here)) and isinstance(batch.images, jax.Array)
        assert ahead.get_state() == here.get_state()
    state = ahead.get_state()
    ahead.close()
    again = loader(tiny_world, prefetch=0).on_devices(mesh)
    again.set_state(state)
    assert equal(next(again), next(here))
    again.close()
