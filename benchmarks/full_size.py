"""What a step of the cycle costs at full size, in arithmetic (claim 14): BLIP base at 384 and SD v1-4 at 512 pixels.

    python benchmarks/full_size.py

Counts multiply-adds, forward and backward, with PyTorch's own counter on models that have shapes but no weights, for
one image with a caption of twenty tokens. Writes docs/results/cycle-arithmetic.json and cycle-arithmetic.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dalleflamingo import cycle_losses
from dalleflamingo.bridge import replaced_token_embeddings
from dalleflamingo.research.architectures import CAPTIONED, GENERATED, blip, text_encoder, unet, vae
from dalleflamingo.research.cycle_claims import COUNTED
from dalleflamingo.research.pages import SHIPPED, current_commit, table
from dalleflamingo.runs import write_whole

TOKENS = 20  # of a caption
REDUCED = 256  # pixels a side of an x̂ that is decoded smaller


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
        pixel_values, embeds = torch.randn(1, 3, CAPTIONED, CAPTIONED), torch.randn(1, 77, 768)
        features, encoder_hidden_states = torch.randn(1, (CAPTIONED // 16) ** 2 + 1, 768), torch.randn(1, 77, 768)
        latents, ids = torch.randn(1, 4, GENERATED // 8, GENERATED // 8), torch.zeros(1, TOKENS, dtype=torch.long)

    def encode_image(gradient: bool) -> Tensor:
        return captioner.vision_model(pixel_values.detach().requires_grad_(gradient)).last_hidden_state

    def predict_tokens(gradient: bool) -> Tensor:
        given = features.detach().requires_grad_(gradient)
        return captioner.text_decoder(input_ids=ids, encoder_hidden_states=given).logits

    def predict_noise(gradient: bool) -> Tensor:
        timestep, given = torch.zeros_like(ids[:, 0]), encoder_hidden_states.detach().requires_grad_(gradient)
        return denoiser(latents, timestep, encoder_hidden_states=given).sample

    def encode_text(gradient: bool) -> Tensor:
        with replaced_token_embeddings(encoder, embeds.detach().requires_grad_(gradient)):
            return encoder(torch.zeros(1, 77, dtype=torch.long, device="meta")).last_hidden_state

    def decode(size: int) -> Tensor:
        return autoencoder.decode(torch.randn(1, 4, size // 8, size // 8, device="meta", requires_grad=True)).sample

    @torch.no_grad()
    def encode() -> Tensor:
        return autoencoder.encode(torch.randn(1, 3, GENERATED, GENERATED, device="meta")).latent_dist.mean

    return {
        "captioner's image encoder": counted(lambda: encode_image(False)),
        "captioner's image encoder, with a gradient to the image": counted(lambda: encode_image(True)),
        "captioner's decoder, queries learn": counted(lambda: predict_tokens(False)),
        "captioner's decoder, with a gradient to the image's features": counted(lambda: predict_tokens(True)),
        "text encoder": counted(lambda: encode_text(False)),
        "text encoder, with a gradient to the embeddings": counted(lambda: encode_text(True)),
        "U-Net, queries learn": counted(lambda: predict_noise(False)),
        "U-Net, with a gradient to the text": counted(lambda: predict_noise(True)),
        "autoencoder encodes": counted(encode),
        f"autoencoder decodes {GENERATED} px, with a gradient": counted(lambda: decode(GENERATED)),
        f"autoencoder decodes {REDUCED} px, with a gradient": counted(lambda: decode(REDUCED)),
    }


def steps(part: dict[str, int]) -> Iterator[tuple[str, int, int, int, int]]:
    """(setting, loss (1), loss (3), losses (1) + (2), losses (3) + (4)), multiply-adds of each step."""
    for once in (False, True):
        encode = 0 if once else part["autoencoder encodes"]
        for size in (GENERATED, REDUCED):
            captioning = part["captioner's image encoder"] + part["captioner's decoder, queries learn"]
            generation = encode + part["text encoder"] + part["U-Net, queries learn"]
            bridge = part["text encoder, with a gradient to the embeddings"]
            image = captioning + encode + bridge + part["U-Net, with a gradient to the text"]
            text = (
                generation
                + part[f"autoencoder decodes {size} px, with a gradient"]
                + part["captioner's image encoder, with a gradient to the image"]
                + part["captioner's decoder, with a gradient to the image's features"]
            )
            yield f"x̂ at {size} px, latents {'once' if once else 'at every step'}", captioning, generation, image, text


def page(result: dict) -> str:
    """The page in Markdown."""
    rows = [[what, f"{count / 1e12:.3f} T"] for what, count in result["parts"].items()]
    ratios = []
    for setting, captioning, generation, image, text in result["steps"]:
        labels = captioning + generation
        cells = [f"{count / 1e12:.2f} T" for count in (labels, image, text)]
        ratios.append([setting, *cells, f"{(image + text) / 2 / labels:.2f} ×", f"{(image + text) / labels:.2f} ×"])
    parts = [
        "# What the cycle costs at full size, in arithmetic",
        f"Made by `python benchmarks/full_size.py` at commit `{result['commit']}`. Multiply-adds for one image, BLIP "
        f"base at {CAPTIONED} pixels and Stable Diffusion v1-4 at {GENERATED}, a caption of {TOKENS} tokens; only the "
        "trained weights have gradients. The paper: a step of the cycle costs about 1.4 × plain finetuning.",
        table(["setting", "labels: (1) and (3)", "(1) + (2)", "(3) + (4)", "alternating", "joint"], ratios),
        "## Parts of a step",
        table(["part, forward and backward", "multiply-adds"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    counts = parts()
    result = {"commit": current_commit(), "parts": counts, "steps": list(steps(counts))}
    texts = {COUNTED: json.dumps(result, indent=1, ensure_ascii=False) + "\n", "cycle-arithmetic.md": page(result)}
    for name, text in texts.items():
        write_whole(SHIPPED / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    print(page(result))


if __name__ == "__main__":
    main()
