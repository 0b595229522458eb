"""Our own engine as the one who is asked: what it understands, many at once, errors, the command."""

import asyncio
import base64
import dataclasses
import json
import pathlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from sg4v_jax.__main__ import main
from sg4v_jax.caption.collect.collector import Pace
from sg4v_jax.caption.collect.endpoint import EndpointError
from sg4v_jax.caption.collect.request import Item, RequestOptions
from sg4v_jax.caption.collect.request import body as body_of
from sg4v_jax.caption.collect.teacher import Teacher, parse_body
from sg4v_jax.data.records import Turn
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.engine import Engine
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.infer.request import END, LENGTH, Completion, Prompt, Request, Result
from tests import tiny
from tests.caption.collect.collecting import collect, lines
from tests.conftest import TinyWorld
from tests.convert.models import save


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


IMAGE = shown("data:image/png;base64," + base64.b64encode(b"i").decode())
SLOTS = 3


class Slots:
    """An engine that answers what is in its slots in any order, one a step, and pulls between steps.

    Attributes:
      most: the largest number of requests that were under way together.
      late: requests that were pulled while others were under way and had been for a step.
      hold: answers nothing while it is cleared, but pulls.
    """

    def __init__(self) -> None:
        self.most = self.late = 0
        self.hold = threading.Event()
        self.hold.set()
        self.broken = False
        self.calls = 0

    def prompt_tokens(self, prompt: Prompt) -> int:
        return 7 * len(prompt.images) + sum(len(turn.text.split()) for turn in prompt.turns)

    def complete(self, requests: Iterable[Request | None]) -> Iterator[Result]:
        self.calls += 1
        source, order = iter(requests), random.Random(0)
        running: list[Request] = []
        stepped = False
        while True:
            while len(running) < SLOTS:
                request = next(source)
                if request is None:
                    break
                self.late += stepped and bool(running)
                running.append(request)
            self.most = max(self.most, len(running))
            if self.broken:
                raise MemoryError("no room")
            stepped = True
            if self.hold.wait(0.001):
                yield answer(running.pop(order.randrange(len(running))))


def answer(request: Request) -> Result:
    text = request.prompt.turns[-1].text
    if "bad" in text:
        return Result(request.key, None, "a bad prompt")
    stop = LENGTH if request.options.max_new_tokens == 1 else END
    return Result(request.key, Completion(f"re: {text}", (5, 6, 2), stop != LENGTH, -1.0, stop), "")


def asking(text: str, **fields: Any) -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": text}], "max_tokens": 9, "temperature": 0} | fields
    ).encode()


def test_the_collectors_own_request_is_understood(root: pathlib.Path, images: dict[str, str]) -> None:
    path, sha256 = next(iter(images.items()))
    image = (root / path).read_bytes()
    item = Item(path, sha256, 24, 16, "sam", "What is it?", "m@1")
    options = RequestOptions(max_tokens=50, temperature=0.1, seed=4, extra={"top_p": 0.5})
    prompt, how = parse_body(json.dumps(body_of(item, image, options, attempt=1)).encode())
    assert prompt == Prompt((Turn("human", "What is it?\n<image>"),), (image,))
    assert how == SamplingOptions(max_new_tokens=50, temperature=0.4, top_p=0.5, seed=5)


def test_roles_become_turns() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    prompt, how = parse_body(json.dumps({"messages": messages, "max_completion_tokens": 3}).encode())
    turns = (Turn("human", "Be brief.\n<image>\nA?"), Turn("gpt", "B."), Turn("human", "C?"))
    assert prompt == Prompt(turns, (b"i",))
    assert how == SamplingOptions(max_new_tokens=3, temperature=1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": True}, "'logprobs'"),
        ({"max_tokens": 2.5}, "max_tokens: expected a whole number, not 2.5"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"top_p": 0}, "top_p=0.0 is out of range"),
        ({"messages": {}}, "messages: expected a list"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role: 'tool'"),
        ({"messages": [{"role": "user", "content": "", "name": "x"}]}, "messages[0]: 'name'"),
        ({"messages": [{"role": "system", "content": [IMAGE]}]}, "only a user shows images"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content[0].type: 'audio'"),
        (
            {"messages": [{"role": "user", "content": [shown("http://host/a.png")]}]},
            "content[0].image_url.url: expected data:image",
        ),
        (
            {"messages": [{"role": "user", "content": [shown("data:image/png;base64,?")]}]},
            "content[0].image_url.url",
        ),
    ],
)
def test_what_is_not_understood_is_named(fields: dict[str, Any], message: str) -> None:
    engine = Slots()
    with pytest.raises(EndpointError) as error:
        with_teacher(engine, lambda teacher: teacher.complete(asking("A?", **fields)))
    assert message in str(error.value) and error.value.kind == "permanent"


def with_teacher(engine: Any, ask: Callable[[Teacher], Any]) -> Any:
    teacher = Teacher(engine, "m@1")
    try:
        return asyncio.run(asyncio.wait_for(ask(teacher), 30))
    finally:
        teacher.close()


