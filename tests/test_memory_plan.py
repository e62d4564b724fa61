"""The memory plan: what is counted without data is what real tensors take, and no notebook is above the limit."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dalleflamingo import registry
from dalleflamingo.research import architectures, memory, memory_plan

NOTEBOOKS = {path.stem: path for path in (Path(__file__).parents[1] / "notebooks").glob("*.ipynb")}


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )


def step(checkpointing: bool, samples: int = 4) -> None:
    """A model, forward, backward and an optimizer's step."""
    unet = small_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), foreach=False)
    latents, text = torch.randn(samples, 4, 16, 16), torch.randn(samples, 7, 32)
    unet(latents, torch.zeros(samples).long(), encoder_hidden_states=text).sample.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_tensors_and_tensors_without_data_take_the_same_memory(checkpointing):
    with memory.MemoryMeter() as real:
        step(checkpointing)
    with memory.without_data() as counted:
        step(checkpointing)
    assert counted.peak == pytest.approx(real.peak, rel=1e-3) and counted.live == real.live == 0


def test_the_count_is_close_to_what_pytorchs_own_profiler_sees_allocated():
    """The profiler also sees what kernels take inside, so a little more."""
    step(False)  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(False)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    with memory.without_data() as counted:
        step(False)
    assert 0.98 < peak / counted.peak < 1.15


def test_a_backward_pass_keeps_activations_and_checkpointing_does_not():
    one = 1024 * 256 * 4  # bytes of an activation
    live = {}
    for name in ("no gradient", "gradient", "checkpoint"):
        with memory.MemoryMeter() as meter, torch.set_grad_enabled(name != "no gradient"):
            layers = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(8)))
            values = torch.randn(1024, 256)
            before = meter.live
            result = checkpoint(layers, values, use_reentrant=False) if name == "checkpoint" else layers(values)
            live[name] = meter.live - before
            del result
            assert meter.live == before
    assert live == {"no gradient": one, "gradient": 8 * one, "checkpoint": one}


def test_values_that_are_not_known_are_those_that_need_most_memory():
    with memory.without_data() as meter:
        values = torch.randn(6, 4)
        mask = torch.zeros(6) > 1
        assert values[mask].shape == (6, 4) and mask.any() and mask.tolist() == [True] * 6
        assert values[values > 0].shape == (24,) and mask.nonzero().shape == (6, 1)
        before = meter.live
        del values
        assert meter.live == before - memory.BLOCK  # 96 bytes, in a whole block


def test_autocast_has_the_number_formats_of_cuda():
    with memory.without_data(), torch.autocast("cpu", torch.float16):
        values = nn.Linear(64, 64)(torch.randn(2, 64))
        assert values.dtype == torch.float16 and nn.LayerNorm(64)(values).dtype == torch.float32


def test_the_architectures_have_the_bytes_of_the_published_files():
    with torch.device("meta"):
        parts = {
            "blip-large": [architectures.blip(vision="large")],
            "blip-base": [architectures.blip()],
            "sd-v1-4": [architectures.text_encoder(), architectures.unet(), architectures.vae()],
            "dino-vitb8": [architectures.dino()],
        }
    for name, models in parts.items():
        size = sum(weight.nbytes for model in models for weight in model.state_dict().values())  # tied ones twice
        assert size / 1e6 == pytest.approx(registry.ENTRIES[name].size_mb, rel=0.01), name


def test_every_notebook_fits_a_t4_by_the_plan_and_the_plan_is_of_these_notebooks():
    plans = memory_plan.load()
    assert {one.notebook for one in plans} == set(memory_plan.STAGES) == set(NOTEBOOKS) - {"02_tokenizer_mapping"}
    for one in plans:
        if one.profile == "colab":
            assert 4 < one.peak / memory_plan.GIB <= memory_plan.LIMIT, one.notebook
        cells = {cell["id"] for cell in json.loads(NOTEBOOKS[one.notebook].read_text(encoding="utf-8"))["cells"]}
        counted = {stage.removeprefix("cell ") for stage in one.stages if stage.startswith("cell ")}
        assert counted <= cells, "cells have changed: python -m dalleflamingo research memory-plan"


def test_a_batch_of_eight_with_gradients_would_not_fit():
    """Without the profile's settings: float32, eight images, x̂ at 512 pixels, nothing computed again."""
    with torch.device("meta"):
        vae = architectures.vae()
    with memory.without_data() as meter:
        memory_plan._allocate(vae.requires_grad_(False), torch.float32)
        latents = torch.randn(8, 4, 64, 64, requires_grad=True)
        images = vae.decode(latents).sample
        assert images.shape == (8, 3, 512, 512) and meter.peak > 2 * memory_plan.LIMIT * memory_plan.GIB
