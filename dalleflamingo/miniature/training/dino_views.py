"""Random views of images for self-distillation (DINO, Caron et al. 2021, §3 and appendix "data augmentation").

Everything works on whole batches of tensors, because one CPU core has to draw, augment and train: one `grid_sample`
crops, one 3 × 3 matrix per image does all of the colour jitter, one small convolution blurs.

Global views are the whole image, moved by up to a seventh of its side: what two of them have in common is content and
arrangement, not position. A thing fills a tenth of its image, so a random local crop often shows only ground, and views
would agree most easily on the ground. Every local crop therefore contains an *anchor*, a pixel that differs from the
border. No label is used for that. Nothing is mirrored, so that left and right stay different.

Hues change little in global views, which the teacher sees, so that features contain colour. Where that was so in local
views too, colour alone told images apart, and kinds were not learned: after 2,500 steps the 20 nearest neighbours gave
the right kind for 15 % of the images, the right colour for 98 %. So most local views are in random hues: what they show
of the image has to be told from shapes.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LUMA = torch.tensor([0.299, 0.587, 0.114])
# RGB -> YIQ: a rotation of the I-Q plane changes the hue and keeps the brightness, so jitter is a matrix product
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
RGB = torch.linalg.inv(YIQ)
RECOLOURED_SHARE = 0.6  # of local views are in random hues
MARGIN = 0.7  # the anchor lies within this share of a crop's half-size, so that the thing is not only at the edge


def uniform(low: float, high: float, n: int, generator: Generator) -> Tensor:
    """(n,) uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator)


def bernoulli(p: float, n: int, generator: Generator) -> Tensor:
    """(n,) booleans, each true with probability p."""
    return torch.rand(n, generator=generator) < p


def anchors(images: Tensor, generator: Generator) -> Tensor:
    """A random pixel of each image, with probability ∝ squared distance from the median colour of the border.

    Args:
        images: (B, 3, H, W) in [0, 1].
        generator: source of all choices.
    Returns:
        (B, 2) x and y in (-1, 1), in the coordinates of `grid_sample`.
    """
    height, width = images.shape[-2:]
    rows, columns = images[..., [0, -1], :].flatten(2), images[..., [0, -1]].flatten(2)
    ground = torch.cat([rows, columns], dim=-1).median(dim=-1).values  # (B, 3)
    salience = (images - ground[..., None, None]).square().sum(1).flatten(1) + 1e-6  # (B, H·W)
    pixel = torch.multinomial(salience, 1, generator=generator).squeeze(1)
    return torch.stack([(pixel % width + 0.5) / width, (pixel // width + 0.5) / height], dim=1) * 2 - 1


def shifted(images: Tensor, generator: Generator) -> Tensor:
    """(B, 3, H, W) images, each moved by up to a seventh of its side and scaled by up to a seventh."""
    n = len(images)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.87, 1.15, n, generator)
    theta[:, :, 2] = 0.6 * torch.rand(n, 2, generator=generator) - 0.3  # in half sides
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def crop(images: Tensor, anchor: Tensor, size: int, scale: tuple[float, float], generator: Generator) -> Tensor:
    """Random resized crop that contains the anchor, of aspect ratio 3:4 to 4:3.

    Args:
        images: (B, 3, H, W).
        anchor: (B, 2) in (-1, 1), from `anchors`.
        size: pixels a side of the result.
        scale: range of the crop's share of the image's area.
        generator: source of all choices.
    Returns:
        (B, 3, size, size)
    """
    n = len(images)
    area, ratio = uniform(*scale, n, generator), uniform(-1, 1, n, generator).mul(0.2877).exp()  # ln(4/3) = 0.2877
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)  # (B, 2)
    low = torch.clamp(anchor - MARGIN * half, half - 1, 1 - half)  # bounds for the centre of the crop
    high = torch.clamp(anchor + MARGIN * half, half - 1, 1 - half)
    centre = low + (high - low) * torch.rand(n, 2, generator=generator)
    theta = torch.cat([torch.diag_embed(half), centre.unsqueeze(2)], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def hue_rotation(angle: Tensor) -> Tensor:
    """(B,) angles in radians -> (B, 3, 3) matrices that rotate the hue of RGB column vectors and keep their luma."""
    rotation = torch.zeros(len(angle), 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 2, 1] = angle.sin()
    rotation[:, 1, 2] = -angle.sin()
    return RGB @ rotation @ YIQ


def jitter(images: Tensor, generator: Generator, recoloured_share: float = 0.0) -> Tensor:
    """(B, 3, H, W) images in [0, 1] with a little random brightness, contrast, saturation and hue.

    Args:
        images: to be changed.
        generator: source of all choices.
        recoloured_share: of the images get any hue instead.
    """
    n = len(images)
    hue = uniform(-0.15, 0.15, n, generator)  # radians; neighbours among the world's colours are 0.5 and more apart
    anything, is_recoloured = uniform(-torch.pi, torch.pi, n, generator), bernoulli(recoloured_share, n, generator)
    hue = torch.where(is_recoloured, anything, hue)
    saturation = uniform(0.7, 1.3, n, generator)
    gain, contrast = uniform(0.85, 1.15, n, generator), uniform(0.8, 1.2, n, generator)
    grey = LUMA.expand(3, 3)
    matrix = (saturation[:, None, None] * torch.eye(3) + (1 - saturation[:, None, None]) * grey) @ hue_rotation(hue)
    mean = images.mean(dim=(2, 3), keepdim=True)  # contrast scales differences from the mean, gain scales all
    spread = torch.einsum("bij,bjhw->bihw", matrix * contrast[:, None, None], images - mean)
    shifted_mean = torch.einsum("bij,bjhw->bihw", matrix, mean)
    return ((spread + shifted_mean) * gain[:, None, None, None]).clamp(0, 1)


def blur(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """(B, 3, H, W) images; with this probability an image is mixed with its binomial 3 × 3 blur by a random share."""
    n = len(images)
    share = uniform(0, 1, n, generator) * bernoulli(probability, n, generator)
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(taps, taps).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return torch.lerp(images, soft, share[:, None, None, None])


def global_views(images: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` random views of each image as a whole, normalised as by the exported image processor (mean and std 0.5).

    Args:
        images: (B, 3, H, W) in [0, 1].
        count: views of each image.
        generator: source of all choices.
    Returns:
        (count · B, 3, H, W) in [-1, 1]; row v · B + b is view v of image b.
    """
    moved = shifted(images.repeat(count, 1, 1, 1), generator)
    return blur(jitter(moved, generator), 0.3, generator).mul(2).sub(1)


def local_views(images: Tensor, count: int, size: int, scale: tuple[float, float], generator: Generator) -> Tensor:
    """`count` random crops of each image, each around an anchor of its own, normalised likewise.

    Args:
        images: (B, 3, H, W) in [0, 1].
        count: views of each image.
        size: pixels a side of the views.
        scale: range of a view's share of the image's area.
        generator: source of all choices.
    Returns:
        (count · B, 3, size, size) in [-1, 1]; row v · B + b is view v of image b.
    """
    repeated = images.repeat(count, 1, 1, 1)
    cut = crop(repeated, anchors(repeated, generator), size, scale, generator)
    return blur(jitter(cut, generator, RECOLOURED_SHARE), 0.3, generator).mul(2).sub(1)
