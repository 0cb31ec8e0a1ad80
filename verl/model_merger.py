"""Make a Hugging Face model from a checkpoint's shards.

::

    python -m verl.model_merger merge --local_dir RUN/global_step_N/actor --target_dir OUT

In: a checkpoint of any number of training ranks. Out: weights in safetensors, config, generation config and tokenizer,
as transformers and vLLM load them. Starts no ranks and holds one file of the model in memory at a time; where an
adapter was trained, the whole model that it names, to merge it into that. Takes verl's options.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from verl.utils.console import escape_unknown_characters, program_name
from verl.utils.durable_files import write_durably


def merge(local_dir: Path, target_dir: Path, dtype: str | None = None) -> int:
    """Write the model of a checkpoint into ``target_dir``.

    Args:
        local_dir: the ``actor`` folder of a checkpoint, or the checkpoint's folder above it.
        target_dir: receives the model; made where it is missing.
        dtype: precision of the weights, such as ``bfloat16``; None: as the trainer stores them.

    Returns:
        Parameters written.

    Raises:
        ValueError: no whole checkpoint there, an unknown precision, or a target that is a model already.
    """
    from verl.utils.device import dtype_name, resolve_dtype
    from verl.workers.fsdp.checkpoint import (
        ADAPTER_FOLDER,
        CONFIG,
        HUGGINGFACE,
        SHARDS,
        write_merged_adapter,
        write_weights,
    )

    actor = local_dir / "actor" if (local_dir / "actor").is_dir() else local_dir
    described = actor / HUGGINGFACE
    if any(actor.glob("model_world_size_*")):
        raise ValueError(f"--local_dir {local_dir} holds shards of verl, which only the merger of that verl reads")
    if not (described / CONFIG).is_file():
        raise ValueError(f"--local_dir {local_dir} holds no {HUGGINGFACE}/{CONFIG}; name the actor/ of a checkpoint")
    if any(target_dir.glob("*.safetensors")):
        raise ValueError(f"--target_dir {target_dir} holds a model already; name another folder")
    precision = None if dtype is None else resolve_dtype(dtype, "cpu")
    if (actor / ADAPTER_FOLDER).is_dir():
        count = write_merged_adapter(actor / ADAPTER_FOLDER, target_dir, precision)
    else:
        count = write_weights(actor / SHARDS, target_dir, precision)
    shutil.copytree(described, target_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", CONFIG))
    config = json.loads((described / CONFIG).read_text(encoding="utf-8"))
    if precision is not None:
        config["dtype"] = dtype_name(precision)
    # Written last: nothing loads a folder without it.
    write_durably(target_dir / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    escape_unknown_characters()
    description = "Make a Hugging Face model from a checkpoint's shards."
    parser = argparse.ArgumentParser(prog=program_name("verl.model_merger"), description=description)
    parser.add_argument("action", choices=("merge",), nargs="?", help="verl's name of what is done; may be left out")
    parser.add_argument("--local_dir", required=True, type=Path, metavar="CKPT", help="a checkpoint, or its actor/")
    parser.add_argument("--target_dir", required=True, type=Path, metavar="OUT", help="folder of the model")
    parser.add_argument("--backend", choices=("fsdp", "fsdp2"), default="fsdp", help="all checkpoints are FSDP2's")
    parser.add_argument("--dtype", help="such as bfloat16; default: as the trainer stores the weights (float32)")
    args = parser.parse_args(argv)
    try:
        count = merge(args.local_dir, args.target_dir, args.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.target_dir}: {count / 1e6:,.1f} million parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
