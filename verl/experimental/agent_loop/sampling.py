"""What the engine samples with, and each sample's own seed.

In: the rollout settings and a batch of prompts. Out: one dict of sampling parameters for the batch, one seed per row.
A seed comes from the run's seed, the step, the row's ``uid`` and its number among the answers to that prompt, so
neither the number of agent-loop workers nor the order of the prompts changes a sample.
"""

import hashlib
from collections import Counter
from typing import Any

from verl.config import RolloutConfig
from verl.protocol import DataProto

SEED_KEY = "sample_seed"
"""Column that carries the seeds from the manager to the agent-loop workers."""


def sampling_params(rollout: RolloutConfig, validate: bool) -> dict[str, Any]:
    """Sampling parameters for training, or for validation (``rollout.val_kwargs``); ``seed`` comes with each row."""
    settings = rollout.val_kwargs if validate else rollout
    greedy = validate and not rollout.val_kwargs.do_sample
    return {
        "temperature": 0.0 if greedy else settings.temperature,
        "top_p": 1.0 if greedy else settings.top_p,
        "top_k": -1 if greedy else settings.top_k,
        "ignore_eos": rollout.ignore_eos,
        "logprobs": rollout.calculate_log_probs,
    }


def sample_seeds(seed: int, prompts: DataProto) -> list[int]:
    """One seed per row, below 2^31."""
    step, validate = prompts.meta_info["global_steps"], bool(prompts.meta_info["validate"])
    answers: Counter[Any] = Counter()
    seeds = []
    for uid in prompts.array("uid"):
        text = f"{seed}|{step}|{validate}|{uid}|{answers[uid]}"
        answers[uid] += 1
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)
    return seeds
