"""Where all arms of the cycle study begin: with models that have something to learn.

The miniature's models are as good as their size allows, and so an arm could show nothing but harm. The study therefore
takes away what cycle finetuning trains: the queries of both cross-attentions are scaled to 2 % and trained again on
images of the web, whose alt-texts are often wrong. That is the miniature's pretraining alone, without clean labels, as
if the models had been published before they were finetuned. Real models begin as they were published.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file

from dalleflamingo import registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig, build_cycle, train_cycle
from dalleflamingo.cycle_losses import captioner_parameters, generator_parameters
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.accelerators import make_accelerator
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.research.repair import damage
from dalleflamingo.runs import RunFolderError, differences, read_settings
from dalleflamingo.sources.models import load_cycle

WEB = "miniature/web"
PRETRAINING = {  # fields of `CycleConfig`
    "dataset": WEB,
    "split": None,
    "images": None,
    "steps": 120,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "losses": {"image_reconstruction": 0.0, "caption_reconstruction": 0.0},
}


def pretraining(captioner: str, profile: Profile) -> CycleConfig | None:
    """The settings of a pretraining; None for real models, which need none.

    Args:
        captioner: name in the registry.
        profile: names the generator.
    """
    shipped = registry.entry_of(captioner).shipped
    return CycleConfig.of(profile, captioner=captioner, **PRETRAINING) if shipped else None


def pretrained(captioner: str, profile: Profile, folder: Path) -> Path | None:
    """The checkpoint of a pretraining, made if it is missing; None for real models, which need none.

    Another process that is making it is waited for; the lock is the kernel's, and ends with that process.

    Args:
        captioner: name in the registry.
        profile: names the generator.
        folder: of all starts.
    Raises:
        RunFolderError: the folder has a pretraining with other settings.
    """
    config = pretraining(captioner, profile)
    if config is None:
        return None
    own = folder / captioner.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{own}.lock", fallback_to_soft=False):
        if (own / "done").exists():
            _require_made_from(config, own)
        else:
            cycle, batches, trainable = load_cycle(config, torch.device(profile.device), _build_damaged)
            train_cycle(config, cycle, batches, trainable, own, make_accelerator(config))
            (own / "done").touch()
    return own / "state.safetensors"


def _require_made_from(config: CycleConfig, folder: Path) -> None:
    """Refuse a finished pretraining with other settings: `train_cycle` would let the number of steps differ."""
    path = folder / "config.json"
    if lines := differences(flat(read_settings(path) or {}), flat(asdict(config))):
        raise RunFolderError(
            f"{path} is of a pretraining with other settings:\n{lines}\nAll arms of a study begin with one: delete the "
            "folder of the study to make its runs again, or give another --runs."
        )


def flat(settings: Mapping[str, object], within: str = "") -> dict[str, object]:
    """Settings that hold settings as one mapping, such as "losses.mode" -> "soft".

    Args:
        settings: of a run.
        within: stands before every name.
    """
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{within}{name}.") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found


def beginning_with(checkpoint: Path | None, build: Callable[..., tuple]) -> Callable[..., tuple]:
    """`build`, of models whose trained parameters are those of a checkpoint.

    Args:
        checkpoint: of `pretrained`; None leaves the models as they are.
        build: takes a configuration, a captioner, a generator and a data set, as `cycle.build_cycle`.
    """

    def build_from(config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset) -> tuple:
        if checkpoint is not None:
            weights = load_file(checkpoint)
            trained = {"captioner": captioner_parameters(captioner), "generator": generator_parameters(generator)}
            for model, parameters in trained.items():
                for i, parameter in enumerate(parameters.values()):
                    parameter.data.copy_(weights[f"{model}.{i}"])
        return build(config, captioner, generator, dataset)

    return build_from


def _build_damaged(config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset) -> tuple:
    damage(captioner, generator)
    return build_cycle(config, captioner, generator, dataset)
