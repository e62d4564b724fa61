"""Name -> recipe of each of the miniature's models, in the order in which they are trained.

Several models start from others: each function here builds a recipe and loads the weights that it starts from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer

from dalleflamingo.miniature.corpora import (
    annotated_batches,
    annotation_files,
    data_folder,
    minimal_batch,
    texts,
    web_batch,
)
from dalleflamingo.miniature.training.base import Recipe, load_trained
from dalleflamingo.miniature.training.blip import (
    LARGE,
    BlipRecipe,
    CaptioningRecipe,
    initialise_from_clip,
    initialise_from_shallower,
)
from dalleflamingo.miniature.training.blip2 import Blip2Recipe, initialise_from_blip
from dalleflamingo.miniature.training.clip import (
    ClipLayoutRecipe,
    ClipRecipe,
    DrawBatch,
    clip_pixels,
    text_encoder,
)
from dalleflamingo.miniature.training.dino import DinoRecipe
from dalleflamingo.miniature.training.inception import InceptionRecipe
from dalleflamingo.miniature.training.lafite import LafiteRecipe
from dalleflamingo.miniature.training.recogniser import RecogniserRecipe
from dalleflamingo.miniature.training.sd import SdRecipe
from dalleflamingo.miniature.training.sd_text import SdTextRecipe
from dalleflamingo.miniature.training.tokenizers import train_clip_bpe, train_opt_bpe, train_wordpiece
from dalleflamingo.miniature.training.vae import VaeRecipe

RUNS = Path("build/training")  # checkpoints and curves

# Models that are trained on the way to a shipped one -> folder in data/miniature that has such weights.
STAGES = {
    "vae": "sd/vae",
    "clip-web": "clip",
    "sd-text": "sd",
    "blip-web": "blip",
    "blip-large-web": "blip-large",
    "blip2-web": "blip2",
}

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def trained(recipe: AnyRecipe, name: str) -> AnyRecipe:
    """`recipe` with the weights of the run `name` or, where there is no such run, with the shipped ones.

    Raises:
        FileNotFoundError: the model is neither trained nor shipped.
    """
    if (RUNS / name / "state.safetensors").exists():
        load_trained(recipe, RUNS / name)
    elif (shipped := data_folder() / STAGES.get(name, name)).is_dir():
        recipe.restore(shipped)
    else:
        raise FileNotFoundError(
            f"{name} is neither trained, in {RUNS / name}, nor shipped, in {shipped}: train it first, "
            f"`python -m dalleflamingo train {name}`"
        )
    return recipe


def blip_tokenizer() -> BertTokenizer:
    """The shipped WordPiece tokenizer; where there is none, the same one, learned again."""
    if (shipped := data_folder() / "blip/vocab.txt").exists():
        return BertTokenizer.from_pretrained(shipped.parent)
    return BertTokenizer.from_pretrained(train_wordpiece(texts(), 300, RUNS / "wordpiece"))


def clip_tokenizer() -> CLIPTokenizer:
    """The shipped byte-pair tokenizer of CLIP and SD; where there is none, the same one, learned again."""
    if (shipped := data_folder() / "clip/vocab.json").exists():
        return CLIPTokenizer.from_pretrained(shipped.parent)
    return CLIPTokenizer.from_pretrained(train_clip_bpe(texts(), 800, RUNS / "byte-pair"))


def opt_tokenizer() -> GPT2Tokenizer:
    """The shipped byte-level tokenizer of BLIP-2; where there is none, the same one, learned again."""
    if (shipped := data_folder() / "blip2/vocab.json").exists():
        return GPT2Tokenizer.from_pretrained(shipped.parent)
    return GPT2Tokenizer.from_pretrained(train_opt_bpe(texts(), 500, RUNS / "byte-level"))


def recogniser() -> RecogniserRecipe:
    """The judge of generated images: a detector of things."""
    return RecogniserRecipe()


def vae() -> VaeRecipe:
    """SD's autoencoder."""
    return VaeRecipe()


def clip_web() -> ClipRecipe:
    """CLIP's first stage, contrastive training on the web."""
    return ClipRecipe("clip-web", web_batch, clip_tokenizer())


def sd_text() -> SdTextRecipe:
    """SD's text encoder, which starts as CLIP's and learns positions."""
    autoencoder, clip_model = trained(vae(), "vae"), trained(clip_web(), "clip-web")
    tower = text_encoder(clip_model.model, clip_model.tokenizer)
    return SdTextRecipe(autoencoder.vae, tower, clip_model.tokenizer, RUNS / "sd-latents.safetensors")


