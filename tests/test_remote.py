"""NoCaps and COCO from a local server: only what a run uses is fetched, and a user's own copy is left alone."""

import io
import json
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import failing_server
import fakes
import headers
import huggingface_hub
import pandas as pd
import pytest
from huggingface_hub import constants
from test_data_calls import NOTEBOOKS, REPLACED, code
from test_downloads import PHOTOGRAPH, jpeg

from dalleflamingo import __main__ as command_line
from dalleflamingo import cycle, datasets, profiles, registry
from dalleflamingo.captioner import without_unreadable
from dalleflamingo.course import colab as colab_cell
from dalleflamingo.course import data
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.datasets import Dataset, DatasetError, UnreadableImage
from dalleflamingo.evaluation import image_features
from dalleflamingo.evaluation.image_features import ImageFiles
from dalleflamingo.registry import ENTRIES
from dalleflamingo.sources import annotations, downloads, registered, remote
from dalleflamingo.sources.downloads import DownloadError
from dalleflamingo.sources.remote import RemoteDataset

DOMAINS = ("in-domain", "near-domain", "out-domain")


def header_of(records: list[dict], **more) -> bytes:
    info = {"url": "http://nocaps.org", "version": "0.2"}
    licences = [{"url": "https://creativecommons.org/licenses/by/2.0/", "id": 0, "name": "CC BY 2.0"}]
    return json.dumps({"info": info, "licenses": licences, "images": records, **more}).encode()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no copies of the user's own."""
    for variable in ("DALLEFLAMINGO_NOCAPS", "DALLEFLAMINGO_COCO"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "cache"
    assets = partial(huggingface_hub.cached_assets_path, assets_dir=folder)
    monkeypatch.setattr(remote, "cached_assets_path", assets)
    return folder / "dalleflamingo"


@pytest.fixture
def server(cache, monkeypatch):
    """NoCaps with 12 photographs and COCO with 6 on a local server, at the addresses of the registry."""
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "_reached", {})
    with failing_server.Server() as running:
        records = [
            {
                "id": i,
                "file_name": f"{i:016x}.jpg",
                "coco_url": f"{running.url}/nocaps/val/{i:016x}.jpg",
                "width": 200,
                "height": 200,
                "license": 0,
                "open_images_id": f"{i:016x}",
                "date_captured": "2018-11-06 11:04:33",
            }
            for i in range(12)
        ]
        domains = [
            {"id": one["id"], "file_name": one["file_name"], "domain": DOMAINS[one["id"] % 3]} for one in records
        ]
        captions = [{"id": 10 * i + k, "image_id": i, "caption": f"a lion {k}"} for i in range(12) for k in range(10)]
        running.files |= {f"/nocaps/val/{one['file_name']}": jpeg(one["id"]) for one in records}
        running.files["/header.json"] = header_of(records)
        running.files["/captions.json"] = json.dumps({"images": domains, "annotations": captions}).encode()
        coco = []
        for i, split in enumerate(("train", "restval", "val", "test", "train", "restval")):
            place = "train2014" if split == "train" else "val2014"
            name = f"COCO_{place}_{i:012d}.jpg"
            told = [{"raw": f"a dog {i} {k}"} for k in range(5)]
            coco.append({"cocoid": i, "filepath": place, "filename": name, "split": split, "sentences": told})
            running.files[f"/coco/{place}/{name}"] = jpeg(100 + i)
        running.files["/all.zip"] = zipped(coco)
        monkeypatch.setattr(remote, "HEADER_URL", f"{running.url}/header.json")
        monkeypatch.setattr(remote, "COCO_IMAGES", f"{running.url}/coco")
        for name, file in (("nocaps", "captions.json"), ("coco", "all.zip")):
            monkeypatch.setitem(ENTRIES, name, replace(ENTRIES[name], url=f"{running.url}/{file}"))
        yield running
        running.shutdown()


