"""Where the time of a step goes, stage by stage, beside programs that do nothing but the stage's work.

::

    python benchmarks/stages.py [--shape tiny] [--objective exact] [--steps 13] [--warmup 3] [-- HYDRA_OVERRIDES]

=============  ========================================================================================================
this project   the normal entry point; its processes note when they work (``spans``)
generation     vLLM's ``LLMEngine`` alone: the same engine and sampling options, prompts of the same lengths
scoring and    transformers' models in one process with all cores: rows of the same lengths end to end, the same
update         attention and loss functions, the same optimizer; no Ray, no FSDP
weight sync    one copy of the student's weights
=============  ========================================================================================================

The bare programs run before the project and again after it, since a machine is rarely as fast later as before. Prints a
table of medians over the steps after the warm-up, and one JSON document as the last line. ``driver and dispatch`` is
the share of a step in which no rank and no engine was at work. Look at ratios, and at CPU seconds on a busy machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from against_trl import LEARNING_RATE, PROMPT_WORDS, RESPONSE_TOKENS, SHAPES, our_run, write_models
from spans import FOLDER, Span, cpu_seconds, read_spans, seconds_covered

STAGES = {
    "generation": ("gen", "generate"),
    "student's log-probs": ("old_log_prob", "actor.compute_log_prob"),
    "teacher's log-probs": ("ref", "ref.compute_ref_log_prob"),
    "update": ("update_actor", "actor.update_actor"),
    "weight sync": ("update_weights", "weight"),
}
"""The stage's name in ``timing_s/*``, and what its calls have in their names."""
Times = dict[str, list[float]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="models and prompts a step (against_trl.py)")
    parser.add_argument("--objective", choices=("exact", "sampled"), default="exact", help="of the distillation")
    parser.add_argument("--steps", type=int, default=13, help="training steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of this project's side, after --")
    args = parser.parse_args()
    if args.steps <= args.warmup:
        parser.error(f"--steps {args.steps} must be more than --warmup {args.warmup}")
    return args


# ------------------------------------------------------------------ the bare programs, each in a process of its own


