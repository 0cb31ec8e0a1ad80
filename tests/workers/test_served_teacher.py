"""A teacher behind URLs against the same model in this process, and what becomes of servers that fail."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import LEAK, TEMPERATURE, Models, dense, distill_loss, scored, workers
from support.fake_server import FakeServer

from verl.config import DistillConfig, TeacherConfig
from verl.single_controller.base import WorkerError
from verl.workers import served_teacher, teacher_servers
from verl.workers.actor.teachers import TOP_TENSORS
from verl.workers.served_teacher import ServedTeacher, served_scores
from verl.workers.teacher_servers import Endpoint, TeacherServers

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[FakeServer]:
    """The base teacher, whose head has rows past the shared ids."""
    fake = FakeServer(models.teacher)
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def flush(models: Models, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """With a base teacher whose head has no rows past the shared ids, so that a server hides nothing."""
    folder = tmp_path_factory.mktemp("flush")
    teacher = tiny.write_model(folder, tiny_tokenizers[0], rows=models.extend_start, seed=1)
    return models._replace(teacher=teacher)


@pytest.fixture(scope="module")
def flush_server(flush: Models) -> Iterator[FakeServer]:
    fake = FakeServer(flush.teacher)
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def short_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_servers, "PULSE_S", 2.0)
    monkeypatch.setattr(teacher_servers, "PAUSE_S", 0.01)


def served(models: Models, urls: list[str], topk: int | None = None, temperature: float = 1.0, **ref: Any) -> Any:
    """A teacher ``ref`` behind these URLs, connected."""
    config = models.config(ref={"url": urls, **ref}, rollout={"temperature": temperature})
    teacher = ServedTeacher(config, topk=topk)
    teacher.init_model()
    return teacher


# ------------------------------------------------------------------ scores and losses


def test_by_hand() -> None:
    """Ids 0 to 3 are shared, 4 is not; the server names the two likeliest and the token."""
    probs = {0: 0.5, 4: 0.2, 2: 0.1}  # 1 and 3 have the other 0.2
    entry = {str(token): {"logprob": torch.tensor(p).double().log().item()} for token, p in probs.items()}
    found = served_scores([entry], torch.tensor([2]), 4, 2)
    # No other id is likelier than the second, so that 1 and 3 have 0.4 at most, and 0.2 is left.
    torch.testing.assert_close(found.drawn.exp(), torch.tensor([0.1 / 0.8]).double())
    assert found.top_ids.tolist() == [[0, 2]]
    torch.testing.assert_close(found.top_log_probs.exp(), torch.tensor([[0.5, 0.1]]).double() / 0.8)
    torch.testing.assert_close(found.rest.exp(), torch.tensor([0.2 / 0.8]).double())
    torch.testing.assert_close(found.bound, torch.tensor([0.8 / 0.6]).double().log())


def test_what_is_left_is_no_more_than_ids_as_likely_as_the_last() -> None:
    """Of ids 0 to 4 the two likeliest are named; 0.2 is left, of which ids past 4 have at least 0.14."""
    entry = {str(token): {"logprob": torch.tensor(p).double().log().item()} for token, p in ((0, 0.78), (1, 0.02))}
    found = served_scores([entry], torch.tensor([0]), 5, 2)
    torch.testing.assert_close(found.rest.exp(), torch.tensor([0.06 / 0.86]).double())
    torch.testing.assert_close(found.drawn.exp(), torch.tensor([0.78 / 0.86]).double())


@pytest.mark.parametrize(("topk", "temperature"), [(None, 1.0), (3, 1.0), (64, 1.0), ("all", TEMPERATURE)])
def test_scores_are_those_of_the_model_in_the_process(
    topk: Any, temperature: float, flush: Models, flush_server: FakeServer
) -> None:
    topk = flush.extend_start if topk == "all" else topk
    distill = DistillConfig("topk", topk=topk) if topk else DistillConfig()
    right = scored(workers(flush.config(), distill).colocated_roles, distill, flush.batch(1, temperature))
    teacher = served(flush, [flush_server.url], topk, temperature)
    found = scored({"ref": teacher}, distill, flush.batch(1, temperature))
    torch.testing.assert_close(found.tensor("ref_log_prob"), right.tensor("ref_log_prob"), rtol=0, atol=1e-6)
    if topk:
        torch.testing.assert_close(dense(found, flush.ids), dense(right, flush.ids), rtol=0, atol=2e-6)
        torch.testing.assert_close(found.tensor(TOP_TENSORS[2]), right.tensor(TOP_TENSORS[2]), rtol=0, atol=1e-5)
    # Validation and the probe, at the run's temperature too.
    again = teacher.compute_ref_log_prob(flush.batch(1, temperature)).tensor("ref_log_prob")
    right = workers(flush.config(), distill).colocated_roles["ref"].compute_ref_log_prob(flush.batch(1, temperature))
    torch.testing.assert_close(again, right.tensor("ref_log_prob"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("topk", [8, 64, "all"])
def test_losses_are_those_of_the_model_in_the_process(topk: Any, flush: Models, flush_server: FakeServer) -> None:
    """With rows that hold item tokens, the student over the shared ids, and the leak term, which is the student's."""
    topk = flush.extend_start if topk == "all" else topk
    distill = flush.distill("topk", topk=topk, support="shared", **LEAK)
    right, gradient = distill_loss(flush, workers(flush.config(), distill).colocated_roles, distill)
    found, of_served = distill_loss(flush, {"ref": served(flush, [flush_server.url], topk)}, distill)
    assert found == pytest.approx(right, abs=1e-6)
    tiny.assert_same_gradient(of_served, gradient, atol=1e-6)


