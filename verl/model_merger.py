"""Make a Hugging Face model from a checkpoint's shards.

::

    python -m verl.model_merger merge --local_dir RUN/global_step_N/actor --target_dir OUT

In: a checkpoint of any number of training ranks. Out: weights in safetensors, config, generation config and tokenizer,
as transformers and vLLM load them. Starts no ranks and holds one file of the model in memory at a time. An adapter is
put into the weights of the model that it names. Takes verl's options.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl.utils.console import command_parser, escape_unknown_characters
from verl.utils.durable_files import write_durably

if TYPE_CHECKING:
    import torch


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
    from verl.workers.fsdp.checkpoint import ADAPTER_FOLDER, CONFIG, HUGGINGFACE, SHARDS, write_weights

    actor = local_dir / "actor" if (local_dir / "actor").is_dir() else local_dir
    described = actor / HUGGINGFACE
    if any(actor.glob("model_world_size_*")):
        raise ValueError(f"--local_dir {local_dir} holds shards of verl, which only the merger of that verl reads")
    if not (described / CONFIG).is_file():
        raise ValueError(f"--local_dir {local_dir} holds no {HUGGINGFACE}/{CONFIG}; name the actor/ of a checkpoint")
    if any(target_dir.glob("*.safetensors")):
        raise ValueError(f"--target_dir {target_dir} holds a model already; name another folder")
    precision = None if dtype is None else resolve_dtype(dtype, "cpu")
    config = json.loads((described / CONFIG).read_text(encoding="utf-8"))
    if (actor / ADAPTER_FOLDER).is_dir():
        count = _merge_adapter(actor / ADAPTER_FOLDER, target_dir, precision or resolve_dtype(config["dtype"], "cpu"))
    else:
        count = write_weights(actor / SHARDS, target_dir, described, precision)
    shutil.copytree(described, target_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", CONFIG))
    if precision is not None:
        config["dtype"] = dtype_name(precision)
    # Written last: nothing loads a folder without it.
    write_durably(target_dir / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return count


def _merge_adapter(adapter: Path, target_dir: Path, dtype: "torch.dtype") -> int:
    """Write the model that an adapter in peft's files belongs to, with the adapter in it; returns its parameters.

    Raises:
        ValueError: that model is not on this machine in safetensors, or lacks a tensor that the adapter changes.
    """
    from safetensors.torch import load_file

    from verl.utils.tokenizer import local_model_folder
    from verl.workers.fsdp.adapter import FILE_PREFIX
    from verl.workers.fsdp.checkpoint import write_file

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    named, scale, count = settings["base_model_name_or_path"], settings["lora_alpha"] / settings["r"], 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    changes = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in tensors.items()}
    base = local_model_folder(named)
    target_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.glob("*.safetensors")) if base else ():
        part = load_file(path)
        for name, found in part.items():
            weight = changes.pop(name, found)  # rows that were trained beside the adapter come whole
            parts = [f"{name.removesuffix('weight')}lora_{side}.weight" for side in "BA"]
            if parts[0] in changes:
                second, first = (changes.pop(name_of_part) for name_of_part in parts)
                weight = weight.float() + scale * second @ first
            part[name] = weight.to(dtype)
            count += weight.numel()
        write_file(target_dir / path.name, part, {"format": "pt"})
    if changes:
        raise ValueError(f"{adapter} is one of {named}, whose *.safetensors here lack {min(changes)}; bring that model")
    for index in base.glob("*.safetensors.index.json") if base else ():
        shutil.copy(index, target_dir)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    escape_unknown_characters()
    parser = command_parser("verl.model_merger", "Make a Hugging Face model from a checkpoint's shards.")
    parser.add_argument("action", choices=("merge",), nargs="?", help="verl's name of what is done; may be left out")
    parser.add_argument("--local_dir", required=True, type=Path, metavar="CKPT", help="a checkpoint, or its actor/")
    parser.add_argument("--target_dir", required=True, type=Path, metavar="OUT", help="folder of the model")
    parser.add_argument("--backend", choices=("fsdp", "fsdp2"), default="fsdp", help="all checkpoints are FSDP2's")
    parser.add_argument("--dtype", help="such as bfloat16; default: as the trainer stores the weights (mostly float32)")
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
