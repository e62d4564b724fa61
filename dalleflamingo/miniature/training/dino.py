"""DINO for the miniature world: a small ViT that distils itself, without labels (Caron et al. 2021).

A student sees all views of an image, a teacher only the two large ones, and the student predicts the teacher's output
for another view. The teacher is a slow moving average of the student. Two parts of DINOv2 (Oquab et al. 2023) keep the
outputs from collapsing: *Sinkhorn-Knopp* normalisation assigns prototypes evenly, and the *KoLeo* loss pushes the
features of a batch apart. After 100 steps, the 20 nearest neighbours give the right kind of a thing for 32 % of the
images; with DINO's own centring, for 21 %.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.dino_views import global_views, local_views
from dalleflamingo.miniature.world import draw, sample_scene

DrawBatch = Callable[[np.random.Generator, int], np.ndarray]

VIT = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.08,  # ≈ 1/√width
}
KOLEO_WEIGHT = 0.1  # as in DINOv2


def draw_half_single(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64, 64, 3) uint8 images: half of one thing, whose kind all views have in common; half of two or three."""
    counts = (1 if rng.random() < 0.5 else int(rng.integers(2, 4)) for _ in range(n))
    return np.stack([draw(sample_scene(rng, count=count)) for count in counts])


class Head(nn.Module):
    """Projection head: MLP, l2 normalisation, then cosines to prototypes (Caron et al. 2021, §3.1).

    The prototypes are normalised before use, which is weight normalisation with a fixed gain.
    """

    def __init__(self, width: int, hidden: int = 256, bottleneck: int = 64, prototypes: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, features: Tensor, train_prototypes: bool = True) -> Tensor:
        """(N, width) -> (N, prototypes) cosines in [-1, 1]."""
        prototypes = self.prototypes if train_prototypes else self.prototypes.detach()
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(prototypes, dim=-1))


