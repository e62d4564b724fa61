"""How fast the journey image → text → image is, against the stock libraries called item by item, in one run.

    python benchmarks/engine.py --images 8 --agreement 100

Both sides make K = 10 captions of each picture and draw each caption in 20 steps of the shipped scheduler, from the
same captions and seeds; the pictures must be equal. Beside it stands what the machine's arithmetic allows. Then what is
gained by drawing equal captions once, from shared noise, with schedulers of fewer steps, and how far these keep the
order of the candidates; and the memory of a run over few and many images. The pictures whose order is compared are kept
in a run folder, so that an interrupted run goes on. Writes docs/results/engine.json and engine.md.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipForConditionalGeneration, BlipProcessor

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.decoding import Nucleus
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed, mean_interval, within_group_spearman
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import JourneySettings, image_text_image, load_models
from dalleflamingo.research.pages import SHIPPED, current_commit, table

K, STEPS, MATRIX = 10, 20, 2048
# Many steps, and what draws in fewer. DDPM throws new noise in at every step; the others have the first noise only.
QUICK = {
    ("DDPM", 50): (("DDPM", 20),),
    ("DDIM", 50): (
        ("DDIM", 20),
        ("DPMSolverMultistep", 20),
        ("DPMSolverMultistep", 15),
        ("DPMSolverMultistep", 10),
    ),
}
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures captioned and drawn by both sides (8)")
    parser.add_argument("--agreement", type=int, default=100, help="pictures whose order is compared (100)")
    parser.add_argument("--runs", type=Path, default=Path("build/runs/engine"), help="default: %(default)s")
    arguments = parser.parse_args()
    commit, profile = current_commit(), profiles.PROFILES["mini"]
    rho = agreement(profile, arguments.agreement, arguments.runs)
    found = {"commit": commit, "images": arguments.images, "threads": torch.get_num_threads()}
    found |= speed(profile, arguments.images)
    for row in found["quick"]:
        row |= rho[row["scheduler"], row["steps"]]
    found["memory"] = {images: in_a_process_of_its_own(images) for images in (100, 1000)}
    (SHIPPED / "engine.json").write_text(json.dumps(found, indent=1) + "\n")
    (SHIPPED / "engine.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def timed(work: Callable[..., Result], *arguments: object) -> tuple[Result, float]:
    began = time.perf_counter()
    return work(*arguments), time.perf_counter() - began


def speed(profile: Profile, count: int) -> dict:
    """Seconds of both sides for so many pictures, how far their drawings lie apart, and the least time possible."""
    dataset = registry.load_dataset(profile.dataset)
    images = [dataset.open(example) for example in dataset.subset(count)]
    captioner = Captioner.from_pretrained(registry.locate(profile.captioner))
    generator = Generator.from_pretrained(registry.locate(profile.generator))
    guidance = profile.guidance_scale
    seeds = [[derive_seed(0, i, k) for k in range(K)] for i in range(count)]
    flat, shared = [seed for row in seeds for seed in row], [row[0] for row in seeds for _ in row]

    def say() -> list[str]:
        return [text for row in captioner.sample(images, seeds, Nucleus(0.9)) for text in row]

    def draw(noise: list[int] = flat) -> list[Image]:
        return generator.render(captions, noise, STEPS, guidance, 32)

    captions = say()
    draw()  # both have warmed up
    _, ours_say = timed(say)
    folder = registry.locate(profile.captioner)
    stock_captioner = BlipForConditionalGeneration.from_pretrained(folder).eval(), BlipProcessor.from_pretrained(folder)
    _, stock_says = timed(stock_captions, *stock_captioner, images)
    with decoded(generator) as drawn:
        _, ours_draw = timed(draw)
    with decoded(generator) as stock:
        _, stock_draws = timed(stock_pictures, generator, captions, flat, STEPS, guidance)
    _, once = timed(draw, shared)
    return {
        "captions": {"ours": ours_say, "stock": stock_says},
        "pictures": {"ours": ours_draw, "stock": stock_draws, "shared noise": once},
        "apart": float((torch.cat(drawn) - torch.cat(stock)).abs().max()) / 2,
        "distinct": len(set(zip(captions, shared, strict=True))) / len(captions),
        "quick": list(quick(profile, captions, shared, stock_says, ours_say)),
        "rate": matrix_rate(),
        "multiply-adds": {"captions": counted(say), "pictures": counted(draw)},
    }


@contextmanager
def decoded(generator: Generator) -> Iterator[list[Tensor]]:
    """Collects the pictures that are drawn meanwhile, (B, 3, H, W) in [-1, 1], before they are rounded to 8 bits."""
    pictures: list[Tensor] = []
    hook = generator.pipeline.vae.decoder.register_forward_hook(lambda _, __, made: pictures.append(made.clamp(-1, 1)))
    try:
        yield pictures
    finally:
        hook.remove()


def matrix_rate() -> float:
    """Multiply-adds a second of a product of two large matrices, the best of twenty: as fast as this machine gets."""
    one, other = torch.randn(2, MATRIX, MATRIX)
    return MATRIX**3 / min(timed(torch.mm, one, other)[1] for _ in range(20))


def counted(work: Callable[[], object]) -> int:
    """Multiply-adds; attention by plain products, as the counter knows no others on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def quick(
    profile: Profile, captions: list[str], seeds: list[int], stock_says: float, ours_say: float
) -> Iterator[dict]:
    """A row for each scheduler: seconds end to end, and those of the stock library with the many steps it stands for.

    Yields:
        "scheduler" and "steps"; "for", the scheduler with many steps; "stock", item by item by that one; "ours".
    """
    for many, fewer in QUICK.items():
        generator = with_scheduler(profile, many[0])
        _, stock = timed(stock_pictures, generator, captions, seeds, many[1], profile.guidance_scale)
        for name, steps in (many, *fewer):
            generator = with_scheduler(profile, name)
            _, ours = timed(generator.render, captions, seeds, steps, profile.guidance_scale, 32)
            sides = {"stock": stock_says + stock, "ours": ours_say + ours}
            yield {"scheduler": name, "steps": steps, "for": list(many)} | sides


