"""What leaves a run: COCO results that pycocotools takes, shards, and a page that is complete in itself."""

import contextlib
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import fakes
import pandas as pd
import pytest
import webdataset
from PIL import Image
from pycocoevalcap.eval import COCOEvalCap
from pycocotools.coco import COCO
from test_command_line import models, run  # noqa: F401, a fixture
from test_shards import picture, tar

from dalleflamingo import __main__ as command_line
from dalleflamingo.course.gallery import PER_PAGE, write_gallery
from dalleflamingo.datasets import Dataset, DatasetError
from dalleflamingo.evaluation.caption_results import read_results
from dalleflamingo.reconstruct import select

ODD = """<script>alert('1')</script> & "quoted" <img src=x onerror=alert(2)> {{ 7 * 7 }} \ud83d\0 łódź 🚣 עברית"""


class Page(HTMLParser):
    """The start tags, links and visible text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def finished(tmp_path):
    """(data set, table, run folder) of image → text → image with an image that is damaged."""
    dataset = fakes.dataset(tmp_path / "mine", 7)
    (tmp_path / "mine/3.png").write_bytes(b"no image")
    with contextlib.redirect_stderr(io.StringIO()):
        return dataset, fakes.run(tmp_path / "run", tmp_path / "mine", n=7), tmp_path / "run"


def call(*arguments: object) -> int:
    return command_line.main(["export", *map(str, arguments)])


# ── COCO results ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pycocotools_takes_the_results_and_scores_all_of_the_split(finished, tmp_path, capsys):
    dataset, table, folder = finished
    assert call(folder, "--by", "corner", "--coco-results", tmp_path / "out/results.json") == 0
    out = capsys.readouterr().out
    assert "6 captions, one an image, ranked first by corner" in out and "1 images could not be read" in out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert all(type(one["image_id"]) is int and type(one["caption"]) is str for one in results)
    assert all(set(one) == {"image_id", "caption"} for one in results)
    best = select(table, by="corner")
    assert read_results(tmp_path / "out/results.json") == dict(zip(best.image_id, best.caption, strict=True))

    split = [example for example in dataset if example.path.name != "3.png"]
    truth = {
        "images": [{"id": example.image_id} for example in split],
        "annotations": [{"id": i, "image_id": e.image_id, "caption": e.references[0]} for i, e in enumerate(split)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    coco = COCO(str(tmp_path / "truth.json"))
    found = coco.loadRes(str(tmp_path / "out/results.json"))
    assert sorted(found.getImgIds()) == sorted(coco.getImgIds()) and len(found.anns) == len(split)
    assert COCOEvalCap(coco, found).params["image_id"] == coco.getImgIds()


def test_ids_of_coco_and_nocaps_reach_the_results(models, tmp_path):  # noqa: F811
    images = [{"id": i, "file_name": f"{number}.png"} for number, i in enumerate((0, 397133, 2**53 + 1))]
    (tmp_path / "split.json").write_text(json.dumps({"images": images, "annotations": []}))
    arguments = ["reconstruct", tmp_path / "split.json", "--from", "images", "--image-folder", tmp_path / "mine"]
    assert command_line.main(list(map(str, [*arguments, "--out", tmp_path / "run"]))) == 0
    assert call(tmp_path / "run", "--coco-results", tmp_path / "results.json") == 0
    assert [one["image_id"] for one in json.loads((tmp_path / "results.json").read_text())] == [0, 397133, 2**53 + 1]


# ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_hold_every_generated_image_with_its_row(finished, tmp_path):
    _, table, folder = finished
    table.loc[table.index[0], "corner"] = float("nan")
    table.to_parquet(folder / "candidates.parquet")
    assert call(folder, "--by", "colour", "--shards", tmp_path / "out") == 0
    [path] = (tmp_path / "out").iterdir()
    read = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(read) == len({one["__key__"] for one in read}) == len(table)
    for one, row in zip(read, table.to_dict("records"), strict=True):
        assert one["png"] == (folder / row["image"]).read_bytes() and one["txt"].decode() == row["caption"]
        values = json.loads(one["json"], parse_constant=pytest.fail)  # NaN is no JSON
        assert (values["source_id"], values["candidate"], values["seed"]) == tuple(
            row[name] for name in ("image_id", "candidate", "seed")
        )
    assert json.loads(read[0]["json"])["corner"] is None
    assert [json.loads(one["json"])["rank"] for one in read[:3]] != [0, 0, 0]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_whole(folder: Path) -> list[Page]:
    """Every page's links and images are files of the folder, every image has a text, and nothing is a script."""
    pages = []
    for path in sorted(folder.glob("*.html")):
        page = Page(path)
        assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "link", "base"} == set()
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        targets = [a["href"] for a in page.all("a")] + [image["src"] for image in page.all("img")]
        for target in targets:
            assert ":" not in target and not target.startswith("/"), target
            assert target.startswith("#") or (folder / target).is_file(), target
        assert all(image["alt"].strip() and image["loading"] == "lazy" for image in page.all("img"))
        for image in page.all("img"):
            assert Image.open(folder / image["src"]).size == (int(image["width"]), int(image["height"]))
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) and page.all("html")[0]["lang"] == "en" and page.all("main")
        assert not re.search(r"url\(|@import|https?:", path.read_text(encoding="utf-8"))
        pages.append(page)
    return pages


