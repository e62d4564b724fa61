"""Captions of scenes: twelve annotators with habits, planted errors, and the noisy alt-text of the web.

People leave things out, and each in another way. An annotator always names the largest thing, and the others, their
colours, sizes and relation, the ground and what things do, with probabilities of their own, in their own words and
sentence forms. What they write is true. Alt-text names all things, as in a shop's catalogue, and is noisy, as text
scraped from web pages is: one caption in five has a wrong kind, colour or relation, and one in four has lost a word or
gained some.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dalleflamingo.miniature import wording
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS, CaptionGraph, Scene, Thing, main_relation
from dalleflamingo.miniature.world import IMAGE_SIZE, rotate_layout

FACTS = ("kind", "colour", "relation", "ground")  # that can be wrong
WRONG_SHARE = 0.2  # of alt-texts contradict their image
_LOYALTY = 0.7  # probability that an annotator uses the preferred word
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
    """How one person writes captions. All numbers but `wording` are probabilities.

    Attributes:
        mention: that a thing other than the largest is named.
        colour, size, action: that a named thing's colour, its size, what it does is named.
        relation: that the relation of two named things is named.
        vague: that "left" and "right" are named "beside".
        ground: that the ground is named.
        wording: preferred word among several: number `wording`, counted in a circle.
        forms: sentence forms, drawn evenly: "plain" ("a cat above a car"), "is" ("a cat is above a car"), "it" ("a car
            with a cat above it"), "sides" ("a cat at the top and a car at the bottom"), "ground first" ("in the snow
            there is a cat above a car").
        opening: first words of plain sentences and of those with "it" or sides.
    """

    mention: float
    colour: float
    size: float
    relation: float
    ground: float
    action: float = 0.0
    vague: float = 0.0
    wording: int = 0
    forms: tuple[str, ...] = ("plain",)
    opening: str = ""


ANNOTATORS = (
    Annotator(0.95, 0.90, 0.10, 0.8, 0.60, 0.1, 0.1, 0, ("plain",)),
    Annotator(0.70, 0.80, 0.30, 0.6, 0.80, 0.3, 0.2, 1, ("plain", "ground first"), "there is"),
    Annotator(0.50, 0.60, 0.05, 0.3, 0.90, 0.6, 0.5, 0, ("is",)),
    Annotator(0.85, 0.95, 0.50, 0.7, 0.40, 0.0, 0.1, 2, ("plain", "it"), "a picture of"),
    Annotator(0.60, 0.50, 0.00, 0.5, 0.70, 0.4, 0.6, 1, ("plain", "is")),
    Annotator(0.90, 0.70, 0.20, 0.9, 0.30, 0.1, 0.0, 0, ("sides", "plain"), "an image of"),
    Annotator(0.45, 0.90, 0.60, 0.2, 0.70, 0.2, 0.3, 1, ("plain",), "a drawing of"),
    Annotator(0.80, 0.40, 0.10, 0.6, 0.95, 0.3, 0.4, 3, ("ground first",)),
    Annotator(0.75, 0.85, 0.10, 0.8, 0.20, 0.0, 0.2, 2, ("it", "plain")),
    Annotator(0.55, 0.75, 0.30, 0.4, 0.60, 0.5, 0.3, 0, ("is", "plain"), "we can see"),
    Annotator(0.95, 0.60, 0.00, 0.5, 0.50, 0.0, 0.5, 1, ("plain",), "this is"),
    Annotator(0.65, 0.80, 0.40, 0.7, 0.85, 0.2, 0.1, 2, ("plain", "sides", "is"), "here is"),
)
_MINIMAL = Annotator(1.0, 1.0, 0.0, 1.0, 0.0)


def write_caption(scene: Scene, annotator: Annotator, rng: np.random.Generator) -> str:
    """One true caption of 5 to 30 words."""
    return describe(scene, annotator, rng)[0]


def annotate(scene: Scene, n: int, rng: np.random.Generator) -> list[str]:
    """`n` true captions by different annotators: five as in COCO, ten as in NoCaps.

    Raises:
        ValueError: there are fewer than `n` annotators.
    """
    if n > len(ANNOTATORS):
        raise ValueError(f"{n} captions of one scene: the world has {len(ANNOTATORS)} annotators")
    writers = rng.permutation(len(ANNOTATORS))[:n]
    return [write_caption(scene, ANNOTATORS[i], rng) for i in writers]


def minimal_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The shortest true caption with all kinds, colours and a relation; of a single thing, its place in the image."""
    writer = replace(_MINIMAL, wording=int(rng.integers(12)))
    if len(scene.things) > 1:
        return describe(scene, writer, rng, fewest_words=0)[0]
    [thing] = scene.things
    middle = replace(thing, x=IMAGE_SIZE / 2, y=IMAGE_SIZE / 2)
    is_central = max(abs(thing.x - middle.x), abs(thing.y - middle.y)) <= 5
    sentence = _Sentence(writer, rng)
    sentence.write_things([thing], "plain", is_related=False)
    side = "in the middle" if is_central else sentence.choose(wording.SIDE_PHRASES[main_relation(thing, middle)])
    return f"{sentence.text()} {side}"


def annotate_rotations(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Captions of the scene in its four rotations, which differ only in the positions that they name.

    Half of the calls return minimal captions. Scenes of one thing always do: only a minimal caption names its position.
    """
    seed, rotations = rng.integers(2**32), [rotate_layout(scene, quarter_turns) for quarter_turns in range(4)]
    if len(scene.things) == 1 or rng.random() < 0.5:
        return [minimal_caption(rotation, np.random.default_rng(seed)) for rotation in rotations]
    annotator = precise(ANNOTATORS[rng.integers(len(ANNOTATORS))])
    return [write_caption(rotation, annotator, np.random.default_rng(seed)) for rotation in rotations]


def precise(annotator: Annotator) -> Annotator:
    """The annotator in the same words, but leaving out nothing and with exact relations."""
    return replace(annotator, mention=1.0, colour=1.0, relation=1.0, ground=1.0, vague=0.0)


def plant_error(scene: Scene, fact: str, rng: np.random.Generator) -> Scene:
    """The scene with one wrong fact: what a caption with a planted error describes.

    Args:
        scene: the truth.
        fact: "kind" or "colour" of one thing, "relation" (the layout is rotated, see `rotate_layout`) or "ground".
        rng: source of all choices.
    Raises:
        ValueError: a relation of a single thing, or an unknown fact.
    """
    if fact == "ground":
        return replace(scene, ground=str(rng.choice([ground for ground in GROUNDS if ground != scene.ground])))
    if fact == "relation" and len(scene.things) > 1:
        return rotate_layout(scene, int(rng.choice([1, 2, 2, 3])))  # the opposite relation half of the time
    if fact not in ("kind", "colour"):
        raise ValueError(f"{fact!r} in a scene of {len(scene.things)} things: plant one of {', '.join(FACTS)}")
    things, i = list(scene.things), rng.integers(len(scene.things))
    taken = {thing.kind for thing in things} if fact == "kind" else {things[i].colour}
    values = [value for value in (KINDS if fact == "kind" else COLOURS) if value not in taken]
    things[i] = replace(things[i], **{fact: str(rng.choice(values))})
    return replace(scene, things=tuple(things))


def exchange_colours(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with the colours of its first two things exchanged; another colour where that would change nothing."""
    if len(scene.things) == 1 or scene.things[0].colour == scene.things[1].colour:
        return plant_error(scene, "colour", rng)
    first, second, *others = scene.things
    exchanged = replace(first, colour=second.colour), replace(second, colour=first.colour)
    return replace(scene, things=(*exchanged, *others))


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """Noisy alt-text: one in five is wrong in one fact, one in four has lost a word or gained some."""
    writer = replace(ANNOTATORS[rng.integers(len(ANNOTATORS))], mention=1.0, wording=int(rng.integers(12)))
    if rng.random() < WRONG_SHARE:
        fact = FACTS[rng.integers(3 if len(scene.things) > 1 else 2)]
        scene = plant_error(scene, fact, rng)
        said = {"colour": dict(colour=1.0), "relation": dict(relation=1.0, vague=0.0)}
        writer = replace(writer, **said.get(fact, {}))  # kinds are always said
    caption = write_caption(scene, writer, rng)
    noise = rng.random()
    if noise < 0.12:
        words = caption.split()
        del words[rng.integers(len(words))]
        return " ".join(words)
    if noise < 0.24:
        return f"{_WEB_PREFIXES[rng.integers(len(_WEB_PREFIXES))]} {caption}"
    return caption


def describe(
    scene: Scene, annotator: Annotator, rng: np.random.Generator, fewest_words: int = 5
) -> tuple[str, CaptionGraph]:
    """A caption and what its writer means by it.

    Args:
        scene: with at least one thing.
        annotator: who writes.
        rng: source of all choices, whose number does not depend on the things' positions.
        fewest_words: a shorter caption gets the ground or an opening.
    Returns:
        the caption; its claims, which `scene_graph.parse` reads from it again.
    """
    things = _mentioned(scene, annotator, rng)
    form = annotator.forms[rng.integers(len(annotator.forms))]
    is_related, has_ground = rng.random(2) < (annotator.relation, annotator.ground)
    is_related = is_related and len(things) > 1
    if form == "is" and len(things) > 1 and not is_related:
        form = "plain"  # "a cat is and a car" is no sentence
    if form in ("it", "sides") and (len(things) != 2 or not is_related):
        form = "plain"
    sentence = _Sentence(annotator, rng)
    sentence.write_things(things, form, is_related)
    body = sentence.text()
    ground = sentence.choose(wording.GROUND_PHRASES[scene.ground])
    has_ground = has_ground or form == "ground first" or (form == "is" and not is_related)
    opening = annotator.opening if form not in ("is", "ground first") else ""
    if not has_ground and len(f"{opening} {body}".split()) < fewest_words:
        has_ground = True
    if has_ground:
        sentence.graph.ground = scene.ground
        body = f"{ground} there is {body}" if form == "ground first" else f"{body} {ground}"
    if len(f"{opening} {body}".split()) < fewest_words:
        opening = opening or "there is"
    return f"{opening} {body}".strip(), sentence.graph


class _Sentence:
    """The part of a caption that is about things, as it is written, with its claims.

    Args:
        annotator: who writes.
        rng: source of all choices.
    """

    def __init__(self, annotator: Annotator, rng: np.random.Generator):
        self.annotator, self.rng = annotator, rng
        self.parts: list[str] = []
        self.graph = CaptionGraph()

    def text(self) -> str:
        return " ".join(part for part in self.parts if part).replace(" ,", ",")

    def choose(self, options: Sequence[str]) -> str:
        """One of several words for the same, mostly the annotator's own."""
        is_own, other = self.rng.random(2)
        index = self.annotator.wording % len(options) if is_own < _LOYALTY else int(other * len(options))
        return options[index]

    def write_things(self, things: Sequence[Thing], form: str, is_related: bool) -> None:
        """One to three things in one of the forms of `Annotator`."""
        first, *others = things
        self._name(first)
        self.parts.append("is" if form == "is" else "")
        self._action(first)
        if not others:
            return
        if form == "sides":
            self._sides(first, others[0])
        elif form == "it":
            self.parts.append("with")
            self._name(others[0])
            self._relation(others[0], first, wording.RELATION_TO_IT_PHRASES)
        elif is_related:
            self._relation(first, others[0], wording.RELATION_PHRASES)
            self._name(others[0])
        else:
            self.parts.append("and" if len(others) == 1 else ",")
            self._name(others[0])
        if len(others) == 2:
            self.parts.append("with" if is_related else "and")
            self._name(others[1])
            if is_related and self.rng.random() < self.annotator.relation:
                anchor = things[self.rng.integers(2)]
                self._relation(others[1], anchor, wording.RELATION_PHRASES)
                self.parts += ["the", self.choose(wording.NAMES[anchor.kind])]

    def _name(self, thing: Thing) -> None:
        """A noun phrase: "a small red cat", "an orange cup"."""
        has_size, has_colour = self.rng.random(2) < (self.annotator.size, self.annotator.colour)
        size, noun = self.choose(wording.SIZE_WORDS[thing.size]), self.choose(wording.NAMES[thing.kind])
        words = [word for word, is_said in ((size, has_size), (thing.colour, has_colour), (noun, True)) if is_said]
        self.parts.append(f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}")
        claimed = Thing(thing.kind, thing.colour if has_colour else None, thing.size if has_size else None)
        self.graph.things.append(claimed)

    def _action(self, thing: Thing) -> None:
        """What it does; a claim that drawings neither confirm nor refute."""
        actions = wording.ACTIONS.get(thing.kind, ("",))
        index, is_named = self.rng.integers(len(actions)), self.rng.random() < self.annotator.action
        self.parts.append(actions[index] if is_named else "")

    def _relation(self, subject: Thing, other: Thing, phrases: dict[str, tuple[str, ...]]) -> None:
        relation = main_relation(subject, other)
        if self.rng.random() < self.annotator.vague and relation in ("left", "right"):
            relation = "beside"
        self.parts.append(self.choose(phrases[relation]))
        index = {thing.kind: i for i, thing in enumerate(self.graph.things)}
        # the object may not be written yet: it comes next
        self.graph.relations.append((index[subject.kind], relation, index.get(other.kind, len(index))))

    def _sides(self, first: Thing, second: Thing) -> None:
        """ "a cat on the left and a car on the right"."""
        relation = main_relation(first, second)
        opposite = main_relation(second, first)
        phrase = int(self.rng.integers(2))
        self.parts += [wording.SIDE_PHRASES[relation][phrase], "and"]
        self._name(second)
        self.parts.append(wording.SIDE_PHRASES[opposite][phrase])
        self.graph.relations.append((0, relation, 1) if relation in ("left", "above") else (1, opposite, 0))


def _mentioned(scene: Scene, annotator: Annotator, rng: np.random.Generator) -> list[Thing]:
    """The largest thing and each other with the annotator's probability; mostly the largest first."""
    order = [scene.things[i] for i in rng.permutation(len(scene.things))]
    order.sort(key=lambda thing: thing.size != "large")  # stable: chance decides among equals
    first, *others = order
    named = [first] + [thing for thing in others if rng.random() < annotator.mention]
    return named[::-1] if rng.random() < 0.3 else named
