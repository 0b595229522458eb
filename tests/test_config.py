"""Every config as it is, frozen; the parser's errors; and that each config fits the model it names.

After a change that is meant, write the golden file anew and read its diff:

    SG4V_UPDATE_GOLDEN=1 python -m pytest tests/test_config.py
"""

import itertools
import json
import os
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict
from sg4v_jax.configs import pods

from sg4v_jax import config as configs
from sg4v_jax.data.conversation import get_template
from sg4v_jax.data.image import ASPECTS
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.layers import REMAT_POLICIES
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.plan import topology
from sg4v_jax.train import groups
from sg4v_jax.train.step import REDUCTIONS

GOLDEN = pathlib.Path(__file__).parent / "golden/configs.json"
FILES = sorted(
    path.name
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.name not in ("__init__.py", "common.py", "pods.py")
)
SIZES = ("7b", "13b", "tiny")
SPECS = [f"configs/{name}:{size}" for name in FILES for size in SIZES]
TINY = "--config=configs/pretrain.py:tiny"


def test_no_config_drifts_unseen() -> None:
    found = {spec: json.loads(configs.load(spec).to_json_best_effort()) for spec in SPECS}
    if os.environ.get("SG4V_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    expected = json.loads(GOLDEN.read_text())
    assert found.keys() == expected.keys()
    for spec in SPECS:
        assert found[spec] == expected[spec], f"{spec} has changed; if it was meant to, see this file's head"


def test_every_slice_has_its_mesh() -> None:
    """`7b,v5e-64` is the size's config with other rows, mesh and remat policy, which divide the slice."""
    for name, size, pod in itertools.product(FILES, ("7b", "13b"), pods.PODS):
        plain, placed = (configs.load(f"configs/{name}:{arg}") for arg in (size, f"{size},{pod}"))
        mesh, data = placed.mesh, placed.data
        assert mesh.fsdp * mesh.tensor * mesh.data == topology.parse(pod).num_chips == pods.PODS[pod][0]
        # Each chip has a row of its own before any product is split, and halving rows stops at a sample.
        assert data.batch_size % (mesh.fsdp * mesh.data) == 0
        assert mesh.tensor == 1 or data.seq_len == data.max_tokens
        assert data.batch_size * data.image_slots == plain.data.batch_size * plain.data.image_slots
        assert data.max_tokens <= data.seq_len and data.image_slots * 576 < data.seq_len
        assert placed.model.text.num_heads % mesh.tensor == 0
        assert placed.train.remat in REMAT_POLICIES
        with placed.unlocked():
            placed.mesh, placed.train.remat = plain.mesh, plain.train.remat
            for field in ("batch_size", "seq_len", "image_slots"):
                placed.data[field] = plain.data[field]
        assert placed.to_json_best_effort() == plain.to_json_best_effort()


@pytest.mark.parametrize("spec", SPECS)
def test_config_fits_its_model(spec: str) -> None:
    """Shapes are possible, groups cover every parameter, and every name is known where it is used."""
    config = configs.load(spec)
    model = ModelConfig.from_dict(config.model.to_dict())
    shapes = abstract_model(model)[1]
    multipliers = groups.assign(shapes, config.optim.groups)
    trained = {path for path, multiplier in multipliers.items() if multiplier is not None}
    assert any(path.startswith("projector/") for path in trained)
    # Blocks that are split off as frozen are frozen, and what is never computed is not trained.
    never = ("vision/frozen", "vision/unused", "vision/post_norm")
    assert not any(path.startswith(never) for path in trained)
    get_template(config.data.template)
    assert config.data.aspect in ASPECTS
    assert config.train.remat in REMAT_POLICIES
    assert config.train.loss_reduction in REDUCTIONS
    assert config.data.batch_size % config.train.accumulate == 0
    assert config.data.seq_len > config.data.image_slots * model.vision.num_image_tokens
    assert config.data.seq_len <= model.text.max_positions
    assert config.data.sources


def test_the_paper_s_sizes() -> None:
    """Spec 3.1: parameters by part; 4.1: blocks 12 to 22 of the tower train in pre-training."""
    expected = {
        "7b": {"text": 6_738_415_616, "projector": 20_979_712, "vision": 303_507_456},
        "13b": {"text": 13_015_864_320, "projector": 31_467_520, "vision": 303_507_456},
    }
    for size, parts in expected.items():
        config = configs.load(f"configs/pretrain.py:{size}")
        shapes = abstract_model(ModelConfig.from_dict(config.model.to_dict()))[1]
        assert {part: groups.count(shapes[part]) for part in parts} == parts
        trainable, _ = groups.split(shapes, config.optim.groups)
        vision = groups.count(trainable["vision"])
        assert vision == 11 * 151_154_688 // 12
        assert groups.count(trainable) == vision + parts["text"] + parts["projector"]


def parse(*arguments: str) -> ConfigDict:
    return configs.parse(list(arguments))


def test_overrides_take_the_type_of_their_field() -> None:
    config = parse(
        TINY,
        "--config.seed=3",
        "--config.train.num_steps=5",
        "--config.optim.learning_rate=1",
        "--config.optim.b2=.5",
        "--config.data.packing=false",
        "--config.data.tokenizer=/a=b/c:d",
        "--config.data.sources.share_captioner.weight=2",
        '--config.optim.groups=(("text/.*", None), (".*", 0.5))',
    )
    values: list[tuple[Any, Any]] = [
        (config.seed, 3),
        (config.train.num_steps, 5),
        (config.optim.learning_rate, 1.0),
        (config.optim.b2, 0.5),
        (config.data.packing, False),
        (config.data.tokenizer, "/a=b/c:d"),
        (config.data.sources.share_captioner.weight, 2.0),
        (config.optim.groups, (("text/.*", None), (".*", 0.5))),
    ]
    for found, expected in values:
        assert found == expected and type(found) is type(expected)


def test_sizes_default_to_the_paper_s() -> None:
    assert parse("--config=configs/finetune.py") == parse("--config=configs/finetune.py:7b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"which config\? .* there are .*configs/pretrain\.py"),
        (["--config=configs/pretrian.py:7b"], r"no config file configs/pretrian\.py; did you mean "),
        (["--config=some/where/else.py"], r"no config file some/where/else\.py; there are configs/"),
        (["--config=configs/pretrain.py:8b"], r"size '8b' is not one of \('7b', '13b', 'tiny'\)"),
        ([TINY, "--config.optim.learnin_rate=1"], r"no field config\.optim\.learnin_rate; did you mean "),
        ([TINY, "--config.optm.b1=1"], r"no field config\.optm; did you mean config\.optim\?"),
        ([TINY, "--config.data.sources.x.weight=1"], r"config\.data\.sources\.x; there are share_captioner"),
        ([TINY, "--config.seed.x=1"], r"no field config\.seed\.x"),
        ([TINY, "--config.optim.b1=half"], r"config\.optim\.b1=half: could not convert"),
        (
            ["--config=configs/pretrain.py:7b,v5e-46"],
            r"no settings for TPU slice 'v5e-46'; did you mean v5e-",
        ),
        (
            ["--config=configs/pretrain.py:7b,mars"],
            "no settings for TPU slice 'mars'; there are v4-32, v4-64",
        ),
        (["--config=configs/pretrain.py:tiny,v5e-64"], "the tiny model needs no TPU slice"),
        ([TINY, "--config.train.num_steps=1.5"], r"config\.train\.num_steps=1\.5: invalid literal for int"),
    ],
)
def test_errors_name_what_was_meant(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(*arguments)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


def test_load_takes_any_value_and_the_same_errors() -> None:
    config = configs.load("configs/finetune.py:tiny", **{"optim.groups": ((".*", 2.0),), "seed": 1})
    assert (config.optim.groups, config.seed) == (((".*", 2.0),), 1)
    with pytest.raises(ValueError, match=r"config\.train\.num_step; did you mean config\.train\.num_ste"):
        configs.load("configs/finetune.py:tiny", **{"train.num_step": 1})
