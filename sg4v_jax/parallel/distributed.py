"""Process start-up: one call, before anything touches a device."""

import os
import threading

import jax
from jax._src import cloud_tpu_init

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "SG4V_COORDINATOR", "SG4V_NUM_PROCESSES", "SG4V_PROCESS_ID"
TIMEOUT = "SG4V_JOIN_TIMEOUT"
FLAGS = {COORDINATOR: "--coordinator", NUM_PROCESSES: "--num-processes", PROCESS_ID: "--process-id"}


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float | None = None,
) -> None:
    """Joins this process to the others of the job, once.

    On TPU VMs and GKE, JAX finds the others itself, and a job of one process is one too: it gets the
    notice of a preemption this way. Anything else gives all of the first three, here or in the
    environment. Elsewhere this does nothing.

    Args:
      coordinator: host:port of process 0 ($SG4V_COORDINATOR).
      num_processes: of the job ($SG4V_NUM_PROCESSES).
      process_id: this one's number, from 0 ($SG4V_PROCESS_ID).
      timeout: seconds to wait for the others ($SG4V_JOIN_TIMEOUT; 300).

    Raises:
      ValueError: some of the three are given and some not, or they make no sense.
      TimeoutError: the others did not come.
    """
    if jax.distributed.is_initialized():
        return
    given: dict[str, object] = {
        COORDINATOR: coordinator,
        NUM_PROCESSES: num_processes,
        PROCESS_ID: process_id,
    }
    values = {name: os.environ.get(name) if value is None else str(value) for name, value in given.items()}
    seconds = float(os.environ.get(TIMEOUT, "300")) if timeout is None else timeout
    if any(values.values()):
        address, count, index = _checked(values)
        _join(seconds, f"{address} (process {index} of {count})", address, count, index)
    # A TPU VM has nothing in its environment to know it by: JAX looks for the chips, and asks the
    # metadata server for the peers.
    elif cloud_tpu_init.running_in_cloud_tpu_vm:
        _join(seconds, "the first worker, as JAX found it")


def _checked(values: dict[str, str | None]) -> tuple[str, int, int]:
    """(address, number of processes, number of this one)."""
    if missing := [name for name, value in values.items() if not value]:
        named = " and ".join(f"{FLAGS[name]} (or ${name})" for name in missing)
        there = " and ".join(f"{FLAGS[name]}={value}" for name, value in values.items() if value)
        raise ValueError(f"{there} without {named}: a process needs all three, or none of them")
    address, count, index = (str(value) for value in values.values())
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"{FLAGS[COORDINATOR]}={address}: expected HOST:PORT, where process 0 can be reached"
        )
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"{FLAGS[PROCESS_ID]}={index} of {FLAGS[NUM_PROCESSES]}={count}: expected a number from 0 to "
            "one less than the number of processes"
        )
    return address, int(count), int(index)


def _join(
    seconds: float,
    where: str,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> None:
    """`jax.distributed.initialize`, with an end that can be read.

    When its own time is up, JAX aborts the process with a stack trace of C++; so it is given more.
    """
    failed: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(address, count, index, initialization_timeout=int(seconds) + 600)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(
            f"the processes of this job did not all come together at {where} within {seconds:g} s: are all "
            f"of them running, each with its own process id, and is that address open to them? "
            f"${TIMEOUT} is the time to wait in seconds"
        )
    if failed:
        raise failed[0]
