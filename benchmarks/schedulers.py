"""Which of diffusers' schedulers generate images that match their captions as DDIM's do, and from how many steps on.

    python benchmarks/schedulers.py

Each scheduler generates the same captions from the same seeds with the miniature's U-Net; the recogniser counts the
things that are right in kind and colour. Two settings:

* *miniature*: as shipped, the U-Net predicts v, timesteps end at the last one ("trailing").
* *SD v1-4*: the settings of Stable Diffusion v1-4's scheduler_config.json: another noise schedule, prediction of ε,
  timesteps in each scheduler's own spacing. The same U-Net serves: at the timestep with the same
  signal-to-noise ratio it is asked for v, and ε = √ᾱ v + √(1−ᾱ) z_t.

Steps grow until the share of things right, in both settings together, is at most `MARGIN` below that of DDIM with 50
steps: from there on the scheduler is offered (`dalleflamingo.denoising.SCHEDULERS`). Writes schedulers.json, a row at a
time (an interrupted run goes on), and schedulers.md into docs/results.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence

import diffusers
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.evaluation.intervals import Interval, paired_bootstrap
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import parse
from dalleflamingo.research.gates import SEED
from dalleflamingo.research.image_gates import write_prompts
from dalleflamingo.research.pages import SHIPPED, cell, current_commit, measured_on, table, write_page
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_generator

PROFILE = profiles.PROFILES["mini"]
STEPS = (10, 15, 20, 30)
REFERENCE = ("DDIM", 50)
MARGIN, SETTINGS = 0.05, ("miniature", "SD v1-4")
SD_V1_4 = dict(  # CompVis/stable-diffusion-v1-4, scheduler/scheduler_config.json
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="epsilon",
    steps_offset=1,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    clip_sample=False,
)
# Those that people use with Stable Diffusion, and one made for other models. Not among them: DPMSolverSDE, which
# takes its noise from no generator of ours, so that its images are no function of the seed.
KINDS = (
    "DDIM",
    "DDPM",
    "PNDM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "EDMEuler",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="of one thing, and as many of two (20)")
    prompts = parser.parse_args().prompts
    file = SHIPPED / "schedulers.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    recogniser = Recogniser.from_pretrained(registry.locate(PROFILE.judge)).eval()
    captions = [caption for count in (1, 2) for caption in write_prompts(prompts, SEED, count)]
    wanted = list(map(parse, captions))

    def gap(kind: str, steps: int) -> Interval:
        """How much larger the share of things right is than the reference's."""
        for setting in SETTINGS:
            if not select(rows, setting, kind, steps):
                images = generate(setting, kind, steps, captions)
                scores = map(score_prompt, recogniser.find(images), wanted)
                right, things = zip(*((score.right, score.things) for score in scores), strict=True)
                row = {"setting": setting, "scheduler": kind, "steps": steps, "commit": current_commit()}
                rows.append(row | {"right": right, "things": things})
                text = json.dumps({"rows": rows}) + "\n"
                write_whole(file, lambda path, text=text: path.write_text(text))
        return difference(rows, kind, steps)

    gap(*REFERENCE)
    for kind in tqdm(KINDS):
        next((steps for steps in STEPS if gap(kind, steps).value >= -MARGIN), None)
    write_page(SHIPPED / "schedulers.md", page(rows, len(captions)))


def select(rows: Sequence[Mapping], setting: str, kind: str, steps: int) -> Mapping | None:
    """The row of a scheduler with so many steps in a setting, if it is there."""
    named = {"setting": setting, "scheduler": kind, "steps": steps}
    return next((row for row in rows if named.items() <= row.items()), None)


def difference(rows: Sequence[Mapping], kind: str, steps: int) -> Interval:
    """Share of things right minus the reference's, both settings together; paired by prompt, which is resampled."""
    own, other = (
        np.array([select(rows, setting, *one)["right"] for setting in SETTINGS]).sum(0)
        for one in ((kind, steps), REFERENCE)
    )
    things = np.array([select(rows, setting, kind, steps)["things"] for setting in SETTINGS]).sum(0)
    return paired_bootstrap(lambda i: (own[i] - other[i]).sum() / things[i].sum(), len(things))


