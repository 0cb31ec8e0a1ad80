"""Seconds per stage and generated tokens per second of a distillation step.

Runs the normal entry point on a tiny pair (or on the models given) and reads the metrics that the run itself logs::

    python benchmarks/step_time.py [--steps 8] [--warmup 3] [--engine vllm] [--ranks 2] [-- HYDRA_OVERRIDES]

Prints a table of medians over the steps after the warm-up, and one JSON document as the last line. Absolute times mean
little on a shared machine: compare two settings in one sitting.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # a checkout serves as well as an installation

STAGES = ("gen", "old_log_prob", "ref", "adv", "update_actor", "update_weights", "step")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="training steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--ranks", type=int, default=2, help="training ranks")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--response-tokens", type=int, default=64, help="tokens per response")
    parser.add_argument("--teacher", type=Path, help="teacher model; default: a tiny random pair")
    parser.add_argument("--student", type=Path, help="student model; goes with --teacher")
    parser.add_argument("--extend-vocab-start-token", type=int, help="first extended id of the student")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, after --")
    args = parser.parse_args()
    if args.steps <= args.warmup:
        parser.error(f"--steps {args.steps} must be more than --warmup {args.warmup}")
    if bool(args.teacher) != bool(args.student):
        parser.error("--teacher and --student go together")
    return args


def tiny_pair(folder: Path) -> tuple[Path, Path, int]:
    """A random teacher and student over tiny tokenizers; returns both folders and the first extended id."""
    from transformers import AutoTokenizer

    from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers

    teacher, student = build_tiny_tokenizers(folder / "tokenizers")
    command = [sys.executable, "-m", "recipe.onpolicy_distill.tiny_models", "--out", str(folder / "pair")]
    command += ["--teacher-tokenizer", str(teacher), "--student-tokenizer", str(student)]
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    return folder / "pair" / "teacher", folder / "pair" / "student", len(AutoTokenizer.from_pretrained(teacher))


def write_prompts(path: Path, rows: int) -> None:
    """OneRec chat rows whose prompts differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [
        [{"role": "user", "content": f"count from {row} to {row + 7}"}, {"role": "assistant", "content": str(row + 7)}]
        for row in range(rows)
    ]
    table = {"source": ["bench"] * rows, "uuid": [str(row) for row in range(rows)]}
    pq.write_table(pa.table({**table, "messages": [json.dumps(chat) for chat in messages]}), path)


def run_training(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Run the entry point; returns what it logged, a dict per step."""
    if args.teacher:
        teacher, student, start = args.teacher, args.student, args.extend_vocab_start_token
    else:
        teacher, student, start = tiny_pair(folder)
    write_prompts(folder / "prompts.parquet", args.prompts * args.steps)
    overrides = {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": teacher,
        "actor_rollout_ref.rollout.extend_vocab_start_token": "null" if start is None else start,
        "actor_rollout_ref.rollout.name": args.engine,
        "actor_rollout_ref.rollout.ignore_eos": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": args.prompts,
        "data.train_files": folder / "prompts.parquet",
        "data.train_batch_size": args.prompts,
        "data.max_prompt_length": 128,
        "data.max_response_length": args.response_tokens,
        "trainer.n_gpus_per_node": args.ranks,
        "trainer.total_training_steps": args.steps,
        "trainer.default_local_dir": folder / "run",
        "trainer.logger": "[file]",
    }
    command = [sys.executable, "-m", "recipe.onpolicy_distill.main_onpolicy_distill"]
    command += [f"{key}={value}" for key, value in overrides.items()] + args.overrides
    subprocess.run(command, cwd=REPO, check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["data"] for line in lines if "timing_s/step" in json.loads(line)["data"]]


def summarize(steps: list[dict[str, float]], warmup: int) -> dict[str, Any]:
    """Medians over the steps after the warm-up."""
    counted = steps[warmup:]
    seconds = {
        name: statistics.median(step[f"timing_s/{name}"] for step in counted)
        for name in STAGES
        if f"timing_s/{name}" in counted[0]
    }
    tokens = [step["response_length/mean"] * step["distill/num_sequences"] for step in counted]
    return {
        "steps": len(counted),
        "seconds_per_stage": seconds,
        "generated_tokens_per_step": statistics.median(tokens),
        "generated_tokens_per_s": statistics.median(
            total / step["timing_s/gen"] for total, step in zip(tokens, counted, strict=True)
        ),
        "end_to_end_tokens_per_s": statistics.median(
            total / step["timing_s/step"] for total, step in zip(tokens, counted, strict=True)
        ),
    }


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="step_time_") as folder:
        report = summarize(run_training(args, Path(folder)), args.warmup)
    import torch

    report |= {"engine": args.engine, "ranks": args.ranks, "prompts": args.prompts, "torch": torch.__version__}
    report["machine"] = platform.processor() or platform.machine()
    print(f"\n{'stage':<16}{'median s':>10}{'share':>8}")
    for name, value in report["seconds_per_stage"].items():
        print(f"{name:<16}{value:>10.3f}{value / report['seconds_per_stage']['step']:>8.0%}")
    for name in ("generated_tokens_per_s", "end_to_end_tokens_per_s"):
        print(f"{name:<26}{report[name]:>8.0f}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
