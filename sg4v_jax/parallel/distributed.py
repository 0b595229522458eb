"""Process start-up: one call, before anything touches a device."""

import os

import jax


def initialize() -> None:
    """Joins this process to the others of the job, once.

    TPU VMs, GKE, Slurm and MPI are recognised by JAX itself. Anything else sets
    SG4V_COORDINATOR (host:port), SG4V_NUM_PROCESSES and SG4V_PROCESS_ID. A lone process does
    nothing.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("SG4V_COORDINATOR")
    if address:
        jax.distributed.initialize(
            address, int(os.environ["SG4V_NUM_PROCESSES"]), int(os.environ["SG4V_PROCESS_ID"])
        )
    elif "TPU_WORKER_HOSTNAMES" in os.environ or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()
