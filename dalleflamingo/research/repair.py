"""Repair: what one loss alone teaches a damaged model through an intact one (§4, Eqs. 1 to 4).

What cycle finetuning trains of a model, the queries of its cross-attention, is scaled to 2 %. A captioner then writes
without looking, and a generator without listening. The other model stays as it is. One of the three losses that reach
the damaged model trains it again:

    captioner   (1) human captions of images     (2) the image that its words explain      (4) human captions of x̂
    generator   (3) images with human captions   (4) the caption that is read in its x̂     (2) images with captions by
                                                                                               the captioner

(2) for the captioner and (4) for the generator are the way back alone: the damaged model gets no target of its own
kind, no caption to write and no image to draw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from dalleflamingo import registry, runs
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, TrainableParameters, build_cycle, train_cycle
from dalleflamingo.cycle_losses import LOSS_NAMES, Cycle, captioner_parameters, generator_parameters
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.accelerators import make_accelerator
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import Scene, f1, parse, told_facts
from dalleflamingo.profiles import Profile
from dalleflamingo.research import fresh
from dalleflamingo.research.image_gates import write_prompts
from dalleflamingo.research.ranking import ALL
from dalleflamingo.research.released import build_released_cycle
from dalleflamingo.sources.models import load_cycle

SEED = 20  # of the development scenes, as in gates
STEPS, SCHEDULER = 10, "DPMSolverMultistep"  # how images are generated: nearly as in 20 steps of DDPM, in half the time
CAPTIONER, GENERATOR = PATIENTS = ("captioner", "generator")
DAMAGE = 0.02  # what the queries are multiplied by: they attend to nothing in particular any more
EXAMPLES = 3  # images whose captions, or prompts whose images, are kept at every check-up
SORTS = ("kind", "colour", "relation", "ground")  # of facts that a model may learn or not
_COLUMNS = ["item", "sort", "told", "facts", "caption"]
_BATCH = 25


@dataclass(frozen=True)
class Arm:
    """One loss that trains one damaged model.

    Attributes:
        patient: the damaged model, one of `PATIENTS`.
        loss: its number in Eq. 5.
        label: what tables and figures call it.
        losses: fields of `Losses` beside the weights.
        deviations: of the authors' released code, names of `released.DEVIATIONS`.
    """

    patient: str
    loss: int
    label: str
    losses: Mapping[str, object] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return "-".join([self.patient, str(self.loss), *self.deviations])

    def config(self, profile: Profile, **changes: object) -> CycleConfig:
        """The configuration of a run; fields of `CycleConfig` in `changes`."""
        weights = {name: float(number == self.loss) for number, name in enumerate(LOSS_NAMES, start=1)}
        settings = SETTINGS | {"learning_rate": LEARNING_RATES[self.patient]} | changes
        return CycleConfig.of(profile, **settings, losses=weights | dict(self.losses))


# chosen on development scenes; 2,000 labelled images, so that no loss lacks material
SETTINGS = {"images": 2000, "batch_size": 16, "schedule": "joint", "scheduler": SCHEDULER}
LEARNING_RATES = {CAPTIONER: 1e-3, GENERATOR: 6e-3}
ARMS = tuple(
    Arm(*settings)
    for settings in (
        (CAPTIONER, 1, "(1): human captions"),
        (CAPTIONER, 2, "(2): image reconstruction alone", {"mode": "soft", "image_updates": CAPTIONER}),
        (CAPTIONER, 4, "(4): captions of x̂", {"caption_updates": CAPTIONER}),
        (GENERATOR, 3, "(3): real images"),
        (GENERATOR, 4, "(4): caption reconstruction alone", {"caption_updates": GENERATOR, "max_timestep": 0.9}),
        (GENERATOR, 2, "(2): real images, the captioner's words", {"mode": "soft", "image_updates": GENERATOR}),
    )
)

_BY_NAME = {arm.name: arm for arm in ARMS}
# The released code's deviations, where the loss that they change repairs alone. Without the normalisation a captioner
# would learn to read another range of pixels than its check-up has, so there the generator learns.
DEVIATING = tuple(
    replace(_BY_NAME[name], label=label, deviations=deviations)
    for name, label, deviations in (
        ("captioner-2", "(2), the released kind of map", ("released-map",)),
        ("captioner-2", "(2), the released kind of map, [SEP] kept", ("released-map", "ends-kept")),
        ("captioner-4", "(4), x̂ from the scheduler's step on clean latents", ("previous-sample",)),
        ("generator-4", "(4), x̂ from the scheduler's step on clean latents", ("previous-sample",)),
        ("generator-4", "(4), x̂ without the captioner's normalisation", ("unnormalised",)),
    )
)


@dataclass(frozen=True)
class Sizes:
    """Of the check-ups.

    Attributes:
        images: that a captioner describes.
        prompts: that a generator renders, half of one thing and half of two.
    """

    images: int = 100
    prompts: int = 48


def damage(
    captioner: Captioner, generator: Generator, patients: Sequence[str] = PATIENTS, factor: float = DAMAGE
) -> None:
    """Multiply the queries of cross-attention, so that there is something to learn again.

    Args:
        captioner: one model.
        generator: the other.
        patients: which of the two, of `PATIENTS`.
        factor: of the queries; 1 leaves them intact.
    """
    chosen = {}
    if CAPTIONER in patients:
        chosen |= captioner_parameters(captioner)
    if GENERATOR in patients:
        chosen |= generator_parameters(generator)
    for parameter in chosen.values():
        parameter.data.mul_(factor)


@dataclass(frozen=True)
class CaptionerCheckup:
    """What a captioner writes of development images, by beam search.

    Attributes:
        captioner: the model.
        scenes: what the images show.
    """

    captioner: Captioner
    scenes: Sequence[Scene]
    _images: list[Image.Image] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_images", fresh.draw_all(self.scenes))

    def __call__(self, folder: Path) -> pd.DataFrame:
        """A row for each image and sort of fact: item, sort, told, facts, caption; "all": F1, of 1.

        Args:
            folder: gets nothing.
        """
        captions = [
            caption
            for start in range(0, len(self._images), _BATCH)
            for caption in self.captioner.describe(self._images[start : start + _BATCH])
        ]
        rows = []
        for item, (caption, scene) in enumerate(zip(captions, self.scenes, strict=True)):
            told = {ALL: (f1(caption, scene), 1)} | told_facts(caption, scene)
            rows += [(item, sort, *told[sort], caption) for sort in (ALL, *SORTS)]
        return pd.DataFrame(rows, columns=_COLUMNS)


@dataclass(frozen=True)
class GeneratorCheckup:
    """What a generator draws of development captions.

    Attributes:
        generator: the model.
        recogniser: finds things in its images.
        captions: that name all things with their colours, a relation and the ground.
        steps, guidance_scale: of rendering.
    """

    generator: Generator
    recogniser: Recogniser
    captions: Sequence[str]
    steps: int
    guidance_scale: float

    def __call__(self, folder: Path) -> pd.DataFrame:
        """A row for each caption and sort of fact: item, sort, told, facts, caption; "all": things right in kind and
        colour. The colour of a thing is a fact where its kind is right, a relation where both things are.

        Args:
            folder: gets the first `EXAMPLES` images.
        """
        images = self.generator.render(
            self.captions, range(len(self.captions)), self.steps, self.guidance_scale, _BATCH
        )
        folder.mkdir(parents=True, exist_ok=True)
        for item, image in enumerate(images[:EXAMPLES]):
            image.save(folder / f"{item}.png")
        rows = []
        for item, (found, caption) in enumerate(zip(self.recogniser.find(images), self.captions, strict=True)):
            score = score_prompt(found, parse(caption))
            told = {
                ALL: (score.right, score.things),
                "kind": (score.kind_right, score.things),
                "colour": (score.right, score.kind_right),
                "relation": (score.relations_right, score.relations),
                "ground": (score.grounds_right, score.grounds),
            }
            rows += [(item, sort, *pair, caption) for sort, pair in told.items()]
        return pd.DataFrame(rows, columns=_COLUMNS)


def repair(arm: Arm, config: CycleConfig, sizes: Sizes, profile: Profile, run_folder: Path) -> pd.DataFrame:
    """Damage a model, train it by one loss, and check it before, on the way and afterwards.

    A run that was interrupted goes on when it is called again with the same folder.

    Args:
        arm: the damaged model and its loss.
        config: of `arm.config`; every `validate_every` steps is a check-up.
        sizes: of the check-ups.
        profile: of the miniature; names the recogniser, says how images are generated.
        run_folder: of the training; gets the check-ups, and `EXAMPLES` images of each where the generator is damaged.
    Returns:
        the check-ups' rows with their step, 0 for the damaged model before training.
    """
    build = partial(_build_damaged, arm=arm)
    cycle, batches, trainable = load_cycle(config, torch.device(profile.device), build)
    checkup = checkup_of(arm.patient, cycle.captioner, cycle.generator, sizes, profile)

    def check(step: int) -> dict[str, float]:
        table = checkup(run_folder / "images" / f"{step:04d}")
        path = run_folder / "checkups" / f"{step:04d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_whole(path, table.to_parquet)
        overall = table[table["sort"] == ALL]
        return {"checkup": float(overall["told"].sum() / overall["facts"].sum())}

    if not (run_folder / "checkups" / "0000.parquet").exists():
        check(0)
    train_cycle(config, cycle, batches, trainable, run_folder, make_accelerator(config), check)
    parts = {int(path.stem): pd.read_parquet(path) for path in sorted((run_folder / "checkups").glob("*.parquet"))}
    return pd.concat([part.assign(step=step) for step, part in parts.items()], ignore_index=True)


def checkup_of(
    patient: str, captioner: Captioner, generator: Generator, sizes: Sizes, profile: Profile
) -> CaptionerCheckup | GeneratorCheckup:
    """The check-up of one of the two models, on development scenes.

    Args:
        patient: which, one of `PATIENTS`.
        captioner: one model.
        generator: the other.
        sizes: of the check-up.
        profile: names the recogniser, says how images are generated.
    """
    if patient == CAPTIONER:
        return CaptionerCheckup(captioner, fresh.scenes_of(fresh.nocaps(sizes.images, SEED)))
    recogniser = Recogniser.from_pretrained(registry.locate(profile.judge)).eval()
    counts = (sizes.prompts - sizes.prompts // 2, sizes.prompts // 2)  # of one thing, and of two
    captions = [text for things, n in enumerate(counts, start=1) for text in write_prompts(n, SEED, things)]
    return GeneratorCheckup(generator, recogniser, captions, STEPS, profile.guidance_scale)


def _build_damaged(
    config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset, arm: Arm
) -> tuple[Cycle, CaptionedBatches, TrainableParameters]:
    damage(captioner, generator, [arm.patient])
    if arm.deviations:
        return build_released_cycle(config, captioner, generator, dataset, arm.deviations)
    return build_cycle(config, captioner, generator, dataset)
