"""The student: the teacher with item tokens, trained on purchases alone until it has forgotten how to chat.

In: teacher and data. Out: a Hugging Face folder. Trained on every token of the chats, since a history tells what
follows what at each of its items.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from experiments.real_model import models
from experiments.real_model.data import CODES_PER_LEVEL
from recipe.onpolicy_distill.quickstart import models as training
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest, key_digest
from recipe.onpolicy_distill.quickstart.catalogue import all_item_tokens
from recipe.onpolicy_distill.quickstart.models import TrainingConfig, tokenized_chats, train
from verl.utils.device import get_device_name

CODE = file_digest(__file__, str(models.__file__), str(training.__file__))
"""Of this start: the files may change while the study runs."""


def make_student(teacher: Path, data: Path, folder: Path, config: TrainingConfig) -> Path:
    """Train the student into a folder of its own below ``folder``, go on where a kill left it, or find it there."""
    key = {"code": CODE, "teacher": teacher.name, "data": data.name}
    key |= asdict(config)
    unfinished = folder / f"student-{key_digest(key)}.unfinished.pt"

    def make(target: Path) -> None:
        model, tokenizer = models.extend(teacher, all_item_tokens(CODES_PER_LEVEL), config.seed)
        model.to(torch.device(get_device_name()))
        chats = tokenized_chats(data / "rec_train.parquet", tokenizer)
        train(model, chats, config, "student", on_questions=True, unfinished=unfinished)
        training.save_model(target, model.cpu(), tokenizer)

    made = cached_folder(folder, "student", key, make)
    unfinished.unlink(missing_ok=True)
    return made
