"""Where figures go: the console, a file, TensorBoard, Weights & Biases.

In:  a flat dict of numbers per step. Out: one record of that step in each place. Not here: computing figures, and
secrets: the key of Weights & Biases is read from the environment by its own library and never from the config.
"""

import importlib
import json
import logging
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

import torch
from tqdm import tqdm

from verl.config.ppo import PPOConfig
from verl.utils.durable_files import write_durably
from verl.utils.redaction import redacted
from verl.utils.saved_config import public_dict

logger = logging.getLogger(__name__)

MAIN_FIGURES = (
    "distill/reverse_kl",
    "critic/rewards/mean",
    "actor/pg_loss",
    "response_length/mean",
    "distill/extend_seq_ratio",
    "timing_s/step",
    "val/reverse_kl",
    "val/reward",
)
"""What the console shows of a step, in this order, as far as the step has it."""

Figures = Mapping[str, float]


class Backend(Protocol):
    """A place that figures go to."""

    def truncate_after(self, step: int | None, figures: Figures | None) -> None:
        """What was recorded of later steps than this one is void: they will come again. None: all of it.

        ``figures`` are those of the step, for a record that a kill left without it; None: they are not known.
        """

    def log(self, data: Figures, step: int) -> None:
        """Record the figures of a step."""

    def finish(self) -> None:
        """Write out what is pending."""


class ConsoleBackend:
    """One line a step, written around a progress bar rather than through it."""

    def truncate_after(self, step: int | None, figures: Figures | None) -> None:
        """Nothing is recorded."""

    def log(self, data: Figures, step: int) -> None:
        """Write the main figures; all of them where none of the main ones is there."""
        names = [name for name in MAIN_FIGURES if name in data] or list(data)
        tqdm.write(" | ".join([f"step {step}", *(f"{name} {data[name]:.4g}" for name in names)]))

    def finish(self) -> None:
        """Nothing is pending."""


class FileBackend:
    """``metrics.jsonl``, a line ``{"step": N, "data": {...}}`` a step, appended to; NaN and infinity become null.

    Lines of steps that a resumed run takes again go to ``metrics_void.jsonl``, so that no step is there twice.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._stream = self._open()

    def truncate_after(self, step: int | None, figures: Figures | None) -> None:
        """Move the lines of later steps, and a line that a killed run left unfinished, out of the file; write that of
        the step where it is not there.
        """
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step is not None and _step_of(line) <= step]
        if kept != lines:
            self._keep(kept, [line for line in lines if step is None or _step_of(line) > step])
        if step is not None and figures and not any(_records(line, step, figures) for line in kept):
            logger.warning("%s lacked step %d, which the checkpoint has: its figures come from there", self._path, step)
            self.log(figures, step)

    def _keep(self, kept: Sequence[str], void: Sequence[str]) -> None:
        with open(self._path.with_name("metrics_void.jsonl"), "a", encoding="utf-8") as stream:
            stream.writelines(line if line.endswith("\n") else f"{line}\n" for line in void)
        write_durably(self._path, "".join(kept))
        self._stream.close()
        self._stream = self._open()

    def log(self, data: Figures, step: int) -> None:
        """Append a line and flush it: a run that dies keeps all steps. Where there is no room, it waits for the next
        step.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in data.items()}
        self._stream.write(json.dumps({"step": step, "data": finite}, allow_nan=False) + "\n")
        try:
            self._stream.flush()
        except OSError as error:  # what could not be written stays in the buffer
            logger.error("step %d is not yet in %s: %s", step, self._path, error)

    def finish(self) -> None:
        """Close the file."""
        self._stream.close()

    def _open(self) -> TextIO:
        return open(self._path, "a", encoding="utf-8")


def _records(line: str, step: int, figures: Figures) -> bool:
    """Whether a line holds the figures of a step; that of a validation alone does not."""
    return _step_of(line) == step and json.loads(line)["data"].keys() >= figures.keys()


def _step_of(line: str) -> float:
    """The step of a line; of one that was not finished, later than any."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf


class TensorboardBackend:
    """Event files in ``$TENSORBOARD_DIR`` or ``<local_dir>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._place = os.environ.get("TENSORBOARD_DIR") or str(folder / "tensorboard")
        self._writer = SummaryWriter(self._place)

    def truncate_after(self, step: int | None, figures: Figures | None) -> None:
        """Have readers pass over events of later steps. Those of the step are written anew where they are known,
        without the seconds of its save: a reader cannot be asked whether they were there.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer.close()
        first_void = 0 if step is None else step + (figures is None)
        self._writer = SummaryWriter(self._place, purge_step=first_void)
        if step is not None and figures is not None:
            self.log(figures, step)

    def log(self, data: Figures, step: int) -> None:
        """Record one scalar a figure, and flush them: a run that dies keeps all steps."""
        for name, value in data.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Write out pending events."""
        self._writer.close()


