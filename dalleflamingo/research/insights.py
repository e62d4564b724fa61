"""Insights I and II, measured: claims 1 to 4, each a function of the measurements -> effects with their intervals.

Insight I decides claims 1 and 2: the caption whose image comes back best is the better one (Fig. 3, Table 1). Insight
II decides claims 3 and 4: the image whose text comes back best is the better one (Fig. 4, Table 2).

    python -m dalleflamingo research insight-1 --images 500 --candidates 25
    python -m dalleflamingo research insight-2 --images 500 --candidates 10
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.commands.parsers import positive
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import PAPER_SAMPLING
from dalleflamingo.evaluation.caption_results import describe_dataset, read_results, write_results
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import RESAMPLES as RESAMPLES_OF_IMAGES
from dalleflamingo.evaluation.intervals import Interval, mean_interval, within_group_spearman
from dalleflamingo.evaluation.similarities import Fidelity, load_text_similarities
from dalleflamingo.evaluation.text_encoders import ClipText, Sbert
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import JourneySettings, image_text_image, text_image_text
from dalleflamingo.research import baselines, report
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.claims import Claim, print_claims, weakest_of
from dalleflamingo.research.image_ranking import ImageEvaluators, evaluate_images
from dalleflamingo.research.metrics import (
    EMBEDDINGS,
    METRICS,
    OF_IMAGES,
    OVERLAPS,
    PRIMARY,
    SECONDARY,
    check_similarities,
    pairs_of_claim,
    ranking_label,
)
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.pages import current_commit
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import (
    ALL,
    BASELINES,
    RESAMPLES,
    EvaluatedCandidates,
    correlate,
    gain_of_chance,
    gains,
    measure,
    similarities,
)
from dalleflamingo.similarity import Encoder, Similarity
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_models

_OUT = "out-domain"
RANKED = 10  # candidates, as in the paper; more are made for Fig. 9, and these are the first ten of them
RESCORED = "; scored again at commit "  # in a provenance, behind the commit that made the candidates
TABLE_2 = ("clip_distance", "fid", "is")  # the columns of the paper's Table 2


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def claim_1(correlations: pd.DataFrame) -> list[Claim]:
    """Better reconstruction goes with better captions: ρ within an image, mean over the primary pairs.

    The pairs are those of `metrics.pairs_of_claim`; where some could not be measured, the claim says of how many it is.
    """
    of = {part: _pairs_measured(correlations, part) for part in (PRIMARY, SECONDARY)}
    text = f"better reconstruction goes with better captions: Spearman's ρ within an image, mean over {of[PRIMARY]}"
    others = _mean_rho(correlations, SECONDARY)
    secondary = {f"ρ, mean over {of[SECONDARY]}": others} if others else {}
    return [Claim(1, text, ALL, _mean_rho(correlations), 3, secondary)]


def _pairs_measured(correlations: pd.DataFrame, part: str) -> str:
    """The pairs of claim 1 that a mean is over, in words: "the 12 primary pairs", "9 of the 12 primary pairs"."""
    measured = int(((correlations["part"] == part) & (correlations["metric"] != ALL)).sum())
    declared = sum(pair.part == part for pair in pairs_of_claim("caption"))
    return f"{'' if measured == declared else f'{measured} of '}the {declared} {part} pairs"


def claim_2(effects: pd.DataFrame) -> list[Claim]:
    """Ranked beats random: the overall gain in CIDEr × 100, by each similarity, as the paper names none for Table 1."""
    text = "the caption ranked first beats a random one: CIDEr × 100, overall"
    claims = []
    for by in similarities(effects):
        secondary = {
            f"CIDEr × 100, out of domain − {domain.replace('-domain', ' domain')}": difference
            for domain, difference in most_out_of_domain(effects, "cider", by).items()
        }
        claims.append(Claim(2, text, by, gains(effects, "cider", by)[ALL], 1, secondary))
    return claims


def claim_3(table: pd.DataFrame, correlations: pd.DataFrame) -> list[Claim]:
    """Better text recovery goes with better images; secondary: embeddings rank better than overlap of words.

    Args:
        table: evaluated candidates of Insight II.
        correlations: of `ranking.correlate`.
    """
    text = "better text recovery goes with better images: Spearman's ρ within a caption, mean over all pairs"
    embeddings, overlaps = ([by for by in family if by in table] for family in (EMBEDDINGS, OVERLAPS))
    secondary = {}
    if embeddings and overlaps:
        ours, theirs = (", ".join(ranking_label(by) for by in family) for family in (embeddings, overlaps))
        what = f"ρ by embeddings ({ours.replace('CLIP text', 'CLIP')}) − by overlap of words ({theirs})"
        secondary[what] = _difference_of_rho(table, embeddings, overlaps)
    return [Claim(3, text, ALL, _mean_rho(correlations), 3, secondary)]


def claim_4(effects: pd.DataFrame) -> list[Claim]:
    """Ranked beats random on all of CLIP distance, FID and IS (Table 2): the weakest effect decides."""
    found = []
    for by in similarities(effects):
        signed = {metric: gains(effects, metric, by)[ALL] for metric in TABLE_2}
        signed |= {metric: negated(gain) for metric, gain in signed.items() if METRICS[metric].lower_is_better}
        weakest = weakest_of(signed, one_unit=False)
        metric = METRICS[weakest]
        text = f"the image ranked first beats a random one on CLIP distance, FID, IS; the weakest is {metric.label}"
        secondary = {METRICS[name].label: effect for name, effect in signed.items() if name != weakest}
        found.append(Claim(4, text, by, signed[weakest], metric.digits, secondary))
    return found


def _mean_rho(correlations: pd.DataFrame, part: str = PRIMARY) -> Interval | None:
    """The mean over the pairs of a part; None where it has none."""
    rows = correlations[(correlations["metric"] == ALL) & (correlations["part"] == part)].to_dict("records")
    return Interval(*(rows[0][name] for name in ("rho", "low", "high", "n")), 0) if rows else None


def _difference_of_rho(table: pd.DataFrame, ours: Sequence[str], theirs: Sequence[str]) -> Interval:
    """Mean ρ by some similarities minus that by others, paired over images."""
    means = []
    for family in (ours, theirs):
        rhos = [-within_group_spearman(table, "image_id", by, metric) for by in family for metric in OF_IMAGES]
        means.append(pd.concat(rhos, axis=1).mean(axis=1))
    return mean_interval((means[0] - means[1]).dropna().to_numpy())


def negated(effect: Interval) -> Interval:
    """−effect."""
    return Interval(-effect.value, -effect.high, -effect.low, effect.n, effect.seed)


def most_out_of_domain(effects: pd.DataFrame, metric: str, by: str) -> dict[str, Interval]:
    """Claim 2's second half: the gain out of domain minus the gain in each other domain.

    The domains share no image, so their two gains are independent.

    Args:
        effects: a table of effects.
        metric: one of its metrics.
        by: a similarity.
    Returns:
        domain -> difference; nothing where no image is out of domain.
    """
    by_domain = gains(effects, metric, by)
    if _OUT not in by_domain:
        return {}
    out = by_domain[_OUT]
    return {name: difference(out, other) for name, other in by_domain.items() if name not in (ALL, _OUT)}


def difference(a: Interval, b: Interval) -> Interval:
    """a − b of two independent effects, its interval from theirs (Zou and Donner 2008)."""
    value = a.value - b.value
    below, above = np.hypot(a.value - a.low, b.high - b.value), np.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, float(value - below), float(value + above), a.n + b.n, a.seed)


# ── measurements ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ImageJourneyModels(NamedTuple):
    """What Insight I needs: the journey's models, CLIP's encoders for a baseline, and what scores captions.

    CLIP's text encoder and SBERT compare them with the human ones, `vectors` are for WMD; None leaves that metric out.
    """

    captioner: Captioner
    generator: Generator
    similarities: Sequence[Similarity]
    clip_image: Encoder
    clip_text: Encoder
    vectors: WordVectors | None
    sbert: Encoder | None = None

    @classmethod
    def load(cls, profile: Profile) -> "ImageJourneyModels":
        """The profile's; errors as `registry.locate`."""
        captioner, generator, encoders = load_models(profile)
        [clip] = (one for one in encoders if one.name == "clip")
        fidelity = Fidelity(FeatureExtractor.from_registry(profile.inception, profile.device))
        encoders = [*encoders, fidelity]
        return cls(captioner, generator, encoders, clip, *text_models(profile))


