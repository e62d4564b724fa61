"""The claims as functions of a candidate table: verdicts on known effects, and every score held against another way."""

import dataclasses
import json
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
from own_git import git
from scipy.stats import spearmanr
from worlds import NAME, ThreeColours, candidates, world

from dalleflamingo.datasets import DOMAINS, Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.evaluation.intervals import Interval, resample
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.profiles import PROFILES
from dalleflamingo.reconstruct import JourneySettings, select
from dalleflamingo.research import claims, insights, metrics, pages, ranking, report
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.image_ranking import ImageEvaluators
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import Selection
from dalleflamingo.runs import RunFolderError
from dalleflamingo.similarity import Encoder
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import Models


@pytest.fixture(scope="module")
def evaluated() -> ranking.EvaluatedCandidates:
    dataset = world()
    beam = {example.image_id: example.references[1] for example in dataset}
    return evaluate_captions(candidates(dataset), dataset, beam)


def ranked_by(evaluated: ranking.EvaluatedCandidates, clip: np.ndarray) -> ranking.EvaluatedCandidates:
    return dataclasses.replace(evaluated, table=evaluated.table.assign(clip=clip))


def overall(evaluated: ranking.EvaluatedCandidates, clip: np.ndarray) -> claims.Claim:
    return insights.claim_2(ranking.measure(ranked_by(evaluated, clip), resamples=300))[0]


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_ranking_by_the_truth_holds_and_by_its_opposite_does_not(evaluated):
    for_truth, against = overall(evaluated, evaluated.table["f1"]), overall(evaluated, -evaluated.table["f1"])
    assert (for_truth.verdict, against.verdict) == ("holds", "does not hold")
    assert for_truth.effect.value > 0 > against.effect.value


def test_a_ranking_by_noise_is_undecided(evaluated):
    verdicts = Counter(overall(evaluated, np.random.default_rng(seed).normal(size=96)).verdict for seed in range(8))
    assert verdicts["undecided"] >= 6  # 95 % intervals: more than two misses in eight happen once in 170 times


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 2, "holds"),
        (-2, -0.1, "does not hold"),
        (-1, 1, "undecided"),
        (0, 2, "undecided"),
        (-2, 0, "undecided"),
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_0(low, high, word):
    assert claims.verdict(Interval((low + high) / 2, low, high, 24, 0)) == word


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def stock(evaluated: ranking.EvaluatedCandidates, dataset: Dataset, chosen: pd.DataFrame) -> dict[str, float]:
    """pycocoevalcap on one caption an image, × 100."""
    references = {example.image_id: list(example.references) for example in dataset}
    predictions = dict(zip(chosen["image_id"], chosen["caption"], strict=True))
    found = caption_metrics.evaluate({i: references[i] for i in predictions}, predictions)
    names = {"cider": "CIDEr", "bleu3": "BLEU-3", "bleu4": "BLEU-4"}
    return {metric: 100 * found[name].value for metric, name in names.items()}


def test_the_caption_ranked_first_scores_as_pycocoevalcap_says_overall_and_in_each_domain(evaluated):
    effects, dataset = ranking.measure(evaluated, resamples=2), world()
    chosen = select(evaluated.table, "dino")
    for domain in ("all", *DOMAINS):
        inside = chosen if domain == "all" else chosen[chosen["domain"] == domain]
        for metric, value in stock(evaluated, dataset, inside).items():
            assert ranking.scores(effects, metric, "dino")[domain].value == pytest.approx(value, abs=1e-6)


def test_each_domain_is_drawn_again_independently(evaluated):
    """`most_out_of_domain` takes the bootstraps of two domains to be independent."""
    seeds = ranking.measure(evaluated, resamples=2).groupby("domain")["seed"].unique()
    assert all(len(own) == 1 for own in seeds) and len(set(seeds.str[0])) == len(seeds) == 4


