"""A random teacher and student in Qwen3's shape, to try a run on any machine.

    python -m recipe.onpolicy_distill.tiny_models --teacher-tokenizer T --student-tokenizer S --out DIR

In: two tokenizer folders, the student's being the teacher's plus further ids (or the same). Out: ``DIR/teacher`` and
``DIR/student``, each with weights (safetensors, fp32), config, generation config and tokenizer, for transformers and
vLLM. Nothing is trained here: the pair writes gibberish, but it distils like a real one.

How the pair resembles real ones:

- the teacher has rows past its tokenizer, as Qwen3 has, and the first extended ids of the student fall among them;
- the student is the teacher with perturbed weights; its rows from the first extended id on are fresh;
- some tokens are common and some rare whatever the context, as in language. Every embedding row shares one offset,
  which gives the last hidden state a constant part and so each token a constant bias. The student's error lies
  mostly in that bias (through the norm before the head), which is what a few steps of distillation can win back;
  noise spread evenly over all weights would take thousands.

With the default settings the reverse KL of the student to the teacher is about 0.5 nats per token, and about 1 in 10
answers of 64 tokens holds an extended id. ``--student-noise 0`` makes the two equal on the ids they share.

H hidden size, V rows of the embedding.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.onpolicy_distill.options import add_options, option
from verl.utils.console import command_parser
from verl.utils.tokenizer import hf_tokenizer, save_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

HEAD_DIM = 32
"""The smallest size of an attention head that vLLM's CPU kernels take."""
MIN_TEACHER_PADDING = 64
"""Rows that the teacher has beyond its tokenizer, at least."""
NORM_NOISE_FACTOR = 20
"""How much larger the relative noise on the norm before the head is: there lies most of what can be distilled."""
RESIDUAL_GAIN = 0.3
"""Scale of what each block adds to the hidden state, so that the constant part and the last token stay visible."""


@dataclass(frozen=True)
class TinyPairConfig:
    """Sizes and scales of the pair."""

    hidden: int = option(128, help="hidden size H, a multiple of 64")
    layers: int = option(2, help="transformer blocks")
    tied: bool = option(False, help="share the embedding with the lm head")
    student_noise: float = option(0.02, help="noise on each of the student's matrices, relative; 0: a copy")
    logit_std: float = option(3.0, help="standard deviation of the logits over the vocabulary: larger is more certain")
    extended_scale: float = option(0.3, help="scale of rows past the teacher's tokenizer: smaller is rarer")
    teacher_rows: int | None = option(None, type=int, help="embedding rows; none: a multiple of 128 with some to spare")
    student_rows: int | None = option(None, type=int, help="embedding rows; none: the next multiple of 256")
    seed: int = option(0, help="seed of all weights")

    def __post_init__(self) -> None:
        if self.hidden < 64 or self.hidden % 64:
            raise ValueError(f"--hidden {self.hidden} must be a multiple of 64")


def build_tiny_models(
    teacher_tokenizer: str | Path, student_tokenizer: str | Path, out_dir: str | Path, config: TinyPairConfig
) -> tuple[Path, Path]:
    """Write the pair and return its folders, ``out_dir/teacher`` and ``out_dir/student``.

    Raises ValueError where the student's tokenizer does not extend the teacher's, or a row count is too small.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    teacher_tok, student_tok = hf_tokenizer(teacher_tokenizer), hf_tokenizer(student_tokenizer)
    _check_extends(teacher_tok, student_tok)
    known = len(teacher_tok)
    teacher_rows = config.teacher_rows or round_up(known + MIN_TEACHER_PADDING, 128)
    student_rows = config.student_rows or round_up(len(student_tok), 256)
    for role, rows, ids in (("teacher", teacher_rows, known), ("student", student_rows, len(student_tok))):
        if rows < ids:
            raise ValueError(f"--{role}-rows {rows} is less than the {ids} ids of the tokenizer; give at least {ids}")
    shape: dict[str, Any] = {
        "hidden": config.hidden,
        "layers": config.layers,
        "heads": config.hidden // HEAD_DIM,
        "tied": config.tied,
        "max_position_embeddings": 40960,
    }
    teacher = new_model(teacher_tok, rows=teacher_rows, **shape)
    student = new_model(student_tok, rows=student_rows, **shape)
    with torch.no_grad():
        _fill_teacher(teacher, config, known)
        _fill_student(student, teacher, config, known)
    folders = Path(out_dir) / "teacher", Path(out_dir) / "student"
    disable_progress_bar()
    for folder, model, tokenizer in zip(folders, (teacher, student), (teacher_tok, student_tok), strict=True):
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return folders


def round_up(number: int, multiple: int) -> int:
    """The next multiple, ``number`` itself included."""
    return -(-number // multiple) * multiple


def _check_extends(teacher: "PreTrainedTokenizerBase", student: "PreTrainedTokenizerBase") -> None:
    student_ids = student.get_vocab()
    for token, token_id in sorted(teacher.get_vocab().items(), key=lambda entry: entry[1]):
        if student_ids.get(token) != token_id:
            raise ValueError(
                f"the student's tokenizer does not extend the teacher's: {token!r} is id {token_id} for the teacher "
                f"and {student_ids.get(token)} for the student; give a --student-tokenizer made by adding tokens"
            )


def new_model(
    tokenizer: "PreTrainedTokenizerBase", *, rows: int, hidden: int, layers: int, heads: int, tied: bool, **more: Any
) -> "Qwen3ForCausalLM":
    """A small Qwen3 with fresh weights; ``more`` are further entries of its config."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=HEAD_DIM,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
        **more,
    )
    model = Qwen3ForCausalLM(config)
    # Qwen ends an answer at either of the two; the first is the tokenizer's own.
    model.generation_config = GenerationConfig(eos_token_id=list(dict.fromkeys((eos, pad))), pad_token_id=pad)
    return model


