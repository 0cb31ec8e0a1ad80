"""The order of a weight sync's calls, and which export of a bucket each engine reads."""

from types import SimpleNamespace
from typing import Any

import pytest

from verl.weight_sync.sync import bucket_for, send_weights


class Ranks:
    """Two training ranks with two buckets; each rank exports for the engine beside it."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def num_weight_buckets(self) -> int:
        return 2

    def export_weight_bucket(self, index: int) -> list[dict[str, Any] | None]:
        self.events.append(f"export {index}")
        return [{"path": f"bucket {index} of rank {rank}"} for rank in range(2)]

    def release_weight_bucket(self, index: int) -> None:
        self.events.append(f"release {index}")


def make_engine(events: list[str]) -> SimpleNamespace:
    calls = {
        "start_weight_update": lambda: events.append("start"),
        "update_weights": lambda bucket: events.append(f"load {bucket['path']}"),
        "finish_weight_update": lambda version: events.append(f"finish {version}"),
    }
    return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})


def test_a_bucket_is_released_once_every_engine_has_loaded_it() -> None:
    events: list[str] = []
    engines = [make_engine(events) for _ in range(2)]
    send_weights(Ranks(events), engines, [(0,), (1,)], lambda task, calls: events.append(f"wait to {task}"), version=7)
    expected = ["start", "start", "wait to begin a weight sync"]
    for index in range(2):
        loads = [f"load bucket {index} of rank {rank}" for rank in range(2)]
        waits = f"wait to load weight bucket {index} of version 7"
        expected += [f"export {index}", *loads, waits, f"release {index}"]
    assert events == [*expected, "finish 7", "finish 7", "wait to finish the weight sync of version 7"]


def test_on_cpu_an_engine_reads_the_export_of_its_own_node() -> None:
    exports = [{"path": "a"}, None, None, {"path": "b"}]
    assert [bucket_for(ranks, exports)["path"] for ranks in ((0, 1), (2, 3))] == ["a", "b"]
    with pytest.raises(ValueError, match="none of the training ranks 1, 2 exported"):
        bucket_for((1, 2), exports)


@pytest.mark.parametrize("ranks", [(2,), (2, 3)])
def test_on_cuda_an_engine_gets_the_handles_of_its_own_gpus_alone(ranks: tuple[int, ...]) -> None:
    exports = [
        {"names": ["a", "b"], "ipc_handles": [{f"gpu{rank}": f"{name} of {rank}"} for name in "ab"]}
        for rank in range(4)
    ]
    handles = [{f"gpu{rank}": f"{name} of {rank}" for rank in ranks} for name in "ab"]
    assert bucket_for(ranks, exports) == {"names": ["a", "b"], "ipc_handles": handles}
