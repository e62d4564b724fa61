"""How the captioner chooses the next token, and how many words a caption may have.

Three rules, each one of transformers' logits processors, applied in this order at every step:

1. `WordLimits`: between min and max words (§3: 5 to 30), counted in words, not in tokens.
2. a strategy (App. A.2): `Nucleus`, `TopK` or `Temperature`, by transformers' own warpers.
3. `GumbelNoise`: the argmax of log-probability + Gumbel noise is an exact sample of the softmax. Each row has its own
   random numbers, so that greedy search over the sum samples every row independently of its neighbours.
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

from dalleflamingo.tokens import token_bytes, tokenizer_style

_DRAWN_AHEAD = 8192  # random numbers that a caption draws at once, of 32 steps at most


def count_words(text: str) -> int:
    """Number of runs of letters and digits: "a bird." is two words, "black-and-white" three."""
    return len(re.findall(r"[^\W_]+", text))


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
PAPER_SAMPLING = Nucleus(p=0.9)


class GumbelNoise(LogitsProcessor):
    """Adds to row b Gumbel(0, 1) noise that depends on seeds[b] and the step only."""

    def __init__(self, seeds: Sequence[int]):
        # on the CPU whatever the model's device, so that one seed is one caption everywhere
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.ahead = torch.empty(0)  # (steps, B, V) random numbers of the next steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not len(self.ahead):  # a call for many steps draws the numbers of a call for each
            size = (min(32, max(1, _DRAWN_AHEAD // scores.shape[-1])), scores.shape[-1])
            self.ahead = torch.stack([torch.rand(size, generator=g) for g in self.generators], dim=1)
        uniform, self.ahead = self.ahead[0], self.ahead[1:]  # (B, V) in [0, 1)
        return scores + gumbel_noise(uniform).to(scores.device)

    def keep(self, rows: Tensor) -> None:
        """Leaves only these rows of the batch, given by their (n,) positions."""
        self.generators = [self.generators[row] for row in rows.tolist()]
        self.ahead = self.ahead[:, rows.cpu()]


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, finite, from random numbers in [0, 1)."""
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))


class WordLimits(LogitsProcessor):
    """A caption may end after `min_words` words, and ends where word `max_words` + 1 would begin.

    At the upper limit the probability of every token that would begin another word goes to the end token: a caption
    that would have gone on is cut off between two words, and no caption gets another ending instead.

    Raises:
        ValueError: not 0 <= min_words <= max_words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,  # V, the columns of the scores; may exceed the tokenizer's own
        prompt_length: int,  # tokens before the caption, whose words do not count
        end_id: int,  # the token that ends a caption
        min_words: int,
        max_words: int,
    ):
        if not 0 <= min_words <= max_words:
            raise ValueError(f"expected 0 <= min_words <= max_words, got min_words={min_words}, max_words={max_words}")
        self.tokenizer, self.prompt_length, self.end_id = tokenizer, prompt_length, end_id
        self.min_words, self.max_words = min_words, max_words
        lettered = {id: text for id, text in self.token_texts(tokenizer).items() if count_words(text)}
        after_a_space = [id for id, text in lettered.items() if not text[0].isalnum()]
        self.lettered, self.after_a_space = (_mask(ids, vocabulary_size) for ids in (lettered, after_a_space))  # (V,)

    @staticmethod
    def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """Id -> what a token adds to the text, with the space before a word; special tokens add nothing.

        A byte of a letter that takes several bytes counts as a letter: with the next byte it may make a word.
        """
        how, special = tokenizer_style(tokenizer), set(tokenizer.all_special_ids)
        return {
            id: "".join(chr(byte) if byte < 128 else "x" for byte in token_bytes(token, how))
            for token, id in tokenizer.get_vocab().items()
            if id not in special
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        words = torch.tensor([count_words(text) for text in texts], device=scores.device)
        in_word = torch.tensor([text[-1:].isalnum() for text in texts], device=scores.device)
        scores = scores.clone()
        scores[words < self.min_words, self.end_id] = -torch.inf
        full = words >= self.max_words
        if full.any():
            scores[full] = self._end_at_next_word(scores[full], in_word[full])
        return scores

    def _end_at_next_word(self, scores: Tensor, in_word: Tensor) -> Tensor:
        # "##s", or "s" without a space before it, continues an open word; after a comma it would begin a word
        after_a_space, lettered = self.after_a_space.to(scores.device), self.lettered.to(scores.device)
        begins_word = torch.where(in_word[:, None], after_a_space, lettered)  # (B, V)
        surplus = scores.masked_fill(~begins_word, -torch.inf).logsumexp(-1)
        scores = scores.masked_fill(begins_word, -torch.inf)
        scores[:, self.end_id] = torch.logaddexp(scores[:, self.end_id], surplus)
        return scores


def _mask(ids: Iterable[int], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(ids)] = True
    return mask
