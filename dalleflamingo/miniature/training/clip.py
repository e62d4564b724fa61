"""The miniature CLIP: an `open_clip` model of 1.5 M parameters, trained on the world's pictures and captions.

Its image tower ranks reconstructions (§3.1), once it has learned places (`placed_clip`); the text tower of its first
stage, as in Stable Diffusion itself, becomes the generator's text encoder. What is written is a folder that `open_clip`
opens by `local-dir:`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN as MEAN
from open_clip import OPENAI_DATASET_STD as STD
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dalleflamingo.miniature.training.tokenizers import save_tokenizer

DrawBatch = Callable[[np.random.Generator, int], tuple[np.ndarray, list[str]]]
LARGEST_LOGIT_SCALE = 100.0  # Radford et al. 2021, §2.5


def clip_config(vocab_size: int) -> dict:
    """The `model_cfg` of `open_clip_config.json`: what `open_clip.CLIP` is built from."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": vocab_size,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": ".",  # of a local folder, open_clip reads the tokenizer beside the weights
        },
    }


def build(vocab_size: int) -> open_clip.CLIP:
    """A new model with random weights, from torch's global generator."""
    return open_clip.CLIP(**clip_config(vocab_size))


def save(model: open_clip.CLIP, folder: str | Path, tokenizer: CLIPTokenizer) -> None:
    """Write the folder that `open_clip.create_model_and_transforms` and `open_clip.get_tokenizer` open as `local-dir:`.

    Tensors are stored in float16 for their size; open_clip loads them into a float32 model.

    Raises:
        ValueError: if model and tokenizer differ in vocabulary size.
    """
    _require_same_vocabulary(model, tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": clip_config(model.vocab_size), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)
    halves = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(halves, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def pixels(pictures: np.ndarray) -> Tensor:
    """Pictures as the image tower wants them, equal to the saved model's own preprocessing at 64 × 64.

    Args:
        pictures: (B, 64, 64, 3) uint8.
    Returns:
        (B, 3, 64, 64) float32, normalised with CLIP's mean and standard deviation.
    """
    scaled = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def encode_text(model: open_clip.CLIP, input_ids: Tensor) -> Tensor:
    """`model.encode_text` for sentences of any length T ≤ 77 (the mask is causal: padding changes nothing before it).

    open_clip computes all 77 positions; captions of the miniature need about 20, and training time goes with T.

    Args:
        input_ids: (B, T), each row holding the end token, which has the highest id.
    Returns:
        (B, 128), not normalised.
    """
    length = input_ids.shape[1]
    hidden = model.token_embedding(input_ids) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))  # (B, T, width)
    ends = hidden[torch.arange(len(hidden), device=hidden.device), input_ids.argmax(dim=-1)]
    return ends @ model.text_projection


def embed(model: open_clip.CLIP, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, 128) embeddings of length 1 of a batch's `pixel_values` and `input_ids`."""
    device = model.logit_scale.device
    image = model.encode_image(batch["pixel_values"].to(device), normalize=True)
    return image, F.normalize(encode_text(model, batch["input_ids"].to(device)), dim=-1)


def text_encoder(model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower as `transformers` and `StableDiffusionPipeline` know it: a copy with the same `last_hidden_state`.

    Raises:
        ValueError: if model and tokenizer differ in vocabulary size.
    """
    _require_same_vocabulary(model, tokenizer)
    blocks = model.transformer.resblocks
    config = CLIPTextConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.token_embedding.embedding_dim,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        projection_dim=model.text_projection.shape[1],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=model.context_length,
        hidden_act="gelu",  # open_clip's, unless quick_gelu is asked for
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    encoder = CLIPTextModel(config)
    encoder.load_state_dict(_text_tensors(model))
    return encoder.eval()


@torch.no_grad()
def take_text_encoder(model: open_clip.CLIP, encoder: CLIPTextModel) -> None:
    """Give the text tower the weights of `encoder`; the inverse of `text_encoder`."""
    theirs = encoder.state_dict()
    for name, tensor in _text_tensors(model).items():
        tensor.copy_(theirs[name])


def _text_tensors(model: open_clip.CLIP) -> dict[str, Tensor]:
    """The text tower's tensors, not copies of them, under the names that transformers gives them."""
    tensors = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for index, block in enumerate(model.transformer.resblocks):
        tensors |= {f"encoder.layers.{index}.{name}": tensor for name, tensor in _layer(block).items()}
    return tensors


def _layer(block: torch.nn.Module) -> dict[str, Tensor]:
    """One residual block of open_clip under the names that transformers gives its parts."""
    renamed = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "self_attn.out_proj": block.attn.out_proj,
               "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}  # fmt: skip
    tensors = {f"{name}.{kind}": getattr(part, kind) for name, part in renamed.items() for kind in ("weight", "bias")}
    stacked = {"weight": block.attn.in_proj_weight, "bias": block.attn.in_proj_bias}  # query, key, value in turn
    for kind, tensor in stacked.items():
        tensors |= {f"self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", tensor.chunk(3), strict=True)}
    return tensors


def _require_same_vocabulary(model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> None:
    if model.vocab_size != len(tokenizer):
        raise ValueError(
            f"the model embeds {model.vocab_size} tokens, the tokenizer has {len(tokenizer)}: "
            "build the model with build(len(tokenizer))"
        )


class ClipRecipe:
    """Contrastive training: of the pictures in a batch, each caption must find its own, and the reverse.

    Args:
        name: "clip-web", or "clip", which goes on from it with what tells places apart (`corpora.turned_batch`).
        draw_batch: (rng, n) -> (n, 64, 64, 3) uint8 pictures and their n captions.
        tokenizer: of `train_clip_bpe`.
    """

    steps, batch_size = 4000, 128
    learning_rate, weight_decay, warmup, average = 1e-3, 0.05, 200, 0.998

    def __init__(self, name: str, draw_batch: DrawBatch, tokenizer: CLIPTokenizer):
        self.name, self.draw_batch, self.tokenizer = name, draw_batch, tokenizer
        self.model = build(len(tokenizer))
        self.modules = {"clip": self.model}
        self.compilable = [self.model.visual]  # not the text tower: its sentences differ in length

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.model.parameters()

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64) and `input_ids` (B, T), T the longest caption's length."""
        pictures, captions = self.draw_batch(rng, self.batch_size)
        encoded = self.tokenizer(
            captions, padding="longest", truncation=True, max_length=self.model.context_length, return_tensors="pt"
        )
        return {"pixel_values": pixels(pictures), "input_ids": encoded.input_ids}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        return self.contrast(*embed(self.model, batch))

    def contrast(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The symmetric cross-entropy (`loss`), and how often a picture's nearest caption is its own (`accuracy`).

        Args:
            image, text: (B, D) embeddings of length 1, in pairs.
        """
        logits = self.model.logit_scale.exp() * image @ text.T  # (B, B), pictures down, captions across
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(dim=-1) == own).float().mean()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.model.logit_scale.clamp_(max=float(np.log(LARGEST_LOGIT_SCALE)))

    def restore(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(Path(folder) / "open_clip_model.safetensors"))

    def export(self, folder: Path) -> None:
        save(self.model, folder, self.tokenizer)
