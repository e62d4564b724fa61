"""What becomes of the insights when sampling changes: nucleus p (Table 6) and the number of candidates (Fig. 9).

    python -m dalleflamingo research studies      after `make reproduce` has measured both insights

And how many captions two vocabularies cut alike (App. G), of the miniature and, where a folder that DALLEFLAMINGO_COCO
names holds coco_karpathy_test_gt.json, of COCO with BLIP's and CLIP's own vocabularies.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner, Nucleus
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset, read_coco, read_results, write_results
from dalleflamingo.evaluation.caption_metrics import Cider
from dalleflamingo.intervals import Interval, derive_seed, paired_bootstraps
from dalleflamingo.reconstruct import load_captioner
from dalleflamingo.research import pages, report
from dalleflamingo.research.claims import Claim, scoreboard, verdict_line
from dalleflamingo.research.image_ranking import evaluate_images
from dalleflamingo.research.insights import RANKED, text_trips
from dalleflamingo.research.ranking import (
    ALL,
    LOWER,
    OF_CAPTIONS,
    OF_PICTURES,
    RESAMPLES,
    EvaluatedCandidates,
    contrast,
    evaluate_captions,
    first_of_any,
    gains,
    growth,
    of_columns,
    similarities,
)
from dalleflamingo.tokens import clip_tokenizer, pieces, same_tokens, wordpiece_tokenizer

NUCLEUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # Table 6
PAPER_TABLE_6 = (111.8, 111.2, 110.0, 107.2, 103.4, 96.2, 89.7, 83.1, 78.7, 69.2)  # NoCaps CIDEr × 100
NUMBERS = (1, 2, 3, 5, 7, 10, 15, 20, 25)  # of candidates, Fig. 9


def nucleus_sweep(dataset: Dataset, captioner: Captioner, folder: Path, ps: Sequence[float] = NUCLEUS) -> np.ndarray:
    """(len(ps), n) captions: one for each image and p, sampled with the same seed at every p.

    Kept as COCO results in `folder`, a file for each p; what is there is not sampled again.
    """
    swept = []
    for p in tqdm(ps, desc="nucleus p", unit="p"):
        path = folder / f"nucleus-{p}.json"
        if not path.exists():
            write_results(path, _sampled(dataset, captioner, p))
        there = read_results(path)
        swept.append([there[example.image_id] for example in dataset])
    return np.array(swept, dtype=object)


def _sampled(dataset: Dataset, captioner: Captioner, p: float) -> dict[int, str]:
    said = {}
    for start in range(0, len(dataset), 32):
        part = dataset[start : start + 32]
        seeds = [[derive_seed(0, example.image_id, 0)] for example in part]
        captions = captioner.sample([dataset.open(example) for example in part], seeds, Nucleus(p))
        said |= {example.image_id: caption for example, [caption] in zip(part, captions, strict=True)}
    return said


def cider_by_p(captions: np.ndarray, dataset: Dataset, ps: Sequence[float], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Table 6: columns p, value, low, high (CIDEr × 100 with its 95 % interval), n; and in `.attrs` "rho".

    Args:
        captions: (P, n) of `nucleus_sweep`.
    """
    ids = [example.image_id for example in dataset]
    table = Cider({e.image_id: list(e.references) for e in dataset}).table(ids * len(ps), list(captions.ravel()))
    picks = np.arange(captions.size).reshape(captions.shape)

    def statistics(indices: np.ndarray) -> np.ndarray:
        scores = 100 * table.corpus(picks[:, indices])
        return np.append(scores, spearmanr(ps, scores).statistic)

    *found, rho = paired_bootstraps(statistics, len(ids), resamples)
    columns = {name: [getattr(one, name) for one in found] for name in ("value", "low", "high", "n")}
    frame = pd.DataFrame({"p": ps} | columns)
    frame.attrs["rho"] = rho
    return frame


