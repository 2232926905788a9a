"""Whether a model says different things, or the same ones again and again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

_OPENING = 3  # words
_MAX_ORDER = 4  # of BLEU's n-grams

T = TypeVar("T")
Counts = Counter[tuple[Hashable, ...]]
Most = dict[tuple[Hashable, ...], tuple[int, int, int]]


@dataclass(frozen=True)
class Generated:
    """A text that a model has made.

    Args:
        ids: its tokens.
        text: the same.
        is_ended: whether the model ended it, and not a limit.
    """

    ids: tuple[int, ...]
    text: str
    is_ended: bool


@dataclass(frozen=True)
class Diversity:
    """Of some texts; by tokens, since a model that writes line breaks alone, or no spaces, writes no words.

    Args:
        distinct_2: share of pairs of tokens that are distinct, over all texts (arXiv 1510.03055).
        repetition_4: share of sequences of four tokens that occurred earlier in their text, mean over the texts
            (arXiv 1908.04319).
        self_bleu: BLEU-4 of each text against the others, mean, of 100 (arXiv 1802.01886).
        commonest_opening: share of the texts that begin with the commonest three words.
        mean_length: tokens.
        ended_share: share of the texts that came to an end by themselves.
        opening: the commonest three words.
    """

    distinct_2: float
    repetition_4: float
    self_bleu: float
    commonest_opening: float
    mean_length: float
    ended_share: float
    opening: str = field(default="", compare=False)


def measure_diversity(texts: Sequence[Generated]) -> Diversity:
    """All of it; nan where the texts are too short to say.

    Raises:
        ValueError: there are no texts.
    """
    ids = [text.ids for text in _some(texts)]
    opening, share = commonest_opening([text.text.split() for text in texts])
    return Diversity(
        distinct_n(ids, 2),
        repetition_n(ids, 4),
        self_bleu(ids),
        share,
        sum(len(text.ids) for text in texts) / len(texts),
        sum(text.is_ended for text in texts) / len(texts),
        opening,
    )


def ngrams(words: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All sequences of n neighbours, in order.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n-grams of {n} words: wanted at least 1")
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts; nan where no text has n words.

    It falls with the number and the length of the texts: compare it between as many, from the same prompts.

    Raises:
        ValueError: there are no texts, or n is below 1.
    """
    found = [gram for words in _some(texts) for gram in ngrams(words, n)]
    return len(set(found)) / len(found) if found else math.nan


def repetition_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """``1 - distinct / all`` of a text's n-grams: the share that occurred in it before; mean over the texts with any.

    Raises:
        ValueError: there are no texts, or n is below 1.
    """
    shares = [1 - len(set(grams)) / len(grams) for words in _some(texts) if (grams := ngrams(words, n))]
    return sum(shares) / len(shares) if shares else math.nan


def commonest_opening(texts: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The commonest first three words, and the share of the texts that begin with them.

    A shorter text is its own opening, an empty one has none; of equally common ones it is that which comes first.

    Raises:
        ValueError: there are no texts.
    """
    openings = Counter(" ".join(words[:_OPENING]) for words in _some(texts) if words)
    (opening, count) = openings.most_common(1)[0] if openings else ("", 0)
    return opening, count / len(texts)


def self_bleu(texts: Sequence[Sequence[Hashable]]) -> float:
    """BLEU of each text with the others as its references, mean over the texts that have words, of 100.

    BLEU-4 (Papineni et al. 2002): the geometric mean of n-gram precisions, clipped by the most that one reference has,
    times the brevity penalty for the reference of the nearest length, the shorter of two. The first order that has no
    match counts as half a match, the next as a quarter, and so on; n-grams longer than the text are left out; without
    any match it is 0: sacrebleu's sentence BLEU, with ``exp`` smoothing and effective order. nan for a single text.

    Raises:
        ValueError: there are no texts.
    """
    if len(_some(texts)) < 2:
        return math.nan
    counts = [[Counter(ngrams(words, n)) for n in range(1, _MAX_ORDER + 1)] for words in texts]
    most = [_two_most([by_order[n] for by_order in counts]) for n in range(_MAX_ORDER)]
    lengths = Counter(len(words) for words in texts)
    scores = []
    for index, words in enumerate(texts):
        if words:
            others = [length for length, count in lengths.items() if count > 1 or length != len(words)]
            scores.append(_bleu(_matches(index, counts[index], most), len(words), _nearest(len(words), others)))
    return sum(scores) / len(scores) if scores else math.nan


def _some(texts: Sequence[T]) -> Sequence[T]:
    if not texts:
        raise ValueError("no texts: diversity is of at least one")
    return texts


def _two_most(counts: Sequence[Counts]) -> Most:
    """Of each n-gram: the text that has most of it, how many, and the most that any other text has."""
    most: Most = {}
    for index, counter in enumerate(counts):
        for gram, count in counter.items():
            owner, first, second = most.get(gram, (-1, 0, 0))
            most[gram] = (index, count, first) if count > first else (owner, first, max(second, count))
    return most


def _matches(index: int, counts: Sequence[Counts], most: Sequence[Most]) -> list[int]:
    """By order, how many n-grams of a text are in another one, each at most as often as it is there."""
    matches = [0] * len(counts)
    for order, (counter, most_of) in enumerate(zip(counts, most, strict=True)):
        for gram, count in counter.items():
            owner, first, second = most_of[gram]
            matches[order] += min(count, second if owner == index else first)
    return matches


def _nearest(length: int, others: Sequence[int]) -> int:
    return min(others, key=lambda other: (abs(other - length), other))


def _bleu(matches: Sequence[int], length: int, nearest: int) -> float:
    if not any(matches):
        return 0.0
    logs, smoothed = [], 1.0
    for order, matched in enumerate(matches[:length]):
        if not matched:
            smoothed /= 2
        logs.append(math.log((matched or smoothed) / (length - order)))
    brevity = min(0.0, 1 - nearest / length)
    return 100 * math.exp(brevity + sum(logs) / len(logs))
