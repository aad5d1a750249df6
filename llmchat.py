#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "mlx>=0.29.3; sys_platform == 'darwin' and python_version < '3.10'",
#     "mlx>=0.31.2; sys_platform == 'darwin' and python_version >= '3.10'",
#     "mlx[cpu]>=0.29.3; sys_platform == 'linux' and python_version < '3.10'",
#     "mlx[cpu]>=0.31.2; sys_platform == 'linux' and python_version >= '3.10'",
#     "mlx-lm>=0.29.1; python_version < '3.10'",
#     "mlx-lm>=0.31.3; python_version == '3.10'",
#     "mlx-lm>=0.32; python_version >= '3.11'",
#     "huggingface-hub>=0.34",
#     "transformers>=4.56; python_version < '3.10'",
#     "transformers>=5.3; python_version >= '3.10'",
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

import sys

# For a script Python looks beside its file first: a `signal.py` that somebody put into Downloads
# would run. A Python that is isolated or in safe mode has no such entry.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import os
import signal

# Ctrl+C while the rest is imported ends the program quietly; `main` takes the signals over.
if (
    "chat" in os.path.basename(sys.argv[0])
    and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
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
import stat
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
from typing import Any, Dict, NamedTuple, NoReturn, TextIO
from urllib.parse import quote, unquote, urlsplit

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


# More than any file has that is read whole: an index of weights takes some megabytes.
MAX_FILE_BYTES = 64 << 20
# What `read_file` and `read_json` raise.
UNREADABLE = (OSError, ValueError, RecursionError)


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a plain file.

    Raises `OSError`, also for what is no plain file (a pipe would be waited for, a device may
    never end), and for one that is too large.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no plain file")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(f"it has more than {max_bytes >> 20} MiB")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises one of `UNREADABLE`."""
    value = json.loads(read_file(path))
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


# -------------------------------------------------------------------------------------- Settings


CONFIG_FILE = ".llmchat_config"
EFFORTS = ("low", "medium", "high")


class Scope(enum.Enum):
    """Where a setting may be given. The value finishes the sentence "can only be given ..."."""

    COMMAND_LINE = "on the command line"
    HOME_CONFIG = f"on the command line or in ~/{CONFIG_FILE}"
    CONFIG = "before the chat"
    CHAT = "anywhere"


# What each config file may set. The working folder may come from somebody else, and its file with
# it: that file may neither choose what is loaded nor what is kept.
HOME_CONFIG_SCOPES = (Scope.HOME_CONFIG, Scope.CONFIG, Scope.CHAT)
FOLDER_CONFIG_SCOPES = (Scope.CONFIG, Scope.CHAT)


class Option(NamedTuple):
    """A setting as the command line, the config files and `/set` know it."""

    parse: Callable[[str], Any]
    # What stands for the value in the help; None for a switch.
    metavar: str | None
    help: str
    scope: Scope
    short_flag: str


class Key(NamedTuple):
    """What a key of a config file or of `/set` means: a setting, and if the value is negated."""

    name: str
    negated: bool


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return a question that names the name most like a mistyped word, or nothing."""

    def comparable(name: str) -> str:
        # All flags have their dashes in common, and all commands their slash.
        return name.lstrip("-/").lower().replace("_", "-")

    by_text = {comparable(name): name for name in names}
    text = comparable(word)
    near = [candidate for candidate in by_text if candidate.startswith(text)]
    if not near:
        near = difflib.get_close_matches(text, by_text, n=1, cutoff=0.75)
    return f"; did you mean {by_text[near[0]]}?" if text and near else ""


def number_parser(
    convert: Callable[[str], Any], low: float, high: float = sys.float_info.max
) -> Callable[[str], Any]:
    """Return a parser of a number in [low, high]; it raises `ArgumentTypeError` with the range."""
    kind = "a whole number" if convert is int else "a number"
    bounds = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"

    def parse(text: str) -> Any:
        # A NaN compares false with everything, and is refused.
        with contextlib.suppress(ValueError):
            if low <= (value := convert(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be {kind} {bounds}, not '{shorten(text, 40)}'")

    return parse


def parse_bool(text: str, other_values: str = "") -> bool:
    """Parse a yes or no; the error also names the `other_values` that the setting takes."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(
        f"must be {other_values}true or false, not '{shorten(text, 40)}'"
    )


def parse_effort(text: str) -> bool | str:
    """Parse a yes or no, or how much to think."""
    if text.lower() in EFFORTS:
        return text.lower()
    return parse_bool(text, f"{', '.join(EFFORTS)}, ")


def strip_quotes(text: str) -> str:
    """Return a text without the quotes around it."""
    return re.sub(r"""^(["'])(.*)\1$""", r"\2", text)


def format_value(value: Any) -> str:
    """Return a setting's value as a config file has it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def option(
    default: Any,
    parse: Callable[[str], Any],
    metavar: str | None,
    help: str,
    scope: Scope = Scope.CHAT,
    short_flag: str = "",
) -> Any:
    """Declare a setting as the command line, the config files and `/set` know it."""
    if default and parse is not parse_bool:
        help += f" (default {default})"
    declared = Option(parse, metavar, help, scope, short_flag)
    return dataclasses.field(default=default, metadata={"option": declared})


@dataclasses.dataclass
class Settings:
    """Every parameter of the program. A field's name is its key, with `-` for `_`."""

    model: str | None = option(
        None, str, "MODEL", "a Hugging Face repository or a folder", Scope.CONFIG
    )
    prompt: str | None = option(
        None,
        str,
        "TEXT",
        "print the reply to TEXT, after piped input; - is that",
        Scope.COMMAND_LINE,
        "-p",
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
    history: bool = option(
        True, parse_bool, None, "send the turns before a prompt with it", Scope.CONFIG
    )
    think: bool | str | None = option(
        None, parse_effort, "|".join(EFFORTS), "have a reasoning model think, and how much"
    )
    max_thought_tokens: int = option(
        8192, number_parser(int, 0), "N", "the longest thought, in tokens; 0 is no limit"
    )
    hide_thoughts: bool = option(
        False, parse_bool, None, "show that a reasoning model thinks, not what"
    )
    recommended: bool = option(
        False, parse_bool, None, "sample as the model's author recommends", Scope.CONFIG
    )
    plain: bool = option(False, parse_bool, None, "show Markdown without colours")
    stats: bool = option(
        False, parse_bool, None, "show time, tokens and cache use after each reply"
    )
    read_ahead: bool = option(
        True,
        parse_bool,
        None,
        "compute what is known of the next prompt while you type",
        Scope.CONFIG,
    )
    file: tuple[str, ...] = option(
        (),
        str,
        "PATH",
        "put a file before the first prompt; can be given again",
        Scope.COMMAND_LINE,
    )
    session: str | None = option(
        None,
        str,
        "FILE",
        "continue the conversation in FILE, and save it there",
        Scope.COMMAND_LINE,
    )
    resume: bool = option(
        False,
        parse_bool,
        None,
        "continue the last chat: of MODEL if it is named, or that with the number MODEL",
        Scope.COMMAND_LINE,
        "-c",
    )
    chats: bool = option(
        False, parse_bool, None, "list the saved chats with their numbers", Scope.COMMAND_LINE
    )
    # Where nothing is said, a chat is saved if it is held at a terminal.
    keep: bool | None = option(
        None,
        parse_bool,
        None,
        "save the chat in ~/.llmchat (default: if it is held at a terminal)",
        Scope.HOME_CONFIG,
    )
    keep_state: bool = option(
        False, parse_bool, None, "save what the engine has read beside the chat", Scope.HOME_CONFIG
    )
    adapter: str | None = option(
        None, str, "FOLDER", "a LoRA adapter to load on top of the model", Scope.HOME_CONFIG
    )
    revision: str | None = option(
        None, str, "NAME", "the branch, tag or commit of the repository", Scope.HOME_CONFIG
    )
    trust_remote_code: bool = option(
        False,
        parse_bool,
        None,
        "run code that the model repository brings along",
        Scope.COMMAND_LINE,
    )
    force: bool = option(
        False,
        parse_bool,
        None,
        "load a model that seems too large, or not made for talking; ask a hub without https",
        Scope.HOME_CONFIG,
    )

    # The number of the saved chat to continue, from the command line `llmchat -c NUMBER`.
    resume_number: int | None = None
    # Where each value that is not a default came from: a file, "flag" or "here".
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def set_value(self, name: str, value: Any, source: str) -> None:
        """Set a setting to a value as it is."""
        setattr(self, name, value)
        self.sources[name] = source

    def reset(self, name: str) -> None:
        """Set a setting to its default."""
        setattr(self, name, getattr(Settings, name))
        self.sources.pop(name, None)

    def set_from_text(
        self, key: str, text: str, source: str, scopes: Collection[Scope] = (Scope.CHAT,)
    ) -> str:
        """Set what a key of a config file or of `/set` means to the value that a text says.

        Only settings with one of the scopes are set. Returns the setting's name. Raises
        `ArgumentTypeError`.
        """
        found = find_key(key)
        if found is None:
            raise argparse.ArgumentTypeError(f"is no setting{did_you_mean(key, KEYS)}")
        declared = OPTIONS[found.name]
        if declared.scope not in scopes:
            raise argparse.ArgumentTypeError(f"can only be given {declared.scope.value}")
        value = declared.parse(text)
        self.set_value(found.name, not value if found.negated else value, source)
        return found.name

    def load_file(self, path: Path, scopes: Collection[Scope], trusts_code: bool = False) -> None:
        """Set what a file of `key = value` lines says, if the file exists.

        Where code of a repository is trusted, only sampling and looks are taken from it. Raises
        `ChatError`, which names the file and the line.
        """
        if not os.path.exists(path):
            return
        advice = "Mend or remove it."
        with explain_errors(f"{path} could not be read", advice, OSError, ValueError, status=2):
            lines = read_file(path).decode("utf-8-sig").splitlines()
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            key, equals, value = text.partition("=")
            key = key.strip()
            try:
                if not (key and equals):
                    raise argparse.ArgumentTypeError("is not of the form 'key = value'")
                name = self.set_from_text(key, parse_config_value(value), str(path), scopes)
                if trusts_code and (name == "system" or OPTIONS[name].scope is not Scope.CHAT):
                    raise argparse.ArgumentTypeError(
                        "can't be given here together with --trust-remote-code"
                    )
            except argparse.ArgumentTypeError as error:
                message = f"{path}:{number}: {shorten(key, 40)} {error}"
                raise ChatError(message, status=2) from error


OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(Settings) if field.metadata
}
KEYS = {name.replace("_", "-"): Key(name, False) for name in OPTIONS}
KEYS.update(
    {
        f"no-{key}": Key(name, True)
        for key, (name, _) in KEYS.items()
        if OPTIONS[name].parse in (parse_bool, parse_effort)
    }
)


def find_key(key: str) -> Key | None:
    """Return what a key means, in any case and with `_` or `-`; None if it means nothing."""
    return KEYS.get(key.lower().replace("_", "-"))


# A value in quotes and the comment that may follow. In double quotes a backslash escapes.
DOUBLE_QUOTED = re.compile(r'"((?:\\.|[^\\])*?)"\s*(?:#.*)?')
SINGLE_QUOTED = re.compile(r"'(.*?)'\s*(?:#.*)?")
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\"": '"', r"\\": "\\"}
# A comment behind a value that has no quotes. "You are #1." holds none.
COMMENT = re.compile(r"(?:^|\s)#(?:\s.*)?$")


