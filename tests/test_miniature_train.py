"""The training loop and its command: it learns, resumes with the same result, averages over processes, ships."""

import json
import math
import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from forked import fork
from safetensors.torch import load_file, save_file
from torch import multiprocessing

from dalleflamingo.miniature.scene_graph import COLOURS, SIZES, parse
from dalleflamingo.miniature.training import recipes
from dalleflamingo.miniature.training import train as training
from dalleflamingo.miniature.training.attributes import NOTHING
from dalleflamingo.miniature.training.base import Recipe, load_trained
from dalleflamingo.miniature.training.sd import (
    ATTRIBUTE_WEIGHT,
    LAYOUT_WEIGHT,
    SdRecipe,
    layout,
    make_scheduler,
    state_at_end,
    web_scene,
)
from dalleflamingo.miniature.training.train import learning_rate_schedule, train
from dalleflamingo.registry import RegistryError
from dalleflamingo.runs import Checkpoint


class LineRecipe(Recipe):
    """Fits y = 3 x + 1 to noisy points."""

    name, steps, learning_rate, warmup, average = "line", 60, 0.1, 5, 0.9

    def __init__(self):
        torch.manual_seed(0)
        self.line = torch.nn.Linear(1, 1)
        self.modules = {"line": self.line}

    def batch(self, rng, step):
        return torch.from_numpy(rng.normal(size=(16, 1)).astype(np.float32))

    def loss(self, x, step):
        return {"loss": (self.line(x) - 3 * x - 1 - 0.1 * torch.randn_like(x)).square().mean()}

    def restore(self, folder):
        self.line.load_state_dict(load_file(folder / "line.safetensors"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """A forked process cannot use a GPU that its parent has opened."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(run):
    return load_file(run / "state.safetensors")


def test_training_learns_and_logs(tmp_path):
    recipe = LineRecipe()
    recipe.steps = 300
    train(recipe, tmp_path, checkpoint_every=50)
    assert recipe.line.weight.item() == pytest.approx(3, abs=0.1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["loss"] < log[0]["loss"] / 10


def old_schedule(step, steps, warmup):
    """The factor of the learning rate that transformers' function replaced."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


@pytest.mark.parametrize("first", [0, 3, 40])
def test_schedule_is_transformers_and_ours_one_step_ahead_after_warm_up(first):
    recipe = LineRecipe()
    optimizer = torch.optim.SGD(recipe.parameter_groups(), lr=recipe.learning_rate)
    schedule, factors = learning_rate_schedule(optimizer, recipe, first), []
    for _ in range(first, recipe.steps):
        factors.append(optimizer.param_groups[0]["lr"] / recipe.learning_rate)
        optimizer.step()
        schedule.step()
    expected = [old_schedule(step + (step >= 5), 60, 5) for step in range(first, 60)]
    assert factors == pytest.approx(expected, rel=1e-9)
    assert factors[-1] == pytest.approx(0.02)


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    train(LineRecipe(), tmp_path / "whole", checkpoint_every=10)

    class Waiting(LineRecipe):
        """Waits to be killed some steps after the checkpoint that is waited for."""

        def batch(self, rng, step):
            time.sleep(0.01 if step < enough + 15 else 600)
            return super().batch(rng, step)

    def steps():
        return Checkpoint(tmp_path / "killed", LineRecipe()).load()[0]

    for enough in (10, 30):
        child = fork(lambda: train(Waiting(), tmp_path / "killed", checkpoint_every=10))
        deadline = time.time() + 100
        while steps() < enough:
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.time() < deadline
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert steps() < 60
    train(LineRecipe(), tmp_path / "killed", checkpoint_every=10)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_exported_weights_are_the_moving_average(tmp_path):
    recipe = LineRecipe()
    train(recipe, tmp_path, checkpoint_every=60)
    fresh = LineRecipe()
    assert load_trained(fresh, tmp_path)[0] == 60
    state = weights(tmp_path)
    assert torch.equal(fresh.line.weight, state["average.0"])
    assert not torch.equal(fresh.line.weight, state["line.weight"])


def test_a_stage_that_is_neither_trained_nor_shipped_says_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither trained, .* nor shipped, .*train a-new-one`"):
        recipes.trained(None, "a-new-one")


def test_a_run_that_was_never_trained_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="dalleflamingo train"):
        load_trained(LineRecipe(), tmp_path / "line")


def test_a_run_is_not_continued_with_another_seed(tmp_path):
    recipe = LineRecipe()
    recipe.steps = 3
    train(recipe, tmp_path, seed=1)
    with pytest.raises(ValueError, match="begun with seed 1: give --seed 1, or another folder by --run"):
        train(recipe, tmp_path, seed=2)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(tmp_path):
    recipe = LineRecipe()
    recipe.steps = 20
    train(recipe, tmp_path, checkpoint_every=10)
    recipe.steps, good = 30, recipe.loss
    recipe.loss = lambda x, step: {"loss": good(x, step)["loss"] * (float("nan") if step == 25 else 1)}
    with pytest.raises(
        FloatingPointError, match=r"step 25\. The checkpoint in .* is good: lower the recipe's learning_rate \(0\.\d+\)"
    ):
        train(recipe, tmp_path, checkpoint_every=10)
    assert Checkpoint(tmp_path, LineRecipe()).load()[0] == 20


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


class Halves(LineRecipe):
    """Process r of two has rows r, r + 2, … of a batch; a single process has all of them."""

    bfloat16 = False  # its rounding depends on how a batch is split

    def __init__(self, rank=0, processes=1):
        super().__init__()
        self.rows = slice(rank, None, processes)

    def batch(self, rng, step):
        return torch.from_numpy(np.random.default_rng(step).normal(size=(16, 1)).astype(np.float32))[self.rows]

    def loss(self, x, step):
        return {"loss": (self.line(x) - 3 * x - 1).square().mean()}


def train_half(rank, run, port):
    """One of two processes, as torchrun starts them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the parent
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    train(Halves(rank, 2), run)
    assert PartialState().num_processes == 2
    torch.distributed.destroy_process_group()


def test_two_processes_step_like_one_with_both_batches(tmp_path):
    train(Halves(), tmp_path / "one")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    multiprocessing.start_processes(train_half, (tmp_path / "two", port), nprocs=2, start_method="fork")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 1  # only one of them writes


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


class ExportedLine(LineRecipe):
    """A line, the only model of the command in these tests."""

    batch_size = 16

    def export(self, folder):
        folder.mkdir(parents=True)
        (folder / "line.txt").write_text(str(self.line.weight.item()))


@pytest.fixture
def line_only(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "line", ExportedLine)
    monkeypatch.setattr(training, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("DALLEFLAMINGO_DATA", str(tmp_path / "data"))
    (tmp_path / "data/miniature").mkdir(parents=True)
    return tmp_path


def test_the_command_trains_resumes_ships_and_says_what_it_made(line_only, capsys):
    assert training.main(["line", "--steps", "20", "--seed", "3"]) == 0
    assert re.search(rf"line: 20 steps in {line_only}/runs/line; \d+\.\d minutes, ", capsys.readouterr().out)
    assert training.main(["line", "--seed", "3", "--ship"]) == 0
    assert "line: 60 steps" in capsys.readouterr().out
    manifest = json.loads((line_only / "data/miniature/MANIFEST.json").read_text())
    entry = manifest["models"]["line"]
    assert entry["command"] == "python -m dalleflamingo train line --steps 60 --seed 3"
    assert entry["seed"] == 3 and entry["parameters"] == 2 and [point["step"] for point in entry["curve"]] == [20, 60]
    assert manifest["files"].keys() == {"line/line.txt"}
    shipped = float((line_only / "data/miniature/line/line.txt").read_text())
    assert shipped == weights(line_only / "runs/line")["average.0"].item()


def test_an_interrupted_command_says_what_is_kept_and_how_to_go_on(line_only, capsys, monkeypatch):
    assert training.main(["line", "--steps", "20"]) == 0

    def interrupt(recipe, rng, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExportedLine, "batch", interrupt)
    assert training.main(["line"]) == 130
    assert "keeps 20 steps of line; the same command goes on from there" in capsys.readouterr().out


def test_weights_to_begin_with_that_cannot_be_loaded_are_named(line_only, capsys):
    for name, tensors in (("other", {"weight": torch.zeros(2)}), ("empty", None)):
        (line_only / name).mkdir()
        if tensors:
            save_file(tensors, line_only / name / "line.safetensors")
        with pytest.raises(
            RegistryError, match=f"{line_only / name} (cannot be loaded .RuntimeError: |holds no .safe)"
        ):
            training.main(["line", "--init-from", str(line_only / name)])
    with pytest.raises(SystemExit):
        training.main(["line", "--init-from", str(line_only / "gone")])
    assert f"--init-from {line_only / 'gone'} is not a folder: name one that holds weights" in capsys.readouterr().err
    assert not (line_only / "runs/line/training.json").exists()


def test_one_folder_is_not_taken_for_all_models(capsys):
    with pytest.raises(SystemExit):
        training.main(["all", "--run", "somewhere"])
    assert "--run is the folder of one model" in capsys.readouterr().err


def test_help_names_every_model_and_what_it_is(capsys):
    with pytest.raises(SystemExit):
        training.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in recipes.RECIPES) and "GAN generator" in shown


# ── Stable Diffusion ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_schedule_ends_in_noise_and_its_sampler_starts_there():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4e-5, rel=0.05)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999


class Answers(torch.nn.Module):
    """A U-Net that knows the clean latents and gives "velocity", "noise" or "nothing"."""

    device = torch.device("cpu")

    def __init__(self, answer, latents):
        super().__init__()
        self.answer, self.latents, self.alphas_cumprod = answer, latents, make_scheduler().alphas_cumprod

    def forward(self, noised, timesteps, encoder_hidden_states):
        share = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noised - share.sqrt() * self.latents) / (1 - share).sqrt()
        velocity = share.sqrt() * noise - (1 - share).sqrt() * self.latents
        return SimpleNamespace(sample={"velocity": velocity, "noise": noise, "nothing": 0 * noise}[self.answer])


def sd_recipe(hidden_states, unet=None, layout_head=None):
    """An `SdRecipe` with networks that answer at once."""
    recipe = SdRecipe.__new__(SdRecipe)
    recipe.scheduler, recipe.tokenizer = make_scheduler(), SimpleNamespace(eos_token_id=9)
    recipe.text_encoder = lambda ids: SimpleNamespace(last_hidden_state=hidden_states)
    recipe.is_restored, recipe.unet, recipe.layout_head = False, unet, layout_head
    recipe.attribute_head = torch.nn.Linear(8, len(COLOURS) + len(SIZES))
    return recipe


def nothing_said(n, length):
    """The `attributes` of captions that name nothing."""
    return torch.full((2, n, length), NOTHING)


@pytest.mark.parametrize(("answer", "low", "high"), [("velocity", 0, 1e-6), ("noise", 0.1, 10)])
def test_sd_learns_the_velocity_of_its_noised_latents(answer, low, high):
    """A network that gives the velocity has no loss; one that gives the noise, as in Eq. 3, has."""
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"latents": latents, "input_ids": torch.zeros(4, 77, dtype=torch.long), "attributes": nothing_said(4, 77)}
    recipe = sd_recipe(torch.zeros(4, 77, 8), Answers(answer, latents), torch.nn.Linear(8, 4 * 8 * 8))
    torch.manual_seed(0)
    assert low <= recipe.loss(batch, 0)["velocity"].item() <= high


def test_layouts_are_predicted_at_the_end_of_captions_and_not_of_empty_ones():
    hidden_states, ids = torch.randn(3, 5, 8), torch.tensor([[0, 1, 2, 9, 9], [0, 9, 9, 9, 9], [0, 3, 9, 9, 9]])
    ends = torch.stack([hidden_states[0, 3], hidden_states[1, 1], hidden_states[2, 2]])
    assert torch.equal(state_at_end(hidden_states, ids, 9), ends)
    latents = torch.arange(256.0).view(1, 1, 16, 16).expand(3, 4, 16, 16)
    assert layout(latents)[0, 0, 0, 0] == (0 + 1 + 16 + 17) / 4 and layout(latents).shape == (3, 4, 8, 8)

    def far_off_for_the_empty_caption(state):
        return torch.where(torch.isin(state, hidden_states[1, 1]), 1e6, 0.0).repeat(1, 32)

    recipe = sd_recipe(hidden_states, Answers("nothing", latents), far_off_for_the_empty_caption)
    attributes = nothing_said(3, 5)
    attributes[0, 2, 1] = 3
    losses = recipe.loss({"latents": latents, "input_ids": ids, "attributes": attributes}, 10**9)
    assert losses["layout"].item() == pytest.approx(layout(latents).square().mean().item(), rel=1e-5)
    logits = recipe.attribute_head(hidden_states[2, 1])[: len(COLOURS)]
    assert losses["attributes"].item() == pytest.approx(-logits.log_softmax(0)[3].item(), rel=1e-5)
    parts = losses["velocity"] + LAYOUT_WEIGHT * losses["layout"] + ATTRIBUTE_WEIGHT * losses["attributes"]
    assert losses["loss"].item() == pytest.approx(parts.item())


def test_curriculum_has_one_thing_then_two_with_minimal_captions():
    captions = []
    recipe = SdRecipe.__new__(SdRecipe)
    recipe.steps, recipe.is_restored, recipe.latents = 100, False, torch.zeros(2000, 4, 16, 16)
    recipe.thing_counts = np.array([len(web_scene(i).things) for i in range(2000)])
    recipe.vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))
    written = SimpleNamespace(input_ids=torch.zeros(32, 77), char_to_token=lambda caption, character: character)

    def tokenizer(texts, **_):
        captions[:] = texts
        return written

    recipe.tokenizer = tokenizer
    of_step = {}
    for step, count in ((0, 1), (4, 1), (5, 2), (24, 2), (25, None), (99, None)):
        assert recipe.curriculum_stage(step) == count
        recipe.batch(np.random.default_rng(step), step)
        of_step[step] = [caption for caption in captions if caption]
        assert len(captions) == 32
    for caption in (*of_step[0], *of_step[4]):
        assert re.search(r"on the|to the|at the|in the", caption) and len(parse(caption).things) == 1
    for caption in (*of_step[5], *of_step[24]):
        assert len(parse(caption).things) == 2 and len(parse(caption).relations) == 1 and parse(caption).ground is None
    assert {len(parse(caption).things) for caption in of_step[99]} == {1, 2, 3}
