"""What rollout tests compare engines with: tiny models, weight buckets, log-probs from first principles."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from verl.workers.rollout.replica import TokenOutput

PADDED_ROWS = 40


def save_tiny_model(folder: Path, tokenizer_dir: Path, tied: bool, architecture: str = "qwen3") -> PreTrainedModel:
    """A random model with more embedding rows than its tokenizer has ids, and those rows the likeliest of all."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + PADDED_ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    if architecture == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**sizes | {"num_attention_heads": 2}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32))
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def train_a_little(model: torch.nn.Module, seed: int) -> None:
    """Stands for an optimizer step: every weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()


def write_buckets(
    folder: Path, tensors: Mapping[str, torch.Tensor], tensors_per_bucket: int = 10
) -> list[dict[str, Any]]:
    """Weight buckets as the training workers export them on CPU; returns one ``update_info`` per bucket."""
    names = list(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for first in range(0, len(names), tensors_per_bucket):
        chosen = names[first : first + tensors_per_bucket]
        path = folder / f"bucket-{first}.safetensors"
        save_file({name: tensors[name].detach().contiguous().clone() for name in chosen}, path)
        infos.append({"path": str(path), "names": chosen})
    return infos


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters under their Hugging Face names, a tied head once."""
    return dict(model.named_parameters())


@torch.no_grad()
def reference_log_probs(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], vocab_size: int, sampling: Mapping[str, Any]
) -> list[float]:
    """Log-prob of each token of ``answer`` under the sampler's distribution, one full forward pass without a cache."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, :vocab_size].double()
    logits = logits / (sampling["temperature"] or 1.0)
    for row in logits:
        order = row.argsort(descending=True)
        kept = order[: sampling["top_k"]] if sampling["top_k"] != -1 else order
        probs = row[kept].softmax(-1)
        nucleus = 1 + int((probs.cumsum(-1) < sampling["top_p"]).sum())
        forbidden = torch.ones(len(row), dtype=torch.bool)
        forbidden[kept[:nucleus]] = False
        row[forbidden] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def largest_difference(
    model: torch.nn.Module,
    vocab_size: int,
    prompts: Sequence[Sequence[int]],
    sampling: Mapping[str, Any],
    outputs: Sequence[TokenOutput],
) -> float:
    """Largest absolute difference between the log-probs of the engine and of the reference."""
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.log_probs is not None
        expected = reference_log_probs(model, prompt, output.token_ids, vocab_size, sampling)
        assert len(expected) == len(output.log_probs) > 0
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, output.log_probs, strict=True)))
    return worst
