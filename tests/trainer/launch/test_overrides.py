"""Command lines as users of verl write them."""

import os
import re
from pathlib import Path

import pytest

from verl.trainer.launch.typed import load_config, normalized_argv
from verl.utils.redaction import looks_secret

ENV = "ray_kwargs.ray_init.runtime_env.env_vars"
TEACHERS, TEMPLATES = "algorithm.distill.teachers", "data.synthetic_item_prompts.templates"


@pytest.mark.parametrize(
    "given",
    [
        *("data.train_batch_size=8", "trainer.logger=[console,file]", "data.truncation='left'", "data.seed=1,2"),
        *("hydra.run.dir=/x", "hydra/job_logging=none", "+experiment/a=b", "a@b=c", "hydra=x"),
        *("--help", "-cn", "--hydra-help", "~trainer.logger", "~ray_kwargs.ray_init.x=1"),
        f"++{TEACHERS}={{self: {{vocabulary: full, sources: [rec_*]}}}}",
        f"++{TEACHERS}={{a: {{path: x}}}},{{a: {{path: y}}}}",  # several values, for Hydra to try
        *(f"++{TEACHERS}=null", f"++{TEACHERS}.self=${{algorithm.distill.teachers}}"),
        "++data.source_weights={rec_*: 0.25, general_*: 0.75}",
    ],
)
def test_what_hydra_accepts_stays(given: str) -> None:
    assert normalized_argv([given]) == [given]


@pytest.mark.parametrize("path", ["/d/day=1/a.parquet", "/d/a (1).parquet", "/d/it's.parquet", "/d/a{1}.parquet"])
def test_paths_that_hydra_cannot_read_arrive_as_they_are(path: str) -> None:
    assert load_config([f"data.train_files={path}"]).data.train_files == [path]


def test_commas_make_a_list_unless_the_path_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c,d").mkdir()
    (tmp_path / "c,d" / "e,f.parquet").touch()
    for given, files in (
        ("a.parquet,b=1/x y.parquet", ["a.parquet", "b=1/x y.parquet"]),
        ("a, b(1),", ["a", "b(1)"]),
        *((path, [path]) for path in ("c,d", "c,d/e,f.parquet", "c,d/*.parquet")),
        ("c,d/e,none.parquet", ["c", "d/e", "none.parquet"]),
        ("'a,b'", ["a,b"]),
    ):
        assert load_config([f"data.train_files={given}"]).data.train_files == files
    overrides = ["trainer.logger=console,file", "trainer.default_local_dir=c,d", "data.val_files=${oc.env:NO,y}"]
    config = load_config(overrides)
    assert (config.trainer.logger, config.trainer.default_local_dir) == (["console", "file"], "c,d")
    assert config.data.val_files == ["y"]
    assert normalized_argv([f"++{TEACHERS}.a.sources=rec_*,x"]) == [f"++{TEACHERS}.a.sources=['rec_*','x']"]


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize("key", ["ray_kwargs.ray_init.num_cpus", "actor_rollout_ref.rollout.engine_kwargs.vllm.x"])
def test_keys_are_added_where_they_may_be_missing(sign: str, key: str) -> None:
    assert normalized_argv([f"{sign}{key}=8"]) == [f"++{key}=8"]
    assert normalized_argv([f"{sign}data.seed=8"]) == [f"{'++' if sign else ''}data.seed=8"]


def test_a_whole_open_map_can_be_given() -> None:
    config = load_config(["ray_kwargs.ray_init={num_cpus:2,include_dashboard:false}"])
    assert config.ray_kwargs.ray_init == {"num_cpus": 2, "include_dashboard": False}


@pytest.mark.parametrize(
    "value", ["1", "True", "null", "", "a:1,b:2", "it's", "a b", "{x", "(1)", "C:\\", "\\'", "a=b"]
)
def test_environment_variables_arrive_as_the_text_that_was_typed(value: str) -> None:
    config = load_config([f"+{ENV}.NAME={value}", f"{ENV}.A='1'", f'{ENV}.B="${{data.truncation}}"'])
    assert config.ray_kwargs.ray_init == {"runtime_env": {"env_vars": {"NAME": value, "A": "1", "B": "error"}}}


def test_a_secret_leaves_the_command_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "old")
    result = normalized_argv([f"+{ENV}.WANDB_API_KEY=hunter2"])
    assert result == [f"++{ENV}.WANDB_API_KEY=${{oc.env:WANDB_API_KEY}}"]
    assert os.environ["WANDB_API_KEY"] == "hunter2"
    assert "hunter2" not in caplog.text and "export WANDB_API_KEY" in caplog.text
    config = load_config(result)
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"WANDB_API_KEY": "hunter2"}


@pytest.mark.parametrize("override", [f"+{ENV}.WANDB_API_KEY=hunter2\r", f"{ENV}={{WANDB_API_KEY:hunter2(}}"])
def test_a_mistake_shows_no_secret(override: str) -> None:
    with pytest.raises(ValueError, match=r"WANDB_API_KEY' holds a|cannot be read") as caught:
        normalized_argv([override])
    assert "hunter2" not in str(caught.value)


def test_secret_names() -> None:
    secret = ["WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "_redis_password", "mysql_pwd", "APPCREDENTIAL"]
    plain = ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "KEYBOARD", "PWD", "SSH_AUTH_SOCK", "PASS_THROUGH"]
    assert [name for name in secret + plain if looks_secret(name)] == secret


