"""A plan as text and as a page."""

import html

from sg4v_jax.plan.memory import OutOfMemory
from sg4v_jax.plan.plan import Plan, summary
from sg4v_jax.plan.topology import GIB, Topology


def rows(plan: Plan) -> list[tuple[str, str]]:
    """(what, how much), in the order in which one wants to know it."""
    memory, times, chips = plan.memory, plan.roofline, plan.topology.num_chips
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        ("slice", f"{plan.topology.name}, {chips} chips; mesh {mesh}"),
        ("step", f"{plan.step}, {plan.rows} rows, {plan.tokens:,} positions" + _remat(plan)),
        ("HBM peak", f"{_gib(memory.peak)} of {_gib(plan.topology.chip.hbm_bytes)}: {_verdict(plan)}"),
        ("  arguments", f"{_gib(memory.arguments)}: " + _parts(plan.arguments)),
        ("  temporaries", _gib(memory.temporaries)),
        ("  results kept apart", _gib(memory.outputs - memory.aliased)),
        ("  program", _gib(memory.program)),
        ("model FLOPs", f"{plan.model_flops / chips / 1e12:.2f} T per chip"),
        ("products done", f"{plan.work.product_flops / 1e12:.2f} T per chip"),
        ("HBM traffic", f"{plan.work.hbm_bytes / 1e9:.1f} GB per chip"),
        ("host to devices", f"{plan.host_bytes / 1e6:.1f} MB for the whole batch"),
    ]
    for kind, numbers in summary(plan.collectives).items():
        share = numbers["hidden"] / numbers["sent"] if numbers["sent"] else 0
        sent = f"{numbers['sent'] / 1e9:.2f} GB sent by a chip"
        lines.append((kind, f"{sent}, {numbers['count']:.0f} runs, {share:.0%} hidden"))
    lines += [
        ("compute", f"{_ms(times.compute)} ({_ms(times.kernels)} of it in kernels)"),
        ("memory", _ms(times.memory)),
        ("network", f"{_ms(times.network)}: {_ms(times.hidden)} hidden, {_ms(times.exposed)} not"),
        ("step, at least", f"{_ms(times.bound)} ({times.limit}); MFU at most {plan.mfu(times.bound):.1%}"),
        ("step, expected", f"{_ms(times.expected)}; MFU {plan.mfu(times.expected):.1%}"),
        ("compiled in", f"{plan.compile_seconds:.0f} s"),
    ]
    if plan.topology.slices > 1:
        sent = f"{plan.sent_between_slices / 1e9:.2f} GB sent by a chip, {_ms(times.slices)}"
        lines.insert(-3, ("between slices", sent))
    if plan.unknown_loops:
        lines.append(("counted once", "loops of unknown length: " + ", ".join(plan.unknown_loops)))
    return lines


def text(plan: Plan) -> str:
    """The table as the terminal shows it."""
    return "\n".join(f"{name:20} {value}" for name, value in rows(plan))


def failure(error: OutOfMemory, topology: Topology) -> str:
    """What does not fit, and what to change."""
    limit = error.limit or topology.chip.hbm_bytes
    lines = [f"does not fit {topology.name}: {_gib(error.used)} of {_gib(limit)} per chip", "largest:"]
    for allocation in error.largest[:8]:
        lines.append(f"  {_gib(allocation.bytes):>10}  {allocation.shape}  {allocation.where}")
    return "\n".join([*lines, _ADVICE])


_ADVICE = """what helps:
  saved activations ([layers, rows, length, width]): config.train.remat=full, config.train.accumulate
  logits ([rows, length, chunk]): a smaller config.train.loss_chunk
  weights and optimizer: more ways of config.mesh.fsdp or config.mesh.tensor
  or let --search look for what fits"""


def page(plans: list[Plan], title: str) -> str:
    """A page of HTML with a table for each plan, and bars of its memory and its times."""
    body = "".join(_section(plan) for plan in plans)
    title = html.escape(title)
    return f"<!doctype html><meta charset='utf-8'><title>{title}</title>{_STYLE}<h1>{title}</h1>{body}"


_STYLE = """<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
td{padding:.15rem 1rem .15rem 0;vertical-align:top}td:first-child{color:#666;white-space:pre}
.bar{display:flex;height:1.4rem;background:#eee;margin:.3rem 0 1rem}.bar div{color:#fff;font-size:12px;
overflow:hidden;white-space:nowrap;padding:.1rem .3rem;box-sizing:border-box}.bad{color:#b00}
</style>"""
_COLOURS = ("#35618f", "#5b8db8", "#8fb7d3", "#7a9a5b", "#c08a3e", "#a85751")


def _section(plan: Plan) -> str:
    verdict = "" if plan.fits else " class='bad'"
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows(plan)
    )
    memory = {**plan.arguments, "temporaries": plan.memory.temporaries, "program": plan.memory.program}
    times = plan.roofline
    parts = {
        "products": times.products,
        "kernels": times.kernels,
        "memory": times.memory,
        "hidden network": times.hidden,
        "exposed network": times.exposed,
    }
    return (
        f"<h2{verdict}>{plan.step} on {plan.topology.name}</h2><p>HBM of a chip</p>"
        + _bar({name: size / GIB for name, size in memory.items()}, plan.topology.chip.hbm_bytes / GIB, "GiB")
        + "<p>Seconds a step, one after the other</p>"
        + _bar({name: 1e3 * value for name, value in parts.items()}, 1e3 * sum(parts.values()), "ms")
        + f"<table>{table}</table>"
    )


def _bar(parts: dict[str, float], whole: float, unit: str) -> str:
    whole = max(whole, sum(parts.values())) or 1
    cells = "".join(
        f"<div style='width:{100 * value / whole:.2f}%;background:{_COLOURS[i % len(_COLOURS)]}' "
        f"title='{html.escape(name)}: {value:.2f} {unit}'>{html.escape(name)} {value:.2f} {unit}</div>"
        for i, (name, value) in enumerate(parts.items())
    )
    return f"<div class='bar'>{cells}</div>"


def _remat(plan: Plan) -> str:
    return f", remat {plan.remat}" if plan.remat else ""


def _verdict(plan: Plan) -> str:
    return f"fits, {_gib(plan.headroom)} left" if plan.fits else f"DOES NOT FIT by {_gib(-plan.headroom)}"


def _parts(arguments: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in arguments.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
