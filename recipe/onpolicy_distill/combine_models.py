"""A weighted sum of models over one vocabulary or its extension: the baselines that cost no training.

::

    # half way between the student before and the teacher
    python -m recipe.onpolicy_distill.combine_models --extend-vocab-start-token 151669 --out M \\
        --model STUDENT=0.5 --model TEACHER=0.5
    # task arithmetic: what recommending taught, added once more, at half its size, to the student after a run
    ... --model AFTER=1 --model BEFORE=0.5 --model TEACHER=-0.5
    # the student after a run, with its rows of item tokens as they were
    ... --model AFTER=1 --rows-from BEFORE

In:  models in Hugging Face format with their coefficients, which add up to 1. Out: a model with the config, tokenizer,
files and precision of the first one. The rows of extended ids, in the embedding and in a head of its own, are those of
``--rows-from``, or else the weighted mean over the models whose tokenizer has these ids: a teacher's padded rows in
their place count for nothing.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from tqdm import tqdm

from verl.utils.console import command_parser
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.vocab_contract import THRESHOLD_HELP, resolve_threshold, threshold

if TYPE_CHECKING:
    import torch

HEAD = "lm_head.weight"
ROW_TENSORS = ("model.embed_tokens.weight", HEAD)
"""What has a row per id, in the names of Hugging Face's decoders."""


def combine_models(parts: Mapping[Path, float], out: Path, start: int, rows_from: Path | None = None) -> None:
    """Write ``sum of coefficient x model``, computed in float32.

    Args:
        parts: coefficient by model folder.
        out: a folder that does not exist yet.
        start: first extended id.
        rows_from: the model whose extended rows are taken as they are.

    Raises:
        ValueError: an output that exists, coefficients that do not add up to 1, a folder without weights, or models
            that do not fit each other.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists already; name a folder that does not")
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise ValueError(f"the coefficients add up to {sum(parts.values()):g}; they have to add up to 1")
    first = next(iter(parts))
    models = {folder: ModelFiles(folder) for folder in dict.fromkeys([*parts, *([rows_from] if rows_from else [])])}
    if not models[first].names & set(ROW_TENSORS):
        raise ValueError(f"{first} holds none of {', '.join(ROW_TENSORS)}; it is no decoder in that format")
    knowing = {rows_from: 1.0} if rows_from else {f: c for f, c in parts.items() if models[f].num_ids() > start}
    for folder, model in models.items():
        model.check_fits(models[first], start, knows_extended=folder in (first, *knowing))
    share = sum(knowing.values())
    if abs(share) < 1e-6:
        raise ValueError(
            f"no model has rows of ids from {start} on, or their coefficients add up to 0; use --rows-from"
        )
    import torch
    from safetensors.torch import load_file, save_file

    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(first, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in tqdm(models[first].files, desc="write", unit="file", leave=False, disable=None):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name in models[first].names}
        for name, tensor in tensors.items():
            mixed = _weighted_sum(models, parts, name, slice(start if name in ROW_TENSORS else None))
            if name in ROW_TENSORS:
                of_items = _weighted_sum(models, knowing, name, slice(start, None)) / share
                mixed = torch.cat([mixed, of_items])
            tensors[name] = mixed.to(tensor.dtype)
        save_file(tensors, unfinished / file.name, metadata={"format": "pt"})
    unfinished.rename(out)


def _weighted_sum(
    models: Mapping[Path, "ModelFiles"], coefficients: Mapping[Path, float], name: str, rows: slice
) -> "torch.Tensor":
    import torch

    total = torch.zeros(())
    for folder, coefficient in coefficients.items():
        total = total + coefficient * models[folder].tensor(name)[rows].float()
    return total


class ModelFiles:
    """The safetensors files of a model, read a tensor at a time; raises ValueError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{folder} holds no *.safetensors; give a model folder in Hugging Face format")
        self._shapes: dict[str, list[int]] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is no dict)
                    self._file_of[name], self._shapes[name] = file, weights.get_slice(name).get_shape()
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"):
            self._shapes.pop(HEAD, None)  # a copy of the embedding, which some folders hold
        self.names = set(self._shapes)

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor."""
        with safe_open(self._file_of[name], framework="pt") as weights:
            return weights.get_tensor(name)

    def num_ids(self) -> int:
        """Ids of its tokenizer; fewer than the rows that it may have."""
        return len(hf_tokenizer(str(self.folder)))

    def check_fits(self, other: "ModelFiles", start: int, knows_extended: bool) -> None:
        """Raise ValueError where it cannot be added to ``other``, which names the tensors and their shapes."""
        if different := self.names ^ other.names:
            name = min(different)
            holder, lacking = (self, other) if name in self.names else (other, self)
            fix = "one is tied and the other is not" if name in ROW_TENSORS else "give models of one architecture"
            raise ValueError(f"{lacking.folder} holds no {name}, which {holder.folder} has: {fix}")
        for name, shape in self._shapes.items():
            wanted, has_rows = other._shapes[name], name in ROW_TENSORS
            most = shape[0] - knows_extended
            if has_rows and not 0 < start <= most:
                raise ValueError(f"--extend-vocab-start-token {start} must lie between 1 and {most} for {name}")
            if shape != wanted and (knows_extended or not has_rows or shape[1:] != wanted[1:]):
                raise ValueError(f"{name} has the shape {shape} in {self.folder} and {wanted} in {other.folder}")


def read_part(text: str) -> tuple[Path, float]:
    """``FOLDER=COEFFICIENT``."""
    folder, _, coefficient = text.rpartition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"{text}: write FOLDER=COEFFICIENT, such as student=0.5")
    return Path(folder), float(coefficient)


def add_threshold(parser: argparse.ArgumentParser) -> None:
    """Add ``--extend-vocab-start-token`` and the ``--teacher`` that its ``auto`` needs."""
    name = "--extend-vocab-start-token"
    parser.add_argument(name, type=threshold, metavar="N", required=True, help=THRESHOLD_HELP)
    parser.add_argument("--teacher", help=f"folder or hub name of the teacher, for {name} auto")


def read_threshold(args: argparse.Namespace, student: Path) -> int:
    """The first extended id; raises ValueError where there is none."""
    if (start := resolve_threshold(args.extend_vocab_start_token, str(student), args.teacher)) is None:
        raise ValueError(f"--extend-vocab-start-token: {student} has no id that the teacher lacks; give the id")
    return start


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("recipe.onpolicy_distill.combine_models", __doc__)
    parser.add_argument("--model", type=read_part, action="append", required=True, metavar="FOLDER=COEFFICIENT")
    parser.add_argument("--rows-from", type=Path, help="folder of the model whose rows of extended ids are taken")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    add_threshold(parser)
    args = parser.parse_args(argv)
    try:
        if len(dict(args.model)) < len(args.model):
            raise ValueError("a folder is named twice by --model; add up its coefficients")
        combine_models(dict(args.model), args.out, read_threshold(args, args.model[0][0]), args.rows_from)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{' + '.join(f'{coefficient:g} x {folder}' for folder, coefficient in args.model)}: {args.out}")


if __name__ == "__main__":
    main()