def test_a_key_without_effect_is_left_out_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    assert normalized_argv(["+data.image_key=b", "~critic", "critic.lr=1", "data.seed=3"]) == ["data.seed=3"]
    assert "data.image_key is accepted and has no effect here: prompts are text" in caplog.text
    assert "critic.lr is accepted and has no effect here: there is no critic" in caplog.text
    caplog.clear()
    assert load_config(["data={image_key: x, seed: 5}"]).data.seed == 5
    assert "data.image_key is accepted and has no effect here" in caplog.text


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("actor_rollout_ref.rollout.router_config_path", ["null", "None", "''"], "x"),
        ("actor_rollout_ref.model.lora.rank", ["0", "'0'"], "64"),
        ("trainer.v1.sampler.custom_sampler.path", ["null"], "x.py"),
        ("actor_rollout_ref.actor.strategy", ["fsdp", "fsdp2"], "megatron"),
        ("actor_rollout_ref.hybrid_engine", ["True"], "False"),
        ("reward_model.enable", ["False", "null"], "True"),
    ],
)
def test_only_values_that_mean_what_happens_anyway_are_left_out(key: str, same: list[str], other: str) -> None:
    assert normalized_argv([f"{key}={value}" for value in same]) == []
    expected = rf"^{re.escape(key)}={other} is not built here \(.*\); leave it out or set it to"
    with pytest.raises(ValueError, match=expected):
        normalized_argv([f"{key}={other}"])


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("distillation.nnodes=2", "trainer.teacher_nnodes=2"),
        ("actor_rollout_ref.rollout.nnodes=1", "trainer.rollout_nnodes=1 and trainer.rollout_n_gpus_per_node; without"),
        ("distillation.n_gpus_per_node=4", "trainer.teacher_n_gpus_per_node=4"),
        ("distillation.teacher_models.math.model_path=/m/t", "actor_rollout_ref.ref.model.path=/m/t (a further"),
        ("distillation.teacher_models.math.key=gsm", "++algorithm.distill.teachers.math.sources=[gsm]"),
        ("distillation.distillation_loss.loss_max_clamp=9", "algorithm.distill_adv_max_clip=9 algorithm.distill_"),
        ("actor_rollout_ref.ref.megatron.param_offload=True", "actor_rollout_ref.ref.fsdp_config.param_offload=True"),
        ("ray_init.num_cpus=8", "ray_kwargs.ray_init.num_cpus=8"),
    ],
)
def test_settings_of_verl_are_answered_with_those_that_do_the_same(given: str, ours: str) -> None:
    expected = re.escape(f"{given} is a setting of verl; write {ours}")
    with pytest.raises(ValueError, match=expected) as caught:
        normalized_argv([f"+{given}", "distillation.enabled=True", "distillation.teacher_models.math.inference.n=1"])
    assert len(str(caught.value).splitlines()) == 2, "all at once"


def test_defaults_of_verl_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    given = [f"{actor}.profiler.enable=False", f"{actor}.profiler.tool_config.npu.level=level0", "trainer.use_v1=True"]
    given += [f"{actor}.optim.clip_grad=1.0", f"{actor}.fsdp_config.qat.group_size=16", f"{rollout}.skip_rollout=False"]
    given += ["algorithm.filter_groups.enable=False", "transfer_queue.enable=False", "distillation.enabled=False"]
    given += ["reward.reward_manager.name=naive", f"{rollout}.mode=sync", "global_profiler.tool=null", "critic.lr=1"]
    assert normalized_argv(given) == []
    assert [notice.split()[0] for notice in caplog.messages] == [setting.partition("=")[0] for setting in given]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.max_promt_length=5", "data.max_promt_length is no known key; did you mean data.max_prompt_length, "),
        ("trainer.lr=1", "trainer.lr is no known key; did you mean actor_rollout_ref.actor.optim.lr"),
        ("data.seed.x=1", "data.seed.x is no known key; did you mean data.seed"),
        ("data.source_weights.a.b=1", "data.source_weights.a.b is no known key; did you mean data.source_weights"),
        (f"++{TEACHERS}.a.pth=x", f"{TEACHERS}.a.pth is no known key; did you mean {TEACHERS}.NAME.path"),
        (f"{TEMPLATES}.next.usr=x", f"{TEMPLATES}.next.usr is no known key; did you mean {TEMPLATES}"),
        (f"{TEACHERS}=[a,b]", f"{TEACHERS}=[a,b] must be a mapping"),
        (f"{TEACHERS}.self=[a]", f"{TEACHERS}.self=[a] must be a mapping"),
        ("data.source_weights=[a]", "data.source_weights=[a] must be a mapping"),
        ("data.source_weights={a: 1", "data.source_weights={a: 1 cannot be read (no viable alternative at input"),
        ("data.train_files=[a", "data.train_files=[a cannot be read"),
        ("data.source_weights.rec_*=0.25", "data.source_weights.rec_*=0.25 cannot be read"),
        *((text, f"{text!r} is no override; write key=value") for text in ("data.train_files", "=", "=x", "a.parquet")),
        ("data.train_files=a\r", "'data.train_files' holds a carriage return"),
    ],
)
def test_mistakes_are_named_with_key_and_fix(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        normalized_argv([override])


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ValueError, match="is no known key") as caught:
        normalized_argv(["data.nonsense=1", "trainer.devic=cpu", "data.train_files"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("--cfg job data.seed=1 -cn mine --config-dir=/x=1 data.shuffle=true,false", [0, 1, 3, 4, 5]),
        ("--multirun data.shuffle=true,false", [0]),
        ("--info config", [0, 1]),
        ("-i data.seed=1 ~trainer.logger", [0]),
    ],
)
def test_flags_and_their_values_go_behind(given: str, flags: list[int]) -> None:
    words = given.split()
    overrides = [word for number, word in enumerate(words) if number not in flags]
    assert normalized_argv(words) == overrides + [words[number] for number in flags]
