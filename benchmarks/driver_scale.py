"""What one step costs the driver as the cluster grows: bytes, seconds and memory, without a cluster.

    python benchmarks/driver_scale.py [--workers 2 8 64 512] [--rows 1024] [--prompt 512] [--response 2048]

Runs the driver's side of a step on the real code: rows are split by the real workers' registrations, packed and
unpacked as they are for Ray (pickle protocol 5 with buffers out of band, each copied once into what stands for the
object store), and joined again. The step is that of ``sampled`` with one optimizer step a batch: the update scores the
student. Workers are stand-ins in this process that answer with rows of the right shape. Nothing is computed, nothing
waits for a network: what is left is the driver's own work.

Prints a table, and one JSON document as the last line. Bytes are exact; seconds are CPU time of one core, and how they
change from one number of workers to the next is what to look at.
"""

import argparse
import json
import mmap
import multiprocessing
import pickle
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # a checkout serves as well as an installation

from verl.protocol import DataProto  # noqa: E402
from verl.single_controller.base import WorkerGroup  # noqa: E402
from verl.single_controller.base.decorator import Call, Dispatch, Results, register  # noqa: E402
from verl.workers.model_workers import StudentWorker, TeacherWorker  # noqa: E402

INT_KEYS = {
    "prompts": "P",
    "responses": "R",
    "input_ids": "T",
    "attention_mask": "T",
    "position_ids": "T",
    "response_mask": "R",
    "distill_special_token_mask": "R",
}
"""What the rollout makes, as int64, and its width."""
ANSWERS = {
    "compute_ref_log_prob": ("ref_log_prob",),
    "update_actor": ("old_log_probs", "entropys", "extend_mass"),
}
"""The float32 (rows, R) columns that a worker's method answers with."""


class Sizes:
    """Rows, and tokens of prompt, response and both."""

    def __init__(self, rows: int, prompt: int, response: int) -> None:
        self.rows = rows
        self.widths = {"P": prompt, "R": response, "T": prompt + response}

    def rollout(self, rows: int) -> DataProto:
        """What agent loops return for so many rows."""
        tensors = {key: torch.ones(rows, self.widths[width], dtype=torch.int64) for key, width in INT_KEYS.items()}
        tensors["rollout_log_probs"] = torch.zeros(rows, self.widths["R"])
        return DataProto.from_dict(tensors, {"__num_turns__": [2] * rows})

    def answer(self, method: str, rows: int) -> DataProto:
        """What a worker returns for so many rows."""
        answer = DataProto.from_dict({key: torch.zeros(rows, self.widths["R"]) for key in ANSWERS[method]})
        if method == "update_actor":
            answer.meta_info["metrics"] = {f"actor/figure_{number}": 0.5 for number in range(12)}
        return answer

    def prompts(self) -> DataProto:
        """Rows of a data set, a kilobyte of text each."""
        chats = [[{"role": "user", "content": f"{row} " * 250}] for row in range(self.rows)]
        columns = {"raw_prompt": chats, "uid": [f"1-{row}" for row in range(self.rows)], "source": ["a"] * self.rows}
        return DataProto.from_dict(None, columns, {"global_steps": 1, "validate": False, "temperature": 1.0})


class Engines:
    """Stands for the agent loops."""

    @register(dispatch_mode=Dispatch.DP_COMPUTE_PROTO)
    def generate(self, prompts: DataProto) -> DataProto:
        raise NotImplementedError("the transport answers")


class Packed:
    """A value as it lies in the object store: memory that is shared, and therefore not the driver's own."""

    def __init__(self, value: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self._head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        self._ends = list(accumulate(map(len, views), initial=0))
        self._store = mmap.mmap(-1, max(1, self._ends[-1]))
        for view in views:
            self._store.write(view)
        self.num_bytes = len(self._head) + self._ends[-1]

    def unpack(self) -> Any:
        """A copy of the value, made as a process makes it that gets the object."""
        store = memoryview(self._store)
        return pickle.loads(self._head, buffers=[store[start:end] for start, end in pairwise(self._ends)])


class Transport(WorkerGroup):
    """A group whose ranks are elsewhere: packs what goes out, unpacks what comes in, and counts both."""

    def __init__(self, worker_class: type, world_size: int, answer: Callable[[str, int], DataProto]) -> None:
        super().__init__(worker_class, world_size)
        self.answer = answer
        self.bytes_out = 0
        self.bytes_in = 0
        self.seconds_out = 0.0
        self.seconds_in = 0.0
        self._seconds_elsewhere = 0.0

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        joined = super()._run(method, *args, **kwargs)
        self.seconds_in = time.process_time() - started - self.seconds_out - self._seconds_elsewhere
        return joined

    def _send(self, method: str, calls: Sequence[Call]) -> list[Packed]:
        started = time.process_time()
        for call in calls:
            self.bytes_out += Packed(call).num_bytes
        sent = time.process_time()
        self.seconds_out = sent - started
        # One answer serves all ranks with as many rows: they lie on other machines until the driver takes them.
        rows = [len(call.args[0]) for call in calls]
        answers = {count: Packed(self.answer(method, count)) for count in set(rows)}
        self._seconds_elsewhere = time.process_time() - sent
        return [answers[count] for count in rows]

    def _results(self, method: str, calls: Sequence[Call]) -> Results:
        for rank, packed in enumerate(self._send(method, calls)):
            self.bytes_in += packed.num_bytes
            yield rank, packed.unpack()


def num_bytes(batch: DataProto) -> int:
    """Bytes of a batch's tensors."""
    return sum(tensor.nbytes for _, tensor in batch.batch.items())


class PeakMemory:
    """The most memory of its own (not shared) that this process held within the block, over what it held before."""

    def __init__(self, watch: bool) -> None:
        self._watched = watch

    def __enter__(self) -> "PeakMemory":
        self._before = self._highest = _own_bytes()
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        if self._watched:
            self._watch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._watched:
            self._watch.join()
        self.peak = self._highest - self._before

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, _own_bytes())


