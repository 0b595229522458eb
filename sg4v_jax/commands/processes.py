"""What the commands that run as several processes share: flags, and joining the others."""

import argparse
from typing import Any


def add_processes(parser: Any) -> None:
    """Flags of everything that runs on several machines."""
    group = parser.add_argument_group(
        "several processes", "Found by themselves on TPU VMs and GKE; anywhere else give all three."
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0 ($SG4V_COORDINATOR)")
    group.add_argument("--num-processes", type=int, help="how many there are ($SG4V_NUM_PROCESSES)")
    group.add_argument("--process-id", type=int, help="which this is, from 0 ($SG4V_PROCESS_ID)")


def join(arguments: argparse.Namespace) -> bool:
    """Joins the other processes of the job; whether this is the one that reports and writes.

    The others say only what is wrong.
    """
    import logging

    import jax

    from sg4v_jax.parallel import distributed

    distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    is_main = jax.process_index() == 0
    if not is_main:
        logging.getLogger("sg4v_jax").setLevel(logging.WARNING)
    return is_main
