"""The single controller without Ray: what a worker is, and how a group's calls are split over ranks."""

from verl.single_controller.base.worker import Worker
from verl.single_controller.base.worker_group import RolloutError, WorkerError, WorkerGroup

__all__ = ["RolloutError", "Worker", "WorkerError", "WorkerGroup"]
