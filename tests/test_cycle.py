"""The loop: what it changes, that a kill costs nothing, that parts and processes compute what the whole does."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_cycle
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from filelock import FileLock
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_cycle import MAX_TIMESTEPS, SMALL, build, dataset, models, run
from transformers import BlipForConditionalGeneration, BlipProcessor

from dalleflamingo import cycle, profiles, registry
from dalleflamingo.cycle import CaptionedBatches, CycleConfig, build_cycle
from dalleflamingo.cycle_losses import LOSS_NAMES, Cycle, Losses
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import accelerators, caption_metrics, cycle_reporting
from dalleflamingo.evaluation.cycle_validation import Validation
from dalleflamingo.runs import RunFolderError
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_cycle

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def accelerate_forgets():
    """A process has one precision; here several have their turn."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(made: Cycle) -> dict[str, torch.Tensor]:
    pipeline = made.generator.pipeline
    parts = {"blip": made.captioner.model, "unet": pipeline.unet, "vae": pipeline.vae, "text": pipeline.text_encoder}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and images."""
    return tiny_cycle.save_models(tmp_path_factory.mktemp("cycle"))


@pytest.fixture(scope="module")
def whole(folder):
    """(the six steps that nothing disturbed, their run folder)."""
    return run(SMALL, folder, folder / "run"), folder / "run"


@pytest.fixture(scope="module")
def processes(folder, whole, tmp_path_factory):
    """(folder, record) of the runs in processes of their own; one for all, because importing torch takes seconds."""
    out = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, HERE / "tiny_cycle.py", folder, out, str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RECORD ")] or [done.stderr[-3000:]]
    return out, json.loads(line.removeprefix("RECORD "))


def test_nothing_but_the_named_parameters_changes(folder, whole):
    made, run_folder = whole
    before = weights(build(SMALL, folder)[0])
    changed = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    trained = {name for name in before if "crossattention.self.query." in name or "attn2.to_q." in name}
    assert changed == trained and len(trained) == 2 * 2 + 4
    rows = cycle_reporting.read_log(run_folder)
    assert [row["step"] for row in rows] == list(range(6))
    assert list(rows[0])[1:] == list(LOSS_NAMES[:2]) and list(rows[1])[1:] == list(LOSS_NAMES[2:])


def test_a_run_that_is_killed_ends_with_the_same_bits(folder, whole, processes):
    out, record = processes
    assert record["killed"] == [True] * 3
    again = weights(run(SMALL, folder, out / "killed"))
    assert all(torch.equal(value, again[name]) for name, value in weights(whole[0]).items())
    done, other = (load_file(run_folder / "state.safetensors") for run_folder in (out / "killed", whole[1]))
    assert done.keys() == other.keys() and all(torch.equal(done[name], other[name]) for name in done)


@pytest.mark.parametrize("max_timestep", MAX_TIMESTEPS)
def test_two_processes_learn_what_one_does(folder, whole, processes, tmp_path, max_timestep):
    out, record = processes
    run_folder = whole[1]
    if max_timestep < 1:
        run_folder = tmp_path / "alone"
        run(dataclasses.replace(SMALL, losses=Losses(max_timestep=max_timestep)), folder, run_folder)
    assert record[f"two-{max_timestep}"] == [0, 0]
    both = out / f"two-{max_timestep}"
    ours, alone = cycle_reporting.read_log(both), cycle_reporting.read_log(run_folder)
    assert len(ours) == len(alone) == len((both / "log.jsonl").read_text().splitlines())
    for row, expected in zip(ours, alone, strict=True):
        assert row == pytest.approx(expected, rel=2e-3)


def test_accumulated_parts_learn_what_the_whole_batch_does(folder, whole, tmp_path):
    made, run_folder = whole
    accumulated = weights(run(dataclasses.replace(SMALL, accumulation=2), folder, tmp_path))
    for ours, theirs in zip(cycle_reporting.read_log(tmp_path), cycle_reporting.read_log(run_folder), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    for name, value in weights(made).items():
        torch.testing.assert_close(accumulated[name], value, atol=2e-3, rtol=1e-2)


def test_the_learning_rate_grows_to_its_value_and_stays_there_also_after_an_interruption(folder, tmp_path):
    rates = []

    class Watched(Accelerator):
        """Notes the learning rate of every step."""

        def clip_grad_norm_(self, *arguments):
            rates.append(self._optimizers[-1].param_groups[0]["lr"])
            return super().clip_grad_norm_(*arguments)

    warm = dataclasses.replace(SMALL, warmup=4)
    for steps in (2, 6):
        run(dataclasses.replace(warm, steps=steps), folder, tmp_path, Watched(cpu=True))
    assert rates == pytest.approx([1e-2 * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_every_epoch_has_every_image_once_in_another_order_with_other_captions(folder):
    batches = CaptionedBatches(dataset(folder), None, None, batch_size=3, seed=1)
    epochs = [[pair for step in (2 * e, 2 * e + 1) for pair in batches.choose(step)] for e in range(3)]
    ids = [[example.image_id for example, _ in epoch] for epoch in epochs]
    assert all(sorted(epoch) == list(range(6)) for epoch in ids) and ids[0] != ids[1]
    told = {(example.image_id, caption) for epoch in epochs for example, caption in epoch}
    assert 6 < len(told) <= 12
    assert [pair[1] for pair in batches.choose(4)] == [caption for _, caption in epochs[2][:3]]


def as_people_write(folder: Path) -> Dataset:
    """The images with captions as COCO has them."""
    return Dataset("tiny", [replace_captions(example) for example in dataset(folder)])


def replace_captions(example: Example) -> Example:
    told = tuple(f' {text[0].upper()}{text[1:]}  ("{text}")!.\n' for text in example.references)
    return dataclasses.replace(example, references=told)


def test_both_models_learn_from_labels_as_blip_cleans_them(folder, monkeypatch):
    """(1) and (4) score the label's tokens, (2) bridges them, (3) is conditioned on them; references stay."""
    config, told, map_of = dataclasses.replace(SMALL, schedule="joint"), as_people_write(folder), []
    learn = cycle.VocabularyMap.learn
    monkeypatch.setattr(cycle.VocabularyMap, "learn", lambda *how: map_of.append(how) or learn(*how))
    made, batches, _ = build_cycle(config, *models(folder), told)
    batch = batches.batch(0)
    written = {f"{text} {text}" for text in tiny_cycle.TEXTS}
    assert set(batch.captions) <= written
    pipeline, captioner = made.generator.pipeline, made.captioner
    expected, _ = pipeline.encode_prompt(list(batch.captions), "cpu", 1, False)
    assert torch.equal(batch.encoder_hidden_states, expected)
    assert batch.token_counts.tolist() == captioner.count_tokens(batch.captions).tolist()
    scored, token_logits = [], captioner.token_logits
    captioner.token_logits = lambda images, captions: scored.append(list(captions)) or token_logits(images, captions)
    cycle.step_losses(config, made, batches, 0)
    assert scored == [list(batch.captions)] * 2  # of (1) with (2), and of (4)
    assert all(example.references[0].endswith(")!.\n") for example in batches.dataset)
    [learned] = {tuple(captions) for _, _, captions, *_ in map_of}
    assert set(learned) == written and len(learned) == 12


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_the_configuration_says_how_the_generators_images_are_made_square(folder, tmp_path, fit):
    captioner, generator = models(folder)
    examples = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        tiny.pictures(4)[i].resize((64, 24)).save(path)
        examples.append(Example(i, path, ("a red bird",)))
    config = dataclasses.replace(SMALL, fit=fit)
    _, batches, _ = build_cycle(config, captioner, generator, Dataset("wide", examples))
    images = [batches.dataset.open(example) for example, _ in batches.choose(0)]
    expected = generator.encode_images(images, torch.zeros(1), fit)
    torch.testing.assert_close(batches.batch(0).latents, expected)
    other = generator.encode_images(images, torch.zeros(1), {"resize": "crop", "crop": "resize"}[fit])
    assert (expected - other).abs().max() > 0.01


