#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "mlx>=0.29.3; sys_platform == 'darwin'",
#     "mlx[cpu]>=0.29.3; sys_platform == 'linux'",
#     "mlx-lm>=0.29.1",
#     "huggingface-hub>=0.34",
#     "transformers>=4.56",
# ]
# ///
"""Talk with a local language model in the terminal, on Apple silicon.

`llmchat MODEL` loads a Hugging Face model with MLX and answers at `prompt ->` until `quit`, `bye` or
`exit`. Three promises shape the file:

- Right: every turn the model is fed exactly what its chat template makes of the whole conversation.
- Cheap: tokens whose state the engine still holds are not computed again (see `PromptCache`).
- Safe: the conversation is well formed whatever happens; a turn that fails leaves no trace in it.

The rooms, in reading order; nothing is used before it is defined:

    Errors         one exception, a finished sentence
    Settings       every parameter, declared once: flag, config key, `/set` key, range, help
    Hosts          the processes that hold one model together, if mlx.launch started several
    Files          a model's files: folder, hub cache, download
    Model          checking it before the weights come, loading it
    Prompt cache   the tokens whose state the engine holds, and the cheapest way to a new prompt
    Thoughts       telling a reasoning model's thoughts from its answer
    Conversation   messages, and replies as generators of pieces; never prints
    Keeping        a conversation and the prompts on disk
    Screen         shows pieces, notes and errors; knows nothing of MLX
    Line editor    reads prompts
    Program        commands, the chat loop, signals, `main`

Exit statuses: 0 done, 1 an error said in one sentence, 2 wrong usage or configuration, 130, 143 and
129 interrupted by SIGINT, SIGTERM or SIGHUP, 141 standard output closed.

What it refuses to be: a server, a downloader, a converter, an agent. It has no plug-ins, runs no code
from a model repository unless told to, and asks the network for nothing that is already on disk.
"""

from __future__ import annotations

import os
import signal
import sys

# Ctrl+C while the rest is imported ends the program quietly; `main` takes the signals over.
if (
    "chat" in os.path.basename(sys.argv[0])
    and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import collections
import contextlib
import copy
import dataclasses
import difflib
import enum
import errno
import fcntl
import fnmatch
import functools
import glob
import importlib
import inspect
import io
import itertools
import json
import locale
import logging
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import termios
import threading
import time
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Dict, NamedTuple, TextIO
from urllib.parse import quote, unquote

__version__ = "0.1.0"

EXAMPLE_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"

# A message of a conversation: its role, its content, and whatever else a session file says of it.
Message = Dict[str, str]


# ---------------------------------------------------------------------------------------- Errors


class ChatError(Exception):
    """A finished sentence for the user: what happened, to what, and what would work instead."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        # The exit status of the program if this ends it: 1, or 2 for wrong usage or configuration.
        self.status = status


class EngineError(ChatError):
    """The engine failed. With several hosts this ends the chat, because their caches may differ now."""


def shorten(text: str, limit: int = 300) -> str:
    """Return a text on one line, cut to so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def error_text(error: BaseException) -> str:
    """Return an error's own text on one short line without a full stop, or its type if it has none."""
    try:
        text = str(getattr(error, "strerror", None) or error)
    except Exception:
        # An error of a library may fail to describe itself, for instance if it is nested too deep.
        text = ""
    return shorten(text).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def explain_errors(
    what: str,
    advice: str,
    *expected: type[BaseException],
    error_type: type[ChatError] = ChatError,
    status: int = 1,
) -> Iterator[None]:
    """Turn an error of one of the expected types into a `ChatError`: "what: its own text. advice".

    Any other error is a bug of this program and keeps its traceback.
    """
    try:
        yield
    except ChatError:
        raise
    except expected as error:
        sentence = f"{what}: {error_text(error)}. {advice}"
        raise error_type(sentence.rstrip(), status) from error


@contextlib.contextmanager
def foreign(
    sentence: str | Callable[..., str], kind: type[ChatError] = ChatError, status: int = 1
) -> Iterator[None]:
    """Turn an error of foreign code into a `ChatError`; `explain_errors` is to replace this."""
    try:
        yield
    except (ChatError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # A panic of a Rust library is no `Exception`.
    except BaseException as error:
        said = (
            sentence.replace("{}", error_text(error))
            if isinstance(sentence, str)
            else sentence(error)
        )
        raise kind(said, status) from error


# -------------------------------------------------------------------------------------- Settings


CONFIG_FILE = ".llmchat_config"
# Where a parameter may be given.
FLAG, FILE, CHAT = "on the command line", "before the chat", "anywhere"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return a question that names the name most like a mistyped word, or nothing."""
    near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(
        word, names, 1
    )
    return f"; did you mean {near[0]}?" if near else ""


def number_parser(
    convert: Callable[[str], Any], low: float, high: float = sys.float_info.max
) -> Callable[[str], Any]:
    """Return a parser of one number in [low, high]; it raises `ArgumentTypeError` with the range."""
    kind = "a whole number" if convert is int else "a number"
    bounds = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"

    def parse(text: str) -> Any:
        # A NaN compares false with everything, and is refused.
        with contextlib.suppress(ValueError):
            if low <= (value := convert(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be {kind} {bounds}, not '{shorten(text, 40)}'")

    return parse


def parse_bool(text: str, others: str = "") -> bool:
    """Parse a yes or no as a config file or `/set` says it; the error also names the `others` that may stand there."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be {others}true or false, not '{shorten(text, 40)}'")


def parse_effort(text: str) -> bool | str:
    """Parse a yes or no, or how much to think."""
    return (
        text.lower()
        if text.lower() in ("low", "medium", "high")
        else parse_bool(text, "low, medium, high, ")
    )


def strip_quotes(text: str) -> str:
    """Return a text without the quotes around it."""
    return re.sub(r"""^(["'])(.*)\1$""", r"\2", text)


def format_value(value: Any) -> str:
    """Return a parameter's value as a config file would say it."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def option(
    default: Any,
    parse: Callable[[str], Any],
    metavar: str | None,
    help: str,
    scope: str = CHAT,
    *flags: str,
) -> Any:
    """Declare a parameter as flags, config files and `/set` know it."""
    help += f" (default {default})" if default and parse is not parse_bool else ""
    about = SimpleNamespace(parse=parse, metavar=metavar, help=help, scope=scope, flags=flags)
    return dataclasses.field(default=default, metadata={"option": about})


@dataclasses.dataclass
class Settings:
    """Every parameter of the program. A field's name is its key, with `-` for `_`."""

    model: str | None = option(None, str, "MODEL", "a Hugging Face repository or a folder", FILE)
    prompt: str | None = option(
        None, str, "TEXT", "print the reply to TEXT, after piped input; - is that", FLAG, "-p"
    )
    system: str | None = option(None, str, "TEXT", "the system prompt")
    max_tokens: int = option(512, number_parser(int, 1), "N", "the longest answer, in tokens")
    temperature: float = option(
        0.7, number_parser(float, 0, 10), "T", "how freely words are chosen; 0 takes the likeliest"
    )
    top_p: float = option(
        0.9,
        number_parser(float, 0, 1),
        "P",
        "choose among the likeliest with this total; 0 or 1 is off",
    )
    top_k: int = option(
        0, number_parser(int, 0), "K", "choose among the K likeliest tokens; 0 is off"
    )
    min_p: float = option(
        0.0,
        number_parser(float, 0, 1),
        "P",
        "leave out what is less likely than P times the likeliest",
    )
    repetition_penalty: float = option(
        1.0, number_parser(float, 0.01, 10), "X", "penalize the last 20 tokens; 1 is off"
    )
    seed: int | None = option(
        None, number_parser(int, 0, 2**32 - 1), "N", "make replies repeatable"
    )
    history: bool = option(True, parse_bool, None, "send the turns before a prompt with it", FILE)
    think: bool | str | None = option(
        None, parse_effort, "low|medium|high", "have a reasoning model think, and how much"
    )
    max_thought_tokens: int = option(
        8192, number_parser(int, 0), "N", "the longest thought, in tokens; 0 is no limit"
    )
    hide_thoughts: bool = option(
        False, parse_bool, None, "show that a reasoning model thinks, not what"
    )
    recommended: bool = option(
        False, parse_bool, None, "sample as the model's author recommends", FILE
    )
    plain: bool = option(False, parse_bool, None, "show Markdown without colours")
    stats: bool = option(
        False, parse_bool, None, "show time, tokens and cache use after each reply"
    )
    file: tuple[str, ...] = option(
        (), str, "PATH", "put a file before the first prompt; can be given again", FLAG
    )
    session: str | None = option(
        None, str, "FILE", "go on with the conversation in FILE, and keep it there", FLAG
    )
    resume: bool = option(
        False,
        parse_bool,
        None,
        "go on with the last conversation, of MODEL if it is named",
        FLAG,
        "-c",
    )
    keep: bool = option(True, parse_bool, None, "keep every conversation in ~/.llmchat", FILE)
    keep_state: bool = option(
        False, parse_bool, None, "keep what the engine has read beside the conversation", FILE
    )
    adapter: str | None = option(
        None, str, "FOLDER", "a LoRA adapter to load on top of the model", FILE
    )
    revision: str | None = option(
        None, str, "NAME", "the branch, tag or commit of the repository", FILE
    )
    trust_remote_code: bool = option(
        False, parse_bool, None, "run code that the model repository brings along", FLAG
    )
    force: bool = option(
        False, parse_bool, None, "load a model that seems too large, or not made for talking", FILE
    )

    # Where each value that is not a default came from: a file, "flag" or "here".
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def set_from_text(
        self, key: str, text: str, source: str, scopes: Collection[str] = (FILE, CHAT)
    ) -> str:
        """Take `key = text` as a config file or `/set` says it; return the field's name. Raises `ArgumentTypeError`."""
        name, negated = KEYS.get(key.lower().replace("_", "-"), ("", False))
        if not name:
            raise argparse.ArgumentTypeError(f"is no setting{did_you_mean(key, KEYS)}")
        if OPTIONS[name].scope not in scopes:
            raise argparse.ArgumentTypeError(f"can only be given {OPTIONS[name].scope}")
        if not text:
            raise argparse.ArgumentTypeError("needs a value")
        if text == "default":
            setattr(self, name, getattr(Settings, name))
            self.sources.pop(name, None)
            return name
        value = OPTIONS[name].parse(text)
        setattr(self, name, not value if negated else value)
        self.sources[name] = source
        return name

    def apply_recommended(self, file: Path) -> str:
        """Take a `generation_config.json` where the user said nothing; say what is new. Raises `ChatError`."""
        with foreign(f"{file} can't be read: {{}}. Leave out --recommended."):
            config = json.loads(file.read_bytes())
            advice = {name: config.get(name) for name in SAMPLING_SETTINGS}
            advice.update({"temperature": 0} if config.get("do_sample") is False else {})
        new = [
            name
            for name in advice
            if name not in self.sources and advice[name] not in (None, getattr(self, name))
        ]
        for name in new:
            with foreign(f"{name} of {file.name} {{}}: leave out --recommended."):
                self.set_from_text(name, str(advice[name]), file.name)
        words = ", ".join(
            f"{name.replace('_', '-')} {format_value(getattr(self, name))}" for name in new
        )
        return f"Recommended for this model: {words}." * bool(new)

    def load_file(self, path: Path) -> None:
        """Take in a file of `key = value` lines, if it is there. Raises `ChatError` naming file and line."""
        with foreign(f"{path} could not be read: {{}}. Mend or remove it.", status=2):
            lines = path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
        for count, line in enumerate(lines, 1):
            # A # first in a line, or between blanks, starts a comment.
            text = re.sub(r"^\s*#.*|\s#(\s.*)?$", "", line).strip()
            key, equals, value = (part.strip() for part in text.partition("="))
            with foreign(f"{path}:{count}: {key} {{}}", status=2):
                if text and not (key and equals):
                    raise argparse.ArgumentTypeError("is not of the form 'key = value'")
                if text:
                    self.set_from_text(key, strip_quotes(value), str(path))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages after the system prompt, if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]


OPTIONS = {
    field.name: field.metadata["option"] for field in dataclasses.fields(Settings) if field.metadata
}
# The parameters that a model's author may recommend.
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# The field that each key sets, and whether the key turns a switch round.
KEYS = {name.replace("_", "-"): (name, False) for name in OPTIONS}
KEYS.update(
    {
        f"no-{key}": (name, True)
        for key, (name, _) in KEYS.items()
        if OPTIONS[name].parse in (parse_bool, parse_effort)
    }
)


