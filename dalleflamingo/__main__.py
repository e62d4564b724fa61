"""One command line: `python -m dalleflamingo COMMAND --help`.

A command is a function that takes the rest of the command line and returns an exit status: 0; 2 for an error that the
user can mend, told in one line; 1 for a bug; 130 where it was interrupted. DALLEFLAMINGO_DEBUG=1 shows
the traceback of an error. A command's module is imported when the command is chosen, so that `--help` answers at once.
"""

import argparse
import contextlib
import dataclasses
import dis
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dalleflamingo import repository

if TYPE_CHECKING:
    from pandas import DataFrame

    from dalleflamingo.datasets import Dataset
    from dalleflamingo.generator import Generator
    from dalleflamingo.profiles import Profile
    from dalleflamingo.reconstruct import Journey, JourneySettings

# `profiles.VARIABLE`, spelled again because importing it would import torch, without which --help answers at once
PROFILE = "DALLEFLAMINGO_PROFILE"
DEBUG = "DALLEFLAMINGO_DEBUG"


@dataclasses.dataclass(frozen=True)
class Command:
    """Where the function of a command is, what it does, and what a user should know who interrupts it."""

    function: str
    summary: str
    interrupted: str = "what is finished is kept, and the same command goes on where it was"


_CORPUS = 20_000  # captions that CIDEr's weights come from; the n-grams of a million would fill the memory
_SHOWN = 3  # images or captions whose best candidates `reconstruct` prints
COMMANDS = {
    "reconstruct": Command(
        "dalleflamingo.__main__:reconstruct",
        "send your own images or captions there and back",
        interrupted="",  # the journey itself says how many images are kept, and where
    ),
    "export": Command(
        "dalleflamingo.course.export:main",
        "make a page, COCO results or shards of a run of reconstruct",
        "the same command starts again",
    ),
    "cycle": Command(
        "dalleflamingo.__main__:cycle",
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
PROFILE_HELP = f"""models and size: smoke (seconds) and mini (minutes) run the miniature's models on a CPU, colab and
paper run BLIP and Stable Diffusion on a GPU; default: ${PROFILE}, or mini where it is unset"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status.

    Args:
        arguments: of the command line; None for those of this process.
    """
    prog = "python -m dalleflamingo"
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    _add_profile(parser)
    chosen, arguments = parser.parse_known_args(arguments)
    if chosen.profile is not None:
        try:
            from dalleflamingo.profiles import PROFILES
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
    parser = _Parser(prog=prog, description=about, epilog=f"`{prog} COMMAND --help` says what a command takes.")
    _add_profile(parser)
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
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        return 141
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


def reconstruct(arguments: list[str]) -> int:
    """Send your own images, or your own captions, there and back with the profile's models.

    Images: each is captioned several times, an image is generated from each caption, and CLIP and DINO score how
    similar it is to the original. Captions: several images are generated from each, each image is described, and four
    similarities of texts score how similar the description is to the caption.

    SOURCE is a folder of images; a text with one caption a line; .jsonl, .csv, .tsv or .json with a caption, an image's
    path or both in each row or entry, in columns called caption, captions or text, and image, image_path or file_name;
    or webdataset shards: a .tar file, a folder of them, or a pattern such as photos-{000..099}.tar.

    The best candidates of the first images or captions are printed. All candidates with their scores are in
    candidates.parquet of the run folder, and the command `export` makes a page, COCO results or shards of them. To rank
    them in Python (after captions, by="text_clip"):

        import pandas
        from dalleflamingo import rank
        ranked = rank(pandas.read_parquet("OUT/candidates.parquet"), by="clip")
    """
    parser = _parser("reconstruct", reconstruct)
    parser.add_argument("source", type=_path, help="a folder of images, a file of captions or of both, or shards")
    parser.add_argument("--out", type=_path, required=True, help="run folder; a run that was interrupted goes on there")
    parser.add_argument(
        "--from", dest="start", choices=("images", "captions"), help="begin with these, where SOURCE holds both"
    )
    parser.add_argument(
        "--image-folder", type=_path, metavar="DIR", help="that paths in SOURCE are relative to; default: its own"
    )
    parser.add_argument("--images", type=_positive, metavar="N", help="take only the first N images or captions")
    parser.add_argument(
        "--candidates", type=_positive, metavar="K", help="captions of an image, or images of a caption"
    )
    schedulers = "DDPM, DDIM, PNDM, Euler, EulerAncestral, DPMSolverMultistep or UniPCMultistep"
    parser.add_argument("--scheduler", help=f"of the generator: {schedulers}")
    parser.add_argument("--size", type=_positive, metavar="PIXELS", help="side of a generated image, a multiple of 8")
    parser.add_argument("--captioner", metavar="NAME", help="another one of dalleflamingo/registry.toml")
    parser.add_argument("--generator", metavar="NAME", help="another one of dalleflamingo/registry.toml")
    parser.add_argument(
        "--safety-checker",
        action="store_true",
        help="add a column `unsafe`: the verdict of SD's safety checker",
    )
    workers = "this is number I of N processes, on any machines that see OUT; each is started with the same command"
    parser.add_argument("--worker", metavar="I/N", default="1/1", help=workers)
    _add_shared(parser, steps="denoising steps of the generator", batch_size="images at once; fewer need less memory")
    options = parser.parse_args(arguments)

    from dalleflamingo.evaluation.workers import Worker, in_turn, run_together
    from dalleflamingo.reconstruct import JourneySettings
    from dalleflamingo.runs import hold
    from dalleflamingo.sources.inputs import read_source, remember

    worker = Worker.named(options.worker).launched(os.environ)
    with in_turn(options.out, worker):
        source, start = read_source(options.source, options.start, options.image_folder, options.out)
    source = source[: options.images]
    profile = _chosen_profile(options)
    settings = JourneySettings.of(profile, **_given(options, "candidates", "steps", "seed", "batch_size"))
    # before models are loaded, which may take minutes
    with hold(options.out) if worker.count == 1 else contextlib.nullcontext():
        make_journey = _image_journey if start == "images" else _text_journey
        table = run_together(make_journey(source, options, profile, settings), source, options.out, worker)
        if table is not None and start == "images":
            remember(options.out, options.source, options.image_folder)
            _print_best(table, "file", "caption")
        elif table is not None:
            _print_best(table, "caption", "image")
    return 0


def _chosen_profile(options: argparse.Namespace) -> "Profile":
    """The current profile with the models and the image size that the command line names.

    Raises:
        RegistryError: the registry has no such captioner or generator.
        ValueError: the generator has a scheduler, an image size or steps of its own, and does not take such an option.
    """
    from dalleflamingo import profiles
    from dalleflamingo.registry import require_kind
    from dalleflamingo.sources.models import class_of

    chosen = _given(options, "captioner", "generator")
    for kind, name in chosen.items():
        require_kind(name, kind)
    chosen |= {"image_size": options.size} if options.size else {}
    profile = dataclasses.replace(profiles.current(), **chosen)
    if other := class_of(profile.generator):
        settled = ["scheduler", "size"] + ["steps"] * (getattr(other, "steps", 1) is not None)
        for name in _given(options, *settled):
            raise ValueError(f"--{name}: the generator {profile.generator} has its own, so leave the option out")
    return profile


def _image_journey(
    source: "Dataset", options: argparse.Namespace, profile: "Profile", settings: "JourneySettings"
) -> "Journey":
    """Image → text → image with the profile's models."""
    from dalleflamingo.reconstruct import ImageTextImage
    from dalleflamingo.sources.models import class_of, load_models

    captioner, generator, similarities = load_models(profile, options.scheduler)
    if not class_of(profile.generator):
        require_steps(generator, options, settings.steps)
    similarities = similarities + _safety_checker(options, profile)
    return ImageTextImage(captioner, generator, similarities, settings)


def _text_journey(
    source: "Dataset", options: argparse.Namespace, profile: "Profile", settings: "JourneySettings"
) -> "Journey":
    """Text → image → text. CIDEr takes the weights of n-grams from the first `_CORPUS` captions of the source."""
    from dalleflamingo.evaluation.similarities import load_text_similarities
    from dalleflamingo.reconstruct import TextImageText
    from dalleflamingo.sources.models import class_of, load_captioner, load_generator

    captioner, generator = load_captioner(profile), load_generator(profile, scheduler=options.scheduler)
    if not class_of(profile.generator):
        require_steps(generator, options, settings.steps)
    corpus = {text.image_id: text.references for text in source[:_CORPUS]}
    similarities = load_text_similarities(profile, corpus) + _safety_checker(options, profile)
    return TextImageText(captioner, generator, similarities, settings)


def _safety_checker(options: argparse.Namespace, profile: "Profile") -> list:
    """The checker where the command line asks for it, which scores as a similarity does."""
    if not options.safety_checker:
        return []
    from dalleflamingo.registry import source_of
    from dalleflamingo.sources.models import class_of

    name = "sd-v1-4-safety-checker"
    return [class_of(name).from_pretrained(**source_of(name, profile.device))]


def require_steps(generator: "Generator", options: argparse.Namespace, steps: int) -> None:
    """Refuse fewer steps than the scheduler needs for images that match their captions, where the user chose them.

    The profile `smoke` has fewer, to be quick.

    Raises:
        ValueError: they are too few, or as `denoising.spread_steps`.
    """
    from dalleflamingo.denoising import SCHEDULERS, short_name, spread_steps

    spread_steps(generator.pipeline.scheduler, steps)
    name = short_name(type(generator.pipeline.scheduler))
    if (options.steps, options.scheduler) != (None, None) and steps < (least := SCHEDULERS[name]):
        quick = [other for other, fewest in SCHEDULERS.items() if fewest <= steps]
        remedy = f"or another scheduler: {', '.join(quick)}" if quick else "as no scheduler works with so few"
        raise ValueError(f"steps = {steps}: {name} needs {least} or more; take {least}, {remedy}")


def _print_best(table: "DataFrame", name: str, column: str) -> None:
    """For each similarity of a journey's table, the best candidate of the first few images or captions.

    Args:
        table: of candidates.
        name: the column that the user knows an image or caption by.
        column: what to print of a candidate.
    """
    from dalleflamingo.course.gallery import similarities_among
    from dalleflamingo.reconstruct import select
    from dalleflamingo.runs import printable

    for similarity in similarities_among(table):
        best = select(table, by=similarity).head(_SHOWN)
        print(f"best by {similarity}:")
        for known, score, candidate in zip(best[name], best[similarity], best[column], strict=True):
            print(f"  {printable(known):<24.24} {score:8.3f}  {candidate}")


def cycle(arguments: list[str]) -> int:
    """Finetune the profile's captioner and generator through each other, and export both.

    The folder of the run gets log.jsonl with the losses, the last checkpoint, and in the end the folders captioner and
    generator, which transformers and diffusers open.
    """
    parser = _parser("cycle", cycle)
    parser.add_argument("--run", type=_path, required=True, help="folder of the run; a run that is there goes on")
    parser.add_argument("--config", type=_path, help="JSON with fields of CycleConfig, in place of the profile's")
    parser.add_argument("--tracker", default="tensorboard", help="of accelerate, or none; default: %(default)s")
    parser.add_argument("--push-to-hub", metavar="OWNER", help="upload both models, as OWNER/RUN-captioner, -generator")
    _add_shared(parser, steps="optimizer steps", batch_size="images with a caption at each step")
    options = parser.parse_args(arguments)

    from dalleflamingo import profiles
    from dalleflamingo.cycle import CycleConfig, train_cycle
    from dalleflamingo.evaluation.cycle_reporting import export, push, read_config, tracked, write_model_cards
    from dalleflamingo.evaluation.cycle_validation import Validation, validation_set
    from dalleflamingo.runs import hold
    from dalleflamingo.sources.models import load_cycle

    profile, validate = profiles.current(), None
    config = read_config(options.config, profile) if options.config else CycleConfig.of(profile)
    config = dataclasses.replace(config, **_given(options, "steps", "seed", "batch_size"))
    accelerator = tracked(options.tracker, options.run, config)
    with hold(options.run) if accelerator.is_main_process else contextlib.nullcontext():
        models, batches, trainable = load_cycle(config, accelerator.device)
        if config.validate_every:
            size = dict(steps=profile.steps, guidance_scale=profile.guidance_scale, batch_size=profile.batch_size)
            validate = Validation(models, validation_set(config), options.run, **size)
        train_cycle(config, models, batches, trainable, options.run, accelerator, validate)
        accelerator.end_training()
        if accelerator.is_main_process:
            export(models, options.run)
            write_model_cards(config, options.run)
            print(f"{options.run}/captioner and {options.run}/generator, with {options.run}/log.jsonl")
            if options.push_to_hub:
                print(*push(options.run, options.push_to_hub), sep="\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """With its text as it is written, and an error in one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help says more\n")


def _parser(name: str, command: Callable) -> argparse.ArgumentParser:
    # no abbreviations: `main` has taken --profile away, and --prof would reach the command and be ignored
    prog, about = f"python -m dalleflamingo {name}", inspect.cleandoc(command.__doc__)
    return _Parser(prog=prog, description=about, epilog="Defaults come from the profile.", allow_abbrev=False)


def _add_shared(parser: argparse.ArgumentParser, steps: str, batch_size: str) -> None:
    """The options of every command that runs models."""
    parser.add_argument("--steps", type=_positive, help=steps)
    parser.add_argument("--batch-size", type=_positive, metavar="B", help=batch_size)
    parser.add_argument("--seed", type=int, help="of all random numbers; default: 0")
    _add_profile(parser)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="NAME", help=PROFILE_HELP)


def _path(text: str) -> Path:
    if not text:  # which pathlib takes for the current folder, as where a shell's variable is not set
        raise argparse.ArgumentTypeError("'': give a path; the current folder is .")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def _given(options: argparse.Namespace, *names: str) -> dict[str, int | str]:
    """Those of the options that the command line has."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


if __name__ == "__main__":
    # a terminal's encoding may lack a character of a file's name, or an arrow
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
