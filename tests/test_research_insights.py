"""The claims as functions of a candidate table: verdicts on known effects, and every score held against another way."""

import dataclasses
import json
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dalleflamingo import registry
from dalleflamingo.datasets import DOMAINS, Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.evaluation.image_features import InceptionOutput
from dalleflamingo.intervals import Interval
from dalleflamingo.reconstruct import select
from dalleflamingo.research import claims, insights, pages, ranking, report
from dalleflamingo.similarity import PairSimilarity

KINDS = ("cat", "car", "fish", "boat", "tree", "cup")
COLOURS = ("red", "blue", "green", "pink", "white")


def world(n: int = 24) -> Dataset:
    """n pictures of one thing each, their truth, and three people's words for it."""
    examples = []
    for i in range(n):
        kind, colour = KINDS[i % len(KINDS)], COLOURS[i % len(COLOURS)]
        scene = {"ground": "grass", "things": [{"kind": kind, "colour": colour, "size": "small", "x": 9.0, "y": 9.0}]}
        words = (f"a small {colour} {kind} on the grass", f"there is a {colour} {kind}", f"a little {kind} on the lawn")
        examples.append(Example(i, Path(f"{i}.png"), words, DOMAINS[i % 3], {"scene": scene}))
    return Dataset("miniature/one thing", tuple(examples))


def candidates(dataset: Dataset) -> pd.DataFrame:
    """Four captions each, in another order for each picture: F1 of 1, 0.4, 2/3 and 0."""
    rng, rows = np.random.default_rng(1), []
    for example in dataset:
        thing = example.extra["scene"]["things"][0]
        other = KINDS[(KINDS.index(thing["kind"]) + 1) % len(KINDS)]
        full = f"a small {thing['colour']} {thing['kind']} on the grass"
        captions = [full, f"a {thing['kind']}", f"a {thing['colour']} {thing['kind']}", f"there is a {other}"]
        for k, at in enumerate(rng.permutation(4)):
            row = {"image_id": example.image_id, "domain": example.domain, "candidate": k}
            rows.append(row | {"caption": captions[at]})
    return pd.DataFrame(rows).assign(clip=rng.normal(size=len(rows)), dino=rng.normal(size=len(rows)))


@pytest.fixture(scope="module")
def judged() -> ranking.EvaluatedCandidates:
    dataset = world()
    beam = {example.image_id: example.references[1] for example in dataset}
    return ranking.evaluate_captions(candidates(dataset), dataset, beam)


def ranked_by(judged: ranking.EvaluatedCandidates, clip: np.ndarray) -> ranking.EvaluatedCandidates:
    return dataclasses.replace(judged, table=judged.table.assign(clip=clip))


def overall(judged: ranking.EvaluatedCandidates, clip: np.ndarray) -> claims.Claim:
    return insights.claim_2(ranking.measure(ranked_by(judged, clip), resamples=300))[0]


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ranking_by_the_truth_holds_and_by_its_opposite_does_not(judged):
    for_truth, against = overall(judged, judged.table["f1"]), overall(judged, -judged.table["f1"])
    assert (for_truth.verdict, against.verdict) == ("holds", "does not hold")
    assert for_truth.effect.value > 0 > against.effect.value


def test_a_ranking_by_noise_is_undecided(judged):
    verdicts = Counter(overall(judged, np.random.default_rng(seed).normal(size=96)).verdict for seed in range(8))
    assert verdicts["undecided"] >= 6  # 95 % intervals: more than two misses in eight happen once in 170 times


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 2, "holds"), (-2, -0.1, "does not hold"), (-1, 1, "undecided"), (0, 2, "undecided"),
        (-2, 0, "undecided"), (float("nan"), float("nan"), "undecided"),
    ],
)  # fmt: skip
def test_a_verdict_needs_the_whole_interval_beyond_0(low, high, word):
    assert claims.verdict(Interval((low + high) / 2, low, high, 24, 0)) == word


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def stock(judged: ranking.EvaluatedCandidates, dataset: Dataset, chosen: pd.DataFrame) -> dict[str, float]:
    """pycocoevalcap on one caption an image, × 100."""
    references = {example.image_id: list(example.references) for example in dataset}
    predictions = dict(zip(chosen["image_id"], chosen["caption"], strict=True))
    found = caption_metrics.evaluate({i: references[i] for i in predictions}, predictions)
    return {"cider": 100 * found["CIDEr"].value, "bleu4": 100 * found["BLEU-4"].value}


