"""What the ε form of the generator changes in cycle finetuning, and what not (Eqs. 2 to 4).

python -m dalleflamingo research epsilon
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dalleflamingo import profiles
from dalleflamingo.captioner import Captioner
from dalleflamingo.commands.parsers import positive
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, TrainableParameters, build_cycle
from dalleflamingo.cycle_losses import Cycle, generator_parameters
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.research import pages
from dalleflamingo.research.cycle_arms import START, Run
from dalleflamingo.research.cycle_comparison import (
    EvaluatedRuns,
    evaluated_captions,
    evaluated_images,
    read_runs,
    real_features,
)
from dalleflamingo.research.cycle_study import development_sets, train_and_evaluate
from dalleflamingo.research.epsilon import AtTimestep, compare_timesteps, epsilon_form, pixel_differences
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.repair import DAMAGE, damage
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_cycle

COMMAND = "python -m dalleflamingo research epsilon"
FORMS = ("v", "ε")
TIMESTEPS = (*range(50, 1000, 100), 999)
COMPARED = 16  # images, with one caption each, on which both forms are compared timestep by timestep
STEPS, SCHEDULER = 10, "DPMSolverMultistep"  # how images are generated that evaluate a repaired generator
LEARNING_RATE = 1e-3  # of the repair, in both forms
LOSSES = {  # what trains, named as in Eq. 5 -> fields of `Losses`
    "(2)": {"caption": 0.0, "generation": 0.0, "caption_reconstruction": 0.0},
    "(2) to (4)": {"caption": 0.0},
    "(1) to (4)": {},
}
CORPUS = "nocaps"  # development images of it
OUTCOMES = ("cider", "f1", "spice", "clip_distance", "fid")  # those that the models are measured by, where they exist


# ── the same repair in both forms ────────────────────────────────────────────────────────────────────────────────────


def arm_of(losses: str, form: str) -> str:
    """What a run is called: by its losses and the form of (2) and (3)."""
    return f"{losses}, {form}"


def build_damaged(
    config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset, form: str
) -> tuple[Cycle, CaptionedBatches, TrainableParameters]:
    """As `cycle.build_cycle`, of damaged models, the generator in one of the `FORMS`."""
    damage(captioner, generator)
    generator = epsilon_form(generator) if form == "ε" else generator
    return build_cycle(config, captioner, generator, dataset)


def train_all(profile: Profile, folder: Path, dataset: Dataset, seeds: int, steps: int) -> None:
    """Train every arm from every seed in both forms, going on where an earlier call was, and evaluate the models.

    Args:
        profile: names models and data; says how images are generated.
        folder: gets a folder for each run.
        dataset: images that the models are evaluated on.
        seeds: how many.
        steps: of each run.
    """
    start = Run(START, profile.captioner)
    wanted: list[tuple[Run, dict, str]] = [(start, {}, "v")]
    for seed in range(seeds):
        wanted += [
            (Run(arm_of(name, form), profile.captioner, seed), losses, form)
            for name, losses in LOSSES.items()
            for form in FORMS
        ]
    for run, losses, form in tqdm(wanted, desc="repair", unit="run"):
        settings = dict(seed=run.seed, steps=steps, learning_rate=LEARNING_RATE, scheduler=SCHEDULER)
        config = CycleConfig.of(profile, losses=dict(losses), **settings)
        # (2) alone is about the captioner: its generator is not rendered
        generated = {} if losses == LOSSES["(2)"] else {CORPUS: dataset}
        build = partial(build_damaged, form=form)
        train_and_evaluate(run, config, folder / run.name, {CORPUS: dataset}, generated, profile, build)


def compare_runs(folder: Path, dataset: Dataset, profile: Profile) -> pd.DataFrame:
    """Every arm's outcome in each form, and ε minus v.

    Returns:
        a row for each set of losses and metric: columns losses, metric, what ("v", "ε", "ε − v" or "start"), and those
        of `Interval.as_row`.
    """
    captions, images = read_runs(folder)
    runs = [evaluated_captions(captions, dataset)]
    runs.append(evaluated_images(images, dataset, real_features(dataset, profile)))
    rows = []
    for evaluated in runs:
        for metric in (name for name in OUTCOMES if name in evaluated.scores):
            rows.append({"losses": "", "metric": metric, "what": START} | evaluated.value(metric, START).as_row())
            for losses in LOSSES:
                rows += _both_forms(evaluated, metric, losses)
    return pd.DataFrame(rows)


def _both_forms(runs: EvaluatedRuns, metric: str, losses: str) -> list[dict]:
    v, epsilon = (arm_of(losses, form) for form in FORMS)
    if not (runs.seeds(v) and runs.seeds(epsilon)):
        return []
    values = {"v": runs.value(metric, v), "ε": runs.value(metric, epsilon), "ε − v": runs.value(metric, epsilon, v)}
    return [{"losses": losses, "metric": metric, "what": what} | value.as_row() for what, value in values.items()]


# ── page and command ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        profile: of the models.
        pixels: of `pixel_differences`.
        timesteps: of `compare_timesteps`.
        runs: of `compare_runs`.
        training: of the repairs: seeds, steps, images that they are evaluated on.
    """

    profile: Profile
    pixels: Mapping[str, float]
    timesteps: Sequence[AtTimestep]
    runs: pd.DataFrame
    training: Mapping[str, int]


