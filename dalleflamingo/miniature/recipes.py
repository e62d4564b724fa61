"""Name → recipe of each of the miniature's models, in the order in which they are trained.

A recipe has `name`, `steps`, `batch_size`, `learning_rate`, `weight_decay`, `warmup` and `average` (decay of the moving
average of its weights, 0 for none); `modules`, what a checkpoint holds; `compilable`, what `--compile` compiles;
`parameters()`, what is trained; `batch(rng, step)`; `loss(batch, step)`, whose entry "loss" is minimised and the others
logged; `after_step(step)`; `export(folder)`.
"""

from pathlib import Path

import numpy as np
from transformers import BertTokenizer, CLIPTokenizer

from .blip import BlipRecipe, start_from_clip
from .checkpoints import load_trained
from .clip import ClipRecipe, pixels, text_encoder
from .corpora import annotation_files, labelled_batches, texts, web_batch
from .dino import DinoRecipe
from .recogniser import RecogniserRecipe
from .sd import SdRecipe
from .tokenizers import train_clip_bpe, train_wordpiece
from .vae import VaeRecipe

RUNS = Path("build/training")  # where checkpoints and curves are kept


def wordpiece() -> BertTokenizer:
    """BLIP's tokenizer; learned from the world's texts on first use."""
    folder = RUNS / "wordpiece"
    if not (folder / "tokenizer_config.json").exists():
        train_wordpiece(texts(), 200, folder)
    return BertTokenizer.from_pretrained(folder)


def byte_pair() -> CLIPTokenizer:
    """CLIP's and SD's tokenizer; learned from the world's texts on first use."""
    folder = RUNS / "byte-pair"
    if not (folder / "tokenizer_config.json").exists():
        train_clip_bpe(texts(), 700, folder)
    return CLIPTokenizer.from_pretrained(folder)


def clip() -> ClipRecipe:
    return ClipRecipe(web_batch, byte_pair())


def sd() -> SdRecipe:
    """SD stands on the trained autoencoder and on the trained CLIP's text tower."""
    vae, text = VaeRecipe(), clip()
    load_trained(vae, RUNS / "vae")
    load_trained(text, RUNS / "clip")
    return SdRecipe(vae.vae, text_encoder(text.model, text.tokenizer), text.tokenizer, RUNS / "sd-latents.safetensors")


def blip_web() -> BlipRecipe:
    """Its image encoder starts from the trained CLIP's."""
    recipe, eyes = BlipRecipe("blip-web", web_batch, wordpiece()), clip()
    load_trained(eyes, RUNS / "clip")
    start_from_clip(recipe.model, eyes.model, pixels(web_batch(np.random.default_rng(0), 64)[0]))
    return recipe


def blip() -> BlipRecipe:
    """Finetuned on coco's few clean captions, from the captioner that the web taught."""
    recipe = BlipRecipe("blip", labelled_batches(annotation_files()["train"]), wordpiece(), learning_rate=2e-4)
    load_trained(recipe, RUNS / "blip-web")
    recipe.steps, recipe.warmup = 600, 50
    return recipe


RECIPES = {
    "recogniser": RecogniserRecipe,
    "vae": VaeRecipe,
    "clip": clip,
    "sd": sd,
    "blip-web": blip_web,
    "blip": blip,
    "dino": DinoRecipe,
}
