"""The training loop, one for all models, and the command `python -m dalleflamingo train`.

A recipe (`base.py`) has the networks, the batches and the loss. The loop does the rest: AdamW, warm-up and cosine
decay, clipping, a moving average of the weights, checkpoints, resumption, the curve. It is the same code on a CPU, a
GPU, or several of them: `torchrun --nproc-per-node 2 -m dalleflamingo train sd --threads 1` gives each of two processes
its own batches and averages their gradients.
"""

import argparse
import inspect
import json
import os
import platform
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm.auto import trange
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from dalleflamingo import registry
from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.evaluation.accelerators import new_accelerator
from dalleflamingo.miniature.corpora import data_folder
from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.recipes import RECIPES, RUNS
from dalleflamingo.miniature.training.ship import ship, write_manifest
from dalleflamingo.runs import Checkpoint, RunFolderError, append_row, hold, read_settings, write_whole

FINAL_LEARNING_RATE = 0.02  # share of the recipe's


def train(
    recipe: Recipe, run: Path, checkpoint_every: int = 100, seed: int = 0, init_from: Path | None = None
) -> float:
    """Train `recipe` until `recipe.steps` steps are done in all, counting those that `run` has already.

    Args:
        recipe: what to train.
        run: folder of the checkpoint (`state.safetensors`), the curve (`log.jsonl`) and the settings (`training.json`).
        checkpoint_every: steps between two checkpoints.
        seed: of data and noise. Those of a step follow from its number, so resuming needs no state of a generator.
        init_from: folder of the weights that `recipe` was restored from, for the record.
    Returns:
        minutes of all steps.
    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
        RunFolderError: the run was begun with another seed, is at work or damaged, or cannot be written to.
    """
    accelerator = new_accelerator()
    with hold(run) if accelerator.is_main_process else nullcontext():
        return _train(recipe, run, checkpoint_every, seed, init_from, accelerator)


