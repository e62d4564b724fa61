"""DINO for the miniature world: a small ViT that distils itself, without labels (Caron et al. 2021).

A student sees every view of a picture, a teacher only the two large ones, and the student is to say what the teacher
says about another view. The teacher is the slow average of the student. Two forces keep both from saying the same about
everything: *centring* takes away what the teacher says on average, *sharpening* (its low temperature) keeps it decided.
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

from .dino_views import anchors, views
from .world import draw, sample_scene

DrawBatch = Callable[[np.random.Generator, int], np.ndarray]

VIT = {"image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
       "intermediate_size": 512}


def draw_mostly_one(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 64, 64, 3) uint8 pictures; nine of ten hold one thing, so that what their views share is its kind."""
    return np.stack([draw(sample_scene(rng, count=1 if rng.random() < 0.9 else None)) for _ in range(n)])


class Head(nn.Module):
    """Projection head: MLP, l2 normalisation, then cosines to prototypes (§3.1, "network architecture").

    The prototypes are used at norm 1, which is weight normalisation with its gain fixed.
    """

    def __init__(self, width: int, hidden: int = 256, bottleneck: int = 64, prototypes: int = 1024):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, features: Tensor, move_prototypes: bool = True) -> Tensor:
        """(N, width) -> (N, prototypes) cosines in [-1, 1]."""
        prototypes = self.prototypes if move_prototypes else self.prototypes.detach()
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(prototypes, dim=-1))


class Distillation(nn.Module):
    """The loss H(teacher, student) and the centre that it takes from the teacher (§3.1, eq. 1–4).

    Args:
        prototypes: number of outputs; student_temperature and centre_momentum as in the paper.
    """

    def __init__(self, prototypes: int, student_temperature: float = 0.1, centre_momentum: float = 0.9):
        super().__init__()
        self.student_temperature, self.centre_momentum = student_temperature, centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    def targets(self, teacher: Tensor, temperature: float) -> Tensor:
        """(..., P) teacher outputs -> (..., P) probabilities, centred and sharpened; no gradient passes."""
        return ((teacher.detach() - self.centre) / temperature).softmax(-1)

    def forward(self, student: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over all pairs of a teacher view and another student view.

        Args:
            student: (V, B, P) outputs, the teacher's views first; targets: (G, B, P) probabilities, G ≤ V.
        Returns:
            scalar in nats; ln P for a student that says nothing.
        """
        log_student = (student / self.student_temperature).log_softmax(-1)
        pairs = -torch.einsum("gbp,vbp->gv", targets, log_student) / student.shape[1]
        others = 1 - torch.eye(*pairs.shape, device=pairs.device)  # a view does not teach itself
        return (pairs * others).sum() / others.sum()

    @torch.no_grad()
    def update_centre(self, teacher_mean: Tensor) -> None:
        """Moves the centre towards the (P,) mean teacher output of a batch (eq. 4)."""
        self.centre.lerp_(teacher_mean, 1 - self.centre_momentum)


def entropy(probabilities: Tensor) -> Tensor:
    """(..., P) probabilities -> (...) entropy in nats, between 0 and ln P."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)


class DinoRecipe:
    """How the miniature's DINO is trained; `train.py` runs it.

    Args:
        draw_batch: (rng, n) -> uint8 (n, 64, 64, 3) pictures; many of one thing only are best.
        steps: length of the run, which the schedules of momentum and temperature need.
        vit: sizes of the ViT; prototypes: outputs of the heads.
    """

    name = "dino"
    batch_size = 32  # on a CPU, more steps teach more than larger ones
    learning_rate = 1e-3
    weight_decay = 0.04
    average = 0.0  # the teacher is the average already
    warmup = 60  # steps
    global_views, local_views = 2, 4
    global_scale, local_scale = (0.4, 0.9), (0.15, 0.4)  # shares of the picture's area
    global_pixels, local_pixels = 48, 32  # cut from 64: so things are seen at the size at which they are drawn

    def __init__(
        self,
        draw_batch: DrawBatch = draw_mostly_one,
        steps: int = 1500,
        vit: dict | None = None,
        prototypes: int = 1024,
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
            "distillation": Distillation(prototypes),
        }
        self.compilable: list[nn.Module] = []  # views come in two sizes, each would be compiled anew
        self._teacher_mean: Tensor | None = None

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
        """Distillation loss, and two entropies in nats that tell a collapse apart from learning.

        `entropy_of_mean` falls to 0 when one prototype takes everything; `mean_entropy` stays at ln P when the teacher
        decides nothing. Healthy is: the first high, the second well below it.
        """
        large, small = (batch[part].to(self._device) for part in ("global", "local"))
        distillation = self.modules["distillation"]
        with torch.no_grad():
            teacher = self._outputs("teacher", large)
            targets = distillation.targets(teacher, self.teacher_temperature(step))
            targets = targets.unflatten(0, (self.global_views, -1))
            self._teacher_mean = teacher.mean(0)
        move = step >= self.warmup  # the paper holds the last layer at first, else early noise is learned by heart
        student = torch.cat([self._outputs("student", large, move), self._outputs("student", small, move)])
        return {
            "loss": distillation(student.unflatten(0, (self.global_views + self.local_views, -1)), targets),
            "entropy_of_mean": entropy(targets.mean((0, 1))),
            "mean_entropy": entropy(targets).mean(),
        }

    def after_step(self, step: int) -> None:
        """Teacher ← m · teacher + (1 − m) · student, and the centre follows the last batch."""
        self.modules["distillation"].update_centre(self._teacher_mean)
        momentum = self.momentum(step)
        with torch.no_grad():
            for part in ("", "_head"):
                teacher, student = self.modules["teacher" + part], self.modules["student" + part]
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

    def momentum(self, step: int) -> float:
        """Of the teacher: cosine from 0.99 to 1."""
        return 1 - 0.01 * (1 + math.cos(math.pi * min(1, step / self.steps))) / 2

    def teacher_temperature(self, step: int) -> float:
        """Linear from 0.04 to 0.07 over the first third of the run."""
        return 0.04 + 0.03 * min(1, 3 * step / self.steps)

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
        return self.modules["distillation"].centre.device

    def _outputs(self, who: str, pixels: Tensor, move_prototypes: bool = True) -> Tensor:
        """(N, 3, S, S) -> (N, P): the head over the class token; positions are interpolated to the size of views."""
        features = self.modules[who](pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return self.modules[who + "_head"](features, move_prototypes)
