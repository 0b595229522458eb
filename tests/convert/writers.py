"""Writes a small model in every format that there are checkpoints in, without the library's help.

Every function takes one state dict of `transformers` and writes it the way its format's own code would.
The names come from `renamed`, which knows nothing of the rules under test.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import ml_dtypes
import numpy as np
import optax
import torch
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from sg4v_jax.convert.huggingface import read_config
from sg4v_jax.convert.params import to_params
from sg4v_jax.models.sharegpt4v import resplit_vision
from sg4v_jax.train.checkpoint import Checkpointer
from tests.torch_llava import llava_config, llava_model

VOCAB, ROWS = 300, 320  # as 32000 and 32064: `<image>`, `<pad>` and padding
# Heads of 64, as every CLIP ViT has: where there is no config.json, nothing else says how many.
VISION = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24}
GENERATION = {"temperature": 0.3, "top_p": 0.8, "max_length": 400, "do_sample": False}
CHAT_TEMPLATE = "{%- for message in messages -%}<image>\n{{ message['role'] }}! {%- endfor -%}"

State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on disk, and what has to come out of it.

    Attributes:
      path: what to open.
      state: names of transformers 5, VOCAB rows, in the dtypes that conversion keeps.
      hf_config: the model's, with ROWS rows.
      parts: further arguments of `open_checkpoint`.
      aspect: how it makes images square.
      drawn: what starts the names of weights that no file has, and that come out random.
    """

    path: pathlib.Path
    state: State
    hf_config: LlavaConfig
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    aspect: str = "pad"
    drawn: str = ""

    def torch_model(self) -> LlavaForConditionalGeneration:
        """The model in transformers, in float32; rows beyond the vocabulary are zero."""
        model = LlavaForConditionalGeneration(self.hf_config).eval()
        filled = {name: value.float() for name, value in self.state.items()}
        for name in filled:
            if _is_vocabulary(name):
                filled[name] = torch.nn.functional.pad(filled[name], (0, 0, 0, ROWS - VOCAB))
        model.load_state_dict(filled)
        return model


@functools.cache
def peer(gqa: bool = False) -> LlavaForConditionalGeneration:
    """The model of all builders."""
    text = {"vocab_size": ROWS, **(GQA if gqa else {})}
    return llava_model(
        llava_config(vision=VISION, text=text, image_token_index=VOCAB, pad_token_id=VOCAB + 1)
    )


