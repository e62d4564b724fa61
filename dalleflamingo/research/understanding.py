"""Do they understand each other? Every captioner with every generator, there and back: the question of the title.

    python -m dalleflamingo research understanding --images 200

Image → text → image: how similar is the image that the generator makes of the captioner's caption to the original?
Text → image → text: how similar is what the captioner says of the generator's image to the caption that it was made of?
A cosine says little by itself, so each result is also compared with another image, or caption, of the data set. A pair
understands each other where, in both directions, what comes back is more similar to its own source than to another one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from matplotlib.figure import Figure

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.commands.parsers import positive
from dalleflamingo.course import matrix, show
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.intervals import Interval, mean_interval
from dalleflamingo.evaluation.similarities import load_image_similarities, load_text_similarities
from dalleflamingo.evaluation.workers import CHUNK, open_run
from dalleflamingo.generator import Generator
from dalleflamingo.reconstruct import ImageTextImage, Journey, JourneySettings, TextImageText, run_journey
from dalleflamingo.research import pages
from dalleflamingo.research.metrics import check_similarities, ranking_label
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import Similarity
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_generator

CANDIDATES = 2  # captions of an image, and images of a caption; a pair's similarity is their mean
PRIMARY = {ImageTextImage.name: "clip", TextImageText.name: "text_clip"}  # direction -> similarity that decides
PAIR = ["captioner", "generator"]
_CELL = ["direction", "similarity", *PAIR]


def mutual_understanding(
    captioners: Mapping[str, Callable[[], Captioner]],
    generators: Mapping[str, Callable[[], Generator]],
    dataset: Dataset,
    image_similarities: Sequence[Similarity],
    text_similarities: Sequence[Similarity],
    run_folder: Path,
    settings: JourneySettings,
) -> pd.DataFrame:
    """Both journeys of every pair; a study that was interrupted goes on.

    Args:
        captioners: name -> opens the captioner, so that no more than one is in memory.
        generators: likewise.
        dataset: of images with captions, two or more.
        image_similarities: of image → text → image.
        text_similarities: of text → image → text.
        run_folder: of the runs, one for each pair and direction.
        settings: of both journeys.
    Returns:
        a row for each direction × similarity × pair × image: captioner; generator; image_id; own, the similarity to
        the source, mean over candidates; another, that to the source of the next image of the data set.
    Raises:
        ValueError: the data set has a single image, or as `reconstruct.image_text_image`.
        RunFolderError, DatasetError: as `reconstruct.image_text_image`.
    """
    found = []
    for captioner_name, open_captioner in captioners.items():
        captioner = open_captioner()
        for generator_name, open_generator in generators.items():
            generator, folder = open_generator(), f"{quote(captioner_name, safe='')} {quote(generator_name, safe='')}"
            for kind, similarities in ((ImageTextImage, image_similarities), (TextImageText, text_similarities)):
                journey = kind(captioner, generator, similarities, settings)
                measured = measure_journey(journey, dataset, Path(run_folder) / folder / kind.__name__)
                found.append(measured.assign(captioner=captioner_name, generator=generator_name))
            del generator  # before the next one is opened
        del captioner
    return pd.concat(found, ignore_index=True)[[*_CELL, "image_id", "own", "another"]]


def measure_journey(journey: Journey, dataset: Dataset, run_folder: Path) -> pd.DataFrame:
    """The rows of one pair and direction, as of `mutual_understanding`, without the pair's names."""
    table = run_journey(journey, dataset, run_folder, CHUNK)
    names = [similarity.name for similarity in journey.similarities]
    ids = list(dict.fromkeys(table["image_id"]))
    if len(ids) < 2:
        raise ValueError("what comes back is compared with another source, too: take two images or more")
    examples, run = {one.image_id: one for one in dataset}, open_run(journey, dataset, run_folder)
    rows = {image_id: group.to_dict("records") for image_id, group in table.groupby("image_id")}
    following, others = dict(zip(ids, [*ids[1:], ids[0]], strict=True)), {name: [] for name in names}
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        sources = [journey.open_source(dataset, examples[following[image_id]]) for image_id in part]
        for similarity in journey.similarities:
            others[similarity.name] += journey.compare(similarity, sources, [rows[one] for one in part], run)
    parts = []
    for name in names:
        values = pd.DataFrame({"image_id": table["image_id"], "own": table[name], "another": others[name]})
        means = values.groupby("image_id", sort=False).mean().reset_index()
        parts.append(means.assign(direction=journey.name, similarity=name))
    return pd.concat(parts, ignore_index=True)