def text_models(profile: Profile) -> tuple[Encoder, WordVectors, Encoder]:
    """What scores captions against human ones: CLIP's text encoder, word vectors, SBERT; errors as `registry.locate`.

    Args:
        profile: names CLIP and the device.
    """
    clip_text = ClipText.from_pretrained(**registry.source_of(profile.clip, profile.device))
    return clip_text, WordVectors.at_hand(), Sbert.from_pretrained(**registry.source_of("sbert", profile.device))


class TextJourneyModels(NamedTuple):
    """What Insight II needs: the journey's models, and those that evaluate its images."""

    captioner: Captioner
    generator: Generator
    similarities: Sequence[Similarity]
    evaluators: ImageEvaluators

    @classmethod
    def load(cls, profile: Profile, dataset: Dataset) -> "TextJourneyModels":
        """The profile's; errors as `registry.locate`.

        Args:
            profile: names the models.
            dataset: the whole data set, whose captions say how rare an n-gram is.
        """
        captioner, generator, similarities = load_models(profile)
        encoders = {one.name: one for one in similarities}
        texts = load_text_similarities(profile, {example.image_id: example.references for example in dataset})
        return cls(captioner, generator, texts, ImageEvaluators.of(profile, encoders["clip"], encoders["dino"]))


def insight_1(
    dataset: Dataset,
    models: ImageJourneyModels,
    settings: JourneySettings,
    run_folder: Path,
    command: str,
    resamples: int = RESAMPLES,
) -> report.Insight:
    """Image → text → image, measured.

    A run that was interrupted goes on in its run folder; captions by beam search are kept there, too.

    Args:
        dataset: n images.
        models: of the journey and its evaluation.
        settings: of the journey.
        run_folder: of the journey.
        command: that is recorded.
        resamples: of the bootstrap.
    Raises:
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
    """
    check_similarities(models.similarities, "image")
    captioner, generator, encoders, clip_image, clip_text, vectors, sbert = models
    table = image_text_image(dataset, captioner, generator, encoders, run_folder, settings)
    beam = _beam_captions(lambda: captioner, dataset, table, run_folder / "beam.json")
    few = baselines.add(table[table["candidate"] < RANKED], dataset, captioner, clip_image, clip_text)
    table = table.assign(**{name: few[name] for name in BASELINES})  # NaN behind the candidates that are ranked
    evaluated = evaluate_captions(table, dataset, beam, vectors, _text_encoders(clip_text, sbert)).limit(RANKED)
    provenance = Provenance.of(
        command,
        dataset,
        generator,
        settings,
        ranked=evaluated.k,
        sampling=repr(PAPER_SAMPLING),
        tokenizer=evaluated.tokenizer,
        features=vectors.name if vectors else "",
        resamples=resamples,
    )
    return _measured("insight-1", evaluated, provenance, _claims_1_and_2)