def parse_config_value(text: str) -> str:
    """Return the value that stands after a `=`, without quotes and comment.

    Raises `ArgumentTypeError` if there is none.
    """
    text = text.strip()
    if match := DOUBLE_QUOTED.fullmatch(text):
        return re.sub(r"\\.", lambda escape: ESCAPES.get(escape[0], escape[0]), match[1])
    if match := SINGLE_QUOTED.fullmatch(text):
        return match[1]
    if text.startswith('"'):
        raise argparse.ArgumentTypeError('has no closing "')
    value = COMMENT.sub("", text)
    if not value:
        raise argparse.ArgumentTypeError("needs a value")
    return value


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors show no control characters of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2."""
        if message.endswith("expected one argument"):
            message += "; a value that starts with - follows a =, as in --prompt=-1"
        super().error(strip_control_characters(message))


def flags_of(name: str) -> list[str]:
    """Return the flags of a setting, the short one first."""
    flag = f"--{name.replace('_', '-')}"
    short_flag = OPTIONS[name].short_flag
    return [short_flag, flag] if short_flag else [flag]


def argument_parser() -> argparse.ArgumentParser:
    """Return the command line's parser, made from the options.

    Its namespace holds only the flags that were given.
    """
    parser = ArgumentParser(
        prog="llmchat",
        usage="llmchat MODEL [options]",
        description="Talk with a local language model in the terminal.",
        epilog=(
            f"Defaults can stand in ~/{CONFIG_FILE} and ./{CONFIG_FILE}:"
            " lines of 'key = value', keys as the flags."
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, declared in OPTIONS.items():
        flags = flags_of(name)
        arguments: dict[str, Any] = {"type": declared.parse, "metavar": declared.metavar}
        if name == "model":
            flags = [name]
            arguments["nargs"] = "?"
        elif name == "file":
            arguments["action"] = "append"
        elif declared.parse is parse_bool:
            arguments = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*flags, help=declared.help, **arguments)
    parser.add_argument("--no-think", dest="think", action="store_false", help="have it not think")
    parser.add_argument("--version", action="version", version=f"llmchat {__version__}")
    return parser


SHORT_FLAGS = {"-h", *(declared.short_flag for declared in OPTIONS.values())}
VALUE_FLAGS = {
    flag
    for name, declared in OPTIONS.items()
    if declared.parse not in (parse_bool, parse_effort)
    for flag in flags_of(name)
}


def join_values(words: Sequence[str]) -> list[str]:
    """Return a command line in which no value of a flag can be taken for something else.

    `--think` without an effort becomes `--think=true`: argparse would take the next word for the
    effort, also where that is the model. `-p -5+3` becomes `-p=-5+3`: argparse would take the
    value for a flag.
    """
    result: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        next_word = rest[0] if rest else ""
        if word == "--think" and next_word not in EFFORTS:
            result.append("--think=true")
        elif word in VALUE_FLAGS and is_dashed_value(next_word):
            result.append(f"{word}={rest.pop(0)}")
        else:
            result.append(word)
    return result


def is_dashed_value(word: str) -> bool:
    """Tell if a word that follows a flag is a value though it starts with a dash.

    A word with two dashes is more likely a mistyped flag.
    """
    has_one_dash = word.startswith("-") and not word.startswith("--")
    # Argparse itself takes a lone dash for a value.
    return has_one_dash and word not in SHORT_FLAGS


# The first words of other programs' command lines, and what to do here instead.
OTHER_COMMANDS = {
    "help": "llmchat --help lists the options",
    "version": "llmchat --version tells the version",
    **dict.fromkeys(
        ("list", "ls", "ps", "models", "show"), "llmchat alone lists the models that are here"
    ),
    **dict.fromkeys(
        ("run", "chat", "generate", "start", "load", "pull", "serve"),
        "a model is named alone: llmchat {call}",
    ),
}


def other_command_message(command: str, words: Sequence[str]) -> str:
    """Return what to do instead of another program's command that was followed by some words."""
    model, *prompt = [word for word in words if not word.startswith("-")] or ["MODEL"]
    call = shorten(model, 80)
    if prompt:
        call += f" -p {shlex.quote(shorten(' '.join(prompt), 40))}"
    return f"there is no command {command}; {OTHER_COMMANDS[command].format(call=call)}"


def unknown_flag_message(flag: str) -> str:
    """Return the message for a flag that does not exist."""
    if flag == "--model":
        return "the model is named without a flag: llmchat MODEL"
    known = ["--help", "--version", *(f"--{key}" for key in KEYS if key != "model")]
    hint = did_you_mean(flag, known) or "; --help lists them"
    return f"there is no flag {flag}{hint}"


def read_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the flags that were given. Exits with status 2, as argparse does, if one is wrong."""
    parser = argument_parser()
    words = sys.argv[1:] if argv is None else argv
    namespace, unknown = parser.parse_known_args(join_values(words))
    flags = vars(namespace)
    model = flags.get("model", "")
    if model in OTHER_COMMANDS and not os.path.exists(model):
        parser.error(other_command_message(model, unknown))
    for word in unknown:
        if word.startswith("-"):
            parser.error(unknown_flag_message(shorten(word.partition("=")[0], 40)))
    if unknown:
        prompt = shorten(" ".join(unknown), 40)
        parser.error(f"a prompt goes after -p: llmchat {shorten(model, 80)} -p {prompt!r}")
    # A folder with such a name is meant by ./3.
    if flags.get("resume") and re.fullmatch("[0-9]{1,9}", model):
        flags["resume_number"] = int(flags.pop("model"))
        if flags["resume_number"] == 0:
            parser.error("the saved chats are numbered from 1: llmchat --chats lists them")
    return flags


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Read the config file of the home, that of the working folder, then the flags."""
    flags = read_flags(argv)
    settings = Settings()
    home_file = Path(os.path.expanduser("~")) / CONFIG_FILE
    folder_file = Path(CONFIG_FILE)
    settings.load_file(home_file, HOME_CONFIG_SCOPES)
    both_exist = home_file.exists() and folder_file.exists()
    if not (both_exist and home_file.samefile(folder_file)):
        trusts_code = flags.get("trust_remote_code", False)
        settings.load_file(folder_file, FOLDER_CONFIG_SCOPES, trusts_code)
    vars(settings).update(flags)
    settings.sources.update(dict.fromkeys(flags, "flag"))
    return settings


def folder_config_notice(settings: Settings) -> str:
    """Return a sentence on what the working folder's config file has set, or nothing."""
    names = [name for name, source in settings.sources.items() if source == CONFIG_FILE]
    keys = ", ".join(name.replace("_", "-") for name in names)
    return f"./{CONFIG_FILE} sets {keys}." if keys else ""


# ------------------------------------------------------------------------------------------- Hub


# The weights that mlx-lm loads, and the files that its own `load` would download with them.
WEIGHTS = "model*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
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
# The files that tell if a model is of use here. They are downloaded before all others.
TELLING_FILES = (
    "config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# A rough check of a repository's name; the hub's own check follows.
REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
# Endings of files of weights, which no repository's name has.
FILE_NAME = re.compile(r"\.(gguf|safetensors|onnx|bin|pth)$", re.IGNORECASE)
REPOSITORY_ADDRESS = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(models/)?([^/]+/[^/?#]+).*"
)
COMMIT = re.compile("[0-9a-f]{1,64}")
# The name that the client gives a downloaded file: a checksum, behind which S3 puts a dash and a
# number where it took the file in parts.
ETAG = re.compile('(W/)?"?[0-9a-fA-F-]{1,128}"?')
GIB = 1 << 30
# From here on a wait tells how long it takes.
SHOW_RATE_AFTER_S = 5
DISK_HINT = "Make room for it, or set HF_HOME to a folder on another disk."
RETRY_HINT = "Every finished file is kept; run the same command again to fetch the rest."


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep the libraries' warnings off the screen, and their questions from the user.

    They ask, for instance, if a model's code may run. Another thread may be in this block while
    the main thread shows something: the screen and the line editor hold their own references to
    the standard streams, which this leaves alone. But only one thread at a time may be in it.
    """
    disabled_level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with open(os.devnull, "r+") as nothing, contextlib.redirect_stdout(
        nothing
    ), warnings.catch_warnings():
        stdin = sys.stdin
        sys.stdin = nothing
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            sys.stdin = stdin
            logging.disable(disabled_level)


# What huggingface-hub reads as it is imported: our own status line tells how far a download is,
# and without the second the client tells what it runs on.
HUB_VARIABLES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def import_library(name: str) -> Any:
    """Return a library's module, which is imported only now. Raises `ChatError`."""
    for variable, value in HUB_VARIABLES.items():
        os.environ.setdefault(variable, value)
    # A library may fail in any way while it is imported: it reads the environment, for instance.
    with silence_libraries(), explain_errors(
        "The libraries can't be loaded",
        "Look at the variables HF_... and MLX..., at ulimit -n (mlx-lm needs 4096),"
        " and at the folder that you are in, or install anew.",
        Exception,
    ):
        return importlib.import_module(name)


def hub_constants() -> Any:
    """Return huggingface-hub's constants, which it takes from the environment."""
    return import_library("huggingface_hub.constants")


def hub_cache() -> Path:
    """Return the folder in which huggingface-hub keeps models."""
    return Path(hub_constants().HF_HUB_CACHE)


def hub_address() -> str:
    """Return the hub's address as it may be shown."""
    return without_password(hub_constants().ENDPOINT)


def without_password(address: str) -> str:
    """Return a URL without the user and the password in it."""
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]


def is_plain_name(name: object) -> bool:
    """Tell if a name from outside is that of a file within its folder."""
    is_name = isinstance(name, str) and re.fullmatch(r"[^/\0]{1,255}", name)
    return bool(is_name) and name not in (".", "..")


def file_names(folder: Path) -> list[str]:
    """Return the names of a folder's entries, sorted; none if the folder can't be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except (OSError, ValueError):
        return []


def repository_folder(name: str) -> Path:
    """Return the folder that a repository has, or would have, in the hub cache."""
    return hub_cache() / ("models--" + name.replace("/", "--"))


def locate(name: str, revision: str | None) -> Path:
    """Return the folder that a revision has, or would have, in the hub cache.

    Raises one of `UNREADABLE` if the cache's entry is damaged.
    """
    repository = repository_folder(name)
    reference = repository / "refs" / (revision or "main")
    if not os.path.exists(reference):
        return repository / "snapshots" / (revision or "main")
    commit = read_file(reference).decode("ascii", errors="replace").strip()
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"{reference.name} names no commit")
    return repository / "snapshots" / commit


def indexed_weights(folder: Path) -> list[str]:
    """Return the names of the weights that a folder's index lists; none if it has no index.

    Raises one of `UNREADABLE` if the index is damaged.
    """
    index = folder / WEIGHTS_INDEX
    if not os.path.exists(index):
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_plain_name, weight_map.values())):
        raise ValueError(f"{index.name} does not name files")
    return sorted(set(weight_map.values()))


def missing_files(folder: Path) -> list[str]:
    """Return the names of files that loading needs and a folder lacks.

    In the hub cache a file is whole if it is there. Raises one of `UNREADABLE`.
    """
    weights = indexed_weights(folder) or fnmatch.filter(file_names(folder), WEIGHTS)
    needed = ["config.json", "tokenizer_config.json", *(weights or ["model.safetensors"])]
    return [name for name in needed if not os.path.exists(folder / name)]


def known_missing_files(folder: Path) -> list[str]:
    """Return the names of files that a folder lacks; none if its index is damaged."""
    try:
        return missing_files(folder)
    except UNREADABLE:
        return []


def is_cached(name: str) -> bool:
    """Tell if a repository can be started without a download. What is damaged can't."""
    try:
        return not missing_files(locate(name, None))
    except UNREADABLE:
        return False


def cached_models() -> list[str]:
    """Return the names of the repositories in the hub cache that need no download."""
    entries = [entry for entry in file_names(hub_cache()) if entry.startswith("models--")]
    names = [entry[len("models--") :].replace("--", "/") for entry in entries]
    return [name for name in names if REPOSITORY.fullmatch(name) and is_cached(name)]


def similar_model_folder(name: str) -> str:
    """Return the model folder on this disk whose name is most like a mistyped one, or nothing."""
    parent, base = os.path.split(os.path.expanduser(name).rstrip("/"))
    siblings = file_names(Path(parent or "."))
    folders = [entry for entry in siblings if os.path.exists(Path(parent, entry, "config.json"))]
    near = difflib.get_close_matches(base, folders, n=1, cutoff=0.75)
    return os.path.join(parent or ".", near[0]) if near else ""


def resolve_model_name(name: str) -> str:
    """Return the folder or the repository that a name means.

    The hub's address is taken off, and a repository in the cache is found in any case of letters
    and without its owner. Raises `ChatError` for a mistyped folder.
    """
    if address := REPOSITORY_ADDRESS.fullmatch(name):
        return address[5]
    if os.path.exists(os.path.expanduser(name)):
        return name
    if REPOSITORY.fullmatch(name.rstrip("/")):
        name = name.rstrip("/")
    if not REPOSITORY.fullmatch(name) or is_cached(name):
        return name
    ending = f"/{name}".lower()
    meant = [cached for cached in cached_models() if f"/{cached}".lower().endswith(ending)]
    if len(meant) == 1:
        return meant[0]
    folder = similar_model_folder(name)
    # A name with other numbers is more likely that of another version, which the hub has.
    if folder and re.findall(r"\d+", folder) == re.findall(r"\d+", name):
        raise ChatError(
            f"There is no folder {name}; did you mean {folder}? A repository of that name is"
            f" loaded by llmchat https://huggingface.co/{name}."
        )
    return name


class Progress:
    """What is going on while a model is found and loaded. Any thread may ask for the text."""

    def __init__(
        self,
        description: str,
        total_bytes: int = 0,
        done_bytes: Callable[[], int] = lambda: 0,
        predicts: bool = False,
    ) -> None:
        """With `predicts` the text also tells how fast it goes, and how long it will take."""
        self._description = description
        self._total_bytes = total_bytes
        self._done_bytes = done_bytes
        self._predicts = predicts
        self._started_s = time.monotonic()

    def text(self) -> str:
        """Return what is going on, and how far it is."""
        spent_s = time.monotonic() - self._started_s
        takes_long = spent_s > SHOW_RATE_AFTER_S
        if not self._total_bytes:
            return f"{self._description}: {spent_s:.0f} s" if takes_long else self._description
        done_bytes = self._done_bytes()
        text = f"{self._description}: {done_bytes / 1e9:.1f} of {self._total_bytes / 1e9:.1f} GB"
        if not (self._predicts and takes_long and done_bytes):
            return text
        left_s = max(0, round((self._total_bytes - done_bytes) * spent_s / done_bytes))
        rate = done_bytes / spent_s / 1e6
        return f"{text} · {rate:.1f} MB/s · {left_s // 60}:{left_s % 60:02} left"


class Preload:
    """Reads files into the page cache on a thread of its own, so that loading finds them there."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._done_bytes = 0
        threading.Thread(target=self._run, daemon=True).start()

    def done_bytes(self) -> int:
        """Return how many bytes were read so far."""
        return self._done_bytes

    def _run(self) -> None:
        for file in self._files:
            # The load that follows tells what is wrong with a file.
            with contextlib.suppress(OSError), open(file, "rb", buffering=0) as stream:
                while chunk := stream.read(1 << 21):
                    self._done_bytes += len(chunk)


# The sentences for the errors of huggingface-hub, by class or else by HTTP status; a status in
# hundreds stands for all of its kind.
HUB_MESSAGES: dict[str | int, str] = {
    "GatedRepoError": (
        "{name} is gated: ask for access at {hub}/{name}, then log in with 'hf auth login'."
    ),
    "RepositoryNotFoundError": (
        "There is no model {name} at {hub}, or it is private: check the name at {hub}/{name}, or"
        " log in with 'hf auth login'."
    ),
    "RevisionNotFoundError": (
        "{name} has no revision {revision}: {hub}/{name}/tree/main lists its branches and tags."
    ),
    "HFValidationError": (
        f"'{{name}}' can't be the name of a repository: a name looks like {EXAMPLE_MODEL}."
    ),
    "OfflineModeIsEnabled": (
        "{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or name a"
        " model that is here (llmchat alone lists them)."
    ),
    "JSONDecodeError": (
        "{hub} answers with a page where data should be: if this network wants a log-in, open it"
        " in a browser."
    ),
    401: (
        "{hub} does not accept the token that is in use: log in again with 'hf auth login', or"
        " unset HF_TOKEN."
    ),
    403: (
        "{hub} refuses to hand out {name}: ask for access at {hub}/{name}, then log in with 'hf"
        " auth login'."
    ),
    429: (
        "{hub} takes no more requests from here for now: wait some minutes, or log in with 'hf auth"
        f" login'. {RETRY_HINT}"
    ),
    500: (
        "{hub} has a problem of its own (status {status}), so {what} could not be fetched: try"
        f" later. {RETRY_HINT}"
    ),
}


def error_chain(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the innermost last, also of one raised "from None"."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) and inner not in chain:
        chain.append(inner)
    return chain


def root_cause_text(error: BaseException) -> str:
    """Return the text of an error's innermost cause; the system's own text if there is one."""
    chain = error_chain(error)
    from_system = [each for each in chain if isinstance(each, OSError) and each.strerror]
    return error_text((from_system or chain)[-1])


def network_error_text(error: BaseException) -> str:
    """Return the system's own text for a failed request, or else the library's.

    The libraries wrap the system's error in errors of theirs. What they say themselves has their
    advice, for instance which package is missing for a proxy of this kind.
    """
    chain = error_chain(error)
    from_system = [each for each in chain if isinstance(each, OSError) and each.strerror]
    return error_text(from_system[-1] if from_system else chain[0])


def network_advice(error: BaseException) -> str:
    """Return what to look at after a failed request: a variable, if it depends on one.

    Nothing is returned where the client says itself what is missing.
    """
    import ssl
    import urllib.request

    about_certificates = any(isinstance(each, ssl.SSLError) for each in error_chain(error))
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(variable, "")
        if path and (about_certificates or not os.path.exists(path)):
            return f"{variable} is {path}: name certificates that are there, or unset it."
    endpoint = urlsplit(hub_constants().ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(endpoint.hostname or ""):
        is_of_the_network = isinstance(error, OSError) or not isinstance(error, ValueError)
        return "Check the network." if is_of_the_network else ""
    variables = [name for name, value in os.environ.items() if name.lower().endswith("_proxy")]
    named = [name for name in variables if os.environ[name] == proxy] or ["The system's proxy"]
    return f"{named[0]} is {without_password(proxy)}: check that proxy, or do without it."


def unknown_repository_hint(name: str) -> str:
    """Return which model may have been meant by a name that the hub doesn't know, or nothing."""
    if os.path.isdir(name):
        return f"; the folder here is ./{name}."
    if hint := did_you_mean(name, cached_models()):
        return hint
    return "" if "/" in name else f"; did you mean mlx-community/{name}?"


def hub_error_message(name: str, revision: str | None, error: BaseException) -> str:
    """Return the sentence for an error of the hub's client, its HTTP library or the system."""
    from huggingface_hub import errors

    # The client says that the file is not in the cache either; why it was not fetched is the cause.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    hub, what = hub_address(), missing_part(name, revision)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    keys = [*(kind.__name__ for kind in type(error).__mro__), status, status // 100 * 100]
    known = [key for key in keys if key in HUB_MESSAGES]
    if known[:1] == ["RepositoryNotFoundError"] and (hint := unknown_repository_hint(name)):
        return f"There is no model {name} at {hub}{hint}"
    if known:
        facts = {"name": name, "hub": hub, "revision": revision, "what": what, "status": status}
        return HUB_MESSAGES[known[0]].format(**facts)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"The disk is too full for {what}. {DISK_HINT} {RETRY_HINT}"
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename} can't be used ({root_cause_text(error)}): set HF_HOME to a folder"
            " that you can write to."
        )
    advice = " ".join(filter(None, [network_advice(error), RETRY_HINT]))
    return f"{what} could not be fetched from {hub}: {network_error_text(error)}. {advice}"


