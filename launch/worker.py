"""Runs on each worker of a pod, by its own Python: installs the library, holds the job, tells its log.

`launch.pod` copies this file to the workers and calls it by ssh, and only ever to do what may be done
twice: gcloud repeats a command when the connection fails. Standard library and Python 3.8 only. What
it says is one line each: "@WORKER", what it is about, and the thing itself, with tabs between.

A job is a folder, `jobs/ID`: its `log`, the `pid` of its supervisor while that lives, and then its
`exit` code. The supervisor is a process of its own session, so that it outlives the connection.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path.home() / "sg4v"
VENV = ROOT / "venv"
# Longer pieces of lines could be torn where the outputs of several workers meet in one pipe.
LONGEST = 3000


def main() -> None:
    """One sub-command for each thing `launch.pod` asks for."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="do", required=True)
    command = commands.add_parser("install")
    command.add_argument("requirement", help="file below the root folder, or git+https://...")
    command.add_argument("--python", required=True)
    command.add_argument("--extras", default="")
    command.add_argument("--setup", default="")
    command.set_defaults(run=lambda a: install(a.requirement, a.python, a.extras, a.setup))
    command = commands.add_parser("start")
    command.add_argument("job")
    command.add_argument("--env", action="append", default=[])
    command.add_argument("argv", nargs="+")
    command.set_defaults(run=lambda a: start(a.job, a.argv, a.env))
    command = commands.add_parser("progress")
    command.add_argument("folder", help="its highest number is how far a run got")
    command.set_defaults(run=lambda a: say("progress", str(newest(Path(a.folder)))))
    command = commands.add_parser("logs")
    command.add_argument("--job", default="")
    command.add_argument("--skip", type=int, default=0, help="lines already told")
    command.add_argument("--follow", action="store_true")
    command.set_defaults(run=lambda a: logs(a.job, a.skip, a.follow))
    command = commands.add_parser("stop")
    command.add_argument("--grace", type=float, default=60.0)
    command.set_defaults(run=lambda a: stop(a.grace))
    command = commands.add_parser("supervise")
    command.add_argument("job")
    command.set_defaults(run=lambda a: supervise(ROOT / "jobs" / a.job))
    arguments = parser.parse_args()
    arguments.run(arguments)


def install(requirement: str, python: str, extras: str, setup: str) -> None:
    """Sets the worker up, and the library in an environment of its own; again only if it changed."""
    if setup:
        subprocess.run(["bash", "-euo", "pipefail", "-c", setup], check=True, cwd=str(Path.home()))
    file = ROOT / requirement
    local = not requirement.startswith("git+")
    content = file.read_bytes() if local else requirement.encode()
    wanted = hashlib.sha256(content).hexdigest() + f" {python} {extras}"
    marker = ROOT / "installed"
    if marker.exists() and marker.read_text() == wanted:
        say("install", "is there already")
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(str(VENV), ignore_errors=True)
    uv = shutil.which("uv")
    if uv is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--user", "uv"], check=True)
        uv = str(Path.home() / ".local" / "bin" / "uv")
    subprocess.run([uv, "venv", "--quiet", "--python", python, str(VENV)], check=True)
    name = "sg4v_jax" + (f"[{extras}]" if extras else "")
    source = file.as_uri() if local else requirement
    interpreter = str(VENV / "bin" / "python")
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", interpreter, f"{name} @ {source}"], check=True
    )
    write(marker, wanted)
    say("install", "done")


def start(job: str, argv: list[str], env: list[str]) -> None:
    """Starts a job, unless it has been."""
    folder = ROOT / "jobs" / job
    with open(ROOT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "pid").exists():
            running = current()
            if running is not None and alive(running):
                sys.exit(f"worker {worker()}: job {running.name} is running; stop it first")
            folder.mkdir(parents=True, exist_ok=True)
            variables = dict(variable.split("=", 1) for variable in env)
            write(folder / "command", json.dumps({"argv": argv, "env": variables}))
            with open(folder / "log", "ab") as log:
                itself = [sys.executable, os.path.abspath(__file__), "supervise", job]
                # Held back until the supervisor listens: it passes to what is started.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                process = subprocess.Popen(
                    itself, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            # Its command line can be seen only a moment after it was started.
            while not is_named(process.pid, job) and process.poll() is None:
                time.sleep(0.01)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            write(folder / "pid", str(process.pid))
            write(ROOT / "current", job)
    say("start", job)


