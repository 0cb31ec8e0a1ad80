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

from verl.config import TrainerConfig
from verl.config.best_rule import KEY, BestRule, Metrics, metric_value, require_known
from verl.trainer.checkpoint import layout
from verl.utils.broken_files import read_json
from verl.utils.durable_files import flush_tree, write_durably

logger = logging.getLogger(__name__)

RECORD, BEST, VOID, REASON = "validations.json", "best", "best_void", "best.json"
FORGET = "removing it forgets the best of the run so far"


class BestCheckpoint:
    """The best checkpoint of a run so far; does nothing where ``trainer.best_metric`` is not set.

    Args:
        resume_from: the checkpoint that the run will continue from; None: it starts afresh.

    Raises:
        ValueError: the rule compares with step 0, and the run that is resumed did not record its metrics.
    """

    def __init__(self, config: TrainerConfig, resume_from: Path | None) -> None:
        self._root, self._patience = Path(config.default_local_dir), config.stop_after_no_better
        self._is_on = bool(config.best_metric) and not config.val_only
        # Without a rule this parses the name "none"; no validation is recorded then, so nothing reads it.
        self._rule = BestRule.parse(config.best_metric or "none")
        self._metrics: dict[int, dict[str, float]] = {}
        """Metrics of every validation, by step."""
        self._candidates: set[int | None] = set()
        """Steps whose model is there or being written."""
        self._pending: int | None = None
        """The best step, while its checkpoint is being written."""
        self._exported: int | None = None
        """The step whose model is in ``best/``."""
        self._names_are_known = False
        if not self._is_on or resume_from is None:
            return
        # The record of the run that wrote the checkpoint, which lies elsewhere with resume_mode=resume_path.
        last, record = layout.checkpoint_step(resume_from), read_json(resume_from.absolute().parent / RECORD, FORGET)
        # Later validations are of steps that this run takes again.
        self._metrics = {int(step): metrics for step, metrics in record.items() if int(step) <= last}
        # Another run's checkpoints are no candidates: they are not this run's to protect or to link.
        if layout.is_of_run(resume_from, self._root):
            exported = read_json(self._root / BEST / REASON, FORGET).get("step")
            self._exported = exported if exported is not None and exported <= last else None
            whole = [folder for folder in layout.step_folders(self._root) if not layout.find_faults(folder)]
            # The step of best/ stays one without its checkpoint too: hard links keep its model.
            self._candidates = {self._exported, *(step for step in map(layout.checkpoint_step, whole) if step <= last)}
        missing = [name for name in self._rule.names_of_start if math.isnan(metric_value(self._start, name))]
        if missing:
            raise ValueError(
                f"{KEY}={self._rule.text!r} compares {', '.join(missing)} with step 0, which the run of {resume_from} "
                f"did not record in its {RECORD}; give the bound as a number, or set trainer.resume_mode=disable"
            )

    # ------------------------------------------------------------------ for the trainer

    def update_files(self) -> None:
        """Write the record, and bring ``best/`` up to date; a full disk is logged, and the next call tries again."""
        if not self._is_on:
            return
        best = self._best_of(self._candidates)
        try:
            write_durably(self._root / RECORD, json.dumps(dict(sorted(self._metrics.items()))) + "\n")
            if best is None and (self._root / BEST).exists():  # of another run, or of steps that are taken again
                logger.warning("%s is no longer the best of this run; it is %s now", self._root / BEST, VOID)
                layout.remove_folder(layout.replace_folder(self._root / BEST, self._root / VOID))
                self._exported = None
            # A pending step has no files to link yet; it is exported once its checkpoint is in place.
            elif best is not None and best not in (self._exported, self._pending):
                self._export_best(best)
        except OSError as error:
            logger.error("validations and best checkpoint are not up to date in %s: %s", self._root, error)

    def note(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Record a validation; returns step and value of the best one so far as metrics.

        Raises:
            MetricRuleError: the first validation lacks a metric that the rule names.
        """
        if not self._is_on:
            return {}
        if not self._names_are_known:
            require_known(f"{KEY}={self._rule.text!r}", self._rule.names, metrics)
            self._names_are_known = True
        # JSON has no NaN; a missing metric keeps no bound either.
        self._metrics[step] = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        is_new = step > 0 and step not in self._candidates
        if is_new and self._best_of({*self._candidates, step}) == step:
            # A candidate before it is saved, so that this step's metrics name it; a failed save takes it out again.
            self._pending = step
            self._candidates.add(step)
            logger.info("step %d is the best so far: %s", step, self._rule.describe(self._metrics[step], self._start))
        self.update_files()
        best = self._best_of(self._candidates)
        if best is None:
            return {}
        return {"training/best_step": best, "training/best_value": self._rule.value(self._metrics[best])}

    def is_new(self, step: int) -> bool:
        """Whether a step is the best one and has no checkpoint yet."""
        return self._pending == step

    def gives_up(self) -> bool:
        """Whether the last ``trainer.stop_after_no_better`` validations were no better; logs it."""
        # Where no step has kept the bounds, every validation after step 0 counts as no better.
        best = self._best_of(self._candidates) or 0
        since = sum(step > best for step in self._metrics)
        if self._patience is None or since < self._patience:
            return False
        logger.warning("stopping early: %d validations without a better one%s", since, self.describe())
        return True

    def describe(self) -> str:
        """A clause about the best checkpoint, to append to a message."""
        if not self._is_on:
            return ""
        if self._exported not in self._metrics:
            return f", no checkpoint met {KEY}"
        reason = self._rule.describe(self._metrics[self._exported], self._start)
        return f", best {layout.step_folder(self._root, self._exported)} ({reason})"

    @property
    def model_folder(self) -> Path | None:
        """The folder with the best student; None: there is none yet."""
        return None if self._exported is None else self._root / BEST / "huggingface"

    # ------------------------------------------------------------------ for the saver

    def checkpoint_ended(self, step: int, *, in_place: bool) -> None:
        """A checkpoint was published, or could not be written."""
        (self._candidates.add if in_place else self._candidates.discard)(step)
        self._pending = None if step == self._pending else self._pending
        self.update_files()

    @property
    def protected(self) -> set[int | None]:
        """Steps whose checkpoints must stay: the best one, and that of ``best/``, which lags after a full disk."""
        return {self._exported, self._best_of(self._candidates)}

    # ------------------------------------------------------------------ choosing

    @property
    def _start(self) -> Metrics:
        return self._metrics.get(0, {})

    def _best_of(self, steps: set[int | None]) -> int | None:
        """The best of some steps that keeps all bounds; of equals the first."""
        best, rule = None, self._rule
        for step in sorted(self._metrics.keys() & steps):
            metrics = self._metrics[step]
            if rule.qualifies(metrics, self._start) and (best is None or rule.is_better(metrics, self._metrics[best])):
                best = step
        return best

    # ------------------------------------------------------------------ files

    def _export_best(self, step: int) -> None:
        """Write ``best/`` beside, then put it into place."""
        beside, checkpoint = self._root / f"{BEST}{layout.UNFINISHED}", layout.step_folder(self._root, step)
        metrics, rule = self._metrics[step], self._rule
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(checkpoint / layout.EXPORT, beside / "huggingface", copy_function=_link_or_copy)
        reason = {"step": step, "checkpoint": checkpoint.name, "rule": rule.text, "value": rule.value(metrics)}
        reason |= {"reason": rule.describe(metrics, self._start), "metrics": metrics, "metrics_of_step_0": self._start}
        write_durably(beside / REASON, json.dumps(reason, indent=1, ensure_ascii=False) + "\n")
        flush_tree(beside)
        deleted = layout.replace_folder(beside, self._root / BEST)
        # Before the old folder is removed: that may fail, and best/ is the new one already.
        self._exported = step
        layout.remove_folder(deleted)


def _link_or_copy(source: str, target: str) -> None:
    """A hard link takes no space; some file systems have none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
