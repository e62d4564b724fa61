"""The study: its queue, a run that goes on, and what is made of the runs, on numbers whose answer is known."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_cycle
import torch
from accelerate import Accelerator
from filelock import FileLock
from PIL import Image
from tiny_cycle import SMALL

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.course import cycle_figures
from dalleflamingo.cycle import build_cycle, train_cycle
from dalleflamingo.cycle_losses import LOSS_NAMES, generator_parameters
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation.cycle_reporting import read_log
from dalleflamingo.evaluation.intervals import paired_bootstrap
from dalleflamingo.generator import Generator
from dalleflamingo.research import cycle_claims, cycle_comparison, cycle_report, cycle_start, cycle_study
from dalleflamingo.research.cycle_arms import ARMS, START, TABLE_3, TABLE_9, Run, label_of, queue, run_of, trial, trials
from dalleflamingo.research.cycle_comparison import EvaluatedRuns, StudyResults
from dalleflamingo.research.released import DEVIATIONS
from dalleflamingo.runs import RunFolderError
from dalleflamingo.sources.models import load_captioner, load_cycle

ROOT = Path(__file__).parents[1]
MINI = profiles.PROFILES["mini"]
BLIP = MINI.captioners[0]


def test_arms_are_the_losses_that_they_say():
    expected = {
        "labels": (1, 0, 1, 0),
        "labels-longer": (1, 0, 1, 0),
        "cycle": (1, 1, 1, 1),
        "image": (1, 1, 1, 0),
        "text": (1, 0, 1, 1),
        "unlabelled": (1, 1, 1, 1),
        "reconstruction": (0, 1, 0, 1),
    }
    for arm, weights in expected.items():
        config = ARMS[arm].config(MINI, BLIP, 3)
        assert tuple(getattr(config.losses, name) for name in LOSS_NAMES) == weights
        assert (config.captioner, config.seed, config.images) == (BLIP, 3, MINI.cycle["images"])
        assert config.steps == (980 if arm == "labels-longer" else 450)
    assert ARMS["joint"].config(MINI, BLIP, 0).steps == 225
    assert ARMS["cycle"].config(profiles.PROFILES["paper"], "blip-large", 0).steps == 70_804


def test_labels_only_for_longer_take_about_nine_tenths_of_the_cycles_computing():
    timed = json.loads((ROOT / "docs/results" / cycle_claims.TIMED).read_text(encoding="utf-8"))["found"]
    as_trained = [entry for entry in timed if entry["setting"] == "x̂ of the earliest 40 % of timesteps"]
    assert ARMS["cycle"].config(MINI, BLIP, 0).losses.max_timestep == 0.4
    assert [entry["captioner"] for entry in as_trained] == list(MINI.captioners)
    for entry in as_trained:
        ratio = np.median(cycle_claims.cost_of_cycle(entry["seconds"]))
        assert ARMS["labels-longer"].steps / (2 * ratio) == pytest.approx(0.9, abs=0.05)  # a step is of one model


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_the_queue_has_every_run_once_and_one_seed_after_another(name):
    profile = profiles.PROFILES[name]
    first, *others = profile.captioners
    runs = list(queue(profile))
    assert len({run.name for run in runs}) == len(runs)
    counts = pd.DataFrame([vars(run) for run in runs]).groupby(["captioner", "arm"])["seed"].nunique()
    for captioner in profile.captioners:
        assert all(counts[captioner, arm] == (5 if captioner == first else 3) for arm in TABLE_3)
    assert all(counts[first, arm] == 5 for arm in TABLE_9) and counts[first, "released"] == 1
    compared = [run.seed for run in runs if run.arm in TABLE_3]
    assert compared == sorted(compared)
    # Table 4: SD as it is, taught by labels, taught with BLIP ViT-B and ViT-L; BLIP-2's is not in it
    generated = {run.captioner for run in runs if run.arm == "cycle" and run.generates}
    assert {registry.ENTRIES[one].counterpart for one in generated} == {"BLIP (ViT-B)", "BLIP (ViT-L)"}
    assert not any(run.generates for run in runs if run.captioner in others and run.arm != "cycle")
    assert all(run.config(profile).captioner == run.captioner for run in runs)


def test_settings_are_chosen_on_images_that_the_test_has_not():
    test, other = cycle_study.test_sets(MINI), cycle_study.development_sets(MINI)
    for corpus in test:
        ids = [{example.image_id for example in part[corpus]} for part in (test, other)]
        assert len(ids[0]) == {"nocaps": 1500, "coco": 1000}[corpus] and not ids[0] & ids[1]
    rendered = cycle_study.of_every_domain(test["nocaps"], cycle_study.RENDERED)
    assert {name: len(part) for name, part in rendered.by_domain().items()} == dict.fromkeys(
        ("in-domain", "near-domain", "out-domain"), 200
    )
    tried = trials(MINI)
    assert len({run.name for run in tried}) == len(tried)
    assert sum(run.kind.unlabelled for run in tried) == 2 and {config.images for config in tried.values()} == {
        25,
        100,
        2000,
    }
    with pytest.raises(ValueError, match="set apart for choosing settings: use a profile of the miniature"):
        cycle_study.development_sets(profiles.PROFILES["paper"])


def test_a_run_has_the_kind_of_cycle_of_its_arm_and_keeps_the_name_of_its_folder(tmp_path):
    tried = Run(trial("released", 25, {"mode": "soft"}), BLIP, key="released")
    assert tried.kind.deviations == frozenset(DEVIATIONS) and tried.name == "blip-released, 25 images, mode soft-0"
    assert {run.key for run in trials(MINI)} == {None, "labels", "cycle", "unlabelled"}
    assert all(run.kind is ARMS[run.arm] for run in queue(MINI) if run.arm != START)
    names = [run.name for run in (*queue(MINI), *trials(MINI))]
    assert {"blip-start", "blip2-labels-longer-2", "blip-unlabelled, 25 images, mode soft-0"} <= set(names)
    with pytest.raises(ValueError, match="blip-released, 25 images-0 names no arm of ARMS: give its key"):
        cycle_study.builder_of(Run(trial("released", 25), BLIP), MINI, tmp_path)


@pytest.fixture
def short_pretraining(monkeypatch):
    """Arms begin where two steps on four images lead."""
    short = cycle_start.PRETRAINING | {"steps": 2, "batch_size": 2, "images": 4}
    monkeypatch.setattr(cycle_start, "PRETRAINING", short)


@pytest.fixture(scope="module")
def few():
    """Six images of each test set."""
    return cycle_study.test_sets(profiles.PROFILES["smoke"], 6)


def short(run: Run):
    """The settings of a run of two steps."""
    return dataclasses.replace(run.config(profiles.PROFILES["smoke"]), steps=2, batch_size=2, images=8)


@pytest.mark.usefixtures("short_pretraining")
def test_a_run_is_trained_and_evaluated_once(few, tmp_path):
    run = run_of(MINI, "released", BLIP, 2)
    first = cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, profiles.PROFILES["smoke"])
    assert (first["arm"], first["captioner"], first["seed"]) == ("released", BLIP, 2) and first["images"] == {}
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1]
    for name, dataset in few.items():
        assert first["captions"][name].keys() == {example.image_id for example in dataset}
    before = (tmp_path / "result.json").stat().st_mtime_ns
    again = cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, profiles.PROFILES["smoke"])
    assert again == first and (tmp_path / "result.json").stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.part"))


def other_calls(config, few: dict[str, Dataset]):
    """Calls that want the same folder for something else, by the line that tells it."""
    smoke, three = profiles.PROFILES["smoke"], few | {"coco": few["coco"].subset(3)}
    soft = dataclasses.replace(config, losses=dataclasses.replace(config.losses, mode="soft"))
    return {
        "profile: 'smoke' there, 'mini' now": (config, few, {}, dataclasses.replace(smoke, name="mini")),
        "config.steps: 2 there, 4 now": (dataclasses.replace(config, steps=4), few, {}, smoke),
        "config.losses.mode: 'straight-through' there, 'soft' now": (soft, few, {}, smoke),
        "described.coco: ['miniature/coco/test', 6] there, ['miniature/coco/test', 3] now": (config, three, {}, smoke),
        "rendered.nocaps: None there, ['miniature/nocaps', 6] now": (config, few, {"nocaps": few["nocaps"]}, smoke),
        "evaluation.steps: 4 there, 6 now": (config, few, {}, dataclasses.replace(smoke, steps=6)),
    }


@pytest.mark.parametrize("left", ["result.json", "state.safetensors", "images"])
def test_a_run_without_a_record_is_refused(few, tmp_path, left):
    run, smoke = run_of(MINI, "cycle", BLIP), profiles.PROFILES["smoke"]
    (tmp_path / left).write_text("{}")
    with pytest.raises(RunFolderError, match="holds a run, but no run.json to say what it is made from"):
        cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, smoke)


def test_a_run_of_another_call_is_refused(few, tmp_path):
    run, smoke = run_of(MINI, "cycle", BLIP), profiles.PROFILES["smoke"]
    config = short(run)
    start = cycle_start.pretraining(BLIP, MINI)
    made = {"start": start, "datasets": few, "generated": {}, "profile": smoke}
    (tmp_path / "run.json").write_text(json.dumps(cycle_study.made_from(run, config, **made)))
    for line, call in other_calls(config, few).items():
        with pytest.raises(RunFolderError) as error:
            cycle_study.train_and_evaluate(run, call[0], tmp_path, *call[1:])
        assert f"{tmp_path}/run.json" in str(error.value) and "delete the folder" in str(error.value)
        assert [told.strip() for told in str(error.value).splitlines()[1:-1]] == [line]
    with pytest.raises(RunFolderError, match="arm: 'cycle' there, 'unlabelled' now"):
        cycle_study.train_and_evaluate(run_of(MINI, "unlabelled", BLIP), config, tmp_path, few, {}, smoke)


def test_a_run_of_other_weights_is_refused(few, tmp_path, monkeypatch):
    run, smoke = run_of(MINI, "cycle", BLIP), profiles.PROFILES["smoke"]
    made = cycle_study.made_from(run, short(run), cycle_start.pretraining(BLIP, smoke), few, {}, smoke)
    (tmp_path / "run.json").write_text(json.dumps(made))
    assert cycle_study.weights_of("blip-large") == registry.ENTRIES["blip-large"].revision
    files = registry.shipped_files

    def retrained(name):
        return [(path, "other" if name == BLIP else digest) for path, digest in files(name)]

    monkeypatch.setattr(registry, "shipped_files", retrained)
    with pytest.raises(RunFolderError) as error:
        cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, smoke)
    [told] = str(error.value).splitlines()[1:-1]
    assert told.strip().startswith(f"weights.{BLIP}: ")


def test_a_run_that_began_from_another_pretraining_is_refused(few, tmp_path, monkeypatch):
    run, smoke = run_of(MINI, "cycle", BLIP), profiles.PROFILES["smoke"]
    made = cycle_study.made_from(run, short(run), cycle_start.pretraining(BLIP, smoke), few, {}, smoke)
    (tmp_path / "run.json").write_text(json.dumps(made))
    (tmp_path / "result.json").write_text('{"captions": {}}')
    cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, smoke)
    monkeypatch.setattr(cycle_start, "PRETRAINING", cycle_start.PRETRAINING | {"steps": 7})
    with pytest.raises(RunFolderError, match=r"start\.steps: 120 there, 7 now"):
        cycle_study.train_and_evaluate(run, short(run), tmp_path, few, {}, smoke)


def test_each_profile_has_runs_of_its_own(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(cycle_study, "work", lambda wanted, folder, *others: given.append(folder.relative_to(tmp_path)))
    for options in (["--profile", "smoke"], ["--profile", "mini"], ["--profile", "mini", "--trials"]):
        monkeypatch.setenv(profiles.VARIABLE, "smoke")
        cycle_study.main(["--runs", str(tmp_path), *options])
    assert list(map(str, given)) == ["cycle-smoke", "cycle-mini", "cycle-mini/trials"]


@pytest.mark.usefixtures("short_pretraining")
def test_what_another_process_works_on_is_left_to_it(few, tmp_path):
    smoke = profiles.PROFILES["smoke"]
    runs = {run: short(run) for run in (Run(START, BLIP), Run(START, MINI.captioners[1]))}
    with FileLock(tmp_path / "blip-start.lock"):
        cycle_study.work(runs, tmp_path, few, smoke, 6)
    assert [path.parent.name for path in tmp_path.glob("*/result.json")] == ["blip-large-start"]
    cycle_study.work(runs, tmp_path, few, smoke, 6)
    assert len(list(tmp_path.glob("*/result.json"))) == 2


class Copies:
    """Renders "caption 0" and "caption 1" as images 0 and 1, and "caption 2" as image 0; is killed at some call."""

    def __init__(self, dataset: Dataset, killed_at: int | None = None):
        self.dataset, self.killed_at, self.rendered = dataset, killed_at, []

    def render(self, captions, seeds, steps, guidance_scale, batch_size):
        assert captions == [f"caption {seed}" for seed in seeds] and len(seeds) <= 2
        assert (steps, guidance_scale) == (MINI.steps // 2, MINI.guidance_scale)
        if len(self.rendered) == self.killed_at:
            raise KeyboardInterrupt
        self.rendered.append(list(seeds))
        return [self.dataset.open(self.dataset.examples[(0, 1, 0)[seed]]) for seed in seeds]


def embed(images):
    return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)).flatten() for image in images])


def evaluated_copies(generator: Copies, folder: Path) -> dict[str, list]:
    def extract(images):
        return SimpleNamespace(features=torch.arange(len(images))[:, None].float())

    models = SimpleNamespace(embed=embed), SimpleNamespace(extract=extract)
    return cycle_study.evaluate_generator(
        generator, generator.dataset, folder, dataclasses.replace(MINI, batch_size=2), *models
    )


@pytest.fixture
def three(tmp_path):
    """Three images, and a caption of each."""
    for i, image in enumerate(tiny.pictures(3)):
        image.save(tmp_path / f"{i}.png")
    return Dataset("some", tuple(Example(i, tmp_path / f"{i}.png", (f"caption {i}",)) for i in range(3)))


def test_generated_images_are_kept_and_compared_with_the_image_whose_caption_they_have(three, tmp_path):
    found = evaluated_copies(Copies(three), tmp_path / "generated")
    first, _, third = embed([three.open(example) for example in three])
    other = 100 * (1 - torch.cosine_similarity(first, third, dim=0).item())
    assert found["clip_distance"] == pytest.approx([0, 0, other], abs=1e-3) and other > 1
    assert found["image_id"] == [0, 1, 2] and found["features"] == [[0.0], [1.0], [2.0]]
    for i, copied in enumerate((0, 1, 0)):
        kept, original = tmp_path / f"generated/{i}.png", tmp_path / f"{copied}.png"
        assert np.array_equal(Image.open(kept), Image.open(original))


def test_an_evaluation_that_was_killed_renders_only_what_is_missing(three, tmp_path):
    whole = evaluated_copies(Copies(three), tmp_path / "whole")
    killed, again = Copies(three, killed_at=1), Copies(three)
    with pytest.raises(KeyboardInterrupt):
        evaluated_copies(killed, tmp_path / "killed")
    assert evaluated_copies(again, tmp_path / "killed") == whole
    assert (killed.rendered, again.rendered) == ([[0, 1]], [[2]])
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["0.png", "1.png", "2.png"]


# ── what is made of the runs ─────────────────────────────────────────────────────────────────────────────────────────


def evaluated_runs(values: dict[tuple[str, int], np.ndarray], metric: str = "cider") -> EvaluatedRuns:
    """Runs with a value for each of 60 images, whose metric is their mean."""
    table = np.stack(list(values.values()))
    domain = np.array(["in-domain", "near-domain", "out-domain"] * 20, dtype=object)
    return EvaluatedRuns(tuple(values), domain, {metric: lambda runs, images: table[runs][:, images].mean(axis=1)})


def arms(levels: dict[str, float], seeds: int = 3, noise: float = 0.01) -> EvaluatedRuns:
    rng, images = np.random.default_rng(0), np.random.default_rng(1).standard_normal(60)
    runs = {(START, 0): images + levels[START]}
    for arm, level in levels.items():
        for seed in range(seeds * (arm != START)):
            runs[arm, seed] = images + level + noise * rng.standard_normal(60)
    return evaluated_runs(runs)


def test_differences_are_paired_by_seed_and_image():
    runs = arms({START: 0.0, "cycle": 1.0, "labels": 0.5})
    alone, apart = runs.value("cider", "cycle"), runs.value("cider", "cycle", "labels")
    assert apart.value == pytest.approx(0.5, abs=0.01) and apart.high - apart.low < 0.05 < alone.high - alone.low
    assert runs.value("cider", "cycle", START).value == pytest.approx(1.0, abs=0.01)
    per_seed = {seed: 10.0 * seed for seed in range(3)}
    shifted = {("cycle", s): np.full(60, level) for s, level in per_seed.items()}
    shifted |= {("labels", s): np.full(60, level - 2) for s, level in per_seed.items()}
    paired = evaluated_runs(shifted).value("cider", "cycle", "labels")
    assert (paired.low, paired.high) == pytest.approx((2, 2))


def test_a_domain_is_its_own_images_and_seeds_that_one_arm_lacks_are_left_out():
    values = np.array([0.0, 5.0, 9.0] * 20)
    runs = evaluated_runs({("cycle", 0): values, ("cycle", 1): values + 7, ("labels", 0): values - 1})
    out = runs.value("cider", "cycle", domain="out-domain")
    assert (out.value, out.n) == (pytest.approx(9 + 3.5), 20)
    assert runs.value("cider", "cycle", "labels").value == pytest.approx(1)
    assert runs.seeds("cycle") == [0, 1] and runs.seeds("text") == []


def found(levels: dict[str, float], images: dict[str, float] | None = None) -> StudyResults:
    """Levels of CIDEr, F1 a hundredth of it, and of the generated images' distances, where they are others."""
    captions, by_generator = with_f1(arms(levels)), of_images(arms(images or levels))
    corpora = ("nocaps", "coco")
    return StudyResults({name: {BLIP: captions} for name in corpora}, {name: {BLIP: by_generator} for name in corpora})


