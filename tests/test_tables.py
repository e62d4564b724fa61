"""Images with captions in tables, as users have them, and files too large for the memory."""

import csv
import io
import json
import multiprocessing
import os
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalleflamingo.datasets import Dataset, DatasetError, UnreadableImage
from dalleflamingo.sources import text_files
from dalleflamingo.sources.own_files import holds, read_captions, read_folder, read_pairs, stable_id
from dalleflamingo.sources.streamed import StreamedDataset

PAIRS = [("1.jpg", "a red kite"), ("sub/2.png", 'a "sign", far\naway'), ("1.jpg", "a kite"), ("łódź 🚣.png", "a boat")]
GROUPED = [("1.jpg", ("a red kite", "a kite")), ("sub/2.png", ('a "sign", far\naway',)), ("łódź 🚣.png", ("a boat",))]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("1.jpg", "sub/2.png", "łódź 🚣.png")):
        Image.new("RGB", (4, 4), (60 * i, 0, 0)).save(tmp_path / name)
    return tmp_path


def rows(path: Path, header: list[str], body, end: str = "\r\n", mark: str = "", separator: str = ",") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, lineterminator=end, delimiter=separator).writerows([header, *body])
    return path


def objects(path: Path, records, end: str = "\n", mark: str = "") -> Path:
    path.write_bytes((mark + "".join(json.dumps(record) + end for record in records)).encode())
    return path


