"""What a step of the cycle costs at full size, in arithmetic (claim 14): BLIP base at 384 and SD v1-4 at 512 pixels.

    python benchmarks/full_size.py

Counts multiply-adds, forward and backward, with PyTorch's own counter on models that have shapes but no weights, for
one picture with a caption of twenty pieces. Writes docs/results/cycle-arithmetic.json and cycle-arithmetic.md.
"""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel

from dalleflamingo import cycle_losses
from dalleflamingo.bridge import replaced_token_embeddings
from dalleflamingo.research.report import SHIPPED, current_commit, table

PIECES, SEEN, DRAWN, REDUCED = 20, 384, 512, 256  # REDUCED: pixels a side of an x̂ that is decoded smaller


def blip(size: int = SEEN) -> BlipForConditionalGeneration:
    """BLIP base for captioning."""
    text = {"hidden_size": 768, "num_hidden_layers": 12, "encoder_hidden_size": 768, "vocab_size": 30524}
    config = BlipConfig(text_config=text, vision_config={"image_size": size})
    return BlipForConditionalGeneration(config)


def text_encoder(pieces: int = 49408) -> CLIPTextModel:
    """Stable Diffusion v1-4's."""
    config = CLIPTextConfig(
        vocab_size=pieces, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return CLIPTextModel(config)


def unet(size: int = DRAWN) -> UNet2DConditionModel:
    """Stable Diffusion v1-4's."""
    return UNet2DConditionModel(sample_size=size // 8, cross_attention_dim=768, attention_head_dim=8)


def vae(size: int = DRAWN) -> AutoencoderKL:
    """Stable Diffusion v1-4's."""
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=4, sample_size=size,
    )  # fmt: skip


def counted(work: Callable[[], Tensor]) -> int:
    """Multiply-adds of a forward pass, and of a backward one where anything wants a gradient."""
    with FlopCounterMode(display=False) as counter:
        result = work()
        if result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops() // 2


def parts() -> dict[str, int]:
    """Part of a step -> its multiply-adds."""
    with torch.device("meta"):
        captioner, encoder, denoiser, autoencoder = blip(), text_encoder(), unet(), vae()
        cycle_losses.freeze_all_but(captioner, cycle_losses.captioner_parameters(SimpleNamespace(model=captioner)))
        pipeline = SimpleNamespace(unet=denoiser)
        cycle_losses.freeze_all_but(denoiser, cycle_losses.generator_parameters(SimpleNamespace(pipeline=pipeline)))
        for frozen in (encoder, autoencoder):
            frozen.requires_grad_(False)
        picture, states = torch.randn(1, 3, SEEN, SEEN), torch.randn(1, 77, 768)
        latents, seen = torch.randn(1, 4, DRAWN // 8, DRAWN // 8), torch.randn(1, (SEEN // 16) ** 2 + 1, 768)
        ids, words = torch.zeros(1, PIECES, dtype=torch.long), torch.randn(1, 77, 768)

    def look(wanted: bool) -> Tensor:
        return captioner.vision_model(picture.detach().requires_grad_(wanted)).last_hidden_state

    def say(wanted: bool) -> Tensor:
        shown = seen.detach().requires_grad_(wanted)
        return captioner.text_decoder(input_ids=ids, encoder_hidden_states=shown).logits

    def denoise(wanted: bool) -> Tensor:
        time = torch.zeros(1, dtype=torch.long, device="meta")
        return denoiser(latents, time, encoder_hidden_states=states.detach().requires_grad_(wanted)).sample

    def read(wanted: bool) -> Tensor:
        with replaced_token_embeddings(encoder, words.detach().requires_grad_(wanted)):
            return encoder(torch.zeros(1, 77, dtype=torch.long, device="meta")).last_hidden_state

    def decode(size: int) -> Callable[[], Tensor]:
        small = torch.randn(1, 4, size // 8, size // 8, device="meta", requires_grad=True)
        return lambda: autoencoder.decode(small).sample

    with torch.no_grad():
        encoded = counted(lambda: autoencoder.encode(torch.randn(1, 3, DRAWN, DRAWN, device="meta")).latent_dist.mean)
    return {
        "captioner looks": counted(lambda: look(False)),
        "captioner looks, with a gradient to the picture": counted(lambda: look(True)),
        "captioner says, queries learn": counted(lambda: say(False)),
        "captioner says, with a gradient to what it saw": counted(lambda: say(True)),
        "text encoder": counted(lambda: read(False)),
        "text encoder, with a gradient to the embeddings": counted(lambda: read(True)),
        "U-Net, queries learn": counted(lambda: denoise(False)),
        "U-Net, with a gradient to the text": counted(lambda: denoise(True)),
        "autoencoder encodes": encoded,
        f"autoencoder decodes {DRAWN} px, with a gradient": counted(decode(DRAWN)),
        f"autoencoder decodes {REDUCED} px, with a gradient": counted(decode(REDUCED)),
    }


def steps(part: dict[str, int]) -> Iterator[tuple[str, int, int, int, int]]:
    """(setting, labels of the captioner, of the generator, image half, text half), multiply-adds of each step."""
    for once in (False, True):
        encode = 0 if once else part["autoencoder encodes"]
        for size in (DRAWN, REDUCED):
            say = part["captioner looks"] + part["captioner says, queries learn"]
            draw = encode + part["text encoder"] + part["U-Net, queries learn"]
            bridge = part["text encoder, with a gradient to the embeddings"]
            image = say + encode + bridge + part["U-Net, with a gradient to the text"]
            text = (
                draw
                + part[f"autoencoder decodes {size} px, with a gradient"]
                + part["captioner looks, with a gradient to the picture"]
                + part["captioner says, with a gradient to what it saw"]
            )
            yield f"x̂ at {size} px, latents {'once' if once else 'at every step'}", say, draw, image, text


def page(result: dict) -> str:
    """The page in Markdown."""
    rows = [[what, f"{count / 1e12:.3f} T"] for what, count in result["parts"].items()]
    ratios = []
    for setting, say, draw, image, text in result["steps"]:
        labels = say + draw
        cells = [f"{count / 1e12:.2f} T" for count in (labels, image, text)]
        ratios.append([setting, *cells, f"{(image + text) / 2 / labels:.2f} ×", f"{(image + text) / labels:.2f} ×"])
    return "\n\n".join([
        "# What the cycle costs at full size, in arithmetic",
        f"Made by `python benchmarks/full_size.py` at commit `{result['commit']}`. Multiply-adds for one picture, BLIP "
        f"base at {SEEN} pixels and Stable Diffusion v1-4 at {DRAWN}, a caption of {PIECES} pieces, only what learns "
        "having gradients of weights. The paper: a step of the cycle costs about 1.4 × plain finetuning.",
        table(["setting", "labels: (1) and (3)", "(1) + (2)", "(3) + (4)", "alternating", "joint"], ratios),
        "## Parts of a step",
        table(["part, forward and backward", "multiply-adds"], rows),
    ]) + "\n"  # fmt: skip


def main() -> None:
    counts = parts()
    result = {"commit": current_commit(), "parts": counts, "steps": list(steps(counts))}
    (SHIPPED / "cycle-arithmetic.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (SHIPPED / "cycle-arithmetic.md").write_text(page(result), encoding="utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
