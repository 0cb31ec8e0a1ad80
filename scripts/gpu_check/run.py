"""The program with Ray and vLLM, on a small random pair with the real number of rows: steps, checkpoint, resume."""

import importlib.util
import math
import time
from types import SimpleNamespace

import torch

from benchmarks.step_time import run_training, summarize
from recipe.onpolicy_distill.tiny_models import TinyPairConfig, build_tiny_models
from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from scripts.gpu_check.bench import Bench, Skipped
from verl.utils.tokenizer import hf_tokenizer

STEPS = 4
SETTINGS = {
    "actor_rollout_ref.actor.optim.total_training_steps": STEPS + 1,
    "actor_rollout_ref.rollout": "{calculate_log_probs: True, gpu_memory_utilization: 0.3, max_num_seqs: 16}",
    "algorithm.distill": "{objective: exact, support: shared, leak_coef: 1}",
    "trainer.save_freq": STEPS,
}


def run(bench: Bench) -> None:
    """Four steps by the exact objective, a checkpoint, and one step more from it."""
    if missing := [package for package in ("vllm", "ray") if importlib.util.find_spec(package) is None]:
        raise Skipped(f"no {missing[0]}")
    _, _, rows, teacher_rows = bench.sizes
    shape = TinyPairConfig(hidden=64 if bench.smoke else 256, layers=4, teacher_rows=teacher_rows, student_rows=rows)
    tokenizers = build_tiny_tokenizers(bench.work / "tokenizers")
    teacher, student = build_tiny_models(*tokenizers, bench.work / "pair", shape)
    pair = {"teacher": teacher, "student": student, "extend_vocab_start_token": len(hf_tokenizer(tokenizers[0]))}
    sizes = {"steps": STEPS + 1, "prompts": 16, "response_tokens": 16 if bench.smoke else 128}
    args = SimpleNamespace(engine="vllm", ranks=max(1, min(2, torch.cuda.device_count())), **sizes, **pair)

    def train(steps: int) -> tuple[float, list[dict[str, float]]]:
        values = SETTINGS | {"trainer.device": bench.device, "trainer.total_training_steps": steps}
        args.overrides = [f"{key}={value}" for key, value in values.items()]
        began, found = time.perf_counter(), run_training(args, bench.work)
        return time.perf_counter() - began, found

    seconds, steps = train(STEPS)
    bench.check("seconds", seconds, "<= 150", "estimate: Ray, models, vLLM, four steps")
    bench.check("steps", len(steps), f"== {STEPS}", "each is logged")
    odd = sorted({name for step in steps for name, value in step.items() if not math.isfinite(value)})
    bench.check("metrics that are not finite", odd, "== []", "docs/metrics.md")
    bench.check("updates taken", sum(step["actor/updates"] for step in steps), f"== {STEPS}", "one a step")
    gap = max(step["distill/engine_gap"] for step in steps)
    bench.check("distill/engine_gap", gap, "<= 0.1", "trainer.engine_gap_bound: 0.01 to 0.06 are usual in bf16")
    bench.check("median seconds of each stage", summarize(steps, 1)["seconds_per_stage"])
    files = len(list(bench.work.glob(f"run/global_step_{STEPS}/actor/huggingface/*.safetensors")))
    bench.check("files of the checkpoint's model", files, ">= 1", "for transformers and vLLM")
    seconds, steps = train(STEPS + 1)
    bench.check("seconds to resume and take a step", seconds, "<= 120", "estimate")
    bench.check("steps in all", len(steps), f"== {STEPS + 1}", "step 5 follows step 4")
    canary = max(step.get("distill/teacher_canary", 0.0) for step in steps)
    bench.check("distill/teacher_canary", canary, "<= 0.01", "the teacher is what it was")
