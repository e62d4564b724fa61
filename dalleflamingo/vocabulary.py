"""The map from the captioner's tokens to the generator's, learned from captions (§4.1, App. G).

Given are the captioner's distributions P (T × |V_source|), one a position, and the caption it walked along, its
*path*: the teacher-forced text in training, its own argmax otherwise. Wanted is the same caption in the generator's
vocabulary, still as distributions, so that gradients find the way back. Three maps:

* **one-to-one**, the paper's P·M as we read App. G: every source piece becomes one target piece. 68 % of COCO captions
  fall into the same pieces, 67 % cross unchanged.
* **released**, the authors' code as described: a target piece reads off the source piece it is paired with, so that
  one source piece may become many target pieces, and mass is made.
* **word-aligned**, ours. Walking along the path, the captioner takes its piece s_t with probability p_t = P_t(s_t) or
  *departs* from it to some other piece v. Target place j holds the source places G_j that begin in it, and its row is

      Q_j = Σ_{t ∈ G_j}  Π_{i ∈ G_j, i < t} p_i · Σ_{v ≠ s_t} P_t(v) M_v   +   Π_{t ∈ G_j} p_t · e_{u_j}

  the departures on the way, each read by its row of M, and the path's own target piece u_j for all who never departed.
  The weights telescope to 1, so a row sums to 1 whatever the captioner says, and a caption said with certainty is
  exactly the target's own reading of the text, however differently the two cut it. (A place in which no source piece
  begins is e_{u_j}: like a teacher-forced P_t, a row is given that the path was kept until there.)
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dalleflamingo.tokens import (
    END_OF_WORD,
    Alignment,
    align_texts,
    align_token_ids,
    style,
    token_bytes,
    tokenize_captions,
)

KINDS = ("one-to-one", "released", "word-aligned")


class VocabularyMap:
    """Carries captions of token distributions from a source to a target vocabulary.

    Attributes:
        kind: one of `KINDS`.
        matrix: M, sparse (|V_source|, |V_target|), float32; rows sum to 1, but for those of `released`.
        source, target: the tokenizers.
        captions: how many it was learned from.
    """

    def __init__(
        self,
        kind: str,
        matrix: Tensor,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        captions: int,
    ):
        self.kind, self.matrix, self.captions = kind, matrix, captions
        self.source, self.target = source, target

    @classmethod
    def learn(
        cls,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        captions: Sequence[str],
        kind: str = "word-aligned",
    ) -> "VocabularyMap":
        """A map from any corpus of captions.

        Raises:
            ValueError: there are no captions, the kind is unknown, or a tokenizer is of a kind that is not known here
                or, for "released", not WordPiece on the one side and byte pairs with `</w>` on the other.
            TypeError: `captions` is one string.
        """
        if kind not in KINDS:
            raise ValueError(f"no map is called {kind!r}: choose one of {', '.join(KINDS)}")
        if len(captions) == 0:
            raise ValueError("a map is learned from captions, and there are none: was the right file read?")
        if kind == "released":
            return cls(kind, _released(source, target), source, target, captions=0)
        paths = align_texts(source, target, captions)
        counts = _counts(paths, len(source), len(target), alike_only=kind == "one-to-one")
        readings = _readings(source, target)
        matrix = _normalised(counts, readings) if kind == "word-aligned" else _most_frequent(counts, readings)
        return cls(kind, matrix, source, target, len(captions))

    def save(self, folder: str | Path) -> None:
        """`map.safetensors` (the entries of M) and `map.json` (kind, size, fingerprints of both vocabularies)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows, columns = self.matrix.indices()
        entries = {"rows": rows.int(), "columns": columns.int(), "values": self.matrix.values()}
        save_file({name: tensor.contiguous() for name, tensor in entries.items()}, folder / "map.safetensors")
        about = {"kind": self.kind, "captions": self.captions, "outputs": self.matrix.shape[0]}
        about |= {side: _fingerprint(getattr(self, side)) for side in ("source", "target")}
        (folder / "map.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(
        cls, folder: str | Path, source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
    ) -> "VocabularyMap":
        """The map that `save` wrote, identical.

        Raises:
            ValueError: it was learned for other vocabularies than these.
        """
        folder = Path(folder)
        about = json.loads((folder / "map.json").read_text())
        for side, tokenizer in (("source", source), ("target", target)):
            if about[side] != (found := _fingerprint(tokenizer)):
                raise ValueError(
                    f"the map in {folder} was learned for another {side} vocabulary ({about[side]['pieces']} pieces) "
                    f"than this tokenizer's ({found['pieces']}): load the tokenizers it was learned with, or learn anew"
                )
        entries = load_file(folder / "map.safetensors")
        where = torch.stack([entries["rows"], entries["columns"]]).long()
        matrix = _sparse(where, entries["values"], (about["outputs"], len(target)))
        return cls(about["kind"], matrix, source, target, about["captions"])

    def widened(self, size: int) -> "VocabularyMap":
        """The same map for a model with more outputs than its tokenizer has pieces.

        BLIP's [DEC] and [ENC] are such, and padding to a round number. They spell nothing and are read as [UNK].

        Raises:
            ValueError: the model has fewer outputs than the tokenizer has pieces.
        """
        rows, columns = self.matrix.shape
        if size < rows:
            raise ValueError(f"the model has {size} outputs, its tokenizer {rows} pieces: are they of the same model?")
        more = torch.stack([torch.arange(rows, size), torch.full((size - rows,), self.target.unk_token_id)])
        where = torch.cat([self.matrix.indices(), more], dim=1)
        values = torch.cat([self.matrix.values(), torch.ones(size - rows)])
        return VocabularyMap(
            self.kind, _sparse(where, values, (size, columns)), self.source, self.target, self.captions
        )

    def paths(self, ids: Sequence[Sequence[int]], texts: Sequence[str] | None = None) -> list[Alignment]:
        """How captions cross.

        Args:
            ids: rows of source pieces without special tokens.
            texts: the captions as written, where they are known; what pieces alone cannot tell (accents, `."`) then
                crosses too.
        Raises:
            ValueError: not as many texts as rows, or a text that is not what its ids say.
        """
        if texts is None:
            return align_token_ids(self.source, self.target, ids)
        if len(ids) != len(texts):
            raise ValueError(f"{len(ids)} rows of tokens and {len(texts)} texts: give each row its own text")
        paths = align_texts(self.source, self.target, texts)
        for row, text, path in zip(ids, texts, paths, strict=True):
            if tuple(map(int, row)) != path.source:
                said = self.source.decode(list(row))
                raise ValueError(f"the text is {text!r}, but the tokens say {said!r}: give each row its own text")
        return paths

    def rows(self, distributions: Tensor, paths: Sequence[Alignment]) -> Tensor:
        """Soft captions in the target vocabulary.

        Args:
            distributions: (B, T, |V_source|), T at least the longest path; what stands behind a path is not read.
        Returns:
            (B, T', |V_target|), T' the longest caption there (here, with the other two maps), in pieces; rows behind a
            shorter caption are 0.
        Raises:
            ValueError: there are no captions, or the shapes do not fit the paths.
        """
        readings = self.matrix.to(distributions.device, distributions.dtype)
        return self._carry(
            distributions, paths, readings, lambda ids: F.one_hot(ids, len(self.target)).to(distributions.dtype)
        )

    def carry(self, distributions: Tensor, paths: Sequence[Alignment], readings: Tensor, table: Tensor) -> Tensor:
        """`rows` times a table, Q·E, from M·E and E, without ever writing the rows down.

        Args:
            distributions: (B, T, |V_source|).
            readings: M·E, (|V_source|, D).
            table: E, (|V_target|, D).
        Returns:
            (B, T', D), T' as for `rows`.
        Raises:
            ValueError: as `rows`.
        """
        return self._carry(distributions, paths, readings, lambda ids: F.embedding(ids, table))

    def _carry(
        self, distributions: Tensor, paths: Sequence[Alignment], readings: Tensor, look_up: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if not paths:
            raise ValueError("there are no captions to carry: give at least one")
        source, target, lands = (_padded(part, distributions.device) for part in zip(*paths, strict=True))
        if distributions.shape[-1] != self.matrix.shape[0]:
            raise ValueError(
                f"distributions over {distributions.shape[-1]} pieces, but the map is for {self.matrix.shape[0]}: if "
                f"the model has outputs that its tokenizer lacks, take `widened({distributions.shape[-1]})`"
            )
        soft = distributions[:, : source.shape[1]]
        if soft.shape[:2] != source.shape:
            raise ValueError(
                f"distributions of shape {tuple(distributions.shape)} for {len(paths)} captions of up to "
                f"{source.shape[1]} pieces: give each caption a row, and each of its pieces a position"
            )
        soft = soft.masked_fill((source < 0)[..., None], 0)
        if self.kind != "word-aligned":
            return _product(soft, readings)
        spoken = source.clamp(min=0)[..., None]  # (B, T, 1)
        kept = soft.gather(2, spoken)[..., 0]  # p_t, (B, T)
        departures = _product(soft.scatter(2, spoken, 0), readings)  # (B, T, D)
        arrive, stay = _arrivals(kept, lands, target.shape[1])
        stay = stay * (target >= 0)
        return arrive @ departures + stay[..., None] * look_up(target.clamp(min=0))


def _arrivals(kept: Tensor, lands: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """The weights of the word-aligned map.

    Args:
        kept: p_t, (B, T); lands: (B, T), the target place of each source place or −1; places: T'.
    Returns:
        (B, T', T), Π_{i ∈ G_j, i < t} p_i where t ∈ G_j, else 0; and (B, T'), Π_{t ∈ G_j} p_t.
    """
    inside = lands[:, None] == torch.arange(places, device=lands.device)[:, None]  # (B, T', T)
    factors = torch.where(inside, kept[:, None], 1)
    through = factors.cumprod(-1)  # places outside G_j count as 1
    before = torch.cat([torch.ones_like(through[..., :1]), through[..., :-1]], dim=-1)
    return before * inside, factors.prod(-1)


def _product(distributions: Tensor, readings: Tensor) -> Tensor:
    """(B, T, V) · (V, D) -> (B, T, D); sparse readings are multiplied from the left, as PyTorch wants it."""
    if not readings.is_sparse:
        return distributions @ readings
    flat = distributions.flatten(0, 1)
    return torch.sparse.mm(readings.t(), flat.t()).t().unflatten(0, distributions.shape[:2])


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, longest) integers, −1 behind each row."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _counts(paths: Sequence[Alignment], rows: int, columns: int, alike_only: bool) -> Tensor:
    """Sparse (rows, columns): how often a source piece began in a target piece.

    alike_only: count captions that both sides cut into as many pieces, each beginning in its own: the paper says that
    M is "one-to-one" and learned from such captions, and no more.
    """
    kept = [path for path in paths if not alike_only or path.lands == tuple(range(len(path.target)))]
    source = np.fromiter((id for path in kept for id in path.source), np.int64)
    target = np.fromiter((path.target[land] if land >= 0 else -1 for path in kept for land in path.lands), np.int64)
    pairs, times = np.unique(np.stack([source, target])[:, target >= 0], axis=1, return_counts=True)
    return _sparse(torch.from_numpy(pairs), torch.from_numpy(times), (rows, columns))


def _readings(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> Tensor:
    """(|V_source|,) the target piece that the text of each source piece begins with: the reading of a rare piece.

    The end of a caption is read as the end of a caption, every other special token as [UNK] (which CLIP writes the
    same: <|endoftext|>).
    """
    how, special = style(source), set(source.all_special_ids)
    tokens = source.convert_ids_to_tokens(list(range(len(source))))
    texts = [
        "" if id in special else token_bytes(token, how).decode(errors="ignore").strip()
        for id, token in enumerate(tokens)
    ]
    first = [cut.ids[0] if cut.ids else target.unk_token_id for cut in tokenize_captions(target, texts)]
    ends = {source.sep_token_id, source.eos_token_id} - {None}
    end = target.sep_token_id if target.eos_token_id is None else target.eos_token_id
    return torch.tensor([end if id in ends else piece for id, piece in enumerate(first)])


def _normalised(counts: Tensor, readings: Tensor) -> Tensor:
    """Counts as shares of each row; where nothing was counted, all to the reading."""
    totals = counts.sum(1).to_dense()  # (|V_source|,)
    rows, columns = counts.indices()
    unseen = (totals == 0).nonzero()[:, 0]
    where = torch.stack([torch.cat([rows, unseen]), torch.cat([columns, readings[unseen]])])
    values = torch.cat([counts.values() / totals[rows], torch.ones(len(unseen))])
    return _sparse(where, values, counts.shape)


def _most_frequent(counts: Tensor, readings: Tensor) -> Tensor:
    """One 1 a row, at the largest count, of equals at the largest id; where nothing was counted, at the reading."""
    rows, columns = counts.indices()
    order = counts.values().argsort(stable=True)  # the largest is written last
    chosen = readings.clone().numpy()
    chosen[rows[order].numpy()] = columns[order].numpy()
    where = torch.stack([torch.arange(len(chosen)), torch.from_numpy(chosen)])
    return _sparse(where, torch.ones(len(chosen)), counts.shape)


def _released(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> Tensor:
    """Every target piece reads off one source piece: its equal, inside a word else its equal with ##, else [UNK].

    A reconstruction: of the authors' 49,408 pairs 13,038 are equal and word-final, 829 equal inside a word, 1,469 equal
    to a ## piece, 5,189 unequal by no rule that we know, 28,883 [UNK]. Ours has 18,034, 5,064, 1,051, none, and 25,259.
    """
    prefix = style(source).continuation_prefix
    if not prefix or not style(target).ends:
        raise ValueError("the released rule leads from WordPiece to byte pairs with </w>: learn another kind of map")
    ids, unknown = source.get_vocab(), source.unk_token_id
    pairs = [unknown] * len(target)
    for token, column in target.get_vocab().items():
        text = token.removesuffix(END_OF_WORD)
        pairs[column] = ids.get(text, ids.get(prefix + text, unknown) if not token.endswith(END_OF_WORD) else unknown)
    where = torch.stack([torch.tensor(pairs), torch.arange(len(target))])
    return _sparse(where, torch.ones(len(target)), (len(source), len(target)))


def _sparse(where: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(where, values.float(), shape, check_invariants=True).coalesce()


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | int]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {"pieces": len(tokenizer), "sha256": hashlib.sha256(vocabulary).hexdigest()}
