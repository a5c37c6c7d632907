"""The course kit: what an instructor hands out. TUTORIAL.md, "Course kit", says what to do with it.

    python figures/kit.py handout FOLDER   the tree without its solutions, in a new folder
    python figures/kit.py bug N FOLDER     the tree with its solutions and with bug N, in a new folder

The tree is the files that git tracks, as they stand. Neither folder holds git's history, figures/bugs, what TUTORIAL.md
keeps behind a fold, or the tests that tell which test finds which bug.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUGS = sorted((ROOT / "figures" / "bugs").glob("*.patch"))
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^\1### END SOLUTION\n", re.M | re.S)
ANSWERS = {  # what to cut from other files; the markers are nbgrader's
    "TUTORIAL.md": re.compile(r"^<details>\n.*?^</details>\n", re.M | re.S),
    "test_magpo.py": re.compile(r"^### BEGIN HIDDEN TESTS\n.*?^### END HIDDEN TESTS\n", re.M | re.S),
}


def without_solutions(source):
    """Python source -> the same with `raise NotImplementedError` for every marked body; ValueError if there is none."""
    cut, count = SOLUTION.subn(r"\1raise NotImplementedError\n", source)
    if not count or "SOLUTION" in cut:
        raise ValueError("magpo.py has no solutions to cut, or a marker without its partner.")
    return cut


def copy_tree(folder):
    """Copy the tracked files to a new folder, without the answers to the bug hunt; ValueError if that cannot be."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    if "magpo.py" not in tracked:
        raise ValueError("The kit copies the files that git tracks, so it needs a git clone of the project.")
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder.")
    for name in filter(None, tracked):
        if not name.startswith("figures/bugs/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, answers in ANSWERS.items():
        (folder / name).write_text(answers.sub("", (folder / name).read_text()))


def handout(folder):
    """Write the tree without its solutions to a new folder."""
    source = without_solutions((ROOT / "magpo.py").read_text())
    copy_tree(folder)
    (folder / "magpo.py").write_text(source)


def bug(number, folder):
    """Write the tree with bug number 1.. to a new folder."""
    if number not in [patch.name.split("_")[0] for patch in BUGS]:
        raise ValueError(f"There is no bug {number} in figures/bugs.")
    copy_tree(folder)
    # Hides a repository around the folder, in which git would skip the patch without a word
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    subprocess.run(["git", "apply", BUGS[int(number) - 1].resolve()], cwd=folder, check=True, env=alone)


def main(words):
    """The command line; wrong words end in one sentence and exit code 2."""
    try:
        match words:
            case ["handout", folder]:
                handout(Path(folder))
            case ["bug", number, folder]:
                bug(number, Path(folder))
            case _:
                raise ValueError('Say "handout FOLDER" or "bug N FOLDER".')
    except ValueError as error:
        print(f"kit.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{words[-1]} is ready.")


if __name__ == "__main__":
    main(sys.argv[1:])
