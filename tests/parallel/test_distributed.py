"""How processes find each other; on a TPU VM, by the metadata server, with nothing in the environment."""

import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.parallel import distributed

REPOSITORY = pathlib.Path(__file__).parents[2]
SCRIPT = """
import os
import jax
# JAX sets it where it finds no chip; on a TPU VM it does.
os.environ.pop("TPU_SKIP_MDS_QUERY", None)
from sg4v_jax.parallel import distributed
distributed.initialize()
distributed.initialize()
print(jax.process_index(), jax.process_count(), jax.distributed.is_initialized())
"""


def run(environments: list[dict[str, str]]) -> list[str]:
    """What a process in each environment prints."""
    hidden = ("TPU_", "MEGASCALE_", "SG4V_", "JAX_FORCE")
    base = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    base |= {"PYTHONPATH": os.fspath(REPOSITORY), "JAX_PLATFORMS": "cpu", "no_proxy": "*"}
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=base | env, stdout=subprocess.PIPE, text=True)
        for env in environments
    ]
    return [process.communicate()[0].splitlines()[-1] for process in running]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of one worker of two."""

    worker = ""

    def do_GET(self) -> None:
        texts = {
            "agent-worker-number": self.worker,
            "worker-network-endpoints": "unknown:unknown:localhost,unknown:unknown:localhost",
            "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nWORKER_ID: '0'\n",
        }
        text = texts.get(self.path.rpartition("/")[2])
        self.send_response(200 if text is not None else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_tpu_vm() -> None:
    port, environments, servers = free_port(), [], []
    for worker in "01":
        handler = type("Worker", (Metadata,), {"worker": worker})
        server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"localhost:{server.server_address[1]}"
        environments.append(
            {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": address, "JAX_COORDINATOR_PORT": port}
        )
    assert run(environments) == ["0 2 True", "1 2 True"]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_by_variables_and_alone() -> None:
    given = {"SG4V_COORDINATOR": f"localhost:{free_port()}", "SG4V_NUM_PROCESSES": "2"}
    pair = [given | {"SG4V_PROCESS_ID": str(index)} for index in (0, 1)]
    assert run([*pair, {}]) == ["0 2 True", "1 2 True", "0 1 False"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"SG4V_COORDINATOR": "host:1"}, r"--coordinator=host:1 without --num-processes .* and --process-id"),
        ({"SG4V_PROCESS_ID": "0", "SG4V_NUM_PROCESSES": "2"}, r"without --coordinator \(or \$SG4V_COORD"),
        ({"SG4V_COORDINATOR": "host", "SG4V_PROCESS_ID": "0", "SG4V_NUM_PROCESSES": "1"}, "HOST:PORT"),
        (
            {"SG4V_COORDINATOR": "h:1", "SG4V_PROCESS_ID": "2", "SG4V_NUM_PROCESSES": "2"},
            "from 0 to one less",
        ),
        ({"SG4V_COORDINATOR": "h:1", "SG4V_PROCESS_ID": "x", "SG4V_NUM_PROCESSES": "2"}, "--process-id=x of"),
    ],
)
def test_values_that_make_no_sense(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in distributed.FLAGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()
    assert not jax.distributed.is_initialized()


def test_flags_come_before_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A half-set job must not train as one of its own, in the same directory as all the others."""
    for name, value in zip(distributed.FLAGS, ("host", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(
            ["eval", "--model=m", "--questions=/dev/null", "--images=i", "--output=o", "--coordinator=other"]
        )
    assert "--coordinator=other: expected HOST:PORT" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_others_that_never_come(index: int) -> None:
    """JAX alone would end with a stack trace of C++."""
    call = f"distributed.initialize('localhost:{free_port()}', 2, {index}, 1.0)"
    script = f"from sg4v_jax.parallel import distributed; {call}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "TimeoutError: the processes of this job did not all come together at localhost" in done.stderr
    assert f"(process {index} of 2) within 1 s" in done.stderr and "Check failure" not in done.stderr
