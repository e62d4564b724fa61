"""How fast the journey image → text → image is, against the stock libraries called item by item, in one run.

    python benchmarks/engine.py --images 8

Both sides make K = 10 captions of each picture and draw each caption in 20 steps of the shipped scheduler, from the
same captions and seeds; the pictures must be equal. Then what is gained by drawing equal captions once, from shared
noise, and by schedulers of fewer steps, beside how far these keep the order of the candidates; and the memory of a
run over few and many images. Writes docs/results/engine.json and engine.md.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner, Nucleus
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import Interval, derive_seed, mean_interval, within_group_spearman
from dalleflamingo.reconstruct import image_text_image, load_models
from dalleflamingo.results import SHIPPED, current_commit, table
from dalleflamingo.similarity import ClipImage

K, STEPS = 10, 20
QUICK = (("DDPM", 50), ("DDPM", 20), ("DDIM", 20), ("DPMSolverMultistep", 10), ("DPMSolverMultistep", 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures captioned and drawn by both sides (8)")
    parser.add_argument("--agreement", type=int, default=20, help="pictures whose order is compared (20)")
    arguments = parser.parse_args()
    commit = current_commit()
    profile = profiles.PROFILES["mini"]
    dataset = registry.dataset(profile.dataset)
    captioner = Captioner.from_pretrained(registry.locate(profile.captioner))
    generator = Generator.from_pretrained(registry.locate(profile.generator))
    images = [dataset.open(example) for example in dataset.subset(arguments.images)]
    seeds = [[derive_seed(0, i, k) for k in range(K)] for i in range(len(images))]
    for _ in range(2):  # the first round warms up
        found = {"commit": commit, "images": len(images), "threads": torch.get_num_threads()}
        found |= speed(captioner, generator, images, seeds, profile)
    more = dataset.subset(arguments.agreement)
    found["quick"] = agreement(captioner, [more.open(example) for example in more], profile)
    found["memory"] = {images: in_a_process_of_its_own(images) for images in (100, 1000)}
    file = SHIPPED / "engine.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    (SHIPPED / "engine.md").write_text(page(found), encoding="utf-8")
    print(page(found))


def timed(work: Callable[[], object]) -> tuple[object, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def speed(captioner: Captioner, generator: Generator, images: list, seeds: list[list[int]], profile) -> dict:
    """Seconds of both sides, and how far their pictures lie apart."""
    guidance = profile.guidance_scale
    said, ours_say = timed(lambda: captioner.sample(images, seeds, Nucleus(0.9)))
    _, stock_says = timed(lambda: stock_captions(images, registry.locate(profile.captioner)))
    captions, flat = [text for row in said for text in row], [seed for row in seeds for seed in row]
    drawn, ours_draw = timed(lambda: generator.render(captions, flat, STEPS, guidance, 32))
    stock, stock_draws = timed(lambda: stock_pictures(generator, captions, flat, guidance))
    shared = [row[0] for row in seeds for _ in row]
    _, once = timed(lambda: generator.render(captions, shared, STEPS, guidance, 32))
    pairs = zip(drawn, stock, strict=True)
    apart = max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in pairs)
    return {
        "captions": {"ours": ours_say, "stock": stock_says},
        "pictures": {"ours": ours_draw, "stock": stock_draws, "shared noise": once},
        "apart": apart / 255,
        "distinct": len(set(zip(captions, shared, strict=True))) / len(captions),
    }


def stock_captions(images: list, folder: str) -> list[str]:
    """Every caption by a call of its own, as the model's page shows it."""
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    said = []
    with torch.no_grad():
        for image in images:
            for _ in range(K):
                inputs = processor(images=image, return_tensors="pt")
                ids = model.generate(**inputs, do_sample=True, top_p=0.9, top_k=0, min_new_tokens=5, max_new_tokens=60)
                said.append(processor.decode(ids[0], skip_special_tokens=True))
    return said


def stock_pictures(generator: Generator, captions: list[str], seeds: list[int], guidance: float) -> list:
    """Every picture by a call of its own."""
    return [
        generator.pipeline(
            caption,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=STEPS,
            guidance_scale=guidance,
        ).images[0]
        for caption, seed in zip(captions, seeds, strict=True)
    ]


