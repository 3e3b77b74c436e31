"""The package as others meet it: installed from its wheel, imported, and read."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

# every part may import those after it, and none before it
FLOORS = [
    "cli",
    "measure",
    "fitting",
    "costs",
    "rehearsal",
    "explanation",
    "graphs",
    "capturable",
    "models",
    "backbones",
    "layers",
    "io",
    "functional",
    "recording",
    "kernels",
    "core",
]


def python(*args, cwd, **environment):
    """Run Python away from the checkout, and return what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CASSETTA_BACKEND")}
    done = subprocess.run(
        [*args], cwd=cwd, env={**env, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources():
    for folder in ("cassetta", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "kernels" not in path.relative_to(ROOT).parts[1:]:  # the link in cassetta/
                yield path


def part_of(module):
    """The part of the package that a dotted name belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "cassetta" and len(parts) > 1 else None


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    for path in sources():
        place = path.relative_to(ROOT).with_suffix("").parts
        own = "kernels" if place[0] == "kernels" else place[1]
        if own in ("__init__", "__main__"):
            continue
        for module in imported_modules(path):
            other = part_of(module)
            if other in FLOORS:
                assert FLOORS.index(other) >= FLOORS.index(own), f"{path} imports {module}"


def test_kernels_import_only_kernels():
    """They take tensors and tuples, and could be lifted out of this package as they are."""
    for path in sources():
        if path.relative_to(ROOT).parts[0] == "kernels":
            for module in imported_modules(path):
                inside = module.startswith("cassetta.kernels.")
                assert inside or not module.startswith("cassetta"), f"{path} imports {module}"


def test_functions_are_short():
    """Kernels may be longer: they have more to say of where they are."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.body[0].end_lineno
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                is_kernel = "triton.jit" in decorators or "gluon.jit" in decorators
                assert length <= (70 if is_kernel else 50), f"{path}: {node.name}: {length} lines"


UNTRACED = {
    ("layers", "backbones", "models", "functional", "core", "kernels"): [
        r"isinstance\([^()]*\|",  # unions of types
        r"\bnext\(\(?\w.* for ", r"\bvars\(", r" in \w+\.values\(\) for ", r"\*self\[:",
    ],
    ("layers", "backbones", "models", "functional"): [  # kernels are called by operators
        r"\._replace\(", r"\.remove\(", r"\bany\(\w+ (not )?in ", r"self\._fields",
    ],
    ("layers", "backbones", "models"): [  # where self is a module
        r"\w+(, \*?\w+)+ = self$", r"enumerate\(self\)", r"zip\(self,",
    ],
}  # fmt: skip
"""What torch 2.8 to 2.11 cannot trace, and the newest can."""


def test_nothing_that_runs_in_a_network_is_beyond_the_oldest_tracer():
    for path in sources():
        for folders, patterns in UNTRACED.items():
            if set(folders) & set(path.relative_to(ROOT).parts):
                for pattern in patterns:
                    found = re.search(pattern, path.read_text(), re.MULTILINE)
                    assert not found, f"{path}: {found}"


def test_tuples_that_networks_make_have_no_properties():
    """Torch 2.8 cannot trace them."""
    for path in sources():
        parts = path.relative_to(ROOT).parts
        if parts[1] in ("layers", "backbones", "models", "functional", "types.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
                    assert "@property" not in ast.unparse(node), f"{path}: {node.name}"


def test_functions_within_functions_take_no_unions_of_types():
    """Torch 2.8 cannot trace them, since their annotations are evaluated when they are made."""
    for path in sources():
        if path.relative_to(ROOT).parts[1] in ("layers", "backbones", "models", "functional"):
            for outer in ast.walk(ast.parse(path.read_text())):
                for inner in outer.body if isinstance(outer, ast.FunctionDef) else []:
                    if isinstance(inner, ast.FunctionDef):
                        assert "|" not in ast.unparse(inner).split("\n")[0], f"{path}: {inner.name}"


def test_only_the_kernels_know_of_devices_and_triton():
    asks = re.compile(r"\bis_cuda\b|\btorch\.cuda\b|\bimport triton\b|\bfrom triton\b")
    for path in sources():
        if {"kernels", "cli", "measure", "graphs.py"} & {*path.relative_to(ROOT).parts[:2]}:
            continue
        assert not asks.search(path.read_text()), path


def test_files_and_lines_are_short():
    for path in sources():
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_listed_packages_are_those_in_the_tree():
    listed = re.search(r"^packages = \[(.*?)\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1]
    folders = {p.parent.relative_to(ROOT) for p in sources() if p.name == "__init__.py"}
    found = {".".join(f.parts).replace("kernels", "cassetta.kernels") for f in folders}
    assert set(re.findall(r'"(.*?)"', listed)) == found
    assert (ROOT / "cassetta" / "kernels").resolve() == ROOT / "kernels"


def test_importing_cassetta_imports_only_what_most_programs_need(tmp_path):
    late = ["triton", "rich", "interpol", "nibabel", "nilearn", "matplotlib", "scipy", "pandas"]
    code = f"import sys, cassetta; print([m for m in {late} if m in sys.modules])"
    found = python(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert found.strip() == "[]"


LONGEST_IMPORT = 0.2
"""Seconds that `import cassetta` may take beyond `import torch`."""


def test_importing_cassetta_is_quick(tmp_path):
    """By the least of five processes: what a busy machine adds to one of them is not ours.

    CPU time, after a first process has compiled the sources, as pip does when it installs them.
    """
    code = (
        "import time, torch; start = time.process_time(); import cassetta;"
        "print(time.process_time() - start)"
    )
    shutil.copytree(ROOT / "cassetta", tmp_path / "cassetta")
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    line = [sys.executable, "-c", code]
    seconds = [float(python(*line, cwd=tmp_path, **env)) for _ in range(6)]
    assert min(seconds[1:]) <= LONGEST_IMPORT, seconds


def test_kernels_at_the_root_cannot_be_imported_twice():
    line = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is cassetta.kernels" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    python(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in sources():
        place = str(path.relative_to(ROOT))
        assert place.replace("kernels/", "cassetta/kernels/", 1) in names
    assert "cassetta/py.typed" in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    assert not any("ptxsim" in name for name in names)  # the simulator is for tests


def test_the_wheel_installed_works_from_another_folder(wheel, tmp_path):
    """Upstream's wheel holds two files. This one is installed alone, beside our dependencies."""
    venv.create(tmp_path / "venv", with_pip=False)
    bin_ = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = python(bin_ / "python", "-c", where, cwd=tmp_path).strip()
    install = ["-m", "pip", "install", "--no-deps", "--target", site, wheel]
    python(sys.executable, *install, cwd=tmp_path)
    ours = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "dependencies.pth").write_text("\n".join(ours))
    code = (
        "import cassetta, torch; from cassetta.kernels import why_reference;"
        "print(cassetta.__file__);"
        "print(cassetta.models.SegNet(2, 1, 3, backbone='MeshNet')(torch.ones(2, 1, 4, 4)).shape)"
    )
    out = python(bin_ / "python", "-c", code, cwd=tmp_path)
    assert str(Path(site) / "cassetta") in out
    assert "torch.Size([2, 3, 4, 4])" in out
    line = [bin_ / "python", "-m", "cassetta"]
    assert "triton" in python(*line, "doctor", cwd=tmp_path)
    assert "meshnet" in python(*line, "bench", "--list", cwd=tmp_path)
    words = ["bench", "--case", "block-5-d1", "--pass", "inference", "--small"]
    assert "1 groups of rows measured now" in python(*line, *words, cwd=tmp_path)
    assert len([*tmp_path.glob("*/block.csv")]) == 1
    if importlib.util.find_spec("triton"):
        words = ["check", "--budget", "1"]
        found = python(*line, *words, cwd=tmp_path, TRITON_INTERPRET="1")
        assert " at fault" in found
        assert ", 0 at fault" in found
    assert "triton" in python(bin_ / "python", "-m", "cassetta", "doctor", cwd=tmp_path)
