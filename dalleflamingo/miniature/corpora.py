"""The miniature's corpora: web, coco and nocaps, in the file layout of the real ones.

* **web**: all kinds, noisy alt-text, one caption an image; unlimited (`web_batch`), a sample of it is written.
* **coco**: `COCO_KINDS` only, five annotators' captions an image; splits train, val, test.
* **nocaps**: ten captions an image; in-domain (COCO's kinds), near-domain (both), out-domain (new kinds only).
* **nocaps-dev**: other scenes from the same distribution, for choosing settings, which must not be chosen on nocaps.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo import registry
from dalleflamingo.datasets import DOMAINS
from dalleflamingo.evaluation.verification import verify
from dalleflamingo.miniature.annotators import (
    ANNOTATORS,
    alt_text,
    annotate,
    exchange_colours,
    minimal_caption,
    plant_error,
    precise,
    write_caption,
)
from dalleflamingo.miniature.scene_graph import COCO_KINDS, COLOURS, KINDS, NEW_KINDS, Scene, Thing
from dalleflamingo.miniature.world import draw, rotate_layout, sample_scene
from dalleflamingo.runs import write_whole

IMAGES = {"web": 500, "train": 2000, "val": 500, "test": 1000, "nocaps": 1500, "nocaps-dev": 600}  # of each split
COUNTS = {1: 0.25, 2: 0.45, 3: 0.3}  # number of things -> share of the images of coco and nocaps
HARD_NEGATIVE_FORMS = ("plain", "is", "it")  # the other sentence forms are kept for asking what CLIP has understood
_SEEDS = {"web": 11, "train": 12, "val": 13, "test": 14, "nocaps": 15, "text": 16, "nocaps-dev": 17}


def web_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images of the web and their n alt-texts."""
    scenes = [sample_scene(rng) for _ in range(n)]
    return np.stack([draw(scene) for scene in scenes]), [alt_text(scene, rng) for scene in scenes]