def zipped(records: list[dict]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("dataset_coco.json", json.dumps({"images": records, "dataset": "coco"}))
        opened.writestr("dataset_flickr8k.json", "{}")
    return buffer.getvalue()


def fetched(server) -> list[str]:
    """Photographs that were asked for."""
    return sorted(path.rpartition("/")[2] for path, _ in server.requests if path.endswith(".jpg"))


def names(dataset: Dataset) -> list[str]:
    return sorted(example.path.name for example in dataset)


def test_the_addresses_are_the_official_ones():
    assert ENTRIES["nocaps"].url == "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
    assert ENTRIES["coco"].url == "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
    assert remote.HEADER_URL == "https://s3.amazonaws.com/nocaps/nocaps_val_image_info.json"
    assert remote.COCO_IMAGES == "http://images.cocodataset.org"


def test_a_data_set_is_loaded_without_a_photograph_and_a_subset_fetches_its_own(server, cache, capsys):
    dataset = registered.load_dataset("nocaps")
    assert isinstance(dataset, RemoteDataset) and dataset.name == "nocaps" and len(dataset) == 12
    assert {len(example.references) for example in dataset} == {10} and not fetched(server)
    assert list(dataset.by_domain()) == list(DOMAINS) and not fetched(server)
    part = dataset.subset(5, seed=1)
    assert fetched(server) == names(part) and isinstance(part, RemoteDataset)
    assert all(example.path.read_bytes() == server.files[f"/nocaps/val/{example.path.name}"] for example in part)
    said = capsys.readouterr().out
    assert "photographs of nocaps: 5 of 5 to fetch, about 2 MB, from 127.0.0.1" in said and str(cache) in said
    before = len(server.requests)
    assert registered.load_dataset("nocaps").subset(5, seed=1) == part and len(server.requests) == before


@pytest.mark.parametrize(
    ("take", "count"),
    [
        (lambda dataset: dataset[:4], 4),
        (lambda dataset: dataset[3:5], 2),
        (lambda dataset: dataset.filter({0, 7, 99}), 2),
        (lambda dataset: dataset.by_domain()["out-domain"], 0),
        (lambda dataset: dataset.by_domain()["out-domain"].subset(3), 3),
        (lambda dataset: dataset.by_domain()["in-domain"][:1], 1),
        (lambda dataset: list(dataset), 0),
        (lambda dataset: dataset[5], 0),
        (lambda dataset: dataset.open(dataset[5]), 1),
        (lambda dataset: dataset.fetch(), 12),
    ],
)
def test_what_is_used_is_fetched_and_nothing_else(server, take, count):
    part = take(registered.load_dataset("nocaps"))
    assert len(fetched(server)) == count
    if isinstance(part, Dataset) and count:
        assert fetched(server) == names(part) and all(example.path.is_file() for example in part)
        assert ImageFiles(example.path for example in part)[0].size == (200, 200)


def test_a_whole_data_set_is_fetched_by_a_journey_as_far_as_it_comes(server):
    """`run_journey` takes slices."""
    dataset = registered.load_dataset("nocaps")
    for start in (0, 4):
        assert all(dataset.open(example).size == (200, 200) for example in dataset[start : start + 4])
    assert len(fetched(server)) == 8


def test_licences_and_addresses_are_kept_beside_the_photographs(server, cache):
    registered.load_dataset("nocaps")
    kept = json.loads((cache / "nocaps/default/licences.json").read_text())
    assert kept["licenses"][0]["name"] == "CC BY 2.0" and kept["info"]["url"] == "http://nocaps.org"
    name = f"{3:016x}.jpg"
    assert kept["images"][name]["coco_url"] == f"{server.url}/nocaps/val/{name}"
    assert kept["images"][name]["license"] == 0 and len(kept["images"]) == 12
    registered.load_dataset("coco", "val")
    assert json.loads((cache / "coco/default/licences.json").read_text())["terms"] == remote.COCO_TERMS


def test_coco_comes_in_karpathys_splits_each_photograph_from_its_folder(server, cache):
    train = registered.load_dataset("coco", "train")
    assert train.name == "coco/train" and [example.image_id for example in train] == [0, 1, 4, 5]
    assert registry.entry_of(train.name) is ENTRIES["coco"] and not fetched(server)
    train.fetch()
    assert fetched(server) == names(train)
    for example in train:
        assert example.path == cache / "coco/default" / example.path.parent.name / example.path.name
        assert example.path.read_bytes() == server.files[f"/coco/{example.path.parent.name}/{example.path.name}"]
    assert [example.references[0] for example in registered.load_dataset("coco", "test")] == ["a dog 3 0"]
    assert len(server.asked("/all.zip")) == 1 and not list(cache.rglob("*flickr*"))


def test_a_photograph_that_is_gone_is_skipped_by_name_and_the_others_come(server, capsys):
    gone = f"{2:016x}.jpg"
    del server.files[f"/nocaps/val/{gone}"]
    part = registered.load_dataset("nocaps")[:4]
    said = f"{gone} cannot be had from {server.url}/nocaps/val/{gone}: its server answers 404"
    assert said in capsys.readouterr().out
    assert [example.path.is_file() for example in part] == [True, True, False, True]
    with pytest.raises(UnreadableImage, match="could not be fetched: its server answers 404"):
        part.open(part[2])
    part[:4].fetch()
    assert len(server.asked(f"/nocaps/val/{gone}")) == 1  # in this process; the next one asks again


def test_a_photograph_of_another_size_or_a_web_page_is_never_used(server):
    server.files[f"/nocaps/val/{0:016x}.jpg"] = jpeg(0, side=100)
    server.files[f"/nocaps/val/{1:016x}.jpg"] = b"<html>moved</html>"
    part = registered.load_dataset("nocaps")[:3]
    assert [example.path.is_file() for example in part] == [False, False, True]


@pytest.mark.parametrize(
    "name", ["../../evil.jpg", "/tmp/evil.jpg", "..", "a/b.jpg", "", ".lock-01", "a\\b.jpg", "a\nb.jpg"]
)
def test_a_header_cannot_have_files_written_elsewhere(server, cache, name):
    record = {"id": 0, "file_name": name, "coco_url": f"{server.url}/nocaps/val/{0:016x}.jpg"}
    server.files["/header.json"] = header_of([record])
    server.files["/captions.json"] = header_of([record], annotations=[])
    with pytest.raises(DatasetError, match="expected a plain file name and a URL"):
        registered.load_dataset("nocaps").fetch()
    assert not list(cache.parent.parent.rglob("*evil*")) and not fetched(server)


def test_a_header_without_addresses_is_refused(server):
    record = {"id": 0, "file_name": "a.jpg"}
    server.files["/header.json"] = header_of([record])
    server.files["/captions.json"] = header_of([record], annotations=[])
    with pytest.raises(DatasetError, match="with the address None"):
        registered.load_dataset("nocaps")


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b"[]", b"{}", b'{"images": []', b""])
def test_annotations_that_are_something_else_are_not_kept(server, cache, content):
    server.files["/captions.json"] = content
    with pytest.raises(DownloadError, match="captions.json cannot be used: .*DALLEFLAMINGO_NOCAPS"):
        registered.load_dataset("nocaps")
    assert not (cache / "nocaps/default/nocaps_val_4500_captions.json").exists()


