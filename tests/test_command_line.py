"""The command line as a user meets it: help, errors in one line, and an interruption that loses nothing."""

import dataclasses
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from dalleflamingo import __main__ as command_line
from dalleflamingo import cycle, profiles, reconstruct
from dalleflamingo.commands import reconstruct as reconstruct_command
from dalleflamingo.evaluation import similarities, workers
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.registry import RegistryError
from dalleflamingo.sources import models as profile_models

ROOT = Path(__file__).parent.parent


def command(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`python -m dalleflamingo`, in a process of its own."""
    line = [sys.executable, *options, "-m", "dalleflamingo", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("arguments", [[], ["reconstruct"], ["cycle"], ["research"]], ids=" ".join)
def test_help_answers_at_once_without_importing_torch(arguments):
    done = command(*arguments, "--help", options=("-X", "importtime"))
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m dalleflamingo")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "transformers", "numpy"}


def test_every_command_has_a_help_that_names_itself():
    """All in one process, as some import torch."""
    names = [[name] for name in command_line.COMMANDS if name != "research"]
    names += [["research", name] for name in command_line.RESEARCH]
    calls = (
        f"for name in {names!r}:\n    try: main([*name, '--help'])\n    except SystemExit as end: assert not end.code"
    )
    script = f"from dalleflamingo.__main__ import main\n{calls}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(names)
    for name in names:
        assert f"usage: python -m dalleflamingo {' '.join(name)} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "name a command"), (["reconstrut"], "no command 'reconstrut'"), (["research", "odd"], "no command 'odd'")],
)
def test_an_unknown_command_is_answered_with_the_list(arguments, message, capsys):
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    known = command_line.RESEARCH if "research" in arguments else command_line.COMMANDS
    assert all(name in error for name in known)


def run(*arguments: object, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and the error of the command in this process."""
    try:
        status = command_line.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


@pytest.fixture
def models(monkeypatch, tmp_path):
    """The models that a command loads are fakes; [(scheduler, size of images) asked for, ...]."""
    fakes.dataset(tmp_path / "mine", 3)
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    loaded = profile_models.Models(fakes.Captioner(), fakes.Generator(), [fakes.MeanColour()])
    asked = []

    def asking(found):
        return lambda profile, scheduler: asked.append((scheduler, profile.image_size)) or found

    monkeypatch.setattr(profile_models, "load_models", asking(loaded))
    monkeypatch.setattr(profile_models, "load_captioner", lambda profile: loaded.captioner)
    monkeypatch.setattr(profile_models, "load_generator", asking(loaded.generator))
    texts = [PairSimilarity("letters", fakes.common_letters)]
    monkeypatch.setattr(similarities, "load_text_similarities", lambda profile, corpus: texts)
    return loaded, asked


def test_a_folder_of_images_goes_there_and_back(models, tmp_path, capsys):
    assert command_line.main(["reconstruct", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]) == 0
    assert len(pd.read_parquet(tmp_path / "run/candidates.parquet")) == 3 * profiles.PROFILES["smoke"].candidates
    out = capsys.readouterr().out
    assert "6 candidates of 3 images (0 were there already, 0 skipped)" in out
    best = reconstruct.select(pd.read_parquet(tmp_path / "run/candidates.parquet"), by="colour")
    files = sorted(path.name for path in (tmp_path / "mine").iterdir() if path.suffix == ".png")
    lines = [f"  {f:<24} {row.colour:8.3f}  {row.caption}" for f, row in zip(files, best.itertuples(), strict=True)]
    assert out.splitlines()[-4:] == ["best by colour:", *lines]


def test_options_reach_the_journey(models, tmp_path):
    arguments = ["reconstruct", tmp_path / "mine", "--out", tmp_path / "run", "--images", 2, "--candidates", 3]
    arguments += ["--steps", 15, "--scheduler", "DDIM", "--size", 48, "--batch-size", 5, "--seed", 9]
    assert command_line.main(list(map(str, arguments))) == 0
    table = pd.read_parquet(tmp_path / "run/candidates.parquet")
    assert table.groupby("image_id").size().tolist() == [3, 3]
    [call] = models[0].generator.calls
    assert (call["steps"], call["batch"], models[1]) == (15, 5, [("DDIM", 48)])
    other = [*arguments[:3], tmp_path / "other", *arguments[4:-1], 10]
    assert command_line.main(list(map(str, other))) == 0
    assert not set(pd.read_parquet(tmp_path / "other/candidates.parquet").seed) & set(table.seed)


def test_launched_processes_and_numbered_workers_make_one_table(models, tmp_path, monkeypatch, capsys):
    alone = ["reconstruct", str(tmp_path / "mine"), "--out", str(tmp_path / "alone")]
    assert command_line.main(alone) == 0
    monkeypatch.setattr(workers, "CHUNK", 1)
    for launcher in ({"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}):
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        assert command_line.main([*alone[:3], str(tmp_path / "launched")]) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for worker in ("2/3", "3/3", "1/3"):
        assert command_line.main([*alone[:3], str(tmp_path / "numbered"), "--worker", worker]) == 0
    tables = [(tmp_path / name / "candidates.parquet").read_bytes() for name in ("alone", "launched", "numbered")]
    assert tables[0] == tables[1] == tables[2]
    capsys.readouterr()
    status, error = run(*alone[:3], tmp_path / "x", "--worker", "4/3", capsys=capsys)
    assert status == 2 and "worker '4/3': give its number and how many there are" in error


def test_models_of_the_registry_are_chosen_by_name(models, tmp_path, monkeypatch, capsys):
    chosen = []
    load = profile_models.load_models
    monkeypatch.setattr(profile_models, "load_models", lambda profile, _: chosen.append(profile) or load(profile, _))
    arguments = ["reconstruct", tmp_path / "mine", "--out", tmp_path / "run"]
    assert run(*arguments, "--captioner", "git-base-coco", "--generator", "sdxl-turbo", capsys=capsys)[0] == 0
    assert (chosen[0].captioner, chosen[0].generator) == ("git-base-coco", "sdxl-turbo")
    for options, message in (
        (["--captioner", "sdxl-turbo"], "'sdxl-turbo' is of kind generator: choose a captioner among"),
        (["--generator", "dall-e"], "'dall-e' is not in the registry: choose a generator among"),
        (["--generator", "sdxl-turbo", "--steps", "50"], "--steps: the generator sdxl-turbo has its own"),
        (["--generator", "lcm-dreamshaper-v7", "--scheduler", "DDIM"], "--scheduler: the generator lcm-dreamshaper-v7"),
    ):
        status, error = run(*arguments, *options, capsys=capsys)
        assert status == 2 and message in error and len(chosen) == 1


def test_the_profile_is_set_before_it_is_read(models, tmp_path, capsys):
    for place in (0, 4):
        arguments = ["reconstruct", str(tmp_path / "mine"), "--out", str(tmp_path / f"run-{place}")]
        arguments[place:place] = ["--profile", "mini"]
        assert command_line.main(arguments) == 0
        assert os.environ[profiles.VARIABLE] == "mini"
        assert len(pd.read_parquet(tmp_path / f"run-{place}/candidates.parquet")) == 3 * 5
    capsys.readouterr()
    status, error = run(*arguments[:-2], "--profile", "tiny", capsys=capsys)
    assert status == 2 and "--profile: unknown profile 'tiny': one of smoke, mini, colab, paper" in error
    assert len(error.splitlines()) == 1 and os.environ[profiles.VARIABLE] == "mini"


def test_a_file_of_captions_goes_there_and_back_and_may_be_edited(models, tmp_path, capsys):
    file = tmp_path / "mine.txt"
    arguments = ["reconstruct", str(file), "--out", str(tmp_path / "texts")]
    file.write_text("a red thing\n\na blue thing\n", encoding="utf-8")
    assert command_line.main(arguments) == 0
    table = pd.read_parquet(tmp_path / "texts/candidates.parquet")
    assert table.caption.tolist() == ["a red thing"] * 2 + ["a blue thing"] * 2
    title, *best = capsys.readouterr().out.splitlines()[-3:]
    assert title == "best by letters:" and [line[2:15].strip() for line in best] == ["a red thing", "a blue thing"]
    assert [line.split()[-1] for line in best] == reconstruct.select(table, by="letters").image.tolist()
    file.write_text("a green thing\na blue thing\n", encoding="utf-8")
    assert command_line.main(arguments) == 0
    edited = pd.read_parquet(tmp_path / "texts/candidates.parquet")
    assert edited.caption.tolist() == ["a green thing"] * 2 + ["a blue thing"] * 2  # no line has another's images
    assert edited.image_id.tolist()[2:] == table.image_id.tolist()[2:]


def test_a_file_of_captions_needs_no_similarity_of_images(models, monkeypatch, tmp_path):
    monkeypatch.setattr(profile_models, "load_models", None)  # would load CLIP and DINO
    (tmp_path / "mine.txt").write_text("a red thing\n")
    arguments = ["reconstruct", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "texts"), "--scheduler", "DDIM"]
    assert command_line.main([*arguments, "--steps", "20"]) == 0 and models[1] == [("DDIM", 64)]


@pytest.mark.parametrize("options", [["--steps", "9"], ["--scheduler", "DDIM"]])  # the profile smoke has 4 steps
@pytest.mark.parametrize("source", ["mine", "mine.txt"])
def test_too_few_steps_for_the_scheduler_are_told_in_one_line(models, tmp_path, capsys, source, options):
    (tmp_path / "mine.txt").write_text("a red thing\n")
    status, error = run("reconstruct", tmp_path / source, "--out", tmp_path / "run", *options, capsys=capsys)
    assert status == 2 and "needs 10 or more" in error and len(error.splitlines()) == 1
    assert not models[0].generator.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine", "--steps", "0"], "--steps: '0': give a whole number, 1 or more"),
        (["mine", "--images", "-1"], "--images"),
        (["mine", "--images", "0"], "--images: '0': give a whole number, 1 or more"),
        (["photo.JPG"], "photo.JPG is a single image: put it into a folder"),
        (["mine", "--prof", "mini"], "unrecognized arguments: --prof mini"),
        (["gone.txt"], "there is no file gone.txt: check the path"),
        (["empty"], "holds no images but no files at all: put images there"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_error_of_the_user_is_one_line_and_status_2(models, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.JPG").write_text("text in it")
    status, error = run("reconstruct", *arguments, "--out", "run", capsys=capsys)
    assert status == 2 and message in error and len(error.splitlines()) == 1
    assert error.startswith("python -m dalleflamingo reconstruct: ") and not (tmp_path / "run").exists()


def test_no_traceback_reaches_the_user_of_the_real_command_line(tmp_path):
    done = command("reconstruct", tmp_path / "gone.txt", "--out", tmp_path / "run")
    assert done.returncode == 2 and "gone.txt: check the path" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_interrupted_journey_says_what_is_kept_and_goes_on(models, tmp_path, capsys):
    loaded, arguments = models[0], ["reconstruct", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]
    fakes.dataset(tmp_path / "mine", 10)
    loaded.captioner.sample = interrupted_after(8, loaded.captioner.sample)
    assert command_line.main(arguments) == 130
    out = capsys.readouterr().out
    assert out.count("Interrupted") == 1 and f"8 of 10 images are kept; the same call goes on in {tmp_path}" in out
    del loaded.captioner.sample
    assert command_line.main(arguments) == 0
    assert "(8 were there already" in capsys.readouterr().out


def interrupted_after(images: int, sample):
    """A captioner's `sample` that Ctrl-C stops once it has captioned so many images."""
    left = [images]

    def sampled(batch, *rest):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= len(batch)
        return sample(batch, *rest)

    return sampled


class OutOfMemoryError(RuntimeError):
    """Torch's has the same name, and needs torch."""


def no_network() -> None:
    """What a hub's client raises: an error of its own, which a failed look-up of the host's name led to."""
    try:
        raise socket.gaierror(-2, "Name or service not known")
    except OSError:
        raise RuntimeError("ConnectError: [Errno -2]")  # noqa: B904, the libraries do not say `from` either


ENDINGS = {
    "ctrl-c": lambda: exec("raise KeyboardInterrupt"),
    "gpu": lambda: exec("raise OutOfMemoryError('CUDA')", {"OutOfMemoryError": OutOfMemoryError}),
    "memory": lambda: np.zeros(2**50),
    "bug": lambda: {}["blue"],
    "shapes": lambda: np.zeros(2) + np.zeros(3),
    "lines": lambda: torch.nn.Linear(1, 1).load_state_dict({}),
    "gone": lambda: open("gone.json"),
    "disk": lambda: exec("raise OSError(28, 'No space left on device', 'a.png')"),
    "weights": lambda: save_file({"a": torch.zeros(2)}, "nowhere/a.safetensors"),
    "network": no_network,
    "package": lambda: importlib.import_module("no_such_package"),
}


def ending(arguments: list[str]) -> int:
    """A command that ends in one of these ways."""
    return ENDINGS[arguments[0]]()


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("gpu", 2, "the GPU's memory is full: give a smaller --batch-size"),
        ("memory", 2, "the memory is full: close other programs, or work on less at once"),
        ("gone", 2, "No such file or directory: 'gone.json'"),
        (
            "disk",
            2,
            "the disk is full ([Errno 28] No space left on device: 'a.png'): make room, and give the same",
        ),
        ("weights", 2, "No such file or directory"),
        ("network", 2, "the network cannot be reached (ConnectError: [Errno -2]): connect, and give"),
        ("package", 2, "No module named 'no_such_package': install the environment"),
        (
            "bug",
            1,
            "this is a bug (KeyError: 'blue'): give the command again with DALLEFLAMINGO_DEBUG=1 and report",
        ),
        ("shapes", 1, "this is a bug (ValueError: operands could not be broadcast"),
        ("lines", 1, "this is a bug (RuntimeError: Error(s) in loading state_dict for Linear: Missing key(s)"),
    ],
)
def test_an_error_ends_in_one_line_and_debugging_shows_where_it_was(monkeypatch, capsys, how, status, message):
    train = dataclasses.replace(command_line.COMMANDS["train"], function="test_command_line:ending")
    monkeypatch.setitem(command_line.COMMANDS, "train", train)
    monkeypatch.delenv("DALLEFLAMINGO_DEBUG", raising=False)
    found, error = run("train", how, capsys=capsys)
    assert found == status and error.startswith("python -m dalleflamingo train: ") and message in error
    assert len(error.splitlines()) == 1
    monkeypatch.setenv("DALLEFLAMINGO_DEBUG", "1")
    found, debugged = run("train", how, capsys=capsys)
    assert found == status and "Traceback (most recent call last)" in debugged and __file__ in debugged
    assert debugged.splitlines()[-1][:60] == error[:60]


@pytest.mark.parametrize("address", ["", "https://github.com/someone/course"])
def test_a_bug_is_reported_where_there_is_a_repository(monkeypatch, capsys, address):
    train = dataclasses.replace(command_line.COMMANDS["train"], function="test_command_line:ending")
    monkeypatch.setitem(command_line.COMMANDS, "train", train)
    monkeypatch.setattr(command_line, "repository", lambda: address)
    _, error = run("train", "bug", capsys=capsys)
    assert error.strip().endswith(f"report the traceback at {address}/issues" if address else "report the traceback")


def test_an_interrupted_command_says_what_is_kept(monkeypatch, capsys):
    train = dataclasses.replace(command_line.COMMANDS["train"], function="test_command_line:ending")
    monkeypatch.setitem(command_line.COMMANDS, "train", train)
    status, error = run("train", "ctrl-c", capsys=capsys)
    assert status == 130 and error.strip() == f"Interrupted: {train.interrupted}."


def test_a_folder_that_cannot_hold_the_run_is_told_before_models_are_loaded(models, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine.txt").write_text("a red thing\n")
    for source in ("mine", "mine.txt"):
        status, error = run("reconstruct", tmp_path / source, "--out", tmp_path / "file", capsys=capsys)
        assert status == 2 and "file cannot hold a run (it is a file)" in error and len(error.splitlines()) == 1
    assert not models[1] and (tmp_path / "file").read_text() == "mine"
    status, error = run("cycle", "--run", tmp_path / "file", "--tracker", "none", capsys=capsys)
    assert status == 2 and "file cannot hold a run (it is a file)" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("option", ["--runs", "--docs"])
@pytest.mark.parametrize(("place", "problem"), [("file", "is not a folder"), ("file/x/y", "is not a folder")])
def test_a_study_refuses_a_folder_that_is_a_file_before_it_works(tmp_path, capsys, option, place, problem):
    (tmp_path / "file").write_text("mine")
    status, error = run("research", "insight-1", option, tmp_path / place, capsys=capsys)
    assert status == 2 and f"{option} {tmp_path / place}: {tmp_path / 'file'} {problem}" in error


def test_a_model_that_is_neither_here_nor_within_reach_is_named(tmp_path):
    fakes.dataset(tmp_path / "mine", 2)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    line = [
        sys.executable,
        "-m",
        "dalleflamingo",
        "--profile",
        "colab",
        "reconstruct",
        tmp_path / "mine",
        "--out",
        "run",
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}
    )
    [error] = [line for line in done.stderr.splitlines() if line.startswith("python -m dalleflamingo reconstruct: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "clip_224.openai (1,710 MB) is not on this machine, and cannot be downloaded: unset" in error
    assert f"or copy {tmp_path / 'cache/hub'} from a machine that has it" in error
    assert not (tmp_path / "run/run.json").exists()


def test_cycle_takes_the_profiles_models_and_the_options(monkeypatch, tmp_path, capsys):
    def load(config, device):
        raise RegistryError(f"asked for {config}")

    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    monkeypatch.setattr(profile_models, "load_cycle", load)
    shared = ["cycle", "--run", tmp_path, "--tracker", "none", "--profile", "mini"]
    status, error = run(*shared, "--steps", 3, "--seed", 4, "--batch-size", 5, capsys=capsys)
    wanted = cycle.CycleConfig.of(profiles.PROFILES["mini"], steps=3, seed=4, batch_size=5)
    assert status == 2 and f"asked for {wanted}" in error and wanted.captioner == profiles.PROFILES["mini"].captioner
    (tmp_path / "config.json").write_text('{"steps": 7, "seed": 8}')
    status, error = run(*shared, "--config", tmp_path / "config.json", "--seed", 9, capsys=capsys)
    assert f"asked for {cycle.CycleConfig.of(profiles.PROFILES['mini'], steps=7, seed=9)}" in error


def test_only_what_a_raise_of_this_package_says_is_meant_for_users():
    """Errors of C, which have no frame of their own, look like raised in the line that called it."""
    source = (
        "def own(): raise ValueError('mine')\ndef unpacked(): a, b = [1]\ndef read(): int('x')\ndef called(): own()"
    )
    for package, expected in (("dalleflamingo.sources", [True, False, False, True]), ("json", [False] * 4)):
        names = {"__package__": package}
        exec(source, names)
        found = []
        for name in ("own", "unpacked", "read", "called"):
            with pytest.raises(ValueError) as error:  # noqa: PT011, whatever it says
                names[name]()
            found.append(command_line._is_ours(error.value))
        assert found == expected


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch):
    def closed(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(reconstruct_command, "main", closed)
    assert command_line.main(["reconstruct"]) == 141


def into(output, *arguments: str) -> subprocess.Popen:
    """The command in a process of its own, whose Python buffers what it prints."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = [sys.executable, "-m", "dalleflamingo", *arguments]
    return subprocess.Popen(line, stdout=output, stderr=subprocess.PIPE, cwd=ROOT, env=buffered, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["reconstruct", "--help"], ["export", "--help"]], ids=" ".join)
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)  # before the command writes a word
    with open(writer, "w") as closed, into(closed, *arguments) as process:
        error = process.stderr.read()
    assert (process.returncode, error) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_told_in_one_line():
    with open("/dev/full", "w") as full, into(full, "--help") as process:
        error = process.stderr.read()
    assert process.returncode == 2 and "the disk is full" in error and len(error.splitlines()) == 1


def test_ctrl_c_while_the_profiles_are_imported_is_no_traceback(monkeypatch):
    class Slow:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "dalleflamingo.profiles", Slow())
    assert command_line.main(["--profile", "mini", "research"]) == 130


def test_more_steps_than_timesteps_are_refused(models, tmp_path, capsys):
    status, error = run("reconstruct", tmp_path / "mine", "--out", tmp_path / "run", "--steps", 2000, capsys=capsys)
    assert status == 2 and "steps = 2000: the model has 1000 timesteps: take 1000 or fewer" in error


@pytest.mark.parametrize("profile", [[], ["--profile", "smoke"]], ids=" ".join)
def test_a_library_that_is_not_installed_is_named(tmp_path, profile):
    (tmp_path / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\")\n")
    line = [sys.executable, "-m", "dalleflamingo", *profile, "cycle", "--run", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith("No module named 'pydantic': install the environment as README.md says\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["reconstruct", "", "--out", "run"],
        ["reconstruct", "mine", "--out", ""],
        ["cycle", "--run", ""],
        ["cycle", "--run", "run", "--config", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(models, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    status, error = run(*arguments, capsys=capsys)
    assert status == 2 and "'': give a path" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
