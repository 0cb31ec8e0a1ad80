"""The manager with real Ray actors around a replica without a model: order, seeds, weight sync, failures."""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import save_file
from support.agent_loop_fakes import load
from support.fake_replica import DIE, END, HANG, RAISE, SHAPES, STALL, FakeReplica

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopManager, AsyncLLMServerManager, Replica, RolloutError
from verl.protocol import BATCH_KEYS, DataProto
from verl.workers.rollout.replica import TokenOutput

HERE = Path(__file__).parent


# -------------------------------------------------------------------------------------------- choice of a replica


class FakeActor:
    """Looks like a Ray actor handle: ``generate.remote`` returns something to await."""

    def __init__(self) -> None:
        self.open: list[asyncio.Future[TokenOutput]] = []
        self.request_ids: list[str] = []
        self.generate = self

    def remote(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str):
        self.request_ids.append(request_id)
        self.open.append(asyncio.get_running_loop().create_future())
        return self.open[-1]

    def answer(self) -> None:
        self.open.pop().set_result(TokenOutput([1], None, "stop", 0))


async def test_conversations_go_to_the_least_busy_replica_and_stay_there() -> None:
    actors = [FakeActor(), FakeActor()]
    servers = AsyncLLMServerManager([Replica(str(i), actor) for i, actor in enumerate(actors)], first=1)

    async def ask(conversation: str) -> asyncio.Task[TokenOutput]:
        task = asyncio.create_task(servers.generate([1], {}, conversation))
        await asyncio.sleep(0)
        return task

    tasks = [await ask(name) for name in "abcd"]
    assert [len(actor.open) for actor in actors] == [2, 2]
    assert actors[1].request_ids[0].startswith("a-"), "first=1 begins with replica 1"
    actors[0].answer()
    actors[0].answer()
    await asyncio.sleep(0)
    tasks.append(await ask("a"))
    assert len(actors[1].open) == 3, "a has its cache on replica 1"
    assert len(set(actors[1].request_ids)) == 3, "every request has an id of its own"
    servers.forget("a")
    tasks.append(await ask("a"))
    assert len(actors[0].open) == 1
    for actor in actors:
        while actor.open:
            actor.answer()
    await asyncio.gather(*tasks)


# -------------------------------------------------------------------------------------------- with Ray


