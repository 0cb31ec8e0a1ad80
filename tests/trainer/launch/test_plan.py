"""The plan of a run's memory: numbers by hand, peaks that are measured, and runs that are refused."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.peak_memory import PeakBytes

from recipe.onpolicy_distill import plan as command
from verl.config import PPOConfig
from verl.trainer.launch import plan as module
from verl.trainer.launch.memory import RankShare, largest_micro_batch, trained_share
from verl.trainer.launch.plan import ENGINE, RANK, TEACHER_RANK, check_fits, plan_memory, read_shapes
from verl.trainer.launch.typed import load_config

measuring: Any = importlib.import_module("benchmarks.plan")

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
WEIGHTS = 100 * 8 + 8 + 2 * (2 * 8 * 8 + 2 * 8 * 4 + 2 * 4 + 3 * 8 * 16 + 2 * 8)
"""Embedding and last norm; of each block queries and output, keys and values, their norms, the MLP, two norms."""
ADAPTED = 2 * (2 * 16 + 2 * 12 + 3 * 24)
"""In and out features of all linear layers."""
SELF = "++algorithm.distill.teachers.self={vocabulary: full, sources: [rec_*]}"
AVERAGE = "++algorithm.distill.teachers.slow={ema: 0.9, sources: [rec_*]}"
STITCHED = "++algorithm.distill.teachers.mixed={vocabulary: stitched, sources: [rec_*]}"
EXACT = "algorithm.distill.objective=exact"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def settings(student: Path, *overrides: str, teacher: Path | None = None) -> PPOConfig:
    paths = [f"actor_rollout_ref.model.path={student}", f"actor_rollout_ref.ref.model.path={teacher or student}"]
    start = "actor_rollout_ref.rollout.extend_vocab_start_token=90"
    return load_config([*paths, start, *overrides], "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def planned(config: PPOConfig, device: str = "cuda", card: int | None = None) -> Any:
    return plan_memory(config, read_shapes(config), device, card)


def test_weights_gradients_and_moments_by_hand(folder: Path) -> None:
    config = settings(folder, "trainer.n_gpus_per_node=2")
    [shape] = read_shapes(config).values()
    assert (shape.weights, shape.ends, shape.block) == (WEIGHTS, 808, 600)
    # In fp32 over two ranks, gathered in bf16; a block while the next one's buffer is there.
    half = WEIGHTS * 4 // 2
    assert trained_share(shape, config, "cuda") == RankShare(half, half, 2 * half, 800 * 4 // 2, 808 * 2, 2 * 600 * 2)
    copies = ["trainer.n_gpus_per_node=4", "actor_rollout_ref.actor.fsdp_config.fsdp_size=2"]
    assert trained_share(shape, settings(folder, *copies), "cuda") == trained_share(shape, config, "cuda")
    config = settings(folder, "actor_rollout_ref.model.lora_rank=4")
    adapter = 4 * ADAPTED * 4
    assert trained_share(shape, config, "cuda")[:3] == (WEIGHTS * 2 + adapter, adapter, 2 * adapter)
    config = settings(folder, "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=[q_proj]")
    assert trained_share(shape, config, "cuda").gradients == 4 * 2 * 16 * 4
    config = settings(folder, "actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora_extended_rows=True")
    rows = 800 * 4
    assert trained_share(shape, config, "cuda")[:4] == (
        (WEIGHTS - 800) * 2 + rows + adapter,
        rows + adapter,
        2 * (rows + adapter),
        rows,
    )


def test_the_largest_micro_batch(folder: Path) -> None:
    sizes = ["data.max_prompt_length=60", "data.max_response_length=41", "data.train_batch_size=8"]
    of = [
        largest_micro_batch(settings(folder, *sizes, *more), "update") for more in ([], ["trainer.n_gpus_per_node=4"])
    ]
    assert of == [(8 * 100, 8 * 41, True), (2 * 100, 2 * 41, True)]
    shared = ["trainer.n_gpus_per_node=4", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"]
    # Two ranks compute four rows together.
    assert largest_micro_batch(settings(folder, *sizes, *shared), "update") == (200, 82, True)
    tokens = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=250"
    rows = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"
    of = [largest_micro_batch(settings(folder, *sizes, word), "update") for word in (tokens, rows)]
    assert of == [(250, 3 * 41, False), (200, 82, False)]
    cut = ["actor_rollout_ref.rollout.horizon=11", "actor_rollout_ref.actor.ppo_mini_batch_size=2"]
    assert largest_micro_batch(settings(folder, *sizes, *cut), "update").tokens == 2 * 70
    assert largest_micro_batch(settings(folder, *sizes, *cut), "score").tokens == 8 * 70, "a batch whole"
    cut += ["data.val_files=v.parquet", "data.val_batch_size=8"]
    assert largest_micro_batch(settings(folder, *sizes, *cut), "score").tokens == 8 * 100, "validation is not cut"


def test_servers_and_engines_with_gpus_of_their_own_take_nothing_here(folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()  # beside a URL a folder may be without a model
    url = "actor_rollout_ref.ref.url=http://10.0.0.1:8000"
    served = planned(settings(folder, url, "algorithm.distill.objective=topk", teacher=tokenizer))
    assert served.parts[RANK]["frozen teachers"] == 0
    own, pool = "actor_rollout_ref.ref.engine=vllm", ["trainer.teacher_nnodes=1", "trainer.teacher_n_gpus_per_node=1"]
    of_run = planned(settings(folder, own, *pool, SELF, "algorithm.distill.objective=topk"))
    assert of_run.parts[RANK]["frozen teachers"] == 2 * WEIGHTS and TEACHER_RANK not in of_run.parts
    pool = ["trainer.rollout_nnodes=1", "trainer.rollout_n_gpus_per_node=1"]
    apart = planned(settings(folder, *pool), card=2**30)
    assert apart.peak("update") == max(apart.stages["update"].values()) == 2**29, "of the engine's GPU"
    assert apart.least == 16 * WEIGHTS


def test_where_frozen_teachers_are(folder: Path, tmp_path: Path) -> None:
    teacher, adapter = tmp_path / "teacher", "actor_rollout_ref.model.lora_rank=4"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps({**TINY, "vocab_size": 90}))
    base, own = (WEIGHTS - 80) * 2, WEIGHTS * 2

    def held(*overrides: str) -> Any:
        return planned(settings(folder, *overrides, teacher=teacher))

    assert held().parts[RANK]["frozen teachers"] == base
    assert held(SELF, STITCHED).parts[RANK]["frozen teachers"] == base + own
    assert held(SELF, STITCHED, adapter).parts[RANK]["frozen teachers"] == base
    assert held(SELF, AVERAGE).parts[RANK]["frozen teachers"] == base + own + WEIGHTS * 4, "in fp32"
    apart = held(SELF, adapter, "trainer.teacher_nnodes=1", "trainer.teacher_n_gpus_per_node=1")
    assert apart.parts[RANK]["frozen teachers"] == 0 and apart.parts[TEACHER_RANK]["frozen teachers"] == base + own
    assert apart.stages["update"][TEACHER_RANK] == base + own < apart.stages["score"][TEACHER_RANK]
    offload = "actor_rollout_ref.ref.fsdp_config.param_offload=True"
    assert held(offload).stages["generate"][RANK] == held().stages["generate"][RANK] - base
    # An exact objective meets its teachers in the update.
    more = [
        held(EXACT, *words).stages["update"][RANK] - held(*words).stages["update"][RANK] for words in ([], [offload])
    ]
    assert 0 < more[0] == more[1] - base


def test_engines_and_what_stays_beside_them(folder: Path) -> None:
    card, stays = 2**20, 12 * WEIGHTS + 2 * WEIGHTS
    plan = planned(settings(folder, "actor_rollout_ref.rollout.gpu_memory_utilization=0.25"), card=card)
    assert plan.stages["generate"] == {RANK: stays, ENGINE: card // 4} and plan.peak("generate") == stays + card // 4
    assert plan.stages["update"][ENGINE] == 0 and plan.stages["sync"][ENGINE] == WEIGHTS * 2
    assert plan.stages["sync"][RANK] == stays + WEIGHTS * 2  # the whole model fits a bucket
    assert plan.engine.row == 2 * 2 * 4 * (512 + 512) * 2  # keys and values of two blocks
    words = [
        "actor.fsdp_config.optimizer_offload=True",
        "rollout.free_cache_engine=False",
        "rollout.enforce_eager=True",
    ]
    other = planned(settings(folder, *(f"actor_rollout_ref.{word}" for word in words)), card=card)
    assert other.stages["generate"][RANK] == stays - 8 * WEIGHTS
    assert other.stages["update"][ENGINE] == card // 2


# ------------------------------------------------------------------ measured


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "spec",
    [
        measuring.case(128, 384, 2, 3000, EXACT, STITCHED, rows=2, micro_rows=1),
        measuring.case(192, 512, 2, 1500, SELF, measuring.NO_CHECKPOINTING, f"{measuring.MODEL}.lora_rank=8", rows=2),
    ],
    ids=["stitched, two micro-batches", "adapter"],
)
def test_the_plan_is_near_to_what_tensors_take(spec: dict[str, Any], tmp_path: Path) -> None:
    measuring.write_models(tmp_path, spec)
    config: Any = measuring.settings(tmp_path, spec)
    peaks: dict[str, int] = {}

    def measure(stage: str, run: Callable[[], object]) -> None:
        peak.bytes = 0
        run()
        peaks[stage] = peak.bytes

    with PeakBytes() as peak:
        measuring.step(config, measure)
    stages = plan_memory(config, read_shapes(config), "cpu").stages
    assert {stage: stages[stage][RANK] for stage in ("score", "update")} == {
        stage: pytest.approx(peaks[stage], rel=0.15) for stage in ("score", "update")
    }


# ------------------------------------------------------------------ refusals, the command


def test_a_run_that_cannot_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(folder)
    least = 16 * WEIGHTS
    monkeypatch.setattr(module, "card_bytes", lambda: least)
    check_fits(config)
    monkeypatch.setattr(module, "card_bytes", lambda: least - 1)
    with pytest.raises(ValueError, match=rf"model\.path={folder} does not fit.*set trainer\.n_gpus_per_node=2"):
        check_fits(config)
    monkeypatch.setattr(module, "card_bytes", lambda: None)
    check_fits(config)


def test_the_command_prints_tables_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"actor_rollout_ref.{role}.path={folder}" for role in ("model", "ref.model")]
    assert command.main([*paths, "--card-gib", "24", "trainer.device=cuda"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["peak_stage"] == "start" and found["available_bytes"] == 24 * 2**30
    assert found["parts"][RANK]["moments"] == 8 * WEIGHTS
    # The engine's half of a card is all that counts here.
    assert list(found["helps"]) == ["actor_rollout_ref.rollout.gpu_memory_utilization=0.3"]
    assert [line.split()[0] for line in table if line.startswith("generate")] == ["generate"]
    assert command.main([*paths, "trainer.nodes=2"]) == 1
    assert "trainer.nnodes" in capsys.readouterr().err
    assert command.main([f"actor_rollout_ref.model.path={folder / 'none'}"]) == 1
