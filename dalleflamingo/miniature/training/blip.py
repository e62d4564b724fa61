"""The miniature BLIP: a `BlipForConditionalGeneration`, pretrained on web, finetuned on coco."""

import math
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.clip import DrawBatch, clip_pixels
from dalleflamingo.miniature.training.tokenizers import save_tokenizer

BASE, LARGE = (4, 3), (6, 6)  # layers of image encoder and of text decoder


def make_blip(
    tokenizer: BertTokenizer, depth: tuple[int, int] = BASE, width: int = 128
) -> BlipForConditionalGeneration:
    """A model with random weights and about 1.7 M parameters (`LARGE`: 2.9 M); 8 × 8 patches of 8 pixels.

    Args:
        tokenizer: of `train_wordpiece`.
        depth: layers of image encoder and of text decoder.
        width: of both.
    """
    image_layers, text_layers = depth
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    text = size | {
        "num_hidden_layers": text_layers,
        "encoder_hidden_size": width,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 96,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "projection_dim": width,
    }
    vision = size | {"num_hidden_layers": image_layers, "image_size": 64, "patch_size": 8, "projection_dim": width}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=width, image_text_hidden_size=width)
    return BlipForConditionalGeneration(config)


def position_sines(patches: int, width: int) -> Tensor:
    """(patches, width) sines and cosines of row and column in a square grid; wavelengths from half a side to eight."""
    side = math.isqrt(patches)
    patch = torch.arange(patches)
    angles = torch.stack([patch // side, patch % side], dim=1) * math.pi / side  # (patches, 2)
    angles = (angles[..., None] * 2.0 ** torch.linspace(-2, 2, width // 4)).flatten(1)  # (patches, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1) * (5 / math.sqrt(width / 2))


@torch.no_grad()
def initialise_from_clip(model: BlipForConditionalGeneration, clip: open_clip.CLIP, sample: Tensor) -> None:
    """Copy CLIP's image encoder into BLIP's, as BLIP started from a trained ViT (Li et al. 2022, §4.1).

    CLIP normalises its embedded patches (`ln_pre`), BLIP does not. The norm is folded into the embeddings, with one
    standard deviation for all patches, the mean over `sample`. CLIP's position embeddings are short, a tenth of its
    patch embeddings, and a captioner that starts from them calls every side "left". So `position_sines`, half as long
    as the patch embeddings, are added to them.

    Args:
        model: changed in place.
        clip: of the same width, depth and patches.
        sample: (B, 3, 64, 64) images as `clip_pixels` gives them.
    """
    theirs, ours, norm = clip.visual, model.vision_model, clip.visual.ln_pre

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    patches = theirs.conv1(sample).flatten(2).mT + theirs.positional_embedding[1:]  # (B, 64, width)
    gain = norm.weight / centred(patches).square().mean(-1).add(norm.eps).sqrt().mean()
    first = norm(theirs.class_embedding + theirs.positional_embedding[0])  # the class token is the same for all images
    embeddings = ours.embeddings
    embeddings.class_embedding.copy_(first)
    embeddings.position_embedding[0, 0].zero_()
    positions = centred(theirs.positional_embedding[1:]) * gain + norm.bias
    embeddings.position_embedding[0, 1:].copy_(positions + position_sines(*positions.shape))
    embeddings.patch_embedding.weight.copy_(centred(theirs.conv1.weight.movedim(0, -1)).mul(gain).movedim(-1, 0))
    embeddings.patch_embedding.bias.zero_()
    for layer, block in zip(ours.encoder.layers, theirs.transformer.resblocks, strict=True):
        layer.self_attn.qkv.weight.copy_(block.attn.in_proj_weight)
        layer.self_attn.qkv.bias.copy_(block.attn.in_proj_bias)
        for part, source in (
            (layer.self_attn.projection, block.attn.out_proj),
            (layer.layer_norm1, block.ln_1),
            (layer.layer_norm2, block.ln_2),
            (layer.mlp.fc1, block.mlp.c_fc),
            (layer.mlp.fc2, block.mlp.c_proj),
        ):
            part.load_state_dict(source.state_dict())
    ours.post_layernorm.load_state_dict(theirs.ln_post.state_dict())


@torch.no_grad()
def initialise_from_shallower(model: BlipForConditionalGeneration, smaller: BlipForConditionalGeneration) -> None:
    """Copy all layers of a trained image encoder into a deeper one; its other layers begin as the identity."""
    ours, theirs = model.vision_model, smaller.vision_model
    ours.load_state_dict(theirs.state_dict(), strict=False)
    added = ours.encoder.layers[len(theirs.encoder.layers) :]
    for layer in added:
        for last in (layer.self_attn.projection, layer.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()


class CaptioningRecipe(Recipe):
    """Eq. 1: cross-entropy of the next token with teacher forcing. Base class of the captioners' recipes.

    `draw_early` is a curriculum. Captions of the web alone do not teach relations: to name the relation of two things,
    the decoder has to attend to the one that it named before, which is useful only once it can tell the position of the
    thing that it attends to. From captions of one thing and its position it learned the latter in 800 steps and the
    former in 900 more. Without them it had learned neither after 6,200.

    Args:
        name: of the run.
        draw_batch: (rng, n) -> (n, 64, 64, 3) uint8 images and their n captions.
        draw_early: used instead of `draw_batch` in the first half of the training, then less and less often; None for
            no curriculum.
    """

    steps, batch_size, learning_rate = 6000, 64, 1e-3
    weight_decay, warmup = 0.05, 200

    def __init__(self, name: str, draw_batch: DrawBatch, draw_early: DrawBatch | None):
        self.name, self.draw_batch, self.draw_early = name, draw_batch, draw_early or draw_batch

    def draw(self, rng: np.random.Generator, step: int) -> tuple[np.ndarray, list[str]]:
        """(B, 64, 64, 3) uint8 images and their B captions for one step."""
        draw = self.draw_batch if rng.random() < 2 * step / self.steps - 1 else self.draw_early
        return draw(rng, self.batch_size)


class BlipRecipe(CaptioningRecipe):
    """BLIP; all parameters are trained.

    Args:
        name, draw_batch, draw_early: as `CaptioningRecipe`.
        tokenizer: of `train_wordpiece`.
        depth: layers of image encoder and of text decoder.
    """

    def __init__(
        self,
        name: str,
        draw_batch: DrawBatch,
        tokenizer: BertTokenizer,
        draw_early: DrawBatch | None = None,
        depth: tuple[int, int] = BASE,
    ):
        super().__init__(name, draw_batch, draw_early)
        self.tokenizer, self.depth = tokenizer, depth
        self.model = make_blip(tokenizer, depth)
        self.modules = {"blip": self.model}
        self.compilable = (self.model.vision_model,)  # not the decoder: captions differ in length

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64); `input_ids` and `labels` (B, T): [DEC] caption [SEP], padding ignored."""
        images, captions = self.draw(rng, step)
        tokens = self.tokenizer(captions, padding="longest", return_tensors="pt")
        input_ids = tokens.input_ids
        input_ids[:, 0] = self.tokenizer.bos_token_id  # BLIP's decoder begins with [DEC] where BERT has [CLS]
        labels = input_ids.masked_fill(tokens.attention_mask == 0, -100)
        labels[:, 0] = -100
        return {
            "pixel_values": clip_pixels(images),
            "input_ids": input_ids,
            "attention_mask": tokens.attention_mask,
            "labels": labels,
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean cross-entropy of the next token in nats."""
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        encoder_hidden_states = self.model.vision_model(batch["pixel_values"]).last_hidden_state  # (B, 65, width)
        output = self.model.text_decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=encoder_hidden_states,
            labels=batch["labels"],
        )
        return {"loss": output.loss}

    def restore(self, folder: Path) -> None:
        """Read a `BlipForConditionalGeneration` folder, and leave out the curriculum, which its weights know."""
        self.model.load_state_dict(BlipForConditionalGeneration.from_pretrained(folder).state_dict())
        self.draw_early = self.draw_batch

    def export(self, folder: Path) -> None:
        """Write a `BlipForConditionalGeneration` and `BlipProcessor` folder: tensors in float16, loaded in float32."""
        model = make_blip(self.tokenizer, self.depth)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(folder)
        model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = torch.float32
        model.config.save_pretrained(folder)
        image_processor = BlipImageProcessor(size={"height": 64, "width": 64})
        BlipProcessor(image_processor, self.tokenizer).save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
