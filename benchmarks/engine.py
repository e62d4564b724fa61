"""How fast the journey image → text → image is, against the stock libraries called item by item and in batches.

    python benchmarks/engine.py --images 8 --repeats 3 --agreement 100

All sides make K = 10 captions of each image and generate an image of each caption in 20 steps of the shipped scheduler,
from the same captions and seeds; the images must be equal. The sides alternate in each repeat, with one thread and with
two. Beside it stands where the time goes, and what the machine's arithmetic allows. Then what is gained by rendering
equal captions once, from shared noise, with schedulers of fewer steps, and how far these keep the order of the
candidates; and the memory of a run over few and many images. The images whose order is compared are kept in a run
folder, so that an interrupted run goes on. Writes docs/results/engine.json and engine.md.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor, profiler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipForConditionalGeneration, BlipProcessor

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.decoding import Nucleus
from dalleflamingo.evaluation.intervals import mean_interval, within_group_spearman
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.scene_graph import Scene, f1
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import JourneySettings, image_text_image
from dalleflamingo.research.pages import SHIPPED, current_commit, table
from dalleflamingo.runs import derive_seed, write_whole
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_models

K, STEPS, MATRIX = 10, 20, 2048
SAMPLING = dict(do_sample=True, top_p=0.9, top_k=0, min_new_tokens=5, max_new_tokens=60)
BATCHES = (8, 16, 25, 32)  # of the stock pipeline; the fastest is the baseline
# Operations of torch by what they compute; what is in none of these groups is the last row, Python included.
GROUPS = {
    "convolutions": ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward"),
    "linear layers and other products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax"),
    "normalization": ("aten::native_group_norm", "aten::native_layer_norm"),
    "activations, sums and products of elements": (
        *("aten::silu", "aten::gelu", "aten::add", "aten::add_", "aten::mul", "aten::div", "aten::sub"),
    ),
    "copies": ("aten::copy_", "aten::cat", "aten::upsample_nearest2d", "aten::index"),
}
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
    parser.add_argument("--repeats", type=int, default=3, help="times that each side is measured (3)")
    parser.add_argument("--agreement", type=int, default=100, help="pictures whose order is compared (100)")
    parser.add_argument("--runs", type=Path, default=Path("build/runs/engine"), help="default: %(default)s")
    arguments = parser.parse_args()
    commit, profile = current_commit(), profiles.PROFILES["mini"]
    rho = agreement(profile, arguments.agreement, arguments.runs)
    found = {"commit": commit, "images": arguments.images, "repeats": arguments.repeats}
    found |= speed(profile, arguments.images, arguments.repeats)
    for row in found["quick"]:
        row |= rho[row["scheduler"], row["steps"]]
    found["bfloat16"] = half_precision(profile, max(100, arguments.agreement), arguments.runs)
    found["memory"] = {images: in_a_process_of_its_own(images) for images in (100, 1000)}
    for name, text in {"engine.json": json.dumps(found, indent=1) + "\n", "engine.md": page(found)}.items():
        write_whole(SHIPPED / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(page(found))


def timed(work: Callable[..., Result], *arguments: object) -> tuple[Result, float]:
    began = time.perf_counter()
    return work(*arguments), time.perf_counter() - began


def speed(profile: Profile, count: int, repeats: int) -> dict:
    """Seconds of all sides for so many images, how far the generated images lie apart, and where the time goes."""
    dataset = registered.load_dataset(profile.dataset)
    images = [dataset.open(example) for example in dataset.subset(count)]
    captioner = Captioner.from_pretrained(registry.locate(profile.captioner))
    generator = Generator.from_pretrained(registry.locate(profile.generator))
    half = Generator.from_pretrained(registry.locate(profile.generator), dtype=torch.bfloat16)
    stock = captioner.model, captioner.processor  # the stock classes, as they were opened
    seeds = [[derive_seed(0, i, k) for k in range(K)] for i in range(count)]
    flat, shared = [seed for row in seeds for seed in row], [row[0] for row in seeds for _ in row]
    captions = [text for row in captioner.sample(images, seeds, Nucleus(0.9)) for text in row]
    how = STEPS, profile.guidance_scale

    def draw(noise: list[int] = flat) -> list[Image]:
        return generator.render(captions, noise, *how, 32)

    def stock_draws(batch: int) -> list[Image]:
        return stock_images(generator, captions, flat, *how, batch)

    sides = {
        "captions": {
            "ours": lambda: captioner.sample(images, seeds, Nucleus(0.9)),
            "item by item": lambda: stock_captions(*stock, images),
            "one batch": lambda: stock_captions_in_a_batch(*stock, images),
        },
        "images": {
            "ours": draw,
            "ours, equal captions once": lambda: draw(shared),
            "ours, in bfloat16": lambda: half.render(captions, flat, *how, 32),
            **{f"batches of {size}": partial(stock_draws, size) for size in BATCHES},
            "item by item": lambda: stock_draws(1),
        },
    }
    seconds = {threads: alternate(sides, threads, repeats) for threads in (1, 2)}
    torch.set_num_threads(1)
    with decoded(generator) as ours:
        draw()
    with decoded(generator) as others:
        stock_draws(32)
    return {
        "seconds": seconds,
        "apart": float((torch.cat(ours) - torch.cat(others)).abs().max()) / 2,
        "distinct": len(set(zip(captions, shared, strict=True))) / len(captions),
        "shares": {side: shares(sides["images"][side]) for side in ("ours", "batches of 32")},
        "rate": matrix_rate(),
        "convolution": {layout: convolution_rate(layout) for layout in ("contiguous_format", "channels_last")},
        "multiply-adds": {"stock": counted(lambda: stock_draws(32)), "ours": counted(draw)},
        "quick": list(quick(profile, captions, shared)),
    }


def alternate(
    sides: dict[str, dict[str, Callable[[], object]]], threads: int, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """What -> side -> seconds of each repeat with so many threads; item by item once, as it takes so long."""
    torch.set_num_threads(threads)
    found = {what: {side: [] for side in own} for what, own in sides.items()}
    for own in sides.values():
        own["ours"]()  # the first call also sets things up
    for repeat in range(repeats):
        for what, own in sides.items():
            for side, work in own.items():
                if side != "item by item" or not repeat:
                    found[what][side].append(timed(work)[1])
    return found


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Group of operations -> its seconds, with one thread; "rest" is what no operation of a group takes."""
    began = time.perf_counter()
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as record:
        work()
    whole = time.perf_counter() - began
    own = {event.key: event.self_cpu_time_total / 1e6 for event in record.key_averages()}
    found = {group: sum(own.get(name, 0.0) for name in names) for group, names in GROUPS.items()}
    return found | {"rest": whole - sum(found.values())}