def missing_part(name: str, revision: str | None) -> str:
    """Return what could not be fetched: the first missing file of a repository, or all of it."""
    try:
        folder = locate(name, revision)
    except UNREADABLE:
        return name
    missing = known_missing_files(folder) if os.path.exists(folder) else []
    return f"{missing[0]} of {name}" if missing else name


@contextlib.contextmanager
def hub_errors_explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn any error of the hub's client into a `ChatError`. The block calls the client alone."""
    try:
        yield
    except ChatError:
        raise
    # The client raises errors of its own, of its HTTP library, and whatever a bad answer leads to.
    except Exception as error:
        message = hub_error_message(name, revision, error)
        # Without a password of the address, where an error repeats that.
        address = hub_constants().ENDPOINT
        user = address.rpartition("://")[2].rpartition("@")[0]
        raise ChatError(message.replace(f"{user}@", "") if user else message) from error


def check_endpoint(address: str, force: bool) -> None:
    """Raise `ChatError` if the hub's address is none, or lets others change what comes from it."""
    import ipaddress

    shown = without_password(address)
    try:
        parts = urlsplit(address)
        # A port that is no number raises an error only when it is asked for.
        host = parts.hostname if parts.port != 0 else None
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise ChatError(
            f"HF_ENDPOINT is {shown}, which is no address of a hub: unset it, or write it like"
            " https://huggingface.co."
        )
    try:
        is_this_machine = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_this_machine = host == "localhost"
    if parts.scheme == "http" and not is_this_machine and not force:
        raise ChatError(
            f"HF_ENDPOINT is {shown}: over plain http anybody on the way can change what comes."
            " Use https, or take the risk with --force."
        )


def check_answer(response: Any, *_: object, **__: object) -> None:
    """Raise `ChatError` if an answer names a commit or a checksum that is none.

    The client makes paths of both without a look at them, so that a hub could have it write
    anywhere. The HTTP library calls this with each answer, before the client sees it.
    """
    headers = response.headers
    commit = headers.get("X-Repo-Commit")
    if commit is not None and not COMMIT.fullmatch(commit):
        raise ChatError(f"{hub_address()} answers with '{shorten(commit, 80)}' for a commit.")
    etag = headers.get("X-Linked-Etag") or headers.get("ETag")
    if response.request.method == "HEAD" and etag and not ETAG.fullmatch(etag):
        raise ChatError(f"{hub_address()} answers with '{shorten(etag, 80)}' for a checksum.")


def have_answers_checked() -> None:
    """Have the HTTP library of the hub's client call `check_answer`."""
    from huggingface_hub import get_session

    session: Any = get_session()
    # Newer clients use httpx, older ones requests.
    hooks = session.event_hooks if hasattr(session, "event_hooks") else session.hooks
    if check_answer not in hooks["response"]:
        hooks["response"].append(check_answer)


def list_repository(name: str, revision: str | None) -> dict[str, int]:
    """Return the names and sizes of a repository's files, without those in its folders."""
    from huggingface_hub import HfApi

    timeout = hub_constants().HF_HUB_ETAG_TIMEOUT
    with hub_errors_explained(name, revision):
        have_answers_checked()
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=timeout)
    files = {file.rfilename: file.size for file in info.siblings or ()}
    return {
        file: size if isinstance(size, int) else 0
        for file, size in files.items()
        if is_plain_name(file)
    }


def fetch_file(name: str, revision: str | None, file: str) -> Path:
    """Download a file into the hub cache, if it is not there yet; return its path."""
    from huggingface_hub import hf_hub_download

    with hub_errors_explained(name, revision):
        have_answers_checked()
        return Path(hf_hub_download(name, file, revision=revision))


@contextlib.contextmanager
def download_interruptible(name: str) -> Iterator[None]:
    """Turn Ctrl+C in this block into a `ChatError` that tells how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise ChatError(f"The download of {name} was stopped. {RETRY_HINT}", 130) from error


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, also of those that are still coming."""
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    return 0


def download_files(
    name: str, folder: Path, sizes: dict[str, int], report: Callable[[Progress], None]
) -> None:
    """Download files of a repository into the folder of its commit, the small ones first.

    Raises `ChatError`, also if the disk has no room for them.
    """
    total_bytes = sum(sizes.values())
    free_bytes = shutil.disk_usage(folder).free
    if total_bytes > free_bytes:
        raise ChatError(
            f"{name} does not fit on the disk: {total_bytes / GIB:.1f} GiB are still to be"
            f" downloaded, where {hub_cache()} has {free_bytes / GIB:.1f} GiB free. {DISK_HINT}"
        )
    blobs = folder.parent.parent / "blobs"
    bytes_before = folder_bytes(blobs)

    def done_bytes() -> int:
        return folder_bytes(blobs) - bytes_before

    report(Progress("downloading", total_bytes, done_bytes, predicts=True))
    # One after the other, and by this thread: huggingface-hub's snapshot_download waits on Ctrl+C
    # until the files that its threads are at are done.
    for file in sorted(sizes, key=sizes.__getitem__):
        fetch_file(name, folder.name, file)


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
    use_private_kernels()
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
    """A loaded model: the network, its chat template, what it has room for, and its hosts."""

    name: str
    network: Any
    template: ChatTemplate
    context_length: int | None
    hosts: Hosts
    # All that a state which was computed with this model depends on.
    fingerprint: str
    # What the state of a conversation may take of the memory, on each host; None is no bound.
    memory_bytes: int | None


