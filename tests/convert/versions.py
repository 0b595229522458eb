"""Loads and saves an exported directory with whatever transformers is installed (docs/convert.md).

Needs only torch and transformers, so that it runs where this library does not:

  python tests/convert/versions.py generate DIR      greedy ids and a hash of the logits, as one line
  python tests/convert/versions.py save DIR OUTPUT   saves DIR again, in each of the version's ways
  python tests/convert/versions.py make DIR          a small random model of our own, to export and test
  python tests/convert/versions.py compare DIR OUTPUT...   our reader's opinion of what `save` wrote

`make` and `compare` need the library instead.
"""

import argparse
import hashlib
import inspect
import json
import pathlib
import shutil
from typing import Any


def load(directory: str) -> tuple[Any, Any]:
    """(model in float32, processor) as a user would load them."""
    import torch
    import transformers

    # The argument's name until 4.55; later versions take it with a warning.
    dtype: Any = {"torch_dtype": torch.float32}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, **dtype)
    return model.eval(), transformers.AutoProcessor.from_pretrained(directory)


def generate(directory: str) -> dict[str, Any]:
    """The greedy answer about a fixed image, and a hash of the prompt's pixels, ids and logits."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    model, processor = load(directory)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 83, 3), dtype=np.uint8)
    inputs = processor(text=text, images=Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :300]
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return {
        "transformers": transformers.__version__,
        "prompt": _hash(inputs["input_ids"]),
        "pixels": _hash(inputs["pixel_values"].round(decimals=4) + 0.0),
        "logits": _hash((logits * 1000).round() + 0.0),
        "ids": made[0, inputs["input_ids"].shape[1] :].tolist(),
    }


def save(directory: str, output: str) -> dict[str, Any]:
    """Saves a model in every way there is: the default, the names in memory, and torch's own file."""
    import torch
    import transformers

    model, processor = load(directory)
    root = pathlib.Path(output)
    ways: dict[str, dict[str, Any]] = {"default": {}, "shards": {"max_shard_size": "200KB"}}
    parameters = inspect.signature(model.save_pretrained).parameters
    if "save_original_format" in parameters:
        ways["in-memory-names"] = {"save_original_format": False}
    if "safe_serialization" in parameters:
        ways["pickle"] = {"safe_serialization": False}
    for way, arguments in ways.items():
        model.save_pretrained(root / way, **arguments)
        processor.save_pretrained(root / way)
    model.config.save_pretrained(root / "state-dict")
    torch.save(model.state_dict(), root / "state-dict/pytorch_model.bin")
    return {"transformers": transformers.__version__, "saved": [*ways, "state-dict"]}


def make(directory: str) -> dict[str, Any]:
    """Exports a small model with our own writer, template v1 and padded images."""
    import tempfile

    import torch

    from sg4v_jax.convert.load import convert, open_checkpoint
    from sg4v_jax.data.tokenizer import train_tokenizer
    from tests.convert.conftest import TEXTS
    from tests.convert.writers import VOCAB, peer, state_of, write_original

    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        train_tokenizer(TEXTS, root / "tokenizer.model", VOCAB)
        model = peer()
        state = state_of(model, torch.float32)
        places: dict[str, Any] = {"tower": root / "tower", "named": "../tower"}
        source = write_original(root / "model", state, model.config, root / "tokenizer.model", **places)
        (source.path / "generation_config.json").unlink()
        convert(open_checkpoint(source.path), directory, layout="hf")
    return {"made": directory}


def compare_saved(directory: str, outputs: list[str]) -> dict[str, Any]:
    """Whether each directory that `save` wrote is, to us, what it was made from."""
    from sg4v_jax.convert.compare import compare
    from sg4v_jax.convert.load import open_checkpoint

    ours, report = open_checkpoint(directory), {}
    for output in outputs:
        for path in sorted(pathlib.Path(output).iterdir()):
            opened = open_checkpoint(path).checked()
            found = compare(ours, opened)
            bits = not found.differences and not found.dtypes and found.compared == len(ours.tensors)
            said = opened.config == ours.config and opened.usage.aspect == ours.usage.aspect
            said = said and opened.usage.chat_template == ours.usage.chat_template
            report[str(path)] = "bit-identical" if bits and said else f"{len(found.differences)} differ"
    return report


def _hash(tensor: Any) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("generate", "save", "make", "compare"))
    parser.add_argument("paths", nargs="+")
    arguments = parser.parse_args()
    paths = arguments.paths
    if arguments.what == "save":
        shutil.rmtree(paths[1], ignore_errors=True)
    actions: dict[str, Any] = {"generate": generate, "save": save, "make": make}
    found = (
        compare_saved(paths[0], paths[1:]) if arguments.what == "compare" else actions[arguments.what](*paths)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
