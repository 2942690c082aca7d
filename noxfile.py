"""Everything a contributor runs: ``nox -l`` lists the sessions. ``nox -s demo`` and ``nox -s tests`` need Python and pip only.

torch is installed first: the version that ``MX_TORCH`` names ("torch==2.11.0"), else ``torch>=2.10`` where an NVIDIA or AMD
driver is found, else the CPU build of constraints-cpu.txt.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
PACKAGES = [f"packages/mx-{name}" for name in ("kernels", "quant", "moe")]
NEWEST_TRITON = "triton==3.9.0"


def install(session: nox.Session, *groups: str, extra: tuple[str, ...] = ()) -> None:
    """torch for this machine, then the three packages in one resolution, then dependency groups."""
    torch = os.environ.get("MX_TORCH")
    if torch:
        session.install(torch)
    elif shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        session.install("torch>=2.10")
    else:
        session.install("-c", "constraints-cpu.txt", "torch")
    editable = [arg for package in PACKAGES for arg in ("-e", package)]
    session.install(*editable, *nox.project.dependency_groups(PYPROJECT, *groups), *extra)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on two small trained checkpoints: quantize, evaluate, write, reload, continue a line of text."""
    install(session, "test")
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no GPU (those that do are skipped with that reason)."""
    install(session, "test", "oracle")
    session.run("python", "-m", "pytest", "-m", "not compile", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """All tests that need a GPU; the environment's own torch and Triton where they are importable."""
    install(session, "test")
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs)


@nox.session
@nox.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def sanitize(session: nox.Session, tool: str) -> None:
    """Every kernel on small shapes under NVIDIA's compute-sanitizer, or the parts named; needs a GPU and the CUDA toolkit."""
    install(session)
    script = ("python", "tests/every_kernel.py", *session.posargs)
    session.run(*script)  # compiles: Triton's cache holds the kernels when the checker runs them
    left_out = {
        # the byte by which Triton hands work to waiting warps, which a barrier of the whole program orders
        "racecheck": ("--kernel-name-exclude", "kns=specialized"),
        # the driver refuses to tell of a parameter behind a kernel's last, by which launches know that it is the last (other calls of the
        # driver that fail raise, here too)
        "memcheck": ("--report-api-errors", "no"),
    }
    command = ("compute-sanitizer", "--tool", tool, *left_out.get(tool, ()), "--error-exitcode", "1", *script)
    session.run(*command, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, external=True)


@nox.session
@nox.parametrize("triton", ["triton==3.6.0", NEWEST_TRITON], ids=["oldest", "newest"])
def compile(session: nox.Session, triton: str) -> None:
    """Compile every kernel ahead of time for every target, look at the instructions, and interpret index logic; needs no GPU."""
    # that numpy for the interpreter of Triton 3.6
    install(session, "test", extra=(triton, "numpy<2.4", "pytest-xdist"))
    workers = (f"-n{min(4, os.cpu_count() or 1)}", "--dist", "worksteal")  # the longest tests would be one worker's
    session.run("python", "-m", "pytest", "-m", "compile", *workers, *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """Write the table of what is native, and the READMEs' tables, from what each Triton compiles; needs no GPU."""
    install(session, "test")
    files = []
    for version in ("3.6.0", "3.7.1", "3.8.0", NEWEST_TRITON.removeprefix("triton==")):
        files.append(str(Path(session.create_tmp(), f"{version}.json").resolve()))
        session.install(f"triton=={version}")
        session.run("python", "tests/mx_kernels/native.py", files[-1])
    session.run("python", "tests/mx_kernels/native.py", "--write", *files)
    session.run("python", "tests/test_readme.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff check and ruff format."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy --strict over the three packages."""
    install(session, "types")
    session.run("mypy")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build three wheels into dist/; run the kernels' tests with only the mx-kernels wheel in a bare environment."""
    session.install("build")
    shutil.rmtree("dist", ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--wheel", "--outdir", "dist", package)
    (wheel,) = Path("dist").glob("mx_kernels-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "venv", folder)
        python = str(Path(folder, "Scripts" if os.name == "nt" else "bin") / "python")
        torch = os.environ.get("MX_TORCH", "torch")
        run = [python, "-m", "pip", "install", "-q"]
        session.run(*run, "-c", "constraints-cpu.txt", torch, external=True)
        session.run(*run, str(wheel), external=True)
        session.run(python, "-m", "pip", "check", external=True)
        session.run(*run, "pytest", "hypothesis", "ml-dtypes", "safetensors", external=True)
        session.run(
            python, "-m", "pytest", "tests/mx_kernels", "-m", "not compile", "-q", *session.posargs, external=True
        )


@nox.session
def minimums(session: nox.Session) -> None:
    """The tests with the lowest versions that the packages' metadata allow."""
    lowest = (
        "torch==2.10.0",
        "numpy==1.26.4",
        "safetensors==0.8.0",
        "tqdm==4.66.0",
        "transformers==5.17.0",
        "accelerate==1.1.0",
    )
    editable = [arg for package in PACKAGES for arg in ("-e", package)]
    session.install(*lowest, *editable, *nox.project.dependency_groups(PYPROJECT, "test"))
    session.run("python", "-m", "pytest", "-m", "not compile", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """benchmarks/run.py with its arguments, for example ``nox -s bench -- --shapes gpt-oss-120b``."""
    install(session, "test", "oracle")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site in build/site."""
    session.install("mkdocs>=1.6")
    session.run("mkdocs", "build", "--strict", "--site-dir", "build/site")
