"""The manager around replicas without a model, as Ray actors and in this process: order, seeds, syncs, failures."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import save_file
from support.agent_loop_fakes import prompt_rows
from support.fake_replica import DIE, END, HANG, RAISE, SHAPES, STALL, FakeReplica

from verl.config import PPOConfig, RolloutConfig
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.experimental.agent_loop.base import RolloutError
from verl.experimental.agent_loop.replica_client import ReplicaClient
from verl.experimental.agent_loop.worker import ENDED, SEED_KEY, TAKEN
from verl.protocol import BATCH_KEYS, DataProto
from verl.single_controller.base.decorator import Begun
from verl.single_controller.ray.calls import Remote


class Ranks:
    """Training ranks on one node, each with a GPU of its own as far as anyone can see, and weights in buckets."""

    def __init__(self, folder: Path, node_id: str, count: int) -> None:
        self.folder, self.node_id, self.count = folder, node_id, count
        self.names = list(SHAPES)
        self.events: list[str] = []

    def get_placement(self) -> list[dict[str, Any]]:
        node = {"node_id": self.node_id, "node_ip": "10.0.0.1"}
        return [{"rank": i, "local_rank": i, "cuda_visible_devices": str(i + 4), **node} for i in range(self.count)]

    def weight_buckets(self) -> list[dict[str, Any]]:
        dtypes = {"dtype_names": ["float32"]}
        return [{"names": [name], "shapes": [list(SHAPES[name])], **dtypes} for name in self.names]

    def export_weight_bucket(self, index: int) -> Begun:
        name, path = self.names[index], self.folder / f"bucket-{index}.safetensors"
        save_file({name: torch.zeros(SHAPES[name])}, path)
        self.events.append(f"export {index}")
        bucket = {"path": str(path), "names": [name], "shapes": [list(SHAPES[name])]}
        # A replica reads what the rank beside it exported.
        return Begun(lambda _: [bucket] * self.count, SimpleNamespace(check=lambda: None))

    def begin(self, method: str) -> Callable[[], None]:
        assert method == "release_weight_buckets"
        self.events.append("release")
        for bucket in self.folder.iterdir():
            bucket.unlink()
        return lambda: None


@dataclass
class World:
    """A manager and what is around it."""

    ranks: Ranks
    log: Path
    """Where replicas write their events."""
    manager: AgentLoopManager
    run_error: Exception | None = None
    """What the manager's watch raises."""

    def events(self, replica: int) -> list[str]:
        return [line[2:] for line in self.log.read_text().splitlines() if line[0] == str(replica)]

    def generate(self, *ids: list[int], uids: str | None = None) -> DataProto:
        return self.manager.generate_sequences(prompt_rows(prompt_ids=ids, uid=uids or range(len(ids))))

    def seeds(self, *ids: list[int], uids: str) -> list[int]:
        return self.generate(*ids, uids=uids).batch["responses"][:, 1].tolist()


