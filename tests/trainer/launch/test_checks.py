"""User errors that a look at files and packages finds."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config.rollout import AGENT_LOOPS
from verl.experimental.agent_loop.base import AgentLoopBase, get_agent_loop_class, register
from verl.trainer.launch import checks as preflight
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, an empty cache, every package installed, and a folder of one's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(preflight, "is_installed", lambda package: True)
    monkeypatch.chdir(tmp_path)


def write_model(folder: Path, **entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"vocab_size": 100, "max_position_embeddings": 2048, **entries}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_parquet(path: Path, rows: int = 40, column: str = "messages") -> Path:
    pq.write_table(pa.table({"source": ["a"] * rows, column: ["[]"] * rows}), path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Overrides of a run that is in order."""
    (tmp_path / "reward.py").touch()
    return [
        "custom_reward_function.path=reward.py",
        f"actor_rollout_ref.model.path={write_model(tmp_path / 'student', vocab_size=120)}",
        f"actor_rollout_ref.ref.model.path={write_model(tmp_path / 'teacher')}",
        "actor_rollout_ref.rollout.extend_vocab_start_token=100",
        f"data.train_files={write_parquet(tmp_path / 'train.parquet')}",
        f"trainer.default_local_dir={tmp_path / 'out' / 'ckpt'}",
    ]


