"""One command line: `python -m dalleflamingo COMMAND --help`.

A command is a function that takes the rest of the command line and returns an exit status: 0; 2 for an error that the
user can mend, told in one line; 1 for a bug; 130 where it was interrupted. DALLEFLAMINGO_DEBUG=1 shows
the traceback of an error. A command's module is imported when the command is chosen, so that `--help` answers at once.
"""

import dataclasses
import dis
import importlib
import os
import sys
import traceback
from collections.abc import Mapping

from dalleflamingo import repository
from dalleflamingo.commands.parsers import PROFILE, Parser, add_profile

DEBUG = "DALLEFLAMINGO_DEBUG"
CLOSED = 141  # exit status of a process whose output nobody reads any more: 128 + SIGPIPE


@dataclasses.dataclass(frozen=True)
class Command:
    """Where the function of a command is, what it does, and what a user should know who interrupts it."""

    function: str
    summary: str
    interrupted: str = "what is finished is kept, and the same command goes on where it was"


COMMANDS = {
    "reconstruct": Command(
        "dalleflamingo.commands.reconstruct:main",
        "send your own images or captions there and back",
        interrupted="",  # the journey itself says how many images are kept, and where
    ),
    "export": Command(
        "dalleflamingo.course.export:main",
        "make a page, COCO results or shards of a run of reconstruct",
        "the same command starts again",
    ),
    "cycle": Command(
        "dalleflamingo.commands.cycle:main",
        "finetune a captioner and a generator through each other",
        "the last checkpoint is kept, and the same command goes on from it",
    ),
    "doctor": Command("dalleflamingo.course.doctor:main", "say what this machine lacks, with remedies", "ask again"),
    "course": Command("dalleflamingo.course.run:main", "execute the notebooks and make pages of them"),
    "site": Command(
        "dalleflamingo.course.site:main", "make a site of the executed notebooks", "the same command starts again"
    ),
    "answers": Command(
        "dalleflamingo.course.answers:main",
        "keep what you wrote into the exercises while the course is updated",
        "every file is whole; give the same command again",
    ),
    "data": Command("dalleflamingo.course.data:main", "draw the miniature's images, fetch the profile's photographs"),
    "train": Command(
        "dalleflamingo.miniature.training.train:main",
        "train the models of the miniature",
        "the last checkpoint is kept, and the same command goes on from it",
    ),
    "research": Command("dalleflamingo.__main__:research", "measure what docs/results holds, one study a command"),
}
RESEARCH = {
    "planted": Command(
        "dalleflamingo.research.planted:main", "do the similarities find the errors planted in captions?"
    ),
    "insight-1": Command("dalleflamingo.research.insights:main_1", "image → text → image, measured (claims 1 and 2)"),
    "insight-2": Command("dalleflamingo.research.insights:main_2", "text → image → text, measured (claims 3 and 4)"),
    "studies": Command("dalleflamingo.research.studies:main", "sampling, candidates, vocabularies (claims 5, 7, 13)"),
    "variants": Command("dalleflamingo.research.variants:main", "other samplers, models and images (claims 6 and 8)"),
    "understanding": Command(
        "dalleflamingo.research.understanding:main", "every captioner with every generator: who understands whom?"
    ),
    "stability": Command("dalleflamingo.research.stability:main", "rankings from several images of each caption"),
    "cycle": Command("dalleflamingo.research.cycle_study:main", "the training runs of Tables 3, 4, 5 and 9"),
    "cycle-report": Command(
        "dalleflamingo.research.cycle_report:main",
        "tables and claims 9 to 12 and 14 from these runs",
        "the runs are kept, and the same command starts the report again",
    ),
    "gradients": Command("dalleflamingo.research.gradients:main", "which loss updates which model, and how hard"),
    "repair": Command("dalleflamingo.research.repair_study:main", "what one loss alone teaches a damaged model"),
    "epsilon": Command(
        "dalleflamingo.research.epsilon_study:main", "the generator predicts ε instead of v (Eqs. 2 to 4)"
    ),
    "definitions": Command(
        "dalleflamingo.research.definitions:main", "what the authors' definitions do to the numbers"
    ),
    "gates": Command(
        "dalleflamingo.research.gates:main",
        "how good people and models of the miniature are, on development scenes",
        "generated images of planted errors are kept, and the same command measures the rest again",
    ),
    "cards": Command("dalleflamingo.research.cards:main", "the cards of the miniature's models and corpora"),
    "live": Command("dalleflamingo.research.live:main", "in how many small sets is Insight I visible?"),
    "memory-plan": Command(
        "dalleflamingo.research.memory_plan:main", "what each notebook takes of a GPU's memory with the real models"
    ),
    "scoreboard": Command("dalleflamingo.research.scoreboard:main", "docs/scoreboard.md: all verdicts, with reasons"),
    "figures": Command(
        "dalleflamingo.research.readme_figures:main",
        "the figures of README and front page",
        "the same command starts again",
    ),
}
ABOUT = """Do DALL-E and Flamingo understand each other?

An image is captioned and generated again from its caption; a caption is made an image and described again. What comes
back tells how well the two models understand each other."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status.

    Args:
        arguments: of the command line; None for those of this process.
    """
    prog = "python -m dalleflamingo"
    parser = Parser(prog=prog, add_help=False)
    add_profile(parser)
    chosen, arguments = parser.parse_known_args(arguments)
    if chosen.profile is not None:
        try:
            from dalleflamingo.profiles import PROFILES
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            return _report(prog, error)
        if chosen.profile not in PROFILES:
            parser.error(f"argument --profile: unknown profile {chosen.profile!r}: one of {', '.join(PROFILES)}")
        os.environ[PROFILE] = chosen.profile  # before any module reads it
    return _dispatch(COMMANDS, arguments, prog, ABOUT)


