"""Routing by folder, the three parts of a prompt, and a user's own."""

import hashlib
import json
import pathlib

import pytest

from sg4v_jax.caption.collect.prompts import (
    CLOSER,
    OPENER,
    QUESTIONS,
    ROUTES,
    SOURCES,
    Prompts,
    load_prompts,
    question_for,
)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("coco/train2017/000000000009.jpg", "coco"),
        ("./coco/train2017/000000000009.jpg", "coco"),
        ("llava/llava_pretrain/images/00000/000000010.jpg", "lcs"),
        ("sam/images/sa_545504.jpg", "sam"),
        ("share_textvqa/images/a.jpg", "text"),
        ("web-celebrity/images/a.jpg", "celebrity"),
        ("web-landmark/images/a.jpg", "landmark"),
        ("wikiart/images/a.jpg", "wikiart"),
        ("cocoa/a.jpg", "web"),
        ("coco", "web"),
        ("a.jpg", "web"),
    ],
)
def test_routes(path: str, source: str) -> None:
    assert Prompts().source(path) == source


def test_every_prompt_has_its_three_parts() -> None:
    prompts = Prompts()
    assert set(ROUTES.values()) == set(SOURCES)
    for source, part in SOURCES.items():
        assert prompts.text(source) == f"{OPENER}\n{part}\n{CLOSER}"
    assert len({SOURCES[name] for name in ("coco", "text", "celebrity", "landmark", "wikiart")}) == 5


def test_a_users_files_go_over_ours(tmp_path: pathlib.Path) -> None:
    own, source_map = tmp_path / "prompts.json", tmp_path / "map.json"
    own.write_text(json.dumps({"closer": "", "sources": {"birds": "Which bird?"}, "prose": False}))
    source_map.write_text(json.dumps({"coco/train2017/": "birds", "": "landmark"}))
    prompts = load_prompts(own, source_map)
    assert prompts.text(prompts.source("coco/train2017/a.jpg")) == f"{OPENER}\nWhich bird?"
    assert prompts.source("coco/val2017/a.jpg") == "coco"
    assert prompts.source("a.jpg") == "landmark"
    assert not prompts.prose
    assert load_prompts(None, None) == Prompts()


@pytest.mark.parametrize(
    ("prompts", "source_map", "message"),
    [
        ({"opener": 1}, {}, "'opener' must be of type str"),
        ({"header": ""}, {}, "key 'header' is not one of opener, closer, sources, prose"),
        ({"sources": {"a": ""}}, {}, "'a' must be a text"),
        ([], {}, "expected a JSON object"),
        ({}, {"x": "birds"}, "'x' is mapped to source 'birds', which is not one of coco,"),
        ({}, {"x": 1}, "'x' must be a text"),
    ],
)
def test_errors_name_file_and_key(
    prompts: object, source_map: object, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "map.json").write_text(json.dumps(source_map))
    with pytest.raises(ValueError, match=r"(prompts|map)\.json: ") as error:
        load_prompts(tmp_path / "prompts.json", tmp_path / "map.json")
    assert message in str(error.value)


def test_questions_vary_by_image_and_stay() -> None:
    shas = [hashlib.sha256(bytes([number])).hexdigest() for number in range(64)]
    assert {question_for(sha) for sha in shas} == set(QUESTIONS)
    assert [question_for(sha) for sha in shas] == [question_for(sha) for sha in shas]
