"""Images to captions: K seeded candidates by sampling, or one caption by beam search (§3, App. A.2).

A candidate is a function of its image and its seed, not of the batch it was sampled in: the next token is

    w_t = argmax_v  log p(v | w_<t, x) + g_v,    g_v ~ Gumbel(0, 1) from the candidate's own generator,

which writes what stock greedy search with this noise would write (`decoding.py`). `_sample` is that loop, and drops
captions that have ended. An image is encoded once, whatever K is: BLIP's text decoder attends to its features, while
BLIP-2's OPT reads the vectors that a Q-Former makes of them. (In float16 a GPU may round differently in another batch,
and a rare near-tie falls the other way.)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
)

from dalleflamingo.datasets import Dataset, clean_caption, to_rgb
from dalleflamingo.decoding import PAPER_SAMPLING, GumbelNoise, Strategy, WordLimits
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint, printable
from dalleflamingo.tokens import check_caption, check_vocabulary


class Captioner(ABC):
    """A captioning model with its processor. `Captioner.from_pretrained` opens BLIP and BLIP-2 alike.

    Args:
        model: BLIP or BLIP-2.
        processor: its image processor and tokenizer.
        prompt: what every caption begins with, unseen. BLIP was finetuned behind "a picture of", BLIP-2 behind "a
            photo of", and the paper cuts that off; transformers' own default is none. Spaces around it are dropped.
        decoding: how `describe` searches, as arguments of transformers' `generate`; None: 3 beams, as BLIP does.
    """

    _TEXT_MODEL: str  # names in transformers: of the part that writes, and of the token that ends a caption
    _END: str
    _SPACE = ""  # between the prompt and a caption, where a token holds it

    def __init__(self, model: nn.Module, processor: ProcessorMixin, prompt: str = "", decoding: Mapping | None = None):
        self.model, self.processor, self.prompt = model.eval(), processor, prompt.strip()
        self.decoding = {"num_beams": 3, **(decoding or {})}
        config = model.config.text_config
        self.end_id: int = getattr(config, self._END)  # ends a caption
        self.pad_id: int = config.pad_token_id  # fills a batch behind the ends of its captions
        self.prompt_ids = torch.tensor(self._prompt_ids(self.prompt))  # (P,) tokens before a caption

    @staticmethod
    def from_pretrained(
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        prompt: str = "",
        decoding: Mapping | None = None,
    ) -> "Captioner":
        """A captioner from a folder or a hub, in `dtype` on `device`, with `prompt` and `decoding` as in the class.

        `revision` is the commit, tag or branch of a hub's model; None is its main branch.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
            ValueError: it holds neither a BLIP nor a BLIP-2.
        """
        source = {"pretrained_model_name_or_path": check_weights(name_or_path), "revision": revision or "main"}
        with loading(name_or_path):
            kind = AutoConfig.from_pretrained(**source).model_type
        if kind not in _KINDS:
            raise ValueError(f"{name_or_path} holds a model of type {kind!r}: expected one of {', '.join(_KINDS)}")
        with loading(name_or_path):
            model = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype, use_safetensors=True)
            processor = AutoProcessor.from_pretrained(**source)
            check_vocabulary(processor.tokenizer, model.config.text_config.vocab_size)
        return _KINDS[kind](model.to(device), processor, prompt, decoding)

    @torch.no_grad()
    def sample(
        self,
        images: Sequence[Image],
        seeds: Sequence[Sequence[int]],
        strategy: Strategy = PAPER_SAMPLING,
        min_words: int = 5,
        max_words: int = 30,
    ) -> list[list[str]]:
        """Sampled candidates for each image, one for each of its seeds.

        Args:
            images: B images.
            seeds: (B, K) non-negative integers; rows may differ in length.
            strategy: which tokens may be sampled.
            min_words: fewest words of a caption.
            max_words: most words; both are kept exactly, unless the model's positions (512 tokens) end first.
        Returns:
            B lists of K captions.
        Raises:
            ValueError: there are not as many rows of seeds as images, or min_words > max_words.
        """
        if len(images) != len(seeds):
            raise ValueError(f"{len(images)} images but {len(seeds)} rows of seeds: give each image its own seeds")
        flat = list(chain.from_iterable(seeds))
        if not flat:
            return [[] for _ in images]
        features = self.encode_images(self._pixel_values(images))  # (B, P, D)
        counts = torch.tensor([len(row) for row in seeds], device=features.device)
        rules = [self._word_limits(min_words, max_words), strategy.warper(), GumbelNoise(flat)]
        captions = iter(self._sample(features.repeat_interleave(counts, dim=0), *rules))
        return [[next(captions) for _ in row] for row in seeds]

    @torch.no_grad()
    def describe(self, images: Sequence[Image], min_words: int = 5, max_words: int = 30, **decoding: int) -> list[str]:
        """The likeliest caption of each image that beam search finds; deterministic.

        Word limits and errors as in `sample`; `decoding` changes the captioner's own, as in `num_beams=1`.
        """
        if not images:
            return []
        features = self.encode_images(self._pixel_values(images))  # (B, P, D)
        rules = LogitsProcessorList([self._word_limits(min_words, max_words)])
        return self._generate(features, rules, **self.decoding | decoding)

    def token_logits(self, images: Sequence[Image] | Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The captioner's logits at each position of given captions (teacher forcing, Eq. 1); gradients pass.

        Args:
            images: B images, or their (B, 3, H, W) pixel values as the processor makes them.
            captions: B texts, without the prompt.
        Returns:
            logits (B, T, V) and ids (B, T): `logits[:, t]` predict `ids[:, t]`. A caption is followed by `end_id` and
            padding with `pad_id`. The softmax of the logits is P of the bridge.
        Raises:
            ValueError: there are not as many captions as images, or as `check_caption`.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions: give each image one")
        for caption in captions:
            self.check_caption(caption)
        ids = self._tokenize(self.behind_prompt(captions)).to(self.model.device)  # (B, T) words, end, padding
        prompt = self.prompt_ids.to(ids.device).expand(len(ids), -1)  # (B, P)
        inputs = torch.cat([prompt, ids[:, :-1]], dim=1)
        mask = torch.cat([torch.ones_like(prompt), (ids[:, :-1] != self.pad_id).long()], dim=1)
        given = self._given(self.encode_images(self._pixel_values(images)), inputs)
        if "inputs_embeds" not in given:
            given["input_ids"] = inputs
        logits = getattr(self.model, self._TEXT_MODEL)(attention_mask=mask, **given).logits
        return logits[:, prompt.shape[1] - 1 :], ids

    def count_tokens(self, captions: Sequence[str]) -> Tensor:
        """(B,) number of tokens of each caption, its end included."""
        return (self._tokenize(self.behind_prompt(captions)) != self.pad_id).sum(1)

    def check_caption(self, caption: str) -> None:
        """Refuse a caption that `token_logits` cannot read; errors as `tokens.check_caption`."""
        positions = self.model.config.text_config.max_position_embeddings
        # the end is predicted but never read, so it needs no position
        check_caption(caption, lambda text: len(self.prompt_ids) + int(self.count_tokens([text])) - 1, positions)

    def behind_prompt(self, captions: Sequence[str]) -> list[str]:
        """The texts whose tokens `token_logits` predicts: without spare whitespace, BLIP-2's with a space before them.

        To a byte-level tokenizer the space between the prompt and a caption belongs to the caption's first token, and a
        line break inside a caption is the token that ends it.
        """
        return [f"{self._SPACE if self.prompt else ''}{' '.join(caption.split())}".rstrip() for caption in captions]

    def fingerprint(self) -> str:
        """A text that changes with weights, number format, prompt, decoding, vocabulary and preprocessing."""
        settings = {
            "dtype": str(self.model.dtype),
            "prompt": self.prompt,
            "decoding": self.decoding,
            "vocabulary": self.processor.tokenizer.get_vocab(),
            "image_processor": self.processor.image_processor.to_dict(),
        }
        return fingerprint(type(self).__name__, modules=[self.model], settings=settings)

    @abstractmethod
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, P, D) features of (B, 3, H, W) images, as the text model gets them; gradients pass."""

    @abstractmethod
    def _prompt_ids(self, prompt: str) -> list[int]:
        """Ids before a caption."""

    @abstractmethod
    def _tokenize(self, captions: list[str]) -> Tensor:
        """(B, T) ids: words, `end_id`, padding."""

    @abstractmethod
    def _given(self, features: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """How the text model gets the image: by arguments beside `input_ids`, or by embeddings instead of them."""

    def _pixel_values(self, images: Sequence[Image] | Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            images = self.processor(images=list(map(to_rgb, images)), return_tensors="pt").pixel_values
        return images.to(self.model.device, self.model.dtype)  # (B, 3, H, W)

    def _sample(self, features: Tensor, *rules: LogitsProcessor) -> list[str]:
        """Greedy search over the ruled scores of (N, P, D) features, of which the last rule is the noise.

        It writes the captions of stock greedy search. A caption that has ended leaves the batch, and the model computes
        no more of it.
        """
        ids = self.prompt_ids.to(features.device).repeat(len(features), 1)  # (N, P), then growing
        given, cache = self._given(features, ids), None
        inputs = given if "inputs_embeds" in given else given | {"input_ids": ids}
        rows, written = torch.arange(len(ids)), [ids[0]] * len(ids)  # rows: the captions that `ids` are
        while len(rows):
            output = getattr(self.model, self._TEXT_MODEL)(
                attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **inputs
            )
            scores, cache = output.logits[:, -1].to(torch.float32, copy=True), output.past_key_values
            for rule in rules:
                scores = rule(ids, scores)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
            is_full = ids.shape[1] == self.model.config.text_config.max_position_embeddings  # the rules limit words
            ended = (ids[:, -1] == self.end_id).cpu() | is_full
            for row in torch.nonzero(ended).flatten().tolist():
                written[rows[row]] = ids[row]
            if ended.any():
                left = torch.nonzero(~ended).flatten()
                rows, ids = rows[left], ids[left]
                given = {name: tensor[left] for name, tensor in given.items()}
                cache.batch_select_indices(left.to(ids.device))
                rules[-1].keep(left)
            inputs = given | {"input_ids": ids[:, -1:]}
            inputs.pop("inputs_embeds", None)  # in the cache
        return self._texts(written)

    def _generate(self, features: Tensor, rules: LogitsProcessorList, **decoding: int) -> list[str]:
        prompt = self.prompt_ids.to(features.device).repeat(len(features), 1)  # (N, P)
        positions = self.model.config.text_config.max_position_embeddings
        ids = getattr(self.model, self._TEXT_MODEL).generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **self._given(features, prompt),
            logits_processor=rules,
            do_sample=False,
            eos_token_id=self.end_id,
            pad_token_id=self.pad_id,
            **{"max_new_tokens": positions - prompt.shape[1], **decoding},  # else the rules limit words alone
        )
        return self._texts(ids)

    def _texts(self, ids: Iterable[Tensor]) -> list[str]:
        """Captions from their ids, prompt included."""
        ids = [row[len(self.prompt_ids) :] for row in ids]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _word_limits(self, min_words: int, max_words: int) -> WordLimits:
        size = self.model.config.text_config.vocab_size
        return WordLimits(
            self.processor.tokenizer, size, len(self.prompt_ids), self.end_id, min_words=min_words, max_words=max_words
        )


class BlipCaptioner(Captioner):
    """BLIP (Li et al. 2022): an image encoder and a text decoder that attends to it. [SEP] ends a caption."""

    _TEXT_MODEL, _END = "text_decoder", "sep_token_id"

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values).last_hidden_state

    def _prompt_ids(self, prompt: str) -> list[int]:
        words = self.processor.tokenizer(prompt).input_ids[1:-1]  # without [CLS] and [SEP]
        return [self.model.config.text_config.bos_token_id, *words]

    def _tokenize(self, captions: list[str]) -> Tensor:
        return self.processor.tokenizer(captions, padding=True, return_tensors="pt").input_ids[:, 1:]

    def _given(self, features: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": features}


class Blip2Captioner(Captioner):
    """BLIP-2 (Li et al. 2023): a Q-Former reads the image encoder into a few vectors, OPT continues from them.

    OPT reads a vector for each query, </s>, the prompt and the caption, which a line break ends.
    """

    _TEXT_MODEL, _END, _SPACE = "language_model", "eos_token_id", " "

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def _prompt_ids(self, prompt: str) -> list[int]:
        config = self.model.config
        # only their number counts; folders from before transformers 4.47 have no token that stands for an image
        stands_for_image = self.pad_id if config.image_token_index is None else config.image_token_index
        queries = [stands_for_image] * config.num_query_tokens
        words = self.processor.tokenizer(prompt, add_special_tokens=False).input_ids
        return [*queries, config.text_config.bos_token_id, *words]

    def _tokenize(self, captions: list[str]) -> Tensor:
        words = self.processor.tokenizer(captions, add_special_tokens=False).input_ids
        rows = [torch.tensor([*row, self.end_id]) for row in words]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)

    def _given(self, features: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        words = self.model.get_input_embeddings()(input_ids[:, features.shape[1] :])
        return {"inputs_embeds": torch.cat([features.to(words.dtype), words], dim=1)}  # (B, T, D)


def without_unreadable(dataset: Dataset, captioner: Captioner) -> Dataset:
    """The data set without captions that the captioner cannot read, which are named, and images that then have none."""
    examples = []
    for example in dataset:
        references = []
        for caption in example.references:
            try:
                captioner.check_caption(clean_caption(caption))
                references.append(caption)
            except ValueError as error:
                print(printable(f'Skipped the caption "{caption[:40]}" of image {example.image_id}: {error}'))
        if references or not example.references:
            examples.append(replace(example, references=tuple(references)))
    return replace(dataset, examples=tuple(examples))


_KINDS = {"blip": BlipCaptioner, "blip-2": Blip2Captioner}  # by transformers' model type
