"""Fixtures of the training workers' tests."""

from pathlib import Path

import pytest
from support.exact_cases import Models, make_models
from support.tiny_workers import write_model


@pytest.fixture(scope="session")
def student_model(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 over the extended vocabulary."""
    return write_model(tmp_path_factory.mktemp("student"), tiny_tokenizers[1])


@pytest.fixture(scope="session")
def models(tiny_tokenizers, student_model, tmp_path_factory) -> Models:
    """That student with its teachers."""
    return make_models(student_model, tiny_tokenizers, tmp_path_factory.mktemp("models"))
