"""Gates against numbers worked out another way: stock metrics, models that are perfect or wrong in a known way."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import written

from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.caption_metrics import evaluate
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, Scene, f1, parse
from dalleflamingo.miniature.world import draw
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import caption_gates, encoder_gates, fresh, gates, image_gates, planted
from dalleflamingo.runs import derive_seed

SETTINGS = JourneySettings(1, steps=2, guidance_scale=3.0, seed=3)
N = 30


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return fresh.nocaps(N, 5)


# ── people and captioners ────────────────────────────────────────────────────────────────────────────────────────────


def test_agreement_of_annotators_is_that_of_pycocoevalcap(dataset):
    found = caption_gates.annotator_figures(dataset, resamples=20)
    others = {one.image_id: list(one.references[1:]) for one in dataset}
    stock = evaluate(others, {one.image_id: one.references[0] for one in dataset})
    cider, bleu = found.values()
    assert cider.value == pytest.approx(100 * stock["CIDEr"].value) and bleu.value == pytest.approx(
        stock["BLEU-4"].value
    )
    assert {cider.n, bleu.n} == {N} and cider.low < cider.high and bleu.low < bleu.high


class KnownCaptioner:
    """By beam search a person's caption; sampled, the others, of which some have one wrong fact. Logs p and seeds."""

    def __init__(self, dataset: Dataset, wrong: dict[str, str]):
        self.example = {
            draw(scene).tobytes(): one for one, scene in zip(dataset, fresh.scenes_of(dataset), strict=True)
        }
        self.wrong, self.calls = wrong, []

    def _of(self, image):
        return self.example[np.asarray(image).tobytes()]

    def describe(self, images):
        return [self._of(image).references[0] for image in images]

    def sample(self, images, seeds, strategy):
        self.calls += [
            (strategy.p, self._of(image).image_id, tuple(row)) for image, row in zip(images, seeds, strict=True)
        ]
        return [self._captions(self._of(image), len(row), strategy.p) for image, row in zip(images, seeds, strict=True)]

    def _captions(self, example, count, p):
        captions = [example.references[k % len(example.references)] for k in range(count)]
        if p == 0.95:
            return [self.wrong[example.domain]] * count
        return captions if p == 0.1 else [*captions[:-2], *[self.wrong[example.domain]] * 2]


@pytest.fixture(scope="module")
def captioned(dataset):
    # no scene contradicts a caption that names nothing of the world
    captioner = KnownCaptioner(
        dataset, dict.fromkeys(("in-domain", "near-domain"), "nothing to see") | {"out-domain": "a cat beside a car"}
    )
    return captioner, caption_gates.captioner_figures(captioner, dataset, seed=2, resamples=20)


def test_cider_of_sampled_captions_is_compared_as_pycocoevalcap_scores_it(dataset, captioned):
    captioner, found = captioned
    references = {one.image_id: list(one.references) for one in dataset}

    def cider(captions):
        return evaluate(references, {one.image_id: captions(one) for one in dataset})["CIDEr"].value

    beam = cider(lambda one: one.references[0])
    sampled = np.mean([cider(lambda one, k=k: captioner._captions(one, 10, 0.9)[k]) for k in range(10)])
    assert found["CIDEr of nucleus p = 0.9 / beam search"].value == pytest.approx(sampled / beam)
    falls = cider(lambda one: captioner.wrong[one.domain]) / beam
    assert found["CIDEr of nucleus p = 0.95 / p = 0.1"].value == pytest.approx(falls)


