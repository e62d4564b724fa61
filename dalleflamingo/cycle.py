"""Cycle finetuning: a captioner and a generator taught through each other (§4.2, App. H).

    accelerate launch -m dalleflamingo cycle --run build/runs/cycle                 one process, or several GPUs
    torchrun --nproc-per-node 2 -m -- dalleflamingo cycle --run build/runs/cycle    two processes, also on a CPU

A step's pairs, noise and timesteps follow from the seed and the step's number. So a run that was killed goes on where
its last checkpoint stands and ends with the same weights, bit for bit on a CPU with as many threads; and several
processes, or accumulated parts of a batch, compute what one would.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from huggingface_hub import HfApi
from torch import Tensor, nn
from tqdm.auto import trange

from dalleflamingo import registry
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle_losses import (
    NAMES,
    Batch,
    Cycle,
    Losses,
    captioner_parameters,
    freeze_all_but,
    generator_parameters,
    total,
)
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed
from dalleflamingo.profiles import Profile
from dalleflamingo.runs import Checkpoint, differences
from dalleflamingo.vocabulary import VocabularyMap


@dataclass
class Pairs:
    """Batches of a data set, each epoch in another order and with other captions.

    Args:
        memory: bytes for pictures' pixel values and latents, which are kept once they are computed, as many as fit.
    Raises:
        ValueError: a picture has no caption, or there are fewer pictures than a batch has.
    """

    dataset: Dataset
    captioner: Captioner
    generator: Generator
    batch_size: int
    seed: int = 0
    memory: int = 2**30
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        mute = [example.image_id for example in self.dataset if not example.references]
        if mute:
            raise ValueError(
                f"{len(mute)} pictures of {self.dataset.name} have no caption, such as {mute[:3]}: leave them out"
            )
        if len(self.dataset) < self.batch_size:
            raise ValueError(
                f"{self.dataset.name} has {len(self.dataset)} pictures, a batch {self.batch_size}: take a smaller batch"
            )

    def choose(self, step: int) -> list[tuple[Example, str]]:
        """The pairs of a step."""
        size, chosen = len(self.dataset), []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(place, size)
            example = self.dataset[int(self._order(epoch)[i])]
            number = derive_seed(self.seed, "caption", epoch, example.image_id) % len(example.references)
            chosen.append((example, example.references[number]))
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    @torch.no_grad()
    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Of a step's batch the `part`th of `parts`.

        Raises:
            ValueError: the batch does not divide into so many parts.
        """
        if self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} does not divide into {parts} parts: take a batch_size that does"
            )
        chosen, size = self.choose(step), self.batch_size // parts
        own = chosen[part * size :][:size]
        seen = [self._see(example) for example, _ in own]
        captions = [caption for _, caption in own]
        pixel_values, latents = (torch.stack(column) for column in zip(*seen, strict=True))
        pipeline, model = self.generator.pipeline, self.captioner.model
        pixel_values, latents = pixel_values.to(model.device, model.dtype), latents.to(pipeline.device)
        states, _ = pipeline.encode_prompt(captions, pipeline.device, 1, do_classifier_free_guidance=False)
        pieces = self.captioner.count_tokens([caption for _, caption in chosen])
        return Batch(pixel_values, captions, latents, states, pieces, part * size)

    def _see(self, example: Example) -> tuple[Tensor, Tensor]:
        """(3, H, W) pixel values and (4, h, w) latents of a picture, in main memory."""
        if example.image_id in self._kept:
            return self._kept[example.image_id]
        picture = self.dataset.open(example)
        pixel_values = self.captioner.processor(images=[picture], return_tensors="pt").pixel_values[0]
        latents = self.generator.latents([picture], next(self.generator.pipeline.unet.parameters()))[0]
        seen = pixel_values, latents.cpu()
        if (len(self._kept) + 1) * sum(tensor.nbytes for tensor in seen) <= self.memory:
            self._kept[example.image_id] = seen
        return seen


SCHEDULES = ("alternating", "joint")
PRECISIONS = ("no", "bf16", "fp16")
VALIDATED = 200  # pictures