def _fill_teacher(teacher: "Qwen3ForCausalLM", config: TinyPairConfig, known: int) -> None:
    """Draw the teacher's weights; the ids from ``known`` on are padding."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    row_std = config.logit_std / math.sqrt(config.hidden)
    offset = torch.randn(config.hidden, generator=generator) * row_std  # (H)
    for name, weight in _row_matrices(teacher):
        rows = torch.randn(weight.shape, generator=generator) * row_std
        rows[known:] *= config.extended_scale
        weight.copy_(rows + offset if name == "embed" else rows)
    for name, weight in _block_matrices(teacher):
        gain = RESIDUAL_GAIN if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * gain / math.sqrt(weight.shape[1]))
    # Random signs keep a tied head from repeating the last token: its row times itself is otherwise the largest logit.
    norm = teacher.model.norm.weight
    norm.copy_(torch.randint(0, 2, norm.shape, generator=generator) * 2.0 - 1.0)


def _fill_student(student: "Qwen3ForCausalLM", teacher: "Qwen3ForCausalLM", config: TinyPairConfig, known: int) -> None:
    """Copy the teacher's weights with noise; rows from ``known`` on are drawn afresh."""
    import torch

    generator = torch.Generator().manual_seed(config.seed + 1)
    for (_, weight), (_, source) in zip(_row_matrices(student), _row_matrices(teacher), strict=True):
        weight[:known] = _perturbed(source[:known], config.student_noise, generator)
        fresh = torch.randn(weight[known:].shape, generator=generator) * source[:known].std(0)
        weight[known:] = fresh * config.extended_scale + source[:known].mean(0)
    for (_, weight), (_, source) in zip(_block_matrices(student), _block_matrices(teacher), strict=True):
        weight.copy_(_perturbed(source, config.student_noise, generator))
    student.model.norm.weight.copy_(
        _perturbed(teacher.model.norm.weight, config.student_noise * NORM_NOISE_FACTOR, generator)
    )


def _perturbed(weight: "torch.Tensor", noise: float, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return weight + torch.randn(weight.shape, generator=generator) * weight.std() * noise


def _row_matrices(model: "Qwen3ForCausalLM") -> Iterator[tuple[str, "torch.Tensor"]]:
    """The (V, H) matrices: the embedding and, where it is one of its own, the lm head."""
    yield "embed", model.model.embed_tokens.weight
    if not model.config.tie_word_embeddings:
        yield "head", model.lm_head.weight


def _block_matrices(model: "Qwen3ForCausalLM") -> Iterator[tuple[str, "torch.Tensor"]]:
    """The matrices of the transformer blocks; norms inside blocks stay 1."""
    return ((name, weight) for name, weight in model.model.layers.named_parameters() if weight.ndim == 2)


def describe_pair(teacher_dir: Path, student_dir: Path) -> str:
    """A small table of what was written, with the threshold to train with."""
    from transformers import Qwen3ForCausalLM

    lines = [f"{'':8} {'ids':>8} {'rows':>8} {'padding':>8} {'parameters':>11}  folder"]
    for role, folder in (("teacher", teacher_dir), ("student", student_dir)):
        ids, model = len(hf_tokenizer(folder)), Qwen3ForCausalLM.from_pretrained(folder)
        rows, parameters = model.config.vocab_size, model.num_parameters()
        lines.append(f"{role:8} {ids:8,} {rows:8,} {rows - ids:8,} {parameters:11,}  {folder}")
    threshold, ids = len(hf_tokenizer(teacher_dir)), len(hf_tokenizer(student_dir))
    if ids == threshold:
        lines.append("no extended vocabulary: leave EXTEND_VOCAB_START_TOKEN unset")
    else:
        lines.append(f"extended ids {threshold}-{ids - 1}: EXTEND_VOCAB_START_TOKEN={threshold}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_parser(
        "recipe.onpolicy_distill.tiny_models",
        "Write a random Qwen3 teacher and a student that extends and perturbs it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--teacher-tokenizer", required=True, help="folder")
    parser.add_argument("--student-tokenizer", required=True, help="folder; the same ids and more")
    parser.add_argument("--out", required=True, type=Path, help="folder that receives teacher/ and student/")
    add_options(parser, TinyPairConfig)
    settings = vars(parser.parse_args(argv))
    teacher, student, out = (settings.pop(name) for name in ("teacher_tokenizer", "student_tokenizer", "out"))
    try:
        folders = build_tiny_models(teacher, student, out, TinyPairConfig(**settings))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(describe_pair(*folders))


if __name__ == "__main__":
    main()
