"""How a pipeline denoises: with which scheduler, in how many steps, and what it computes only once.

`fast_unet` and `side_by_side` change no image beyond the last digits. `load_scheduler` turns clipping off, and
`spread_steps` drops an offset that leads beyond the last timestep.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL.Image import Image

# Schedulers of diffusers whose images match their captions as DDIM's do, and the fewest steps from which they did with
# a weaker generator; today's needs as few or fewer (benchmarks/schedulers.py, docs/results/schedulers.md)
SCHEDULERS = {
    "DDPM": 20,
    "DDIM": 20,
    "PNDM": 20,
    "Euler": 15,
    "EulerAncestral": 10,
    "DPMSolverMultistep": 10,
    "UniPCMultistep": 10,
}
_NO_TIMESTEP_TWICE = ("DPMSolverMultistep", "UniPCMultistep")


def load_scheduler(name: str, shipped: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of that name, with the model's noise schedule and settings; latents are never clipped."""
    kinds = {short_name(kind): kind for kind in shipped.compatibles}
    wanted = name.removesuffix("Scheduler").removesuffix("Discrete")
    if wanted not in (offered := [kind for kind in SCHEDULERS if kind in kinds]):
        remedy = f"choose {', '.join(offered) or 'another model'}"
        raise ValueError(f"the scheduler {name!r} is not offered for a model with {type(shipped).__name__}: {remedy}")
    # latents exceed [-1, 1], to which both would limit them: they are for models of pixels, but DDPM's default
    return kinds[wanted].from_config({**shipped.config, "clip_sample": False, "thresholding": False})


def spread_steps(scheduler: SchedulerMixin, steps: int) -> SchedulerMixin:
    """The scheduler, without its offset where that leads beyond the last timestep: SD v1-4's settings, 1,000 steps.

    Raises:
        ValueError: there are fewer timesteps; leading ones would begin in the middle of the noise, as 600 of 1,000 do
            at 600; or a solver of higher order would repeat timesteps, between which it divides by 0.
    """
    config, name = scheduler.config, short_name(type(scheduler))
    total, leading = config.num_train_timesteps, config.get("timestep_spacing") == "leading"
    if steps > total:
        raise ValueError(f"steps = {steps}: the model has {total} timesteps: take {total} or fewer")
    spacing = total // max(steps, 1)
    if (leading and steps * spacing < 0.9 * total) or (steps >= total and name in _NO_TIMESTEP_TWICE):
        remedy = f"take {total // (spacing + 1)} or fewer" + f", or all {total}" * (name not in _NO_TIMESTEP_TWICE)
        raise ValueError(f"steps = {steps}: {name} cannot spread them over {total} timesteps: {remedy}")
    if leading and (steps - 1) * spacing + config.get("steps_offset", 0) >= total:
        scheduler = deepcopy(scheduler)
        scheduler.register_to_config(steps_offset=0)
    return scheduler


def short_name(kind: type[SchedulerMixin]) -> str:
    """The name of a kind of scheduler without "DiscreteScheduler"."""
    return kind.__name__.removesuffix("Scheduler").removesuffix("Discrete")


class TextAttention(AttnProcessor2_0):
    """Attention whose keys and values of the text are computed once for all steps of a pipeline's call.

    They are kept in the dictionary `keys_values` that the call is given by `cross_attention_kwargs`, and end with it.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, keys_values=None
    ):
        if encoder_hidden_states is None or keys_values is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attn not in keys_values:
            keys_values[attn] = [attn.head_to_batch_dim(to(encoder_hidden_states), 4) for to in (attn.to_k, attn.to_v)]
        attended = F.scaled_dot_product_attention(
            attn.head_to_batch_dim(attn.to_q(hidden_states), 4), *keys_values[attn], attn_mask=attention_mask
        )  # (B, heads, h w, D / heads)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


@contextmanager
def fast_unet(unet: UNet2DConditionModel) -> Iterator[bool]:
    """The U-Net with `TextAttention` and channels last in memory; afterwards it is as before.

    Results are those of the stock U-Net, up to the last digits.

    Args:
        unet: of a pipeline that is about to sample.
    Yields:
        whether the layers take `keys_values`: not where someone has set attention processors of their own.
    """
    processors = unet.attn_processors
    if caches_text := all(type(processor) is AttnProcessor2_0 for processor in processors.values()):
        unet.set_attn_processor(TextAttention())
    unet.to(memory_format=torch.channels_last)
    try:
        yield caches_text
    finally:
        unet.to(memory_format=torch.contiguous_format)
        unet.set_attn_processor(processors)


def side_by_side(generate: Callable[[list], list[Image]], device: torch.device, batch: list) -> list[Image]:
    """The images of a batch, on a CPU in as many parts as torch has threads, each by a thread of its own.

    So no thread waits for another one after every operation.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = -(-len(batch) // threads)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    if len(parts) == 1:
        return generate(batch)

    def work(part: list) -> list[Image]:
        torch.set_num_threads(threads // len(parts))
        return generate(part)

    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(chain.from_iterable(pool.map(work, parts)))
    finally:
        torch.set_num_threads(threads)
