"""Responses as JSON lines."""

import json
from pathlib import Path

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.rollout_dump import dump_generations


class LetterTokenizer:
    """Id 0 is padding, the others letters from ``a`` = 1 on; ``é`` is 9."""

    def decode(self, ids: list[int]) -> str:
        return "".join("#abcdefghé"[token] for token in ids)


def test_rows_are_written_without_padding(tmp_path: Path) -> None:
    batch = DataProto.from_dict(
        {
            "prompts": torch.tensor([[0, 1], [2, 3]]),
            "responses": torch.tensor([[4, 9, 0], [5, 0, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
            "response_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
            "distill_special_token_mask": torch.tensor([[0, 1, 0], [0, 0, 0]]),
            "token_level_scores": torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 0.0]]),
        },
        {
            "uid": np.array(["u0", "u1"], dtype=object),
            "data_source": np.array(["math", "item"], dtype=object),
            "reward_model": np.array([{"ground_truth": "d"}, None], dtype=object),
            "__num_turns__": np.array([2, 4], dtype=object),
        },
    )
    path = dump_generations(tmp_path / "dump", 7, batch, LetterTokenizer())
    assert path == tmp_path / "dump" / "7.jsonl"
    text = path.read_text(encoding="utf-8")
    assert "dé" in text, "readable, not escaped"
    first, second = map(json.loads, text.splitlines())
    assert first == {
        "step": 7,
        "uid": "u0",
        "data_source": "math",
        "input": "a",
        "output": "dé",
        "gts": "d",
        "response_tokens": 2,
        "trained_tokens": 1,
        "extend_tokens": 1,
        "num_turns": 2,
        "score": 1.5,
    }
    assert (second["input"], second["output"], second["gts"]) == ("bc", "e", None)
    dump_generations(tmp_path / "dump", 7, batch[[0]], LetterTokenizer())
    assert len(path.read_text().splitlines()) == 1, "a step that is run again replaces its file"
