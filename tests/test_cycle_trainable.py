"""What cycle finetuning trains: names and exact counts, at full size without a weight in memory; LoRA, end to end."""

import dataclasses

import pytest
import tiny
import tiny_cycle
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForConditionalGeneration

from dalleflamingo import cycle_losses, profiles
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.evaluation import cycle_reporting
from dalleflamingo.research import gradients


def count(trainable: dict[str, torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in trainable.values())


class Holder:
    """A captioner or generator of nothing but its model."""

    def __init__(self, model):
        self.model = model
        self.pipeline = type("Pipeline", (), {"unet": model})


@pytest.mark.parametrize(
    "vision",
    [
        {"hidden_size": 768, "num_hidden_layers": 12},
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ],
    ids=["base", "large"],
)
def test_full_size_blip_learns_7_087_104_numbers(vision):
    config = BlipConfig(
        text_config={"hidden_size": 768, "num_hidden_layers": 12, "encoder_hidden_size": vision["hidden_size"]},
        vision_config=vision,
    )
    with torch.device("meta"):
        model = BlipForConditionalGeneration(config)
    learning = cycle_losses.captioner_parameters(Holder(model))
    assert len(learning) == 2 * 12 and count(learning) == 7_087_104
    assert all(name.startswith("text_decoder.") for name in learning)


def test_stable_diffusion_v1_learns_12_390_400_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)  # v1-4's config
    learning = cycle_losses.generator_parameters(Holder(unet))
    assert len(learning) == 16 and count(learning) == 12_390_400


def test_blip2_learns_its_query_tokens(tmp_path):
    captioner = Captioner.from_pretrained(str(tiny.blip2(tmp_path)))
    learning = cycle_losses.captioner_parameters(captioner)
    assert list(learning) == ["query_tokens"] and count(learning) == 3 * 16


def test_everything_else_is_frozen_and_a_model_without_them_is_refused(tmp_path):
    captioner = Captioner.from_pretrained(str(tiny.blip(tmp_path)))
    learning = cycle_losses.captioner_parameters(captioner)
    cycle_losses.freeze_all_but(captioner.model, learning)
    assert {name for name, p in captioner.model.named_parameters() if p.requires_grad} == set(learning)
    with pytest.raises(ValueError, match="Linear has no parameter with 'attn2.to_q.' in its name"):
        cycle_losses.generator_parameters(Holder(torch.nn.Linear(2, 2)))


# ── more than the queries ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [tiny.blip, tiny.blip2])
def test_cross_attention_holds_the_queries_and_nothing_outside_it(tmp_path, kind):
    captioner = Captioner.from_pretrained(str(kind(tmp_path)))
    learning = cycle_losses.captioner_parameters(captioner, "cross-attention")
    projections = {name.rpartition("crossattention.")[2].rpartition(".")[0] for name in learning}
    assert {"output.dense", "output.LayerNorm"} < projections and len(projections) == 5
    inside = [m for name, m in captioner.model.named_modules() if name.endswith("crossattention")]
    assert count(learning) == sum(p.numel() for module in inside for p in module.parameters()) > 0


def test_the_counts_at_full_size_are_those_of_the_layers():
    counts = gradients.full_size_counts().set_index("model")
    blip, blip2, unet = (counts.loc[name] for name in counts.index)
    assert blip["queries"] == 7_087_104 and unet["queries"] == 12_390_400 and blip2["queries"] == 32 * 768
    dense = 768 * 768 + 768
    assert blip["cross-attention"] == 12 * (2 * dense + 2 * (1024 * 768 + 768) + 2 * 768)
    assert blip["lora"] == 12 * 8 * (2 * (768 + 768) + 2 * (1024 + 768))
    widths = [320] * 5 + [640] * 5 + [1280] * 6  # of the U-Net's 16 attention blocks
    assert unet["lora"] == 8 * sum(2 * 2 * width + 2 * (width + 768) for width in widths)
    assert unet["cross-attention"] == sum(2 * width * width + width + 2 * 768 * width for width in widths)
    assert 469_000_000 < blip["all"] + 768 * 30524 < 471_000_000  # the published file has the tied matrix twice
    assert unet["all"] == 859_520_964


