"""How big an experiment is: one word, `DALLEFLAMINGO_PROFILE`, takes every notebook from a laptop to a GPU.

`smoke` and `mini` run the miniature models on a CPU, `colab` and `paper` the real ones (§3.1: ten captions an image,
nucleus sampling; NoCaps validation has 4,500 images). A profile holds numbers and registry names; it loads nothing.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field, InstanceOf

from dalleflamingo.settings import Count, GuidanceScale, Side, check, from_mapping

VARIABLE = "DALLEFLAMINGO_PROFILE"


def find_device() -> str:
    """The first that this machine has of "cuda", "mps" (Apple's GPU) and "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass(frozen=True)
class Profile:
    """The size of one run.

    Attributes:
        name: the value of `DALLEFLAMINGO_PROFILE` that chooses it.
        images: number of input images of an experiment.
        candidates: K, captions sampled for each image, and so images generated for each.
        steps: denoising steps of the generator.
        scheduler: of the generator, as `Generator.from_pretrained` takes it; None: the model's own. The paper uses DDPM
            (§3.1), as the miniature does; Stable Diffusion v1-4 comes with another.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        image_size: side of a generated image, in pixels.
        dino_size: side of DINO's input, in pixels (App. A: 384); None: the model's own.
        dtype: "float32" or "float16", the type of the weights where there is CUDA; see `torch_dtype`.
        captioner, generator, clip, dino, inception, dataset: names in `registry.ENTRIES`.
        judge: likewise; the recogniser that knows what an image of `dataset` shows. None: nobody knows.
        coco: likewise; the data set that Table 1 has beside `dataset`; its split "test" is used.
        captioners: likewise; those of Table 3, beginning with `captioner`.
        other_captioner, other_generator: likewise; those of Table 8. The authors' LAFITE is on no hub, so the real
            profiles have no other generator.
        batch_size: images generated at once; it bounds memory and changes no image.
        cycle: fields of `CycleConfig` that differ from its defaults in live cycle finetuning, with those of `Losses`
            under "losses". The paper's five epochs of COCO are 70,804 steps of 8.
    Raises:
        ValueError: as `settings.check`.
    """

    name: str
    images: Count
    candidates: Count
    steps: Count
    guidance_scale: GuidanceScale
    image_size: Side
    dtype: Literal["float32", "float16"]
    captioner: str
    generator: str
    clip: str
    dino: str
    inception: str
    dataset: str
    coco: str
    captioners: Annotated[tuple[str, ...], Field(min_length=1)]
    other_captioner: str
    batch_size: Count
    cycle: InstanceOf[Mapping] = field(hash=False)
    scheduler: str | None = None
    dino_size: Side | None = None
    judge: str | None = None
    other_generator: str | None = None

    def __post_init__(self):
        check(self)
        cycle = {name: MappingProxyType(dict(v)) if isinstance(v, Mapping) else v for name, v in self.cycle.items()}
        object.__setattr__(self, "cycle", MappingProxyType(cycle))

    @property
    def device(self) -> str:
        """This machine's, see `find_device`."""
        return find_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for `from_pretrained`; float32 without CUDA: a CPU is slow at half precision or lacks it."""
        return getattr(torch, self.dtype) if self.device == "cuda" else torch.float32


def _read(file: Path) -> dict[str, Profile]:
    """The profiles of a TOML file: each has the fields of the group that it names, and its own."""
    profiles = {}
    try:
        groups = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
        for name, own in groups.pop("profiles").items():
            fields = groups[own.pop("models")] | {"name": name} | own
            fields["cycle"] = fields["cycle"] | {"steps": fields.pop("cycle_steps")}
            profiles[name] = from_mapping(Profile, fields | {"captioners": tuple(fields["captioners"])})
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    return profiles


PROFILES = _read(Path(__file__).with_suffix(".toml"))


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
