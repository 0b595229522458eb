"""Captions, questions and answers that are known exactly, because the scene is."""

from __future__ import annotations

from typing import NamedTuple

from sg4v_jax.world.scene import COLORS, SHAPES, Dice, Scene, Thing

# The suffix that LLaVA's short-answer data and benchmarks carry inside the question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
CATEGORIES = (
    *("color", "size", "texture", "position"),
    *("count", "existence", "relation", "background"),
)


class QA(NamedTuple):
    """A question, its only right answer, and which of `CATEGORIES` it belongs to."""

    question: str
    answer: str
    category: str


def brief(scene: Scene) -> str:
    """Describes a scene as short captions do: sizes, colours and shapes in one sentence.

    Args:
      scene: The scene.

    Returns:
      For example "A large red circle and a small blue bar on a gray background."
    """
    things = [f"a {thing.size} {thing.color} {thing.shape}" for thing in scene.things]
    listed = " and ".join(part for part in (", ".join(things[:-1]), things[-1]) if part)
    return f"{listed[0].upper()}{listed[1:]} on a {scene.background} background."


def dense(scene: Scene) -> str:
    """Describes everything in a scene, in one regular grammar.

    One sentence per thing in reading order, then one per relation between consecutive
    things, then one about the background. A sentence says where before it says what: a model
    that writes from left to right then knows where to look.

    Args:
      scene: The scene.

    Returns:
      A paragraph of 16 to 56 words; `score.parse` recovers every fact of the scene from it.
    """
    sentences = [
        f"At the {thing.position} is a {thing.size} {thing.texture} {thing.color} {thing.shape}."
        for thing in scene.things
    ]
    for first, second in zip(scene.things, scene.things[1:], strict=False):
        sentences.append(f"The {second.shape} is {relation(second, first)} the {first.shape}.")
    sentences.append(f"The background is {scene.background} and {scene.pattern}.")
    return " ".join(sentences)


def relation(subject: Thing, other: Thing) -> str:
    """Names where one thing is, seen from another.

    Args:
      subject: The thing whose place is asked.
      other: The thing it is compared with; in another cell.

    Returns:
      One of `RELATIONS`, for example "below and to the left of".

    Raises:
      ValueError: Both things are in the same cell.
    """
    vertical = {-1: "above", 0: "", 1: "below"}[_sign(subject.row - other.row)]
    horizontal = {-1: "to the left of", 0: "", 1: "to the right of"}[_sign(subject.column - other.column)]
    if not vertical and not horizontal:
        raise ValueError(f"the {subject.shape} and the {other.shape} are in the same cell")
    return " and ".join(part for part in (vertical, horizontal) if part)


# Every relation that `relation` can name, each next to its converse.
RELATIONS: dict[str, str] = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above and to the left of": "below and to the right of",
    "above and to the right of": "below and to the left of",
    "below and to the left of": "above and to the right of",
    "below and to the right of": "above and to the left of",
}


def questions(scene: Scene, seed: int) -> list[QA]:
    """Asks one short-answer question of every category that the scene allows.

    Yes and no are equally likely, whatever the scene holds, so that a model that cannot see
    gains nothing from the wording.

    Args:
      scene: The scene.
      seed: A non-negative integer; decides what is asked about.

    Returns:
      Seven or eight questions in random order (a single thing has no relation). Each question
      ends with `SHORT_ANSWER`.
    """
    # The scene takes part, so that one seed for all scenes doesn't give all the same answers.
    dice = Dice(seed, scene.fingerprint())
    asked = [_attribute(scene, dice, name) for name in ("color", "size", "texture", "position")]
    asked.append(QA("How many shapes are there?", str(len(scene.things)), "count"))
    asked.append(_existence(scene, dice))
    if len(scene.things) > 1:
        asked.append(_relation(scene, dice))
    if dice.flip():
        asked.append(QA("What color is the background?", scene.background, "background"))
    else:
        asked.append(QA("What is the pattern of the background?", scene.pattern, "background"))
    return [
        QA(question + SHORT_ANSWER, answer, category)
        for question, answer, category in dice.sample(asked, len(asked))
    ]


def _attribute(scene: Scene, dice: Dice, name: str) -> QA:
    thing = dice.pick(scene.things)
    wording = "Where is the {}?" if name == "position" else f"What {name} is the {{}}?"
    return QA(wording.format(thing.shape), getattr(thing, name), name)


def _existence(scene: Scene, dice: Dice) -> QA:
    """Asks for a shape alone, or for a coloured shape whose shape may be there all the same."""
    present = dice.flip()
    thing = dice.pick(scene.things)
    if dice.flip():
        noun = thing.shape
        if not present:
            noun = dice.pick(sorted(set(SHAPES) - {other.shape for other in scene.things}))
    else:
        color = thing.color
        if not present:
            color = dice.pick([other for other in COLORS if other != color])
        noun = f"{color} {thing.shape}"
    article = "an" if noun.startswith("orange") else "a"
    return QA(f"Is there {article} {noun} in the image?", "yes" if present else "no", "existence")


def _relation(scene: Scene, dice: Dice) -> QA:
    """Asks about one axis on which two things differ, so that exactly one answer is right."""
    subject, other = dice.sample(scene.things, 2)
    asked = dice.pick(relation(subject, other).split(" and "))
    holds = dice.flip()
    if not holds:
        asked = RELATIONS[asked]
    question = f"Is the {subject.shape} {asked} the {other.shape}?"
    return QA(question, "yes" if holds else "no", "relation")


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
