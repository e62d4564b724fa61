"""Do the findings need this sampling, this captioner? Tables 7 and 8, claims 6 and 8.

    python -m dalleflamingo.variants --images 200     after `make reproduce` has measured both findings

Finding I is measured again with other captions: by top-k sampling and with a temperature (Table 7), and by BLIP-2
(Table 8). And the pictures of Finding II, as they are, are ranked again by what BLIP-2 says of them (Table 8).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import trange

from dalleflamingo import profiles, registry, results, show
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.datasets import Dataset, Pictures
from dalleflamingo.decoding import Strategy, Temperature, TopK
from dalleflamingo.image_features import FeatureExtractor
from dalleflamingo.image_metrics import RESAMPLES as RESAMPLES_OF_PICTURES
from dalleflamingo.picks import ALL, gains, judge_captions, measure, scores, similarities
from dalleflamingo.picture_picks import Judges, judge_pictures
from dalleflamingo.reconstruct import image_text_image, load_models, load_text_similarities
from dalleflamingo.reproduce import RANKED, TABLE_2, Claim, difference
from dalleflamingo.similarity import Similarity

DESCRIBED = 16  # pictures at once


@dataclass(frozen=True)
class Variant:
    """Finding I with one thing changed.

    paper: CIDEr × 100 of a random caption and of the one ranked first, NoCaps; None where the paper has no such row.
    """

    claim: int
    what: str
    strategy: Strategy = PAPER
    other_captioner: bool = False
    paper: tuple[float, float] | None = None


VARIANTS = {
    "top-k": Variant(6, "top-k sampling, k = 10", TopK(10), paper=(79.6, 84.0)),
    "temperature": Variant(6, "temperature 0.7", Temperature(0.7), paper=(84.3, 89.3)),
    "blip2": Variant(8, "captions by BLIP-2", other_captioner=True),
}
READERS = ("BLIP", "BLIP-2")
# Table 8: SD's pictures, random, ranked by what BLIP and what BLIP-2 say of them; NoCaps
PAPER_TABLE_8 = {"clip_distance": (40.54, 33.47, 39.41), "fid": (32.37, 29.59, 31.34), "is": (41.19, 45.64, 42.34)}


def finding_1_again(variant: Variant, images: int, run_folder: Path) -> pd.DataFrame:
    """What `picks.measure` gives for Finding I under a variant, ranked by CLIP and DINO; resumed as ever."""
    profile = profiles.current()
    dataset = registry.dataset(profile.dataset).subset(images)
    captioner, generator, encoders = load_models(profile)
    if variant.other_captioner:
        captioner = _other_captioner(profile)
    table = image_text_image(
        dataset, captioner, generator, encoders, run_folder,
        candidates=RANKED, steps=profile.steps, guidance_scale=profile.guidance_scale,
        batch_size=profile.batch_size, strategy=variant.strategy,
    )  # fmt: skip
    return measure(judge_captions(table, dataset))


def described_again(
    table: pd.DataFrame, run_folder: Path, captioner: Captioner, similarities: Sequence[Similarity]
) -> pd.DataFrame:
    """A table of Finding II whose pictures another captioner has described: `recovered` and the similarities are new.

    Args:
        table: as from `reconstruct.text_image_text`, its pictures in `run_folder`.
    """
    pictures, recovered = Pictures(run_folder / path for path in table["picture"]), []
    for start in trange(0, len(pictures), DESCRIBED, desc="descriptions", unit_scale=DESCRIBED, unit="picture"):
        recovered += captioner.describe(pictures[start : start + DESCRIBED])
    pairs = [[caption] for caption in recovered]
    columns = {s.name: s.compare(list(table["caption"]), pairs).flatten().tolist() for s in similarities}
    return table.assign(recovered=recovered, **columns)


def finding_2_again(docs: Path, run_folder: Path) -> dict[str, pd.DataFrame]:
    """What `picks.measure` gives for Finding II's pictures, described by each of the two captioners."""
    profile = profiles.current()
    table, _ = results.load("finding-2", docs / "results")
    everything = registry.dataset(profile.dataset)
    ids = set(table["image_id"])
    dataset = Dataset(everything.name, tuple(example for example in everything if example.image_id in ids))
    texts = load_text_similarities(profile, {example.image_id: example.references for example in everything})
    again = described_again(table, run_folder, _other_captioner(profile), texts)
    _, _, (clip, dino) = load_models(profile)
    judges = Judges(clip, dino, FeatureExtractor.of(profile.inception, profile.device))
    return {
        who: measure(judge_pictures(one, dataset, run_folder, judges), resamples=RESAMPLES_OF_PICTURES)
        for who, one in zip(READERS, (table, again), strict=True)
    }


def _other_captioner(profile: profiles.Profile) -> Captioner:
    entry = registry.ENTRIES[profile.other_captioner]
    return Captioner.from_pretrained(
        registry.locate(entry.name), profile.device, profile.torch_dtype, revision=entry.revision
    )


