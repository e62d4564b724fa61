"""The runs behind Tables 3, 4, 5 and 9: two miniatures finetuned through each other, in every arm, from several seeds.

    python -m dalleflamingo research cycle        the whole queue, going on where it was

The same command in a second terminal takes the runs that no other process is at, so that every core can have one.
A run leaves `result.json` in its folder: what the captioner then says of every test picture, and how far from the real
one each picture lies that the generator then draws. `cycle_results.py` reads them.
"""

import argparse
import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dalleflamingo import cycle, profiles, registry
from dalleflamingo.captioner import describe
from dalleflamingo.cycle import CHOSEN, CycleConfig
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.cycle_validation import draw
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.generator import Generator
from dalleflamingo.research.image_ranking import distances
from dalleflamingo.similarity import ClipImage

TESTED = 300  # pictures of nocaps, a hundred of each domain, and of coco's test split
AS_LONG = 980  # steps from labels only that take nearly as much computing: 1,120 would, and 1,000 is the limit
START = "start"


@dataclass(frozen=True)
class Arm:
    """What is other than in `CHOSEN`.

    losses, changes: fields of `Losses` and of `CycleConfig`. drawn: the generator is judged as well.
    """

    what: str
    losses: Mapping[str, object] = field(default_factory=dict)
    changes: Mapping[str, object] = field(default_factory=dict)
    drawn: bool = False

    def config(self, captioner: str, seed: int) -> CycleConfig:
        losses = replace(CHOSEN.losses, **self.losses)
        return replace(CHOSEN, captioner=captioner, seed=seed, losses=losses, **self.changes)


_LABELS = {"image_reconstruction": 0.0, "caption_reconstruction": 0.0}
ARMS = {
    "labels": Arm("labels only: (1), (3)", _LABELS, drawn=True),
    "labels-longer": Arm("labels only, 2.2 × as many steps", _LABELS, {"steps": AS_LONG}, drawn=True),
    "cycle": Arm("cycle: (1) to (4)", drawn=True),
    "reconstruction": Arm("reconstruction only: (2), (4)", {"caption": 0.0, "generation": 0.0}, drawn=True),
    "image": Arm("labels and image reconstruction: (1) to (3)", {"caption_reconstruction": 0.0}),
    "text": Arm("labels and caption reconstruction: (1), (3), (4)", {"image_reconstruction": 0.0}),
    # One seed each, exploratory. The first six are as the authors' released code has it.
    "released-map": Arm("the released kind of map", changes={"vocabulary_map": "released"}),
    "ends-kept": Arm(
        "the released kind of map, [SEP] kept, no padding", changes={"vocabulary_map": "released", "ends_kept": True}
    ),
    "previous-sample": Arm("x̂ from the scheduler's step on clean latents", {"previous_sample": True}),
    "unnormalised": Arm("x̂ without the captioner's normalisation", {"unnormalised": True}),
    "released": Arm(
        "all of these, and no bound on timesteps",
        {"previous_sample": True, "unnormalised": True, "latest": 1.0},
        {"vocabulary_map": "released", "ends_kept": True},
    ),
    "joint": Arm(
        "all four losses at every step, half as many steps", changes={"schedule": "joint", "steps": CHOSEN.steps // 2}
    ),
    "all-timesteps": Arm("no bound on timesteps", {"latest": 1.0}),
    "soft": Arm("soft bridge", {"mode": "soft"}),
    "gumbel": Arm("bridge that samples (Gumbel)", {"mode": "gumbel"}),
}
TABLE_3 = ("labels", "labels-longer", "cycle")
TABLE_9 = ("cycle", "image", "text", "labels", "reconstruction")
DEVIATIONS = ("joint", "released-map", "ends-kept", "previous-sample", "unnormalised", "released")
MODES = ("all-timesteps", "soft", "gumbel")
FIRST = "miniature/blip"  # all arms are trained with it
CAPTIONERS = {"miniature/blip": 5, "miniature/blip-large": 3, "miniature/blip2": 3}  # training seeds
EXPLORED = DEVIATIONS + MODES


@dataclass(frozen=True)
class Run:
    """One training and its test; `START` is the two models as they are."""

    arm: str
    captioner: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.captioner.rpartition('/')[2]}-{self.arm}" + f"-{self.seed}" * (self.arm != START)

    @property
    def config(self) -> CycleConfig:
        """Of an arm of `ARMS`."""
        if self.arm == START:
            return CycleConfig(captioner=self.captioner)
        return ARMS[self.arm].config(self.captioner, self.seed)

    @property
    def drawn(self) -> bool:
        """Is the generator judged? Table 4 has BLIP-2's not; what labels alone teach it, no captioner changes."""
        if self.captioner == FIRST:
            return self.arm == START or ARMS[self.arm].drawn
        return self.captioner == "miniature/blip-large" and self.arm == "cycle"


def queue() -> list[Run]:
    """Every run; two seeds of all that is compared, then what is explored, then the other seeds."""
    runs = [Run(START, captioner) for captioner in CAPTIONERS]
    for seed in range(max(CAPTIONERS.values())):
        for captioner in (name for name, seeds in CAPTIONERS.items() if seed < seeds):
            arms = dict.fromkeys(TABLE_3 + TABLE_9) if captioner == FIRST else TABLE_3
            runs += [Run(arm, captioner, seed) for arm in arms]
        if seed == 1:
            runs += [Run(arm, FIRST) for arm in EXPLORED]
    return runs


