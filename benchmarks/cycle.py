"""What the cycle costs beside learning from labels: claim 14, "about 1.4 × plain finetuning" (§5), in one run.

    python benchmarks/cycle.py --rounds 20

A round makes a step of each kind on the same batch, forward, backward and the optimizer: the captioner's by its label
(1), the generator's by its own (3), both halves of the cycle, and all four losses at once. Writes
docs/results/cycle-cost.json and cycle-cost.md.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dalleflamingo import cycle, profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import NAMES, total
from dalleflamingo.generator import Generator
from dalleflamingo.results import SHIPPED, current_commit, table

STEPS = {
    "label → captioner (1)": (("image",), NAMES[:1]),
    "label → generator (3)": (("text",), NAMES[2:3]),
    "image → text → image (1) + (2)": (("image",), NAMES[:2]),
    "text → image → text (3) + (4)": (("text",), NAMES[2:]),
    "joint (1) + (2) + (3) + (4)": (("image", "text"), NAMES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed, after two that warm up (20)")
    arguments = parser.parse_args()
    commit, profile = current_commit(), profiles.PROFILES["mini"]
    found = {}
    for name in (profile.captioner, "miniature/blip-large", profile.other_captioner):
        found[name] = seconds(replace(CycleConfig(), captioner=name), arguments.rounds)
    result = {"commit": commit, "threads": torch.get_num_threads(), "rounds": arguments.rounds, "seconds": found}
    (SHIPPED / "cycle-cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (SHIPPED / "cycle-cost.md").write_text(page(result), encoding="utf-8")
    print(page(result))


def seconds(config: CycleConfig, rounds: int) -> dict[str, list[float]]:
    """Kind of step -> its seconds in each round; the batch is there already, its latents and pixel values computed."""
    captioner = Captioner.from_pretrained(registry.locate(config.captioner))
    generator = Generator.from_pretrained(registry.locate(config.generator))
    dataset = registry.dataset(config.dataset, config.split).subset(2 * config.batch_size)
    made, pairs, learner = cycle.assemble(config, captioner, generator, dataset)
    optimizer = torch.optim.AdamW(learner.parameters(), 1e-6)
    taken: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(rounds + 2):
        batch = pairs.batch(number)
        for name, (halves, losses) in STEPS.items():
            made.weights = replace(config.losses, **{loss: float(loss in losses) for loss in NAMES})
            began = time.perf_counter()
            step(made, batch, halves, optimizer)
            if number >= 2:
                taken[name].append(time.perf_counter() - began)
    return taken


def step(made: cycle.Cycle, batch, halves: tuple[str, ...], optimizer: torch.optim.Optimizer) -> None:
    found = {}
    ways: dict[str, Callable] = {"image": made.from_image, "text": made.from_text}
    for half in halves:
        found |= ways[half](batch, torch.Generator().manual_seed(0))
    total(found, made.weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def page(result: dict) -> str:
    """The page in Markdown."""
    rows, ratios = [], []
    for name, taken in result["seconds"].items():
        median = {kind: float(np.median(values)) for kind, values in taken.items()}
        captioner, generator, image, text, joint = median.values()
        labels = captioner + generator
        rows += [[name, kind, f"{1000 * value:.0f} ms"] for kind, value in median.items()]
        ratios.append([name, f"{(image + text) / 2 / labels:.2f} ×", f"{joint / labels:.2f} ×"])
    parts = [
        "# What the cycle costs",
        f"Made by `python benchmarks/cycle.py` at commit `{result['commit']}`, on {result['threads']} CPU threads: "
        f"median of {result['rounds']} rounds, batches of 8, the miniature's models. The paper: about 1.4 ×.",
        "A step of the cycle, mean of both halves or all four losses at once, over a step of the captioner and one of "
        "the generator from labels:",
        table(["captioner", "alternating", "joint"], ratios),
        "## Steps",
        table(["captioner", "step", "time"], rows),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
