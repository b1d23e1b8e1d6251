"""One model folder for all tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.worlds import write_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with tokenizer, chat template and pad token."""
    return write_model(tmp_path_factory.mktemp("world") / "llama")
