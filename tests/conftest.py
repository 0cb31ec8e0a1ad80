"""Fixtures that several test modules share. Nothing here starts an engine or Ray unless a test asks for it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.tiny_pairs import REPO, Pair, make_pair

if TYPE_CHECKING:
    from support.exact_cases import Models
    from transformers import PreTrainedTokenizerBase

    from recipe.onpolicy_distill.quickstart.world import World

# Tests never reach a hub, and thread pools of several processes would fight over a small machine's cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Workers that Ray starts ahead have another environment than ours and are never used: two interpreters less a start.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Ray's workers and started programs import the same checkout, and helpers from tests/support.
os.environ["PYTHONPATH"] = f"{REPO}{os.pathsep}{REPO / 'tests'}"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Workers in this process form a group of one, which ends with the module, and use half the machine's cores."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers and data beside the checkout; tests that need it skip where it is absent."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real tokenizers and data in ../shared/data, which the project does not ship")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a teacher's tokenizer (some hundred ids) and of a student's with item tokens added."""
    from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers

    teacher, student = build_tiny_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    return Path(teacher), Path(student)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizers: tuple[Path, Path]) -> "PreTrainedTokenizerBase":
    """The tiny student's, which has item tokens."""
    from verl.utils.tokenizer import hf_tokenizer

    return hf_tokenizer(tiny_tokenizers[1])


@pytest.fixture(scope="session")
def tiny_pair(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Random teacher and student of two layers over the tiny tokenizers."""
    out = tmp_path_factory.mktemp("pair")
    teacher_tokenizer, student_tokenizer = tiny_tokenizers
    return make_pair(teacher_tokenizer, student_tokenizer, out)


@pytest.fixture(scope="session")
def student_model(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen3 over the extended vocabulary."""
    from support.tiny_workers import write_model

    return write_model(tmp_path_factory.mktemp("student"), tiny_tokenizers[1])


@pytest.fixture(scope="session")
def models(tiny_tokenizers, student_model, tmp_path_factory) -> "Models":
    """That student with its teachers."""
    from support.exact_cases import make_models

    return make_models(student_model, tiny_tokenizers, tmp_path_factory.mktemp("models"))


@pytest.fixture
def hostfile(tmp_path: Path) -> Callable[..., Path]:
    """Writes a hostfile of the lines given."""

    def write(*lines: str) -> Path:
        path = tmp_path / "my hosts"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """A world of the quickstart that takes no time to make."""
    from support.small_world import build_small_world

    return build_small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def small_models(small_world: "World") -> tuple[Path, Path]:
    """Teacher and student of the small world, three steps of training each, kept beside it."""
    from support.small_world import make_small_models

    return make_small_models(small_world, small_world.folder.parent)