def test_answers_are_those_of_their_requests_and_slots_are_refilled() -> None:
    engine = Slots()

    async def ask(teacher: Teacher) -> list[Any]:
        texts = [f"{'bad' if i % 10 == 3 else 'good'} {i}" for i in range(40)]
        bodies = [asking(text, max_tokens=1 + i % 2) for i, text in enumerate(texts)]
        found = await asyncio.gather(*map(teacher.complete, bodies), return_exceptions=True)
        return list(zip(texts, found, strict=True))

    for i, (text, found) in enumerate(with_teacher(engine, ask)):
        if "bad" in text:
            assert isinstance(found, EndpointError)
            assert (found.kind, str(found)) == ("permanent", "a bad prompt")
        else:
            assert found.text == f"re: {text}" and not found.refused and found.model == "m@1"
            assert found.finish_reason == ("stop" if i % 2 else "length")
            assert (found.prompt_tokens, found.completion_tokens) == (2, 3)
    assert engine.calls == 1 and engine.most == SLOTS and engine.late > 0


def test_what_comes_late_joins_what_is_under_way() -> None:
    """The engine is never made to wait while it has something to answer, nor is it run dry."""
    engine = Slots()
    engine.hold.clear()

    async def ask(teacher: Teacher) -> list[str]:
        first = asyncio.create_task(teacher.complete(asking("first")))
        while engine.most < 1:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(teacher.complete(asking("second")))
        while engine.most < 2:
            await asyncio.sleep(0.001)
        engine.hold.set()
        return [(await task).text for task in (first, second)]

    assert with_teacher(engine, ask) == ["re: first", "re: second"]
    assert engine.calls == 1


def test_closed_while_it_answers() -> None:
    engine = Slots()
    engine.hold.clear()

    async def ask(teacher: Teacher) -> list[Any]:
        tasks = [asyncio.create_task(teacher.complete(asking(f"{i}"))) for i in range(SLOTS + 2)]
        while engine.most < SLOTS:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(teacher.close))
        while not teacher._closing.is_set():
            await asyncio.sleep(0.001)
        engine.hold.set()
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
        return [*found, *await asyncio.gather(teacher.complete(asking("late")), return_exceptions=True)]

    found = with_teacher(engine, ask)
    errors = [error for error in found if isinstance(error, EndpointError)]
    assert {(error.kind, str(error)) for error in errors} == {("transient", "the teacher was closed")}
    assert found[-1] in errors and len(errors) >= 3


def test_one_who_no_longer_waits() -> None:
    async def ask(teacher: Teacher) -> str:
        engine.hold.clear()
        tasks = [asyncio.create_task(teacher.complete(asking(f"{i}"))) for i in range(SLOTS + 2)]
        while engine.most < SLOTS:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        engine.hold.set()
        return (await teacher.complete(asking("after"))).text

    engine = Slots()
    assert with_teacher(engine, ask) == "re: after"


def test_a_broken_engine_ends_the_run(root: pathlib.Path, images: dict[str, str]) -> None:
    engine = Slots()
    engine.broken = True
    teacher = Teacher(engine, "m@1")
    summary, stop, _ = collect(images, root, root.parent / "out", teacher, pace=Pace(workers=4))
    teacher.close()
    assert stop.is_error and "the engine broke: MemoryError: no room" in stop.reason
    assert summary.pending == len(images)


@pytest.fixture(scope="module")
def model(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A captioner of random weights."""
    directory = tmp_path_factory.mktemp("models") / "captioner"
    config = tiny.model_config()
    text = dataclasses.replace(config.text, vocab_size=Tokenizer(tiny_world.tokenizer).vocab_size)
    config = dataclasses.replace(config, text=text)
    save(directory, config, tiny.random_params(config), "hf", tokenizer_file=tiny_world.tokenizer)
    return directory


def test_the_command(
    model: pathlib.Path,
    root: pathlib.Path,
    images: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of ours answers about every image, and is asked only once."""
    output = root.parent / "out"
    prompts = root.parent / "prompts.json"
    prompts.write_text('{"opener": "", "closer": "", "sources": {"coco": "What is it?", "sam": "Why?"}}')
    kept = sorted(images)[:5]
    for path in set(images) - set(kept):
        (root / path).unlink()
    argv = ["collect", "--images", root, "--output", output, "--teacher", model, "--prompts", prompts]
    # Random weights never come to an end: every answer is cut.
    argv += ["--max-tokens=8", "--attempts=1", "--dtype=float32", "--slots=2", "--workers=4"]
    main([*map(str, argv)])
    answers = [entry for entry in lines(output / "results.jsonl") if entry["event"] == "answer"]
    (name,) = {entry["model"] for entry in answers}
    assert name.startswith("captioner@") and len(name) == len("captioner@") + 16
    assert sorted(entry["image"] for entry in answers) == kept
    for entry in answers:
        usage = entry["usage"]
        assert (entry["verdict"], entry["finish_reason"]) == ("truncated", "length")
        assert usage["counted"] and usage["completion_tokens"] == 8 and entry["cost"] is None
        # Four of them are the image's.
        assert 4 < usage["prompt_tokens"] < 256
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_run", lambda *_: pytest.fail("there was nothing left to ask"))
        main([*map(str, argv)])
    assert [e for e in lines(output / "results.jsonl") if e["event"] == "answer"] == answers


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher=t", "--model=m"], "give --model"),
        ([], "give --model"),
        (["--teacher=t", "--endpoint=http://host"], "--endpoint is of an endpoint"),
        (["--teacher=t", "--price-in=1"], "--price-in is of an endpoint"),
        (["--teacher=t", "--batch=write"], "--batch is of an endpoint"),
    ],
)
def test_what_excludes_a_teacher(
    argv: list[str], message: str, root: pathlib.Path, images: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["collect", "--images", str(root), "--output", str(root.parent / "out"), *argv])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
