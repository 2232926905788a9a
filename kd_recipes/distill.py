"""Train a student against a teacher.

The teacher's softened predictions and the data's labels train the student; held-out text says how far it got.
Writes checkpoints to resume from, the best and the final student, and curves, to ``output_dir``.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import training
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kd_recipes.batch import Batch
from kd_recipes.compression.checkpoint import settle
from kd_recipes.config import without_environment
from kd_recipes.errors import ConfigError, Problem, one_line, within
from kd_recipes.evaluation import HeldOut, evaluate_held_out
from kd_recipes.evaluation.behaviour import Behaviour, Speaker
from kd_recipes.losses import LossSum, build_divergence, build_feature_terms, choose_objective
from kd_recipes.monitoring import Alert
from kd_recipes.monitoring.metrics import StepMeter
from kd_recipes.monitoring.recorder import Recorder, prompts_of
from kd_recipes.pair import Pair, shared_ids, teacher_source
from kd_recipes.parts import build, build_callable, build_profiler
from kd_recipes.storage import atomic_directory, explain_disk_errors, write_json
from kd_recipes.students import Constraints
from kd_recipes.training.checkpoint import Background, RunDirectory, random_state, set_random_state
from kd_recipes.training.data import Loader, accumulate, build_loader, count_steps, samples_per_step, weigh
from kd_recipes.training.faults import Interruption, explain_memory, name_late_processes, num_bytes, saved_at_end
from kd_recipes.training.parallel import Parallel, local_device
from kd_recipes.training.precision import dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_models, loads_teacher_model, needs_teacher, preflight
from kd_recipes.training.schedules import Schedule
from kd_recipes.training.settings import KEYS
from kd_recipes.training.step import NonFiniteError, Updates, require_finite

_BEST_STATE = "best_state"  # of the optimizer, with the weights, where health.action is to go back to them
__all__ = ["KEYS", "DistillRecipe", "main"]


class DistillRecipe(FTRecipeInterface):
    """Distillation on one device.

    Args:
        cfg: checked against :data:`KEYS`, with its defaults.

    Raises:
        ConfigError: what is wrong with the config and the files it names, before any weights are loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        preflight(cfg)
        self._cfg = cfg
        self._run = RunDirectory(Path(cfg.output_dir), cfg.keep_last_n_checkpoints)
        self._device = local_device(cfg.device)
        self._parallel = Parallel.start(self._device, shard_size=cfg.shard_size, timeout=cfg.distributed_timeout)
        cfg.resume_from_checkpoint = self._parallel.each(self._run.goes_on(cfg.resume_from_checkpoint))[0]
        if cfg.dtype == "auto" and cfg.resume_from_checkpoint:  # what was measured once holds for the whole run
            cfg.dtype = self._run.recorded_dtype or "auto"
        self._dtype = self._parallel.each(resolve_dtype(cfg.dtype, self._device))[0]  # as measured by the main process
        cfg.dtype = dtype_name(self._dtype)
        self._samples_per_step = samples_per_step(cfg, self._parallel)
        self._seed = training.set_seed(seed=cfg.seed, debug_mode=cfg.cudnn_deterministic_mode)
        self.step, self._best = 0, math.inf
        self._held_out: dict[int, HeldOut] = {}
        self._random_before: dict[str, Any] | None = None  # the step that is being made
        self._is_evaluated, self._is_stopped, self._saved_at, self._num_skipped = False, False, 0, 0
        self._ending = Interruption(self._parallel)
        self._saving = self._parallel.aside("saving", cfg.distributed_timeout)
        self._best_state = RunDirectory(self._run.path / _BEST_STATE, keep_last_n=1)
        self._background = Background(self._run, self._saving, enabled=cfg.enable_async_checkpointing)

    def setup(self, cfg: DictConfig) -> None:
        """Build everything, cheapest to check first: data, then models, then their weights."""
        self._tokenizer = build("tokenizer", cfg.tokenizer)
        source, keys = teacher_source(cfg), ["model", "teacher_model"][: 1 + loads_teacher_model(cfg)]
        sizes = check_models(cfg, self._tokenizer, keys, source.models() if source else {})
        self._num_ids = shared_ids(sizes, source)
        self._max_seq_len = min(size.max_seq_len for size in sizes)
        self._constraints = Constraints.build("student_constraints", cfg.student_constraints, cfg)
        self._features = build_feature_terms("feature_losses", cfg.feature_losses)
        self._features.connect(sizes[0], sizes[-1])
        self._parallel.replicate(self._features.to(self._device))
        self._token_weights = build_callable("token_weights", cfg.token_weights)
        self._schedules = {key: Schedule.of(cfg[key]) for key in ("kd_ratio", "temperature")}
        self._objective = choose_objective(
            build("loss", cfg.loss),
            build_divergence("kd_loss", cfg.kd_loss),
            kd_ratio=self._schedules["kd_ratio"].start,
            temperature=self._schedules["temperature"].start,
            **{key: cfg[key] for key in ("teacher_temperature", "label_smoothing", "chunk_size", "token_weights")},
            num_ids=self._num_ids,
        )
        self._loader = self._setup_loader("dataset")
        self._eval_loader = None if cfg.eval_dataset is None else self._setup_loader("eval_dataset")
        self._health = within("health", lambda: build("health", cfg.health)) if self._eval_loader else None
        self._steps_per_epoch = count_steps(len(self._loader), cfg.gradient_accumulation_steps, cfg.max_steps_per_epoch)
        next(weigh(self._loader.batches(), self._token_weights))  # or an error in it
        # the optimizer needs the weights, but what is wrong with its settings can be known without them
        self._build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1, 1, device=self._device))]}])
        pair = Pair(cfg, self._dtype, self._device, self._parallel, self._features)
        pair.compare(source, {"dataset": self._loader, "eval_dataset": self._eval_loader})
        self.student = pair.student(self._constraints)
        self._teacher = pair.teacher(source, self._tokenizer, self._num_ids, lambda: self._ending.check(self.step))
        self._online = self._teacher.online if self._teacher else None
        asked = self._teacher.models if self._teacher and needs_teacher(cfg) else ()
        self._meter = StepMeter(self._device, self.student.model, asked)
        self._updates = Updates(
            self.student.trainable(),
            {f"feature_losses.{name}": parameter for name, parameter in self._features.named_parameters()},
            self._build_optimizer,
            master_weights=cfg.master_weights,
            clip_grad_norm=cfg.clip_grad_norm,
            parallel=self._parallel,
        )
        if cfg.resume_from_checkpoint:
            self.load_checkpoint(cfg.checkpointer.get("recipe_checkpoint"))
        self._profiler = build_profiler(cfg.profiler)
        self._recorder = self._setup_recorder()
        self._recorder.resume(self.step)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return min(int(self._cfg.epochs) * self._steps_per_epoch, int(self._cfg.max_steps or sys.maxsize))

    def _build_optimizer(self, groups: list[dict[str, Any]]) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = build("optimizer", self._cfg.optimizer, groups)
        arguments = {"num_training_steps": self.num_steps, "last_epoch": -1}
        return optimizer, build("lr_scheduler", self._cfg.lr_scheduler, optimizer, **arguments)

    def _setup_loader(self, key: str) -> Loader:
        arguments = (self._cfg, key, self._tokenizer, self._parallel)
        return build_loader(*arguments, seed=self._seed, max_seq_len=self._max_seq_len)

    def _setup_recorder(self) -> Recorder:
        cfg, logger = self._cfg, None
        if self._parallel.is_main:
            logger = build("metric_logger", cfg.metric_logger)
            self._run.open(cfg)
            logger.log_config(without_environment(cfg))
        recorder = Recorder(self._run.path, self._parallel, logger, self._health, cfg.teacher_temperature)
        if self._health is not None and self._online is not None and self._eval_loader is not None:
            recorder.behaviour = Behaviour(
                Speaker(self._online.model, self._online.signal, self._device),
                prompts_of(self._eval_loader.batches(), self._health, self._parallel),
                self._tokenizer,
                num_ids=self._num_ids,
                max_new_tokens=self._health.max_new_tokens,
            )
        config: Any = OmegaConf.to_container(without_environment(cfg), resolve=True)
        traced = self.student.model if cfg.log_graph and self._parallel.world_size == 1 else None
        recorder.describe(config, traced)
        return recorder

    def train(self) -> None:
        """Run to the last step, then write the final student.

        Raises:
            RunInterrupted: a signal asked the process to end; the run is saved, as before a TeacherAwayError.
        """
        waiting = [name_late_processes(p, self._cfg.distributed_timeout) for p in (self._parallel, self._saving)]
        with self._ending, waiting[0], waiting[1], explain_memory(self._cfg, self._sizes()):
            try:
                with saved_at_end(self._parallel, self.save_checkpoint):
                    self._train()
            finally:
                self._background.wait()
        self._finish()

    def _train(self) -> None:
        if self._is_due(self._cfg.eval_every_n_steps) or self.step == 0:
            self.evaluate()
        self._profiler.start()
        is_quiet = not self._parallel.is_main
        with tqdm(total=self.num_steps, initial=self.step, desc="distil", unit="step", disable=is_quiet) as progress:
            while self.step < self.num_steps and not self._is_stopped:
                self._train_epoch(progress)
        self._profiler.stop()
        self.evaluate()

    def _train_epoch(self, progress: Any) -> None:
        weighed = weigh(self._loader.batches(self.step // self._steps_per_epoch), self._token_weights)
        if self._teacher and needs_teacher(self._cfg):
            weighed = self._teacher.ahead(weighed)
        for micros in self._meter.steps(accumulate(weighed, self._cfg.gradient_accumulation_steps)):
            self._random_before = random_state()
            num_tokens = self._parallel.sum(sum(batch.num_valid_tokens for batch in micros))
            planned = {key: schedule.at(self.step, self.num_steps) for key, schedule in self._schedules.items()}
            now = self._recorder.adjust(planned)
            objective = replace(self._objective, kd_ratio=now["kd_ratio"], temperature=now["temperature"])
            for batch in micros:
                loss = self._loss(objective, batch, max(num_tokens, 1))
                with self._meter.phase("backward"):
                    loss.total.backward()
                self._meter.add(loss, batch)
            self.step, self._random_before = self.step + 1, None
            self._is_evaluated = False
            metrics = self._meter.means(num_tokens, self._parallel.sum) | {f"kd/{key}": now[key] for key in now}
            with self._meter.phase("optimizer"):
                self._update(metrics, num_tokens)
            self._report(metrics, num_tokens, progress)
            self._profiler.step()
            if self._is_due(self._cfg.eval_every_n_steps):
                self.evaluate()
            ends_epoch = self.step % self._steps_per_epoch == 0
            if self._is_due(self._cfg.save_every_n_steps) or ends_epoch or self.step == self.num_steps:
                self.save_checkpoint()
            self._ending.check(self.step)
            if ends_epoch or self.step == self.num_steps or self._is_stopped:
                return

    def _loss(self, objective: Any, batch: Batch, num_tokens: int) -> LossSum:
        asks_teacher = objective.needs_teacher or self._features.needs_teacher
        with self._meter.phase("teacher"):
            signal = self._teacher.signal(batch) if self._teacher and asks_teacher else None
        with self._meter.phase("student"):
            student = self.student(batch)
        with self._meter.phase("loss"):
            loss = objective(student, signal if objective.needs_teacher else None, batch, num_tokens)
            return self._features(loss, student, signal, batch, num_tokens)  # type: ignore[no-any-return]

    def _update(self, metrics: dict[str, float], num_tokens: int) -> None:
        """Change the student by the gradients collected, unless they are of no use."""
        metrics["optimizer/grad_norm"] = self._updates.collect()
        metrics["optimizer/lr"] = self._updates.optimizer.param_groups[0]["lr"]
        if num_tokens == 0:
            tqdm.write(f"step {self.step}: every label of its batches is masked; the weights stay as they are")
            return
        try:
            require_finite(metrics["loss/total"], metrics["optimizer/grad_norm"], self.step, self._describe_batch)
        except NonFiniteError as error:
            self._num_skipped += 1
            if self._num_skipped > self._cfg.max_skipped_steps:
                raise
            tqdm.write(f"left out: {error}")
            self._updates.drop()
            return
        self._updates.apply(self._constraints.update(self._updates.parameters, self.step, self.num_steps))
        metrics |= self._constraints.metrics(self._updates.parameters)

    def _report(self, metrics: dict[str, float], num_tokens: int, progress: Any) -> None:
        metrics |= self._meter.finish(num_tokens)
        self._recorder.step(self.step, metrics, is_logged=self._is_due(self._cfg.log_every_n_steps))
        if self._is_due(self._cfg.log_histograms_every_n_steps):
            self._recorder.histograms(self.step, self._updates.parameters)
        progress.update()
        progress.set_postfix(
            loss=f"{metrics['loss/total']:.3f}", tok_s=f"{metrics['throughput/tokens_per_second']:.0f}"
        )

    def _describe_batch(self) -> str:
        epoch, step = divmod(self.step - 1, self._steps_per_epoch)
        num_samples = self._samples_per_step // self._parallel.world_size
        rows = self._parallel.each(self._loader.rows(epoch, step * num_samples, (step + 1) * num_samples))
        return f"rows {sorted(itertools.chain(*rows))} of `dataset` in epoch {epoch}"

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def evaluate(self) -> None:
        """Measure the student on held-out text; export it as ``best/`` if it is."""
        if self._eval_loader is None or self._is_evaluated:
            return
        self.student.model.eval()
        limit = self._cfg.max_eval_batches or len(self._eval_loader)
        batches = itertools.islice(self._eval_loader.batches(), limit)
        held_out = evaluate_held_out(
            self.student,
            self._teacher.signal if self._teacher else None,
            tqdm(
                self._ending.until(self._teacher.ahead(batches) if self._teacher else batches, self.step),
                total=min(limit, len(self._eval_loader)),
                desc="held-out",
                leave=False,
                disable=not self._parallel.is_main,
            ),
            self._num_ids,
            self._parallel.sum,
        )
        self.student.model.train()
        self._held_out[self.step], self._is_evaluated = held_out, True
        speaker = Speaker(self.student.model, self.student, self._device)
        counts = self._constraints.are_reached(self.step, self.num_steps)
        alerts = self._recorder.evaluation(self.step, held_out, speaker, counts=counts)
        score = held_out.score(self._cfg.best_metric, self._schedules["kd_ratio"].end)
        if counts and score < self._best:
            self._best = score
            self._export("best")
            if self._health is not None and self._health.action == "restore_best":
                self._best_state.save(self.step, *self._updates.state_dict(), self._parallel)
        if alerts:
            self._act(alerts)

    def _act(self, alerts: list[Alert]) -> None:
        """What ``health.action`` says, besides what the recorder does to the objective."""
        signals = ", ".join(alert.signal for alert in alerts)
        if self._recorder.action == "stop":
            self._is_stopped = True
            tqdm.write(f"step {self.step}: stopped by health.action, for {signals}")
        if self._recorder.action == "restore_best":
            directory, state = self._parallel.on_main(self._best_state.load)
            self._updates.restore(directory, state, self._parallel)
            tqdm.write(f"step {self.step}: going on from the student of {directory.name}, for {signals}")

    def save_checkpoint(self) -> None:
        """Save all that :meth:`load_checkpoint` needs to go on as if nothing had happened."""
        if self._saved_at == self.step:
            return
        tensors, state = self._updates.state_dict()
        state |= {
            "step": self.step,
            "seed": self._seed,
            "best": self._best,
            "samples_per_step": self._samples_per_step,
            "num_samples": self.step % self._steps_per_epoch * self._samples_per_step,
            "random": self._parallel.each(self._random_before or random_state()),
            "is_evaluated": self._is_evaluated,
            "num_skipped": self._num_skipped,
        }
        self._background.save(self.step, tensors, state)
        self._saved_at = self.step

    def load_checkpoint(self, name: str | None = None) -> None:
        """Go back to the newest checkpoint in the output directory, or to the one named."""
        directory, state = self._parallel.on_main(lambda: self._run.load(name))
        if state["samples_per_step"] != self._samples_per_step:
            wanted = f"{state['samples_per_step']} samples a step, as the checkpoint has"
            remedy = "It is processes * batch_size * gradient_accumulation_steps"
            raise ConfigError(Problem("resume_from_checkpoint", self._samples_per_step, wanted, remedy))
        try:
            self._updates.load_state_dict(directory, state, self._saving)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:  # what torch's parts raise, each its own
            wanted = "a checkpoint of the same model, optimizer and data"
            raise ConfigError(Problem("resume_from_checkpoint", True, wanted, one_line(error))) from error
        self.step, self._seed, self._best = state["step"], state["seed"], state["best"]
        self._is_evaluated, self._saved_at, self._num_skipped = state["is_evaluated"], self.step, state["num_skipped"]
        self._loader.seek(state["num_samples"], self._seed)  # which may have been drawn
        if len(state["random"]) == self._parallel.world_size:  # else each process goes on from its own seed
            set_random_state(state["random"][self._parallel.rank])

    def _export(self, name: str) -> None:
        weights = self._parallel.gather(self.student.model.state_dict())
        self._parallel.on_main(lambda: self._write(name, weights))

    def _write(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        with atomic_directory(self._run.path / name) as directory:
            self.student.export(weights, directory, adapter_only=self._cfg.save_adapter_weights_only)
            constraints = self._constraints.describe()
            record = {"step": "distillation", "constraints": constraints}
            settle(directory, self._run.path / name, record, is_new=bool(constraints))
            held_out = self._held_out[self.step].metrics() if self.step in self._held_out else {}
            write_json(directory / "held_out.json", {"step": self.step, **held_out})

    def _finish(self) -> None:
        self._export("final")
        if self._parallel.is_main:
            print(f"Student after {self.step} steps: {self._run.path / 'final'}")
            if self._eval_loader is not None:
                print(f"Best student by held-out {self._cfg.best_metric}: {self._run.path / 'best'}")

    def _sizes(self) -> dict[str, int]:
        """Bytes of what stays in memory, by what it is."""
        return {
            "student": num_bytes(self.student.model.parameters()),
            "teacher": sum(num_bytes(m.parameters()) for m in (self._teacher.models if self._teacher else ())),
            "moments, if the optimizer is Adam": 2 * num_bytes(self._updates.parameters.values()),
        }

    def cleanup(self) -> None:
        """Flush the metric logger, and part from the other processes."""
        self._recorder.close()
        self._parallel.stop()


def main(cfg: DictConfig) -> None:
    """Run a distillation from a checked config."""
    with explain_memory(cfg), explain_disk_errors(Path(cfg.output_dir)):  # a metric logger's, too
        recipe = DistillRecipe(cfg)
        recipe.setup(cfg)
        try:
            recipe.train()
        finally:
            recipe.cleanup()


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("distill"))
