"""Which of a run's GPUs to give to engines of their own, from what the run has measured.

In: a run's folder, with ``metrics.jsonl`` and ``config.yaml``, of ``trainer.max_staleness`` 0 or 1. Out: the seconds of
a step for each split, side by side and one after the other. With medians over the steps, ``e`` and ``t`` the GPUs of
engines and training::

    generation  tail + (generation - tail) x GPUs that generated / e        tail: longest answer - mean answer
    training    training x GPUs that trained / t
    a step      the longer of both + weight sync

The tail is what no GPU shortens: few answers are still being written, and most engines have nothing to do.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from verl.viewer.run_data import read_curves

ANSWERS = "timing_s/agent_loop/generate_sequences"


class Split(NamedTuple):
    """GPUs of both, and expected seconds."""

    engines: int
    training: int
    generation_s: float
    training_s: float
    step_s: float


class Measured(NamedTuple):
    """Medians of a run's steps, in seconds, and the GPUs that they were measured on."""

    generation: float
    tail: float
    training: float
    sync: float
    engines: int
    ranks: int
    is_split: bool

    @property
    def gpus(self) -> int:
        """All of the run, without those of a teacher."""
        return self.ranks + self.engines * self.is_split

    def on(self, engines: int, training: int) -> Split:
        """What to expect of so many GPUs for engines and so many for training, which work side by side."""
        generation_s = self.tail + (self.generation - self.tail) * self.engines / engines
        training_s = self.training * self.ranks / training
        return Split(engines, training, generation_s, training_s, max(generation_s, training_s) + self.sync)

    @property
    def in_turns_s(self) -> float:
        """A step in which all GPUs generate and then train."""
        split = self.on(self.gpus, self.gpus)
        return split.generation_s + split.training_s + self.sync


def measure(folder: Path) -> tuple[Measured, list[Split]]:
    """What a run measured, and the splits of its GPUs that its settings allow.

    Raises:
        ValueError: the folder has no metrics or settings of a run, or there is nothing to split.
    """
    try:
        return _measure(folder)
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        files = (
            f"metrics.jsonl or config.yaml of --run={folder} is of another version ({type(error).__name__}: {error})"
        )
        raise ValueError(f"{files}; give the folder of a run by this one") from error


def _measure(folder: Path) -> tuple[Measured, list[Split]]:
    curves, settings = read_curves(folder / "metrics.jsonl"), folder / "config.yaml"
    if "timing_s/step" not in curves or not settings.is_file():
        raise ValueError(f"--run={folder} needs metrics.jsonl with steps, and config.yaml: of trainer.logger=[file]")

    def median(name: str) -> float:
        values = [value for value in curves.get(name, ([], []))[1] if value is not None]
        return statistics.median(values[1:] or values or [0.0])  # the first step has what happens once

    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    run, models = config["trainer"], config["actor_rollout_ref"]
    if (ahead := run["max_staleness"]) > 1:
        what = f"batches of trainer.max_staleness={ahead} are written side by side, so none has times of its own"
        raise ValueError(f"--run={folder}: {what}; measure a run with 0 or 1")
    ranks, apart = run["nnodes"] * run["n_gpus_per_node"], run["rollout_n_gpus_per_node"]
    engines = run["rollout_nnodes"] * apart if apart else ranks
    longest, is_ahead = median(f"{ANSWERS}/max"), ahead > 0
    # Beside training, its stage has the waiting alone, and so has the sync.
    waited = median("rollout/wait_s") if is_ahead else median("timing_s/gen")
    sync = max(0.0, median("timing_s/update_weights") - waited * is_ahead)
    generation = longest if is_ahead else waited
    tail = min(generation, longest - median(f"{ANSWERS}/mean"))
    training = median("timing_s/step") - waited - sync
    measured = Measured(generation, tail, training, sync, engines, ranks, bool(apart))
    rows = models["actor"]["ppo_mini_batch_size"] * models["rollout"]["n"]
    # Over several nodes, whole ones.
    unit = models["rollout"]["tensor_model_parallel_size"] if run["nnodes"] == 1 else run["n_gpus_per_node"]
    group = models["actor"]["ulysses_sequence_parallel_size"]
    choices = [(number, measured.gpus - number) for number in range(unit, measured.gpus, unit)]
    # Groups are whole, and rows divide over them.
    fitting = [choice for choice in choices if choice[1] % group == 0 and rows % (choice[1] // group) == 0]
    if not fitting:
        over = f"over groups of {group}" if group > 1 else "over the training GPUs"
        raise ValueError(f"--run={folder}: {measured.gpus} GPU(s) cannot be split so that {rows} rows divide {over}")
    return measured, [measured.on(*choice) for choice in fitting]
