"""From Hydra's configuration to dataclasses."""

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl.config import DataConfig, FSDPActorConfig, OptimizerConfig, PPOConfig
from verl.trainer.launch.typed import load_config, to_typed
from verl.workers.fsdp.token_stats_model import BatchSizes

ROLLOUT, ACTOR, REF, MODEL = (f"actor_rollout_ref.{section}" for section in ("rollout", "actor", "ref", "model"))
VAL, DISTILL, TEACHERS = f"{ROLLOUT}.val_kwargs", "algorithm.distill", "algorithm.distill.teachers"
OPD = "algorithm.adv_estimator=on_policy_distill"
EXACT = [OPD, f"{DISTILL}.objective=exact"]
BEST = ["trainer.test_freq=5", "trainer.best_metric=val/g_*/reward subject to val/rec/reward >= 0.98 of step 0"]
IMPORTANCE, CLIP = "algorithm.rollout_correction.rollout_is=token", "algorithm.distill_adv"
START = f"{ROLLOUT}.extend_vocab_start_token"
SPLIT, APART = "ulysses_sequence_parallel_size", ["trainer.teacher_nnodes=1", "trainer.teacher_n_gpus_per_node=4"]
FOUR = "trainer.n_gpus_per_node=4"
PAIRS = [FOUR, f"{ACTOR}.{SPLIT}=2", f"{REF}.{SPLIT}=2"]
TOOLS = [f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml", "data.truncation=left"]


def typed(*settings: str) -> PPOConfig:
    """The configuration of some settings as a YAML file would hold them, with the dataclasses' defaults."""
    return to_typed(OmegaConf.from_dotlist(list(settings)))


def test_the_folder_of_a_run_follows_its_name() -> None:
    assert typed("trainer.experiment_name=a").trainer.default_local_dir == "checkpoints/kai-verl/a"


def test_sections_are_dataclasses() -> None:
    """Built in code by position or name, and checked there too."""
    optim = OptimizerConfig(1e-5, lr_scheduler_type="cosine")
    assert FSDPActorConfig(ppo_mini_batch_size=8, optim=optim).optim is optim
    with pytest.raises(
        ValueError, match=r"^actor_rollout_ref\.actor\.ppo_epochs=0 must be greater than or equal to 1$"
    ):
        FSDPActorConfig(ppo_epochs=0)
    with pytest.raises(ValueError, match=r"^data\.train_batchsize is no known key; did you mean train_batch_size"):
        DataConfig(train_batchsize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *((f"trainer.logger={text}", ["console", "file"]) for text in ("[console,file]", "'[console,file]'")),
        *((f"trainer.logger={text}", ["console"]) for text in ("console", "[console]", "'[\"console\"]'")),
        ("data.train_files=/d/a=1.parquet", ["/d/a=1.parquet"]),
        ("data.train_files='[a.parquet,b.parquet]'", ["a.parquet", "b.parquet"]),
        ("data.train_files=''", []),
        ("data.train_files=null", None),
        ("trainer.keep=null", []),
        (f"{START}=auto", "auto"),
        (f"{START}=151669", 151669),
        ("trainer.vocab_check=off", "off"),
        ("trainer.vocab_check=false", "off"),
        (f"{ACTOR}.optim.betas=[0,0.95]", (0.0, 0.95)),
        (f"{ACTOR}.optim.lr=2", 2.0),
        ("trainer.experiment_name=20260101", "20260101"),
        ("data.seed=${oc.env:OF_RUN}", 12),
        ("data.shuffle=${oc.env:OFF}", False),
        ("trainer.project_name=${oc.env:OF_RUN}", "12"),
        (f"{ROLLOUT}.engine_kwargs=null", {}),
        (f"{VAL}.top_k=0", -1),
        ("algorithm.distill_adv_max_clip=0", 0.0),
    ],
)
def test_values_become_their_declared_type(monkeypatch: pytest.MonkeyPatch, override: str, expected: Any) -> None:
    monkeypatch.setenv("OF_RUN", "12")
    monkeypatch.setenv("OFF", "False")
    found: Any = load_config([override])
    for name in override.split("=")[0].split("."):
        found = getattr(found, name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.save_freq=often", "='often' must be a valid integer"),
        ("data.train_batch_size=2.5", "=2.5 must be a valid integer"),
        ("data.shuffle=maybe", "='maybe' must be a valid boolean"),
        (f"{ACTOR}.optim.lr=small", "='small' must be a valid number"),
        ("trainer.experiment_name=[a]", "=['a'] must be a valid string"),
        ("data.val_files=3", "=3 must be a valid list, or null"),
        (f"{ACTOR}.optim=adam", "='adam' must be a dictionary"),
        ("data.seed=${data.sed}", " cannot be resolved"),
        ("data.sead=1", " is no known key; did you mean data.seed"),
        ("trainer.device=tpu", "='tpu' must be 'auto', 'cuda' or 'cpu'"),
        ("algorithm.rollout_correction.rollout_is=sequence", "='sequence' must be 'token', or null"),
        (f"{ACTOR}.clip_ratio_c=1", "=1 must be greater than 1"),
        (f"{DISTILL}.leak_target=1", "=1 must be less than 1"),
        ("trainer.max_actor_ckpt_to_keep=0", "=0 must be greater than or equal to 1, or null"),
        (f"{VAL}.top_k=-2", "=-2 must be greater than or equal to -1"),
        (f"{START}=0", "=0 must be greater than or equal to 1, or null"),
        (f"{START}=soon", "='soon' must be a valid integer"),
        ("trainer.logger=[console,mlflow]", "='mlflow' must be 'console', 'wandb', 'tensorboard' or 'file'"),
        ("data.source_weights.b=0", "=0 must be greater than 0"),
        (f"{TEACHERS}.a.sources=[]", "=[] Value should have at least 1 item"),
        (f"{TEACHERS}.a.vocabulary=most", "='most' must be 'base', 'full' or 'stitched'"),
        (f"{TEACHERS}.a.color=red", " is no known key"),
        (f"{TEACHERS}.ref={{}}", ": that name is taken"),
        (f"{TEACHERS}={{a: {{vocabulary: base}}, b: {{}}}}", "=['a', 'b']: list those with vocabulary=base last"),
        ("data.apply_chat_template_kwargs.tools=[]", " is set by the agent loops; leave it out"),
        ("trainer.best_metric=val/reward best", "='val/reward best': 'val/reward best' is not understood"),
        ("trainer.best_metric=val/reward", "='val/reward' compares validations; set trainer.test_freq=-1"),
        ("trainer.stop_after_no_better=3", "=3 has no effect without trainer.best_metric; set both"),
        ("trainer.keep_rate=3", "=3.0 has no effect without trainer.keep; set both"),
        ("algorithm.rollout_correction.rollout_is_threshold=3", "=3.0 has no effect without rollout_is=token"),
        (f"{MODEL}.lora_alpha=32", "=32 has no effect with lora_rank=0"),
        (f"{MODEL}.target_modules=[q_proj]", "=['q_proj'] has no effect with lora_rank=0"),
        ("trainer.teacher_nnodes=1", "=1 and trainer.teacher_n_gpus_per_node=None go together"),
        ("trainer.rollout_weight_sync=broadcast", "=broadcast is for engines with GPUs of their own: set"),
        ("trainer.rollout_nnodes=1", "=1 and trainer.rollout_n_gpus_per_node=None go together"),
        ("trainer.max_staleness=-1", "=-1 must be greater than or equal to 0"),
        ("actor_rollout_ref.rollout.oversample=0.5", "=0.5 must be greater than or equal to 1"),
        ("actor_rollout_ref.rollout.unfinished=keep", "='keep' must be 'carry' or 'drop'"),
        ("trainer.resume_mode=resume_path", "=resume_path needs trainer.resume_from_path"),
        (f"{ROLLOUT}.gpu_memory_utilization=70", "=70 must be less than or equal to 1"),
        (f"{ACTOR}.optim.betas=[0.9,1.0]", "=1.0 must be less than 1"),
        (f"{MODEL}.lora_rank=-1", "=-1 must be greater than or equal to 0"),
        (f"{MODEL}.lora_extended_rows=True", "=True has no effect with lora_rank=0"),
        ("actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16", "=fp16 cannot be trained"),
        ("actor_rollout_ref.actor.fsdp_config.model_dtype=fp16", "=fp16 cannot be trained"),
        (f"{ROLLOUT}.max_model_len=100", f"=100 is below {ROLLOUT}.prompt_length=512 + "),
        (f"{ROLLOUT}.max_num_batched_tokens=100", "=100 is below 256, which vLLM has to take at once"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_to_write(setting: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(setting.split('=')[0] + expected)}"):
        typed(setting)


def test_prompts_that_are_not_split_have_to_fit_an_engine_step() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=8192 is below 9512, "):
        load_config([f"{ROLLOUT}.enable_chunked_prefill=False", "data.max_prompt_length=9000"])


def test_activations_that_are_kept_in_host_memory_have_to_be_recomputed() -> None:
    with pytest.raises(ValueError, match=f"^{MODEL}.enable_activation_offload=True needs {MODEL}.enable_gradient_ch"):
        typed(f"{MODEL}.enable_activation_offload=True", f"{MODEL}.enable_gradient_checkpointing=False")


@pytest.mark.parametrize("key", ["data.max_response_length", "data.max_prompt_length", f"{ROLLOUT}.response_length"])
def test_a_key_that_follows_another_is_not_named_for_it(key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}=0 must be greater than or equal to 1$"):
        typed(f"{key}=0")


def test_all_errors_come_at_once() -> None:
    wrong = ["data.shuffle=no way", "trainer.device=tpu", f"{ACTOR}.ppo_epochs=0", "data.source_weights.a=x"]
    with pytest.raises(ValueError, match=r"ppo_epochs=0(.|\n)*shuffle=(.|\n)*weights\.a='x'(.|\n)*device=") as caught:
        typed(*wrong)
    assert len(str(caught.value).splitlines()) == len(wrong)
    with pytest.raises(ValueError, match=r"no multiple of(.|\n)*does not divide(.|\n)*would cut the tools"):
        typed(f"{ROLLOUT}.tensor_model_parallel_size=2", "data.train_batch_size=10", *TOOLS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            [f"{MODEL}.lora_rank=8", f"{MODEL}.lora_extended_rows=True", f"{ACTOR}.freeze_extended_rows=True"],
            f"lora_extended_rows=True trains the rows that {ACTOR}.freeze_extended_rows=True freezes",
        ),
        (["data.train_batch_size=10"], f"data.train_batch_size=10 is no multiple of {ACTOR}.ppo_mini_batch_size=256"),
        (
            ["trainer.n_gpus_per_node=2", "data.train_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3"],
            f"data.train_batch_size=3, and with it {ACTOR}.ppo_mini_batch_size=3 x {ROLLOUT}.n=1 rows do not",
        ),
        (["trainer.n_gpus_per_node=3"], f"ppo_mini_batch_size=256 x {ROLLOUT}.n=1 rows do not divide over trainer"),
        ([f"{ROLLOUT}.prompt_length=9"], f"data.max_prompt_length=512 differs from {ROLLOUT}.prompt_length=9; set"),
        ([f"{REF}.log_prob_max_token_len_per_gpu=9"], f"{REF}.log_prob_max_token_len_per_gpu=9 is below {ROLLOUT}.pro"),
        ([FOUR, f"{ACTOR}.{SPLIT}=3"], f"{ACTOR}.{SPLIT}=3 does not divide the 4 ranks of {ACTOR}; change one"),
        ([FOUR, f"{ACTOR}.{SPLIT}=4", *APART, f"{APART[1][:-1]}2"], f"=4 does not divide the 2 ranks of {REF}; change"),
        ([FOUR, f"{REF}.{SPLIT}=2"], f"{ACTOR}.{SPLIT}=1 differs from {REF}.{SPLIT}=2; set the first alone"),
        ([*PAIRS, f"{MODEL}.use_remove_padding=False"], f"=2 splits packed rows; leave {MODEL}.use_"),
        ([*PAIRS, *APART, *EXACT], f"{ACTOR}.{SPLIT}=2 with {EXACT[1]} needs the teachers on the"),
        (
            [*PAIRS, f"{ACTOR}.ppo_max_token_len_per_gpu=511"],
            f"{ACTOR}.ppo_max_token_len_per_gpu=511 on each of 2 ranks ({SPLIT}) is below "
            f"{ROLLOUT}.prompt_length + response_length = 1024; raise it to 512 at least",
        ),
        (
            [*PAIRS, "data.train_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3"],
            f"rows do not divide over trainer.nnodes=1 x {FOUR} ranks in groups of {ACTOR}.{SPLIT}=2; change one",
        ),
        ([FOUR, f"{ACTOR}.fsdp_config.fsdp_size=3"], f"{ACTOR}.fsdp_config.fsdp_size=3 does not divide the 4 ranks"),
        ([FOUR, f"{REF}.fsdp_config.fsdp_size=0"], f"{REF}.fsdp_config.fsdp_size=0 does not divide the 4 ranks of its"),
        ([f"{ACTOR}.use_dynamic_bsz=False"], f"{ACTOR}.use_dynamic_bsz=False needs {ACTOR}.ppo_micro_batch_size_per_"),
        ([f"{REF}.ref_log_prob_replace_val=-5"], f"replace_val=-100.0 differs from {REF}.ref_log_prob_replace_val=-5."),
        ([f"{ROLLOUT}.tensor_model_parallel_size=2"], "size=2 does not divide trainer.n_gpus_per_node=1"),
        (
            [
                f"{ROLLOUT}.tensor_model_parallel_size=2",
                "trainer.rollout_nnodes=1",
                "trainer.rollout_n_gpus_per_node=3",
            ],
            "size=2 does not divide trainer.rollout_n_gpus_per_node=3",
        ),
        (
            [f"{ROLLOUT}.oversample=1.5", f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml"],
            f"{ROLLOUT}.oversample=1.5 carries on answers of a single turn, and multi_turn.tool_config_path="
            f"tools.yaml has several; set {ROLLOUT}.unfinished=drop, or oversample to 1",
        ),
        ([f"{ROLLOUT}.unfinished=drop"], f"{ROLLOUT}.unfinished=drop has no effect with {ROLLOUT}.oversample=1; set"),
        ([f"{ACTOR}.{SPLIT}=4"], f"{ACTOR}.{SPLIT}=4 does not divide the 1 ranks of actor_rollout_ref.actor; change"),
        (
            [f"{ROLLOUT}.oversample=1.5", *(f"{ROLLOUT}.horizon.{key}" for key in ("start=8", "end=16", "steps=4"))],
            f"{ROLLOUT}.oversample=1.5 carries on answers, of which those that ended at a growing horizon",
        ),
        ([IMPORTANCE], f"{IMPORTANCE} needs the sampler's log-probs; set {ROLLOUT}.calculate_log_probs=True"),
        ([f"{CLIP}_max_clip=-1", f"{CLIP}_min_clip=0"], f"{CLIP}_min_clip=0.0 is above distill_adv_max_clip=-1.0"),
        ([OPD, "algorithm.use_kl_in_reward=True"], f"algorithm.use_kl_in_reward=True has no effect with {OPD}, which"),
        (TOOLS, f"data.truncation=left would cut the tools of {TOOLS[0]}"),
        ([f"{TEACHERS}.a.weight=2"], f"{TEACHERS}.a.weight=2.0 has no effect with {DISTILL}.objective=sampled"),
        ([f"{TEACHERS}.a={{}}"], f"{TEACHERS}=['a'] has no effect with algorithm.adv_estimator=grpo; set"),
        ([f"{DISTILL}.coef=0", EXACT[1]], f"{EXACT[1]} has no effect with algorithm.adv_estimator=grpo; set"),
        ([OPD, f"{DISTILL}.coef=0.5"], f"{DISTILL}.coef=0.5 weighs a task reward, and {OPD} has none"),
        ([*EXACT, f"{ACTOR}.entropy_coeff=0.1"], f"{ACTOR}.entropy_coeff=0.1 has no effect with {EXACT[1]}"),
        ([*BEST, "trainer.val_before_train=False"], "compares with step 0, and trainer.val_before_train=False leaves"),
        ([*BEST, f"{ACTOR}.checkpoint.save_contents=[model]"], "save_contents=['model'] does not write; add hf_model"),
        (
            [f"{START}=auto", "trainer.vocab_check=off"],
            "=auto needs the comparison that trainer.vocab_check=off leaves",
        ),
        ([f"{ROLLOUT}.mask_response_if_have_extend_token=True", f"{ROLLOUT}.mask_after_extend_token=False"], "nothing"),
    ],
)
def test_settings_that_exclude_each_other_are_named(settings: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        typed(*settings)


@pytest.mark.parametrize(
    "settings",
    [
        [*TOOLS, "data.filter_overlong_prompts=True"],
        [f"{VAL}.temperature=0", f"{VAL}.top_k=1"],
        # Beside a task reward the policy loss keeps its settings.
        [f"{DISTILL}.coef=0.5", f"{TEACHERS}.a.weight=0"],
        [f"{DISTILL}.coef=0.5", EXACT[1], f"{ACTOR}.entropy_coeff=0.1"],
        BEST,
        [BEST[1], "trainer.val_only=True"],
        # 2 x 512 tokens hold a row of 1,024; three rows do for the one share of four ranks.
        [*PAIRS, f"{ACTOR}.ppo_max_token_len_per_gpu=512", f"{REF}.fsdp_config.fsdp_size=2"],
        [*PAIRS, *APART, OPD],
        [FOUR, f"{ACTOR}.{SPLIT}=4", f"{REF}.{SPLIT}=4", "data.train_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3"],
    ],
)
def test_settings_at_the_edge_are_accepted(settings: list[str]) -> None:
    trainer = typed(*settings).trainer
    assert trainer.saves_checkpoints == bool(trainer.best_metric)


@pytest.mark.parametrize(
    "setting",
    [
        *(f"{ACTOR}.freeze_extended_rows=True", f"{TEACHERS}.self.vocabulary=stitched"),
        f"{MODEL}.lora_extended_rows=True",
        *(f"{TEACHERS}.self.prompts=with_items", f"{DISTILL}.leak_coef=1.0", f"{DISTILL}.support=shared"),
    ],
)
def test_settings_for_extended_ids_are_refused_without_them(setting: str) -> None:
    """When typed, and when ``auto`` is resolved."""
    expected = re.escape(setting) + " has no effect without extended ids; set .*, or leave it at"
    used = [*EXACT, f"{MODEL}.lora_rank=8"]
    with pytest.raises(ValueError, match=expected):
        typed(*used, setting)
    config = typed(*used, setting, f"{START}=auto")
    config.resolve_extend_start(151669)
    assert config.actor_rollout_ref.rollout.extend_start == 151669
    with pytest.raises(ValueError, match=expected):
        config.resolve_extend_start(None)


def test_keys_of_a_file_that_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    nulls = ["data.seed=null", f"{REF}.model=null", "distillation.nnodes=0"]
    assert typed("critic.optim.lr=1", "data.return_raw_chat=True", *nulls) == PPOConfig()
    assert "critic is accepted and has no effect here" in caplog.text
    assert typed("reward_model.reward_manager=naive", "trainer.default_hdfs_dir=null") == PPOConfig()
    manager, penalty = "reward_model.reward_manager=dapo", "reward_model.overlong_buffer.enable=True"
    for setting in (manager, penalty, "trainer.default_hdfs_dir=hdfs://a/b"):
        with pytest.raises(ValueError, match=rf"{setting} is not built here \(.*\); leave it out or set it to "):
            typed(setting)

    with pytest.raises(ValueError, match=r"shuffle=True is not built here \(mini-batches.*\n.*enable=True is not b"):
        typed("actor_rollout_ref.actor.shuffle=True", "actor_rollout_ref.actor.profiler.enable=True")


def test_open_maps_keep_what_looks_like_a_setting_of_verl() -> None:
    kept = typed(f"{ROLLOUT}.engine_kwargs.vllm.profiler.enable=True").actor_rollout_ref.rollout.engine_kwargs
    assert kept == {"vllm": {"profiler": {"enable": True}}}


def test_rows_of_a_micro_batch_count_unless_tokens_are_asked_for() -> None:
    rows, by_tokens = f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4", f"{ROLLOUT}.log_prob_use_dynamic_bsz=True"
    given: list[list[str]] = [[], [rows], [rows, by_tokens]]
    sizes = [BatchSizes.of_scoring(typed(*settings).actor_rollout_ref.rollout) for settings in given]
    assert [size.max_rows for size in sizes] == [None, 4, None]


def test_environment_variables_of_a_file_become_texts() -> None:
    config = typed("ray_kwargs.ray_init.runtime_env.env_vars={A: 1, B: true, C: x}")
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"A": "1", "B": "True", "C": "x"}