def test_a_resample_scores_as_pycocoevalcap_says_of_that_corpus(evaluated):
    """N-gram statistics come from the images as drawn, an image drawn twice counting twice."""
    drawn = np.random.default_rng(3).integers(24, size=24)
    corpus = evaluated.ranked_at("clip")[:, drawn]
    rows, dataset = evaluated.table.iloc[corpus[0]], world()
    references = {place: list(dataset[int(i)].references) for place, i in enumerate(rows["image_id"])}
    found = caption_metrics.evaluate(references, dict(enumerate(rows["caption"])))
    assert evaluated.metrics["cider"](corpus) == pytest.approx(100 * found["CIDEr"].value, abs=1e-6)
    assert evaluated.metrics["bleu3"](corpus) == pytest.approx(100 * found["BLEU-3"].value, abs=1e-6)
    assert evaluated.metrics["bleu4"](corpus) == pytest.approx(100 * found["BLEU-4"].value, abs=1e-6)
    assert evaluated.metrics["f1"](corpus) == pytest.approx(rows["f1"].mean())


def test_random_is_the_exact_mean_over_the_candidates(evaluated):
    effects = ranking.measure(evaluated, resamples=2)
    for metric in ("cider", "f1"):
        assert ranking.scores(effects, metric, "random")["all"].value == pytest.approx(evaluated.table[metric].mean())
    draws = evaluated.selections()[Selection("random", k=4)]
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
    evaluated = evaluate_captions(pd.DataFrame(rows), Dataset("five cats", tuple(examples)))
    effects = ranking.measure(evaluated, resamples=200)
    gains = ranking.gains(effects, "f1", "clip")
    assert {domain: gain.n for domain, gain in gains.items()} == {"all": 5, "in-domain": 3, "out-domain": 2}
    assert gains["in-domain"].value == pytest.approx(8 / 15) and gains["in-domain"].low == pytest.approx(8 / 15)
    assert gains["out-domain"].value == pytest.approx(-7 / 15)
    assert gains["all"].value == pytest.approx((3 * 8 - 2 * 7) / 75)
    by_rank = [ranking.scores(effects, "f1", "clip", rank) for rank in (1, 2, 3)]
    assert [score["in-domain"].value for score in by_rank] == pytest.approx([1, 0.4, 0])
    assert ranking.curves(effects, "f1") == {"clip": [score["all"] for score in by_rank]}
    assert ranking.scores(effects, "f1", "oracle")["all"].value == 1
    difference = insights.most_out_of_domain(effects, "f1", "clip")
    assert list(difference) == ["in-domain"] and difference["in-domain"].value == pytest.approx(-1)


def test_the_spread_of_a_difference_of_gains_is_that_of_independent_ones():
    """Where intervals are symmetric, half widths add like standard deviations."""
    rows = [("all", 1, 2), ("in-domain", 1, 3), ("out-domain", 5, 4)]
    found = [
        ("cider", Selection("clip", 1, 5), gain, gain)
        for gain in (Interval(g, g - h, g + h, 50, 0) for _, g, h in rows)
    ]
    effects = ranking.effects_table(found).assign(domain=[domain for domain, *_ in rows])
    assert insights.most_out_of_domain(effects, "cider", "clip") == {"in-domain": Interval(4, -1, 9, 100, 0)}


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_similarities_of_other_images_gain_nothing(evaluated):
    perfect, f1 = ranked_by(evaluated, evaluated.table["f1"]), evaluated.metrics["f1"]
    ours = f1(perfect.ranked_at("clip"))[0] - evaluated.table["f1"].mean()
    chance = ranking.gain_of_chance(perfect, "clip", "f1")
    assert chance.low < 0 < chance.high < ours and abs(chance.value) < 0.1 * ours
    gain = ranking.gains(ranking.measure(perfect, resamples=300), "f1", "clip", shuffled=True)["all"]
    assert gain.low < 0 < gain.high


@given(n=st.integers(2, 60), seed=st.integers(0, 2**32 - 1))
def test_a_shuffle_gives_every_image_another_one(n, seed):
    other = ranking.derangement(np.random.default_rng(seed), n)
    assert sorted(other) == list(range(n)) and (other != np.arange(n)).all()


def test_beam_search_captions_are_scored_beside_the_candidates(evaluated):
    effects, dataset = ranking.measure(evaluated, resamples=2), world()
    beam = pd.DataFrame({"image_id": [e.image_id for e in dataset], "caption": [e.references[1] for e in dataset]})
    assert ranking.scores(effects, "cider", "beam")["all"].value == pytest.approx(
        stock(evaluated, dataset, beam)["cider"]
    )
    assert len(evaluated.table) == 4 * len(dataset)  # and are no candidates


