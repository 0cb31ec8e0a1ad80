"""A run from its first process to its exit code.

::

    start_ray ─► workers, engines ─► fit ─► done                                            0
                                      │─► SIGTERM, Ctrl-C                                   128 + signal
                                      │─► a user's error, a guard, a save, a wrong rule     1
                                      └─► a worker or an engine failed                      3, or 4 after a checkpoint

In: a trainer. Out: an exit code. Before anything is shut down the cause is reported, in its first line. Whatever ends
the run, no process of it stays. After 3 and 4 the launch script may run the same command again (``MAX_RESTARTS``).
"""

import logging
import os
import signal
import sys

from verl.config.best_rule import BestMetricError
from verl.single_controller.base import WorkerError
from verl.single_controller.ray import ResourcesInUseError
from verl.single_controller.ray.session import end_session, start_session
from verl.trainer.checkpoint.layout import find_faults, newest_whole, step_folder
from verl.trainer.checkpoint.saver import CheckpointError
from verl.trainer.ppo.guards import GuardError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.stop_request import StopRequest
from verl.utils.saved_config import save_config

logger = logging.getLogger(__name__)

LOST, LOST_AFTER_SAVE = 3, 4
"""Exit codes of a run that lost a process: it may go well another time, and then goes on from a checkpoint of its own
or begins as it did."""


def run(trainer: RayPPOTrainer) -> None:
    """Train, and leave no process behind however it ends.

    Raises:
        SystemExit: the run did not reach its last step; the reason was reported.
    """
    settings = trainer.config.trainer
    save_config(trainer.config, os.path.join(settings.default_local_dir, "config.yaml"))
    stop = StopRequest(settings.grace_s)
    stop.listen()
    try:
        run_once(trainer, stop)
    except KeyboardInterrupt:
        stop.leave()
        report(f"left at once at {stop.name}: {trainer.progress()}")
        raise SystemExit(stop.exit_code) from None
    finally:
        stop.leave()
        try:
            trainer.shutdown()
        finally:
            end_session(settings.ray_timeline_dir)
            stop.restore()


def run_once(trainer: RayPPOTrainer, stop: StopRequest) -> None:
    """Start everything and train until the end, a signal or a failure.

    Raises:
        SystemExit: the last step was not reached.
        KeyboardInterrupt: a signal ended it at once.
    """
    start_ray(trainer, stop)
    try:
        start_workers(trainer)
        trainer.fit(stop)
    except WorkerError as error:
        # Reported before anything is shut down, and before Ray's own account of a death: the cause comes first.
        report(f"error: {error}\n{trainer.progress()}")
        lost = LOST_AFTER_SAVE if trainer.saver.saved_any else LOST
        raise SystemExit(stop.exit_code if stop.requested else 1 if error.by_user else lost) from None
    except (CheckpointError, GuardError, BestMetricError) as error:
        raise exit_with(f"{error}\n{trainer.progress()}") from None
    if stop.requested and trainer.global_steps < trainer.total_steps:
        report(f"stopped by {stop.name}: {trainer.progress()}; {_how_to_go_on(trainer)}")
        raise SystemExit(stop.exit_code)
    logger.info("done: %s", trainer.progress())


def start_ray(trainer: RayPPOTrainer, stop: StopRequest) -> None:
    """Begin the session, in which Ray replaces our handler of SIGTERM, and take the signals over again.

    Raises:
        SystemExit: no Ray answers, or it cannot be started so.
        KeyboardInterrupt: a signal came meanwhile.
    """
    try:
        start_session(trainer.config.ray_kwargs.ray_init)
    except ValueError as error:
        raise exit_with(str(error)) from None
    except SystemExit:  # of Ray's handler
        stop.number = signal.SIGTERM
        raise KeyboardInterrupt from None
    stop.listen()


def start_workers(trainer: RayPPOTrainer) -> None:
    """Start everything that trains and generates; ends the run where the cluster or a setting does not allow it."""
    try:
        trainer.init_workers()
    except (ValueError, ResourcesInUseError) as error:
        logger.debug("where it came from", exc_info=True)
        raise exit_with(str(error)) from None


def exit_with(message: str) -> SystemExit:
    """Report an error of the user, or one that the same command would meet again; returns the end of the run."""
    report(f"error: {message}")
    return SystemExit(1)


def report(message: str) -> None:
    """Write to the console at once, whatever the level of the log."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _how_to_go_on(trainer: RayPPOTrainer) -> str:
    """Whether the run's last step was saved, and the command that goes on from the newest checkpoint, if any."""
    settings = trainer.config.trainer
    saved = newest_whole(settings.default_local_dir)
    how = "the same command" if settings.resume_mode == "auto" else "the same command with trainer.resume_mode=auto"
    if not find_faults(step_folder(settings.default_local_dir, trainer.global_steps)):
        return f"{how} goes on from there"
    not_saved = f"this step was not saved, as trainer.save_freq={settings.save_freq} asks"
    return not_saved if saved is None else f"{not_saved}; {how} goes on from {saved.name}"
