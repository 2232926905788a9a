"""Blocks one at a time against the whole model, and tensors between Hugging Face's files and torchtune's models."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

from kd_recipes.compression import Stream, Text, cross_entropy, read_checkpoint, write_checkpoint
from kd_recipes.compression.convert import as_tune, to_file
from kd_recipes.compression.stream import INPUT_OF
from kd_recipes.errors import ConfigError
from kd_recipes.layers import LowRankLinear
from toy import VOCABULARY, calibration, hf_config, load_sections, save_model

GENERATOR = torch.Generator().manual_seed(0)
TOKENS_BS = torch.randint(VOCABULARY, (3, 24), generator=GENERATOR)
VALID_BS = torch.rand(3, 24, generator=GENERATOR) < torch.tensor([[0.3], [0.9], [0.0]])
TEXT = calibration([(TOKENS_BS, VALID_BS), (TOKENS_BS[:2, :11] * 3 % VOCABULARY, None)])
KINDS = ["llama, tied", "llama, untied", "qwen2, tied", "qwen2, untied"]


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to read, never to write into."""
    directory = tmp_path_factory.mktemp("source")
    model_type, tied = request.param.split(", ")
    save_model(directory, model_type, tie_word_embeddings=tied == "tied", num_hidden_layers=3)
    return directory


@torch.no_grad()
def loss(model: Any, text: Text) -> float:
    """Over the labels that count, by logits of whole windows."""
    total, count = 0.0, 0
    for tokens_1S, valid_1S in text.windows:
        output = model(tokens_1S)
        logits_SV, labels_S = getattr(output, "logits", output)[0, :-1], tokens_1S[0, 1:].clone()
        labels_S[~valid_1S[0, 1:]] = -100
        total += float(F.cross_entropy(logits_SV, labels_S, reduction="sum"))
        count += int((labels_S != -100).sum())
    return total / count


