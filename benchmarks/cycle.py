"""What the cycle costs beside learning from labels: claim 14, "about 1.4 × plain finetuning" (§5), in one run.

    python benchmarks/cycle.py --rounds 20

A round makes a step of each kind on the same batch, forward, backward and the optimizer: the captioner's from labels
(1), the generator's from labels (3), both halves of the cycle, and all four losses at once. Writes
docs/results/cycle-cost.json and cycle-cost.md. What a step costs at full size is counted by `full_size.py`.
"""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import torch

from dalleflamingo import profiles
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import LOSS_NAMES, Batch, Cycle, Losses, total_loss
from dalleflamingo.research.cycle_claims import BY_CYCLE, BY_LABELS, TIMED, cost_of_cycle
from dalleflamingo.research.pages import SHIPPED, current_commit, table, write_page
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_cycle

JOINT = "joint (1) + (2) + (3) + (4)"
STEPS = {  # kind of step -> its halves, its losses
    BY_LABELS[0]: (("image",), LOSS_NAMES[:1]),
    BY_LABELS[1]: (("text",), LOSS_NAMES[2:3]),
    BY_CYCLE[0]: (("image",), LOSS_NAMES[:2]),
    BY_CYCLE[1]: (("text",), LOSS_NAMES[2:]),
    JOINT: (("image", "text"), LOSS_NAMES),
}
SETTINGS = {
    "x̂ of every timestep": Losses(),
    "x̂ of the earliest 40 % of timesteps": Losses(max_timestep=0.4),
    "x̂ decoded at 32 pixels a side": Losses(decoded_size=32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed, after two that warm up; default: %(default)s")
    arguments = parser.parse_args()
    commit, profile = current_commit(), profiles.PROFILES["mini"]
    first, *others = profile.captioners
    measured = [(first, setting) for setting in SETTINGS] + [(name, list(SETTINGS)[1]) for name in others]
    found = []
    for captioner, setting in measured:
        config = CycleConfig.of(profile, captioner=captioner)
        config = replace(config, images=2 * config.batch_size, losses=SETTINGS[setting])
        found.append({"captioner": captioner, "setting": setting, "seconds": seconds(config, arguments.rounds)})
    result = {"commit": commit, "threads": torch.get_num_threads(), "rounds": arguments.rounds, "found": found}
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_whole(SHIPPED / TIMED, lambda path: path.write_text(text, encoding="utf-8"))
    write_page(SHIPPED / "cycle-cost.md", page(result))
    print(*page(result), sep="\n\n")


def seconds(config: CycleConfig, rounds: int) -> dict[str, list[float]]:
    """Kind of step -> its seconds in each round; latents and pixel values of the batch are computed before."""
    cycle, batches, trainable = load_cycle(config, torch.device("cpu"))
    optimizer = torch.optim.AdamW(trainable.parameters(), 1e-6)
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(rounds + 2):
        batch = batches.batch(number)
        for name, (halves, losses) in STEPS.items():
            cycle.losses = replace(config.losses, **{loss: float(loss in losses) for loss in LOSS_NAMES})
            began = time.perf_counter()
            step(cycle, batch, halves, optimizer, number)
            if number >= 2:
                found[name].append(time.perf_counter() - began)
    return found


def step(cycle: Cycle, batch: Batch, halves: tuple[str, ...], optimizer: torch.optim.Optimizer, seed: int) -> None:
    found, functions = {}, {"image": cycle.image_losses, "text": cycle.text_losses}
    for half in halves:
        found |= functions[half](batch, torch.Generator().manual_seed(seed))
    total_loss(found, cycle.losses).backward()
    optimizer.step()
    optimizer.zero_grad()


def page(result: dict) -> list[str]:
    """The parts of the page in Markdown."""
    rows, ratios = [], []
    for entry in result["found"]:
        names, spent = [entry["captioner"], entry["setting"]], entry["seconds"]
        for kind in STEPS:
            rows.append([*names, kind, f"{1000 * np.median(spent[kind]):.0f} ms"])
        joint = np.array(spent[JOINT]) / sum(np.array(spent[kind]) for kind in BY_LABELS)
        ratios.append([*names, ratio(cost_of_cycle(spent)), ratio(joint)])
    return [
        "# What the cycle costs",
        f"Made by `python benchmarks/cycle.py` at commit `{result['commit']}`, on {result['threads']} CPU threads: "
        f"median of {result['rounds']} rounds, batches of 8, the miniature's models. The paper: about 1.4 ×.",
        "A step of the cycle, mean of both halves or all four losses at once, over a step of the captioner and one of "
        "the generator from labels, median of the rounds with their 5th and 95th percentile:",
        table(["captioner", "setting", "alternating", "joint"], ratios),
        "## Steps",
        table(["captioner", "setting", "step", "time"], rows),
    ]


def ratio(cost: np.ndarray) -> str:
    low, middle, high = np.quantile(cost, (0.05, 0.5, 0.95))
    return f"{middle:.2f} × [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
