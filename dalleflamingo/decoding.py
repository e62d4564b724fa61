"""How the captioner chooses the next word: what may be drawn, how it is drawn, and how many words there may be.

Three rules, each one of transformers' logits processors, applied in this order at every step:

1. `WordLimits`: between min and max words (§3: 5-30), counted in words, not in WordPieces.
2. a strategy (App. A.2): `Nucleus`, `TopK` or `Temperature`, by transformers' own warpers.
3. `GumbelNoise`: the largest of (log-probability + Gumbel noise) is an exact draw from the softmax. Each row has its
   own random numbers, so greedy search over the sum samples every row independently of its neighbours.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dalleflamingo.tokens import style, token_bytes

WORD = re.compile(r"[^\W_]+")
NEVER = -torch.inf


def count_words(text: str) -> int:
    """Number of runs of letters and digits: "a bird." is two words, "black-and-white" three."""
    return len(WORD.findall(text))


@dataclass(frozen=True)
class Nucleus:
    """The smallest set of tokens that holds probability p (the paper: 0.9), 0 < p <= 1."""

    p: float = 0.9

    def warper(self) -> LogitsProcessor:
        return TopPLogitsWarper(float(self.p))


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens (Table 7: 10)."""

    k: int = 10

    def warper(self) -> LogitsProcessor:
        return TopKLogitsWarper(self.k)


@dataclass(frozen=True)
class Temperature:
    """All tokens, logits divided by t (Table 7: 0.7), t > 0."""

    t: float = 0.7

    def warper(self) -> LogitsProcessor:
        return TemperatureLogitsWarper(float(self.t))


Strategy = Nucleus | TopK | Temperature


class GumbelNoise(LogitsProcessor):
    """Adds to row b Gumbel(0, 1) noise that depends on seeds[b] and the step only."""

    def __init__(self, seeds: Sequence[int]):
        # on the CPU whatever the model's device, so that one seed is one caption everywhere
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self.generators])  # (B, V) in [0, 1)
        return scores + gumbel(uniform).to(scores.device)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, finite, from random numbers in [0, 1)."""
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))


class WordLimits(LogitsProcessor):
    """A caption may end after `min_words` words, and ends where word `max_words` + 1 would begin.

    At the upper limit the probability of every token that would begin another word goes to the end token: a caption
    that would have gone on is cut off between two words, and none is bent into another ending.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,
        prompt_length: int,
        end: int,
        min_words: int,
        max_words: int,
    ):
        if not 0 <= min_words <= max_words:
            raise ValueError(f"expected 0 <= min_words <= max_words, got min_words={min_words}, max_words={max_words}")
        self.tokenizer, self.prompt_length, self.end = tokenizer, prompt_length, end
        self.min_words, self.max_words = min_words, max_words
        lettered = {id: text for id, text in _texts(tokenizer).items() if count_words(text)}
        self.lettered = _table(lettered, vocabulary_size)
        self.beginning = _table([id for id, text in lettered.items() if not text[0].isalnum()], vocabulary_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        words = torch.tensor([count_words(text) for text in texts], device=scores.device)
        in_word = torch.tensor([text[-1:].isalnum() for text in texts], device=scores.device)
        scores = scores.clone()
        scores[words < self.min_words, self.end] = NEVER
        full = words >= self.max_words
        if full.any():
            scores[full] = self._end_at_next_word(scores[full], in_word[full])
        return scores

    def _end_at_next_word(self, scores: Tensor, in_word: Tensor) -> Tensor:
        # "##s", or "s" without its space, continues a word that is open; after a comma it would begin one
        beginning, lettered = self.beginning.to(scores.device), self.lettered.to(scores.device)
        begins = torch.where(in_word[:, None], beginning, lettered)  # (B, V)
        surplus = scores.masked_fill(~begins, NEVER).logsumexp(-1)
        scores = scores.masked_fill(begins, NEVER)
        scores[:, self.end] = torch.logaddexp(scores[:, self.end], surplus)
        return scores


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> what a token adds to the text, the space before a word included; special tokens add nothing.

    A byte of a letter that takes several counts as a letter: alone it is nothing, but with the next it may be a word.
    """
    how, special = style(tokenizer), set(tokenizer.all_special_ids)
    return {
        id: "".join(chr(byte) if byte < 128 else "x" for byte in token_bytes(token, how))
        for token, id in tokenizer.get_vocab().items()
        if id not in special
    }


def _table(ids: Iterable[int], size: int) -> Tensor:
    table = torch.zeros(size, dtype=torch.bool)
    table[list(ids)] = True
    return table