def order_of(page: Page) -> list[str]:
    return re.findall(r"\d+\. *(\d+\.png)", page.text)


def test_inputs_are_ranked_from_both_ends_with_their_candidates(finished, tmp_path):
    dataset, table, folder = finished
    write_gallery(tmp_path / "page", table, folder, "colour", dataset, table.attrs["skipped"])
    check_whole(tmp_path / "page")
    best, worst = Page(tmp_path / "page/index.html"), Page(tmp_path / "page/worst-1.html")
    expected = select(table, by="colour").sort_values("colour", ascending=False).file.tolist()
    assert order_of(best) == expected and order_of(worst) == expected[::-1]
    first = table[table.file == expected[0]].sort_values("colour", ascending=False)
    alts = [image["alt"] for image in best.all("img")]
    assert alts[0] == f"Input image {expected[0]}: a thing {first.image_id.iloc[0]}"
    assert alts[1:4] == [f"Image generated from: {caption}" for caption in first.caption]
    shown = Image.open(tmp_path / "page" / best.all("img")[1]["src"])
    assert shown.tobytes() == Image.open(folder / first.image.iloc[0]).tobytes()
    unread = Page(tmp_path / "page/unread.html")
    assert "3.png" in unread.text and "Pillow knows no image format" in unread.text
    assert "n = 6 images" in " ".join(best.text.split())


def test_captions_with_their_images_make_a_page_too(tmp_path):
    with contextlib.redirect_stderr(io.StringIO()):
        table = fakes.run_texts(tmp_path / "run", tmp_path / "mine", n=4)
    write_gallery(tmp_path / "page", table, tmp_path / "run", "letters")
    [page, _] = check_whole(tmp_path / "page")
    assert "text → image → text" in page.text and "unread" not in str(page.all("a"))
    assert sorted(image["alt"] for image in page.all("img")) == sorted(
        f"Generated image, described as: {text}" for text in table.recovered
    )


def test_nothing_that_a_caption_or_a_name_says_is_markup(finished, tmp_path):
    dataset, table, folder = finished
    text = ODD.replace("\ud83d", "")  # a table holds no halves of surrogate pairs
    table = table.assign(caption=text, file=text, domain=text).rename(columns={"corner": "<b>corner</b>"})
    odd = Dataset("odd", tuple(dataclasses.replace(e, references=(ODD, " ")) for e in dataset))
    write_gallery(tmp_path / "page", table, folder, "<b>corner</b>", odd, [{"path": f"a/{ODD}", "reason": ODD}])
    pages = check_whole(tmp_path / "page")
    for page in pages:
        assert "<script>alert('1')</script> & \"quoted\" <img src=x onerror=alert(2)> {{ 7 * 7 }}" in page.text
        assert "łódź 🚣 עברית" in page.text and not page.all("b")
    assert all(image["src"].startswith("images/") for page in pages for image in page.all("img"))


