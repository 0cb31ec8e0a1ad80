"""A real chat model learns to recommend from real purchases, forgets how to chat, and is distilled back.

::

    python -m experiments.real_model [--small | --tiny] [--seed 0] [--mode MODE] [--out DIR] [--until STEP] [OVERRIDES]

    teacher ─► prompts, data ─► student, which forgot ─► judged ─► distilled ─► judged ─► result.md, result.json

What is done is found in OUT and not done again; Hydra overrides go to the distillation.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.real_model.distil import EXACT, MODES
from experiments.real_model.side_by_side import side_by_side
from experiments.real_model.table import AFTER, BEFORE, TEACHER, compare, markdown
from recipe.onpolicy_distill.quickstart.cache import key_digest
from verl.utils.timing import marked_timer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PLAIN = ("popular_", "next_", "constant_")
"""How metrics begin that no model is needed for."""
STEPS = ("teacher", "prompts", "data", "student", f"judge_{TEACHER}", f"judge_{BEFORE}", "distil", f"judge_{AFTER}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; Hydra overrides may stand anywhere in it."""
    parser = argparse.ArgumentParser(prog="python -m experiments.real_model", description=str(__doc__).splitlines()[0])
    sizes = parser.add_mutually_exclusive_group()
    for name, what in {"small": "of some minutes on a CPU", "tiny": "a random model in place of the real one"}.items():
        sizes.add_argument(f"--{name}", action="store_const", const=name, dest="size", help=what)
    parser.add_argument("--seed", type=int, default=0, help="of data, models and sampling; default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: outputs/real_model-SIZE")
    parser.add_argument("--data", type=Path, default=DATA, help="purchases and IFEval's prompts; default: %(default)s")
    mode = "what the student is distilled by; default: %(default)s"
    parser.add_argument("--mode", choices=MODES, default=EXACT, help=mode)
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="last step to make; default: all")
    bf16 = "compute in bf16; default: where the machine multiplies in it"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the distillation")
    args = parser.parse_intermixed_args(argv)
    args.size = args.size or "full"
    args.out = args.out or Path("outputs") / f"real_model-{args.size}"
    return args


class Steps:
    """Makes the steps in order up to one of them; keeps what each folder took, over all calls of the command."""

    def __init__(self, out: Path, last: str) -> None:
        self._out, self._last, self._path = out, last, out / "seconds.json"
        known: dict[str, float] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._known = known
        """By folder below ``out``; by name of a step what calls took that left none, for the folder to come."""
        self.seconds: dict[str, float] = {}
        """Of each step of this call, whenever its folder was made."""

    def __call__(self, name: str, make: Callable[[], Path]) -> Path:
        """The folder that ``make`` leaves; ends the program after the last step that is wanted."""
        print(f"[{STEPS.index(name) + 1}/{len(STEPS)}] {name}", flush=True)
        try:
            with marked_timer(name, self._known):
                folder = make()
            place = str(folder.relative_to(self._out))
            self._known[place] = self.seconds[name] = self._known.get(place, 0.0) + self._known.pop(name)
        finally:
            self._path.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
        if name == self._last != STEPS[-1]:
            print(f"made up to {name}; the same command without --until goes on")
            raise SystemExit(0)
        return folder


def experiment(args: argparse.Namespace, out: Path) -> str:
    """Every step, then ``result.md`` and ``result.json``; returns the table. Errors as those of the steps."""
    from experiments.real_model import data, distil, ifeval, judge, models, student
    from experiments.real_model.sizes import sizes_of

    size, step = sizes_of(args.size, args.seed, args.bf16), Steps(out, args.until)
    settings = replace(size.distil, mode=args.mode)
    if ifeval.read_prompts(args.data):
        ifeval.verifier()  # whether it is installed, before anything is made
    else:
        logging.getLogger("experiments").info("no IFEval prompts in %s: it is left out", args.data)
    teacher = step("teacher", lambda: models.make_teacher(out, tiny=args.size == "tiny"))
    prompts = step("prompts", lambda: data.make_prompts(teacher, out, size.prompts))
    files = step("data", lambda: data.make_data(out, size.data, args.data)), prompts
    before = step("student", lambda: student.make_student(teacher, files[0], out, size.student))

    def judged(name: str, model: Path) -> Path:
        return step(f"judge_{name}", lambda: judge.judge(model, teacher, files, args.data, out, size.judge))

    folders = {TEACHER: judged(TEACHER, teacher), BEFORE: judged(BEFORE, before)}
    of_run = {"teacher": teacher, "student": before, "data": files[0], "prompts": prompts}
    after = step("distil", lambda: distil.distil(out, settings, args.overrides, **of_run))
    folders[AFTER] = judged(AFTER, after)
    return write_result(out, args, folders, step.seconds)


def write_result(out: Path, args: argparse.Namespace, judged: dict[str, Path], seconds: dict[str, float]) -> str:
    """Write the table as Markdown and JSON, and answers beside those of the modes that were tried before; returns the
    table.
    """
    outcomes = {model: json.loads((folder / "outcomes.json").read_text("utf-8")) for model, folder in judged.items()}
    rows = compare(outcomes)
    plain = {key: pairs for key, pairs in outcomes[AFTER].items() if key.startswith(PLAIN)}
    means = {key: sum(x for x, _ in pairs) / sum(n for _, n in pairs) for key, pairs in plain.items()}
    result = {key: getattr(args, key) for key in ("size", "seed", "mode", "overrides")}
    result |= {"rows": rows, "plain": means, "seconds": seconds}
    # The folder of the student before names the student, the prompts and how both were judged.
    result |= {"judged": judged[AFTER].name, "before": judged[BEFORE].name}
    parts = [args.mode] * (args.mode != EXACT) + [f"seed{args.seed}"] * bool(args.seed)
    name = "-".join(["result", *parts, *[key_digest(args.overrides)] * bool(args.overrides)])
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    of_plain = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    text = f"{markdown(rows)}\n\nWithout a model (judge.py): {of_plain}.\nSeconds: {took}.\n"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    found = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("result*.json"))]
    models = {TEACHER: judged[TEACHER], BEFORE: judged[BEFORE]}
    beside = [one for one in found if one.get("before") == result["before"] and (out / one["judged"]).is_dir()]
    models |= {" ".join([one["mode"], *one["overrides"]]): out / one["judged"] for one in beside}
    (out / "answers.md").write_text(side_by_side(models, args.seed), encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the experiment and show the table."""
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("recipe", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        print(experiment(args, out))
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