def generate(setting: str, kind: str, steps: int, captions: Sequence[str]) -> list[Image]:
    """An image of each caption, by the stock pipeline, which asks for any number of steps."""
    generator = load_generator(PROFILE)
    pipeline, own = generator.pipeline, generator.pipeline.scheduler
    config = own.config if setting == "miniature" else SD_V1_4
    pipeline.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(config)
    if setting != "miniature":
        answer_as_stable_diffusion(
            pipeline.unet, own.alphas_cumprod, diffusers.DDPMScheduler(**trained()).alphas_cumprod
        )
    return pipeline(
        list(captions),
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(captions))],
        num_inference_steps=steps,
        guidance_scale=PROFILE.guidance_scale,
    ).images


def trained() -> dict[str, object]:
    """The noise schedule of `SD_V1_4`."""
    return {name: SD_V1_4[name] for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}


def answer_as_stable_diffusion(unet: nn.Module, own: Tensor, other: Tensor) -> None:
    """Make a U-Net that predicts v on one noise schedule predict ε on another.

    Args:
        unet: the network, changed in place.
        own: (T,) ᾱ of the schedule that it was trained on.
        other: (T,) ᾱ of the schedule on which it shall answer; within the range of `own`.
    """
    own_log, other_log = (torch.log(1 / alphas - 1).double().numpy() for alphas in (own, other))  # −log SNR, growing
    predict = unet.forward

    def forward(sample: Tensor, timestep: Tensor | float, *arguments, **options) -> tuple[Tensor]:
        noise_to_signal = np.interp(float(timestep), np.arange(len(other_log)), other_log)
        same = torch.tensor(np.interp(noise_to_signal, own_log, np.arange(len(own_log))), dtype=torch.float32)
        alpha = 1 / (1 + np.exp(noise_to_signal))
        velocity = predict(sample, same, *arguments, **options)[0]
        return (alpha**0.5 * velocity + (1 - alpha) ** 0.5 * sample,)

    unet.forward = forward


def page(rows: Sequence[Mapping], prompts: int) -> Iterable[str]:
    """docs/results/schedulers.md."""
    lines, offered = [], []
    tried = dict.fromkeys((row["scheduler"], row["steps"]) for row in rows)
    for kind, steps in sorted(tried, key=lambda one: (KINDS.index(one[0]), one[1])):
        if all(select(rows, setting, kind, steps) for setting in SETTINGS):
            gap = difference(rows, kind, steps)
            passes = gap.value >= -MARGIN and kind not in (name for name, _ in offered)
            offered += [(kind, steps)] * passes
            shares = [_share(select(rows, setting, kind, steps)) for setting in SETTINGS]
            lines.append([kind, str(steps), *shares, cell(gap, 2, signed=True), "offered from here on" * passes])
    things, commits = sum(rows[0]["things"]), ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows))
    return [
        "# Schedulers: whose images match their captions",
        measured_on(PROFILE.dataset),
        f"Made by `python benchmarks/schedulers.py`, interrupted and continued, at the commits {commits}. Brackets are "
        "95 % intervals by a paired bootstrap over prompts.",
        f"{prompts} prompts, half of one thing and half of two ({things} things), the same seeds for all, guidance "
        f"{PROFILE.guidance_scale:g}. *Right*: the share of the things that the recogniser finds with their kind and "
        "colour. *miniature*: the U-Net as shipped (v, trailing timesteps). *SD v1-4*: the same U-Net with Stable "
        "Diffusion v1-4's scheduler settings (ε, its noise schedule, each scheduler's own spacing of timesteps). "
        "*Difference*: from "
        f"{REFERENCE[0]} with {REFERENCE[1]} steps, both settings together. Steps grow until it is at least "
        f"−{MARGIN:.2f}; from there on the scheduler is offered.",
        table(["scheduler", "steps", *(f"right, {one}" for one in SETTINGS), "difference", ""], lines),
        f"Not offered: {', '.join(kind for kind in KINDS if kind not in dict(offered))}, which does not come near "
        f"within {max(STEPS)} steps, and all that were not tried.",
    ]


def _share(row: Mapping) -> str:
    return f"{sum(row['right']) / sum(row['things']):.2f}"


if __name__ == "__main__":
    main()