def watched_inputs(model: Any, name: str) -> Tensor:
    """What enters a module of the whole model at the tokens that count, ``[T, I]``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for tokens_1S, _ in TEXT.windows:
            model(tokens_1S)
    handle.remove()
    return torch.cat([x_SI[valid_1S[0]] for x_SI, (_, valid_1S) in zip(seen, TEXT.windows, strict=True)])


def test_loss_is_that_of_the_whole_model(source: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = cross_entropy(read_checkpoint(source), TEXT)
    assert ours == pytest.approx(loss(load_sections(source), TEXT), rel=1e-5)
    assert ours == pytest.approx(loss(AutoModelForCausalLM.from_pretrained(source).eval(), TEXT), rel=1e-5)


def test_a_window_longer_than_the_heads_chunk(tmp_path: Path) -> None:
    save_model(tmp_path / "source", max_position_embeddings=1100, num_hidden_layers=1)
    text = calibration([(torch.randint(VOCABULARY, (1, 1100), generator=GENERATOR), None)])
    expected = loss(load_sections(tmp_path / "source"), text)
    assert cross_entropy(read_checkpoint(tmp_path / "source"), text) == pytest.approx(expected, rel=1e-5)


def test_blocks_left_out(source: Path) -> None:
    model = load_sections(source)
    model.layers = nn.ModuleList([model.layers[0], model.layers[2]])
    assert cross_entropy(read_checkpoint(source), TEXT, [0, 2]) == pytest.approx(loss(model, TEXT), rel=1e-5)
    assert [block.index for block in Stream(read_checkpoint(source), TEXT, "test", [0, 2])] == [0, 2]


def test_no_token_counts(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    text = calibration([(TOKENS_BS, torch.zeros(3, 24, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="no token that counts"):
        cross_entropy(read_checkpoint(tmp_path / "source"), text)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "source")
    theirs.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    theirs.save_pretrained(tmp_path / "source")
    blocks = iter(Stream(read_checkpoint(tmp_path / "source"), TEXT, "test"))
    next(blocks).grams(list(INPUT_OF))
    block = next(blocks)
    with pytest.raises(ConfigError, match="block 1 that are not finite"):
        block.grams(list(INPUT_OF))


def test_grams_are_those_of_the_whole_model(source: Path) -> None:
    model = load_sections(source)
    stream = Stream(read_checkpoint(source), TEXT, "test")
    for block in stream:
        seen: list[Tensor] = []
        grams = block.grams(list(INPUT_OF), {"mlp_norm": lambda x_TD, _, seen=seen: seen.append(x_TD)})
        assert grams.keys() == INPUT_OF.keys()
        for name, gram_II in grams.items():
            x_TI = watched_inputs(model, f"layers.{block.index}.{name}")
            assert len(x_TI) == TEXT.num_tokens
            torch.testing.assert_close(gram_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-3)
        x_TD = watched_inputs(model, f"layers.{block.index}.mlp_norm")
        torch.testing.assert_close(torch.cat(seen), x_TD, rtol=1e-4, atol=1e-4)
        assert not block.layer.mlp.w1._forward_hooks
    x_TD = watched_inputs(model, "norm")
    h_TD = model.norm(x_TD)
    torch.testing.assert_close(stream.final_gram(), h_TD.T @ h_TD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["attn.q_proj", "mlp.w2"])
def test_a_changed_block_feeds_the_next(source: Path, name: str) -> None:
    model = load_sections(source)
    new_OI = torch.randn(model.get_submodule(f"layers.0.{name}").weight.shape, generator=GENERATOR) * 0.3
    before_TD = watched_inputs(model, "layers.1")
    model.get_submodule(f"layers.0.{name}").weight.data = new_OI.clone()
    after_TD = watched_inputs(model, "layers.1")
    assert not torch.allclose(before_TD, after_TD, atol=0.01)
    stream = Stream(read_checkpoint(source), TEXT, "test")
    for block in stream:
        if block.index == 0:
            block.set_weight(name, new_OI)
            assert torch.equal(block.weight(name), new_OI)
        if block.index == 1:
            pairs = zip(block.inputs, TEXT.windows, strict=True)
            entering_TD = torch.cat([x_1SD[valid_1S] for x_1SD, (_, valid_1S) in pairs])
            torch.testing.assert_close(entering_TD, after_TD, rtol=1e-4, atol=1e-4)
    assert stream.cross_entropy() == pytest.approx(loss(model, TEXT), rel=1e-5)


def test_factors_in_the_place_of_a_layer(source: Path) -> None:
    """The layer, and what is written, name by name."""
    checkpoint = read_checkpoint(source)
    for block in Stream(checkpoint, TEXT, "test"):
        old = block.layer.attn.q_proj
        factored = LowRankLinear(64, 64, 5, bias=old.bias is not None)
        bias = block.state.pop("attn.q_proj.bias", None)
        block.set_module("attn.q_proj", factored)
        assert block.layer.attn.q_proj is factored
        names = {name for name, _ in block.tensors(checkpoint.config) if ".q_proj." in name}
        parts = {"u", "v"} | ({"bias"} if bias is not None else set())
        assert names == {f"model.layers.{block.index}.self_attn.q_proj.{part}" for part in parts}


def test_one_block_is_in_memory_at_a_time(source: Path) -> None:
    """Parameters: while a block is at work, and while the next one is read, whoever still has the last one."""
    stream = Stream(read_checkpoint(source), TEXT, "test")
    blocks = []
    for block in stream:
        blocks.append(block)
        for index, layer in enumerate(stream.model.layers):
            is_here = [parameter.device.type != "meta" for parameter in layer.parameters()]
            assert all(is_here) if index == block.index else not any(is_here)
        assert all(parameter.device.type == "meta" for parameter in stream.model.tok_embeddings.parameters())
    gc.collect()
    for block in blocks:
        assert not block.state
        assert not block.inputs
        assert all(parameter.device.type == "meta" for parameter in block.layer.parameters())


def test_names_and_rows_are_torchtunes(source: Path) -> None:
    checkpoint, config = read_checkpoint(source), hf_config(source)
    convert = qwen2_hf_to_tune if config["model_type"] == "qwen2" else hf_to_tune
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 64}
    in_file = load_file(source / "model.safetensors")
    settings = {"tie_word_embeddings": config["tie_word_embeddings"]} if config["model_type"] == "qwen2" else {}
    expected = convert(in_file, **sizes, **settings)
    state = as_tune(checkpoint, [spec.name for spec in checkpoint.specs])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    back = dict(to_file(state, checkpoint.config))
    assert back.keys() == in_file.keys()
    assert all(torch.equal(back[name], in_file[name]) for name in in_file)


def test_into_several_files_and_back(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = read_checkpoint(source)
    state = as_tune(checkpoint, [spec.name for spec in checkpoint.specs])
    written = write_checkpoint(
        checkpoint,
        tmp_path / "written",
        to_file(state, checkpoint.config),
        record={"step": "nothing"},
        max_file_bytes=50_000,
    )
    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    assert len(written.shards) > 2
    assert set(index["weight_map"].values()) == set(written.shards)
    assert index["metadata"]["total_size"] == checkpoint.num_bytes == written.num_bytes
    assert not [path for path in (tmp_path / "written").iterdir() if path.name.startswith("part-")]
    again = as_tune(written, [spec.name for spec in written.specs])
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    theirs = [AutoModelForCausalLM.from_pretrained(of.directory).eval() for of in (checkpoint, written)]
    with torch.no_grad():
        assert torch.equal(*(model(TOKENS_BS).logits for model in theirs))
        ours = load_sections(tmp_path / "written")(TOKENS_BS)
    torch.testing.assert_close(ours, theirs[0](TOKENS_BS).logits, atol=1e-4, rtol=0)


def test_a_model_that_is_none_of_both(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    checkpoint = read_checkpoint(tmp_path / "source")
    tensors = dict(checkpoint.tensors([spec.name for spec in checkpoint.specs]))
    tensors["model.layers.0.router.weight"] = TOKENS_BS
    odd = write_checkpoint(checkpoint, tmp_path / "odd", tensors.items(), record={})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.router\.weight .*wanted the tensors of a Llama or Qwen2"):
        cross_entropy(odd, TEXT)


def test_a_repeated_tied_head_and_old_frequencies_are_left_out(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    checkpoint = read_checkpoint(tmp_path / "source")
    tensors = dict(checkpoint.tensors([spec.name for spec in checkpoint.specs]))
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    old = write_checkpoint(checkpoint, tmp_path / "old", (tensors | more).items(), record={})
    assert len(old.specs) == len(checkpoint.specs) + 2
    assert (
        as_tune(old, [spec.name for spec in old.specs]).keys() == load_sections(tmp_path / "source").state_dict().keys()
    )
    assert cross_entropy(old, TEXT) == cross_entropy(checkpoint, TEXT)
