"""The generator in ε form against algebra, and what the study makes of its runs."""

import json
from functools import partial

import diffusers
import numpy as np
import pytest
import tiny
import tiny_cycle
import torch

from dalleflamingo import profiles
from dalleflamingo.cycle import build_cycle
from dalleflamingo.cycle_losses import Cycle, generator_parameters
from dalleflamingo.generator import Generator
from dalleflamingo.research import epsilon, epsilon_study
from dalleflamingo.research.cycle_arms import START
from dalleflamingo.research.epsilon import AtTimestep, EpsilonUNet, epsilon_form, noisy_at
from dalleflamingo.research.epsilon_study import FORMS, LOSSES, arm_of
from dalleflamingo.research.repair import damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cycle.save_models(tmp_path_factory.mktemp("models"))


def v_form(folder, dtype: torch.dtype = torch.float64, scheduler: str | None = None) -> Generator:
    generator = Generator.from_pretrained(str(folder / "sd"), dtype=dtype, scheduler=scheduler)
    generator.pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    return generator


def given(folder, generator: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of three images, and the hidden states of a caption for each."""
    like = next(generator.pipeline.unet.parameters())
    latents = generator.encode_images(tiny.pictures(3), like)
    hidden, _ = generator.pipeline.encode_prompt(["a red bird", "two cats", "a boat"], "cpu", 1, False)
    return latents, hidden.to(latents)


def test_the_prediction_is_that_of_v_with_z_t_for_every_timestep_of_a_batch(folder):
    generator = v_form(folder)
    unet, alphas = generator.pipeline.unet, generator.pipeline.scheduler.alphas_cumprod
    own = EpsilonUNet.of(unet, alphas)
    z_t, hidden = given(folder, generator)
    for timestep in (torch.tensor([0, 500, 999]), torch.tensor(400), 7):
        velocity = unet(z_t, timestep, encoder_hidden_states=hidden).sample
        alpha = alphas.double()[torch.as_tensor(timestep).reshape(-1)].view(-1, 1, 1, 1)
        expected = alpha**0.5 * velocity + (1 - alpha) ** 0.5 * z_t
        torch.testing.assert_close(own(z_t, timestep, encoder_hidden_states=hidden).sample, expected)
        [as_tuple] = own(z_t, timestep, hidden, return_dict=False)
        torch.testing.assert_close(as_tuple, expected)


@pytest.mark.parametrize("scheduler", [None, "DDIM", "DPMSolverMultistep", "Euler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_both_forms_make_the_same_images_with_stock_schedulers(folder, scheduler, guidance_scale):
    generator = v_form(folder, torch.float32, scheduler)
    twin = epsilon_form(generator)
    assert twin.pipeline.scheduler.config.prediction_type == "epsilon"
    assert type(twin.pipeline.scheduler) is type(generator.pipeline.scheduler)
    assert isinstance(twin.pipeline, diffusers.StableDiffusionPipeline)
    found = epsilon.pixel_differences((generator, twin), ["a red bird", "two cats"], 5, guidance_scale)
    assert found["largest"] <= 1 and found["share"] < 0.01 and found["n"] == 2
    velocity = generator.render(["a red bird"], [0], 5, guidance_scale)[0]
    generator.pipeline.scheduler.register_to_config(prediction_type="epsilon")  # v taken for ε: another image
    assert (np.asarray(generator.render(["a red bird"], [0], 5, guidance_scale)[0]) != np.asarray(velocity)).any()


def test_the_losses_have_the_ratio_of_alpha_and_the_clean_latents_are_the_same(folder):
    generator = v_form(folder)
    twin = epsilon_form(generator)
    latents, hidden = given(folder, generator)
    for timestep in (0, 10, 300, 700, 999):
        both = []
        for one in (generator, twin):
            noisy = noisy_at(latents, one, timestep, seed=3)
            output = one.predict(noisy, hidden)
            both.append((noisy, noisy.loss(output), noisy.original_sample(output)))
        (noisy, v, clean), (_, noise, other) = both
        alpha = generator.pipeline.scheduler.alphas_cumprod[timestep].double()
        assert noisy.timesteps.tolist() == [timestep] * 3
        torch.testing.assert_close(noise, alpha * v, rtol=1e-6, atol=0)
        torch.testing.assert_close(other, clean, rtol=1e-6, atol=1e-9)


def test_the_comparison_finds_agreement_and_would_find_a_fault(folder):
    generator = v_form(folder, torch.float32)
    captioner, _ = tiny_cycle.models(folder)
    cycle, batches, _ = build_cycle(tiny_cycle.SMALL, captioner, generator, tiny_cycle.dataset(folder))
    twin = epsilon_form(generator)
    other = Cycle(
        cycle.captioner,
        twin,
        cycle.bridge,
        cycle.trainable["captioner"],
        list(generator_parameters(twin).values()),
        cycle.losses,
    )
    batch = batches.batch(0)
    for one in epsilon.compare_timesteps((cycle, other), batch, [100, 600]):
        errors = one.loss_ratio_error, one.original_sample, one.gradient_2, one.gradient_3, one.gradient_4
        assert max(errors) < 1e-3 and min(one.norm_2, one.norm_3) > 0
        assert one.alpha == pytest.approx(generator.pipeline.scheduler.alphas_cumprod[one.timestep].item())
    twin.pipeline.unet.alphas_cumprod = twin.pipeline.unet.alphas_cumprod.roll(100)  # ᾱ of another timestep
    [wrong] = epsilon.compare_timesteps((cycle, other), batch, [600])
    assert min(wrong.loss_ratio_error, wrong.original_sample, wrong.gradient_3, wrong.gradient_4) > 1e-2


def test_an_epsilon_generator_has_no_epsilon_form(folder):
    with pytest.raises(ValueError, match="predicts 'epsilon': its ε form is made of one that predicts 'v_prediction'"):
        epsilon_form(Generator.from_pretrained(str(folder / "sd")))


def test_a_timestep_between_two_is_refused(folder):
    generator = v_form(folder)
    z_t, hidden = given(folder, generator)
    with pytest.raises(ValueError, match=r"timesteps \[749.25\]: ᾱ is known at whole ones"):
        epsilon_form(generator).pipeline.unet(z_t, torch.tensor(749.25), hidden)


def test_training_one_form_leaves_the_other_alone_and_only_queries_are_damaged(folder):
    captioner, _ = tiny_cycle.models(folder)
    generator = v_form(folder)
    twin = epsilon_form(generator)
    before = {name: value.clone() for name, value in generator.pipeline.unet.state_dict().items()}
    words = {name: value.clone() for name, value in captioner.model.state_dict().items()}
    assert twin.pipeline.unet.state_dict().keys() == before.keys()
    damage(captioner, twin, factor=0.5)
    for name, value in twin.pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, before[name] * (0.5 if "attn2.to_q." in name else 1.0))
        assert torch.equal(generator.pipeline.unet.state_dict()[name], before[name])
    for name, value in captioner.model.state_dict().items():
        torch.testing.assert_close(value, words[name] * (0.5 if "crossattention.self.query." in name else 1.0))


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_cycle_is_built_in_either_form(folder, form):
    captioner, _ = tiny_cycle.models(folder)
    generator = v_form(folder, torch.float32)
    whole = next(iter(generator_parameters(generator).values())).detach().clone()
    cycle, batches, trainable = epsilon_study.build_damaged(
        tiny_cycle.SMALL, captioner, generator, tiny_cycle.dataset(folder), form
    )
    assert isinstance(cycle.generator.pipeline.unet, EpsilonUNet) == (form == "ε")
    torch.testing.assert_close(cycle.trainable["generator"][0].detach(), epsilon_study.DAMAGE * whole)
    unet = {id(parameter) for parameter in cycle.generator.pipeline.unet.parameters() if parameter.requires_grad}
    assert unet == {id(parameter) for parameter in cycle.trainable["generator"]}  # what learns is what is rendered
    loss = cycle.text_losses(batches.batch(0), torch.Generator().manual_seed(0))["generation"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in cycle.trainable["generator"])


def test_shares_weigh_the_norms_by_alpha():
    zero = dict.fromkeys(("loss_v", "loss_epsilon", "original_sample", "gradient_3", "gradient_2", "gradient_4"), 1.0)
    timesteps = [AtTimestep(timestep=t, alpha=a, norm_3=3.0, norm_2=t, **zero) for t, a in ((1, 0.5), (3, 0.25))]
    assert epsilon_study.shares(timesteps, "3")["v"].tolist() == [0.5, 0.5]
    assert epsilon_study.shares(timesteps, "3")["ε"] == pytest.approx([2 / 3, 1 / 3])
    assert epsilon_study.shares(timesteps, "2")["v"] == pytest.approx([0.25, 0.75])
    assert epsilon_study.shares(timesteps, "2")["ε"] == pytest.approx([0.4, 0.6])


def test_the_page_has_the_difference_of_every_pair_of_runs(tmp_path):
    profile = profiles.PROFILES["smoke"]
    dataset = epsilon_study.development_sets(profile)["nocaps"].subset(6)
    ids, rng = [example.image_id for example in dataset], np.random.default_rng(0)
    for arm, seed in [(START, 0), *((arm_of(losses, form), s) for losses in LOSSES for form in FORMS for s in (0, 1))]:
        quality = 1 if arm.endswith("v") else 0  # v writes a human caption, ε and the start nothing right
        captions = {i: dataset.filter({i})[0].references[0] if quality else "a" for i in ids}
        found = {
            "arm": arm,
            "captioner": profile.captioner,
            "seed": seed,
            "captions": {"nocaps": captions},
            "images": {},
        }
        if "(2)," not in arm:
            features = rng.random((6, 64)).tolist()
            distance = [20.0 - 5 * quality] * 6
            found["images"] = {"nocaps": {"image_id": ids, "clip_distance": distance, "features": features}}
        (tmp_path / f"{arm}-{seed}").mkdir()
        (tmp_path / f"{arm}-{seed}/result.json").write_text(json.dumps(found))
    runs = epsilon_study.compare_runs(tmp_path, dataset, profile)
    apart = runs[runs["what"] == "ε − v"].set_index(["losses", "metric"])
    assert (apart.loc["(2)"].loc["cider", "value"] < 0) and ("(2)", "fid") not in apart.index
    for losses in list(LOSSES)[1:]:
        assert apart.loc[(losses, "clip_distance"), "value"] == pytest.approx(5)
        both = runs[(runs["losses"] == losses) & (runs["metric"] == "clip_distance")].set_index("what")["value"]
        assert (both["v"], both["ε"]) == (15, 20)
    evenly = [AtTimestep(t, 1 - t / 1000, 1.0, 0.5, 1e-7, 2e-7, 3e-7, 4e-7, 1.0, 1.0) for t in epsilon_study.TIMESTEPS]
    training = {"seeds": 2, "steps": 3, "images": 6}
    pixels = {"largest": 1, "share": 0.001, "n": 2}
    comparison = epsilon_study.Comparison(profile, pixels, evenly, runs, training)
    (tmp_path / "docs/results").mkdir(parents=True)
    epsilon_study.write(tmp_path / "docs", comparison)
    page = (tmp_path / "docs/results/epsilon.md").read_text()
    assert "excludes 0 for CIDEr × 100 of (2); CIDEr × 100 of (2) to (4)" in page and "FID of (2) to (4)" not in page
    assert "supply 50 % of the gradient of (2) in v form" in page and "+5.00 [+5.00, +5.00]" in page
    kept = json.loads((tmp_path / "docs/results/epsilon.json").read_text())
    assert len(kept["runs"]) == len(runs) and len(kept["timesteps"]) == len(epsilon_study.TIMESTEPS)


def test_both_forms_are_trained_from_the_same_settings_and_seeds(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(epsilon_study, "train_and_evaluate", lambda *given: asked.append(given))
    epsilon_study.train_all(profiles.PROFILES["smoke"], tmp_path, None, seeds=2, steps=7)
    assert len(asked) == 1 + 2 * len(LOSSES) * len(FORMS)
    by_arm = {(run.arm, run.seed): (config, list(generated), build) for run, config, _, _, generated, _, build in asked}
    for losses, fields in LOSSES.items():
        for seed in range(2):
            v, noise = (by_arm[arm_of(losses, form), seed] for form in FORMS)
            assert v[0] == noise[0] and v[0].steps == 7 and v[0].seed == seed
            assert {name: getattr(v[0].losses, name) for name in fields} == fields
            assert (v[2].keywords, noise[2].keywords) == ({"form": "v"}, {"form": "ε"})
            assert v[1] == noise[1] == ([] if losses == "(2)" else ["nocaps"])
    assert isinstance(by_arm[START, 0][2], partial) and by_arm[START, 0][1] == ["nocaps"]
