"""Folders of training runs as a run leaves them, made by hand: records of tokens, lines beside them, metrics."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.experimental.agent_loop.masks import trainable_mask
from verl.protocol import DataProto
from verl.utils.rollout_dump import dump_answers
from verl.utils.tracking import FileBackend

ODD = "</script><b>bold</b><!-- & \u2028\t"
EMOJI = "\U0001f600"
TEACHER, ITSELF = "ref", "self"
GENERAL, REC = "general", "rec_next"
PROMPTS = (
    (GENERAL, "What is 17 + 25?", "17 + 25 is 42.\nSo the answer is 42."),
    (GENERAL, "Sort these letters: g a o f", "In the order of the alphabet:\n\n1. a\n2. f\n3. g\n4. o"),
    (
        GENERAL,
        "Why is the sky blue?",
        "Sunlight holds all colours. Air scatters short waves more than long ones, so blue light reaches us from all "
        "sides, while red light passes nearly straight.\n\nIn the evening the way through the air is longer: most of "
        "the blue is lost on it, and what is left looks red.",
    ),
    (REC, "The user liked <s_a_3><s_b_1>. What comes next?", "<s_a_3><s_b_7> fits: it is by the same hand."),
    (GENERAL, f"Escape this: {ODD}", f"As text: {ODD} and a smile {EMOJI}."),
    (REC, "Name an item that goes with tea.", "<s_a_5><s_b_2>, a book about porcelain."),
)
SYSTEM = "You are a careful assistant. Answer in plain words, and say so where you do not know. " * 9


class Pieces:
    """A tokenizer of words and signs; a character beyond two bytes is two tokens, each of which is no text alone."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def encode(self, text: str) -> list[int]:
        found: list[bytes] = []
        for piece in re.findall(r"</?\w+>| ?\w+|\s|.", text, re.DOTALL):
            raw = piece.encode()
            found += [raw[:2], raw[2:]] if len(piece) == 1 and len(raw) > 3 else [raw]
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in found]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[token] for token in ids).decode(errors="replace")


def write_run(
    folder: Path, steps: int = 4, rows: int = 12, test_freq: int = 2, length: int = 0, measure: str = "divergence"
) -> Path:
    """Write a run and return its folder: ``rows`` training answers a step, validation of each of `PROMPTS` at step 0
    and every ``test_freq``.

    Args:
        length: of every answer, in tokens; 0: as its text has them.
        measure: batch key of the signal, ``divergence`` or ``advantages``.
    """
    tokenizer, generator = Pieces(), torch.Generator().manual_seed(0)
    items = set(tokenizer.encode("".join(f"<s_a_{n}><s_b_{n}>" for n in range(10))))
    log = FileBackend(folder)
    for step in range(steps + 1):
        metrics: dict[str, float] = {}
        if step:
            batch = _batch(tokenizer, items, step, rows, length, generator)
            signal = (batch.tensor("old_log_probs") - batch.tensor("ref_log_prob")) * batch.tensor("response_mask")
            batch.union(DataProto.from_dict({measure: signal.abs() if measure == "divergence" else -signal}))
            dump_answers(folder / "rollouts", step, batch, tokenizer, (TEACHER, ITSELF))
            metrics |= _metrics(batch, measure) | {"timing_s/step": 2 + 1 / step, "actor/lr": 1e-5}
        if step % test_freq == 0:
            batch = _batch(tokenizer, items, step, len(PROMPTS), 0, generator)
            dump_answers(folder / "answers", step, batch, tokenizer, (TEACHER, ITSELF))
            of = _metrics(batch, None)
            metrics |= {
                f"val/{name.split('/')[1]}": of[name] for name in ("distill/reverse_kl", "distill/extend_seq_ratio")
            }
        log.log(metrics, step)
    log.finish({})
    run = {"default_local_dir": str(folder), "rollout_data_dir": "rollouts", "validation_data_dir": "answers"}
    (folder / "config.yaml").write_text("trainer:\n" + "".join(f"  {key}: {value}\n" for key, value in run.items()))
    return folder


