"""A /chat/completions endpoint on this machine that misbehaves as it is told."""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

KEY = "sk-test-SECRET-0123456789abcdef"
MODEL = "gpt-test"
WORDS = re.findall(
    r"\w+", "a red cube stands on the left of two small green balls and in front of a wall with"
)
REFUSAL = "I'm sorry, but I can't assist with that request."
# What a fault costs nobody, and what may be billed though no answer is seen.
UNPAID = ("429", "429-date", "408", "409", "500", "503")
MAYBE_PAID = ("drop", "reset", "truncated", "short", "html", "timeout")


def caption_for(sha256: str) -> str:
    """A good caption, always the same for an image."""
    return f"Image {sha256[:12]} shows " + " ".join(WORDS * 2) + " ünïcode\u2028."


def completion(text: str, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": f"{MODEL}-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 400, "completion_tokens": 50, "total_tokens": 450},
    }


@dataclasses.dataclass
class Asked:
    """One request as the endpoint saw it."""

    time: float
    sha256: str
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    answered: bool = False

    @property
    def image(self) -> bytes:
        return image_of(self.body)


def image_of(body: dict[str, Any]) -> bytes:
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return base64.b64decode(url.partition(",")[2])


@dataclasses.dataclass
class FaultyEndpoint:
    """Answers each image by its list of faults, one for each request, and then well.

    Attributes:
      faults: SHA-256 of an image's bytes -> faults; "*" for any other image.
      asked: all requests so far.
      given: how they were answered.
      most_at_once: the largest number of requests that were under way together.
      delay: seconds that every answer takes.
    """

    url: str = ""
    faults: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    asked: list[Asked] = dataclasses.field(default_factory=list)
    given: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    most_at_once: int = 0
    delay: float = 0.0
    _at_once: int = 0
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def take(self, asked: Asked) -> str:
        with self._lock:
            self.asked.append(asked)
            faults = self.faults.get(asked.sha256, self.faults.get("*", []))
            fault = faults.pop(0) if faults else "good"
            self.given[fault] += 1
            asked.answered = fault not in (*UNPAID, "timeout", "drop", "reset")
            return fault

    def count(self) -> collections.Counter[str]:
        """Requests by image."""
        return collections.Counter(asked.sha256 for asked in self.asked)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


@contextlib.contextmanager
def serve() -> Iterator[FaultyEndpoint]:
    endpoint = FaultyEndpoint()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            endpoint.asked.append(
                Asked(0.0, "", {}, {k.lower(): v for k, v in self.headers.items()}, self.path)
            )
            self.reply(200, b"{}")

        def do_POST(self) -> None:
            with endpoint.under_way():
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sha256 = hashlib.sha256(image_of(body)).hexdigest()
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(time.monotonic(), sha256, body, headers, self.path)
                behaviour = endpoint.take(asked)
                endpoint._over.wait(endpoint.delay)
                with contextlib.suppress(OSError):
                    self.behave(behaviour, sha256)

        def behave(self, behaviour: str, sha256: str) -> None:
            good = json.dumps(completion(caption_for(sha256))).encode()
            answers = {
                "refusal": completion(REFUSAL),
                "marked": completion("", refusal="No."),
                "empty": completion(""),
                "length": completion(caption_for(sha256)[:-30], "length"),
                "list": completion("- a cube\n- a ball\n" + caption_for(sha256)),
                "filter": completion("", "content_filter"),
                "brief": completion("A cube."),
                "echo": completion(caption_for(sha256) + f" The label reads {self.headers['Authorization']}"),
                "surrogate": completion(caption_for(sha256) + " \ud83d"),
                "error-in-200": {"error": {"code": 502, "message": "upstream"}},
            }
            if behaviour in answers:
                self.reply(200, json.dumps(answers[behaviour]).encode())
            elif behaviour == "good":
                self.reply(200, good)
            elif behaviour == "truncated":
                self.reply(200, good[: len(good) // 2])
            elif behaviour == "short":
                self.reply(200, good[:-10], {"Content-Length": str(len(good))})
            elif behaviour == "html":
                self.reply(200, b"<html>sign in</html>", {"Content-Type": "text/html"})
            elif behaviour == "timeout":
                endpoint._over.wait(30)
            elif behaviour == "drop":
                self.close_connection = True
            elif behaviour == "reset":
                linger = struct.pack("ii", 1, 0)  # Closing then sends RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            elif behaviour == "redirect":
                self.reply(302, b"", {"Location": endpoint.url + "/elsewhere"})
            else:
                status, _, how = behaviour.partition("-")
                waits = {"date": self.date_time_string(time.time() + 1), "": "0.05"}
                headers = {"retry-after": waits.get(how, how)} if status in ("429", "503") else {}
                message = f"fault {behaviour}, you sent {self.headers['Authorization']}"
                error = {"message": message, "type": how, "code": how}
                self.reply(int(status), json.dumps({"error": error}).encode(), headers)

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            fields = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in (fields | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint._over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def draw_images(root: pathlib.Path, count: int) -> dict[str, str]:
    """Small images of which no two are alike: path -> SHA-256 of the file."""
    found = {}
    for index in range(count):
        path = root / ("coco" if index % 2 else "sam/images") / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.new("RGB", (24, 16), (index % 256, index // 256, 99)).save(file, "PNG")
        path.write_bytes(file.getvalue())
        found[path.relative_to(root).as_posix()] = hashlib.sha256(file.getvalue()).hexdigest()
    return found
