"""The miniature's corpora: web, coco and nocaps, in the file layout of the real ones.

* **web**: all kinds, noisy alt-text, one caption an image; unlimited (`web_batch`), a sample of it is written.
* **coco**: `COCO_KINDS` only, five clean captions an image; splits train, val, test.
* **nocaps**: ten captions an image; in-domain (COCO's kinds), near-domain (both), out-domain (new kinds only).
* **nocaps-dev**: other scenes from the same distribution, for choosing settings, which must not be chosen on nocaps.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo import registry
from dalleflamingo.datasets import DOMAINS
from dalleflamingo.evaluation.verification import verify
from dalleflamingo.miniature.annotators import alt_text, annotate, annotate_rotations, minimal_caption
from dalleflamingo.miniature.scene_graph import COCO_KINDS, KINDS, NEW_KINDS, Scene
from dalleflamingo.miniature.world import draw, rotate_layout, sample_scene
from dalleflamingo.runs import write_whole

IMAGES = {"web": 500, "train": 2000, "val": 300, "test": 500, "nocaps": 600, "nocaps-dev": 300}  # of each split
_SEEDS = {"web": 1, "train": 2, "val": 3, "test": 4, "nocaps": 5, "text": 6, "nocaps-dev": 7}


def web_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images of the web and their n alt-texts."""
    scenes = [sample_scene(rng) for _ in range(n)]
    return np.stack([draw(scene) for scene in scenes]), [alt_text(scene, rng) for scene in scenes]


def minimal_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images of one or two things and their n minimal captions."""
    scenes = [sample_scene(rng, count=int(count)) for count in rng.integers(1, 3, size=n)]
    return np.stack([draw(scene) for scene in scenes]), [minimal_caption(scene, rng) for scene in scenes]


def rotation_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 images and n captions: the first half of the web, the second half scenes in four rotations.

    The captions of a scene's other rotations are hard negatives, wrong only in the positions that they name
    (Yuksekgonul et al. 2023).

    Raises:
        ValueError: n is not a multiple of 8.
    """
    if n % 8:
        raise ValueError(f"a batch of {n}: half of it comes in fours, so take a multiple of 8")
    images, captions = web_batch(rng, n // 2)
    scenes = [sample_scene(rng) for _ in range(n // 8)]
    rotations = np.stack([draw(rotate_layout(scene, quarters)) for scene in scenes for quarters in range(4)])
    captions += [caption for scene in scenes for caption in annotate_rotations(scene, rng)]
    return np.concatenate([images, rotations]), captions


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
        yield annotate(sample_scene(rng), 5, rng)[int(rng.integers(5))]


def coco_scene(rng: np.random.Generator) -> Scene:
    """A scene of COCO's kinds."""
    return sample_scene(rng, COCO_KINDS)


def nocaps_scene(rng: np.random.Generator, domain: str) -> Scene:
    """A scene of one domain; a near-domain scene has kinds of both sorts, hence two or three things."""
    if domain == "in-domain":
        return sample_scene(rng, COCO_KINDS)
    if domain == "out-domain":
        return sample_scene(rng, NEW_KINDS)
    while True:
        scene = sample_scene(rng, KINDS, count=2 if rng.random() < 0.67 else 3)
        if {thing.kind in COCO_KINDS for thing in scene.things} == {True, False}:
            return scene


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
    """Draw the images of every corpus that are missing; returns their number.

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
        records = json.loads(file.read_text())["images"]
        for record in tqdm(records, desc=f"drawing {file.stem}", mininterval=1, leave=False, delay=1):
            path = folder / record["file_name"]
            if not path.exists():
                image = Image.fromarray(draw(Scene.from_dict(record["scene"])))
                write_whole(path, lambda part, image=image: image.save(part, "PNG"))
                drawn += 1
    return drawn


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
