"""The course kit: what an instructor hands out. COURSE.md says what to do with it.

    python course/handout.py FOLDER         the tree without the exercises' solutions, in a new folder
    python course/handout.py bug N FOLDER   the tree with its solutions and with bug N, or a `random` one

The tree is the files that git tracks, as they stand, without git's history. Neither holds the bugs and
their answers, nor the tests that tell which bug breaks what.
"""

import ast
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUGS = {path.name[0]: path for path in (ROOT / "course" / "bugs").glob("*.patch")}
SOLUTIONS = {  # exercise -> the functions whose bodies are its solution
    1: ["compute_gae"],
    2: ["Guider.forward", "Guider.act"],
    3: ["guider_loss"],
    4: ["learner_loss"],
    5: ["backtrack"],
}
LEFT_OUT = ("course/bugs/", "tests/test_course.py", "tests/test_documents.py")


def functions(source):
    """Name -> syntax tree of every function; a method's name is Class.method."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def without_bodies(source, names):
    """Python source with `raise NotImplementedError` for these bodies; signatures and docstrings stay.

    ValueError if there is no such function.
    """
    lines, found = source.splitlines(keepends=True), functions(source)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"magpo.py has no {', '.join(missing)}: correct SOLUTIONS in course/handout.py.")
    for node in sorted((found[name] for name in names), key=lambda node: -node.lineno):  # from the end
        first = node.body[0]
        start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
        lines[start : node.end_lineno] = [" " * first.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def copy_tree(folder):
    """Copy the tracked files to a new folder, without the answers; ValueError if that cannot be."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.split("\0")
    if "magpo.py" not in tracked:
        raise ValueError("The kit copies the files that git tracks, so it needs a git clone of the project.")
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder.")
    for name in filter(None, tracked):
        if not name.startswith(LEFT_OUT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def handout(folder, solved=()):
    """Write the tree to a new folder, without the solutions, but for those of the exercises in `solved`."""
    names = [name for exercise in SOLUTIONS if exercise not in solved for name in SOLUTIONS[exercise]]
    source = without_bodies((ROOT / "magpo.py").read_text(), names)
    copy_tree(folder)
    (folder / "magpo.py").write_text(source)


def bug(number, folder):
    """Write the tree with bug number 1.. to a new folder, or with a random one."""
    if not BUGS:
        raise ValueError("A hand-out holds no bugs: say this in the clone that it was made from.")
    if number == "random":
        number = random.choice(sorted(BUGS))  # not seeded: nobody should know which
    if number not in BUGS:
        raise ValueError(f"There is no bug {number}: name one of {', '.join(sorted(BUGS))}.")
    copy_tree(folder)
    # Hides a repository around the folder, in which git would skip the patch without a word
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    subprocess.run(
        ["git", "apply", "--unidiff-zero", BUGS[number].resolve()], cwd=folder, check=True, env=alone
    )


def main(words):
    """The command line; wrong words end in one sentence and exit code 2."""
    try:
        match words:
            case ["bug", number, folder]:
                bug(number, Path(folder))
            case [folder]:
                handout(Path(folder))
            case _:
                raise ValueError('Say "FOLDER" or "bug N FOLDER".')
    except ValueError as error:
        print(f"handout.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{words[-1]} is ready.")


if __name__ == "__main__":
    main(sys.argv[1:])