def claim_5(by_p: pd.DataFrame) -> list[Claim]:
    """CIDEr of sampled captions falls as p grows: Spearman's ρ over p, with its sign turned over."""
    rho: Interval = by_p.attrs["rho"]
    effect = Interval(-rho.value, -rho.high, -rho.low, rho.n, rho.seed)
    return [Claim(5, "CIDEr falls as p grows: −Spearman's ρ over ten values of p", ALL, effect, 3)]


def claim_7(judged: EvaluatedCandidates, grown: pd.DataFrame, resamples: int = RESAMPLES) -> list[Claim]:
    """The gain grows with the number of candidates: that of all K, and beside it how it goes on from 2 to 10 to K.

    Args:
        grown: of `picks.growth`, the largest of its numbers being K.
    """
    ranked_by, k = similarities(judged.table), judged.rows.shape[1]
    first = first_of_any(judged, "cider", (2, RANKED, k))
    steps = paired_bootstraps(lambda images: np.diff(first(images)).ravel(), len(judged.rows), resamples)
    text = f"the caption ranked first of {k} beats a random one: CIDEr × 100, overall"
    names = f"gain of any {RANKED} candidates − gain of any 2", f"gain of all {k} − gain of any {RANKED}"
    return [
        Claim(7, text, by, gains(grown, "cider", f"{by} of {k}")[ALL], 1, dict(zip(names, grows, strict=True)))
        for by, *grows in zip(ranked_by, steps[::2], steps[1::2], strict=True)
    ]


