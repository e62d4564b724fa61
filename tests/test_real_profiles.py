"""Every notebook in the profiles of the real models, with tiny untrained models under the real names.

NoCaps has its published size and COCO a twentieth (`test_data_calls` has all of it). Four images of each go through the
models. What a cell does with the miniature, it does with the shipped one.
"""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import headers
import matplotlib
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from IPython.display import display
from matplotlib import pyplot

import dalleflamingo
from dalleflamingo import profiles, registry
from dalleflamingo.evaluation import intervals
from dalleflamingo.research import repair
from dalleflamingo.sources import registered

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
TINY = {
    "blip-large": tiny.blip,
    "blip-base": tiny.blip,
    "blip2-opt-2.7b-coco": tiny.blip2,
    "sd-v1-4": partial(tiny.stable_diffusion, tokens=77),
    "clip-vit-l-14": partial(tiny.clip, vocabulary=49_408, tokens=77),
    "dino-vitb8": tiny.dino,
}
FEWER = dict(images=4, candidates=2, steps=3, image_size=64, dino_size=tiny.SIZE)
SMALL_INCEPTION = "miniature/inception"
RESAMPLES = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Real name -> folder or file of an untrained model."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, make in TINY.items():
        (root / name).mkdir()
        made[name] = str(make(root / name))
    folder = made["sd-v1-4"]
    halved = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float16)
    halved.save_pretrained(folder, variant="fp16")  # as on the hub
    return made | {"inception-v3": registry.locate(SMALL_INCEPTION)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The variables that name COCO and NoCaps. Their photographs are eight small images, over and over."""
    root = tmp_path_factory.mktemp("data")
    variables = headers.write_headers(root, {split: count // 20 for split, count in headers.COCO.items()})
    images = [image.resize((64, 64)) for image in tiny.pictures(8)]
    small = [root / f"{i}.jpg" for i in range(len(images))]
    for path, image in zip(small, images, strict=True):
        image.save(path)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in ("nocaps", "coco"):
            for split in registry.ENTRIES[name].splits or (None,):
                for example, path in zip(registered.load_dataset(name, split), itertools.cycle(small)):
                    example.path.unlink(missing_ok=True)
                    example.path.symlink_to(path)
    return variables


@pytest.fixture(params=["colab", "paper"])
def profile(request, models, folders, tmp_path, monkeypatch) -> profiles.Profile:
    """A profile whose names stand for tiny models, which get four images of each data set."""
    matplotlib.use("agg")
    whole = profiles.PROFILES[request.param]
    fewer = dataclasses.replace(whole, **FEWER, cycle={**whole.cycle, "steps": 2})
    if whole.name == "colab":  # half precision, as with a GPU
        monkeypatch.setattr(profiles.Profile, "torch_dtype", torch.float16)
    # the front door first: it looks its name up in the module, and would keep what stands there only for now
    for module, name in ((dalleflamingo, "current_profile"), (profiles, "current")):
        monkeypatch.setattr(module, name, lambda: fewer)
    for name, value in {**folders, profiles.VARIABLE: whole.name, "DALLEFLAMINGO_RUNS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    locate, drawn, few = registry.locate, intervals._distribution, repair.Sizes(images=4, prompts=2)
    small = dataclasses.replace(registry.ENTRIES["inception-v3"], opened_by=registry.ENTRIES[SMALL_INCEPTION].opened_by)
    monkeypatch.setitem(registry.ENTRIES, small.name, small)
    monkeypatch.setattr(registry, "locate", lambda name: models.get(name) or locate(name))
    monkeypatch.setattr(
        intervals, "_distribution", lambda items, statistic, _, seed: drawn(items, statistic, RESAMPLES, seed)
    )
    monkeypatch.setattr(repair, "Sizes", lambda **_: few)
    monkeypatch.chdir(NOTEBOOKS)
    yield fewer
    pyplot.close("all")


def executed(notebook: str) -> dict[str, object]:
    """The names that a notebook's code cells leave."""
    names: dict[str, object] = {"__name__": "__main__", "display": display}
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}, {cell['id']}", "exec"), names)
    return names


@pytest.mark.parametrize("notebook", NAMES)
def test_a_notebook_runs_to_its_end(notebook, profile):
    names = executed(notebook)
    assert notebook.startswith("02") or names["profile"] is profile  # which needs none
    if notebook == "06_cycle_finetuning":  # its losses by hand are those of a batch in parts, decoded smaller
        config = names["config"]
        assert config.accumulation == 8 and config.losses.decoded_size == 256 and config.checkpointing
        assert all(norm > 0 for norm in names["norms"]["(2) image → text → image"].values())
    if notebook == "08_the_real_models":
        assert set(names["cells"]["captioner"]) == {"BLIP (ViT-L)"}