@pytest.mark.parametrize("topk", [8, 64, "all"])
def test_rows_past_the_shared_ids_are_bounded_or_left_out(topk: Any, models: Models, server: FakeServer) -> None:
    """They are not in the distribution; their mass counts as that of shared ids that a server does not name."""
    whole = topk == "all"
    topk = models.extend_start if whole else topk
    distill, batch = DistillConfig("topk", topk=topk), models.batch(1, 1.0)
    right = scored(workers(models.config(), distill).colocated_roles, distill, models.batch(1, 1.0))
    scores = served(models, [server.url], topk).score_for_update(batch)
    bound = scores.meta_info["metrics"]["distill/teacher_log_prob_bound"]
    trained = batch.tensor("response_mask").bool()
    too_low = (right.tensor("ref_log_prob") - scores.tensor("ref_log_prob"))[trained]
    rest = scores.tensor(TOP_TENSORS[2]).double()[trained].exp()
    assert too_low.min() > -1e-5, "never too high"
    if whole:
        assert bound < 1e-6 and too_low.max() < 1e-5
        return
    assert too_low.max() > 1e-3, "the model has mass there, or this proves nothing"
    assert (too_low <= -(1 - rest).log() + 1e-5).all()
    assert too_low.mean() <= bound < 3
    assert scores.meta_info["metrics"]["distill/teacher_rest_mass"] == pytest.approx(rest.mean().item(), rel=1e-4)


@pytest.mark.parametrize("topk", [8, 64])
def test_the_loss_is_at_most_the_whole_divergence_and_the_bound(topk: int, models: Models, server: FakeServer) -> None:
    """Though the server hides rows past the shared ids, which the model in the process leaves out."""
    whole, some = (models.distill("topk", topk=k, support="shared") for k in (models.extend_start, topk))
    exact, _ = distill_loss(models, workers(models.config(), whole).colocated_roles, whole)
    bucketed, _ = distill_loss(models, workers(models.config(), some).colocated_roles, some)
    teacher = served(models, [server.url], topk)
    bound = teacher.score_for_update(models.batch(1, 1.0)).meta_info["metrics"]["distill/teacher_log_prob_bound"]
    found, _ = distill_loss(models, {"ref": teacher}, some)
    assert 0 < found <= bucketed + bound and bucketed < exact and abs(found - bucketed) > 1e-4