def test_the_caption_ranked_first_scores_as_pycocoevalcap_says_overall_and_in_each_domain(judged):
    effects, dataset = ranking.measure(judged, resamples=2), world()
    chosen = select(judged.table, "dino")
    for domain in ("all", *DOMAINS):
        inside = chosen if domain == "all" else chosen[chosen["domain"] == domain]
        for metric, value in stock(judged, dataset, inside).items():
            assert ranking.scores(effects, metric, "dino 1")[domain].value == pytest.approx(value, abs=1e-6)


def test_each_domain_is_drawn_again_independently(judged):
    """`most_out_of_domain` takes the bootstraps of two domains to be independent."""
    seeds = ranking.measure(judged, resamples=2).groupby("domain")["seed"].unique()
    assert all(len(own) == 1 for own in seeds) and len(set(seeds.str[0])) == len(seeds) == 4


def test_a_resample_scores_as_pycocoevalcap_says_of_that_corpus(judged):
    """N-gram statistics come from the images as drawn, an image drawn twice counting twice."""
    drawn = np.random.default_rng(3).integers(24, size=24)
    corpus = judged.picks()["clip 1"][:, drawn]
    rows, dataset = judged.table.iloc[corpus[0]], world()
    references = {place: list(dataset[int(i)].references) for place, i in enumerate(rows["image_id"])}
    found = caption_metrics.evaluate(references, dict(enumerate(rows["caption"])))
    assert judged.metrics["cider"](corpus) == pytest.approx(100 * found["CIDEr"].value, abs=1e-6)
    assert judged.metrics["bleu4"](corpus) == pytest.approx(100 * found["BLEU-4"].value, abs=1e-6)
    assert judged.metrics["f1"](corpus) == pytest.approx(rows["f1"].mean())


def test_random_is_the_exact_mean_over_the_candidates(judged):
    effects = ranking.measure(judged, resamples=2)
    for metric in ("cider", "f1"):
        assert ranking.scores(effects, metric, "random")["all"].value == pytest.approx(judged.table[metric].mean())
    draws = judged.picks()["random"]
    assert len(draws) >= 20 and set(Counter(draws.ravel()).values()) == {len(draws) // 4}


def test_gains_by_domain_are_those_computed_by_hand():
    """F1 of the three captions: 1, 0.4, 0; at random 7/15. In domain the best is ranked first, out of it the worst."""
    scene = {"ground": "grass", "things": [{"kind": "cat", "colour": "red", "size": "small", "x": 9.0, "y": 9.0}]}
    domains = ["in-domain", "in-domain", "out-domain", "in-domain", "out-domain"]
    examples = [Example(i, Path("x.png"), ("a red cat",), d, {"scene": scene}) for i, d in enumerate(domains)]
    captions = {"a small red cat on the grass": 1.0, "a cat": 0.4, "a fish": 0.0}
    rows = [
        {"image_id": i, "domain": d, "caption": c, "clip": f1 if d == "in-domain" else -f1}
        for i, d in enumerate(domains)
        for c, f1 in captions.items()
    ]
    judged = ranking.evaluate_captions(pd.DataFrame(rows), Dataset("five cats", tuple(examples)))
    effects = ranking.measure(judged, resamples=200)
    gains = ranking.gains(effects, "f1", "clip")
    assert {domain: gain.n for domain, gain in gains.items()} == {"all": 5, "in-domain": 3, "out-domain": 2}
    assert gains["in-domain"].value == pytest.approx(8 / 15) and gains["in-domain"].low == pytest.approx(8 / 15)
    assert gains["out-domain"].value == pytest.approx(-7 / 15)
    assert gains["all"].value == pytest.approx((3 * 8 - 2 * 7) / 75)
    assert [point.value for point in ranking.curves(effects, "f1", "in-domain")["clip"]] == pytest.approx([1, 0.4, 0])
    assert ranking.scores(effects, "f1", "oracle")["all"].value == 1
    difference = insights.most_out_of_domain(effects, "f1", "clip")
    assert list(difference) == ["in-domain"] and difference["in-domain"].value == pytest.approx(-1)


def test_the_spread_of_a_difference_of_gains_is_that_of_independent_ones():
    """Where intervals are symmetric, half widths add like standard deviations."""
    rows = [("all", 1, 2), ("in-domain", 1, 3), ("out-domain", 5, 4)]
    gain = [{"domain": d, "gain": g, "gain_low": g - half, "gain_high": g + half} for d, g, half in rows]
    effects = pd.DataFrame(gain).assign(metric="cider", pick="clip 1", n=50, seed=0)
    assert insights.most_out_of_domain(effects, "cider", "clip") == {"in-domain": Interval(4, -1, 9, 100, 0)}


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_similarities_of_other_images_gain_nothing(judged):
    perfect, f1 = ranked_by(judged, judged.table["f1"]), judged.metrics["f1"]
    ours = f1(perfect.picks()["clip 1"])[0] - judged.table["f1"].mean()
    chance = ranking.shuffle(perfect, "clip", "f1")
    assert chance.low < 0 < chance.high < ours and abs(chance.value) < 0.1 * ours
    gain = ranking.gains(ranking.measure(perfect, resamples=300), "f1", "clip shuffled")["all"]
    assert gain.low < 0 < gain.high


@given(n=st.integers(2, 60), seed=st.integers(0, 2**32 - 1))
def test_a_shuffle_gives_every_image_another_one(n, seed):
    other = ranking._others(np.random.default_rng(seed), n)
    assert sorted(other) == list(range(n)) and (other != np.arange(n)).all()


def test_beam_search_captions_are_scored_beside_the_candidates(judged):
    effects, dataset = ranking.measure(judged, resamples=2), world()
    beam = pd.DataFrame({"image_id": [e.image_id for e in dataset], "caption": [e.references[1] for e in dataset]})
    assert ranking.scores(effects, "cider", "beam")["all"].value == pytest.approx(stock(judged, dataset, beam)["cider"])
    assert len(judged.table) == 4 * len(dataset)  # and are no candidates


def test_rank_correlation_is_scipys_and_images_without_one_are_counted(judged):
    table = judged.table.copy()
    table.loc[table["image_id"] == 5, "f1"] = 0.4
    found = ranking.correlate(table, resamples=50).set_index(["ranked_by", "metric"])
    rho = [spearmanr(own["clip"], own["f1"]).statistic for i, own in table.groupby("image_id") if i != 5]
    assert found.loc[("clip", "f1"), "rho"] == pytest.approx(np.mean(rho))
    assert found.loc[("clip", "f1"), ["n", "undefined"]].tolist() == [23, 1]
    assert found.loc[("clip", "cider"), ["n", "undefined"]].tolist() == [24, 0]


def test_images_without_human_captions_cannot_be_judged():
    examples = tuple(Example(i, Path("x.png"), ("a cat",) if i else ()) for i in range(2))
    table = pd.DataFrame({"image_id": [0, 0, 1, 1], "caption": ["a cat"] * 4, "clip": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match=r"1 of 2 images have no human captions in mine \(such as \[0\]\)"):
        ranking.evaluate_captions(table, Dataset("mine", examples))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Generator(fakes.Generator):
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=SimpleNamespace(timestep_spacing="trailing")))


