"""Items, their trie, the exact ranking and the metrics, on numbers made by hand."""

import asyncio
import itertools
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.onpolicy_distill.scoreboard import measures
from recipe.onpolicy_distill.scoreboard.items import ItemTrie, items_in, listed_items
from recipe.onpolicy_distill.scoreboard.measures import Answered, accuracy_metrics, free_metrics, ranking_metrics
from recipe.onpolicy_distill.scoreboard.ranking import most_likely_items
from verl.utils.dataset.items import item_tokens, read_catalogue


def text(*codes):
    return "".join(item_tokens(codes))


class Vocabulary:
    """A tokenizer as far as the trie knows one: ``sid_begin`` is 0, level a from 100 on, b from 200, c from 300."""

    def __init__(self, codes):
        starts = {"a": 100, "b": 200, "c": 300}
        self.ids = {f"<s_{level}_{code}>": start + code for level, start in starts.items() for code in range(codes)}
        self.ids["<|sid_begin|>"] = 0

    def get_vocab(self):
        return self.ids


class SoftmaxEngine:
    """Draws logits for every context from its seed, and answers like an engine with ``allowed_token_ids``."""

    def __init__(self, seed, scale, tells=20):
        self.seed, self.scale, self.tells, self.calls = seed, scale, tells, 0

    def log_softmax(self, context, allowed):
        logits = {token: random.Random(f"{self.seed} {context} {token}").gauss(0, self.scale) for token in allowed}
        total = math.log(sum(map(math.exp, logits.values())))
        return {token: logit - total for token, logit in logits.items()}

    async def best_tokens(self, context, allowed):
        self.calls += 1
        assert len(allowed) > 1, "a forced token needs no request"
        shares = self.log_softmax(tuple(context), allowed)
        return sorted(shares.items(), key=lambda entry: -entry[1])[: self.tells]

    def every_item(self, prompt, items, trie):
        """All items with their log-probs, best first, by scoring each of them."""
        scored, known = [], {}
        for item in items:
            path, log_prob = (), 0.0
            for level, code in enumerate(item):
                token = 100 * (level + 1) + code
                if path not in known:
                    known[path] = self.log_softmax((*prompt, *path), trie.allowed_after(path))
                log_prob += known[path][token]
                path = (*path, token)
            scored.append((item, log_prob))
        return sorted(scored, key=lambda entry: -entry[1])


@pytest.mark.parametrize(("tells", "most"), [(1, 100), (3, 60), (20, 40)])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_the_ranking_is_exact_and_lazy(scale, tells, most):
    items = sorted(random.Random(1).sample(list(itertools.product(range(8), repeat=3)), 150))
    trie = ItemTrie(items, Vocabulary(8))
    for seed in range(3):
        engine = SoftmaxEngine(seed, scale, tells)
        found = asyncio.run(most_likely_items([7, 0], trie, 10, engine.best_tokens))
        wanted, log_probs = zip(*engine.every_item([7, 0], items, trie)[:10], strict=True)
        assert found.exact and engine.calls < most
        assert [item for item, _ in found.items] == [*wanted]
        assert [log_prob for _, log_prob in found.items] == pytest.approx(log_probs, abs=1e-6)


@pytest.mark.parametrize("first", [0.999996, 0.9999994, 0.99999992, 0.999999975, 1 - 4e-9])
def test_codes_that_a_confident_model_does_not_tell_come_after_those_it_tells(first):
    """Log-probs in float32, in which the 20 codes of an answer hold everything."""
    trie = ItemTrie([(code, 0, 0) for code in range(60)], Vocabulary(60))
    probs = [first, *((1 - first) * 0.5 ** (code / 4) for code in range(1, 60))]
    total = sum(probs)

    async def best_tokens(context, allowed):
        here = [probs[token - 100] for token in allowed]
        shares = [math.log(prob / sum(here)) for prob in here]
        told = sorted(zip(allowed, shares, strict=True), key=lambda entry: -entry[1])[:20]
        return [(token, float(np.float32(share))) for token, share in told]

    found = asyncio.run(most_likely_items([0], trie, 10, best_tokens))
    assert [item[0] for item, _ in found.items] == list(range(10)) and found.exact
    wanted = [math.log(p / total) for p in probs[:9]]
    assert [log_prob for _, log_prob in found.items[:9]] == pytest.approx(wanted, abs=1e-6)
    deeper = asyncio.run(most_likely_items([0], trie, 30, best_tokens))
    told = 30 if deeper.exact else 20
    assert [item[0] for item, _ in deeper.items[:told]] == list(range(told))
    assert deeper.exact == (first < 0.9999999), "beyond that float32 does not say what the rest holds"


