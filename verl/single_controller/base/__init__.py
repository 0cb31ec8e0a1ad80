"""The single controller without Ray: what a worker is, and how a group's calls are split over ranks."""

from verl.single_controller.base.decorator import RolloutError, WorkerError, WorkerGroup
from verl.single_controller.base.worker import Worker

__all__ = ["RolloutError", "Worker", "WorkerError", "WorkerGroup"]