def shares(timesteps: Sequence[AtTimestep], loss: str) -> dict[str, np.ndarray]:
    """The share that each timestep has in the summed norms of a loss's gradients, in both forms.

    Args:
        timesteps: evenly spread.
        loss: "2" or "3".
    """
    norms = np.array([getattr(one, f"norm_{loss}") for one in timesteps])
    weights = {"v": np.ones(len(norms)), "ε": np.array([one.alpha for one in timesteps])}
    return {form: norms * weight / (norms * weight).sum() for form, weight in weights.items()}


def timestep_table(timesteps: Sequence[AtTimestep]) -> str:
    """Both forms at each timestep, in Markdown."""
    evenly = [one for one in timesteps if one.timestep != TIMESTEPS[-1]]
    by_loss = {loss: shares(evenly, loss) for loss in ("3", "2")}
    rows = []
    for i, one in enumerate(timesteps):
        cells = [str(one.timestep), f"{one.alpha:.2g}", f"{one.loss_v:.3f}", f"{one.loss_epsilon:.4f}"]
        errors = one.loss_ratio_error, one.original_sample, one.gradient_3, one.gradient_2, one.gradient_4
        cells += [f"{error:.0e}" for error in errors]
        for found in by_loss.values():
            cells += [f"{100 * found[form][i]:.1f}" if i < len(evenly) else "" for form in FORMS]
        rows.append(cells)
    header = ["t", "ᾱ_t", "(3), v", "(3), ε", "ratio / ᾱ_t", "ẑ_0", "∇(3) / ᾱ_t", "∇(2) / ᾱ_t", "∇(4)"]
    header += [f"share of ∇({loss}), {form}" for loss in by_loss for form in FORMS]
    return pages.table(header, rows)


def run_table(runs: pd.DataFrame) -> str:
    """What the repairs made of the models, in Markdown."""
    rows = []
    for metric, of_metric in runs.groupby("metric", sort=False):
        how = METRICS[metric]
        [start] = of_metric[of_metric["what"] == START].to_dict("records")
        for losses, part in of_metric[of_metric["what"] != START].groupby("losses", sort=False):
            found = {row["what"]: Interval.from_row(row) for row in part.to_dict("records")}
            cells = [pages.cell(value, how.digits, signed="−" in what) for what, value in found.items()]
            arrow = "↓" if how.lower_is_better else "↑"
            rows.append([f"{how.label} {arrow}", losses, pages.cell(Interval.from_row(start), how.digits), *cells])
    return pages.table(["", "trained by", "damaged", "v form", "ε form", "ε − v"], rows)


def page(found: Comparison) -> list[str]:
    """The parts of the page in Markdown."""
    evenly = [one for one in found.timesteps if one.timestep != TIMESTEPS[-1]]
    late = [i for i, one in enumerate(evenly) if one.timestep > 500]
    percent = {
        (loss, form): f"{100 * part[late].sum():.0f} %"
        for loss in ("2", "3")
        for form, part in shares(evenly, loss).items()
    }
    worst = max(max(one.original_sample, one.gradient_2, one.gradient_3, one.gradient_4) for one in evenly)
    training = found.training
    return [
        "# The same generator, predicting v or ε",
        pages.measured_on(found.profile.dataset),
        f"Made by `{COMMAND}` (profile {found.profile.name}) at commit `{pages.current_commit()}`.",
        "The paper's losses (2) and (3) are the squared error of the predicted noise ε, and Stable Diffusion v1-4 "
        "predicts ε. The miniature's generator predicts the velocity v = √ᾱ ε − √(1−ᾱ) z. Both are the same network up "
        "to a known function: ε̂ = √ᾱ v̂ + √(1−ᾱ) z_t. So the ε form is made of the shipped weights, as an ordinary "
        'pipeline whose scheduler says `prediction_type="epsilon"`, and Eqs. 2 to 4 run as the paper writes them.',
        "## What is the same, and what is not",
        f"{found.pixels['n']} images from the same captions and noise, {found.profile.steps} steps: the largest "
        f"difference of a value is {found.pixels['largest']} of 255 levels, and {100 * found.pixels['share']:.2f} % of "
        f"the values differ at all. Below, {COMPARED} images with a caption each; the five columns behind the losses "
        "are relative differences from what algebra predicts: the losses (3) have the ratio ᾱ_t, ẑ_0 and the gradient "
        "of (4) are the same, and the gradients of (3) and (2) are ᾱ_t times as large. The last columns are the share, "
        "in percent, of a timestep in the summed norms of the gradients.",
        timestep_table(found.timesteps),
        f"**What differs, and why.** The images, ẑ_0 and therefore loss (4) agree, to a relative {worst:.0e} up to "
        f"t = {evenly[-1].timestep}. The losses (2) and (3) do not, since ε − ε̂ = √ᾱ (v − v̂): the ε form is the v "
        "form with every timestep weighted by ᾱ_t. At late timesteps z_t is almost pure noise. To predict ε the U-Net "
        "can then nearly copy its input, and its error is small however wrong the image is; to predict v it must "
        "name the image, of which only the caption tells anything. These are the timesteps at which the prompt "
        "decides, and from which the captioner can learn through (2). Those after t = 500 supply "
        f"{percent['2', 'v']} of the gradient of (2) in v form and {percent['2', 'ε']} in ε form; of (3), "
        f"{percent['3', 'v']} and {percent['3', 'ε']}. Adam divides by the size of the gradients. So where (2) or (3) "
        "alone trains a model, the form changes which timesteps are heard, and not the length of a step; where (1) or "
        "(4) trains the same parameters, the weight of (2) or (3) beside them falls, too.",
        "## Does it matter? A repair in both forms",
        f"What is trained of both models, the queries of cross-attention, is multiplied by {DAMAGE:g} and then trained "
        f"for {training['steps']} steps at a learning rate of {LEARNING_RATE:g} (the first that was tried, with (2) "
        f"from seed 0), {training['seeds']} seeds, both forms from the same data and noise. Outcomes are on "
        f"{training['images']} development images of {CORPUS}, generated ones with {STEPS} steps of {SCHEDULER}. "
        "Brackets are 95 % intervals: training seeds are drawn anew, then images; differences are paired by both. FID "
        "is biased upwards with so few images, in both forms alike.",
        run_table(found.runs),
        decided(found.runs),
    ]


