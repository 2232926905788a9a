"""What the texts of a model have in common, against counts by hand, sacrebleu's scores, and a BLEU written out."""

import math
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kd_recipes.evaluation.diversity import (
    Generated,
    commonest_opening,
    distinct_n,
    measure_diversity,
    repetition_n,
    self_bleu,
)

_TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=6)
# Of each text against the others: sacrebleu 2.6.0, sentence_bleu(text, others, tokenize="none").
_SACREBLEU = {
    "the cat sat on the mat today": 45.499414040480374,
    "the cat sat on a mat": 47.601165492440046,
    "a dog ran": 19.716118825581447,
    "the the the cat": 35.35533905932737,
    "hello": 0.0,
}


def _split(*texts):
    return [text.split() for text in texts]


def _generated(text: str, is_ended: bool = True) -> Generated:
    return Generated(tuple(ord(word[0]) for word in text.split()), text, is_ended)


def _bleu_written_out(text, others):
    """By searching and striking out, n-gram for n-gram, without a table of counts."""

    def grams(words, n):
        return [words[i : i + n] for i in range(len(words)) if i + n <= len(words)]

    precisions, num_misses = [], 0
    for n in (1, 2, 3, 4):
        matched = 0
        for gram in {tuple(gram) for gram in grams(text, n)}:
            ours = sum(list(gram) == found for found in grams(text, n))
            theirs = [sum(list(gram) == found for found in grams(other, n)) for other in others]
            matched += min(ours, max(theirs))
        if n == 1 and not matched:
            return 0.0  # no word in common, so nothing longer either
        if grams(text, n):
            num_misses += not matched
            precisions.append((matched if matched else 0.5**num_misses) / len(grams(text, n)))
    shortest_first = sorted(len(other) for other in others)
    reference = sorted(shortest_first, key=lambda length: abs(length - len(text)))[0]
    penalty = 1.0 if len(text) >= reference else math.exp(1 - reference / len(text))
    return 100 * penalty * math.prod(precisions) ** (1 / len(precisions))


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab, ba, ab
        (["a b", "a b"], 2, 1 / 2),  # over all texts, not within each
        (["a b", "b"], 2, 1.0),  # no pair across the texts
        (["a b", "", "c"], 1, 1.0),
    ],
)
def test_distinct_n_is_a_share_over_all_texts(texts, n, share):
    assert distinct_n(_split(*texts), n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a a a a a"], 1, 4 / 5),
        (["a b c d a b c d"], 4, 1 / 5),  # of abcd bcda cdab dabc abcd, the last
        (["a b", "a b"], 2, 0.0),  # what another text says is no repetition
        (["a a", "a b c"], 1, (1 / 2 + 0) / 2),  # a mean over texts, not over n-grams
        (["a a", "b"], 2, 0.0),  # a text too short to tell is left out
    ],
)
def test_repetition_n_is_a_mean_over_texts(texts, n, share):
    assert repetition_n(_split(*texts), n) == pytest.approx(share)


@given(_TEXTS, st.integers(1, 5))
@settings(deadline=None)
def test_repetition_n_counts_what_occurred_before(texts, n):
    shares = []
    for words in texts:
        windows = [words[i : i + n] for i in range(len(words) - n + 1)]
        if windows:
            shares.append(sum(window in windows[:i] for i, window in enumerate(windows)) / len(windows))
    found = repetition_n(texts, n)
    assert found == pytest.approx(sum(shares) / len(shares)) if shares else math.isnan(found)


def test_self_bleu_is_the_mean_of_sacrebleus_sentence_scores():
    assert self_bleu(_split(*_SACREBLEU)) == pytest.approx(sum(_SACREBLEU.values()) / len(_SACREBLEU), rel=1e-12)


@given(_TEXTS)
@example([[1, 2], [1, 2]])
@example([[1, 2, 3], [1], [1, 2, 3, 0, 0]])  # two references as near
@example([[1], []])
@settings(max_examples=300, deadline=None)
def test_self_bleu_equals_bleu_written_out(texts):
    others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
    scores = [_bleu_written_out(text, rest) for text, rest in zip(texts, others, strict=True) if text and rest]
    found = self_bleu(texts)
    if not scores:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(sum(scores) / len(scores), abs=1e-9)


def test_self_bleu_of_alike_and_of_unlike_texts():
    assert self_bleu(_split(*["a b c d e"] * 3)) == pytest.approx(100.0)
    assert self_bleu(_split("a b c d e", "f g h i j")) == 0.0


def test_self_bleu_takes_under_a_second_for_64_texts_of_100_tokens():
    draw = random.Random(0)
    texts = [[int(300 * draw.random() ** 3) for _ in range(100)] for _ in range(64)]
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.process_time()
        self_bleu(texts)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1


def test_commonest_opening():
    texts = ["I am a model", "I am a  cat", "I am not", "Yes", "", "Yes"]
    assert commonest_opening(_split(*texts)) == ("I am a", 2 / 6)  # of two as common, the first
    assert commonest_opening(_split(*texts, "Yes")) == ("Yes", 3 / 7)
    assert commonest_opening([[], []]) == ("", 0.0)


def test_measure_diversity():
    texts = [_generated("a b c d a b c d"), _generated("a b c", is_ended=False), _generated("x")]
    found = measure_diversity(texts)
    assert found.distinct_2 == pytest.approx(4 / 9)  # ab bc cd da, of 7 + 2 pairs
    assert found.repetition_4 == pytest.approx(1 / 5)
    assert found.self_bleu == pytest.approx(self_bleu([text.text.split() for text in texts]))
    assert (found.opening, found.commonest_opening) == ("a b c", pytest.approx(2 / 3))
    assert found.mean_length == pytest.approx((8 + 3 + 1) / 3)
    assert found.ended_share == pytest.approx(2 / 3)


def test_a_text_of_tokens_that_are_no_words_is_measured_all_the_same():
    found = measure_diversity([Generated((5,) * 12, "\n" * 12, True)] * 2)
    assert found.mean_length == 12
    assert found.distinct_2 == 1 / 22
    assert found.repetition_4 == 1 - 1 / 9
    assert found.self_bleu == pytest.approx(100)
    assert found.opening == ""


@pytest.mark.parametrize("texts", [[""], ["", ""], ["a"], ["a", ""], ["a", "a"]])
def test_texts_that_are_too_short_are_unknown_and_not_an_error(texts):
    found = measure_diversity([_generated(text) for text in texts])
    assert math.isnan(found.distinct_2)
    assert math.isnan(found.repetition_4)
    assert found.commonest_opening == sum(bool(text) for text in texts) / len(texts)
    assert math.isnan(found.self_bleu) == (len(texts) == 1 or not any(texts))


@pytest.mark.parametrize(
    "measure",
    [
        measure_diversity,
        self_bleu,
        commonest_opening,
        lambda texts: distinct_n(texts, 2),
        lambda texts: repetition_n(texts, 4),
    ],
)
def test_no_texts_are_an_error(measure):
    with pytest.raises(ValueError, match="no texts"):
        measure([])


@pytest.mark.parametrize("measure", [distinct_n, repetition_n])
def test_an_n_below_one_is_an_error(measure):
    with pytest.raises(ValueError, match="at least 1"):
        measure([["a"]], 0)
