"""A data set of one's own: JSON lines with the fields question and answer, and source where there are several.

    python -m examples.tiny data.custom_cls.path=examples/dataset.py data.custom_cls.name=QuestionDataset \
        data.train_files=outputs/tiny/questions.jsonl

The base class reads parquet. It checks, drops and counts rows, and keeps a memory-mapped copy; so this one writes the
lines as parquet, and says what is in a row. Data that are parquet already need `read_prompt` and its columns alone.
"""

from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet as pq

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import Row, cached_file, file_digest
from verl.utils.dataset.prompt_rows import BadRowError, PromptRow
from verl.utils.dataset.rl_dataset import RLHFDataset


class QuestionDataset(RLHFDataset):
    """Questions as prompts of one user turn."""

    def __init__(self, data_files: list[str], tokenizer: Any, config: DataConfig, **options: Any) -> None:
        """As the base class, with files of JSON lines."""
        files = [self.as_parquet(Path(path), config.cache_dir) for path in data_files]
        super().__init__(files, tokenizer, config, **options)

    @staticmethod
    def as_parquet(path: Path, cache_dir: str) -> Path:
        """The lines of a file as parquet, written once for its content."""

        def write(target: Path) -> None:
            pq.write_table(pyarrow.json.read_json(path), target)

        return cached_file(cache_dir, "questions", ".parquet", write, file=file_digest(path))

    def message_column(self) -> str:
        """The column that has to be there, and that the list of dropped rows shows."""
        return "question"

    def columns(self) -> set[str]:
        """What is read of a row."""
        return super().columns() | {"answer"}

    def read_prompt(self, row: Row) -> PromptRow:
        """One row; BadRowError drops it, and counts it by its first argument."""
        if not (question := (row["question"] or "").strip()):
            raise BadRowError("no_question", "the question is blank")
        return PromptRow([{"role": "user", "content": question}], ground_truth=row.get("answer"))
