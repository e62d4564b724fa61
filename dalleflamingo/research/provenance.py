"""Where a result comes from: all that a reader needs to make the same numbers again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dalleflamingo import profiles
from dalleflamingo.datasets import Dataset
from dalleflamingo.generator import Generator
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research.pages import current_commit


@dataclass(frozen=True)
class Provenance:
    """All that a reader needs to make the same numbers again; a candidate table carries it in `.attrs`.

    Attributes:
        command: that was run.
        profile: its name.
        dataset: its name.
        candidates: generated for each image.
        ranked: how many of them, the first, are ranked.
        sampling: how captions were made.
        steps: of denoising.
        guidance_scale: of classifier-free guidance.
        scheduler: the generator's.
        resamples: of the bootstrap.
        seed: of sampling and noise.
        commit: of the code.
        tokenizer: which one split words for the metrics; "" where none did.
        features: word vectors of WMD, or the network of FID.
    """

    command: str
    profile: str
    dataset: str
    candidates: int
    ranked: int
    sampling: str
    steps: int
    guidance_scale: float
    scheduler: str
    resamples: int
    seed: int
    commit: str
    tokenizer: str = ""
    features: str = ""

    @classmethod
    def of(
        cls, command: str, dataset: Dataset, generator: Generator, settings: JourneySettings, **fields: str | int
    ) -> "Provenance":
        """Of a journey with the current profile's models, at the current commit.

        Args:
            command: that was run.
            dataset: of the journey.
            generator: that made the images.
            settings: of the journey.
            fields: ranked, sampling, resamples, and where they mean something tokenizer and features.
        """
        scheduler = generator.pipeline.scheduler
        return cls(
            command=command,
            profile=profiles.current().name,
            dataset=dataset.name,
            candidates=settings.candidates,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            scheduler=f"{type(scheduler).__name__}, {scheduler.config.timestep_spacing} spacing",
            seed=settings.seed,
            commit=current_commit(),
            **fields,
        )

    @classmethod
    def from_attrs(cls, attrs: Mapping) -> "Provenance":
        """As `as_attrs` wrote it. Raises KeyError where a field is missing."""
        return cls(**{name: attrs[name] for name in cls.__dataclass_fields__})

    def as_attrs(self) -> dict[str, str | int | float]:
        """The fields by name, for `DataFrame.attrs`."""
        return asdict(self)
