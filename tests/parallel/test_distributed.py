"""How processes find each other; on a TPU VM, by the metadata server, with nothing in the environment."""

import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

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
