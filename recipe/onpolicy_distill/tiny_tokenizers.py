"""A pair of tiny tokenizers for tests and benchmarks: a teacher's, and a student's that adds item tokens to it.

Byte-level BPE trained on the few lines below, Qwen's names for the special tokens, and a small ChatML template.
The ids, in order: bytes and merges, the marker tokens, and in the student alone 3 x 8 item tokens and the two
brackets around an item. Nothing is downloaded and the same ids come out every time.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from verl.utils.tokenizer import save_tokenizer

TEXT = (
    "You are a careful assistant. Work the problem out, then state the answer.",
    "Tom has 12 apples and gives 5 to Ann. How many apples are left? Tom has 12 - 5 = 7 apples left.",
    "The user bought a white heart lantern and then a red tea set. What will the user buy next?",
    '{"name": "add", "arguments": {"first": 2, "second": 3}}',
    "system user assistant tool think no_think answer question result",
    "Why is the sky blue? The air sends the blue light of the sun in all directions.",
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKER_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
CODES_PER_LEVEL = 8
ITEM_TOKENS = (
    *(f"<s_{level}_{code}>" for level in "abc" for code in range(CODES_PER_LEVEL)),
    "<|sid_begin|>",
    "<|sid_end|>",
)

CHAT_TEMPLATE = Path(__file__).with_name("tiny_chat_template.jinja").read_text(encoding="utf-8")


def build_tiny_tokenizers(out_dir: str | Path) -> tuple[Path, Path]:
    """Write ``out_dir/teacher`` (about 330 ids) and ``out_dir/student`` (26 ids more); return both folders."""
    teacher_dir, student_dir = Path(out_dir) / "teacher", Path(out_dir) / "student"
    tokenizer = _train_teacher()
    save_tokenizer(tokenizer, teacher_dir)
    # The same object, changed once the teacher's is written: its ids stay the student's first ones.
    tokenizer.add_tokens(list(ITEM_TOKENS))
    save_tokenizer(tokenizer, student_dir)
    return teacher_dir, student_dir


def _train_teacher() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    words = Regex(r"\p{N}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    # Not special, as in Qwen: decoding without special tokens keeps them.
    bpe.add_tokens(list(MARKER_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=40960
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