def rescore_insight_1(
    table: pd.DataFrame, everything: Dataset, profile: Profile, run_folder: Path, resamples: int = RESAMPLES
) -> report.Insight:
    """Insight I's candidates, scored by the metrics of today; nothing is generated but missing captions by beam search.

    Args:
        table: of the measured insight, as `report.load` reads it: its similarities and baselines stay.
        everything: the data set that it was measured on.
        profile: names the text encoders and the captioner.
        run_folder: of the journey, where captions by beam search are kept.
        resamples: of the bootstrap.
    Raises:
        ValueError: the profile is not that of the table.
    """
    made = Provenance.from_attrs(table.attrs)
    if made.profile != profile.name:
        raise ValueError(
            f"the candidates were made under the profile {made.profile}, the current one is {profile.name}: "
            f"set DALLEFLAMINGO_PROFILE={made.profile}"
        )
    dataset = everything.filter(set(table["image_id"]))
    beam = _beam_captions(lambda: load_captioner(profile), dataset, table, run_folder / "beam.json")
    clip_text, vectors, sbert = text_models(profile)
    evaluated = evaluate_captions(table, dataset, beam, vectors, _text_encoders(clip_text, sbert)).limit(made.ranked)
    commit = f"{made.commit.partition(RESCORED)[0]}{RESCORED}{current_commit()}"
    scored = {"commit": commit, "tokenizer": evaluated.tokenizer, "features": vectors.name, "resamples": resamples}
    return _measured("insight-1", evaluated, replace(made, **scored), _claims_1_and_2)


def _text_encoders(clip_text: Encoder, sbert: Encoder | None) -> dict[str, Encoder]:
    """By the metrics that they make."""
    return {"clip_text": clip_text} | ({"sbert": sbert} if sbert else {})


def _claims_1_and_2(effects: pd.DataFrame, correlations: pd.DataFrame) -> list[Claim]:
    return [*claim_1(correlations), *claim_2(effects)]


