"""The run there and back: what is in the table, and that nothing that was computed is ever lost or mixed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image

from dalleflamingo import datasets, profiles, reconstruct, registry, runs
from dalleflamingo.decoding import TopK
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.generator import Generator
from dalleflamingo.sources import models, own_files

HERE = Path(__file__).parent


def equal(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """(run folder, table) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    return folder / "run", fakes.run(folder / "run", folder / "pictures")


def test_each_row_is_its_own_seed_caption_picture_and_similarity(clean):
    folder, table = clean
    dataset = fakes.dataset(folder.parent / "pictures")
    assert list(table) == [*reconstruct.ImageTextImage.columns, "colour", "corner"]
    assert table.image_id.tolist() == [e.image_id for e in dataset for _ in range(3)]
    assert table.candidate.tolist() == [0, 1, 2] * 10
    assert table.domain.isna().sum() == 12 and table.domain[3] == "in-domain"
    source = {example.image_id: dataset.open(example) for example in dataset}
    for row in table.itertuples():
        assert row.seed == runs.derive_seed(5, row.image_id, row.candidate)
        assert row.caption == fakes.Captioner()._caption(source[row.image_id].getpixel((0, 0)), row.seed)
        with Image.open(folder / row.image) as kept:
            drawn = fakes.Generator()._draw(row.caption, row.noise_seed, lambda count: None)
            assert kept.format == "PNG" and np.array_equal(np.asarray(kept), np.asarray(drawn))
        a, b = fakes.MeanColour().embed([source[row.image_id], drawn])
        assert row.colour == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-6)
    assert table.seed.is_unique and table.image.is_unique and table.colour.nunique() > 15


def test_returned_table_is_the_parquet_file(clean):
    folder, table = clean
    equal(pd.read_parquet(folder / "candidates.parquet"), table)
    assert table.attrs == {"run_folder": str(folder), "skipped": []}
    assert json.loads((folder / "skipped.json").read_text()) == []


def test_settings_reach_the_models_and_sources_are_embedded_once(tmp_path):
    captioner, generator, colour = fakes.Captioner(), fakes.Generator(), fakes.MeanColour()
    fakes.image_text_image(fakes.dataset(tmp_path / "p", 5), captioner, generator, [colour], tmp_path / "run")
    assert [len(batch) for batch in captioner.batches] == [3, 2]
    assert [(c["steps"], c["guidance"], c["batch"]) for c in generator.calls] == [(2, 4.0, 4)] * 2
    assert colour.embedded == [9, 3, 6, 2]


@pytest.fixture(scope="module")
def clean_texts(tmp_path_factory):
    """(run folder, table) of text → image → text that nothing disturbed."""
    folder = tmp_path_factory.mktemp("clean texts")
    return folder / "run", fakes.run_texts(folder / "run", folder / "pictures")


