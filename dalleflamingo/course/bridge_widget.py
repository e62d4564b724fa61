"""A slider that draws: each move makes a new image, in ipywidgets 7 (Colab) and 8 (JupyterLab).

`ipywidgets.interactive` shows what a function displays and drops what it returns. So the image is a widget itself,
whose value is set after each move.
"""

import base64
import html
from collections.abc import Callable
from io import BytesIO

import ipywidgets
from PIL.Image import Image, Resampling

_SIDE = 192  # pixels, at least


def image_slider(draw: Callable[[float], Image], label: str) -> ipywidgets.VBox:
    """A slider from 0 to 100 % above the image that `draw` makes of its value.

    Args:
        draw: share in [0, 1] -> image. It is called once at the start and again when the slider is let go.
        label: what the share is of, in words; with the value it is the image's alternative text.
    """
    slider = ipywidgets.FloatSlider(
        value=0.5, min=0, max=1, step=0.1, description=label, readout_format=".0%", continuous_update=False
    )
    slider.style.description_width = "initial"
    shown = ipywidgets.HTML()

    def update(_: object = None) -> None:
        shown.value = image_tag(draw(slider.value), f"{label}: {slider.value:.0%}")

    slider.observe(update, names="value")
    update()
    return ipywidgets.VBox([slider, shown])


def image_tag(image: Image, text: str) -> str:
    """HTML that holds the whole image, small ones enlarged so that their pixels stay sharp.

    Args:
        image: any.
        text: its alternative text.
    """
    if image.width < _SIDE:
        image = image.resize((_SIDE, _SIDE * image.height // image.width), Resampling.NEAREST)
    file = BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'
