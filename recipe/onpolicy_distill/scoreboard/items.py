"""Items in texts, and the trie of those that exist.

In:  a text that holds items, or the items of a catalogue and a tokenizer that names the item tokens. Out: items as
tuples of codes, and the tokens that may follow each beginning of an item.

    <|sid_begin|><s_a_3><s_b_7><s_c_1><|sid_end|>  <->  (3, 7, 1)

Not here: who chooses among the allowed tokens (``ranking``).
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from verl.utils.dataset.items import CODE_TOKEN, ITEM_BEGIN, LEVELS, WRITTEN_ITEM, Item, code_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ITEM_LIST = re.compile(f"(?:{WRITTEN_ITEM.pattern})+")


def items_in(text: str) -> list[Item]:
    """The items of a text in order; what is not a whole item with its levels in order is passed over."""
    found = [CODE_TOKEN.findall(match.group()) for match in WRITTEN_ITEM.finditer(text)]
    whole = (codes for codes in found if "".join(level for level, _ in codes) == LEVELS[: len(codes)])
    return [tuple(int(code) for _, code in codes) for codes in whole]


def listed_items(text: str) -> list[Item]:
    """The items of a text that is items and nothing else; none of any other text."""
    return items_in(text) if _ITEM_LIST.fullmatch(text.strip()) else []


class ItemTrie:
    """Which tokens may follow which beginning of an item.

    Args:
        items: the catalogue, at least one item, all of as many codes.
        tokenizer: names every item token.

    Raises:
        ValueError: an item token that the tokenizer does not name.
    """

    def __init__(self, items: Iterable[Item], tokenizer: "PreTrainedTokenizerBase") -> None:
        self._items = {tuple(item) for item in items}
        vocabulary = tokenizer.get_vocab()
        self.begin_id = _token_id(vocabulary, ITEM_BEGIN)
        self.depth = len(next(iter(self._items)))
        """Codes of an item."""
        self._codes: list[dict[int, int]] = [{} for _ in range(self.depth)]
        children: dict[tuple[int, ...], set[int]] = {}
        for item in self._items:
            path: tuple[int, ...] = ()
            for level, code in enumerate(item):
                token = _token_id(vocabulary, code_token(level, code))
                self._codes[level][token] = code
                children.setdefault(path, set()).add(token)
                path = (*path, token)
        self._children = {path: tuple(sorted(tokens)) for path, tokens in children.items()}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def allowed_after(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids that may follow the ids ``path``; at least one, for a path of fewer than ``depth`` ids."""
        return self._children[path]

    def item_of(self, path: tuple[int, ...]) -> Item:
        """The item that ``depth`` token ids name."""
        return tuple(self._codes[level][token] for level, token in enumerate(path))


def _token_id(vocabulary: dict[str, int], token: str) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"the model's tokenizer does not name {token}: items are read as OneRec writes them, such as "
            "<|sid_begin|><s_a_3><s_b_7><s_c_1><|sid_end|>; for a model without such tokens, or with other names for "
            "them, leave out the recommendation data"
        )
    return vocabulary[token]
