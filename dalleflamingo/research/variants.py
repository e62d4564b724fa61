"""Do the insights need this sampling, these models, these images? Tables 7 and 8, claims 6 and 8.

    python -m dalleflamingo research variants --images 200     after `make reproduce` has measured both insights

Insight I is measured again with one thing changed: captions by top-k sampling or with a temperature (Table 7), captions
by another captioner or images by another generator (Table 8), other random numbers, images of COCO. And the generated
images of Insight II, as they are, are ranked again by what another captioner says of them (Table 8).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dalleflamingo import profiles
from dalleflamingo.captioner import Captioner
from dalleflamingo.commands.parsers import positive
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import PAPER_SAMPLING, Strategy, Temperature, TopK
from dalleflamingo.evaluation.image_features import FeatureExtractor, ImageFiles
from dalleflamingo.evaluation.image_metrics import RESAMPLES as RESAMPLES_OF_IMAGES
from dalleflamingo.evaluation.similarities import load_text_similarities
from dalleflamingo.miniature.scene_graph import Scene, recall_of_things, wrong_facts
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import JourneySettings, image_text_image
from dalleflamingo.research import pages, paper, report
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.claims import Claim, print_claims, scoreboard, secondary_table, verdict_line
from dalleflamingo.research.image_ranking import ImageEvaluators, evaluate_images
from dalleflamingo.research.insights import RANKED, TABLE_2, difference
from dalleflamingo.research.metrics import METRICS, check_similarities, ranking_label
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import (
    ALL,
    EvaluatedCandidates,
    gains,
    measure,
    scores,
    similarities,
)
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import Similarity
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_models

BATCH = 16  # images described at once


@dataclass(frozen=True)
class Variant:
    """Insight I with one thing changed.

    Attributes:
        claim: that it decides, if any.
        what: is changed.
        strategy: how captions are sampled.
        other_captioner: the profile's other captioner writes them.
        other_generator: the profile's other generator makes the images.
        on_coco: the images are COCO's.
        seed: of sampling and noise.
        images: at most so many.
    """

    claim: int | None
    what: str
    strategy: Strategy = PAPER_SAMPLING
    other_captioner: bool = False
    other_generator: bool = False
    on_coco: bool = False
    seed: int = 0
    images: int | None = None

    def profile(self, usual: Profile) -> Profile:
        """The usual profile with the variant's captioner, generator and data set."""
        return replace(
            usual,
            captioner=usual.other_captioner if self.other_captioner else usual.captioner,
            generator=usual.other_generator if self.other_generator else usual.generator,
            dataset=usual.coco if self.on_coco else usual.dataset,
        )

    def dataset(self, usual: Profile) -> Dataset:
        """All images of the variant; of COCO the test split."""
        return registered.load_dataset(self.profile(usual).dataset, "test" if self.on_coco else None)

    def settings(self, usual: Profile) -> JourneySettings:
        """Of the variant's journey."""
        return JourneySettings.of(usual, candidates=RANKED, seed=self.seed)


VARIANTS = {
    "top-k": Variant(6, "top-k sampling, k = 10", TopK(10)),
    "temperature": Variant(6, "temperature 0.7", Temperature(0.7)),
    "blip2": Variant(8, "captions by BLIP-2", other_captioner=True),
    "lafite": Variant(8, "images by LAFITE", other_generator=True),
    "seed-2": Variant(None, "seed 2", seed=2, images=150),
    "seed-3": Variant(None, "seed 3", seed=3, images=150),
    "coco": Variant(None, "images of COCO", on_coco=True),
}
IN_THE_PAPER = {  # CIDEr × 100 of a random caption and of the one ranked first
    "top-k": paper.TABLE_7["top-k, k = 10"],
    "temperature": paper.TABLE_7["temperature 0.7"],
    "lafite": paper.TABLE_8["lafite"]["cider"],
    "coco": paper.TABLE_1["coco"]["cider"][ALL],
}
CAPTIONERS = ("BLIP", "BLIP-2")  # of Table 8
ERRORS = "variant-caption-errors.csv"


