"""Random views of pictures for self-distillation (DINO, Caron et al. 2021, §3 and appendix "data augmentation").

Everything works on whole batches of tensors, because one CPU core has to draw, augment and train: one `grid_sample`
cuts and mirrors, one 3 × 3 matrix per picture does all of the colour jitter, one small convolution blurs.

A thing fills a tenth of its picture, so a blind crop often shows nothing but ground, and the easiest agreement between
two views would be the ground. So the crops of one picture share an *anchor*, a pixel that stands out from the border,
and every crop holds it. No label is used for that.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])
# RGB -> YIQ: turning the I-Q plane turns the hue and leaves the brightness, so jitter stays a matrix product
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
RGB = torch.linalg.inv(YIQ)
MARGIN = 0.7  # the anchor lies within this share of a crop's half-size, so that the thing is more than a rim


def between(low: float, high: float, n: int, generator: Generator) -> Tensor:
    """(n,) uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator)


def chance(p: float, n: int, generator: Generator) -> Tensor:
    """(n,) booleans, each true with probability p."""
    return torch.rand(n, generator=generator) < p


def anchors(pictures: Tensor, generator: Generator) -> Tensor:
    """One pixel of each picture that stands out from its border.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
    Returns:
        (B, 2) x and y in (-1, 1), as `grid_sample` counts them; drawn with probability ∝ squared distance from the
        median colour of the border (anywhere at all where the picture is of one colour).
    """
    height, width = pictures.shape[-2:]
    rows, columns = pictures[..., [0, -1], :].flatten(2), pictures[..., [0, -1]].flatten(2)
    ground = torch.cat([rows, columns], dim=-1).median(dim=-1).values  # (B, 3)
    salience = (pictures - ground[..., None, None]).square().sum(1).flatten(1) + 1e-6  # (B, H·W)
    pixel = torch.multinomial(salience, 1, generator=generator).squeeze(1)
    return torch.stack([(pixel % width + 0.5) / width, (pixel // width + 0.5) / height], dim=1) * 2 - 1


def crop(pictures: Tensor, anchor: Tensor, size: int, scale: tuple[float, float], generator: Generator) -> Tensor:
    """Random resized crop that holds the anchor, mirrored half of the time.

    Args:
        pictures: (B, 3, H, W); anchor: (B, 2) in (-1, 1); size: pixels a side of the result; scale: range of the share
        of the picture's area that is cut; its aspect ratio is 3:4 to 4:3.
    Returns:
        (B, 3, size, size)
    """
    n = len(pictures)
    area, ratio = between(*scale, n, generator), between(-1, 1, n, generator).mul(0.2877).exp()  # ln(4/3) = 0.2877
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)  # (B, 2)
    low = torch.clamp(anchor - MARGIN * half, half - 1, 1 - half)  # bounds for the centre of the crop
    high = torch.clamp(anchor + MARGIN * half, half - 1, 1 - half)
    centre = low + (high - low) * torch.rand(n, 2, generator=generator)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = half[:, 0] * torch.where(chance(0.5, n, generator), -1.0, 1.0)
    theta[:, 1, 1] = half[:, 1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def hue_rotation(angle: Tensor) -> Tensor:
    """(B,) angles in radians -> (B, 3, 3) matrices that turn the hue of RGB column vectors and keep their luma."""
    turn = torch.zeros(len(angle), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -angle.sin()
    return RGB @ turn @ YIQ


def jitter(pictures: Tensor, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of (B, 3, H, W) pictures in [0, 1]; a fifth of them becomes grey.

    The hue turns freely in most views, or the colour of the ground would be the quickest thing to agree on; a tenth of
    the views keeps its colours, because colour must not be lost altogether.
    """
    n = len(pictures)
    hue = between(-torch.pi, torch.pi, n, generator) * chance(0.8, n, generator)
    saturation = between(0.5, 1.4, n, generator) * ~chance(0.2, n, generator)
    gain, contrast = between(0.7, 1.3, n, generator), between(0.6, 1.3, n, generator)
    keep = chance(0.1, n, generator)
    grey = LUMA.expand(3, 3)
    matrix = (saturation[:, None, None] * torch.eye(3) + (1 - saturation[:, None, None]) * grey) @ hue_rotation(hue)
    mean = pictures.mean(dim=(2, 3), keepdim=True)  # contrast spreads colours about the mean, which gain then lifts
    spread = torch.einsum("bij,bjhw->bihw", matrix * contrast[:, None, None], pictures - mean)
    shifted = spread + torch.einsum("bij,bjhw->bihw", matrix, mean)
    changed = (shifted * gain[:, None, None, None]).clamp(0, 1)
    return torch.where(keep[:, None, None, None], pictures, changed)


def blur(pictures: Tensor, probability: float, generator: Generator) -> Tensor:
    """(B, 3, H, W) pictures, some mixed with their binomial 3 × 3 blur by a random share."""
    n = len(pictures)
    share = between(0, 1, n, generator) * chance(probability, n, generator)
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return torch.lerp(pictures, soft, share[:, None, None, None])


def views(
    pictures: Tensor, count: int, size: int, scale: tuple[float, float], anchor: Tensor, generator: Generator
) -> Tensor:
    """`count` random views of each picture, normalised as the exported image processor does (mean and std 0.5).

    Args:
        pictures: (B, 3, H, W) in [0, 1]; anchor: (B, 2) from `anchors`.
    Returns:
        (count · B, 3, size, size) in [-1, 1]; row v · B + b is view v of picture b.
    """
    cut = crop(pictures.repeat(count, 1, 1, 1), anchor.repeat(count, 1), size, scale, generator)
    return blur(jitter(cut, generator), 0.3, generator).mul(2).sub(1)