@pytest.mark.parametrize("n", [1, PER_PAGE, PER_PAGE + 1, 3 * PER_PAGE - 1])
def test_pages_hold_every_input_once_and_lead_to_each_other(tmp_path, n):
    with contextlib.redirect_stderr(io.StringIO()):
        table = fakes.run_texts(tmp_path / "run", tmp_path / "mine", n=min(n, 60))
    table = pd.concat([table.assign(image_id=table.image_id + 1000 * i) for i in range(2)]) if n > 60 else table
    table = table[table.image_id.isin(table.image_id.unique()[:n])]
    write_gallery(tmp_path / "page", table, tmp_path / "run", "letters")
    check_whole(tmp_path / "page")
    for start in ("index.html", "worst-1.html"):
        name, places = start, []
        while name:
            page = Page(tmp_path / "page" / name)
            places += [a["id"] for a in page.all("h2")]
            name = next((a["href"] for a in page.all("a") if a.get("rel") == "next"), None)
        assert len(places) == len(set(places)) == n
    assert len(list((tmp_path / "page").glob("*.html"))) == 2 * -(-n // PER_PAGE)


def test_large_images_are_made_smaller_and_replaced_or_lost_inputs_are_said(tmp_path):
    dataset = fakes.dataset(tmp_path / "mine", 3)
    Image.linear_gradient("L").resize((900, 600)).convert("RGB").save(dataset[0].path)
    with contextlib.redirect_stderr(io.StringIO()):
        table = fakes.image_text_image(
            dataset, fakes.Captioner(), fakes.Generator(), [fakes.MeanColour()], tmp_path / "r"
        )
    Image.new("RGB", (16, 16)).save(dataset[1].path)
    dataset[2].path.unlink()
    write_gallery(tmp_path / "page", table, tmp_path / "r", "colour", dataset)
    page = Page(tmp_path / "page/index.html")
    sizes = [(image["width"], image["height"]) for image in page.all("img") if image["alt"].startswith("Input")]
    assert sizes == [("384", "256")]
    assert "replaced since the run" in page.text and "there is no such file" in page.text
    write_gallery(tmp_path / "without", table, tmp_path / "r", "colour")
    assert Page(tmp_path / "without/index.html").text.count("not at hand") == 3
    (tmp_path / "r" / table.image[0]).unlink()
    with pytest.raises(DatasetError, match="is missing: give the command reconstruct again"):
        write_gallery(tmp_path / "other", table, tmp_path / "r", "colour")
    assert not (tmp_path / "other").exists()


def test_a_table_that_names_files_elsewhere_is_refused(finished, tmp_path):
    _, table, folder = finished
    (tmp_path / "secret.png").write_bytes(picture())
    with pytest.raises(DatasetError, match="outside of"):
        write_gallery(tmp_path / "page", table.assign(image="../secret.png"), folder, "colour")


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name what to make: --gallery DIR, --coco-results FILE or --shards DIR"),
        (["run", "--by", "clip", "--gallery", "out"], "no similarity clip: it has colour, corner"),
        (["nowhere", "--gallery", "out"], "nowhere holds no run"),
        (["begun", "--gallery", "out"], "begun is not finished: give its command reconstruct again"),
        (["broken", "--gallery", "out"], "is damaged"),
        (["texts", "--coco-results", "out"], "COCO results hold captions of images"),
        (["run", "--gallery", "mine"], "mine is there and holds files: give another folder"),
        (["run", "--shards", "mine"], "mine is there and holds files"),
        (["run", "--gallery", ""], "give a path; the current folder is ."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_export_that_cannot_be_made_is_one_line(finished, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("begun", "broken"):
        Path(name).mkdir()
    Path("begun/run.json").write_text("{}")
    Path("broken/candidates.parquet").write_bytes(b"PAR1")
    with contextlib.redirect_stderr(io.StringIO()):
        fakes.run_texts(tmp_path / "texts", tmp_path / "others", n=2)
    capsys.readouterr()
    status, error = run("export", *arguments, capsys=capsys)
    assert status == 2 and message in error.splitlines()[-1] and not Path("out").exists()


PAIRS = "image,caption\n0.png,a red thing\n1.png,a green thing\n0.png,one more\n"


@pytest.mark.parametrize(
    ("options", "rows", "says"),
    [([], 3 * 2, "begins with the captions"), (["--from", "captions"], 3 * 2, ""), (["--from", "images"], 2 * 2, "")],
)
def test_a_table_of_both_begins_with_what_is_asked_for(models, tmp_path, capsys, options, rows, says):  # noqa: F811
    (tmp_path / "mine/pairs.csv").write_text(PAIRS)
    arguments = ["reconstruct", str(tmp_path / "mine/pairs.csv"), "--out", str(tmp_path / "run"), *options]
    assert command_line.main(arguments) == 0
    out = capsys.readouterr().out
    assert ("begins with the captions; --from images" in out) == bool(says)
    table = pd.read_parquet(tmp_path / "run/candidates.parquet")
    assert len(table) == rows and ("recovered" in table) == (rows == 6)
    if rows == 4:  # the page finds the images, and the people's captions, again by itself
        assert call(tmp_path / "run", "--gallery", tmp_path / "page") == 0
        page = Page(tmp_path / "page/index.html")
        assert sum(image["alt"].startswith("Input image") for image in page.all("img")) == 2
        assert "one more" in page.text
        (tmp_path / "mine").rename(tmp_path / "moved")
        assert call(tmp_path / "run", "--gallery", tmp_path / "page2") == 0
        assert "not at hand" in Page(tmp_path / "page2/index.html").text
        assert call(tmp_path / "run", "--gallery", tmp_path / "page3", "--source", tmp_path / "moved/pairs.csv") == 0
        assert "not at hand" not in Page(tmp_path / "page3/index.html").text


def test_shards_go_there_and_back(models, tmp_path, capsys):  # noqa: F811
    members = [("0.png", picture("blue")), ("0.txt", "a blue thing"), ("1.png", picture()), ("1.txt", "a red thing")]
    path = tar(tmp_path / "some.tar", members)
    assert command_line.main(["reconstruct", str(path), "--out", str(tmp_path / "run")]) == 0
    assert command_line.main(["reconstruct", str(path), "--out", str(tmp_path / "texts"), "--from", "captions"]) == 0
    path.unlink()  # the run has its own copies
    assert call(tmp_path / "run", "--gallery", tmp_path / "page", "--shards", tmp_path / "out") == 0
    assert sum(image["alt"].startswith("Input") for image in Page(tmp_path / "page/index.html").all("img")) == 2
    assert pd.read_parquet(tmp_path / "texts/candidates.parquet").caption.unique().tolist() == [
        "a blue thing", "a red thing"
    ]  # fmt: skip
    assert command_line.main(["reconstruct", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0


def test_a_source_that_does_not_fit_is_refused_before_a_run_begins(models, tmp_path, capsys):  # noqa: F811
    (tmp_path / "mine/texts.csv").write_text("caption\na\n")
    (tmp_path / "mine/images.csv").write_text("image\n0.png\n")
    for source, start, message in (
        ("mine", "captions", "is a folder of images"),
        ("mine/texts.csv", "images", "names no image"),
        ("mine/images.csv", "captions", "expected a string, or an object whose"),
        ("gone.tar", "images", "there is no shard"),
    ):
        status, error = run("reconstruct", tmp_path / source, "--from", start, "--out", tmp_path / "run", capsys=capsys)
        assert status == 2 and message in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert command_line.main(["reconstruct", str(tmp_path / "mine/images.csv"), "--out", str(tmp_path / "run")]) == 0
