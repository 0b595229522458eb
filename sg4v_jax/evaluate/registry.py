"""All benchmarks by name."""

import difflib

from sg4v_jax.evaluate.benchmark import Benchmark
from sg4v_jax.evaluate.benchmarks.captioning import Captioning
from sg4v_jax.evaluate.benchmarks.gqa import GQA
from sg4v_jax.evaluate.benchmarks.llava_bench import LLaVABench
from sg4v_jax.evaluate.benchmarks.mmbench import MMBench, MMBenchCN
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
        SEED(),
        MMVet(),
        QBench(),
        ScienceQA(),
        VQAv2(),
        VQAv2Val(),
        VizWiz(),
        VizWizVal(),
        GQA(),
        TextVQA(),
        TextVQAWithoutOCR(),
        POPE(),
        MMStar(),
        Captioning(),
        World(),
    )
}
"""In the order of the paper's table, then the others."""


def get_benchmarks(names: str) -> list[Benchmark]:
    """The benchmarks of a comma-separated list of names.

    Raises:
      ValueError: there is none of a name; gives the nearest one and the list.
    """
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no benchmark {name!r}{hint} There are {', '.join(BENCHMARKS)}")
        if BENCHMARKS[name] not in found:
            found.append(BENCHMARKS[name])
    if not found:
        raise ValueError(f"which benchmarks? There are {', '.join(BENCHMARKS)}")
    return found