def test_a_small_catalogue_is_ranked_whole():
    trie = ItemTrie([(0, 0, 0), (0, 1, 2), (3, 1, 1)], Vocabulary(4))
    engine = SoftmaxEngine(0, 1.0)
    found = asyncio.run(most_likely_items([0], trie, 10, engine.best_tokens))
    assert sorted(item for item, _ in found.items) == [(0, 0, 0), (0, 1, 2), (3, 1, 1)]
    assert sum(math.exp(log_prob) for _, log_prob in found.items) == pytest.approx(1.0)
    assert engine.calls == 2  # one choice at the root and one after code 0; all else is forced


def test_a_narrow_search_says_that_it_may_miss_some():
    trie = ItemTrie(itertools.product(range(8), repeat=3), Vocabulary(8))
    engine = SoftmaxEngine(0, 0.1, tells=1)
    found = asyncio.run(most_likely_items([0], trie, 10, engine.best_tokens, width=12))
    assert len(found.items) == 10 and not found.exact
    assert engine.calls <= 8 + 12 + 12


def test_an_item_that_the_tokenizer_does_not_name_is_an_error():
    with pytest.raises(ValueError, match=r"does not name <s_a_9>.*leave out the recommendation data"):
        ItemTrie([(9, 0, 0)], Vocabulary(4))


def test_items_in_texts():
    assert items_in(f"buy {text(3, 7, 1)}{text(0, 0, 2)} or {text(3, 7, 1)}") == [(3, 7, 1), (0, 0, 2), (3, 7, 1)]
    assert items_in("<|sid_begin|><s_b_1><s_a_2><s_c_0><|sid_end|> <|sid_begin|><s_a_1>") == []
    assert listed_items(f" {text(1, 2, 3)}{text(4, 5, 6)}\n") == [(1, 2, 3), (4, 5, 6)]
    assert listed_items(f"{text(1, 2, 3)} yes") == []


def test_a_catalogue_file(tmp_path):
    path = tmp_path / "catalogue.parquet"
    pq.write_table(pa.table({"pid": [5, 6, 7], "sid": [[1, 0, 2], [0, 0, 1], [1, 0, 2]]}), path)
    assert read_catalogue(path) == [(0, 0, 1), (1, 0, 2)]
    wrong = (({"pid": [5], "code": [[1]]}, "and no 'sid'"), ({"sid": [[1, 2], [1, 2, 3]]}, r"of \[2, 3\] codes"))
    for columns, message in wrong:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=message):
            read_catalogue(path)


def test_metrics_by_hand():
    thinking = Answered("copy", "<think>\nwell\n</think>\n\nab", "ab")
    answers = [Answered("copy", " a b\n", "a b"), thinking, Answered("sum", "7", "8")]
    by_task = {"copy": 1.0, "sum": 0.0}
    accuracy = {"general_accuracy": 2 / 3, "general_accuracy_by_task": by_task}
    assert accuracy_metrics("general_", answers) == accuracy
    assert accuracy_metrics("general_", []) == {}
    unknown = [Answered("chats", "Hello", " "), Answered("chats", "", "")]
    assert accuracy_metrics("general_", unknown) == {} and accuracy_metrics("general_", answers + unknown) == accuracy
    ranking = [(n, 0, 0) for n in range(10)]
    targets = [frozenset({(0, 0, 0)}), frozenset({(4, 0, 0), (9, 0, 0), (11, 0, 0), (12, 0, 0)})]
    recall = {"rec_recall_at_1": 0.5, "rec_recall": 0.625, "rec_recall_at_10": 0.75}
    passed = {"rec_pass_at_1": 0.5, "rec_pass_at_5": 1.0, "rec_pass_at_10": 1.0}
    assert ranking_metrics([ranking, ranking], targets) == recall | passed
    assert measures.recall_by_task([ranking, ranking], targets, ["video", "ad"]) == {"ad": 0.25, "video": 1.0}
    free = [text(0, 0, 0), f"{text(5, 0, 0)}{text(4, 0, 0)}"]
    assert free_metrics(free, targets, frozenset(ranking)) == {"free_rate": 0.5, "free_valid_rate": 1.0}
    assert free_metrics(["I recommend " + text(0, 0, 0)], targets[:1], ranking)["free_rate"] == 0.0
    texts = {"<think>\nab": "", "ab <think> so": "ab", "x</think>ab<think>c": "ab", "<think>x</think> ab ": "ab"}
    assert {text: measures.final_answer(text) for text in texts} == texts, "a thought that never ends is no answer"
    assert measures.one_of_each_in_turn(["b", "b", "a", "b", "a"]) == [2, 0, 4, 1, 3]
