"""A step beside that of TRL's ``DistillationTrainer``: the same models, prompts and tokens, in one sitting.

Both sides minimise the exact reverse KL of the answers that the student writes itself, in fp32, one optimizer step a
batch; no answer ends before its last token. TRL generates with transformers, as it does without a GPU, in one process
with all cores; this project with its defaults. With ``--bf16`` both multiply in bf16 and keep fp32 weights, each by its
own setting::

    python benchmarks/against_trl.py [--shape tiny smollm2] [--steps 13] [--warmup 3] [--bf16] [-- HYDRA_OVERRIDES]

The sides take turns, each first once (ours, TRL, TRL, ours), because a machine is rarely as fast later as before. TRL
is installed into an environment of its own, which shares this one's torch and transformers. Prints a table of the
medians of the steps after the warm-up, and one JSON document as the last line; the ratio is what to look at.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # a checkout serves as well as an installation

TRL = "trl==1.16.0"
LEARNING_RATE = 1e-5
PROMPT_WORDS = 32
RESPONSE_TOKENS = 64
SHAPES = {"tiny": (32, 9_216), "smollm2": (16, 49_152)}
"""Prompts a step and rows of the embedding: a two-layer Qwen3, and SmolLM2-135M with random weights."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"], help="models to compare with")
    parser.add_argument("--steps", type=int, default=13, help="training steps of each run, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--bf16", action="store_true", help="both sides in bf16 over fp32 weights")
    parser.add_argument("--trl-env", type=Path, default=REPO / "outputs" / "trl-env", help="where TRL is installed")
    parser.add_argument("--trl-side", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of this project's side, after --")
    args = parser.parse_args()
    if args.steps <= args.warmup:
        parser.error(f"--steps {args.steps} must be more than --warmup {args.warmup}")
    return args


def write_models(shape: str, folder: Path) -> None:
    """``folder/student`` and ``folder/teacher``: random weights over one tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    rows = SHAPES[shape][1]
    words = {word: number for number, word in enumerate(["<pad>", "<end>", *(f"w{n}" for n in range(2, rows))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    common = {"vocab_size": rows, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        if shape == "tiny":
            sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
            model: Any = Qwen3ForCausalLM(Qwen3Config(**common, **sizes, **heads))
        else:
            sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
            heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
            model = LlamaForCausalLM(LlamaConfig(**common, **sizes, **heads))
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def prompts(count: int) -> list[str]:
    """Texts of ``PROMPT_WORDS`` tokens, each another one."""
    return [" ".join(f"w{2 + (31 * row + 7 * word) % 9_000}" for word in range(PROMPT_WORDS)) for row in range(count)]


def our_run(
    models: Path, prompts_per_step: int, steps: int, overrides: Sequence[str], environment: Mapping[str, str]
) -> list[dict[str, float]]:
    """Train ``models/student`` towards ``models/teacher``; the metrics of each step.

    Args:
        environment: added to that of this process.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = prompts(prompts_per_step * steps)
    chats = [json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "w2"}]) for text in texts]
    columns = {"source": ["bench"] * len(chats), "uuid": [str(row) for row in range(len(chats))], "messages": chats}
    with tempfile.TemporaryDirectory(prefix="against_trl_") as name:
        pq.write_table(pa.table(columns), f"{name}/prompts.parquet")
        settings = {
            "actor_rollout_ref.model.path": models / "student",
            "actor_rollout_ref.ref.model.path": models / "teacher",
            "actor_rollout_ref.rollout.extend_vocab_start_token": "null",
            "actor_rollout_ref.rollout.ignore_eos": True,
            "actor_rollout_ref.actor.ppo_mini_batch_size": prompts_per_step,
            "actor_rollout_ref.actor.optim.lr": LEARNING_RATE,
            "actor_rollout_ref.model.enable_gradient_checkpointing": False,
            "algorithm.distill.objective": "exact",
            "data.train_files": f"{name}/prompts.parquet",
            "data.train_batch_size": prompts_per_step,
            "data.max_prompt_length": 2 * PROMPT_WORDS,
            "data.max_response_length": RESPONSE_TOKENS,
            "trainer.n_gpus_per_node": len(os.sched_getaffinity(0)),
            "trainer.total_training_steps": steps,
            "trainer.default_local_dir": f"{name}/run",
            "trainer.logger": "[file]",
        }
        command = [sys.executable, "-m", "recipe.onpolicy_distill.main_onpolicy_distill"]
        command += [*(f"{key}={value}" for key, value in settings.items()), *overrides]
        subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
        lines = [json.loads(line)["data"] for line in Path(name, "run", "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "timing_s/step" in line]


def our_steps(args: argparse.Namespace, shape: str, models: Path) -> list[float]:
    """Seconds of each counted step of this project."""
    precision = ["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"] if args.bf16 else []
    lines = our_run(models, SHAPES[shape][0], args.steps, [*precision, *args.overrides], {})
    return [line["timing_s/step"] for line in lines][args.warmup :]


def trl_python(folder: Path) -> Path:
    """The interpreter of an environment that adds TRL to this one's packages; made at the first call."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = folder / "lib" / version / "site-packages" / "shared.pth"
        shared.write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", TRL], check=True)
    return python


def trl_steps(args: argparse.Namespace, shape: str, models: Path) -> list[float]:
    """Seconds of each counted step of TRL."""
    out = models / "trl.json"
    command = [str(trl_python(args.trl_env)), __file__, "--shape", shape, "--steps", str(args.steps)]
    command += ["--bf16"] if args.bf16 else []
    subprocess.run([*command, "--trl-side", str(models), str(out)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())[args.warmup :]


def run_trl(args: argparse.Namespace) -> None:
    """Train with TRL and write the seconds of each step; runs in TRL's environment."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    models, out = args.trl_side
    per_step, times = SHAPES[args.shape[0]][0], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    config = DistillationConfig(
        output_dir=str(models / "trl"),
        beta=1.0,  # the reverse KL
        max_steps=args.steps,
        per_device_train_batch_size=per_step,
        max_completion_length=RESPONSE_TOKENS,
        generation_kwargs={"min_new_tokens": RESPONSE_TOKENS},
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        bf16=args.bf16,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": prompts(per_step * args.steps)})
    sides = {"model": str(models / "student"), "teacher_model": str(models / "teacher")}
    start = time.perf_counter()
    DistillationTrainer(**sides, args=config, train_dataset=data, callbacks=[Clock()]).train()
    out.write_text(json.dumps([end - begin for begin, end in zip([start, *times], times, strict=False)]))


def compare(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Medians of both sides, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="against_trl_models_") as name:
        write_models(shape, Path(name))
        trl_python(args.trl_env)  # not between the runs
        ours = our_steps(args, shape, Path(name))
        theirs = trl_steps(args, shape, Path(name)) + trl_steps(args, shape, Path(name))
        ours += our_steps(args, shape, Path(name))
    medians = {"ours": statistics.median(ours), "trl": statistics.median(theirs)}
    tokens = SHAPES[shape][0] * RESPONSE_TOKENS
    report: dict[str, Any] = {"shape": shape, "seconds": medians, "ratio": medians["trl"] / medians["ours"]}
    report["spread"] = {"ours": [min(ours), max(ours)], "trl": [min(theirs), max(theirs)]}
    report["tokens_per_s"] = {side: tokens / seconds for side, seconds in medians.items()}
    return report


def main() -> None:
    args = parse_args()
    if args.trl_side:
        run_trl(args)
        return
    reports = [compare(args, shape) for shape in args.shape]
    print(f"\n{'shape':<10}{'ours, s a step':>16}{'TRL, s a step':>16}{'ratio':>8}")
    for report in reports:
        seconds = report["seconds"]
        print(f"{report['shape']:<10}{seconds['ours']:>16.3f}{seconds['trl']:>16.3f}{report['ratio']:>8.2f}")
    about = {"trl": TRL, "cores": len(os.sched_getaffinity(0)), "bf16": args.bf16, "overrides": args.overrides}
    print(json.dumps({**about, "reports": reports}))


if __name__ == "__main__":
    main()