def check(*overrides: str) -> list[str]:
    return check_run(load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer"))


def test_a_run_in_order_passes_and_makes_nothing(run: list[str], tmp_path: Path) -> None:
    assert check(*run) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor_rollout_ref.model.path=null"], "actor_rollout_ref.model.path is not set; give the student's folder"),
        (["actor_rollout_ref.ref.model.path=null"], "actor_rollout_ref.ref.model.path is not set, and algorithm.adv"),
        (
            ["actor_rollout_ref.model.path=/none/here"],
            "actor_rollout_ref.model.path=/none/here: there is no such folder",
        ),
        (["actor_rollout_ref.model.path=./here"], "actor_rollout_ref.model.path=./here: there is no such folder"),
        (["actor_rollout_ref.model.path=STUDENT"], "actor_rollout_ref.model.path=STUDENT: there is no such folder"),
        (["actor_rollout_ref.model.path=out..x/y"], "actor_rollout_ref.model.path=out..x/y: there is no such folder"),
        (["actor_rollout_ref.model.path=student/typo"], "actor_rollout_ref.model.path=student/typo: there is no such"),
        (["actor_rollout_ref.model.path=train.parquet"], "train.parquet is a file; give the folder it lies in"),
        (["actor_rollout_ref.model.path=owner/name"], "owner/name is neither a folder nor in the local hub cache"),
        (["actor_rollout_ref.ref.model.path=empty"], "actor_rollout_ref.ref.model.path=empty holds no config.json"),
        (["actor_rollout_ref.model.path=broken"], "actor_rollout_ref.model.path=broken: config.json is no JSON"),
        (
            ["actor_rollout_ref.model.tokenizer_path=nowhere"],
            "actor_rollout_ref.model.tokenizer_path=nowhere: there is",
        ),
        (
            ["actor_rollout_ref.ref.ref_replace_token_id=100"],
            "actor_rollout_ref.ref.ref_replace_token_id=100 is no id of",
        ),
        (
            ["data.max_prompt_length=2000", "actor_rollout_ref.ref.model.path=long"],
            "data.max_prompt_length=2000 + data.max_response_length=512 = 2512 is above max_position_embeddings=2048",
        ),
        (
            ["algorithm.adv_estimator=grpo", "algorithm.distill.coef=1", "actor_rollout_ref.ref.model.path=null"],
            "actor_rollout_ref.ref.model.path is not set, and algorithm.distill.coef=1.0 learns from a teacher",
        ),
        (
            ["trainer.best_metric=val/reward", "trainer.test_freq=5"],
            "trainer.best_metric='val/reward' needs data.val_files; set it",
        ),
        (
            ["algorithm.adv_estimator=rloo", "custom_reward_function.path=null"],
            "algorithm.adv_estimator=rloo learns from a task reward and none is given; set custom_reward_function.path",
        ),
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator='gae' is unknown; choose from"),
        (["data.train_files=null"], "data.train_files is not set; give a parquet file"),
        (["data.train_files=''"], "data.train_files is not set; give a parquet file"),
        (["data.train_files=['']"], "data.train_files= matches no parquet file"),
        (["data.train_files=gone.parquet"], "data.train_files=gone.parquet matches no parquet file; correct the path"),
        (["data.train_files=empty"], "data.train_files=empty matches no parquet file"),
        (["data.val_files=[train.parquet,gone.parquet]"], "data.val_files=gone.parquet matches no parquet file"),
        (["data.train_files=text.parquet"], "data.train_files=text.parquet cannot be read as parquet"),
        (
            ["data.train_files=segments.parquet"],
            "data.train_files=segments.parquet has neither a column 'messages' nor data.prompt_key='prompt', "
            "only source, segments",
        ),
        (["data.train_batch_size=41"], "data.train_batch_size=41 is more than the 40 rows of data.train_files="),
        (["data.train_max_samples=20"], "data.train_batch_size=32 is more than the 20 rows"),
        (["trainer.val_only=True"], "trainer.val_only=True needs data.val_files"),
        (["custom_reward_function.path=score.py"], "custom_reward_function.path=score.py: there is no such file"),
        (["data.custom_cls.path=/x/mine.py"], "data.custom_cls.path=/x/mine.py: there is no such file"),
        (
            ["actor_rollout_ref.rollout.multi_turn.tool_config_path=tools.yaml"],
            "tool_config_path=tools.yaml: there is no",
        ),
        (
            ["actor_rollout_ref.rollout.agent.default_agent_loop=browser_agent"],
            "actor_rollout_ref.rollout.agent.default_agent_loop='browser_agent' is unknown; use tool_agent or "
            "single_turn_agent, or register one's own (verl.experimental.agent_loop.base.register)",
        ),
        (["trainer.default_local_dir=train.parquet/x"], "trainer.default_local_dir=train.parquet/x cannot be written"),
        (["trainer.rollout_data_dir=train.parquet"], "trainer.rollout_data_dir=train.parquet cannot be written"),
        (
            ["trainer.resume_mode=resume_path", "trainer.resume_from_path=gone"],
            "trainer.resume_from_path=gone: there is no such folder",
        ),
    ],
)
def test_user_errors(run: list[str], tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "long", max_position_embeddings=8192)
    write_model(tmp_path / "broken").joinpath("config.json").write_text("{")
    (tmp_path / "text.parquet").write_text("no parquet")
    write_parquet(tmp_path / "segments.parquet", column="segments")
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        check(*run, *overrides)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("package", "override", "expected"),
    [
        ("vllm", "actor_rollout_ref.rollout.name=vllm", "rollout.name=vllm needs vLLM, which is not installed"),
        ("wandb", "trainer.logger=[console,wandb]", "needs the package wandb, which is not installed"),
        ("tensorboard", "trainer.logger=tensorboard", "needs the package tensorboard, which is not installed"),
    ],
)
def test_missing_packages(
    run: list[str], monkeypatch: pytest.MonkeyPatch, package: str, override: str, expected: str
) -> None:
    monkeypatch.setattr(preflight, "is_installed", lambda name: name != package)
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(*run, override)
    check(*run, "actor_rollout_ref.rollout.name=hf", "trainer.logger=console")


def test_a_rule_that_reads_a_reward_needs_a_reward_function(run: list[str]) -> None:
    rule = "trainer.best_metric='val/reverse_kl min subject to val/rec_*/reward >= 0.98 of step 0'"
    best = [*run, rule, "data.val_files=train.parquet", "trainer.test_freq=1"]
    assert check(*best) == []
    with pytest.raises(ValueError, match=r"reads val/rec_\*/reward, which nothing gives; set custom_reward_function"):
        check(*best, "custom_reward_function.path=null")
    free = "trainer.best_metric='val/reverse_kl min'"
    assert check(*best, free, "custom_reward_function.path=null") == []


