"""A step of each half of the cycle with models of the published sizes, random weights, small images, on a CPU."""

import importlib.util
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import BlipProcessor, CLIPTokenizer

from dalleflamingo import cycle, cycle_losses, registry
from dalleflamingo.captioner import BlipCaptioner
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.evaluation import cycle_reporting
from dalleflamingo.generator import Generator
from dalleflamingo.sources import registered

ROOT = Path(__file__).parents[1]
SIDE = 64  # pixels


@pytest.fixture(scope="module")
def full_size():
    """benchmarks/full_size.py, which knows the sizes."""
    spec = importlib.util.spec_from_file_location("full_size", ROOT / "benchmarks/full_size.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(psutil.virtual_memory().total < 12e9, reason="at full size it needs 6 GB beside the other tests")
def test_both_halves_of_the_cycle_train_at_full_size(full_size, tmp_path):
    torch.manual_seed(0)
    processor = BlipProcessor.from_pretrained(registry.locate("miniature/blip"))
    tokenizer = CLIPTokenizer.from_pretrained(Path(registry.locate("miniature/sd")) / "tokenizer")
    captioner = BlipCaptioner(full_size.blip(SIDE), processor)
    unet, encoder = full_size.unet(SIDE), full_size.text_encoder(len(tokenizer))
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        full_size.vae(SIDE), encoder, tokenizer, unet, schedule, None, None, requires_safety_checker=False
    )
    dataset = registered.load_dataset("miniature/coco", "val").subset(2)
    config = CycleConfig("blip-base", "sd-v1-4", "coco", steps=2, batch_size=2, learning_rate=1e-3, checkpointing=True)
    made, batches, trainable = cycle.build_cycle(config, captioner, Generator(pipeline), dataset)
    learning = cycle_losses.captioner_parameters(captioner) | cycle_losses.generator_parameters(made.generator)
    assert [sum(p.numel() for p in m.parameters()) for m in trainable.modules.values()] == [7_087_104, 12_390_400]
    watched = {f"{i} {name}": p for i, m in enumerate((captioner.model, unet)) for name, p in m.named_parameters()}
    before = {name: float(p.detach().double().sum()) for name, p in watched.items()}
    cycle.train_cycle(config, made, batches, trainable, tmp_path, Accelerator(cpu=True))
    moved = {name.split(" ")[1] for name, p in watched.items() if float(p.detach().double().sum()) != before[name]}
    assert moved <= set(learning) and len(moved) > len(learning) // 2
    rows = cycle_reporting.read_log(tmp_path)
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert [len(row) for row in rows] == [3, 3]


def test_the_arithmetic_of_a_step_is_that_of_its_parts(full_size):
    """At 512 pixels a forward pass has 1.22 T, 0.34 T, 0.54 T multiply-adds; a backward one has as many again."""
    part = full_size.parts()
    assert 2 * 1.22e12 < part["autoencoder decodes 512 px, with a gradient"] < 2.1 * 1.3e12
    assert 2 * 0.34e12 < part["U-Net, queries learn"] < 3 * 0.34e12
    assert part["autoencoder encodes"] == pytest.approx(0.55e12, rel=0.05)
    steps = {setting: counts for setting, *counts in full_size.steps(part)}
    rows = {setting: (image + text) / 2 / (one + three) for setting, (one, three, image, text) in steps.items()}
    assert rows["x̂ at 256 px, latents once"] < 1.4 < rows["x̂ at 512 px, latents at every step"]