def supervise(folder: Path) -> None:
    """Runs a job's command to its end, hands it what SIGTERM comes, and keeps its exit code."""
    told = []
    child = None

    def tell(number: int, frame: object) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, tell)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    command = json.loads((folder / "command").read_text())
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command["env"]}
    environment["PATH"] = f"{VENV / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
    # The interpreter's own search for the program would look along our PATH, not the job's.
    program = shutil.which(command["argv"][0], path=environment["PATH"])
    if program is None:
        print(f"{command['argv'][0]}: not found", flush=True)
        write(folder / "exit", "127")
        return
    child = subprocess.Popen([program, *command["argv"][1:]], env=environment, cwd=str(Path.home()))
    if told:
        child.send_signal(signal.SIGTERM)
    code = child.wait()
    write(folder / "exit", str(code if code >= 0 else 128 - code))


def logs(job: str, skip: int, follow: bool) -> None:
    """Tells the log from line `skip` on, then, of a job that ended, how."""
    folder = ROOT / "jobs" / job if job else current()
    if folder is None or not folder.exists():
        say("exit", "none")
        return
    parent, number, pending = os.getppid(), 0, b""
    with open(folder / "log", "rb") as log:
        while True:
            ended = exit_code(folder)
            data = log.read()  # After looking for the end: what is read then is all there will be.
            *lines, pending = (pending + data).split(b"\n")
            if ended is not None and pending:
                lines, pending = [*lines, pending], b""
            for line in lines:
                # Of a line that redraws itself, what it came to.
                text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
                for at in range(0, max(1, len(text)), LONGEST):
                    number += 1
                    if number > skip:
                        say(str(number), text[at : at + LONGEST])
            if ended is not None:
                say("exit", ended)
            # Without a terminal nobody tells a command that its connection is gone.
            if ended is not None or not follow or os.getppid() != parent:
                return
            time.sleep(0.3)


def stop(grace: float) -> None:
    """Asks the job to end, as a preemption would; after `grace` seconds ends it."""
    folder = current()
    if folder is None:
        say("exit", "none")
        return
    if alive(folder):
        pid = int((folder / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while alive(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        if alive(folder):
            os.killpg(pid, signal.SIGKILL)
            write(folder / "exit", "137")
    say("exit", exit_code(folder) or "lost")


def exit_code(folder: Path) -> str | None:
    """A job's exit code; "lost" if its supervisor died before it could write one; None while it runs."""
    lives = alive(folder)
    if (folder / "exit").exists():
        return (folder / "exit").read_text()
    return None if lives else "lost"


def alive(folder: Path) -> bool:
    """Whether the job's supervisor is there (the number may be somebody else's by now)."""
    try:
        return is_named(int((folder / "pid").read_text()), folder.name)
    except OSError:
        return False


def is_named(pid: int, job: str) -> bool:
    """Whether there is a process of that number that has the job in its command line."""
    try:
        return job.encode() in Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def current() -> Path | None:
    """The folder of the job that was started last."""
    file = ROOT / "current"
    return ROOT / "jobs" / file.read_text() if file.exists() else None


def newest(folder: Path) -> int:
    """The highest number among the names in a folder: the newest checkpoint's step. -1: none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


@functools.lru_cache
def worker() -> str:
    """Number of this worker in its slice, as the TPU runtime counts them."""
    if "TPU_WORKER_ID" in os.environ:
        return os.environ["TPU_WORKER_ID"]
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/agent-worker-number"
    import urllib.request  # Slow to import, and needed only here.

    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode().strip()


def say(what: str, text: str) -> None:
    """One line to whoever asked, at once and in one piece."""
    sys.stdout.write(f"@{worker()}\t{what}\t{text}\n")
    sys.stdout.flush()


def write(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(str(temporary), str(path))


if __name__ == "__main__":
    main()
