"""`python -m dalleflamingo doctor`: each condition is faked and found, and its remedy carried out or checked."""

import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from importlib import metadata
from pathlib import Path

import huggingface_hub
import pytest
import requests
import torch
from coco_files import write_coco
from fake_hub import Hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from dalleflamingo import __main__ as command_line
from dalleflamingo import registry
from dalleflamingo.course import doctor
from dalleflamingo.course.data import notebook_images
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.profiles import PROFILES, VARIABLE, Profile, current
from dalleflamingo.sources import remote
from dalleflamingo.sources.annotations import NOCAPS_HEADER

ROOT = Path(__file__).parents[1]
REAL = PROFILES["colab"]
HUB_MODELS = ("blip-large", "sd-v1-4", "clip-vit-l-14", "dino-vitb8")


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with nothing on it: no GPU, an empty cache and PATH, no data, a hub that does not answer."""
    for variable in ("CONDA_PREFIX", "COLAB_RELEASE_TAG", "DALLEFLAMINGO_NOCAPS", "DALLEFLAMINGO_COCO", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assets = partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(remote, "cached_assets_path", assets)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(registry, "answers", lambda url: False)
    monkeypatch.setattr(registry, "packaged_sbert", lambda: tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def program(folder: Path, name: str, text: str) -> Path:
    """A program on the machine's PATH."""
    file = folder / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def cache(name: str, half: bool = True, share: float = 1.0) -> None:
    """Put a model's weights into the hub's cache, as files of their size without content."""
    entry = registry.ENTRIES[name]
    size = entry.fp16_mb if half and entry.fp16_mb else entry.size_mb
    file = "unet/x.fp16.safetensors" if half and entry.fp16_mb else "model.safetensors"
    repository = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=entry.source, repo_type="model"))
    path = repository / "snapshots" / entry.revision / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.truncate(int(size * 1e6 * share))


def cache_inception() -> None:
    file = Path(torch.hub.get_dir(), "checkpoints", Path(registry.ENTRIES["inception-v3"].source).name)
    file.parent.mkdir(parents=True)
    with file.open("wb") as opened:
        opened.truncate(96_000_000)


# ── Python and its packages ──


@pytest.mark.parametrize(
    ("version", "state"), [("3.11.7", "ok"), ("3.13.9", "ok"), ("3.10.1", "missing"), ("3.14.0", "missing")]
)
def test_another_python_is_refused_with_a_command_that_takes_the_right_one(monkeypatch, version, state):
    monkeypatch.setattr(platform, "python_version", lambda: version)
    found = doctor.check_python()
    assert found.state == state and version in found.detail
    if state == "missing":
        assert "make course PYTHON=/path/to/python3.12" in found.remedy
        monkeypatch.setenv("PATH", os.defpath)
        line = ["make", "-nB", "course", f"PYTHON={sys.executable}"]
        planned = subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout
        assert f'"{sys.executable}" -m venv .venv' in planned


