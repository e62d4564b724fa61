"""Planted errors: is the image of the true caption nearer to the original than images of captions with one error?

    python -m dalleflamingo research planted --n 300

A scene of two things has a true caption and four more, each with one wrong fact: a kind, a colour, the relation, the
ground. All five are rendered from the same noise, so that only the words differ. A similarity that sees what was wrong
ranks the truth first. Things and sentence forms that CLIP's hard negatives never had are reported apart: there CLIP
cannot have learned the answer by heart.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import positive
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.intervals import Interval, proportion
from dalleflamingo.evaluation.similarities import load_image_similarities
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.annotators import ANNOTATORS, FACTS
from dalleflamingo.miniature.corpora import HARD_NEGATIVE_FORMS, is_held_out
from dalleflamingo.miniature.planted import planted_captions
from dalleflamingo.miniature.world import sample_scene
from dalleflamingo.reconstruct import JourneySettings, run_journey
from dalleflamingo.research import fresh, pages
from dalleflamingo.research.metrics import check_similarities, ranking_label
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import rows_of, similarities
from dalleflamingo.research.stability import FixedCaptions, RerenderJourney
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import Similarity
from dalleflamingo.sources.models import load_generator

SCENES = 300
TRUTH = "none"  # the error of the first caption
ERRORS = (TRUTH, *FACTS)
FIRST = "first of five"
CHANCE = {FIRST: 1 / len(ERRORS)} | dict.fromkeys(FACTS, 1 / 2)  # what is counted -> the share that chance has
SUBSETS = {  # of the scenes: name -> column and value that they have; None: all
    "all": None,
    "things of the hard negatives": ("things_held_out", False),
    "things held out from them": ("things_held_out", True),
    "sentence forms of the hard negatives": ("form_held_out", False),
    "sentence forms held out from them": ("form_held_out", True),
}
_CHUNK = 16  # scenes finished together: 16 · 5 captions fill whole batches of 16


def plant(n: int, seed: int) -> tuple[Dataset, pd.DataFrame]:
    """Scenes of two things of all kinds, and five captions of each in the words of a random annotator.

    Args:
        n: scenes.
        seed: of all of them.
    Returns:
        the scenes, not drawn yet, each with its true caption; a row for each scene × caption:
            image_id; candidate, 0 … 4; error, of `ERRORS`, the truth first; caption; form, of `annotators.Annotator`;
            things_held_out: a true thing is of a pair of kind and colour that CLIP's hard negatives never had;
            form_held_out: they never had that sentence form either.
    """
    examples, rows = [], []
    for i in range(n):
        rng = fresh.generator_of(seed, "planted", i)
        scene, annotator = sample_scene(rng, count=2), ANNOTATORS[rng.integers(len(ANNOTATORS))]
        form = annotator.forms[rng.integers(len(annotator.forms))]
        captions = planted_captions(scene, replace(annotator, forms=(form,)), rng)
        examples.append(fresh.example(i, scene, captions[:1]))
        of_scene = {
            "form": form,
            "things_held_out": any(map(is_held_out, scene.things)),
            "form_held_out": form not in HARD_NEGATIVE_FORMS,
        }
        for candidate, (error, caption) in enumerate(zip(ERRORS, captions, strict=True)):
            rows.append({"image_id": i, "candidate": candidate, "error": error, "caption": caption} | of_scene)
    return Dataset(f"planted errors, seed {seed}", tuple(examples)), pd.DataFrame(rows)


def planted_errors(
    n: int,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: Path,
    settings: JourneySettings,
) -> pd.DataFrame:
    """Planted captions rendered and compared with the drawn scene; a run that was interrupted goes on.

    Args:
        n: scenes of two things.
        generator: that renders.
        similarities: of images.
        run_folder: of the images.
        settings: how images are generated; its seed is that of the scenes, too.
    Returns:
        the table of `plant` with the columns seed, noise_seed and image (as `reconstruct.image_text_image`) and one for
        each similarity.
    Raises:
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
        RunFolderError: run_folder was made with other settings or another generator.
    """
    check_similarities(similarities, "image")
    dataset, captions = plant(n, settings.seed)
    dataset = fresh.with_images(dataset, Path(run_folder) / "sources")
    of_images = captions.groupby("image_id")["caption"].agg(list).to_dict()
    settings = replace(settings, candidates=len(ERRORS))
    journey = RerenderJourney(FixedCaptions(of_images), generator, similarities, settings)
    rendered = run_journey(journey, dataset, run_folder, _CHUNK).drop(columns=["file", "digest", "domain", "caption"])
    return captions.merge(rendered, on=["image_id", "candidate"], validate="1:1")


def nearer(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Whether the image of the true caption is nearer than that of each error, strictly: of equals none is nearer.

    Args:
        table: of `planted_errors`, with the same five errors for each scene.
        by: a similarity.
    Returns:
        a row for each scene, a column of booleans for each error and `FIRST`, where it is nearer than all.
    """
    rows, _ = rows_of(table)
    values, errors = table[by].to_numpy()[rows], table["error"].to_numpy()[rows[0]]
    truth = values[:, errors == TRUTH]
    found = pd.DataFrame({fact: truth[:, 0] > values[:, errors == fact][:, 0] for fact in FACTS})
    return found.assign(**{FIRST: found.all(axis=1)})[list(CHANCE)]


