"""The shell scripts: what they would run, with stand-ins for Python and without any network or cluster."""

import os
import subprocess

import pytest
from support.script_runner import (
    CLUSTER,
    DEPLOY,
    LAUNCH,
    LAUNCH_SMALL,
    MODELS,
    ONE_CARD,
    RAY_NODE,
    executable,
    read_back,
    run,
    stand_in,
)
from support.tiny_pairs import REPO


def launch(*arguments, script=LAUNCH, **env):
    """The command a launch would run, as its list of arguments."""
    done = run(script, *arguments, DRY_RUN=1, **{**MODELS, **env})
    assert done.returncode == 0, done.stderr
    return read_back(done.stdout)


def settings(*arguments, **env):
    """Overrides of a launch, of which the last of each key counts."""
    return dict(argument.split("=", 1) for argument in launch(*arguments, **env)[3:])


@pytest.mark.parametrize("script", [LAUNCH, LAUNCH_SMALL, ONE_CARD, CLUSTER, DEPLOY, RAY_NODE])
def test_help_and_syntax(script):
    done = run(script, "--help")
    assert done.returncode == 0 and script.name in done.stdout
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


def test_required_variables_are_named():
    for missing in MODELS:
        done = run(LAUNCH, DRY_RUN=1, **{name: value for name, value in MODELS.items() if name != missing})
        assert done.returncode == 2 and f"{missing} is not set" in done.stderr


ROLLOUT = "actor_rollout_ref.rollout."
VARIABLES = {
    "VAL_PARQUET": ("data.val_files", "null", "/d/val.parquet"),
    "EXTEND_VOCAB_START_TOKEN": (f"{ROLLOUT}extend_vocab_start_token", "null", "8218"),
    "MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN": (f"{ROLLOUT}mask_response_if_have_extend_token", "False", "True"),
    "DISTILL_ADV_MAX": ("algorithm.distill_adv_max_clip", "5.0", "0"),  # 0 is a bound
    "DISTILL_ADV_MIN": ("algorithm.distill_adv_min_clip", "-30.0", "-7.5"),
    "BASE_MODEL": ("actor_rollout_ref.model.path", "/m/student", "/m/other"),
    "TEACHER_MODEL": ("actor_rollout_ref.ref.model.path", "/m/teacher", "/m/other"),
    "DATASET_PARQUET": ("data.train_files", "/d/train.parquet", "/d/other.parquet"),
    "N_GPUS_PER_NODE": ("trainer.n_gpus_per_node", None, "2"),
    "OUTPUT_DIR": ("trainer.default_local_dir", None, "/out"),
}
"""Key, default (or the value in MODELS; None: any) and another value."""


def test_variables_are_read_and_have_defaults():
    used = settings()
    assert all(default in (None, used[key]) for key, default, _ in VARIABLES.values())
    assert used["trainer.nnodes"] == "1" and "ray_kwargs.ray_init.address" not in used
    used = settings(**{name: value for name, (_, _, value) in VARIABLES.items()})
    assert {key: used[key] for key, _, _ in VARIABLES.values()} == {key: text for key, _, text in VARIABLES.values()}


def test_overrides_come_last_and_unchanged_and_are_not_taken_for_a_hostfile():
    for first in ("data.train_batch_size=4", "++a=b", "~a", "--cfg"):
        overrides = [first, "trainer.logger=[console, file]", "++a.b='{c: \"d*\"}'", "x=two\nlines", "~x"]
        assert launch(*overrides)[-5:] == overrides


@pytest.mark.parametrize(
    ("lines", "nodes", "address"),
    [
        (["# only this one", "", "127.0.0.1  slots=8", "127.0.0.1"], "1", None),
        (["node-a slots=8 # head", "node-b", "", "node-a"], "2", "auto"),
    ],
)
def test_several_hosts_connect_to_the_running_cluster(hostfile, lines, nodes, address):
    used = settings(hostfile(*lines), "data.seed=3")
    assert (used["trainer.nnodes"], used.get("ray_kwargs.ray_init.address"), used["data.seed"]) == (nodes, address, "3")


