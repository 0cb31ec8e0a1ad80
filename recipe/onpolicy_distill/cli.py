"""One way in: ``kai-verl COMMAND [OPTIONS]``, which calls the ``main`` of the module behind the command.

In: the command line. Out: that module's output and exit code; without a command, the table of them. Only the module
that is asked for is imported. Options are those of ``python -m MODULE``.
"""

import difflib
import os
import signal
import sys
from importlib import import_module
from typing import NamedTuple

import verl

RECIPE = "recipe.onpolicy_distill"


class Command(NamedTuple):
    """A row of the table."""

    module: str
    """Has ``main()``, which reads ``sys.argv`` and may return an exit code."""
    summary: str


COMMANDS = {
    "quickstart": Command(f"{RECIPE}.quickstart.__main__", "forget, recover, and see what it cost, in minutes"),
    "distill": Command(f"{RECIPE}.main_onpolicy_distill", "train a student on its own answers; options are KEY=VALUE"),
    "plan": Command(f"{RECIPE}.plan", "what a run will take of memory, by stage, or how to split its GPUs"),
    "evaluate": Command(f"{RECIPE}.evaluate", "general accuracy, recall, leaks and reverse KL of a model"),
    "contract": Command("verl.utils.vocab_contract", "what the vocabularies of student and teacher share"),
    "data": Command("verl.utils.dataset.data_report", "what parquet files hold, and which rows a run would drop"),
    "prompts": Command(f"{RECIPE}.prompts_from_teacher", "general prompts that the teacher writes"),
    "item-prompts": Command(f"{RECIPE}.synthetic_item_prompts", "rehearsal prompts of random items"),
    "view": Command("verl.viewer.__main__", "a run in the browser: curves, answers and their tokens"),
    "merge": Command("verl.model_merger", "a Hugging Face model from a checkpoint's shards"),
    "combine": Command(f"{RECIPE}.combine_models", "a weighted sum of models"),
    "restore-rows": Command(f"{RECIPE}.restore_extended_rows", "item tokens' rows put back as they were before a run"),
    "tiny-models": Command(f"{RECIPE}.tiny_models", "a random teacher and student, to try a run on any machine"),
    "completion": Command(f"{RECIPE}.completion", "completion of commands and options for bash, zsh or fish"),
}


def usage() -> str:
    """The table of commands."""
    rows = "\n".join(f"  {name:14}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: kai-verl COMMAND [OPTIONS]\n\n{rows}\n\nkai-verl COMMAND --help shows its options."


def main() -> int | None:
    """Run the command that ``sys.argv`` names; returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(f"kai-verl {verl.__version__}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "kai-verl --help lists them"
        print(f"error: kai-verl has no command {name}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"kai-verl {name}", *sys.argv[2:]]
    if {"-h", "--help"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may be head, which leaves early
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())  # as python -m does: a user's own modules may lie there
    try:
        code: int | None = import_module(COMMANDS[name].module).main()
    except ModuleNotFoundError as error:  # of transformers, which imports torchvision wherever it is installed
        if "torchvision" not in str(error.__cause__):
            raise
        fix = "pip uninstall torchvision torchaudio torchcodec (nothing here needs them)"
        print(f"error: torchvision is of another build than torch ({error.__cause__}); {fix}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
