"""A /chat/completions endpoint over plain HTTP, and what its errors mean for the one who asks."""

import asyncio
import concurrent.futures
import email.utils
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from sg4v_jax.caption.collect.request import Completion, parse_completion

logger = logging.getLogger(__name__)

# transient: ask again; permanent: never again; stop: nobody needs to ask anything before a person acts.
Kind = Literal["transient", "permanent", "stop"]
_TRANSIENT = (408, 409, 429)
_STOP = {
    401: "the key isn't accepted",
    402: "there is no credit left",
    403: "the key may not use this model or endpoint",
}
_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")
_LARGEST_ANSWER = 1 << 24
_SHOWN = 300  # characters of an endpoint's own message
_SHORTEST_SECRET = 8  # shorter keys are placeholders of local servers, and parts of other words


class EndpointError(Exception):
    """No answer; the text is one line, with the endpoint's own words.

    Attributes:
      kind: what to do about it.
      status: the HTTP status, 0 without one.
      retry_after: seconds that the endpoint asks to wait; None if it doesn't.
      may_be_paid: the request may have been worked on, and billed, though no answer came.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        status: int = 0,
        retry_after: float | None = None,
        may_be_paid: bool = False,
    ):
        super().__init__(message)
        self.kind, self.status = kind, status
        self.retry_after, self.may_be_paid = retry_after, may_be_paid


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following would hand the key to whomever the redirect names, and lose the body."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Asks; at most `workers` requests are under way at a time."""

    def __init__(self, url: str, key: str = "", *, timeout: float = 120.0, workers: int = 8):
        """Args:
          url: the base (https://api.openai.com/v1) or all of it; a query is kept.
          key: sent as `Authorization: Bearer`; never shown, and blotted out of whatever comes back.
          timeout: seconds for one answer, from the first byte sent to the last received.
          workers: threads.

        Raises:
          ValueError: not an http(s) URL, one with a password in it, or a key that no header can hold.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint {url!r}: expected a URL such as https://api.openai.com/v1")
        if parts.username or parts.password:
            raise ValueError("the endpoint's URL holds a user or password; give a key in the environment")
        if not all("!" <= character <= "~" for character in key):
            raise ValueError("the key has spaces or characters that are not ASCII; copy it once more")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            logger.warning("the key is sent to %s without encryption; use https", parts.hostname)
        self._url = urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))
        self._name = f"{parts.netloc}{path}"
        self._key = key
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "collect")

    async def complete(self, body: bytes) -> Completion:
        """Asks once.

        Raises:
          EndpointError: no answer came.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._complete, body)

    def close(self) -> None:
        """Lets the threads go, without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _complete(self, body: bytes) -> Completion:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sg4v"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                data = self._read(reply, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        return completion_of(data)

    def _read(self, reply: Any, deadline: float) -> bytes:
        chunks, size = [], 0
        # The socket's own timeout starts anew with every byte.
        while chunk := reply.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end of the answer after {self._timeout:g} s")
            if size > _LARGEST_ANSWER:
                raise OSError(f"an answer of more than {_LARGEST_ANSWER} bytes")
        data = b"".join(chunks)
        if len(self._key) >= _SHORTEST_SECRET:
            data = data.replace(self._key.encode(), b"[key]")
        return data

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> EndpointError:
        try:
            data = self._read(error, deadline)
        except (OSError, http.client.HTTPException):
            data = b""
        found = error_of_status(error.code, data, dict(error.headers))
        found.args = (f"{self._name}: {found}",)
        return found

    def _broken(self, error: Exception) -> EndpointError:
        """A connection that gave no answer. Unless it never came about, the request may be billed."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # urllib wraps what fails up to the end of sending; what fails later comes as it is.
        return EndpointError(
            "transient",
            f"{self._name}: {type(reason).__name__}: {reason}"[:_SHOWN],
            may_be_paid=not isinstance(error, urllib.error.URLError),
        )


def completion_of(data: bytes | Mapping[str, Any]) -> Completion:
    """The answer in the body of a success.

    Raises:
      EndpointError: there is none; some endpoints put errors there.
    """
    try:
        return parse_completion(data)
    except ValueError as error:
        found = _json(data)
        if isinstance(found.get("error"), Mapping):
            code = found["error"].get("code")
            raise error_of_status(code if isinstance(code, int) else 500, data, {}) from error
        raise EndpointError(
            "transient", f"unreadable answer: {error}: {_shown(data)}", status=200, may_be_paid=True
        ) from error


def error_of_status(
    status: int, data: bytes | Mapping[str, Any], headers: Mapping[str, str]
) -> EndpointError:
    """What an HTTP status that is no success means."""
    headers = {name.lower(): value for name, value in headers.items()}
    described = _json(data).get("error")
    details = described if isinstance(described, Mapping) else {}
    kind: Kind = "permanent"
    hint = ""
    if status in _STOP:
        kind, hint = "stop", f" ({_STOP[status]})"
    elif {details.get("code"), details.get("type")} & {*_QUOTA}:
        kind, hint = "stop", " (there is no credit left)"
    elif 300 <= status < 400:
        kind, hint = "stop", f" (it redirects to {headers.get('location')}; give that URL if you trust it)"
    elif status in _TRANSIENT or status >= 500:
        kind = "transient"
    message = details.get("message")
    own = _shown(message.encode() if isinstance(message, str) else data)
    return EndpointError(
        kind, f"HTTP {status}{hint}: {own}", status=status, retry_after=parse_retry_after(headers)
    )


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `Retry-After` (seconds or a date, RFC 9110) or `retry-after-ms`.

    A date counts from the endpoint's own `Date`: clocks differ.
    """
    headers = {name.lower(): value for name, value in headers.items()}
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after") or ""
        try:
            return max(0.0, float(value))
        except ValueError:
            until = email.utils.parsedate_to_datetime(value)
        date = headers.get("date")
        now = email.utils.parsedate_to_datetime(date) if date else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _json(data: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        found = json.loads(data) if isinstance(data, bytes) else data
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _shown(data: bytes | Mapping[str, Any]) -> str:
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else json.dumps(data)
    return " ".join(text.split())[:_SHOWN] or "no message"