def test_old_and_absent_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    required = ["tqdm>=4.1", "torch>=2", "gone-package==3; python_version > '3'", "pytest>=999; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    versions = {"tqdm": "4.0", "torch": "2.11.0+cu128"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    found = doctor.check_packages()
    assert (found.state, found.detail) == ("missing", "tqdm 4.0, gone-package is not installed")
    assert found.remedy.endswith("-m pip install 'tqdm>=4.1' gone-package==3`")
    versions["gone-package"] = "3"
    remedy = shlex.split(doctor.check_packages().remedy.removeprefix("run `").removesuffix("`"))
    assert remedy == [sys.executable, "-m", "pip", "install", "tqdm>=4.1"]
    assert subprocess.run([*remedy, "--no-index"], capture_output=True).returncode == 0  # the real one is new enough
    versions["tqdm"] = "4.1"
    assert str(doctor.check_packages()) == "ok       packages  all 3 that are required"


def test_our_own_requirements_are_met_here():
    assert doctor.check_packages().state == "ok"


def test_a_package_that_cannot_be_imported_does_not_end_the_other_checks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv(VARIABLE, "colab")
    found = {finding.subject: finding for finding in doctor.findings()}
    assert {"Python", "packages", "Java", "gpu", "network"} <= set(found)
    assert found["gpu"].state == "missing" and "torch" in found["gpu"].detail
    assert found["gpu"].remedy == f"run `{sys.executable} -m pip install --editable {ROOT}`"


# ── Java ──


@pytest.mark.parametrize("broken", [None, "exit 1", "exec /bin/sleep 60"])
def test_without_java_the_remedy_fits_the_machine(machine, monkeypatch, broken):
    if broken:
        program(machine, "java", broken)
    began = time.monotonic()
    found = doctor.check_java()
    assert (found.state, "adoptium.net" in found.remedy) == ("note", True) and time.monotonic() - began < 9
    if not broken:
        program(machine, "apt-get", "")
        assert "`apt-get install default-jre-headless`" in doctor.check_java().remedy
        monkeypatch.setenv("CONDA_PREFIX", "/anywhere")
        assert doctor.check_java().remedy == "run `conda install -c conda-forge openjdk`"
    program(machine, "java", "echo 'openjdk version \"17.0.1\"' >&2; echo more >&2")
    assert str(doctor.check_java()) == 'ok       Java      openjdk version "17.0.1"'


# ── the GPU ──


def test_a_real_profile_without_a_gpu_is_told_so(machine, monkeypatch):
    found = doctor.check_gpu(REAL)
    assert found.state == "missing" and "profile colab" in found.detail
    assert found.remedy.endswith("set DALLEFLAMINGO_PROFILE=mini")
    monkeypatch.setenv(*found.remedy.rpartition("set ")[2].split("="))
    assert doctor.check_gpu(current()).state == "ok"
    program(machine, "nvidia-smi", "")
    assert "pytorch.org" in doctor.check_gpu(REAL).remedy
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    assert doctor.check_gpu(REAL).remedy.startswith("choose Runtime > Change runtime type > T4 GPU")


@pytest.mark.parametrize(
    ("free", "profile", "state"),
    [(14.5, "colab", "ok"), (3.0, "paper", "note"), (3.0, "mini", "ok"), (8.0, "paper", "ok")],
)
def test_a_gpus_free_memory_is_compared_with_what_the_models_need(monkeypatch, free, profile, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), int(14.7 * 2**30)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    found = doctor.check_gpu(PROFILES[profile])
    assert found.state == state and found.detail.startswith(f"Tesla T4, {free} of 14.7 GiB free")
    if state == "note":
        assert "--batch-size 1" in found.remedy
        with pytest.raises(SystemExit) as end:  # the option is known: what is wrong is the path
            command_line.main(["reconstruct", "", "--out", "x", "--batch-size", "1"])
        assert end.value.code == 2


# ── what is downloaded ──


def test_room_is_compared_with_what_is_still_to_be_downloaded(machine, monkeypatch):
    usage = namedtuple("usage", "total used free")
    room = {machine: 5e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, room.get(Path(folder), 20e9)))
    found = doctor.check_disk(REAL)
    assert found.detail == f"5.0 GB free in {machine}, 8.3 GB to download"
    assert (found.state, found.remedy) == (
        "missing",
        "make 3.3 GB free there, or set HF_HOME to a folder on a larger disk",
    )
    (machine / "larger").mkdir()
    cached = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"],
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"}
        | {"HF_HOME": str(machine / "larger")},
        capture_output=True,
        text=True,
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cached.stdout.strip())
    found = doctor.check_disk(REAL)
    assert found.state == "ok" and found.detail == f"20.0 GB free in {machine / 'larger'}, 8.3 GB to download"
    assert doctor.check_disk(PROFILES["mini"]).detail.endswith("0.0 GB to download")


