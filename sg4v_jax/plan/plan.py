"""What one step of a config takes of a slice: compile it, and read everything off the program."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.parallel.rules import ways
from sg4v_jax.plan import hlo, kernels
from sg4v_jax.plan.collectives import Collective, collectives
from sg4v_jax.plan.flops import infer_flops, train_flops
from sg4v_jax.plan.memory import Memory
from sg4v_jax.plan.programs import Program, Serving, compile_serving, compile_train
from sg4v_jax.plan.roofline import Roofline, roofline
from sg4v_jax.plan.topology import Topology
from sg4v_jax.plan.work import Work, work


@dataclasses.dataclass(frozen=True)
class Plan:
    """One program on one slice. Numbers are of one chip and one step unless they say otherwise.

    Attributes:
      step: `train`, `prefill`, `insert` or `decode`.
      topology: the slice.
      mesh: ways by axis.
      rows: of the global batch; slots for `decode`.
      tokens: positions of the global batch that are computed.
      remat: what the backward pass computes again; empty for serving.
      memory: HBM of a chip.
      arguments: bytes of what the program gets, by part.
      work: products, memory traffic and kernels.
      collectives: of the program.
      roofline: least times.
      model_flops: of the global step, by the mathematics alone.
      host_bytes: of the global batch, which hosts send to chips.
      unknown_loops: loops whose trip count depends on data; they count once.
      compile_seconds: on this machine.
      hlo: the program's text.
    """

    step: str
    topology: Topology
    mesh: dict[str, int]
    rows: int
    tokens: int
    remat: str
    memory: Memory
    arguments: dict[str, int]
    work: Work
    collectives: list[Collective]
    roofline: Roofline
    model_flops: float
    host_bytes: int
    unknown_loops: list[str]
    compile_seconds: float
    hlo: str = dataclasses.field(repr=False)

    @property
    def headroom(self) -> int:
        return self.topology.chip.hbm_bytes - self.memory.peak

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def sent_between_slices(self) -> float:
        """Bytes that a chip sends to other slices."""
        between = [collective for collective in self.collectives if collective.between_slices]
        return sum(collective.sent_in(self.topology.slices) for collective in between)

    def mfu(self, seconds: float) -> float:
        """Model FLOPs by what the slice could do in that time."""
        return self.model_flops / (seconds * self.topology.chip.flops * self.topology.num_chips)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can write it."""
        chips = self.topology.num_chips
        return {
            "step": self.step,
            "topology": self.topology.name,
            "chips": chips,
            "mesh": self.mesh,
            "rows": self.rows,
            "tokens": self.tokens,
            "remat": self.remat,
            "fits": self.fits,
            "hbm": {
                **dataclasses.asdict(self.memory),
                "peak": self.memory.peak,
                "limit": self.topology.chip.hbm_bytes,
                "headroom": self.headroom,
            },
            "argument_parts": self.arguments,
            "model_flops_per_chip": self.model_flops / chips,
            "product_flops_per_chip": self.work.product_flops,
            "hbm_traffic": self.work.hbm_bytes,
            "kernels": self.work.kernels,
            "collectives": summary(self.collectives),
            "sent_between_slices": self.sent_between_slices,
            "host_bytes": self.host_bytes,
            "seconds": {
                **dataclasses.asdict(self.roofline),
                "bound": self.roofline.bound,
                "expected": self.roofline.expected,
            },
            "limit": self.roofline.limit,
            "mfu_bound": self.mfu(self.roofline.bound),
            "mfu_expected": self.mfu(self.roofline.expected),
            "tokens_per_second_per_chip": self.tokens / chips / self.roofline.expected,
            "unknown_loops": self.unknown_loops,
            "compile_seconds": self.compile_seconds,
        }


