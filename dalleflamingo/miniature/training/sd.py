"""The miniature Stable Diffusion: a U-Net on 16 × 16 × 4 latents, conditioned on a text encoder that began as CLIP's.

It differs from Stable Diffusion v1 in three points; the first two belong together.

*Noise schedule.* That of Stable Diffusion ends at ᾱ_T = 0.0047. In training, a trace of the image's mean is therefore
left at every timestep; sampling starts from pure noise, which has no such trace, and plain grounds get wrong colours.
DDPM's linear schedule ends at ᾱ_T = 4e-5; sampled from its last timestep (`trailing`), it does not have this problem.

*Target.* Near such an end the input is almost equal to the noise ε, so predicting ε (Eq. 3) teaches hardly anything
about the text. The velocity v = √ᾱ ε − √(1−ᾱ) z (Salimans & Ho 2022; Stable Diffusion v2) is equivalent given z_t, but
near the end it is the image itself. Side by side, after 600 steps from the same weights, the squared error of the
clean latent at t = 800 is 1.28 with ε and 0.66 with v; knowing only the ground would give 0.65.

*Text encoder.* Stable Diffusion keeps CLIP's frozen. Ours is trained on, first alone (`sd_text.py`), then with the
U-Net. In the hidden states behind the end of CLIP's captions of one thing, 71 % of the variance is due to the ground
and 16 % to the kind. A U-Net that sees only as many images as a laptop can draw needs long to find the rest in them.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import CLIPTextModel, CLIPTokenizer

from dalleflamingo.miniature.annotators import ANNOTATORS, alt_text, minimal_caption, precise, write_caption
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.training.attributes import attribute_loss, attributes_at_names
from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.tokenizers import save_tokenizer
from dalleflamingo.miniature.training.vae import vae_pixels
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.runs import write_whole

BANK_SIZE = 40_000  # images whose latents are computed once; their captions are written anew each time
COUNTS = (1, 2, 3, 2, 3, 2, 3, 1)  # things in the images of the bank, in turn
UNCONDITIONAL_SHARE = 0.12  # of captions are "", for classifier-free guidance (Ho & Salimans 2022)
# Shares of the other captions. Minimal ones name positions, precise ones are an annotator's sentence that leaves out
# nothing; both are true. The rest is alt-text, which omits colours and is wrong in one of five. Without precise
# captions the model omitted one single thing in ten, where no word said where it should be.
MINIMAL_SHARE, PRECISE_SHARE = 0.4, 0.3
SINGLE_SHARE = 0.5  # of the images of a step show one thing
# Beta distributions of t/T, mostly where the text decides and not what is still visible: kinds and colours are decided
# at EARLY timesteps, positions at LATE ones, where a thing can hardly be seen.
EARLY, LATE = (2.0, 3.0), (5.0, 2.0)
LATE_SHARE = 0.5  # of timesteps are drawn from LATE
LAYOUT_WEIGHT, ATTRIBUTE_WEIGHT = 0.3, 0.1  # of the losses by which the text encoder keeps what it learned before
CURRICULUM = {1: 0.05, 2: 0.25}  # number of things -> share of the training until which there are only such images


def make_unet(text_width: int) -> UNet2DConditionModel:
    """The U-Net with random weights, for hidden states of width `text_width`."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=2,  # the second sees where the first has put which thing
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads, as diffusers reads it
        norm_num_groups=16,
    )


def make_scheduler() -> DDPMScheduler:
    """DDPM's linear noise schedule, velocity as target; see above."""
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def web_scene(index: int) -> Scene:
    """The scene of latent `index` of the bank, with as many things as `COUNTS` says."""
    return sample_scene(np.random.default_rng([7, index]), count=COUNTS[index % len(COUNTS)])


def web_caption(
    scene: Scene,
    rng: np.random.Generator,
    minimal_share: float = MINIMAL_SHARE,
    unconditional_share: float = UNCONDITIONAL_SHARE,
) -> str:
    """A random caption of a scene for training the generator: empty, minimal, precise or alt-text.

    Args:
        scene: to describe.
        rng: source of all choices.
        minimal_share: probability of a minimal caption, where it is not empty.
        unconditional_share: probability of "".
    """
    if rng.random() < unconditional_share:
        return ""
    sort = rng.random()
    if sort < minimal_share:
        return minimal_caption(scene, rng)
    if sort < minimal_share + PRECISE_SHARE:
        return write_caption(scene, precise(ANNOTATORS[rng.integers(len(ANNOTATORS))]), rng)
    return alt_text(scene, rng)


