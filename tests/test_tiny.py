"""The tests' own models: the same to the bit each time, so that what fails here fails everywhere."""

from pathlib import Path

import pytest
import tiny
import tiny_adapters

MAKERS = [
    *(tiny.blip, tiny.blip2, tiny.stable_diffusion, tiny.dino, tiny.clip),
    *(tiny_adapters.vit_gpt2, tiny_adapters.git, tiny_adapters.llava),
    *(tiny_adapters.sdxl, tiny_adapters.latent_consistency),
]
KEPT = "*.safetensors", "tokenizer*", "vocab*", "merges*"  # not the configurations, which list defaults in any order


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_model_made_twice_is_the_same(make, tmp_path):
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        make(folder)
        contents.append(content(folder))
    assert contents[0] == contents[1]
    assert any(name.endswith(".safetensors") for name in contents[0])


def content(folder: Path) -> dict[str, bytes]:
    """Weights and tokenizers: path -> bytes."""
    files = (file for pattern in KEPT for file in folder.rglob(pattern) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
