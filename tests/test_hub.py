"""What comes from the hub: the files that a profile needs and no others; and what is said where it is down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FAULTS

from dalleflamingo.registry import ENTRIES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> dict:
    """What fake_hub.py prints."""
    line = [sys.executable, ROOT / "tests/fake_hub.py", tmp_path_factory.mktemp("hub")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_of_stable_diffusion_the_float16_files_are_fetched_and_no_safety_checker(session):
    files = {
        line.split("/resolve/")[1]
        for line in session["asked"]
        if line.startswith("GET /CompVis") and "/resolve/" in line
    }
    weights = {"/".join(file.split("/")[1:]) for file in files if file.endswith(".safetensors")}
    assert weights == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert [line.split()[0] for line in session["downloaded"]] == ["torch.float16", "torch.float16", "torch.float32"]


@pytest.mark.parametrize("fault", FAULTS)
def test_cached_models_are_loaded_at_once_where_the_hub_is_down(session, fault):
    loaded, seconds, asked = session["cached"][fault]
    assert loaded == session["downloaded"]
    assert seconds < 15 and set(asked) <= {"HEAD /"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["blip2-opt-2.7b-coco", "sd-v1-4", "clip-vit-l-14", "sbert"])
def test_a_model_that_is_not_cached_is_named_within_ten_seconds_where_the_hub_is_down(session, name, fault):
    message, seconds = session["absent"][f"{name}, the hub {fault}"]
    entry = ENTRIES[name]
    assert message.startswith(f"{entry.source} ({entry.size_mb:,} MB) is not on this machine, and cannot be downloaded")
    assert " does not answer; connect to the network once, or copy " in message and len(message.splitlines()) == 1
    assert seconds < 10
