"""Exact divergences in chunks, from whole distributions or likeliest ids alone, against definitions and autograd."""

import math
from typing import Any

import pytest
import torch
from support.peak_memory import PeakBytes
from torch._dynamo.testing import CompileCounterWithBackend

from verl.ops import linear_divergence as linear_divergence_module
from verl.ops import linear_log_prob
from verl.ops.linear_divergence import BUFFERS, DIVERGENCES, DivergenceOptions, linear_divergence
from verl.ops.linear_log_prob import LinearLogProbs, StitchedLogProbs, TopLogProbs, linear_token_stats, score_tokens
from verl.vocabulary import Vocabulary

N, D, V, K, E = 13, 6, 20, 17, 11  # positions, hidden, rows of the head, ids in the softmax, first extended id
TEACHER_ROWS = 14  # three rows past the shared ids, as Qwen3 has
DRAWN = torch.zeros(1, dtype=torch.int64)
"""The token of one position, where its statistics do not matter."""
LEAK = {"leak_coef": 0.7, "leak_target": 0.03}


class Case:
    """Student, base teacher and frozen student, all random."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
        self.base_hidden, self.base_weight = draw(N, 4), draw(TEACHER_ROWS, 4)
        self.frozen_hidden, self.frozen_weight = draw(N, D), draw(V, D)
        self.token_weights = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype)
        self.token_weights[3] = 0.0

    def base(self, temperature: float = 1.0) -> LinearLogProbs:
        return LinearLogProbs(self.base_hidden, self.base_weight, E, temperature)

    def frozen(self, temperature: float = 1.0) -> LinearLogProbs:
        return LinearLogProbs(self.frozen_hidden, self.frozen_weight, K, temperature)

    def stitched(self, temperature: float = 1.0) -> StitchedLogProbs:
        return StitchedLogProbs(self.base(temperature), self.frozen(temperature))

    def loss(self, teacher, options: DivergenceOptions, rows: int = 4, start: int | None = E, labels=None):
        size = self.hidden.dtype.itemsize
        return linear_divergence(
            self.hidden,
            self.weight,
            self.token_weights,
            teacher,
            options,
            DRAWN.expand(len(self.hidden)) if labels is None else labels,
            Vocabulary(K, start),
            chunk_bytes=6 * rows * K * size,
        )


def divergence_of(kind: str, log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """D (N,) of whole distributions."""
    p, q = log_p.exp(), log_q.exp()
    known = torch.where(q > 0, log_q, 0.0)  # 0 log 0 is 0
    log_m = (beta * q + (1 - beta) * p).log()
    return {
        "reverse_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "forward_kl": lambda: (q * (known - log_p)).sum(-1),
        "jsd": lambda: beta * (q * (known - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1),
    }[kind]()


def assert_gradients(case: Case, loss: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    """In the student's hidden states and head."""
    inputs = case.hidden, case.weight
    wanted = torch.autograd.grad(factor * right, inputs, retain_graph=True)
    for gradient, value in zip(torch.autograd.grad(factor * loss, inputs), wanted, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-13)


