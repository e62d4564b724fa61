"""The paper's claims, numbered: each a function of what was measured -> an effect with its interval, hence a verdict.

So far claim 2, the caption whose picture comes back best beats a random one (Table 1). Of claim 1, the rank correlation
behind it (Fig. 3), six of the twelve pairs are measured; its verdict waits for the others.

    python -m dalleflamingo.reproduce finding-1 --images 200 --candidates 10 --run build/runs/finding-1
"""

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dalleflamingo import profiles, registry, results
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.datasets import Dataset, read_results, write_results
from dalleflamingo.intervals import Interval
from dalleflamingo.picks import ALL, RESAMPLES, Judged, correlate, gains, measure, shuffle, similarities
from dalleflamingo.reconstruct import image_text_image, load_models

_OUT = "out-domain"


@dataclass(frozen=True)
class Claim:
    """A row of the scoreboard; `effect` is signed so that the paper's side is above 0."""

    number: int
    text: str
    ranked_by: str
    effect: Interval

    @property
    def verdict(self) -> str:
        return verdict(self.effect)


def verdict(effect: Interval) -> str:
    """"holds", "does not hold" or "undecided", by where the interval lies; one that touches 0 decides nothing."""
    if effect.low > 0:
        return "holds"
    return "does not hold" if effect.high < 0 else "undecided"


def claim_2(effects: pd.DataFrame) -> list[Claim]:
    """Ranked beats random: the overall gain in CIDEr × 100, by each similarity, as the paper names none for Table 1."""
    text = "the caption ranked first beats a random one: CIDEr × 100, overall"
    return [Claim(2, text, by, gains(effects, "cider", by)[ALL]) for by in similarities(effects)]


def most_out_of_domain(effects: pd.DataFrame, metric: str, by: str) -> dict[str, Interval]:
    """Claim 2's second half, reported apart: the gain out of domain minus the gain in each other domain.

    The domains share no image, so the interval of a difference follows from their two (Zou and Donner 2008).
    """
    by_domain = gains(effects, metric, by)
    if _OUT not in by_domain:
        return {}
    out = by_domain[_OUT]
    return {name: _difference(out, other) for name, other in by_domain.items() if name not in (ALL, _OUT)}


def _difference(a: Interval, b: Interval) -> Interval:
    value = a.value - b.value
    below, above = np.hypot(a.value - a.low, b.high - b.value), np.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, float(value - below), float(value + above), a.n + b.n, a.seed)


def finding_1(images: int, candidates: int, run_folder: Path, docs: Path, command: str) -> list[Claim]:
    """Image → text → image with the current profile's models, measured, and written to `docs` by `results.write`.

    A run that was interrupted goes on in its run folder; captions by beam search are kept there too.
    """
    profile = profiles.current()
    dataset = registry.dataset(profile.dataset).subset(images)
    captioner, generator, encoders = load_models(profile)
    table = image_text_image(
        dataset,
        captioner,
        generator,
        encoders,
        run_folder,
        candidates=candidates,
        steps=profile.steps,
        guidance_scale=profile.guidance_scale,
        strategy=PAPER,
        batch_size=profile.batch_size,
    )
    judged = Judged(table, dataset, _described(captioner, dataset, table, run_folder / "beam.json"))
    effects, correlations = measure(judged, resamples=RESAMPLES), correlate(judged.table, resamples=RESAMPLES)
    claims = claim_2(effects)
    apart = {by: most_out_of_domain(effects, "cider", by) for by in similarities(effects)}
    chance = {by: {metric: shuffle(judged, by, metric) for metric in judged.metrics} for by in apart}
    scheduler = generator.pipeline.scheduler
    settings = results.Settings(
        command=command,
        profile=profile.name,
        dataset=dataset.name,
        candidates=candidates,
        sampling=repr(PAPER),
        steps=profile.steps,
        guidance_scale=profile.guidance_scale,
        scheduler=f"{type(scheduler).__name__}, {scheduler.config.timestep_spacing} spacing",
        tokenizer=judged.tokenizer,
        resamples=RESAMPLES,
        seed=0,
    )
    results.write(docs, "finding-1", judged.table, effects, correlations, claims, apart, chance, settings)
    return claims


def _described(captioner: Captioner, dataset: Dataset, table: pd.DataFrame, path: Path) -> dict[int, str]:
    """Image id -> caption by beam search, as COCO results in the run folder."""
    ids = set(table["image_id"])
    if path.exists() and ids <= (there := read_results(path)).keys():
        return there
    readable = [example for example in dataset if example.image_id in ids]
    captions = []
    for start in range(0, len(readable), 16):
        captions += captioner.describe([dataset.open(example) for example in readable[start : start + 16]])
    beam = {example.image_id: caption for example, caption in zip(readable, captions, strict=True)}
    write_results(path, beam)
    return beam


def main(arguments: list[str] | None = None) -> int:
    """Run a finding, or go on with it, and write what came out into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo.reproduce", description=main.__doc__)
    parser.add_argument("finding", choices=["finding-1"])
    parser.add_argument("--images", type=int, default=200, help="n; default: 200")
    parser.add_argument("--candidates", type=int, default=10, help="K; default: 10, as in the paper")
    parser.add_argument("--run", type=Path, default=Path("build/runs/finding-1"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    command = f"python -m dalleflamingo.reproduce finding-1 --images {options.images} --candidates {options.candidates}"
    try:
        claims = finding_1(options.images, options.candidates, options.run, options.docs, command)
    except (ValueError, registry.RegistryError) as error:
        parser.error(str(error))
    for claim in claims:
        print(f"Claim {claim.number}, ranked by {claim.ranked_by}: {claim.verdict}; {claim.text}: {claim.effect}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    seconds = time.monotonic() - began
    print(f"{options.docs}/results/finding-1.md and its table, figures and claims in {seconds:.0f} s, {peak:.1f} GiB.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
