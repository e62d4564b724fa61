"""How good the shipped models are on data that they have not seen: `python -m dalleflamingo research gates`.

Every figure has its n and its 95 % interval, and is compared with a floor (good enough for the course) and a goal.
MANIFEST.json and docs/miniature.md keep them. Nothing is tuned on what is measured here.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo import registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import Nucleus
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.intervals import Interval, mean_interval, paired_bootstrap, proportion
from dalleflamingo.miniature.annotators import ANNOTATORS, annotate_rotations, write_caption
from dalleflamingo.miniature.corpora import data_folder
from dalleflamingo.miniature.image_score import ImageScore, score_in_place, score_prompt, total
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import (
    COLOURS,
    GROUNDS,
    KINDS,
    RELATIONS,
    Scene,
    f1,
    is_right,
    recall_of_things,
)
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.profiles import PROFILES
from dalleflamingo.research.options import positive
from dalleflamingo.research.probes import knn_accuracy, ridge_accuracy
from dalleflamingo.runs import derive_seed, write_whole
from dalleflamingo.similarity import ClipImage, Dino, load_clip
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_generator

SEED = 20  # of the held-out scenes; no training draws from it
MINI = PROFILES["mini"]
PAGE = Path("docs/miniature.md")
Bound = float | tuple[float, float] | None
Figures = dict[str, Interval]  # what was measured -> its value


class Bar(NamedTuple):
    """What a figure is compared with. A bound is the least value, or (low, high); None: the figure is only reported."""

    chance: float | None = None
    floor: Bound = None
    goal: Bound = None


NAME_CHANCE = 1 / len(KINDS) / len(COLOURS)  # of kind and colour of a thing
GROUND_CHANCE, RELATION_CHANCE = 1 / len(GROUNDS), 1 / len(RELATIONS)
_CAPTIONER = {
    "beam search: captions without a wrong kind, colour or relation": Bar(None, 0.75, 0.85),
    "beam search: recall of things": Bar(None, 0.70, 0.80),
    "nucleus p = 0.9, coco test: captions factually right": Bar(None, (0.40, 0.85), (0.45, 0.80)),
}
BARS: dict[str, dict[str, Bar]] = {
    "recogniser": {"things right (kind and colour, in place)": Bar(NAME_CHANCE, 0.95, 0.98)},
    "vae": {
        "points of recogniser accuracy lost by reconstruction, negative": Bar(None, -0.04, -0.015),
        "the same, pictures of small things only": Bar(None, -0.04, -0.015),
    },
    "blip": _CAPTIONER,
    "blip-large": _CAPTIONER,
    "blip2": _CAPTIONER,
    "sd": {
        "one-thing prompts: kind and colour found": Bar(NAME_CHANCE, 0.80, 0.90),
        "one-thing prompts: ground right": Bar(GROUND_CHANCE),
        "two-thing prompts: each thing found": Bar(NAME_CHANCE, 0.55, 0.80),
        "two-thing prompts: ground right": Bar(GROUND_CHANCE),
        "two-thing prompts: relation right where both are found": Bar(RELATION_CHANCE, 0.60, 0.75),
    },
    "lafite": {
        "one-thing prompts: kind and colour found": Bar(NAME_CHANCE, 0.40, 0.60),
        "one-thing prompts: ground right": Bar(GROUND_CHANCE),
        "two-thing prompts: each thing found": Bar(NAME_CHANCE, 0.25, 0.45),
        "two-thing prompts: ground right": Bar(GROUND_CHANCE),
        "two-thing prompts: relation right where both are found": Bar(RELATION_CHANCE),
    },
    "clip": {
        "image → text R@1 among 100 scenes": Bar(0.01, 0.50, 0.70),
        "relation right, among the four of two things": Bar(RELATION_CHANCE, 0.60, 0.75),
    },
    "dino": {
        "20-NN accuracy of kind, one-thing pictures": Bar(1 / len(KINDS), 0.50, 0.80),
        "linear probe of colour, one-thing pictures": Bar(1 / len(COLOURS)),
    },
    "inception": {"kind and colour of one thing": Bar(NAME_CHANCE, 0.90, 0.98)},
}


@dataclass(frozen=True)
class Gate:
    """One figure of one model beside its bar."""

    model: str
    what: str
    value: Interval
    chance: float | None = None
    floor: Bound = None
    goal: Bound = None

    def reaches(self, bound: Bound) -> bool | None:
        """Whether the value is within a bound; None if there is none."""
        if bound is None:
            return None
        low, high = bound if isinstance(bound, tuple) else (bound, np.inf)
        return bool(low <= self.value.value <= high)

    def as_dict(self) -> dict:
        """The record in MANIFEST.json."""
        return asdict(self) | {"reaches_floor": self.reaches(self.floor), "reaches_goal": self.reaches(self.goal)}


# ── scenes and models ────────────────────────────────────────────────────────────────────────────────────────────────


def held_out_scenes(n: int, count: int | None = None, salt: str = "") -> list[Scene]:
    """`n` scenes of all kinds that no training has drawn.

    Args:
        n: number of scenes.
        count: things in each; None for one to three.
        salt: other scenes for another salt.
    """
    rng = np.random.default_rng(derive_seed(SEED, f"{count} {salt}"))
    return [sample_scene(rng, count=count) for _ in range(n)]


def draw_all(scenes: Sequence[Scene]) -> list[Image.Image]:
    """An image of each scene."""
    return [Image.fromarray(draw(scene)) for scene in scenes]


def open_recogniser() -> Recogniser:
    """The shipped recogniser."""
    return Recogniser.from_pretrained(registry.locate(MINI.judge)).eval()


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def recogniser_figures(name: str) -> Figures:
    """Things right, things invented, and empty grounds."""
    recogniser, scenes = Recogniser.from_pretrained(registry.locate(name)).eval(), held_out_scenes(500)
    score = total(map(score_in_place, recogniser.find(draw_all(scenes)), scenes))
    empty = draw_all([Scene(scene.ground, ()) for scene in scenes[:100]])
    silent = sum(not found.things for found in recogniser.find(empty))
    return {
        "things right (kind and colour, in place)": proportion(score.right, score.things),
        "found things that are there": proportion(score.matched, score.found),
        "empty grounds where it says nothing": proportion(silent, len(empty)),
    }


@torch.no_grad()
def vae_figures(name: str) -> Figures:
    """What encoding and decoding costs the recogniser, and PSNR."""
    scenes, recogniser, vae = held_out_scenes(500), open_recogniser(), load_generator(MINI, name).pipeline.vae
    originals = draw_all(scenes)
    pixels = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = [vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample.cpu() for part in pixels.split(50)]
    decoded = torch.cat(decoded).clamp(-1, 1)
    rebuilt = [Image.fromarray(p) for p in ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    before, after = (list(map(score_in_place, recogniser.find(images), scenes)) for images in (originals, rebuilt))
    small = [i for i, scene in enumerate(scenes) if all(thing.size == "small" for thing in scene.things)]
    squared = (decoded - pixels).square().mean((1, 2, 3))
    return {
        "points of recogniser accuracy lost by reconstruction, negative": _accuracy_change(before, after),
        "the same, pictures of small things only": _accuracy_change(
            [before[i] for i in small], [after[i] for i in small]
        ),
        "PSNR of reconstructions (dB)": mean_interval((10 * torch.log10(4 / squared)).tolist(), seed=SEED),
    }


def _accuracy_change(before: Sequence[ImageScore], after: Sequence[ImageScore]) -> Interval:
    """Change of the share of things that are right, paired by image."""
    things = np.array([score.things for score in before])
    change = np.array([late.right - early.right for early, late in zip(before, after, strict=True)])
    return paired_bootstrap(lambda rows: change[rows].sum() / things[rows].sum(), len(things), seed=SEED)


def captioner_figures(name: str) -> Figures:
    """Beam search on coco test; nucleus sampling there and in the domains of nocaps."""
    captioner = load_captioner(MINI, name)
    test = registered.load_dataset(MINI.coco, "test").subset(300, SEED)
    scenes = _scenes(test)
    captions = _in_parts(
        lambda part: captioner.describe([test.open(example) for example in part]), list(test), "beam search"
    )
    recall = mean_interval(list(map(recall_of_things, captions, scenes)), seed=SEED)
    right = sum(map(is_right, captions, scenes))
    figures = {
        "beam search: captions without a wrong kind, colour or relation": proportion(right, len(captions)),
        "beam search: recall of things": recall,
    }
    figures |= _sampling_figures(captioner, test, "coco test")
    for domain, part in registered.load_dataset(MINI.dataset).by_domain().items():
        figures |= _sampling_figures(captioner, part.subset(60, SEED), domain)
    return figures


def _sampling_figures(captioner: Captioner, dataset: Dataset, where: str) -> Figures:
    """Nucleus p = 0.9, K = 10: share of right captions, and how much the candidates of an image differ in F1."""
    seeds = {example.image_id: [derive_seed(SEED, example.image_id, i) for i in range(10)] for example in dataset}
    sampled = _in_parts(
        lambda part: captioner.sample(
            [dataset.open(example) for example in part], [seeds[example.image_id] for example in part], Nucleus(0.9)
        ),
        list(dataset),
        where,
    )
    pairs = list(zip(sampled, _scenes(dataset), strict=True))
    right = [np.mean([is_right(caption, scene) for caption in captions]) for captions, scene in pairs]
    spread = [np.std([f1(caption, scene) for caption in captions]) for captions, scene in pairs]
    return {
        f"nucleus p = 0.9, {where}: captions factually right": mean_interval(right, seed=SEED),
        f"nucleus p = 0.9, {where}: standard deviation of F1 across 10 candidates": mean_interval(spread, seed=SEED),
    }


def generator_figures(name: str, prompts: int = 200) -> Figures:
    """Prompts by the world's first annotator, of one thing and of two; things count wherever they are in the image."""
    generator, recogniser = load_generator(MINI, name), open_recogniser()
    rng, figures = np.random.default_rng(SEED), {}
    for count, label, what in ((1, "one-thing", "kind and colour"), (2, "two-thing", "each thing")):
        scenes = held_out_scenes(prompts, count)
        captions = [write_caption(scene, ANNOTATORS[0], rng) for scene in scenes]
        with tqdm(total=prompts, desc=f"{name}, {label} prompts", mininterval=5) as bar:
            images = generator.render(
                captions, list(range(prompts)), MINI.steps, MINI.guidance_scale, 25, progress=bar.update
            )
        score = total(map(score_prompt, recogniser.find(images), scenes))
        figures[f"{label} prompts: {what} found"] = proportion(score.right, score.things)
        figures[f"{label} prompts: ground right"] = proportion(score.grounds_right, score.grounds)
    # where no image shows both things, the share may be anything
    relations = proportion(score.relations_right, score.relations) if score.relations else Interval(0, 0, 1, 0, None)
    return figures | {"two-thing prompts: relation right where both are found": relations}


