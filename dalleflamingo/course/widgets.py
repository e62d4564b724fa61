"""Widgets that send something through the models: for a notebook with a running kernel, in ipywidgets 7 and 8.

Each function returns a box of controls with the result below them. The result is an `HTML` widget, in which an image
can have words for readers who cannot see it. Its value is set here, because `ipywidgets.interactive` shows nothing of
what its function returns. A slider waits until it is released.
"""

from collections.abc import Callable, Sequence

import ipywidgets
from PIL import Image

from dalleflamingo.captioner import Captioner
from dalleflamingo.course.interactive import Candidate, Picture, render
from dalleflamingo.course.show import label
from dalleflamingo.decoding import Nucleus
from dalleflamingo.generator import Generator
from dalleflamingo.miniature import world
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS, SIZES, Scene, Thing, f1
from dalleflamingo.similarity import Similarity

NOTHING = "nothing"
CANDIDATES = 3  # captions of a scene: a round of them takes less than two seconds on two calm cores
_WIDE, _ROW = {"width": "100%", "max_width": "40rem"}, {"flex_flow": "row wrap"}  # layouts
_IN_A_COLUMN = {"continuous_update": False, "layout": _WIDE, "style": {"description_width": "8rem"}}
_IN_A_ROW = {"layout": {"width": "11rem"}, "style": {"description_width": "4rem"}}
_PLACES = {  # name -> the centre (x, y) of a thing of either size, in pixels
    f"{row} {column}".replace("middle middle", "middle"): (x, y)
    for row, y in (("top", 14), ("middle", 32), ("bottom", 50))
    for column, x in (("left", 14), ("middle", 32), ("right", 50))
}
_FIRST_SCENE = (  # kind, colour, size and place of each thing
    ("cat", "red", "large", "middle left"),
    ("boat", "blue", "large", "middle right"),
    (NOTHING, "blue", "small", "bottom right"),
)


def nucleus(captioner: Captioner, image: Image.Image) -> ipywidgets.VBox:
    """The size of the nucleus p, and the number of captions K that are sampled of an image.

    A move takes about 0.2 seconds in the miniature. Caption k has the seed k, whatever p and K are.

    Args:
        captioner: that writes.
        image: that it sees.
    """
    p = _slider(ipywidgets.FloatSlider, "nucleus p", 0.05, 1.0, 0.05, 0.9)
    k = _slider(ipywidgets.IntSlider, "captions K", 1, 10, 1, 5)
    source = Picture(image, "The image that the captions describe.")

    def captions() -> str:
        [texts] = captioner.sample([image], [range(k.value)], Nucleus(p.value))
        note = f"p = {p.value:.2f}, K = {k.value}; captions that differ: {len(set(texts))}"
        return render("captions", source, texts, note)

    return _moved([p, k], captions)


def guidance(generator: Generator, caption: str) -> ipywidgets.VBox:
    """A caption, the guidance scale and the number of denoising steps.

    A move takes up to a second in the miniature, with the noise always the same.

    Args:
        generator: that makes the image.
        caption: to begin with.
    """
    words = ipywidgets.Text(value=caption, description="caption", **_IN_A_COLUMN)
    scale = _slider(ipywidgets.FloatSlider, "guidance scale", 1.0, 10.0, 0.5, 3.0)
    steps = _slider(ipywidgets.IntSlider, "steps", 2, 20, 1, 10)

    def image() -> str:
        generator.check_caption(words.value)
        [made] = generator.render([words.value], [1], steps.value, scale.value)
        how = f"guidance scale {scale.value:g}, {steps.value} steps"
        return render("single", Picture(made, f"Generated from “{words.value}” with {how}.", how))

    return _moved([words, scale, steps], image)


