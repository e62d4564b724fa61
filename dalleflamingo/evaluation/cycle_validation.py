"""What two models that are being finetuned do on images that they are not trained on: CIDEr, and images to look at.

Every validation describes the same images and renders the same captions from the same noise, so that what changes from
one to the next is due to the models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL.Image import Image

from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.evaluation.caption_results import describe_dataset
from dalleflamingo.generator import Generator
from dalleflamingo.sources import registered

VALIDATED = 200  # images


def validation_set(config: CycleConfig) -> Dataset:
    """At most 200 images of the split "val" of a configuration's data set."""
    dataset = registered.load_dataset(config.dataset, "val")
    return dataset.subset(min(VALIDATED, len(dataset)))


@dataclass(frozen=True)
class Validation:
    """Called with a step's number, it writes `images/STEP.png` into the run folder and returns {"cider": … × 100}.

    Attributes:
        cycle: the models.
        dataset: images with human captions; the weights of n-grams come from these.
        folder: of the run.
        steps, guidance_scale: of the generator.
        batch_size: images rendered at once.
        rendered: how many images have a caption rendered.
    """

    cycle: Cycle
    dataset: Dataset
    folder: Path
    steps: int
    guidance_scale: float
    batch_size: int
    rendered: int = 8

    def __call__(self, step: int) -> dict[str, float]:
        captions = describe_dataset(self.cycle.captioner, self.dataset)
        examples = list(self.dataset)[: self.rendered]
        images = render_captions(self.cycle.generator, examples, self.steps, self.guidance_scale, self.batch_size)
        path = Path(self.folder) / "images" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        real = [self.dataset.open(example) for example in examples]
        make_image_grid([*real, *images], rows=2, cols=len(examples), resize=images[0].width).save(path)
        references = {example.image_id: example.references for example in self.dataset}
        return {"cider": 100 * caption_metrics.cider(references, captions).value}


def render_captions(
    generator: Generator, examples: Sequence[Example], steps: int, guidance_scale: float, batch_size: int
) -> list[Image]:
    """Render one human caption of each example, the one that Insight II renders, from the example's own noise.

    Args:
        generator: renders.
        examples: with human captions.
        steps: of denoising.
        guidance_scale: of classifier-free guidance.
        batch_size: images rendered at once.
    """
    prompts = [example.sample_reference(seed=0) for example in examples]
    return generator.render(prompts, [example.image_id for example in examples], steps, guidance_scale, batch_size)