def decided(runs: pd.DataFrame) -> str:
    """Which differences of the forms have an interval beyond 0, in a sentence."""
    apart = runs[runs["what"] == "ε − v"]
    beyond = apart[(apart["low"] > 0) | (apart["high"] < 0)]
    named = [f"{METRICS[row.metric].label} of {row.losses}" for row in beyond.itertuples()]
    return f"The interval of the difference excludes 0 for {'; '.join(named) or 'nothing'}."


def measure(profile: Profile, folder: Path, images: int, seeds: int, steps: int) -> Comparison:
    """Compare both forms, train what is not trained yet, and compare the runs.

    Args:
        profile: with a generator that predicts v.
        folder: of the runs.
        images: development images that the repaired models are evaluated on.
        seeds: of training.
        steps: of training.
    Raises:
        ValueError: the profile has no development images, or its generator does not predict v.
    """
    dataset = development_sets(profile)[CORPUS]
    config = CycleConfig.of(profile, batch_size=COMPARED)
    device = torch.device(profile.device)
    cycle, batches, _ = load_cycle(config, device)
    twin = epsilon_form(cycle.generator)
    queries = generator_parameters(twin).values()
    trainable = cycle.trainable["captioner"], list(queries)
    every_timestep = replace(config.losses, max_timestep=1.0)
    forms = (
        Cycle(cycle.captioner, cycle.generator, cycle.bridge, *cycle.trainable.values(), every_timestep),
        Cycle(cycle.captioner, twin, cycle.bridge, *trainable, every_timestep),
    )
    batch = batches.batch(0)
    pixels = pixel_differences((cycle.generator, twin), batch.captions, profile.steps, profile.guidance_scale)
    timesteps = compare_timesteps(forms, batch, TIMESTEPS)
    chosen = dataset.subset(images)
    quick = replace(profile, steps=STEPS)
    train_all(quick, folder, chosen, seeds, steps)
    training = {"seeds": seeds, "steps": steps, "images": images}
    return Comparison(profile, pixels, timesteps, compare_runs(folder, chosen, profile), training)


def write(docs: Path, found: Comparison) -> None:
    """results/epsilon.json and epsilon.md."""
    folder = docs / "results"
    result = {
        "command": COMMAND,
        "commit": pages.current_commit(),
        "profile": found.profile.name,
        "pixels": found.pixels,
        "timesteps": [asdict(one) for one in found.timesteps],
        "training": found.training | {"learning_rate": LEARNING_RATE, "damage": DAMAGE},
        "runs": found.runs.to_dict("records"),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "epsilon.json", lambda path: path.write_text(text, encoding="utf-8"))
    pages.write_page(folder / "epsilon.md", page(found))


def main(arguments: list[str]) -> int:
    """The generator in ε form beside its v form: images, losses, gradients, and a repair by the cycle in both.

    About a quarter of an hour on one core. Every run has a folder, and a run that was interrupted goes on from its last
    checkpoint.
    """
    parser = study_parser("epsilon", main.__doc__)
    parser.add_argument("--images", type=positive, default=100, help="that evaluate the runs; default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=3, help="of training; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=120, help="of training; default: %(default)s")
    options = parse(parser, arguments)
    profile = profiles.current()
    folder = options.runs / f"epsilon-{profile.name}-{options.steps}-{options.images}"  # other settings, other runs
    found = measure(profile, folder, options.images, options.seeds, options.steps)
    write(options.docs, found)
    print(f"{options.docs}/results/epsilon.md")
    return 0
