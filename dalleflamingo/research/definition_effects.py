"""A number under the authors' definition and under ours, on the same items: what `definitions` puts into its table.

An effect is the value under both definitions and their difference, with intervals. What is compared is how captions and
images are scored, how they are sampled, or how the models that make them are trained.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.datasets import Dataset, clean_caption
from dalleflamingo.evaluation.caption_results import describe_dataset
from dalleflamingo.evaluation.caption_tokenizer import tokenize
from dalleflamingo.evaluation.image_features import FeatureExtractor, ImageFiles
from dalleflamingo.evaluation.image_metrics import fid, inception_score
from dalleflamingo.evaluation.intervals import Interval, paired_bootstraps
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.generator import Generator, add_noise
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import JourneySettings, image_text_image, text_image_text
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.cycle_arms import Run
from dalleflamingo.research.cycle_comparison import evaluated_captions
from dalleflamingo.research.cycle_study import train_and_evaluate
from dalleflamingo.research.image_ranking import distances
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.research.ranking import EvaluatedCandidates
from dalleflamingo.research.released import ANY_WORDS, IN_TRAINING, ReleasedSampling, sample_latents
from dalleflamingo.runs import derive_seed
from dalleflamingo.similarity import ClipImage, Encoder
from dalleflamingo.sources.models import Models

CORPUS = "nocaps"  # development images of it
PER_CAPTION = 5  # generated images of a caption, and captions of an image
STEPS = 10  # of denoising, by a solver that needs few
RESAMPLES, RESAMPLES_OF_SETS = 1000, 300
NOISES = 4  # timesteps and noises for each image, of loss (3)

# The closed classes of English: articles, prepositions, conjunctions, pronouns, auxiliary verbs. "above" and "below"
# are among them, as in the usual lists, "left" and "right" are not.
STOP_WORDS = frozenset(
    "a an the this that these those of in on at to by with from for into onto over under above below between "
    "behind beside near and or but nor as if than then so there here it its he his him she her hers they their "
    "them we our us you your i my me who whom whose which what where when is am are was were be been being has "
    "have had having do does did can could will would shall should may might must not no some any each all both "
    "few more most other such own same too very just only".split()
)


@dataclass(frozen=True)
class Effect:
    """A number under both definitions, on the same items.

    Attributes:
        definition: a key of `definitions.DEFINITIONS`.
        what: was measured, with its unit.
        digits: after the decimal point.
        ours, theirs, difference: values, and theirs − ours.
    """

    definition: str
    what: str
    digits: int
    ours: Interval
    theirs: Interval
    difference: Interval


def paired(
    definition: str,
    what: str,
    digits: int,
    n: int,
    both: Callable[[np.ndarray], tuple[float, float]],
    of_sets: bool = False,
    recentred: bool = False,
) -> Effect:
    """An effect with intervals by the paired bootstrap over n images.

    Args:
        definition: a key of `definitions.DEFINITIONS`.
        what: is measured.
        digits: after the decimal point.
        n: images.
        both: (n,) indices of images -> the value under our definition and under theirs.
        of_sets: a metric of sets of images, which takes long: fewer resamples, and recentred intervals.
        recentred: the metric is biased by resampling, see `metrics.Metric.biased`.
    """

    def statistics(images: np.ndarray) -> np.ndarray:
        ours, theirs = both(images)
        return np.array([ours, theirs, theirs - ours])

    resamples = RESAMPLES_OF_SETS if of_sets else RESAMPLES
    return Effect(
        definition, what, digits, *paired_bootstraps(statistics, n, resamples, recentred=[of_sets or recentred] * 3)
    )


def paired_means(definition: str, what: str, digits: int, ours: np.ndarray, theirs: np.ndarray) -> Effect:
    """`paired` of two means over (n,) images."""
    return paired(definition, what, digits, len(ours), lambda i: (ours[i].mean(), theirs[i].mean()))


# ── the other definitions ────────────────────────────────────────────────────────────────────────────────────────────


def unprojected(encoder: Encoder) -> Encoder:
    """CLIP's embedding before its projection, transformers' `pooler_output`, of a `ClipImage` or `ClipText`.

    Args:
        encoder: stays as it is.
    Raises:
        ValueError: it has no projection that could be left out.
    """
    twin = copy(encoder)
    twin.model = deepcopy(encoder.model)
    attribute = "proj" if isinstance(encoder, ClipImage) else "text_projection"
    if getattr(twin.model, attribute, None) is None:
        raise ValueError(
            f"{type(twin.model).__name__} has no {attribute}: give open_clip's own CLIP, as `load_clip` does"
        )
    setattr(twin.model, attribute, None)
    return twin


def word_movers(
    vectors: WordVectors,
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    mean: bool = False,
    leave_out: frozenset[str] = frozenset(),
) -> np.ndarray:
    """(N,) Word Mover's Distance of N captions to their references.

    Args:
        vectors: of words.
        captions: N.
        references: of each.
        mean: over the references; else the distance to the nearest one.
        leave_out: words, in lower case, that count in no text.
    """

    def words(text: str) -> str:
        return " ".join(word for word in text.split() if word not in leave_out)

    own = tokenize({"captions": list(captions)})["captions"]
    gold = tokenize(dict(enumerate(map(list, references)))).values()
    found = [[vectors.distance(words(a), words(b)) for b in others] for a, others in zip(own, gold, strict=True)]
    return np.array([np.mean(row) if mean else min(row) for row in found])


def punctuated_as_coco(caption: str) -> str:
    """A caption with a capital and a full stop."""
    return f"{caption[:1].upper()}{caption[1:]}."


def through_size(images: Iterable[Image.Image], size: int) -> list[Image.Image]:
    """Images resized to size × size and, for a network that takes one size only, back again."""
    return [
        image.resize((size, size), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
        for image in images
    ]


# ── measurements ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rendered:
    """Generated images of one caption of each real image.

    Attributes:
        table: of `text_image_text`, `PER_CAPTION` rows an image, in the order of `dataset`.
        real: n images.
        generated: n · `PER_CAPTION` images.
    """

    dataset: Dataset
    table: pd.DataFrame
    real: Sequence[Image.Image]
    generated: Sequence[Image.Image]

    @property
    def source(self) -> np.ndarray:
        """(n · `PER_CAPTION`,) position of each generated image's real one."""
        return np.repeat(np.arange(len(self.real)), PER_CAPTION)

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Positions of all generated images of (n,) images."""
        return (images[:, None] * PER_CAPTION + np.arange(PER_CAPTION)).ravel()


def render(models: Models, dataset: Dataset, folder: Path, settings: JourneySettings) -> Rendered:
    """Generate `PER_CAPTION` images of one caption of each image and describe them; resumed.

    Args:
        models: captioner and generator.
        dataset: with human captions.
        folder: of the run.
        settings: of the journey.
    """
    table = text_image_text(dataset, models.captioner, models.generator, [], folder, settings)
    real = [dataset.open(example) for example in dataset]
    return Rendered(dataset, table, real, list(ImageFiles(folder / path for path in table["image"])))


def settings_of(profile: Profile) -> JourneySettings:
    """Of every journey here."""
    return JourneySettings.of(profile, candidates=PER_CAPTION, steps=STEPS)


def clip_effects(rendered: Rendered, clip: ClipImage, text: ClipText) -> list[Effect]:
    """CLIP distances with the projected embedding and without the projection."""
    n = len(rendered.real)
    images = [
        distances(one, rendered.real, rendered.generated, rendered.source).reshape(n, -1).mean(1)
        for one in (clip, unprojected(clip))
    ]
    pairs = list(rendered.table["caption"]), [[recovered] for recovered in rendered.table["recovered"]]
    texts = [100 * (1 - one.compare(*pairs).numpy()).reshape(n, -1).mean(1) for one in (text, unprojected(text))]
    return [
        paired_means("clip-image", "CLIP distance × 100 of a generated image to the real one", 2, *images),
        paired_means("clip-text", "CLIP distance × 100 of a caption to the description of its image", 2, *texts),
    ]


def inception_effects(rendered: Rendered, extractor: FeatureExtractor) -> list[Effect]:
    """Inception Score, FID, and both metrics of Table 4 from one image of a caption and from five."""
    n, first = len(rendered.real), rendered.source.searchsorted(np.arange(len(rendered.real)))
    side = rendered.real[0].width
    size = round(side * 384 / 512)  # the authors' images are 512 pixels wide
    generated = extractor.extract(rendered.generated)
    real = extractor.extract(rendered.real).features
    small = [
        extractor.extract(through_size(images, size)).features
        for images in (rendered.real, [rendered.generated[i] for i in first])
    ]

    def scores(images: np.ndarray) -> tuple[float, float]:
        logits = generated.logits[rendered.rows(images)]
        return inception_score(logits), inception_score(logits, splits=10)

    def sizes(images: np.ndarray) -> tuple[float, float]:
        return fid(real[images], generated.features[first[images]]), fid(*(one[images] for one in small))

    def numbers(images: np.ndarray) -> tuple[float, float]:
        one, all_of_them = generated.features[first[images]], generated.features[rendered.rows(images)]
        return fid(real[images], one), fid(real[images], all_of_them)

    count = len(rendered.generated)
    return [
        paired("is-splits", f"Inception Score of {count} generated images", 2, n, scores, of_sets=True),
        paired("fid-size", f"FID of {n} images, by way of {size} pixels and back to {side}", 2, n, sizes, of_sets=True),
        paired("five-images", f"FID of {n} real images against {n} and against {count}", 2, n, numbers, of_sets=True),
    ]


def five_images_effect(rendered: Rendered, clip: ClipImage) -> Effect:
    """CLIP distance from the first generated image of a caption and from all five."""
    found = distances(clip, rendered.real, rendered.generated, rendered.source).reshape(len(rendered.real), -1)
    return paired_means("five-images", "CLIP distance × 100", 2, found[:, 0], found.mean(1))


def word_mover_effects(dataset: Dataset, captioner: Captioner) -> list[Effect]:
    """WMD of captions by beam search, one of its two definitions changed at a time."""
    captions = describe_dataset(captioner, dataset)
    vectors = WordVectors.at_hand()
    texts = [captions[example.image_id] for example in dataset], [example.references for example in dataset]
    ours = word_movers(vectors, *texts)
    what = f"WMD of captions by beam search, {vectors.name}"
    return [
        paired_means("wmd-references", what, 3, ours, word_movers(vectors, *texts, mean=True)),
        paired_means("wmd-words", what, 3, ours, word_movers(vectors, *texts, leave_out=STOP_WORDS)),
    ]


def sampling_effects(dataset: Dataset, captioner: Captioner) -> list[Effect]:
    """Quality of sampled captions with a repetition penalty, and with limits in tokens."""
    penalised = ReleasedSampling()
    short = ReleasedSampling(repetition_penalty=1.0, min_length=5, max_length=20, end_id=captioner.end_id)
    ours = sampled(dataset, captioner)
    found = []
    for key, theirs in (
        ("repetition", sampled(dataset, captioner, strategy=penalised)),
        ("length", sampled(dataset, captioner, strategy=short, min_words=0, max_words=ANY_WORDS)),
    ):
        for metric in quality(ours):
            both = partial(_both_means, ours, theirs, metric)
            what = f"{METRICS[metric].label} of a sampled caption"
            is_biased = METRICS[metric].biased
            found.append(paired(key, what, METRICS[metric].digits, len(dataset), both, recentred=is_biased))
    return found


def sampled(dataset: Dataset, captioner: Captioner, **how: object) -> EvaluatedCandidates:
    """`PER_CAPTION` sampled captions of each image, evaluated; `how` as for `Captioner.sample`."""
    rows = []
    for start in tqdm(range(0, len(dataset), 32), desc="captions", leave=False):
        examples = dataset[start : start + 32]
        seeds = [[derive_seed(0, example.image_id, k) for k in range(PER_CAPTION)] for example in examples]
        captions = captioner.sample([dataset.open(example) for example in examples], seeds, **how)
        for example, own in zip(examples, captions, strict=True):
            rows += [{"image_id": example.image_id, "candidate": k, "caption": c} for k, c in enumerate(own)]
    return evaluate_captions(pd.DataFrame(rows), dataset)


def quality(evaluated: EvaluatedCandidates) -> list[str]:
    """The metrics of captions that are reported: CIDEr, and what a caption says as far as it can be judged."""
    return [name for name in ("cider", "f1", "spice") if name in evaluated.metrics][:2]


def _both_means(
    ours: EvaluatedCandidates, theirs: EvaluatedCandidates, metric: str, images: np.ndarray
) -> tuple[float, float]:
    """The mean of a metric over all candidates of images, of both tables."""
    ours, theirs = (one.metrics[metric](one.rows[images].T).mean() for one in (ours, theirs))
    return float(ours), float(theirs)


def label_effects(dataset: Dataset, captioner: Captioner) -> list[Effect]:
    """Loss (1) of labels that are cleaned, beside that of the same labels punctuated as most of COCO's are.

    The miniature's annotators write nothing that cleaning would remove, so the capital and the full stop are added.
    """
    labels = [clean_caption(example.sample_reference(seed=0)) for example in dataset]
    clean, punctuated = (
        token_losses(dataset, captioner, [how(label) for label in labels]) for how in (str, punctuated_as_coco)
    )

    def both(images: np.ndarray) -> tuple[float, float]:
        return tuple(float(losses[images].sum() / counts[images].sum()) for losses, counts in (clean, punctuated))

    what = "loss (1): cleaned labels; labels with a capital and a full stop, as 75 % of COCO's have"
    return [paired("clean-labels", what, 4, len(dataset), both)]


@torch.no_grad()
def token_losses(dataset: Dataset, captioner: Captioner, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) −log p of a caption of each image, and (n,) its number of tokens."""
    losses = []
    for start in range(0, len(dataset), 32):
        images = [dataset.open(example) for example in dataset[start : start + 32]]
        logits, ids = captioner.token_logits(images, captions[start : start + 32])
        of_tokens = F.cross_entropy(
            logits.float().transpose(1, 2), ids, ignore_index=captioner.pad_id, reduction="none"
        )
        losses.append(of_tokens.sum(1))
    return torch.cat(losses).cpu().numpy(), captioner.count_tokens(captions).numpy()


