"""Importing: each way the installation can be broken gives its own message, and one OpenMP runtime is loaded.

Every case runs in its own process on a copy of the package, because an import happens once.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import convbn_ext

PACKAGE = Path(convbn_ext.__file__).parent
BUILD = r"pip install --no-build-isolation ."


def run(*command, folder):
    """Python with the package of one folder; without site (-S) no editable installation can step in."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:{sysconfig.get_paths()['platlib']}"}
    return subprocess.run([sys.executable, "-S", *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def installation(tmp_path):
    """A copy of the package that a test may break."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "copy" / "convbn_ext", ignore=ignored)).parent


def extension_of(installation):
    return next((installation / "convbn_ext").glob("_C*.so"))


def hide_torch(installation):
    (installation / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")


def forget_the_build(installation):
    (installation / "convbn_ext" / "_build_info.py").unlink()


def build_for_another_torch(installation):
    info = installation / "convbn_ext" / "_build_info.py"
    info.write_text("TORCH_VERSION = '1.13.1'\nCUDA_VERSION = None\n")


def damage_the_library(installation):
    extension_of(installation).write_bytes(b"not a library")


def lose_the_library(installation):
    extension_of(installation).unlink()


def need_a_missing_symbol(installation):
    """What a library built against another torch looks like to the loader."""
    library = extension_of(installation)
    source = installation / "broken.c"
    source.write_text("extern void of_another_torch(void); void PyInit__C(void) { of_another_torch(); }")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", "-o", library, source], check=True)


BROKEN = [
    (hide_torch, ["needs torch >= 2.10", "not installed", "pip install torch"]),
    (forget_the_build, ["the compiled extension is missing"]),
    (build_for_another_torch, ["was built against torch 1.13.1", f"torch {torch.__version__} is installed"]),
    (damage_the_library, ["does not load", "build it again"]),
    (lose_the_library, ["does not load", "build it again"]),
    (need_a_missing_symbol, ["does not load", "undefined symbol: of_another_torch"]),
]


def test_the_copy_works_until_it_is_broken(installation):
    result = run("-c", "import convbn_ext; print(convbn_ext.__file__)", folder=installation)
    assert result.stdout.strip() == str(installation / "convbn_ext" / "__init__.py")


@pytest.mark.parametrize(("breakage", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_a_broken_installation_says_what_to_run(installation, breakage, words):
    breakage(installation)
    result = run("-c", "import convbn_ext", folder=installation)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert message.startswith("ImportError: convbn_ext")
    assert BUILD in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("breakage", "words"), BROKEN, ids=lambda v: getattr(v, "__name__", ""))
def test_the_doctor_of_a_broken_installation_still_answers(installation, breakage, words):
    breakage(installation)
    result = run("-m", "convbn_ext", "doctor", folder=installation)
    assert result.returncode == 1
    assert result.stderr == ""
    problem = next(line for line in result.stdout.splitlines() if line.startswith("PROBLEM"))
    for word in words:
        assert word in problem


def test_an_error_inside_torch_is_not_hidden(installation):
    (installation / "torch.py").write_text("import a_dependency_of_torch")
    result = run("-c", "import convbn_ext", folder=installation)
    assert "No module named 'a_dependency_of_torch'" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps (Linux)")
def test_one_openmp_runtime():
    """The extension uses torch's own: two would fight for the cores."""
    program = (
        "import convbn_ext, torch; torch.ones(1 << 20).exp(); "
        "from convbn_ext.doctor import openmp_runtimes; print(*openmp_runtimes(), sep='\\n')"
    )
    runtimes = run("-c", program, folder=PACKAGE.parent).stdout.split()
    assert len(runtimes) == 1
    assert Path(runtimes[0]).parent.parent == Path(torch.__file__).parent
