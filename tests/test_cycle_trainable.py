"""What cycle finetuning trains: names and exact counts, at full size without a weight in memory."""

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from transformers import BlipConfig, BlipForConditionalGeneration

from dalleflamingo import cycle_losses
from dalleflamingo.captioner import Captioner


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
