"""Votes on pairs of captions: what came back from a preference page, counted.

The page knows which caption stood left, not whose it was; that is in the key file beside it.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sg4v_jax.page.terminal import printable

CHOICES = ("left", "right", "tie")
_Z = 1.959964  # of a 95 % interval


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of votes with its 95 % interval."""

    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Tally:
    """The result of a vote.

    Attributes:
      names: of the two sets.
      votes: in all.
      pairs: pairs that have at least one vote.
      of_pairs: pairs on the page.
      raters: votes by file.
      first: share for the first set.
      second: share for the second set.
      tie: share of ties.
      left: share of the left caption among votes that are no tie; a half if nobody favours a side.
      p_value: of a two-sided sign test on pairs that have a majority; 1 is no evidence of a difference.
      agreement: share of equal votes among pairs of raters on the same pair; None with one rater.
    """

    names: tuple[str, str]
    votes: int
    pairs: int
    of_pairs: int
    raters: dict[str, int]
    first: Share
    second: Share
    tie: Share
    left: Share
    p_value: float
    agreement: float | None


def tally(votes: Sequence[str | os.PathLike[str]], key: str | os.PathLike[str] | None = None) -> Tally:
    """Counts the votes of one or more raters.

    Raters who see the same pair are no independent evidence. The intervals count pairs, not votes, which
    is on the safe side: they are Wilson's for the number of pairs.

    Args:
      votes: files that a preference page gave.
      key: the key file of that page; by default the only `*.key.json` beside the first file of votes.

    Raises:
      ValueError: a file is not what it should be, or of another page; a rater comes twice.
    """
    key = pathlib.Path(key) if key else _find_key(pathlib.Path(votes[0]))
    page = _read(key, ("page", "names", "left"))
    if not isinstance(page["left"], list) or not set(page["left"]) <= {0, 1} or len(page["names"]) != 2:
        raise ValueError(f"{key}: damaged; make the page and its key again with the same --seed")
    raters: dict[str, dict[int, str]] = {}
    for path in map(pathlib.Path, votes):
        ballot = _read(path, ("page", "rater", "votes"))
        if ballot["page"] != page["page"]:
            raise ValueError(
                f"{path}: votes of page {ballot['page']!r}, but {key} is of {page['page']!r}; give the key "
                "that was written with that page"
            )
        name = str(ballot["rater"]) or path.name
        if name in raters:
            raise ValueError(f"{path}: a second file by rater {name!r}; give one file for each rater")
        raters[name] = _votes(path, ballot["votes"], len(page["left"]))
    return _tally(page, raters)


def _tally(page: Mapping[str, Any], raters: Mapping[str, Mapping[int, str]]) -> Tally:
    left_set: list[int] = page["left"]
    by_pair: dict[int, list[str]] = collections.defaultdict(list)
    for ballot in raters.values():
        for pair, vote in ballot.items():
            by_pair[pair].append(vote)
    # 0 and 1 are the sets, as the key has them on the left; None is a tie.
    winners = {
        pair: [{"left": left_set[pair], "right": 1 - left_set[pair], "tie": None}[vote] for vote in cast]
        for pair, cast in by_pair.items()
    }
    total, pairs = sum(map(len, by_pair.values())), len(by_pair)
    if not total:
        raise ValueError("no votes in these files")
    counts = collections.Counter(winner for cast in winners.values() for winner in cast)
    sides = collections.Counter(vote for cast in by_pair.values() for vote in cast)
    sided = [pair for pair, cast in by_pair.items() if set(cast) != {"tie"}]
    first, second = (sum(_majority(cast) == index for cast in winners.values()) for index in (0, 1))
    names = page["names"]
    return Tally(
        names=(str(names[0]), str(names[1])),
        votes=total,
        pairs=pairs,
        of_pairs=len(left_set),
        raters={name: len(ballot) for name, ballot in raters.items()},
        first=wilson(counts[0] / total, pairs),
        second=wilson(counts[1] / total, pairs),
        tie=wilson(counts[None] / total, pairs),
        left=wilson(sides["left"] / max(1, sides["left"] + sides["right"]), len(sided)),
        p_value=sign_test(first, second),
        agreement=_agreement(by_pair.values()),
    )


def summary(result: Tally) -> str:
    """A tally in a few lines."""
    rows = [*zip(result.names, (result.first, result.second), strict=True), ("comparable", result.tie)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{result.votes} votes by {len(result.raters)} on {result.pairs} of {result.of_pairs} pairs"]
    for name, of in rows:
        lines.append(f"  {name:<{width}}  {of.share:6.1%}  ({of.low:.1%} to {of.high:.1%})")
    lines.append(f"sign test: p = {result.p_value:.3g}; left was chosen {result.left.share:.0%} of the time")
    if result.agreement is not None:
        lines.append(f"raters agree on {result.agreement:.0%} of pairs that they share")
    return printable("\n".join(lines))


def wilson(share: float, count: int) -> Share:
    """Wilson's 95 % interval of a share of `count` independent trials."""
    if not count:
        return Share(share, 0.0, 1.0)
    middle = share + _Z**2 / (2 * count)
    reach = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return Share(share, max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale))


def sign_test(first: int, second: int) -> float:
    """The probability of a split at least this uneven if both were equally likely (exact, two-sided)."""
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**total)


def _majority(cast: Iterable[int | None]) -> int | None:
    counts = collections.Counter(cast)
    gain = counts[0] - counts[1]
    return None if not gain else int(gain < 0)


def _agreement(pairs: Iterable[Sequence[str]]) -> float | None:
    equal = both = 0
    for cast in pairs:
        both += len(cast) * (len(cast) - 1) // 2
        equal += sum(count * (count - 1) // 2 for count in collections.Counter(cast).values())
    return equal / both if both else None


def _votes(path: pathlib.Path, votes: object, pairs: int) -> dict[int, str]:
    if not isinstance(votes, dict):
        raise ValueError(f"{path}: 'votes' is not an object; download the file again from the page")
    found = {}
    for pair, vote in votes.items():
        if not pair.isdecimal() or int(pair) >= pairs or vote not in CHOICES:
            expected = f"a pair below {pairs} and one of {', '.join(CHOICES)}"
            raise ValueError(f"{path}: vote {pair!r}: {vote!r}; expected {expected}")
        found[int(pair)] = vote
    return found


def _read(path: pathlib.Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise ValueError(f"{path}: expected a JSON object with {', '.join(keys)}")
    return value


def _find_key(votes: pathlib.Path) -> pathlib.Path:
    found = sorted(votes.absolute().parent.glob("*.key.json"))
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{votes}: which page is it of? Give --key; beside it there is {there}")
    return found[0]
