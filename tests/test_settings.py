"""Settings: a wrong one is refused by name, wherever it comes from, before anything is computed or written."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo import __main__ as command_line
from dalleflamingo import cycle, profiles, registry, settings
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import Losses
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import accelerators
from dalleflamingo.evaluation.cycle_reporting import read_config
from dalleflamingo.miniature.training import train
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import options
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_captioner, load_generator

ROOT = Path(__file__).parents[1]

SMOKE = profiles.PROFILES["smoke"]
MADE = (CycleConfig.of(SMOKE), Losses(), JourneySettings.of(SMOKE), SMOKE, registry.ENTRIES["blip-large"])
FIELDS = [(made, field.name) for made in MADE for field in dataclasses.fields(made)]
NO_NUMBERS = ("1", "nan", math.nan, math.inf, -math.inf, -1, -1e9, 10**400, 1e300, [1], {"steps": 1}, True)


def kind_of(made: object, name: str) -> set[type]:
    """The types that a field's annotation names: {int, NoneType} of `Count | None`."""
    hint = typing.get_type_hints(type(made))[name]
    return {typing.get_origin(part) or part for part in typing.get_args(hint) or (hint,)}


NUMBERS = [(made, name) for made, name in FIELDS if kind_of(made, name) & {int, float}]
INTEGERS = [(made, name) for made, name in NUMBERS if int in kind_of(made, name)]
OTHERS = [(made, name) for made, name in FIELDS if (made, name) not in NUMBERS]


def ids(pair: object) -> str:
    return pair if isinstance(pair, str) else type(pair).__name__


# ── fields ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("made", "name"), NUMBERS, ids=ids)
def test_what_is_no_number_in_the_range_of_a_field_is_refused_by_name(made, name):
    for wrong in NO_NUMBERS:
        with pytest.raises(ValueError, match=rf"(^|; ){name} = .*: it should be"):
            dataclasses.replace(made, **{name: wrong})


@pytest.mark.parametrize(("made", "name"), INTEGERS, ids=ids)
def test_an_integer_is_no_fraction_and_no_number_with_a_point(made, name):
    for wrong in (2.5, 2.0, "8"):
        with pytest.raises(ValueError, match=f"{name} = {wrong!r}: it should be a valid integer"):
            dataclasses.replace(made, **{name: wrong})


@pytest.mark.parametrize(("made", "name"), OTHERS, ids=ids)
def test_what_is_no_number_is_no_number_and_no_object(made, name):
    for wrong in (3, 0, math.nan, object()):
        with pytest.raises(ValueError, match=rf"{name} = "):
            dataclasses.replace(made, **{name: wrong})
    if type(None) not in kind_of(made, name):
        with pytest.raises(ValueError, match=rf"{name} = None"):
            dataclasses.replace(made, **{name: None})


@pytest.mark.parametrize("wrong", ["false", "true", 0, 1, None, []])
def test_a_switch_is_true_or_false(wrong):
    with pytest.raises(ValueError, match="checkpointing = .*: it should be a valid boolean"):
        CycleConfig.of(SMOKE, checkpointing=wrong)


def test_an_integer_is_a_number():
    assert Losses(caption=2, temperature=1).caption == 2
    assert JourneySettings(candidates=1, steps=1, guidance_scale=3).guidance_scale == 3
    assert CycleConfig.of(SMOKE, max_grad_norm=1).max_grad_norm == 1


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(ValueError, match="candidates = 0: .*; guidance_scale = nan: .*; seed = -1: "):
        JourneySettings(candidates=0, steps=1, guidance_scale=math.nan, seed=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"captioner": "miniature/sd"},
            "'miniature/sd' is of kind generator: choose a captioner among miniature/blip, ",
        ),
        ({"captioner": "blip"}, "'blip' is not in the registry: choose a captioner among"),
        (
            {"generator": "miniature/blip"},
            "'miniature/blip' is of kind captioner: choose a generator among miniature/sd, ",
        ),
        ({"generator": "miniature/lafite"}, "miniature/lafite has no U-Net to finetune"),
        ({"generator": ""}, "'' is not in the registry"),
        (
            {"dataset": "miniature/clip"},
            "'miniature/clip' is of kind image similarity: choose a data set among miniature/web",
        ),
        ({"dataset": "miniature/coco/test"}, "'miniature/coco/test' is not in the registry"),
        ({"split": "dev"}, "miniature/coco has the splits train, val, test: name one"),
        ({"dataset": "miniature/web"}, "miniature/web takes no split"),
        ({"vocabulary_map": "soft"}, "vocabulary_map = 'soft': it should be 'one-to-one' or 'word-aligned'"),
        ({"precision": "fp8"}, "precision = 'fp8': it should be 'no', 'bf16' or 'fp16'"),
        ({"accumulation": 3}, "accumulation = 3: it should divide batch_size = 8"),
        ({"losses": 3}, "3 should be an object with some of the fields caption, image_reconstruction"),
        ({"losses": None}, "None should be an object"),
        ({"losses": {"mode": ["soft"]}}, "mode = "),
        ({"pictures": 8}, "'pictures'; the fields are captioner, generator"),
    ],
)
def test_models_data_and_what_belongs_together_are_checked_too(changes, message):
    with pytest.raises((ValueError, registry.RegistryError), match=message):
        CycleConfig.of(SMOKE, **changes)


