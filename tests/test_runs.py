"""Runs: what is kept is whole, another model is another run, and a training goes on bit for bit."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dalleflamingo import runs
from dalleflamingo.miniature.training.base import load_trained
from dalleflamingo.runs import Checkpoint, RunFolder, RunFolderError, fingerprint

SCHEMA = pa.schema({"image_id": pa.int64(), "digest": pa.string(), "candidate": pa.int64(), "image": pa.string()})


def row(run: RunFolder, image_id: int, candidate: int) -> dict:
    """A row of a run whose image is saved."""
    image = run.save_image(f"{image_id}-{candidate}", Image.new("RGB", (2, 2), (image_id, candidate, 0)))
    return {"image_id": image_id, "digest": f"d{image_id}", "candidate": candidate, "image": image}


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_gives_back_the_rows_and_scores_that_it_was_given(tmp_path):
    run = RunFolder(tmp_path / "run", {"seed": 0}, SCHEMA)
    rows = [row(run, image_id, k) for image_id in (3, 1) for k in range(2)]
    run.add(rows[:2])
    run.add(rows[2:])
    run.add_scores("clip", rows, [0.5, 0.25, -1.0, 2.0])
    again = RunFolder(tmp_path / "run", {"seed": 0}, SCHEMA)
    assert again.rows().to_dict("records") == rows
    assert again.scores("clip").score.tolist() == [0.5, 0.25, -1.0, 2.0] and again.scores("dino").empty
    with Image.open(tmp_path / "run" / rows[2]["image"]) as image:
        assert image.getpixel((0, 0)) == (1, 0, 0)
    table = again.finish(again.rows().assign(clip=again.scores("clip").score), [{"image_id": 9}])
    assert pd.read_parquet(table).columns.tolist() == ["image_id", "digest", "candidate", "image", "clip"]
    assert json.loads((tmp_path / "run/skipped.json").read_text()) == [{"image_id": 9}]


def test_an_example_with_a_lost_image_is_not_done(tmp_path):
    run = RunFolder(tmp_path / "run", {}, SCHEMA)
    rows = [row(run, image_id, k) for image_id in (3, 1) for k in range(2)]
    run.add(rows)
    (tmp_path / "run" / rows[1]["image"]).unlink()
    assert run.rows().to_dict("records") == rows[2:]


def test_other_settings_are_named_and_nothing_is_changed(tmp_path):
    run = RunFolder(tmp_path / "run", {"seed": 0, "steps": 20}, SCHEMA)
    run.add([row(run, 3, 0)])
    with pytest.raises(RunFolderError, match=r"(?s)steps: 20 there, 50 now\nGive another run_folder, or delete"):
        RunFolder(tmp_path / "run", {"seed": 0, "steps": 50}, SCHEMA)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"] == {"seed": 0, "steps": 20}


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_any_work(tmp_path):
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(RunFolderError, match=r"caf\\udce9 is not in UTF-8: give another") as refusal:
        RunFolder(named, {}, SCHEMA)
    assert str(refusal.value).isprintable() and not named.exists()
    RunFolder(tmp_path / "łódź 🚣", {}, SCHEMA).add([])


def test_two_contents_of_one_example_are_kept_apart(tmp_path):
    run = RunFolder(tmp_path / "run", {}, SCHEMA)
    first, second = row(run, 3, 0), row(run, 3, 0) | {"digest": "other"}
    run.add([first])
    run.add([second])
    run.add_scores("clip", [first, second], [0.5, 0.25])
    assert run.rows().to_dict("records") == [first, second]
    assert dict(zip(run.scores("clip").digest, run.scores("clip").score, strict=True)) == {"d3": 0.5, "other": 0.25}
    run.add([first])  # of one content the later row replaces the earlier
    assert len(run.rows()) == 2


def test_a_write_that_fails_leaves_the_older_file(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("no space left")

    runs.write_whole(tmp_path / "a.json", lambda path: path.write_text("whole"))
    with pytest.raises(OSError, match="no space"):
        runs.write_whole(tmp_path / "a.json", fails)
    assert (tmp_path / "a.json").read_text() == "whole"


# ── fingerprints ─────────────────────────────────────────────────────────────────────────────────────────────────────


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 3), nn.BatchNorm1d(3))


def test_a_fingerprint_is_the_same_for_the_same_model_and_settings():
    one = fingerprint("Net", modules=[network()], settings={"size": 64, "scheduler": {"name": "DDPM", "steps": 1000}})
    two = fingerprint("Net", modules=[network()], settings={"scheduler": {"steps": 1000, "name": "DDPM"}, "size": 64})
    assert one == two and one.startswith("Net ") and len(one.split()[1]) == 16


def test_a_fingerprint_changes_with_weights_buffers_shapes_settings_and_version():
    def retrained(change) -> nn.Module:
        net = network()
        with torch.no_grad():
            change(net)
        return net

    settings = {"size": 64, "scheduler": "DDPM"}
    found = [fingerprint("Net", modules=[network()], settings=settings)]
    for change in (
        lambda net: net[0].bias[2].add_(1e-4),
        lambda net: net[1].running_mean[0].add_(1e-4),
        lambda net: setattr(net, "0", nn.Linear(40, 3, bias=False)),
        lambda net: net[0].weight.set_(net[0].weight.reshape(40, 3)),
    ):
        found.append(fingerprint("Net", modules=[retrained(change)], settings=settings))
    found.append(fingerprint("Net", modules=[network(), network()], settings=settings))
    found.append(fingerprint("Net", modules=[network()], settings=settings | {"size": 65}))
    found.append(fingerprint("Net", modules=[network()], settings=settings | {"scheduler": "DDIM"}))
    found.append(fingerprint("Net", modules=[network()], settings=settings, version=2))
    found.append(fingerprint("Other", modules=[network()], settings=settings))
    assert len(set(found)) == len(found)


def test_settings_that_are_no_json_values_are_refused():
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        fingerprint("Net", settings={"scheduler": object()})


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def recipe(average: float):
    """A network that learns, with the decay of its average."""
    net = network()
    return SimpleNamespace(modules={"net": net}, parameters=net.parameters, average=average, net=net)


def train(own, folder, first: int, last: int) -> Checkpoint:
    """Steps `first` to `last` of a training, each with data of its own."""
    optimizer = torch.optim.AdamW(own.parameters(), 0.05)
    checkpoint = Checkpoint(folder, own, optimizer)
    assert checkpoint.load() == (first, float(first))
    for step in range(first, last):
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 40))).float()
        optimizer.zero_grad()
        own.net(x).square().mean().backward()
        optimizer.step()
        checkpoint.follow()
    checkpoint.save(last, float(last))
    return checkpoint


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_training_that_was_interrupted_ends_bit_for_bit_like_one_that_was_not(tmp_path, average):
    for name, ends in (("whole", (7,)), ("resumed", (1, 4, 7))):
        (tmp_path / name).mkdir()
        for first, last in zip((0, *ends), ends, strict=False):
            train(recipe(average), tmp_path / name, first, last)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["state.safetensors"]
    whole, resumed = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and any(key.startswith("average") for key in whole) == bool(average)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    trained = recipe(average)
    assert load_trained(trained, tmp_path / "resumed") == (7, 7.0)
    kept = whole["average.0"] if average else whole["net.0.weight"]
    assert torch.equal(trained.net[0].weight, kept)


def test_the_scale_of_half_precision_goes_on_where_it_was(tmp_path):
    """GradScaler doubles its scale after so many good steps and halves it at an overflow; both counts are its state."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.1, growth_factor=2.1, backoff_factor=0.3, growth_interval=3)

    def steps(own, optimizer, scaler, gradients):
        for gradient in gradients:
            scaler.scale(own.net.weight.sum() * gradient).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    gradients, net = [1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0], nn.Linear(3, 1, bias=False)
    own = SimpleNamespace(modules={"net": net}, parameters=net.parameters, average=0.0, net=net)
    whole, first, second = scaler(), scaler(), scaler()
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    steps(own, optimizer, whole, gradients)
    steps(own, optimizer, first, gradients[:5])
    Checkpoint(tmp_path, own, optimizer, first).save(5, 1.0)
    assert first.state_dict() != second.state_dict()
    assert Checkpoint(tmp_path, own, optimizer, second).load() == (5, 1.0)
    assert second.state_dict() == first.state_dict()
    steps(own, optimizer, second, gradients[5:])
    assert second.state_dict() == whole.state_dict() and whole.get_scale() == pytest.approx(8.1 * 2.1 * 0.3 * 2.1)
    Checkpoint(tmp_path, own, optimizer).save(7, 1.0)  # in float32
    untouched = scaler()
    assert Checkpoint(tmp_path, own, optimizer, untouched).load() == (7, 1.0)
    assert untouched.state_dict() == scaler().state_dict()


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 0.999), st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40))
def test_the_moving_average_is_that_of_its_formula(tmp_path_factory, decay, weights):
    """θ̄ ← d θ̄ + (1 − d) θ with d = min(decay, n / (n + 9)) at step n, and d = 0 at the first."""
    parameter = nn.Parameter(torch.zeros(1))
    own = SimpleNamespace(modules={}, parameters=lambda: [parameter], average=decay)
    checkpoint, expected = Checkpoint(tmp_path_factory.getbasetemp(), own), 0.0
    for n, weight in enumerate(weights, start=1):
        parameter.data.fill_(weight)
        checkpoint.follow()
        d = min(decay, n / (n + 9)) if n > 1 else 0.0
        expected = d * expected + (1 - d) * weight
    checkpoint.use_average()
    assert parameter.item() == pytest.approx(expected, abs=1e-4)


def test_a_run_without_a_checkpoint_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m dalleflamingo train vae"):
        load_trained(recipe(0.0), tmp_path / "vae")
