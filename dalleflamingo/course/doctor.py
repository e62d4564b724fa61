"""What this machine lacks for the current profile: one line a check, and under each that fails one line of remedy.

No check downloads anything, and none waits for a server longer than `registry.PATIENCE`.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dalleflamingo.commands.parsers import command_parser

if TYPE_CHECKING:  # each check imports what it needs, because packages may be what is missing
    from packaging.specifiers import SpecifierSet

    from dalleflamingo.profiles import Profile
    from dalleflamingo.registry import Entry

GPU_GIB = 8  # of both journeys in profile colab; notebooks with gradients take up to 11 (docs/results/memory-plan.md)
WHOLE = 0.95  # share of a download's size in MB, which is rounded, from which it is taken for whole


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        state: "ok", "missing" where the profile needs it, "note" where it does without.
        subject: what was checked.
        detail: what is there or not.
        remedy: what to do where something is not there; "" where nothing has to be done.
    """

    state: Literal["ok", "note", "missing"]
    subject: str
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.subject:<9} {self.detail}"
        return f"{line}\n{'':<18} → {self.remedy}" if self.remedy else line


def check_python() -> Finding:
    """Is this Python one that the package runs on?"""
    from packaging.specifiers import SpecifierSet

    version, required = platform.python_version(), metadata.metadata("dalleflamingo")["Requires-Python"]
    if SpecifierSet(required).contains(version):
        return Finding("ok", "Python", version)
    remedy = "install one of these, and make a new environment with `make course PYTHON=/path/to/python3.12`"
    return Finding("missing", "Python", f"{version} is not among {required}", remedy)


def check_packages() -> Finding:
    """Is every package there that this one requires, in a version within its bounds?"""
    from packaging.requirements import Requirement

    required = [Requirement(text) for text in metadata.requires("dalleflamingo") or []]
    required = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [one for one in required if not _fits(_version(one.name), one.specifier)]
    if not wrong:
        return Finding("ok", "packages", f"all {len(required)} that are required")
    detail = ", ".join(f"{one.name} {_version(one.name) or 'is not installed'}" for one in wrong)
    install = shlex.join([sys.executable, "-m", "pip", "install", *(f"{one.name}{one.specifier}" for one in wrong)])
    return Finding("missing", "packages", detail, f"run `{install}`")


