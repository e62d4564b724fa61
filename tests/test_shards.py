"""webdataset shards: what comes in is whole, safe and named; what goes out is read by the library itself."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from dalleflamingo.datasets import DatasetError
from dalleflamingo.sources import shards
from dalleflamingo.sources.shards import is_shards, new_folder, read_shards, write_shards


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, kind)
    return content.getvalue()


def tar(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


SAMPLES = [
    ("000.jpg", picture("red", "JPEG")),
    ("000.txt", "a red kite\n"),
    ("000.cls", "7"),
    ("001.PNG", picture("blue")),
    ("001.json", json.dumps({"captions": ["a boat", "a ship"], "image_id": 42, "licence": "CC0", "url": None})),
    ("002.webp", picture("green", "WEBP")),
    ("003.txt", "no image"),
    ("sub/004.jpg", "no image at all"),
    ("005.jpg", picture()),
    ("005.json", json.dumps({"caption": "of json"})),
    ("005.txt", "of txt"),
]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_samples_become_images_with_their_captions(tmp_path, capsys, name, mode):
    dataset = read_shards(tar(tmp_path / name, SAMPLES, mode), tmp_path / "here")
    assert dataset.name == "a" and [e.references for e in dataset] == [
        ("a red kite",), ("a boat", "a ship"), (), ("of txt",)
    ]  # fmt: skip
    red, blue, green, _ = dataset
    assert [dataset.open(e).getpixel((0, 0))[0] > 200 for e in (red, blue, green)] == [True, False, False]
    assert red.extra == {"class": "7"} and blue.extra == {"licence": "CC0"} and blue.image_id == 42
    out = capsys.readouterr().out
    assert "samples: 4; left out: a/003 (1: no image); a/sub/004 (1: no format that Pillow opens)" in out


def test_captions_are_read_without_unpacking_images(tmp_path):
    texts = read_shards(tar(tmp_path / "a.tar", SAMPLES), tmp_path / "here", captions=True)
    assert [e.references[0] for e in texts] == ["a red kite", "a boat", "a ship", "no image", "of txt"]
    assert not (tmp_path / "here/images").exists()


def test_a_folder_and_a_pattern_of_shards_are_one_data_set_whose_ids_stay(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in (1, 0):
        tar(folder / f"s-{number:03d}.tar", [("7.jpg", picture()), ("7.txt", f"caption {number}")])
    first = read_shards(folder, tmp_path / "one")
    pattern = read_shards(folder / "s-{000..001}.tar", tmp_path / "two")
    assert [e.references for e in first] == [("caption 0",), ("caption 1",)] == [e.references for e in pattern]
    assert [e.image_id for e in first] == [e.image_id for e in pattern] and first.name == "many"
    tar(folder / "s-002.tar", [("8.jpg", picture())])
    assert [e.image_id for e in read_shards(folder, tmp_path / "one")][:2] == [e.image_id for e in first]
    with pytest.raises(DatasetError, match="there is no shard .*s-003.tar: check the path, or the pattern"):
        read_shards(folder / "s-{000..003}.tar", tmp_path / "three")
    with pytest.raises(DatasetError, match="close the brace"):
        read_shards(folder / "s-{000..003.tar", tmp_path / "three")


def test_shards_are_unpacked_once(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", SAMPLES)
    before = list(read_shards(path, tmp_path / "here"))
    monkeypatch.setattr(shards, "_unpack", None)
    assert list(read_shards(path, tmp_path / "here")) == before
    tar(path, SAMPLES[:2])
    with pytest.raises(TypeError):
        read_shards(path, tmp_path / "here")
    monkeypatch.undo()
    assert len(read_shards(path, tmp_path / "here")) == 1


def test_an_interrupted_unpacking_is_done_again(tmp_path, monkeypatch):
    path, save = tar(tmp_path / "a.tar", SAMPLES), shards._save_image

    def interrupted(sample, *rest):
        if sample["__key__"] == "002":
            raise KeyboardInterrupt
        return save(sample, *rest)

    monkeypatch.setattr(shards, "_save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_shards(path, tmp_path / "here")
    assert not (tmp_path / "here/images.jsonl").exists()
    monkeypatch.undo()
    assert len(read_shards(path, tmp_path / "here")) == 4


@pytest.mark.parametrize(
    "key",
    ["../../x", "/etc/x", "./y", "a/" + "../" * 9 + "b", "b/../../../b", "x" * 300, "ł🚣 <b>&\n", "..", "sub/../z"],
)
def test_no_name_of_a_member_leads_out_of_the_folder(tmp_path, key):
    inside = tmp_path / "deep/er/here"
    members = [(f"{key}.jpg", picture()), (f"{key}.txt", "a kite")]
    path = tar(tmp_path / "a.tar", members)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    try:
        [example] = read_shards(path, inside)
    except DatasetError as error:  # webdataset knows no key in it
        assert key == ".." and "holds no sample with an image" in str(error)
        return
    assert example.path.resolve().is_relative_to(inside.resolve()) and example.references == ("a kite",)
    assert all(p.is_relative_to(inside) for p in tmp_path.rglob("*") if p.is_file() and p not in before)


def test_keys_that_differ_are_different_images(tmp_path):
    keys = ["x" * 200 + "1", "x" * 200 + "2", "a%2Fb", "a/b"]
    members = [(f"{key}.png", picture()) for key in keys]
    dataset = read_shards(tar(tmp_path / "a.tar", members), tmp_path / "here")
    assert len({e.path for e in dataset}) == len({e.image_id for e in dataset}) == 4


def test_links_in_a_shard_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"{kind.decode()}.jpg")
            link.type, link.linkname = kind, "/etc/hostname"
            file.addfile(link)
    with pytest.raises(DatasetError, match="holds no sample with an image .* but no samples at all"):
        read_shards(tmp_path / "a.tar", tmp_path / "here")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", picture()), ("1.jpg", picture())], "holds two members 1.jpg: make it again"),
        ([("1.jpg", picture()), ("1.JPG", picture())], "holds two members 1.jpg"),
        ([("1.jpg", picture()), ("2.jpg", picture()), ("1.txt", "a")], "holds the members of 1 apart from each other"),
        ([("1.jpg", picture()), ("./1.jpg", picture())], "holds the members of 1 apart"),
        ([("1.jpg", picture()), ("1.txt", "é".encode("latin-1"))], "sample 1.txt is not in UTF-8 .byte 1"),
        ([("1.jpg", picture()), ("1.json", "{")], "sample 1.json is not JSON .*mend it"),
        ([("1.jpg", picture()), ("1.json", "[1]")], "sample 1.json is a list of 1"),
        ([("1.jpg", picture()), ("1.json", '{"caption": 3}')], "sample 1.json is an object"),
        ([("1.txt", "a")], "holds no sample with an image .*but a/1 .1: no image"),
        ([("1.jpg", "text")], "but a/1 .1: no format that Pillow opens"),
        ([("1.jpg", picture()), ("1.json", '{"image_id": 3}'), ("2.jpg", picture()), ("2.json", '{"image_id": 3}')],
         "image id 3 occurs 2 times"),
    ],
)  # fmt: skip
def test_a_shard_that_is_wrong_is_refused_with_the_sample(tmp_path, members, message):
    with pytest.raises(DatasetError, match=message):
        read_shards(tar(tmp_path / "a.tar", members), tmp_path / "here")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_cut_anywhere_is_refused(tmp_path, mode):
    members = [(f"{i}.jpg", picture()) for i in range(3)]
    whole = tar(tmp_path / "whole.tar", members, mode).read_bytes()
    end = len(whole) if mode == "w:gz" else 3 * 1024  # after which there are zeros only
    for cut in {0, 1, 100, 512, 600, 1024, 2048, 2900, end - 1, end // 2, end // 3} & set(range(end)):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(DatasetError, match="is cut short or damaged .*fetch it again|is not a tar file"):
            read_shards(tmp_path / "a.tar", tmp_path / "here")


def test_a_damaged_header_in_the_middle_is_refused(tmp_path):
    content = bytearray(tar(tmp_path / "a.tar", [(f"{i}.jpg", picture()) for i in range(3)]).read_bytes())
    content[1024:1100] = b"x" * 76
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DatasetError, match="is cut short or damaged"):
        read_shards(tmp_path / "a.tar", tmp_path / "here")


def test_what_is_no_shard_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(picture())
    with pytest.raises(DatasetError, match="a.tar .* is not a tar file"):
        read_shards(tmp_path / "a.tar", tmp_path / "here")
    with pytest.raises(DatasetError, match="there is no shard .*gone.tar"):
        read_shards(tmp_path / "gone.tar", tmp_path / "here")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "a.tar", SAMPLES)
    with pytest.raises(DatasetError, match="two shards are called a: rename one"):
        read_shards(tmp_path / "{one,two}/a.tar", tmp_path / "here")


def test_a_folder_is_of_shards_only_if_it_holds_no_image(tmp_path):
    assert not is_shards(tmp_path)
    tar(tmp_path / "backup.tar", SAMPLES)
    tar(tmp_path / "without_suffix", SAMPLES)
    assert is_shards(tmp_path) and is_shards(tmp_path / "without_suffix")
    (tmp_path / "photo.dat").write_bytes(picture())
    assert not is_shards(tmp_path) and not is_shards(tmp_path / "photo.dat")


def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match="pip install 'webdataset>=1.0'"):
        read_shards(tar(tmp_path / "a.tar", SAMPLES), tmp_path / "here")
    with pytest.raises(ImportError, match="pip install"):
        write_shards(tmp_path / "out", [{"__key__": "1", "txt": "a"}])
    assert not (tmp_path / "out").exists()


def samples(n: int):
    return ({"__key__": f"{i:03d}", "png": picture(), "txt": f"łódź {i}", "json": {"i": i}} for i in range(n))


def test_the_library_reads_what_is_written_and_so_do_we(tmp_path):
    paths = write_shards(tmp_path / "out", samples(7), per_shard=3)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    read = webdataset.WebDataset(list(map(str, paths)), shardshuffle=False, empty_check=False).decode("pil")
    found = [(one["__key__"], one["txt"], one["json"]["i"], one["png"].size) for one in read]
    assert found == [(f"{i:03d}", f"łódź {i}", i, (4, 4)) for i in range(7)]
    assert [e.references for e in read_shards(tmp_path / "out", tmp_path / "here")] == [
        (f"łódź {i}",) for i in range(7)
    ]


def test_the_same_samples_are_the_same_bytes(tmp_path):
    one, two = (write_shards(tmp_path / name, samples(4), per_shard=2) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_samples_are_written_one_at_a_time(tmp_path):
    ahead = []

    def counting():
        for i, sample in enumerate(samples(50)):
            written = sum(path.stat().st_size for path in tmp_path.rglob("*.tar"))
            ahead.append((i, written))
            yield sample

    write_shards(tmp_path / "out", counting(), per_shard=5)
    assert ahead[-1][1] >= 9 * 10_240  # nine shards were complete before the last samples were made


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as part:
        assert not any(part.iterdir())
        (part / "b").write_text("b")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    with pytest.raises(DatasetError, match="out is there and holds files: give another folder, or delete it"):
        with new_folder(tmp_path / "out"):
            pass
