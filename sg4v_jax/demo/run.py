"""The project's main job in small: every stage of the loop on the embedded world, in one call.

There are no pre-trained weights to start from, so the captioner learns from random ones, and its
weights stand in for CLIP, Vicuna and LLaVA-1.5's projector where pre-training starts. The rest is the
paper: a captioner learns from dense captions, re-captions images that had none, and what is
pre-trained on its captions is tuned to answer questions.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tqdm

from sg4v_jax import config as config_lib
from sg4v_jax.caption.corpus.inputs import open_corpus
from sg4v_jax.caption.corpus.job import Settings, describe_model, prompt_for
from sg4v_jax.caption.corpus.run import caption_corpus
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.convert.load import load_model, save_model
from sg4v_jax.data import build
from sg4v_jax.data.conversation import training_texts
from sg4v_jax.data.records import Turn
from sg4v_jax.data.tokenizer import train_tokenizer
from sg4v_jax.demo.report import Report, write_report
from sg4v_jax.evaluate.answers import answer_questions, read_jsonl
from sg4v_jax.evaluate.exact import score_file
from sg4v_jax.infer.engine import Engine
from sg4v_jax.infer.request import Completion, Prompt, Request
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.models.sharegpt4v import resplit_vision
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.train import metrics
from sg4v_jax.train.loop import train
from sg4v_jax.world import WorldFiles, attribute_f1, blind_f1, write_world

CAPTION_TOKENS, ANSWER_TOKENS = 100, 8
BATCH = 64
# Positions of a slot: the longest photograph's caption fits.
CAPACITY = 384


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
      train_scenes, heldout_scenes: images drawn.
      dense_share: part of the training images that come with a dense caption; the rest is the
        corpus that the captioner captions.
      steps: optimizer steps of each training stage.
    """

    train_scenes: int = 9000
    dense_share: float = 0.87
    heldout_scenes: int = 64
    steps: tuple[tuple[str, int], ...] = (("captioner", 1500), ("pretrain", 200), ("finetune", 600))

    def scaled(self, scenes: int, factor: float) -> "Plan":
        """With another number of scenes (0: the same) and all steps times `factor`."""
        steps = tuple((name, max(1, round(count * factor))) for name, count in self.steps)
        return dataclasses.replace(self, train_scenes=scenes or self.train_scenes, steps=steps)


