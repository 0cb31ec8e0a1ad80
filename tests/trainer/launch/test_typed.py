"""From Hydra's configuration to dataclasses."""

import dataclasses
import pickle
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl.config import DataConfig, FSDPActorConfig, OptimizerConfig, PPOConfig
from verl.trainer.launch.typed import load_config, to_typed

ROLLOUT, ACTOR, REF = (f"actor_rollout_ref.{section}" for section in ("rollout", "actor", "ref"))
VAL, DISTILL, TEACHERS = f"{ROLLOUT}.val_kwargs", "algorithm.distill", "algorithm.distill.teachers"
OPD = "algorithm.adv_estimator=on_policy_distill"
EXACT = [OPD, f"{DISTILL}.objective=exact"]
BEST = ["trainer.test_freq=5", "trainer.best_metric=val/g_*/reward subject to val/rec/reward >= 0.98 of step 0"]
IMPORTANCE, CLIP = "algorithm.rollout_correction.rollout_is=token", "algorithm.distill_adv"
START = f"{ROLLOUT}.extend_vocab_start_token"
TOOLS = [f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml", "data.truncation=left"]
SECTION = "must be a section with keys below it, such as"


def typed(values: dict[str, Any]) -> PPOConfig:
    return to_typed(OmegaConf.create(values))


def test_missing_keys_keep_their_defaults() -> None:
    assert typed({}) == PPOConfig()
    assert typed({"data": {"seed": 7}}).data.seed == 7


def test_sections_are_dataclasses() -> None:
    """Built in code by position or name, copied, replaced, pickled and assigned to."""
    optim = OptimizerConfig(1e-5, lr_scheduler_type="cosine")
    actor = FSDPActorConfig(ppo_mini_batch_size=8, optim=optim)
    assert actor.optim is optim and dataclasses.asdict(actor)["optim"]["lr"] == 1e-5
    assert dataclasses.replace(actor, ppo_epochs=2).ppo_epochs == 2
    assert pickle.loads(pickle.dumps(actor)) == actor
    actor.ppo_epochs = 3
    assert actor.ppo_epochs == 3
    with pytest.raises(ValueError, match=r"^actor_rollout_ref\.actor\.ppo_epochs=0 must be at least 1$"):
        FSDPActorConfig(ppo_epochs=0)
    with pytest.raises(TypeError, match="DataConfig has no field train_batchsize"):
        DataConfig(train_batchsize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((text, ["console", "file"]) for text in ("[console,file]", "'[console,file]'", '["console","file"]')),
        *((text, ["console"]) for text in ("console", "'console'", "[console]", "'[console]'", "'[\"console\"]'")),
    ],
)
def test_lists(value: str, expected: list[str]) -> None:
    assert load_config([f"trainer.logger={value}"]).trainer.logger == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_files=/d/a=1.parquet", ["/d/a=1.parquet"]),
        ("data.train_files='[a.parquet,b.parquet]'", ["a.parquet", "b.parquet"]),
        ("data.train_files=''", []),
        ("data.train_files=null", None),
        (f"{START}=null", None),
        (f"{START}=auto", "auto"),
        (f"{START}=151669", 151669),
        ("trainer.vocab_check=off", "off"),
        ("trainer.vocab_check=false", "off"),
        (f"{ACTOR}.optim.betas=[0,0.95]", (0.0, 0.95)),
        (f"{ACTOR}.optim.lr=2", 2.0),
        ("trainer.experiment_name=20260101", "20260101"),
        ("data.seed=${oc.env:OF_RUN}", 12),
        ("data.shuffle=${oc.env:OFF}", False),
        (f"{ACTOR}.grad_clip=${{oc.env:OF_RUN}}", 12.0),
        ("trainer.project_name=${oc.env:OF_RUN}", "12"),
        (f"{ROLLOUT}.engine_kwargs=null", {}),
        ("algorithm.distill_adv_max_clip=0", 0.0),
        ("algorithm.distill_adv_max_clip=null", None),
    ],
)
def test_values_become_their_declared_type(monkeypatch: pytest.MonkeyPatch, override: str, expected: Any) -> None:
    monkeypatch.setenv("OF_RUN", "12")
    monkeypatch.setenv("OFF", "False")
    found: Any = load_config([override])
    for name in override.split("=")[0].split("."):
        found = getattr(found, name)
    assert found == expected and type(found) is type(expected)


