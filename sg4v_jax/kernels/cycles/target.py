"""Compiles for a TPU generation on any host, and keeps the compiler's schedule."""

import collections
import dataclasses
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from sg4v_jax.parallel.peaks import PEAK_FLOPS

SCHEDULE = "packed-bundles-post-ra"
UTILIZATION = "pre-delay"
SAME_PROGRAMS = "deduplication-map"

# libtpu reads these when it is loaded. Without the first it looks for a TPU, without the next three it
# asks the cloud's metadata server who it is, and without the fifth only one process per host may load it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one core can do. The clock follows from the published peak and the array's size.

    Attributes:
      name: `v4`, `v5e`, `v5p`, `v6e`.
      topology: the smallest one that libtpu knows.
      clock: cycles per second.
      peak: bfloat16 operations per second of a chip.
      bandwidth: bytes per second of a chip's memory.
      cores: cores that share a chip.
      mxus: matrix units of a core.
      matmul_cycles: cycles for which one bfloat16 `vmatmul` (16 rows) occupies its matrix unit.
      delay_slots: bundles that still run after a branch.
      granule: bytes that a transfer's size counts in.
    """

    name: str
    topology: str
    clock: float
    peak: float
    bandwidth: float
    cores: int
    mxus: int
    matmul_cycles: int
    delay_slots: int = 4
    granule: int = 32


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            "v4", "v4:2x2x1", 1.05e9, PEAK_FLOPS["TPU v4"], 1228e9, 2, 4, 16, delay_slots=1, granule=512
        ),
        Generation("v5e", "v5e:2x2", 1.5e9, PEAK_FLOPS["TPU v5e"], 819e9, 1, 4, 16),
        Generation("v5p", "v5p:2x2x1", 1.75e9, PEAK_FLOPS["TPU v5"], 2765e9, 2, 4, 16),
        Generation("v6e", "v6e:2x2", 1.75e9, PEAK_FLOPS["TPU v6"], 1640e9, 1, 2, 8),
    )
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Texts of a compiled program.

    Attributes:
      programs: program name to kind of dump to text.
      hlo: the optimised HLO, with all constants.
      executable: what JAX compiled.
      seconds: time that compilation took.
    """

    programs: dict[str, dict[str, str]]
    hlo: str
    executable: Any
    seconds: float


_directory: str | None = None


def prepare() -> str:
    """Sets libtpu's environment, before it is loaded; gives the folder of its dumps."""
    global _directory
    if _directory is None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _directory = tempfile.mkdtemp(prefix="sg4v-cycles-")
        kinds = "|".join((SCHEDULE, UTILIZATION, SAME_PROGRAMS))
        flags = (
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={_directory}",
            "--xla_jf_dump_llo_text=true",
            f"--xla_jf_dump_llo_pass_label_regex={kinds}",
        )
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    return _directory


def one_device_mesh(generation: Generation) -> Any:
    """A mesh of one device of a TPU that need not exist."""
    prepare()
    import jax
    import numpy as np
    from jax.experimental import topologies

    # On v4 one device is a chip with both its cores, as in real jobs.
    options = {"chip_config_name": "megacore"} if generation.name == "v4" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=generation.topology, **options)
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))


def compile_for(generation: Generation, function: Callable[..., Any], arguments: Sequence[Any]) -> Compiled:
    """Compiles `function` for one device and reads the schedule of everything in it.

    Args:
      generation: what to compile for.
      function: what to compile.
      arguments: pytrees of arrays or ShapeDtypeStructs; they come in row-major layout.

    Raises:
      RuntimeError: if libtpu was loaded before `prepare`, so that it dumps nothing.
    """
    folder = prepare()
    import jax
    from jax.experimental.layout import Format, Layout

    mesh = one_device_mesh(generation)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def row_major(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=Format(Layout(tuple(range(x.ndim))), sharding))

    specs = jax.tree.map(row_major, arguments)
    _empty(folder)
    # Kernels ask what they are compiled for, and a trace for something else must not be found again.
    jax.clear_caches()
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        executable = jax.jit(function).lower(*specs).compile()
    seconds = time.perf_counter() - start
    programs: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path in glob.glob(os.path.join(folder, "*.txt")):
        name = re.match(r"\d+-(.*)-\d+-([a-z][\w-]*)\.txt$", os.path.basename(path))
        if name and not name.group(2).startswith("schedule-analysis"):
            kind = next(
                (k for k in (SCHEDULE, UTILIZATION, SAME_PROGRAMS) if name.group(2).startswith(k)), None
            )
            if kind:
                with open(path, errors="replace") as file:
                    programs[name.group(1)][kind] = file.read()
    _empty(folder)
    if not programs:
        raise RuntimeError("libtpu dumped nothing: it was loaded before cycles.target.prepare() was called")
    return Compiled(dict(programs), _hlo(executable), executable, seconds)


def _hlo(executable: Any) -> str:
    try:  # The public text leaves large constants out; they may hold bounds of loops.
        from jaxlib import _hlo  # type: ignore[attr-defined]

        options = _hlo.HloPrintOptions()
        options.print_large_constants = True
        return str(executable.runtime_executable().hlo_modules()[0].to_string(options))
    except (ImportError, AttributeError):
        return str(executable.as_text())


def _empty(folder: str) -> None:
    for path in glob.glob(os.path.join(folder, "*")):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
