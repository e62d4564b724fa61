"""The cycle study (Tables 3, 4, 5 and 9): a captioner and a generator finetuned in every arm, from several seeds.

    python -m dalleflamingo research cycle        the whole queue, going on where it was

The same command in a second terminal takes the runs that no other process is working on, so that every core can have
one. A run leaves two files in its folder: `run.json`, what it is made from, and `result.json`, the captions of every
test image by the finetuned captioner, and how far each image that the finetuned generator renders is from the real one.
`cycle_comparison.py` reads them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.commands.parsers import positive
from dalleflamingo.cycle import CycleConfig, build_cycle, train_cycle
from dalleflamingo.cycle_losses import Cycle
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.accelerators import make_accelerator
from dalleflamingo.evaluation.caption_results import describe_dataset
from dalleflamingo.evaluation.cycle_validation import render_captions
from dalleflamingo.evaluation.image_features import FeatureExtractor, ImageFiles
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.research.cycle_arms import START, Run, queue, trials
from dalleflamingo.research.cycle_start import WEB, beginning_with, flat, pretrained, pretraining
from dalleflamingo.research.image_ranking import distances
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.released import build_released_cycle
from dalleflamingo.research.unlabelled import build_unlabelled_cycle
from dalleflamingo.runs import RunFolderError, differences, fingerprint, read_settings, write_whole
from dalleflamingo.similarity import ClipImage, Encoder
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_cycle

RENDERED = 600  # images of NoCaps whose captions a generator renders, as many of every domain
RENDERED_IN_TRIALS = 300


def test_sets(profile: Profile, images: int | None = None) -> dict[str, Dataset]:
    """The test images that captioners describe, under the paper's names of the data sets.

    Args:
        profile: names the data sets.
        images: of each data set, of `dataset` as many of every domain; None: all.
    """
    nocaps, coco = registered.load_dataset(profile.dataset), registered.load_dataset(profile.coco, "test")
    if images is None:
        return {"nocaps": nocaps, "coco": coco}
    return {"nocaps": of_every_domain(nocaps, images), "coco": coco.subset(images)}


def of_every_domain(dataset: Dataset, images: int) -> Dataset:
    """As many images of every domain, so many in all; fewer are among those of more.

    Args:
        dataset: with domains.
        images: how many.
    """
    parts = dataset.by_domain().values()
    ids = {example.image_id for part in parts for example in part.subset(images // len(parts))}
    return dataset.filter(ids)


def development_sets(profile: Profile) -> dict[str, Dataset]:
    """Images on which settings may be chosen, none of them in the test, under the same names.

    Args:
        profile: names the data sets.
    Raises:
        ValueError: the registry has no development images for the profile's data set.
    """
    name = registry.entry_of(profile.dataset).development
    if not name:
        raise ValueError(
            f"no images like those of {profile.dataset} are set apart for choosing settings: use a profile of the "
            "miniature, such as mini"
        )
    return {"nocaps": registered.load_dataset(name), "coco": registered.load_dataset(profile.coco, "val")}


def builder_of(run: Run, profile: Profile, starts: Path) -> Callable[..., tuple]:
    """What builds the cycle of a run: both models as all arms begin, then the run's own kind of cycle.

    Args:
        run: of the study.
        profile: names the generator, and the data set whose images stay without captions, where the run needs some.
        starts: folder of the models that arms begin with; what is missing there is trained.
    Raises:
        ValueError: the run does not say which kind of cycle it has.
    """
    if run.kind.deviations:
        build = partial(build_released_cycle, deviations=run.kind.deviations)
    elif run.kind.unlabelled:
        build = partial(build_unlabelled_cycle, images=registered.load_dataset(*unlabelled_images(profile)))
    else:
        build = build_cycle
    return beginning_with(pretrained(run.captioner, profile, starts), build)


def unlabelled_images(profile: Profile) -> tuple[str, str | None]:
    """The data set and split whose images loss (2) sees without captions: the miniature's web, or real COCO.

    Args:
        profile: names COCO.
    """
    return (WEB, None) if registry.entry_of(profile.coco).shipped else (profile.coco, "train")


def made_from(
    run: Run,
    config: CycleConfig,
    start: CycleConfig | None,
    datasets: Mapping[str, Dataset],
    generated: Mapping[str, Dataset],
    profile: Profile,
) -> dict:
    """What the result of a run depends on, in JSON values.

    Args:
        run: which kind of cycle it has.
        config: settings of the run.
        start: those of the pretraining that it begins with, if it does.
        datasets: as of `train_and_evaluate`.
        generated: likewise.
        profile: likewise.
    """
    described, rendered = (
        {name: [dataset.name, len(dataset)] for name, dataset in part.items()} for part in (datasets, generated)
    )
    settings = {"config": asdict(config), "start": asdict(start) if start else None}
    evaluation = {name: getattr(profile, name) for name in ("steps", "guidance_scale", "clip", "inception")}
    models = (config.captioner, config.generator, profile.clip, profile.inception)
    return {
        "profile": profile.name,
        "arm": run.key,
        **settings,
        "described": described,
        "rendered": rendered,
        "evaluation": evaluation,
        "weights": {name: weights_of(name) for name in models},
    }


def weights_of(name: str) -> str | None:
    """What changes with the weights of a model: a digest of those that are shipped, or the hub's revision.

    Args:
        name: of the registry.
    """
    if not registry.entry_of(name).shipped:
        return registry.entry_of(name).revision
    return fingerprint([digest for path, digest in registry.shipped_files(name) if path.suffix == ".safetensors"])


def require_made_from(record: Mapping[str, object], folder: Path) -> None:
    """Refuse a folder whose run, finished or not, is made from something else.

    Args:
        record: of `made_from`.
        folder: of the run.
    Raises:
        RunFolderError: the record there differs, or is missing although there is a run.
    """
    path, remedy = folder / "run.json", "delete the folder to make the run again, or give another --runs"
    there = read_settings(path)
    if there is None and any((folder / name).exists() for name in ("result.json", "state.safetensors", "images")):
        raise RunFolderError(f"{folder} holds a run, but no run.json to say what it is made from: {remedy}")
    if there is not None and (lines := differences(flat(there), flat(record))):
        raise RunFolderError(f"{path} is of a run that is made from something else:\n{lines}\nSo {remedy}.")


def train_and_evaluate(
    run: Run,
    config: CycleConfig,
    folder: Path,
    datasets: Mapping[str, Dataset],
    generated: Mapping[str, Dataset],
    profile: Profile,
    build: Callable[..., tuple] | None = None,
) -> dict:
    """Train, going on where the folder's run was, evaluate, and write `result.json`; a run that is done is only read.

    `run.json` is there before the training, so that whatever is found in the folder is known to be of this run.

    Args:
        run: what is trained.
        config: its settings.
        folder: of the run.
        datasets: images that the captioner describes, by name.
        generated: images whose captions the generator renders, likewise.
        profile: names the models that evaluate.
        build: makes the cycle of the models, as `cycle.build_cycle`; None: that of `builder_of`.
    Raises:
        RunFolderError: as `require_made_from` and `cycle.train_cycle`.
    """
    result, start = folder / "result.json", None if build else pretraining(run.captioner, profile)
    record = made_from(run, config, start, datasets, generated, profile)
    require_made_from(record, folder)
    if result.exists():
        return read_result(result)
    build = build or builder_of(run, profile, folder.parent / "starts")
    cycle, batches, trainable = load_cycle(config, torch.device(profile.device), build)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "run.json", record)
    if run.arm != START:
        train_cycle(config, cycle, batches, trainable, folder, make_accelerator(config))
    found = {"arm": run.arm, "captioner": run.captioner, "seed": run.seed}
    found |= evaluate(cycle, folder, datasets, generated, profile)
    _write_json(result, found)
    return found


def read_result(path: Path) -> dict:
    """What `train_and_evaluate` returned when it wrote the file; in JSON, keys such as image ids are texts."""
    found = json.loads(path.read_text(encoding="utf-8"))
    captions = {name: {int(i): text for i, text in by_id.items()} for name, by_id in found["captions"].items()}
    return found | {"captions": captions}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content) + "\n", encoding="utf-8"))


@torch.no_grad()
def evaluate(
    cycle: Cycle, folder: Path, datasets: Mapping[str, Dataset], generated: Mapping[str, Dataset], profile: Profile
) -> dict:
    """Let both models work on test images.

    Args:
        cycle: the models.
        folder: keeps the generated images, in `images/NAME`.
        datasets: images that the captioner describes, by name.
        generated: images whose captions the generator renders, likewise.
        profile: names the models that evaluate the generated images, and says how they are generated.
    Returns:
        captions: name -> image id -> caption. images: name -> what `evaluate_generator` returns.
    """
    captions = {name: describe_dataset(cycle.captioner, dataset) for name, dataset in datasets.items()}
    images = {}
    if generated:
        clip = ClipImage.from_pretrained(**registry.source_of(profile.clip, profile.device))
        inception = FeatureExtractor.from_registry(profile.inception, profile.device)
        for name, dataset in generated.items():
            images[name] = evaluate_generator(
                cycle.generator, dataset, folder / "images" / name, profile, clip, inception
            )
    return {"captions": captions, "images": images}


def evaluate_generator(
    generator: Generator,
    dataset: Dataset,
    folder: Path,
    profile: Profile,
    clip: Encoder,
    inception: FeatureExtractor,
) -> dict[str, list]:
    """Render a human caption of every image, save the generated images, and compare them with the real ones.

    An image that is there is not rendered again: `train_and_evaluate` sees to it that it is this run's.

    Args:
        generator: renders.
        dataset: real images with captions.
        folder: gets `IMAGE_ID.png`.
        profile: guidance scale, batch size, and steps, of which the arms' scheduler needs half.
        clip: compares.
        inception: extracts the features of FID.
    Returns:
        image_id; clip_distance × 100 of each generated image to its real one; its features: a list each.
    """
    examples = list(dataset)
    paths = [folder / f"{example.image_id}.png" for example in examples]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(example, path) for example, path in zip(examples, paths, strict=True) if not path.exists()]
    for start in range(0, len(missing), profile.batch_size):
        part, of_part = zip(*missing[start : start + profile.batch_size], strict=True)
        images = render_captions(generator, part, profile.steps // 2, profile.guidance_scale, len(part))
        for path, image in zip(of_part, images, strict=True):
            write_whole(path, partial(image.save, format="PNG"))
    real, generated = [dataset.open(example) for example in examples], ImageFiles(paths)
    return {
        "image_id": [example.image_id for example in examples],
        "clip_distance": distances(clip, real, generated, np.arange(len(real))).tolist(),
        "features": inception.extract(generated).features.half().tolist(),
    }


def work(
    wanted: Mapping[Run, CycleConfig],
    folder: Path,
    datasets: Mapping[str, Dataset],
    profile: Profile,
    rendered: int,
) -> None:
    """Do the runs that are not done yet, but for those that another process is working on.

    Args:
        wanted: the settings of every run.
        folder: of all runs; a run has its own in it, under its name.
        datasets: images that captioners describe, by name.
        profile: names the models that evaluate.
        rendered: images of NoCaps that a generator is evaluated on, if its run generates, or all of fewer.
    """
    nocaps = datasets["nocaps"]
    generated = {"nocaps": of_every_domain(nocaps, min(rendered, len(nocaps)))}
    folder.mkdir(parents=True, exist_ok=True)
    for run, config in tqdm(wanted.items(), desc="cycle study", unit="run"):
        try:
            lock = FileLock(folder / f"{run.name}.lock", timeout=0, fallback_to_soft=False).acquire()
        except Timeout:
            continue
        with lock:
            train_and_evaluate(run, config, folder / run.name, datasets, generated if run.generates else {}, profile)


def folder_of(runs: Path, profile: Profile) -> Path:
    """The folder of the study's runs among those of all studies: another profile has other runs."""
    return runs / f"cycle-{profile.name}"


def main(arguments: list[str]) -> int:
    """Train and evaluate the runs of the cycle study that are not done yet.

    The models and data are the profile's. Every run has a folder, and a run that was interrupted goes on from its last
    checkpoint. The same command in a second terminal takes other runs.
    """
    parser = study_parser("cycle", main.__doc__, docs=False)
    parser.add_argument(
        "--images",
        type=positive,
        help="test images of each data set, three domains alike; default: all",
    )
    parser.add_argument(
        "--trials", action="store_true", help="instead the runs that settings are chosen by, on development images"
    )
    options = parse(parser, arguments)
    profile = profiles.current()
    folder = folder_of(options.runs, profile)
    if options.trials:
        datasets, wanted, folder = development_sets(profile), trials(profile), folder / "trials"
        work(wanted, folder, datasets, profile, RENDERED_IN_TRIALS)
    else:
        datasets, wanted = test_sets(profile, options.images), queue(profile)
        work(wanted, folder, datasets, profile, RENDERED)
    print(f"{folder}: {sum(1 for _ in folder.glob('*/result.json'))} of {len(wanted)} runs")
    return 0
