"""What two models that are being finetuned can do on pictures that they do not learn from: CIDEr, and pictures to see.

Every validation describes the same pictures, and draws the same captions from the same noise, so that what changes from
one to the next is the models' doing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import make_image_grid
from PIL.Image import Image

from dalleflamingo.captioner import describe
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.generator import Generator


@dataclass(frozen=True)
class Validation:
    """Call it with a step's number: it writes `pictures/STEP.png` into the run's folder and returns {"cider": …}.

    Args:
        dataset: pictures with human captions; n-grams are weighed by these.
        steps, guidance_scale: of the generator.
        drawn: of how many pictures a caption is drawn. batch_size: pictures drawn at once.
    """

    cycle: Cycle
    dataset: Dataset
    folder: Path
    steps: int
    guidance_scale: float
    drawn: int = 8
    batch_size: int = 16

    def __call__(self, step: int) -> dict[str, float]:
        captions = describe(self.cycle.captioner, self.dataset)
        shown = list(self.dataset)[: self.drawn]
        vae = self.cycle.generator.pipeline.vae
        vae.enable_slicing()  # off while gradients are kept, but these decode in full size
        pictures = draw(self.cycle.generator, shown, self.steps, self.guidance_scale, self.batch_size)
        vae.disable_slicing()
        path = Path(self.folder) / "pictures" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        real = [self.dataset.open(example) for example in shown]
        make_image_grid([*real, *pictures], rows=2, cols=len(shown), resize=pictures[0].width).save(path)
        references = {example.image_id: example.references for example in self.dataset}
        return {"cider": 100 * caption_metrics.cider(references, captions).value}


def draw(
    generator: Generator, examples: Sequence[Example], steps: int, guidance_scale: float, batch_size: int = 16
) -> list[Image]:
    """A picture of each one's caption, the one that Insight II draws, from noise that is the example's own."""
    prompts = [example.sample_reference(seed=0) for example in examples]
    return generator.render(prompts, [example.image_id for example in examples], steps, guidance_scale, batch_size)