class Demo:
    """The stages, in order, with their files below one directory."""

    def __init__(self, workdir: str | os.PathLike[str], plan: Plan, seed: int):
        self.workdir, self.plan, self.seed = pathlib.Path(workdir), plan, seed
        self.steps = dict(plan.steps)
        self.world = WorldFiles.below(self.workdir / "world")
        self.tokenizer = self.workdir / "tokenizer.model"
        self.times: dict[str, float] = {}

    def run(self) -> Report:
        """All stages, then the report. What an earlier run finished is not done again."""
        with self._stage("draw the world and build its datasets"):
            self._build_data()
        with self._stage("train the captioner on dense captions"):
            self._train("captioner", "dense", start="")
        with self._stage("re-caption the images that have none"):
            self._recaption()
        with self._stage("pre-train on the captioner's captions"):
            self._train("pretrain", "recaptioned", start=self._run_dir("captioner"))
        with self._stage("tune on instructions (SFT)"):
            self._train("finetune", "sft", start=self._run_dir("pretrain"))
        with self._stage("caption and answer on held-out images, score"):
            report = self._evaluate()
        with self._stage("export to Hugging Face LLaVA, reload, compare"):
            report.reload_equal = self._export()
        report.times = dict(self.times)
        write_report(self.workdir, report)
        return report

    # --- Data ------------------------------------------------------------------------------------

    def _build_data(self) -> None:
        if not (self.workdir / "world.done").exists():
            write_world(
                self.workdir / "world",
                train_scenes=self.plan.train_scenes,
                dense_share=self.plan.dense_share,
                heldout_scenes=self.plan.heldout_scenes,
                seed=self.seed,
                progress=_bar("drawing", "images"),
            )
            (self.workdir / "world.done").touch()
        files = {"dense": self.world.cap_dense, "sft": self.world.sft_mix}
        if not self.tokenizer.exists():
            vocab_size = config_lib.load("configs/captioner.py:tiny").model.text.vocab_size
            train_tokenizer(training_texts(files.values()), self.tokenizer, vocab_size)
        for name, json_file in files.items():
            self._build_dataset(name, json_file)

    def _build_dataset(self, name: str, json_file: pathlib.Path) -> None:
        build.build(
            name,
            json_file,
            self.world.image_root,
            self.workdir / "datasets",
            progress=_bar(f"building {name}", "records"),
        )

    def _recaption(self) -> None:
        captioner = self._engine("captioner")
        settings = Settings(SamplingOptions(max_new_tokens=CAPTION_TOKENS))
        corpus = open_corpus(self.world.images_to_caption, self.world.image_root)
        prompt, _ = prompt_for(settings, captioner.bundle.prompt)
        bar = _bar("captioning", "images")(range(len(corpus)))
        with bar:
            summary = caption_corpus(
                captioner,
                corpus,
                self.workdir / "captions",
                settings,
                prompt=prompt,
                model=describe_model(captioner.bundle, dtype="float32"),
                show=lambda progress: bar.update(progress.done - bar.n),
            )
        self._build_dataset("recaptioned", summary.records)

    # --- Training --------------------------------------------------------------------------------

    def _train(self, stage: str, dataset: str, start: str) -> None:
        config = config_lib.load(f"configs/{stage}.py:tiny")
        (source,) = config.data.sources.keys()
        directory = self.workdir / "datasets" / "llava" / dataset / "1.0.0"
        config.update_from_flattened_dict(
            {
                "seed": self.seed,
                "data.tokenizer": os.fspath(self.tokenizer),
                f"data.sources.{source}.directory": os.fspath(directory),
                "train.num_steps": self.steps[stage],
                **{f"init.{part}": start for part in ("vision", "projector", "text")},
            }
        )
        train(config, self._run_dir(stage))

    def _run_dir(self, stage: str) -> str:
        return os.fspath(self.workdir / "runs" / stage)

    def _engine(self, stage: str) -> Engine:
        return _engine(load_model(self._run_dir(stage)))

    # --- Evaluation ------------------------------------------------------------------------------

    def _evaluate(self) -> Report:
        heldout = self.world.read_heldout()
        names, scenes = [name for name, _ in heldout], [scene for _, scene in heldout]
        captions = {stage: self._captions(stage, names) for stage in ("captioner", "pretrain")}
        dense = json.loads(self.world.cap_dense.read_text())
        training = [record["conversations"][1]["value"] for record in dense]
        answers = self.workdir / "answers.jsonl"
        questions = read_jsonl(self.world.heldout_questions, ("question_id", "text"))
        answer_questions(
            self._engine("finetune"),
            questions,
            self.world.image_root,
            answers,
            options=SamplingOptions(max_new_tokens=ANSWER_TOKENS),
            model_id="finetune",
            progress=_bar("answering", "answers"),
        )
        truth = read_jsonl(self.world.heldout_answers, ("question_id", "answer"))
        return Report(
            images=[(self.world.image_root / name).read_bytes() for name in names],
            scenes=scenes,
            captions=captions,
            f1={stage: attribute_f1(texts, scenes) for stage, texts in captions.items()},
            blind=blind_f1(training, captions["captioner"], scenes),
            accuracy=score_file(answers, self.world.heldout_answers),
            majority=_majority_accuracy(truth),
            questions=_join_answers(questions, answers, truth),
            curves={
                stage: metrics.read(pathlib.Path(self._run_dir(stage)) / metrics.FILE_NAME)
                for stage in self.steps
            },
            photos=self._photos(),
        )

    def _captions(self, stage: str, names: list[str]) -> list[str]:
        engine = self._engine(stage)
        prompt = engine.bundle.prompt or "Describe the image."
        prompts = [
            Prompt((Turn("human", f"<image>\n{prompt}"),), ((self.world.image_root / name).read_bytes(),))
            for name in names
        ]
        completions = _complete(engine, prompts, SamplingOptions(max_new_tokens=CAPTION_TOKENS))
        return [completion.text for completion in completions]

    def _photos(self) -> list[tuple[bytes, str]]:
        """The training photographs with the captioner's captions: learned by heart, and labelled so."""
        paths = sorted((self.world.image_root / "photos").glob("*.jpg"))
        engine = self._engine("captioner")
        turns = (Turn("human", f"<image>\n{engine.bundle.prompt}"),)
        prompts = [Prompt(turns, (path.read_bytes(),)) for path in paths]
        completions = _complete(engine, prompts, SamplingOptions(max_new_tokens=256))
        return [(p.images[0], c.text) for p, c in zip(prompts, completions, strict=True)]

    # --- Export ----------------------------------------------------------------------------------

    def _export(self) -> bool:
        """Writes the tuned model as HF LLaVA, loads it back and compares every parameter."""
        exported = self.workdir / "llava-hf"
        bundle = load_model(self._run_dir("finetune"))
        save_model(bundle, exported, layout="hf", dtype="float32", overwrite=True)
        reloaded = _engine(load_model(exported))
        original = _engine(bundle)
        line = read_jsonl(self.world.heldout_questions, ("question_id", "text"))[0]
        image = (self.world.image_root / line["image"]).read_bytes()
        prompt = Prompt((Turn("human", f"<image>\n{line['text']}"),), (image,))
        options = SamplingOptions(max_new_tokens=ANSWER_TOKENS)
        same_answer = _complete(reloaded, [prompt], options) == _complete(original, [prompt], options)
        return same_answer and _equal(bundle.params, reloaded.bundle.params)

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        number = len(self.times) + 1
        print(f"\n[{number}/7] {title}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.times[title] = time.perf_counter() - start
        print(f"      {self.times[title]:.0f} s", file=sys.stderr, flush=True)


def run_demo(
    workdir: str | os.PathLike[str], *, train_scenes: int = 0, step_factor: float = 1.0, seed: int = 0
) -> Report:
    """Runs the whole loop and writes `report.html`.

    Args:
      workdir: where everything goes; a second call resumes what the first left.
      train_scenes: images to draw; 0: as many as it needs to learn.
      step_factor: factor on all numbers of steps.
      seed: decides everything.
    """
    return Demo(workdir, Plan().scaled(train_scenes, step_factor), seed).run()


def _engine(bundle: ModelBundle) -> Engine:
    return Engine(bundle, make_mesh(), "float32", slots=BATCH, capacity=CAPACITY, prefill_rows=BATCH // 4)


def _complete(engine: Engine, prompts: list[Prompt], options: SamplingOptions) -> list[Completion]:
    """Completions in the order of the prompts."""
    requests = [Request(i, prompt, options) for i, prompt in enumerate(prompts)]
    results = {result.key: result for result in engine.complete(requests)}
    errors = [result.error for result in results.values() if result.error]
    if errors:
        raise ValueError(errors[0])
    return [results[i].completion for i in range(len(prompts))]  # type: ignore[misc]


def _majority_accuracy(truth: list[dict[str, Any]]) -> float:
    """Accuracy of always giving a category's most frequent answer: what a blind model can reach."""
    by_category: dict[str, list[str]] = {}
    for line in truth:
        by_category.setdefault(line["category"], []).append(line["answer"])
    hits = sum(max(map(answers.count, answers)) for answers in by_category.values())
    return hits / len(truth)


def _join_answers(
    questions: list[dict[str, Any]], answers: pathlib.Path, truth: list[dict[str, Any]]
) -> list[dict[str, str]]:
    given = {line["question_id"]: line["text"] for line in read_jsonl(answers, ("question_id", "text"))}
    right = {line["question_id"]: line["answer"] for line in truth}
    return [
        {
            "image": line["image"],
            "question": line["text"].split("\n")[0],
            "answer": given[line["question_id"]],
            "truth": right[line["question_id"]],
        }
        for line in questions
    ]


def _equal(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two models' parameters are the same to the bit, however their vision blocks are split."""
    same = jax.tree.map(np.array_equal, resplit_vision(ours, 0), resplit_vision(theirs, 0))
    return all(jax.tree.leaves(same))


def _bar(description: str, unit: str) -> Callable[[Any], Any]:
    return lambda items: tqdm.tqdm(items, desc=f"      {description}", unit=f" {unit}", leave=False)
