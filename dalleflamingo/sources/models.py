"""The models that a profile or the configuration of a cycle finetuning names, loaded for a device."""

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import torch

from dalleflamingo import registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, TrainableParameters, build_cycle
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.similarity import ClipImage, Dino, Similarity
from dalleflamingo.sources import registered


class Models(NamedTuple):
    """What image → text → image needs: `image_text_image(dataset, *load_models(profile), run_folder, settings)`."""

    captioner: Captioner
    generator: Generator
    similarities: list[Similarity]


def load_models(profile: Profile, scheduler: str | None = None) -> Models:
    """The profile's captioner and generator, with CLIP and DINO; arguments and errors are those of `load_generator`."""
    similarities = [
        ClipImage.from_pretrained(**registry.source_of(profile.clip, profile.device)),
        Dino.from_pretrained(**registry.source_of(profile.dino, profile.device), image_size=profile.dino_size),
    ]
    return Models(load_captioner(profile), load_generator(profile, scheduler=scheduler), similarities)


def load_captioner(profile: Profile, name: str | None = None) -> Captioner:
    """A captioner by its name in the registry (None: the profile's), for the profile's device; errors as `locate`."""
    name = profile.captioner if name is None else name
    source = registry.source_of(name, profile.device)
    return (class_of(name) or Captioner).from_pretrained(**source, dtype=profile.torch_dtype)


def load_generator(profile: Profile, name: str | None = None, scheduler: str | None = None) -> Generator:
    """A generator by its name in the registry, for the profile's device.

    Args:
        profile: says which generator and scheduler where none are named, and the type of the weights.
        name: in the registry; unknown names and missing weights are a RegistryError.
        scheduler: of diffusers, as `Generator.from_pretrained` takes it; one that does not fit is a ValueError.
    """
    name = profile.generator if name is None else name
    source = registry.source_of(name, profile.device) | {"dtype": profile.torch_dtype}
    halved = profile.torch_dtype == torch.float16 and registry.entry_of(name).fp16_mb is not None
    variant = {"variant": "fp16"} if halved else {}
    if other := class_of(name):  # it has a scheduler and an image size of its own, or none
        return other.from_pretrained(**source, **variant)
    scheduler = profile.scheduler if scheduler is None else scheduler
    return Generator.from_pretrained(**source, **variant, scheduler=scheduler, image_size=profile.image_size)


def class_of(name: str) -> type | None:
    """The class of a subpackage whose `from_pretrained` loads a model, None if one of the core does.

    Raises:
        RegistryError: as `registry.entry_of`.
    """
    opened_by = registry.entry_of(name).opened_by
    return pkgutil.resolve_name(opened_by) if opened_by else None


def load_cycle(
    config: CycleConfig, device: torch.device, build: Callable[..., tuple] = build_cycle
) -> tuple[Cycle, CaptionedBatches, TrainableParameters]:
    """Load what a configuration names onto a device, and `build` the cycle from it.

    Raises:
        RegistryError, DatasetError: as `registry.locate` and `registered.load_dataset`.
    """
    captioner = Captioner.from_pretrained(**registry.source_of(config.captioner, str(device)))
    source = registry.source_of(config.generator, str(device))
    generator = Generator.from_pretrained(**source, scheduler=config.scheduler)
    dataset = registered.load_dataset(config.dataset, config.split)
    dataset = dataset if config.images is None else dataset.subset(config.images)
    return build(config, captioner, generator, dataset)