def test_offline_what_is_there_is_used_and_what_is_not_is_named(server, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="annotations of nocaps: HF_HUB_OFFLINE is set.*DALLEFLAMINGO_NOCAPS"):
        registered.load_dataset("nocaps")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    registered.load_dataset("nocaps")[:5]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    dataset = registered.load_dataset("nocaps")
    assert dataset.open(dataset[:5][4]).size == (200, 200)
    with pytest.raises(DownloadError, match="5 of 12 files are here.*missing.txt lists"):
        dataset.fetch()
    listed = (cache / "nocaps/default/images/missing.txt").read_text().splitlines()
    assert len(listed) == 7 and listed[0].startswith(f"{server.url}/nocaps/val/{5:016x}.jpg to {cache}")


def journey(run_folder: Path, on_draw=lambda: None):
    models = fakes.Captioner(), fakes.Generator(on_draw=on_draw), [fakes.MeanColour()]
    return fakes.image_text_image(registered.load_dataset("nocaps"), *models, run_folder)


def test_a_run_fetches_as_it_goes_and_skips_what_is_gone(server, tmp_path):
    del server.files[f"/nocaps/val/{2:016x}.jpg"]
    asked = []
    table = journey(tmp_path / "run", on_draw=lambda: asked.append(len(fetched(server))))
    assert asked[0] == 3 and asked[-1] == 12  # three images at a time, and not the next ones before these are done
    assert sorted(set(table.image_id)) == [i for i in range(12) if i != 2]
    [skipped] = table.attrs["skipped"]
    assert skipped["image_id"] == 2 and skipped["path"].endswith(f"{2:016x}.jpg")