def claims_6_and_8(again: Mapping[str, pd.DataFrame], first: pd.DataFrame) -> list[Claim]:
    """The gain in CIDEr × 100 under each variant, by each similarity; apart, how much smaller it is than Finding I's.

    Args:
        again: variant -> effects. first: Finding I's effects.
    """
    found = []
    for name, effects in again.items():
        variant = VARIANTS[name]
        for by in similarities(effects):
            gain = gains(effects, "cider", by)[ALL]
            text = f"{variant.what}: the caption ranked first beats a random one, CIDEr × 100, overall"
            smaller = difference(gains(first, "cider", by)[ALL], gain)
            apart = {f"Finding I's gain − that with {variant.what}": smaller}
            found.append(Claim(variant.claim, text, by, gain, 1, apart))
    return found


def load(folder: Path = results.SHIPPED) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """What was measured: variant -> effects of Finding I, and captioner -> effects of Finding II; none where not."""
    named = [{name: folder / _file(name) for name in names} for names in (VARIANTS, READERS)]
    first, second = ({name: pd.read_csv(path) for name, path in paths.items() if path.is_file()} for paths in named)
    return first, second


def _file(name: str) -> str:
    return f"{'reader' if name in READERS else 'variant'}-{name.lower()}-intervals.csv"


def table_7(again: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Finding I under each variant, Tables 7 and 8 in one: texts, a row a variant and similarity."""
    rows = []
    for name, effects in again.items():
        random, variant = scores(effects, "cider", "random")[ALL], VARIANTS[name]
        paper = "" if variant.paper is None else f"{variant.paper[0]} → {variant.paper[1]}"
        for by in similarities(effects):
            ranked, gain = scores(effects, "cider", f"{by} 1")[ALL], gains(effects, "cider", by)[ALL]
            cells = results.cell(random, 1), results.cell(ranked, 1), results.cell(gain, 1, signed=True)
            rows.append([variant.what, show.LABELS[by], *cells, paper])
    return pd.DataFrame(
        rows, columns=["changed", "ranked by", "random", "ranked first", "minus random", "the paper, NoCaps"]
    )


def table_8(described: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Finding II's pictures ranked by what each captioner says of them: texts, a row a metric and similarity."""
    rows = []
    for metric in TABLE_2:
        named = results.METRICS[metric]
        for by in similarities(described["BLIP"]):
            random = scores(described["BLIP"], metric, "random")[ALL]
            found = [gains(effects, metric, by)[ALL] for effects in described.values()]
            start, ours, theirs = PAPER_TABLE_8[metric]
            cells = results.cell(random, named.digits), *(results.cell(g, named.digits, signed=True) for g in found)
            rows.append([named.label, show.LABELS[by], *cells, f"{start} → {ours}, {theirs}"])
    readers = [f"{who} minus random" for who in described]
    return pd.DataFrame(rows, columns=["", "ranked by", "random", *readers, "the paper: BLIP, BLIP-2"])


def page(
    again: Mapping[str, pd.DataFrame], described: Mapping[str, pd.DataFrame], claims: Sequence[Claim], command: str
) -> str:
    """The page in Markdown."""
    beside = [
        f"* ranked by {show.LABELS[claim.ranked_by]}, {what}: {results.cell(value, 1, signed=True)}"
        for claim in claims
        for what, value in claim.apart.items()
    ]
    n = {name: int(effects["n"].max()) for name, effects in [*again.items(), *described.items()]}
    parts = [
        "# Other samplings, another captioner",
        "**Measured in the miniature**; the paper's figures are of NoCaps and stand beside ours for their direction.",
        f"Made by `{command}` at commit `{results.current_commit()}`. Brackets are 95 % intervals, paired over images.",
        "\n".join(map(results.verdict_line, claims)),
        f"## Finding I (Tables 7 and 8), n = {n[next(iter(again))]}, K = {RANKED}",
        _markdown(table_7(again)),
        "How much smaller the gain is than Finding I's, by intervals of two independent figures:",
        "\n".join(beside),
        f"## Finding II with another reader (Table 8), n = {n['BLIP-2']}",
        "The same pictures, ranked by the likeness of the caption to what BLIP, and to what BLIP-2, says of them.",
        _markdown(table_8(described)),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(frame: pd.DataFrame) -> str:
    return results.table(list(frame), frame.to_numpy().tolist())


def main(arguments: list[str] | None = None) -> int:
    """Measure the variants, going on where they were, and write a page and the claims into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo.variants", description=main.__doc__)
    parser.add_argument("--images", type=int, default=200, help="n of Finding I; default: 200")
    parser.add_argument("--only", choices=VARIANTS, help="make the candidates of this one only, and write no page")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--runs", type=Path, default=Path("build/runs"), help="default: build/runs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(VARIANTS)
    again = {name: finding_1_again(VARIANTS[name], options.images, options.runs / name) for name in names}
    if options.only:
        return 0
    described = finding_2_again(options.docs, options.runs / "finding-2")
    table, first = results.load("finding-1", options.docs / "results")
    claims = claims_6_and_8(again, first)
    folder, command = options.docs / "results", f"python -m dalleflamingo.variants --images {options.images}"
    results.scoreboard(folder / "claims.json", claims, results.Settings.of(table))
    for name, effects in [*again.items(), *described.items()]:
        effects.round(5).to_csv(folder / _file(name), index=False)
    (folder / "variants.md").write_text(page(again, described, claims, command), encoding="utf-8")
    for claim in claims:
        print(f"Claim {claim.number}, {claim.ranked_by}: {claim.verdict}; {claim.text}: {claim.effect}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
