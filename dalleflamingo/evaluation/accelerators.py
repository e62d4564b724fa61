"""Accelerators that compute as a run's settings say, whatever accelerate's environment variables hold."""

import os
import warnings

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from dalleflamingo.cycle import CycleConfig
from dalleflamingo.profiles import find_device


def make_accelerator(config: CycleConfig, **options) -> Accelerator:
    """An accelerator with the configuration's precision and accumulation; in place of fp16 a CPU has float32.

    Args:
        config: settings of the run.
        options: other arguments of `Accelerator`.
    Raises:
        ValueError: as `new_accelerator`.
    """
    precision = config.precision
    if precision == "fp16" and find_device() == "cpu":
        warnings.warn("a CPU has no fp16: this run trains in float32; bf16 would work", stacklevel=2)
        precision = "no"
    return new_accelerator(precision, config.accumulation, asked=config.precision, **options)


def new_accelerator(precision: str = "no", accumulation: int = 1, asked: str | None = None, **options) -> Accelerator:
    """An accelerator on this machine's device, which computes as a run's settings say, whatever the environment holds.

    accelerate takes from environment variables what its caller leaves open, and `accelerate launch` sets some of them
    from a file of the user's. All is given here; a variable that asks for something else is refused, and not ignored.

    Args:
        precision: "no", "bf16" or "fp16".
        accumulation: parts of a batch before each optimizer step.
        asked: the precision that a variable may ask for as well, because `precision` stands in for it.
        options: other arguments of `Accelerator`.
    Raises:
        ValueError: a variable asks for something else.
    """
    device, off, on = find_device(), ("", "0", "f", "false", "n", "no", "off"), ("1", "on", "t", "true", "y", "yes")
    allowed = {
        "ACCELERATE_MIXED_PRECISION": ("", "no", precision, asked),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1", str(accumulation)),
        "ACCELERATE_DYNAMO_BACKEND": off,
        "ACCELERATE_TORCH_DEVICE": ("", device),
        "ACCELERATE_USE_CPU": off + on * (device == "cpu"),
    }
    for name, value in os.environ.items():
        neutral = allowed.get(name, off if name.startswith("ACCELERATE_USE_") else None)
        if neutral is not None and value.lower().partition(":")[0] not in neutral:
            raise ValueError(
                f"{name}={value!r} asks for what this run does not do: as its settings say, it computes on {device} "
                f"with precision {precision!r} and accumulation {accumulation}, and neither shards nor compiles "
                "models. Unset the variable, or answer `accelerate config` again; fields of the configuration choose "
                "precision and accumulation, CUDA_VISIBLE_DEVICES the GPUs, or none"
            )
    parts = GradientAccumulationPlugin(num_steps=accumulation)
    return Accelerator(
        mixed_precision=precision,
        cpu=device == "cpu",  # so that processes find each other
        gradient_accumulation_plugin=parts,
        dynamo_backend="no",
        **options,
    )
