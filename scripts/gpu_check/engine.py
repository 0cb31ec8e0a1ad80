"""vLLM beside the student that is trained: answers, sleep, weight syncs of several bucket sizes, log-probs."""

import asyncio
import importlib.util
import time

import torch

from scripts.gpu_check.bench import Bench, Skipped
from scripts.gpu_check.ranks import as_batch, build_workers
from verl.config import RolloutConfig
from verl.weight_sync import WeightExporter
from verl.workers.rollout.replica import TokenOutput, get_replica_class

GAP = "<= 0.1", "trainer.engine_gap_bound: 0.01 to 0.06 are usual in bf16"


class Beside:
    """A student and the engine that gets its weights."""

    def __init__(self, bench: Bench) -> None:
        self.bench, (self.student, _) = bench, build_workers(bench, 4)
        self.student.init_model()
        self.module, start = self.student.actor.actor_module, bench.sizes[0]
        sizes = {"prompt_length": 64, "response_length": 512, "max_num_seqs": 64, "cpu_kvcache_space_gb": 0.1}
        config = RolloutConfig(gpu_memory_utilization=0.4, extend_vocab_start_token=start, **sizes)
        self.replica = get_replica_class("vllm")(config, self.student.config.model, 0, bench.device)
        self.prompts = torch.randint(4, start, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()

    async def ask(self, count: int, tokens: int, seeded: bool = False, temperature: float = 1.0) -> list[TokenOutput]:
        """Answers of so many tokens to the first prompts."""
        options = {"max_tokens": tokens, "temperature": temperature, "logprobs": True, "ignore_eos": True}
        own = [{**options, "seed": number if seeded else None} for number in range(count)]
        names = [f"{time.perf_counter()}-{number}" for number in range(count)]
        return await asyncio.gather(*map(self.replica.generate, self.prompts[:count], own, names))

    async def greedy(self) -> torch.Tensor:
        """(8, 32) likeliest tokens."""
        return torch.tensor([answer.token_ids for answer in await self.ask(8, 32, temperature=0.0)])

    async def sync(self, bucket_mib: int, version: int) -> None:
        """Put the engine to sleep, send it the student's weights, wake it."""
        name, cuda = f"buckets of {bucket_mib} MiB", not self.bench.smoke
        if cuda:
            before, _ = torch.cuda.mem_get_info()
            await self.replica.sleep()
            freed = (torch.cuda.mem_get_info()[0] - before) / 2**30
            self.bench.check(f"{name}: GiB freed by sleep", freed, ">= 5", "estimate: weights and cache are gone")
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        sizes = {"dtype": torch.bfloat16 if cuda else torch.float32, "bucket_bytes": bucket_mib << 20}
        exporter = WeightExporter(self.module, device=device, writes_files=True, **sizes)
        began, bound = time.perf_counter(), f"<= {1 + 0.2 * exporter.num_buckets:.0f}"
        await self.replica.start_weight_update()
        for index in range(exporter.num_buckets):
            await self.replica.update_weights(exporter.export(index))
        exporter.release()
        await self.replica.finish_weight_update(version)
        self.bench.check(f"{name}: seconds", time.perf_counter() - began, bound, "estimate: 0.2 each")

    async def gap(self) -> float:
        """Mean distance of the engine's log-probs from the trainer's, nats."""
        answers = await self.ask(8, 64)
        pairs = zip(self.prompts[:8], answers, strict=True)
        ids = torch.tensor([prompt + answer.token_ids for prompt, answer in pairs])
        own = self.student.compute_log_prob(as_batch(ids, torch.ones_like(ids), 16)).tensor("old_log_probs")
        return float((own - torch.tensor([answer.log_probs for answer in answers])).abs().mean())

    async def speed(self, seeded: bool) -> float:
        """Tokens per second."""
        count, tokens = (4, 16) if self.bench.smoke else (64, 256)
        await self.ask(count, 16, seeded)
        began = time.perf_counter()
        await self.ask(count, tokens, seeded)
        return count * tokens / (time.perf_counter() - began)

    async def drive(self) -> None:
        """The checks, in their order."""
        check, began = self.bench.check, time.perf_counter()
        await self.replica.launch()
        check("seconds to start", time.perf_counter() - began, "<= 120", "estimate")
        check("as loaded: nats apart", await self.gap(), *GAP)
        first = await self.greedy()
        for version, bucket_mib in enumerate((1,) if self.bench.smoke else (64, 1024, 4096), 1):
            await self.sync(bucket_mib, version)
            changed = int((await self.greedy() != first).sum())
            check(f"buckets of {bucket_mib} MiB: greedy tokens changed", changed, "<= 64", "of 256; near ties")
        speeds = [await self.speed(seeded) for seeded in (False, True)]
        check("tokens/s without seeds, with", speeds)
        check("tokens/s without / with seeds", speeds[0] / speeds[1], "<= 1.3", "estimate: seeds are drawn row by row")
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(1.2)
        check("changed, not synced: nats apart", await self.gap(), ">= 0.11", "or the next line could not fail")
        await self.sync(256, version + 1)
        check("changed, synced: nats apart", await self.gap(), *GAP)


def run(bench: Bench) -> None:
    """See the module."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("no vllm")

    async def run_and_stop() -> None:
        beside = Beside(bench)
        try:
            await beside.drive()
        finally:
            await beside.replica.shutdown()

    asyncio.run(run_and_stop())
