"""Weights are whole, or an error says which file is not and how to get it back.

Only safetensors are read anywhere in this package: a file that holds numbers and cannot run code. Its header states
how long it must be, so a file cut short by a full disk or a broken copy is found at once, whatever library loads it.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from dalleflamingo.registry import RegistryError


def check_weights(name_or_path: str | Path) -> str:
    """The name itself, once every safetensors file of the folder has been found whole.

    The name of a model on a hub passes unchecked: its downloader compares sizes itself.

    Raises:
        RegistryError: the folder holds no safetensors, or one that is cut short.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            raise RegistryError(f"{folder} holds no .safetensors file. {_remedy(folder)}")
        for file in files:
            _check_file(file)
    return str(name_or_path)


def _check_file(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise RegistryError(f"{file} ({size:,} bytes) is damaged or cut short: {error}. {_remedy(file)}") from error


def _remedy(path: Path) -> str:
    return f"If it came with this repository, restore it: git checkout -- {path}. If not, copy or download it again."
