"""Sampling and vocabularies: nucleus p (Table 6), number of candidates (Fig. 9), captions tokenized alike (App. G).

    python -m dalleflamingo research studies      after `make reproduce` has measured both insights

The vocabularies are the miniature's and, where a folder that DALLEFLAMINGO_COCO names holds
coco_karpathy_test_gt.json, BLIP's and CLIP's own on COCO.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import Nucleus
from dalleflamingo.evaluation.caption_results import read_results, write_results
from dalleflamingo.evaluation.intervals import Interval, paired_bootstraps
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.evaluation.vocabulary_report import caption_tokens, clip_tokenizer, same_tokens, wordpiece_tokenizer
from dalleflamingo.reconstruct import JourneySettings, text_image_text
from dalleflamingo.research import pages, paper, report
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.claims import Claim, print_claims, scoreboard, secondary_table, verdict_line
from dalleflamingo.research.growth import first_of_any, growth
from dalleflamingo.research.image_ranking import evaluate_images
from dalleflamingo.research.insights import RANKED, TextJourneyModels, negated
from dalleflamingo.research.metrics import METRICS, OF_CAPTIONS, OF_IMAGES, check_similarities, ranking_label
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import (
    ALL,
    RESAMPLES,
    EvaluatedCandidates,
    contrast,
    gains,
    of_columns,
    similarities,
)
from dalleflamingo.runs import derive_seed, write_whole
from dalleflamingo.sources import registered
from dalleflamingo.sources.annotations import read_coco

NUCLEUS = tuple(paper.TABLE_6)  # values of p
NUMBERS = (1, 2, 3, 5, 7, 10, 15, 20, 25)  # of candidates, Fig. 9
MORE = {"images": 200, "candidates": 25}  # more images of fewer captions


@dataclass(frozen=True)
class Studies:
    """What the studies measured.

    Attributes:
        by_p: of `cider_by_p`.
        captions: of `growth`, captions of each image.
        images: of `growth`, images of each caption.
        more_images: the same with more images of fewer captions.
        pairs: of `compare_similarities`.
        claims: that they decide.
        insight_1: how the captions were made.
    """

    by_p: pd.DataFrame
    captions: pd.DataFrame
    images: pd.DataFrame
    more_images: pd.DataFrame
    pairs: pd.DataFrame
    claims: Sequence[Claim]
    insight_1: Provenance


def nucleus_sweep(dataset: Dataset, captioner: Captioner, folder: Path, ps: Sequence[float] = NUCLEUS) -> np.ndarray:
    """(len(ps), n) captions: one for each image and p, sampled with the same seed at every p.

    Kept as COCO results in `folder`, a file for each p; what is there is not sampled again.

    Args:
        dataset: n images.
        captioner: that samples.
        folder: of the results.
        ps: values of p.
    """
    swept = []
    for p in tqdm(ps, desc="nucleus p", unit="p"):
        path = folder / f"nucleus-{p}.json"
        if not path.exists():
            write_results(path, _sampled(dataset, captioner, p))
        kept = read_results(path)
        swept.append([kept[example.image_id] for example in dataset])
    return np.array(swept, dtype=object)


def _sampled(dataset: Dataset, captioner: Captioner, p: float) -> dict[int, str]:
    sampled = {}
    for start in range(0, len(dataset), 32):
        part = dataset[start : start + 32]
        seeds = [[derive_seed(0, example.image_id, 0)] for example in part]
        captions = captioner.sample([dataset.open(example) for example in part], seeds, Nucleus(p))
        sampled |= {example.image_id: caption for example, [caption] in zip(part, captions, strict=True)}
    return sampled


def cider_by_p(captions: np.ndarray, dataset: Dataset, ps: Sequence[float], resamples: int = RESAMPLES) -> pd.DataFrame:
    """Table 6: CIDEr × 100 at each p.

    Args:
        captions: (P, n) of `nucleus_sweep`.
        dataset: n images with references.
        ps: the P values of p.
        resamples: of the bootstrap.
    Returns:
        columns p, and those of `Interval.as_row`; in `.attrs` "rho", Spearman's correlation of p and CIDEr.
    """
    ids = [example.image_id for example in dataset]
    table = Cider({e.image_id: list(e.references) for e in dataset}).table(ids * len(ps), list(captions.ravel()))
    selections = np.arange(captions.size).reshape(captions.shape)

    def statistics(indices: np.ndarray) -> np.ndarray:
        scores = 100 * table.corpus(selections[:, indices])
        return np.append(scores, spearmanr(ps, scores).statistic)

    recentred = [METRICS["cider"].biased] * len(ps) + [False]  # ρ is of ranks
    *found, rho = paired_bootstraps(statistics, len(ids), resamples, recentred=recentred)
    frame = pd.DataFrame([{"p": p} | one.as_row() for p, one in zip(ps, found, strict=True)])
    frame.attrs["rho"] = rho
    return frame


def claim_5(by_p: pd.DataFrame) -> list[Claim]:
    """CIDEr of sampled captions falls as p grows: Spearman's ρ over p, negated."""
    text = "CIDEr falls as p grows: −Spearman's ρ over ten values of p"
    return [Claim(5, text, ALL, negated(by_p.attrs["rho"]), 3)]


