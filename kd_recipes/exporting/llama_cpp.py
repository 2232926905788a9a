"""llama.cpp's own quantizer, for the kinds whose blocks the gguf package cannot make."""

from __future__ import annotations

import ctypes
from pathlib import Path

from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.errors import RunError
from kd_recipes.exporting.gguf import refuse, write_gguf
from kd_recipes.storage import atomic_file, scratch_directory

# Our name -> llama.cpp's enum llama_ftype.
_NAMES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")
KINDS = {name.lower(): f"LLAMA_FTYPE_MOSTLY_{name}" for name in _NAMES}


def quantize(source: HFCheckpoint, file: Path, kind: str) -> None:
    """Write a file with 16-bit numbers, and let llama.cpp round it.

    Args:
        source: the checkpoint.
        file: to write.
        kind: one of :data:`KINDS`. Where its blocks of 256 do not divide a matrix's inputs llama.cpp takes others.

    Raises:
        ConfigError: the checkpoint has no such form: factors, a second rounding, or a tokenizer that llama.cpp has not.
        ImportError: llama-cpp-python is not installed.
        RunError: llama.cpp refuses.
    """
    import llama_cpp

    refuse(source, kind)
    with scratch_directory(file) as scratch, atomic_file(file) as unfinished:
        whole = scratch / "whole.gguf"
        write_gguf(source, whole)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, KINDS[kind])
        said: list[str] = []
        listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace")))
        llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))  # it says a line for each tensor
        status = llama_cpp.llama_model_quantize(str(whole).encode(), str(unfinished).encode(), settings)
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))  # as it was
        if status != 0:
            remedy = "gguf_q8_0 and gguf_q4_0 are written without it"
            raise RunError(f"llama.cpp could not write {file.name}: {''.join(said[-3:]).strip()}. {remedy}")
