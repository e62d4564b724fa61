"""How big an experiment is: one word, `DALLEFLAMINGO_PROFILE`, takes every notebook from a laptop to a GPU.

`smoke` and `mini` run the miniature models on a CPU, `colab` and `paper` the real ones (§3.1: ten captions an image,
nucleus sampling; NoCaps validation has 4,500 images). A profile holds numbers and registry names; it loads nothing.
"""

import os
from dataclasses import dataclass

import torch

VARIABLE = "DALLEFLAMINGO_PROFILE"


@dataclass(frozen=True)
class Profile:
    """The size of one run.

    Attributes:
        name: what `DALLEFLAMINGO_PROFILE` is set to.
        images: input images of an experiment.
        candidates: K captions sampled for each image, hence pictures drawn for each image.
        steps: denoising steps of the generator.
        scheduler: that draws, as `Generator.from_pretrained` takes it; None is the model's own. The paper's is DDPM
            (§3.1), as the miniature's is; Stable Diffusion v1-4 is shipped with another.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        image_size: side of a generated picture, in pixels.
        dino_size: side in pixels at which DINO looks (App. A: 384); None is the model's own.
        dtype: "float32" or "float16", the weights' type on a GPU; see `torch_dtype`.
        captioner, generator, clip, dino, inception, dataset: names in `registry.ENTRIES`.
        coco: likewise; the data set that Table 1 has beside it, its split "test".
        other_captioner, other_generator: likewise; what Table 8 has instead. The authors' LAFITE is on no hub, so the
            real profiles have no other generator.
        batch_size: pictures drawn at once; bounded by memory, without influence on any picture.
        cycle_steps: of cycle finetuning, live; the paper's five epochs of COCO are 70,804 steps of 8.
    """

    name: str
    images: int
    candidates: int
    steps: int
    scheduler: str | None
    guidance_scale: float
    image_size: int
    dino_size: int | None
    dtype: str
    captioner: str
    generator: str
    clip: str
    dino: str
    inception: str
    dataset: str
    coco: str
    other_captioner: str
    other_generator: str | None
    batch_size: int
    cycle_steps: int

    @property
    def device(self) -> str:
        """ "cuda" where this machine has it, else "cpu"."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for `from_pretrained`; float32 on a CPU, which is slow at half precision or lacks it."""
        return getattr(torch, self.dtype) if self.device == "cuda" else torch.float32


_MINIATURE = dict(
    scheduler=None,
    guidance_scale=3.0,
    image_size=64,
    dino_size=None,
    dtype="float32",
    captioner="miniature/blip",
    generator="miniature/sd",
    clip="miniature/clip",
    dino="miniature/dino",
    inception="miniature/inception",
    dataset="miniature/nocaps",
    coco="miniature/coco",
    other_captioner="miniature/blip2",
    other_generator="miniature/lafite",
)
_REAL = dict(
    scheduler="DDPM",
    guidance_scale=7.5,
    image_size=512,
    dino_size=384,
    dtype="float16",
    captioner="blip-large",
    generator="sd-v1-4",
    clip="clip-vit-l-14",
    dino="dino-vitb8",
    inception="inception-v3",
    dataset="nocaps",
    coco="coco",
    other_captioner="blip2-opt-2.7b",
    other_generator=None,
)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="smoke", images=4, candidates=2, steps=4, batch_size=8, cycle_steps=8, **_MINIATURE),
        Profile(name="mini", images=24, candidates=5, steps=20, batch_size=16, cycle_steps=160, **_MINIATURE),
        Profile(name="colab", images=24, candidates=5, steps=50, batch_size=4, cycle_steps=100, **_REAL),
        Profile(name="paper", images=4500, candidates=10, steps=50, batch_size=8, cycle_steps=70_804, **_REAL),
    )
}


def current() -> Profile:
    """The profile named by `DALLEFLAMINGO_PROFILE`; "mini" where it is unset or empty.

    Raises:
        ValueError: the name is of no profile; the message lists them.
    """
    name = os.environ.get(VARIABLE) or "mini"
    if name not in PROFILES:
        raise ValueError(
            f"{VARIABLE}={name!r} is not a profile: set it to one of {', '.join(PROFILES)}, or unset it for mini"
        )
    return PROFILES[name]
