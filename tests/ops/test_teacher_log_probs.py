"""Teachers of one model and of two, against whole distributions."""

import pytest
import torch

from verl.ops.linear_log_prob import LinearLogProbs, StitchedLogProbs, score_tokens

N, D, K, E = 7, 5, 17, 11  # positions, hidden, ids of the student, first extended id
ALL = slice(None)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(shift: float = 0.0) -> tuple[LinearLogProbs, LinearLogProbs]:
    """A base teacher and one that knows all ids, whose logits of E are ``shift`` higher."""
    hidden = torch.cat([draw(N, D, seed=2), torch.ones(N, 1, dtype=torch.float64)], dim=1)
    weight = torch.cat([draw(K, D, seed=3), torch.zeros(K, 1, dtype=torch.float64)], dim=1)
    weight[E:, -1] = shift
    return LinearLogProbs(draw(N, D, seed=4), draw(E + 3, D, seed=5), E), LinearLogProbs(hidden, weight, K)


def test_a_stitched_teacher_is_the_base_outside_and_itself_inside() -> None:
    base, own = pair()
    q, q_base, q_own = (teacher(ALL).exp() for teacher in (StitchedLogProbs(base, own), base, own))
    d = q_own[:, E:].sum(-1, keepdim=True)
    assert d.min() > 0.05 and d.max() < 0.95
    torch.testing.assert_close(q.sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(q[:, :E], (1 - d) * q_base, rtol=1e-12, atol=0)
    torch.testing.assert_close(q[:, E:], q_own[:, E:], rtol=0, atol=0)
    torch.testing.assert_close(StitchedLogProbs(base, own)(slice(2, 5)).exp(), q[2:5], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [-800.0, 60.0])
def test_its_limits_are_its_parts(shift: float) -> None:
    """Without mass on E it is the base teacher; with all mass there it is the other one, and B keeps what is left."""
    base, own = pair(shift)
    log_q, of_own = StitchedLogProbs(base, own)(ALL), own(ALL)
    if shift < 0:
        torch.testing.assert_close(log_q[:, :E], base(ALL), rtol=0, atol=1e-12)
        return
    assert (of_own[:, :E].logsumexp(-1) < -40).all(), "1 - d would be 0 in any precision here"
    torch.testing.assert_close(log_q.logsumexp(-1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_q[:, :E].logsumexp(-1), of_own[:, :E].logsumexp(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_drawn_tokens_and_likeliest_ids_in_chunks(rows: int) -> None:
    base, own = pair()
    labels = torch.tensor([0, E - 1, E, K - 1, 3, 12, 5])
    limits = {"chunk_bytes": 3 * rows * K * 4}
    stitched = StitchedLogProbs(base, own)
    (drawn, top), log_q = score_tokens(stitched, labels, -9.0, topk=3, **limits), stitched(ALL)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(drawn.double(), log_q.gather(1, labels[:, None])[:, 0], **close)
    assert torch.equal(top.ids, log_q.argsort(dim=-1, descending=True)[:, :3])
    torch.testing.assert_close(top.log_probs.double(), log_q.topk(3).values, **close)
    torch.testing.assert_close(top.rest.exp().double(), 1 - log_q.topk(3).values.exp().sum(-1), **close)
    drawn, none = score_tokens(base, labels, -9.0, **limits)
    assert drawn[labels >= E].tolist() == [-9.0] * 3 and none is None
    torch.testing.assert_close(drawn[0].double(), base(ALL)[0, 0], **close)
    assert score_tokens(base, labels[:0], -9.0, topk=2)[1].ids.shape == (0, 2)


def test_more_ids_asked_for_than_there_are() -> None:
    base, _ = pair()
    top = score_tokens(base, torch.zeros(N, dtype=torch.int64), 0.0, topk=E + 4)[1]
    assert (top.rest == -torch.inf).all() and top.ids.shape == (N, E + 4)
    assert (top.ids[:, E:] == top.ids[:, :1]).all() and (top.log_probs[:, E:] == top.log_probs[:, :1]).all()
    assert all(len(set(ids)) == E for ids in top.ids.tolist())


def test_what_is_left_is_no_difference_of_large_masses() -> None:
    """With next to all mass on one id, one less that mass would be rounding in single precision."""
    head = torch.tensor([[0.0], [-30.0], [-31.0]])
    top = score_tokens(LinearLogProbs(torch.ones(1, 1), head, 3), torch.zeros(1, dtype=torch.int64), 0.0, topk=1)[1]
    assert top.rest.item() == pytest.approx(-30 + 0.31326, abs=1e-3)  # log(1 + exp(-1)) over -30
