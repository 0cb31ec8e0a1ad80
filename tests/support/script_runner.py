"""Run the shell scripts with nothing of this process's settings for them."""

import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "recipe" / "onpolicy_distill"
LAUNCH = RECIPE / "run_qwen3_distill.sh"
LAUNCH_SMALL = RECIPE / "run_qwen3_1.7b_distill.sh"
CLUSTER = REPO / "init_ray_cluster.sh"
DEPLOY = REPO / "deploy_env.sh"
RAY_NODE = REPO / "scripts" / "ray_node.sh"

MODELS = {"BASE_MODEL": "/m/student", "TEACHER_MODEL": "/m/teacher", "DATASET_PARQUET": "/d/train.parquet"}
SCRIPT_VARIABLES = (
    *MODELS,
    *("VAL_PARQUET", "EXTEND_VOCAB_START_TOKEN", "MASK_RESPONSE_IF_HAVE_EXTEND_TOKEN", "DISTILL_ADV_MAX"),
    *("DISTILL_ADV_MIN", "N_GPUS_PER_NODE", "OUTPUT_DIR", "DRY_RUN", "HOSTFILE", "NODE_IP", "RAY_PORT", "SSH_OPTS"),
    *("ENV_DIR", "PYTHON", "TORCH_INDEX_URL", "PYTHONPATH", "SSH_PORT", "LOG_DIR", "CLUSTER_DIR", "CONDA_ENV_NAME"),
    *("NUM_CPUS", "NUM_GPUS", "DASHBOARD_HOST", "RAY_START_OPTIONS", "MAX_RESTARTS"),
)


def run(script, *arguments, cwd=REPO, **env):
    """Run a script with nothing of this process's settings for it but ``env``."""
    clean = {name: value for name, value in os.environ.items() if name not in SCRIPT_VARIABLES}
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )


def executable(path, text):
    """A script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
