"""What each notebook takes of a GPU's memory with the real models, counted without them.

    python -m dalleflamingo research memory-plan

For the profiles of the real models, every stage of a notebook runs with models of the published sizes and no data
(`memory.py`), in the number formats and sizes of the profile. Where a notebook computes gradients by hand, its own
cells run, one after another in one namespace, so that whatever a cell leaves behind is counted in the next one.
"""

import contextlib
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import dalleflamingo
from dalleflamingo import cycle, cycle_losses, registry
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.course import cycle_figures, show
from dalleflamingo.course.run import NOTEBOOKS
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation.workers import CHUNK
from dalleflamingo.generator import Generator, add_noise
from dalleflamingo.profiles import PROFILES, Profile
from dalleflamingo.research import architectures, pages
from dalleflamingo.research.memory import MemoryMeter, without_data
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import BATCH, ClipImage, Dino
from dalleflamingo.sources import models, registered
from dalleflamingo.vocabulary import VocabularyMap

GIB = 2**30
REAL = ("colab", "paper")  # the profiles of the real models
LIMIT = 13  # GiB of the T4's 15, so that CUDA itself, its libraries and gaps between tensors have two
TOKENS = 40  # of a sampled caption with its prompt; the paper's 30 words at most
CAPTION = "a man in a red jacket and a dog stand beside an old wooden boat on the snow near a frozen lake"
IMAGE = Image.new("RGB", (640, 480))


@dataclass(frozen=True)
class Plan:
    """The memory of one notebook under one profile.

    Attributes:
        notebook: its file's name without suffix.
        profile: name.
        stages: what is done, in order -> the most bytes alive while it is done, with what was there before.
    """

    notebook: str
    profile: str
    stages: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the stage that needs most."""
        return max(self.stages.values())

    @property
    def where(self) -> str:
        """The stage that needs most."""
        return shown(max(self.stages, key=self.stages.get))


def shown(stage: str) -> str:
    """A stage's name as a table has it: the ids of most cells begin with "cell-"."""
    return stage.replace("cell cell-", "cell ")


class _FullSizeBridge(Bridge):
    """A bridge of full size whose tokens come from the texts, because the ids that it gets have no data."""

    def __init__(self, vocabulary_map: VocabularyMap, text_encoder: nn.Module):
        self.vocabulary_map, self.text_encoder = vocabulary_map, text_encoder
        embeddings = text_encoder.get_input_embeddings().weight
        self.mapped_embeddings = embeddings.new_empty(vocabulary_map.matrix.shape[0], embeddings.shape[1])

    def __call__(self, distributions: Tensor, ids: Tensor, texts: list[str]) -> Tensor:
        rows = self.vocabulary_map.source(list(texts), add_special_tokens=False).input_ids
        return self.encode(self.soft_prompt(distributions, self.vocabulary_map.align(rows, texts)))


class _Anything:
    """Takes any call and has any attribute: a figure or a table of a notebook's cell."""

    def __call__(self, *_, **__) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        return self


ANYTHING = _Anything()