def test_a_data_set_without_splits_has_none():
    assert CycleConfig.of(SMOKE, dataset="miniature/web", split=None).split is None


def test_what_is_empty_is_not_what_is_left_out(capsys):
    """0 and "" are values like others: refused by name where they are none, and never replaced by a default."""
    with pytest.raises(ValueError, match="the scheduler '' is not offered"):
        load_generator(SMOKE, scheduler="")
    for load in (load_generator, load_captioner):
        with pytest.raises(registry.RegistryError, match="the registry has no ''"):
            load(SMOKE, "")
    for flags in (["--threads", "0"], ["--threads", "-1"], ["--seed", "-1"], ["--seed", str(2**63)]):
        with pytest.raises(SystemExit) as end:
            train.main(["sd", *flags])
        assert end.value.code == 2 and flags[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        options.parse(options.study_parser("any", "about"), ["--profile", ""])
    assert "unknown profile ''" in capsys.readouterr().err


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "c.json").write_bytes('{"steps": 3, "losses": {"caption": 2}}'.encode(encoding))
    assert read_config(tmp_path / "c.json", SMOKE) == CycleConfig.of(SMOKE, steps=3, losses={"caption": 2})


ODD_FILES = {
    "empty": b"",
    "zeros": bytes(40),
    "a list": b"[1, 2]",
    "null": b"null",
    "a text": b'"steps"',
    "cut": b'{"steps": 3, "lo',
    "Latin-1": '{"captioner": "élève"}'.encode("latin-1"),
    "deep": b'{"losses": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"steps": ' + b"9" * 5000 + b"}",
    "a big number": b'{"learning_rate": 1' + b"0" * 400 + b"}",
    "not a number": b'{"learning_rate": NaN}',
    "infinity": b'{"losses": {"caption": -Infinity}}',
    "a lone surrogate": b'{"captioner": "\\ud800"}',
}


@pytest.mark.parametrize("content", ODD_FILES.values(), ids=ODD_FILES)
def test_an_odd_file_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.json: "):
        read_config(tmp_path / "c.json", SMOKE)


def test_a_file_that_is_a_folder_or_not_there_is_refused_by_its_name(tmp_path):
    for path in (tmp_path, tmp_path / "gone.json"):
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            read_config(path, SMOKE)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
NAMES = [field.name for field in dataclasses.fields(CycleConfig)]
LOSS_FIELDS = [field.name for field in dataclasses.fields(Losses)]