def compared(
    judged: EvaluatedCandidates, metrics: Sequence[str] = ("cider", "f1"), resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Which similarity ranks best: for each pair, the score of what one ranks first minus that of the other.

    Returns:
        columns metric, first, second, value, low, high, n; paired over images.
    """
    picks, rows = judged.picks(), []
    for metric in (name for name in metrics if name in judged.metrics):
        for first, second in combinations(similarities(judged.table), 2):
            better = contrast(judged, metric, [picks[f"{first} 1"]], [picks[f"{second} 1"]], resamples)
            interval = {name: getattr(better, name) for name in ("value", "low", "high", "n")}
            rows.append({"metric": metric, "first": first, "second": second} | interval)
    return pd.DataFrame(rows)


def claim_13(
    captions: Sequence[str], source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, dataset: str
) -> Claim:
    """More than 60 % of captions fall into the same pieces (App. G): the share minus 0.6."""
    share = same_tokens(pieces(source, captions), pieces(target, captions))
    effect = Interval(share.value - 0.6, share.low - 0.6, share.high - 0.6, share.n, share.seed)
    return Claim(13, f"captions of {dataset} that both cut into the same pieces: the share − 0.6", ALL, effect, 3,
                 dataset=dataset)  # fmt: skip


def _cut_alike() -> list[Claim]:
    """Claim 13 of the miniature's vocabularies, and of the real ones where COCO's captions are at hand."""
    test = registry.dataset("miniature/coco", "test")
    tokenizers = (
        AutoTokenizer.from_pretrained(registry.locate("miniature/blip")),
        AutoTokenizer.from_pretrained(Path(registry.locate("miniature/sd"), "tokenizer")),
    )
    found = [claim_13(_captions(test), *tokenizers, dataset=test.name)]
    file = Path(os.environ.get("DALLEFLAMINGO_COCO", ""), "coco_karpathy_test_gt.json")
    if file.is_file():
        real = read_coco(file, file.parent)
        found.append(claim_13(_captions(real), wordpiece_tokenizer(), clip_tokenizer(), dataset="coco/test"))
    return found


def _grown(judged: EvaluatedCandidates, metrics: Sequence[str]) -> pd.DataFrame:
    """`picks.growth` by the metrics that are means over images; BLEU is of a whole corpus."""
    numbers = [k for k in NUMBERS if k <= judged.rows.shape[1]]
    return growth(judged, numbers, [metric for metric in metrics if metric in judged.metrics and metric != "bleu4"])


def many_pictures(run_folder: Path, images: int = 200, pictures: int = 25) -> pd.DataFrame:
    """Insight II with more pictures of fewer captions, as `picks.growth`; a run that was interrupted goes on."""
    table, dataset, _, judges = text_trips(images, pictures, run_folder)
    return _grown(evaluate_images(table, dataset, run_folder, judges), OF_PICTURES)


def _captions(dataset: Dataset) -> list[str]:
    return [caption for example in dataset for caption in example.references]


def write(
    docs: Path,
    by_p: pd.DataFrame,
    grown: pd.DataFrame,
    pictures: pd.DataFrame,
    many: pd.DataFrame,
    pairs: pd.DataFrame,
    claims: Sequence[Claim],
    table: pd.DataFrame,
) -> None:
    """results/nucleus.csv, growth.csv, growth-many.csv, similarities.csv, studies.md, their claims; four figures.

    Args:
        by_p, pairs: of `cider_by_p` and `compared`. grown, pictures: of `picks.growth`, for Insight I and Insight II.
        many: of `many_pictures`.
        table: Insight I's, as `report.load` returns it.
    """
    folder, figures = docs / "results", docs / "figures"
    by_p.round(5).to_csv(folder / "nucleus.csv", index=False)
    pd.concat([grown, pictures]).round(5).to_csv(folder / "growth.csv", index=False)
    many.round(5).to_csv(folder / "growth-many.csv", index=False)
    pairs.round(5).to_csv(folder / "similarities.csv", index=False)
    show.write_png(nucleus_figure(by_p), figures / "nucleus.png")
    show.write_png(growth_figure(grown, "cider"), figures / "growth_cider.png")
    show.write_png(growth_figure(pictures, "clip_distance"), figures / "growth_clip_distance.png")
    show.write_png(growth_figure(many, "clip_distance"), figures / "growth_many.png")
    scoreboard(folder / "claims.json", claims, report.Settings.of(table))
    text = page(by_p, grown, pictures, many, pairs, claims, table.attrs)
    (folder / "studies.md").write_text(text, encoding="utf-8")


def nucleus_figure(by_p: pd.DataFrame) -> Figure:
    """Table 6 as a curve."""
    note = "The larger the nucleus, the more is left to chance: if claim 5 holds, the line falls. Bars: 95 % intervals."
    intervals = [Interval(row.value, row.low, row.high, row.n, 0) for row in by_p.itertuples()]
    return show.lines({"sampled": dict(zip(by_p["p"], intervals, strict=True))}, "CIDEr × 100", "nucleus p", note)


def growth_figure(grown: pd.DataFrame, metric: str) -> Figure:
    """Fig. 9: ranked first among any k, and at random."""
    rows = grown[grown["metric"] == metric]
    curves: dict[str, dict[int, Interval]] = {}
    for row in rows.itertuples():
        by, _, k = row.pick.split()
        curves.setdefault(by, {})[int(k)] = Interval(row.value, row.low, row.high, row.n, row.seed)
    of = "pictures k of each caption" if metric in OF_PICTURES else "captions k of each picture"
    note = f"If the gain grows with k, a ranked line rises away from the random one. Bars: 95 %, n = {rows.n.max()}."
    return show.lines(curves, report.METRICS[metric].label, of, note, lower=metric in LOWER)


def page(
    by_p: pd.DataFrame,
    grown: pd.DataFrame,
    pictures: pd.DataFrame,
    many: pd.DataFrame,
    pairs: pd.DataFrame,
    claims: Sequence[Claim],
    settings: dict,
) -> str:
    """The page in Markdown; arguments as of `write`."""
    sampled = [
        [f"{row.p}", f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]", str(paper)]
        for row, paper in zip(by_p.itertuples(), PAPER_TABLE_6, strict=True)
    ]
    beside = [
        f"* {what}, ranked by {show.LABELS[claim.ranked_by]}: {found}"
        for claim in claims
        for what, found in claim.apart.items()
    ]
    differences = []
    for row in pairs.itertuples():
        metric, found = report.METRICS[row.metric], Interval(row.value, row.low, row.high, row.n, 0)
        who = f"{show.LABELS[row.first]} − {show.LABELS[row.second]}"
        differences.append([metric.label, who, pages.cell(found, metric.digits, signed=True)])
    parts = [
        "# Sampling and vocabularies",
        f"{pages.measured_on(settings['dataset'])}; the paper's figures are of NoCaps and stand beside ours for "
        "their direction.",
        f"n = {by_p['n'].max()} images of {settings['dataset']}. Made by `python -m dalleflamingo research studies` at "
        f"commit `{pages.current_commit()}`, from the candidates of `{settings['command']}`.",
        "\n".join(map(verdict_line, claims)),
        "\n".join(beside),
        "## Nucleus p (Table 6)",
        "One caption an image, from the same seed at every p. CIDEr × 100, higher is better.",
        pages.table(["p", "CIDEr × 100", "the paper"], sampled),
        "![CIDEr at each p](../figures/nucleus.png)",
        "## Number of candidates (Fig. 9)",
        "The score of the candidate ranked first among any k, mean over all choices of k from those that were drawn; a "
        "random one's is the same whatever k. Captions, CIDEr × 100:",
        _growth_table(grown, "cider"),
        "![CIDEr against the number of candidates](../figures/growth_cider.png)",
        f"Pictures, {report.METRICS['clip_distance'].label}, lower is better, n = {pictures['n'].max()}:",
        _growth_table(pictures, "clip_distance"),
        "![CLIP distance against the number of pictures](../figures/growth_clip_distance.png)",
        f"More pictures of fewer captions, n = {many['n'].max()}:",
        _growth_table(many, "clip_distance"),
        "![CLIP distance against the number of pictures, up to 25](../figures/growth_many.png)",
        "## Which similarity ranks best",
        f"The score of the caption that one ranks first of {RANKED}, minus that of the caption that the other does.",
        pages.table(["", "", "difference"], differences),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _growth_table(grown: pd.DataFrame, metric: str) -> str:
    rows = grown[grown["metric"] == metric]
    cell = {row.pick: f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]" for row in rows.itertuples()}
    names, ks = (list(dict.fromkeys(part)) for part in zip(*(pick.split(" of ") for pick in cell), strict=True))
    body = [[k, *(cell[f"{name} of {k}"] for name in names)] for k in ks]
    return pages.table(["k", *(show.LABELS.get(name, name) for name in names)], body)


def main(arguments: list[str] | None = None) -> int:
    """Measure both studies on Insight I's run, and write tables, figures, a page and their claims into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research studies", description=main.__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--folder", type=Path, default=Path("build/runs/studies"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    profile = profiles.current()
    table, _ = report.load("insight-1", options.docs / "results")
    dataset = registry.dataset(profile.dataset)
    judged = evaluate_captions(table, dataset)
    dataset = dataset.only(set(table["image_id"]))
    swept = nucleus_sweep(dataset, load_captioner(profile, profile.captioner), options.folder)
    by_p = cider_by_p(swept, dataset, NUCLEUS)
    kept = of_columns(judged.table, ["wmd"]).metrics  # of the insight; word vectors are not loaded again
    grown = _grown(replace(judged, metrics=judged.metrics | kept), OF_CAPTIONS)
    drawn, _ = report.load("insight-2", options.docs / "results")
    pictures = _grown(of_columns(drawn, OF_PICTURES), OF_PICTURES)
    many = many_pictures(options.folder.parent / "insight-2-many")
    claims = claim_5(by_p) + claim_7(judged, grown) + _cut_alike()
    write(options.docs, by_p, grown, pictures, many, compared(judged.first(RANKED)), claims, table)
    for claim in claims:
        print(f"Claim {claim.number}, {claim.ranked_by}: {claim.verdict}; {claim.text}: {claim.effect}")
    return 0
