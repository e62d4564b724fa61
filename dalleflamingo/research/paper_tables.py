"""The paper's Tables 1 and 2 with columns beside them that a run of the insights fills."""

from collections.abc import Mapping

import pandas as pd

from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.research import pages

ALL = "all"  # domains together


def beside(published: Mapping, effects: pd.DataFrame, ranked_by: str, ours: str = "nocaps") -> pd.DataFrame:
    """A row for each number of a table of the paper.

    Args:
        published: `paper.TABLE_1` or `TABLE_2`: data set -> metric -> (random, ranked first), of each domain or of all.
        effects: of an insight, as `report.load` gives them.
        ranked_by: the similarity that ranks.
        ours: the paper's data set that the run's data set is, or stands for; rows of others stay empty.
    Returns:
        data set, metric and domain; the paper's scores of a random candidate and of that ranked first; the run's, with
        95 % intervals, "" where it has none.
    """
    measured = effects[~effects["shuffled"] & ((effects["rank"] == 1) | (effects["ranked_by"] == "random"))]
    by_key = {(row["metric"], row["domain"], row["ranked_by"]): row for row in measured.to_dict("records")}
    rows = []
    for dataset, metrics in published.items():
        for metric, scores in metrics.items():
            for domain, pair in (scores if isinstance(scores, Mapping) else {ALL: scores}).items():
                found = [by_key.get((metric, domain, by)) for by in ("random", ranked_by) if dataset == ours]
                own = [pages.cell(Interval.from_row(one), 1) if one else "" for one in found] or ["", ""]
                rows.append([dataset, metric, domain, *pair, *own])
    columns = ["data set", "metric", "domain", "paper: random", "paper: first", "this run: random", "this run: first"]
    return pd.DataFrame(rows, columns=columns)
