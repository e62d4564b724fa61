"""What the code that the authors released does differently from their paper (App. G and H): map, bridge and x̂.

Each difference is a switch of the ablations. Their map is a gather index: every target token reads off one source
token. Their bridge does not stop at [SEP]: what the captioner predicts there and behind it becomes a part of the
prompt, which is not padded to the length that the text encoder was trained with. Their x̂ is decoded from what the
scheduler's `step` makes of the clean latents, z for z_t, and it reaches the captioner without its normalisation. In
training their captioner is in train mode, where BLIP's dropout acts, and latents are sampled from the autoencoder's
distribution, where ours are its mean. Label smoothing, too, is theirs; that is a field of `Losses`.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    CLIPTextModel,
    LogitsProcessor,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, TrainableParameters, build_cycle
from dalleflamingo.cycle_losses import Batch, Cycle, resized_pixels
from dalleflamingo.datasets import Dataset
from dalleflamingo.generator import Generator, NoisyLatents
from dalleflamingo.tokens import END_OF_WORD, Alignment, tokenizer_style
from dalleflamingo.vocabulary import VocabularyMap

DROPOUT = 0.1  # of BLIP's text model as its authors train it, and of BLIP-2's Q-Former


def released_map(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> VocabularyMap:
    """The authors' map as described: it needs no captions, and its rows do not sum to 1.

    A target token reads off the source token of the same text; a target token inside a word that has none, off the
    equal token with ##; every other target token off [UNK]. So one source token may become many target tokens, each
    with its whole probability.

    A reconstruction: of the authors' 49,408 pairs 13,038 are equal and word-final, 829 equal inside a word, 1,469 equal
    to a ## token, 5,189 unequal by no rule that we know, 28,883 [UNK]. Ours has 18,034, 5,064, 1,051, none, and 25,259.

    Args:
        source: the captioner's tokenizer, WordPiece.
        target: the text encoder's tokenizer, byte pairs with `</w>`.
    Raises:
        ValueError: the tokenizers are of other kinds.
    """
    prefix = tokenizer_style(source).continuation_prefix
    if not prefix or not tokenizer_style(target).end_of_word:
        raise ValueError("the released rule leads from WordPiece to byte pairs with </w>: learn another kind of map")
    ids, unknown = source.get_vocab(), source.unk_token_id
    rows = [unknown] * len(target)
    for token, column in target.get_vocab().items():
        text = token.removesuffix(END_OF_WORD)
        inside = unknown if token.endswith(END_OF_WORD) else ids.get(prefix + text, unknown)
        rows[column] = ids.get(text, inside)
    indices = torch.stack([torch.tensor(rows), torch.arange(len(target))])
    size = len(source), len(target)
    matrix = torch.sparse_coo_tensor(indices, torch.ones(len(target)), size, check_invariants=True).coalesce()
    return VocabularyMap("released", matrix, source, target, captions=0)


@dataclass(frozen=True)
class ReleasedSampling:
    """Nucleus sampling as the authors' code calls it, a strategy for `Captioner.sample` in the place of `Nucleus`.

    Attributes:
        p: of the nucleus.
        repetition_penalty: the score of a token that occurred already is divided by it where it is positive, multiplied
            where it is negative (Keskar et al. 2019); 1: none.
        min_length, max_length: in tokens, the prompt's included (for BLIP only: BLIP-2's query tokens would count,
            too), beside the limits in words: give `sample` the words 0
            to `ANY_WORDS`. A caption is cut off wherever max_length falls, in the middle of a word too. None: no limit.
        end_id: of the token that ends a caption, which the limits need.
    Raises:
        ValueError: a limit without an end_id.
    """

    p: float = 0.9
    repetition_penalty: float = 1.1
    min_length: int | None = None
    max_length: int | None = None
    end_id: int | None = None

    def __post_init__(self):
        if self.end_id is None and (self.min_length, self.max_length) != (None, None):
            raise ValueError("min_length and max_length need end_id, the captioner's, which ends a caption")

    def warper(self) -> LogitsProcessor:
        return _ReleasedWarper(self)


ANY_WORDS = 512  # more words than a captioner has positions: no limit


class _ReleasedWarper(LogitsProcessor):
    def __init__(self, how: ReleasedSampling):
        self.how = how
        self.stock = [RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty)), TopPLogitsWarper(float(how.p))]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        penalty, nucleus = self.stock
        scores, length, end = penalty(input_ids, scores).clone(), input_ids.shape[1], self.how.end_id
        if self.how.min_length is not None and length < self.how.min_length:
            scores[:, end] = -torch.inf
        if self.how.max_length is not None and length >= self.how.max_length:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([end], device=scores.device), 0.0)
        return nucleus(input_ids, scores)


class ReleasedBridge(Bridge):
    """The bridge as the authors released it: [SEP] and the padding behind it cross too, and the prompt ends with them.

    Args:
        vocabulary_map: as for `Bridge`; one that maps token by token.
        text_encoder: as for `Bridge`.
    Raises:
        ValueError: as `Bridge`; or the map is word-aligned.
    """

    def __init__(self, vocabulary_map: VocabularyMap, text_encoder: CLIPTextModel):
        if vocabulary_map.kind == "word-aligned":
            raise ValueError("[SEP] is in no word, which is all that the word-aligned map carries: take another map")
        super().__init__(vocabulary_map, text_encoder)

    def __call__(self, distributions: Tensor, ids: Tensor, texts: Sequence[str] | None = None) -> Tensor:
        """As `Bridge`, but every token of `ids` becomes a part of the prompt, whatever the texts are.

        Returns:
            (B, T + 2, D) encoder hidden states, at most (B, 77, D).
        """
        alignments = [Alignment(tuple(row), (), (-1,) * len(row)) for row in ids.tolist()]
        prompt = self.soft_prompt(distributions, alignments)
        return self.encode(prompt[:, : ids.shape[1] + 2])  # without the padding behind [EOS]


class ReleasedCycle(Cycle):
    """The losses as the authors released them.

    Args:
        arguments: as for `Cycle`.
        previous_sample: x̂ is decoded from what the scheduler's `step` makes of the clean latents.
        unnormalised: x̂ reaches the captioner in [0, 1], without its normalisation.
        train_mode: the captioner's text model drops out while losses are computed, with `DROPOUT`.
    """

    def __init__(self, *arguments, previous_sample: bool = True, unnormalised: bool = True, train_mode: bool = False):
        super().__init__(*arguments)
        self.previous_sample, self.unnormalised = previous_sample, unnormalised
        self.dropout = text_dropout(self.captioner.model) if train_mode else []

    def image_losses(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """As `Cycle`, with dropout where `train_mode`."""
        with dropping_out(self.dropout):
            return super().image_losses(batch, draw)

    def text_losses(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """As `Cycle`, with dropout where `train_mode`."""
        with dropping_out(self.dropout):
            return super().text_losses(batch, draw)

    def one_step_latents(self, noisy: NoisyLatents, model_output: Tensor) -> Tensor:
        """z_(t−1) of DDPM, with z in the place of z_t, and its noise at t > 0; as `Cycle` without `previous_sample`."""
        if not self.previous_sample:
            return super().one_step_latents(noisy, model_output)
        # a new scheduler goes from t to t − 1, whatever the pipeline's own was set to; and not every scheduler can
        scheduler = DDPMScheduler.from_config(self.generator.pipeline.scheduler.config)
        # `step` takes one timestep at a time, and computes in the type of what it is given
        rows = zip(model_output.to(noisy.clean), noisy.timesteps, noisy.clean, strict=True)
        return torch.stack([scheduler.step(output, int(t), clean).prev_sample for output, t, clean in rows])

    def captioner_pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] where `unnormalised`, else as `Cycle`."""
        if not self.unnormalised:
            return super().captioner_pixels(images)
        return resized_pixels(self.captioner, images).to(self.captioner.model.dtype)


