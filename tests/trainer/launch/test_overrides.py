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


def argv(*overrides: str) -> list[str]:
    return normalize_overrides(overrides).argv


def test_plain_overrides_stay() -> None:
    given = ["data.train_batch_size=8", "trainer.logger=[console,file]", "data.truncation='left'", "data.seed=1,2"]
    assert argv(*given) == given


@pytest.mark.parametrize("path", ["/d/day=1/a.parquet", "/d/a (1).parquet", "/d/it's.parquet", "/d/a{1}.parquet"])
def test_paths_that_hydra_cannot_read_arrive_as_they_are(path: str) -> None:
    assert load_config([f"data.train_files={path}"]).data.train_files == [path]


@pytest.mark.parametrize("sign", ["+", "++"])
def test_appending_an_existing_key_sets_it(sign: str) -> None:
    assert argv(f"{sign}data.enable_think=True") == ["++data.enable_think=True"]


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
def test_keys_of_open_maps_are_added(sign: str, key: str) -> None:
    assert argv(f"{sign}{key}=8") == [f"++{key}=8"]


def test_a_whole_open_map_can_be_given() -> None:
    config = load_config(["ray_kwargs.ray_init={num_cpus:2,include_dashboard:false}"])
    assert config.ray_kwargs.ray_init == {"num_cpus": 2, "include_dashboard": False}


@pytest.mark.parametrize(
    "value", ["1", "True", "0.5", "null", "", "a:1,b:2", "it's", "a b", "{x", "(1)", "C:\\", "\\'", "é", "a=b", "1e3"]
)
def test_environment_variables_arrive_as_the_text_that_was_typed(value: str) -> None:
    config = load_config([f"+{ENV}.NAME={value}"])
    assert config.ray_kwargs.ray_init == {"runtime_env": {"env_vars": {"NAME": value}}}


def test_quotes_around_an_environment_variable_are_not_part_of_it() -> None:
    config = load_config([f"{ENV}.A='1'", f'{ENV}.B="x y"'])
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"A": "1", "B": "x y"}


def test_interpolations_in_environment_variables_resolve() -> None:
    config = load_config(["trainer.experiment_name=run7", f"+{ENV}.NAME=${{trainer.experiment_name}}"])
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"NAME": "run7"}


def test_a_secret_leaves_the_command_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "old")
    with caplog.at_level(logging.WARNING):
        result = normalized_argv([f"+{ENV}.WANDB_API_KEY=hunter2"])
    assert result == [f"++{ENV}.WANDB_API_KEY=${{oc.env:WANDB_API_KEY}}"]
    assert os.environ["WANDB_API_KEY"] == "hunter2"
    assert "hunter2" not in caplog.text
    assert "export WANDB_API_KEY" in caplog.text
    config = load_config(result)
    assert config.ray_kwargs.ray_init["runtime_env"]["env_vars"] == {"WANDB_API_KEY": "hunter2"}


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "_redis_password", "MY_SECRET"),
        *("DB_PASS", "mysql_pwd", "REGISTRY-AUTH", "GCP_CREDENTIAL", "APPCREDENTIAL", "AWS_CREDENTIALS_FILE"),
    ],
)
def test_secret_names(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "max_num_batched_tokens", "KEYBOARD"),
        *("PWD", "OLDPWD", "SSH_AUTH_SOCK", "COMPASS", "PASS_THROUGH"),
    ],
)
def test_names_that_are_no_secrets(name: str) -> None:
    assert not looks_secret(name)


def test_redaction_keeps_numbers_and_structure() -> None:
    values = {"long_prefill_token_threshold": 4, "a": [{"HF_TOKEN": "x"}], "ok": "y"}
    assert redacted(values) == {"long_prefill_token_threshold": 4, "a": [{"HF_TOKEN": "***"}], "ok": "y"}


