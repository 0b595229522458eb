"""Judged benchmarks against an endpoint on this machine: prompts, memory, refusals, nothing invented."""

import contextlib
import json
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sg4v_jax.caption.collect.endpoint import Endpoint
from sg4v_jax.evaluate.benchmark import Sample
from sg4v_jax.evaluate.compare import compare_runs
from sg4v_jax.evaluate.judge import Judge
from sg4v_jax.evaluate.judged import JudgedBenchmark, verdict_cache
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import Report, run_benchmark, summary
from sg4v_jax.infer.request import Request
from tests.evaluate.official import WRITERS, FakeEngine

Answer = Callable[[dict[str, Any]], tuple[int, str]]


@contextlib.contextmanager
def judging(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(URL, the bodies that were asked) of an endpoint; `answer` gives status and text."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            status, text = answer(body)
            found: dict[str, Any] = {"error": {"message": text}}
            if status == 200:
                found = {"model": "judge-2026", "choices": [{"message": {"content": text}}]}
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(
    name: str,
    root: pathlib.Path,
    url: str | None,
    *,
    runs: int = 0,
    answer: Callable[[Request], str] = lambda request: f"answer {request.key}",
) -> Report:
    WRITERS[name](root / "data")
    benchmark = BENCHMARKS[name]
    cache = verdict_cache(root / "out" / name)
    judge = Judge(Endpoint(url), "judge", cache, runs=runs, workers=2) if url else None
    try:
        return run_benchmark(
            benchmark,
            FakeEngine(answer),
            benchmark.load(root / "data"),
            root / "out",
            model="m",
            judge=judge,
        )
    finally:
        if judge:
            judge.close()


def test_llava_bench(tmp_path: pathlib.Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str]:
        return 200, "8 6\nBecause." if "answer 0" in body["messages"][1]["content"] else "9.0, 9\nEqual."

    with judging(answer) as (url, asked):
        report = run("llava-bench", tmp_path, url)
        metrics = {name: metric["value"] for name, metric in report.scores["metrics"].items()}
        # "9.0, 9" is three words for the official tool, so it is no verdict.
        assert metrics == {"all": pytest.approx(75.0), "conv": pytest.approx(75.0)}
        judge = report.scores["judge"]
        assert judge["answered"] == ["judge-2026"] and judge["published_with"] == "gpt-4-0314"
        assert judge["without_verdict"] == 1 and "unreadable verdict" in judge["reasons"]["1"]
        assert not (tmp_path / "out/llava-bench/submission/reviews_llava_bench.jsonl").exists()
        body = next(body for body in asked if "answer 0" in body["messages"][1]["content"])
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.2, 1024)
        assert body["messages"][1]["content"].startswith(
            "[Context]\nA dog by a lake.\n\n[Question]\nDescribe it.\n\n[Assistant 1]\nA brown dog.\n\n"
            "[End of Assistant 1]\n\n[Assistant 2]\nanswer 0\n\n[End of Assistant 2]\n\n[System]\nWe would"
        )
        count = len(asked)
        assert run("llava-bench", tmp_path, url).scores == report.scores
        assert len(asked) == count, "verdicts are remembered"


def test_llava_bench_reviews_are_what_the_official_summary_reads(tmp_path: pathlib.Path) -> None:
    with judging(lambda body: (200, "8 6.5\nBecause.")) as (url, _):
        run("llava-bench", tmp_path, url)
    path = tmp_path / "out/llava-bench/submission/reviews_llava_bench.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["category"] for line in lines] == ["llava_bench_conv", "llava_bench_detail"]
    assert lines[0]["tuple"] == [8.0, 6.5] and lines[0]["content"] == "8 6.5\nBecause."
    assert [line["question_id"] for line in lines] == [0, 1]


