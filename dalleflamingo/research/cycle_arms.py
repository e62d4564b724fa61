"""Training runs of the cycle study: arms that differ in losses, captioners and training seeds (Tables 3, 4, 5 and 9).

The models, the data and the settings that all arms share are the profile's. The paper compares a finetuned captioner
with the published one; "labels" and "labels-longer" are ours: the same finetuning without the cycle, and that with
about nine tenths of the computing that the cycle takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dalleflamingo import registry
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.profiles import Profile
from dalleflamingo.research import paper
from dalleflamingo.research.released import DEVIATIONS

SCHEDULER = "DPMSolverMultistep"  # of the images that are evaluated: as good as the profile's in half of its steps
STEPS = 450  # at least so many; a notebook trains live for fewer
# Times the steps, from labels only. By docs/results/cycle-cost.json a step of the cycle costs as much as 2.3 to 2.4 of
# these (twice its "alternating", which divides by a step of both models): this is about nine tenths of its computing.
AS_LONG = 980 / 450
START = "start"  # the two models as they are
SEEDS_OF_FIRST, SEEDS = 5, 3  # training seeds, of the profile's first captioner and of the others


@dataclass(frozen=True)
class Arm:
    """What differs from the settings of the profile.

    Attributes:
        label: what tables call it.
        losses: fields of `Losses`. schedule: of `CycleConfig`.
        steps: times the profile's.
        deviations: of the authors' released code, names of `released.DEVIATIONS` or `IN_TRAINING`.
        generates: the generator is evaluated too.
        unlabelled: (2) is of images without captions, see `unlabelled.py`.
    """

    label: str
    losses: Mapping[str, object] = field(default_factory=dict)
    schedule: str = "alternating"
    steps: float = 1.0
    deviations: frozenset[str] = frozenset()
    generates: bool = False
    unlabelled: bool = False

    def config(self, profile: Profile, captioner: str, seed: int) -> CycleConfig:
        """The configuration of a run.

        Args:
            profile: names the other models and the data.
            captioner: name in the registry.
            seed: of training.
        """
        own = {"captioner": captioner, "seed": seed, "schedule": self.schedule, "scheduler": SCHEDULER}
        config = CycleConfig.of(profile, **own, losses=dict(self.losses))
        return replace(config, steps=round(self.steps * max(STEPS, config.steps)))


_LABELS = {"image_reconstruction": 0.0, "caption_reconstruction": 0.0}
ARMS = {
    "labels": Arm("labels only: (1), (3)", _LABELS, generates=True),
    "labels-longer": Arm("labels only, 2.2 × as many steps", _LABELS, steps=AS_LONG, generates=True),
    "cycle": Arm("cycle: (1) to (4)", generates=True),
    "reconstruction": Arm("reconstruction only: (2), (4)", {"caption": 0.0, "generation": 0.0}, generates=True),
    "unlabelled": Arm("cycle, (2) on images without captions", generates=True, unlabelled=True),
    "image": Arm("labels and image reconstruction: (1) to (3)", {"caption_reconstruction": 0.0}),
    "text": Arm("labels and caption reconstruction: (1), (3), (4)", {"image_reconstruction": 0.0}),
    # One seed each, exploratory: Equation 5 as it stands, the released code's deviations, other settings.
    "joint": Arm("all four losses at every step, half as many steps", schedule="joint", steps=0.5),
    "released-map": Arm("the released kind of map", deviations=frozenset({"released-map"})),
    "ends-kept": Arm(
        "the released kind of map, [SEP] kept, no padding", deviations=frozenset({"released-map", "ends-kept"})
    ),
    "previous-sample": Arm("x̂ from the scheduler's step on clean latents", deviations=frozenset({"previous-sample"})),
    "unnormalised": Arm("x̂ without the captioner's normalisation", deviations=frozenset({"unnormalised"})),
    "released": Arm(
        "all four deviations, and no bound on timesteps", {"max_timestep": 1.0}, deviations=frozenset(DEVIATIONS)
    ),
    "all-timesteps": Arm("no bound on timesteps", {"max_timestep": 1.0}),
    "soft": Arm("soft bridge", {"mode": "soft"}),
    "gumbel": Arm("bridge that samples (Gumbel)", {"mode": "gumbel"}),
    # Of `definition_effects.training_effects`, not of the study.
    "train-mode": Arm("the captioner in train mode", deviations=frozenset({"train-mode"})),
    "sampled-latents": Arm("latents sampled", deviations=frozenset({"sampled-latents"})),
}
TABLE_3 = ("labels", "labels-longer", "cycle", "unlabelled")
TABLE_9 = ("cycle", "image", "text", "labels", "reconstruction")  # in the order of `paper.TABLE_9`
RELEASED_CODE = ("joint", "released-map", "ends-kept", "previous-sample", "unnormalised", "released")
OTHER_SETTINGS = ("all-timesteps", "soft", "gumbel")


def label_of(arm: str) -> str:
    """What tables call an arm, or the models before training."""
    return START if arm == START else ARMS[arm].label


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        arm: what its folder and the tables call it: a key of `ARMS`, `START`, or a name of its own, as of a trial.
        captioner: name in the registry. seed: of training.
        generates: the generator is evaluated too.
        key: of `ARMS`, says what kind of cycle is trained; None where the caller brings what builds the cycle.
    """

    arm: str
    captioner: str
    seed: int = 0
    generates: bool = False
    key: str | None = None

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return f"{self.captioner.rpartition('/')[2]}-{self.arm}" + f"-{self.seed}" * (self.arm != START)

    @property
    def kind(self) -> Arm:
        """The arm of `ARMS` that is trained, or that of the models before training.

        Raises:
            ValueError: the run has no key.
        """
        if self.arm == START:
            return Arm(START)
        if self.key is None:
            raise ValueError(f"the run {self.name} names no arm of ARMS: give its key, or what builds its cycle")
        return ARMS[self.key]

    def config(self, profile: Profile) -> CycleConfig:
        """The settings of its arm; those of a trial differ."""
        return self.kind.config(profile, self.captioner, self.seed)


