"""Writing trained models into `data/miniature`, with MANIFEST.json.

The MANIFEST has sha256 and size of every file and, for every model, its number of trained parameters, seed, command,
hardware, minutes and curve. `research/gates.py` adds how good the models are.
"""

import hashlib
import json
from pathlib import Path

from dalleflamingo.evaluation.cycle_reporting import read_log
from dalleflamingo.miniature.corpora import data_folder
from dalleflamingo.miniature.training.base import load_trained
from dalleflamingo.miniature.training.recipes import RECIPES, STAGES
from dalleflamingo.runs import read_settings, write_whole

MAX_FILE_BYTES, MAX_TOTAL_BYTES = 16 * 2**20, 48 * 2**20
_CURVE_POINTS = 60


def ship(name: str, run: Path, root: Path | None = None) -> dict:
    """Export a trained model into its folder, unless it is a stage of another.

    Args:
        name: in `RECIPES`.
        run: folder of its training.
        root: folder of the miniature's data; None: `data_folder()`.
    Returns:
        the model's entry in the MANIFEST.
    Raises:
        FileNotFoundError: the run has no checkpoint, or no settings.
        RunFolderError: they are damaged.
    """
    recipe = RECIPES[name]()
    steps, minutes = load_trained(recipe, run)
    curve = read_log(run)
    every = max(1, len(curve) // _CURVE_POINTS)
    settings = read_settings(
        run / "training.json", lambda found: {key: found[key] for key in ("seed", "hardware", "init_from")}
    )
    if settings is None:
        raise FileNotFoundError(f"{run / 'training.json'} is missing: put a copy there, or train in another folder")
    entry = {
        "parameters": sum(parameter.numel() for parameter in recipe.parameters()),
        "seed": settings["seed"],
        "command": f"python -m dalleflamingo train {name} --steps {steps} --seed {settings['seed']}",
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "hardware": settings["hardware"],
        "minutes": round(minutes, 1),
        "curve": curve[::-every][::-1],
    }
    if settings["init_from"]:
        entry["init_from"] = settings["init_from"]
        entry["command"] += f" --init-from {settings['init_from']}"
    if name in STAGES:
        entry["stage_of"] = STAGES[name].split("/")[0]
    else:
        recipe.export((root or data_folder()) / name)
    return entry


def write_manifest(models: dict[str, dict], root: Path | None = None) -> None:
    """Write MANIFEST.json: all shipped files, and the entries of `models`; those of other models are kept.

    Args:
        models: name -> entry, of `ship`.
        root: folder of the miniature's data; None: `data_folder()`.
    Raises:
        ValueError: a file, or all together, are larger than the repository allows.
    """
    root = root or data_folder()
    file = root / "MANIFEST.json"
    manifest = json.loads(file.read_text()) if file.exists() else {"models": {}}
    found = (path for path in root.rglob("*") if path.is_file() and path != file)
    paths = sorted(path for path in found if "images" not in path.relative_to(root).parts)
    files = {
        str(path.relative_to(root)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }
    largest = max(files, key=lambda name: files[name]["bytes"])
    together = sum(entry["bytes"] for entry in files.values())
    if files[largest]["bytes"] > MAX_FILE_BYTES or together > MAX_TOTAL_BYTES:
        raise ValueError(
            f"{root} has {together:,} bytes, its largest file {largest} {files[largest]['bytes']:,}: "
            f"the repository allows {MAX_TOTAL_BYTES:,} and {MAX_FILE_BYTES:,}"
        )
    manifest |= {"licence": "MIT", "files": files, "models": manifest["models"] | models}
    write_whole(file, lambda part: part.write_text(json.dumps(manifest, indent=1) + "\n"))
