"""Every way to install the project, and that it stays out of other projects' way."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNEL_MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
EXTENSION = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
NOT_COPIED = shutil.ignore_patterns(
    ".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "outputs"
)
# Unoptimised and without GPU code: these tests are about files, not speed.
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Debug -DSFT_FAST_GPU=OFF"


def run(*command: str | Path, cwd: Path, python_path: Path | None = None) -> str:
    """Runs a command and returns what it printed; on failure the test shows all of it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["CMAKE_ARGS"] = CMAKE_ARGS
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, as git would give it: links are links, nothing is built."""
    return copy_checkout(tmp_path_factory.mktemp("clone") / "checkout")


def copy_checkout(target: Path) -> Path:
    return shutil.copytree(ROOT, target, symlinks=True, ignore=NOT_COPIED)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=copy_checkout(folder / "checkout"))
    return next(folder.glob("sft_fast-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, so that it holds only what both carry."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist, cwd=folder)
    return next(folder.glob("sft_fast-*.whl"))


def sources() -> set[str]:
    """The files of the package, kernels included, as paths in a wheel."""
    # Listed apart, because globbing does not follow links in every Python.
    folders = [(ROOT / "sft_fast", "sft_fast"), (ROOT / "kernels", "sft_fast/kernels")]
    return {
        f"{prefix}/{path.relative_to(folder)}"
        for folder, prefix in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }


def kernel_origins(python: str | Path, cwd: Path, python_path: Path | None = None) -> set[Path]:
    """Where `python` would import each kernel from; the modules themselves need a GPU stack."""
    code = (
        "from importlib.util import find_spec\n"
        f"for name in {KERNEL_MODULES}: print(find_spec('sft_fast.kernels.' + name).origin)"
    )
    printed = run(python, "-c", code, cwd=cwd, python_path=python_path)
    return {Path(line).resolve().parent for line in printed.splitlines()}


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    packed = {name for name in names if ".dist-info/" not in name}
    assert sources() | {f"sft_fast/{EXTENSION}"} <= packed
    assert {name.split("/")[0] for name in packed} == {"sft_fast"}
    assert {name.rsplit(".", 1)[-1] for name in packed} <= {
        *("py", "pyi", "typed", "yaml", "so", "md"),
    }


def test_sdist_holds_what_is_needed_to_test_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/bindings.cpp", "tests/test_packaging.py", "LICENSE"} <= names


@pytest.mark.slow
def test_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    code = "import sft_fast._C as c; print(c.__file__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, python_path=site)
    assert Path(printed.strip()) == site / "sft_fast" / EXTENSION
    origins = kernel_origins(sys.executable, tmp_path, python_path=site)
    assert origins == {site / "sft_fast/kernels"}


def test_a_build_from_the_checkout_follows_the_link(clone: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path, cwd=clone)
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert sources() <= built


@pytest.mark.slow  # CI runs on such an install
def test_editable_install_works(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    python = make_environment(tmp_path / "environment")
    pip(
        *("--python", python, "install", "--no-deps", "--no-build-isolation"),
        *("--editable", checkout),
        cwd=tmp_path,
    )
    printed = run(python, "-c", "import sft_fast._C as c; print(c.__file__)", cwd=tmp_path)
    assert Path(printed.strip()) == checkout / "sft_fast" / EXTENSION
    assert kernel_origins(python, tmp_path) == {checkout / "kernels"}
    # A file written after the install is part of the package, without installing again.
    (checkout / "kernels/written_later.py").write_text("ANSWER = 42\n")
    code = "from sft_fast.kernels.written_later import ANSWER; print(ANSWER)"
    assert run(python, "-c", code, cwd=tmp_path) == "42\n"


def make_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not its editable installs."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    ours = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(ours, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"


def test_a_bare_clone_imports_its_kernels(clone: Path, tmp_path: Path) -> None:
    origins = kernel_origins(sys.executable, tmp_path, python_path=clone)
    assert origins == {clone / "kernels"}


def test_our_kernels_folder_does_not_shadow_the_package_kernels(
    clone: Path, tmp_path: Path
) -> None:
    # Hugging Face publishes `kernels`, and transformers imports it. The root comes first here, as
    # it does for every script and `python -m` started in it.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("OWNER = 'hub'\n")
    code = "import sys, kernels; assert sys.path[0] == ''; print(kernels.OWNER)"
    assert run(sys.executable, "-c", code, cwd=clone, python_path=tmp_path) == "hub\n"


def test_folders_named_like_a_package_are_not_packages() -> None:
    # pytest puts tests/ on sys.path: with an __init__.py, tests/megatron would be `megatron`.
    assert list((ROOT / "tests").glob("*/__init__.py")) == []
    assert not (ROOT / "kernels/__init__.py").exists()


def test_importing_the_package_is_free() -> None:
    heavy = {"datasets", "megatron", "numpy", "torch", "transformers", "triton"}
    code = f"import sys, sft_fast; print(sorted({heavy} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]\n"
