"""The base class of all recipes: how a model is trained, apart from the loop in `train.py`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dalleflamingo.runs import Checkpoint


class Recipe(ABC):
    """What the training loop needs to know of one model.

    A recipe builds its networks in `__init__` and sets `modules`; where the defaults fit, it implements only `batch`,
    `loss`, `restore` and, if the model is shipped, `export`.

    Attributes:
        name: of the run.
        steps: optimizer steps in all.
        batch_size: examples a step.
        learning_rate: of AdamW after warm-up; it then falls to 2 % along a cosine.
        weight_decay: of AdamW.
        warmup: steps in which the learning rate rises linearly.
        average: decay of the exponential moving average of the weights, which is what is exported; 0 for none.
        betas: of AdamW.
        max_grad_norm: length to which the gradient of all parameters together is clipped.
        bfloat16: whether products are computed in bfloat16, where the hardware has it. Weights stay in float32.
        modules: name -> network, all that a checkpoint holds.
        compilable: networks that `--compile` compiles: those whose input shapes stay the same.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: int = 100
    average: float = 0.998
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    bfloat16: bool = True
    modules: dict[str, nn.Module]
    compilable: tuple[nn.Module, ...] = ()

    def parameters(self) -> Iterable[nn.Parameter]:
        """All trained parameters: those of `modules` that require a gradient."""
        for module in self.modules.values():
            yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimizer, in torch's format; a group may set its own learning rate ("lr") or weight decay."""
        return [{"params": list(self.parameters())}]

    @abstractmethod
    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """The batch of one step, on the CPU.

        Args:
            rng: source of all choices.
            step: number of the step, from 0.
        """

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Scalars; "loss" is minimised, the others are logged.

        Args:
            batch: of `batch`.
            step: number of the step, from 0.
        """

    def after_step(self, step: int) -> None:  # noqa: B027, most recipes have nothing to do here
        """Called after every optimizer step."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Read weights from a folder that `export` wrote."""

    def export(self, folder: Path) -> None:
        """Write the model in its library's standard format, tensors in float16.

        Raises:
            TypeError: the model is a stage of another one and is not shipped on its own.
        """
        raise TypeError(f"{self.name} is trained on the way to another model and has no format of its own")


def load_trained(recipe: Recipe, run: Path) -> tuple[int, float]:
    """Give a recipe the weights that a run has reached, averaged where it averages; returns steps and minutes done.

    Args:
        recipe: its parameters are changed in place.
        run: folder of the run.
    Raises:
        FileNotFoundError: the run holds no checkpoint.
    """
    checkpoint = Checkpoint(run, recipe)
    if not checkpoint.file.exists():
        raise FileNotFoundError(
            f"{checkpoint.file} is missing: train it first, `python -m dalleflamingo train {run.name}`"
        )
    done = checkpoint.load()
    checkpoint.use_average()
    return done
