"""Scores: the truth gets 1, a blind captioner gets little, and garbage gets nothing."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sg4v_jax.world import (
    Fact,
    Scene,
    Thing,
    answer_accuracy,
    attribute_f1,
    blind_f1,
    brief,
    dense,
    facts,
    parse,
    sample_scene,
)
from sg4v_jax.world.score import ATTRIBUTES

SCENES = [sample_scene(seed) for seed in range(2000)]
EXAMPLE = Scene(
    "navy",
    "checkered",
    (Thing("ring", "red", "large", "striped", 1, 0), Thing("pole", "blue", "small", "plain", 0, 1)),
)
VOCABULARY = sorted({word for scene in SCENES[:300] for word in dense(scene).split()})


def test_the_facts_of_a_scene():
    assert facts(EXAMPLE) == {
        Fact("scene", "background", "navy"),
        Fact("scene", "pattern", "checkered"),
        Fact("top right", "position", "top right"),
        Fact("top right", "shape", "ring"),
        Fact("top right", "color", "red"),
        Fact("top right", "size", "large"),
        Fact("top right", "texture", "striped"),
        Fact("bottom left", "position", "bottom left"),
        Fact("bottom left", "shape", "pole"),
        Fact("bottom left", "color", "blue"),
        Fact("bottom left", "size", "small"),
        Fact("bottom left", "texture", "plain"),
        Fact("pole", "relation", "below and to the left of the ring"),
    }


def test_dense_captions_say_exactly_the_facts():
    for scene in SCENES:
        assert parse(dense(scene)) == facts(scene)


def test_brief_captions_name_no_place_and_so_state_the_background_alone():
    for scene in SCENES:
        assert parse(brief(scene)) == {Fact("scene", "background", scene.background)} < facts(scene)


def test_case_spacing_and_the_order_of_adjectives_do_not_matter():
    assert parse("THE  background\nis GRAY and plain") == parse("The background is gray and plain.")
    assert parse("at the top left is a red large plain ring") == parse(
        "At the top left is a large plain red ring."
    )


def test_a_relation_may_be_told_from_either_side():
    assert parse("The ring is above and to the right of the pole.") == parse(
        "The pole is below and to the left of the ring."
    )


def test_what_is_broken_off_is_not_made_up():
    assert parse("At the top left is a large striped red ring and") == {
        Fact("top left", "position", "top left"),
        Fact("top left", "shape", "ring"),
        Fact("top left", "size", "large"),
        Fact("top left", "texture", "striped"),
        Fact("top left", "color", "red"),
    }
    assert parse("At the top left is a large striped red") == frozenset()
    assert parse("The background is") == parse("") == frozenset()
    assert parse("rings, polestar and predefined redness") == frozenset()


def test_what_has_no_place_states_nothing_of_the_things():
    assert parse("A large red ring on a gray background.") == {Fact("scene", "background", "gray")}


@settings(database=None, deadline=None)
@given(st.text())
def test_any_text_can_be_parsed(text):
    parse(text)


@settings(database=None, deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=60))
def test_any_salad_of_the_vocabulary_can_be_parsed(words):
    for fact in parse(" ".join(words)):
        assert fact.attribute in ATTRIBUTES


def test_the_truth_scores_one():
    report = attribute_f1([dense(scene) for scene in SCENES[:200]], SCENES[:200])
    assert report.f1 == 1.0
    assert set(report.per_attribute) == set(ATTRIBUTES)
    assert all(score.f1 == 1.0 for score in report.per_attribute.values())


def test_brief_captions_are_precise_but_miss_most():
    report = attribute_f1([brief(scene) for scene in SCENES[:200]], SCENES[:200])
    assert report.overall.precision == 1.0
    assert report.overall.recall < 0.2
    assert report.per_attribute["background"].f1 == 1.0
    assert not any(report.per_attribute[name].stated for name in set(ATTRIBUTES) - {"background"})


def test_a_wrong_word_costs_precision_and_recall():
    report = attribute_f1([dense(EXAMPLE).replace(" red ", " green ")], [EXAMPLE])
    color = report.per_attribute["color"]
    assert (color.hits, color.stated, color.true) == (1, 2, 2)
    assert report.overall.precision == report.overall.recall == report.f1 == 12 / 13


def test_two_readings_of_one_thing_cost_precision():
    report = attribute_f1([dense(EXAMPLE) + " At the top right is a green ring."], [EXAMPLE])
    assert report.overall.recall == 1.0
    assert report.overall.precision == 13 / 14


def test_silence_scores_nothing():
    report = attribute_f1([""], [EXAMPLE])
    assert report.f1 == report.overall.precision == report.overall.recall == 0.0
    assert "overall" in report.table() and "position" in report.table()


def test_blind_captioners_score_far_below_one():
    captions = [dense(scene) for scene in SCENES]
    blind = blind_f1(captions[500:], captions[:500], SCENES[:500])
    assert 0.05 < blind.deranged.f1 < 0.3
    assert 0.05 < blind.constant.f1 < 0.3
    assert blind.f1 == max(blind.deranged.f1, blind.constant.f1)
    assert blind.caption in captions[500:]
    assert blind.winner in blind.table()


def test_the_deranged_baseline_is_the_mean_over_all_shifts():
    scenes = SCENES[:7]
    captions = [dense(scene).replace(" red ", " blue ") for scene in scenes]
    shifted = [attribute_f1(captions[by:] + captions[:by], scenes).f1 for by in range(1, len(scenes))]
    blind = blind_f1(captions, captions, scenes)
    assert blind.deranged.f1 == pytest.approx(sum(shifted) / len(shifted))


def test_the_constant_baseline_is_the_best_caption_for_all():
    scenes = SCENES[:20]
    captions = [dense(scene) for scene in SCENES[100:160]]
    best = max(attribute_f1([caption] * len(scenes), scenes).f1 for caption in captions)
    blind = blind_f1(captions, [dense(scene) for scene in scenes], scenes)
    assert blind.constant.f1 == pytest.approx(best)
    few = blind_f1(captions, [dense(scene) for scene in scenes], scenes, sample=5)
    assert few.constant.f1 <= blind.constant.f1


def test_looking_beats_every_blind_captioner_on_every_attribute():
    captions = [dense(scene) for scene in SCENES[:300]]
    blind = blind_f1(captions, captions, SCENES[:300])
    for attribute, baseline in itertools.product(ATTRIBUTES, (blind.deranged, blind.constant)):
        assert baseline.per_attribute[attribute].f1 < 0.6


def test_scores_need_matching_lengths():
    with pytest.raises(ValueError, match="1 given for 2"):
        attribute_f1([""], SCENES[:2])
    with pytest.raises(ValueError, match="at least one"):
        attribute_f1([], [])
    with pytest.raises(ValueError, match="two scenes"):
        blind_f1(["a"], ["a"], SCENES[:1])
    with pytest.raises(ValueError, match="0 given for 1"):
        answer_accuracy([], ["yes"])


def test_answers_match_up_to_case_spaces_and_a_period():
    report = answer_accuracy(
        [" Yes. ", "no", "top left", "left top"],
        ["yes", "yes", "Top left", "top left"],
        ["relation", "relation", "position", "position"],
    )
    assert report.overall == 0.5
    assert report.per_category == {"relation": 0.5, "position": 0.5}
    assert "overall" in report.table()
    assert answer_accuracy(["2"], ["2"]).per_category == {}
