"""Keeps the best checkpoint of a run, by the rule of ``trainer.best_metric``.

::

    validation ──► note: figures into validations.json ──► better than all before? ──► the trainer saves it, due or not
    its checkpoint is in place ──► best/ ──► best_checkpointed_iteration.txt ──► older checkpoints may go, this one not

    default_local_dir/
        validations.json                   figures of every validation of the run, by step
        best_checkpointed_iteration.txt    step of the best checkpoint, written last
        best/best.json                     why: the rule, its figures, the bounds
        best/huggingface/                  the best student, sharing its files with the checkpoint
        best_void/                         what best/ was, of steps that a resumed run takes again

The best is a function of the record and of the checkpoints on the disk, and is found again after a kill at any instant.
What a resumed run takes again is forgotten first. The starting model is no candidate: it is there already.
Not here: the rule (``verl.config.best_rule``), writing checkpoints (``checkpoint_saver``), deleting them.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.config import TrainerConfig
from verl.config.best_rule import KEY, BestRule, Metrics
from verl.trainer.checkpoint import layout as checkpoint
from verl.trainer.checkpoint.manifest import EXPORT, find_faults
from verl.utils.durable_files import flush_tree, write_durably

logger = logging.getLogger(__name__)

RECORD = "validations.json"
POINTER = "best_checkpointed_iteration.txt"
BEST, VOID, WHY = "best", "best_void", "best.json"


class BestMetricError(ValueError):
    """The rule names what validation does not give."""


class BestCheckpoint:
    """The best checkpoint of a run so far; does nothing where ``trainer.best_metric`` is not set.

    Raises:
        ValueError: the run resumes, and the figures of step 0 that the rule compares with were not recorded.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._config, self._root = config, Path(config.default_local_dir)
        wanted = config.best_metric and not config.val_only
        self._rule = BestRule.parse(str(config.best_metric)) if wanted else None
        self._figures: dict[int, dict[str, float]] = {}
        self._in_place: set[int] = set()
        """Steps whose checkpoints were written by this run or those it goes on from."""
        self._saving: int | None = None
        """The best step, while its checkpoint is not yet in place."""
        self._kept: int | None = None
        """The best step in place."""
        self._seen_names = False
        if self._rule is not None and self._rule.names_of_start:
            self._require_start(self._rule)

    # ------------------------------------------------------------------ what the trainer tells and asks

    def truncate_after(self, step: int | None) -> None:
        """Continue behind a step, whose checkpoint the run resumed from; None: the run starts afresh."""
        if self._rule is None:
            return
        folder = None if step is None else checkpoint.find_checkpoint(self._config)
        self._figures, self._in_place = {}, set()
        if folder is not None and step is not None:
            recorded = _read_record(folder)
            self._figures = {number: figures for number, figures in recorded.items() if number <= step}
            if folder.resolve().parent == self._root.resolve():
                there = map(checkpoint.checkpoint_step, checkpoint.step_folders(self._root))
                self._in_place = {number for number in there if number <= step}
            else:
                self._archive_best()  # the best of another run, which had this folder before
        self._write_record()
        self._settle(self._rule)

    def note(self, step: int, figures: Metrics) -> dict[str, float]:
        """Judge a validation; the step and value of the best one so far as metrics.

        Raises:
            BestMetricError: the first validation does not give what the rule names.
        """
        rule = self._rule
        if rule is None:
            return {}
        if not self._seen_names:
            try:
                rule.require_known(figures)
            except ValueError as error:
                raise BestMetricError(str(error)) from error
            self._seen_names = True
        # JSON knows no NaN; a figure that is none is missing, and keeps no bound.
        self._figures[step] = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        self._write_record()
        if step in self._in_place:  # the run resumed from it
            self._settle(rule)
        elif self._is_best(rule, step):
            self._saving = step
            logger.info("step %d is the best so far: %s", step, self._told(rule, step))
        best = self._best
        return {} if best is None else {"training/best_step": best, "training/best_value": self._value(rule, best)}

    def is_new(self, step: int) -> bool:
        """Whether a step is the best one and has no checkpoint yet."""
        return self._saving == step

    def gives_up(self) -> bool:
        """Whether ``trainer.stop_after_no_better`` validations in a row were no better; says so."""
        patience, best = self._config.stop_after_no_better, self._best or 0
        since = sum(step > best for step in self._figures)
        if patience is None or since < patience:
            return False
        logger.warning("stopping early: %d validations without a better one%s", since, self.describe())
        return True

    def describe(self) -> str:
        """Where the best checkpoint is, in words that go behind others."""
        if self._rule is None:
            return ""
        if self._kept is None:
            return f", no checkpoint met {KEY}"
        return f", best {checkpoint.step_folder(self._root, self._kept)} ({self._told(self._rule, self._kept)})"

    # ------------------------------------------------------------------ what the saver tells and asks

    def checkpoint_ended(self, step: int, *, in_place: bool) -> None:
        """A checkpoint is in place, or could not be written."""
        if self._rule is None:
            return
        if step == self._saving:
            self._saving = None
        if in_place:
            self._in_place.add(step)
            self._settle(self._rule)

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints must not be deleted: the best, and the one that the pointer names, if it is another
        because the disk was full.
        """
        return {step for step in (self._kept, self._pointed()) if step is not None} if self._rule else set()

    # ------------------------------------------------------------------ judging

    @property
    def _best(self) -> int | None:
        return self._kept if self._saving is None else self._saving

    @property
    def _start(self) -> Metrics:
        return self._figures.get(0, {})

    def _value(self, rule: BestRule, step: int) -> float:
        return rule.value(self._figures[step])

    def _told(self, rule: BestRule, step: int) -> str:
        return rule.describe(self._figures[step], self._start)

    def _is_best(self, rule: BestRule, step: int) -> bool:
        if step == 0 or not rule.qualifies(self._figures[step], self._start):
            return False
        return self._best is None or rule.is_better(self._figures[step], self._figures[self._best])

    def _best_in_place(self, rule: BestRule) -> int | None:
        """Of the steps that keep all bounds and have a whole checkpoint, or whose model is in ``best/``, the best; of
        equals the first.
        """
        handed_out = self._handed_out()
        there = [step for step in sorted(self._figures) if step in self._in_place or step == handed_out]
        able = [step for step in there if rule.qualifies(self._figures[step], self._start)]
        able.sort(key=lambda step: self._value(rule, step), reverse=rule.maximise)  # stable, reversed or not
        return next(
            (s for s in able if s == handed_out or not find_faults(checkpoint.step_folder(self._root, s))), None
        )

    # ------------------------------------------------------------------ files

    def _settle(self, rule: BestRule) -> None:
        """Have ``best/`` and the pointer say what is true; a full disk is said, and tried again with the next best."""
        self._kept = self._best_in_place(rule)
        try:
            if self._kept is None:
                self._archive_best()
                return
            if self._handed_out() != self._kept:
                self._export_best(rule, self._kept)
            if self._pointed() != self._kept:
                write_durably(self._root / POINTER, f"{self._kept}\n")
        except OSError as error:
            logger.error("the best checkpoint, of step %s, cannot be named in %s: %s", self._kept, self._root, error)

    def _export_best(self, rule: BestRule, step: int) -> None:
        folder, beside = checkpoint.step_folder(self._root, step), self._root / f"{BEST}{checkpoint.UNFINISHED}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        if (folder / EXPORT).is_dir():
            _share_files(folder / EXPORT, beside / "huggingface")
        else:
            logger.warning("%s is gone: best/ has no model", folder / EXPORT)
        why = {
            "step": step,
            "checkpoint": folder.name,
            "rule": rule.text,
            "value": self._value(rule, step),
            "told": self._told(rule, step),
            "figures": self._figures[step],
            "figures_of_step_0": self._start,
        }
        write_durably(beside / WHY, json.dumps(why, indent=1, ensure_ascii=False) + "\n")
        flush_tree(beside)
        checkpoint.replace_folder(beside, self._root / BEST)

    def _archive_best(self) -> None:
        """Lay aside what another run, or a part of this one that is taken again, left as its best."""
        (self._root / POINTER).unlink(missing_ok=True)
        if (self._root / BEST).exists():
            logger.warning("%s is no longer the best of this run; it is %s now", self._root / BEST, VOID)
            checkpoint.replace_folder(self._root / BEST, self._root / VOID)

    def _handed_out(self) -> int | None:
        """The step of the model in ``best/``."""
        step = _read_json(self._root / BEST / WHY).get("step")
        return step if isinstance(step, int) else None

    def _pointed(self) -> int | None:
        pointer = self._root / POINTER
        text = pointer.read_text().strip() if pointer.is_file() else ""
        return int(text) if text.isdecimal() else None

    def _write_record(self) -> None:
        record = {str(step): figures for step, figures in sorted(self._figures.items())}
        try:
            write_durably(self._root / RECORD, json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.error("the figures of the last validation are not in %s: %s", self._root / RECORD, error)

    def _require_start(self, rule: BestRule) -> None:
        folder = checkpoint.find_checkpoint(self._config)
        start = {} if folder is None else _read_record(folder).get(0, {})
        missing = [constraint.name for constraint in rule.constraints if math.isnan(constraint.bound_for(start))]
        if folder is not None and missing:
            raise ValueError(
                f"{KEY}={rule.text!r} compares {', '.join(missing)} with step 0, and the run that is resumed from "
                f"{folder} did not record it in its {RECORD}; give the bound as a number, or start afresh "
                "(trainer.resume_mode=disable, or another trainer.default_local_dir)"
            )


def _read_record(folder: Path) -> dict[int, dict[str, float]]:
    """The validations of the run that a checkpoint belongs to, by step."""
    return {int(step): figures for step, figures in _read_json(folder.absolute().parent / RECORD).items()}


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty where there is no such file, or it is damaged, which is said."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s is damaged (%s) and does not count", path, error)
        return {}


def _share_files(folder: Path, target: Path) -> None:
    """The files of a folder in another one, without room of their own where the file system can do that."""
    target.mkdir()
    for path in folder.iterdir():
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
