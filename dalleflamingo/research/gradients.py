"""Which loss updates which model, and how hard (§4; App. H, "Parameter Update").

    python -m dalleflamingo research gradients        a few minutes on one core

The gradient of each loss with respect to what is trained of each model, for each choice of what is trained
(`cycle_losses.TRAINABLE`), and how many numbers that is at full size.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipConfig, BlipForConditionalGeneration

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import positive
from dalleflamingo.cycle import CycleConfig, step_losses
from dalleflamingo.cycle_losses import LOSS_NAMES, TRAINABLE, add_lora, captioner_parameters, generator_parameters
from dalleflamingo.evaluation.intervals import mean_interval
from dalleflamingo.profiles import Profile
from dalleflamingo.research import pages
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_cycle

COMMAND = "python -m dalleflamingo research gradients"
MODELS = ("captioner", "generator")
NUMBERS = dict(zip(LOSS_NAMES, ("(1)", "(2)", "(3)", "(4)"), strict=True))


def gradient_norms(config: CycleConfig, batches: int, device: str) -> pd.DataFrame:
    """The norm of every loss's gradient, batch by batch.

    Args:
        config: names models and data, says what is trained; all four losses are computed at every step.
        batches: how many.
        device: as `Profile.device`.
    Returns:
        columns loss (of `LOSS_NAMES`), model, batch, norm; 0 where the loss does not reach the model.
    """
    cycle, labelled, trainable = load_cycle(config, torch.device(device))
    parameters = {model: list(trainable.modules[model].parameters()) for model in MODELS}
    every = [parameter for own in parameters.values() for parameter in own]
    rows = []
    for step in tqdm(range(batches), desc=f"gradients, {config.trainable}", unit="batch"):
        for loss, value in step_losses(config, cycle, labelled, step).items():
            found = dict(
                zip(
                    map(id, every), torch.autograd.grad(value, every, retain_graph=True, allow_unused=True), strict=True
                )
            )
            for model, own in parameters.items():
                parts = [found[id(parameter)] for parameter in own if found[id(parameter)] is not None]
                norm = torch.stack([part.norm() for part in parts]).norm().item() if parts else 0.0
                rows.append((loss, model, step, norm))
    return pd.DataFrame(rows, columns=["loss", "model", "batch", "norm"])


def full_size_counts() -> pd.DataFrame:
    """How many numbers each choice trains of the real models, counted without a weight in memory.

    Returns:
        a row for each model: model, all, and a column for each of `TRAINABLE`.
    """
    rows = []
    for name, (build, choose) in _FULL_SIZE.items():
        counts = {}
        for trainable in TRAINABLE:
            with torch.device("meta"):
                model = build()
                counts["all"] = sum(parameter.numel() for parameter in model.parameters())
                if trainable == "lora":
                    add_lora(model, seed=0)
            holder = SimpleNamespace(model=model, pipeline=SimpleNamespace(unet=model))
            counts[trainable] = sum(parameter.numel() for parameter in choose(holder, trainable).values())
        rows.append({"model": name, **counts})
    return pd.DataFrame(rows)


def _blip() -> nn.Module:
    text = {"hidden_size": 768, "num_hidden_layers": 12, "encoder_hidden_size": 1024}
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def _blip2() -> nn.Module:
    text = {
        "model_type": "opt",
        "hidden_size": 2560,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    return Blip2ForConditionalGeneration(Blip2Config(text_config=text, num_query_tokens=32))


def _unet() -> nn.Module:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


_FULL_SIZE = {
    "BLIP, ViT-L": (_blip, captioner_parameters),
    "BLIP-2, OPT 2.7B": (_blip2, captioner_parameters),
    "Stable Diffusion v1-4, U-Net": (_unet, generator_parameters),
}


def page(norms: Mapping[str, pd.DataFrame], counts: pd.DataFrame, profile: Profile, batches: int) -> list[str]:
    """The parts of the page in Markdown.

    Args:
        norms: choice of what is trained -> of `gradient_norms`.
        counts: of `full_size_counts`.
        profile: of the models.
        batches: that the norms were measured on.
    """
    parts = [
        "# Which loss updates which model",
        pages.measured_on(profile.dataset),
        f"Made by `{COMMAND}` at commit `{pages.current_commit()}`.",
        "## How much is trained, at full size",
        "*queries*: the query projections of cross-attention, the paper's choice (BLIP-2: its query tokens). "
        "*cross-attention*: all of its projections and norms. *lora*: a change of rank 8 to each projection.",
        _count_table(counts),
        "## How hard each loss pushes, in the miniature",
        f"The norm of each loss's gradient, mean over {batches} batches, with 95 % intervals over these; – where the "
        "loss does not reach the model. The last rows are ratios of the means: of a loss by reconstruction to that by "
        "labels, for the same model.",
    ]
    for trainable, table in norms.items():
        parts += [f"### {trainable}", _norm_table(table)]
    return parts


def _count_table(counts: pd.DataFrame) -> str:
    names = ("all", *TRAINABLE)
    rows = [[row["model"], *(f"{row[name]:,}" for name in names)] for row in counts.to_dict("records")]
    return pages.table(["", *names], rows)


def _norm_table(table: pd.DataFrame) -> str:
    means = table.groupby(["loss", "model"])["norm"].mean()
    rows = []
    for loss, number in NUMBERS.items():
        cells = []
        for model in MODELS:
            values = table.loc[(table["loss"] == loss) & (table["model"] == model), "norm"].to_numpy()
            cells.append(pages.cell(mean_interval(values), 3) if values.any() else "–")
        rows.append([number, *cells])
    by_labels = {"captioner": means["caption", "captioner"], "generator": means["generation", "generator"]}
    ways_back = {
        "(2) / (1), (4) / (3)": ("image_reconstruction", "caption_reconstruction"),
        "(4) / (1), (2) / (3)": ("caption_reconstruction", "image_reconstruction"),
    }
    for label, losses in ways_back.items():
        ratios = [means[loss, model] / by_labels[model] for loss, model in zip(losses, MODELS, strict=True)]
        rows.append([label, *(f"{ratio:.2f}" for ratio in ratios)])
    return pages.table(["loss", *MODELS], rows)


def main(arguments: list[str]) -> int:
    """Which loss updates which model, and how hard? Gradients of all four losses, for each choice of what is trained.

    A few minutes on one core; nothing is trained.
    """
    parser = study_parser("gradients", main.__doc__)
    parser.add_argument("--batches", type=positive, default=20, help="of labelled images; default: %(default)s")
    options = parse(parser, arguments)
    profile, norms = profiles.current(), {}
    for trainable in TRAINABLE:
        # (4) at all timesteps, as in the paper: a bound would make it a mean over other images than (3)'s
        config = CycleConfig.of(profile, trainable=trainable, schedule="joint", losses={"max_timestep": 1.0})
        norms[trainable] = gradient_norms(config, options.batches, profile.device)
    every = pd.concat([table.assign(trainable=name) for name, table in norms.items()], ignore_index=True)
    file = options.docs / "results" / "gradients.csv"
    write_whole(file, lambda path: every.round(6).to_csv(path, index=False))
    pages.write_page(file.with_suffix(".md"), page(norms, full_size_counts(), profile, options.batches))
    print(file.with_suffix(".md"))
    return 0
