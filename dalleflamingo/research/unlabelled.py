"""Loss (2) on images that nobody has captioned, along the captioner's own words: an arm that the paper lacks.

Loss (2) asks how well the generator removes noise from an image, given what the captioner says of it. A human caption
decides only along which words the captioner is read. Without one it can be read along its own: it describes the image,
and its distributions along that description go over the bridge. Losses (1), (3) and (4) keep their labelled images.
"""

import torch
from torch import Tensor

from dalleflamingo.captioner import Captioner, without_unreadable
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, TrainableParameters, build_cycle
from dalleflamingo.cycle_losses import Batch, Cycle
from dalleflamingo.datasets import Dataset, Example, clean_caption
from dalleflamingo.generator import Generator
from dalleflamingo.runs import derive_seed

_STEPS = 2**20  # of the unlabelled images' own order, in which a step of training draws its place


class OwnWords(CaptionedBatches):
    """Batches of images, each with what the captioner says of it when the batch is made."""

    def choose(self, step: int) -> list[tuple[Example, str]]:
        """The images of a step, each with the captioner's greedy caption; their own captions are not read."""
        examples = [example for example, _ in super().choose(step)]
        images = [self.dataset.open(example) for example in examples]
        captions = map(clean_caption, self.captioner.describe(images, num_beams=1))
        return list(zip(examples, captions, strict=True))


class UnlabelledCycle(Cycle):
    """A cycle whose loss (2) is of other images than (1), along the captioner's own words.

    Attributes:
        unlabelled: the batches of these images; `build_unlabelled_cycle` sets it.
    """

    unlabelled: OwnWords

    def image_reconstruction(self, logits: Tensor, ids: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        """As in `Cycle`, of a batch of unlabelled images that `draw` chooses; `logits` and `ids` are not used."""
        own = self.unlabelled.batch(int(torch.randint(_STEPS, (), generator=draw)))
        logits, ids = self.captioner.token_logits(own.pixel_values, own.captions)
        return super().image_reconstruction(logits, ids, own, draw)


def build_unlabelled_cycle(
    config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset, images: Dataset
) -> tuple[UnlabelledCycle, CaptionedBatches, TrainableParameters]:
    """As `cycle.build_cycle`, with loss (2) on images of their own.

    Args:
        config: settings of the run, in one process.
        captioner: p_θ.
        generator: ε_φ, τ and the VAE.
        dataset: labelled images.
        images: those whose captions nobody reads.
    """
    cycle, batches, trainable = build_cycle(config, captioner, generator, dataset, cycle_class=UnlabelledCycle)
    seed = derive_seed(config.seed, "unlabelled")
    readable = without_unreadable(images, captioner)
    cycle.unlabelled = OwnWords(readable, captioner, generator, config.batch_size, seed, config.fit)
    return cycle, batches, trainable
