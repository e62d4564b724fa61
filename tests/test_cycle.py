"""The loop: what it changes, that a kill costs nothing, that parts and processes compute what the whole does."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BlipForConditionalGeneration, BlipProcessor

from dalleflamingo import cycle, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig, Pairs
from dalleflamingo.cycle_losses import NAMES, Losses
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.evaluation.cycle_validation import Validation
from dalleflamingo.generator import Generator

HERE = Path(__file__).parent
TEXTS = ["a red bird on the boat", "two blue cats", "a tree and a house", "the green kite flies", "a small cat sits"]
SMALL = CycleConfig(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)


@pytest.fixture(autouse=True)
def accelerate_forgets():
    """A process has one precision; here several have their turn."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def dataset(folder: Path, n: int = 6) -> Dataset:
    folder.mkdir(exist_ok=True)
    examples = []
    for i, picture in enumerate(tiny.pictures(n)):
        picture.save(folder / f"{i}.png")
        examples.append(Example(i, folder / f"{i}.png", (TEXTS[i % 5], TEXTS[(i + 2) % 5])))
    return Dataset("tiny", examples)


def models(folder: Path) -> tuple[Captioner, Generator]:
    for name, make in (("blip", tiny.blip), ("sd", tiny.stable_diffusion)):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            make(folder / name)
    return Captioner.from_pretrained(str(folder / "blip")), Generator.from_pretrained(str(folder / "sd"))


def run(config: CycleConfig, folder: Path, run_folder: Path, accelerator: Accelerator | None = None) -> cycle.Cycle:
    """Train tiny models of `folder`; returns what came out."""
    made, pairs, learner = cycle.assemble(config, *models(folder), dataset(folder / "pictures"))
    cycle.train(config, made, pairs, learner, run_folder, accelerator or Accelerator(cpu=True))
    return made