@dataclass(frozen=True)
class CycleConfig:
    """All that a run depends on (the paper's, App. H: learning rate 1e-4, batches of 8, 5 epochs of COCO).

    Attributes:
        captioner, generator, dataset: names in the registry. split: of the data set.
        pictures: how many of the data set's are labelled, chosen by seed 0; None: all.
        losses: which of the four, and whom they move.
        schedule: "alternating", (1) + (2) at one step and (3) + (4) at the next, or "joint", all at every step.
        steps: optimizer steps. batch_size: pairs of a step, of all processes and parts together.
        accumulation: parts that a process computes one after another, to save memory.
        warmup: steps in which the learning rate grows to its value, at which it stays.
        checkpointing: compute activations again in the backward pass, to save memory.
        precision: "no" (float32), "bf16" or "fp16" autocasting.
        vocabulary_map: kind of the bridge's map, learned from the labelled captions. ends_kept: as `Bridge` has it.
        average: decay of a moving average of what learns, which then is the result; 0: the last step's weights are.
        checkpoint_every: steps; the last checkpoint is kept. validate_every: steps; 0: never.
    """

    captioner: str = "miniature/blip"
    generator: str = "miniature/sd"
    dataset: str = "miniature/coco"
    split: str = "train"
    pictures: int | None = None
    losses: Losses = field(default_factory=Losses)
    schedule: str = "alternating"
    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 0
    max_grad_norm: float = 1.0
    checkpointing: bool = False
    precision: str = "no"
    vocabulary_map: str = "word-aligned"
    ends_kept: bool = False
    average: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 0

    def __post_init__(self):
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average = {self.average}: a decay is at least 0, for none, and below 1")
        if self.checkpointing and self.losses.image_updates == "captioner":
            raise ValueError(
                "checkpointing computes the U-Net again when it is held still no longer: set checkpointing false, or "
                "image_updates to another than 'captioner'"
            )
        if not self.halves:
            raise ValueError("all four losses have the weight 0, and nothing would be learned: give one a weight")

    @property
    def halves(self) -> tuple[str, ...]:
        """Of "image", (1) + (2), and "text", (3) + (4), those that have a loss with a weight."""
        named = {"image": NAMES[:2], "text": NAMES[2:]}
        return tuple(half for half, names in named.items() if any(getattr(self.losses, name) for name in names))


# The miniature's. Of what was tried on pictures of their own (`cycle_study.trials`) the setting where labels are so few
# that they alone do harm.
CHOSEN = CycleConfig(pictures=100, learning_rate=3e-4, steps=450, losses=Losses(latest=0.4))


def settings(profile: Profile) -> CycleConfig:
    """What a notebook trains live: the miniature, or the real models within the 15 GB of a free GPU."""
    names = dict(captioner=profile.captioner, generator=profile.generator, dataset=profile.coco)
    if profile.generator.startswith("miniature/"):
        return dataclasses.replace(CHOSEN, **names, steps=profile.cycle_steps)
    return CycleConfig(
        **names, steps=profile.cycle_steps, accumulation=8, checkpointing=True,
        precision="fp16" if profile.device == "cuda" else "no", losses=Losses(latest=0.4, decoded_size=256),
    )  # fmt: skip


