"""Runs side by side: differences, flips, notes, and a page that shows what a model wrote as text."""

import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

from sg4v_jax.evaluate.compare import Change, compare_runs, table
from sg4v_jax.evaluate.compare_page import write_page
from sg4v_jax.evaluate.published import PUBLISHED
from sg4v_jax.evaluate.radar import radar_chart
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import run_benchmark
from sg4v_jax.evaluate.settings import Choices
from sg4v_jax.evaluate.statistics import Estimate
from sg4v_jax.infer.request import Request
from tests.evaluate.official import WRITERS, FakeEngine

NAMES = ("mme", "pope", "gqa", "mmbench", "vqav2", "caption")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Runs `first` and `second`, their data, and a run `cropped` of one benchmark."""
    root = tmp_path_factory.mktemp("runs")

    def answers(model: str, name: str) -> FakeEngine:
        loaded = BENCHMARKS[name].load(root / "data")
        truth = {sample.id: sample.truth for sample in loaded.samples}

        def answer(request: Request) -> str:
            right = truth[request.key]
            right = right if isinstance(right, str) else (right or ["<script>alert(1)</script>"])[0]
            if model == "first" and str(request.key).endswith(("1", "202")):
                return "<script>alert(1)</script>"
            return right

        return FakeEngine(answer)

    for name in NAMES:
        WRITERS[name](root / "data")
        loaded = BENCHMARKS[name].load(root / "data")
        for model in ("first", "second"):
            run_benchmark(BENCHMARKS[name], answers(model, name), loaded, root / model, model=model)
    pope = BENCHMARKS["pope"]
    settings = Choices(aspect="square")
    loaded = pope.load(root / "data")
    run_benchmark(pope, answers("second", "pope"), loaded, root / "cropped", model="c", choices=settings)
    return root


def test_differences_and_flips(runs: pathlib.Path) -> None:
    found = compare_runs([runs / "first", runs / "second"])
    assert found.runs == ("first", "second") and not found.notes
    headlines = {row.benchmark: row for row in found.rows if row.headline}
    assert set(headlines) == {*NAMES} - {"vqav2"}, "what a server scores has no row"
    gqa = headlines["gqa"]
    assert [v.value for v in gqa.values if v] == [0.0, 100.0]
    assert gqa.changes[0] is None and gqa.changes[1] is not None
    assert gqa.changes[1].difference.value == pytest.approx(100.0)
    assert not gqa.changes[1].significant, "two questions say nothing"
    flips = {flips.benchmark: flips for flips in found.flips}
    assert [flip.id for flip in flips["gqa"].gained] == ["201", "202"] and not flips["gqa"].lost
    assert flips["gqa"].p == pytest.approx(0.5)
    assert flips["gqa"].gained[0].answers == ("<script>alert(1)</script>", "yes")
    back = compare_runs([runs / "second", runs / "first"])
    assert {f.benchmark: len(f.lost) for f in back.flips} == {f.benchmark: len(f.gained) for f in found.flips}


@pytest.mark.parametrize(
    ("low", "high", "units", "significant"),
    [(0.1, 2.0, 20, True), (-2.0, -0.1, 500, True), (0.1, 2.0, 19, False), (-0.1, 2.0, 500, False)],
)
def test_significance(low: float, high: float, units: int, significant: bool) -> None:
    assert Change(Estimate(1.0, low, high, units)).significant == significant


def test_a_run_is_no_better_than_itself(runs: pathlib.Path) -> None:
    found = compare_runs([runs / "second", runs / "second"])
    assert all(not change.significant for row in found.rows for change in row.changes if change)
    assert not any(flips.gained or flips.lost for flips in found.flips)
    assert found.runs[0] != "second", "two runs of one name are told apart by their paths"


def test_other_settings_are_said(runs: pathlib.Path) -> None:
    found = compare_runs([runs / "second", runs / "cropped"])
    assert any("pope: the runs differ in aspect (pad, square)" in note for note in found.notes)
    assert "gqa: cropped has no scores" in found.notes


def test_the_table(runs: pathlib.Path) -> None:
    text = table(compare_runs([runs / "first", runs / "second"], ["sharegpt4v-7b"]))
    gqa = next(line for line in text.splitlines() if line.startswith("GQA"))
    assert gqa.split()[2:] == ["0.00", "100.00", "63.30", "+100.00", "(+100.00", "to", "+100.00)"]
    assert "MME: perception" in text and "artwork" not in text
    assert "artwork" in table(compare_runs([runs / "first", runs / "second"]), headlines=False)
    assert "gqa, second: 2 samples gained, 0 lost" in text


def test_the_page(runs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = compare_runs([runs / "first", runs / "second"], ["sharegpt4v-7b"])
    page = write_page(found, runs / "first", tmp_path / "page.html", runs / "data").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<svg") == 1 and "data:image/jpeg;base64," in page and "http:" not in page
    assert "Is it red?" in page and "What color?" in page
    assert write_page(found, runs / "first", tmp_path / "plain.html").read_text().count("<img") == 0


def test_radar() -> None:
    chart = radar_chart(["a", "b<", "c"], {"m": [50.0, 10.0, None], "n": [100.0, 10.0, 7.0]})
    root = ElementTree.fromstring(chart)
    groups = [child for child in root if child.tag == "g"]
    assert len(groups) == 2 and len(groups[0].findall("circle")) == 2
    outline = groups[1].find("polygon")
    assert outline is not None and len(outline.attrib["points"].split()) == 3
    # Half of the best is the centre of an axis.
    first = groups[0].find("circle")
    assert first is not None and (first.attrib["cx"], first.attrib["cy"]) == ("400.0", "270.0")


def test_errors(runs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished benchmark"):
        compare_runs([runs / "first", tmp_path])
    with pytest.raises(ValueError, match=r"no published scores of 'gpt'.*sharegpt4v-7b"):
        compare_runs([runs / "first"], ["gpt"])


def test_published_scores_are_of_our_metrics(runs: pathlib.Path) -> None:
    assert {name for row in PUBLISHED.values() for name, _ in row} <= set(BENCHMARKS)
    assert PUBLISHED["sharegpt4v-7b"]["mme", "perception"] == 1567.4
    assert ("pope", "F1") not in PUBLISHED["sharegpt4v-13b"]