def argument_parser() -> argparse.ArgumentParser:
    """Return the command line's parser, made from the options. Its namespace holds only the flags that were given."""
    parser = argparse.ArgumentParser(
        prog="llmchat",
        usage="llmchat MODEL [options]",
        description="Talk with a local language model in the terminal.",
        epilog=f"Defaults can stand in ~/{CONFIG_FILE} and ./{CONFIG_FILE}: lines of 'key = value', keys as the flags.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, about in OPTIONS.items():
        flag = name if name == "model" else f"--{name.replace('_', '-')}"
        more: Any = {"model": {"nargs": "?"}, "file": {"action": "append"}}.get(name, {})
        valued = {"type": about.parse, "metavar": about.metavar, **more}
        how = {"action": argparse.BooleanOptionalAction} if about.parse is parse_bool else valued
        parser.add_argument(*about.flags, flag, help=about.help, **how)
    parser.add_argument("--no-think", dest="think", action="store_false", help="have it not think")
    parser.add_argument("--version", action="version", version=f"llmchat {__version__}")
    return parser


def read_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the flags that were given. For wrong ones argparse leaves with 2."""
    parser = argument_parser()
    words = [*(sys.argv[1:] if argv is None else argv), ""]
    # How much to think is optional, and the model may follow.
    plain = [
        n
        for n, word in enumerate(words)
        if word == "--think" and words[n + 1] not in ("low", "medium", "high")
    ]
    namespace, rest = parser.parse_known_args(
        [word + "=true" * (n in plain) for n, word in enumerate(words)][:-1]
    )
    known = ["--help", "--version", *(f"--{key}" for key in KEYS if key != "model")]
    for flag in (shorten(word.partition("=")[0], 40) for word in rest if word.startswith("-")):
        if flag == "--model":
            parser.error("the model is named without a flag: llmchat MODEL")
        parser.error(
            f"there is no flag {flag}{did_you_mean(flag, known) if flag.strip('-') else ''}"
        )
    if rest:
        model, prompt = shorten(str(namespace.model), 80), shorten(rest[0], 40)
        parser.error(f"a prompt goes after -p: llmchat {model} -p {prompt!r}")
    return vars(namespace)


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Read the defaults, then the config files of the home and the working folder, then the flags."""
    flags = read_flags(argv)
    settings = Settings()
    for path in (Path(os.path.expanduser("~")) / CONFIG_FILE, Path(CONFIG_FILE)):
        settings.load_file(path)
    vars(settings).update(flags)
    settings.sources.update(dict.fromkeys(flags, "flag"))
    return settings


# ----------------------------------------------------------------------------------------- Hosts


# The signals that end the program, with 128 and their number; Ctrl+C on a terminal only until the model is loaded.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Hosts:
    """The processes that hold one model together, each on a host of its own; on a plain start there is just this one.

    All run this same program on the same lines of input, which mlx.launch hands to each. Rank 0 alone is seen and
    writes files, and shares what might be different elsewhere.
    """

    def __init__(self, group: Any = None) -> None:
        # MLX's own group; None on a plain start.
        self._group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which JSON can hold, on every host. Raises `EngineError` if another host is gone."""
        if self.size == 1:
            return value
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        all_sum: Any = functools.partial(mx.distributed.all_sum, group=self._group)
        data = json.dumps(value).encode() if self.rank == 0 else b""
        # Not beside but behind what the engine still has to do: it is one token ahead of the last reply.
        with foreign("Another host is gone, so the chat can't go on: {}.", EngineError), mx.stream(
            generation_stream
        ):
            length = int(all_sum(mx.array(len(data))).item())
            # One host gives bytes, the others as many zeros; MLX takes a list of them, byte by byte, 500 times as long.
            buffer: Any = bytearray(data or length)
            return json.loads(bytes(all_sum(mx.array(buffer))))


def join_hosts() -> Hosts:
    """Join the hosts that mlx.launch started, if the environment tells that it did; else return this one alone."""
    # The second is set by mpirun, which mlx.launch may start them with.
    if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & {*os.environ}:
        return Hosts()
    # While one host waits for another it looks at no signals: they end it as they end any program.
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    import mlx.core as mx

    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    # A host whose neighbour is gone may wait for it for ever: without the launcher none goes on.
    threading.Thread(target=watch, daemon=True).start()
    with foreign(
        "The hosts that mlx.launch started can't be joined: {}. On one Mac, leave mlx.launch out."
    ):
        return Hosts(mx.distributed.init(strict=True))


# ----------------------------------------------------------------------------------------- Files


# The weights that mlx-lm loads, and the files that its own `load` would download with them.
WEIGHTS = "model*.safetensors"
NEEDED = (
    WEIGHTS,
    "*.json",
    "*.py",
    "*.txt",
    "*.jsonl",
    "*.jinja",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
)
# As far as a name can be that of a repository; the hub has rules of its own.
REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
GIB = 1 << 30
DISK_HINT = "Make room for it, or set HF_HOME to a folder on another disk."
RETRY_HINT = "Every finished file is kept; run the same command again to fetch the rest."


def import_library(name: str) -> Any:
    """Return a library's module, which is imported only now. Raises `ChatError`."""
    with foreign(
        "The libraries can't be loaded: {}. Look at the variables HF_... and MLX..., at ulimit -n (mlx-lm needs 4096),"
        " and at the folder that you are in, or install anew."
    ):
        return importlib.import_module(name)


def hub_cache() -> Path:
    """Return the folder in which huggingface-hub keeps models."""
    # One line of ours tells how far a download is.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return Path(import_library("huggingface_hub.constants").HF_HUB_CACHE)


def hub_snapshot_folder(name: str, revision: str | None) -> Path:
    """Return the folder that a repository has, or would have, in the hub cache; the hub's slow half isn't imported."""
    repository = hub_cache() / ("models--" + name.replace("/", "--"))
    commit = revision or "main"
    with contextlib.suppress(OSError):
        commit = (repository / "refs" / commit).read_text().strip()
    return repository / "snapshots" / commit


def missing_files(folder: Path) -> list[str]:
    """Return the names of files that loading needs and a folder lacks; in the hub cache a file is whole if it is there.

    The index names the weights. Without one there is one file, or as many as are found.
    """
    weights: Iterable[str] = [file.name for file in folder.glob(WEIGHTS)] or ["model.safetensors"]
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        weights = json.loads((folder / "model.safetensors.index.json").read_bytes())[
            "weight_map"
        ].values()
    needed = ("config.json", "tokenizer_config.json", *sorted({*weights}))
    return [name for name in needed if not (folder / name).exists()]


def cached_models() -> list[str]:
    """Return the names of repositories in the hub cache that can be started without a download."""
    names = (
        entry.name[len("models--") :].replace("--", "/")
        for entry in sorted(hub_cache().glob("models--*"))
    )
    return [name for name in names if not missing_files(hub_snapshot_folder(name, None))]


def resolve_model_name(name: str) -> str:
    """Return the repository that a name means: without the hub's address, with the case and owner of a cached one."""
    name = re.sub(
        r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/(models/)?([^/]+/[^/?#]+).*", r"\5", name
    )
    if (
        not REPOSITORY.fullmatch(name)
        or Path(name).exists()
        or not missing_files(hub_snapshot_folder(name, None))
    ):
        return name
    meant = [
        cached for cached in cached_models() if f"/{cached}".lower().endswith(f"/{name}".lower())
    ]
    return meant[0] if len(meant) == 1 else name


def preload_weights(files: Sequence[Path]) -> list[int]:
    """Have files read into the page cache by another thread; return a list that grows by the bytes of each part."""
    read: list[int] = []

    def run() -> None:
        for file in files:
            # The load that follows says it if something is wrong with a file.
            with contextlib.suppress(OSError), open(file, "rb", buffering=0) as stream:
                while part := stream.read(1 << 21):
                    read.append(len(part))

    threading.Thread(target=run, daemon=True).start()
    return read


# The sentences for huggingface-hub's errors, by class or else by HTTP status; hundreds stand for all of a kind.
HUB_MESSAGES: dict[str | int, str] = {
    "GatedRepoError": "{name} is gated: ask for access at {hub}/{name}, then log in with 'hf auth login'.",
    "RepositoryNotFoundError": "There is no model {name} at {hub}, or it is private: check the name at {hub}/{name},"
    " or log in with 'hf auth login'.",
    "RevisionNotFoundError": "{name} has no revision {revision}: {hub}/{name}/tree/main lists its branches and tags.",
    "HFValidationError": f"'{{name}}' can't be the name of a repository: a name looks like {EXAMPLE_MODEL}.",
    "OfflineModeIsEnabled": "{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or name"
    " a model that is here (llmchat alone lists them).",
    "JSONDecodeError": "{hub} answers with a page where data should be: if this network wants a log-in, open it in a"
    " browser.",
    401: "{hub} does not accept the token that is in use: log in again with 'hf auth login', or unset HF_TOKEN.",
    403: "{hub} refuses to hand out {name}: ask for access at {hub}/{name}, then log in with 'hf auth login'.",
    429: f"{{hub}} takes no more requests from here for now: wait some minutes, or log in with 'hf auth login'. {RETRY_HINT}",
    500: f"{{hub}} has a problem of its own (status {{status}}), so {{what}} could not be fetched: try later. {RETRY_HINT}",
}


def root_cause_text(error: BaseException) -> str:
    """Return the system's own words for an error, which libraries wrap in layers of theirs, also "from None"."""
    if (isinstance(error, OSError) and error.strerror) or not (
        inner := error.__cause__ or error.__context__
    ):
        return error_text(error)
    return root_cause_text(inner)


def hub_error_message(name: str, revision: str | None, error: BaseException) -> str:
    """Return the sentence for an error in a download."""
    from huggingface_hub import constants, errors

    # The client says that the file is not in the cache either; the reason that it was not fetched is within.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    hub, folder = constants.ENDPOINT, hub_snapshot_folder(name, revision)
    what = (
        f"{missing_files(folder)[0]} of {name}"
        if folder.exists() and missing_files(folder)
        else name
    )
    if isinstance(error, errors.RepositoryNotFoundError):
        cached = did_you_mean(name, cached_models())
        if cached or "/" not in name:
            return f"There is no model {name} at {hub}{cached or f'; did you mean mlx-community/{name}?'}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    for key in [*(kind.__name__ for kind in type(error).__mro__), status, status // 100 * 100]:
        if key in HUB_MESSAGES:
            return HUB_MESSAGES[key].format(
                name=name, hub=hub, revision=revision, what=what, status=status
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"The disk is too full for {what}. {DISK_HINT} {RETRY_HINT}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} can't be used ({root_cause_text(error)}): set HF_HOME to a folder that you can write to."
    return f"{what} could not be fetched from {hub}: {root_cause_text(error)}. Check the network. {RETRY_HINT}"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep the libraries' chatter off the screen, and their questions (may this code run?) from the user."""
    logging.disable(logging.ERROR)
    with open(os.devnull, "r+") as nothing, contextlib.redirect_stdout(
        nothing
    ), warnings.catch_warnings():
        stdin, sys.stdin = sys.stdin, nothing
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            sys.stdin = stdin
            logging.disable(logging.NOTSET)


# ----------------------------------------------------------------------------------------- Model


# More than fits any model, of one prompt.
MAX_CHARACTERS = 1 << 24
# Breaks up text that spells a special token; no character that Unicode will ever have
# (https://www.unicode.org/faq/private_use.html#nonchar4).
TOKEN_BREAK = "\ufdd0"


class ChatTemplate:
    """Turns messages into the text and the tokens that a model is fed, by its own chat template."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """`name` is the model's name, for messages; `tokenizer` is mlx-lm's wrapper of its tokenizer."""
        self.name = name
        self.tokenizer = tokenizer
        # The marks around its thoughts, once they are known: structure too, also where they are no tokens.
        self.marks: Sequence[str] = ()

    @property
    def _function(self) -> Any:
        # A template that mlx-lm brings along, for models whose authors give none.
        return getattr(self.tokenizer, "_chat_template", None)

    @property
    def source(self) -> str:
        """The chat template's source."""
        module = inspect.getmodule(self._function) if self._function else None
        return inspect.getsource(module) if module else str(self.tokenizer.chat_template)

    @functools.cached_property
    def variables(self) -> set[str]:
        """The variables that the chat template reads, and a few names more."""
        # mlx-lm tells a function one thing.
        if self._function:
            return {"enable_thinking"}
        import jinja2

        # The lexer knows no tags, so that those of transformers need no telling. What is wrong, rendering says.
        words = [""]
        with contextlib.suppress(jinja2.TemplateSyntaxError):
            words += [
                word
                for _, kind, word in jinja2.Environment().lex(self.source)
                if kind != "whitespace"
            ]
        # No attribute, and nothing that is only given a value.
        return {
            word
            for before, word, after in zip(words, words[1:], words[2:])
            if before != "." and after != "="
        }

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the template's text for `messages`, if prompted up to where the reply starts. Raises `ChatError`."""
        # mlx-lm's wrapper tells every template to think; a user who said nothing gets the template's own
        # default, so the tokenizer inside is asked, unless mlx-lm brings the template along as a function.
        tokenizer = (
            self.tokenizer
            if self._function
            else getattr(self.tokenizer, "_tokenizer", self.tokenizer)
        )
        advice = "Leave out the system prompt, or take turns back with /undo."
        with foreign(
            f"The chat template of {self.name} can't render this conversation: {{}}. {advice}"
        ):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        if len(text) > MAX_CHARACTERS:
            raise ChatError(
                f"The chat template of {self.name} makes {len(text)} characters of it. Shorten the prompt."
            )
        return str(text)

    @functools.cached_property
    def _structure(self) -> re.Pattern[str]:
        """The texts that may be a prompt's structure: special tokens, others that the template names, and marks."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        texts = {str(token) for token in tokens if token.special or str(token) in self.source}
        ordered = sorted(
            (text for text in texts.union(self.marks) if len(text.strip()) > 1),
            key=len,
            reverse=True,
        )
        return re.compile("|".join(map(re.escape, ordered)) or "(?!)")

    def escape_special_tokens(self, content: str) -> str:
        """Return a content broken up, so that neither template nor tokenizer takes a part of it for structure."""
        return self._structure.sub(
            lambda token: token[0][0] + TOKEN_BREAK + token[0][1:], content.replace(TOKEN_BREAK, "")
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text, which brings its own BOS. Raises `ChatError`."""
        # A flag or a file may hold what is no text: half a surrogate pair, which no tokenizer takes.
        parts = text.encode(errors="replace").decode().split(TOKEN_BREAK)
        with foreign(f"The tokenizer of {self.name} fails: {{}}. Name another model."):
            return [
                token
                for part in parts
                for token in self.tokenizer.encode(part, add_special_tokens=False)
            ]


@dataclasses.dataclass
class Model:
    """A loaded model: the network, its chat template, the most tokens that it takes, and its hosts."""

    name: str
    network: Any
    template: ChatTemplate
    context_length: int | None
    hosts: Hosts
    # What was taken of the author's recommendations, in a sentence.
    recommended: str
    # All that a state which was computed with this model depends on.
    fingerprint: str
    # What the state of a conversation may take of the memory, on each host; None is no bound.
    memory_bytes: int | None


REMOTE_CODE_MESSAGE = (
    "{} wants to run its own code: if you trust it, --trust-remote-code allows that."
)
# The formats of weights that MLX can't load, by the ending of their files.
UNSUPPORTED_FORMATS = {
    ".gguf": "GGUF",
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".onnx": "ONNX",
}
# The last words of architectures that answer with a vector or a label. GPT2LMHeadModel and the like do talk.
NON_CHAT_ARCHITECTURE = re.compile(
    r"(?<!LMHead)Model$|ForMaskedLM$|ForFeatureExtraction$|For\w*Classification$"
)
# What configurations call the number of tokens that a model was made for, and its number of layers.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# From here on a wait tells how long it takes.
SHOW_RATE_AFTER_S = 5


def first_positive_int(config: dict[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first of these sizes that a configuration tells, or None."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    sizes = (part.get(key) for part in parts for key in keys)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, also of those that are still coming."""
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


class Loader:
    """Finds, checks and loads one model. Every method raises `ChatError` where the model can't be used."""

    def __init__(self, settings: Settings, hosts: Hosts) -> None:
        self._settings, self._hosts = settings, hosts
        self._name = str(settings.model)
        self._folder = Path(os.path.expanduser(self._name))
        self._in_hub = not (self._name and os.path.isdir(self._folder))
        if self._in_hub and (not REPOSITORY.fullmatch(self._name) or self._folder.exists()):
            name = shorten(self._name)
            raise ChatError(
                f"'{name}' is neither a model folder nor a repository's name, such as {EXAMPLE_MODEL}."
            )
        if settings.revision and not self._in_hub:
            raise ChatError(
                f"{self._name} is a folder, which has no revisions: leave out --revision."
            )
        self._begin("looking for it")

    def progress(self) -> str:
        """Return what is going on, in words, for as long as `load` takes; another thread may ask."""
        spent_s, done, total = time.monotonic() - self._since_s, self._done(), self._total
        if not total:
            return f"{self._doing}{f': {spent_s:.0f} s' * (spent_s > SHOW_RATE_AFTER_S)}"
        line = f"{self._doing}: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
        if self._doing == "loading" or not done or spent_s < SHOW_RATE_AFTER_S:
            return line
        left_s = max(0, round((total - done) * spent_s / done))
        return f"{line} · {done / spent_s / 1e6:.1f} MB/s · {left_s // 60}:{left_s % 60:02} left"

    def _begin(self, doing: str, total_bytes: int = 0, done: Callable[[], int] = lambda: 0) -> None:
        self._doing, self._done, self._total, self._since_s = (
            doing,
            done,
            total_bytes,
            time.monotonic(),
        )

    @silence_libraries()
    def load(self) -> Model:
        """Return the model, from its folder, from the hub cache, or downloaded."""
        if self._in_hub:
            self._find_in_hub()
        if not os.path.isdir(os.environ.get("TMPDIR", "/")):
            raise ChatError("TMPDIR names no folder, and MLX needs one: make it, or unset TMPDIR.")
        weights = sorted(self._folder.glob(WEIGHTS))
        read = preload_weights(weights)
        self._begin("loading", done=lambda: sum(read))
        config = self._check_folder(weights)
        net, tokenizer = self._load_engine()
        if tokenizer.chat_template is None and not getattr(tokenizer, "has_chat_template", False):
            advice = f"name its instruct-tuned sibling, or try {EXAMPLE_MODEL}."
            raise ChatError(
                f"{self._name} has no chat template, so it can't hold a conversation: {advice}"
            )
        room = None if self._settings.force else self._room
        advice = (
            self._settings.apply_recommended(self._folder / "generation_config.json")
            if self._settings.recommended
            else ""
        )
        length, fingerprint = first_positive_int(config, CONTEXT_KEYS), self._fingerprint()
        template = ChatTemplate(self._name, tokenizer)
        return Model(self._name, net, template, length, self._hosts, advice, fingerprint, room)

    def _fingerprint(self) -> str:
        """Return the names, sizes and times of all files that shape the network, and mlx-lm's version."""
        # Of a model in the hub cache the path names the commit.
        files = [
            file for pattern in (WEIGHTS, "*.json", "*.py") for file in self._folder.glob(pattern)
        ]
        files += [*Path(self._settings.adapter).glob("adapter*")] if self._settings.adapter else []
        stats = [(str(file.absolute()), file.stat()) for file in sorted(files) if file.exists()]
        return repr(
            [
                import_library("mlx_lm").__version__,
                [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
            ]
        )

    def _broken(self, what: str) -> str:
        if self._in_hub:
            return f"{what}. Remove {self._folder.parent.parent}, and it is downloaded again."
        return f"{what}. Put a whole copy of the model into {self._folder}."

    def _find_in_hub(self) -> None:
        name, revision = self._name, self._settings.revision
        self._folder = hub_snapshot_folder(name, revision)
        try:
            with foreign(functools.partial(hub_error_message, name, revision)):
                if missing_files(self._folder):
                    self._download()
        except KeyboardInterrupt as error:
            raise ChatError(f"The download of {name} was stopped. {RETRY_HINT}", 130) from error

    def _download(self) -> None:
        """Fetch what is missing of the repository into the hub cache, once it is known to be of use."""
        from huggingface_hub import HfApi, constants, hf_hub_download

        self._begin(
            f"asking {constants.ENDPOINT} for {self._name}; it is tried again until it answers"
        )
        name, revision, timeout = self._name, self._settings.revision, constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        self._check_names(sizes)
        # By the revision's name, so that the cache notes which commit that is.
        self._folder = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        self._check_config(sizes)
        self._check_memory(sum(sizes[file] for file in fnmatch.filter(sizes, WEIGHTS)))
        wanted = {file for pattern in NEEDED for file in fnmatch.filter(sizes, pattern)}
        missing = sorted(
            (file for file in wanted if not (self._folder / file).exists()), key=sizes.__getitem__
        )
        total, free = sum(map(sizes.__getitem__, missing)), shutil.disk_usage(self._folder).free
        if total > free:
            raise ChatError(
                f"{name} does not fit on the disk: {total / GIB:.1f} GiB are still to be downloaded, where"
                f" {hub_cache()} has {free / GIB:.1f} GiB free. {DISK_HINT}"
            )
        blobs = self._folder.parent.parent / "blobs"
        before = folder_bytes(blobs)
        self._begin("downloading", total, lambda: folder_bytes(blobs) - before)
        # One after the other, and by this thread: huggingface-hub's snapshot_download waits on Ctrl+C until
        # the files that its threads are at are done.
        for file in missing:
            hf_hub_download(name, file, revision=self._folder.name)

    def _check_folder(self, weights: Sequence[Path]) -> dict[str, Any]:
        from safetensors import safe_open

        with foreign(self._broken(f"{self._name} can't be read: {{}}")):
            names = [entry.name for entry in self._folder.iterdir()]
            self._check_names(names)
            config = self._check_config(names)
            self._total = sum(file.stat().st_size for file in weights)
            self._room = self._check_memory(self._total)
        tensors = 0
        for file in weights:
            # MLX before 0.30 loads a cut file without a word.
            sentence = self._broken(f"{file.name} of {self._name} can't be loaded: {{}}")
            with foreign(sentence), safe_open(file, "np") as opened:
                tensors += len(opened.keys())
        if (layers := first_positive_int(config, LAYER_KEYS) or 0) > tensors:
            raise ChatError(f"{self._name} claims to have {layers:.0e} layers: name another model.")
        adapter = self._settings.adapter
        if adapter and not Path(adapter, "adapters.safetensors").exists():
            raise ChatError(
                f"There is no adapter in {adapter}: name a folder that holds an adapters.safetensors."
            )
        self._check_sharing(config)
        return config

    def _check_names(self, files: Collection[str]) -> None:
        formats = {
            UNSUPPORTED_FORMATS[suffix]
            for suffix in {Path(file).suffix for file in files} & {*UNSUPPORTED_FORMATS}
        }
        if not fnmatch.filter(files, WEIGHTS):
            held = (
                f"holds its weights as {' and '.join(sorted(formats))} files"
                if formats
                else f"holds no {WEIGHTS}"
            )
            raise ChatError(
                f"{self._name} {held}, where MLX needs {WEIGHTS}: look for it at mlx-community."
            )
        if "config.json" not in files:
            raise ChatError(
                f"{self._name} has no config.json: name a model's folder, or a Hugging Face repository."
            )

    def _check_config(self, files: Collection[str]) -> dict[str, Any]:
        """Return the configuration of a model that mlx-lm knows, that talks, and that brings no code to run."""
        name, mlx_lm = self._name, import_library("mlx_lm")
        with foreign(self._broken(f"config.json of {name} can't be read: {{}}")):
            config: dict[str, Any] = json.loads((self._folder / "config.json").read_bytes())
            model_type, architectures = config.get("model_type"), config.get("architectures") or []
            silent = all(map(NON_CHAT_ARCHITECTURE.search, architectures)) and architectures
        if not isinstance(model_type, str):
            raise ChatError(
                f"config.json of {name} names no model_type, so mlx-lm can't load it. Name another model."
            )
        if ("modules.json" in files or silent) and not self._settings.force:
            raise ChatError(
                f"{name} is made for embeddings or labels, not for talking: name a chat model such as {EXAMPLE_MODEL},"
                " or try it all the same with --force."
            )
        # mlx-lm before 0.32 runs such a file unasked (CVE-2026-5843).
        if config.get("model_file") is not None and not self._settings.trust_remote_code:
            raise ChatError(REMOTE_CODE_MESSAGE.format(name))
        # The look-up of mlx-lm's own `load`, which follows its tables of other names. A version that has moved it
        # says the same a little later, when it loads.
        look_up = getattr(mlx_lm.utils, "_get_classes", lambda config: None)
        images = "; it is a model for images" * ("vision_config" in config)
        with foreign(
            f"{name} is of type {shorten(model_type)}, which mlx-lm {mlx_lm.__version__} doesn't know{images}: update"
            " mlx-lm (the newest may need a newer Python), or name another model."
        ):
            if config.get("model_file") is None:
                look_up(config)
        return config

    def _check_memory(self, weight_bytes: int) -> int:
        """Return the bytes that so many of weights leave to a conversation on each host, at least a little."""
        import mlx.core as mx

        usable = memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if mx.metal.is_available():
            # What Metal recommends at most.
            device = (getattr(mx, "device_info", None) or mx.metal.device_info)()
            usable = int(device.get("max_recommended_working_set_size") or memory)
        share = weight_bytes // self._hosts.size
        if share > usable and not self._settings.force:
            raise ChatError(
                f"{self._name} is too large: {share / GIB:.1f} GiB of weights, where this machine has"
                f" {memory / GIB:.1f} GiB of memory, {usable / GIB:.1f} GiB of it usable for a model. Name a smaller or"
                " more quantized one, or try it all the same with --force."
            )
        # A sixteenth is for what a step of a prompt's reading takes, and for what MLX keeps at hand.
        return max(usable - usable // 16 - share, usable // 16)

    def _check_sharing(self, config: dict[str, Any]) -> None:
        if self._settings.adapter and self._hosts.size > 1:
            raise ChatError(
                "mlx-lm can't share an adapter among hosts: leave out --adapter, or use one host."
            )
        if self._hosts.broadcast(config) != config:
            raise ChatError(f"{self._name} is another model here than on the first host.")
        for key in ("num_attention_heads", "num_key_value_heads"):
            # mlx-lm itself would round the number down.
            if isinstance(config.get(key), int) and config[key] % self._hosts.size:
                many = f"{self._hosts.size} hosts: its {key} are {config[key]}"
                raise ChatError(f"{self._name} can't be shared evenly among {many}.")

    def _load_engine(self) -> tuple[Any, Any]:
        """Return the network, or this host's share of it, and the tokenizer."""
        mlx_lm = import_library("mlx_lm")
        load = (
            mlx_lm.load
            if self._hosts.size == 1
            else getattr(mlx_lm.utils, "sharded_load", lambda: None)
        )
        known = inspect.signature(load).parameters
        if "tokenizer_config" not in known:
            # By itself an older `sharded_load` runs the code of any repository.
            raise ChatError(
                f"mlx-lm {mlx_lm.__version__} can't share a model among hosts safely: update it."
            )
        trust = {"trust_remote_code": self._settings.trust_remote_code}
        # Older versions know but one of the two ways to allow a repository's code, and only `load` an adapter.
        options = {"tokenizer_config": trust, "adapter_path": self._settings.adapter, **trust}
        with foreign(self._load_failure):
            net, tokenizer = load(
                str(self._folder), **{name: options[name] for name in options.keys() & known.keys()}
            )
        return net, tokenizer

    def _load_failure(self, error: BaseException) -> str:
        name, words, adapter = self._name, error_text(error), self._settings.adapter
        if "trust_remote_code" in str(error):
            return REMOTE_CODE_MESSAGE.format(name)
        if self._hosts.size > 1:
            return f"The hosts could not load {name} together: {words}."
        if adapter:
            return f"{name} can't be loaded with {adapter}: {words}. Name another one."
        missing = "".join(f". {file} is missing" for file in missing_files(self._folder)[:1])
        return self._broken(f"{name} could not be loaded: {words}{missing}")


# ---------------------------------------------------------------------------------- Prompt cache

# Tokens put through the model between two looks at Ctrl+C while a prompt is read (prefill).
# mlx-lm's own default is 2048, which a small model on a slow machine takes a second for.
PREFILL_STEP_TOKENS = 512

ENGINE_FAILED_MESSAGE = (
    "The engine failed, so what it was saying is not kept: {}."
    " If memory ran out, a shorter prompt, /clear or a smaller model takes less."
)


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of elements that two sequences have in common at their start."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other))
    )


class PromptCache:
    """Owns the engine's state. Invariant: whenever no call is under way, it is the state of exactly `self.tokens`.

    Given a new prompt it goes to the longest prefix that it can reach, and only the rest is computed.
    Plain KV caches are trimmed. Recurrent layers, chunks of attention, and sliding windows once they have wrapped,
    can't be: of those a copy is kept at a place that the next turn is known to share (a snapshot), and to go back
    is to put the copy in place and trim the other layers to the same length. Resetting only some layers would
    give wrong words. Whenever the state can't be known, it is dropped.
    """

    def __init__(self, net: Any, shared: bool = False) -> None:
        """Hold the state of a network; one that is `shared` goes back to snapshots, the same on every host."""
        self._net, self._shared = net, shared
        self.clear()
        # Every layer can go back any number of tokens, now and later, here and on other hosts.
        self.can_trim = not (shared or any(map(self._needs_copy, self._leaves())))

    def clear(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.tokens: list[int] = []
        self._layers: list[Any] = make_prompt_cache(self._net)
        # Two places are kept: this turn's, for the next turn and /retry, and the turn's before, for /undo. Each is a
        # number of tokens, and copies by the numbers of their leaves.
        self._snapshots: list[tuple[int, dict[int, Any]]] = []

    def _leaves(self) -> list[Any]:
        # A hybrid layer may hold several caches in a CacheList.
        return [leaf for layer in self._layers for leaf in getattr(layer, "caches", [layer])]

    @staticmethod
    def _trims_now(leaf: Any) -> bool:
        # A sliding window (max_size) says that it can be trimmed until it wraps, a chunk (chunk_size) says so always.
        return bool(leaf.is_trimmable()) and not hasattr(leaf, "chunk_size")

    @classmethod
    def _needs_copy(cls, leaf: Any) -> bool:
        return hasattr(leaf, "max_size") or not cls._trims_now(leaf)

    def _take_snapshot(self) -> None:
        # Deep, because a wrapped sliding window writes into its arrays in place. Copying an MLX array
        # shares its memory until one of the two is written to. Only what can't be trimmed is copied.
        leaves = enumerate(self._leaves())
        copies = {
            place: copy.deepcopy(vars(leaf)) for place, leaf in leaves if self._needs_copy(leaf)
        }
        self._snapshots = [*self._snapshots[-1:], (len(self.tokens), copies)]

    def rewind(self, prompt: Sequence[int]) -> int:
        """Go to the longest prefix of `prompt` that can be reached and leaves a token to compute; return its length."""
        shared = common_prefix(self.tokens, prompt[:-1])
        if shared == len(self.tokens):
            return shared
        self._snapshots = [kept for kept in self._snapshots if kept[0] <= shared]
        # A sliding window goes back until it wraps.
        trims = not self._shared and all(map(self._trims_now, self._leaves()))
        length, copies = (shared, {}) if trims else [(0, {}), *self._snapshots][-1]
        with self._dropped_on_error():
            surplus, self.tokens = len(self.tokens) - length, self.tokens[:length]
            for place, leaf in enumerate(self._leaves()):
                if place in copies:
                    vars(leaf).update(copy.deepcopy(copies[place]))
                elif not length or leaf.trim(surplus) != surplus:
                    self.clear()
                    break
        return len(self.tokens)

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            with foreign(ENGINE_FAILED_MESSAGE, EngineError):
                yield
        except GeneratorExit:
            # Raised between two calls of the engine, where its state is known.
            raise
        except BaseException:
            self.clear()
            raise

    def prefill(self, prompt: list[int], shared: int) -> Iterator[int]:
        """Compute the state of all of `prompt` but its last token; yield how many are done after each chunk.

        The cache must hold a prefix of the prompt: call `rewind` first. The next turn will share the first `shared`
        tokens: a snapshot is taken there if one is needed. May be left at any chunk.
        """
        import mlx.core as mx
        from mlx_lm.generate import generation_stream, wired_limit

        last = len(prompt) - 1
        due = min(shared, last)
        streams: list[Any] = [generation_stream]
        with wired_limit(self._net, streams):
            while (held := len(self.tokens)) < last:
                end = min(due if held < due else last, held + PREFILL_STEP_TOKENS)
                with self._dropped_on_error(), mx.stream(generation_stream):
                    self._net(mx.array(prompt[held:end])[None], cache=self._layers)
                    mx.eval([layer.state for layer in self._layers])
                    # A second Ctrl+C may come at any point: it must not stand between the state and its tokens.
                    self.tokens = prompt[:end]
                mx.clear_cache()
                if end == due and not self.can_trim:
                    self._take_snapshot()
                yield end

    def capacity_tokens(self, memory_bytes: int) -> int | None:
        """Return the number of tokens whose state so many bytes hold, or None if it does not grow; forgets everything.

        Full attention grows with each token. Windows, chunks and recurrent layers take what they take when they are
        full, and the same for each of two snapshots.
        """
        import mlx.core as mx
        from mlx.utils import tree_flatten

        growing, fixed = 0, 0
        # MLX knows the shapes of what it has not computed: this takes a start no time.
        with self._dropped_on_error():
            self._net(mx.array([[0]]), cache=self._layers)
        for leaf in self._leaves():
            values: Any = tree_flatten(vars(leaf))
            most = getattr(leaf, "max_size", None) or getattr(leaf, "chunk_size", None)
            for array in (
                value for _, value in values if isinstance(value, mx.array) and value.ndim > 1
            ):
                # An array is laid out for more tokens than it holds.
                row = array.nbytes // array.shape[-2]
                if self._needs_copy(leaf):
                    # A window has room for a step of a prompt's reading beside what it keeps.
                    fixed += 3 * row * (most + PREFILL_STEP_TOKENS if most else array.shape[-2])
                else:
                    growing += row
        self.clear()
        return max(memory_bytes - fixed, memory_bytes // 2) // growing if growing else None

    def _values(self) -> list[tuple[str, Any]]:
        from mlx.utils import tree_flatten

        # Older caches tell apart from their arrays how they stand in them.
        values: Any = tree_flatten(
            [[layer.state, getattr(layer, "meta_state", "")] for layer in self._layers]
        )
        return list(values)

    def _digest(self) -> str:
        """Return a checksum of the tokens, and of the state to its last bit: one that has turned would change words."""
        import mlx.core as mx

        digest = zlib.crc32(str(self.tokens).encode())
        for _, value in self._values():
            # A gigabyte or more in a second, which is less than it takes to compute the state of a thousand tokens.
            array: Any = (
                mx.contiguous(value).reshape(-1).view(mx.uint8)
                if isinstance(value, mx.array)
                else None
            )
            digest = zlib.crc32(str(value).encode() if array is None else memoryview(array), digest)
        return str(digest)

    def save(self, file: Path, model: str) -> None:
        """Write the state and its tokens to a file of mode 0600, for a model of this fingerprint.

        Raises whatever goes wrong, with the file as it was, also if little room would be left on the disk.
        """
        from mlx_lm.models.cache import save_prompt_cache

        # Always the same name: what a process leaves that is killed meanwhile goes with the next.
        part = file.with_name(f"{file.name}.part.safetensors")
        part.unlink(missing_ok=True)
        if not self.tokens:
            return
        if shutil.disk_usage(part.parent).free < 2 * sum(
            getattr(value, "nbytes", 0) for _, value in self._values()
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part.touch(0o600, exist_ok=False)
        try:
            about = {"model": model, "tokens": json.dumps(self.tokens), "digest": self._digest()}
            save_prompt_cache(str(part), self._layers, about)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def load(self, file: Path, model: str, prompt: Sequence[int]) -> None:
        """Take a saved state, in place of none, if it is whole, of the same model, and of use for `prompt`."""
        from mlx_lm.models import cache

        engine: Any = cache
        # Whatever is wrong with the file, or with what this mlx-lm makes of it, all can be computed anew.
        with contextlib.suppress(EngineError), self._dropped_on_error():
            # MLX reads the arrays only when they are used.
            layers, about = engine.load_prompt_cache(str(file), return_metadata=True)
            tokens = json.loads(about["tokens"])
            shared = common_prefix(tokens, prompt[:-1])
            # To read the state of tokens takes a small part of the time that it takes to compute it, but not none.
            if about["model"] != model or shared < len(tokens) / (8 if self.can_trim else 1):
                return
            for layer, loaded in zip(self._layers, layers):
                vars(layer).update(vars(loaded))
            self.tokens = tokens
            if self._digest() != about["digest"]:
                self.clear()
            elif not self.can_trim:
                self._take_snapshot()

    def stream(
        self, tokenizer: Any, prompt: list[int], **options: Any
    ) -> Generator[Any, None, None]:
        """Yield mlx-lm's responses to `prompt` after its prefill, one a token, without end but the model's own.

        Between two responses the iterator may be kept, or closed: the engine runs one token ahead, so the
        state holds every token that was yielded.
        """
        import mlx.core as mx
        from mlx_lm import stream_generate

        with self._dropped_on_error():
            rest = mx.array(prompt[len(self.tokens) :])
            responses = stream_generate(
                self._net, tokenizer, rest, max_tokens=-1, prompt_cache=self._layers, **options
            )
            self.tokens = [*prompt]
            with contextlib.closing(responses):
                for response in responses:
                    self.tokens.append(response.token)
                    yield response


# -------------------------------------------------------------------------------------- Thoughts


class Piece(NamedTuple):
    """A streamed unit of a reply: `answer` or `thought`, or else `prefill` or a `notice`, none of the model's words."""

    kind: str
    text: str


# The kinds of a reply's text that are never shown: before its first mark or word, and between thought and answer.
START, BETWEEN = "start", "between"

# Contents in blocks of types that templates read (Ministral's, Apertus').
BLOCKS = {
    "thinking blocks": ("thinking", "thinking", "text"),
    "thoughts blocks": ("thoughts", "text", "response"),
}


def message_with_thought(place: str, thought: str, answer: str) -> dict[str, Any]:
    """Return a reply as a message for a template that takes a thought in a place: a field, or blocks of the content."""
    if place not in BLOCKS:
        return {
            "content": answer,
            **({place: thought} if thought and place not in ("", "content") else {}),
        }
    kind, field, other = BLOCKS[place]
    blocks = [{"type": kind, field: thought}, {"type": other, "text": answer}][not thought :]
    return {"content": {"blocks": blocks} if kind == "thoughts" else blocks}


class ThoughtFormat(NamedTuple):
    """The marks around a thought and an answer, and the place where the template takes a thought back.

    A reply is `start` thought `end` answer `tail`, or `lead` answer `tail`; without a `start` it just begins with the
    thought. The place is a field of the message, one of `BLOCKS`, `content`, or none: old thoughts are left out.
    """

    start: str = ""
    end: str = ""
    lead: str = ""
    tail: str = ""
    place: str = ""

    @property
    def marks(self) -> list[str]:
        """The marks of a thought that are known, without blanks around."""
        return [mark.strip() for mark in (self.start, self.end) if mark.strip()]

    @property
    def closing(self) -> str:
        """The text that ends a thought and begins the answer."""
        return self.end + self.lead * (self.lead.strip() not in self.end)

    def to_template_message(self, message: Message, said: str) -> dict[str, Any]:
        """Return a message in the form in which the template takes it; `said` is the reply in the model's own words."""
        answer, thought = message["content"], message.get("reasoning_content", "")
        place = self.place if message["role"] == "assistant" else ""
        if place == "content" and thought:
            answer = said or self.said(message)
            # A thought that was stopped is closed, or the template would take it for an answer.
            answer += self.end * (self.end.strip() not in answer)
        return {"role": message["role"], **message_with_thought(place, thought, answer)}

    def said(self, message: Message, begun: str = "") -> str:
        """Return a reply as the model said it, after what the prompt had `begun` of it."""
        answer, thought = message["content"], message.get("reasoning_content", "")
        if not thought:
            return self.lead * (not begun) + answer
        return self.start * (not begun) + thought + (self.closing + answer if answer else "")

    def parted(self, message: Message) -> Message:
        """Return a message with its thought apart, where an older session has it in the content, between its marks."""
        for format in (self, self._replace(start="<think>", end="</think>")):
            marked = message["role"] == "assistant" and any(
                mark in message["content"] for mark in format.marks
            )
            if marked and "reasoning_content" not in message:
                splitter = ThoughtSplitter(format)
                list(itertools.chain(splitter.feed(message["content"]), splitter.finish()))
                message = {**message, **splitter.said()}
        return message


# The variables that templates read of how to think: switches, degrees, and a number of tokens.
SWITCHES, DEGREES, BUDGET = (
    ("enable_thinking", "thinking"),
    ("reasoning_effort", "thinking_effort"),
    "thinking_budget",
)
BUDGETS = {"none": 0, "minimal": 0, "low": 512, "medium": 4096, "high": 16384}


def think_variables(model: Model, think: bool | str | None) -> dict[str, Any]:
    """Return the variables that ask a template for a way to think: on, off, a degree, or None for its own default."""
    if think is None:
        return {}
    asked: dict[str, Any] = dict.fromkeys(SWITCHES, think is not False)
    # The least degree that a template knows by name comes nearest to none.
    least = next(
        (
            word
            for word in ("none", "minimal")
            if re.search(rf"""['"]{word}['"]""", model.template.source)
        ),
        "low",
    )
    if degree := think if isinstance(think, str) else "" if think else least:
        asked.update(dict.fromkeys(DEGREES, degree), **{BUDGET: BUDGETS[degree] if think else 0})
    return {name: value for name, value in asked.items() if name in model.template.variables}


# Made-up words, by which a rendering tells where a template puts what.
PROBE_EARLIER, PROBE_QUESTION, PROBE_THOUGHT, PROBE_ANSWER = (
    "hazelcatkin",
    "quincewort",
    "thistledown",
    "walnutshell",
)
QUESTION = {"role": "user", "content": PROBE_QUESTION}

# The names of thoughts in fields and marks, the marks of an answer, and all that looks like a mark.
THOUGHT_WORD = re.compile("think|thought|reason", re.IGNORECASE)
ANSWER_MARK = re.compile(r"\W*(BEGIN.|START_)?(FINAL.)?(response|answer)\W*", re.IGNORECASE)
MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z _]{1,40}\]")


def possible_end_marks(mark: str) -> set[str]:
    """Return the marks that may close what a mark opens."""
    renamed = {
        mark.replace("START", "END"),
        mark.replace("BEGIN", "END"),
        mark.replace("prefix", "suffix"),
    }
    return {mark[0] + "/" + mark[1:], re.sub(r"^<\|(.*[^|])>$", r"<\1|>", mark), *renamed} - {mark}


class ThoughtFinder:
    """Finds how a model marks its thoughts by rendering its template with made-up words; it knows no model by name."""

    def __init__(self, model: Model) -> None:
        tokenizer = model.template.tokenizer
        self._model = model
        self._pair = (
            (str(tokenizer.think_start), str(tokenizer.think_end))
            if tokenizer.has_thinking
            else ("", "")
        )
        with foreign(f"The tokenizer of {model.name} fails: {{}}. Name another model."):
            self._text = " ".join(
                [model.template.source, *tokenizer.get_added_vocab(), *self._pair]
            )
            self._ends = {tokenizer.decode([token]) for token in tokenizer.eos_token_ids}
        switches = [
            {name: on}
            for name in SWITCHES
            if name in model.template.variables
            for on in (True, False)
        ]
        self._switches: list[dict[str, Any]] = [{}, *switches]

    def find(self) -> ThoughtFormat:
        """Return the format; it is empty for a model that doesn't think."""
        if not THOUGHT_WORD.search(self._text):
            return ThoughtFormat()
        before, _, after = self._probe(PROBE_ANSWER).partition(PROBE_ANSWER)
        tails = [after.partition(end)[0] for end in self._ends if end in after]
        found = self._by_message() or self._by_marks()
        lead = found.lead or before[self._header(before) :]
        if any(mark in lead for mark in found.marks):
            lead = ""
        return found._replace(lead=lead, tail=found.tail or min(tails, key=len, default=""))

    def _probe(
        self,
        answer: str = "",
        thought: str = "",
        place: str = "",
        after: Sequence[Message] = (),
        **switches: Any,
    ) -> str:
        """Render a conversation with this reply, or its prompt alone; a template that can't has nothing to tell."""
        # Some templates treat the first reply unlike later ones.
        earlier = [
            {"role": "user", "content": PROBE_EARLIER},
            {"role": "assistant", **message_with_thought(place, "", PROBE_EARLIER)},
        ]
        reply = (
            [{"role": "assistant", **message_with_thought(place, thought, answer)}, *after]
            if answer
            else []
        )
        with contextlib.suppress(ChatError):
            return self._model.template.render(
                [*earlier, QUESTION, *reply], add_generation_prompt=not answer, **switches
            )
        return ""

    @functools.cached_property
    def _prompts(self) -> list[str]:
        return [*filter(None, (self._probe(**switches) for switches in self._switches))]

    @functools.cached_property
    def _marks(self) -> dict[str, str]:
        """All marks that the prompts, the template and the vocabulary name, each with the first that it may close."""
        marks = list(dict.fromkeys(MARK.findall(" ".join([*self._prompts, self._text]))))
        openings = {twin: mark for mark in reversed(marks) for twin in possible_end_marks(mark)}
        return {
            mark: openings.get(mark, mark.replace("/", "", 1) if mark[1] == "/" else "")
            for mark in marks
        }

    def _header(self, text: str) -> int:
        """Return the length of a rendering up to where the reply begins."""
        shared = [common_prefix(text, prompt) for prompt in self._prompts]
        # A switch may have put something behind the prompt, and two marks may begin alike.
        length = min(
            (n for n in shared if n > text.find(PROBE_QUESTION) + len(PROBE_QUESTION)),
            default=len(text),
        )
        return len(text[:length].rstrip("<[|"))

    def _by_message(self) -> ThoughtFormat | None:
        """Look for a field of the message, or blocks of its content, that come out before the answer."""
        words = {*re.findall(r"\w+", self._model.template.source)}
        names = sorted(filter(THOUGHT_WORD.search, words), key=lambda name: (-len(name), name))
        places = [*names, *(place for place in BLOCKS if place.split()[0] in names)]
        for place, switches in itertools.product(places, self._switches):
            before, _, rest = self._probe(PROBE_ANSWER, PROBE_THOUGHT, place, **switches).partition(
                PROBE_THOUGHT
            )
            end, answered, _ = rest.partition(PROBE_ANSWER)
            # Not merely printed as it is, as part of a list.
            if answered and end.strip() and "'type'" not in before and '"type"' not in before:
                opening = self._marks.get(end.strip(), "")
                header = self._header(before)
                start = before.rfind(opening) if opening and opening in before else header
                # Blanks before a mark belong to it.
                start = start if before[header:start].strip() else min(header, start)
                return ThoughtFormat(before[start:], end, place=place)
        return None

    def _by_marks(self) -> ThoughtFormat:
        """Look for marks with telling names, above all for those that count in the content of an old reply."""
        pairs = [*((opening, mark) for mark, opening in self._marks.items()), self._pair]
        formats = [self._with_blanks(*pair) for pair in pairs if pair[0]]
        formats = [format for format in formats if THOUGHT_WORD.search(format.start)]
        for format in filter(self._goes_back, formats):
            return format._replace(place="content")
        lead = next(filter(ANSWER_MARK.fullmatch, self._marks), "")
        tail = next((mark for mark, opening in self._marks.items() if lead and opening == lead), "")
        told = "".join(self._prompts)
        if lead and lead in told and not any(format.start.strip() in told for format in formats):
            return ThoughtFormat("", lead, "", tail)
        return formats[0]._replace(lead=lead, tail=tail) if formats else ThoughtFormat()

    def _goes_back(self, format: ThoughtFormat) -> bool:
        """Tell if the template cuts a thought between these marks off an old reply, or keeps what a prompt begins."""
        said = format.start + PROBE_THOUGHT + format.end + PROBE_ANSWER
        text = self._probe(said, after=[QUESTION, {"role": "assistant", "content": ""}, QUESTION])
        cut = PROBE_ANSWER in text and PROBE_THOUGHT not in text
        prompted = any(
            format.end.strip() in prompt.rpartition(PROBE_QUESTION)[2] for prompt in self._prompts
        )
        return cut or (prompted and any(prompt + said in text for prompt in self._prompts))

    def _with_blanks(self, start: str, end: str) -> ThoughtFormat:
        """Return two marks with what belongs to them, as an empty or an opened thought at the end of a prompt tells."""
        opened = any(prompt.endswith(f"{start}\n") for prompt in self._prompts)
        for prompt in self._prompts:
            closed = re.search(rf"(?:({re.escape(start)}\w*)(\s*))?{re.escape(end)}(\s*)$", prompt)
            if closed and not opened:
                within = closed[2] or ""
                half = len(within) // 2
                return ThoughtFormat(
                    (closed[1] or start) + within[half:], within[:half] + end + closed[3]
                )
        blanks = ("\n", "\n", "\n\n") if opened or end.startswith("</") else ("", "", "")
        return ThoughtFormat(start + blanks[0], blanks[1] + end + blanks[2])


class ThoughtSplitter:
    """Tells thoughts from the answer in streamed text; a mark may be split over pieces."""

    def __init__(self, format: ThoughtFormat, begun: str = "") -> None:
        """`begun` is what the prompt has said already of the reply."""
        start, end, lead = (mark.strip() for mark in format[:3])
        # A thought may have several parts.
        further = end.removesuffix(lead) + start if start else ""
        # The marks that count in each kind of text, and the kind that each begins.
        self._marks = {
            START: {start: "thought", end: BETWEEN, lead: "answer"},
            "thought": {start: "thought", further: "thought", end: BETWEEN},
            BETWEEN: {lead: "answer"},
            "answer": {},
        }
        self._format = format
        # What ends an answer; where there is something to begin one too, only after that or another mark.
        self._tail = "" if lead else format.tail
        # All of the text, marks and all; the kind of text that comes next, and what is not certain yet.
        self.text, self.kind, self._held = "", START, ""
        # What came, after the prompt, of the kinds that are shown.
        self._texts = {"thought": "", "answer": ""}
        list(self.feed(begun))
        self._texts = {"thought": "", "answer": ""}

    def feed(self, text: str) -> Iterator[Piece]:
        """Yield what is certain of all the text so far."""
        self.text, self._held = self.text + text, self._held + text
        while True:
            found = (
                (self._held.find(mark), mark)
                for mark in self._marks[self.kind]
                if mark and mark in self._held
            )
            place, mark = min(found, default=(0, ""))
            if not mark:
                break
            yield from self._take(place)
            # After the words before it, it may be no mark any more.
            if mark in (marks := self._marks[self.kind]):
                self._held = self._held[len(mark) :]
                self.kind, self._tail = marks[mark], self._format.tail
        yield from self._take(self._certain())

    def _certain(self) -> int:
        """Return the length of the held text that is no mark: its end may be the beginning of one."""
        held, marks, tail = (
            self._held,
            self._marks[self.kind],
            self._tail.strip() * (self.kind == "answer"),
        )
        if tail:
            # It ends the answer only if nothing comes after it. Blanks around belong to it.
            held, marks = held.rstrip(), {tail: ""}
        partial = max(
            (n for mark in marks for n in range(1, len(mark) + 1) if held.endswith(mark[:n])),
            default=0,
        )
        certain = held[: len(held) - partial]
        return len(certain.rstrip() if tail or not certain.strip() else certain)

    def finish(self) -> Iterator[Piece]:
        """Yield what was held back, at the end of a reply, but for its last mark or the beginning of a token."""
        rest, tail = self._held.strip(), self._tail
        yield from self._take(
            0 if rest.startswith("<|") or (rest and rest == tail.strip()) else len(self._held)
        )
        # Blanks before the end of a turn are the template's.
        self.text, self._texts["answer"] = (
            text.removesuffix(tail) for text in (self.text, self._texts["answer"])
        )

    def said(self) -> Message:
        """Return the answer, and the thought if there is one, as a message has them."""
        thought, answer = (
            self._texts[kind].replace(TOKEN_BREAK, "") for kind in ("thought", "answer")
        )
        return {
            "content": answer,
            **({"reasoning_content": thought.strip()} if thought.strip() else {}),
        }

    def _take(self, length: int) -> Iterator[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        if self.kind in (START, BETWEEN):
            # Newlines around the marks belong to them.
            text = text.lstrip("\n") if self._format.end else text
            if not text.strip():
                return
            unmarked = self.kind == START and self._format.end and not self._format.start
            self.kind = "thought" if unmarked else "answer"
        if self.kind == "thought" and text.strip():
            # From here on it would be quoted.
            self._marks["thought"].pop(self._format.start.strip(), None)
        if text:
            self._texts[self.kind] += text
            yield Piece(self.kind, text)


# ---------------------------------------------------------------------------------- Conversation


# From here on a prompt takes long enough to say how far its reading is.
LONG_PROMPT_TOKENS = 200

CONTEXT_FULL_MESSAGE = "The reply can't go on: it fills {}. /clear starts over."

# The most tokens that a reply may have outside of its thought and its answer; a model may say blanks without end.
MAX_MARK_TOKENS = 64

# Below this a temperature is as good as 0, and 1 / temperature overflows a float32 further down.
MIN_TEMPERATURE = 1e-3


@dataclasses.dataclass
class Statistics:
    """Figures of one reply. Times are counted from the prompt on, which is when this is made."""

    context_length: int | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    thought_tokens: int = 0
    answer_tokens: int = 0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    finish_reason: str | None = None
    started_s: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def remaining_tokens(self) -> int:
        """The number of tokens that the context has still room for."""
        return (self.context_length or sys.maxsize) - self.prompt_tokens - self.generation_tokens

    def summary(self) -> str:
        """Return the statistics as one line."""
        # The first token belongs to the prefill, not to the decode time.
        decode_s = self.total_s - self.time_to_first_token_s
        generation_tps = (
            (self.generation_tokens - 1) / decode_s
            if self.generation_tokens > 1 and decode_s
            else 0.0
        )
        new, used = (
            self.prompt_tokens - self.cached_tokens,
            self.prompt_tokens + self.generation_tokens,
        )
        context = f"{used / self.context_length:.0%}" if self.context_length else f"{used} tokens"
        return (
            f"{self.total_s:.1f} s · {generation_tps:.1f} tokens/s · first {self.time_to_first_token_s:.2f} s"
            f" · {new} new, {self.cached_tokens} reused · context {context}"
        )


@dataclasses.dataclass
class Reply:
    """A reply under way. It is kept when it was cut or stopped, so that it can go on from the live state."""

    messages: list[Message]
    # The first of the messages that the next turn sends.
    first: int
    splitter: ThoughtSplitter
    responses: Generator[Any, None, None]
    # What the responses go on from; the engine has its last token only with the first of them.
    prompt: list[int]


class Conversation:
    """The messages, and the model's replies to them.

    Invariant: between two calls `messages` alternates user and assistant, and ends with an assistant's. A
    reply is a generator of pieces that works while it is consumed: to stop it, close it. If it fails, or is
    stopped before it has said anything, messages are what they were; stopped later, they keep what was said.
    """

    def __init__(self, model: Model, settings: Settings, messages: Sequence[Message] = ()) -> None:
        self._model, self._settings, self.hosts = model, settings, model.hosts
        self._format = ThoughtFinder(model).find()
        # A thought may also begin with prose, which anybody may write.
        model.template.marks = [*filter(MARK.fullmatch, self._format.marks)]
        # What closes a thought.
        self._closing = model.template.encode(self._format.closing)
        self._cache = PromptCache(model.network, shared=model.hosts.size > 1)
        # The most tokens that the memory holds; hosts with other layers are to leave out the same turns.
        memory_bytes = model.memory_bytes
        self._memory_tokens = memory_bytes and self.hosts.broadcast(
            self._cache.capacity_tokens(memory_bytes)
        )
        # The last reply, if it can go on: its responses end by themselves once nobody holds them.
        self._unfinished: Reply | None = None
        # Messages before this one are not sent: they no longer fit.
        self._first = 0
        self.messages = list(map(self._format.parted, messages))
        # A file in which `keep_state` may have kept the engine's state; the first reply looks at it, once.
        self.state: Path | None = None
        # The messages before the last `clear`.
        self._cleared: list[Message] = []
        # Replies as the model said them, marks and all, by their messages.
        self._said: dict[str, str] = {}
        self.statistics = Statistics(None)
        self.seed(settings.seed)

    def describe_size(self, text: str) -> str:
        """Return the size of a text in tokens, in words that say if it can't fit."""
        size, (limit, bound) = len(self._model.template.encode(text)), self.limit()
        full = f", and doesn't fit {bound}" if limit and size > limit else ""
        return f"{size} tokens{full}"

    def limit(self) -> tuple[int | None, str]:
        """Return the most tokens that can be sent and said, None if there is no limit, and in words what sets it."""
        limit, memory_tokens = self._model.context_length, self._memory_tokens
        if memory_tokens is not None and (limit is None or memory_tokens < limit):
            return memory_tokens, f"this machine's memory (about {memory_tokens} tokens)"
        return limit, f"the model's {limit} tokens"

    def seed(self, seed: int | None) -> None:
        """Make what is sampled from here on repeatable; None leaves chance to chance, the same on all hosts."""
        import mlx.core as mx

        mx.random.seed(self.hosts.broadcast(time.time_ns() if seed is None else seed))

    def reply(
        self, prompt: str, before: list[Message] | None = None
    ) -> Generator[Piece, None, None]:
        """Yield the reply to `prompt`, after all messages or those `before`. Raises `ChatError`."""
        self.statistics = Statistics(self.limit()[0])
        before = self.messages if before is None else before
        live = yield from self._begin([*before, {"role": "user", "content": prompt}])
        yield from self._speak(live)

    def retry(self) -> Generator[Piece, None, None]:
        """Yield another reply to the last prompt, in place of the last one. Raises like `reply`."""
        if not self.messages:
            raise ChatError("There is no reply to say again.")
        *before, prompt, _ = self.messages
        return self.reply(prompt["content"], before)

    def continue_reply(self, answer: bool = False) -> Generator[Piece, None, None]:
        """Go on with a reply that was cut or stopped; with `answer` its thought is closed first. Raises `ChatError`."""
        if not self.messages or "finish_reason" not in self.messages[-1]:
            raise ChatError(
                f"There is nothing to continue{': the last reply is complete' * bool(self.messages)}."
            )
        *before, reply = self.messages
        limit, bound = self.limit()
        self.statistics = Statistics(limit)
        live = self._unfinished or (yield from self._begin(before, reply))
        if answer and live.splitter.kind != "thought":
            raise ChatError("There is no thought to close: /continue goes on with the answer.")
        held = len(self._cache.tokens)
        if limit and held + len(self._closing) * answer >= limit:
            raise ChatError(CONTEXT_FULL_MESSAGE.format(bound))
        if self._unfinished:
            self.statistics.prompt_tokens = self.statistics.cached_tokens = held
        # If this fails, the reply goes on from a state computed anew.
        self._unfinished = None
        if answer:
            self._close_thought(live)
        yield from self._speak(live)

    def _within_text(self, responses: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Give the first response the blank that mlx-lm takes off at the start of a text."""
        with contextlib.closing(responses):
            for count, response in enumerate(responses):
                piece = str(self._model.template.tokenizer.convert_ids_to_tokens(response.token))
                if count == 0 and piece.startswith(("Ġ", "▁")):
                    response.text = " " + response.text.lstrip(" ")
                yield response

    def _close_thought(self, live: Reply) -> None:
        """Have the model hear that it has thought enough, and begin the answer; only the mark is computed."""
        live.responses.close()
        list(live.splitter.feed(self._format.closing))
        live.prompt = max(live.prompt, self._cache.tokens, key=len) + self._closing
        self.statistics.prompt_tokens += len(self._closing)
        list(self._cache.prefill(live.prompt, 0))
        live.responses = self._stream(live.prompt)

    def undo(self) -> str:
        """Take the last turn back and return its prompt; where there is none, take `clear` back and return nothing."""
        if self.messages:
            *self.messages, prompt, _ = self.messages
            # Turns left out may fit again.
            self._unfinished, self._first = None, 0
            return prompt["content"]
        if not self._cleared:
            raise ChatError("There is no turn to take back.")
        self.messages, self._cleared = self._cleared, []
        return ""

    def clear(self) -> None:
        """Start over. The engine's state stays: a new conversation may start with the same tokens."""
        self._cleared, self.messages = self.messages or self._cleared, []
        self._unfinished, self._first = None, 0

    def _render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        taken = [
            self._format.to_template_message(
                self._as_text(message), self._said.get(str(message), "")
            )
            for message in self._settings.with_system(messages)
        ]
        return self._model.template.render(
            taken, add_generation_prompt, **think_variables(self._model, self._settings.think)
        )

    def _as_text(self, message: Message) -> Message:
        """Return a message in which nobody can forge a turn, or a thought, by spelling the template's tokens."""
        texts = {
            key: self._model.template.escape_special_tokens(message[key])
            for key in ("content", "reasoning_content")
            if message.get(key)
        }
        return {**message, **texts}

    def _begun(self, text: str, messages: list[Message]) -> str:
        """Return the part of the reply that a prompt has said already: it may have opened, or closed, a thought."""
        header = (
            text[common_prefix(text, self._render(messages, add_generation_prompt=False)) :]
            if self._format.marks
            else ""
        )
        return next(
            (header[header.rfind(mark) :] for mark in self._format.marks if mark in header), ""
        )

    def thinking_note(self) -> str:
        """Return a sentence on what the template can't do of the way to think that was asked for, or nothing."""
        think, model = self._settings.think, self._model
        read = think_variables(model, think)
        if think is not None and not self._format.end:
            return f"{model.name} is no reasoning model: there is nothing to think, or not."
        if think is False and all(BUDGETS.get(read[name], 0) for name in read):
            return (
                f"{model.name} can't be told not to think{'; it is asked for little' * bool(read)}."
            )
        if isinstance(think, str) and not {*DEGREES, BUDGET} & {*read}:
            return f"{model.name} can't be told how much to think."
        return ""

    def _fit(
        self, messages: list[Message], first: int, said: int = 0
    ) -> tuple[int, str, list[int]]:
        """Return the first message that is sent, and the prompt as text and tokens. Raises `ChatError` if none fits.

        Of a reply that goes on, `said` is the number of tokens that follow the prompt.
        """

        def prompt(first: int) -> tuple[int, str, list[int]]:
            text = self._render(messages[first:])
            return first, text, self._model.template.encode(text)

        limit, bound = self.limit()
        room = said + 1 if said else min(self._settings.max_tokens, limit // 4) if limit else 0
        fitting = prompt(first)
        if limit is None or len(fitting[2]) + room <= limit:
            return fitting
        # Leaving out turns moves all the others, so they are computed again: do it seldom, a quarter at a time.
        firsts = range(first + 2, len(messages), 2)
        while len(firsts) > 1:
            half = len(firsts) // 2
            fits = len(prompt(firsts[half - 1])[2]) + room <= limit * 3 // 4
            firsts = firsts[:half] if fits else firsts[half:]
        fitting = prompt(firsts[0]) if firsts else fitting
        if (size := len(fitting[2])) + room > limit:
            if said:
                raise ChatError(CONTEXT_FULL_MESSAGE.format(bound))
            force = ", or start with --force" * (limit != self._model.context_length)
            raise ChatError(
                f"The prompt is too long for {bound}: {size} tokens, with {room} kept for the reply. Shorten it"
                f"{' or lower max-tokens' if size < limit else ''}{force}."
            )
        return fitting

    def keep_state(self, file: Path) -> None:
        """Write the engine's state, up to where the next prompt will share it. Raises whatever goes wrong."""
        # A chat that goes on with the messages doesn't know the model's own words, nor what was left out.
        self._said = {}
        self._unfinished = None
        if not self.messages:
            file.unlink(missing_ok=True)
        elif self._settings.history:
            self._cache.rewind(self._fit([*self.messages, {"role": "user", "content": "b"}], 0)[2])
            self._cache.save(file, self._model.fingerprint)

    def _begin(
        self, messages: list[Message], reply: Message | None = None
    ) -> Generator[Piece, None, Reply]:
        """Compute the state of a prompt, and of a reply of an earlier day up to where it was cut or stopped."""
        first = self._first if self._settings.history else len(messages) - 1
        reply = reply and self._as_text(reply)
        most = len(self._model.template.encode(self._format.said(reply))) if reply else 0
        fitting, text, tokens = self._fit(messages, first, most)
        if fitting > first:
            turns = fitting // 2
            who = (
                f"The first {turns} turns no longer fit"
                if turns > 1
                else "The first turn no longer fits"
            )
            yield Piece("notice", f"{who} {self.limit()[1]}: left out from here on.")
        self._unfinished = None
        sent = messages[fitting:]
        begun = self._begun(text, sent)
        said = self._format.said(reply, begun) if reply else ""
        # A clock or a date in the template may be different elsewhere.
        tokens = self.hosts.broadcast(tokens + self._model.template.encode(said))
        yield from self._prefill(tokens, sent)
        splitter, responses = ThoughtSplitter(self._format, begun), self._stream(tokens)
        list(splitter.feed(said))
        # Turns that --no-history leaves out are left out of this turn only.
        later = fitting if self._settings.history else self._first
        return Reply(
            messages, later, splitter, self._within_text(responses) if reply else responses, tokens
        )

    def _prefill(self, tokens: list[int], messages: list[Message]) -> Iterator[Piece]:
        """Compute the state of the tokens of a prompt, which these messages make, from what is there already."""
        state, self.state, shared = self.state, None, 0
        if state:
            self._cache.load(state, self._model.fingerprint, tokens)
        statistics, cached = self.statistics, self._cache.rewind(tokens)
        if state and cached and self._settings.stats:
            yield Piece(
                "notice",
                f"{cached:,} tokens resumed in {time.perf_counter() - statistics.started_s:.1f} s.",
            )
        statistics.prompt_tokens, statistics.cached_tokens = len(tokens), cached
        if not self._cache.can_trim:
            # The next prompt starts with these of the tokens, whatever is said until then: without, for example, a
            # thought that the template opened and will not repeat.
            made_up = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
            shared = common_prefix(
                tokens, self._model.template.encode(self._render([*messages, *made_up]))
            )
        # A line tells how far it is before the first chunk is through.
        for done in itertools.chain([cached], self._cache.prefill(tokens, shared)):
            yield Piece(
                "prefill", f"{done} of {len(tokens)} tokens" * (len(tokens) > LONG_PROMPT_TOKENS)
            )

    def _stream(self, tokens: list[int]) -> Generator[Any, None, None]:
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        settings, tokenizer = self._settings, self._model.template.tokenizer

        def sampler(logprobs: Any) -> Any:
            # Made anew for each token, so that a changed setting reaches a reply that is continued.
            return make_sampler(
                temp=settings.temperature if settings.temperature >= MIN_TEMPERATURE else 0.0,
                top_p=settings.top_p,
                min_p=settings.min_p,
                # mlx-lm refuses a top_k that leaves nothing out.
                top_k=settings.top_k if settings.top_k < tokenizer.vocab_size else 0,
            )(logprobs)

        penalty = None if settings.repetition_penalty == 1 else settings.repetition_penalty
        processors = make_logits_processors(repetition_penalty=penalty)
        return self._cache.stream(tokenizer, tokens, sampler=sampler, logits_processors=processors)

    def _speak(self, live: Reply) -> Generator[Piece, None, None]:
        """Yield pieces of a reply, then keep what was said."""
        statistics, torn = self.statistics, False
        try:
            yield from self._pieces(live)
        except (GeneratorExit, KeyboardInterrupt) as stop:
            # Whoever consumes the reply has heard enough; one that was torn goes on from a state computed anew.
            torn = isinstance(stop, KeyboardInterrupt)
            statistics.finish_reason = statistics.finish_reason or "interrupted"
            raise
        finally:
            # A reply that failed has no reason to finish.
            if statistics.finish_reason and statistics.generation_tokens:
                self._keep(live, statistics.finish_reason)
                self._unfinished = None if torn or statistics.finish_reason == "stop" else live

    def _pieces(self, live: Reply) -> Iterator[Piece]:
        statistics, splitter, settings = self.statistics, live.splitter, self._settings
        # A thought that is closed goes on with other responses.
        while response := next(live.responses, None):
            statistics.generation_tokens += 1
            statistics.total_s = time.perf_counter() - statistics.started_s
            statistics.time_to_first_token_s = (
                statistics.time_to_first_token_s or statistics.total_s
            )
            statistics.finish_reason = response.finish_reason
            yield from splitter.feed(response.text)
            statistics.thought_tokens += splitter.kind == "thought"
            statistics.answer_tokens += splitter.kind == "answer"
            marks = (
                statistics.generation_tokens - statistics.thought_tokens - statistics.answer_tokens
            )
            if response.finish_reason:
                yield from splitter.finish()
                continue
            enough = (
                splitter.kind == "thought"
                and statistics.thought_tokens == settings.max_thought_tokens
            )
            full = statistics.remaining_tokens <= len(self._closing) * enough
            if full or statistics.answer_tokens >= settings.max_tokens or marks > MAX_MARK_TOKENS:
                statistics.finish_reason = "length"
                return
            if enough:
                yield Piece(
                    "notice",
                    f"Thought enough: {statistics.thought_tokens} tokens; the answer begins.",
                )
                self._close_thought(live)

    def _keep(self, live: Reply, finish_reason: str) -> None:
        message = {"role": "assistant", **live.splitter.said()}
        if finish_reason != "stop":
            message["finish_reason"] = finish_reason
        # Only the marks of the one thought are more than text.
        said = self._model.template.escape_special_tokens(live.splitter.text)
        for mark in self._format.marks:
            said = said.replace(self._model.template.escape_special_tokens(mark), mark, 1)
        self._said[str(message)] = said
        self._first, self.messages = live.first, [*live.messages, message]


# --------------------------------------------------------------------------------------- Keeping


def replace_file(path: Path, data: bytes, *, locked: bool = False) -> io.FileIO:
    """Write a file so that it is either the old one or all of the new; its mode is kept, or 0600. Raises `OSError`.

    Returns it open, and if wanted locked already when it gets its name.
    """
    # What the name leads to is replaced, so that a link stays one.
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".llmchat")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(descriptor, path.stat().st_mode & 0o777)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
        if locked:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(name).replace(path)
    except BaseException:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)
        raise
    return io.FileIO(descriptor, "r+b")


def as_lines(messages: Iterable[Message]) -> bytes:
    """Write messages as JSON Lines."""
    return b"".join(
        json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n"
        for message in messages
    )


def as_markdown(messages: Iterable[Message]) -> bytes:
    """Write messages as Markdown, with the thoughts folded."""
    names = {"system": "System", "user": "You", "assistant": "Model"}
    parts = []
    for message in messages:
        parts.append(f"**{names[message['role']]}:**")
        if thought := message.get("reasoning_content"):
            parts.append(f"<details><summary>Thought</summary>\n\n{thought.strip()}\n\n</details>")
        parts.append(message["content"].strip())
    return "\n\n".join([*parts, ""]).encode(errors="replace")


class SessionFile:
    """A conversation on disk, one message a line, mode 0600; only one chat at a time has it.

    Invariant: the file holds exactly `messages`. It is written whole, so no crash leaves half of it.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, and read it. Raises `ChatError`, with the file untouched, if it is no session."""
        self._path = path
        # The file beside this one that holds the engine's state after the messages, if that was kept.
        self.state_path = path.parent / f"{path.name}.state.safetensors"
        with foreign(f"{path} can't be used as a session: {{}}. Name another file."):
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
            if not path.is_file():
                raise OSError("it is no file")
        self.modified = datetime.fromtimestamp(os.fstat(self._file.fileno()).st_mtime)
        try:
            with foreign(
                f"{path} is in use by another chat, or its disk has no locks: name another file."
            ):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The other chat may have put a new file in the place of this one.
                if not os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    raise BlockingIOError
            self.messages = self._read()
        except ChatError:
            self.close()
            raise

    def _read(self) -> list[Message]:
        """Read the messages, with whatever further keys they have."""
        messages: list[Message] = []
        roles = ["system", "user"]
        for count, line in enumerate(io.BytesIO(self._file.readall()), 1):
            with foreign(
                f"{self._path} is no session of llmchat: line {count}: {{}}. Name another file."
            ):
                message = json.loads(line)
                if not isinstance(message, dict) or message.get("role") not in roles:
                    raise ValueError(f"this is no message with the role {' or '.join(roles)}")
                texts = (message.get("content"), message.get("reasoning_content", ""))
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("its content is no text")
            messages.append(message)
            roles = ["assistant"] if message["role"] == "user" else ["user"]
        return messages

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def save(self, messages: Sequence[Message]) -> None:
        """Make the file hold these messages, on disk when this returns. Raises `ChatError`."""
        if messages == self.messages:
            return
        with foreign(f"{self._path} could not be written: {{}}. /save FILE may."):
            replaced, self._file = (
                self._file,
                replace_file(self._path, as_lines(messages), locked=True),
            )
        replaced.close()
        self.messages = list(messages)


@dataclasses.dataclass
class SavedChats:
    """The last conversations, each in a session file named by its time and its model, readable by the user alone."""

    # States are large, and a chat hardly ever goes on with any but the last of its model.
    MOST, STATES = 50, 5

    folder: Path

    def _files(self, model: str = "*") -> list[Path]:
        """Return the files of the conversations with a model, as their names have it; the last one comes first."""
        files = []
        for file in self.folder.glob(f"* {model}.jsonl"):
            # Another chat may just have removed it.
            with contextlib.suppress(OSError):
                files.append((file.stat().st_mtime, file))
        return [file for _, file in sorted(files, reverse=True)]

    @staticmethod
    def _name_for_model(model: str) -> str:
        """Return a model as the name of a file has it, the same wherever the program is started."""
        folder = Path(os.path.expanduser(model))
        # A name has room for 255 bytes, also that of the state while it is written.
        return quote(str(folder.resolve()) if folder.is_dir() else model, safe="")[-180:]

    def create(self, model: str) -> SessionFile:
        """Begin a file; the oldest of too many go. Raises `ChatError`."""
        with foreign(
            f"{self.folder} can't be used to keep conversations: {{}}. Mend that, or start with --no-keep."
        ):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            files = self._files()
            states = [
                state
                for file in files[self.STATES - 1 :]
                for state in self.folder.glob(f"{file.name}.*")
            ]
            for file in [*states, *files[self.MOST - 1 :]]:
                file.unlink(missing_ok=True)
        return SessionFile(
            self.folder
            / f"{datetime.now():%Y-%m-%d %H.%M.%S.%f} {self._name_for_model(model)}.jsonl"
        )

    def open_latest(
        self, model: str | None, warn: Callable[[str], None]
    ) -> tuple[SessionFile, str]:
        """Return the last conversation, of this model if one is named, and its model. Raises `ChatError`."""
        for file in self._files(self._name_for_model(model) if model else "*"):
            if file.stat().st_size:
                try:
                    return SessionFile(file), model or unquote(file.stem.rpartition(" ")[2])
                except ChatError as error:
                    warn(f"Passed over: {error}")
        raise ChatError(
            f"There is no conversation{f' with {model}' if model else ''} in {self.folder} to go on with."
        )


class PromptHistory:
    """The prompts of this day and earlier ones: in a file, one a line, newlines and backslashes escaped.

    The file is added to at every prompt, and cut back to its bounds when it is read and twice as large.
    """

    ENTRIES, BYTES = 1000, 1 << 20

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""

    def load(self) -> list[str]:
        """The last prompts, oldest first. Raises `OSError`."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - self.BYTES))
            # What stands before the first newline may be half a line.
            lines = file.read().splitlines(keepends=True)[size > self.BYTES :]
        kept = lines[-self.ENTRIES :]
        if size > 2 * self.BYTES or len(lines) > 2 * self.ENTRIES:
            replace_file(self._path, b"".join(kept)).close()
        texts = (line.decode(errors="replace").rstrip("\n") for line in kept)
        prompts = [
            re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text) for text in texts
        ]
        self._last = prompts[-1] if prompts else ""
        return prompts

    def add(self, prompt: str) -> bool:
        """Write a prompt down, unless it was the last one too. Raises `OSError`."""
        line = prompt.replace("\\", "\\\\").replace("\n", "\\n").encode(errors="replace") + b"\n"
        # A prompt as large as all of the history would leave nothing else of it.
        if prompt == self._last or len(line) > self.BYTES:
            return False
        self._last = prompt
        with open(
            os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", buffering=0
        ) as file:
            size = file.seek(0, os.SEEK_END)
            # On a full disk half a line would be part of the next one.
            if file.write(line) < len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True


# ---------------------------------------------------------------------------------------- Screen


# What could drive a terminal or turn text round: C0 but newline and tab, DEL, C1, and the
# bidirectional embeddings, overrides and isolates (https://www.unicode.org/reports/tr9/). Without
# them no escape sequence is one, so each piece can be cleaned by itself, wherever it was split.
CONTROL_CHARACTERS = dict.fromkeys(
    [
        *range(0x09),
        *range(0x0B, 0x20),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ]
)

# Codes that set the style of what follows on a terminal.
GREEN = "\x1b[32m"
RED = "\x1b[31m"
DIM = "\x1b[2m"
BOLD = "\x1b[1m"
CODE = "\x1b[36m"
PLAIN = "\x1b[0m"
ERASE_BELOW = "\x1b[J"

TAB_COLUMNS = 8


def strip_control_characters(text: str) -> str:
    """Return the text without anything that could drive a terminal."""
    return text.translate(CONTROL_CHARACTERS)


def character_width(char: str) -> int:
    """Return the number of columns that a character takes on a terminal."""
    # A soft hyphen is shown, though it is a format character.
    if char == "\u00ad":
        return 1
    # If a Korean syllable is written letter by letter, its vowel and final join the first letter.
    if unicodedata.category(char) in ("Mn", "Me", "Cf") or "\u1160" <= char <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def display_width(text: str) -> int:
    """Return the number of columns that a text without tabs takes on a terminal."""
    return sum(map(character_width, text))


def fit_columns(text: str, columns: int) -> str:
    """Return as much of the beginning of a text as so many columns hold."""
    width = 0
    for index, char in enumerate(text):
        width += character_width(char)
        if width > columns:
            return text[:index]
    return text


def column_after(column: int, text: str, columns: int = sys.maxsize) -> int:
    """Return the column of the cursor after a text on one line, in a window of so many columns.

    The cursor stays on a full row until the next character is written: the column may be `columns`.
    """
    for char in text:
        if char == "\t":
            # A tab never leaves the row.
            next_stop = (column // TAB_COLUMNS + 1) * TAB_COLUMNS
            column = min(next_stop, columns - 1)
            continue
        width = character_width(char)
        column += width
        if column > columns:
            column = width
    return column


class WordWrap:
    """Breaks prose at words as it streams, in a window that has `columns()` at that moment.

    Code between fences, tables and words that are wider than the window are left alone: they are to
    be copied. With `markdown_styles`, headings and `**bold**` are bold, and code has a colour of
    its own; the marks stay. Otherwise the whole text has the one style `base_style`.
    """

    # Scripts without spaces may break before any wide character.
    WIDE = (
        "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60"
        "\U0001f300-\U0003ffff"
    )
    # Spaces and newlines and the word after them: " word", "\n\nword", "日", or spaces at the end.
    WORD = re.compile(rf"[ \n]*(?:[{WIDE}][^ \n{WIDE}]*|[^ \n{WIDE}]+)|[ \n]+")
    # A line that opens or closes code: "```python" and "~~~", not "```code``` in a line".
    FENCE = re.compile(r"\s*(```[^`]*|~~~.*)")
    # The marks of bold text and of code within a line.
    SPAN_MARK = re.compile(r"(\*\*|`+)")

    def __init__(
        self, columns: Callable[[], int], markdown_styles: bool = False, base_style: str = ""
    ) -> None:
        self._columns = columns
        self._markdown_styles = markdown_styles
        self._base_style = base_style
        # The text since the last space or newline, with the spaces before it: the word may go on.
        self.pending = ""
        # The line so far, and the column after it.
        self._line = ""
        self._column = 0
        self._in_fence = False
        self._in_heading = False
        self._in_bold = False
        # The backquotes that opened the code in this line that is not closed yet.
        self._backquotes = ""
        # The style that the terminal was switched to.
        self._style = ""

    def feed(self, text: str) -> str:
        """Return all the text so far that is certain, as it is to be shown."""
        *words, self.pending = self.WORD.findall(self.pending + text) or [""]
        shown = "".join(map(self._place, words))
        # Code is shown at once: it is not wrapped, so the end of a word does not matter.
        if self._in_fence and "\n" not in self.pending:
            shown += self._place(self.pending)
            self.pending = ""
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        shown = self._place(self.pending)
        self.pending = ""
        return shown + PLAIN if self._style else shown

    def _place(self, text: str) -> str:
        """Return spaces, newlines and the word after them, as they are to be shown."""
        word = text.lstrip(" \n")
        *line_ends, spaces = text[: len(text) - len(word)].split("\n")
        shown = "".join(map(self._end_line, line_ends))
        self._line += spaces + word
        line = self._line.lstrip()
        if self._in_fence or line.startswith(("```", "~~~")):
            return shown + self._switch_style(CODE) + spaces + word
        if line.startswith("|") or not word:
            return shown + self._switch_style("") + spaces + word
        if self._column == 0 and re.fullmatch("#{1,6}", word):
            self._in_heading = True
        return shown + self._place_before(word, spaces) + self._styled_word(word)

    def _place_before(self, word: str, spaces: str) -> str:
        """Return the spaces before a word, or a newline if the word does not fit on this row."""
        columns = self._columns()
        fits_here = column_after(self._column, spaces + word) <= columns
        # A word that is wider than the window is not moved: it would not fit there either.
        fits_on_a_row = column_after(0, word) <= columns
        if self._column > 0 and not fits_here and fits_on_a_row:
            self._column = column_after(0, word)
            return "\n"
        self._column = column_after(self._column, spaces + word, columns)
        return spaces

    def _end_line(self, spaces: str) -> str:
        """Return the newline, and the spaces before it unless they would wrap."""
        if self.FENCE.fullmatch(self._line):
            self._in_fence = not self._in_fence
        if self._column + len(spaces) > self._columns():
            spaces = ""
        self._line = ""
        self._column = 0
        self._in_heading = False
        self._in_bold = False
        self._backquotes = ""
        return spaces + self._switch_style(CODE if self._in_fence else "") + "\n"

    def _styled_word(self, word: str) -> str:
        """Return a word with its styles; a mark has the style of the text that it marks."""
        shown = ""
        before = ""
        for part in self.SPAN_MARK.split(word):
            was_bold = self._in_bold
            was_code = bool(self._backquotes)
            if part.startswith("`") and self._backquotes in ("", part):
                self._backquotes = "" if was_code else part
            # `**` inside a word is an operator (2**3), unless it closes bold text.
            elif part == "**" and not was_code and (was_bold or not before[-1:].isalnum()):
                self._in_bold = not was_bold
            style = BOLD if was_bold or self._in_bold or self._in_heading else ""
            if was_code or self._backquotes:
                style += CODE
            shown += self._switch_style(style) + part
            before = part
        return shown

    def _switch_style(self, style: str) -> str:
        """Return the codes that switch the terminal to a style."""
        old_style = self._style
        self._style = style if self._markdown_styles else self._base_style
        if self._style == old_style:
            return ""
        return PLAIN + self._style if old_style else self._style


# A status line appears this long after its activity has begun, and is updated this often.
STATUS_DELAY_S = 0.3
STATUS_INTERVAL_S = 0.1


class StatusLine:
    """One line that says what is going on, and how far it is, as a context manager.

    A thread asks `describe` for the text again and again. The line appears after a moment, and is
    erased at the end. Where nothing may be redrawn (`steady`), each activity is a line that stays,
    said once: the text up to its first colon.
    """

    def __init__(
        self,
        describe: Callable[[], str],
        write: Callable[[str], None],
        columns: Callable[[], int],
        style: str = DIM,
        steady: bool = False,
    ) -> None:
        self._describe = describe
        self._write = write
        self._columns = columns
        self._style = style
        self._steady = steady
        # The text that stands on the screen now; on a steady one, the activity that was said last.
        self._shown = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # Held while something is written where the line stands.
        self._lock = threading.Lock()

    def __enter__(self) -> StatusLine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Erase the line for good."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        with self.hidden():
            pass

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Erase the line while something else is written in this block."""
        with self._lock:
            if not self._steady:
                self._redraw("")
            yield

    def _run(self) -> None:
        self._stopped.wait(STATUS_DELAY_S - STATUS_INTERVAL_S)
        while not self._stopped.wait(STATUS_INTERVAL_S):
            with self._lock:
                self.update(self._describe())

    def update(self, text: str) -> None:
        """Show the text in the line."""
        if not self._steady:
            self._redraw(text)
            return
        activity = text.partition(":")[0]
        if activity and activity != self._shown:
            self._write(activity + "\n")
            self._shown = activity

    def _redraw(self, text: str) -> None:
        # The line is kept within one row: a second one could not be taken back.
        text = fit_columns(strip_control_characters(text), self._columns() - 1)
        if text == self._shown:
            return
        surplus = max(0, display_width(self._shown) - display_width(text))
        row = text + " " * surplus
        if self._style:
            row = self._style + row + PLAIN
        self._write("\r" + row if text else "\r" + row + "\r")
        self._shown = text


def write_all(stream: TextIO, text: str) -> None:
    """Write a text to a stream at once, also where the stream does not wait for its reader.

    Python's own streams lose text if the descriptor is set not to block, as another process that
    shares it may do at any time.
    """
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(text)
        return
    raw = getattr(buffer, "raw", buffer)
    data = text.encode(stream.encoding, stream.errors or "strict")
    while data:
        written = raw.write(data)
        if written is None:
            select.select([], [raw], [])
            written = 0
        data = data[written:]


class Screen:
    """Writes the session to standard output, and everything else to standard error.

    Whatever is written is cleaned here of characters that could drive the terminal.
    """

    def __init__(
        self, stdout: TextIO, stderr: TextIO, interactive: bool, plain: bool = False
    ) -> None:
        """Make a screen; a `plain` one redraws no line, for screen readers."""
        self._stdout = stdout
        self._stderr = stderr
        # Somebody watches, and is to see thoughts too.
        self.interactive = interactive
        self.dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.styled = not (self.dumb or os.environ.get("NO_COLOR"))
        self._steady = self.dumb or plain
        self._status: StatusLine | None = None
        # When the last reply ended, by `time.monotonic`.
        self.reply_ended_s = float("-inf")

    def write(self, text: str) -> None:
        """Write text of the session; it takes the place of a status line."""
        self.write_codes(strip_control_characters(text))

    def write_codes(self, text: str) -> None:
        """Write text of the session that has terminal codes of our own, and is clean otherwise."""
        if text:
            self._end_status()
            write_all(self._stdout, text)

    def write_stderr(self, text: str) -> None:
        """Write text to standard error, as it is to stand there."""
        with self._without_status():
            write_all(self._stderr, strip_control_characters(text))

    def notice(self, text: str, style: str = DIM) -> None:
        """Tell the user something on standard error: dim on a terminal, or `RED` for an error."""
        text = strip_control_characters(text)
        if self._stderr.isatty():
            wrap = WordWrap(self.columns, base_style=style if self.styled else "")
            text = wrap.feed(text) + wrap.flush()
        with self._without_status():
            write_all(self._stderr, text + "\n")

    @contextlib.contextmanager
    def status(self, describe: Callable[[], str]) -> Iterator[None]:
        """Have a line say what is going on in this block: what `describe` returns at each moment.

        A notice interrupts the line, text of the session ends it. Only a terminal has such a line.
        """
        if not self._stderr.isatty():
            yield
            return
        self._end_status()
        with self._new_status(describe) as status:
            self._status = status
            yield
        self._status = None

    @contextlib.contextmanager
    def notice_if_slow(self, text: str, after_s: float = 1.0) -> Iterator[None]:
        """Show a notice if this block takes longer, on a terminal or not."""
        timer = threading.Timer(after_s, self.notice, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def columns(self) -> int:
        """Return the width of the window."""
        stream = self._stdout if self._stdout.isatty() else self._stderr
        return os.get_terminal_size(stream.fileno()).columns or 80

    def text_wrap(self, markdown_styles: bool, base_style: str) -> WordWrap:
        """Return what breaks text of the session at words; in a pipe it breaks nothing."""
        if not self.styled:
            base_style = ""
        if self._stdout.isatty():
            return WordWrap(self.columns, markdown_styles and self.styled, base_style)
        return WordWrap(lambda: sys.maxsize, base_style=base_style)

    def _new_status(self, describe: Callable[[], str]) -> StatusLine:
        style = DIM if self.styled else ""

        def write(text: str) -> None:
            write_all(self._stderr, text)

        return StatusLine(describe, write, self.columns, style, self._steady)

    def _end_status(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None

    def _without_status(self) -> contextlib.AbstractContextManager[None]:
        return self._status.hidden() if self._status else contextlib.nullcontext()


class Section(enum.Enum):
    """What the part of a reply that is being shown is."""

    NONE = "nothing yet"
    ANSWER = "answer"
    THOUGHT = "thought"
    HIDDEN = "a thought that is not shown"


class ReplyView:
    """What one reply looks like, as a context manager that ends its last line.

    A thought is dim, and a blank line apart from the answer; without styles each has a label. If
    thoughts are hidden, one line tells how long the model thought. Where nobody watches, thoughts
    leave no trace.
    """

    LABELS: ClassVar = {Section.THOUGHT: "thinking:\n", Section.ANSWER: "answer:\n"}

    def __init__(self, screen: Screen, hide_thoughts: bool = False, plain: bool = False) -> None:
        """Make a view; a `plain` one shows Markdown without styles."""
        self._screen = screen
        self._hides_thoughts = hide_thoughts or not screen.interactive
        self._markdown_styles = not plain
        self._section = Section.NONE
        self._wrap = WordWrap(screen.columns)
        # When the model began to think, while its thoughts are hidden.
        self._thinking_since_s: float | None = None
        self._thinking_status = contextlib.ExitStack()

    def __enter__(self) -> ReplyView:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def show(self, piece: Piece) -> None:
        """Show a piece of the reply; between thought and answer there is always one blank line."""
        text = strip_control_characters(piece.text)
        if piece.kind == "notice":
            self._end_section("\n")
            self._screen.notice(text)
        elif piece.kind == "thought" and self._hides_thoughts:
            self._hide(text)
        elif piece.kind in ("thought", "answer"):
            self._show_text(Section(piece.kind), text)

    def end(self) -> None:
        """Finish the last line of the reply."""
        self._end_section("\n")
        self._end_thinking()
        self._screen.reply_ended_s = time.monotonic()

    def _hide(self, text: str) -> None:
        if not text.strip() or self._thinking_since_s is not None:
            return
        if self._screen.interactive:
            self._begin_section(Section.HIDDEN)
        since_s = self._thinking_since_s = time.monotonic()
        status = self._screen.status(lambda: f"thinking: {time.monotonic() - since_s:.0f} s")
        self._thinking_status.enter_context(status)

    def _show_text(self, section: Section, text: str) -> None:
        if section is not self._section:
            text = text.lstrip("\n")
            if not text:
                return
            self._begin_section(section)
        self._screen.write_codes(self._wrap.feed(text))

    def _begin_section(self, section: Section) -> None:
        has_thought = Section.THOUGHT in (section, self._section)
        self._end_section("\n\n")
        self._section = section
        if section is Section.ANSWER:
            self._end_thinking()
            self._wrap = self._screen.text_wrap(self._markdown_styles, "")
        else:
            self._wrap = self._screen.text_wrap(False, DIM)
        if has_thought and self._screen.interactive and not self._screen.styled:
            self._screen.write(self.LABELS.get(section, ""))

    def _end_section(self, line_end: str) -> None:
        if self._section is Section.NONE:
            return
        if self._section is Section.HIDDEN and self._thinking_since_s is not None:
            duration_s = time.monotonic() - self._thinking_since_s
            self._screen.write_codes(self._wrap.feed(f"thought for {duration_s:.1f} s"))
        self._wrap.pending = self._wrap.pending.rstrip("\n")
        self._screen.write_codes(self._wrap.flush() + line_end)
        self._section = Section.NONE

    def _end_thinking(self) -> None:
        self._thinking_status.close()
        self._thinking_since_s = None


# ----------------------------------------------------------------------------------- Line editor

# The bytes of one key, or of a paste that the terminal does not mark, follow each other faster.
BURST_S = 0.03

# The rest of a key, or of a marked paste, that the network has cut in two comes within this time.
SPLIT_KEY_S = 0.5
SPLIT_PASTE_S = 1.0

# An Esc that was typed by itself is the first half of a key with Alt if the other half comes within
# this time, and is one of these: Enter, the keys of words, or the rest of a sequence.
ESCAPE_S = 1.0
AFTER_ESCAPE = b"\r\nbfd\x7f[O"

# An Esc that is pressed this soon after a reply has ended was meant to stop the reply.
LATE_ESCAPE_S = 1.0

ESCAPE = b"\x1b"
CTRL_D = b"\x04"
ENTERS = (b"\r", b"\n")
ALT_ENTER = b"\x1b\r"
BACKSPACE = b"\x7f"

# What a terminal that is gone is taken to send: Ctrl+U and Ctrl+D, which drop the line and leave.
TERMINAL_GONE = b"\x15\x04"

# Bracketed paste: switch it on and off in the terminal, and the marks that the terminal then puts
# around a paste.
PASTE_MODE_ON = b"\x1b[?2004h"
PASTE_MODE_OFF = b"\x1b[?2004l"
PASTE_START = b"\x1b[200~"
PASTE_END = b"\x1b[201~"

# A longer run of bytes than this was pasted, not typed.
MAX_TYPED_RUN = 500
LONG_RUN = re.compile(rb"(?:\x1b[\r\n]|[^\x00-\x08\x0a-\x1a\x7f]){%d,}" % (MAX_TYPED_RUN + 1))

# Several lines: "one\rtwo", but not "one\r\r", nor Alt+Enter in "one\x1b\rtwo".
SEVERAL_LINES = re.compile(rb"(?<!\x1b)[\r\n][^\r\n]")

# The Enters at the end of a burst.
LAST_ENTERS = re.compile(rb"((?<!\x1b)[\r\n])*\Z")

# The parts of what a terminal sends.
KEY_TOKEN = re.compile(
    rb"""
    # A marked paste, whose end may be lost.
    \x1b\[200~ (?P<paste> .*?) (?: \x1b\[201~ | \Z)
    # The sequence of a key: CSI ("ESC [ 1 ; 5 D") or SS3 ("ESC O D"), with a second Esc if Alt was
    # pressed; also of the Linux console ("ESC [ [ A") and of rxvt ("ESC [ 3 $").
    | (?P<sequence> \x1b? \x1b (?!\[200~)
                    (?: \[\[. | \[[\d;]*\$ | \[[0-?]*[ -/]*[@-~] | O[\d;]*[A-Za-z] )
    # A sequence that was never finished.
                  | \x1b (?: \[[0-?]*[ -/]* | O[\d;]* ))
    # Esc by itself: no key follows that can be pressed with Alt.
    | (?P<escape> \x1b (?= [\x1b\x80-\xff] | \Z))
    | (?P<alt_enter> \x1b [\r\n])
    # Characters, and keys with Alt ("ESC b"), up to the Enter that ends the line.
    | (?P<keys> (?: [^\x1b\r\n] | \x1b [^\x1b\[O\r\n\x80-\xff] )* [\r\n]
              | (?: [^\x1b\r\n] | \x1b [^\x1b\[O\r\n\x80-\xff] )+)
    """,
    re.DOTALL | re.VERBOSE,
)

# The beginning of a key at the end of what has arrived.
UNFINISHED_KEY = re.compile(rb"\x1b?\x1b(?:\[\[?|\[[0-?]*[ -/]*|O[\d;]*)?\Z")

# The parts of a key's sequence: the Esc of Alt, its kind, its parameters, and its last byte.
KEY_SEQUENCE = re.compile(rb"(\x1b?)\x1b([\[O])([\d:;]*)([@-~$])")


class Key(enum.Enum):
    """A key that moves or deletes, whatever its terminal sends for it.

    The values: the bytes that GNU readline gets, which are those of xterm; readline's function, or
    nothing where the user's own binding is left alone; and libedit's function.
    """

    UP = (b"\x1b[A", "", "ed-prev-history")
    DOWN = (b"\x1b[B", "", "ed-next-history")
    RIGHT = (b"\x1b[C", "", "ed-next-char")
    LEFT = (b"\x1b[D", "", "ed-prev-char")
    HOME = (b"\x1b[H", "beginning-of-line", "ed-move-to-beg")
    END = (b"\x1b[F", "end-of-line", "ed-move-to-end")
    DELETE = (b"\x1b[3~", "delete-char", "ed-delete-next-char")
    WORD_RIGHT = (b"\x1b[1;5C", "forward-word", "em-next-word")
    WORD_LEFT = (b"\x1b[1;5D", "backward-word", "ed-prev-word")
    DELETE_WORD = (b"\x1b[3;5~", "kill-word", "em-delete-next-word")
    # Two keys that no keyboard has.
    KILL_LINE = (b"\x1b[98~", "kill-whole-line", "em-kill-line")
    REDRAW = (b"\x1b[99~", "redraw-current-line", "ed-redisplay")

    def __init__(self, sequence: bytes, readline_function: str, libedit_function: str) -> None:
        self.sequence = sequence
        self.readline_function = readline_function
        self.libedit_function = libedit_function


# Libedit gets C1 control characters for the keys, which nobody types. If a sequence that begins
# with Esc were bound to a function, libedit would wait after each Esc for the rest of the sequence.
LIBEDIT_CODES = {key: 0x80 + index for index, key in enumerate(Key)}
LIBEDIT_BYTES = {key.sequence: chr(code).encode() for key, code in LIBEDIT_CODES.items()}
LIBEDIT_SEQUENCE = re.compile(b"|".join(map(re.escape, LIBEDIT_BYTES)))

# In vi's insert mode libedit's own functions would leave the cursor on the last character.
LIBEDIT_INSERT_FUNCTIONS = {Key.RIGHT: "vi-add", Key.END: "vi-add-at-eol"}

# The keys by the last byte of their sequence, and by its first number where it ends in "~".
KEYS_BY_LETTER = {
    b"A": Key.UP,
    b"B": Key.DOWN,
    b"C": Key.RIGHT,
    b"D": Key.LEFT,
    b"H": Key.HOME,
    b"F": Key.END,
}
KEYS_BY_NUMBER = {
    1: Key.HOME,
    3: Key.DELETE,
    4: Key.END,
    7: Key.HOME,
    8: Key.END,
}

# The first number of a character with modifiers as xterm sends it, "ESC [ 27 ; 2 ; 13 ~", which
# xterm calls modifyOtherKeys.
MODIFY_OTHER_KEYS = 27

# The code of the keypad's Enter in CSI u.
KEYPAD_ENTER = 57414

# What the keys of the keypad send as SS3, where another program has left it so.
KEYPAD = dict(zip(b"MXjklmnopqrstuvwxy", b"\r=*+,-./0123456789"))


class Modifiers(enum.IntFlag):
    """The keys that were held down; a sequence has their sum, plus one, as a parameter."""

    NONE = 0
    SHIFT = 1
    ALT = 2
    CTRL = 4
    SUPER = 8
    HYPER = 16
    META = 32


# Rxvt ends a sequence with one of these bytes in place of "~".
RXVT_MODIFIERS = {
    b"~": Modifiers.NONE,
    b"^": Modifiers.CTRL,
    b"$": Modifiers.SHIFT,
    b"@": Modifiers.CTRL | Modifiers.SHIFT,
}


def key_bytes(sequence: bytes) -> bytes:
    """Return what a queue holds for a key's CSI or SS3 sequence.

    That is the sequence of a `Key`, the bytes of a character (as "a" or "ESC a"), an Enter,
    `ALT_ENTER`, or nothing for a key that means nothing in a line.
    """
    match = KEY_SEQUENCE.fullmatch(sequence)
    if not match:
        return b""
    alt, kind, parameters, last = match.groups()
    # "13:10" is a key and what Shift makes of it; "2:3" is a modifier and the kind of the event.
    parts = [parameter.split(b":") for parameter in parameters.split(b";")]
    numbers = [int(part[0] or 0) for part in parts]
    is_release = len(parts) > 1 and parts[1][1:] == [b"3"]
    if is_release:
        return b""
    modifiers = Modifiers.ALT if alt else Modifiers.NONE
    if len(numbers) > 1:
        modifiers |= parse_modifiers(numbers[1])
    if last == b"u":
        return character_key(numbers[0], modifiers)
    if last == b"~" and numbers[0] == MODIFY_OTHER_KEYS:
        return character_key(numbers[-1], modifiers)
    if last in RXVT_MODIFIERS:
        return editing_key(KEYS_BY_NUMBER.get(numbers[0]), modifiers | RXVT_MODIFIERS[last])
    if len(numbers) == 1:
        modifiers |= parse_modifiers(numbers[0])
    return letter_key(kind, last, modifiers)


def letter_key(kind: bytes, letter: bytes, modifiers: Modifiers) -> bytes:
    """Return what a queue holds for a CSI or SS3 sequence that ends in a letter."""
    if kind == b"O" and letter[0] in KEYPAD:
        return character_key(KEYPAD[letter[0]], modifiers)
    # Rxvt sends small letters for arrows: "ESC O d" with Ctrl, "ESC [ d" with Shift.
    if b"a" <= letter <= b"d":
        modifiers |= Modifiers.CTRL if kind == b"O" else Modifiers.SHIFT
        letter = letter.upper()
    return editing_key(KEYS_BY_LETTER.get(letter), modifiers)


def parse_modifiers(number: int) -> Modifiers:
    """Return the modifiers that a parameter of a sequence stands for; a lock is none."""
    all_modifiers = 2 * Modifiers.META - 1
    return Modifiers(max(0, number - 1) & all_modifiers)


def editing_key(key: Key | None, modifiers: Modifiers) -> bytes:
    """Return the sequence of what a key with modifiers means."""
    if key is None:
        return b""
    by_words = {
        Key.LEFT: Key.WORD_LEFT,
        Key.RIGHT: Key.WORD_RIGHT,
        Key.DELETE: Key.DELETE_WORD,
    }
    by_lines = {Key.LEFT: Key.HOME, Key.RIGHT: Key.END}
    if modifiers & (Modifiers.ALT | Modifiers.CTRL):
        key = by_words.get(key, key)
    elif modifiers & (Modifiers.SUPER | Modifiers.META):
        key = by_lines.get(key, key)
    return key.sequence


def character_key(code: int, modifiers: Modifiers) -> bytes:
    """Return the bytes of a key that is a character, as a terminal without CSI u sends it."""
    if code in (ord("\r"), KEYPAD_ENTER):
        return ALT_ENTER if modifiers else b"\r"
    if code in (ord("\b"), BACKSPACE[0]):
        by_words = modifiers & (Modifiers.ALT | Modifiers.CTRL)
        return ESCAPE + BACKSPACE if by_words else BACKSPACE
    if code in (ord("\t"), ESCAPE[0]):
        return b"" if modifiers else bytes([code])
    is_for_the_desktop = modifiers & (Modifiers.SUPER | Modifiers.HYPER | Modifiers.META)
    if is_for_the_desktop or code > sys.maxunicode or not chr(code).isprintable():
        return b""
    return text_key(chr(code), modifiers)


def text_key(char: str, modifiers: Modifiers) -> bytes:
    """Return the bytes of a printable character that was typed with modifiers."""
    capital = char.upper()
    data = (capital if modifiers & Modifiers.SHIFT else char).encode()
    if modifiers & Modifiers.CTRL:
        if not "@" <= capital <= "_":
            return b""
        data = bytes([ord(capital) & 0x1F])
    return ESCAPE + data if modifiers & Modifiers.ALT else data


class KeyQueue:
    """The keys that were typed and that the line editor has not been given yet.

    It only sorts bytes: it knows no terminal, no thread, no clock and no line editor. An item is
    either bytes, which are keys up to the Enter that ends their line, or a text that was pasted; a
    key that begins a new line in the prompt counts as a pasted newline.

        bytes of the terminal --add--> what has arrived --sort--> items --take--> the line editor
    """

    def __init__(self) -> None:
        self._arrived = b""
        # An Esc by itself is all that has arrived, and may still be the first half of a key.
        self._holds_escape = False
        self._items: collections.deque[bytes | str] = collections.deque()

    def has_items(self) -> bool:
        """Tell if `take` would return something."""
        return bool(self._items)

    def has_keys(self) -> bool:
        """Tell if anything but an Esc was typed, sorted or not."""
        return bool(self._items or self._arrived.strip(ESCAPE))

    def add(self, data: bytes) -> None:
        """Add what the terminal sent."""
        if self._holds_escape and data[0] not in AFTER_ESCAPE:
            self.drop_escape()
        self._holds_escape = False
        self._arrived += data

    def wait_s(self) -> float | None:
        """Return how long to wait for more before sorting; None if nothing has arrived."""
        if self._is_paste_open():
            return SPLIT_PASTE_S
        if self._holds_escape:
            return ESCAPE_S
        finished, unfinished = self._split_arrived()
        if finished:
            ends_a_line = len(finished) > 1 and finished.endswith(ENTERS)
            is_long = len(finished) > MAX_TYPED_RUN
            is_burst = ends_a_line or is_long or SEVERAL_LINES.search(finished)
            return BURST_S if is_burst else 0.0
        if not unfinished:
            return None
        return BURST_S if unfinished == ESCAPE else SPLIT_KEY_S

    def sort_ahead(self) -> bool:
        """Sort what was typed while no line is read; return whether Esc was pressed.

        Ctrl+D is left out: during a reply it is not meant to leave when the reply ends.
        """
        data = mark_long_runs(self._take_arrived())
        return self._add_items(data, left_out=CTRL_D)

    def sort_line(self, is_idle: bool, escape_is_key: bool) -> None:
        """Sort what was typed in a line.

        Several lines in one burst are a paste if the line editor `is_idle`: if earlier keys wait,
        they are prompts that were typed ahead. Esc is left out unless it is a key of its own, or
        the first half of a key.
        """
        if self._arrived == ESCAPE and not escape_is_key and not self._holds_escape:
            self._holds_escape = True
            return
        data = self._take_arrived()
        is_typed_ahead = self._items or not is_idle
        if SEVERAL_LINES.search(data) and PASTE_START not in data and not is_typed_ahead:
            data = PASTE_START + LAST_ENTERS.sub(PASTE_END + rb"\g<0>", data, count=1)
        self._add_items(mark_long_runs(data), escape=ESCAPE if escape_is_key else b"")

    def drop_escape(self) -> None:
        """Forget an Esc that may still be the first half of a key."""
        if not self._arrived.strip(ESCAPE):
            self._arrived = b""
        self._holds_escape = False

    def take(self) -> bytes | str:
        """Take the first item: keys up to the end of a line, or a text that was pasted."""
        return self._items.popleft()

    def _is_paste_open(self) -> bool:
        return self._arrived.rfind(PASTE_START) > self._arrived.rfind(PASTE_END)

    def _split_arrived(self) -> tuple[bytes, bytes]:
        """Return the keys that have arrived whole, and the beginning of a key after them."""
        match = UNFINISHED_KEY.search(self._arrived)
        if self._is_paste_open() or not match:
            return self._arrived, b""
        return self._arrived[: match.start()], match[0]

    def _take_arrived(self) -> bytes:
        """Take the keys that have arrived whole, or else the beginning of a key that never came."""
        self._holds_escape = False
        finished, unfinished = self._split_arrived()
        if finished:
            self._arrived = unfinished
            return finished
        self._arrived = b""
        return unfinished

    def _add_items(self, data: bytes, escape: bytes = b"", left_out: bytes = b"") -> bool:
        """Add the items of the data, with `escape` for an Esc; return whether there was one."""
        has_escape = False
        for match in KEY_TOKEN.finditer(data):
            if match["paste"] is not None:
                text = match["paste"].decode(errors="replace")
                self._items.append(re.sub("\r\n?", "\n", text))
                continue
            keys = key_bytes(match[0]) if match["sequence"] else match[0]
            if keys == ESCAPE:
                has_escape = True
                keys = escape
            if match["alt_enter"] or keys == ALT_ENTER:
                self._items.append("\n")
            else:
                self._add_keys(keys.translate(None, left_out))
        return has_escape

    def _add_keys(self, keys: bytes) -> None:
        last = self._items[-1] if self._items else ""
        if isinstance(last, bytes) and not last.endswith(ENTERS):
            self._items[-1] = last + keys
        elif keys:
            self._items.append(keys)


def mark_long_runs(data: bytes) -> bytes:
    """Return the data with the marks of a paste around each run that is too long to be typed."""
    if PASTE_START in data:
        return data
    return LONG_RUN.sub(PASTE_START + rb"\g<0>" + PASTE_END, data)


# The most bytes that the line editor is given at once.
CHUNK_BYTES = 1024

# A line editor does not tell when it begins to read: until it does, the modes of its terminal are
# looked at this often.
POLL_S = 0.001


class TerminalProxy:
    """Stands between the terminal and the line editor, so that every key passes a `KeyQueue`.

    From `open` to `close` the line editor reads from a pseudo-terminal in place of standard input,
    and a thread copies keys from the real terminal to it: only while a line is read, and never past
    the end of that line. Until then keys wait in the queue, unseen, and an Esc stops a reply.
    Meanwhile the real terminal does not echo, does not cut long lines (macOS does at 1024 bytes,
    Linux at 4096) and drops nothing at Ctrl+C.

    Why a pseudo-terminal: feeding it keys is the one way to put text into the line that works with
    both line editors. Libedit, which Python has on macOS, calls neither the startup hook nor the
    pre-input hook, corrupts its memory in long lines, and knows no bracketed paste.
    """

    def __init__(
        self, stdin: TextIO, dumb: bool, to_editor: Callable[[bytes | str], bytes]
    ) -> None:
        """Make a proxy that is not open yet.

        `to_editor` returns what the line editor is to get for an item of a queue. A `dumb` terminal
        marks no pastes.
        """
        self._input = stdin
        self._dumb = dumb
        self._to_editor = to_editor
        self.on_escape: Callable[[], None] = lambda: None
        # The real terminal's modes before `open`, as `tcgetattr` gives them; empty while closed.
        self._saved_modes: list[Any] = []
        # Held while the queue, or one of the next four, is used.
        self._lock = threading.Lock()
        self._queue = KeyQueue()
        # The rest of what the line editor is being given, and what it got last in this line.
        self._outgoing = b""
        self.last_sent = b""
        self._is_reading = False
        # What an Esc in the line means: see `reading`.
        self._escape_is_key = False
        self._late_until_s = 0.0
        # When what has arrived is to be sorted, by `time.monotonic`.
        self._sort_at_s: float | None = None
        self._line_ended = threading.Event()

    def open(self) -> None:
        """Take the terminal over; `close` gives it back, also if a signal interrupts this."""
        self._stdin = self._input.fileno()
        self._terminal = os.dup(self._stdin)
        self._pty_master, self._pty_slave = os.openpty()
        os.set_blocking(self._pty_master, False)
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # A job in the background is stopped here until its shell brings it to the foreground.
        with contextlib.suppress(termios.error):
            termios.tcdrain(self._terminal)
        self._saved_modes = termios.tcgetattr(self._terminal)
        termios.tcsetattr(self._pty_slave, termios.TCSANOW, self._saved_modes)
        os.dup2(self._pty_slave, self._stdin)
        self.set_modes()
        self._thread.start()

    def close(self) -> None:
        """Leave the terminal as it was found; keys in the queue stay there."""
        saved_modes = self._saved_modes
        self._saved_modes = []
        if not saved_modes:
            return
        os.close(self._wake_write)
        if self._thread.is_alive():
            self._thread.join()
        os.dup2(self._terminal, self._stdin)
        # The terminal may be gone.
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(self._terminal, termios.TCSANOW, saved_modes)
            if not self._dumb:
                os.write(self._terminal, PASTE_MODE_OFF)
        for descriptor in (self._terminal, self._pty_master, self._pty_slave, self._wake_read):
            os.close(descriptor)

    def set_modes(self, signum: int = 0, frame: object = None) -> None:
        """Set the terminal's modes and the pseudo-terminal's size.

        This also handles SIGCONT (after Ctrl+Z) and SIGWINCH (the window has a new size).
        """
        if not self._saved_modes:
            return
        modes = list(self._saved_modes)
        # The terminal may be gone.
        with contextlib.suppress(termios.error, OSError):
            modes[0] &= ~(termios.ICRNL | termios.IXON)
            modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
            modes[3] |= termios.NOFLSH
            termios.tcsetattr(self._terminal, termios.TCSANOW, modes)
            if not self._dumb:
                os.write(self._terminal, PASTE_MODE_ON)
            size = fcntl.ioctl(self._terminal, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self._pty_master, termios.TIOCSWINSZ, size)
            if signum == signal.SIGCONT and self._is_reading:
                os.write(self._pty_master, self._to_editor(Key.REDRAW.sequence))

    @contextlib.contextmanager
    def reading(self, keys: bytes, escape_is_key: bool, late_until_s: float) -> Iterator[None]:
        """While the line editor reads a line, give it these keys, the queue, and what is typed.

        An Esc is a key of its own, or else the first half of the next key. Until `late_until_s` (by
        `time.monotonic`) it was meant for the last reply, and is left out.
        """
        try:
            with self._lock:
                self._queue.drop_escape()
                self._outgoing = keys
                self.last_sent = b""
                self._escape_is_key = escape_is_key
                self._late_until_s = late_until_s
                self._line_ended.clear()
                self._is_reading = True
            self._wake()
            yield
        except KeyboardInterrupt:
            # What the line editor was given goes with the line; what was typed after it stays.
            termios.tcflush(self._stdin, termios.TCIFLUSH)
            raise
        finally:
            self._is_reading = False
            self._line_ended.set()

    def has_typed_ahead(self) -> bool:
        """Tell if there are keys that the line editor has not been given."""
        unread, _, _ = select.select([self._terminal], [], [], 0)
        with self._lock:
            return bool(unread or self._outgoing or self._queue.has_keys())

    def _wake(self) -> None:
        """Have the thread look again at what there is to do."""
        os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        """Copy keys from the terminal to the line editor, until `close`."""
        while True:
            has_keys = self._is_reading and bool(self._outgoing or self._queue.has_items())
            is_ready = has_keys and self._editor_is_ready()
            timeout_s = None
            if has_keys and not is_ready:
                timeout_s = POLL_S
            elif self._sort_at_s is not None:
                timeout_s = max(0.0, self._sort_at_s - time.monotonic())
            readable, writable, _ = select.select(
                [self._wake_read, self._terminal],
                [self._pty_master] if is_ready else [],
                [],
                timeout_s,
            )
            if self._wake_read in readable and not os.read(self._wake_read, 64):
                return
            if self._terminal in readable:
                self._receive()
            elif self._sort_at_s is not None and time.monotonic() >= self._sort_at_s:
                self._sort()
            if writable:
                self._send()

    def _editor_is_ready(self) -> bool:
        """Tell if the line editor has read all that it was given, and has set up its terminal.

        Before that some keys would act on the terminal.
        """
        unread = fcntl.ioctl(self._pty_slave, termios.FIONREAD, bytes(4))
        is_set_up = not termios.tcgetattr(self._pty_slave)[3] & termios.ICANON
        return is_set_up and not any(unread)

    def _receive(self) -> None:
        """Add what was typed to the queue."""
        data = TERMINAL_GONE
        with contextlib.suppress(OSError):
            data = os.read(self._terminal, 1 << 16) or TERMINAL_GONE
        if data == TERMINAL_GONE:
            # A terminal that is gone is always readable: this thread must not spin.
            time.sleep(BURST_S)
        with self._lock:
            self._queue.add(data)
            self._set_timer()

    def _set_timer(self) -> None:
        """Wait for more where it may belong to what has arrived."""
        wait_s = self._queue.wait_s()
        self._sort_at_s = None if wait_s is None else time.monotonic() + wait_s

    def _sort(self) -> None:
        escaped = False
        with self._lock:
            if self._is_reading:
                if time.monotonic() < self._late_until_s:
                    self._queue.drop_escape()
                self._queue.sort_line(not self._outgoing, self._escape_is_key)
            else:
                escaped = self._queue.sort_ahead()
            self._set_timer()
        if escaped:
            self.on_escape()

    def _send(self) -> None:
        """Give the line editor the next part of a line."""
        with self._lock:
            if not self._is_reading:
                return
            if not self._outgoing:
                self._outgoing = self._to_editor(self._queue.take())
            self.last_sent = self._outgoing[:CHUNK_BYTES]
            with contextlib.suppress(BlockingIOError):
                sent = os.write(self._pty_master, self.last_sent)
                self._outgoing = self._outgoing[sent:]
        if self._outgoing or not self.last_sent.endswith(ENTERS):
            return
        # Enter ends the line, and what is in the queue is for the next one. In a search, or after
        # Ctrl+V, it does not; and libedit ends a search only when another key comes.
        if not self._line_ended.wait(BURST_S):
            with contextlib.suppress(BlockingIOError):
                os.write(self._pty_master, self._to_editor(Key.REDRAW.sequence))


def use_utf8() -> None:
    """Have the line editor take any character, also if the locale is `C` or is not installed."""
    for name in ("C.UTF-8", "UTF-8"):
        if locale.nl_langinfo(locale.CODESET) in ("ANSI_X3.4-1968", "US-ASCII"):
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                # Python's readline goes back to the environment's locale for each line.
                os.environ["LC_ALL"] = name


def asks_for_vi_keys(libedit: bool) -> bool:
    """Tell if the user's file for the line editor asks for vi's keys: no function tells."""
    if libedit:
        file = os.environ.get("EDITRC", "~/.editrc")
        request = r"^\s*([\w.*]*:)?\s*bind\s+-v"
    else:
        file = os.environ.get("INPUTRC", "~/.inputrc")
        request = r"^\s*set\s+editing-mode\s+vi\b"
    with contextlib.suppress(OSError):
        text = Path(file).expanduser().read_text(errors="replace")
        return bool(re.search(request, text, re.MULTILINE))
    return False


# The longest line that libedit is given, in characters: see `enlarge_libedit_buffers`.
MAX_LIBEDIT_LINE = 2000


def enlarge_libedit_buffers(readline: Any) -> None:
    """Have libedit enlarge its buffers now, so that they do not move while a line is read.

    Libedit keeps the address of the line's bytes, and writes there after each key. But the bytes
    move when they outgrow their buffer, which is at 1,019 bytes first; the address is renewed only
    when the buffer of the characters is outgrown, at 1,022 and 2,046 characters. So a text is put
    into the line that has as many characters, and 7,178 bytes: then the buffer of the bytes has
    8,192, which is room for any 2,000 characters. The next line begins empty.
    """
    for char in "\U0001f600" * 1711 + " " * 340:
        readline.insert_text(char)


# What stands for a newline in a line of libedit, which can't hold one.
NEWLINE_SIGN = "␤"

# Words that leave the chat, if they are a typed line.
LEAVE_WORDS = ("quit", "bye", "exit")


class Prompt(NamedTuple):
    """What the user gave to be sent."""

    text: str
    # A single line whose beginning was typed: only such a line may be a command or a leave word.
    is_typed_line: bool


def typed_form(text: str) -> str:
    """Return what one types to send a text as it is: with its slash doubled, or in three quotes."""
    looks_quoted = text.startswith('"""')
    if "\n" in text:
        return f'"""{text}"""' if looks_quoted and text.endswith('"""') else text
    if text.startswith("/"):
        return "/" + text
    if looks_quoted or text.lower() in LEAVE_WORDS:
        return f'"""{text}"""'
    return text


class LineEditor:
    """Reads prompts; on a terminal with editing, history and completion from `open` to `close`.

    Elsewhere a line that was read is written after its prompt, so that a transcript reads the same.
    A text that the line editor can't show well stands in its line as a placeholder, until the line
    is sent: "[1: its beginning… 20000 characters]".
    """

    def __init__(self, stdin: TextIO, screen: Screen, history: PromptHistory | None = None) -> None:
        self._stdin = stdin
        self._screen = screen
        self._history = history
        self.interactive = stdin.isatty() and screen.interactive
        self._proxy = TerminalProxy(stdin, screen.dumb, self._to_editor)
        self._readline: Any = None
        self._libedit = False
        self._vi_keys = False
        # The placeholders, by the texts that they stand for.
        self._placeholders: dict[str, str] = {}
        # The pasted texts, as they stand in the line that is being read.
        self._pasted: list[str] = []
        # What the prompt held when Ctrl+C dropped it.
        self._dropped = ""

    def open(self, complete: Callable[[str], Iterable[str]], on_escape: Callable[[], None]) -> None:
        """Switch the line editor on.

        `complete` returns the lines that a line's beginning may become; `on_escape` is called by
        another thread when Esc is pressed while no prompt is read. Raises `ChatError`.
        """
        self._proxy.on_escape = on_escape
        # Before readline is imported: the line editor looks at the locale only then.
        use_utf8()
        # Before readline is imported: its own handler of SIGWINCH calls the one that it finds.
        for number in (signal.SIGWINCH, signal.SIGCONT):
            signal.signal(number, self._proxy.set_modes)
        self._proxy.open()
        with explain_errors(
            "A chat on a terminal needs Python's readline",
            "Take another Python, or ask with -p.",
            ImportError,
        ):
            import readline
        self._readline = readline
        self._libedit = "libedit" in (readline.__doc__ or "")
        self._vi_keys = asks_for_vi_keys(self._libedit)
        readline.set_auto_history(False)
        with self._warned_of_history():
            for prompt in self._history.load() if self._history else []:
                self._add_history(prompt)
        self._set_completer(complete)
        if self._libedit:
            enlarge_libedit_buffers(readline)
            self._bind_libedit_keys()
        else:
            self._bind_readline_keys()

    def close(self) -> None:
        """Leave the terminal as it was found, whatever was under way."""
        self._proxy.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let another program have the terminal as it was. Raises `ChatError` if there is none."""
        if not self.interactive:
            raise ChatError("There is no terminal to edit on.")
        self._proxy.close()
        try:
            yield
        finally:
            self._proxy.open()

    def read_prompt(self, text: str = "") -> Prompt:
        """Read a prompt: a line, a paste, or what is typed between three quotes.

        On a terminal `text` stands in the line for editing. Raises `EOFError` at the end of the
        input, and `KeyboardInterrupt` on Ctrl+C, after which Up brings the text of the prompt back.
        """
        if text and self.interactive:
            text = self._offer(typed_form(text))
        self._screen.write("\n")
        self._dropped = ""
        lines: list[str] = []
        try:
            return self._read_lines(lines, text)
        except KeyboardInterrupt:
            self._drop(lines)
            raise

    def line_has_text(self) -> bool:
        """Tell if there was something in the prompt when Ctrl+C dropped it."""
        return bool(self._dropped or self._proxy.has_typed_ahead())

    def add_to_history(self, prompt: Prompt, on_disk: bool = True) -> None:
        """Add a prompt of a terminal to what Up brings back, and to the history on disk."""
        if not self._screen.interactive:
            return
        line = prompt.text if prompt.is_typed_line else typed_form(prompt.text)
        is_new = True
        if self._history and on_disk:
            with self._warned_of_history():
                is_new = self._history.add(line)
        if not is_new or not self._readline:
            return
        # A command with a block that was pasted is to be a command when it comes back.
        if prompt.is_typed_line and "\n" in line:
            line = self._shortened(line)
        self._add_history(line)

    def _add_history(self, text: str) -> None:
        """Have Up bring back a text, unless it is what Up brings back first already."""
        readline = self._readline
        line = self._editor_text(text)
        if line and line != readline.get_history_item(readline.get_current_history_length()):
            readline.add_history(line)

    def _set_completer(self, complete: Callable[[str], Iterable[str]]) -> None:
        readline = self._readline

        def complete_word(text: str, state: int) -> str | None:
            line = readline.get_line_buffer()
            # Completion works at the end of the line only: no index tells where the cursor is,
            # because libedit counts bytes.
            candidates = complete(line) if line.endswith(text) else []
            endings = [candidate[len(line) - len(text) :] for candidate in candidates]
            return endings[state] if state < len(endings) else None

        readline.set_completer(complete_word)
        readline.set_completer_delims(" \n")

    def _bind_libedit_keys(self) -> None:
        bind = self._readline.parse_and_bind
        bind("bind ^I rl_complete")
        for key, code in LIBEDIT_CODES.items():
            function = key.libedit_function
            # In the command mode of vi.
            bind(f"bind -a \\\\{code:o} {function}")
            if self._vi_keys:
                function = LIBEDIT_INSERT_FUNCTIONS.get(key, function)
            bind(f"bind \\\\{code:o} {function}")
        # In vi's command mode Esc begins no sequence.
        bind("bind -a ^[ ed-unassigned")

    def _bind_readline_keys(self) -> None:
        bindings = [r'"\e[200~": bracketed-paste-begin']
        for key in Key:
            if key.readline_function:
                sequence = key.sequence.decode().replace("\x1b", r"\e")
                bindings.append(f'"{sequence}": {key.readline_function}')
        # A sequence that nothing is bound to types nothing.
        bindings.append(r'"\e[": skip-csi-sequence')
        # The keymap of emacs comes last, because it stays current; vi chooses its own at each line.
        for keymap in ("vi-command", "vi-insert", "emacs"):
            for line in (f"set keymap {keymap}", *bindings):
                self._readline.parse_and_bind(line)
        for line in (
            "tab: complete",
            # Every key comes whole: after an Esc, vi's keys need not wait for more.
            "set keyseq-timeout 10",
            # A text that is put into the line is not shown as selected.
            "set enable-active-region off",
            # In a search, readline 8.2 crashes at a key that begins with Ctrl+X: that ends it.
            r'set isearch-terminators "\C-[\C-j\C-x"',
            # Readline decides by the environment's locale how many bits a character has.
            "set convert-meta off",
            "set input-meta on",
            "set output-meta on",
        ):
            self._readline.parse_and_bind(line)

    def _to_editor(self, item: bytes | str) -> bytes:
        """Return what the line editor is to get for keys, or for a text that was pasted."""
        if isinstance(item, bytes):
            return self._libedit_keys(item) if self._libedit else item
        if item == "\n":
            text = NEWLINE_SIGN if self._libedit else item
        else:
            text = self._editor_text(item, pasted=True)
            self._pasted.append(text)
        keys = self._insertion(text)
        return self._in_place_of_long_line(keys) if self._libedit else keys

    def _libedit_keys(self, keys: bytes) -> bytes:
        """Return keys that were typed as libedit is to get them."""
        sign = NEWLINE_SIGN.encode()
        if sign in keys:
            # A sign that was typed is itself.
            keys = keys.replace(sign, self._placeholder(NEWLINE_SIGN).encode())
        keys = LIBEDIT_SEQUENCE.sub(lambda match: LIBEDIT_BYTES[match[0]], keys)
        return self._in_place_of_long_line(keys)

    def _in_place_of_long_line(self, keys: bytes) -> bytes:
        """Return the keys; if there is no room, the line becomes a placeholder first."""
        line = self._current_line()
        if len(line) + len(keys) <= MAX_LIBEDIT_LINE:
            return keys
        # Libedit may be at work on the last key.
        time.sleep(BURST_S)
        line = self._current_line()
        kill_line = LIBEDIT_BYTES[Key.KILL_LINE.sequence]
        return kill_line + self._shortened(self._without_placeholders(line)).encode() + keys

    def _insertion(self, text: str) -> bytes:
        """Return the keys that put a text into the line."""
        keys = text.encode(errors="replace")
        return keys if self._libedit else PASTE_START + keys + PASTE_END

    def _editor_text(self, text: str, pasted: bool = False) -> str:
        """Return a text as it can stand in a line: itself, or a placeholder."""
        encoding = locale.nl_langinfo(locale.CODESET)
        # Python can't hand the editor characters that the locale does not have.
        text = strip_control_characters(text).encode(encoding, "replace").decode(encoding)
        if self._is_tall(text) or (self._libedit and self._is_hard_for_libedit(text, pasted)):
            return self._placeholder(text)
        return text.replace("\n", NEWLINE_SIGN) if self._libedit else text

    def _is_hard_for_libedit(self, text: str, pasted: bool) -> bool:
        """Tell if libedit needs a placeholder: it takes no long lines, and no newlines.

        A few lines that were typed, and come back, can be edited: a sign stands for each newline.
        """
        has_pasted_lines = pasted and "\n" in text
        is_long = len(text) > MAX_TYPED_RUN
        return has_pasted_lines or is_long or NEWLINE_SIGN in text

    def _placeholder(self, text: str) -> str:
        """Return the placeholder that stands for a text in the line."""
        number = len(self._placeholders) + 1
        beginning = shorten(text.replace(NEWLINE_SIGN, " "), 30)
        placeholder = f"[{number}: {beginning} {len(text)} characters]"
        return self._placeholders.setdefault(text, placeholder)

    def _current_line(self) -> str:
        """Return what stands in the line editor's line."""
        # Before the first key libedit's buffer still holds the line before.
        if not self._readline or not self._proxy.last_sent:
            return ""
        return str(self._readline.get_line_buffer())

    def _shortened(self, line: str) -> str:
        """Return a line with a placeholder for its text; a command stays before it."""
        if not line.startswith("/"):
            return self._placeholder(line)
        command, space, text = line.partition(" ")
        return command + space + self._placeholder(text)

    def _is_tall(self, text: str) -> bool:
        """Tell if a text would push out of the window what was said before it."""
        columns, rows = os.get_terminal_size(self._stdin.fileno())
        text_rows = sum(1 + display_width(line) // (columns or 80) for line in text.splitlines())
        return text_rows > (rows or 24) - 4

    def _offer(self, text: str) -> str:
        """Return the text to put into the next line: nothing, if Up is to bring it there."""
        # What was typed ahead is a prompt of its own.
        if not self._is_tall(text) and not self._proxy.has_typed_ahead():
            return text
        self._add_history(text)
        self._screen.notice("Press Up to edit the prompt.")
        return ""

    def _read_lines(self, lines: list[str], text: str) -> Prompt:
        """Read a prompt; its lines so far are put into `lines`."""
        first = self._read_line("prompt -> ", text)
        block = first.text.strip("\n")
        if "\n" not in block:
            block = block.strip()
        is_quoted = block.startswith('"""')
        is_closed = is_quoted and block[3:].endswith('"""')
        # A paste that only starts with three quotes is no beginning: program text often does.
        if not is_quoted or (not is_closed and not first.is_typed_line):
            return Prompt(block, first.is_typed_line)
        lines.append(block[3:])
        while not is_closed:
            try:
                lines.append(self._read_line("... ").text)
            except EOFError:
                # Ctrl+D drops the block; the end of a pipe ends it.
                if self.interactive:
                    return Prompt("", is_typed_line=False)
                break
            is_closed = lines[-1].rstrip().endswith('"""')
        block = "\n".join(lines).rstrip().removesuffix('"""')
        return Prompt(block.strip("\n"), is_typed_line=False)

    def _read_line(self, prompt: str, text: str = "") -> Prompt:
        """Read one line. Raises `EOFError`, and `KeyboardInterrupt` on Ctrl+C."""
        if self.interactive:
            line = self._edit_line(prompt, text)
            while placeholder := self._changed_placeholder(line):
                self._add_history(placeholder)
                self._screen.notice(
                    f"{placeholder} stands for a text and was changed, so nothing is sent."
                    " Up brings it back, and /edit before it opens the text."
                )
                line = self._edit_line(prompt, "")
            return self._parse_line(line)
        if self._stdin.isatty() and not self._screen.interactive:
            line = self._read_while_output_is_piped(prompt)
        else:
            line = self._read_from_pipe(prompt)
        if not line:
            raise EOFError
        return Prompt(line.rstrip("\n"), is_typed_line=True)

    def _read_from_pipe(self, prompt: str) -> str:
        """Read a line, and write it after its prompt as a terminal would echo it."""
        self._screen.write(prompt)
        line = self._stdin.readline()
        # Under mlx.launch somebody may be watching: the launcher's terminal has echoed the line.
        if not self._screen.interactive:
            self._screen.write(line.rstrip("\n") + "\n")
        return line

    def _read_while_output_is_piped(self, prompt: str) -> str:
        """Read a line from a terminal, with its prompt on standard error, as in `llmchat | tee`."""
        # The end of the last reply comes a little later, through the other program.
        time.sleep(BURST_S)
        self._screen.write_stderr(prompt)
        line = self._stdin.readline()
        if not line:
            self._screen.write_stderr("\n")
        return line

    def _edit_line(self, prompt: str, text: str) -> str:
        """Read a line with the line editor; return it as it stood there."""
        self._pasted.clear()
        if self._screen.styled:
            # The marks \x01 and \x02 take the colour out of the editor's count of columns. Libedit
            # loses a colour that nothing follows.
            prompt = f"\x01{GREEN}\x02{prompt.rstrip()}\x01{PLAIN}\x02 "
        keys = self._insertion(self._editor_text(text)) if text else b""
        late_until_s = self._screen.reply_ended_s + LATE_ESCAPE_S
        try:
            with self._proxy.reading(keys, self._vi_keys, late_until_s):
                return input(prompt)
        except EOFError:
            self._screen.write("\n")
            raise
        except BaseException as error:
            self._screen.write("\n")
            if not self._screen.dumb:
                # The cursor may stand in the first of several rows.
                self._screen.write_codes(ERASE_BELOW)
            # A second signal during `input` makes Python raise SystemError; its cause is the first.
            if isinstance(error, SystemError) and error.__cause__:
                raise error.__cause__ from None
            raise

    def _parse_line(self, line: str) -> Prompt:
        """Return what a line of the editor stands for."""
        pasted = [*self._pasted, *self._placeholders.values()]
        begins_pasted = any(
            line.lstrip().startswith(text.lstrip()) for text in pasted if text.strip()
        )
        typed = line
        for text in self._pasted:
            typed = typed.replace(text, "", 1)
        has_typed_newline = "\n" in typed or (self._libedit and NEWLINE_SIGN in typed)
        is_typed_line = not begins_pasted and not has_typed_newline
        return Prompt(self._without_placeholders(line), is_typed_line)

    def _changed_placeholder(self, line: str) -> str:
        """Return the placeholder that a line holds a part of, if there is one."""
        for placeholder in self._placeholders.values():
            beginning = placeholder[:10]
            if line.count(beginning) > line.count(placeholder):
                return placeholder
        return ""

    def _without_placeholders(self, line: str) -> str:
        """Return the text that a line of the editor stands for."""
        if self._libedit:
            line = line.replace(NEWLINE_SIGN, "\n")
        if not self._placeholders:
            return line
        texts = {placeholder: text for text, placeholder in self._placeholders.items()}
        any_placeholder = "|".join(map(re.escape, texts))
        return re.sub(any_placeholder, lambda match: texts[match[0]], line)

    def _drop(self, lines: list[str]) -> None:
        """Have Up bring back the lines of a prompt that Ctrl+C dropped."""
        # Before the first key libedit's buffer still holds the line before.
        line = self._parse_line(self._current_line())
        lines = [*lines, line.text if line.is_typed_line else typed_form(line.text)]
        self._dropped = "\n".join(lines).strip("\n")
        if self._readline and self._dropped:
            self._add_history(self._dropped)

    @contextlib.contextmanager
    def _warned_of_history(self) -> Iterator[None]:
        """Warn that the history on disk can't be used, and use it no more."""
        try:
            yield
        except OSError as error:
            self._screen.notice(f"Prompts are not kept for another day: {error_text(error)}")
            self._history = None


# --------------------------------------------------------------------------------------- Program


# The last lines of a prompt that are shown of a conversation that goes on.
SHOWN_LINES = 10
KEYS_HELP = (
    (", ".join(LEAVE_WORDS), "leave, as Ctrl+D does"),
    ("Ctrl+C, Esc", "stop the reply; Ctrl+C drops the line, Up brings it back"),
    ("Up, Ctrl+R, Tab", "earlier prompts; find one; complete commands and file names"),
    ("Alt+Enter, Shift+Enter", "a new line, as Esc and then Enter"),
    ('"""', "begin and end a prompt of several lines"),
    ("//", "begin a prompt with a slash"),
)


class Signals:
    """Handles the signals while entered, and gives them back.

    They end the program by way of all that cleans up. In a chat on a terminal Ctrl+C does not: it drops the line that
    is being read, and asks a reply to stop. Nothing else is torn from its work but the reading of files and the
    rendering of a prompt (a template may never end), and, by a second press, an engine that doesn't stop.
    """

    # A signal that is ignored by default, so that nobody else means anything by it here.
    WAKE = signal.SIGURG

    def __init__(self) -> None:
        # The exit status, once a signal has ended the program.
        self.exit_status = 0
        # Somebody chats; the next press tears what goes on now from its work, or the second does; there was a press.
        self.chatting = self.tearing = self.replying = self.pressed = False
        # There was a Ctrl+C in this reply: a thread knows that while Python waits for the engine.
        self.seen = False
        # What ends the program does so at the next `leave_if_due`.
        self.held = False

    def __enter__(self) -> Signals:
        # Under nohup, SIGHUP is to be ignored, and SIGINT in the background of a script.
        numbers = [
            number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        ]
        self._found = [(number, signal.signal(number, self._handle)) for number in numbers]
        # In a callback of an import Python would print what ends the program, and go on; `leave_if_due` sees to that.
        self._hook = sys.unraisablehook
        sys.unraisablehook = lambda error: None if self.exit_status else self._hook(error)
        signal.signal(self.WAKE, lambda *_: None)
        woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        threading.Thread(target=self._repeat, args=(woken,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        sys.unraisablehook = self._hook
        for found in self._found:
            signal.signal(*found)

    def _repeat(self, woken: int) -> None:
        """Wake the main thread after each signal.

        Python looks at one only if it ends a wait for input: it may have come just before that, or to another thread.
        """
        while number := os.read(woken, 1):
            self.seen |= self.replying and number[0] == signal.SIGINT
            if number[0] != self.WAKE:
                time.sleep(BURST_S)
                signal.pthread_kill(threading.main_thread().ident or 0, self.WAKE)
        os.close(woken)

    @contextlib.contextmanager
    def tearable(self) -> Iterator[None]:
        """Have a press tear what is done meanwhile from its work."""
        self.tearing = True
        try:
            yield
        finally:
            self.tearing = self.replying = False

    def press(self) -> None:
        """Ask the reply to stop."""
        self.pressed = True

    def exit_if_signalled(self) -> None:
        """End the program if a signal was to do so and a library, most of all in an import, has swallowed that."""
        if self.exit_status:
            raise SystemExit(self.exit_status)

    def _handle(self, signum: int, frame: object) -> None:
        if signum == signal.SIGINT and self.chatting:
            torn = self.tearing or (self.replying and self.pressed)
            self.press()
            if torn:
                # Only once: what is done about it must not be torn too.
                self.tearing = self.replying = False
                raise KeyboardInterrupt
        else:
            self.exit_status = 128 + signum
            if not self.held:
                raise KeyboardInterrupt


# What may follow each command, what it does, and the method of `Chat` that obeys it.
COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], None]]] = {}


def command(arguments: str = "") -> Callable[[Any], Any]:
    """Declare a method as a command: its name is the word, its docstring the help."""

    def declare(method: Any) -> Any:
        COMMANDS["/" + method.__name__.strip("_")] = arguments, method.__doc__.rstrip("."), method
        return method

    return declare


def completions(line: str) -> list[str]:
    """Return the lines that Tab may make of a line's beginning: commands, keys of `/set`, file names, or just a tab."""
    if not line.startswith("/"):
        return [line + "\t"]
    word, space, rest = line.partition(" ")
    wholes: Iterable[str] = ()
    if not space:
        wholes = (f"{name} " if arguments else name for name, (arguments, *_) in COMMANDS.items())
    elif word == "/set":
        wholes = (
            f"/set {key} "
            for key, (name, no) in KEYS.items()
            if OPTIONS[name].scope is CHAT and not no
        )
    elif word in ("/save", "/file"):
        # Only /file takes several, and it splits them at spaces.
        start = rest.rpartition(" ")[2] if word == "/file" else rest
        head = line[: len(line) - len(start) + start.rfind("/") + 1]
        found = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
        wholes = (head + os.path.basename(name) + "/" * os.path.isdir(name) for name in found)
    return [
        whole
        for whole in wholes
        if whole.startswith(line) and strip_control_characters(whole) == whole
    ]


def read_texts(patterns: Iterable[str]) -> list[str]:
    """Return the text of each file that the paths and patterns name, under its name. Raises `ChatError`."""
    texts = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        names = (
            [path]
            if os.path.exists(path)
            else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        )
        if not names:
            raise ChatError(f"There is no file {shorten(pattern)}: nothing is added.")
        for name in names:
            with foreign(f"{shorten(name)} can't be read as text: {{}}. Nothing is added."):
                text = Path(name).read_text(encoding="utf-8-sig").strip()
                if "\0" in text:
                    raise ValueError("it holds zeros")
            texts.append(f"{name}:\n\n{text}")
    return texts


def put_in_clipboard(text: str, screen: Screen) -> str:
    """Put a text into the clipboard by the first program that can, or else by asking the terminal (OSC 52).

    Returns what was done. Raises `ChatError`.
    """
    data = text.encode(errors="replace")
    programs = {
        "pbcopy": "HOME",
        "wl-copy": "WAYLAND_DISPLAY",
        "xclip -selection clipboard": "DISPLAY",
    }
    # Within tmux an OSC 52 of a program's own is dropped by default; this has tmux itself send one.
    programs["tmux load-buffer -w -"] = "TMUX"
    for words in (program.split() for program, needs in programs.items() if os.environ.get(needs)):
        if shutil.which(words[0]) and not subprocess.run(words, input=data, check=False).returncode:
            return f"{len(text)} characters are copied."
    if not screen.interactive:
        raise ChatError("There is no clipboard here.")
    screen.write_codes(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    return f"{len(text)} characters went to the terminal, to be copied."


@dataclasses.dataclass
class Chat:
    """The loop: reads prompts and commands, shows replies. A turn that fails never ends it."""

    conversation: Conversation
    screen: Screen
    editor: LineEditor
    settings: Settings
    session: SessionFile | None = None
    kept: SavedChats | None = None
    signals: Signals = dataclasses.field(default_factory=Signals)
    # The texts of files that go before the next prompt.
    files: list[str] = dataclasses.field(default_factory=list)
    # The prompt that stands in the next line for editing.
    draft: str = ""
    # The turns that were set aside last.
    aside: Sequence[Message] = ()
    # An error was said; the session could not be written last time.
    failed: bool = False
    unkept: bool = False

    def welcome(self) -> None:
        """Say how to go on, and with which conversation."""
        if self.screen.interactive:
            hosts = f"on {self.conversation.hosts.size} hosts · quit leaves"
            leave = "quit or Ctrl+D leaves" if self.editor.interactive else hosts
            self.screen.notice(
                f"{Path(str(self.settings.model)).name} · /help lists the commands · {leave}"
            )
        if self.session and (turns := self.conversation.messages):
            count = f"{len(turns) // 2} turn{'s' * (len(turns) > len('ab'))}"
            day = self.session.modified.date()
            moment = (
                f"{'today' if day == datetime.now().date() else day}, {self.session.modified:%H:%M}"
            )
            self.screen.notice(f"Going on with {count} of {self.settings.session or moment}.")
            if self.screen.interactive:
                # Files may stand before a prompt.
                prompt, reply = (message["content"] for message in turns[-2:])
                self.screen.notice("\n".join([*prompt.splitlines()[-SHOWN_LINES:], reply]))

    def run(self) -> None:
        """Talk until the user leaves."""
        prompt, leaving = Prompt("", is_typed_line=False), False
        while not (prompt.is_typed_line and prompt.text.lower().removeprefix("/") in LEAVE_WORDS):
            if prompt.text:
                self._handle_prompt(prompt)
            try:
                prompt, leaving = self._read(), False
            except EOFError:
                break
            except KeyboardInterrupt:
                self.signals.exit_if_signalled()
                again, leaving = leaving, not self.editor.line_has_text()
                if again and leaving:
                    break
                if leaving:
                    self.screen.notice("Press Ctrl+C again to leave, or type quit.")
                prompt = Prompt("", is_typed_line=False)
        self.screen.write("Goodbye!\n")

    def _read(self) -> Prompt:
        draft, self.draft = self.draft, ""
        self.signals.exit_if_signalled()
        with self.signals.tearable():
            self.signals.pressed = False
            return self.editor.read_prompt(draft)

    def _handle_prompt(self, prompt: Prompt) -> None:
        self.editor.add_to_history(prompt)
        try:
            self._dispatch(prompt)
        except ChatError as error:
            self.signals.exit_if_signalled()
            # An error is said, and the chat goes on, but where other hosts don't know of it.
            if isinstance(error, EngineError) and self.conversation.hosts.size > 1:
                raise
            self._show_error(error)
        except KeyboardInterrupt:
            self.signals.exit_if_signalled()
            self.screen.notice("Stopped.")
        self._keep()

    def _show_error(self, error: ChatError) -> None:
        self.screen.notice(str(error), RED)
        self.failed = True

    def _dispatch(self, prompt: Prompt) -> None:
        text = prompt.text
        word, rest = [*text.split(None, 1), ""][:2]
        word = "/help" if word == "/?" else word.lower()
        # A pasted block is never a command; the text after one may have several lines.
        if not prompt.is_typed_line:
            self.send(text)
        elif not re.fullmatch(r"/[a-z]+", word):
            self.send(text[1:] if text.startswith("//") else text)
        elif word not in COMMANDS:
            hint = did_you_mean(word, COMMANDS) or "; /help lists them."
            raise ChatError(
                f"There is no command {word}{hint} To send a line that starts with /, type //."
            )
        elif rest and not COMMANDS[word][0]:
            raise ChatError(
                f"{word} takes no text: nothing was done. To send a line that starts with /, type //."
            )
        else:
            COMMANDS[word][2](self, rest.strip())

    def send(self, prompt: str) -> None:
        """Show the reply to a prompt. Raises `ChatError`."""
        # A prompt that was refused, stopped at once, or that the engine failed on stands in the next line.
        self.draft, before = prompt, self.conversation.messages
        prompt = "\n\n".join([*self.files, prompt])
        # The prompt of a chat is written down before its reply comes: a crash loses only the reply.
        if self.settings.prompt is None:
            self._keep({"role": "user", "content": prompt})
        try:
            self._show(self.conversation.reply(prompt))
        finally:
            if self.conversation.messages is not before:
                self.files, self.draft = [], ""
                self._keep()

    def answer_once(self, prompt: str) -> int:
        """Show the one reply; return the exit status. Raises `ChatError`, also for a thought without an answer."""
        self.send(prompt)
        reply = self.conversation.messages[-1]
        if "finish_reason" in reply and not reply["content"]:
            raise ChatError(
                "The reply ended within its thought: --max-thought-tokens closes that sooner."
            )
        if not reply["content"].strip():
            raise ChatError("The reply holds no answer: ask again, or in other words.")
        return int(self.failed)

    def _keep(self, *asked: Message) -> None:
        """Write the conversation down. That it can't be written is said once, and the chat goes on."""
        turns = [*self.conversation.messages, *asked]
        try:
            if self.session is None and self.kept and turns:
                self.session = self.kept.create(str(self.settings.model))
            if self.session:
                # A system prompt by itself is no conversation to go on with.
                self.session.save(
                    self.settings.with_system(turns) if turns or self.settings.session else []
                )
            self.unkept = False
        except ChatError as error:
            if not self.unkept:
                self._show_error(error)
            self.unkept = True

    def close(self) -> None:
        """Keep the engine's state beside the session, if that is wanted."""
        if not (self.settings.keep_state and self.session):
            return
        try:
            with self.screen.status(lambda: "keeping the state"):
                self.conversation.keep_state(self.session.state_path)
        except Exception as error:
            # Only time is lost, and it must not hide why the chat is left, perhaps with the terminal gone.
            with contextlib.suppress(OSError):
                self.screen.notice(f"The state is not kept: {root_cause_text(error)}.")

    def _set_aside(self) -> None:
        """Keep the conversation as it is on disk now in a file of its own: what follows is another one."""
        turns = self.conversation.messages
        # Of one that nothing was added to, a copy is enough.
        if self.session and self.session.messages and self.kept and turns != self.aside:
            with contextlib.closing(self.kept.create(str(self.settings.model))) as aside:
                aside.save(self.session.messages)
            self.aside = turns

    def _show(self, pieces: Generator[Piece, None, None]) -> None:
        doing, signals = "reading the prompt", self.signals
        signals.seen = False

        def status() -> str:
            return "stopping..." if signals.pressed or signals.seen else doing

        view = ReplyView(self.screen, self.settings.hide_thoughts, self.settings.plain)
        # To close a reply is to stop it.
        with signals.tearable(), self.screen.status(status), view, contextlib.closing(pieces):
            for piece in pieces:
                signals.tearing, signals.replying = False, True
                if piece.kind == "prefill" and piece.text:
                    doing = f"reading the prompt: {piece.text}"
                view.show(piece)
                if signals.pressed:
                    break
        self._show_ending(self.conversation.statistics)

    def _show_ending(self, statistics: Statistics) -> None:
        """Say how a reply ended, where that is not plain to see."""
        reply: Message = self.conversation.messages[-1] if self.conversation.messages else {}
        ended, said = statistics.finish_reason, statistics.generation_tokens
        goes_on = "/continue goes on"
        if statistics.remaining_tokens <= 0:
            goes_on = "the context is full"
        elif self.settings.prompt is not None:
            goes_on = "--max-tokens allows more"
        elif "reasoning_content" in reply and not reply["content"]:
            goes_on = "/continue goes on, /answer ends the thought"
        if self.signals.pressed and ended != "stop":
            self.screen.notice(f"Stopped; {goes_on}." if said else "Stopped.")
        elif ended == "length":
            self.screen.notice(f"Cut at {statistics.answer_tokens or said} tokens; {goes_on}.")
        elif ended == "stop" and not reply["content"].strip():
            self.screen.notice("(an empty reply)")
        if ended and self.settings.stats:
            self.screen.notice(statistics.summary())

    @command()
    def _help(self, rest: str) -> None:
        """List the commands."""
        commands = [
            (f"{name} {arguments}", does) for name, (arguments, does, _) in COMMANDS.items()
        ]
        self._write_table([*commands, *KEYS_HELP])

    @command()
    def _clear(self, rest: str) -> None:
        """Start a new conversation; /undo brings this one back."""
        self._set_aside()
        self.conversation.clear()
        self.screen.notice("A new conversation.")

    @command()
    def _retry(self, rest: str) -> None:
        """Say the last reply again."""
        self._show(self.conversation.retry())

    @command()
    def _undo(self, rest: str) -> None:
        """Take the last turn back and edit its prompt."""
        self.draft = self.conversation.undo()
        self.screen.notice(
            "The last turn is taken back." if self.draft else "The conversation is back."
        )

    @command()
    def _continue(self, rest: str) -> None:
        """Go on with a reply that was cut or stopped."""
        self._show(self.conversation.continue_reply())

    @command()
    def _answer(self, rest: str) -> None:
        """Close a thought that was cut or stopped: the answer begins."""
        self._show(self.conversation.continue_reply(answer=True))

    @command("[TEXT]")
    def _system(self, rest: str) -> None:
        """Show or set the system prompt; - removes it."""
        if rest:
            self._set(f"system {'default' if rest == '-' else rest}")
        else:
            self.screen.write(f"{self.settings.system or 'There is no system prompt.'}\n")

    @command("[KEY VALUE]")
    def _set(self, rest: str) -> None:
        """List the settings, show one, or change it; the value default puts it back."""
        key, value = [*re.split(r"[\s=]+", rest, maxsplit=1), ""][:2]
        name = KEYS.get(key.lower().replace("_", "-"), ("", False))[0]
        if not value and (name or not key):
            rows = []
            for each in (
                [name] if name else [each for each in OPTIONS if OPTIONS[each].scope is CHAT]
            ):
                value = strip_control_characters(format_value(getattr(self.settings, each)))
                rows.append(
                    (each.replace("_", "-"), value, self.settings.sources.get(each, "default"))
                )
            self._write_table(rows)
            return
        if name == "system":
            self._set_aside()
        with foreign(f"{key} {{}}"):
            name = self.settings.set_from_text(key, value.strip(), "here", [CHAT])
        if name == "seed":
            self.conversation.seed(self.settings.seed)
        self.screen.notice(
            f"{name.replace('_', '-')} = {format_value(getattr(self.settings, name))}"
        )
        if name == "think" and (doubt := self.conversation.thinking_note()):
            self.screen.notice(doubt)

    @command("[on|off]")
    def _stats(self, rest: str) -> None:
        """Show statistics after each reply, or no longer."""
        self._set(f"stats {rest or ('off' if self.settings.stats else 'on')}")

    @command("[PATH ...]")
    def _file(self, rest: str) -> None:
        """Put files before the next prompt; - drops them."""
        reading = self.screen.status(lambda: "reading files")
        # A pattern may lead through all of a disk.
        with reading, self.signals.tearable(), foreign(f"/file {shorten(rest)}: {{}}"):
            words = [rest] if os.path.exists(os.path.expanduser(rest)) else shlex.split(rest)
            self.files = [] if words == ["-"] else self.files + read_texts(words)
        for text in self.files:
            self.screen.notice(
                f"{text.partition(chr(10))[0]} {self.conversation.describe_size(text)}"
            )
        if not self.files:
            self.screen.notice("No files wait for the next prompt.")

    @command("[TEXT]")
    def _edit(self, rest: str) -> None:
        """Edit TEXT, or the last prompt, in $VISUAL or $EDITOR."""
        program = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        before = "".join(message["content"] for message in self.conversation.messages[-2:-1])
        with tempfile.TemporaryDirectory(prefix="llmchat") as folder, self.editor.suspended():
            file = Path(folder, "prompt.md")
            file.write_text(rest or before, encoding="utf-8", errors="replace")
            with foreign(f"{program} can't be used to edit: {{}}. Set EDITOR to another one."):
                status = subprocess.run([*shlex.split(program), str(file)], check=False).returncode
                text = file.read_text(encoding="utf-8", errors="replace").strip("\n")
        if status:
            raise ChatError(f"{program} ended with status {status}: nothing is taken from it.")
        self.draft = text

    @command("[code [N]]")
    def _copy(self, rest: str) -> None:
        """Copy the last answer, or its last or Nth block of code."""
        if not self.conversation.messages:
            raise ChatError("There is no answer to copy.")
        answer = self.conversation.messages[-1]["content"].strip()
        blocks = re.findall(r"^(```+|~~~+).*\n((?:.*\n)*?)\1", answer, re.MULTILINE)
        parts = {"": answer}
        for count, (_, block) in enumerate(blocks, 1):
            parts["code"] = parts[f"code {count}"] = block
        if rest not in parts:
            raise ChatError(f"There is no such block of code: the last answer has {len(blocks)}.")
        self.screen.notice(put_in_clipboard(parts[rest], self.screen))

    @command("FILE")
    def _save(self, rest: str) -> None:
        """Write the conversation: NAME.md as Markdown, else as --session does."""
        if not rest:
            raise ChatError("/save needs the name of a file.")
        if self.conversation.hosts.rank:
            return
        path = Path(os.path.expanduser(strip_quotes(rest)))
        written = as_markdown if path.suffix == ".md" else as_lines
        with foreign(f"{shorten(rest)} could not be written: {{}}. Name another file."):
            if path.exists():
                raise ChatError(
                    f"{path} is there already, and was not replaced: name another file."
                )
            replace_file(
                path, written(self.settings.with_system(self.conversation.messages))
            ).close()
        self.screen.notice(f"{len(self.conversation.messages)} messages are in {path}.")

    def _write_table(self, rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            self.screen.write("  ".join(map(str.ljust, row, widths)).rstrip() + "\n")


STDIN_NOTICE = (
    "Standard input is read to its end, to go before the prompt; < /dev/null leaves it out."
)


def one_shot_prompt(text: str, stdin: TextIO, launched: bool = False) -> str:
    """Return the prompt that `-p TEXT` sends: piped standard input goes before TEXT, and is all if TEXT is `-`.

    Raises `ChatError` if there is no text, or more than any model can take.
    """
    if launched and text == "-":
        raise ChatError(
            "mlx.launch never tells where standard input ends: give --prompt the text itself."
        )
    piped = "" if stdin.isatty() or launched else stdin.read(MAX_CHARACTERS + 1).strip("\n")
    if len(piped) > MAX_CHARACTERS:
        raise ChatError(
            f"Standard input holds more than {MAX_CHARACTERS} characters: no model can take that."
        )
    prompt = piped if text == "-" else "\n\n".join(part for part in (piped, text) if part)
    if not prompt.strip():
        raise ChatError("There is nothing to reply to: give -p a text, or pipe one in.")
    return prompt


def open_session(
    settings: Settings, kept: SavedChats, screen: Screen
) -> tuple[SessionFile | None, list[Message], str]:
    """Return the session file, the turns in it, and a last prompt that is still without its reply.

    The system prompt comes from the file unless one was given, and so does the model. Raises `ChatError`.
    """
    session = None
    if settings.session is not None:
        session = SessionFile(Path(os.path.expanduser(settings.session)))
    elif settings.resume:
        named = (
            resolve_model_name(str(settings.model))
            if settings.sources.get("model") == "flag"
            else None
        )
        session, settings.model = kept.open_latest(named, screen.notice)
    messages = list(session.messages) if session else []
    draft = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else ""
    if messages and messages[0]["role"] == "system":
        settings.system = settings.system or messages[0]["content"]
        del messages[0]
    return session, messages, draft


def load(settings: Settings, screen: Screen, hosts: Hosts, signals: Signals) -> Model:
    """Load the model that the settings name, and say so in a chat. Raises `ChatError`."""
    if settings.model is None:
        lines = [
            "no model is named.",
            "usage: llmchat MODEL [options]",
            f"example: llmchat {EXAMPLE_MODEL}",
        ]
        raise ChatError(
            "\n".join([*lines, *(f"already here: {name}" for name in cached_models())]), 2
        )
    asked, settings.model = settings.model, resolve_model_name(settings.model)
    if settings.prompt is None:
        screen.write(f"Loading model {strip_control_characters(settings.model)}...\n")
    if asked != settings.model and screen.interactive:
        screen.notice(f"{asked} is {settings.model} here.")
    loader = Loader(settings, hosts)
    with screen.status(loader.progress):
        # MLX aborts the process, and leaves the terminal as it is, if a signal raises while it is imported.
        signals.held = True
        import_library("mlx.core")
        signals.held = False
        signals.exit_if_signalled()
        model = loader.load()
        signals.exit_if_signalled()
    if settings.prompt is None:
        screen.write("Model loaded successfully!\n")
    return model


def run(
    settings: Settings, screen: Screen, editor: LineEditor, hosts: Hosts, signals: Signals
) -> int:
    """Load the model, then chat or answer one prompt; return the exit status. Raises `ChatError`."""
    prompt = None
    if settings.prompt is not None:
        with screen.notice_if_slow(STDIN_NOTICE):
            prompt = one_shot_prompt(settings.prompt, sys.stdin, hosts.size > 1)
    talks = editor.interactive and prompt is None
    if talks:
        # Before the model loads: keys that are typed meanwhile wait for the prompt.
        editor.open(completions, signals.press)
    kept = SavedChats(Path(os.path.expanduser("~/.llmchat")))
    session, messages, draft = (
        open_session(settings, kept, screen) if hosts.rank == 0 else (None, [], "")
    )
    settings.model, settings.system, messages = hosts.broadcast(
        [settings.model, settings.system, messages]
    )
    # Each of several hosts holds only its part of the state.
    settings.keep_state &= hosts.size == 1
    if draft and not talks:
        screen.notice(
            f"The last prompt of {settings.session or 'the chat'} got no reply, and is left out: {draft}"
        )
    # The same command on the same session asks about a document that the conversation has already.
    held = "\n".join(message["content"] for message in messages) if settings.history else ""
    files = [text for text in read_texts(settings.file) if text not in held]
    model = load(settings, screen, hosts, signals)
    conversation = Conversation(model, settings, messages)
    conversation.state = session.state_path if session and settings.keep_state else None
    keeps = (settings.keep or settings.resume) and prompt is None and hosts.rank == 0
    chat = Chat(
        conversation,
        screen,
        editor,
        settings,
        session,
        kept if keeps else None,
        signals,
        files,
        draft * talks,
    )
    for note in filter(None, (model.recommended, conversation.thinking_note())):
        screen.notice(note)
    with contextlib.closing(chat):
        if prompt is not None:
            return chat.answer_once(prompt)
        chat.welcome()
        if screen.interactive and (limit := conversation.limit()[0]) != model.context_length:
            screen.notice(f"The memory has room for a conversation of about {limit} tokens.")
        signals.chatting = talks
        chat.run()
    return int(chat.failed and not editor.interactive)


def repair_standard_streams() -> None:
    """Stand in for standard streams that were closed, and have the others replace what they can't encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def open_terminal(hosts: Hosts, plain: bool) -> Iterator[tuple[Screen, LineEditor]]:
    """Give this process its screen and its line editor, and leave the terminal as it was found.

    On other hosts than rank 0 nothing is seen.
    """
    out, err = (sys.stdout, sys.stderr) if hosts.rank == 0 else (open(os.devnull, "w"),) * 2
    # mlx.launch sets COLUMNS for the processes that it starts if its own output is a terminal.
    interactive = (sys.stdin.isatty() and out.isatty()) or (
        hosts.size > 1 and "COLUMNS" in os.environ
    )
    screen = Screen(out, err, interactive, plain)
    history = (
        PromptHistory(Path(os.path.expanduser("~/.llmchat_history"))) if hosts.rank == 0 else None
    )
    editor = LineEditor(sys.stdin, screen, history)
    try:
        yield screen, editor
    finally:
        editor.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the one place where errors become exit statuses."""
    if sys.version_info < (3, 9):
        print(
            "llmchat: error: Python 3.9 or newer is needed: there is no MLX for this one.",
            file=sys.stderr,
        )
        return 1
    repair_standard_streams()
    hosts, signals, complaint = Hosts(), Signals(), ""
    try:
        with signals:
            hosts = join_hosts()
            settings = Settings(
                **hosts.broadcast(vars(read_settings(argv)) if hosts.rank == 0 else None)
            )
            with open_terminal(hosts, settings.plain) as (screen, editor):
                return run(settings, screen, editor, hosts, signals)
    except ChatError as error:
        complaint, status = str(error), error.status
    except SystemExit as error:
        # Of argparse, or of a signal.
        status = int(error.code or 0)
    except OSError as error:
        # Python's own flush at exit must not fail once more on a standard output that is gone, or full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, complaint = (
            1,
            f"Standard input or output can't be used any more: {error_text(error)}.",
        )
        if isinstance(error, BrokenPipeError):
            status, complaint = 128 + signal.SIGPIPE, ""
    except (Exception, KeyboardInterrupt):
        # What a signal breaks off, an import most of all, may end with any error.
        if not signals.exit_status:
            raise
        status = signals.exit_status
    # A signal is said only where it has a sentence of its own: a download that was stopped.
    if complaint and signals.exit_status in (0, status):
        if hosts.rank:
            # Once rank 0 has ended, the launcher ends the others: an error that all have met is said once.
            time.sleep(10.0)
            complaint = f"On {os.uname().nodename}: {complaint}"
        Screen(sys.stdout, sys.stderr, interactive=False).notice(
            f"llmchat: error: {complaint}", RED
        )
    return signals.exit_status or status


if __name__ == "__main__":
    raise SystemExit(main())