class Learner:
    """What `Checkpoint` keeps of a run: the parameters that learn, by model, and the decay of their average."""

    def __init__(self, learning: dict[str, dict[str, nn.Parameter]], average: float = 0.0):
        self.average = average
        self.modules = {who: nn.ParameterList(own.values()) for who, own in learning.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules.values():
            yield from module.parameters()


def prepare(config: CycleConfig, device: torch.device) -> tuple[Cycle, Pairs, Learner]:
    """Models, bridge, data and what is trained, as a configuration says."""
    who, draws = (registry.ENTRIES[name] for name in (config.captioner, config.generator))
    captioner = Captioner.from_pretrained(
        registry.locate(who.name), str(device), revision=who.revision, prompt=who.prompt
    )
    generator = Generator.from_pretrained(registry.locate(draws.name), str(device), revision=draws.revision)
    dataset = registry.dataset(config.dataset, config.split)
    dataset = dataset.subset(config.pictures) if config.pictures else dataset
    return assemble(config, captioner, generator, dataset)


def validation_set(config: CycleConfig) -> Dataset:
    """Pictures of the data set's split "val"."""
    dataset = registry.dataset(config.dataset, "val")
    return dataset.subset(min(VALIDATED, len(dataset)))


def assemble(
    config: CycleConfig, captioner: Captioner, generator: Generator, dataset: Dataset
) -> tuple[Cycle, Pairs, Learner]:
    """As `prepare`, from models and data that are there; everything but what learns is frozen."""
    pipeline = generator.pipeline
    learning = {"captioner": captioner_parameters(captioner), "generator": generator_parameters(generator)}
    freeze_all_but(captioner.model, learning["captioner"])
    freeze_all_but(pipeline.unet, learning["generator"])
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.requires_grad_(False)
    if config.checkpointing:
        pipeline.unet.train().enable_gradient_checkpointing()  # diffusers wants training mode for it; nothing drops out
    captions = [caption for example in dataset for caption in example.references]
    source, target = captioner.processor.tokenizer, pipeline.tokenizer
    learned = VocabularyMap.learn(source, target, captions, config.vocabulary_map)
    learned = learned.widened(captioner.model.config.text_config.vocab_size)
    bridge = Bridge(learned, pipeline.text_encoder, config.ends_kept)
    pipeline.vae.disable_slicing()  # picture by picture is slower, and saves nothing where all is kept for gradients
    own = (list(parameters.values()) for parameters in learning.values())
    pairs = Pairs(dataset, captioner, generator, config.batch_size, config.seed)
    return Cycle(captioner, generator, bridge, *own, config.losses), pairs, Learner(learning, config.average)


def halves(config: CycleConfig, step: int) -> tuple[str, ...]:
    """Which of the configuration's halves a step has: all, or one of them in turn."""
    taught = config.halves
    return taught if config.schedule == "joint" else (taught[step % len(taught)],)


def losses_of(config: CycleConfig, cycle: Cycle, pairs: Pairs, step: int, part: int, parts: int) -> dict[str, Tensor]:
    """The losses of one part of a step's batch."""
    batch, found = pairs.batch(step, part, parts), {}
    for half in halves(config, step):
        draw = torch.Generator().manual_seed(derive_seed(config.seed, "noise", step, half))
        found |= (cycle.from_image if half == "image" else cycle.from_text)(batch, draw)
    for name, loss in found.items():
        if not torch.isfinite(loss):
            ids = [example.image_id for example, _ in pairs.choose(step)]
            raise FloatingPointError(
                f"{name} is {loss.item()} at step {step}, of pictures {ids}: the last checkpoint is good; go on "
                "from it with a lower learning_rate, or with `latest` below 1 if it is caption_reconstruction"
            )
    return found


def train(
    config: CycleConfig,
    cycle: Cycle,
    pairs: Pairs,
    learner: Learner,
    folder: Path,
    accelerator: Accelerator,
    validate: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Train for `config.steps` steps in all, counting those that `folder` holds already.

    Args:
        folder: of the run: config.json, state.safetensors, log.jsonl with every step's losses.
        accelerator: with trackers, if they were started, to which the losses go, too.
        validate: called by one process every `config.validate_every` steps, with their number; what it returns is
            logged.
    Raises:
        FloatingPointError: a loss is not finite; the last checkpoint is kept.
        ValueError: the folder holds a run with another configuration.
    """
    folder = Path(folder)
    with accelerator.main_process_first():
        _agree(folder, config)
    parameters = list(learner.parameters())
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    checkpoint = Checkpoint(folder, learner, optimizer)
    first, minutes = checkpoint.load()
    optimizer = accelerator.prepare(optimizer)
    rank, parts, began = accelerator.process_index, accelerator.num_processes * config.accumulation, time.monotonic()
    with trange(first, config.steps, initial=first, total=config.steps, desc="cycle",
                disable=not accelerator.is_main_process) as progress:  # fmt: skip
        for step in progress:
            torch.manual_seed(derive_seed(config.seed, "dropout", step, rank))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
            means: dict[str, Tensor] = {}
            for i in range(config.accumulation):
                with accelerator.autocast():
                    found = losses_of(config, cycle, pairs, step, rank * config.accumulation + i, parts)
                accelerator.backward(total(found, config.losses) / config.accumulation)
                for name, loss in found.items():
                    means[name] = means.get(name, 0) + loss.detach() / config.accumulation
            _gather(parameters, accelerator)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            checkpoint.follow()
            report = {name: accelerator.reduce(value, "mean").item() for name, value in means.items()}
            progress.set_postfix({name: f"{value:.3f}" for name, value in report.items()})
            done = step + 1
            if validate and config.validate_every and done % config.validate_every == 0:
                report |= validate(done) if accelerator.is_main_process else {}
                accelerator.wait_for_everyone()
            accelerator.log(report, step)
            if accelerator.is_main_process:
                _log(folder, step, report)
                if done % config.checkpoint_every == 0 or done == config.steps:
                    checkpoint.save(done, minutes + (time.monotonic() - began) / 60)
    checkpoint.use_average()


def _gather(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Every process goes on with the mean of all processes' gradients; who was moved by none of them has none."""
    if accelerator.num_processes == 1:
        return
    moved = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    # a part whose timesteps are all too late moves no captioner, while another part does
    for parameter, somewhere in zip(parameters, accelerator.reduce(moved, "sum").tolist(), strict=True):
        if somewhere:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "mean")


def _agree(folder: Path, config: CycleConfig) -> None:
    """Keep the configuration in the folder; a run that is there must have the same, but for its length."""
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    there = json.loads(path.read_text()) if path.exists() else now
    if lines := differences(there | {"steps": config.steps}, now):
        raise ValueError(f"{folder} holds a run with another configuration:\n{lines}\nGive another folder.")
    path.write_text(json.dumps(now, indent=1) + "\n")


def _log(folder: Path, step: int, report: dict[str, float]) -> None:
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step, **report}) + "\n")