def test_models_are_here_or_to_be_downloaded_or_missing(machine, monkeypatch):
    found = doctor.check_models(REAL)
    assert found.state == "missing" and all(name in found.detail for name in (*HUB_MODELS, "inception-v3"))
    assert f"copy {constants.HF_HUB_CACHE} from a machine that has them" in found.remedy
    monkeypatch.setattr(registry, "answers", lambda url: url == constants.ENDPOINT)
    found = doctor.check_models(REAL)
    assert found.state == "ok" and found.detail.startswith(
        "to be downloaded at first use: blip-large (1,879 MB), sd-v1-4"
    )
    monkeypatch.setattr(registry, "answers", lambda url: False)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(machine / "other machine"))
    for name in HUB_MODELS:
        cache(name, half=False, share=0.5 if name == "dino-vitb8" else 1.0)
    cache_inception()
    (machine / "other machine").rename(machine / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(machine / "cache"))
    assert doctor.check_models(REAL).detail.endswith("does not answer: dino-vitb8 (343 MB)")
    cache("dino-vitb8")
    assert doctor.check_models(REAL) == doctor.Finding("ok", "models", "all 6 are on this machine")

    monkeypatch.setattr(Profile, "torch_dtype", torch.float16)
    assert doctor.check_models(REAL).detail.endswith("does not answer: sd-v1-4 (2,133 MB)")
    cache("sd-v1-4")
    assert doctor.check_models(REAL).state == "ok"


def test_shipped_models_that_are_cut_short_are_told_with_the_registrys_remedy(machine, monkeypatch):
    assert doctor.check_models(PROFILES["mini"]).state == "ok"
    monkeypatch.setattr(registry, "data_root", lambda: machine)
    found = doctor.check_models(PROFILES["mini"])
    assert found.state == "missing" and found.detail == f"there are no weights in {machine}/miniature/blip"
    assert found.remedy.startswith(f"run `git checkout -- {machine}/miniature/blip`")


def test_sbert_is_downloaded_where_its_package_is_absent(monkeypatch):
    monkeypatch.setattr(registry, "packaged_sbert", lambda: None)
    assert doctor.check_models(PROFILES["mini"]).detail.endswith("sbert (91 MB)")
    assert doctor.check_network(PROFILES["mini"]).state == "missing"


