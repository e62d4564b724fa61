"""Do the insights need this sampling, these models, these pictures? Tables 7 and 8, claims 6 and 8.

    python -m dalleflamingo research variants --images 200     after `make reproduce` has measured both insights

Insight I is measured again with one thing changed: captions by top-k sampling or with a temperature (Table 7), captions
by BLIP-2 or pictures by a GAN (Table 8), captions from other random numbers, pictures of COCO. And the pictures of
Insight II, as they are, are ranked again by what BLIP-2 says of them (Table 8).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset, ImageFiles
from dalleflamingo.decoding import Strategy, Temperature, TopK
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import RESAMPLES as RESAMPLES_OF_PICTURES
from dalleflamingo.evaluation.similarities import load_text_similarities
from dalleflamingo.miniature.lafite import LafiteGenerator
from dalleflamingo.miniature.scene_graph import Scene, recall_of_things, wrong_facts
from dalleflamingo.reconstruct import image_text_image, load_captioner, load_models
from dalleflamingo.research import pages, report
from dalleflamingo.research.claims import Claim, scoreboard, verdict_line
from dalleflamingo.research.image_ranking import Judges, evaluate_images
from dalleflamingo.research.insights import RANKED, TABLE_2, difference
from dalleflamingo.research.ranking import (
    ALL,
    EvaluatedCandidates,
    evaluate_captions,
    gains,
    measure,
    scores,
    similarities,
)
from dalleflamingo.similarity import Similarity

DESCRIBED = 16  # pictures at once


@dataclass(frozen=True)
class Variant:
    """Insight I with one thing changed.

    claim: that it decides, if any. images: at most so many.
    paper: CIDEr × 100 of a random caption and of the one ranked first (Tables 1, 7, 8); None where it has no such row.
    """

    claim: int | None
    what: str
    strategy: Strategy = PAPER
    other_captioner: bool = False
    other_generator: bool = False
    on_coco: bool = False
    seed: int = 0
    images: int | None = None
    paper: tuple[float, float] | None = None


VARIANTS = {
    "top-k": Variant(6, "top-k sampling, k = 10", TopK(10), paper=(79.6, 84.0)),
    "temperature": Variant(6, "temperature 0.7", Temperature(0.7), paper=(84.3, 89.3)),
    "blip2": Variant(8, "captions by BLIP-2", other_captioner=True),
    "lafite": Variant(8, "pictures by LAFITE", other_generator=True, paper=(74.1, 77.4)),
    "seed-2": Variant(None, "seed 2", seed=2, images=150),
    "seed-3": Variant(None, "seed 3", seed=3, images=150),
    "coco": Variant(None, "pictures of COCO", on_coco=True, paper=(90.1, 92.0)),
}
READERS = ("BLIP", "BLIP-2")
FAULTS = "variant-faults.csv"
# Table 8: SD's pictures, random, ranked by what BLIP and what BLIP-2 say of them; NoCaps
PAPER_TABLE_8 = {"clip_distance": (40.54, 33.47, 39.41), "fid": (32.37, 29.59, 31.34), "is": (41.19, 45.64, 42.34)}


def insight_1_again(variant: Variant, images: int, run_folder: Path) -> EvaluatedCandidates:
    """The candidates of Insight I under a variant, with the similarities of CLIP and DINO, judged; resumed as ever."""
    profile = profiles.current()
    dataset = _dataset(variant, profile)
    dataset = dataset.subset(min(images, variant.images or len(dataset)))
    captioner, generator, encoders = load_models(profile)
    if variant.other_captioner:
        captioner = load_captioner(profile, profile.other_captioner)
    if variant.other_generator:
        generator = LafiteGenerator.from_pretrained(registry.locate(profile.other_generator), profile.device)
    table = image_text_image(
        dataset, captioner, generator, encoders, run_folder,
        candidates=RANKED, steps=profile.steps, guidance_scale=profile.guidance_scale,
        batch_size=profile.batch_size, strategy=variant.strategy, seed=variant.seed,
    )  # fmt: skip
    return evaluate_captions(table, dataset)


def _dataset(variant: Variant, profile: profiles.Profile) -> Dataset:
    return registry.dataset(profile.coco, "test") if variant.on_coco else registry.dataset(profile.dataset)


def faults(judged: EvaluatedCandidates, dataset: Dataset) -> dict[str, float]:
    """What is wrong with captions, in the miniature, whose truth is known.

    Returns:
        right: share of captions without a wrong kind, colour or relation. left out: share of a picture's things that a
        caption does not name, mean over captions. kind, colour, size, relation, ground: share of the captions that are
        not right that err in it.
    """
    scenes = {example.image_id: Scene.from_dict(example.extra["scene"]) for example in dataset}
    pairs = [(caption, scenes[i]) for caption, i in zip(judged.table["caption"], judged.table["image_id"], strict=True)]
    wrong = pd.DataFrame([wrong_facts(*pair) for pair in pairs])[~judged.table["right"].to_numpy(bool)] > 0
    named = sum(recall_of_things(*pair) for pair in pairs) / len(pairs)
    return {"right": float(judged.table["right"].mean()), "left out": 1 - named} | wrong.mean().to_dict()


def described_again(
    table: pd.DataFrame, run_folder: Path, captioner: Captioner, similarities: Sequence[Similarity]
) -> pd.DataFrame:
    """A table of Insight II whose pictures another captioner has described: `recovered` and the similarities are new.

    Args:
        table: as from `reconstruct.text_image_text`, its pictures in `run_folder`.
    """
    pictures, recovered = ImageFiles(run_folder / path for path in table["picture"]), []
    with tqdm(total=len(pictures), desc="descriptions", unit="picture") as bar:
        for start in range(0, len(pictures), DESCRIBED):
            recovered += captioner.describe(pictures[start : start + DESCRIBED])
            bar.update(len(recovered) - bar.n)
    pairs = [[caption] for caption in recovered]
    columns = {s.name: s.compare(list(table["caption"]), pairs).flatten().tolist() for s in similarities}
    return table.assign(recovered=recovered, **columns)


def insight_2_again(docs: Path, run_folder: Path) -> dict[str, pd.DataFrame]:
    """What `picks.measure` gives for Insight II's pictures, described by each of the two captioners.

    Raises:
        FileNotFoundError: the pictures of the measured insight are not on this machine.
    """
    profile = profiles.current()
    table, _ = report.load("insight-2", docs / "results")
    if not (run_folder / "pictures").is_dir():
        raise FileNotFoundError(f"{run_folder} has no pictures: draw them by `{table.attrs['command']}`, then go on")
    everything = registry.dataset(profile.dataset)
    dataset = everything.only(set(table["image_id"]))
    texts = load_text_similarities(profile, {example.image_id: example.references for example in everything})
    again = described_again(table, run_folder, load_captioner(profile, profile.other_captioner), texts)
    _, _, (clip, dino) = load_models(profile)
    judges = Judges(clip, dino, FeatureExtractor.of(profile.inception, profile.device))
    return {
        who: measure(evaluate_images(one, dataset, run_folder, judges), resamples=RESAMPLES_OF_PICTURES)
        for who, one in zip(READERS, (table, again), strict=True)
    }


def claims_6_and_8(again: Mapping[str, pd.DataFrame], first: pd.DataFrame) -> list[Claim]:
    """The gain in CIDEr × 100 under each variant, by each similarity; apart, how much smaller it is than Insight I's.

    Args:
        again: variant -> effects. first: Insight I's effects.
    """
    found = []
    for name, effects in again.items():
        variant = VARIANTS[name]
        for by in similarities(effects) if variant.claim else []:
            gain = gains(effects, "cider", by)[ALL]
            text = f"{variant.what}: the caption ranked first beats a random one, CIDEr × 100, overall"
            smaller = difference(gains(first, "cider", by)[ALL], gain)
            apart = {f"Insight I's gain − that with {variant.what}": smaller}
            found.append(Claim(variant.claim, text, by, gain, 1, apart))
    return found


def load(folder: Path = report.SHIPPED) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """What was measured: variant -> effects of Insight I, and captioner -> effects of Insight II; none where not."""
    named = [{name: folder / _file(name) for name in names} for names in (VARIANTS, READERS)]
    first, second = ({name: pd.read_csv(path) for name, path in paths.items() if path.is_file()} for paths in named)
    return first, second


def _file(name: str) -> str:
    return f"{'reader' if name in READERS else 'variant'}-{name.lower()}-intervals.csv"


def table_7(again: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Insight I under each variant, with Tables 7 and 8: texts, a row a variant and similarity."""
    rows = []
    for name, effects in again.items():
        random, variant = scores(effects, "cider", "random")[ALL], VARIANTS[name]
        paper = "" if variant.paper is None else f"{variant.paper[0]} → {variant.paper[1]}"
        for by in similarities(effects):
            ranked, gain = scores(effects, "cider", f"{by} 1")[ALL], gains(effects, "cider", by)[ALL]
            cells = pages.cell(random, 1), pages.cell(ranked, 1), pages.cell(gain, 1, signed=True)
            rows.append([variant.what, str(gain.n), show.LABELS[by], *cells, paper])
    columns = ["changed", "n", "ranked by", "random", "ranked first", "minus random", "the paper"]
    return pd.DataFrame(rows, columns=columns)