def scene(
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[Similarity],
    steps: int,
    guidance_scale: float,
) -> ipywidgets.VBox:
    """A scene of up to three things, to be changed and sent round: image, captions, generated images, scores.

    A change draws the scene at once. The button samples captions, generates an image from each and compares it with the
    scene, which takes less than two seconds in the miniature. Captions are sorted by the first similarity.

    Args:
        captioner: that describes the scene.
        generator: that reads the captions; all images start from the same noise.
        similarities: of images.
        steps: denoising steps.
        guidance_scale: of the generator.
    """
    things = [_thing_controls(*values) for values in _FIRST_SCENE]
    ground = _dropdown("ground", GROUNDS, "grass")
    send = ipywidgets.Button(description="Send it round", button_style="primary")
    result = ipywidgets.HTML(layout=_WIDE)

    def drawn() -> tuple[Scene, Picture]:
        composed = compose(ground.value, [tuple(one.value for one in controls) for controls in things])
        alt = f"Your scene: {ground.value}, with {', '.join(_words(thing) for thing in composed.things) or NOTHING}."
        return composed, Picture(Image.fromarray(world.draw(composed)), alt, "your scene")

    def sent() -> str:
        composed, source = drawn()
        [captions] = captioner.sample([source.image], [range(CANDIDATES)], Nucleus())
        images = generator.render(captions, [0] * CANDIDATES, steps, guidance_scale)
        found = {label(one.name): one.compare([source.image], [images])[0].tolist() for one in similarities}
        found[label("f1")] = [f1(caption, composed) for caption in captions]
        candidates = [
            Candidate(text, Picture(image, f"Generated from: {text}"), dict(zip(found, scores, strict=True)))
            for text, image, *scores in zip(captions, images, *found.values(), strict=True)
        ]
        first = label(similarities[0].name)
        candidates.sort(key=lambda candidate: candidate.scores[first], reverse=True)
        return render("candidates", source, candidates)

    def press(_: object) -> None:
        send.disabled = True
        _show(result, sent)
        send.disabled = False

    send.on_click(press)
    rows = [ipywidgets.HBox(controls, layout=_ROW) for controls in things]
    controls = [*(one for controls in things for one in controls), ground]
    _on_change(controls, result, lambda: render("single", drawn()[1]))
    return ipywidgets.VBox([*rows, ipywidgets.HBox([ground, send], layout=_ROW), result])


def compose(ground: str, things: Sequence[tuple[str, str, str, str]]) -> Scene:
    """A scene from names.

    Args:
        ground: one of `GROUNDS`.
        things: kind (or `NOTHING`), colour, size and place of each.
    Raises:
        ValueError: two things are of one kind, or at one place.
    """
    present = [thing for thing in things if thing[0] != NOTHING]
    for what, values in (("kind", [kind for kind, *_ in present]), ("place", [place for *_, place in present])):
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise ValueError(f"two things have the same {what}, {twice[0]}: choose another for one of them")
    return Scene(ground, tuple(Thing(kind, colour, size, *_PLACES[place]) for kind, colour, size, place in present))


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _slider(kind: type, name: str, low: float, high: float, step: float, value: float) -> ipywidgets.Widget:
    settings = dict(**_IN_A_COLUMN)
    return kind(value=value, min=low, max=high, step=step, description=name, **settings)


def _dropdown(name: str, options: Sequence[str], value: str) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=name, **_IN_A_ROW)


def _thing_controls(kind: str, colour: str, size: str, place: str) -> list[ipywidgets.Dropdown]:
    return [
        _dropdown("thing", (NOTHING, *KINDS), kind),
        _dropdown("colour", COLOURS, colour),
        _dropdown("size", SIZES, size),
        _dropdown("place", tuple(_PLACES), place),
    ]


def _words(thing: Thing) -> str:
    [place] = [name for name, centre in _PLACES.items() if centre == (thing.x, thing.y)]
    return f"a {thing.size} {thing.colour} {thing.kind} at the {place}"


def _moved(controls: Sequence[ipywidgets.Widget], make: Callable[[], str]) -> ipywidgets.VBox:
    """Controls, and below them what `make` makes of their values, again after each change."""
    result = ipywidgets.HTML(layout=_WIDE)
    _on_change(controls, result, make)
    return ipywidgets.VBox([*controls, result])


def _on_change(controls: Sequence[ipywidgets.Widget], result: ipywidgets.HTML, make: Callable[[], str]) -> None:
    for control in controls:
        control.observe(lambda _: _show(result, make), names="value")
    _show(result, make)


def _show(result: ipywidgets.HTML, make: Callable[[], str]) -> None:
    """Show what `make` returns, or why it cannot: an error in a callback would reach nobody but the log."""
    try:
        result.value = make()
    except Exception as error:
        result.value = render("message", f"{type(error).__name__}: {error}")