@torch.no_grad()
def clip_figures(name: str) -> Figures:
    """Which caption is nearest to an image: of 100 scenes' captions, and of four that differ in the relation alone."""
    model, preprocess, tokenizer = load_clip(registry.locate(name))
    clip, rng, hits = ClipImage(model.eval(), preprocess), np.random.default_rng(SEED), 0

    def nearest(scenes: list[Scene], captions: list[str], choices: int) -> torch.Tensor:
        """(groups, images of a group): the index of the nearest among the group's `choices` captions."""
        text = model.encode_text(tokenizer(captions), normalize=True)
        image = torch.nn.functional.normalize(clip.embed(draw_all(scenes)), dim=-1)
        text = text.reshape(-1, choices, text.shape[-1])
        return (image.reshape(len(text), -1, text.shape[-1]) @ text.mT).argmax(-1)

    for part in range(5):
        scenes = held_out_scenes(100, salt=f"clip {part}")
        captions = [write_caption(scene, ANNOTATORS[3], rng) for scene in scenes]
        hits += int((nearest(scenes, captions, 100) == torch.arange(100)).sum())
    scenes = held_out_scenes(500, 2, salt="clip turns")
    rotations = [caption for scene in scenes for caption in annotate_rotations(scene, rng)]
    relations = int((nearest(scenes, rotations, 4) == 0).sum())
    return {
        "image → text R@1 among 100 scenes": proportion(hits, 500),
        "relation right, among the four of two things": proportion(relations, 500),
    }


def dino_figures(name: str) -> Figures:
    """Probes of frozen features on images of one thing: 1,000 with labels, 500 for the test."""
    dino = Dino.from_pretrained(registry.locate(name))
    # these words seed the scenes: with others the figures of docs/miniature.md would be of other scenes
    train, test = held_out_scenes(1000, 1, "known"), held_out_scenes(500, 1, "asked")
    features = dino.embed(draw_all(train)), dino.embed(draw_all(test))

    def accuracy(probe: Callable[..., float], attribute: str, values: tuple[str, ...]) -> Interval:
        labels = (
            torch.tensor([values.index(getattr(scene.things[0], attribute)) for scene in scenes])
            for scenes in (train, test)
        )
        share = probe(features[0], next(labels), features[1], next(labels))
        return proportion(round(share * len(test)), len(test))

    return {
        "20-NN accuracy of kind, one-thing pictures": accuracy(knn_accuracy, "kind", KINDS),
        "linear probe of colour, one-thing pictures": accuracy(ridge_accuracy, "colour", COLOURS),
    }


def inception_figures(name: str) -> Figures:
    """Whether it names the thing of an image."""
    extractor, scenes = FeatureExtractor.from_registry(name), held_out_scenes(500, 1, "inception")
    classes = extractor.extract(draw_all(scenes)).logits.argmax(1).tolist()
    right = sum(a == extractor.model.class_of(scene.things[0]) for a, scene in zip(classes, scenes, strict=True))
    return {"kind and colour of one thing": proportion(right, len(classes))}


MODELS: dict[str, tuple[str, Callable[..., Figures]]] = {  # model -> its name in the registry, what measures it
    "recogniser": (MINI.judge, recogniser_figures),
    "vae": (MINI.generator, vae_figures),
    "blip": (MINI.captioners[0], captioner_figures),
    "blip-large": (MINI.captioners[1], captioner_figures),
    "blip2": (MINI.captioners[2], captioner_figures),
    "sd": (MINI.generator, generator_figures),
    "lafite": (MINI.other_generator, generator_figures),
    "clip": (MINI.clip, clip_figures),
    "dino": (MINI.dino, dino_figures),
    "inception": (MINI.inception, inception_figures),
}


def measure(model: str, prompts: int = 200) -> list[Gate]:
    """The gates of one model.

    Args:
        model: in `MODELS`.
        prompts: of one thing, and of two, for a generator.
    Raises:
        KeyError: a bar names a figure that was not measured.
    """
    name, figures_of = MODELS[model]
    figures = figures_of(name, prompts) if figures_of is generator_figures else figures_of(name)
    if unknown := BARS[model].keys() - figures.keys():
        raise KeyError(f"{model} has bars for figures that are not measured: {', '.join(sorted(unknown))}")
    return [Gate(model, what, value, *BARS[model].get(what, Bar())) for what, value in figures.items()]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def line(gate: dict) -> str:
    """One row of the table in docs/miniature.md, from `Gate.as_dict`."""
    value, verdict = gate["value"], "reported"
    if gate["floor"] is not None:
        verdict = "goal" if gate["reaches_goal"] else "floor" if gate["reaches_floor"] else "**falls short**"
    chance = "" if gate["chance"] is None else f"{gate['chance']:.3f}"
    return (
        f"| {gate['model']} | {gate['what']} | {value['value']:.3f} | {value['low']:.3f} … {value['high']:.3f} "
        f"| {value['n']} | {chance} | {_bound(gate['floor'])} | {_bound(gate['goal'])} | {verdict} |"
    )


def _bound(bound: float | Sequence[float] | None) -> str:
    if bound is None:
        return ""
    return f"≥ {bound}" if isinstance(bound, float) else f"{bound[0]} … {bound[1]}"


def page(gates: Sequence[dict]) -> str:
    """docs/miniature.md, from the records in MANIFEST.json."""
    rows = "\n".join(map(line, gates))
    return f"""# The miniature's models, measured

Made by `make gates` on held-out scenes (seed {SEED}), coco test and nocaps; SD with {MINI.steps} steps and guidance
{MINI.guidance_scale}. Intervals are 95 %: Wilson for shares, bootstrap over images for the rest. A model that reaches
the floor is good enough for the course; the goal is what we want.

| model | what | value | 95 % interval | n | chance | floor | goal | reaches |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def record(gates: Sequence[Gate]) -> None:
    """Put the gates of one model into MANIFEST.json and the page, in place of its earlier ones."""
    file = data_folder() / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    others = [gate for gate in manifest.get("gates", []) if gate["model"] != gates[0].model]
    together = others + [json.loads(json.dumps(gate.as_dict())) for gate in gates]
    manifest["gates"] = sorted(together, key=lambda gate: list(MODELS).index(gate["model"]))
    write_whole(file, lambda part: part.write_text(json.dumps(manifest, indent=1) + "\n"))
    write_whole(PAGE, lambda part: part.write_text(page(manifest["gates"])))


def _scenes(dataset: Dataset) -> list[Scene]:
    return [Scene.from_dict(example.extra["scene"]) for example in dataset]


def _in_parts(work: Callable[[list], list], items: list, what: str, size: int = 25) -> list:
    """`work` done on 25 items at a time, with a progress bar."""
    starts = tqdm(range(0, len(items), size), desc=what, mininterval=5)
    return [result for start in starts for result in work(items[start : start + size])]


def main(arguments: list[str]) -> int:
    """The command `python -m dalleflamingo research gates`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dalleflamingo research gates",
        description="Measure how good the shipped models are, and write it into MANIFEST.json and docs/miniature.md.",
    )
    parser.add_argument("models", nargs="*", help=f"which of {', '.join(MODELS)} (default: all)", metavar="MODEL")
    parser.add_argument("--prompts", type=positive, default=200, help="of one thing, and of two, for generators (200)")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    for model in options.models or MODELS:
        gates = measure(model, options.prompts)
        record(gates)
        print(*(line(gate.as_dict()) for gate in gates), sep="\n", flush=True)
    print(f"written: {data_folder()}/MANIFEST.json, {PAGE}")
    return 0
