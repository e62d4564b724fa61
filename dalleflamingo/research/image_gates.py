"""What the miniature's generators draw, what its autoencoder loses, and what its recogniser finds: gates of images.

Captions of prompts are by random annotators who leave out nothing, so that an image shows all things or is wrong.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo.evaluation.intervals import Interval, mean_interval, paired_bootstrap, proportion
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.annotators import ANNOTATORS, precise, write_caption
from dalleflamingo.miniature.image_score import ImageScore, score_in_place, score_prompt, total
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import Scene, parse
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import fresh
from dalleflamingo.runs import derive_seed

COUNTS = {1: "one-thing", 2: "two-thing", 3: "three-thing"}  # things in a prompt


def recogniser_figures(recogniser: Recogniser, n: int, seed: int) -> dict[str, Interval]:
    """Things right, things invented, and empty grounds.

    Args:
        recogniser: that is measured.
        n: scenes.
        seed: of the scenes.
    """
    scenes = fresh.scenes(n, seed)
    score = total(map(score_in_place, recogniser.find(fresh.draw_all(scenes)), scenes))
    empty = fresh.draw_all([Scene(scene.ground, ()) for scene in scenes[:100]])
    silent = sum(not found.things for found in recogniser.find(empty))
    return {
        "things right (kind and colour, in place)": proportion(score.right, score.things),
        "found things that are there": proportion(score.matched, score.found),
        "empty grounds where it says nothing": proportion(silent, len(empty)),
    }


@torch.no_grad()
def vae_figures(vae: AutoencoderKL, recogniser: Recogniser, n: int, seed: int) -> dict[str, Interval]:
    """What encoding and decoding costs the recogniser, and PSNR.

    Args:
        vae: that is measured.
        recogniser: that finds things in the originals and the reconstructions.
        n: scenes.
        seed: of the scenes.
    """
    scenes = fresh.scenes(n, seed)
    originals = fresh.draw_all(scenes)
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
        "PSNR of reconstructions (dB)": mean_interval((10 * torch.log10(4 / squared)).tolist()),
    }


def _accuracy_change(before: list[ImageScore], after: list[ImageScore]) -> Interval:
    """Change of the share of things that are right, paired by image."""
    things = np.array([score.things for score in before])
    change = np.array([late.right - early.right for early, late in zip(before, after, strict=True)])
    return paired_bootstrap(lambda rows: change[rows].sum() / things[rows].sum(), len(things))


def generator_figures(
    generator: Generator, recogniser: Recogniser, prompts: int, settings: JourneySettings
) -> dict[str, Interval]:
    """Prompts of one, two and three things; things count wherever they are in the image.

    Args:
        generator: that is measured.
        recogniser: that finds things in its images.
        prompts: of each number of things.
        settings: how images are generated; its seed is that of scenes, words and noise.
    """
    figures = {}
    for count, label in COUNTS.items():
        captions = write_prompts(prompts, settings.seed, count)
        seeds = [derive_seed(settings.seed, "noise", count, i) for i in range(prompts)]
        with tqdm(total=prompts, desc=f"{label} prompts", mininterval=5) as bar:
            how = settings.steps, settings.guidance_scale, settings.batch_size
            images = generator.render(captions, seeds, *how, progress=bar.update)
        score = total(map(score_prompt, recogniser.find(images), map(parse, captions)))
        figures[f"{label} prompts: kind and colour right"] = proportion(score.right, score.things)
        figures[f"{label} prompts: ground right"] = proportion(score.grounds_right, score.grounds)
        if count > 1:
            figures[f"{label} prompts: relation right where both are found"] = _share_or_any(
                score.relations_right, score.relations
            )
    return figures


def write_prompts(n: int, seed: int, count: int) -> list[str]:
    """Captions that name all things, colours, a relation and the ground, each in the words of a random annotator.

    Args:
        n: captions.
        seed: of scenes and words.
        count: things in each scene.
    """
    captions = []
    for i, scene in enumerate(fresh.scenes(n, seed, "prompt", count)):
        rng = fresh.generator_of(seed, f"words, {count}", i)
        captions.append(write_caption(scene, precise(ANNOTATORS[rng.integers(len(ANNOTATORS))]), rng))
    return captions


def _share_or_any(k: int, n: int) -> Interval:
    """k / n; where n is 0 the share may be anything."""
    return proportion(k, n) if n else Interval(0.0, 0.0, 1.0, 0, None)
