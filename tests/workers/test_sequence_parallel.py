"""Ranks that share rows do what one rank does by itself, to 1e-6: gradients, metrics and scores of every objective.

And hybrid sharding does what sharding over all ranks does, with shared rows and without, checkpoints included.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import LEAK, Models, read_so, scored, with_own_prompts, workers

from verl.config import ActorRolloutRefConfig, DistillConfig, FSDPConfig, OptimizerConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.actor.losses import UPDATE_SCORES
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

ROW_BY_ROW = {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 1}
TOLERANCE = 1e-6


class Case(NamedTuple):
    """A student and its objective."""

    student: Path
    distill: DistillConfig
    teachers: int
    actor: dict[str, Any] | None = None
    lora_rank: int = 0
    own_prompts: bool = False

    def config(self, models: Models, ranks: int = 1, fsdp_size: int = -1) -> ActorRolloutRefConfig:
        """Settings for groups of so many ranks, whose micro-batches are as large as those of one."""
        actor = {"ppo_max_token_len_per_gpu": 24, **(self.actor or {})}
        actor["ppo_max_token_len_per_gpu"] //= ranks
        ref: dict[str, Any] = {"log_prob_max_token_len_per_gpu": actor["ppo_max_token_len_per_gpu"]}
        of_both = {"ulysses_sequence_parallel_size": ranks, "fsdp_config": FSDPConfig(fsdp_size=fsdp_size)}
        return models.config(
            self.student, actor={**actor, **of_both}, ref={**ref, **of_both}, model={"lora_rank": self.lora_rank}
        )


def make_cases(models: Models, folder: Path, tokenizer: Path) -> dict[str, Case]:
    """Every objective; by tokens, and row by row, where a rank has a part of a row, or no scored position at all."""
    one_key_head = tiny.write_model(folder / "one_key_head", tokenizer, key_heads=1)
    policy = {"entropy_coeff": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.5, "loss_agg_mode": "seq-mean-token-mean"}
    return {
        "sampled": Case(models.student, models.distill("sampled"), 1, policy),
        "sampled, row by row": Case(one_key_head, models.distill("sampled"), 1, policy | ROW_BY_ROW),
        "exact, three teachers": Case(models.untied, models.distill(teachers=3, support="shared", **LEAK), 3),
        "exact, other prompts": Case(models.untied, models.distill(teachers=3, **LEAK), 3, own_prompts=True),
        "exact beside a reward, row by row": Case(
            models.student, models.distill(teachers=2, support="full", coef=0.7, **LEAK), 2, ROW_BY_ROW
        ),
        "forward_kl": Case(models.student, models.distill("forward_kl", support="full"), 1),
        "jsd": Case(one_key_head, models.distill("jsd", 3, support="shared"), 3),
        "topk": Case(models.student, models.distill("topk", 3, topk=4, support="full", **LEAK), 3),
        "adapter": Case(
            models.student, DistillConfig("exact", teachers={"self": TeacherConfig(sources=["rec_*"])}), 2, lora_rank=4
        ),
    }


def make_batch(models: Models, teachers: int) -> DataProto:
    """Rows of all lengths, of which one trains nothing, with scores of a reference for the policy loss."""
    batch = models.batch(teachers)
    batch.tensor("response_mask")[2] = 0
    reference = (batch.tensor("old_log_probs") + 0.2).masked_fill(
        batch.tensor("distill_special_token_mask").bool(), -40.0
    )
    return batch.union(DataProto.from_dict({"ref_log_prob": reference}))


def seen_of(case: Case, models: Models, ranks: int) -> dict[str, Any]:
    """One update in groups of so many ranks, and everything that can be seen of it."""
    student = workers(case.config(models, ranks), case.distill)
    batch = make_batch(models, case.teachers)
    seen = {"before": dict(student.compute_log_prob(batch).batch)}
    if case.distill.objective != "sampled":
        batch.pop(["ref_log_prob"])
    if case.distill.objective == "topk":
        batch = scored(student.colocated_roles, case.distill, batch)
        seen["before"] |= {key: batch.tensor(key) for key in ("ref_log_prob", "teacher_top_log_probs")}
    else:
        for role in case.distill.roles:
            scores = student.colocated_roles[role].compute_ref_log_prob(batch)
            seen["before"] |= {role: scores.tensor("ref_log_prob")}
        batch.pop(["old_log_probs"])  # the update's own pass gives them
    if case.own_prompts:
        batch = read_so(batch, with_own_prompts(batch))
    batch.meta_info["keeps_divergence"] = True
    updated = student.update_actor(batch)
    parameters = [p for p in student._state.module.parameters() if p.requires_grad]
    gradient = [tiny.whole(student._state.optimizer.state[p]["exp_avg"]) / (1 - tiny.ADAM_BETA1) for p in parameters]
    seen["scores"] = {key: updated.tensor(key) for key in UPDATE_SCORES if key in updated.batch}
    return seen | {"metrics": updated.meta_info["metrics"], "gradient": dict(enumerate(gradient))}


def rank_program(cases: dict[str, Case], models: Models, ranks: int, folder: Path) -> None:
    """On each rank: all cases, in one group."""
    seen = {name: seen_of(case, models, ranks) for name, case in cases.items()}
    torch.save(seen, folder / f"seen_{os.environ['RANK']}.pt")


def test_ranks_that_share_rows_do_what_one_does(
    models: Models, tiny_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    cases = make_cases(models, tmp_path, tiny_tokenizers[1])
    tiny.run_ranks(2, rank_program, cases, models, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"seen_{rank}.pt") for rank in range(2)]
    for name, case in cases.items():
        one = seen_of(case, models, 1)
        assert max(float(value.abs().max()) for value in one["gradient"].values()) > 1e-3, name
        for seen in (of_rank[name] for of_rank in ranks):
            assert seen["metrics"] == pytest.approx(one["metrics"], rel=TOLERANCE, abs=TOLERANCE), name
            for part in ("before", "scores", "gradient"):
                torch.testing.assert_close(seen[part], one[part], rtol=TOLERANCE, atol=TOLERANCE)


LAYOUTS = {"all": (1, -1), "hybrid": (1, 2), "hybrid, shared rows": (2, 2), "copies, shared rows": (4, 1)}
"""Ranks that share rows, and ranks that a model is sharded over."""
READ = {"all": "hybrid", "hybrid": "all", "hybrid, shared rows": "copies, shared rows"}
"""Whose checkpoint a layout goes on from."""


def state_of(student: StudentWorker) -> dict[str, dict[str, torch.Tensor]]:
    """Whole weights and first moments."""
    return {"weights": tiny.weights_of(student), "moments": tiny.first_gradient(student)}


def hybrid_program(case: Case, models: Models, folder: Path) -> None:
    """On each of four ranks: two updates and a checkpoint in every layout; then a third, and another's checkpoint."""
    students, rank = {}, int(os.environ["RANK"])
    for name, (ranks, fsdp_size) in LAYOUTS.items():
        student = students[name] = workers(case.config(models, ranks, fsdp_size), case.distill)
        share = make_batch(models, case.teachers).chunk(4 // ranks)[rank // ranks]
        metrics = [student.update_actor(share.select()).meta_info["metrics"] for _ in range(2)]
        tiny.save_checkpoint(student, folder / name)
        seen = {**state_of(student), "metrics": metrics, "exported": tiny.exported(student)}
        student.update_actor(share)
        torch.save(seen, folder / f"{name}_{rank}.pt")
    for name, other in READ.items():
        students[name].load_checkpoint(str(folder / other))
        torch.save(state_of(students[name]), folder / f"{name}_loaded_{rank}.pt")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_hybrid_sharding_does_what_sharding_over_all_ranks_does(models: Models, tmp_path: Path) -> None:
    # A gradient that is nearly 0 must not decide on a step by its rounding, so eps is large; and it is clipped.
    optim = OptimizerConfig(lr=1e-2, eps=1e-2, betas=(tiny.ADAM_BETA1, 0.999))
    frozen = {"freeze_extended_rows": True, "grad_clip": 0.1, "optim": optim, "ppo_max_token_len_per_gpu": 12}
    case = Case(models.untied, models.distill(teachers=2, support="shared", **LEAK), 2, frozen)
    tiny.run_ranks(4, hybrid_program, case, models, tmp_path)
    seen = {name: [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(4)] for name in LAYOUTS}
    right, start = seen["all"][0], {name: p.detach() for name, p in tiny.load_plain(models.untied).named_parameters()}
    assert max(float((value - start[name]).abs().max()) for name, value in right["weights"].items()) > 1e-3
    assert right["metrics"][0]["actor/grad_norm"] > 0.1
    for name, of_ranks in seen.items():
        for rank, found in enumerate(of_ranks):
            for part in ("weights", "moments"):
                torch.testing.assert_close(found[part], right[part], rtol=0, atol=TOLERANCE)
            for metrics, expected in zip(found["metrics"], right["metrics"], strict=True):
                assert metrics == pytest.approx(expected, rel=1e-5, abs=TOLERANCE), name
            assert_equal(found["exported"], of_ranks[0]["weights"] if rank == 0 else {})
        saved = tiny.load_plain(tmp_path / name / "huggingface").named_parameters()
        assert_equal({name: p.detach() for name, p in saved}, of_ranks[0]["weights"])
    for name, other in READ.items():
        for found in (torch.load(tmp_path / f"{name}_loaded_{rank}.pt") for rank in range(4)):
            for part in ("weights", "moments"):
                assert_equal(found[part], seen[other][0][part])
    alone = workers(case.config(models))
    alone.load_checkpoint(str(tmp_path / "hybrid"))
    assert_equal(tiny.weights_of(alone), seen["hybrid"][0]["weights"])
