"""A process that makes one run after another, with everything it imported kept warm.

In: the study's folder and the fields of `Extras` as arguments, and one line of JSON per run on stdin (the fields of
`Run`). Out: one line per run on stdout, its record; progress and warnings go to stderr. It ends with stdin. A run that
cannot start or fails is a record too; a fault of the program ends the process.
"""

import json
import logging
import os
import sys
from pathlib import Path

from experiments.retention.results import FAILED, Extras, Record, Run, record_of


def answer(run: Run, out: Path, extras: Extras) -> Record:
    """The record of a run, whether it succeeds or not."""
    from experiments.retention.runner import execute

    try:
        return execute(run, out, extras)
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).exception("%s failed", run.name)
        return record_of(run, FAILED, message=f"{type(error).__name__}: {error}")


def main() -> None:
    """Answer until stdin ends."""
    out, extras = Path(sys.argv[1]), Extras(**json.loads(sys.argv[2]))
    # What libraries print must not get between the records.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for line in sys.stdin:
        record = answer(Run(**json.loads(line)), out, extras)
        replies.write(json.dumps(record) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
