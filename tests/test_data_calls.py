"""No notebook and no study asks for more images than there are, in any profile, on data sets of their real sizes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import headers
import pandas as pd
import pytest
from headers import UNKNOWN, Unavailable

from dalleflamingo import cycle, datasets, profiles, registry
from dalleflamingo.cycle import CaptionedBatches, CycleConfig
from dalleflamingo.datasets import Dataset, DatasetError
from dalleflamingo.evaluation import image_features
from dalleflamingo.evaluation.cycle_validation import validation_set
from dalleflamingo.profiles import PROFILES, Profile
from dalleflamingo.research import cycle_arms, cycle_study, insights, stability, studies, variants
from dalleflamingo.sources import annotations, registered
from dalleflamingo.sources.models import load_cycle

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
IMAGES = sorted({200, *map(int, re.findall(r"--images (\d+)", (ROOT / "Makefile").read_text()))})  # of studies
MODELS = """load_models load_captioner load_generator load_text_similarities ClipImage VocabularyMap AutoTokenizer
    wordpiece_tokenizer clip_tokenizer image_text_image text_image_text train_cycle show checks image_features display
    ImageFiles TextJourneyModels evaluate_captions nucleus_sweep cider_by_p measure rerender check_similarities
    insight_2_by_captioner FeatureExtractor understanding"""


def load_batches(config: CycleConfig, device: object) -> tuple:
    """`load_cycle` without models: what comes out of it but the batches is unknown."""

    def build(config, captioner, generator, dataset):
        return UNKNOWN, CaptionedBatches(dataset, captioner, generator, config.batch_size, config.seed), UNKNOWN

    return load_cycle(config, device, build)


REPLACED = {**dict.fromkeys(MODELS.split(), UNKNOWN), "load_cycle": load_batches}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The variables that name the folders of COCO's and NoCaps' headers."""
    return headers.write_headers(tmp_path_factory.mktemp("headers"))


@pytest.fixture(scope="module")
def read_once():
    """The readers of data sets, which read each only once, because COCO takes seconds."""
    kept = {}

    def once(read):
        def reader(folder: Path, file: str, split: str | None) -> Dataset:
            if (folder, file, split) not in kept:
                kept[folder, file, split] = read(folder, file, split)
            return kept[folder, file, split]

        return reader

    return {name: once(getattr(annotations, name)) for name in ("open_coco", "open_karpathy")}


@pytest.fixture(params=list(PROFILES))
def profile(request, folders, read_once, monkeypatch) -> Profile:
    """A profile whose data sets have their real sizes, without models and pixels; by default every one in turn."""

    def unavailable(*_):
        raise Unavailable

    for variable, value in {**folders, profiles.VARIABLE: request.param}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("DALLEFLAMINGO_REAL_DATA", raising=False)
    for name, reader in read_once.items():
        monkeypatch.setattr(annotations, name, reader)
    monkeypatch.setattr(datasets, "open_image", unavailable)
    monkeypatch.setattr(image_features.FeatureExtractor, "from_registry", unavailable)
    for kind in (cycle.Captioner, cycle.Generator):
        monkeypatch.setattr(kind, "from_pretrained", lambda **_: UNKNOWN)
    return PROFILES[request.param]


