"""The command `data`: draws the images of the miniature, and fetches the photographs that the notebooks open."""

from dataclasses import replace

from dalleflamingo import profiles, registry
from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.cycle import CaptionedBatches, CycleConfig
from dalleflamingo.datasets import Dataset
from dalleflamingo.miniature import corpora
from dalleflamingo.profiles import Profile
from dalleflamingo.sources import registered
from dalleflamingo.sources.remote import RemoteDataset


def photographs(name: str, profile: Profile) -> Dataset:
    """What the notebooks open of one of the profile's data sets; of the user's own copy or the miniature, all images.

    Fetches annotations, which say what there is, and no photograph; errors as `registered.load_dataset`.
    """
    found = registered.load_dataset(name, "train" if name == profile.coco else None)
    if not isinstance(found, RemoteDataset):
        return found
    ids_of = cycle_images if name == profile.coco else notebook_images
    ids = ids_of(Dataset(found.name, found.examples), profile)  # whose parts fetch nothing
    return replace(found, examples=tuple(example for example in found if example.image_id in ids))


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
    """Draw the images of the miniature that are not drawn yet.

    In the profiles colab and paper, fetch the photographs of NoCaps and COCO that the notebooks open, too; without this
    command they are fetched when they are opened. An interrupted command goes on where it was.

    `--write` and `--verify` are for the miniature alone, which lies in the repository's data/miniature, or in the
    folder miniature of DALLEFLAMINGO_DATA.
    """
    parser = command_parser("data", main.__doc__)
    parser.add_argument("--dry-run", action="store_true", help="fetch annotations only, and say what else would come")
    parser.add_argument("--profile", metavar="NAME", help="smoke, mini, colab or paper; default: the current one")
    parser.add_argument("--write", action="store_true", help="first write the miniature's annotation files anew")
    parser.add_argument("--verify", action="store_true", help="then compare all shipped files with their sha256")
    options = parser.parse_args(arguments)
    if not options.dry_run:
        corpora.prepare(options.write, options.verify)
    profile = profiles.current()
    if registry.entry_of(profile.dataset).shipped:
        if options.dry_run:
            print(f"profile {profile.name} needs no photographs")
        return 0
    for name in (profile.dataset, profile.coco):
        found = photographs(name, profile)
        if not isinstance(found, RemoteDataset):
            print(f"{found.name} is your own copy: {len(found)} images in {registered.user_folder(name)}")
        elif options.dry_run:
            print(found.plan())
        else:
            lost = len(found.fetch().shelf.lost)
            unavailable = f", {lost} cannot be had" if lost else ""
            print(f"{found.name}: {len(found) - lost} photographs are here{unavailable}")
    return 0
