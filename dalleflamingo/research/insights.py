"""The paper's claims, numbered: each a function of what was measured -> an effect with its interval, hence a verdict.

Insight I decides claims 1 and 2, the caption whose picture comes back best is the better one (Fig. 3, Table 1); Insight
II decides claims 3 and 4, the picture whose text comes back best is the better one (Fig. 4, Table 2).

    python -m dalleflamingo research insight insight-1 --images 500 --candidates 10
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import PAPER, Captioner, describe
from dalleflamingo.datasets import Dataset, read_results, write_results
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import RESAMPLES as RESAMPLES_OF_PICTURES
from dalleflamingo.evaluation.similarities import Fidelity, load_text_similarities
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import Interval, mean_interval, within_group_spearman
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.reconstruct import image_text_image, load_models, source_of, text_image_text
from dalleflamingo.research import baselines, report
from dalleflamingo.research.claims import Claim, weakest_of
from dalleflamingo.research.image_ranking import Judges, evaluate_images
from dalleflamingo.research.ranking import (
    ALL,
    BASELINES,
    LOWER,
    OF_PICTURES,
    RESAMPLES,
    EvaluatedCandidates,
    correlate,
    evaluate_captions,
    gains,
    measure,
    shuffle,
    similarities,
)
from dalleflamingo.similarity import ClipText

_OUT = "out-domain"
RANKED = 10  # candidates, as in the paper; more are drawn for Fig. 9, whose first ten they are
TABLE_2 = ("clip_distance", "fid", "is")  # the columns of the paper's Table 2
EMBEDDINGS, OVERLAPS = ("text_clip", "text_sbert"), ("text_cider", "text_wmd")


def claim_1(correlations: pd.DataFrame) -> list[Claim]:
    """Better reconstruction goes with better captions: ρ within an image, mean over similarities and metrics."""
    text = "better reconstruction goes with better captions: Spearman's ρ within an image, mean over all pairs"
    return [Claim(1, text, ALL, _mean_rho(correlations), 3)]


def claim_2(effects: pd.DataFrame) -> list[Claim]:
    """Ranked beats random: the overall gain in CIDEr × 100, by each similarity, as the paper names none for Table 1."""
    text = "the caption ranked first beats a random one: CIDEr × 100, overall"
    claims = []
    for by in similarities(effects):
        apart = {
            f"CIDEr × 100, out of domain − {domain.replace('-domain', ' domain')}": difference
            for domain, difference in most_out_of_domain(effects, "cider", by).items()
        }
        claims.append(Claim(2, text, by, gains(effects, "cider", by)[ALL], 1, apart))
    return claims


def claim_3(table: pd.DataFrame, correlations: pd.DataFrame) -> list[Claim]:
    """Better text recovery goes with better pictures; and embeddings rank better than overlap of words."""
    text = "better text recovery goes with better pictures: Spearman's ρ within a caption, mean over all pairs"
    apart = {"ρ by embeddings (CLIP, SBERT) − by overlap of words (CIDEr, WMD)": _embeddings_minus_overlap(table)}
    return [Claim(3, text, ALL, _mean_rho(correlations), 3, apart)]


def claim_4(effects: pd.DataFrame) -> list[Claim]:
    """Ranked beats random on all of CLIP distance, FID and IS (Table 2): the verdict is that of the weakest of them."""
    found = []
    for by in similarities(effects):
        signed = {metric: gains(effects, metric, by)[ALL] for metric in TABLE_2}
        signed |= {metric: _negated(gain) for metric, gain in signed.items() if metric in LOWER}
        weakest = weakest_of(signed, one_unit=False)
        metric = report.METRICS[weakest]
        text = f"the picture ranked first beats a random one on CLIP distance, FID, IS; the weakest is {metric.label}"
        apart = {report.METRICS[name].label: effect for name, effect in signed.items() if name != weakest}
        found.append(Claim(4, text, by, signed[weakest], metric.digits, apart))
    return found


def _mean_rho(correlations: pd.DataFrame) -> Interval:
    row = correlations[correlations["metric"] == ALL].iloc[0]
    return Interval(row["rho"], row["low"], row["high"], int(row["n"]), 0)


def _embeddings_minus_overlap(table: pd.DataFrame) -> Interval:
    """Difference of the mean ρ, paired over images."""
    means = []
    for family in (EMBEDDINGS, OVERLAPS):
        rhos = [-within_group_spearman(table, "image_id", by, metric) for by in family for metric in OF_PICTURES]
        means.append(pd.concat(rhos, axis=1).mean(axis=1))
    return mean_interval((means[0] - means[1]).dropna().to_numpy())


def _negated(effect: Interval) -> Interval:
    return Interval(-effect.value, -effect.high, -effect.low, effect.n, effect.seed)


def most_out_of_domain(effects: pd.DataFrame, metric: str, by: str) -> dict[str, Interval]:
    """Claim 2's second half, reported apart: the gain out of domain minus the gain in each other domain.

    The domains share no image, so their two gains are independent.
    """
    by_domain = gains(effects, metric, by)
    if _OUT not in by_domain:
        return {}
    out = by_domain[_OUT]
    return {name: difference(out, other) for name, other in by_domain.items() if name not in (ALL, _OUT)}


def difference(a: Interval, b: Interval) -> Interval:
    """a − b of two independent figures, its interval from theirs (Zou and Donner 2008)."""
    value = a.value - b.value
    below, above = np.hypot(a.value - a.low, b.high - b.value), np.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, float(value - below), float(value + above), a.n + b.n, a.seed)


def insight_1(images: int, candidates: int, run_folder: Path, command: str) -> report.Insight:
    """Image → text → image with the current profile's models, measured.

    A run that was interrupted goes on in its run folder; captions by beam search are kept there too.
    """
    profile = profiles.current()
    dataset, vectors = registry.dataset(profile.dataset).subset(images), WordVectors.at_hand()
    captioner, generator, encoders = load_models(profile)
    fidelity = Fidelity(FeatureExtractor.of(profile.inception, profile.device))
    table = image_text_image(
        dataset, captioner, generator, [*encoders, fidelity], run_folder,
        **_size(profile, candidates), strategy=PAPER,
    )  # fmt: skip
    beam = _described(captioner, dataset, table, run_folder / "beam.json")
    clip_text = ClipText.from_pretrained(**source_of(profile, profile.clip))
    few = baselines.add(table[table["candidate"] < RANKED], dataset, captioner, encoders[0], clip_text)
    table = table.assign(**{name: few[name] for name in BASELINES})  # NaN behind the candidates that are ranked
    judged = evaluate_captions(table, dataset, beam, vectors).first(RANKED)
    settings = _settings(profile, dataset, generator, judged, candidates, command, RESAMPLES, vectors.name)
    return _measured("insight-1", judged, settings, lambda effects, rho: [*claim_1(rho), *claim_2(effects)])


def text_trips(images: int, candidates: int, run_folder: Path) -> tuple[pd.DataFrame, Dataset, Generator, Judges]:
    """Text → image → text with the current profile's models, going on where it was; and who judges its pictures."""
    profile = profiles.current()
    everything = registry.dataset(profile.dataset)
    dataset = everything.subset(images)
    captioner, generator, (clip, dino) = load_models(profile)
    corpus = {example.image_id: example.references for example in everything}
    table = text_image_text(
        dataset, captioner, generator, load_text_similarities(profile, corpus), run_folder, **_size(profile, candidates)
    )
    inception = FeatureExtractor.of(profile.inception, profile.device)
    judge = Recogniser.from_pretrained(registry.locate("miniature/recogniser")) if _drawn(dataset) else None
    return table, dataset, generator, Judges(clip, dino, inception, judge)


