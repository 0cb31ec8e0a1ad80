"""An engine that sends tokens to other experts than the trainer does: what becomes of log-probs and of the gradient?

::

    python benchmarks/expert_routing.py [--rows 64] [--tokens 64] [--seed 0]

A random Qwen3-MoE in fp32 is the trainer. Engines are the same model in bf16, and in fp32 with noise on the routers'
logits. Each writes answers; on these: the gap of log-probs, how often the sets of experts differ, and the gradient of
the exact objective with the trainer's own routing beside that with the engine's routing replayed. For comparison, how
far the gradients of two halves of the answers are apart. The last line is one JSON document.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

VOCABULARY, PROMPT_TOKENS = 2048, 8
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "head_dim": 32}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "norm_topk_prob": True}
SIZES |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
NOISES = (0.01, 0.1, 0.5)
"""Standard deviations; that of the router logits themselves is about 1.3."""


def build_models() -> tuple[Model, Model]:
    """The student, and a teacher that it is a noisy copy of."""
    teacher = Model(Qwen3MoeConfig(**SIZES)).eval()
    student = Model(teacher.config).eval()
    with torch.no_grad():
        for own, given in zip(student.parameters(), teacher.parameters(), strict=True):
            if given.dim() > 1:
                own.copy_(given.normal_(std=0.08) + 0.004 * torch.randn_like(given))
    return student, teacher


@contextmanager
def routing(model: Model, noise: float = 0.0, replayed: Sequence[torch.Tensor] = ()) -> Iterator[list[torch.Tensor]]:
    """The experts (tokens, chosen) of each layer of the forward passes within; replayed ones where some are given."""
    seen: list[torch.Tensor] = []

    def route(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits = output[0] + noise * torch.randn_like(output[0])
        experts = replayed[len(seen)] if replayed else logits.topk(router.top_k).indices
        weights = logits.float().softmax(-1).gather(-1, experts)
        seen.append(experts)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts

    with ExitStack() as stack:
        for router in model.modules():
            if isinstance(router, Qwen3MoeTopKRouter):
                stack.callback(router.register_forward_hook(route).remove)
        yield seen


def log_probs(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, V) at the answers, in fp32."""
    return model(input_ids=ids, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1].float().log_softmax(-1)


def gradient(student: Model, ids: torch.Tensor, of_teacher: torch.Tensor) -> torch.Tensor:
    """Of the mean reverse KL, all parameters in a row."""
    own = log_probs(student, ids)
    loss = (own.exp() * (own - of_teacher)).sum(-1).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*student.parameters()])]).double()


def compare(student: Model, teacher: Model, engine: Model, noise: float, rows: int, tokens: int) -> dict[str, float]:
    """The figures of one engine."""
    prompts = torch.randint(VOCABULARY, (rows, PROMPT_TOKENS))
    with torch.no_grad(), routing(engine, noise):
        options = {"do_sample": True, "top_k": 0, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        ids = engine.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    with torch.no_grad(), routing(engine, noise) as of_engine:
        engine_scores = log_probs(engine, ids)
    with torch.no_grad(), routing(student) as of_trainer:
        trainer_scores, of_teacher = log_probs(student, ids), log_probs(teacher, ids)
    gap = (engine_scores - trainer_scores).gather(-1, ids[:, PROMPT_TOKENS:, None]).abs()
    sets = [torch.stack(experts).sort(-1).values for experts in (of_engine, of_trainer)]
    differs = (sets[0] != sets[1]).any(-1)  # (layers, tokens)
    own = gradient(student, ids, of_teacher)
    with routing(student, replayed=of_engine):
        replayed = gradient(student, ids, of_teacher)
    first, second = (gradient(student, *half) for half in zip(ids.chunk(2), of_teacher.chunk(2), strict=True))
    return {
        "reverse_kl": float((trainer_scores.exp() * (trainer_scores - of_teacher)).sum(-1).mean()),
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
        "other_experts_in_a_layer": float(differs.float().mean()),
        "other_experts_in_any_layer": float(differs.any(0).float().mean()),
        "cosine": float(cosine_similarity(own, replayed, dim=0)),
        "relative_difference": float((own - replayed).norm() / own.norm()),
        "cosine_of_halves": float(cosine_similarity(first, second, dim=0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, what in (("rows", 64, "answers"), ("tokens", 64, "of an answer"), ("seed", 0, "of everything")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    student, teacher = build_models()
    half = Model(student.config).to(torch.bfloat16).eval()
    half.load_state_dict(student.state_dict())
    found = {"bf16": compare(student, teacher, half, 0.0, args.rows, args.tokens)}
    for noise in NOISES:
        found[f"fp32, noise {noise}"] = compare(student, teacher, student, noise, args.rows, args.tokens)
    for name, figures in found.items():
        print(f"{name:16}", *(f"{figure} {value:.4g}" for figure, value in figures.items()), sep="  ")
    print(json.dumps({"settings": vars(args), "engines": found}))


if __name__ == "__main__":
    main()
