"""What a learner wrote into the exercises is kept while the course is updated, and never lost."""

import json
from pathlib import Path

import pytest
from own_git import git

from dalleflamingo.course import answers

GIVEN = "# Exercise {} · difficulty 1/5\ndef {}(x):\n    raise NotImplementedError\n\n\n{} = checks.{}({})"
MINE = "def double(x):\n    return x + x  # «twice»"


def exercise(number: int, name: str) -> str:
    return GIVEN.format(number, *[name] * 4)


def cell(cell_id: str, source: str, kind: str = "code") -> dict:
    lines = source.splitlines(keepends=True)
    common = {"cell_type": kind, "id": cell_id, "metadata": {}, "source": lines}
    return common | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def write(root: Path, name: str, *cells: dict) -> Path:
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    notebook = {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def commit(root: Path) -> None:
    git(root, "add", "--all", "--", "notebooks")
    git(root, "commit", "--message", "the course")


def source(path: Path, cell_id: str) -> str:
    [found] = [one for one in json.loads(path.read_text(encoding="utf-8"))["cells"] if one["id"] == cell_id]
    return "".join(found["source"])


@pytest.fixture
def course(tmp_path):
    """A clone whose notebook `one` has two exercises, and the text of that notebook."""
    cells = cell("intro", "# One", "markdown"), cell("twice", exercise(1, "double")), cell("half", exercise(2, "half"))
    path = write(tmp_path, "one", *cells, cell("other", "x = 1"))
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path, path.read_text(encoding="utf-8")


def answer(root: Path, cell_id: str = "twice", old: str = "def double(x):\n    raise NotImplementedError", new=MINE):
    """The learner writes an answer into a notebook."""
    path = root / "notebooks/one.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for one in notebook["cells"]:
        if one["id"] == cell_id:
            assert old in "".join(one["source"])
            one["source"] = "".join(one["source"]).replace(old, new).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def saved(root: Path, name: str = "one") -> dict[str, str]:
    return answers.read_answers(root / "answers" / f"{name}.json")


def test_an_answer_returns_into_the_updated_exercise_with_its_new_number_and_check(course):
    root, given = course
    path = answer(root)
    report = answers.save(root)
    assert report.done == ["answers/one.json: 1 of 2 exercises have an answer of yours"] and not report.left
    assert saved(root) == {"twice": MINE}

    newer = given.replace("# Exercise 1 ", "# Exercise 4 ").replace("checks.double(", "checks.twofold(")
    path.write_text(newer, encoding="utf-8")
    commit(root)
    report = answers.restore(root)
    assert report.done == ["one.ipynb: of 1 saved answers 1 put back, 0 there already"] and not report.left
    assert answers.restore(root).done == ["one.ipynb: of 1 saved answers 0 put back, 1 there already"]
    expected = f"# Exercise 4 · difficulty 1/5\n{MINE}\n\n\ndouble = checks.twofold(double)"
    assert source(path, "twice") == expected
    assert path.read_text(encoding="utf-8") != newer
    answer(root, old=MINE, new="def double(x):\n    raise NotImplementedError")
    assert path.read_text(encoding="utf-8") == newer, "nothing but the answer was changed"


def test_a_cell_that_was_replaced_as_a_whole_is_an_answer_too(course):
    root, given = course
    path = answer(root, old=exercise(1, "double"), new=MINE)
    answers.save(root)
    path.write_text(given, encoding="utf-8")
    answers.restore(root)
    assert source(path, "twice") == exercise(1, "double").replace("def double(x):\n    raise NotImplementedError", MINE)


def test_nothing_is_saved_where_only_other_cells_changed(course):
    root, _ = course
    answer(root, "other", "x = 1", "x = 2")
    assert answers.save(root).done == ["No exercise differs from how it was given, so there is nothing to save."]
    assert not (root / "answers").exists()
    assert answers.restore(root).done == ["There are no saved answers; `answers save` writes them."]


def test_an_answer_that_was_committed_is_told_from_the_published_course(course):
    root, _ = course
    git(root, "branch", "published")
    git(root, "branch", "--set-upstream-to", "published")
    answer(root)
    commit(root)
    answers.save(root)
    assert saved(root) == {"twice": MINE}


def test_another_answer_in_the_notebook_is_kept(course):
    root, given = course
    path = answer(root)
    answers.save(root)
    path.write_text(given, encoding="utf-8")
    other = "def double(x):\n    return 2 * x"
    answer(root, new=other)
    before = path.read_bytes()
    [line] = answers.restore(root).left
    assert line == (
        "one.ipynb: Exercise 1 (cell twice) holds another answer, which is kept; its saved answer stays in "
        "answers/one.json"
    )
    assert path.read_bytes() == before and saved(root) == {"twice": MINE}


def test_an_older_answer_is_kept_beside_the_newer_one(course):
    root, _ = course
    answer(root)
    answers.save(root)
    for number in (1, 2):
        answer(root, old="twice" if number == 1 else "again 1", new=f"again {number}")
        [_, kept] = answers.save(root).done
        assert kept.endswith(f"kept in answers/one.{number}.json")
    assert saved(root, "one.1") == {"twice": MINE}
    assert "again 1" in saved(root, "one.2")["twice"] and "again 2" in saved(root)["twice"]
    assert len(answers.restore(root).done) == 1, "older files are not restored"


def test_an_answer_that_is_not_in_the_notebook_any_more_stays_saved(course):
    root, given = course
    path = answer(root)
    answers.save(root)
    path.write_text(given, encoding="utf-8")
    answer(root, "half", "raise NotImplementedError", "return x / 2")
    answers.save(root)
    assert set(saved(root)) == {"twice", "half"} and not (root / "answers/one.1.json").exists()


def test_the_answer_to_an_exercise_that_vanished_stays_in_its_file(course):
    root, given = course
    path = answer(root)
    answer(root, "half", "raise NotImplementedError", "return x / 2")
    answers.save(root)
    cells = [one for one in json.loads(given)["cells"] if one["id"] != "twice"]
    write(root, "one", *cells)
    commit(root)
    report = answers.restore(root)
    assert report.left == [
        "one.ipynb: the exercise of `def double(x):` (cell twice) is gone; its saved answer stays in answers/one.json"
    ]
    assert "return x / 2" in source(path, "half") and saved(root)["twice"] == MINE


def test_the_answers_of_a_notebook_that_vanished_stay_in_their_file(course):
    root, _ = course
    path = answer(root)
    answers.save(root)
    path.unlink()
    [line] = answers.restore(root).left
    assert line.startswith("one.ipynb is no longer part of the course") and saved(root) == {"twice": MINE}


DAMAGED = [
    ("<<<<<<< HEAD\n{", "git left the marks of a conflict"),
    ('{"cells": [', "Expecting"),
    ("[]", "no JSON object"),
    ('{"cells": [{"cell_type": "code", "source": []}]}', "no notebook with ids of cells (KeyError('id'))"),
]


@pytest.mark.parametrize(("text", "said"), DAMAGED)
def test_a_damaged_notebook_is_named_and_left_and_the_others_are_done(course, text, said):
    root, given = course
    second = write(root, "two", *json.loads(given)["cells"])
    commit(root)
    answer(root)
    second.write_text(text)
    report = answers.save(root)
    assert len(report.done) == 1 and saved(root) == {"twice": MINE}
    assert "two.ipynb" in report.left[0] and said in report.left[0] and second.read_text() == text

    second.write_text(given, encoding="utf-8")
    (root / "notebooks/one.ipynb").write_text(text)
    report = answers.restore(root)
    assert not report.done and said in report.left[0]
    assert (root / "notebooks/one.ipynb").read_text() == text


@pytest.mark.parametrize("text", ["{", '{"twice": "def double"}', '{"twice": 3}', '{"twice": [3]}'])
def test_a_damaged_file_of_answers_is_named_and_left(course, text):
    root, _ = course
    answer(root)
    (root / "answers").mkdir()
    (root / "answers/one.json").write_text(text)
    for action in (answers.save, answers.restore):
        [line] = action(root).left
        assert "answers/one.json is damaged" in line
    assert (root / "answers/one.json").read_text() == text


def test_without_git_it_is_said_that_a_clone_is_needed(tmp_path):
    write(tmp_path, "one", cell("twice", exercise(1, "double")))
    [line] = answers.save(tmp_path).left
    assert line.startswith("one.ipynb: git does not know") and "clone" in line


def test_the_command_ends_with_2_where_something_was_left(course, monkeypatch, capsys):
    root, given = course
    monkeypatch.setattr(answers, "ROOT", root)
    path = answer(root)
    assert answers.main(["save"]) == 0
    path.write_text(given, encoding="utf-8")
    answer(root, new="def double(x):\n    return 2 * x")
    assert answers.main(["restore"]) == 2
    assert "holds another answer" in capsys.readouterr().err