class Ranks:
    """Two training ranks on this node, each with a GPU of its own as far as anyone can see, and weights in buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = list(SHAPES)
        self.events: list[str] = []

    def get_placement(self) -> list[dict[str, Any]]:
        node = {"node_id": ray.get_runtime_context().get_node_id(), "node_ip": "10.0.0.1"}
        return [{"rank": rank, "local_rank": rank, "cuda_visible_devices": str(rank + 4)} | node for rank in range(2)]

    def num_weight_buckets(self) -> int:
        return len(self.names)

    def export_weight_bucket(self, index: int) -> list[dict[str, Any] | None]:
        name = self.names[index]
        path = self.folder / f"bucket-{index}.safetensors"
        save_file({name: torch.zeros(SHAPES[name])}, path)
        self.events.append(f"export {index}")
        return [{"path": str(path), "names": [name]}] * 2  # each replica reads what the rank beside it exported

    def release_weight_bucket(self, index: int) -> None:
        self.events.append(f"release {index}")
        (self.folder / f"bucket-{index}.safetensors").unlink()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


def make_config(log: Path, **fake: Any) -> PPOConfig:
    config = PPOConfig()
    rollout = config.actor_rollout_ref.rollout
    rollout.name = "hf"
    rollout.engine_kwargs = {"fake": {"log": str(log), **fake}}
    rollout.prompt_length, rollout.response_length = 4, 4
    rollout.calculate_log_probs = True
    rollout.agent.num_workers = 2
    rollout.timeout_s = 5.0
    return config


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizers: tuple[Path, Path]):
    return load(tiny_tokenizers[1])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manager") / "events"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("buckets"))


@pytest.fixture(scope="module")
def manager(ray_cluster: None, ranks: Ranks, log: Path, tokenizer) -> Iterator[AgentLoopManager]:
    made = AgentLoopManager(make_config(log), ranks, device="cuda", tokenizer=tokenizer, replica_class=FakeReplica)
    made.start()
    made.wait_ready()
    yield made
    made.shutdown()
    made.shutdown()


def prompts(ids: list[list[int]], uids: list[str] | None = None) -> DataProto:
    columns = {"prompt_ids": ids, "uid": uids or [f"u{row}" for row in range(len(ids))]}
    arrays = {key: np.empty(len(ids), dtype=object) for key in columns}
    for key, column in columns.items():
        arrays[key][:] = column
    return DataProto.from_dict(non_tensors=arrays, meta_info={"global_steps": 1, "validate": False})


def test_replicas_get_the_devices_of_their_ranks(manager: AgentLoopManager, log: Path) -> None:
    assert sorted(log.read_text().splitlines()) == ["0 launch 4", "1 launch 5"]


def test_rows_come_back_in_order_with_the_rollouts_keys_alone(manager: AgentLoopManager) -> None:
    seen: list[tuple[int, int]] = []
    ids = [[10 + row] * (1 + row % 4) for row in range(7)]
    batch = manager.generate_sequences(prompts(ids), progress=lambda done, total: seen.append((done, total)))
    made = {key for key, column in BATCH_KEYS.items() if column.producer == "rollout"}
    assert set(batch.batch.keys()) | set(batch.non_tensor_batch) == made
    assert batch.batch["responses"][:, 0].tolist() == list(range(10, 17))
    assert batch.batch["responses"][:, 3].tolist() == [END] * 7
    assert batch.batch["attention_mask"].sum(1).tolist() == [len(row) + 4 for row in ids]
    assert set(batch.batch["responses"][:, 2].tolist()) == {0, 1}, "both replicas were asked"
    assert seen[-1] == (7, 7)
    assert batch.meta_info["metrics"]["timing_s/agent_loop/generate_sequences/min"] > 0


def test_samples_depend_on_neither_order_nor_number_of_workers(manager: AgentLoopManager) -> None:
    def seeds(batch: DataProto) -> list[int]:
        return batch.batch["responses"][:, 1].tolist()

    together = seeds(manager.generate_sequences(prompts([[1], [2], [3]], ["a", "b", "c"])))
    turned = seeds(manager.generate_sequences(prompts([[3], [2], [1]], ["c", "b", "a"])))
    alone = [seeds(manager.generate_sequences(prompts([[1]], [uid])))[0] for uid in "abc"]
    assert together == turned[::-1] == alone


def test_a_weight_sync_takes_every_bucket_in_order_and_wakes_the_engines(
    manager: AgentLoopManager, ranks: Ranks, log: Path
) -> None:
    manager.sleep()
    assert manager.asleep
    with pytest.raises(RolloutError, match="the engines sleep"):
        manager.generate_sequences(prompts([[1]]))
    manager.update_weights(ranks, version=1)
    assert not manager.asleep
    assert ranks.events == ["export 0", "release 0", "export 1", "release 1"]
    for replica in "01":
        events = [line[2:] for line in log.read_text().splitlines() if line[0] == replica and "launch" not in line]
        assert events == ["sleep", "wake weights", "start", "load embed.weight", "load norm.weight", "finish"]
    manager.generate_sequences(prompts([[1], [2]]))


def test_an_incomplete_sync_names_replica_and_tensor_and_a_whole_one_mends_it(
    manager: AgentLoopManager, ranks: Ranks
) -> None:
    ranks.names = ["norm.weight"]
    with pytest.raises(ValueError, match=r"(?s)rollout replica \d \(hf, node 10.0.0.1\).*missing: embed.weight"):
        manager.update_weights(ranks, version=2)
    with pytest.raises(RolloutError, match=r"rollout replica \d .* failed to generate: .*sync 2 was incomplete"):
        manager.generate_sequences(prompts([[1]]))
    ranks.names = list(SHAPES)
    manager.update_weights(ranks, version=3)
    manager.generate_sequences(prompts([[1]]))


def test_samples_of_other_weights_are_refused(manager: AgentLoopManager, ranks: Ranks) -> None:
    manager.weight_version = 99
    with pytest.raises(RolloutError, match=r"versions \[3\] after the sync of version 99"):
        manager.generate_sequences(prompts([[1]]))
    manager.weight_version = 3


def test_a_prompt_that_cannot_be_used_is_a_value_error(manager: AgentLoopManager) -> None:
    with pytest.raises(ValueError, match=r"has 5 tokens, above data.max_prompt_length=4"):
        manager.generate_sequences(prompts([[1], [1, 2, 3, 4, 5]]))


def test_prompts_without_messages_name_what_is_missing(manager: AgentLoopManager) -> None:
    batch = prompts([[1]])
    batch.non_tensor_batch.pop("prompt_ids")
    with pytest.raises(KeyError, match="raw_prompt"):
        manager.generate_sequences(batch)


def test_an_engine_that_raises_is_named_with_its_cause(manager: AgentLoopManager) -> None:
    message = r"^agent-loop worker 0 \(node 10.0.0.1\) failed to generate: rollout replica \d .*: the kernel failed$"
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[RAISE]]))
    cause, log = str(caught.value).splitlines()
    assert re.match(message, cause)
    assert_names_a_log(log)


def assert_names_a_log(line: str) -> None:
    """The line that says where the errors of the process are, which is true."""
    said = re.match(r"log: (/\S+\.err) on node 10.0.0.1$", line)
    assert said, line
    assert Path(said.group(1)).is_file()


def test_a_launch_that_fails_is_named_at_once(
    ray_cluster: None, tmp_path: Path, tiny_tokenizers: tuple[Path, Path]
) -> None:
    config = make_config(tmp_path / "log", fail_launch=True)
    config.actor_rollout_ref.model.tokenizer_path = str(tiny_tokenizers[1])
    broken = AgentLoopManager(config, device="cpu", replica_class=FakeReplica)
    broken.start()
    with pytest.raises(RolloutError, match=r"rollout replica 0 .* failed to start: RuntimeError: no memory"):
        broken.wait_ready()
    broken.shutdown()


def test_a_request_that_hangs_is_cancelled_and_answered_elsewhere(
    manager: AgentLoopManager, ranks: Ranks, log: Path
) -> None:
    """The first of its two rows goes to replica 0, which alone hangs."""
    batch = manager.generate_sequences(prompts([[HANG, 7], [1]]))
    assert batch.batch["responses"][:, 0].tolist() == [7, 1]
    assert batch.batch["responses"][0, 2] == 1, "the other replica"
    assert batch.meta_info["metrics"]["agent_loop/retried_requests"] == 1.0
    assert "0 cancelled" in log.read_text().splitlines(), "the engine is told"
    manager.update_weights(ranks, version=5)  # so it may take weights: no request is under way


def test_an_engine_that_hangs_in_a_weight_sync_is_named(manager: AgentLoopManager, ranks: Ranks, log: Path) -> None:
    log.with_name("hang").touch()
    with pytest.raises(
        RolloutError, match=r"^rollout replica 0 \(hf, node 10.0.0.1\) did not begin a weight sync with"
    ):
        manager.update_weights(ranks, version=6)
    log.with_name("hang").unlink()
    time.sleep(0.5)
    manager.update_weights(ranks, version=7)  # a whole sync mends what is left of it


def test_a_bucket_is_released_when_loading_it_fails(manager: AgentLoopManager, ranks: Ranks) -> None:
    ranks.events.clear()
    export = ranks.export_weight_bucket

    def broken(index: int) -> list[dict[str, Any] | None]:
        return [{"path": "/no/such/file", "names": ["norm.weight"]} for _ in export(index)]

    ranks.export_weight_bucket = broken
    with pytest.raises(RolloutError, match=r"rollout replica \d .* failed to load weight bucket 0 of version 4: "):
        manager.update_weights(ranks, version=4)
    assert ranks.events == ["export 0", "release 0"]
    assert not list(ranks.folder.iterdir())
    ranks.export_weight_bucket = export
    manager.update_weights(ranks, version=8)


def test_an_agent_loop_worker_that_is_killed_is_named(manager: AgentLoopManager) -> None:
    worker = manager._workers[0]
    pid = ray.get(worker.actor.__ray_call__.remote(lambda _: os.getpid()))
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    started = time.monotonic()
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[STALL]]))
    assert time.monotonic() - started < 4.0, "before the request is found to hang"
    cause, log = str(caught.value).splitlines()
    assert cause.startswith("agent-loop worker 0 (node 10.0.0.1) failed to generate: the process died: Worker unexp")
    assert_names_a_log(log)
    manager._workers[0] = manager._create_worker(0, 2, ray.put(manager._tokenizer))


def test_the_rest_of_the_run_is_looked_at_meanwhile(manager: AgentLoopManager) -> None:
    def rank_died() -> None:
        raise RuntimeError("rank 1 died")

    manager.watch = rank_died
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 died"):
        manager.generate_sequences(prompts([[STALL]]))
    assert time.monotonic() - started < 3.0
    manager.watch = None


def test_an_engine_that_dies_is_named(manager: AgentLoopManager) -> None:
    """Last: it takes a replica along."""
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[DIE]]))
    cause, log = str(caught.value).splitlines()
    assert re.search(r"rollout replica \d \(hf, node 10.0.0.1\) failed to generate: the process died: ", cause)
    assert_names_a_log(log)
    with pytest.raises(RolloutError, match=r"^rollout replica \d .* failed: the process died: "):
        for _ in range(100):
            manager.check_alive()
            time.sleep(0.1)