def understanding_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of the matrix, with intervals over images.

    Args:
        table: of `mutual_understanding`.
    Returns:
        a row for each direction × similarity × pair: another; the columns of `Interval.as_row` of own ("own_…"), of own
        − another ("gain_…"), and of own − that of the first pair on the same images ("minus_first_…").
    """
    rows = []
    for (direction, similarity), part in table.groupby(_CELL[:2], sort=False):
        own, first = part.pivot(index="image_id", columns=PAIR, values="own"), None
        for pair, cell in part.groupby(PAIR, sort=False):
            first = pair if first is None else first
            difference = (own[pair] - own[first]).dropna()  # a generator may skip captions that another one can read
            row = dict(zip(_CELL, (direction, similarity, *pair), strict=True)) | {"another": cell["another"].mean()}
            row |= mean_interval((cell["own"] - cell["another"]).to_numpy()).as_row("gain_")
            row |= mean_interval(difference.to_numpy()).as_row("minus_first_")
            rows.append(row | mean_interval(cell["own"].to_numpy()).as_row("own_"))
    return pd.DataFrame(rows)


def pairs_that_understand(cells: pd.DataFrame) -> list[tuple[str, str]]:
    """Those whose interval of own − another lies above 0 by the primary similarity of both directions."""
    decides = cells["similarity"] == cells["direction"].map(PRIMARY)
    by_pair = cells[decides].groupby(PAIR, sort=False)
    return [pair for pair, both in by_pair if len(both) == len(PRIMARY) and (both["gain_low"] > 0).all()]


# ── page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def figure(cells: pd.DataFrame) -> Figure:
    """A heat map for each direction, by its primary similarity."""
    panels = []
    for direction, similarity in PRIMARY.items():
        part = cells[(cells["direction"] == direction) & (cells["similarity"] == similarity)].to_dict("records")
        own = {(row["captioner"], row["generator"]): Interval.from_row(row, "own_") for row in part}
        another = {(row["captioner"], row["generator"]): row["another"] for row in part}
        panels.append(matrix.Panel(f"{direction}, by {ranking_label(similarity)}", own, another))
    return matrix.heat_maps(
        panels,
        "How similar what comes back is to its source: mean and 95 % interval. Below, how similar it is to another "
        "source. The darker the cell, the larger the difference.",
    )


def page(cells: pd.DataFrame, dataset: Dataset, settings: JourneySettings, command: str) -> list[str]:
    """The parts of the page in Markdown."""
    understood, pairs = pairs_that_understand(cells), cells[PAIR].drop_duplicates()
    parts = [
        "# Who understands whom?",
        pages.measured_on(dataset.name, "; the paper has no such table"),
        f"n = {len(dataset)} images and as many captions, {settings.candidates} candidates of each (seed "
        f"{settings.seed}, {settings.steps} steps, guidance {settings.guidance_scale}). "
        f"{pages.made_by(command, pages.current_commit())}",
        "![The similarity of what comes back, for each pair of models](../figures/understanding.png)",
        f"By the similarities that decide ({', '.join(map(ranking_label, PRIMARY.values()))}), {len(understood)} of "
        f"{len(pairs)} pairs understand each other in both directions: what comes back is more similar to its own "
        "source than to another one, and the interval of the difference lies above 0. "
        "[The protocol](../protocol.md#who-understands-whom) declared this before the run.",
    ]
    header = ["captioner", "generator", "own source", "another", "own − another", "own − that of the first pair"]
    for (direction, similarity), part in cells.groupby(_CELL[:2], sort=False):
        digits = 1 if similarity == "fidelity" else 3  # a distance in the hundreds
        rows = [
            [
                row["captioner"],
                row["generator"],
                pages.cell(Interval.from_row(row, "own_"), digits),
                f"{row['another']:.{digits}f}",
                pages.cell(Interval.from_row(row, "gain_"), digits, signed=True),
                pages.cell(Interval.from_row(row, "minus_first_"), digits, signed=True) if i else "",
            ]
            for i, row in enumerate(part.to_dict("records"))
        ]
        parts += [f"## {direction}, by {ranking_label(similarity)}", pages.table(header, rows)]
    return [
        *parts,
        "Every number: [understanding.csv](understanding.csv); of every image: "
        "[understanding.parquet](understanding.parquet).",
    ]


def main(arguments: list[str]) -> int:
    """Who understands whom: every captioner with every generator, in both directions.

    Send images and captions there and back through every pair of models, and compare what comes back with its source.
    """
    parser = study_parser("understanding", main.__doc__)
    parser.add_argument("--images", type=positive, default=200, help="and as many captions; default: 200")
    parser.add_argument(
        "--captioners", nargs="+", metavar="NAME", help="of dalleflamingo/registry.toml; default: the profile's"
    )
    parser.add_argument("--generators", nargs="+", metavar="NAME", help="likewise")
    options = parse(parser, arguments)
    profile = profiles.current()
    captioners = options.captioners or profile.captioners
    generators = options.generators or [name for name in (profile.generator, profile.other_generator) if name]
    everything = registered.load_dataset(profile.dataset)
    dataset, settings = everything.subset(options.images), JourneySettings.of(profile, candidates=CANDIDATES)
    images = load_image_similarities(profile)
    texts = load_text_similarities(profile, {example.image_id: example.references for example in everything})
    check_similarities(images, "image")
    check_similarities(texts, "text")
    table = mutual_understanding(
        {_label(name, "captioner"): partial(load_captioner, profile, name) for name in captioners},
        {_label(name, "generator"): partial(load_generator, profile, name) for name in generators},
        dataset,
        images,
        texts,
        options.runs / "understanding",
        settings,
    )
    named = [
        f" --{what} {' '.join(names)}" for what in ("captioners", "generators") if (names := getattr(options, what))
    ]
    command = f"{parser.prog} --images {options.images}{''.join(named)}"
    cells = write(options.docs, table, dataset, settings, command)
    for captioner, generator in pairs_that_understand(cells):
        print(f"{captioner} and {generator} understand each other in both directions")
    print(f"{options.docs}/results/understanding.md, with its table and figure")
    return 0


def write(docs: Path, table: pd.DataFrame, dataset: Dataset, settings: JourneySettings, command: str) -> pd.DataFrame:
    """results/understanding.parquet, .csv and .md, and figures/understanding.png; returns the matrix.

    Args:
        docs: has results/ and figures/; created if missing.
        table: of `mutual_understanding`.
        dataset: of the runs.
        settings: of the journeys.
        command: that measured it.
    """
    folder, cells = docs / "results", understanding_matrix(table)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "understanding.parquet", lambda path: table.to_parquet(path, index=False))
    write_whole(folder / "understanding.csv", lambda path: cells.round(5).to_csv(path, index=False))
    show.write_png(figure(cells), docs / "figures" / "understanding.png")
    pages.write_page(folder / "understanding.md", page(cells, dataset, settings, command))
    return cells


def _label(name: str, kind: str) -> str:
    """How the page calls a model of the registry; a RegistryError where there is none of that kind."""
    return registry.require_kind(name, kind).label or name
