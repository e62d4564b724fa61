"""The miniature BLIP-2: a `Blip2ForConditionalGeneration`, a Q-Former between BLIP's image encoder and a small OPT.

As in BLIP-2 (Li et al. 2023), the image encoder is another model's and stays frozen: here BLIP's, pretrained on web.
Unlike there, the language model is trained, too. A frozen model of billions of parameters can be steered by the outputs
of the Q-Former; one of half a million parameters learns from text alone only the order of words.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    GPT2Tokenizer,
    OPTConfig,
)

from dalleflamingo.miniature.training.blip import CaptioningRecipe
from dalleflamingo.miniature.training.clip import DrawBatch, clip_pixels
from dalleflamingo.miniature.training.tokenizers import save_tokenizer

QUERIES = 16
END = "\n"  # of a caption, as in BLIP-2


def make_processor(tokenizer: GPT2Tokenizer) -> Blip2Processor:
    """The processor; it adds `<image>` to the tokenizer, the token that the Q-Former's outputs replace."""
    return Blip2Processor(BlipImageProcessor(size={"height": 64, "width": 64}), tokenizer, num_query_tokens=QUERIES)


def make_blip2(
    tokenizer: GPT2Tokenizer, width: int = 128, image_layers: int = 4, query_layers: int = 4, text_layers: int = 3
) -> Blip2ForConditionalGeneration:
    """A model with random weights and about 2.4 M parameters.

    Args:
        tokenizer: of `train_opt_bpe`, with `<image>`.
        width: of all three networks.
        image_layers: of the image encoder.
        query_layers: of the Q-Former.
        text_layers: of OPT.
    """
    size = {"hidden_size": width, "num_attention_heads": 4}
    text = OPTConfig(
        **size,
        ffn_dim=4 * width,
        num_hidden_layers=text_layers,
        word_embed_proj_dim=width,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer(END).input_ids[-1],
        pad_token_id=tokenizer.pad_token_id,
    )
    size["intermediate_size"] = 4 * width
    config = Blip2Config(
        text_config=text,
        vision_config=size | {"num_hidden_layers": image_layers, "image_size": 64, "patch_size": 8},
        qformer_config=size
        | {"num_hidden_layers": query_layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens, std=0.02)  # equal queries would stay equal
    return model


def initialise_from_blip(model: Blip2ForConditionalGeneration, blip: BlipForConditionalGeneration) -> None:
    """Copy the image encoder of a trained BLIP into BLIP-2."""
    model.vision_model.load_state_dict(blip.vision_model.state_dict())


class Blip2Recipe(CaptioningRecipe):
    """Trains Q-Former, queries, projection and OPT; the image encoder is frozen.

    Args:
        name, draw_batch, draw_early: as `CaptioningRecipe`.
        tokenizer: of `train_opt_bpe`.
    """

    def __init__(self, name: str, draw_batch: DrawBatch, tokenizer: GPT2Tokenizer, draw_early: DrawBatch | None = None):
        super().__init__(name, draw_batch, draw_early)
        self.processor = make_processor(tokenizer)
        self.tokenizer, self.model = tokenizer, make_blip2(tokenizer)
        self.model.vision_model.requires_grad_(False)
        self.modules = {"blip2": self.model}
        self.compilable = (self.model.vision_model, self.model.qformer)

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64); `input_ids`, `labels` (B, T): queries, </s>, caption, END, ignored padding."""
        images, captions = self.draw(rng, step)
        tokens = self.tokenizer(
            [caption + END for caption in captions], add_special_tokens=False, padding="longest", return_tensors="pt"
        )
        config = self.model.config
        start = torch.tensor([config.image_token_index] * QUERIES + [config.text_config.bos_token_id])
        start = start.expand(len(captions), -1)
        return {
            "pixel_values": clip_pixels(images),
            "input_ids": torch.cat([start, tokens.input_ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(start), tokens.attention_mask], dim=1),
            "labels": torch.cat(
                [torch.full_like(start, -100), tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)], dim=1
            ),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean cross-entropy of the next token in nats."""
        return {"loss": self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).loss}

    def restore(self, folder: Path) -> None:
        """Read a `Blip2ForConditionalGeneration` folder, and leave out the curriculum, which its weights know."""
        self.model.load_state_dict(Blip2ForConditionalGeneration.from_pretrained(folder).state_dict())
        self.draw_early = self.draw_batch

    def export(self, folder: Path) -> None:
        """Write a `Blip2ForConditionalGeneration` folder with its processor: tensors in float16, loaded in float32."""
        model = make_blip2(self.tokenizer)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(folder)
        model.config.dtype = torch.float32
        for part in (model.config.text_config, model.config.vision_config, model.config.qformer_config):
            part.dtype = torch.float32
        model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        save_tokenizer(self.tokenizer, folder)
