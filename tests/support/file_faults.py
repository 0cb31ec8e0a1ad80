"""Faults of a disk and kills between two changes of it, for tests of how a run handles them."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """The process ends here."""


def killed_in_step(trainer: Any, step: int | None) -> Any:
    """The trainer, which dies before the update of a step; None: never."""
    update = trainer.update_actor

    def update_or_die(batch: Any) -> Any:
        if trainer.global_steps == step:
            raise Killed
        return update(batch)

    trainer.update_actor = update_or_die
    return trainer


@contextmanager
def killed_at_change(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[Killed]]:
    """End the block before its n-th rename, link or removal of a folder; what it yields holds the kill afterwards."""
    changes, kills = 0, []

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes == number:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (os, "link"), (shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        try:
            yield kills
        except Killed as kill:
            kills.append(kill)


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``limit_bytes``: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