@pytest.fixture(scope="module")
def killed(clean, tmp_path_factory):
    """(folder, record) of both journeys, each killed at 20 random moments and then left to end."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, HERE / "killed_run.py", folder, clean[0].parent / "pictures", "20", "11"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert "RECORD" in done.stdout, done.stderr
    return folder, json.loads(done.stdout.split("RECORD ")[1].splitlines()[0])


@pytest.mark.parametrize("way", ["run", "run_texts"])
def test_run_killed_at_20_random_moments_ends_with_the_same_table(way, request, killed):
    folder, table = request.getfixturevalue("clean" if way == "run" else "clean_texts")
    run, record = killed[0] / way, killed[1][way]
    statuses = [attempt["status"] for attempt in record]
    assert set(statuses) <= {-9, 0} and statuses.count(-9) >= 3 and statuses[-1] == 0
    assert any(0 < attempt["kept"] < 10 for attempt in record), record  # killed midway, not only at the ends
    assert [attempt["again"] for attempt in record] == [[]] * len(record)  # what was kept is not computed again
    equal(pd.read_parquet(run / "candidates.parquet"), table)
    assert files(run / "images") == files(folder / "images")


def test_each_text_row_is_its_own_picture_description_and_similarity(clean_texts):
    folder, table = clean_texts
    dataset = fakes.dataset(folder.parent / "pictures")
    assert list(table) == [*reconstruct.TextImageText.columns, "letters"]
    assert table.caption.tolist() == [e.references[0] for e in dataset for _ in range(3)]
    for row in table.itertuples():
        assert row.seed == runs.derive_seed(5, row.image_id, row.candidate)
        drawn = fakes.Generator()._draw(row.caption, row.seed, lambda count: None)
        with Image.open(folder / row.image) as kept:
            assert np.array_equal(np.asarray(kept), np.asarray(drawn))
        assert [row.recovered] == fakes.Captioner().describe([drawn])
        assert row.letters == len(set(row.caption) & set(row.recovered))
    assert table.recovered.nunique() > 20 and table.letters.nunique() > 1


def test_source_text_is_drawn_from_the_human_captions_by_the_seed(tmp_path):
    many = [dataclasses.replace(e, references=("one", "two", "three")) for e in fakes.dataset(tmp_path / "p")]
    settings = [dataclasses.replace(fakes.SETTINGS, seed=seed) for seed in (5, 6, 5)]
    journeys = [reconstruct.TextImageText(None, fakes.Generator(), [], changed) for changed in settings]
    first, second, again = ([journey.open_source(None, example) for example in many] for journey in journeys)
    assert set(first) == {"one", "two", "three"} and first != second and first == again


def test_example_without_a_caption_is_skipped_and_listed(tmp_path):
    mute = fakes.dataset(tmp_path / "p", 3).examples
    mute = datasets.Dataset("things", (mute[0], dataclasses.replace(mute[1], references=()), mute[2]))
    table = fakes.run_texts(tmp_path / "run", tmp_path / "p", data=mute)
    assert table.image_id.unique().tolist() == [200, 194]
    assert [entry["image_id"] for entry in table.attrs["skipped"]] == [197]
    assert "has no caption to start from" in table.attrs["skipped"][0]["reason"]


def test_a_caption_whose_picture_is_missing_is_skipped_as_nothing_could_judge_its_drawings(tmp_path):
    dataset = fakes.dataset(tmp_path / "p", 3)
    gone = dataset[1]
    gone.path.unlink()
    table = fakes.run_texts(tmp_path / "run", tmp_path / "p", data=dataset)
    assert [entry["image_id"] for entry in table.attrs["skipped"]] == [gone.image_id]
    assert "there is no such file" in table.attrs["skipped"][0]["reason"] and len(table) == 2 * 3


def test_pictures_of_an_image_share_their_noise_unless_told_otherwise(clean, tmp_path):
    assert clean[1].groupby("image_id").noise_seed.nunique().eq(1).all() and clean[1].noise_seed.nunique() == 10
    own = fakes.run(tmp_path / "run", clean[0].parent / "pictures", shared_noise=False)
    assert own.noise_seed.tolist() == own.seed.tolist() and own.caption.tolist() == clean[1].caption.tolist()


def test_similarity_of_another_shape_is_refused_by_name(tmp_path):
    class Odd(fakes.MeanColour):
        def compare(self, sources, candidates):
            return super().compare(sources, candidates)[:, 1:]

    models = fakes.Captioner(), fakes.Generator(), [Odd()]
    with pytest.raises(ValueError, match=r"'colour' gave \(3, 2\) numbers for 3 sources with 3 candidates"):
        fakes.image_text_image(fakes.dataset(tmp_path / "p"), *models, tmp_path / "run")


def test_finished_run_computes_nothing_again(clean):
    folder, table = clean
    captioner = fakes.Captioner()
    models = captioner, fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]
    again = fakes.image_text_image(fakes.dataset(folder.parent / "pictures"), *models, folder)
    assert captioner.batches == []
    equal(again, table)


def test_an_error_midway_says_what_is_kept_and_the_next_call_goes_on(clean, tmp_path, capsys):
    class FailsInTheThirdChunk(fakes.Captioner):
        def sample(self, images, seeds, strategy):
            if len(self.batches) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().sample(images, seeds, strategy)

    models = FailsInTheThirdChunk(), fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]
    with pytest.raises(torch.OutOfMemoryError):
        fakes.image_text_image(fakes.dataset(clean[0].parent / "pictures"), *models, tmp_path / "run")
    assert "6 of 10 images are kept" in capsys.readouterr().out
    equal(fakes.run(tmp_path / "run", clean[0].parent / "pictures"), clean[1])
    assert "(6 were there already" in capsys.readouterr().out


def test_chunks_and_batches_change_nothing(clean, tmp_path):
    equal(fakes.run(tmp_path / "run", clean[0].parent / "pictures", chunk=4, batch_size=1), clean[1])


def test_run_over_more_images_reuses_those_that_are_there(clean, tmp_path):
    pictures = clean[0].parent / "pictures"
    log = tmp_path / "log.txt"
    few = fakes.run(tmp_path / "run", pictures, n=4, chunk=8, log=log)
    equal(few, clean[1][:12])
    equal(fakes.run(tmp_path / "run", pictures, chunk=8, log=log), clean[1])
    equal(fakes.run(tmp_path / "run", pictures, n=4, log=log), few)
    seen = [int(line) for line in log.read_text().split()]
    assert len(seen) == len(set(seen)) == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["end cut off", "cut short", "empty", "gone"],
)
def test_damaged_part_is_made_again_and_no_other(clean, tmp_path, damage):
    pictures, log = clean[0].parent / "pictures", tmp_path / "log.txt"
    fakes.run(tmp_path / "run", pictures)
    damage(tmp_path / "run/parts/00001.parquet")
    equal(fakes.run(tmp_path / "run", pictures, log=log), clean[1])
    assert [int(line) for line in log.read_text().split()] == clean[1].image_id.unique()[3:6].tolist()


def test_image_whose_pictures_are_gone_is_made_again(clean, tmp_path):
    pictures, log = clean[0].parent / "pictures", tmp_path / "log.txt"
    table = fakes.run(tmp_path / "run", pictures)
    (tmp_path / "run" / table.image[4]).unlink()
    equal(fakes.run(tmp_path / "run", pictures, log=log), clean[1])
    assert log.read_text().split() == [str(table.image_id[4])]
    assert files(tmp_path / "run/images") == files(clean[0] / "images")


def test_unreadable_images_are_named_skipped_and_listed_and_come_in_once_repaired(clean, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    whole = {example.path: example.path.read_bytes() for example in fakes.dataset(pictures)}
    broken = [pictures / "1.png", pictures / "7.png"]
    broken[0].write_bytes(whole[broken[0]][:60])
    broken[1].write_text("<html>404</html>")

    table = fakes.run(tmp_path / "run", pictures)
    bad = [197, 179]
    equal(table, clean[1][~clean[1].image_id.isin(bad)].reset_index(drop=True))
    listed = json.loads((tmp_path / "run/skipped.json").read_text())
    assert listed == table.attrs["skipped"] and [entry["image_id"] for entry in listed] == bad
    assert [entry["path"] for entry in listed] == [str(path) for path in broken]
    out = capsys.readouterr().out
    assert all(f"Skipped image {i}" in out for i in bad) and "1.png" in out and "2 skipped" in out

    broken[0].write_bytes(whole[broken[0]])
    broken[1].write_bytes(whole[broken[1]])
    repaired = fakes.run(tmp_path / "run", pictures)
    equal(repaired, clean[1])
    assert repaired.attrs["skipped"] == json.loads((tmp_path / "run/skipped.json").read_text()) == []


def test_a_finished_run_keeps_what_it_has_of_images_that_are_gone(tmp_path):
    expected = fakes.run(tmp_path / "run", tmp_path / "pictures")
    data = fakes.dataset(tmp_path / "pictures")
    for example in data[:4]:
        example.path.unlink()
    models = fakes.Captioner(), fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]
    table = fakes.image_text_image(data, *models, tmp_path / "run")
    pd.testing.assert_frame_equal(table, expected)


def test_an_image_lost_after_its_run_is_skipped_when_a_new_similarity_needs_it(tmp_path, capsys):
    data, other = fakes.dataset(tmp_path / "pictures", 4), PairSimilarity("other", lambda source, candidate: 0.5)
    models = fakes.Captioner(), fakes.Generator()
    fakes.image_text_image(data, *models, [fakes.MeanColour()], tmp_path / "run")
    data[2].path.unlink()
    again = fakes.image_text_image(data, *models, [fakes.MeanColour(), other], tmp_path / "run")
    assert [entry["image_id"] for entry in again.attrs["skipped"]] == [data[2].image_id]
    assert list(again.image_id.unique()) == [data[i].image_id for i in (0, 1, 3)]
    assert len(reconstruct.select(again, by="other")) == 3
    capsys.readouterr()


def recoloured(path: Path, colour: str) -> None:
    """Another picture under the same name."""
    with Image.open(path) as image:
        changed = Image.new("RGB", image.size, colour)
        changed.putpixel((0, 0), image.getpixel((0, 0)))
    changed.save(path)


def test_an_image_replaced_under_its_name_is_made_again_and_no_other(clean, tmp_path):
    pictures, log = tmp_path / "pictures", tmp_path / "log.txt"
    before, old = fakes.run(tmp_path / "run", pictures, log=log), (pictures / "4.png").read_bytes()
    recoloured(pictures / "4.png", "purple")
    log.write_text("")
    after = fakes.run(tmp_path / "run", pictures, log=log)
    assert log.read_text().split() == ["188"]
    same = after.image_id != 188
    equal(after[same], before[same])
    changed, former = after[~same].reset_index(drop=True), before[~same].reset_index(drop=True)
    assert set(changed.digest).isdisjoint(former.digest) and set(changed.image).isdisjoint(former.image)
    assert (changed.colour != former.colour).all()  # the scores are of the new picture
    equal(fakes.run(tmp_path / "clean", pictures), after)  # as if it had always been there
    (pictures / "4.png").write_bytes(old)
    log.write_text("")
    equal(fakes.run(tmp_path / "run", pictures, log=log), before)
    assert log.read_text() == ""  # what was made of the first picture is still there


def test_a_folder_of_the_same_name_with_other_images_gets_its_own_answer(tmp_path):
    mine = {}
    for journey, colour in (("first", "red"), ("second", "blue")):
        (tmp_path / journey / "photos").mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / journey / "photos/IMG_0001.png")
        mine[journey] = own_files.read_folder(tmp_path / journey / "photos")

    def run(data, folder):
        models = fakes.Captioner(), fakes.Generator(), [fakes.MeanColour()]
        return fakes.image_text_image(data, *models, tmp_path / folder)

    assert mine["first"].name == mine["second"].name and mine["first"][0].image_id == mine["second"][0].image_id
    tables = {journey: run(data, "run") for journey, data in mine.items()}
    for journey, data in mine.items():
        equal(tables[journey], run(data, f"{journey} alone"))
    assert not set(tables["first"].caption) & set(tables["second"].caption)
    assert set(tables["first"].file) == {"IMG_0001.png"}


def test_another_text_under_the_same_id_is_made_again(tmp_path):
    first = fakes.dataset(tmp_path / "p", 3)
    changed = dataclasses.replace(first[1], references=("a green thing 197",))
    second = datasets.Dataset(first.name, (first[0], changed, first[2]))
    log = tmp_path / "log.txt"
    before = fakes.run_texts(tmp_path / "run", tmp_path / "p", data=first)
    after = fakes.run_texts(tmp_path / "run", tmp_path / "p", data=second, log=log)
    assert set(log.read_text().split()) == {"197"} and after.caption.tolist()[3:6] == ["a green thing 197"] * 3
    equal(after, fakes.run_texts(tmp_path / "clean", tmp_path / "p", data=second))
    equal(fakes.run_texts(tmp_path / "run", tmp_path / "p", data=first), before)


def test_an_image_replaced_while_it_is_read_is_made_again(tmp_path, monkeypatch):
    pictures, log = tmp_path / "pictures", tmp_path / "log.txt"
    fakes.dataset(pictures, 2)
    usual = datasets.open_image

    def replaced(path):
        recoloured(path, "purple")  # after its digest was taken
        return usual(path)

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "open_image", replaced)
        fakes.run(tmp_path / "run", pictures, n=2)
    again = fakes.run(tmp_path / "run", pictures, n=2, log=log)
    assert len(log.read_text().split()) == 2
    equal(again, fakes.run(tmp_path / "clean", pictures, n=2))


def test_a_run_of_an_earlier_layout_is_refused_and_kept(clean, tmp_path):
    """Before layout 2 rows had no digest, and ids of own images were shorter."""
    fakes.run(tmp_path / "run", clean[0].parent / "pictures", n=3)
    for path in (tmp_path / "run/parts").glob("*.parquet"):
        old = pq.read_table(path).drop_columns(["digest", "file"])
        pq.write_table(old, path)
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    (tmp_path / "run/run.json").write_text(json.dumps({"settings": settings}))
    before = files(tmp_path / "run/parts"), files(tmp_path / "run/images")
    with pytest.raises(
        runs.RunFolderError, match="layout 1 and this version writes 2.*: keep it .*, and give another run_folder"
    ):
        fakes.run(tmp_path / "run", clean[0].parent / "pictures", n=3)
    assert (files(tmp_path / "run/parts"), files(tmp_path / "run/images")) == before


def test_a_name_that_is_not_printable_ends_no_run(tmp_path, capsys):
    for name in (b"caf\xe9.png", b"two\nlines.png", b"torn\xff.png"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos/" + name))
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:45])
    mine = own_files.read_folder(tmp_path / "photos")
    models = fakes.Captioner(), fakes.Generator(), [fakes.MeanColour()]
    table = fakes.image_text_image(mine, *models, tmp_path / "run")
    assert set(pd.read_parquet(tmp_path / "run/candidates.parquet").file) == {r"caf\udce9.png", r"two\nlines.png"}
    assert [Path(one["path"]) for one in json.loads((tmp_path / "run/skipped.json").read_text())] == [path]
    out = capsys.readouterr().out
    assert r"torn\udcff.png" in out and out.encode()  # no half of a surrogate pair reaches the terminal
    assert table.image_id.max() > 2**31 and table.image_id.dtype == np.int64


def test_captions_that_the_generator_cannot_read_are_skipped_by_name(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(["a red thing", "half \ud83d", "a blue " + "boat " * 80, "a cat"]))
    (tmp_path / "sd").mkdir()
    generator = Generator.from_pretrained(tiny.stable_diffusion(tmp_path / "sd") or tmp_path / "sd")
    mine, similarity = own_files.read_captions(tmp_path / "mine.json"), PairSimilarity("one", lambda a, b: 1.0)
    settings = reconstruct.JourneySettings(candidates=1, steps=2, guidance_scale=2.0)
    table = reconstruct.text_image_text(mine, fakes.Captioner(), generator, [similarity], tmp_path / "run", settings)
    assert table.caption.tolist() == ["a red thing", "a cat"]
    surrogate, long = (one["reason"] for one in table.attrs["skipped"])
    assert "cannot read the caption" in surrogate and "character 6 is half of a surrogate pair" in surrogate
    out = capsys.readouterr().out
    assert r'cannot read the caption "half \ud83d"' in out and out.encode()  # which a terminal takes
    assert re.search(r'"a blue boat .* and the model reads 16: shorten the caption, or leave it out', long)


def test_not_one_readable_image_is_an_error(tmp_path):
    for example in fakes.dataset(tmp_path / "p", 2):
        example.path.write_text("no picture")
    with pytest.raises(datasets.DatasetError, match=r"not one of 2 images.*0\.png"):
        fakes.run(tmp_path / "run", tmp_path / "p", n=2)
    with pytest.raises(datasets.DatasetError, match="things is empty"):
        fakes.run(tmp_path / "run", tmp_path / "p", n=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"candidates": 4}, "candidates: 3 there, 4 now"),
        ({"guidance_scale": 7.5, "steps": 3}, r"steps: 2 there, 3 now\n  guidance_scale: 4.0 there, 7.5 now"),
        ({"strategy": TopK(10)}, r"strategy: 'Nucleus\(p=0.9\)' there, 'TopK\(k=10\)' now"),
        ({"seed": 6}, "seed: 5 there, 6 now"),
    ],
)
def test_other_settings_are_refused_by_name_and_touch_nothing(clean, change, named):
    folder, _ = clean
    before = files(folder / "parts") | {"run.json": (folder / "run.json").read_bytes()}
    with pytest.raises(runs.RunFolderError, match=f"(?s){named}.*another run_folder, or delete") as caught:
        fakes.run(folder, folder.parent / "pictures", **change)
    assert str(caught.value).count(" there, ") == len(change)
    assert files(folder / "parts") | {"run.json": (folder / "run.json").read_bytes()} == before


def test_other_models_and_data_are_refused(clean):
    folder, _ = clean
    dataset = fakes.dataset(folder.parent / "pictures")
    models = fakes.Captioner(), fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]
    for other, named in [
        ((dataset, fakes.Captioner(temper="odd"), *models[1:]), "captioner"),
        ((datasets.Dataset("other things", dataset.examples), *models), "dataset"),
    ]:
        with pytest.raises(runs.RunFolderError, match=f"settings:\n  {named}: .* now\nGive"):
            fakes.image_text_image(*other, folder)


def test_another_similarity_scores_what_is_kept_and_draws_nothing(clean, tmp_path):
    pictures, shown = clean[0].parent / "pictures", []
    table = fakes.run(tmp_path / "run", pictures)
    generator, brightness = fakes.Generator(), PairSimilarity("brightness", lambda a, b: shown.append(b) or 0.5)
    dataset, colour = fakes.dataset(pictures), fakes.MeanColour()

    def again(*similarities):
        return fakes.image_text_image(dataset, fakes.Captioner(), generator, similarities, tmp_path / "run")

    more = again(colour, brightness)
    equal(more.drop(columns="brightness"), table.drop(columns="corner"))
    assert more.brightness.eq(0.5).all() and generator.calls == [] == colour.embedded
    kept = [Image.open(tmp_path / "run" / name) for name in table.image]
    assert [picture.tobytes() for picture in shown] == [picture.convert("RGB").tobytes() for picture in kept]
    again(brightness)
    assert len(shown) == 30  # once each
    other = PairSimilarity("brightness", lambda a, b: 0.25, version="2")
    assert again(other).brightness.eq(0.25).all()  # the scores of another version are not taken for its own


def test_kept_similarities_that_are_damaged_are_computed_again_and_no_others(clean, tmp_path):
    table = fakes.run(tmp_path / "run", clean[0].parent / "pictures")
    [folder] = (tmp_path / "run/scores").glob("colour *")
    (folder / "00001.parquet").write_bytes(b"")
    colour = fakes.MeanColour()
    models = fakes.Captioner(), fakes.Generator(), [colour, fakes.Corner()]
    again = fakes.image_text_image(fakes.dataset(clean[0].parent / "pictures"), *models, tmp_path / "run")
    equal(again, table)
    assert sum(colour.embedded) == 3 * 3 + 3


@pytest.mark.parametrize(("content", "message"), [("{", "JSONDecodeError"), ("[]", "TypeError"), (None, "no run.json")])
def test_folder_without_readable_settings_is_refused(tmp_path, content, message):
    fakes.run(tmp_path / "run", tmp_path / "p", n=3)
    if content is None:
        (tmp_path / "run/run.json").unlink()
    else:
        (tmp_path / "run/run.json").write_text(content)
    with pytest.raises(runs.RunFolderError, match=message):
        fakes.run(tmp_path / "run", tmp_path / "p", n=3)


@pytest.mark.parametrize("name", ["candidates", "steps", "batch_size"])
def test_settings_that_make_nothing_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0: it should be greater than or equal to 1"):
        dataclasses.replace(fakes.SETTINGS, **{name: 0})


def test_settings_are_the_profiles_but_for_what_is_changed():
    mini = profiles.PROFILES["mini"]
    settings = reconstruct.JourneySettings.of(mini, candidates=2, seed=7)
    same = ("steps", "guidance_scale", "batch_size")
    assert [getattr(settings, name) for name in same] == [getattr(mini, name) for name in same]
    assert (settings.candidates, settings.seed) == (2, 7)


@pytest.mark.parametrize("names", [["corner", "corner"], ["caption"]])
def test_similarities_that_cannot_be_columns_are_refused(tmp_path, names):
    models = fakes.Captioner(), fakes.Generator(), [PairSimilarity(name, fakes.common_letters) for name in names]
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(str(names))}: give names that differ, and none of \['image_id', ",
    ):
        fakes.image_text_image(fakes.dataset(tmp_path / "p"), *models, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_generator_is_opened_by_the_class_that_its_registry_entry_names():
    smoke = profiles.PROFILES["smoke"]
    assert type(models.load_generator(smoke, "miniature/lafite")) is models.class_of("miniature/lafite")
    usual = models.load_generator(smoke, scheduler="DDIM")
    assert type(usual) is Generator and type(usual.pipeline.scheduler).__name__ == "DDIMScheduler"


def test_first_rank_goes_to_the_most_alike_and_of_equals_to_the_first_row():
    table = pd.DataFrame(
        {
            "image_id": [9, 9, 9, 4, 4, 4],
            "candidate": [0, 1, 2, 0, 1, 2],
            "clip": [0.5, 0.5, 0.1, -0.2, 0.3, 0.0],
        }
    )
    assert reconstruct.rank(table, "clip")["rank"].tolist() == [1, 2, 3, 3, 1, 2]
    assert reconstruct.select(table, "clip").to_dict("list") == {
        "image_id": [9, 4],
        "candidate": [0, 1],
        "clip": [0.5, 0.3],
    }
    assert "rank" not in table


def test_ranking_by_what_was_not_measured_is_refused(clean):
    with pytest.raises(KeyError, match="'dino'.*colour, corner"):
        reconstruct.rank(clean[1], "dino")
    with pytest.raises(ValueError, match="'colour' holds 30 NaN"):
        reconstruct.select(clean[1].assign(colour=float("nan")), "colour")


@pytest.mark.filterwarnings("ignore:.*tokens, the generator reads")
def test_model_folders_go_there_and_back_whatever_the_chunk(tmp_path, monkeypatch):
    for name, make in dict(blip=tiny.blip, sd=tiny.stable_diffusion, clip=tiny.clip, dino=tiny.dino).items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    monkeypatch.setattr(registry, "locate", lambda name: str(tmp_path / name.removeprefix("miniature/")))
    captioner, generator, similarities = models.load_models(profiles.PROFILES["smoke"])
    dataset = fakes.dataset(tmp_path / "p", 3)

    def run(name, chunk, batch_size):
        settings = reconstruct.JourneySettings(candidates=2, steps=2, guidance_scale=2.0, batch_size=batch_size)
        return reconstruct.image_text_image(
            dataset, captioner, generator, similarities, tmp_path / name, settings, chunk=chunk
        )

    table, other = run("together", 3, 6), run("apart", 1, 1)
    equal(table.drop(columns=["clip", "dino"]), other.drop(columns=["clip", "dino"]))
    np.testing.assert_allclose(table[["clip", "dino"]], other[["clip", "dino"]], atol=1e-4)
    assert table["clip"].between(-1, 1).all() and table.dino.nunique() > 3
    with torch.no_grad():
        generator.pipeline.unet.conv_in.bias[0] += 0.01
    with pytest.raises(runs.RunFolderError, match="settings:\n  generator: .* now\nGive"):
        run("together", 3, 6)
