"""Captioners of transformers beyond BLIP and BLIP-2: what `AutoModelForImageTextToText` opens and `generate` drives.

ViT-GPT2 and its kin (an image encoder and a text decoder), GIT, Florence-2, PaliGemma, LLaVA. The journeys need of a
captioner that it samples by seeds, describes by beam search and has a fingerprint. The bridge and cycle finetuning
need more, and stay with `captioner.Captioner`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from dalleflamingo.datasets import to_rgb
from dalleflamingo.decoding import PAPER_SAMPLING, GumbelNoise, Strategy, WordLimits
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint
from dalleflamingo.tokens import check_vocabulary

BATCH = 16  # captions written at once: memory and speed, never a caption
LONGEST = 128  # tokens of a caption; the rules limit its words
_SPACE = "▁"  # of SentencePiece, before a word


@dataclass(frozen=True)
class ImagesAlone:
    """The processor of a model whose text decoder reads nothing but the image."""

    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, images: Sequence[Image], **options: object) -> BatchFeature:
        """The pixel values of images; `options` are those of a text, which there is not, and `return_tensors`."""
        return self.image_processor(images, return_tensors=options["return_tensors"])


class ImageTextCaptioner:
    """An image-to-text model with its processor; to the journeys it is as a `Captioner`.

    Args:
        model: its decoder starts with a token of its own, or continues `prompt`.
        processor: its image processor and tokenizer.
        prompt: the text that is given with an image, as the model's card has it, the token that stands for the image
            included ("USER: <image>\\nDescribe the image in one sentence. ASSISTANT:"). "": none, as for GIT.
        decoding: how `describe` searches, as in `Captioner`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | ImagesAlone,
        prompt: str = "",
        decoding: Mapping | None = None,
    ):
        self.model, self.processor, self.prompt = model.eval(), processor, prompt
        self.decoding = {"num_beams": 3, **(decoding or {})}
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.tokenizer.padding_side = "left"  # a prompt is continued at its right end
        ends = model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.end_ids: list[int] = ends if isinstance(ends, list) else [ends]
        text = model.config.get_text_config(decoder=True)
        self.vocabulary_size: int = text.vocab_size
        self.positions: int = getattr(text, "max_position_embeddings", LONGEST)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        prompt: str = "",
        decoding: Mapping | None = None,
    ) -> "ImageTextCaptioner":
        """A captioner from a folder or a hub; arguments as of `Captioner.from_pretrained`.

        Raises:
            RegistryError: the weights are missing or cut short, or transformers opens no such model for images and
                text.
        """
        source = {"pretrained_model_name_or_path": check_weights(name_or_path), "revision": revision or "main"}
        with loading(name_or_path):
            model = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype, use_safetensors=True)
            if AutoConfig.from_pretrained(**source).model_type == "vision-encoder-decoder":
                parts = AutoImageProcessor.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
                processor = ImagesAlone(*parts)
            else:
                processor = AutoProcessor.from_pretrained(**source)
            found = cls(model.to(device), processor, prompt, decoding)
            check_vocabulary(found.tokenizer, found.vocabulary_size)
            return found

    def sample(
        self,
        images: Sequence[Image],
        seeds: Sequence[Sequence[int]],
        strategy: Strategy = PAPER_SAMPLING,
        min_words: int = 5,
        max_words: int = 30,
    ) -> list[list[str]]:
        """Sampled candidates for each image, one for each of its seeds; arguments and errors as `Captioner.sample`."""
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)} images but {len(seeds)} rows of seeds: give each image its own seeds")
        # an image is encoded again for each of its captions: how its encoding could be repeated differs among models
        repeated = [image for image, row in zip(images, seeds, strict=True) for _ in row]
        flat, captions = list(chain.from_iterable(seeds)), []
        for start in range(0, len(flat), BATCH):
            part = slice(start, start + BATCH)
            rules = [strategy.warper(), GumbelNoise(flat[part])]
            captions += self._generate(repeated[part], rules, min_words, max_words, num_beams=1)
        captions = iter(captions)
        return [[next(captions) for _ in row] for row in seeds]

    def describe(self, images: Sequence[Image], min_words: int = 5, max_words: int = 30, **decoding: int) -> list[str]:
        """The likeliest caption of each image that beam search finds, as `Captioner.describe`."""
        captions = []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            captions += self._generate(batch, [], min_words, max_words, **self.decoding | decoding)
        return captions

    def fingerprint(self) -> str:
        """A text that changes with weights, number format, prompt, decoding, vocabulary and preprocessing."""
        settings = {
            "dtype": str(self.model.dtype),
            "prompt": self.prompt,
            "decoding": [self.decoding, self.model.generation_config.to_diff_dict()],
            "vocabulary": self.tokenizer.get_vocab(),
            "image_processor": self.processor.image_processor.to_dict(),
        }
        return fingerprint(type(self.model).__name__, modules=[self.model], settings=settings)

    @torch.no_grad()
    def _generate(
        self, images: Sequence[Image], rules: Sequence[LogitsProcessor], min_words: int, max_words: int, **decoding: int
    ) -> list[str]:
        text = {"text": [self.prompt] * len(images), "padding": True} if self.prompt else {}
        inputs = self.processor(images=list(map(to_rgb, images)), return_tensors="pt", **text)
        continues = "input_ids" in inputs and not self.model.config.is_encoder_decoder
        before = inputs["input_ids"].shape[1] if continues else 1  # tokens: the prompt, or the one that starts a text
        size, end = self.vocabulary_size, self.end_ids[0]
        limits = AnyWordLimits(self.tokenizer, size, before, end, min_words=min_words, max_words=max_words)
        ids = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            logits_processor=LogitsProcessorList([OneEnd(self.end_ids), limits, *rules]),
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **{"max_new_tokens": min(LONGEST, self.positions - before), **decoding},
        )
        texts = self.tokenizer.batch_decode(ids[:, before:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


class OneEnd(LogitsProcessor):
    """The first of the tokens that end a text gets the probability of all of them, as `WordLimits` knows only one."""

    def __init__(self, end_ids: Sequence[int]):
        self.end_ids = list(end_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        together = scores[:, self.end_ids].logsumexp(-1)
        scores = scores.index_fill(1, torch.tensor(self.end_ids, device=scores.device), -torch.inf)
        scores[:, self.end_ids[0]] = together
        return scores


class AnyWordLimits(WordLimits):
    """`WordLimits` that knows SentencePiece's vocabularies, too: `▁` for a space, `<0x0A>` for a byte."""

    @staticmethod
    def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """As `WordLimits.token_texts`."""
        vocabulary = tokenizer.get_vocab()
        if not any(token.startswith(_SPACE) for token in vocabulary):
            return WordLimits.token_texts(tokenizer)
        special, texts = set(tokenizer.all_special_ids), {}
        for token, id in vocabulary.items():
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            code = int(byte[1], 16) if byte else 0
            text = (chr(code) if code < 128 else "x") if byte else token.replace(_SPACE, " ")
            texts |= {} if id in special else {id: text}
        return texts