def pairs_of(dataset: Dataset, folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(e.path.relative_to(folder).as_posix(), e.references) for e in dataset]


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "with a byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_rows_of_one_image_become_one_example(folder, end, mark):
    files = [rows(folder / "a.csv", ["image", "caption"], PAIRS, end, mark)]
    files += [rows(folder / "b.csv", ["Caption ", "n", "IMAGE_PATH"], [(c, 1, i) for i, c in PAIRS], end, mark, ";")]
    files += [rows(folder / "c.tsv", ["file_name", "text"], PAIRS, end, mark, "\t")]
    files += [objects(folder / "d.jsonl", [{"image": i, "caption": c} for i, c in PAIRS], end, mark)]
    files += [objects(folder / "e.jsonl", [{"file_name": i, "captions": list(c)} for i, c in GROUPED], end, mark)]
    (folder / "f.json").write_text(mark + json.dumps([{"filename": i, "text": c} for i, c in PAIRS]), encoding="utf-8")
    for path in [*files, folder / "f.json"]:
        dataset = read_pairs(path)
        assert pairs_of(dataset, folder) == GROUPED, path.name
        assert [dataset.open(example).getpixel((0, 0))[0] // 50 for example in dataset] == [0, 1, 2]
        assert [example.image_id for example in dataset] == [stable_id("picture", name) for name, _ in GROUPED]


def test_an_image_has_the_id_that_it_has_in_its_folder(folder):
    rows(
        folder / "a.csv", ["image", "caption"], [("./1.jpg", "a"), (str(folder / "1.jpg"), "b"), ("sub/../1.jpg", "c")]
    )
    [example] = read_pairs(folder / "a.csv")
    assert example.references == ("a", "b", "c")
    assert example.image_id == next(one for one in read_folder(folder) if one.path.name == "1.jpg").image_id


def test_several_captions_may_stand_in_a_cell_as_json(folder):
    body = [("1.jpg", '["a, b", " ", "c"]'), ("sub/2.png", "d")]
    dataset = read_pairs(rows(folder / "a.csv", ["image", "captions"], body))
    assert [e.references for e in dataset] == [("a, b", "c"), ("d",)]
    texts = read_captions(folder / "a.csv")
    assert [e.references for e in texts] == [("a, b",), ("c",), ("d",)]
    bracket = rows(folder / "b.csv", ["image", "caption"], [("1.jpg", "[a] red kite")])  # not the column captions
    assert read_captions(bracket)[0].references == ("[a] red kite",)
    with pytest.raises(DatasetError, match="line 2, column captions is not a JSON list"):
        read_captions(rows(folder / "c.csv", ["captions"], [('["a"',)]))


def test_ids_domains_and_other_columns_are_kept(folder):
    header = ["image_id", "image", "caption", "domain", "licence"]
    body = [
        ("17", "1.jpg", "a", "out-domain", "CC BY"),
        ("4", "sub/2.png", "b", "", "CC0"),
        ("17", "1.jpg", "c", "", ""),
    ]
    first, second = read_pairs(rows(folder / "a.csv", header, body))
    assert (first.image_id, first.domain, first.references) == (17, "out-domain", ("a", "c"))
    assert first.extra == {"licence": "CC BY"} and second.image_id == 4 and second.domain is None
    odd = rows(folder / "b.csv", header, [("00a7<&>", "1.jpg", "a", "", ""), ("9" * 30, "sub/2.png", "b", "", "")])
    assert [e.image_id for e in read_pairs(odd)] == [stable_id("picture", "1.jpg"), stable_id("picture", "sub/2.png")]


def test_images_without_captions_are_read_and_captions_are_optional(folder):
    alone = read_pairs(rows(folder / "a.csv", ["image"], [("1.jpg",), ("1.jpg",), ("sub/2.png",)]))
    assert pairs_of(alone, folder) == [("1.jpg", ()), ("sub/2.png", ())]
    empty = read_pairs(rows(folder / "b.csv", ["image", "caption"], [("1.jpg", " "), ("1.jpg", "a")]))
    assert pairs_of(empty, folder) == [("1.jpg", ("a",))]


def test_coco_annotations_name_images_of_the_folder_that_is_given(folder):
    coco = {"images": [{"id": 5, "file_name": "2.png"}], "annotations": [{"image_id": 5, "caption": "a sign"}]}
    (folder / "coco.json").write_text(json.dumps(coco))
    [example] = read_pairs(folder / "coco.json", folder / "sub")
    assert (example.image_id, example.references) == (5, ("a sign",)) and example.path.is_file()
    with pytest.raises(DatasetError, match="there is no folder .*nowhere: give the folder that holds the images"):
        read_pairs(folder / "coco.json", folder / "nowhere")


def test_what_a_file_holds_is_seen_by_its_first_record(folder):
    assert holds(rows(folder / "a.csv", ["image", "caption"], PAIRS)) == (True, True)
    assert holds(rows(folder / "b.csv", ["image"], [("1.jpg",)])) == (True, False)
    assert holds(rows(folder / "c.csv", ["caption"], [("a",)])) == (False, True)
    assert holds(objects(folder / "d.jsonl", ["a"])) == (False, True)
    (folder / "e.txt").write_text("a red kite")
    assert holds(folder / "e.txt") == (False, True)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "picture,caption\n1.jpg,a\n", "begins with 'picture,caption'|line 2 names no image"),
        ("a.csv", "image,words\n", "names no image: write a row"),
        ("a.csv", "image,image,caption\n1.jpg,1.jpg,a\n", "rename one of the columns called image"),
        ("a.csv", "name,words\n1.jpg,a\n", "expected the names of columns, .*one of them caption, captions or text"),
        ("a.csv", 'image,caption\n1.jpg,"a\nb"\n,c\n', "line 4: column image holds ''; expected the path of an image"),
        ("a.csv", 'image,caption\n1.jpg,"a\nb",c\n', "line 2 has 3 columns and the header 2"),
        ("a.csv", 'image,caption\n1.jpg,"a\nb\nc', "line 4 cannot be read as a row .unexpected.*begins in line 2"),
        ("a.csv", "image,caption\n../x.jpg,a\n", "line 2: the image ../x.jpg is not inside .*--image-folder"),
        ("a.csv", "image,caption\nsub/../../x.jpg,a\n", "line 2: the image .* is not inside"),
        ("a.csv", "image,caption\n/etc/hostname,a\n", "line 2: the image /etc/hostname is not inside"),
        ("a.csv", "image,caption\n.,a\n", "line 2: the image . is not inside"),
        ("a.csv", "image,caption\nhttp://x.org/1.jpg,a\n", "line 2: the image .* is an address: download it"),
        ("a.csv", "image_id,image\n1,1.jpg\n2,1.jpg\n", "record 2 gives an image the image_id 2, and record 1 .* 1"),
        ("a.csv", "image_id,image\nx,1.jpg\n2,1.jpg\n", "record 2 .*gives the same image none"),
        ("a.csv", "image_id,image\n1,1.jpg\n2,b.jpg\n1,c.jpg\n", "image id 1 occurs 2 times"),
        ("a.jsonl", '{"image": "1.jpg"}\n\n{"image": "2.jpg"\n', "line 3 is not JSON"),
        ("a.jsonl", '{"image": "1.jpg"}\n{"caption": "a"}\n', "line 2 names no image"),
        ("a.jsonl", '{"image": "1.jpg"}\n"a"\n', "line 2 names no image"),
        ("a.jsonl", '{"image": 3}\n', "line 1: column image holds 3"),
        ("a.jsonl", '{"image": "1.jpg", "caption": {"raw": "a"}}\n', "line 1 is an object"),
        ("a.jsonl", '{"image": "1.jpg", "captions": ["a", 3]}\n', "line 1 is an object"),
        ("a.jsonl", '[{"image": "1.jpg"}]\n', "line 1 is a list of 1"),
        ("a.jsonl", '[\n{"image": "1.jpg"}\n]\n', "line 1 is not JSON .*one JSON value is called .json"),
        ("a.json", '{"images": 3}', "expected a list of strings"),
        ("a.txt", "a red kite\n", "a.txt has no columns: images with captions are .csv"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_file_line_and_remedy(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(DatasetError, match=message) as refusal:
        read_pairs(folder / name)
    assert str(folder / name) in str(refusal.value) and str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b'{"caption": "a red kite"}\n', "begins with JSON, not with a caption: call it .jsonl"),
        ("a.txt", b"\n\n[1, 2]\n", "begins with JSON"),
        ("a.txt", b"image,caption\n1.jpg,a\n", "begins with the names of columns.*call it .csv"),
        ("a.txt", b"caption\timage_path\n", "begins with the names of columns"),
        ("a.csv", b"PK\x03\x04" + bytes(30), "a zip archive, perhaps an Excel file; save it as UTF-8"),
        ("a.jsonl", b"\x1f\x8b\x08" + bytes(30), "gzip; unpack it first"),
        ("a.csv", b"PAR1" + bytes(30), "a Parquet file"),
        ("a.csv", "caption\nein Wörtchen\n".encode("latin-1"), "Latin-1 or Windows-1252.*byte 14 is not UTF-8"),
        ("a.csv", b"caption\na\0b\n", "it holds zero bytes"),
    ],
)
def test_content_that_contradicts_the_suffix_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_captions(tmp_path / name)


