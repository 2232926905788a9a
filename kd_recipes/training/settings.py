"""The keys of a distillation's config: a superset of those of torchtune's knowledge-distillation recipes."""

from __future__ import annotations

from kd_recipes.compression.weight_only import FORMATS, is_format
from kd_recipes.config import Key, is_positive
from kd_recipes.training.precision import DTYPES, is_dtype_name
from kd_recipes.training.schedules import is_schedule


def _is_norm(value: object) -> bool:
    try:
        return not isinstance(value, bool) and float(value) > 0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _is_seed(value: int) -> bool:
    return 0 <= value < 2**32


def _is_best_metric(value: str) -> bool:
    return value in ("objective", "perplexity", "kl")


_DETERMINISTIC_MODES = ("default", "warn", "error", 0, 1, 2)

KEYS = (
    Key("recipe", "str", wanted="`distill`"),
    Key("output_dir", "path", required=True, wanted="a directory for everything that the run writes"),
    # student and teacher
    Key("model", "component", required=True),
    Key("checkpointer", "component", required=True),
    Key("teacher_model", "component"),
    Key("teacher_checkpointer", "component"),
    Key(
        "teacher",
        "component",
        wanted="a teacher in the place of teacher_model, of kd_recipes.teachers",
    ),
    Key(
        "correction",
        "mapping",
        wanted="what correct_teacher, which takes this config, too, is to do otherwise; a distillation passes it by",
    ),
    Key("teacher_dtype", "choice", wanted="auto, bf16 or fp32; the student's by default", check=is_dtype_name),
    Key("teacher_device", "str", wanted="a device; the student's by default"),
    Key("teacher_quantization", "component_or_name", wanted=FORMATS, check=is_format),
    Key(
        "teacher_cpu_offload",
        "bool",
        default=False,
        wanted="whether the teacher's blocks wait in host memory, and come to its device two at a time",
    ),
    Key(
        "student_constraints",
        "components",
        wanted="what the student's weights are held to, of kd_recipes.compression: KeepZeros, GradualSparsity, "
        "QuantizationAwareTraining",
    ),
    # data
    Key("tokenizer", "component", required=True),
    Key("dataset", "components", required=True, args=1),
    Key("eval_dataset", "components", args=1, wanted="held-out data, in the form of dataset"),
    Key("batch_size", "int", required=True, wanted="sequences in a micro-batch, above 0", check=is_positive),
    Key("shuffle", "bool", default=True),
    Key(
        "shuffle_buffer_size",
        "int",
        default=10_000,
        wanted="rows of a stream that the next one is drawn from, above 0",
        check=is_positive,
    ),
    Key("group_by_length", "bool", default=False, wanted="whether a step has samples of about the same length"),
    Key("seed", "int", wanted="a whole number from 0; drawn at random if null", check=_is_seed),
    # objective
    Key(
        "kd_ratio",
        "scheduled",
        default=0.5,
        wanted="a number in [0, 1]",
        check=lambda value: is_schedule(value, lambda number: 0 <= number <= 1),
    ),
    Key(
        "temperature",
        "scheduled",
        default=1.0,
        wanted="a number above 0",
        check=lambda value: is_schedule(value, is_positive),
    ),
    Key(
        "teacher_temperature", "float", wanted="a number above 0; the temperature of both by default", check=is_positive
    ),
    Key(
        "kd_loss",
        "component",
        wanted="a divergence, or a function of two log-probability tensors; forward KL by default",
        function_args=2,
    ),
    Key("label_smoothing", "float", default=0.0, wanted="a number in [0, 1)", check=lambda value: 0 <= value < 1),
    Key("loss", "component", wanted="with torchtune's own kd_loss: its cross entropy"),
    Key(
        "chunk_size", "int", wanted="tokens whose logits exist at a time, above 0; chosen by default", check=is_positive
    ),
    Key(
        "feature_losses",
        "components",
        wanted="terms that compare hidden states or attention: kd_recipes.losses.HiddenStates, AttentionRelations",
    ),
    Key(
        "token_weights",
        "component",
        wanted="a function of a Batch that returns what each position's part of the objective is multiplied by",
        function_args=1,
    ),
    # optimizer
    Key("optimizer", "component", required=True, args=1),
    Key("lr_scheduler", "component", args=1, kwargs=("num_training_steps", "last_epoch")),
    Key("gradient_accumulation_steps", "int", default=1, wanted="a whole number above 0", check=is_positive),
    Key("clip_grad_norm", "any", wanted="a number above 0, the largest norm of a step's gradient", check=_is_norm),
    Key("master_weights", "bool", default=True, wanted="whether the optimizer keeps float32 copies of bf16 weights"),
    # run
    Key("epochs", "int", default=1, wanted="a whole number above 0", check=is_positive),
    Key("max_steps_per_epoch", "int", wanted="a whole number above 0", check=is_positive),
    Key("max_steps", "int", wanted="a whole number above 0", check=is_positive),
    Key(
        "resume_from_checkpoint",
        "any",
        default=False,
        wanted="True, False, or auto: go on where there is something to go on with",
        check=lambda value: isinstance(value, bool) or value == "auto",
    ),
    Key(
        "max_skipped_steps",
        "int",
        default=0,
        wanted="how many steps without a finite gradient are left out before the run stops, from 0",
        check=lambda value: value >= 0,
    ),
    Key(
        "save_every_n_steps",
        "int",
        wanted="a whole number above 0; after each epoch and at the end in any case",
        check=is_positive,
    ),
    Key(
        "enable_async_checkpointing",
        "bool",
        default=False,
        wanted="whether checkpoints are written while the training goes on, from a copy in host memory",
    ),
    Key("keep_last_n_checkpoints", "int", default=2, wanted="a whole number above 0", check=is_positive),
    Key("export_dtype", "choice", wanted="bf16 or fp32; the checkpoint's own by default", check=lambda v: v in DTYPES),
    Key("save_adapter_weights_only", "bool", default=False),
    Key("device", "str", default="cuda", wanted="cpu, cuda or cuda:1"),
    Key("dtype", "choice", default="bf16", wanted="auto, bf16 or fp32", check=is_dtype_name),
    Key("compile", "bool", default=False),
    Key("enable_activation_checkpointing", "bool", default=False),
    Key("enable_activation_offloading", "bool", default=False),
    Key("cudnn_deterministic_mode", "any", wanted="default, warn or error", check=lambda v: v in _DETERMINISTIC_MODES),
    # monitoring
    Key("metric_logger", "component", required=True),
    Key("log_every_n_steps", "int", default=1, wanted="a whole number above 0", check=is_positive),
    Key("log_peak_memory_stats", "bool", default=False),  # torchtune's, without effect: memory is always logged
    Key("eval_every_n_steps", "int", wanted="a whole number above 0; only at the ends by default", check=is_positive),
    Key("max_eval_batches", "int", wanted="a whole number above 0; all by default", check=is_positive),
    Key("best_metric", "choice", default="objective", wanted="objective, perplexity or kl", check=_is_best_metric),
    Key("profiler", "component"),
    Key(
        "health",
        "component",
        default={"_component_": "kd_recipes.monitoring.Health"},
        wanted="limits of what counts as distilled too far, and what is done then; null watches over nothing",
    ),
    Key("log_graph", "bool", default=False, wanted="whether TensorBoard gets the model's graph, which takes seconds"),
    Key("log_histograms_every_n_steps", "int", wanted="a whole number above 0; none by default", check=is_positive),
    # several processes
    Key("shard_size", "int", wanted="processes that share a model; all by default, 1 copies it", check=is_positive),
    Key(
        "shard_teacher", "bool", default=True, wanted="whether the teacher is shared, too, or each process has it whole"
    ),
    Key("fsdp_cpu_offload", "bool", default=False),
    Key("fsdp_reshard_after_forward", "bool", default=True),
    Key("custom_sharded_layers", "list", wanted="names of modules besides the blocks that are split by themselves"),
    Key("distributed_timeout", "float", default=600.0, wanted="seconds a process waits for others", check=is_positive),
    Key("low_cpu_ram", "bool"),  # torchtune's, without effect: the main process alone reads weights
)
