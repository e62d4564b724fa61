"""Git in a folder of a test, whatever the user's own settings are."""

import os
import subprocess
from pathlib import Path

OWN = (
    "user.name=A",
    "user.email=a@example.org",
    "commit.gpgsign=false",
    "tag.gpgsign=false",
    f"core.hooksPath={os.devnull}",
)


def git(folder: Path, *arguments: object) -> None:
    settings = [word for setting in OWN for word in ("-c", setting)]
    subprocess.run(["git", "-C", folder, *settings, *map(str, arguments)], check=True, capture_output=True)
