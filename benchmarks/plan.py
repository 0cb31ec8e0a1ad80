"""Peaks of memory as ``kai-verl plan`` has them, against peaks that are measured, on the CPU.

Each case builds a student with its teachers in a process of its own, lets them score a batch and updates the student
once, without Ray and engines::

    python benchmarks/plan.py [--cases NAME ...]

Measured is the process's resident memory (``VmHWM``, reset before each stage) above what it was when a tiny model had
gone the same way, so that what is imported, and what libraries keep, is no part of it. malloc gives back blocks from
128 KiB on at once (``MALLOC_MMAP_THRESHOLD_``): what it would keep otherwise depends on the order of calls, and no plan
has it. Prints a table with the ratio of plan to measurement, and one JSON document as the last line.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # a checkout serves as well as an installation

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
IMPORTED = [
    "verl.workers.model_workers",
    "verl.trainer.launch.typed",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
]
MODEL, ACTOR, REF = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.ref"
NO_CHECKPOINTING = f"{MODEL}.enable_gradient_checkpointing=False"
OBJECTIVE = "algorithm.distill.objective"
SELF = "++algorithm.distill.teachers.self={vocabulary: full, sources: [rec_*]}"
STITCHED = "++algorithm.distill.teachers.mixed={vocabulary: stitched, sources: [rec_*]}"
BF16 = f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=bf16"


def case(
    hidden: int,
    inner: int,
    blocks: int,
    vocabulary: int,
    *overrides: str,
    rows: int = 4,
    micro_rows: int = 0,
    **model: Any,
) -> dict[str, Any]:
    """A student of that shape, rows of 256 + 256 tokens, and a teacher of half as many blocks."""
    tokens = 512 * (micro_rows or rows)
    tokens_keys = (f"{ACTOR}.ppo", f"{REF}.log_prob", "actor_rollout_ref.rollout.log_prob")
    limits = [f"{key}_max_token_len_per_gpu={tokens}" for key in tokens_keys]
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, **model}
    return {"model": sizes, "ids": vocabulary, "rows": rows, "overrides": [*overrides, *limits]}


CASES = {
    "sampled, no checkpointing": case(512, 1536, 4, 16_000, NO_CHECKPOINTING),
    "sampled": case(768, 2048, 6, 12_000),
    "large vocabulary": case(384, 1024, 2, 60_000, rows=2),
    "untied": case(512, 1536, 4, 24_000, tie_word_embeddings=False),
    "exact": case(512, 1536, 6, 20_000, f"{OBJECTIVE}=exact"),
    "exact, frozen self": case(512, 1536, 4, 16_000, f"{OBJECTIVE}=exact", SELF, NO_CHECKPOINTING, rows=2),
    "exact, stitched, bf16": case(512, 1536, 4, 20_000, f"{OBJECTIVE}=exact", STITCHED, BF16),
    "adapter, adapter-off self": case(
        768, 2048, 8, 24_000, f"{OBJECTIVE}=exact", SELF, f"{MODEL}.lora_rank=16", rows=8
    ),
    "adapter, no checkpointing": case(512, 1536, 6, 16_000, NO_CHECKPOINTING, f"{MODEL}.lora_rank=32"),
    "four micro-batches, Llama": case(
        640, 1792, 6, 16_000, f"{OBJECTIVE}=jsd", rows=8, micro_rows=2, model_type="llama"
    ),
}


def write_models(folder: Path, spec: dict[str, Any]) -> None:
    """A random student, and a teacher that lacks a tenth of its ids, with tokenizers of as many words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    sizes = {"head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 1024, **spec["model"]}
    kind, heads, blocks = sizes.pop("model_type", "qwen3"), sizes["hidden_size"] // 64, sizes["num_hidden_layers"]
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    for name, ids, layers in (("student", spec["ids"], blocks), ("teacher", spec["ids"] * 9 // 10, blocks // 2)):
        config = AutoConfig.for_model(kind, **{**sizes, "vocab_size": ids, "num_hidden_layers": layers})
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder / name)
        words = Tokenizer(WordLevel({f"w{number}": number for number in range(ids)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")
        tokenizer.save_pretrained(folder / name)


def settings(folder: Path, spec: dict[str, Any]) -> Any:
    """The run's settings."""
    from verl.trainer.launch.typed import load_config

    overrides = {
        f"{MODEL}.path": folder / "student",
        f"{REF}.model.path": folder / "teacher",
        "data.train_batch_size": spec["rows"],
        "data.max_prompt_length": 256,
        "data.max_response_length": 256,
        "actor_rollout_ref.rollout.extend_vocab_start_token": spec["ids"] * 9 // 10,
        "trainer.device": "cpu",
    }
    words = [f"{key}={value}" for key, value in overrides.items()] + spec["overrides"]
    return load_config(words, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def step(config: Any, measure: Any) -> None:
    """Build student and teachers, score and update; ``measure`` runs a function and keeps its peak under a name."""
    import torch

    from verl.protocol import DataProto
    from verl.workers.model_workers import StudentWorker, TeacherWorker

    models, distill = config.actor_rollout_ref, config.algorithm.distill
    workers: dict[str, Any] = {"actor": StudentWorker(models, "cpu", distill)}
    workers |= {role: TeacherWorker(models, "cpu", distill.teachers.get(role)) for role in distill.roles}

    def build() -> None:
        for worker in workers.values():
            worker.attach(workers, worker.object_store)
            worker.init_model()

    shape = (config.data.train_batch_size, 512)
    ids = torch.randint(3, models.rollout.extend_start, shape, generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    tensors = {"prompts": ids[:, :256], "responses": ids[:, 256:], "input_ids": ids, "attention_mask": real}
    tensors |= {"response_mask": real[:, 256:], "teacher": torch.arange(len(ids)) % len(distill.roles)}
    batch = DataProto.from_dict(tensors | {"advantages": torch.randn(len(ids), 256)}, meta_info={"temperature": 1.0})

    def score() -> None:
        batch.union(workers["actor"].compute_log_prob(batch))
        for role in distill.roles:
            workers[role].compute_ref_log_prob(batch)

    measure("start", build)
    measure("score", score)
    measure("update", lambda: workers["actor"].update_actor(batch))


def resident(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run_case(folder: Path, spec: dict[str, Any]) -> dict[str, int]:
    """Measure a case in this process: bytes by stage."""
    peaks: dict[str, int] = {}

    def measure(name: str, run: Any) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        run()
        peaks[name] = resident("VmHWM")

    step(settings(folder / "tiny", {**spec, "ids": 600}), measure)
    gc.collect()
    before = resident("VmRSS")
    step(settings(folder / "real", spec), measure)
    return {name: peak - before for name, peak in peaks.items()}


def compare(name: str, folder: Path) -> dict[str, Any]:
    """The plan of a case, and what a process of its own measures."""
    from verl.trainer.launch.plan import RANK, plan_memory, read_shapes

    spec = CASES[name]
    write_models(folder / "real", spec)
    tiny = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    write_models(folder / "tiny", {"ids": 600, "model": {**spec["model"], **tiny}})
    config = settings(folder / "real", spec)
    stages = plan_memory(config, read_shapes(config), "cpu").stages
    context = multiprocessing.get_context("forkserver")  # whose processes are fresh, and need not import anew
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        measured = pool.submit(run_case, folder, spec).result()
    planned = {stage: stages[stage][RANK] for stage in measured}
    peaks = {"plan": max(planned.values()), "measured": max(measured.values())}
    return {"stages": {"plan": planned, "measured": measured}, **peaks, "ratio": peaks["plan"] / peaks["measured"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: all")
    args = parser.parse_args()
    os.environ |= ENVIRONMENT  # before a process starts that measures
    print(f"{'MB':28}{'score':>8}{'plan':>8}{'update':>8}{'plan':>8}{'ratio of peaks':>16}")
    results = {}
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = found = compare(name, Path(folder))
        pairs = [found["stages"][side][stage] for stage in ("score", "update") for side in ("measured", "plan")]
        print(f"{name:28}" + "".join(f"{size / 1e6:8.0f}" for size in pairs) + f"{found['ratio']:16.3f}", flush=True)
    print(json.dumps({"python": platform.python_version(), "machine": platform.machine(), "cases": results}))


if __name__ == "__main__":
    main()