LORA = dataclasses.replace(tiny_cycle.SMALL, trainable="lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cycle.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finetuned(folder, tmp_path_factory):
    """A cycle trained with LoRA, and its run folder with the export."""
    run_folder = tmp_path_factory.mktemp("lora")
    cycle = tiny_cycle.run(LORA, folder, run_folder)
    cycle_reporting.export(cycle, run_folder)
    return cycle, run_folder


def test_lora_changes_nothing_at_first_and_then_both_models(folder, finetuned):
    cycles = tiny_cycle.build(tiny_cycle.SMALL, folder)[0], tiny_cycle.build(LORA, folder)[0], finetuned[0]
    models = {
        "captioner": [cycle.captioner.model for cycle in cycles],
        "generator": [cycle.generator.pipeline.unet for cycle in cycles],
    }
    for who, (before, built, after) in models.items():
        parts = [dict(model.named_parameters()) for model in (before, built, after)]
        for name, parameter in parts[0].items():
            wrapped = name if name in parts[1] else ".base_layer.".join(name.rsplit(".", 1))
            assert torch.equal(parameter, parts[1][wrapped]) and torch.equal(parameter, parts[2][wrapped])
        ends = [name for name in parts[1] if ".lora_B." in name]
        assert ends and not any(parts[1][name].any() for name in ends), who
        assert all(parts[2][name].any() for name in ends), who


def test_lora_folders_open_in_stock_models_with_peft(folder, finetuned):
    cycle, run_folder = finetuned
    batch = tiny_cycle.build(tiny_cycle.SMALL, folder)[1].batch(0)
    ours, _ = cycle.captioner.token_logits(batch.pixel_values, batch.captions)
    assert not list((run_folder / "captioner").glob("model*.safetensors"))
    for opened in ("load_adapter", "PeftModel"):
        stock = Captioner.from_pretrained(str(folder / "blip"))
        before, _ = stock.token_logits(batch.pixel_values, batch.captions)
        if opened == "load_adapter":
            stock.model.load_adapter(str(run_folder / "captioner"))
        else:
            stock.model = PeftModel.from_pretrained(stock.model, run_folder / "captioner").merge_and_unload()
        after, _ = stock.token_logits(batch.pixel_values, batch.captions)
        torch.testing.assert_close(after, ours, atol=1e-5, rtol=1e-5)
        assert (before - ours).abs().max() > 1e-3
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    given = torch.randn(2, *batch.latents.shape[1:]), 300, batch.encoder_hidden_states[:2]
    before = pipeline.unet(*given).sample
    pipeline.load_lora_weights(run_folder / "generator")
    after, ours = pipeline.unet(*given).sample, cycle.generator.pipeline.unet(*given).sample
    torch.testing.assert_close(after, ours, atol=1e-5, rtol=1e-5)
    assert (before - ours).abs().max() > 1e-4


def test_an_interrupted_run_with_lora_ends_with_the_same_numbers(folder, finetuned, tmp_path):
    tiny_cycle.run(dataclasses.replace(LORA, steps=3), folder, tmp_path)
    torch.manual_seed(99)  # what else the process has drawn plays no part
    tiny_cycle.run(LORA, folder, tmp_path)
    ours, expected = (load_file(path / "state.safetensors") for path in (tmp_path, finetuned[1]))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, ours[name]) for name, value in expected.items())


# ── which loss reaches which model ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trainable", cycle_losses.TRAINABLE)
def test_each_loss_reaches_the_models_that_it_should(trainable):
    profile = profiles.PROFILES["smoke"]
    settings = dict(trainable=trainable, schedule="joint", batch_size=2, images=4, losses={"max_timestep": 1.0})
    table = gradients.gradient_norms(CycleConfig.of(profile, **settings), 2, "cpu")
    assert len(table) == 2 * 4 * 2
    reached = table.groupby(["loss", "model"])["norm"].min() > 0
    assert not reached["caption", "generator"] and not reached["generation", "captioner"]
    others = reached.drop([("caption", "generator"), ("generation", "captioner")])
    assert others.all()
