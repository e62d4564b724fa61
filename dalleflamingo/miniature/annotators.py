"""Captions of scenes: five annotators who differ in wording and detail, and the noisy alt-text of the web.

Annotators write true captions. Alt-text is noisy, as text scraped from web pages is: one caption in five has a wrong
kind, colour or relation, and one in four has lost a word or gained some.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, RELATIONS, Scene, Thing, main_relation
from dalleflamingo.miniature.world import IMAGE_SIZE, rotate_layout

WRONG_SHARE = 0.2  # of alt-texts contradict their image

_GROUND_PHRASES = {
    "grass": ("on the grass", "on the lawn"),
    "sand": ("on the sand", "on the beach"),
    "snow": ("in the snow", "in the snow"),
    "water": ("on the water", "in the sea"),
    "night": ("at night", "in the dark"),
}
_RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_POSITION_PHRASES = {"left": "to the left", "right": "to the right", "above": "above", "below": "below"}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_SYNONYMS = {"cat": "kitten", "boat": "ship", "cup": "mug", "chair": "stool"}
_WEB_PREFIXES = (
    "photo",
    "picture",
    "image",
    "free stock photo",
    "buy now",
    "best price",
    "wallpaper",
    "click to see",
    "new",
)


@dataclass(frozen=True)
class Annotator:
    """How one person writes captions.

    Attributes:
        size, ground, relation: probability that a caption names a thing's size, the ground, two things' relation.
        wording: 0 or 1, which of two phrases is used for the same thing.
        opening: first words of every caption.
    """

    size: float
    ground: float
    relation: float
    wording: int
    opening: str = ""


ANNOTATORS = (
    Annotator(size=0.2, ground=0.9, relation=0.9, wording=0),
    Annotator(size=0.6, ground=0.9, relation=0.9, wording=0, opening="there is"),
    Annotator(size=0.4, ground=0.7, relation=1.0, wording=0, opening="a picture of"),
    Annotator(size=0.9, ground=1.0, relation=0.7, wording=0),
    Annotator(size=0.3, ground=0.8, relation=0.8, wording=1),
)
_MINIMAL = Annotator(size=0.0, ground=0.0, relation=1.0, wording=0)


def write_caption(scene: Scene, annotator: Annotator, rng: np.random.Generator) -> str:
    """One true caption of at least five words."""
    return _sentence(scene, annotator, rng, main_relation)


def annotate(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """`n` true captions, by the annotators in turn: five as in COCO, ten as in NoCaps."""
    return [write_caption(scene, ANNOTATORS[i % len(ANNOTATORS)], rng) for i in range(n)]


def annotate_rotations(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Captions of the scene in its four rotations, which differ only in the positions that they name.

    Half of the calls return minimal captions. Scenes of one thing always do: only a minimal caption names its position.
    """
    seed, rotations = rng.integers(2**32), [rotate_layout(scene, quarter_turns) for quarter_turns in range(4)]
    if len(scene.things) == 1 or rng.random() < 0.5:
        return [minimal_caption(rotation, np.random.default_rng(seed)) for rotation in rotations]
    annotator = replace(ANNOTATORS[rng.integers(len(ANNOTATORS))], relation=1.0)
    return [write_caption(rotation, annotator, np.random.default_rng(seed)) for rotation in rotations]


def minimal_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The shortest true caption with colours, kinds and the relation; of a single thing, its position in the image."""
    if len(scene.things) > 1:
        return _sentence(scene, _MINIMAL, rng, main_relation)
    [thing] = scene.things
    middle = replace(thing, x=IMAGE_SIZE / 2, y=IMAGE_SIZE / 2)
    is_central = max(abs(thing.x - middle.x), abs(thing.y - middle.y)) <= 5
    position = "in the middle" if is_central else _POSITION_PHRASES[main_relation(thing, middle)]
    return f"{_name(thing, _MINIMAL, rng)} {position}"


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """Noisy alt-text: one in five is wrong in one fact, one in four has lost a word or gained some."""
    relation = main_relation
    if rng.random() < WRONG_SHARE:
        fault = rng.integers(3 if len(scene.things) > 1 else 2)
        if fault == 2:
            relation = _wrong_relation(rng)
        else:
            scene = _with_wrong_thing(scene, rng, ("kind", "colour")[fault])
    caption = _sentence(scene, ANNOTATORS[rng.integers(len(ANNOTATORS))], rng, relation)
    noise = rng.random()
    if noise < 0.12:
        words = caption.split()
        del words[rng.integers(len(words))]
        return " ".join(words)
    if noise < 0.24:
        return f"{_WEB_PREFIXES[rng.integers(len(_WEB_PREFIXES))]} {caption}"
    return caption


def _sentence(
    scene: Scene, annotator: Annotator, rng: np.random.Generator, relation: Callable[[Thing, Thing], str]
) -> str:
    """One caption of all things, in random order; `relation` gives the relation that is named between two of them."""
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    names = [_name(thing, annotator, rng) for thing in order]
    parts = [annotator.opening, names[0]]
    if len(order) > 1:
        related = len(order) == 2 and rng.random() < annotator.relation
        # of three things two are related, the third is added: "a cat left of a car with a kite above the cat"
        related = related or (len(order) == 3 and rng.random() < annotator.relation)
        if related:
            parts += [_RELATION_PHRASES[relation(order[0], order[1])][annotator.wording], names[1]]
        else:
            parts += ["," if len(order) == 3 else "and", names[1]]
        if len(order) == 3:
            parts += ["with" if related else "and", names[2]]
            if related and rng.random() < annotator.relation:
                anchor = order[rng.integers(2)]
                parts += [
                    _RELATION_PHRASES[relation(order[2], anchor)][annotator.wording],
                    "the",
                    _noun(anchor, annotator),
                ]
    if rng.random() < annotator.ground or len(" ".join(parts).split()) < 5:
        parts.append(_GROUND_PHRASES[scene.ground][annotator.wording])
    return " ".join(part for part in parts if part).replace(" ,", ",")


def _name(thing: Thing, annotator: Annotator, rng: np.random.Generator) -> str:
    """A noun phrase: "a small red cat", "an orange cup"."""
    words = [_SIZE_WORDS[thing.size][annotator.wording]] if rng.random() < annotator.size else []
    words += [thing.colour, _noun(thing, annotator)]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _noun(thing: Thing, annotator: Annotator) -> str:
    return _SYNONYMS.get(thing.kind, thing.kind) if annotator.wording else thing.kind


def _with_wrong_thing(scene: Scene, rng: np.random.Generator, attribute: str) -> Scene:
    """The scene with the "kind" or "colour" of one thing replaced by one that is not there."""
    i = rng.integers(len(scene.things))
    values = KINDS if attribute == "kind" else COLOURS
    taken = {getattr(thing, attribute) for thing in scene.things} if attribute == "kind" else {scene.things[i].colour}
    wrong = str(rng.choice([value for value in values if value not in taken]))
    things = list(scene.things)
    things[i] = replace(things[i], **{attribute: wrong})
    return Scene(scene.ground, tuple(things))


def _wrong_relation(rng: np.random.Generator) -> Callable[[Thing, Thing], str]:
    """Half of the time the opposite relation, else one along the other axis."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    is_opposite = rng.random() < 0.5

    def relation(subject: Thing, other: Thing) -> str:
        true = main_relation(subject, other)
        return opposite[true] if is_opposite else RELATIONS[(RELATIONS.index(true) + 2) % 4]

    return relation
