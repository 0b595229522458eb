"""Each benchmark's official files in miniature, and an engine that answers without a model."""

import base64
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import Image

from sg4v_jax.infer.request import Completion, Request, Result, ScoreRequest, ScoreResult
from sg4v_jax.world import write_world

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: pathlib.Path, content: Any) -> None:
    """Bytes as they are, lists into .jsonl one to a line, everything else as JSON or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))


def mme(root: pathlib.Path) -> None:
    release = root / "MME/MME_Benchmark_release_version"
    ask = "Is there a {} in this image? Please answer yes or no."
    for category, nested in (("existence", ""), ("artwork", "questions_answers_YN/"), ("code_reasoning", "")):
        for name in ("a", "b"):
            images = "images/" if nested else ""
            write(release / category / f"{images}{name}.png", png())
            text = f"{ask.format('dog')}\tYes\n{ask.format('cat')}\tNo\n"
            write(release / category / f"{nested}{name}.txt", text)


def pope(root: pathlib.Path) -> None:
    write(root / "pope/val2014/i.jpg", png())
    for category in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": i + 1,
                "image": "i.jpg",
                "text": f"Is there a {noun} in the image?",
                "label": label,
            }
            for i, (noun, label) in enumerate((("dog", "yes"), ("cat", "no"), ("cup", "yes"), ("car", "no")))
        ]
        write(root / f"pope/coco/coco_pope_{category}.json", lines)


def mmbench(root: pathlib.Path, name: str = "mmbench/mmbench_dev_20230712.tsv") -> None:
    """The dev split, or by the name of its file the test split, which has no answers."""
    image = base64.b64encode(png()).decode()
    columns = "index,question,hint,A,B,C,D,answer,category,image,source,l2-category,comment,split"
    options = ["a cat", 'a "red" dog', "two", "None"]
    rows = []
    for number in (7, 8):
        for turn in range(3):
            turned = [*options[turn:3], *options[:turn], options[3]]
            answer = "ABC"[turned.index('a "red" dog')]
            values = [turn * 1_000_000 + number, "What is\tthis?", "A hint." if number == 7 else "", *turned]
            # Rotations share their row's image by its index in the newer files.
            cell = image if turn == 0 or number == 7 else str(number)
            rows.append([*values, answer, f"kind {number}", cell, "web", "coarse", "", "dev"])
    quote = lambda cell: '"' + str(cell).replace('"', '""') + '"' if cell != "" else ""  # noqa: E731
    table = [columns.split(","), *rows]
    if "test" in name:
        table = [
            [cell for cell, column in zip(r, table[0], strict=True) if column != "answer"] for r in table
        ]
    text = "\n".join("\t".join(map(quote, row)) for row in table) + "\n"
    write(root / name, text)


def mmstar(root: pathlib.Path) -> None:
    image = base64.b64encode(png()).decode()
    rows = ["index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tl2_category\timage"]
    rows += [f"{i}\tWhat?\tcat\tdog\tcup\tcar\t{'AB'[i % 2]}\tmath\tgeometry\t{image}" for i in range(4)]
    write(root / "mmstar/MMStar.tsv", "\n".join(rows) + "\n")


def seed(root: pathlib.Path) -> None:
    question = {"question": "How many?", "data_type": "image", "question_type_id": 5, "data_id": "1_2"}
    choices = {f"choice_{c}": text for c, text in zip("abcd", ("One", "Two", "Three", "Four"), strict=True)}
    lines = [{**question, **choices, "question_id": f"{i}", "answer": "ABCD"[i]} for i in range(4)]
    lines.append({**lines[0], "question_id": "v", "data_type": "video"})
    names = {"Instances Counting": 5}
    write(root / "seed_bench/SEED-Bench.json", {"questions": lines, "question_type": names})
    write(root / "seed_bench/SEED-Bench-image/1_2", png())


def mmvet(root: pathlib.Path) -> None:
    entry = {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}
    other = {"question": "What is it?", "answer": "a dog<OR>a puppy", "capability": ["rec"]}
    entry["imagename"] = other["imagename"] = "v1_0.png"
    write(root / "mm-vet/mm-vet.json", {"v1_0": entry, "v1_1": other})
    write(root / "mm-vet/images/v1_0.png", png())


def qbench(root: pathlib.Path) -> None:
    line = {
        "img_path": "1.jpg",
        "question": "How sharp is it?",
        "candidates": ["Sharp", "Blurry"],
        "concern": 0,
    }
    lines = [{**line, "correct_ans": "Blurry"}, {**line, "concern": 3, "correct_ans": "Sharp"}]
    write(root / "qbench/llvisionqa_dev.json", lines)
    write(root / "qbench/images_llvisionqa/1.jpg", png())


def scienceqa(root: pathlib.Path) -> None:
    problem = {
        "question": "Which is a fish?",
        "choices": ["cod", "owl"],
        "answer": 0,
        "hint": "",
        "image": None,
    }
    problems = {
        "4": {**problem, "subject": "natural science"},
        "9": {**problem, "image": "image.png", "hint": "Look.", "subject": "natural science"},
        "11": {**problem, "answer": 1, "subject": "language science"},
        "12": problem,
    }
    write(root / "scienceqa/problems.json", problems)
    write(root / "scienceqa/pid_splits.json", {"train": ["12"], "test": ["4", "9", "11"]})
    write(root / "scienceqa/images/test/9/image.png", png())


def vqav2(root: pathlib.Path) -> None:
    def questions(*ids: int) -> list[dict[str, Any]]:
        return [{"question_id": i, "image_id": 9, "question": "What?"} for i in ids]

    folder = root / "vqav2"
    write(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions(1, 2)})
    write(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": questions(3, 1, 2)})
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions(5, 6, 7)})
    people = [{"answer": "two dogs", "answer_id": i} for i in range(8)] + [{"answer": "2"}, {"answer": "3"}]
    entries = [{"question_id": i, "answers": people, "answer_type": "other"} for i in (5, 6)]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": entries})
    for split in ("test2015", "val2014"):
        write(folder / f"{split}/COCO_{split}_000000000009.jpg", png())


def vizwiz(root: pathlib.Path) -> None:
    line = {"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}
    write(root / "vizwiz/test.json", [line, {**line, "question": "And this?"}])
    write(root / "vizwiz/val.json", [{**line, "answers": [{"answer": "a cup"}] * 10, "answer_type": "other"}])
    for split in ("test", "val"):
        write(root / f"vizwiz/{split}/VizWiz_test_00000000.jpg", png())


def gqa(root: pathlib.Path) -> None:
    shared = {"imageId": "n1", "isBalanced": True, "groups": {"global": "color"}}
    red = {
        **{"question": "Is it red?", "answer": "yes", "entailed": ["201", "203"]},
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
        "semantic": [
            {"operation": "select", "argument": "car (1)"},
            {"operation": "verify", "argument": "red"},
        ],
    }
    color = {
        **{"question": "What color?", "answer": "light blue", "entailed": []},
        "types": {"structural": "query", "semantic": "global", "detailed": "place"},
        "semantic": [{"operation": "query", "argument": "name"}],
    }
    asked = {"201": {**shared, **red}, "202": {**shared, **color}}
    more = {**shared, **red, "question": "Is it not blue?", "isBalanced": False}
    write(root / "gqa/data/testdev_balanced_questions.json", asked)
    write(root / "gqa/data/testdev_all_questions.json", {**asked, "203": more})
    choices = {"201": ["yes", "no"], "202": ["light blue", "red"]}
    write(
        root / "gqa/data/testdev_choices.json",
        {id_: {"valid": texts, "plausible": texts[:1]} for id_, texts in choices.items()},
    )
    write(root / "gqa/images/n1.jpg", png())


def textvqa(root: pathlib.Path) -> None:
    line = {
        "question_id": 34602,
        "image_id": "ab",
        "question": "What BRAND?",
        "answers": ["nokia"] * 7 + ["n"] * 3,
    }
    lines = [line, {**line, "question_id": 34603, "question": "What year?", "answers": ["2000"] * 10}]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": lines})
    prompts = [
        {
            "question_id": "ab",
            "image": "ab.jpg",
            "text": f"what brand?\nReference OCR token: Nokia, 6{SHORT}",
        },
        {"question_id": "ab", "image": "ab.jpg", "text": f"Reference OCR token: Nokia\nWhat year?{SHORT}"},
    ]
    write(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", prompts)
    write(root / "textvqa/train_images/ab.jpg", png())


def llava_bench(root: pathlib.Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    line = {"question_id": 0, "image": "001.jpg", "text": "Describe it.", "category": "conv"}
    write(folder / "questions.jsonl", [line, {**line, "question_id": 1, "category": "detail"}])
    write(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A dog by a lake."}])
    reference = [{"question_id": i, "text": "A brown dog.", "answer_id": f"r{i}"} for i in (0, 1)]
    write(folder / "answers_gpt4.jsonl", reference)
    write(folder / "images/001.jpg", png())


def caption(root: pathlib.Path) -> None:
    images = [{"id": i, "file_name": "1.jpg"} for i in (1, 2, 3)]
    texts = {
        1: ["A red dog runs.", "The dog is red!"],
        2: ["Two cats on a mat.", "A pair of cats"],
        3: ["a car"],
    }
    people = [{"image_id": i, "caption": text} for i, found in texts.items() for text in found]
    write(root / "caption/annotations.json", {"images": images, "annotations": people})
    write(root / "caption/images/1.jpg", png())


def world(root: pathlib.Path) -> None:
    write_world(root / "world", train_scenes=2, heldout_scenes=3, seed=0, image_size=72)


WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
    "llava-bench": llava_bench,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench-cn": lambda root: mmbench(root, "mmbench/mmbench_dev_cn_20231003.tsv"),
    "mmbench-test": lambda root: mmbench(root, "mmbench/mmbench_test_20230712.tsv"),
    "mmbench-cn-test": lambda root: mmbench(root, "mmbench/mmbench_test_cn_20231003.tsv"),
    "seed": seed,
    "mmvet": mmvet,
    "qbench": qbench,
    "scienceqa": scienceqa,
    "vqav2": vqav2,
    "vqav2-val": vqav2,
    "vizwiz": vizwiz,
    "vizwiz-val": vizwiz,
    "gqa": gqa,
    "gqa-consistency": gqa,
    "textvqa": textvqa,
    "textvqa-no-ocr": textvqa,
    "pope": pope,
    "mmstar": mmstar,
    "caption": caption,
    "world": world,
}


class FakeEngine:
    """Answers by a function of the request, the last of each few first, as an engine with slots may."""

    def __init__(self, answer: Callable[[Request], str] = lambda request: "yes"):
        self._answer = answer
        self.seen: list[Request | ScoreRequest] = []

    def complete(self, requests: Iterable[Request]) -> Iterator[Result]:
        waiting: list[Result] = []
        for request in requests:
            self.seen.append(request)
            try:
                text = self._answer(request)
                waiting.append(Result(request.key, Completion(text, (1, 2), True, -1.0, "end"), ""))
            except ValueError as error:
                waiting.append(Result(request.key, None, str(error)))
            if len(waiting) == 3:
                yield from reversed(waiting)
                waiting = []
        yield from reversed(waiting)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Likes the second choice; a token is a word."""
        for request in requests:
            self.seen.append(request)
            logs = tuple(-1.0 if i == 1 else -2.0 for i in range(len(request.choices)))
            yield ScoreResult(request.key, logs, tuple(len(c.split()) for c in request.choices), "")
