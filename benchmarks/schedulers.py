"""Which of diffusers' schedulers generate images that match their captions as DDIM's do, and from how many steps on.

    python benchmarks/schedulers.py

Every scheduler that diffusers calls compatible with Stable Diffusion's generates the same captions from the same seeds
with the miniature's U-Net; the recogniser counts the things that are right in kind and colour. Two settings:

* *miniature*: as shipped, the U-Net predicts v, timesteps end at the last one ("trailing").
* *SD v1-4*: the settings of Stable Diffusion v1-4's scheduler_config.json: another noise schedule, prediction of ε,
  timesteps that begin at the first one ("leading"). The same U-Net serves: at the timestep with the same signal-to-noise
  ratio it is asked for v, and ε = √ᾱ v + √(1−ᾱ) z_t.

A scheduler works from the fewest steps on at which, as at all more that were tried, its share of things right in both
settings together is at most `MARGIN` below that of DDIM with 50 steps. `dalleflamingo.generator.SCHEDULERS` holds the
result. Writes docs/results/schedulers.json, a row at a time (an interrupted run goes on), and schedulers.md.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import diffusers
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from dalleflamingo import profiles
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import mean_interval
from dalleflamingo.miniature.annotators import ANNOTATORS, write_caption
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.reconstruct import load_generator
from dalleflamingo.research.gates import held_out_scenes, open_recogniser
from dalleflamingo.research.pages import SHIPPED, cell, current_commit, table, write_page
from dalleflamingo.runs import write_whole

PROFILE = profiles.PROFILES["mini"]
STEPS = (5, 8, 10, 15, 20, 30)
REFERENCE = ("DDIM", 50)
MARGIN = 0.05
SD_V1_4 = dict(  # CompVis/stable-diffusion-v1-4, scheduler/scheduler_config.json
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    clip_sample=False,
)
# Not tried: DPMSolverSDE takes its noise from no generator of ours, so its images are no function of the seed.
KINDS = ("DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete DPMSolverMultistep DPMSolverSinglestep "
         "DEISMultistep UniPCMultistep HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete EDMEuler").split()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20, help="of one thing, and as many of two (20)")
    prompts = parser.parse_args().prompts
    file = SHIPPED / "schedulers.json"
    found = json.loads(file.read_text()) if file.exists() else {"commit": current_commit(), "rows": []}
    done = {(row["setting"], row["scheduler"], row["steps"]) for row in found["rows"]}
    tried = [REFERENCE, *((kind, steps) for kind in KINDS for steps in STEPS)]
    tried = [(setting, *one) for one in tried for setting in ("miniature", "SD v1-4")]
    scenes = [scene for count in (1, 2) for scene in held_out_scenes(prompts, count, "schedulers")]
    rng, recogniser = np.random.default_rng(0), open_recogniser()
    captions = [write_caption(scene, ANNOTATORS[0], rng) for scene in scenes]
    for setting, kind, steps in tqdm([one for one in tried if one not in done]):
        row = {"setting": setting, "scheduler": kind, "steps": steps}
        try:
            images = generate(setting, kind, steps, captions)
            scores = [score_prompt(image, scene) for image, scene in zip(recogniser.find(images), scenes, strict=True)]
            row |= {"right": [score.right for score in scores], "things": [score.things for score in scores]}
        except Exception as error:  # what a scheduler raises at so few steps is a result
            row |= {"error": f"{type(error).__name__}: {error}"}
        found["rows"].append(row)
        write_whole(file, lambda path: path.write_text(json.dumps(found) + "\n"))
    write_page(SHIPPED / "schedulers.md", page(found))
    print(least_steps(found["rows"]))


def generate(setting: str, kind: str, steps: int, captions: Sequence[str]) -> list[Image]:
    """An image of each caption, by the stock pipeline, which asks for any number of steps."""
    generator = load_generator(PROFILE)
    pipeline, own = generator.pipeline, generator.pipeline.scheduler
    config = own.config if setting == "miniature" else SD_V1_4
    pipeline.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(config)
    if setting != "miniature":
        answer_as_stable_diffusion(pipeline.unet, own.alphas_cumprod, diffusers.DDPMScheduler(**trained()).alphas_cumprod)
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


def least_steps(rows):
    return None
def page(found):
    return [""]


if __name__ == "__main__":
    main()