@dataclass(frozen=True)
class Variants:
    """What the variants measured.

    Attributes:
        insight_1: variant -> effects of Insight I.
        insight_2: captioner -> effects of Insight II, its images ranked by what that captioner says of them.
        errors: what `caption_errors` found for Insight I and each variant, a row each.
        claims: that the variants decide.
        original: how Insight I was made.
        command: that measured the variants.
    """

    insight_1: Mapping[str, pd.DataFrame]
    insight_2: Mapping[str, pd.DataFrame]
    errors: pd.DataFrame
    claims: Sequence[Claim]
    original: Provenance
    command: str


# ── measurements ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_variant(variant: Variant, usual: Profile, images: int, run_folder: Path) -> EvaluatedCandidates:
    """The candidates of Insight I under a variant, with the similarities of CLIP and DINO, evaluated; resumed.

    Args:
        variant: what is changed.
        usual: the profile that it changes.
        images: n, where the variant has no smaller number.
        run_folder: of the journey.
    """
    dataset = variant.dataset(usual)
    dataset = dataset.subset(min(images, variant.images or len(dataset)))
    models = load_models(variant.profile(usual))
    check_similarities(models.similarities, "image")
    table = image_text_image(dataset, *models, run_folder, variant.settings(usual), strategy=variant.strategy)
    return evaluate_captions(table, dataset)


def caption_errors(evaluated: EvaluatedCandidates, dataset: Dataset) -> dict[str, float]:
    """What is wrong with captions in the miniature, whose truth is known.

    Args:
        evaluated: captions with the column `right`.
        dataset: with the scenes of their images.
    Returns:
        right: share of captions without a wrong kind, colour or relation. left out: share of an image's things that a
        caption does not name, mean over captions. kind, colour, size, relation, ground: share of the captions that are
        not right that err in it.
    """
    scenes = {example.image_id: Scene.from_dict(example.extra["scene"]) for example in dataset}
    table = evaluated.table
    pairs = [(caption, scenes[i]) for caption, i in zip(table["caption"], table["image_id"], strict=True)]
    wrong = pd.DataFrame([wrong_facts(*pair) for pair in pairs])[~table["right"].to_numpy(bool)] > 0
    named = sum(recall_of_things(*pair) for pair in pairs) / len(pairs)
    return {"right": float(table["right"].mean()), "left out": 1 - named} | wrong.mean().to_dict()


def describe_again(
    table: pd.DataFrame, run_folder: Path, captioner: Captioner, similarities: Sequence[Similarity]
) -> pd.DataFrame:
    """A table of Insight II with another captioner's descriptions: `recovered` and the similarities are new.

    Args:
        table: as from `reconstruct.text_image_text`.
        run_folder: that the table's paths are relative to.
        captioner: the other one.
        similarities: of texts.
    """
    images, recovered = ImageFiles(run_folder / path for path in table["image"]), []
    with tqdm(total=len(images), desc="descriptions", unit="image") as bar:
        for start in range(0, len(images), BATCH):
            recovered += captioner.describe(images[start : start + BATCH])
            bar.update(len(recovered) - bar.n)
    pairs = [[caption] for caption in recovered]
    columns = {s.name: s.compare(list(table["caption"]), pairs).flatten().tolist() for s in similarities}
    return table.assign(recovered=recovered, **columns)


def insight_2_by_captioner(docs: Path, run_folder: Path) -> dict[str, pd.DataFrame]:
    """Effects of Insight II, its images described by each of the two captioners.

    Args:
        docs: with the measured insight.
        run_folder: with its images.
    Raises:
        FileNotFoundError: the insight is not measured there, or its images are not on this machine.
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
    """
    profile = profiles.current()
    table, _ = report.load("insight-2", docs / "results")
    if not (run_folder / "images").is_dir():
        raise FileNotFoundError(f"{run_folder} has no images: make them by `{table.attrs['command']}`, then go on")
    everything = registered.load_dataset(profile.dataset)
    dataset = everything.filter(set(table["image_id"]))
    texts = load_text_similarities(profile, {example.image_id: example.references for example in everything})
    check_similarities(texts, "text")
    encoders = {one.name: one for one in load_models(profile).similarities}
    check_similarities(encoders.values(), "image")
    again = describe_again(table, run_folder, load_captioner(profile, profile.other_captioner), texts)
    inception = FeatureExtractor.from_registry(profile.inception, profile.device)
    evaluators = ImageEvaluators(encoders["clip"], encoders["dino"], inception)
    return {
        who: measure(evaluate_images(one, dataset, run_folder, evaluators), resamples=RESAMPLES_OF_IMAGES)
        for who, one in zip(CAPTIONERS, (table, again), strict=True)
    }


