"""Rows per second and peak memory of loading prompts, for small and large data.

Writes OneRec chats whose prompts are up to 10,240 tokens long and more (one in ten is overlong), loads them in a fresh
process each time, first with an empty cache and then again, and reads every row once in random order::

    python benchmarks/data_loading.py [--rows 20000 200000] [--prompt-tokens 40] [--tokenizer FOLDER]

``load`` is parsing, rendering, counting and filtering all rows; ``again`` is the same from the cache; ``read`` is the
random access that training does. Peak memory is what the process itself allocates (anonymous pages); pages of the
memory-mapped file are the system's to take back, and are given beside it. Prints a table, and one JSON document as the
last line.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # a checkout serves as well as an installation

MAX_PROMPT_LENGTH = 10_240
OVERLONG_TOKENS = 11_000
ROWS_PER_FILE = 50_000
SAMPLE_EVERY_S = 0.02
MIB = 1 << 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000], help="sizes to measure")
    parser.add_argument("--prompt-tokens", type=int, default=40, help="about how long the usual prompt is")
    parser.add_argument("--overlong", type=float, default=0.001, help="share of prompts above the limit of 10,240")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder; default: a tiny one made here")
    parser.add_argument("--load", nargs=3, metavar=("DATA", "TOKENIZER", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_data(folder: Path, rows: int, args: argparse.Namespace) -> None:
    """Parquet files of chats made of common words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = ["the", "sum", "of", "two", "numbers", "is", "what", "we", "want", "to", "know", "please", "think", "about"]
    draw = random.Random(0)
    long_text = " ".join(draw.choices(words, k=OVERLONG_TOKENS))

    def chat(row: int) -> str:
        overlong = draw.random() < args.overlong
        question = long_text if overlong else " ".join(draw.choices(words, k=draw.randint(1, 2 * args.prompt_tokens)))
        turns = [("user", f"{row} {question}"), ("assistant", "42")]
        return json.dumps([{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns])

    for start in range(0, rows, ROWS_PER_FILE):
        numbers = range(start, min(start + ROWS_PER_FILE, rows))
        table = pa.table(
            {
                "source": ["bench"] * len(numbers),
                "uuid": [f"row-{number}" for number in numbers],
                "messages": [chat(number) for number in numbers],
            }
        )
        pq.write_table(table, folder / f"part-{start:09d}.parquet")


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """MiB at the most while the block ran: ``own`` is anonymous, ``mapped`` is of files."""
    peak, done = {"own": 0.0, "mapped": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name, field in (("own", "RssAnon"), ("mapped", "RssFile")):
                peak[name] = max(peak[name], int(fields[field].split()[0]) * 1024 / MIB)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def load(data: str, tokenizer_folder: str, cache: str) -> dict[str, Any]:
    """One load in this process, and one pass over the rows in random order."""
    from verl.config import DataConfig
    from verl.utils.dataset.onerec_dataset import OneRecDataset
    from verl.utils.tokenizer import hf_tokenizer

    tokenizer = hf_tokenizer(tokenizer_folder)
    config = DataConfig(max_prompt_length=MAX_PROMPT_LENGTH, filter_overlong_prompts=True, cache_dir=cache)
    with peak_memory() as loading:
        began = time.perf_counter()
        dataset = OneRecDataset(data, tokenizer, config)
        load_s = time.perf_counter() - began
    order = random.Random(1).sample(range(len(dataset)), len(dataset))
    with peak_memory() as reading:
        began = time.perf_counter()
        for place in order:
            dataset[place]
        read_s = time.perf_counter() - began
    return {
        "kept": len(dataset),
        "dropped": dict(dataset.drop_report.dropped),
        "load_s": load_s,
        "load_own_mib": loading["own"],
        "read_s": read_s,
        "read_own_mib": reading["own"],
        "read_mapped_mib": reading["mapped"],
    }


def measure(rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Write ``rows`` rows, load them twice, and forget them."""
    with tempfile.TemporaryDirectory(prefix="data_loading_") as name:
        folder = Path(name)
        tokenizer = args.tokenizer
        if tokenizer is None:
            from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers

            tokenizer = build_tiny_tokenizers(folder / "tokenizers")[1]
        (folder / "data").mkdir()
        write_data(folder / "data", rows, args)
        command = [sys.executable, __file__, "--load", str(folder / "data"), str(tokenizer), str(folder / "cache")]
        runs = []
        for _ in range(2):
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(result.stdout.splitlines()[-1]))
    first, again = runs
    return {
        "rows": rows,
        "kept": first["kept"],
        "dropped": first["dropped"],
        "load_rows_per_s": rows / first["load_s"],
        "again_rows_per_s": rows / again["load_s"],
        "read_rows_per_s": first["kept"] / first["read_s"],
        "load_peak_mib": first["load_own_mib"],
        "again_peak_mib": again["load_own_mib"],
        "read_peak_mib": first["read_own_mib"],
        "read_mapped_mib": first["read_mapped_mib"],
    }


def main() -> None:
    args = parse_args()
    if args.load:
        print(json.dumps(load(*args.load)))
        return
    results = [measure(rows, args) for rows in args.rows]
    columns = ("load_rows_per_s", "again_rows_per_s", "read_rows_per_s")
    memory = ("load_peak_mib", "again_peak_mib", "read_peak_mib", "read_mapped_mib")
    print(f"\n{'rows':>9}{'kept':>9}" + "".join(f"{name:>18}" for name in (*columns, *memory)))
    for result in results:
        metrics = "".join(f"{result[name]:>18,.0f}" for name in (*columns, *memory))
        print(f"{result['rows']:>9,}{result['kept']:>9,}{metrics}")
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.processor() or platform.machine()}
    print(json.dumps({"results": results, **machine, "prompt_tokens": args.prompt_tokens}))


if __name__ == "__main__":
    main()
