"""COCO and NoCaps in their real sizes as annotation files alone, and code that runs as far as data reaches.

Whether a notebook or a study asks for more images than a data set has is decided by its own code. `run` executes code
statement by statement with everything that needs a model or a pixel replaced by `UNKNOWN`. A statement that uses
`UNKNOWN` is given up, and what it would have assigned is unknown in turn. Everything else happens, and errors are
errors. Calls that read or divide data sets are noted, so that a test can see that all of them were reached.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from dalleflamingo.runs import RunFolderError

COCO = {"train": 82783, "restval": 30504, "val": 5000, "test": 5000}  # Karpathy's; 113,287 images to train with
NOCAPS = {"in-domain": 597, "near-domain": 2670, "out-domain": 1233}  # of 4,500 in validation
DATA_CALLS = {"load_dataset", "load_cycle", "subset", "by_domain"}


def write_headers(folder: Path, images_of_coco: Mapping[str, int] = COCO) -> dict[str, str]:
    """COCO with 5 captions an image and NoCaps with 10, no image files; the variables that name their folders."""
    coco, nocaps = folder / "coco", folder / "nocaps"
    for images in (coco / "train2014", coco / "val2014", nocaps / "images"):
        images.mkdir(parents=True)
    records = []
    for split, count in images_of_coco.items():
        place = "train2014" if split == "train" else "val2014"
        for i in range(len(records), len(records) + count):
            name, told = f"COCO_{place}_{i:012d}.jpg", [{"raw": f"A dog {i} on a mat, {k}."} for k in range(5)]
            records.append({"cocoid": i, "filepath": place, "filename": name, "split": split, "sentences": told})
        (coco / place / records[-1]["filename"]).touch()  # a data set without any image is refused
    (coco / "dataset_coco.json").write_text(json.dumps({"images": records}))
    domains = [domain for domain, count in NOCAPS.items() for _ in range(count)]
    images = [{"id": i, "file_name": f"{i:016x}.jpg", "domain": domain} for i, domain in enumerate(domains)]
    told = [(i, k) for i in range(len(images)) for k in range(10)]
    captions = [{"id": 10 * i + k, "image_id": i, "caption": f"A lion {i} in grass, {k}."} for i, k in told]
    (nocaps / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (nocaps / "images" / images[0]["file_name"]).touch()
    return {"DALLEFLAMINGO_COCO": str(coco), "DALLEFLAMINGO_NOCAPS": str(nocaps)}


class Unavailable(Exception):
    """Something was used that only a model, or an image's pixels, could give."""


def _refuse(*arguments, **named):
    raise Unavailable


class _Unknown:
    """Any use of it raises `Unavailable`."""

    __slots__ = ()


_USES = """getattr call iter next len bool getitem setitem contains enter exit str format int float index hash eq ne lt
    le gt ge add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow rpow neg and or array"""
for _use in _USES.split():
    setattr(_Unknown, f"__{_use}__", _refuse)
UNKNOWN = _Unknown()


def run(source: str, names: dict[str, object], replaced: Mapping[str, object]) -> tuple[set[str], set[str]]:
    """Run a module's source as far as data reaches.

    Args:
        source: of the module.
        names: its global names, changed in place.
        replaced: what these names stand for, whatever is imported or defined under them.
    Returns:
        the calls of `DATA_CALLS` in the source, and those that returned.
    Raises:
        whatever a statement raises that uses nothing unknown.
    """
    tree = ast.parse(source)
    calls, reached = _execute(tree, tree, names, replaced)
    return calls, reached