def table_8(described: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Insight II's pictures ranked by what each captioner says of them: texts, a row a metric and similarity."""
    rows = []
    for metric in TABLE_2:
        named = report.METRICS[metric]
        for by in similarities(described["BLIP"]):
            random = scores(described["BLIP"], metric, "random")[ALL]
            found = [gains(effects, metric, by)[ALL] for effects in described.values()]
            start, ours, theirs = PAPER_TABLE_8[metric]
            cells = pages.cell(random, named.digits), *(pages.cell(g, named.digits, signed=True) for g in found)
            rows.append([named.label, show.LABELS[by], *cells, f"{start} → {ours}, {theirs}"])
    readers = [f"{who} minus random" for who in described]
    return pd.DataFrame(rows, columns=["", "ranked by", "random", *readers, "the paper: BLIP, BLIP-2"])


def load_faults(folder: Path = report.SHIPPED) -> pd.DataFrame:
    """A row for Insight I and each variant: what `faults` found; measured in the miniature only."""
    return pd.read_csv(folder / FAULTS, index_col=0)


def page(
    again: Mapping[str, pd.DataFrame],
    described: Mapping[str, pd.DataFrame],
    wrong: pd.DataFrame,
    claims: Sequence[Claim],
    command: str,
) -> str:
    """The page in Markdown."""
    beside = [
        f"* ranked by {show.LABELS[claim.ranked_by]}, {what}: {pages.cell(value, 1, signed=True)}"
        for claim in claims
        for what, value in claim.apart.items()
    ]
    parts = [
        "# Other samplings, other models, other pictures",
        f"{pages.measured_on(profiles.current().dataset)}; the paper's figures (NoCaps, COCO) stand beside ours for "
        "their direction.",
        f"Made by `{command}` at commit `{pages.current_commit()}`. Brackets are 95 % intervals, paired over images.",
        "\n".join(map(verdict_line, claims)),
        f"## Insight I (with Tables 7 and 8), K = {RANKED}",
        _markdown(table_7(again)),
        "How much smaller the gain is than Insight I's. The intervals are those of two independent figures, "
        "although the pictures of the one are among those of the other:",
        "\n".join(beside),
        *(_errors(wrong) if len(wrong) else []),
        f"## Insight II with another reader (Table 8), n = {described['BLIP-2']['n'].max()}",
        "The same pictures, ranked by the likeness of the caption to what BLIP, and to what BLIP-2, says of them.",
        _markdown(table_8(described)),
    ]
    return "\n\n".join(parts) + "\n"


def _errors(wrong: pd.DataFrame) -> list[str]:
    return [
        "## What the captions err in",
        "*right*: share of captions without a wrong kind, colour or relation; *left out*: share of a picture's things "
        "that a caption does not name; then, of the captions that are not right, the share that errs in each sort of "
        "fact.",
        _markdown(wrong.round(2).astype(str).reset_index(names="captions")),
    ]


def _markdown(frame: pd.DataFrame) -> str:
    return pages.table(list(frame), frame.to_numpy().tolist())


def main(arguments: list[str] | None = None) -> int:
    """Measure the variants, going on where they were, and write a page and the claims into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research variants", description=main.__doc__)
    parser.add_argument("--images", type=int, default=200, help="n of Insight I; default: 200")
    parser.add_argument("--only", choices=VARIANTS, help="make the candidates of this one only, and write no page")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--runs", type=Path, default=Path("build/runs"), help="default: build/runs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        claims = run(options.images, options.docs, options.runs, options.only)
    except (ValueError, FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    for claim in claims:
        print(f"Claim {claim.number}, {claim.ranked_by}: {claim.verdict}; {claim.text}: {claim.effect}")
    return 0


def run(images: int, docs: Path, runs: Path, only: str | None) -> list[Claim]:
    """Measure and write; with `only`, make the candidates of that variant and nothing else."""
    has_gan = profiles.current().other_generator is not None
    names = [only] if only else [name for name, one in VARIANTS.items() if has_gan or not one.other_generator]
    judged = {name: insight_1_again(VARIANTS[name], images, runs / name) for name in names}
    if only:
        return []
    again = {name: measure(one) for name, one in judged.items()}
    described = insight_2_again(docs, runs / "insight-2")
    folder, command = docs / "results", f"python -m dalleflamingo research variants --images {images}"
    table, first = report.load("insight-1", folder)
    profile = profiles.current()
    usual = registry.dataset(profile.dataset)
    everyone = {"Insight I": (evaluate_captions(table[table["candidate"] < RANKED], usual), usual)}
    everyone |= {VARIANTS[name].what: (judged[name], _dataset(VARIANTS[name], profile)) for name in names}
    # real pictures have no scene to be held against
    wrong = pd.DataFrame({what: faults(*pair) for what, pair in everyone.items() if "right" in pair[0].table}).T
    claims = claims_6_and_8(again, first)
    scoreboard(folder / "claims.json", claims, report.Settings.of(table))
    for name, effects in [*again.items(), *described.items()]:
        effects.round(5).to_csv(folder / _file(name), index=False)
    if len(wrong):
        wrong.round(5).to_csv(folder / FAULTS)
    (folder / "variants.md").write_text(page(again, described, wrong, claims, command), encoding="utf-8")
    return claims
