"""CIDEr-D and BLEU of captions, as COCO's tool defines them (Vedantam et al. 2015; Papineni et al. 2002).

COCO's tool splits words with Stanford's tokenizer, which needs Java. Ours comes close (lower case, no
punctuation, clitics split off) without being the same program, so numbers may differ in the first decimal.
"""

import collections
import math
import re
from collections.abc import Sequence

import numpy as np

Counts = collections.Counter[tuple[str, ...]]

MAX_N = 4
_SIGMA = 6.0
_SCALE = 10.0
_CLITIC = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll)|n't)\b")
_WORD = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-.,/']\w+)*")


def words(caption: str) -> list[str]:
    """A caption's words in lower case, without punctuation, `isn't` as `is n't`."""
    return _WORD.findall(_CLITIC.sub(r" \1", caption.lower()))


def ngrams(tokens: Sequence[str]) -> Counts:
    """How often each sequence of one to four words occurs."""
    return collections.Counter(
        tuple(tokens[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(tokens) - n + 1)
    )


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, between 0 and 10; the weights of n-grams come from all references.

    Args:
      captions: one for each image.
      references: people's captions of each image.
    """
    people = [[ngrams(words(text)) for text in texts] for texts in references]
    frequency: collections.Counter[tuple[str, ...]] = collections.Counter(
        gram for counts in people for gram in set().union(*counts)
    )
    images = math.log(max(len(people), 1))

    def vector(counts: Counts) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weighted = {gram: n * (images - math.log(max(1, frequency[gram]))) for gram, n in counts.items()}
        norms = [0.0] * MAX_N
        for gram, weight in weighted.items():
            norms[len(gram) - 1] += weight**2
        return weighted, [math.sqrt(norm) for norm in norms], sum(n for g, n in counts.items() if len(g) == 2)

    scores = []
    for caption, counts in zip(captions, people, strict=True):
        own = vector(ngrams(words(caption)))
        total = sum(_similarity(own, vector(reference)) for reference in counts)
        scores.append(_SCALE * total / max(len(counts), 1))
    return scores


def _similarity(
    own: tuple[dict[tuple[str, ...], float], list[float], int],
    reference: tuple[dict[tuple[str, ...], float], list[float], int],
) -> float:
    """Cosines of clipped weights, averaged over n, less for another length."""
    products = [0.0] * MAX_N
    for gram, weight in own[0].items():
        theirs = reference[0].get(gram, 0.0)
        products[len(gram) - 1] += min(weight, theirs) * theirs
    cosines = [
        product / (a * b) if a and b else product
        for product, a, b in zip(products, own[1], reference[1], strict=True)
    ]
    return sum(cosines) / MAX_N * math.exp(-((own[2] - reference[2]) ** 2) / (2 * _SIGMA**2))


def bleu_counts(caption: str, references: Sequence[str]) -> tuple[list[int], list[int], int, int]:
    """(matches by n, guesses by n, length, length of the closest reference) of one caption."""
    tokens, people = words(caption), [words(text) for text in references]
    own = ngrams(tokens)
    limits: Counts = collections.Counter()
    for text in people:
        limits |= ngrams(text)
    matches, guesses = [0] * MAX_N, [0] * MAX_N
    for gram, count in own.items():
        guesses[len(gram) - 1] += count
        matches[len(gram) - 1] += min(count, limits[gram])
    length = len(tokens)
    closest = min((abs(len(text) - length), len(text)) for text in people)[1]
    return matches, guesses, length, closest


def bleu(ratios: Sequence[np.ndarray]) -> np.ndarray:
    """100 times BLEU, of the corpus' n-gram precisions and, last, its length over the references'."""
    *precisions, length = ratios
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = np.exp(np.mean([np.log(np.nan_to_num(precision)) for precision in precisions], axis=0))
        penalty = np.minimum(1.0, np.exp(1 - 1 / length))
    result: np.ndarray = 100.0 * penalty * geometric
    return result
