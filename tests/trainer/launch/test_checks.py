"""User errors that a look at files, packages and this machine finds, before Ray starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from verl.config import PPOConfig, TrainerConfig
from verl.trainer.launch import checks
from verl.trainer.launch.checks import check_ranks, check_run, prepare_folders
from verl.trainer.launch.typed import load_config

STUDENT, TEACHER, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.ref.model", "actor_rollout_ref.rollout"
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=2"]
VAL = "data.val_files=train.parquet"
BEST = ["trainer.test_freq=5", VAL]
KEEP = ["trainer.keep=val/a/reward >= 1", "data.source_weights={a: 1, b: 1}"]
WEIGHTS = ["algorithm.rollout_correction.rollout_is=token", f"{ROLLOUT}.calculate_log_probs=True"]
GREEDY = f"{ROLLOUT}.val_kwargs.do_sample=False"
NO_REWARD = "custom_reward_function.path=null"
BY_TOKENS = [f"actor_rollout_ref.actor.{key}" for key in ("use_dynamic_bsz=True", "ppo_micro_batch_size_per_gpu=2")]


def write_model(folder: Path, **entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"vocab_size": 100, "max_position_embeddings": 2048, **entries}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Overrides of a run that is in order; no hub, an empty cache, every package installed, its own folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(checks, "is_installed", lambda package: True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.parquet").touch()
    return [
        "custom_reward_function.path=reward.py",
        f"{STUDENT}.path={write_model(tmp_path / 'student', vocab_size=120)}",
        f"{TEACHER}.path={write_model(tmp_path / 'teacher')}",
        f"{ROLLOUT}.extend_vocab_start_token=100",
        "data.train_files=train.parquet",
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
            ([f"{STUDENT}.path={path}"], f"{STUDENT}.path={path}: there is no such folder, and it is not in the hub's")
            for path in ("/none/here", "STUDENT", "owner/name", "train.parquet")
        ),
        ([f"{TEACHER}.path=empty"], f"{TEACHER}.path=empty: no config.json can be read"),
        ([f"{STUDENT}.path=broken"], f"{STUDENT}.path=broken: no config.json can be read"),
        ([f"{STUDENT}.tokenizer_path=nowhere"], f"{STUDENT}.tokenizer_path=nowhere: there is no such folder"),
        (["++algorithm.distill.teachers.a.path=x"], "algorithm.distill.teachers.a.path=x: there is no such folder"),
        (["actor_rollout_ref.ref.ref_replace_token_id=100"], "ref_replace_token_id=100 must be an id below"),
        (["data.max_prompt_length=2000", f"{TEACHER}.path=long"], "=512 = 2512 is above the 2048 positions"),
        ([f"{STUDENT}.override_config.max_position_embeddings=64"], "is above the 64 positions that"),
        (["actor_rollout_ref.actor.router_aux_loss_coef=0.01"], "router_aux_loss_coef=0.01: config.json in"),
        (["trainer.best_metric=val/kl", "trainer.test_freq=5"], "trainer.best_metric='val/kl' needs data.val_files"),
        (["trainer.val_only=True"], "trainer.val_only=True needs data.val_files"),
        ([*BEST, *KEEP, NO_REWARD], "trainer.keep='val/a/reward >= 1' needs rewards; set custom_reward_function.path"),
        ([*BEST, "trainer.best_metric=val/reward", NO_REWARD], "'val/reward' needs rewards; set custom_reward_func"),
        (
            [*BEST, "trainer.best_metric=val/a/reverse_kl min", GREEDY],
            "min' needs answers of the policy that is traine",
        ),
        (["algorithm.adv_estimator=rloo", NO_REWARD], "rloo learns from a task reward and none is given; set custom_r"),
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator=gae is unknown; choose from"),
        *((["data.train_files=" + files], "data.train_files is not set; give a parquet") for files in ("null", "''")),
        (["data.train_files=['']"], "data.train_files= matches no parquet file"),
        (["data.train_files=deep"], "data.train_files=deep matches no parquet file; correct the path"),
        (["data.val_files=[train.parquet,gone.parquet]"], "data.val_files=gone.parquet matches no parquet file"),
    ],
)
def test_user_errors(run: list[str], tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "long", max_position_embeddings=8192)
    write_model(tmp_path / "broken").joinpath("config.json").write_text("{")
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        check(*run, *overrides)
    assert len(str(caught.value).splitlines()) == 1


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00"
TWO_SHARDS = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("key", [STUDENT, TEACHER])
@pytest.mark.parametrize(
    ("entries", "files", "expected"),
    [
        (
            {},
            {"adapter_config.json": '{"base_model_name_or_path": "a/b"}'},
            "makes it an adapter (LoRA) of a/b; merge it",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "quantization_config.quant_method=awq) are not taken"),
        ({}, {"hf_quant_config.json": "{}"}, "quant_method=modelopt) are not taken; give the bf16 model"),
        (
            {"final_logit_softcapping": 30.0},
            {},
            "its head caps its logits (final_logit_softcapping=30.0); give another",
        ),
        ({"architectures": ["AForCausalLM"], "text_config": {}}, {}, "['AForCausalLM'] in config.json: only models of"),
        ({"architectures": ["AForConditionalGeneration"]}, {}, "['AForConditionalGeneration'] in config.json: only"),
        ({}, {"config.json": POINTER}, "no config.json can be read: it is a Git LFS pointer"),
        ({}, {"model.safetensors": POINTER}, ": model.safetensors missing, or a Git LFS pointer; copy the model"),
        ({}, {"model.safetensors": None}, ": model*.safetensors missing"),
        ({}, {"model.safetensors": None, INDEX: TWO_SHARDS, "model-1.safetensors": ""}, ": model-2.safetensors miss"),
        ({}, {"model.safetensors": None, INDEX: "{}"}, f"no {INDEX} can be read: 'weight_map'"),
        *(
            ({}, {"model.safetensors": None, file: ""}, "its weights are shards of a checkpoint; merge them with")
            for shard in ("shards/1.safetensors", "model_world_size_2_rank_0.pt")
            for file in (shard, f"../{shard}", f"actor/{shard}")
        ),
    ],
)
def test_folders_that_are_no_model_of_text_with_its_weights(
    run: list[str], tmp_path: Path, key: str, entries: dict[str, Any], files: dict[str, str | None], expected: str
) -> None:
    folder = write_model(tmp_path / "global_step_1" / "model", **entries)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{key}.path={folder}")) as caught:
        check(*run, f"{key}.path={folder}")
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1


SPLIT = ["trainer.n_gpus_per_node=4", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4"]
HEADS = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"num_attention_heads": 6}, "6 attention heads with 2 key heads do not divide over the ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, "12 attention heads with 6 key heads do not"),
        ({"model_type": "mistral", "sliding_window": 64}, "its attention is 'sdpa', and what splits rows is built for"),
        ({}, None),
        ({"num_key_value_heads": 8}, None),
        ({"num_key_value_heads": 1}, None),
    ],
)
def test_models_whose_rows_cannot_be_split(
    run: list[str], tmp_path: Path, entries: dict[str, Any], fault: str | None
) -> None:
    """Each model by itself: here the teacher's heads do not divide."""
    write_model(tmp_path / "student", vocab_size=120, **HEADS)
    write_model(tmp_path / "teacher", **{**HEADS, **entries})
    if fault is None:
        assert check(*run, *SPLIT) == []
        return
    expected = f"{TEACHER}.path={tmp_path / 'teacher'}: {SPLIT[1]} cannot split rows of "
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}.*{re.escape(fault)}.*, or set it to 1$"):
        check(*run, *SPLIT)


