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
from verl.trainer.launch import checks
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config

STUDENT, TEACHER, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.ref.model", "actor_rollout_ref.rollout"
SYNTHETIC = "data.synthetic_item_prompts"
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=2"]
NO_REWARD = "custom_reward_function.path=null"


def write_model(folder: Path, **entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"vocab_size": 100, "max_position_embeddings": 2048, **entries}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_parquet(path: Path, column: str = "messages") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"source": ["a"] * 40, column: ["[]"] * 40}), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Overrides of a run that is in order; no hub, an empty cache, every package installed, its own folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(checks, "is_installed", lambda package: True)
    monkeypatch.chdir(tmp_path)
    return [
        "custom_reward_function.path=reward.py",
        f"{STUDENT}.path={write_model(tmp_path / 'student', vocab_size=120)}",
        f"{TEACHER}.path={write_model(tmp_path / 'teacher')}",
        f"{ROLLOUT}.extend_vocab_start_token=100",
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
        ([f"{STUDENT}.path=null"], f"{STUDENT}.path is not set; give the student's folder"),
        ([f"{TEACHER}.path=null"], f"{TEACHER}.path is not set, and algorithm.adv_estimator=on_policy_distill learns"),
        ([f"{TEACHER}.path=null", *GRPO, "algorithm.distill.coef=1"], "not set, and algorithm.distill.coef=1.0 learns"),
        *(
            ([f"{STUDENT}.path={path}"], f"{STUDENT}.path={path}: there is no such folder; correct the path")
            for path in ("/none/here", "./here", "STUDENT", "out..x/y", "student/typo")
        ),
        ([f"{STUDENT}.path=train.parquet"], "train.parquet is a file; give the folder it lies in"),
        ([f"{STUDENT}.path=owner/name"], "owner/name is neither a folder nor in the local hub cache"),
        ([f"{TEACHER}.path=empty"], f"{TEACHER}.path=empty holds no config.json"),
        ([f"{STUDENT}.path=broken"], f"{STUDENT}.path=broken: config.json is no JSON"),
        ([f"{STUDENT}.tokenizer_path=nowhere"], f"{STUDENT}.tokenizer_path=nowhere: there is no such folder"),
        (["++algorithm.distill.teachers.a.path=x"], "algorithm.distill.teachers.a.path=x: there is no such folder"),
        (["actor_rollout_ref.ref.ref_replace_token_id=100"], "ref_replace_token_id=100 is no id of"),
        (
            ["data.max_prompt_length=2000", f"{TEACHER}.path=long"],
            "data.max_prompt_length=2000 + data.max_response_length=512 = 2512 is above max_position_embeddings=2048",
        ),
        ([f"{STUDENT}.override_config.max_position_embeddings=64"], "is above max_position_embeddings=64 of"),
        (["trainer.best_metric=val/kl", "trainer.test_freq=5"], "trainer.best_metric='val/kl' needs data.val_files"),
        (["trainer.val_only=True"], "trainer.val_only=True needs data.val_files"),
        (["algorithm.adv_estimator=rloo", NO_REWARD], "rloo learns from a task reward and none is given; set custom_r"),
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator='gae' is unknown; choose from"),
        (["data.train_files=null"], "data.train_files is not set; give a parquet file"),
        (["data.train_files=''"], "data.train_files is not set; give a parquet file"),
        (["data.train_files=['']"], "data.train_files= matches no parquet file"),
        (["data.train_files=gone.parquet"], "data.train_files=gone.parquet matches no parquet file; correct the path"),
        (["data.train_files=deep"], "data.train_files=deep matches no parquet file"),
        (["data.val_files=[train.parquet,gone.parquet]"], "data.val_files=gone.parquet matches no parquet file"),
        (["data.train_files=text.parquet"], "data.train_files=text.parquet cannot be read as parquet"),
        (["data.train_files=chat.parquet"], "data.train_files=chat.parquet has neither a column 'messages' nor data.p"),
        (["data.custom_cls.path=/x/mine.py"], "data.custom_cls.path=/x/mine.py: there is no such file"),
        ([f"{ROLLOUT}.agent.default_agent_loop=browser"], "default_agent_loop='browser' is unknown; use tool_agent or"),
        (["trainer.rollout_data_dir=train.parquet"], "trainer.rollout_data_dir=train.parquet cannot be written"),
    ],
)
def test_user_errors(run: list[str], tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "long", max_position_embeddings=8192)
    write_model(tmp_path / "broken").joinpath("config.json").write_text("{")
    (tmp_path / "text.parquet").write_text("no parquet")
    write_parquet(tmp_path / "chat.parquet", column="chat")
    write_parquet(tmp_path / "deep" / "deeper" / "train.parquet")
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        check(*run, *overrides)
    assert len(str(caught.value).splitlines()) == 1