def research(arguments: list[str]) -> int:
    """Run the study that is named first."""
    about = "Measure what docs/results holds, with the current profile's models."
    return _dispatch(RESEARCH, arguments, "python -m dalleflamingo research", about)


def _dispatch(commands: Mapping[str, Command], arguments: list[str], prog: str, about: str) -> int:
    """Run the command that the first argument names, with the others."""
    parser = Parser(prog=prog, description=about, epilog=f"`{prog} COMMAND --help` says what a command takes.")
    add_profile(parser)
    choices = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        choices.add_parser(name, help=command.summary, add_help=False)
    name = next(iter(arguments), "")
    if name in ("-h", "--help"):
        parser.print_help()
        return 0
    if name not in commands:
        parser.print_help(sys.stderr)
        print(f"\n{prog}: {f'there is no command {name!r}' if name else 'name a command'}", file=sys.stderr)
        return 2
    module, _, function = commands[name].function.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments[1:]) or 0
    except BrokenPipeError:  # as `in_terminal`
        return CLOSED
    except KeyboardInterrupt:
        if commands[name].interrupted:
            print(f"\nInterrupted: {commands[name].interrupted}.", file=sys.stderr)
        return 130
    except Exception as error:
        return _report(f"{prog} {name}", error)


def _report(what: str, error: Exception) -> int:
    """Say in one line what is wrong with a command, and its traceback where that is asked for; the exit status."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    remedy = _remedy(error)
    print(f"{what}: {remedy or _fault(error)}", file=sys.stderr)
    return 2 if remedy else 1


def _remedy(error: Exception) -> str:
    """What a user should do about an error; empty where it is the program's fault."""
    if isinstance(error, ImportError):  # first of all: what is imported here may be what is missing
        return str(error) if "pip install" in str(error) else f"{error}: install the environment as README.md says"
    from safetensors import SafetensorError

    try:
        from dalleflamingo.registry import RegistryError, is_full, is_unreachable
    except LookupError as wrong:  # registry.toml has a wrong entry, which may be the error
        return str(wrong)

    if isinstance(error, (RegistryError, FloatingPointError)) or isinstance(error, ValueError) and _is_ours(error):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return "the GPU's memory is full: give a smaller --batch-size, or in cycle's --config a larger accumulation"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "the memory is full: close other programs, or work on less at once, as with a smaller --batch-size"
    if is_full(error):
        return f"the disk is full ({error}): make room, and give the same command again; what is finished is kept"
    if is_unreachable(error):
        return f"the network cannot be reached ({error}): connect, and give the same command again"
    return str(error) if isinstance(error, (OSError, SafetensorError)) else ""


def _is_ours(error: Exception) -> bool:
    """Whether a `raise` of this package raised the error, so that its message was written for the user."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    package = last.tb_frame.f_globals.get("__package__") or ""
    is_raise = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raise and package.partition(".")[0] == __package__


def _fault(error: Exception) -> str:
    """One line about an error that nobody foresaw."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    where = f"report the traceback at {repository()}/issues" if repository() else "report the traceback"
    return f"this is a bug ({what}): give the command again with {DEBUG}=1 and {where}"


def in_terminal() -> int:
    """As `main`, with the standard output of a process: its encoding, and a reader that has seen enough, as `head`."""
    # an encoding may lack a character of a file's name, or an arrow
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except OSError as error:  # of the flush: `main` has answered all others
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if isinstance(error, BrokenPipeError):
            return CLOSED
        return _report("python -m dalleflamingo", error)


if __name__ == "__main__":
    sys.exit(in_terminal())
