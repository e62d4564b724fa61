"""A user's own files: what is an image or a caption is taken, what is not is named, and nothing is lost silently."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example as and_also
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalleflamingo import course, image_text_image
from dalleflamingo.course import show
from dalleflamingo.datasets import DatasetError
from dalleflamingo.sources.own_files import read_captions, read_folder, stable_id

ROOT = Path(__file__).parents[1]

# ── a folder of images ───────────────────────────────────────────────────────────────────────────────────────────────


def image(path: Path, kind: str = "PNG") -> Path:
    Image.new("RGB", (4, 4), "red").save(path, format=kind)
    return path


def test_a_folder_keeps_its_ids_when_an_image_is_added(tmp_path, capsys):
    for name in ("b.PNG", "c.jpg", ".hidden.png"):
        image(tmp_path / name)
    before = read_folder(tmp_path)
    assert [e.path.name for e in before] == ["b.PNG", "c.jpg"] and before.name == tmp_path.name
    assert capsys.readouterr().out == ""  # nothing was left out
    image(tmp_path / "a.webp")
    after = read_folder(tmp_path)
    assert [e.path.name for e in after] == ["a.webp", "b.PNG", "c.jpg"]
    assert [e.image_id for e in after[1:]] == [e.image_id for e in before]
    assert len({e.image_id for e in after}) == 3


SUFFIXES = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "apng": "PNG", "tga": "TGA"}


def test_whatever_pillow_opens_is_an_image(tmp_path, capsys):
    Image.init()
    known = {suffix: kind for suffix, kind in SUFFIXES.items() if kind in Image.SAVE}  # AVIF is since Pillow 11.3
    names = [image(tmp_path / f"a.{suffix}", kind).name for suffix, kind in known.items()]
    names += [image(tmp_path / name, "JPEG").name for name in ("none", "wrong.txt", "UPPER.JPG", "photo.heic")]
    found = read_folder(tmp_path)
    assert [e.path.name for e in found] == sorted(names) and capsys.readouterr().out == ""
    assert all(found.open(e).getpixel((0, 0))[0] > 240 for e in found)


def test_what_is_left_out_is_named_with_its_reason_and_counted(tmp_path, capsys):
    image(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("a red kite")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert [e.path.name for e in read_folder(tmp_path)] == ["a.png"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: images: 1; left out: ")
    assert "b.heic, c.jpg, notes.txt (3: no format that Pillow opens; if it is an image, save it as JPEG" in line
    assert "gone.png (1: a broken link" in line and "more (1: a folder, which is not searched" in line
    for i in range(30):
        (tmp_path / f"{i:02d}.heic").write_bytes(b"")
    read_folder(tmp_path)
    assert "08.heic, 09.heic and 23 more (33: no format" in capsys.readouterr().out


def test_a_folder_without_an_image_is_refused_with_what_it_holds(tmp_path):
    with pytest.raises(DatasetError, match="holds no images but no files at all: put images there"):
        read_folder(tmp_path)
    (tmp_path / "IMG_1.HEIC").touch()
    with pytest.raises(DatasetError, match="holds no images but IMG_1.HEIC .1: no format that Pillow opens"):
        read_folder(tmp_path)
    with pytest.raises(DatasetError, match="there is no folder .*nowhere"):
        read_folder(tmp_path / "nowhere")


def test_the_current_folder_and_its_name_are_one(tmp_path, monkeypatch):
    image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    here, named = read_folder("."), read_folder(tmp_path)
    assert here.name == named.name == tmp_path.name and here[0].image_id == named[0].image_id


def test_a_file_whose_name_is_not_printable_is_an_image_like_any_other(tmp_path):
    names = [b"caf\xe9.png", b"two\nlines.png", b"bell\x07.png", "łódź 🚣.png".encode()]
    for name in names:
        image(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)))
    found = read_folder(tmp_path)
    assert {os.fsencode(e.path.name) for e in found} == set(names) and len({e.image_id for e in found}) == 4


def test_ids_of_a_hundred_thousand_files_and_lines_differ():
    ids = {stable_id("picture", f"IMG_{i:06d}.jpg") for i in range(100_000)}
    ids |= {stable_id("caption", f"caption {i}", 0) for i in range(100_000)}
    assert len(ids) == 200_000 and min(ids) >= 0 and 2**62 < max(ids) < 2**63
    assert len({i % 2**31 for i in ids}) < 200_000  # of 31 bits they would not
    kept = pa.Table.from_pylist([{"image_id": max(ids)}], pa.schema({"image_id": pa.int64()}))
    assert kept["image_id"].to_pylist() == [max(ids)] == json.loads(json.dumps([max(ids)]))


def test_an_id_is_the_same_in_every_run():
    assert stable_id("picture", "IMG_0001.jpg") == 7585782322076429852  # kept runs are found by it


def test_a_file_of_a_hundred_thousand_captions_is_read(tmp_path):
    (tmp_path / "many.txt").write_text("".join(f"caption {i}\n" for i in range(100_000)))
    assert len(read_captions(tmp_path / "many.txt")) == 100_000


def test_a_damaged_first_image_does_not_break_the_notebooks_own_cell(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "notebooks/04_image_text_image.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    [start] = [i for i, source in enumerate(code) if "my_pictures" in source]
    (tmp_path / "my_pictures").mkdir()
    for name in "abc":
        image(tmp_path / f"my_pictures/{name}.png")
    (tmp_path / "my_pictures/a.png").write_bytes((tmp_path / "my_pictures/a.png").read_bytes()[:45])
    monkeypatch.chdir(tmp_path)
    models = fakes.Captioner(), fakes.Generator(), [fakes.MeanColour()]
    names = dict(Path=Path, course=course, shutil=shutil, show=show, read_folder=read_folder, models=models)
    names |= dict(image_text_image=image_text_image, settings=fakes.SETTINGS, by="colour")
    for source in code[start : start + 2]:
        exec(source, names)
    assert [Path(one["path"]).name for one in names["my_table"].attrs["skipped"]] == ["a.png"]
    assert names["first_read"].path.name == "b.png"


# ── files of captions ────────────────────────────────────────────────────────────────────────────────────────────────

KITE, BOAT = "a red kite", "a blue boat, far away"


def captions_of(path: Path) -> list[str]:
    return [caption for example in read_captions(path) for caption in example.references]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_one_line_is_one_caption(tmp_path, end):
    inside = "".join(f"a{c}b " for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e")
    (tmp_path / "a.txt").write_bytes(end.join([KITE, "", f"  {inside} ", "   ", BOAT]).encode())
    assert captions_of(tmp_path / "a.txt") == [KITE, inside.strip(), BOAT]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))))
@and_also(["\ufeff", "x"])
def test_captions_of_any_characters_come_back(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(("\ufeff" + "\n".join(lines)).encode())
    expected = [line.strip() for line in lines if line.strip()]
    if expected:
        assert captions_of(path) == expected
    else:
        with pytest.raises(DatasetError, match="holds no caption"):
            read_captions(path)


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("latin-1", "Latin-1 or Windows-1252, if it is text at all: byte 6"),
        ("cp1252", "Latin-1 or Windows-1252"),
        ("utf-16", "UTF-16;"),
        ("utf-16-be", "UTF-16-BE;"),
        ("utf-32", "UTF-32;"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv"])
def test_another_encoding_is_named_with_the_remedy(tmp_path, name, encoding, named):
    (tmp_path / name).write_bytes("a café by the sea\n".encode(encoding))
    with pytest.raises(DatasetError, match=f"{name} is not in UTF-8 but in ({named}).*save it as UTF-8") as refusal:
        read_captions(tmp_path / name)
    assert str(refusal.value).isprintable()


def test_utf_16_without_a_mark_is_not_read_as_captions_of_zero_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(KITE.encode("utf-16-le"))  # also valid UTF-8
    with pytest.raises(DatasetError, match="in UTF-16-LE; save"):
        read_captions(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(KITE.encode() + b"\0 and more")
    with pytest.raises(DatasetError, match="if it is text at all: it holds zero bytes"):
        read_captions(tmp_path / "a.txt")


def table(separator: str, rows: list[list[str]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, delimiter=separator).writerows(rows)
    return lines.getvalue()


ROWS = [["image", "Caption"], ["1.jpg", KITE], ["2.jpg", BOAT], ["3.jpg", 'a "sign"']]
QUOTED = [KITE, BOAT, 'a "sign"']
AS_WRITTEN = {
    "list.json": json.dumps(QUOTED),
    "objects.json": json.dumps([{"caption": c, "image_id": i} for i, c in enumerate(QUOTED)]),
    "coco.json": json.dumps({"images": [], "annotations": [{"image_id": 1, "caption": c} for c in QUOTED]}),
    "indented.json": json.dumps(QUOTED, indent=1),
    "strings.jsonl": "\n".join(map(json.dumps, QUOTED)),
    "objects.jsonl": "\r\n".join(json.dumps({"caption": c}) for c in [*QUOTED]) + "\r\n\r\n",
    "commas.csv": table(",", ROWS),
    "semicolons.csv": table(";", ROWS),
    "alone.csv": table(",", [row[1:] for row in ROWS]),
    "UPPER.CSV": table("\t", ROWS),
    "tabs.tsv": table("\t", ROWS),
    "lines.txt": "\n".join(QUOTED),
    "lines": "\n".join(QUOTED),
    "lines.captions": "\n".join(QUOTED),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "with a byte order mark"])
@pytest.mark.parametrize("name", AS_WRITTEN)
def test_a_file_is_read_as_what_its_suffix_says(tmp_path, name, mark):
    (tmp_path / name).write_bytes((mark + AS_WRITTEN[name]).encode())
    assert captions_of(tmp_path / name) == QUOTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": "b"}', "an object with the keys 'a'; expected a list of strings"),
        ("a.json", "[1]", "entry 1 is a number; expected a string"),
        ("a.json", '[{"caption": null}]', "entry 1 is an object with the keys 'caption'; expected"),
        ("a.json", '["a", {"words": "b"}]', "entry 2 is an object with the keys 'words'"),
        ("a.json", "a red kite", "a.json is not JSON"),
        ("a.json", "[]", "holds no caption"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.jsonl", '"a"\n\na red kite', "line 3 is not JSON .*call the file .txt"),
        ("a.jsonl", '"a"\n' + "9" * 5000, "line 2 is not JSON"),
        ("a.jsonl", '{"caption": 3}', "line 1 is an object"),
        ("a.csv", "a red kite\na blue boat", "begins with 'a red kite'; expected the names of columns"),
        ("a.csv", "caption,caption\na,b", "one of them caption"),
        ("a.csv", "caption,image\na red kite, flying,1.jpg", "line 2 has 3 columns and the header 2: put .* double"),
        ("a.csv", "image,caption\n1.jpg", "line 2 has 1 columns and the header 2"),
        ("a.csv", 'caption\n"a red kite\na blue boat', "line 3 cannot be read as a row .unexpected end of data"),
        ("a.csv", "caption\n" + "x" * 200_000, "line 2 cannot be read as a row .field larger than field limit"),
        ("a.csv", "", "one of them caption"),
        ("a.txt", " \n\r\n\t", "holds no caption"),
        ("a.png", "a red kite", "a.png is a single image: put it into a folder"),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=message) as refusal:
        read_captions(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value) and str(refusal.value).isprintable()


def test_files_that_are_no_text_are_refused(tmp_path):
    image(tmp_path / "picture")
    with pytest.raises(DatasetError, match="picture is a single image: put it into a folder"):
        read_captions(tmp_path / "picture")
    pq.write_table(pa.table({"caption": [KITE]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="a.parquet is not in UTF-8"):
        read_captions(tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="cannot be read .Is a directory"):
        read_captions(tmp_path)
    with pytest.raises(DatasetError, match="there is no file .*nowhere.txt"):
        read_captions(tmp_path / "nowhere.txt")
    with pytest.raises(DatasetError, match="cannot be read .File name too long"):
        read_captions(tmp_path / ("x" * 300))


def test_adding_lines_changes_no_id(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{KITE}\n{BOAT}\n{KITE}\n")
    before = [e.image_id for e in read_captions(path)]
    path.write_text(f"new\n{KITE}\n{BOAT}\n{KITE}\n{KITE}")
    after = [e.image_id for e in read_captions(path)]
    assert after[1:4] == before and len(set(after)) == 5


def test_half_a_surrogate_pair_in_json_is_a_caption_like_others_until_a_model_reads_it(tmp_path):
    (tmp_path / "a.json").write_text(r'["a \ud83d kite", "a boat"]')
    assert captions_of(tmp_path / "a.json") == ["a \ud83d kite", "a boat"]


@given(st.sampled_from(sorted(AS_WRITTEN)), st.data())
def test_any_change_of_bytes_is_read_or_refused(tmp_path_factory, name, data):
    content = bytearray(AS_WRITTEN[name].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert all(captions_of(path))
    except DatasetError as refusal:
        assert str(path) in str(refusal)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "JPEG", "WEBP"])
@given(data=st.data())
def test_any_change_of_an_images_bytes_is_an_image_or_an_unreadable_one(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("changed")
    content = bytearray(image(folder / "a", kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "a").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = read_folder(folder)
        assert found.open(found[0]).mode == "RGB"
    except DatasetError as refusal:
        assert str(folder) in str(refusal) and str(refusal).isprintable()