def test_folder_of_a_run_follows_its_name() -> None:
    assert load_config(["trainer.experiment_name=a"]).trainer.default_local_dir == "checkpoints/kai-verl/a"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.save_freq=often", "'often' must be a whole number"),
        ("data.train_batch_size=2.5", "2.5 must be a whole number"),
        ("data.train_batch_size=null", "None must be a whole number"),
        ("data.train_batch_size=true", "True must be a whole number"),
        ("data.shuffle=1", "1 must be True or False"),
        ("data.shuffle=maybe", "'maybe' must be True or False"),
        (f"{ACTOR}.optim.lr=small", "'small' must be a number"),
        (f"{ACTOR}.optim.lr=true", "True must be a number"),
        (f"{ACTOR}.optim.betas=[0.9]", "[0.9] must be a list of two"),
        (f"{ACTOR}.optim.betas=[1,2,3]", "[1, 2, 3] must be a list of two"),
        ("trainer.experiment_name=[a]", "['a'] must be a text"),
        ("trainer.experiment_name=true", "True must be a text"),
        ("trainer.logger=3", "3 must be a list"),
        ("data.val_files=3", "3 must be a list, such as [a,b], or null"),
        ("ray_kwargs.ray_init=4", f"4 {SECTION} ray_kwargs.ray_init.NAME"),
        (f"{ACTOR}.optim=adam", f"'adam' {SECTION} {ACTOR}.optim.lr"),
        ("data.seed=${data.sed}", " cannot be resolved"),
        ("data.seed=???", " cannot be resolved"),
        ("trainer.device=tpu", "'tpu' is not one of auto, cuda, cpu"),
        ("trainer.vocab_check=loose", "'loose' is not one of strict, warn, off"),
        ("trainer.resume_mode=true", "True is not one of auto, disable, resume_path"),
        (f"{REF}.fsdp_config.model_dtype=int8", "'int8' is not one of auto, fp32, bf16, fp16"),
        (f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=int8", "'int8' is not one of auto, fp32, bf16, fp16"),
        ("algorithm.rollout_correction.rollout_is=sequence", "'sequence' is not one of token, or null"),
        (f"{ACTOR}.clip_ratio_c=1", "1 must be above 1"),
        (f"{ACTOR}.optim.min_lr_ratio=1.5", "1.5 must be at most 1"),
        (f"{DISTILL}.leak_target=1", "1 must be below 1"),
        ("trainer.max_actor_ckpt_to_keep=0", "0 must be at least 1, or null"),
        (f"{ROLLOUT}.timeout_s=0", "0 must be above 0, or null"),
        (f"{ROLLOUT}.top_k=0", "0 must be -1 (all) or at least 1"),
        (f"{VAL}.temperature=-0.1", "-0.1 must be at least 0"),
        (f"{VAL}.top_k=-2", "-2 must be -1 (all) or at least 1"),
        *(
            (f"{START}={value}", f"{value} must be a whole number from 1 on, auto (found")
            for value in ("0", "1.5", "True")
        ),
        (f"{START}=soon", "'soon' must be a whole number from 1 on, auto (found"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_to_write(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(override.split('=')[0])}=?{re.escape(expected)}"):
        load_config([override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.logger=[console,mlflow]", "trainer.logger[1]='mlflow' is not one of console, wandb, tensorboard, fi"),
        (f"{ACTOR}.checkpoint.save_contents=[x]", f"{ACTOR}.checkpoint.save_contents[0]='x' must match ^(model|"),
        ("data.source_weights={a: 1, b: 0}", "data.source_weights.b=0 must be above 0"),
        ("data.source_weights={a: inf}", "data.source_weights.a=inf must be a finite number"),
        (f"++{TEACHERS}.a={{sources: []}}", f"{TEACHERS}.a.sources=[] must not be empty"),
        (f"++{TEACHERS}.a={{vocabulary: most}}", f"{TEACHERS}.a.vocabulary='most' is not one of base, full, stitched"),
        (f"++{TEACHERS}.a={{color: red}}", f"{TEACHERS}.a.color is no known key"),
        (f"++{TEACHERS}={{ref: {{}}}}", f"{TEACHERS}.ref: that name is taken"),
        (f"++{TEACHERS}={{a: {{vocabulary: base}}, b: {{}}}}", f"{TEACHERS} lists ['a', 'b'] with the vocabularies"),
        ("data.apply_chat_template_kwargs.tools=[]", "data.apply_chat_template_kwargs.tools=[] is set by the agent"),
        ("trainer.best_metric=val/reward best", "trainer.best_metric='val/reward best': 'val/reward best' is not"),
        ("trainer.best_metric=val/reward", "trainer.best_metric='val/reward' compares validations, and trainer.test_f"),
        ("trainer.stop_after_no_better=3", "trainer.stop_after_no_better=3 counts validations that are no better by"),
        ("trainer.teacher_nnodes=1", "trainer.teacher_nnodes=1 and trainer.teacher_n_gpus_per_node=None go together"),
        ("trainer.resume_mode=resume_path", "trainer.resume_mode=resume_path needs trainer.resume_from_path"),
        (f"{ROLLOUT}.max_model_len=100", f"{ROLLOUT}.max_model_len=100 is below {ROLLOUT}.prompt_length=512 + "),
        (
            f"{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8193",
            f"{ROLLOUT}.max_num_batched_tokens=8192 is below {ROLLOUT}.",
        ),
    ],
)
def test_items_entries_and_sections_name_the_place(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        load_config([override])


def test_all_errors_come_at_once() -> None:
    wrong = ["data.shuffle=1", "trainer.device=tpu", f"{ACTOR}.ppo_epochs=0", "data.source_weights={a: x}"]
    with pytest.raises(
        ValueError, match=r"ppo_epochs=0(.|\n)*shuffle=1(.|\n)*weights\.a='x'(.|\n)*device='tpu'"
    ) as caught:
        load_config(wrong)
    assert len(str(caught.value).splitlines()) == len(wrong)
    across = [f"{ROLLOUT}.tensor_model_parallel_size=2", "data.train_batch_size=10", *TOOLS]
    with pytest.raises(ValueError, match=r"no multiple of(.|\n)*does not divide(.|\n)*would cut the tools"):
        load_config(across)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train_batch_size=10"], f"data.train_batch_size=10 is no multiple of {ACTOR}.ppo_mini_batch_size=256"),
        (["trainer.n_gpus_per_node=3"], f"ppo_mini_batch_size=256 x {ROLLOUT}.n=1 rows do not divide over trainer"),
        ([f"{ROLLOUT}.prompt_length=9"], f"data.max_prompt_length=512 differs from {ROLLOUT}.prompt_length=9; set dat"),
        ([f"{REF}.log_prob_max_token_len_per_gpu=9"], f"{REF}.log_prob_max_token_len_per_gpu=9 is below {ROLLOUT}.pro"),
        ([f"{ACTOR}.use_dynamic_bsz=False"], f"{ACTOR}.use_dynamic_bsz=False needs {ACTOR}.ppo_micro_batch_size_per_"),
        ([f"{REF}.ref_log_prob_replace_val=-5"], f"replace_val=-100.0 differs from {REF}.ref_log_prob_replace_val=-5."),
        ([f"{ROLLOUT}.tensor_model_parallel_size=2"], "size=2 does not divide trainer.n_gpus_per_node=1"),
        ([IMPORTANCE], f"{IMPORTANCE} needs the sampler's log-probs, but {ROLLOUT}.calculate_log_probs=False"),
        ([f"{CLIP}_max_clip=-1", f"{CLIP}_min_clip=0"], f"{CLIP}_min_clip=0.0 is above {CLIP}_max_clip=-1.0"),
        ([OPD, "algorithm.use_kl_in_reward=True"], f"algorithm.use_kl_in_reward=True has no effect with {OPD}, whose"),
        (TOOLS, f"data.truncation=left would cut the tools of {TOOLS[0]}"),
        ([*EXACT, f"{DISTILL}.topk=8"], f"{DISTILL}.topk=8 has no effect with {EXACT[1]}; set {DISTILL}.objective=t"),
        ([f"++{TEACHERS}.a={{weight: 2}}"], f"{TEACHERS}.a.weight=2.0 has no effect with {DISTILL}.objective=sampled"),
        ([f"++{TEACHERS}.a={{}}"], f"{TEACHERS}=['a'] belongs to {OPD}, not grpo"),
        ([f"{DISTILL}.coef=0", EXACT[1]], f"{EXACT[1]} belongs to {OPD}, not grpo; to distil beside the task reward"),
        ([OPD, f"{DISTILL}.coef=0.5"], f"{DISTILL}.coef=0.5 weighs distillation against a task reward, and {OPD} has"),
        ([*EXACT, f"{ACTOR}.entropy_coeff=0.1"], f"{ACTOR}.entropy_coeff=0.1 has no effect with {EXACT[1]}"),
        ([*EXACT, IMPORTANCE, f"{ROLLOUT}.calculate_log_probs=True"], f"{IMPORTANCE} has no effect with {EXACT[1]}"),
        ([*BEST, "trainer.val_before_train=False"], "compares with step 0, and trainer.val_before_train=False leaves"),
        ([*BEST, f"{ACTOR}.checkpoint.save_contents=[model]"], "save_contents=['model'] does not write it; add hf_mo"),
        ([f"{START}=auto", "trainer.vocab_check=off"], "trainer.vocab_check=off compares nothing; give the number"),
        ([f"{ROLLOUT}.max_num_batched_tokens=9"], f"{ROLLOUT}.max_num_batched_tokens=9 is below {ROLLOUT}.max_num_se"),
        ([f"{ROLLOUT}.enable_chunked_prefill=False", f"{ROLLOUT}.max_num_batched_tokens=1023"], "sequence of 1024 tok"),
        ([f"{ROLLOUT}.mask_response_if_have_extend_token=True", f"{ROLLOUT}.mask_after_extend_token=False"], "nothing"),
    ],
)
def test_settings_that_exclude_each_other_are_all_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.use_kl_in_reward=True"],
        ["data.truncation=left"],
        [*TOOLS, "data.filter_overlong_prompts=True"],
        ["trainer.max_actor_ckpt_to_keep=1"],
        [f"{VAL}.temperature=0", f"{VAL}.top_k=1"],
        [f"{ROLLOUT}.enable_chunked_prefill=False", f"{ROLLOUT}.max_num_batched_tokens=1024"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.max_num_seqs=8"],
        # A limit that is vLLM's: another engine has none, and vLLM's own options win.
        [f"{ROLLOUT}.name=hf", f"{ROLLOUT}.max_num_batched_tokens=8"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.engine_kwargs.vllm.max_num_batched_tokens=256"],
        [f"{ROLLOUT}.max_num_batched_tokens=8", f"{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8"],
        # Beside a task reward the policy loss keeps its settings.
        [f"{DISTILL}.coef=0.5", f"++{TEACHERS}.a={{weight: 0}}"],
        [f"{DISTILL}.coef=0.5", EXACT[1], f"{ACTOR}.entropy_coeff=0.1"],
        BEST,
        [BEST[1], "trainer.val_only=True"],
    ],
)
def test_settings_at_the_edge_are_accepted(overrides: list[str]) -> None:
    trainer = load_config(overrides).trainer
    assert trainer.saves_checkpoints == bool(trainer.best_metric)


def test_keys_of_a_yaml_file(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"data\.sead is no known key; did you mean data\.seed"):
        typed({"data": {"sead": 1}})
    assert typed({"critic": {"optim": {"lr": 1}}, "data": {"return_raw_chat": True}}) == PPOConfig()
    assert "critic is accepted and has no effect here" in caplog.text
    with pytest.raises(ValueError, match=r"data.return_raw_chat=False is not built here \(agent loops read the mess"):
        typed({"data": {"return_raw_chat": False}})


def test_environment_variables_of_a_yaml_file_become_texts() -> None:
    config = typed({"ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"A": 1, "B": True, "C": "x"}}}}})
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"A": "1", "B": "True", "C": "x"}
