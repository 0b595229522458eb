"""A small drawn world whose captions and answers are known exactly; the demo's dataset."""

from sg4v_jax.world.dataset import CAPTION_QUESTIONS, WorldFiles, write_world
from sg4v_jax.world.describe import QA, SHORT_ANSWER, brief, dense, questions
from sg4v_jax.world.photos import Photo, load_photos
from sg4v_jax.world.render import boxes, render
from sg4v_jax.world.scene import Scene, Thing, sample_scene
from sg4v_jax.world.score import (
    AccuracyReport,
    BlindReport,
    F1Report,
    Fact,
    Score,
    answer_accuracy,
    attribute_f1,
    blind_f1,
    facts,
    parse,
)

__all__ = [
    "CAPTION_QUESTIONS",
    "QA",
    "SHORT_ANSWER",
    "AccuracyReport",
    "BlindReport",
    "F1Report",
    "Fact",
    "Photo",
    "Scene",
    "Score",
    "Thing",
    "WorldFiles",
    "answer_accuracy",
    "attribute_f1",
    "blind_f1",
    "boxes",
    "brief",
    "dense",
    "facts",
    "load_photos",
    "parse",
    "questions",
    "render",
    "sample_scene",
    "write_world",
]
