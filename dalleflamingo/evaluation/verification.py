"""Are the weights on this machine the published ones? Their sha256 says so."""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dalleflamingo import registry
from dalleflamingo.registry import Entry, RegistryError


def verify(name: str) -> None:
    """Compare the files of a model with their known sha256.

    Shipped files are compared with MANIFEST.json, real weights on this machine with `Entry.sha256`.

    Args:
        name: in `registry.ENTRIES`.
    Raises:
        RegistryError: a file is missing, truncated or changed, or no sha256 is known.
    """
    entry = registry.entry_of(name)
    if entry.shipped:
        files, manifest = list(registry.shipped_files(name)), registry.manifest_path()
        if not files:
            raise RegistryError(f"{manifest} lists no file of {name}: run `git checkout -- {manifest}`")
        for path, digest in files:
            _check_content(path, digest, f"run `git checkout -- {path}`")
        return
    if entry.sha256 is None:
        raise RegistryError(f"no sha256 of {name} is known, so it cannot be verified; see {entry.url}")
    for file, digest in entry.sha256.items():
        path = _downloaded(entry, file)
        _check_content(path, digest, f"delete it and load {name} again, which downloads it from {entry.url}")


def _check_content(path: Path, digest: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        size = path.stat().st_size
        raise RegistryError(
            f"{path} is changed: its {size:,} bytes have sha256 {found[:12]}…, expected {digest[:12]}…: {remedy}"
        )


def _downloaded(entry: Entry, file: str) -> Path:
    """The path of a real weight file on this machine."""
    if entry.name == "sbert" and (packaged := registry.packaged_sbert()):
        return packaged / file
    cached = try_to_load_from_cache(entry.source, file, revision=entry.revision)
    if not isinstance(cached, str):
        raise RegistryError(
            f"{file} of {entry.name} at revision {entry.revision} is not on this machine: load the model first"
        )
    return Path(cached)
