"""The training loop: it learns, goes on after a kill as if nothing had happened, and stops at nonsense."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dalleflamingo.miniature.scene_graph import parse
from dalleflamingo.miniature.training import recipes
from dalleflamingo.miniature.training.sd import FAR_WEIGHT, SdRecipe, at_end, far_view, make_scheduler, web_scene
from dalleflamingo.miniature.training.train import schedule, train
from dalleflamingo.runs import Checkpoint, load_trained


class LineRecipe:
    """Fits y = 3 x + 1 to noisy points; slow enough to be killed."""

    name, steps, learning_rate, weight_decay, warmup, average = "line", 60, 0.1, 0.0, 5, 0.9

    def __init__(self, seconds: float = 0.0):
        torch.manual_seed(0)
        self.line, self.seconds = torch.nn.Linear(1, 1), seconds
        self.modules = {"line": self.line}

    def parameters(self):
        return self.line.parameters()

    def batch(self, rng, step):
        time.sleep(self.seconds)
        return torch.from_numpy(rng.normal(size=(16, 1)).astype(np.float32))

    def loss(self, x, step):
        return {"loss": (self.line(x) - 3 * x - 1 - 0.1 * torch.randn_like(x)).square().mean()}

    def after_step(self, step):
        pass


def test_training_learns_and_logs(tmp_path):
    recipe = LineRecipe()
    recipe.steps = 300
    train(recipe, tmp_path, checkpoint_every=50)
    assert recipe.line.weight.item() == pytest.approx(3, abs=0.1)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["loss"] < log[0]["loss"] / 10


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    train(LineRecipe(), tmp_path / "whole", checkpoint_every=10)
    program = (
        "from pathlib import Path; import sys; sys.path.insert(0, 'tests');"
        "from test_miniature_train import LineRecipe, train;"
        f"train(LineRecipe(0.02), Path({str(tmp_path / 'killed')!r}), checkpoint_every=10)"
    )
    state = tmp_path / "killed/state.safetensors"
    for steps in (10, 30):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        while not state.exists() or Checkpoint(tmp_path / "killed", LineRecipe()).load()[0] < steps:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert Checkpoint(tmp_path / "killed", LineRecipe()).load()[0] < 60
    train(LineRecipe(), tmp_path / "killed", checkpoint_every=10)
    whole, killed = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_what_is_shipped_is_the_moving_average(tmp_path):
    recipe = LineRecipe()
    train(recipe, tmp_path, checkpoint_every=60)
    fresh = LineRecipe()
    assert load_trained(fresh, tmp_path)[0] == 60
    state = load_file(tmp_path / "state.safetensors")
    assert torch.equal(fresh.line.weight, state["average.0"])
    assert not torch.equal(fresh.line.weight, state["line.weight"])


def test_a_stage_that_is_neither_trained_nor_shipped_says_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither trained, .* nor shipped, .*train a-new-one`"):
        recipes.trained(None, "a-new-one")


def test_a_run_that_was_never_trained_says_how_to_train_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="dalleflamingo train"):
        load_trained(LineRecipe(), tmp_path / "line")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoint(tmp_path):
    recipe = LineRecipe()
    recipe.steps = 20
    train(recipe, tmp_path, checkpoint_every=10)
    recipe.steps, good = 30, recipe.loss
    recipe.loss = lambda x, step: {"loss": good(x, step)["loss"] * (float("nan") if step == 25 else 1)}
    with pytest.raises(FloatingPointError, match="step 25"):
        train(recipe, tmp_path, checkpoint_every=10)
    assert Checkpoint(tmp_path, LineRecipe()).load()[0] == 20


def test_the_learning_rate_warms_up_and_decays():
    assert schedule(0, 100, 10) == pytest.approx(0.1)
    assert schedule(10, 100, 10) == pytest.approx(1)
    assert schedule(55, 100, 10) == pytest.approx(0.02 + 0.98 / 2)
    assert schedule(100, 100, 10) == pytest.approx(0.02)


def test_the_noise_schedule_ends_in_noise_and_its_sampler_starts_there():
    scheduler = make_scheduler()
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4e-5, rel=0.05)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999


def test_sd_learns_the_velocity_of_its_noised_latents():
    """A network that knows the clean latent has no loss; one that gives the noise, as Eq. 3 has it, has."""
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"latents": latents, "input_ids": torch.zeros(4, 77, dtype=torch.long)}
    kept = make_scheduler().alphas_cumprod

    class Knows(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, noised, timesteps, states):
            share = kept[timesteps].view(-1, 1, 1, 1)
            noise = (noised - share.sqrt() * latents) / (1 - share).sqrt()
            velocity = share.sqrt() * noise - (1 - share).sqrt() * latents
            return SimpleNamespace(sample={"velocity": velocity, "noise": noise}[self.answer])

    recipe = SdRecipe.__new__(SdRecipe)
    recipe.scheduler, recipe.tokenizer = make_scheduler(), SimpleNamespace(eos_token_id=9)
    recipe.text_encoder = lambda ids: SimpleNamespace(last_hidden_state=torch.zeros(*ids.shape, 8))
    recipe.tell = torch.nn.Linear(8, 4 * 8 * 8)
    for answer, low, high in (("velocity", 0, 1e-6), ("noise", 0.1, 10)):
        recipe.unet = Knows(answer)
        torch.manual_seed(0)
        assert low <= recipe.loss(batch, 0)["near"].item() <= high


def test_the_far_view_is_told_by_the_state_behind_the_captions_end_and_not_where_there_is_no_caption():
    states, ids = torch.randn(3, 5, 8), torch.tensor([[0, 1, 2, 9, 9], [0, 9, 9, 9, 9], [0, 3, 9, 9, 9]])
    assert torch.equal(at_end(states, ids, 9), torch.stack([states[0, 3], states[1, 1], states[2, 2]]))
    latents = torch.arange(256.0).view(1, 1, 16, 16).expand(3, 4, 16, 16)
    assert far_view(latents)[0, 0, 0, 0] == (0 + 1 + 16 + 17) / 4 and far_view(latents).shape == (3, 4, 8, 8)

    recipe = SdRecipe.__new__(SdRecipe)
    recipe.scheduler, recipe.tokenizer, recipe.tell = make_scheduler(), SimpleNamespace(eos_token_id=9), None
    recipe.text_encoder = lambda ids: SimpleNamespace(last_hidden_state=states)

    class Nothing:
        device = torch.device("cpu")

        def __call__(self, noised, timesteps, states):
            return SimpleNamespace(sample=torch.zeros_like(noised))

    recipe.unet = Nothing()
    recipe.tell = lambda state: torch.where(torch.isin(state, states[1, 1]), 1e6, 0.0).repeat(1, 32)
    losses = recipe.loss({"latents": latents, "input_ids": ids}, 10**9)
    assert losses["far"].item() == pytest.approx(far_view(latents).square().mean().item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx((losses["near"] + FAR_WEIGHT * losses["far"]).item())


def test_lessons_show_one_thing_then_two_told_barely():
    recipe = SdRecipe.__new__(SdRecipe)
    recipe.steps, recipe.latents = 100, torch.zeros(2000, 4, 16, 16)
    recipe.things = np.array([len(web_scene(i).things) for i in range(2000)])
    recipe.vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))
    told = []
    recipe.tokenizer = lambda captions, **_: told.extend(captions) or SimpleNamespace(input_ids=None)
    words = {}
    for step, things in ((0, 1), (4, 1), (5, 2), (39, 2), (40, None), (99, None)):
        assert recipe.lesson(step) == things
        told.clear()
        recipe.batch(np.random.default_rng(step), step)
        words[step] = [caption for caption in told if caption]
        assert len(told) == 32
    for caption in (*words[0], *words[4]):
        assert caption.split()[3] in ("to", "above", "below", "in") and len(parse(caption).things) == 1
    for caption in (*words[5], *words[39]):
        assert len(parse(caption).things) == 2 and len(parse(caption).relations) == 1 and parse(caption).ground is None
    assert {len(parse(caption).things) for caption in words[99]} == {1, 2, 3}


class Halves(LineRecipe):
    """Worker r of two sees rows r, r + 2, … of a batch; a single worker all of them."""

    def batch(self, rng, step):
        rows = torch.from_numpy(np.random.default_rng(step).normal(size=(16, 1)).astype(np.float32))
        return rows[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]

    def loss(self, x, step):
        return {"loss": (self.line(x) - 3 * x - 1).square().mean()}


def test_two_workers_step_like_one_with_both_batches(tmp_path):
    train(Halves(), tmp_path / "one")
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path; import sys; sys.path.insert(0, 'tests')\n"
        "import torch; torch.distributed.init_process_group('gloo')\n"
        "from test_miniature_train import Halves, train\n"
        f"train(Halves(), Path({str(tmp_path / 'two')!r}))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    subprocess.run(torchrun, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