@torch.no_grad()
def latent_effects(dataset: Dataset, generator: Generator) -> list[Effect]:
    """Loss (3) from the means of the latents and from samples, with the same timesteps and noise."""
    pipeline = generator.pipeline
    like = next(pipeline.unet.parameters())
    images = [dataset.open(example) for example in dataset]
    captions = [example.sample_reference(seed=0) for example in dataset]
    hidden = torch.cat(
        [
            pipeline.encode_prompt(captions[i : i + 32], pipeline.device, 1, False)[0]
            for i in range(0, len(captions), 32)
        ]
    )
    mean = generator.encode_images(images, like)
    torch.manual_seed(0)
    handle = sample_latents(pipeline.vae)
    try:
        samples = [generator.encode_images(images, like) for _ in range(NOISES)]
    finally:
        handle.remove()
    ours, theirs = (_generation_losses(generator, latents, hidden) for latents in ([mean] * NOISES, samples))
    share = ((samples[0] - mean).norm() / mean.norm()).item()
    what = f"loss (3), {NOISES} timesteps an image; a sample is {100 * share:.0f} % away from the mean"
    return [paired_means("sampled-latents", what, 4, ours, theirs)]


def _generation_losses(generator: Generator, latents: Sequence[Tensor], hidden: Tensor) -> np.ndarray:
    """(n,) loss (3) of each image, mean over the timesteps; (n, 4, h, w) latents for each of these."""
    found = []
    for number, of_all in enumerate(tqdm(latents, desc="loss (3)", leave=False)):
        draw = torch.Generator().manual_seed(number)
        noisy = add_noise(of_all, generator.pipeline.scheduler, draw)
        rows = torch.arange(len(of_all)).split(32)
        output = torch.cat([generator.predict(noisy.select(part), hidden[part]) for part in rows])
        found.append((output - noisy.target).float().square().flatten(1).mean(1))
    return torch.stack(found).mean(0).cpu().numpy()


