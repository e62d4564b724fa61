"""How good the world's people and the shipped models are: `python -m dalleflamingo research gates`.

Every figure has its n and its 95 % interval, and is compared with a floor (good enough for the course) and a goal. They
are measured on development scenes: miniature/nocaps-dev, and scenes drawn from a seed. World and models are frozen by
these gates alone, before any finding is measured. MANIFEST.json and docs/miniature.md keep the figures.

    python -m dalleflamingo research gates --seed 7 --json gates.json      on fresh scenes only, written there only
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalleflamingo import registry
from dalleflamingo.commands.parsers import command_parser, positive
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.evaluation.similarities import Fidelity
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.miniature.corpora import data_folder
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS, RELATIONS
from dalleflamingo.profiles import PROFILES
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import caption_gates, encoder_gates, fresh, image_gates
from dalleflamingo.research.options import RUNS
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import ClipImage, Dino, Similarity, load_clip
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_generator

SEED = 20  # of the scenes that are drawn; no training draws from it
MINI = PROFILES["mini"]
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
    "CIDEr of nucleus p = 0.9 / beam search": Bar(goal=(0.60, 0.85)),
    "CIDEr of nucleus p = 0.95 / p = 0.1": Bar(goal=(0.50, 0.85)),
    "nucleus p = 0.9, in-domain: candidates that say nothing false": Bar(goal=(0.55, 0.80)),
    "nucleus p = 0.9, out-domain: candidates that say nothing false": Bar(goal=(0.55, 0.80)),
    "nucleus p = 0.9, in-domain − out-domain: candidates that say nothing false": Bar(goal=0.05),
    "nucleus p = 0.9: standard deviation of F1 across 10 candidates": Bar(goal=0.13),
}
_GROUNDS = {f"{label} prompts: ground right": Bar(GROUND_CHANCE) for label in ("one-thing", "two-thing", "three-thing")}


def _encoder(by: str, first: tuple[float, float], auc: float) -> dict[str, Bar]:
    """The bars of an encoder: floor and goal of finding the truth, goal of the AUC."""
    return {
        f"planted errors: truth ranked first by {by}": Bar(1 / 5, *first),
        f"same content elsewhere nearer than changed content in place (AUC by {by})": Bar(1 / 2, goal=auc),
    }


BARS: dict[str, dict[str, Bar]] = {
    "annotators": {
        "one of ten captions against the other nine: CIDEr × 100": Bar(goal=(100.0, 200.0)),
        "one of ten captions against the other nine: BLEU-4": Bar(goal=(0.0, 0.6)),
    },
    "recogniser": {"things right (kind and colour, in place)": Bar(NAME_CHANCE, 0.95, 0.98)},
    "vae": {
        "points of recogniser accuracy lost by reconstruction, negative": Bar(None, -0.04, -0.015),
        "the same, pictures of small things only": Bar(None, -0.04, -0.015),
    },
    "blip": _CAPTIONER,
    "blip-large": _CAPTIONER,
    "blip2": _CAPTIONER,
    "sd": {
        "one-thing prompts: kind and colour right": Bar(NAME_CHANCE, 0.90, 0.95),
        "two-thing prompts: kind and colour right": Bar(NAME_CHANCE, 0.85, 0.90),
        "three-thing prompts: kind and colour right": Bar(NAME_CHANCE, 0.65, 0.75),
        "two-thing prompts: relation right where both are found": Bar(RELATION_CHANCE, goal=0.90),
        "three-thing prompts: relation right where both are found": Bar(RELATION_CHANCE),
        **_GROUNDS,
    },
    "lafite": {
        "one-thing prompts: kind and colour right": Bar(NAME_CHANCE, 0.40, 0.60),
        "two-thing prompts: kind and colour right": Bar(NAME_CHANCE, 0.25, 0.45),
        "three-thing prompts: kind and colour right": Bar(NAME_CHANCE),
        "two-thing prompts: relation right where both are found": Bar(RELATION_CHANCE),
        "three-thing prompts: relation right where both are found": Bar(RELATION_CHANCE),
        **_GROUNDS,
    },
    "clip": {
        **_encoder("CLIP", (0.75, 0.85), 0.95),
        "image → text R@1 among 100 scenes": Bar(0.01),
        "relation right, among the four of two things": Bar(RELATION_CHANCE),
    },
    "dino": {
        **_encoder("DINO", (0.35, 0.50), 0.85),
        "20-NN accuracy of kind, one-thing pictures": Bar(1 / len(KINDS)),
        "linear probe of colour, one-thing pictures": Bar(1 / len(COLOURS)),
    },
    "inception": {
        **_encoder("image fidelity", (0.35, 0.50), 0.85),
        "kind and colour of one thing": Bar(NAME_CHANCE, 0.90, 0.98),
    },
    "data": {"data/miniature (MB)": Bar(goal=(0.0, 48.0))},
}


@dataclass(frozen=True)
class Gate:
    """One figure of one model beside its bar."""

    model: str
    what: str
    value: Interval
    floor: Bound = None
    goal: Bound = None

    def as_dict(self) -> dict:
        """The record in MANIFEST.json and in the file of --json."""
        value = {"value": self.value.value, "low": self.value.low, "high": self.value.high, "n": self.value.n}
        return {"model": self.model, "what": self.what} | value | {"floor": self.floor, "goal": self.goal}


def shortfall(value: float, bound: float | Sequence[float] | None) -> float:
    """How much a value lacks to a bound, or has too much; 0 within it.

    Args:
        value: of a gate.
        bound: the least value, or (low, high); None is no bound.
    """
    if bound is None:
        return 0.0
    low, high = (bound, np.inf) if isinstance(bound, float) else bound
    return float(max(low - value, value - high, 0.0))


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Development:
    """The scenes that gates are measured on.

    Attributes:
        seed: of all that is drawn; None: `SEED`, and miniature/nocaps-dev for captions.
        limit: at most so many scenes, images or prompts for each figure, for a trial.
        runs: folder of the run folders.
    """

    seed: int | None = None
    limit: int | None = None
    runs: Path = RUNS

    @property
    def scene_seed(self) -> int:
        """The seed of scenes that are drawn."""
        return SEED if self.seed is None else self.seed

    def size(self, n: int) -> int:
        """n, or the limit."""
        return min(n, self.limit or n)

    def annotated(self) -> Dataset:
        """Scenes in the three domains with ten captions each."""
        n = self.size(600)
        if self.seed is not None:
            return fresh.nocaps(n, self.seed)
        return registered.load_dataset(registry.entry_of(MINI.dataset).development).subset(n)


def _open_recogniser() -> Recogniser:
    return Recogniser.from_pretrained(registry.locate(MINI.judge)).eval()


def _annotators(development: Development) -> Figures:
    return caption_gates.annotator_figures(development.annotated())


def _recogniser(development: Development) -> Figures:
    return image_gates.recogniser_figures(_open_recogniser(), development.size(500), development.scene_seed)


def _vae(development: Development) -> Figures:
    vae = load_generator(MINI).pipeline.vae
    return image_gates.vae_figures(vae, _open_recogniser(), development.size(500), development.scene_seed)


def _captioner(name: str) -> Callable[[Development], Figures]:
    def figures(development: Development) -> Figures:
        captioner = load_captioner(MINI, name)
        return caption_gates.captioner_figures(captioner, development.annotated(), development.scene_seed)

    return figures


def _generator(name: str) -> Callable[[Development], Figures]:
    def figures(development: Development) -> Figures:
        size, seed = development.size(200), development.scene_seed
        settings = JourneySettings.of(MINI, seed=seed, batch_size=25)
        return image_gates.generator_figures(load_generator(MINI, name), _open_recogniser(), size, settings)

    return figures


def _encoder_figures(similarity: Similarity, development: Development) -> Figures:
    n, generator = development.size(300), load_generator(MINI)
    settings = JourneySettings.of(MINI, seed=development.scene_seed)
    weights = generator.fingerprint().split()[-1]  # gates are measured again and again while models are trained
    folder = development.runs / f"planted-{settings.seed}-of-{n}-{weights}"
    planted = encoder_gates.planted_figures(similarity, generator, n, folder, settings)
    return planted | encoder_gates.elsewhere_figures(similarity, n, settings.seed)


def _clip(development: Development) -> Figures:
    model, preprocess, tokenizer = load_clip(registry.locate(MINI.clip))
    image, text = ClipImage(model, preprocess), ClipText(model, tokenizer)
    return _encoder_figures(image, development) | encoder_gates.clip_figures(
        image, text, development.size(500), development.scene_seed
    )


def _dino(development: Development) -> Figures:
    dino = Dino.from_pretrained(registry.locate(MINI.dino))
    return _encoder_figures(dino, development) | encoder_gates.dino_figures(
        dino, development.size(500), development.scene_seed
    )


def _inception(development: Development) -> Figures:
    extractor = FeatureExtractor.from_registry(MINI.inception)
    return _encoder_figures(Fidelity(extractor), development) | encoder_gates.inception_figures(
        extractor, development.size(500), development.scene_seed
    )


def _data(development: Development) -> Figures:
    return {"data/miniature (MB)": size_of_data(data_folder())}


def size_of_data(folder: Path) -> Interval:
    """MB (10⁶ bytes) of the files that come with the repository: all but the images, which are drawn; n files.

    Args:
        folder: data/miniature.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and "images" not in path.relative_to(folder).parts]
    sizes = [path.stat().st_size for path in files]
    megabytes = sum(sizes) / 1e6
    return Interval(megabytes, megabytes, megabytes, len(sizes), None)


