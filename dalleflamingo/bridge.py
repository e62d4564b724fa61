"""The differentiable bridge: the text encoder reads a caption as the captioner predicts it, not as a text (§4.1).

To write a text, one samples from the captioner's distributions P, and sampling has no gradient. So the bridge writes
no text. At every position it gives the text encoder the expected embedding Q·E (Q from `vocabulary.py`, E the token
embeddings) in place of a token's embedding. If P is certain, the result is the text encoder's output for that text.
Gradients of a loss on the generator's side flow back through Q to the captioner.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel

from dalleflamingo.decoding import gumbel_noise
from dalleflamingo.tokens import Alignment, tokenizer_style
from dalleflamingo.vocabulary import VocabularyMap

BRIDGE_MODES = ("soft", "straight-through", "gumbel")


def relax(
    logits: Tensor, mode: str = "soft", temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Turns logits into distributions through which gradients flow.

    * soft: softmax(logits / temperature).
    * straight-through: the argmax forward, the gradient of soft backward (Bengio et al. 2013).
    * gumbel: a sample of softmax(logits) forward, soft backward (Jang et al. 2017).

    Args:
        logits: (..., V).
        mode: one of `BRIDGE_MODES`.
        temperature: above 0; in the modes straight-through and gumbel it shapes the gradient only.
        generator: seeds the samples of mode gumbel.
    Returns:
        (..., V), each row sums to 1.
    Raises:
        ValueError: the mode is unknown, or the temperature is not above 0.
    """
    if mode not in BRIDGE_MODES:
        raise ValueError(f"no mode is called {mode!r}: choose one of {', '.join(BRIDGE_MODES)}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: it divides the logits and must be above 0")
    if mode == "gumbel":
        uniform = torch.rand(logits.shape, generator=generator, device=getattr(generator, "device", "cpu"))
        logits = logits + gumbel_noise(uniform).to(logits)
    soft = (logits / temperature).softmax(-1)
    if mode == "soft":
        return soft
    hard = F.one_hot(logits.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the bracket is exactly 0, so a row is exactly one-hot


@contextmanager
def replaced_token_embeddings(text_encoder: CLIPTextModel, embeddings: Tensor) -> Iterator[None]:
    """Inside the context, the text encoder's token embedding returns these embeddings, whatever the ids are.

    `CLIPTextModel` takes ids only, hence a hook on its token embedding. The position embeddings are added as always.

    Args:
        text_encoder: restored on exit, also after an error.
        embeddings: (B, T, D).
    """
    hook = text_encoder.get_input_embeddings().register_forward_hook(lambda module, ids, output: embeddings)
    try:
        yield
    finally:
        hook.remove()


class Bridge:
    """Turns token distributions into the hidden states that condition the generator.

    Args:
        vocabulary_map: from the captioner's tokens to the text encoder's.
        text_encoder: τ, frozen, because M·E is computed only once, here.
    Raises:
        ValueError: the text encoder's number of tokens is not that of the map's target.
    """

    def __init__(self, vocabulary_map: VocabularyMap, text_encoder: CLIPTextModel):
        self.vocabulary_map, self.text_encoder = vocabulary_map, text_encoder
        embeddings = text_encoder.get_input_embeddings().weight  # E, (|V_target|, D)
        if len(embeddings) != vocabulary_map.matrix.shape[1]:
            raise ValueError(
                f"the map leads to {vocabulary_map.matrix.shape[1]} tokens, the text encoder knows {len(embeddings)}: "
                "learn the map for this text encoder's own tokenizer"
            )
        source = vocabulary_map.source
        self.end_ids = {source.sep_token_id, source.eos_token_id, source.pad_token_id} - {None}
        if tokenizer_style(source).byte_level:
            self.end_ids.add(source.convert_tokens_to_ids("Ċ"))  # the line break that ends BLIP-2's captions
        precise = torch.promote_types(embeddings.dtype, torch.float32)
        # on the CPU, as not every device multiplies sparse matrices
        mapped = torch.sparse.mm(vocabulary_map.matrix.to(precise), embeddings.detach().to("cpu", precise))
        self.mapped_embeddings = mapped.to(embeddings)  # M·E, (|V_source|, D)

    def __call__(self, distributions: Tensor, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """τ(Q·E), the hidden states of soft captions.

        Args:
            distributions: P, (B, T, |V_source|), the captioner's, for the tokens *after* its prompt; position t holds
                the distribution of the token `ids[:, t]`.
            ids: (B, T) tokens of the captions: the human ones in training, the argmax otherwise. Tokens from the
                first [SEP], line break or padding on are ignored.
            texts: the captions as written, where they are known.
        Returns:
            (B, 77, D) encoder hidden states, as the stock pipeline computes them for a text.
        """
        alignments = self.vocabulary_map.align(self.caption_ids(ids), texts)
        return self.encode(self.soft_prompt(distributions, alignments))

    def caption_ids(self, ids: Tensor) -> list[list[int]]:
        """The rows of (B, T) ids, each up to the first token that ends or pads a caption."""
        rows = ids.tolist()
        return [row[: next((t for t, id in enumerate(row) if id in self.end_ids), len(row))] for row in rows]

    def soft_prompt(self, distributions: Tensor, alignments: Sequence[Alignment]) -> Tensor:
        """The token embeddings of soft captions: [BOS], Q·E (truncated if too long), [EOS], padding.

        Args:
            distributions: P, (B, T, |V_source|), as for a call.
            alignments: one for each caption.
        Returns:
            (B, 77, D).
        Raises:
            ValueError: as `VocabularyMap.target_distributions`.
        """
        target, embeddings = self.vocabulary_map.target, self.text_encoder.get_input_embeddings().weight
        expected = self.vocabulary_map.expected_embeddings(
            distributions.to(embeddings.dtype), alignments, self.mapped_embeddings, embeddings
        )  # (B, T', D)
        size, by_word = target.model_max_length, self.vocabulary_map.kind == "word-aligned"
        lengths = torch.tensor(
            [len(one.target if by_word else one.source) for one in alignments], device=expected.device
        )
        end = 1 + lengths.clamp(max=size - 2)[:, None]  # position of [EOS], (B, 1)
        positions = torch.arange(size, device=expected.device)
        ids = torch.where(positions == end, target.eos_token_id, target.pad_token_id)
        ids[:, 0] = target.bos_token_id  # (B, 77)
        in_caption = (positions > 0) & (positions < end)
        expected = F.pad(expected, (0, 0, 1, size))[:, :size]  # (B, 77, D), from position 1 on
        return torch.where(in_caption[..., None], expected, F.embedding(ids, embeddings))

    def encode(self, soft_prompt: Tensor) -> Tensor:
        """(B, S, D) token embeddings, S up to 77 -> the text encoder's hidden states, (B, S, D)."""
        ids = torch.zeros(soft_prompt.shape[:2], dtype=torch.long, device=soft_prompt.device)  # not read
        with replaced_token_embeddings(self.text_encoder, soft_prompt):
            return self.text_encoder(ids).last_hidden_state
