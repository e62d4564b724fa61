"""Pictures to captions: K seeded candidates by sampling, or one by beam search (§3, App. A.2).

A candidate is a function of its picture and its seed, not of the batch it was written in: the next token is

    w_t = argmax_v  log p(v | w_<t, x) + g_v,    g_v ~ Gumbel(0, 1) from the candidate's own generator,

which is stock greedy search with noise added by a logits processor (`decoding.py`). The picture is encoded once,
whatever K is: BLIP's text decoder attends to it, BLIP-2's OPT reads the vectors that a Q-Former makes of it. (In
float16 a GPU may round differently in another batch, and a rare near-tie falls the other way.)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
)

from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import GumbelNoise, Nucleus, Strategy, Temperature, TopK, WordLimits, count_words
from dalleflamingo.registry import check_weights

__all__ = ["Captioner", "BlipCaptioner", "Blip2Captioner", "Nucleus", "TopK", "Temperature", "count_words"]

PAPER = Nucleus(p=0.9)


class Captioner(ABC):
    """A captioner with its processor: `Captioner.from_pretrained` tells BLIP from BLIP-2.

    Args:
        prompt: what every caption silently begins with. BLIP was finetuned behind "a picture of", BLIP-2 behind "a
            photo of", and the paper cuts that off; transformers' own default is none.
    Attributes:
        prompt_ids: (P,) what the text model has read before the first word.
    """

    end_id: int  # of the token that ends a caption
    pad_id: int

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, prompt: str = ""):
        self.model, self.processor, self.prompt = model.eval(), processor, prompt
        self.prompt_ids = torch.tensor(self._begin(prompt))

    @staticmethod
    def from_pretrained(
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        prompt: str = "",
    ) -> "Captioner":
        """A captioner from a folder or a hub.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
            ValueError: it holds neither a BLIP nor a BLIP-2.
        """
        name = check_weights(name_or_path)
        where = {} if revision is None else {"revision": revision}
        kind = AutoConfig.from_pretrained(name, **where).model_type
        if kind not in _KINDS:
            raise ValueError(f"{name} holds a model of type {kind!r}: expected one of {', '.join(_KINDS)}")
        captioner, model, processor = _KINDS[kind]
        model = model.from_pretrained(name, dtype=dtype, use_safetensors=True, **where)
        return captioner(model.to(device), processor.from_pretrained(name, **where), prompt)

    def sample(
        self,
        images: Sequence[Image],
        seeds: Sequence[Sequence[int]],
        strategy: Strategy = PAPER,
        min_words: int = 5,
        max_words: int = 30,
    ) -> list[list[str]]:
        """Candidates for each picture, one for each of its seeds.

        Args:
            images: B pictures.
            seeds: (B, K) non-negative integers; rows may differ in length.
            min_words, max_words: kept exactly, unless the model's position table (512 tokens) ends first.
        Returns:
            B lists of K captions.
        Raises:
            ValueError: if there are not as many rows of seeds as pictures, or min_words > max_words.
        """
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)} pictures but {len(seeds)} rows of seeds: give each picture its own seeds")
        flat = list(chain.from_iterable(seeds))
        if not flat:
            return [[] for _ in images]
        counts = torch.tensor([len(row) for row in seeds])
        seen = self._encode(images)  # (B, P, D)
        seen = seen.repeat_interleave(counts.to(seen.device), dim=0)  # (B·K, P, D)
        rules = [self._word_limits(min_words, max_words), strategy.warper(), GumbelNoise(seeds=flat)]
        captions = iter(self._write(seen, rules))
        return [[next(captions) for _ in row] for row in seeds]

    def describe(self, images: Sequence[Image], beams: int = 3, min_words: int = 5, max_words: int = 30) -> list[str]:
        """The likeliest caption of each of B pictures that beam search finds; deterministic."""
        if not images:
            return []
        return self._write(self._encode(images), [self._word_limits(min_words, max_words)], num_beams=beams)

    def token_logits(self, images: Sequence[Image] | Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the captioner would say at each place of given captions (teacher forcing, Eq. 1); gradients pass.

        Args:
            images: B pictures, or their (B, 3, H, W) pixel values as the processor makes them.
            captions: B texts, without the prompt.
        Returns:
            logits (B, T, V) and ids (B, T): `logits[:, t]` is about the place where the caption has `ids[:, t]`. Behind
            a caption stand `end_id` and padding, `pad_id`. Their softmax is P of the bridge.
        Raises:
            ValueError: not as many captions as pictures.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures but {len(captions)} captions: give each picture one")
        ids = self._tokenize(list(captions)).to(self.model.device)  # (B, T) words, end, padding
        prompt = self.prompt_ids.to(ids.device).expand(len(ids), -1)  # (B, P)
        inputs = torch.cat([prompt, ids[:, :-1]], dim=1)
        mask = torch.cat([torch.ones_like(prompt), (ids[:, :-1] != self.pad_id).long()], dim=1)
        logits = self._logits(self.see(self._pixels(images)), inputs, mask)
        return logits[:, prompt.shape[1] - 1 :], ids

    def count_tokens(self, captions: Sequence[str]) -> Tensor:
        """(B,) how many pieces each caption has, its end included."""
        return (self._tokenize(list(captions)) != self.pad_id).sum(1)

    @torch.no_grad()
    def log_likelihood(self, images: Sequence[Image], captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """(B,) log p(caption | picture), its end included, on the CPU; arguments and errors as `token_logits`."""
        found = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            logits, ids = self.token_logits(images[part], captions[part])
            chosen = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
            found.append((chosen * (ids != self.pad_id)).sum(1).cpu())
        return torch.cat(found)

    @abstractmethod
    def see(self, pixel_values: Tensor) -> Tensor:
        """(B, P, D): what the text model is shown of (B, 3, H, W) pictures; gradients pass."""

    @abstractmethod
    def _begin(self, prompt: str) -> list[int]:
        """Ids that precede a caption."""

    @abstractmethod
    def _tokenize(self, captions: list[str]) -> Tensor:
        """(B, T) ids: words, `end_id`, padding."""

    @abstractmethod
    def _logits(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, V): about the token behind each of `input_ids` (B, T), which begin with the prompt."""

    @abstractmethod
    def _generate(self, seen: Tensor, input_ids: Tensor, rules: LogitsProcessorList, **options) -> Tensor:
        """(N, T) ids, of which the first are the (N, P) `input_ids`."""

    def _pixels(self, images: Sequence[Image] | Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            images = self.processor(images=list(images), return_tensors="pt").pixel_values
        return images.to(self.model.device, self.model.dtype)  # (B, 3, H, W)

    @torch.no_grad()
    def _encode(self, images: Sequence[Image]) -> Tensor:
        return self.see(self._pixels(images))

    @torch.no_grad()
    def _write(self, seen: Tensor, rules: list[LogitsProcessor], num_beams: int = 1) -> list[str]:
        config = self.model.config.text_config
        token_ids = self._generate(
            seen,
            self.prompt_ids.to(seen.device).repeat(len(seen), 1),  # (N, P)
            LogitsProcessorList(rules),
            do_sample=False,
            num_beams=num_beams,
            max_length=config.max_position_embeddings,  # words are limited by `rules`, tokens only by the model
            eos_token_id=self.end_id,
            pad_token_id=self.pad_id,
        )
        written = token_ids[:, len(self.prompt_ids) :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _word_limits(self, min_words: int, max_words: int) -> WordLimits:
        return WordLimits(
            self.processor.tokenizer,
            vocabulary_size=self.model.config.text_config.vocab_size,
            prompt_length=len(self.prompt_ids),
            end=self.end_id,
            min_words=min_words,
            max_words=max_words,
        )


class BlipCaptioner(Captioner):
    """BLIP (Li et al. 2022): an image encoder and a text decoder that attends to it. [SEP] ends a caption."""

    def __init__(self, model: BlipForConditionalGeneration, processor: BlipProcessor, prompt: str = ""):
        super().__init__(model, processor, prompt)
        self.end_id, self.pad_id = model.config.text_config.sep_token_id, model.config.text_config.pad_token_id

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values).last_hidden_state

    def _begin(self, prompt: str) -> list[int]:
        words = self.processor.tokenizer(prompt).input_ids[1:-1]  # without [CLS] and [SEP]
        return [self.model.config.text_config.bos_token_id, *words]

    def _tokenize(self, captions: list[str]) -> Tensor:
        return self.processor.tokenizer(captions, padding=True, return_tensors="pt").input_ids[:, 1:]

    def _logits(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.text_decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).logits

    def _generate(self, seen: Tensor, input_ids: Tensor, rules: LogitsProcessorList, **options) -> Tensor:
        return self.model.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            logits_processor=rules,
            **options,
        )


