"""Judged benchmarks against an endpoint on this machine: prompts, memory, refusals, nothing invented."""

import contextlib
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sg4v_jax.caption.collect.endpoint import Endpoint
from sg4v_jax.evaluate.judge import Judge
from sg4v_jax.evaluate.judged import verdict_cache
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.runner import Report, run_benchmark, summary
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


def run(name: str, root: pathlib.Path, url: str | None) -> Report:
    WRITERS[name](root / "data")
    benchmark = BENCHMARKS[name]
    judge = Judge(Endpoint(url), "judge", verdict_cache(root / "out" / name), workers=2) if url else None
    try:
        return run_benchmark(
            benchmark,
            FakeEngine(lambda request: f"answer {request.key}"),
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
        body = next(body for body in asked if "answer 0" in body["messages"][1]["content"])
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.2, 1024)
        assert body["messages"][1]["content"].startswith(
            "[Context]\nA dog by a lake.\n\n[Question]\nDescribe it.\n\n[Assistant 1]\nA brown dog.\n\n"
            "[End of Assistant 1]\n\n[Assistant 2]\nanswer 0\n\n[End of Assistant 2]\n\n[System]\nWe would"
        )
        count = len(asked)
        assert run("llava-bench", tmp_path, url).scores == report.scores
        assert len(asked) == count, "verdicts are remembered"


def test_mmvet_asks_again_for_a_number(tmp_path: pathlib.Path) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str]:
        text = body["messages"][0]["content"]
        if "a puppy" in text:
            return 200, "0.5"
        return 200, "1.0 |" if text.endswith("(digit): ") and body["temperature"] == 0.5 else "The answer"

    with judging(answer) as (url, asked):
        report = run("mmvet", tmp_path, url)
    metrics = {name: metric["value"] for name, metric in report.scores["metrics"].items()}
    assert metrics == {"total": 75.0, "math": 100.0, "ocr": 100.0, "rec": 50.0}
    row = "What is x? | -1 <AND> -5 | answer v1_0 | "
    hard = [body for body in asked if row in body["messages"][0]["content"]]
    assert [body["temperature"] for body in hard] == [0.0, 0.0, 0.5]
    assert all(body["max_tokens"] == 3 for body in asked)


def test_without_a_verdict_nothing_is_scored(tmp_path: pathlib.Path) -> None:
    report = run("mmvet", tmp_path / "none", None)
    assert report.scores["metrics"] == {} and "judge" in report.scores["not_scored"]
    assert "not scored" in summary({"mmvet": report.scores})
    with judging(lambda body: (200, "I'd rather not")) as (url, asked):
        report = run("mmvet", tmp_path / "silent", url)
    assert report.scores["metrics"] == {} and report.scores["judge"]["without_verdict"] == 2
    assert len(asked) == 12


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
