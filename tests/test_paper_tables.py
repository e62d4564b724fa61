"""The paper's tables with columns that a run fills: each number in its own row, nothing where nothing was measured."""

import pandas as pd
import pytest

from dalleflamingo.research import paper, paper_tables, report


@pytest.mark.parametrize(
    ("name", "published", "by", "count"),
    [("insight-1", paper.TABLE_1, "clip", 12), ("insight-2", paper.TABLE_2, "text_clip", 6)],
)
def test_every_number_of_the_paper_stands_beside_the_runs(name, published, by, count):
    _, effects = report.load(name)
    table = paper_tables.beside(published, effects, by)
    assert len(table) == count
    filled = table[table["this run: random"] != ""]
    assert set(filled["data set"]) == {"nocaps"} and "spice" not in set(filled["metric"])
    for row in filled.to_dict("records"):
        same = effects[(effects["metric"] == row["metric"]) & (effects["domain"] == row["domain"])]
        [first] = same[(same["ranked_by"] == by) & (same["rank"] == 1) & ~same["shuffled"]]["value"]
        assert row["this run: first"].startswith(f"{first:.1f} [")


def test_the_papers_numbers_are_in_their_own_columns():
    table = paper_tables.beside(paper.TABLE_1, report.load("insight-1")[1], "clip").set_index(["metric", "domain"])
    assert table.loc[("cider", "out-domain"), ["paper: random", "paper: first"]].tolist() == [78.7, 88.8]


def test_a_shuffled_control_is_not_taken_for_the_ranking():
    row = dict(domain="all", metric="fid", ranked_by="text_clip", rank=1, n=9, low=0.0, high=9.0, seed=0)
    effects = pd.DataFrame([row | {"value": 1.0, "shuffled": True}, row | {"value": 2.0, "shuffled": False}])
    table = paper_tables.beside({"nocaps": {"fid": (5.0, 4.0)}}, effects, "text_clip")
    assert table["this run: first"].tolist() == ["2.0 [0.0, 9.0]"] and table["this run: random"].tolist() == [""]