def with_scheduler(profile: Profile, name: str) -> Generator:
    return Generator.from_pretrained(registry.locate(profile.generator), scheduler=name)


def stock_captions(model: BlipForConditionalGeneration, processor: BlipProcessor, images: list[Image]) -> list[str]:
    """Every caption by a call of its own, as the model's page shows it."""
    said = []
    with torch.no_grad():
        for image in images:
            for _ in range(K):
                inputs = processor(images=image, return_tensors="pt")
                ids = model.generate(**inputs, do_sample=True, top_p=0.9, top_k=0, min_new_tokens=5, max_new_tokens=60)
                said.append(processor.decode(ids[0], skip_special_tokens=True))
    return said


def stock_pictures(
    generator: Generator, captions: list[str], seeds: list[int], steps: int, guidance: float
) -> list[Image]:
    """Every picture by a call of its own."""
    return [
        generator.pipeline(
            caption,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=steps,
            guidance_scale=guidance,
        ).images[0]
        for caption, seed in zip(captions, seeds, strict=True)
    ]


def agreement(profile: Profile, count: int, runs: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Spearman's ρ, within a picture, of CLIP's order by each scheduler with that by many steps; equal first noise."""
    pictures = registry.load_dataset(profile.dataset).subset(count)
    captioner, _, encoders = load_models(profile)
    found = {}
    for many, fewer in QUICK.items():
        orders = {
            (name, steps): image_text_image(
                pictures,
                captioner,
                with_scheduler(profile, name),
                encoders[:1],
                runs / f"{name}-{steps}",
                JourneySettings.of(profile, candidates=K, steps=steps, batch_size=32, seed=1),
            )
            for name, steps in (many, *fewer)
        }
        for which, order in orders.items():
            both = pd.DataFrame({"image_id": order.image_id, "many": orders[many]["clip"], "few": order["clip"]})
            rho = mean_interval(within_group_spearman(both, "image_id", "many", "few").dropna().to_numpy())
            found[which] = {"rho": rho.value, "low": rho.low, "high": rho.high, "n": rho.n}
    return found


def in_a_process_of_its_own(images: int) -> float:
    """Peak memory in MiB of a whole run over so many images, two candidates each, drawn in one step."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, images).result()


def peak_memory(images: int) -> float:
    profile = profiles.PROFILES["mini"]
    dataset = registry.load_dataset(profile.coco, "train").subset(images)
    settings = JourneySettings(candidates=2, steps=1, guidance_scale=1.0)
    with tempfile.TemporaryDirectory() as folder:
        image_text_image(dataset, *load_models(profile), folder, settings)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def page(found: dict) -> str:
    captions, pictures = found["captions"], found["pictures"]
    both = [captions[side] + pictures[side] for side in ("stock", "ours")]
    once = captions["ours"] + pictures["shared noise"]
    sides = [
        ("captions", captions["stock"], captions["ours"]),
        ("pictures", pictures["stock"], pictures["ours"]),
        ("end to end", *both),
        ("end to end, equal captions drawn once", both[0], once),
    ]
    rows = [[what, f"{stock:.1f} s", f"{ours:.1f} s", _times(ours, stock)] for what, stock, ours in sides]
    small, large = found["memory"].items()
    parts = [
        "# The engine, measured",
        f"Made by `python benchmarks/engine.py` at commit `{found['commit']}`, on {found['threads']} CPU threads: the "
        f"miniature's models, {found['images']} pictures, K = {K} captions each, {STEPS} steps. Both sides in one run.",
        table(["", "stock, item by item", "ours", "ratio"], rows),
        f"The pictures of both sides differ by at most {found['apart']:.1e} (of 1, before they are rounded to 8 bits). "
        f"Of the candidates {found['distinct']:.0%} are distinct captions.",
        "## What the machine allows",
        f"The same machine multiplies two matrices of {MATRIX} × {MATRIX} numbers at {found['rate'] / 1e9:.0f} · 10⁹ "
        "multiply-adds a second. At that rate our work, convolutions and attention included, would take *at least*:",
        table(["", "multiply-adds", "least time", "ours", "least ÷ ours"], _limits(found)),
        "## Fewer steps",
        "The same captions from the same first noise, equal captions drawn once. *End to end*: the stock libraries, "
        "item by item, in the many steps that the scheduler stands for, against ours. ρ: Spearman's correlation, in "
        "a picture, of CLIP's order of the candidates with the order by those many steps; mean over pictures, 95 % "
        "interval.",
        table(["scheduler", "stands for", "stock", "ours", "end to end", "ρ", "n"], map(_quick_row, found["quick"])),
        "DDPM throws new noise in at every step, so that fewer steps are other noise, and other noise alone changes "
        "most of the order ([several pictures of each caption](stability.md)). DDIM and DPM-Solver follow one path "
        "from the first noise on: in fewer steps they draw the same picture, less exactly.",
        "## Memory",
        f"Peak of a whole run, models included: over {small[0]} images {small[1]:,.0f} MiB, over {large[0]} images "
        f"{large[1]:,.0f} MiB.",
    ]
    return "\n\n".join(parts) + "\n"


def _limits(found: dict) -> list[list[str]]:
    rows = []
    for what, count in found["multiply-adds"].items():
        least, ours = count / found["rate"], found[what]["ours"]
        rows.append([what, f"{count / 1e9:,.1f} · 10⁹", f"{least:.2f} s", f"{ours:.2f} s", f"{least / ours:.0%}"])
    return rows


def _quick_row(row: dict) -> list[str]:
    many, steps = row["for"]
    return [
        f"{row['scheduler']}, {row['steps']} steps",
        f"{many}, {steps} steps",
        f"{row['stock']:.1f} s",
        f"{row['ours']:.1f} s",
        _times(row["ours"], row["stock"]),
        f"{row['rho']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        str(row["n"]),
    ]


def _times(ours: float, stock: float) -> str:
    return f"{stock / ours:.1f} ×"


if __name__ == "__main__":
    main()
