"""Captions and questions, checked against the scene by other means than they are made."""

import re
from collections import Counter

import pytest

from sg4v_jax.world import SHORT_ANSWER, Scene, Thing, brief, dense, parse, questions, sample_scene
from sg4v_jax.world.describe import CATEGORIES, RELATIONS, relation
from sg4v_jax.world.scene import COLORS, SHAPES

SCENES = [sample_scene(seed) for seed in range(2000)]
EXAMPLE = Scene(
    "navy",
    "checkered",
    (Thing("ring", "red", "large", "striped", 1, 0), Thing("pole", "blue", "small", "plain", 0, 1)),
)


def test_captions_read_as_documented():
    assert brief(EXAMPLE) == "A large red ring and a small blue pole on a navy background."
    assert dense(EXAMPLE) == (
        "At the top right is a large striped red ring. At the bottom left is a small plain blue pole. "
        "The pole is below and to the left of the ring. The background is navy and checkered."
    )


def test_a_brief_caption_of_three_things_is_a_list():
    scene = next(scene for scene in SCENES if len(scene.things) == 3)
    assert re.fullmatch(r"A [\w ]+, a [\w ]+ and a [\w ]+ on a \w+ background\.", brief(scene))


def test_dense_captions_are_distinct_and_of_the_stated_length():
    assert len({dense(scene) for scene in SCENES}) == len(set(SCENES))
    lengths = [len(dense(scene).split()) for scene in SCENES]
    assert min(lengths) == 16 and max(lengths) == 56
    assert 33 < sum(lengths) / len(lengths) < 37


def test_a_relation_and_its_converse_are_both_right():
    assert all(RELATIONS[RELATIONS[phrase]] == phrase for phrase in RELATIONS)
    for scene in SCENES[:500]:
        for one in scene.things:
            for other in scene.things:
                if one is not other:
                    assert relation(other, one) == RELATIONS[relation(one, other)]


def test_relations_follow_the_grid():
    for scene in SCENES[:500]:
        for one in scene.things:
            for other in scene.things:
                if one is other:
                    continue
                phrase = relation(one, other)
                assert ("left" in phrase) == (one.column < other.column)
                assert ("right" in phrase) == (one.column > other.column)
                assert ("above" in phrase) == (one.row < other.row)
                assert ("below" in phrase) == (one.row > other.row)


def test_a_thing_has_no_relation_to_itself():
    with pytest.raises(ValueError, match="same cell"):
        relation(EXAMPLE.things[0], EXAMPLE.things[0])


def test_captions_never_contradict_themselves():
    for scene in SCENES:
        keys = [
            (fact.subject, fact.attribute, fact.value.split(" the ")[-1])
            if fact.attribute == "relation"
            else (fact.subject, fact.attribute)
            for fact in parse(dense(scene))
        ]
        assert len(keys) == len(set(keys))


def _expected(question, scene):
    """Answers a question from the scene, reading it word by word."""
    things = {thing.shape: thing for thing in scene.things}
    words = re.findall(r"\w+", question)
    named = [word for word in words if word in SHAPES]
    if words[:2] == ["How", "many"]:
        return str(len(things))
    if "background" in words:
        return scene.background if "color" in words else scene.pattern
    if words[:2] == ["Is", "there"]:
        colors = [word for word in words if word in COLORS]
        here = named[0] in things and all(things[named[0]].color == color for color in colors)
        return "yes" if here else "no"
    if words[0] == "Is":
        one, other = (things[shape] for shape in named)
        holds = {
            "left": one.column < other.column,
            "right": one.column > other.column,
            "above": one.row < other.row,
            "below": one.row > other.row,
        }
        return "yes" if holds[next(word for word in words if word in holds)] else "no"
    if words[0] == "Where":
        return things[named[0]].position
    return getattr(things[named[0]], words[1])


def test_every_answer_is_right():
    for seed, scene in enumerate(SCENES):
        for question, answer, _ in questions(scene, seed):
            assert question.endswith(SHORT_ANSWER)
            assert answer == _expected(question.removesuffix(SHORT_ANSWER), scene), question


def test_every_category_is_asked_once():
    for seed, scene in enumerate(SCENES[:500]):
        asked = Counter(category for _, _, category in questions(scene, seed))
        wanted = set(CATEGORIES) - (set() if len(scene.things) > 1 else {"relation"})
        assert asked == Counter(wanted)


@pytest.mark.parametrize("category", ["existence", "relation"])
def test_yes_and_no_are_balanced(category):
    # One seed for all the scenes must do as well as one for each.
    for seeds in (range(len(SCENES)), [7] * len(SCENES)):
        answers = [
            turn.answer
            for seed, scene in zip(seeds, SCENES, strict=True)
            for turn in questions(scene, seed)
            if turn.category == category
        ]
        assert 0.46 < answers.count("yes") / len(answers) < 0.54


def test_an_existence_question_does_not_give_its_answer_away():
    answers = {"colored": [], "bare": []}
    for seed, scene in enumerate(SCENES):
        for question, answer, category in questions(scene, seed):
            if category == "existence":
                kind = "colored" if any(color in question for color in COLORS) else "bare"
                answers[kind].append(answer)
    for given in answers.values():
        assert 0.45 < given.count("yes") / len(given) < 0.55


def test_articles_are_right():
    for seed, scene in enumerate(SCENES):
        for question, _, _ in questions(scene, seed):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question), question


def test_questions_depend_on_the_seed_alone():
    assert questions(EXAMPLE, 5) == questions(EXAMPLE, 5)
    assert len({tuple(questions(EXAMPLE, seed)) for seed in range(20)}) > 15
