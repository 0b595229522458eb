"""Whatever a model directory is, the model comes out with the way it wants to be prompted."""

import jax
import numpy as np
import pytest

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.load import load_model, save_model
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.sharegpt4v import init_params

CONFIG = ModelConfig(VisionConfig(16, 32, 3, 2, 16, 8, tuned_from=1), TextConfig(64, 16, 32, 1, 2, 1))


@pytest.mark.parametrize("layout", ["hf", "share4v"])
def test_template_aspect_and_prompt_survive(tmp_path, layout):
    bundle = ModelBundle(
        CONFIG, init_params(CONFIG, jax.random.key(0)), None, "plain", "square", "Describe it."
    )
    save_model(bundle, tmp_path / "out", layout=layout, dtype="float32")
    loaded = load_model(tmp_path / "out")
    assert (loaded.template, loaded.aspect, loaded.prompt) == ("plain", "square", "Describe it.")
    assert loaded.config == CONFIG.with_tuned_from(0)
    np.testing.assert_array_equal(loaded.params["text"]["embedding"], bundle.params["text"]["embedding"])


def test_no_model_and_no_format(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither checkpoints/ .* nor config\.json"):
        load_model(tmp_path)
    bundle = ModelBundle(CONFIG, init_params(CONFIG, jax.random.key(0)), None)
    with pytest.raises(ValueError, match="'onnx' is not one of"):
        save_model(bundle, tmp_path / "out", layout="onnx")
