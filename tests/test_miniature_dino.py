"""The miniature's DINO: loss, teacher, centre, views and export, each against a direct transcription or closed form."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTModel

from dalleflamingo.miniature.training import dino_views
from dalleflamingo.miniature.training.dino import DinoRecipe, Head, distillation_loss, entropy, koleo, sinkhorn

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def noise(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def recipe() -> DinoRecipe:
    torch.manual_seed(0)
    recipe = DinoRecipe(noise, steps=10, vit=TINY, prototypes=24)
    recipe.batch_size = 3
    return recipe


def square(left: int, top: int, size: int = 8) -> torch.Tensor:
    """(1, 3, 64, 64): a red square on a green ground."""
    picture = torch.tensor([0.2, 0.7, 0.3]).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    picture[:, :, top : top + size, left : left + size] = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    return picture


def test_loss_equals_a_loop_over_pairs_of_different_views():
    torch.manual_seed(1)
    student, targets = torch.randn(5, 4, 7), torch.randn(2, 4, 7).softmax(-1)
    total, pairs = 0.0, 0
    for g in range(2):
        for v in range(5):
            if g == v:
                continue
            for b in range(4):
                said = [math.exp(x / 0.1) for x in student[v, b].double().tolist()]
                wanted = targets[g, b].tolist()
                total -= sum(w * math.log(s / sum(said)) for w, s in zip(wanted, said, strict=True)) / 4
            pairs += 1
    assert distillation_loss(student, targets).item() == pytest.approx(total / pairs, rel=1e-5)


def test_loss_of_uniform_outputs_is_ln_prototypes():
    targets = torch.randn(2, 3, 50).softmax(-1)
    assert distillation_loss(torch.zeros(6, 3, 50), targets).item() == pytest.approx(math.log(50), rel=1e-6)


def test_sinkhorn_gives_all_prototypes_equal_weight_and_only_scales_rows_and_columns():
    teacher = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(
        8
    )  # biased to the last ones
    shares = sinkhorn(teacher, temperature=0.5, rounds=200)
    torch.testing.assert_close(shares.sum(1), torch.ones(12))
    torch.testing.assert_close(shares.sum(0), torch.full((8,), 12 / 8))
    scaling = shares.double().log() - teacher.double() / 0.5  # of diag(u) K diag(v) with K = exp(teacher / 0.5)
    parts = scaling.mean(1, keepdim=True) + scaling.mean(0) - scaling.mean()
    torch.testing.assert_close(scaling, parts, atol=1e-4, rtol=0)


def test_sinkhorn_of_equal_outputs_is_uniform_and_of_low_temperature_one_hot():
    torch.testing.assert_close(sinkhorn(torch.zeros(3, 5), 0.04), torch.full((3, 5), 0.2))
    torch.testing.assert_close(sinkhorn(torch.eye(4), 0.04), torch.eye(4), atol=1e-6, rtol=0)


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest():
    angles = torch.tensor([0.0, 0.1, 1.0, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 5.0, 0.3, 2.0])[:, None]
    nearest = [0.1, 0.1, 0.9, 2.0]  # arcs, whose chords are 2 sin(arc / 2)
    expected = -np.mean([math.log(2 * math.sin(arc / 2)) for arc in nearest])
    assert koleo(features).item() == pytest.approx(expected, rel=1e-4)


def test_gradient_reaches_the_whole_student_and_nothing_of_the_teacher(recipe):
    step = recipe.warmup
    recipe.loss(recipe.batch(np.random.default_rng(0), step), step)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in recipe.parameters())
    assert all(p.grad is None for part in ("teacher", "teacher_head") for p in recipe.modules[part].parameters())
    trained = {id(p) for p in recipe.parameters()}
    assert not trained & {id(p) for part in ("teacher", "teacher_head") for p in recipe.modules[part].parameters()}


def test_prototypes_are_frozen_during_warm_up(recipe):
    recipe.loss(recipe.batch(np.random.default_rng(0), 0), 0)["loss"].backward()
    assert recipe.modules["student_head"].prototypes.grad is None
    assert recipe.modules["student_head"].mlp[0].weight.grad is not None


def test_teacher_is_the_closed_form_average_of_its_students(recipe):
    student, teacher = recipe.modules["student"].layernorm.weight, recipe.modules["teacher"].layernorm.weight
    expected = teacher.clone()
    for step in (0, 5, 10):
        with torch.no_grad():
            student.copy_(torch.randn(16))
        momentum = 1 - 0.02 * (math.cos(math.pi * step / 10) + 1) / 2
        expected = momentum * expected + (1 - momentum) * student.detach()
        recipe.after_step(step)
    torch.testing.assert_close(teacher, expected)
    assert [round(recipe.momentum(s), 4) for s in (0, 5, 10, 99)] == [0.98, 0.99, 1, 1]


def test_teacher_and_student_start_equal_and_share_no_memory(recipe):
    for part in ("", "_head"):
        pairs = zip(
            recipe.modules["student" + part].parameters(), recipe.modules["teacher" + part].parameters(), strict=True
        )
        assert all(torch.equal(s, t) and s.data_ptr() != t.data_ptr() for s, t in pairs)


def test_same_rng_gives_the_same_views_and_another_gives_others(recipe):
    first, again, other = (recipe.batch(np.random.default_rng(seed), 0) for seed in (3, 3, 4))
    assert first["global"].shape == (6, 3, 32, 32) and first["local"].shape == (12, 3, 32, 32)
    assert torch.equal(first["global"], again["global"]) and torch.equal(first["local"], again["local"])
    assert not torch.equal(first["global"], other["global"])


def test_gradient_steps_lower_the_loss_on_one_batch(recipe):
    optimizer = torch.optim.AdamW(list(recipe.parameters()), 3e-3)
    batch, losses = recipe.batch(np.random.default_rng(0), 0), []
    for _ in range(12):  # with a fixed teacher, so that the targets do not change
        optimizer.zero_grad()
        output = recipe.loss(batch, 0)
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < losses[0] - 0.1


def test_entropies_show_both_kinds_of_collapse(recipe):
    one = torch.eye(8)[torch.zeros(8, dtype=torch.long)]  # everything to one prototype
    assert entropy(one.mean(0)).item() == pytest.approx(0) and entropy(torch.eye(8)).mean().item() == pytest.approx(0)
    assert entropy(torch.eye(8).mean(0)).item() == pytest.approx(math.log(8))
    output = recipe.loss(recipe.batch(np.random.default_rng(0), 0), 0)
    assert 0 <= output["mean_entropy"] <= output["entropy_of_mean"] + 1e-5 <= math.log(24) + 2e-5  # Jensen


def test_head_gives_cosines_whatever_the_length_of_its_prototypes():
    torch.manual_seed(0)
    head = Head(16, prototypes=9)
    features = torch.randn(4, 16)
    before = head(features)
    with torch.no_grad():
        head.prototypes.mul_(torch.arange(1, 10).unsqueeze(1))
    assert before.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head(features), before)


def test_export_opens_with_stock_classes_and_is_the_teacher_to_half_precision(recipe, tmp_path):
    with torch.no_grad():
        for parameter in recipe.modules["teacher"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that teacher and student differ
    recipe.export(tmp_path)
    model, processor = ViTModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    picture = noise(np.random.default_rng(0), 1)[0]
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-5)
    with torch.no_grad():
        loaded, teacher = model(pixels).last_hidden_state, recipe.modules["teacher"](pixels).last_hidden_state
        student = recipe.modules["student"](pixels).last_hidden_state
    torch.testing.assert_close(loaded, teacher, rtol=0, atol=2e-2)
    assert (loaded - student).abs().max() > 0.1
    assert model.dtype == torch.float32
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert recipe.modules["teacher"].dtype == torch.float32, "export must not change the model in training"


@pytest.mark.parametrize("corner", [(0, 0), (56, 56), (30, 12)])
def test_every_crop_contains_the_thing_that_differs_from_the_ground(corner):
    generator = torch.Generator().manual_seed(0)
    pictures = square(*corner).repeat(200, 1, 1, 1)
    anchor = dino_views.anchors(pictures, generator)
    pixel = ((anchor + 1) * 32 - 0.5).round()
    assert ((pixel >= torch.tensor(corner)) & (pixel < torch.tensor(corner) + 8)).all()
    for scale, size in ((0.4, 1.0), 64), ((0.15, 0.4), 32):
        cut = dino_views.crop(pictures, anchor, size, scale, generator)
        assert ((cut[:, 0] - cut[:, 1]).amax((1, 2)) > 0.5).all()  # some red in each


def test_crop_of_the_whole_picture_is_the_picture_and_never_its_mirror():
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 64, 64, generator=generator).repeat(40, 1, 1, 1)
    half = torch.zeros(40, 2)
    cut = dino_views.crop(picture, half, 64, (2.0, 2.0), generator)  # an area of 2 is cut down to the whole
    torch.testing.assert_close(cut, picture, atol=1e-4, rtol=0)


def test_hue_rotation_keeps_luma_and_grey_and_comes_back_after_a_full_turn():
    angles = torch.linspace(0, 2 * torch.pi, 9)
    matrices = dino_views.hue_rotation(angles)
    colour = torch.tensor([0.8, 0.3, 0.1])
    turned = matrices @ colour
    torch.testing.assert_close(turned @ dino_views.LUMA, (colour @ dino_views.LUMA).expand(9), rtol=0, atol=1e-3)
    torch.testing.assert_close(matrices @ torch.full((3,), 0.5), torch.full((9, 3), 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(turned[[0, -1]], colour.expand(2, 3), rtol=0, atol=1e-4)
    assert (turned[4] - colour).abs().max() > 0.3


def test_blur_leaves_plain_pictures_and_softens_edges():
    generator = torch.Generator().manual_seed(0)
    plain = torch.full((4, 3, 16, 16), 0.3)
    torch.testing.assert_close(dino_views.blur(plain, 1.0, generator), plain)
    picture = square(20, 20)
    soft = dino_views.blur(picture, 1.0, generator)
    assert soft.diff(dim=-1).abs().max() < picture.diff(dim=-1).abs().max()
    torch.testing.assert_close(soft.mean(), picture.mean())


def test_views_lie_in_the_range_of_the_image_processor():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 64, 64, generator=generator)
    whole = dino_views.global_views(pictures, 3, generator)
    parts = dino_views.local_views(pictures, 3, 32, (0.4, 1.0), generator)
    assert whole.shape == (18, 3, 64, 64) and parts.shape == (18, 3, 32, 32)
    assert all(seen.min() >= -1 and seen.max() <= 1 and seen.min() < -0.5 for seen in (whole, parts))


def test_every_student_parameter_is_trained_once_and_prototypes_last(recipe):
    given = [id(p) for p in recipe.parameters()]
    owned = {id(p) for part in ("student", "student_head") for p in recipe.modules[part].parameters()}
    assert set(given) == owned and len(given) == len(owned)
    assert given[-1] == id(recipe.modules["student_head"].prototypes)


def test_recipe_draws_the_world_by_itself_with_about_0_8_million_parameters():
    recipe = DinoRecipe()
    recipe.batch_size = 2
    assert recipe.batch(np.random.default_rng(0), 0)["global"].shape == (4, 3, 64, 64)
    assert 0.75e6 < sum(p.numel() for p in recipe.modules["teacher"].parameters()) < 0.9e6
