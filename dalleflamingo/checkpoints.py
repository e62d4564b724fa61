"""The state of a training run on disk: a whole one or the one before it, whenever the run is killed."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


class Checkpoint:
    """Modules, optimizer moments and moving average of the weights, in one file that is replaced as a whole.

    Args:
        run: folder of the run.
        recipe: names the modules, the trained parameters and the average's decay (0 for none).
        optimizer: of `recipe.parameters()`; None to read weights only.
    """

    def __init__(self, run: Path, recipe, optimizer: torch.optim.Optimizer | None = None):
        self.file, self.modules, self.optimizer = run / "state.safetensors", recipe.modules, optimizer
        self.decay, self.parameters = recipe.average, list(recipe.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters] if self.decay else []
        self.followed = 0

    @torch.no_grad()
    def follow(self) -> None:
        """Let the moving average follow the weights, faster at first."""
        self.followed += 1
        decay = min(self.decay, self.followed / (self.followed + 10))
        if self.average:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average, where there is one, in place of the weights."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            parameter.copy_(average)

    def save(self, step: int, minutes: float) -> None:
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"optimizer.{i}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {f"average.{i}": value for i, value in enumerate(self.average)}
        tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        partial = self.file.with_suffix(".partial")
        save_file(
            tensors, partial, metadata={"step": str(step), "minutes": str(minutes), "followed": str(self.followed)}
        )
        os.replace(partial, self.file)

    def load(self) -> tuple[int, float]:
        """Steps and minutes done so far; (0, 0.0) where there is no checkpoint."""
        if not self.file.exists():
            return 0, 0.0
        tensors = load_file(self.file)
        for name, module in self.modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
        for i, parameter in enumerate(self.parameters if self.optimizer else []):
            moments = {
                key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"optimizer.{i}.")
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self.average = [tensors[f"average.{i}"].to(average.device) for i, average in enumerate(self.average)]
        with safe_open(self.file, "pt") as state:
            done = state.metadata()
        self.followed = int(done["followed"])
        return int(done["step"]), float(done["minutes"])


def load_trained(recipe, run: Path) -> tuple[int, float]:
    """Give `recipe` the (averaged) weights that `run` has reached; returns its steps and minutes.

    Raises:
        FileNotFoundError: if the run holds no checkpoint.
    """
    checkpoint = Checkpoint(run, recipe)
    if not checkpoint.file.exists():
        raise FileNotFoundError(
            f"{checkpoint.file} is missing: train it first, `python -m dalleflamingo.miniature.train {run.name}`"
        )
    done = checkpoint.load()
    checkpoint.use_average()
    return done
