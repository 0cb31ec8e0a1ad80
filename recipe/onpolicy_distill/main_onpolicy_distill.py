"""Entry point of on-policy distillation; what it does from the command line on is in ``verl.trainer.main_ppo``.

::

    python -m recipe.onpolicy_distill.main_onpolicy_distill \\
        actor_rollout_ref.model.path=STUDENT actor_rollout_ref.ref.model.path=TEACHER data.train_files=TRAIN.parquet
"""

from typing import TYPE_CHECKING

from verl.config import PPOConfig
from verl.trainer import main_ppo

if TYPE_CHECKING:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer


def build_trainer(config: PPOConfig) -> "RayPPOTrainer":
    """The trainer that the algorithm decides: one learns from teachers, alone or beside a task reward, the other from a
    task reward alone. See ``main_ppo.build_trainer``; starts nothing.
    """
    from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
    from recipe.onpolicy_distill.synthetic_item_prompts import make_prompt_file
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    trainer_class = RayOnPolicyDistillTrainer if config.algorithm.distils else RayPPOTrainer
    return main_ppo.build_trainer(config, trainer_class, make_prompt_file)


def main() -> None:
    """Accept the command line as users of verl write it, and run."""
    name = "recipe.onpolicy_distill.main_onpolicy_distill"
    main_ppo.run_command_line(name, "onpolicy_distill_trainer", build_trainer)


if __name__ == "__main__":
    main()
