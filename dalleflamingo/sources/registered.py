"""The data sets of the registry, by name: the miniature's, the user's own copies, and those that are fetched.

dataset = load_dataset("nocaps")
"""

import os
import pkgutil
from pathlib import Path

from dalleflamingo.datasets import Dataset
from dalleflamingo.registry import Entry, RegistryError, data_root, entry_of, require_split


def load_dataset(name: str, split: str | None = None) -> Dataset:
    """A data set of the registry. One that is neither shipped nor the user's own copy fetches its photographs.

    Args:
        name: in `registry.ENTRIES`.
        split: one of `Entry.splits`; None for a data set without splits.
    Raises:
        RegistryError: unknown name or split, the images are missing, or the data set cannot be fetched.
        DatasetError: the annotations do not have the expected format.
    """
    entry = entry_of(name)
    if entry.kind != "data set":
        raise RegistryError(f"{name} is a model: registry.locate({name!r}) says where it is")
    require_split(entry, split)
    if is_fetched(entry):
        return pkgutil.resolve_name(entry.fetched_by)(entry, split)
    folder = data_root() / name if entry.shipped else user_folder(name)
    found = pkgutil.resolve_name(entry.opened_by)(folder, entry.annotations.format(split=split), split)
    missing = [example.path for example in found if not example.path.is_file()]
    if missing and (entry.shipped or len(missing) == len(found)):  # a run skips and lists single lost photographs
        remedy = "run `make data` (or `python -m dalleflamingo data`)" if entry.shipped else entry.notes
        raise RegistryError(
            f"{len(missing)} of the {len(found)} images of {name} are missing, {missing[0]} for one: {remedy}"
        )
    return Dataset(f"{name}/{split}" if split else name, found.examples)


def is_fetched(entry: Entry) -> bool:
    """Whether a data set comes from its address: it can, and the user names no own copy."""
    return bool(entry.fetched_by) and not os.environ.get(variable_of(entry.name))


def user_folder(name: str) -> Path:
    """The user's own copy of a data set that is not shipped.

    Raises:
        RegistryError: unknown name, or `variable_of` it is not set to a folder.
    """
    entry, variable = entry_of(name), variable_of(name)
    given = os.environ.get(variable)
    folder = Path(os.path.expanduser(given or ""))
    if not given or not folder.is_dir():
        problem = f"{variable}={given!r} is not a folder" if given else f"{variable} is not set"
        raise RegistryError(f"{name} is not shipped, and {problem}. {entry.notes}")
    return folder


def variable_of(name: str) -> str:
    """The environment variable that names the folder of the user's own copy of a data set."""
    return f"DALLEFLAMINGO_{name.upper()}"