def trials() -> dict[Run, CycleConfig]:
    """What was tried from one seed on the pictures of `chosen_on`; `CHOSEN` came of it."""
    found = {Run(START, FIRST): CycleConfig(captioner=FIRST)}
    for pictures, rate in ((100, 3e-4), (2000, 3e-4), (2000, 1e-3)):
        for arm in ("labels", "cycle"):
            config = replace(ARMS[arm].config(FIRST, 0), pictures=pictures, learning_rate=rate, steps=600)
            found[Run(f"{arm}, {pictures} pictures, {rate:g}", FIRST)] = config
    for changes in ({"caption_reconstruction": 0.1}, {"image_reconstruction": 5.0}, {"mode": "soft"}, {"latest": 1.0}):
        name = ", ".join(f"{field} {value}" for field, value in changes.items())
        found[Run(f"cycle, {pictures} pictures, {rate:g}, {name}", FIRST)] = replace(
            config, losses=replace(config.losses, **changes)
        )
    return found


def perform(
    run: Run, config: CycleConfig, folder: Path, pictures: Mapping[str, Dataset], drawn: Collection[str]
) -> dict:
    """Train, going on where the folder's run was, test, and write `result.json`; what is there is not made again.

    Args:
        pictures: as of `tested`. drawn: of which of these the generator draws captions, and is judged by.
    """
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    made, pairs, learner = cycle.prepare(config, torch.device(profiles.current().device))
    if run.arm != START:
        cycle.train(config, made, pairs, learner, folder, Accelerator())
    folder.mkdir(parents=True, exist_ok=True)
    found = {"arm": run.arm, "captioner": run.captioner, "seed": run.seed} | examine(made, folder, pictures, drawn)
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    os.replace(part, result)
    return found


def tested() -> dict[str, Dataset]:
    """The pictures of the test, by corpus."""
    nocaps, coco = registry.dataset("miniature/nocaps"), registry.dataset("miniature/coco", "test")
    parts = nocaps.by_domain().values()
    ids = {example.image_id for part in parts for example in part.subset(TESTED // len(parts))}
    return {"nocaps": nocaps.only(ids), "coco": coco.subset(TESTED)}


def chosen_on() -> dict[str, Dataset]:
    """As many other pictures, on which settings are chosen, under the same names."""
    return {"nocaps": registry.dataset("miniature/nocaps-dev"), "coco": registry.dataset("miniature/coco", "val")}


@torch.no_grad()
def examine(made: Cycle, folder: Path, pictures: Mapping[str, Dataset], drawn: Collection[str]) -> dict:
    """What two models do on pictures, of nocaps and of coco.

    Returns:
        captions: corpus -> image id -> caption. pictures: corpus, of those `drawn`, -> what `judged` returns.
    """
    captions = {name: describe(made.captioner, dataset) for name, dataset in pictures.items()}
    found = {name: judged(made.generator, pictures[name], folder / "pictures" / name) for name in drawn}
    return {"captions": captions, "pictures": found}


def judged(generator: Generator, dataset: Dataset, folder: Path) -> dict[str, list]:
    """Draw a caption of every picture, keep the drawings in the folder, and look at them.

    Returns:
        image_id, clip_distance to the picture itself, × 100, and features, of the Inception: a list each.
    """
    profile, examples = profiles.current(), list(dataset)
    drawings = draw(generator, examples, profile.steps, profile.guidance_scale)
    folder.mkdir(parents=True, exist_ok=True)
    for example, drawing in zip(examples, drawings, strict=True):
        drawing.save(folder / f"{example.image_id}.png")
    clip = ClipImage.from_pretrained(registry.locate(profile.clip), profile.device)
    looks = FeatureExtractor.of(profile.inception, profile.device).look(drawings)
    real = [dataset.open(example) for example in examples]
    return {
        "image_id": [example.image_id for example in examples],
        "clip_distance": distances(clip, real, drawings, np.arange(len(real))).tolist(),
        "features": looks.features.half().tolist(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Train and test what is missing of the queue."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research cycle", description=main.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/runs/cycle"), help="default: %(default)s")
    parser.add_argument("--trials", action="store_true", help="what the settings were chosen from instead")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = trials() if options.trials else {run: run.config for run in queue()}
    folder = options.runs / "trials" if options.trials else options.runs
    pictures = chosen_on() if options.trials else tested()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for run, config in tqdm(wanted.items(), desc="cycle study", unit="run"):
            with suppress(Timeout), FileLock(folder / f"{run.name}.lock", timeout=0):
                drawn = ("nocaps",) if options.trials else tuple(pictures) if run.drawn else ()
                perform(run, config, folder / run.name, pictures, drawn)
    except (ValueError, FloatingPointError, registry.RegistryError) as error:
        parser.error(str(error))
    print(f"{folder}: {sum(1 for _ in folder.glob('*/result.json'))} of {len(wanted)} runs")
    return 0
