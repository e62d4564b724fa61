"""What the cycle costs beside learning from labels: claim 14, "about 1.4 × plain finetuning" (§5), in one run.

    python benchmarks/cycle.py --rounds 20

A round makes a step of each kind on the same batch, forward, backward and the optimizer: the captioner's by its label
(1), the generator's by its own (3), both halves of the cycle, and all four losses at once. Writes
docs/results/cycle-cost.json and cycle-cost.md. What a step costs at full size is counted by `full_size.py`.
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
from dalleflamingo.cycle_losses import NAMES, Batch, Losses, total
from dalleflamingo.generator import Generator
from dalleflamingo.research.report import SHIPPED, current_commit, table

STEPS = {
    "label → captioner (1)": (("image",), NAMES[:1]),
    "label → generator (3)": (("text",), NAMES[2:3]),
    "image → text → image (1) + (2)": (("image",), NAMES[:2]),
    "text → image → text (3) + (4)": (("text",), NAMES[2:]),
    "joint (1) + (2) + (3) + (4)": (("image", "text"), NAMES),
}


SETTINGS = {
    "x̂ of every timestep": Losses(),
    "x̂ of the earliest 40 % of timesteps": Losses(latest=0.4),
    "x̂ decoded at 32 pixels a side": Losses(decoded_size=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed, after two that warm up (20)")
    arguments = parser.parse_args()
    commit, profile = current_commit(), profiles.PROFILES["mini"]
    measured = [(profile.captioner, setting) for setting in SETTINGS]
    measured += [(name, list(SETTINGS)[1]) for name in ("miniature/blip-large", profile.other_captioner)]
    found = []
    for captioner, setting in measured:
        config = replace(CycleConfig(), captioner=captioner, losses=SETTINGS[setting])
        taken = seconds(config, arguments.rounds)
        found.append({"captioner": captioner, "setting": setting, "seconds": taken})
    result = {"commit": commit, "threads": torch.get_num_threads(), "rounds": arguments.rounds, "found": found}
    (SHIPPED / "cycle-cost.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
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
            step(made, batch, halves, optimizer, number)
            if number >= 2:
                taken[name].append(time.perf_counter() - began)
    return taken


def step(made: cycle.Cycle, batch: Batch, halves: tuple[str, ...], optimizer: torch.optim.Optimizer, seed: int) -> None:
    found = {}
    ways: dict[str, Callable] = {"image": made.from_image, "text": made.from_text}
    for half in halves:
        found |= ways[half](batch, torch.Generator().manual_seed(seed))
    total(found, made.weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def page(result: dict) -> str:
    """The page in Markdown."""
    rows, ratios = [], []
    for entry in result["found"]:
        captioner, generator, image, text, joint = (np.array(taken) for taken in entry["seconds"].values())
        labels, of = captioner + generator, [entry["captioner"], entry["setting"]]
        rows += [[*of, kind, f"{1000 * np.median(taken):.0f} ms"] for kind, taken in entry["seconds"].items()]
        ratios.append([*of, *(_ratio(part, labels) for part in ((image + text) / 2, joint))])
    parts = [
        "# What the cycle costs",
        f"Made by `python benchmarks/cycle.py` at commit `{result['commit']}`, on {result['threads']} CPU threads: "
        f"median of {result['rounds']} rounds, batches of 8, the miniature's models. The paper: about 1.4 ×.",
        "A step of the cycle, mean of both halves or all four losses at once, over a step of the captioner and one of "
        "the generator from labels, median of the rounds with their 5th and 95th percentile:",
        table(["captioner", "setting", "alternating", "joint"], ratios),
        "## Steps",
        table(["captioner", "setting", "step", "time"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def _ratio(cost: np.ndarray, labels: np.ndarray) -> str:
    low, middle, high = np.quantile(cost / labels, (0.05, 0.5, 0.95))
    return f"{middle:.2f} × [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
