"""Run a teacher over a distillation's data once, and write to disk what it says: see docs/teachers.md.

Takes the config of the distillation, whose `teacher` is a kd_recipes.teachers.CachedTeacher: what it names as
teacher_model, or in `teacher.source`, is asked about all of `dataset` and `eval_dataset`. What is there already is not
done again, so that a run that was cut off goes on, and new data is added.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kd_recipes._torchtune import ModelSize
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.config import Key, is_positive
from kd_recipes.errors import ConfigError, Problem, RunError, gather, within
from kd_recipes.evaluation.stored import Distances
from kd_recipes.losses import FeatureTerms
from kd_recipes.pair import Pair
from kd_recipes.parts import build
from kd_recipes.storage import require_free_space
from kd_recipes.teachers import CachedTeacher, Teacher
from kd_recipes.teachers.cache import Cache, Encoding
from kd_recipes.teachers.cache.fill import Plan, Scribe, fill, foreseen, plan, rounds
from kd_recipes.teachers.cache.identity import (
    Identity,
    differences,
    hash_tokens,
    hash_weights,
    plain,
    probe_problems,
    quantization_of,
    setting_problems,
)
from kd_recipes.teachers.cache.source import layout
from kd_recipes.teachers.cache.store import Writer, in_use
from kd_recipes.teachers.limits import temperatures
from kd_recipes.teachers.teacher import ProbedTeacher
from kd_recipes.training import settings
from kd_recipes.training.data import Loader, build_dataset
from kd_recipes.training.faults import explain_memory
from kd_recipes.training.order import Rows
from kd_recipes.training.parallel import Parallel, local_device
from kd_recipes.training.precision import DTYPES, dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_models, check_teacher, highest_id

_REQUIRED = ("teacher", "tokenizer", "dataset", "batch_size")


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
    """What a cache is made from.

    Args:
        cfg: of the distillation.
        source: the cache, as the config has it.
        parallel: the processes.
        tokenizer: of torchtune's protocol.
        loaders: by the key of a data set.
        num_ids: that distributions are over.
        encoding: what is kept of one.
        there: what the records that are there are of; None where there are none.
    """

    cfg: DictConfig
    source: CachedTeacher
    parallel: Parallel
    tokenizer: Any
    loaders: Mapping[str, Loader]
    num_ids: int
    encoding: Encoding
    there: Identity | None

    @property
    def path(self) -> Path:
        return self.source.path

    def batches(self) -> Iterator[Batch]:
        return chain.from_iterable(loader.batches() for loader in self.loaders.values())

    def teacher(self) -> Teacher:
        if self.remote is not None:
            return self.remote
        teacher = self._pair(DTYPES[self.cfg.teacher_dtype]).teacher(None, self.tokenizer, self.num_ids)
        assert teacher is not None
        return teacher

    @cached_property
    def remote(self) -> ProbedTeacher | None:
        """What ``teacher.source`` describes, ready to be asked."""
        source = self.source.source
        if source is None:
            return None
        return source.open(self._pair(torch.float32).surroundings(self.tokenizer, self.num_ids))

    def _pair(self, dtype: torch.dtype) -> Pair:
        return Pair(self.cfg, dtype, self.parallel.device, self.parallel, FeatureTerms({}))


def main(cfg: DictConfig) -> None:
    """Add to the cache what it lacks.

    Raises:
        ConfigError: what is wrong with the config, or how the cache that is there differs from it.
    """
    source = within("teacher", lambda: build("teacher", cfg.teacher))
    if not isinstance(source, CachedTeacher):
        raise ConfigError(Problem("teacher", cfg.teacher._component_, "kd_recipes.teachers.CachedTeacher"))
    (there, encoding), _ = within(
        "teacher",
        lambda: gather(lambda: (source.recorded(), source.choose_encoding()), lambda: _check_source(source, cfg)),
    )
    found = check_teacher(cfg if source.source is None else _without_model(cfg))
    tokenizer = build("tokenizer", cfg.tokenizer)
    keys = ["teacher_model"] if source.source is None else []
    keys += ["model"] if cfg.model is not None and cfg.checkpointer is not None else []
    sizes = check_models(found, tokenizer, keys) or [_size_of(tokenizer)]
    device = local_device(cfg.teacher_device or cfg.device)
    parallel = Parallel.start(device, timeout=cfg.distributed_timeout)
    try:
        with explain_memory(cfg):
            max_seq_len, num_rows = sizes[0].max_seq_len, min(size.num_rows for size in sizes)
            loaders = {key: _loader(found, key, tokenizer, parallel, max_seq_len) for key in _data(cfg)}
            num_ids = num_rows if there is None else min(num_rows, there.num_ids)
            job = _Job(found, source, parallel, tokenizer, loaders, num_ids, encoding, there)
            settled = parallel.on_main(lambda: _settle(job))
            found.teacher_dtype = settled.dtype or None
            _look_for_damage(job)
            teacher = _write(job, settled)
            _say_losses(job)
            if cfg.check:
                _check(job, teacher or job.teacher())
    finally:
        parallel.stop()


def _check_source(source: CachedTeacher, cfg: DictConfig) -> None:
    """Where the teacher comes from.

    Raises:
        ConfigError: from nowhere; or a server does not suit, or does not answer.
    """
    if source.source is None:
        absent = [key for key in ("teacher_model", "teacher_checkpointer") if cfg[key] is None]
        wanted, remedy = "the teacher that is asked", "Or name a server as teacher.source"
        if absent:
            raise ConfigError(*(Problem(key, None, wanted, remedy) for key in absent))
        return
    remote = source.source
    if problems := within(".source", lambda: [*remote.problems(cfg)]):
        raise ConfigError(*(replace(p, key=f".source{p.key}") if p.key.startswith(".") else p for p in problems))


def _without_model(cfg: DictConfig) -> DictConfig:
    """The config with nothing about a teacher that would run here."""
    found = cfg.copy()
    found.teacher_model = found.teacher_checkpointer = None
    return found


def _size_of(tokenizer: Any) -> ModelSize:
    """What is known of a model that is not in the config.

    Raises:
        ConfigError: its tokenizer does not tell how many ids it has.
    """
    num_ids = highest_id(tokenizer) + 1
    if not num_ids:
        remedy = "Put the student's `model` and `checkpointer` in the config, which tell"
        raise ConfigError(Problem("tokenizer", type(tokenizer).__name__, "one with a vocab_size", remedy))
    return ModelSize(num_layers=0, embed_dim=0, num_rows=num_ids, max_seq_len=sys.maxsize)


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
    cfg, directory, there, encoding = job.cfg, job.path, job.there, job.encoding.settings()
    if len(softened := temperatures(job.cfg)) > 1:
        remedy = "Set teacher_temperature"
        raise ConfigError(Problem("temperature", plain(cfg.temperature), "one for the teacher in all steps", remedy))
    asked = cfg.teacher_dtype or cfg.dtype
    if asked == "auto" and there is not None:  # what was measured once holds for the whole cache
        asked = there.dtype
    dtype = "" if job.remote else dtype_name(resolve_dtype(asked, job.parallel.device))
    source = job.source.source.describe() if job.source.source else None
    if there is not None:
        new = replace(there, temperature=softened.pop(), num_ids=job.num_ids, encoding=encoding, dtype=dtype)
        problems = [*setting_problems(there, new), *differences(there, cfg, directory, source)]
        if job.remote and not problems:
            problems = [*probe_problems(there, job.remote.probe())]
        if problems:
            raise ConfigError(*problems)
        return there
    digest, tokens = hash_tokens(cfg.tokenizer)
    model, weights, stamps = _teacher_of(job)
    if not weights:
        wanted = "files that tell this teacher from others: checkpoint_files, or safetensors in checkpoint_dir"
        raise ConfigError(Problem("teacher_checkpointer", cfg.teacher_checkpointer._component_, wanted))
    identity = Identity(
        model,
        weights,
        stamps,
        digest,
        softened.pop(),
        job.num_ids,
        encoding,
        dtype,
        quantization=quantization_of(cfg) if job.remote is None else None,
    )
    if Identity.load(directory) != identity:
        identity.save(directory, tokens)
    return identity


def _teacher_of(job: _Job) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """What identifies the teacher: its section, and its weights with their stamps, or what it says."""
    if job.remote is not None and job.source.source is not None:
        return job.source.source.describe(), {"probe": job.remote.probe()}, {}
    return plain(job.cfg.teacher_model), *hash_weights(job.cfg.teacher_checkpointer)


def _look_for_damage(job: _Job) -> None:
    """Read all records, each process its share. Those that are damaged are forgotten: the teacher is asked once more.

    Raises:
        RunError: all of them, if the cache is to be checked.
    """
    store, parallel = job.source.open_cache().store, job.parallel
    share = store.share(parallel.rank, parallel.world_size)
    progress = tqdm(share, "read", leave=False, disable=not parallel.is_main)
    damage = {key: said for part in parallel.each(store.damage(progress)) for key, said in part.items()}

    def mend() -> None:
        if job.cfg.check:
            raise RunError("\n  - ".join(damage.values()))
        store.forget(damage)
        print(f"{len(damage):,} records in {job.path} are damaged; the teacher is asked about them again")

    if damage:
        parallel.on_main(mend)


def _write(job: _Job, settled: Identity) -> Teacher | None:
    """Add what is missing to the cache that was settled on; returns the teacher, if it was needed.

    Raises:
        ConfigError: another process adds to it, or has made another one in its place.
    """
    cache, parallel = job.source.open_cache(), job.parallel
    tell = print if parallel.is_main else _say_nothing
    missing = plan(cache, {name: _quietly(name, loader, parallel) for name, loader in job.loaders.items()})
    for name, (num_documents, num_missing) in missing.counts.items():
        tell(f"{name}: {num_documents:,} documents, of which {num_missing:,} are not in {job.path} yet")
    if not missing.wanted:
        tell(_describe(cache))
        return None
    writer = Writer(job.path, parallel.rank)
    if Identity.load(job.path) != settled:
        writer.close()
        raise ConfigError(in_use(job.path))
    teacher = job.teacher()
    with tqdm(total=missing.num_tokens, unit="tok", desc="cache", disable=not parallel.is_main) as progress:
        turns = rounds(job.batches(), missing, parallel.rank, parallel.world_size)
        fill(
            foreseen(turns, teacher.ahead) if job.remote else turns,
            missing,
            teacher.signal,
            Scribe(job.encoding, layout(settled), settled.temperature),
            writer,
            begin=lambda *first: _estimate(job, missing, *first),
            progress=progress.update,
        )
    parallel.each(None)  # all of them have written
    tell(_describe(job.source.open_cache()))
    return teacher


def _say_losses(job: _Job) -> None:
    """What the teacher makes of the labels: one that predicts them badly has to be corrected first."""
    cache, parallel = job.source.open_cache(), job.parallel
    for name, loader in job.loaders.items():
        share = islice(loader.batches(), parallel.rank, None, parallel.world_size)
        sums = parallel.sum(torch.tensor(_label_losses(cache, share), dtype=torch.float64))
        total, count = sums.tolist()
        if parallel.is_main:
            mean = total / max(count, 1)
            print(f"{name}: the teacher's cross entropy is {mean:.4f} nats a token, of {count:,.0f} tokens")


def _label_losses(cache: Cache, batches: Iterable[Batch]) -> tuple[float, int]:
    """The sum of the teacher's cross entropies with the labels, at temperature 1, and the number of these."""
    total, count = 0.0, 0
    for batch in batches:
        exact = cache.signal(batch).unsoftened
        assert exact is not None
        is_label_T = batch.labels_BS.flatten() != IGNORE_INDEX
        total -= float(exact.log_p_label_T[is_label_T].double().sum())
        count += int(is_label_T.sum())
    return total, count


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


def _check(job: _Job, teacher: Teacher) -> None:
    """Compare some records with the teacher.

    Raises:
        RunError: they are not what it says.
    """
    cache, parallel = job.source.open_cache(), job.parallel
    for name, loader in job.loaders.items():
        count = min(job.cfg.num_checked_batches, len(loader))
        every = len(loader) // count
        batches = islice(loader.batches(), 0, every * count, every)
        found = [
            Distances.of(teacher.signal(batch), cache.signal(batch), batch, num_ids=cache.num_ids)
            for batch in tqdm(batches, f"check {name}", count, leave=False, disable=not parallel.is_main)
        ]
        said = Distances.join(found).describe()
        if parallel.is_main:
            print(f"{name}: {said}")
    if parallel.is_main:
        print(f"{len(cache.store):,} records are what was written")


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("cache_teacher"))
