"""The command `cycle`: a captioner and a generator, finetuned through each other."""

import contextlib
import dataclasses

from dalleflamingo.commands.parsers import add_shared, command_parser, given, nonempty_path


def main(arguments: list[str]) -> int:
    """Finetune the profile's captioner and generator through each other, and export both.

    The folder of the run gets log.jsonl with the losses, the last checkpoint, and in the end the folders captioner and
    generator, which transformers and diffusers open.
    """
    parser = command_parser("cycle", main.__doc__, "Defaults come from the profile.")
    parser.add_argument(
        "--run", type=nonempty_path, required=True, help="folder of the run; a run that is there goes on"
    )
    parser.add_argument(
        "--config", type=nonempty_path, help="JSON with fields of CycleConfig, in place of the profile's"
    )
    parser.add_argument("--tracker", default="tensorboard", help="of accelerate, or none; default: %(default)s")
    parser.add_argument("--push-to-hub", metavar="OWNER", help="upload both models, as OWNER/RUN-captioner, -generator")
    add_shared(parser, steps="optimizer steps", batch_size="images with a caption at each step")
    options = parser.parse_args(arguments)

    from dalleflamingo import profiles
    from dalleflamingo.cycle import CycleConfig, train_cycle
    from dalleflamingo.evaluation.cycle_reporting import export, push, read_config, tracked, write_model_cards
    from dalleflamingo.evaluation.cycle_validation import Validation, validation_set
    from dalleflamingo.runs import hold
    from dalleflamingo.sources.models import load_cycle

    profile, validate = profiles.current(), None
    config = read_config(options.config, profile) if options.config else CycleConfig.of(profile)
    config = dataclasses.replace(config, **given(options, "steps", "seed", "batch_size"))
    accelerator = tracked(options.tracker, options.run, config)
    with hold(options.run) if accelerator.is_main_process else contextlib.nullcontext():
        cycle, batches, trainable = load_cycle(config, accelerator.device)
        if config.validate_every:
            size = dict(steps=profile.steps, guidance_scale=profile.guidance_scale, batch_size=profile.batch_size)
            validate = Validation(cycle, validation_set(config), options.run, **size)
        train_cycle(config, cycle, batches, trainable, options.run, accelerator, validate)
        accelerator.end_training()
        if accelerator.is_main_process:
            export(cycle, options.run)
            write_model_cards(config, options.run)
            print(f"{options.run}/captioner and {options.run}/generator, with {options.run}/log.jsonl")
            if options.push_to_hub:
                print(*push(options.run, options.push_to_hub), sep="\n")
    return 0