def distillation_loss(student: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy H(teacher, student) over all pairs of a teacher view and another student view.

    Caron et al. 2021, §3.1.

    Args:
        student: (V, B, P) outputs, the teacher's views first.
        targets: (G, B, P) probabilities of the teacher, G ≤ V.
        temperature: of the student's softmax.
    Returns:
        scalar in nats; ln P if the student's outputs are all equal.
    """
    log_student = (student / temperature).log_softmax(-1)
    pairs = -torch.einsum("gbp,vbp->gv", targets, log_student) / student.shape[1]
    others = 1 - torch.eye(*pairs.shape, device=pairs.device)  # without pairs of a view with itself
    return (pairs * others).sum() / others.sum()


@torch.no_grad()
def sinkhorn(teacher: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """The teacher's outputs as probabilities in which all prototypes have equal weight (Caron et al. 2020, §3.1).

    Args:
        teacher: (N, P) outputs of a whole batch.
        temperature: of the softmax before normalisation.
        rounds: of normalising columns and rows in turn.
    Returns:
        (N, P); rows sum to 1, columns to about N / P.
    """
    shares = (teacher / temperature).double()
    shares = (shares - shares.max()).exp()
    for _ in range(rounds):
        shares /= shares.sum(0, keepdim=True)
        shares /= shares.sum(1, keepdim=True)
    return shares.float()


def koleo(features: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest other row, after l2 normalisation (Sablayrolles et al. 2019).

    Args:
        features: (B, D), B ≥ 2.
    """
    unit = F.normalize(features, dim=-1)
    cosine = (unit @ unit.T).detach().fill_diagonal_(-2)
    return -((unit - unit[cosine.argmax(1)]).norm(dim=-1) + 1e-6).log().mean()


def entropy(probabilities: Tensor) -> Tensor:
    """(..., P) probabilities -> (...) entropy in nats, between 0 and ln P."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


class DinoRecipe(Recipe):
    """Self-distillation of a ViT; the teacher is what is exported.

    Args:
        draw_batch: (rng, n) -> (n, 64, 64, 3) uint8 images.
        steps: length of the run, on which the teacher's momentum depends.
        vit: arguments of `ViTConfig`; None for `VIT`.
        prototypes: outputs of the heads.
    """

    name = "dino"
    batch_size = 32  # in a given time on a CPU, more steps are better than larger batches
    learning_rate = 1e-3
    weight_decay = 0.04
    average = 0.0  # the teacher is a moving average already
    warmup = 60  # steps
    teacher_temperature = 0.04
    global_views, local_views = 2, 4
    local_scale = (0.15, 0.4)  # shares of the image's area
    local_pixels = 32  # of 64: crops keep the things near their original size

    def __init__(
        self,
        draw_batch: DrawBatch = draw_half_single,
        steps: int = 2500,
        vit: dict | None = None,
        prototypes: int = 256,
    ):
        self.draw_batch, self.steps = draw_batch, steps
        config = ViTConfig(**(vit or VIT))
        student = ViTModel(config, add_pooling_layer=False)
        head = Head(config.hidden_size, prototypes=prototypes)
        self.modules = {
            "student": student,
            "student_head": head,
            "teacher": copy.deepcopy(student).requires_grad_(False).eval(),
            "teacher_head": copy.deepcopy(head).requires_grad_(False).eval(),
        }

    def parameters(self) -> Iterator[nn.Parameter]:
        """The student's parameters, its prototypes last.

        The prototypes are trained only after warm-up, so the optimizer creates their moments last, and a checkpoint
        numbers moments in the order of their creation.
        """
        head = self.modules["student_head"]
        yield from self.modules["student"].parameters()
        yield from head.mlp.parameters()
        yield head.prototypes

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Views of B images in [-1, 1]: `global` (2 · B, 3, 64, 64) and `local` (4 · B, 3, 32, 32)."""
        images = torch.from_numpy(self.draw_batch(rng, self.batch_size)).permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return {
            "global": global_views(images, self.global_views, generator),
            "local": local_views(images, self.local_views, self.local_pixels, self.local_scale, generator),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Distillation and KoLeo loss, and two entropies in nats that show whether the outputs collapse.

        `entropy_of_mean` falls to 0 if one prototype gets all the weight; `mean_entropy` stays at ln P if the teacher's
        outputs are uniform. In a healthy run the first is high and the second well below it.
        """
        large, small = (batch[part].to(self._device) for part in ("global", "local"))
        with torch.no_grad():
            teacher = self.modules["teacher_head"](self._features("teacher", large))
            targets = sinkhorn(teacher, self.teacher_temperature).unflatten(0, (self.global_views, -1))
        of_global, of_local = self._features("student", large), self._features("student", small)
        train_prototypes = step >= self.warmup  # the paper, too, freezes the last layer at first
        student = self.modules["student_head"](torch.cat([of_global, of_local]), train_prototypes)
        student = student.unflatten(0, (self.global_views + self.local_views, -1))
        koleo_loss = torch.stack([koleo(view) for view in of_global.chunk(self.global_views)]).mean()
        return {
            "loss": distillation_loss(student, targets) + KOLEO_WEIGHT * koleo_loss,
            "koleo": koleo_loss.detach(),
            "entropy_of_mean": entropy(targets.mean((0, 1))),
            "mean_entropy": entropy(targets).mean(),
        }

    def after_step(self, step: int) -> None:
        """Teacher ← m · teacher + (1 − m) · student."""
        momentum = self.momentum(step)
        with torch.no_grad():
            for part in ("", "_head"):
                teacher, student = self.modules["teacher" + part], self.modules["student" + part]
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

    def momentum(self, step: int) -> float:
        """Decay of the teacher: 0.98 to 1 along a cosine; the paper's starts higher, as its runs are longer."""
        return 1 - 0.02 * (1 + math.cos(math.pi * min(1, step / self.steps))) / 2

    def restore(self, folder: Path) -> None:
        """Read the backbone into student and teacher; the heads, which are not shipped, begin anew."""
        weights = ViTModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
        for part in ("student", "teacher"):
            self.modules[part].load_state_dict(weights)

    def export(self, folder: Path) -> None:
        """Write the teacher's backbone as a `transformers` folder: tensors in float16, loaded in float32."""
        folder = Path(folder)
        backbone = copy.deepcopy(self.modules["teacher"]).half()
        backbone.save_pretrained(folder)
        backbone.config.dtype = torch.float32  # otherwise `from_pretrained` keeps the float16 of the files
        backbone.config.save_pretrained(folder)
        size = dict.fromkeys(("height", "width"), backbone.config.image_size)
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)

    @property
    def _device(self) -> torch.device:
        return self.modules["student_head"].prototypes.device

    def _features(self, network: str, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, width) class tokens; position embeddings are interpolated to the size of the views."""
        return self.modules[network](pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