@contextlib.contextmanager
def full_size(profile: Profile) -> Iterator[MemoryMeter]:
    """Inside the context the package opens models of the published sizes, without data, and images are blank.

    Args:
        profile: of the real models; its number format is that of the weights, as on a GPU.
    """
    with torch.device("meta"):
        captioner, generator = architectures.captioner(), architectures.generator()
        clip, dino = architectures.clip_image(), architectures.dino()
    pipeline, vocabulary = generator.pipeline, captioner.model.config.text_config.vocab_size
    learned = VocabularyMap.learn(captioner.processor.tokenizer, pipeline.tokenizer, [CAPTION]).resize(vocabulary)
    pipeline.image_processor.postprocess = lambda images, **_: [IMAGE] * len(images)
    labelled = Dataset("full size", [Example(i, Path(f"{i}.jpg"), (CAPTION,)) for i in range(100)])

    def opens(opened: object, *modules: nn.Module) -> Callable[..., object]:
        """A `from_pretrained` that gives the modules weights of the type that it is asked for."""

        def from_pretrained(dtype: torch.dtype = torch.float32, **_) -> object:
            for module in modules:
                _allocate(module, dtype)
            return opened

        return from_pretrained

    replaced = [
        (Captioner, "from_pretrained", opens(captioner, captioner.model)),
        (Generator, "from_pretrained", opens(generator, pipeline.text_encoder, pipeline.unet, pipeline.vae)),
        (ClipImage, "from_pretrained", opens(clip, clip)),
        (Dino, "from_pretrained", opens(dino, dino)),
        (cycle, "Bridge", lambda _, text_encoder: _FullSizeBridge(learned, text_encoder)),
        (cycle.VocabularyMap, "learn", lambda *_: learned),
        (learned.__class__, "resize", lambda own, _: own),
        (Profile, "torch_dtype", property(lambda own: getattr(torch, own.dtype))),
        # what fake tensors cannot do: move weights, be copied; neither takes memory
        (dalleflamingo.generator, "fast_unet", lambda _: contextlib.nullcontext(False)),
        (dalleflamingo.generator, "deepcopy", lambda scheduler: scheduler),
        (registry, "source_of", lambda *_: {}),
        (registered, "load_dataset", lambda *_: labelled),
        (Dataset, "open", lambda *_: IMAGE),
        (dalleflamingo, "current_profile", lambda: profile),
        (dalleflamingo, "mean_interval", ANYTHING),
        *((module, name, ANYTHING) for module in (show, cycle_figures) for name in _functions(module)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield stack.enter_context(without_data())


def _allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on "meta" weights of a type; `Module.to` cannot change fake ones. Tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                made[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[id(old)])


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def journeys(profile: Profile) -> Iterator[str]:
    """Both journeys, as the package's functions make them; a name after each stage."""
    captioner, generator, (clip, dino) = models.load_models(profile)
    yield "models"
    yield from _captions(captioner, CHUNK, profile.candidates, "captions, sampled")
    yield from _captions(captioner, CHUNK * profile.candidates, 3, "captions, by beam search")
    generator.render([CAPTION] * profile.batch_size, range(profile.batch_size), 2, batch_size=profile.batch_size)
    yield "images"
    with torch.no_grad():
        clip(torch.empty(BATCH, 3, 224, 224))
        dino(torch.empty(BATCH, 3, profile.dino_size, profile.dino_size), interpolate_pos_encoding=True)
    yield "similarities"


@torch.no_grad()
def _captions(captioner: Captioner, images: int, each: int, name: str) -> Iterator[str]:
    """The last token of `each` captions of every image, which are as long as they can be."""
    like, size = next(captioner.model.parameters()), architectures.CAPTIONED
    features = captioner.encode_images(like.new_empty(images, 3, size, size)).repeat_interleave(each, dim=0)
    ids = torch.zeros(len(features), TOKENS, dtype=torch.long)
    captioner.model.text_decoder(input_ids=ids, encoder_hidden_states=features, use_cache=True)
    yield name


def gradients_of_a_text(profile: Profile) -> Iterator[str]:
    """Notebook 03: the gradient of loss (2) at eight timesteps, down to the captioner's queries."""
    captioner, generator, _ = models.load_models(profile)
    pipeline = generator.pipeline
    for module in (captioner.model, pipeline.unet, pipeline.text_encoder):
        module.requires_grad_(False)
    bridge = cycle.Bridge(None, pipeline.text_encoder)
    queries = list(cycle_losses.captioner_parameters(captioner).values())
    for query in queries:
        query.requires_grad_()
    logits, ids = captioner.token_logits([IMAGE], [CAPTION])
    latents = generator.encode_images([IMAGE] * 8, queries[0])
    noisy = add_noise(latents, pipeline.scheduler, torch.Generator())
    hidden_states = bridge(logits.softmax(-1), ids, [CAPTION]).expand(8, -1, -1)
    yield "forward pass"
    torch.autograd.grad(noisy.loss(generator.predict(noisy, hidden_states)), queries)
    yield "backward pass"


def cycle_notebook(profile: Profile) -> Iterator[str]:
    """Notebook 06: its cells up to the training loop, and two steps of that loop."""
    names: dict[str, object] = {}
    yield from _cells("06_cycle_finetuning", names, "cell-24")
    config, batches, trainable = names["config"], names["batches"], names["trainable"]
    optimizer = torch.optim.AdamW(trainable.parameters(), config.learning_rate)
    for step in range(2):
        for part in range(min(2, config.accumulation)):  # further parts are like the second
            with torch.autocast("cpu", torch.float16, enabled=config.precision == "fp16"):
                losses = cycle.step_losses(config, names["cycle"], batches, step, part, config.accumulation)
            cycle_losses.total_loss(losses, config.losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    yield "training loop"


def ablations(profile: Profile) -> Iterator[str]:
    """Notebook 07: the cells of the released code's deviations, captions of damaged images, images with CLIP."""
    names: dict[str, object] = {}
    yield from _cells("07_ablations", names, "cell-16")
    captioner, generator, size = names["captioner"], names["generator"], profile.batch_size
    yield from _captions(captioner, size, 3, "captions, by beam search")
    clip = ClipImage.from_pretrained()
    generator.render([CAPTION] * size, range(size), 2, batch_size=size)
    yield "images"
    with torch.no_grad():
        clip(torch.empty(BATCH, 3, 224, 224))
    yield "similarities"


def _cells(notebook: str, names: dict[str, object], until: str) -> Iterator[str]:
    """Execute a notebook's code cells before the cell `until`; the id of each that computes something."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["id"] == until:
            return
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), cell["id"], "exec", optimize=1)  # no assertions about values
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)
            yield f"cell {cell['id']}"


STAGES = {
    "00_the_question": journeys,
    "01_how_the_models_work": journeys,
    "03_differentiable_bridge": gradients_of_a_text,
    "04_image_text_image": journeys,
    "05_text_image_text": journeys,
    "06_cycle_finetuning": cycle_notebook,
    "07_ablations": ablations,
    "08_the_real_models": journeys,
}  # 02 opens tokenizers only


def plan(notebook: str, profile: Profile) -> Plan:
    """Count one notebook's memory under a profile of the real models; seconds, or minutes for 06."""
    stages = {}
    with warnings.catch_warnings(), full_size(profile) as meter:
        warnings.simplefilter("ignore")
        for name in STAGES[notebook](profile):
            if meter.peak:  # else no model is there yet
                stages[name] = meter.peak
            meter.restart()
    return Plan(notebook, profile.name, stages)


# ── page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(plans: list[Plan], commit: str) -> list[str]:
    """The parts of the page in Markdown.

    Args:
        plans: of all notebooks and profiles.
        commit: that counted.
    """
    by_name = {(one.notebook, one.profile): one for one in plans}
    profiles = list(dict.fromkeys(one.profile for one in plans))
    peaks, stages = [], []
    for notebook in dict.fromkeys(one.notebook for one in plans):
        row = [notebook]
        for profile in profiles:
            found = by_name[notebook, profile]
            row += [f"{found.peak / GIB:.1f}", found.where]
            stages += [[notebook, profile, shown(name), f"{size / GIB:.1f}"] for name, size in found.stages.items()]
        peaks.append(row)
    return [
        "# What each notebook takes of a GPU's memory",
        f"Made by `python -m dalleflamingo research memory-plan` at commit `{commit}`. **Counted, not "
        "measured on a GPU.** Models of the published sizes run without data: BLIP with ViT-L, Stable Diffusion v1-4, "
        "CLIP ViT-L/14, DINO ViT-B/8. The bytes of all tensors that are alive are summed. Where it depends on data, "
        f"the most is assumed: captions of {TOKENS} tokens, every image early enough for loss (4). Tests compare the "
        "count with real tensors, and with PyTorch's own profiler, on small models.",
        f"Peaks in GiB. A T4 has 15. {LIMIT} are planned with; the rest is for CUDA itself, for its libraries and for "
        "gaps between tensors. Notebook 02 opens tokenizers only. Not in the "
        "count: the Inception network of notebook 05 (96 MB), and the miniature's models in the repair of notebook 06.",
        pages.table(["notebook", *(cell for name in profiles for cell in (f"`{name}`", "at"))], peaks),
        "## Stage by stage",
        "The most that is alive during a stage, with what earlier stages left.",
        pages.table(["notebook", "profile", "stage", "GiB"], stages),
    ]


def main(arguments: list[str]) -> int:
    """What each notebook takes of a GPU's memory with the real models, counted without a GPU and without weights."""
    options = parse(study_parser("memory-plan", main.__doc__), arguments)
    cases, counted = [(notebook, name) for notebook in STAGES for name in REAL], {}
    for notebook, name in tqdm(cases, desc="memory plan"):
        case = STAGES[notebook], name  # several notebooks do the same
        counted[case] = counted.get(case) or plan(notebook, PROFILES[name])
    plans = [replace(counted[STAGES[notebook], name], notebook=notebook) for notebook, name in cases]
    folder = options.docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    commit = pages.current_commit()
    text = json.dumps({"commit": commit, "plans": [asdict(one) for one in plans]}, indent=1) + "\n"
    write_whole(folder / "memory-plan.json", lambda path: path.write_text(text, encoding="utf-8"))
    pages.write_page(folder / "memory-plan.md", page(plans, commit))
    worst = max(plans, key=lambda one: one.peak)
    print(f"{folder}/memory-plan.md; the most: {worst.peak / GIB:.1f} GiB, {worst.notebook} in profile {worst.profile}")
    return 0


def load(folder: Path = pages.SHIPPED) -> list[Plan]:
    """The plans that the command wrote."""
    record = json.loads((folder / "memory-plan.json").read_text(encoding="utf-8"))
    return [Plan(**one) for one in record["plans"]]
