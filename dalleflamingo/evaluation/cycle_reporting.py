"""What surrounds a run of cycle finetuning: its configuration file, its tracker, the model cards, the upload."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import HfApi
from peft import get_peft_model_state_dict

from dalleflamingo import registry
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import LOSS_NAMES, Cycle
from dalleflamingo.evaluation.accelerators import make_accelerator
from dalleflamingo.evaluation.map_files import save_map
from dalleflamingo.profiles import Profile
from dalleflamingo.runs import RunFolderError

MODELS = ("captioner", "generator")


def read_config(path: Path, profile: Profile) -> CycleConfig:
    """A profile's configuration, with the fields of a JSON object in place of its own.

    Args:
        path: the file.
        profile: names and sets what the file leaves out.
    Raises:
        ValueError: the file cannot be read or is no JSON object, or `CycleConfig` refuses what it says.
    """
    try:
        named = json.loads(path.read_bytes())  # of bytes, json finds out whether they are UTF-8, -16 or -32
        if not isinstance(named, dict):
            raise ValueError(f"it holds a {type(named).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(CycleConfig))
        raise ValueError(f"{path}: {error}; a configuration is a JSON object with some of {known}") from error
    try:
        return CycleConfig.of(profile, **named)
    except (ValueError, registry.RegistryError) as error:
        raise ValueError(f"{path}: {error}") from error


def tracked(tracker: str, run_folder: Path, config: CycleConfig) -> Accelerator:
    """An accelerator with the configuration's precision; its tracker, begun by `train_cycle`, writes to the run folder.

    Args:
        tracker: "none", or one that accelerate knows, such as "tensorboard".
        run_folder: of the run.
        config: settings of the run.
    Raises:
        ValueError: accelerate knows no such tracker, or it is not installed; or as `new_accelerator`.
    """
    installed = [str(kind) for kind in get_available_trackers()]
    if tracker not in ("none", *installed):
        raise ValueError(
            f"no tracker {tracker!r} is installed, only {', '.join(installed) or 'none'}: `pip install {tracker}`, or "
            "--tracker none"
        )
    log_with = None if tracker == "none" else tracker
    return make_accelerator(config, log_with=log_with, project_dir=run_folder)


def export(cycle: Cycle, folder: Path) -> None:
    """Save both models, for transformers and diffusers to open, and the vocabulary map, in subfolders of `folder`.

    Of models with LoRA only the additions are saved: stock models open these by `load_adapter` (captioner) and
    `load_lora_weights` (generator).
    """
    cycle.captioner.model.save_pretrained(folder / "captioner")
    cycle.captioner.processor.save_pretrained(folder / "captioner")
    pipeline = cycle.generator.pipeline
    if hasattr(pipeline.unet, "peft_config"):
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        pipeline.save_lora_weights(folder / "generator", unet_lora_layers=lora)
    else:
        pipeline.save_pretrained(folder / "generator")
    save_map(cycle.bridge.vocabulary_map, folder / "vocabulary_map")


def write_model_cards(config: CycleConfig, run_folder: Path) -> None:
    """Write a README.md into each of the two folders that `export` made in a run folder.

    Args:
        config: settings of the run.
        run_folder: of the run, whose log the cards quote.
    """
    for part, base in zip(MODELS, (config.captioner, config.generator), strict=True):
        (run_folder / part / "README.md").write_text(card(config, base, read_log(run_folder)), encoding="utf-8")


def card(config: CycleConfig, base: str, log: Sequence[Mapping[str, float]]) -> str:
    """A model card: what the model was, what it learned from and how, and what became of the losses.

    Args:
        config: settings of the run.
        base: the model's name in the registry.
        log: rows from `read_log`.
    """
    entry, data = registry.entry_of(base), registry.entry_of(config.dataset)
    weights = ", ".join(f"{name} {getattr(config.losses, name):g}" for name in LOSS_NAMES)
    settings = "\n".join(f"* {name}: {value}" for name, value in dataclasses.asdict(config).items() if name != "losses")
    figures = "\n".join(_figures(log))
    return f"""---
license: {entry.licence_id}
base_model: {entry.source}
---
# {base}, cycle finetuned

After *Do DALL-E and Flamingo Understand Each Other?* (Li et al., ICCV 2023), by dalleflamingo, on {config.dataset}
({data.licence}); the weights it began with: {entry.licence}. Weights of the losses: {weights}.

{settings}

Means over the first and the last tenth of the steps; CIDEr × 100, where measured, on images that were not trained on:

{figures}
"""


def _figures(log: Sequence[Mapping[str, float]]) -> Iterator[str]:
    for name in (*LOSS_NAMES, "cider"):
        if values := [row[name] for row in log if name in row]:
            tenth = max(1, len(values) // 10)
            yield f"* {name}: {fmean(values[:tenth]):.3f} at first, {fmean(values[-tenth:]):.3f} in the end"


def push(run_folder: Path, owner: str, hub: HfApi | None = None) -> list[str]:
    """Upload the two exported folders to the Hugging Face hub; returns their addresses.

    Args:
        run_folder: of the run; its name begins the models' names.
        owner: user or organisation on the hub.
        hub: None: with the token of `huggingface-cli login`.
    """
    hub, addresses = hub or HfApi(), []
    for part in MODELS:
        name = hub.create_repo(f"{owner}/{run_folder.resolve().name}-{part}", exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=run_folder / part)
        addresses.append(f"https://huggingface.co/{name}")
    return addresses


def read_log(run_folder: Path) -> list[dict]:
    """A row for each step, in order: its number, its losses and validation's results. Repeated steps occur once.

    A line that a kill, a full disk or a power failure has damaged is left out, and a printed line says so.

    Raises:
        RunFolderError: there is no log.
    """
    file = run_folder / "log.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise RunFolderError(f"{file} is missing: train first, or name the folder of a run") from error
    rows = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                row = json.loads(line)
                rows[int(row["step"])] = row
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            print(f"{file}: line {number} is damaged, and left out")
    return list(rows.values())
