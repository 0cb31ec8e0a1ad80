"""Where metrics go: the console, a file, TensorBoard, Weights & Biases.

In:  a flat dict of numbers per step. Out: one record of that step in each place. Not here: computing metrics, and
secrets: the key of Weights & Biases is read from the environment by its own library and never from the config.
"""

import json
import logging
import math
import numbers
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from verl.config.ppo import PPOConfig
from verl.utils.durable_files import write_durably
from verl.utils.redaction import public_dict, redacted

logger = logging.getLogger(__name__)

MAIN_METRICS = (
    "distill/reverse_kl",
    "critic/rewards/mean",
    "actor/distill_loss",
    "response_length/mean",
    "distill/extend_seq_ratio",
    "timing_s/step",
    "val/reverse_kl",
    "val/reward",
)
"""What the console shows of a step, in this order, as far as the step has it."""

Metrics = Mapping[str, float]
Answers = Sequence[Mapping[str, Any]]


class LoggerError(RuntimeError):
    """A place that metrics go to cannot be opened; the message names it, the cause and what may help."""


class Backend(ABC):
    """A place that metrics go to."""

    def truncate_after(self, step: int | None, metrics: Metrics | None) -> None:  # noqa: B027 (nothing to do by default)
        """Drop records after ``step``, since a resumed run repeats those steps.

        Args:
            step: of the checkpoint; None: drop all records.
            metrics: of that step, which a killed run may not have recorded; None: unknown.
        """

    @abstractmethod
    def log(self, data: Metrics, step: int) -> None:
        """Record the metrics of a step."""

    def log_answers(self, answers: Answers, step: int) -> None:  # noqa: B027 (nothing to do by default)
        """Record some validation answers, which `rollout_dump.show_answers` describes."""

    def finish(self, summary: Mapping[str, str]) -> None:  # noqa: B027 (nothing to do by default)
        """Write out what is pending, and what is to be said about the whole run."""


class ConsoleBackend(Backend):
    """One line a step, written around a progress bar rather than through it."""

    def log(self, data: Metrics, step: int) -> None:
        """Write the main metrics, or all of them where none of the main ones is there."""
        names = [name for name in MAIN_METRICS if name in data] or list(data)
        tqdm.write(" | ".join([f"step {step}", *(f"{name} {data[name]:.4g}" for name in names)]))
        sys.stdout.flush()  # in a file or a pipe it would wait for 8 KiB


class FileBackend(Backend):
    """``metrics.jsonl``, a line ``{"step": N, "data": {...}}`` a step, appended to; NaN and infinity become null.

    Lines of steps that a resumed run takes again move to ``metrics_void.jsonl``, so that no step is there twice.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._stream, self._unwritten = self._open(), b""

    def _open(self) -> FileIO:
        return open(self._path, "ab", buffering=0)

    def truncate_after(self, step: int | None, metrics: Metrics | None) -> None:
        """Move later and unfinished lines out of the file; add the line of the step if it is missing."""
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step is not None and _step_of(line) <= step]
        if kept != lines:
            # Added there before they are cut here: a kill between the two doubles lines and loses none.
            with open(self._path.with_name("metrics_void.jsonl"), "a", encoding="utf-8") as stream:
                moved = [line for line in lines if step is None or _step_of(line) > step]
                stream.writelines(line if line.endswith("\n") else f"{line}\n" for line in moved)
            write_durably(self._path, "".join(kept))
            # The stream still writes to the file that was replaced.
            self._stream.close()
            self._stream = self._open()
        if step is None or not metrics:
            return
        # The line of a validation alone has the step's number and lacks its metrics.
        if not any(_step_of(line) == step and json.loads(line)["data"].keys() >= metrics.keys() for line in kept):
            logger.warning("%s lacked step %d; its metrics come from the checkpoint", self._path, step)
            self.log(metrics, step)

    def log(self, data: Metrics, step: int) -> None:
        """Append a line at once, so that a run that dies keeps all steps."""
        finite = {name: value if math.isfinite(value) else None for name, value in data.items()}
        self._unwritten += f"{json.dumps({'step': step, 'data': finite}, allow_nan=False)}\n".encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
        except OSError as error:  # the disk is full: the next step tries again
            logger.error("step %d is not yet in %s: %s", step, self._path, error)

    def finish(self, summary: Mapping[str, str]) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that was not finished."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf


class TensorboardBackend(Backend):
    """Event files in ``$TENSORBOARD_DIR`` or ``<local_dir>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, os.environ.get("TENSORBOARD_DIR") or str(folder / "tensorboard"))
        self._writer: Any = self._open()

    def truncate_after(self, step: int | None, metrics: Metrics | None) -> None:
        """Have readers skip events of later steps; write those of the step anew where its metrics are known."""
        self._writer.close()
        # Event files cannot be read back here, so a step whose metrics are known is purged too and written again.
        self._writer = self._open(purge_step=0 if step is None else step + (metrics is None))
        if step is not None and metrics is not None:
            self.log(metrics, step)

    @contextmanager
    def _writing(self, step: int) -> Iterator[Any]:
        """Give the writer, then flush, so that a run that dies keeps all steps; a full disk loses this step alone."""
        try:
            self._writer = self._writer or self._open()
            yield self._writer
            self._writer.flush()
        except OSError as error:  # a writer that failed raises it again each time
            logger.error("step %d is not in TensorBoard: %s", step, error)
            self._writer = None

    def log(self, data: Metrics, step: int) -> None:
        """Record one scalar a metric."""
        with self._writing(step) as writer:
            for name, value in data.items():
                writer.add_scalar(name, value, step)

    def log_answers(self, answers: Answers, step: int) -> None:
        """Record the answers as one text; it is shown as Markdown, in which indented lines stand as they are."""
        texts = [f"score {answer.get('score')}\n{answer['input']}{answer['output']}" for answer in answers]
        blocks = ["\n".join(f"    {line}" for line in text.splitlines()) for text in texts]
        with self._writing(step) as writer:
            writer.add_text("val/generations", "\n\n---\n\n".join(blocks), step)

    def finish(self, summary: Mapping[str, str]) -> None:
        """Write out pending events."""
        if self._writer is not None:
            self._writer.close()


