"""General prompts, to distil on and to measure the distance on.

In: the teacher, which writes them itself; or nothing, and they are every form of question below with every topic.
Out: a folder with ``general_train.parquet`` and ``general_test.parquet`` in OneRec's layout.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.world import Chat, write_chats

WRITER = "recipe.onpolicy_distill.prompts_from_teacher"
SOURCE = "general_chat"
MAX_TOKENS = 256
"""Of a prompt with its template."""
FORMS = (
    "Explain {} to a ten-year-old.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What are the most common misunderstandings about {}?",
    "Write a polite email to a colleague about {}.",
    "Give me three tips about {} for a beginner.",
    "Summarise the history of {} in two sentences.",
    "Write a dialogue between two friends about {}.",
    "What should I read or watch to learn about {}?",
    "Compare {} today with how it was a hundred years ago.",
    "Write a quiz with three questions and answers about {}.",
    "Why does {} matter? Answer in one paragraph.",
    "Invent a slogan and a short advertisement about {}.",
    "I have one hour. Plan a lesson about {}.",
    "Tell me a short story in which {} plays a part.",
    "What would you ask an expert on {}? Use bullet points.",
    "Argue for and against spending public money on {}.",
    "Define {} in simple words and give an example.",
    "Write a title and a first sentence of an article about {}.",
    "How do I explain my interest in {} in a job interview?",
)
TOPICS = """
rainbows, gardening, chess, the moon, bread, volcanoes, trains, sleep, honey bees, the printing press, bicycles,
photography, tea, whales, bridges, maps, earthquakes, the piano, recycling, ancient Rome, basketball, glass,
spiders, electric cars, rivers, dreams, money, the Olympic Games, clouds, robots, cheese, libraries, the human
heart, magnets, swimming, deserts, calendars, penguins, vaccines, kites, public speaking, coffee, mountains,
dinosaurs, newspapers, solar power, friendship, time zones, knitting, submarines, folk music, wheat, lighthouses,
fractions, hiking, the stock market, owls, paper, camping, gravity
"""


@dataclass(frozen=True)
class PromptsConfig:
    """How many general prompts, and where from."""

    seed: int = 0
    train: int = 1500
    test: int = 96
    """The first ones; none of them is trained on."""
    from_teacher: bool = True
    """Written by the teacher; False: the experiment's own."""
    bf16: bool = False
    """Written in bf16."""


def make_prompts(teacher: Path, folder: Path, config: PromptsConfig) -> Path:
    """The folder with the files, made or found below ``folder``; raises RuntimeError where the teacher cannot write."""
    from_teacher = config.from_teacher and find_spec(WRITER) is not None
    key = {"code": file_digest(__file__), "teacher": teacher.name} | asdict(config) | {"from_teacher": from_teacher}

    def make(target: Path) -> None:
        wanted = config.train + config.test
        texts = _from_teacher(target, teacher, wanted, config) if from_teacher else written_prompts()[:wanted]
        chats = [Chat(SOURCE, text, "-", {}) for text in texts]
        write_chats(target, general_test=chats[: config.test], general_train=chats[config.test :])

    return cached_folder(folder, "prompts", key, make)


def _from_teacher(folder: Path, teacher: Path, count: int, config: PromptsConfig) -> list[str]:
    path = folder / "from_teacher.parquet"
    settings = {"model": teacher, "count": count, "out": path, "seed": config.seed, "source": SOURCE}
    settings |= {"max-new-tokens": 128, "max-prompt-length": MAX_TOKENS, "languages": "latin"}
    settings["rollout"] = json.dumps({"dtype": "bfloat16" if config.bf16 else "float32"})
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    if code := subprocess.run([sys.executable, "-m", WRITER, *arguments], check=False).returncode:
        raise RuntimeError(f"{WRITER} ended with code {code}; its own error is above")
    cells = pq.read_table(path, columns=["messages"])["messages"].to_pylist()
    return [json.loads(cell)[0]["content"] for cell in cells]


def written_prompts() -> list[str]:
    """The experiment's own 1,200 prompts, in a fixed order that mixes forms and topics."""
    topics = " ".join(TOPICS.split()).split(", ")
    prompts = [form.format(topic) for topic in topics for form in FORMS]
    Random(0).shuffle(prompts)
    return prompts
