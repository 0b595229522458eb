"""Tiny random LLaVA models of `transformers`, the peer that conversion and parity tests compare with."""

from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

# The last 28 rows are what HF's format adds to a vocabulary of 100: `<image>`, `<pad>` and padding.
VOCAB, PADDED_VOCAB = 100, 128


def llava_config(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **fields: Any
) -> LlavaConfig:
    """A tiny LLaVA-1.5, changed by the arguments."""
    vision_fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text_fields = {
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**{**vision_fields, **(vision or {})}),
        text_config=LlamaConfig(**{**text_fields, **(text or {})}),
        **{"image_token_index": VOCAB, "pad_token_id": VOCAB + 1, **fields},
    )


def llava_model(
    config: LlavaConfig, *, std: float = 0.2, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A model with weights of order `std`: HF's own are so small that a wrong layer hardly shows."""
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator) + is_norm_scale)
    return model.to(dtype)


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict of a float32 model as NumPy arrays."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