def _own_bytes() -> int:
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


def run_step(workers: int, sizes: Sizes, *, watch_memory: bool = True) -> dict[str, Any]:
    """One step of the driver with so many workers for every role; watching its memory costs it time."""
    memory = PeakMemory(watch_memory)
    groups = {
        "generate": Transport(Engines, workers, lambda method, rows: sizes.rollout(rows)),
        "compute_ref_log_prob": Transport(TeacherWorker, workers, sizes.answer),
        "update_actor": Transport(StudentWorker, workers, sizes.answer),
    }
    batch = sizes.prompts()
    order = torch.randperm(sizes.rows, generator=torch.Generator().manual_seed(0))
    with memory:
        batch = batch.union(groups["generate"].generate(batch))
        batch.reorder(order)
        batch = batch.union(groups["compute_ref_log_prob"].compute_ref_log_prob(batch))
        batch = batch.union(groups["update_actor"].update_actor(batch))
    calls = {
        name: {
            "bytes_out": group.bytes_out,
            "bytes_in": group.bytes_in,
            "seconds_out": round(group.seconds_out, 4),
            "seconds_in": round(group.seconds_in, 4),
        }
        for name, group in groups.items()
    }
    total = sum(call["bytes_out"] + call["bytes_in"] for call in calls.values())
    seconds = sum(call["seconds_out"] + call["seconds_in"] for call in calls.values())
    return {
        "workers": workers,
        "bytes_per_step": total,
        "seconds_per_step": round(seconds, 3),
        "batch_bytes": num_bytes(batch),
        "peak_memory_over_batch": round(memory.peak / num_bytes(batch), 2),
        "calls": calls,
    }


def measure(workers: int, sizes: Sizes, repeat: int) -> dict[str, Any]:
    """The quickest of some steps; the memory is that of one before them, to which no other has left any."""
    torch.set_num_threads(1)
    run_step(2, Sizes(2, 8, 8))  # what is imported and set up at the first use
    watched = run_step(workers, sizes)
    runs = [run_step(workers, sizes, watch_memory=False) for _ in range(repeat)]
    quickest = min(runs, key=lambda run: run["seconds_per_step"])
    return quickest | {"peak_memory_over_batch": watched["peak_memory_over_batch"]}


def add_growth(runs: list[dict[str, Any]]) -> None:
    """What each further worker costs, against the run with the fewest."""
    fewest = runs[0]
    for run in runs[1:]:
        more = 3 * (run["workers"] - fewest["workers"])  # three calls a step
        run["extra_bytes_per_call_and_worker"] = round((run["bytes_per_step"] - fewest["bytes_per_step"]) / more)
        run["extra_microseconds_per_call_and_worker"] = round(
            1e6 * (run["seconds_per_step"] - fewest["seconds_per_step"]) / more
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 64, 512], help="numbers of workers to try")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the batch")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt, padded")
    parser.add_argument("--response", type=int, default=2048, help="tokens of a response, padded")
    parser.add_argument("--repeat", type=int, default=3, help="steps for each number; the quickest counts")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sizes = Sizes(args.rows, args.prompt, args.response)
    runs = []
    for workers in args.workers:
        with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
            runs.append(fresh_process.apply(measure, (workers, sizes, args.repeat)))
    add_growth(runs)
    print(f"{'workers':>8}{'MB a step':>12}{'seconds':>9}{'peak memory / batch':>21}")
    for run in runs:
        print(
            f"{run['workers']:>8}{run['bytes_per_step'] / 1e6:>12.1f}{run['seconds_per_step']:>9.2f}"
            f"{run['peak_memory_over_batch']:>21.2f}"
        )
    report = {"rows": args.rows, "prompt_tokens": args.prompt, "response_tokens": args.response, "runs": runs}
    report |= {"date": date.today().isoformat(), "torch": torch.__version__, "numpy": np.__version__}
    report |= {"python": platform.python_version(), "machine": platform.processor() or platform.machine()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