def with_f1(runs: EvaluatedRuns) -> EvaluatedRuns:
    cider = runs.scores["cider"]
    return dataclasses.replace(runs, scores={"cider": cider, "f1": lambda *which: cider(*which) / 100})


def of_images(runs: EvaluatedRuns) -> EvaluatedRuns:
    return dataclasses.replace(runs, scores=dict.fromkeys(("clip_distance", "fid"), runs.scores["cider"]))


def claims_of_captions(study: StudyResults):
    runs = study.captions["nocaps"][BLIP]
    return [
        claim for [claim] in (cycle_claims.claim_9(study), cycle_claims.claim_11(runs), cycle_claims.claim_12(runs))
    ]


PAPER = dict(zip(TABLE_9, (111.8, 110.9, 110.2, 109.7, 102.3), strict=True)) | {START: 108.0, "labels-longer": 109.0}


def test_the_claims_hold_of_the_papers_own_order_and_not_of_its_reverse():
    nine, eleven, twelve = claims_of_captions(found(PAPER))
    assert (nine.verdict, eleven.verdict, twelve.verdict) == ("holds",) * 3
    assert nine.effect.value == pytest.approx(3.8, abs=0.01) and nine.seeds == [0, 1, 2]
    assert eleven.effect.value == pytest.approx(2.1, abs=0.01) and "without the reconstruction losses" in eleven.text
    assert twelve.effect.value == pytest.approx(1) and len(twelve.secondary) == 4
    other = found({arm: -level for arm, level in PAPER.items()})
    assert {claim.verdict for claim in claims_of_captions(other)} == {"does not hold"}