def test_only_captions_that_contradict_the_scene_say_something_false(dataset, captioned):
    _, found = captioned
    what = "candidates that say nothing false"
    assert found[f"nucleus p = 0.9, in-domain: {what}"].value == 1
    assert found[f"nucleus p = 0.9, near-domain: {what}"].value == 1
    out = found[f"nucleus p = 0.9, out-domain: {what}"]
    assert (out.value, out.n) == (pytest.approx(0.8), N // 3)  # cats and cars are of COCO
    assert found[f"nucleus p = 0.9, in-domain − out-domain: {what}"].value == pytest.approx(0.2)


def test_the_spread_of_f1_is_within_an_image(dataset, captioned):
    captioner, found = captioned
    spread = []
    for one, scene in zip(dataset, fresh.scenes_of(dataset), strict=True):
        values = np.array([f1(caption, scene) for caption in captioner._captions(one, 10, 0.9)])
        spread.append(np.sqrt(((values - values.mean()) ** 2).mean()))
    value = found["nucleus p = 0.9: standard deviation of F1 across 10 candidates"]
    assert value.value == pytest.approx(np.mean(spread)) and value.n == N


def test_every_p_is_sampled_with_the_same_seeds(captioned):
    captioner, _ = captioned
    first = {(p, i): row for p, i, row in captioner.calls}
    assert len(first) == 3 * N
    for (_, i), row in first.items():
        assert row == tuple(derive_seed(2, i, k) for k in range(len(row)))
    assert {p: len(row) for (p, _), row in first.items()} == {0.9: 10, 0.95: 1, 0.1: 1}


def test_each_of_the_five_sorts_of_fact_can_be_false(dataset):
    [scene, *_] = fresh.scenes(1, 0, count=2)
    one, other = scene.things
    phrases = {
        "kind": f"a {next(kind for kind in KINDS if kind not in (one.kind, other.kind))}",
        "colour": f"a {next(colour for colour in COLOURS if colour != one.colour)} {one.kind}",
        "size": f"a {'small' if one.size == 'large' else 'large'} {one.kind}",
        "relation": f"a {one.kind} {'right of' if one.x < other.x else 'left of'} a {other.kind}",
        "ground": f"a {one.kind} {'at night' if scene.ground != 'night' else 'on the grass'}",
    }
    assert caption_gates.says_nothing_false(f"a {one.colour} {one.kind} and a {other.kind}", scene)
    for sort, caption in phrases.items():
        assert not caption_gates.says_nothing_false(caption, scene), sort


# ── generators ───────────────────────────────────────────────────────────────────────────────────────────────────────


class KnownRecogniser:
    """Finds what the prompt that an image holds was written of, changed in a known way."""

    def __init__(self, prompts: int, change=lambda scene: scene):
        self.scenes = {}
        for count in image_gates.COUNTS:
            captions = image_gates.write_prompts(prompts, SETTINGS.seed, count)
            self.scenes |= dict(zip(captions, fresh.scenes(prompts, SETTINGS.seed, "prompt", count), strict=True))
        self.change = change

    def find(self, images):
        return [self.change(self.scenes[written.read(image)]) for image in images]


def generated(change=lambda scene: scene):
    return image_gates.generator_figures(written.Generator(), KnownRecogniser(N, change), N, SETTINGS)


def test_prompts_name_all_things_and_colours_a_relation_and_the_ground_in_many_words():
    for count in image_gates.COUNTS:
        captions = image_gates.write_prompts(N, SETTINGS.seed, count)
        for caption, scene in zip(captions, fresh.scenes(N, SETTINGS.seed, "prompt", count), strict=True):
            graph = parse(caption)
            names = {(thing.kind, thing.colour) for thing in scene.things}
            assert {(thing.kind, thing.colour) for thing in graph.things} == names and len(names) == count
            assert graph.ground == scene.ground and len(graph.relations) >= (count > 1)
        assert len({caption.split()[0] for caption in captions}) >= 4
    assert captions == image_gates.write_prompts(2 * N, SETTINGS.seed, 3)[:N]
    assert captions != image_gates.write_prompts(N, SETTINGS.seed + 1, 3)


def test_a_perfect_generator_is_right_in_everything():
    found = generated()
    assert {share.value for share in found.values()} == {1.0}
    for count, label in image_gates.COUNTS.items():
        assert found[f"{label} prompts: kind and colour right"].n == count * N


def test_what_a_generator_does_wrong_is_in_its_own_row_alone():
    def other_colour(scene):
        first, *others = scene.things
        colour = next(name for name in COLOURS if name != first.colour)
        return Scene(scene.ground, (type(first)(first.kind, colour, first.size, first.x, first.y), *others))

    found = generated(other_colour)
    shares = {
        count: found[f"{label} prompts: kind and colour right"].value for count, label in image_gates.COUNTS.items()
    }
    assert shares == pytest.approx({1: 0, 2: 1 / 2, 3: 2 / 3})
    relation = found["two-thing prompts: relation right where both are found"]
    assert (relation.n, relation.low, relation.high) == (0, 0, 1)  # no image shows both things

    def turned(scene):
        things = (type(one)(one.kind, one.colour, one.size, 64 - one.x, 64 - one.y) for one in scene.things)
        return Scene(scene.ground, tuple(things))

    found = generated(turned)
    wrong = found["two-thing prompts: relation right where both are found"]
    assert (wrong.value, wrong.n) == (0.0, N)
    assert (
        found["two-thing prompts: kind and colour right"].value == found["two-thing prompts: ground right"].value == 1
    )


def test_every_prompt_has_a_noise_of_its_own():
    generator = written.Generator()
    image_gates.generator_figures(generator, KnownRecogniser(N), N, SETTINGS)
    assert len({seed for _, seed in generator.rendered}) == 3 * N


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auc_of_known_numbers():
    same, changed = np.array([3.0, 3.0]), np.array([[1.0, 2.0], [3.0, 4.0]])
    assert encoder_gates.pooled_auc(same, changed, 20).value == pytest.approx((1 + 1 + 1 / 2 + 0) / 4)
    assert encoder_gates.pooled_auc(np.ones(9), np.ones((9, 3)), 20).value == 0.5
    assert encoder_gates.pooled_auc(np.full(9, 2.0), np.ones((9, 3)), 20).low == 1.0
    rng = np.random.default_rng(0)
    shifted, plain = rng.normal(1, 1, 400), rng.normal(0, 1, (400, 3))
    found = encoder_gates.pooled_auc(shifted, plain, 200)
    assert found.low < 0.7602 < found.high and found.n == 400  # Φ(1 / √2)


class Pixels:
    """How alike two images are pixel by pixel: layout is all that it sees."""

    name = "dino"

    def compare(self, sources, candidates):
        arrays = [
            [np.asarray(one, float) for one in (source, *row)] for source, row in zip(sources, candidates, strict=True)
        ]
        return torch.tensor([[-((first - one) ** 2).mean() for one in others] for first, *others in arrays])


class Colours:
    """How alike the colours of two images are, wherever they are: content is all that it sees."""

    name = "clip"

    def compare(self, sources, candidates):
        def histogram(image):
            return np.bincount((np.asarray(image) // 8 @ [1024, 32, 1]).ravel(), minlength=2**15)

        rows = [[histogram(one) for one in (source, *row)] for source, row in zip(sources, candidates, strict=True)]
        return torch.tensor([[-np.abs(first - one).sum() for one in others] for first, *others in rows])


def test_content_elsewhere_is_nearer_to_one_that_sees_content_and_not_to_one_that_sees_layout():
    [content] = encoder_gates.elsewhere_figures(Colours(), 40, 1).values()
    [layout] = encoder_gates.elsewhere_figures(Pixels(), 40, 1).values()
    assert content.value > 0.9 and layout.value < 0.5 and content.n == 40


def test_the_gate_of_planted_errors_is_the_study_of_planted_errors(tmp_path):
    scenes = fresh.scenes_of(planted.plant(20, SETTINGS.seed)[0])
    oracle = written.Similarity("clip", written.fewest_errors, written.Shown(scenes))
    found = encoder_gates.planted_figures(oracle, written.Generator(), 20, tmp_path, SETTINGS)
    assert found["planted errors: truth ranked first by CLIP"].value == 1 and len(found) == 5
    constant = written.Similarity("dino", written.constant, written.Shown(scenes))  # and nothing is rendered again
    found = encoder_gates.planted_figures(constant, written.Generator(limit=0), 20, tmp_path, SETTINGS)
    assert found["planted errors: truth ranked first by DINO"].value == 0


def test_a_retrained_generator_renders_planted_errors_anew(tmp_path, monkeypatch):
    shown = written.Shown(fresh.scenes_of(planted.plant(4, SETTINGS.seed)[0]))
    monkeypatch.setattr(gates.registry, "locate", lambda name: name)
    monkeypatch.setattr(gates.Dino, "from_pretrained", lambda name: written.Similarity("dino", written.constant, shown))
    for figures in ("elsewhere_figures", "dino_figures"):
        monkeypatch.setattr(encoder_gates, figures, lambda *arguments: {})
    development = gates.Development(SETTINGS.seed, 4, tmp_path)
    for version, renders in ((1, 20), (1, 0), (2, 20)):
        generator = written.Generator()
        generator.fingerprint = lambda version=version: f"writes {version}"
        monkeypatch.setattr(gates, "load_generator", lambda profile, generator=generator: generator)
        assert "planted errors: truth ranked first by DINO" in gates.MODELS["dino"](development)
        assert len(generator.rendered) == renders


class Numbers:
    """Embeds items by their number in the call, shifted by `shift`; of four captions one is like its image."""

    def __init__(self, n: int, shift: int = 0, like: int = 0):
        self.n, self.shift, self.like = n, shift, like

    def embed(self, items):
        own = torch.eye(self.n).roll(self.shift, 0)
        if len(items) == 4 * self.n:
            return torch.stack([own if k == self.like else -own for k in range(4)], 1).flatten(0, 1)
        return own[: len(items)]


@pytest.mark.parametrize(("texts", "shares"), [(Numbers(20), [1, 1]), (Numbers(20, like=2), [1, 0])], ids=["0", "2"])
def test_clip_is_right_where_an_image_is_nearest_to_its_own_caption(texts, shares):
    found = encoder_gates.clip_figures(Numbers(20), texts, 20, 1)
    names = "image → text R@1 among 100 scenes", "relation right, among the four of two things"
    assert [found[name].value for name in names] == shares and {share.n for share in found.values()} == {20}
    another = encoder_gates.clip_figures(Numbers(20), Numbers(20, shift=1), 20, 1)
    assert another[names[0]].value == 0


class Attribute:
    """Features that are one attribute of the thing that an image shows."""

    def __init__(self, attribute: str, values: tuple[str, ...], n: int, seed: int):
        scenes = [*fresh.scenes(2 * n, seed, "probe, known", 1), *fresh.scenes(n, seed, "probe, asked", 1)]
        self.attribute, self.values, self.shown = attribute, values, written.Shown(scenes)

    def embed(self, images):
        numbers = [self.values.index(getattr(self.shown[image].things[0], self.attribute)) for image in images]
        return torch.nn.functional.one_hot(torch.tensor(numbers), len(self.values)).float()


def test_probes_find_what_the_features_hold_and_nothing_else():
    kind = encoder_gates.dino_figures(Attribute("kind", KINDS, 200, 1), 200, 1)
    colour = encoder_gates.dino_figures(Attribute("colour", COLOURS, 200, 1), 200, 1)
    nearest, linear = "20-NN accuracy of kind, one-thing pictures", "linear probe of colour, one-thing pictures"
    assert kind[nearest].value > 0.95 and colour[linear].value == 1.0  # a rare kind has fewer than 20 neighbours
    assert kind[linear].value < 0.3 and colour[nearest].value < 0.2


def test_inception_is_asked_for_the_class_of_the_thing():
    shown = written.Shown(fresh.scenes(30, 1, "inception", 1))
    model = SimpleNamespace(class_of=lambda thing: KINDS.index(thing.kind))

    def extract(images):
        classes = torch.tensor([KINDS.index(shown[image].things[0].kind) for image in images])
        classes[:6] = (classes[:6] + 1) % len(KINDS)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(classes, len(KINDS)).float())

    [share] = encoder_gates.inception_figures(SimpleNamespace(model=model, extract=extract), 30, 1).values()
    assert (share.value, share.n) == (0.8, 30)


# ── bars, the file and the page ──────────────────────────────────────────────────────────────────────────────────────


def test_bars_name_figures_that_are_measured(dataset, captioned, tmp_path):
    scenes = fresh.scenes_of(planted.plant(3, SETTINGS.seed)[0])

    def encoder(name):
        similarity = written.Similarity(name, written.constant, written.Shown(scenes))
        return encoder_gates.planted_figures(similarity, written.Generator(), 3, tmp_path, SETTINGS)

    known = {
        "annotators": caption_gates.annotator_figures(dataset, 2),
        **dict.fromkeys(("blip", "blip-large", "blip2"), captioned[1]),
        **dict.fromkeys(("sd", "lafite"), generated()),
    }
    for model, figures in known.items():
        assert [gate.what for gate in gates.gates_of(model, figures)] == list(figures)
    for model, name in {"clip": "clip", "dino": "dino", "inception": "fidelity"}.items():
        bars = {what for what in gates.BARS[model] if what.startswith("planted")}
        assert bars and bars <= encoder(name).keys()
    with pytest.raises(KeyError, match="annotators has bars for figures that are not measured: .*BLEU-4"):
        gates.gates_of("annotators", {})


@pytest.mark.parametrize(
    ("value", "bound", "lacks"),
    [(0.7, 0.75, 0.05), (0.75, 0.75, 0), (0.9, 0.75, 0), (0.5, (0.6, 0.8), 0.1), (0.85, (0.6, 0.8), 0.05)]
    + [(0.6, (0.6, 0.8), 0), (0.8, (0.6, 0.8), 0), (0.8, [0.6, 0.7], 0.1), (0.3, None, 0)],
)
def test_a_shortfall_is_the_way_to_the_bound(value, bound, lacks):
    assert gates.shortfall(value, bound) == pytest.approx(lacks)


def test_all_files_but_the_drawn_images_weigh(tmp_path):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/1.png").write_bytes(bytes(5_000_000))
    (tmp_path / "a.safetensors").write_bytes(bytes(1_500_000))
    (tmp_path / "coco/b.json").write_bytes(bytes(500_000))
    size = gates.size_of_data(tmp_path)
    assert (size.value, size.n) == (2.0, 2)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Two models with figures of their own, a folder docs and a MANIFEST; [what they were measured on]."""
    asked = []

    def figures(model):
        def measure(development):
            asked.append(development)
            bars = gates.BARS[model]
            return {what: Interval(0.5, 0.25, 0.75, development.size(300), 0) for what in bars}

        return measure

    monkeypatch.setattr(gates, "MODELS", {"annotators": figures("annotators"), "sd": figures("sd")})
    monkeypatch.setenv("DALLEFLAMINGO_DATA", str(tmp_path / "data"))
    (tmp_path / "data/miniature").mkdir(parents=True)
    first_edition = {"model": "clip", "what": "an old one", "value": {"value": 0.5}, "reaches_floor": True}
    there = {"files": {}, "gates": [first_edition]}
    (tmp_path / "data/miniature/MANIFEST.json").write_text(json.dumps(there))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return asked


def test_fresh_scenes_of_a_seed_go_into_the_file_that_is_named(measured, tmp_path):
    before = (tmp_path / "data/miniature/MANIFEST.json").read_text()
    assert gates.main(["--seed", "7", "--json", "gates.json", "--limit", "40"]) == 0
    assert [(one.seed, one.scene_seed, one.size(300)) for one in measured] == [(7, 7, 40)] * 2
    found = json.loads((tmp_path / "gates.json").read_text())["gates"]
    assert {tuple(gate) for gate in found} == {("model", "what", "value", "low", "high", "n", "floor", "goal")}
    assert {gate["model"] for gate in found} == {"annotators", "sd"} and found[0]["goal"] == [100.0, 200.0]
    assert (tmp_path / "data/miniature/MANIFEST.json").read_text() == before
    assert not (tmp_path / "docs/miniature.md").exists()
    assert not {*fresh.nocaps(9, 7)} & {*gates.Development(8, 9).annotated()}
    assert gates.Development(7, 9).annotated() == fresh.nocaps(9, 7)


def test_without_a_seed_manifest_and_page_keep_the_gates(measured, tmp_path):
    assert gates.main([]) == gates.main(["sd"]) == 0
    assert {(one.seed, one.scene_seed, one.size(300)) for one in measured} == {(None, gates.SEED, 300)}
    kept = json.loads((tmp_path / "data/miniature/MANIFEST.json").read_text())["gates"]
    assert len(kept) == sum(len(gates.BARS[model]) for model in ("annotators", "sd"))
    page = (tmp_path / "docs/miniature.md").read_text()
    row = "| sd | one-thing prompts: kind and colour right | 0.500 | 0.250 … 0.750 | 300 | 0.005 | ≥ 0.9 | ≥ 0.95 |"
    assert f"{row} **falls short of the floor by 0.400** |" in page
    assert "| 100.0 … 200.0 | off the goal by 99.500 |" in page


@pytest.mark.parametrize("arguments", [["--seed", "7"], ["--limit", "3"], ["bilp"]], ids=" ".join)
def test_other_scenes_need_a_file_and_models_a_known_name(arguments, measured, capsys):
    with pytest.raises(SystemExit) as ended:
        gates.main(arguments)
    assert ended.value.code == 2 and not measured
    assert "--json" in capsys.readouterr().err or arguments == ["bilp"]
