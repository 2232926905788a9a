"""Text and conversations become the tokens that transformers makes of them; masks follow the messages."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torchtune.data import Message

from kd_recipes.chat_template import ChatTemplate, Span
from kd_recipes.errors import ConfigError
from kd_recipes.tokenizers import HFTokenizer, hf_tokenizer, token_mask

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A system message alone is refused, there is no end of turn after the answer, and BOS is written by the template.
STRICT = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "    {%- if loop.last and message.role == 'system' %}{{ raise_exception('no question') }}{% endif %}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}\n"
    "    {%- else %}{{ '[' + message.role + '] ' + (message.content | tojson) + ' ' }}{% endif %}\n"
    "{%- endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '…' }}{% endfor %}"
TEXTS = ["", "Hello world", "  naïve 日本 x\n\n", "a<|im_end|>b", " <|im_start|>"]
CHAT = [
    Message("system", "Answer  in rhyme.\n", masked=True),
    Message("user", "  日本 please?\n", masked=True),
    Message("assistant", "No <b>rhyme</b> there\n", masked=False),
    Message("user", "Again", masked=True),
    Message("assistant", "Hello world.", masked=False),
]


def write_checkpoint(directory: Path, template: str | None = CHATML, **config: Any) -> Path:
    """A byte-level tokenizer as a checkpoint has it; ``config`` goes into tokenizer_config.json."""
    directory.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Hello world, hello there. No rhyme in this world.\n\n"] * 3, trainer)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if config.get("add_bos_token"):
        tokenizer.post_processor = bos_first(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    settings |= {"clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def bos_first(tokenizer: Tokenizer) -> Any:
    bos = "<|endoftext|>"
    return processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])


def load_transformers(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text_content} for message in messages]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> HFTokenizer:
    return hf_tokenizer(str(checkpoint))


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_text_is_encoded_as_transformers_does(tmp_path: Path, add_bos_token: bool) -> None:
    directory = write_checkpoint(tmp_path / "model", add_bos_token=add_bos_token)
    ours, theirs = hf_tokenizer(str(directory)), load_transformers(directory)
    for text in TEXTS:
        ids = ours.encode(text, add_eos=False)
        assert ids == theirs(text)["input_ids"]
        assert ours.encode(text) == [*ids, ours.eos_id]
        assert (ids[:1] == [ours.bos_id]) == add_bos_token
        assert ours.decode(ours.encode(text), skip_special_tokens=False).removeprefix("<|endoftext|>") == (
            text + "<|im_end|>"
        )


def test_a_silent_config_leaves_bos_to_the_post_processor(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    assert not hf_tokenizer(str(directory)).add_bos_token
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = bos_first(backend)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = hf_tokenizer(str(directory))
    assert tokenizer.encode("x", add_eos=False)[0] == tokenizer.bos_id


def test_attributes(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", pad_token={"content": "<|endoftext|>"})
    (directory / "generation_config.json").write_text('{"eos_token_id": [300, 301]}')
    tokenizer = hf_tokenizer(str(directory), max_seq_len=7)
    ids = tokenizer.special_tokens
    assert set(ids) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<|endoftext|>"], ids["<|im_end|>"])
    assert tokenizer.pad_id == ids["<|endoftext|>"]
    assert tokenizer.vocab_size == max(ids.values()) + 1
    assert tokenizer.stop_tokens == [ids["<|im_end|>"], 300, 301]
    assert tokenizer.max_seq_len == 7


def test_padding_falls_back_to_eos(tokenizer: HFTokenizer) -> None:
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize("first", [0, 1])
def test_conversation_is_tokenized_as_transformers_does(tmp_path: Path, template: str, first: int) -> None:
    directory = write_checkpoint(tmp_path / "model", template)
    ours, theirs = hf_tokenizer(str(directory)), load_transformers(directory)
    chat = CHAT[first:]
    tokens, mask = ours.tokenize_messages(chat, add_eos=False)
    assert tokens == theirs.apply_chat_template(as_dicts(chat), return_dict=False)
    assert len(mask) == len(tokens)
    prompt = theirs.apply_chat_template(as_dicts(chat[:-1]), add_generation_prompt=True, return_dict=False)
    assert ours.tokenize_prompt(chat[:-1]) == prompt
    assert ours.tokenize_prompt([*chat[:-1], Message("assistant", "")]) == prompt


def test_mask_follows_the_messages(tokenizer: HFTokenizer) -> None:
    tokens, mask = tokenizer.tokenize_messages(CHAT)
    trained = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if not m], skip_special_tokens=False)
    assert trained == (
        "<|im_start|>assistant\nNo <b>rhyme</b> there\n<|im_end|>\n<|im_start|>assistant\nHello world.<|im_end|>\n"
    )


def test_a_refused_beginning_shares_the_next_span() -> None:
    template = ChatTemplate(STRICT, {"bos_token": "B"})
    text, spans = template.spans(CHAT[:3])
    assert [span.masked for span in spans] == [True, False]
    assert text[spans[0].end :] == CHAT[2].text_content
    masked_first = [Message("system", "a", masked=True), Message("user", "b", masked=False)]
    assert [span.masked for span in template.spans(masked_first)[1]] == [True]


def test_token_mask_at_borders() -> None:
    spans = [Span(4, True), Span(4, False), Span(8, False)]
    offsets = [(0, 2), (2, 4), (3, 5), (4, 6), (6, 8), (8, 8), (0, 0)]
    assert token_mask(offsets, spans) == [True, True, True, False, False, False, True]


def test_eos_is_added_once(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    assert tokenizer.tokenize_messages(CHAT)[0] == tokenizer.tokenize_messages(CHAT, add_eos=False)[0]
    strict = hf_tokenizer(str(write_checkpoint(tmp_path / "model", STRICT)))
    tokens, mask = strict.tokenize_messages(CHAT)
    assert tokens == [*strict.tokenize_messages(CHAT, add_eos=False)[0], strict.eos_id]
    assert mask[-1] is False


def test_truncation_is_torchtunes(checkpoint: Path, tokenizer: HFTokenizer) -> None:
    tokens, mask = tokenizer.tokenize_messages(CHAT)
    short = hf_tokenizer(str(checkpoint), max_seq_len=20)
    assert short.tokenize_messages(CHAT) == ([*tokens[:19], short.eos_id], [*mask[:19], True])
    assert short.tokenize_messages(CHAT, add_eos=False) == (tokens[:20], mask[:20])
    enough = hf_tokenizer(str(checkpoint), max_seq_len=len(tokens))
    assert enough.tokenize_messages(CHAT) == (tokens, mask)


def test_call_replaces_messages(tokenizer: HFTokenizer) -> None:
    tokens, mask = tokenizer.tokenize_messages(CHAT)
    assert tokenizer({"messages": CHAT, "id": 1}) == {"tokens": tokens, "mask": mask, "id": 1}
    begun = [*CHAT[:-1], Message("assistant", "Hello")]
    prompt = tokenizer({"messages": begun}, inference=True)["tokens"]
    assert tokenizer.decode(prompt, skip_special_tokens=False).endswith("Again<|im_end|>\n<|im_start|>assistant\nHello")


def test_torchtunes_datasets_take_it(tmp_path: Path, checkpoint: Path) -> None:
    from torchtune.datasets import chat_dataset, text_completion_dataset

    tokenizer = hf_tokenizer(str(checkpoint), max_seq_len=64)
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": as_dicts(CHAT[:3])}]))
    source = {"source": "json", "split": "train", "cache_dir": str(tmp_path / "cache")}
    chat = chat_dataset(
        tokenizer,
        conversation_column="messages",
        conversation_style="openai",
        data_files=str(tmp_path / "chat.json"),
        **source,
    )
    labels = [label for label in chat[0]["labels"] if label != -100]
    assert tokenizer.decode(labels, skip_special_tokens=False).startswith("<|im_start|>assistant\nNo <b>")
    (tmp_path / "text.json").write_text(json.dumps([{"text": "Hello world"}]))
    text = text_completion_dataset(tokenizer, data_files=str(tmp_path / "text.json"), **source)
    assert list(text[0]["tokens"]) == tokenizer.encode("Hello world")


def test_it_can_be_sent_to_a_worker(tokenizer: HFTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize_messages(CHAT) == tokenizer.tokenize_messages(CHAT)


def test_tools_answers_have_the_templates_role() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }} {% endfor %}", {})
    assert template.render([Message("user", "x"), Message("ipython", "y", eot=False)]) == "user tool "


def test_template_from_other_places(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    directory = write_checkpoint(tmp_path / "model", None, chat_template=named)
    assert hf_tokenizer(str(directory)).chat_template == ChatTemplate(
        CHATML, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    )
    (tmp_path / "mine.jinja").write_text("mine")
    chosen = hf_tokenizer(str(directory), chat_template=str(tmp_path / "mine.jinja")).chat_template
    assert chosen is not None
    assert chosen.source == "mine"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, "first 1 messages differently"),
        ("{{ raise_exception('only poems') }}", "only poems"),
        ("{{ messages[0].content.missing.deeper }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = hf_tokenizer(str(write_checkpoint(tmp_path / "model", template)))
    with pytest.raises(ValueError, match=message):
        tokenizer.tokenize_messages(CHAT)


def test_pictures_are_refused(tokenizer: HFTokenizer) -> None:
    content = [{"type": "image", "content": "x"}]
    with pytest.raises(ValueError, match="other than text"):
        tokenizer.tokenize_messages([Message("user", content)])


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        hf_tokenizer(str(tmp_path))
    directory = write_checkpoint(tmp_path / "model", eos_token=None)
    with pytest.raises(ConfigError, match="eos_token"):
        hf_tokenizer(str(directory))
    with pytest.raises(ConfigError, match="Jinja file that exists"):
        hf_tokenizer(str(write_checkpoint(tmp_path / "other")), chat_template="missing.jinja")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="readable JSON"):
        hf_tokenizer(str(directory))
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"readable tokenizer\.json"):
        hf_tokenizer(str(directory))
