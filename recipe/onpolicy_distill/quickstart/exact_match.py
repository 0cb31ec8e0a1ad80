"""The quickstart's reward in validation: 1 for exactly the answer that is wanted."""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str | None, extra_info: dict[str, Any]) -> float:
    """1.0 where the answer, stripped, is the ground truth, else 0.0; None: it is unknown."""
    return float(ground_truth is not None and solution_str.strip() == ground_truth.strip())
