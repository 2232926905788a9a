"""A user's own task as lm-evaluation-harness runs it: rows from memory, with neither YAML nor a cache of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from kd_recipes.evaluation.task_files import TaskFile

_Pairs = Sequence[tuple[float, int]]


def _perplexity(pairs: _Pairs) -> float:
    """The harness's own ends in an error above e^709: a text without spaces is one word."""
    log_likelihoods, counts = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    return float((-log_likelihoods.sum() / counts.sum()).exp())


_FIELDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        # normalized first: choices differ in length, and the longer ones are less likely for that alone
        "metric_list": [
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "byte_perplexity", "aggregation": _perplexity, "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": _perplexity, "higher_is_better": False},
        ],
    },
}


class LocalTask(ConfigurableTask):
    """A task whose documents are a file's rows.

    Args:
        file: that has been read.
    """

    def __init__(self, file: TaskFile) -> None:
        self._rows = list(file.rows)
        fields = deepcopy(_FIELDS[file.output_type])
        super().__init__(config={"task": file.name, "output_type": file.output_type, "test_split": "test", **fields})

    def download(self, *_: Any, **__: Any) -> None:
        """Take the rows for what other tasks load from a hub."""
        self.dataset = {"test": Dataset.from_list(self._rows)}