def convolution_rate(layout: str) -> float:
    """Multiply-adds a second of the U-Net's commonest convolution at full size, alone, with one thread."""
    layout = getattr(torch, layout)
    latents = torch.randn(64, 64, 16, 16).to(memory_format=layout)
    kernel = torch.randn(64, 64, 3, 3).to(memory_format=layout)
    best = min(timed(partial(torch.conv2d, padding=1), latents, kernel)[1] for _ in range(20))
    return 64 * 64 * 64 * 9 * 256 / best


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


def quick(profile: Profile, captions: list[str], seeds: list[int]) -> Iterator[dict]:
    """A row for each scheduler: seconds of generating, and those of the stock pipeline with the many steps.

    Yields:
        "scheduler" and "steps"; "for", the scheduler with many steps; "stock", in batches of 32 by that one; "ours".
    """
    for many, fewer in QUICK.items():
        generator = with_scheduler(profile, many[0])
        _, stock = timed(stock_images, generator, captions, seeds, many[1], profile.guidance_scale, 32)
        for name, steps in (many, *fewer):
            generator = with_scheduler(profile, name)
            _, ours = timed(generator.render, captions, seeds, steps, profile.guidance_scale, 32)
            yield {"scheduler": name, "steps": steps, "for": list(many), "stock": stock, "ours": ours}


def with_scheduler(profile: Profile, name: str) -> Generator:
    return Generator.from_pretrained(registry.locate(profile.generator), scheduler=name)