def read_log(folder: Path) -> list[dict]:
    """A row a step, in order: its number, its losses, what validation found.

    Steps that were made again after a kill are there once.
    """
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return list({row["step"]: row for row in rows}.values())


def export(config: CycleConfig, cycle: Cycle, folder: Path) -> None:
    """Folders that the stock libraries open: `captioner` and `generator`, with a model card each.

    Args:
        folder: of the run, whose log the cards give figures of.
    """
    cycle.captioner.model.save_pretrained(folder / "captioner")
    cycle.captioner.processor.save_pretrained(folder / "captioner")
    cycle.generator.pipeline.save_pretrained(folder / "generator")
    for name, base in (("captioner", config.captioner), ("generator", config.generator)):
        (folder / name / "README.md").write_text(card(config, base, read_log(folder)), encoding="utf-8")


def card(config: CycleConfig, base: str, log: Sequence[Mapping[str, float]]) -> str:
    """A model card: what it was, what it learned from, and how, and what became of the losses."""
    entry, data = registry.ENTRIES[base], registry.ENTRIES[config.dataset]
    weights = ", ".join(f"{name} {getattr(config.losses, name):g}" for name in NAMES)
    settings = "\n".join(f"* {name}: {value}" for name, value in dataclasses.asdict(config).items() if name != "losses")
    figures = "\n".join(_figures(log))
    return f"""---
license: {entry.licence_id}
base_model: {entry.source}
---
# {base}, cycle finetuned

After *Do DALL-E and Flamingo Understand Each Other?* (Li et al., ICCV 2023), by dalleflamingo, on {config.dataset}
({data.licence}); the weights it began with: {entry.licence}. Weights of the losses: {weights}.

{settings}

Means over the first and the last tenth of the steps; CIDEr, × 100, where it was measured, on pictures left out:

{figures}
"""


def _figures(log: Sequence[Mapping[str, float]]) -> Iterator[str]:
    for name in (*NAMES, "cider"):
        if values := [row[name] for row in log if name in row]:
            tenth = max(1, len(values) // 10)
            yield f"* {name}: {fmean(values[:tenth]):.3f} at first, {fmean(values[-tenth:]):.3f} in the end"


def tracked(tracker: str, folder: Path, config: CycleConfig) -> Accelerator:
    """An accelerator whose tracker writes into the run's folder.

    Raises:
        ValueError: accelerate knows no such tracker, or it is not installed.
    """
    # without this, processes that share no accelerator would not know of each other, and each train alone
    where = dict(mixed_precision=config.precision, cpu=not torch.accelerator.is_available())
    if tracker == "none":
        return Accelerator(**where)
    if tracker not in (there := [str(kind) for kind in get_available_trackers()]):
        raise ValueError(
            f"no tracker {tracker!r} is installed, only {', '.join(there) or 'none'}: `pip install {tracker}`, or "
            "--tracker none"
        )
    accelerator = Accelerator(**where, log_with=tracker, project_dir=folder)
    accelerator.init_trackers("cycle")
    return accelerator


def push(folder: Path, owner: str) -> list[str]:
    """Upload the two exported folders to the Hugging Face hub; returns their addresses."""
    hub = HfApi()
    for part in ("captioner", "generator"):
        name = hub.create_repo(f"{owner}/{folder.resolve().name}-{part}", exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=folder / part)
    return [f"https://huggingface.co/{owner}/{folder.resolve().name}-{part}" for part in ("captioner", "generator")]


def read_config(path: Path) -> CycleConfig:
    """A configuration from JSON.

    Raises:
        ValueError: it cannot be read, is no JSON object, or has a field that a configuration has not.
    """
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
        losses = Losses(**fields.pop("losses", {}))
        return CycleConfig(**fields, losses=losses)
    except (OSError, TypeError, json.JSONDecodeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(CycleConfig))
        raise ValueError(f"{path}: {error}; a configuration is a JSON object with some of {known}") from error
