"""What cycle finetuning trains, and nothing else (§4.2): the query projections of cross-attention, by name.

Of BLIP the `crossattention.self.query` of every decoder layer, 7,087,104 parameters of the base and of the large model;
of Stable Diffusion's U-Net every `attn2.to_q`, 12,390,400 of v1-4; of BLIP-2 its query tokens.
"""

from torch import nn

from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator


def of_captioner(captioner: Captioner) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a captioner learns by. Errors as `of_generator`."""
    own = hasattr(captioner.model, "query_tokens")  # BLIP-2, whose Q-Former has cross-attention, too
    return _named(captioner.model, "query_tokens" if own else "crossattention.self.query.")


def of_generator(generator: Generator) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a generator learns by.

    Raises:
        ValueError: the model has no such parameter.
    """
    return _named(generator.pipeline.unet, "attn2.to_q.")


def freeze_all_but(model: nn.Module, learning: dict[str, nn.Parameter]) -> None:
    """Let gradients reach these parameters of the model only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)


def count(learning: dict[str, nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in learning.values())


def _named(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if part in name}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter with {part!r} in its name: nothing to train")
    return found
