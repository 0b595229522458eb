"""Our own engine in the place of an endpoint: the same requests, answered in this process."""

import asyncio
import base64
import binascii
import hashlib
import itertools
import json
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from sg4v_jax.caption.collect.endpoint import EndpointError
from sg4v_jax.caption.collect.request import Completion
from sg4v_jax.data.records import IMAGE_PLACEHOLDER, Turn
from sg4v_jax.infer.options import SamplingOptions
from sg4v_jax.infer.request import LENGTH, Prompt, Request, Result

logger = logging.getLogger(__name__)

_FIELDS = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed")


class Completing(Protocol):
    """What is needed of an `infer.engine.Engine`; importing that would load JAX."""

    def complete(self, requests: Iterable[Request | None]) -> Iterator[Result]: ...

    def prompt_tokens(self, prompt: Prompt) -> int: ...


class Teacher:
    """Answers as `Endpoint` does. One thread runs the engine; what is asked joins what is under way."""

    def __init__(self, engine: Completing, model: str):
        """Args:
        engine: the model; the teacher's alone until it is closed.
        model: its name in the answers, see `teacher_name`.
        """
        self._engine, self._model = engine, model
        self._keys = itertools.count()
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._unanswered: dict[Any, Future[Result]] = {}
        # Why nothing is answered any more. Under the lock, so that nothing is asked after the last look.
        self._over: EndpointError | None = None
        self._closing, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="teacher", daemon=True)
        self._thread.start()

    async def complete(self, body: bytes) -> Completion:
        """Answers the JSON body of a request to /chat/completions.

        Raises:
          EndpointError: not a request that the engine can answer ("permanent"), the engine is broken
            ("stop"), or the teacher was closed ("transient").
        """
        request, prompt_tokens = await asyncio.to_thread(self._read, body)
        future: Future[Result] = Future()
        # From now on it is answered, even if nobody waits for it any more.
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._over:
                raise _again(self._over)
            self._unanswered[request.key] = future
            self._asked.put(request)
        result = await asyncio.wrap_future(future)
        answer = result.completion
        if answer is None:
            raise EndpointError("permanent", result.error)
        return Completion(
            text=answer.text,
            finish_reason="length" if answer.stop == LENGTH else "stop",
            refused=False,
            model=self._model,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(answer.tokens),
        )

    def close(self) -> None:
        """Ends the thread, with the next answer if some are under way; the others stay without one."""
        self._closing.set()
        self._asked.put(None)
        self._thread.join()

    def _read(self, body: bytes) -> tuple[Request, int]:
        try:
            prompt, options = parse_body(body)
            return Request(next(self._keys), prompt, options), self._engine.prompt_tokens(prompt)
        except ValueError as error:
            raise EndpointError("permanent", str(error)) from error

    def _serve(self) -> None:
        over = EndpointError("transient", "the teacher was closed")
        try:
            for result in self._engine.complete(self._requests()):
                self._unanswered.pop(result.key).set_result(result)
                if self._closing.is_set():
                    break
        except BaseException as error:
            logger.debug("the engine broke", exc_info=True)
            over = EndpointError("stop", f"the engine broke: {type(error).__name__}: {error}")
        with self._lock:
            self._over = over
        for future in self._unanswered.values():
            future.set_exception(_again(over))

    def _requests(self) -> Iterator[Request | None]:
        """What is asked, as it comes; waits for it only while there is nothing to answer.

        The engine looks here between its steps: waiting would hold up the answers under way, and ending
        would let slots run empty until the last of them is done.
        """
        while not self._closing.is_set():
            try:
                yield self._asked.get(block=not self._unanswered)
            except queue.Empty:
                yield None


def teacher_name(directory: str, described: Mapping[str, object]) -> str:
    """The name that results are kept under: the directory's, with a digest of what the model is.

    Args:
      directory: of the model.
      described: see `corpus.job.describe_model`.
    """
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return f"{os.path.basename(os.path.abspath(directory))}@{digest[:16]}"


def parse_body(body: bytes) -> tuple[Prompt, SamplingOptions]:
    """(prompt, how to answer) of a request to /chat/completions.

    A model's template has its own system text, so that of a request goes before the first question. An
    image has one resolution here, whatever `detail` it is to be seen in. What is left out is as OpenAI's
    reference has it (temperature and top_p 1), but for the length of an answer, which has to be given.

    Raises:
      ValueError: anything else is in it; the message names the key.
    """
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the request is not JSON: {error}") from error
    _known(found, _FIELDS, "the request")
    length = "max_completion_tokens" if "max_completion_tokens" in found else "max_tokens"
    options = SamplingOptions(
        max_new_tokens=_number(found, length, None, int),
        temperature=float(_number(found, "temperature", 1.0, int, float)),
        top_p=float(_number(found, "top_p", 1.0, int, float)),
        seed=_number(found, "seed", 0, int),
    )
    return _prompt(found.get("messages")), options


def _prompt(messages: object) -> Prompt:
    if not isinstance(messages, list):
        raise ValueError(f"messages: expected a list, not {messages!r}")
    system: list[str] = []
    turns: list[Turn] = []
    images: list[bytes] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _known(message, ("role", "content"), where)
        text, shown = _content(message.get("content"), f"{where}.content")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}.role: {role!r} is none of system, user and assistant")
        if shown and role != "user":
            raise ValueError(f"{where}.content: only a user shows images, not the {role}")
        images += shown
        if role == "system":
            if turns:
                raise ValueError(f"{where}.role: a system text comes before all turns")
            system.append(text)
        elif role == "user":
            turns.append(Turn("human", "\n".join([*([] if turns else system), text])))
        else:
            turns.append(Turn("gpt", text))
    return Prompt(tuple(turns), tuple(images))


def _content(content: object, where: str) -> tuple[str, list[bytes]]:
    """(text with `<image>` where images are, the images)."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected a text or a list of parts, not {content!r}")
    texts: list[str] = []
    images: list[bytes] = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            _known(part, ("type", "text"), at)
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{at}.text: expected a text")
            texts.append(part["text"])
        elif kind == "image_url":
            _known(part, ("type", "image_url"), at)
            images.append(_image(part.get("image_url"), f"{at}.image_url"))
            texts.append(IMAGE_PLACEHOLDER)
        else:
            raise ValueError(f"{at}.type: {kind!r} is neither text nor image_url")
    return "\n".join(texts), images


def _image(image: object, where: str) -> bytes:
    _known(image, ("url", "detail"), where)
    assert isinstance(image, dict)
    head, _, data = str(image.get("url")).partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError(f"{where}.url: expected data:image/...;base64,... and not {head[:40]!r}")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}.url: {error}") from error


def _known(found: object, keys: Iterable[str], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object")
    if unknown := sorted(found.keys() - set(keys)):
        raise ValueError(f"{where}: {unknown[0]!r} is nothing that the engine understands")


def _number(found: Mapping[str, Any], key: str, default: Any, *types: type) -> Any:
    value = found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, types):
        kind = "a whole number" if types == (int,) else "a number"
        raise ValueError(f"{key}: expected {kind}, not {value!r}")
    return value


def _again(error: EndpointError) -> EndpointError:
    """The same for another who asks: an exception that is raised twice grows its traceback."""
    return EndpointError(error.kind, str(error))