# The formats of weights that MLX can't load, by the ending of their files.
UNSUPPORTED_FORMATS = {
    ".gguf": "GGUF",
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".onnx": "ONNX",
}
# The last words of architectures that answer with a vector or a label. GPT2LMHeadModel and the
# like do talk.
NON_CHAT_ARCHITECTURE = re.compile(
    r"(?<!LMHead)Model$|ForMaskedLM$|ForFeatureExtraction$|For\w*Classification$"
)
REMOTE_CODE_MESSAGE = (
    "{name} wants to run its own code: if you trust it, --trust-remote-code allows that."
)
NO_TEMPLATE_MESSAGE = (
    "{name} has no chat template, so it can't hold a conversation: name its instruct-tuned sibling,"
    f" or try {EXAMPLE_MODEL}."
)
# What configurations call the number of tokens that a model was made for.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
# The parts of a configuration that may hold that of the language model.
LANGUAGE_MODEL_PARTS = ("text_config", "llm_config", "thinker_config")
# No language model was made for fewer tokens than this, and a number beyond that says "no limit".
MIN_CONTEXT_TOKENS = 2048
MAX_CONTEXT_TOKENS = 1 << 60
# The sampling that a model's author may recommend.
RECOMMENDED_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass
class ModelFiles:
    """A model that was found: where its files are, and what its configuration says."""

    name: str
    folder: Path
    # The folder of the repository in the hub cache; None for a folder of the user's own.
    repository: Path | None
    # The names of all files, also of those that are still to be downloaded.
    names: Collection[str]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    # The chat template of a processor. A tokenizer doesn't load it by itself.
    processor_template: Any = None
    # What the configurations name as code: "module.Class", or "repository--module.Class".
    code_references: Sequence[str] = ()
    weight_bytes: int = 0
    # The sizes of the files that are still to be downloaded.
    missing: dict[str, int] = dataclasses.field(default_factory=dict)

    def damaged_advice(self) -> str:
        """Return what to do if a file is damaged."""
        return damaged_advice(self.folder, self.repository)

    def weights(self) -> list[Path]:
        """Return the files of weights that are here."""
        return [self.folder / name for name in sorted(fnmatch.filter(self.names, WEIGHTS))]


class Memory(NamedTuple):
    """The memory of this machine, and how much of it a model may use."""

    total_bytes: int
    usable_bytes: int


def damaged_advice(folder: Path, repository: Path | None) -> str:
    """Return what to do if a file of a model in this folder is damaged."""
    if repository:
        return f"Remove {repository}, and it is downloaded again."
    return f"Put a whole copy of the model into {folder}."


# What can be said of a model by the names of its files and by its configuration.


def check_file_names(name: str, names: Collection[str]) -> None:
    """Raise `ChatError` if a model's files are none that MLX can load."""
    if not fnmatch.filter(names, WEIGHTS):
        endings = {Path(file).suffix for file in names}
        formats = sorted(
            {UNSUPPORTED_FORMATS[end] for end in endings if end in UNSUPPORTED_FORMATS}
        )
        held = f"holds no {WEIGHTS}"
        if formats:
            held = f"holds its weights as {' and '.join(formats)} files"
        raise ChatError(f"{name} {held}, where MLX needs {WEIGHTS}: look for it at mlx-community.")
    if "config.json" not in names:
        raise ChatError(
            f"{name} has no config.json: name a model's folder, or a Hugging Face repository."
        )


def check_purpose(
    name: str, names: Collection[str], config: dict[str, Any], force: bool = False
) -> None:
    """Raise `ChatError` if a configuration is of no model, or of one that does not talk."""
    if not isinstance(config.get("model_type"), str):
        raise ChatError(
            f"config.json of {name} names no model_type, so mlx-lm can't load it. Name another"
            " model."
        )
    architectures = config.get("architectures")
    words = architectures if isinstance(architectures, list) else []
    never_talks = bool(words) and all(NON_CHAT_ARCHITECTURE.search(str(word)) for word in words)
    if ("modules.json" in names or never_talks) and not force:
        raise ChatError(
            f"{name} is made for embeddings or labels, not for talking: name a chat model such as"
            f" {EXAMPLE_MODEL}, or try it all the same with --force."
        )


def code_references(config: dict[str, Any]) -> list[str]:
    """Return what the `auto_map` of a configuration names as code."""
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    # A tokenizer has two: a slow one and a fast one.
    nested = [value if isinstance(value, list) else [value] for value in values]
    return [reference for part in nested for reference in part if isinstance(reference, str)]


def check_own_code(
    name: str, config: dict[str, Any], references: Sequence[str], trusts_code: bool
) -> None:
    """Raise `ChatError` if a model wants to run code that is not allowed, or not its own."""
    model_file = config.get("model_file")
    # mlx-lm before 0.32 runs such a file unasked (CVE-2026-5843).
    if model_file is not None and not trusts_code:
        raise ChatError(REMOTE_CODE_MESSAGE.format(name=name))
    outside = [reference for reference in references if "/" in reference.rpartition("--")[2]]
    if model_file is not None and not is_plain_name(model_file):
        outside.append(str(model_file))
    if outside and trusts_code:
        raise ChatError(
            f"{name} names code outside of its folder, '{shorten(outside[0], 80)}': name another"
            " model."
        )


def code_owners(found: ModelFiles) -> str:
    """Return in one sentence whose code is about to run, or nothing if the model has none."""
    references = [reference for reference in found.code_references if "--" in reference]
    if not (references or fnmatch.filter(found.names, "*.py")):
        return ""
    owners = [f"the folder {found.folder.absolute()}"]
    if found.repository:
        owners = [f"the repository {found.name} at commit {found.folder.name}"]
    others = sorted({reference.partition("--")[0] for reference in references})
    owners += [f"the repository {shorten(other, 80)}" for other in others]
    return f"Code of {' and of '.join(owners)} is about to run."


def check_tokenizer_files(name: str, tokenizer_config: dict[str, Any]) -> None:
    """Raise `ChatError` if a tokenizer's configuration names files outside of the model's folder.

    Older libraries open what stands there.
    """
    for key, value in tokenizer_config.items():
        # Many models have an absolute path of their author's machine here. No library opens it.
        if not key.endswith(("_file", "_files")) or key == "special_tokens_map_file":
            continue
        for file in value if isinstance(value, list) else [value]:
            path = Path(file) if isinstance(file, str) else Path()
            if path.is_absolute() or ".." in path.parts:
                raise ChatError(
                    f"tokenizer_config.json of {name} names a {key} outside of its folder,"
                    f" '{shorten(file, 80)}': name another model."
                )


def has_chat_template(
    names: Collection[str], tokenizer_config: dict[str, Any], processor_template: Any = None
) -> bool:
    """Tell if one of a model's files is, or names, a chat template."""
    if "chat_template.jinja" in names or processor_template:
        return True
    # The type is the name of a template that mlx-lm brings along.
    return bool(tokenizer_config.get("chat_template") or tokenizer_config.get("chat_template_type"))


def positive_int(value: Any) -> int | None:
    """Return a number of tokens that a configuration gives, also as a float; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # A NaN compares false with everything.
    return int(value) if 1 <= value < MAX_CONTEXT_TOKENS else None


def language_configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration, and the parts of it that may be that of the language model."""
    parts = [config.get(key) for key in LANGUAGE_MODEL_PARTS]
    inner = [language_configs(part) for part in parts if isinstance(part, dict)]
    return [config, *itertools.chain.from_iterable(inner)]


def context_length(config: dict[str, Any]) -> int | None:
    """Return the number of tokens that a model was made for, or None if that is not said."""
    for part in language_configs(config):
        lengths = [positive_int(part.get(key)) for key in CONTEXT_KEYS]
        length = next(filter(None, lengths), None)
        stretched = stretched_length(part, length)
        if stretched or length:
            return stretched or length
    return None


def stretched_length(config: dict[str, Any], length: int | None) -> int | None:
    """Return the number of tokens that scaled positions reach, where a configuration gives fewer.

    Many configurations give that number themselves, others only the original one.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict):
        return None
    # Newer configurations have one entry for each kind of layer.
    scaling = scaling.get("full_attention", scaling)
    if not isinstance(scaling, dict) or not positive_int(scaling.get("factor")):
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("yarn", "linear"):
        return None
    factor = float(scaling["factor"])
    key = "original_max_position_embeddings"
    original = positive_int(scaling.get(key)) or positive_int(config.get(key))
    # Without an original length, yarn stretches the length itself. With linear scaling that is
    # only sure where the length would have been stretched from less than any model has.
    is_original = kind == "yarn" or (length or 0) < MIN_CONTEXT_TOKENS * factor
    if original is None and is_original:
        original = length
    return max(length or 0, int(original * factor)) if original else None


def recommended_sampling(config: dict[str, Any]) -> dict[str, str]:
    """Return what a generation_config.json recommends, by the name of the setting, as texts."""
    values = {name: config.get(name) for name in RECOMMENDED_SETTINGS}
    if config.get("do_sample") is False:
        values["temperature"] = 0
    return {name: str(value) for name, value in values.items() if value is not None}


def apply_recommended(settings: Settings, folder: Path) -> str:
    """Take the author's sampling where the user said nothing; return what is new in a sentence.

    What is no value here, such as a top_k of -1, is passed over. Raises `ChatError`.
    """
    file = folder / "generation_config.json"
    with explain_errors(f"{file} can't be read", "Leave out --recommended.", *UNREADABLE):
        recommended = recommended_sampling(read_json(file))
    changed = []
    for name, text in recommended.items():
        before = getattr(settings, name)
        if name in settings.sources:
            continue
        with contextlib.suppress(argparse.ArgumentTypeError):
            settings.set_from_text(name, text, file.name)
        if getattr(settings, name) != before:
            changed.append(f"{name.replace('_', '-')} {format_value(getattr(settings, name))}")
    return f"Recommended for this model: {', '.join(changed)}." if changed else ""


def check_memory(name: str, weight_bytes: int, memory: Memory, force: bool = False) -> int:
    """Return the bytes that weights leave to a conversation, at least a little.

    Raises `ChatError` if not even the weights fit.
    """
    if weight_bytes > memory.usable_bytes and not force:
        raise ChatError(
            f"{name} is too large: {weight_bytes / GIB:.1f} GiB of weights, where this machine has"
            f" {memory.total_bytes / GIB:.1f} GiB of memory, {memory.usable_bytes / GIB:.1f} GiB of"
            " it usable for a model. Name a smaller or more quantized one, or try it all the same"
            " with --force."
        )
    # A sixteenth is for the activations of a prefill step and for MLX's buffer cache.
    reserve_bytes = memory.usable_bytes // 16
    return max(memory.usable_bytes - reserve_bytes - weight_bytes, reserve_bytes)


# Finding a model. This runs on the main thread, where Ctrl+C may end it at any point, and without
# the engine: only then does `--help` answer at once, and a wrong name, too.


def wrong_name_message(name: str) -> str:
    """Return the sentence for a name that is neither that of a folder nor that of a repository."""
    shown, path = shorten(name), Path(os.path.expanduser(name))
    if path.suffix.lower() in UNSUPPORTED_FORMATS:
        return (
            f"{shown} is a {UNSUPPORTED_FORMATS[path.suffix.lower()]} file, and MLX loads folders"
            f" of {WEIGHTS}: look for the model at mlx-community, such as llmchat {EXAMPLE_MODEL}."
        )
    if os.path.isfile(path) or FILE_NAME.search(name):
        return f"{shown} is a file: name the folder that holds the model, llmchat {path.parent}"
    if re.fullmatch(r"[\w./-]+:[\w.-]+", name):
        return (
            f"{shown} is a name of another program's models: here it is a Hugging Face repository,"
            f" such as {EXAMPLE_MODEL}."
        )
    folder = similar_model_folder(name)
    hint = f"; did you mean {folder}?" if folder else "."
    return (
        f"'{shown}' is neither a model folder nor a repository's name,"
        f" such as {EXAMPLE_MODEL}{hint}"
    )


@silence_libraries()
def find_model(settings: Settings, hosts: Hosts, report: Callable[[Progress], None]) -> ModelFiles:
    """Find the model that the settings name, in its folder, in the hub cache or on the hub.

    What is on the hub is not downloaded yet, but for the small files that tell if it is of use.
    `report` is told what goes on. Raises `ChatError` where the model can't be used.
    """
    name = str(settings.model)
    report(Progress("looking for it"))
    check_adapter(settings.adapter, hosts.size)
    folder = Path(os.path.expanduser(name))
    is_folder = bool(name) and os.path.isdir(folder)
    is_file = os.path.isfile(folder) or bool(FILE_NAME.search(name))
    is_repository = bool(REPOSITORY.fullmatch(name)) and not is_file
    # Somebody else may have put a folder with the repository's name here, and code in it.
    if is_repository and (settings.trust_remote_code or not is_folder):
        return find_in_hub(name, settings, report)
    if not is_folder:
        raise ChatError(wrong_name_message(name))
    if settings.trust_remote_code and not (folder.is_absolute() or name.startswith(".")):
        raise ChatError(f"With --trust-remote-code a folder is named like this: ./{name}")
    if settings.revision:
        raise ChatError(f"{name} is a folder, which has no revisions: leave out --revision.")
    with explain_errors(f"{name} can't be read", damaged_advice(folder, None), OSError):
        names = sorted(entry.name for entry in folder.iterdir())
    return read_model_files(ModelFiles(name, folder, None, names), settings)


def find_in_hub(name: str, settings: Settings, report: Callable[[Progress], None]) -> ModelFiles:
    """Find a repository in the hub cache, or else on the hub. Raises `ChatError`."""
    revision = settings.revision
    if revision and any(part in ("", ".", "..") for part in revision.split("/")):
        raise ChatError(f"'{shorten(revision)}' can't be the name of a revision.")
    repository = repository_folder(name)
    what = f"{name} in the hub cache is damaged"
    with explain_errors(what, damaged_advice(repository, repository), *UNREADABLE):
        folder = locate(name, revision)
        missing = missing_files(folder)
    if missing:
        with download_interruptible(name):
            return ask_hub(name, settings, report)
    found = ModelFiles(name, folder, repository, file_names(folder))
    return read_model_files(found, settings)


def ask_hub(name: str, settings: Settings, report: Callable[[Progress], None]) -> ModelFiles:
    """Find a repository on the hub, and download its telling files. Raises `ChatError`."""
    revision = settings.revision
    check_endpoint(hub_constants().ENDPOINT, settings.force)
    report(Progress(f"asking {hub_address()} for {name}; it is tried again until it answers"))
    sizes = list_repository(name, revision)
    check_file_names(name, sizes)
    # By the revision's name, so that the cache notes which commit that is.
    folder = fetch_file(name, revision, "config.json").parent
    for file in TELLING_FILES:
        if file in sizes:
            fetch_file(name, folder.name, file)
    found = ModelFiles(name, folder, repository_folder(name), list(sizes))
    read_model_files(found, settings)
    wanted = {file for pattern in NEEDED for file in fnmatch.filter(sizes, pattern)}
    found.missing = {file: sizes[file] for file in wanted if not os.path.exists(folder / file)}
    found.weight_bytes = sum(sizes[file] for file in fnmatch.filter(sizes, WEIGHTS))
    return found


@silence_libraries()
def fetch_model(found: ModelFiles, report: Callable[[Progress], None]) -> None:
    """Download what is missing of a model, and begin to read its weights.

    Raises `ChatError`, also for Ctrl+C.
    """
    if found.missing:
        with download_interruptible(found.name):
            download_files(found.name, found.folder, found.missing, report)
        found.missing = {}
        found.names = file_names(found.folder)
        check_plain_files(found)
    with explain_errors(f"{found.name} can't be read", found.damaged_advice(), OSError):
        found.weight_bytes = sum(file.stat().st_size for file in found.weights())
    # The libraries are imported meanwhile.
    preload = Preload(found.weights())
    report(Progress("loading", found.weight_bytes, preload.done_bytes))


def read_model_files(found: ModelFiles, settings: Settings) -> ModelFiles:
    """Add what the configuration of a model says to what was found of it.

    Raises `ChatError` where the model can't be used.
    """
    name, names = found.name, found.names
    check_file_names(name, names)
    check_plain_files(found)
    found.config = read_config(found, "config.json")
    found.tokenizer_config = read_config(found, "tokenizer_config.json")
    if not found.tokenizer_config.get("chat_template") and "chat_template.jinja" not in names:
        found.processor_template = read_config(found, "chat_template.json").get("chat_template")
    processor_config = read_config(found, "processor_config.json")
    configs = [found.config, found.tokenizer_config, processor_config]
    found.code_references = [text for config in configs for text in code_references(config)]
    check_purpose(name, names, found.config, settings.force)
    check_own_code(name, found.config, found.code_references, settings.trust_remote_code)
    check_tokenizer_files(name, found.tokenizer_config)
    return found


def read_config(found: ModelFiles, file: str) -> dict[str, Any]:
    """Return what a configuration file of a model holds; nothing if the file isn't here."""
    if not os.path.exists(found.folder / file):
        return {}
    what = f"{file} of {found.name} can't be read"
    with explain_errors(what, found.damaged_advice(), *UNREADABLE):
        return read_json(found.folder / file)


