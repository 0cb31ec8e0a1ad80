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
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from verl.utils.tokenizer import hf_tokenizer

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

    hidden: int = 128
    """Hidden size H, a multiple of 64."""
    layers: int = 2
    """Transformer blocks."""
    tied: bool = False
    """Share the embedding with the lm head, as Qwen3 up to 4B does."""
    student_noise: float = 0.02
    """Noise on each of the student's matrices, relative to the matrix's standard deviation; the norm before the
    head gets NORM_NOISE_FACTOR times as much."""
    logit_std: float = 3.0
    """Standard deviation of the logits over the vocabulary: larger is more certain."""
    extended_scale: float = 0.3
    """Scale of rows past the teacher's tokenizer against the others: smaller makes extended ids rarer."""
    teacher_rows: int | None = None
    """Embedding rows of the teacher; None: the next multiple of 128 that leaves MIN_TEACHER_PADDING unused."""
    student_rows: int | None = None
    """Embedding rows of the student; None: its tokenizer rounded up to a multiple of 256."""
    seed: int = 0
    """Seed of all weights."""

    def __post_init__(self) -> None:
        if self.hidden < 64 or self.hidden % 64:
            raise ValueError(f"--hidden {self.hidden} must be a multiple of 64")
        if self.layers < 1:
            raise ValueError(f"--layers {self.layers} must be at least 1")
        for name in ("student_noise", "logit_std", "extended_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")


def build_tiny_models(
    teacher_tokenizer: str | Path, student_tokenizer: str | Path, out_dir: str | Path, config: TinyPairConfig
) -> tuple[Path, Path]:
    """Write the pair and return its folders, ``out_dir/teacher`` and ``out_dir/student``.

    Raises ValueError where the student's tokenizer does not extend the teacher's, or a row count is too small.
    """
    teacher_tok, student_tok = hf_tokenizer(teacher_tokenizer), hf_tokenizer(student_tokenizer)
    _check_extends(teacher_tok, student_tok)
    known = len(teacher_tok)
    teacher_rows = _row_count("--teacher-rows", config.teacher_rows, known, _round_up(known + MIN_TEACHER_PADDING, 128))
    student_rows = _row_count("--student-rows", config.student_rows, len(student_tok), _round_up(len(student_tok), 256))
    shape: dict[str, Any] = {
        "hidden": config.hidden,
        "layers": config.layers,
        "heads": config.hidden // HEAD_DIM,
        "tied": config.tied,
        "max_position_embeddings": 40960,
    }
    teacher = new_model(teacher_tok, rows=teacher_rows, **shape)
    student = new_model(student_tok, rows=student_rows, **shape)
    _fill_teacher(teacher, config, known)
    _fill_student(student, teacher, config, known)
    folders = Path(out_dir) / "teacher", Path(out_dir) / "student"
    for folder, model, tokenizer in zip(folders, (teacher, student), (teacher_tok, student_tok), strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _row_count(flag: str, asked: int | None, ids: int, default: int) -> int:
    if asked is not None and asked < ids:
        raise ValueError(f"{flag} {asked} is less than the {ids} ids of the tokenizer; give at least {ids}")
    return default if asked is None else asked


def _check_extends(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    student_ids = student.get_vocab()
    for token, token_id in sorted(teacher.get_vocab().items(), key=lambda entry: entry[1]):
        if student_ids.get(token) != token_id:
            raise ValueError(
                f"the student's tokenizer does not extend the teacher's: {token!r} is id {token_id} for the teacher "
                f"and {student_ids.get(token)} for the student; give a --student-tokenizer made by adding tokens"
            )


def new_model(
    tokenizer: PreTrainedTokenizerBase, *, rows: int, hidden: int, layers: int, heads: int, tied: bool, **more: Any
) -> Qwen3ForCausalLM:
    """A small Qwen3 with fresh weights; ``more`` are further entries of its config."""
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


@torch.no_grad()
def _fill_teacher(teacher: Qwen3ForCausalLM, config: TinyPairConfig, known: int) -> None:
    """Draw the teacher's weights; the ids from ``known`` on are padding."""
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


@torch.no_grad()
def _fill_student(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, config: TinyPairConfig, known: int) -> None:
    """Copy the teacher's weights with noise; rows from ``known`` on are drawn afresh."""
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


def _perturbed(weight: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    return weight + torch.randn(weight.shape, generator=generator) * weight.std() * noise


def _row_matrices(model: Qwen3ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The (V, H) matrices: the embedding and, where it is one of its own, the lm head."""
    yield "embed", model.model.embed_tokens.weight
    if not model.config.tie_word_embeddings:
        yield "head", model.lm_head.weight


def _block_matrices(model: Qwen3ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of the transformer blocks; norms inside blocks stay 1."""
    return ((name, weight) for name, weight in model.model.layers.named_parameters() if weight.ndim == 2)


def describe_pair(teacher_dir: Path, student_dir: Path) -> str:
    """A small table of what was written, with the threshold to train with."""
    lines = [f"{'':8} {'ids':>8} {'rows':>8} {'padding':>8} {'parameters':>11}  folder"]
    for role, folder in (("teacher", teacher_dir), ("student", student_dir)):
        ids, rows = len(hf_tokenizer(folder)), Qwen3Config.from_pretrained(folder).vocab_size
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        lines.append(f"{role:8} {ids:8,} {rows:8,} {rows - ids:8,} {parameters:11,}  {folder}")
    threshold, ids = len(hf_tokenizer(teacher_dir)), len(hf_tokenizer(student_dir))
    if ids == threshold:
        lines.append("no extended vocabulary: leave EXTEND_VOCAB_START_TOKEN unset")
    else:
        lines.append(f"extended ids {threshold}-{ids - 1}: EXTEND_VOCAB_START_TOKEN={threshold}")
    return "\n".join(lines)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    defaults = TinyPairConfig()
    parser = argparse.ArgumentParser(
        prog="python -m recipe.onpolicy_distill.tiny_models",
        description="Write a random Qwen3 teacher and a student that extends and perturbs it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--teacher-tokenizer", required=True, help="folder")
    parser.add_argument("--student-tokenizer", required=True, help="folder; the same ids and more")
    parser.add_argument("--out", required=True, type=Path, help="folder that receives teacher/ and student/")
    parser.add_argument("--hidden", type=int, default=defaults.hidden, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=defaults.layers, help="transformer blocks")
    tied = parser.add_mutually_exclusive_group()
    tied.add_argument("--tied", action="store_true", help="share the embedding with the lm head")
    tied.add_argument("--untied", action="store_false", dest="tied", help="an lm head of its own")
    parser.set_defaults(tied=defaults.tied)
    parser.add_argument("--student-noise", type=float, default=defaults.student_noise, help="relative; 0: a copy")
    parser.add_argument("--logit-std", type=float, default=defaults.logit_std, help="larger is more certain")
    parser.add_argument("--extended-scale", type=float, default=defaults.extended_scale, help="smaller is rarer")
    parser.add_argument("--teacher-rows", type=int, help="embedding rows; Qwen3 has 151936")
    parser.add_argument("--student-rows", type=int, help="embedding rows")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of all weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    disable_progress_bar()
    arguments = vars(_parse_arguments(argv))
    fields = {field.name for field in dataclasses.fields(TinyPairConfig)}
    try:
        folders = build_tiny_models(
            arguments["teacher_tokenizer"],
            arguments["student_tokenizer"],
            arguments["out"],
            TinyPairConfig(**{name: value for name, value in arguments.items() if name in fields}),
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(describe_pair(*folders))


if __name__ == "__main__":
    main()