def _fits(version: str, specifier: "SpecifierSet") -> bool:
    return version != "" and specifier.contains(version, prereleases=True)  # packaging raises where there is none


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_java() -> Finding:
    """Does Java run, which the tokenizer of published caption scores needs?"""
    java = shutil.which("java")
    try:  # macOS has a `java` that only says where to get Java
        done = subprocess.run([java or "java", "-version"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done and done.returncode == 0:
        return Finding("ok", "Java", (done.stderr or done.stdout).partition("\n")[0])
    if os.environ.get("CONDA_PREFIX"):
        remedy = "run `conda install -c conda-forge openjdk`"
    elif shutil.which("apt-get"):
        remedy = "run `apt-get install default-jre-headless` as root"
    else:
        remedy = "install a Java runtime, from adoptium.net for one, so that `java -version` works"
    return Finding("note", "Java", "does not run; a tokenizer in Python takes the place of the published one", remedy)


def check_gpu(profile: "Profile") -> Finding:
    """Is there the GPU that real models need, with free memory for them?"""
    import torch

    from dalleflamingo.profiles import find_device

    real, device = _uses_hub(profile), find_device()
    if device == "cuda":
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info())
        detail = f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB free"
        if not real or free >= GPU_GIB:
            return Finding("ok", "GPU", detail)
        remedy = "end other programs on it, which nvidia-smi lists, or give commands --batch-size 1"
        return Finding("note", "GPU", f"{detail}; the models need {GPU_GIB}", remedy)
    if device == "mps":
        return Finding("ok", "GPU", "Apple's, in float32")
    if not real:
        return Finding("ok", "GPU", f"none, and profile {profile.name} needs none")
    if "COLAB_RELEASE_TAG" in os.environ:
        remedy = "choose Runtime > Change runtime type > T4 GPU, and begin again in the new runtime"
    elif shutil.which("nvidia-smi"):
        remedy = (
            f"install a PyTorch for the driver that nvidia-smi names (pytorch.org); {torch.__version__} sees no GPU"
        )
    else:
        remedy = "take a machine with a GPU, or the miniature: set DALLEFLAMINGO_PROFILE=mini"
    detail = f"none: profile {profile.name} would take a quarter of an hour on a CPU for one denoising step"
    return Finding("missing", "GPU", detail, remedy)


def check_disk(profile: "Profile") -> Finding:
    """Is there room for the models that will be downloaded?"""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free, needed = shutil.disk_usage(there).free / 1e9, sum(size for _, size in _downloads(profile)) / 1e3
    detail = f"{free:.1f} GB free in {there}, {needed:.1f} GB to download"
    if free > needed:
        return Finding("ok", "disk", detail)
    remedy = f"make {needed - free:.1f} GB free there, or set HF_HOME to a folder on a larger disk"
    return Finding("missing", "disk", detail, remedy)


def check_models(profile: "Profile") -> Finding:
    """Are the profile's models here, or can they be downloaded?"""
    from huggingface_hub import constants

    from dalleflamingo import registry

    entries = _models(profile)
    for entry in entries:
        if entry.shipped:
            try:
                registry.locate(entry.name)
            except registry.RegistryError as error:
                return _failed("models", error)
    absent = _downloads(profile)
    if not absent:
        return Finding("ok", "models", f"all {len(entries)} are on this machine")
    detail = ", ".join(f"{entry.name} ({size:,} MB)" for entry, size in absent)
    if _is_online():
        return Finding("ok", "models", f"to be downloaded at first use: {detail}")
    remedy = f"mend the network, or copy {constants.HF_HUB_CACHE} from a machine that has them"
    return Finding("missing", "models", f"not on this machine, and the hub does not answer: {detail}", remedy)


def check_network(profile: "Profile") -> Finding:
    """Does the hub answer, where something has to be downloaded?"""
    from huggingface_hub import constants

    from dalleflamingo import registry

    state = "missing" if _downloads(profile) else "note"
    need = "" if state == "missing" else "; nothing has to be downloaded"
    if constants.HF_HUB_OFFLINE:
        set_by = next(name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name))
        return Finding(state, "network", f"{set_by} is set{need}", f"unset {set_by}, and start Python again")
    if registry.answers(constants.ENDPOINT):
        return Finding("ok", "network", f"{constants.ENDPOINT} answers")
    if "HF_ENDPOINT" in os.environ:
        remedy = "unset HF_ENDPOINT or set it to a hub that answers, and start Python again"
    else:
        remedy = "connect to the network; behind a proxy, set HTTPS_PROXY to its address"
    return Finding(state, "network", f"{constants.ENDPOINT} does not answer{need}", remedy)


def check_data(profile: "Profile") -> Iterator[Finding]:
    """Are the profile's data sets here, with their images, or can they be fetched?"""
    from dalleflamingo import registry
    from dalleflamingo.sources import registered

    for name in (profile.dataset, profile.coco):
        entry = registry.entry_of(name)
        check = _check_fetched if registered.is_fetched(entry) else _check_copy
        found = check(entry, profile)
        if found.state != "ok" and name != profile.dataset and not entry.shipped:
            found = replace(found, state="note", detail=f"{found.detail} (notebooks 06 and 07 use it)")
        yield found


def _check_copy(entry: "Entry", _: "Profile") -> Finding:
    """Of a data set that is shipped, or of which the user names an own copy."""
    from dalleflamingo.datasets import DatasetError
    from dalleflamingo.registry import RegistryError
    from dalleflamingo.sources import registered

    try:
        dataset = registered.load_dataset(entry.name, "test" if entry.splits else None)
    except (RegistryError, DatasetError, OSError) as error:
        return _failed("data", error)
    lost = [example.path for example in dataset if not example.path.is_file()]
    where = f"{dataset.name} in {dataset[0].path.parent}"
    if not lost:
        return Finding("ok", "data", f"{where}, {len(dataset):,} images")
    detail = f"{where} lacks {len(lost):,} of {len(dataset):,} images, {lost[0].name} for one"
    remedy = "run `python -m dalleflamingo data`" if entry.shipped else f"download these ({entry.url})"
    return Finding("note", "data", detail, f"{remedy}, or go on without them")