def claim_7(evaluated: EvaluatedCandidates, grown: pd.DataFrame, resamples: int = RESAMPLES) -> list[Claim]:
    """The gain grows with the number of candidates: that of all K; secondary, its growth from 2 to 10 and to K.

    Args:
        evaluated: Insight I's candidates.
        grown: of `growth`, the largest of its numbers being K.
        resamples: of the bootstrap.
    """
    ranked_by, k = similarities(evaluated.table), evaluated.k
    first = first_of_any(evaluated, "cider", (2, RANKED, k))
    recentred = 2 * len(ranked_by) * [METRICS["cider"].biased]
    steps = paired_bootstraps(
        lambda images: np.diff(first(images)).ravel(), len(evaluated.rows), resamples, recentred=recentred
    )
    text = f"the caption ranked first of {k} beats a random one: CIDEr × 100, overall"
    names = f"gain of any {RANKED} candidates − gain of any 2", f"gain of all {k} − gain of any {RANKED}"
    return [
        Claim(7, text, by, gains(grown, "cider", by, k=k)[ALL], 1, dict(zip(names, grows, strict=True)))
        for by, *grows in zip(ranked_by, steps[::2], steps[1::2], strict=True)
    ]


def compare_similarities(
    evaluated: EvaluatedCandidates, metrics: Sequence[str] = ("cider", "f1"), resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Which similarity ranks best: for each pair, the score of what one ranks first minus that of the other.

    Args:
        evaluated: the candidates.
        metrics: those that it has are compared.
        resamples: of the bootstrap.
    Returns:
        columns metric, first, second, and those of `Interval.as_row`; paired over images.
    """
    rows = []
    for metric in (name for name in metrics if name in evaluated.metrics):
        for first, second in combinations(similarities(evaluated.table), 2):
            plus, minus = evaluated.ranked_at(first), evaluated.ranked_at(second)
            better = contrast(evaluated, metric, [plus], [minus], resamples)
            rows.append({"metric": metric, "first": first, "second": second} | better.as_row())
    return pd.DataFrame(rows)


def claim_13(
    captions: Sequence[str], source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, dataset: str
) -> Claim:
    """More than 60 % of captions tokenize alike (App. G): the share minus 0.6.

    Args:
        captions: that both tokenize.
        source: the captioner's tokenizer.
        target: the generator's.
        dataset: whose captions they are.
    """
    share = same_tokens(caption_tokens(source, captions), caption_tokens(target, captions))
    value, low, high = (bound - paper.SHARE_TOKENIZED_ALIKE for bound in (share.value, share.low, share.high))
    text = f"captions of {dataset} that both tokenize alike: the share − {paper.SHARE_TOKENIZED_ALIKE}"
    return Claim(13, text, ALL, Interval(value, low, high, share.n, share.seed), 3, dataset=dataset)


def _tokenized_alike(profile: profiles.Profile) -> list[Claim]:
    """Claim 13 of the profile's vocabularies, and of the paper's where COCO's captions are at hand."""
    test = registered.load_dataset(profile.coco, "test")
    source = AutoTokenizer.from_pretrained(registry.locate(profile.captioner))
    target = AutoTokenizer.from_pretrained(registry.locate(profile.generator), subfolder="tokenizer")
    found = [claim_13(_captions(test), source, target, dataset=test.name)]
    try:
        file = registered.user_folder("coco") / "coco_karpathy_test_gt.json"
    except registry.RegistryError:  # the real vocabularies are compared only where the captions are
        return found
    if file.is_file():
        real = read_coco(file, file.parent)
        found.append(claim_13(_captions(real), wordpiece_tokenizer(), clip_tokenizer(), dataset="coco/test"))
    return found


def _grown(evaluated: EvaluatedCandidates, metrics: Sequence[str]) -> pd.DataFrame:
    """`growth` by the metrics that are means over images; BLEU is of a whole corpus."""
    numbers = [k for k in NUMBERS if k <= evaluated.k]
    means = [name for name in metrics if name in evaluated.metrics and not METRICS[name].of_counts]
    return growth(evaluated, numbers, means)


def more_images(
    dataset: Dataset, models: TextJourneyModels, settings: JourneySettings, run_folder: Path
) -> pd.DataFrame:
    """Insight II with more images of fewer captions, as `growth`; a run that was interrupted goes on.

    Args:
        dataset: the captions.
        models: of the journey and its evaluation.
        settings: of the journey.
        run_folder: of the journey.
    Raises:
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
    """
    *journey, evaluators = models
    check_similarities(models.similarities, "text")
    table = text_image_text(dataset, *journey, run_folder, settings)
    return _grown(evaluate_images(table, dataset, run_folder, evaluators), OF_IMAGES)


def _captions(dataset: Dataset) -> list[str]:
    return [caption for example in dataset for caption in example.references]


def write(docs: Path, studies: Studies) -> None:
    """results/nucleus.csv, growth.csv, growth-many.csv, similarities.csv, studies.md, their claims; four figures."""
    folder, figures, made = docs / "results", docs / "figures", studies.insight_1
    tables = {
        "nucleus": studies.by_p,
        "growth": pd.concat([studies.captions, studies.images]),
        "growth-many": studies.more_images,
        "similarities": studies.pairs,
    }
    for name, frame in tables.items():
        write_whole(folder / f"{name}.csv", lambda path, frame=frame: frame.round(5).to_csv(path, index=False))
    show.write_png(nucleus_figure(studies.by_p), figures / "nucleus.png")
    show.write_png(growth_figure(studies.captions, "cider"), figures / "growth_cider.png")
    show.write_png(growth_figure(studies.images, "clip_distance"), figures / "growth_clip_distance.png")
    show.write_png(growth_figure(studies.more_images, "clip_distance"), figures / "growth_many.png")
    scoreboard(folder / "claims.json", studies.claims, profile=made.profile, dataset=made.dataset, seed=made.seed)
    pages.write_page(folder / "studies.md", page(studies))


def nucleus_figure(by_p: pd.DataFrame) -> Figure:
    """Table 6 as a curve."""
    note = "The larger the nucleus, the more is left to chance: if claim 5 holds, the line falls. Bars: 95 % intervals."
    points = {row["p"]: Interval.from_row(row) for row in by_p.to_dict("records")}
    return show.lines({"sampled": points}, "CIDEr × 100", "nucleus p", note)


def growth_figure(grown: pd.DataFrame, metric: str) -> Figure:
    """Fig. 9: ranked first among any k, and at random.

    Args:
        grown: of `growth`.
        metric: one of its metrics.
    """
    of = "images k of each caption" if METRICS[metric].of == "image" else "captions k of each image"
    n = grown.loc[grown["metric"] == metric, "n"].max()
    note = f"If the gain grows with k, a ranked line rises away from the random one. Bars: 95 %, n = {n}."
    curves = {by: {int(k): point for k, point in points.items()} for by, points in _curves(grown, metric).items()}
    return show.lines(curves, METRICS[metric].label, of, note, lower=METRICS[metric].lower_is_better)


def _curves(grown: pd.DataFrame, metric: str) -> dict[str, dict[int, Interval]]:
    """ "random" or similarity -> k -> score, of a table of `growth`."""
    curves: dict[str, dict[int, Interval]] = {}
    for row in grown[grown["metric"] == metric].to_dict("records"):
        curves.setdefault(row["ranked_by"], {})[int(row["k"])] = Interval.from_row(row)
    return curves


def page(studies: Studies) -> list[str]:
    """The parts of the page in Markdown."""
    made, claims, distance = studies.insight_1, studies.claims, METRICS["clip_distance"].label
    sampled = [
        [str(row["p"]), pages.cell(Interval.from_row(row), 1), str(paper.TABLE_6[row["p"]])]
        for row in studies.by_p.to_dict("records")
    ]
    differences = []
    for row in studies.pairs.to_dict("records"):
        metric = METRICS[row["metric"]]
        pair = f"{ranking_label(row['first'])} − {ranking_label(row['second'])}"
        differences.append([metric.label, pair, pages.cell(Interval.from_row(row), metric.digits, signed=True)])
    return [
        "# Sampling and vocabularies",
        pages.measured_on(made.dataset, pages.BESIDE_THE_PAPER),
        f"n = {studies.by_p['n'].max()} images of {made.dataset}, from the candidates of `{made.command}`. "
        + pages.made_by("python -m dalleflamingo research studies", pages.current_commit()),
        "\n".join(map(verdict_line, claims)),
        secondary_table(claims),
        "## Nucleus p (Table 6)",
        "One caption an image, from the same seed at every p. CIDEr × 100, higher is better.",
        pages.table(["p", "CIDEr × 100", "the paper, NoCaps"], sampled),
        "![CIDEr at each p](../figures/nucleus.png)",
        "## Number of candidates (Fig. 9)",
        "The score of the candidate ranked first among any k, mean over all choices of k from those that were made; a "
        "random one's is the same whatever k. Captions, CIDEr × 100:",
        _growth_table(studies.captions, "cider"),
        "![CIDEr against the number of candidates](../figures/growth_cider.png)",
        f"Images, {distance}, lower is better, n = {studies.images['n'].max()}:",
        _growth_table(studies.images, "clip_distance"),
        "![CLIP distance against the number of images](../figures/growth_clip_distance.png)",
        f"More images of fewer captions, n = {studies.more_images['n'].max()}:",
        _growth_table(studies.more_images, "clip_distance"),
        "![CLIP distance against the number of images, up to 25](../figures/growth_many.png)",
        "## Which similarity ranks best",
        f"The score of the caption that one ranks first of {RANKED}, minus that of the caption that the other does.",
        pages.table(["", "", "difference"], differences),
    ]


def _growth_table(grown: pd.DataFrame, metric: str) -> str:
    curves = _curves(grown, metric)
    body = [[str(k), *(pages.cell(points[k], 1) for points in curves.values())] for k in curves["random"]]
    return pages.table(["k", *(ranking_label(name) for name in curves)], body)


def main(arguments: list[str]) -> int:
    """Nucleus p, number of candidates, vocabularies (claims 5, 7 and 13).

    Sample captions at ten values of p, rank any k of Insight I's and Insight II's candidates, generate more images of
    fewer captions, and count the captions that two tokenizers split alike. Both insights must be measured before.
    """
    options = parse(study_parser("studies", main.__doc__), arguments)
    studies = measure_studies(options.docs, options.runs)
    write(options.docs, studies)
    print_claims(studies.claims)
    return 0


def measure_studies(docs: Path, runs: Path) -> Studies:
    """All studies with the current profile's models, resumed.

    Args:
        docs: with the measured insights.
        runs: the folder of run folders.
    Raises:
        FileNotFoundError: an insight is not measured there.
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
    """
    profile = profiles.current()
    table, _ = report.load("insight-1", docs / "results")
    of_images, _ = report.load("insight-2", docs / "results")
    everything = registered.load_dataset(profile.dataset)
    models = TextJourneyModels.load(profile, everything)
    check_similarities(models.similarities, "text")
    evaluated = evaluate_captions(table, everything)
    dataset = everything.filter(set(table["image_id"]))
    swept = nucleus_sweep(dataset, models.captioner, runs / "studies")
    by_p = cider_by_p(swept, dataset, NUCLEUS)
    # of the insight; word vectors and text encoders are not loaded again
    kept = of_columns(evaluated.table, [name for name in ("wmd", "clip_text", "sbert") if name in table]).metrics
    captions = _grown(replace(evaluated, metrics=evaluated.metrics | kept), OF_CAPTIONS)
    return Studies(
        by_p=by_p,
        captions=captions,
        images=_grown(of_columns(of_images, OF_IMAGES), OF_IMAGES),
        more_images=more_images(
            everything.subset(MORE["images"]),
            models,
            JourneySettings.of(profile, candidates=MORE["candidates"]),
            runs / "insight-2-many",
        ),
        pairs=compare_similarities(evaluated.limit(RANKED)),
        claims=claim_5(by_p) + claim_7(evaluated, captions) + _tokenized_alike(profile),
        insight_1=Provenance.from_attrs(table.attrs),
    )
