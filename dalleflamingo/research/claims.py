"""A claim of the paper, measured: an effect with its interval, hence a verdict; and the scoreboard that keeps them all.

The rule was declared before any run: a claim holds where the interval of its effect lies beyond 0 on the paper's side,
does not hold where it lies beyond 0 on the other, and is undecided else.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dalleflamingo.course import show
from dalleflamingo.intervals import Interval
from dalleflamingo.research.pages import cell, write_whole
from dalleflamingo.research.ranking import ALL


@dataclass(frozen=True)
class Claim:
    """A row of the scoreboard; `effect` is signed so that the paper's side is above 0.

    ranked_by: "all" where the effect is over every similarity. digits: of the effect. apart: reported beside it.
    dataset: where it is not the one that the scoreboard is told. seeds: of training, where models were trained.
    """

    number: int
    text: str
    ranked_by: str
    effect: Interval
    digits: int
    apart: Mapping[str, Interval] = field(default_factory=dict)
    dataset: str = ""
    seeds: Sequence[int] = ()

    @property
    def verdict(self) -> str:
        return verdict(self.effect)


def verdict(effect: Interval) -> str:
    """ "holds", "does not hold" or "undecided", by where the interval lies; one that touches 0 decides nothing."""
    if effect.low > 0:
        return "holds"
    return "does not hold" if effect.high < 0 else "undecided"


def weakest_of(effects: Mapping[str, Interval], one_unit: bool = True) -> str:
    """The name of the effect that decides where all must hold: by verdict first, then by value.

    Args:
        one_unit: the values compare as they are; else each is taken over the width of its interval.
    """
    order = ("does not hold", "undecided", "holds")

    def strength(name: str) -> tuple[int, float]:
        effect = effects[name]
        unit = 1.0 if one_unit else max(effect.high - effect.low, np.finfo(float).tiny)
        return order.index(verdict(effect)), effect.value / unit

    return min(effects, key=strength)


class Where(Protocol):
    """What the scoreboard says of a measurement, as `Settings` does."""

    profile: str
    dataset: str
    seed: int


def scoreboard(path: Path, claims: Sequence[Claim], settings: Where) -> None:
    """Put these claims in the place of those of the same numbers and data sets; others stay."""
    there = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.exists() else []
    new = {(claim.number, claim.dataset or settings.dataset) for claim in claims}
    rows = [row for row in there if (row["claim"], row["dataset"]) not in new]
    for claim in claims:
        rows.append(
            {
                "claim": claim.number,
                "verdict": claim.verdict,
                **_rounded(claim.effect),
                "seeds": list(claim.seeds or [settings.seed]),
                "profile": settings.profile,
                "dataset": claim.dataset or settings.dataset,
                "ranked_by": claim.ranked_by,
                "what": claim.text,
                "apart": {what: _rounded(found) for what, found in claim.apart.items()},
            }
        )
    rows.sort(key=lambda row: row["claim"])
    text = json.dumps({"claims": rows}, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _rounded(effect: Interval) -> dict[str, float]:
    bounds = {"effect": effect.value, "low": effect.low, "high": effect.high}
    return {name: round(value, 4) for name, value in bounds.items()} | {"n": effect.n}


def verdict_line(claim: Claim) -> str:
    """A claim as an item of a list in Markdown."""
    by = "" if claim.ranked_by == ALL else f", ranked by {show.LABELS[claim.ranked_by]}"
    text = f"{claim.text[0].upper()}{claim.text[1:]}"
    return f"* Claim {claim.number}{by}: **{claim.verdict}**. {text}: {cell(claim.effect, claim.digits, signed=True)}."
