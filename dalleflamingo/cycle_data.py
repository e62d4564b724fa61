"""The pairs that cycle finetuning learns from: pictures with one of their human captions, batch by batch.

Which pairs a step has follows from the seed and the step's number alone, so that a run that was killed goes on with the
very next ones, and every process of a run can tell what the others have.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle_losses import Batch
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed


@dataclass
class Pairs:
    """Batches of a data set, each epoch in another order and with other captions.

    Args:
        memory: bytes for pictures' pixel values and latents, which are kept once they are computed, as many as fit.
    Raises:
        ValueError: a picture has no caption, or there are fewer pictures than a batch has.
    """

    dataset: Dataset
    captioner: Captioner
    generator: Generator
    batch_size: int
    seed: int = 0
    memory: int = 2**30
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        mute = [example.image_id for example in self.dataset if not example.references]
        if mute:
            raise ValueError(
                f"{len(mute)} pictures of {self.dataset.name} have no caption, such as {mute[:3]}: leave them out"
            )
        if len(self.dataset) < self.batch_size:
            raise ValueError(
                f"{self.dataset.name} has {len(self.dataset)} pictures, a batch {self.batch_size}: take a smaller batch"
            )

    def choose(self, step: int) -> list[tuple[Example, str]]:
        """The pairs of a step."""
        size, chosen = len(self.dataset), []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(place, size)
            example = self.dataset[int(self._order(epoch)[i])]
            number = derive_seed(self.seed, "caption", epoch, example.image_id) % len(example.references)
            chosen.append((example, example.references[number]))
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    @torch.no_grad()
    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Of a step's batch the `part`th of `parts`.

        Raises:
            ValueError: the batch does not divide into so many parts.
        """
        if self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} does not divide into {parts} parts: take a batch_size that does"
            )
        chosen, size = self.choose(step), self.batch_size // parts
        own = chosen[part * size :][:size]
        seen = [self._see(example) for example, _ in own]
        captions = [caption for _, caption in own]
        pixel_values, latents = (torch.stack(column) for column in zip(*seen, strict=True))
        pipeline, model = self.generator.pipeline, self.captioner.model
        pixel_values, latents = pixel_values.to(model.device, model.dtype), latents.to(pipeline.device)
        states, _ = pipeline.encode_prompt(captions, pipeline.device, 1, do_classifier_free_guidance=False)
        pieces = self.captioner.count_pieces([caption for _, caption in chosen])
        return Batch(pixel_values, captions, latents, states, pieces, part * size)

    def _see(self, example: Example) -> tuple[Tensor, Tensor]:
        """(3, H, W) pixel values and (4, h, w) latents of a picture, in main memory."""
        if example.image_id in self._kept:
            return self._kept[example.image_id]
        picture = self.dataset.open(example)
        pixel_values = self.captioner.processor(images=[picture], return_tensors="pt").pixel_values[0]
        latents = self.generator.latents([picture], next(self.generator.pipeline.unet.parameters()))[0]
        seen = pixel_values, latents.cpu()
        if (len(self._kept) + 1) * sum(tensor.nbytes for tensor in seen) <= self.memory:
            self._kept[example.image_id] = seen
        return seen
