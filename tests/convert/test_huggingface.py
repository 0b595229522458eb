"""What transformers makes of the files beside the weights, and we of its configs."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sg4v_jax.convert import companions
from sg4v_jax.convert.configs import read_text, read_vision
from sg4v_jax.convert.huggingface import read_config, write_config
from sg4v_jax.convert.params import to_params
from sg4v_jax.convert.tensors import ConversionError
from sg4v_jax.data.conversation import (
    IMAGE_TOKEN,
    TEMPLATES,
    encode_prompt,
    get_template,
    place_images,
    render,
)
from sg4v_jax.data.image import normalize_reference, preprocess
from sg4v_jax.data.records import Turn
from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from tests.convert.conftest import TEXTS
from tests.convert.models import load, save
from tests.torch_llava import arrays, llava_config, llava_model

CONFIG_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("exported")
    hf_config = llava_config(text={"vocab_size": 320}, image_token_index=300, pad_token_id=301)
    config = read_config(hf_config.to_dict())
    params = to_params(config, arrays(llava_model(hf_config)))
    save(directory, config, params, "hf", tokenizer_file=tokenizer.path, dtype="float32")
    return directory


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 83, 3), dtype=np.uint8))


def message(role: str, *parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


@pytest.mark.parametrize("images", [0, 1, 2])
def test_processor_gives_what_the_model_was_trained_on(
    images: int, exported: pathlib.Path, tokenizer: Tokenizer
) -> None:
    """Ids and pixels, from messages to tensors, equal those of our own pipeline."""
    processor = transformers.AutoProcessor.from_pretrained(exported)
    text = processor.apply_chat_template([message("user", *["<image>"] * images, "What is this?")])
    inputs = processor(text=text, images=[image()] * images or None, return_tensors="pt")
    turns = place_images([Turn("human", "<image>\n" * images + "What is this?")])
    assert text == render(get_template("v1"), turns)
    ids = encode_prompt(get_template("v1"), turns, tokenizer)
    expanded = [j for i in ids.tolist() for j in ([300] * 4 if i == IMAGE_TOKEN else [i])]
    assert inputs["input_ids"][0].tolist() == expanded
    if images:
        pixels = normalize_reference(preprocess(image(), size=28, aspect="pad")).transpose(2, 0, 1)
        np.testing.assert_allclose(inputs["pixel_values"][0], pixels, atol=1e-6)


def test_generation_runs_and_never_gives_added_tokens(exported: pathlib.Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(exported)
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(exported)
    # Rows that would win every time, were they allowed to.
    with torch.no_grad():
        model.lm_head.weight[300:] = 100 * model.lm_head.weight[:20]
    prompts = [
        processor.apply_chat_template([message("user", "<image>", text)])
        for text in ("What?", "A cat, a mat?")
    ]
    inputs = processor(text=prompts, images=[image()] * 2, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0, 0] == 301, "shorter prompts are padded on the left"
    free = model.generate(**inputs, max_new_tokens=5, suppress_tokens=None)[:, length:]
    assert set(free[free >= 300].tolist()) - {301}
    made = model.generate(**inputs, max_new_tokens=5)[:, length:]
    assert set(made[made >= 300].tolist()) <= {301}, "only what fills finished rows"


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name: str, exported: pathlib.Path) -> None:
    """Jinja renders what `render` does, over several rounds."""
    template = get_template(name)
    turns = [Turn("human", '<image>\nWhat "is" this?\n{{ x }}'), Turn("gpt", " It's\ta <b>cat</b>.")]
    if not template.images_only:
        turns += [Turn("human", "Why?"), Turn("gpt", "é"), Turn("human", "<image>")]
    messages = [
        message("user" if turn.role == "human" else "assistant", *turn.text.partition("<image>\n")[1:])
        if "<image>\n" in turn.text
        else message("user" if turn.role == "human" else "assistant", turn.text)
        for turn in turns
    ]
    for entry in messages:
        for part in entry["content"]:
            if part.get("text", "").startswith("<image>"):
                del part["text"]
                part["type"] = "image"
    processor = transformers.AutoProcessor.from_pretrained(exported)
    jinja = companions.chat_template(template)
    for count in range(1, len(turns) + 1):
        expected = render(template, place_images(turns[:count]))
        assert processor.apply_chat_template(messages[:count], chat_template=jinja) == expected
    with pytest.raises(Exception, match="fixed system text; found a message by system"):
        processor.apply_chat_template([message("system", "Be rude.")], chat_template=jinja)


def test_tokenizer_json_equals_sentencepiece(exported: pathlib.Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    generator = np.random.default_rng(0)
    words = ["cat", " the", "  ", "\n", "USER", "assistant", "é", "日本", "😀", "123", "\t", "-", "▁"]
    texts = ["", " ", "cat", *("".join(generator.choice(words, 12)) for _ in range(200))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs("cat")["input_ids"] == [1, *tokenizer.encode("cat")]
    assert theirs.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<image>", "<pad>"]) == [0, 1, 2, 300, 301]
    assert theirs.pad_token_id == 301


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_image_processor(aspect: str, tmp_path: pathlib.Path) -> None:
    companions.write_preprocessor(tmp_path, VisionConfig(image_size=42), aspect)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = processor(image(), return_tensors="np")["pixel_values"][0]
    expected = normalize_reference(preprocess(image(), size=42, aspect=aspect)).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_files_of_share4v(tokenizer: Tokenizer, exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Spec 3.2 and 3.6."""
    config, params = load(exported)
    save(tmp_path / "s", config, params, "share4v", tokenizer_file=tokenizer.path)
    assert load(tmp_path / "s")[0] == config
    files = {str(path.relative_to(tmp_path / "s")) for path in (tmp_path / "s").rglob("*.*")}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sg4v.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    }
    fields = json.loads((tmp_path / "s/config.json").read_text())
    assert fields["model_type"] == "share4v"
    assert fields["vocab_size"] == 300
    assert (fields["mm_projector_type"], fields["mm_vision_select_layer"]) == ("mlp2x_gelu", -2)
    assert (fields["image_aspect_ratio"], fields["pad_token_id"]) == ("pad", 0)
    settings = json.loads((tmp_path / "s/tokenizer_config.json").read_text())
    assert (settings["legacy"], settings["padding_side"], settings["pad_token"]) == (False, "right", None)


