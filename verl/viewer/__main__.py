"""``python -m verl.viewer RUN``: a training run as one HTML file, or served while it goes on.

In:  the command line. Out: a file, or a server on the loopback.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from verl.utils.console import command_parser

PORT = 8765
"""Of ``--serve`` without a number."""
ANSWERS = 20_000
"""Most answers that a page shows by default."""
LOOPBACK = "127.0.0.1"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_parser("verl.viewer", "Shows a training run: curves, answers, and each of their tokens.")
    made.add_argument("run", metavar="RUN", type=Path, help="folder of the run (trainer.default_local_dir)")
    made.add_argument("--out", type=Path, metavar="FILE", help="the HTML file to write (default: RUN/view.html)")
    serve_help = f"serve the page on {LOOPBACK} instead; a reload shows the run as it goes on (default: {PORT}; 0: any)"
    made.add_argument("--serve", type=int, nargs="?", const=PORT, metavar="PORT", help=serve_help)
    made.add_argument("--rollouts", type=Path, metavar="DIR", help="training answers (default: as the run was set)")
    made.add_argument("--validation", type=Path, metavar="DIR", help="validation answers (default: as the run was set)")
    made.add_argument("--answers", type=int, default=ANSWERS, metavar="N", help="most answers (default: %(default)s)")
    return made


def build(arguments: argparse.Namespace) -> str:
    """The page of a run as it is now; what is missing also goes to stderr.

    Raises:
        ValueError: a folder that the command line names does not exist.
    """
    from verl.viewer.page import page_of
    from verl.viewer.run_data import read_run

    given = {"training": arguments.rollouts, "validation": arguments.validation}
    run = read_run(arguments.run, given, arguments.answers)
    for note in run.notes:
        print(note, file=sys.stderr)
    return page_of(run)


def server(port: int, make_page: Callable[[], str]) -> ThreadingHTTPServer:
    """A server on the loopback, which makes the page anew at each request of ``/``; it does not run yet.

    Raises:
        ValueError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site that had its name point here would send that name.
            host = self.headers.get("Host", "").partition(":")[0]
            if self.path.partition("?")[0] != "/" or host not in (LOOPBACK, "localhost"):
                return self.send_error(404)
            page = make_page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are no news."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ValueError(f"--serve {port}: {error.strerror}; another number, or 0 for any that is free") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page or serve it until Ctrl-C; returns the exit code."""
    made = parser()
    arguments = made.parse_args(argv)
    try:
        page = build(arguments)
        if arguments.serve is not None:
            serving = server(arguments.serve, lambda: build(arguments))
            print(f"http://{LOOPBACK}:{serving.server_address[1]}/ shows {arguments.run}; Ctrl-C ends it", flush=True)
            serving.serve_forever()
        out = arguments.out or arguments.run / "view.html"
        out.write_text(page, encoding="utf-8")
        print(f"{out}: {len(page) / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        made.error(str(error))
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
