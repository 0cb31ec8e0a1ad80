"""The manager around replicas without a model, as Ray actors and in this process: order, seeds, syncs, failures."""

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
from support.tiny_pairs import REPO

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.experimental.agent_loop.base import RolloutError
from verl.protocol import BATCH_KEYS, DataProto


class Ranks:
    """Training ranks on one node, each with a GPU of its own as far as anyone can see, and weights in buckets."""

    def __init__(self, folder: Path, node_id: str, count: int = 2) -> None:
        self.folder, self.node_id, self.count = folder, node_id, count
        self.names = list(SHAPES)
        self.events: list[str] = []

    def get_placement(self) -> list[dict[str, Any]]:
        node = {"node_id": self.node_id, "node_ip": "10.0.0.1"}
        return [
            {"rank": rank, "local_rank": rank, "cuda_visible_devices": str(rank + 4), **node}
            for rank in range(self.count)
        ]

    def num_weight_buckets(self) -> int:
        return len(self.names)

    def export_weight_bucket(self, index: int) -> list[dict[str, Any] | None]:
        name, path = self.names[index], self.folder / f"bucket-{index}.safetensors"
        save_file({name: torch.zeros(SHAPES[name])}, path)
        self.events.append(f"export {index}")
        return [{"path": str(path), "names": [name]}] * self.count  # a replica reads what the rank beside it exported

    def release_weight_bucket(self, index: int) -> None:
        self.events.append(f"release {index}")
        (self.folder / f"bucket-{index}.safetensors").unlink()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizers: tuple[Path, Path]):
    return load(tiny_tokenizers[1])


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


def prompts(ids: list[list[int]], uids: list[str] | None = None) -> DataProto:
    columns = {"prompt_ids": ids, "uid": uids or [f"u{row}" for row in range(len(ids))]}
    arrays = {key: np.empty(len(ids), dtype=object) for key in columns}
    for key, column in columns.items():
        arrays[key][:] = column
    return DataProto.from_dict(non_tensors=arrays, meta_info={"global_steps": 1, "validate": False})


def seeds(batch: DataProto) -> list[int]:
    return batch.batch["responses"][:, 1].tolist()


def events_of(log: Path, replica: int) -> list[str]:
    return [line[2:] for line in log.read_text().splitlines() if line[0] == str(replica)]


# -------------------------------------------------------------------------------------------- in this process


def test_in_one_process_all_of_it_works_without_ray(tmp_path: Path, tokenizer) -> None:
    log, ranks = tmp_path / "events", Ranks(tmp_path, "", count=1)
    manager = AgentLoopManager(
        make_config(log), ranks, tokenizer, device="cpu", in_process=True, replica_class=FakeReplica
    )
    manager.start()
    manager.wait_ready()
    manager.check_alive()
    manager.update_weights(ranks, version=7)
    batch = manager.generate_sequences(prompts([[1], [2], [3]], ["a", "b", "c"]))
    assert batch.batch["responses"][:, 0].tolist() == [1, 2, 3]
    assert seeds(batch) == [seeds(manager.generate_sequences(prompts([[1]], [uid])))[0] for uid in "abc"]
    with pytest.raises(RuntimeError, match="the kernel failed"):
        manager.generate_sequences(prompts([[RAISE], [STALL]]))
    manager.sleep()
    assert not manager.asleep, "on CPU there is nothing to give up"
    manager.shutdown()
    manager.shutdown()
    assert ranks.events == ["export 0", "release 0", "export 1", "release 1"]
    loads = ["load embed.weight", "load norm.weight"]
    assert events_of(log, 0) == ["launch None", "start", *loads, "finish", "cancelled", "shutdown"]


def test_in_one_process_a_launch_that_fails_raises_its_own_error(tmp_path: Path, tokenizer) -> None:
    config = make_config(tmp_path / "events", fail_launch=True)
    ranks = Ranks(tmp_path, "", count=1)
    manager = AgentLoopManager(config, ranks, tokenizer, device="cpu", in_process=True, replica_class=FakeReplica)
    manager.start()
    with pytest.raises(RuntimeError, match="no memory"):
        manager.wait_ready()
    manager.shutdown()


# -------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(REPO / "tests"), str(REPO)])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manager") / "events"


@pytest.fixture(scope="module")
def ranks(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("buckets"), ray.get_runtime_context().get_node_id())


