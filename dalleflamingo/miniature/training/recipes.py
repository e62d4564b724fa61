"""Name → recipe of each of the miniature's models, in the order in which they are trained.

A recipe has `name`, `steps`, `batch_size`, `learning_rate`, `weight_decay`, `warmup` and `average` (decay of the moving
average of its weights, 0 for none), and `betas` where Adam's are not the loop's; `modules`, what a checkpoint holds;
`compilable`, what `--compile` compiles; `parameters()`, what is trained; `batch(rng, step)`; `loss(batch, step)`, whose
entry "loss" is minimised and the others logged; `after_step(step)`; `export(folder)` writes the standard format and
`restore(folder)` reads weights from it.
"""

from pathlib import Path

import numpy as np
from transformers import BertTokenizer, CLIPTokenizer, GPT2Tokenizer

from dalleflamingo.miniature.corpora import ROOT, annotation_files, labelled_batches, plain_batch, texts, web_batch
from dalleflamingo.miniature.training.blip import LARGE, BlipRecipe, CaptioningRecipe, grow_eyes, start_from_clip
from dalleflamingo.miniature.training.blip2 import Blip2Recipe, start_from_blip
from dalleflamingo.miniature.training.clip import ClipRecipe, DrawBatch, pixels, take_text_encoder, text_encoder
from dalleflamingo.miniature.training.clip_places import ClipPlacesRecipe
from dalleflamingo.miniature.training.dino import DinoRecipe
from dalleflamingo.miniature.training.inception import InceptionRecipe
from dalleflamingo.miniature.training.lafite import LafiteRecipe
from dalleflamingo.miniature.training.recogniser import RecogniserRecipe
from dalleflamingo.miniature.training.sd import SdRecipe
from dalleflamingo.miniature.training.sd_text import SdTextRecipe
from dalleflamingo.miniature.training.tokenizers import train_clip_bpe, train_opt_bpe, train_wordpiece
from dalleflamingo.miniature.training.vae import VaeRecipe
from dalleflamingo.runs import load_trained

RUNS = Path("build/training")  # where checkpoints and curves are kept


# where a stage's weights are in data/miniature, if not under its name
SHIPPED = {
    "vae": "sd/vae", "clip-web": "clip", "sd-text": "sd", "blip-web": "blip", "blip-large-web": "blip-large",
    "blip2-web": "blip2",
}  # fmt: skip


def trained(recipe, name: str):
    """`recipe` with the weights of its run here or, where it was not trained here, with the shipped ones."""
    if (RUNS / name / "state.safetensors").exists():
        load_trained(recipe, RUNS / name)
    elif (shipped := ROOT / SHIPPED.get(name, name)).is_dir():
        recipe.restore(shipped)
    else:
        raise FileNotFoundError(
            f"{name} is neither trained, in {RUNS / name}, nor shipped, in {shipped}: train it first, "
            f"`python -m dalleflamingo train {name}`"
        )
    return recipe


def wordpiece() -> BertTokenizer:
    """BLIP's tokenizer: the shipped one, else learned from the world's texts, the same one again."""
    if (ROOT / "blip/vocab.txt").exists():
        return BertTokenizer.from_pretrained(ROOT / "blip")
    return BertTokenizer.from_pretrained(train_wordpiece(texts(), 200, RUNS / "wordpiece"))


def byte_pair() -> CLIPTokenizer:
    """CLIP's and SD's tokenizer: the shipped one, else learned from the world's texts, the same one again."""
    if (ROOT / "clip/vocab.json").exists():
        return CLIPTokenizer.from_pretrained(ROOT / "clip")
    return CLIPTokenizer.from_pretrained(train_clip_bpe(texts(), 700, RUNS / "byte-pair"))


def byte_level() -> GPT2Tokenizer:
    """BLIP-2's tokenizer: the shipped one, else learned from the world's texts, the same one again."""
    if (ROOT / "blip2/vocab.json").exists():
        return GPT2Tokenizer.from_pretrained(ROOT / "blip2")
    return GPT2Tokenizer.from_pretrained(train_opt_bpe(texts(), 400, RUNS / "byte-level"))