def summary(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Inside slices, by kind: how many run in a step, bytes that a chip sends, and those that are hidden."""
    kinds: dict[str, dict[str, float]] = {}
    for collective in found:
        if collective.between_slices:
            continue
        kind = kinds.setdefault(collective.kind, {"count": 0, "sent": 0.0, "hidden": 0.0})
        kind["count"] += collective.runs
        kind["sent"] += collective.sent
        kind["hidden"] += collective.sent * collective.hidden
    return kinds


def plan_train(config: ConfigDict, topology: Topology) -> Plan:
    """Plans the train step of a config.

    Args:
      config: a run's.
      topology: the slice.

    Raises:
      ValueError, OutOfMemory, RuntimeError: see `programs.compile_train`.
    """
    program = compile_train(config, topology)
    model = ModelConfig.from_dict(config.model.to_dict())
    data = config.data
    rows = data.batch_size // config.train.accumulate
    shapes = kernels.Shapes(model, topology.chip.name, length=data.seq_len, samples=data.image_slots)
    return _plan(
        program,
        topology,
        step="train",
        shapes=shapes,
        rows=rows,
        images=rows * data.image_slots,
        model_flops=train_flops(config, model),
        about={
            "rows": data.batch_size,
            "tokens": data.batch_size * data.seq_len,
            "remat": config.train.remat,
        },
    )


def plan_serving(config: ConfigDict, topology: Topology, serving: Serving) -> dict[str, Plan]:
    """Plans `prefill`, `insert` and `decode`; see `programs.compile_serving`.

    A step of decoding finds its slots half way through their answers.
    """
    programs = compile_serving(config, topology, serving)
    model = ModelConfig.from_dict(config.model.to_dict())
    name, slots, prompt = topology.chip.name, serving.slots, serving.prompt
    context = prompt + serving.answer // 2
    rows = serving.rows(ways("batch", programs["prefill"].mesh))
    prefill = kernels.Shapes(model, name, length=prompt)
    decode = kernels.Shapes(model, name, context=context, int8=serving.kv == "int8")
    # Shapes, rows, new positions of each, model FLOPs.
    steps = {
        "prefill": (prefill, rows, prompt, infer_flops(model, rows, prompt, prompt / 2, rows)),
        "insert": (kernels.Shapes(model, name), rows, prompt, 0.0),
        "decode": (decode, slots, 1, infer_flops(model, slots, 1, context, 0)),
    }
    return {
        step: _plan(
            programs[step],
            topology,
            step=step,
            shapes=shapes,
            rows=count,
            images=count,
            model_flops=flops,
            about={"rows": count, "tokens": count * positions, "remat": ""},
        )
        for step, (shapes, count, positions, flops) in steps.items()
    }


def captions_per_second(plans: dict[str, Plan], answer: int) -> float:
    """What a slice can do at most: every slot is prefilled, put in its place, and decodes `answer` tokens."""
    prefill, insert, decode = (plans[step].roofline.bound for step in ("prefill", "insert", "decode"))
    return 1 / ((prefill + insert) / plans["prefill"].rows + answer * decode / plans["decode"].rows)


def _plan(
    program: Program,
    topology: Topology,
    *,
    step: str,
    shapes: kernels.Shapes,
    rows: int,
    images: int,
    model_flops: float,
    about: dict[str, Any],
) -> Plan:
    text = program.executable.as_text()
    module = hlo.parse(text)
    mesh = dict(program.mesh.shape)
    parts = ways("batch", program.mesh)
    done, found = work(module), collectives(module)
    each = kernels.seconds(shapes)
    # A kernel runs on a chip's rows or images, and on its share of the heads.
    share = {"vit": images / parts, "flash": rows / parts, "decode": rows / parts}
    busy = {
        name: runs * each.get(name, 0.0) * share[name.split("_")[0]] / mesh["tensor"]
        for name, runs in done.kernels.items()
        if name.split("_")[0] in share
    }
    # Slices are the outermost axis, and groups of devices are named inside of one.
    inside = program.mesh.devices.flat[: topology.num_chips // topology.slices]
    coordinates = [tuple(device.coords) for device in inside]
    return Plan(
        step=step,
        topology=topology,
        mesh=mesh,
        memory=Memory.of(program.executable),
        arguments=program.arguments,
        work=done,
        collectives=found,
        roofline=roofline(topology, coordinates, done, found, busy),
        model_flops=model_flops,
        host_bytes=program.arguments.get("batch", 0) * parts + program.arguments.get("prompts", 0),
        unknown_loops=module.unknown_loops(),
        compile_seconds=program.seconds,
        hlo=text,
        **about,
    )
