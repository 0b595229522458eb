"""What a model directory is, in the words of a person who has to decide what to do with it."""

import dataclasses
import hashlib
import math
from typing import Any

from sg4v_jax.convert.checkpoint import Checkpoint
from sg4v_jax.convert.params import check
from sg4v_jax.convert.tensors import ConversionError


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about a checkpoint, JSON-able. Reads no weights.

    Returns:
      path, layout, parts (with shapes and number of parameters), parameters, dtypes (bytes of
      each), template, aspect, prompt, step, stage, tuned, tokenizer (SHA-256 of its file) and
      problems (what keeps it from being a whole model; empty for one).
    """
    usage, tokenizer = checkpoint.usage, checkpoint.tokenizer_file
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + tensor.nbytes
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.layout,
        "parts": {part: _part(checkpoint, part) for part in checkpoint.parts},
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        "dtypes": dtypes,
        "template": usage.template,
        "aspect": usage.aspect,
        "prompt": usage.prompt,
        "step": usage.history.get("step"),
        "stage": usage.history.get("stage"),
        "tuned": usage.history.get("tuned"),
        "lora": usage.history.get("lora"),
        "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        "problems": _problems(checkpoint),
    }


def as_text(facts: dict[str, Any]) -> str:
    """`describe`'s facts for a terminal."""
    unknown = "not recorded"
    lines = [("path", facts["path"]), ("layout", _LAYOUTS[facts["layout"]])]
    for part, fields in facts["parts"].items():
        shape = ", ".join(f"{key} {value}" for key, value in fields["shape"].items())
        lines.append((part, f"{fields['parameters'] / 1e6:,.1f} M parameters: {shape}"))
    stored = ", ".join(f"{name} ({nbytes / 1e9:,.2f} GB)" for name, nbytes in facts["dtypes"].items())
    lines += [
        ("parameters", f"{facts['parameters']:,}"),
        ("stored as", stored or "no weights"),
        ("template", facts["template"]),
        ("aspect", facts["aspect"]),
        ("prompt", repr(facts["prompt"]) if facts["prompt"] else "none fixed"),
        ("trained", _trained(facts)),
        ("tuned parts", ", ".join(facts["tuned"]) if facts["tuned"] else unknown),
        ("tokenizer", f"sha256 {facts['tokenizer']}" if facts["tokenizer"] else "none"),
    ]
    lines += [("problem", problem) for problem in facts["problems"]]
    return "\n".join(f"{name:12} {value}" for name, value in lines)


_LAYOUTS = {
    "run": "training run of this library (Orbax)",
    "hf": "Hugging Face LLaVA",
    "share4v": "original share4v / LLaVA-1.5",
    "llama": "LLaMA, a decoder to start from",
    "clip": "CLIP vision tower",
    "projector": "projector alone",
    "lora": "LoRA merged with its base",
    "memory": "in memory",
}


def _trained(facts: dict[str, Any]) -> str:
    if facts["step"] is None:
        return "not recorded"
    merged = f", LoRA on {facts['lora']}" if facts["lora"] else ""
    return f"step {facts['step']} of {facts['stage'] or 'an unnamed stage'}{merged}"


def _part(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    value = getattr(checkpoint, part)
    shape = {"kind": value} if isinstance(value, str) else dataclasses.asdict(value)
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.part(part).values())
    return {"parameters": parameters, "shape": shape}


def _problems(checkpoint: Checkpoint) -> list[str]:
    try:
        return check(checkpoint.config, checkpoint.tensors)
    except ConversionError as error:
        return list(error.problems)