def _train(
    recipe: Recipe, run: Path, checkpoint_every: int, seed: int, init_from: Path | None, accelerator: Accelerator
) -> float:
    rank, processes = accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():
        check_seed(run, seed)
    settings = {
        "seed": seed,
        "hardware": f"{processes} × {hardware(accelerator.device)}",
        "init_from": init_from and str(init_from),
    }
    for module in recipe.modules.values():
        module.to(accelerator.device)
    parameters = list(recipe.parameters())
    optimizer = torch.optim.AdamW(
        recipe.parameter_groups(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    checkpoint = Checkpoint(run, recipe, optimizer)
    first, minutes = checkpoint.load()
    schedule = learning_rate_schedule(optimizer, recipe, first)
    autocast = torch.autocast(
        accelerator.device.type, torch.bfloat16, enabled=recipe.bfloat16 and has_fast_bfloat16(accelerator.device)
    )
    started, recent = time.time(), []
    progress = trange(
        first, recipe.steps, initial=first, total=recipe.steps, desc=recipe.name, mininterval=10, disable=rank > 0
    )
    for step in progress:
        torch.manual_seed((seed * 1_000_003 + step) * processes + rank)
        rng = np.random.default_rng([seed, step] + [rank] * (processes > 1))
        batch = recipe.batch(rng, step)
        with autocast:
            losses = recipe.loss(batch, step)
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(
                f"{recipe.name}: the loss is {losses['loss'].item()} at step {step}. The checkpoint in {run} is "
                f"good: lower the recipe's learning_rate ({recipe.learning_rate:g}) or raise its warmup "
                f"({recipe.warmup} steps), and give the same command again"
            )
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        average_gradients(accelerator, parameters)
        clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        recipe.after_step(step)
        checkpoint.follow()
        recent.append({name: value.item() for name, value in losses.items()})
        if (step + 1) % checkpoint_every and step + 1 < recipe.steps:
            continue
        if accelerator.is_main_process:
            means = {name: round(float(np.mean([entry[name] for entry in recent])), 5) for name in recent[0]}
            spent = minutes + (time.time() - started) / 60
            if not (run / "training.json").exists():
                write_whole(run / "training.json", lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))
            checkpoint.save(step + 1, spent)
            append_row(run / "log.jsonl", {"step": step + 1, "minutes": round(spent, 2), **means})
            progress.set_postfix(means)
        recent = []
    accelerator.wait_for_everyone()
    return minutes + (time.time() - started) / 60 * (first < recipe.steps)


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, first: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then cosine decay to 2 %, beginning at step `first`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, recipe.warmup, recipe.steps, min_lr_rate=FINAL_LEARNING_RATE, last_epoch=first - 1
    )


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes.

    DistributedDataParallel would need one `forward` that computes the whole loss; recipes call parts of their networks.
    """
    if accelerator.num_processes > 1:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), reduction="mean"), gradients)


def check_seed(run: Path, seed: int) -> None:
    """Refuse another seed than that with which a run was begun."""
    begun = read_settings(run / "training.json", lambda settings: settings["seed"])
    if begun not in (None, seed):
        raise RunFolderError(f"{run} was begun with seed {begun}: give --seed {begun}, or another folder by --run")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16; CPUs without it convert number by number, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private, but the only one that knows: there is no public question of torch or of Python
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def steps_done(run: Path) -> int:
    """The step of the last checkpoint of a run, 0 if it has none."""
    file = run / "state.safetensors"
    if not file.exists():
        return 0
    with safe_open(file, "pt") as checkpoint:
        return int(checkpoint.metadata()["step"])


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used, in GB; on a GPU, of the GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(arguments: list[str] | None = None) -> int:
    """The command `python -m dalleflamingo train`; returns its exit status."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.run and options.model == "all":
        parser.error("--run is the folder of one model: leave it out, or name the model")
    if options.steps is not None and options.steps < 0:
        parser.error(f"--steps {options.steps}: give 0 or more")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: give 1 or more, or leave it out for PyTorch's own choice")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: give 0 or more, below 2^63")
    if options.init_from:
        if not options.init_from.is_dir():
            parser.error(f"--init-from {options.init_from} is not a folder: name one that holds weights")
        registry.check_weights(options.init_from)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for name in RECIPES if options.model == "all" else [options.model]:
        run = options.run or RUNS / name
        torch.set_flush_denormal(True)  # denormal numbers are a hundred times slower on CPUs
        try:
            train_one(name, run, options)
        except KeyboardInterrupt:
            print(f"\nInterrupted. {run} keeps {steps_done(run)} steps of {name}; the same command goes on from there.")
            return 130
        finally:
            torch.set_flush_denormal(False)
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    summaries = [f"  {name:<15} {inspect.getdoc(recipe).splitlines()[0]}" for name, recipe in RECIPES.items()]
    about = "Train the models of the miniature. A run that is there goes on from its last checkpoint."
    epilog = "models, in the order in which `all` trains them:\n" + "\n".join(summaries)
    parser = command_parser("train", about, epilog)
    parser.add_argument("model", choices=[*RECIPES, "all"], metavar="MODEL", help="one of those below, or all")
    parser.add_argument("--steps", type=int, help="steps in all, those done before included (default: the recipe's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default: 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks; needs a C++ compiler")
    parser.add_argument(
        "--init-from", type=Path, metavar="FOLDER", help="start from these weights, for example data/miniature/sd"
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help=f"of checkpoint and curve (default: {RUNS}/MODEL)")
    parser.add_argument(
        "--ship",
        action="store_true",
        help="then write the model into data/miniature, with its entry in MANIFEST.json; "
        "with --steps 0 the run as it is",
    )
    return parser


def train_one(name: str, run: Path, options: argparse.Namespace) -> None:
    """Train one model as `argument_parser` says, ship it if asked for, and say what was made."""
    torch.manual_seed(options.seed)
    accelerator = new_accelerator()
    with accelerator.main_process_first():  # it may compute a bank of latents, which the others then read
        recipe = RECIPES[name]()
    if options.steps is not None:
        recipe.steps = options.steps
    if options.init_from:
        with registry.loading(options.init_from):
            recipe.restore(options.init_from)
    if options.compile:
        for module in recipe.compilable:
            module.compile()
    with hold(run) if accelerator.is_main_process else nullcontext():
        minutes = train(recipe, run, seed=options.seed, init_from=options.init_from)
        if not accelerator.is_main_process:
            return
        if options.ship:
            write_manifest({name: ship(name, run)})
    where = f"{run}, shipped in {data_folder()}" if options.ship else run
    memory = peak_memory(accelerator.device)
    print(f"{name}: {steps_done(run)} steps in {where}; {minutes:.1f} minutes, {memory:.1f} GB of memory")
