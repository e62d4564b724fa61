"""Write the trained models into `data/miniature`: `python -m dalleflamingo train --ship`.

The MANIFEST names every file with its sha256 and size, and for every model its seed, recipe, minutes, hardware and
curve, and how many parameters were trained; `gates.py` adds how good the models are. A run that began from the weights
of others (`--init-from`) says which in a file `earlier.json` of its folder: a list of {"what", "steps", "minutes"},
first to last.
"""

import argparse
import hashlib
import json
import os
import platform
from pathlib import Path

from dalleflamingo.miniature.corpora import ROOT
from dalleflamingo.miniature.training.recipes import RECIPES, RUNS
from dalleflamingo.runs import load_trained

# trained on the way to a model that is shipped: the MANIFEST tells their history only
STAGES = ("vae", "clip-web", "sd-text", "blip-web", "blip-large-web", "blip2-web")
LARGEST_FILE, LARGEST_ALL = 16 * 2**20, 48 * 2**20
_CURVE_POINTS = 60


def ship(name: str, root: Path = ROOT) -> dict:
    """Export one trained model into its folder, if it is not a stage of another; returns its entry in the MANIFEST.

    Raises:
        FileNotFoundError: if it has not been trained.
    """
    recipe = RECIPES[name]()
    steps, minutes = load_trained(recipe, RUNS / name)
    curve = [json.loads(line) for line in (RUNS / name / "log.jsonl").read_text().splitlines()]
    every = max(1, len(curve) // _CURVE_POINTS)
    entry = {
        "parameters": sum(parameter.numel() for parameter in recipe.parameters()),
        "seed": 0,
        "command": f"python -m dalleflamingo train {name} --steps {steps}",
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "hardware": f"one {platform.machine()} CPU core of {os.cpu_count()}",
        "minutes": round(minutes, 1),
        "curve": curve[::-every][::-1],
    }
    if (RUNS / name / "earlier.json").exists():
        entry["earlier"] = json.loads((RUNS / name / "earlier.json").read_text())
    if name not in STAGES:
        recipe.export(root / name)
    return entry


def write_manifest(models: dict, root: Path = ROOT) -> None:
    """List every shipped file, and what is known of `models`; entries of models that are not named are kept.

    Raises:
        ValueError: if a file or all files together are larger than the repository allows.
    """
    file = root / "MANIFEST.json"
    manifest = json.loads(file.read_text()) if file.exists() else {"models": {}}
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".png" and path != file)
    files = {
        str(path.relative_to(root)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }
    largest = max(files, key=lambda name: files[name]["bytes"])
    together = sum(entry["bytes"] for entry in files.values())
    if files[largest]["bytes"] > LARGEST_FILE or together > LARGEST_ALL:
        raise ValueError(
            f"{root} holds {together:,} bytes, {largest} {files[largest]['bytes']:,}: 48 MB and 16 MB are allowed"
        )
    manifest |= {"licence": "MIT", "files": files, "models": manifest["models"] | models}
    file.write_text(json.dumps(manifest, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="which (default: all)", metavar="MODEL")
    names = parser.parse_args(arguments).models or list(RECIPES)
    write_manifest({name: ship(name) for name in names})
    print(f"shipped {', '.join(names)} to {ROOT}")
