"""How far the things found in a picture are the things that should be there.

A test picture has its truth in pixels: found and true things are the same where they stand (`score_in_place`). A
picture drawn from a caption may put things where it likes: they are the same if kind and colour agree (`score_prompt`).
Both give plain counts, so that counts of many pictures add up to shares: right / things, relations_right / relations, …
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from math import dist

from dalleflamingo.miniature.scene_graph import CaptionGraph, Scene, Thing, holds, main_relation

REACH = 8.0  # pixels: a found thing further off is not the true one


@dataclass(frozen=True)
class ImageScore:
    """Counts over one picture or, added up by `total`, many.

    things wanted; found, all that the recogniser named; matched, wanted things with a found partner; of these
    kind_right, colour_right, size_right and right (kind *and* colour). relations: wanted ones whose two things are both
    right; relations_right: those that hold in the picture. grounds wanted (0 if the caption names none), grounds_right.
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
    """The counts of many pictures added up; of none, all zero."""
    return ImageScore(*map(sum, zip(*map(astuple, scores), strict=True)))


def score_in_place(found: Scene, truth: Scene) -> ImageScore:
    """Found things against the true ones at their places (see `match_places`), for pictures whose scene is known."""
    return _score(found, truth, match_places(found.things, truth.things))


def score_prompt(found: Scene, wanted: Scene | CaptionGraph) -> ImageScore:
    """Found things against those that a caption asks for, wherever they stand (see `match_names`)."""
    return _score(found, wanted, match_names(found.things, wanted.things))


def match_places(found: Sequence[Thing], truth: Sequence[Thing], reach: float = REACH) -> list[int | None]:
    """For each true thing the index of the found one nearest to it, each used once, closest pairs first.

    Pairs further apart than `reach` pixels are none.
    """
    pairs = sorted((dist((f.x, f.y), (t.x, t.y)), j, i) for i, f in enumerate(found) for j, t in enumerate(truth))
    return _take([(i, j) for distance, j, i in pairs if distance <= reach], len(truth))


def match_names(found: Sequence[Thing], wanted: Sequence[Thing]) -> list[int | None]:
    """For each wanted thing the index of a found one of its kind, of its colour too where one is left; each used once.

    Pairs right in kind and colour are taken first; no other choice makes more of them. What a caption leaves unsaid (a
    colour of None) any found thing fulfils, but pairs that agree in a colour that was said come before.
    """
    pairs = [(i, j) for j, w in enumerate(wanted) for i, f in enumerate(found) if f.kind == w.kind]

    def rank(pair: tuple[int, int]) -> tuple[bool, bool]:
        have, want = found[pair[0]].colour, wanted[pair[1]].colour
        return not _agrees(have, want), want is None

    return _take(sorted(pairs, key=rank), len(wanted))


def _take(pairs: list[tuple[int, int]], count: int) -> list[int | None]:
    """Pairs (found, wanted) in order, passing over those whose thing on either side is taken."""
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
    """The relations claimed by a caption; of a scene, the main one of each pair."""
    if isinstance(wanted, CaptionGraph):
        return wanted.relations
    things = wanted.things
    return [(a, main_relation(things[a], things[b]), b) for a in range(len(things)) for b in range(a + 1, len(things))]
