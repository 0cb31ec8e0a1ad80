"""Command lines as users of verl write them."""

import logging
import os
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from verl.trainer.launch.command_line import normalize_overrides, normalized_argv, split_flags
from verl.trainer.launch.typed import load_config
from verl.utils.redaction import looks_secret, redacted

ENV = "ray_kwargs.ray_init.runtime_env.env_vars"
TEACHERS, TEMPLATES = "algorithm.distill.teachers", "data.synthetic_item_prompts.templates"
SECTION = "must be a section with keys below it, such as"


def argv(*overrides: str) -> list[str]:
    return normalize_overrides(overrides).argv


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
    assert argv(given) == [given]


@pytest.mark.parametrize("path", ["/d/day=1/a.parquet", "/d/a (1).parquet", "/d/it's.parquet", "/d/a{1}.parquet"])
def test_paths_that_hydra_cannot_read_arrive_as_they_are(path: str) -> None:
    assert load_config([f"data.train_files={path}"]).data.train_files == [path]


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    "key",
    [
        "ray_kwargs.ray_init.num_cpus",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.swap_space",
        "data.apply_chat_template_kwargs.enable_thinking",
        "actor_rollout_ref.model.override_config.attn_implementation",
    ],
)
def test_keys_are_added_where_they_may_be_missing(sign: str, key: str) -> None:
    assert argv(f"{sign}{key}=8") == [f"++{key}=8"]
    assert argv(f"{sign}data.seed=8") == [f"{'++' if sign else ''}data.seed=8"]


def test_a_whole_open_map_can_be_given() -> None:
    config = load_config(["ray_kwargs.ray_init={num_cpus:2,include_dashboard:false}"])
    assert config.ray_kwargs.ray_init == {"num_cpus": 2, "include_dashboard": False}


@pytest.mark.parametrize(
    "value", ["1", "True", "0.5", "null", "", "a:1,b:2", "it's", "a b", "{x", "(1)", "C:\\", "\\'", "é", "a=b", "1e3"]
)
def test_environment_variables_arrive_as_the_text_that_was_typed(value: str) -> None:
    config = load_config([f"+{ENV}.NAME={value}", f"{ENV}.A='1'", f'{ENV}.B="${{data.truncation}}"'])
    assert config.ray_kwargs.ray_init == {"runtime_env": {"env_vars": {"NAME": value, "A": "1", "B": "error"}}}


def test_a_secret_leaves_the_command_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "old")
    with caplog.at_level(logging.WARNING):
        result = normalized_argv([f"+{ENV}.WANDB_API_KEY=hunter2"])
    assert result == [f"++{ENV}.WANDB_API_KEY=${{oc.env:WANDB_API_KEY}}"]
    assert os.environ["WANDB_API_KEY"] == "hunter2"
    assert "hunter2" not in caplog.text and "export WANDB_API_KEY" in caplog.text
    config = load_config(result)
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"WANDB_API_KEY": "hunter2"}


