"""The GAN generator: its layer against a direct transcription, images as functions of caption and seed, its losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from dalleflamingo import registry
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.miniature.corpora import texts
from dalleflamingo.miniature.lafite import Lafite, LafiteGenerator, StyledBlock
from dalleflamingo.miniature.training import clip, lafite, sd
from dalleflamingo.miniature.training.tokenizers import train_clip_bpe


class Letters:
    """In place of CLIP's text encoder: counts letters."""

    def fingerprint(self):
        return "Letters"

    def embed(self, captions):
        rows = [[caption.count(letter) for letter in "abcdefghijklmnopqrstuvwx"] for caption in captions]
        return torch.tensor(rows, dtype=torch.float32)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    pipeline = tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    torch.manual_seed(0)
    return LafiteGenerator(Lafite(feature_size=24, width=16), vae, Letters())


CAPTIONS = ["a red bird", "a blue boat", "two cats"]


def test_a_styled_block_is_adaptive_group_normalisation_beside_a_shortcut():
    """Dhariwal & Nichol 2021, §3: y_s · GroupNorm(h) + y_b, one group and one picture at a time."""
    torch.manual_seed(0)
    block = StyledBlock(16, 4)
    torch.nn.init.normal_(block.convolutions[1].weight)
    x, style = torch.randn(2, 16, 6, 6), torch.randn(2, 4)
    for picture, own, found in zip(x, style, block(x, style), strict=True):
        h = picture
        for to_style, convolution in zip(block.styles, block.convolutions, strict=True):
            groups = [(g - g.mean()) / (g.var(unbiased=False) + 1e-5).sqrt() for g in h.split(2)]
            scale, shift = to_style(own).split(16)
            h = torch.cat(groups) * (1 + scale)[:, None, None] + shift[:, None, None]
            h = convolution((h * h.sigmoid())[None])[0]
        torch.testing.assert_close(found, picture + h, atol=1e-5, rtol=1e-5)


def test_an_image_depends_on_its_caption_and_seed_alone(generator):
    together = generator.render(CAPTIONS, [1, 2, 1])
    alone = [generator.render([caption], [seed])[0] for caption, seed in zip(CAPTIONS, [1, 2, 1], strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.subtract(a, b, dtype=float)).max() <= 1  # a batch may be summed in another order
    again, *others = generator.render([CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]], [1, 2, 1])
    assert again.tobytes() == together[0].tobytes()
    assert len({picture.tobytes() for picture in (again, *others)}) == 3


@pytest.mark.parametrize("wrapped", [False, True], ids=["open_clip's own tokenizer", "one of transformers"])
def test_a_caption_that_clip_would_read_in_part_is_refused(generator, tmp_path, wrapped):
    clip_text = ClipText.from_pretrained(str(tiny.clip(tmp_path)))
    if wrapped:  # as the shipped CLIP has it
        own = CLIPTokenizer.from_pretrained(tiny.stable_diffusion(tmp_path), subfolder="tokenizer")
        clip_text.tokenizer = SimpleNamespace(tokenizer=own, context_length=16)
    generator, length = LafiteGenerator(generator.model, generator.vae, clip_text), clip_text.tokenizer.context_length
    generator.check_caption("a " * (length - 2))
    with pytest.raises(ValueError, match=f"it has {length + 1} tokens and the model reads {length}"):
        generator.check_caption("a " * (length - 1))


def test_fingerprint_follows_the_weights(generator):
    before = generator.fingerprint()
    torch.manual_seed(1)
    other = LafiteGenerator(Lafite(feature_size=24, width=16), generator.vae, Letters())
    assert before == generator.fingerprint() != other.fingerprint() and before.startswith("LafiteGenerator ")


def test_each_distinct_pair_is_drawn_once_and_progress_counts_all(generator):
    embedded, counted = [], []
    embed, generator.clip_text = generator.clip_text, type("", (), {})()
    generator.clip_text.embed = lambda captions: embedded.extend(captions) or embed.embed(captions)
    try:
        generator.render(CAPTIONS[:2] * 3, [1, 1] * 3, batch_size=1, progress=counted.append)
    finally:
        generator.clip_text = embed
    assert embedded == CAPTIONS[:2] and sum(counted) == 6
    with pytest.raises(ValueError, match="2 captions but 1 seeds"):
        generator.render(CAPTIONS[:2], [1])