def test_what_a_model_may_bring(run: list[str], tmp_path: Path) -> None:
    write_model(tmp_path / "teacher", architectures=["GPT2LMHeadModel"])
    (tmp_path / "teacher" / INDEX).write_text(TWO_SHARDS)  # left from before its shards became one file
    write_model(tmp_path / "student", vocab_size=120, architectures=["OwnModel"])
    (tmp_path / "student" / "model.safetensors").rename(tmp_path / "student" / "pytorch_model.bin")
    (tmp_path / "student" / "training_args.bin").write_text(POINTER)
    assert check(*run, f"{STUDENT}.trust_remote_code=True") == []


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, 2048),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 2048),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, 2048),
    ],
)
def test_positions_that_a_model_stretches_its_own_to(
    run: list[str], tmp_path: Path, rope: dict[str, Any], longest: int
) -> None:
    write_model(tmp_path / "student", vocab_size=120, **rope)
    write_model(tmp_path / "teacher", max_position_embeddings=10_000)
    lengths = [*run, "data.max_response_length=48"]
    assert check(*lengths, f"data.max_prompt_length={longest - 48}") == []
    with pytest.raises(ValueError, match=f"= {longest + 1} is above the {longest} positions that {STUDENT}"):
        check(*lengths, f"data.max_prompt_length={longest - 47}")


