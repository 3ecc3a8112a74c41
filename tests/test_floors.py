"""Imports go down the floors, and what is heavy or optional is imported only where it is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    ["schema", "layers", "files", "formats", "records", "container", "sizes", "window", "muon", "noise"],
    ["likelihoods", "flow", "decoder", "datasets"],
    ["encoder", "prior", "stacked", "data", "folder"],
    ["model"],
    ["objective", "sampling", "evaluation", "codes"],
    ["figures", "sweeps", "codec", "lossy"],
    ["compression", "training", "gallery", "tracking", "media", "charts", "keeping"],
    ["dashboard", "workspace", "report"],
    ["experiment", "launch"],
    ["commands"],
    ["export"],
    ["__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in (ROOT / "src" / "vlae").glob("*.py") if path.stem != "__init__")
FRAMEWORK = {"lightning", "hydra", "omegaconf", "wandb"}
WHERE_USED = {"wandb", "wandb_workspaces", "pooch", "constriction", "matplotlib", "optuna", "joblib", "submitit"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported; inside vlae, the module: `.layers` is `vlae.layers`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, ["vlae" if node.level else "", node.module]))
            yield from (f"vlae.{alias.name}" for alias in node.names) if home == "vlae" else [home]


def top(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """What is imported by importing the module itself."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from top(node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imports(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    assert path.stem in FLOOR, f"{path.name} stands on no floor"
    names = [name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.startswith("vlae.")]
    up = [name for name in names if FLOOR.get(name, -1) >= FLOOR[path.stem]]
    assert not up, f"{path.name}, floor {FLOOR[path.stem]}, imports {up}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_model_knows_no_framework(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    if path.stem != "data" and FLOOR.get(path.stem, 0) < FLOOR["training"]:
        assert not packages & FRAMEWORK


@pytest.mark.parametrize("path", [*FILES, ROOT / "train.py"], ids=lambda path: path.stem)
def test_optional_packages_are_imported_where_used(path: Path) -> None:
    packages = {name.split(".")[0] for name in top(ast.parse(path.read_text()))}
    assert not packages & WHERE_USED


@pytest.mark.parametrize(
    "command",
    [["-c", "import vlae; print(vlae.__version__, dir(vlae))"], ["train.py", "--help"], ["train.py", "--cfg", "job"]],
    ids=" ".join,
)
def test_torch_stays_away(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "vlae" in imported or "hydra" in imported
    assert not imported & {"torch", "lightning", "numpy", "scipy", "sklearn", "wandb", "matplotlib"}


def test_public_names_come_lazily() -> None:
    import vlae

    assert set(vlae.__all__) <= set(dir(vlae))
    for name in vlae.__all__:
        assert getattr(vlae, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'encoder_of_everything'"):
        _ = vlae.encoder_of_everything


@pytest.mark.parametrize(("name", "own"), [("OMP_WAIT_POLICY", "passive"), ("THP_MEM_ALLOC_ENABLE", "1")])
@pytest.mark.parametrize("users", [None, "", "another"])
def test_what_torch_reads_as_it_starts_is_set_unless_the_user_did(name: str, own: str, users: str | None) -> None:
    environment = {"PYTHONPATH": str(ROOT / "src")} | ({name: users} if users is not None else {})
    script = f"import vlae, os, sys; print(os.environ['{name}'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{own if users is None else users} False\n"
