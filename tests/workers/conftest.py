"""Fixtures of the training workers' tests."""

from pathlib import Path

import pytest
from support.exact_cases import Models
from support.tiny_workers import write_model
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def student_model(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 over the extended vocabulary."""
    return write_model(tmp_path_factory.mktemp("student"), tiny_tokenizers[1])


@pytest.fixture(scope="session")
def models(tiny_tokenizers, student_model, tmp_path_factory) -> Models:
    """That student, an untied one, and another model with its vocabulary; and a tied teacher, whose padded rows reach
    past the first extended ids, as the real teacher's do."""
    extend_start, ids = (len(AutoTokenizer.from_pretrained(folder)) for folder in tiny_tokenizers)
    teacher = write_model(tmp_path_factory.mktemp("teacher"), tiny_tokenizers[0], rows=ids - 10, seed=1)
    untied = write_model(tmp_path_factory.mktemp("untied"), tiny_tokenizers[1], tied=False)
    frozen = write_model(tmp_path_factory.mktemp("frozen"), tiny_tokenizers[1], seed=5)
    return Models(student_model, untied, teacher, frozen, ids, extend_start)
