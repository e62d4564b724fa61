"""What compares texts by their embeddings: CLIP's text encoder and SBERT (§3.1, Table 2)."""

from collections.abc import Callable, Sequence

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from dalleflamingo.registry import check_weights, loading
from dalleflamingo.similarity import Encoder, load_clip
from dalleflamingo.tokens import check_vocabulary

SBERT_TOKENS = 256


class ClipText(Encoder[str]):
    """CLIP's projected text embedding (the paper: ViT-L/14). Tokens beyond the model's limit, 77, are not read."""

    name = "text_clip"

    def __init__(self, model: open_clip.CLIP, tokenizer: Callable[[Sequence[str]], Tensor]):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.settings = {"tokens": getattr(tokenizer, "context_length", None)}

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "ClipText":
        """CLIP's text encoder on `device`; other arguments and errors as `load_clip`."""
        model, _, tokenizer = load_clip(name_or_path, revision)
        model.visual = nn.Identity()  # not needed, and the larger half
        return cls(model.to(device), tokenizer)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self._device))


class Sbert(Encoder[str]):
    """SBERT, all-MiniLM-L6-v2: the mean of the last layer's token embeddings, 384-d and of length 1.

    The paper takes the [CLS] embedding; this model was trained for the mean, of texts of at most `SBERT_TOKENS`.
    """

    name = "text_sbert"

    def __init__(self, model: PreTrainedModel, tokenizer: Callable):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.settings = {"vocabulary": tokenizer.get_vocab(), "tokens": SBERT_TOKENS}

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "Sbert":
        """SBERT from a folder or a hub; arguments and errors as `Dino.from_pretrained`."""
        source = {"pretrained_model_name_or_path": check_weights(name_or_path), "revision": revision or "main"}
        with loading(name_or_path):
            model = AutoModel.from_pretrained(**source, dtype=torch.float32, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(**source)
            check_vocabulary(tokenizer, model.config.vocab_size)
        return cls(model.to(device), tokenizer)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        options = dict(padding=True, truncation=True, max_length=SBERT_TOKENS, return_tensors="pt")
        inputs = self.tokenizer(list(texts), **options).to(self._device)
        mask = inputs.attention_mask.unsqueeze(-1)  # (B, T, 1)
        hidden_states = self.model(**inputs).last_hidden_state * mask
        return F.normalize(hidden_states.sum(1) / mask.sum(1), dim=-1)
