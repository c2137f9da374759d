"""The words and the sizes of the code: unique public names, imperative docstrings, short files and functions."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for folder in ("llava_ray", "evals", "pipelines") for file in (ROOT / folder).rglob("*.py"))
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in FILES}

# Names that may be defined more than once: what every script has, and entry points that Serve finds by name.
SHARED_NAMES = {"WHEN_STOPPED", "logger", "main", "main_with_exit_code", "make_engine"}
# Two ideas with one name, to be renamed.
MAX_LINES, MAX_FUNCTION_LINES = 250, 60
# Longer files, to be split; no other may be added.
LONG_FILES = {
    "llava_ray/data/shards.py",
    "llava_ray/deployments/settings.py",
    "llava_ray/deployments/chat_page/page.py",
    "llava_ray/generate/builtin/builtin_engine.py",
    "llava_ray/generate/builtin/running_batch.py",
    "llava_ray/generate/vllm/vllm_engine.py",
    "llava_ray/model/lora/adapters.py",
    "llava_ray/model/tensors/tensor_files.py",
    "llava_ray/replies.py",
    "llava_ray/report/pieces.py",
    "llava_ray/review/ledger_file.py",
    "llava_ray/review/reviewer.py",
    "llava_ray/runtime.py",
    "llava_ray/train/planning/memory.py",
    "pipelines/review_results.py",
}
LONG_FUNCTIONS: set[str] = set()
MIN_IMPERATIVE = 0.97
QUESTION_WORDS = {"What", "How", "Which", "Who", "Whose", "Whether", "Where", "When", "Why"}
# First words that are no verbs in the imperative. Third persons ("Returns") and participles are found by their ends.
NOT_VERBS = QUESTION_WORDS | {
    "A", "An", "The", "All", "Any", "Each", "Every", "One", "Two", "Both", "No", "None", "Nothing", "Its", "It",
    "Their", "Our", "This", "That", "These", "Those", "If", "For", "Of", "On", "In", "At", "By", "As", "From", "With",
    "Without", "Before", "After", "Between", "Per", "Until", "While", "Also", "Only", "Same", "Where", "There",
    "Length", "Width", "Height", "Number", "Bytes", "Rows", "Columns", "Folder", "Images", "Tokens", "Threads",
    "Seconds", "Sides", "Questions", "Weights", "Gradients", "Activations", "Logits", "Bars", "Calls", "Word", "Time",
    "Sum", "Upper", "Lower-case", "API",
}  # fmt: skip
VERBS_IN_S = {"Access", "Address", "Bias", "Compress", "Discuss", "Express", "Focus", "Guess", "Pass", "Process"}
VERBS_IN_ED_OR_ING = {"Bring", "Embed", "Exceed", "Feed", "Need", "Proceed", "Seed", "Shed", "Speed", "String"}


def public_names() -> dict[str, list[str]]:
    """Return the modules that define each public top-level name; type variables are left out."""
    names = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            for name in defined(node):
                if not name.startswith("_"):
                    names[name].append(module)
    return names


def defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(("TypeVar", "ParamSpec")):
            return
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def docstrings(*kinds: type[ast.AST]) -> Iterator[tuple[str, str]]:
    """Yield the place and the first line of each docstring of these kinds of nodes."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield f"{module}:{getattr(node, 'lineno', 1)}", text.splitlines()[0]


def is_imperative(line: str) -> bool:
    word = line.split()[0].rstrip(".,:;")
    if not word[0].isupper() or not word.replace("-", "").isalpha() or word in NOT_VERBS:
        return False
    if word.endswith("s"):
        return word in VERBS_IN_S
    return word in VERBS_IN_ED_OR_ING or not word.endswith(("ed", "ing", "tion", "ness"))


def test_public_names_are_unique() -> None:
    twice = {name: modules for name, modules in public_names().items() if len(modules) > 1}
    assert twice.keys() <= SHARED_NAMES, twice


def test_functions_docstrings_are_imperative() -> None:
    lines = list(docstrings(ast.FunctionDef, ast.AsyncFunctionDef))
    others = [f"{place} {line}" for place, line in lines if not is_imperative(line)]
    print(f"{len(lines) - len(others)} of {len(lines)} docstrings of functions begin with an imperative verb")
    assert len(others) <= (1 - MIN_IMPERATIVE) * len(lines), "\n".join(others)


@pytest.mark.parametrize("kind", [ast.ClassDef, ast.Module])
def test_docstrings_of_things_do_not_begin_with_a_question(kind: type[ast.AST]) -> None:
    lines = list(docstrings(kind))
    questions = [f"{place} {line}" for place, line in lines if line.split()[0] in QUESTION_WORDS]
    assert len(questions) <= (1 - MIN_IMPERATIVE) * len(lines), "\n".join(questions)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Return the words.", True),
        ("Memory-map a tensor.", True),
        ("Process a batch.", True),
        ("Embed tokens.", True),
        ("Returns the words.", False),
        ("What the words are.", False),
        ("The words.", False),
        ("``words`` of it.", False),
        ("Reading of words.", False),
        ("Quantisation of it.", False),
    ],
)
def test_an_imperative_is_recognised(line: str, expected: bool) -> None:
    assert is_imperative(line) is expected


def test_files_are_short() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in FILES}
    long = {file for file, length in lengths.items() if length > MAX_LINES}
    assert long - LONG_FILES == set()
    assert {file for file in LONG_FILES if file in lengths} - long == set(), "short by now: take them off the list"


def test_functions_are_short() -> None:
    long = {
        f"{module}: {node.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long <= LONG_FUNCTIONS