def test_key_without_effect_is_said_once() -> None:
    result = normalize_overrides(["data.image_key=a", "+data.image_key=b", "critic.optim.lr=1", "data.seed=3"])
    assert result.argv == ["data.seed=3"]
    assert result.notices == [
        "data.image_key is accepted and has no effect here: prompts are text",
        "critic.optim.lr is accepted and has no effect here: there is no critic",
    ]


@pytest.mark.parametrize("value", ["null", "None", "''", "0", "'0'"])
def test_value_that_means_what_happens_anyway_is_accepted(value: str) -> None:
    key = "actor_rollout_ref.model." + ("lora_rank" if "0" in value else "external_lib")
    assert normalize_overrides([f"{key}={value}"]).argv == []


@pytest.mark.parametrize(
    "override",
    ["actor_rollout_ref.model.lora_rank=64", "reward_model.enable=True", "actor_rollout_ref.hybrid_engine=False"],
)
def test_what_is_not_built_is_an_error_and_not_left_out(override: str) -> None:
    with pytest.raises(ValueError, match="not built here"):
        normalize_overrides([override])


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"data\.max_promt_length is no known key; did you mean data\.max_prompt_length"
    ):
        normalize_overrides(["data.max_promt_length=5"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "++algorithm.distill.teachers.self.vocabulry=full",
            "algorithm.distill.teachers.self.vocabulry is no known key; did you mean "
            "algorithm.distill.teachers.self.vocabulary?",
        ),
        (
            "++algorithm.distill.teachers.self={vocabulry: full}",
            "algorithm.distill.teachers.self.vocabulry is no known key; did you mean "
            "algorithm.distill.teachers.self.vocabulary?",
        ),
        (
            "algorithm.distill.teachers={self: {colour: red}}",
            "algorithm.distill.teachers.self.colour is no known key; those of an entry of algorithm.distill.teachers "
            "are path, vocabulary, sources, prompts, weight",
        ),
        (
            "algorithm.distill.teachers.self.sources.x=1",
            "algorithm.distill.teachers.self.sources.x is no known key; did you mean "
            "algorithm.distill.teachers.self.sources?",
        ),
        (
            "data.synthetic_item_prompts.templates.next.usr=x",
            "data.synthetic_item_prompts.templates.next.usr is no known key; did you mean "
            "data.synthetic_item_prompts.templates.next.user?",
        ),
    ],
)
def test_unknown_key_of_an_entry_that_the_user_named(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_config([override])


TEACHERS = "algorithm.distill.teachers"
SECTION = "must be a section with keys below it, such as"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"{TEACHERS}=[a,b]", f"{TEACHERS}=['a', 'b'] {SECTION} {TEACHERS}.NAME.path"),
        (f"{TEACHERS}=a", f"{TEACHERS}='a' {SECTION} {TEACHERS}.NAME.path"),
        (f"{TEACHERS}.self=[a]", f"{TEACHERS}.self=['a'] {SECTION} {TEACHERS}.self.path"),
        (f"{TEACHERS}.vocabulary=full", f"{TEACHERS}.vocabulary='full' {SECTION} {TEACHERS}.vocabulary.path"),
        (f"{TEACHERS}={{self: full}}", f"{TEACHERS}.self='full' {SECTION} {TEACHERS}.self.path"),
        ("algorithm.distill={teachers: [a]}", f"{TEACHERS}=['a'] {SECTION} {TEACHERS}.NAME.path"),
        ("data.source_weights=[a]", f"data.source_weights=['a'] {SECTION} data.source_weights.NAME"),
        ("data=[1]", f"data=[1] {SECTION} data."),
        ("data=null", f"data=None {SECTION} data."),
        ("data={custom_cls: 5}", f"data.custom_cls=5 {SECTION} data.custom_cls.name"),
        ("trainer={logger: {a: 1}}", "trainer.logger={'a': 1} must be a list, such as [a,b]"),
        ("data.train_files={a: 1}", "data.train_files={'a': 1} must be a list, such as [a,b]"),
        (
            "data.source_weights={a: 1",
            "data.source_weights={a: 1 cannot be read (no viable alternative at input '{a: 1')",
        ),
        (
            "data.source_weights={'a': 1}",
            "cannot be read (no viable alternative at input '{'a''); close every bracket and ",
        ),
        ("data.train_files=[a", "data.train_files=[a cannot be read"),
        (
            "data.source_weights.rec_*=0.25",
            "data.source_weights.rec_* holds characters that a key cannot have; give the mapping as a whole: "
            "data.source_weights='{rec_*: ...}'",
        ),
    ],
)
def test_what_hydra_would_tell_in_its_own_words(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^(data.source_weights=.*)?{re.escape(expected)}"):
        normalize_overrides([override])


@pytest.mark.parametrize(
    "override",
    [
        f"{TEACHERS}={{self: {{vocabulary: full, sources: [rec_*]}}}}",
        f"{TEACHERS}=null",
        f"{TEACHERS}.self=${{algorithm.distill.teachers}}",
        "data.source_weights={rec_*: 0.25, general_*: 0.75}",
        "data.train_files=[a.parquet, b.parquet]",
        "trainer.logger=console",
    ],
)
def test_values_in_shape_pass(override: str) -> None:
    (given,) = argv(override)
    assert given.removeprefix("++") == override


def test_a_mapping_may_hold_what_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    assert load_config(["data={image_key: x, seed: 5}"]).data.seed == 5
    assert "data.image_key is accepted and has no effect here" in caplog.text


def test_several_values_of_a_map_are_hydras_to_try() -> None:
    assert argv(f"{TEACHERS}={{a: {{path: x}}}},{{a: {{path: y}}}}") == [
        f"++{TEACHERS}={{a: {{path: x}}}},{{a: {{path: y}}}}"
    ]


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="is no known key") as caught:
        normalize_overrides(["data.nonsense=1", "trainer.devic=cpu", "data.train_files"])
    assert len(str(caught.value).splitlines()) == 3


