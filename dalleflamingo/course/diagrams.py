"""Diagrams of the course: SVG files in the folder `svg`, drawn by hand. A file's <title> says what it shows.

A cell shows them, because Colab shows no SVG in Markdown and opens no file beside a notebook. A diagram is 476 units
wide and its letters are 16 high, so that they have 12 pixels where a phone's column has 358.
"""

import html
from base64 import b64encode
from pathlib import Path
from xml.etree import ElementTree

from IPython.display import HTML

FOLDER = Path(__file__).with_name("svg")


def show(name: str) -> HTML:
    """A diagram as one image, whose alternative text is the file's title.

    Args:
        name: of a file in `FOLDER`, without suffix.
    """
    data = (FOLDER / f"{name}.svg").read_bytes()
    root = ElementTree.fromstring(data)
    title = html.escape(root.findtext("{http://www.w3.org/2000/svg}title"))
    source = f"data:image/svg+xml;base64,{b64encode(data).decode()}"
    style = "max-width: 100%; height: auto"
    return HTML(f'<img src="{source}" alt="{title}" width="{root.get("width")}" style="{style}">')