def state_of(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> State:
    """The weights without added rows, in one dtype or in those of `vision`, `projector` and `language`."""
    state = {}
    for name, value in model.state_dict().items():
        rows = value[:VOCAB] if _is_vocabulary(name) else value
        if isinstance(dtypes, torch.dtype):
            dtype = dtypes
        else:
            dtype = next((dtypes[part] for part in dtypes if part in name), dtypes["language"])
        state[name] = rows.to(dtype).clone()
    return state


def renamed(name: str, layout: str) -> str:
    """A name of transformers 5 in another layout of spec 5: `A`, `B`, `5` or `original`."""
    tower = "model.vision_tower."
    if layout == "5":
        return name
    name = name.replace(tower, f"{tower}vision_model.")
    if layout == "B":
        return name
    if layout == "A":
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head", "language_model.lm_head")
        return name.replace("model.vision", "vision").replace("model.multi", "multi")
    name = name.replace(tower, f"{tower}vision_tower.").replace("model.language_model.", "model.")
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    return name.replace("multi_modal_projector.linear_2", "mm_projector.2")


def original(state: State) -> tuple[State, State]:
    """(decoder and projector, tower) under the names of spec 5.1, with the buffers of old versions."""
    names = {renamed(name, "original"): value for name, value in state.items()}
    inner = "model.vision_tower.vision_tower."
    tower = {name.removeprefix(inner): value for name, value in names.items() if name.startswith(inner)}
    rest = {name: value for name, value in names.items() if not name.startswith(inner)}
    rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tower["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return rest, tower


def write_weights(directory: pathlib.Path, state: State, kind: str = "safetensors", shards: int = 1) -> None:
    """Weights as safetensors or as PyTorch's files (`bin`), with an index if there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    if shards == 1:
        files = [f"{stem}.{suffix}"]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(state))}
    for file in files:
        held = {name: state[name].contiguous() for name, where in weight_map.items() if where == file}
        if kind == "safetensors":
            save_file(held, directory / file, metadata={"format": "pt"})
        else:
            torch.save(held, directory / file)
    if shards > 1:
        content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_hf(
    directory: pathlib.Path,
    state: State,
    hf_config: LlavaConfig,
    tokenizer: pathlib.Path,
    *,
    layout: str = "A",
    rows: int = ROWS,
    kind: str = "safetensors",
    shards: int = 1,
) -> Source:
    """An HF LLaVA directory with its own prompt, generation settings and CLIP's cropping processor."""
    stored = {renamed(name, layout): _with_rows(name, value, rows) for name, value in state.items()}
    write_weights(directory, stored, kind, shards)
    fields = hf_config.to_dict()
    fields["text_config"]["vocab_size"] = rows
    write_json(directory / "config.json", fields)
    write_json(directory / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    write_json(directory / "generation_config.json", {"eos_token_id": 2, **GENERATION})
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copy(tokenizer, directory / "tokenizer.model")
    return Source(directory, state, hf_config, aspect="square")


def text_fields(hf_config: LlavaConfig) -> dict[str, Any]:
    """config.json of the decoder, as LLaMA's own and the originals' have it."""
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    text = hf_config.text_config
    fields = {key: getattr(text, key) for key in [*keys.split(), "max_position_embeddings", "rms_norm_eps"]}
    return {**fields, "vocab_size": VOCAB, "model_type": "llama", "hidden_act": "silu"}


def vision_fields(hf_config: LlavaConfig) -> dict[str, Any]:
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size"
    fields = {key: getattr(hf_config.vision_config, key) for key in keys.split()}
    return {**fields, "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}


def write_original(
    directory: pathlib.Path,
    state: State,
    hf_config: LlavaConfig,
    tokenizer: pathlib.Path,
    *,
    tower: pathlib.Path | None,
    named: str,
    kind: str = "bin",
) -> Source:
    """The layout of share4v, its tower in `tower`; or LLaVA-1.5's, with the tower inside, for None."""
    rest, vision = original(state)
    if tower is None:
        rest |= {f"model.vision_tower.vision_tower.{name}": value for name, value in vision.items()}
    else:
        write_weights(tower, vision, kind)
        write_json(tower / "config.json", vision_fields(hf_config))
    write_weights(directory, rest, kind, shards=2)
    mm = {
        "model_type": "llava" if tower is None else "share4v",
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 128,
        "mm_vision_tower": named,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "tune_entire_model": False,
    }
    write_json(directory / "config.json", {**text_fields(hf_config), **mm})
    write_json(directory / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0, **GENERATION})
    shutil.copy(tokenizer, directory / "tokenizer.model")
    return Source(directory, state, hf_config)


def write_parts(
    root: pathlib.Path, state: State, hf_config: LlavaConfig, tokenizer: pathlib.Path, *, whole_clip: bool
) -> Source:
    """What a training starts from: Vicuna, CLIP, and LLaVA's mm_projector.bin (spec 4.1)."""
    rest, vision = original(state)
    projector = {name: value for name, value in rest.items() if "mm_projector" in name}
    write_weights(
        root / "vicuna", {name: value for name, value in rest.items() if name not in projector}, "bin", 2
    )
    write_json(root / "vicuna/config.json", text_fields(hf_config))
    write_json(root / "vicuna/generation_config.json", GENERATION)
    shutil.copy(tokenizer, root / "vicuna/tokenizer.model")
    torch.save(projector, root / "mm_projector.bin")
    clip_config = vision_fields(hf_config)
    if whole_clip:
        vision |= {"text_model.final_layer_norm.bias": torch.zeros(3), "logit_scale": torch.tensor(2.0)}
        vision["visual_projection.weight"] = torch.zeros(3, 3)
        clip_config = {"model_type": "clip", "vision_config": clip_config, "text_config": {"hidden_size": 9}}
    write_weights(root / "clip", vision)
    write_json(root / "clip/config.json", clip_config)
    parts = {"vision_tower": root / "clip", "projector": root / "mm_projector.bin"}
    return Source(root / "vicuna", state, hf_config, parts)


def as_arrays(state: State) -> dict[str, np.ndarray]:
    """By the names on the Hugging Face Hub, which are the library's canonical keys."""
    return {renamed(name, "A"): _array(value) for name, value in state.items()}


def write_run(
    directory: pathlib.Path,
    state: State,
    hf_config: LlavaConfig,
    tokenizer: pathlib.Path,
    *,
    tuned_from: int = 2,
    step: int = 7,
) -> Source:
    """A training run, saved by the training's own Checkpointer; its export is in bfloat16."""
    config = read_config(hf_config.to_dict()).with_tuned_from(tuned_from)
    whole = to_params(config.with_tuned_from(0), as_arrays(state))
    save_run(directory, config, resplit_vision(whole, tuned_from), tokenizer, step=step)
    return Source(directory, {name: value.bfloat16() for name, value in state.items()}, hf_config)


def save_run(
    directory: pathlib.Path, config: Any, params: Any, tokenizer: pathlib.Path, *, step: int
) -> None:
    """One checkpoint of a run that tunes everything from its split of the vision tower up."""
    frozen = (
        "vision/(frozen|patch_embedding|class_embedding|position_embedding|pre_norm|unused|post_norm)/?.*"
    )
    meta = {
        "format_version": 1,
        "stage": "pretrain",
        "model": config.to_dict(),
        "template": "v1",
        "aspect": "pad",
        "prompt": "",
        "step": step,
        "tokenizer_sha256": "",
        "config": {"optim": {"groups": [[frozen, None], [".*", 1.0]]}},
    }
    data = iter(grain.MapDataset.source([0, 1]).to_iter_dataset(grain.ReadOptions(num_threads=0)))
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer, directory / "tokenizer.model")
    checkpointer = Checkpointer(directory, keep=2)
    opt_state = optax.adam(1.0).init({"w": np.zeros(2, np.float32)})
    checkpointer.save(step, params, opt_state, data, meta)
    checkpointer.close()


ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": True,
    "alpha_pattern": {},
    "rank_pattern": {},
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "r": 4,
}


def write_lora(
    directory: pathlib.Path,
    state: State,
    base: pathlib.Path,
    *,
    rank: int = 4,
    layout: str = "original",
    kind: str = "bin",
    saved: State | None = None,
    trainables: State | None = None,
    **settings: Any,
) -> State:
    """An adapter for every matrix of the decoder's blocks, in the files of PEFT and LLaVA (spec 4.5).

    Args:
      directory: where to.
      state: the base's weights.
      base: what the adapter says it is on top of.
      rank: of the factors.
      layout: whose names the wrapped model has.
      kind: `bin` or `safetensors`.
      saved: what PEFT calls modules_to_save.
      trainables: what LLaVA puts beside the adapter.
      settings: of adapter_config.json.

    Returns:
      The factors: names in `state` with `.lora_A` or `.lora_B` in front of `.weight`.
    """
    generator, factors = torch.Generator().manual_seed(1), {}
    for name, weight in state.items():
        if "language_model.layers" in name and "proj" in name:
            rows, columns = weight.shape
            stem = name.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
            factors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)

    def wrapped(tensors: State) -> State:
        return {f"base_model.model.{renamed(name, layout)}": value for name, value in tensors.items()}

    content = {**ADAPTER, "r": rank, "base_model_name_or_path": str(base), **settings}
    write_json(directory / "adapter_config.json", content)
    tensors = wrapped(factors | (saved or {}))
    if kind == "bin":
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    if trainables:
        torch.save(wrapped(trainables), directory / "non_lora_trainables.bin")
    return factors


def merged(state: State, factors: State, scale: float) -> State:
    """The weights with the adapter's product added in float32, and rounded once."""
    result = dict(state)
    for name, a in factors.items():
        if ".lora_A." in name:
            b = factors[name.replace("lora_A", "lora_B")].float().numpy()
            weight = state[name.replace("lora_A.", "")]
            total = weight.float().numpy() + scale * (b @ a.float().numpy())
            result[name.replace("lora_A.", "")] = torch.from_numpy(total).to(weight.dtype)
    return result


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _with_rows(name: str, value: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows of a vocabulary that HF's format adds: no model may use them, so that they may be anything."""
    if not _is_vocabulary(name):
        return value
    return torch.nn.functional.pad(value, (0, 0, 0, rows - VOCAB), value=7.0)


def _array(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
