"""The sources of the matrix: what there is to convert, by the names that docs/convert.md has for them."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch

from tests.convert.writers import (
    VOCAB,
    Source,
    merged,
    peer,
    state_of,
    write_hf,
    write_lora,
    write_original,
    write_parts,
    write_run,
)

MIXED = {"vision": torch.float16, "projector": torch.float32, "language": torch.bfloat16}


def _hf(dtypes: Any = torch.float32, gqa: bool = False, **arguments: Any) -> Callable[..., Source]:
    return lambda root, tokenizer: write_hf(
        root, state_of(peer(gqa), dtypes), peer(gqa).config, tokenizer, **arguments
    )


def _original(
    dtypes: Any = torch.bfloat16, *, tower: str | None, named: str, gqa: bool = False
) -> Callable[..., Source]:
    def write(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
        state, place = state_of(peer(gqa), dtypes), None if tower is None else root / tower
        return write_original(root / "model", state, peer(gqa).config, tokenizer, tower=place, named=named)

    return write


def _given_tower(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    source = _original(torch.float16, tower="elsewhere", named="Lin-Chen/tower")(root, tokenizer)
    return dataclasses.replace(source, parts={"vision_tower": root / "elsewhere"})


def _parts(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    return write_parts(root, state_of(peer(), MIXED), peer().config, tokenizer, whole_clip=True)


def _random_projector(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    source = write_parts(root, state_of(peer(), torch.bfloat16), peer().config, tokenizer, whole_clip=False)
    parts = {**source.parts, "projector": "random"}
    return dataclasses.replace(source, parts=parts, drawn="model.multi_modal_projector.")


def _saved_by_transformers(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    model = peer()
    model.save_pretrained(root, save_original_format=False, max_shard_size="200KB")
    shutil.copy(tokenizer, root / "tokenizer.model")
    return Source(root, state_of(model, torch.float32), model.config)


def _lora(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    base = _original(tower="tower", named="../tower")(root, tokenizer)
    mine = {name: 2 * value for name, value in base.state.items() if "multi_modal_projector" in name}
    factors = write_lora(root / "lora", base.state, base.path, trainables=mine, lora_alpha=8)
    state = merged(base.state, factors, 2.0) | mine
    shutil.copy(base.path / "config.json", root / "lora/config.json")
    return dataclasses.replace(base, path=root / "lora", state=state)


def _run(root: pathlib.Path, tokenizer: pathlib.Path) -> Source:
    return write_run(root, state_of(peer(), torch.float32), peer().config, tokenizer)


SOURCES: dict[str, Callable[[pathlib.Path, pathlib.Path], Source]] = {
    "HF, names of the Hub": _hf(),
    "HF, names of 4.52, bfloat16 shards": _hf(torch.bfloat16, layout="B", shards=3),
    "HF, names of 5, .bin, two added rows": _hf(torch.float16, layout="5", kind="bin", rows=VOCAB + 2),
    "HF, .bin shards, no added rows": _hf(torch.bfloat16, kind="bin", shards=2, rows=VOCAB),
    "HF, saved by transformers 5 in its own names": _saved_by_transformers,
    "HF, a dtype for each part": _hf(MIXED),
    "HF, grouped queries": _hf(torch.float32, gqa=True),
    "share4v, tower by config.json": _original(tower="tower", named="../tower"),
    "share4v, tower inside the directory": _original(MIXED, tower="model/vision_tower", named="Lin-Chen/t"),
    "share4v, tower by --vision-tower": _given_tower,
    "share4v, grouped queries": _original(tower="tower", named="../tower", gqa=True),
    "LLaVA-1.5, tower in the shards": _original(torch.float16, tower=None, named="openai/clip-vit"),
    "Vicuna + CLIP + mm_projector.bin": _parts,
    "Vicuna + CLIP + random projector": _random_projector,
    "LoRA on share4v": _lora,
    "training run": _run,
}
