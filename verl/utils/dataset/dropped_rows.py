"""What became of the rows of a data set: counts by reason and source, and a JSONL line for each that was dropped.

In: one call per dropped row, and the counts of the kept ones. Out: the file, and a summary of one screen. Which rows
are dropped is decided elsewhere.
"""

import json
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TextIO

TEXT_CHARACTERS = 200
"""How much of a dropped row is written down."""
SOURCES_SHOWN = 12
"""Sources in the summary, the most frequent first."""
SOURCES_PER_REASON = 4
"""Sources named beside a reason."""

LINE_BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""What readers of lines may break at beside what JSON escapes of itself."""


class DropReport(AbstractContextManager["DropReport"]):
    """Counts kept and dropped rows; used as a context manager, which closes the file."""

    def __init__(self, path: str | Path | None) -> None:
        self.kept: Counter[str] = Counter()
        """Rows kept, by source."""
        self.dropped_by_source: Counter[tuple[str, str]] = Counter()
        """Rows dropped, by reason and source."""
        self.path = Path(path) if path is not None else None
        self._file: TextIO | None = None

    def __enter__(self) -> "DropReport":
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

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def keep(self, source: str, rows: int = 1) -> None:
        """Count rows that are used."""
        self.kept[source] += rows

    def drop(self, place: tuple[Path, int], row_id: str, source: str, reason: str, detail: str, text: str) -> None:
        """Count a row that is not, and write its line."""
        self.dropped_by_source[reason, source] += 1
        if self._file is None:
            return
        line = {
            "file": str(place[0]),
            "row": place[1],
            "uuid": row_id,
            "source": source,
            "reason": reason,
            "detail": detail,
            "text": text[:TEXT_CHARACTERS],
        }
        self._file.write(json.dumps(line, ensure_ascii=False).translate(LINE_BREAKS) + "\n")

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped, by reason."""
        reasons: Counter[str] = Counter()
        for (reason, _), rows in self.dropped_by_source.items():
            reasons[reason] += rows
        return reasons

    @property
    def rows(self) -> int:
        """Rows kept and dropped."""
        return self.kept.total() + self.dropped_by_source.total()

    @property
    def dropped_fraction(self) -> float:
        """Share of the rows that was dropped; 0 without rows."""
        return self.dropped_by_source.total() / max(self.rows, 1)

    def reasons(self) -> str:
        """Counts by reason in one line."""
        return ", ".join(f"{rows:,} {reason}" for reason, rows in self.dropped.most_common())

    def summary(self) -> str:
        """Rows kept and dropped, by reason and source, on one screen."""
        kept, dropped = self.kept.total(), self.dropped
        lines = [f"kept {kept:,} of {self.rows:,} rows"]
        lines += [
            f"  dropped {rows:,}: {reason} ({self._sources_of(reason)})" for reason, rows in dropped.most_common()
        ]
        if dropped and self.path is not None:
            lines.append(f"  each dropped row is in {self.path}")
        shown = self.kept.most_common(SOURCES_SHOWN)
        lines += [f"  source {source}: {rows:,}" for source, rows in shown]
        if len(self.kept) > len(shown):
            lines.append(f"  and {len(self.kept) - len(shown)} more sources")
        return "\n".join(lines)

    def _sources_of(self, reason: str) -> str:
        """The sources of the rows dropped for a reason, the most frequent first."""
        sources = Counter({source: rows for (why, source), rows in self.dropped_by_source.items() if why == reason})
        named = [f"{source} {rows:,}" for source, rows in sources.most_common(SOURCES_PER_REASON)]
        rest = len(sources) - len(named)
        return ", ".join(named) + (f", {rest} more" if rest else "")
