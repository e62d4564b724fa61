"""DINO for the miniature world: a small ViT that distils itself, without labels (Caron et al. 2021).

A student sees every view of a picture, a teacher only the two large ones, and the student is to say what the teacher
says about another view. The teacher is the slow average of the student. What keeps both from saying the same about
everything is taken from DINOv2 (Oquab et al. 2023): *Sinkhorn-Knopp* hands out the prototypes evenly, and *KoLeo*
pushes the features of a batch apart. After 100 steps the 20 nearest neighbours tell the kind of a thing in 32 % of
pictures, with DINO's own centring in 21 %.
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

from dalleflamingo.miniature.training.dino_views import anchors, views
from dalleflamingo.miniature.world import draw, sample_scene

DrawBatch = Callable[[np.random.Generator, int], np.ndarray]

VIT = {
    "image_size": 64,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "initializer_range": 0.08,
}  # ≈ 1/√width
SPREAD_WEIGHT = 0.1  # of KoLeo, as in DINOv2


def draw_mostly_one(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64, 64, 3) uint8 pictures; nine of ten hold one thing, so that what their views share is its kind."""
    return np.stack([draw(sample_scene(rng, count=1 if rng.random() < 0.9 else None)) for _ in range(n)])


class Head(nn.Module):
    """Projection head: MLP, l2 normalisation, then cosines to prototypes (§3.1, "network architecture").

    The prototypes are used at norm 1, which is weight normalisation with its gain fixed.
    """

    def __init__(self, width: int, hidden: int = 256, bottleneck: int = 64, prototypes: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, features: Tensor, move_prototypes: bool = True) -> Tensor:
        """(N, width) -> (N, prototypes) cosines in [-1, 1]."""
        prototypes = self.prototypes if move_prototypes else self.prototypes.detach()
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(prototypes, dim=-1))


def distillation(student: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy H(teacher, student) over all pairs of a teacher view and another student view (§3.1, eq. 3).

    Args:
        student: (V, B, P) outputs, the teacher's views first; targets: (G, B, P) probabilities, G ≤ V.
    Returns:
        scalar in nats; ln P for a student that says nothing.
    """
    log_student = (student / temperature).log_softmax(-1)
    pairs = -torch.einsum("gbp,vbp->gv", targets, log_student) / student.shape[1]
    others = 1 - torch.eye(*pairs.shape, device=pairs.device)  # a view does not teach itself
    return (pairs * others).sum() / others.sum()


@torch.no_grad()
def sinkhorn(teacher: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """The teacher's outputs as probabilities that use all prototypes alike (Caron et al. 2020, §3.1).

    Args:
        teacher: (N, P) outputs of a whole batch.
    Returns:
        (N, P), rows sum to 1, columns to N / P (nearly, after a few rounds).
    """
    shares = (teacher / temperature).double()
    shares = (shares - shares.max()).exp()
    for _ in range(rounds):
        shares /= shares.sum(0, keepdim=True)
        shares /= shares.sum(1, keepdim=True)
    return shares.float()


def koleo(features: Tensor) -> Tensor:
    """− mean ln distance to the nearest other row, after l2 normalisation (Sablayrolles et al. 2019).

    Args:
        features: (B, D), B ≥ 2.
    """
    unit = F.normalize(features, dim=-1)
    alike = (unit @ unit.T).detach().fill_diagonal_(-2)
    return -((unit - unit[alike.argmax(1)]).norm(dim=-1) + 1e-6).log().mean()


def entropy(probabilities: Tensor) -> Tensor:
    """(..., P) probabilities -> (...) entropy in nats, between 0 and ln P."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


class DinoRecipe:
    """How the miniature's DINO is trained; `train.py` runs it.

    Args:
        draw_batch: (rng, n) -> uint8 (n, 64, 64, 3) pictures; many of one thing only are best.
        steps: length of the run, which the schedule of the momentum needs.
        vit: sizes of the ViT; prototypes: outputs of the heads.
    """

    name = "dino"
    batch_size = 32  # on a CPU, more steps teach more than larger ones
    learning_rate = 1e-3
    weight_decay = 0.04
    average = 0.0  # the teacher is the average already
    warmup = 60  # steps
    teacher_temperature = 0.04
    global_views, local_views = 2, 4
    global_scale, local_scale = (0.4, 0.9), (0.15, 0.4)  # shares of the picture's area
    global_pixels, local_pixels = 48, 32  # cut from 64: so things are seen at the size at which they are drawn

    def __init__(
        self,
        draw_batch: DrawBatch = draw_mostly_one,
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
        self.compilable: list[nn.Module] = []  # views come in two sizes, each would be compiled anew

    def parameters(self) -> Iterator[nn.Parameter]:
        """The student's parameters; the teacher's only follow.

        The prototypes come last: they start to move last, and a checkpoint counts moments in the order of their birth.
        """
        head = self.modules["student_head"]
        yield from self.modules["student"].parameters()
        yield from head.mlp.parameters()
        yield head.prototypes

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Views of `batch_size` fresh pictures: global (2·B, 3, 48, 48) and local (4·B, 3, 32, 32), in [-1, 1]."""
        pictures = torch.from_numpy(self.draw_batch(rng, self.batch_size)).permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        anchor = anchors(pictures, generator)
        return {
            "global": views(pictures, self.global_views, self.global_pixels, self.global_scale, anchor, generator),
            "local": views(pictures, self.local_views, self.local_pixels, self.local_scale, anchor, generator),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Distillation and spread, and two entropies in nats that tell a collapse apart from learning.

        `entropy_of_mean` falls to 0 when one prototype takes everything; `mean_entropy` stays at ln P when the teacher
        decides nothing. Healthy is: the first high, the second well below it.
        """
        large, small = (batch[part].to(self._device) for part in ("global", "local"))
        with torch.no_grad():
            teacher = self.modules["teacher_head"](self._features("teacher", large))
            targets = sinkhorn(teacher, self.teacher_temperature).unflatten(0, (self.global_views, -1))
        seen, parts = self._features("student", large), self._features("student", small)
        move = step >= self.warmup  # the paper holds the last layer at first, else early noise is learned by heart
        student = self.modules["student_head"](torch.cat([seen, parts]), move)
        student = student.unflatten(0, (self.global_views + self.local_views, -1))
        spread = torch.stack([koleo(view) for view in seen.chunk(self.global_views)]).mean()
        return {
            "loss": distillation(student, targets) + SPREAD_WEIGHT * spread,
            "koleo": spread.detach(),
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
        """Of the teacher: cosine from 0.98 to 1, faster than the paper's because the run is shorter."""
        return 1 - 0.02 * (1 + math.cos(math.pi * min(1, step / self.steps))) / 2

    def restore(self, folder: Path) -> None:
        """Student and teacher take the shipped backbone; the heads, which are not shipped, begin anew."""
        weights = ViTModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
        for part in ("student", "teacher"):
            self.modules[part].load_state_dict(weights)

    def export(self, folder: Path) -> None:
        """Writes the teacher's backbone as a `transformers` folder: tensors in float16, to be loaded in float32."""
        folder = Path(folder)
        backbone = copy.deepcopy(self.modules["teacher"]).half()
        backbone.save_pretrained(folder)
        backbone.config.dtype = torch.float32  # else `from_pretrained` would compute in the files' float16
        backbone.config.save_pretrained(folder)
        size = dict.fromkeys(("height", "width"), backbone.config.image_size)
        ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)

    @property
    def _device(self) -> torch.device:
        return self.modules["student_head"].prototypes.device

    def _features(self, who: str, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, width) class tokens; positions are interpolated to the size of the views."""
        return self.modules[who](pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