MODELS: Mapping[str, Callable[[Development], Figures]] = {
    "annotators": _annotators,
    "recogniser": _recogniser,
    "vae": _vae,
    "blip": _captioner(MINI.captioners[0]),
    "blip-large": _captioner(MINI.captioners[1]),
    "blip2": _captioner(MINI.captioners[2]),
    "sd": _generator(MINI.generator),
    "lafite": _generator(MINI.other_generator),
    "clip": _clip,
    "dino": _dino,
    "inception": _inception,
    "data": _data,
}


def measure(model: str, development: Development) -> list[Gate]:
    """The gates of one model.

    Args:
        model: in `MODELS`.
        development: what it is measured on.
    Raises:
        KeyError: a bar names a figure that was not measured.
    """
    return gates_of(model, MODELS[model](development))


def gates_of(model: str, figures: Figures) -> list[Gate]:
    """The gates of figures that were measured; errors as `measure`."""
    if unknown := BARS[model].keys() - figures.keys():
        raise KeyError(f"{model} has bars for figures that are not measured: {', '.join(sorted(unknown))}")
    bars = {what: BARS[model].get(what, Bar()) for what in figures}
    return [Gate(model, what, value, bars[what].floor, bars[what].goal) for what, value in figures.items()]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


_HEADER = """\
| model | what | value | 95 % interval | n | chance | floor | goal | reaches |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(gate: dict) -> str:
    """One row of the table in docs/miniature.md, from `Gate.as_dict`."""
    value, chance = gate["value"], BARS[gate["model"]].get(gate["what"], Bar()).chance
    return (
        f"| {gate['model']} | {gate['what']} | {value:.3f} | {gate['low']:.3f} … {gate['high']:.3f} | {gate['n']} "
        f"| {'' if chance is None else f'{chance:.3f}'} | {_bound(gate['floor'])} | {_bound(gate['goal'])} "
        f"| {_verdict(gate)} |"
    )


def _verdict(gate: dict) -> str:
    if below := shortfall(gate["value"], gate["floor"]):
        return f"**falls short of the floor by {below:.3f}**"
    if gate["goal"] is None:
        return "reported" if gate["floor"] is None else "floor"
    if off := shortfall(gate["value"], gate["goal"]):
        return f"{'' if gate['floor'] is None else 'floor, '}off the goal by {off:.3f}"
    return "goal"


def _bound(bound: float | Sequence[float] | None) -> str:
    if bound is None:
        return ""
    return f"≥ {bound}" if isinstance(bound, float) else f"{bound[0]} … {bound[1]}"


def table(gates: Iterable[dict]) -> str:
    """A Markdown table, from records in MANIFEST.json."""
    return "\n".join([_HEADER, *map(line, gates)])


def page(gates: Sequence[dict]) -> str:
    """docs/miniature.md, from the records in MANIFEST.json."""
    return f"""# The miniature's people and models, measured

