"""A teacher stitched of a served base teacher and a model in this process, against both models in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import LEAK, TEMPERATURE, Models, dense, distill_loss, scored, teacher_workers, workers
from support.fake_server import FakeServer

from verl.config import DistillConfig, TeacherConfig
from verl.ops.linear_log_prob import LinearLogProbs, StitchedLogProbs, score_tokens
from verl.workers.actor.teachers import TOP_TENSORS, ServedStitchedLogProbs
from verl.workers.model_workers import StudentWorker
from verl.workers.served_teacher import ServedTeacher, StitchedGroup

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def servers(models: Models) -> Iterator[dict[bool, FakeServer]]:
    """Of the base teacher: whether a server hides no row of the head, and the server."""
    both = {cut: FakeServer(models.teacher, rows=models.extend_start if cut else None) for cut in (True, False)}
    yield both
    for server in both.values():
        server.close()


def served_base(
    models: Models, server: FakeServer, distill: DistillConfig, temperature: float, student: StudentWorker | None = None
) -> dict[str, Any]:
    """The teachers by role, of which the base teacher is served and the others are models, beside a student."""
    config = models.config(ref={"url": [server.url]}, rollout={"temperature": temperature})
    config.model = student.config.model if student else config.model
    own = {role: worker for role, worker in teacher_workers(config, distill).items() if role != "ref"}
    base = ServedTeacher(config, topk=distill.topk_or_none)
    base.init_model()
    for worker in own.values():
        worker.colocated_roles = {"actor": student, **own} if student else own
        worker.init_model()
    mixed: Any = own["mixed"]
    return {**own, "ref": base, "mixed": StitchedGroup(base, mixed)}


@pytest.mark.parametrize("topk", [1, 4, 30])
def test_from_the_likeliest_ids_come_those_of_both_models(topk: int) -> None:
    """Every id as the token that was drawn; the others' mass is what is left."""
    draw = torch.Generator().manual_seed(topk)
    hidden, head = torch.randn(40, 5, generator=draw), torch.randn(40, 5, generator=draw)
    base, own = LinearLogProbs(hidden, head, 28), LinearLogProbs(hidden.flip(0), head, 40)
    labels = torch.arange(40)
    drawn, top = score_tokens(base, labels, -50.0, topk=topk)
    assert top is not None
    known, is_other = labels < 28, (labels < 28) & (top.ids != labels[:, None]).all(1)
    others = torch.where(is_other, (top.rest.exp() - drawn.exp()).clamp(min=0).log(), top.rest)
    token = labels.where(known, 0)[:, None], drawn.where(known, -torch.inf)[:, None]
    partly = ServedStitchedLogProbs(own, 28, *token, top.ids, top.log_probs, others)
    found, right = (score_tokens(each, labels, -50.0, topk=topk) for each in (partly, StitchedLogProbs(base, own)))
    torch.testing.assert_close(found[0], right[0], rtol=0, atol=1e-5)
    assert found[1] is not None and right[1] is not None
    assert torch.equal(found[1].ids, right[1].ids)
    torch.testing.assert_close(found[1].log_probs, right[1].log_probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1].rest.exp(), right[1].rest.exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("topk", "temperature"), [(None, 1.0), (3, 1.0), ("shared", TEMPERATURE), ("all", 1.0)])
def test_scores_are_those_of_both_models_in_the_process(
    topk: Any, temperature: float, models: Models, servers: dict[bool, FakeServer]
) -> None:
    """Where all shared ids are named and asked for, also behind a server whose head has further rows."""
    cut = topk != "shared"
    topk = {"shared": models.extend_start, "all": models.ids}.get(topk, topk)
    distill = models.distill("topk", 3, topk=topk or 8)
    if topk is None:
        further = distill.teachers.items()
        distill = DistillConfig(teachers={name: TeacherConfig(t.path, t.vocabulary, t.sources) for name, t in further})
    right = scored(workers(models.config(), distill).colocated_roles, distill, models.batch(3, temperature))
    roles = served_base(models, servers[cut], distill, temperature)
    found = scored(roles, distill, models.batch(3, temperature))
    torch.testing.assert_close(found.tensor("ref_log_prob"), right.tensor("ref_log_prob"), rtol=0, atol=1e-4)
    if topk:
        torch.testing.assert_close(dense(found, models.ids), dense(right, models.ids), rtol=0, atol=1e-4)
        rest = [each.tensor(TOP_TENSORS[2])[each.tensor("response_mask").bool()].exp() for each in (found, right)]
        torch.testing.assert_close(*rest, rtol=0, atol=1e-5)
    # Validation and the probe, which score every token.
    mixed = workers(models.config(), distill).colocated_roles["mixed"]
    again, alone = (each.compute_ref_log_prob(models.batch(3, temperature)) for each in (roles["mixed"], mixed))
    torch.testing.assert_close(again.tensor("ref_log_prob"), alone.tensor("ref_log_prob"), rtol=0, atol=1e-4)


def test_the_other_part_may_be_the_student_without_its_adapter(
    models: Models, servers: dict[bool, FakeServer], tmp_path: Path
) -> None:
    """Whatever the adapter has become, the scores are those of the student's own files as a model beside it."""
    copy, found = tmp_path / "copy", []
    copy.symlink_to(models.untied)
    for path in (None, str(copy)):
        distill = DistillConfig("topk", topk=8, teachers={"mixed": TeacherConfig(path, "stitched")})
        student = workers(models.config(models.untied, model={"lora_rank": 4}))
        student.update_actor(tiny.with_loss_inputs(models.batch()))
        found.append(scored(served_base(models, servers[True], distill, 1.0, student), distill, models.batch(2, 1.0)))
    for key in ("ref_log_prob", *TOP_TENSORS):
        assert torch.equal(found[0].tensor(key), found[1].tensor(key)) and found[0].tensor(key).any()


@pytest.mark.parametrize("topk", [8, "shared"])
def test_losses_are_those_of_both_models_in_the_process(
    topk: Any, models: Models, servers: dict[bool, FakeServer]
) -> None:
    topk = models.extend_start if topk == "shared" else topk
    distill = models.distill("topk", 3, topk=topk, support="shared", **LEAK)
    right, gradient = distill_loss(models, workers(models.config(), distill).colocated_roles, distill)
    found, of_served = distill_loss(models, served_base(models, servers[True], distill, 1.0), distill)
    assert found == pytest.approx(right, abs=1e-5)
    tiny.assert_same_gradient(of_served, gradient, atol=1e-5)


@pytest.mark.parametrize("topk", [8, 64])
def test_the_loss_is_at_most_the_whole_divergence_and_the_bound(
    topk: int, models: Models, servers: dict[bool, FakeServer]
) -> None:
    """Behind a server that hides rows past the shared ids, as for the base teacher alone; weights are 1.3."""
    whole, some = (models.distill("topk", 3, topk=k, support="shared") for k in (models.ids, topk))
    exact, _ = distill_loss(models, workers(models.config(), whole).colocated_roles, whole)
    roles = served_base(models, servers[False], some, 1.0)
    scores = roles["mixed"].score_for_update(models.batch(3, 1.0))
    bound = scores.meta_info["metrics"]["distill/teacher_log_prob_bound"]
    found, _ = distill_loss(models, roles, some)
    assert 0 < found <= exact + 1.3 * bound and bound > 1e-3