class RunWatch:
    """What is looked at meanwhile: nothing, until a rank is said to have died."""

    error: Exception | None = None

    def __call__(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def watch() -> RunWatch:
    return RunWatch()


@pytest.fixture(scope="module")
def manager(ranks: Ranks, log: Path, tokenizer, watch: RunWatch) -> Iterator[AgentLoopManager]:
    made = AgentLoopManager(make_config(log), ranks, tokenizer, device="cuda", watch=watch, replica_class=FakeReplica)
    made.start()
    made.wait_ready()
    yield made
    made.shutdown()
    made.shutdown()


def test_replicas_get_the_devices_of_their_ranks(manager: AgentLoopManager, log: Path) -> None:
    assert sorted(log.read_text().splitlines()) == ["0 launch 4", "1 launch 5"]


def test_rows_come_back_in_order_with_the_rollouts_keys_alone(manager: AgentLoopManager) -> None:
    ids = [[10 + row] * (1 + row % 4) for row in range(7)]
    batch = manager.generate_sequences(prompts(ids))
    made = {key for key, column in BATCH_KEYS.items() if column.producer == "rollout"}
    assert set(batch.batch.keys()) | set(batch.non_tensor_batch) == made
    assert batch.batch["responses"][:, 0].tolist() == list(range(10, 17))
    assert batch.batch["responses"][:, 3].tolist() == [END] * 7
    assert batch.batch["attention_mask"].sum(1).tolist() == [len(row) + 4 for row in ids]
    assert set(batch.batch["responses"][:, 2].tolist()) == {0, 1}, "both replicas answered"
    assert batch.meta_info["metrics"]["timing_s/agent_loop/generate_sequences/min"] > 0


def test_samples_depend_on_neither_order_nor_number_of_workers(manager: AgentLoopManager) -> None:
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
    for replica in (0, 1):
        loads = ["load embed.weight", "load norm.weight"]
        assert events_of(log, replica)[1:] == ["sleep", "wake weights", "start", *loads, "finish"]
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


def test_samples_of_other_weights_are_refused(manager: AgentLoopManager) -> None:
    manager.weight_version = 99
    with pytest.raises(RolloutError, match=r"versions \[3\] after the sync of version 99"):
        manager.generate_sequences(prompts([[1]]))
    manager.weight_version = 3


def test_prompts_that_cannot_be_used_are_the_users_to_mend(manager: AgentLoopManager) -> None:
    with pytest.raises(ValueError, match=r"has 5 tokens, above data.max_prompt_length=4"):
        manager.generate_sequences(prompts([[1], [1, 2, 3, 4, 5]]))
    batch = prompts([[1]])
    batch.non_tensor_batch.pop("prompt_ids")
    with pytest.raises(KeyError, match="raw_prompt"):
        manager.generate_sequences(batch)


def require_cause_and_log(error: BaseException, cause: str) -> None:
    """A message of two lines: the cause, and a log that exists."""
    first, second = str(error).splitlines()
    assert re.match(cause, first), first
    log = re.match(r"log: (/\S+\.err) on node 10.0.0.1$", second)
    assert log and Path(log.group(1)).is_file(), second


def test_an_engine_that_raises_is_named_with_its_cause(manager: AgentLoopManager) -> None:
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[RAISE]]))
    name = r"agent-loop worker 0 \(node 10.0.0.1\) failed to generate: rollout replica \d"
    require_cause_and_log(caught.value, rf"^{name} .*: the kernel failed$")


def test_a_launch_that_fails_is_named_at_once(ranks: Ranks, tmp_path: Path, tokenizer) -> None:
    config = make_config(tmp_path / "log", fail_launch=True)
    broken = AgentLoopManager(config, ranks, tokenizer, device="cpu", replica_class=FakeReplica)
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
    assert "cancelled" in events_of(log, 0)
    manager.update_weights(ranks, version=5)  # so it may take weights: no request is under way


def give_up_sync(manager: AgentLoopManager) -> None:
    """As if none had been begun, for the tests that follow."""
    for replica in manager._replicas:
        ray.get(replica.actor.__ray_call__.remote(lambda replica: setattr(replica, "_update", None)))


def test_an_engine_that_hangs_in_a_weight_sync_is_named(manager: AgentLoopManager, ranks: Ranks, log: Path) -> None:
    hang = log.with_name("hang")
    hang.touch()
    named = r"^rollout replica 0 \(hf, node 10.0.0.1\) did not begin a weight sync with"
    with pytest.raises(RolloutError, match=named):
        manager.update_weights(ranks, version=6)
    hang.unlink()
    time.sleep(0.5)
    give_up_sync(manager)


def test_a_bucket_is_released_when_loading_it_fails(
    manager: AgentLoopManager, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.events.clear()
    export = ranks.export_weight_bucket

    def broken(index: int) -> list[dict[str, Any] | None]:
        return [{"path": "/no/such/file", "names": ["norm.weight"]} for _ in export(index)]

    monkeypatch.setattr(ranks, "export_weight_bucket", broken)
    with pytest.raises(RolloutError, match=r"rollout replica \d .* failed to load weight bucket 0 of version 4: "):
        manager.update_weights(ranks, version=4)
    assert ranks.events == ["export 0", "release 0"]
    assert not list(ranks.folder.iterdir())
    give_up_sync(manager)


def test_an_agent_loop_worker_that_is_killed_is_named(manager: AgentLoopManager) -> None:
    pid = ray.get(manager._workers[0].actor.__ray_call__.remote(lambda _: os.getpid()))
    threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[STALL]]))
    assert time.monotonic() - started < 4.0, "before the request is found to hang"
    name = r"agent-loop worker 0 \(node 10.0.0.1\)"
    require_cause_and_log(caught.value, rf"^{name} failed to generate: the process died: Worker unexp")
    manager._workers[0] = manager._create_worker(0, 2, ray.put(manager._tokenizer))


def test_the_rest_of_the_run_is_looked_at_meanwhile(manager: AgentLoopManager, watch: RunWatch) -> None:
    watch.error = RuntimeError("rank 1 died")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 died"):
        manager.generate_sequences(prompts([[STALL]]))
    assert time.monotonic() - started < 3.0
    watch.error = None


def test_an_engine_that_dies_is_named(manager: AgentLoopManager) -> None:
    """Last: it takes a replica along."""
    with pytest.raises(RolloutError) as caught:
        manager.generate_sequences(prompts([[DIE]]))
    name = r"rollout replica \d \(hf, node 10.0.0.1\) failed to generate"
    require_cause_and_log(caught.value, rf".*{name}: the process died: ")
    with pytest.raises(RolloutError, match=r"^rollout replica \d .* failed: the process died: "):
        for _ in range(100):
            manager.check_alive()
            time.sleep(0.1)
