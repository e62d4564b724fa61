"""The parser of every command, and options that several have. Nothing here imports torch: `--help` answers at once."""

import argparse
import inspect
from pathlib import Path
from typing import NoReturn

# `profiles.VARIABLE`, spelled again because importing it would import torch, without which --help answers at once
PROFILE = "DALLEFLAMINGO_PROFILE"
PROFILE_HELP = f"""models and size: smoke (seconds) and mini (minutes) run the miniature's models on a CPU, colab and
paper run BLIP and Stable Diffusion on a GPU; default: ${PROFILE}, or mini where it is unset"""


class Parser(argparse.ArgumentParser):
    """With its texts as they are written, options in full only, and an error in one line."""

    def __init__(self, **settings):
        # no abbreviations: `__main__` has taken --profile away, and --prof would reach the command and be ignored
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def command_parser(name: str, about: str, epilog: str | None = None) -> Parser:
    """The parser of a command.

    Args:
        name: of the command, behind `python -m dalleflamingo`.
        about: what it does, often its docstring.
        epilog: below the options.
    """
    return Parser(prog=f"python -m dalleflamingo {name}", description=inspect.cleandoc(about), epilog=epilog)


def add_shared(parser: argparse.ArgumentParser, steps: str, batch_size: str) -> None:
    """The options of `reconstruct` and `cycle`."""
    parser.add_argument("--steps", type=positive, help=steps)
    parser.add_argument("--batch-size", type=positive, metavar="B", help=batch_size)
    parser.add_argument("--seed", type=int, help="of all random numbers; default: 0")
    add_profile(parser)


def add_profile(parser: argparse.ArgumentParser) -> None:
    """The option --profile, for the help only: `__main__` takes it away before a command sees it."""
    parser.add_argument("--profile", metavar="NAME", help=PROFILE_HELP)


def nonempty_path(text: str) -> Path:
    """The type of an option that is a path.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:  # which pathlib takes for the current folder, as where a shell's variable is not set
        raise argparse.ArgumentTypeError("'': give a path; the current folder is .")
    return Path(text)


def positive(text: str) -> int:
    """The type of an option that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number, or less than 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def given(options: argparse.Namespace, *names: str) -> dict[str, int | str]:
    """Those of the options that the command line has."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
