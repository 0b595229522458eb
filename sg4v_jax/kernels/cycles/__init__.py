"""How many cycles a program takes on a TPU, without one: `measure`.

libtpu holds the whole compiler, and its schedule is explicit: one line of the dump "packed bundles after
register allocation" is one issue cycle. What the dump does not say is how often each line runs. That is
decided by scalar instructions alone (grid loops, bounds, waits for transfers), so `machine` executes
these, and only counts the vector instructions around them.

Two numbers come out: `scheduled`, the cycles issued, and `total`, with the waits for transfers under a
simple model of the memory: one pipe of the generation's bandwidth and a fixed latency. Both are the same
on every run. Not modelled: bank conflicts, refresh, contention between transfers and the core, the
network between chips, throttling.
"""

from sg4v_jax.kernels.cycles.report import Kernel, Report, measure

__all__ = ["Kernel", "Report", "measure"]