def build(folder: Path, tokenizer: Any, ranks: Ranks, device: str, fail_launch: bool = False, **options: Any) -> World:
    """A world whose manager begins to start."""
    config, log = PPOConfig(), folder / "events"
    rollout = config.actor_rollout_ref.rollout
    rollout.name = "hf"
    rollout.engine_kwargs = {"fake": {"log": str(log), "fail_launch": fail_launch}}
    rollout.prompt_length, rollout.response_length = 4, 4
    rollout.calculate_log_probs = True
    rollout.agent.num_workers = 2
    rollout.timeout_s = 2.0

    def watch() -> None:
        if world.run_error is not None:
            raise world.run_error

    world = World(ranks, log, AgentLoopManager(config, ranks, tokenizer, device=device, watch=watch, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_loop, "get_replica_class", lambda name: FakeReplica)
        world.manager.start()
    return world


LOADS = ["load embed.weight", "load norm.weight"]

# -------------------------------------------------------------------------------------------- in this process


def test_a_launch_that_fails_is_told_at_once(tmp_path: Path, tokenizer: Any) -> None:
    broken = build(tmp_path, tokenizer, Ranks(tmp_path, "", 1), "cpu", fail_launch=True, in_process=True)
    with pytest.raises(RuntimeError, match="no memory"):
        broken.manager.wait_ready()
    broken.manager.shutdown()


def test_the_start_of_the_engines_is_a_line_and_its_end_another(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "verl.experimental.agent_loop")
    started = build(tmp_path, tokenizer, Ranks(tmp_path, "", 1), "cpu", in_process=True)
    assert caplog.messages == ["starting 1 hf engine(s)"]
    started.manager.wait_ready()
    assert re.fullmatch(r"the engines are ready, \d+ s after their start began", caplog.messages[-1])
    started.manager.shutdown()


SHARES = {9: [(9, 8)], 12: [(3, 2)] * 4, 14: [(3, 2)] * 2 + [(2, 1)] * 4, 20: [(3, 2), *[(3, 1)] * 5, (2, 1)]}


@pytest.mark.parametrize("asked", SHARES)
def test_every_worker_with_prompts_may_leave_one_out(asked: int) -> None:
    """Prompts asked and wanted of each of seven workers, of a batch of eight."""
    parts: list[DataProto] = []
    manager: Any = object.__new__(AgentLoopManager)
    manager.rollout, manager.weight_version = RolloutConfig(n=2), None
    call = SimpleNamespace(remote=lambda part: parts.append(part) or len(parts))
    manager._workers = [Remote("worker", SimpleNamespace(generate_sequences=call))] * 7
    prompts = prompt_rows(uid=[row // 2 for row in range(2 * asked)])
    prompts.meta_info["wanted"] = 8
    manager.begin(prompts)
    assert [(len(part) / 2, part.meta_info["wanted"]) for part in parts] == SHARES[asked]


# -------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[World]:
    """Two replicas and two workers, shared by all tests below, in this order."""
    ray.init(num_cpus=2, include_dashboard=False)
    ranks = Ranks(tmp_path_factory.mktemp("buckets"), ray.get_runtime_context().get_node_id(), 2)
    made = build(tmp_path_factory.mktemp("manager"), tokenizer, ranks, "cuda")
    made.manager.wait_ready()
    yield made
    made.manager.shutdown()
    made.manager.shutdown()
    ray.shutdown()


def test_replicas_get_the_devices_of_their_ranks(world: World) -> None:
    assert (world.events(0), world.events(1)) == (["launch 4"], ["launch 5"])


def test_engines_that_sleep_start_without_weights_and_a_sync_is_due(world: World) -> None:
    options = world.manager._replicas[1].actor.__ray_call__.remote(lambda engine: engine.config.engine_kwargs["vllm"])
    assert ray.get(options) == {"load_format": "dummy"}
    assert world.manager.asleep, "the trainer syncs before it generates"


def test_rows_come_back_in_order_with_the_rollouts_keys_alone(world: World) -> None:
    ids = [[10 + row] * (1 + row % 4) for row in range(7)]
    batch = world.generate(*ids)
    made = {key for key, column in BATCH_KEYS.items() if column.producer == "rollout"}
    assert set(batch.batch.keys()) | set(batch.non_tensor_batch) == made
    assert batch.batch["responses"][:, 0].tolist() == list(range(10, 17))
    assert batch.batch["responses"][:, 3].tolist() == [END] * 7
    assert batch.batch["attention_mask"].sum(1).tolist() == [len(row) + 4 for row in ids]
    assert set(batch.batch["responses"][:, 2].tolist()) == {0, 1}, "both replicas answered"
    assert batch.meta_info["metrics"]["timing_s/agent_loop/generate_sequences/min"] > 0


def test_batches_are_begun_side_by_side_and_collected_in_any_order(world: World) -> None:
    first, second = (world.manager.begin(prompt_rows(prompt_ids=[[n], [n]], uid="ab")) for n in (11, 12))
    later, earlier = world.manager.collect(second), world.manager.collect(first)
    assert (earlier.batch["responses"][:, 0].tolist(), later.batch["responses"][:, 0].tolist()) == ([11, 11], [12, 12])
    assert first.seconds > 0 and second.began_s >= first.began_s


def test_more_prompts_than_are_wanted_go_round_the_workers_and_the_others_are_cut_short(world: World) -> None:
    """Worker 0 has the first, third and fifth prompt, worker 1 the others; each has to finish two."""
    prompts = prompt_rows(prompt_ids=[[11], [STALL], [STALL], [14], [15], [16]], uid="abcdef")
    prompts.meta_info["wanted"] = 4
    batch = world.manager.generate_sequences(prompts)
    ended = [True, False, False, True, True, True]
    assert batch.array(TAKEN).tolist() == batch.array(ENDED).tolist() == ended
    assert batch.batch["response_mask"].any(1).tolist() == ended
    assert batch.batch["responses"][ended, 0].tolist() == [11, 14, 15, 16], "in the order of the prompts"


def test_samples_depend_on_neither_order_nor_number_of_workers(world: World) -> None:
    together = world.seeds([1], [2], [3], uids="abc")
    assert together == world.seeds([3], [2], [1], uids="cba")[::-1]


def test_a_weight_sync_takes_every_bucket_in_order_and_wakes_the_engines(world: World) -> None:
    world.manager.sleep()
    assert world.manager.asleep
    with pytest.raises(RolloutError, match="it sleeps without weights; sync them first"):
        world.generate([1])
    world.manager.update_weights(world.ranks, version=1)
    assert not world.manager.asleep
    assert world.ranks.events == ["export 0", "export 1", "release"]
    for replica in (0, 1):
        assert world.events(replica)[1:] == ["sleep", "wake weights", "start", *LOADS, "finish"]
    world.generate([1], [2])


def test_an_incomplete_sync_names_replica_and_tensor_and_a_whole_one_mends_it(world: World) -> None:
    world.ranks.names = ["norm.weight"]
    with pytest.raises(RolloutError, match=r"(?s)replica \d \(hf, node 10.0.0.1\).*missing: embed.weight") as caught:
        world.manager.update_weights(world.ranks, version=2)
    assert caught.value.by_user, "the same command would end the same"
    with pytest.raises(RolloutError, match=r"rollout replica \d .* failed to generate: .*sync 2 was incomplete"):
        world.generate([1])
    world.ranks.names = list(SHAPES)
    world.manager.update_weights(world.ranks)  # the next version: 1 was the last that came to its end
    assert world.manager.weight_version == 2
    world.generate([1])
    world.manager.update_weights(world.ranks, version=3)


def test_samples_of_other_weights_are_refused(world: World) -> None:
    world.manager.weight_version = 99
    with pytest.raises(RolloutError, match=r"versions \[3\] after the sync of version 99"):
        world.generate([1])
    world.manager.weight_version = 3


def test_a_prompt_that_cannot_be_used_is_the_users_to_mend(world: World) -> None:
    with pytest.raises(RolloutError, match=r"has 5 tokens, above data.max_prompt_length=4") as caught:
        world.generate([1], [1, 2, 3, 4, 5])
    assert caught.value.by_user


def test_a_request_that_hangs_is_cancelled_and_answered_elsewhere(world: World) -> None:
    """The first of its two rows goes to replica 0, which alone hangs; the other worker's answer is given on before."""
    generation, given = world.manager.begin(prompt_rows(prompt_ids=[[HANG, 7], [1]], uid="ab")), list[Any]()
    generation.on_part = lambda start, part: given.append((start, part.batch["responses"][:, 0].tolist()))
    while not given:
        world.manager.take(generation)
    assert given == [(1, [1])]
    batch = world.manager.collect(generation)
    assert given == [(1, [1]), (0, [7])]
    assert batch.batch["responses"][:, 0].tolist() == [7, 1]
    assert batch.batch["responses"][0, 2] == 1, "the other replica"
    assert batch.meta_info["metrics"]["agent_loop/retried_requests"] == 1.0
    deadline = time.monotonic() + 10
    while "cancelled" not in world.events(0):
        assert time.monotonic() < deadline, "replica 0 did not hear of it"
        time.sleep(0.05)
    world.manager.update_weights(world.ranks, version=5)  # so it may take weights: no request is under way


def test_an_engine_that_hangs_in_a_weight_sync_is_named(world: World) -> None:
    hang = world.log.with_name("hang")
    hang.touch()
    named = r"^rollout replica 0 \(hf, node 10.0.0.1\) did not begin a weight sync with"
    with pytest.raises(RolloutError, match=named):
        world.manager.update_weights(world.ranks, version=6)
    hang.unlink()
    world.manager.update_weights(world.ranks, version=7)  # begins anew


def test_a_bucket_is_released_when_loading_it_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ranks.events.clear()
    exported = world.ranks.export_weight_bucket
    broken = {"path": "/no/such/file", "names": ["norm.weight"]}

    def export(index: int) -> Begun:
        exports = exported(index)
        return Begun(lambda of: [broken for _ in exports()], exports.args[0])

    monkeypatch.setattr(world.ranks, "export_weight_bucket", export)
    with pytest.raises(RolloutError, match=r"rollout replica \d .* failed to load weight bucket 0 of version 4: "):
        world.manager.update_weights(world.ranks, version=4)
    assert world.ranks.events == ["export 0", "export 1", "release"]
    assert not list(world.ranks.folder.iterdir())
    monkeypatch.undo()
    world.manager.update_weights(world.ranks, version=7)


def test_the_rest_of_the_run_is_looked_at_meanwhile(world: World) -> None:
    world.run_error = RuntimeError("rank 1 died")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 died"):
        world.generate([STALL])
    assert time.monotonic() - started < 2.0
    world.run_error = None


WORKER, REPLICA = r"agent-loop worker 0 \(node 10.0.0.1\)", r"rollout replica \d \(hf, node 10.0.0.1\)"


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        (RAISE, rf"{WORKER} failed to generate: {REPLICA} .*: the kernel failed$"),
        (STALL, rf"{WORKER} failed to generate: the process died: Worker unexp"),
        (DIE, rf".*{REPLICA} failed( to generate)?: the process died: "),
    ],
)
def test_a_failure_names_who_failed_the_cause_and_the_log(world: World, prompt: int, cause: str) -> None:
    """An engine that raises, a worker that is killed while it waits, an engine that dies."""
    manager = world.manager
    if prompt == STALL:
        pid = ray.get(manager._workers[0].actor.__ray_call__.remote(lambda _: os.getpid()))
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(RolloutError) as caught:
        world.generate([prompt])
    seconds = time.monotonic() - started
    first, second = str(caught.value).splitlines()
    assert re.match(cause, first), first
    log = re.match(r"log: (/\S+\.err) on node 10.0.0.1$", second)
    assert log and Path(log.group(1)).is_file(), second
    if prompt == STALL:
        assert seconds < 2.0, "before the request is found to hang"
        manager._workers[0] = manager._create_worker(0, 2)


def test_an_engine_that_has_died_is_found_without_a_call(world: World) -> None:
    with pytest.raises(RolloutError, match=r"^rollout replica \d .* failed: the process died: "):
        for _ in range(100):
            world.manager.check_alive()
            time.sleep(0.1)


async def test_requests_that_cannot_be_sent_fail_at_once() -> None:
    def full(*_: Any) -> None:
        raise ray.exceptions.ObjectStoreFullError("full")

    client = ReplicaClient(Remote("replica", SimpleNamespace(answers=SimpleNamespace(remote=full))))
    with pytest.raises(ray.exceptions.ObjectStoreFullError):
        await client.ask([1], {}, "a")


def test_runs_of_other_seeds_draw_other_samples() -> None:
    found: list[list[int]] = []
    call = SimpleNamespace(remote=lambda part: found.append(part.array(SEED_KEY).tolist()) or len(found))
    for seed in (0, 1):
        manager: Any = object.__new__(AgentLoopManager)
        manager.rollout, manager.weight_version = RolloutConfig(seed=seed), None
        manager._workers = [Remote("worker", SimpleNamespace(generate_sequences=call))]
        manager.begin(prompt_rows(uid="ab"))
    assert not set(found[0]) & set(found[1])
