"""Two ranks do what one does: gradients, metrics, scores, exported weights, checkpoints, from one to the other.

And an update that is not finite leaves weights and optimizer as they were, to the bit, on both ranks: three
mini-batches, of which the second is poisoned in a row of the last rank, against the first and the third alone.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import Models, lone_teacher, workers
from support.file_faults import full_disk

from verl import model_merger
from verl.config import ActorRolloutRefConfig
from verl.protocol import DataProto
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS = 8


def run_student(config: ActorRolloutRefConfig, share: DataProto, other: DataProto, folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint between them, and everything that can be seen on the way."""
    worker = workers(config)
    teacher = lone_teacher(config)  # a second role in the process joins the group that is there
    seen: dict[str, Any] = {"scores": dict(worker.compute_log_prob(share).batch), "paths": []}
    seen["buffers"] = dict(worker._state.module.named_buffers())  # which no file holds
    seen["ref"] = dict(teacher.compute_ref_log_prob(share).batch)
    seen["metrics"] = worker.update_actor(share).meta_info["metrics"]
    seen["gradient"] = tiny.first_gradient(worker)
    tiny.save_checkpoint(worker, folder / "checkpoint")
    seen["saved_scores"] = worker.compute_log_prob(share).tensor("old_log_probs")
    seen["weights"] = tiny.exported(worker, seen["paths"])
    with full_disk(2_000) if worker.rank == 1 else nullcontext():
        worker.begin_checkpoint(str(folder / "full"), 1)
        seen["failed_save"] = worker.checkpoint_outcome(wait=True)
    seen["next"] = next_step(worker, other)
    return seen


def next_step(worker: StudentWorker, share: DataProto) -> dict[str, Any]:
    """The second step of a run: its metrics, and the moments after it."""
    return {"metrics": worker.update_actor(share).meta_info["metrics"], "moments": tiny.first_gradient(worker)}


def resumed_step(config: ActorRolloutRefConfig, share: DataProto, checkpoint: Path) -> dict[str, Any]:
    """The second step of a run that goes on from a checkpoint."""
    worker = workers(config)
    worker.load_checkpoint(str(checkpoint))
    return next_step(worker, share)


def rank_program(cases: list[tuple[ActorRolloutRefConfig, DataProto, DataProto, Path]]) -> None:
    """What each of the two ranks runs: its share of every case."""
    for config, batch, other, folder in cases:
        rank = int(os.environ["RANK"])
        seen = run_student(config, batch.chunk(2)[rank], other.chunk(2)[rank], folder)
        seen["resumed"] = resumed_step(config, other.chunk(2)[rank], folder / "alone" / "checkpoint")
        torch.save(seen, folder / f"seen_{rank}.pt")


