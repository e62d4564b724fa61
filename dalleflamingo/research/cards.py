"""The cards of the miniature: `python -m dalleflamingo research cards`.

Each shipped model has a README.md in its folder, in the format of the Hugging Face hub: what it is, how it was trained,
how good it is, what it cannot do. The README.md beside them is the card of the corpora. Figures come from MANIFEST.json
and the annotation files, all other text from `cards.toml`.
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from huggingface_hub import DatasetCardData, ModelCardData

from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.miniature.corpora import annotation_files, data_folder
from dalleflamingo.research import pages
from dalleflamingo.research.gates import table
from dalleflamingo.runs import write_whole

_TEXTS = Path(__file__).with_suffix(".toml")
_WARNING = "Results in the miniature say nothing about results on photographs."


def model_card(name: str, text: Mapping[str, str], manifest: Mapping) -> str:
    """The card of one model.

    Args:
        name: of the model's folder.
        text: its part of cards.toml.
        manifest: MANIFEST.json.
    """
    metadata = ModelCardData(
        license="mit", library_name=text["library"], pipeline_tag=text["task"], language="en", tags=["miniature"]
    )
    models = manifest["models"]
    stages = [entry for entry in models.values() if entry.get("stage_of") == name]
    trained = "\n".join(map(_training, [*stages, models[name]]))
    files = {file: one["bytes"] for file, one in manifest["files"].items() if file.split("/")[0] == name}
    return f"""---
{metadata.to_yaml()}
---
# miniature/{name}

{text["what"]} {_WARNING}

* Opens with `{text["opens"]}`; {sum(files.values()) / 1e6:.1f} MB, tensors in float16, used in float32.
* Licence: MIT, for code and weights.

## Training

{text["trained_on"]}

{trained}

## How good it is

Measured on development scenes, with 95 % intervals.

{table(gate for gate in manifest["gates"] if gate["model"] == name)}

## Limits

{text["limits"]}
"""


def _training(entry: Mapping) -> str:
    earlier = sum(run["minutes"] for run in entry.get("earlier", []))
    before = f", after {earlier:.0f} minutes of earlier runs" if earlier else ""
    took = f"{entry['minutes']:.0f} minutes{before} on {entry['hardware']}"
    return f"* `{entry['command']}`: {entry['parameters']:,} trained parameters, {took}"


def data_card(text: Mapping[str, str], files: Mapping[str, Path]) -> str:
    """The card of the corpora.

    Args:
        text: the part "corpora" of cards.toml.
        files: name of a split -> its annotation file.
    """
    metadata = DatasetCardData(
        license="mit", language="en", task_categories=["image-to-text", "text-to-image"], pretty_name="The miniature"
    )
    header = ("split", "images", "captions", "different captions", "words, mean", "words, 5 % to 95 %")
    sizes = [(name, *_sizes(json.loads(file.read_text()))) for name, file in files.items()]
    return f"""---
{metadata.to_yaml()}
---
# The miniature's corpora

{text["what"]} {_WARNING}

{pages.table(header, sizes)}

{text["made_by"]}

## Use

{text["use"]}

## Limits

{text["limits"]}

Licence: MIT.
"""


def _sizes(corpus: Mapping) -> tuple[str, ...]:
    """How many images and captions an annotation file has, and how long its captions are."""
    captions = [entry["caption"] for entry in corpus["annotations"]]
    words = np.array([len(caption.split()) for caption in captions])
    shortest, longest = np.quantile(words, (0.05, 0.95))
    counts = (len(corpus["images"]), len(captions), len(set(captions)))
    return *(f"{count:,}" for count in counts), f"{words.mean():.1f}", f"{shortest:.0f} to {longest:.0f}"


def main(arguments: list[str]) -> int:
    """Write the cards of the miniature's models and corpora: README.md in each folder."""
    command_parser("research cards", main.__doc__).parse_args(arguments)
    texts = tomllib.loads(_TEXTS.read_text(encoding="utf-8"))
    manifest = json.loads((data_folder() / "MANIFEST.json").read_text())
    cards = {data_folder(): data_card(texts.pop("corpora"), annotation_files())}
    cards |= {data_folder() / name: model_card(name, text, manifest) for name, text in texts.items()}
    for folder, card in cards.items():
        write_whole(folder / "README.md", lambda part, card=card: part.write_text(card, encoding="utf-8"))
        print(folder / "README.md")
    return 0
