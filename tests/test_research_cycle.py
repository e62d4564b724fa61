"""The study: its queue, a run that goes on, and what is made of the runs, on numbers whose answer is known."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo import cycle, profiles, registry
from dalleflamingo.course import cycle_figures
from dalleflamingo.cycle import CHOSEN
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.research import cycle_comparison, cycle_report, cycle_study
from dalleflamingo.research.cycle_comparison import Examined
from dalleflamingo.research.cycle_report import BLIP
from dalleflamingo.research.cycle_study import ARMS, START, TABLE_9, Run, queue

ROOT = Path(__file__).parents[1]
NAMES = ("caption", "image_reconstruction", "generation", "caption_reconstruction")


def test_arms_are_the_losses_that_they_say():
    expected = {
        "labels": (1, 0, 1, 0), "labels-longer": (1, 0, 1, 0), "cycle": (1, 1, 1, 1), "image": (1, 1, 1, 0),
        "text": (1, 0, 1, 1), "reconstruction": (0, 1, 0, 1),
    }  # fmt: skip
    for arm, weights in expected.items():
        config = ARMS[arm].config(BLIP, 3)
        assert tuple(getattr(config.losses, name) for name in NAMES) == weights
        assert (config.captioner, config.seed, config.pictures) == (BLIP, 3, CHOSEN.pictures)
        assert config.steps == (cycle_study.AS_LONG if arm == "labels-longer" else CHOSEN.steps) <= 1000
    released = ARMS["released"].config(BLIP, 0)
    assert released.ends_kept and released.vocabulary_map == "released" and released.losses.previous_sample


def test_the_queue_has_every_run_once_and_one_seed_after_another():
    runs = queue()
    assert len({run.name for run in runs}) == len(runs)
    counts = pd.DataFrame([vars(run) for run in runs]).groupby(["captioner", "arm"])["seed"].nunique()
    for captioner, seeds in cycle_study.CAPTIONERS.items():
        assert all(counts[captioner, arm] == seeds for arm in cycle_study.TABLE_3)
    assert all(counts[BLIP, arm] == 5 for arm in TABLE_9) and counts[BLIP, "released"] == 1
    compared = [run.seed for run in runs if run.arm in cycle_study.TABLE_3]
    assert compared == sorted(compared)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of tiny models that writes two captions; returns its folder and how often models were prepared."""
    prepared = []
    monkeypatch.setattr(cycle, "prepare", lambda config, device: prepared.append(config) or (config, None, None))
    monkeypatch.setattr(cycle, "train", lambda config, made, pairs, learner, folder, accelerator: None)
    examined = {"captions": {"nocaps": {"1": "a dog"}, "coco": {"2": "a cat"}}}
    monkeypatch.setattr(cycle_study, "examine", lambda made, folder, pictures, drawn: examined)
    monkeypatch.setattr(cycle_study, "tested", dict)
    return tmp_path, prepared


def test_a_run_that_is_done_is_not_made_again(small):
    folder, prepared = small
    run = Run("cycle", BLIP, 2)
    first = cycle_study.perform(run, run.config, folder / "a", {}, ())
    assert first["arm"] == "cycle" and prepared == [ARMS["cycle"].config(BLIP, 2)]
    assert cycle_study.perform(run, run.config, folder / "a", {}, ()) == json.loads(json.dumps(first))
    assert len(prepared) == 1 and not list((folder / "a").glob("*.part"))


def test_what_another_process_is_at_is_left_to_it(small, monkeypatch, capsys):
    folder, prepared = small
    monkeypatch.setattr(cycle_study, "queue", lambda: [Run("cycle", BLIP, 0), Run("cycle", BLIP, 1)])
    with FileLock(folder / "blip-cycle-0.lock"):
        assert cycle_study.main(["--runs", str(folder)]) == 0
    assert [config.seed for config in prepared] == [1] and "1 of 2 runs" in capsys.readouterr().out
    assert cycle_study.main(["--runs", str(folder)]) == 0
    assert [config.seed for config in prepared] == [1, 0]


