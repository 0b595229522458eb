"""The same dataset on Apache Beam. Needs the extra `beam`; run with `pytest -m beam`."""

import json
import pathlib
import sys
from typing import Any

import pytest

from sg4v_jax.data.beam import on_beam
from sg4v_jax.data.build import build
from sg4v_jax.data.json_stream import RecordError
from tests.data.datasets import contents
from tests.data.planted import plant

LOCAL = ["--runner=DirectRunner", "--direct_num_workers=1"]
PROCESSES = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]


@pytest.mark.beam
@pytest.mark.parametrize("runner", [LOCAL, PROCESSES])
def test_beam_builds_the_same(tmp_path: pathlib.Path, runner: list[str]) -> None:
    planted = plant(tmp_path, 400)
    arguments = ("p", planted.file, planted.image_root)
    settings: dict[str, Any] = {"bad_records": "drop", "records_per_shard": 64}
    alone, expected = build(*arguments, tmp_path / "alone", **settings)
    together, report = build(*arguments, tmp_path / "beam", executor=on_beam(runner), **settings)
    assert report == expected
    assert contents(pathlib.Path(together)) == contents(pathlib.Path(alone))
    assert len(contents(pathlib.Path(alone))) == 7 + 3


@pytest.mark.beam
def test_a_bad_record_stops_the_pipeline(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"id": "1", "conversations": []}]))
    with pytest.raises(Exception, match="'conversations' has 0 usable turns"):
        build("x", tmp_path / "x.json", tmp_path, tmp_path / "out", executor=on_beam(LOCAL))
    with pytest.raises(RecordError, match="more than max_bad 0"):
        build(
            "x",
            tmp_path / "x.json",
            tmp_path,
            tmp_path / "out",
            bad_records="drop",
            max_bad="0",
            executor=on_beam(LOCAL),
        )


def test_without_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"pip install 'sg4v_jax\[beam\]'"):
        on_beam([])