def agreement(captioner: Captioner, images: list, profile) -> list[dict]:
    """Spearman's ρ, within a picture, of CLIP's order by each scheduler with that by the first; equal noise."""
    clip = ClipImage.from_pretrained(registry.locate(profile.clip))
    seeds = [[derive_seed(1, i, k) for k in range(K)] for i in range(len(images))]
    captions = captioner.sample(images, seeds, Nucleus(0.9))
    flat, noise = [text for row in captions for text in row], [row[0] for row in seeds for _ in row]
    frame, rows = pd.DataFrame({"image_id": np.repeat(range(len(images)), K)}), []
    for name, steps in QUICK:
        generator = Generator.from_pretrained(registry.locate(profile.generator), scheduler=name)
        drawn, seconds = timed(
            lambda generator=generator, steps=steps: generator.render(flat, noise, steps, profile.guidance_scale, 32)
        )
        column = f"{name} {steps}"
        frame[column] = clip.compare(images, [drawn[i : i + K] for i in range(0, len(drawn), K)]).flatten().tolist()
        rho = within_group_spearman(frame, "image_id", f"{QUICK[0][0]} {QUICK[0][1]}", column).dropna()
        known: Interval = mean_interval(rho.to_numpy())
        rows.append({
            "scheduler": name, "steps": steps, "seconds": seconds,
            "rho": known.value, "low": known.low, "high": known.high, "n": known.n,
        })  # fmt: skip
    return rows


def in_a_process_of_its_own(images: int) -> float:
    """Peak memory in MiB of a whole run over so many images, two candidates each, drawn in one step."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, images).result()


def peak_memory(images: int) -> float:
    dataset = registry.dataset("miniature/coco", "train").subset(images)
    settings = dict(candidates=2, steps=1, guidance_scale=1.0)
    with tempfile.TemporaryDirectory() as folder:
        image_text_image(dataset, *load_models(profiles.PROFILES["mini"]), folder, **settings)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def page(found: dict) -> str:
    captions, pictures = found["captions"], found["pictures"]
    both = [sum(side[name] for side in (captions, pictures)) for name in ("stock", "ours")]
    once = captions["ours"] + pictures["shared noise"]
    sides = [
        ("captions", captions["stock"], captions["ours"]),
        ("pictures", pictures["stock"], pictures["ours"]),
        ("end to end", *both),
        ("end to end, equal captions drawn once", both[0], once),
    ]
    rows = [[what, f"{stock:.1f} s", f"{ours:.1f} s", _times(ours, stock)] for what, stock, ours in sides]
    first = found["quick"][0]
    quick = [
        [
            f"{row['scheduler']}, {row['steps']} steps",
            f"{row['seconds']:.1f} s",
            _times(row["seconds"], first["seconds"]),
            f"{row['rho']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            str(row["n"]),
        ]
        for row in found["quick"]
    ]
    parts = [
        "# The engine, measured",
        f"Made by `python benchmarks/engine.py` at commit `{found['commit']}`, on {found['threads']} CPU threads: the "
        f"miniature's models, {found['images']} pictures, K = {K} captions each, {STEPS} steps. Both sides in one run.",
        table(["", "stock, item by item", "ours", "ratio"], rows),
        f"The pictures of both sides differ by at most {found['apart']:.4f} (of 1). Of the candidates "
        f"{found['distinct']:.0%} are distinct captions.",
        "## Fewer steps",
        f"The same captions from the same noise. ρ: Spearman's correlation, within a picture, of CLIP's order of the "
        f"candidates with the order by {first['scheduler']} in {first['steps']} steps; mean over pictures, 95 % "
        "interval.",
        table(["scheduler", "time", "ratio", "ρ", "n"], quick),
    ]
    small, large = found["memory"].items()
    parts += [
        "## Memory",
        f"Peak of a whole run, models included: over {small[0]} images {small[1]:,.0f} MiB, over {large[0]} images "
        f"{large[1]:,.0f} MiB.",
    ]
    return "\n\n".join(parts) + "\n"


def _times(ours: float, stock: float) -> str:
    return f"{stock / ours:.1f} ×"


if __name__ == "__main__":
    main()
