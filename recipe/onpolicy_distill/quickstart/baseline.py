"""What recommending without a model is worth: the same most popular items to every user.

In: a world's files. Out: the metrics that the scoreboard has of a model's rankings.
"""

import json

import pyarrow.parquet as pq

from recipe.onpolicy_distill.quickstart.world import World
from recipe.onpolicy_distill.scoreboard.measures import KS, ranking_metrics
from verl.utils.dataset.items import Item


def popularity_metrics(world: World) -> dict[str, float]:
    """Recall and Pass of the items that the training histories hold most often, over the test users."""
    catalogue = pq.read_table(world.catalogue, columns=["item", "sid", "popularity"]).to_pylist()
    items: dict[int, Item] = {row["item"]: tuple(row["sid"]) for row in catalogue}
    favourites = sorted(catalogue, key=lambda row: -row["popularity"])[: max(KS)]
    rows = pq.read_table(world.rec_test, columns=["source", "metadata"]).to_pylist()
    targets = [{items[json.loads(row["metadata"])["target_item"]]} for row in rows if row["source"] == "rec_next"]
    return ranking_metrics([[items[row["item"]] for row in favourites]] * len(targets), targets)