def test_images_are_better_where_they_are_nearer():
    [claim] = cycle_claims.claim_10(found({START: 40.4, "labels": 40.8, "cycle": 39.8}))
    assert claim.verdict == "holds" and claim.effect.value == pytest.approx(0.6, abs=0.01)  # the start is the rival
    assert "than those of the start" in claim.text and claim.effect.n == 20
    [claim] = cycle_claims.claim_10(found({START: 40.4, "labels": 39.5, "cycle": 39.8}))
    assert claim.verdict == "does not hold" and "than those of labels only" in claim.text


def test_a_claim_names_the_seeds_of_the_comparison_that_decides():
    def world(levels: dict[str, tuple[float, list[int]]]) -> EvaluatedRuns:
        noise = np.random.default_rng(0).standard_normal(60)
        return evaluated_runs({(arm, seed): noise + level for arm, (level, seeds) in levels.items() for seed in seeds})

    runs = world({START: (0, [0]), "cycle": (5, [0, 1, 2]), "labels": (4, [0]), "reconstruction": (1, [0, 1, 4])})
    [claim] = cycle_claims.claim_11(runs)
    assert "without the reconstruction losses" in claim.text and claim.seeds == [0]
    [claim] = cycle_claims.claim_11(
        world({"cycle": (5, [0, 1, 2]), "labels": (1, [0]), "reconstruction": (4, [1, 2, 4])})
    )
    assert "without the labels" in claim.text and claim.seeds == [1, 2]
    assert not cycle_claims.claim_11(world({"cycle": (5, [0]), "labels": (1, [0]), "reconstruction": (4, [1])}))
    images = of_images(world({START: (3, [0]), "labels": (9, [0]), "cycle": (2, [0, 1])}))
    [claim] = cycle_claims.claim_10(StudyResults({}, {"nocaps": {BLIP: images}}))
    assert "than those of the start" in claim.text and claim.seeds == [0, 1]
    seeds = {arm: (1.0 * i, list(range(5 - i))) for i, arm in enumerate(TABLE_9)}
    [claim] = cycle_claims.claim_12(world(seeds))
    assert claim.seeds == [0]
    assert not cycle_claims.claim_12(world(seeds | {"labels": (1.0, [7])}))


