"""The command `data`: draws the images of the miniature, and fetches the photographs that the notebooks open."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

from dalleflamingo import profiles, registry
from dalleflamingo.cycle import CaptionedBatches, CycleConfig
from dalleflamingo.datasets import Dataset
from dalleflamingo.miniature import corpora
from dalleflamingo.profiles import Profile
from dalleflamingo.sources import registered
from dalleflamingo.sources.remote import RemoteDataset


def photographs(profile: Profile) -> Iterator[RemoteDataset]:
    """What the notebooks open of the profile's data sets, of those that are fetched and not the user's own.

    Fetches the annotations, which say what there is; errors as `registered.load_dataset`.
    """
    for name, split, ids_of in ((profile.dataset, None, notebook_images), (profile.coco, "train", cycle_images)):
        found = registered.load_dataset(name, split)
        if isinstance(found, RemoteDataset):
            ids = ids_of(Dataset(found.name, found.examples), profile)  # whose parts fetch nothing
            yield replace(found, examples=tuple(example for example in found if example.image_id in ids))
        else:
            print(f"{found.name} is your own copy: {len(found)} images in {registered.user_folder(name)}")


def notebook_images(dataset: Dataset, profile: Profile) -> set[int]:
    """Ids of the images that the notebooks open of the data set of the experiments."""
    parts = [
        dataset.subset(1, seed=3),  # 00 and 03: one example
        dataset.subset(min(2 * profile.images, len(dataset))),  # 04 and 05: profile.images of them; 07: all
        dataset[:256],  # 05: what the generated images are compared with
    ]
    return {example.image_id for part in parts for example in part}


def cycle_images(dataset: Dataset, profile: Profile) -> set[int]:
    """Ids of the labelled images of a cycle finetuning with the profile's settings (06)."""
    config = CycleConfig.of(profile)
    dataset = dataset if config.images is None else dataset.subset(config.images)
    if config.steps * config.batch_size >= len(dataset):  # an epoch or more
        return {example.image_id for example in dataset}
    batches = CaptionedBatches(dataset, None, None, config.batch_size, config.seed)
    return {example.image_id for step in range(config.steps) for example, _ in batches.choose(step)}


def main(arguments: list[str]) -> int:
    """The command `python -m dalleflamingo data`; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dalleflamingo data",
        description="Draw the images of the miniature that are not drawn yet. In the profiles colab and paper, fetch "
        "the photographs of NoCaps and COCO that the notebooks open, too; without this command they are fetched when "
        "they are opened. An interrupted command goes on where it was.",
        epilog="`--write` and `--verify` are for the miniature alone.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="fetch annotations only, and say what else would come")
    parser.add_argument("--profile", metavar="NAME", help="smoke, mini, colab or paper; default: the current one")
    parser.add_argument("--write", action="store_true", help="first write the miniature's annotation files anew")
    parser.add_argument("--verify", action="store_true", help="then compare all shipped files with their sha256")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        corpora.main([f"--{name}" for name in ("write", "verify") if getattr(options, name)])
    profile = profiles.current()
    if registry.entry_of(profile.dataset).shipped:
        return 0
    for found in photographs(profile):
        print(found.plan()) if options.dry_run else found.fetch()
        lost = len(found.shelf.lost)
        if not options.dry_run:
            print(
                f"{found.name}: {len(found) - lost} photographs are here" + (f", {lost} cannot be had" if lost else "")
            )
    return 0
