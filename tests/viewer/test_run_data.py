"""What the viewer reads of a run is what the run recorded."""

import base64
import gzip
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.viewer_runs import EMOJI, GENERAL, ODD, PROMPTS, REC, write_run

from verl.utils.token_record import STATES
from verl.viewer.__main__ import main, server
from verl.viewer.page import HERE, page_of
from verl.viewer.run_data import NUMBERS, answer_folders, read_curves, read_run

NONE = {"training": None, "validation": None}
STEPS, ROWS = 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), STEPS, ROWS)


def unpacked(text: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the page's script reads of a packed record: its head, and its columns by name."""
    data = gzip.decompress(base64.b64decode(text))
    start = 4 + int.from_bytes(data[:4], "little")
    head, count = json.loads(data[4:start]), (len(data) - start) // (4 * (1 + len(NUMBERS)) + 2)
    columns: dict[str, np.ndarray] = {}
    for name in ("place", *NUMBERS):
        planes = np.frombuffer(data, "u1", 4 * count, start).reshape(4, count)
        columns[name] = np.ascontiguousarray(planes.T).view("<u4" if name == "place" else "<f4")[:, 0]
        start += 4 * count
    columns |= {name: np.frombuffer(data, "u1", count, start + at * count) for at, name in enumerate(("state", "item"))}
    return head, columns


def test_figures_are_the_metrics_of_the_run(folder: Path) -> None:
    run = read_run(folder, NONE, 1000)
    assert run.notes == [] and run.total == len(run.answers) == STEPS * ROWS + 3 * len(PROMPTS)
    for step in range(1, STEPS + 1):
        rows = [row for row in run.answers if (row["kind"], row["step"]) == ("training", step)]
        assert {row["measure"] for row in rows} == {"divergence"}
        assert [row["known"] for row in rows] == [row["trained"] for row in rows]
        figures = {
            "actor/distill_divergence": sum(row["sum"] for row in rows) / sum(row["known"] for row in rows),
            "distill/extend_seq_ratio": sum(row["items"] > 0 for row in rows) / ROWS,
            "response_length/mean": sum(row["response_length"] for row in rows) / ROWS,
        }
        for name, figure in figures.items():
            steps, values = run.curves[name]
            assert figure == pytest.approx(values[steps.index(step)], rel=1e-6), name
    held_out = [row for row in run.answers if row["kind"] == "validation"]
    assert {row["measure"] for row in held_out} == {"difference"} and {row["step"] for row in held_out} == {0, 2, 4}


def test_tokens_are_those_of_the_record(folder: Path) -> None:
    run = read_run(folder, NONE, 1000)
    for name, packed in run.tokens.items():
        kind, step = name.split("-")
        path = folder / {"training": "rollouts", "validation": "answers"}[kind] / f"{step}.tokens.parquet"
        head, columns = unpacked(packed)
        rows = [row for row in run.answers if (row["kind"], row["step"]) == (kind, int(step))]
        for row, wanted in zip(rows, pq.read_table(path).to_pylist(), strict=True):
            tokens = slice(row["first"], row["first"] + row["response_length"])
            assert [head["texts"][place] for place in columns["place"][tokens]] == wanted["text"]
            assert [head["ids"][place] for place in columns["place"][tokens]] == wanted["token_id"]
            assert [head["states"][place] for place in columns["state"][tokens]] == wanted["state"]
            assert columns["item"][tokens].astype(bool).tolist() == wanted["is_item"]
            for number in NUMBERS:
                exact = np.array([np.nan if value is None else value for value in wanted[number]], np.float32)
                assert np.array_equal(columns[number][tokens], exact, equal_nan=True)
            assert (row["uid"], row["index"]) == (wanted["uid"], wanted["index"])
            trained = [
                value for value, state in zip(wanted["signal"], wanted["state"], strict=True) if state == "trained"
            ]
            if kind == "training":
                assert row["sum"] == pytest.approx(sum(trained)) and row["largest"] == max(trained, key=abs)


def test_texts_come_from_the_lines_beside_a_record_where_these_are_its_own(folder: Path, tmp_path: Path) -> None:
    rollouts = tmp_path / "own"
    rollouts.mkdir()
    for name in ("1.tokens.parquet", "1.jsonl", "2.tokens.parquet"):
        (rollouts / name).write_bytes((folder / "rollouts" / name).read_bytes())
    lines = (folder / "rollouts" / "2.jsonl").read_text(encoding="utf-8").split("\n")
    (rollouts / "2.jsonl").write_text("\n".join(lines[1:]), encoding="utf-8")
    rows = read_run(folder, {"training": rollouts, "validation": None}, 1000).answers
    by_step = {step: [row for row in rows if (row["kind"], row["step"]) == ("training", step)] for step in (1, 2)}
    own, foreign = by_step[1][10], by_step[2][10]
    assert ODD in own["prompt"] and own["expected"] == PROMPTS[4][2]
    assert EMOJI in own["text"] and ODD in own["text"]
    assert (foreign["prompt"], foreign["expected"]) == (None, None)
    assert ODD in foreign["text"] and EMOJI not in foreign["text"] and "\ufffd" in foreign["text"]


def test_the_newest_answers_are_shown_and_a_cut_is_told(folder: Path) -> None:
    run = read_run(folder, NONE, 25)
    assert [(row["kind"], row["step"]) for row in run.answers] == [
        *[("validation", 4)] * 6,
        *[("training", 4)] * 12,
        *[("training", 3)] * 7,
    ]
    assert run.notes == ["The page shows 25 of 66 answers: the newest; --answers shows more."]
    assert set(run.tokens) == {"validation-4", "training-4", "training-3"}


def test_a_record_that_is_none_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "5.tokens.parquet").write_text("no Parquet")
    (tmp_path / "6.tokens.parquet").write_text("of a run before, whose steps this one has not taken")
    (tmp_path / "notes.tokens.parquet").write_text("of no step")
    (note,) = read_run(folder, {"training": tmp_path, "validation": None}, 100).notes
    assert str(tmp_path / "5.tokens.parquet") in note and "left out" in note


