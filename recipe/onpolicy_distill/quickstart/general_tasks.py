"""General tasks whose answers can be checked letter by letter.

In: a task's name and a random generator. Out: a question and its one right answer, both plain text. Chats, tokens and
files come later.
"""

from collections.abc import Callable
from random import Random

LETTERS = "abcdefghijklmnop"
"""What questions, answers and captions are spelled with (upper case in the answers of ``upper``)."""

OF_LETTERS: dict[str, Callable[[str], str]] = {
    "copy": str,
    "reverse": lambda letters: letters[::-1],
    "upper": str.upper,
    "sort": lambda letters: "".join(sorted(letters)),
}
"""Tasks that are given letters, and what they make of them."""
TASKS = (*OF_LETTERS, "add")


def draw_problem(task: str, random: Random) -> tuple[str, str]:
    """A question such as ``reverse: cab`` and its answer, ``bac``."""
    if task == "add":
        # Three terms up to 5, because two terms make too few sums to keep some of them for the test.
        terms = random.choices(range(6), k=3)
        return "add: " + "+".join(map(str, terms)), f"{sum(terms):02d}"
    draw = random.sample if task == "sort" else random.choices
    letters = "".join(draw(LETTERS, k=random.randint(3, 5)))
    return f"{task}: {letters}", OF_LETTERS[task](letters)
