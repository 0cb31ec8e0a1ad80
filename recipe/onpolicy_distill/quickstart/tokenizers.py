"""The tokenizers of the small world: the teacher's, and the student's that adds item tokens to it.

One id per printable ASCII character and per word that the world's questions begin with, Qwen's names for the special
tokens, and the ChatML template of ``tiny_tokenizers``. A word is one token only with its colon (``sort:``), so that
no run of letters ever reads as one.
"""

import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipe.onpolicy_distill.quickstart.catalogue import all_item_tokens
from recipe.onpolicy_distill.tiny_tokenizers import CHAT_TEMPLATE, SPECIAL_TOKENS
from verl.utils.tokenizer import save_tokenizer

CHARACTERS = ("\n", *map(chr, range(32, 127)))
UNKNOWN = "<unk>"
ROLE_LINES = ("system\n", "user\n", "assistant\n")
MAX_TOKENS = 2048


def build_tokenizers(folder: Path, question_words: list[str], codes_per_level: int) -> tuple[Path, Path]:
    """Write ``folder/teacher`` and ``folder/student`` and return both; the student's ids go on where the teacher's end.

    Args:
        folder: receives the two.
        question_words: words without their colons.
        codes_per_level: codes at each of the three levels of an item's id.
    """
    words = [*ROLE_LINES, *(f"{word}:" for word in question_words)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_by_word_and_character(words),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    teacher, student = folder / "teacher", folder / "student"
    save_tokenizer(tokenizer, teacher)
    tokenizer.add_tokens(all_item_tokens(codes_per_level))
    save_tokenizer(tokenizer, student)
    return teacher, student


def _by_word_and_character(words: list[str]) -> Tokenizer:
    ids = {token: number for number, token in enumerate((*CHARACTERS, *words, UNKNOWN))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    pattern = "|".join([*map(re.escape, words), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
