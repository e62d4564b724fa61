"""The site in Chromium, opened from the disk: on phone and desk, light and dark, by keyboard. `make test-browser`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import built_site
import chromium
import pytest

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="without the extra `browser`")
pytestmark = chromium.MARKS

WIDTHS, SCHEMES = {"phone": 390, "desk": 1280}, ("light", "dark")
VIEWS = [(width, scheme) for width in WIDTHS.values() for scheme in SCHEMES]
SOME = (
    "index.html",
    "01_how_the_models_work.html",
    "02_tokenizer_mapping.html",
    "scoreboard.html",
    "paper.html",
    "search.html?q=token",
)


@dataclass
class View:
    """A tab, with all that went wrong in it.

    Attributes:
        page: Playwright's.
        root: address of the site.
        faults: errors of scripts, and requests to other hosts.
    """

    page: "chromium.sync_api.Page"
    root: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.set_default_timeout(chromium.PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._check)

    def _check(self, request: "chromium.sync_api.Request") -> None:
        if not request.url.startswith((self.root, "data:")):
            self.faults.append(f"asked for {request.url}")

    def open(self, address: str) -> "chromium.sync_api.Page":
        self.page.goto(self.root + address)
        return self.page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return built_site.build(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def addresses(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html"))


@pytest.fixture(scope="module")
def browser() -> Iterator["chromium.sync_api.Browser"]:
    with chromium.opened() as opened:
        yield opened


@pytest.fixture
def view(browser, folder):
    """A function that opens a view of a width and a colour scheme."""

    @contextmanager
    def opened(width: int = WIDTHS["desk"], scheme: str = "light") -> Iterator[View]:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        yield View(context.new_page(), f"{folder.as_uri()}/")
        context.close()

    return opened


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_page_fits_the_screen_and_asks_no_other_host(view, addresses, width, scheme):
    with view(width, scheme) as seen:
        for address in addresses:
            page = seen.open(address)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
            assert page.evaluate("[...document.images].every((image) => image.alt && image.naturalWidth)"), address
            assert not seen.faults, address


def test_every_link_leads_to_a_page_and_to_its_anchor(view, addresses):
    with view() as seen:
        known, waiting, wanted = set(), ["index.html"], {}
        while waiting:
            address = waiting.pop()
            known.add(address)
            page = seen.open(address)
            for link in page.evaluate("[...document.links].filter((a) => !a.download).map((a) => a.href)"):
                if link.startswith(seen.root):
                    to, _, anchor = link.removeprefix(seen.root).partition("#")
                    wanted.setdefault(to, set()).add(unquote(anchor))
                    waiting += [to] if to.endswith(".html") and to not in known and to not in waiting else []
        assert known == set(addresses) - {"search.html"}  # which the form of every page leads to
        for to, anchors in wanted.items():
            if to.endswith(".html"):
                page = seen.open(to)
                missing = page.evaluate(
                    "(ids) => ids.filter((id) => id && !document.getElementById(id))", list(anchors)
                )
                assert not missing, to
        assert not seen.faults


@pytest.mark.parametrize("address", SOME)
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_axe_finds_nothing_serious(view, address, width, scheme):
    with view(width, scheme) as seen:
        found = axe.Axe().run(seen.open(address)).response["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not grave, [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in grave]


def test_the_scheme_of_the_reader_decides_the_colours(view):
    grounds = set()
    for scheme in SCHEMES:
        with view(scheme=scheme) as seen:
            grounds.add(seen.open("protocol.html").evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == {"rgb(255, 255, 255)", "rgb(22, 24, 27)"}


def test_a_line_of_prose_holds_about_75_characters(view):
    with view() as seen:
        measure = """() => {
            const paragraph = [...document.querySelectorAll("main p")].find((one) => one.textContent.length > 300);
            const range = document.createRange();
            range.selectNodeContents(paragraph);
            return paragraph.textContent.length / new Set([...range.getClientRects()].map((box) => box.bottom)).size;
        }"""
        assert 55 <= seen.open("protocol.html").evaluate(measure) <= 85


def tops(page: "chromium.sync_api.Page") -> set[float]:
    """Where the rows of the first strip begin."""
    script = "[...document.querySelector('.strip').children].map((card) => card.getBoundingClientRect().top)"
    return set(page.evaluate(script))


def test_candidates_are_a_strip_on_a_desk_and_cards_on_a_phone(view):
    with view() as seen:
        assert len(tops(seen.open("index.html"))) == 1
    with view(WIDTHS["phone"]) as seen:
        assert len(tops(seen.open("index.html"))) > 2


def test_figures_stay_readable_on_a_phone_and_scroll_in_a_box_of_their_own(view):
    with view(WIDTHS["phone"]) as seen:
        page = seen.open("results/insight-1.html")
        ratios = page.evaluate("[...document.images].map((image) => image.width / image.naturalWidth)")
        assert ratios and min(ratios) > 0.69
        assert page.evaluate("document.querySelector('.picture').tabIndex") == 0


def test_the_search_finds_a_term_as_it_is_typed_and_the_keyboard_opens_it(view):
    with view() as seen:
        page = seen.open("results/insight-1.html")
        page.get_by_role("searchbox").fill("soft prompt")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=soft+prompt")
        first = page.locator("#results a").first
        assert first.inner_text() == "Glossary › soft prompt" and page.locator("#results mark").count() > 1
        page.get_by_role("searchbox").fill("zzz")
        assert page.locator("#results li").count() == 0 and page.locator("#count").inner_text() == "0 sections"
        page.get_by_role("searchbox").fill("<b>Soft")
        page.get_by_role("searchbox").fill("soft prompt")
        page.get_by_role("button", name="Search").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url("**/glossary.html#soft-prompt")
        assert not seen.faults


def test_the_keyboard_reaches_the_content_first_and_shows_where_it_is(view):
    with view() as seen:
        page = seen.open("protocol.html")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