def sd() -> SdRecipe:
    """SD's U-Net, with that autoencoder and text encoder."""
    autoencoder, text = trained(vae(), "vae"), trained(sd_text(), "sd-text")
    bank = RUNS / "sd-latents.safetensors"
    return SdRecipe(autoencoder.vae, text.text_encoder, text.tokenizer, bank, text.layout_head, text.attribute_head)


def clip() -> ClipLayoutRecipe:
    """CLIP's second stage, with hard negatives, in which it learns to see single facts and positions."""
    recipe = ClipLayoutRecipe(clip_tokenizer())
    recipe.model.load_state_dict(trained(clip_web(), "clip-web").model.state_dict())
    return recipe


def blip_web() -> BlipRecipe:
    """BLIP's pretraining on the web, its image encoder from CLIP."""
    recipe = BlipRecipe("blip-web", web_batch, blip_tokenizer(), draw_early=minimal_batch)
    clip_model = trained(clip_web(), "clip-web").model
    initialise_from_clip(recipe.model, clip_model, clip_pixels(web_batch(np.random.default_rng(0), 64)[0]))
    return recipe


def blip() -> BlipRecipe:
    """BLIP, finetuned on coco."""
    return finetuned(BlipRecipe("blip", coco_batches(), blip_tokenizer()), "blip-web")


def blip_large_web() -> BlipRecipe:
    """BLIP-large's pretraining on the web, its image encoder from BLIP, its text decoder from random weights."""
    recipe = BlipRecipe("blip-large-web", web_batch, blip_tokenizer(), draw_early=minimal_batch, depth=LARGE)
    smaller = trained(BlipRecipe("blip-web", web_batch, blip_tokenizer()), "blip-web")
    initialise_from_shallower(recipe.model, smaller.model)
    return recipe


def blip_large() -> BlipRecipe:
    """BLIP-large, finetuned on coco."""
    return finetuned(BlipRecipe("blip-large", coco_batches(), blip_tokenizer(), depth=LARGE), "blip-large-web")


def blip2_web() -> Blip2Recipe:
    """BLIP-2's pretraining on the web, its image encoder from BLIP."""
    recipe = Blip2Recipe("blip2-web", web_batch, opt_tokenizer(), draw_early=minimal_batch)
    smaller = trained(BlipRecipe("blip-web", web_batch, blip_tokenizer()), "blip-web")
    initialise_from_blip(recipe.model, smaller.model)
    return recipe


def blip2() -> Blip2Recipe:
    """BLIP-2, finetuned on coco."""
    return finetuned(Blip2Recipe("blip2", coco_batches(), opt_tokenizer()), "blip2-web")


def lafite() -> LafiteRecipe:
    """The GAN generator, with SD's autoencoder and CLIP."""
    autoencoder, clip_model = trained(vae(), "vae"), trained(clip(), "clip")
    files = (RUNS / f"{name}.safetensors" for name in ("sd-latents", "clip-features", "clip-caption-features"))
    return LafiteRecipe(autoencoder.vae, clip_model.model, clip_model.tokenizer, *files)


def dino() -> DinoRecipe:
    """The self-supervised ViT that ranks reconstructions."""
    return DinoRecipe()


def inception() -> InceptionRecipe:
    """The classifier whose features FID compares."""
    return InceptionRecipe()


def coco_batches() -> DrawBatch:
    """Images of coco train with their clean captions."""
    return annotated_batches(annotation_files()["train"])


def finetuned(recipe: CaptioningRecipe, stage: str) -> CaptioningRecipe:
    """`recipe` with the weights of its pretraining and a short schedule.

    With more or larger steps the model forgets the kinds that coco lacks. On coco val, BLIP's captions are no better
    after 250 steps than after 30.
    """
    recipe.steps, recipe.warmup, recipe.learning_rate = 30, 7, 2e-4
    return trained(recipe, stage)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "recogniser": recogniser,
    "vae": vae,
    "clip-web": clip_web,
    "sd-text": sd_text,
    "sd": sd,
    "clip": clip,
    "blip-web": blip_web,
    "blip": blip,
    "blip-large-web": blip_large_web,
    "blip-large": blip_large,
    "blip2-web": blip2_web,
    "blip2": blip2,
    "lafite": lafite,
    "dino": dino,
    "inception": inception,
}
