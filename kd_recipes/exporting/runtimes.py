"""The programs that load what is exported, behind one face: ids of a text, logits, and greedy text after a prompt.

Each is imported where it is used: a file is loaded in a process of its own, whose memory is that program's alone.
"""

# S positions of a prompt, V vocabulary

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


class Runtime(ABC):
    """A loaded file.

    Attributes:
        num_timings: of prompt and continuation, of which the best counts: whatever else a machine does slows it down.
    """

    num_timings = 3

    @staticmethod
    @abstractmethod
    def prepare() -> None:
        """Import the program, which is not the file's memory and time.

        Raises:
            ImportError: it is not installed.
        """

    @abstractmethod
    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        """Load it.

        Args:
            path: a file or a directory.
            max_seq_len: of prompt and new tokens together.
            num_threads: that it computes with.
        """

    @abstractmethod
    def encode(self, text: str) -> list[int] | None:
        """The ids of a prompt, by the file's own tokenizer; None where it has none."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Logits:
        """``[S, V]``, of a prompt."""

    @abstractmethod
    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """The likeliest next id, again and again; the first comes as soon as the prompt has been read."""


class Student(Runtime):
    """torchtune's model, in float32: what the others are compared with."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""
        import kd_recipes.compression
        import kd_recipes.parts
        import kd_recipes.tokenizers  # noqa: F401

    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        import torch

        from kd_recipes.compression import sections
        from kd_recipes.parts import load_model
        from kd_recipes.tokenizers import hf_tokenizer

        torch.set_num_threads(num_threads)
        found = sections(path)
        settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        self._model = load_model("model", found.model, found.checkpointer, **settings).model.eval()
        self._tokenizer = hf_tokenizer(str(path))
        self._max_seq_len = max_seq_len

    def encode(self, text: str) -> list[int]:
        """See :class:`Runtime`."""
        return self._tokenizer.encode(text, add_eos=False)

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`."""
        import torch

        with torch.no_grad():
            found: Logits = self._model(torch.tensor([ids]))[0].float().numpy()
        return found

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        from kd_recipes import _torchtune

        with _torchtune.decoding(self._model) as decoder:
            ids_1 = decoder.start([list(ids)], self._max_seq_len - len(ids)).argmax(-1)
            while True:
                yield int(ids_1)
                ids_1 = decoder.step(ids_1).argmax(-1)


class Transformers(Runtime):
    """A Hugging Face directory, in float32; code that lies in it is run, since we have written it."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(num_threads)
        settings: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": True}
        self._model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(self, text: str) -> list[int]:
        """See :class:`Runtime`."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`."""
        import torch

        with torch.no_grad():
            found: Logits = self._model(torch.tensor([ids])).logits[0].float().numpy()
        return found

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        import torch

        new, cache = torch.tensor([ids]), None
        while True:
            with torch.no_grad():
                out = self._model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            new, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(new)


class _Cached(Runtime):
    """A program that keeps keys and values, and says what follows the last id alone."""

    @abstractmethod
    def restart(self) -> None:
        """Forget what it has been fed."""

    @abstractmethod
    def feed(self, ids: Sequence[int]) -> Logits:
        """Append ids; ``[V]``, of what follows the last one."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`; the last row is of the prompt fed whole, the others of one id after another."""
        self.restart()
        rows = [self.feed([index]) for index in ids[:-1]]
        self.restart()
        return np.stack([*rows, self.feed(ids)])

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        self.restart()
        new = list(ids)
        while True:
            new = [int(self.feed(new).argmax())]
            yield new[0]


class LlamaCpp(_Cached):
    """A GGUF file, in llama.cpp through llama-cpp-python."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""
        import llama_cpp  # noqa: F401

    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        from llama_cpp import Llama

        settings: dict[str, Any] = {"n_ctx": max_seq_len, "n_batch": max_seq_len, "verbose": False}
        self._model = Llama(str(path), n_threads=num_threads, n_threads_batch=num_threads, **settings)

    def encode(self, text: str) -> list[int]:
        """See :class:`Runtime`."""
        found: list[int] = self._model.tokenize(text.encode(), add_bos=True, special=True)
        return found

    def restart(self) -> None:
        """See :class:`_Cached`."""
        self._model.reset()

    def feed(self, ids: Sequence[int]) -> Logits:
        """See :class:`_Cached`."""
        from llama_cpp import llama_get_logits_ith

        self._model.eval(list(ids))
        found = llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(found, (self._model.n_vocab(),)).copy()


class ExecuTorch(_Cached):
    """A program of ExecuTorch's, in its own runtime with XNNPACK."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized
        import executorch.runtime  # noqa: F401

    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Program
        from executorch.runtime import Verification

        portable_lib._unsafe_reset_threadpool(num_threads)
        self._program = Program.get().load_program(path, verification=Verification.Minimal)
        self._forward = self._program.load_method("forward")
        self._end = 0

    def encode(self, text: str) -> None:
        """See :class:`Runtime`; its LLM runner reads a tokenizer.json."""

    def restart(self) -> None:
        """See :class:`_Cached`."""
        self._end = 0

    def feed(self, ids: Sequence[int]) -> Logits:
        """See :class:`_Cached`."""
        import torch

        (logits_1V,) = self._forward.execute([torch.tensor([list(ids)]), torch.tensor([self._end])])
        self._end += len(ids)
        found: Logits = logits_1V[0].numpy().copy()
        return found


class TorchExport(Runtime):
    """A graph of torch.export, without a cache: each new token reads the whole text again, so it is timed once."""

    num_timings = 1

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""
        import torch.export  # noqa: F401

    def __init__(self, path: Path, max_seq_len: int, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._graph = self._load(path)

    @staticmethod
    def _load(path: Path) -> Any:
        import torch

        return torch.export.load(path).module()

    def encode(self, text: str) -> None:
        """See :class:`Runtime`; a graph has no tokenizer."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`."""
        import torch

        with torch.no_grad():
            found: Logits = self._graph(torch.tensor([ids]))[0].float().numpy()
        return found

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        text = list(ids)
        while True:
            text.append(int(self.logits(text)[-1].argmax()))
            yield text[-1]


class Inductor(TorchExport):
    """A package of AOTInductor: the graph as a shared library for this kind of machine."""

    @staticmethod
    def _load(path: Path) -> Any:
        import torch

        return torch._inductor.aoti_load_package(str(path))