def test_drawings_are_kept_and_measured_against_the_picture_whose_caption_they_are_of(tmp_path, monkeypatch):
    for i, picture in enumerate(tiny.pictures(3)):
        picture.save(tmp_path / f"{i}.png")
    dataset = Dataset("some", tuple(Example(i, tmp_path / f"{i}.png", (f"caption {i}",)) for i in range(3)))

    class Copies:
        """Draws "caption 0" and "caption 1" as pictures 0 and 1, and "caption 2" as picture 0."""

        def render(self, captions, seeds, steps, guidance_scale, batch_size):
            assert captions == ["caption 0", "caption 1", "caption 2"] and seeds == [0, 1, 2]
            return [dataset.open(dataset.examples[i]) for i in (0, 1, 0)]

    def embed(pictures):
        return torch.stack([torch.from_numpy(np.asarray(picture, dtype=np.float32)).flatten() for picture in pictures])

    monkeypatch.setattr(cycle_study.ClipImage, "from_pretrained", lambda *_: SimpleNamespace(embed=embed))
    looks = SimpleNamespace(look=lambda drawn: SimpleNamespace(features=torch.arange(len(drawn))[:, None].float()))
    monkeypatch.setattr(cycle_study.FeatureExtractor, "of", lambda *_: looks)
    found = cycle_study.judged(Copies(), dataset, tmp_path / "drawn")
    first, _, third = embed([dataset.open(example) for example in dataset])
    other = 100 * (1 - torch.cosine_similarity(first, third, dim=0).item())
    assert found["clip_distance"] == pytest.approx([0, 0, other], abs=1e-3) and other > 1
    assert found["image_id"] == [0, 1, 2] and found["features"] == [[0.0], [1.0], [2.0]]
    for i, copied in enumerate((0, 1, 0)):
        kept, original = tmp_path / f"drawn/{i}.png", tmp_path / f"{copied}.png"
        assert np.array_equal(Image.open(kept), Image.open(original))


def test_settings_are_chosen_on_pictures_that_the_test_has_not():
    test, other = cycle_study.tested(), cycle_study.chosen_on()
    for corpus in test:
        ids = [{example.image_id for example in part[corpus]} for part in (test, other)]
        assert len(ids[0]) == len(ids[1]) == cycle_study.TESTED and not ids[0] & ids[1]
    assert {name: len(part) for name, part in test["nocaps"].by_domain().items()} == dict.fromkeys(
        ("in-domain", "near-domain", "out-domain"), 100)  # fmt: skip
    tried = cycle_study.trials()
    assert len(tried) == 11 and len({run.name for run in tried}) == 11
    assert {config.losses.latest for run, config in tried.items() if run.arm != START} == {0.4, 1.0}


# ── what is made of the runs ─────────────────────────────────────────────────────────────────────────────────────────


def examined_runs(values: dict[tuple[str, int], np.ndarray], metric: str = "cider") -> Examined:
    """Runs with a value for each of 60 images, whose metric is their mean."""
    table = np.stack(list(values.values()))
    domain = np.array(["in-domain", "near-domain", "out-domain"] * 20, dtype=object)
    return Examined(tuple(values), domain, {metric: lambda runs, images: table[runs][:, images].mean(axis=1)})


def arms(levels: dict[str, float], seeds: int = 3, noise: float = 0.01) -> Examined:
    rng, images = np.random.default_rng(0), np.random.default_rng(1).standard_normal(60)
    runs = {(START, 0): images + levels[START]}
    for arm, level in levels.items():
        for seed in range(seeds * (arm != START)):
            runs[arm, seed] = images + level + noise * rng.standard_normal(60)
    return examined_runs(runs)


def test_differences_are_paired_by_seed_and_picture():
    runs = arms({START: 0.0, "cycle": 1.0, "labels": 0.5})
    alone, apart = runs.value("cider", "cycle"), runs.value("cider", "cycle", "labels")
    assert apart.value == pytest.approx(0.5, abs=0.01) and apart.high - apart.low < 0.05 < alone.high - alone.low
    assert runs.value("cider", "cycle", START).value == pytest.approx(1.0, abs=0.01)
    per_seed = {seed: 10.0 * seed for seed in range(3)}
    shifted = {("cycle", s): np.full(60, level) for s, level in per_seed.items()}
    shifted |= {("labels", s): np.full(60, level - 2) for s, level in per_seed.items()}
    paired = examined_runs(shifted).value("cider", "cycle", "labels")
    assert (paired.low, paired.high) == pytest.approx((2, 2))


