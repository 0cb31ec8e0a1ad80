"""The trainer's loop on fakes: prompts, engines, ranks and a logger in a few lines each."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer
from verl.config import PPOConfig, TrainerConfig
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.workers.fsdp.checkpoint import SaveOutcome

R = 3


class Prompts(Dataset[dict[str, Any]]):
    """Eight prompts from two sources."""

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows
        self.epochs: list[int] = []
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "raw_prompt": [{"role": "user", "content": str(index)}],
            "data_source": "ab"[index % 2],
            "index": index,
            "reward_model": {"style": "rule", "ground_truth": str(index)},
        }

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        self.epoch = epoch


class Tokenizer:
    """Ten tokens, decoded as numbers."""

    name_or_path, chat_template = "nowhere", None
    added_tokens_decoder: ClassVar = {}

    def __len__(self) -> int:
        return 10

    def decode(self, tokens: list[int], **_: Any) -> str:
        return str(tokens)


class Engines:
    """In place of the agent-loop manager: every response is one shared token, one extended token, padding."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.asleep = False
        self.meta: list[dict[str, Any]] = []

    def generate_sequences(self, prompts: DataProto) -> DataProto:
        self.log.append("generate")
        self.meta.append(dict(prompts.meta_info))
        row = {
            "prompts": [1, 1],
            "responses": [5, 9, 0],
            "input_ids": [1, 1, 5, 9, 0],
            "attention_mask": [1, 1, 1, 1, 0],
            "position_ids": [0, 1, 2, 3, 4],
            "response_mask": [1, 1, 0],
            "distill_special_token_mask": [0, 1, 0],
            "rollout_log_probs": [-1.5, -1.5, 0.0],
        }
        tensors = {key: torch.tensor([values] * len(prompts)) for key, values in row.items()}
        turns = {"__num_turns__": [2] * len(prompts)}
        return DataProto.from_dict(tensors, turns, {"metrics": {"agent_loop/turns": 2.0}})

    def update_weights(self, worker_group: Any) -> None:
        self.log.append("sync")
        self.asleep = False

    def sleep(self) -> None:
        self.log.append("sleep")
        self.asleep = True


class Ranks:
    """In place of the student's and the teacher's worker groups."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.updated: list[DataProto] = []

    def compute_log_prob(self, batch: DataProto) -> DataProto:
        self.log.append("old_log_prob")
        return self.scores(batch)

    def scores(self, batch: DataProto) -> DataProto:
        values = torch.tensor([[-1.0, -2.0, 0.0]]).expand(len(batch), R).clone()
        return DataProto.from_dict({"old_log_probs": values, "entropys": -values, "extend_mass": 0.1 * -values})

    def compute_ref_log_prob(self, batch: DataProto) -> DataProto:
        self.log.append("ref_log_prob")
        return DataProto.from_dict({"ref_log_prob": torch.tensor([[-3.0, -100.0, 0.0]]).expand(len(batch), R).clone()})

    def update_actor(self, batch: DataProto) -> DataProto:
        self.log.append("update")
        self.updated.append(batch)
        scores = DataProto() if "old_log_probs" in batch.batch else self.scores(batch)
        return scores.union(DataProto(meta_info={"metrics": {"actor/pg_loss": [1.0, 1.0]}}))

    def begin_checkpoint(self, path: str, step: int) -> None:
        self.log.append(f"save {step}")
        (Path(path) / "model").write_text(str(step))

    def checkpoint_outcome(self, wait: bool) -> list[SaveOutcome]:
        return [SaveOutcome(done=True, seconds=0.5)]

    def load_checkpoint(self, path: str) -> None:
        self.log.append("load " + (Path(path) / "model").read_text())


class Logger:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.truncated_after: list[int | None] = []
        self.answers: list[tuple[int, str]] = []

    def truncate_after(self, step: int | None, metrics: dict[str, float] | None) -> None:
        self.truncated_after.append(step)

    def log(self, data: dict[str, float], step: int) -> None:
        self.lines.append((step, data))

    def log_answers(self, answers: list[dict[str, Any]], step: int) -> None:
        self.answers += [(step, answer["uid"]) for answer in answers]


def make_config(folder: Path, **trainer: Any) -> PPOConfig:
    config = PPOConfig(trainer=TrainerConfig(default_local_dir=str(folder), val_before_train=False, **trainer))
    config.data.train_batch_size = 4
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 4
    config.algorithm.adv_estimator = "on_policy_distill"
    config.algorithm.distill_adv_min_clip = -30.0
    config.algorithm.distill_adv_max_clip = 5.0
    return config


def make_trainer(
    config: PPOConfig,
    cls: type[RayPPOTrainer] = RayOnPolicyDistillTrainer,
    train_dataset: Prompts | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    trainer: Any = cls(config, Tokenizer(), {}, train_dataset or Prompts(), **options)  # type: ignore[arg-type]
    log: list[str] = []
    trainer.agent_loop_manager = Engines(log)
    trainer.actor_wg = Ranks(log)
    trainer.role_groups = {"actor": trainer.actor_wg, "ref": trainer.actor_wg}
    trainer.logger = Logger()
    return trainer, log


def bare_trainer(
    config: PPOConfig | None = None, cls: type[RayPPOTrainer] = RayOnPolicyDistillTrainer, **parts: Any
) -> Any:
    """A trainer that has its settings and these parts alone."""
    trainer = object.__new__(cls)
    vars(trainer).update(config=config or PPOConfig(), stage_metrics={}, **parts)
    return trainer
