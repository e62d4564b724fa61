"""Definitions that decide whether "my numbers differ": the authors' code and ours, and what each difference does.

    python -m dalleflamingo research definitions

A score depends on what exactly is scored: on which vector of CLIP a distance is taken, on how many splits an Inception
Score is the mean of, on whether a captioner may repeat a word. The paper leaves most of it open; the authors' released
code does not. Each such definition has a row here: theirs, ours, how to switch, and the effect in the miniature.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.commands.parsers import positive
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.profiles import Profile
from dalleflamingo.research import definition_effects as effects_of
from dalleflamingo.research import pages
from dalleflamingo.research.cycle_study import development_sets
from dalleflamingo.research.definition_effects import CORPUS, STEPS, Effect
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.runs import write_whole
from dalleflamingo.similarity import ClipImage
from dalleflamingo.sources.models import load_models

COMMAND = "python -m dalleflamingo research definitions"
SCHEDULER = "DPMSolverMultistep"
IMAGES = 200  # development images of every measurement but that of shared noise
RANKED = 100  # of shared noise, which needs two sets of candidates
TRAINING_STEPS, SEEDS = 80, 3


@dataclass(frozen=True)
class Definition:
    """A definition that a number depends on.

    Attributes:
        name: what is defined.
        theirs: in the authors' code, or in the paper where the code says nothing.
        ours: our default.
        switch: the exact setting that gives theirs, or "none".
    """

    name: str
    theirs: str
    ours: str
    switch: str


DEFINITIONS = {
    "clip-image": Definition(
        "CLIP distance of images",
        "`pooler_output` of ViT-B/32, not projected",
        "the projected embedding, ViT-L/14",
        "`unprojected(clip)` of `research.definition_effects`; the model is the profile's field `clip`",
    ),
    "clip-text": Definition(
        "CLIP distance of texts",
        "`pooler_output` of ViT-B/32's text encoder, not projected",
        "the projected embedding, ViT-L/14",
        "`unprojected(clip_text)` of `research.definition_effects`",
    ),
    "wmd-references": Definition(
        "WMD: which reference",
        "mean over the references",
        "the nearest reference",
        "`word_movers(…, mean=True)` of `research.definition_effects`",
    ),
    "wmd-words": Definition(
        "WMD: which words",
        "without stop words",
        "all words",
        "`word_movers(…, leave_out=STOP_WORDS)`, likewise",
    ),
    "repetition": Definition(
        "Sampling: repetition",
        "repetition penalty 1.1",
        "none (the paper names none)",
        "`strategy=ReleasedSampling()` (`research.released`) of `Captioner.sample` and `image_text_image`",
    ),
    "length": Definition(
        "Sampling: length",
        "5 to 20 tokens, the prompt's included",
        "5 to 30 words (the paper's text)",
        "`captioner.sample(…, strategy=ReleasedSampling(repetition_penalty=1.0, min_length=5, max_length=20, "
        "end_id=captioner.end_id), min_words=0, max_words=ANY_WORDS)`",
    ),
    "is-splits": Definition(
        "Inception Score", "mean of 10 splits", "one split", "`inception_score(logits, splits=10)`"
    ),
    "fid-size": Definition(
        "FID: size of images",
        "images resized to 384² before Inception resizes them",
        "images as they are",
        "`extractor.extract([image.resize((384, 384)) for image in images])`",
    ),
    "clean-labels": Definition(
        "Labels (both clean them; shown are labels that are not cleaned)",
        "cleaned by BLIP's `pre_caption`",
        "the same",
        "none",
    ),
    "resize": Definition(
        "Images that the generator learns from",
        "resized whole to a square",
        "the same",
        '`CycleConfig(fit="crop")` takes the middle square instead',
    ),
    "label-smoothing": Definition(
        "Training: label smoothing", "0.1", "none", "`CycleConfig(losses=Losses(label_smoothing=0.1))`"
    ),
    "train-mode": Definition(
        "Training: dropout",
        "BLIP in train mode (dropout 0.1)",
        "eval mode",
        '`build_released_cycle(…, deviations={"train-mode"})`',
    ),
    "sampled-latents": Definition(
        "Training: latents",
        "`latent_dist.sample()`, anew at every step",
        "`latent_dist.mean`",
        '`build_released_cycle(…, deviations={"sampled-latents"})`',
    ),
    "augmentation": Definition("Training: augmentation", "RandAugment", "none", "none"),
    "five-images": Definition(
        "Table 4: images of a caption",
        "five",
        "one",
        "`text_image_text` with `JourneySettings(candidates=5)`, its images evaluated together",
    ),
    "shared-noise": Definition(
        "Insight I: noise of an image's candidates",
        "not said; without a seed each has its own",
        "the same for all",
        "`image_text_image(…, shared_noise=False)`",
    ),
}


def measure(profile: Profile, dataset: Dataset, runs: Path, steps: int, seeds: int) -> list[Effect]:
    """All effects, in the order of `DEFINITIONS`; resumed.

    Args:
        profile: of the models.
        dataset: n images with references.
        runs: folder of the runs.
        steps: of cycle finetuning.
        seeds: of cycle finetuning.
    """
    models = load_models(profile, SCHEDULER)
    settings = effects_of.settings_of(profile)
    [clip] = [one for one in models.similarities if isinstance(one, ClipImage)]
    text = ClipText.from_pretrained(**registry.source_of(profile.clip, profile.device))
    extractor = FeatureExtractor.from_registry(profile.inception, profile.device)
    parts: list[Callable[[], list[Effect]]] = [
        lambda: effects_of.word_mover_effects(dataset, models.captioner),
        lambda: effects_of.sampling_effects(dataset, models.captioner),
        lambda: effects_of.label_effects(dataset, models.captioner),
        lambda: effects_of.latent_effects(dataset, models.generator),
        lambda: effects_of.training_effects(profile, dataset, runs / "training", steps, seeds),
        lambda: effects_of.noise_effects(models, dataset.subset(min(RANKED, len(dataset))), runs, settings),
    ]
    found = []
    with tqdm(total=len(parts) + 1, desc="definitions") as bar:
        for part in parts:
            found += part()
            bar.update()
        rendered = effects_of.render(models, dataset, runs / "images", settings)
        found += effects_of.clip_effects(rendered, clip, text) + effects_of.inception_effects(rendered, extractor)
        found.append(effects_of.five_images_effect(rendered, clip))
        bar.update()
    order = list(DEFINITIONS)
    return sorted(found, key=lambda effect: order.index(effect.definition))


# ── page and command ─────────────────────────────────────────────────────────────────────────────────────────────────

NOT_MEASURED = {
    "resize": "not measured: the miniature's images are square, where both are the same; of NoCaps' images the middle "
    "square leaves out 27 % on average",
    "augmentation": "not measured: no augmentation is built",
}


def table_of(effects: Sequence[Effect]) -> str:
    """The table in Markdown: a row for each effect, and for each definition that has none."""
    rows = []
    for key, one in DEFINITIONS.items():
        names = [one.name, one.theirs, one.ours, one.switch]
        own = [effect for effect in effects if effect.definition == key]
        if not own:
            rows.append([*names, NOT_MEASURED[key], "", "", "", ""])
        for effect in own:
            values = [pages.cell(value, effect.digits) for value in (effect.ours, effect.theirs)]
            difference = pages.cell(effect.difference, effect.digits, signed=True)
            rows.append([*names, effect.what, *values, difference, str(effect.difference.n)])
            names = [""] * 4
    header = [
        "definition",
        "the authors",
        "ours",
        "switch to theirs",
        "measured",
        "by ours",
        "by theirs",
        "difference",
        "n",
    ]
    return pages.table(header, rows)


def page(effects: Sequence[Effect], profile: Profile) -> list[str]:
    """The parts of the page in Markdown."""
    return [
        "# Definitions that decide whether your numbers differ",
        f"{pages.measured_on(profile.dataset)} Made by `{COMMAND}` (profile {profile.name}) at commit "
        f"`{pages.current_commit()}`. Settings are those of the profile but for images, which take {STEPS} steps of "
        f"{SCHEDULER}. The images are development images, none of them in a test set.",
        "Both definitions see the same images, captions, seeds and noise. Brackets are 95 % intervals by a paired "
        "bootstrap over images; where models were trained, training seeds are drawn anew as well. *Difference* is "
        "theirs − ours. With so few images FID is biased upwards and the Inception Score downwards: neither value is a "
        "result, and the difference is that on as many images. *The authors* is what their released code does; where "
        "the paper's text says something else, *ours* follows the text.",
        table_of(effects),
        "What the released code does otherwise in the bridge, the map and x̂ is measured in "
        "[the cycle study](results/cycle.md).",
    ]


def write(docs: Path, effects: Sequence[Effect], profile: Profile, settings: dict[str, int]) -> None:
    """definitions.md and results/definitions.json.

    Args:
        docs: the folder.
        effects: all of them.
        profile: of the models.
        settings: of the measurement: images, steps and seeds of training.
    """
    result = {"command": COMMAND, "commit": pages.current_commit(), "profile": profile.name, **settings}
    result |= {"generated": {"steps": STEPS, "scheduler": SCHEDULER}, "effects": [asdict(one) for one in effects]}
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_whole(docs / "results" / "definitions.json", lambda path: path.write_text(text, encoding="utf-8"))
    pages.write_page(docs / "definitions.md", page(effects, profile))


def main(arguments: list[str]) -> int:
    """Definitions of the authors' code and ours, and what each difference does to the numbers.

    About ten minutes on one core. What was generated and trained is kept, and an interrupted study goes on there.
    """
    parser = study_parser("definitions", main.__doc__)
    parser.add_argument("--images", type=positive, default=IMAGES, help="development images; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=TRAINING_STEPS, help="of training; default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="of training; default: %(default)s")
    options = parse(parser, arguments)
    profile = profiles.current()
    dataset = development_sets(profile)[CORPUS].subset(options.images)
    folder = options.runs / f"definitions-{profile.name}-{options.steps}-{options.images}"  # other settings, other runs
    effects = measure(profile, dataset, folder, options.steps, options.seeds)
    settings = {"images": options.images, "steps": options.steps, "seeds": options.seeds}
    write(options.docs, effects, profile, settings)
    print(f"{options.docs}/definitions.md")
    return 0