def test_a_domain_is_its_own_pictures_and_seeds_that_one_arm_lacks_are_left_out():
    values = np.array([0.0, 5.0, 9.0] * 20)
    runs = examined_runs({("cycle", 0): values, ("cycle", 1): values + 7, ("labels", 0): values - 1})
    out = runs.value("cider", "cycle", domain="out-domain")
    assert (out.value, out.n) == (pytest.approx(9 + 3.5), 20)
    assert runs.value("cider", "cycle", "labels").value == pytest.approx(1)
    assert runs.seeds("cycle") == [0, 1] and runs.seeds("text") == []


def found(levels: dict[str, float]) -> cycle_comparison.Study:
    runs = arms(levels)
    pictures = Examined(runs.runs, runs.domain, {name: runs.scores["cider"] for name in ("clip_distance", "fid")})
    return cycle_comparison.Study({BLIP: runs}, {BLIP: runs}, {BLIP: pictures}, {BLIP: pictures})


PAPER = dict(zip(TABLE_9, (111.8, 110.9, 110.2, 109.7, 102.3), strict=True)) | {START: 108.0, "labels-longer": 109.0}


def test_the_claims_hold_of_the_papers_own_order_and_not_of_its_reverse():
    study = found(PAPER)
    nine, eleven, twelve = (one(study)[0] for one in (cycle_report.claim_9, cycle_report.claim_11,
                                                      cycle_report.claim_12))  # fmt: skip
    assert (nine.verdict, eleven.verdict, twelve.verdict) == ("holds",) * 3
    assert nine.effect.value == pytest.approx(3.8, abs=0.01) and nine.seeds == [0, 1, 2]
    assert eleven.effect.value == pytest.approx(2.1, abs=0.01) and "without the reconstruction losses" in eleven.text
    assert twelve.effect.value == pytest.approx(1) and len(twelve.apart) == 4
    other = found({arm: -level for arm, level in PAPER.items()})
    assert {one(other)[0].verdict for one in (cycle_report.claim_9, cycle_report.claim_11,
                                              cycle_report.claim_12)} == {"does not hold"}  # fmt: skip


def test_pictures_are_better_where_they_lie_nearer():
    [claim] = cycle_report.claim_10(found({START: 40.4, "labels": 40.8, "cycle": 39.8}))
    assert claim.verdict == "holds" and claim.effect.value == pytest.approx(0.6, abs=0.01)  # the start is the rival
    assert "than the start" in claim.text and claim.effect.n == 20
    [claim] = cycle_report.claim_10(found({START: 40.4, "labels": 39.5, "cycle": 39.8}))
    assert claim.verdict == "does not hold" and "than labels only" in claim.text


