"""A run from its first process to its exit code.

::

    session ─► attempt: workers, engines ─► fit ─► done                         0
                 ▲                           │─► SIGTERM, Ctrl-C                128 + signal
                 │ trainer.max_restarts      │─► a guard, a save, a wrong rule  1
                 └──── shutdown ◄── a worker or an engine failed ─► given up    1

In: a trainer, and how to build another for the same run. Out: an exit code; the cause is the first line of what is said
then, before anything is shut down. Whatever ends the run, no process of it stays.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable

from verl.experimental.agent_loop.base import RolloutError
from verl.single_controller.base import WorkerError
from verl.single_controller.ray import ResourcesInUseError
from verl.single_controller.ray.session import end_session, start_session
from verl.trainer.checkpoint.best import BestMetricError
from verl.trainer.checkpoint.layout import find_faults, newest_whole, step_folder
from verl.trainer.checkpoint.saver import CheckpointError
from verl.trainer.ppo.guards import GuardError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.stop_request import StopRequest
from verl.utils.saved_config import save_config

logger = logging.getLogger(__name__)

Build = Callable[[], RayPPOTrainer]


def run(trainer: RayPPOTrainer, rebuild: Build) -> None:
    """Train, and leave no process behind however it ends.

    Args:
        rebuild: a trainer of the same configuration from scratch, which goes on from the newest checkpoint.

    Raises:
        SystemExit: the run did not reach its last step; what is in the way was said.
    """
    settings = trainer.config.trainer
    save_config(trainer.config, os.path.join(settings.default_local_dir, "config.yaml"))
    stop = StopRequest(settings.grace_s)
    stop.listen()
    try:
        connect(trainer, stop)
        train(trainer, rebuild, stop)
    except KeyboardInterrupt:
        say(f"left at once at {stop.name}: {trainer.progress()}")
        raise SystemExit(stop.exit_code) from None
    finally:
        stop.leave()
        end_session(settings.ray_timeline_dir)
        stop.restore()


def connect(trainer: RayPPOTrainer, stop: StopRequest) -> None:
    """Begin the session, in which Ray puts a handler of SIGTERM in the place of ours.

    Raises:
        SystemExit: no Ray answers, or it cannot be started so.
        KeyboardInterrupt: a signal came meanwhile.
    """
    try:
        start_session(trainer.config.ray_kwargs.ray_init)
    except ValueError as error:
        raise fail(str(error)) from None
    except SystemExit:  # of Ray's handler
        stop.number = signal.SIGTERM
        raise KeyboardInterrupt from None
    stop.listen()


def train(trainer: RayPPOTrainer, rebuild: Build, stop: StopRequest) -> None:
    """Attempt after attempt, until the run is done, stopped or given up.

    Raises:
        SystemExit: it is not done.
    """
    restarts, allowed = 0, trainer.config.trainer.max_restarts
    while (error := attempt(trainer, stop, restarts)) is not None:
        stop.takes_steps = False
        by_user = isinstance(error, WorkerError) and error.by_user
        if by_user or stop.requested or restarts == allowed:
            if restarts:
                say(f"given up after restart {restarts} of trainer.max_restarts={allowed}")
            raise SystemExit(stop.exit_code if stop.requested else 1)
        restarts += 1
        if trainer.saver.saved_any:
            trainer.config.trainer.resume_mode = "auto"  # whatever the run began with
        say(f"restart {restarts} of trainer.max_restarts={allowed}: {str(error).splitlines()[0]}")
        try:
            trainer = rebuild()
        except ValueError as cause:
            raise fail(f"the run cannot be restarted: {cause}") from None


def attempt(trainer: RayPPOTrainer, stop: StopRequest, restarts: int) -> WorkerError | RolloutError | None:
    """Start everything and train, until the end or until something fails; all is shut down then.

    Returns:
        What failed and may go well another time; it has been said.

    Raises:
        SystemExit: the run ends here.
    """
    trainer.stop, trainer.restarts = stop, restarts
    try:
        start_workers(trainer)
        trainer.fit()
    except (WorkerError, RolloutError) as error:
        # Said before anything is shut down, and to Ray's own account of a death: the cause comes first.
        say(f"error: {error}\n{trainer.progress()}")
        return error
    except (CheckpointError, GuardError, BestMetricError) as error:
        raise fail(f"{error}\n{trainer.progress()}") from None
    except KeyboardInterrupt:
        stop.leave()
        say(f"left at once at {stop.name}: {trainer.progress()}")
        raise SystemExit(stop.exit_code) from None
    finally:
        trainer.shutdown()
    if stop.requested and trainer.global_steps < trainer.total_steps:
        say(f"stopped by {stop.name}: {trainer.progress()}; {_how_to_go_on(trainer)}")
        raise SystemExit(stop.exit_code)
    logger.info("done: %s", trainer.progress())
    return None


def start_workers(trainer: RayPPOTrainer) -> None:
    """Start everything that trains and generates; ends the run where the cluster or a setting does not allow it."""
    try:
        trainer.init_workers()
    except (ValueError, ResourcesInUseError) as error:
        logger.debug("where it came from", exc_info=True)
        raise fail(str(error)) from None


def fail(message: str) -> SystemExit:
    """Say why the run ends."""
    say(f"error: {message}")
    return SystemExit(1)


def say(message: str) -> None:
    """To the console at once, whatever the level of the log."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def _how_to_go_on(trainer: RayPPOTrainer) -> str:
    """What became of the run's last step, and what would go on from where, by what lies there."""
    settings = trainer.config.trainer
    saved = newest_whole(settings.default_local_dir)
    how = "the same command" if settings.resume_mode == "auto" else "the same command with trainer.resume_mode=auto"
    if not find_faults(step_folder(settings.default_local_dir, trainer.global_steps)):
        return f"{how} goes on from there"
    not_saved = f"this step was not saved, as trainer.save_freq={settings.save_freq} asks"
    return not_saved if saved is None else f"{not_saved}; {how} goes on from {saved.name}"
