"""The command `reconstruct`: a user's own images or captions, there and back."""

import argparse
import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

from dalleflamingo.commands.parsers import add_shared, command_parser, given, nonempty_path, positive

if TYPE_CHECKING:  # imported once the options are read, so that --help and a wrong option are answered at once
    from pandas import DataFrame

    from dalleflamingo.datasets import Dataset
    from dalleflamingo.generator import Generator
    from dalleflamingo.profiles import Profile
    from dalleflamingo.reconstruct import Journey, JourneySettings

_CORPUS = 20_000  # captions that CIDEr's weights come from; the n-grams of a million would fill the memory
_SHOWN = 3  # images or captions whose best candidates are printed


def main(arguments: list[str]) -> int:
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
    parser = command_parser("reconstruct", main.__doc__, "Defaults come from the profile.")
    parser.add_argument(
        "source", type=nonempty_path, help="a folder of images, a file of captions or of both, or shards"
    )
    parser.add_argument(
        "--out", type=nonempty_path, required=True, help="run folder; a run that was interrupted goes on there"
    )
    parser.add_argument(
        "--from", dest="start", choices=("images", "captions"), help="begin with these, where SOURCE holds both"
    )
    parser.add_argument(
        "--image-folder",
        type=nonempty_path,
        metavar="DIR",
        help="that paths in SOURCE are relative to; default: its own",
    )
    parser.add_argument("--images", type=positive, metavar="N", help="take only the first N images or captions")
    parser.add_argument("--candidates", type=positive, metavar="K", help="captions of an image, or images of a caption")
    schedulers = "DDPM, DDIM, PNDM, Euler, EulerAncestral, DPMSolverMultistep or UniPCMultistep"
    parser.add_argument("--scheduler", help=f"of the generator: {schedulers}")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="side of a generated image, a multiple of 8")
    parser.add_argument("--captioner", metavar="NAME", help="another one of dalleflamingo/registry.toml")
    parser.add_argument("--generator", metavar="NAME", help="another one of dalleflamingo/registry.toml")
    parser.add_argument(
        "--safety-checker",
        action="store_true",
        help="add a column `unsafe`: the verdict of SD's safety checker",
    )
    workers = "this is number I of N processes, on any machines that see OUT; each is started with the same command"
    parser.add_argument("--worker", metavar="I/N", default="1/1", help=workers)
    add_shared(parser, steps="denoising steps of the generator", batch_size="images at once; fewer need less memory")
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
    settings = JourneySettings.of(profile, **given(options, "candidates", "steps", "seed", "batch_size"))
    # before models are loaded, which may take minutes
    with hold(options.out) if worker.count == 1 else contextlib.nullcontext():
        if start == "images":
            journey = _image_journey(options, profile, settings)
        else:
            journey = _text_journey(source, options, profile, settings)
        table = run_together(journey, source, options.out, worker)
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

    chosen = given(options, "captioner", "generator")
    for kind, name in chosen.items():
        require_kind(name, kind)
    chosen |= {"image_size": options.size} if options.size else {}
    profile = dataclasses.replace(profiles.current(), **chosen)
    if other := class_of(profile.generator):
        settled = ["scheduler", "size"]
        if getattr(other, "steps", 1) is not None:  # None: the profile's number of steps is taken
            settled.append("steps")
        for name in given(options, *settled):
            raise ValueError(f"--{name}: the generator {profile.generator} has its own, so leave the option out")
    return profile


def _image_journey(options: argparse.Namespace, profile: "Profile", settings: "JourneySettings") -> "Journey":
    """Image → text → image with the profile's models."""
    from dalleflamingo.reconstruct import ImageTextImage
    from dalleflamingo.sources.models import load_models

    captioner, generator, similarities = load_models(profile, options.scheduler)
    _require_steps(generator, options, profile, settings)
    similarities = similarities + _safety_checker(options, profile)
    return ImageTextImage(captioner, generator, similarities, settings)


def _text_journey(
    source: "Dataset", options: argparse.Namespace, profile: "Profile", settings: "JourneySettings"
) -> "Journey":
    """Text → image → text. CIDEr takes the weights of n-grams from the first `_CORPUS` captions of the source."""
    from dalleflamingo.evaluation.similarities import load_text_similarities
    from dalleflamingo.reconstruct import TextImageText
    from dalleflamingo.sources.models import load_captioner, load_generator

    captioner, generator = load_captioner(profile), load_generator(profile, scheduler=options.scheduler)
    _require_steps(generator, options, profile, settings)
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


def _require_steps(
    generator: "Generator", options: argparse.Namespace, profile: "Profile", settings: "JourneySettings"
) -> None:
    from dalleflamingo.sources.models import class_of

    if not class_of(profile.generator):  # the others have schedulers of their own
        require_steps(generator, settings.steps, chosen=bool(given(options, "steps", "scheduler")))


def require_steps(generator: "Generator", steps: int, chosen: bool) -> None:
    """Refuse fewer steps than the scheduler needs for images that match their captions.

    Args:
        generator: of diffusers' schedulers.
        steps: of a rendering.
        chosen: the user chose them, or the scheduler. The profile `smoke` has too few, to be quick.
    Raises:
        ValueError: they are too few, or as `denoising.spread_steps`.
    """
    from dalleflamingo.denoising import SCHEDULERS, short_name, spread_steps

    spread_steps(generator.pipeline.scheduler, steps)
    name = short_name(type(generator.pipeline.scheduler))
    if chosen and steps < (least := SCHEDULERS[name]):
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
    from dalleflamingo.evaluation.similarities import similarities_among
    from dalleflamingo.reconstruct import select
    from dalleflamingo.runs import printable

    for similarity in similarities_among(table):
        best = select(table, by=similarity).head(_SHOWN)
        print(f"best by {similarity}:")
        for known, score, candidate in zip(best[name], best[similarity], best[column], strict=True):
            print(f"  {printable(known):<24.24} {score:8.3f}  {candidate}")
