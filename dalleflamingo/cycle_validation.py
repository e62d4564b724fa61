"""What two models that are being finetuned can do on pictures that they do not learn from: CIDEr, and pictures to see.

Every validation describes the same pictures, and draws the same captions from the same noise, so that what changes from
one to the next is the models' doing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dalleflamingo import metrics
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed

DESCRIBED = 32  # pictures at once


@dataclass(frozen=True)
class Validation:
    """Call it with a step's number: it writes `pictures/STEP.png` into the run's folder and returns {"cider": …}.

    Args:
        dataset: pictures with human captions; n-grams are weighed by these.
        drawn: of how many pictures a caption is drawn.
        steps, guidance_scale: of the generator.
    """

    cycle: Cycle
    dataset: Dataset
    folder: Path
    drawn: int = 8
    steps: int = 20
    guidance_scale: float = 3.0

    def __call__(self, step: int) -> dict[str, float]:
        captions = describe(self.cycle.captioner, self.dataset)
        shown = list(self.dataset)[: self.drawn]
        pictures = draw(self.cycle.generator, shown, self.steps, self.guidance_scale)
        path = Path(self.folder) / "pictures" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side_by_side([self.dataset.open(example) for example in shown], pictures).save(path)
        references = {example.image_id: example.references for example in self.dataset}
        return {"cider": 100 * metrics.cider(references, captions).value}


def describe(captioner: Captioner, dataset: Dataset) -> dict[int, str]:
    """Image id -> the caption by beam search."""
    examples, captions = list(dataset), []
    for start in range(0, len(examples), DESCRIBED):
        captions += captioner.describe([dataset.open(example) for example in examples[start : start + DESCRIBED]])
    return {example.image_id: caption for example, caption in zip(examples, captions, strict=True)}


def prompt_of(example: Example) -> str:
    """One of a picture's captions, drawn at random as in Table 4: the one that Finding II draws."""
    return example.references[derive_seed(0, "source", example.image_id) % len(example.references)]


def draw(
    generator: Generator, examples: Sequence[Example], steps: int, guidance_scale: float, batch_size: int = 16
) -> list[Image.Image]:
    """A picture of each `prompt_of`, from noise that is the example's own."""
    prompts, seeds = [prompt_of(example) for example in examples], [example.image_id for example in examples]
    return generator.render(prompts, seeds, steps, guidance_scale, batch_size)


def side_by_side(above: Sequence[Image.Image], below: Sequence[Image.Image]) -> Image.Image:
    """Two rows of pictures, all of the size of the first below."""
    width, height = below[0].size
    sheet = Image.new("RGB", (width * len(below), 2 * height))
    for row, pictures in enumerate((above, below)):
        for column, picture in enumerate(pictures):
            sheet.paste(picture.convert("RGB").resize((width, height)), (column * width, row * height))
    return sheet
