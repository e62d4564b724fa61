"""Train the miniature's models: `python -m dalleflamingo train vae`, or `all` for everything in order.

One loop for every model. A *recipe* (`vae.py`, `clip.py`, `blip.py`, …) names its modules, draws its batches and gives
its loss; the loop does the rest: AdamW with warm-up and cosine decay, clipping, a moving average of the weights,
checkpoints, resumption after a kill, the curve. CPU or GPU, same code; a run goes on where its last checkpoint stands.
`torchrun --nproc-per-node 2 -m dalleflamingo train sd --threads 1` gives each of two cores its own batches.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import trange

from dalleflamingo.miniature.training.recipes import RECIPES, RUNS
from dalleflamingo.runs import Checkpoint


def train(recipe, run: Path, checkpoint_every: int = 100, seed: int = 0, device: str = "cpu") -> None:
    """Train `recipe` for `recipe.steps` optimizer steps in all, counting those that `run` holds already.

    Args:
        recipe: what to train; see `recipes.py`.
        run: folder of the checkpoint (`state.safetensors`) and the curve (`log.jsonl`).
    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint is kept.
    """
    run.mkdir(parents=True, exist_ok=True)
    for module in recipe.modules.values():
        module.to(device)
    parameters = list(recipe.parameters())
    optimizer = torch.optim.AdamW(
        recipe.paces() if hasattr(recipe, "paces") else parameters,
        lr=recipe.learning_rate,
        betas=getattr(recipe, "betas", (0.9, 0.98)),
        weight_decay=recipe.weight_decay,
    )
    checkpoint = Checkpoint(run, recipe, optimizer)
    first, minutes = checkpoint.load()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    started, recent = time.time(), []
    progress = trange(first, recipe.steps, initial=first, total=recipe.steps, desc=recipe.name, mininterval=10)
    for step in progress:
        # a step's noise and data follow from its number, so that resuming needs no RNG state
        torch.manual_seed((seed * 1_000_003 + step) * workers + rank)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * group.get("pace", 1.0) * schedule(step, recipe.steps, recipe.warmup)
        losses = recipe.loss(recipe.batch(np.random.default_rng([seed, step] + [rank] * (workers > 1)), step), step)
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(
                f"{recipe.name}: loss {losses['loss'].item()} at step {step}; the checkpoint in {run} is good"
            )
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        if workers > 1:
            average_gradients(parameters, workers)
        torch.nn.utils.clip_grad_norm_(parameters, getattr(recipe, "max_grad_norm", 1.0))
        optimizer.step()
        recipe.after_step(step)
        checkpoint.follow()
        recent.append({name: value.item() for name, value in losses.items()})
        if (step + 1) % checkpoint_every and step + 1 < recipe.steps:
            continue
        if rank == 0:
            means = {name: round(float(np.mean([entry[name] for entry in recent])), 5) for name in recent[0]}
            spent = minutes + (time.time() - started) / 60
            checkpoint.save(step + 1, spent)
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, "minutes": round(spent, 2), **means}) + "\n")
            progress.set_postfix(means)
        recent = []


def average_gradients(parameters: list[torch.nn.Parameter], workers: int) -> None:
    """Every worker goes on with the mean of all workers' gradients, sent as one long vector."""
    gradients = [parameter.grad for parameter in parameters]
    together = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(together)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, (together / workers).split(sizes), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then cosine decay to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*RECIPES, "all"])
    parser.add_argument("--steps", type=int, help="length of training (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the networks (wants a C++ compiler; faster on long runs)"
    )
    parser.add_argument("--init-from", type=Path, help="start from the weights in this folder (data/miniature/sd, say)")
    parser.add_argument("--run", type=Path, help=f"where the run is kept (default: {RUNS}/MODEL)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.set_flush_denormal(True)  # denormal numbers are a hundred times slower on CPUs
    for name in RECIPES if options.model == "all" else [options.model]:
        torch.manual_seed(options.seed)
        recipe = RECIPES[name]()
        recipe.steps = options.steps or recipe.steps
        if options.init_from:
            recipe.restore(options.init_from)
        if options.compile:
            for module in recipe.compilable:
                module.compile()
        run = options.run or RUNS / name
        train(recipe, run, seed=options.seed, device="cuda" if torch.cuda.is_available() else "cpu")
        print(f"{name}: trained, in {run}")
