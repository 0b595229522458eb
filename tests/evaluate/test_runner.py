"""Runs that are cut off, shared and gone on with; settings that may not change under them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from sg4v_jax.commands.common import progress_lines
from sg4v_jax.evaluate import answering
from sg4v_jax.evaluate.answering import Counted, read_answers
from sg4v_jax.evaluate.benchmark import Loaded
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import Report, run_benchmark, summary
from sg4v_jax.evaluate.settings import Choices
from sg4v_jax.infer.request import Request
from tests.evaluate.official import FakeEngine, pope, scienceqa

POPE = BENCHMARKS["pope"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    root = tmp_path_factory.mktemp("data")
    pope(root)
    return POPE.load(root)


def answer(request: Request) -> str:
    return "yes" if "cup" in request.prompt.turns[0].text else "no"


def run(loaded: Loaded, output: pathlib.Path, engine: FakeEngine, **more: object) -> Report:
    return run_benchmark(POPE, engine, loaded, output, model="fake", **more)  # type: ignore[arg-type]


def outputs(folder: pathlib.Path) -> dict[str, bytes]:
    return {name: (folder / "pope" / name).read_bytes() for name in ("samples.jsonl", "scores.json")}


def test_a_cut_off_run_goes_on(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    class Cut(FakeEngine):
        def complete(self, requests):  # type: ignore[no-untyped-def]
            for number, result in enumerate(super().complete(requests)):
                if number == 5:
                    raise KeyboardInterrupt
                yield result

    with pytest.raises(KeyboardInterrupt):
        run(loaded, tmp_path / "cut", Cut(answer))
    assert len(read_answers(tmp_path / "cut/pope")) == 5
    journal = tmp_path / "cut/pope/answers-000-of-001.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"id": "random/1", "te')
    engine = FakeEngine(answer)
    report = run(loaded, tmp_path / "cut", engine)
    assert report.asked == len(engine.seen) == 7 and not report.missing
    run(loaded, tmp_path / "whole", FakeEngine(answer))
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    again = FakeEngine(answer)
    assert run(loaded, tmp_path / "cut", again).asked == 0 and not again.seen


def test_a_power_cut_costs_few_answers(
    loaded: Loaded, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what isn't synced a power cut may leave anything: nothing, zeros, half a line, a hole."""
    monkeypatch.setattr(answering, "SYNC_EVERY", 5)
    path = tmp_path / "cut/pope/answers-000-of-001.jsonl"
    on_disk: list[int] = []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        fsync(descriptor)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            on_disk.append(path.stat().st_size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", seen)
        run(loaded, tmp_path / "cut", FakeEngine(answer))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert on_disk == [sum(map(len, lines[:count])) for count in (5, 10, 12)]
    run(loaded, tmp_path / "whole", FakeEngine(answer))
    hole = lines[6][:9] + bytes(20) + lines[7][30:]
    for tail in (b"", bytes(300), lines[5][:-7], hole + lines[8]):
        path.write_bytes(whole[: on_disk[0]] + tail)
        engine = FakeEngine(answer)
        run(loaded, tmp_path / "cut", engine)
        assert len(engine.seen) == (6 if tail.endswith(lines[8]) else 7)
        assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_shards_of_any_number_make_one_run(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    first = run(loaded, tmp_path / "shared", FakeEngine(answer), shard=(1, 3))
    assert first.asked == 4 and first.missing == 8 and not first.scores
    assert not (tmp_path / "shared/pope/scores.json").exists()
    # Two processes instead of three: what is answered stays answered.
    second = run(loaded, tmp_path / "shared", FakeEngine(answer), shard=(0, 2))
    third = run(loaded, tmp_path / "shared", FakeEngine(answer), shard=(1, 2))
    assert second.asked + third.asked == 8 and third.missing == 0
    run(loaded, tmp_path / "whole", FakeEngine(answer))
    assert outputs(tmp_path / "shared") == outputs(tmp_path / "whole")
    with pytest.raises(ValueError, match="shard 2/2"):
        run(loaded, tmp_path / "other", FakeEngine(answer), shard=(2, 2))


def test_two_processes_do_not_answer_the_same(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    class Nested(FakeEngine):
        def complete(self, requests):  # type: ignore[no-untyped-def]
            with pytest.raises(ValueError, match="another process is answering there"):
                run(loaded, tmp_path, FakeEngine(answer))
            yield from super().complete(requests)

    assert run(loaded, tmp_path, Nested(answer)).asked == 12


def test_errors_are_asked_again(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    def broken(request: Request) -> str:
        if request.key == "random/1":
            raise ValueError("a prompt of 9000 tokens")
        return answer(request)

    report = run(loaded, tmp_path, FakeEngine(broken))
    assert report.scores["without_answer"] == 1
    assert report.scores["problems"] == ["random/1: a prompt of 9000 tokens"]
    report = run(loaded, tmp_path, FakeEngine(answer))
    assert report.asked == 1 and report.scores["without_answer"] == 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(aspect="square"), "aspect was 'pad', is 'square'"),
        (Choices(template="share4v_v1"), "template was 'v1', is 'share4v_v1'"),
        (Choices(max_new_tokens=5), "max_new_tokens was 128, is 5"),
        (Choices(limit=3), "samples was 12, is 3"),
    ],
)
def test_other_settings_need_another_output(
    choices: Choices, message: str, loaded: Loaded, tmp_path: pathlib.Path
) -> None:
    run(loaded, tmp_path, FakeEngine(answer))
    with pytest.raises(ValueError, match=message):
        run(loaded, tmp_path, FakeEngine(answer), choices=choices)


@pytest.mark.parametrize(
    "wrong", [{"mode": "guess"}, {"aspect": "stretch"}, {"limit": -1}, {"max_new_tokens": -1}]
)
def test_impossible_choices(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Choices(**wrong)  # type: ignore[arg-type]


def test_progress_knows_what_is_left(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    left: list[int] = []

    def progress(answers: Any) -> Any:
        left.append(len(answers))
        return answers

    run(loaded, tmp_path, FakeEngine(answer), shard=(0, 3), progress=progress)
    run(loaded, tmp_path, FakeEngine(answer), progress=progress)
    assert left == [4, 8]


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*progress_lines(Counted(iter("abcd"), 4), "answers", every=0.0)] == [*"abcd"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "2/4" in lines[1] and lines[1].endswith("answers/s]") and "<00:00" in lines[1]
    assert not [*progress_lines([], "answers", every=0.0)] and [*progress_lines("ab", "answers")] == [*"ab"]
    assert not capsys.readouterr().err, "a line a minute"


def test_summary(loaded: Loaded, tmp_path: pathlib.Path) -> None:
    scores = run(loaded, tmp_path, FakeEngine(answer)).scores
    text = summary({"pope": scores})
    assert "POPE" in text and "F1" in text and f"{scores['metrics']['F1']['value']:.2f}" in text


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: pathlib.Path) -> None:
    """kill -9 while answers come in: nothing is asked twice but what was under way, the end is the same."""
    script = textwrap.dedent(
        """
        import pathlib, sys, time
        from sg4v_jax.evaluate.registry import BENCHMARKS
        from sg4v_jax.evaluate.runner import run_benchmark
        from tests.evaluate.official import FakeEngine
        def answer(request):
            time.sleep(0.05)
            return "ABBA"[len(request.prompt.turns[0].text) % 4]
        loaded = BENCHMARKS["scienceqa"].load(sys.argv[1])
        run_benchmark(BENCHMARKS["scienceqa"], FakeEngine(answer), loaded, sys.argv[2], model="m")
        print("done")
        """
    )
    data, out = tmp_path / "data", tmp_path / "out"
    scienceqa(data)
    path = data / "scienceqa/problems.json"
    problem = json.loads(path.read_text())["4"]
    path.write_text(json.dumps({str(i): {**problem, "question": "?" * (i % 7)} for i in range(60)}))
    (data / "scienceqa/pid_splits.json").write_text(json.dumps({"test": [str(i) for i in range(60)]}))
    argv = [sys.executable, "-c", script, str(data), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path.cwd()), *sys.path])}
    process = subprocess.Popen(argv, env=environment)
    journal = out / "scienceqa/answers-000-of-001.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
    ids = [json.loads(line)["id"] for line in journal.read_text().splitlines()]
    assert sorted(ids, key=int) == [str(i) for i in range(60)]
    assert json.loads((out / "scienceqa/scores.json").read_text())["samples"] == 60
