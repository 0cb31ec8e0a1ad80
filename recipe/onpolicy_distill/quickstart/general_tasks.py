"""General tasks whose answers can be checked letter by letter.

In: a task's name and a random generator. Out: a question and its one right answer, both plain text. Chats, tokens and
files come later.
"""

from collections.abc import Callable
from random import Random

LETTERS = "abcdefghijklmnop"
"""What questions, answers and captions are spelled with (upper case in the answers of ``upper``)."""

Problem = tuple[str, str]


def draw_problem(task: str, random: Random) -> Problem:
    """A question such as ``reverse: cab`` and its answer, ``bac``."""
    question, answer = TASKS[task](random)
    return f"{task}: {question}", answer


def _letters(random: Random) -> str:
    return "".join(random.choices(LETTERS, k=random.randint(3, 5)))


def _copy(random: Random) -> Problem:
    letters = _letters(random)
    return letters, letters


def _reverse(random: Random) -> Problem:
    letters = _letters(random)
    return letters, letters[::-1]


def _upper(random: Random) -> Problem:
    letters = _letters(random)
    return letters, letters.upper()


def _sort(random: Random) -> Problem:
    letters = random.sample(LETTERS, k=random.randint(3, 5))
    return "".join(letters), "".join(sorted(letters))


def _add(random: Random) -> Problem:
    # Three terms up to 5, because two terms make too few sums to keep some of them for the test.
    terms = random.choices(range(6), k=3)
    return "+".join(map(str, terms)), f"{sum(terms):02d}"


TASKS: dict[str, Callable[[Random], Problem]] = {
    "copy": _copy,
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "add": _add,
}
