# /// script
# dependencies = ["nox>=2024.10"]
# ///
"""What can be done with this project: `uvx nox` checks it, `uvx nox -s demo` tries it without a download."""

import os
import pathlib
import signal

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "types", "tests", "stress"]
nox.options.reuse_existing_virtualenvs = True

# The oldest and the newest that the engine runs on, and the one in between that most people have.
PYTHONS = ["3.9", "3.11", "3.13"]
FILES = ["llmchat.py", "test_llmchat.py", "noxfile.py"]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmchat"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff==0.14.*")
    session.run("ruff", "check", *FILES)
    session.run("ruff", "format", "--check", *FILES)


@nox.session(python="3.11")
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    session.install("mypy==1.18.*", "nox", ".")
    session.run("mypy", "llmchat.py", "noxfile.py")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests: on the oldest Python with the oldest libraries that are allowed, else with the newest."""
    oldest = [need.replace(">=", "==", 1) for need in nox.project.load_toml("pyproject.toml")["project"]["dependencies"]]
    session.install(".", "pytest>=8", "pytest-xdist>=3", "nox", *(oldest if session.python == PYTHONS[0] else []))
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python="3.11")
def stress(session: nox.Session) -> None:
    """Run what takes long, because it counts far: once is enough."""
    session.install(".", "pytest>=8", "nox")
    session.run("pytest", "-m", "stress", *session.posargs)


@nox.session(python="3.11")
def demo(session: nox.Session) -> None:
    """Chat with a small model that knows a few sentences; nothing is downloaded but the libraries."""
    session.install(".", "pytest>=8")
    folder = str(CACHE / "demo")
    session.run("python", "-c", f"import test_llmchat; test_llmchat.build_demo({folder!r})", silent=True)
    # Ctrl+C is for the chat: nox would end it.
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        session.run("llmchat", folder, *session.posargs)
    finally:
        signal.signal(signal.SIGINT, interrupt)


@nox.session(python="3.11")
def bench(session: nox.Session) -> None:
    """Measure llmchat beside mlx-lm's own chat, in one table; the 600 MB model for it is built once."""
    session.install(".", "pytest>=8")
    session.run("python", "-c", f"import test_llmchat; test_llmchat.bench({str(CACHE / 'bench')!r})")


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and list what is in it."""
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", session.create_tmp())
