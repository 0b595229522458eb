"""All benchmarks by name."""

import difflib
import os
from collections.abc import Collection

from sg4v_jax.evaluate.benchmark import Benchmark, Loaded
from sg4v_jax.evaluate.benchmarks.captioning import Captioning
from sg4v_jax.evaluate.benchmarks.gqa import GQA, GQAConsistency
from sg4v_jax.evaluate.benchmarks.llava_bench import LLaVABench
from sg4v_jax.evaluate.benchmarks.mmbench import MMBench, MMBenchCN, MMBenchCNTest, MMBenchTest
from sg4v_jax.evaluate.benchmarks.mme import MME
from sg4v_jax.evaluate.benchmarks.mmstar import MMStar
from sg4v_jax.evaluate.benchmarks.mmvet import MMVet
from sg4v_jax.evaluate.benchmarks.pope import POPE
from sg4v_jax.evaluate.benchmarks.qbench import QBench
from sg4v_jax.evaluate.benchmarks.scienceqa import ScienceQA
from sg4v_jax.evaluate.benchmarks.seed import SEED
from sg4v_jax.evaluate.benchmarks.textvqa import TextVQA, TextVQAWithoutOCR
from sg4v_jax.evaluate.benchmarks.vizwiz import VizWiz, VizWizVal
from sg4v_jax.evaluate.benchmarks.vqav2 import VQAv2, VQAv2Val
from sg4v_jax.evaluate.benchmarks.world import World

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        LLaVABench(),
        MME(),
        MMBench(),
        MMBenchCN(),
        MMBenchTest(),
        MMBenchCNTest(),
        SEED(),
        MMVet(),
        QBench(),
        ScienceQA(),
        VQAv2(),
        VQAv2Val(),
        VizWiz(),
        VizWizVal(),
        GQA(),
        GQAConsistency(),
        TextVQA(),
        TextVQAWithoutOCR(),
        POPE(),
        MMStar(),
        Captioning(),
        World(),
    )
}
"""In the order of the paper's table, then the others."""


PAPER = (
    *("llava-bench", "mme", "mmbench", "mmbench-cn", "seed", "mmvet", "qbench"),
    *("scienceqa", "vqav2", "vizwiz", "gqa", "textvqa"),
)
"""The columns of the paper's table (spec 7.15); MME makes two of them."""


_GROUPS = {"paper": PAPER, "all": tuple(BENCHMARKS)}


def get_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a comma-separated list of names; `paper` and `all` stand for several.

    Raises:
      ValueError: there is none of a name; gives the nearest one and the list.
    """
    known = {name: (name,) for name in BENCHMARKS} | _GROUPS
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no benchmark {name!r}{hint} There are {', '.join(known)}")
        found += known[name]
    if not found:
        raise ValueError(f"which benchmarks? There are {', '.join(known)}")
    return [BENCHMARKS[name] for name in dict.fromkeys(found)]


def load_benchmarks(
    names: str, data: str | os.PathLike[str], answered: Collection[str] = ()
) -> tuple[dict[str, Loaded], list[str]]:
    """(samples by benchmark, why others were left out): `all` takes those whose files are there.

    Args:
      names: as `get_benchmarks` takes them.
      data: the benchmarks' data.
      answered: those that need no images any more.

    Raises:
      OSError: a benchmark that was named, or each there is, has no files or no images.
      ValueError: there is none of a name, or a file is broken.
    """
    loaded: dict[str, Loaded] = {}
    left_out = []
    for benchmark in get_benchmarks(names):
        try:
            found = benchmark.load(data)
            if benchmark.name not in answered:
                found.require_images(benchmark.name)
            loaded[benchmark.name] = found
        except OSError as error:
            if names != "all":
                raise
            left_out.append(f"{benchmark.name}: {error}")
    if not loaded:
        raise FileNotFoundError(f"{data}: no benchmark there; see docs/evaluation.md")
    return loaded, left_out