def timed(times: Times, name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; its wall and CPU seconds are added to ``times``."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    result = work()
    times.setdefault(name, []).append(time.perf_counter() - begin)
    times.setdefault(f"{name}, cpu", []).append(time.process_time() - cpu_begin)
    return result


class BareEngine:
    """vLLM's ``LLMEngine`` alone, with the engine options of a replica and all cores.

    Args:
        response_tokens: of the longest answer.
    """

    def __init__(self, models: Path, response_tokens: int) -> None:
        from verl.config import HFModelConfig, RolloutConfig
        from verl.workers.rollout import vllm_settings
        from verl.workers.rollout.replica import read_model_info

        rollout = RolloutConfig(prompt_length=2 * PROMPT_WORDS, response_length=response_tokens)
        model = HFModelConfig(path=str(models / "student"))
        # Before vLLM is imported.
        os.environ.update(vllm_settings.engine_environment(rollout, "cpu"))
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = vllm_settings.engine_arguments(rollout, model, read_model_info(model), 0, "cpu")
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._sampling_params = vllm_settings.vllm_sampling_params

    def generate(self, step: int, lengths: Sequence[int]) -> list[float]:
        """Answer a prompt for each of ``lengths`` with so many tokens; seconds until each of them ended, in order."""
        from verl.workers.rollout.replica import SamplingOptions

        begin, ends = time.perf_counter(), []
        for row, length in enumerate(lengths):
            # As `against_trl.prompts`, whose words are ids.
            prompt = [2 + (31 * row + 7 * word) % 9_000 for word in range(PROMPT_WORDS)]
            options = SamplingOptions(length, seed=step * len(lengths) + row, ignore_eos=True)
            request = {"type": "token", "prompt_token_ids": prompt}
            self._engine.add_request(f"{step}-{row}", request, self._sampling_params(options))
        while self._engine.has_unfinished_requests():
            ends += [time.perf_counter() - begin for _ in self._engine.step()]
        self._engine.reset_prefix_cache()  # as a weight sync does
        return ends


def bare_generation(args: argparse.Namespace, models: Path) -> Times:
    """vLLM alone."""
    engine, times = BareEngine(models, RESPONSE_TOKENS), Times()
    for step in range(args.steps):
        timed(times, "generation", lambda step=step: engine.generate(step, [RESPONSE_TOKENS] * SHAPES[args.shape][0]))
    return times


def bare_training(args: argparse.Namespace, models: Path) -> Times:
    """PyTorch alone: scoring and the update of either objective, and a copy of the weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from verl.ops.attention import PACKED_SDPA
    from verl.ops.linear_divergence import DivergenceOptions, linear_divergence
    from verl.ops.linear_log_prob import LinearLogProbs, linear_token_stats, score_tokens

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    count, ids = SHAPES[args.shape]
    rows = torch.randint(2, ids, (count, PROMPT_WORDS + RESPONSE_TOKENS))
    # A row ends with the token that predicts its last one.
    length, labels = rows.shape[1] - 1, rows[:, PROMPT_WORDS:].flatten()
    inputs = {"input_ids": rows[:, :-1].reshape(1, -1), "position_ids": torch.arange(length).repeat(count)[None]}
    inputs |= {"row_lengths": (length,) * count, "use_cache": False}
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": PACKED_SDPA, "trust_remote_code": False}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / role, **options) for role in ("student", "teacher")
    )
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    weights = torch.full(labels.shape, 1 / len(labels))

    def hidden(model: Any) -> torch.Tensor:
        states = model.get_decoder()(**inputs).last_hidden_state
        return states.view(count, length, -1)[:, PROMPT_WORDS - 1 :].flatten(0, 1)

    @torch.no_grad()
    def distribution() -> LinearLogProbs:
        return LinearLogProbs(hidden(teacher), teacher.lm_head.weight, ids)

    @torch.no_grad()
    def old_log_prob() -> None:
        linear_token_stats(hidden(student), student.lm_head.weight, labels, with_entropy=True)

    def update() -> None:
        head = student.lm_head.weight
        if args.objective == "exact":
            reverse_kl, of_teacher = DivergenceOptions(support="full"), distribution()
            loss, _ = linear_divergence(hidden(student), head, weights, of_teacher, reverse_kl, labels)
        else:
            loss = -(weights * linear_token_stats(hidden(student), head, labels).log_probs).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = Times()
    for _ in range(args.steps):
        if args.objective == "sampled":
            timed(times, "student's log-probs", old_log_prob)
            timed(times, "teacher's log-probs", lambda: score_tokens(distribution(), labels, 0.0))
        timed(times, "update", update)
        timed(times, "weight sync", lambda: [parameter.detach().clone() for parameter in student.parameters()])
    return times


BARE = {"generation": bare_generation, "training": bare_training}


def run_bare(args: argparse.Namespace, models: Path) -> Times:
    """Both bare programs, one after the other; the counted rounds."""
    times = Times()
    for name in BARE:
        out = models / f"{name}.json"
        command = [sys.executable, __file__, "--shape", args.shape, "--objective", args.objective]
        command += ["--steps", str(args.steps), "--warmup", str(args.warmup), "--bare", name, str(models), str(out)]
        # Threads that spin while they wait would be another program than ours, whose processes share the cores.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        times |= {stage: seconds[args.warmup :] for stage, seconds in json.loads(out.read_text()).items()}
    return times


# ------------------------------------------------------------------ this project


def steps_of(spans: Sequence[Span]) -> Iterator[tuple[Span, list[Span]]]:
    """Each step, and the calls of ranks and engines in it."""
    for step in (span for span in spans if span.name == "train_step"):
        inside = [span for span in spans if step.begin <= span.begin and span.end <= step.end]
        yield step, [span for span in inside if span.name not in ("train_step", "generate_sequences")]


def run_ours(args: argparse.Namespace, models: Path) -> Times:
    """Seconds of each counted step: by stage as the driver sees them, and in which a rank or an engine was at work."""
    with tempfile.TemporaryDirectory(prefix="stages_spans_") as folder:
        overrides = [f"actor_rollout_ref.model.external_lib={Path(__file__).with_name('spans.py')}"]
        overrides += [f"algorithm.distill.objective={args.objective}", *args.overrides]
        lines = our_run(models, SHAPES[args.shape][0], args.steps, overrides, {FOLDER: folder})
        steps = list(steps_of(read_spans(Path(folder))))
    times = Times()

    def add(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    for line, (step, calls) in list(zip(lines, steps, strict=True))[args.warmup :]:
        for stage, (timer, part) in STAGES.items():
            of_stage = [call for call in calls if part in call.name]
            if of_stage:
                add(stage, line[f"timing_s/{timer}"])
                add(f"{stage}, at work", seconds_covered(of_stage))
                add(f"{stage}, cpu", cpu_seconds(of_stage))
        add("step", step.end - step.begin)
        add("step, cpu", cpu_seconds(calls))
        add("driver and dispatch", 1 - seconds_covered(calls) / (step.end - step.begin))
    return times


def main() -> None:
    args = parse_args()
    if args.bare:
        name, models, out = args.bare
        Path(out).write_text(json.dumps(BARE[name](args, Path(models))))
        return
    with tempfile.TemporaryDirectory(prefix="stages_models_") as name:
        write_models(args.shape, Path(name))
        before, ours, after = run_bare(args, Path(name)), run_ours(args, Path(name)), run_bare(args, Path(name))
    bare = {stage: statistics.median(seconds + after[stage]) for stage, seconds in before.items()}
    medians = {stage: statistics.median(seconds) for stage, seconds in ours.items()}
    print(f"\n{'stage':<22}{'ours, s':>9}{'at work':>9}{'cpu':>9}{'bare, s':>9}{'cpu':>9}{'bare / ours':>13}")
    for stage in (stage for stage in STAGES if stage in medians):
        values = [medians[stage], medians[f"{stage}, at work"], medians[f"{stage}, cpu"]]
        values += [bare[stage], bare[f"{stage}, cpu"]]
        print(f"{stage:<22}" + "".join(f"{value:>9.3f}" for value in values) + f"{bare[stage] / medians[stage]:>13.2f}")
    print(f"{'step':<22}{medians['step']:>9.3f}{'':>9}{medians['step, cpu']:>9.3f}")
    print(f"driver and dispatch: {medians['driver and dispatch']:.1%} of a step")
    about = {"shape": args.shape, "objective": args.objective, "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({**about, "ours": medians, "bare": bare}))


if __name__ == "__main__":
    main()