def test_captions_are_judged_run_by_run(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["a red bird on a boat", "two cats by a house", "a green tree at night", "a blue kite in the snow"]
    dataset = Dataset("some", tuple(Example(i, tmp_path, (texts[i % 4], texts[i % 4] + " today")) for i in range(12)))
    rows = []
    for arm, seed, right in (("cycle", 0, 1.0), ("cycle", 1, 0.5), (START, 0, 0.0)):
        for example in dataset:
            said = example.references[0] if rng.random() < right else "nothing of the kind"
            rows.append({"arm": arm, "seed": seed, "image_id": example.image_id, "caption": said})
    runs = cycle_comparison.of_captions(pd.DataFrame(rows).sample(frac=1, random_state=0), dataset)
    assert runs.value("cider", "cycle").value > 100 > 20 > runs.value("cider", START).value
    worse = [row for row in rows if row["seed"] == 1]
    alone = cycle_comparison.of_captions(pd.DataFrame(worse), dataset).value("cider", "cycle").value
    best = cycle_comparison.of_captions(pd.DataFrame(rows[:12]), dataset).value("cider", "cycle").value
    assert runs.value("cider", "cycle").value == pytest.approx((alone + best) / 2)


def drawn(shifts: list[float], real: torch.Tensor, own: torch.Tensor) -> pd.DataFrame:
    """A run for each shift, its rows in another order than the pictures: features moved along the first axis."""
    return pd.DataFrame([
        {"arm": "cycle", "seed": seed, "image_id": i, "clip_distance": 10.0 * seed + i, "features": row.tolist()}
        for seed, shift in enumerate(shifts)
        for i, row in reversed(list(enumerate(own + shift * torch.eye(real.shape[1])[0])))
    ])  # fmt: skip


def test_pictures_are_judged_run_by_run(tmp_path):
    half = ["in-domain"] * 100 + ["out-domain"] * 100
    dataset = Dataset("some", tuple(Example(i, tmp_path, ("a",), domain) for i, domain in enumerate(half)))
    real, other = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0))
    runs = cycle_comparison.of_pictures(drawn([0.0, 3.0], real, real), dataset, real)
    assert runs.value("clip_distance", "cycle").value == pytest.approx(99.5 + 5)
    assert runs.value("clip_distance", "cycle", domain="out-domain").value == pytest.approx(149.5 + 5)
    assert runs.value("fid", "cycle").value == pytest.approx(9 / 2, abs=1e-3)  # the squared distance of the means
    moved = cycle_comparison.of_pictures(drawn([3.0], real, real), dataset, real).value("fid", "cycle")
    assert (moved.low, moved.high) == pytest.approx((9, 9), abs=1e-2)  # drawn anew with the pictures that they are of
    alike = cycle_comparison.of_pictures(drawn([0.0], real, other), dataset, real).value("fid", "cycle")
    assert alike.low < alike.value < alike.high  # fewer pictures, drawn twice, have a greater FID


def test_tables_have_a_row_an_arm_and_the_papers_figures():
    study = found(PAPER)
    first = cycle_report.table_9(dataclasses.replace(study, nocaps=_with_f1(study.nocaps)))
    assert first["the paper"].tolist() == ["111.8", "110.9", "110.2", "109.7", "102.3"]
    assert first["CIDEr × 100"].str.startswith("11").tolist() == [True, True, True, False, False]
    fourth = cycle_report.table_4(study)
    assert fourth["trained by"].tolist()[:2] == ["start", ARMS["labels"].what]


def _with_f1(runs):
    return {who: Examined(one.runs, one.domain, one.scores | {"f1": one.scores["cider"]}) for who, one in runs.items()}


def test_claim_14_is_what_the_counts_say(tmp_path):
    steps = [["at 512 px", 1.0, 9.0, 10.0, 30.0], ["at 256 px", 1.0, 9.0, 10.0, 14.0]]
    (tmp_path / "cycle-arithmetic.json").write_text(json.dumps({"steps": steps}))
    seconds = dict(zip("abcde", ([1.0] * 9, [3.0] * 9, [4.0] * 9, [6.0] * 9, [9.0] * 9), strict=True))
    entries = [{"captioner": name, "setting": "x", "seconds": seconds} for name in (BLIP, "another")]
    (tmp_path / "cycle-cost.json").write_text(json.dumps({"found": entries}))
    [claim] = cycle_report.claim_14(tmp_path)
    assert claim.verdict == "does not hold" and claim.effect.value == pytest.approx(1.4 - 2)
    spared = {what: effect.value for what, effect in claim.apart.items()}
    assert spared == pytest.approx({"at 256 px": 0.2, "the miniature, timed (5th to 95th percentile), x": 1.4 - 1.25})


