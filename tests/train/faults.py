"""Trains a run that is killed again and again, and damaged in between; writes a log of what happened.

Each life is a process forked from one that has imported everything but not started JAX: that is most of
what a restart costs. It is killed by SIGKILL, at a random moment of a chosen phase. With more processes
than one, one of them is killed and the others are ended a moment later, as a launcher does.

Processes of one job must meet at their first collective within gloo's 30 s, and no setting was found that
raises them. So they wait for each other, for longer, where they compile; a life that fails to meet
nevertheless is lived again, and is not a kill.

    python -m tests.train.faults --compare --processes=2 --kills=20 --seed=0 --output=/tmp/faults
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed as jax_distributed
from ml_collections import ConfigDict

from sg4v_jax import config as configs
from sg4v_jax.convert import manifest
from sg4v_jax.convert.orbax import CHECKPOINTS
from sg4v_jax.parallel import distributed
from sg4v_jax.train import loop
from sg4v_jax.train.checkpoint import DELETED, Checkpointer
from tests.tiny import SMALL_RUN

STEPS = 16
# Of a life: until the first step, steps with their logging, and saves, which are most of what can go wrong.
PHASES = ("start", "step", "save", "save", "save")
DAMAGES = ("flip", "cut", "remove")
PER_PROCESS = 2  # devices
MEET_SECONDS = 600
# Lives that do not meet, in a row.
MAX_UNMET = 5
UNMET = ("Gloo context initialization failed", "Gloo Al", "DEADLINE_EXCEEDED")


def run_config(tokenizer: str, dataset: str, processes: int = 1) -> ConfigDict:
    """As small as a run gets; a checkpoint after every step."""
    fields = SMALL_RUN | {
        "model.text.num_kv_heads": 2,
        "data.sources.share_captioner.directory": dataset,
        "data.tokenizer": tokenizer,
        "data.batch_size": 2 if processes == 1 else processes * PER_PROCESS,
        "train.num_steps": STEPS,
        "checkpoint.every": 1,
        "checkpoint.keep": 3,
    }
    return configs.load("configs/pretrain.py:tiny", **fields)


class Killer:
    """Kills this process in the `count`-th of a phase, `delay` seconds after it began.

    Attributes:
      process: which of the job's it is; see `run`.
    """

    process = 0

    def __init__(self, phase: str, count: int, delay: float):
        self._phase, self._count, self._delay = phase, count, delay
        self._armed, self._saves = False, 0

    def begin(self, phase: str) -> None:
        if self._armed and phase == "save":
            # The delay is longer than was thought: the machine is not as busy as it was.
            self._saves += 1
            if self._saves == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        if phase == self._phase and not self._armed:
            self._count -= 1
            if self._count == 0:
                self._armed = True
                threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), signal.SIGKILL)


def live(
    config: ConfigDict, workdir: pathlib.Path, killer: Killer | None, environment: dict[str, str]
) -> None:
    """A life: trains until it is killed or done. Never returns."""
    code = 1
    try:
        os.environ.update(environment)
        sys.stdout.flush()
        with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if environment:
            jax.config.update("jax_num_cpu_devices", PER_PROCESS)
            distributed.initialize(timeout=MEET_SECONDS)
            _meet("initialized")
        killer = killer or Killer("never", 0, 0)
        _watch(killer, together=bool(environment))
        killer.begin("start")
        loop.train(config, workdir)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _meet(name: str) -> None:
    """Waits for the other processes, not by a collective."""
    jax_distributed.global_state.client.wait_at_barrier(f"faults_{name}", MEET_SECONDS * 1000)


def _watch(killer: Killer, together: bool) -> None:
    """Tells the killer where the run is; processes compile before any of them starts a step."""
    save, compile_step = Checkpointer.save, loop.compile_step

    def told_save(self: Any, *arguments: Any, **options: Any) -> None:
        killer.begin("save")
        save(self, *arguments, **options)

    def told_compile(*arguments: Any) -> Any:
        train_step, compiled = compile_step(*arguments), []

        def told_step(*state: Any) -> Any:
            killer.begin("step")
            if not together:
                return train_step(*state)
            if not compiled:
                compiled.append(train_step.lower(*state).compile())
                _meet("compiled")
            return compiled[0](*state)

        return told_step

    Checkpointer.save, loop.compile_step = told_save, told_compile  # type: ignore[method-assign]


def run(config: ConfigDict, workdir: pathlib.Path, processes: int, killer: Killer | None) -> list[int]:
    """A life of all processes; their exit codes in the order of their ends, negative for a signal."""
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared = {
                "SG4V_COORDINATOR": f"localhost:{free.getsockname()[1]}",
                "SG4V_NUM_PROCESSES": str(processes),
            }
        environments = [shared | {"SG4V_PROCESS_ID": str(i)} for i in range(processes)]
    victim, pids = random.randrange(processes), []
    if killer is not None:
        killer.process = victim
    for i, environment in enumerate(environments):
        pid = os.fork()
        if pid == 0:
            live(config, workdir, killer if i == victim else None, environment)
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < processes:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            time.sleep(random.uniform(0, 0.2) if processes > 1 else 0)
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return list(codes.values())


def damage(checkpoint: pathlib.Path, kind: str) -> str:
    """Spoils a complete checkpoint; says how."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.parent != checkpoint and p.stat().st_size]
    path = random.choice(sorted(files))
    if kind == "remove":
        item = checkpoint / random.choice(("params", "opt_state", "data", "meta", "manifest"))
        shutil.rmtree(item)
        return f"removed {item.name}"
    content = bytearray(path.read_bytes())
    at = random.randrange(len(content))
    if kind == "cut":
        path.write_bytes(content[:at])
        return f"cut {path.relative_to(checkpoint)} to {at} of {len(content)} bytes"
    content[at] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"flipped a bit of {path.relative_to(checkpoint)}"


