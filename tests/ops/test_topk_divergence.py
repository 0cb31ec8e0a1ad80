"""Divergences from teachers that name their likeliest ids only, against autograd through the buckets."""

import math

import pytest
import torch
from support.divergence_cases import DRAWN, LEAK, Case, E, K, definition

from verl.ops.linear_divergence import DIVERGENCES, DivergenceOptions, linear_divergence
from verl.ops.teacher_log_probs import TopLogProbs


def bucketed(log_probs: torch.Tensor, ids: torch.Tensor, known: int) -> torch.Tensor:
    """Log-probs of the named ids (N, K), of the others below ``known`` together (N, 1), and of those past it."""
    others = log_probs[:, :known].scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), others, log_probs[:, known:]], dim=1)


def named(teacher, topk: int) -> tuple[TopLogProbs, torch.Tensor]:
    """The likeliest ids of a teacher from its whole distribution in double precision, and that distribution."""
    log_q = teacher(slice(None))
    values, ids = log_q.topk(topk, dim=-1)
    rest = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)
    return TopLogProbs(ids, values, rest, log_q.shape[1]), log_q


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("support", ["shared", "full"])
@pytest.mark.parametrize("who", ["base", "frozen", "stitched"])
@pytest.mark.parametrize(("topk", "rows"), [(1, 5), (4, 1), (4, 5)])
def test_of_the_likeliest_ids_it_is_the_divergence_of_the_buckets(kind, support, who, topk, rows) -> None:
    """Value and gradient by autograd through the coarsened distributions, and a lower bound of the whole."""
    if who != "base" and support == "shared":
        return  # a teacher of all ids is compared over all of them
    case = Case()
    options = DivergenceOptions(kind, beta=0.3, support=support, missing_log_prob=-20, **LEAK)
    top, log_q = named(getattr(case, who)(0.8), topk)
    size = E if support == "shared" else K
    log_p = (case.hidden @ case.weight[:K].T)[:, :size].log_softmax(-1)
    whole_divergence, leak = definition(case, log_q, options)
    missing = options.missing_log_prob if kind == "reverse_kl" else -torch.inf
    padded = torch.nn.functional.pad(log_q, (0, size - log_q.shape[1]), value=missing)
    lp, lq = (bucketed(values, top.ids, top.vocab_size) for values in (log_p, padded))
    p, q, known = lp.exp(), lq.exp(), torch.where(lq > -torch.inf, lq, 0.0)
    log_m = (options.beta * q + (1 - options.beta) * p).log()
    divergence = {
        "reverse_kl": (p * (lp - known)).sum(-1),
        "forward_kl": (q * (known - lp)).sum(-1),
        "jsd": (options.beta * q * (known - log_m) + (1 - options.beta) * p * (lp - log_m)).sum(-1),
    }[kind]
    loss, stats = case.loss(top.rows, options, rows=rows)
    torch.testing.assert_close(stats.divergence, divergence, rtol=1e-10, atol=1e-14)
    assert (stats.divergence <= whole_divergence + 1e-12).all() and (stats.divergence < whole_divergence - 1e-6).any()
    right = torch.autograd.grad(
        (case.token_weights * (divergence + 0.7 * leak)).sum(), (case.hidden, case.weight), retain_graph=True
    )
    for gradient, wanted in zip(torch.autograd.grad(loss, (case.hidden, case.weight)), right, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("who", "support"), [("base", "shared"), ("base", "full"), ("frozen", "full")])
def test_all_ids_named_is_the_whole_divergence(who, support) -> None:
    case = Case()
    options = DivergenceOptions(support=support, missing_log_prob=-20, **LEAK)
    top, log_q = named(getattr(case, who)(), E if who == "base" else K)
    assert (top.rest == -torch.inf).all() and top.ids.shape[1] == log_q.shape[1]
    right = case.loss(getattr(case, who)(), options)
    loss, stats = case.loss(top.rows, options)
    torch.testing.assert_close(stats.divergence, right[1].divergence, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad(value, (case.hidden, case.weight)) for value in (loss, right[0]))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_three_ids_in_two_buckets_by_hand() -> None:
    # Student 1/2, 1/4, 1/4; the teacher names id 0 with 1/4 and leaves 3/4: D = 1/2 ln 2 + 1/2 ln(2/3).
    head = torch.tensor([[math.log(2.0)], [0.0], [0.0]])
    hidden, ones = torch.tensor([[1.0]], requires_grad=True), torch.ones(1)
    top = TopLogProbs(torch.tensor([[0]]), torch.tensor([[0.25]]).log(), torch.tensor([0.75]).log(), 3)
    loss, _ = linear_divergence(hidden, head, ones, top.rows, DivergenceOptions(), DRAWN)
    divergence = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert loss.item() == pytest.approx(divergence)
    loss.backward()
    # ds_0 / dh = ln 2, dD / ds_0 = 1/2 (ln 2 - D)
    assert hidden.grad.item() == pytest.approx(math.log(2) * 0.5 * (math.log(2) - divergence), rel=1e-5)


def test_a_rest_of_nothing_stays_finite() -> None:
    """The student or the teacher leaves next to nothing to the ids that are not named, and then nothing at all."""
    head = torch.tensor([[0.0], [-1.0], [-2.0]])
    for of_student in (1.0, 100.0, 1000.0):
        for rest in (-1.0, -90.0, -1000.0, -torch.inf):
            hidden = torch.tensor([[of_student]], requires_grad=True)
            top = TopLogProbs(torch.tensor([[0]]), torch.tensor([[-1e-6]]), torch.tensor([rest]), 3)
            loss, _ = linear_divergence(hidden, head, torch.ones(1), top.rows, DivergenceOptions(), DRAWN)
            loss.backward()
            assert loss.isfinite() and hidden.grad.isfinite().all()
            p_rest = 1 - torch.softmax(of_student * head[:, 0].double(), 0)[0].item()
            if p_rest:  # what the teacher leaves counts as exp(-100) at least
                wanted = (1 - p_rest) * (math.log1p(-p_rest) + 1e-6) + p_rest * (math.log(p_rest) - max(rest, -100.0))
                assert loss.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
