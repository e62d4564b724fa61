"""The differentiable bridge: a caption as the captioner believes it, read by the generator's text encoder (§4.1).

A caption is drawn from the captioner's distributions P, and drawing has no gradient. So nothing is drawn: the expected
embedding of every piece, Q·E with Q from `vocabulary.py`, goes into the text encoder where the embeddings of pieces
would go. If P is certain, this is the text encoder's own reading of the text; if not, the loss of the picture flows
back to whoever was unsure.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel

from dalleflamingo.decoding import gumbel
from dalleflamingo.tokens import Alignment, style
from dalleflamingo.vocabulary import VocabularyMap

MODES = ("soft", "straight-through", "gumbel")


def relax(
    logits: Tensor, mode: str = "soft", temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Logits (..., V) to distributions (..., V) that gradients can pass.

    * soft: softmax(logits / temperature).
    * straight-through: forward the argmax, backward as if soft (Bengio et al. 2013).
    * gumbel: a sample of softmax(logits), hard forward and soft backward (Jang et al. 2017); `generator` seeds it, and
      the temperature shapes the backward pass only.

    Raises:
        ValueError: the mode is unknown, or the temperature is not above 0.
    """
    if mode not in MODES:
        raise ValueError(f"no mode is called {mode!r}: choose one of {', '.join(MODES)}")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: it divides the logits and must be above 0")
    if mode == "gumbel":
        uniform = torch.rand(logits.shape, generator=generator, device=getattr(generator, "device", "cpu"))
        logits = logits + gumbel(uniform).to(logits)
    soft = (logits / temperature).softmax(-1)
    if mode == "soft":
        return soft
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


@contextmanager
def replaced_token_embeddings(text_encoder: CLIPTextModel, embeddings: Tensor) -> Iterator[None]:
    """While it lasts, the text encoder's token embedding gives these (B, T, D) embeddings, whichever ids are asked for.

    `CLIPTextModel` takes no embeddings, and where its inner model is kept differs between versions of transformers; a
    hook on the embedding works in all of them. Positions are added behind it, as ever.
    """
    hook = text_encoder.get_input_embeddings().register_forward_hook(lambda module, ids, output: embeddings)
    try:
        yield
    finally:
        hook.remove()


class Bridge:
    """Token distributions to the text states that condition the generator.

    Args:
        vocabulary_map: from the captioner's tokens to the text encoder's.
        text_encoder: τ, frozen: M·E is computed once, here.
        ends_kept: as in the code that the authors released: [SEP] and the padding behind it cross, too, and the prompt
            ends with them, unpadded.
    Raises:
        ValueError: the text encoder's table has another number of pieces than the map's target; or ends are to be kept
            by a map that carries words.
    """

    def __init__(self, vocabulary_map: VocabularyMap, text_encoder: CLIPTextModel, ends_kept: bool = False):
        self.map, self.text_encoder, self.ends_kept = vocabulary_map, text_encoder, ends_kept
        if ends_kept and vocabulary_map.kind == "word-aligned":
            raise ValueError("[SEP] is in no word, which is all that the word-aligned map carries: take another map")
        table = text_encoder.get_input_embeddings().weight
        if len(table) != vocabulary_map.matrix.shape[1]:
            raise ValueError(
                f"the map leads to {vocabulary_map.matrix.shape[1]} pieces, the text encoder knows {len(table)}: "
                "learn the map for this text encoder's own tokenizer"
            )
        source = vocabulary_map.source
        self.ends = {source.sep_token_id, source.eos_token_id, source.pad_token_id} - {None}
        if style(source).spaced:
            self.ends.add(source.convert_tokens_to_ids("Ċ"))  # the line break that ends BLIP-2's captions
        precise = torch.promote_types(table.dtype, torch.float32)
        matrix = vocabulary_map.matrix.to(table.device, precise)
        self.readings = torch.sparse.mm(matrix, table.detach().to(precise)).to(table.dtype)  # M·E, (|V_source|, D)

    def __call__(self, distributions: Tensor, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """τ of soft captions.

        Args:
            distributions: (B, T, |V_source|), the captioner's, of the pieces *after* its prompt; position t says what
                `ids[:, t]` could have been.
            ids: (B, T) pieces of the path: the teacher-forced caption in training, the argmax otherwise. From the
                first [SEP] (line break, padding) on they are dropped.
            texts: the captions as written, where known.
        Returns:
            (B, 77, D) encoder hidden states, as the stock pipeline makes them of a text.
        """
        if self.ends_kept:
            paths = [Alignment(tuple(row), (), (-1,) * len(row)) for row in ids.tolist()]
        else:
            paths = self.map.paths(self.spoken(ids), texts)
        return self.encode(self.soft_prompt(distributions, paths), paths)

    def spoken(self, ids: Tensor) -> list[list[int]]:
        """Rows of ids up to the first that ends or pads a caption."""
        rows = ids.tolist()
        return [row[: next((t for t, id in enumerate(row) if id in self.ends), len(row))] for row in rows]

    def soft_prompt(self, distributions: Tensor, paths: Sequence[Alignment]) -> Tensor:
        """(B, 77, D) token embeddings: [BOS], the soft caption, cut where the room for it ends, [EOS], padding."""
        table = self.text_encoder.get_input_embeddings().weight
        carried = self.map.carry(distributions.to(table.dtype), paths, self.readings, table)  # (B, T', D)
        ids, soft = self._layout(paths)
        frame = F.embedding(ids, table)  # the hard prompt
        room = ids.shape[1] - 2
        inner = torch.where(
            soft[:, 1 : 1 + room, None], F.pad(carried, (0, 0, 0, room))[:, :room], frame[:, 1 : 1 + room]
        )
        return torch.cat([frame[:, :1], inner, frame[:, -1:]], dim=1)

    def encode(self, soft_prompt: Tensor, paths: Sequence[Alignment]) -> Tensor:
        """(B, 77, D) token embeddings to (B, 77, D) hidden states."""
        ids, _ = self._layout(paths)
        with replaced_token_embeddings(self.text_encoder, soft_prompt):
            return self.text_encoder(ids).last_hidden_state

    def _layout(self, paths: Sequence[Alignment]) -> tuple[Tensor, Tensor]:
        """(B, 77) ids of the hard prompt, and (B, 77) booleans: where the caption stands in it."""
        target = self.map.target
        size = target.model_max_length
        lengths = [len(path.target if self.map.kind == "word-aligned" else path.source) for path in paths]
        if self.ends_kept:
            size = min(size, max(lengths) + 2)
        rows = []
        for path, length in zip(paths, lengths, strict=True):
            inner = [*path.target, *[target.unk_token_id] * length][: min(length, size - 2)]
            row = [target.bos_token_id, *inner, target.eos_token_id]
            rows.append(row + [target.pad_token_id] * (size - len(row)))
        ids = torch.tensor(rows, device=self.readings.device)
        places = torch.arange(size, device=ids.device)
        ends = torch.tensor(lengths, device=ids.device).clamp(max=size - 2)[:, None]
        return ids, (places >= 1) & (places <= ends)