def test_no_captions_by_beam_search_is_as_none():
    dataset = world(4)
    evaluated = evaluate_captions(candidates(dataset), dataset, beam={})
    assert evaluated.beam is None
    assert "beam" not in set(ranking.measure(evaluated, resamples=2)["ranked_by"])


def test_rank_correlation_is_scipys_and_images_without_one_are_counted(evaluated):
    table = evaluated.table.copy()
    table.loc[table["image_id"] == 5, "f1"] = 0.4
    found = ranking.correlate(table, resamples=50).set_index(["ranked_by", "metric"])
    rho = [spearmanr(own["clip"], own["f1"]).statistic for i, own in table.groupby("image_id") if i != 5]
    assert found.loc[("clip", "f1"), "rho"] == pytest.approx(np.mean(rho))
    assert found.loc[("clip", "f1"), ["n", "undefined"]].tolist() == [23, 1]
    assert found.loc[("clip", "cider"), ["n", "undefined"]].tolist() == [24, 0]


def test_images_without_human_captions_cannot_be_evaluated():
    examples = tuple(Example(i, Path("x.png"), ("a cat",) if i else ()) for i in range(2))
    table = pd.DataFrame({"image_id": [0, 0, 1, 1], "caption": ["a cat"] * 4, "clip": [1, 2, 3, 4]})
    with pytest.raises(ValueError, match=r"1 of 2 images have no human captions in mine \(such as \[0\]\)"):
        evaluate_captions(table, Dataset("mine", examples))


def test_intervals_of_metrics_that_resampling_biases_lie_around_their_values(evaluated):
    """CIDEr's levels and gains; BLEU's and F1's stay where the resamples are."""
    effects, first = ranking.measure(evaluated, resamples=200), evaluated.ranked_at("clip")
    for metric, shifted in (("cider", True), ("bleu4", False), ("f1", False)):
        score = evaluated.metrics[metric]
        value, drawn = resample(lambda images, score=score: score(first[:, images]), 24, 200)
        assert (abs(drawn.mean() - value) > 1) == shifted  # two words in three are the same in all of 24 images
        low, high = np.quantile(drawn + (value - drawn.mean() if shifted else 0), [0.025, 0.975])
        found = ranking.scores(effects, metric, "clip")["all"]
        assert (found.low, found.high) == pytest.approx((low, high))
    gain = ranking.gains(ranking.measure(ranked_by(evaluated, evaluated.table["f1"]), resamples=200), "cider", "clip")
    assert gain["all"].low < gain["all"].value < gain["all"].high


def test_texts_are_compared_with_the_references_by_each_encoder(evaluated):
    dataset = world()
    beam = {example.image_id: example.references[1] for example in dataset}
    encoders = {"clip_text": ClipText(), "sbert": fakes_sbert()}
    again = evaluate_captions(candidates(dataset), dataset, beam, encoders=encoders)
    row = again.table.iloc[7]
    for name, encoder in encoders.items():
        gold = encoder.embed(dataset[int(row["image_id"])].references).double()
        cosine = torch.cosine_similarity(encoder.embed([row["caption"]]).double(), gold).mean()
        assert row[name] == pytest.approx(cosine.item())
        assert again.metrics[name](again.rows[:, :1].T) == pytest.approx(again.table[name][again.rows[:, 0]].mean())
        assert len(again.metrics[name](again.beam[None])) == 1  # captions by beam search have it, too
    assert ranking.similarities(again.table) == ["clip", "dino"]  # scores of captions rank nothing


def test_a_spice_that_fails_loses_nothing_else(monkeypatch, evaluated):
    def fails(references, predictions):
        raise caption_metrics.MetricUnavailable("SPICE failed on 24 captions")

    monkeypatch.setattr(caption_metrics, "spice_available", lambda: True)
    monkeypatch.setattr(caption_metrics, "spice", fails)
    with pytest.warns(UserWarning, match="without SPICE: SPICE failed on 24"):
        again = evaluate_captions(candidates(world()), world())
    assert again.metrics.keys() == evaluated.metrics.keys() and "spice" not in again.table