@given(
    named=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=3),
    losses=st.none() | st.dictionaries(st.sampled_from(LOSS_FIELDS), VALUES, max_size=3),
)
def test_any_json_is_a_configuration_of_the_right_types_or_refused(tmp_path_factory, named, losses):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(named | ({} if losses is None else {"losses": losses})))
    try:
        config = read_config(file, SMOKE)
    except ValueError as error:
        assert str(error).startswith(str(file))
        return
    for made in (config, config.losses):
        for field in dataclasses.fields(made):
            value, kinds = getattr(made, field.name), kind_of(made, field.name)
            if kinds & {int, float, bool}:
                assert type(value) in kinds | ({int} if float in kinds else set())
                assert value is None or math.isfinite(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": 0},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": 1e-300},
        {"accumulation": 0},
        {"checkpointing": "false"},
        {"learning_rate": 0},
        {"images": 0},
        {"ema_decay": 1},
        {"generator": "miniature/blip"},
    ],
    ids=str,
)
def test_the_command_line_refuses_a_configuration_before_it_writes_anything(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    (tmp_path / "c.json").write_text(json.dumps(wrong))
    assert command_line.main(["cycle", "--run", f"{tmp_path}/run", "--config", f"{tmp_path}/c.json"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "c.json: " in error and repr([*wrong.values()][0]) in error
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_flags_are_checked_where_files_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    for flags, message in (
        (["--seed", "-1"], "seed = -1: it should be"),
        (["--seed", str(2**63)], f"seed = {2**63}: it should be"),
        (["--steps", "9" * 12], "steps = 999999999999: it should be less"),
    ):
        assert command_line.main(["cycle", "--run", f"{tmp_path}/run", *flags]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a red bird\n")
    assert command_line.main(["reconstruct", f"{tmp_path}/a.txt", "--out", f"{tmp_path}/run", "--size", "100"]) == 2
    assert "image_size = 100: it should be a multiple of 8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# ── the registry's file ──────────────────────────────────────────────────────────────────────────────────────────────

ENTRY = 'kind = "captioner"\nsource = "me/mine"\nlicence = "MIT"\nnotes = "Mine."\n'


def test_an_entry_that_a_user_adds_is_read_with_and_without_a_byte_order_mark(tmp_path):
    (tmp_path / "r.toml").write_text("[hub.mine]\n" + ENTRY + "size_mb = 3\n", encoding="utf-8-sig")
    [mine] = registry._read_entries(tmp_path / "r.toml").values()
    assert (mine.name, mine.url, mine.size_mb) == ("mine", "https://huggingface.co/me/mine", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[hub.mine]\n" + ENTRY + 'revision = "main"', r"\[hub.'mine'\]: revision = 'main'"),
        ("[hub.mine]\n" + ENTRY + "size_mb = 0", r"\[hub.'mine'\]: size_mb = 0"),
        ("[hub.mine]\n" + ENTRY + 'size_mb = "3"', r"size_mb = '3': it should be a valid integer"),
        ("[hub.mine]\n" + ENTRY + 'decoding = {num_beams = "5"}', r"decoding.num_beams = '5'"),
        ("[hub.mine]\n" + ENTRY + 'sha256 = {"a" = "12"}', r"sha256.a = '12'"),
        ("[hub.mine]\n" + ENTRY + 'splits = "train"', r"splits = 'train'"),
        ("[hub.mine]\n" + ENTRY + 'opened_by = "os"', r"opened_by = 'os'"),
        ("[hub.mine]\n" + ENTRY + "beams = 5", r"'beams'; the fields are name, kind"),
        ("[hub.mine]\n" + ENTRY.replace("captioner", "writer"), r"kind = 'writer': it should be 'captioner', "),
        ("[hub.mine]\n" + ENTRY.replace("licence", "license"), r"'license'"),
        ("[hub.mine]\n" + ENTRY.replace("source", "prompt"), r"'source'"),
        ("[hubs.mine]\n" + ENTRY, r"\[hubs\]: an entry belongs to the group shipped, hub or elsewhere"),
        ("hub = 3", r"\[hub\]: an entry belongs to the group"),
        ("[hub]\nmine = 3", r"\[hub.'mine'\]: 3 should be an object"),
        ("[shipped.mine]\nkind = 3", r"\[shipped.'mine'\]: kind = 3"),
        ("[hub.mine\n", r"r\.toml: "),
        ("\x00", r"r\.toml: "),
    ],
)
def test_an_entry_that_a_user_writes_wrong_is_named(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(registry.RegistryError, match=message) as error:
        registry._read_entries(tmp_path / "r.toml")
    assert str(tmp_path / "r.toml") in str(error.value)


@pytest.mark.parametrize("variable", ["DALLEFLAMINGO_DATA", "DALLEFLAMINGO_COCO"])
@pytest.mark.parametrize("value", ["~nobody-of-this-name/data", "\udcff", "x" * 300, "relative/and/gone"])
def test_a_variable_that_names_no_folder_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    find = registry.data_root if variable.endswith("DATA") else lambda: registered.user_folder("coco")
    with pytest.raises((registry.RegistryError, OSError), match=variable if len(value) < 256 else "name too long"):
        find()


# ── accelerate's environment ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def forgets(monkeypatch):
    """A process has one accelerator's state; here several have their turn, on a CPU."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(accelerators, "find_device", lambda: "cpu")
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1"),
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "True"),
        ("ACCELERATE_USE_MEGATRON_LM", "1"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_USE_SAGEMAKER", "true"),
    ],
)
def test_a_variable_that_would_change_a_run_is_refused_by_name(forgets, name, value):
    forgets.setenv(name, value)
    for make in (accelerators.new_accelerator, lambda: accelerators.make_accelerator(CycleConfig.of(SMOKE))):
        with pytest.raises(ValueError, match=f"{name}='{value}' asks for what this run does not do.*Unset"):
            make()


def test_a_gpu_is_not_left_unused_without_a_word(forgets):
    forgets.setattr(accelerators, "find_device", lambda: "cuda")
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("ACCELERATE_TORCH_DEVICE", "cpu")):
        with forgets.context() as one:
            one.setenv(name, value)
            with pytest.raises(ValueError, match=f"{name}='{value}' .* computes on cuda"):
                accelerators.new_accelerator()


def test_what_asks_for_the_same_run_is_allowed_and_changes_nothing(forgets):
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_CPU": "True",
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_TORCH_DEVICE": "cpu:0",
    }.items():
        forgets.setenv(name, value)
    accelerator = accelerators.make_accelerator(CycleConfig.of(SMOKE, accumulation=2, precision="bf16"))
    assert accelerator.gradient_accumulation_steps == 2
    assert (accelerator.mixed_precision, accelerator.device.type) == ("bf16", "cpu")
    assert accelerator.state.dynamo_plugin.backend == "NO"


@pytest.mark.parametrize(("precision", "fits"), [("no", True), ("bf16", False)])
def test_the_file_of_accelerate_launch_cannot_change_a_run(forgets, tmp_path, precision, fits):
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nnum_machines: 1\n"
        f"machine_rank: 0\nuse_cpu: true\nmixed_precision: '{precision}'\n"
    )
    words = ["--config_file", str(file), "-m", "dalleflamingo", "cycle"]
    chosen, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    _, environment = launch.prepare_simple_launcher_cmd_env(chosen)
    for name, value in environment.items():
        forgets.setenv(name, value)
    if fits:
        assert accelerators.new_accelerator().mixed_precision == "no"
    else:
        with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION='bf16' asks for"):
            accelerators.new_accelerator()


def test_every_variable_is_known_that_accelerate_reads_when_an_accelerator_is_made():
    """A new one, in another version, is to be looked at: does it change a result?"""
    source = "".join(Path(accelerate.__file__).with_name(f"{name}.py").read_text() for name in ("accelerator", "state"))
    read = set(re.findall(r"ACCELERATE_[A-Z0-9_]+", source))
    refused = {name for name in read if name.startswith("ACCELERATE_USE_")} | {
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "ACCELERATE_TORCH_DEVICE",
    }
    without_effect = {
        "ACCELERATE_ALLOW_CP_STANDALONE",  # of a parallelism configuration, which is refused
        "ACCELERATE_BYPASS_DEVICE_MAP",  # of models that are prepared; only the optimizer is
        "ACCELERATE_CPU_AFFINITY",  # where a process computes
        "ACCELERATE_DEBUG_MODE",  # compares shapes
        "ACCELERATE_DOWNCAST_BF16",  # of TPUs
        "ACCELERATE_FP8_BACKEND",  # of fp8, which is refused
        "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE",  # with ACCELERATE_USE_SAGEMAKER, which is refused
    }
    assert read == refused | without_effect


def test_a_batch_that_does_not_divide_among_processes_is_refused_before_anything_is_written(tmp_path):
    three = SimpleNamespace(num_processes=3, is_main_process=True)
    config = CycleConfig.of(SMOKE, batch_size=8, accumulation=2)
    labelled = Dataset("some", [Example(i, tmp_path / "none.png", ("a red bird",)) for i in range(8)])
    batches = cycle.CaptionedBatches(labelled, None, None, config.batch_size)
    with pytest.raises(ValueError, match="a batch of 8 does not divide into 6 parts"):
        cycle.train_cycle(config, None, batches, None, tmp_path / "run", three)
    assert not (tmp_path / "run").exists()


def test_settings_of_ones_own_are_checked_in_the_same_way():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        steps: settings.Count
        side: settings.Side | None = None

        def __post_init__(self):
            settings.check(self)

    assert settings.from_mapping(Mine, {"steps": 3}) == Mine(3)
    for wrong in ({"steps": "3"}, {"steps": 3, "side": 12}, {"side": 8}, {"steps": 3, "sides": 8}, [3], "steps"):
        with pytest.raises(ValueError):
            settings.from_mapping(Mine, wrong)


@pytest.mark.parametrize("profile", [[], ["--profile", "smoke"]], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [
        ("registry.toml", "size_mb = 990", "size_mb = -1", "registry.toml, [hub.'blip-base']: size_mb = -1"),
        ("profiles.toml", "candidates = 2", "candidates = 0", "profiles.toml: ValueError: candidates = 0"),
        ("profiles.toml", "[miniature]", "[minature]", "profiles.toml: KeyError: 'miniature'"),
        ("profiles.toml", "[profiles]", "[profiles", "profiles.toml: TOMLDecodeError"),
    ],
)
def test_a_wrong_table_of_the_package_is_one_line_on_the_command_line(tmp_path, name, right, wrong, message, profile):
    shutil.copytree(ROOT / "dalleflamingo", tmp_path / "dalleflamingo")
    file = tmp_path / "dalleflamingo" / name
    file.write_text(file.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
    line = [sys.executable, "-m", "dalleflamingo", *profile, "cycle", "--run", "run"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 2 and "Traceback" not in done.stderr and message in done.stderr


@pytest.mark.parametrize("name", ["profile", "cls", "self"])
def test_a_field_called_like_an_argument_is_unknown(tmp_path, name):
    (tmp_path / "c.json").write_text(json.dumps({name: "mini"}))
    with pytest.raises(ValueError, match=f"c.json: there is no field '{name}'; the fields are captioner"):
        read_config(tmp_path / "c.json", profiles.PROFILES["smoke"])
