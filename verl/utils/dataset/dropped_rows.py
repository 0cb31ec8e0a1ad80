"""What became of the rows of a data set: counts by reason and source, and a JSONL line for each that was dropped.

In: one call per row. Out: the file, and a summary of one screen. Which rows are dropped is decided elsewhere.
"""

import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

TEXT_CHARACTERS = 200
"""How much of a dropped row is written down."""
SOURCES_SHOWN = 12
"""Sources in the summary, the most frequent first."""


class RowLedger(AbstractContextManager["RowLedger"]):
    """Counts kept and dropped rows; used as a context manager, which closes the file."""

    def __init__(self, path: str | Path | None) -> None:
        self.kept: Counter[str] = Counter()
        """Rows kept, by source."""
        self.dropped: Counter[str] = Counter()
        """Rows dropped, by reason."""
        self.path = Path(path) if path is not None else None
        self._file: TextIO | None = None

    def __enter__(self) -> "RowLedger":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A lone surrogate cannot be written as UTF-8, and may be the very reason why the row was dropped.
            self._file = self.path.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self, source: str) -> None:
        """Count a row that is used."""
        self.kept[source] += 1

    def drop(self, place: tuple[Path, int], row_id: str, source: str, reason: str, detail: str, text: Any) -> None:
        """Count a row that is not, and write its line."""
        self.dropped[reason] += 1
        if self._file is None:
            return
        line = {
            "file": str(place[0]),
            "row": place[1],
            "uuid": row_id,
            "source": source,
            "reason": reason,
            "detail": detail,
            "text": str(text)[:TEXT_CHARACTERS],
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """Rows kept and dropped, by reason and source, on one screen."""
        kept, dropped = self.kept.total(), self.dropped.total()
        lines = [f"kept {kept:,} of {kept + dropped:,} rows"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.most_common()]
        if self.dropped and self.path is not None:
            lines.append(f"  each dropped row is in {self.path}")
        shown = self.kept.most_common(SOURCES_SHOWN)
        lines += [f"  source {source}: {count:,}" for source, count in shown]
        if len(self.kept) > len(shown):
            lines.append(f"  and {len(self.kept) - len(shown)} more sources")
        return "\n".join(lines)
