"""Compare models on the same held-out text: size, perplexity, distance from a reference, a continuation of a prompt.

Each model is a Hugging Face directory, as the other recipes leave them. Prints a table and writes evaluation.json and
evaluation.md to ``output_dir``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.compression import sections
from kd_recipes.compression.checkpoint import weight_files
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.evaluation import HeldOut, evaluate_held_out
from kd_recipes.parts import build, find_device, load_model
from kd_recipes.signals import DenseSignal
from kd_recipes.storage import write_json
from kd_recipes.teachers import OnlineTeacher
from kd_recipes.training.data import Loader, build_dataset
from kd_recipes.training.order import Rows
from kd_recipes.training.precision import DTYPES, dtype_name, is_dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_tokenizer, token_ids

KEYS = (
    Key("recipe", "str", wanted="`evaluate`"),
    Key("output_dir", "path", required=True, wanted="a directory for evaluation.json and evaluation.md"),
    Key("models", "mapping", required=True, wanted="name: directory of a Hugging Face checkpoint, for each model"),
    Key("reference", "str", wanted="the name of the model that the others are measured against; the first by default"),
    Key("tokenizer", "component", required=True),
    Key("dataset", "components", required=True, args=1, wanted="text that none of the models was trained on"),
    Key("batch_size", "int", default=4, wanted="sequences in a batch, above 0", check=is_positive),
    Key("max_batches", "int", wanted="a whole number above 0; all by default", check=is_positive),
    Key("prompt", "str", wanted="a text that each model continues; none by default"),
    Key("max_new_tokens", "int", default=40, wanted="tokens of the continuation, above 0", check=is_positive),
    Key("device", "str", default="cuda", wanted="cpu, cuda or cuda:1"),
    Key("dtype", "choice", default="auto", wanted="auto, bf16 or fp32", check=is_dtype_name),
)


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Args:
        name: as in the config.
        num_parameters: tied ones counted once.
        num_bytes: of its weight files on disk.
        held_out: what it is worth on the text.
        continuation: of the prompt; None without one.
    """

    name: str
    num_parameters: int
    num_bytes: int
    held_out: HeldOut
    continuation: str | None


def main(cfg: DictConfig) -> None:
    """Evaluate the models that ``cfg`` names, the reference first, and print and write the comparison.

    Raises:
        ConfigError: what is wrong with the config and the files it names.
    """
    device = find_device("device", cfg.device)
    configs = {str(name): _read_sections(str(name), Path(path)) for name, path in cfg.models.items()}
    reference = cfg.reference or next(iter(configs))
    if reference not in configs:
        raise ConfigError(Problem("reference", reference, f"one of {', '.join(configs)}"))
    _require_one_vocabulary({name: Path(path) for name, path in cfg.models.items()}, reference)
    cfg.dtype = dtype_name(resolve_dtype(cfg.dtype, device))  # one for all models
    tokenizer = build("tokenizer", cfg.tokenizer)
    text = _text(cfg, tokenizer, device)
    rows: dict[str, Row] = {}
    teacher: OnlineTeacher | None = None
    signals: dict[int, DenseSignal] = {}  # kept, so that the reference runs over the text once and not for every model
    for name in [reference, *(other for other in configs if other != reference)]:
        model, rows[name] = _measure(name, cfg, configs[name], tokenizer, text, teacher, signals)
        teacher = teacher or model
    ordered = [rows[name] for name in configs]
    table = report(ordered, reference, cfg.prompt)
    print(f"\n{table}")
    _write(Path(cfg.output_dir), ordered, reference, table)


def _require_one_vocabulary(directories: dict[str, Path], reference: str) -> None:
    expected = token_ids(directories[reference])
    for name, directory in directories.items():
        found = token_ids(directory)
        if expected is not None and found is not None and found != expected:
            token, _ = min(set(found.items()) ^ set(expected.items()), key=lambda item: item[1])
            got = f"{token!r} is {found.get(token)}, and {expected.get(token)} in {reference}"
            wanted = "the token-to-id map of the reference"
            raise ConfigError(Problem(f"models.{name}", got, wanted, "Compare models of one vocabulary"))


