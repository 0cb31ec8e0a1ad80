"""The student's tokenizer, and where its item tokens begin."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizers: tuple[Path, Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_tokenizers[1])


@pytest.fixture(scope="session")
def item_start(tiny_tokenizers: tuple[Path, Path]) -> int:
    return len(AutoTokenizer.from_pretrained(tiny_tokenizers[0]))
