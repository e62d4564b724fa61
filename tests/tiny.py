"""Model folders of every kind, tiny and untrained, laid out as the published ones are; made in a second."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import rankdata
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    OPTConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from dalleflamingo import registry
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.training.tokenizers import train_opt_bpe

_WORDS = "a the of in on red blue green bird cat house tree boat kite sits flies two with and small large it".split()
_TOKENS = ["##s", "##ing", "##boat", "n", "t", "x", ",", ".", "'", "-"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZE = 32  # pixels


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    """n different images of noise on a ground."""
    rng = np.random.default_rng(seed)
    arrays = rng.integers(0, 256, (n, 1, 1, 3)) // 2 + rng.integers(0, 128, (n, SIZE, SIZE, 3))
    return [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def printed_solution(notebook: str, name: str) -> Callable | dict[str, str]:
    """The function, or the prediction, `name` as a notebook prints it under its exercise."""
    file = Path(__file__).resolve().parents[1] / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    [code] = re.findall(rf"```python\n((?:def {name}\(|{name} = ).*?)```", text, re.DOTALL)
    names = {"np": np, "torch": torch, "rankdata": rankdata, "scene_graph": scene_graph}  # as the notebooks have them
    exec(code, names)
    return names[name]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """OPT's kind of tokenizer: bytes with their spaces, `Ġ` for a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(_WORDS)] * 5 + ["a giraffe and 10 computers"] * 3, trainer)
    names = dict(pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def shipped_tokenizers() -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The miniature BLIP's and Stable Diffusion's."""
    folders = registry.locate("miniature/blip"), Path(registry.locate("miniature/sd"), "tokenizer")
    return tuple(map(AutoTokenizer.from_pretrained, folders))


def blip(folder: Path) -> Path:
    """A BLIP whose [DEC] token lies outside its tokenizer, as the published one's does."""
    torch.manual_seed(0)
    vocabulary = [*_SPECIAL, *_WORDS, *_TOKENS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = dict(
        small,
        vocab_size=len(vocabulary) + 2,
        bos_token_id=len(vocabulary),
        eos_token_id=2,
        pad_token_id=0,
        sep_token_id=_SPECIAL.index("[SEP]"),
        encoder_hidden_size=16,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    vision = dict(small, image_size=SIZE, patch_size=8, initializer_range=0.5)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, dtype="float32")
    model = BlipForConditionalGeneration(config)
    bias = model.text_decoder.cls.predictions.bias.data
    bias[: len(_SPECIAL)] = bias[len(vocabulary) :] = -10.0  # captions of words
    bias[_SPECIAL.index("[SEP]")] = 2.0  # that end
    model.save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """A BLIP-2 with an OPT whose tokenizer puts </s> before a text; a line break ends a caption."""
    torch.manual_seed(0)
    texts = [" ".join(_WORDS)] * 5 + [f" {word}" for word in _WORDS for _ in range(3)]
    tokenizer = AutoTokenizer.from_pretrained(train_opt_bpe(texts, 330, folder))
    image_processor = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=3)
    processor.save_pretrained(folder)
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    end = tokenizer("\n").input_ids[-1]
    text = OPTConfig(
        **small,
        ffn_dim=32,
        word_embed_proj_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=2,
        eos_token_id=end,
        pad_token_id=1,
        init_std=0.3,
    )
    config = Blip2Config(
        text_config=text,
        vision_config=dict(small, intermediate_size=32, image_size=SIZE, patch_size=8, initializer_range=0.5),
        qformer_config=dict(small, intermediate_size=32, hidden_dropout_prob=0.0, initializer_range=0.5),
        num_query_tokens=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=0.5,
        dtype="float32",
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path, tokens: int = 16) -> Path:
    """A pipeline with a byte-pair tokenizer of its own, as in SD v1, where a caption has 77 tokens."""
    torch.manual_seed(0)
    tokenizer = _clip_tokenizer(tokens)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=20.0,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _clip_tokenizer(tokens: int) -> CLIPTokenizer:
    letters = list("abcdefghijklmnopqrstuvwxyz,.'-")
    # letters as special tokens: those with a suffix would be numbered in a random order, another in every process
    special = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, end_of_word_suffix="</w>")
    bpe.train_from_iterator(_WORDS * 4, trainer)
    model = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=tokens
    )


def dino(folder: Path) -> Path:
    """A ViT of 16 dimensions on 4 × 4 patches."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIZE,
        patch_size=8,
        initializer_range=0.5,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def clip(folder: Path, vocabulary: int = 64, tokens: int = 16) -> Path:
    """An open_clip folder with 24-d embeddings; CLIP's own tokenizer has 49,408 tokens, 77 of them a text."""
    torch.manual_seed(0)
    model_cfg = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": tokens, "vocab_size": vocabulary, "width": 16, "heads": 2, "layers": 1},
    }
    save_file(open_clip.CLIP(**model_cfg).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"size": SIZE}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder
