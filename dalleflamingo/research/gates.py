"""How good the shipped models are, on what they have not seen: `python -m dalleflamingo research gates`.

Every figure comes with its n, its 95 % interval and its chance level, and is held against a floor (good enough for the
course) and a goal. MANIFEST.json and docs/miniature.md hold them. Nothing is tuned on what is measured here.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo import registry
from dalleflamingo.captioner import Captioner, Nucleus
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import Interval, derive_seed, paired_bootstrap, proportion
from dalleflamingo.miniature.annotators import ANNOTATORS, annotate_rotations, describe
from dalleflamingo.miniature.corpora import ROOT
from dalleflamingo.miniature.image_score import ImageScore, score_in_place, score_prompt, total
from dalleflamingo.miniature.lafite import LafiteGenerator
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, Scene, f1, is_right, recall_of_things
from dalleflamingo.miniature.training.probes import knn_accuracy, ridge_accuracy
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.profiles import PROFILES
from dalleflamingo.similarity import ClipImage, Dino, load_clip

SEED = 20  # of held-out scenes; no recipe draws from it
MINI = PROFILES["mini"]
MODELS = ("recogniser", "vae", "blip", "blip-large", "blip2", "sd", "lafite", "clip", "dino", "inception")


@dataclass(frozen=True)
class Gate:
    """One figure; `floor` and `goal` bound it from below, or as (low, high) from both sides; None: only reported."""

    model: str
    what: str
    value: Interval
    chance: float | None = None
    floor: float | tuple[float, float] | None = None
    goal: float | tuple[float, float] | None = None

    def reaches(self, bound: float | tuple[float, float] | None) -> bool | None:
        if bound is None:
            return None
        low, high = bound if isinstance(bound, tuple) else (bound, np.inf)
        return bool(low <= self.value.value <= high)

    def as_dict(self) -> dict:
        return asdict(self) | {"reaches_floor": self.reaches(self.floor), "reaches_goal": self.reaches(self.goal)}


def held_out(n: int, count: int | None = None, salt: str = "") -> list[Scene]:
    """`n` scenes of all kinds that no training has drawn."""
    rng = np.random.default_rng(derive_seed(SEED, f"{count} {salt}"))
    return [sample_scene(rng, count=count) for _ in range(n)]


def pictures(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(draw(scene)) for scene in scenes]


def mean_interval(values: list[float]) -> Interval:
    values = np.asarray(values, float)
    return paired_bootstrap(lambda rows: values[rows].mean(), len(values), seed=SEED)


def recogniser_gates(recogniser: Recogniser) -> list[Gate]:
    scenes = held_out(500)
    score = total(map(score_in_place, recogniser.find(pictures(scenes)), scenes))
    chance = 1 / len(KINDS) / len(COLOURS)
    empty = [Image.fromarray(draw(Scene(scene.ground, ()))) for scene in scenes[:100]]
    silent = sum(not found.things for found in recogniser.find(empty))
    return [
        Gate(
            "recogniser",
            "things right (kind and colour, in place)",
            proportion(score.right, score.things),
            chance,
            0.95,
            0.98,
        ),
        Gate("recogniser", "found things that are there", proportion(score.matched, score.found)),
        Gate("recogniser", "empty grounds where it says nothing", proportion(silent, len(empty))),
    ]


@torch.no_grad()
def vae_gates(recogniser: Recogniser, generator: Generator) -> list[Gate]:
    scenes = held_out(500)
    originals = pictures(scenes)
    pixels = torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = generator.pipeline.vae
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pixels.split(50)]).clamp(
        -1, 1
    )
    rebuilt = [Image.fromarray(p) for p in ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    squared = (decoded - pixels).square().mean((1, 2, 3))
    before = [score_in_place(found, scene) for found, scene in zip(recogniser.find(originals), scenes, strict=True)]
    after = [score_in_place(found, scene) for found, scene in zip(recogniser.find(rebuilt), scenes, strict=True)]
    small = [i for i, scene in enumerate(scenes) if all(thing.size == "small" for thing in scene.things)]
    return [
        Gate(
            "vae",
            "points of recogniser accuracy lost by reconstruction, negative",
            _difference(before, after),
            None,
            -0.04,
            -0.015,
        ),
        Gate(
            "vae",
            "the same, pictures of small things only",
            _difference([before[i] for i in small], [after[i] for i in small]),
            None,
            -0.04,
            -0.015,
        ),
        Gate("vae", "PSNR of reconstructions (dB)", mean_interval((10 * torch.log10(4 / squared)).tolist())),
    ]


def _difference(before: list[ImageScore], after: list[ImageScore]) -> Interval:
    things, first, second = (np.array([getattr(score, name) for score in scores]) for name, scores in
                             (("things", before), ("right", before), ("right", after)))  # fmt: skip
    return paired_bootstrap(
        lambda rows: (second[rows] - first[rows]).sum() / things[rows].sum(), len(things), seed=SEED
    )


def captioner_gates(name: str, captioner: Captioner, test: Dataset, nocaps: Dataset) -> list[Gate]:
    test = test.subset(300, SEED)
    scenes = _scenes(test)
    said = _in_parts(
        lambda part: captioner.describe([test.open(example) for example in part]), list(test), "beam search"
    )
    right = sum(map(is_right, said, scenes))
    gates = [
        Gate(
            name,
            "beam search: captions without a wrong kind, colour or relation",
            proportion(right, len(said)),
            None,
            0.75,
            0.85,
        ),
        Gate(
            name,
            "beam search: recall of things",
            mean_interval(list(map(recall_of_things, said, scenes))),
            None,
            0.70,
            0.80,
        ),
    ]
    gates += _sampling_gates(name, captioner, test, "coco test", (0.40, 0.85), (0.45, 0.80))
    for domain, part in nocaps.by_domain().items():
        gates += _sampling_gates(name, captioner, part.subset(60, SEED), domain, None, None)
    return gates


def _sampling_gates(name: str, captioner: Captioner, data: Dataset, where: str, floor, goal) -> list[Gate]:
    """Nucleus p = 0.9, K = 10: the share of right captions, and how far the candidates of a picture differ in F1."""
    examples, k = list(data), 10
    seeds = [[derive_seed(SEED, example.image_id, i) for i in range(k)] for example in examples]
    pairs = list(zip(examples, seeds, strict=True))
    said = _in_parts(
        lambda part: captioner.sample([data.open(e) for e, _ in part], [s for _, s in part], Nucleus(0.9)), pairs, where
    )
    scenes = _scenes(data)
    right = [
        np.mean([is_right(caption, scene) for caption in captions])
        for captions, scene in zip(said, scenes, strict=True)
    ]
    spread = [
        np.std([f1(caption, scene) for caption in captions]) for captions, scene in zip(said, scenes, strict=True)
    ]
    return [
        Gate(name, f"nucleus p = 0.9, {where}: captions factually right", mean_interval(right), None, floor, goal),
        Gate(name, f"nucleus p = 0.9, {where}: standard deviation of F1 across 10 candidates", mean_interval(spread)),
    ]


# floor and goal: the things of one-thing prompts, those of two-thing prompts, the relations of two-thing prompts
_DRAWN = {
    "sd": ((0.80, 0.90), (0.55, 0.80), (0.60, 0.75)),
    "lafite": ((0.40, 0.60), (0.25, 0.45), (None, None)),
}


def generator_gates(name: str, recogniser: Recogniser, generator: Generator | LafiteGenerator, n: int) -> list[Gate]:
    """Prompts by the world's first annotator, 20 steps; things count wherever they stand."""
    gates, of_relations = [], _DRAWN[name][2]
    rng = np.random.default_rng(SEED)
    for count in (1, 2):
        scenes = held_out(n, count)
        captions = [describe(scene, ANNOTATORS[0], rng) for scene in scenes]
        with tqdm(total=n, desc=f"{name}, {count} thing{'s'[: count - 1]}", mininterval=5) as bar:
            drawn = generator.render(captions, list(range(n)), MINI.steps, MINI.guidance_scale, 25, progress=bar.update)
        score = total(map(score_prompt, recogniser.find(drawn), scenes))
        named = "one-thing prompts: kind and colour" if count == 1 else "two-thing prompts: each thing"
        chance = 1 / len(KINDS) / len(COLOURS)
        found = proportion(score.right, score.things)
        gates.append(Gate(name, f"{named} found", found, chance, *_DRAWN[name][count - 1]))
        gates.append(
            Gate(name, f"{named[:9]} prompts: ground right", proportion(score.grounds_right, score.grounds), 0.2)
        )
        if count == 2:
            both = score.relations  # where no picture shows both things, anything from 0 to 1 may be true
            value = proportion(score.relations_right, both) if both else Interval(0.0, 0.0, 1.0, 0, None)
            what = "two-thing prompts: relation right where both are found"
            gates.append(Gate(name, what, value, 0.25, *of_relations))
    return gates


@torch.no_grad()
def clip_gates() -> list[Gate]:
    """Of 100 scenes' captions, and of four that differ in the relation alone, which is nearest to the picture?"""
    model, preprocess, tokenizer = load_clip(registry.locate("miniature/clip"))
    clip, rng, hits = ClipImage(model.eval(), preprocess), np.random.default_rng(SEED), 0

    def nearest(scenes: list[Scene], captions: list[str], choices: int) -> torch.Tensor:
        """(groups, pictures of a group): which of the group's captions, `choices` of them, is nearest to a picture."""
        text = model.encode_text(tokenizer(captions), normalize=True)
        image = torch.nn.functional.normalize(clip.embed(pictures(scenes)), dim=-1)
        text = text.reshape(-1, choices, text.shape[-1])
        return (image.reshape(len(text), -1, text.shape[-1]) @ text.mT).argmax(-1)

    for part in range(5):
        scenes = held_out(100, salt=f"clip {part}")
        captions = [describe(scene, ANNOTATORS[3], rng) for scene in scenes]
        hits += int((nearest(scenes, captions, 100) == torch.arange(100)).sum())
    scenes = held_out(500, 2, salt="clip turns")
    turns = [caption for scene in scenes for caption in annotate_rotations(scene, rng)]
    placed = int((nearest(scenes, turns, 4) == 0).sum())
    return [
        Gate("clip", "image → text R@1 among 100 scenes", proportion(hits, 500), 0.01, 0.50, 0.70),
        Gate("clip", "relation right, among the four of two things", proportion(placed, 500), 0.25, 0.60, 0.75),
    ]