def test_captions_that_look_like_numbers_or_lists_of_words_are_captions(tmp_path):
    (tmp_path / "a.txt").write_text("7\ncaption, text\n{a} kite\n[sic] a boat\nnull\n")
    assert [e.references[0] for e in read_captions(tmp_path / "a.txt")][0::4] == ["7", "null"]


def test_an_image_that_is_missing_is_named_when_it_is_opened_and_not_before(folder):
    dataset = read_pairs(rows(folder / "a.csv", ["image"], [("1.jpg",), ("gone.jpg",)]))
    with pytest.raises(UnreadableImage, match="gone.jpg: there is no such file"):
        dataset.open(dataset[1])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_file_that_changes_while_it_is_in_use_is_noticed(folder, kind):
    path = folder / f"a.{kind}"

    def write(captions):
        if kind == "csv":
            rows(path, ["image", "caption"], [(f"{i}.jpg", c) for i, c in enumerate(captions)])
        elif kind == "jsonl":
            objects(path, [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(captions)])
        else:
            path.write_text("\n".join(captions))

    write(["a red kite", "a blue boat"])
    opened = [read_captions(path)] + ([] if kind == "txt" else [read_pairs(path)])
    write(["some other words before it", "a red kite", "a blue boat"])
    for dataset in opened:
        with pytest.raises(DatasetError, match="was changed while it was in use: give the same command again"):
            list(dataset)
    path.unlink()
    with pytest.raises(DatasetError, match="was changed while it was in use"):
        opened[0][0]