def claims_6_and_8(again: Mapping[str, pd.DataFrame], first: pd.DataFrame) -> list[Claim]:
    """The gain in CIDEr × 100 under each variant, by each similarity; secondary, how much smaller it is.

    Args:
        again: variant -> effects.
        first: Insight I's effects.
    """
    found = []
    for name, effects in again.items():
        variant = VARIANTS[name]
        for by in similarities(effects) if variant.claim else []:
            gain = gains(effects, "cider", by)[ALL]
            text = f"{variant.what}: the caption ranked first beats a random one, CIDEr × 100, overall"
            smaller = difference(gains(first, "cider", by)[ALL], gain)
            secondary = {f"Insight I's gain − that with {variant.what}": smaller}
            found.append(Claim(variant.claim, text, by, gain, 1, secondary))
    return found


# ── tables and page ──────────────────────────────────────────────────────────────────────────────────────────────────


def load(folder: Path = report.SHIPPED) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """What was measured: variant -> effects of Insight I, and captioner -> effects of Insight II; none where not."""
    named = [{name: folder / file_of(name) for name in names} for names in (VARIANTS, CAPTIONERS)]
    first, second = ({name: pd.read_csv(path) for name, path in paths.items() if path.is_file()} for paths in named)
    return first, second


def file_of(name: str) -> str:
    """The file of a variant's or a captioner's effects."""
    return f"{'captioner' if name in CAPTIONERS else 'variant'}-{name.lower()}-intervals.csv"


