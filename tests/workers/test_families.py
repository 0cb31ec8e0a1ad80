"""Families of models: each is scored as its own logits are, trained, synced, exported, resumed and adapted; or refused.

A random model of two blocks has what sets its family apart, at sizes at which it shows in rows of some ten tokens.
The reference is transformers with its eager attention, which alone has every feature, on each row by itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_workers as tiny
from support.engines import PLAIN, LocalReplica, generate, largest_difference
from support.exact_cases import workers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from verl.config import HFModelConfig, RolloutConfig
from verl.protocol import DataProto
from verl.workers.model_workers import StudentWorker
from verl.workers.rollout.replica import RolloutReplica

pytestmark = pytest.mark.usefixtures("one_rank")

ENGINE = RolloutConfig(name="hf", dtype="float32", prompt_length=16, response_length=24)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ONE_KEY_HEAD = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 1}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CAPS = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5, tied": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2.5": ("qwen2", {"tie_word_embeddings": False}),
    "Qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "Qwen3-MoE": ("qwen3_moe", {"tie_word_embeddings": False, "head_dim": 16, **EXPERTS}),
    "Llama 3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "Mistral 0.1": ("mistral", {"sliding_window": 4, "head_dim": 16}),
    "Phi-3": ("phi3", {"sliding_window": 4, "pad_token_id": 0, "rope_parameters": PARTIAL}),
    "Phi-4": ("phi3", {"pad_token_id": 0, "rope_parameters": PARTIAL}),
    "Gemma": ("gemma", ONE_KEY_HEAD),
    "Gemma 3": ("gemma3_text", {**ONE_KEY_HEAD, **WINDOWS, "query_pre_attn_scalar": 16}),
    "Gemma 2 with a plain head": ("gemma2", {**ONE_KEY_HEAD, **WINDOWS, **CAPS, "final_logit_softcapping": None}),
    "OLMo 2": ("olmo2", {"pad_token_id": 0}),
    "Granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "GPT-OSS": ("gpt_oss", {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}
PADDED = {"Mistral 0.1", "Phi-3", "Gemma 3", "Gemma 2 with a plain head", "GPT-OSS"}
"""Their rows cannot be packed."""
STACKED = {"Qwen3-MoE"}
"""Their experts are one tensor in memory and many in files."""


def write(kind: str, changes: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """Save a random model, in which no bias and no norm is as it was initialized."""
    ids = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    settings = {**SIZES, **HEADS, "vocab_size": len(ids), "pad_token_id": None, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    ids.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def start(folder: Path, **model: Any) -> StudentWorker:
    return workers(tiny.worker_config(folder, model=model))


def scores(worker: StudentWorker, batch: DataProto) -> torch.Tensor:
    return worker.compute_log_prob(batch).tensor("old_log_probs")


def plain_scores(model: PreTrainedModel, batch: DataProto) -> torch.Tensor:
    """Log-probs (B, R) of response tokens, from the whole logits of each row alone."""
    found = torch.zeros(batch.tensor("responses").shape)
    ids, real = batch.tensor("input_ids"), batch.tensor("attention_mask").bool()
    for row in range(len(ids)):
        tokens = ids[row, real[row]]
        drawn = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        drawn = drawn.gather(-1, tokens[1:, None])[:, 0]
        length = int(real[row, tiny.PROMPT :].sum())
        found[row, :length] = drawn[len(drawn) - length :]
    return found


async def load_buckets(replica: RolloutReplica, worker: StudentWorker) -> dict[str, torch.Size]:
    """A weight sync; names and shapes of all that was sent."""
    sent: dict[str, torch.Size] = {}
    await replica.start_weight_update()
    for index in range(len(worker.weight_buckets())):
        bucket = worker.export_weight_bucket(index)
        assert bucket is not None
        await replica.update_weights(bucket)
        sent |= dict(zip(bucket["names"], map(torch.Size, bucket["shapes"]), strict=True))
    worker.release_weight_buckets()
    await replica.finish_weight_update(1)
    return sent


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def batch(tiny_tokenizers: tuple[Path, Path]) -> DataProto:
    """Rows of several lengths."""
    ids = len(AutoTokenizer.from_pretrained(tiny_tokenizers[0]))
    batch = tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(8, ids)))
    batch.pop(["old_log_probs"])  # the update gives them
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, batch: DataProto, tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write(*FAMILIES[family], tiny_tokenizers[0], tmp_path / "model")
    files = shapes(load_file(folder / "model.safetensors"))
    student, plain = start(folder), load(folder)
    assert student._state.module.packed == (family not in PADDED)
    before = scores(student, batch)
    right = plain_scores(plain, batch)
    torch.testing.assert_close(before, right.detach(), rtol=0, atol=1e-4)
    mask = batch.tensor("response_mask")
    loss = -(batch.tensor("advantages") * right * mask).sum() / mask.sum()
    gradient = tiny.plain_gradient(plain, loss)
    metrics = student.update_actor(batch).meta_info["metrics"]
    tiny.assert_same_gradient(tiny.first_gradient(student), gradient)
    norm = torch.stack([value.norm() for value in gradient.values()]).norm()
    assert metrics["actor/grad_norm"] == pytest.approx(float(norm), rel=1e-4)

    tiny.save_checkpoint(student, tmp_path / "step")
    exported = tmp_path / "step/huggingface"
    trained = load(exported)
    weights = tiny.weights_of(student)
    plain.load_state_dict(weights, strict=False)  # a tied head is not among them
    with torch.no_grad():
        torch.testing.assert_close(plain_scores(trained, batch), plain_scores(plain, batch), rtol=0, atol=1e-6)
        torch.testing.assert_close(plain_scores(trained, batch), scores(student, batch), rtol=0, atol=1e-4)
    assert (scores(student, batch) - before).abs().max() > 1e-3
    assert shapes(load_file(exported / "model.safetensors")) == files

    engine = LocalReplica(ENGINE, HFModelConfig(path=str(folder)))
    # Transformers stacks experts in memory, and vLLM takes them so.
    assert engine.run(load_buckets, student) == (shapes(weights) if family in STACKED else files)
    prompts = [list(range(3, 12)), [5]]
    answers = engine.run(generate, prompts, PLAIN)
    assert largest_difference(trained, trained.config.vocab_size, prompts, PLAIN, answers) < 1e-4
    engine.close()

    resumed = start(folder)
    resumed.load_checkpoint(str(tmp_path / "step"))
    first, second = (worker.update_actor(batch).meta_info["metrics"] for worker in (student, resumed))
    assert first == second

    adapted = start(folder, lora_rank=4)
    assert torch.equal(scores(adapted, batch), before)
    adapted.update_actor(batch)
    adapted.update_actor(batch)
    tiny.save_checkpoint(adapted, tmp_path / "adapter")
    after = scores(adapted, batch)
    assert (after - before).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(
            plain_scores(load(tmp_path / "adapter/huggingface"), batch), after, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("phi", {"rope_parameters": PARTIAL}, "PhiForCausalLM can be neither .* its head adds a bias, and log-probs"),
        (
            "gemma2",
            {**ONE_KEY_HEAD, **WINDOWS},
            r"Gemma2For.* its head caps its logits \(final_logit_softcapping=30.0\)",
        ),
    ],
)
def test_heads_that_are_more_than_a_matrix_are_refused_by_name(
    kind: str, changes: dict[str, Any], fault: str, tiny_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{fault}.*; take another model"):
        start(write(kind, changes, tiny_tokenizers[0], tmp_path))
