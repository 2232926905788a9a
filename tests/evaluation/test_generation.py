"""Continuations with a cache and in batches equal those without; and the model is what it was afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.compression import QuantizationAwareTraining
from kd_recipes.errors import ConfigError
from kd_recipes.evaluation.cost import measure_cost
from kd_recipes.evaluation.generation import Continuation, generate, text_of
from kd_recipes.models import llama, lora_llama

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 64,
}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14]]


def quantized() -> TransformerDecoder:
    model = llama(**SIZES)
    QuantizationAwareTraining("int4_g32").attach(model)
    return model


BUILDERS: dict[str, Callable[[], TransformerDecoder]] = {
    "tied": lambda: llama(**SIZES),
    "qwen2": lambda: qwen2(**SIZES, tie_word_embeddings=False),
    "lora": lambda: lora_llama(**SIZES, **LORA),
    "on a lattice": quantized,
}


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> TransformerDecoder:
    torch.manual_seed(3)
    model = BUILDERS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than they are initialized, so that likeliest ids differ
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def without_cache(model: TransformerDecoder, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    """One whole forward pass a token."""
    was_training = model.training
    model.eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    model.train(was_training)
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_prompts_of_different_lengths_go_on_as_each_alone(model: TransformerDecoder, batch_size: int) -> None:
    found = generate(model, PROMPTS, max_new_tokens=9, batch_size=batch_size)
    assert [text.ids for text in found] == [without_cache(model, prompt, 9) for prompt in PROMPTS]
    assert len({text.ids for text in found}) > 1


def test_a_model_without_its_head_generates_what_it_would_with_it(model: TransformerDecoder) -> None:
    expected = generate(model, PROMPTS, max_new_tokens=5)
    headless = _torchtune.Headless(model)
    assert generate(model, PROMPTS, max_new_tokens=5) == expected
    del headless


def test_a_stop_id_ends_a_text_and_is_not_in_it(model: TransformerDecoder) -> None:
    whole = without_cache(model, PROMPTS[0], 8)
    stop = whole[5]
    first = whole.index(stop)
    found = generate(model, PROMPTS, max_new_tokens=8, stop_ids=[stop])
    assert found[0] == Continuation(whole[:first], True)
    for text in found:
        assert stop not in text.ids
        assert text.is_ended == (len(text.ids) < 8)


def test_the_model_trains_on_as_if_nothing_had_happened(model: TransformerDecoder) -> None:
    tokens_BS = torch.tensor([PROMPTS[0]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(model(tokens_BS)[0, :-1], tokens_BS[0, 1:]).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.train()
    before = gradients()
    generate(model, PROMPTS, max_new_tokens=4, temperature=1.0)
    measure_cost(model, num_bytes=1, prompt_length=8, num_new_tokens=2, repeats=1)
    assert model.training
    assert all(module.training for module in model.modules())
    after = gradients()
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_drawn_follows_the_distribution_and_the_seed() -> None:
    torch.manual_seed(0)
    model = llama(**SIZES)
    with torch.no_grad():
        model.tok_embeddings.weight.normal_(std=0.15)
    prompts = [[1, 2, 3]] * 4000
    drawn = generate(model, prompts, max_new_tokens=1, temperature=0.7, seed=5, batch_size=1000)
    assert drawn == generate(model, prompts, max_new_tokens=1, temperature=0.7, seed=5, batch_size=17 * 50)
    assert drawn != generate(model, prompts, max_new_tokens=1, temperature=0.7, seed=6, batch_size=1000)
    model.eval()
    with torch.no_grad():
        expected_V = 4000 * (model(torch.tensor([[1, 2, 3]]))[0, -1] / 0.7).softmax(-1)
    counts = Counter(text.ids[0] for text in drawn)
    likely = [id_ for id_ in range(V) if expected_V[id_] >= 5]
    assert len(likely) > 5
    chi_square = sum((counts[id_] - float(expected_V[id_])) ** 2 / float(expected_V[id_]) for id_ in likely)
    assert chi_square < len(likely) + 4 * (2 * len(likely)) ** 0.5


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [([[]], {}), ([[1] * 60], {"max_new_tokens": 10}), ([[V]], {}), ([[1]], {"temperature": -1.0})],
)
def test_bad_input(prompts: list[list[int]], settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        generate(llama(**SIZES), prompts, **{"max_new_tokens": 4, **settings})


def test_cost_counts_a_tied_table_once_and_takes_time() -> None:
    torch.manual_seed(0)
    model = llama(**{**SIZES, "embed_dim": 256, "num_layers": 4, "max_seq_len": 512})
    cost = measure_cost(model, num_bytes=77, prompt_length=256, num_new_tokens=16)
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    assert cost.num_parameters == sum(parameter.numel() for parameter in weights.values())
    assert cost.num_bytes == 77
    assert cost.peak_memory_bytes >= 4 * cost.num_parameters
    assert cost.num_threads == torch.get_num_threads()
    # 256 positions at a time use a matrix better than one at a time does
    assert cost.prefill_tokens_per_second > 2 * cost.decode_tokens_per_second > 0


def test_ids_that_the_tokenizer_does_not_know_have_no_text() -> None:
    class Known:
        """Like tiktoken, which raises."""

        def decode(self, ids: list[int]) -> str:
            return "".join({1: "a", 2: "b"}[one] for one in ids)

    assert text_of(Known(), [1, 2, 1]) == "aba"
    assert text_of(Known(), [1, 302, 2]) == "ab"
    assert text_of(Known(), [302]) == text_of(Known(), []) == ""
