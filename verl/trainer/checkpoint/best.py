"""Keeps the best checkpoint of a run, by the rule of ``trainer.best_metric``.

::

    validation ──► note: metrics into validations.json ──► better than all before? ──► the trainer saves it, due or not
    its checkpoint is in place ──► best/ ──► best_checkpointed_iteration.txt ──► pruning spares this checkpoint

    default_local_dir/
        validations.json                   metrics of every validation of the run, by step
        best_checkpointed_iteration.txt    step of the best checkpoint, written last
        best/best.json                     the rule, and the step's metrics and bounds
        best/huggingface/                  the best student, hard-linked to the files of the checkpoint
        best_void/                         what best/ was, of steps that a resumed run takes again

The best step follows from ``validations.json`` and the checkpoints on the disk, so it is found again after a kill at
any moment. The starting model is no candidate, for it exists already. Not here: the rule (``config.best_rule``).
"""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from verl.config import TrainerConfig
from verl.config.best_rule import KEY, BestRule, Metrics
from verl.trainer.checkpoint import layout
from verl.utils.durable_files import flush_tree, write_durably

logger = logging.getLogger(__name__)

RECORD, POINTER = "validations.json", "best_checkpointed_iteration.txt"
BEST, VOID, REASON = "best", "best_void", "best.json"


class BestMetricError(ValueError):
    """The rule names a metric that validation does not give."""


