"""Studies of sampling and baselines against scores worked out another way."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import fakes
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from worlds import NAME, ThreeColours, candidates, world

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation import caption_metrics, ngrams
from dalleflamingo.evaluation.intervals import Interval, mean_interval, paired_bootstrap
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import baselines, claims, ranking, studies
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.growth import first_of_any, growth
from dalleflamingo.research.image_ranking import ImageEvaluators
from dalleflamingo.research.insights import TextJourneyModels
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import Selection


@pytest.fixture(scope="module")
def evaluated():
    dataset = world()
    evaluated = evaluate_captions(candidates(dataset), dataset)
    order = np.tile([0.1, 0.2, 0.3, 0.4], 24)  # the last candidate is always ranked first
    table = evaluated.table.assign(clip=evaluated.table["f1"], dino=order)
    return replace(evaluated, table=table)


def test_ranked_first_of_any_k_is_the_mean_over_all_choices_of_k(evaluated):
    grown = growth(evaluated, (1, 2, 4), ("f1", "cider"), resamples=20).set_index(["metric", "ranked_by", "k"])
    for metric in ("f1", "cider"):
        scores = evaluated.table[metric].to_numpy()[evaluated.rows]  # (n, 4)
        for by in ("clip", "dino"):
            likeness = evaluated.table[by].to_numpy()[evaluated.rows]
            for k in (1, 2, 4):
                found = [
                    scores[image, max(chosen, key=lambda c: (likeness[image, c], -c))]
                    for image in range(len(scores))
                    for chosen in combinations(range(4), k)
                ]
                row = grown.loc[(metric, by, k)]
                assert row.value == pytest.approx(np.mean(found))
                assert row.gain_value == pytest.approx(np.mean(found) - scores.mean())
        assert all(grown.value[metric, "random", k] == pytest.approx(scores.mean()) for k in (1, 2, 4))
        assert abs(grown.gain_value[metric, "clip", 1]) < 1e-12
        measured = ranking.gains(ranking.measure(evaluated, resamples=2), metric, "clip")["all"]
        assert grown.gain_value[metric, "clip", 4] == pytest.approx(measured.value)
    with pytest.raises(ValueError, match="any 5 of 4"):
        growth(evaluated, (5,), ["f1"])


def test_a_contrast_of_four_selections_is_the_difference_of_two_gains(evaluated):
    chosen, effects = evaluated.selections(), ranking.measure(evaluated, resamples=2)
    random = Selection("random", k=4)
    four = [chosen[one] for one in (Selection("clip", 1, 4), random, Selection("dino", 1, 4), random)]
    found = ranking.contrast(evaluated, "cider", four[:2], four[2:], resamples=300)
    clip, dino = (ranking.gains(effects, "cider", by)["all"].value for by in ("clip", "dino"))
    assert found.value == pytest.approx(clip - dino)
    assert found.low < found.value < found.high


def test_the_first_candidates_are_evaluated_as_if_there_were_no_others(evaluated):
    few = evaluated.limit(2)
    alone = evaluate_captions(evaluated.table[evaluated.table["candidate"] < 2], world())
    ours, theirs = (ranking.measure(one, resamples=2) for one in (few, alone))
    assert set(ours["k"].dropna()) == {2}
    for by in ("clip", "random", "oracle"):
        for metric in ("cider", "bleu4", "f1"):
            ours_by, theirs_by = (ranking.scores(effects, metric, by)["all"].value for effects in (ours, theirs))
            assert ours_by == pytest.approx(theirs_by)


def test_claim_7_holds_for_a_ranking_by_the_truth_and_grows(evaluated):
    table, cider = evaluated.table, evaluated.metrics["cider"]
    copies = [table.assign(candidate=table["candidate"] + 4 * i, clip=table["clip"] - i) for i in range(3)]
    wide = pd.concat(copies, ignore_index=True)  # twelve candidates, no two as much like their source
    wide = replace(ranking.of_columns(wide, ["f1"]), metrics={"cider": lambda rows: cider(rows % len(table))})
    grown = growth(wide, (1, 12), ["cider"], resamples=200)
    claims = {claim.ranked_by: claim for claim in studies.claim_7(wide, grown, resamples=200)}
    assert claims["clip"].verdict == "holds" and claims["clip"].effect.n == 24
    grows, grows_on = claims["clip"].secondary.values()
    of_2, of_10, of_12 = first_of_any(wide, "cider", (2, 10, 12))(np.arange(24))[0]
    assert grows.low > 0 and grows.value == pytest.approx(of_10 - of_2)
    assert grows_on.value == pytest.approx(of_12 - of_10)


def test_growth_counts_n_grams_anew_on_every_draw(evaluated):
    row = growth(evaluated, (4,), ["cider"], resamples=50).set_index("ranked_by").loc["clip"]
    first = evaluated.ranked_at("clip")
    anew = paired_bootstrap(lambda images: evaluated.metrics["cider"](first[:, images])[0], 24, 50, recentred=True)
    kept = mean_interval(evaluated.table["cider"].to_numpy()[first[0]], 50)
    assert (row.value, row.low, row.high) == pytest.approx((anew.value, anew.low, anew.high))
    assert row.value == pytest.approx(kept.value) and row.low != pytest.approx(kept.low)


def test_similarities_are_compared_in_pairs_by_what_they_rank_first(evaluated):
    found = studies.compare_similarities(evaluated, resamples=100).set_index(["metric", "first", "second"])
    f1 = evaluated.table["f1"].to_numpy()[evaluated.rows]
    row = found.loc[("f1", "clip", "dino")]  # clip ranks by F1, dino always the last
    assert row.value == pytest.approx((f1.max(1) - f1[:, -1]).mean()) and 0 < row.low < row.value < row.high
    assert row.n == 24 and found.loc[("cider", "clip", "dino")].value > 0


def captions_by_p(words_lost: int) -> np.ndarray:
    """(10, 24) captions that lose words as p grows, or gain them."""
    whole = [example.references[0].split() for example in world()]
    counts = range(10) if words_lost > 0 else range(9, -1, -1)
    return np.array([[" ".join(text[: max(1, 7 - count)]) for text in whole] for count in counts], dtype=object)


@pytest.mark.parametrize(("lost", "word"), [(1, "holds"), (-1, "does not hold")])
def test_claim_5_is_signed_so_that_falling_with_p_holds(lost, word):
    by_p = studies.cider_by_p(captions_by_p(lost), world(), studies.NUCLEUS, resamples=100)
    [claim] = studies.claim_5(by_p)
    assert claim.verdict == word and claim.effect.low <= claim.effect.value <= claim.effect.high
    references = {example.image_id: list(example.references) for example in world()}
    expected = caption_metrics.cider(references, dict(enumerate(captions_by_p(lost)[3]))).value
    assert by_p.value[3] == pytest.approx(100 * expected, abs=1e-6)


def test_intervals_of_cider_are_recentred_at_every_p_and_for_every_number_of_candidates(evaluated):
    captions, ids = captions_by_p(1), [example.image_id for example in world()]
    table = ngrams.Cider({example.image_id: example.references for example in world()}).table(ids, list(captions[2]))
    score, p = lambda images: 100 * table.corpus(images), studies.NUCLEUS[2]
    found = studies.cider_by_p(captions, world(), studies.NUCLEUS, resamples=50).set_index("p").loc[p]
    moved, left = (paired_bootstrap(score, 24, 50, recentred=recentred) for recentred in (True, False))
    assert (found.low, found.high) == pytest.approx((moved.low, moved.high)) and moved.low > left.low + 1
    one = replace(evaluated, rows=np.repeat(evaluated.rows, 3, axis=1))  # so that there are more than ten candidates
    wide = first_of_any(one, "cider", (2, 10))
    step = paired_bootstrap(lambda images: np.diff(wide(images))[0, 0], 24, 50, recentred=True)
    claim = studies.claim_7(one, growth(one, (12,), ["cider"], resamples=2), resamples=50)[0]
    [grows, _] = claim.secondary.values()
    assert (grows.low, grows.high) == pytest.approx((step.low, step.high))


def test_a_sweep_keeps_what_is_sampled(tmp_path):
    asked = []

    def sample(images, seeds, strategy):
        asked.append(strategy.p)
        return [[f"at {strategy.p} by {seed}"] for [seed] in seeds]

    dataset, captioner = fakes.dataset(tmp_path / "source", n=5), SimpleNamespace(sample=sample)
    first = studies.nucleus_sweep(dataset, captioner, tmp_path, (0.1, 0.9))
    assert first.shape == (2, 5) and first[1, 0].startswith("at 0.9") and asked == [0.1, 0.9]
    assert first[0, 2].split(" by ")[1] == first[1, 2].split(" by ")[1]  # the same seed at every p
    (tmp_path / "nucleus-0.1.json").unlink()
    assert (studies.nucleus_sweep(dataset, captioner, tmp_path, (0.1, 0.9)) == first).all()
    assert asked == [0.1, 0.9, 0.1]


def test_the_page_names_its_settings_and_its_verdicts(evaluated, tmp_path):
    by_p = studies.cider_by_p(captions_by_p(1), world(), studies.NUCLEUS, resamples=20)
    of_images = evaluated.table.assign(clip_distance=evaluated.table["f1"]).rename(columns={"clip": "text_clip"})
    images = growth(ranking.of_columns(of_images, ["clip_distance"]), (1, 3), ["clip_distance"], resamples=20)
    found = studies.Studies(
        by_p=by_p,
        captions=growth(evaluated, (1, 2, 4), ["cider"], resamples=20),
        images=images,
        more_images=images.assign(n=200),
        pairs=studies.compare_similarities(evaluated, resamples=20),
        claims=studies.claim_5(by_p),
        insight_1=Provenance("make it", "mini", NAME, 4, 4, "p", 20, 4.0, "DDPM", 20, 0, "abc"),
    )
    for folder in ("results", "figures"):
        (tmp_path / folder).mkdir()
    studies.write(tmp_path, found)
    page = (tmp_path / "results/studies.md").read_text(encoding="utf-8")
    assert "Claim 5: **holds**" in page and "| 0.9 |" in page and "| 4 |" in page and "| CLIP − DINO |" in page
    assert f"n = 24 images of {NAME}, from the candidates of `make it`" in page
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"nucleus.png", "growth_cider.png", "growth_clip_distance.png", "growth_many.png"}
    of_3 = images[images["k"] == 3]
    cells = [f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]" for row in of_3.itertuples()]
    assert page.count(f"| 3 | {' | '.join(cells)} |") == 2 and "captions, n = 200:" in page
    by_p_again = pd.read_csv(tmp_path / "results/nucleus.csv")
    assert len(by_p_again) == 10 and by_p_again["value"].tolist() == pytest.approx(by_p["value"].tolist(), abs=1e-5)


def test_more_images_are_generated_of_fewer_captions(tmp_path):
    texts = [PairSimilarity("text_sbert", lambda source, text: float(text.split()[3]))]
    encoder = fakes.MeanColour()
    evaluators = ImageEvaluators(encoder, encoder, ThreeColours())
    models = TextJourneyModels(fakes.Captioner(), fakes.Generator(), texts, evaluators)
    settings = JourneySettings(candidates=2, steps=4, guidance_scale=3.0)
    dataset, run = fakes.dataset(tmp_path / "source", n=3), tmp_path / "run"
    grown = studies.more_images(dataset, models, settings, run)
    table = pd.read_parquet(run / "candidates.parquet")
    assert table.groupby("image_id")["candidate"].apply(list).tolist() == [[0, 1]] * 3
    rows = grown[grown["metric"] == "clip_distance"].set_index(["ranked_by", "k"])
    assert rows.loc[("random", 1), "value"] == rows.loc[("random", 2), "value"] and rows["n"].eq(3).all()
    generator = fakes.Generator()
    again = studies.more_images(dataset, models._replace(generator=generator), settings, run)
    assert generator.calls == []  # nothing is generated again
    pd.testing.assert_frame_equal(again, grown)


def test_claim_13_counts_the_captions_that_both_tokenize_alike(tmp_path):
    blip, clip = tiny.shipped_tokenizers()
    captions = ["a red tree"] * 7 + ["a chair"] * 3  # the miniature's BLIP cuts "chair" into pieces, its SD does not
    claim = studies.claim_13(captions, blip, clip, "somewhere")
    assert claim.effect.value == pytest.approx(0.1) and claim.effect.n == 10 and claim.verdict == "undecided"
    assert studies.claim_13(captions[7:] * 9, blip, clip, "elsewhere").verdict == "does not hold"
    board = tmp_path / "claims.json"
    for where in ("somewhere", "elsewhere", "elsewhere"):  # a claim is decided anew for a data set, not for all
        claims.scoreboard(board, [studies.claim_13(captions, blip, clip, where)], profile="mini", dataset="x", seed=0)
    assert sorted(row["dataset"] for row in json.loads(board.read_text())["claims"]) == ["elsewhere", "somewhere"]


# ── baselines ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_consensus_is_the_mean_cider_to_the_other_candidates():
    captions = np.array(["a red cat", "a red cat on a mat", "a blue boat", "two kites", "a kite", "a red kite"], object)
    references = {0: ["a red cat sits"], 1: ["a kite flies"], 2: ["a dog"]}
    rows = np.array([[0, 1, 2], [3, 4, 5]])
    found = baselines._consensus(captions, rows, ngrams.Cider(references))
    idf = ngrams.Cider(references)
    own = ngrams.Cider({"x": [captions[1], captions[2]]}, idf_of=idf).score(["x"], [captions[0]])[0]
    assert found[0] == pytest.approx(own) and found[0] > found[2]
    alone = baselines._consensus(captions, np.arange(6)[:, None], idf)
    assert (alone == 0).all()


def test_likelihood_is_the_sum_over_words_whatever_the_batch(tmp_path):
    captioner = Captioner.from_pretrained(str(tiny.blip(tmp_path)))
    images, captions = tiny.pictures(3), ["a cat", "a red cat on a boat", "a"]
    together = baselines.log_likelihood(captioner, images, captions)
    alone = [baselines.log_likelihood(captioner, [i], [c])[0] for i, c in zip(images, captions, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    tokens = captioner.processor(images=images[0], text="a cat", return_tensors="pt")
    start = captioner.model.config.text_config.bos_token_id
    labels = tokens.input_ids.clone()
    tokens["input_ids"][:, 0], labels[:, 0] = start, -100
    seen = captioner.model.vision_model(tokens.pixel_values).last_hidden_state
    stock = captioner.model.text_decoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        encoder_hidden_states=seen,
        labels=labels,
    ).logits.log_softmax(-1)
    expected = stock[0, :-1].gather(1, tokens.input_ids[0, 1:, None]).sum()
    torch.testing.assert_close(together[0], expected, atol=1e-4, rtol=1e-4)


def test_baselines_become_columns_and_selections(evaluated, tmp_path):
    class Embedder:
        def embed(self, items):
            return torch.stack([torch.tensor([1.0, float(len(str(item)))]) for item in items])

    dataset = with_images(world(), tmp_path)
    likelihoods = -torch.arange(4, dtype=torch.float)
    captioner = SimpleNamespace(pad_id=-1, token_logits=lambda images, captions: fakes.logits_with(likelihoods))
    table = baselines.add(evaluated.table, dataset, captioner, Embedder(), Embedder())
    assert table["likelihood"].tolist() == [0, -1, -2, -3] * 24 and table["clip_score"].between(0, 1).all()
    assert (table["length"] == table["caption"].str.split().str.len()).all()
    effects = ranking.measure(replace(evaluated, table=table), resamples=5)
    longest = table.loc[table.groupby("image_id")["length"].idxmax(), "f1"].mean()
    assert ranking.scores(effects, "f1", "length")["all"].value == pytest.approx(longest)
    assert isinstance(ranking.gains(effects, "cider", "consensus")["all"], Interval)
    assert ranking.similarities(effects) == ["clip", "dino"]


def with_images(dataset: Dataset, folder: Path) -> Dataset:
    """The data set with an image for each example."""
    Image.new("RGB", (4, 4)).save(folder / "image.png")
    return replace(dataset, examples=tuple(replace(example, path=folder / "image.png") for example in dataset))
