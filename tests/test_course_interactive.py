"""Static figures: every image has words, nothing that a model wrote is markup, a control moves its own figure alone."""

import html
import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dalleflamingo.course import interactive, notebook_page
from dalleflamingo.datasets import Example

EVIL = "</script><script>alert('1')</script> & \"a\" <b>red</b> boat"
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def plain(i: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), COLOURS[i])


class Elements(HTMLParser):
    """The start tags of a document, as (name, attributes), and its text outside of scripts and styles."""

    def __init__(self, document: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._inside = "", ""
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data

    def named(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture
def run(tmp_path):
    """(example, table, folder): an input image with three candidates; the second and third are equal by `clip`."""
    plain(0).save(tmp_path / "input.png")
    for k in range(3):
        plain(k + 1).save(tmp_path / f"{k}.png")
    example = Example(7, tmp_path / "input.png", ("a person's <i>words</i>",))
    table = pd.DataFrame(
        {
            "image_id": [3, 7, 7, 7],
            "caption": ["of another image", "first", EVIL, "third"],
            "image": ["0.png", "0.png", "1.png", "2.png"],
            "clip": [0.9, 0.1, 0.5, 0.5],
            "dino": [0.9, 0.3, 0.1, 0.2],
        }
    )
    return example, table, tmp_path


def figures(run) -> dict[str, str]:
    three = [plain(i) for i in range(3)]
    return {
        "guidance": interactive.guidance_and_step({0: three, 7.5: three[::-1]}, [900, 500, 100], EVIL).data,
        "timestep": interactive.guess_by_timestep([0, 500, 999], three, three[::-1], ["a", EVIL, "c"]).data,
        "share": interactive.share_of_word([0, 0.5, 1], three, ("red", EVIL), EVIL).data,
        "ranking": interactive.ranking(*run, ["clip", "dino"]).data,
    }


# ── what is in a figure ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_image_has_words_of_its_own_and_controls_have_names(run):
    for document in figures(run).values():
        elements = Elements(document)
        images = elements.named("img")
        assert len(images) >= 3 and all(image["alt"].strip() for image in images)
        assert not [attributes for _, attributes in elements.tags if "id" in attributes]
        assert elements.named("fieldset") == [{"disabled": None}]  # until the script has run
        assert elements.named("output") == [{"aria-live": "polite"}]
        assert len(elements.named("label")) == len(elements.named("input")) + len(elements.named("select")) > 0


def test_what_models_wrote_is_text_and_not_markup(run):
    for document in figures(run).values():
        elements = Elements(document)
        assert len(elements.named("script")) == 1 and not elements.named("b") and not elements.named("i")
        written = [elements.text, *(str(value) for _, attributes in elements.tags for value in attributes.values())]
        assert any(EVIL in text for text in written)
        assert document.count("alert(") == document.count("alert(&#39;1")


def test_labels_of_a_slider_survive_quotes():
    label = "\"a' </script>"
    figure = interactive.render(
        "sliders", [interactive.Control("x", (label,), 0)], {(0,): interactive.Frame((), "")}, (0,), ""
    )
    [slider] = Elements(figure).named("input")
    assert json.loads(slider["data-values"]) == [label]


def test_each_position_of_two_sliders_shows_its_own_image():
    guesses = {scale: [plain(2 * i + step) for step in range(2)] for i, scale in enumerate((1, 3, 10))}
    elements = Elements(interactive.guidance_and_step(guesses, [999, 1], "a cat").data)
    positions = [attributes["data-at"] for attributes in elements.named("div") if "data-at" in attributes]
    shown = [shape["data-at"] for shape in elements.named("div") if "data-at" in shape and "hidden" not in shape]
    sources = [image["src"].partition(",")[2] for image in elements.named("img")]
    colours = [Image.open(BytesIO(b64decode(source))).getpixel((9, 9)) for source in sources]
    assert positions == ["0,0", "0,1", "1,0", "1,1", "2,0", "2,1"] and shown == ["1,1"]
    assert colours == [plain(i).getpixel((9, 9)) for i in range(6)]
    assert [slider["max"] for slider in elements.named("input")] == ["2", "1"]


def test_a_small_image_keeps_every_pixel_and_a_large_one_is_made_smaller():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    small, large = (interactive.Picture(image, "x") for image in (Image.fromarray(noise), plain(0, 512)))
    decoded = Image.open(BytesIO(b64decode(small.source.partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(decoded), noise)
    assert Image.open(BytesIO(b64decode(large.source.partition(",")[2]))).size == (256, 256)
    assert large.image.size == (512, 512), "the caller's image was changed"


def test_cards_begin_by_the_first_column_and_hold_the_ranks_of_all(run):
    elements = Elements(interactive.ranking(*run, ["clip", "dino"]).data)
    assert [card["data-ranks"] for card in elements.named("li")] == ["1,3", "2,2", "3,1"]  # of equals the first
    alts = [image["alt"] for image in elements.named("img")]
    assert alts[0].endswith("a person's <i>words</i>") and alts[1:] == [
        f"Generated from: {caption}" for caption in (EVIL, "third", "first")
    ]
    assert "CLIP 0.50" in elements.text and "of another image" not in elements.text


def test_errors_name_what_does_not_fit(run):
    example, table, folder = run
    with pytest.raises(ValueError, match="2 guesses at scale 3 for 3 timesteps"):
        interactive.guidance_and_step({1: [plain(0)] * 3, 3: [plain(0)] * 2}, [9, 5, 1], "a cat")
    with pytest.raises(ValueError, match="1 captions for 2 timesteps"):
        interactive.guess_by_timestep([0, 9], [plain(0)] * 2, [plain(0)] * 2, ["one"])
    with pytest.raises(ValueError, match="a share of 1.5"):
        interactive.share_of_word([0, 1.5], [plain(0)] * 2, ("red", "blue"), "a red boat")
    with pytest.raises(KeyError, match="no column 'fid'"):
        interactive.ranking(example, table, folder, ["clip", "fid"])
    with pytest.raises(ValueError, match="1 NaN"):
        interactive.ranking(example, table.assign(dino=[0, 1, None, 1]), folder, ["clip", "dino"])
    with pytest.raises(ValueError, match="no row of image 7"):
        interactive.ranking(example, table[table.image_id == 3], folder, ["clip"])


# ── on a page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def page_of(*documents: str) -> str:
    outputs = [nbformat.v4.new_output("execute_result", {"text/html": document}) for document in documents]
    body = "".join(map(notebook_page.render_output, outputs))
    return f'<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>{body}</body></html>'


def test_a_page_keeps_script_and_style_and_asks_no_other_host(run):
    page = page_of(*figures(run).values())
    assert page.count("<script>") == 4 and page.count("figure.touch:not([data-ready])") == 4
    assert page.count(".touch .frame[hidden] { display: none; }") == 4
    assert not re.findall(r'(?:src|href)="?(?:https?:)?//|@import|url\(', page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_each_control_moves_its_own_figure(run, tmp_path):
    move = """<script>
const figures = [...document.querySelectorAll("figure.touch")], events = { bubbles: true };
const [guidance, timestep, share, ranking] = figures;
const move = (figure, number, value) => {
  const control = figure.querySelectorAll("input, select")[number];
  control.value = value;
  control.dispatchEvent(new Event("input", events));
};
move(guidance, 0, 0); move(guidance, 1, 1); move(timestep, 0, 1); move(ranking, 0, 1);
const of = (figure) => [...figure.querySelectorAll(".frame[data-at]:not([hidden])")].map((frame) => frame.dataset.at);
const says = (figure) => figure.querySelector("output").textContent;
const cards = [...ranking.querySelectorAll(".caption")].map((one) => one.textContent);
const disabled = document.querySelectorAll("fieldset:disabled").length;
const hears = guidance.querySelectorAll("input")[1].getAttribute("aria-valuetext");
const shown = figures.slice(0, 3).map(of);
document.body.textContent = JSON.stringify({ shown, says: figures.map(says), cards, disabled, hears });
</script>"""
    file = tmp_path / "page.html"
    file.write_text(page_of(*figures(run).values()).replace("</body>", f"{move}</body>"), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    command = [CHROMIUM, *options, file.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", document, re.DOTALL)[1]))
    assert found["shown"] == [["0,1"], ["1"], ["0"]] and found["disabled"] == 0
    assert found["says"][0] == "Guidance scale 0, step 2 of 3 (t = 500)." and found["hears"] == "2 of 3"
    assert found["says"][1] == f"The captioner about the guess: “{EVIL}”"
    assert found["cards"] == ["“first”", "“third”", f"“{EVIL}”"]
    assert found["says"][3] == f"First by DINO: “first”. Last: “{EVIL}”."