def test_a_caption_that_no_model_reads_is_skipped_and_training_goes_on(folder, tmp_path, capsys):
    odd = dataset(folder)
    first = dataclasses.replace(odd[0], references=("half \ud83d", *odd[0].references, "catsssssssss " * 30))
    made, batches, trainable = build_cycle(SMALL, *models(folder), Dataset("odd", (first, *odd[1:])))
    assert batches.dataset[0] == odd[0] and len(batches.dataset) == 6
    cycle.train_cycle(dataclasses.replace(SMALL, steps=2), made, batches, trainable, tmp_path, Accelerator(cpu=True))
    out = capsys.readouterr().out
    assert r'Skipped the caption "half \ud83d" of image 0' in out and '"catsssssssss catsssssssss' in out


def test_a_half_that_has_no_loss_has_no_steps():
    labels = dataclasses.replace(SMALL, losses=Losses(generation=0.0, caption_reconstruction=0.0))
    assert [labels.halves(step) for step in range(3)] == [("image",)] * 3
    joint = dataclasses.replace(labels, schedule="joint", losses=Losses(caption=0.0, image_reconstruction=0.0))
    assert joint.halves(0) == ("text",)
    with pytest.raises(ValueError, match="no loss has a weight of 1e-6 or more.*give one a weight"):
        dataclasses.replace(SMALL, losses=Losses(*[0.0] * 4))
    with pytest.raises(ValueError, match="no loss has a weight"):
        dataclasses.replace(SMALL, losses=Losses(*[1e-30] * 4))