def test_spice_is_asked_for_one_caption_an_image_at_a_time_and_once_for_each(monkeypatch):
    calls = []

    def spice(references, predictions):
        calls.append(predictions)
        assert references.keys() == predictions.keys() and all(len(texts) == 3 for texts in references.values())
        return SimpleNamespace(per_item={i: len(caption) / 100 + i for i, caption in predictions.items()})

    monkeypatch.setattr(caption_metrics, "spice_available", lambda: True)
    monkeypatch.setattr(caption_metrics, "spice", spice)
    dataset, table = world(4), candidates(world(4))
    table.loc[table["candidate"] == 3, "caption"] = table.loc[table["candidate"] == 0, "caption"].to_numpy()
    found = evaluate_captions(table, dataset).table
    assert [len(call) for call in calls] == [4, 4, 4]
    assert found["spice"].to_numpy() == pytest.approx(found["caption"].str.len() + 100 * found["image_id"])


def test_photographs_without_spice_say_what_to_install(monkeypatch):
    monkeypatch.setattr(caption_metrics, "spice_available", lambda: False)
    photographs = Dataset("mine", tuple(dataclasses.replace(example, extra={}) for example in world(4)))
    with pytest.warns(UserWarning, match="without SPICE: SPICE "):
        evaluated = evaluate_captions(candidates(world(4)), photographs)
    [claim] = insights.claim_1(ranking.correlate(evaluated.table, resamples=5))
    assert "mean over 4 of the 12 primary pairs" in claim.text  # CLIP and DINO, CIDEr and BLEU-4


@pytest.mark.skipif(not caption_metrics.spice_available(), reason=caption_metrics.missing_for_spice())
def test_spice_is_that_of_pycocoevalcap_and_f1_takes_its_part_in_claim_1():
    dataset = world(4)
    evaluated = evaluate_captions(candidates(dataset), dataset)
    table, references = evaluated.table, {example.image_id: list(example.references) for example in dataset}
    first = table[table["candidate"] == 0].set_index("image_id")
    stock = caption_metrics.spice(references, first["caption"].to_dict())
    assert first["spice"].to_dict() == pytest.approx({i: 100 * value for i, value in stock.per_item.items()})
    assert evaluated.metrics["spice"](evaluated.rows[:, :1].T) == pytest.approx(100 * stock.value)
    assert "spice" not in set(ranking.correlate(table, resamples=5)["metric"])
    assert "spice" in set(ranking.correlate(table.drop(columns="f1"), resamples=5)["metric"])


# ── tables of effects ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_of_effects_is_read_back_from_a_file_as_it_was(evaluated, tmp_path):
    effects = ranking.measure(evaluated, resamples=3)
    effects.to_csv(tmp_path / "effects.csv", index=False)
    again = pd.read_csv(tmp_path / "effects.csv")
    assert list(again) == list(ranking.EFFECT_COLUMNS)
    for read in (ranking.scores, ranking.gains):
        for way in (
            {"ranked_by": "random"},
            {"ranked_by": "beam"},
            {"ranked_by": "oracle"},
            {"ranked_by": "dino", "rank": 3},
        ):
            ours, theirs = read(effects, "f1", **way), read(again, "f1", **way)
            assert ours.keys() == theirs.keys() == {"all", *DOMAINS}
            assert ours["all"].value == pytest.approx(theirs["all"].value) and ours["all"].n == theirs["all"].n == 24
    assert ranking.curves(again, "f1").keys() == {"clip", "dino"}


def test_a_selection_that_was_not_measured_is_answered_by_those_that_were(evaluated):
    effects = ranking.measure(evaluated, resamples=3)
    with pytest.raises(KeyError, match="nothing measured of 'f1' .*ranked_by='sbert'.*ranked_by random, clip, dino"):
        ranking.scores(effects, "f1", "sbert")
    with pytest.raises(KeyError, match="nothing measured .*rank=5.*rank 1, 2, 3, 4"):
        ranking.gains(effects, "f1", "clip", 5)
    two = pd.concat([effects, effects.assign(k=2)])
    with pytest.raises(KeyError, match="more than one number of candidates measured"):
        ranking.gains(two, "f1", "clip")
    assert ranking.gains(two, "f1", "clip", k=2) == ranking.gains(effects, "f1", "clip")


# ── the insights ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Generator(fakes.Generator):
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(config=SimpleNamespace(timestep_spacing="trailing")))


class Captioner(fakes.Captioner):
    pad_id = -1

    def token_logits(self, images, captions):
        return fakes.logits_with(torch.tensor([-float(len(caption)) for caption in captions]))


