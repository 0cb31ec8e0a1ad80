"""Fixtures of the retention study's tests."""

from pathlib import Path

import pytest

from experiments.retention import worlds
from experiments.retention.synthetic import PromptShape, synthetic_prompts
from experiments.retention.variants import HISTORIES
from experiments.retention.worlds import Prepared
from recipe.onpolicy_distill.quickstart.world import World


@pytest.fixture(scope="module")
def prepared(small_world: World, small_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    shape = PromptShape(0, 4, codes_per_level=4, prompts=300)
    made_up = synthetic_prompts(small_world, shape, tmp_path_factory.mktemp("prompts"))
    rehearsal = {HISTORIES: small_world.rec_train, **made_up}
    return Prepared(small_world, *small_models, rehearsal, max_prompt_tokens=64, max_answer_tokens=12)


@pytest.fixture
def small(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's world is a small one."""
    monkeypatch.setitem(worlds.WORLDS, "quickstart", lambda seed, folder: prepared)
