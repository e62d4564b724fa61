"""The scoreboard: no verdict without its claim's text, and no claim that fails without a reason."""

import json
import tomllib

import pytest

from dalleflamingo.research import pages, scoreboard

ROW = {"claim": 5, "verdict": "holds", "ranked_by": "all", "what": "it falls", "effect": 0.8, "low": 0.6, "high": 0.9}
HOLDS = ROW | {"n": 1500}
FAILS = HOLDS | {"verdict": "undecided", "ranked_by": "dino", "effect": 0.1, "low": -0.1}


def test_every_row_stands_in_the_table_with_its_interval():
    parts = scoreboard.page([HOLDS, FAILS], {"5": {"says": "CIDEr falls.", "reason": "Too few images."}})
    text = "\n\n".join(parts)
    assert "| [5](#claim-5) |  | it falls | +0.8 [+0.6, +0.9] | 1,500 | holds |" in text
    assert "| [5](#claim-5) | DINO | it falls | +0.1 [-0.1, +0.9] | 1,500 | **undecided** |" in text
    assert text.index("## Claim 5") < text.index("CIDEr falls.") < text.index("Too few images.")


@pytest.mark.parametrize(
    ("rows", "text", "message"),
    [
        ([HOLDS, FAILS], {"says": "It falls."}, "claim 5: holds, undecided; scoreboard.toml lacks a reason"),
        ([FAILS], {"says": "It falls."}, "claim 5: undecided; scoreboard.toml lacks a reason"),
        ([HOLDS], {"says": "It falls.", "reason": "It does not."}, "claim 5: holds; scoreboard.toml has a reason"),
        ([], {"says": "It falls."}, "claim 5: not measured; scoreboard.toml lacks a reason"),
    ],
)
def test_a_reason_stands_where_the_claim_does_not_hold_and_only_there(rows, text, message):
    with pytest.raises(ValueError, match=message):
        scoreboard.page(rows, {"5": text})


def test_the_page_is_that_of_the_measured_claims(tmp_path):
    docs = pages.ROOT / "docs"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.json").write_bytes((docs / "results" / "claims.json").read_bytes())
    assert scoreboard.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "scoreboard.md").read_bytes() == (docs / "scoreboard.md").read_bytes()


def test_all_fourteen_claims_have_their_text():
    texts = tomllib.loads(scoreboard._TEXTS.read_text(encoding="utf-8"))
    assert list(texts) == [str(number) for number in range(1, 15)]
    measured = json.loads((pages.SHIPPED / "claims.json").read_text(encoding="utf-8"))["claims"]
    assert {str(row["claim"]) for row in measured} == texts.keys()
