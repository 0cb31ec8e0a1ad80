"""Student and teacher on one rank, or on two where there are two GPUs, without Ray: scores, updates, memory."""

import inspect
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from scripts.gpu_check.bench import Bench
from verl import config
from verl.ops.attention import PACKED_SDPA
from verl.protocol import DataProto
from verl.utils.device import release_cached_memory
from verl.utils.tokenizer import save_tokenizer
from verl.workers.model_workers import StudentWorker, TeacherWorker

SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
WHOLE_GIB = 60
"""Memory from which 1.7B weights, their gradient, Adam's moments and 24,000 tokens fit."""


def make_model(bench: Bench, role: str, ids: int, rows: int) -> str:
    """Folder of a random model in Qwen3-1.7B's shape, of fewer layers where memory is small; made once."""
    if (folder := bench.work / role).is_dir():
        return str(folder)
    shape = dict(zip(SHAPE, (64, 96, 4, 2, 32) if bench.smoke else (2048, 6144, 16, 8, 128), strict=True))
    large = not bench.smoke and torch.cuda.get_device_properties(0).total_memory > WHOLE_GIB * 2**30
    shape |= {"vocab_size": rows, "num_hidden_layers": 28 if large else 4}
    torch.manual_seed(ids)
    with torch.device(bench.device):
        model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, eos_token_id=1, **shape)).bfloat16()
    torch.nn.init.constant_(model.model.norm.weight, 4.0)  # logits of a standard deviation of some 3.6
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *map(str, range(2, ids))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    model.save_pretrained(folder)
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"), folder)
    return str(folder)


def build_workers(bench: Bench, rows: int) -> tuple[StudentWorker, TeacherWorker]:
    """Student, with a step for ``rows`` of all ranks by the exact objective, and teacher; offloaded while idle."""
    (start, ids, student_rows, teacher_rows), tokens = bench.sizes, {"log_prob_max_token_len_per_gpu": 24000}
    offload, optim = config.FSDPConfig(param_offload=True, optimizer_offload=True), config.OptimizerConfig(lr=3e-5)
    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.13 on
    model = config.HFModelConfig(make_model(bench, "student", ids, student_rows))
    model.override_config |= {} if has_gqa else {"attn_implementation": PACKED_SDPA}
    sizes = {"ppo_mini_batch_size": rows, "ppo_max_token_len_per_gpu": 24000}
    actor = config.FSDPActorConfig(fsdp_config=offload, optim=optim, **sizes)
    of_teacher = config.RefModelConfig(make_model(bench, "teacher", start, teacher_rows))
    ref = config.RefConfig(of_teacher, fsdp_config=offload, **tokens)
    window = {"prompt_length": 256, "response_length": 1792, "extend_vocab_start_token": start}
    models = config.ActorRolloutRefConfig(model, actor, ref, config.RolloutConfig(**window, **tokens))
    distill = config.DistillConfig(objective="exact", support="shared", leak_coef=1.0)
    student, teacher = StudentWorker(models, bench.device, distill), TeacherWorker(models, bench.device)
    for worker in (student, teacher):
        worker.attach({"actor": student, "ref": teacher}, worker.object_store)
    return student, teacher


def as_batch(ids: torch.Tensor, mask: torch.Tensor, prompt: int) -> DataProto:
    """Rows (B, T) of ids, of which those after the prompt are trained."""
    tensors = {"input_ids": ids * mask, "attention_mask": mask, "response_mask": mask[:, prompt:]}
    return DataProto.from_dict({**tensors, "responses": tensors["input_ids"][:, prompt:]}, None, {"temperature": 1.0})


def run_rank(rank: int, ranks: int, port: int, bench: Bench) -> None:
    """One rank, in a process of its own; the first of them reports."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    check = (bench._replace(results=Path(os.devnull)) if rank else bench).check
    rows, length, prompt = (4, 32, 8) if bench.smoke else (24, 2048, 256)
    student, teacher = build_workers(bench, rows)
    check("seconds to load", [bench.timed(worker.init_model)[0] for worker in (student, teacher)])
    dist.all_reduce(total := torch.ones(1, device=bench.device))
    check(f"all_reduce over {dist.get_backend()}", total.item(), f"== {ranks}", "one from each rank")
    check("idle: GiB", bench.gib("memory_reserved"), "<= 1", "estimate: both are in host memory")
    ids = torch.randint(4, bench.sizes[0], (rows // ranks, length), generator=torch.Generator().manual_seed(rank))
    ends = length - torch.arange(len(ids))[:, None] * (length // (2 * len(ids)))
    batch = as_batch(ids, (torch.arange(length) < ends).long(), prompt)

    def score() -> list[torch.Tensor]:
        own, other = student.compute_log_prob(batch), teacher.compute_ref_log_prob(batch)
        return [own.tensor("old_log_probs"), other.tensor("ref_log_prob")]

    first, (seconds, again) = score(), bench.timed(score)
    change = max(float((old - new).abs().mean()) for old, new in zip(first, again, strict=True))
    check("scored again: nats apart", change, "<= 0.01", "to host memory and back; 0 in chunks of one size")
    check("scored again: seconds", seconds, source=f"{int(batch.tensor('attention_mask').sum())} tokens a rank")
    updates = [bench.timed(lambda: student.update_actor(batch)) for _ in range(3)]
    check("updates: seconds", [seconds for seconds, _ in updates], source="with the teacher and offload")
    gap = float((updates[0][1].tensor("old_log_probs") - first[0]).abs().mean())
    check("update and scoring: nats apart", gap, "<= 0.02", "the same pass; bf16")
    metrics = [found.meta_info["metrics"] for _, found in updates]
    losses = [values["actor/distill_divergence"] for values in metrics]
    check("updates: divergence at last", losses[-1], f"<= {losses[0]:.4g}", "that of the first: one batch, three times")
    check("updates: taken", sum(values["actor/updates"] for values in metrics), "== 3", "all is finite")
    check("updates: GiB at most", bench.gib("max_memory_allocated"), "<= 60", "estimate")
    check("idle again: GiB", bench.gib("memory_reserved"), "<= 1", "estimate")


def run(bench: Bench) -> None:
    """See the module."""
    ranks = max(1, min(2, torch.cuda.device_count()))
    build_workers(bench, ranks)  # their models are made here, once
    release_cached_memory(bench.device)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (ranks, port, bench), nprocs=ranks)