def count_found(table: pd.DataFrame) -> pd.DataFrame:
    """How often the truth is nearest, and nearer than each error, by each similarity of a table.

    Args:
        table: of `planted_errors`.
    Returns:
        columns ranked_by, scenes (of `SUBSETS`; those that no scene is in are left out), nearer_than (`FIRST` or an
        error), value, low, high (Wilson's interval over scenes) and n.
    """
    rows, _ = rows_of(table)
    of_scene = table.iloc[rows[:, 0]].reset_index(drop=True)
    found = []
    for by in similarities(table):
        is_nearer = nearer(table, by)
        for name, chosen in SUBSETS.items():
            part = is_nearer if chosen is None else is_nearer[of_scene[chosen[0]] == chosen[1]]
            for than in CHANCE if len(part) else ():
                share = proportion(int(part[than].sum()), len(part))
                found.append({"ranked_by": by, "scenes": name, "nearer_than": than} | share.as_row())
    return pd.DataFrame(found).drop(columns="seed")


def shares_of(counted: pd.DataFrame, scenes: str = "all") -> dict[str, dict[str, Interval]]:
    """Similarity -> `FIRST` or an error -> share.

    Args:
        counted: of `count_found`.
        scenes: of `SUBSETS`.
    """
    part = counted[counted["scenes"] == scenes]
    return {
        by: {row["nearer_than"]: Interval.from_row(row) for row in rows.to_dict("records")}
        for by, rows in part.groupby("ranked_by", sort=False)
    }


def figure(counted: pd.DataFrame) -> Figure:
    """How often the truth is found, of all five and against each error.

    Args:
        counted: of `count_found`.
    """
    found = shares_of(counted)
    n = next(iter(next(iter(found.values())).values())).n
    names = {than: than if than == FIRST else f"wrong {than}" for than in CHANCE}
    labelled = {by: {names[than]: share for than, share in row.items()} for by, row in found.items()}
    note = (
        "How often the image of the true caption is more like the original than those of captions with one planted "
        f"error, from the same noise. Bars are 95 % intervals over n = {n} scenes."
    )
    chance = {names[than]: share for than, share in CHANCE.items()}
    return show.shares(labelled, chance, "scenes where the truth is nearer", note)


def page(counted: pd.DataFrame, made: Provenance) -> list[str]:
    """The parts of the page in Markdown.

    Args:
        counted: of `count_found`.
        made: how it was measured.
    """
    parts = [
        "# Planted errors",
        pages.measured_on(profiles.current().dataset, "; the paper has no such experiment"),
        f"n = {counted['n'].max()} fresh scenes of two things (seed {made.seed}). Each has a true caption and four "
        "with one wrong fact, in the same words where they agree. The five are rendered from the same noise "
        f"({made.steps} steps, guidance {made.guidance_scale}) and compared with the drawn scene. Of equal images none "
        f"is nearer. Made by `{made.command}` at commit `{made.commit}`. Brackets are Wilson's 95 % intervals over "
        "scenes.",
        "![How often the true caption's image is nearest](../figures/planted.png)",
        "Chance finds the truth first of five in 20 %, and nearer than one error in 50 % of the scenes.",
    ]
    header = ["ranked by", "n", FIRST, *(f"nearer than wrong {fact}" for fact in FACTS)]
    for scenes in counted["scenes"].unique():
        rows = [
            [ranking_label(by), str(row[FIRST].n), *(pages.cell(share, 2) for share in row.values())]
            for by, row in shares_of(counted, scenes).items()
        ]
        parts += [f"## Scenes: {scenes}", pages.table(header, rows)]
    return [
        *parts,
        "*Things held out*: at least one of the two is of a pair of kind and colour, one pair in eight, that no group "
        "of hard negatives had when CLIP was trained. *Sentence forms held out*: those that no group had.",
        "Every caption with its image's similarities: [planted.parquet](planted.parquet). Every number: "
        "[planted.csv](planted.csv).",
    ]


def write(docs: Path, table: pd.DataFrame, made: Provenance) -> pd.DataFrame:
    """results/planted.parquet, planted.csv, planted.md and figures/planted.png; returns what was counted.

    Args:
        docs: has results/ and figures/; created if missing.
        table: of `planted_errors`.
        made: how it was measured.
    """
    folder, counted = docs / "results", count_found(table)
    folder.mkdir(parents=True, exist_ok=True)
    stamped = table.copy()
    stamped.attrs = made.as_attrs()
    write_whole(folder / "planted.parquet", lambda path: stamped.to_parquet(path, index=False))
    write_whole(folder / "planted.csv", lambda path: counted.round(5).to_csv(path, index=False))
    show.write_png(figure(counted), docs / "figures" / "planted.png")
    pages.write_page(folder / "planted.md", page(counted, made))
    return counted


def main(arguments: list[str]) -> int:
    """Planted errors: do CLIP, DINO and image fidelity find the true one of five captions?

    Draw fresh scenes, plant one error of each sort in their captions, render all from the same noise, and count how
    often the image of the true caption is most like the scene.
    """
    parser = study_parser("planted", main.__doc__)
    parser.add_argument("--n", type=positive, default=SCENES, help=f"scenes of two things; default: {SCENES}")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of noise; default: 0")
    options = parse(parser, arguments)
    profile = profiles.current()
    settings = JourneySettings.of(profile, candidates=len(ERRORS), seed=options.seed)
    generator, encoders = load_generator(profile), load_image_similarities(profile)
    folder = options.runs / f"planted-{options.seed}-of-{options.n}"
    table = planted_errors(options.n, generator, encoders, folder, settings)
    command = f"{parser.prog} --n {options.n} --seed {options.seed}"
    dataset = Dataset(f"planted errors, seed {options.seed}", ())
    made = Provenance.of(command, dataset, generator, settings, ranked=len(ERRORS), sampling="planted", resamples=0)
    counted = write(options.docs, table, made)
    for by, row in shares_of(counted).items():
        print(f"{by}: {FIRST} {row[FIRST]}", *(f"{fact} {row[fact]}" for fact in FACTS), sep="\n  nearer than wrong ")
    return 0
