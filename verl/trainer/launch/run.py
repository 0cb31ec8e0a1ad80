"""A run from its first process to its exit code.

::

    start_ray ─► workers, engines ─► fit ─► done                                            0
                                      │─► SIGTERM, Ctrl-C                                   128 + signal
                                      │─► a user's error, a guard, save, rule or logger     1
                                      └─► a worker or an engine failed                      3, or 4 after a checkpoint

In: a trainer. Out: an exit code. Before anything is shut down the cause is reported, in its first line. Whatever ends
the run, no process of it stays. After 3 and 4 the launch script may run the same command again (``MAX_RESTARTS``).
"""

import logging
import os
import signal
import sys
import threading
from contextlib import suppress

from verl.config.best_rule import MetricRuleError
from verl.single_controller.base import RolloutError, WorkerError
from verl.single_controller.ray.session import cluster_device, end_session, start_session
from verl.trainer.checkpoint.layout import newest_whole
from verl.trainer.checkpoint.saver import CheckpointError
from verl.trainer.launch.checks import check_device
from verl.trainer.ppo.guards import GuardError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.stop_request import StopRequest
from verl.utils.loopback import joins_cluster
from verl.utils.redaction import save_config
from verl.utils.tracking import LoggerError

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
    path = os.path.join(settings.default_local_dir, "config.yaml")
    if not (settings.val_only and os.path.isfile(path)):  # the file of the run that is validated
        save_config(trainer.config, path)
    stop = StopRequest(settings.grace_s)
    stop.listen()
    try:
        run_once(trainer, stop)
    except KeyboardInterrupt:
        # A further signal must not break off the report.
        stop.leave()
        report(f"left at once at {stop.name}: {progress(trainer)}")
        raise SystemExit(stop.exit_code) from None
    finally:
        stop.leave()
        try:
            # Whatever shutting the trainer down raises, the exit code stays and Ray's processes have to end.
            trainer.shutdown()
        except Exception:
            logger.exception("the run has ended, but not all of its parts could be closed")
        finally:
            end_session(settings.ray_timeline_dir)
            stop.restore()


def run_once(trainer: RayPPOTrainer, stop: StopRequest) -> None:
    """Start everything and train until the end, a signal or a failure.

    Raises:
        SystemExit: the last step was not reached.
        KeyboardInterrupt: a signal ended it at once.
        Exception: an error of the run's or the user's code, reported as the others are.
    """
    try:
        start(trainer, stop)
        trainer.fit(stop)
    except Exception as error:
        known = isinstance(error, WorkerError | CheckpointError | GuardError | MetricRuleError | LoggerError)
        # Reported before anything is shut down, and before Ray's own account of a death: the cause comes first.
        report(f"{'error' if known else type(error).__name__}: {error}")
        if isinstance(error, RolloutError) or not isinstance(error, WorkerError):  # the ranks that train are well
            saving = threading.Thread(target=finish_save, args=[trainer], daemon=True)
            saving.start()
            saving.join(trainer.config.trainer.grace_s)  # not for ever: a rank may hang all the same
        report(progress(trainer))
        if not known:
            raise
        # A worker's ValueError would come again, so no restart; after a signal the signal's own code counts.
        if not isinstance(error, WorkerError) or (error.by_user and not stop.requested):
            raise SystemExit(1) from None
        lost = LOST_AFTER_SAVE if trainer.saver.saved_any else LOST
        raise SystemExit(stop.exit_code if stop.requested else lost) from None
    # A signal during the last step has changed nothing.
    if stop.requested and trainer.global_steps < trainer.total_steps:
        report(f"stopped by {stop.name}: {progress(trainer)}")
        raise SystemExit(stop.exit_code)
    logger.info("done: %s", progress(trainer))


def finish_save(trainer: RayPPOTrainer) -> None:
    """Wait for the checkpoint that is being written, if any."""
    with suppress(CheckpointError, WorkerError):
        trainer.saver.finish()


def start(trainer: RayPPOTrainer, stop: StopRequest) -> None:
    """Begin the session and start everything that trains and generates.

    Raises:
        SystemExit: the cluster or a setting does not allow it.
        KeyboardInterrupt: a signal came while Ray started.
    """
    ray_init = trainer.config.ray_kwargs.ray_init
    try:
        start_session(ray_init)
        stop.listen()  # Ray has replaced our handler of SIGTERM
        if joins_cluster(ray_init):
            trainer.device_name = cluster_device(trainer.config.trainer.device)
            check_device(trainer.config, trainer.device_name)
        trainer.init_workers()
    except ValueError as error:
        logger.debug("where it came from", exc_info=True)
        report(f"error: {error}")
        raise SystemExit(1) from None
    except SystemExit:  # of Ray's handler
        stop.number = signal.SIGTERM
        raise KeyboardInterrupt from None


def progress(trainer: RayPPOTrainer) -> str:
    """Where the run stands and what it left."""
    root = trainer.config.trainer.default_local_dir
    saved = f"newest checkpoint {newest}" if (newest := newest_whole(root)) else "no checkpoint"
    return f"step {trainer.global_steps} of {trainer.total_steps}, {saved}, run folder {root}{trainer.best.describe()}"


def report(message: str) -> None:
    """Write to the console at once, whatever the level of the log."""
    print(message, file=sys.stderr, flush=True)