def test_a_folder_opens_with_the_clip_and_the_autoencoder_it_names(generator, tmp_path, monkeypatch):
    folders = {"a clip": tiny.clip, "an autoencoder": tiny.stable_diffusion}
    for name, make in folders.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    monkeypatch.setattr(registry, "locate", lambda name: str(tmp_path / name))
    monkeypatch.setattr(
        "dalleflamingo.miniature.lafite.ClipText.from_pretrained", lambda folder, device: (Letters(), folder)
    )
    saved = Lafite(feature_size=24, width=16, clip="a clip", autoencoder="an autoencoder")
    saved.save_pretrained(tmp_path / "lafite")
    opened = LafiteGenerator.from_pretrained(str(tmp_path / "lafite"))
    assert opened.clip_text[1] == str(tmp_path / "a clip")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), opened.model.parameters(), strict=True))


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lafite")
    tokenizer = CLIPTokenizer.from_pretrained(train_clip_bpe(texts(200), 600, folder))
    torch.manual_seed(0)
    eyes = clip.build(len(tokenizer))
    files = []
    for name, shape in (("latents", (4, 16, 16)), ("features", (128,)), ("features", (lafite.CAPTIONS, 128))):
        files.append(folder / f"{len(files)}.safetensors")
        values = torch.randn(200, *shape)
        sd.save_file({name: (F.normalize(values, dim=-1) if name == "features" else values).half()}, files[-1])
    recipe = lafite.LafiteRecipe(None, eyes, tokenizer, *files)
    recipe.batch_size = 6
    return recipe


class Twice(torch.nn.Module):
    """Draws 2 everywhere."""

    device = torch.device("cpu")

    def whiten(self, features):
        return features

    def forward(self, noise, features):
        return torch.full((len(noise), 4, 16, 16), 2.0)


def test_whitened_features_spread_alike_in_every_direction():
    torch.manual_seed(0)
    features = torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    centre, matrix = lafite.whitening(features)
    white = (features - centre) @ matrix
    torch.testing.assert_close(white.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    spread = torch.linalg.eigvalsh(torch.cov(features.T))
    kept = spread / (spread + lafite.VARIANCE_FLOOR * spread.max())
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(white.T)), kept, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-4, rtol=1e-4)
    model = Lafite(feature_size=6, width=8)
    model.centre, model.matrix = centre, matrix
    found = model.whiten(features[:9])
    torch.testing.assert_close(found, 6**0.5 * white[:9] / white[:9].norm(dim=1, keepdim=True))


def test_caption_features_are_whitened_by_the_generator_and_image_features_for_the_encoder(recipe):
    for value, expected in zip(
        (recipe.generator.centre, recipe.generator.matrix),
        lafite.whitening(recipe.caption_features.float().view(-1, 128)),
        strict=True,
    ):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(recipe.image_features.float().mean(0), torch.zeros(128), atol=1e-2, rtol=0)


def test_kl_divergence_is_torchs():
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    normal, code = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(code, normal).sum(1).mean()
    torch.testing.assert_close(lafite.kl_divergence(mean, log_variance), expected)


def test_every_caption_of_a_scene_has_its_feature(monkeypatch):
    captions_seen = []

    def tokenizer(captions, **_):
        captions_seen.extend(captions)
        return SimpleNamespace(input_ids=torch.tensor([[len(caption), 1] for caption in captions]))

    monkeypatch.setattr(lafite, "encode_text", lambda _, input_ids: input_ids.float())
    found = lafite.caption_features(None, tokenizer, [0, 1])
    assert found.shape == (2, lafite.CAPTIONS, 2) and len(captions_seen) == 2 * lafite.CAPTIONS and all(captions_seen)
    lengths = torch.tensor([len(caption) for caption in captions_seen]).view(2, -1)
    torch.testing.assert_close(found[..., 0] / found[..., 1], lengths.float())
    assert len(set(captions_seen)) > 2  # more than one for a scene