class Clip(fakes.MeanColour):
    name = "clip"


class Fidelity(fakes.Corner):
    name = "fidelity"


class ClipText(Encoder):
    name = "text"

    def embed(self, items):
        return torch.tensor([[float(len(item)), item.count("e"), 1.0] for item in items])


def fakes_sbert() -> Encoder:
    sbert = ClipText()
    sbert.embed = lambda items: torch.tensor([[float(item.count(letter)) for letter in "aeionst"] for item in items])
    return sbert


SETTINGS = JourneySettings(candidates=3, steps=2, guidance_scale=4.0)


@pytest.fixture
def colours(tmp_path) -> Dataset:
    """Eight images, under the name of a data set that is shipped."""
    return dataclasses.replace(fakes.dataset(tmp_path / "source", n=8), name=NAME)


def files(docs: Path) -> dict[Path, bytes]:
    return {path.relative_to(docs): path.read_bytes() for path in docs.rglob("*") if path.is_file()}


def test_insight_1_leaves_table_page_figures_and_claims_and_again_the_same(tmp_path, colours):
    docs, models = tmp_path / "docs", [Captioner(), Generator(), [Clip(), Fidelity()], Clip(), ClipText(), None]
    (docs / "results").mkdir(parents=True)
    other = {"claim": 13, "verdict": "holds", "dataset": NAME}
    stale = {"claim": 2, "verdict": "does not hold", "dataset": NAME}
    (docs / "results" / "claims.json").write_text(json.dumps({"claims": [other, stale]}))

    def measured() -> report.Insight:
        models_of = insights.ImageJourneyModels(*models)
        return insights.insight_1(colours, models_of, SETTINGS, tmp_path / "run", "make it", resamples=20)

    report.write(docs, measured())
    made = files(docs)
    figures = {f"{sort}{end}.png" for sort in ("rank_curve", "gains") for end in ("", "_clip_text")}
    tables = {"insight-1.parquet", "insight-1-intervals.csv", "claims.json"}
    assert {path.name for path in made} == figures | tables | {"insight-1.md"}
    rows = json.loads(made[Path("results/claims.json")])["claims"]
    assert [row["claim"] for row in rows] == [1, 2, 2, 13] and rows[3] == other
    assert {"claim", "verdict", "effect", "low", "high", "n", "seeds", "profile"} <= rows[0].keys()
    assert rows[1]["n"] == 8
    table, effects = report.load("insight-1", docs / "results")
    assert len(table) == 24 and set(ranking.BASELINES) <= set(table)
    provenance = Provenance.from_attrs(table.attrs)
    assert (provenance.candidates, provenance.command, provenance.resamples) == (3, "make it", 20)
    assert insights.claim_2(effects)[0].effect.value == pytest.approx(rows[1]["effect"], abs=1e-4)

    report.write(docs, measured())
    assert files(docs) == made


def test_candidates_are_scored_again_without_being_generated(tmp_path, monkeypatch, colours):
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "smoke")
    models = insights.ImageJourneyModels(Captioner(), Generator(), [Clip(), Fidelity()], Clip(), ClipText(), None)
    insight = insights.insight_1(colours, models, SETTINGS, tmp_path / "run", "make it", resamples=20)
    old = insight.table.drop(columns=["bleu3", "clip_text"])
    old.attrs = dataclasses.replace(insight.provenance, commit="abc").as_attrs()

    def none(*_):
        raise AssertionError("captions by beam search are kept in the run's folder")

    vectors = SimpleNamespace(name="words", distance=lambda a, b: float(a != b))
    monkeypatch.setattr(insights, "load_captioner", none)
    monkeypatch.setattr(insights, "text_models", lambda profile: (ClipText(), vectors, fakes_sbert()))
    smoke = PROFILES["smoke"]
    again = insights.rescore_insight_1(old, colours, smoke, tmp_path / "run", resamples=20)
    assert {"bleu3", "clip_text", "sbert", "wmd"} <= set(again.effects["metric"])
    shared = insight.effects["metric"].unique()
    pd.testing.assert_frame_equal(
        again.effects[again.effects["metric"].isin(shared)].reset_index(drop=True), insight.effects
    )
    pd.testing.assert_frame_equal(again.table[old.columns], old)
    made = again.provenance
    assert made.commit.startswith("abc; scored again at commit ") and made.features == "words"
    old.attrs = made.as_attrs()
    assert insights.rescore_insight_1(old, colours, smoke, tmp_path / "run", 2).provenance.commit == made.commit
    with pytest.raises(ValueError, match="under the profile smoke, the current one is mini: set .*PROFILE=smoke"):
        insights.rescore_insight_1(old, colours, PROFILES["mini"], tmp_path / "run")


