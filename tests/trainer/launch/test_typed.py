"""From Hydra's configuration to dataclasses."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config, public_dict, save_config, to_typed

EXACT = ["algorithm.adv_estimator=on_policy_distill", "algorithm.distill.objective=exact"]
BEST = ["trainer.test_freq=5", "trainer.best_metric=val/g_*/reward subject to val/rec/reward >= 0.98 of step 0"]
ROLLOUT = "actor_rollout_ref.rollout"
VAL = f"{ROLLOUT}.val_kwargs"
ENV = "ray_kwargs.ray_init.runtime_env.env_vars"


def typed(values: dict[str, Any]) -> PPOConfig:
    return to_typed(OmegaConf.create(values))


def test_missing_keys_keep_their_defaults() -> None:
    assert typed({}) == PPOConfig()
    assert typed({"data": {"seed": 7}}).data.seed == 7


@pytest.mark.parametrize("value", ["[console,file]", "'[console,file]'", '["console","file"]', "['console', 'file']"])
def test_logger_lists(value: str) -> None:
    assert load_config([f"trainer.logger={value}"]).trainer.logger == ["console", "file"]


@pytest.mark.parametrize("value", ["console", "'console'", "[console]", "'[console]'", "'[\"console\"]'"])
def test_a_single_logger(value: str) -> None:
    assert load_config([f"trainer.logger={value}"]).trainer.logger == ["console"]


def test_train_files_as_text_list_or_null() -> None:
    assert load_config(["data.train_files=/d/a=1.parquet"]).data.train_files == ["/d/a=1.parquet"]
    assert load_config(["data.train_files=[a.parquet,b.parquet]"]).data.train_files == ["a.parquet", "b.parquet"]
    assert load_config(["data.train_files='[a.parquet,b.parquet]'"]).data.train_files == ["a.parquet", "b.parquet"]
    assert load_config(["data.train_files=''"]).data.train_files == []
    assert load_config([]).data.train_files is None


@pytest.mark.parametrize(("value", "expected"), [("null", None), ("auto", "auto"), ("151669", 151669)])
def test_extend_vocab_start_token(value: str, expected: int | str | None) -> None:
    rollout = load_config([f"{ROLLOUT}.extend_vocab_start_token={value}"]).actor_rollout_ref.rollout
    assert rollout.extend_vocab_start_token == expected


@pytest.mark.parametrize("value", ["0", "soon", "1.5"])
def test_extend_vocab_start_token_that_is_none(value: str) -> None:
    with pytest.raises(ValueError, match=rf"extend_vocab_start_token={value} must be a whole number from 1 on, auto"):
        load_config([f"{ROLLOUT}.extend_vocab_start_token={value}"])


@pytest.mark.parametrize(("value", "expected"), [("off", "off"), ("false", "off"), ("warn", "warn")])
def test_vocab_check(value: str, expected: str) -> None:
    assert load_config([f"trainer.vocab_check={value}"]).trainer.vocab_check == expected
    with pytest.raises(ValueError, match=r"trainer.vocab_check='loose' is not one of strict, warn, off"):
        load_config(["trainer.vocab_check=loose"])


def test_auto_needs_the_vocabulary_check() -> None:
    with pytest.raises(ValueError, match=r"extend_vocab_start_token=auto .* trainer.vocab_check=off compares nothing"):
        load_config([f"{ROLLOUT}.extend_vocab_start_token=auto", "trainer.vocab_check=off"])


@pytest.mark.parametrize(
    "more",
    [
        ["++algorithm.distill.teachers.a={weight:0}"],
        ["algorithm.distill.objective=exact", "actor_rollout_ref.actor.entropy_coeff=0.1"],
        ["algorithm.distill.objective=exact", "algorithm.rollout_correction.rollout_is=token"],
    ],
)
def test_beside_a_task_reward_the_policy_loss_keeps_its_settings(more: list[str]) -> None:
    config = load_config(["algorithm.distill.coef=0.5", f"{ROLLOUT}.calculate_log_probs=True", *more])
    assert config.algorithm.distils and config.algorithm.adv_estimator == "grpo"


def test_a_rule_stands_on_the_command_line_as_it_is() -> None:
    trainer = load_config(BEST).trainer
    assert trainer.best_metric == "val/g_*/reward subject to val/rec/reward >= 0.98 of step 0"
    assert trainer.saves_checkpoints and not load_config([]).trainer.saves_checkpoints
    load_config([BEST[1], "trainer.val_only=True"])


def test_betas_become_a_tuple_of_floats() -> None:
    betas = load_config(["actor_rollout_ref.actor.optim.betas=[0,0.95]"]).actor_rollout_ref.actor.optim.betas
    assert betas == (0.0, 0.95)
    assert [type(beta) for beta in betas] == [float, float]


def test_whole_numbers_serve_as_floats_and_numbers_as_texts() -> None:
    config = load_config(["actor_rollout_ref.actor.ref_log_prob_replace_val=-100", "trainer.experiment_name=20260101"])
    assert isinstance(config.actor_rollout_ref.actor.ref_log_prob_replace_val, float)
    assert config.trainer.experiment_name == "20260101"
    assert config.trainer.default_local_dir == "checkpoints/kai-verl/20260101"


def test_texts_from_the_environment_become_what_they_spell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_OF_RUN", "12")
    monkeypatch.setenv("SHUFFLE_OF_RUN", "False")
    config = load_config(["data.seed=${oc.env:SEED_OF_RUN}", "data.shuffle=${oc.env:SHUFFLE_OF_RUN}"])
    assert config.data.seed == 12
    assert config.data.shuffle is False


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.save_freq=often", "trainer.save_freq='often' must be a whole number"),
        ("data.train_batch_size=2.5", "data.train_batch_size=2.5 must be a whole number"),
        ("data.train_batch_size=null", "data.train_batch_size=None must be a whole number"),
        ("data.train_batch_size=true", "data.train_batch_size=True must be a whole number"),
        ("data.shuffle=1", "data.shuffle=1 must be True or False"),
        ("data.shuffle=maybe", "data.shuffle='maybe' must be True or False"),
        ("actor_rollout_ref.actor.optim.lr=small", "actor_rollout_ref.actor.optim.lr='small' must be a number"),
        ("actor_rollout_ref.actor.optim.betas=[0.9]", "actor_rollout_ref.actor.optim.betas=[0.9] must be a list of 2"),
        ("trainer.resume_mode=[auto]", "trainer.resume_mode=['auto'] must be a text"),
        ("trainer.resume_mode=true", "trainer.resume_mode=True must be a text"),
        ("trainer.logger=3", "trainer.logger=3 must be a list"),
        ("trainer.logger=[console,[file]]", "trainer.logger[1]=['file'] must be a text"),
        ("ray_kwargs.ray_init=4", "ray_kwargs.ray_init=4 must be a section"),
        ("actor_rollout_ref.actor.optim=adam", "actor_rollout_ref.actor.optim='adam' must be a section"),
        ("data.seed=${data.sed}", "data.seed cannot be resolved"),
        ("data.seed=???", "data.seed cannot be resolved"),
    ],
)
def test_wrong_types_name_key_value_and_type(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config([override])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.device=tpu"], "trainer.device='tpu' is not one of auto, cuda, cpu"),
        (["trainer.logger=[mlflow]"], "trainer.logger=['mlflow'] names ['mlflow']; choose from console"),
        (["actor_rollout_ref.rollout.name=sglang"], "actor_rollout_ref.rollout.name='sglang' is unknown; use one of"),
        (["actor_rollout_ref.rollout.max_model_len=100"], "actor_rollout_ref.rollout.max_model_len=100 is below"),
        (
            ["actor_rollout_ref.ref.fsdp_config.model_dtype=int8"],
            "actor_rollout_ref.ref.fsdp_config.model_dtype='int8'",
        ),
        (
            ["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=int8"],
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype='int8' is not one of",
        ),
        (
            ["data.train_batch_size=10", "actor_rollout_ref.actor.ppo_mini_batch_size=4"],
            "data.train_batch_size=10 is no multiple of actor_rollout_ref.actor.ppo_mini_batch_size=4",
        ),
        (["trainer.n_gpus_per_node=3"], "ppo_mini_batch_size=256 x actor_rollout_ref.rollout.n=1 rows do not divide"),
        (
            ["data.max_prompt_length=900", "actor_rollout_ref.rollout.prompt_length=512"],
            "data.max_prompt_length=900 differs from actor_rollout_ref.rollout.prompt_length=512; "
            "set data.max_prompt_length only",
        ),
        (
            ["data.max_response_length=100", "actor_rollout_ref.rollout.response_length=512"],
            "data.max_response_length=100 differs from actor_rollout_ref.rollout.response_length=512; "
            "set data.max_response_length only",
        ),
        (
            ["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1000"],
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1000 is below "
            "actor_rollout_ref.rollout.prompt_length=512 + actor_rollout_ref.rollout.response_length=512 = 1024",
        ),
        (
            ["actor_rollout_ref.ref.ref_log_prob_replace_val=-5"],
            "actor_rollout_ref.actor.ref_log_prob_replace_val=-100.0 differs from "
            "actor_rollout_ref.ref.ref_log_prob_replace_val=-5.0",
        ),
        (
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2 does not divide trainer.n_gpus_per_node=1",
        ),
        (
            ["algorithm.rollout_correction.rollout_is=token"],
            "needs the sampler's log-probs, but actor_rollout_ref.rollout.calculate_log_probs=False",
        ),
        (
            ["algorithm.distill_adv_max_clip=-1", "algorithm.distill_adv_min_clip=0"],
            "algorithm.distill_adv_min_clip=0.0 is above algorithm.distill_adv_max_clip=-1.0",
        ),
        (
            ["algorithm.adv_estimator=on_policy_distill", "algorithm.use_kl_in_reward=True"],
            "algorithm.use_kl_in_reward=True has no effect with algorithm.adv_estimator=on_policy_distill, whose "
            "advantage comes from the teacher and not from rewards; set it to False, and "
            "actor_rollout_ref.actor.use_kl_loss=True",
        ),
        (
            ["data.truncation=left", f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml"],
            f"data.truncation=left would cut the tools of {ROLLOUT}.multi_turn.tool_config_path=tools.yaml",
        ),
        (
            ["data.apply_chat_template_kwargs.add_generation_prompt=False"],
            "data.apply_chat_template_kwargs.add_generation_prompt=False is set by the agent loops",
        ),
        (["actor_rollout_ref.actor.clip_ratio_c=1"], "actor_rollout_ref.actor.clip_ratio_c=1.0 must be above 1"),
        (["algorithm.distill.objective=kl"], "algorithm.distill.objective='kl' is not one of sampled, exact"),
        ([*EXACT[:1], "algorithm.distill.objective=topk", "algorithm.distill.topk=0"], "algorithm.distill.topk=0 must"),
        (
            [*EXACT, "algorithm.distill.topk=8"],
            "algorithm.distill.topk=8 has no effect with algorithm.distill.objective=e",
        ),
        (["algorithm.distill.support=shared"], "algorithm.distill.support=shared has no effect with"),
        (["algorithm.distill.leak_target=0"], "algorithm.distill.leak_target=0.0 must lie between 0 and 1"),
        (["data.source_weights={a: 1, b: 0}"], "data.source_weights.b=0.0 must be a number above 0; leave rows out by"),
        (["data.source_weights={a: -1}"], "data.source_weights.a=-1.0 must be a number above 0"),
        (["data.source_weights={a: inf}"], "data.source_weights.a=inf must be a number above 0"),
        (["data.source_weights={a: nan}"], "data.source_weights.a=nan must be a number above 0"),
        (["++algorithm.distill.teachers.ref={}"], "algorithm.distill.teachers.ref: that name is taken"),
        ([*EXACT, "algorithm.distill.leak_coef=1"], "algorithm.distill.leak_coef=1.0 has no effect without extended"),
        (["++algorithm.distill.teachers.actor={}"], "algorithm.distill.teachers.actor: that name is taken"),
        (["++algorithm.distill.teachers.a={sources:[]}"], "sources is empty"),
        (["++algorithm.distill.teachers.a={weight:2}"], "algorithm.distill.teachers.a.weight=2.0 has no effect"),
        (["++algorithm.distill.teachers.a={}"], "algorithm.distill.teachers=['a'] belongs to"),
        (["trainer.best_metric=val/reward best"], "'val/reward best' should be the name of a figure, then max, min or"),
        (
            ["trainer.best_metric=val/reward"],
            "trainer.best_metric='val/reward' judges validations, and trainer.test_freq",
        ),
        (
            [*BEST, "trainer.val_before_train=False"],
            "compares with step 0, and trainer.val_before_train=False leaves it out",
        ),
        (
            [*BEST, "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer]"],
            "save_contents=['model', 'optimizer'] does not write it; add hf_model",
        ),
        (
            ["trainer.stop_after_no_better=3"],
            "trainer.stop_after_no_better=3 counts validations, from 1 on, that are no",
        ),
        ([*BEST, "trainer.stop_after_no_better=0"], "trainer.stop_after_no_better=0 counts validations, from 1 on"),
        (["algorithm.distill.coef=-1"], "algorithm.distill.coef=-1.0 must not be negative"),
        (["algorithm.distill.coef=0", "algorithm.distill.objective=exact"], "set algorithm.distill.coef above 0"),
        (
            ["algorithm.adv_estimator=on_policy_distill", "algorithm.distill.coef=0.5"],
            "algorithm.distill.coef=0.5 weighs distillation against a task reward, and "
            "algorithm.adv_estimator=on_policy_distill has none",
        ),
        (
            [*EXACT, "algorithm.rollout_correction.rollout_is=token", f"{ROLLOUT}.calculate_log_probs=True"],
            "algorithm.rollout_correction.rollout_is=token has no effect with algorithm.distill.objective=exact",
        ),
        (["++algorithm.distill.teachers.a={vocabulary:most}"], "vocabulary='most' is not one of base, full, stitched"),
        (["++algorithm.distill.teachers.a={color:red}"], "algorithm.distill.teachers.a.color is no known key"),
        (
            ["++algorithm.distill.teachers={a:{vocabulary:base},b:{vocabulary:full}}"],
            "list those with the vocabulary base last",
        ),
        (
            [EXACT[0], "++algorithm.distill.teachers.a={vocabulary:stitched}"],
            "algorithm.distill.teachers.a.vocabulary=stitched gives extended ids a teacher of their own, and there are",
        ),
        (["algorithm.distill.objective=exact"], "belongs to algorithm.adv_estimator=on_policy_distill, not grpo"),
        (
            [*EXACT, "actor_rollout_ref.actor.entropy_coeff=0.1"],
            "actor_rollout_ref.actor.entropy_coeff=0.1 has no effect with algorithm.distill.objective=exact",
        ),
        (["trainer.grace_s=-1"], "trainer.grace_s=-1.0 must be at least 0"),
        (["actor_rollout_ref.rollout.timeout_s=0"], "actor_rollout_ref.rollout.timeout_s=0.0 must be above 0, or null"),
        (["trainer.max_actor_ckpt_to_keep=0"], "trainer.max_actor_ckpt_to_keep=0 must be at least 1, or null to keep"),
        ([f"{ROLLOUT}.top_k=0"], f"{ROLLOUT}.top_k=0 must be -1 (all) or at least 1"),
        ([f"{VAL}.temperature=-0.1"], f"{VAL}.temperature=-0.1 must be at least 0"),
        ([f"{VAL}.n=0"], f"{VAL}.n=0 must be at least 1"),
        ([f"{VAL}.top_p=0"], f"{VAL}.top_p=0.0 must lie in (0, 1]"),
        ([f"{VAL}.top_p=1.1"], f"{VAL}.top_p=1.1 must lie in (0, 1]"),
        ([f"{VAL}.top_k=-2"], f"{VAL}.top_k=-2 must be -1 (all) or at least 1"),
        (
            [f"{ROLLOUT}.enable_chunked_prefill=False", f"{ROLLOUT}.max_num_batched_tokens=1023"],
            f"{ROLLOUT}.max_num_batched_tokens=1023 is below the longest sequence of 1024 tokens; raise it, or set "
            f"{ROLLOUT}.enable_chunked_prefill=True",
        ),
        (
            [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.max_num_seqs=9"],
            f"{ROLLOUT}.max_num_batched_tokens=8 is below {ROLLOUT}.max_num_seqs=9; raise the first or lower",
        ),
        (
            [f"{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8193"],
            f"{ROLLOUT}.max_num_batched_tokens=8192 is below {ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8193",
        ),
    ],
)
def test_settings_that_cannot_be_name_every_key_and_value(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=True"],
        ["data.truncation=left"],
        [
            "data.truncation=left",
            "data.filter_overlong_prompts=True",
            f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml",
        ],
        ["trainer.max_actor_ckpt_to_keep=1"],
        [f"{VAL}.temperature=0", f"{VAL}.top_k=1"],
        [f"{ROLLOUT}.enable_chunked_prefill=False", f"{ROLLOUT}.max_num_batched_tokens=1024"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.max_num_seqs=8"],
        # A limit that is vLLM's: another engine has none, and vLLM's own options win.
        [f"{ROLLOUT}.name=hf", f"{ROLLOUT}.max_num_batched_tokens=8"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.engine_kwargs.vllm.max_num_batched_tokens=256"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8"],
    ],
)
def test_settings_at_the_edge_are_accepted(overrides: list[str]) -> None:
    load_config(overrides)


def test_bound_of_zero_stays_a_bound() -> None:
    algorithm = load_config(["algorithm.distill_adv_max_clip=0", "algorithm.distill_adv_min_clip=null"]).algorithm
    assert (algorithm.distill_adv_max_clip, algorithm.distill_adv_min_clip) == (0.0, None)


def test_unknown_key_of_a_yaml_file() -> None:
    with pytest.raises(ValueError, match=r"data\.sead is no known key; did you mean data\.seed"):
        typed({"data": {"sead": 1}})


def test_key_without_effect_in_a_yaml_file(caplog: pytest.LogCaptureFixture) -> None:
    assert typed({"critic": {"optim": {"lr": 1}}}) == PPOConfig()
    assert "critic is accepted and has no effect here" in caplog.text


def test_environment_variables_of_a_yaml_file_become_texts() -> None:
    config = typed({"ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"A": 1, "B": True, "C": "x"}}}}})
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"A": "1", "B": "True", "C": "x"}


def test_null_stands_for_an_empty_open_map() -> None:
    assert typed({"actor_rollout_ref": {"rollout": {"engine_kwargs": None}}}) == PPOConfig()


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        ["trainer.logger=[console,file]", f"{ENV}.N=2", "ray_kwargs.ray_init.num_cpus=2", "data.train_files=[a,b]"],
        "recipe.onpolicy_distill.config",
        "onpolicy_distill_trainer",
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    assert "${" not in path.read_text()
    assert to_typed(OmegaConf.load(path)) == config  # type: ignore[arg-type]


def test_saved_config_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    config = load_config(
        [
            f"{ENV}.HF_TOKEN=hunter2",
            f"{ENV}.NCCL_DEBUG=INFO",
            "ray_kwargs.ray_init._redis_password=hunter2",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.hf_token=hunter2",
        ]
    )
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert "NCCL_DEBUG: INFO" in text
    assert "hunter2" not in str(public_dict(config))
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"]["HF_TOKEN"] == "hunter2"


def test_a_saved_configuration_keeps_those_of_earlier_runs_beside_it(tmp_path: Path) -> None:
    config, path = PPOConfig(), tmp_path / "config.yaml"
    for rate in (1e-6, 2e-6, 2e-6, 3e-6):
        config.actor_rollout_ref.actor.optim.lr = rate
        save_config(config, path)
    rates = {file.name: OmegaConf.load(file).actor_rollout_ref.actor.optim.lr for file in tmp_path.iterdir()}
    assert rates == {"config.1.yaml": 1e-6, "config.2.yaml": 2e-6, "config.yaml": 3e-6}
