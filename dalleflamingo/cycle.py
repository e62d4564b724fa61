"""Cycle finetuning: a captioner and a generator teach each other (§4, App. H).

    accelerate launch -m dalleflamingo cycle --run build/runs/cycle                 one process, or several GPUs
    torchrun --nproc-per-node 2 -m -- dalleflamingo cycle --run build/runs/cycle    two processes, also on a CPU

The pairs, the noise and the timesteps of a step depend only on the seed and the step's number. So a run that was killed
continues from its last checkpoint and ends with the same weights (on a CPU with as many threads, bit for bit), and
several processes, or accumulated parts of a batch, compute what one process would.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_constant_schedule_with_warmup
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import trange

from dalleflamingo import cycle_losses, registry, runs
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner, without_unreadable
from dalleflamingo.cycle_losses import LOSS_NAMES, TRAINABLE, Batch, Cycle, Losses
from dalleflamingo.datasets import Dataset, Example, clean_caption
from dalleflamingo.generator import FITS, Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.runs import Checkpoint, RunFolderError, derive_seed
from dalleflamingo.settings import Count, Seed, check, from_mapping
from dalleflamingo.vocabulary import MAP_KINDS, VocabularyMap


@dataclass(frozen=True)
class CycleConfig:
    """All settings of a run (the paper's, App. H: learning rate 1e-4, batches of 8, 5 epochs of COCO).

    Attributes:
        captioner, generator, dataset: names in the registry. split: which split of the data set.
        scheduler: name of a diffusers scheduler, for images generated in validation; None: the generator's own.
        images: how many labelled images, chosen by seed 0; None: all.
        fit: how the generator's images are made square: "resize" or "crop", see `Generator.encode_images`.
        trainable: what is trained of cross-attention: "queries" (the paper's), "cross-attention" or "lora".
        losses: weights and settings of the four losses.
        schedule: "alternating", (1) + (2) at one step and (3) + (4) at the next, or "joint", all at every step.
        steps: optimizer steps. batch_size: pairs in a step, over all processes and parts.
        accumulation: parts of a batch that a process computes one after another, to save memory.
        warmup: steps in which the learning rate grows to `learning_rate`; then it stays constant.
        checkpointing: recompute activations in the backward pass, to save memory.
        precision: "no" (float32), "bf16" or "fp16" autocasting; a CPU has no fp16 and takes float32.
        vocabulary_map: kind of the bridge's map, learned from the labelled captions.
        ema_decay: decay, in [0, 1), of a moving average of the trained parameters, which is then the result; 0: none.
        checkpoint_every: in steps; only the last checkpoint is kept. validate_every: in steps; 0: never.
    Raises:
        ValueError: as `settings.check`, or two settings exclude each other.
        RegistryError: the registry has no such captioner, generator, data set or split.
    """

    captioner: str
    generator: str
    dataset: str
    split: str | None = "train"
    scheduler: str | None = None
    images: Count | None = None
    fit: Literal[tuple(FITS)] = "resize"
    trainable: Literal[TRAINABLE] = "queries"
    losses: Losses = field(default_factory=Losses)
    schedule: Literal["alternating", "joint"] = "alternating"
    steps: Count = 1000
    batch_size: Count = 8
    accumulation: Count = 1
    learning_rate: Annotated[float, Field(ge=1e-8, le=1)] = 1e-4  # a smaller step vanishes in float32
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup: Annotated[int, Field(ge=0, le=10**6)] = 0
    max_grad_norm: Annotated[float, Field(ge=1e-3, le=1e12)] = 1.0  # less vanishes beside AdamW's ε
    checkpointing: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    vocabulary_map: Literal[MAP_KINDS] = "word-aligned"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Seed = 0
    checkpoint_every: Count = 100
    validate_every: Annotated[int, Field(ge=0, le=10**9)] = 0

    @classmethod
    def of(cls, profile: Profile, /, **changes: object) -> "CycleConfig":
        """A profile's models, data and settings (its field `cycle`), except for `changes` (`losses`: a mapping)."""
        models = {"captioner": profile.captioner, "generator": profile.generator, "dataset": profile.coco}
        named = {**models, "scheduler": profile.scheduler, **profile.cycle, **changes}
        own, losses = profile.cycle.get("losses", {}), changes.get("losses", {})
        named["losses"] = from_mapping(Losses, {**own, **losses} if isinstance(losses, Mapping) else losses)
        return from_mapping(cls, named)

    def __post_init__(self):
        check(self)
        registry.require_kind(self.captioner, "captioner")
        if registry.require_kind(self.generator, "generator").opened_by:
            raise ValueError(f"{self.generator} has no U-Net to finetune: name a Stable Diffusion as generator")
        registry.require_split(registry.require_kind(self.dataset, "data set"), self.split)
        if max(getattr(self.losses, name) for name in LOSS_NAMES) < 1e-6:  # less is lost beside AdamW's ε
            raise ValueError("no loss has a weight of 1e-6 or more, and nothing would be learned: give one a weight")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation = {self.accumulation}: it should divide batch_size = {self.batch_size}")
        if self.checkpointing and self.losses.image_updates == "captioner":
            raise ValueError(
                "checkpointing computes the U-Net again when it is no longer frozen: set checkpointing false, or "
                "image_updates to another than 'captioner'"
            )

    def halves(self, step: int) -> tuple[str, ...]:
        """What a step computes of "image", (1) + (2), and "text", (3) + (4): all that have a weight, or one in turn."""
        named = {"image": LOSS_NAMES[:2], "text": LOSS_NAMES[2:]}
        halves = tuple(half for half, names in named.items() if any(getattr(self.losses, name) for name in names))
        return halves if self.schedule == "joint" else (halves[step % len(halves)],)


@dataclass
class CaptionedBatches:
    """Batches of `batch_size` labelled images; order and captions change from epoch to epoch.

    A label is a human caption as BLIP reads it in training (`datasets.clean_caption`), for both models.

    Attributes:
        captioner, generator: the models whose pixel values and latents the batches hold.
        fit: how the generator's images are made square.
        memory: bytes in which pixel values and latents are cached.
    Raises:
        ValueError: an image has no caption, or there are fewer images than a batch has.
    """

    dataset: Dataset
    captioner: Captioner
    generator: Generator
    batch_size: int
    seed: int = 0
    fit: str = "resize"
    memory: int = 2**30
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        unlabelled = [example.image_id for example in self.dataset if not example.references]
        if unlabelled:
            raise ValueError(f"{len(unlabelled)} images have no caption, such as {unlabelled[:3]}: leave them out")
        if len(self.dataset) < self.batch_size:
            raise ValueError(f"{len(self.dataset)} images, but {self.batch_size} in a batch: take a smaller batch_size")

    def choose(self, step: int) -> list[tuple[Example, str]]:
        """The images of a step, each with its label."""
        chosen = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(position, len(self.dataset))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            example = self.dataset[int(order[i])]
            number = derive_seed(self.seed, "caption", epoch, example.image_id) % len(example.references)
            chosen.append((example, clean_caption(example.references[number])))
        return chosen

    def require_parts(self, parts: int) -> None:
        """Raises ValueError where a batch does not divide into that many parts."""
        if self.batch_size % parts:
            raise ValueError(f"a batch of {self.batch_size} does not divide into {parts} parts: take one that does")

    @torch.no_grad()
    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """One of `parts` equal parts of a step's batch; `part` counts from 0. Errors as `require_parts`."""
        self.require_parts(parts)
        chosen, size = self.choose(step), self.batch_size // parts
        own = chosen[part * size :][:size]
        captions = [caption for _, caption in own]
        encoded = [self._encode(example) for example, _ in own]
        pixel_values, latents = (torch.stack(column) for column in zip(*encoded, strict=True))
        pipeline, model = self.generator.pipeline, self.captioner.model
        pixel_values, latents = pixel_values.to(model.device, model.dtype), latents.to(pipeline.device)
        encoder_hidden_states, _ = pipeline.encode_prompt(captions, pipeline.device, 1, False)
        token_counts = self.captioner.count_tokens([caption for _, caption in chosen])
        return Batch(pixel_values, captions, latents, encoder_hidden_states, token_counts, first=part * size)

    def _encode(self, example: Example) -> tuple[Tensor, Tensor]:
        """(3, H, W) pixel values and (4, h, w) latents of an image, in main memory."""
        if example.image_id in self._kept:
            return self._kept[example.image_id]
        image = self.dataset.open(example)
        pixel_values = self.captioner.processor(images=[image], return_tensors="pt").pixel_values[0]
        like = next(self.generator.pipeline.unet.parameters())
        latents = self.generator.encode_images([image], like, self.fit)[0]
        encoded = pixel_values, latents.cpu()
        if (len(self._kept) + 1) * sum(tensor.nbytes for tensor in encoded) <= self.memory:
            self._kept[example.image_id] = encoded
        return encoded


class TrainableParameters:
    """What `Checkpoint` keeps of a run: the trained parameters by model, and the decay of their moving average."""

    def __init__(self, trainable: Mapping[str, Mapping[str, nn.Parameter]], ema_decay: float = 0.0):
        self.average = ema_decay
        self.modules = {who: nn.ParameterList(own.values()) for who, own in trainable.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for module in self.modules.values() for parameter in module.parameters())


def build_cycle(
    config: CycleConfig,
    captioner: Captioner,
    generator: Generator,
    dataset: Dataset,
    bridge: Bridge | None = None,
    cycle_class: Callable[..., Cycle] = Cycle,
) -> tuple[Cycle, CaptionedBatches, TrainableParameters]:
    """Build what `train_cycle` needs from two models and labelled images; all but the trained parameters are frozen.

    Args:
        config: settings of the run.
        captioner: p_θ.
        generator: ε_φ, τ and the VAE.
        dataset: labelled images.
        bridge: from the captioner to the generator; None: its map is learned from the labelled captions.
        cycle_class: builds the cycle, with the arguments of `Cycle`.
    """
    pipeline = generator.pipeline
    if config.trainable == "lora":
        cycle_losses.add_lora(captioner.model, derive_seed(config.seed, "lora", "captioner"))
        cycle_losses.add_lora(pipeline.unet, derive_seed(config.seed, "lora", "generator"))
    trainable = {
        "captioner": cycle_losses.captioner_parameters(captioner, config.trainable),
        "generator": cycle_losses.generator_parameters(generator, config.trainable),
    }
    cycle_losses.freeze_all_but(captioner.model, trainable["captioner"])
    cycle_losses.freeze_all_but(pipeline.unet, trainable["generator"])
    for module in (pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    if config.checkpointing:
        pipeline.unet.train().enable_gradient_checkpointing()  # diffusers wants training mode for it; nothing drops out
    dataset = without_unreadable(dataset, captioner)
    if bridge is None:
        labels = [clean_caption(caption) for example in dataset for caption in example.references]
        captions = captioner.behind_prompt(labels)
        tokenizers = captioner.processor.tokenizer, pipeline.tokenizer
        vocabulary_map = VocabularyMap.learn(*tokenizers, captions, config.vocabulary_map)
        bridge = Bridge(vocabulary_map.resize(captioner.model.config.text_config.vocab_size), pipeline.text_encoder)
    parameters = (list(own.values()) for own in trainable.values())
    cycle = cycle_class(captioner, generator, bridge, *parameters, config.losses)
    batches = CaptionedBatches(dataset, captioner, generator, config.batch_size, config.seed, config.fit)
    return cycle, batches, TrainableParameters(trainable, config.ema_decay)


def train_cycle(
    config: CycleConfig,
    cycle: Cycle,
    batches: CaptionedBatches,
    trainable: TrainableParameters,
    run_folder: Path,
    accelerator: Accelerator,
    validate: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Train for `config.steps` steps in all, counting those already in `run_folder`.

    Args:
        config: settings of the run.
        cycle: from `build_cycle`.
        batches: likewise.
        trainable: likewise.
        run_folder: gets config.json, state.safetensors and log.jsonl with the losses of every step.
        accelerator: its processes share every batch; its trackers, which begin here, log the losses too.
        validate: called by the main process every `config.validate_every` steps; what it returns is logged.
    Raises:
        FloatingPointError: a loss is not finite; the last checkpoint is kept.
        ValueError: the batch does not divide among the processes.
        RunFolderError: the folder is of a run with another configuration or at work, damaged, or cannot be written to.
    """
    run_folder = Path(run_folder)
    batches.require_parts(accelerator.num_processes * config.accumulation)
    with runs.hold(run_folder) if accelerator.is_main_process else nullcontext():
        _train(config, cycle, batches, trainable, run_folder, accelerator, validate)


def _train(config, cycle, batches, trainable, run_folder: Path, accelerator: Accelerator, validate) -> None:
    main, record = accelerator.is_main_process, json.loads(json.dumps(asdict(config)))
    with accelerator.main_process_first():
        _agree(run_folder, record)
    accelerator.init_trackers("cycle")  # which write into the folder
    accelerator.gradient_accumulation_steps = config.accumulation  # also of an accelerator of the caller's own
    parameters, began = list(trainable.parameters()), time.monotonic()
    groups = [{"params": parameters, "initial_lr": config.learning_rate}]  # "initial_lr": a schedule that is continued
    optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)
    checkpoint = Checkpoint(run_folder, trainable, optimizer, accelerator.scaler)
    first, minutes = checkpoint.load()
    schedule = get_constant_schedule_with_warmup(optimizer, config.warmup, last_epoch=first)
    optimizer = accelerator.prepare(optimizer)
    progress = trange(first, config.steps, initial=first, total=config.steps, desc="cycle", disable=not main)
    for step in progress:
        torch.manual_seed(derive_seed(config.seed, "dropout", step, accelerator.process_index))
        report = _backward(config, cycle, batches, step, accelerator)
        if report:
            _average_gradients(parameters, accelerator)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        checkpoint.follow()
        progress.set_postfix({name: f"{value:.3f}" for name, value in report.items()})
        done = step + 1
        if validate and config.validate_every and done % config.validate_every == 0:
            report |= validate(done) if main else {}
            accelerator.wait_for_everyone()
        accelerator.log(report, step)
        if main:
            if step == first:  # only now has all of the configuration been accepted
                text = json.dumps(record, indent=1) + "\n"
                runs.write_whole(run_folder / "config.json", lambda path, text=text: path.write_text(text))
            runs.append_row(run_folder / "log.jsonl", {"step": step, **report})
            if done % config.checkpoint_every == 0 or done == config.steps:
                checkpoint.save(done, minutes + (time.monotonic() - began) / 60)
    checkpoint.use_average()


def _backward(
    config: CycleConfig, cycle: Cycle, batches: CaptionedBatches, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Accumulate this process's gradients of a step; returns its losses, averaged over all processes, or no losses."""
    means: dict[str, Tensor] = {}
    parts = accelerator.num_processes * config.accumulation
    for i in range(config.accumulation):
        part = accelerator.process_index * config.accumulation + i
        with accelerator.accumulate(), accelerator.autocast():
            losses = step_losses(config, cycle, batches, step, part, parts)
        if losses:  # backward divides by the number of accumulated parts
            accelerator.backward(cycle_losses.total_loss(losses, config.losses))
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / config.accumulation
    return {name: accelerator.reduce(value, "mean").item() for name, value in means.items()}


def step_losses(
    config: CycleConfig, cycle: Cycle, batches: CaptionedBatches, step: int, part: int = 0, parts: int = 1
) -> dict[str, Tensor]:
    """Name -> loss, a scalar, of one part of a step's batch; arguments as for `train_cycle` and `batches.batch`.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    batch, found = batches.batch(step, part, parts), {}
    for half in config.halves(step):
        draw = torch.Generator().manual_seed(derive_seed(config.seed, "noise", step, half))
        found |= (cycle.image_losses if half == "image" else cycle.text_losses)(batch, draw)
    for name, loss in found.items():
        if not torch.isfinite(loss):
            ids = [example.image_id for example, _ in batches.choose(step)]
            raise FloatingPointError(
                f"{name} is {loss.item()} at step {step}, of images {ids}: the last checkpoint is good; go on from it "
                "with a lower learning_rate, or with `max_timestep` below 1 if it is caption_reconstruction"
            )
    return found


def _average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean of all processes' gradients.

    Not by DistributedDataParallel: the losses call parts of the models, and a part of a batch whose timesteps are all
    too late gives the captioner no gradient while another part does. A parameter that has a gradient nowhere gets none.
    """
    if accelerator.num_processes == 1:
        return
    moved = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=accelerator.device)
    for parameter, somewhere in zip(parameters, accelerator.reduce(moved, "sum").tolist(), strict=True):
        if somewhere:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "mean")


def _agree(run_folder: Path, record: Mapping[str, object]) -> None:
    """Refuse a configuration that differs from that of the folder's run in more than its number of steps."""
    there = runs.read_settings(run_folder / "config.json")
    if there is None:  # a checkpoint without its configuration could be of any
        there = {} if (run_folder / "state.safetensors").exists() else record
    if lines := runs.differences(there | {"steps": record["steps"]}, record):
        raise RunFolderError(f"{run_folder} holds a run with another configuration:\n{lines}\nGive another folder.")
