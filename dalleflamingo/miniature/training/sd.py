"""The miniature Stable Diffusion: U-Net on 16 × 16 × 4 latents, conditioned on a text encoder that began as CLIP's.

Three things differ from SD v1 on purpose; the first two go together.

The noise schedule. SD's ends at ᾱ_T = 0.0047: a trace of the picture's mean leaks through at every timestep of
training and is missing when sampling starts from pure noise, so plain grounds come out in wrong colours. DDPM's linear
schedule ends at ᾱ_T = 4e-5 and, sampled from its very end (`trailing`), does not.

The target. Near such an end the noise ε is what the network sees, so to predict it (Eq. 3) teaches next to nothing of
what the text says. The velocity v = √ᾱ ε − √(1−ᾱ) z (Salimans & Ho 2022; SD v2) is the same knowledge, z_t being given,
but asks there for the picture itself. Side by side, 600 steps from the same weights: the clean latent's squared error
at t = 800 is 1.28 with ε and 0.66 with v, where 0.65 is what knowing the ground alone leaves.

The text encoder. SD's stays as CLIP left it. Ours learns on, first by itself (`far_view.py`), then with the U-Net: of
what varies between captions of one thing in the small tower's states (those behind the text's end) 71 % is the ground
and 16 % the kind, and a U-Net that sees only as many pictures as a laptop draws takes long to find them.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import CLIPTextModel, CLIPTokenizer

from dalleflamingo.miniature.annotators import alt_text, plain_text
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.training.tokenizers import save_tokenizer
from dalleflamingo.miniature.training.vae import to_pixels
from dalleflamingo.miniature.world import draw, sample_scene

BANK = 40_000  # pictures whose latents are computed once; their captions are told anew each time
UNCONDITIONAL_SHARE = 0.12  # of captions replaced by "", for classifier-free guidance (Ho & Salimans 2022)
PLAIN_SHARE = 0.8  # of the others' captions, up to two things, told barely and truly: alt-text is wrong in one of five
# Beta distributions of t/T: mostly where text, not what is still visible, must decide. The first is where kinds and
# colours are decided, the second where places are, when a thing can hardly be seen yet.
EARLY, LATE = (2.0, 3.0), (5.0, 2.0)
LATE_SHARE = 0.5  # of samples whose timestep is drawn from the second
FAR_WEIGHT = 0.3  # of the far view's loss
LESSONS = {1: 0.05, 2: 0.4}  # things in a picture -> share of training until which their places alone are learned


def make_unet(text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads, as diffusers reads it
        norm_num_groups=16,
    )


def make_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def web_scene(index: int) -> Scene:
    """The scene of latent `index` of the bank; every other one holds a single thing."""
    rng = np.random.default_rng([7, index])
    return sample_scene(rng, count=1 if index % 2 else None)


def web_caption(
    scene: Scene,
    rng: np.random.Generator,
    plain_share: float = PLAIN_SHARE,
    unconditional_share: float = UNCONDITIONAL_SHARE,
) -> str:
    """What the generator is told of a picture, told anew each time."""
    if rng.random() < unconditional_share:
        return ""
    return (plain_text if len(scene.things) < 3 and rng.random() < plain_share else alt_text)(scene, rng)


@torch.no_grad()
def latent_bank(vae: AutoencoderKL, file: Path, count: int = BANK) -> Tensor:
    """(count, 4, 16, 16) latents, unscaled, of `web_scene(0 … count − 1)`; computed if `file` is missing."""
    if not file.exists():
        batches = [
            vae.encode(
                to_pixels(np.stack([draw(web_scene(i)) for i in range(first, first + 100)])).to(vae.device)
            ).latent_dist.mean
            for first in trange(0, count, 100, desc="latents", mininterval=10)
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(batches).half().cpu().contiguous()}, file)
    return load_file(file)["latents"]


def far_view(latents: Tensor) -> Tensor:
    """(B, 4, 16, 16) latents -> (B, 4, 8, 8)."""
    return F.avg_pool2d(latents, 2)


def at_end(states: Tensor, input_ids: Tensor, end_id: int) -> Tensor:
    """(B, D): of (B, T, D) states those where the (B, T) ids first have `end_id`."""
    end = (input_ids == end_id).int().argmax(1)
    return states[torch.arange(len(end)), end]


def latent_scale(latents: Tensor) -> float:
    """What brings (N, 4, 16, 16) latents to standard deviation 1."""
    return float(1 / latents[:2000].float().std())


class SdRecipe:
    """Eq. 3 with v for ε: the velocity, predicted from the noised latent, the timestep and the text.

    Args:
        vae: trained; frozen here.
        text_encoder: CLIP's text tower, to start from.
        tokenizer: of the text encoder.
        bank: file that keeps the latents.
        tell: the linear map of `far_view.py`, so that the text encoder does not forget what it has learned by it.
    """

    name = "sd"
    steps, batch_size, learning_rate = 6000, 32, 1e-3
    weight_decay, warmup, average = 0.01, 100, 0.998

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, bank: Path, tell: nn.Linear
    ):
        self.latents = latent_bank(vae, bank)
        self.things = np.array([len(web_scene(i).things) for i in range(len(self.latents))])
        vae.register_to_config(scaling_factor=latent_scale(self.latents))
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.scheduler = make_scheduler()
        self.unet = make_unet(text_encoder.config.hidden_size).to(memory_format=torch.channels_last)
        self.tell = tell
        self.modules = {"unet": self.unet, "text_encoder": self.text_encoder, "tell": self.tell}
        self.compilable = [self.unet]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        yield from self.unet.parameters()
        yield from self.text_encoder.parameters()
        yield from self.tell.parameters()

    def lesson(self, step: int) -> int | None:
        """How many things the pictures hold while places alone are learned."""
        return next((things for things, end in LESSONS.items() if step < end * self.steps), None)

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled; `input_ids` (B, 77)."""
        lesson = self.lesson(step)
        alike = np.flatnonzero(self.things == lesson)
        index = rng.choice(alike, self.batch_size) if lesson else self.index(rng, step)
        captions = [web_caption(web_scene(i), rng, 1.0 if lesson else PLAIN_SHARE) for i in index]
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {"latents": self.latents[index].float() * self.vae.config.scaling_factor, "input_ids": tokens.input_ids}

    def index(self, rng: np.random.Generator, step: int) -> np.ndarray:
        """(B,) places in the bank: first mostly single things, then fewer and fewer of them."""
        one_thing = 0.8 * max(0.0, 1 - 2 * step / self.steps)
        chosen = rng.random(self.batch_size) < one_thing
        return 2 * rng.integers(len(self.latents) // 2, size=self.batch_size) + chosen

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        device = self.unet.device
        latents = batch["latents"].to(device, memory_format=torch.channels_last)
        ids = batch["input_ids"].to(device)
        states = self.text_encoder(ids).last_hidden_state  # (B, 77, width)
        noise = torch.randn_like(latents)
        early, late = (torch.distributions.Beta(*shape).sample((len(latents),)) for shape in (EARLY, LATE))
        is_late = torch.rand(len(latents)) < (1.0 if self.lesson(step) else LATE_SHARE)
        share = torch.where(is_late, late, early).to(device)
        timesteps = (share * self.scheduler.config.num_train_timesteps).long()
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        near = F.mse_loss(self.unet(noised, timesteps, states).sample, velocity)
        end = self.tokenizer.eos_token_id
        views, told = far_view(latents), ids[:, 1] != end
        far = F.mse_loss(self.tell(at_end(states, ids, end)).view_as(views)[told], views[told])
        return {"loss": near + FAR_WEIGHT * far, "near": near, "far": far}

    def after_step(self, step: int) -> None:
        pass

    def restore(self, folder: Path) -> None:
        for module, name in ((self.unet, "unet"), (self.text_encoder, "text_encoder")):
            module.load_state_dict(type(module).from_pretrained(folder, subfolder=name).state_dict())

    def export(self, folder: Path) -> None:
        """A folder for `StableDiffusionPipeline`: tensors in float16, loaded in float32."""
        pipeline = StableDiffusionPipeline(
            self.vae,
            self.text_encoder,
            self.tokenizer,
            self.unet,
            self.scheduler,
            None,
            None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(folder)
        save_tokenizer(self.tokenizer, Path(folder) / "tokenizer")
        self.text_encoder.config.dtype = torch.float32  # transformers, unlike diffusers, would load what the files hold
        self.text_encoder.config.save_pretrained(Path(folder) / "text_encoder")