def test_a_teacher_that_knows_item_tokens_reads_and_scores_them(models: Models) -> None:
    fake = FakeServer(models.frozen)
    settings, batch = TeacherConfig(url=[fake.url], sources=["rec_*"]), models.batch(1, 1.0)
    teacher = ServedTeacher(models.config(), teacher=settings, topk=models.ids)
    teacher.init_model()
    assert teacher.find_other_tokens() == []
    scores = teacher.compute_ref_log_prob(batch).tensor("ref_log_prob")
    fake.close()
    plain = tiny.plain_log_probs(models.plain().frozen, batch, models.ids + 5)
    torch.testing.assert_close(scores, tiny.of_tokens(plain, batch), rtol=0, atol=1e-5)
    assert max(max(row) for row in fake.rows) >= models.extend_start


# ------------------------------------------------------------------ what is sent


def test_no_request_holds_an_id_that_the_teacher_lacks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 rows: items anywhere or everywhere, empty answers, rows of which nothing is trained, full ones."""
    sent: list[list[int]] = []

    async def answer(self: Any, endpoint: Endpoint, path: str, body: Any = None, timeout_s: Any = None) -> Any:
        if body is None:
            return {"data": [{"id": "tiny"}]}
        sent.append(body["prompt"])
        named = [{str(token): {"logprob": -1.0}} for token in body["prompt"]]
        return {"choices": [{"prompt_logprobs": [None, *named[1:]]}]}

    monkeypatch.setattr(TeacherServers, "request", answer)
    teacher = served(models, ["http://nowhere"])
    draw, rows = random.Random(4), []
    for number in range(10_000):
        prompt, least = draw.randint(1, 6), (0, models.extend_start, models.extend_start - 2)[number % 3]
        ids = [draw.randrange(least, models.ids) for _ in range(prompt + draw.randint(0, 8))]
        rows.append((ids[:prompt], ids[prompt:]))
    batch = tiny.rollouts(rows, models.extend_start)
    batch.tensor("response_mask")[::7] = 0
    del sent[:]
    scores = teacher.compute_ref_log_prob(batch).tensor("ref_log_prob")
    teacher.score_for_update(batch.select_idxs(torch.arange(2000)))
    assert len(sent) > 10_000 and all(0 <= token < models.extend_start for row in sent for token in row)
    assert {len(row) for row in sent} == set(range(2, 15))
    real = batch.tensor("attention_mask")[:, tiny.PROMPT :].bool()
    lacking = real & (batch.tensor("responses") >= models.extend_start)
    assert (scores[lacking] == -40).all() and (scores[real & ~lacking] == -1).all() and (scores[~real] == 0).all()


def test_a_row_ends_with_its_last_trained_token(models: Models, server: FakeServer) -> None:
    batch = tiny.rollouts([([5, 6], [7, 8, models.extend_start, 9])], models.extend_start)
    teacher = served(models, [server.url], 3)
    del server.rows[:]
    teacher.score_for_update(batch)
    (row,) = server.rows
    assert row[:4] == [5, 6, 7, 8] and len(row) == 5 and row[4] < models.extend_start


# ------------------------------------------------------------------ servers that fail


def test_a_server_that_dies_leaves_its_rows_to_the_other(models: Models) -> None:
    distill, right = DistillConfig(), models.batch(1, 1.0)
    staying = FakeServer(models.teacher)
    dying = FakeServer(models.teacher)
    teacher = served(models, [staying.url, dying.url])
    expected = scored({"ref": teacher}, distill, right).tensor("ref_log_prob")
    assert min(len(staying.rows), len(dying.rows)) > 2, "they share the rows"
    dying.before = lambda number: dying.abort()
    batch = scored({"ref": teacher}, distill, models.batch(1, 1.0))
    assert torch.equal(batch.tensor("ref_log_prob"), expected)
    staying.close()
    started = time.monotonic()
    with pytest.raises(WorkerError) as ended:
        teacher.compute_ref_log_prob(models.batch(1, 1.0))
    assert staying.url in str(ended.value) and dying.url in str(ended.value)
    assert time.monotonic() - started < 30


def test_what_fails_once_is_tried_again_and_a_refusal_is_not(models: Models, server: FakeServer) -> None:
    fake = FakeServer(models.teacher, before=lambda number: 503 if number == 3 else None)
    teacher, expected = served(models, [fake.url]), served(models, [server.url])
    scores = [each.compute_ref_log_prob(models.batch(1, 1.0)).tensor("ref_log_prob") for each in (teacher, expected)]
    assert torch.equal(*scores)
    fake.before = lambda number: 503
    with pytest.raises(WorkerError, match=f"no endpoint .*{fake.url}.*503"):
        teacher.compute_ref_log_prob(models.batch(1, 1.0))
    fake.before = lambda number: 400
    with pytest.raises(WorkerError, match=f"{fake.url}: /v1/completions answers 400: out of order") as refused:
        teacher.compute_ref_log_prob(models.batch(1, 1.0))
    assert refused.value.by_user
    fake.close()


def test_a_server_that_comes_back_is_asked_again(models: Models, server: FakeServer) -> None:
    fake = FakeServer(models.teacher)
    teacher = served(models, [server.url, fake.url])
    teacher.servers.endpoints[1].fault = "it was away"
    del fake.rows[:]
    teacher.compute_ref_log_prob(models.batch(1, 1.0))
    assert len(fake.rows) > 2
    fake.close()


def test_a_key_comes_from_the_environment(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServer(models.teacher, key="secret-of-mine")
    with pytest.raises(ValueError, match="401"):
        served(models, [fake.url])
    with pytest.raises(ValueError, match="api_key_env=TEACHER_KEY"):
        served(models, [fake.url], api_key_env="TEACHER_KEY")
    monkeypatch.setenv("TEACHER_KEY", "secret-of-mine")
    served(models, [f"{fake.url}/v1/"], api_key_env="TEACHER_KEY").compute_ref_log_prob(models.batch(1, 1.0))
    fake.close()


# ------------------------------------------------------------------ servers that do not fit


def test_servers_have_to_fit(models: Models, server: FakeServer, flush_server: FakeServer) -> None:
    with pytest.raises(ValueError, match=f"{flush_server.url}.*scores otherwise than {server.url}"):
        served(models, [server.url, flush_server.url])
    server.shift = 9.0  # as logits are
    with pytest.raises(ValueError, match=r"its log-probs add up to .* raw_logprobs"):
        served(models, [server.url], 8)
    server.shift, server.max_model_len = 0.0, 14
    with pytest.raises(ValueError, match=r"--max-model-len 15\n.*max_model_len=14 is too short"):
        served(models, [server.url])
    server.max_model_len = 15
    served(models, [server.url])
    server.max_model_len = 512
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9: Client"):
        served(models, ["http://127.0.0.1:9"])
    with pytest.raises(ValueError, match=f"temperature=1.3.*topk={models.extend_start}"):
        served(models, [server.url], 8, TEMPERATURE)
    with pytest.raises(ValueError, match=r"temperature=1\.3"):
        served(models, [server.url], None, TEMPERATURE)


def test_servers_that_the_run_starts_are_mended_elsewhere(models: Models) -> None:
    """Nobody starts them by hand, neither at first nor after their end."""
    servers = TeacherServers(["http://127.0.0.1:9"], None, 5.0, "change x.engine_kwargs")
    teacher = ServedTeacher(models.config())
    teacher.expect_servers(lambda: servers)
    with pytest.raises(ValueError, match=r"cannot be used; change x\.engine_kwargs\n- http"):
        teacher.init_model()
    with pytest.raises(WorkerError, match=r"\); change x\.engine_kwargs$"):
        servers.run(servers.score([1, 2], 0))


def test_another_tokenizer_is_found(models: Models, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = served(models, [server.url])
    assert teacher.find_other_tokens() == []
    monkeypatch.setattr(server, "_tokenizer", type("Other", (), {"encode": lambda *_, **__: [1, 2]})())
    (fault,) = teacher.find_other_tokens()
    assert server.url in fault and "[1, 2]" in fault
    monkeypatch.setattr(served_teacher, "TOKENIZE", "/elsewhere")
    (fault,) = teacher.find_other_tokens()
    assert f"{server.url} does not say which tokens a text has" in fault and "404" in fault
