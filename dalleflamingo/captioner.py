"""Pictures to captions: K seeded candidates by sampling, or one by beam search (§3, App. A.2).

A candidate is a function of its picture and its seed, not of the batch it was written in: the next token is

    w_t = argmax_v  log p(v | w_<t, x) + g_v,    g_v ~ Gumbel(0, 1) from the candidate's own generator,

which is stock greedy search with noise added by a logits processor (`decoding.py`). The picture is encoded once,
whatever K is. (In float16 a GPU may round differently in another batch, and a rare near-tie falls the other way.)
"""

from collections.abc import Sequence
from itertools import chain

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor, LogitsProcessor, LogitsProcessorList

from dalleflamingo.decoding import GumbelNoise, Nucleus, Strategy, Temperature, TopK, WordLimits, count_words
from dalleflamingo.weights import check_weights

__all__ = ["Captioner", "Nucleus", "TopK", "Temperature", "count_words"]

PAPER = Nucleus(p=0.9)


class Captioner:
    """BLIP (an image encoder and a text decoder) with its processor.

    Args:
        prompt: what every caption silently begins with. BLIP was finetuned behind "a picture of", and the paper cuts
            that off; transformers' own default is none.
    """

    def __init__(self, model: BlipForConditionalGeneration, processor: BlipProcessor, prompt: str = ""):
        self.model, self.processor = model.eval(), processor
        start = processor.tokenizer(prompt).input_ids[:-1]  # [CLS] prompt, without [SEP]
        self.prompt_ids = torch.tensor([model.config.text_config.bos_token_id, *start[1:]])  # (P,)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        prompt: str = "",
    ) -> "Captioner":
        """A captioner from a folder or a hub.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        name = check_weights(name_or_path)
        where = {} if revision is None else {"revision": revision}
        model = BlipForConditionalGeneration.from_pretrained(name, dtype=dtype, use_safetensors=True, **where)
        return cls(model.to(device), BlipProcessor.from_pretrained(name, **where), prompt)

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
        image_embeds = self._encode(images)  # (B, P, D)
        image_embeds = image_embeds.repeat_interleave(counts.to(image_embeds.device), dim=0)  # (B·K, P, D)
        rules = [self._word_limits(min_words, max_words), strategy.warper(), GumbelNoise(seeds=flat)]
        captions = iter(self._write(image_embeds, rules))
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
            a caption stand [SEP] and padding. Their softmax is P of the bridge.
        Raises:
            ValueError: not as many captions as pictures.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures but {len(captions)} captions: give each picture one")
        tokenizer, device = self.processor.tokenizer, self.model.device
        said = tokenizer(list(captions), padding=True, return_tensors="pt")
        ids = said.input_ids[:, 1:].to(device)  # (B, T) words, [SEP], padding
        mask = said.attention_mask[:, 1:].to(device)
        prompt = self.prompt_ids.to(device).expand(len(ids), -1)  # (B, P)
        inputs = torch.cat([prompt, ids[:, :-1]], dim=1)
        seen = self.model.vision_model(self._pixels(images)).last_hidden_state
        decoded = self.model.text_decoder(
            input_ids=inputs,
            attention_mask=torch.cat([torch.ones_like(prompt), mask[:, :-1]], dim=1),
            encoder_hidden_states=seen,
        )
        return decoded.logits[:, prompt.shape[1] - 1 :], ids

    @torch.no_grad()
    def log_likelihood(self, images: Sequence[Image], captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """(B,) log p(caption | picture), [SEP] included, on the CPU; arguments and errors as `token_logits`."""
        found = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            logits, ids = self.token_logits(images[part], captions[part])
            said = ids != self.processor.tokenizer.pad_token_id
            chosen = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
            found.append((chosen * said).sum(1).cpu())
        return torch.cat(found)

    def _pixels(self, images: Sequence[Image] | Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            images = self.processor(images=list(images), return_tensors="pt").pixel_values
        return images.to(self.model.device, self.model.dtype)  # (B, 3, H, W)

    @torch.no_grad()
    def _encode(self, images: Sequence[Image]) -> Tensor:
        return self.model.vision_model(self._pixels(images)).last_hidden_state

    @torch.no_grad()
    def _write(self, image_embeds: Tensor, rules: list[LogitsProcessor], num_beams: int = 1) -> list[str]:
        config = self.model.config.text_config
        input_ids = self.prompt_ids.to(image_embeds.device).repeat(len(image_embeds), 1)  # (N, P)
        token_ids = self.model.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
            logits_processor=LogitsProcessorList(rules),
            do_sample=False,
            num_beams=num_beams,
            max_length=config.max_position_embeddings,  # words are limited by `rules`, tokens only by the model
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
        )
        written = token_ids[:, len(self.prompt_ids) :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _word_limits(self, min_words: int, max_words: int) -> WordLimits:
        config = self.model.config.text_config
        return WordLimits(
            self.processor.tokenizer,
            vocabulary_size=config.vocab_size,
            prompt_length=len(self.prompt_ids),
            end=config.sep_token_id,
            min_words=min_words,
            max_words=max_words,
        )
