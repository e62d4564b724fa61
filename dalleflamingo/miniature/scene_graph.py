"""Scenes, the claims of captions about them, and how far the two agree.

The content of every miniature image is known, so captions can be compared with facts instead of n-grams: this is the
miniature's SPICE (Anderson et al. 2016), without parsing errors. A `Scene` is the content of an image, a `CaptionGraph`
holds the claims of a caption; `f1` and `wrong_facts` compare them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dalleflamingo.miniature import wording

COCO_KINDS = tuple("cat bird fish house tree boat car umbrella cup hat flower apple star chair".split())
NEW_KINDS = ("kite", "balloon", "mushroom", "rocket", "snail", "butterfly", "crown", "bell", "key", "heart")
KINDS = COCO_KINDS + NEW_KINDS
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "large")
GROUNDS = ("grass", "sand", "snow", "water", "night")
RELATIONS = ("left", "right", "above", "below")

_NEAREST_OFFSET = 6.0  # pixels: things closer than this along an axis have no order on it
_PHRASES = {  # sort of claim -> value -> the phrases that make it
    "kind": wording.NAMES,
    "colour": {colour: (colour,) for colour in COLOURS},
    "size": wording.SIZE_WORDS,
    "ground": wording.GROUND_PHRASES,
    "relation": wording.RELATION_PHRASES,
    "relation to it": wording.RELATION_TO_IT_PHRASES,
    "side": wording.SIDE_PHRASES,
}
_MEANINGS = {  # words -> (sort, value)
    tuple(phrase.split()): (sort, value)
    for sort, phrases_of in _PHRASES.items()
    for value, phrases in phrases_of.items()
    for phrase in phrases
}
_LONGEST_PHRASE = max(map(len, _MEANINGS))


@dataclass(frozen=True)
class Thing:
    """One thing; (x, y) is its centre in pixels, y downwards. None: a caption does not name it."""

    kind: str
    colour: str | None = None
    size: str | None = None
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Scene:
    """The content of an image: its ground and 0–3 things of different kinds."""

    ground: str
    things: tuple[Thing, ...]

    def as_dict(self) -> dict:
        return {"ground": self.ground, "things": [vars(thing) for thing in self.things]}

    @classmethod
    def from_dict(cls, record: dict) -> "Scene":
        return cls(record["ground"], tuple(Thing(**thing) for thing in record["things"]))


@dataclass
class CaptionGraph:
    """The claims of a caption: things, relations as (subject index, relation, object index), ground."""

    things: list[Thing] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    ground: str | None = None


def holds(relation: str, subject: Thing, other: Thing) -> bool:
    """Whether `subject` is `relation` of `other`: two relations hold on a diagonal, one straight beside or above.

    "beside" holds to the left and to the right.
    """
    if relation == "beside":
        return holds("left", subject, other) or holds("right", subject, other)
    dx, dy = other.x - subject.x, other.y - subject.y
    along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left", "right") else dx
    return along >= _NEAREST_OFFSET and along >= abs(across) / 2


def main_relation(subject: Thing, other: Thing) -> str:
    """The relation along the longer axis, which a person would name."""
    dx, dy = other.x - subject.x, other.y - subject.y
    if abs(dx) >= abs(dy):
        return "left" if dx > 0 else "right"
    return "above" if dy > 0 else "below"


def parse(caption: str) -> CaptionGraph:
    """The claims of a caption as the world's annotators write it; words that claim nothing are skipped.

    "a small red cat to the left of a car on the grass" → cat (small, red), car; (cat, left, car); grass.
    "a car with a cat to its left" → (cat, left, car). "a cat on the left and a car on the right" → (cat, left, car).
    A kind that is named again is the same thing ("a kite above the cat").
    """
    graph, index_of, sides = CaptionGraph(), {}, {}
    latest = previous = colour = size = relation = None
    for sort, value in _phrases(re.findall(r"[a-z]+", caption.lower())):
        if sort == "colour":
            colour = value
        elif sort == "size":
            size = value
        elif sort == "ground":
            graph.ground = value
        elif sort == "kind":
            index = index_of.setdefault(value, len(graph.things))
            if index == len(graph.things):
                graph.things.append(Thing(value, colour, size))
            if relation is not None and relation[0] != index:
                graph.relations.append((*relation, index))
            if index != latest:
                latest, previous = index, latest
            colour = size = relation = None
        elif latest is None:
            continue  # a relation of nothing
        elif sort == "relation":
            relation = (latest, value)
        elif sort == "relation to it" and previous is not None:
            graph.relations.append((latest, value, previous))
        elif sort == "side":
            sides[latest] = value
    opposite = {"left": "right", "above": "below"}
    graph.relations += [
        (i, side, j) for i, side in sides.items() for j, other in sides.items() if opposite.get(side) == other
    ]
    return graph


def _phrases(words: list[str]) -> Iterator[tuple[str, str]]:
    """(sort, value) of each phrase that claims something, the longest phrase first where several begin."""
    start = 0
    while start < len(words):
        for length in range(_LONGEST_PHRASE, 0, -1):
            if meaning := _MEANINGS.get(tuple(words[start : start + length])):
                yield meaning
                break
        start += length


def wrong_facts(caption: str | CaptionGraph, scene: Scene) -> dict[str, int]:
    """Number of claims that the scene contradicts: {"kind", "colour", "size", "relation", "ground"} -> count."""
    graph = parse(caption) if isinstance(caption, str) else caption
    truth = {thing.kind: thing for thing in scene.things}
    wrong = dict.fromkeys(("kind", "colour", "size", "relation", "ground"), 0)
    for thing in graph.things:
        if thing.kind not in truth:
            wrong["kind"] += 1
            continue
        wrong["colour"] += thing.colour not in (None, truth[thing.kind].colour)
        wrong["size"] += thing.size not in (None, truth[thing.kind].size)
    wrong["relation"] = sum(not _relation_holds(graph, claim, truth) for claim in graph.relations)
    wrong["ground"] = int(graph.ground not in (None, scene.ground))
    return wrong


def is_right(caption: str | CaptionGraph, scene: Scene) -> bool:
    """Whether the caption names at least one thing and no wrong kind, colour or relation (the gates' criterion)."""
    graph = parse(caption) if isinstance(caption, str) else caption
    wrong = wrong_facts(graph, scene)
    return bool(graph.things) and not (wrong["kind"] or wrong["colour"] or wrong["relation"])


def recall_of_things(caption: str, scene: Scene) -> float:
    """Share of the scene's things whose kind the caption names, in [0, 1]."""
    named = {thing.kind for thing in parse(caption).things}
    return sum(thing.kind in named for thing in scene.things) / len(scene.things)


def told_facts(caption: str | CaptionGraph, scene: Scene) -> dict[str, tuple[int, int]]:
    """{"kind", "colour", "size", "relation", "ground"} -> how many facts of that sort the caption tells, and how many
    the scene has.

    A pair of things is one relation, told by whichever true one is named.
    """
    graph = parse(caption) if isinstance(caption, str) else caption
    truth = {thing.kind: thing for thing in scene.things}
    right = [thing for thing in graph.things if thing.kind in truth]
    pairs = {
        frozenset((graph.things[i].kind, graph.things[j].kind))
        for i, relation, j in graph.relations
        if _relation_holds(graph, (i, relation, j), truth)
    }
    n = len(scene.things)
    return {
        "kind": (len(right), n),
        "colour": (sum(thing.colour == truth[thing.kind].colour for thing in right), n),
        "size": (sum(thing.size == truth[thing.kind].size for thing in right), n),
        "relation": (len(pairs), n * (n - 1) // 2),
        "ground": (int(graph.ground == scene.ground), 1),
    }


def precision_recall_f1(caption: str | CaptionGraph, scene: Scene) -> tuple[float, float, float]:
    """Precision, recall and F1 of the claims, as of the tuples of SPICE.

    Claims are (kind), (kind, colour), (kind, size), (kind, relation, kind) and (ground). Recall counts as `told_facts`.
    """
    graph = parse(caption) if isinstance(caption, str) else caption
    told, facts = map(sum, zip(*told_facts(graph, scene).values(), strict=True))
    claimed = len(graph.things) + len(graph.relations) + (graph.ground is not None)
    claimed += sum((thing.colour is not None) + (thing.size is not None) for thing in graph.things)
    precision, recall = told / max(claimed, 1), told / facts
    return precision, recall, 2 * precision * recall / (precision + recall) if told else 0.0


def f1(caption: str | CaptionGraph, scene: Scene) -> float:
    """Scene-graph F1 of a caption against the known scene, in [0, 1]."""
    return precision_recall_f1(caption, scene)[2]


def scene_graph_f1(captions: Sequence[str], scenes: Sequence[Scene]) -> np.ndarray:
    """Scene-graph F1 of each caption against its own scene, the miniature's SPICE: (N,) in [0, 1]."""
    return np.array([f1(caption, scene) for caption, scene in zip(captions, scenes, strict=True)])


def _relation_holds(graph: CaptionGraph, claim: tuple[int, str, int], truth: dict[str, Thing]) -> bool:
    subject, other = graph.things[claim[0]].kind, graph.things[claim[2]].kind
    return subject in truth and other in truth and holds(claim[1], truth[subject], truth[other])