def test_all_errors_come_at_once(run: list[str]) -> None:
    with pytest.raises(ValueError, match="train_files") as caught:
        check(
            *run, "data.train_files=gone", "actor_rollout_ref.model.path=gone", "actor_rollout_ref.ref.model.path=gone"
        )
    assert len(str(caught.value).splitlines()) == 3


def test_files_may_be_folders_globs_and_lists(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for index in range(3):
        write_parquet(tmp_path / "many" / f"part-{index}.parquet", rows=11)
    for files in ("many", "many/*.parquet", "[many/part-0.parquet,many/part-1.parquet,many/part-2.parquet]"):
        assert check(*run, f"data.train_files={files}") == []
        with pytest.raises(ValueError, match="more than the 33 rows"):
            check(*run, f"data.train_files={files}", "data.train_batch_size=34")


def test_a_folder_stands_for_its_own_files_as_it_does_when_they_are_read(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "top" / "deeper").mkdir(parents=True)
    write_parquet(tmp_path / "top" / "deeper" / "train.parquet")
    with pytest.raises(ValueError, match=r"data\.train_files=top matches no parquet file"):
        check(*run, "data.train_files=top")
    write_parquet(tmp_path / "top" / "train.parquet")
    assert check(*run, "data.train_files=top", "data.train_batch_size=40") == []
    with pytest.raises(ValueError, match="more than the 40 rows"):
        check(*run, "data.train_files=top", "data.train_batch_size=80")
    assert check(*run, "data.train_files=top/**/*.parquet", "data.train_batch_size=80") == []


def test_the_built_in_agent_loops_are_known_without_their_registry() -> None:
    for module in ("tool_agent_loop", "single_turn_agent_loop"):
        importlib.import_module(f"verl.experimental.agent_loop.{module}")
    assert [get_agent_loop_class(name).__name__ for name in AGENT_LOOPS] == ["ToolAgentLoop", "SingleTurnAgentLoop"]


def test_a_registered_agent_loop_is_known(run: list[str]) -> None:
    override = "actor_rollout_ref.rollout.agent.default_agent_loop=own_agent_of_the_preflight_test"
    with pytest.raises(ValueError, match="own_agent_of_the_preflight_test"):
        check(*run, override)
    register("own_agent_of_the_preflight_test")(AgentLoopBase)
    assert check(*run, override) == []


def test_messages_may_stand_in_another_column(run: list[str], tmp_path: Path) -> None:
    write_parquet(tmp_path / "chat.parquet", column="chat")
    assert check(*run, "data.train_files=chat.parquet", "data.prompt_key=chat") == []


def test_a_data_set_of_ones_own_reads_what_it_likes(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    write_parquet(tmp_path / "other.parquet", rows=1, column="text")
    assert check(*run, "data.custom_cls.path=mine.py", "data.train_files=other.parquet") == []


def test_a_model_that_stretches_its_positions_is_left_alone(run: list[str], tmp_path: Path) -> None:
    write_model(tmp_path / "student", vocab_size=120, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    write_model(tmp_path / "teacher", rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert check(*run, "data.max_prompt_length=2000") == []


def test_override_config_counts(run: list[str]) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        check(*run, "actor_rollout_ref.model.override_config.max_position_embeddings=64")


GRPO = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2"]


def test_task_rewards_need_no_teacher(run: list[str]) -> None:
    assert check(*run, *GRPO, "actor_rollout_ref.ref.model.path=null") == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor_rollout_ref.rollout.top_p=0.9"], "biased: actor_rollout_ref.rollout.top_p=0.9 and top_k=-1"),
        (["actor_rollout_ref.rollout.top_k=20"], "biased: actor_rollout_ref.rollout.top_p=1.0 and top_k=20"),
        (["actor_rollout_ref.rollout.engine_kwargs.sglang.x=1"], "engine_kwargs.sglang is accepted and has no effect"),
        (["trainer.test_freq=5"], "trainer.test_freq=5 has no effect: data.val_files is not set"),
        (
            ["algorithm.distill.objective=topk", "algorithm.distill_adv_max_clip=3"],
            "algorithm.distill_adv_max_clip=3.0 has no effect here: it bounds the advantage of drawn tokens, and "
            "algorithm.distill.objective=topk compares distributions",
        ),
        (
            [*GRPO, "algorithm.distill_adv_min_clip=-3"],
            "algorithm.distill_adv_min_clip=-3.0 has no effect here: it bounds the advantage of drawn tokens, and "
            "algorithm.adv_estimator=grpo learns from no teacher",
        ),
        (
            ["algorithm.adv_estimator=rloo"],
            "algorithm.adv_estimator=rloo compares the answers to one prompt, and actor_rollout_ref.rollout.n=1 gives",
        ),
        (
            ["data.synthetic_item_prompts.catalogue=gone.parquet"],
            "data.synthetic_item_prompts.catalogue has no effect here: data.synthetic_item_prompts.count=0 makes no",
        ),
        (
            ["++data.synthetic_item_prompts.templates={next: {user: '{item}'}}"],
            "data.synthetic_item_prompts.templates has no effect here: data.synthetic_item_prompts.count=0 makes no",
        ),
    ],
)
def test_notices(run: list[str], overrides: list[str], expected: str) -> None:
    (notice,) = check(*run, *overrides, "trainer.engine_gap_bound=null")
    assert expected in notice


@pytest.mark.parametrize("setting", ["do_sample=False", "temperature=0"])
def test_greedy_validation_says_what_it_does_not_measure(run: list[str], setting: str) -> None:
    override = f"actor_rollout_ref.rollout.val_kwargs.{setting}"
    (notice,) = check(*run, "data.val_files=train.parquet", override)
    assert "validation is greedy" in notice
    assert "val/reverse_kl" in notice
    assert check(*run, override) == []
    assert check(*run, "data.val_files=train.parquet", *GRPO, override) == []


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.distill_adv_max_clip=null",
        "algorithm.distill_adv_max_clip=5",
        "algorithm.distill_adv_min_clip=-30",
    ],
)
def test_bounds_that_a_run_has_without_asking_are_not_spoken_of(run: list[str], setting: str) -> None:
    assert check(*run, "algorithm.distill.objective=exact", setting) == []
    assert check(*run, "algorithm.distill_adv_max_clip=3", "algorithm.distill_adv_min_clip=-3") == []


def test_a_reward_for_items_that_no_teacher_reads_is_said(run: list[str]) -> None:
    mixed = [*run, *GRPO, "algorithm.distill.coef=0.5"]
    (notice,) = check(*mixed)
    assert "an answer is trained up to its first one" in notice and "algorithm.distill.teachers.self" in notice
    assert check(*mixed, "++algorithm.distill.teachers.self={sources:[rec_*]}") == []
    assert check(*mixed, "actor_rollout_ref.rollout.extend_vocab_start_token=null") == []


def test_importance_weights_take_the_notice_away(run: list[str]) -> None:
    corrected = ["actor_rollout_ref.rollout.top_p=0.9", "algorithm.rollout_correction.rollout_is=token"]
    (notice,) = check(*run, *corrected)
    assert notice.startswith("trainer.engine_gap_bound=0.1 has no effect here")
    assert check(*run, *corrected, "trainer.engine_gap_bound=null") == []


def test_hub_names_pass_where_there_is_a_hub(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (notice,) = check(*run, "actor_rollout_ref.model.path=owner/name")
    assert notice == "actor_rollout_ref.model.path=owner/name is no local folder; it will be fetched from the hub"
