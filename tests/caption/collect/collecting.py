"""Opens a collection on the test's images and runs it, as the command does."""

import asyncio
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from sg4v_jax.caption.collect.collection import Settings, Summary, open_collection
from sg4v_jax.caption.collect.collector import Collector, Pace, Stop
from sg4v_jax.caption.collect.endpoint import Endpoint
from sg4v_jax.caption.collect.ledger import Prices
from tests.caption.collect.endpoint import KEY, MODEL

PRICES = Prices(10.0, 30.0)
# Twice the longest test: only a fault that is meant to may run into it.
TIMEOUT = 60.0


def settings(**changes: Any) -> Settings:
    return Settings(**({"model": MODEL, "prices": PRICES} | changes))


def collect(
    images: Iterable[str],
    root: pathlib.Path,
    output: pathlib.Path,
    endpoint: Any,
    *,
    pace: Pace | None = None,
    timeout: float = TIMEOUT,
    run: Callable[..., Any] = asyncio.run,
    retry_failed: bool = False,
    **changes: Any,
) -> tuple[Summary, Stop, Any]:
    """(summary, why it stopped, ledger) of one run; `endpoint` is a URL or answers by itself."""
    pace = pace or Pace(workers=4, backoff=0.01)
    asked = (
        Endpoint(endpoint, KEY, timeout=timeout, workers=pace.workers)
        if isinstance(endpoint, str)
        else endpoint
    )
    with open_collection(list(images), root, output, settings(**changes)) as collection:
        if retry_failed:
            collection.ledger.reopen_failed()

        async def main() -> Stop:
            return await Collector(collection, asked, pace).run()

        stop = run(main())
        return collection.write_outputs(), stop, collection.ledger


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def captions(output: pathlib.Path) -> dict[str, str]:
    """Image -> caption, of the LLaVA-format output."""
    records = json.loads((output / "captions.json").read_text())
    return {record["image"]: record["conversations"][1]["value"] for record in records}