def _check_fetched(entry: "Entry", profile: "Profile") -> Finding:
    """Of a data set that comes from its address: how much of what the notebooks open is here?"""
    from huggingface_hub import constants

    from dalleflamingo.course.data import photographs
    from dalleflamingo.datasets import DatasetError
    from dalleflamingo.sources.downloads import DownloadError

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # so that nothing is fetched
    try:
        dataset = photographs(entry.name, profile)
        detail = dataset.plan()
    except DownloadError:
        dataset, detail = None, f"photographs of {entry.name}: to be fetched, and the annotations, too"
    except (DatasetError, OSError) as error:
        return _failed("data", error)
    finally:
        constants.HF_HUB_OFFLINE = offline
    if dataset is not None and not dataset.missing():
        return Finding("ok", "data", detail)
    command = f"python -m dalleflamingo data --profile {profile.name}"
    if _is_online():
        return Finding("note", "data", f"{detail}, at first use", f"run `{command}` to have them before")
    return Finding("missing", "data", detail, f"connect to the network, and run `{command}`")


def _is_online() -> bool:
    from huggingface_hub import constants

    from dalleflamingo import registry

    return not constants.HF_HUB_OFFLINE and registry.answers(constants.ENDPOINT)


def _uses_hub(profile: "Profile") -> bool:
    from dalleflamingo import registry

    return not registry.entry_of(profile.captioner).shipped


def _models(profile: "Profile") -> list["Entry"]:
    """The entries of what the profile's two journeys load."""
    from dalleflamingo import registry

    names = [
        profile.captioner,
        profile.generator,
        profile.clip,
        profile.dino,
        profile.inception,
        "sbert",
        profile.judge,
    ]
    return [registry.entry_of(name) for name in names if name]


def _downloads(profile: "Profile") -> list[tuple["Entry", int]]:
    import torch

    return models_to_download(_models(profile), halved=profile.torch_dtype == torch.float16)


def models_to_download(entries: Iterable["Entry"], halved: bool) -> list[tuple["Entry", int]]:
    """The models that are not on this machine, each with the size of its download in MB.

    Args:
        entries: of models.
        halved: whether a model comes in float16 where its hub has that.
    """
    from dalleflamingo import registry

    absent = []
    for entry in entries:
        if entry.shipped or (entry.name == "sbert" and registry.packaged_sbert()):
            continue
        half = entry.fp16_mb if halved else None
        size = half or entry.size_mb
        if _bytes_on_disk(entry, half is not None) < WHOLE * size * 1e6:
            absent.append((entry, size))
    return absent


def _bytes_on_disk(entry: "Entry", half: bool) -> int:
    """Of a model's weights at its pinned revision, or of its float16 files."""
    import torch
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if "://" in entry.source:
        files = [Path(torch.hub.get_dir(), "checkpoints", Path(entry.source).name)]
    else:
        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=entry.source, repo_type="model"))
        files = (folder / "snapshots" / entry.revision).rglob("*.safetensors")
        files = [file for file in files if (".fp16." in file.name) == half and file.parent.name != "safety_checker"]
    return sum(file.stat().st_size for file in files if file.is_file())


def _failed(subject: str, error: Exception) -> Finding:
    """A finding from an error whose message says what is wrong and then, behind a colon or full stop, what to do."""
    problem, *remedy = re.split(r"(?:: |\. )", str(error), maxsplit=1)
    return Finding("missing", subject, problem, *remedy)


def findings() -> Iterator[Finding]:
    """What each check finds, in order, as it finds it."""
    yield from _guarded(check_python)
    yield from _guarded(check_packages)
    yield from _guarded(check_java)
    for check in (check_gpu, check_disk, check_models, check_network, check_data):
        yield from _guarded(check, needs_profile=True)


def _guarded(check: Callable, needs_profile: bool = False) -> Iterator[Finding]:
    """The findings of a check; where a package is missing that it needs, one that says so."""
    try:
        if needs_profile:
            from dalleflamingo import profiles

            found = check(profiles.current())
        else:
            found = check()
        yield from [found] if isinstance(found, Finding) else found
    except (ImportError, metadata.PackageNotFoundError) as error:
        subject, clone = check.__name__.removeprefix("check_"), Path(__file__).resolve().parents[2]
        install = shlex.join([sys.executable, "-m", "pip", "install", "--editable", str(clone)])
        yield Finding("missing", subject, f"cannot be checked: {error}", f"run `{install}`")


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Args:
        arguments: the command line behind `doctor`; None for that of this process.
    Returns:
        its exit status: 0; 1 where something is missing that the current profile needs.
    """
    about = "Say what this machine lacks for the current profile, and what to do about it."
    command_parser("doctor", about).parse_args(arguments)
    missing = 0
    for finding in findings():
        print(finding, flush=True)
        missing += finding.state == "missing"
    print(f"{missing or 'none'} of these {'are' if missing > 1 else 'is'} missing and needed")
    return 1 if missing else 0