def test_key_below_a_value_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"data\.seed\.x is no known key"):
        normalize_overrides(["data.seed.x=1"])


@pytest.mark.parametrize("argument", ["data.train_files", "=", "=x", "a.parquet"])
def test_argument_without_key_and_value(argument: str) -> None:
    with pytest.raises(ValueError, match="write key=value, without blanks"):
        normalize_overrides([argument])


def test_flags_and_their_values_go_behind() -> None:
    given = ["--cfg", "job", "data.seed=1", "-cn", "mine", "--config-dir=/x", "--multirun", "data.shuffle=true,false"]
    overrides, flags = split_flags(given)
    assert overrides == ["data.seed=1", "data.shuffle=true,false"]
    assert flags == ["--cfg", "job", "-cn", "mine", "--config-dir=/x", "--multirun"]
    assert argv(*given) == overrides + flags


@pytest.mark.parametrize(("given", "flags"), [(["--info", "config"], ["--info", "config"]), (["-i", "a=1"], ["-i"])])
def test_flag_with_an_optional_value(given: list[str], flags: list[str]) -> None:
    assert split_flags(given) == ([item for item in given if item not in flags], flags)


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["-cn"], ["--hydra-help"]])
def test_flags_alone_pass(flags: list[str]) -> None:
    assert argv(*flags) == flags


@pytest.mark.parametrize(
    "override", ["hydra.run.dir=/x", "hydra/job_logging=none", "+experiment/a=b", "a@b=c", "hydra=x"]
)
def test_what_belongs_to_hydra_passes(override: str) -> None:
    assert argv(override) == [override]


def test_deletions() -> None:
    assert argv("~trainer.logger", "~ray_kwargs.ray_init.x=1", "~critic") == [
        "~trainer.logger",
        "~ray_kwargs.ray_init.x=1",
    ]


def test_everything_that_comes_out_is_hydra_grammar() -> None:
    result = argv(
        f"{ENV}.A=x'y,\\", "+data.seed=1", "ray_kwargs.ray_init.resources={a:1}", "trainer.logger='[console]'"
    )
    assert len(OverridesParser.create().parse_overrides(result)) == 4