class Likeness(fakes.MeanColour):
    name = "clip"


BASELINES = {"length": 4, "likelihood": -1.0, "consensus": 2.0, "clip_score": 0.5}


class Faithfulness(fakes.Corner):
    name = "fidelity"


def test_the_command_writes_table_page_figures_and_claims_and_again_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "dataset", lambda name: fakes.dataset(tmp_path / "source"))
    monkeypatch.setattr(insights, "load_models", lambda profile: (fakes.Captioner(), Generator(), [Likeness()]))
    monkeypatch.setattr(insights, "RESAMPLES", 20)
    monkeypatch.setattr(insights.FeatureExtractor, "of", lambda name, device: None)
    monkeypatch.setattr(insights, "Fidelity", lambda extractor: Faithfulness())
    monkeypatch.setattr(insights.ClipText, "from_pretrained", lambda **where: None)
    monkeypatch.setattr(insights.baselines, "add", lambda table, *rest: table.assign(**BASELINES))
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    where = fakes.dataset(tmp_path / "source").name
    other = {"claim": 13, "verdict": "holds", "dataset": where}
    stale = {"claim": 2, "verdict": "does not hold", "dataset": where}
    (docs / "results" / "claims.json").write_text(json.dumps({"claims": [other, stale]}))
    arguments = ["insight-1", "--images", "8", "--candidates", "3"]
    arguments += ["--run", str(tmp_path / "run"), "--docs", str(docs)]

    assert insights.main(arguments) == 0
    made = {path.relative_to(docs): path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    figures, tables = {"rank_curve.png", "gains.png"}, {"insight-1.parquet", "insight-1-intervals.csv", "claims.json"}
    assert {path.name for path in made} == figures | tables | {"insight-1.md"}
    claims = json.loads(made[Path("results/claims.json")])["claims"]
    assert [row["claim"] for row in claims] == [1, 2, 2, 13] and claims[3] == other
    assert {"claim", "verdict", "effect", "low", "high", "n", "seeds", "profile"} <= claims[0].keys()
    assert claims[1]["n"] == 8 and claims[1]["verdict"] in capsys.readouterr().out
    table, effects = report.load("insight-1", docs / "results")
    assert table.attrs["candidates"] == 3 and len(table) == 24
    assert insights.claim_2(effects)[0].effect.value == pytest.approx(claims[1]["effect"], abs=1e-4)

    assert insights.main(arguments) == 0
    assert {path.relative_to(docs): path.read_bytes() for path in docs.rglob("*") if path.is_file()} == made


def test_the_other_command_judges_pictures_and_decides_claims_3_and_4(tmp_path, monkeypatch):
    class Seen:
        name = "three colours"

        def look(self, images):
            colours = torch.tensor(np.array([np.asarray(image).mean((0, 1)) for image in images]), dtype=torch.float32)
            return InceptionOutput(colours, colours)

    monkeypatch.setattr(registry, "dataset", lambda name: fakes.dataset(tmp_path / "source"))
    models = fakes.Captioner(), Generator(), [Likeness(), Likeness()]
    monkeypatch.setattr(insights, "load_models", lambda profile: models)
    texts = [
        PairSimilarity("text_clip", lambda source, text: float(text.split()[3])),
        PairSimilarity("text_cider", lambda source, text: float(text.split()[5])),
    ]
    monkeypatch.setattr(insights, "load_text_similarities", lambda profile, corpus: texts)
    monkeypatch.setattr(insights, "EMBEDDINGS", ("text_clip",))
    monkeypatch.setattr(insights, "OVERLAPS", ("text_cider",))
    monkeypatch.setattr(insights.FeatureExtractor, "of", lambda name, device: Seen())
    monkeypatch.setattr(insights, "RESAMPLES_OF_PICTURES", 20)
    docs = tmp_path / "docs"
    arguments = ["insight-2", "--images", "8", "--candidates", "4", "--run", str(tmp_path / "run"), "--docs", str(docs)]
    assert insights.main(arguments) == 0
    rows = json.loads((docs / "results/claims.json").read_text())["claims"]
    assert [(row["claim"], row["ranked_by"]) for row in rows[:2]] == [(3, "all"), (4, "text_clip")] and len(rows) == 3
    assert rows[0]["apart"] != {} and {row["n"] for row in rows[1:]} == {8}
    table, effects = report.load("insight-2", docs / "results")
    assert table.attrs["judges"] == "three colours" and {"clip_distance", "recovered"} <= set(table)
    page = (docs / "results/insight-2.md").read_text(encoding="utf-8")
    assert "Insight II" in page and "FID (lower is better)" in page and "40.54 → 33.47 (-7.1)" in page
    assert (docs / "figures/rank_curve_texts_fid.png").exists()


def pictures_judged(better: bool) -> ranking.EvaluatedCandidates:
    """Four pictures of each of 30 captions; the similarity follows what is good, or its opposite."""
    rng, rows = np.random.default_rng(0), np.arange(120).reshape(30, 4)
    good = rng.normal(size=120)
    table = pd.DataFrame({"image_id": np.repeat(range(30), 4), "clip_distance": -good, "dino_distance": -good})
    columns = {"text_sbert": good if better else -good, "text_wmd": rng.normal(size=120), "found": good}
    means = {"clip_distance": -good, "fid": 5 - good, "is": 2 + good}
    corpus = {name: lambda pick, values=values: values[pick].mean(axis=-1) for name, values in means.items()}
    return ranking.EvaluatedCandidates(table.assign(**columns), rows, np.array([None] * 30, object), corpus)


@pytest.mark.parametrize(("better", "word"), [(True, "holds"), (False, "does not hold")])
def test_claims_on_pictures_are_signed_so_that_the_papers_side_is_above_0(better, word, monkeypatch):
    monkeypatch.setattr(insights, "EMBEDDINGS", ("text_sbert",))
    monkeypatch.setattr(insights, "OVERLAPS", ("text_wmd",))
    judged = pictures_judged(better)
    effects = ranking.measure(judged, resamples=200)
    by_truth = next(claim for claim in insights.claim_4(effects) if claim.ranked_by == "text_sbert")
    assert by_truth.verdict == word and len(by_truth.apart) == 2
    assert all(claims.verdict(other) == word for other in by_truth.apart.values())
    [claim] = insights.claim_3(judged.table, ranking.correlate(judged.ranked))
    assert claim.verdict == word and (claim.effect.value > 0) == better
    [difference] = claim.apart.values()
    assert (difference.low > 0) if better else (difference.high < 0)


def test_claim_4_wants_all_three_columns(monkeypatch):
    judged = pictures_judged(True)
    against = dataclasses.replace(judged, metrics=judged.metrics | {"fid": lambda pick: -judged.metrics["fid"](pick)})
    claim = next(c for c in insights.claim_4(ranking.measure(against, resamples=200)) if c.ranked_by == "text_sbert")
    assert claim.verdict == "does not hold" and "weakest is FID" in claim.text


def test_where_all_must_hold_an_undecided_effect_decides_before_a_small_one():
    small, wide = Interval(1.0, 0.05, 3.0, 9, 0), Interval(2.0, -0.1, 3.0, 9, 0)
    wrong, sure, none = Interval(-9.0, -20.0, -0.1, 9, 0), Interval(0.9, 0.8, 1.0, 9, 0), Interval(0.0, 0.0, 0.0, 9, 0)
    for one_unit in (True, False):
        assert claims.weakest_of({"small": small, "wide": wide}, one_unit) == "wide"
        assert claims.weakest_of({"small": small, "wide": wide, "wrong": wrong}, one_unit) == "wrong"
        assert claims.weakest_of({"none": none, "small": small}, one_unit) == "none"
    assert claims.weakest_of({"sure": sure, "small": small}) == "sure"
    assert claims.weakest_of({"sure": sure, "small": small}, one_unit=False) == "small"


def test_claim_1_takes_the_mean_over_all_pairs(judged):
    correlations = ranking.correlate(ranked_by(judged, judged.table["f1"]).table, resamples=50)
    [claim] = insights.claim_1(correlations)
    pairs = correlations[correlations["metric"] != "all"]
    assert len(pairs) == 6 and claim.effect.value == pytest.approx(pairs["rho"].mean(), abs=0.02)


@pytest.mark.skipif(not (report.SHIPPED / "insight-1.parquet").exists(), reason="insight I is not measured here yet")
def test_the_shipped_claims_follow_from_the_shipped_table():
    table, effects = report.load("insight-1")
    shipped = [row for row in json.loads((report.SHIPPED / "claims.json").read_text())["claims"] if row["claim"] == 2]
    assert [(row["ranked_by"], row["verdict"]) for row in shipped] == [
        (claim.ranked_by, claim.verdict) for claim in insights.claim_2(effects)
    ]
    judged = ranking.evaluate_captions(table, registry.dataset(table.attrs["dataset"])).first(table.attrs["ranked"])
    again = ranking.measure(judged, resamples=100)
    for row in shipped:
        gain = ranking.gains(again, "cider", row["ranked_by"])["all"]
        assert (row["n"], row["effect"]) == (gain.n, pytest.approx(gain.value, abs=1e-3))
        width = row["high"] - row["low"]  # other draws: the bounds agree to the noise of 100 resamples
        assert abs(row["low"] - gain.low) < 0.35 * width and abs(row["high"] - gain.high) < 0.35 * width
    page = (report.SHIPPED / "insight-1.md").read_text(encoding="utf-8")
    assert "Measured in the miniature" in page and all(row["verdict"] in page for row in shipped)
    assert (report.SHIPPED / "insight-1.parquet").stat().st_size < 5e6


def test_a_finding_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"insight-1 is not measured in .*git checkout -- .*make reproduce"):
        report.load("insight-1", tmp_path)


