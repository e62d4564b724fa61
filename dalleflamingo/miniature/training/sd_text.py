"""Stable Diffusion's text encoder learns positions: from a caption it predicts which colour is where in the image.

CLIP, trained on web captions, does not need positions. Its hidden states at the words "above" and "below" differ by
15 % of their length, at "red" and "blue" by 110 %, and the states after "left of" do not depend on it at all. A U-Net
does not extract the difference from such states: after 18,000 steps on mixed captions that name positions, swapping
left and right in a caption did not change its loss. With a curriculum of single things it learned their positions
within 300 steps; from 800 steps of two things it learned nothing.

So the text encoder learns positions first, alone, in minutes: from its state at the end of the caption, a linear map
(`layout_head`) predicts the image's latents at half their resolution, 8 × 8. After that the U-Net learned the positions
of two things within 750 steps of the curriculum. At the same time it learns which attribute belongs to which thing
(`attributes.py`). The heads are trained on with the U-Net, and thrown away in the end.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from dalleflamingo.miniature.training.attributes import attribute_head, attribute_loss, attributes_at_names
from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.sd import (
    ATTRIBUTE_WEIGHT,
    latent_bank,
    latent_scale,
    layout,
    state_at_end,
    web_caption,
    web_scene,
)


class SdTextRecipe(Recipe):
    """From the caption, the layout of its image (mean squared error) and the attributes of its things (cross-entropy).

    Args:
        vae: trained; frozen here.
        text_encoder: CLIP's text tower, to start from.
        tokenizer: of the text encoder.
        bank: file of the latents; see `latent_bank`.
    """

    name = "sd-text"
    steps, batch_size, learning_rate = 4000, 64, 5e-4
    weight_decay = 0.01

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, bank: Path):
        latents = latent_bank(vae, bank)
        self.layouts = layout(latents.float() * latent_scale(latents))
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.layout_head = nn.Linear(text_encoder.config.hidden_size, self.layouts[0].numel())
        self.attribute_head = attribute_head(text_encoder.config.hidden_size)
        self.modules = {
            "text_encoder": self.text_encoder,
            "layout_head": self.layout_head,
            "attribute_head": self.attribute_head,
        }

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`layouts` (B, 4, 8, 8), `input_ids` (B, T), T the longest caption, and `attributes` (2, B, T)."""
        index = rng.integers(len(self.layouts), size=self.batch_size)
        captions = [web_caption(web_scene(i), rng, unconditional_share=0.0) for i in index]
        ids = self.tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        attributes = attributes_at_names(captions, self.tokenizer, ids.shape[1])
        return {"layouts": self.layouts[index], "input_ids": ids, "attributes": attributes}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean squared error of the layout, plus the loss of the attributes."""
        batch = {name: tensor.to(self.text_encoder.device) for name, tensor in batch.items()}
        hidden_states = self.text_encoder(batch["input_ids"]).last_hidden_state
        layout_loss = F.mse_loss(self.predict_layout(hidden_states, batch["input_ids"]), batch["layouts"])
        attributes = attribute_loss(self.attribute_head, hidden_states, batch["attributes"])
        return {"loss": layout_loss + ATTRIBUTE_WEIGHT * attributes, "layout": layout_loss, "attributes": attributes}

    def predict_layout(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D) hidden states of (B, T) ids -> (B, 4, 8, 8)."""
        end_states = state_at_end(hidden_states, input_ids, self.tokenizer.eos_token_id)
        return self.layout_head(end_states).view(-1, *self.layouts.shape[1:])

    def restore(self, folder: Path) -> None:
        """Read the text encoder from a pipeline's folder."""
        self.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").state_dict())
