"""Responses as JSON lines."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.utils.rollout_dump import dump_answers


class LetterTokenizer:
    """Id 0 is padding, the others letters from ``a`` = 1 on; ``é`` is 9."""

    def decode(self, ids: list[int]) -> str:
        return "".join("#abcdefghé"[token] for token in ids)


def test_rows_are_written_without_padding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {
        "prompts": [[0, 1], [2, 3]],
        "responses": [[4, 9, 0], [5, 0, 0]],
        "attention_mask": [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        "response_mask": [[1, 0, 0], [1, 0, 0]],
        "distill_special_token_mask": [[0, 1, 0], [0, 0, 0]],
        "token_level_scores": [[0.0, 1.5, 0.0], [0.0, 0.0, 0.0]],
    }
    arrays = {"uid": ["u0", "u1"], "data_source": ["math", "item"], "__num_turns__": [2, 4]}
    arrays["reward_model"] = [{"ground_truth": "d"}, None]
    reported = {"acc": np.bool_(True), "far": np.float32(0.5), "seen": np.arange(2), "input": "taken", "step": 3}
    arrays["reward_extra"] = [reported, {}]
    batch = DataProto.from_dict({key: torch.tensor(rows) for key, rows in tensors.items()}, arrays)
    dump_answers(tmp_path / "dump", 7, batch, LetterTokenizer(), [])
    path = tmp_path / "dump" / "7.jsonl"
    text = path.read_text(encoding="utf-8")
    assert "dé" in text, "readable, not escaped"
    first, second = map(json.loads, text.splitlines())
    texts = {"step": 7, "uid": "u0", "data_source": "math", "input": "a", "output": "dé", "gts": "d"}
    counts = {"response_tokens": 2, "trained_tokens": 1, "extend_tokens": 1, "num_turns": 2, "score": 1.5}
    assert first == texts | counts | {"acc": True, "far": 0.5, "seen": [0, 1]}
    assert (second["input"], second["output"], second["gts"]) == ("bc", "e", None)
    dump_answers(tmp_path / "dump", 7, batch[[0]], LetterTokenizer(), [])
    assert len(path.read_text().splitlines()) == 1, "a step that is run again replaces its file"
    dump_answers(path / "below_a_file", 7, batch, LetterTokenizer(), [])  # an error in the log, and the run goes on
    assert "the answers of step 7 are not in" in caplog.text
    caplog.clear()
    (tmp_path / "dump" / "7.tokens.parquet").unlink()
    (tmp_path / "dump" / "7.tokens.parquet").mkdir()
    dump_answers(tmp_path / "dump", 7, batch, LetterTokenizer(), [])
    assert "the answers of step 7 are not in" in caplog.text