@pytest.mark.parametrize("late", [1, 0])
def test_each_network_learns_by_its_own_losses_only(recipe, late):
    step = lafite.PENALTY_INTERVAL * (lafite.DISCRIMINATOR_START // lafite.PENALTY_INTERVAL + 1) + late
    losses = recipe.loss(recipe.batch(np.random.default_rng(0), step), step)
    assert (losses["gradient_penalty"] > 0) == (not late)
    trained_by = {
        "generator": ("reconstruction", "generator"),
        "encoder": ("reconstruction", "kl"),
        "discriminator": ("discriminator", "contrastive", *("gradient_penalty",) * (not late)),
    }
    for network, module in recipe.modules.items():
        parameters = list(module.parameters())
        for name in losses.keys() - {"loss", *("gradient_penalty",) * late}:
            found = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            moved = sum(g is not None and g.abs().sum() > 0 for g in found)
            if name in trained_by[network]:
                assert moved > len(parameters) // 3, (network, name)  # layers that begin as 0 keep some gradients at 0
            else:
                assert not moved, (network, name)
    torch.testing.assert_close(losses["loss"], sum(value for name, value in losses.items() if name != "loss"))


def test_autoencoder_is_trained_alone_before_the_discriminator(recipe, monkeypatch):
    batch = recipe.batch(np.random.default_rng(0), 0)
    monkeypatch.setattr(recipe, "generator", Twice())
    torch.manual_seed(0)
    start, last_alone, later = (
        recipe.loss(batch, step) for step in (0, lafite.DISCRIMINATOR_START - 1, lafite.DISCRIMINATOR_START)
    )
    assert list(last_alone) == ["loss", "reconstruction", "kl"] and set(last_alone) < set(later)
    for losses in (last_alone, later):
        torch.testing.assert_close(
            losses["reconstruction"], lafite.RECONSTRUCTION_WEIGHT * (2 - batch["latents"]).square().mean()
        )
    kl = lafite.KL_WEIGHT * lafite.kl_divergence(*recipe.encoder(batch["image_features"], batch["caption_features"]))
    torch.testing.assert_close(later["kl"], kl)
    assert start["kl"] == 0


def test_reconstruction_is_from_inferred_noise_and_adversarial_losses_from_normal_noise(recipe, monkeypatch):
    given = []

    class Listens(Twice):
        def forward(self, noise, features):
            given.append(noise)
            return super().forward(noise, features)

    recipe.batch_size = 500
    batch = recipe.batch(np.random.default_rng(0), 0)
    recipe.batch_size = 6
    batch = {name: value[:1].expand(500, *value.shape[1:]) for name, value in batch.items()}
    monkeypatch.setattr(recipe, "generator", Listens())
    encoded = torch.full((500, 4), 5.0), torch.full((500, 4), -2.0)
    monkeypatch.setattr(recipe, "encoder", lambda image_features, caption_features: encoded)
    recipe.loss(batch, lafite.DISCRIMINATOR_START + 1)
    inferred, noise = given
    assert (inferred.mean().item(), inferred.std().item()) == pytest.approx((5, np.exp(-1)), abs=0.05)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.1)


def test_adversarial_losses_are_relativistic_and_the_contrastive_one_is_cross_entropy(recipe, monkeypatch):
    """Huang et al. 2024, Eq. 2: log(1 + exp(D(x̂) − D(x))) for the discriminator, the other way for the generator."""
    batch = recipe.batch(np.random.default_rng(0), 1)
    monkeypatch.setattr(recipe, "generator", Twice())
    other = 100 * torch.eye(6)[[1, 2, 3, 4, 5, 0]]  # other entries of the matrix must not matter for these two
    discriminator = torch.nn.Module()
    discriminator.forward = lambda latents, features: latents.mean((1, 2, 3)).diag() - other
    monkeypatch.setattr(recipe, "discriminator", discriminator)
    losses, scores = recipe.loss(batch, lafite.DISCRIMINATOR_START + 1), batch["latents"].mean((1, 2, 3))
    torch.testing.assert_close(losses["discriminator"], torch.log1p((2 - scores).exp()).mean())
    torch.testing.assert_close(losses["generator"], torch.log1p((scores - 2).exp()).mean())
    known = torch.log(scores.exp() + 4 + np.exp(-100.0)) - scores
    torch.testing.assert_close(losses["contrastive"], lafite.CONTRASTIVE_WEIGHT * known.mean())


def test_gradient_penalty_of_a_linear_score_is_its_squared_slope():
    latents, slope = torch.randn(5, 4, 16, 16, requires_grad=True), torch.randn(4, 16, 16, requires_grad=True)
    found = lafite.gradient_penalty((latents * slope).flatten(1).sum(1), latents)
    torch.testing.assert_close(found, slope.square().sum())
    found.backward()
    torch.testing.assert_close(slope.grad, 2 * slope)


def test_exported_generator_is_the_trained_one_in_half_precision(recipe, tmp_path):
    recipe.export(tmp_path)
    opened = Lafite.from_pretrained(tmp_path, dtype=torch.float32)
    for ours, theirs in zip(recipe.generator.parameters(), opened.parameters(), strict=True):
        torch.testing.assert_close(ours.half().float(), theirs)