def test_vllm_has_to_be_installed_where_it_is_used(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_installed", lambda name: False)
    for wanted in (f"{ROLLOUT}.name=vllm", "actor_rollout_ref.ref.engine=vllm"):
        with pytest.raises(ValueError, match=re.escape(wanted) + r" needs vLLM, .*; run deploy_env\.sh"):
            check(*run, f"{ROLLOUT}.name=hf", wanted)
    check(*run, f"{ROLLOUT}.name=hf")


def test_a_resume_has_to_read_weights(run: list[str]) -> None:
    with pytest.raises(ValueError, match=r"load_contents=\['hf_model', 'extra'\] reads no weights, so a resumed run"):
        check(*run, "actor_rollout_ref.actor.checkpoint.load_contents=[hf_model,extra]")


def test_names_that_weights_and_biases_refuses(run: list[str]) -> None:
    wandb, long = "trainer.logger=[console,wandb]", "a" * 129
    for name in ("project_name=team/opd", "project_name=opd:v2", f"project_name={long}", f"experiment_name={long}"):
        with pytest.raises(ValueError, match=f"^trainer.{name} is refused by Weights & Biases; use at most 128"):
            check(*run, wandb, f"trainer.{name}")
        check(*run, f"trainer.{name}")
    check(*run, wandb, f"trainer.project_name={long[:128]}", "trainer.experiment_name=a/b:c")


LOGINS = {"WANDB_API_KEY": "f0e1" * 10, "WANDB_IDENTITY_TOKEN_FILE": "token.jwt", "WANDB_MODE": "disabled"}
FILES = {
    ".netrc": "machine api.wandb.ai login user password 1",
    "_netrc": "machine api.wandb.ai login user password 1",
    "wandb/settings": "[default]\nmode = offline\n",
    ".config/wandb/settings": "[default]\napi_key = 1\n",
}


@pytest.fixture
def nobody_logged_in(run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LOGINS, "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC", "SM_TRAINING_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody_logged_in")
def test_weights_and_biases_needs_a_login(run: list[str], tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine example.org login user password 1")
    message = r"^trainer.logger=\['console', 'wandb'\] needs a login .* run wandb login, set WANDB_API_KEY, or set WAN"
    with pytest.raises(ValueError, match=message):
        check(*run, "trainer.logger=[console,wandb]")
    assert check(*run, "trainer.logger=[console]") == []


@pytest.mark.usefixtures("nobody_logged_in")
@pytest.mark.parametrize("place", [*LOGINS, *FILES, "NETRC", "WANDB_BASE_URL"])
def test_a_login_is_found_where_weights_and_biases_looks(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place in LOGINS:
        monkeypatch.setenv(place, LOGINS[place])
    elif place in FILES:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(FILES[place])
    elif place == "NETRC":
        (tmp_path / "own").write_text(FILES[".netrc"])
        monkeypatch.setenv("NETRC", "~/own")
    else:
        (tmp_path / ".netrc").write_text("machine wandb.example.org:8080 login user password 1")
        monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example.org:8080")
    assert check(*run, "trainer.logger=[wandb]") == []


def test_all_errors_come_at_once(run: list[str]) -> None:
    with pytest.raises(ValueError, match="train_files") as caught:
        check(*run, "data.train_files=gone", f"{STUDENT}.path=gone", f"{TEACHER}.path=gone")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("files", [".", "*.parquet", "[train.parquet,more.parquet]", "**/*.parquet"])
def test_what_passes(run: list[str], tmp_path: Path, files: str) -> None:
    (tmp_path / "more.parquet").touch()
    assert check(*run, f"data.train_files={files}") == []
    sampled = [f"{ROLLOUT}.val_kwargs.do_sample=True", f"{ROLLOUT}.val_kwargs.temperature=1"]
    assert check(*run, *BEST, "trainer.best_metric=val/reverse_kl min", *sampled) == []
    assert check(*run, *BEST, "trainer.best_metric=val/reward") == []
    assert check(*run, *GRPO, f"{TEACHER}.path=null") == []  # task rewards need no teacher


SAVED = "actor_rollout_ref.actor.checkpoint.save_contents"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{ROLLOUT}.top_p=0.9"], f"biased: {ROLLOUT}.top_p=0.9 and top_k=-1"),
        (["trainer.max_staleness=1", "trainer.device=cpu"], "biased: with trainer.max_staleness=1 the answers come"),
        ([f"{ROLLOUT}.oversample=1.25"], f"biased: with {ROLLOUT}.oversample=1.25 the answers come"),
        ([f"{ROLLOUT}.oversample=2", f"{ROLLOUT}.unfinished=drop"], f"biased: {ROLLOUT}.unfinished=drop trains on"),
        ([f"{ROLLOUT}.top_k=20", *WEIGHTS], f"biased: {ROLLOUT}.top_p=1.0 and top_k=20"),
        ([VAL, GREEDY], "validation has no reverse KL, which needs answers of the policy; "),
        ([VAL, f"{ROLLOUT}.val_kwargs.top_p=0.95"], "top_p=0.95 and top_k=-1: set them to"),
        ([VAL, f"{ROLLOUT}.temperature=0.7"], "temperature=1.0, top_p=1.0 and top_k=-1: set"),
        (["algorithm.adv_estimator=rloo"], f"compares the answers to one prompt, and {ROLLOUT}.n=1 gives it one"),
        (["actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"], "most steps round away; leave it at auto"),
        (["actor_rollout_ref.actor.optim.min_lr_ratio=0.1"], "=0.1 has no effect with lr_scheduler_type=constant; set"),
        (
            [f"{SAVED}=[model,hf_model]", "trainer.save_freq=1"],
            "leaves out optimizer and extra, which a resumed run reads",
        ),
        (BY_TOKENS, "ppo_micro_batch_size_per_gpu=2 has no effect with use_dynamic_bsz=True; set"),
        ([*GRPO, "algorithm.distill.coef=0.5"], "no teacher knows item tokens, so an answer is trained up to its"),
        ([*GRPO, "algorithm.distill.coef=0.5", "++algorithm.distill.teachers.self={sources:[rec_*]}"], None),
        ([*GRPO, "algorithm.distill.coef=0.5", f"{ROLLOUT}.extend_vocab_start_token=null"], None),
        ([VAL], None),
        ([VAL, *GRPO, GREEDY], None),
    ],
)
def test_notices(run: list[str], overrides: list[str], expected: str | None) -> None:
    notices = check(*run, *overrides)
    assert len(notices) == (expected is not None) and all(str(expected) in notice for notice in notices)


def test_hub_names_pass_where_there_is_a_hub(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert check(*run, f"{STUDENT}.path=owner/name") == []
    for path in ("./name", "student/huggingface"):  # the second begins with a folder that is here
        with pytest.raises(ValueError, match="there is no such folder"):
            check(*run, f"{STUDENT}.path={path}")


def ranks(ray_init: dict[str, Any], **trainer: Any) -> None:
    config = PPOConfig(trainer=TrainerConfig(**trainer))
    config.ray_kwargs.ray_init = ray_init
    check_ranks(config, "cpu")


def test_an_engine_that_frees_its_memory_cannot_write_beside_training() -> None:
    config = PPOConfig(trainer=TrainerConfig(max_staleness=1))
    config.ray_kwargs.ray_init = {"address": "auto"}
    check_ranks(config, "cpu")
    with pytest.raises(ValueError, match=r"^trainer\.max_staleness=1 .*free_cache_engine=True .*set it to False"):
        check_ranks(config, "cuda")
    config.actor_rollout_ref.rollout.free_cache_engine = False
    check_ranks(config, "cuda")


def test_ranks_that_fit_or_that_ray_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks({"num_cpus": 2}, n_gpus_per_node=8)
    ranks({"num_cpus": 2}, n_gpus_per_node=4, teacher_nnodes=1, teacher_n_gpus_per_node=4)
    ranks({"num_cpus": None}, n_gpus_per_node=1)
    ranks({"address": "auto"}, nnodes=32, n_gpus_per_node=8, teacher_nnodes=8, teacher_n_gpus_per_node=8)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # as in a job that was submitted
    ranks({}, nnodes=32, n_gpus_per_node=8)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"n_gpus_per_node": 16},
            "'train' asks for 16 rank.* this machine: 2 CPU and no GPU. Lower trainer.n_gpus_per_node or",
        ),
        ({"n_gpus_per_node": 4, "teacher_nnodes": 1, "teacher_n_gpus_per_node": 8}, "'train' asks for 4 .*beside 'tea"),
        ({"nnodes": 2}, r"2 rank.* 2 node.* this machine.* add machines \(init_ray_cluster.*address=auto joins"),
        (
            {"rollout_nnodes": 1, "rollout_n_gpus_per_node": 12},
            "'rollout' asks for 12 .* Lower trainer.rollout_n_gpus_per",
        ),
        (
            {"teacher_nnodes": 2, "teacher_n_gpus_per_node": 1},
            "'teacher' asks for 2 .* Lower trainer.teacher_n_gpus_per",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_counted(trainer: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks({"num_cpus": 2}, **trainer)


def test_the_folders_of_a_run_are_made_and_must_be_writable(tmp_path: Path) -> None:
    folder = str(tmp_path / "a" / "b")
    prepare_folders(TrainerConfig(default_local_dir=folder, rollout_data_dir=f"{folder}/rollouts"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "rollouts"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"trainer\.rollout_data_dir=.*/file/x cannot be written: .*; name a folder"):
        prepare_folders(TrainerConfig(default_local_dir=folder, rollout_data_dir=f"{tmp_path}/file/x"))