def text_dropout(captioner: nn.Module) -> list[nn.Dropout]:
    """The dropout of the part of BLIP or BLIP-2 that reads and writes text; its vision model has none.

    In transformers BLIP's rate is 0, so train mode alone would change nothing.
    """
    named = captioner.named_modules()
    return [one for name, one in named if isinstance(one, nn.Dropout) and not name.startswith("vision_model")]


@contextmanager
def dropping_out(modules: Sequence[nn.Dropout]) -> Iterator[None]:
    """Inside the context these modules drop out, at the rate `DROPOUT`; afterwards they are as before."""
    before = [(module.p, module.training) for module in modules]
    for module in modules:
        module.p, module.training = DROPOUT, True
    try:
        yield
    finally:
        for module, (rate, training) in zip(modules, before, strict=True):
            module.p, module.training = rate, training


def sample_latents(vae: AutoencoderKL) -> RemovableHandle:
    """From now on the `mean` of the distribution that the autoencoder gives an image is a sample of it.

    The samples come from torch's own random generator, which `train_cycle` seeds at every step.

    Returns:
        its `remove` ends this.
    """

    def sample(module: nn.Module, inputs: tuple, moments: Tensor) -> Tensor:
        _, log_variance = moments.chunk(2, dim=1)
        return torch.cat([DiagonalGaussianDistribution(moments).sample(), log_variance], dim=1)

    return (vae.quant_conv or vae.encoder).register_forward_hook(sample)


DEVIATIONS = ("released-map", "ends-kept", "previous-sample", "unnormalised")
IN_TRAINING = ("train-mode", "sampled-latents")  # other differences of the same code, not in the study's queue


def build_released_cycle(
    config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset, deviations: Collection[str]
) -> tuple[Cycle, CaptionedBatches, TrainableParameters]:
    """As `cycle.build_cycle`, with some of the released code's deviations.

    Args:
        config: settings of the run.
        captioner: p_θ.
        generator: ε_φ, τ and the VAE.
        dataset: labelled images.
        deviations: of `DEVIATIONS` and `IN_TRAINING`; "ends-kept" is of the released map only, and "sampled-latents"
            changes the generator's autoencoder for good.
    Raises:
        ValueError: an unknown deviation, or ends kept by another map.
    """
    known = DEVIATIONS + IN_TRAINING
    if unknown := sorted(set(deviations) - set(known)):
        raise ValueError(f"no deviation is called {', '.join(unknown)}: choose among {', '.join(known)}")
    if "ends-kept" in deviations and "released-map" not in deviations:
        raise ValueError("[SEP] is in no word, which is all that the word-aligned map carries: add released-map")
    bridge = None
    if "released-map" in deviations:
        pipeline = generator.pipeline
        learned = released_map(captioner.processor.tokenizer, pipeline.tokenizer)
        learned = learned.resize(captioner.model.config.text_config.vocab_size)
        bridge = (ReleasedBridge if "ends-kept" in deviations else Bridge)(learned, pipeline.text_encoder)
    cycle_class = partial(
        ReleasedCycle,
        previous_sample="previous-sample" in deviations,
        unnormalised="unnormalised" in deviations,
        train_mode="train-mode" in deviations,
    )
    cycle, batches, trainable = build_cycle(config, captioner, generator, dataset, bridge, cycle_class)
    if "sampled-latents" in deviations:
        sample_latents(generator.pipeline.vae)
        batches.memory = 0  # a sample that is kept would be the same in every epoch
    return cycle, batches, trainable