class BestCheckpoint:
    """The best checkpoint of a run so far; does nothing where ``trainer.best_metric`` is not set.

    Args:
        resume_from: the checkpoint that the run will continue from; None: it starts afresh.

    Raises:
        ValueError: the rule compares with step 0, and the run that is resumed did not record its metrics.
    """

    def __init__(self, config: TrainerConfig, resume_from: Path | None) -> None:
        self._config, self._root, self._resume_from = config, Path(config.default_local_dir), resume_from
        self._rule = BestRule.parse(config.best_metric) if config.best_metric and not config.val_only else None
        self._metrics: dict[int, dict[str, float]] = {}
        """Of every validation, by step."""
        self._saved: set[int] = set()
        """Steps whose checkpoints this run wrote, or the run that it continues."""
        self._pending: int | None = None
        """The best step, while its checkpoint is being written."""
        self._kept: int | None = None
        """The best step whose model is in place."""
        self._names_are_known = False
        if self._rule is None or resume_from is None:
            return
        start = _read_record(resume_from.absolute().parent).get(0, {})
        missing = [bound.name for bound in self._rule.constraints if math.isnan(bound.bound_for(start))]
        if missing:
            raise ValueError(
                f"{KEY}={self._rule.text!r} compares {', '.join(missing)} with step 0, and the run that is resumed "
                f"from {resume_from} did not record it in its {RECORD}; give the bound as a number, or start afresh "
                "(trainer.resume_mode=disable, or another trainer.default_local_dir)"
            )

    # ------------------------------------------------------------------ for the trainer

    def resume(self) -> None:
        """Load the record up to the checkpoint that the run continues from; archive ``best/`` of later steps."""
        if self._rule is None:
            return
        folder = self._resume_from
        if folder is not None:
            last = layout.checkpoint_step(folder)
            recorded = _read_record(folder.absolute().parent)
            self._metrics = {step: metrics for step, metrics in recorded.items() if step <= last}
            if layout.is_of_run(folder, self._root):
                steps = map(layout.checkpoint_step, layout.step_folders(self._root))
                self._saved = {step for step in steps if step <= last}
            else:
                self._archive_best()  # the best of another run, which had this folder before
        self._write_record()
        self._update_best(self._rule)

    def note(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Record a validation; returns step and value of the best one so far as metrics.

        Raises:
            BestMetricError: the first validation lacks a metric that the rule names.
        """
        rule = self._rule
        if rule is None:
            return {}
        if not self._names_are_known:
            try:
                rule.require_known(metrics)
            except ValueError as error:
                raise BestMetricError(str(error)) from error
            self._names_are_known = True
        # JSON has no NaN; a missing metric keeps no bound either.
        self._metrics[step] = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._write_record()
        if step in self._saved:  # the run resumed from it
            self._update_best(rule)
        elif step > 0 and self._is_better(rule, step, self._best):
            self._pending = step
            logger.info("step %d is the best so far: %s", step, self._describe_step(rule, step))
        if self._best is None:
            return {}
        return {"training/best_step": self._best, "training/best_value": rule.value(self._metrics[self._best])}

    def is_new(self, step: int) -> bool:
        """Whether a step is the best one and has no checkpoint yet."""
        return self._pending == step

    def gives_up(self) -> bool:
        """Whether the last ``trainer.stop_after_no_better`` validations were no better; logs it."""
        patience, best = self._config.stop_after_no_better, self._best or 0
        since = sum(step > best for step in self._metrics)
        if patience is None or since < patience:
            return False
        logger.warning("stopping early: %d validations without a better one%s", since, self.describe())
        return True

    def describe(self) -> str:
        """A clause about the best checkpoint, to append to a message."""
        if self._rule is None:
            return ""
        if self._kept is None:
            return f", no checkpoint met {KEY}"
        return f", best {layout.step_folder(self._root, self._kept)} ({self._describe_step(self._rule, self._kept)})"

    # ------------------------------------------------------------------ for the saver

    def checkpoint_ended(self, step: int, *, in_place: bool) -> None:
        """A checkpoint was published, or could not be written."""
        if self._rule is None:
            return
        if step == self._pending:
            self._pending = None
        if in_place:
            self._saved.add(step)
            self._update_best(self._rule)

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints must stay: the best one, and the one of the pointer, which a full disk may delay."""
        return {step for step in (self._kept, self._pointer()) if step is not None} if self._rule else set()

    # ------------------------------------------------------------------ choosing

    @property
    def _best(self) -> int | None:
        return self._kept if self._pending is None else self._pending

    def _is_better(self, rule: BestRule, step: int, than: int | None) -> bool:
        """Whether a step keeps all bounds and is strictly better than another one; of equals the first stays."""
        metrics, start = self._metrics[step], self._metrics.get(0, {})
        return rule.qualifies(metrics, start) and (than is None or rule.is_better(metrics, self._metrics[than]))

    def _describe_step(self, rule: BestRule, step: int) -> str:
        return rule.describe(self._metrics[step], self._metrics.get(0, {}))

    def _update_best(self, rule: BestRule) -> None:
        """Choose the best step that has a whole checkpoint, or its model in ``best/``; write ``best/`` and pointer.

        A full disk is logged, and the next checkpoint tries again.
        """
        exported = _read_json(self._root / BEST / REASON).get("step")
        self._kept = None
        for step in sorted(self._metrics):
            if self._is_better(rule, step, self._kept) and (
                step == exported or (step in self._saved and not layout.find_faults(self._folder(step)))
            ):
                self._kept = step
        try:
            if self._kept is None:
                self._archive_best()
                return
            if exported != self._kept:
                self._export_best(rule, self._kept)
            if self._pointer() != self._kept:
                write_durably(self._root / POINTER, f"{self._kept}\n")
        except OSError as error:
            logger.error("the best checkpoint, of step %s, cannot be named in %s: %s", self._kept, self._root, error)

    # ------------------------------------------------------------------ files

    def _folder(self, step: int) -> Path:
        return layout.step_folder(self._root, step)

    def _export_best(self, rule: BestRule, step: int) -> None:
        """Write ``best/`` beside, then put it into place."""
        export, beside = self._folder(step) / layout.EXPORT, self._root / f"{BEST}{layout.UNFINISHED}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        if export.is_dir():
            shutil.copytree(export, beside / "huggingface", copy_function=_link_or_copy)
        else:
            logger.warning("%s is gone: best/ has no model", export)
        reason = {
            "step": step,
            "checkpoint": self._folder(step).name,
            "rule": rule.text,
            "value": rule.value(self._metrics[step]),
            "reason": self._describe_step(rule, step),
            "metrics": self._metrics[step],
            "metrics_of_step_0": self._metrics.get(0, {}),
        }
        (beside / REASON).write_text(json.dumps(reason, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        flush_tree(beside)
        layout.replace_folder(beside, self._root / BEST)

    def _archive_best(self) -> None:
        """Rename ``best/`` of another run, or of steps that are taken again, to ``best_void/``."""
        (self._root / POINTER).unlink(missing_ok=True)
        if (self._root / BEST).exists():
            logger.warning("%s is no longer the best of this run; it is %s now", self._root / BEST, VOID)
            layout.replace_folder(self._root / BEST, self._root / VOID)

    def _pointer(self) -> int | None:
        pointer = self._root / POINTER
        text = pointer.read_text().strip() if pointer.is_file() else ""
        return int(text) if text.isdecimal() else None

    def _write_record(self) -> None:
        record = {str(step): metrics for step, metrics in sorted(self._metrics.items())}
        try:
            write_durably(self._root / RECORD, json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.error("the metrics of the last validation are not in %s: %s", self._root / RECORD, error)


def _read_record(root: Path) -> dict[int, dict[str, float]]:
    """Metrics of the validations in a run folder, by step."""
    return {int(step): metrics for step, metrics in _read_json(root / RECORD).items()}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, or damaged, which is logged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s is damaged (%s) and is ignored", path, error)
        return {}


def _link_or_copy(source: str, target: str) -> None:
    """A hard link takes no room; some file systems have none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