def check_plain_files(found: ModelFiles) -> None:
    """Raise `ChatError` if a file that a library may open is a pipe or a device.

    A library would wait for a pipe for ever, and read a device until the memory is full.
    """
    for name in [name for pattern in NEEDED for name in fnmatch.filter(found.names, pattern)]:
        file = found.folder / name
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            raise ChatError(
                f"{name} of {found.name} can't be read: it is no plain file."
                f" {found.damaged_advice()}"
            )


def adapter_folder(adapter: str | None) -> Path | None:
    """Return the folder of an adapter, or None if there is none."""
    return Path(os.path.expanduser(adapter)) if adapter else None


def check_adapter(adapter: str | None, host_count: int = 1) -> None:
    """Raise `ChatError` if an adapter can't be loaded, for instance because it lacks a file."""
    folder = adapter_folder(adapter)
    if folder is None:
        return
    if host_count > 1:
        raise ChatError(
            "mlx-lm can't share an adapter among hosts: leave out --adapter, or use one host."
        )
    for file in ("adapters.safetensors", "adapter_config.json"):
        if not os.path.exists(folder / file):
            raise ChatError(
                f"There is no adapter in {folder}: {file} is missing there. Name a folder that"
                " mlx_lm.lora has written."
            )
        if not os.path.isfile(folder / file):
            raise ChatError(f"{folder / file} can't be read: it is no plain file.")
    with explain_errors(f"{folder / 'adapter_config.json'} can't be read", "", *UNREADABLE):
        read_json(folder / "adapter_config.json")


# Loading a model. This may run on another thread than the main one: it waits for no key and for
# no network, and needs no `KeyboardInterrupt`.


def use_private_kernels() -> None:
    """Have MLX keep what it compiles in a folder that only this user can write to.

    On a CPU MLX runs the kernels that it finds in `mlx` in the temporary folder, whoever put them
    there. This is to be called before MLX is imported. Raises `ChatError`.
    """
    names = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
    set_names = [name for name in names if os.environ.get(name)]
    temporary = os.environ[set_names[0]] if set_names else "/tmp"
    if not os.path.isdir(temporary):
        raise ChatError("TMPDIR names no folder, and MLX needs one: make it, or unset TMPDIR.")
    kernels = os.path.join(glob.escape(temporary), "mlx", "**", "")
    if all(map(is_private, [temporary, *glob.glob(kernels, recursive=True)])):
        return
    candidates = [Path(os.path.expanduser("~/.cache/llmchat"))]
    # In a sticky folder, such as /tmp, nobody can replace the folder of somebody else.
    if Path(temporary).stat().st_mode & stat.S_ISVTX:
        candidates.insert(0, Path(temporary, f"llmchat-{os.getuid()}"))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if is_private(str(folder)):
                os.environ["TMPDIR"] = str(folder)
                return
    raise ChatError(
        f"Others can put code that MLX would run into {temporary}: set TMPDIR to a folder that only"
        " you can write to."
    )


def is_private(folder: str) -> bool:
    """Tell if a folder is this user's, or the system's, and nobody else can write to it."""
    status = os.lstat(folder)
    is_own = status.st_uid in (0, os.getuid())
    return stat.S_ISDIR(status.st_mode) and is_own and not status.st_mode & 0o022


def check_jinja() -> None:
    """Raise `ChatError` for a Jinja that lets a chat template out of its sandbox."""
    import importlib.metadata

    jinja2 = import_library("jinja2")
    version = getattr(jinja2, "__version__", "") or importlib.metadata.version("jinja2")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if numbers < (3, 1, 6):
        raise ChatError(
            f"jinja2 {version} lets a model's chat template run code (CVE-2025-27516): update it,"
            " for instance with pip install --upgrade jinja2."
        )


def machine_memory() -> Memory:
    """Return the memory of this machine."""
    import mlx.core as mx

    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not mx.metal.is_available():
        return Memory(total_bytes, total_bytes)
    # Older versions have the function in another module.
    device_info = getattr(mx, "device_info", None) or mx.metal.device_info
    recommended = int(device_info().get("max_recommended_working_set_size") or total_bytes)
    return Memory(total_bytes, recommended)


@silence_libraries()
def check_engine(found: ModelFiles, settings: Settings, hosts: Hosts) -> int:
    """Check that the engine can run a model, which may still have to be downloaded.

    Returns the bytes of memory that are left to a conversation. Raises `ChatError`.
    """
    check_jinja()
    module = None
    if found.config.get("model_file") is None:
        module = engine_module(found.name, found.config)
    # The one module of mlx-lm that brings a template along names it there.
    brings_template = "chat_template_type" in getattr(module, "TOKENIZER_DEFAULTS", {})
    has_template = has_chat_template(found.names, found.tokenizer_config, found.processor_template)
    if not (has_template or brings_template):
        raise ChatError(NO_TEMPLATE_MESSAGE.format(name=found.name))
    weight_bytes_per_host = found.weight_bytes // hosts.size
    return check_memory(found.name, weight_bytes_per_host, machine_memory(), settings.force)


def engine_module(name: str, config: dict[str, Any]) -> Any:
    """Return mlx-lm's module for a kind of model. Raises `ChatError` if there is none."""
    mlx_lm = import_library("mlx_lm")
    parameters = inspect.signature(mlx_lm.utils.load_model).parameters
    # This follows mlx-lm's tables of other names. A version without this parameter says what it
    # doesn't know a little later, when it loads.
    if "get_model_classes" not in parameters:
        return None
    # The import of an architecture may fail in any way, for instance on a MLX that is too old.
    try:
        network_class, _ = parameters["get_model_classes"].default(config)
    except Exception as error:
        images = "; it is a model for images" if "vision_config" in config else ""
        raise ChatError(
            f"{name} is of type {shorten(config['model_type'])}, which mlx-lm {mlx_lm.__version__}"
            f" doesn't know{images}: update mlx-lm (the newest may need a newer Python), or name"
            " another model."
        ) from error
    return sys.modules.get(network_class.__module__)


def check_weights(file: Path, what: str, advice: str) -> None:
    """Raise `ChatError` if a file of weights is damaged.

    MLX before 0.31.2 takes what its header says unchecked, and loads a cut file without a word.
    """
    from safetensors import SafetensorError, safe_open

    with explain_errors(what, advice, SafetensorError, OSError), safe_open(file, "np") as opened:
        opened.keys()


def check_sharing(found: ModelFiles, hosts: Hosts) -> None:
    """Raise `ChatError` if several hosts can't hold a model together."""
    if hosts.size == 1:
        return
    config = json.dumps(found.config)
    if hosts.broadcast(config) != config:
        raise ChatError(f"{found.name} is another model here than on the first host.")
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = found.config.get(key)
        # mlx-lm itself would round the number down.
        if isinstance(heads, int) and heads % hosts.size:
            raise ChatError(
                f"{found.name} can't be shared evenly among {hosts.size} hosts: its {key} are"
                f" {heads}."
            )


def load_engine(found: ModelFiles, settings: Settings, hosts: Hosts) -> tuple[Any, Any]:
    """Return the network, or this host's part of it, and the tokenizer."""
    mlx_lm = import_library("mlx_lm")
    load = mlx_lm.load
    if hosts.size > 1:
        load = getattr(mlx_lm.utils, "sharded_load", None)
    parameters = inspect.signature(load).parameters if load else {}
    if "tokenizer_config" not in parameters:
        # An older `sharded_load` runs the code of any repository.
        raise ChatError(
            f"mlx-lm {mlx_lm.__version__} can't share a model among hosts safely: update it."
        )
    trusts_code = settings.trust_remote_code
    tokenizer_config = {"trust_remote_code": trusts_code}
    if found.processor_template:
        tokenizer_config["chat_template"] = found.processor_template
    adapter = adapter_folder(settings.adapter)
    # Older versions know but one of the two ways to allow a repository's code, and only `load`
    # takes an adapter.
    options = {
        "tokenizer_config": tokenizer_config,
        "trust_remote_code": trusts_code,
        "adapter_path": str(adapter) if adapter else None,
    }
    known = {name: value for name, value in options.items() if name in parameters}
    try:
        network, tokenizer = load(str(found.folder), **known)
    except (KeyboardInterrupt, SystemExit):
        raise
    # A panic of a Rust library is no `Exception`.
    except BaseException as error:
        raise ChatError(load_error_message(found, settings, hosts, error)) from error
    return network, tokenizer


