"""A folder of results that are found again by what they were worked out from.

In: everything that a result depends on, files and tokenizers as digests of their content. Out: the path that the
result is kept at. A result is there whole or not at all, also where several runs work it out at the same time. Nothing
is ever deleted here: between runs the folder may be.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEFAULT_CACHE_DIR = "~/.cache/kai-verl"
KEY_CHARACTERS = 32
"""Of a digest in a file's name: 128 bits, which do not collide by chance."""


class DataCache:
    """Results in ``folder`` (``data.cache_dir``)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, kind: str, suffix: str, **depends_on: Any) -> Path:
        """Where the result of this kind is kept that depends on these values, which JSON can hold."""
        key = text_digest(json.dumps(depends_on, sort_keys=True))
        return self.folder / f"{kind}-{key[:KEY_CHARACTERS]}{suffix}"

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Yield a path to write to, which takes the place of ``path`` once the block has ended well.

        Raises ValueError where the folder cannot be written, or is full.
        """
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                yield beside
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={self.folder} cannot be written: {error}; name a folder with room for the data"
            ) from error


def text_digest(text: str) -> str:
    """Digest of a text, lone surrogates included."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest() -> str:
    """Digest of this package's source: what another version of the code found out is not trusted."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return text_digest("\n".join(source.read_text(encoding="utf-8") for source in sources))