def insight_2(images: int, candidates: int, run_folder: Path, command: str) -> report.Insight:
    """Text → image → text with the current profile's models, measured; it goes on as `insight_1` does."""
    table, dataset, generator, judges = text_trips(images, candidates, run_folder)
    judged = evaluate_images(table, dataset, run_folder, judges)
    profile, resamples = profiles.current(), RESAMPLES_OF_PICTURES
    settings = _settings(profile, dataset, generator, judged, candidates, command, resamples, judges.inception.name)

    def claims(effects: pd.DataFrame, correlations: pd.DataFrame) -> list[Claim]:
        return [*claim_3(judged.ranked, correlations), *claim_4(effects)]

    return _measured("insight-2", judged, settings, claims, figures="_texts")


def _drawn(dataset: Dataset) -> bool:
    """Is it the miniature world, whose recogniser can judge pictures?"""
    return dataset.name.startswith("miniature/")


def _size(profile: profiles.Profile, candidates: int) -> dict:
    return dict(
        candidates=candidates,
        steps=profile.steps,
        guidance_scale=profile.guidance_scale,
        batch_size=profile.batch_size,
    )


def _measured(
    name: str,
    judged: EvaluatedCandidates,
    settings: report.Settings,
    claims: Callable[[pd.DataFrame, pd.DataFrame], list[Claim]],
    figures: str = "",
) -> report.Insight:
    effects, correlations = measure(judged, resamples=settings.resamples), correlate(judged.ranked)
    chance = {by: {m: shuffle(judged, by, m) for m in judged.metrics} for by in similarities(effects)}
    decided = claims(effects, correlations)
    return report.Insight(name, judged.table, effects, correlations, decided, chance, settings, figures)