def load_error_message(
    found: ModelFiles, settings: Settings, hosts: Hosts, error: BaseException
) -> str:
    """Return the sentence for an error of mlx-lm while it loads a model."""
    text = error_text(error)
    if "trust_remote_code" in str(error):
        return REMOTE_CODE_MESSAGE.format(name=found.name)
    if hosts.size > 1:
        return f"The hosts could not load {found.name} together: {text}."
    if settings.adapter:
        return f"{found.name} can't be loaded with {settings.adapter}: {text}. Name another one."
    missing = known_missing_files(found.folder)
    if missing:
        text += f". {missing[0]} is missing"
    return f"{found.name} could not be loaded: {text}. {found.damaged_advice()}"


def fingerprint(found: ModelFiles, settings: Settings) -> str:
    """Return the version of mlx-lm, and the sizes and times of all files that shape the network."""
    patterns = (WEIGHTS, "*.json", "*.py")
    # Of a model in the hub cache the path names the commit.
    names = [name for pattern in patterns for name in fnmatch.filter(found.names, pattern)]
    files = [found.folder / name for name in names]
    if adapter := adapter_folder(settings.adapter):
        files += adapter.glob("adapter*")
    stats = [(str(file.absolute()), file.stat()) for file in sorted(files) if file.exists()]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
    return repr([import_library("mlx_lm").__version__, facts])


@silence_libraries()
def load_model(found: ModelFiles, settings: Settings, hosts: Hosts) -> Model:
    """Load a model whose files are here. Raises `ChatError` where it can't be used."""
    memory_bytes = check_engine(found, settings, hosts)
    for file in found.weights():
        what = f"{file.name} of {found.name} can't be loaded"
        check_weights(file, what, found.damaged_advice())
    if adapter := adapter_folder(settings.adapter):
        what = f"{found.name} can't be loaded with {adapter}"
        check_weights(adapter / "adapters.safetensors", what, "Name another adapter.")
    check_sharing(found, hosts)
    network, tokenizer = load_engine(found, settings, hosts)
    # mlx-lm has templates that are functions, for models whose authors give none.
    is_function = getattr(tokenizer, "has_chat_template", False)
    if tokenizer.chat_template is None and not is_function:
        raise ChatError(NO_TEMPLATE_MESSAGE.format(name=found.name))
    return Model(
        found.name,
        network,
        ChatTemplate(found.name, tokenizer),
        context_length(found.config),
        hosts,
        fingerprint(found, settings),
        None if settings.force else memory_bytes,
    )


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


def with_system(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """Return the messages after the system prompt, if there is one."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages]


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
            for message in with_system(self._settings.system, messages)
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


# What could drive a terminal or turn text round: C0 but newline and tab, DEL, C1, and the bidirectional
# embeddings, overrides and isolates (https://www.unicode.org/reports/tr9/). Without them no escape sequence
# is one, so a piece can be cleaned by itself, wherever a sequence was split.
CONTROL_CHARACTERS = dict.fromkeys(
    [
        *range(0x09),
        *range(0x0B, 0x20),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ]
)


def strip_control_characters(text: str) -> str:
    """Return the text without anything that could drive a terminal."""
    return text.translate(CONTROL_CHARACTERS)


def display_width(text: str) -> int:
    """Return the number of columns that a text takes on a terminal."""
    marks = sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


GREEN, RED, DIM, BOLD, CODE, PLAIN = (
    "\x1b[32m",
    "\x1b[31m",
    "\x1b[2m",
    "\x1b[1m",
    "\x1b[36m",
    "\x1b[0m",
)
ERASE_BELOW = "\x1b[J"


class WordWrap:
    """Breaks prose at words as it streams, in a window that has `columns()` at that moment.

    Code between fences, tables and words that are wider than the window are left alone: they are to be copied.
    Where it is `styled`, headings and `**bold**` are bold, and code has a colour of its own; the marks stay. Elsewhere
    all is in one `style`.
    """

    # Scripts without blanks may break before any wide character.
    WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff01-\uff60\U0001f300-\U0003ffff"
    WORD = re.compile(rf"[ \n]*(?:[{WIDE}][^ \n{WIDE}]*|[^ \n{WIDE}]+)|[ \n]+")
    FENCE, SPANS = re.compile(r"\s*(```[^`]*|~~~.*)"), re.compile(r"(\*\*|`+)")

    def __init__(self, columns: Callable[[], int], styled: bool = False, style: str = "") -> None:
        self._columns, self._styled, self._only = columns, styled, style
        # The line so far, the column after it, and the space and the word since.
        self._line, self._column, self.held = "", 0, ""
        # Where the text stands: between fences, in a heading, in bold; after the backquotes that begin code.
        self._fenced = self._heading = self._bold = False
        self._quotes = ""
        # The style in which the terminal is.
        self._style = ""

    def feed(self, text: str) -> str:
        """Return what is certain of all the text so far."""
        *words, self.held = self.WORD.findall(self.held + text) or [""]
        shown = "".join(map(self._put, words))
        if self._fenced and "\n" not in self.held:
            # Code need not wait for the end of a word.
            shown, self.held = shown + self._put(self.held), ""
        return shown

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._put(self.held) + PLAIN * bool(self._style)

    def _put(self, text: str) -> str:
        """Return a word and the space before it, as they are shown."""
        word, columns = text.lstrip(" \n"), self._columns()
        *ended, blanks = text[: len(text) - len(word)].split("\n")
        ends = "".join(self._end_line(rest, columns) for rest in ended)
        self._line += blanks + word
        begun = self._line.lstrip()
        code = self._fenced or begun.startswith(("```", "~~~"))
        if code or begun.startswith("|") or not word:
            return ends + self._in_style(CODE * code) + blanks + word
        self._heading |= bool(not self._column and re.fullmatch("#{1,6}", word))
        taken = display_width(word)
        if self._column and self._column + len(blanks) + taken > columns >= taken:
            blanks, self._column = "\n", taken
        else:
            # A row that is full to the last column is not left before the next character.
            self._column = (self._column + len(blanks) + taken - 1) % columns + 1
        return ends + blanks + self._marked(word)

    def _end_line(self, blanks: str, columns: int) -> str:
        self._fenced ^= bool(self.FENCE.fullmatch(self._line))
        blanks *= self._column + len(blanks) <= columns
        self._line, self._column = "", 0
        self._heading, self._bold, self._quotes = False, False, ""
        return blanks + self._in_style(CODE * self._fenced) + "\n"

    def _marked(self, word: str) -> str:
        """Return a word with its style, in which a mark is like what it marks."""
        marked, parts = "", self.SPANS.split(word)
        for before, part in zip(["", *parts], parts):
            bold, quotes = self._bold, self._quotes
            if part.startswith("`") and quotes in ("", part):
                self._quotes = "" if quotes else part
            # Within a word it is a power, if it ends nothing.
            elif part == "**" and not quotes and (bold or not before[-1:].isalnum()):
                self._bold = not bold
            style = BOLD * (bold or self._bold or self._heading) + CODE * bool(
                quotes or self._quotes
            )
            marked += self._in_style(style) + part
        return marked

    def _in_style(self, style: str) -> str:
        """Return the codes that bring the terminal into a style."""
        before, self._style = self._style, style if self._styled else self._only
        return "" if self._style == before else PLAIN * bool(before) + self._style


# Before a line tells what is going on, and between two looks at it.
STATUS_DELAY_S, STATUS_INTERVAL_S = 0.3, 0.1


class Screen:
    """Shows pieces: the session goes to standard output, all else to standard error.

    Thoughts are shown where somebody watches. Elsewhere they are left out.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO, interactive: bool) -> None:
        self._stdout, self._stderr = stdout, stderr
        # Somebody watches, and is to see thoughts too.
        self.interactive = interactive
        self.dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.styled = not (self.dumb or os.environ.get("NO_COLOR"))
        self.hide_thoughts = self.plain = False
        self._wrap = WordWrap(self._columns)
        # The kind of the last piece of a reply, and when a hidden thought began.
        self._kind, self._since_s = "", 0.0
        # A line tells what is going on, on a terminal, as long as it lasts.
        self._status = ""
        self._over, self._ticker = threading.Event(), threading.Thread()

    def write(self, text: str) -> None:
        """Put text into the session."""
        print(text, end="", file=self._stdout, flush=True)

    def write_stderr(self, text: str) -> None:
        """Put text beside the session, on standard error."""
        print(text, end="", file=self._stderr, flush=True)

    def notice(self, text: str, colour: str = DIM) -> None:
        """Tell the user something that is not part of the session, dim on a terminal; what went wrong is `RED`."""
        self.clear_status()
        text = strip_control_characters(text)
        if self._stderr.isatty():
            wrap = WordWrap(self._columns, style=colour * self.styled)
            text = wrap.feed(text) + wrap.flush()
        self.write_stderr(text + "\n")

    def show_status(self, doing: Callable[[], str]) -> None:
        """Have a line tell what is going on, until anything else is shown; `doing` is asked again and again."""
        self.clear_status()
        over = self._over = threading.Event()

        def tick() -> None:
            over.wait(STATUS_DELAY_S - STATUS_INTERVAL_S)
            while not over.wait(STATUS_INTERVAL_S):
                self._show_status(doing())

        if self._stderr.isatty():
            self._ticker = threading.Thread(target=tick, daemon=True)
            self._ticker.start()

    def clear_status(self) -> None:
        """Take the line away that tells what is going on."""
        self._over.set()
        # A signal may have come before it was started.
        if self._ticker.is_alive():
            self._ticker.join()
        if self._status:
            self._show_status("")

    def show(self, piece: Piece) -> None:
        """Show a piece of a reply. Newlines around thought and answer are replaced by a blank line between."""
        if piece.kind == "notice":
            self.end_reply()
            self.notice(piece.text)
        elif piece.kind == "thought" and (self.hide_thoughts or not self.interactive):
            self._hide(piece.text)
        elif piece.kind != "prefill":
            self.clear_status()
            self._show_text(piece.kind, strip_control_characters(piece.text))

    def end_reply(self) -> None:
        """Finish the line of a reply, if there was one."""
        self.clear_status()
        self._end_section("\n")
        self._since_s = 0.0

    def _columns(self) -> int:
        stream = self._stdout if self._stdout.isatty() else self._stderr
        return os.get_terminal_size(stream.fileno()).columns or 80

    def _show_status(self, text: str) -> None:
        # It is kept narrow, as only one row can be taken back.
        text = strip_control_characters(text)[: self._columns() - 1]
        if text != self._status:
            row = text.ljust(len(self._status))
            self.write_stderr(
                "\r" + (f"{DIM}{row}{PLAIN}" if self.styled else row) + "\r" * (not text)
            )
            self._status = text

    def _hide(self, text: str) -> None:
        """Show that the model thinks, and in the end how long it did."""
        if text.strip() and not self._since_s:
            self._since_s = time.monotonic()
            self.show_status(lambda: f"thinking: {time.monotonic() - self._since_s:.0f} s")
            if self.interactive:
                self._begin_section("hidden")

    def _show_text(self, kind: str, text: str) -> None:
        if kind != self._kind:
            text = text.lstrip("\n")
            if not text:
                return
            self._begin_section(kind)
        self.write(self._wrap.feed(text))

    def _begin_section(self, kind: str) -> None:
        labelled = self.interactive and not self.styled and "thought" in (kind, self._kind)
        self._end_section("\n\n")
        self._kind, terminal = kind, self._stdout.isatty()
        styled = terminal and self.styled and kind == "answer" and not self.plain
        dim = DIM * (self.styled and kind != "answer")
        self._wrap = WordWrap(self._columns if terminal else lambda: sys.maxsize, styled, dim)
        self.write({"thought": "thinking:\n", "answer": "answer:\n"}.get(kind, "") * labelled)

    def _end_section(self, after: str) -> None:
        if self._kind == "hidden":
            self.write(self._wrap.feed(f"thought for {time.monotonic() - self._since_s:.1f} s"))
        if self._kind:
            self._wrap.held = self._wrap.held.rstrip("\n")
            self.write(self._wrap.flush() + after)
        self._kind = ""


# ----------------------------------------------------------------------------------- Line editor