def test_curves_of_a_file_that_still_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_curves(path) == {}
    lines = [{"step": 2, "data": {"a": 1.0, "b": None}}, {"step": 1, "data": {"a": 2}}, {"step": 2, "data": {"a": 3.5}}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3, "da')
    assert read_curves(path) == {"a": ([1, 2], [2, 3.5]), "b": ([2], [None])}


def test_folders_are_found_from_where_the_run_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, elsewhere = tmp_path / "project" / "checkpoints" / "a" / "b", tmp_path / "elsewhere"
    for place in (run, tmp_path / "project" / "rollouts", elsewhere / "rollouts", tmp_path / "project" / "moved"):
        place.mkdir(parents=True)
    config = {
        "default_local_dir": "checkpoints/a/b",
        "rollout_data_dir": "rollouts",
        "validation_data_dir": "/gone/val",
    }
    (run / "config.yaml").write_text(json.dumps({"trainer": config}))
    monkeypatch.chdir(elsewhere)
    found, notes = answer_folders(run, NONE)
    assert found == {"training": tmp_path / "project" / "rollouts"}
    assert notes == ["trainer.validation_data_dir=/gone/val is not there; name the folder with --validation."]
    (run / "val").mkdir()
    assert answer_folders(run, NONE) == ({**found, "validation": run / "val"}, [])
    (run / "config.yaml").write_text(json.dumps({"trainer": config | {"default_local_dir": "/a/run"}}))
    assert answer_folders(run, NONE)[0]["training"].resolve() == elsewhere / "rollouts"
    (run / "rollouts").mkdir()
    for old, named in ((elsewhere, elsewhere / "rollouts"), ("old/run", "old/run/rollouts")):
        moved = {"default_local_dir": str(old), "rollout_data_dir": str(named)}
        (run / "config.yaml").write_text(json.dumps({"trainer": moved}))
        assert answer_folders(run, NONE)[0] == {"training": run / "rollouts"}, "not those of a run at the old place"
    given = {"training": tmp_path / "project" / "moved", "validation": None}
    assert answer_folders(run, given)[0]["training"] == given["training"]
    with pytest.raises(ValueError, match=r"training answers, .*none, does not exist"):
        answer_folders(run, {"training": tmp_path / "none"})


def test_a_run_without_records_has_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {"a": 1.0}}\n')
    run = read_run(tmp_path, NONE, 10)
    assert run.curves and not run.answers and "rollout_data_dir" in run.notes[0]
    assert "data-curves" in page_of(run)


def test_texts_of_a_run_are_nowhere_markup(folder: Path) -> None:
    page = page_of(read_run(folder, NONE, 1000))
    assert page.count("<b>") == 0 and page.count("</script>") == page.count("<script")
    assert "default-src 'none'" in page and "http" not in page.replace("http://www.w3.org", "").replace(
        "http-equiv", ""
    )


def test_the_page_knows_every_state() -> None:
    script = (HERE / "page.js").read_text(encoding="utf-8")
    assert not [state for state in STATES if f"\n  {state}: " not in script]
    assert ", ".join(f'"{name}"' for name in NUMBERS) in script


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main([str(folder), "--out", str(out), "--answers", "20"]) == 0
    told = capsys.readouterr()
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>") and str(out) in told.out
    assert "shows 20 of 66 answers" in told.err
    assert main([str(folder)]) == 0 and (folder / "view.html").is_file()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])
    assert "is no folder" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'pyarrow', 'numpy', 'yaml'}"
    code = f"import sys, verl.viewer.__main__ as m; m.parser().format_help(); print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "set()"


def test_a_served_page_is_made_at_each_request() -> None:
    pages = iter(["first", "second"])
    serving = server(0, lambda: next(pages))
    host, port = serving.server_address[:2]
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    try:
        assert host == "127.0.0.1"
        address = f"http://127.0.0.1:{port}/"
        assert [urllib.request.urlopen(address, timeout=30).read().decode() for _ in range(2)] == ["first", "second"]
        for request in (f"{address}etc/passwd", urllib.request.Request(address, headers={"Host": "elsewhere.test"})):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request, timeout=30)
        with pytest.raises(ValueError, match=f"--serve {port}"):
            server(int(port), str)
    finally:
        serving.shutdown()
        serving.server_close()


def test_sources_and_teachers(folder: Path) -> None:
    rows = read_run(folder, NONE, 1000).answers
    assert {(row["source"], row["teacher"]) for row in rows} == {(GENERAL, "ref"), (REC, "self")}