def weights(made: cycle.Cycle) -> dict[str, torch.Tensor]:
    pipeline = made.generator.pipeline
    parts = {"blip": made.captioner.model, "unet": pipeline.unet, "vae": pipeline.vae, "text": pipeline.text_encoder}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of the models, the run of six steps that nothing disturbed, its run folder)."""
    folder = tmp_path_factory.mktemp("cycle")
    return folder, run(SMALL, folder, folder / "run"), folder / "run"


def test_nothing_but_the_named_parameters_changes(whole):
    folder, made, run_folder = whole
    captioner, generator = models(folder)
    before = weights(cycle.assemble(SMALL, captioner, generator, dataset(folder / "pictures"))[0])
    changed = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    learns = {name for name in before if "crossattention.self.query." in name or "attn2.to_q." in name}
    assert changed == learns and len(learns) == 2 * 2 + 4
    rows = cycle.read_log(run_folder)
    assert [row["step"] for row in rows] == list(range(6))
    assert list(rows[0])[1:] == list(NAMES[:2]) and list(rows[1])[1:] == list(NAMES[2:])


def test_a_run_that_is_killed_ends_with_the_same_bits(whole, tmp_path):
    folder, made, _ = whole
    script = "import sys, test_cycle; test_cycle.run_in_a_process(*sys.argv[1:])"
    command = [sys.executable, "-c", script, folder, tmp_path / "run", str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    killed = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "run/log.jsonl"
        while process.poll() is None and not (log.exists() and f'"step": {wanted}' in log.read_text()):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -9
    assert killed >= 2
    again = weights(run(SMALL, folder, tmp_path / "run"))
    assert all(torch.equal(value, again[name]) for name, value in weights(made).items())
    done = load_file(tmp_path / "run/state.safetensors")
    other = load_file(whole[2] / "state.safetensors")
    assert done.keys() == other.keys() and all(torch.equal(done[name], other[name]) for name in done)


@pytest.mark.parametrize("latest", [1.0, 0.3], ids=["every timestep", "the earliest"])
def test_two_processes_learn_what_one_does(whole, tmp_path, latest):
    """Also where a process has no picture that is early enough, and another has."""
    folder, _, run_folder = whole
    if latest < 1:
        run_folder = tmp_path / "alone"
        run(dataclasses.replace(SMALL, losses=Losses(latest=latest)), folder, run_folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = "import sys, test_cycle; test_cycle.run_in_a_process(*sys.argv[1:])"
    command = [sys.executable, "-c", script, folder, tmp_path / "run", str(torch.get_num_threads()), str(latest)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"CUDA_VISIBLE_DEVICES": ""}
    shared |= {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    both = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    ours, alone = cycle.read_log(tmp_path / "run"), cycle.read_log(run_folder)
    assert len(ours) == len(alone) == len((tmp_path / "run/log.jsonl").read_text().splitlines())
    for row, expected in zip(ours, alone, strict=True):
        assert row == pytest.approx(expected, rel=2e-3)


def run_in_a_process(folder: str, run_folder: str, threads: str, latest: str = "1.0") -> None:
    torch.set_num_threads(int(threads))  # the same bits want the same threads
    config = dataclasses.replace(SMALL, losses=Losses(latest=float(latest)))
    run(config, Path(folder), Path(run_folder), cycle.tracked("none", Path(run_folder), config))


def test_accumulated_parts_learn_what_the_whole_batch_does(whole, tmp_path):
    folder, made, run_folder = whole
    parts = dataclasses.replace(SMALL, accumulation=2)
    accumulated = weights(run(parts, folder, tmp_path / "run"))
    for ours, theirs in zip(cycle.read_log(tmp_path / "run"), cycle.read_log(run_folder), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    for name, value in weights(made).items():
        torch.testing.assert_close(accumulated[name], value, atol=2e-3, rtol=1e-2)


def test_every_epoch_has_every_picture_once_in_another_order_with_other_captions(tmp_path):
    pairs = Pairs(dataset(tmp_path), None, None, batch_size=3, seed=1)
    epochs = [[pair for step in (2 * e, 2 * e + 1) for pair in pairs.choose(step)] for e in range(3)]
    ids = [[example.image_id for example, _ in epoch] for epoch in epochs]
    assert all(sorted(epoch) == list(range(6)) for epoch in ids) and ids[0] != ids[1]
    told = {(example.image_id, caption) for epoch in epochs for example, caption in epoch}
    assert 6 < len(told) <= 12
    assert [pair[1] for pair in pairs.choose(4)] == [caption for _, caption in epochs[2][:3]]


def test_a_half_that_has_no_loss_has_no_steps():
    labels = dataclasses.replace(SMALL, losses=Losses(generation=0.0, caption_reconstruction=0.0))
    assert [cycle.halves(labels, step) for step in range(3)] == [("image",)] * 3
    joint = dataclasses.replace(labels, schedule="joint", losses=Losses(caption=0.0, image_reconstruction=0.0))
    assert cycle.halves(joint, 0) == ("text",)
    with pytest.raises(ValueError, match="all four losses have the weight 0.*give one a weight"):
        CycleConfig(losses=Losses(*[0.0] * 4))


def test_joint_steps_have_all_four_losses():
    joint = dataclasses.replace(SMALL, schedule="joint")
    assert cycle.halves(joint, 0) == cycle.halves(joint, 1) == ("image", "text")
    assert [cycle.halves(SMALL, step) for step in (0, 1)] == [("image",), ("text",)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    folder = tmp_path / "models"
    made, pairs, learner = cycle.assemble(SMALL, *models(folder), dataset(folder / "pictures"))
    predict, asked = made.generator.predict, []

    def breaks(noised, states):
        asked.append(noised)
        return predict(noised, states) * (float("nan") if len(asked) == 4 else 1)

    made.generator.predict = breaks
    with pytest.raises(FloatingPointError, match=r"generation is nan at step 3, of pictures \["):
        cycle.train(SMALL, made, pairs, learner, tmp_path / "run", Accelerator(cpu=True))
    assert cycle.read_log(tmp_path / "run")[-1]["step"] == 2
    state = load_file(tmp_path / "run/state.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    made, pairs, learner = cycle.assemble(SMALL, *models(folder), dataset(folder / "pictures"))
    cycle.train(SMALL, made, pairs, learner, tmp_path / "run", Accelerator(cpu=True))  # goes on behind step 1
    assert len(cycle.read_log(tmp_path / "run")) == 6


def test_another_configuration_is_refused_by_name(whole):
    folder, _, run_folder = whole
    other = dataclasses.replace(SMALL, losses=Losses(caption=0.5), steps=9)
    with pytest.raises(ValueError, match=r"(?s)another configuration:\n  losses: .*'caption': 1.0.* there, .*0.5"):
        run(other, folder, run_folder)


def test_what_is_exported_opens_in_the_stock_libraries(whole, tmp_path, monkeypatch):
    _, made, run_folder = whole
    shutil.copy(run_folder / "log.jsonl", tmp_path)
    cycle.export(SMALL, made, tmp_path)
    blip = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    BlipProcessor.from_pretrained(tmp_path / "captioner")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "generator", safety_checker=None)
    for ours, theirs in ((made.captioner.model, blip), (made.generator.pipeline.unet, pipeline.unet)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    text = (tmp_path / "generator/README.md").read_text()
    assert "license: mit\n" in text and "caption_reconstruction 1" in text
    losses = [row["generation"] for row in cycle.read_log(tmp_path) if "generation" in row]
    assert f"* generation: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end" in text and "cider" not in text


@pytest.mark.parametrize(("base", "licence"), [("blip2-opt-2.7b", "other"), ("sd-v1-4", "creativeml-openrail-m")])
def test_the_card_of_a_real_model_is_one_that_the_hub_reads(base, licence):
    card = ModelCard(cycle.card(CycleConfig(), base, [{"step": 0, "caption": 1.0}]))
    assert card.data.license == licence and card.data.base_model == registry.ENTRIES[base].source
    assert registry.ENTRIES[base].licence in card.text


def test_pictures_are_kept_up_to_a_limit_of_memory(tmp_path):
    captioner, generator = models(tmp_path)
    shown = dataset(tmp_path / "pictures")
    free = Pairs(shown, captioner, generator, batch_size=4)
    first = free.batch(0)
    each = (first.pixel_values.nbytes + first.latents.nbytes) // 4
    narrow = Pairs(shown, captioner, generator, batch_size=4, memory=2 * each)
    for step in range(3):
        ours, theirs = narrow.batch(step), free.batch(step)
        assert torch.equal(ours.pixel_values, theirs.pixel_values) and torch.equal(ours.latents, theirs.latents)
    assert (len(narrow._kept), len(free._kept)) == (2, 6)


def test_half_precision_computes_and_what_learns_stays_whole(whole, tmp_path):
    folder, made, run_folder = whole
    config = dataclasses.replace(SMALL, precision="bf16", checkpointing=True)
    half, pairs, learner = cycle.assemble(config, *models(folder), dataset(folder / "pictures"))
    cycle.train(config, half, pairs, learner, tmp_path, Accelerator(cpu=True, mixed_precision="bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in learner.parameters())
    first, expected = cycle.read_log(tmp_path)[0], cycle.read_log(run_folder)[0]
    assert first == pytest.approx(expected, rel=0.03) and first != pytest.approx(expected, rel=1e-4)


def test_checkpointing_changes_nothing(whole, tmp_path):
    folder, made, _ = whole
    saved = weights(run(dataclasses.replace(SMALL, checkpointing=True), folder, tmp_path))
    for name, value in weights(made).items():
        torch.testing.assert_close(saved[name], value, atol=1e-4, rtol=1e-3)


def test_validation_is_logged_with_its_step_and_leaves_training_alone(whole, tmp_path):
    folder, made, _ = whole
    config = dataclasses.replace(SMALL, validate_every=3)
    again, pairs, learner = cycle.assemble(config, *models(folder), dataset(folder / "pictures"))
    validation = Validation(again, dataset(folder / "pictures"), tmp_path, steps=2, guidance_scale=3.0, drawn=2)
    cycle.train(config, again, pairs, learner, tmp_path, Accelerator(cpu=True), validation)
    assert ["cider" in row for row in cycle.read_log(tmp_path)] == [False, False, True] * 2
    expected = dict(enumerate(again.captioner.describe(tiny.pictures(6))))
    references = {example.image_id: example.references for example in dataset(folder / "pictures")}
    cider = caption_metrics.cider(references, expected).value
    assert cycle.read_log(tmp_path)[-1]["cider"] == pytest.approx(100 * cider)
    sheets = [Image.open(tmp_path / f"pictures/{step:06d}.png") for step in (3, 6)]
    assert sheets[0].size == (2 * 16, 2 * 16) and sheets[0].tobytes() != sheets[1].tobytes()
    assert all(torch.equal(value, weights(made)[name]) for name, value in weights(again).items())


def test_the_moving_average_is_the_result_also_of_a_run_that_was_interrupted(whole, tmp_path):
    """θ̄ ← θ̄ + (1 − d)(θ − θ̄), the decay d growing to its value as (n / (n + 10))."""
    folder, _, _ = whole
    seen, kept = [], {}
    for steps in range(1, 7):
        config = dataclasses.replace(SMALL, average=0.5, steps=steps, checkpoint_every=1)
        made, pairs, learner = cycle.assemble(config, *models(folder), dataset(folder / "pictures"))
        [first, *_] = learner.parameters()
        if steps == 1:
            kept = first.detach().clone()
        cycle.train(config, made, pairs, learner, tmp_path, Accelerator(cpu=True))
        seen.append(load_file(tmp_path / "state.safetensors")["captioner.0"])
        decay = min(0.5, steps / (steps + 10))
        kept = kept + (1 - decay) * (seen[-1] - kept)
        torch.testing.assert_close(first.detach(), kept)
    assert not torch.equal(seen[-1], kept)


def test_a_tracker_gets_the_losses_and_one_that_is_not_there_is_refused(whole, tmp_path):
    folder, _, run_folder = whole
    accelerator = cycle.tracked("tensorboard", tmp_path, SMALL)
    made, pairs, learner = cycle.assemble(SMALL, *models(folder), dataset(folder / "pictures"))
    cycle.train(SMALL, made, pairs, learner, tmp_path, accelerator)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "cycle")).Reload()
    logged = {event.step: event.value for event in events.Scalars("generation")}
    expected = {row["step"]: row["generation"] for row in cycle.read_log(run_folder) if "generation" in row}
    assert logged == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no tracker 'odd' is installed, only tensorboard.*--tracker none"):
        cycle.tracked("odd", tmp_path, SMALL)


def test_models_are_uploaded_on_request_from_the_folders_that_were_exported(tmp_path, monkeypatch):
    asked = []

    class Hub:
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path):
            asked.append((repo_id, folder_path))

    monkeypatch.setattr(cycle, "HfApi", Hub)
    addresses = cycle.push(tmp_path / "run", "somebody")
    parts = ("captioner", "generator")
    assert asked == [(f"somebody/run-{part}", tmp_path / "run" / part) for part in parts]
    assert addresses == [f"https://huggingface.co/somebody/run-{part}" for part in parts]


def test_a_configuration_is_read_from_json_and_wrong_fields_are_named(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"steps": 7, "losses": {"latest": 0.5}}))
    assert cycle.read_config(file) == CycleConfig(steps=7, losses=Losses(latest=0.5))
    file.write_text(json.dumps({"step": 7}))
    with pytest.raises(ValueError, match=r"config.json: .*'step'; a configuration is .* captioner, generator"):
        cycle.read_config(file)
    with pytest.raises(ValueError, match="schedule = 'odd': choose one of alternating, joint"):
        CycleConfig(schedule="odd")
    with pytest.raises(ValueError, match="set checkpointing false"):
        CycleConfig(checkpointing=True, losses=Losses(image_updates="captioner"))