def test_unusable_hostfiles(hostfile, tmp_path):
    for path, message in ((tmp_path / "none", "does not exist"), (hostfile("# nobody"), "names no host")):
        for script, *arguments in ((LAUNCH,), (CLUSTER,), (DEPLOY, "--all-nodes")):
            done = run(script, *arguments, path, DRY_RUN=1, **MODELS)
            assert done.returncode in (1, 2) and message in done.stderr


def test_a_dry_run_can_be_switched_off(tmp_path):
    python = executable(tmp_path / "bin" / "python", "#!/usr/bin/env bash\necho started\n")
    for word, is_dry in (("1", True), ("yes", True), ("0", False), ("", False), ("False", False), ("no", False)):
        done = run(LAUNCH, DRY_RUN=word, ENV_DIR=python.parents[1], **MODELS)
        assert (done.stdout == "started\n") != is_dry


def test_a_dry_run_plans_memory_where_the_models_are(tmp_path):
    python = executable(tmp_path / "bin" / "python", '#!/usr/bin/env bash\necho "$2" "${*: -1}"\n')
    (tmp_path / "config.json").write_text("{}")
    env = {**MODELS, "DRY_RUN": 1, "ENV_DIR": tmp_path, "BASE_MODEL": tmp_path}
    without = run(LAUNCH, "data.seed=3", **env)
    done = run(LAUNCH, "data.seed=3", **{**env, "TEACHER_MODEL": tmp_path})
    assert (without.stderr, done.stderr) == ("", "recipe.onpolicy_distill.plan data.seed=3\n")
    assert read_back(done.stdout)[:3] == [str(python), "-m", "recipe.onpolicy_distill.main_onpolicy_distill"]