def test_vllm_has_to_be_installed_where_it_is_used(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_installed", lambda name: name != "vllm")
    with pytest.raises(ValueError, match=r"rollout\.name=vllm needs vLLM, which is not installed; run deploy_env\.sh"):
        check(*run)
    check(*run, f"{ROLLOUT}.name=hf")


def test_a_rule_that_reads_a_reward_needs_a_reward_function(run: list[str]) -> None:
    rule = "trainer.best_metric='val/reverse_kl min subject to val/rec_*/reward >= 0.98 of step 0'"
    best = [*run, rule, "data.val_files=train.parquet", "trainer.test_freq=1"]
    assert check(*best) == []
    with pytest.raises(ValueError, match=r"reads val/rec_\*/reward, which needs a reward function; set custom_reward_"):
        check(*best, NO_REWARD)
    assert check(*best, "trainer.best_metric='val/reverse_kl min'", NO_REWARD) == []


def test_all_errors_come_at_once(run: list[str]) -> None:
    with pytest.raises(ValueError, match="train_files") as caught:
        check(*run, "data.train_files=gone", f"{STUDENT}.path=gone", f"{TEACHER}.path=gone")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    "files", ["many", "many/*.parquet", "[many/part-0.parquet,many/part-1.parquet]", "**/*.parquet"]
)
def test_what_passes(run: list[str], tmp_path: Path, files: str) -> None:
    for index in range(2):
        write_parquet(tmp_path / "many" / f"part-{index}.parquet")
    write_model(tmp_path / "student", vocab_size=120, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    write_model(tmp_path / "teacher", rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert check(*run, f"data.train_files={files}", "data.max_prompt_length=2000") == []
    assert check(*run, *GRPO, f"{TEACHER}.path=null") == []  # task rewards need no teacher


def test_columns_of_ones_own(run: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    chats = f"data.train_files={write_parquet(tmp_path / 'chat.parquet', column='chat')}"
    assert check(*run, chats, "data.prompt_key=chat") == check(*run, chats, "data.custom_cls.path=mine.py") == []


def test_agent_loops(run: list[str]) -> None:
    importlib.import_module("verl.experimental.agent_loop.tool_agent_loop")
    assert [get_agent_loop_class(name).__name__ for name in AGENT_LOOPS] == ["ToolAgentLoop", "SingleTurnAgentLoop"]
    register("own_agent_of_the_test")(AgentLoopBase)
    assert check(*run, f"{ROLLOUT}.agent.default_agent_loop=own_agent_of_the_test") == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{ROLLOUT}.top_p=0.9"], f"biased: {ROLLOUT}.top_p=0.9 and top_k=-1"),
        ([f"{ROLLOUT}.top_k=20"], f"biased: {ROLLOUT}.top_p=1.0 and top_k=20"),
        ([f"{ROLLOUT}.engine_kwargs.sglang.x=1"], "engine_kwargs.sglang is accepted and has no effect"),
        (["trainer.test_freq=5"], "trainer.test_freq=5 has no effect: data.val_files is not set"),
        (
            [
                "algorithm.distill.objective=topk",
                "algorithm.distill_adv_max_clip=3",
                "algorithm.distill_adv_min_clip=-30",
            ],
            "algorithm.distill_adv_max_clip=3.0 has no effect here: it bounds the advantage of drawn tokens, and "
            "algorithm.distill.objective=topk compares distributions",
        ),
        ([*GRPO, "algorithm.distill_adv_min_clip=-3"], "and algorithm.adv_estimator=grpo learns from no teacher"),
        (["algorithm.adv_estimator=rloo"], f"compares the answers to one prompt, and {ROLLOUT}.n=1 gives it one"),
        ([f"{SYNTHETIC}.catalogue=gone.parquet"], f"{SYNTHETIC}.catalogue has no effect here: {SYNTHETIC}.count=0"),
        ([f"++{SYNTHETIC}.templates={{next: {{user: '{{item}}'}}}}"], f"{SYNTHETIC}.templates has no effect here"),
        (["data.val_files=train.parquet", f"{ROLLOUT}.val_kwargs.do_sample=False"], "validation is greedy"),
        (["data.val_files=train.parquet", f"{ROLLOUT}.val_kwargs.temperature=0"], "val/reverse_kl, which drawn answer"),
        ([*GRPO, "algorithm.distill.coef=0.5"], "no teacher knows item tokens, so that an answer is trained up to its"),
        (["trainer.engine_gap_bound=0.1", f"{ROLLOUT}.calculate_log_probs=False"], "trainer.engine_gap_bound=0.1 has "),
    ],
)
def test_notices(run: list[str], overrides: list[str], expected: str) -> None:
    (notice,) = check(*run, "trainer.engine_gap_bound=null", *overrides)
    assert expected in notice


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{ROLLOUT}.val_kwargs.temperature=0"],
        ["data.val_files=train.parquet", *GRPO, f"{ROLLOUT}.val_kwargs.temperature=0"],
        ["algorithm.distill.objective=exact", "algorithm.distill_adv_max_clip=null"],
        ["algorithm.distill_adv_max_clip=3", "algorithm.distill_adv_min_clip=-3"],
        [*GRPO, "algorithm.distill.coef=0.5", "++algorithm.distill.teachers.self={sources:[rec_*]}"],
        [*GRPO, "algorithm.distill.coef=0.5", f"{ROLLOUT}.extend_vocab_start_token=null"],
        [f"{ROLLOUT}.top_p=0.9", "algorithm.rollout_correction.rollout_is=token", "trainer.engine_gap_bound=null"],
    ],
)
def test_no_notice(run: list[str], overrides: list[str]) -> None:
    assert check(*run, *overrides) == []


def test_hub_names_pass_where_there_is_a_hub(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (notice,) = check(*run, f"{STUDENT}.path=owner/name")
    assert notice == f"{STUDENT}.path=owner/name is no local folder; it will be fetched from the hub"
