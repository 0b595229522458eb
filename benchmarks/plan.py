"""Every model and stage on every slice, planned: peak memory, whether it fits, least step time.

    python benchmarks/plan.py run --output plan.jsonl --models 7b --stages pretrain --slices v5e-64,v4-32
    python benchmarks/plan.py scale --output plan.jsonl
    python benchmarks/plan.py table plan.jsonl
    python benchmarks/plan.py figure plan.jsonl --output scaling.svg

A program takes minutes to compile. `run` and `scale` append a line for each as it is done, and skip what the
file already has, so they can be cut off. Needs libtpu and no TPU.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import tqdm
from sg4v_jax.configs.pods import FSDP, PODS

STAGES = ("align", "pretrain", "captioner", "finetune")
MODELS = ("7b", "13b")
# The text part of 7B, a row of 2048 positions a chip, on meshes as `configs/pods.py` makes them. The tower is
# cut down to one block of width 128: less to compile.
SCALE = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
TEXT_PART = (
    "--config.model.vision.num_layers=2",
    "--config.model.vision.tuned_from=1",
    "--config.model.vision.hidden_size=128",
    "--config.model.vision.intermediate_size=512",
    "--config.model.vision.num_heads=2",
    "--config.data.seq_len=2048",
    "--config.data.image_slots=1",
)


def plan(spec: str, topology: str, overrides: list[str]) -> dict[str, Any]:
    """What `sg4v plan` says, in a process of its own; `failure` instead if the compiler refuses it.

    Raises:
      RuntimeError: it ended for another reason than memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "plan.json")
        command = [sys.executable, "-m", "sg4v_jax", "plan", f"--config={spec}", f"--topology={topology}"]
        done = subprocess.run([*command, "--output", output, *overrides], capture_output=True, text=True)
        if os.path.exists(output):
            return dict(json.loads(pathlib.Path(output).read_text())[0])
        if "does not fit" not in done.stderr:
            # Not an answer, so the file must not have it: a wrong flag, or the process was killed.
            raise RuntimeError(f"{spec} on {topology}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return {"fits": False, "failure": done.stderr.strip()[-2000:]}


def compile_all(jobs: list[tuple[str, str, str, list[str]]], path: pathlib.Path) -> None:
    """Plans each (name, config, topology, overrides) that the file doesn't have."""
    have = {line["name"] for line in read(path)}
    for name, spec, topology, overrides in tqdm.tqdm(jobs, unit=" programs"):
        if name not in have:
            found = {"name": name, "config": spec, **plan(spec, topology, overrides)}
            with path.open("a") as file:
                file.write(json.dumps(found) + "\n")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The file's lines; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a table for each model and stage, a row for each slice."""
    planned = {line["name"]: line for line in lines}
    parts = []
    for model, stage in itertools.product(MODELS, STAGES):
        names = {pod: f"configs/{stage}.py:{model},{pod}" for pod in PODS}
        rows = [_row(pod, planned[name]) for pod, name in names.items() if name in planned]
        if rows:
            parts.append("\n".join([f"**{model}, {stage}**", "", *_HEAD, *rows]))
    return "\n\n".join(parts)


_HEAD = (
    "| slice | rows | mesh | remat | HBM / limit, GiB | fits | least step, ms | MFU at most | expected |",
    "|---|---|---|---|--:|---|--:|--:|--:|",
)


def _row(pod: str, line: dict[str, Any]) -> str:
    if "failure" in line:
        return f"| {pod} | | | | | **no** | | | |"
    hbm = line["hbm"]
    cells = (
        pod,
        f"{line['rows']} x {line['tokens'] // line['rows']}",
        " x ".join(f"{axis} {size}" for axis, size in line["mesh"].items() if size > 1),
        line["remat"],
        f"{hbm['peak'] / 2**30:.1f} / {hbm['limit'] / 2**30:.1f}",
        "yes" if line["fits"] else "**no**",
        f"{1e3 * line['seconds']['bound']:.0f} ({line['limit']})",
        f"{line['mfu_bound']:.0%}",
        f"{line['mfu_expected']:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def figure(lines: list[dict[str, Any]]) -> str:
    """SVG: what a chip sends, computes and holds in a step, by the number of chips."""
    points = sorted((line for line in lines if line["name"].startswith("scale ")), key=lambda p: p["chips"])
    points = [point for point in points if "failure" not in point]
    panels = (
        (
            "GB sent by a chip in a step",
            [sum(k["sent"] for k in p["collectives"].values()) / 1e9 for p in points],
        ),
        ("TFLOP of products on a chip", [p["product_flops_per_chip"] / 1e12 for p in points]),
        ("GiB of HBM on a chip", [p["hbm"]["peak"] / 2**30 for p in points]),
        ("MFU expected, %", [100 * p["mfu_expected"] for p in points]),
    )
    width, height = 260, 200
    body = "".join(
        f"<g transform='translate({20 + i * (width + 20)},20)'>"
        + _panel(title, [p["chips"] for p in points], values, width, height)
        + "</g>"
        for i, (title, values) in enumerate(panels)
    )
    size = f"width='{20 + len(panels) * (width + 20)}' height='{height + 70}'"
    style = "font-family='sans-serif' font-size='12' fill='#222'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{body}</svg>\n"


def _panel(title: str, chips: list[int], values: list[float], width: int, height: int) -> str:
    top = max(values, default=1) * 1.15 or 1
    x = [width * (i + 0.5) / len(chips) for i in range(len(chips))]
    y = [height - height * value / top for value in values]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    marks = "".join(
        f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3' fill='#35618f'/>"
        f"<text x='{a:.1f}' y='{b - 8:.1f}' text-anchor='middle'>{value:.3g}</text>"
        f"<text x='{a:.1f}' y='{height + 16}' text-anchor='middle'>{count}</text>"
        for a, b, value, count in zip(x, y, values, chips, strict=True)
    )
    return (
        f"<text x='0' y='-6' font-weight='bold'>{title}</text>"
        f"<line x1='0' y1='{height}' x2='{width}' y2='{height}' stroke='#999'/>"
        f"<polyline points='{line}' fill='none' stroke='#35618f' stroke-width='2'/>{marks}"
        f"<text x='{width / 2}' y='{height + 34}' text-anchor='middle' fill='#666'>chips</text>"
    )


def main() -> None:
    """Parses, and does one of the four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "scale", "table", "figure"))
    parser.add_argument("file", nargs="?", type=pathlib.Path, help="of results, for table and figure")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--slices", default=",".join(PODS))
    arguments = parser.parse_args()
    if arguments.action == "run":
        parts = (arguments.models, arguments.stages, arguments.slices)
        names = itertools.product(*(part.split(",") for part in parts))
        specs = [(f"configs/{stage}.py:{model},{pod}", pod) for model, stage, pod in names]
        compile_all([(spec, spec, pod, []) for spec, pod in specs], arguments.output)
    elif arguments.action == "scale":
        jobs = []
        for topology in SCALE:
            chips = math.prod(map(int, topology.partition(":")[2].split("x")))
            mesh = f"--config.mesh.data={max(chips // FSDP, 1)}"
            overrides = [*TEXT_PART, f"--config.data.batch_size={chips}", mesh]
            jobs.append((f"scale {topology}", "configs/finetune.py:7b", topology, overrides))
        compile_all(jobs, arguments.output)
    elif arguments.action == "table":
        print(table(read(arguments.file)))
    else:
        arguments.output.write_text(figure(read(arguments.file)))


if __name__ == "__main__":
    main()
