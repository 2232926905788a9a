"""Turn a GGUF file into a checkpoint directory that torchtune, transformers and the other recipes load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes.config import Key
from kd_recipes.errors import ConfigError
from kd_recipes.tensor_files import FILE_DTYPES

KEYS = (
    Key("recipe", "str", wanted="import_gguf"),
    Key("gguf_file", "path", required=True, wanted="a GGUF file of architecture llama or qwen2"),
    Key("output_dir", "path", required=True, wanted="a new or empty directory"),
    Key(
        "dtype",
        "choice",
        default="bf16",
        wanted=f"one of {', '.join(FILE_DTYPES)}",
        check=lambda name: name in FILE_DTYPES,
    ),
)


def main(cfg: DictConfig) -> None:
    """Import ``cfg.gguf_file`` into ``cfg.output_dir`` and print the sections that use it.

    Raises:
        ConfigError: see :func:`kd_recipes.importing.gguf.import_gguf`.
    """
    from kd_recipes.importing.gguf import import_gguf

    directory = Path(cfg.output_dir)
    hf_config = import_gguf(Path(cfg.gguf_file), directory, dtype=FILE_DTYPES[cfg.dtype])
    print(f"Wrote {directory}, which transformers loads as it is.")
    try:
        text = OmegaConf.to_yaml(OmegaConf.create(sections(directory, hf_config)))
    except ConfigError as error:
        print(f"torchtune has no builder for this model, so no recipe can train it:\n{error}")
    else:
        print(f"To use it in a recipe:\n\n{text}")


def sections(directory: Path, hf_config: dict[str, Any]) -> dict[str, Any]:
    """The ``model``, ``tokenizer`` and ``checkpointer`` sections for a checkpoint directory.

    Args:
        directory: with model.safetensors and tokenizer.json.
        hf_config: its config.json.

    Raises:
        ConfigError: torchtune has no builder for this model.
    """
    from kd_recipes.models import checkpointer_model_type, model_section

    return {
        "model": model_section(hf_config),
        "tokenizer": {"_component_": "kd_recipes.tokenizers.hf_tokenizer", "path": str(directory), "max_seq_len": 2048},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(directory),
            "checkpoint_files": ["model.safetensors"],
            "model_type": checkpointer_model_type(hf_config),
            "output_dir": f"{directory}-trained",
        },
    }


if __name__ == "__main__":
    from kd_recipes.entry import run_recipe

    raise SystemExit(run_recipe("import_gguf"))
