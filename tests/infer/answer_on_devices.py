"""The engine on four virtual devices, on several meshes; prints every mesh's answers as JSON.

Run by `test_mesh.py` in a process of its own: the number of devices is fixed when JAX starts.
Arguments: a tokenizer.
"""

import json
import pathlib
import sys
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

from sg4v_jax.convert.bundle import ModelBundle  # noqa: E402
from sg4v_jax.data.records import Turn  # noqa: E402
from sg4v_jax.infer.engine import Engine  # noqa: E402
from sg4v_jax.infer.request import Prompt, Request, ScoreRequest  # noqa: E402
from sg4v_jax.infer.sampling import SamplingOptions  # noqa: E402
from sg4v_jax.parallel.mesh import make_mesh  # noqa: E402
from sg4v_jax.world import load_photos  # noqa: E402
from tests.tiny import model_config, random_params  # noqa: E402

MESHES: dict[str, dict[str, int]] = {
    "one": {},
    "data=2 tensor=2": {"data": 2, "fsdp": 1, "tensor": 2},
}


def answers(bundle: ModelBundle, mesh: jax.sharding.Mesh, **settings: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of a few requests and scores."""
    engine = Engine(bundle, mesh, "float32", slots=3, capacity=256, prefill_rows=2, **settings)
    words = ("red", "a blue square", "what is it", "one two three", "green")
    image = load_photos()[0].encoded
    prompts = [Prompt((Turn("human", f"<image>\n{word}"),), (image,)) for word in words]
    rows = [
        SamplingOptions(max_new_tokens=6 + i, temperature=0.7 * (i % 3), seed=i) for i in range(len(words))
    ]
    requests = [Request(i, prompt, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
    done = {result.key: result.completion for result in engine.complete(requests)}
    scores = engine.score([ScoreRequest(i, prompt, ("yes", "no")) for i, prompt in enumerate(prompts)])
    cache = engine._device._state.cache.key
    return {
        "slots": engine.slots,
        "local": cache.addressable_shards[0].data.size / cache.size,
        "memory": engine.memory.slots,
        "tokens": [list(done[i].tokens) for i in range(len(words))],
        "log_probabilities": [done[i].log_probability for i in range(len(words))],
        "scores": [list(score.log_probabilities) for score in sorted(scores, key=lambda score: score.key)],
    }


def main() -> None:
    config = model_config()
    vocab = config.__class__.from_dict(
        {**config.to_dict(), "text": {**config.to_dict()["text"], "vocab_size": 640}}
    )
    bundle = ModelBundle(vocab, jax.device_get(random_params(vocab)), pathlib.Path(sys.argv[1]))
    devices = jax.devices()
    report = {}
    for kv in ("float", "int8"):
        for name, sizes in MESHES.items():
            mesh = make_mesh(**sizes, devices=devices[:1] if name == "one" else devices)
            report[f"{name} {kv}"] = answers(bundle, mesh, kv=kv)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
