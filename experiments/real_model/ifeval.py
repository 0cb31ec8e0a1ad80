"""IFEval: prompts with instructions that a program can check, judged by the verifier of the package lm-eval.

In: prompts with their instructions (``../shared/data/general/ifeval``), answers. Out: for each prompt which of its
instructions were followed, strictly and loosely.

Of lm-eval only the verifier is loaded, which needs neither its other dependencies nor any download: sentences are split
by nupunkt, since no package holds the data that nltk's own splitter wants.
"""

import json
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from experiments.real_model.models import INSTALL

MODES = ("strict", "loose")


def read_prompts(data: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """``key``, ``prompt``, ``instruction_id_list`` and ``kwargs`` of each prompt; none where there is no such file."""
    path = data / "general" / "ifeval" / "prompts.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


@cache
def verifier() -> ModuleType:
    """lm-eval's ``tasks/ifeval/utils.py``; raises RuntimeError where it or what it needs is not installed."""
    try:
        import langdetect
        import nltk
        import nupunkt

        folder = Path(str(find_spec("lm_eval.defaults").origin)).parent / "tasks"  # type: ignore[union-attr]
        tasks = ModuleType("lm_eval.tasks")
        tasks.__path__ = [str(folder)]
        # A package that does not run its __init__, which imports all of lm-eval; and nltk's data are taken to be here.
        with patch.dict(sys.modules, {"lm_eval.tasks": tasks}), patch.object(nltk.data, "find"):
            texts: Any = import_module("lm_eval.tasks.ifeval.instructions_util")
            utils = import_module("lm_eval.tasks.ifeval.utils")
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"IFEval's verifier is not installed ({error}); {INSTALL}") from error
    langdetect.DetectorFactory.seed = 0  # it draws

    def words(text: str) -> list[str]:
        return [w for s in nupunkt.sent_tokenize(text) for w in nltk.word_tokenize(s, preserve_line=True)]

    texts.nltk = SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=words)
    texts._get_sentence_tokenizer = lambda: SimpleNamespace(tokenize=nupunkt.sent_tokenize)
    return utils


def verdicts(document: dict[str, Any], answer: str) -> dict[str, list[bool]]:
    """For each of ``MODES``, whether each instruction of a prompt was followed."""
    results = verifier().process_results(document, [answer])
    return {mode: list(results[f"inst_level_{mode}_acc"]) for mode in MODES}