def dino_gates(dino: Dino) -> list[Gate]:
    """Frozen features of one-thing pictures: 1,000 to look up in, 500 asked for."""
    known, asked = held_out(1000, 1, "known"), held_out(500, 1, "asked")
    train, test = dino.embed(pictures(known)), dino.embed(pictures(asked))

    def labels(scenes: list[Scene], attribute: str, values: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor([values.index(getattr(scene.things[0], attribute)) for scene in scenes])

    def of(accuracy: float) -> Interval:
        return proportion(round(accuracy * len(asked)), len(asked))

    kinds = knn_accuracy(train, labels(known, "kind", KINDS), test, labels(asked, "kind", KINDS))
    colours = ridge_accuracy(train, labels(known, "colour", COLOURS), test, labels(asked, "colour", COLOURS))
    return [
        Gate("dino", "20-NN accuracy of kind, one-thing pictures", of(kinds), 1 / len(KINDS), 0.50, 0.80),
        Gate("dino", "linear probe of colour, one-thing pictures", of(colours), 1 / len(COLOURS)),
    ]


def inception_gates(extractor: FeatureExtractor) -> list[Gate]:
    """Does it know the things whose features it compares?"""
    scenes = held_out(500, 1, "inception")
    named = extractor.look(pictures(scenes)).logits.argmax(1).tolist()
    right = sum(a == extractor.model.class_of(scene.things[0]) for a, scene in zip(named, scenes, strict=True))
    return [Gate("inception", "kind and colour of one thing", proportion(right, len(named)), 1 / 192, 0.90, 0.98)]


def measure(name: str, n: int) -> list[Gate]:
    """The gates of one model; n prompts of each sort for a generator."""
    recogniser = Recogniser.from_pretrained(registry.locate("miniature/recogniser")).eval()
    test, nocaps = registry.dataset("miniature/coco", "test"), registry.dataset("miniature/nocaps")

    def captioner() -> list[Gate]:
        return captioner_gates(name, Captioner.from_pretrained(registry.locate(f"miniature/{name}")), test, nocaps)

    def drawn(kind: type[Generator] | type[LafiteGenerator]) -> list[Gate]:
        return generator_gates(name, recogniser, kind.from_pretrained(registry.locate(f"miniature/{name}")), n)

    of: dict[str, Callable[[], list[Gate]]] = {
        "recogniser": lambda: recogniser_gates(recogniser),
        "vae": lambda: vae_gates(recogniser, Generator.from_pretrained(registry.locate("miniature/sd"))),
        "blip": captioner,
        "blip-large": captioner,
        "blip2": captioner,
        "sd": lambda: drawn(Generator),
        "lafite": lambda: drawn(LafiteGenerator),
        "clip": clip_gates,
        "dino": lambda: dino_gates(Dino.from_pretrained(registry.locate("miniature/dino"))),
        "inception": lambda: inception_gates(FeatureExtractor.of("miniature/inception")),
    }
    return of[name]()


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


def page(gates: list[dict]) -> str:
    rows = "\n".join(map(line, gates))
    return f"""# The miniature's models, measured

Made by `make gates` on held-out scenes (seed {SEED}), coco test and nocaps; SD with {MINI.steps} steps and guidance
{MINI.guidance_scale}. Intervals are 95 %: Wilson for shares, bootstrap over pictures for the rest. The floor is what
the course needs, the goal is what we want.

| model | what | value | 95 % interval | n | chance | floor | goal | reaches |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def record(gates: list[Gate]) -> None:
    """Put the gates of one model into MANIFEST.json and the page, in place of its earlier ones."""
    file = ROOT / "MANIFEST.json"
    manifest = json.loads(file.read_text())
    model = gates[0].model
    kept = [gate for gate in manifest.get("gates", []) if gate["model"] != model]
    together = kept + [json.loads(json.dumps(gate.as_dict())) for gate in gates]
    manifest["gates"] = sorted(together, key=lambda gate: MODELS.index(gate["model"]))
    file.write_text(json.dumps(manifest, indent=1) + "\n")
    Path("docs/miniature.md").write_text(page(manifest["gates"]))


def _scenes(data: Dataset) -> list[Scene]:
    return [Scene.from_dict(example.extra["scene"]) for example in data]


def _in_parts(work: Callable[[list], list], items: list, what: str, size: int = 25) -> list:
    """`work` done on 25 items at a time, with a progress bar."""
    starts = tqdm(range(0, len(items), size), desc=what, mininterval=5)
    return [result for start in starts for result in work(items[start : start + size])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"which of {', '.join(MODELS)} (default: all)", metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=200, help="of one thing, and of two, to be drawn (200)")
    options = parser.parse_args(arguments)
    for name in options.models or MODELS:
        gates = measure(name, options.prompts)
        record(gates)
        print(*(line(gate.as_dict()) for gate in gates), sep="\n", flush=True)
    print(f"written: {ROOT}/MANIFEST.json, docs/miniature.md")
