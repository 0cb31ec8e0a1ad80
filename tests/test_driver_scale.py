"""The driver's cost does not grow with the cluster: rows are views and bytes are those of the batch."""

from benchmarks import driver_scale

HEADER_BYTES = 2048
"""Most bytes that a call takes besides its rows: names, dtypes, shapes, meta_info."""


def test_bytes_of_a_step_are_those_of_its_rows_for_any_number_of_workers() -> None:
    runs = [driver_scale.run_step(workers, driver_scale.Sizes(512, 8, 24)) for workers in (2, 32, 512)]
    # int64 columns: responses, input ids and attention mask; the update takes the response mask and the teacher's
    # log-probs too.
    scored = 8 * (24 + 2 * 32)
    trained = scored + (8 + 4) * 24
    row_bytes = {"compute_ref_log_prob": scored, "update_actor": trained}
    for run in runs:
        for name, of_a_row in row_bytes.items():
            assert 0 <= run["calls"][name]["bytes_out"] - 512 * of_a_row < HEADER_BYTES * run["workers"]
    more = runs[-1]["bytes_per_step"] - runs[0]["bytes_per_step"]
    assert more / (3 * (512 - 2)) < HEADER_BYTES
