"""Each benchmark from its official files to a score and a submission: prompts, truths, formats, defects."""

import hashlib
import json
import pathlib
import shutil
from typing import Any

import pytest

from sg4v_jax.evaluate.benchmark import Sample
from sg4v_jax.evaluate.registry import BENCHMARKS, get_benchmarks, load_benchmarks
from sg4v_jax.evaluate.runner import Report, run_benchmark
from sg4v_jax.evaluate.settings import Choices
from sg4v_jax.infer.request import Request
from tests.evaluate.official import LETTER, SHORT, WRITERS, FakeEngine, png, write

HERE = [name for name, found in BENCHMARKS.items() if not found.judged and not found.server]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """All benchmarks in one directory. Read only: tests share it."""
    root = tmp_path_factory.mktemp("benchmarks")
    for writer in WRITERS.values():
        writer(root)
    return root


def right(sample: Sample) -> str:
    """What scores full marks."""
    return sample.truth if isinstance(sample.truth, str) else sample.truth[0]


def run(name: str, data: pathlib.Path, output: pathlib.Path, answers: Any = None, **choices: Any) -> Report:
    loaded = BENCHMARKS[name].load(data)
    by_id = {sample.id: right(sample) for sample in loaded.samples if sample.truth is not None}
    answer = answers or (lambda request: by_id.get(request.key, "red"))
    return run_benchmark(
        BENCHMARKS[name], FakeEngine(answer), loaded, output, model="fake", choices=Choices(**choices)
    )


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_benchmark_is_tested() -> None:
    assert set(WRITERS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", HERE)
def test_right_answers_score_full_marks(name: str, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = run(name, data, tmp_path)
    headline = report.scores["metrics"][report.scores["headline"]]
    best = {"mme": 400.0, "vqav2-val": 100.0, "caption": headline["value"]}.get(name, 100.0)
    assert headline["value"] == pytest.approx(best) and headline["value"] > 0
    assert headline["low"] <= headline["value"] <= headline["high"]
    assert report.scores["without_answer"] == 0 and not report.missing
    lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
    assert len(lines) == report.settings.samples == report.asked


@pytest.mark.parametrize(
    "name", [name for name in HERE if name not in ("caption", "pope", "gqa-consistency")]
)
def test_wrong_answers_score_nothing(name: str, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = run(name, data, tmp_path, lambda request: "hm?")
    assert report.scores["metrics"][report.scores["headline"]]["value"] == 0


PROMPTS = {
    "mme": ("existence/a.png/0", f"Is there a dog in this image?{SHORT}"),
    "pope": ("popular/2", f"Is there a cat in the image?{SHORT}"),
    "mmbench": ("7", f'A hint.\nWhat is\tthis?\nA. a cat\nB. a "red" dog\nC. two{LETTER}'),
    "mmbench-cn": ("1000008", 'What is\tthis?\nA. a "red" dog\nB. two\nC. a cat\n请直接回答选项字母。'),
    "mmstar": ("0", f"What?\nA. cat\nB. dog\nC. cup\nD. car{LETTER}"),
    "seed": ("2", f"How many?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}"),
    "qbench": (
        "0",
        "How sharp is it?\nChoose between one of the options as follows:\nA. Sharp\nB. Blurry\n",
    ),
    "scienceqa": ("9", f"Context: Look.\nWhich is a fish?\nA. cod\nB. owl{LETTER}"),
    "vqav2": ("1", f"What?{SHORT}"),
    "vizwiz": (
        "1",
        f"And this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}",
    ),
    "gqa": ("202", f"What color?{SHORT}"),
    "textvqa": ("34602", f"what brand?\nReference OCR token: Nokia, 6{SHORT}"),
    "textvqa-no-ocr": ("34602", f"What BRAND?{SHORT}"),
    "mmvet": ("v1_0", "What is x?"),
    "llava-bench": ("1", "Describe it."),
    "caption": ("1", "Provide a one-sentence caption for the provided image."),
}


def system(person: str) -> str:
    return (
        f"A chat between a curious {person} and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the {person}'s questions. "
    )


@pytest.mark.parametrize(("name", "id_", "question"), [(k, *v) for k, v in PROMPTS.items()], ids=PROMPTS)
def test_prompts_are_the_published_ones(
    name: str, id_: str, question: str, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """To the letter, as the model sees them: Q-Bench has another template, and a line break at the end."""
    run(name, data, tmp_path)
    lines = {line["id"]: line for line in read_lines(tmp_path / name / "samples.jsonl")}
    assert lines[id_]["question"] == question
    person = "human" if name == "qbench" else "user"
    assert lines[id_]["prompt"] == f"{system(person)}USER: <image>\n{question} ASSISTANT:"


def test_what_is_asked_as_published(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Template, aspect and token limits of the published scripts; the prompt as seen is in the samples."""
    engine = FakeEngine()
    run_benchmark(BENCHMARKS["qbench"], engine, BENCHMARKS["qbench"].load(data), tmp_path, model="m")
    request = engine.seen[0]
    assert isinstance(request, Request)
    assert (request.prompt.template, request.prompt.aspect) == ("share4v_v1", "square")
    assert request.options.max_new_tokens == 1024 and request.options.temperature == 0
    assert request.prompt.turns[0].text.startswith("<image>\nHow sharp") and len(request.prompt.images) == 1
    line = read_lines(tmp_path / "qbench/samples.jsonl")[0]
    scores = json.loads((tmp_path / "qbench/scores.json").read_text())
    assert scores["decoding"] == "greedy" and scores["first_prompt"] == line["prompt"]
    assert {"id", "question", "answer", "parsed", "score", "truth", "image", "error", "stop"} <= line.keys()
    published = {name: (b.template, b.aspect, b.max_new_tokens) for name, b in BENCHMARKS.items()}
    assert {published[n] for n in ("vqav2", "gqa", "vizwiz", "textvqa", "pope", "mme", "seed")} == {
        ("v1", "pad", 128)
    }
    assert published["mmbench"] == published["mmbench-cn"] == ("v1", "pad", 1024)
    assert {published[n] for n in ("llava-bench", "mmvet", "scienceqa")} == {("v1", "square", 1024)}


def test_a_text_only_question_has_no_image(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = run("scienceqa", data, tmp_path, lambda request: "A" if request.prompt.images else "B")
    assert report.scores["metrics"]["accuracy with image"]["value"] == 100
    assert report.scores["metrics"]["accuracy"]["value"] == pytest.approx(200 / 3)


def test_what_nobody_was_asked_has_no_score(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The first question has no image, and nobody says yes."""
    scores = run("scienceqa", data, tmp_path, limit=1).scores
    assert "accuracy with image" not in scores["metrics"] and scores["metrics"]["accuracy"]["value"] == 100
    scores = run("pope", data, tmp_path, lambda request: "no").scores
    assert scores["metrics"]["precision: random"]["value"] is None
    assert "NaN" not in (tmp_path / "pope/scores.json").read_text()


def test_mmbench_needs_every_rotation(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = run("mmbench", data, tmp_path, lambda request: "B" if int(request.key) == 7 else "A")
    metrics = report.scores["metrics"]
    assert metrics["accuracy"]["value"] == 0
    assert metrics["accuracy without rotations"]["value"] == pytest.approx(50)


# --- What servers and official tools take --------------------------------------------------------


def submission(name: str, file: str, data: pathlib.Path, output: pathlib.Path, answers: Any = None) -> str:
    report = run(name, data, output, answers)
    assert report.scores["submission"] == [f"submission/{file}"] or name == "mme"
    return (output / name / "submission" / file).read_text()


def test_vqav2_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = submission("vqav2", "vqav2_test-dev.json", data, tmp_path, lambda request: "Two dogs.")
    # Test questions that aren't in test-dev have an empty answer; ids are numbers.
    assert json.loads(text) == [
        {"question_id": 3, "answer": ""},
        {"question_id": 1, "answer": "2 dogs"},
        {"question_id": 2, "answer": "2 dogs"},
    ]
    scores = json.loads((tmp_path / "vqav2/scores.json").read_text())
    assert scores["metrics"] == {} and "EvalAI" in scores["not_scored"]


def test_vizwiz_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = submission("vizwiz", "vizwiz_test.json", data, tmp_path, lambda request: "Unanswerable")
    assert json.loads(text) == [{"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}] * 2


def test_mmbench_test_is_for_the_server(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import openpyxl

    report = run("mmbench-cn-test", data, tmp_path, lambda request: "B")
    assert report.scores["metrics"] == {} and "submit the file to OpenCompass" in report.scores["not_scored"]
    path = tmp_path / "mmbench-cn-test/submission/mmbench_test_cn_20231003.xlsx"
    head, first, *_ = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert first == (7, "What is\tthis?", "a cat", 'a "red" dog', "two", None, "B", "dev")


def test_gqa_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = submission("gqa", "testdev_balanced_predictions.json", data, tmp_path, lambda request: "Yes.")
    assert json.loads(text) == [{"questionId": id_, "prediction": "yes"} for id_ in ("201", "202")]


def test_mmvet_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = submission("mmvet", "mm-vet.json", data, tmp_path, lambda request: f"It is {request.key}.")
    assert json.loads(text) == {"v1_0": "It is v1_0.", "v1_1": "It is v1_1."}


def test_seed_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = submission("seed", "seed_bench_image.jsonl", data, tmp_path)
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[1] == {"question_id": "1", "prediction": "B"}


def test_mme_submission_is_what_the_tool_reads(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    answer = "Yes,\nit\tis"
    text = submission("mme", "mme_eval_tool/existence.txt", data, tmp_path, lambda request: answer)
    line = "a.png\tIs there a dog in this image? Please answer yes or no.\tYes\tYes, it is\n"
    assert text.startswith(line) and text.count("\n") == 4


def test_mmbench_submission(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import openpyxl

    run("mmbench", data, tmp_path, lambda request: "=1+1\x00" if request.key == "7" else "B")
    sheet = openpyxl.load_workbook(tmp_path / "mmbench/submission/mmbench_dev_20230712.xlsx").active
    head, first, second, *_ = sheet.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert first == (7, "What is\tthis?", "a cat", 'a "red" dog', "two", None, "=1+1", "B", "dev")
    assert second[0] == 1_000_007 and second[6] == "B" and sheet.max_row == 7


# --- Likelihoods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["letters", "contents"])
def test_the_likeliest_option(mode: str, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    engine = FakeEngine()
    loaded = BENCHMARKS["mmbench"].load(data)
    settings = Choices(mode=mode)  # type: ignore[arg-type]
    run_benchmark(BENCHMARKS["mmbench"], engine, loaded, tmp_path, model="m", choices=settings)
    request = engine.seen[0]
    expected = ("A", "B", "C") if mode == "letters" else ("a cat", 'a "red" dog', "two")
    assert request.choices == expected  # type: ignore[union-attr]
    assert ("\nA. a cat" in request.prompt.turns[0].text) == (mode == "letters")
    line = json.loads((tmp_path / "mmbench/samples.jsonl").read_text().splitlines()[0])
    assert line["answer"] == "B" and len(line["log_probabilities"]) == 3
    assert line["image"] == f"sha256:{hashlib.sha256(png()).hexdigest()}"


def test_likelihoods_are_for_multiple_choice(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="gqa is not multiple choice"):
        run("gqa", data, tmp_path, mode="letters")


# --- Defects -------------------------------------------------------------------------------------


def test_what_is_missing_is_counted_and_named(tmp_path: pathlib.Path) -> None:
    WRITERS["pope"](tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    lines = path.read_text().splitlines()
    lines[1:3] = [
        "{broken",
        '{"question_id": 3, "image": "gone.jpg", "text": "Is there a cup?", "label": "yes"}',
    ]
    lines.append('{"question_id": 9, "image": "../../secret.jpg", "text": "?", "label": "no"}')
    lines.append('{"question_id": 10, "image": "i.jpg", "text": "?"}')
    path.write_text("\n".join(lines))
    report = run("pope", tmp_path, tmp_path / "out")
    problems = report.scores["problems"]
    assert report.scores["without_answer"] == 2 and report.scores["unusable_records"] == 2
    assert "random/3: val2014/gone.jpg: no such file" in problems
    assert any("leads out of" in problem for problem in problems)
    assert any("coco_pope_random.json:2: not JSON" in problem for problem in problems)
    assert "coco_pope_random.json:6: without label" in problems
    # Without an answer nothing is right, though "" would have been read as a yes.
    assert report.scores["metrics"]["accuracy: random"]["value"] == pytest.approx(100 * 2 / 4)


@pytest.mark.parametrize(
    ("name", "remove", "message"),
    [
        ("gqa", "gqa", "no folder gqa or GQA for gqa"),
        ("scienceqa", "scienceqa/problems.json", "no problems.json; it is from data/scienceqa"),
        ("mmbench", "mmbench", "no folder mmbench"),
        ("textvqa", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json"),
    ],
)
def test_missing_files_are_named(name: str, remove: str, message: str, tmp_path: pathlib.Path) -> None:
    WRITERS[name](tmp_path)
    path = tmp_path / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        BENCHMARKS[name].load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("seed", "seed_bench/SEED-Bench.json", "[]", "expected dict, found list"),
        ("gqa", "gqa/data/testdev_balanced_questions.json", "{", "not JSON"),
        (
            "gqa",
            "gqa/data/testdev_balanced_questions.json",
            '{"7": {"question": "?"}}',
            "without imageId, answer",
        ),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\n", "no column A, B, image"),
    ],
)
def test_broken_files_are_named(
    name: str, file: str, content: str, message: str, tmp_path: pathlib.Path
) -> None:
    WRITERS[name](tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].load(tmp_path)


def test_textvqa_prompts_from_rosetta(tmp_path: pathlib.Path) -> None:
    WRITERS["textvqa"](tmp_path)
    (tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl").unlink()
    tokens = {"data": [{"image_id": "ab", "ocr_tokens": ["Nokia", "6"]}]}
    write(tmp_path / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    first = BENCHMARKS["textvqa"].load(tmp_path).samples[0]
    assert first.question == f"What BRAND?\nReference OCR token: Nokia, 6{SHORT}"


def test_all_takes_what_is_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder MME or mme for mme"):
        load_benchmarks("mme,gqa", tmp_path)
    for name in ("gqa", "pope", "seed", "world"):
        WRITERS[name](tmp_path)
    shutil.rmtree(tmp_path / "pope/val2014")
    loaded, left_out = load_benchmarks("all", tmp_path)
    assert set(loaded) == {"gqa", "gqa-consistency", "seed", "world"}
    assert len(left_out) + len(loaded) == len(BENCHMARKS)
    reasons = dict(reason.split(": ", 1) for reason in left_out)
    assert "i.jpg: not there" in reasons["pope"] and "no folder vqav2" in reasons["vqav2"]
    assert "pope" in load_benchmarks("all", tmp_path, answered=["pope"])[0]
    with pytest.raises(FileNotFoundError, match=r"val2014/i\.jpg: not there, nor are the images after it"):
        load_benchmarks("pope", tmp_path)


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("mmvet", [("mm-vet", "mmvet/mm-vet")]),
        ("mmvet", [("mm-vet", "mm-vet/resources")]),
        ("llava-bench", [("llava-bench-in-the-wild", "llava-bench-in-the-wild/resources")]),
        ("gqa", [("gqa/data", "gqa/questions1.2"), ("gqa/images", "gqa/data/images")]),
        ("qbench", [("qbench/images_llvisionqa", "qbench/images_llviqionqa")]),
        ("mme", [("MME/MME_Benchmark_release_version", "MME/MME_Benchmark_release")]),
        ("mme", [("MME/MME_Benchmark_release_version", "MME/MME_Benchmark_release_version/MME_Benchmark")]),
        ("pope", [("pope/coco", "pope")]),
        (
            "textvqa",
            [("textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/share4v_textvqa_val_v051_ocr.jsonl")],
        ),
        ("vizwiz", [("vizwiz/test.json", "vizwiz/Annotations/test.json")]),
    ],
)
def test_folders_as_people_have_them(name: str, moves: list[tuple[str, str]], tmp_path: pathlib.Path) -> None:
    WRITERS[name](tmp_path)
    count = len(BENCHMARKS[name].load(tmp_path).samples)
    for source, target in moves:
        moved = (tmp_path / source).rename(tmp_path / "moved")
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        if moved.is_dir() and (tmp_path / target).is_dir():
            for path in list(moved.iterdir()):
                path.rename(tmp_path / target / path.name)
            moved.rmdir()
        else:
            moved.rename(tmp_path / target)
    loaded = BENCHMARKS[name].load(tmp_path)
    loaded.require_images(name)
    assert len(loaded.samples) == count


def test_names() -> None:
    assert [benchmark.name for benchmark in get_benchmarks("mme, pope,mme")] == ["mme", "pope"]
    assert len(get_benchmarks("paper")) == 12 and len(get_benchmarks("paper,all")) == len(BENCHMARKS)
    with pytest.raises(ValueError, match="did you mean mmbench"):
        get_benchmarks("mmbensh")
    with pytest.raises(ValueError, match="which benchmarks"):
        get_benchmarks(",")
