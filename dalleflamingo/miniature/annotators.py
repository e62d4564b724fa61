"""English for scenes: five annotators who differ in wording and detail, and the noisy alt-text of the web.

Every sentence is true of its picture unless it is alt-text: `alt_text` writes a wrong kind, colour or relation into one
caption in five, and lets words go missing or stray words in, as text scraped from web pages does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, RELATIONS, Scene, Thing, main_relation
from dalleflamingo.miniature.world import IMAGE_SIZE, turned

WRONG_SHARE = 0.2  # of alt-texts that contradict their picture

_PLACES = {
    "grass": ("on the grass", "on the lawn"),
    "sand": ("on the sand", "on the beach"),
    "snow": ("in the snow", "in the snow"),
    "water": ("on the water", "in the sea"),
    "night": ("at night", "in the dark"),
}
_RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_WHEREABOUTS = {"left": "to the left", "right": "to the right", "above": "above", "below": "below"}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_SECOND_NAMES = {"cat": "kitten", "boat": "ship", "cup": "mug", "chair": "stool"}
_FIRST_WORDS = (
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
    """How one person captions: how often each detail is told, which of two wordings is used, how a sentence opens."""

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
_PLAIN = Annotator(size=0.0, ground=0.0, relation=1.0, wording=0)


def describe(scene: Scene, annotator: Annotator, rng: np.random.Generator) -> str:
    """One true caption of 5 words or more."""
    return _sentence(scene, annotator, rng, main_relation)


def annotate(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """`n` captions by the annotators in turn: 5 as in COCO, 10 as in NoCaps."""
    return [describe(scene, ANNOTATORS[i % len(ANNOTATORS)], rng) for i in range(n)]


def annotate_rotations(scene: Scene, rng: np.random.Generator) -> list[str]:
    """A caption of the scene and of its three turns, which differ in nothing but where they say that things stand.

    Half of them are barest captions; of one thing all are, for nothing else says where it stands.
    """
    seed, scenes = rng.integers(2**32), [turned(scene, turn) for turn in range(4)]
    if len(scene.things) == 1 or rng.random() < 0.5:
        return [plain_text(one, np.random.default_rng(seed)) for one in scenes]
    annotator = replace(ANNOTATORS[rng.integers(len(ANNOTATORS))], relation=1.0)
    return [describe(one, annotator, np.random.default_rng(seed)) for one in scenes]


def plain_text(scene: Scene, rng: np.random.Generator) -> str:
    """The barest true caption: colours, kinds and where things stand; one thing alone stands somewhere, too."""
    if len(scene.things) > 1:
        return _sentence(scene, _PLAIN, rng, main_relation)
    [thing] = scene.things
    middle = replace(thing, x=IMAGE_SIZE / 2, y=IMAGE_SIZE / 2)
    off = max(abs(thing.x - middle.x), abs(thing.y - middle.y))
    return f"{_name(thing, _PLAIN, rng)} {_WHEREABOUTS[main_relation(thing, middle)] if off > 5 else 'in the middle'}"


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """What a web page says of a picture: one in five is wrong in a fact, one in four has lost or gained words."""
    relation = main_relation
    if rng.random() < WRONG_SHARE:
        fault = rng.integers(3 if len(scene.things) > 1 else 2)
        if fault == 2:
            relation = _any_but_true(rng)
        else:
            scene = _with_wrong_thing(scene, rng, ("kind", "colour")[fault])
    caption = _sentence(scene, ANNOTATORS[rng.integers(len(ANNOTATORS))], rng, relation)
    stray = rng.random()
    if stray < 0.12:
        words = caption.split()
        del words[rng.integers(len(words))]
        return " ".join(words)
    if stray < 0.24:
        return f"{_FIRST_WORDS[rng.integers(len(_FIRST_WORDS))]} {caption}"
    return caption


def _sentence(
    scene: Scene, annotator: Annotator, rng: np.random.Generator, relation: Callable[[Thing, Thing], str]
) -> str:
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    names = [_name(thing, annotator, rng) for thing in order]
    parts = [annotator.opening, names[0]]
    if len(order) > 1:
        related = len(order) == 2 and rng.random() < annotator.relation
        # two of three are told in order, the third joins them: "a cat left of a car with a kite above the cat"
        related = related or (len(order) == 3 and rng.random() < annotator.relation)
        if related:
            parts += [_RELATIONS[relation(order[0], order[1])][annotator.wording], names[1]]
        else:
            parts += ["," if len(order) == 3 else "and", names[1]]
        if len(order) == 3:
            parts += ["with" if related else "and", names[2]]
            if related and rng.random() < annotator.relation:
                anchor = order[rng.integers(2)]
                parts += [_RELATIONS[relation(order[2], anchor)][annotator.wording], "the", _noun(anchor, annotator)]
    if rng.random() < annotator.ground or len(" ".join(parts).split()) < 5:
        parts.append(_PLACES[scene.ground][annotator.wording])
    return " ".join(part for part in parts if part).replace(" ,", ",")


def _name(thing: Thing, annotator: Annotator, rng: np.random.Generator) -> str:
    """ "a small red cat", with the article that its first sound wants."""
    words = [_SIZES[thing.size][annotator.wording]] if rng.random() < annotator.size else []
    words += [thing.colour, _noun(thing, annotator)]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _noun(thing: Thing, annotator: Annotator) -> str:
    return _SECOND_NAMES.get(thing.kind, thing.kind) if annotator.wording else thing.kind


def _with_wrong_thing(scene: Scene, rng: np.random.Generator, attribute: str) -> Scene:
    i = rng.integers(len(scene.things))
    values = KINDS if attribute == "kind" else COLOURS
    taken = {getattr(thing, attribute) for thing in scene.things} if attribute == "kind" else {scene.things[i].colour}
    wrong = str(rng.choice([value for value in values if value not in taken]))
    things = list(scene.things)
    things[i] = replace(things[i], **{attribute: wrong})
    return Scene(scene.ground, tuple(things))


def _any_but_true(rng: np.random.Generator) -> Callable[[Thing, Thing], str]:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    turn = rng.random() < 0.5

    def relation(subject: Thing, other: Thing) -> str:
        true = main_relation(subject, other)
        return opposite[true] if turn else RELATIONS[(RELATIONS.index(true) + 2) % 4]

    return relation
