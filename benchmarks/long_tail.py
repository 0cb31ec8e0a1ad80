"""Answers of very different lengths: how long does a step generate with less than half of its rows?

::

    python benchmarks/long_tail.py [--rows 32] [--median 64] [--sigma 1.0] [--longest 512] [--steps 8] [--warmup 3]
    python benchmarks/long_tail.py --oversample 1 1.25 1.5 2 --rows 64 --median 100 --longest 2000 --steps 30

With ``--oversample`` engines write nothing, but take a millisecond for a token (``sleeping_engines``): how long steps
take that ask more prompts and carry on those whose answers had not ended (``rollout.oversample``), for as many trained
tokens.

The lengths are log-normal, as those of chat models are. Without ``--oversample`` they are the same on two sides: this
project's entry point, with an agent loop of its own that gives each answer its budget of tokens, and vLLM's
``LLMEngine`` alone (``stages``). Prints a table of medians over the steps after the warm-up (of means with it), and
one JSON document as the last line.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPE = "LONG_TAIL"
"""Environment variable with median, sigma and longest length, for the agent loop."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="prompts a step")
    parser.add_argument("--median", type=float, default=64, help="tokens of the median answer")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the logarithm of the length")
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest answer")
    parser.add_argument("--steps", type=int, default=8, help="training steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--oversample", nargs="+", type=float, help="of sleeping engines; the first is compared with")
    parser.add_argument("--bare", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of this project's side, after --")
    args = parser.parse_args()
    if args.steps <= args.warmup:
        parser.error(f"--steps {args.steps} must be more than --warmup {args.warmup}")
    return args


def answer_length(row: int) -> int:
    """Tokens of the answer to row ``row`` of the data."""
    median, sigma, longest = map(float, os.environ[SHAPE].split(","))
    return max(1, min(int(longest), round(random.Random(row).lognormvariate(math.log(median), sigma))))


def register_loop() -> None:
    """In an agent-loop worker: a loop whose answers have their own lengths."""
    from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, register

    @register("long_tail")
    class LongTail(AgentLoopBase):
        async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
            trajectory = self.start(row, with_tools=False)
            trajectory.remaining_tokens = answer_length(int(row["index"]))
            await self.write_turn(trajectory, sampling_params)
            return self.finish(trajectory, num_turns=2)


def measure(ends: Sequence[float], tokens: int) -> dict[str, float]:
    """Of one step, from the seconds until each answer ended."""
    in_order = sorted(ends)
    half = in_order[len(in_order) // 2]  # from here on, less than half of the rows are running
    return {"seconds": in_order[-1], "tail_share": 1 - half / in_order[-1], "tokens_per_s": tokens / in_order[-1]}


def run_ours(args: argparse.Namespace, models: Path) -> list[dict[str, float]]:
    """Each counted step of this project."""
    from against_trl import our_run
    from spans import FOLDER, read_spans

    with tempfile.TemporaryDirectory(prefix="long_tail_spans_") as folder:
        modules = ",".join(str(Path(__file__).with_name(name)) for name in ("spans.py", "long_tail.py"))
        overrides = [
            f"actor_rollout_ref.model.external_lib=[{modules}]",
            "actor_rollout_ref.rollout.agent.default_agent_loop=long_tail",
            f"data.max_response_length={args.longest}",
            "data.shuffle=False",
        ]
        our_run(models, args.rows, args.steps, [*overrides, *args.overrides], {FOLDER: folder})
        spans = read_spans(Path(folder))
    measured = []
    for number, step in enumerate(span for span in spans if span.name == "train_step"):
        calls = [
            span for span in spans if span.name == "generate" and step.begin <= span.begin and span.end <= step.end
        ]
        tokens = sum(answer_length(number * args.rows + row) for row in range(args.rows))
        measured.append(measure([call.end - calls[0].begin for call in calls], tokens))
    return measured[args.warmup :]


def run_bare(args: argparse.Namespace, models: Path) -> list[dict[str, float]]:
    """Each counted step of vLLM alone, in a process of its own."""
    out = models / "bare.json"
    command = [sys.executable, __file__, "--rows", str(args.rows), "--steps", str(args.steps)]
    command += ["--longest", str(args.longest), "--bare", str(models), str(out)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as all of this project's processes have it
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return json.loads(out.read_text())[args.warmup :]


def bare_steps(args: argparse.Namespace) -> list[dict[str, float]]:
    """Every step of vLLM alone, in this process."""
    from stages import BareEngine

    engine, measured = BareEngine(args.bare[0], args.longest), []
    for step in range(args.steps):
        lengths = [answer_length(step * args.rows + row) for row in range(args.rows)]
        measured.append(measure(engine.generate(step, lengths), sum(lengths)))
    return measured


def oversampled(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By value of ``rollout.oversample``, means over the counted steps on sleeping engines."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.sleeping_engines import Steps

    lengths, report = [answer_length(row) for row in range(args.rows * (args.steps + 2))], dict[str, dict[str, float]]()
    for value in args.oversample:
        steps = Steps(lengths, args.rows, asyncio.new_event_loop(), token_s=1e-3, oversample=value)
        taken = list(steps.take(args.steps))[args.warmup :]
        tokens, seconds = sum(sum(step.lengths) for step in taken), sum(step.seconds for step in taken)
        report[f"{value:g}"] = {
            "step_s": seconds / len(taken),
            "s_per_1000_tokens": 1000 * seconds / tokens,
            "answer_tokens": tokens / (args.rows * len(taken)),
            "carried": statistics.mean(step.metrics.get("rollout/carried", 0.0) for step in taken),
            "staleness": statistics.mean(step.metrics.get("staleness/mean", 0.0) for step in taken),
        }
        steps.manager.shutdown()
    return report


def print_oversampled(args: argparse.Namespace) -> None:
    report = oversampled(args)
    first = next(iter(report.values()))["s_per_1000_tokens"]
    names = "step, s", "s/1000 tokens", "less", "answer", "carried", "stale"
    print(f"\n{'oversample':<12}" + "".join(f"{name:>15}" for name in names))
    for value, of in report.items():
        of["less"] = 1 - of["s_per_1000_tokens"] / first
        print(
            f"{value:<12}{of['step_s']:>15.3f}{of['s_per_1000_tokens']:>15.4f}{of['less']:>15.0%}"
            f"{of['answer_tokens']:>15.1f}{of['carried']:>15.1f}{of['staleness']:>15.2f}"
        )
    shape = {"rows": args.rows, "median": args.median, "sigma": args.sigma, "longest": args.longest}
    print(json.dumps(shape | {"oversample": report}))


def main() -> None:
    args = parse_args()
    if args.oversample:
        os.environ[SHAPE] = f"{args.median},{args.sigma},{args.longest}"
        print_oversampled(args)
        return
    if args.bare:
        args.bare[1].write_text(json.dumps(bare_steps(args)))
        return
    from against_trl import write_models

    os.environ[SHAPE] = f"{args.median},{args.sigma},{args.longest}"
    with tempfile.TemporaryDirectory(prefix="long_tail_models_") as name:
        write_models("tiny", Path(name))
        bare = run_bare(args, Path(name))
        sides = {"ours": run_ours(args, Path(name))}
        sides["bare vLLM"] = bare + run_bare(args, Path(name))
    report = {
        side: {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        for side, steps in sides.items()
    }
    print(f"\n{'side':<12}{'generation, s':>15}{'tokens/s':>10}{'below half of the rows':>25}")
    for side, of_side in report.items():
        print(f"{side:<12}{of_side['seconds']:>15.3f}{of_side['tokens_per_s']:>10.0f}{of_side['tail_share']:>25.0%}")
    print(
        json.dumps({"rows": args.rows, "median": args.median, "sigma": args.sigma, "longest": args.longest, **report})
    )


if __name__ == "__main__":
    main()
elif SHAPE in os.environ:
    register_loop()
