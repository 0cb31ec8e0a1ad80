"""Keeps the best checkpoint of a run, by the rule of ``trainer.best_metric``.

::

    validation ──► note: metrics into validations.json ──► better than all before? ──► the trainer saves it, due or not
    its checkpoint is in place ──► best/ ──► pruning spares this checkpoint

    default_local_dir/
        validations.json                   metrics of every validation of the run, by step
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
from verl.config.best_rule import KEY, BestRule, Metrics, metric_value
from verl.trainer.checkpoint import layout
from verl.utils.durable_files import flush_tree, write_durably

logger = logging.getLogger(__name__)

RECORD, BEST, VOID, REASON = "validations.json", "best", "best_void", "best.json"


class BestCheckpoint:
    """The best checkpoint of a run so far; does nothing where ``trainer.best_metric`` is not set.

    Args:
        resume_from: the checkpoint that the run will continue from; None: it starts afresh.

    Raises:
        ValueError: the rule compares with step 0, and the run that is resumed did not record its metrics.
    """

    def __init__(self, config: TrainerConfig, resume_from: Path | None) -> None:
        self._root, self._patience = Path(config.default_local_dir), config.stop_after_no_better
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
        last, record = layout.checkpoint_step(resume_from), _read_json(resume_from.absolute().parent / RECORD)
        self._metrics = {int(step): metrics for step, metrics in record.items() if int(step) <= last}
        if layout.is_of_run(resume_from, self._root):
            steps = map(layout.checkpoint_step, layout.step_folders(self._root))
            self._saved = {step for step in steps if step <= last}
        missing = [name for name in self._rule.names_of_start if math.isnan(metric_value(self._start, name))]
        if missing:
            raise ValueError(
                f"{KEY}={self._rule.text!r} compares {', '.join(missing)} with step 0, which the run of {resume_from} "
                f"did not record in its {RECORD}; give the bound as a number, or set trainer.resume_mode=disable"
            )

    # ------------------------------------------------------------------ for the trainer

    def resume(self) -> None:
        """Write the record up to the checkpoint that the run continues from; archive ``best/`` of later steps."""
        if self._rule is None:
            return
        if not self._saved:
            self._archive_best()  # of another run, which had this folder before
        self._update_files(self._rule)

    def note(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Record a validation; returns step and value of the best one so far as metrics.

        Raises:
            BestMetricError: the first validation lacks a metric that the rule names.
        """
        rule = self._rule
        if rule is None:
            return {}
        if not self._names_are_known:
            rule.require_known(metrics)
            self._names_are_known = True
        # JSON has no NaN; a missing metric keeps no bound either.
        self._metrics[step] = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._update_files(rule)
        if step > 0 and step not in self._saved and self._is_better(rule, step, self._best):
            self._pending = step
            logger.info("step %d is the best so far: %s", step, rule.describe(self._metrics[step], self._start))
        if self._best is None:
            return {}
        return {"training/best_step": self._best, "training/best_value": rule.value(self._metrics[self._best])}

    def is_new(self, step: int) -> bool:
        """Whether a step is the best one and has no checkpoint yet."""
        return self._pending == step

    def gives_up(self) -> bool:
        """Whether the last ``trainer.stop_after_no_better`` validations were no better; logs it."""
        since = sum(step > (self._best or 0) for step in self._metrics)
        if self._patience is None or since < self._patience:
            return False
        logger.warning("stopping early: %d validations without a better one%s", since, self.describe())
        return True

    def describe(self) -> str:
        """A clause about the best checkpoint, to append to a message."""
        if self._rule is None:
            return ""
        if self._kept is None:
            return f", no checkpoint met {KEY}"
        reason = self._rule.describe(self._metrics[self._kept], self._start)
        return f", best {layout.step_folder(self._root, self._kept)} ({reason})"

    # ------------------------------------------------------------------ for the saver

    def checkpoint_ended(self, step: int, *, in_place: bool) -> None:
        """A checkpoint was published, or could not be written."""
        if self._rule is None:
            return
        if step == self._pending:
            self._pending = None
        if in_place:
            self._saved.add(step)
            self._update_files(self._rule)

    @property
    def protected(self) -> set[int | None]:
        """Steps whose checkpoints must stay: the best one, and the one of ``best/``, which a full disk may delay."""
        return {self._kept, self._exported_step()}

    # ------------------------------------------------------------------ choosing

    @property
    def _best(self) -> int | None:
        return self._kept if self._pending is None else self._pending

    @property
    def _start(self) -> Metrics:
        return self._metrics.get(0, {})

    def _is_better(self, rule: BestRule, step: int, than: int | None) -> bool:
        """Whether a step keeps all bounds and is strictly better than another one; of equals the first stays."""
        metrics = self._metrics[step]
        return rule.qualifies(metrics, self._start) and (than is None or rule.is_better(metrics, self._metrics[than]))

    def _update_files(self, rule: BestRule) -> None:
        """Choose the best step that has a whole checkpoint or its model in ``best/``; write record and model.

        A full disk is logged, and the next validation or checkpoint tries again.
        """
        exported, self._kept = self._exported_step(), None
        for step in sorted(self._metrics):
            has_model = step == exported or (step in self._saved and not layout.find_faults(self._folder(step)))
            if has_model and self._is_better(rule, step, self._kept):
                self._kept = step
        try:
            write_durably(self._root / RECORD, json.dumps(dict(sorted(self._metrics.items()))) + "\n")
            if self._kept is None:
                self._archive_best()
            elif exported != self._kept:
                self._export_best(rule, self._kept)
        except OSError as error:
            logger.error("validations and best checkpoint are not up to date in %s: %s", self._root, error)

    # ------------------------------------------------------------------ files

    def _folder(self, step: int) -> Path:
        return layout.step_folder(self._root, step)

    def _exported_step(self) -> int | None:
        return _read_json(self._root / BEST / REASON).get("step")

    def _export_best(self, rule: BestRule, step: int) -> None:
        """Write ``best/`` beside, then put it into place."""
        beside, metrics = self._root / f"{BEST}{layout.UNFINISHED}", self._metrics[step]
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        shutil.copytree(self._folder(step) / layout.EXPORT, beside / "huggingface", copy_function=_link_or_copy)
        reason = {"step": step, "checkpoint": self._folder(step).name, "rule": rule.text, "value": rule.value(metrics)}
        reason |= {"reason": rule.describe(metrics, self._start), "metrics": metrics, "metrics_of_step_0": self._start}
        (beside / REASON).write_text(json.dumps(reason, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        flush_tree(beside)
        layout.replace_folder(beside, self._root / BEST)

    def _archive_best(self) -> None:
        """Rename ``best/`` of another run, or of steps that are taken again, to ``best_void/``."""
        if (self._root / BEST).exists():
            logger.warning("%s is no longer the best of this run; it is %s now", self._root / BEST, VOID)
            layout.replace_folder(self._root / BEST, self._root / VOID)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; an empty object without it."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _link_or_copy(source: str, target: str) -> None:
    """A hard link takes no room; some file systems have none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
