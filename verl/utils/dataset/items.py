"""Items as OneRec writes them, and the catalogue of those that exist.

In: a catalogue file (parquet, column ``sid``: one list of codes per item; ``text``, where it is asked for). Out: items
as tuples of codes and as text.

    (3, 7, 1)  ->  <|sid_begin|><s_a_3><s_b_7><s_c_1><|sid_end|>
"""

import operator
import re
from pathlib import Path

import pyarrow.parquet as pq

from verl.utils.dataset.parquet_files import column_names, expand_data_files

Item = tuple[int, ...]
"""Codes of an item, first level first."""

SID_COLUMN, TEXT_COLUMN = "sid", "text"
ITEM_BEGIN, ITEM_END = "<|sid_begin|>", "<|sid_end|>"
LEVELS = "abcdefgh"


def code_token(level: int, code: int) -> str:
    """The token of one code of an item; levels count from 0."""
    return f"<s_{LEVELS[level]}_{code}>"


def item_tokens(item: Item) -> list[str]:
    """The tokens that write an item."""
    return [ITEM_BEGIN, *(code_token(level, code) for level, code in enumerate(item)), ITEM_END]


CODE_TOKEN = re.compile(rf"<s_([{LEVELS}])_(\d+)>")
"""A token of `code_token`: the level's letter, and the code."""
WRITTEN_ITEM = re.compile(rf"{re.escape(ITEM_BEGIN)}(?:{CODE_TOKEN.pattern})+{re.escape(ITEM_END)}")
"""An item in a text."""


def read_item_texts(path: str | Path) -> dict[str, str]:
    """What the catalogue says of each item, by the item as it is written.

    Raises:
        ValueError: as `read_catalogue`, no column ``text``, or an item without a text or with two.
    """
    files, texts = expand_data_files(path), dict[str, str]()
    if lost := {SID_COLUMN, TEXT_COLUMN} - column_names(files):
        raise ValueError(f"the catalogue {path} has no column {sorted(lost)[0]!r}; it needs sid, and text of each item")
    read_catalogue(path)  # refuses codes that are written otherwise than the tokens
    for file in files:
        for number, row in enumerate(pq.ParquetFile(file).read([SID_COLUMN, TEXT_COLUMN]).to_pylist()):
            item, text = "".join(item_tokens(row[SID_COLUMN])), row[TEXT_COLUMN]
            if not text or not isinstance(text, str) or texts.setdefault(item, text) != text:
                raise ValueError(f"{file}, row {number} has no text, or two, of item {row[SID_COLUMN]}; give it one")
    return texts


def read_catalogue(path: str | Path) -> list[Item]:
    """The items of a catalogue, each once, in order of their codes.

    Raises:
        ValueError: no such file, no column ``sid``, or rows that are not lists of equally many codes.
    """
    files = expand_data_files(path)
    if SID_COLUMN not in (columns := column_names(files)):
        raise ValueError(f"the catalogue {path} has the columns {sorted(columns)} and no {SID_COLUMN!r} (list of ints)")
    cells = (cell for file in files for cell in pq.ParquetFile(file).read([SID_COLUMN])[SID_COLUMN].to_pylist())
    try:
        # index refuses floats and texts, which int would take.
        items = {tuple(map(operator.index, cell)) for cell in cells}
    except TypeError as error:
        raise ValueError(f"the catalogue {path}: {SID_COLUMN} must hold lists of ints ({error})") from error
    depths = sorted({len(item) for item in items})
    if len(depths) != 1 or not 0 < depths[0] <= len(LEVELS):
        raise ValueError(f"the catalogue {path} has items of {depths} codes; all need equally many, 1 to {len(LEVELS)}")
    return sorted(items)