def test_a_run_whose_network_goes_keeps_what_it_has_and_goes_on(server, tmp_path, monkeypatch, capsys):
    drawn = []

    def lose_the_network() -> None:
        drawn.append(1)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", len(drawn) >= 10)

    with pytest.raises(DownloadError, match="photographs of nocaps: HF_HUB_OFFLINE is set"):
        journey(tmp_path / "run", lose_the_network)
    said = "".join(capsys.readouterr())
    assert "6 of 12 images are kept" in said and len(drawn) == 18
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = len(server.requests)
    table = journey(tmp_path / "run")
    assert len(table) == 36 and len(server.requests) == before + 6
    pd.testing.assert_frame_equal(table, journey(tmp_path / "another"), check_exact=True)


def test_labelled_images_of_a_training_run_are_fetched_as_they_are_drawn(server, capsys):
    reads_all = SimpleNamespace(check_caption=lambda caption: None)
    dataset = without_unreadable(registered.load_dataset("coco", "train"), reads_all)
    capsys.readouterr()
    batches = cycle.CaptionedBatches(dataset, None, None, 2, 0)
    for example, _ in batches.choose(0):
        assert dataset.open(example).size == (200, 200)
    assert len(fetched(server)) == 2 and capsys.readouterr() == ("", "")  # one by one, without a word


# ── a user's own copy ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own(server, tmp_path, monkeypatch) -> Path:
    """A user's folder with the header and one photograph; the captions are for the test to put there."""
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / f"{4:016x}.jpg").write_bytes(PHOTOGRAPH)
    (folder / annotations.NOCAPS_HEADER).write_bytes(server.files["/header.json"])
    monkeypatch.setenv("DALLEFLAMINGO_NOCAPS", str(folder))
    return folder


def test_an_own_copy_is_found_and_left_alone(server, own, cache):
    (own / "nocaps_val_4500_captions.json").write_bytes(server.files["/captions.json"])
    dataset = registered.load_dataset("nocaps")
    assert type(dataset) is Dataset and dataset[4].path == own / "images" / f"{4:016x}.jpg"
    assert dataset[4].domain == "near-domain" and dataset[4].extra["license"] == 0  # of captions and of header
    assert not dataset.subset(12)[0].path.is_file() and not server.requests and not cache.exists()


def test_the_real_header_alone_is_a_data_set_without_captions(own, capsys):
    dataset = registered.load_dataset("nocaps")
    assert len(dataset) == 12 and dataset[4].references == () and dataset.by_domain() == {}
    assert "nocaps_val_image_info.json holds no captions and no domains" in capsys.readouterr().out


def test_a_header_of_other_images_is_refused(server, own):
    (own / "nocaps_val_4500_captions.json").write_bytes(server.files["/captions.json"])
    records = json.loads(server.files["/header.json"])["images"]
    (own / annotations.NOCAPS_HEADER).write_bytes(header_of([one | {"id": 11 - one["id"]} for one in records]))
    with pytest.raises(DatasetError, match="are both of the same split"):
        registered.load_dataset("nocaps")


def test_a_folder_without_photographs_is_answered_with_both_remedies(server, own):
    (own / "images" / f"{4:016x}.jpg").unlink()
    with pytest.raises(registry.RegistryError, match="Unset DALLEFLAMINGO_NOCAPS, and photographs are fetched"):
        registered.load_dataset("nocaps")


