"""The miniature BLIP: `BlipForConditionalGeneration`, pretrained on web, finetuned on coco."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from dalleflamingo.miniature.training.clip import DrawBatch, pixels
from dalleflamingo.miniature.training.tokenizers import save_tokenizer

BASE, LARGE = (4, 3), (6, 6)  # layers of image encoder and of text decoder


def make_blip(
    tokenizer: BertTokenizer, depth: tuple[int, int] = BASE, width: int = 128
) -> BlipForConditionalGeneration:
    """About 1.7 M parameters (LARGE: 2.9 M) with random weights; 8 × 8 patches of 8 pixels."""
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


def place_sines(patches: int, width: int) -> Tensor:
    """(patches, width): sines and cosines of row and column of a square of patches, waves of half a side to eight."""
    side = math.isqrt(patches)
    place = torch.arange(patches)
    angles = torch.stack([place // side, place % side], dim=1) * math.pi / side  # (patches, 2)
    angles = (angles[..., None] * 2.0 ** torch.linspace(-2, 2, width // 4)).flatten(1)  # (patches, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1) * (5 / math.sqrt(width / 2))


@torch.no_grad()
def start_from_clip(model: BlipForConditionalGeneration, clip: open_clip.CLIP, sample: Tensor) -> None:
    """Give BLIP's image encoder the weights of CLIP's, as BLIP started from a trained ViT (Li et al. 2022, §4.1).

    CLIP normalises its embedded patches (`ln_pre`), BLIP does not: the norm is folded into the embeddings, with one
    standard deviation for all patches, the mean over a `sample` (B, 3, 64, 64) of pictures. And CLIP hardly cares where
    a thing stands: its positions are a tenth of its patches, and a captioner that starts there calls every side "left".
    So sines of the place are added to them, half as long as the patches.
    """
    theirs, ours, norm = clip.visual, model.vision_model, clip.visual.ln_pre

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    patches = theirs.conv1(sample).flatten(2).mT + theirs.positional_embedding[1:]  # (B, 64, width)
    gain = norm.weight / centred(patches).square().mean(-1).add(norm.eps).sqrt().mean()
    first = norm(theirs.class_embedding + theirs.positional_embedding[0])  # the class token is the same in all pictures
    embeddings = ours.embeddings
    embeddings.class_embedding.copy_(first)
    embeddings.position_embedding[0, 0].zero_()
    positions = centred(theirs.positional_embedding[1:]) * gain + norm.bias
    embeddings.position_embedding[0, 1:].copy_(positions + place_sines(*positions.shape))
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
def grow_eyes(model: BlipForConditionalGeneration, smaller: BlipForConditionalGeneration) -> None:
    """Give a deeper image encoder all layers of a trained one; those beyond begin by changing nothing."""
    ours, theirs = model.vision_model, smaller.vision_model
    ours.load_state_dict(theirs.state_dict(), strict=False)
    added = ours.encoder.layers[len(theirs.encoder.layers) :]
    for layer in added:
        for last in (layer.self_attn.projection, layer.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()


class CaptioningRecipe:
    """Eq. 1: the next word's cross-entropy, teacher-forced; what the captioners' recipes share.

    Args:
        draw_batch: (rng, n) -> (n, 64, 64, 3) uint8 pictures and their n captions.
        draw_first: drawn from in its stead, half of the training always, then less and less often. The web's captions
            alone teach no sides: to say which of two things stands left, the decoder has to attend to the one that was
            named, and that pays only once it can say where a thing stands that it attends to. From captions of one
            thing and its place it learned the one in 800 steps and the other in 900 more; without, in 6,200, neither.
    """

    steps, batch_size, learning_rate = 6000, 64, 1e-3
    weight_decay, warmup, average = 0.05, 200, 0.998

    def __init__(self, name: str, draw_batch: DrawBatch, draw_first: DrawBatch | None):
        self.name, self.draw_batch, self.draw_first = name, draw_batch, draw_first or draw_batch

    def draw(self, rng: np.random.Generator, step: int) -> tuple[np.ndarray, list[str]]:
        """(B, 64, 64, 3) uint8 pictures and their B captions."""
        draw = self.draw_batch if rng.random() < 2 * step / self.steps - 1 else self.draw_first
        return draw(rng, self.batch_size)

    def after_step(self, step: int) -> None:
        pass


class BlipRecipe(CaptioningRecipe):
    """BLIP, all of it trained.

    Args:
        tokenizer: of `train_wordpiece`. depth: layers of image encoder and of text decoder. The others as
            `CaptioningRecipe`.
    """

    def __init__(
        self,
        name: str,
        draw_batch: DrawBatch,
        tokenizer: BertTokenizer,
        draw_first: DrawBatch | None = None,
        depth: tuple[int, int] = BASE,
    ):
        super().__init__(name, draw_batch, draw_first)
        self.tokenizer, self.depth = tokenizer, depth
        self.model = make_blip(tokenizer, depth)
        self.modules = {"blip": self.model}
        self.compilable = [self.model.vision_model]  # not the decoder: its sentences differ in length

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.model.parameters()

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64); `input_ids` and `labels` (B, T): [DEC] words [SEP], padding not scored."""
        pictures, captions = self.draw(rng, step)
        tokens = self.tokenizer(captions, padding="longest", return_tensors="pt")
        input_ids = tokens.input_ids
        input_ids[:, 0] = self.tokenizer.bos_token_id  # BLIP's decoder begins with [DEC] where BERT has [CLS]
        labels = input_ids.masked_fill(tokens.attention_mask == 0, -100)
        labels[:, 0] = -100
        return {
            "pixel_values": pixels(pictures),
            "input_ids": input_ids,
            "attention_mask": tokens.attention_mask,
            "labels": labels,
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        seen = self.model.vision_model(batch["pixel_values"]).last_hidden_state  # (B, 65, width)
        said = self.model.text_decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=seen,
            labels=batch["labels"],
        )
        return {"loss": said.loss}

    def restore(self, folder: Path) -> None:
        self.model.load_state_dict(BlipForConditionalGeneration.from_pretrained(folder).state_dict())

    def export(self, folder: Path) -> None:
        """A folder for `BlipForConditionalGeneration` and `BlipProcessor`: tensors in float16, loaded in float32."""
        model = make_blip(self.tokenizer, self.depth)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(folder)
        model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = torch.float32
        model.config.save_pretrained(folder)
        images = BlipImageProcessor(size={"height": 64, "width": 64})
        BlipProcessor(images, self.tokenizer).save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
