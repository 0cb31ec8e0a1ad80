"""A whole run in the calling process: the trainer, its workers, the agent loops and the engine, without Ray.

In: a trainer that was built and not started. Out: the same trainer, ready for ``fit``. The parts are those of a run;
only the calls between them, which Ray makes elsewhere, are plain ones here. One training rank, co-located teachers.

For studies of many short runs of small models, which would spend more time starting processes than training, and for
tests. On the CPU alone: on a GPU, engine and training would have to take turns with its memory.
"""

from verl.experimental.agent_loop.local import LocalAgentLoopManager
from verl.single_controller.local import local_groups
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.tracking import Tracking


def init_in_process(trainer: RayPPOTrainer) -> None:
    """Do what ``trainer.init_workers`` does, here; ``trainer.shutdown`` ends it as ever.

    Raises:
        ValueError: the run wants a GPU or more than one rank, or a model or setting cannot be used.
    """
    run = trainer.config.trainer
    if trainer.device_name != "cpu":
        raise ValueError(f"trainer.device={run.device}: a run in one process is on the CPU; set trainer.device=cpu")
    if run.world_size != 1 or run.teacher_ranks_on_nodes:
        raise ValueError(
            f"trainer.nnodes={run.nnodes}, trainer.n_gpus_per_node={run.n_gpus_per_node} and "
            f"trainer.teacher_n_gpus_per_node={run.teacher_n_gpus_per_node}: a run in one process has one rank, which "
            "student and teachers share; set 1, 1 and null"
        )
    workers = {role: trainer.role_worker_mapping[role](**trainer.worker_arguments(role)) for role in trainer.roles}
    # The trainer's attributes are of Ray's classes, whose methods these have.
    trainer.role_groups = local_groups(workers)  # type: ignore[assignment]
    trainer.actor_wg = trainer.role_groups["actor"]
    for role in trainer.roles:
        trainer.role_groups[role].init_model()
    engine = LocalAgentLoopManager(trainer.config, trainer.tokenizer)
    trainer.agent_loop_manager = engine  # type: ignore[assignment]
    engine.start()
    trainer.logger = Tracking.of_run(trainer.config)