def test_mmvet_asks_again_for_a_number(tmp_path: pathlib.Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][0]["content"]
        if "a puppy" in text:
            return 200, "0.5"
        return 200, "1.0 |" if text.endswith("(digit): ") and body["temperature"] == 0.5 else "The answer"

    with judging(answer) as (url, asked):
        report = run("mmvet", tmp_path, url, runs=1)
    metrics = {name: metric["value"] for name, metric in report.scores["metrics"].items()}
    assert metrics == {"total": 75.0, "math": 100.0, "ocr": 100.0, "rec": 50.0}
    row = "What is x? | -1 <AND> -5 | answer v1_0 | "
    hard = [body for body in asked if row in body["messages"][0]["content"]]
    assert [body["temperature"] for body in hard] == [0.0, 0.0, 0.5]
    assert all(body["max_tokens"] == 3 for body in asked)


def test_mmvet_is_judged_five_times(tmp_path: pathlib.Path) -> None:
    """The mean of the runs, their spread as `numpy.std` gives it, and the official grader's own files."""
    grades = {"v1_0": iter(("1.0", "0.5", "0.5", "0.0", "1.0")), "v1_1": iter(["0.8"] * 5)}

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        (id_,) = (id_ for id_ in grades if f"answer {id_}" in body["messages"][0]["content"])
        return 200, next(grades[id_])

    with judging(answer) as (url, asked):
        report = run("mmvet", tmp_path, url)
        assert run("mmvet", tmp_path, url).scores == report.scores and len(asked) == 10
    assert report.scores["judge"]["runs"] == 5
    assert report.scores["metrics"]["total"]["value"] == pytest.approx(70)
    totals = [90.0, 65.0, 65.0, 40.0, 90.0]
    assert report.scores["details"]["totals of the runs"] == pytest.approx(totals)
    assert report.scores["details"]["standard deviation"] == pytest.approx(18.70829)
    assert "standard deviation 18.71" in summary({"mmvet": report.scores})
    folder = tmp_path / "out/mmvet/submission"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mm-vet.json",
        "mm-vet_judge-2026-cap-int-score-5runs.csv",
        "mm-vet_judge-2026-cap-score-5runs.csv",
        "mm-vet_judge-2026-grade-5runs.json",
    ]
    found = json.loads((folder / "mm-vet_judge-2026-grade-5runs.json").read_text())["v1_0"]
    assert found["score"] == [1.0, 0.5, 0.5, 0.0, 1.0] and found["content"][3] == "0.0"
    assert found["model"] == ["judge-2026"] * 5
    assert (folder / "mm-vet_judge-2026-cap-score-5runs.csv").read_text() == (
        ',math,ocr,rec,total,std,runs\nmm-vet,60.0,60.0,80.0,70.0,18.7,"[90.0, 65.0, 65.0, 40.0, 90.0]"\n'
    )
    assert (folder / "mm-vet_judge-2026-cap-int-score-5runs.csv").read_text().startswith(",math_ocr,rec,")


def test_mmvet_needs_every_run(tmp_path: pathlib.Path) -> None:
    refusals = iter([False] * 7 + [True])
    with judging(lambda body: (400, "policy") if next(refusals, False) else (200, "1.0")) as (url, asked):
        report = run("mmvet", tmp_path, url)
        assert report.scores["judge"]["without_verdict"] == 1 and len(asked) == 9
        assert list((tmp_path / "out/mmvet/submission").glob("*.csv")) == []
        report = run("mmvet", tmp_path, url)
    assert report.scores["judge"]["without_verdict"] == 0 and len(asked) == 11