def noise_effects(models: Models, dataset: Dataset, folder: Path, settings: JourneySettings) -> list[Effect]:
    """What ranking by CLIP gains over a random caption, candidates rendered from shared noise and each from its own."""
    evaluated = []
    clip = [one for one in models.similarities if one.name == "clip"]
    for name, shared in (("shared", True), ("own", False)):
        table = image_text_image(
            dataset, models.captioner, models.generator, clip, folder / f"noise-{name}", settings, shared_noise=shared
        )
        evaluated.append(evaluate_captions(table, dataset))

    def gain(one: EvaluatedCandidates, metric: str, images: np.ndarray) -> float:
        of, first = one.metrics[metric], one.ranked_at("clip")
        return float(of(first[:, images])[0] - of(one.rows[images].T).mean())

    found = []
    for metric in quality(evaluated[0]):
        what = f"{METRICS[metric].label}: the caption ranked first of {PER_CAPTION} by CLIP − a random one"
        both = partial(lambda metric, images: tuple(gain(one, metric, images) for one in evaluated), metric)
        is_biased = METRICS[metric].biased
        found.append(paired("shared-noise", what, METRICS[metric].digits, len(dataset), both, recentred=is_biased))
    return found


def training_effects(profile: Profile, dataset: Dataset, folder: Path, steps: int, seeds: int) -> list[Effect]:
    """CIDEr after a short cycle finetuning from the cycle study's start, one definition changed at a time; resumed.

    Args:
        profile: names models and data.
        dataset: images that the captioner describes.
        folder: of the runs.
        steps: of training.
        seeds: of training.
    """
    changed = {"cycle": "cycle", "label-smoothing": "cycle"} | {name: name for name in IN_TRAINING}  # -> key of `ARMS`
    rows = []
    runs = [Run(arm, profile.captioner, seed, key=key) for seed in range(seeds) for arm, key in changed.items()]
    for run in tqdm(runs, desc="cycle finetuning", unit="run"):
        losses = {"label_smoothing": 0.1} if run.arm == "label-smoothing" else {}
        config = CycleConfig.of(profile, seed=run.seed, steps=steps, losses=losses)
        found = train_and_evaluate(run, config, folder / run.name, {CORPUS: dataset}, {}, profile)
        names = {"arm": run.arm, "seed": run.seed}
        rows += [names | {"image_id": i, "caption": text} for i, text in found["captions"][CORPUS].items()]
    evaluated = evaluated_captions(pd.DataFrame(rows), dataset)
    effects = []
    for arm in list(changed)[1:]:
        values = (
            evaluated.value("cider", "cycle"),
            evaluated.value("cider", arm),
            evaluated.value("cider", arm, "cycle"),
        )
        what = f"CIDEr × 100 by beam search after {steps} steps from the start of the cycle study, {seeds} seeds"
        effects.append(Effect(arm, what, 1, *values))
    return effects
