"""Run the shell scripts with nothing of this process's settings for them."""

import os
import subprocess

from support.tiny_pairs import REPO

RECIPE = REPO / "recipe" / "onpolicy_distill"
LAUNCH = RECIPE / "run_qwen3_distill.sh"
LAUNCH_SMALL = RECIPE / "run_qwen3_1.7b_distill.sh"
ONE_CARD = RECIPE / "run_one_card.sh"
CLUSTER = REPO / "init_ray_cluster.sh"
DEPLOY = REPO / "deploy_env.sh"
RAY_NODE = REPO / "scripts" / "ray_node.sh"

MODELS = {"BASE_MODEL": "/m/student", "TEACHER_MODEL": "/m/teacher", "DATASET_PARQUET": "/d/train.parquet"}


def run(script, *arguments, cwd=REPO, **env):
    """Run a script with nothing of this process's settings for it but ``env``."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(name, path):
    """A script at ``path`` that answers in a program's place; see tests/data/stand_ins."""
    return executable(path, (REPO / "tests" / "data" / "stand_ins" / name).read_text())


def executable(path, text):
    """A script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def read_back(command):
    """The arguments of a command that was printed, as a shell reads it."""
    script = f"printf '%s\\0' {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split("\0")[:-1]