def steps(workdir: pathlib.Path) -> list[int]:
    """Checkpoints that got their name."""
    directory = workdir / CHECKPOINTS
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.exists() else []


def unfinished(workdir: pathlib.Path) -> list[str]:
    """What was being written, as far as it has a directory."""
    found = (path for path in (workdir / CHECKPOINTS).glob("*") if path.is_dir())
    return sorted(path.name for path in found if not path.name.isdigit() and path.name != DELETED)


def being_removed(workdir: pathlib.Path) -> list[str]:
    """Old checkpoints of which there is still something."""
    return sorted(path.name for path in (workdir / CHECKPOINTS / DELETED).glob("*"))


def seconds_per_save(workdir: pathlib.Path) -> float:
    """Between the last checkpoints of a run that saves after every step."""
    times = [(workdir / CHECKPOINTS / str(step) / "meta").stat().st_mtime for step in steps(workdir)]
    return (times[-1] - times[0]) / (len(times) - 1)


def torment(
    config: ConfigDict, workdir: pathlib.Path, processes: int, kills: int, scale: float
) -> list[dict[str, Any]]:
    """Kills a run `kills` times, damages its newest checkpoint every few times, then lets it finish.

    `scale` is how long a save takes, in seconds: kills come within that, however busy the machine.
    """
    story: list[dict[str, Any]] = []
    log = workdir.with_name(f"{workdir.name}.log")
    killed = unmet = 0
    event: dict[str, Any] = {}
    damaged: set[int] = set()
    while killed < kills:
        done = steps(workdir)
        # Whatever it was killed in: what has a number is whole, but for what was damaged here.
        whole = [step for step in done if not manifest.problems(workdir / CHECKPOINTS / str(step))]
        if not set(done) - set(whole) <= damaged:
            raise RuntimeError(f"of the checkpoints {done} only {whole} are whole; damaged were {damaged}")
        if len(whole) > 1 and killed % 4 == 3 and not event:
            kind = DAMAGES[killed // 4 % len(DAMAGES)]
            damaged.add(whole[-1])
            event["damaged"] = f"{whole[-1]}: " + damage(workdir / CHECKPOINTS / str(whole[-1]), kind)
        phase, count = random.choice(PHASES), random.choice((1, 2, 3))
        delay = random.uniform(0, {"start": 10, "step": 1, "save": 1.5}[phase] * scale)
        if done and done[-1] > STEPS - 6:
            # Little is left to do: it must not end before it is killed.
            phase, count, delay = "step", 1, 0
        count = 1 if phase == "start" else count
        said = _size(log)
        killer = Killer(phase, count, delay)
        codes = run(config, workdir, processes, killer)
        if codes[0] != -signal.SIGKILL:
            unmet += 1
            if unmet > MAX_UNMET or not _did_not_meet(log, said):
                raise RuntimeError(f"a life ended with {codes} before it was killed: {log}")
            event["unmet"] = unmet
            continue
        killed, unmet = killed + 1, 0
        event |= {
            "process": killer.process,
            "phase": phase,
            "delay": round(delay, 3),
            "checkpoints": steps(workdir),
        }
        story.append(event | {"unfinished": unfinished(workdir), "removed": being_removed(workdir)})
        event = {}
        print(json.dumps(story[-1]), file=sys.stderr, flush=True)
    finish(config, workdir, processes)
    return story


def table(lives: list[dict[str, Any]]) -> str:
    """What happened, as docs/survival.md shows it."""
    header = "#, damaged before, process, killed in, delay, complete then, being written, being removed"
    rows = [header.split(", ")]
    rows += [["---"] * len(rows[0])]
    for number, life in enumerate(lives, 1):
        names = ("checkpoints", "unfinished", "removed")
        # Of `4.orbax-checkpoint-tmp` the step.
        done, unfinished, removed = (
            ", ".join(str(n).partition(".")[0] for n in life[name]) for name in names
        )
        row = [number, life.get("damaged", ""), life["process"], life["phase"], life["delay"]]
        rows.append([str(cell) for cell in (*row, done or "-", unfinished, removed)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def finish(config: ConfigDict, workdir: pathlib.Path, processes: int) -> None:
    """Trains to the end, undisturbed."""
    log = workdir.with_name(f"{workdir.name}.log")
    for _ in range(1 + MAX_UNMET):
        said = _size(log)
        if not any(codes := run(config, workdir, processes, None)):
            return
        if not _did_not_meet(log, said):
            break
    raise RuntimeError(f"a life that nobody killed ended with {codes}: {log}")


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _did_not_meet(log: pathlib.Path, before: int) -> bool:
    """Whether what a log has said since it had `before` bytes is that processes did not meet in time."""
    said = log.read_bytes()[before:].decode(errors="replace")
    return any(sign in said for sign in UNMET)


def tiny_world(directory: pathlib.Path) -> list[str]:
    """Tokenizer and dataset of the tests' world. Another process builds it: this one has to fork."""
    directory.mkdir()
    script = (
        "import pathlib, sys; from tests.conftest import write_tiny_world; "
        "world = write_tiny_world(pathlib.Path(sys.argv[1])); "
        "print(world.tokenizer, world.captions, sep='\\n')"
    )
    command = [sys.executable, "-c", script, os.fspath(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-2:]


def compare(output: pathlib.Path) -> int:
    """Checks that both runs of `output` ended alike, to the bit; how many arrays that were.

    To be called after all lives: it starts JAX.
    """
    import numpy as np

    from tests.train.test_resume import logged, saved

    killed, undisturbed = output / "killed", output / "undisturbed"
    assert logged(killed) == logged(undisturbed)
    assert [line["step"] for line in logged(killed)] == list(range(STEPS))
    arrays = 0
    for step in steps(undisturbed)[-2:]:
        ours, theirs = saved(killed, step), saved(undisturbed, step)
        for item, leaves in theirs.items():
            assert leaves.keys() == ours[item].keys()
            for name, leaf in leaves.items():
                np.testing.assert_array_equal(ours[item][name], leaf, err_msg=f"{step} {item} {name}")
            arrays += len(leaves)
        found, expected = (
            {path.name: path.read_text() for path in (run / CHECKPOINTS / str(step) / "data").glob("*.json")}
            for run in (killed, undisturbed)
        )
        assert expected and found == expected
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", help="default: that of the tests' world, with its dataset")
    parser.add_argument("--dataset")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="at the end, as the test does")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.tokenizer:
        arguments.tokenizer, arguments.dataset = tiny_world(arguments.output / "world")
    # All lives compile the same programs.
    for name, value in {
        "jax_platforms": "cpu",
        "jax_compilation_cache_dir": os.fspath(arguments.output / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        jax.config.update(name, value)
    config = run_config(arguments.tokenizer, arguments.dataset, arguments.processes)
    start = time.monotonic()
    finish(config, arguments.output / "undisturbed", arguments.processes)
    undisturbed = time.monotonic() - start
    scale = seconds_per_save(arguments.output / "undisturbed")
    story = torment(config, arguments.output / "killed", arguments.processes, arguments.kills, scale)
    seconds = {"save": scale, "undisturbed": undisturbed, "all": time.monotonic() - start}
    (arguments.output / "story.json").write_text(json.dumps({"lives": story, "seconds": seconds}, indent=1))
    (arguments.output / "story.md").write_text(table(story))
    if arguments.compare:
        print(f"{compare(arguments.output)} arrays, and the data states and metrics, are equal to the bit")


if __name__ == "__main__":
    main()
