"""How many of the things found in an image are those that it should show.

`score_in_place` is for images of a known scene: it matches found and true things by position. `score_prompt` is for
images generated from a caption, where positions are free: it matches things by kind and colour. Both count, so that
the counts of many images add up to shares: right / things, relations_right / relations and so on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from math import dist

from dalleflamingo.miniature.scene_graph import CaptionGraph, Scene, Thing, holds, main_relation

REACH = 8.0  # pixels: a found thing further away than this is another thing


@dataclass(frozen=True)
class ImageScore:
    """Counts over one image or, added up by `total`, many.

    Attributes:
        things: expected things.
        found: all things that the recogniser found.
        matched: expected things that have a found partner.
        kind_right, colour_right, size_right: matched things whose partner has that attribute.
        right: matched things with the right kind and colour.
        relations: expected relations whose two things are both right.
        relations_right: those that hold in the image.
        grounds: 1 if a ground is expected; a caption may name none.
        grounds_right: 1 if it was found.
    """

    things: int = 0
    found: int = 0
    matched: int = 0
    kind_right: int = 0
    colour_right: int = 0
    size_right: int = 0
    right: int = 0
    relations: int = 0
    relations_right: int = 0
    grounds: int = 0
    grounds_right: int = 0


def total(scores: Iterable[ImageScore]) -> ImageScore:
    """The counts of many images added up; all zero for none."""
    return ImageScore(*map(sum, zip(*map(astuple, scores), strict=True)))


def score_in_place(found: Scene, truth: Scene) -> ImageScore:
    """Found things against those of the image's known scene, matched by position (`match_positions`)."""
    return _score(found, truth, match_positions(found.things, truth.things))


def score_prompt(found: Scene, wanted: Scene | CaptionGraph) -> ImageScore:
    """Found things against those that a caption names, matched by kind and colour (`match_names`)."""
    return _score(found, wanted, match_names(found.things, wanted.things))


def match_positions(found: Sequence[Thing], truth: Sequence[Thing], reach: float = REACH) -> list[int | None]:
    """For each true thing the index of its found partner, or None: closest pairs first, each thing used once.

    Args:
        found: things with positions.
        truth: likewise.
        reach: pixels; things further apart are no pair.
    """
    pairs = sorted((dist((f.x, f.y), (t.x, t.y)), j, i) for i, f in enumerate(found) for j, t in enumerate(truth))
    return _assign([(i, j) for distance, j, i in pairs if distance <= reach], len(truth))


def match_names(found: Sequence[Thing], wanted: Sequence[Thing]) -> list[int | None]:
    """For each wanted thing the index of its found partner of the same kind, or None; each thing used once.

    Pairs that agree in colour are taken first, which gives the greatest number of them. Any colour agrees with a wanted
    colour of None, but pairs that agree in a named colour come before.
    """
    pairs = [(i, j) for j, w in enumerate(wanted) for i, f in enumerate(found) if f.kind == w.kind]

    def rank(pair: tuple[int, int]) -> tuple[bool, bool]:
        have, want = found[pair[0]].colour, wanted[pair[1]].colour
        return not _agrees(have, want), want is None

    return _assign(sorted(pairs, key=rank), len(wanted))


def _assign(pairs: list[tuple[int, int]], count: int) -> list[int | None]:
    """Takes pairs (found, wanted) in order, unless one of the two has a partner already."""
    partner: list[int | None] = [None] * count
    for i, j in pairs:
        if partner[j] is None and i not in partner:
            partner[j] = i
    return partner


def _agrees(found: str | None, wanted: str | None) -> bool:
    return wanted is None or found == wanted


def _score(found: Scene, wanted: Scene | CaptionGraph, partner: list[int | None]) -> ImageScore:
    pairs = {j: (found.things[i], wanted.things[j]) for j, i in enumerate(partner) if i is not None}
    kind = {j for j, (f, w) in pairs.items() if f.kind == w.kind}
    colour = {j for j, (f, w) in pairs.items() if _agrees(f.colour, w.colour)}
    right = kind & colour
    decidable = [(a, name, b) for a, name, b in _relations(wanted) if a in right and b in right]
    return ImageScore(
        things=len(wanted.things),
        found=len(found.things),
        matched=len(pairs),
        kind_right=len(kind),
        colour_right=len(colour),
        size_right=sum(_agrees(f.size, w.size) for f, w in pairs.values()),
        right=len(right),
        relations=len(decidable),
        relations_right=sum(holds(name, pairs[a][0], pairs[b][0]) for a, name, b in decidable),
        grounds=int(wanted.ground is not None),
        grounds_right=int(wanted.ground is not None and found.ground == wanted.ground),
    )


def _relations(wanted: Scene | CaptionGraph) -> list[tuple[int, str, int]]:
    """The relations that a caption names; of a scene, the main one of each pair."""
    if isinstance(wanted, CaptionGraph):
        return wanted.relations
    things = wanted.things
    return [(a, main_relation(things[a], things[b]), b) for a in range(len(things)) for b in range(a + 1, len(things))]
