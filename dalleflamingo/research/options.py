"""The options that the studies of the command line share."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import command_parser, nonempty_path, positive

RUNS = Path("build/runs")


def study_parser(name: str, about: str, docs: bool = True) -> argparse.ArgumentParser:
    """A parser with --runs, --docs, --threads and --profile.

    Args:
        name: of the study, as the command line has it.
        about: the study, in words.
        docs: it reads or writes the docs; else it has no --docs.
    """
    epilog = "An interrupted study goes on when the same command is given again."
    parser = command_parser(f"research {name}", about, epilog)
    about_runs = "folder of the run folders of all studies; default: %(default)s"
    parser.add_argument("--runs", type=nonempty_path, default=RUNS, help=about_runs)
    if docs:
        about_docs = "has results/ and figures/; default: %(default)s"
        parser.add_argument("--docs", type=nonempty_path, default=Path("docs"), help=about_docs)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: PyTorch's own choice")
    parser.add_argument(
        "--profile", metavar="NAME", help=f"models and size; default: ${profiles.VARIABLE}, or mini where it is unset"
    )
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, once the threads and the profile that they name are set for this process.

    Args:
        parser: of `study_parser`, with what a study adds to it.
        arguments: the words behind the study's name.
    """
    options = parser.parse_args(arguments)
    for name in {"runs", "docs"} & vars(options).keys():  # before a study works for hours
        _check_writable(parser, name, getattr(options, name))
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.profile is not None:  # `__main__` takes the option away; a study that is called directly finds it
        if options.profile not in profiles.PROFILES:
            known = ", ".join(profiles.PROFILES)
            parser.error(f"argument --profile: unknown profile {options.profile!r}: one of {known}")
        os.environ[profiles.VARIABLE] = options.profile
    return options


def _check_writable(parser: argparse.ArgumentParser, name: str, folder: Path) -> None:
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        problem = "cannot be written to" if above.is_dir() else "is not a folder"
        parser.error(f"--{name} {folder}: {above} {problem}; give another folder")
