"""setup.py's ranges, requirements.txt's pins, what the code imports, and what the container recipe copies: they agree."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.declared import ROOT, base_requirements, canonical, closure, extra_requirements, pins, setup_arguments

#: Imported only where an installation has them, and never installed by us.
FOREIGN = {"apex", "fused_layer_norm_cuda", "detectron2"}
#: Files that are only reached where an extra is installed; they may use all that it brings.
BEHIND_AN_EXTRA = {
    "opt_ds/ingest/importers/espeak_worker.py": "corpus", "opt_ds/ingest/importers/piper_worker.py": "corpus",
    "opt_ds/serving": "web",
}  # fmt: skip
#: The modules that cannot be imported without an extra.
NEEDS_AN_EXTRA = {
    "opt_ds.evaluation.ablation", "opt_ds.evaluation.caption_metrics",
    "opt_ds.evaluation.captioning", "opt_ds.evaluation.classification", "opt_ds.evaluation.summary",
    "opt_ds.evaluation.transcription", "opt_ds.serving.app",
    "opt_ds.evaluation.experiments.captioning", "opt_ds.evaluation.experiments.classification",
    "opt_ds.evaluation.experiments.summary", "opt_ds.evaluation.experiments.transcription",
}  # fmt: skip
_GUARDS = (ast.With, ast.Try, ast.FunctionDef, ast.AsyncFunctionDef)


def test_pins_lie_within_the_ranges() -> None:
    wanted = [*base_requirements(), *(one for several in extra_requirements().values() for one in several)]
    assert [r.name for r in wanted if canonical(r.name) not in pins()] == [], "requirements.txt pins every requirement"
    assert [f"{r} {pins()[canonical(r.name)]}" for r in wanted if not r.specifier.contains(pins()[canonical(r.name)])] == []


def test_every_import_is_declared_and_a_bare_one_is_a_base_requirement() -> None:
    base = {canonical(requirement.name) for requirement in base_requirements()}
    extra = {canonical(one.name) for several in extra_requirements().values() for one in several}
    packages = importlib.metadata.packages_distributions()
    with_extra = {folder: closure(extra_requirements()[extra]) for folder, extra in BEHIND_AN_EXTRA.items()}
    undeclared, bare = [], []
    for file in sorted((ROOT / "opt_ds").rglob("*.py")):
        owned = next((packages for folder, packages in with_extra.items() if file.is_relative_to(ROOT / folder)), set())
        for module, guarded in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module in sys.stdlib_module_names or module in FOREIGN | {"opt_ds"}:
                continue
            owners = {canonical(name) for name in packages.get(module, [])}
            where = f"{file.relative_to(ROOT)}: {module}"
            if not owners & (base | extra | owned):
                undeclared.append(where)
            elif not (guarded or owners & (base | owned)):
                bare.append(where)
    assert undeclared == [] and bare == []


def test_an_extra_is_needed_by_these_modules_alone() -> None:
    """Whatever imports one of them at its top needs the extra as well: `generate` and `pretrain` must not."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "opt_ds").rglob("*.py")}
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in trees}
    needing = {name for name, file in names.items() if any(map(_asks_for_an_extra, trees[file].body))} | {"opt_ds.serving.app"}
    while more := {name for name, file in names.items() if needing & set(_modules_at_the_top(trees[file]))} - needing:
        needing |= more
    assert needing == NEEDS_AN_EXTRA


def _asks_for_an_extra(node: ast.stmt) -> bool:
    return isinstance(node, ast.With) and "needs_extra" in ast.unparse(node.items[0])


def _modules_at_the_top(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules that importing this one imports."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of imported modules, and whether the import is behind a function, a `try` or `needs_extra`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0], guarded
        elif not _type_checking(node):
            yield from _imports(node, guarded or isinstance(node, _GUARDS))


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_package_takes_every_file_of_its_folder_along() -> None:
    tracked = subprocess.run(["git", "ls-files", "opt_ds"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    arguments = setup_arguments()
    data = {path.relative_to(ROOT) for pattern in arguments["package_data"]["opt_ds"] for path in (ROOT / "opt_ds").glob(pattern)}
    packages = {Path(*name.split(".")) for name in arguments["packages"]}
    for file in map(Path, tracked.stdout.splitlines()):
        assert (file.suffix == ".py" and file.parent in packages) or file in data, f"{file} is in no wheel: add it to setup.py"


def test_a_build_takes_the_pages_the_presets_and_the_mark_of_a_typed_package(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for file in ("py.typed", "serving/page.html", "presets/opt-base.yaml", "evaluation/experiments/retrieval.py"):
        assert (tmp_path / "opt_ds" / file).is_file(), f"a wheel would lack opt_ds/{file}"


def test_the_container_recipe_copies_what_the_build_needs() -> None:
    recipe = (ROOT / "slurm" / "opt_ds.def").read_text(encoding="utf-8")
    section = recipe.partition("%files\n")[2].partition("\n%")[0]
    copied = [Path(line.split()[0]) for line in section.splitlines() if line.strip()]
    needed = set(map(Path, ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.txt", "ds_configs")))
    needed |= {Path(name.split(".")[0]) for name in setup_arguments()["packages"]}
    needed |= set(map(Path, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["backend-path"]))
    needed |= {Path(name) for name in re.findall(r'"(\w[\w./]*)"', (ROOT / "setup.py").read_text()) if (ROOT / name).exists()}
    missing = [path for path in sorted(needed) if not any(path == one or one in path.parents for one in copied)]
    assert missing == [] and [path for path in copied if not (ROOT / path).exists()] == []