# The bytes of one key, or of a paste that the terminal doesn't mark, follow each other faster than this.
BURST_S = 0.03

# An Esc that comes so soon after a reply was meant to stop it.
LATE_ESCAPE_S = 1.0

# Have the terminal put marks around pastes, or no longer; these marks; and a key of no keyboard, to redraw the line.
PASTE_MODE_ON, PASTE_MODE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
PASTE_START, PASTE_END, REDRAW_KEY = b"\x1b[200~", b"\x1b[201~", b"\x1b[99~"

# Libedit writes past its buffer in a line of about 4,500 characters: a longer run than this is pasted, not typed.
MAX_TYPED_RUN = 500

# Such a run of text, without control keys; lines that come in one burst; and the next of the keys that wait: a marked
# paste, or what is before one or ends a line, which Alt+Enter doesn't.
LONG_TEXT = rb"(?:\x1b[\r\n]|[^\x00-\x08\x0a-\x1a\x7f]){%d,}" % (MAX_TYPED_RUN + 1)
LINES = rb"(?s:.*[\r\n].*[^\r\n])"
NEXT_KEYS = re.compile(
    rb"\x1b\[200~((?s:.*?))(?:\x1b\[201~|\Z)|(?:\x1b[\r\n]|(?!\x1b\[200~)[^\r\n])*[\r\n]?"
)

# Between two looks at an editor, which says to nobody when it begins to read and when it has ended a line.
POLL_S = 0.001


class TerminalProxy:
    """Stands between the terminal and the line editor, so that every key passes one place.

    The editor reads from a pseudo-terminal, which it is given in place of standard input. Until it reads, keys wait
    here: nothing typed ahead is lost or shown, and Esc can stop a reply. From `open` to `close` the terminal
    itself shows nothing, cuts no long line (macOS does at 1024 bytes, Linux at 4096) and drops nothing at Ctrl+C.
    """

    def __init__(self, stdin: TextIO, dumb: bool, as_keys: Callable[[str], bytes]) -> None:
        """`as_keys` returns the keys that put a pasted text into the line; a `dumb` terminal marks no pastes."""
        self._input, self._dumb, self._as_keys = stdin, dumb, as_keys
        self.on_escape: Callable[[], None] = lambda: None
        # The modes in which the terminal was found, as `tcgetattr` gives them, as long as it is taken over.
        self._found: list[Any] = []
        # Keys that the editor was not given yet, as they came; what it is being given; and an Esc without its key.
        self._waiting, self._sending, self._escape = b"", b"", b""
        # The editor reads; what it was given last since it does, and since when.
        self._feeding, self.given, self._since_s = False, b"", 0.0
        self._lock = threading.Lock()

    def open(self) -> None:
        """Take the terminal over; `close` gives it back, also if a signal breaks this off."""
        self._stdin = self._input.fileno()
        self._terminal = os.dup(self._stdin)
        self._editor, self._show_ending = os.openpty()
        os.set_blocking(self._editor, False)
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        # In the background of a shell this waits until the terminal is the program's.
        with contextlib.suppress(termios.error):
            termios.tcdrain(self._terminal)
        self._found = termios.tcgetattr(self._terminal)
        termios.tcsetattr(self._show_ending, termios.TCSANOW, self._found)
        os.dup2(self._show_ending, self._stdin)
        self.set_modes()
        self._thread.start()

    def close(self) -> None:
        """Leave the terminal as it was found, whatever was under way; keys that wait stay."""
        found, self._found = self._found, []
        if not found:
            return
        os.close(self._wake)
        if self._thread.is_alive():
            self._thread.join()
        os.dup2(self._terminal, self._stdin)
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(self._terminal, termios.TCSANOW, found)
            os.write(self._terminal, PASTE_MODE_OFF * (not self._dumb))
        for descriptor in (self._terminal, self._editor, self._show_ending, self._woken):
            os.close(descriptor)

    def set_modes(self, signum: int = 0, frame: object = None) -> None:
        """Set the terminal's modes; as a handler of signals also after Ctrl+Z, and when the window changes its size."""
        modes = [*self._found]
        if not modes:
            return
        with contextlib.suppress(termios.error, OSError):
            modes[0] &= ~(termios.ICRNL | termios.IXON)
            modes[3] = modes[3] & ~(termios.ECHO | termios.ICANON | termios.IEXTEN) | termios.NOFLSH
            termios.tcsetattr(self._terminal, termios.TCSANOW, modes)
            os.write(self._terminal, PASTE_MODE_ON * (not self._dumb))
            size = fcntl.ioctl(self._terminal, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self._editor, termios.TIOCSWINSZ, size)
            if signum == signal.SIGCONT and self._feeding:
                os.write(self._editor, REDRAW_KEY)

    @contextlib.contextmanager
    def reading(self, keys: bytes) -> Iterator[None]:
        """Hand keys on to the line editor while it reads: these, those that wait, and what is typed."""
        try:
            with self._lock:
                self._sending, self._feeding, self.given, self._since_s = (
                    keys,
                    True,
                    b"",
                    time.monotonic(),
                )
            os.write(self._wake, b"\0")
            yield
        except KeyboardInterrupt:
            # The rest of a paste goes with the line; what was typed after it stays.
            termios.tcflush(self._stdin, termios.TCIFLUSH)
            raise
        finally:
            self._feeding = False

    def has_typed_ahead(self) -> bool:
        """Tell if keys wait for the editor."""
        return bool(self._sending or self._waiting or select.select([self._terminal], [], [], 0)[0])

    def _run(self) -> None:
        """Take keys from the terminal and hand them on, until `close`."""
        while True:
            due = self._feeding and (self._sending or self._waiting)
            readable, _, _ = select.select(
                [self._woken, self._terminal], [], [], POLL_S if due else None
            )
            if self._woken in readable and not os.read(self._woken, 64):
                return
            if self._terminal in readable:
                self._take()
            if self._listens() and (self._sending or self._waiting):
                self._hand_on()

    def _listens(self) -> bool:
        """Tell if the editor reads: until it has set up its terminal, that would take some keys as its own."""
        return self._feeding and not termios.tcgetattr(self._stdin)[3] & termios.ICANON

    def _take(self) -> None:
        """Take what was typed. Lines that come in one burst are a paste; typed ahead they are prompts of their own."""
        ahead = not self._feeding or self._sending or self._waiting
        unmarked = LONG_TEXT if ahead else LINES + b"|" + LONG_TEXT
        # If the terminal is gone, the line is dropped, and ended.
        keys, self._escape = self._escape + (self._read() or b"\x15\x04"), b""
        while self._has_more(keys) and (more := self._read()):
            keys += more
        # An Esc by itself stops a reply. In a line it belongs to the next key, but to no paste.
        data = re.sub(rb"\x1b(?=\x1b\[200~)|\x1b\Z", b"", keys)
        if data != keys and not self._feeding:
            self.on_escape()
        elif keys.endswith(b"\x1b") and time.monotonic() - self._since_s > LATE_ESCAPE_S:
            self._escape = b"\x1b"
        if PASTE_START not in data:
            data = re.sub(unmarked, PASTE_START + rb"\g<0>" + PASTE_END, data)
        # Ctrl+D in a reply is not meant to leave when it ends.
        self._waiting += data if self._feeding else data.replace(b"\x04", b"")

    def _read(self) -> bytes:
        """Return what was typed; nothing if the terminal is gone."""
        with contextlib.suppress(OSError):
            if data := os.read(self._terminal, 1 << 16):
                return data
        # It stays gone: the thread that asks again and again is not to take the processor.
        time.sleep(BURST_S)
        return b""

    def _has_more(self, data: bytes) -> bool:
        """Tell if more belongs to these keys: the rest of a paste, of a burst, or of a key that begins with Esc."""
        in_paste = data.rfind(PASTE_START) > data.rfind(PASTE_END)
        in_burst = len(data) > MAX_TYPED_RUN or re.search(rb"[\r\n].|\x1b$", data, re.DOTALL)
        wait_s = 1.0 if in_paste else BURST_S if in_burst else 0.0
        return bool(wait_s and select.select([self._terminal], [], [], wait_s)[0])

    def _hand_on(self) -> None:
        """Give the editor a share of the next keys, and time to end its line: further keys are for the next one."""
        with self._lock, contextlib.suppress(BlockingIOError):
            self._sending = self._sending or self._next_keys()
            self.given = self._sending[:1024]
            self._sending = self._sending[os.write(self._editor, self.given) :]
        if self._sending or not self.given.endswith((b"\r", b"\n")):
            return
        for _ in range(round(BURST_S / POLL_S)):
            if not self._listens():
                return
            time.sleep(POLL_S)
        # Libedit looks at an Enter that ends a search only when another key comes.
        with contextlib.suppress(BlockingIOError):
            os.write(self._editor, REDRAW_KEY)

    def _next_keys(self) -> bytes:
        """Take a paste, or the keys up to the end of a line, from those that wait."""
        found = next(NEXT_KEYS.finditer(self._waiting))
        self._waiting = self._waiting[found.end() :]
        if found[1] is None:
            return found[0]
        return self._as_keys(re.sub("\r\n?", "\n", found[1].decode(errors="replace")))


def use_utf8() -> None:
    """Have the line editor take any character, also where the locale is `C` or one that is not installed."""
    for name in ("C.UTF-8", "UTF-8"):
        if locale.nl_langinfo(locale.CODESET) in ("ANSI_X3.4-1968", "US-ASCII"):
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                # Python's readline goes back to the environment's locale for each line.
                os.environ["LC_ALL"] = name