# ── laziness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slice_a_filter_and_a_subset_are_those_of_a_data_set_in_memory(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"caption {i % 40}\n" for i in range(60)))
    lazy = read_captions(tmp_path / "a.txt")
    whole = Dataset(lazy.name, tuple(lazy))
    assert isinstance(lazy, StreamedDataset) and len(lazy) == 60 and lazy[-1] == whole[-1]
    for cut in (slice(None), slice(7, 30), slice(None, None, -7), slice(100, 200), slice(3, 50, 4)):
        assert list(lazy[cut]) == list(whole[cut]) and len(lazy[cut]) == len(whole[cut])
        assert list(lazy[2:50][cut]) == list(whole[2:50][cut])
    assert list(lazy.subset(9, seed=3)) == list(whole.subset(9, seed=3)) and list(lazy.subset(60)) == list(whole)
    wanted = {whole[4].image_id, whole[44].image_id}
    assert list(lazy.filter(wanted)) == list(whole.filter(wanted)) and len(wanted) == 2


@pytest.fixture(scope="module")
def own_process():
    """A process of its own, because tracemalloc also counts what threads of other tests do."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def memory_of(n: int, folder: Path, read, suffix: str) -> float:
    """Bytes at the peak of indexing a file of n captions and going through it, beyond what was there before."""
    text_files._BLOCK = 1 << 14
    path = folder / f"{n}{suffix}"
    if suffix == ".txt":
        path.write_text("".join(f"a caption with some words in it, number {i}\n" for i in range(n)))
    elif suffix == ".jsonl":
        path.write_text("".join(f'{{"image": "{i // 2}.jpg", "caption": "a caption {i}"}}\n' for i in range(n)))
    else:
        path.write_text("image,caption\n" + "".join(f'{i // 2}.jpg,"a ""caption"", {i}"\n' for i in range(n)))
    tracemalloc.start()
    try:
        ids = {example.image_id % 7 for example in read(path)}
        assert len(ids) == 7
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("read", "suffix"),
    [
        (read_captions, ".txt"),
        (read_captions, ".jsonl"),
        (read_captions, ".csv"),
        (read_pairs, ".jsonl"),
        (read_pairs, ".csv"),
    ],
)
def test_memory_grows_by_positions_and_not_by_captions(tmp_path, own_process, read, suffix):
    sizes = (100, 1_000, 9_000)  # the first for what is imported at first use
    _, few, many = (own_process.submit(memory_of, n, tmp_path, read, suffix).result() for n in sizes)
    assert 0 < (many - few) / 8_000 < 130  # an Example with its caption takes about 350


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """A counting file object: an example in the middle of a large file costs the bytes of its line."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"caption {i}\n" for i in range(50_000)))
    dataset, counted = read_captions(path), []

    class Counting:
        def __init__(self, *arguments):
            self.file = open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, offset):
            self.file.seek(offset)

        def read(self, length):
            counted.append(length)
            return self.file.read(length)

    monkeypatch.setattr("dalleflamingo.sources.streamed.open", Counting, raising=False)
    assert [e.references[0] for e in dataset[40_000:40_003]] == ["caption 40000", "caption 40001", "caption 40002"]
    assert counted == [len("caption 40000\n")] * 3


def test_equal_captions_have_the_ids_that_lists_in_memory_had(tmp_path):
    lines = [f"caption {i * i % 11}" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    before, expected = {}, []
    for line in lines:
        expected.append(stable_id("caption", line, before.setdefault(line, 0)))
        before[line] += 1
    assert [e.image_id for e in read_captions(tmp_path / "a.txt")] == expected and len(set(expected)) == 300


@given(st.binary(max_size=60), st.integers(1, 7))
def test_blocks_of_any_size_give_the_same_lines(tmp_path_factory, content, size):
    """Against Python's own universal newlines."""
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(content)
    try:
        expected = None if b"\0" in content else list(io.StringIO(content.decode("utf-8-sig"), newline=None))
    except UnicodeDecodeError:
        expected = None
    block, text_files._BLOCK = text_files._BLOCK, size
    try:
        lines = list(text_files.lines_of(path))
    except DatasetError:
        assert expected is None or content.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1"))
    else:
        assert "".join(line.text for line in lines) == "".join(expected)
        assert [line.text for line in lines if line.text] == expected
        assert sum(line.length for line in lines) == os.path.getsize(path)
    finally:
        text_files._BLOCK = block