def stock_captions(model: BlipForConditionalGeneration, processor: BlipProcessor, images: list[Image]) -> list[str]:
    """Every caption by a call of its own, as the model's page shows it."""
    said = []
    with torch.no_grad():
        for image in images:
            for _ in range(K):
                inputs = processor(images=image, return_tensors="pt")
                ids = model.generate(**inputs, **SAMPLING)
                said.append(processor.decode(ids[0], skip_special_tokens=True))
    return said


def stock_captions_in_a_batch(
    model: BlipForConditionalGeneration, processor: BlipProcessor, images: list[Image]
) -> list[str]:
    """K captions of every image by one call."""
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, **SAMPLING, num_return_sequences=K)
    return processor.batch_decode(ids, skip_special_tokens=True)


def stock_images(
    generator: Generator, captions: list[str], seeds: list[int], steps: int, guidance: float, batch: int
) -> list[Image]:
    """Every image by the stock pipeline, so many by a call."""
    images = []
    for start in range(0, len(captions), batch):
        part = slice(start, start + batch)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        how = {"num_inference_steps": steps, "guidance_scale": guidance}
        images += generator.pipeline(captions[part], generator=noise, **how).images
    return images


def agreement(profile: Profile, count: int, runs: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Spearman's ρ, within a picture, of CLIP's order by each scheduler with that by many steps; equal first noise."""
    pictures = registered.load_dataset(profile.dataset).subset(count)
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


def half_precision(profile: Profile, count: int, runs: Path) -> dict:
    """What CLIP chooses among the same candidates when their images are generated in bfloat16 instead of float32."""
    pictures = registered.load_dataset(profile.dataset).subset(count)
    captioner, _, encoders = load_models(profile)
    settings = JourneySettings.of(profile, candidates=5, batch_size=32, seed=2)
    tables = [
        image_text_image(
            pictures,
            captioner,
            Generator.from_pretrained(registry.locate(profile.generator), dtype=dtype),
            encoders[:1],
            runs / str(dtype).removeprefix("torch."),
            settings,
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    both = tables[0][["image_id", "caption"]].assign(single=tables[0]["clip"], half=tables[1]["clip"])
    scenes = {example.image_id: Scene.from_dict(example.extra["scene"]) for example in pictures}
    both["f1"] = [f1(caption, scenes[image]) for image, caption in zip(both.image_id, both.caption, strict=True)]
    chosen = {side: both.loc[both.groupby("image_id")[side].idxmax()] for side in ("single", "half")}
    rho = mean_interval(within_group_spearman(both, "image_id", "single", "half").dropna().to_numpy())
    change = mean_interval(chosen["half"].f1.to_numpy() - chosen["single"].f1.to_numpy())
    return {
        "images": count,
        "candidates": settings.candidates,
        "changed": int((chosen["half"].caption.to_numpy() != chosen["single"].caption.to_numpy()).sum()),
        "f1": {"value": change.value, "low": change.low, "high": change.high},
        "rho": {"value": rho.value, "low": rho.low, "high": rho.high},
    }


def in_a_process_of_its_own(images: int) -> float:
    """Peak memory in MiB of a whole run over so many images, two candidates each, drawn in one step."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, images).result()


def peak_memory(images: int) -> float:
    profile = profiles.PROFILES["mini"]
    dataset = registered.load_dataset(profile.coco, "train").subset(images)
    settings = JourneySettings(candidates=2, steps=1, guidance_scale=1.0)
    with tempfile.TemporaryDirectory() as folder:
        image_text_image(dataset, *load_models(profile), folder, settings)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def page(found: dict) -> str:
    small, large = found["memory"].items()
    machine = [["product of two matrices", found["rate"]], *found["convolution"].items()]
    work, half = found["multiply-adds"], found["bfloat16"]
    parts = [
        "# The engine, measured",
        f"Made by `python benchmarks/engine.py` at commit `{found['commit']}`: the miniature's models, "
        f"{found['images']} images, K = {K} captions each, {STEPS} steps. All sides in one run, taking turns; "
        "median (fastest … slowest) "
        f"of {found['repeats']}, item by item once. *Ratio*: that side ÷ ours. Equal captions are computed as often as "
        "they occur, but in the row that says otherwise.",
        table(["", "threads", "side", "seconds", "ratio"], _side_rows(found["seconds"])),
        f"The images of ours and of the stock pipeline differ by at most {found['apart']:.1e} (of 1, before they are "
        f"rounded to 8 bits). Of the candidates {found['distinct']:.0%} are distinct captions.",
        "With two threads the stock pipeline's wait for each other after every operation, while ours work on different "
        "images. On a busy machine the ratio therefore grows.",
        "## Where the time goes",
        "Generating the images, one thread, by torch's profiler.",
        table(["", "stock, batches of 32", "ours"], _share_rows(found["shares"])),
        f"Ours has {work['ours'] / work['stock']:.0%} of the multiply-adds of the stock pipeline "
        f"({work['ours'] / 1e9:,.0f} and {work['stock'] / 1e9:,.0f} · 10⁹): the text's keys and values are the same "
        "in all steps. One thread of the machine computes, at best:",
        table(["", "10⁹ multiply-adds a second"], [[name, f"{rate / 1e9:.0f}"] for name, rate in machine]),
        f"At the first of these rates the images take at least {work['stock'] / found['rate']:.1f} s by the stock "
        f"pipeline and {work['ours'] / found['rate']:.1f} s by ours. (Matrices of {MATRIX} × {MATRIX}; the convolution "
        "is 64 → 64 channels at 16 × 16, 64 latents, in two layouts.)",
        "## bfloat16",
        "The generator opened with `dtype=torch.bfloat16` generates slightly other images. "
        f"Over {half['images']} images with {half['candidates']} candidates each, CLIP then chooses another candidate "
        f"for {half['changed']} of them. The scene-graph F1 of the chosen captions changes by {_interval(half['f1'])}; "
        f"ρ of the two orders in an image is {_interval(half['rho'])} (means over images, 95 % intervals).",
        "## Fewer steps",
        "The same captions from the same first noise, equal captions rendered once by ours. Stock: in batches of 32, "
        "in the many steps that the scheduler stands for. One thread. ρ: Spearman's correlation, in an image, of "
        "CLIP's order of the candidates with the order by those many steps; mean over images, 95 % interval.",
        table(["scheduler", "stands for", "stock", "ours", "ratio", "ρ", "n"], map(_quick_row, found["quick"])),
        "DDPM throws new noise in at every step, so that fewer steps are other noise, and other noise alone changes "
        "most of the order ([several pictures of each caption](stability.md)). DDIM and DPM-Solver follow one path "
        "from the first noise on: in fewer steps they generate the same image, less exactly.",
        "## Memory",
        f"Peak of a whole run, models included: over {small[0]} images {small[1]:,.0f} MiB, over {large[0]} images "
        f"{large[1]:,.0f} MiB.",
    ]
    return "\n\n".join(parts) + "\n"


def _side_rows(seconds: dict) -> Iterator[list[str]]:
    for threads, works in seconds.items():
        for what, sides in works.items():
            ours = statistics.median(sides["ours"])
            for side, times in sides.items():
                spread = f" ({min(times):.2f} … {max(times):.2f})" if len(times) > 1 else ""
                ratio = "" if side.startswith("ours") else f"{statistics.median(times) / ours:.2f} ×"
                yield [what, str(threads), side, f"{statistics.median(times):.2f}{spread}", ratio]


def _share_rows(found: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    ours, stock = found["ours"], found["batches of 32"]
    for group in ours:
        yield [group, *(f"{side[group]:.1f} s ({side[group] / sum(side.values()):.0%})" for side in (stock, ours))]


def _quick_row(row: dict) -> list[str]:
    many, steps = row["for"]
    return [
        f"{row['scheduler']}, {row['steps']} steps",
        f"{many}, {steps} steps",
        f"{row['stock']:.1f} s",
        f"{row['ours']:.1f} s",
        _times(row["ours"], row["stock"]),
        _interval(row | {"value": row["rho"]}),
        str(row["n"]),
    ]


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _times(ours: float, stock: float) -> str:
    return f"{stock / ours:.1f} ×"


if __name__ == "__main__":
    main()
