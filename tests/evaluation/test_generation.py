"""Continuations with a cache and in batches equal those without; and the model is what it was afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import BUILDERS, PROMPTS, SIZES, TRAINABLE, build
from torch.nn import functional as F
from torchtune.models.gemma2._component_builders import gemma2
from torchtune.modules import TransformerDecoder
from torchtune.training import compile_model

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError
from kd_recipes.evaluation.cost import measure_cost
from kd_recipes.evaluation.generation import Continuation, generate
from kd_recipes.models import llama


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> TransformerDecoder:
    return build(request.param)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_and_order_change_nothing(temperature: float) -> None:
    model, settings = build("tied"), {"max_new_tokens": 7, "temperature": temperature, "seed": 1}
    done: list[int] = []
    alone = generate(model, PROMPTS, **settings, batch_size=1, progress=done.append)
    assert generate(model, PROMPTS, **settings, batch_size=3, progress=done.append) == alone
    assert done == [1, 1, 1, 1, 3, 1]
    assert generate(model, [], **settings) == []
    if not temperature:
        assert generate(model, PROMPTS[::-1], **settings) == alone[::-1]


def test_gemma2_generates_within_its_window() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_layers": 4, "head_dim": 8, "sliding_window_size": 16}
    model, headless = gemma2(**sizes).eval(), gemma2(**sizes).eval()
    headless.load_state_dict(model.state_dict())
    head, ids = _torchtune.take_head(headless), [1, 2, 3, 4, 5]  # a whole one caps the wrong numbers
    with torch.no_grad():
        for _ in range(11):
            ids.append(int(head.logits(headless(torch.tensor([ids]))[0, -1:]).compute().argmax()))
    assert generate(model, [[9], ids[:5]], max_new_tokens=11)[1].ids == tuple(ids[5:])
    with pytest.raises(ConfigError, match=r"17 positions .* at most 16"):
        generate(model, [ids[:5]], max_new_tokens=13)


def test_a_compiled_model_is_not_compiled_for_each_length() -> None:
    model = build("tied")
    expected = generate(model, PROMPTS, max_new_tokens=5)
    compile_model(model, verbose=False)
    torch._dynamo.utils.counters.clear()
    assert generate(model, PROMPTS, max_new_tokens=5) == expected
    assert not torch._dynamo.utils.counters["stats"]


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


def test_no_step_follows_the_last_stop() -> None:
    model, steps = build("tied"), []
    whole = without_cache(model, [1, 2, 3], 8)
    model.tok_embeddings.register_forward_hook(lambda *_: steps.append(1))
    generate(model, [[1, 2, 3]], max_new_tokens=8, stop_ids=[whole[3]])
    assert len(steps) == whole.index(whole[3]) + 1
    steps.clear()
    generate(model, [[1, 2, 3]], max_new_tokens=8)
    assert len(steps) == 8


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_model_trains_on_as_if_nothing_had_happened(name: str) -> None:
    model = build(name)
    tokens_BS = torch.tensor([PROMPTS[0]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(model(tokens_BS)[0, :-1], tokens_BS[0, 1:]).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.train()
    model.layers[1].eval()  # as somebody may have it
    before = gradients()
    attributes = [dict(vars(module)) for module in model.modules()]  # modes and caches among them
    state, noise = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, temperature=1.0)
    measure_cost(model, num_bytes=1, prompt_length=8, num_new_tokens=2, repeats=1)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert not model.caches_are_setup()
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
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
    likely = [id_ for id_ in range(SIZES["vocab_size"]) if expected_V[id_] >= 5]
    assert len(likely) > 5
    chi_square = sum((counts[id_] - float(expected_V[id_])) ** 2 / float(expected_V[id_]) for id_ in likely)
    assert chi_square < len(likely) + 4 * (2 * len(likely)) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_of_padding_are_not_chosen(temperature: float) -> None:
    torch.manual_seed(0)
    model = llama(**SIZES)
    settings = {"max_new_tokens": 8, "temperature": temperature}
    few = generate(model, [[1, 2, 7]] * 4, num_ids=5, **settings)
    assert {id_ for text in few for id_ in text.ids} <= set(range(5))
    assert any(id_ >= 5 for text in generate(model, [[1, 2, 7]] * 4, **settings) for id_ in text.ids)


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [([[]], {}), ([[1] * 60], {"max_new_tokens": 10}), ([[SIZES["vocab_size"]]], {}), ([[1]], {"temperature": -1.0})],
)
def test_bad_input(prompts: list[list[int]], settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        generate(llama(**SIZES), prompts, **{"max_new_tokens": 4, **settings})


SPLIT = """
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from decoders import PROMPTS, build
from kd_recipes.evaluation.generation import generate

distributed.init_process_group("gloo")
expected = [generate(build("tied"), PROMPTS, max_new_tokens=9, temperature=t) for t in (0.0, 1.0)]
losses = []
for is_generating in (False, True):
    model = build("tied")
    for module in (*model.layers, model):
        fully_shard(module)
    if is_generating:  # before anything else has gathered the weights
        assert [generate(model, PROMPTS, max_new_tokens=9, temperature=t) for t in (0.0, 1.0)] == expected
    optimizer, tokens_BS = torch.optim.SGD(model.parameters(), lr=0.1), torch.tensor([PROMPTS[0]])
    for _ in range(2):
        loss = F.cross_entropy(model(tokens_BS)[0, :-1], tokens_BS[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if is_generating:
            generate(model, PROMPTS, max_new_tokens=2)
assert losses[:2] == losses[2:], losses
distributed.destroy_process_group()
"""


def test_a_model_that_is_split_over_processes_generates_and_trains_on(tmp_path: Path) -> None:
    (tmp_path / "split.py").write_text(f"import sys\nsys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n{SPLIT}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(tmp_path / "split.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