class LineEditor:
    """Reads prompts; on a terminal with editing, history and completion from `open` to `close`.

    Elsewhere it writes a line that it has read after its prompt, so that a transcript reads the same either way.
    """

    def __init__(self, stdin: TextIO, screen: Screen, history: PromptHistory | None = None) -> None:
        self._stdin, self._screen, self._history = stdin, screen, history
        self.interactive = stdin.isatty() and screen.interactive
        self._keyboard = TerminalProxy(stdin, screen.dumb, self._as_keys)
        self._readline: Any = None
        self._libedit = False
        # The marks that stand for texts in libedit's lines.
        self._marks: dict[str, str] = {}
        # What there is so far of the prompt that is being read.
        self._block = ""

    def open(self, complete: Callable[[str], Iterable[str]], on_escape: Callable[[], None]) -> None:
        """Switch the line editor on.

        `complete` returns the lines that a line's beginning may become; `on_escape` is called by another thread when
        Esc is pressed while no prompt is read.
        """
        self._keyboard.on_escape = on_escape
        # The editor looks at the locale when it is imported.
        use_utf8()
        # Once, before the import: the editor's own handler of SIGWINCH calls the one that it finds.
        for number in (signal.SIGWINCH, signal.SIGCONT):
            signal.signal(number, self._keyboard.set_modes)
        self._keyboard.open()
        with foreign(
            "A chat on a terminal needs Python's readline: {}. Take another Python, or ask with -p."
        ):
            import readline
        self._readline, self._libedit = readline, "libedit" in (readline.__doc__ or "")
        readline.set_auto_history(False)
        with self._warned_of_history():
            for prompt in self._history.load() if self._history else []:
                readline.add_history(self._held(prompt))
        self._bind_keys(complete)

    def close(self) -> None:
        """Leave the terminal as it was found, whatever was under way."""
        self._keyboard.close()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Let another program have the terminal, as it was found. Raises `ChatError` where there is none."""
        if not self.interactive:
            raise ChatError("There is no terminal to edit on.")
        self._keyboard.close()
        try:
            yield
        finally:
            self._keyboard.open()

    def _bind_keys(self, complete: Callable[[str], Iterable[str]]) -> None:
        readline = self._readline

        def offer(text: str, state: int) -> str | None:
            line = readline.get_line_buffer()
            # Where the cursor is, no index tells: libedit counts other things than characters.
            wholes = complete(line) if line.endswith(text) else []
            offers = [whole[len(line) - len(text) :] for whole in wholes]
            return offers[state] if state < len(offers) else None

        readline.set_completer(offer)
        readline.set_completer_delims(" \n")
        bindings = [
            r'"\e[99~": redraw-current-line',
            "tab: complete",
            r'"\e[200~": bracketed-paste-begin',
        ]
        # Alt+Enter begins a new line; a text that is put into the line is not shown as selected.
        bindings += [r'"\e\C-m": "\C-v\C-j"', "set enable-active-region off"]
        # In a search, readline 8.2 crashes at a key that begins with Ctrl+X: the search ends there.
        bindings += [r'set isearch-terminators "\C-[\C-j\C-x"']
        # It decides by the environment's locale how many bits a character has.
        bindings += ["set convert-meta off", "set input-meta on", "set output-meta on"]
        for binding in (
            ("bind ^[[99~ ed-redisplay", "bind ^I rl_complete") if self._libedit else bindings
        ):
            readline.parse_and_bind(binding)

    def _held(self, text: str) -> str:
        """Return a text as the editor can hold it: in libedit a mark stands for a long one until its line is read."""
        encoding = locale.nl_langinfo(locale.CODESET)
        # Python can't hand the editor characters that the locale doesn't have.
        text = strip_control_characters(text).encode(encoding, "replace").decode(encoding)
        if not self._libedit or ("\n" not in text and len(text) <= MAX_TYPED_RUN):
            return text
        return self._marks.setdefault(
            text, f"[{len(self._marks) + 1}: {shorten(text, 30)} {len(text)} characters]"
        )

    def _as_keys(self, text: str) -> bytes:
        """Return the keys that put a text into the line."""
        keys = self._held(text).encode(errors="replace")
        return keys if self._libedit else PASTE_START + keys + PASTE_END

    def read_line(self, prompt: str, text: str = "") -> str:
        """Read one line; `text` stands in it for editing. Raises `EOFError`, and `KeyboardInterrupt` on Ctrl+C."""
        if self.interactive:
            return self._edit_line(prompt, text)
        # What a terminal shows of a line that is typed does not reach a pipe: it is shown once more, in its place.
        typed = self._stdin.isatty() and not self._screen.interactive
        # Through the pipe the last reply comes a little later.
        time.sleep(BURST_S * typed)
        (self._screen.write_stderr if typed else self._screen.write)(prompt)
        line = self._stdin.readline()
        if typed:
            columns = os.get_terminal_size(self._stdin.fileno()).columns or 80
            rows = 1 + (display_width(prompt + line.rstrip("\n")) - 1) // columns
            self._screen.write_stderr(
                f"\r\x1b[{rows}A{ERASE_BELOW}" * (bool(line) and not self._screen.dumb)
            )
        # Where a launcher stands between, the terminal has shown the line already.
        self._screen.write(
            ""
            if self._screen.interactive
            else prompt * typed + strip_control_characters(line.rstrip("\n")) + "\n"
        )
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def _edit_line(self, prompt: str, text: str) -> str:
        if self._screen.styled:
            # The marks take the colour out of the editor's count of columns. Libedit loses one that nothing follows.
            prompt = f"\x01{GREEN}\x02{prompt.rstrip()}\x01{PLAIN}\x02 "
        try:
            with self._keyboard.reading(self._as_keys(text) if text else b""):
                line = input(prompt)
        except BaseException as error:
            # The cursor may stand in the first of several rows.
            self._screen.write(
                "\n" + ERASE_BELOW * (not self._screen.dumb and not isinstance(error, EOFError))
            )
            # Python's `input` looks at further signals while it raises what the first one did, and then raises this.
            if isinstance(error, SystemError) and error.__cause__:
                raise error.__cause__ from None
            raise
        for meant, mark in self._marks.items():
            line = line.replace(mark, meant)
        return line

    def read_prompt(self, text: str = "") -> str:
        """Read a prompt: a line, a paste, or what is typed between three quotes. Raises like `read_line`."""
        # What was typed ahead is a prompt of its own.
        if text and self.interactive and (self._is_tall(text) or self._keyboard.has_typed_ahead()):
            self._readline.add_history(self._held(text))
            self._screen.notice("Press Up to edit the prompt.")
            text = ""
        self._screen.write("\n")
        self._block = ""
        self._block = self.read_line("prompt -> ", text)
        block = self._block.strip("\n")
        block = block if "\n" in block else block.strip()
        # A paste that only starts with three quotes is no beginning: program text often does.
        if not block.startswith('"""') or ("\n" in block and self._is_open()):
            return block
        try:
            while self._is_open():
                self._block += "\n" + self.read_line("... ")
        except EOFError:
            # Ctrl+D drops the block; the end of a pipe ends it.
            if self.interactive:
                return ""
        return self._block.strip()[3:].removesuffix('"""').strip("\n")

    def _is_tall(self, text: str) -> bool:
        """Tell if a text would push out of the window what was said before it."""
        columns, rows = os.get_terminal_size(self._stdin.fileno())
        return (
            sum(1 + display_width(line) // (columns or 80) for line in text.splitlines())
            > (rows or 24) - 4
        )

    def _is_open(self) -> bool:
        return not self._block.strip()[3:].endswith('"""')

    def line_has_text(self) -> bool:
        """Tell if there was something in the prompt when Ctrl+C came."""
        given = self._keyboard.given
        # It may be a whole line that nobody has got yet. Libedit empties its buffer only when it is given a key.
        typed = given.endswith((b"\r", b"\n")) or (given and self._readline.get_line_buffer())
        return bool(self._block or typed or self._keyboard.has_typed_ahead())

    def add_to_history(self, prompt: str) -> None:
        """Add a prompt that somebody typed to the history, in the line editor and on disk."""
        new = self._screen.interactive
        with self._warned_of_history():
            new = new and (self._history is None or self._history.add(prompt))
        if new and self._readline:
            self._readline.add_history(self._held(prompt))

    @contextlib.contextmanager
    def _warned_of_history(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._screen.notice(f"Prompts are not kept for another day: {error_text(error)}")
            self._history = None


# --------------------------------------------------------------------------------------- Program


LEAVE_WORDS = ("quit", "bye", "exit")
# The last lines of a prompt that are shown of a conversation that goes on.
SHOWN_LINES = 10
KEYS_HELP = (
    (", ".join(LEAVE_WORDS), "leave, as Ctrl+D does"),
    ("Ctrl+C, Esc", "stop the reply; Ctrl+C drops the line"),
    ("Up, Ctrl+R, Tab", "earlier prompts; find one; complete commands and file names"),
    ('Alt+Enter, """', "a new line (not with libedit); begin and end a prompt of several lines"),
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
            if OPTIONS[name].scope is Scope.CHAT and not no
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
    screen.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
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
        prompt, leaving = "", False
        while prompt.lower().removeprefix("/") not in LEAVE_WORDS:
            if prompt:
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
                prompt = ""
        self.screen.write("Goodbye!\n")

    def _read(self) -> str:
        draft, self.draft = self.draft, ""
        self.signals.exit_if_signalled()
        with self.signals.tearable():
            self.signals.pressed = False
            # A prompt that starts with a slash is typed with two.
            return self.editor.read_prompt("/" * draft.startswith("/") + draft)

    def _handle_prompt(self, prompt: str) -> None:
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
            self.screen.end_reply()
            self.screen.notice("Stopped.")
        self._keep()

    def _show_error(self, error: ChatError) -> None:
        self.screen.end_reply()
        self.screen.notice(str(error), RED)
        self.failed = True

    def _dispatch(self, prompt: str) -> None:
        word, rest = [*prompt.split(None, 1), ""][:2]
        word = "/help" if word == "/?" else word.lower()
        # A pasted block is never a command; a system prompt may have several lines.
        if not re.fullmatch(r"/[a-z]+", word) or ("\n" in prompt and word != "/system"):
            self.send(prompt[1:] if prompt.startswith("//") else prompt)
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
                    with_system(self.settings.system, turns)
                    if turns or self.settings.session
                    else []
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
        self.screen.show_status(lambda: "keeping the state")
        try:
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
        self.screen.hide_thoughts, self.screen.plain = (
            self.settings.hide_thoughts,
            self.settings.plain,
        )
        doing, signals = "reading the prompt", self.signals
        wait = functools.partial(
            self.screen.show_status,
            lambda: "stopping..." if signals.pressed or signals.seen else doing,
        )
        signals.seen = False
        wait()
        # To close a reply is to stop it.
        with signals.tearable(), contextlib.closing(pieces):
            for piece in pieces:
                signals.tearing, signals.replying = False, True
                if piece.kind == "prefill" and piece.text:
                    doing = f"reading the prompt: {piece.text}"
                self.screen.show(piece)
                if piece.kind == "notice":
                    wait()
                if signals.pressed:
                    break
        self.screen.end_reply()
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
            self._set_aside()
            self.settings.set_value("system", None if rest == "-" else rest, "here")
            self.screen.notice(f"system = {self.settings.system or ''}")
        else:
            self.screen.write(
                f"{strip_control_characters(self.settings.system or 'There is no system prompt.')}\n"
            )

    @command("[KEY VALUE]")
    def _set(self, rest: str) -> None:
        """List the settings, show one, or change it; the value default puts it back."""
        key, value = [*re.split(r"[\s=]+", rest, maxsplit=1), ""][:2]
        found = find_key(key)
        name = found.name if found else ""
        if not value and (name or not key):
            rows = []
            for each in (
                [name] if name else [each for each in OPTIONS if OPTIONS[each].scope is Scope.CHAT]
            ):
                value = strip_control_characters(format_value(getattr(self.settings, each)))
                rows.append(
                    (each.replace("_", "-"), value, self.settings.sources.get(each, "default"))
                )
            self._write_table(rows)
            return
        if name == "system":
            self._set_aside()
        try:
            if name and value == "default" and OPTIONS[name].scope is Scope.CHAT:
                self.settings.reset(name)
            else:
                name = self.settings.set_from_text(key, value.strip(), "here")
        except argparse.ArgumentTypeError as error:
            raise ChatError(f"{shorten(key, 40)} {error}") from error
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
        self.screen.show_status(lambda: "reading files")
        # A pattern may lead through all of a disk.
        with self.signals.tearable(), foreign(f"/file {shorten(rest)}: {{}}"):
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
                path, written(with_system(self.settings.system, self.conversation.messages))
            ).close()
        self.screen.notice(f"{len(self.conversation.messages)} messages are in {path}.")

    def _write_table(self, rows: Sequence[Sequence[str]]) -> None:
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            self.screen.write("  ".join(map(str.ljust, row, widths)).rstrip() + "\n")


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
    use_private_kernels()

    def report(progress: Progress) -> None:
        screen.show_status(progress.text)

    found = find_model(settings, hosts, report)
    if settings.trust_remote_code and (owners := code_owners(found)):
        screen.notice(owners)
        screen.show_status(lambda: "loading")
    # MLX aborts the process, and leaves the terminal as it is, if a signal raises while it is imported.
    signals.held = True
    import_library("mlx.core")
    signals.held = False
    signals.exit_if_signalled()
    if found.missing:
        check_engine(found, settings, hosts)
    fetch_model(found, report)
    model = load_model(found, settings, hosts)
    signals.exit_if_signalled()
    screen.clear_status()
    if settings.prompt is None:
        screen.write("Model loaded successfully!\n")
    if settings.recommended and (sentence := apply_recommended(settings, found.folder)):
        screen.notice(sentence)
    return model


def run(
    settings: Settings, screen: Screen, editor: LineEditor, hosts: Hosts, signals: Signals
) -> int:
    """Load the model, then chat or answer one prompt; return the exit status. Raises `ChatError`."""
    prompt = (
        None
        if settings.prompt is None
        else one_shot_prompt(settings.prompt, sys.stdin, hosts.size > 1)
    )
    talks = editor.interactive and prompt is None
    if prompt is None and (notice := folder_config_notice(settings)):
        screen.notice(notice)
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
    keeps = (settings.keep is not False or settings.resume) and prompt is None and hosts.rank == 0
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
    if note := conversation.thinking_note():
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
def open_terminal(hosts: Hosts) -> Iterator[tuple[Screen, LineEditor]]:
    """Give this process its screen and its line editor, and leave the terminal as it was found.

    On other hosts than rank 0 nothing is seen.
    """
    out, err = (sys.stdout, sys.stderr) if hosts.rank == 0 else (open(os.devnull, "w"),) * 2
    # mlx.launch sets COLUMNS for the processes that it starts if its own output is a terminal.
    interactive = (sys.stdin.isatty() and out.isatty()) or (
        hosts.size > 1 and "COLUMNS" in os.environ
    )
    screen = Screen(out, err, interactive)
    history = (
        PromptHistory(Path(os.path.expanduser("~/.llmchat_history"))) if hosts.rank == 0 else None
    )
    editor = LineEditor(sys.stdin, screen, history)
    try:
        yield screen, editor
    finally:
        with contextlib.closing(editor), contextlib.suppress(OSError):
            screen.end_reply()


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
            with open_terminal(hosts) as (screen, editor):
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
