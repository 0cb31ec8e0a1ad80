"""Draws by seed and place: shares are the probabilities, to the number, and a row's draw is its own affair."""

import itertools

import torch

from verl.ops.seeded_draws import draw_tokens, seeded_uniforms


def test_draws_by_hand() -> None:
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-52], dtype=torch.float64)
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(6, -1)
    assert draw_tokens(probs, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    rounded = torch.cat([0.9 * probs, torch.zeros(6, 124)], dim=1)  # the sum is not 1, and whole blocks follow
    assert draw_tokens(rounded, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    assert 0 <= int(draw_tokens(torch.full((1, 4), torch.nan), uniforms[:1])) < 4, "a token, whatever it means"


def test_evenly_spaced_numbers_draw_every_token_in_proportion() -> None:
    """Over 300 tokens in blocks, of which one, a block and the last two cannot be drawn."""
    probs = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    probs[[7, 298, 299]] = 0.0
    probs[64:128] = 0.0
    probs /= probs.sum()
    draws = 100_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    drawn = draw_tokens(probs.float().expand(draws, -1), uniforms).bincount(minlength=300)
    assert torch.all((drawn - draws * probs).abs() <= 1.01)
    assert torch.all(drawn[probs == 0] == 0)


def test_numbers_depend_on_seed_and_place_alone_and_look_random() -> None:
    """10,000 numbers: a chi-square of 64 cells, the correlations of neighbouring seeds and of neighbouring places."""
    seeds, places = zip(*itertools.product(range(100), range(100)), strict=True)
    numbers = seeded_uniforms(seeds, places)
    assert seeded_uniforms([42], [7]) == numbers[4207]
    cells = (numbers * 64).long().bincount(minlength=64)
    assert ((cells - 10_000 / 64) ** 2 / (10_000 / 64)).sum() < 63 + 4 * 126**0.5
    table = numbers.reshape(100, 100)
    for one, other in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1])):
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.04
    assert seeded_uniforms([5], [1]) != seeded_uniforms([5 + 0x9E3779B97F4A7C15], [0]), "streams do not overlap"