@pytest.mark.parametrize("name", ["mmbench", "mmbench-cn", "mmstar"])
def test_a_judge_reads_what_rules_cannot(name: str, tmp_path: pathlib.Path) -> None:
    """First the rules, then the judge about the rest; its words are read by the same rules."""

    def verdict(body: dict[str, Any]) -> tuple[int, str]:
        (message,) = body["messages"]
        asked = message["content"].rsplit("Example 3: \n", 1)[1]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 2048)
        options = dict(line.split(". ", 1) for line in asked.split("\n")[2:-3])
        letter = next((name for name, text in options.items() if text in ('a "red" dog', "dog")), "Z")
        return 200, f"Your output: {letter}"

    answers = lambda request: "a canine" if str(request.key).endswith("7") else "the feline"  # noqa: E731
    without = run(name, tmp_path, None, answer=answers).scores
    assert without["unreadable"] == without["samples"] and "judge" not in without
    assert without["metrics"]["accuracy"]["value"] == 0
    assert "exact matching" in without["without_judge"] and "exact matching" in summary({name: without})
    shutil.copytree(tmp_path / "out", tmp_path / "rules")
    with judging(verdict) as (url, asked):
        report = run(name, tmp_path, url, answer=answers)
        assert run(name, tmp_path, url, answer=answers).scores == report.scores
    scores = report.scores
    assert 0 < len(asked) <= scores["judge"]["answers"] == scores["samples"]
    assert scores["judge"]["answered"] == ["judge-2026"] and scores["unreadable"] == 0
    assert scores["metrics"]["accuracy"]["value"] == (50 if name == "mmstar" else 100)
    lines = (tmp_path / "out" / name / "samples.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["verdicts"][0]["model"] == "judge-2026"
    notes = compare_runs([tmp_path / "rules", tmp_path / "out"]).notes
    assert notes == (f"{name}: judged by rules alone and by judge-2026; not comparable",)


def test_the_judge_is_asked_thrice_and_then_nothing_is_invented(tmp_path: pathlib.Path) -> None:
    """The official tool would choose at random."""
    answers = lambda request: "B" if int(request.key) > 7 else "a canine"  # noqa: E731
    words = iter(("no idea", "A or B"))
    with judging(lambda body: (200, next(words, "B"))) as (url, asked):
        report = run("mmbench", tmp_path / "late", url, answer=answers)
    assert len(asked) == 3 and report.scores["unreadable"] == 0
    assert asked[0]["messages"][0]["content"].endswith(
        "Example 3: \nQuestion: What is\tthis??\nOptions: There are several options: \nA. a cat\n"
        'B. a "red" dog\nC. two\n\nAnswer: a canine\nYour output: '
    )
    with judging(lambda body: (200, "no idea")) as (url, asked):
        report = run("mmbench", tmp_path / "never", url, answer=answers)
    assert len(asked) == 3 and report.scores["unreadable"] == 1
    assert report.scores["judge"]["without_verdict"] == 1
    assert "unreadable verdict: 'no idea'" in report.scores["judge"]["reasons"]["7"]


def test_chinese_questions_are_judged_in_chinese() -> None:
    benchmark = BENCHMARKS["mmbench-cn"]
    assert isinstance(benchmark, JudgedBenchmark)
    sample = Sample("1", "", None, "A", {"question": "图中有什么"}, ("猫", "狗"))
    text = benchmark.question(sample, "一只猫咪", 2).messages[0]["content"]
    assert text.endswith(
        "问题: 图中有什么?\n选项: There are several options: \nA. 猫\nB. 狗\n\n答案: 一只猫咪\n输出: "
    )
    assert text.startswith("你是一个帮助我匹配答案")


def test_without_a_verdict_nothing_is_scored(tmp_path: pathlib.Path) -> None:
    report = run("mmvet", tmp_path / "none", None)
    assert report.scores["metrics"] == {} and "judge" in report.scores["not_scored"]
    assert "not scored" in summary({"mmvet": report.scores})
    with judging(lambda body: (200, "I'd rather not")) as (url, asked):
        report = run("mmvet", tmp_path / "silent", url)
    assert report.scores["metrics"] == {} and report.scores["judge"]["without_verdict"] == 2
    assert len(asked) == 2 * 5, "five times for a readable grade, and no second run without a first"


def test_errors_of_the_endpoint(tmp_path: pathlib.Path) -> None:
    failures = iter([(429, "slow down"), (500, "oops")])
    with judging(lambda body: next(failures, (200, "1.0"))) as (url, _):
        assert run("mmvet", tmp_path / "busy", url).scores["metrics"]["total"]["value"] == 100
    with judging(lambda body: (400, "content policy")) as (url, asked):
        report = run("mmvet", tmp_path / "refused", url)
        assert "content policy" in report.scores["judge"]["reasons"]["v1_0"] and len(asked) == 2
    with (
        judging(lambda body: (401, "bad key")) as (url, _),
        pytest.raises(ValueError, match=r"the judge can't be asked.*bad key"),
    ):
        run("mmvet", tmp_path / "key", url)