def run_of(profile: Profile, arm: str, captioner: str, seed: int = 0) -> Run:
    """A run that evaluates the generator where the paper's Table 4 does.

    With the first captioner every arm that is compared; with another one only the cycle, because what labels alone
    teach the generator no captioner changes.

    Args:
        profile: says which captioner is the first.
        arm: a key of `ARMS` or `START`.
        captioner: name in the registry.
        seed: of training.
    """
    if captioner == profile.captioners[0]:
        generates = arm == START or ARMS[arm].generates
    else:
        generates = arm == "cycle" and f"cycle, {registry.entry_of(captioner).counterpart}" in paper.TABLE_4
    return Run(arm, captioner, seed, generates, key=None if arm == START else arm)


def queue(profile: Profile) -> dict[Run, CycleConfig]:
    """Every run with its settings; two seeds of all that is compared, then what is explored, then the other seeds.

    Args:
        profile: names the captioners; all arms are trained with the first, those of Table 3 with all.
    """
    first = profile.captioners[0]
    runs = [run_of(profile, START, captioner) for captioner in profile.captioners]
    for seed in range(SEEDS_OF_FIRST):
        for captioner in profile.captioners:
            if captioner == first:
                runs += [run_of(profile, arm, captioner, seed) for arm in dict.fromkeys(TABLE_3 + TABLE_9)]
            elif seed < SEEDS:
                runs += [run_of(profile, arm, captioner, seed) for arm in TABLE_3]
        if seed == 1:
            runs += [run_of(profile, arm, first) for arm in RELEASED_CODE + OTHER_SETTINGS]
    return {run: run.config(profile) for run in runs}


FEW, MANY, RATE = 25, 2000, 1e-3  # labelled images of the trials, and their learning rate


def trial(arm: str, images: int, losses: Mapping[str, object] = MappingProxyType({})) -> str:
    """What tables and folders call a run on development images.

    Args:
        arm: a key of `ARMS`.
        images: labelled ones.
        losses: fields of `Losses` that differ.
    """
    return ", ".join([arm, f"{images} images", *(f"{name} {value}" for name, value in losses.items())])


def trials(profile: Profile) -> dict[Run, CycleConfig]:
    """The runs by which the miniature's settings were chosen, on development images, from one seed.

    Labels only with many labels is the positive control: it shows how much there is to learn beyond the start.

    Args:
        profile: names the models.
    """
    first = profile.captioners[0]
    start = Run(START, first, generates=True)
    found = {start: start.config(profile)}
    wanted = [(arm, images, {}) for images in (MANY, FEW, 100) for arm in ("labels", "cycle")]
    wanted += [("unlabelled", FEW, losses) for losses in ({}, {"mode": "soft"})]
    wanted += [("cycle", FEW, {"mode": "soft"}), ("cycle", FEW, {"max_timestep": 0.9})]
    wanted += [("cycle", FEW, {"image_reconstruction": 5.0})]
    for arm, images, losses in wanted:
        config = ARMS[arm].config(profile, first, 0)
        config = replace(config, images=images, learning_rate=RATE, losses=replace(config.losses, **losses))
        found[Run(trial(arm, images, losses), first, generates=True, key=arm)] = config
    return found
