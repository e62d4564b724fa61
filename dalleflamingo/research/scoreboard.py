"""docs/scoreboard.md: the verdict on every claim, and the reason wherever the paper's claim is not what we find.

    python -m dalleflamingo research scoreboard

Verdicts and effects come from docs/results/claims.json. Reasons are prose, in scoreboard.toml.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.research import pages
from dalleflamingo.research.claims import RULE
from dalleflamingo.research.metrics import ranking_label
from dalleflamingo.research.ranking import ALL

_TEXTS = Path(__file__).with_name("scoreboard.toml")


def page(rows: Sequence[Mapping], texts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The parts of the page in Markdown.

    Args:
        rows: of claims.json.
        texts: number of a claim -> `says`, what the paper says, and `reason`, why we find something else.
    Raises:
        ValueError: a claim that does not hold everywhere has no reason, or one that does has one.
    """
    parts = [
        "# The paper's claims in the miniature",
        pages.measured_on("miniature/nocaps"),
        f"{RULE} [The protocol](protocol.md) says what each effect is.",
    ]
    header = ("claim", "ranked by", "effect", "", "n", "verdict")
    lines = [
        (
            f"[{row['claim']}](#claim-{row['claim']})",
            "" if row["ranked_by"] == ALL else ranking_label(row["ranked_by"]),
            row["what"],
            f"{row['effect']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]",
            f"{row['n']:,}",
            row["verdict"] if row["verdict"] == "holds" else f"**{row['verdict']}**",
        )
        for row in rows
    ]
    parts.append(pages.table(header, lines))
    for number, text in texts.items():
        verdicts = {row["verdict"] for row in rows if row["claim"] == int(number)}
        if (verdicts != {"holds"}) != ("reason" in text):
            found = ", ".join(sorted(verdicts)) or "not measured"
            has = "has" if "reason" in text else "lacks"
            raise ValueError(f"claim {number}: {found}; {_TEXTS.name} {has} a reason")
        parts += [f"## Claim {number}", f"*The paper:* {text['says']}", text.get("reason", "")]
    return parts


def main(arguments: list[str]) -> int:
    """Write docs/scoreboard.md from docs/results/claims.json: every verdict, and the reasons."""
    parser = command_parser("research scoreboard", main.__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="has results/claims.json; default: docs")
    options = parser.parse_args(arguments)
    rows = json.loads((options.docs / "results" / "claims.json").read_text(encoding="utf-8"))["claims"]
    texts = tomllib.loads(_TEXTS.read_text(encoding="utf-8"))
    pages.write_page(options.docs / "scoreboard.md", page(rows, texts))
    print(options.docs / "scoreboard.md")
    return 0
