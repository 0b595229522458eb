"""A report of a run that never was: true captions, some of them spoiled."""

import io
import math
import random

from sg4v_jax.demo.report import Report
from sg4v_jax.world import (
    Scene,
    answer_accuracy,
    attribute_f1,
    blind_f1,
    dense,
    load_photos,
    questions,
    render,
    sample_scene,
)

STAGES = ("captioner", "pretrain", "finetune")
TIMES = {
    "draw the world and build its datasets": 21.4,
    "train the captioner on dense captions": 288.7,
    "re-caption the images that have none": 71.9,
    "pre-train on the captioner's captions": 127.3,
    "tune on instructions (SFT)": 240.1,
    "caption and answer on held-out images, score": 14.2,
    "export to Hugging Face LLaVA, reload, compare": 6.3,
}


def spoiled(caption: str, dice: random.Random, share: float) -> str:
    """A caption in which that share of the colours, sizes and textures is another one."""
    groups = (("red", "green", "blue", "purple"), ("small", "large"), ("striped", "dotted"))
    words = caption.split(" ")
    for index, word in enumerate(words):
        for group in groups:
            if word in group and dice.random() < share:
                words[index] = dice.choice([other for other in group if other != word])
    return " ".join(words)


def fake_report(count: int = 8) -> Report:
    """A report of `count` held-out scenes; the same every time."""
    dice = random.Random(0)
    scenes = [sample_scene(seed) for seed in range(count)]
    captions = {
        "captioner": [spoiled(dense(scene), dice, 0.12) for scene in scenes],
        "pretrain": [spoiled(dense(scene), dice, 0.2) for scene in scenes],
    }
    asked = [(i, qa) for i, scene in enumerate(scenes) for qa in questions(scene, i)]
    given = [qa.answer if dice.random() < 0.9 else "no" for _, qa in asked]
    return Report(
        images=[_png(scene) for scene in scenes],
        scenes=scenes,
        captions=captions,
        f1={stage: attribute_f1(texts, scenes) for stage, texts in captions.items()},
        blind=blind_f1([dense(sample_scene(1000 + i)) for i in range(20)], captions["captioner"], scenes),
        accuracy=answer_accuracy(given, [qa.answer for _, qa in asked], [qa.category for _, qa in asked]),
        majority=0.4375,
        questions=[
            {
                "image": f"world/heldout/{i:06d}.png",
                "question": qa.question.split("\n")[0],
                "answer": answer,
                "truth": qa.answer,
            }
            for (i, qa), answer in zip(asked, given, strict=True)
        ],
        curves={stage: _curve(dice, 70 if stage != "pretrain" else 30) for stage in STAGES},
        photos=[(p.encoded, p.caption if i else "A man in a suit.") for i, p in enumerate(load_photos())],
        reload_equal=True,
        times=dict(TIMES),
    )


def _curve(dice: random.Random, count: int) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * i + 9,
            "loss": 6.1 * math.exp(-i / 12) * dice.uniform(0.8, 1.2) + 0.07 * dice.uniform(0.7, 1.3),
            "accuracy": 1 - math.exp(-i / 10),
            "learning_rate": 2e-3,
        }
        for i in range(count)
    ]


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return buffer.getvalue()
