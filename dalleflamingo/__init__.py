"""Do DALL-E and Flamingo understand each other? The helper package of the course.

    from dalleflamingo import current_profile, load_dataset, load_models, JourneySettings, image_text_image, select

    profile = current_profile()
    dataset = load_dataset(profile.dataset).subset(profile.images)
    table = image_text_image(dataset, *load_models(profile), "runs/first", JourneySettings.of(profile))
    best = select(table, by="clip")

This is the front door: a name below, or a module of the package, is imported when it is first used (PEP 562), so
`import dalleflamingo` is instant.
"""

import difflib
import importlib
import pkgutil
from functools import cache

__version__ = "0.1.0"

_EXPORTS = {  # module -> the names that it exports here
    "profiles": ("current_profile",),
    "runs": ("derive_seed",),
    "decoding": ("Nucleus", "Temperature", "TopK"),
    "captioner": ("Captioner",),
    "generator": ("Generator",),
    "similarity": ("ClipImage", "Dino"),
    "vocabulary": ("VocabularyMap",),
    "bridge": ("Bridge", "relax"),
    "reconstruct": (
        "JourneySettings",
        "image_text_image",
        "rank",
        "select",
        "text_image_text",
    ),
    "cycle": ("CycleConfig", "train_cycle"),
    "sources.annotations": ("read_coco", "read_karpathy"),
    "sources.models": ("load_captioner", "load_cycle", "load_generator", "load_models"),
    "sources.own_files": ("read_captions", "read_folder", "read_pairs"),
    "sources.registered": ("load_dataset",),
    "sources.shards": ("read_shards",),
    "evaluation.intervals": ("Interval", "mean_interval", "paired_bootstrap"),
    "evaluation.caption_metrics": ("evaluate",),
    "evaluation.similarities": ("PairSimilarity", "load_text_similarities"),
    "evaluation.text_encoders": ("ClipText", "Sbert"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
_OTHER_NAME = {"current_profile": "current"}  # in its own module, where that name is clear by itself
_SUBMODULES = {module.name for module in pkgutil.iter_modules(__path__)} - {"__main__"}

__all__ = sorted(_MODULE_OF)


@cache
def repository() -> str:
    """Address of the public repository: `Repository` of `project.urls` in pyproject.toml; "" while there is none."""
    from importlib import metadata

    try:
        addresses = metadata.metadata(__name__).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # on PYTHONPATH, but not installed
        return ""
    return dict(line.split(", ", 1) for line in addresses).get("Repository", "")


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
        found = getattr(module, _OTHER_NAME.get(name, name))
    elif name in _SUBMODULES:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        near = difflib.get_close_matches(name, [*_MODULE_OF, *_SUBMODULES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(__all__)}"
        raise AttributeError(f"{__name__} has no {name!r}: {hint}")
    globals()[name] = found  # so that the next use is an ordinary look-up
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
