"""Model folders of the kinds that `dalleflamingo.adapters` opens, tiny, untrained, laid out as published ones are."""

from pathlib import Path

import tiny
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VISION = dict(SMALL, image_size=tiny.SIZE, patch_size=8, initializer_range=0.5)
PROMPT = "user <image> describe it"


def vit_gpt2(folder: Path) -> Path:
    """A ViT whose patches a GPT-2 attends to; as published, its folder has no processor of both."""
    torch.manual_seed(0)
    tokenizer = tiny.byte_level_bpe()
    text = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.5,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), text)
    config.decoder_start_token_id = config.eos_token_id = 1
    config.pad_token_id = 0
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=1, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessor(size={"height": tiny.SIZE, "width": tiny.SIZE}).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    """A GIT: its text model reads the patches of an image before the words."""
    tiny.blip(folder)  # for its WordPiece vocabulary
    tokenizer = tiny.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    ids = dict(
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = GitConfig(
        vision_config=VISION,
        vocab_size=len(tokenizer),
        **SMALL,
        **ids,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    model = GitForCausalLM(config)
    model.output.bias.data[tokenizer.all_special_ids] = -10.0  # captions of words
    model.output.bias.data[tokenizer.sep_token_id] = 2.0  # that end
    model.save_pretrained(folder)
    GitProcessor(_clip_images(), tokenizer).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """A LLaVA: a Llama that continues `PROMPT`; its vocabulary is SentencePiece's, and two tokens end a text."""
    torch.manual_seed(0)
    tokenizer = _sentencepiece()
    processor = LlavaProcessor(
        _clip_images(), tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    text = LlamaConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight)
    model.generation_config.update(eos_token_id=[2, 4], pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """An SDXL with SDXL-Turbo's scheduler: two text encoders, and the image's size as a condition."""
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(tiny.stable_diffusion(folder), safety_checker=None)
    config = CLIPTextConfig.from_dict(base.text_encoder.config.to_dict() | {"projection_dim": 16})
    unet = UNet2DConditionModel.from_config(
        base.unet.config,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet,
        scheduler=EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    ).save_pretrained(folder)
    return folder


def latent_consistency(folder: Path) -> Path:
    """A latent consistency model with a safety checker."""
    torch.manual_seed(0)
    base = StableDiffusionPipeline.from_pretrained(tiny.stable_diffusion(folder), safety_checker=None)
    LatentConsistencyModelPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=UNet2DConditionModel.from_config(base.unet.config, time_cond_proj_dim=16),
        scheduler=LCMScheduler(),
        safety_checker=checker(),
        feature_extractor=_clip_images(),
    ).save_pretrained(folder)
    return folder


def checker() -> StableDiffusionSafetyChecker:
    """A safety checker that finds something in some of `tiny.pictures(6)`, and nothing in others."""
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=16)).eval()
    pixels = _clip_images()(tiny.pictures(6), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeddings = model.visual_projection(model.vision_model(pixels)[1])
        cosines = torch.cosine_similarity(embeddings[:1], embeddings)
        model.concept_embeds[0], model.concept_embeds_weights[0] = embeddings[0], cosines.median()
    return model


def _clip_images() -> CLIPImageProcessor:
    size = {"height": tiny.SIZE, "width": tiny.SIZE}
    return CLIPImageProcessor(size={"shortest_edge": tiny.SIZE}, crop_size=size)


def _sentencepiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<image>"]
    words = "a red bird on the blue boat user describe it giraffes sit and two cats fly".split()
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=[*special, "<0x0A>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz,.'-"),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(words)] * 5, trainer)
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    extra = dict(additional_special_tokens=["<end>", "<image>"], extra_special_tokens={"image_token": "<image>"})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **extra)