def run_function(
    function: Callable, arguments: Sequence[object], replaced: Mapping[str, object]
) -> tuple[set[str], set[str]]:
    """Call a function of a module as `run` runs a source; `replaced` stands for global names of its module."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = {**inspect.getmodule(function).__dict__, **replaced}
    calls, reached = _execute(tree, tree.body[0], names, {})
    names[function.__name__](*arguments)
    return calls, reached


def _execute(
    tree: ast.Module, block: ast.Module | ast.FunctionDef, names: dict[str, object], replaced: Mapping[str, object]
) -> tuple[set[str], set[str]]:
    """Execute a module whose `block` runs as far as data reaches; the second set fills as calls of data return."""
    watch, reached, tainted = _Watch(), set(), set()
    watch.visit(block)
    block.body = [part for one in block.body for part in _step(one, replaced)]

    def data_call(at: str, function: Callable, *arguments, **named):
        found = function(*arguments, **named)
        reached.add(at)
        return found

    def gave_up(error: Exception, used: set[str], bound: set[str], local: Mapping[str, object]) -> None:
        of_a_run = isinstance(error, (Unavailable, OSError, RunFolderError))  # no file that models would have written
        if not of_a_run and not used & tainted:
            raise error
        containers = {name for name in used if isinstance(local.get(name, names.get(name)), (dict, list, set))}
        tainted.update(bound | containers)  # a list may lack what the statement would have put into it

    def went_on(used: set[str], bound: set[str]) -> None:
        (tainted.update if used & tainted else tainted.difference_update)(bound)

    names |= dict(__data=data_call, __gave_up=gave_up, __went_on=went_on, __unknown=UNKNOWN, __replaced=replaced)
    exec(compile(ast.fix_missing_locations(tree), "<as far as data reaches>", "exec"), names)
    return watch.calls, reached


class _Watch(ast.NodeTransformer):
    """Notes the calls that read or divide a data set, and lets them tell when they have returned."""

    def __init__(self):
        self.calls: set[str] = set()

    def visit_Call(self, node: ast.Call) -> ast.Call:
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        at = f"line {node.lineno}: {ast.unparse(node)}"
        self.generic_visit(node)
        if name not in DATA_CALLS:
            return node
        self.calls.add(at)
        return ast.Call(ast.Name("__data", ast.Load()), [ast.Constant(at), node.func, *node.args], node.keywords)


def _step(statement: ast.stmt, replaced: Collection[str]) -> list[ast.stmt]:
    """The statement, given up where it uses what is not there; then the names that it binds are unknown.

    Its calls of data come first, one by one: whatever else the statement needs, they happen.
    """
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        bound = {(name.asname or name.name).partition(".")[0] for name in statement.names}
        return [statement, *_assign(bound & set(replaced), "__replaced[{!r}]")]
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement, *_assign({statement.name} & set(replaced), "__replaced[{!r}]")]
    first = [] if hasattr(statement, "body") else [_attempt(ast.Expr(call)) for call in _data_calls(statement)]
    attempt = _attempt(statement)
    for part in ("body", "orelse", "finalbody"):
        if inner := getattr(statement, part, None):
            setattr(statement, part, [one for each in inner for one in _step(each, replaced)])
    return [*first, attempt]


def _attempt(statement: ast.stmt) -> ast.stmt:
    named = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and not node.id.startswith("__")]
    used, bound = ({node.id for node in named if isinstance(node.ctx, kind)} for kind in (ast.Load, ast.Store))
    gave_up = ast.parse(f"__gave_up(__error, {used or 'set()'}, {bound or 'set()'}, locals())").body
    handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), "__error", [*gave_up, *_assign(bound, "__unknown")])
    went_on = ast.parse(f"__went_on({used or 'set()'}, {bound or 'set()'})").body
    return ast.Try([statement], [handler], went_on, [])


def _assign(names: Iterable[str], value: str) -> list[ast.stmt]:
    return [ast.parse(f"{name} = {value.format(name)}").body[0] for name in sorted(names)]


def _data_calls(node: ast.AST) -> list[ast.Call]:
    """The outermost calls of data in a statement; in a comprehension or lambda they depend on its variables."""
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)):
        return []
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "__data":
        return [node]
    return [call for child in ast.iter_child_nodes(node) for call in _data_calls(child)]
