"""The runs behind Tables 3, 4, 5 and 9: two miniatures finetuned through each other, in every arm, from several seeds.

    python -m dalleflamingo.cycle_study        the whole queue, going on where it was

The same command in a second terminal takes the runs that no other process is at, so that every core can have one.
A run leaves `result.json` in its folder: what the captioner then says of every test picture, and how far from the real
one each picture lies that the generator then draws. `cycle_results.py` reads them.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dalleflamingo import cycle, profiles, registry
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import Cycle, Losses
from dalleflamingo.cycle_validation import describe, draw
from dalleflamingo.datasets import Dataset
from dalleflamingo.image_features import FeatureExtractor
from dalleflamingo.reconstruct import load_models

TESTED = 300  # pictures of nocaps, a hundred of each domain, and of coco's test split
# Settings were chosen on nocaps-dev and coco's val split: see docs/results/cycle.md.
CHOSEN = CycleConfig(pictures=100, learning_rate=3e-4, steps=450, losses=Losses(latest=0.4))
AS_LONG = 980  # steps from labels only in the time that CHOSEN's steps take, on a CPU
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
    "labels-longer": Arm("labels only, as much computing", _LABELS, {"steps": AS_LONG}, drawn=True),
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


def perform(run: Run, folder: Path) -> dict:
    """Train, going on where the folder's run was, test, and write `result.json`; what is there is not made again."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    config = ARMS[run.arm].config(run.captioner, run.seed) if run.arm != START else CycleConfig(captioner=run.captioner)
    made, pairs, learner = cycle.prepare(config, torch.device(profiles.current().device))
    if run.arm != START:
        cycle.train(config, made, pairs, learner, folder, Accelerator())
    folder.mkdir(parents=True, exist_ok=True)
    found = {"arm": run.arm, "captioner": run.captioner, "seed": run.seed} | examine(made, folder, run.drawn)
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


@torch.no_grad()
def examine(made: Cycle, folder: Path, drawn: bool) -> dict:
    """What two models do on the test's pictures.

    Returns:
        captions: corpus -> image id -> caption. If `drawn`, pictures: lists of image_id, clip_distance, × 100, and
        features, of the Inception; they are those of nocaps, and the pictures themselves lie in the folder.
    """
    captions = {name: describe(made.captioner, dataset) for name, dataset in tested().items()}
    if not drawn:
        return {"captions": captions}
    profile, dataset = profiles.current(), tested()["nocaps"]
    examples = list(dataset)
    pictures = draw(made.generator, examples, profile.steps, profile.guidance_scale)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for example, picture in zip(examples, pictures, strict=True):
        picture.save(folder / f"pictures/{example.image_id}.png")
    _, _, (clip, _) = load_models(profile)
    looks = FeatureExtractor.of(profile.inception, profile.device).look(pictures)
    likeness = clip.compare([dataset.open(example) for example in examples], [[picture] for picture in pictures])
    return {"captions": captions, "pictures": {
        "image_id": [example.image_id for example in examples],
        "clip_distance": (100 * (1 - likeness[:, 0].double())).tolist(),
        "features": looks.features.half().tolist(),
    }}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Train and test what is missing of the queue."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo.cycle_study", description=main.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/runs/cycle"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    try:
        for run in tqdm(queue(), desc="cycle study", unit="run"):
            with suppress(Timeout), FileLock(options.runs / f"{run.name}.lock", timeout=0):
                perform(run, options.runs / run.name)
    except (ValueError, FloatingPointError, registry.RegistryError) as error:
        parser.error(str(error))
    print(f"{options.runs}: {sum(1 for _ in options.runs.glob('*/result.json'))} of {len(queue())} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
