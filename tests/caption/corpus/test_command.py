"""`sg4v caption` hands every flag on, and the commands of docs/captioning.md are ones that exist."""

import dataclasses
import pathlib
import shlex
import types
from typing import Any

import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.caption.corpus import job, run
from sg4v_jax.commands import caption, data, train
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.infer import engine
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.models.config import ModelConfig
from tests.caption.corpus.fake import FakeEngine, write_images

# None of them as it is by default.
SAMPLING = {
    "max_new_tokens": 77,
    "temperature": 0.3,
    "top_p": 0.9,
    "top_k": 7,
    "repetition_penalty": 1.4,
    "seed": 9,
    "min_new_tokens": 3,
    "no_repeat_ngram": 4,
}
GUARDS = {"temperature": 0.9, "repetition_penalty": 1.6, "max_new_tokens": 99}
SETTINGS = {
    "prompt": "Why?",
    "shard_size": 5,
    "drop_flagged": True,
    "parquet": True,
    "max_failed": "3",
    "retry_failed": True,
    "retry_changed": True,
    "max_image_bytes": 1234,
    "lease_seconds": 7.5,
}


def flags(values: dict[str, Any], prefix: str = "--") -> list[str]:
    return [
        prefix + name.replace("_", "-") + ("" if value is True else f"={value}")
        for name, value in values.items()
    ]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake engine behind the command; what the job was asked for."""
    asked: dict[str, Any] = {}

    class Loaded(FakeEngine):
        def __init__(self, bundle: ModelBundle, *_: Any, **__: Any):
            super().__init__()
            self.bundle = bundle
            self.memory = types.SimpleNamespace(describe=lambda: "as planned")

    def record(engine: Any, corpus: Any, output: Any, settings: Any, **others: Any) -> Any:
        asked.update(settings=settings, engine=engine, **others)
        return caption_corpus(engine, corpus, output, settings, **others)

    caption_corpus = run.caption_corpus
    bundle = ModelBundle(ModelConfig(), {"a": 1.0}, None, prompt="Trained?")
    monkeypatch.setattr(run, "caption_corpus", record)
    monkeypatch.setattr(engine, "Engine", Loaded)
    monkeypatch.setattr("sg4v_jax.convert.load.load_model", lambda *_: bundle)
    return asked


def test_every_flag_acts(
    model: dict[str, Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", 6)
    argv = ["caption", "--model=m", f"--images={tmp_path / 'images'}", f"--output={tmp_path / 'out'}"]
    main([*argv, "--stop=END", *flags(SAMPLING), *flags(SETTINGS), "--retry=1", *flags(GUARDS, "--retry-")])
    settings = model["settings"]
    assert {name: getattr(settings, name) for name in SETTINGS} == SETTINGS
    assert dataclasses.asdict(settings.guards) == {"retry": 1, **GUARDS}
    options = SamplingOptions(**SAMPLING, stop=("END",))
    assert settings.options == options
    assert all(value != getattr(SamplingOptions(), name) for name, value in SAMPLING.items())
    # The engine is asked with them, about each image with a seed of its own.
    asked = [request.options for request in model["engine"].asked if request.options.temperature == 0.3]
    assert [dataclasses.replace(each, seed=9) for each in asked] == [options] * 6
    assert [each.seed for each in asked] == list(range(9, 15))
    shown = capsys.readouterr()
    assert "prompt: 'Why?' (as given; NOT the one the captioner was trained with, 'Trained?')" in shown.err
    assert "6 images of" in shown.err
    assert "5 of 6 captioned" in shown.out and "1 failed (1 corrupt_image)" in shown.out
    assert (tmp_path / "out/captions.parquet").exists()


def test_beams_act(model: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """They exclude sampling and stop strings; with the flags above these are all options there are."""
    write_images(tmp_path / "images", 1)
    argv = ["caption", "--model=m", f"--images={tmp_path / 'images'}", f"--output={tmp_path / 'out'}"]
    beams = {"num_beams": 3, "length_penalty": 0.7}
    main([*argv, "--max-new-tokens=50", *flags(beams)])
    assert model["settings"].options == SamplingOptions(max_new_tokens=50, **beams)
    assert {*SAMPLING, *beams, "stop"} == {field.name for field in dataclasses.fields(SamplingOptions)}


def test_another_model_is_refused(
    model: dict[str, Any],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_images(tmp_path / "images", 2)
    argv = ["caption", "--model=m", f"--images={tmp_path / 'images'}", f"--output={tmp_path / 'out'}"]
    main(argv)
    first = model["engine"].bundle
    other = ModelBundle(ModelConfig(), {"a": 1.5}, None, prompt="Trained?")
    monkeypatch.setattr("sg4v_jax.convert.load.load_model", lambda *_: other)
    with pytest.raises(SystemExit):
        main(argv)
    assert "model.sha256 was" in capsys.readouterr().err
    monkeypatch.setattr("sg4v_jax.convert.load.load_model", lambda *_: first)
    with pytest.raises(SystemExit):
        main([*argv, "--weights=int8", "--kv=int8", "--dtype=float32"])
    message = capsys.readouterr().err
    for name, was, now in (
        ("dtype", "bfloat16", "float32"),
        ("weights", "float", "int8"),
        ("kv", "float", "int8"),
    ):
        assert f"model.computed.{name} was '{was}', now '{now}'" in message
    assert job.describe_model(other) != job.describe_model(dataclasses.replace(other, template="plain"))


def test_the_commands_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (pathlib.Path(__file__).parents[3] / "docs/captioning.md").read_text()
    blocks = [block.split("```")[0].replace("\\\n", " ") for block in page.split("```bash\n")[1:]]
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    ran: list[str] = []
    monkeypatch.setattr(caption, "run", lambda arguments, _: ran.append("caption"))
    monkeypatch.setattr(train, "run", lambda arguments, config: ran.append(config[0]))
    monkeypatch.setattr(data, "_data_build", lambda arguments, _: ran.append("build"))
    monkeypatch.setattr(data, "_data_unpack", lambda arguments, _: ran.append("unpack"))
    for command in commands:
        assert command[0] == "sg4v"
        main(command[1:])
    assert ran == ["--config=configs/captioner.py:7b", "caption", "build", "unpack", "caption"]
