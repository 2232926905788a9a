"""The programs that load what is exported, behind one face: logits of a prompt, and greedy text after it.

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
    def __init__(self, path: Path, max_seq_len: int) -> None:
        """Load it.

        Args:
            path: a file or a directory.
            max_seq_len: of prompt and new tokens together.
        """

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Logits:
        """``[S, V]``, as the program computes them for a prompt."""

    @abstractmethod
    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """The likeliest next id, again and again; the first comes as soon as the prompt has been read."""


class Student(Runtime):
    """torchtune's model, in float32: what the others are compared with."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""

    def __init__(self, path: Path, max_seq_len: int) -> None:
        import torch

        from kd_recipes.compression import sections
        from kd_recipes.parts import load_model

        found = sections(path)
        settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        self._model = load_model("model", found.model, found.checkpointer, **settings).model.eval()
        self._max_seq_len = max_seq_len

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
    """A Hugging Face directory, in float32."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""

    def __init__(self, path: Path, max_seq_len: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

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
                out = self._model(new, past_key_values=cache, use_cache=True)
            new, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(new)


class LlamaCpp(Runtime):
    """A GGUF file, in llama.cpp through llama-cpp-python."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""

    def __init__(self, path: Path, max_seq_len: int) -> None:
        from llama_cpp import Llama

        settings: dict[str, Any] = {"n_ctx": max_seq_len, "n_batch": max_seq_len, "logits_all": True, "verbose": False}
        self._model = Llama(str(path), **settings)

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`."""
        self._model.reset()
        self._model.eval(list(ids))
        return np.array(self._model.scores[: len(ids)], np.float32)

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        self._model.reset()
        new = list(ids)
        while True:
            self._model.eval(new)
            new = [int(self._model.scores[self._model.n_tokens - 1].argmax())]
            yield new[0]


class _Stateless(Runtime):
    """A graph without a cache: every new token reads the whole text again, which takes long enough to time once."""

    num_timings = 1

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """See :class:`Runtime`."""
        text = list(ids)
        while True:
            text.append(int(self.logits(text)[-1].argmax()))
            yield text[-1]


class TorchExport(_Stateless):
    """A graph of torch.export."""

    @staticmethod
    def prepare() -> None:
        """See :class:`Runtime`."""

    def __init__(self, path: Path, max_seq_len: int) -> None:
        import torch

        self._graph: Any = torch.export.load(path).module()

    def logits(self, ids: Sequence[int]) -> Logits:
        """See :class:`Runtime`."""
        import torch

        with torch.no_grad():
            found: Logits = self._graph(torch.tensor([ids]))[0].float().numpy()
        return found


class Inductor(TorchExport):
    """A package of AOTInductor: the graph as a shared library for this kind of machine."""

    def __init__(self, path: Path, max_seq_len: int) -> None:
        import torch

        self._graph = torch._inductor.aoti_load_package(str(path))