def _batch(
    tokenizer: Pieces, items: set[int], step: int, rows: int, length: int, generator: torch.Generator
) -> DataProto:
    """Answers to the first prompts, over and over; a general one in four leaks in early steps."""
    texts = [PROMPTS[row % len(PROMPTS)] for row in range(rows)]
    answers = [tokenizer.encode(answer) for _, _, answer in texts]
    for row, ids in enumerate(answers):
        if texts[row][0] == GENERAL and step < 3 and row % 4 == 0:
            ids[3:3] = tokenizer.encode("<s_a_7><s_b_2>")
        answers[row] = (ids * (1 + length // len(ids)))[:length] if length else ids
    prompts = [tokenizer.encode(f"{SYSTEM if row == 0 else ''}{prompt}\n") for row, (_, prompt, _) in enumerate(texts)]
    columns: dict[str, list[torch.Tensor]] = {}
    for (source, *_), ids in zip(texts, answers, strict=True):
        extended = [int(token in items) for token in ids]
        knows = source == REC
        mask = trainable_mask([1] * len(ids), extended, keep_rest=knows)
        row = {"responses": ids, "response_mask": mask, "distill_special_token_mask": extended}
        for key, values in row.items():
            columns.setdefault(key, []).append(torch.tensor(values))
    tensors = {key: torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for key, values in columns.items()}
    left = [torch.tensor(ids).flip(0) for ids in prompts]
    tensors["prompts"] = torch.nn.utils.rnn.pad_sequence(left, batch_first=True).flip(1)
    reals = [
        torch.nn.utils.rnn.pad_sequence([torch.ones(len(ids), dtype=int) for ids in some], batch_first=True)
        for some in (prompts, answers)
    ]
    tensors["attention_mask"] = torch.cat([reals[0].flip(1), reals[1]], dim=1)
    shape = tensors["responses"].shape
    student = -(torch.rand(shape, generator=generator) ** 3) * 4
    gap = (torch.randn(shape, generator=generator) ** 3 / 3 + 0.3) / (1 + step)
    others = {"old_log_probs": student, "ref_log_prob": student - gap, "entropys": -student / 2}
    others |= {"extend_mass": torch.rand(shape, generator=generator) ** 8, "token_level_scores": torch.zeros(shape)}
    others["token_level_scores"][:, 0] = torch.rand(shape[0], generator=generator).round()
    others["teacher"] = torch.tensor([int(source == REC) for source, *_ in texts])
    names: dict[str, Any] = {
        "uid": [f"{step}-{row}" for row in range(rows)],
        "index": [row % len(PROMPTS) for row in range(rows)],
        "source": [source for source, *_ in texts],
        "teacher_knows_extended": np.array([source == REC for source, *_ in texts], dtype=object),
        "reward_model": np.array([{"ground_truth": answer} for *_, answer in texts], dtype=object),
    }
    return DataProto.from_dict(tensors | others, names, {"weight_version": max(0, step - 1)})


def _metrics(batch: DataProto, measure: str | None) -> dict[str, float]:
    """What a run says of a batch, from its tensors."""
    trained, items = (batch.tensor(key).bool() for key in ("response_mask", "distill_special_token_mask"))
    gap = batch.tensor("old_log_probs") - batch.tensor("ref_log_prob")
    lengths = batch.tensor("attention_mask")[:, -trained.shape[1] :].sum(dim=1).float()
    metrics = {"distill/reverse_kl": gap[trained & ~items].mean(), "response_length/mean": lengths.mean()}
    metrics["distill/extend_seq_ratio"] = items.any(dim=1).float().mean()
    if measure is not None:
        name = {"divergence": "actor/distill_divergence", "advantages": "critic/advantages/mean"}[measure]
        metrics[name] = batch.tensor(measure)[trained].double().mean()
    return {name: float(value) for name, value in metrics.items()}
