"""What comes over the wire, and what it means; the key stays where it belongs."""

import asyncio
import json
import logging

import pytest

from sg4v_jax.caption.collect.endpoint import (
    Endpoint,
    EndpointError,
    completion_of,
    error_of_status,
    parse_retry_after,
)
from sg4v_jax.caption.collect.request import Item, RequestOptions, body
from tests.caption.collect.endpoint import KEY, MAYBE_PAID, MODEL, FaultyEndpoint
from tests.caption.collect.test_request import encoded

IMAGE = encoded("PNG")
BODY = json.dumps(body(Item("a.png", "ab" * 32, 64, 32, "web", "What?", MODEL), IMAGE, RequestOptions(), 0))


def ask(endpoint: FaultyEndpoint, fault: str, key: str = KEY, url: str = "") -> EndpointError:
    """What a fault becomes."""
    endpoint.faults["*"] = [fault]
    asked = Endpoint(url or endpoint.url, key, timeout=0.5)
    with pytest.raises(EndpointError) as error:
        asyncio.run(asked.complete(BODY.encode()))
    asked.close()
    return error.value


def test_a_good_answer(endpoint: FaultyEndpoint) -> None:
    asked = Endpoint(endpoint.url + "/?version=1", KEY)
    found = asyncio.run(asked.complete(BODY.encode()))
    assert found.text.startswith("Image ") and found.completion_tokens == 50
    (seen,) = endpoint.asked
    assert seen.path == "/v1/chat/completions?version=1" and seen.image == IMAGE
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["content-type"] == "application/json"
    asyncio.run(Endpoint(endpoint.url + "/chat/completions").complete(BODY.encode()))
    assert endpoint.asked[1].path == "/v1/chat/completions"
    assert "authorization" not in endpoint.asked[1].headers


@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [
        ("429", "transient", 429),
        ("408", "transient", 408),
        ("409", "transient", 409),
        ("500", "transient", 500),
        ("error-in-200", "transient", 502),
        ("400-content_policy_violation", "permanent", 400),
        ("404", "permanent", 404),
        ("413", "permanent", 413),
        ("401", "stop", 401),
        ("402", "stop", 402),
        ("403", "stop", 403),
        ("429-insufficient_quota", "stop", 429),
        ("redirect", "stop", 302),
    ],
)
def test_kinds_of_errors(endpoint: FaultyEndpoint, fault: str, kind: str, status: int) -> None:
    error = ask(endpoint, fault)
    assert (error.kind, error.status, error.may_be_paid) == (kind, status, False)
    assert KEY not in str(error) and str(status) in str(error)
    assert len(endpoint.asked) == 1, "a redirect isn't followed: it would take the key along"


@pytest.mark.parametrize("fault", MAYBE_PAID)
def test_what_may_have_been_paid(endpoint: FaultyEndpoint, fault: str) -> None:
    error = ask(endpoint, fault)
    assert (error.kind, error.may_be_paid) == ("transient", True)


def test_nobody_there(endpoint: FaultyEndpoint) -> None:
    error = ask(endpoint, "", url="http://127.0.0.1:1/v1")
    assert (error.kind, error.may_be_paid, error.status) == ("transient", False, 0)
    assert "127.0.0.1:1" in str(error)


def test_the_key_is_blotted_out_of_answers(endpoint: FaultyEndpoint) -> None:
    endpoint.faults["*"] = ["echo"]
    found = asyncio.run(Endpoint(endpoint.url, KEY).complete(BODY.encode()))
    assert "The label reads Bearer [key]" in found.text
    assert KEY not in repr(vars(ask(endpoint, "400")))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (
            {
                "RETRY-AFTER": "Wed, 21 Oct 2015 07:28:30 GMT",
                "date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            30.0,
        ),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_retry_after(headers) == seconds
    assert error_of_status(429, b"", headers).retry_after == seconds


def test_errors_show_the_endpoints_words() -> None:
    error = error_of_status(400, b'{"error": {"message": "image\\n too large"}}', {})
    assert str(error) == "HTTP 400: image too large"
    assert str(error_of_status(500, b"", {})) == "HTTP 500: no message"
    assert len(str(error_of_status(500, b"x" * 10**6, {}))) < 400
    with pytest.raises(EndpointError, match="unreadable answer"):
        completion_of(b"<html>")


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("api.openai.com/v1", "", "expected a URL"),
        ("file:///etc/passwd", "", "expected a URL"),
        ("https://me:secret@host/v1", "", "user or password"),
        ("https://host/v1", "sk-a\nb", "spaces or characters"),
    ],
)
def test_bad_endpoints(url: str, key: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(url, key)
    assert "secret" not in str(error.value) and "sk-a" not in str(error.value)


def test_a_key_in_the_clear_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Endpoint("http://localhost:8000/v1", KEY)
        Endpoint("https://far.example/v1", KEY)
        assert not caplog.records
        Endpoint("http://far.example/v1", KEY)
    assert "without encryption" in caplog.text and KEY not in caplog.text
