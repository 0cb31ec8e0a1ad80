"""Masks token by token. A letter is a token: m, u written by the model or by a tool; M, U the same, extended."""

import pytest

from verl.experimental.agent_loop.masks import extended_token_mask, trainable_mask

START = 100


def masks_of(drawing: str, *, drop_whole: bool = False, keep_rest: bool = False) -> tuple[str, str]:
    token_ids = [START + place if letter.isupper() else place for place, letter in enumerate(drawing)]
    extended = extended_token_mask(token_ids, START)
    model_mask = [int(letter in "mM") for letter in drawing]
    trainable = trainable_mask(model_mask, extended, drop_whole=drop_whole, keep_rest=keep_rest)
    return "".join(map(str, extended)), "".join(map(str, trainable))


@pytest.mark.parametrize(
    ("drawing", "extended", "trainable"),
    [
        # no tools
        ("mmmm", "0000", "1111"),
        ("Mmmm", "1000", "1000"),
        ("mmmM", "0001", "1111"),
        ("mMmM", "0101", "1100"),
        ("M", "1", "1"),
        ("", "", ""),
        # one tool turn
        ("mmuumm", "000000", "110011"),
        ("mMuumm", "010000", "110000"),
        ("mmUumm", "001000", "110000"),
        ("mmuuMm", "000010", "110010"),
        ("mmuU", "0001", "1100"),
        # two tool turns, extended tokens on both sides
        ("mmuumMuumm", "0000010000", "1100110000"),
        ("mmuummUUmM", "0000001101", "1100110000"),
        ("MmuUmMuUmM", "1001010101", "1000000000"),
    ],
)
def test_masks_are_cut_after_the_first_extended_token(drawing: str, extended: str, trainable: str) -> None:
    assert masks_of(drawing) == (extended, trainable)
    dropped = trainable if "1" not in extended else "0" * len(drawing)
    assert masks_of(drawing, drop_whole=True) == (extended, dropped)
    written = "".join(str(int(letter in "mM")) for letter in drawing)
    assert masks_of(drawing, keep_rest=True) == (extended, written)


def test_ids_from_the_threshold_on_are_extended() -> None:
    assert extended_token_mask([99, 100, 101], 100) == [0, 1, 1]
    assert extended_token_mask([0, 1], 0) == [1, 1], "0 is a threshold"
    assert extended_token_mask([0, 10**6], None) == [0, 0]
