"""The fastest mesh, number of rows and remat policy that fit a slice."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.layers import REMAT_POLICIES
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.plan.flops import train_flops
from sg4v_jax.plan.memory import OutOfMemory
from sg4v_jax.plan.plan import Plan, plan_train
from sg4v_jax.plan.topology import GIB, Topology
from sg4v_jax.train import groups


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting, with a guess at what it will take.

    Attributes:
      data, fsdp, tensor: ways of the mesh.
      accumulate: microbatches.
      remat: policy.
      seconds: guessed step time.
      bytes: guessed memory of a chip.
    """

    data: int
    fsdp: int
    tensor: int
    accumulate: int
    remat: str
    seconds: float
    bytes: float

    def apply(self, config: ConfigDict) -> ConfigDict:
        found = ConfigDict(config.to_dict())
        found.mesh.data, found.mesh.fsdp, found.mesh.tensor = self.data, self.fsdp, self.tensor
        found.train.accumulate, found.train.remat = self.accumulate, self.remat
        return found

    def flags(self) -> str:
        """As the command line takes it."""
        return (
            f"--config.mesh.data={self.data} --config.mesh.fsdp={self.fsdp} "
            f"--config.mesh.tensor={self.tensor} --config.train.accumulate={self.accumulate} "
            f"--config.train.remat={self.remat}"
        )


def search(
    config: ConfigDict,
    topology: Topology,
    tries: int,
    progress: Callable[..., Any],
    tell: Callable[[str], None],
) -> tuple[ConfigDict, Plan]:
    """Compiles the config's own setting and the most promising others, and gives the best, planned.

    The global batch stays as it is. The result is never slower than what the config says, if that fits.

    Args:
      config: a run's.
      topology: the slice.
      tries: programs to compile at most.
      progress: wraps what is looped over; see `commands.common.progress_bar`.
      tell: gets a line at the start, for each program, and for the best.

    Raises:
      ValueError: nothing fits; it says what came closest.
    """
    ranked = _own_first(config, candidates(config, topology))
    if not ranked:
        raise ValueError(
            f"no mesh of {topology.name} divides config.data.batch_size={config.data.batch_size} rows and "
            f"leaves room in {topology.chip.hbm_bytes / GIB:.2f} GiB"
        )
    tell(f"{min(tries, len(ranked))} of {len(ranked)} settings, minutes each:")
    best: tuple[Candidate, Plan] | None = None
    for candidate in progress(ranked[:tries]):
        try:
            plan = plan_train(candidate.apply(config), topology)
        except OutOfMemory as error:
            tell(f"{candidate.flags()}: out of memory, {error}")
            continue
        tell(f"{candidate.flags()}: {_line(plan)}")
        if plan.fits and (best is None or plan.roofline.expected < best[1].roofline.expected):
            best = candidate, plan
    if best is None:
        raise ValueError(f"none of {min(tries, len(ranked))} settings fits {topology.name}; see above")
    tell(f"best: {best[0].flags()}\n")
    return best[0].apply(config), best[1]


def _own_first(config: ConfigDict, ranked: list[Candidate]) -> list[Candidate]:
    """The config's own setting before the others, if it is one of them; -1 ways are what the others leave."""
    mesh, train = config.mesh, config.train
    wanted = mesh.data, mesh.fsdp, mesh.tensor, train.accumulate, train.remat

    def is_own(candidate: Candidate) -> bool:
        ways = candidate.data, candidate.fsdp, candidate.tensor, candidate.accumulate, candidate.remat
        return all(want in (-1, have) for want, have in zip(wanted, ways, strict=True))

    return sorted(ranked, key=lambda candidate: not is_own(candidate))


def _line(plan: Plan) -> str:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"{plan.memory.peak / GIB:.2f} GiB, {verdict}, {1e3 * plan.roofline.expected:.2f} ms a step"