def test_joint_steps_have_all_four_losses(folder):
    joint = dataclasses.replace(SMALL, schedule="joint")
    made, batches, _ = build(joint, folder)
    for step in (0, 1):
        assert tuple(cycle.step_losses(joint, made, batches, step)) == LOSS_NAMES
        own = cycle.step_losses(SMALL, made, batches, step)
        assert tuple(own) == (LOSS_NAMES[:2], LOSS_NAMES[2:])[step]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(folder, tmp_path):
    made, batches, trainable = build(SMALL, folder)
    predict, calls = made.generator.predict, []

    def breaks(noisy, encoder_hidden_states):
        calls.append(noisy)
        return predict(noisy, encoder_hidden_states) * (float("nan") if len(calls) == 4 else 1)

    made.generator.predict = breaks
    with pytest.raises(FloatingPointError, match=r"generation is nan at step 3, of images \["):
        cycle.train_cycle(SMALL, made, batches, trainable, tmp_path, Accelerator(cpu=True))
    assert cycle_reporting.read_log(tmp_path)[-1]["step"] == 2
    state = load_file(tmp_path / "state.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    run(SMALL, folder, tmp_path)  # goes on behind step 1
    assert len(cycle_reporting.read_log(tmp_path)) == 6


def test_another_configuration_is_refused_by_name(folder, whole):
    other = dataclasses.replace(SMALL, losses=Losses(caption=0.5), steps=9)
    with pytest.raises(ValueError, match=r"(?s)another configuration:\n  losses: .*'caption': 1.0.* there, .*0.5"):
        run(other, folder, whole[1])


def test_a_run_that_another_process_is_at_work_on_is_refused(folder, whole):
    made, batches, trainable = build(SMALL, folder)
    before = {path: path.read_bytes() for path in whole[1].iterdir()}
    with FileLock(whole[1] / ".lock", timeout=0):  # not the object that `hold` has
        with pytest.raises(RunFolderError, match=f"another process is at work in {whole[1]}"):
            cycle.train_cycle(SMALL, made, batches, trainable, whole[1], Accelerator(cpu=True))
    assert {path: path.read_bytes() for path in whole[1].iterdir()} == before


def test_a_configuration_that_the_models_refuse_leaves_the_folder_to_others(folder, tmp_path):
    made, batches, trainable = build(dataclasses.replace(SMALL, fit="crop"), folder)
    batches.batch = lambda *part: exec("raise ValueError('not so')")
    with pytest.raises(ValueError, match="not so"):
        cycle.train_cycle(dataclasses.replace(SMALL, fit="crop"), made, batches, trainable, tmp_path, Accelerator())
    assert not (tmp_path / "config.json").exists()
    run(dataclasses.replace(SMALL, steps=1), folder, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fit"] == "resize"


def test_damaged_files_of_a_run_are_named_and_a_cut_log_goes_on(folder, whole, tmp_path):
    run(dataclasses.replace(SMALL, steps=2), folder, tmp_path)
    log, config, state = (tmp_path / name for name in ("log.jsonl", "config.json", "state.safetensors"))
    log.write_bytes(log.read_bytes()[:-20] + b"\0" * 20)
    run(SMALL, folder, tmp_path)
    expected = cycle_reporting.read_log(whole[1])
    assert cycle_reporting.read_log(tmp_path) == [expected[0], *expected[2:]]
    for file in (state, config):
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(RunFolderError, match=f"{file} .*is (damaged|not the settings of a run)"):
            run(SMALL, folder, tmp_path)


def test_what_is_exported_opens_in_the_stock_libraries(whole, tmp_path):
    made, run_folder = whole
    shutil.copy(run_folder / "log.jsonl", tmp_path)
    cycle_reporting.export(made, tmp_path)
    cycle_reporting.write_model_cards(SMALL, tmp_path)
    blip = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    BlipProcessor.from_pretrained(tmp_path / "captioner")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "generator", safety_checker=None)
    for ours, theirs in ((made.captioner.model, blip), (made.generator.pipeline.unet, pipeline.unet)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    text = (tmp_path / "generator/README.md").read_text()
    assert "license: mit\n" in text and "caption_reconstruction 1" in text
    losses = [row["generation"] for row in cycle_reporting.read_log(tmp_path) if "generation" in row]
    assert f"* generation: {losses[0]:.3f} at first, {losses[-1]:.3f} in the end" in text and "cider" not in text


@pytest.mark.parametrize(("base", "licence"), [("blip2-opt-2.7b-coco", "other"), ("sd-v1-4", "creativeml-openrail-m")])
def test_the_card_of_a_real_model_is_one_that_the_hub_reads(base, licence):
    card = ModelCard(cycle_reporting.card(SMALL, base, [{"step": 0, "caption": 1.0}]))
    assert card.data.license == licence and card.data.base_model == registry.ENTRIES[base].source
    assert registry.ENTRIES[base].licence in card.text


def test_images_are_encoded_once_up_to_a_limit_of_memory(folder):
    captioner, generator = models(folder)
    encode, encoded = generator.encode_images, []
    generator.encode_images = lambda images, *how: encoded.append(images) or encode(images, *how)
    free = CaptionedBatches(dataset(folder), captioner, generator, batch_size=6)
    first = free.batch(0)
    each = (first.pixel_values.nbytes + first.latents.nbytes) // 6
    narrow = CaptionedBatches(dataset(folder), captioner, generator, batch_size=6, memory=2 * each)
    counts = []
    for step in range(2):
        for batches in (free, narrow):
            before = len(encoded)
            batch = batches.batch(step)
            counts.append(len(encoded) - before)
            theirs = free.batch(step)
            assert torch.equal(batch.pixel_values, theirs.pixel_values) and torch.equal(batch.latents, theirs.latents)
    assert counts == [0, 6, 0, 4]


def test_half_precision_computes_and_trained_parameters_stay_whole(folder, whole, tmp_path):
    config = dataclasses.replace(SMALL, precision="bf16", checkpointing=True, steps=2)
    half, batches, trainable = build(config, folder)
    cycle.train_cycle(config, half, batches, trainable, tmp_path, Accelerator(cpu=True, mixed_precision="bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in trainable.parameters())
    first, expected = cycle_reporting.read_log(tmp_path)[0], cycle_reporting.read_log(whole[1])[0]
    assert first == pytest.approx(expected, rel=0.03) and first != pytest.approx(expected, rel=1e-4)


class Scaled(Accelerator):
    """Scales the loss as fp16 does on a GPU, though it computes in float32."""

    def __init__(self):
        super().__init__(cpu=True)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)


def test_a_run_in_half_precision_that_was_interrupted_goes_on_with_its_scale(folder, whole, tmp_path):
    config = dataclasses.replace(
        SMALL, max_grad_norm=1e9
    )  # clips the scaled gradients, which only fp16 unscales before
    uninterrupted = Scaled()
    expected = weights(run(config, folder, tmp_path / "whole", uninterrupted))
    assert uninterrupted.scaler.get_scale() == 8.0 * 2**3
    for steps in (3, 6):
        accelerator = Scaled()
        again = run(dataclasses.replace(config, steps=steps), folder, tmp_path / "resumed", accelerator)
    assert accelerator.scaler.state_dict() == uninterrupted.scaler.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_fp16_on_a_cpu_says_that_it_trains_in_float32(monkeypatch):
    monkeypatch.setattr(accelerators, "find_device", lambda: "cpu")
    with pytest.warns(UserWarning, match="a CPU has no fp16: this run trains in float32"):
        accelerator = accelerators.make_accelerator(dataclasses.replace(SMALL, precision="fp16"))
    assert (accelerator.mixed_precision, accelerator.device.type) == ("no", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings(action="error"):
        assert accelerators.make_accelerator(dataclasses.replace(SMALL, precision="bf16")).mixed_precision == "bf16"
    assert CycleConfig.of(profiles.PROFILES["colab"]).precision == "fp16"  # on every machine


@pytest.mark.parametrize("generation", [1.0, 0.0])
def test_a_step_without_an_early_timestep_logs_no_reconstruction(folder, tmp_path, generation):
    """Its weights stay as they are if nothing else is trained, and a mean over steps does not count it as 0."""
    losses = Losses(caption=0.0, image_reconstruction=0.0, generation=generation, max_timestep=0.2)
    config = dataclasses.replace(SMALL, steps=8, batch_size=2, accumulation=2, losses=losses)
    made, batches, trainable = build(config, folder)
    early = []
    noisy_latents = made.noisy_latents

    def noticed(batch, draw):
        noisy = noisy_latents(batch, draw)
        early.append(bool((noisy.batch_timesteps < 200).any()))
        return noisy

    made.noisy_latents = noticed
    cycle.train_cycle(config, made, batches, trainable, tmp_path, Accelerator(cpu=True))
    rows, expected = cycle_reporting.read_log(tmp_path), early[::2]  # two parts of one batch agree
    assert early[1::2] == expected and set(expected) == {True, False}
    assert ["caption_reconstruction" in row for row in rows] == expected
    assert all(row["caption_reconstruction"] > 0 for row in rows if "caption_reconstruction" in row)
    assert all(("generation" in row) == bool(generation) for row in rows)


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM"])
def test_validation_renders_with_the_profiles_scheduler(folder, monkeypatch, tmp_path, scheduler):
    """From the profile to the pipeline that draws validation's images, with the profile's steps and guidance."""
    profile = dataclasses.replace(profiles.PROFILES["smoke"], scheduler=scheduler)
    config = cycle_reporting.read_config(_written(tmp_path / "config.json", {"images": 6, "batch_size": 3}), profile)
    monkeypatch.setattr(registered, "load_dataset", lambda name, split: dataset(folder))
    kinds = {config.captioner: "blip", config.generator: "sd"}
    monkeypatch.setattr(registry, "locate", lambda name: str(folder / kinds[name]))
    made, *_ = load_cycle(config, torch.device("cpu"))
    used, pipeline = [], made.generator.pipeline
    step = type(pipeline.scheduler).step
    monkeypatch.setattr(
        type(pipeline.scheduler), "step", lambda self, *a, **k: used.append(type(self).__name__) or step(self, *a, **k)
    )
    Validation(made, dataset(folder), tmp_path, steps=3, guidance_scale=3.0, batch_size=16, rendered=2)(1)
    assert used == [f"{scheduler}Scheduler"] * 3


def _written(path: Path, settings: dict) -> Path:
    path.write_text(json.dumps(settings))
    return path


def test_checkpointing_changes_nothing(folder, whole, tmp_path):
    saved = weights(run(dataclasses.replace(SMALL, checkpointing=True), folder, tmp_path))
    for name, value in weights(whole[0]).items():
        torch.testing.assert_close(saved[name], value, atol=1e-4, rtol=1e-3)


def test_validation_is_logged_with_its_step_and_leaves_training_alone(folder, whole, tmp_path):
    config, images = dataclasses.replace(SMALL, validate_every=3), dataset(folder)
    again, batches, trainable = build(config, folder)
    validation = Validation(again, images, tmp_path, steps=2, guidance_scale=3.0, batch_size=16, rendered=2)
    cycle.train_cycle(config, again, batches, trainable, tmp_path, Accelerator(cpu=True), validation)
    assert ["cider" in row for row in cycle_reporting.read_log(tmp_path)] == [False, False, True] * 2
    expected = dict(enumerate(again.captioner.describe(tiny.pictures(6))))
    references = {example.image_id: example.references for example in images}
    cider = caption_metrics.cider(references, expected).value
    assert cycle_reporting.read_log(tmp_path)[-1]["cider"] == pytest.approx(100 * cider)
    sheets = [Image.open(tmp_path / f"images/{step:06d}.png") for step in (3, 6)]
    assert sheets[0].size == (2 * 16, 2 * 16) and sheets[0].tobytes() != sheets[1].tobytes()
    assert all(torch.equal(value, weights(whole[0])[name]) for name, value in weights(again).items())


def test_the_moving_average_is_the_result_also_of_a_run_that_was_interrupted(folder, tmp_path):
    """θ̄ ← θ̄ + (1 − d)(θ − θ̄), the decay d growing to its value as n / (n + 9), from the second step on."""
    weight, average = None, None
    for steps in range(1, 7):
        config = dataclasses.replace(SMALL, ema_decay=0.3, steps=steps, checkpoint_every=1)
        made, batches, trainable = build(config, folder)
        [first, *_] = trainable.parameters()
        cycle.train_cycle(config, made, batches, trainable, tmp_path, Accelerator(cpu=True))
        weight = load_file(tmp_path / "state.safetensors")["captioner.0"]
        decay = min(0.3, steps / (steps + 9)) if steps > 1 else 0.0
        average = weight if average is None else average + (1 - decay) * (weight - average)
        torch.testing.assert_close(first.detach(), average)
    assert not torch.equal(weight, average)


def test_a_tracker_gets_the_losses_and_one_that_is_not_there_is_refused(folder, whole, tmp_path):
    accelerator = cycle_reporting.tracked("tensorboard", tmp_path, SMALL)
    run(SMALL, folder, tmp_path, accelerator)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "cycle")).Reload()
    logged = {event.step: event.value for event in events.Scalars("generation")}
    expected = {row["step"]: row["generation"] for row in cycle_reporting.read_log(whole[1]) if "generation" in row}
    assert logged == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no tracker 'odd' is installed, only tensorboard.*--tracker none"):
        cycle_reporting.tracked("odd", tmp_path, SMALL)


def test_models_are_uploaded_on_request_from_the_folders_that_were_exported(tmp_path):
    uploaded = []

    class Hub:
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path):
            uploaded.append((repo_id, folder_path))

    addresses = cycle_reporting.push(tmp_path / "run", "somebody", Hub())
    parts = ("captioner", "generator")
    assert uploaded == [(f"somebody/run-{part}", tmp_path / "run" / part) for part in parts]
    assert addresses == [f"https://huggingface.co/somebody/run-{part}" for part in parts]


def test_a_configuration_is_read_from_json_and_wrong_fields_are_named(tmp_path):
    file, mini = tmp_path / "config.json", profiles.PROFILES["mini"]
    file.write_text(json.dumps({"steps": 7, "losses": {"caption": 0.5}}))
    expected = CycleConfig.of(mini)
    losses = dataclasses.replace(expected.losses, caption=0.5)
    assert cycle_reporting.read_config(file, mini) == dataclasses.replace(expected, steps=7, losses=losses)
    for wrong in ({"step": 7}, {"losses": {"step": 7}}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError, match=r"config.json: .*'step'; the fields are (captioner, generator|caption, im)"
        ):
            cycle_reporting.read_config(file, mini)
    with pytest.raises(ValueError, match="fit = 'pad': it should be 'resize' or 'crop'"):
        dataclasses.replace(SMALL, fit="pad")
    with pytest.raises(ValueError, match="schedule = 'odd': it should be 'alternating' or 'joint'"):
        dataclasses.replace(SMALL, schedule="odd")
    with pytest.raises(ValueError, match="set checkpointing false"):
        dataclasses.replace(SMALL, checkpointing=True, losses=Losses(image_updates="captioner"))


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_a_profile_names_the_models_and_what_it_sets_can_be_changed(name):
    profile = profiles.PROFILES[name]
    config = CycleConfig.of(profile)
    assert (config.captioner, config.generator) == (profile.captioner, profile.generator)
    assert (config.dataset, config.steps) == (profile.coco, profile.cycle["steps"])
    changed = CycleConfig.of(profile, captioner=profile.captioners[-1], seed=3, losses={"caption": 0.5})
    losses = dataclasses.replace(config.losses, caption=0.5)
    assert changed == dataclasses.replace(config, captioner=profile.captioners[-1], seed=3, losses=losses)
    assert config.losses.max_timestep == changed.losses.max_timestep == 0.4