@pytest.mark.parametrize("script", [LAUNCH, LAUNCH_SMALL, ONE_CARD, CLUSTER, DEPLOY])
def test_scripts_run_through_links_and_under_sh(script, tmp_path):
    (tmp_path / "link.sh").symlink_to(script)
    env = {**os.environ, "DRY_RUN": "1", **MODELS}
    for command in ("bash link.sh", "sh link.sh", f"sh {script} --help"):
        done = subprocess.run(command.split(), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "set -euo" not in done.stdout, done.stderr


def test_it_starts_the_environments_python_from_any_folder(tmp_path):
    text = '#!/usr/bin/env bash\npwd\necho "$PYTHONPATH"\necho "$2"\n'
    fake = executable(tmp_path / "my env" / "bin" / "python", text)
    done = run(LAUNCH, cwd=tmp_path, ENV_DIR=fake.parents[1], PYTHONPATH="/mine", **MODELS)
    assert done.stdout.splitlines() == [str(tmp_path), f"{REPO}:/mine", "recipe.onpolicy_distill.main_onpolicy_distill"]


def test_the_small_preset_changes_the_settings_and_loses_to_the_users(hostfile):
    key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    base, small = settings(), settings(hostfile("localhost"), script=LAUNCH_SMALL)
    assert small[key] != base[key]
    assert settings(f"{key}=99", script=LAUNCH_SMALL)[key] == "99"


@pytest.fixture
def deploy(tmp_path):
    """Runs deploy_env.sh with stand-ins; gives the result and the calls of the environment's Python since."""
    python, log = stand_in("python_of_deployment", tmp_path / "bin" / "python3"), tmp_path / "log"

    def call(*arguments, device="cpu", **env):
        log.write_text("")
        env = {"ENV_DIR": tmp_path / "my env", "PYTHON": python, "FAKE_LOG": log, **env}
        done = run(DEPLOY, "--device", device, *arguments, cwd=tmp_path, **env)
        return done, log.read_text().splitlines()

    return call


def test_deployment_on_cpu_takes_torch_first_and_drops_what_breaks_it(deploy):
    done, calls = deploy("--dev", TORCH_INDEX_URL="http://index.example/simple")
    assert done.returncode == 0, done.stderr
    lines = (REPO / "requirements" / "cpu.txt").read_text().splitlines()
    (torch_pin,) = [line for line in lines if line.startswith("torch==")]
    assert calls[0].endswith(f"--index-url http://index.example/simple {torch_pin}")
    assert all(f"requirements/{name}.txt" in calls[1] for name in ("cpu", "base", "dev"))
    assert "index.example" not in calls[1]
    assert "uninstall" in calls[2] and "torchvision torchaudio torchcodec" in calls[2]
    assert any("--editable" in call for call in calls) and calls[-1] == "check"


def test_a_second_deployment_only_checks_and_a_change_installs_again(deploy, tmp_path):
    deploy(ENV_DIR="env")  # relative to the current folder, as `make` names it; the check runs from another one
    assert (tmp_path / "env" / "bin" / "python").is_file()
    done, calls = deploy(ENV_DIR="env")
    assert "up to date" in done.stdout and calls == ["check"]
    assert len(deploy("--dev", ENV_DIR="env")[1]) > 1


def test_deployment_on_cuda_leaves_torch_to_vllm(deploy, tmp_path):
    done, calls = deploy("--dry-run", device="cuda")
    assert "would make or check" in done.stdout and calls == [] and not (tmp_path / "my env").exists()
    compiler = {"CC": executable(tmp_path / "cc", "#!/bin/sh\n"), "FAKE_INCLUDE": tmp_path}
    (tmp_path / "Python.h").touch()
    done, calls = deploy(device="cuda", **compiler)
    assert done.returncode == 0, done.stderr
    assert "requirements/cuda.txt" in calls[0] and not any("uninstall" in call for call in calls)
    wrong = ({"CC": "/no/gcc"}, "no C compiler /no/gcc"), ({"FAKE_INCLUDE": "/no"}, "no /no/Python.h")
    for change, message in (*wrong, ({"FAKE_OLD_DRIVER": 1}, "driver 580 or newer")):
        done, calls = deploy(device="cuda", **compiler | change)
        assert done.returncode == 1 and message in done.stderr, "what runs would fail on is said here"


def test_deployment_refuses_unknown_arguments_and_an_old_python(deploy, tmp_path):
    old = executable(tmp_path / "python3", '#!/usr/bin/env bash\n[[ "$1" == -c ]] && exit 1\necho "Python 3.9.1"\n')
    for done, calls in (deploy(device="tpu"), deploy("--device"), deploy("--fast"), deploy(PYTHON=old)):
        assert done.returncode == 1 and "error:" in done.stderr and calls == []
    assert "3.9.1; kai-verl needs Python 3.11 or newer" in done.stderr


def test_only_an_environment_of_this_script_is_changed_and_an_interrupted_one_goes_on(deploy, tmp_path):
    stand_in("python_of_deployment", tmp_path / "my env" / "bin" / "python")
    done, calls = deploy()
    assert "was not made by this script and is used as it is" in done.stdout and calls == ["check"]
    (tmp_path / "my env" / ".kai-verl-environment").write_text("unfinished\n")
    assert any("--editable" in call for call in deploy()[1])


def test_conda_is_used_where_it_is_asked_for(deploy, tmp_path):
    python = tmp_path / "bin" / "python3"
    conda = executable(tmp_path / "conda", f'#!/usr/bin/env bash\n[[ "$3" == mine ]] || exit 1\necho "{python}"\n')
    done, _ = deploy(CONDA_ENV_NAME="mine", CONDA_EXE=conda, PYTHON="/no/python")
    assert done.returncode == 0, done.stderr
    assert "conda has no environment other" in deploy("--dev", CONDA_ENV_NAME="other", CONDA_EXE=conda)[0].stderr