def candidates(config: ConfigDict, topology: Topology) -> list[Candidate]:
    """Settings that divide and might fit by a guess, the fastest by the same guess first."""
    model = ModelConfig.from_dict(config.model.to_dict())
    trainable, frozen = groups.split(abstract_model(model)[1], config.optim.groups)
    known = model, groups.count(trainable), groups.count(frozen), train_flops(config, model)
    found = [
        _guess(config, topology, known, *mesh, accumulate, remat)
        for mesh in _meshes(config, topology)
        for accumulate in (1, 2, 4, 8)
        for remat in REMAT_POLICIES
        if config.data.batch_size % (topology.slices * mesh[0] * mesh[1] * accumulate) == 0
    ]
    # The guess of memory is good to about a quarter; what is far above would only cost time.
    fitting = [candidate for candidate in found if candidate.bytes < 1.25 * topology.chip.hbm_bytes]
    return sorted(fitting, key=lambda candidate: (candidate.seconds, candidate.accumulate, candidate.bytes))


def _meshes(config: ConfigDict, topology: Topology) -> Iterator[tuple[int, int, int]]:
    text, chips = config.model.text, topology.num_chips // topology.slices
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4, 8):
            if chips % (tensor * data) == 0 and text.num_heads % tensor == 0:
                yield data, chips // (tensor * data), tensor


def _guess(
    config: ConfigDict,
    topology: Topology,
    known: tuple[ModelConfig, int, int, float],
    data: int,
    fsdp: int,
    tensor: int,
    accumulate: int,
    remat: str,
) -> Candidate:
    model, trained, fixed, model_flops = known
    chip, text = topology.chip, model.text
    positions = config.data.batch_size * config.data.seq_len / (topology.slices * data * fsdp) / accumulate
    saved = saved_widths(model, remat)
    state = (12 * trained + 2 * fixed) / (fsdp * tensor) + 2 * trained / (fsdp * tensor)
    block = 2 * (trained + fixed) / text.num_layers / tensor
    # All but the block's input lies over `tensor`.
    activations = 2 * positions * text.hidden_size * text.num_layers * (1 + (saved - 1) / tensor)
    memory = state + activations + 4 * block + 2 * positions * text.intermediate_size * 6 / tensor
    flops = model_flops / topology.num_chips * _AGAIN[remat]
    weights = 2 * (trained + fixed) / tensor * (1 - 1 / fsdp)
    # For each microbatch weights are gathered twice beside other work, and gradients reduced with nothing
    # beside it: in both halves of an all-reduce from 64 ways on, and over `data` about half of them again.
    gathered = accumulate * 2 * weights
    reduced = accumulate * weights * ((2 if fsdp > 32 else 1) + (0.5 if data > 1 else 0))
    layer = 2 * positions * text.hidden_size * accumulate
    split = 12 * layer * text.num_layers * (1 - 1 / tensor)  # Of the few chips on one line.
    bandwidth = chip.ici_bandwidth / 2  # Lines, not rings.
    alone = reduced / bandwidth + split / chip.link_bandwidth
    seconds = max(flops / chip.flops / 0.9, gathered / bandwidth) + alone
    return Candidate(data, fsdp, tensor, accumulate, remat, seconds, memory)


# Products with what is computed again, of a step without it (docs/plan.md).
_AGAIN = {"full": 1.33, "attention": 1.32, "mlp": 1.11, "projections": 1.03, "dots": 1.01, "none": 1.0}


def saved_widths(model: ModelConfig, remat: str) -> float:
    """Activations that a block of the decoder keeps, in widths of the residual stream."""
    text = model.text
    inner = text.intermediate_size / text.hidden_size
    widths = {"full": 1.0, "attention": 2.0, "mlp": 2.0 + 2 * inner, "projections": 5.0 + 2 * inner}
    return (widths | {"dots": 6.0 + 2 * inner}).get(remat, 10.0 + 4 * inner)
