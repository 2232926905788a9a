"""Run a teacher over a distillation's data once, and write to disk what it says: see docs/teachers.md.

Takes the config of the distillation, whose `teacher` is a kd_recipes.teachers.CachedTeacher: what it names as
teacher_model is asked about all of `dataset` and `eval_dataset`. What is there already is not done again, so that a run
that was cut off goes on, and new data is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kd_recipes.batch import Batch
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, RunError, within
from kd_recipes.evaluation.tokens import token_values
from kd_recipes.losses import FeatureTerms
from kd_recipes.pair import Pair
from kd_recipes.parts import build
from kd_recipes.storage import require_free_space
from kd_recipes.teachers import CachedTeacher, OnlineTeacher
from kd_recipes.teachers.cache import Cache
from kd_recipes.teachers.cache.encodings import encoding_of
from kd_recipes.teachers.cache.fill import Plan, Scribe, fill, plan, rounds
from kd_recipes.teachers.cache.identity import (
    Identity,
    differences,
    hash_tokens,
    hash_weights,
    plain,
    setting_problems,
)
from kd_recipes.teachers.cache.source import layout
from kd_recipes.teachers.cache.store import Writer
from kd_recipes.teachers.limits import temperatures
from kd_recipes.training import settings
from kd_recipes.training.data import Loader, build_dataset
from kd_recipes.training.faults import explain_memory
from kd_recipes.training.order import Rows
from kd_recipes.training.parallel import Parallel, local_device
from kd_recipes.training.precision import DTYPES, dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_models, check_teacher

_REQUIRED = ("teacher", "teacher_model", "teacher_checkpointer", "tokenizer", "dataset", "batch_size")


def _as_here(key: Key) -> Key:
    if key.name == "shard_teacher":
        return replace(key, default=False)
    return replace(key, required=key.name in _REQUIRED)


KEYS = (
    *(_as_here(key) for key in settings.KEYS),
    Key(
        "check",
        "bool",
        default=False,
        wanted="whether all that is on disk is compared with its checksums, and some of it with the teacher",
    ),
    Key("num_checked_batches", "int", default=8, wanted="of each data set, for check; above 0", check=is_positive),
)


@dataclass(frozen=True)
class _Job:
    """What a cache is made from."""

    cfg: DictConfig
    source: CachedTeacher
    parallel: Parallel
    tokenizer: Any
    loaders: Mapping[str, Loader]
    num_ids: int

    @property
    def path(self) -> Path:
        return self.source.path

    def batches(self) -> Iterator[Batch]:
        return chain.from_iterable(loader.batches() for loader in self.loaders.values())

    def teacher(self) -> OnlineTeacher:
        device, dtype = self.parallel.device, DTYPES[self.cfg.teacher_dtype]
        teacher = Pair(self.cfg, dtype, device, self.parallel, FeatureTerms({})).teacher(
            None, self.tokenizer, self.num_ids
        )
        assert isinstance(teacher, OnlineTeacher)
        return teacher


def main(cfg: DictConfig) -> None:
    """Add to the cache what it lacks.

    Raises:
        ConfigError: what is wrong with the config, or how the cache that is there differs from it.
    """
    source = within("teacher", lambda: build("teacher", cfg.teacher))
    if not isinstance(source, CachedTeacher):
        raise ConfigError(Problem("teacher", cfg.teacher._component_, "kd_recipes.teachers.CachedTeacher"))
    found = check_teacher(cfg)
    tokenizer = build("tokenizer", cfg.tokenizer)
    keys = ["teacher_model", *(["model"] if cfg.model is not None and cfg.checkpointer is not None else [])]
    sizes = check_models(found, tokenizer, keys)
    device = local_device(cfg.teacher_device or cfg.device)
    parallel = Parallel.start(device, timeout=cfg.distributed_timeout)
    try:
        with explain_memory(cfg):
            max_seq_len, num_ids = sizes[0].max_seq_len, min(size.num_rows for size in sizes)
            loaders = {key: _loader(found, key, tokenizer, parallel, max_seq_len) for key in _data(cfg)}
            job = _Job(found, source, parallel, tokenizer, loaders, num_ids)
            found.teacher_dtype = parallel.on_main(lambda: _settle(job)).dtype
            teacher = _write(job)
            if cfg.check:
                _check(job, teacher or job.teacher())
    finally:
        parallel.stop()


def _data(cfg: DictConfig) -> list[str]:
    return [key for key in ("dataset", "eval_dataset") if cfg[key] is not None]


def _loader(cfg: DictConfig, key: str, tokenizer: Any, parallel: Parallel, max_seq_len: int) -> Loader:
    """The batches of all processes, in the data set's own order."""
    dataset, packed = build_dataset(cfg[key], tokenizer, key)
    return Loader(
        Rows(dataset, shuffle=False, seed=0),
        packed=packed,
        batch_size=cfg.batch_size,
        padding_idx=tokenizer.pad_id,
        device=parallel.device,
        max_seq_len=max_seq_len,
    )