Made by `make gates` on miniature/nocaps-dev and on scenes of seed {SEED}; SD with {MINI.steps} steps and guidance
{MINI.guidance_scale}. World and models were chosen by these gates alone, before any finding was measured. Intervals are
95 %: Wilson for shares, bootstrap over images for the rest. The floor is what the course needs; the goal is what we
want.

{table(gates)}
"""


def record(gates: Sequence[Gate], docs: Path) -> None:
    """Put the gates of one model into MANIFEST.json and the page, in place of its earlier ones.

    Args:
        gates: of one model.
        docs: the folder of miniature.md.
    """
    file = data_folder() / "MANIFEST.json"
    manifest, records = json.loads(file.read_text()), [gate.as_dict() for gate in gates]
    # records of another form are of another edition, and its results go
    others = [gate for gate in manifest.get("gates", []) if gate.keys() == records[0].keys()]
    together = [gate for gate in others if gate["model"] != gates[0].model] + json.loads(json.dumps(records))
    manifest["gates"] = sorted(together, key=lambda gate: list(MODELS).index(gate["model"]))
    write_whole(file, lambda part: part.write_text(json.dumps(manifest, indent=1) + "\n"))
    write_whole(docs / "miniature.md", lambda part: part.write_text(page(manifest["gates"]), encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Measure how good the world's people and the shipped models are.

    It is written into MANIFEST.json and docs/miniature.md; with --json into that file instead.
    """
    parser = command_parser("research gates", main.__doc__)
    parser.add_argument("models", nargs="*", help=f"which of {', '.join(MODELS)} (default: all)", metavar="MODEL")
    parser.add_argument("--seed", type=int, help="measure on fresh scenes of this seed only; needs --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the gates there, and nothing else")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="at most N scenes for each figure, for a trial; needs --json"
    )
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the run folders; default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if not options.json and (options.seed is not None or options.limit):
        parser.error("--seed and --limit measure something else than docs/miniature.md holds: say where, by --json")
    development, records = Development(options.seed, options.limit, options.runs), []
    for model in options.models or MODELS:
        gates = measure(model, development)
        records += [gate.as_dict() for gate in gates]
        if options.json:
            text = json.dumps({"gates": records}, indent=1, ensure_ascii=False) + "\n"
            write_whole(options.json, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        else:
            record(gates, Path("docs"))
        print(*(line(gate.as_dict()) for gate in gates), sep="\n", flush=True)
    print(f"written: {options.json or f'{data_folder()}/MANIFEST.json, docs/miniature.md'}")
    return 0
