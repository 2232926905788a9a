"""Our language model for lm-evaluation-harness against the harness's own ``hf`` model, on the same checkpoint."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, processors

from kd_recipes.errors import ConfigError
from kd_recipes.evaluation import tasks
from kd_recipes.evaluation.branches import plant
from kd_recipes.evaluation.language_model import DecoderLM
from kd_recipes.evaluation.results import TaskFigures
from kd_recipes.evaluation.tasks import check_tasks, compare_tasks, run_tasks
from kd_recipes.tokenizers import hf_tokenizer
from toy import MAX_SEQ_LEN, SPECIAL_TOKENS, Toys, load_sections, save_tokenizer, sentence, write_jsonl

LONG = " ".join(sentence(i) for i in range(30))  # some 400 tokens, of which a toy model sees the last 128


def ours(checkpoint: Path, **settings: Any) -> DecoderLM:
    return DecoderLM(load_sections(checkpoint), hf_tokenizer(str(checkpoint)), **settings)


def theirs(checkpoint: Path) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def questions() -> list[tuple[str, str]]:
    """Contexts with two to five continuations, of one token and of many; and what harnesses stumble over."""
    asked = [(sentence(i), " " + sentence(3 * i + j, 1 + 3 * j)) for i in range(12) for j in range(2 + i % 4)]
    asked += [("the cat sat", f" {letter}") for letter in "ABCD"]  # one token each
    asked += [(LONG, " mat"), (LONG, " mat and hills"), (LONG, " coast")]  # cut at different places
    asked += [("", "the cat"), ("the cat ", "sat"), ("the cat \n", " sat"), ("naïve 猫", " 座った"), ("a", " b")]
    return asked


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_log_likelihoods_equal_those_of_hf(family: str, toys: Toys, families: dict[str, Family]) -> None:
    checkpoint = toys.student if family == "llama" else families["qwen"].student
    requests = ask("loglikelihood", *questions())
    found, wanted = ours(checkpoint).loglikelihood(requests), theirs(checkpoint).loglikelihood(requests)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_neither_batches_nor_order_nor_sharing_matter(toys: Toys) -> None:
    requests = ask("loglikelihood", *questions())
    lm = ours(toys.student)
    alone = [value for request in requests for value, _ in lm.loglikelihood([request])]
    for size in (1, 300, 10**6):
        together = [value for value, _ in ours(toys.student, max_batch_tokens=size).loglikelihood(requests)]
        assert together == pytest.approx(alone, abs=1e-4)
    backwards = [value for value, _ in lm.loglikelihood(requests[::-1])]
    assert backwards[::-1] == pytest.approx(alone, abs=1e-4)


def test_choices_share_their_context() -> None:
    context = list(range(50))
    (tree,) = plant([(context, [1, 2]), (context, [3]), (context, [4, 5, 6])], 100)
    assert (tree.length, tree.requests) == (50 + 1 + 0 + 2, [0, 1, 2])
    assert len(plant([([0], [1, 2, 3]), ([0], [4, 5, 6])], 100)) == 2  # there is nothing to be saved
    assert len(plant([(context, list(range(30))) for _ in range(3)], 100)) == 3  # a sequence has its length
    (longest, _) = plant([(context, [1, 2]), (context, [1])], 50)
    assert (longest.context, longest.length) == (context[1:], 50)


def test_max_length_cuts_the_beginning(toys: Toys) -> None:
    short, whole = ours(toys.student, max_length=40), ours(toys.student)
    (found,) = short.loglikelihood(ask("loglikelihood", (LONG, " mat")))
    ids, continuation = short.tok_encode(LONG + " mat"), short.tok_encode(" mat")
    assert ids[-len(continuation) :] == continuation
    (wanted,) = whole._loglikelihood_tokens([(None, ids[-41 : -len(continuation)], continuation)])
    assert found == pytest.approx(wanted, abs=1e-5)


def test_the_model_keeps_its_head(toys: Toys) -> None:
    model, tokens_BS = load_sections(toys.student), torch.arange(8)[None]
    before = model(tokens_BS)
    DecoderLM(model, hf_tokenizer(str(toys.student))).loglikelihood(ask("loglikelihood", ("the cat", " sat")))
    assert torch.equal(model(tokens_BS), before)


def test_bos_comes_once(toys: Toys, tmp_path: Path) -> None:
    backend: Tokenizer = save_tokenizer(tmp_path)
    bos = SPECIAL_TOKENS[1]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos, "add_bos_token": True}))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(toys.student / name)
    mine, hf = ours(tmp_path), theirs(tmp_path)
    assert mine.prefix_token_id == hf.prefix_token_id == 1
    for text in ("the cat", f"{bos}the cat", ""):
        for add in (None, True, False):
            assert mine.tok_encode(text, add_special_tokens=add) == hf.tok_encode(text, add_special_tokens=add)
    requests = ask("loglikelihood", ("the cat", " sat"), ("", "the cat"), (bos, "the cat"))
    found, wanted = mine.loglikelihood(requests), hf.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_generation_equals_that_of_hf(toys: Toys) -> None:
    # "h" is in no special token's name, which the harness would take for the end
    short, long = {"until": ["h", "\n"], "max_gen_toks": 24}, {"until": ["\n\n"], "max_gen_toks": 8}
    requests = ask("generate_until", *((sentence(i), short) for i in range(5)), (LONG, long), (sentence(6), long))
    found = ours(toys.student).generate_until(requests)
    assert found == theirs(toys.student).generate_until(requests)
    assert any(found)


# ------------------------------------------------------------------------------------------------------------ tasks
@pytest.fixture
def choice_file(tmp_path: Path) -> str:
    rows: list[dict[str, Any]] = []
    for i in range(24):
        choices = [sentence(3 * i + j, 1 + 2 * j) for j in range(2 + i % 3)]
        answer: int | str = i % 2 if i % 3 else choices[i % 2]
        rows.append({("question", "context")[i % 2]: sentence(i), "choices": choices, "answer": answer})
    return str(write_jsonl(tmp_path / "mine.jsonl", rows))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    rows = [{"text": text} for text in (sentence(1), LONG, "naïve 猫\u2028 two\n\nlines", sentence(7), LONG[:300])]
    return str(write_jsonl(tmp_path / "texts.jsonl", rows))


def test_tasks_equal_those_of_hf(choice_file: str, text_file: str, toys: Toys) -> None:
    found, wanted = (run_tasks(lm, [text_file, choice_file]) for lm in (ours(toys.student), theirs(toys.student)))
    assert list(found) == ["texts", "mine"]
    assert found["mine"] == wanted["mine"]
    assert set(found["mine"].metrics) == {"acc", "acc_norm"}
    assert found["mine"].num_items == len(found["mine"].choices) == 24
    assert len(set(found["mine"].choices)) > 1
    assert found["mine"].metrics["acc_norm"].mean == pytest.approx(sum(found["mine"].correct) / 24)
    for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert found["texts"].metrics[name].mean == pytest.approx(wanted["texts"].metrics[name].mean, rel=1e-6)
    assert found["texts"].metrics["bits_per_byte"].standard_error > 0


def test_a_text_without_spaces_is_one_word(toys: Toys, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "chinese.jsonl", [{"text": "猫" * 400}, {"text": "狗" * 100}])
    metrics = run_tasks(ours(toys.student), [str(file)])["chinese"].metrics
    assert metrics["word_perplexity"].mean == math.inf
    assert 0 < metrics["bits_per_byte"].mean < 100
    assert math.log2(metrics["byte_perplexity"].mean) == pytest.approx(metrics["bits_per_byte"].mean)


def test_limit_and_examples(choice_file: str, toys: Toys) -> None:
    settings: dict[str, Any] = {"limit": 8, "num_fewshot": 2}
    found = run_tasks(ours(toys.student), [choice_file], **settings)["mine"]
    assert found == run_tasks(theirs(toys.student), [choice_file], **settings)["mine"]
    assert found.num_items == 8
    without = run_tasks(ours(toys.student), [choice_file], limit=8)["mine"]
    assert found.choices != without.choices


def test_right_answers_are_counted(toys: Toys, tmp_path: Path) -> None:
    lm = ours(toys.student)
    rows = []
    for i in range(10):
        choices = [sentence(i + j, 3) for j in range(3)]
        asked = lm.loglikelihood(ask("loglikelihood", *((sentence(i), f" {choice}") for choice in choices)))
        scores = [value / len(choice) for (value, _), choice in zip(asked, choices, strict=True)]
        likeliest = scores.index(max(scores))
        rows.append({"context": sentence(i), "choices": choices, "answer": (likeliest + (i < 4)) % 3})
    figures = run_tasks(lm, [str(write_jsonl(tmp_path / "known.jsonl", rows))])["known"]
    assert list(figures.correct) == [False] * 4 + [True] * 6
    assert figures.metrics["acc_norm"].mean == pytest.approx(0.6)
    changed = compare_tasks(figures, replace(figures, correct=[True] * 9 + [False]))
    assert changed.changed == (5, 4, 1, 0)
    assert changed.p_value == pytest.approx(2 * (1 + 5) / 2**5)  # 4 of 5 flips or more, on either side


def test_what_has_no_answers_is_not_compared() -> None:
    figures = TaskFigures(3, {})
    assert compare_tasks(figures, figures) is figures


def test_several_processes_find_what_one_does(choice_file: str, text_file: str, toys: Toys, tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from torch import distributed\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[1])!r}]\n"
        "from kd_recipes.evaluation.language_model import DecoderLM\n"
        "from kd_recipes.evaluation.tasks import run_tasks\n"
        "from kd_recipes.tokenizers import hf_tokenizer\n"
        "from toy import load_sections\n"
        "distributed.init_process_group('gloo')\n"
        "path, out, *tasks = sys.argv[1:]\n"
        "lm = DecoderLM(load_sections(Path(path)), hf_tokenizer(path), max_batch_tokens=300)\n"
        "figures = run_tasks(lm, tasks)\n"
        "means = {name: {key: value.mean for key, value in f.metrics.items()} for name, f in figures.items()}\n"
        "found = [means, list(figures['mine'].choices)]\n"
        "Path(out, f'{distributed.get_rank()}.json').write_text(json.dumps(found))\n"
        "distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    files = [choice_file, text_file]
    done = subprocess.run(
        [*launch, str(toys.student), str(tmp_path), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = run_tasks(ours(toys.student), files)
    for rank in range(2):
        means, choices = json.loads((tmp_path / f"{rank}.json").read_text())
        assert choices == list(wanted["mine"].choices)
        for name, figures in wanted.items():
            assert means[name] == pytest.approx({key: value.mean for key, value in figures.metrics.items()}, rel=1e-6)


# ----------------------------------------------------------------------------------------- tasks of the harness's own
@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness with few tasks of its own, whose data lies on disk: the real ones are on a hub."""
    from lm_eval.tasks import TaskManager

    rows = [{"q": sentence(i), "c": [sentence(i + j, 2) for j in range(3)], "a": i % 3, "t": "o"} for i in range(6)]
    data = {"data_files": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "train", "doc_to_text": "q"}
    choice = {
        **common,
        "output_type": "multiple_choice",
        "doc_to_choice": "c",
        "doc_to_target": "a",
    }
    readings = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("first", "(.)"), ("an_o", "(o)"))
    ]
    writing = {"output_type": "generate_until", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    configs: dict[str, dict[str, Any]] = {
        "one": {"task": "one", **choice, "tag": "a_tag"},
        "two": {"task": "two", **choice, "doc_to_target": 0, "tag": "a_tag"},
        "both": {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]},
        "open": {
            "task": "open",
            **common,
            **writing,
            "doc_to_target": "t",
            "filter_list": readings,
            "metric_list": [exact],
        },
        "lost": {"task": "lost", **choice, "dataset_kwargs": {**data, "data_files": str(tmp_path / "nowhere.jsonl")}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(tasks, "_manager", lambda: manager)


@pytest.mark.usefixtures("harness")
def test_groups_tags_and_readings(toys: Toys) -> None:
    lm = ours(toys.student)
    one, two = run_tasks(lm, ["one", "two"]).values()
    both = run_tasks(lm, ["both"])
    assert list(both) == ["both"]
    assert both["both"].num_items == 12
    assert [*both["both"].correct] == [*one.correct, *two.correct]
    assert both["both"].metrics["acc"].mean == pytest.approx(sum(both["both"].correct) / 12)
    assert set(run_tasks(lm, ["a_tag"])) == {"one", "two"}
    found = run_tasks(lm, ["open"])["open"]
    assert set(found.metrics) == {"exact_match (first)", "exact_match (an_o)"}
    assert found.metrics["exact_match (first)"].mean == pytest.approx(sum(found.correct) / 6)
    assert found == run_tasks(theirs(toys.student), ["open"])["open"]


@pytest.mark.usefixtures("harness")
def test_names_that_are_not_known_and_data_that_is_not_there(toys: Toys) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.bothe: got 'bothe'.*Did you mean both"):
        check_tasks(["one", "bothe"])
    with pytest.raises(ConfigError, match=r"tasks\.lost: .*wanted a task whose data can be loaded"):
        run_tasks(ours(toys.student), ["lost"])


# -------------------------------------------------------------------------------------------------------- bad input
GOOD = {"question": "Where?", "choices": ["here", "there"], "answer": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "tasks.bad: got '{ in bad.jsonl, line 1', wanted JSON"),
        ([GOOD, [1]], 'line 2\', wanted {"question" or "context"'),
        (
            [GOOD, {**GOOD, "choices": ["here"]}],
            "\"choices: ['here'] in bad.jsonl, line 2\", wanted two texts at least",
        ),
        ([{**GOOD, "choices": [" here", "there"]}], "without space around them"),
        (
            [{**GOOD, "answer": 2}],
            "'answer: 2 in bad.jsonl, line 1', wanted one of the choices, or its index from 0 to 1",
        ),
        ([{**GOOD, "answer": "nowhere"}], "wanted one of the choices"),
        ([{**GOOD, "answer": True}], "wanted one of the choices"),
        ([{**GOOD, "question": " "}], "wanted a text as `question`"),
        ([{"choices": ["a", "b"], "answer": 0}], 'wanted {"question" or "context"'),
        ([{"text": 3}], "wanted a text as `text`"),
        ([GOOD, {"text": "a text"}], 'line 2", wanted questions alone or texts alone'),
        ([], "wanted a row at least"),
    ],
)
def test_bad_rows(rows: Sequence[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path("bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ConfigError) as caught:
        check_tasks(["bad.jsonl"])
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once(choice_file: str, tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    bad = write_jsonl(tmp_path / "bad.jsonl", [GOOD, {**GOOD, "answer": 5}, GOOD, {**GOOD, "answer": 6}])
    with pytest.raises(ConfigError) as caught:
        check_tasks([choice_file, "nowhere.jsonl", str(tmp_path / "binary.jsonl"), str(bad)])
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["tasks.nowhere", "tasks.binary", "tasks.bad", "tasks.bad"]


def test_names_and_examples(choice_file: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = str(write_jsonl(tmp_path / "other" / "mine.jsonl", [GOOD]))
    with pytest.raises(ConfigError, match=r"tasks\.mine: .* wanted a file whose name no other task has"):
        check_tasks([choice_file, twin])
    with pytest.raises(ConfigError, match=r"tasks\.mine: got '1 rows', wanted more rows than num_fewshot=1"):
        check_tasks([twin], num_fewshot=1)


def test_a_choice_longer_than_a_sequence(toys: Toys) -> None:
    with pytest.raises(ConfigError, match=f"wanted 1 to {MAX_SEQ_LEN} tokens after a context"):
        ours(toys.student).loglikelihood(ask("loglikelihood", ("the cat", " " + LONG)))


@pytest.mark.slow  # the harness reads 14,000 files to know its own tasks
def test_names_of_the_harness() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.helaswag: got 'helaswag'.*Did you mean .*hellaswag"):
        check_tasks(["hellaswag", "helaswag"])