def unfinished(runs: list[Run]) -> StudyResults:
    """What the tables and claims would be made of, were these the runs that are done."""

    def of(captioner: str, own: list[Run]) -> EvaluatedRuns:
        rng = np.random.default_rng(0)
        values = {(run.arm, run.seed): rng.standard_normal(60) for run in own}
        return dataclasses.replace(evaluated_runs(values), resamples=4, resamples_of_sets=2)

    captions, images = {}, {}
    for captioner in dict.fromkeys(run.captioner for run in runs):
        own = [run for run in runs if run.captioner == captioner]
        captions[captioner] = with_f1(of(captioner, own))
        shared = [run for run in runs if run.captioner == BLIP and run.arm in (START, *TABLE_3[:2])]
        own = [run for run in own if run.generates] + shared * (captioner != BLIP)
        images |= {captioner: of_images(of(captioner, own))} if own else {}
    return StudyResults(dict.fromkeys(("nocaps", "coco"), captions), {"nocaps": images})


def test_an_unfinished_study_has_tables_and_claims(monkeypatch, tmp_path):
    monkeypatch.setattr(cycle_report.pages, "current_commit", lambda: "0")
    runs, sizes = list(queue(MINI)), {"nocaps": 60, "coco": 60, "rendered": 60}
    stopped = [runs[:n] for n in range(1, len(runs) + 1)]
    # several processes finish in any order: one run is missing, or every second arm or captioner has another seed
    of_one_seed = [run for run in runs if run.seed == 0]
    apart = [run for run in runs if run.arm == START or run.seed == list(ARMS).index(run.arm) % 2]
    crossed = [run for run in runs if run.arm == START or run.seed == (run.captioner == BLIP)]
    for done in [
        *stopped,
        apart,
        crossed,
        *([run for run in of_one_seed if run != missing] for missing in of_one_seed),
    ]:
        study = unfinished(done)
        of_first = study.captions["nocaps"][BLIP]
        claims = [*cycle_claims.claim_9(study), *cycle_claims.claim_10(study)]
        claims += [*cycle_claims.claim_11(of_first), *cycle_claims.claim_12(of_first)]
        tables = cycle_report.all_tables(study, MINI)
        for name, table in tables.items():
            table.to_csv(tmp_path / f"{name}.csv", index=False)
            assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(table)
        assert f"from {len(done)} of the study's {len(runs)} runs" in "\n".join(
            cycle_report.page(tables, claims, MINI, sizes, len(done))
        )
    assert not [claim for done in stopped[:3] for claim in cycle_claims.claim_9(unfinished(done))]  # the starts alone