class WandbBackend:
    """A run in Weights & Biases; ``WANDB_MODE``, ``WANDB_API_KEY``, ``WANDB_DIR`` and the like work as usual.

    A run that resumes goes on in the run that it began, whose id ``wandb_run_id`` in its folder keeps. Of steps that
    are taken again the first record stays, and the second is dropped with a warning: there a step is written once.
    """

    def __init__(self, project: str, experiment: str, config: Mapping[str, Any], folder: Path) -> None:
        wandb: Any = _require("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        place = os.environ.get("WANDB_DIR") or str(folder)
        self._start = partial(wandb.init, project=project, name=experiment, config=dict(config), dir=place)
        self._id_file = folder / "wandb_run_id"
        self._run: Any = None

    def truncate_after(self, step: int | None, figures: Figures | None) -> None:
        """Open the run that was begun in this folder; a new one where there is none, or training starts afresh."""
        if step is not None and self._id_file.is_file():
            self._run = self._start(id=self._id_file.read_text(encoding="utf-8").strip(), resume="allow")
        else:
            self._run = self._start()
            write_durably(self._id_file, f"{self._run.id}\n")
        if step is not None and figures is not None:
            self.log(figures, step)

    def log(self, data: Figures, step: int) -> None:
        """Record the figures of a step; a program that continues nothing has a run of its own."""
        if self._run is None:
            self._run = self._start()
        self._run.log(dict(data), step=step)

    def finish(self) -> None:
        """Upload or save what is pending."""
        if self._run is not None:
            self._run.finish()


def _require(package: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"trainer.logger names {package}, which is not installed; install it or take it out of trainer.logger"
        ) from error


def as_numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """Figures as plain numbers, whole ones as they are.

    Raises:
        ValueError: a value is no single number.
    """
    return {name: _as_number(name, value) for name, value in data.items()}


def _as_number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise ValueError(f"the figure {name!r} is {value!r:.80}; loggers take single numbers")


class Tracking:
    """Sends the figures of each step to every configured place."""

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        default_backend: str | Sequence[str] = ("console",),
        config: PPOConfig | Mapping[str, Any] | None = None,
        local_dir: str | Path = ".",
    ) -> None:
        """Open every place.

        Args:
            project_name: project in Weights & Biases.
            experiment_name: run in it.
            default_backend: any of ``console``, ``file``, ``tensorboard``, ``wandb``.
            config: recorded by Weights & Biases, secrets replaced by ``***``.
            local_dir: folder of ``metrics.jsonl``, ``tensorboard/`` and ``wandb/``.

        Raises:
            ValueError: an unknown name, or a package that is not installed.
        """
        folder = Path(local_dir)
        settings = public_dict(config) if isinstance(config, PPOConfig) else redacted(dict(config or {}))
        openers: dict[str, Callable[[], Backend]] = {
            "console": ConsoleBackend,
            "file": lambda: FileBackend(folder),
            "tensorboard": lambda: TensorboardBackend(folder),
            "wandb": lambda: WandbBackend(project_name, experiment_name, settings, folder),
        }
        names = [default_backend] if isinstance(default_backend, str) else list(default_backend)
        unknown = [name for name in names if name not in openers]
        if unknown:
            raise ValueError(f"trainer.logger={names} names {unknown}; choose from {', '.join(openers)}")
        self._backends = [openers[name]() for name in dict.fromkeys(names)]

    @classmethod
    def of_run(cls, config: PPOConfig) -> "Tracking":
        """The places that a run's settings name, opened; raises as the class does."""
        run = config.trainer
        return cls(run.project_name, run.experiment_name, run.logger, config=config, local_dir=run.default_local_dir)

    def truncate_after(self, step: int | None, figures: Figures | None = None) -> None:
        """Continue behind a step that was recorded earlier, in this folder: what is there of later ones is void.

        Args:
            step: the step of the checkpoint; None: the run starts afresh.
            figures: of that step, for places that lack it because the run was killed in between; None: not known.
        """
        for backend in self._backends:
            backend.truncate_after(step, figures)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record the figures of a step everywhere.

        Args:
            data: name to a single number, of Python, numpy or torch.
            step: training step; must not fall from call to call (Weights & Biases drops what does).

        Raises:
            ValueError: a value is no single number.
        """
        figures = as_numbers(data)
        for backend in self._backends:
            backend.log(figures, step)

    def finish(self) -> None:
        """Close every place; nothing can be logged afterwards, and a second call does nothing."""
        for backend in self._backends:
            backend.finish()
        self._backends = []
