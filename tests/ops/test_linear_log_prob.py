"""Token statistics from hidden states in chunks, against plain softmax and autograd."""

import math
from functools import partial

import pytest
import torch
from support.peak_memory import PeakBytes

from verl.ops import linear_log_prob
from verl.ops.linear_log_prob import BUFFERS, TokenStats, linear_token_stats, rows_per_chunk
from verl.vocabulary import Vocabulary

N, D, V, K, E = 13, 6, 20, 17, 11  # positions, hidden, rows of the head, ids in the softmax, first extended id
EXTENDED = Vocabulary(K, E)
ONE_ROW = K * 8  # bytes of one row of float64 logits


def draw(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (N,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float) -> TokenStats:
    """The definition, with whole logits."""
    log_softmax = ((hidden @ weight[:K].T) / temperature).log_softmax(dim=-1)
    probs = log_softmax.exp()
    return TokenStats(
        log_softmax.gather(1, labels[:, None]).squeeze(1), -(probs * log_softmax).sum(-1), probs[:, E:].sum(-1)
    )


def mixed_sum(stats: TokenStats) -> torch.Tensor:
    """A scalar in which every log-prob and every entropy has a weight of its own."""
    total = torch.zeros(())
    for kind, values in enumerate(stats[:2]):
        weights = torch.linspace(0.5, 2.0, len(values), dtype=values.dtype) * (-1) ** kind
        total = total + (weights * values).sum()
    return total


def test_two_ids_by_hand() -> None:
    # Logits 0 and ln 3 at temperature 1: probabilities 1/4 and 3/4.
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    stats = linear_token_stats(hidden, head, torch.tensor([1]), vocabulary=Vocabulary(2, 1), with_entropy=True)
    assert stats.log_probs.tolist() == pytest.approx([math.log(0.75)])
    assert stats.entropy.tolist() == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)])
    assert stats.extend_mass.tolist() == pytest.approx([0.75])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.1])
@pytest.mark.parametrize("rows", [1, 4, N, 1000])
def test_values_and_gradients_are_those_of_the_definition(rows: int, temperature: float) -> None:
    hidden, weight, labels = draw()
    more = {"vocabulary": EXTENDED, "with_entropy": True, "chunk_bytes": BUFFERS * rows * ONE_ROW}
    stats = linear_token_stats(hidden, weight, labels, temperature=temperature, **more)
    expected = reference(hidden, weight, labels, temperature)
    for values, right in zip(stats, expected, strict=True):
        torch.testing.assert_close(values, right, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(mixed_sum(stats), (hidden, weight))
    for gradient, right in zip(gradients, torch.autograd.grad(mixed_sum(expected), (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-12)


def test_no_position_is_fine() -> None:
    hidden, weight, labels = draw()
    stats = linear_token_stats(hidden[:0], weight, labels[:0], vocabulary=Vocabulary(V, E), with_entropy=True)
    assert [tuple(values.shape) for values in stats] == [(0,)] * 3
    stats.log_probs.sum().backward()  # sharded models need the backward pass even so
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bf16_weight_gradient_is_summed_in_fp32() -> None:
    """One row a chunk or all at once: in bf16 sums the two would drift apart by several roundings."""
    hidden, weight, labels = draw(torch.bfloat16)
    gradients = []
    for chunk_bytes in (1, 2**20):
        stats = linear_token_stats(hidden, weight, labels, chunk_bytes=chunk_bytes)
        gradients.append(torch.autograd.grad(stats.log_probs.sum(), weight)[0])
        assert stats.log_probs.dtype == torch.float32
    assert gradients[0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2**-7, atol=2**-7)


def test_products_in_half_precision_come_out_in_fp32_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, with functions in the place of its kernels, that take what these take."""
    hidden, weight, labels = draw(torch.bfloat16)
    gradient, exact = torch.randn(N, V).bfloat16(), weight.detach().float()

    def mm(a, b, *, out_dtype=None, out=None):
        assert a.dtype == b.dtype and (out_dtype, out) in ((torch.float32, None), (None, out))
        product = (a.float() @ b.float()).to(out_dtype or a.dtype)
        return product if out is None else out.copy_(product)

    def addmm(total, a, b, *, out_dtype, out):
        assert a.dtype == b.dtype == torch.bfloat16 and out is total and out_dtype == total.dtype == torch.float32
        return out.add_(a.float() @ b.float())

    def outcome() -> list[torch.Tensor]:
        logits, total = linear_log_prob.head_logits(hidden.detach(), weight.detach()), exact.clone()
        linear_log_prob.add_product(total, gradient, hidden.detach())
        return [logits, total, *torch.autograd.grad(linear_token_stats(hidden, weight, labels)[0].sum(), weight)]

    right = [hidden.float() @ exact.T, exact + gradient.float().T @ hidden.float()]
    rounded = outcome()
    assert all(0 < (found - wanted).abs().max() < 0.05 for found, wanted in zip(rounded, right, strict=False))
    monkeypatch.setattr(linear_log_prob, "multiplies_into_fp32", lambda tensor: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = outcome()
    assert all(torch.equal(value, wanted) for value, wanted in zip(found, right, strict=False))
    torch.testing.assert_close(found[2], rounded[2], rtol=0.02, atol=0.02)


def test_errors_name_the_numbers() -> None:
    for ids, words in ((V + 1, "has 21 ids"), (3, "below 3")):
        with pytest.raises(ValueError, match=words):
            linear_token_stats(*draw(), vocabulary=Vocabulary(ids))


def test_rows_of_a_chunk_follow_cache_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = partial(rows_per_chunk, None, 9)
    cpu, cuda, of_qwen = torch.device("cpu"), torch.device("cuda"), 176_247 * 4
    assert [rows(4 * ids, cpu) for ids in (512, 9216, 176_247)] == [512, 256, 142]  # 1 MiB a buffer; 256; 384 MiB
    for free, found in ((10 * 2**30, 640 * 2**20), (2**30, 384 * 2**20), (100 * 2**30, 4 * 2**30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free // 2, 140 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, free=free: free // 2 + 7)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7)
        assert rows(of_qwen, cuda) == found // (9 * of_qwen)
    assert rows_per_chunk(9 * of_qwen * 5, 9, of_qwen, cpu) == 5 and rows_per_chunk(1, 9, of_qwen, cuda) == 1


def test_blocks_of_a_chunk_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = draw(torch.float32)
    found = []
    for cached_bytes in (1, 3 * K * 4, 2**20):  # rows of a block: 1, 3, all
        monkeypatch.setattr(linear_log_prob, "CACHED_BYTES", cached_bytes)
        stats = linear_token_stats(hidden, weight, labels, temperature=0.7, vocabulary=EXTENDED, with_entropy=True)
        found.append([*stats, *torch.autograd.grad(mixed_sum(stats), (hidden, weight))])
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("with_entropy", [False, True])
def test_memory_is_that_of_two_chunks_however_many_positions(with_entropy: bool) -> None:
    tokens, hidden_size, vocabulary, rows = 512, 8, 4096, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels, chunk = torch.zeros(tokens, dtype=torch.int64), BUFFERS * rows * vocabulary * 4
    with PeakBytes() as peak:
        more = {"with_entropy": with_entropy, "chunk_bytes": chunk}
        stats = linear_token_stats(hidden, weight, labels, vocabulary=Vocabulary(vocabulary, 4000), **more)
        (stats.log_probs.sum() + (stats.entropy.sum() if with_entropy else 0.0)).backward()
    assert peak.bytes < chunk + 2 * (weight.nbytes + hidden.nbytes)