def table_7(again: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Insight I under each variant, with Tables 7 and 8: texts, a row for each variant and similarity."""
    rows = []
    for name, effects in again.items():
        random = scores(effects, "cider", "random")[ALL]
        published = "{} → {}".format(*IN_THE_PAPER[name]) if name in IN_THE_PAPER else ""
        for by in similarities(effects):
            ranked, gain = scores(effects, "cider", by)[ALL], gains(effects, "cider", by)[ALL]
            cells = pages.cell(random, 1), pages.cell(ranked, 1), pages.cell(gain, 1, signed=True)
            rows.append([VARIANTS[name].what, str(gain.n), ranking_label(by), *cells, published])
    columns = ["changed", "n", "ranked by", "random", "ranked first", "minus random", "the paper"]
    return pd.DataFrame(rows, columns=columns)


def table_8(by_captioner: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Insight II's images ranked by what each captioner says of them: texts, a row for each metric and similarity."""
    rows = []
    for name in TABLE_2:
        metric, first = METRICS[name], by_captioner[CAPTIONERS[0]]
        for by in similarities(first):
            random = scores(first, name, "random")[ALL]
            found = [gains(effects, name, by)[ALL] for effects in by_captioner.values()]
            cells = pages.cell(random, metric.digits), *(pages.cell(g, metric.digits, signed=True) for g in found)
            published = "{} → {}, {}".format(*paper.TABLE_8["judged by"][name])
            rows.append([metric.label, ranking_label(by), *cells, published])
    gained = [f"{who} minus random" for who in by_captioner]
    return pd.DataFrame(rows, columns=["", "ranked by", "random", *gained, "the paper: BLIP, BLIP-2"])


def write(docs: Path, variants: Variants) -> None:
    """results/variant-*.csv, captioner-*.csv, variants.md, and the claims."""
    folder, made = docs / "results", variants.original
    scoreboard(folder / "claims.json", variants.claims, profile=made.profile, dataset=made.dataset, seed=made.seed)
    for name, effects in [*variants.insight_1.items(), *variants.insight_2.items()]:
        write_whole(folder / file_of(name), lambda path, effects=effects: effects.round(5).to_csv(path, index=False))
    if len(variants.errors):
        write_whole(folder / ERRORS, variants.errors.round(5).to_csv)
    pages.write_page(folder / "variants.md", page(variants))


def page(variants: Variants) -> list[str]:
    """The parts of the page in Markdown."""
    n = variants.insight_2[CAPTIONERS[1]]["n"].max()
    return [
        "# Other samplings, other models, other images",
        pages.measured_on(variants.original.dataset, pages.BESIDE_THE_PAPER),
        pages.made_by(variants.command, pages.current_commit()),
        "\n".join(map(verdict_line, variants.claims)),
        f"## Insight I (with Tables 7 and 8), K = {RANKED}",
        pages.frame_table(table_7(variants.insight_1)),
        "How much smaller the gain is than Insight I's. The intervals are those of two independent effects, "
        "although the images of the one are among those of the other:",
        secondary_table(variants.claims),
        *(_error_parts(variants.errors) if len(variants.errors) else []),
        f"## Insight II with another captioner (Table 8), n = {n}",
        "The same images, ranked by how like the caption is to BLIP's, and to BLIP-2's, description of them.",
        pages.frame_table(table_8(variants.insight_2)),
    ]


def _error_parts(errors: pd.DataFrame) -> list[str]:
    return [
        "## Errors of captions",
        "*right*: share of captions without a wrong kind, colour or relation; *left out*: share of an image's things "
        "that a caption does not name; then, of the captions that are not right, the share that errs in each sort of "
        "fact.",
        pages.frame_table(errors.round(2).astype(str).reset_index(names="captions")),
    ]


# ── command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(arguments: list[str]) -> int:
    """Other samplings, models and images (claims 6 and 8).

    Measure Insight I again with one thing changed, seven times, and rank Insight II's images by another captioner.
    Both insights must be measured before.
    """
    parser = study_parser("variants", main.__doc__)
    parser.add_argument("--images", type=positive, default=200, help="how many of Insight I's images; default: 200")
    parser.add_argument("--only", choices=VARIANTS, help="make the candidates of this variant only, and write nothing")
    options = parse(parser, arguments)
    if options.only:
        run_variant(VARIANTS[options.only], profiles.current(), options.images, options.runs / options.only)
        return 0
    variants = measure_variants(options.images, options.docs, options.runs)
    write(options.docs, variants)
    print_claims(variants.claims)
    return 0


def measure_variants(images: int, docs: Path, runs: Path) -> Variants:
    """All variants that the current profile has models for, resumed.

    Args:
        images: n of Insight I.
        docs: with the measured insights.
        runs: the folder of run folders.
    Raises:
        FileNotFoundError: an insight is not measured, or its images are not on this machine.
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
    """
    profile = profiles.current()
    table, first = report.load("insight-1", docs / "results")
    by_captioner = insight_2_by_captioner(docs, runs / "insight-2")  # first: it tells soonest what is missing
    chosen = {name: one for name, one in VARIANTS.items() if profile.other_generator or not one.other_generator}
    evaluated = {name: run_variant(one, profile, images, runs / name) for name, one in chosen.items()}
    again = {name: measure(one) for name, one in evaluated.items()}
    usual = registered.load_dataset(profile.dataset)
    everyone = {"Insight I": (evaluate_captions(table[table["candidate"] < RANKED], usual), usual)}
    everyone |= {one.what: (evaluated[name], one.dataset(profile)) for name, one in chosen.items()}
    # real images have no scene that captions could be compared with
    known = {what: pair for what, pair in everyone.items() if "right" in pair[0].table}
    return Variants(
        insight_1=again,
        insight_2=by_captioner,
        errors=pd.DataFrame({what: caption_errors(*pair) for what, pair in known.items()}).T,
        claims=claims_6_and_8(again, first),
        original=Provenance.from_attrs(table.attrs),
        command=f"python -m dalleflamingo research variants --images {images}",
    )
