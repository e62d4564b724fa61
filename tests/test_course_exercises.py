"""Every exercise is complete as the notebooks print it, and the notebooks run with all of them solved."""

import ast
import re

import exercises
import pytest

from dalleflamingo.course import run

OF_NOTEBOOK = {path: exercises.of(path) for path in exercises.NOTEBOOKS}
ALL = [(path, one) for path, given in OF_NOTEBOOK.items() for one in given]


def name(value) -> str | None:
    return value.stem if hasattr(value, "stem") else getattr(value, "cell", None)


@pytest.mark.parametrize(("path", "exercise"), ALL, ids=name)
def test_an_exercise_has_a_hint_a_common_mistake_and_a_solution(path, exercise):
    assert list(exercise.folded) == ["Hint", "Common mistake", "Solution"]
    assert all(text.strip() for text in exercise.folded.values())
    ast.parse(exercise.solution)


@pytest.mark.parametrize("path", OF_NOTEBOOK, ids=name)
def test_exercises_are_numbered_and_say_how_hard_and_how_long_they_are(path):
    for number, exercise in enumerate(OF_NOTEBOOK[path], start=1):
        title = exercises.TITLE.match(exercise.source)
        assert title and int(title[1]) == number, exercise.source.splitlines()[0]
        assert exercise.heading.startswith(f"### Exercise {number} · ")


@pytest.mark.parametrize(("path", "exercise"), ALL, ids=name)
def test_a_cell_that_is_replaced_as_a_whole_takes_no_other_name_with_it(path, exercise):
    """An exercise's cell defines what its solution defines, and imports nothing."""
    given, solution = ast.parse(exercise.source), ast.parse(exercise.solution)
    for node in given.body:
        assert isinstance(node, (ast.FunctionDef, ast.Assign, ast.Expr)), ast.unparse(node)
    assert names(given) == names(solution)


def names(module: ast.Module) -> set[str]:
    """What a cell defines."""
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    targets = [target for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    return functions | {target.id for target in targets}


@pytest.mark.parametrize("path", [path for path, given in OF_NOTEBOOK.items() if given], ids=name)
def test_a_notebook_runs_with_all_its_exercises_solved(path, tmp_path):
    solved = {one.cell: one.solved for one in OF_NOTEBOOK[path]}
    notebook = run.NotebookRun(path, run.environment("smoke", tmp_path))
    for cell in notebook.notebook.cells:
        cell.source = solved.get(cell.id, cell.source)
    notebook.run()
    assert notebook.failure is None
    printed = {
        cell.id: [line for output in cell.get("outputs", ()) for line in output.get("text", "").splitlines()]
        for cell in notebook.notebook.cells
    }
    code = [cell for cell in notebook.notebook.cells if cell.cell_type == "code"]
    checking = {cell.id for cell in code if re.search(r"\bchecks\.\w+\(", cell.source)}
    right = {cell for cell, lines in printed.items() if any(line.startswith("Right. ") for line in lines)}
    assert right == checking and len(right) == len(solved)
    lines = [line for part in printed.values() for line in part]
    assert not [line for line in lines if line.startswith(("Not done yet", "Not yet", "Not so"))]
