"""Process start-up: one call, before anything touches a device."""

import os

import jax
from jax._src import cloud_tpu_init


def initialize() -> None:
    """Joins this process to the others of the job, once.

    On TPU VMs and GKE, JAX finds the others itself, and a job of one process is one too: it gets the
    notice of a preemption this way. Anything else sets SG4V_COORDINATOR (host:port),
    SG4V_NUM_PROCESSES and SG4V_PROCESS_ID. Elsewhere this does nothing.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("SG4V_COORDINATOR")
    if address:
        jax.distributed.initialize(
            address, int(os.environ["SG4V_NUM_PROCESSES"]), int(os.environ["SG4V_PROCESS_ID"])
        )
    # A TPU VM has nothing in its environment to know it by: JAX looks for the chips, and asks the
    # metadata server for the peers.
    elif cloud_tpu_init.running_in_cloud_tpu_vm:
        jax.distributed.initialize()
