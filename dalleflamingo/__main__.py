"""One command line: `python -m dalleflamingo COMMAND --help`.

Every command is a function that takes the rest of the command line and returns an exit status. Modules are imported
when their command is chosen, so that `--help` answers at once.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path

COMMANDS = {  # command -> where its function is, and what it does
    "reconstruct": ("dalleflamingo.__main__:reconstruct", "send your own images or captions there and back"),
    "cycle": ("dalleflamingo.__main__:cycle", "finetune a captioner and a generator through each other"),
    "course": ("dalleflamingo.course.run:main", "execute the notebooks and make pages of them"),
    "data": ("dalleflamingo.miniature.corpora:main", "draw the images of the miniature data sets"),
    "train": ("dalleflamingo.miniature.training.train:main", "train the models of the miniature"),
    "research": ("dalleflamingo.__main__:research", "measure what docs/results holds, one study a command"),
}
RESEARCH = {
    "insight": ("dalleflamingo.research.insights:main", "Insight I or II with all its metrics (claims 1 to 4)"),
    "studies": ("dalleflamingo.research.studies:main", "sampling, candidates, vocabularies (claims 5, 7, 13)"),
    "variants": ("dalleflamingo.research.variants:main", "other samplers, models and images (claims 6 and 8)"),
    "stability": ("dalleflamingo.research.stability:main", "rankings from several generated images of each caption"),
    "cycle": ("dalleflamingo.research.cycle_study:main", "the training runs of Tables 3, 4, 5 and 9"),
    "cycle-report": ("dalleflamingo.research.cycle_report:main", "tables and claims 9 to 12 and 14 from these runs"),
    "gates": ("dalleflamingo.research.gates:main", "how good the shipped models are, on held-out scenes"),
    "figures": ("dalleflamingo.research.readme_figures:main", "the two figures of the README"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that is named first; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return _dispatch(COMMANDS, arguments, "python -m dalleflamingo", "Do DALL-E and Flamingo understand each other?")


def research(arguments: list[str]) -> int:
    """Run the study that is named first."""
    return _dispatch(RESEARCH, arguments, "python -m dalleflamingo research", "Measure what docs/results holds.")


def _dispatch(commands: dict[str, tuple[str, str]], arguments: list[str], prog: str, description: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=f"More: {prog} COMMAND --help")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in commands.items():
        choices.add_parser(name, help=summary, add_help=False)
    module, _, function = commands[parser.parse_args(arguments[:1]).command][0].partition(":")
    return getattr(importlib.import_module(module), function)(arguments[1:]) or 0


def reconstruct(arguments: list[str]) -> int:
    """One's own pictures (a folder) or captions (a file, one a line) there and back, with the profile's models."""
    from dalleflamingo import profiles, registry
    from dalleflamingo.datasets import read_captions, read_folder
    from dalleflamingo.evaluation.similarities import load_text_similarities
    from dalleflamingo.reconstruct import image_text_image, load_models, text_image_text

    parser = argparse.ArgumentParser(prog="python -m dalleflamingo reconstruct", description=reconstruct.__doc__)
    parser.add_argument("source", type=Path, help="a folder of pictures, or a text file of captions")
    parser.add_argument("--out", type=Path, required=True, help="run folder; an interrupted run goes on in its own")
    parser.add_argument("--scheduler", help="that draws, DPMSolverMultistep for example; default: the profile's")
    parser.add_argument("--steps", type=int, help="of drawing; default: the profile's")
    options = parser.parse_args(arguments)
    try:
        profile = profiles.current()
        settings = dict(
            candidates=profile.candidates,
            steps=profile.steps if options.steps is None else options.steps,
            guidance_scale=profile.guidance_scale,
            batch_size=profile.batch_size,
        )
        is_text = options.source.suffix.lower() == ".txt" or options.source.is_file()
        source = read_captions(options.source) if is_text else read_folder(options.source)
        captioner, generator, similarities = load_models(profile, options.scheduler)
        if is_text:
            similarities = load_text_similarities(profile, {text.image_id: text.references for text in source})
            text_image_text(source, captioner, generator, similarities, options.out, **settings)
        else:
            image_text_image(source, captioner, generator, similarities, options.out, **settings)
    except (ValueError, FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    return 0


def cycle(arguments: list[str]) -> int:
    """Finetune the two shipped miniatures, or the models that are named, and export them."""
    from dalleflamingo import profiles, registry
    from dalleflamingo.cycle import CycleConfig, export, prepare, push, read_config, tracked, train, validation_set
    from dalleflamingo.evaluation.cycle_validation import Validation

    defaults = CycleConfig()
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo cycle", description=cycle.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; a run that is there goes on")
    parser.add_argument("--config", type=Path, help="JSON of CycleConfig's fields, those that are not the defaults")
    parser.add_argument("--steps", type=int, help=f"default: {defaults.steps}")
    parser.add_argument("--tracker", default="tensorboard", help="of accelerate's, or none; default: tensorboard")
    parser.add_argument("--push-to-hub", metavar="OWNER", help="upload both models, as OWNER/RUN-captioner, -generator")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config) if options.config else defaults
        config = dataclasses.replace(config, steps=options.steps or config.steps)
        accelerator = tracked(options.tracker, options.run, config)
        models, pairs, learner = prepare(config, accelerator.device)
        profile, validate = profiles.current(), None
        if config.validate_every:
            seen = validation_set(config)
            validate = Validation(
                models, seen, options.run, profile.steps, profile.guidance_scale, batch_size=profile.batch_size
            )
        train(config, models, pairs, learner, options.run, accelerator, validate)
        accelerator.end_training()
    except (ValueError, FloatingPointError, registry.RegistryError) as error:
        parser.error(str(error))
    if accelerator.is_main_process:
        export(config, models, options.run)
        print(f"{options.run}/captioner and {options.run}/generator, with {options.run}/log.jsonl")
        if options.push_to_hub:
            print(*push(options.run, options.push_to_hub), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