def test_everything_is_written_from_the_runs_that_are_done(tmp_path, monkeypatch, capsys):
    nocaps = registry.dataset("miniature/nocaps")
    few = {"nocaps": Dataset("some", [one for part in nocaps.by_domain().values() for one in part[:3]]),
           "coco": registry.dataset("miniature/coco", "test").subset(6)}  # fmt: skip
    for module in (cycle_comparison, cycle_report):
        monkeypatch.setattr(module, "tested", lambda: few)
    monkeypatch.setattr(cycle_comparison, "RESAMPLES", 20)
    monkeypatch.setattr(cycle_comparison, "RESAMPLES_OF_FID", 5)
    rng, runs, results = np.random.default_rng(0), tmp_path / "runs", tmp_path / "docs/results"
    for folder in (results, tmp_path / "docs/figures"):
        folder.mkdir(parents=True)
    for name in ("cycle-arithmetic.json", "cycle-cost.json"):
        (results / name).write_text((ROOT / "docs/results" / name).read_text())
    for run in queue()[:20]:
        captions = {corpus: {one.image_id: one.references[run.seed] for one in few[corpus]} for corpus in few}
        found = {"arm": run.arm, "captioner": run.captioner, "seed": run.seed, "captions": captions}
        (runs / run.name / "pictures/nocaps").mkdir(parents=True)
        if run.drawn:
            found["pictures"] = {}
            for corpus, dataset in few.items():
                found["pictures"][corpus] = {
                    "image_id": [one.image_id for one in dataset],
                    "clip_distance": [{"nocaps": 20, "coco": 30}[corpus] + run.seed] * len(dataset),
                    "features": rng.random((len(dataset), 64)).tolist(),
                }
            for one, picture in zip(few["nocaps"], tiny.pictures(9), strict=True):
                picture.save(runs / run.name / f"pictures/nocaps/{one.image_id}.png")
        (runs / run.name / "result.json").write_text(json.dumps(found))
    assert cycle_report.main(["--runs", str(runs), "--docs", str(tmp_path / "docs")]) == 0
    page = (results / "cycle.md").read_text(encoding="utf-8")
    assert [page.count(f"Claim {n}: ") for n in (9, 10, 14)] == [3, 2, 1]
    assert "| larger BLIP | cycle: (1) to (4) | 1 |" in page
    board = json.loads((results / "claims.json").read_text())["claims"]
    assert {row["claim"]: row["seeds"] for row in board if row["claim"] == 12} == {12: [0]}
    assert (tmp_path / "docs/figures/cycle_pictures.png").stat().st_size > 10_000
    assert len(pd.read_parquet(results / "cycle-captions.parquet")) == 20 * 15
    fourth = pd.read_csv(results / "cycle-table-4.csv")
    assert fourth["all"].str.startswith("20.").all() and fourth["coco"].str.startswith("30.").all()
    assert fourth.loc[fourth["taught with"] == "BLIP", "COCO"].tolist()[0] == "42.48 / 27.08"
    assert "Claim 11: " in capsys.readouterr().out


def test_without_a_run_it_says_what_makes_them(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cycle_report.main(["--runs", str(tmp_path), "--docs", str(tmp_path)])
    assert "`python -m dalleflamingo research cycle` makes them" in capsys.readouterr().err


# ── figures, settings ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_arrow_for_every_gradient_that_is_there():
    norms = {"caption": {"captioner": 0.5, "generator": 0.0}, "generation": {"captioner": 0.0, "generator": 2.0}}
    figure = cycle_figures.gradient_flow(norms)
    [axes] = figure.axes
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 2
    assert {"0.5", "2", "captioner", "generator"} <= {text.get_text() for text in axes.texts}


def test_every_loss_has_a_panel_and_a_running_mean():
    log = [{"step": i, "caption" if i % 2 else "generation": float(i)} for i in range(8)]
    figure = cycle_figures.curves(log, smooth=2)
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step"]
    rows, mean = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(rows) == [1, 3, 5, 7] and list(mean) == [1, 2, 4, 6]


def test_captions_stand_before_and_after(tmp_path):
    [picture] = tiny.pictures(1)
    picture.save(tmp_path / "0.png")
    dataset = Dataset("some", (Example(0, tmp_path / "0.png", ("a",)),))
    table = pd.DataFrame([("start", 0, "a dog"), ("cycle", 0, "a cat")], columns=["arm", "image_id", "caption"])
    figure = cycle_figures.before_and_after(table, dataset, [0], {"start": "before", "cycle": "after"})
    assert isinstance(figure, Figure)
    assert ["before: a dog", "after: a cat"] == [text.get_text() for text in figure.texts][1:3]


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_live_settings_fit_the_profile(name):
    profile = profiles.PROFILES[name]
    config = cycle.settings(profile)
    named = profile.captioner, profile.generator, profile.cycle_steps
    assert (config.captioner, config.generator, config.steps) == named
    real = not profile.generator.startswith("miniature/")
    assert config.checkpointing == real and config.losses.decoded_size == (256 if real else None)
    assert config.batch_size == 8