@torch.no_grad()
def latent_bank(vae: AutoencoderKL, file: Path, count: int = BANK_SIZE) -> Tensor:
    """(count, 4, 16, 16) latents, unscaled, of `web_scene(0 … count − 1)`; computed if `file` is missing."""
    if not file.exists():
        batches = [
            vae.encode(
                vae_pixels(np.stack([draw(web_scene(i)) for i in range(first, first + 100)])).to(vae.device)
            ).latent_dist.mean
            for first in trange(0, count, 100, desc="latents", mininterval=10)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        latents = torch.cat(batches).half().cpu().contiguous()
        write_whole(file, lambda path: save_file({"latents": latents}, path))
    return load_file(file)["latents"]


def latent_scale(latents: Tensor) -> float:
    """The factor that brings (N, 4, 16, 16) latents to standard deviation 1."""
    return float(1 / latents[:2000].float().std())


def layout(latents: Tensor) -> Tensor:
    """(B, 4, 16, 16) latents -> (B, 4, 8, 8), at half their resolution: which colour is where, but no detail."""
    return F.avg_pool2d(latents, 2)


def state_at_end(hidden_states: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
    """(B, D): of (B, T, D) hidden states those at the first `end_id` of each row of the (B, T) ids."""
    end = (input_ids == end_id).int().argmax(1)
    return hidden_states[torch.arange(len(end)), end]


class SdRecipe(Recipe):
    """Eq. 3 with v in place of ε: predict the velocity from noised latent, timestep and text.

    Args:
        vae: trained; frozen here.
        text_encoder: to start from.
        tokenizer: of the text encoder.
        bank: file of the latents; see `latent_bank`.
        layout_head: the linear map of `sd_text.py`, trained on, so that the text encoder keeps what it learned with it.
        attribute_head: likewise.
    """

    name = "sd"
    steps, batch_size, learning_rate = 6000, 32, 1e-3
    weight_decay = 0.01

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        bank: Path,
        layout_head: nn.Linear,
        attribute_head: nn.Linear,
    ):
        self.latents = latent_bank(vae, bank)
        self.thing_counts = np.resize(COUNTS, len(self.latents))
        vae.register_to_config(scaling_factor=latent_scale(self.latents))
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.scheduler = make_scheduler()
        self.unet = make_unet(text_encoder.config.hidden_size).to(memory_format=torch.channels_last)
        self.layout_head, self.attribute_head = layout_head, attribute_head
        self.is_restored = False
        self.modules = {
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "layout_head": self.layout_head,
            "attribute_head": self.attribute_head,
        }
        self.compilable = (self.unet,)

    def curriculum_stage(self, step: int) -> int | None:
        """The number of things in all images of this step; None after the curriculum, when any number is drawn.

        During the curriculum captions are minimal and timesteps late, so that positions alone are learned. Weights that
        were restored know positions already.
        """
        if self.is_restored:
            return None
        return next((count for count, end in CURRICULUM.items() if step < end * self.steps), None)

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled; `input_ids` (B, 77); `attributes` (2, B, 77)."""
        index = self.sample_indices(rng, step)
        minimal_share = 1.0 if self.curriculum_stage(step) else MINIMAL_SHARE
        captions = [web_caption(web_scene(i), rng, minimal_share) for i in index]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {
            "latents": self.latents[index].float() * self.vae.config.scaling_factor,
            "input_ids": ids,
            "attributes": attributes_at_names(captions, self.tokenizer, ids.shape[1]),
        }

    def sample_indices(self, rng: np.random.Generator, step: int) -> np.ndarray:
        """(B,) indices into the bank."""
        if count := self.curriculum_stage(step):
            return rng.choice(np.flatnonzero(self.thing_counts == count), self.batch_size)
        single, several = (np.flatnonzero(part) for part in (self.thing_counts == 1, self.thing_counts > 1))
        is_single = rng.random(self.batch_size) < SINGLE_SHARE
        return np.where(is_single, rng.choice(single, self.batch_size), rng.choice(several, self.batch_size))

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Squared error of the velocity, plus that of the layout where there is a caption, plus that of attributes."""
        device = self.unet.device
        latents = batch["latents"].to(device, memory_format=torch.channels_last)
        ids = batch["input_ids"].to(device)
        encoder_hidden_states = self.text_encoder(ids).last_hidden_state  # (B, 77, width)
        noise = torch.randn_like(latents)
        timesteps = self.sample_timesteps(len(latents), step).to(device)
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        velocity = F.mse_loss(self.unet(noised, timesteps, encoder_hidden_states).sample, target)
        layout_loss = self.layout_loss(encoder_hidden_states, ids, latents)
        attributes = attribute_loss(self.attribute_head, encoder_hidden_states, batch["attributes"].to(device))
        return {
            "loss": velocity + LAYOUT_WEIGHT * layout_loss + ATTRIBUTE_WEIGHT * attributes,
            "velocity": velocity,
            "layout": layout_loss,
            "attributes": attributes,
        }

    def sample_timesteps(self, n: int, step: int) -> Tensor:
        """(n,) timesteps, from `EARLY` and `LATE`; late ones only during the curriculum."""
        early, late = (torch.distributions.Beta(*shape).sample((n,)) for shape in (EARLY, LATE))
        is_late = torch.rand(n) < (1.0 if self.curriculum_stage(step) else LATE_SHARE)
        return (torch.where(is_late, late, early) * self.scheduler.config.num_train_timesteps).long()

    def layout_loss(self, hidden_states: Tensor, input_ids: Tensor, latents: Tensor) -> Tensor:
        """Squared error of the layout that is predicted at the end of each caption, empty captions excluded."""
        end_id = self.tokenizer.eos_token_id
        target, has_caption = layout(latents), input_ids[:, 1] != end_id
        predicted = self.layout_head(state_at_end(hidden_states, input_ids, end_id)).view_as(target)
        return F.mse_loss(predicted[has_caption], target[has_caption])

    def restore(self, folder: Path) -> None:
        """Read U-Net and text encoder from a pipeline's folder."""
        for module, name in ((self.unet, "unet"), (self.text_encoder, "text_encoder")):
            module.load_state_dict(type(module).from_pretrained(folder, subfolder=name).state_dict())
        self.is_restored = True

    def export(self, folder: Path) -> None:
        """Write a folder for `StableDiffusionPipeline`: tensors in float16, loaded in float32."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        save_tokenizer(self.tokenizer, Path(folder) / "tokenizer")
        self.text_encoder.config.dtype = torch.float32  # transformers, unlike diffusers, loads in the type of the files
        self.text_encoder.config.save_pretrained(Path(folder) / "text_encoder")
