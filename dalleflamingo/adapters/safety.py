"""What Stable Diffusion's safety checker says of generated images, as a column of a run's table.

Left to itself, a pipeline with this checker returns a black image where it finds something, and a black image would be
compared, ranked and scored as if the generator had made it. Here every image is kept as it was generated, and the
checker's verdict stands beside it. It errs in both directions.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from dalleflamingo.datasets import to_rgb
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint

BATCH = 32  # images checked at once


class SafetyChecker:
    """A verdict on each generated image: 1 where the checker finds something, else 0. It is no similarity to rank by.

    Args:
        checker: of Stable Diffusion.
        processor: of its images.
    """

    name = "unsafe"
    of_images = True  # in text → image → text, too

    def __init__(self, checker: StableDiffusionSafetyChecker, processor: CLIPImageProcessor):
        self.checker, self.processor = checker.eval(), processor

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "SafetyChecker":
        """The checker of a pipeline: its subfolders `safety_checker` and `feature_extractor`.

        Args:
            name_or_path: the folder or hub id of the pipeline.
            device: where it computes.
            revision: of a hub's pipeline; None: its main branch.
        Raises:
            RegistryError: the pipeline has none, or its weights are missing or cut short.
        """
        source = {"pretrained_model_name_or_path": check_weights(name_or_path), "revision": revision or "main"}
        with loading(name_or_path):
            checker = StableDiffusionSafetyChecker.from_pretrained(
                **source, subfolder="safety_checker", use_safetensors=True
            )
            processor = CLIPImageProcessor.from_pretrained(**source, subfolder="feature_extractor")
        return cls(checker.to(device), processor)

    @torch.no_grad()
    def compare(self, sources: Sequence, candidates: Sequence[Sequence[Image]]) -> Tensor:
        """(B, K) verdicts on K images of each of B sources, which are not looked at."""
        images, verdicts = list(map(to_rgb, chain.from_iterable(candidates))), []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            pixels = self.processor(batch, return_tensors="pt").pixel_values.to(self.checker.device, self.checker.dtype)
            nothing = np.zeros((len(batch), 1, 1, 3))  # in place of the images, which the checker would blacken
            verdicts += self.checker(clip_input=pixels, images=nothing)[1]
        return torch.tensor(verdicts, dtype=torch.float32).reshape(len(sources), -1)

    def fingerprint(self) -> str:
        """A text that changes with weights, number format and preprocessing."""
        settings = {"dtype": str(self.checker.dtype), "image_processor": self.processor.to_dict()}
        return fingerprint(type(self).__name__, modules=[self.checker], settings=settings)