class WandbBackend(Backend):
    """A run in Weights & Biases; ``WANDB_MODE``, ``WANDB_API_KEY``, ``WANDB_DIR`` and the like work as usual.

    A resumed run continues the run whose id stands in ``wandb_run_id`` of its folder. Weights & Biases keeps the first
    record of a step and drops later ones with a warning.
    """

    def __init__(self, project: str, experiment: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        place = os.environ.get("WANDB_DIR") or str(folder)
        self._init = partial(wandb.init, project=project, name=experiment, config=dict(config), dir=place)
        self._id_file = folder / "wandb_run_id"
        self._run: Any = None

    def _start(self, **which: Any) -> Any:
        try:
            return self._init(**which)
        except Exception as error:  # of its library, its service or its server
            raise LoggerError(
                f"trainer.logger has wandb, and Weights & Biases cannot start the run: {' '.join(str(error).split())}; "
                "run wandb login, or set WANDB_MODE=offline and upload the run later with wandb sync"
            ) from error

    def truncate_after(self, step: int | None, metrics: Metrics | None) -> None:
        """Open the run of this folder; a new one where there is none or training starts afresh."""
        if step is not None and self._id_file.is_file():
            self._run = self._start(id=self._id_file.read_text(encoding="utf-8").strip(), resume="allow")
        else:
            self._run = self._start()
            write_durably(self._id_file, f"{self._run.id}\n")
        if step is not None and metrics is not None:
            self.log(metrics, step)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record the metrics of a step; opens a new run where none was opened before."""
        if self._run is None:
            self._run = self._start()
        self._run.log(dict(data), step=step)

    def log_answers(self, answers: Answers, step: int) -> None:
        """Record a table ``val/generations`` of this step, whose outputs have coloured tokens."""
        from wandb import Html, Table

        rows = [[step, one["input"], Html(one["html"], inject=False), one.get("score")] for one in answers]
        self.log({"val/generations": Table(["step", "input", "output", "score"], rows)}, step)

    def finish(self, summary: Mapping[str, str]) -> None:
        """Upload or save what is pending, with a summary of the run."""
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish()


def as_numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of Python, numpy or torch as plain numbers; integers stay integers.

    Raises:
        ValueError: a value is no single number.
    """
    plain: dict[str, float] = {}
    for name, value in data.items():
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not isinstance(number, numbers.Real):
            raise ValueError(f"the metric {name!r} is {value!r:.80}; loggers take single numbers")
        plain[name] = int(number) if isinstance(number, numbers.Integral) else float(number)
    return plain


class Tracking:
    """Sends the metrics of each step to every configured place."""

    def __init__(
        self,
        project_name: str,
        experiment_name: str,
        default_backend: Sequence[str] = ("console",),
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
        """
        folder = Path(local_dir)
        settings = public_dict(config) if isinstance(config, PPOConfig) else redacted(dict(config or {}))
        openers: dict[str, Callable[[], Backend]] = {
            "console": ConsoleBackend,
            "file": lambda: FileBackend(folder),
            "tensorboard": lambda: TensorboardBackend(folder),
            "wandb": lambda: WandbBackend(project_name, experiment_name, settings, folder),
        }
        self._backends = [openers[name]() for name in dict.fromkeys(default_backend)]

    def truncate_after(self, step: int | None, metrics: Metrics | None = None) -> None:
        """See `Backend.truncate_after`, in every place."""
        for backend in self._backends:
            backend.truncate_after(step, metrics)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record the metrics of a step everywhere.

        Args:
            data: name to a single number, of Python, numpy or torch.
            step: training step; must not fall from call to call (Weights & Biases drops what does).

        Raises:
            ValueError: a value is no single number.
        """
        metrics = as_numbers(data)
        for backend in self._backends:
            backend.log(metrics, step)

    def log_answers(self, answers: Answers, step: int) -> None:
        """Show some validation answers where a place can: TensorBoard, Weights & Biases; before the step's metrics.

        Args:
            answers: see `rollout_dump.show_answers`.
        """
        for backend in self._backends:
            backend.log_answers(answers, step)

    def finish(self, summary: Mapping[str, str] | None = None) -> None:
        """Close every place; nothing can be logged afterwards, and a second call does nothing.

        Args:
            summary: what the run leaves, by name, for Weights & Biases.
        """
        for backend in self._backends:
            backend.finish(summary or {})
        self._backends = []
