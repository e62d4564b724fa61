"""Planted errors: captions with one wrong fact, and how often similarities of known quality find the true one."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import written

from dalleflamingo import profiles
from dalleflamingo.miniature import wording
from dalleflamingo.miniature.annotators import FACTS
from dalleflamingo.miniature.corpora import is_held_out
from dalleflamingo.miniature.scene_graph import parse, wrong_facts
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import fresh, planted
from dalleflamingo.research.provenance import Provenance

SETTINGS = JourneySettings(5, steps=2, guidance_scale=3.0, seed=4)
N = 60


def similarity(name: str, function, n: int = N) -> written.Similarity:
    return written.Similarity(name, function, written.Shown(fresh.scenes_of(planted.plant(n, SETTINGS.seed)[0])))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """By CLIP the truth is always first; DINO is constant; fidelity does not see relations."""

    def without_relations(caption, scene):
        return -sum(count for fact, count in wrong_facts(caption, scene).items() if fact != "relation")

    functions = {"clip": written.fewest_errors, "dino": written.constant, "fidelity": without_relations}
    models = [similarity(name, function) for name, function in functions.items()]
    return planted.planted_errors(N, written.Generator(), models, tmp_path_factory.mktemp("run"), SETTINGS)


def test_each_caption_has_the_one_wrong_fact_that_its_row_names():
    dataset, captions = planted.plant(200, SETTINGS.seed)  # some of them on a diagonal, where two relations hold
    scenes = dict(zip((example.image_id for example in dataset), fresh.scenes_of(dataset), strict=True))
    assert list(captions["error"]) == ["none", *FACTS] * 200
    for row in captions.itertuples():
        scene, wrong = scenes[row.image_id], wrong_facts(row.caption, scenes[row.image_id])
        graph = parse(row.caption)
        assert len(graph.things) == 2 and len(graph.relations) == 1 and graph.ground
        if row.error == "kind":  # nor does a thing that is not there stand in a true relation
            assert wrong == {"kind": 1, "colour": 0, "size": 0, "relation": 1, "ground": 0}
        else:
            assert wrong == {fact: int(fact == row.error) for fact in wrong}
        assert row.things_held_out == any(map(is_held_out, scene.things))
    assert 0.1 < captions["things_held_out"].mean() < 0.4  # 1 − (7/8)² of them


def test_sentence_forms_that_clip_never_learned_from_are_marked():
    _, captions = planted.plant(200, 1)
    grounds = tuple(phrase for phrases in wording.GROUND_PHRASES.values() for phrase in phrases)
    sides = [phrase for phrases in wording.SIDE_PHRASES.values() for phrase in phrases]
    for row in captions.itertuples():
        first, _, second = row.caption.partition(" and ")
        is_sides = any(phrase in first for phrase in sides) and any(phrase in second for phrase in sides)
        assert row.form_held_out == (row.caption.startswith(grounds) or (bool(second) and is_sides)), row.caption
    assert 0.1 < captions["form_held_out"].mean() < 0.3


def test_a_perfect_similarity_finds_the_truth_always_and_a_constant_one_never(table):
    shares = planted.shares_of(planted.count_found(table))
    assert {than: share.value for than, share in shares["clip"].items()} == dict.fromkeys(planted.CHANCE, 1.0)
    assert {than: share.value for than, share in shares["dino"].items()} == dict.fromkeys(planted.CHANCE, 0.0)
    assert {share.n for row in shares.values() for share in row.values()} == {N}


def test_an_error_that_a_similarity_does_not_see_is_a_tie_and_the_truth_not_first(table):
    found = planted.nearer(table, "fidelity")
    assert found.mean().to_dict() == {"first of five": 0, "kind": 1, "colour": 1, "relation": 0, "ground": 1}


def test_chance_finds_one_in_five_and_is_nearer_than_one_error_in_two():
    _, captions = planted.plant(2000, 1)
    counted = planted.count_found(captions.assign(clip=np.random.default_rng(0).random(len(captions))))
    found = planted.shares_of(counted)["clip"]
    for than, share in planted.CHANCE.items():
        assert abs(found[than].value - share) < 4 * np.sqrt(share * (1 - share) / 2000) and found[than].n == 2000


def test_scenes_held_out_are_counted_apart(table):
    is_new = table["things_held_out"]
    spoiled = table.assign(clip=table["clip"].mask(is_new, 0.0))  # a similarity that knows only what it learned
    counted = planted.count_found(spoiled).set_index(["ranked_by", "scenes", "nearer_than"])
    n = int(is_new.sum()) // 5
    assert 0 < n < N
    learned, held_out = (
        counted.loc["clip", scenes, planted.FIRST]
        for scenes in ("things of the hard negatives", "things held out from them")
    )
    assert (learned.value, learned.n) == (1.0, N - n) and (held_out.value, held_out.n) == (0.0, n)
    assert counted.loc["clip", "all", planted.FIRST].value == pytest.approx(1 - n / N)
    forms = [counted.loc["dino", scenes, "kind"].n for scenes in counted.index.unique("scenes") if "forms" in scenes]
    assert len(forms) == 2 and sum(forms) == N
    none = planted.count_found(spoiled.assign(form_held_out=False))
    assert "sentence forms held out from them" not in set(none["scenes"])


def test_the_order_of_rows_does_not_matter(table):
    shuffled = table.sample(frac=1, random_state=0).sort_values("candidate", ascending=False, kind="stable")
    for by in ("clip", "fidelity"):
        assert planted.nearer(shuffled, by).mean().to_dict() == planted.nearer(table, by).mean().to_dict()


def test_five_captions_share_their_noise_and_an_interrupted_run_goes_on(tmp_path):
    oracle = similarity("clip", written.fewest_errors, 40)
    with pytest.raises(KeyboardInterrupt):
        planted.planted_errors(40, written.Generator(limit=1), [oracle], tmp_path, SETTINGS)
    generator = written.Generator()
    whole = planted.planted_errors(40, generator, [oracle], tmp_path, SETTINGS)
    assert len(generator.rendered) == 5 * (40 - 16) and len(whole) == 200
    noise = whole["noise_seed"].to_numpy().reshape(40, 5)
    assert (noise == noise[:, :1]).all() and len(set(noise[:, 0])) == 40
    assert [written.read(image) for image in map(written.Image.open, tmp_path / whole["image"])] == list(
        whole["caption"]
    )
    others = [oracle, similarity("dino", written.constant, 40)]
    again = planted.planted_errors(40, written.Generator(limit=0), others, tmp_path, SETTINGS)
    pd.testing.assert_frame_equal(again.drop(columns="dino"), whole)


def test_a_similarity_that_tables_do_not_know_is_refused_before_anything_is_rendered(tmp_path):
    with pytest.raises(ValueError, match="'lpips'"):
        planted.planted_errors(
            2, written.Generator(limit=0), [similarity("lpips", written.constant)], tmp_path, SETTINGS
        )
    assert not any(tmp_path.iterdir())


def test_the_command_writes_table_page_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    settings = dataclasses.replace(SETTINGS, seed=9)
    shown = written.Shown(fresh.scenes_of(planted.plant(8, settings.seed)[0]))
    monkeypatch.setattr(planted, "load_generator", lambda profile: written.Generator())
    models = [written.Similarity(name, written.fewest_errors, shown) for name in ("clip", "dino")]
    monkeypatch.setattr(planted, "load_image_similarities", lambda profile: models)
    monkeypatch.setattr(planted.Provenance, "of", lambda command, dataset, *_, **fields: made(command, dataset.name))

    def made(command, dataset):
        shape = dict(candidates=5, ranked=5, sampling="planted", steps=4, guidance_scale=3.0, scheduler="DDPM")
        return Provenance(command, "smoke", dataset, **shape, resamples=0, seed=9, commit="c0ffee")

    arguments = ["--n", "8", "--seed", "9", "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    assert planted.main(arguments) == 0
    assert "clip: first of five 1.000 [0.676, 1.000] (n = 8)" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "docs/results/planted.parquet")
    assert len(table) == 40 and table.attrs["commit"] == "c0ffee"
    counted = pd.read_csv(tmp_path / "docs/results/planted.csv")
    pd.testing.assert_frame_equal(counted, planted.count_found(table).round(5), check_dtype=False)
    page = (tmp_path / "docs/results/planted.md").read_text()
    assert "| CLIP | 8 | 1.00 [0.68, 1.00] |" in page and "research planted --n 8 --seed 9" in page
    assert (tmp_path / "docs/figures/planted.png").read_bytes().startswith(b"\x89PNG")
