"""Generators of diffusers beyond Stable Diffusion v1: whatever `AutoPipelineForText2Image` opens, few-step ones too.

SDXL, SDXL-Turbo, latent consistency models, PixArt, Flux. The journeys need of a generator that it renders captions by
seeds, refuses captions that it cannot read, and has a fingerprint. The bridge and cycle finetuning need more, and stay
with `generator.Generator`.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL.Image import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from dalleflamingo.generator import BLACKENS, DTYPE, render_distinct
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint
from dalleflamingo.tokens import check_caption


class PipelineGenerator:
    """A text-to-image pipeline as it is shipped, with its scheduler and image size; to the journeys as a `Generator`.

    A class of a model that was distilled to few steps says how many, and with which guidance: those of a journey's
    settings, which suit Stable Diffusion, would spoil its images.

    Attributes:
        steps, guidance_scale: the model's own; None: as `render` is told.
    Raises:
        ValueError: the pipeline has a safety checker, as `Generator`.
    """

    steps: ClassVar[int | None] = None
    guidance_scale: ClassVar[float | None] = None

    def __init__(self, pipeline: DiffusionPipeline):
        if getattr(pipeline, "safety_checker", None) is not None:
            raise ValueError(BLACKENS)
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
    ) -> "PipelineGenerator":
        """A generator from a folder or a hub, without its safety checker.

        Args:
            name_or_path: a folder, or the id of a pipeline on the hub.
            device: where it computes.
            dtype: of the weights.
            revision: commit, tag or branch of a hub's pipeline; None: its main branch.
            variant: of the weight files, such as "fp16"; None: the plain ones.
        Raises:
            RegistryError: the weights are missing or cut short, or diffusers opens no such pipeline for text to image.
        """
        with loading(name_or_path):
            folder = check_weights(name_or_path)
            has_checker = "safety_checker" in DiffusionPipeline.load_config(folder, revision=revision)
            options = {"safety_checker": None, "requires_safety_checker": False} if has_checker else {}
            pipeline = AutoPipelineForText2Image.from_pretrained(
                folder, **{DTYPE: dtype}, revision=revision, variant=variant, use_safetensors=True, **options
            )
        return cls(pipeline.to(device))

    def render(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image]:
        """One image for each (caption, seed); arguments, result and errors as of `Generator.render`."""
        steps = steps if self.steps is None else self.steps
        guidance_scale = guidance_scale if self.guidance_scale is None else self.guidance_scale

        def generate(batch: list[tuple[str, int]]) -> list[Image]:
            return self.pipeline(
                prompt=[caption for caption, _ in batch],
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            ).images

        return render_distinct(list(captions), seeds, generate, batch_size, progress)

    def check_caption(self, caption: str) -> None:
        """Refuse a caption that one of the text encoders cannot read as a whole; errors as `tokens.check_caption`."""
        for tokenizer in self._parts(PreTrainedTokenizerBase).values():
            count = lambda text, read=tokenizer: len(read(text, verbose=False).input_ids)  # noqa: E731
            check_caption(caption, count, tokenizer.model_max_length)

    def fingerprint(self) -> str:
        """A text that changes with weights, number format, vocabularies, scheduler, and steps of its own."""
        scheduler = self.pipeline.scheduler
        settings = {
            "dtype": str(self.pipeline.dtype),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "tokenizers": {name: part.get_vocab() for name, part in self._parts(PreTrainedTokenizerBase).items()},
            "scheduler": type(scheduler).__name__,
            "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        }
        modules = self._parts(nn.Module).values()
        return fingerprint(type(self.pipeline).__name__, modules=modules, settings=settings)

    def _parts(self, kind: type) -> dict[str, object]:
        """The pipeline's components of a kind, by name."""
        return {name: part for name, part in sorted(self.pipeline.components.items()) if isinstance(part, kind)}


class SdxlTurbo(PipelineGenerator):
    """SDXL-Turbo (Sauer et al. 2023): one step, without guidance."""

    steps, guidance_scale = 1, 0.0


class LatentConsistency(PipelineGenerator):
    """A latent consistency model (Luo et al. 2023): four steps; its U-Net is told the guidance that it imitates."""

    steps, guidance_scale = 4, 8.0
