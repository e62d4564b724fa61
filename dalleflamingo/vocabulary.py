"""The map from the captioner's tokens to the generator's, learned from captions (§4.1, App. G).

At every position t of a caption the captioner has a distribution P_t over its vocabulary. The caption itself is known:
in training it is the human caption, otherwise the captioner's argmax. A map turns P into distributions over the
generator's vocabulary, and gradients flow back through it. There are two kinds:

* **one-to-one** is the paper's P·M as we read App. G: every source token becomes one target token. 68 % of COCO's
  captions have the same tokens on both sides, and 67 % arrive unchanged.
* **word-aligned** is ours. At position t the captioner either *follows* the caption by predicting its token s_t, with
  probability p_t = P_t(s_t), or *departs* from it by predicting another token v. Let G_j be the source
  positions whose tokens belong to the target token u_j at position j (see `tokens.py`). Row j of the result is

      Q_j = Σ_{t ∈ G_j}  Π_{i ∈ G_j, i < t} p_i · Σ_{v ≠ s_t} P_t(v) M_v   +   Π_{t ∈ G_j} p_t · e_{u_j}

  The first term holds the departures, each mapped by its own row of M; the second holds the probability that the
  captioner never departs. The weights add up to 1, so every row sums to 1 whatever the captioner predicts. If it is
  certain of the caption, Q is exactly the generator's own tokenization, however differently the two sides tokenize.
  (If G_j is empty, Q_j = e_{u_j}: like a teacher-forced P_t, a row assumes that the caption was followed so far.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer

from dalleflamingo.tokens import (
    Alignment,
    align_texts,
    align_token_ids,
    token_bytes,
    tokenize_captions,
    tokenizer_style,
)

MAP_KINDS = ("one-to-one", "word-aligned")


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyMap:
    """Maps captions of token distributions from a source vocabulary to a target vocabulary.

    Attributes:
        kind: one of `MAP_KINDS`; a map of any other kind is used as P·M.
        matrix: M, sparse (|V_source|, |V_target|), float32. The rows of a learned map sum to 1.
        source: the captioner's tokenizer.
        target: the generator's tokenizer.
        captions: the number of captions that the map was learned from.
    """

    kind: str
    matrix: Tensor
    source: Tokenizer
    target: Tokenizer
    captions: int

    @classmethod
    def learn(
        cls, source: Tokenizer, target: Tokenizer, captions: Sequence[str], kind: str = "word-aligned"
    ) -> "VocabularyMap":
        """Learns a map from the texts of any captions; no images are needed. `kind` is one of `MAP_KINDS`.

        Raises:
            ValueError: there are no captions, the kind is unknown, or as `tokenizer_style`.
            TypeError: `captions` is one string.
        """
        if kind not in MAP_KINDS:
            raise ValueError(f"no map is called {kind!r}: choose one of {', '.join(MAP_KINDS)}")
        if len(captions) == 0:
            raise ValueError("a map is learned from captions, and there are none: was the right file read?")
        alignments = align_texts(source, target, captions)
        counts = _counts(alignments, len(source), len(target), paired_only=kind == "one-to-one")
        fallback = _fallback_ids(source, target)
        matrix = _most_frequent(counts, fallback) if kind == "one-to-one" else _shares(counts, fallback)
        return cls(kind, matrix, source, target, len(captions))

    def resize(self, size: int) -> "VocabularyMap":
        """The same map for a captioner with `size` outputs, more than its tokenizer has tokens.

        BLIP has outputs for [DEC] and [ENC]; other models pad their vocabulary. The extra outputs are mapped to [UNK].

        Raises:
            ValueError: the captioner has fewer outputs than the tokenizer has tokens.
        """
        rows, columns = self.matrix.shape
        if size < rows:
            raise ValueError(f"the model has {size} outputs, its tokenizer {rows} tokens: are they of the same model?")
        more = torch.stack([torch.arange(rows, size), torch.full((size - rows,), self.target.unk_token_id)])
        indices = torch.cat([self.matrix.indices(), more], dim=1)
        values = torch.cat([self.matrix.values(), torch.ones(size - rows)])
        return replace(self, matrix=sparse_matrix(indices, values, (size, columns)))

    def align(self, ids: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> list[Alignment]:
        """Aligns captions between the two vocabularies.

        Args:
            ids: rows of source tokens without special tokens.
            texts: the captions as written, where known. They hold what tokens alone do not (accents, spaces in `. "`).
                A byte-level row begins with a space behind a prompt; its text may have or lack it.
        Raises:
            ValueError: the numbers of texts and rows differ, or a text's tokens are not those of its row.
        """
        if texts is None:
            return align_token_ids(self.source, self.target, ids)
        if len(ids) != len(texts):
            raise ValueError(f"{len(ids)} rows of tokens and {len(texts)} texts: give each row its own text")
        spaced = zip([self.source.decode(list(row[:1]))[:1] == " " for row in ids], texts, strict=True)
        texts = [text if (text[:1] == " ") == space else " " * space + text.lstrip() for space, text in spaced]
        alignments = align_texts(self.source, self.target, texts)
        for row, text, alignment in zip(ids, texts, alignments, strict=True):
            if tuple(map(int, row)) != alignment.source:
                spelled = self.source.decode(list(row))
                raise ValueError(f"the text is {text!r}, but the tokens say {spelled!r}: give each row its own text")
        return alignments

    def target_distributions(self, distributions: Tensor, alignments: Sequence[Alignment]) -> Tensor:
        """Q: captions as distributions over the target vocabulary.

        Args:
            distributions: P, (B, T, |V_source|), T at least the longest caption's; positions after a caption's end
                are ignored.
            alignments: one for each caption.
        Returns:
            (B, T', |V_target|), T' the longest caption in target tokens (in source tokens if the map is not
            word-aligned); rows after a shorter caption's end are 0.
        Raises:
            ValueError: there are no captions, or the shapes do not fit the alignments.
        """
        matrix, size = self.matrix.to(distributions.device, distributions.dtype), len(self.target)
        return self._map(distributions, alignments, matrix, lambda ids: F.one_hot(ids, size).to(distributions.dtype))

    def expected_embeddings(
        self, distributions: Tensor, alignments: Sequence[Alignment], mapped_embeddings: Tensor, embeddings: Tensor
    ) -> Tensor:
        """Q·E, without ever forming Q.

        Args:
            distributions: P, (B, T, |V_source|), as for `target_distributions`.
            alignments: one for each caption.
            mapped_embeddings: M·E, (|V_source|, D).
            embeddings: E, (|V_target|, D).
        Returns:
            (B, T', D), T' as for `target_distributions`.
        Raises:
            ValueError: as `target_distributions`.
        """
        return self._map(distributions, alignments, mapped_embeddings, lambda ids: F.embedding(ids, embeddings))

    def _map(self, distributions: Tensor, alignments: Sequence[Alignment], mapped: Tensor, look_up: Callable) -> Tensor:
        """The equation above times E; `mapped` is M·E, (|V_source|, D), and `look_up` gives the rows of E for ids."""
        if not alignments:
            raise ValueError("there are no captions to map: give at least one")
        source, target, positions = (  # s_t (B, T), u_j (B, T'), j of each t (B, T); −1 after a caption's end
            pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1).to(distributions.device)
            for rows in zip(*alignments, strict=True)
        )
        if distributions.shape[-1] != self.matrix.shape[0]:
            raise ValueError(
                f"distributions over {distributions.shape[-1]} tokens, but the map is for {self.matrix.shape[0]}: if "
                f"the model has outputs that its tokenizer lacks, take `resize({distributions.shape[-1]})`"
            )
        P = distributions[:, : source.shape[1]]
        if P.shape[:2] != source.shape:
            raise ValueError(
                f"distributions of shape {tuple(distributions.shape)} for {len(alignments)} captions of up to "
                f"{source.shape[1]} tokens: give each caption a row, and each of its tokens a position"
            )
        P = P.masked_fill((source < 0)[..., None], 0)
        if self.kind != "word-aligned":
            return _product(P, mapped)
        tokens = source.clamp(min=0)[..., None]  # s_t, (B, T, 1)
        follows = P.gather(2, tokens)[..., 0]  # p_t, (B, T)
        departures = _product(P.scatter(2, tokens, 0), mapped)  # Σ_{v ≠ s_t} P_t(v) M_v E, (B, T, D)
        departing, never = _weights(follows, positions, target.shape[1])  # (B, T', T), (B, T')
        never = never * (target >= 0)
        return departing @ departures + never[..., None] * look_up(target.clamp(min=0))


def _weights(follows: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The weights of the equation above, from p_t, (B, T), and the target position of each source token, (B, T).

    Returns:
        (B, T', T), Π_{i ∈ G_j, i < t} p_i where t ∈ G_j, else 0; and (B, T'), Π_{t ∈ G_j} p_t. T' is `length`.
    """
    belongs = positions[:, None] == torch.arange(length, device=positions.device)[:, None]  # t ∈ G_j, (B, T', T)
    factors = torch.where(belongs, follows[:, None], 1)
    through = factors.cumprod(-1)  # positions outside G_j count as 1
    before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
    return before * belongs, factors.prod(-1)


def _product(distributions: Tensor, mapped: Tensor) -> Tensor:
    """(B, T, V) · (V, D) -> (B, T, D); PyTorch multiplies a sparse matrix from the left only."""
    if not mapped.is_sparse:
        return distributions @ mapped
    flat = distributions.flatten(0, 1)
    return torch.sparse.mm(mapped.t(), flat.t()).t().unflatten(0, distributions.shape[:2])


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _counts(alignments: Sequence[Alignment], rows: int, columns: int, paired_only: bool) -> Tensor:
    """Sparse (rows, columns): how often each source token belonged to each target token.

    With `paired_only` captions count only if their tokens pair up one by one. App. G says only that M is "one-to-one"
    and learned from such captions.
    """
    if paired_only:
        alignments = [one for one in alignments if one.target_positions == tuple(range(len(one.target)))]
    source = np.fromiter((id for one in alignments for id in one.source), np.int64)
    target = np.fromiter(
        (one.target[j] if j >= 0 else -1 for one in alignments for j in one.target_positions), np.int64
    )
    pairs, times = np.unique(np.stack([source, target])[:, target >= 0], axis=1, return_counts=True)
    return sparse_matrix(torch.from_numpy(pairs), torch.from_numpy(times), (rows, columns))


def _fallback_ids(source: Tokenizer, target: Tokenizer) -> Tensor:
    """(|V_source|,) target ids for source tokens that no caption contains: the first target token of the token's text.

    The end of a caption becomes the end of a caption. Every other special token becomes [UNK], which in CLIP is
    <|endoftext|> as well.
    """
    style, special = tokenizer_style(source), set(source.all_special_ids)
    texts = [
        "" if id in special else token_bytes(token, style).decode(errors="ignore").strip()
        for id, token in enumerate(source.convert_ids_to_tokens(list(range(len(source)))))
    ]
    first = [text.ids[0] if text.ids else target.unk_token_id for text in tokenize_captions(target, texts)]
    source_ends = {source.sep_token_id, source.eos_token_id} - {None}
    target_end = target.sep_token_id if target.eos_token_id is None else target.eos_token_id
    return torch.tensor([target_end if id in source_ends else target_id for id, target_id in enumerate(first)])


def _shares(counts: Tensor, fallback: Tensor) -> Tensor:
    """Each row of the counts divided by its sum; where nothing was counted, 1 at the fallback."""
    totals = counts.sum(1).to_dense()  # (|V_source|,)
    rows, columns = counts.indices()
    unseen = (totals == 0).nonzero()[:, 0]
    indices = torch.stack([torch.cat([rows, unseen]), torch.cat([columns, fallback[unseen]])])
    values = torch.cat([counts.values() / totals[rows], torch.ones(len(unseen))])
    return sparse_matrix(indices, values, counts.shape)


def _most_frequent(counts: Tensor, fallback: Tensor) -> Tensor:
    """A single 1 in each row, at its largest count (the largest id if counts tie), or else at the fallback."""
    rows, columns = counts.indices()
    order = counts.values().argsort(stable=True)  # the largest is written last
    chosen = fallback.clone().numpy()
    chosen[rows[order].numpy()] = columns[order].numpy()
    indices = torch.stack([torch.arange(len(chosen)), torch.from_numpy(chosen)])
    return sparse_matrix(indices, torch.ones(len(chosen)), counts.shape)


def sparse_matrix(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix M from the (2, N) places and (N,) values of its entries."""
    return torch.sparse_coo_tensor(indices, values.float(), shape, check_invariants=True).coalesce()