def test_the_published_header_is_read_as_it_is(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("DALLEFLAMINGO_NOCAPS", str(tmp_path))
    header = real_data / "nocaps/nocaps_val_image_info.json"
    (tmp_path / annotations.NOCAPS_HEADER).write_bytes(header.read_bytes())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0013ea2087020901.jpg").touch()
    dataset = registered.load_dataset("nocaps")
    assert (
        len(dataset) == 4_500
        and dataset[0].extra["coco_url"] == "https://s3.amazonaws.com/nocaps/val/" + dataset[0].path.name
    )
    told = remote._on_shelf(ENTRIES["nocaps"], None, dataset, tmp_path, {})
    assert (
        len(told) == 4_500
        and "4500 of 4500" not in told.plan()
        and "4499 of 4500 to fetch, about 1,420 MB" in told.plan()
    )


# ── what the notebooks need ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def in_full_size(cache, monkeypatch) -> list[Path]:
    """NoCaps in its published size, and a part of COCO, as annotations alone; the photographs that are asked for."""
    folders = {name: cache / name / "default" for name in ("nocaps", "coco")}
    monkeypatch.setattr(headers, "COCO", {"train": 1000, "restval": 400, "val": 300, "test": 300})
    written = headers.write_headers(cache / "written")
    for name, folder in folders.items():
        folder.parent.mkdir(parents=True)
        Path(written[f"DALLEFLAMINGO_{name.upper()}"]).rename(folder)
    nocaps = folders["nocaps"]
    records = json.loads((nocaps / "nocaps_val_4500_captions.json").read_text())["images"]
    addressed = [one | {"coco_url": f"https://nocaps.example/{one['file_name']}"} for one in records]
    (nocaps / annotations.NOCAPS_HEADER).write_bytes(header_of(addressed))
    asked: list[Path] = []

    def record(files, what, *_):
        asked.extend(file.path for file in files if file.path.suffix == ".jpg")
        return {}

    def unavailable(*_):
        raise headers.Unavailable

    monkeypatch.setattr(remote, "download", record)
    monkeypatch.setattr(datasets, "open_image", unavailable)
    monkeypatch.setattr(image_features.FeatureExtractor, "from_registry", unavailable)
    for kind in (cycle.Captioner, cycle.Generator):
        monkeypatch.setattr(kind, "from_pretrained", lambda **_: headers.UNKNOWN)
    return asked


def test_the_command_fetches_what_the_notebooks_open(in_full_size, monkeypatch):
    """The notebooks run as far as data reaches; what they ask for then is what the command lists."""
    monkeypatch.setenv(profiles.VARIABLE, "colab")
    monkeypatch.chdir(Path(__file__).parents[1] / "notebooks")
    for notebook in filter(lambda notebook: "profile.dataset" in code(notebook), NOTEBOOKS):
        headers.run(code(notebook), {"__name__": "__main__"}, REPLACED)
    opened = {path.name for path in in_full_size if path.parent.name == "images"}
    colab = profiles.PROFILES["colab"]
    nocaps, coco = (data.photographs(name, colab) for name in (colab.dataset, colab.coco))
    assert opened == set(names(nocaps)) and len(nocaps) == 304
    assert len(coco) == 800 and coco.name == "coco/train"
    sizes = colab_cell.PHOTOGRAPHS_MB
    assert f"about {sizes['coco']} MB, from images.cocodataset.org" in coco.plan()
    assert f"about {sizes['dataset']} MB, from " in nocaps.plan() and sizes == {"dataset": 96, "coco": 130}


def test_a_whole_epoch_is_the_whole_data_set(monkeypatch):
    whole = Dataset("x", tuple(datasets.Example(i, Path(f"{i}.jpg"), ("a dog",)) for i in range(100)))
    config = CycleConfig.of(profiles.PROFILES["colab"])
    assert data.cycle_images(whole, profiles.PROFILES["paper"]) == set(range(100))
    assert config.steps * config.batch_size >= 100
    monkeypatch.setattr(data.CycleConfig, "of", lambda profile: replace(config, steps=2, batch_size=8))
    assert len(data.cycle_images(whole, profiles.PROFILES["colab"])) == 16


def test_the_command_data_in_a_real_profile(server, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(data.corpora, "prepare", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(data, "notebook_images", lambda dataset, profile: {1, 2})
    monkeypatch.setattr(data, "cycle_images", lambda dataset, profile: {0, 1})
    monkeypatch.setenv(profiles.VARIABLE, "mini")
    assert command_line.main(["data", "--profile", "colab", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "photographs of nocaps: 2 of 2 to fetch, about 1 MB" in said and "photographs of coco: 2 of 2" in said
    assert not fetched(server) and drawn == []
    assert command_line.main(["data", "--profile", "colab"]) == 0
    assert (
        "nocaps: 2 photographs are here" in capsys.readouterr().out
        and len(fetched(server)) == 4
        and drawn == [(False, False)]
    )


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_the_miniatures_profiles_ask_no_server(server, monkeypatch, profile):
    drawn = []
    monkeypatch.setattr(data.corpora, "prepare", lambda *arguments: drawn.append(arguments))
    monkeypatch.setenv(profiles.VARIABLE, profile)
    assert command_line.main(["data", "--verify"]) == 0 and drawn == [(False, True)] and not server.requests


def test_the_command_says_in_one_line_that_it_is_offline(server, monkeypatch, capsys):
    monkeypatch.setattr(data.corpora, "prepare", lambda *arguments: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(profiles.VARIABLE, "colab")
    assert command_line.main(["data"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m dalleflamingo data: annotations of nocaps: HF_HUB_OFFLINE is set. 0 of 2 files")
