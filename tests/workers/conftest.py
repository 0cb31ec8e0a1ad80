"""Fixtures of the training workers' tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.exact_cases import Models
from support.process_group import group_of_one
from support.tiny_workers import write_model
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Workers in this process form a group of one, which ends with the module."""
    with group_of_one():
        yield


@pytest.fixture(scope="session")
def extend_start(tiny_tokenizers: tuple[Path, Path]) -> int:
    """First id that the student's tokenizer has over the teacher's."""
    return len(AutoTokenizer.from_pretrained(tiny_tokenizers[0]))


@pytest.fixture(scope="session")
def student_ids(tiny_tokenizers: tuple[Path, Path]) -> int:
    """Number of ids of the student's tokenizer."""
    return len(AutoTokenizer.from_pretrained(tiny_tokenizers[1]))


@pytest.fixture(scope="session")
def student_model(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 over the extended vocabulary."""
    return write_model(tmp_path_factory.mktemp("student"), tiny_tokenizers[1])


@pytest.fixture(scope="session")
def teacher_model(
    tiny_tokenizers: tuple[Path, Path], student_ids: int, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tied Qwen3 whose padded rows reach past the first extended ids, as the real teacher's do."""
    return write_model(tmp_path_factory.mktemp("teacher"), tiny_tokenizers[0], rows=student_ids - 10, seed=1)


@pytest.fixture(scope="session")
def models(tiny_tokenizers, student_model, teacher_model, student_ids, extend_start, tmp_path_factory) -> Models:
    """The two, an untied student, and another model with the student's vocabulary."""
    untied = write_model(tmp_path_factory.mktemp("untied"), tiny_tokenizers[1], tied=False)
    frozen = write_model(tmp_path_factory.mktemp("frozen"), tiny_tokenizers[1], seed=5)
    return Models(student_model, untied, teacher_model, frozen, student_ids, extend_start)