def test_tokenizer_of_another_model(
    tokenizer: Tokenizer, exported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config, params = load(exported)
    short = {**params["text"], "embedding": params["text"]["embedding"][:299]}
    short["head"] = {"kernel": params["text"]["head"]["kernel"][:, :299]}
    text = TextConfig(**{**config.text.__dict__, "vocab_size": 299})
    other = ModelConfig(vision=config.vision, text=text)
    with pytest.raises(ValueError, match="has 300 pieces, the model 299 tokens"):
        save(tmp_path / "x", other, {**params, "text": short}, "hf", tokenizer_file=tokenizer.path)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config, params = load(exported)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"template": "vicuna"}, "Did you mean 'vicuna_v1'"),
        ({"aspect": "crop"}, "aspect 'crop' is not one of square, pad"),
    )
    for arguments, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            save(tmp_path / "x", config, params, "hf", **arguments)
    deep = ModelConfig(vision=config.vision, text=config.text, projector="mlp3x_gelu")
    layers = params["projector"]
    params = {**params, "projector": {**layers, "layer_2": layers["layer_1"]}}
    with pytest.raises(ConversionError, match="mlp2x_gelu, not mlp3x_gelu; use share4v"):
        save(tmp_path / "x", deep, params, "hf")
    assert not list(tmp_path.iterdir())


def test_config_of_7b() -> None:
    """As on the Hub: what is missing has LlamaConfig's defaults, and the added rows are dropped."""
    assert read_config(CONFIG_7B) == ModelConfig()
    assert read_config({**CONFIG_7B, "vision_config": None}) == ModelConfig()
    assert read_config(write_config(ModelConfig(), "bfloat16")) == ModelConfig()
    theirs = transformers.LlavaConfig(**CONFIG_7B).to_dict()
    assert read_config(theirs) == ModelConfig()


@pytest.mark.parametrize(
    ("image", "rows", "vocab"),
    [
        (32000, 32000, 32000),
        (32000, 32002, 32000),
        (32000, 32064, 32000),
        (128256, 128320, 128256),
        (10, 131072, 131072),
    ],
)
def test_added_rows(image: int, rows: int, vocab: int) -> None:
    fields = {**CONFIG_7B, "image_token_index": image, "text_config": {"vocab_size": rows}}
    assert read_config(fields).text.vocab_size == vocab


def test_defaults_are_those_of_transformers() -> None:
    text, vision = transformers.LlamaConfig(), transformers.CLIPVisionConfig()
    assert read_text({}) == read_text(text.to_dict())
    assert read_vision({}) == read_vision(vision.to_dict())
    assert read_text({}).norm_eps == 1e-6
    assert read_vision({}).patch_size == 32


@pytest.mark.parametrize(
    "fields", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_base_of_the_rotary_embedding(fields: dict[str, Any]) -> None:
    assert read_text(fields).rope_theta == 5e5
    assert read_text(fields) == read_text(transformers.LlamaConfig(**fields).to_dict())


def test_unsupported_configs() -> None:
    text = {
        "attention_bias": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "model_type": "mistral",
    }
    rope = {"rope_scaling": {"type": "linear", "factor": 2.0}, "num_attention_heads": 33}
    with pytest.raises(ConversionError) as caught:
        read_text({**text, **rope})
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "hidden_act is 'gelu'; supported: 'silu'",
        "attention_bias is True; supported: False",
        "tie_word_embeddings is True; supported: False",
        "model_type is 'mistral'; supported: llama",
        "rotary embedding of type 'linear'; supported: 'default'",
        "hidden_size 4096 does not divide by num_heads 33",
    ]
    fields = {"model_type": "llava_next", "vision_feature_layer": [-2, -5], "projector_hidden_act": "relu"}
    with pytest.raises(ConversionError) as caught:
        read_config({**CONFIG_7B, **fields})
    assert len(caught.value.problems) == 3
    with pytest.raises(ConversionError, match="siglip_vision_model"):
        read_config({**CONFIG_7B, "vision_config": {"model_type": "siglip_vision_model"}})