def test_captions_are_evaluated_run_by_run(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["a red bird on a boat", "two cats by a house", "a green tree at night", "a blue kite in the snow"]
    dataset = Dataset("some", tuple(Example(i, tmp_path, (texts[i % 4], texts[i % 4] + " today")) for i in range(12)))
    rows = []
    for arm, seed, right in (("cycle", 0, 1.0), ("cycle", 1, 0.5), (START, 0, 0.0)):
        for example in dataset:
            said = example.references[0] if rng.random() < right else "nothing of the kind"
            rows.append({"arm": arm, "seed": seed, "image_id": example.image_id, "caption": said})
    runs = cycle_comparison.evaluated_captions(pd.DataFrame(rows).sample(frac=1, random_state=0), dataset)
    assert runs.value("cider", "cycle").value > 100 > 20 > runs.value("cider", START).value
    worse = [row for row in rows if row["seed"] == 1]
    alone = cycle_comparison.evaluated_captions(pd.DataFrame(worse), dataset).value("cider", "cycle").value
    best = cycle_comparison.evaluated_captions(pd.DataFrame(rows[:12]), dataset).value("cider", "cycle").value
    assert runs.value("cider", "cycle").value == pytest.approx((alone + best) / 2)


def test_intervals_of_cider_are_recentred_over_images_and_runs(tmp_path):
    texts = ["a red bird on a boat", "two cats by a house", "a green tree at night", "a blue kite in the snow"]
    dataset = Dataset("some", tuple(Example(i, tmp_path, (texts[i % 4],)) for i in range(12)))
    rows = [{"arm": "cycle", "seed": 0, "image_id": i, "caption": texts[i % 4][: 9 + i]} for i in range(12)]
    runs = cycle_comparison.evaluated_captions(pd.DataFrame(rows), dataset, resamples=60)

    def score(images: np.ndarray) -> float:
        return runs.scores["cider"](np.array([0]), images)[0]

    found, moved = runs.value("cider", "cycle"), paired_bootstrap(score, 12, 60, recentred=True)
    assert (found.low, found.high) == pytest.approx((moved.low, moved.high))
    assert abs(moved.low - paired_bootstrap(score, 12, 60).low) > 0.5


def drawn(shifts: list[float], real: torch.Tensor, own: torch.Tensor) -> pd.DataFrame:
    """A run for each shift, its rows in another order than the pictures: features moved along the first axis."""
    return pd.DataFrame(
        [
            {"arm": "cycle", "seed": seed, "image_id": i, "clip_distance": 10.0 * seed + i, "features": row.tolist()}
            for seed, shift in enumerate(shifts)
            for i, row in reversed(list(enumerate(own + shift * torch.eye(real.shape[1])[0])))
        ]
    )


def test_images_are_evaluated_run_by_run(tmp_path):
    half = ["in-domain"] * 100 + ["out-domain"] * 100
    dataset = Dataset("some", tuple(Example(i, tmp_path, ("a",), domain) for i, domain in enumerate(half)))
    real, other = torch.randn(2, 200, 8, generator=torch.Generator().manual_seed(0))
    runs = cycle_comparison.evaluated_images(drawn([0.0, 3.0], real, real), dataset, real)
    assert runs.value("clip_distance", "cycle").value == pytest.approx(99.5 + 5)
    assert runs.value("clip_distance", "cycle", domain="out-domain").value == pytest.approx(149.5 + 5)
    assert runs.value("fid", "cycle").value == pytest.approx(9 / 2, abs=1e-3)  # the squared distance of the means
    moved = cycle_comparison.evaluated_images(drawn([3.0], real, real), dataset, real).value("fid", "cycle")
    assert (moved.low, moved.high) == pytest.approx((9, 9), abs=1e-2)  # drawn anew with the pictures that they are of
    alike = cycle_comparison.evaluated_images(drawn([0.0], real, other), dataset, real).value("fid", "cycle")
    assert alike.low < alike.value < alike.high  # fewer pictures, drawn twice, have a greater FID


def test_tables_have_a_row_an_arm_and_the_papers_values():
    study = found(PAPER)
    ninth = cycle_report.table_9(study.captions["nocaps"][BLIP])
    assert ninth["the paper"].tolist() == ["111.8", "110.9", "110.2", "109.7", "102.3"]
    assert ninth["CIDEr × 100"].str.startswith("11").tolist() == [True, True, True, False, False]
    third = cycle_report.table_3(study).set_index("trained by")["the paper: NoCaps / COCO"]
    assert third.tolist() == ["109.7 / 133.3", "", "", "111.8 / 134.6"]
    fourth = cycle_report.table_4(study, MINI)
    assert fourth["trained by"].tolist()[:2] == ["start", label_of("labels")]
    assert fourth["the paper: NoCaps"].tolist()[:2] == ["40.39 / 21.19", "40.77 / 24.32"]


def test_differences_in_the_tables_are_above_0_where_the_cycle_is_better_and_its_images_nearer():
    study = found(PAPER, images={START: 40.4, "labels": 40.8, "labels-longer": 40.5, "cycle": 39.8})

    def value(cell: str) -> float:
        return float(cell.partition(" ")[0])

    [row] = cycle_report.headline(study).to_dict("records")
    assert value(row["captions, CIDEr × 100"]) == pytest.approx(2.8, abs=0.05)  # 111.8 − 109.0, longer from labels
    assert value(row["F1"]) == pytest.approx(0.028, abs=0.001)
    assert value(row["images nearer, CLIP distance × 100"]) == pytest.approx(0.7, abs=0.01)  # 40.5 − 39.8
    ninth = cycle_report.table_9(study.captions["nocaps"][BLIP]).set_index("trained by")
    assert (ninth.loc[label_of("cycle"), ["minus cycle", "F1 minus cycle"]] == "").all()
    for arm in TABLE_9[1:]:
        less = PAPER[arm] - PAPER["cycle"]  # -0.9, -1.6, -2.1, -9.5
        assert value(ninth.loc[label_of(arm), "minus cycle"]) == pytest.approx(less, abs=0.05)
        assert value(ninth.loc[label_of(arm), "F1 minus cycle"]) == pytest.approx(less / 100, abs=0.001)
    explored = cycle_report.table_explored(study.captions["nocaps"][BLIP], ["reconstruction"])
    assert value(explored["minus cycle"][0]) == pytest.approx(-9.5, abs=0.05)
    assert value(explored["F1 minus cycle"][0]) == pytest.approx(-0.095, abs=0.001)
    assert value(cycle_report.table_3(study)["all − start"].iloc[-1]) == pytest.approx(3.8, abs=0.05)
    assert value(cycle_report.table_4(study, MINI)["all − start"].iloc[-1]) == pytest.approx(-0.6, abs=0.05)


def test_photographs_have_spice_or_nothing_where_the_miniature_has_f1():
    runs = arms({START: 0.0, "cycle": 1.0, "labels": 0.5})
    assert "F1" not in cycle_report.table_9(runs)
    spice = dataclasses.replace(runs, scores=runs.scores | {"spice": runs.scores["cider"]})
    assert "SPICE × 100" in cycle_report.table_9(spice)


def test_claim_14_is_what_the_counts_say(tmp_path):
    steps = [["at 512 px", 1.0, 9.0, 10.0, 30.0], ["at 256 px", 1.0, 9.0, 10.0, 14.0]]
    (tmp_path / "cycle-arithmetic.json").write_text(json.dumps({"steps": steps}))
    spent = dict(
        zip((*cycle_claims.BY_LABELS, *cycle_claims.BY_CYCLE, "joint"), (1.0, 3.0, 4.0, 6.0, 9.0), strict=True)
    )
    seconds = {name: [spent[name]] * 9 for name in sorted(spent)}  # their order says nothing
    entries = [{"captioner": name, "setting": "x", "seconds": seconds} for name in (BLIP, "another")]
    (tmp_path / "cycle-cost.json").write_text(json.dumps({"found": entries}))
    [claim] = cycle_claims.claim_14(tmp_path, BLIP)
    assert claim.verdict == "does not hold" and claim.effect.value == pytest.approx(1.4 - 2)
    spared = {what: effect.value for what, effect in claim.secondary.items()}
    assert spared == pytest.approx({"at 256 px": 0.2, "the miniature, timed (5th to 95th percentile), x": 1.4 - 1.25})


@pytest.fixture
def docs(tmp_path):
    """A folder for results, with what claim 14 is made of."""
    for name in ("results", "figures"):
        (tmp_path / "docs" / name).mkdir(parents=True)
    for name in (cycle_claims.COUNTED, cycle_claims.TIMED):
        (tmp_path / "docs/results" / name).write_text((ROOT / "docs/results" / name).read_text())
    return tmp_path / "docs"


@pytest.fixture(scope="module")
def nine():
    """Nine images of each test set."""
    return cycle_study.test_sets(MINI, 9)


def finish(run: Run, folder: Path, datasets: dict[str, Dataset], rng: np.random.Generator) -> None:
    """Leave what a run does that is done: as captions what somebody wrote, and some images."""
    captions = {name: {one.image_id: one.references[run.seed] for one in part} for name, part in datasets.items()}
    result = {"arm": run.arm, "captioner": run.captioner, "seed": run.seed, "captions": captions, "images": {}}
    (folder / "images/nocaps").mkdir(parents=True)
    if run.generates:
        result["images"]["nocaps"] = {
            "image_id": [one.image_id for one in datasets["nocaps"]],
            "clip_distance": [20 + run.seed] * 9,
            "features": rng.random((9, 64)).astype(np.float16).tolist(),
        }
        for one, image in zip(datasets["nocaps"], tiny.pictures(9), strict=True):
            image.save(folder / f"images/nocaps/{one.image_id}.png")
    (folder / "result.json").write_text(json.dumps(result))


RESAMPLES = {"resamples": 20, "resamples_of_sets": 5}


def test_everything_is_written_from_the_runs_that_are_done(nine, docs, tmp_path):
    rng, runs = np.random.default_rng(0), tmp_path / "runs"
    for run in list(queue(MINI))[:20]:
        finish(run, runs / run.name, nine, rng)
    tried = next(iter(trials(MINI)))
    finish(tried, runs / "trials" / tried.name, nine, rng)
    claims = cycle_report.write(runs, docs, MINI, nine, **RESAMPLES)
    assert [claim.number for claim in claims] == [9, 9, 9, 10, 10, 11, 12, 14]
    page = (docs / "results/cycle.md").read_text(encoding="utf-8")
    assert [page.count(f"Claim {n}: ") for n in (9, 10, 14)] == [3, 2, 1]
    assert "| larger BLIP | cycle: (1) to (4) | 1 |" in page
    assert "from 20 of the study's 71 runs" in page
    assert not (docs / "results/cycle-trials.md").exists()  # of twelve trials one is done
    board = json.loads((docs / "results/claims.json").read_text())["claims"]
    assert {row["claim"]: row["seeds"] for row in board if row["claim"] == 12} == {12: [0]}
    assert (docs / "figures/cycle_images.png").stat().st_size > 10_000
    fourth = pd.read_csv(docs / "results/cycle-table-4.csv")
    assert fourth["all"].str.startswith("20.").all()
    assert fourth.loc[fourth["trained with"] == "BLIP", "the paper: NoCaps"].tolist()[0] == "40.39 / 21.19"
    names = [f"results/cycle-table-{name}.csv" for name in ("headline", "3", "4", "9", "deviations")]
    before = [(docs / name).read_text() for name in names]
    shipped = {path: path.stat().st_mtime_ns for path in (docs / "results").glob("*.parquet")}
    again = cycle_report.write(tmp_path / "none", docs, MINI, nine, **RESAMPLES)
    assert [(docs / name).read_text() for name in names] == before
    assert [claim.effect for claim in again] == [claim.effect for claim in claims]
    assert len(shipped) == 2 and all(path.stat().st_mtime_ns == at for path, at in shipped.items())


def test_the_page_of_the_trials_has_the_sizes_that_made_them(nine, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(cycle_report, "development_sets", lambda profile: nine)
    monkeypatch.setattr(cycle_report, "RENDERED_IN_TRIALS", 9)
    described, rendered = {"nocaps": ["a", 9], "coco": ["b", 8]}, {"nocaps": ["a", 6]}
    made = {"config": {"steps": 7}, "described": described, "rendered": rendered}
    for run in trials(MINI):
        finish(run, tmp_path / run.name, nine, rng)
        (tmp_path / run.name / "run.json").write_text(json.dumps(made))
    _, about, *others = cycle_report.trials_page(tmp_path, MINI)
    assert about.startswith(
        "One seed, 7 steps, captions of 9 images of nocaps-dev and of 8 of coco's val split, generated images of 6 of "
    )
    assert others[-1].count("\n") == 6  # a row for each pair


@pytest.mark.parametrize("done", [1, 4])
def test_a_report_can_be_written_as_soon_as_the_first_run_is_done(nine, docs, tmp_path, done):
    for run in list(queue(MINI))[:done]:
        finish(run, tmp_path / "runs" / run.name, nine, np.random.default_rng(0))
    claims = cycle_report.write(tmp_path / "runs", docs, MINI, nine, **RESAMPLES)
    assert [claim.number for claim in claims] == [14]
    assert "The runs that it compares are not done yet." in (docs / "results/cycle.md").read_text(encoding="utf-8")


def test_what_a_report_lacks_is_told_before_the_bootstraps(nine, docs, tmp_path, monkeypatch):
    runs, results = list(queue(MINI))[:4], docs / "results"
    for run in runs:
        finish(run, tmp_path / "all" / run.name, nine, np.random.default_rng(0))
    for run in runs[:3]:
        finish(run, tmp_path / "fewer" / run.name, nine, np.random.default_rng(0))
    cycle_comparison.write_tables(*cycle_comparison.read_runs(tmp_path / "all"), results)
    before = (results / cycle_comparison.CAPTIONS).read_bytes()
    monkeypatch.setattr(cycle_report, "evaluate_runs", lambda *given, **resamples: pytest.fail("too late"))
    with pytest.raises(
        ValueError,
        match=r"of 4 runs with 72 captions, and here are 3 runs with 54 captions: finish .* or .* another --docs",
    ):
        cycle_report.write(tmp_path / "fewer", docs, MINI, nine, **RESAMPLES)
    assert (results / cycle_comparison.CAPTIONS).read_bytes() == before
    captions, _ = cycle_comparison.read_runs(tmp_path / "all")
    with pytest.raises(ValueError, match="here are 4 runs with 71 captions"):  # as of other images
        cycle_comparison.require_no_fewer(captions[1:], results)
    (results / cycle_claims.TIMED).unlink()
    for folder in ("all", "none"):
        with pytest.raises(FileNotFoundError, match="lacks cycle-cost.json, of claim 14: .*benchmarks/cycle.py"):
            cycle_report.write(tmp_path / folder, docs, MINI, nine, **RESAMPLES)


def test_a_table_that_cannot_be_written_leaves_the_earlier_one(nine, docs, tmp_path, monkeypatch):
    [run] = list(queue(MINI))[:1]
    finish(run, tmp_path / "runs" / run.name, nine, np.random.default_rng(0))
    cycle_report.write(tmp_path / "runs", docs, MINI, nine, **RESAMPLES)
    before = {path: path.read_bytes() for path in (docs / "results").glob("cycle-*.[cp]*")}
    assert len(before) == 9

    def full(table, path, **how):
        Path(path).write_bytes(b"half of")
        raise OSError("the disk is full")

    for written in ("to_parquet", "to_csv"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(pd.DataFrame, written, full)
            cycle_report.write(tmp_path / "runs", docs, MINI, nine, **RESAMPLES)
        assert {path: path.read_bytes() for path in before} == before


def test_without_a_run_it_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="`python -m dalleflamingo research cycle` makes them"):
        cycle_report.main(["--runs", str(tmp_path), "--docs", str(tmp_path)])


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_curves_are_the_losses_and_their_running_mean():
    log = [{"step": i, "caption" if i % 2 else "generation": float(i)} for i in range(8)]
    rows, mean = (line.get_ydata() for line in cycle_figures.curves(log, smooth=2).axes[0].lines)
    assert list(rows) == [1, 3, 5, 7] and list(mean) == [1, 2, 4, 6]


def test_every_gradient_that_is_there_is_written_with_its_norm():
    norms = {"caption": {"captioner": 0.5, "generator": 0.0}, "generation": {"captioner": 0.0, "generator": 2.0}}
    texts = {text.get_text() for axes in cycle_figures.gradient_flow(norms).axes for text in axes.texts}
    assert {"0.5", "2"} <= texts and "0" not in texts


def test_what_the_cycle_adds_is_drawn_as_it_was_measured():
    study = found(PAPER, {START: 40.4, "labels": 40.8, "labels-longer": 39.0, "cycle": 39.8})
    table = cycle_report.controls(study)
    added = table.set_index(["of", "minus"])["value"]
    assert added["captions"].tolist() == pytest.approx([3.8, 2.1, 2.8], abs=0.01)  # start, labels, for longer
    assert added["images"].tolist() == pytest.approx([0.6, 1.0, -0.8], abs=0.01)  # nearer is better
    captions, images = cycle_figures.controls(table).axes
    for axes, part in ((captions, table[table["of"] == "captions"]), (images, table[table["of"] == "images"])):
        assert [line.get_ydata()[0] for line in axes.lines[:3]] == part["value"].tolist()
        bars = [bar.get_segments()[0][:, 1].tolist() for bar in axes.collections]
        assert bars == part[["low", "high"]].to_numpy().tolist()


def test_captions_are_shown_before_and_after(tmp_path):
    [image] = tiny.pictures(1)
    image.save(tmp_path / "0.png")
    dataset = Dataset("some", (Example(0, tmp_path / "0.png", ("a",)),))
    table = pd.DataFrame([("start", 0, "a dog"), ("cycle", 0, "a cat")], columns=["arm", "image_id", "caption"])
    figure = cycle_figures.before_and_after(table, dataset, [0], {"start": "before", "cycle": "after"})
    assert ["before: a dog", "after: a cat"] == [text.get_text() for text in figure.texts][1:3]


# ── where the arms begin ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("short_pretraining")
def test_every_arm_begins_with_the_queries_of_one_pretraining(tmp_path):
    smoke = profiles.PROFILES["smoke"]
    checkpoint = cycle_start.pretrained(BLIP, smoke, tmp_path)
    before = checkpoint.stat().st_mtime_ns
    assert cycle_start.pretrained(BLIP, smoke, tmp_path).stat().st_mtime_ns == before  # made once
    shipped = load_captioner(smoke).model.state_dict()
    found = []
    for arm in (START, "cycle", "unlabelled", "released"):
        run = run_of(smoke, arm, BLIP)
        config = short(run)
        cycle, _, trainable = load_cycle(config, torch.device("cpu"), cycle_study.builder_of(run, smoke, tmp_path))
        found.append(torch.cat([parameter.detach().flatten() for parameter in trainable.parameters()]))
        for name, parameter in cycle.captioner.model.named_parameters():
            assert torch.equal(parameter, shipped[name]) == ("crossattention.self.query." not in name)
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_pretraining_with_other_settings_is_refused(tmp_path):
    config = dataclasses.asdict(cycle_start.pretraining(BLIP, MINI)) | {"steps": 60}
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip/done").touch()
    for written, told in ((None, "dataset: None there"), (config, "steps: 60 there, 120 now")):
        if written:
            (tmp_path / "blip/config.json").write_text(json.dumps(written))
        with pytest.raises(
            RunFolderError, match=f"config.json is of a pretraining with other settings:\n(.*\n)*  {told}"
        ):
            cycle_start.pretrained(BLIP, MINI, tmp_path)
    (tmp_path / "blip/config.json").write_text(json.dumps(config | {"steps": 120}))
    assert cycle_start.pretrained(BLIP, MINI, tmp_path) == tmp_path / "blip/state.safetensors"


# ── what the captioners' runs share ──────────────────────────────────────────────────────────────────────────────────


def test_what_labels_teach_the_generator_no_captioner_changes(tmp_path):
    folder = tiny_cycle.save_models(tmp_path)
    (folder / "blip2").mkdir()
    captioners = [folder / "blip", tiny.blip2(folder / "blip2")]

    def taught(captioner: Path, schedule: str = "alternating", **losses: float) -> torch.Tensor:
        """The generator's queries after two steps of each model; AdamW's first one has no scale."""
        settings = dict(steps=4, schedule=schedule, max_grad_norm=0.01)
        config = dataclasses.replace(SMALL, losses=dataclasses.replace(SMALL.losses, **losses), **settings)
        models = Captioner.from_pretrained(str(captioner)), Generator.from_pretrained(str(folder / "sd"))
        cycle, batches, trainable = build_cycle(config, *models, tiny_cycle.dataset(folder))
        run = tmp_path / f"{captioner.name}-{schedule}-{len(losses)}"
        train_cycle(config, cycle, batches, trainable, run, Accelerator(cpu=True))
        return torch.cat([one.detach().flatten() for one in trainable.modules["generator"].parameters()])

    labels = ARMS["labels"].losses
    one, other = (taught(captioner, **labels) for captioner in captioners)
    before = generator_parameters(Generator.from_pretrained(str(folder / "sd"))).values()
    assert torch.equal(one, other) and not torch.equal(one, torch.cat([part.detach().flatten() for part in before]))
    # with the cycle, or where a step trains both models within one bound on the gradient's norm, it does
    assert not torch.equal(*(taught(captioner) for captioner in captioners))
    assert not torch.equal(*(taught(captioner, "joint", **labels) for captioner in captioners))


def test_real_models_begin_as_they_were_published(tmp_path):
    assert cycle_start.pretrained("blip-large", profiles.PROFILES["paper"], tmp_path) is None
    assert not list(tmp_path.iterdir())
    given = []
    cycle_start.beginning_with(None, lambda *models: given.append(models))("config", "captioner", "generator", "data")
    assert given == [("config", "captioner", "generator", "data")]
