"""What several tests of compression need."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy import save_model


@pytest.fixture(scope="module", params=["llama, tied", "llama, untied", "qwen2, tied", "qwen2, untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to read, never to write into."""
    directory = tmp_path_factory.mktemp("source")
    model_type, tied = request.param.split(", ")
    save_model(directory, model_type, tie_word_embeddings=tied == "tied")
    return directory