def test_insight_2_evaluates_images_and_decides_claims_3_and_4(tmp_path, colours):
    texts = [
        PairSimilarity("text_clip", lambda source, text: float(text.split()[3])),
        PairSimilarity("text_sbert", lambda source, text: float(text.split()[3]) + float(text.split()[5])),
        PairSimilarity("text_cider", lambda source, text: float(text.split()[5])),
        PairSimilarity("text_wmd", lambda source, text: -float(text.split()[5])),
    ]
    evaluators = ImageEvaluators(Clip(), Clip(), ThreeColours())
    models = insights.TextJourneyModels(Captioner(), Generator(), texts, evaluators)
    settings = dataclasses.replace(SETTINGS, candidates=4)
    docs = tmp_path / "docs"
    report.write(docs, insights.insight_2(colours, models, settings, tmp_path / "run", "make it", resamples=20))
    rows = json.loads((docs / "results/claims.json").read_text())["claims"]
    ranked = ["all", "text_clip", "text_sbert", "text_cider", "text_wmd"]
    assert [(row["claim"], row["ranked_by"]) for row in rows] == list(zip([3, 4, 4, 4, 4], ranked, strict=True))
    assert list(rows[0]["secondary"]) == ["ρ by embeddings (CLIP, SBERT) − by overlap of words (CIDEr, WMD)"]
    assert {row["n"] for row in rows[1:]} == {8}
    table, _ = report.load("insight-2", docs / "results")
    assert table.attrs["features"] == "three colours" and {"clip_distance", "recovered"} <= set(table)
    page = (docs / "results/insight-2.md").read_text(encoding="utf-8")
    assert "Insight II" in page and "FID (lower is better)" in page and "40.54 → 33.47 (-7.1)" in page
    assert (docs / "figures/rank_curve_texts_fid.png").exists()


def test_a_similarity_that_no_table_knows_is_refused_before_anything_is_generated(tmp_path, colours):
    generator, other = Generator(), PairSimilarity("lpips", lambda source, candidate: 0.0)
    models = insights.ImageJourneyModels(Captioner(), generator, [Clip(), other], Clip(), ClipText(), None)
    with pytest.raises(ValueError, match="'lpips': .*SIMILARITIES"):
        insights.insight_1(colours, models, SETTINGS, tmp_path / "run", "make it")
    texts = insights.TextJourneyModels(Captioner(), generator, [other], ImageEvaluators(Clip(), Clip(), ThreeColours()))
    with pytest.raises(ValueError, match="'lpips': .*SIMILARITIES"):
        insights.insight_2(colours, texts, SETTINGS, tmp_path / "run", "make it")
    assert generator.calls == [] and not (tmp_path / "run").exists()


def test_a_domain_of_one_image_is_refused_before_anything_is_generated(tmp_path, colours):
    alone = [
        dataclasses.replace(example, domain="near-domain" if i else "out-domain") for i, example in enumerate(colours)
    ]
    generator, texts = Generator(), [PairSimilarity("text_clip", lambda source, text: 0.0)]
    models = insights.TextJourneyModels(Captioner(), generator, texts, ImageEvaluators(Clip(), Clip(), ThreeColours()))
    with pytest.raises(ValueError, match="a single one of out-domain.*--images"):
        insights.insight_2(Dataset(NAME, alone), models, SETTINGS, tmp_path / "run", "make it")
    assert generator.calls == [] and not (tmp_path / "run").exists()


def test_encoders_are_found_by_their_names_whatever_others_there_are(monkeypatch, colours):
    smoke, dino, clip = PROFILES["smoke"], fakes.Corner(), Clip()
    dino.name = "dino"
    loaded = Models(Captioner(), Generator(), [PairSimilarity("pixels", lambda source, other: 0.0), dino, clip])
    monkeypatch.setattr(insights, "load_models", lambda profile: loaded)
    assert insights.ImageJourneyModels.load(smoke).clip_image is clip
    evaluators = insights.TextJourneyModels.load(smoke, colours).evaluators
    assert evaluators.clip is clip and evaluators.dino is dino


