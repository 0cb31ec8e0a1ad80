"""Four steps of distillation on a random teacher and student, for which a laptop's CPU is enough.

    python -m examples.tiny [HYDRA_OVERRIDES]

The first call writes both models and some sums as prompts to outputs/tiny. What follows goes to Hydra; a real run takes
it after recipe/onpolicy_distill/run_qwen3_distill.sh. Answers, which are gibberish, are in outputs/tiny/run/rollouts.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.onpolicy_distill.main_onpolicy_distill import main
from recipe.onpolicy_distill.tiny_models import TinyPairConfig, build_tiny_models
from recipe.onpolicy_distill.tiny_tokenizers import build_tiny_tokenizers

SUMS = [(f"{a} + {b} = ?", str(a + b)) for a in range(8) for b in range(8)]


def settings(folder: Path) -> list[str]:
    """Overrides of the run; those of the command line come after them and win."""
    return [
        f"actor_rollout_ref.model.path={folder}/student",
        f"actor_rollout_ref.ref.model.path={folder}/teacher",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.name=hf",
        "actor_rollout_ref.rollout.extend_vocab_start_token=auto",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        f"data.train_files={folder}/train.parquet",
        "data.max_response_length=64",
        "data.train_batch_size=8",
        f"trainer.default_local_dir={folder}/run",
        f"trainer.rollout_data_dir={folder}/run/rollouts",
        "trainer.device=cpu",
        "trainer.total_training_steps=4",
        "trainer.logger=[console,file]",
    ]


def write_models_and_prompts(folder: Path) -> None:
    """Write ``teacher``, ``student``, ``questions.jsonl`` and ``train.parquet``, unless they are there."""
    if (folder / "train.parquet").is_file():
        return
    build_tiny_models(*build_tiny_tokenizers(folder / "tokenizers"), folder, TinyPairConfig(hidden=64))
    lines = [json.dumps({"source": "sums", "question": question, "answer": answer}) for question, answer in SUMS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SUMS]
    rows = [{"source": "sums", "uuid": f"sum-{row}", "messages": json.dumps(chat)} for row, chat in enumerate(chats)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")  # last: it says that all are there


if __name__ == "__main__":
    FOLDER = Path("outputs/tiny")
    write_models_and_prompts(FOLDER)
    sys.argv[1:] = [*settings(FOLDER), *sys.argv[1:]]
    main()
