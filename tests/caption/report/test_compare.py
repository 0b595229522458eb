"""Paired differences against a join with dictionaries, and scipy."""

import pathlib

import numpy as np
import pytest
import scipy.stats

from sg4v_jax.caption.report.compare import common_rows, differences
from sg4v_jax.caption.report.measure import measure
from sg4v_jax.caption.report.report import make_report, numbers
from tests.caption.report.conftest import write_lines


def test_differences_are_those_of_a_plain_join(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    files = []
    for name, images in {"a": range(300), "b": range(299, 99, -1)}.items():
        lines = [{"image": f"x/{i}.jpg", "caption": "seems " * rng.integers(1, 30)} for i in images]
        lines += [{"image": "x/150.jpg", "caption": "a second one"}]
        files.append((write_lines(tmp_path / f"{name}.jsonl", lines), lines))
    first, second = (measure([file]) for file, _ in files)
    rows = common_rows(first, second)
    texts = [{line["image"]: line["caption"].strip() for line in reversed(lines)} for _, lines in files]
    common = sorted(set(texts[0]) & set(texts[1]))
    assert len(common) == len(rows[0]) == 200
    found = {difference.name: difference for difference in differences(first, second, rows)}
    for name, count in {"characters": len, "hedge": lambda text: text.count("seems")}.items():
        a, b = (np.array([count(of[image]) for image in common]) for of in texts)
        of = found[name]
        assert (of.first, of.second) == pytest.approx((a.mean(), b.mean()))
        assert of.difference == pytest.approx((b - a).mean())
        assert of.half_width == pytest.approx(1.96 * scipy.stats.sem(b - a))
        assert (of.more, of.fewer) == ((b > a).mean(), (b < a).mean())


def test_sets_without_common_images_are_an_error(
    tmp_path: pathlib.Path, two_sets: tuple[pathlib.Path, pathlib.Path], image_root: pathlib.Path
) -> None:
    other = write_lines(tmp_path / "x.jsonl", [{"image": "images/coco/0.png", "caption": "One."}])
    with pytest.raises(ValueError, match=r"no image in common.*relative to the same folder"):
        make_report([measure([two_sets[0]]), measure([other])], image_root)


def test_samples_of_both_sets_are_of_the_same_images(
    two_sets: tuple[pathlib.Path, pathlib.Path], image_root: pathlib.Path
) -> None:
    report = make_report([measure([file]) for file in two_sets], image_root)
    assert report.common == 10 and len(report.shown) == 10
    assert all(one.image == two.image for one, two in report.shown)
    assert {one.image.split("/")[0] for one, _ in report.shown} == {"coco", "sam"}
    # Both samples are cut to the same number of words.
    assert len({words.tokens for words in report.languages}) == 1
    found = numbers(report)
    assert found["common_images"] == 10 and found["sets"][0]["images"] == 12
    assert found["sets"][1]["states_finished"] == 10