def test_a_page_from_the_miniature_says_so_and_ones_from_elsewhere_do_not(judged):
    effects = ranking.measure(judged, resamples=20)
    correlations, claims = ranking.correlate(judged.ranked, resamples=20), insights.claim_2(effects)
    chance = {by: {m: ranking.shuffle(judged, by, m, 20) for m in judged.metrics} for by in ("clip", "dino")}
    for dataset, said in (("miniature/nocaps", True), ("nocaps", False)):
        settings = report.Settings("make", "mini", dataset, 4, 4, "p", 20, 4.0, "DDPM", "PTB", 20, 0)
        insight = report.Insight("insight-1", judged.table, effects, correlations, claims, chance, settings)
        text = report.page(insight)
        assert ("Measured in the miniature" in text) == said
        assert "| overall | 24 |" in text and "74.1 → 80.3 (+6.2)" in text


def test_the_commit_of_a_result_is_dirty_where_code_or_data_changed_and_not_where_docs_did(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(pages, "__file__", str(tmp_path / "package/research/pages.py"))
    for name in ("package/research", "data", "docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("as committed")
    assert pages.current_commit() == "not in a git checkout"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = pages.current_commit()
    (tmp_path / "docs/file").write_text("measured")
    assert len(clean) == 12 and pages.current_commit() == clean
    (tmp_path / "data/file").write_text("retrained")
    assert pages.current_commit() == f"{clean}-dirty"
