"""The package as a whole: imports, start-up, the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vqvae_lightning.configs import CONF_DIR

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vqvae_lightning"
# A file may import from lower levels only, and from its own folder.
LEVELS = {
    "console": 0,
    "distributed": 0,
    "errors": 0,
    "files": 0,
    "pixels": 0,
    "units": 0,
    "checks": 1,
    "devices": 1,
    "metrics": 1,
    "pictures": 1,
    "randomness": 1,
    "trust": 1,
    "configs": 2,
    "loggers": 2,
    "quantizers": 2,
    "likelihoods": 2,
    "networks": 3,
    "runs": 3,
    "checkpoints": 4,
    "report": 4,
    "jobs": 5,
    "data": 6,
    "callbacks": 7,
    "tasks": 7,
    "evaluation": 8,
    "stages": 9,
    "commands": 10,
    "train": 11,
}
COMMANDS = (
    "vqvae-train",
    "vqvae-pipeline",
    "vqvae-sample",
    "vqvae-evaluate",
    "vqvae-reconstruct",
    "vqvae-shards",
)
MODULES = {name: name.replace("vqvae-", "vqvae_lightning.commands.") for name in COMMANDS}
MODULES["vqvae-report"] = "vqvae_lightning.commands.report"  # takes a folder instead of overrides


def list_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "vqvae_lightning":
                yield from (f"vqvae_lightning.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part == "__init__":
        return
    for module in list_imports(path):
        names = module.split(".")
        if names[0] != "vqvae_lightning" or len(names) == 1:
            continue
        assert names[1] == part or LEVELS[names[1]] < LEVELS[part], f"{part} imports {module}"


@pytest.mark.parametrize("folder", ["quantizers", "networks"])
def test_networks_need_neither_lightning_nor_hydra(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        roots = {module.split(".")[0] for module in list_imports(path)}
        own = roots - sys.stdlib_module_names
        assert own <= {"vqvae_lightning", "torch", "vector_quantize_pytorch"}, path


def run_and_list_heavy_modules(code):
    listing = (
        "import sys; print(sorted({'torch','pytorch_lightning','matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{listing}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()


def test_importing_the_package_is_light():
    assert run_and_list_heavy_modules("import vqvae_lightning") == ["[]"]


@pytest.mark.parametrize("name", MODULES)
def test_each_command_is_a_module_whose_help_is_light(name):
    module = name.replace("vqvae-", "vqvae_lightning.commands.")
    code = f"""
import runpy, sys
sys.argv = ["{name}", "--help"]
try:
    runpy.run_module("{module}", run_name="__main__", alter_sys=True)  # as python -m does
    status = 0
except SystemExit as stop:
    status = stop.code
print(status)
"""
    *helped, status, heavy = run_and_list_heavy_modules(code)
    assert heavy == "[]"
    assert status in ("0", "None")
    assert ("Powered by Hydra" if name in COMMANDS else "usage: vqvae-report") in "".join(helped)


def test_the_public_names_are_there():
    import vqvae_lightning

    for name in vqvae_lightning.__all__:
        assert getattr(vqvae_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = vqvae_lightning.nothing


@pytest.mark.slow
def test_the_wheel_runs_the_pipeline_outside_the_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 7e6
    names = zipfile.ZipFile(wheel).namelist()
    for inside in (
        "conf/pipeline.yaml",
        "conf/hydra/sweeper/optuna.yaml",
        "py.typed",
        "data/bundled/fashion_mnist_mini.npz",
        "data/bundled/LICENSE-fashion-mnist",
        "report/template.html",
        "report/comparison.html",
        "report/sweep.html",
        "report/style.css",
    ):
        assert f"vqvae_lightning/{inside}" in names
    assert all(name.startswith("vqvae_lightning") for name in names), "a second top-level package"
    inside = zipfile.ZipFile(wheel)
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert all(f"{name} = vqvae_lightning" in inside.read(scripts).decode() for name in MODULES)
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    assert "Requires-Dist: pytorch-lightning" in inside.read(metadata).decode()
    # A fresh environment with the dependencies of this one, but without this checkout.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    python = tmp_path / "venv/bin/python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = subprocess.run(
        [python, "-m", "vqvae_lightning.commands.pipeline", "experiment=smoke"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "runs/smoke").iterdir()
    assert (folder / "report.html").is_file()
    assert str(ROOT) not in (folder / "config.yaml").read_text()


def test_pyproject_ships_each_command():
    text = (ROOT / "pyproject.toml").read_text()
    for name, module in MODULES.items():
        assert f'{name} = "{module}:main"' in text


def test_every_config_says_what_it_is():
    for path in CONF_DIR.rglob("*.yaml"):
        assert path.read_text().startswith("#"), path