def _text(cfg: DictConfig, tokenizer: Any, device: torch.device) -> list[Batch]:
    dataset, packed = build_dataset(cfg.dataset, tokenizer, "dataset")
    loader = Loader(
        Rows(dataset, shuffle=False, seed=0),
        packed=packed,
        batch_size=cfg.batch_size,
        padding_idx=tokenizer.pad_id,
        device=device,
        max_seq_len=sys.maxsize,
    )
    return list(islice(loader.batches(), cfg.max_batches))


def _measure(
    name: str,
    cfg: DictConfig,
    sections_of: DictConfig,
    tokenizer: Any,
    text: list[Batch],
    teacher: OnlineTeacher | None,
    signals: dict[int, DenseSignal],
) -> tuple[OnlineTeacher, Row]:
    """One model's row; without a teacher the model is the reference, and its signals are left in ``signals``."""
    device = torch.device(cfg.device)
    dtype = DTYPES[cfg.dtype]
    decoder = load_model(
        f"models.{name}", sections_of.model, sections_of.checkpointer, dtype=dtype, device=device
    ).model
    check_tokenizer(tokenizer, decoder.tok_embeddings.num_embeddings, decoder.max_seq_len)
    longest = max(batch.tokens_BS.shape[1] for batch in text)
    if longest > decoder.max_seq_len:
        wanted = f"at most {decoder.max_seq_len}, the max_seq_len of models.{name}"
        raise ConfigError(Problem("dataset", f"a sequence of {longest} tokens", wanted, "Set tokenizer.max_seq_len"))
    continuation = _continue(decoder, tokenizer, cfg.prompt, cfg.max_new_tokens)
    model = OnlineTeacher(decoder, device)
    progress = tqdm(text, desc=name, unit="batch")
    num_ids = min(model.num_rows, (teacher or model).num_rows)

    def signal(batch: Batch) -> DenseSignal:
        found = model.signal(batch)
        if teacher is None:
            signals[id(batch)] = found
        return found

    held_out = evaluate_held_out(signal, lambda batch: signals[id(batch)], progress, num_ids)
    num_parameters = sum(parameter.numel() for parameter in decoder.parameters())
    num_bytes = sum(path.stat().st_size for path in weight_files(Path(cfg.models[name])))
    return model, Row(name, num_parameters, num_bytes, held_out, continuation)


def report(rows: Iterable[Row], reference: str, prompt: str | None) -> str:
    """The comparison as a Markdown table, with the continuations below it."""
    head = f"| model | parameters | on disk | perplexity | KL to {reference} | top-1 agreement | accuracy |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    rows = list(rows)
    for row in rows:
        at = row.held_out
        lines.append(
            f"| {row.name} | {row.num_parameters / 1e6:.1f} M | {row.num_bytes / 1e6:.0f} MB | {at.perplexity:.2f} "
            f"| {at.kl:.3f} | {at.agreement:.1%} | {at.accuracy:.1%} |"
        )
    lines += ["", f"{rows[0].held_out.num_tokens:,} tokens of held-out text; KL in nats a token."]
    if prompt:
        lines += ["", f"Greedy continuations of: {prompt}", ""]
        lines += [f"- **{row.name}**: {' '.join((row.continuation or '').split())}" for row in rows]
    return "\n".join(lines)


def _read_sections(name: str, directory: Path) -> DictConfig:
    """The model and its weights, as a recipe's config has them."""
    wanted = "a Hugging Face checkpoint directory"
    if not (directory / "config.json").is_file():
        raise ConfigError(Problem(f"models.{name}", str(directory), wanted))
    try:
        return sections(directory)  # type: ignore[no-any-return]
    except ConfigError as error:
        raise ConfigError(*(replace(problem, key=f"models.{name}") for problem in error.problems)) from error
    except (KeyError, TypeError) as error:
        raise ConfigError(Problem(f"models.{name}", str(directory), wanted, one_line(error))) from error


def _continue(model: Any, tokenizer: Any, prompt: str | None, num_tokens: int) -> str | None:
    if not prompt:
        return None
    ids = tokenizer.encode(prompt, add_eos=False)
    return str(tokenizer.decode(_torchtune.greedy(model.eval(), ids, num_tokens, tokenizer.stop_tokens)))


def _write(directory: Path, rows: list[Row], reference: str, table: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    content = [{**asdict(row), "perplexity": row.held_out.perplexity} for row in rows]
    write_json(directory / "evaluation.json", {"reference": reference, "models": content})
    (directory / "evaluation.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nWrote {directory / 'evaluation.json'} and evaluation.md")


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("evaluate"))