def minimal_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images of one or two things and their n minimal captions."""
    scenes = [sample_scene(rng, count=int(count)) for count in rng.integers(1, 3, size=n)]
    return np.stack([draw(scene) for scene in scenes]), [minimal_caption(scene, rng) for scene in scenes]


def hard_negative_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images and n captions: the first half of the web, the second half groups of hard negatives.

    A group is one scene and seven that differ from it in one fact: three rotations, a wrong kind, a wrong colour, two
    colours exchanged, a wrong ground. Their captions agree in all other words. So each image of a group has to be told
    apart by that fact from the captions of the other seven (Yuksekgonul et al. 2023). Things of `HELD_OUT` pairs and
    sentence forms outside `HARD_NEGATIVE_FORMS` never occur in a group.

    Raises:
        ValueError: n is not a multiple of 16.
    """
    if n % 16:
        raise ValueError(f"a batch of {n}: half of it comes in groups of eight, so take a multiple of 16")
    images, captions = web_batch(rng, n // 2)
    groups = [hard_negatives(rng) for _ in range(n // 16)]
    drawn = np.stack([draw(scene) for scenes, _ in groups for scene in scenes])
    return np.concatenate([images, drawn]), captions + [caption for _, texts in groups for caption in texts]


def hard_negatives(rng: np.random.Generator) -> tuple[list[Scene], list[str]]:
    """One group of `hard_negative_batch`: eight scenes, the first four its rotations, and their captions."""
    while True:
        scene = sample_scene(rng)
        wrong = [plant_error(scene, fact, rng) for fact in ("kind", "colour", "ground")]
        scenes = [rotate_layout(scene, quarters) for quarters in range(4)] + [*wrong, exchange_colours(scene, rng)]
        if not any(is_held_out(thing) for described in scenes for thing in described.things):
            break
    annotator = precise(ANNOTATORS[rng.integers(len(ANNOTATORS))])
    annotator = replace(annotator, forms=HARD_NEGATIVE_FORMS)
    seed = rng.integers(2**32)
    is_minimal = len(scene.things) == 1 and rng.random() < 0.5  # only a minimal caption names the position of one thing
    captions = []
    for described in scenes:
        same = np.random.default_rng(seed)
        captions.append(minimal_caption(described, same) if is_minimal else write_caption(described, annotator, same))
    return scenes, captions


def is_held_out(thing: Thing) -> bool:
    """Whether CLIP never saw this pair of kind and colour in a group of hard negatives: one pair in eight."""
    return (KINDS.index(thing.kind) + COLOURS.index(thing.colour)) % 8 == 0


def annotated_batches(annotations: Path) -> Callable:
    """A function (rng, n) -> (n, 64, 64, 3) uint8 images of an annotated corpus, each with one of its captions."""
    corpus = json.loads(Path(annotations).read_text())
    scenes = {image["id"]: Scene.from_dict(image["scene"]) for image in corpus["images"]}
    pairs = [(scenes[entry["image_id"]], entry["caption"]) for entry in corpus["annotations"]]

    def batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
        chosen = [pairs[i] for i in rng.integers(len(pairs), size=n)]
        return np.stack([draw(scene) for scene, _ in chosen]), [caption for _, caption in chosen]

    return batch


def texts(n: int = 20_000) -> Iterator[str]:
    """`n` alt-texts and clean captions in turn, from which the tokenizers are learned."""
    rng = np.random.default_rng(_SEEDS["text"])
    for _ in range(n // 2):
        yield alt_text(sample_scene(rng), rng)
        yield annotate(sample_scene(rng), 1, rng)[0]


def coco_scene(rng: np.random.Generator) -> Scene:
    """A scene of COCO's kinds, with as many things as `COUNTS` says."""
    return sample_scene(rng, COCO_KINDS, _sample_count(rng))


def nocaps_scene(rng: np.random.Generator, domain: str) -> Scene:
    """A scene of one domain; a near-domain scene has kinds of both sorts, hence two or three things."""
    if domain == "in-domain":
        return coco_scene(rng)
    if domain == "out-domain":
        return sample_scene(rng, NEW_KINDS, _sample_count(rng))
    while True:
        scene = sample_scene(rng, KINDS, count=2 if rng.random() < 0.6 else 3)
        if {thing.kind in COCO_KINDS for thing in scene.things} == {True, False}:
            return scene


def _sample_count(rng: np.random.Generator) -> int:
    return int(rng.choice(list(COUNTS), p=list(COUNTS.values())))


def data_folder() -> Path:
    """The folder of the corpora and the shipped models; errors as `registry.data_root`."""
    return registry.data_root() / "miniature"


def annotation_files(root: Path | None = None) -> dict[str, Path]:
    """Split → annotation file, of all corpora.

    Args:
        root: folder of the corpora; None: `data_folder()`.
    """
    root = root or data_folder()
    coco = {split: root / f"coco/annotations/captions_{split}.json" for split in ("train", "val", "test")}
    return {
        "web": root / "web/annotations/captions_web.json",
        **coco,
        "nocaps": root / "nocaps/annotations/nocaps_val.json",
        "nocaps-dev": root / "nocaps-dev/annotations/nocaps_dev.json",
    }


def write_annotations(root: Path | None = None, images: Mapping[str, int] = IMAGES) -> None:
    """Write scenes and captions of every split as COCO caption files, those of NoCaps with `domain`.

    Args:
        root: folder of the corpora; None: `data_folder()`.
        images: split -> number of its images. Scenes and captions follow from the split's seed.
    """
    files = annotation_files(root)
    rng = np.random.default_rng(_SEEDS["web"])
    scenes = [sample_scene(rng) for _ in range(images["web"])]
    _write(files["web"], scenes, lambda scene: [alt_text(scene, rng)], "web")
    for split in ("train", "val", "test"):
        rng = np.random.default_rng(_SEEDS[split])
        scenes = [coco_scene(rng) for _ in range(images[split])]
        _write(files[split], scenes, lambda scene, rng=rng: annotate(scene, 5, rng), split)
    for name in ("nocaps", "nocaps-dev"):
        rng = np.random.default_rng(_SEEDS[name])
        domains = [DOMAINS[i % len(DOMAINS)] for i in range(images[name])]
        scenes = [nocaps_scene(rng, domain) for domain in domains]
        _write(files[name], scenes, lambda scene, rng=rng: annotate(scene, 10, rng), name, domains)


def _write(file: Path, scenes: list[Scene], captions: Callable, split: str, domains: list[str] | None = None) -> None:
    images, annotations = [], []
    for i, scene in enumerate(scenes):
        image_id = _SEEDS[split] * 1_000_000 + i
        images.append(
            {"id": image_id, "file_name": f"{image_id:012d}.png", "width": 64, "height": 64, "scene": scene.as_dict()}
        )
        if domains:
            images[-1]["domain"] = domains[i]
        for caption in captions(scene):
            annotations.append({"id": len(annotations), "image_id": image_id, "caption": caption})
    file.parent.mkdir(parents=True, exist_ok=True)
    info = {"description": f"dalleflamingo miniature world, {split}", "license": "CC BY 4.0"}
    text = json.dumps({"info": info, "images": images, "annotations": annotations}) + "\n"
    write_whole(file, lambda part: part.write_text(text))


def draw_images(root: Path | None = None) -> int:
    """Draw the images of every corpus that are missing, or of other annotations; returns their number.

    Args:
        root: folder of the corpora; None: `data_folder()`.
    Raises:
        FileNotFoundError: an annotation file is missing.
    """
    drawn = 0
    for file in annotation_files(root).values():
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: restore it by `git checkout -- {file}`, or write it again by --write"
            )
        folder = file.parent.parent / "images"
        folder.mkdir(exist_ok=True)
        text = file.read_text()
        records = json.loads(text)["images"]
        digest = hashlib.sha256(text.encode()).hexdigest()
        _remove_images_of_others(folder, file.stem, digest, (record["file_name"] for record in records))
        for record in tqdm(records, desc=f"drawing {file.stem}", mininterval=1, leave=False, delay=1):
            path = folder / record["file_name"]
            if not path.exists():
                image = Image.fromarray(draw(Scene.from_dict(record["scene"])))
                write_whole(path, lambda part, image=image: image.save(part, "PNG"))
                drawn += 1
    return drawn


def _remove_images_of_others(folder: Path, stem: str, digest: str, names: Iterable[str]) -> None:
    """Remove images that were drawn from other annotations, as before an update: their names are the same.

    Args:
        folder: of the images.
        stem: of the annotation file; beside the images a note says which version of it they were drawn from.
        digest: of the annotation file.
        names: of its images.
    """
    note = folder / f"{stem}.drawn"
    if note.exists() and note.read_text() == digest:
        return
    for name in names:
        (folder / name).unlink(missing_ok=True)
    write_whole(note, lambda part: part.write_text(digest))


def prepare(write: bool = False, verify_files: bool = False) -> None:
    """Draw the images that are not drawn yet, as the annotation files describe them.

    Args:
        write: first write the annotation files; they follow from a seed.
        verify_files: then compare all shipped files with their sha256.
    Raises:
        RegistryError: as `data_folder`, or as `verify`.
    """
    if write:
        write_annotations()
    drawn = draw_images()
    print(f"{data_folder()}: {drawn} images drawn, the others were there already")
    if verify_files:
        shipped = [name for name, entry in registry.ENTRIES.items() if entry.shipped]
        for name in tqdm(shipped, desc="verifying"):
            verify(name)
        print(f"the files of {len(shipped)} models and data sets are those that MANIFEST.json lists")
