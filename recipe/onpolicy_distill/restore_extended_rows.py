"""Put the rows of item tokens back as they were before a run: a free repair of the recommender, at no training.

::

    python -m recipe.onpolicy_distill.restore_extended_rows --before M0 --after M1 --out M2 \\
        --extend-vocab-start-token 151669

In:  a student before and after distillation, in Hugging Face format. Out: M1 with the embedding's rows from the first
extended id on, and those of the lm head where it is a matrix of its own, taken from M0. Nothing else changes. It helps
where the two are tied, and little where they are not; with rehearsal (``algorithm.distill.teachers``) it is not needed.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ROW_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""What has a row per id, in the names of Hugging Face's decoders."""


def restore_extended_rows(before: Path, after: Path, out: Path, start: int) -> list[str]:
    """Write the model; returns the names of the tensors whose rows were put back.

    Args:
        before: folder of the student before the run.
        after: folder of the student after it.
        out: a folder that does not exist yet.
        start: first extended id.

    Raises:
        ValueError: a folder without weights, an output that exists, or tensors that do not fit each other.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists already; name a folder that does not")
    originals, repaired = _row_tensors(before), _row_tensors(after)
    if not repaired:
        raise ValueError(f"--after {after} holds none of {', '.join(ROW_TENSORS)}; it is no decoder in that format")
    for name, tensor in repaired.items():
        if name not in originals:
            fix = "one is tied and the other is not; give the student that the run started from"
            raise ValueError(f"--before {before} holds no {name}, which --after has: {fix}")
        if originals[name].shape != tensor.shape:
            shapes = f"{list(originals[name].shape)} before and {list(tensor.shape)} after"
            raise ValueError(f"{name} has the shape {shapes}; give the student that the run started from")
        if not 0 < start < len(tensor):
            raise ValueError(f"--extend-vocab-start-token {start} must lie between 1 and {len(tensor) - 1} for {name}")
        tensor[start:] = originals[name][start:].to(tensor.dtype)
    shutil.copytree(after, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in tqdm(weight_files(after), desc="write", unit="file", leave=False):
        tensors = load_file(file)
        tensors |= {name: tensor for name, tensor in repaired.items() if name in tensors}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    return list(repaired)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; raises ValueError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors; give a model folder in Hugging Face format")
    return files


def _row_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of ROW_TENSORS that a model has, without reading its other tensors."""
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in weights.keys() if name in ROW_TENSORS}  # noqa: SIM118
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipe.onpolicy_distill.restore_extended_rows", description=str(__doc__).splitlines()[0]
    )
    for name, meaning in (("before", "student before distillation"), ("after", "student after it"), ("out", "result")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of the {meaning}")
    parser.add_argument("--extend-vocab-start-token", type=int, required=True, help="first extended id")
    args = parser.parse_args(argv)
    try:
        restored = restore_extended_rows(args.before, args.after, args.out, args.extend_vocab_start_token)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"rows from {args.extend_vocab_start_token} on put back in {', '.join(restored)}: {args.out}")


if __name__ == "__main__":
    main()