class Blip2Captioner(Captioner):
    """BLIP-2 (Li et al. 2023): a Q-Former asks the image encoder, OPT goes on from its answers.

    OPT reads a vector for each query, </s>, the prompt and the caption, which a line break ends.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor, prompt: str = ""):
        super().__init__(model, processor, prompt)
        self.end_id, self.pad_id = model.config.text_config.eos_token_id, model.config.text_config.pad_token_id

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def _begin(self, prompt: str) -> list[int]:
        config = self.model.config
        queries = [config.image_token_index] * config.num_query_tokens
        words = self.processor.tokenizer(prompt, add_special_tokens=False).input_ids
        return [*queries, config.text_config.bos_token_id, *words]

    def _tokenize(self, captions: list[str]) -> Tensor:
        space = " " * bool(self.prompt)
        words = self.processor.tokenizer([space + caption for caption in captions], add_special_tokens=False).input_ids
        rows = [torch.tensor([*row, self.end_id]) for row in words]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)

    def _logits(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.language_model(
            inputs_embeds=self._embed(seen, input_ids), attention_mask=attention_mask
        ).logits

    def _generate(self, seen: Tensor, input_ids: Tensor, rules: LogitsProcessorList, **options) -> Tensor:
        return self.model.language_model.generate(
            inputs_embeds=self._embed(seen, input_ids),
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            logits_processor=rules,
            **options,
        )

    def _embed(self, seen: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D) embeddings of the ids, those of the queries being what was seen."""
        words = self.model.get_input_embeddings()(input_ids[:, seen.shape[1] :])
        return torch.cat([seen.to(words.dtype), words], dim=1)


def describe(captioner: Captioner, dataset: Dataset, batch_size: int = 32) -> dict[int, str]:
    """Image id -> the caption by beam search, of every picture of a data set. Errors as `Dataset.open`."""
    examples, captions = list(dataset), []
    for start in range(0, len(examples), batch_size):
        captions += captioner.describe([dataset.open(example) for example in examples[start : start + batch_size]])
    return {example.image_id: caption for example, caption in zip(examples, captions, strict=True)}


_KINDS = {
    "blip": (BlipCaptioner, BlipForConditionalGeneration, BlipProcessor),
    "blip-2": (Blip2Captioner, Blip2ForConditionalGeneration, Blip2Processor),
}
