"""Attribute binding: at the name of a thing, a text encoder must know which colour and size the caption gives it.

From a caption of three things, a generator must not take the colour of one for another. A text encoder that has
learned from images alone gets little reason to tell them apart: where two things are, and which colours are where,
can be told without knowing which is which. A nonlinear probe of its states at names found the right colour for .89 of
them. So the encoder is also trained to say it: a linear map of the state at the last token of each name, thrown away
later, gives the colour and the size that stand before the name.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dalleflamingo.miniature import wording
from dalleflamingo.miniature.scene_graph import COLOURS, SIZES, parse

NOTHING = -100  # where there is no name, or its attribute is not said; `F.cross_entropy` leaves it out
_KIND_OF = {name: kind for kind, names in wording.NAMES.items() for name in names}
_NAME = re.compile(rf"\b({'|'.join(sorted(_KIND_OF, key=len, reverse=True))})\b")


def attributes_at_names(captions: list[str], tokenizer: CLIPTokenizer, length: int) -> Tensor:
    """(2, B, length): the colour and the size that each caption gives the thing whose name ends at a token.

    Args:
        captions: B texts. A thing that is named twice has its attributes at both names.
        tokenizer: that tells which token a character is in.
        length: T of the ids that are padded or cut.
    Returns:
        indices into `COLOURS` and `SIZES`, or `NOTHING`.
    """
    found = torch.full((2, len(captions), length), NOTHING)
    tokens = tokenizer(captions)
    for i, caption in enumerate(captions):
        said = {thing.kind: (thing.colour, thing.size) for thing in parse(caption).things}
        for name in _NAME.finditer(caption):
            position = tokens.char_to_token(i, name.end() - 1)
            if position >= length:
                continue
            colour, size = said.get(_KIND_OF[name[0]], (None, None))  # a lost word may leave a name that is no thing
            if colour is not None:
                found[0, i, position] = COLOURS.index(colour)
            if size is not None:
                found[1, i, position] = SIZES.index(size)
    return found


def attribute_head(width: int) -> nn.Linear:
    """From a state of that width to logits of the colours, then of the sizes."""
    return nn.Linear(width, len(COLOURS) + len(SIZES))


def attribute_loss(head: nn.Linear, hidden_states: Tensor, attributes: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the attributes that are said.

    Args:
        head: of `attribute_head`.
        hidden_states: (B, T, D) of the text encoder.
        attributes: (2, B, T) of `attributes_at_names`.
    """
    is_said = (attributes != NOTHING).any(0)  # (B, T), few
    logits = head(hidden_states[is_said]).split([len(COLOURS), len(SIZES)], dim=-1)
    losses = [
        F.cross_entropy(of_sort, said, ignore_index=NOTHING, reduction="sum")
        for of_sort, said in zip(logits, attributes[:, is_said], strict=True)
    ]
    return sum(losses) / (attributes != NOTHING).sum().clamp(min=1)
