"""Readers and writers: parity with pycocotools, the real files, round trips, and errors that name file and remedy."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from coco_files import write_coco
from hypothesis import example as and_also
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from dalleflamingo import datasets
from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage
from dalleflamingo.evaluation import caption_results, image_features
from dalleflamingo.sources import annotations

IMAGES = [{"id": 7, "file_name": "b.png", "scene": {"ground": "grass"}}, {"id": 3, "file_name": "a.png"}]
CAPTIONS = [
    {"id": 0, "image_id": 3, "caption": "a red bird "},
    {"id": 1, "image_id": 7, "caption": "a boat"},
    {"id": 2, "image_id": 3, "caption": "bird"},
]


def _file(folder: Path, payload) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps(payload))
    return path


def _coco(folder: Path, images=IMAGES, annotations=CAPTIONS) -> Path:
    return _file(folder, {"images": images, "annotations": annotations})


def _many(n: int) -> Dataset:
    return Dataset("many", tuple(Example(i * i, Path(f"{i}.png")) for i in range(n)))


def test_coco_keeps_image_order_caption_order_and_the_rest_of_the_record(tmp_path):
    found = annotations.read_coco(_coco(tmp_path), tmp_path / "images", name="tiny")
    assert found.name == "tiny"
    assert found[0] == Example(7, tmp_path / "images/b.png", ("a boat",), None, {"scene": {"ground": "grass"}})
    assert found[1] == Example(3, tmp_path / "images/a.png", ("a red bird ", "bird"))


def test_karpathy_splits_gather_restval_into_train_and_keep_the_folder(tmp_path):
    def record(cocoid, split, folder):
        sentences = [{"raw": f"caption {cocoid}", "tokens": ["caption"], "sentid": cocoid}]
        where = {"filepath": folder, "filename": f"{cocoid}.jpg"}
        return {"cocoid": cocoid, **where, "split": split, "sentences": sentences}

    records = [
        record(1, "train", "train2014"),
        record(2, "restval", "val2014"),
        record(3, "val", "val2014"),
        record(4, "test", "val2014"),
    ]
    path = _file(tmp_path, {"images": records, "dataset": "coco"})
    for split, ids in {"train": [1, 2], "val": [3], "test": [4]}.items():
        assert [e.image_id for e in annotations.read_karpathy(path, tmp_path, split)] == ids
    assert annotations.read_karpathy(path, tmp_path, "test")[0] == Example(
        4, tmp_path / "val2014/4.jpg", ("caption 4",)
    )
    with pytest.raises(DatasetError, match="splits are train, val, test, not 'restval'"):
        annotations.read_karpathy(path, tmp_path, "restval")


def test_nocaps_domains_are_read_and_split_in_the_order_of_the_tables(tmp_path):
    domains = datasets.DOMAINS[::-1] * 2
    images = [{"id": i, "file_name": f"{i}.png", "domain": domain} for i, domain in enumerate(domains)]
    path = _coco(tmp_path, images, [{"image_id": 5, "caption": "a kite"}])
    found = annotations.read_coco(path, tmp_path)
    by_domain = found.by_domain()
    assert list(by_domain) == ["in-domain", "near-domain", "out-domain"]
    assert [e.image_id for e in by_domain["out-domain"]] == [0, 3]
    assert by_domain["in-domain"][1].references == ("a kite",)
    images[0]["domain"] = "overseas"
    with pytest.raises(DatasetError, match="image 0 has domain 'overseas'; expected in-domain, near-domain"):
        annotations.read_coco(_coco(tmp_path, images, []), tmp_path)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([{"image_id": 1, "caption": "x"}], 'a list of 1, the first one an object .*expected an object whose "images"'),
        ({"info": {}}, "an object with the keys 'info'"),
        ({"images": IMAGES}, 'whose "annotations" is a list'),
        ({"images": ["a.png"], "annotations": []}, 'whose "images" is a list of objects'),
        ({"images": [{"id": "7"}], "annotations": []}, '"id" in every record, of type int'),
        ({"images": [{"id": True}], "annotations": []}, '"id" in every record, of type int'),
        ({"images": [{"id": 2**63}], "annotations": []}, '"id" in every record, of type int'),
        ({"images": [{"id": 7, "file_name": None}], "annotations": []}, '"file_name" in every record, of type str'),
        ({"images": IMAGES, "annotations": [{"image_id": 7}]}, '"caption" in every record, of type str'),
        ({"images": IMAGES * 2, "annotations": []}, "image id 7 occurs 2 times"),
        ({"images": IMAGES, "annotations": CAPTIONS + CAPTIONS[1:2]}, "annotation id 1 occurs 2 times"),
        ({"images": IMAGES[:1], "annotations": CAPTIONS}, "'a red bird ' is of image 3, which is not among the 1"),
    ],
)
def test_json_of_another_shape_is_refused_with_its_file_and_what_was_expected(tmp_path, payload, message):
    path = _file(tmp_path, payload)
    with pytest.raises(DatasetError, match=message) as refusal:
        annotations.read_coco(path, tmp_path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>404</title>", "begins '<!DOCTYPE html>.*web page"),
        (json.dumps({"images": IMAGES}).encode()[:40], "is not JSON .*40 characters .*cut short"),
        (b"", "is not JSON .*0 characters"),
        (b"[" * 100_000, "is not JSON"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not in UTF-8 but in Latin-1 or Windows-1252, if it is text at all"),
    ],
)
def test_a_file_that_is_not_json_is_named_with_what_it_begins_with(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    for read in (lambda: annotations.read_coco(path, tmp_path), lambda: caption_results.read_results(path)):
        with pytest.raises(DatasetError, match=message) as refusal:
            read()
        assert str(path) in str(refusal.value)


def test_a_missing_file_or_a_folder_instead_of_a_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match="there is no file .*nowhere.json"):
        annotations.read_coco(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(DatasetError, match="cannot be read .Is a directory"):
        annotations.read_karpathy(tmp_path, tmp_path, "test")


@and_also([["half an emoji: \ud83d", "\u2028 \x00 é"]])
@given(st.lists(st.lists(st.text(), max_size=3), max_size=4))
def test_any_caption_survives_writing_and_reading(tmp_path_factory, captions):
    folder = tmp_path_factory.mktemp("round")
    domains = (None, *datasets.DOMAINS)
    examples = tuple(
        Example(10 * i, folder / f"{i}.png", tuple(c), domains[i], {"scene": {"things": c}})
        for i, c in enumerate(captions)
    )
    write_coco(folder / "a.json", examples)
    assert annotations.read_coco(folder / "a.json", folder).examples == examples
    results = {i: caption for i, c in enumerate(captions) for caption in c}
    caption_results.write_results(folder / "r.json", results)
    assert caption_results.read_results(folder / "r.json") == results
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "r.json"]


def test_subfolders_survive_a_round_trip_when_the_images_folder_is_named(tmp_path):
    examples = (Example(1, tmp_path / "val2014/1.jpg"), Example(2, tmp_path / "train2014/2.jpg"))
    write_coco(tmp_path / "a.json", examples, images=tmp_path)
    assert annotations.read_coco(tmp_path / "a.json", tmp_path).examples == examples


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    caption_results.write_results(tmp_path / "r.json", {1: "kept"})
    with pytest.raises(TypeError):
        caption_results.write_results(tmp_path / "r.json", {1: object()})
    assert caption_results.read_results(tmp_path / "r.json") == {1: "kept"}


def test_pycocotools_reads_what_we_write(tmp_path):
    found = annotations.read_coco(_coco(tmp_path), tmp_path)
    write_coco(tmp_path / "ours.json", found)
    caption_results.write_results(tmp_path / "results.json", {3: "a bird", 7: "a boat"})
    stock = COCO(str(tmp_path / "ours.json"))
    for example in found:
        assert [a["caption"] for a in stock.imgToAnns[example.image_id]] == list(example.references)
    predictions = stock.loadRes(str(tmp_path / "results.json"))
    assert {i: predictions.imgToAnns[i][0]["caption"] for i in predictions.getImgIds()} == {3: "a bird", 7: "a boat"}


def test_results_with_two_captions_for_one_image_are_refused(tmp_path):
    path = _file(tmp_path, [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}])
    with pytest.raises(DatasetError, match="image_id 1 occurs 2 times"):
        caption_results.read_results(path)
    with pytest.raises(DatasetError, match="expected COCO results"):
        caption_results.read_results(_coco(tmp_path))


def test_a_subset_is_chosen_by_its_seed_nested_and_in_file_order():
    many = _many(50)
    small, large = many.subset(4, seed=1), many.subset(24, seed=1)
    assert len(small) == 4 and len(large) == 24
    assert set(small.examples) < set(large.examples)
    assert list(large) == [e for e in many if e in set(large.examples)]
    assert small != many.subset(4, seed=2)
    assert many.subset(50, seed=1) == many


def test_a_subset_depends_on_ids_not_on_file_order():
    many = _many(50)
    turned = Dataset("many", many.examples[::-1])
    assert set(turned.subset(5).examples) == set(many.subset(5).examples)


@pytest.mark.parametrize("n", [0, 4, -1])
def test_a_subset_that_cannot_be_is_refused(n):
    with pytest.raises(DatasetError, match=f"a subset of {n} was asked of many: ask for 1 to 3"):
        _many(3).subset(n)


def test_two_examples_of_one_id_make_no_data_set():
    with pytest.raises(DatasetError, match="data set twins: image id 5 occurs 2 times"):
        Dataset("twins", (Example(5, Path("a")), Example(5, Path("b"))))


def test_a_slice_is_a_data_set():
    assert _many(5)[1:3] == Dataset("many", _many(5).examples[1:3])


def _picture(path: Path) -> bytes:
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    "spoil",
    [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"<html>", lambda b: b[:60] + b"?" * 900],
    ids=["empty", "truncated", "html", "overwritten"],
)
def test_a_corrupted_image_is_named_with_a_reason_and_a_remedy(tmp_path, suffix, spoil):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(spoil(_picture(path)))
    broken = Dataset("broken", (Example(1, path),))
    with pytest.raises(UnreadableImage) as refusal:
        broken.open(broken[0])
    assert refusal.value.path == path and refusal.value.remedy in str(refusal.value)
    assert str(path) in str(refusal.value) and f"{path.stat().st_size:,} bytes" in str(refusal.value)


def test_an_image_that_claims_to_be_enormous_is_unreadable_not_a_crash(tmp_path):
    content = bytearray(_picture(tmp_path / "huge.png"))
    content[16:24] = struct.pack(">II", 40_000, 40_000)  # width and height in the header, 1.6 gigapixels
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "huge.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match="1600000000 pixels.*; make it smaller") as refusal:
        datasets.open_image(tmp_path / "huge.png")
    assert "draw it again" not in str(refusal.value)  # which would not help


def test_a_missing_image_is_unreadable_too(tmp_path):
    lost = Dataset("lost", (Example(1, tmp_path / "lost.png"),))
    with pytest.raises(UnreadableImage, match="lost.png: there is no such file; download or draw it"):
        lost.open(lost[0])


def test_images_open_as_rgb_upright_and_over_white(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    clear = datasets.open_image(tmp_path / "clear.png")
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)

    sideways = Image.new("RGB", (2, 1), "red")
    sideways.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright", as telephones write it
    sideways.save(tmp_path / "phone.png", exif=exif)
    upright = datasets.open_image(tmp_path / "phone.png")
    assert upright.size == (1, 2) and upright.getpixel((0, 1)) == (0, 0, 255)

    for mode in ("L", "P", "LA", "1", "CMYK"):
        file = tmp_path / f"{mode}.tif"
        Image.new("L", (2, 2), "white").convert("RGB").convert(mode).save(file)
        opened = datasets.open_image(file)
        assert opened.mode == "RGB" and opened.getpixel((1, 1)) == (255, 255, 255)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey of 8 bits
DEEP = {  # the same picture in deep grey, its greatest value white: (dtype, white, suffix)
    "16-bit PNG": (np.uint16, 65_535, "png"),
    "16-bit TIFF": (np.uint16, 65_535, "tif"),
    "16-bit TIFF, big-endian": (np.dtype(">u2"), 65_535, "tif"),
    "16-bit JPEG 2000": (np.uint16, 65_535, "jp2"),
    "16-bit PGM": (np.uint16, 65_535, "pgm"),
    "12 bits in 16": (np.uint16, 4095, "png"),
    "8 bits in 16": (np.uint16, 255, "tif"),
    "32-bit integers of 16 bits": (np.int32, 65_535, "tif"),
    "32-bit integers of 8 bits": (np.int32, 255, "tif"),
    "floats in 0 to 1": (np.float32, 1, "tif"),
    "floats in 0 to 255": (np.float32, 255, "tif"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_opens_as_the_same_picture_in_8_bits(tmp_path, kind):
    dtype, white, suffix = DEEP[kind]
    values = RAMP.astype(np.float64) / 255 * white
    values = values.round() if np.issubdtype(dtype, np.integer) else values
    deep = Image.fromarray(values.astype(dtype))
    assert deep.mode in ("I", "F", "I;16", "I;16B")
    deep.save(tmp_path / f"deep.{suffix}", **({"irreversible": False} if suffix == "jp2" else {}))
    opened = np.asarray(datasets.open_image(tmp_path / f"deep.{suffix}"))
    assert (opened == RAMP[..., None]).all()
    assert (np.asarray(datasets.to_rgb(deep)) == opened).all()  # a model that is given the image itself


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, float("nan")), (0.0, 7e4), (0.0, float("inf"))])
def test_grey_of_an_unknown_range_is_refused_with_its_range(tmp_path, low, high):
    Image.fromarray(np.array([[low, high]] * 2, np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UnreadableImage, match=r"depth\.tif: .*grey values go from .*expected 0 to 1 or 255 or 4095"):
        datasets.open_image(tmp_path / "depth.tif")
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "count.tif")
    with pytest.raises(UnreadableImage, match="from 0 to 70000, expected 0 to 255 or 4095 or 65535"):
        datasets.open_image(tmp_path / "count.tif")


def test_transparent_deep_grey_is_white(tmp_path):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    deep.save(tmp_path / "clear.png", transparency=257 * 3)
    opened = np.asarray(datasets.open_image(tmp_path / "clear.png"))[..., 0]
    assert (opened == np.where(RAMP == 3, 255, RAMP)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP[:, :9]).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (np.asarray(datasets.open_image(tmp_path / "turned.png")) == expected).all()


def _exif(orientation: bytes, *others: bytes) -> bytes:
    """An EXIF block of entries of 12 bytes as they are in the file: tag, type, count, value."""
    entries = [orientation, *others]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


TURNED = struct.pack("<HHII", 0x0112, 3, 1, 6)
DAMAGED = {  # -> is it turned?
    "a description of another type": (_exif(TURNED, struct.pack("<HHII", 0x010E, 5, 1, 4)), True),
    "a value beyond the block": (_exif(TURNED, struct.pack("<HHII", 0x010F, 2, 999, 60_000)), True),
    "an unknown type": (_exif(TURNED, struct.pack("<HHII", 0x9209, 77, 1, 1)), True),
    "an orientation out of range": (_exif(struct.pack("<HHII", 0x0112, 3, 1, 77)), False),
    "an orientation that is text": (_exif(struct.pack("<HHI4s", 0x0112, 2, 4, b"up!")), False),
    "an orientation divided by 0": (_exif(struct.pack("<HHII", 0x0112, 5, 1, 8)), False),
    "no TIFF header": (b"Exif\0\0not at all", False),
    "cut short": (_exif(TURNED)[:18], False),
    "empty": (b"Exif\0\0", False),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the damage
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metadata_does_not_refuse_an_image(tmp_path, kind, suffix):
    block, turned = DAMAGED[kind]
    Image.new("RGB", (16, 8), "red").save(tmp_path / f"damaged.{suffix}", exif=block)
    assert datasets.open_image(tmp_path / f"damaged.{suffix}").size == ((8, 16) if turned else (16, 8))


def test_an_image_is_known_by_its_content_whatever_its_name(tmp_path):
    for name in ("a.jpg", "a.txt", "a", "a.heic"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name, format="PNG")
        assert datasets.open_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "b.png").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UnreadableImage, match="Pillow knows no image format.*save it as PNG or JPEG"):
        datasets.open_image(tmp_path / "b.png")


def test_a_name_that_cannot_be_printed_is_escaped_in_the_message(tmp_path):
    for name, shown in ((b"caf\xe9.png", r"caf\udce9.png"), (b"two\nlines.png", r"two\nlines.png")):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_bytes(b"")
        with pytest.raises(UnreadableImage) as refusal:
            datasets.open_image(path)
        assert shown in str(refusal.value) and str(refusal.value).isprintable()
        assert refusal.value.path == path  # itself, by which it can be found


def test_a_json_number_of_thousands_of_digits_is_refused_not_a_crash(tmp_path):
    (tmp_path / "a.json").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(DatasetError, match="a.json is not JSON .*digits"):
        caption_results.read_results(tmp_path / "a.json")


# Labels


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("A man, in a Red hat.", "a man, in a red hat"),
        ("  Two   dogs\n", "two dogs"),
        ('A sign: "STOP!" (#2)', "a sign stop 2"),
        ("cats;dogs~and*birds", "cats dogs and birds"),
        ("Is it a well-lit dog's bed?", "is it a well-lit dog's bed?"),  # other punctuation stays
        ("U.S.A. flag . ", "u s a flag"),
        ("...", ""),
        ("Word " * 31, " ".join(["word"] * 30)),
    ],
)
def test_a_label_is_a_caption_as_blip_cleans_it(caption, label):
    assert datasets.clean_caption(caption) == label


@given(st.text())
@and_also("A. " * 40)
@and_also("İ ǅ ẞ. \t\x1f\u3000x")
def test_a_label_is_lower_case_without_ten_marks_of_at_most_30_words_and_clean_already(caption):
    label = datasets.clean_caption(caption)
    words = label.split(" ")
    assert label == label.lower() and not set('.!"()*#:;~') & set(label) and len(words) <= 30
    assert label == "" or all(words) and label == " ".join(label.split())
    assert datasets.clean_caption(label) == label


@pytest.mark.parametrize("split", ["val", "test"])
def test_three_in_four_real_captions_end_in_a_full_stop_and_no_label_does(real_data, split):
    found = annotations.read_coco(real_data / "coco-karpathy" / f"coco_karpathy_{split}_gt.json", real_data)
    captions = [caption for example in found for caption in example.references]
    assert sum(caption.rstrip().endswith(".") for caption in captions) / len(captions) == pytest.approx(0.75, abs=0.01)
    labels = list(map(datasets.clean_caption, captions))
    assert all(labels) and not any(label.endswith(".") for label in labels)
    assert max(len(label.split()) for label in labels) == 30


@pytest.mark.parametrize("split", ["val", "test"])
def test_real_karpathy_ground_truth_equals_what_pycocotools_finds(real_data, split):
    path = real_data / "coco-karpathy" / f"coco_karpathy_{split}_gt.json"
    found = annotations.read_coco(path, Path("val2014"))
    assert len(found) == 5000 and sum(len(e.references) for e in found) == 25010
    stock = COCO(str(path))
    for example in found:
        assert [a["caption"] for a in stock.imgToAnns[example.image_id]] == list(example.references)
        assert example.path == Path(f"val2014/COCO_val2014_{example.image_id:012d}.jpg")


def test_real_karpathy_ground_truth_survives_a_round_trip(real_data, tmp_path):
    found = annotations.read_coco(real_data / "coco-karpathy/coco_karpathy_test_gt.json", tmp_path, "gt")
    write_coco(tmp_path / "copy.json", found)
    assert annotations.read_coco(tmp_path / "copy.json", tmp_path, "gt") == found


def test_real_nocaps_header_names_4500_images_and_has_no_captions_or_domains(real_data, tmp_path):
    header = json.loads((real_data / "nocaps/nocaps_val_image_info.json").read_text())
    assert "annotations" not in header
    found = annotations.read_coco(_coco(tmp_path, header["images"], []), Path("images"))
    assert len(found) == 4500
    assert found[0].path == Path("images/0013ea2087020901.jpg")
    assert found[0].extra["open_images_id"] == "0013ea2087020901"
    assert {e.references for e in found} == {()} and {e.domain for e in found} == {None} and found.by_domain() == {}
    assert len(found.subset(2000, seed=0)) == 2000


def test_all_51_real_photographs_open_with_their_size_and_five_captions(real_data):
    photos = []
    for split in ("train2017", "val2017"):
        root = real_data / "coco-photos"
        whole = annotations.read_coco(root / f"captions_{split}.json", root / split)
        photos += [(whole, example) for example in whole if example.path.exists()]
    assert len(photos) == 51
    for whole, example in photos:
        picture = whole.open(example)
        assert picture.mode == "RGB" and picture.size == (example.extra["width"], example.extra["height"])
        assert len(example.references) == 5


def test_real_predictions_of_another_shape_are_refused_and_in_coco_shape_are_read(real_data, tmp_path):
    path = real_data / "magic-predictions/magic_result.json"
    with pytest.raises(DatasetError, match='magic_result.json: expected "image_id" in every record'):
        caption_results.read_results(path)
    published = json.loads(path.read_text())
    captions = {int(r["image_name"][-16:-4]): r["prediction"] for r in published}
    caption_results.write_results(tmp_path / "magic.json", captions)
    assert caption_results.read_results(tmp_path / "magic.json") == captions and len(captions) == 4982


def test_image_files_are_opened_on_access_and_not_before(tmp_path):
    for i, colour in enumerate(("red", "blue", "white")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{i}.png")
    pictures = image_features.ImageFiles([*(tmp_path / f"{i}.png" for i in range(3)), tmp_path / "gone.png"])
    assert len(pictures) == 4 and pictures[1].getpixel((0, 0)) == (0, 0, 255)
    assert [picture.getpixel((0, 0)) for picture in pictures[::2]] == [(255, 0, 0), (255, 255, 255)]
    with pytest.raises(datasets.UnreadableImage, match="gone.png: there is no such file"):
        list(pictures)
