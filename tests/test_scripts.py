"""The shell scripts: what they would run, with stand-ins for Python and without any network or cluster."""

import os
import subprocess

import pytest
from support.script_runner import CLUSTER, DEPLOY, LAUNCH, LAUNCH_SMALL, MODELS, RAY_NODE, REPO, executable, run

MODULE = "recipe.onpolicy_distill.main_onpolicy_distill"


def launch(*arguments, script=LAUNCH, **env):
    """The command a launch would run, as its list of arguments."""
    done = run(script, *arguments, DRY_RUN=1, **{**MODELS, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def settings(command):
    """Overrides of a command, of which the last of each key counts."""
    return dict(argument.split("=", 1) for argument in command[3:])


@pytest.mark.parametrize("script", [LAUNCH, LAUNCH_SMALL, CLUSTER, DEPLOY, RAY_NODE])
def test_help_and_syntax(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert script.name in done.stdout
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("missing", list(MODELS))
def test_required_variables_are_named(missing):
    env = {name: value for name, value in MODELS.items() if name != missing}
    done = run(LAUNCH, DRY_RUN=1, **env)
    assert done.returncode == 2
    assert f"{missing} is not set" in done.stderr


def test_defaults():
    command = launch()
    assert command[1:3] == ["-m", MODULE]
    used = settings(command)
    assert used["actor_rollout_ref.model.path"] == "/m/student"
    assert used["actor_rollout_ref.ref.model.path"] == "/m/teacher"
    assert used["data.train_files"] == "/d/train.parquet"
    assert used["data.val_files"] == "null"
    assert used["algorithm.distill_adv_max_clip"] == "5.0"
    assert used["algorithm.distill_adv_min_clip"] == "-30.0"
    assert used["actor_rollout_ref.rollout.extend_vocab_start_token"] == "null"
    assert used["actor_rollout_ref.rollout.mask_response_if_have_extend_token"] == "False"
    assert used["trainer.nnodes"] == "1"
    assert "ray_kwargs.ray_init.address" not in used


def test_variables_are_read():
    used = settings(
        launch(
            VAL_PARQUET="/d/val.parquet",
            EXTEND_VOCAB_START_TOKEN=8218,
            MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN="True",
            DISTILL_ADV_MAX=0,
            DISTILL_ADV_MIN=-7.5,
            N_GPUS_PER_NODE=2,
            OUTPUT_DIR="/out",
        )
    )
    assert used["data.val_files"] == "/d/val.parquet"
    assert used["actor_rollout_ref.rollout.extend_vocab_start_token"] == "8218"
    assert used["actor_rollout_ref.rollout.mask_response_if_have_extend_token"] == "True"
    assert used["algorithm.distill_adv_max_clip"] == "0"  # 0 is a bound
    assert used["algorithm.distill_adv_min_clip"] == "-7.5"
    assert used["trainer.n_gpus_per_node"] == "2"
    assert used["trainer.default_local_dir"] == "/out"


def test_overrides_come_last_and_unchanged():
    overrides = ["data.train_batch_size=4", "++data.enable_think=False", "trainer.logger=[console, file]", "~x"]
    assert launch(*overrides)[-4:] == overrides


@pytest.mark.parametrize("first", ["a=b", "+a=b", "~a", "--cfg"])
def test_a_first_argument_for_hydra_is_no_hostfile(first):
    assert launch(first, "c=d")[-2:] == [first, "c=d"]


@pytest.mark.parametrize("text", ["localhost\n", "# only this one\n\n127.0.0.1  slots=8\n127.0.0.1\n"])
def test_a_hostfile_of_this_machine_alone_needs_no_cluster(tmp_path, text):
    hostfile = tmp_path / "my hosts"
    hostfile.write_text(text)
    used = settings(launch(hostfile, "data.seed=3"))
    assert used["trainer.nnodes"] == "1"
    assert used["data.seed"] == "3"
    assert "ray_kwargs.ray_init.address" not in used


def test_several_hosts_connect_to_the_running_cluster(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=8 # head\nnode-b\n\nnode-a\n")
    used = settings(launch(hostfile))
    assert used["trainer.nnodes"] == "2"
    assert used["ray_kwargs.ray_init.address"] == "auto"


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("# nobody\n", "names no host")])
def test_unusable_hostfiles(tmp_path, content, message):
    hostfile = tmp_path / "hosts"
    if content is not None:
        hostfile.write_text(content)
    done = run(LAUNCH, hostfile, DRY_RUN=1, **MODELS)
    assert done.returncode == 2
    assert message in done.stderr


def test_it_starts_the_environments_python_from_any_folder(tmp_path):
    fake = executable(
        tmp_path / "my env" / "bin" / "python", '#!/usr/bin/env bash\npwd\necho "$PYTHONPATH"\necho "$2"\n'
    )
    here = tmp_path / "elsewhere"
    here.mkdir()
    done = run(LAUNCH, cwd=here, ENV_DIR=fake.parents[1], PYTHONPATH="/mine", **MODELS)
    assert done.stdout.splitlines() == [str(here), f"{REPO}:/mine", MODULE]


def test_the_small_preset_changes_the_settings_and_loses_to_the_users(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost\n")
    key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    base, small = settings(launch()), settings(launch(hostfile, script=LAUNCH_SMALL))
    assert small[key] != base[key]
    assert small["data.train_batch_size"] == base["data.train_batch_size"] == "32"
    assert settings(launch(f"{key}=99", script=LAUNCH_SMALL))[key] == "99"


# Answers for both interpreters that deploy_env.sh uses; every call of the environment's one is written down.
FAKE_PYTHON = """\
#!/usr/bin/env bash
case "$*" in
    "--version") echo "Python 3.11.0" ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *versions.py) echo "versions python=3.11.0 torch=2.13.0 vllm=none" ;;
    "-m pip "*) printf '%s\\n' "$*" >>"$FAKE_LOG" ;;
    -) cat >/dev/null; echo check >>"$FAKE_LOG" ;;
esac
"""


@pytest.fixture
def deploy(tmp_path):
    """Runs deploy_env.sh with stand-ins; gives the result and what the environment's Python was asked since."""
    python, log = executable(tmp_path / "bin" / "python3", FAKE_PYTHON), tmp_path / "log"

    def call(*arguments, **env):
        log.write_text("")
        env = {"ENV_DIR": tmp_path / "my env", "PYTHON": python, "FAKE_LOG": log, **env}
        done = run(DEPLOY, *arguments, cwd=tmp_path, **env)
        return done, log.read_text().splitlines()

    return call


def test_deployment_on_cpu_takes_torch_first_and_drops_what_breaks_it(deploy):
    done, calls = deploy("--device", "cpu", "--dev", TORCH_INDEX_URL="http://index.example/simple")
    assert done.returncode == 0, done.stderr
    lines = (REPO / "requirements" / "cpu.txt").read_text().splitlines()
    (torch_pin,) = [line for line in lines if line.startswith("torch==")]
    assert calls[0].endswith(f"--index-url http://index.example/simple {torch_pin}")
    assert all(f"requirements/{name}.txt" in calls[1] for name in ("cpu", "base", "dev"))
    assert "index.example" not in calls[1]
    assert "uninstall" in calls[2] and "torchvision torchaudio torchcodec" in calls[2]
    assert any("--editable" in call for call in calls)
    assert calls[-1] == "check"


def test_a_second_deployment_only_checks_and_a_change_installs_again(deploy):
    deploy("--device", "cpu")
    done, calls = deploy("--device", "cpu")
    assert "up to date" in done.stdout
    assert calls == ["check"]
    assert len(deploy("--device", "cpu", "--dev")[1]) > 1


def test_an_environment_named_relative_to_the_current_folder(deploy, tmp_path):
    # As `make` names it. The check runs from another folder, so that it imports what is installed.
    done, calls = deploy("--device", "cpu", ENV_DIR="env")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == "check"
    assert (tmp_path / "env" / "bin" / "python").is_file()


def test_deployment_on_cuda_leaves_torch_to_vllm(deploy):
    done, calls = deploy("--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert "requirements/cuda.txt" in calls[0]
    assert not any("uninstall" in call for call in calls)


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--device"], ["--fast"]])
def test_deployment_refuses_unknown_arguments(deploy, arguments):
    done, calls = deploy(*arguments)
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert calls == []


def test_a_dry_run_changes_nothing(deploy, tmp_path):
    done, calls = deploy("--device", "cpu", "--dev", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would make or check" in done.stdout
    assert calls == [] and not (tmp_path / "my env").exists()


def test_an_environment_of_somebody_else_is_checked_and_not_changed(deploy, tmp_path):
    executable(tmp_path / "my env" / "bin" / "python", FAKE_PYTHON)
    done, calls = deploy("--device", "cpu")
    assert "was not made by this script and is used as it is" in done.stdout
    assert calls == ["check"]


def test_an_interrupted_deployment_goes_on(deploy, tmp_path):
    executable(tmp_path / "my env" / "bin" / "python", FAKE_PYTHON)
    (tmp_path / "my env" / ".kai-verl-environment").write_text("unfinished\n")
    assert any("--editable" in call for call in deploy("--device", "cpu")[1])


def test_conda_is_used_where_it_is_asked_for(deploy, tmp_path):
    python = tmp_path / "bin" / "python3"
    conda = executable(tmp_path / "conda", f'#!/usr/bin/env bash\n[[ "$3" == mine ]] || exit 1\necho "{python}"\n')
    done, _ = deploy("--device", "cpu", CONDA_ENV_NAME="mine", CONDA_EXE=conda, PYTHON="/no/python")
    assert done.returncode == 0, done.stderr
    done, _ = deploy("--device", "cpu", "--dev", CONDA_ENV_NAME="other", CONDA_EXE=conda)
    assert "conda has no environment other" in done.stderr


def test_deployment_refuses_an_old_python(tmp_path):
    old = executable(tmp_path / "python3", '#!/usr/bin/env bash\n[[ "$1" == -c ]] && exit 1\necho "Python 3.9.1"\n')
    done = run(DEPLOY, "--device", "cpu", PYTHON=old, ENV_DIR=tmp_path / "env")
    assert done.returncode == 1
    assert "3.9.1; kai-verl needs Python 3.11 or newer" in done.stderr