def test_the_command_measures_with_the_profiles_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "smoke")
    arguments = ["--images", "3", "--candidates", "2", "--seed", "7"]
    assert insights.main_1([*arguments, "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)]) == 0
    table, effects = report.load("insight-1", tmp_path / "results")
    command = "python -m dalleflamingo research insight-1 --images 3 --candidates 2 --seed 7"
    made = Provenance.from_attrs(table.attrs)
    assert (made.command, made.profile, made.seed, made.dataset) == (command, "smoke", 7, "miniature/nocaps")
    assert ranking.similarities(effects) == ["clip", "dino", "fidelity"] and len(table) == 6
    assert "Claim 2, ranked by clip: " in capsys.readouterr().out
    with pytest.raises(RunFolderError, match="seed"):  # the run folder is that of seed 7
        insights.main_1([*arguments[:4], "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)])


def evaluated_images(better: bool) -> ranking.EvaluatedCandidates:
    """Four images of each of 30 captions; the similarity follows what is good, or its opposite."""
    rng, rows = np.random.default_rng(0), np.arange(120).reshape(30, 4)
    good = rng.normal(size=120)
    table = pd.DataFrame({"image_id": np.repeat(range(30), 4), "clip_distance": -good, "dino_distance": -good})
    columns = {"text_sbert": good if better else -good, "text_wmd": rng.normal(size=120), "found": good}
    means = {"clip_distance": -good, "fid": 5 - good, "is": 2 + good}
    corpus = {name: lambda pick, values=values: values[pick].mean(axis=-1) for name, values in means.items()}
    return ranking.EvaluatedCandidates(table.assign(**columns), rows, np.array([None] * 30, object), corpus)


@pytest.mark.parametrize(("better", "word"), [(True, "holds"), (False, "does not hold")])
def test_claims_on_images_are_signed_so_that_the_papers_side_is_above_0(better, word):
    evaluated = evaluated_images(better)
    effects = ranking.measure(evaluated, resamples=200)
    by_truth = next(claim for claim in insights.claim_4(effects) if claim.ranked_by == "text_sbert")
    assert by_truth.verdict == word and len(by_truth.secondary) == 2
    assert all(claims.verdict(other) == word for other in by_truth.secondary.values())
    [claim] = insights.claim_3(evaluated.table, ranking.correlate(evaluated.ranked))
    assert claim.verdict == word and (claim.effect.value > 0) == better
    [difference] = claim.secondary.values()
    assert (difference.low > 0) if better else (difference.high < 0)


def test_claim_4_wants_all_three_columns():
    evaluated = evaluated_images(True)
    against = dataclasses.replace(
        evaluated, metrics=evaluated.metrics | {"fid": lambda pick: -evaluated.metrics["fid"](pick)}
    )
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


def test_claim_1_is_decided_by_the_primary_pairs_alone(evaluated):
    table = ranked_by(evaluated, evaluated.table["f1"]).table.assign(sbert=-evaluated.table["f1"])
    correlations = ranking.correlate(table, resamples=50)
    [claim] = insights.claim_1(correlations)
    pairs = correlations[correlations["metric"] != "all"].groupby("part")["rho"]
    assert pairs.size().to_dict() == {"primary": 6, "secondary": 4}
    assert claim.effect.value == pytest.approx(pairs.mean()["primary"], abs=0.02)
    assert claim.text.endswith("mean over 6 of the 12 primary pairs")
    [(what, others)] = claim.secondary.items()
    assert what == "ρ, mean over 4 of the 9 secondary pairs"
    assert others.value == pytest.approx(pairs.mean()["secondary"], abs=0.02)
    alone = insights.claim_1(ranking.correlate(table.drop(columns=["sbert", "bleu3"]), resamples=50))[0]
    assert (alone.effect, alone.secondary) == (claim.effect, {})


def test_the_protocol_holds_the_pairs_and_the_rule_that_the_code_follows():
    protocol = (pages.ROOT / "docs/protocol.md").read_text(encoding="utf-8")
    assert claims.pairs_table() in protocol and claims.RULE in protocol
    pairs = metrics.pairs_of_claim("caption")
    primary = {(by, metric) for by, metric, part in pairs if part == "primary"}
    similarities, four = ("clip", "dino", "fidelity"), ("cider", "bleu4", "spice", "wmd")
    assert primary == {(by, metric) for by in similarities for metric in four}  # as before the first measurement
    assert {pair.metric for pair in pairs if pair.part == "secondary"} == {"bleu3", "clip_text", "sbert"}
    assert len(pairs) == 21


def test_f1_takes_the_part_of_spice_where_both_were_measured():
    every = {*metrics.METRICS, *metrics.SIMILARITIES}
    ours, declared = metrics.pairs_of_claim("caption", every), metrics.pairs_of_claim("caption")
    assert [pair._replace(metric="spice") if pair.metric == "f1" else pair for pair in ours] == declared
    assert metrics.pairs_of_claim("caption", every - {"f1"}) == declared
    assert len(metrics.pairs_of_claim("image", every)) == 8  # four similarities of texts, CLIP and DINO distance


@pytest.mark.skipif(not (report.SHIPPED / "insight-1.parquet").exists(), reason="insight I is not measured here yet")
def test_the_shipped_claims_follow_from_the_shipped_table():
    table, effects = report.load("insight-1")
    shipped = [row for row in json.loads((report.SHIPPED / "claims.json").read_text())["claims"] if row["claim"] == 2]
    assert [(row["ranked_by"], row["verdict"]) for row in shipped] == [
        (claim.ranked_by, claim.verdict) for claim in insights.claim_2(effects)
    ]
    dataset = registered.load_dataset(table.attrs["dataset"])
    evaluated = evaluate_captions(table[table["candidate"] < table.attrs["ranked"]], dataset)
    again = ranking.measure(evaluated, resamples=100)
    for row in shipped:
        gain = ranking.gains(again, "cider", row["ranked_by"])["all"]
        assert (row["n"], row["effect"]) == (gain.n, pytest.approx(gain.value, abs=1e-3))
        width = row["high"] - row["low"]  # other draws: the bounds agree to the noise of 100 resamples
        assert abs(row["low"] - gain.low) < 0.35 * width and abs(row["high"] - gain.high) < 0.35 * width
    page = (report.SHIPPED / "insight-1.md").read_text(encoding="utf-8")
    assert "Measured in the miniature" in page and all(row["verdict"] in page for row in shipped)
    assert (report.SHIPPED / "insight-1.parquet").stat().st_size < 5e6


def test_an_insight_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"insight-1 is not measured in .*git checkout -- .*make reproduce"):
        report.load("insight-1", tmp_path)


def test_a_page_from_the_miniature_says_so_and_ones_from_elsewhere_do_not(evaluated):
    effects = ranking.measure(evaluated, resamples=20)
    correlations, claims = ranking.correlate(evaluated.ranked, resamples=20), insights.claim_2(effects)
    chance = {by: {m: ranking.gain_of_chance(evaluated, by, m) for m in evaluated.metrics} for by in ("clip", "dino")}
    made = Provenance("make", "mini", NAME, 4, 4, "p", 20, 4.0, "DDPM", 20, 0, "abc", tokenizer="PTB")
    for dataset, shipped in ((NAME, True), ("nocaps", False)):
        provenance = dataclasses.replace(made, dataset=dataset)
        insight = report.Insight("insight-1", evaluated.table, effects, correlations, claims, chance, provenance)
        text = "\n".join(report.page(insight))
        assert ("Measured in the miniature" in text) == shipped and (f"Measured on {dataset}." in text) != shipped
        assert "| overall | 24 |" in text and "74.1 → 80.3 (+6.2)" in text and "| commit | `abc` |" in text
        assert "| CLIP, shuffled |" in text and "| beam search |" in text and "longest caption" not in text


def test_the_commit_of_a_result_is_dirty_where_code_or_data_changed_and_not_where_docs_did(tmp_path):
    for name in ("dalleflamingo", "data", "docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("as committed")
    assert pages.current_commit(tmp_path) == "not in a git checkout"
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = pages.current_commit(tmp_path)
    (tmp_path / "docs/file").write_text("measured")
    assert len(clean) == 12 and pages.current_commit(tmp_path) == clean
    (tmp_path / "data/file").write_text("retrained")
    assert pages.current_commit(tmp_path) == f"{clean}-dirty"