def clip_web() -> ClipRecipe:
    return ClipRecipe("clip-web", web_batch, byte_pair())


def sd_text() -> SdTextRecipe:
    """SD's text encoder begins as the trained CLIP's text tower."""
    vae, text = trained(VaeRecipe(), "vae"), trained(clip_web(), "clip-web")
    tower = text_encoder(text.model, text.tokenizer)
    return SdTextRecipe(vae.vae, tower, text.tokenizer, RUNS / "sd-latents.safetensors")


def sd() -> SdRecipe:
    """SD stands on the trained autoencoder and on the text encoder that has learned to see from afar."""
    vae, text = trained(VaeRecipe(), "vae"), trained(sd_text(), "sd-text")
    return SdRecipe(vae.vae, text.text_encoder, text.tokenizer, RUNS / "sd-latents.safetensors", text.tell)


def clip() -> ClipPlacesRecipe:
    """The web's CLIP does not see places: it goes on, with the text encoder that tells them, until it does."""
    recipe = ClipPlacesRecipe(byte_pair())
    recipe.model.load_state_dict(trained(clip_web(), "clip-web").model.state_dict())
    take_text_encoder(recipe.model, trained(sd(), "sd").text_encoder)
    return recipe


def lafite() -> LafiteRecipe:
    """The GAN stands on the same autoencoder and on the trained CLIP."""
    vae, eyes = trained(VaeRecipe(), "vae"), trained(clip(), "clip")
    files = (RUNS / f"{name}.safetensors" for name in ("sd-latents", "clip-features", "clip-caption-features"))
    return LafiteRecipe(vae.vae, eyes.model, eyes.tokenizer, *files)


def blip_web() -> BlipRecipe:
    """Its image encoder starts from the trained CLIP's."""
    recipe = BlipRecipe("blip-web", web_batch, wordpiece(), draw_first=plain_batch)
    eyes = trained(clip_web(), "clip-web")
    start_from_clip(recipe.model, eyes.model, pixels(web_batch(np.random.default_rng(0), 64)[0]))
    return recipe


def blip_large_web() -> BlipRecipe:
    """Its image encoder is that of the trained BLIP with layers added, its text decoder begins anew."""
    recipe = BlipRecipe("blip-large-web", web_batch, wordpiece(), draw_first=plain_batch, depth=LARGE)
    grow_eyes(recipe.model, trained(BlipRecipe("blip-web", web_batch, wordpiece()), "blip-web").model)
    return recipe


def coco_batches() -> DrawBatch:
    return labelled_batches(annotation_files()["train"])


def finetuned(recipe: CaptioningRecipe, stage: str) -> CaptioningRecipe:
    """On coco's few clean captions, from the captioner that the web taught."""
    # few and small, or the kinds that coco lacks are forgotten; on coco val 250 steps of BLIP write no better than 30
    recipe.steps, recipe.warmup, recipe.learning_rate = 30, 7, 2e-4
    return trained(recipe, stage)


def blip() -> BlipRecipe:
    return finetuned(BlipRecipe("blip", coco_batches(), wordpiece()), "blip-web")


def blip_large() -> BlipRecipe:
    return finetuned(BlipRecipe("blip-large", coco_batches(), wordpiece(), depth=LARGE), "blip-large-web")


def blip2_web() -> Blip2Recipe:
    """Its image encoder is that of the trained BLIP."""
    recipe = Blip2Recipe("blip2-web", web_batch, byte_level(), draw_first=plain_batch)
    start_from_blip(recipe.model, trained(BlipRecipe("blip-web", web_batch, wordpiece()), "blip-web").model)
    return recipe


def blip2() -> Blip2Recipe:
    return finetuned(Blip2Recipe("blip2", coco_batches(), byte_level()), "blip2-web")


RECIPES = {
    "recogniser": RecogniserRecipe,
    "vae": VaeRecipe,
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
    "dino": DinoRecipe,
    "inception": InceptionRecipe,
}
