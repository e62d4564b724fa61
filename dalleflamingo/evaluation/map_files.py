"""A vocabulary map on disk: `map.safetensors`, the entries of M, and `map.json`, its kind and its vocabularies."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase as Tokenizer

from dalleflamingo.vocabulary import VocabularyMap, sparse_matrix


def save_map(vocabulary_map: VocabularyMap, folder: str | Path) -> None:
    """Write a map into a folder, which is created if it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    matrix = vocabulary_map.matrix
    rows, columns = matrix.indices()
    entries = {"rows": rows.int(), "columns": columns.int(), "values": matrix.values()}
    save_file({name: tensor.contiguous() for name, tensor in entries.items()}, folder / "map.safetensors")
    about = {"kind": vocabulary_map.kind, "captions": vocabulary_map.captions, "outputs": matrix.shape[0]}
    about |= {side: _fingerprint(getattr(vocabulary_map, side)) for side in ("source", "target")}
    (folder / "map.json").write_text(json.dumps(about, indent=1) + "\n")


def load_map(folder: str | Path, source: Tokenizer, target: Tokenizer) -> VocabularyMap:
    """The map that `save_map` wrote to a folder, for the tokenizers `source` and `target` it was learned for.

    Raises:
        ValueError: it was learned for other vocabularies.
    """
    folder = Path(folder)
    about = json.loads((folder / "map.json").read_text())
    for side, tokenizer in (("source", source), ("target", target)):
        if about[side] != (found := _fingerprint(tokenizer)):
            raise ValueError(
                f"the map in {folder} was learned for another {side} vocabulary ({about[side]['tokens']} tokens) "
                f"than this tokenizer's ({found['tokens']}): load the tokenizers it was learned with, or learn anew"
            )
    entries = load_file(folder / "map.safetensors")
    indices = torch.stack([entries["rows"], entries["columns"]]).long()
    matrix = sparse_matrix(indices, entries["values"], (about["outputs"], len(target)))
    return VocabularyMap(about["kind"], matrix, source, target, about["captions"])


def _fingerprint(tokenizer: Tokenizer) -> dict[str, str | int]:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return {"tokens": len(tokenizer), "sha256": hashlib.sha256(vocabulary).hexdigest()}
