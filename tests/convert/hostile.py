"""Damaged, hostile and unfit checkpoints, and what `sg4v convert` says: the list in docs/convert.md.

`python -m tests.convert.hostile` prints it anew.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from sg4v_jax.__main__ import main
from tests.convert.writers import peer, state_of, write_hf, write_lora, write_original, write_parts

WEIGHTS = "model/model.safetensors"


class Hostile:
    """Pickles to a call."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch hacked",)


def with_header(change: Callable[[dict], None]) -> Callable[[], None]:
    """A safetensors file whose header was changed."""

    def damage() -> None:
        content = pathlib.Path(WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        encoded = json.dumps(header).encode()
        pathlib.Path(WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return damage


def with_weights(change: Callable[[dict], None]) -> Callable[[], None]:
    """A checkpoint whose tensors were changed."""

    def damage() -> None:
        tensors = load_file(WEIGHTS)
        change(tensors)
        save_file(tensors, WEIGHTS, metadata={"format": "pt"})

    return damage


def with_fields(file: str, **fields: object) -> Callable[[], None]:
    """A directory whose JSON file says something else."""

    def damage() -> None:
        path = pathlib.Path("model") / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **fields}))

    return damage


def overlap(header: dict) -> None:
    first, second = sorted(name for name in header if "layers.0.mlp" in name)[:2]
    header[first]["data_offsets"] = header[second]["data_offsets"]


def cut(path: str) -> None:
    content = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(content[: len(content) // 2])


def pickled(content: object) -> None:
    pathlib.Path(WEIGHTS).unlink()
    torch.save(content, "model/pytorch_model.bin")


def cut_pickle() -> None:
    pickled(state_of(peer(), torch.bfloat16))
    cut("model/pytorch_model.bin")


def all_at_once(tensors: dict[str, torch.Tensor]) -> None:
    layer = "language_model.model.layers.1"
    del tensors[f"{layer}.mlp.up_proj.weight"]
    tensors[f"{layer}.self_attn.q_proj.weight"] = torch.zeros(5, 48)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(48, dtype=torch.int8)
    tensors["model.norm.weight"] = torch.zeros(48)
    tensors["resampler.query"] = torch.zeros(3)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("language_model.lm_head.weight", "multi_modal_projector.linear_2.bias"):
        tensors[name].view(-1)[:3] = float("nan")


def too_large(tensors: dict[str, torch.Tensor]) -> None:
    tensors["multi_modal_projector.linear_2.bias"][0] = 1e5


def index_outside() -> None:
    os.unlink(WEIGHTS)
    weight_map = {
        "lm_head.weight": "../../secrets.bin",
        "model.norm.weight": "model-00001-of-00001.safetensors",
    }
    with_fields("model.safetensors.index.json", weight_map=weight_map)()


def no_tower() -> None:
    shutil.rmtree("model")
    tokenizer = pathlib.Path("tokenizer.model")
    arguments = {"tower": pathlib.Path("tower"), "named": "Lin-Chen/tower"}
    write_original(
        pathlib.Path("model"), state_of(peer(), torch.bfloat16), peer().config, tokenizer, **arguments
    )


def parts() -> None:
    shutil.rmtree("model")
    root = pathlib.Path("parts")
    write_parts(
        root,
        state_of(peer(), torch.bfloat16),
        peer().config,
        pathlib.Path("tokenizer.model"),
        whole_clip=True,
    )
    (root / "vicuna").rename("model")


def adapter() -> None:
    pathlib.Path("model").rename("base")
    state = state_of(peer(), torch.bfloat16)
    write_lora(pathlib.Path("model"), state, pathlib.Path("base"), use_dora=True, init_lora_weights="pissa")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    factors = torch.load("model/adapter_model.bin")
    del factors[name]
    torch.save(factors, "model/adapter_model.bin")


def saved_by_5() -> None:
    os.unlink("model/tokenizer.model")
    pathlib.Path("model/tokenizer.json").write_text("{}")


def occupied() -> None:
    os.mkdir("out")
    pathlib.Path("out/precious").touch()


def nothing() -> None:
    shutil.rmtree("model")
    os.mkdir("model")


# (what, how, arguments of `sg4v convert`)
CASES: tuple[tuple[str, Callable[[], object], list[str]], ...] = (
    ("safetensors, cut short", lambda: cut(WEIGHTS), []),
    ("safetensors, tensors overlap", with_header(overlap), []),
    (
        "a git-lfs pointer instead of the file",
        lambda: pathlib.Path(WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        [],
    ),
    (".bin that would run a command", lambda: pickled({"weight": Hostile()}), []),
    (".bin, cut short", cut_pickle, []),
    ("an index that leads out of the directory", index_outside, []),
    ("missing, misshapen, doubled and unexpected tensors, a wrong dtype", with_weights(all_at_once), []),
    ("NaN", with_weights(not_finite), []),
    ("too large for the dtype asked for", with_weights(too_large), ["--dtype=float16"]),
    (
        "a config that the model can't be",
        with_fields("config.json", projector_hidden_act="relu", vision_feature_layer=[-2, -5]),
        [],
    ),
    ("a decoder with scaled rotary embedding", lambda: (parts(), with_fields(
        "config.json", rope_scaling={"type": "linear", "factor": 2.0}, tie_word_embeddings=True)()), []),
    ("share4v without its tower", no_tower, []),
    ("Vicuna alone", parts, []),
    ("a LoRA of another kind, with half a pair", adapter, []),
    ("saved by transformers 5, without tokenizer.model", saved_by_5, []),
    ("an output that is not empty", occupied, []),
    ("no model", nothing, []),
)  # fmt: skip


def message(damage: Callable[[], object], arguments: list[str], tokenizer: pathlib.Path) -> str:
    """What the command says, in a directory where the model is called `model`."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        shutil.copy(tokenizer, "tokenizer.model")
        write_hf(
            pathlib.Path("model"),
            state_of(peer(), torch.bfloat16),
            peer().config,
            pathlib.Path("tokenizer.model"),
        )
        damage()
        there = sorted(os.listdir())
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.suppress(SystemExit):
            main(["convert", "--model=model", "--output=out", *arguments])
            error.write("(converted)")
        if sorted(os.listdir()) != there:
            error.write(f"(left behind: {sorted(os.listdir())})")
        return error.getvalue().strip().replace(f"{os.path.realpath(temporary)}/", "")


def listing(tokenizer: pathlib.Path) -> str:
    """The list in docs/convert.md."""
    return "\n".join(f"# {what}\n{message(damage, argv, tokenizer)}\n" for what, damage, argv in CASES)


if __name__ == "__main__":
    from sg4v_jax.data.tokenizer import train_tokenizer
    from tests.convert.conftest import TEXTS
    from tests.convert.writers import VOCAB

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(TEXTS, pathlib.Path(folder, "tokenizer.model"), VOCAB)
        print(listing(pathlib.Path(folder, "tokenizer.model")))