@pytest.mark.parametrize(
    ("names", "secret"),
    [
        (["WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "_redis_password", "MY_SECRET", "DB_PASS"], True),
        (["mysql_pwd", "REGISTRY-AUTH", "GCP_CREDENTIAL", "APPCREDENTIAL", "AWS_CREDENTIALS_FILE"], True),
        (["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "max_num_batched_tokens", "KEYBOARD"], False),
        (["PWD", "OLDPWD", "SSH_AUTH_SOCK", "COMPASS", "PASS_THROUGH"], False),
    ],
)
def test_secret_names(names: list[str], secret: bool) -> None:
    assert [looks_secret(name) for name in names] == [secret] * len(names)


def test_redaction_keeps_numbers_and_structure() -> None:
    values = {"long_prefill_token_threshold": 4, "a": [{"HF_TOKEN": "x"}], "ok": "y"}
    assert redacted(values) == {"long_prefill_token_threshold": 4, "a": [{"HF_TOKEN": "***"}], "ok": "y"}


def test_a_key_without_effect_gives_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    result = normalize_overrides(["data.image_key=a", "+data.image_key=b", "~critic", "critic.lr=1", "data.seed=3"])
    assert result.argv == ["data.seed=3"]
    assert result.notices == [
        "data.image_key is accepted and has no effect here: prompts are text",
        "critic.lr is accepted and has no effect here: there is no critic",
    ]
    assert load_config(["data={image_key: x, seed: 5}"]).data.seed == 5
    assert "data.image_key is accepted and has no effect here" in caplog.text


@pytest.mark.parametrize(
    "override",
    [
        *(f"actor_rollout_ref.model.external_lib={value}" for value in ("null", "None", "''")),
        *("actor_rollout_ref.model.lora_rank=0", "actor_rollout_ref.model.lora_rank='0'", "data.return_raw_chat=True"),
        *("actor_rollout_ref.rollout.mode=async", "actor_rollout_ref.rollout.multi_turn.format=hermes"),
        *("actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.ref.strategy=fsdp2"),
    ],
)
def test_value_that_means_what_happens_anyway_is_accepted(override: str) -> None:
    assert argv(override) == []


@pytest.mark.parametrize(
    "override",
    [
        *("actor_rollout_ref.model.lora_rank=64", "reward_model.enable=True", "actor_rollout_ref.hybrid_engine=False"),
        *("actor_rollout_ref.rollout.mode=sync", "actor_rollout_ref.actor.strategy=megatron"),
    ],
)
def test_what_is_not_built_is_an_error_and_not_left_out(override: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{re.escape(override)} is not built here \(.*\); leave it out or set it to"
    ):
        normalize_overrides([override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.max_promt_length=5", "data.max_promt_length is no known key; did you mean data.max_prompt_length, "),
        ("data.seed.x=1", "data.seed.x is no known key; did you mean data.seed"),
        ("data.source_weights.a.b=1", "data.source_weights.a.b is no known key; did you mean data.source_weights"),
        (f"++{TEACHERS}.a.pth=x", f"{TEACHERS}.a.pth is no known key; did you mean {TEACHERS}.a.path?"),
        (f"{TEACHERS}.me.sources.x=1", f"{TEACHERS}.me.sources.x is no known key; did you mean {TEACHERS}.me.so"),
        (f"{TEMPLATES}.next.usr=x", f"{TEMPLATES}.next.usr is no known key; did you mean {TEMPLATES}.next.user?"),
        (f"{TEACHERS}={{a: {{hue: red}}}}", f"{TEACHERS}.a.hue is no known key; those of an entry of {TEACHERS} are p"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        load_config([override])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"{TEACHERS}=[a,b]", f"{TEACHERS}=['a', 'b'] {SECTION} {TEACHERS}.NAME.path"),
        (f"{TEACHERS}.self=[a]", f"{TEACHERS}.self=['a'] {SECTION} {TEACHERS}.self.path"),
        (f"{TEACHERS}={{self: full}}", f"{TEACHERS}.self='full' {SECTION} {TEACHERS}.self.path"),
        ("algorithm.distill={teachers: [a]}", f"{TEACHERS}=['a'] {SECTION} {TEACHERS}.NAME.path"),
        ("data.source_weights=[a]", f"data.source_weights=['a'] {SECTION} data.source_weights.NAME"),
        ("data=null", f"data=None {SECTION} data.train_files"),
        ("data={custom_cls: 5}", f"data.custom_cls=5 {SECTION} data.custom_cls.path"),
        ("trainer={logger: {a: 1}}", "trainer.logger={'a': 1} must be a list, such as [a,b]"),
        ("data.train_files={a: 1}", "data.train_files={'a': 1} must be a list, such as [a,b]"),
        (
            "data.source_weights={a: 1",
            "data.source_weights={a: 1 cannot be read (no viable alternative at input '{a: 1')",
        ),
        ("data.source_weights={'a': 1}", "data.source_weights={'a': 1} cannot be read (no viable alternative at input"),
        ("data.train_files=[a", "data.train_files=[a cannot be read"),
        (
            "data.source_weights.rec_*=0.25",
            "data.source_weights.rec_* holds characters that a key cannot have; give the mapping as a whole: "
            "data.source_weights='{rec_*: ...}'",
        ),
        *((text, f"{text!r} is no override; write key=value") for text in ("data.train_files", "=", "=x", "a.parquet")),
    ],
)
def test_what_hydra_would_refuse_without_naming_key_and_fix(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        normalize_overrides([override])


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ValueError, match="is no known key") as caught:
        normalize_overrides(["data.nonsense=1", "trainer.devic=cpu", "data.train_files"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (
            ["--cfg", "job", "data.seed=1", "-cn", "mine", "--config-dir=/x", "--multirun", "data.shuffle=true,false"],
            ["--cfg", "job", "-cn", "mine", "--config-dir=/x", "--multirun"],
        ),
        (["--info", "config"], ["--info", "config"]),
        (["-i", "data.seed=1"], ["-i"]),
    ],
)
def test_flags_and_their_values_go_behind(given: list[str], flags: list[str]) -> None:
    overrides = [text for text in given if text not in flags]
    assert split_flags(given) == (overrides, flags)
    assert argv(*given) == overrides + flags


def test_everything_that_comes_out_is_hydra_grammar() -> None:
    result = argv(
        f"{ENV}.A=x'y,\\", "+data.seed=1", "ray_kwargs.ray_init.resources={a:1}", "trainer.logger='[console]'"
    )
    assert len(OverridesParser.create().parse_overrides(result)) == 4
