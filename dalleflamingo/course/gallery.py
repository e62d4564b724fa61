"""A page of a run for people: every input with its candidates, ranked by a similarity, the best inputs first or last.

The folder is complete in itself: pages of plain HTML without scripts, and small copies of all images. It opens from a
disk, a memory stick or any web server, and asks nothing of the network.

    index.html, best-2.html, …   inputs whose best candidate is most similar first
    worst-1.html, worst-2.html … the same from the other end: what was not understood
    unread.html                  inputs that could not be read, with the reason
    images/
"""

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo.adapters.safety import SafetyChecker
from dalleflamingo.course.show import label
from dalleflamingo.datasets import Dataset, DatasetError, UnreadableImage, digest_of_file, open_image
from dalleflamingo.evaluation.similarities import similarities_among
from dalleflamingo.reconstruct import rank
from dalleflamingo.runs import printable
from dalleflamingo.sources.shards import new_folder

PER_PAGE = 24  # inputs
SIZE = 384  # longest side of a copied image, in pixels: 192 on a screen with two to each
_SMALL = 128  # images up to this side are shown with their pixels as squares


def write_gallery(
    folder: str | Path,
    table: pd.DataFrame,
    run_folder: str | Path,
    by: str,
    images: Dataset | None = None,
    skipped: Sequence[dict] = (),
) -> Path:
    """Write the pages of a run.

    Args:
        folder: new or empty; it appears when it is complete.
        table: of candidates, as a journey of `reconstruct` returns it.
        run_folder: where the table's image paths start.
        by: the similarity that ranks candidates and inputs, a column of the table.
        images: the data set of an image → text → image run, whose images are shown as inputs; None: not shown.
        skipped: inputs that could not be read, as {"image_id", "path", "reason"}.
    Returns:
        the first page, `folder/index.html`.
    Raises:
        DatasetError: the folder holds files, or a generated image is missing.
        KeyError, ValueError: as `reconstruct.rank`.
    """
    ranked = rank(table, by)
    best = ranked[ranked["rank"] == 1].sort_values(by, ascending=False, kind="stable")
    first_to_last = best["image_id"].tolist()
    inputs = {} if images is None else {example.image_id: example for example in images}
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = templates.get_template("gallery.html")
    shared = {
        "run": clean(printable(Path(run_folder).resolve().name)),
        "by": label(by),
        "of_texts": "recovered" in table,
        "inputs": len(first_to_last),
        "candidates": int(ranked.groupby("image_id").size().max()),
        "settings": _settings(Path(run_folder)),
        "unread": len(skipped),
    }
    with new_folder(folder) as part:
        (part / "images").mkdir()
        groups = dict(list(ranked.sort_values("rank", kind="stable").groupby("image_id", sort=False)))
        items = {}
        for place, image_id in enumerate(tqdm(first_to_last, "images", unit="input"), start=1):
            rows = groups[image_id].to_dict("records")
            items[image_id] = _item(place, rows, by, inputs.get(image_id), Path(run_folder), part)
        for order, ids in (("best", first_to_last), ("worst", first_to_last[::-1])):
            pages = [ids[start : start + PER_PAGE] for start in range(0, len(ids), PER_PAGE)]
            for number, members in enumerate(pages, start=1):
                page = {"order": order, "number": number, "pages": len(pages), "link": page_name}
                text = template.render(shared, page=page, items=[items[image_id] for image_id in members])
                (part / page_name(order, number)).write_text(text, encoding="utf-8")
        if skipped:
            page = {"order": "unread", "number": 1, "pages": 1, "link": page_name}
            reasons = [{"name": clean(Path(one["path"]).name), "reason": clean(one["reason"])} for one in skipped]
            text = template.render(shared, page=page, items=reasons)
            (part / page_name("unread", 1)).write_text(text, encoding="utf-8")
    return Path(folder) / "index.html"


def page_name(order: str, number: int) -> str:
    """The file of a page: the first with the best inputs is index.html."""
    if order == "unread":
        return "unread.html"
    return "index.html" if (order, number) == ("best", 1) else f"{order}-{number}.html"


def generated_image(run_folder: str | Path, name: str) -> Path:
    """The path of a generated image that a table names.

    Raises:
        DatasetError: it is missing, or outside the run folder.
    """
    root = os.path.abspath(run_folder)
    path = Path(os.path.normpath(os.path.join(root, name)))
    if not path.is_relative_to(root):
        raise DatasetError(f"the table names {printable(name)}, outside of {printable(run_folder)}: is it another's?")
    if not path.is_file():
        raise DatasetError(
            f"the generated image {printable(path)} is missing: give the command reconstruct again, it makes it again"
        )
    return path


def clean(text: object) -> str:
    """A text that a page can hold: control characters and halves of surrogate pairs are replaced."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in str(text))


def _item(place: int, rows: list[dict], by: str, example, run_folder: Path, part: Path) -> dict:
    """What the page says of an input: the images are copied."""
    first, similarities = rows[0], sorted(similarities_among(rows[0]), key=lambda name: name != by)
    of_texts = "recovered" in first
    name = first["caption"] if of_texts else first["file"]
    source, reason = None, ""
    if not of_texts:
        source, reason = _input(example, first, part)
    candidates = []
    for row in rows:
        text = clean(row["recovered"] if of_texts else row["caption"])
        path = generated_image(run_folder, row["image"])
        candidates.append(
            {
                "rank": row["rank"],
                "text": text,
                "image": _copy(open_image(path), part / "images" / f"{row['image_id']}-{row['candidate']}"),
                "scores": [(label(name), _number(row[name])) for name in similarities],
                "flagged": row.get(SafetyChecker.name) == 1,
            }
        )
    return {
        "place": place,
        "name": clean(name),
        "domain": first["domain"] if isinstance(first["domain"], str) else "",
        "source": source,
        "reason": clean(reason),
        "references": [clean(caption) for caption in example.references] if example and not of_texts else [],
        "score": _number(first[by]),
        "candidates": candidates,
    }


def _input(example, row: dict, part: Path) -> tuple[dict | None, str]:
    """The copied input image, or None with the reason why it is not shown."""
    if example is None:
        return None, "the input image is not at hand"
    try:
        if digest_of_file(example.path) != row["digest"]:
            return None, "the input image was replaced since the run"
        return _copy(open_image(example.path), part / "images" / f"{row['image_id']}-input"), ""
    except UnreadableImage as error:
        return None, error.reason


def _copy(image: Image.Image, stem: Path) -> dict:
    """Save an image, made smaller if it is large; what the page needs to show it."""
    if max(image.size) <= _SMALL:
        path = stem.with_suffix(".png")
        image.save(path, optimize=True)
    else:
        path = stem.with_suffix(".jpg")
        image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        image.save(path, quality=85)
    squares = max(image.size) <= _SMALL
    return {"path": f"images/{path.name}", "width": image.width, "height": image.height, "squares": squares}


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _settings(run_folder: Path) -> list[tuple[str, str]]:
    """The run's settings, name and value, from its run.json; none where that is not there."""
    try:
        settings = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["settings"]
        return [(clean(name).replace("_", " "), clean(value)) for name, value in settings.items()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
