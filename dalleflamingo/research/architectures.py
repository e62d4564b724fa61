"""The real models' architectures in their published sizes, with random weights: for counts of memory and arithmetic.

Inside `torch.device("meta")` or `memory.without_data` they take no memory. The bytes of their weights are those of the
files in the registry, which a test compares.
"""

import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    ViTConfig,
    ViTModel,
)

from dalleflamingo.captioner import BlipCaptioner
from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, wordpiece_tokenizer
from dalleflamingo.generator import Generator

CAPTIONED, GENERATED = 384, 512  # pixels a side: BLIP's input, an image of Stable Diffusion
_VISION = {
    "base": {},  # transformers' own, ViT-B
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


def blip(size: int = CAPTIONED, vision: str = "base") -> BlipForConditionalGeneration:
    """BLIP for captioning, with ViT-B ("base") or ViT-L ("large"), on images of `size` pixels a side."""
    vision_config = {"image_size": size, **_VISION[vision]}
    encoder_width = vision_config.get("hidden_size", 768)
    text = {"hidden_size": 768, "num_hidden_layers": 12, "encoder_hidden_size": encoder_width, "vocab_size": 30524}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision_config))


def text_encoder(vocabulary: int = 49408) -> CLIPTextModel:
    """Stable Diffusion v1-4's."""
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return CLIPTextModel(config)


def unet(size: int = GENERATED) -> UNet2DConditionModel:
    """Stable Diffusion v1-4's."""
    return UNet2DConditionModel(sample_size=size // 8, cross_attention_dim=768, attention_head_dim=8)


def vae(size: int = GENERATED) -> AutoencoderKL:
    """Stable Diffusion v1-4's."""
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (128, 256, 512, 512)}
    return AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4, sample_size=size)


def captioner(vision: str = "large") -> BlipCaptioner:
    """BLIP with BERT's vocabulary, which is BLIP's but for two special tokens."""
    size = {"height": CAPTIONED, "width": CAPTIONED}
    processor = BlipProcessor(BlipImageProcessor(size=size), wordpiece_tokenizer())
    return BlipCaptioner(blip(vision=vision), processor, prompt="a picture of")


def generator() -> Generator:
    """Stable Diffusion v1-4 with CLIP's vocabulary."""
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.device("cpu"):  # its numbers are needed
        schedule = DDPMScheduler(**noise, clip_sample=False, steps_offset=1)
    return Generator(
        StableDiffusionPipeline(
            vae(), text_encoder(), clip_tokenizer(), unet(), schedule, None, None, requires_safety_checker=False
        )
    )


def clip_image() -> nn.Module:
    """The image tower of CLIP ViT-L/14."""
    return open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu")).visual


def dino() -> ViTModel:
    """DINO ViT-B/8."""
    return ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False)
