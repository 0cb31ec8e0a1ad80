"""Forget, recover, and see what it cost.

::

    python -m recipe.onpolicy_distill.quickstart [--seed 0] [--steps 200] [--out DIR] [HYDRA_OVERRIDES...]

    world ─► teacher ─► student, which forgot ─► scoreboard ─► distillation ─► scoreboard ─► report

World, teacher and student are kept in OUT/cache and made again only where what they depend on has changed. The
distillation is the normal entry point, in a process of its own; overrides go to it.
"""

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl.utils.timing import marked_timer

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
MAX_PROMPT_TOKENS = 64
MAX_ANSWER_TOKENS = 12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the world, the models and the sampling (default 0)")
    parser.add_argument("--steps", type=int, default=200, help="steps of distillation (default 200)")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="default outputs/quickstart")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the distillation")
    return parser.parse_args(argv)


def distillation_command(world: Any, teacher: Path, student: Path, run: Path, args: argparse.Namespace) -> list[str]:
    """The entry point with the quickstart's settings, the user's overrides last."""
    settings = {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": teacher,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 5,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
        "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
        "actor_rollout_ref.rollout.extend_vocab_start_token": world.extend_vocab_start_token,
        "actor_rollout_ref.rollout.seed": args.seed,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "data.train_files": world.general_train,
        "data.val_files": world.general_test,
        "data.max_prompt_length": MAX_PROMPT_TOKENS,
        "data.max_response_length": MAX_ANSWER_TOKENS,
        "data.train_batch_size": 128,
        "data.seed": args.seed,
        "custom_reward_function.path": HERE / "exact_match.py",
        "trainer.n_gpus_per_node": 2,
        "trainer.total_training_steps": args.steps,
        "trainer.total_epochs": 1000,
        "trainer.test_freq": 25,
        "trainer.save_freq": args.steps,
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[console,file]",
        "trainer.default_local_dir": run,
    }
    command = [sys.executable, "-m", "recipe.onpolicy_distill.main_onpolicy_distill"]
    return [*command, *(f"{key}={value}" for key, value in settings.items()), *args.overrides]


def score(world: Any, model: Path, teacher: Path, *, recommends: bool, seed: int) -> Any:
    """The scoreboard of one model; a teacher recommends nothing."""
    from recipe.onpolicy_distill.evaluate import EvaluationConfig, evaluate

    return evaluate(
        EvaluationConfig(
            model=str(model),
            teacher=None if model == teacher else str(teacher),
            general=str(world.general_test),
            rec=str(world.rec_test) if recommends else None,
            catalogue=str(world.catalogue) if recommends else None,
            extend_vocab_start_token=world.extend_vocab_start_token if recommends else None,
            max_prompt_length=MAX_PROMPT_TOKENS,
            max_new_tokens=MAX_ANSWER_TOKENS,
            seed=seed,
            rollout={"cpu_kvcache_space_gb": 0.25},
        )
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from recipe.onpolicy_distill.quickstart import models, report, scoreboard_table, world

    out, cache = args.out.resolve(), args.out.resolve() / "cache"
    run = out / "run"
    seconds: dict[str, float] = {}
    with marked_timer("total", seconds):
        with marked_timer("world", seconds):
            built = world.build(cache, world.WorldConfig(seed=args.seed))
        with marked_timer("teacher", seconds):
            teacher = models.make_teacher(built, cache, models.TeacherConfig(seed=args.seed))
        with marked_timer("student", seconds):
            student = models.make_student(built, teacher, cache, models.StudentConfig(seed=args.seed))
        with marked_timer("scoreboard_before", seconds):
            of_teacher = score(built, teacher, teacher, recommends=False, seed=args.seed)
            before = score(built, student, teacher, recommends=True, seed=args.seed)
        (run / "metrics.jsonl").unlink(missing_ok=True)
        with marked_timer("distillation", seconds):
            done = subprocess.run(distillation_command(built, teacher, student, run, args), check=False)
        if done.returncode:
            sys.exit(f"error: the distillation ended with code {done.returncode}; its own first error is above")
        with marked_timer("scoreboard_after", seconds):
            trained = run / f"global_step_{args.steps}" / "actor" / "huggingface"
            after = score(built, trained, teacher, recommends=True, seed=args.seed)
    summary = {
        "seed": args.seed,
        "steps": args.steps,
        "seconds": seconds,
        "teacher": of_teacher.figures,
        "before": before.figures,
        "after": after.figures,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page = report.write_report(
        out / "report.html", summary, run / "metrics.jsonl", report.pair_samples(before.samples, after.samples)
    )
    print(f"\n{scoreboard_table.comparison_table(summary)}\n\n{seconds['total']:.0f} s; report: {page}")


if __name__ == "__main__":
    main()