def test_the_network_matters_only_where_something_is_to_be_downloaded(monkeypatch):
    assert doctor.check_network(PROFILES["mini"]).state == "note"
    found = doctor.check_network(REAL)
    assert (found.state, "HTTPS_PROXY" in found.remedy) == ("missing", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "unset HF_ENDPOINT" in doctor.check_network(REAL).remedy
    monkeypatch.setattr(registry, "answers", lambda url: True)
    assert doctor.check_network(REAL).state == "ok"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    found = doctor.check_network(REAL)
    assert found.state == "missing" and found.remedy.startswith("unset TRANSFORMERS_OFFLINE,")
    assert doctor.check_models(REAL).state == "missing"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_unsetting_the_variable_and_starting_again_is_a_remedy(variable):
    script = "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.ENDPOINT)"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    line = [sys.executable, "-c", script]
    set_, unset = (
        subprocess.run(line, env=environment | more, capture_output=True, text=True).stdout.split()
        for more in ({variable: "1"}, {})
    )
    assert set_ != unset and unset == ["False", "https://huggingface.co"]


# ── data ──


def test_own_copies_are_looked_for_where_their_variables_say(machine, monkeypatch):
    folder = machine / "nocaps"
    monkeypatch.setenv("DALLEFLAMINGO_NOCAPS", str(folder))
    found = next(doctor.check_data(REAL))
    assert found.state == "missing" and f"DALLEFLAMINGO_NOCAPS='{folder}' is not a folder" in found.detail
    assert found.remedy.startswith("Unset DALLEFLAMINGO_NOCAPS")
    (folder / "images").mkdir(parents=True)
    assert next(doctor.check_data(REAL)).state == "missing"  # no annotations
    examples = [Example(i, folder / f"images/{i}.jpg", ("a lion",), "out-domain") for i in range(2)]
    write_coco(folder / "nocaps_val_4500_captions.json", examples)
    assert "2 of the 2 images of nocaps are missing" in next(doctor.check_data(REAL)).detail
    examples[0].path.touch()
    found = next(doctor.check_data(REAL))
    assert found.state == "note" and "lacks 1 of 2 images, 1.jpg for one" in found.detail
    assert found.remedy == f"download these ({registry.ENTRIES['nocaps'].url}), or go on without them"
    examples[1].path.touch()
    assert next(doctor.check_data(REAL)) == doctor.Finding("ok", "data", f"nocaps in {folder / 'images'}, 2 images")
    monkeypatch.setenv("DALLEFLAMINGO_COCO", str(folder / "images"))
    _, coco = doctor.check_data(REAL)
    assert coco.state == "note" and "there is no file" in coco.detail and "notebooks 06 and 07" in coco.detail


@pytest.mark.parametrize("online", [True, False])
def test_what_would_be_fetched_is_said_and_not_fetched(machine, monkeypatch, online):
    monkeypatch.setattr(registry, "answers", lambda url: online)
    asked = []
    monkeypatch.setattr(requests.Session, "request", lambda own, *request, **__: asked.append(request))
    for name, found in zip(("nocaps", "coco"), doctor.check_data(REAL), strict=True):
        assert f"photographs of {name}: to be fetched, and the annotations, too" in found.detail
        assert found.state == ("missing" if name == "nocaps" and not online else "note")
        assert found.remedy.startswith("connect" if not online else "run")
        assert "`python -m dalleflamingo data --profile colab`" in found.remedy
    assert ("at first use" in found.detail) == online and "notebooks 06 and 07 use it" in found.detail
    assert not asked and constants.HF_HUB_OFFLINE is False

    folder = remote.folder_of(registry.ENTRIES["nocaps"])
    (folder / "images").mkdir(parents=True)
    addressed = {"coco_url": "https://nocaps.example/0.jpg"}
    examples = [Example(i, folder / f"images/{i}.jpg", ("a lion",), "out-domain", addressed) for i in range(300)]
    write_coco(folder / "nocaps_val_4500_captions.json", examples)
    write_coco(folder / NOCAPS_HEADER, examples)
    opened = notebook_images(Dataset("nocaps", tuple(examples)), REAL)
    assert 256 < len(opened) < 300
    for image_id in opened:
        examples[image_id].path.touch()
    all_here = doctor.Finding("ok", "data", f"photographs of nocaps: all {len(opened)} are here")
    assert next(doctor.check_data(REAL)) == all_here
    for image_id in sorted(opened)[:2]:
        examples[image_id].path.unlink()
    found = next(doctor.check_data(REAL))
    assert f"nocaps: 2 of {len(opened)} to fetch, about 1 MB, from nocaps.example into {folder}" in found.detail
    assert found.state == ("note" if online else "missing") and not asked


def test_undrawn_miniature_images_are_drawn_by_the_command_that_is_named(machine, monkeypatch):
    for name, file in (("nocaps", "nocaps_val"), ("coco", "captions_test")):
        folder = machine / "miniature" / name
        (folder / "images").mkdir(parents=True)
        example = Example(1, folder / "images/1.png", ("a bird",), None, {"scene": {"ground": "sand"}})
        write_coco(folder / f"annotations/{file}.json", [example])
    monkeypatch.setenv("DALLEFLAMINGO_DATA", str(machine))
    for found in doctor.check_data(PROFILES["mini"]):
        assert found.state == "missing" and found.remedy == "run `make data` (or `python -m dalleflamingo data`)"
    module, _, function = command_line.COMMANDS["data"].function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


# ── the command ──


def test_all_is_said_within_ten_seconds_where_the_hub_stalls_and_the_exit_status_is_1(machine, monkeypatch, capsys):
    monkeypatch.undo()
    hub = Hub({})
    hub.fault = "stalls"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(machine / "cache"))  # a real one may hold every model
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(machine / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv(VARIABLE, "colab")
    monkeypatch.delenv("DALLEFLAMINGO_NOCAPS", raising=False)
    began = time.monotonic()
    assert command_line.main(["doctor"]) == 1
    assert time.monotonic() - began < 10 and hub.asked == ["HEAD /"]
    printed = capsys.readouterr().out
    assert f"missing  network   {hub.url} does not answer\n{'':<18} → unset HF_ENDPOINT" in printed


def test_the_exit_status_is_0_where_only_what_the_profile_does_without_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_data", lambda profile: iter(()))
    monkeypatch.setenv(VARIABLE, "mini")
    assert command_line.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "note     Java" in printed and printed.endswith("none of these is missing and needed\n")


def test_an_unknown_profile_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "huge")
    assert command_line.main(["doctor"]) == 2
    assert "DALLEFLAMINGO_PROFILE='huge' is not a profile" in capsys.readouterr().err