def code(notebook: str) -> str:
    """The code of a notebook, a cell behind the other."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("profile", ["paper"], indirect=True)
def test_the_headers_have_the_published_sizes(profile):
    sizes = {split: len(registered.load_dataset("coco", split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 113_287, "val": 5_000, "test": 5_000}
    nocaps = registered.load_dataset("nocaps")
    assert len(nocaps) == 4_500 and {len(example.references) for example in nocaps} == {10}
    assert list(nocaps.by_domain()) == list(datasets.DOMAINS)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_asks_for_no_more_than_there_is(notebook, profile, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    calls, reached = headers.run(code(notebook), {"__name__": "__main__"}, REPLACED)
    assert calls and reached == calls


def asked(notebook: str, change: tuple[str, str]) -> None:
    """Run a notebook in which a piece of code is another."""
    source = code(notebook)
    assert source.count(change[0]) == 1
    calls, reached = headers.run(source.replace(*change), {"__name__": "__main__"}, REPLACED)
    assert reached == calls


@pytest.mark.parametrize(
    ("notebook", "profile", "change", "message"),
    [
        ("07_ablations", "paper", ("min(2 * profile.images, len(whole_dataset))", "2 * profile.images"), "9000 .*4500"),
        ("04_image_text_image", "paper", ("subset(profile.images)", "subset(profile.images + 1)"), "4501 .*4500"),
        ("05_text_image_text", "smoke", ("subset(profile.images)", "subset(400 * profile.images)"), "1600 .*1500"),
        ("00_the_question", "colab", ("dataset.subset(1, seed=3)", "dataset.subset(4600, seed=3)"), "4600 .*4500"),
        (
            "06_cycle_finetuning",
            "mini",
            ("CycleConfig.of(profile)", "CycleConfig.of(profile, images=2001)"),
            "2001 .*2000",
        ),
        ("07_ablations", "colab", ("CycleConfig.of(profile)", "CycleConfig.of(profile, images=113_288)"), "113287"),
    ],
    indirect=["profile"],
)
def test_a_notebook_that_asks_for_more_is_caught(notebook, profile, change, message):
    with pytest.raises(DatasetError, match=message):
        asked(notebook, change)


@pytest.mark.parametrize("profile", ["colab"], indirect=True)
def test_what_one_profile_may_not_ask_another_may(profile):
    asked("07_ablations", ("min(2 * profile.images, len(whole_dataset))", "2 * profile.images"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("subset(profile.images)", "by_domain()['in-domain'][profile.images]"), "IndexError"),
        (("load_dataset(profile.dataset)", "load_dataset(profile.coco)"), "RegistryError"),
        (("subset(profile.images)", "subset(load_models.limit)"), "AssertionError"),  # nobody can see how many
    ],
)
@pytest.mark.parametrize("profile", ["paper"], indirect=True)
def test_other_wrong_calls_and_calls_out_of_sight_are_caught_too(profile, change, error):
    with pytest.raises((IndexError, registry.RegistryError, AssertionError)) as caught:
        asked("04_image_text_image", change)
    assert type(caught.value).__name__ == error


# Studies


def insight_of(profile: Profile) -> SimpleNamespace:
    """In place of `report`: what an insight of the profile has in the docs."""
    examples = registered.load_dataset(profile.dataset).subset(500)
    rows = [{"image_id": example.image_id, "candidate": k} for example in examples for k in range(insights.RANKED)]
    return SimpleNamespace(load=lambda name, folder: (pd.DataFrame(rows), UNKNOWN))


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("study", ["main_1", "main_2"])
def test_the_insights_ask_for_no_more_than_there_is(study, images, profile, monkeypatch):
    found = []
    for name in ("insight_1", "insight_2"):
        monkeypatch.setattr(insights, name, lambda dataset, *_: found.append(len(dataset)))
    for models in (insights.ImageJourneyModels, insights.TextJourneyModels):
        monkeypatch.setattr(models, "load", lambda *_: UNKNOWN)
    monkeypatch.setattr(
        insights, "_write", lambda name, measured, docs: measured(registered.load_dataset(profile.dataset))
    )
    getattr(insights, study)(["--images", str(images)])
    assert found == [images]


@pytest.mark.parametrize("images", IMAGES)
def test_the_studies_ask_for_no_more_than_there_is(images, profile, tmp_path):
    (tmp_path / "images").mkdir()
    replaced = {**REPLACED, "report": insight_of(profile), "run_variant": UNKNOWN}
    of_this_profile = [v for v in variants.VARIANTS.values() if profile.other_generator or not v.other_generator]
    for function, arguments in (
        (studies.measure_studies, [tmp_path, tmp_path]),
        (studies._tokenized_alike, [profile]),
        (variants.measure_variants, [images, tmp_path, tmp_path]),
        (variants.insight_2_by_captioner, [tmp_path, tmp_path]),
        (stability.measure_stability, [images, 4, tmp_path, tmp_path]),
        *((variants.run_variant, [one, profile, images, tmp_path]) for one in of_this_profile),
    ):
        calls, reached = headers.run_function(function, arguments, replaced)
        assert calls and reached == calls, function.__name__


def test_the_cycle_study_asks_for_no_more_than_there_is(profile):
    assert len(cycle_study.of_every_domain(cycle_study.test_sets(profile)["nocaps"], cycle_study.RENDERED)) == 600
    for images in IMAGES:
        found = cycle_study.test_sets(profile, images)
        assert len(found["coco"]) == images and images - 3 < len(found["nocaps"]) <= images
    if registry.entry_of(profile.dataset).development:
        assert all(map(len, cycle_study.development_sets(profile).values()))
    configurations = [*cycle_arms.queue(profile).values(), CycleConfig.of(profile)]
    if profile.judge:  # settings were chosen for the miniature, whose development images there are
        configurations += cycle_arms.trials(profile).values()
    data = {(config.dataset, config.split, config.images, config.batch_size): config for config in configurations}
    for config in data.values():
        _, batches, _ = load_batches(config, "cpu")
        assert len(batches.choose(config.steps)) == config.batch_size
        assert len(validation_set(config)) == 200


@pytest.mark.parametrize("profile", ["smoke", "paper"], indirect=True)
def test_a_study_that_asks_for_more_is_caught(profile, monkeypatch, tmp_path):
    replaced = {**REPLACED, "report": insight_of(profile)}
    whole = len(registered.load_dataset(profile.dataset))
    monkeypatch.setitem(studies.MORE, "images", whole + 1)
    with pytest.raises(DatasetError, match=f"{whole + 1} .* 1 to {whole}"):
        headers.run_function(studies.measure_studies, [tmp_path, tmp_path], replaced)
    with pytest.raises(DatasetError, match=f"{whole + 1} .* 1 to {whole}"):
        headers.run_function(stability.measure_stability, [whole + 1, 4, tmp_path, tmp_path], replaced)
    with pytest.raises(DatasetError, match=f"of {3 * whole} was asked"):
        cycle_study.test_sets(profile, 9 * whole)
