"""What a model costs: counts are exact, memory is that of the tensors, speeds are speeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.compression import QuantizationAwareTraining
from kd_recipes.evaluation.cost import Cost, measure_cost
from kd_recipes.models import llama
from kd_recipes.tally import Tally

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 512,
    "max_seq_len": 512,
}
QUICK: dict[str, Any] = {"num_bytes": 77, "num_new_tokens": 2, "repeats": 1}
BLOCK = 256 * (256 + 64 + 64 + 256 + 3 * 512) + 2 * 256  # parameters of one


@pytest.fixture
def model() -> TransformerDecoder:
    torch.manual_seed(0)
    return llama(**SIZES)


def cache(num_positions: int) -> int:
    """Bytes of keys and values."""
    return 4 * 4 * 2 * 2 * 32 * num_positions


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_table_counts_once(is_tied: bool) -> None:
    cost = measure_cost(llama(**SIZES, tie_word_embeddings=is_tied), **QUICK)
    assert cost.num_parameters == 4 * BLOCK + 256 + 320 * 256 * (1 if is_tied else 2)
    assert cost.num_bytes == 77
    assert cost.num_threads == torch.get_num_threads()


def test_memory_is_that_of_weights_and_tensors(model: TransformerDecoder) -> None:
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())

    def grown(**settings: int) -> float:
        return measure_cost(model, **{**QUICK, **settings}).peak_memory_bytes - weights

    short, long = grown(prompt_length=64), grown(prompt_length=256)
    assert grown(prompt_length=64) == short  # whatever the process did before
    # the cache of all blocks, and what a feed-forward layer holds at a time: its input, and twice its inner width
    assert short > cache(66) + 4 * 64 * (256 + 2 * 512)
    assert short < cache(66) + 4 * 64 * (4 * 256 + 3 * 512) + 2**16
    assert long - short > cache(192)
    # room for what is still to come is made at the beginning
    assert grown(prompt_length=64, num_new_tokens=102) - short >= cache(100)


def test_weights_that_are_rounded_in_use_are_there_twice(model: TransformerDecoder) -> None:
    before = measure_cost(model, **QUICK)
    QuantizationAwareTraining("int4_g32").attach(model)
    after = measure_cost(model, **QUICK)
    assert after.num_parameters == before.num_parameters
    assert after.peak_memory_bytes - before.peak_memory_bytes >= 4 * 4 * (BLOCK - 512)


def test_a_tally_knows_what_is_there_at_a_time() -> None:
    before = torch.ones(1000)
    tally = Tally()
    with tally:
        first = before * 2
        view = first.view(10, 100)
        view += 1
        assert tally.peak == 4000
        del first
        second = torch.cat((before, view.flatten()))
        assert tally.peak == 12_000  # `view` keeps the first
        del view, second
        third = before.t()
        torch.ones(2000)
    assert tally.peak == 12_000
    del before, third  # after it was left, too


def test_reading_is_faster_than_writing(model: TransformerDecoder) -> None:
    cost = measure_cost(model, num_bytes=1, prompt_length=256, num_new_tokens=16)
    # 256 positions at a time use a matrix better than one at a time does
    assert cost.prefill_tokens_per_second > 2 * cost.decode_tokens_per_second > 0


def test_lengths_are_cut_to_the_positions_that_there_are() -> None:
    torch.manual_seed(0)
    cost = measure_cost(llama(**{**SIZES, "max_seq_len": 8}), num_bytes=1, repeats=1)
    assert isinstance(cost, Cost)


def test_a_model_without_its_head_costs_the_same(model: TransformerDecoder) -> None:
    whole = measure_cost(model, **QUICK)
    headless = _torchtune.Headless(model)
    assert measure_cost(model, **QUICK).peak_memory_bytes == whole.peak_memory_bytes
    del headless