def _settings(
    profile: profiles.Profile,
    dataset: Dataset,
    generator: Generator,
    judged: EvaluatedCandidates,
    candidates: int,
    command: str,
    resamples: int,
    judges: str,
) -> report.Settings:
    scheduler = generator.pipeline.scheduler
    return report.Settings(
        command=command,
        profile=profile.name,
        dataset=dataset.name,
        candidates=candidates,
        ranked=judged.rows.shape[1],
        sampling=repr(PAPER) if judged.tokenizer else "beam search",
        steps=profile.steps,
        guidance_scale=profile.guidance_scale,
        scheduler=f"{type(scheduler).__name__}, {scheduler.config.timestep_spacing} spacing",
        tokenizer=judged.tokenizer,
        resamples=resamples,
        seed=0,
        judges=judges,
    )


def _described(captioner: Captioner, dataset: Dataset, table: pd.DataFrame, path: Path) -> dict[int, str]:
    """Image id -> caption by beam search, as COCO results in the run folder."""
    ids = set(table["image_id"])
    if path.exists() and ids <= (there := read_results(path)).keys():
        return there
    beam = describe(captioner, dataset.only(ids))
    write_results(path, beam)
    return beam


INSIGHTS = {"insight-1": insight_1, "insight-2": insight_2}


def main(arguments: list[str] | None = None) -> int:
    """Run a insight, or go on with it, and write what came out into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research insight", description=main.__doc__)
    parser.add_argument("insight", choices=INSIGHTS)
    parser.add_argument("--images", type=int, default=200, help="n; default: 200")
    parser.add_argument("--candidates", type=int, default=10, help="drawn for each; default: 10, as in the paper")
    parser.add_argument("--run", type=Path, help="run folder; default: build/runs/FINDING")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    began, name = time.monotonic(), options.insight
    size = f"--images {options.images} --candidates {options.candidates}"
    run = options.run or Path("build/runs") / name
    try:
        command = f"python -m dalleflamingo research insight {name} {size}"
        insight = INSIGHTS[name](options.images, options.candidates, run, command)
        report.write(options.docs, insight)
    except (ValueError, FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    for claim in insight.claims:
        by = "" if claim.ranked_by == ALL else f", ranked by {claim.ranked_by}"
        print(f"Claim {claim.number}{by}: {claim.verdict}; {claim.text}: {claim.effect}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    seconds = time.monotonic() - began
    print(f"{options.docs}/results/{name}.md and its table, figures and claims in {seconds:.0f} s, {peak:.1f} GiB.")
    return 0
