"""What a server's numbers become: probabilities that sum to 1, ids that are told apart, or neither and an error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_recipes.errors import ConfigError, RunError
from kd_recipes.teachers.remote.client import redacted
from kd_recipes.teachers.remote.dialects import LlamaCppPython, Request, Vllm
from kd_recipes.teachers.remote.pieces import Pieces
from kd_recipes.teachers.remote.rows import Rows, with_tail
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer
from toy import VOCABULARY, Toys


@pytest.fixture(scope="module")
def tokenizer(toys: Toys) -> HFTokenizer:
    return hf_tokenizer(str(toys.student))


@given(st.lists(st.floats(-30, 30), min_size=12, max_size=12), st.integers(1, 12))
def test_named_and_others_sum_to_one(logits: list[float], k: int) -> None:
    log_p_V = torch.tensor(logits).log_softmax(-1)
    named_1K = log_p_V.topk(k).values.numpy()[None]
    log_p_1K, tail_1 = with_tail(named_1K, 12)
    assert np.exp(log_p_1K).sum() + np.exp(tail_1[0]) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(np.exp(log_p_1K), np.exp(named_1K), atol=3e-6)
    rest = 1 - np.exp(named_1K.astype(np.float64)).sum()
    assert np.exp(tail_1[0]) == pytest.approx(0 if k == 12 else max(rest, 0), abs=3e-6)
    assert np.isneginf(tail_1[0]) == (k == 12)


def test_what_adds_up_to_more_than_one_is_refused() -> None:
    with pytest.raises(RunError, match=r"add up to 1\.2"):
        with_tail(np.log(np.array([[0.7, 0.5]], np.float32)), 10)
    with pytest.raises(RunError, match="add up to nan"):
        with_tail(np.array([[np.nan, -1.0]], np.float32), 10)


def test_rows_keep_the_likeliest_and_know_the_label() -> None:
    rows = Rows.of([{4: -1.0, 2: -0.5, 9: -3.0}, {7: -0.1}, {}], [9, 1, 1], 2)
    assert rows.ids_nK.tolist() == [[2, 4], [7, 0], [0, 0]]
    assert rows.log_p_nK[0].tolist() == [-0.5, -1.0]
    assert rows.log_p_nK[2].tolist() == [-math.inf, -math.inf]
    assert rows.log_p_label_n[0] == -3.0
    assert np.isnan(rows.log_p_label_n[1:]).all()
    assert rows.first(3).log_p_nK[0].tolist() == [-0.5, -math.inf]


def test_pieces_are_what_the_tokenizer_splits(tokenizer: HFTokenizer) -> None:
    pieces = Pieces.of(tokenizer)
    text = 'Größe, 東京 🎉 "the cat"\n\tsat<|im_end|> on'
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert pieces.text(ids) == text
    halves = [index for index in ids if pieces.text([index]) is None]
    assert halves  # the toy has single bytes of the characters that are not ASCII
    for index in halves:
        assert index not in pieces.ids.values()
    special = set(tokenizer.special_tokens.values())
    for text, index in pieces.ids.items():
        assert text in pieces.written[index]
        assert index in special or tokenizer.decode([index]) == text
    assert pieces.num_shared == VOCABULARY - len(set(pieces.ids.values()) - special)


def test_pieces_need_the_bytes_of_ids() -> None:
    with pytest.raises(ConfigError, match="hf_tokenizer"):
        Pieces.of(object())


def _echo(tokenizer: HFTokenizer, bos_id: int, asked: list[Request]):  # type: ignore[no-untyped-def]
    """What llama-cpp-python 0.3.36 answers, as it was seen to, where what comes after token i is token i for sure."""
    pieces = Pieces.of(tokenizer)

    def ask(request: Request) -> object:
        asked.append(request)
        if request.path == "/extras/tokenize":
            return {"tokens": tokenizer.encode(str(request.content["input"]), add_bos=False, add_eos=False)}
        ids = tokenizer.encode(str(request.content["prompt"]), add_bos=False, add_eos=False)
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}

        def entry(index: int) -> dict[str, float]:
            return {next(iter(sorted(pieces.written[index]))): -0.25}

        if not request.content.get("echo"):
            logprobs = {"tokens": ["x"], "token_logprobs": [-9.0], "top_logprobs": [entry(ids[-1])]}
            return {"choices": [{"logprobs": logprobs}], "usage": usage}
        rows = range(len(ids))
        own = [*ids[1:], 3] if ids[0] == bos_id else ids
        shown = [(own[row], ids[row]) for row in rows if own[row] != bos_id]
        top = [None, *(entry(after) for _, after in shown[1:])]
        tokens = ["" if index in tokenizer.special_tokens.values() else pieces.text([index]) for index, _ in shown]
        logprobs = {"tokens": tokens, "token_logprobs": [None] + [-4.0] * (len(shown) - 1), "top_logprobs": top}
        return {"choices": [{"logprobs": logprobs}], "usage": usage}

    return ask


@pytest.mark.parametrize("text", ["the cat sat", "<|im_start|>the cat<|im_end|>", "on a<|im_start|>mat", "a"])
def test_positions_of_an_echo(text: str, tokenizer: HFTokenizer) -> None:
    bos_id = tokenizer.special_tokens["<|im_start|>"]
    asked: list[Request] = []
    ask = _echo(tokenizer, bos_id, asked)
    dialect = LlamaCppPython(None, 4, tokenizer)
    ids = tokenizer.encode(text, add_bos=False, add_eos=True)
    assert dialect.tokenize(text, ask) == ids[:-1]
    rows = dialect.rows(ids, ask)
    special = set(tokenizer.special_tokens.values())
    for place, index in enumerate(ids[:-1]):
        known = dict(zip(rows.ids_nK[place].tolist(), rows.log_p_nK[place].tolist(), strict=True))
        assert index in special or known[index] == pytest.approx(-0.25) or known[index] == -4.0


def test_another_tokenization_is_named(tokenizer: HFTokenizer) -> None:
    dialect = LlamaCppPython(None, 4, tokenizer)
    ids = tokenizer.encode("the cat sat", add_bos=False, add_eos=False)
    letters = [index for char in "cat" for index in tokenizer.encode(char, add_bos=False, add_eos=False)]
    with pytest.raises(RunError, match=r"has 3 tokens here, and \d there: 'cat'"):
        dialect.rows(letters, _echo(tokenizer, 1, []))
    with pytest.raises(RunError, match="inside a character"):
        dialect.rows(tokenizer.encode("東", add_bos=False, add_eos=False)[:2], _echo(tokenizer, 1, []))
    assert len(ids) > 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "no prompt_logprobs"),
        ({"prompt_logprobs": [None]}, "1 prompt_logprobs"),
        ({"prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}, "without id 7"),
        ({"prompt_logprobs": [None, {"7": -1.0}]}, "{id: {logprob: number}}"),
    ],
)
def test_what_is_not_vllms_is_refused(choice: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Vllm("m", 2, None).rows([3, 7], lambda _: {"choices": [choice]})
    with pytest.raises(RunError, match="no choices"):
        Vllm("m", 2, None).rows([3, 7], lambda _: {"error": "?"})


def test_addresses_are_shown_without_what_may_be_secret() -> None:
    assert redacted("http://host:8000/v1") == "http://host:8000/v1"
    for url in ("https://me:hidden@host/v1", "https://host/v1?key=hidden", "https://host/v1#hidden"):
        assert "hidden" not in redacted(url)
