"""The miniature's corpora: web, coco and nocaps, as their real namesakes are laid out.

* **web**: all kinds, noisy alt-text, one caption a picture; endless (`web_batch`), a sample of it is written.
* **coco**: `COCO_KINDS` only, five clean captions a picture; train, val, test.
* **nocaps**: ten captions a picture; in-domain (coco's kinds), near-domain (both sorts), out-domain (new kinds only).
* **nocaps-dev**: other scenes of the same sort, for choosing settings, which must not be chosen on nocaps.

`python -m dalleflamingo data` draws the pictures that the annotation files in `data/miniature` describe;
with `--write` it invents the annotations anew (the same ones: everything follows from the seed).
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo.miniature.annotators import alt_text, annotate, annotate_rotations, plain_text
from dalleflamingo.miniature.scene_graph import COCO_KINDS, KINDS, NEW_KINDS, Scene
from dalleflamingo.miniature.world import draw, sample_scene, turned

ROOT = Path("data/miniature")
SIZES = {
    "web": {"web": 500},
    "coco": {"train": 2000, "val": 300, "test": 500},
    "nocaps": {"val": 600},
    "nocaps-dev": {"dev": 300},
}
DOMAINS = ("in-domain", "near-domain", "out-domain")
_SEEDS = {"web": 1, "train": 2, "val": 3, "test": 4, "nocaps": 5, "text": 6, "nocaps-dev": 7}


def web_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 pictures of the web and their alt-texts."""
    scenes = [sample_scene(rng) for _ in range(n)]
    return np.stack([draw(scene) for scene in scenes]), [alt_text(scene, rng) for scene in scenes]


def plain_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 pictures of one or two things and the barest captions of them."""
    scenes = [sample_scene(rng, count=int(count)) for count in rng.integers(1, 3, size=n)]
    return np.stack([draw(scene) for scene in scenes]), [plain_text(scene, rng) for scene in scenes]


def turned_batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
    """(n, 64, 64, 3) uint8 pictures and n captions: half of the web's, half scenes in their four turns.

    Each of four pictures has the other three's captions beside it, which are wrong in nothing but where things stand:
    hard negatives (Yuksekgonul et al. 2023).

    Raises:
        ValueError: n is not a multiple of 8.
    """
    if n % 8:
        raise ValueError(f"a batch of {n}: half of it comes in fours, so take a multiple of 8")
    pictures, captions = web_batch(rng, n // 2)
    scenes = [sample_scene(rng) for _ in range(n // 8)]
    turns = np.stack([draw(turned(scene, turn)) for scene in scenes for turn in range(4)])
    told = [caption for scene in scenes for caption in annotate_rotations(scene, rng)]
    return np.concatenate([pictures, turns]), captions + told


def labelled_batches(annotations: Path) -> Callable:
    """(rng, n) -> pictures (n, 64, 64, 3) uint8 of an annotated corpus, each with one of its captions."""
    corpus = json.loads(Path(annotations).read_text())
    scenes = {image["id"]: Scene.from_dict(image["scene"]) for image in corpus["images"]}
    pairs = [(scenes[entry["image_id"]], entry["caption"]) for entry in corpus["annotations"]]

    def batch(rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str]]:
        chosen = [pairs[i] for i in rng.integers(len(pairs), size=n)]
        return np.stack([draw(scene) for scene, _ in chosen]), [caption for _, caption in chosen]

    return batch


def texts(n: int = 20_000) -> Iterator[str]:
    """Alt-texts and clean captions, half and half: what both tokenizers are learned from."""
    rng = np.random.default_rng(_SEEDS["text"])
    for _ in range(n // 2):
        yield alt_text(sample_scene(rng), rng)
        yield annotate(sample_scene(rng), 5, rng)[int(rng.integers(5))]


def read_scenes(annotations: Path) -> list[Scene]:
    """The exact scenes of a corpus, from its annotation file."""
    return [Scene.from_dict(image["scene"]) for image in json.loads(Path(annotations).read_text())["images"]]


def coco_scene(rng: np.random.Generator) -> Scene:
    return sample_scene(rng, COCO_KINDS)


def nocaps_scene(rng: np.random.Generator, domain: str) -> Scene:
    """A scene of one domain; near-domain pictures hold at least one kind of each sort, hence two things or three."""
    if domain == "in-domain":
        return sample_scene(rng, COCO_KINDS)
    if domain == "out-domain":
        return sample_scene(rng, NEW_KINDS)
    while True:
        scene = sample_scene(rng, KINDS, count=2 if rng.random() < 0.67 else 3)
        if {thing.kind in COCO_KINDS for thing in scene.things} == {True, False}:
            return scene


def annotation_files(root: Path = ROOT) -> dict[str, Path]:
    """Split → annotation file, of all corpora."""
    coco = {split: root / "coco/annotations" / f"captions_{split}.json" for split in SIZES["coco"]}
    return {
        "web": root / "web/annotations/captions_web.json",
        **coco,
        "nocaps": root / "nocaps/annotations/nocaps_val.json",
        "nocaps-dev": root / "nocaps-dev/annotations/nocaps_dev.json",
    }


def write_annotations(root: Path = ROOT) -> None:
    """Invent scenes and captions of every split and write them as COCO caption files (NoCaps': with `domain`)."""
    files = annotation_files(root)
    rng = np.random.default_rng(_SEEDS["web"])
    scenes = [sample_scene(rng) for _ in range(SIZES["web"]["web"])]
    _write(files["web"], scenes, lambda scene: [alt_text(scene, rng)], "web")
    for split, count in SIZES["coco"].items():
        rng = np.random.default_rng(_SEEDS[split])
        scenes = [coco_scene(rng) for _ in range(count)]
        _write(files[split], scenes, lambda scene, rng=rng: annotate(scene, 5, rng), split)
    for name in ("nocaps", "nocaps-dev"):
        rng, [count] = np.random.default_rng(_SEEDS[name]), SIZES[name].values()
        domains = [DOMAINS[i % len(DOMAINS)] for i in range(count)]
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
    file.write_text(json.dumps({"info": info, "images": images, "annotations": annotations}, indent=None) + "\n")


def draw_pictures(root: Path = ROOT) -> int:
    """Draw the PNGs that are missing beside the annotation files; returns how many were drawn.

    Raises:
        FileNotFoundError: if an annotation file is missing.
    """
    drawn = 0
    for file in annotation_files(root).values():
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: restore it by `git checkout -- {file}`, or invent it anew by --write"
            )
        folder = file.parent.parent / "images"
        folder.mkdir(exist_ok=True)
        records = json.loads(file.read_text())["images"]
        for record in tqdm(records, desc=f"drawing {file.stem}", mininterval=1, leave=False):
            picture = folder / record["file_name"]
            if not picture.exists():
                partial = picture.with_suffix(".partial")
                Image.fromarray(draw(Scene.from_dict(record["scene"]))).save(partial, "PNG")
                partial.replace(picture)
                drawn += 1
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="invent the annotation files anew, too")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of the corpora (default: {ROOT})")
    options = parser.parse_args(arguments)
    if options.write:
        write_annotations(options.root)
    print(f"{draw_pictures(options.root)} pictures drawn, all others were there: {options.root}")