def make_batches(models: Models) -> tuple[DataProto, DataProto]:
    """A batch of which the second rank trains little, and one of which it trains nothing."""
    batch, other = (
        tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(ROWS, models.ids, seed), models.extend_start), seed)
        for seed in (0, 5)
    )
    batch.tensor("response_mask")[5:] = 0
    other.tensor("response_mask")[ROWS // 2 :] = 0
    for data in (batch, other):
        unknown = data.tensor("distill_special_token_mask").bool()
        scores = (data.tensor("old_log_probs") + 0.2).masked_fill(unknown, -100)
        data.union(DataProto.from_dict({"ref_log_prob": scores}))
    return batch, other


def test_two_ranks_do_what_one_does(tiny_tokenizers: tuple[Path, Path], models: Models, tmp_path: Path) -> None:
    terms = {"entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.5, "ppo_max_token_len_per_gpu": 24}
    cases = []
    for tied, mode, padded in ((True, "token-mean", False), (False, "seq-mean-token-mean", True)):
        folder = tmp_path / mode
        model = tiny.write_model(folder / "model", tiny_tokenizers[1], tied=tied, rows=models.ids + 6)  # an odd number
        settings = {"actor": {**terms, "loss_agg_mode": mode}, "model": {"use_remove_padding": padded}}
        config = tiny.worker_config(model, extend_start=models.extend_start, **settings)
        cases.append((config, *make_batches(models), folder))
    alone = [run_student(config, batch, other, folder / "alone") for config, batch, other, folder in cases]
    tiny.run_ranks(2, rank_program, cases)
    for (config, _, other, folder), one in zip(cases, alone, strict=True):
        two = [torch.load(folder / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
        check_scores(one, two)
        check_gradient(one, two)
        check_weights(folder, two)
        check_export(models.ids, folder, two)
        check_failed_save(folder, two)
        check_resumed(two[0]["next"], resumed_step(config, other, folder / "checkpoint"))  # two ranks, then one
        check_resumed(one["next"], two[0]["resumed"])  # one rank, then two


def check_scores(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert all(torch.equal(one["buffers"][name], value) for seen in two for name, value in seen["buffers"].items())
    for role in ("scores", "ref"):
        for key, value in one[role].items():
            joined = torch.cat([seen[role][key] for seen in two])
            torch.testing.assert_close(joined, value, rtol=0, atol=1e-5)


def check_gradient(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["metrics"] == two[1]["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    for seen in two:
        tiny.assert_same_gradient(seen["gradient"], one["gradient"])


def check_weights(folder: Path, two: list[dict[str, Any]]) -> None:
    """One rank of the machine writes, its files are gone, and what they held is what the checkpoint holds."""
    assert two[0]["paths"] and not two[1]["paths"] and not two[1]["weights"]
    assert not any(Path(path).exists() for path in two[0]["paths"])
    plain = dict(tiny.load_plain(folder / "checkpoint" / "huggingface").named_parameters())
    assert two[0]["weights"].keys() == plain.keys()
    assert all(torch.equal(two[0]["weights"][name], value) for name, value in plain.items())


def check_export(student_ids: int, folder: Path, two: list[dict[str, Any]]) -> None:
    """The shards of two ranks alone become the model that the two had."""
    actor, target = folder / "checkpoint", folder / "merged"
    for path in (actor / "huggingface").glob("*.safetensors"):
        path.unlink()
    command = ["merge", "--backend", "fsdp", "--local_dir", str(actor), "--target_dir", str(target)]
    assert model_merger.main(command) == 0
    assert model_merger.main(command) == 1, "a model is not written over"
    plain = tiny.load_plain(target)
    assert all(torch.equal(two[0]["weights"][name], value) for name, value in plain.named_parameters())
    assert plain.get_input_embeddings().weight.shape[0] == student_ids + 6
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == plain.config.tie_word_embeddings


def check_failed_save(folder: Path, two: list[dict[str, Any]]) -> None:
    """The rank that could not write names the cause; the other one neither waits for it nor exports half a model."""
    well, failed = (seen["failed_save"] for seen in two)
    assert well.done and not well.error and "File too large" in failed.error
    assert not (folder / "full" / "huggingface").exists()


def check_resumed(right: dict[str, Any], got: dict[str, Any]) -> None:
    """A run that goes on with another number of ranks takes the step that it would have taken."""
    assert got["metrics"] == pytest.approx(right["metrics"], rel=1e-5, abs=1e-5)
    tiny.assert_same_gradient(got["moments"], right["moments"], atol=1e-5)


STEP_ROWS = 4
ANSWER = ([7, 8], [20, 21, 22, 23])
CASES: dict[str, tuple[dict[str, Any], str, float]] = {
    "advantage": ({}, "advantages", float("nan")),
    # The gradient of log p - log q is finite wherever that of log p is: the loss alone tells.
    "loss alone": ({"use_kl_loss": True, "kl_loss_type": "kl"}, "ref_log_prob", float("-inf")),
}
"""Settings of the actor, and what is poisoned by what."""


def mini_batches(student_ids: int, key: str, poison: float) -> list[DataProto]:
    """Three of them; the last row of the second is poisoned at one trained token."""
    parts = []
    for seed in range(3):
        part = tiny.with_loss_inputs(tiny.rollouts([*tiny.draw_rows(STEP_ROWS - 1, student_ids, seed), ANSWER]), seed)
        parts.append(part.union(DataProto.from_dict({"ref_log_prob": part.tensor("old_log_probs") + 0.2})))
    parts[1].tensor(key)[-1, 2] = poison
    return parts


def skip_program(model: Path, student_ids: int, folder: Path) -> None:
    """Metrics and state with the poisoned mini-batch, and without it."""
    rank, seen = int(os.environ["RANK"]), {}
    for case, (actor, key, poison) in CASES.items():
        parts = mini_batches(student_ids, key, poison)
        for name, used in ((case, parts), (f"{case} left out", parts[::2])):
            worker = workers(tiny.worker_config(model, rows_per_step=STEP_ROWS, actor=actor))
            share = DataProto.concat([part.chunk(2)[rank] for part in used])
            seen[name] = worker.update_actor(share).meta_info["metrics"], tiny.state_of(worker)
    torch.save(seen, folder / f"seen_{rank}.pt")


def test_two_ranks_skip_what_one_of_them_cannot_take(models: Models, tmp_path: Path) -> None:
    tiny.run_ranks(2, skip_program, models.student, models.ids, tmp_path)
    ranks = [torch.load(tmp_path / f"seen_{rank}.pt", weights_only=False) for rank in range(2)]
    for case in CASES:
        for seen in ranks:
            (metrics, state), (without, expected) = seen[case], seen[f"{case} left out"]
            assert (metrics["actor/updates"], metrics["actor/skipped_updates"]) == (2, 1)
            assert (without["actor/updates"], without["actor/skipped_updates"]) == (2, 0)
            assert not torch.tensor(metrics["actor/loss"]).isfinite()
            assert bool(torch.tensor(metrics["actor/grad_norm"]).isfinite()) == (case == "loss alone")
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items())
        first, second = (str(seen[case][0]["actor/loss"]) for seen in ranks)
        assert first == second, "the same metric on both, though one of them has the poison"
