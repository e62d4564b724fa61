"""Is Insight I visible live? Many sets of a few images, each as small as the experiment that a notebook runs.

    python -m dalleflamingo research live --seed 7 --json live.json

In each set the captions of every image are ranked by the images that come back. A set shows the finding by a similarity
where the 95 % interval of its gain in scene-graph F1 lies above 0: the caption ranked first minus the mean of the
candidates, resampled over the images of the set.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import positive
from dalleflamingo.evaluation.intervals import Interval, mean_interval
from dalleflamingo.evaluation.similarities import load_image_similarities
from dalleflamingo.miniature.scene_graph import scene_graph_f1
from dalleflamingo.reconstruct import JourneySettings, image_text_image
from dalleflamingo.research import fresh
from dalleflamingo.research.metrics import check_similarities
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.ranking import rows_of
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import Models, load_captioner, load_generator

SETS, IMAGES, CANDIDATES = 20, 24, 5
_CHUNK = 16  # images finished together: 16 · 5 captions fill whole batches of 16


@dataclass(frozen=True)
class LiveSets:
    """Gains in scene-graph F1 in several sets.

    Attributes:
        seed: of the scenes, of sampling and of noise.
        candidates: K of each image.
        sets: similarity -> the mean gain of each set.
        gain: similarity -> the mean gain over the images of all sets.
    """

    seed: int
    candidates: int
    sets: Mapping[str, Sequence[Interval]]
    gain: Mapping[str, Interval]

    def visible(self, by: str) -> int:
        """The number of sets whose interval lies above 0.

        Args:
            by: a similarity.
        """
        return sum(found.low > 0 for found in self.sets[by])

    def as_dict(self) -> dict:
        """What the command writes as JSON."""
        first = next(iter(self.sets.values()))
        return {
            "seed": self.seed,
            "sets": len(first),
            "images": first[0].n,
            "candidates": self.candidates,
            "visible": {by: self.visible(by) for by in self.sets},
            "gain": {by: [found.value, found.low, found.high] for by, found in self.gain.items()},
        }


def gains_of_ranking(f1: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """(n,) F1 of the candidate ranked first minus the mean of the candidates; of equals the first is ranked first.

    Args:
        f1: (n, K) of the candidates of n images.
        similarity: (n, K).
    """
    return f1[np.arange(len(f1)), similarity.argmax(axis=1)] - f1.mean(axis=1)


def measure_live(
    seed: int, models: Models, run_folder: Path, settings: JourneySettings, sets: int = SETS, images: int = IMAGES
) -> LiveSets:
    """Image → text → image on fresh scenes of miniature/nocaps, set by set; a run that was interrupted goes on.

    Args:
        seed: of the scenes.
        models: captioner, generator and similarities of images.
        run_folder: of the journey, which is one for all sets.
        settings: of the journey.
        sets: how many.
        images: in each.
    Raises:
        ValueError: `metrics.SIMILARITIES` lacks one of the similarities.
        RunFolderError: run_folder was made with other settings or other models.
    """
    check_similarities(models.similarities, "image")
    dataset = fresh.with_images(fresh.nocaps(sets * images, seed), run_folder / "sources")
    table = image_text_image(dataset, *models, run_folder, settings, chunk=_CHUNK)
    rows, ids = rows_of(table)
    scenes = dict(zip((one.image_id for one in dataset), fresh.scenes_of(dataset), strict=True))
    f1 = scene_graph_f1(table["caption"], [scenes[i] for i in table["image_id"]])[rows]
    of_sets, overall = {}, {}
    for by in (similarity.name for similarity in models.similarities):
        gains = gains_of_ranking(f1, table[by].to_numpy()[rows])
        of_sets[by] = [mean_interval(part) for part in gains.reshape(sets, images)]
        overall[by] = mean_interval(gains)
    return LiveSets(seed, settings.candidates, of_sets, overall)


def main(arguments: list[str]) -> int:
    """Is Insight I visible live, with a few images?

    Draw fresh scenes in sets as small as a notebook's, caption every image several times, generate an image from every
    caption, and count the sets in which the caption ranked first is better than a random one, its interval above 0.
    """
    parser = study_parser("live", main.__doc__, docs=False)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, of sampling and of noise; default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the counts and gains are written")
    parser.add_argument("--sets", type=positive, default=SETS, help=f"default: {SETS}")
    parser.add_argument("--images", type=positive, default=IMAGES, help=f"of each set; default: {IMAGES}")
    parser.add_argument("--candidates", type=positive, default=CANDIDATES, help=f"of each image; default: {CANDIDATES}")
    options = parse(parser, arguments)
    profile = profiles.current()
    settings = JourneySettings.of(profile, candidates=options.candidates, seed=options.seed)
    models = Models(load_captioner(profile), load_generator(profile), load_image_similarities(profile))
    folder = options.runs / f"live-{options.seed}-of-{options.candidates}"
    found = measure_live(options.seed, models, folder, settings, options.sets, options.images)
    if options.json:
        text = json.dumps(found.as_dict(), indent=1) + "\n"
        write_whole(options.json, lambda part: part.write_text(text, encoding="utf-8"))
    for by, gain in found.gain.items():
        print(f"{by}: visible in {found.visible(by)} of {options.sets} sets; mean gain of F1 {gain}")
    return 0
