"""The three tokenizers of the miniature, learned from the world's captions; they split words differently.

BLIP has WordPiece (BERT's: `##` marks a token that continues a word). BLIP-2's language model OPT has byte pairs that
include spaces (`Ġ` is the space before a word). Stable Diffusion has CLIP's byte pairs (`</w>` marks a token that ends
a word). The bridge of §4.1 maps between such vocabularies. All are written as ordinary `transformers` folders. The same
texts give the same files in any order: every base symbol gets its id before training, because the trainer breaks ties
between equally frequent pairs by id.
"""

import json
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 … 4
OPT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 … 3; a sentence begins with </s>
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Path:
    """Learn BLIP's WordPiece vocabulary, lower-cased, and write it as a `BertTokenizer` folder.

    Ids: `[PAD] [UNK] [CLS] [SEP] [MASK]`, the characters, the characters with `##`, the learned tokens, and
    `[DEC]` last, as in BLIP. A decoder sentence begins with `[DEC]` (`bos_token`), ends with `[SEP]` (`eos_token`).

    Args:
        texts: the captions to learn from.
        vocab_size: number of ids, special tokens included; fewer if the texts hold fewer different words.
        folder: where to write; made if missing.
    Returns:
        the folder.
    Raises:
        ValueError: if `vocab_size` has no room for the single characters.
    """
    texts = list(texts)
    stock = BertTokenizer().backend_tokenizer
    lowered = (stock.normalizer.normalize_str(text) for text in texts)
    words = {word for text in lowered for word, _ in stock.pre_tokenizer.pre_tokenize_str(text)}
    first = sorted(set(string.ascii_lowercase).union(*words))
    later = sorted(set(string.ascii_lowercase).union(*(word[1:] for word in words)))
    base = [*BERT_SPECIALS, *first, *(f"##{character}" for character in later)]
    _require_room(vocab_size, len(base) + 1, f"{len(first)} characters, {len(later)} with ##, 6 special tokens")

    learner = _learner(models.WordPiece(unk_token="[UNK]"), stock)
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size - 1, special_tokens=base, show_progress=False)
    )
    vocabulary = learner.get_vocab()
    vocabulary["[DEC]"] = len(vocabulary)
    tokenizer = BertTokenizer(vocab=vocabulary, bos_token="[DEC]", eos_token="[SEP]", model_max_length=512)
    return save_tokenizer(tokenizer, folder)


def train_clip_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path, max_length: int = 77) -> Path:
    """Learn Stable Diffusion's byte-pair vocabulary, lower-cased, and write it as a `CLIPTokenizer` folder.

    Ids, as in CLIP: the 256 bytes, the 256 bytes ending a word, one id per merge, `<|startoftext|>`, and last
    `<|endoftext|>`, which also pads: CLIP finds the end of a sentence as the first highest id. Nothing is ever unknown.

    Args:
        texts: the captions to learn from.
        vocab_size: number of ids, special tokens included; fewer if the texts hold fewer different words.
        folder: where to write; made if missing.
        max_length: tokens of a padded caption.
    Returns:
        the folder.
    Raises:
        ValueError: if `vocab_size` has no room for the 512 byte symbols and the two special tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*letters, *(letter + END_OF_WORD for letter in letters)]
    _require_room(vocab_size, len(base) + 2, "256 bytes, 256 bytes ending a word, 2 special tokens")

    learner = _learner(models.BPE(end_of_word_suffix=END_OF_WORD), CLIPTokenizer().backend_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=base, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    vocabulary = learner.get_vocab()
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocabulary |= {START: len(vocabulary), END: len(vocabulary) + 1}
    return save_tokenizer(CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length), folder)


def train_opt_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Path:
    """Learn OPT's byte-pair vocabulary, which keeps letters' case and spaces, and write it as a `GPT2Tokenizer` folder.

    Ids, as in OPT: `<s> <pad> </s> <unk>`, the 256 bytes, one id per merge. A sentence begins with `</s>`; a caption of
    BLIP-2 ends with a line break, which is a byte like others. Nothing is ever unknown.

    Args:
        texts: the captions to learn from.
        vocab_size: number of ids, special tokens included; fewer if the texts hold fewer different words.
        folder: where to write; made if missing.
    Returns:
        the folder.
    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the four special tokens.
    """
    base = [*OPT_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    _require_room(vocab_size, len(base), "256 bytes, 4 special tokens")
    learner = _learner(models.BPE(), GPT2Tokenizer().backend_tokenizer)
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=base, show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    _, pad, end, unknown = OPT_SPECIALS
    names = dict(bos_token=end, eos_token=end, pad_token=pad, unk_token=unknown, add_bos_token=True)
    return save_tokenizer(
        GPT2Tokenizer(vocab=learner.get_vocab(), merges=merges, model_max_length=128, **names), folder
    )


def _learner(model: models.Model, stock: Tokenizer) -> Tokenizer:
    """A tokenizer to train, with the normaliser and the pre-tokenizer of the stock one."""
    learner = Tokenizer(model)
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    return learner


def _require_room(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise ValueError(f"vocab_size is {vocab_size}, but {needed} ids are needed before anything is learned ({what})")


def save_tokenizer(tokenizer: BertTokenizer | CLIPTokenizer | GPT2Tokenizer, folder: str | Path) -> Path:
    """Write tokenizer.json, and vocab.txt or vocab.json and merges.txt for older transformers and human readers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    return folder