def _settle(job: _Job) -> Identity:
    """What the cache is of, written down, or compared with what is there."""
    cfg, directory = job.cfg, job.path
    there = within("teacher", lambda: Identity.load(directory))
    encoding = job.source.encoding.settings() if job.source.encoding else there.encoding if there else None
    if encoding is None:
        remedy = "kd_recipes.teachers.RandomSampling {num_draws: 50} needs the least room"
        raise ConfigError(Problem("teacher.encoding", None, "a kd_recipes.teachers.TopK or RandomSampling", remedy))
    if len(softened := temperatures(job.cfg)) > 1:
        remedy = "Set teacher_temperature"
        raise ConfigError(Problem("temperature", plain(cfg.temperature), "one for the teacher in all steps", remedy))
    asked = cfg.teacher_dtype or cfg.dtype
    if asked == "auto" and there is not None:  # what was measured once holds for the whole cache
        asked = there.dtype
    dtype = dtype_name(resolve_dtype(asked, job.parallel.device))
    if there is not None:
        num_ids = min(job.num_ids, there.num_ids)  # a student with more ids gives those that the cache lacks no mass
        new = replace(there, temperature=softened.pop(), num_ids=num_ids, encoding=encoding, dtype=dtype)
        if problems := [*setting_problems(there, new), *differences(there, cfg, directory)]:
            raise ConfigError(*problems)
        return there
    digest, tokens = hash_tokens(cfg.tokenizer)
    weights, stamps = hash_weights(cfg.teacher_checkpointer)
    model = plain(cfg.teacher_model)
    identity = Identity(model, weights, stamps, digest, softened.pop(), job.num_ids, encoding, dtype)
    identity.save(directory, tokens)
    return identity


def _write(job: _Job) -> OnlineTeacher | None:
    """Add what is missing; returns the teacher, if it was needed."""
    cache, parallel = job.source.open_cache(), job.parallel
    tell = print if parallel.is_main else _say_nothing
    missing = plan(cache, {name: _quietly(name, loader, parallel) for name, loader in job.loaders.items()})
    for name, (num_documents, num_missing) in missing.counts.items():
        tell(f"{name}: {num_documents:,} documents, of which {num_missing:,} are not in {job.path} yet")
    if not missing.wanted:
        tell(_describe(cache))
        return None
    identity = Identity.load(job.path)
    assert identity is not None
    writer = Writer(job.path, parallel.rank)
    teacher = job.teacher()
    encoding = job.source.encoding or encoding_of(identity.encoding)
    with tqdm(total=missing.num_tokens, unit="tok", desc="cache", disable=not parallel.is_main) as progress:
        fill(
            rounds(job.batches(), missing, parallel.rank, parallel.world_size),
            missing,
            teacher.signal,
            Scribe(encoding, layout(identity), identity.temperature),
            writer,
            begin=lambda *first: _estimate(job, missing, *first),
            progress=progress.update,
        )
    parallel.each(None)  # all of them have written
    tell(_describe(job.source.open_cache()))
    return teacher


def _say_nothing(_: str) -> None:
    pass


def _quietly(name: str, loader: Loader, parallel: Parallel) -> Iterator[Batch]:
    yield from tqdm(loader.batches(), name, len(loader), leave=False, disable=not parallel.is_main)


def _estimate(job: _Job, missing: Plan, num_tokens: int, num_bytes: int, seconds: float) -> None:
    """Say what is to come, from the first batch, and make sure that there is room for it."""
    tokens, size, longest = (job.parallel.each(number) for number in (num_tokens, num_bytes, seconds))
    total = round(missing.num_tokens * sum(size) / max(sum(tokens), 1))
    minutes = missing.num_tokens / max(sum(tokens), 1) * max(longest) / 60
    if job.parallel.is_main:
        a_token = sum(size) / max(sum(tokens), 1)
        tqdm.write(
            f"{missing.num_tokens:,} tokens to ask about: some {total / 1e6:,.1f} MB ({a_token:.0f} bytes a token) and "
            f"{minutes:.1f} minutes"
        )
    job.parallel.on_main(lambda: require_free_space(job.path, total, key="teacher.path"))


def _describe(cache: Cache) -> str:
    num_tokens, num_bytes = cache.store.num_positions, cache.store.num_bytes
    return (
        f"{len(cache.store):,} documents with {num_tokens:,} tokens in {num_bytes / 1e6:,.1f} MB, "
        f"{num_bytes / max(num_tokens, 1):.1f} bytes a token"
    )


def _check(job: _Job, teacher: OnlineTeacher) -> None:
    """Read all records; compare some with the teacher.

    Raises:
        RunError: some are damaged.
    """
    cache, parallel = job.source.open_cache(), job.parallel
    if damage := cache.store.damage():
        raise RunError("\n  - ".join(damage))
    for name, loader in job.loaders.items():
        count = min(job.cfg.num_checked_batches, len(loader))
        every = len(loader) // count
        batches = islice(loader.batches(), 0, every * count, every)
        found = [
            token_values(teacher.signal(batch), cache.signal(batch), batch, num_ids=job.num_ids).values["kl"]
            for batch in tqdm(batches, f"check {name}", count, leave=False, disable=not parallel.is_main)
        ]
        kl_N = torch.cat(found)
        if parallel.is_main:
            print(
                f"{name}: what is stored is {kl_N.mean():.1e} nats a token from what the teacher says "
                f"({len(kl_N):,} tokens, at most {kl_N.abs().max():.1e})"
            )
    if parallel.is_main:
        print(f"{len(cache.store):,} records are what was written")


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("cache_teacher"))