def definition(case: Case, log_q: torch.Tensor, options: DivergenceOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """D and the leak term (N,) from whole distributions; ``log_q`` over B or over all ids."""
    logits = case.hidden @ case.weight[:K].T / options.temperature
    size = E if options.support == "shared" else K
    log_p = logits[:, :size].log_softmax(-1)
    if log_q.shape[1] > size:
        log_q = log_q[:, :size].log_softmax(-1)
    if log_q.shape[1] < size:
        missing = options.missing_log_prob if options.kind == "reverse_kl" else -torch.inf
        log_q = torch.cat([log_q, torch.full((N, size - log_q.shape[1]), missing, dtype=log_q.dtype)], dim=1)
    eps, delta = logits.softmax(-1)[:, E:].sum(-1), options.leak_target
    leak = delta * (delta / eps).log() + (1 - delta) * ((1 - delta) / (1 - eps)).log()
    return divergence_of(options.kind, log_p, log_q, options.beta), leak


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("support", ["shared", "full"])
@pytest.mark.parametrize("who", ["base", "frozen", "stitched"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_definition(kind, support, who, temperature) -> None:
    case = Case()
    options = DivergenceOptions(kind, beta=0.3, support=support, temperature=temperature, missing_log_prob=-20, **LEAK)
    log_q = getattr(case, who)(temperature)(slice(None))
    divergence, leak = definition(case, log_q, options)
    expected = (case.token_weights * (divergence + 0.7 * leak)).sum()
    labels = torch.arange(N) + K - N  # 4 to 16: of both kinds
    loss, stats = case.loss(getattr(case, who)(temperature), options, labels=labels)
    scores = torch.nn.functional.pad(log_q, (0, K - log_q.shape[1]), value=-20.0)  # over all ids that it knows
    torch.testing.assert_close(stats.teacher_log_prob, scores.gather(1, labels[:, None])[:, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.divergence, divergence, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(stats.leak, leak, rtol=1e-10, atol=1e-14)
    log_p = (case.hidden @ case.weight[:K].T / temperature).log_softmax(-1)
    torch.testing.assert_close(stats.extend_mass, log_p.exp()[:, E:].sum(-1))
    torch.testing.assert_close(stats.log_prob, log_p.gather(1, labels[:, None])[:, 0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-12, atol=1e-14)
    assert_gradients(case, loss, expected, factor=3)


@pytest.mark.parametrize("support", ["shared", "full"])
@pytest.mark.parametrize("who", ["base", "stitched", "top"])
def test_the_drawn_token_stands_for_the_divergence(support, who) -> None:
    """In the mean over tokens drawn from the student it is the divergence; outside the support it is 0."""
    case, options = Case(), DivergenceOptions(support=support, missing_log_prob=-20)
    log_q = case.base()(slice(None))
    teacher = getattr(case, who)() if who != "top" else None
    if teacher is None:
        values, ids = log_q.topk(3, dim=-1)
        teacher = TopLogProbs(ids, values, log_q.scatter(1, ids, -torch.inf).logsumexp(-1), E).rows
    size = E if support == "shared" else K
    p = (case.hidden @ case.weight[:K].T)[:, :size].softmax(-1)
    mean = torch.zeros(N, dtype=torch.float64)
    for label in range(size):
        _, stats = case.loss(teacher, options, labels=torch.full((N,), label))
        mean += p[:, label].detach() * stats.sampled
    torch.testing.assert_close(mean, stats.divergence, rtol=1e-10, atol=1e-14)
    outside = case.loss(teacher, options, labels=torch.full((N,), K - 1))[1].sampled
    assert outside.any() == (support == "full")


def test_two_ids_by_hand() -> None:
    # Student 1/4 and 3/4, teacher 1/2 and 1/2: KL(p | q) = 1/4 ln(1/2) + 3/4 ln(3/2).
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    teacher = LinearLogProbs(torch.zeros(1, 1), torch.zeros(2, 1), 2)
    loss, _ = linear_divergence(hidden, weight, torch.tensor([2.0]), teacher, DivergenceOptions(), DRAWN)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert loss.item() == pytest.approx(2 * divergence)
    loss.backward()
    # ds_1 / dh = ln 3, dD / ds_1 = 3/4 (ln(3/2) - D)
    assert hidden.grad.item() == pytest.approx(2 * math.log(3) * 0.75 * (math.log(1.5) - divergence), rel=1e-5)


def test_the_leak_term_vanishes_at_its_target_and_pulls_towards_it() -> None:
    case = Case()
    eps = (case.hidden @ case.weight[:K].T).softmax(-1)[:, E:].sum(-1)
    row = int(eps.argmax())
    case.token_weights = torch.nn.functional.one_hot(torch.tensor(row), N).to(torch.float64)
    for target, sign in ((eps[row].item(), 0), (0.9 * eps[row].item(), 1), (1.1 * eps[row].item(), -1)):
        options = DivergenceOptions(leak_coef=1.0, leak_target=min(target, 0.999))
        with_leak = torch.autograd.grad(case.loss(case.base(), options)[0], case.weight)[0]
        without = torch.autograd.grad(case.loss(case.base(), DivergenceOptions())[0], case.weight)[0]
        pull = ((with_leak - without)[E:] @ case.hidden[row].detach()).sum()  # d leak / d (a shift of E's logits)
        assert abs(pull) < 1e-12 if sign == 0 else pull * sign > 1e-4


def test_extreme_logits_stay_finite() -> None:
    """Differences of hundreds of nats: probabilities underflow, gradients and statistics do not become NaN."""
    case = Case(torch.float32, scale=12.0)
    for kind in DIVERGENCES:
        for support in ("shared", "full"):
            loss, stats = case.loss(case.base(), DivergenceOptions(kind, support=support, **LEAK))
            numbers = [loss, *stats, *torch.autograd.grad(loss, (case.hidden, case.weight))]
            assert all(number.isfinite().all() for number in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(dtype) -> None:
    exact, low = Case(), Case(dtype)
    options = DivergenceOptions(**LEAK)
    right = torch.autograd.grad(exact.loss(exact.base(), options)[0], (exact.hidden, exact.weight))
    loss, stats = low.loss(low.base(), options)
    assert stats.divergence.dtype == torch.float32
    for gradient, wanted in zip(torch.autograd.grad(loss, (low.hidden, low.weight)), right, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("support", ["shared", "full"])
@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_memory_is_that_of_a_chunk_however_many_positions(
    kind: str, support: str, topk: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a chunk is cut into blocks, two buffers hold all its rows, and the others those of a block."""
    tokens, hidden_size, ids, start, rows = 256, 4, 2048, 1500, 8
    hidden, base_hidden = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(tokens, hidden_size)
    weight, base_weight = torch.randn(ids, hidden_size, requires_grad=True), torch.randn(ids, hidden_size)
    teacher: Any = LinearLogProbs(base_hidden, base_weight, start)
    top = score_tokens(teacher, torch.zeros(tokens, dtype=torch.int64), -100.0, topk=5)[1]
    labels, ones, chunk = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), BUFFERS * rows * ids * 4
    if blocks:
        monkeypatch.setattr(linear_log_prob, "LEAST_ROWS", 4 * rows)
        monkeypatch.setattr(linear_log_prob, "CACHED_BYTES", rows // 4 * ids * 4)
    options = DivergenceOptions(kind, support=support, **LEAK)
    with PeakBytes() as peak:
        given = (hidden, weight, ones, top.rows if topk else teacher, options, labels, Vocabulary(ids, start))
        linear_divergence(*given, chunk_bytes=None if blocks else chunk)[0].backward()
    most = (2 * 4 + BUFFERS / 4) * rows * ids * 4 if blocks else chunk
    assert peak.bytes < most + 2 * (weight.nbytes + hidden.nbytes)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_position_that_does_not_count_may_hold_anything_and_an_id_that_is_ruled_out_is_no_nan(kind: str) -> None:
    """Three positions over three ids: the teacher rules an id out at the first two, of which the first has weight 0."""
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([[-math.inf, -0.7, -0.7], [-math.inf, -0.2, -1.7], [-1.0, -1.0, -1.2]], dtype=torch.float64)
    log_q = log_q.log_softmax(-1)
    labels, options = torch.zeros(3, dtype=torch.int64), DivergenceOptions(kind)

    def gradients(weights: list[float], given: torch.Tensor) -> list[torch.Tensor]:
        token_weights = torch.tensor(weights, dtype=torch.float64)
        loss, _ = linear_divergence(hidden, weight, token_weights, lambda rows: given[rows].clone(), options, labels)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    spoilt = log_q.clone()
    spoilt[0] = math.nan
    for given in (log_q, spoilt):
        found = gradients([0.0, 1.0, 1.0], given)
        assert all(value.isfinite().all() for value in found) and not found[1][0].any()
    log_p = (hidden @ weight.T).log_softmax(-1)
    q = log_q.nan_to_num(neginf=-100.0) if kind == "reverse_kl" else log_q
    right = divergence_of(kind, log_p, q)[1:].sum()
    torch.testing.assert_close(found[0], right)
    for value, wanted in zip(found[1:], torch.autograd.grad(right, (hidden, weight)), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("behind", [math.nan, math.inf, 1e30])
def test_rows_behind_the_ids_have_no_effect(behind: float) -> None:
    """A head is multiplied up to 64 or 128 rows; those from K = 70 on may hold anything."""
    hidden, head, labels = torch.randn(5, 4), torch.randn(70, 4), torch.tensor([0, 69, 3, 4, 60])

    def outcome(rows: int) -> list[torch.Tensor]:
        weight = torch.cat([head, torch.full((rows - 70, 4), behind)]).requires_grad_()
        states, vocabulary = hidden.clone().requires_grad_(), Vocabulary(70, 61)
        teacher = StitchedLogProbs(LinearLogProbs(hidden + 1, weight, 61), LinearLogProbs(hidden * 2, weight, 70))
        given = states, weight, torch.ones(5), teacher, DivergenceOptions(**LEAK), labels, vocabulary
        loss, stats = linear_divergence(*given)
        scores = linear_token_stats(states, weight, labels, vocabulary=vocabulary, with_entropy=True)
        total = loss + scores.log_probs.sum() + scores.entropy.sum()
        of_states, of_weight = torch.autograd.grad(total, (states, weight))
        assert not of_weight[70:].any()
        return [total, *stats, scores.extend_mass, of_states, of_weight[:70]]

    for found, right in zip(outcome(140), outcome(70), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch):
    """Blocks are compiled, as on CUDA; gives a function that says by what."""
    monkeypatch.setattr(linear_divergence_module, "_compiles", lambda logits, grad: True)
    monkeypatch.setattr(linear_divergence_module, "_compiler_errors", [])
    return lambda compiled: monkeypatch.setattr(linear_divergence_module, "_compiled_block", lambda: compiled)


@pytest.mark.parametrize(("kind", "support", "who"), [("reverse_kl", "full", "base"), ("jsd", "shared", "top")])
def test_blocks_are_compiled_once_and_change_no_bit(kind: str, support: str, who: str, compiles) -> None:
    """However many rows chunks have, and without a break of the graph."""
    case, options = Case(torch.bfloat16), DivergenceOptions(kind, support=support, **LEAK)
    teacher: Any = case.base() if who == "base" else named(case.base(), 3)[0].rows
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_divergence_module._block, backend=counter, fullgraph=True, dynamic=False)

    def outcome(rows: int) -> list[torch.Tensor]:
        loss, stats = case.loss(teacher, options, rows)
        return [*stats, *torch.autograd.grad(loss, (case.hidden, case.weight))]

    torch._dynamo.reset()
    for rows in (30, 24):  # in chunks of 10 and 3, and of 8 and 5
        compiles(linear_divergence_module._block)
        right = outcome(rows)
        compiles(compiled)
        assert all(torch.equal(found, wanted) for found, wanted in zip(outcome(rows), right, strict=True))
    assert counter.frame_count == 1


def test_without_a_compiler_blocks_run_as_they_are(compiles, caplog: pytest.LogCaptureFixture) -> None:
    def fails(error: Exception):
        def compiled(*args):
            raise error

        return compiled

    case = Case()
    compiles(fails(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        case.loss(case.base(), DivergenceOptions())
    compiles(fails(RuntimeError("Failed to find C compiler")))
    loss, _ = case.loss(case.base(), DivergenceOptions())
    assert caplog.text.count("cannot be compiled (Failed to find C compiler); install a C compiler") == 1
    torch.testing.assert_close(loss, case.loss(case.base(), DivergenceOptions())[0])
    assert len(caplog.records) == 1


def test_sizes_that_do_not_fit() -> None:
    case = Case()
    empty = case.hidden[:0], case.weight, case.token_weights[:0], case.frozen(), DivergenceOptions(), DRAWN[:0]
    assert linear_divergence(*empty)[0].item() == 0
    with pytest.raises(ValueError, match="the teacher scores 14 ids, not 11 or 17"):
        case.loss(LinearLogProbs(case.base_hidden, case.base_weight, 14), DivergenceOptions())
    with pytest.raises(ValueError, match="no divergence 'total_variation'; use one of reverse_kl, forward_kl, jsd"):
        case.loss(case.base(), DivergenceOptions("total_variation"))
    with pytest.raises(ValueError, match="has 15 ids"):
        LinearLogProbs(case.base_hidden, case.base_weight, 15)
    with pytest.raises(ValueError, match="below"):
        linear_divergence(*empty[:5], torch.tensor([len(case.weight)]))


def test_the_smallest_probabilities_of_a_teacher_leave_jsd_finite() -> None:
    student, head = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.0], [-300.0]])
    teacher = LinearLogProbs(torch.tensor([[1.0]]), torch.tensor([[0.0], [-103.2]]), 2)
    for beta in (0.5, 0.1):
        loss, _ = linear_divergence(student, head, torch.ones(1), teacher, DivergenceOptions("jsd", beta=beta), DRAWN)
        assert loss.isfinite()


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
@pytest.mark.parametrize(
    ("support", "who"), [("shared", "base"), ("full", "base"), ("full", "frozen"), ("full", "stitched")]
)
@pytest.mark.parametrize(("topk", "rows"), [(1, 5), (4, 1), (4, 5)])
def test_of_the_likeliest_ids_it_is_the_divergence_of_the_buckets(kind, support, who, topk, rows) -> None:
    """Value and gradient by autograd through the coarsened distributions, and a lower bound of the whole."""
    case = Case()
    options = DivergenceOptions(kind, beta=0.3, support=support, missing_log_prob=-20, **LEAK)
    top, log_q = named(getattr(case, who)(0.8), topk)
    size = E if support == "shared" else K
    log_p = (case.hidden @ case.weight[:K].T)[:, :size].log_softmax(-1)
    whole_divergence, leak = definition(case, log_q, options)
    missing = options.missing_log_prob if kind == "reverse_kl" else -torch.inf
    padded = torch.nn.functional.pad(log_q, (0, size - log_q.shape[1]), value=missing)
    lp, lq = (bucketed(values, top.ids, top.vocab_size) for values in (log_p, padded))
    divergence = divergence_of(kind, lp, lq, options.beta)
    loss, stats = case.loss(top.rows, options, rows=rows)
    torch.testing.assert_close(stats.divergence, divergence, rtol=1e-10, atol=1e-14)
    assert (stats.divergence <= whole_divergence + 1e-12).all() and (stats.divergence < whole_divergence - 1e-6).any()
    assert_gradients(case, loss, (case.token_weights * (divergence + 0.7 * leak)).sum())


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
