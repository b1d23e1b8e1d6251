"""The model folder of tests/models."""

from __future__ import annotations

from tests.models.conftest import model_folder

__all__ = ["model_folder"]