def insight_2(
    dataset: Dataset,
    models: TextJourneyModels,
    settings: JourneySettings,
    run_folder: Path,
    command: str,
    resamples: int = RESAMPLES_OF_IMAGES,
) -> report.Insight:
    """Text → image → text, measured; arguments and errors as `insight_1`.

    Raises:
        ValueError: a domain has a single image, of which no FID can be computed; nothing was generated.
    """
    check_similarities(models.similarities, "text")
    if alone := [name for name, part in dataset.by_domain().items() if len(part) < 2]:
        raise ValueError(
            f"{len(dataset)} images hold a single one of {', '.join(alone)}, and FID is a distance of sets: "
            "take more images (--images)"
        )
    captioner, generator, texts, evaluators = models
    table = text_image_text(dataset, captioner, generator, texts, run_folder, settings)
    evaluated = evaluate_images(table, dataset, run_folder, evaluators)
    provenance = Provenance.of(
        command,
        dataset,
        generator,
        settings,
        ranked=evaluated.k,
        sampling="beam search",
        features=evaluators.inception.name,
        resamples=resamples,
    )

    def claims(effects: pd.DataFrame, correlations: pd.DataFrame) -> list[Claim]:
        return [*claim_3(evaluated.ranked, correlations), *claim_4(effects)]

    return _measured("insight-2", evaluated, provenance, claims)


def _measured(
    name: str,
    evaluated: EvaluatedCandidates,
    provenance: Provenance,
    claims: Callable[[pd.DataFrame, pd.DataFrame], list[Claim]],
) -> report.Insight:
    effects, correlations = measure(evaluated, resamples=provenance.resamples), correlate(evaluated.ranked)
    chance = {by: {m: gain_of_chance(evaluated, by, m) for m in evaluated.metrics} for by in similarities(effects)}
    decided = claims(effects, correlations)
    return report.Insight(name, evaluated.table, effects, correlations, decided, chance, provenance)


def _beam_captions(
    captioner: Callable[[], Captioner], dataset: Dataset, table: pd.DataFrame, path: Path
) -> dict[int, str]:
    """Image id -> caption by beam search, kept as COCO results; the captioner is loaded where they are not."""
    ids = set(table["image_id"])
    if path.exists() and ids <= (kept := read_results(path)).keys():
        return kept
    beam = describe_dataset(captioner(), dataset.filter(ids))
    write_results(path, beam)
    return beam


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def main_1(arguments: list[str]) -> int:
    """Insight I (claims 1 and 2).

    Caption every image K times, generate an image from every caption, and compare the captions with human ones: is the
    caption ranked first by the image that comes back the better one?
    """
    options, settings, command = _options("insight-1", main_1.__doc__, arguments)

    def measured(dataset: Dataset) -> report.Insight:
        if options.rescore:
            table, _ = report.load("insight-1", options.docs / "results")
            return rescore_insight_1(table, dataset, profiles.current(), options.runs / "insight-1")
        models = ImageJourneyModels.load(profiles.current())
        return insight_1(dataset.subset(options.images), models, settings, options.runs / "insight-1", command)

    return _write("insight-1", measured, options.docs)


def main_2(arguments: list[str]) -> int:
    """Insight II (claims 3 and 4).

    Generate N images from every caption, describe every image, and compare the images with the real one: is the image
    ranked first by the text that comes back the better one?
    """
    options, settings, command = _options("insight-2", main_2.__doc__, arguments)

    def measured(dataset: Dataset) -> report.Insight:
        models = TextJourneyModels.load(profiles.current(), dataset)
        return insight_2(dataset.subset(options.images), models, settings, options.runs / "insight-2", command)

    return _write("insight-2", measured, options.docs)


def _options(name: str, about: str, arguments: list[str]) -> tuple[argparse.Namespace, JourneySettings, str]:
    """The options of a command line, the settings of the journey, and the command that gives the same numbers again."""
    parser = study_parser(name, about)
    parser.add_argument("--images", type=positive, default=200, help="how many images of the data set; default: 200")
    parser.add_argument(
        "--candidates", type=positive, default=RANKED, help=f"of each image; default: {RANKED}, as in the paper"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and noise; default: 0")
    if name == "insight-1":
        parser.add_argument(
            "--rescore",
            action="store_true",
            help="score the captions of results/insight-1.parquet again, with the metrics of today; generate nothing",
        )
    options = parse(parser, arguments)
    if getattr(options, "rescore", False) and (options.images, options.candidates, options.seed) != (200, RANKED, 0):
        parser.error("--rescore scores the captions that are there: leave --images, --candidates and --seed out")
    settings = JourneySettings.of(profiles.current(), candidates=options.candidates, seed=options.seed)
    command = f"{parser.prog} --images {options.images} --candidates {options.candidates}"
    return options, settings, command + (f" --seed {options.seed}" if options.seed else "")


def _write(name: str, measured: Callable[[Dataset], report.Insight], docs: Path) -> int:
    began = time.monotonic()
    insight = measured(registered.load_dataset(profiles.current().dataset))
    report.write(docs, insight)
    print_claims(insight.claims)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    seconds = time.monotonic() - began
    print(f"{docs}/results/{name}.md and its table, figures and claims in {seconds:.0f} s, {peak:.1f} GiB.")
    return 0
