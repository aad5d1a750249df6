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
"""Chat with a local language model in the terminal, on a Mac with Apple silicon.

`llmchat MODEL` loads a Hugging Face model with MLX and answers at `prompt ->` until `quit`, `bye`
or `exit`. How one turn goes, from key to screen:

 1. `TerminalProxy` reads what is typed, `KeyQueue` sorts it, and the line editor shows it.
 2. Meanwhile the engine's thread computes what is known of the next prompt
    (`Inference.read_ahead`).
 3. Enter ends the line: `LineEditor.read_prompt` returns it, and `Chat` runs a command or sends it.
 4. `Conversation.reply` has the engine prepare the prompt: `ChatTemplate` renders the messages,
    and the oldest turns are left out if they no longer fit (`Inference.prepare`).
 5. `PromptCache` goes back to the longest prefix whose state it holds, and computes the rest.
 6. `Inference.generate` yields tokens, which an `EngineIterator` hands to the main thread.
 7. `ThoughtSplitter` tells thought from answer.
 8. `Chat.show_reply` shows each piece on the `Screen`, which wraps and colours it.
 9. Ctrl+C or Esc leaves a note in `Signals`; `show_reply` sees it, and closes the reply.
10. `Conversation` stores the reply, and `Autosave` writes the session file.

The sections, in reading order; each builds on those before it:

    Errors         one exception, a finished sentence for the user
    Texts          removing control characters from what is shown; reading plain files whole
    Settings       all parameters, each declared once: flag, config key, `/set` key, range, help
    Hub            from a name to a folder: cache, download, progress, what the hub's errors mean
    Engine         the one thread that works with MLX
    Hosts          what several Macs have in common, if mlx.launch started them
    Model          checking a model before its weights come, its chat template, loading it
    Prompt cache   the tokens whose state the engine holds, and the cheapest way to a new prompt
    State file     that state on disk; how much memory it takes
    Thoughts       what a template does with a thought; telling thought from answer in a stream
    Conversation   the turns, the prompt that fits, a reply as a generator of pieces
    Saving         conversations and prompts on disk, always whole
    Screen         pieces, notices, errors, the one status line
    Line editor    reading a prompt: keys, pastes, blocks, history
    Signals        what Ctrl+C does now; the signals that end the program
    Commands       one function a command, its docstring the help
    Program        the loop, the start, `main`

Exit statuses: 0 done, 1 an error said in one sentence, 2 wrong usage or configuration; 130, 131,
143 and 129 ended by SIGINT, SIGQUIT, SIGTERM or SIGHUP; 141 standard output closed.

What it refuses to be: a server, a manager of models, a converter, an agent. It has no plug-ins,
runs no code from a model repository unless told to, and asks the network for nothing that is on the
disk.
"""

from __future__ import annotations

import sys

# For a script Python looks beside its file first: a `signal.py` that somebody put into Downloads
# would run. A Python that is isolated or in safe mode has no such entry.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import os
import signal

# As a program, end quietly on Ctrl+C while the rest is imported; `main` takes the signals over.
# `anechat` is a second name of the command.
is_program = __name__ == "__main__" or os.path.basename(sys.argv[0]) in ("llmchat", "anechat")
if is_program and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import codecs
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
import gc
import glob
import importlib
import inspect
import io
import itertools
import json
import locale
import logging
import math
import pwd
import queue
import re
import select
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import termios
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_jobs
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Dict, Generic, List, NamedTuple, NoReturn, TextIO, Tuple, TypeVar
from urllib.parse import quote, unquote_to_bytes, urlsplit

__version__ = "0.1.0"

EXAMPLE_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"

# A message of a conversation: its role, its content, its thought as `reasoning_content`, and as
# `finish_reason` how a reply ended, if that was not by itself.
Message = Dict[str, str]


# ---------------------------------------------------------------------------------------- Errors


class ChatError(Exception):
    """A finished sentence for the user: what happened, to what, and what would work instead."""

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        # The exit status of the program if this ends it: 1, or 2 for wrong usage or configuration.
        self.status = status


class EngineError(ChatError):
    """The engine failed. With several hosts this ends the chat: their caches may differ now."""


class StreamError(Exception):
    """A standard stream can't be read or written any more; the cause is an `OSError`."""


@contextlib.contextmanager
def stream_errors() -> Iterator[None]:
    """Turn the `OSError` of a standard stream that is used in this block into a `StreamError`."""
    try:
        yield
    except OSError as error:
        raise StreamError from error


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: "1 turn", "2 turns"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten(text: str, limit: int = 300) -> str:
    """Return a text on one line, cut to so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def error_text(error: BaseException) -> str:
    """Return an error's own text on one short line without a full stop.

    An error without a text is named by its type.
    """
    try:
        text = str(getattr(error, "strerror", None) or error)
    except Exception:
        # An error of a library may fail to describe itself, for instance if it is nested too deep.
        text = ""
    return shorten(text).rstrip(".") or type(error).__name__


def quote_error(error: BaseException) -> str:
    """Return an error's own text for a sentence of ours.

    The words of a library, or of a model's template, may say anything: they stand in quotes.
    """
    text = error_text(error)
    return text if isinstance(error, (OSError, ValueError)) else f'"{text}"'


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
        sentence = f"{what}: {quote_error(error)}. {advice}"
        raise error_type(sentence.rstrip(), status) from error


# ----------------------------------------------------------------------------------------- Texts

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


def strip_control_characters(text: str) -> str:
    """Return the text without anything that could drive a terminal."""
    return text.translate(CONTROL_CHARACTERS)


# More than any configuration file of a model has: an index of weights takes some megabytes.
MAX_FILE_BYTES = 64 << 20

# What `read_file` and `read_json` raise.
UNREADABLE = (OSError, ValueError, RecursionError)


def open_plain_file(path: str | Path, mode: str = "r") -> io.FileIO:
    """Open a file in a mode of `io.FileIO`; a file that is created is for the user alone.

    Raises `OSError`, also for what is no plain file: a pipe may never be written to, and a device
    may have no end.
    """

    def opener(name: str, flags: int) -> int:
        # Without O_NONBLOCK opening a pipe would wait for its other end.
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o600)

    file = io.FileIO(str(path), mode, opener=opener)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no plain file")
    return file


def read_whole(file: io.FileIO, max_bytes: int) -> bytes:
    """Return what an open file holds. Raises `OSError` if that is more than `max_bytes`."""
    data = bytearray()
    file.seek(0)
    too_large = os.fstat(file.fileno()).st_size > max_bytes
    # The size alone does not tell: a file may grow meanwhile, and those of /proc have none.
    while not too_large and (part := file.read(1 << 20)):
        data += part
        too_large = len(data) > max_bytes
    if too_large:
        raise OSError(f"it is larger than {max_bytes >> 20} MB")
    return bytes(data)


def read_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a plain file. Raises `OSError`, also for one that is too large."""
    with open_plain_file(path) as file:
        return read_whole(file, max_bytes)


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


class SettingKey(NamedTuple):
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
        "print the reply to TEXT and leave; piped input goes before it, - is that alone",
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
        "choose among the likeliest with this total probability; 0 or 1 is off",
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
        None,
        parse_effort,
        f"[{'|'.join(EFFORTS)}]",
        "have a reasoning model think, and how much",
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
    plain: bool = option(
        False, parse_bool, None, "show Markdown as it is written, and redraw no line"
    )
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
        "continue the last chat; -c MODEL the last one with it, -c 3 the third of --chats",
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
            keys = [key for key, (name, _) in KEYS.items() if OPTIONS[name].scope in scopes]
            raise argparse.ArgumentTypeError(f"is no setting{did_you_mean(key, keys)}")
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


def key_of(name: str) -> str:
    """Return the key of a setting, as a config file and `/set` have it."""
    return name.replace("_", "-")


KEYS = {key_of(name): SettingKey(name, False) for name in OPTIONS}
KEYS.update(
    {
        f"no-{key}": SettingKey(name, True)
        for key, (name, _) in KEYS.items()
        if OPTIONS[name].parse in (parse_bool, parse_effort)
    }
)


def find_key(key: str) -> SettingKey | None:
    """Return what a key means, in any case and with `_` or `-`; None if it means nothing."""
    return KEYS.get(key_of(key.lower()))


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors show no control characters of the command line."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with status 2."""
        if message.endswith("expected one argument"):
            message += "; a value that starts with - follows a =, as in --prompt=-1"
        super().error(strip_control_characters(message))


def flags_of(name: str) -> list[str]:
    """Return the flags of a setting, the short one first."""
    flag = f"--{key_of(name)}"
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


def is_dashed_value(word: str) -> bool:
    """Tell if a word that follows a flag is a value though it starts with a dash.

    A word with two dashes is more likely a mistyped flag.
    """
    has_one_dash = word.startswith("-") and not word.startswith("--")
    # Argparse itself takes a lone dash for a value.
    return has_one_dash and word not in SHORT_FLAGS


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
    both_exist = os.path.exists(home_file) and os.path.exists(folder_file)
    if not (both_exist and home_file.samefile(folder_file)):
        trusts_code = flags.get("trust_remote_code", False)
        settings.load_file(folder_file, FOLDER_CONFIG_SCOPES, trusts_code)
    vars(settings).update(flags)
    settings.sources.update(dict.fromkeys(flags, "flag"))
    return settings


def folder_config_notice(settings: Settings) -> str:
    """Return a sentence on what the working folder's config file has set, or nothing."""
    names = [name for name, source in settings.sources.items() if source == CONFIG_FILE]
    keys = ", ".join(map(key_of, names))
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
    "processor_config.json",
)

# A rough check of a repository's name; the hub's own check follows.
REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")

# The formats of weights that MLX can't load, by the ending of their files.
UNSUPPORTED_FORMATS = {
    ".gguf": "GGUF",
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".onnx": "ONNX",
}

# The name of a file of weights, which no repository has.
WEIGHTS_FILE = re.compile(
    rf"({'|'.join(map(re.escape, ['.safetensors', *UNSUPPORTED_FORMATS]))})$", re.IGNORECASE
)
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


def without_password(address: str) -> str:
    """Return a URL without the user and the password in it."""
    scheme, separator, rest = address.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]


def hub_address() -> str:
    """Return the hub's address as it may be shown."""
    return without_password(hub_constants().ENDPOINT)


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


def matching_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of files that fit at least one pattern."""
    return [name for name in names if any(fnmatch.fnmatch(name, each) for each in patterns)]


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


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, also of those that are still coming."""
    size = 0
    for file in file_names(folder):
        # A link may lead nowhere, and a file that was coming may have its name by now.
        with contextlib.suppress(OSError):
            size += (folder / file).stat().st_size
    return size


def describe_bytes(size: int) -> str:
    """Return a size for people."""
    return f"{size / 1e9:.1f} GB" if size >= GIB else f"{size / 1e6:.0f} MB"


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
        # After each part this thread takes Python's lock from the one that imports the libraries:
        # the parts are few.
        part = bytearray(1 << 24)
        for file in self._files:
            # The load that follows tells what is wrong with a file.
            with contextlib.suppress(OSError), open(file, "rb", buffering=0) as stream:
                while size := stream.readinto(part):
                    self._done_bytes += size


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


def system_errors(error: BaseException) -> list[BaseException]:
    """Return those of an error and what led to it that are the system's own, innermost last."""
    return [
        each
        for each in error_chain(error)
        if (isinstance(each, OSError) and each.strerror)
        # A socket that was waited for in vain says so without an error number.
        or isinstance(each, (TimeoutError, socket.timeout))
    ]


def root_cause_text(error: BaseException) -> str:
    """Return the text of an error's innermost cause; the system's own text if there is one."""
    return error_text((system_errors(error) or error_chain(error))[-1])


def network_error_text(error: BaseException) -> str:
    """Return the system's own text for a failed request, or else the library's.

    The libraries wrap the system's error in errors of theirs. What they say themselves has their
    advice, for instance which package is missing for a proxy of this kind.
    """
    return error_text((system_errors(error) or [error])[-1])


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


def missing_part(name: str, revision: str | None) -> str:
    """Return what could not be fetched: the first missing file of a repository, or all of it."""
    try:
        folder = locate(name, revision)
    except UNREADABLE:
        return name
    missing = known_missing_files(folder) if os.path.exists(folder) else []
    return f"{missing[0]} of {name}" if missing else name


def hub_error_message(name: str, revision: str | None, error: BaseException) -> str:
    """Return the sentence for an error of the hub's client, its HTTP library or the system."""
    from huggingface_hub import errors

    # The client says that the file is not in the cache either; why it was not fetched is the cause.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    hub = hub_address()
    what = missing_part(name, revision)
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
        # Without a password of an address, which an error may also repeat in another spelling.
        user = hub_constants().ENDPOINT.rpartition("://")[2].rpartition("@")[0]
        if user:
            message = message.replace(f"{user}@", "")
        raise ChatError(re.sub(r"://[^/\s]*@", "://", message)) from error


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


# ---------------------------------------------------------------------------------------- Engine

# The signals that end the program: its exit status is then 128 and the signal's number. In a chat
# on a terminal SIGINT does not end it.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# The main thread looks this often for a request to stop while it waits for the engine.
WAIT_STEP_S = 0.02

# The end of the program waits this long for what the engine is computing.
MAX_LEAVE_WAIT_S = 2.0
T = TypeVar("T")
R = TypeVar("R")


class Waiting(enum.Enum):
    """What an `EngineIterator` yields in place of an item that is not there yet."""

    WAITING = "the engine is still at work"


WAITING = Waiting.WAITING


def is_private_folder(folder: str) -> bool:
    """Tell if a folder is this user's, or the system's, and nobody else can write to it."""
    status = os.lstat(folder)
    is_own = status.st_uid in (0, os.getuid())
    return stat.S_ISDIR(status.st_mode) and is_own and not status.st_mode & 0o022


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
    if all(map(is_private_folder, [temporary, *glob.glob(kernels, recursive=True)])):
        return
    candidates = [Path(os.path.expanduser("~/.cache/llmchat"))]
    # In a sticky folder, such as /tmp, nobody can replace the folder of somebody else.
    if Path(temporary).stat().st_mode & stat.S_ISVTX:
        candidates.insert(0, Path(temporary, f"llmchat-{os.getuid()}"))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if is_private_folder(str(folder)):
                os.environ["TMPDIR"] = str(folder)
                return
    raise ChatError(
        f"Others can put code that MLX would run into {temporary}: set TMPDIR to a folder that only"
        " you can write to."
    )


def ignore_ending_signals() -> None:
    """From here on no signal interrupts what cleans up."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def block_signals() -> None:
    """Leave all signals to the main thread, also in the threads that this one starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


class EngineIterator(Generic[R]):
    """Iterates over a generator that runs in the engine's thread.

    An item that takes longer than `WAIT_STEP_S` comes after one or more `WAITING`, so that whoever
    iterates is never held up. It may stop at any item, and go on later: nothing is lost.
    """

    def __init__(self, engine: Engine, items: Generator[R, None, None]) -> None:
        self._engine = engine
        self._items = items
        # The item that the engine is computing.
        self._job: Future[R | Waiting] | None = None

    def __iter__(self) -> EngineIterator[R]:
        return self

    def __next__(self) -> R | Waiting:
        job = self._job or self._engine.submit(next, self._items, WAITING)
        self._job = job
        if wait_for_jobs([job], WAIT_STEP_S).not_done:
            return WAITING
        self._job = None
        item = job.result()
        # The generator itself never yields this: it has ended.
        if item is WAITING:
            raise StopIteration
        return item

    @property
    def is_computing(self) -> bool:
        """Whether the engine was asked for an item that nobody has got yet."""
        return self._job is not None

    def close(self) -> None:
        """Close the generator in the engine's thread, after the item that is being computed."""
        self._engine.submit(self._engine.close_generator, self._items)

    def __del__(self) -> None:
        # MLX complains if another thread than the engine's drops a generator that is under way.
        self.close()


class Background:
    """Generators that run in the engine's thread until nobody needs them any more."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left = threading.Event()
        self._jobs: list[Future[None]] = []

    def run(self, steps: Generator[Any, None, None]) -> None:
        """Run a generator after those before. Any thread may call this.

        A `ChatError` only ends the generator: whoever needs its result meets the error again.
        """

        def job() -> None:
            with contextlib.suppress(ChatError), contextlib.closing(steps):
                while not self._left.is_set():
                    if next(steps, WAITING) is WAITING:
                        return

        self._jobs.append(self._engine.submit(job))

    def leave(self) -> None:
        """Leave the generators at their next step, without waiting for it; raise their bugs."""
        self._left.set()
        for job in self._jobs:
            if job.done():
                job.result()


class Engine:
    """The one thread that works with MLX, for the whole life of the program.

    MLX's streams belong to the thread that made them, and an array that is still to be computed
    must not go from one thread to another. So loading, computing, rewinding, saving and dropping
    all happen in this thread, one job after the other. The main thread has the terminal, the
    signals and the sessions. It may give up waiting for a job; the job itself goes on to its end.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._last_job: Future[Any] | None = None
        # Held until they are closed: the garbage collection of another thread could come first.
        self._open_generators: set[Generator[Any, None, None]] = set()

    def submit(self, work: Callable[..., R], *arguments: Any) -> Future[R]:
        """Hand a job over without waiting for it."""
        if self._last_job is None:
            # It never ends: when a thread ends that has worked with MLX, MLX may abort the process
            # (which a ThreadPoolExecutor's does, as Python waits for it at exit).
            threading.Thread(target=self._run, name="engine", daemon=True).start()
        job: Future[R] = Future()
        self._last_job = job
        self._work.put((job, functools.partial(work, *arguments)))
        return job

    def _run(self) -> None:
        block_signals()
        while True:
            job, work = self._work.get()
            try:
                job.set_result(work())
            # Whoever waits for the job gets the exception, whatever it is.
            except BaseException as error:
                job.set_exception(error)
            # What the job has made must not live until the next one.
            del job, work

    def call(self, work: Callable[..., R], *arguments: Any) -> R:
        """Return what `work` returns, or raise what it raises.

        An exception that a signal raises in the main thread ends the waiting at once.
        """
        return self.submit(work, *arguments).result()

    def each(self, items: Generator[R, None, None]) -> EngineIterator[R]:
        """Return an iterator over a generator that runs in this thread."""
        self._open_generators.add(items)
        return EngineIterator(self, items)

    def close_generator(self, items: Generator[Any, None, None]) -> None:
        """Close a generator that `each` was given; this runs in the engine's thread."""
        self._open_generators.discard(items)
        items.close()

    @contextlib.contextmanager
    def meanwhile(self, *generators: Generator[Any, None, None]) -> Iterator[Background]:
        """Run generators in this thread while a block runs; they are left at their next step."""
        background = Background(self)
        for steps in generators:
            background.run(steps)
        try:
            yield background
        finally:
            background.leave()

    def is_idle_within(self, timeout_s: float) -> bool:
        """Wait until all jobs are done, but not longer than this; return whether they are."""
        if self._last_job is None:
            return True
        return not wait_for_jobs([self._last_job], timeout_s).not_done

    @property
    def was_used(self) -> bool:
        """Whether the engine was given any work."""
        return self._last_job is not None

    def end_process(self, status: int) -> None:
        """End the process with this status if the engine has worked; otherwise just return.

        Python's own way out aborts the process while another thread computes, and MLX complains
        when another thread than this one drops what it has made.
        """
        if not self.was_used:
            return
        ignore_ending_signals()
        self.is_idle_within(MAX_LEAVE_WAIT_S)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class OnEngine(Generic[T]):
    """An object that belongs to the engine's thread: all that is done with it is done there.

    Whoever has one of these has no other way to the object.
    """

    def __init__(self, engine: Engine, target: T) -> None:
        self._engine = engine
        self._target = target

    def call(self, work: Callable[[T], R]) -> R:
        """Return what `work` makes of the object, or raise what it raises."""
        return self._engine.call(work, self._target)

    def each(self, work: Callable[[T], Generator[R, None, None]]) -> EngineIterator[R]:
        """Return an iterator over the generator that `work` makes of the object."""
        return self._engine.each(work(self._target))

    @contextlib.contextmanager
    def meanwhile(
        self,
    ) -> Iterator[Callable[[Callable[[T], Generator[Any, None, None]]], None]]:
        """While a block runs, run the generators that are made of the object.

        Yields a function that takes such a `work`, and that any thread may call.
        """
        with self._engine.meanwhile() as background:
            yield lambda work: background.run(work(self._target))


# ----------------------------------------------------------------------------------------- Hosts

# How often a host looks whether the launcher that started it is still there.
LAUNCHER_CHECK_S = 0.5


class Hosts:
    """The processes that hold one model together, each on a host of its own; usually just this one.

    All run this same program on the same lines of input, which mlx.launch hands to each. Rank 0
    alone is seen and writes files, and broadcasts what might be different elsewhere.
    """

    def __init__(self, group: Any = None) -> None:
        """`group` is MLX's own group of the processes; None if there is just this one."""
        self._group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which JSON can hold, on every host.

        Runs on the engine's thread. Raises `EngineError` if another host is gone.
        """
        if self.size == 1:
            return value
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        all_sum: Any = functools.partial(mx.distributed.all_sum, group=self._group)
        data = json.dumps(value).encode() if self.rank == 0 else b""
        what = "Another host is gone, so the chat can't go on"
        # mlx-lm has queued the next token on this stream, and all hosts must run both in one order.
        with explain_errors(what, "", RuntimeError, ValueError, error_type=EngineError):
            with mx.stream(generation_stream):
                length = int(all_sum(mx.array(len(data))).item())
                # One host gives bytes, the others as many zeros. MLX takes a bytearray as it is,
                # but a list byte by byte: 24 ms for 1.2 MB in place of 0.05 ms.
                buffer: Any = bytearray(data or length)
                return json.loads(bytes(all_sum(mx.array(buffer))))


def init_hosts() -> Hosts:
    """Set up MLX's group of hosts, on the engine's thread. Raises `ChatError`."""
    mx = import_library("mlx.core")
    what = "The hosts that mlx.launch started can't be joined"
    with explain_errors(what, "On one Mac, leave mlx.launch out.", RuntimeError, ValueError):
        return Hosts(mx.distributed.init(strict=True))


def end_with_launcher(launcher: int) -> None:
    """End this process once the launcher, its parent, has ended.

    MLX waits for ever for a host that has died, so each host ends when the launcher does.
    """
    while os.getppid() == launcher:
        time.sleep(LAUNCHER_CHECK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def join_hosts(engine: Engine) -> Hosts:
    """Join the hosts that mlx.launch started, if it did; else return this one alone.

    Raises `ChatError`.
    """
    # mlx.launch sets the first, or starts the hosts by mpirun, which sets the second.
    launched = any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))
    if not launched:
        return Hosts()
    # While a host waits for another in MLX, it runs no handlers: signals have to end it by default.
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=end_with_launcher, args=(os.getppid(),), daemon=True).start()
    return engine.call(init_hosts)


# ----------------------------------------------------------------------------------------- Model


# More than fits any model, of one prompt.
MAX_CHARACTERS = 1 << 24

# Breaks up text that spells a special token. Unicode promises that this is never a character
# (https://www.unicode.org/faq/private_use.html#nonchar4).
TOKEN_BREAK = "\ufdd0"

# What a text is encoded behind, so that the tokenizer takes it for the middle of a text.
ANCHORS = (TOKEN_BREAK, "\n", ".")

# Made-up words, by which a rendering tells where a template puts what.
PROBE_EARLIER = "hazelcatkin"
PROBE_QUESTION = "quincewort"
PROBE_THOUGHT = "thistledown"
PROBE_ANSWER = "walnutshell"
QUESTION = {"role": "user", "content": PROBE_QUESTION}


class Rendered(NamedTuple):
    """A conversation as the model is fed it, up to where its reply starts."""

    text: str
    tokens: list[int]
    # What the template writes after the last message. It may hold the beginning of the reply.
    ending: str


def is_subsequence(items: Iterable[object], others: Iterable[object]) -> bool:
    """Tell if all the items stand among the others, in the same order."""
    remaining = iter(others)
    return all(item in remaining for item in items)


def message_key(message: Message) -> tuple[str, str, str]:
    """Return what a template is given of a message. A session may hold anything else beside it."""
    return message["role"], message["content"], message.get("reasoning_content", "")


def with_texts(message: Message, change: Callable[[str], str]) -> Message:
    """Return a message with its content and its thought changed."""
    keys = ("content", "reasoning_content")
    return {**message, **{key: change(message[key]) for key in keys if message.get(key)}}


def with_typed_block(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its text as a typed block."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


class ChatTemplate:
    """Turns messages into the text and the tokens that a model is fed, by its own chat template."""

    def __init__(self, name: str, tokenizer: Any, end_ids: Sequence[Any] = ()) -> None:
        """`name` is the model's name, `tokenizer` is mlx-lm's wrapper of its tokenizer.

        `end_ids` are the values of `eos_token_id` in the model's configurations, whatever they are.
        """
        self.name = name
        self.tokenizer = tokenizer
        self._end_ids = end_ids
        # Messages whose texts had to be broken up, and what became of them.
        self._broken_up: dict[tuple[str, str, str], Message] = {}

    @property
    def _function(self) -> Any:
        # A template that mlx-lm brings along, for models whose authors give none.
        return getattr(self.tokenizer, "_chat_template", None)

    @property
    def is_function(self) -> bool:
        """The template is a function of mlx-lm."""
        return self._function is not None

    @functools.cached_property
    def source(self) -> str:
        """The template's source; of several templates that of the default one."""
        if self._function:
            module = inspect.getmodule(self._function)
            return inspect.getsource(module) if module else ""
        source = self.tokenizer.chat_template
        return str(source.get("default", "") if isinstance(source, dict) else source)

    @functools.cached_property
    def tree(self) -> Any:
        """The template as Jinja parses it, or None if Jinja can't: rendering it says why."""
        if self._function:
            return None
        import jinja2

        # The one tag that transformers adds to Jinja.
        source = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", self.source)
        with contextlib.suppress(jinja2.TemplateError, RecursionError):
            return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        return None

    @functools.cached_property
    def variables(self) -> set[str]:
        """The variables that the template reads."""
        if self._function:
            # mlx-lm tells a function one thing.
            return {"enable_thinking"}
        import jinja2.meta

        if self.tree is not None:
            with contextlib.suppress(jinja2.TemplateError, RecursionError):
                return set(jinja2.meta.find_undeclared_variables(self.tree))
        return set()

    @functools.cached_property
    def literals(self) -> list[str]:
        """The texts that the template's code has in quotes."""
        from jinja2 import nodes

        if self.tree is not None:
            with contextlib.suppress(RecursionError):
                values = [node.value for node in self.tree.find_all(nodes.Const)]
                return list(dict.fromkeys(value for value in values if isinstance(value, str)))
        return re.findall(r"[\"']([^\"'\n]+)[\"']", self.source)

    def check(self) -> None:
        """Raise `ChatError` if no template renders a prompt, with what the user says in it."""
        templates = self.tokenizer.chat_template
        if isinstance(templates, dict) and not self.source:
            names = shorten(", ".join(map(str, templates)), 60)
            raise ChatError(
                f"{self.name} has several chat templates ({names}), and none is the default. "
                "Name another model."
            )
        what = f"The chat template of {self.name} can't render this model's prompts"
        # The template is a program of others: it may raise anything.
        with explain_errors(what, "Name another model.", Exception):
            text = self._apply([self._with_typed_content(QUESTION)], True, {})
        if PROBE_QUESTION not in text:
            raise ChatError(
                f"The chat template of {self.name} leaves out what the user says. "
                "Name another model."
            )

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the text of messages, by default up to where a reply starts.

        Raises `ChatError`.
        """
        typed = [self._with_typed_content(message) for message in messages]
        what = f"The chat template of {self.name} can't render this conversation"
        advice = "Leave out the system prompt, or take turns back with /undo."
        # The template is a program of others: it may raise anything. A step of it that makes
        # gigabytes of text can't be stopped from here.
        with explain_errors(what, advice, Exception):
            text = self._apply(typed, add_generation_prompt, variables)
        if len(text) > MAX_CHARACTERS:
            raise ChatError(
                f"The chat template of {self.name} makes {len(text)} characters of it. "
                "Shorten the prompt."
            )
        return text

    def _apply(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, variables: Any
    ) -> str:
        # mlx-lm's wrapper tells every template to think, but a user who said nothing gets the
        # template's default. So the tokenizer inside is asked, unless the template is a function.
        tokenizer = self.tokenizer
        if not self._function:
            tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        )

    def _with_typed_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with its content as a typed block, if the template takes no text."""
        content = message["content"]
        if isinstance(content, str) and message["role"] in self._typed_roles:
            return with_typed_block(message)
        return message

    @functools.cached_property
    def _typed_roles(self) -> set[str]:
        """The roles whose content the template takes as a list of typed blocks alone.

        A template for images may read `message.content[0].text`, and nothing else.
        """

        def comes_out(*messages: dict[str, Any]) -> bool:
            # The template is a program of others: it may raise anything.
            with contextlib.suppress(Exception):
                return PROBE_ANSWER in self._apply(messages, True, {})
            return False

        def needs_blocks(
            before: Sequence[dict[str, Any]], role: str, after: Sequence[dict[str, Any]]
        ) -> bool:
            message = {"role": role, "content": PROBE_ANSWER}
            if comes_out(*before, message, *after):
                return False
            return comes_out(*before, with_typed_block(message), *after)

        typed = set()
        question = QUESTION
        if needs_blocks([], "user", []):
            typed.add("user")
            question = with_typed_block(QUESTION)
        if needs_blocks([question], "assistant", [question]):
            typed.add("assistant")
        if needs_blocks([], "system", [question]):
            typed.add("system")
        return typed

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text, which brings its own BOS. Raises `ChatError`.

        A token never spans a `TOKEN_BREAK`. Apart from that the tokens are those of the whole text.
        """
        first, *parts = text.split(TOKEN_BREAK)
        tokens = self._encode_alone(first)
        known: dict[str, list[int]] = {}
        for part in parts:
            if part not in known:
                known[part] = self._encode_within(part)
            tokens.extend(known[part])
        return tokens

    def encode_after(self, before: str, text: str) -> list[int]:
        """Return the token ids of a text that goes on after another one. Raises `ChatError`."""
        tokens = self.encode(before + text)
        head = self.encode(before)
        if tokens[: len(head)] == head:
            return tokens[len(head) :]
        return self._encode_within(text)

    def _encode_within(self, text: str) -> list[int]:
        """Return the token ids of a text that stands somewhere within another one.

        Many tokenizers put a space before a text, which belongs to its first word alone.
        """
        if not text:
            return []
        for anchor in ANCHORS:
            head = self._encode_alone(anchor)
            tokens = self._encode_alone(anchor + text)
            # The anchor is no use if it is lost, or if a token spans it and the text.
            if head and tokens[: len(head)] == head:
                return tokens[len(head) :]
        return self._encode_alone(text)

    def _encode_alone(self, text: str) -> list[int]:
        # A config file may contain half a surrogate pair, which no tokenizer takes.
        text = text.encode(errors="replace").decode()
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        except (KeyboardInterrupt, SystemExit):
            raise
        # The panic of a Rust library is no `Exception`.
        except BaseException as error:
            raise ChatError(
                f"The tokenizer of {self.name} fails: {quote_error(error)}. Name another model."
            ) from error

    @functools.cached_property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end a reply, as the tokenizer and the configurations name them."""
        ids = [self.tokenizer.eos_token_id, *self.tokenizer.eos_token_ids]
        for value in self._end_ids:
            ids += value if isinstance(value, list) else [value]
        return {number for number in ids if self._is_token(number)}

    def _is_token(self, number: Any) -> bool:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            return False
        with contextlib.suppress(IndexError, KeyError, OverflowError, ValueError):
            return bool(self.tokenizer.convert_ids_to_tokens(number))
        return False

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """The tokens that may be structure, by their ids.

        A token that was added to a vocabulary is special, or looks like a mark, or else it may be a
        word, a sign or spaces that anybody writes. A mark that ends replies may also be a piece of
        the vocabulary itself.
        """
        mark = re.compile(r"\w.*[^\w\s]|[^\w\s].*\w")
        added = {
            number: str(token)
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if str(token).strip() and (token.special or mark.search(str(token)))
        }
        ends = {
            number: self.tokenizer.convert_ids_to_tokens(number) for number in self.eos_token_ids
        }
        return {**{number: end for number, end in ends.items() if mark.search(end)}, **added}

    @functools.cached_property
    def _structure_ids(self) -> set[int]:
        """The ids of the tokens that are structure.

        They are special, or end replies, or are named in the template.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        return {
            number
            for number, text in self.added_tokens.items()
            if number in special | self.eos_token_ids or text in self.source
        }

    @functools.cached_property
    def _structure_texts(self) -> re.Pattern[str]:
        texts = sorted((self.added_tokens[number] for number in self._structure_ids), key=len)
        return re.compile("|".join(map(re.escape, reversed(texts))) or "(?!)")

    def fed(
        self,
        messages: Sequence[Message],
        to_template_message: Callable[[Message], dict[str, Any]] = dict,
        **variables: Any,
    ) -> Rendered:
        """Return what the model is fed of a conversation that ends with a prompt.

        No text of a message becomes structure, whatever template and tokenizer make of it. The
        result is checked: its special tokens are those of the same conversation with made-up words
        for texts. Where there are more, texts are broken up with `TOKEN_BREAK`, as little as will
        do. Raises `ChatError`, also if nothing will do.
        """

        def render(conversation: Sequence[Message]) -> Rendered:
            text = self.render([to_template_message(m) for m in conversation], **variables)
            return Rendered(text, self.encode(text), text.partition(PROBE_QUESTION)[2])

        def is_safe(conversation: Sequence[Message]) -> bool:
            return self._has_only_structure_of(expected, render(conversation))

        plain = [with_texts(m, lambda text: text.replace(TOKEN_BREAK, "")) for m in messages]
        # A template that finds its own marks in a text may leave them out where they belong.
        without_marks = [with_texts(message, self._break_up_tokens) for message in plain]
        safe = [
            self._broken_up.get(message_key(message), changed)
            for message, changed in zip(plain, without_marks)
        ]
        prompt = render(safe)
        made_up = self._made_up(plain)
        expected = render(made_up)
        is_like = self._has_only_structure_of(expected, prompt)
        if not (is_like and prompt.text.endswith(expected.ending)):
            # The template may have answered to a word of a message, as to `/no_think`: then what it
            # writes for that is expected, unless it writes structure in the place of the word.
            words = self._plain_literals
            between = self._made_up(plain, words, before=PROBE_ANSWER)
            if not self._writes_structure_between(render(between).text):
                made_up = self._made_up(plain, words)
                expected = render(made_up)
        if not self._has_only_structure_of(expected, prompt):
            safe = self._break_up(without_marks, made_up, is_safe)
            self._broken_up.update(zip(map(message_key, plain), safe))
            prompt = render(safe)
        return Rendered(prompt.text.replace(TOKEN_BREAK, ""), prompt.tokens, expected.ending)

    def _has_only_structure_of(self, expected: Rendered, prompt: Rendered) -> bool:
        """Tell if each token of a prompt that is structure is expected where it stands."""
        # What a template writes by itself is structure too, also where it puts a token together.
        ids = self._structure_ids.union(self.added_tokens.keys() & set(expected.tokens))
        return is_subsequence(
            [token for token in prompt.tokens if token in ids],
            [token for token in expected.tokens if token in ids],
        )

    def _made_up(
        self, messages: Sequence[Message], kept: Sequence[str] = (), before: str = ""
    ) -> list[Message]:
        """Return the messages with made-up words for texts, at last `PROBE_QUESTION`.

        The words that are to be kept stay where they occur, after the word `before`: a template may
        look for `/no_think` in a message, and write something else then.
        """

        def with_word(message: Message, made_up: str) -> Message:
            def change(text: str) -> str:
                # A template may leave out what is empty.
                if not text.strip():
                    return text
                words = [word for word in kept if word in text]
                return " ".join([before, *words, made_up]).strip()

            return with_texts(message, change)

        *earlier, last = messages
        return [*(with_word(m, PROBE_EARLIER) for m in earlier), with_word(last, PROBE_QUESTION)]

    def _writes_structure_between(self, text: str) -> bool:
        """Tell if a template writes structure for words that stand between made-up ones.

        An answer to `/no_think` stands elsewhere: here any document could make structure by them.
        """
        end = f"{PROBE_EARLIER}|{PROBE_QUESTION}"
        places = re.finditer(f"{PROBE_ANSWER}(.*?)({end})", text, re.DOTALL)
        return any(self._structure_texts.search(place[1]) for place in places)

    def _break_up_tokens(self, text: str) -> str:
        """Return a text with a `TOKEN_BREAK` in each structure token that it spells."""
        return self._structure_texts.sub(
            lambda match: match[0][0] + TOKEN_BREAK + match[0][1:], text
        )

    @functools.cached_property
    def _plain_literals(self) -> list[str]:
        """The words in quotes in the template that are no structure."""
        words = [text for text in self.literals if re.search(r"\w\w", text)]
        return [text for text in words if not self._structure_texts.search(text)]

    def _break_up(
        self,
        messages: Sequence[Message],
        made_up: Sequence[Message],
        is_safe: Callable[[Sequence[Message]], bool],
    ) -> list[Message]:
        """Return the messages, with those broken up of which a text would become structure."""
        first_characters = {self.added_tokens[number][0] for number in self._structure_ids}

        def after_first_characters(text: str) -> str:
            return "".join(
                character + TOKEN_BREAK if character in first_characters else character
                for character in text
            )

        def everywhere(text: str) -> str:
            return TOKEN_BREAK.join(["", *text, ""])

        safe = []
        for index, message in enumerate(messages):
            for change in (str, after_first_characters, everywhere):
                changed = with_texts(message, change)
                if is_safe([*made_up[:index], changed, *made_up[index + 1 :]]):
                    break
            safe.append(changed)
        if not is_safe(safe):
            # Two messages may spell a token together.
            safe = [with_texts(message, everywhere) for message in messages]
        if not is_safe(safe):
            raise ChatError(
                f"This conversation spells a special token of {self.name}, however it is broken "
                "up. Write it in other words, or take turns back with /undo."
            )
        return safe


def with_fitting_detokenizer(name: str, tokenizer: Any) -> Any:
    """Return a tokenizer, in mlx-lm's wrapper, with the detokenizer that its vocabulary needs.

    mlx-lm chooses it by the decoder in `tokenizer.json`. A byte-level vocabulary that comes with
    the decoder of another kind would have a reply read `HelloĠtoĠyou`. Raises `ChatError`.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

    template = ChatTemplate(name, tokenizer)
    tokens = template.encode("Hello to you")
    is_byte_level = "Ġ" in "".join(map(str, tokenizer.convert_ids_to_tokens(tokens)))
    if not is_byte_level or template.is_function:
        return tokenizer
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    if "Ġ" not in detokenizer.text:
        return tokenizer
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    return TokenizerWrapper(inner, BPEStreamingDetokenizer, tokenizer.eos_token_ids)


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


def damaged_advice(folder: Path, repository: Path | None) -> str:
    """Return what to do if a file of a model in this folder is damaged."""
    if repository:
        return f"Remove {repository}, and it is downloaded again."
    return f"Put a whole copy of the model into {folder}."


# What can be said of a model by the names of its files and by its configuration.


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


def context_length(config: dict[str, Any]) -> int | None:
    """Return the number of tokens that a model was made for, or None if that is not said."""
    for part in language_configs(config):
        lengths = [positive_int(part.get(key)) for key in CONTEXT_KEYS]
        length = next(filter(None, lengths), None)
        stretched = stretched_length(part, length)
        if stretched or length:
            return stretched or length
    return None


# Where a model's author says how to sample.
RECOMMENDATIONS_FILE = "generation_config.json"


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
    file = folder / RECOMMENDATIONS_FILE
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
    shown = shorten(name)
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in UNSUPPORTED_FORMATS:
        return (
            f"{shown} is a {UNSUPPORTED_FORMATS[path.suffix.lower()]} file, and MLX loads folders"
            f" of {WEIGHTS}: look for the model at mlx-community, such as llmchat {EXAMPLE_MODEL}."
        )
    if os.path.isfile(path) or WEIGHTS_FILE.search(name):
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
    for name in matching_names(found.names, NEEDED):
        file = found.folder / name
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            raise ChatError(
                f"{name} of {found.name} can't be read: it is no plain file."
                f" {found.damaged_advice()}"
            )


def read_model_files(found: ModelFiles, settings: Settings) -> ModelFiles:
    """Add what the configuration of a model says to what was found of it.

    Raises `ChatError` where the model can't be used.
    """
    name = found.name
    names = found.names
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
    wanted = matching_names(sizes, NEEDED)
    found.missing = {file: sizes[file] for file in wanted if not os.path.exists(folder / file)}
    found.weight_bytes = sum(sizes[file] for file in fnmatch.filter(sizes, WEIGHTS))
    return found


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


# Finding a model, and loading it. It is found on the main thread, which may wait for the network
# and be stopped by Ctrl+C, and loaded on the engine's.


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
    is_file = os.path.isfile(folder) or bool(WEIGHTS_FILE.search(name))
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


def load_error_message(
    found: ModelFiles, settings: Settings, hosts: Hosts, error: BaseException
) -> str:
    """Return the sentence for an error of mlx-lm while it loads a model."""
    text = quote_error(error)
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


def fingerprint(found: ModelFiles, settings: Settings) -> str:
    """Return the version of mlx-lm, and the sizes and times of all files that shape the network."""
    # Of a model in the hub cache the path names the commit.
    names = matching_names(found.names, (WEIGHTS, "*.json", "*.py"))
    files = [found.folder / name for name in names]
    if adapter := adapter_folder(settings.adapter):
        files += adapter.glob("adapter*")
    stats = [(str(file.absolute()), file.stat()) for file in sorted(files) if file.exists()]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
    return repr([import_library("mlx_lm").__version__, facts])


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Look for no garbage in this block.

    To import and to load leaves little, and looking takes a twentieth of the time of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@garbage_collection_paused()
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
    tokenizer = with_fitting_detokenizer(found.name, tokenizer)
    generation_config = read_config(found, RECOMMENDATIONS_FILE)
    end_ids = [config.get("eos_token_id") for config in (found.config, generation_config)]
    return Model(
        found.name,
        network,
        ChatTemplate(found.name, tokenizer, end_ids),
        context_length(found.config),
        hosts,
        fingerprint(found, settings),
        None if settings.force else memory_bytes,
    )


# ---------------------------------------------------------------------------------- Prompt cache

# Tokens of a prompt that are put through the model at once (a prefill step). mlx-lm's own default
# is 2048, for which a small model on a slow machine takes a second.
PREFILL_STEP_TOKENS = 512

# The same while the user types: Enter waits for one step at most, or for a rendering before them.
READ_AHEAD_STEP_TOKENS = 128

# The copies of a state that a conversation keeps to go back to, and all copies together.
MAX_SNAPSHOTS = 2
MAX_COPIES = MAX_SNAPSHOTS + 1

ENGINE_FAILED_WHAT = "The engine failed, so what it was generating is not kept"
ENGINE_FAILED_ADVICE = "If memory ran out, a shorter prompt, /clear or a smaller model takes less."


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the number of elements that two sequences have in common at their start."""
    shorter = min(len(one), len(other))
    # Whole sequences are compared first, because that is fast: most prompts only grow.
    if one[:shorter] == other[:shorter]:
        return shorter
    for index, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return index
    return shorter


class Token(NamedTuple):
    """A generated token: the text that it adds, and why the reply ends with it, if it does."""

    token: int
    text: str
    # `stop` or `length` as mlx-lm has them; None as long as the reply goes on.
    finish_reason: str | None


def check_finite(response: Any) -> None:
    """Raise `ChatError` if the probabilities that a token was chosen by are no numbers."""
    import mlx.core as mx

    # On the CPU's own stream: it need not wait for the next token, which is being computed already.
    with mx.stream(mx.cpu):
        log_probability = response.logprobs[response.token].item()
    if math.isnan(log_probability):
        raise ChatError(
            "The model computes no numbers any more (NaN), so the reply ends here. /clear may help;"
            " if it doesn't, the model's files or its quantization are damaged: try another one."
        )


class Snapshot(NamedTuple):
    """A place in the tokens to go back to."""

    # The number of tokens up to here.
    length: int
    # The state of the layers that can't be trimmed, by their index in `_leaves`.
    copies: dict[int, dict[str, Any]]


def copy_state(leaf: Any) -> dict[str, Any]:
    """Return a copy of all that one layer's cache holds.

    mlx-lm has no public call for this. The copy is deep, because a sliding window that has wrapped
    writes into its arrays; MLX shares the memory of two arrays until one of them is written to.
    """
    return copy.deepcopy(vars(leaf))


def restore_state(leaf: Any, state: dict[str, Any]) -> None:
    """Put a copy of such a state back into a layer's cache."""
    vars(leaf).update(copy.deepcopy(state))


def cache_leaves(layers: Sequence[Any]) -> list[Any]:
    """Return the caches of all layers, one by one: a hybrid layer holds several in a CacheList."""
    leaves: list[Any] = []
    for layer in layers:
        leaves.extend(getattr(layer, "caches", [layer]))
    return leaves


def can_trim_now(leaf: Any) -> bool:
    """Tell whether a layer's cache can be cut to any shorter length, as it is now.

    A sliding window (`max_size`) can be cut until it wraps. A chunked cache (`chunk_size`) says
    that it can, but it has dropped what stood before its chunk.
    """
    return bool(leaf.is_trimmable()) and not hasattr(leaf, "chunk_size")


def window_tokens(leaf: Any) -> int | None:
    """Return the number of tokens that a sliding window or a chunk holds; None for other caches."""
    return getattr(leaf, "max_size", None) or getattr(leaf, "chunk_size", None)


def needs_copy(leaf: Any) -> bool:
    """Tell whether a layer's cache can only go back to a copy, now or later."""
    return window_tokens(leaf) is not None or not can_trim_now(leaf)


class PromptCache:
    """Owns the engine's state. Invariant: between two calls it is the state of `self.tokens`.

    For a new prompt it goes back to the longest prefix that it can reach, so that only the rest is
    computed. Plain KV caches are trimmed. Recurrent layers, chunked attention and sliding windows
    that have wrapped can't be: of those, a copy is taken where the next turn is known to share the
    prompt (a snapshot). To go back is to put the copies in place and to trim the other layers to
    the same length; if only some layers went back, the words would be wrong. Whenever the state
    can't be known, it is dropped.
    """

    def __init__(self, network: Any, distributed: bool = False) -> None:
        """With `distributed` it only goes back to snapshots, which are the same on every host."""
        self._network = network
        self._distributed = distributed
        self.clear()
        # No snapshot is ever needed: every layer can go back any number of tokens, now and later,
        # here and on other hosts. Where this is false a layer may still be able to go back today.
        self.can_trim = not distributed and not any(map(needs_copy, cache_leaves(self.layers)))

    def clear(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.tokens: list[int] = []
        self.layers: list[Any] = make_prompt_cache(self._network)
        # The last two: this turn's, for the next turn and /retry, and the one before, for /undo.
        self._snapshots: list[Snapshot] = []

    def replace(self, tokens: list[int], layers: list[Any]) -> None:
        """Hold the state of these tokens instead, as it was loaded from a file."""
        for layer, loaded in zip(self.layers, layers):
            vars(layer).update(vars(loaded))
        self.tokens = tokens
        self._snapshots = []
        if not self.can_trim:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        copies = {
            index: copy_state(leaf)
            for index, leaf in enumerate(cache_leaves(self.layers))
            if needs_copy(leaf)
        }
        self._snapshots.append(Snapshot(len(self.tokens), copies))
        del self._snapshots[:-MAX_SNAPSHOTS]

    def rewind(self, prompt: Sequence[int]) -> int:
        """Go back to the longest prefix of `prompt` that can be reached; return its length.

        At least the last token of the prompt is left to be computed.
        """
        prefix_length = common_prefix(self.tokens, prompt[:-1])
        if prefix_length == len(self.tokens):
            return prefix_length
        reachable = [taken for taken in self._snapshots if taken.length <= prefix_length]
        self._snapshots = reachable
        leaves = cache_leaves(self.layers)
        if not self._distributed and all(map(can_trim_now, leaves)):
            self._go_back_to(Snapshot(prefix_length, {}))
        elif reachable:
            self._go_back_to(reachable[-1])
        else:
            self.clear()
        return len(self.tokens)

    def _go_back_to(self, target: Snapshot) -> None:
        """Trim every layer to the target's length, or put back the copy that it has of it."""
        if target.length == 0:
            self.clear()
            return
        with self._cleared_on_error():
            surplus = len(self.tokens) - target.length
            self.tokens = self.tokens[: target.length]
            for index, leaf in enumerate(cache_leaves(self.layers)):
                if index in target.copies:
                    restore_state(leaf, target.copies[index])
                elif leaf.trim(surplus) != surplus:
                    self.clear()
                    return

    def has_computed(self, prompt: Sequence[int]) -> bool:
        """Tell whether all of a prompt but its last token is there, or can be trimmed to."""
        prefix_length = common_prefix(self.tokens, prompt[:-1])
        if prefix_length < len(prompt) - 1:
            return False
        return self.can_trim or prefix_length == len(self.tokens)

    @contextlib.contextmanager
    def _cleared_on_error(self) -> Iterator[None]:
        """Turn an error of the engine into an `EngineError`, and forget everything.

        MLX raises `RuntimeError` (also when memory runs out) and `ValueError`; a network that its
        repository brings along may raise anything.
        """
        try:
            with explain_errors(
                ENGINE_FAILED_WHAT, ENGINE_FAILED_ADVICE, Exception, error_type=EngineError
            ):
                yield
        except ChatError:
            self.clear()
            raise

    def prefill(
        self, prompt: list[int], snapshot_at: int, step_tokens: int = PREFILL_STEP_TOKENS
    ) -> Generator[int, None, None]:
        """Compute the state of `prompt` but for its last token; yield the length after each step.

        The cache must hold a prefix of the prompt: call `rewind` first. The next turn will share
        the first `snapshot_at` tokens: a snapshot is taken there if the cache needs one. May be
        closed after any step. Raises `EngineError`.
        """
        import mlx.core as mx
        from mlx_lm.generate import generation_stream, wired_limit

        end = len(prompt) - 1
        snapshot_at = min(snapshot_at, end)
        streams: list[Any] = [generation_stream]
        with wired_limit(self._network, streams):
            while len(self.tokens) < end:
                done = len(self.tokens)
                step_end = min(done + step_tokens, end)
                if done < snapshot_at:
                    step_end = min(step_end, snapshot_at)
                with self._cleared_on_error(), mx.stream(generation_stream):
                    self._network(mx.array(prompt[done:step_end])[None], cache=self.layers)
                    mx.eval([layer.state for layer in self.layers])
                    self.tokens = prompt[:step_end]
                    if step_end == snapshot_at and not self.can_trim:
                        self._take_snapshot()
                mx.clear_cache()
                yield step_end

    def stream(
        self, tokenizer: Any, prompt: list[int], **options: Any
    ) -> Generator[Token, None, None]:
        """Yield the tokens that mlx-lm generates after a prompt's prefill, until the model ends.

        Between two tokens the generator may wait, or be closed: the engine runs one token ahead, so
        the state holds every token that was yielded. Raises `EngineError`.
        """
        import mlx.core as mx
        from mlx_lm import stream_generate

        with self._cleared_on_error():
            rest = mx.array(prompt[len(self.tokens) :])
            responses = stream_generate(
                self._network,
                tokenizer,
                rest,
                max_tokens=-1,
                prompt_cache=self.layers,
                **options,
            )
            self.tokens = list(prompt)
            with contextlib.closing(responses):
                for response in responses:
                    self.tokens.append(response.token)
                    check_finite(response)
                    yield Token(response.token, response.text, response.finish_reason)


# ------------------------------------------------------------------------------------ State file


class MemoryUse(NamedTuple):
    """What the state of a conversation takes of the memory."""

    # What each token adds.
    bytes_per_token: int
    # What windows and recurrent layers take at most, however long the conversation is.
    fixed_bytes: int

    def capacity_tokens(self, memory_bytes: int) -> int | None:
        """Return how many tokens fit into so much memory; None if the state does not grow.

        However much the layers of a fixed size take, half is left to those that grow.
        """
        if not self.bytes_per_token:
            return None
        growing_bytes = max(memory_bytes - self.fixed_bytes, memory_bytes // 2)
        return growing_bytes // self.bytes_per_token


# Two lengths between which the growth of a cache of a model's own class is measured.
MEASURED_TOKENS = (512, 1024)


def state_arrays(leaf: Any) -> list[Any]:
    """Return the arrays with rows for tokens that one layer's cache holds."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(vars(leaf))
    return [value for _, value in flat if isinstance(value, mx.array) and value.ndim > 1]


def leaves_after(network: Any, tokens: int) -> list[Any]:
    """Return the caches of all layers as so many tokens leave them.

    MLX is lazy: this gives every array its shape, and computes nothing.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    layers = make_prompt_cache(network)
    network(mx.zeros((1, tokens), mx.int32), cache=layers)
    return cache_leaves(layers)


def known_memory_use(leaf: Any) -> MemoryUse:
    """Return what one of mlx-lm's own caches takes, from its state after one token."""
    # An array has room for more tokens than it holds: its second last axis.
    arrays = [(array.nbytes // array.shape[-2], array.shape[-2]) for array in state_arrays(leaf)]
    if not needs_copy(leaf):
        return MemoryUse(sum(row_bytes for row_bytes, _ in arrays), 0)
    window = window_tokens(leaf)
    size = 0
    for row_bytes, rows in arrays:
        # While a prompt is read, a window also holds the tokens of one step.
        size += row_bytes * (window + PREFILL_STEP_TOKENS if window else rows)
    return MemoryUse(0, MAX_COPIES * size)


def measured_memory_use(shorter: Any, longer: Any) -> MemoryUse:
    """Return what a cache of a model's own class takes, from its state at both lengths."""
    shorter_bytes, longer_bytes = (
        sum(array.nbytes for array in state_arrays(leaf)) for leaf in (shorter, longer)
    )
    added_tokens = MEASURED_TOKENS[1] - MEASURED_TOKENS[0]
    bytes_per_token = (longer_bytes - shorter_bytes) // added_tokens
    fixed_bytes = max(0, longer_bytes - bytes_per_token * MEASURED_TOKENS[1])
    return MemoryUse(MAX_COPIES * bytes_per_token, MAX_COPIES * fixed_bytes)


def memory_per_token(network: Any) -> MemoryUse:
    """Return what the state of a conversation takes of the memory. Raises `EngineError`."""
    from mlx_lm.models import cache

    with explain_errors(
        ENGINE_FAILED_WHAT, ENGINE_FAILED_ADVICE, Exception, error_type=EngineError
    ):
        leaves = leaves_after(network, 1)
        if all(type(leaf).__module__ == cache.__name__ for leaf in leaves):
            uses = list(map(known_memory_use, leaves))
        else:
            lengths = (leaves_after(network, tokens) for tokens in MEASURED_TOKENS)
            uses = list(map(measured_memory_use, *lengths))
    return MemoryUse(sum(use.bytes_per_token for use in uses), sum(use.fixed_bytes for use in uses))


class StateFile:
    """The engine's state of a conversation on disk, beside its session.

    The state is large, changes no word, and can be computed again: it is only used if it is of the
    same model and of use for the prompt.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """`fingerprint` names all that a state depends on beside its tokens."""
        self._path = path
        self._fingerprint = fingerprint

    def save(self, cache: PromptCache) -> None:
        """Write the state to a file of mode 0600, whole or not at all. Raises `OSError`.

        It is not written if it would take more than half of what is free on the disk.
        """
        from mlx_lm.models import cache as mlx_cache

        # The name is fixed, so that what a killed process leaves is replaced by the next save.
        part = self._path.with_name(f"{self._path.name}.part.safetensors")
        part.unlink(missing_ok=True)
        if not cache.tokens:
            return
        if not all(hasattr(mlx_cache, type(layer).__name__) for layer in cache.layers):
            raise OSError(errno.ENOTSUP, "mlx-lm can't load the state of this model again")
        leaves = cache_leaves(cache.layers)
        size = sum(array.nbytes for leaf in leaves for array in state_arrays(leaf))
        if shutil.disk_usage(part.parent).free < 2 * size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part.touch(0o600, exist_ok=False)
        try:
            metadata = {"model": self._fingerprint, "tokens": json.dumps(cache.tokens)}
            mlx_cache.save_prompt_cache(str(part), cache.layers, metadata)
            part.replace(self._path)
        except RuntimeError as error:
            # MLX's own error for a file that can't be written.
            raise OSError(errno.EIO, error_text(error)) from error
        finally:
            part.unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        """Return whether the file is there, and not cut: MLX before 0.30 would load a cut one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, "np"):
                return True
        except (SafetensorError, OSError):
            return False

    def load(self, cache: PromptCache, prompt: Sequence[int]) -> None:
        """Put the saved state into an empty cache, if it is of use for this prompt.

        A file that is missing or damaged is passed over: all can be computed again.
        """
        from mlx_lm.models import cache as mlx_cache

        if not self._is_whole():
            return
        engine: Any = mlx_cache
        try:
            # MLX reads the arrays only when they are used.
            layers, metadata = engine.load_prompt_cache(str(self._path), return_metadata=True)
            tokens = json.loads(metadata["tokens"])
            if metadata["model"] != self._fingerprint or len(layers) != len(cache.layers):
                return
            prefix_length = common_prefix(tokens, prompt[:-1])
            # To read a state takes a small part of the time that it takes to compute it, but not
            # none. A cache that can't be trimmed is of use only as a whole.
            least_length = len(tokens) / 8 if cache.can_trim else len(tokens)
            if prefix_length >= least_length:
                cache.replace(tokens, layers)
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
            cache.clear()


# -------------------------------------------------------------------------------------- Thoughts


class Piece(NamedTuple):
    """A streamed unit of a reply: `thought` or `answer`, the model's words, or another kind.

    `prefill` tells how much of the prompt is computed, `waiting` that a reply may be stopped here,
    and a `notice` is a remark of the program. `unclosed` comes last if all that was shown as a
    thought may be the answer, and repeats it.
    """

    kind: str
    text: str


# Where a splitter is in a reply. Before the first mark or word, and between thought and answer,
# nothing is shown.
START = "start"
THOUGHT = "thought"
BETWEEN = "between"
ANSWER = "answer"

# Contents in blocks of types that templates read (Ministral's, Apertus').
BLOCKS = {
    "thinking blocks": ("thinking", "thinking", "text"),
    "thoughts blocks": ("thoughts", "text", "response"),
}

# What looks like a special token, whether or not the tokenizer has it.
TOKEN_LIKE = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z _]{1,40}\]")

# A header with words between two tokens has at least so many parts.
MIN_HEADER_PARTS = 3
# The most characters that a header has beyond those that the template writes.
MAX_FURTHER_CHARACTERS = 100


def split_mark(mark: str) -> list[str]:
    """Return the special tokens of a mark and the words between them, without spaces around.

    `<|start|>assistant<|message|>` has the parts `<|start|>`, `assistant` and `<|message|>`.
    """
    parts = re.split(f"({TOKEN_LIKE.pattern})", mark)
    return [part.strip() for part in parts if part.strip()]


def split_marks(text: str) -> list[list[str]]:
    """Return the marks that a template writes one after another, each as its parts.

    A mark ends where one special token follows another: `<|end|><|start|>assistant<|message|>` is
    the mark `<|end|>`, and a mark with the parts `<|start|>`, `assistant` and `<|message|>`.
    """
    marks: list[list[str]] = []
    before = ""
    for part in split_mark(text):
        if not marks or (TOKEN_LIKE.fullmatch(before) and TOKEN_LIKE.fullmatch(part)):
            marks.append([])
        marks[-1].append(part)
        before = part
    return marks


def mark_words(parts: Iterable[str]) -> set[str]:
    """Return the words of a mark that stand outside of its special tokens."""
    return {word for part in parts if not TOKEN_LIKE.fullmatch(part) for word in part.split()}


def match_mark(parts: Sequence[str], text: str, *, further_words: bool = False) -> int | None:
    """Return the length of a mark that a text begins with: 0 if none, None if one may come.

    Spaces may stand between the parts of the mark. If it may have further words, they stand before
    its last part: `<|channel|>final <|constrain|>json<|message|>` is `<|channel|>final<|message|>`.
    """
    length = 0
    for number, part in enumerate(parts, 1):
        rest = text[length:].lstrip() if length else text
        if further_words and number == len(parts) >= MIN_HEADER_PARTS:
            words = rest.partition(part)[0]
            if "\n" in words or len(words) > MAX_FURTHER_CHARACTERS:
                return 0
            if part not in rest:
                return None
            rest = rest[len(words) :]
        if part.startswith(rest) and part != rest:
            return None
        if not rest.startswith(part):
            return 0
        length = len(text) - len(rest) + len(part)
    return length


def message_with_thought(field: str, thought: str, answer: str) -> dict[str, Any]:
    """Return content and thought of a reply as a template takes them: in a field, or in blocks."""
    if field in BLOCKS:
        kind, thought_key, answer_kind = BLOCKS[field]
        blocks = [{"type": answer_kind, "text": answer}]
        if thought:
            blocks.insert(0, {"type": kind, thought_key: thought})
        return {"content": {"blocks": blocks} if kind == "thoughts" else blocks}
    if thought and field not in ("", "content"):
        return {"content": answer, field: thought}
    return {"content": answer}


class ThoughtFormat(NamedTuple):
    """The marks around a thought and an answer, and where the template takes a thought back.

    A reply is `thought_start` thought `thought_end` `answer_start` answer `answer_end`, or without
    the first three. Without a `thought_start` it just begins with the thought. The field is one of
    the message, one of `BLOCKS`, `content`, or none: then the template leaves old thoughts out.
    """

    thought_start: str = ""
    thought_end: str = ""
    answer_start: str = ""
    answer_end: str = ""
    thought_field: str = ""

    @property
    def marks(self) -> list[str]:
        """The marks around a thought, without spaces around them."""
        return [mark.strip() for mark in self[:2] if mark.strip()]

    @property
    def end_of_thought(self) -> str:
        """The text that ends a thought and begins the answer."""
        if self.answer_start.strip() in self.thought_end:
            return self.thought_end
        return self.thought_end + self.answer_start

    @property
    def header_end(self) -> str:
        """The special token that ends a header, if the words of headers tell thought from answer.

        In `<|channel|>analysis<|message|>` and `<|channel|>final<|message|>` it is `<|message|>`.
        """
        *thought_words, thought_end = split_mark(self.thought_start) or [""]
        *answer_words, answer_end = split_mark(self.answer_start) or [""]
        if thought_words and answer_words and thought_end == answer_end:
            return thought_end
        return ""

    @property
    def next_message_start(self) -> list[str]:
        """The parts that the template writes between the end of a thought and the next header.

        In `<|end|><|start|>assistant` they are `<|start|>` and `assistant`.
        """
        parts = list(itertools.chain.from_iterable(split_marks(self.thought_end)[1:]))
        answer_start = split_mark(self.answer_start)
        if answer_start and parts[-len(answer_start) :] == answer_start:
            return parts[: -len(answer_start)]
        return parts

    def to_template_message(self, message: Message) -> dict[str, Any]:
        """Return a message in the form in which the template takes it."""
        if message["role"] != "assistant":
            return {"role": message["role"], "content": message["content"]}
        answer = self._break_up_marks(message["content"])
        thought = self._break_up_marks(message.get("reasoning_content", ""))
        if thought and self.thought_field == "content":
            # A stopped thought is closed too, or the template would take it for an answer.
            answer = self.thought_start + thought + self.end_of_thought + answer
        return {"role": "assistant", **message_with_thought(self.thought_field, thought, answer)}

    def _break_up_marks(self, text: str) -> str:
        """Return a text in which marks are broken up, so that the template cuts at none of them."""
        for part in itertools.chain.from_iterable(map(split_mark, self.marks)):
            # Anybody may write the words of a mark.
            if TOKEN_LIKE.fullmatch(part):
                text = text.replace(part, part[0] + TOKEN_BREAK + part[1:])
        return text


class FoundMark(NamedTuple):
    """How much text stands before a mark, how long the mark is, and the state that it leads to.

    With the length 0 there is no mark, but what stands after the text may become one.
    """

    text_length: int
    length: int = 0
    target: str = ""


# For each state of a splitter the marks that count in it, as their parts, and where each leads.
StateMarks = Dict[str, List[Tuple[List[str], str]]]


def marks_by_state(format: ThoughtFormat) -> StateMarks:
    """Return the marks that lead a splitter from one state to another."""
    start = split_mark(format.thought_start)
    answer_start = split_mark(format.answer_start)
    end, *_ = split_marks(format.thought_end) or [[]]
    turn = format.next_message_start
    marks: StateMarks = {
        START: [(start, THOUGHT), (end, BETWEEN), (answer_start, ANSWER)],
        THOUGHT: [(start, THOUGHT), (end, BETWEEN)],
        BETWEEN: [(answer_start, ANSWER), (turn + answer_start, ANSWER)],
        ANSWER: [],
    }
    if answer_start and TOKEN_LIKE.fullmatch(answer_start[0]):
        # A model may leave out the end of a thought.
        marks[THOUGHT] += [(turn + answer_start, ANSWER), (answer_start, ANSWER)]
    if turn:
        marks[BETWEEN].append((turn + start, THOUGHT))
    if turn and format.header_end:
        # Another message may follow an answer.
        marks[ANSWER].append((end + turn, BETWEEN))
    return {state: [pair for pair in pairs if pair[0]] for state, pairs in marks.items()}


def header_openings(format: ThoughtFormat) -> set[str]:
    """Return what headers begin with: their special tokens, or a word if no token comes before it.

    Of the header `<|channel|>final<|message|>` these are `<|channel|>`, `final<|message|>` and
    `<|message|>`. The word `final` alone is none: an answer may begin with it.
    """
    headers = [split_mark(format.thought_start), split_mark(format.answer_start)]
    openings = {format.header_end}
    for header in headers:
        openings.update(word + format.header_end for word in mark_words(header))
    for parts in (*headers, format.next_message_start):
        openings.update(filter(TOKEN_LIKE.fullmatch, parts[:1]))
    return openings


class ThoughtSplitter:
    r"""Splits streamed text into thought and answer. A mark may arrive in several pieces.

    It is a state machine, which shows text in two of its states:

        <think>   Let me see.   </think>   \n\n   Paris.
        START --> THOUGHT ----> BETWEEN -------> ANSWER

    A mark leads to another state; so does the first text that is not blank, in the two states that
    show nothing. Where the words of a header tell thought from answer, each message has a header:

        <|channel|>analysis<|message|>  Let me see.  <|end|>
        START ------------------------> THOUGHT ---> BETWEEN
                            <|start|>assistant<|channel|>final<|message|>  Paris.
                    BETWEEN ---------------------------------------------> ANSWER

    There a header of other words leads to ANSWER too, and so does text without a header.

    The mark that begins the answer leads from THOUGHT to ANSWER, unless the thought quotes it.
    """

    def __init__(self, format: ThoughtFormat, prefilled: str = "") -> None:
        """`prefilled` is the beginning of the reply that the prompt holds, such as `<think>`."""
        self._format = format
        self._marks = marks_by_state(format)
        start = split_mark(format.thought_start)
        answer_start = split_mark(format.answer_start)
        self._thought_words = mark_words(start) - mark_words(answer_start)
        self._header_openings = header_openings(format)
        # A prompt may end in words of a header, such as `<|start|>assistant`: more may follow.
        turn = format.next_message_start
        self._words_may_begin_header = bool(turn) and not TOKEN_LIKE.fullmatch(turn[-1])
        self._answer_end = split_mark(format.answer_end)
        # If a mark begins the answer, the mark that ends it counts only after some mark was seen.
        self._answer_may_end = not answer_start
        # The whole reply with its marks.
        self.text = ""
        self._state = START
        # Text that may still turn out to be a mark.
        self._pending = ""
        self._texts = {THOUGHT: "", ANSWER: ""}
        # No text has come since the last mark.
        self._part_is_empty = True
        # The reply itself has not opened the thought that it is in: it may be an answer.
        self.is_unclosed = False
        self._is_finished = False
        for _ in self.feed(prefilled):
            pass
        # What the prompt holds is not part of the message.
        self._texts = {THOUGHT: "", ANSWER: ""}
        self.is_unclosed = self._state == THOUGHT

    @property
    def state(self) -> str:
        """Where the reply is. A mark that begins the answer is no part of it."""
        return BETWEEN if self._state == ANSWER and self._part_is_empty else self._state

    def feed(self, text: str) -> Iterator[Piece]:
        """Take more of the reply; yield what is certain to be thought or answer."""
        self.text += text
        self._pending += text
        while True:
            mark = self._find_mark()
            if mark is None:
                self._begin_part_without_mark()
                continue
            yield from self._emit(mark.text_length)
            if not mark.length:
                return
            self._pending = self._pending[mark.length :]
            self._state = mark.target
            self._answer_may_end = True
            self._part_is_empty = True
            self.is_unclosed = False

    def finish(self) -> Iterator[Piece]:
        """Yield the rest at the end of a complete reply, but not what is left of a mark."""
        self._is_finished = True
        parts = itertools.chain.from_iterable(map(split_mark, self._format[:4]))
        left_of_marks = [part for part in parts if TOKEN_LIKE.fullmatch(part)]
        if self._answer_end:
            left_of_marks.append(self._format.answer_end.strip())
        if not self._pending.strip().startswith(tuple(left_of_marks)):
            if self._state in (START, BETWEEN):
                self._begin_part_without_mark()
            yield from self._emit(len(self._pending))
        if self._format.answer_end.isspace():
            # The template writes these spaces itself.
            self._texts[ANSWER] = self._texts[ANSWER].removesuffix(self._format.answer_end)

    def message(self) -> Message:
        """Return the answer, and the thought if there is one, as a message has them.

        A complete reply that never closes the thought which the prompt has opened is an answer.
        """
        thought = self._texts[THOUGHT].strip()
        if self._is_finished and self.is_unclosed:
            return {"content": thought}
        message = {"content": self._texts[ANSWER]}
        if thought:
            message["reasoning_content"] = thought
        return message

    def _find_mark(self) -> FoundMark | None:
        """Return the next mark in the pending text, or how much of it is certain to be text.

        None if it is text in a state that shows none.
        """
        mark = self._first_mark()
        if mark is None:
            return None
        is_blank = not self._pending[: mark.text_length].strip()
        if self._part_is_empty and is_blank and not mark.length:
            # These spaces may belong to words that are still to come.
            return FoundMark(0)
        return mark

    def _first_mark(self) -> FoundMark | None:
        """Return the first mark that counts in this state, or None as `_find_mark` does."""
        text = self._pending
        if self._state in (START, BETWEEN):
            mark = self._match_at(len(text) - len(text.lstrip())) or self._find_header()
            if mark is None and not text.strip():
                return FoundMark(0)
            return mark
        for index in range(len(text)):
            mark = self._match_at(index)
            if mark:
                return mark
        return FoundMark(len(text))

    def _match_at(self, index: int) -> FoundMark | None:
        """Return the mark that begins at an index of the pending text, or None if none can."""
        text = self._pending[index:]
        is_within_thought = self._pending[:index].strip() or not self._part_is_empty
        may_become_mark = self._may_end_answer(text)
        for parts, target in self._marks[self._state]:
            if self._state == target == THOUGHT and is_within_thought:
                # The mark that opens a thought is quoted here.
                continue
            length = match_mark(parts, text, further_words=bool(self._format.header_end))
            if length == 0:
                continue
            if self._state == THOUGHT and target == ANSWER and self._is_quoted(index):
                continue
            if length:
                return FoundMark(index, length, target)
            may_become_mark = True
        return FoundMark(index) if may_become_mark else None

    def _is_quoted(self, index: int) -> bool:
        """Tell if a thought talks about the mark at an index of the pending text.

        A quoted mark stands in a sentence after a space, after a sign of quotation, or in code. A
        model that goes on to its answer writes the mark right after the thought, or on a new line.
        """
        before = self._texts[THOUGHT] + self._pending[:index]
        # A whole header may be quoted, of which the mark is the last part.
        before = before.removesuffix("".join(self._format.next_message_start))
        is_within_code = before.count("```") % 2 == 1
        return is_within_code or before.lstrip().endswith((" ", "`", '"', "'", "(", "“"))

    def _find_header(self) -> FoundMark | None:
        """Return the header that the pending text begins with, whatever its words are."""
        end = self._format.header_end
        if not end or not self._may_begin_header(self._pending.strip()):
            return None
        header, is_complete, _ = self._pending.partition(end)
        if len(header) > MAX_FURTHER_CHARACTERS:
            return None
        if not is_complete:
            return FoundMark(0)
        is_thought = not self._thought_words.isdisjoint(mark_words(split_mark(header)))
        return FoundMark(0, len(header + end), THOUGHT if is_thought else ANSWER)

    def _may_begin_header(self, text: str) -> bool:
        """Tell if a text begins like a header, and not like an answer.

        After the prompt `<|start|>assistant`, the text ` to=user lang=en<|message|>` is a header,
        but `a=b holds <|message|>` is an answer.
        """
        if self._state == START and self._words_may_begin_header:
            text = re.sub(r"^(\w+=[^\s<]*\s*)+", "", text)
            if re.fullmatch(r"\w+", text):
                return True
        return any(
            text.startswith(opening) or opening.startswith(text)
            for opening in self._header_openings
        )

    def _may_end_answer(self, text: str) -> bool:
        """Tell if a text is the mark that ends an answer, or its beginning, and nothing follows."""
        if self._state != ANSWER or not self._answer_may_end or not self._answer_end:
            return False
        text = text.strip()
        return match_mark(self._answer_end, text) in (None, len(text))

    def _emit(self, length: int) -> Iterator[Piece]:
        """Yield so much of the pending text as a piece."""
        text = self._pending[:length]
        self._pending = self._pending[length:]
        if self._part_is_empty:
            text = self._strip_spaces_of_template(text)
            if not text.strip():
                return
        if self._state == ANSWER and self._part_is_empty and self._texts[ANSWER]:
            # The answer has several parts, such as a remark in gpt-oss's commentary channel.
            text = "\n\n" + text.lstrip("\n")
        self._part_is_empty = False
        self._texts[self._state] += text
        if text:
            yield Piece(self._state, text)

    def _begin_part_without_mark(self) -> None:
        """Go on to a thought, if replies just begin with one, or else to the answer."""
        if self._state == START and self._format.thought_end and not self._format.thought_start:
            self._state = THOUGHT
            self.is_unclosed = True
        else:
            self._state = ANSWER

    def _strip_spaces_of_template(self, text: str) -> str:
        """Return the beginning of a part without the spaces around the marks before it."""
        if self._format.thought_end:
            text = text.lstrip("\n")
        if self._format.answer_start.isspace():
            text = text.removeprefix(self._format.answer_start)
        return text


# The names of thoughts in fields, variables and marks, and the marks of an answer.
THOUGHT_WORD = re.compile("think|thought|reason", re.IGNORECASE)
TELLING_WORD = re.compile(f"{THOUGHT_WORD.pattern}|effort", re.IGNORECASE)
ANSWER_MARK = re.compile(r"\W*(BEGIN.|START_)?(FINAL.)?(response|answer)\W*", re.IGNORECASE)

# Where a variable is a number of tokens, these stand for words.
BUDGETS = {0: "none", 512: "low", 4096: "medium", 16384: "high"}


def words_beside(name: str, tree: Any) -> list[str]:
    """Return the words in quotes that a template's code has in one expression with a variable."""
    if tree is None:
        return []
    from jinja2 import nodes

    def names_in(node: Any) -> set[str]:
        found = {inner.name for inner in node.find_all(nodes.Name)}
        return found | {node.name} if isinstance(node, nodes.Name) else found

    # A template may give the value to a variable of its own first.
    names = {name}
    for assignment in tree.find_all(nodes.Assign):
        if names & names_in(assignment.node):
            names |= names_in(assignment.target)
    words: list[Any] = []
    for node in tree.find_all((nodes.Compare, nodes.Assign, nodes.Getitem, nodes.Call)):
        if names & names_in(node):
            for constant in node.find_all(nodes.Const):
                # Jinja makes one constant of a list of constants.
                is_list = isinstance(constant.value, (list, tuple))
                words += constant.value if is_list else [constant.value]
    words = [word for word in words if isinstance(word, str) and re.fullmatch(r"[\w-]+", word)]
    return list(dict.fromkeys(words))


def values_to_try(template: ChatTemplate) -> dict[str, list[Any]]:
    """Return the variables with telling names that a template reads, and values that it may know.

    These are true and false, and the words that the template's code has beside the variable:

        {%- if reasoning_effort not in ["none", "high"] %}
    """
    values: dict[str, list[Any]] = {}
    for name in sorted(filter(TELLING_WORD.search, template.variables)):
        values[name] = list(BUDGETS) if "budget" in name.lower() else [True, False]
        values[name] += words_beside(name, template.tree)
    return values


class TemplateProbe:
    """Asks a template by rendering a made-up conversation: an earlier turn, a question, a reply."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    @functools.cached_property
    def settings(self) -> list[dict[str, Any]]:
        """The ways in which to ask: as the template is, and with each variable for thoughts."""
        settings: list[dict[str, Any]] = [{}]
        for name, values in values_to_try(self.template).items():
            settings += [{name: value} for value in values]
        return settings

    def prompt(self, variables: dict[str, Any]) -> str:
        """Return what the template writes after the question for a reply to follow.

        It is empty if the template refuses the conversation, here and in all other answers.
        """
        return self._after_question("", [], variables)

    def reply(
        self,
        variables: dict[str, Any],
        field: str = "",
        thought: str = "",
        answer: str = PROBE_ANSWER,
        more: Sequence[Message] = (),
    ) -> str:
        """Return what the template writes after the question with a reply and more messages."""
        reply = {"role": "assistant", **message_with_thought(field, thought, answer)}
        return self._after_question(field, [reply, *more], variables)

    def before_answer(self, variables: dict[str, Any], more: Sequence[Message] = ()) -> str:
        """Return what the template writes between the question and an answer without a thought."""
        before, answer, _ = self.reply(variables, more=more).partition(PROBE_ANSWER)
        return before if answer else ""

    def _after_question(
        self, field: str, replies: Sequence[dict[str, Any]], variables: dict[str, Any]
    ) -> str:
        # Some templates treat the first reply unlike later ones.
        messages = [
            {"role": "user", "content": PROBE_EARLIER},
            {"role": "assistant", **message_with_thought(field, "", PROBE_EARLIER)},
            QUESTION,
            *replies,
        ]
        with contextlib.suppress(ChatError):
            text = self.template.render(messages, add_generation_prompt=not replies, **variables)
            return text.partition(PROBE_QUESTION)[2]
        return ""

    @functools.cached_property
    def instructions(self) -> str:
        """The whole prompt that the template makes of the question alone."""
        with contextlib.suppress(ChatError):
            return self.template.render([QUESTION])
        return ""

    @functools.cached_property
    def prompts(self) -> list[str]:
        """What the template writes after the question, in each of the ways in which to ask."""
        prompts = [self.prompt(variables) for variables in self.settings]
        return list(dict.fromkeys(filter(None, prompts)))

    @functools.cached_property
    def answer_headers(self) -> list[str]:
        """What the template writes before an answer without a thought, in each of the ways.

        The answer is the last message, or another question follows.
        """
        headers = []
        for variables in self.settings:
            headers.append(self.before_answer(variables))
            headers.append(self.before_answer(variables, more=[QUESTION]))
        return list(dict.fromkeys(filter(None, headers)))


def common_header(one: str, other: str) -> str:
    """Return what two texts begin with, up to the end of a whole mark.

    `<|open|>think<|sep|>` and `<|open|>response<|sep|>` have no mark in common, and neither do
    `<|START_TEXT|>` and `<|START_THINKING|>`.
    """
    length = common_prefix(one, other)
    for token in TOKEN_LIKE.finditer(one):
        is_within_token = token.start() < length < token.end()
        words = one[token.end() : length + 1]
        is_within_words = token.end() <= length and re.fullmatch(r"[^\s<]*\w", words) is not None
        if is_within_token or is_within_words:
            return one[: token.start()]
    return one[:length]


def possible_end_marks(mark: str) -> set[str]:
    """Return the marks that may close what a mark opens: `</think>`, `<|/think|>`, `<channel|>`."""
    marks = {mark[0] + "/" + mark[1:], mark.replace("<|", "<|/")}
    marks.add(re.sub(r"^<\|(.*[^|])>$", r"<\1|>", mark))
    for start, end in (("START", "END"), ("BEGIN", "END"), ("OPEN", "CLOSE"), ("PREFIX", "SUFFIX")):
        marks |= {mark.replace(start, end), mark.replace(start.lower(), end.lower())}
    return marks - {mark}


class ReplyEnd(NamedTuple):
    """What a template writes after an answer: marks, and the special token that ends the turn."""

    answer_end: str = ""
    token: str = ""


def reply_end(probe: TemplateProbe, format: ThoughtFormat) -> ReplyEnd:
    """Return what the template writes after an answer, up to a token that no part of a reply has.

    Of Kimi K3's template this is

        walnutshell<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>
        ` answer  '`------------------ answer_end ---------------'`-- token ---'
    """
    marks = [part for mark in format[:3] for part in split_mark(mark)]
    added = sorted(probe.template.added_tokens.values(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, added)) or "(?!)")
    for more in ([], [QUESTION]):
        text = probe.reply({}, more=more)
        after = text.partition(PROBE_ANSWER)[2].partition(PROBE_QUESTION)[0]
        if not pattern.match(after.lstrip()):
            continue
        for token in pattern.finditer(after):
            if token[0] not in marks:
                return ReplyEnd(after[: token.start()], token[0])
        if not more and not pattern.sub("", after).strip():
            return ReplyEnd(after)
    return ReplyEnd()


class ThoughtDetector:
    """Finds how a model marks its thoughts by rendering its template with made-up words.

    It knows no model by name.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._probe = TemplateProbe(template)
        tokenizer = template.tokenizer
        self._vocabulary_pair = ("", "")
        if tokenizer.has_thinking:
            self._vocabulary_pair = (str(tokenizer.think_start), str(tokenizer.think_end))
        added = template.added_tokens.values()
        # All in which the template and the vocabulary may name a mark.
        self._text = " ".join([template.source, *added, *self._vocabulary_pair])

    def detect(self) -> ThoughtFormat:
        """Return the format. If the model doesn't think, it tells at most what begins an answer."""
        if not THOUGHT_WORD.search(self._text):
            return ThoughtFormat(answer_start=self._plain_answer_start())
        found = self._from_message_field() or self._from_marks()
        if not found.thought_end:
            return ThoughtFormat(answer_start=self._plain_answer_start())
        end = reply_end(self._probe, found)
        return found._replace(answer_end=found.answer_end or end.answer_end)

    def _plain_answer_start(self) -> str:
        """Return what the template writes between a prompt and an answer: a space, or a mark.

        It writes a space for `[/INST] Paris`, which a model then writes itself.
        """
        prompt = self._probe.prompt({})
        header = self._probe.before_answer({})
        start = header[len(prompt) :] if prompt and header.startswith(prompt) else ""
        return start if start.isspace() or TOKEN_LIKE.search(start) else ""

    def _from_message_field(self) -> ThoughtFormat | None:
        r"""Find a field, or blocks of the content, that the template writes before the answer.

        With the field `reasoning_content` the probe of Qwen3's template ends in

            ...<|im_start|>assistant\n<think>\nthistledown\n</think>\n\nwalnutshell<|im_end|>
            `------- header --------'` start '` thought '`---- end ---'` answer  '
        """
        words = set(re.findall(r"\w+", self._probe.template.source))
        fields = sorted(filter(THOUGHT_WORD.search, words), key=lambda name: (-len(name), name))
        fields += [field for field in BLOCKS if field.split()[0] in words]
        for variables, field in itertools.product(self._probe.settings, fields):
            text = self._probe.reply(variables, field, PROBE_THOUGHT)
            before, thought, rest = text.partition(PROBE_THOUGHT)
            end, answer, _ = rest.partition(PROBE_ANSWER)
            # A template that knows no blocks may print them as a list of Python or JSON.
            is_printed_list = "'type'" in before or '"type"' in before
            if thought and answer and end.strip() and not is_printed_list:
                header = self._header(before)
                found = ThoughtFormat(before[len(header) :], end, thought_field=field)
                return self._with_answer_start(found, [header])
        return None

    def _header(self, before: str) -> str:
        r"""Return what stands before a reply, of what stands before its thought.

        Where a prompt leaves to the model whether it thinks, it goes as far as the prompt:

            ...<|im_start|>assistant\n<think>\n
            ...<|im_start|>assistant\n

        Otherwise it ends where the text parts from that before an answer without a thought:

            ...<|im_start|>assistant\n<think>\n
            ...<|im_start|>assistant\nwalnutshell

        If neither helps, the last mark begins the thought.
        """
        prompts = [prompt for prompt in self._probe.prompts if before.startswith(prompt)]
        prompts = [prompt for prompt in prompts if prompt.strip() != before.strip()]
        if prompts:
            return min(prompts, key=len)
        if before.strip() in [header.strip() for header in self._probe.answer_headers]:
            # No mark begins the thought.
            return before
        headers = [common_header(before, header) for header in self._probe.answer_headers]
        headers = [h for h in headers if h.strip() and h.strip() != before.strip()]
        if headers:
            return max(headers, key=len)
        starts = [token.start() for token in TOKEN_LIKE.finditer(before)]
        return before[: starts[-1]] if starts else before

    def _with_answer_start(self, found: ThoughtFormat, headers: Sequence[str]) -> ThoughtFormat:
        r"""Return a format with the mark that begins an answer without a thought, if there is one.

        One of the headers is what stands before a reply:

            ...<|start|>assistant to=user<|message|>walnutshell
            `------ header -----'`-- answer_start --'
        """
        for header, before in itertools.product(headers, self._probe.answer_headers):
            start = before[len(header) :]
            if before.startswith(header) and start and not any(m in start for m in found.marks):
                end = found.thought_end.removesuffix(start)
                return found._replace(
                    thought_end=end if end.strip() else found.thought_end, answer_start=start
                )
        return found

    def _from_marks(self) -> ThoughtFormat:
        """Look for marks with telling names, above all for those that count in a content."""
        formats = [self._with_spaces(start, end) for start, end in self._pairs()]
        for format in formats:
            if self._template_takes_in_content(format):
                found = format._replace(thought_field="content")
                return self._with_answer_start(found, self._probe.prompts)
        answer_start, answer_end = self._answer_marks()
        told = self._probe.instructions
        tells_of_thoughts = any(format.thought_start.strip() in told for format in formats)
        if answer_start and answer_start in told and not tells_of_thoughts:
            # Apriel is told to reason, and then to write [BEGIN FINAL RESPONSE].
            return ThoughtFormat("", answer_start, "", answer_end)
        if not formats:
            return ThoughtFormat()
        found = self._with_answer_start(formats[0], self._probe.prompts)
        return found._replace(
            answer_start=found.answer_start or answer_start, answer_end=answer_end
        )

    @functools.cached_property
    def _known_marks(self) -> list[str]:
        """All that looks like a mark in prompts, template and vocabulary."""
        texts = [*self._probe.prompts, self._probe.instructions, self._text]
        return list(dict.fromkeys(TOKEN_LIKE.findall(" ".join(texts))))

    def _answer_marks(self) -> tuple[str, str]:
        """Return marks around an answer by their names, such as `<response>` and `</response>`."""
        for start in filter(ANSWER_MARK.fullmatch, self._known_marks):
            ends = [mark for mark in self._known_marks if mark in possible_end_marks(start)]
            return start, ends[0] if ends else ""
        return "", ""

    def _pairs(self) -> list[tuple[str, str]]:
        r"""Return the pairs of marks that may stand around a thought, the likeliest first.

        A prompt may end in a thought that is closed already: `<|channel>thought\n<channel|>`.
        """
        pairs = []
        for prompt in self._probe.prompts:
            closed = re.search(rf"(({TOKEN_LIKE.pattern})\w*)\s*({TOKEN_LIKE.pattern})\s*$", prompt)
            if closed and closed[3] in possible_end_marks(closed[2]):
                pairs.append((closed[1], closed[3]))
            opened = re.search(rf"({TOKEN_LIKE.pattern})\s*$", prompt)
            if opened and not any(m in possible_end_marks(opened[1]) for m in self._known_marks):
                # Nothing names the mark that closes the thought.
                pairs.append((opened[1], opened[1][0] + "/" + opened[1][1:]))
        for mark in self._known_marks:
            starts = [start for start in self._known_marks if mark in possible_end_marks(start)]
            if not starts and mark[1] == "/":
                starts = [mark.replace("/", "", 1)]
            pairs += [(start, mark) for start in starts[:1]]
        if self._vocabulary_pair[0]:
            pairs.append(self._vocabulary_pair)
        return [pair for pair in dict.fromkeys(pairs) if THOUGHT_WORD.search(pair[0])]

    def _template_takes_in_content(self, format: ThoughtFormat) -> bool:
        """Tell if the template knows of thoughts in the content of a reply.

        It cuts them off an earlier reply. Or it repeats a reply just as the model writes it after a
        prompt, and can end a prompt with a thought that is closed.
        """
        content = format.thought_start + PROBE_THOUGHT + format.thought_end + PROBE_ANSWER
        more = [QUESTION, {"role": "assistant", "content": PROBE_EARLIER}, QUESTION]
        text = self._probe.reply({}, answer=content, more=more)
        if PROBE_ANSWER in text and PROBE_THOUGHT not in text:
            return True
        prompts = self._probe.prompts
        closes_thoughts = any(format.thought_end.strip() in prompt for prompt in prompts)
        return closes_thoughts and any(text.startswith(prompt + content) for prompt in prompts)

    def _with_spaces(self, start: str, end: str) -> ThoughtFormat:
        r"""Return a pair of marks with the spaces that belong to them.

        Prompts may tell that, by how they end:

            ...assistant\n<think>\n
            ...assistant\n<think>\n\n</think>\n\n

        Where no prompt tells, most models write them so.
        """
        prompts = self._probe.prompts
        if not any(prompt.endswith(f"{start}\n") for prompt in prompts):
            for prompt in prompts:
                closed = re.search(rf"(?:{re.escape(start)}(\s*))?{re.escape(end)}(\s*)$", prompt)
                if closed:
                    spaces = closed[1] or ""
                    half = len(spaces) // 2
                    return ThoughtFormat(start + spaces[half:], spaces[:half] + end + closed[2])
            if not end.startswith("</") or any(prompt.endswith(start) for prompt in prompts):
                return ThoughtFormat(start, end)
        return ThoughtFormat(start + "\n", "\n" + end + "\n\n")


def detect_thoughts(template: ChatTemplate) -> ThoughtFormat:
    """Return how a model marks its thoughts, by its template alone."""
    return ThoughtDetector(template).detect()


def end_of_turn_ids(template: ChatTemplate, format: ThoughtFormat) -> set[int]:
    """Return the tokens that end a reply: those named so, and what the template writes after it."""
    token = reply_end(TemplateProbe(template), format).token
    ids = {number for number, text in template.added_tokens.items() if text == token}
    return template.eos_token_ids | ids


def prefilled_reply(
    template: ChatTemplate, format: ThoughtFormat, ending: str, **variables: Any
) -> str:
    r"""Return the beginning of the reply that a prompt holds, by what ends the prompt.

    The template tells how it writes an answer without a thought, and one with a thought. A prompt
    that both may go on from holds nothing, unless it ends in the mark that opens the thought:

        ...<|im_start|>assistant\n
        ...<|im_start|>assistant\n<think>\n\n</think>\n\nwalnutshell
        ...<|im_start|>assistant\n<think>\nthistledown

    In any other prompt the first mark begins the reply.
    """
    if not format.marks:
        return ""
    probe = TemplateProbe(template)
    text = probe.reply(variables, format.thought_field, PROBE_THOUGHT)
    before_thought, thought, _ = text.partition(PROBE_THOUGHT)
    if thought and before_thought.strip() == ending.strip():
        return format.thought_start
    headers = [before_thought, probe.before_answer(variables)]
    if thought and all(header.strip().startswith(ending.strip()) for header in headers):
        return ""
    marks = [format.thought_start.strip(), format.answer_start.strip()]
    if len(split_marks(format.thought_end)) == 1:
        # What ends a message, and begins another one, may stand after the user's message too.
        marks.append(format.thought_end.strip())
    indices = [ending.find(mark) for mark in marks if mark and mark in ending]
    return ending[min(indices) :] if indices else ""


# Words for how much to think, from nothing to the most. Templates choose among them.
DEGREES = {
    **dict.fromkeys(("none", "off", "no", "disabled", "no_think", "nothink", "false"), 0),
    **dict.fromkeys(("minimal", "minimum", "min"), 1),
    "low": 2,
    **dict.fromkeys(("medium", "moderate", "normal"), 3),
    "high": 4,
    **dict.fromkeys(("xhigh", "very_high", "extra_high"), 5),
    **dict.fromkeys(("max", "maximum"), 6),
}

# What stands beside a word of thinking in the name of a variable that turns thinking off, or on.
NEGATION = re.compile(
    "no|non|not|un|off|without|never|hide"
    "|(disab|disallow|deactiv|suppress|skip|omi|stop|avoid|exclud|bypass|prevent|forbid)\\w*"
)
AFFIRMATION = re.compile(
    "on|do|is|has|with|want|should|must|show|mode|turn|deep|extended"
    "|(us|enabl|activ|allow|includ|add|forc|requir|support|start)(e|es|ed|ing|s|ate|ated)?"
)


def asks_to_think(name: str) -> bool | None:
    """Tell if a variable that is true asks to think, or not to, by the words of its name.

    None if the name has a word that could mean either, or two that turn thinking off.
    """
    words = re.split(f"_|(?:{TELLING_WORD.pattern})(?:ing|ed|s)?", name.lower())
    others = [word for word in words if word and not AFFIRMATION.fullmatch(word)]
    if not others:
        return True
    if len(others) == 1 and NEGATION.fullmatch(others[0]):
        return False
    return None


def degree_of(name: str, value: Any) -> int | None:
    """Return how much to think a value of a variable says, by `DEGREES`, or None."""
    if isinstance(value, str):
        return DEGREES.get(value.lower())
    if not isinstance(value, bool):
        return DEGREES[BUDGETS[value]]
    # A variable may be a degree by itself, as `low_effort` is.
    degrees = [DEGREES[word] for word in name.lower().split("_") if DEGREES.get(word)]
    return degrees[0] if value and degrees else None


class Choice(NamedTuple):
    """Variables for a template, and what they do to a prompt."""

    variables: dict[str, Any]
    # With 0 for each digit, as a template may write the time.
    prompt: str
    # Where a reply to the prompt starts: the state of a splitter.
    state: str
    # How much there is to think by `DEGREES`, if the variables say so.
    degree: int | None = None

    @property
    def thinks(self) -> bool:
        """The prompt opens a thought, or leaves to the model whether it thinks."""
        return self.state in (START, THOUGHT)


def nearest_choice(choices: Iterable[Choice], degree: int) -> Choice:
    """Return the choice of the nearest degree, and of two that are as near the higher one."""

    def distance(choice: Choice) -> tuple[int, int]:
        own = DEGREES["medium"] if choice.degree is None else choice.degree
        return abs(own - degree), -own

    return min(choices, key=distance)


class ThinkingOptions:
    """The ways to think that a template can be asked for, found by rendering a prompt in each.

    A value that the template refuses, or that changes nothing in the prompt, is none.
    """

    def __init__(self, template: ChatTemplate, format: ThoughtFormat) -> None:
        self._template = template
        self._format = format
        # The variables that turn thinking on, and off; None if it can't be turned off.
        self._on: dict[str, Any] = {}
        self._off: dict[str, Any] | None = None
        # For each variable that says how much to think, its choices.
        self._degrees: dict[str, list[Choice]] = {}
        # What the template does by itself.
        self._default = self._choice({})
        if self._default:
            values = values_to_try(template)
            choices = {name: self._choices(name, values[name]) for name in values}
            # In this order: how much to think is asked beside what turns thinking on (`_choice`
            # adds that), and a variable that says how much is no switch.
            for name in values:
                self._find_switch(self._default, choices[name])
            for name in values:
                self._find_degrees(name, values[name])
            for name in values:
                self._find_silent_switch(self._default, name, choices[name])

    def variables(self, think: bool | str | None) -> dict[str, Any]:
        """Return the variables that ask to think, not to, or how much; None asks for nothing."""
        if think is None:
            return {}
        if think is True:
            return self._on
        if think is False and self._off is not None:
            return self._off
        variables = dict(self._on)
        for name, choices in self._degrees.items():
            variables.pop(name, None)
            variables.update(nearest_choice(choices, DEGREES[think or "none"]).variables)
        return variables

    def note(self, think: bool | str | None) -> str:
        """Return a sentence on what the template can't be asked for, or nothing."""
        name = self._template.name
        thinks_by_itself = self._default is not None and self._default.thinks
        if think is None:
            return ""
        if not self._format.thought_end and not self._degrees and self._off is None:
            return f"{name} is no reasoning model: there is nothing to think, or not."
        if think is False and self._off is None:
            little = "; it is asked for little" if self._degrees else ""
            return f"{name} can't be told not to think{little}."
        if think and not self._on and not thinks_by_itself:
            return f"{name} can't be told to think."
        if isinstance(think, str) and not self._degrees:
            return f"{name} can't be told how much to think."
        return ""

    def _choice(self, variables: dict[str, Any], degree: int | None = None) -> Choice | None:
        """Return what variables do to a prompt, or None if the template refuses them."""
        with contextlib.suppress(ChatError):
            asked = {**self._on, **variables}
            prompt = self._template.render([QUESTION], **asked)
            ending = prompt.partition(PROBE_QUESTION)[2]
            prefilled = prefilled_reply(self._template, self._format, ending, **asked)
            state = ThoughtSplitter(self._format, prefilled).state
            return Choice(variables, re.sub(r"\d", "0", prompt), state, degree)
        return None

    def _choices(self, name: str, values: Iterable[Any]) -> list[Choice]:
        """Return the values of a variable that the template doesn't refuse."""
        choices = [self._choice({name: value}, degree_of(name, value)) for value in values]
        return [choice for choice in choices if choice]

    def _find_switch(self, default: Choice, choices: Sequence[Choice]) -> None:
        r"""Find the values of a variable for on and off, as the ends of prompts show.

        With `enable_thinking` true and false the prompt of Qwen3's template ends in

            ...<|im_start|>assistant\n
            ...<|im_start|>assistant\n<think>\n\n</think>\n\n
        """
        on = [choice for choice in choices if choice.thinks]
        off = [choice for choice in choices if not choice.thinks]
        if not (off if default.thinks else on):
            return
        self._off = self._off or {}
        if off:
            self._off.update(nearest_choice(off, DEGREES["none"]).variables)
        opened = [choice for choice in on if choice.state == THOUGHT]
        if not default.thinks or (opened and default.state == START):
            self._on.update(nearest_choice(opened or on, DEGREES["medium"]).variables)

    def _find_degrees(self, name: str, values: Sequence[Any]) -> None:
        """Find the values of a variable that say how much to think, where thinking is on."""
        ranked = self._choices(name, values) + self._usual_choices(name, values)
        ranked = [choice for choice in ranked if choice.degree is not None]
        choices = [choice for choice in ranked if choice.degree and choice.thinks]
        if not choices:
            return
        prompts = {choice.prompt for choice in ranked}
        default = None if name in self._on else self._choice({})
        if default and default.thinks and default.prompt not in prompts:
            prompts.add(default.prompt)
            # Without a value it thinks much, if the values say less, and otherwise some.
            most = max(choice.degree or 0 for choice in choices)
            has_only_little = most <= DEGREES["medium"]
            degree = DEGREES["high" if has_only_little else "medium"]
            choices.append(default._replace(degree=degree))
        if len(prompts) == 1:
            return
        self._degrees[name] = choices
        none = [choice for choice in ranked if choice.degree == 0 and choice.thinks]
        if none and self._off is None:
            # The end of the prompt doesn't show that this turns thinking off, but the word says so.
            self._off = none[0].variables
            if default and default.prompt == none[0].prompt:
                self._on.update(nearest_choice(choices, DEGREES["medium"]).variables)

    def _usual_choices(self, name: str, values: Sequence[Any]) -> list[Choice]:
        """Return the usual words for a variable that a template knows and does not name beside it.

        It does something else with them than with a made-up word, or it writes any word as it is.
        """
        made_up = self._choice({name: PROBE_ANSWER})
        words = [word for word in ("low", "medium", "high") if word not in values]
        choices = self._choices(name, words)
        if made_up is None or PROBE_ANSWER in made_up.prompt.lower():
            return choices
        return [choice for choice in choices if choice.prompt != made_up.prompt]

    def _find_silent_switch(self, default: Choice, name: str, choices: Sequence[Choice]) -> None:
        """Find a variable that turns thinking on and off by other instructions alone."""
        by_value = {choice.variables[name]: choice for choice in choices}
        if self._off is not None or not {True, False} <= set(by_value):
            return
        if name in self._degrees or degree_of(name, True):
            return
        on_value = asks_to_think(name)
        if on_value is None:
            return
        on = by_value[on_value]
        off = by_value[not on_value]
        if on.prompt != off.prompt:
            self._off = off.variables
            if default.prompt != on.prompt:
                self._on.update(on.variables)


# ---------------------------------------------------------------------------------- Conversation


# From this length on, the status line says how much of a prompt has been read.
LONG_PROMPT_TOKENS = 200

CONTEXT_FULL_MESSAGE = "The reply can't go on: it fills {}. /clear starts over."

# The most tokens of a reply outside of thought and answer: a model may generate blanks without end.
MAX_MARK_TOKENS = 64

# Below this a temperature counts as 0: mlx-lm divides by it, which would overflow a float32.
MIN_TEMPERATURE = 1e-3

# Two made-up prompts, and a made-up reply: what their renderings share does not depend on them.
MADE_UP_PROMPTS = ("a", "?")
MADE_UP_REPLY = {"role": "assistant", "content": "a"}


class PromptTooLongError(ChatError):
    """A prompt, with the files before it, leaves no room for a reply."""


@dataclasses.dataclass
class Statistics:
    """Token counts and times of one reply. Times count from the creation of this object on."""

    limit_tokens: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    thought_tokens: int = 0
    answer_tokens: int = 0
    time_to_first_token_s: float = 0.0
    total_s: float = 0.0
    # `stop`, `length` or `interrupted`; None if the reply failed, or has not ended.
    finish_reason: str | None = None
    started_s: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def used_tokens(self) -> int:
        """The number of tokens of the prompt and the reply."""
        return self.prompt_tokens + self.generation_tokens

    @property
    def remaining_tokens(self) -> int:
        """The number of tokens that the context still has room for."""
        return (self.limit_tokens or sys.maxsize) - self.used_tokens

    def count_token(self, state: str) -> None:
        """Count one generated token, which left the splitter in this state."""
        self.generation_tokens += 1
        self.total_s = time.perf_counter() - self.started_s
        if self.generation_tokens == 1:
            self.time_to_first_token_s = self.total_s
        if state == THOUGHT:
            self.thought_tokens += 1
        elif state == ANSWER:
            self.answer_tokens += 1

    @property
    def mark_tokens(self) -> int:
        """The number of generated tokens that are neither thought nor answer."""
        return self.generation_tokens - self.thought_tokens - self.answer_tokens

    @property
    def generation_tps(self) -> float:
        """Generated tokens per second, without the first, which belongs to the prefill."""
        decode_s = self.total_s - self.time_to_first_token_s
        decode_tokens = self.generation_tokens - 1
        if decode_tokens <= 0 or not decode_s:
            return 0.0
        return decode_tokens / decode_s

    def summary(self) -> str:
        """Return the statistics as one line of less than 80 columns."""
        new_tokens = self.prompt_tokens - self.cached_tokens
        if self.limit_tokens:
            context = f"{self.used_tokens / self.limit_tokens:.0%}"
        else:
            context = f"{self.used_tokens:,} tokens"
        return (
            f"{self.total_s:.1f} s · {self.generation_tps:.1f} tokens/s"
            f" · first {self.time_to_first_token_s:.2f} s"
            f" · {new_tokens:,} new, {self.cached_tokens:,} ready · context {context}"
        )


class Limit(NamedTuple):
    """The most tokens that a prompt and its reply may have together."""

    # None if nothing limits them.
    tokens: int | None
    # What sets the limit, for messages.
    description: str


class FittedPrompt(NamedTuple):
    """A prompt that leaves room for a reply."""

    # The index of the first message in it: those before are left out.
    first_sent: int
    tokens: list[int]
    # What the template writes after the last message.
    ending: str


class PreparedPrompt(NamedTuple):
    """A prompt whose state is computed, so that the reply can begin."""

    first_sent: int
    tokens: list[int]
    # How many of the tokens were computed before.
    cached_tokens: int
    # The part of the reply that the prompt already holds, for instance `<think>`.
    prefilled: str
    thought_format: ThoughtFormat
    # The length of the mark that ends a thought.
    end_of_thought_tokens: int
    limit: Limit


def with_system_prompt(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """Return the messages after the system prompt, if there is one."""
    if not system:
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


class Inference:
    """The half of a conversation that computes. All of it runs on the engine's thread.

    It knows no turns: it is given the messages that a prompt is made of. `Conversation` reaches it
    through `OnEngine` alone.
    """

    def __init__(self, model: Model, settings: Settings, notes: queue.SimpleQueue[str]) -> None:
        """`notes` takes the sentences for the user that come up while nobody waits for this."""
        self._model = model
        self._settings = settings
        self._hosts = model.hosts
        self._notes = notes
        self._cache = PromptCache(model.network, distributed=model.hosts.size > 1)
        # A state on disk that the next prompt may begin with; it is looked at once.
        self._state_file: StateFile | None = None
        # Set once `warm_up` has ended.
        self.is_warm = threading.Event()

    def release(self) -> None:
        """Free the memory of the model and of the conversation. This object is of no use then."""
        import mlx.core as mx

        vars(self).clear()
        gc.collect()
        mx.clear_cache()

    @functools.cached_property
    def thought_format(self) -> ThoughtFormat:
        """How the model marks its thoughts, which its template is asked for once."""
        template = self._model.template
        found = detect_thoughts(template)
        # What the template writes after an answer ends a reply too.
        template.tokenizer.eos_token_ids = end_of_turn_ids(template, found)
        return found

    @functools.cached_property
    def _thinking_options(self) -> ThinkingOptions:
        return ThinkingOptions(self._model.template, self.thought_format)

    def _think_variables(self) -> dict[str, Any]:
        """Return the variables that ask the template for the way to think that is set."""
        think = self._settings.think
        return {} if think is None else self._thinking_options.variables(think)

    @functools.cached_property
    def limit(self) -> Limit:
        """The most tokens that the model's context and the memory have room for."""
        context_length = self._model.context_length
        memory_tokens = None
        if self._model.memory_bytes is not None:
            memory_use = memory_per_token(self._model.network)
            # The hosts may hold different layers, and have to leave out the same turns.
            memory_tokens = self._hosts.broadcast(
                memory_use.capacity_tokens(self._model.memory_bytes)
            )
        if memory_tokens is None or (context_length and context_length <= memory_tokens):
            return Limit(context_length, f"the model's {context_length} tokens")
        return Limit(memory_tokens, f"this machine's memory (about {memory_tokens} tokens)")

    def warm_up(self, notes_memory: bool = True) -> None:
        """Ask the template and measure the memory, once; leave what the user should know as notes.

        A script that runs every night need not be told each time what the memory has room for.
        Raises `ChatError` if the template can't render a prompt at all.
        """
        if self.is_warm.is_set():
            return
        try:
            self._model.template.check()
            self._note_limits(notes_memory)
        finally:
            self.is_warm.set()

    def _note_limits(self, notes_memory: bool) -> None:
        note = self.thinking_note()
        if note:
            self._notes.put(note)
        if notes_memory and self.limit.tokens != self._model.context_length:
            self._notes.put(
                f"The memory has room for a conversation of about {self.limit.tokens} tokens."
            )

    def thinking_note(self) -> str:
        """Return a sentence on what the template can't do of the way to think, or nothing."""
        think = self._settings.think
        return "" if think is None else self._thinking_options.note(think)

    def count_tokens(self, text: str) -> int:
        """Return the size of a text. Raises `ChatError`."""
        return len(self._model.template.encode(text))

    def check_size(self, file: TextFile) -> None:
        """Raise `ChatError` if a file can't fit alone."""
        size = self.count_tokens(file.content)
        if self.limit.tokens and size > self.limit.tokens:
            raise ChatError(
                f"{file.name} has {size:,} tokens, and doesn't fit {self.limit.description}:"
                " nothing is added."
            )

    def seed(self, seed: int | None) -> None:
        """Make what is sampled from here on repeatable; None leaves it to chance.

        It is the same on all hosts, which have to choose the same tokens.
        """
        import mlx.core as mx

        mx.random.seed(self._hosts.broadcast(time.time_ns() if seed is None else seed))

    # The prompt

    def _rendered(self, messages: Sequence[Message]) -> Rendered:
        """Return what the model is fed of messages. Raises `ChatError`."""
        return self._model.template.fed(
            with_system_prompt(self._settings.system, messages),
            self.thought_format.to_template_message,
            **self._think_variables(),
        )

    def _prompt(self, messages: Sequence[Message], first_sent: int) -> FittedPrompt:
        rendered = self._rendered(messages[first_sent:])
        return FittedPrompt(first_sent, rendered.tokens, rendered.ending)

    def _fit(self, messages: Sequence[Message], first_sent: int) -> FittedPrompt:
        """Return the prompt that the messages from `first_sent` on make.

        If it leaves no room for a reply, the oldest turns are left out. Raises `ChatError` if not
        even the last turn fits.
        """
        prompt = self._prompt(messages, first_sent)
        limit = self.limit
        if limit.tokens is None:
            return prompt
        reserved = min(self._settings.max_tokens, limit.tokens // 4)
        if len(prompt.tokens) + reserved <= limit.tokens:
            return prompt
        # To leave out a turn shifts the tokens of all others, which are computed again. So it is
        # done seldom: each time until a quarter of the context is free.
        wanted_tokens = limit.tokens * 3 // 4 - reserved
        prompt = self._without_first_turns(messages, first_sent, wanted_tokens) or prompt
        size = len(prompt.tokens)
        if size + reserved <= limit.tokens:
            return prompt
        advice = "Shorten it"
        if size < limit.tokens:
            advice += " or lower max-tokens"
        if limit.tokens != self._model.context_length:
            advice += ", or start with --force"
        raise PromptTooLongError(
            f"The prompt is too long for {limit.description}: {size} tokens, with {reserved} kept"
            f" for the reply. {advice}."
        )

    def _without_first_turns(
        self, messages: Sequence[Message], first_sent: int, max_tokens: int
    ) -> FittedPrompt | None:
        """Return the prompt with as many turns as fit into so many tokens, at least with the last.

        None if there is only one turn.
        """
        candidates = range(first_sent + 2, len(messages), 2)
        # Bisection, because rendering and encoding are slow.
        while len(candidates) > 1:
            middle = len(candidates) // 2
            if len(self._prompt(messages, candidates[middle - 1]).tokens) <= max_tokens:
                candidates = candidates[:middle]
            else:
                candidates = candidates[middle:]
        if not candidates:
            return None
        return self._prompt(messages, candidates[0])

    def _shared_length(self, tokens: list[int], messages: Sequence[Message]) -> int:
        """Return how many of a prompt's tokens the next prompt will begin with as well.

        It begins with all of them only if the template repeats all of this one: not, for example,
        a thought that this one has opened.
        """
        next_prompt = {"role": "user", "content": MADE_UP_PROMPTS[0]}
        rendered = self._rendered([*messages, MADE_UP_REPLY, next_prompt])
        return common_prefix(tokens, rendered.tokens)

    def _load_state(self, tokens: list[int]) -> None:
        state_file = self._state_file
        self._state_file = None
        if state_file is not None:
            state_file.load(self._cache, tokens)

    def prepare(
        self, messages: Sequence[Message], first_sent: int
    ) -> Generator[Piece | PreparedPrompt, None, None]:
        """Compute the state of the prompt that these messages make.

        Yields notices and progress, and at last a `PreparedPrompt`. May be closed after any item.
        Raises `ChatError`.
        """
        prompt = self._fit(messages, first_sent)
        if prompt.first_sent > first_sent:
            yield self._left_out_notice(prompt.first_sent // 2)
        # Whoever gets this knows that the prompt fits, and that the state changes from here on.
        yield Piece("prefill", "")
        sent = messages[prompt.first_sent :]
        # The hosts' clocks differ, and a template may read the clock: rank 0's tokens count.
        tokens = self._hosts.broadcast(prompt.tokens)
        self._load_state(tokens)
        cached_tokens = self._cache.rewind(tokens)
        snapshot_at = 0
        if not self._cache.can_trim:
            snapshot_at = self._shared_length(tokens, sent)
        # The status line tells the length before the first step is through.
        steps = self._cache.prefill(tokens, snapshot_at)
        for done in itertools.chain([cached_tokens], steps):
            progress = ""
            if len(tokens) > LONG_PROMPT_TOKENS:
                progress = f"{done:,} of {len(tokens):,} tokens"
            yield Piece("prefill", progress)
        prefilled = prefilled_reply(
            self._model.template, self.thought_format, prompt.ending, **self._think_variables()
        )
        yield PreparedPrompt(
            prompt.first_sent,
            tokens,
            cached_tokens,
            prefilled,
            self.thought_format,
            self.count_tokens(self.thought_format.end_of_thought),
            self.limit,
        )

    def _left_out_notice(self, turns: int) -> Piece:
        subject = f"The first {turns} turns no longer fit"
        if turns == 1:
            subject = "The first turn no longer fits"
        return Piece("notice", f"{subject} {self.limit.description}: left out from here on.")

    def read_ahead(
        self,
        messages: Sequence[Message],
        first_sent: int,
        files: Sequence[str],
        beginning: str = "",
    ) -> Generator[None, None, None]:
        """Compute what is known of the next prompt: all that does not depend on what is typed.

        `files` stand before that prompt. `beginning` is what it may begin with: it is only computed
        where the state can be trimmed if it does not. May be closed after any step. Raises
        `ChatError`.
        """
        if beginning and not self._cache.can_trim:
            return
        try:
            self.warm_up()
        except ChatError as error:
            self._notes.put(str(error))
            return
        yield
        prompts = []
        for made_up in MADE_UP_PROMPTS:
            content = "\n\n".join([*files, beginning + made_up])
            next_messages = [*messages, {"role": "user", "content": content}]
            prompts.append(self._fit(next_messages, first_sent))
            yield
        one, other = prompts
        tokens = one.tokens[: common_prefix(one.tokens, other.tokens)]
        self._load_state(tokens)
        yield
        if one.first_sent != other.first_sent or self._cache.has_computed(tokens):
            return
        self._cache.rewind(tokens)
        snapshot_at = 0
        if not self._cache.can_trim:
            sent = [*messages, {"role": "user", "content": MADE_UP_PROMPTS[0]}]
            snapshot_at = self._shared_length(tokens, sent[one.first_sent :])
            # No snapshot is needed at the end of what is known: the prompt begins with all of it.
            if snapshot_at >= len(tokens) - 1:
                snapshot_at = 0
        for _ in self._cache.prefill(tokens, snapshot_at, READ_AHEAD_STEP_TOKENS):
            yield

    # The reply

    def generate(self, tokens: list[int]) -> Generator[Token, None, None]:
        """Yield the tokens of a reply to a prepared prompt. Raises `EngineError`."""
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        settings = self._settings
        tokenizer = self._model.template.tokenizer

        def sampler(logprobs: Any) -> Any:
            # It is made for each token, so that a changed setting reaches a continued reply. Only
            # the repetition penalty is that of the reply's beginning.
            temperature = settings.temperature
            if temperature < MIN_TEMPERATURE:
                temperature = 0.0
            # mlx-lm refuses a top_k that leaves nothing out.
            top_k = settings.top_k if settings.top_k < tokenizer.vocab_size else 0
            sample = make_sampler(
                temp=temperature, top_p=settings.top_p, min_p=settings.min_p, top_k=top_k
            )
            return sample(logprobs)

        penalty = None if settings.repetition_penalty == 1 else settings.repetition_penalty
        processors = make_logits_processors(repetition_penalty=penalty)
        return self._cache.stream(tokenizer, tokens, sampler=sampler, logits_processors=processors)

    def generate_answer(self, thought: str) -> Generator[Token, None, None]:
        """End this thought, which was being generated, as the model would; yield the answer."""
        end_of_thought = self.thought_format.end_of_thought
        tokens = self._cache.tokens + self._model.template.encode_after(thought, end_of_thought)
        for _ in self._cache.prefill(tokens, 0):
            pass
        yield from self.generate(tokens)

    def use_state_file(self, state_file: StateFile) -> None:
        """Look at this file for the state of the next prompt."""
        self._state_file = state_file

    def save_state(self, state_file: StateFile, messages: Sequence[Message]) -> None:
        """Write the state of the messages, up to where the next prompt will share it.

        Raises `OSError` or `ChatError`.
        """
        next_messages = [*messages, {"role": "user", "content": MADE_UP_PROMPTS[0]}]
        # A chat that is continued begins with all of its turns.
        self._cache.rewind(self._fit(next_messages, 0).tokens)
        state_file.save(self._cache)


@dataclasses.dataclass
class Generation:
    """A reply under way. A reply that was cut or stopped keeps it, so that it can be continued."""

    prompt: PreparedPrompt
    # The messages that it replies to.
    messages: list[Message]
    splitter: ThoughtSplitter
    tokens: EngineIterator[Token]
    # The tokens of the prompt and of the reply so far.
    used_tokens: int


# A piece without text, for each moment in which a reply may be stopped: while the engine works, and
# after all that came of one token.
WAITING_PIECE = Piece("waiting", "")


class Conversation:
    """The messages, and the model's replies to them. All of it runs on the main thread.

    Invariant: between two calls `messages` alternates user and assistant, and ends with an
    assistant's. A reply is a generator of pieces that works while it is consumed: to stop it, close
    it. If it fails, or is stopped before its first token, messages are what they were; stopped
    later, they keep what was generated. `messages` is replaced and never changed, so that the
    engine may still read an older list.
    """

    def __init__(
        self, engine: Engine, model: Model, settings: Settings, messages: Sequence[Message] = ()
    ) -> None:
        self._engine = engine
        self._settings = settings
        self.messages = list(messages)
        self.statistics = Statistics()
        # The last reply, if it can be continued: the engine still holds its state.
        self._unfinished: Generation | None = None
        # Messages before this one are not sent: they no longer fit.
        self._first_sent = 0
        # The messages before the last `clear`.
        self._before_clear: list[Message] = []
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._on_engine: OnEngine[Inference] | None = None
        self.use_model(model)

    # The model

    def use_model(self, model: Model) -> None:
        """Go on with this model, from the beginning or after `release_model`."""
        inference = self._engine.call(Inference, model, self._settings, self._notes)
        self._is_warm = inference.is_warm
        self._fingerprint = model.fingerprint
        # What did not fit the model before may fit this one.
        self._first_sent = 0
        self._on_engine = OnEngine(self._engine, inference)
        self.seed(self._settings.seed)

    @property
    def _inference(self) -> OnEngine[Inference]:
        if self._on_engine is None:
            raise ChatError("No model is loaded: /model NAME loads one.")
        return self._on_engine

    def wait_until_idle(self) -> None:
        """Wait until the engine has done all that it was asked for."""
        self._engine.call(lambda: None)

    def release_model(self) -> None:
        """Free the memory that the model and the state take; `use_model` is to follow."""
        if self._on_engine is None:
            return
        self._drop_unfinished()
        self._inference.call(lambda inference: inference.release())
        self._on_engine = None

    def seed(self, seed: int | None) -> None:
        """Make what is sampled from here on repeatable; None leaves it to chance."""
        self._inference.call(lambda inference: inference.seed(seed))

    def count_tokens(self, text: str) -> int:
        """Return the size of a text. Raises `ChatError`."""
        return self._inference.call(lambda inference: inference.count_tokens(text))

    def check_size(self, file: TextFile) -> None:
        """Raise `ChatError` if a file can't fit alone."""
        self._inference.call(lambda inference: inference.check_size(file))

    def thinking_note(self) -> str:
        """Return a sentence on what the template can't do of the way to think, or nothing."""
        return self._inference.call(lambda inference: inference.thinking_note())

    def warm_up(self, notes_memory: bool) -> None:
        """Do what `Inference.warm_up` does. Raises `ChatError` if the template fails."""
        self._inference.call(lambda inference: inference.warm_up(notes_memory))

    def wait_until_warm(self, timeout_s: float) -> None:
        """Wait for the end of `warm_up` in another thread, but not longer than this."""
        self._is_warm.wait(timeout_s)

    def take_notes(self) -> list[str]:
        """Return the sentences for the user that came up since the last time."""
        notes = []
        while not self._notes.empty():
            notes.append(self._notes.get())
        return notes

    # The state

    @contextlib.contextmanager
    def read_ahead(self, files: Sequence[str]) -> Iterator[Callable[[str], None]]:
        """Compute what is known of the next prompt, with these files before it, during a block.

        Yields a function that takes a text with which the prompt will most likely begin, and that
        any thread may call. A reply that can be continued keeps its state instead.
        """
        if self._unfinished or self._on_engine is None:
            yield lambda beginning: None
            return
        messages = self.messages
        first_sent = self._first_to_send(messages)
        with self._inference.meanwhile() as run:

            def read(beginning: str) -> None:
                run(lambda each: each.read_ahead(messages, first_sent, files, beginning))

            read("")
            yield read

    def load_state(self, path: Path) -> None:
        """Have the next prompt begin with the state in this file, if it is of use."""
        state_file = StateFile(path, self._fingerprint)
        self._inference.call(lambda inference: inference.use_state_file(state_file))

    def save_state(self, path: Path) -> None:
        """Write the engine's state to disk, or remove the file if there is no conversation.

        Raises `OSError` or `ChatError`.
        """
        self._drop_unfinished()
        if not self._engine.is_idle_within(MAX_LEAVE_WAIT_S):
            raise ChatError("The engine is still at work")
        messages = self.messages
        if not messages:
            path.unlink(missing_ok=True)
            return
        # A prompt without history begins with none of it.
        if self._settings.history:
            state_file = StateFile(path, self._fingerprint)
            self._inference.call(lambda inference: inference.save_state(state_file, messages))

    # Turns

    def reply(
        self, prompt: str, before: Sequence[Message] | None = None
    ) -> Generator[Piece, None, None]:
        """Yield the reply to `prompt`, after all messages or those `before`. Raises `ChatError`."""
        earlier = self.messages if before is None else before
        self.statistics = Statistics()
        generation = yield from self._start_reply([*earlier, {"role": "user", "content": prompt}])
        yield from self._finish_reply(generation)

    def retry(self) -> Generator[Piece, None, None]:
        """Yield another reply to the last prompt, in place of the last one. Raises `ChatError`."""
        if not self.messages:
            raise ChatError("There is no reply to generate again.")
        *before, prompt, _ = self.messages
        return self.reply(prompt["content"], before)

    def continue_reply(self, end_thought: bool = False) -> Generator[Piece, None, None]:
        """Continue the last reply, which was cut or stopped; with `end_thought` by its answer.

        Raises `ChatError`.
        """
        if not self.messages:
            raise ChatError("There is nothing to continue.")
        if "finish_reason" not in self.messages[-1]:
            raise ChatError("There is nothing to continue: the last reply is complete.")
        generation = self._unfinished
        if generation is None:
            raise ChatError("That reply can't be continued any more: /retry generates it again.")
        limit = generation.prompt.limit
        used_tokens = generation.used_tokens
        self.statistics = Statistics(limit.tokens, used_tokens, used_tokens)
        if end_thought:
            yield from self._take_computed_token(generation)
            if generation.splitter.state != THOUGHT:
                raise ChatError("There is no thought to end: /continue goes on with the answer.")
        needed_tokens = generation.prompt.end_of_thought_tokens if end_thought else 0
        if limit.tokens and used_tokens + needed_tokens >= limit.tokens:
            raise ChatError(CONTEXT_FULL_MESSAGE.format(limit.description))
        if end_thought:
            self._end_thought(generation)
        yield from self._finish_reply(generation)

    def undo(self) -> str:
        """Take the last turn back and return its prompt; if there is none, take `clear` back.

        Returns nothing in the second case. Raises `ChatError` if there is nothing to take back.
        """
        if self.messages:
            *messages, prompt, _ = self.messages
            self._replace_messages(messages)
            return prompt["content"]
        if not self._before_clear:
            raise ChatError("There is no turn to take back.")
        self._replace_messages(self._before_clear)
        self._before_clear = []
        return ""

    def clear(self) -> None:
        """Start over. The engine's state stays: the new conversation may start the same way."""
        if self.messages:
            self._before_clear = self.messages
        self._replace_messages([])

    def _replace_messages(self, messages: list[Message]) -> None:
        self.messages = messages
        # Turns that were left out may fit again.
        self._first_sent = 0
        self._drop_unfinished()

    def _drop_unfinished(self) -> None:
        if self._unfinished:
            self._unfinished.tokens.close()
            self._unfinished = None

    # A reply

    def _first_to_send(self, earlier: Sequence[Message]) -> int:
        """Return the index of the first message that a prompt after these is made of."""
        # Without history a prompt stands alone.
        return self._first_sent if self._settings.history else len(earlier)

    def _start_reply(self, messages: list[Message]) -> Generator[Piece, None, Generation]:
        """Have the engine compute the state up to where the reply to these messages begins."""
        prompt = yield from self._prepare(messages)
        self.statistics.limit_tokens = prompt.limit.tokens
        self.statistics.prompt_tokens = len(prompt.tokens)
        self.statistics.cached_tokens = prompt.cached_tokens
        splitter = ThoughtSplitter(prompt.thought_format, prompt.prefilled)
        tokens = self._inference.each(lambda inference: inference.generate(prompt.tokens))
        return Generation(prompt, messages, splitter, tokens, len(prompt.tokens))

    def _prepare(self, messages: list[Message]) -> Generator[Piece, None, PreparedPrompt]:
        first_sent = self._first_to_send(messages[:-1])
        steps = self._inference.each(lambda inference: inference.prepare(messages, first_sent))
        with contextlib.closing(steps):
            for step in steps:
                if isinstance(step, PreparedPrompt):
                    return step
                if step is not WAITING:
                    # The engine gives up the state that an earlier reply would go on from.
                    self._drop_unfinished()
                    yield step
                yield WAITING_PIECE
        raise AssertionError("the last step is a PreparedPrompt")

    def _finish_reply(self, generation: Generation) -> Generator[Piece, None, None]:
        """Yield the pieces of a reply, and store it however it ends, unless the engine fails."""
        statistics = self.statistics
        # It can be continued again once it has been stopped again.
        self._unfinished = None
        try:
            yield from self._generate(generation)
        except (GeneratorExit, KeyboardInterrupt):
            # The consumer has closed this to stop the reply, or a signal ends the program.
            statistics.finish_reason = statistics.finish_reason or "interrupted"
            raise
        finally:
            # Without a reason the engine has failed.
            if statistics.finish_reason:
                self._end_reply(generation, statistics.finish_reason)

    def _generate(self, generation: Generation) -> Generator[Piece, None, None]:
        statistics = self.statistics
        settings = self._settings
        splitter = generation.splitter
        end_of_thought_tokens = generation.prompt.end_of_thought_tokens
        while True:
            token = yield from self._next_token(generation)
            if token is None:
                return
            yield from self._split(generation, token)
            if token.finish_reason:
                statistics.finish_reason = token.finish_reason
                yield from splitter.finish()
                if splitter.is_unclosed:
                    yield Piece("unclosed", splitter.message()["content"])
                continue
            # 0 is no limit.
            thought_is_full = (
                splitter.state == THOUGHT
                and 0 < settings.max_thought_tokens <= statistics.thought_tokens
            )
            needed_tokens = end_of_thought_tokens if thought_is_full else 0
            if (
                statistics.remaining_tokens <= needed_tokens
                or statistics.answer_tokens >= settings.max_tokens
                or statistics.mark_tokens > MAX_MARK_TOKENS
            ):
                statistics.finish_reason = "length"
                return
            if thought_is_full:
                tokens = counted(statistics.thought_tokens, "token")
                yield Piece("notice", f"Thought enough: {tokens}; the answer begins.")
                self._end_thought(generation)
            yield WAITING_PIECE

    def _next_token(self, generation: Generation) -> Generator[Piece, None, Token | None]:
        """Wait for the next token, and return it; None at the end of the reply."""
        for token in generation.tokens:
            if token is not WAITING:
                return token
            yield WAITING_PIECE
        return None

    def _split(self, generation: Generation, token: Token) -> Generator[Piece, None, None]:
        """Count a token, and yield what is certain to be thought or answer."""
        pieces = list(generation.splitter.feed(token.text))
        self.statistics.count_token(generation.splitter.state)
        generation.used_tokens += 1
        # Whoever stops the reply here has got the token: it is counted and stored.
        yield from pieces

    def _take_computed_token(self, generation: Generation) -> Generator[Piece, None, None]:
        """Yield the token that the engine was computing when the reply was stopped, if it was."""
        if generation.tokens.is_computing:
            token = yield from self._next_token(generation)
            if token is None or token.finish_reason:
                self._drop_unfinished()
                raise ChatError("The reply has just ended by itself: /retry generates another one.")
            yield from self._split(generation, token)

    def _end_thought(self, generation: Generation) -> None:
        """End the thought as the model would have: feed it the mark, and go on with the answer."""
        generation.tokens.close()
        thought = generation.splitter.text
        for _ in generation.splitter.feed(generation.prompt.thought_format.end_of_thought):
            pass
        generation.used_tokens += generation.prompt.end_of_thought_tokens
        self.statistics.prompt_tokens += generation.prompt.end_of_thought_tokens
        generation.tokens = self._inference.each(
            lambda inference: inference.generate_answer(thought)
        )

    def _end_reply(self, generation: Generation, finish_reason: str) -> None:
        """Store a reply. If nothing was added to it, keep it if it was continued, or drop it."""
        was_continued = generation.used_tokens > len(generation.prompt.tokens)
        if self.statistics.generation_tokens:
            self._store_reply(generation, finish_reason)
        elif was_continued:
            self._unfinished = generation
        else:
            generation.tokens.close()

    def _store_reply(self, generation: Generation, finish_reason: str) -> None:
        message = {"role": "assistant", **generation.splitter.message()}
        if finish_reason != "stop":
            message["finish_reason"] = finish_reason
            self._unfinished = generation
        # Without history nothing was left out for lack of room: the next prompt starts over.
        if self._settings.history:
            self._first_sent = generation.prompt.first_sent
        self.messages = [*generation.messages, message]


# ---------------------------------------------------------------------------------------- Saving

CHATS_FOLDER = "~/.llmchat"
HISTORY_FILE = "~/.llmchat_history"

# The longest text that is taken from a file or from standard input: no model can take a longer one.
MAX_TEXT_BYTES = 1 << 24

# A longer session file is refused.
MAX_SESSION_BYTES = 1 << 28

# A message of a session that is nested deeper is refused: at about 1000 levels Python itself fails.
MAX_NESTING = 50

# The byte order marks that a text in UTF-16 begins with.
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STDIN_TOO_LARGE_MESSAGE = (
    f"Standard input holds more than {MAX_TEXT_BYTES} bytes: no model can take that."
)

# Standard input that has not ended after this time is said to be waited for.
STDIN_NOTICE_AFTER_S = 1.0
DAY_S = 24 * 60 * 60


def decode_text(data: bytes, first_line: int = 1) -> str:
    r"""Return the text that bytes hold: UTF-8, or UTF-16 with a byte order mark. Lines end in \n.

    Raises `ValueError`, which names the line, for what is no text; `first_line` is the number of
    the first one.
    """
    charset = "UTF-16" if data.startswith(UTF16_MARKS) else "UTF-8"
    try:
        text = data.decode(charset).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(error.encoding)
        line = first_line + before.count("\n")
        raise ValueError(f"line {line} is no {charset}") from error
    before, nul, _ = text.partition("\0")
    if nul:
        line = first_line + before.count("\n")
        raise ValueError(f"line {line} holds a NUL character")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def matching_files(pattern: str) -> list[str]:
    """Return the path itself if it is there, or else the files that match. Raises `ChatError`."""
    path = os.path.expanduser(pattern)
    if os.path.exists(path):
        return [path]
    names = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not names:
        raise ChatError(f"There is no file {shorten(pattern)}: nothing is added.")
    return names


class TextFile(NamedTuple):
    """A file that stands before a prompt, by the name that the user gave it."""

    name: str
    text: str

    @property
    def content(self) -> str:
        """What the model is sent of it."""
        return f"{self.name}:\n\n{self.text}"


def read_texts(patterns: Iterable[str]) -> dict[str, TextFile]:
    """Return the files that paths and patterns name.

    A file's real path is the key, so that the same file comes once. Raises `ChatError` if a file
    can't be read, or if all of them are too long together.
    """
    files: dict[str, TextFile] = {}
    total_bytes = 0
    for pattern in patterns:
        for name in matching_files(pattern):
            what = f"{shorten(name)} can't be read as text"
            with explain_errors(what, "Nothing is added.", OSError, ValueError):
                with open_plain_file(name) as file:
                    data = read_whole(file, MAX_TEXT_BYTES)
                text = decode_text(data).strip()
            total_bytes += len(data)
            if total_bytes > MAX_TEXT_BYTES:
                size = f"{MAX_TEXT_BYTES >> 20} MB"
                raise ChatError(f"The files are larger than {size} together: nothing is added.")
            files[os.path.realpath(name)] = TextFile(name, text)
    return files


def read_standard_input(stdin: TextIO, notice: Callable[[str], None]) -> str:
    """Return the text of standard input, up to its end. Raises `ChatError`."""
    data = bytearray()
    notice_at_s = time.monotonic() + STDIN_NOTICE_AFTER_S
    notice_given = False
    while len(data) <= MAX_TEXT_BYTES:
        wait_s = None if notice_given else max(0.0, notice_at_s - time.monotonic())
        if not select.select([stdin], [], [], wait_s)[0]:
            notice("Standard input is read up to its end: `< /dev/null` leaves it out.")
            notice_given = True
        elif part := os.read(stdin.fileno(), 1 << 20):
            data += part
        else:
            with explain_errors("Standard input is no text", "Convert it to UTF-8.", ValueError):
                return decode_text(bytes(data))
    raise ChatError(STDIN_TOO_LARGE_MESSAGE)


def one_shot_prompt(
    text: str,
    stdin: TextIO,
    launched: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> str:
    """Return the prompt that `-p TEXT` sends: standard input that is piped in goes before TEXT.

    If TEXT is `-`, standard input is the whole prompt. Raises `ChatError` if there is no text, or
    more than any model can take. `notice` is given a sentence if standard input does not end soon.
    """
    if re.search("[\ud800-\udfff]", text):
        raise ChatError("The text after -p is not encoded in UTF-8: convert it.")
    if launched and text == "-":
        raise ChatError(
            "mlx.launch never tells where standard input ends: give --prompt the text itself."
        )
    piped = ""
    if not (launched or stdin.isatty()):
        with stream_errors():
            piped = read_standard_input(stdin, notice).strip("\n")
    prompt = piped if text == "-" else "\n\n".join(part for part in (piped, text) if part)
    if not prompt.strip():
        raise ChatError("There is nothing to reply to: give -p a text, or pipe one in.")
    return prompt


class WaitingReader(io.RawIOBase):
    """Reads a descriptor, and waits for its data also if the descriptor is set not to block.

    Another process that shares the descriptor may set that at any time. Python's own streams would
    then take a pause for the end, and half a line for a whole one.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        """Tell that this can be read: Python's buffer asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what has come; return the number of bytes, 0 at the end."""
        while True:
            count: int | None = self._raw.readinto(buffer)
            if count is not None:
                return count
            select.select([self._raw], [], [])


def waiting_stream(stdin: TextIO) -> TextIO:
    """Return standard input as a stream that waits for its data: see `WaitingReader`."""
    raw: Any = getattr(stdin.buffer, "raw", stdin.buffer)
    return io.TextIOWrapper(io.BufferedReader(WaitingReader(raw)), stdin.encoding, stdin.errors)


class RefusedLineError(ChatError):
    """A line that is piped in can't be sent; `text` is what can be read of it."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class PipedLines:
    """Reads a chat that is piped in, line by line. A line that is no text is refused alone."""

    def __init__(self, stdin: TextIO) -> None:
        # Bytes: Python's own text stream would replace those that are no text, or stop at them.
        self._stream: Any = stdin.buffer
        self._lines_read = 0

    def read(self) -> str:
        r"""Return the next line with its \n, or nothing at the end.

        Raises `RefusedLineError`, or `ChatError` if that is said of the whole stream.
        """
        self._lines_read += 1
        if self._lines_read == 1:
            self._convert_utf16()
        data = self._stream.readline(MAX_TEXT_BYTES)
        if len(data) == MAX_TEXT_BYTES:
            beginning = data
            while data and not data.endswith(b"\n"):
                data = self._stream.readline(MAX_TEXT_BYTES)
            problem = f"Line {self._lines_read} is too long for any model: it is not sent."
            raise RefusedLineError(problem, (beginning + data).decode(errors="replace"))
        try:
            return decode_text(data, self._lines_read)
        except ValueError as error:
            problem = f"Standard input is no text: {error}. The line is not sent."
            raise RefusedLineError(problem, data.decode(errors="replace")) from error

    def _convert_utf16(self) -> None:
        """Read a stream of UTF-16 to its end, since its newlines can't be found byte by byte."""
        if self._stream.peek(2)[:2] not in UTF16_MARKS:
            return
        data = self._stream.read(MAX_TEXT_BYTES + 1)
        self._stream = io.BytesIO()
        if len(data) > MAX_TEXT_BYTES:
            raise ChatError(STDIN_TOO_LARGE_MESSAGE)
        with explain_errors("Standard input is no text", "Convert it to UTF-8.", ValueError):
            self._stream = io.BytesIO(decode_text(data).encode())


def copy_mode_and_owner(path: Path, file: io.FileIO) -> None:
    """Give a new file what the file that it replaces has. Raises `OSError`."""
    info = path.stat()
    os.fchmod(file.fileno(), info.st_mode & 0o777)
    # After sudo the user is still to have the file. Nobody but root can give files away.
    if os.geteuid() == 0:
        os.fchown(file.fileno(), info.st_uid, info.st_gid)


def replace_file(
    path: Path, data: bytes, *, locked: bool = False, not_before_s: float = 0.0
) -> io.FileIO:
    """Replace or create a file; return the new one, open. Raises `OSError`.

    The file holds either its old content or all of the new, whatever ends the program. It keeps
    its mode and its owner, and a new one is for the user alone. If it is to be `locked`, it is so
    before it has its name. It is dated now, or `not_before_s` if that is later.
    """
    # Replace the target of a symbolic link, not the link.
    path = path.resolve()
    # The name is fixed, so that what a killed process has left is replaced by the next save.
    temporary = path.with_name(f".llmchat-{zlib.crc32(os.fsencode(path.name)):08x}")
    temporary.unlink(missing_ok=True)
    file = open_plain_file(temporary, "x+")
    try:
        if path.exists():
            copy_mode_and_owner(path, file)
        with open(file.fileno(), "wb", closefd=False) as writer:
            writer.write(data)
        if time.time() < not_before_s:
            os.utime(file.fileno(), (not_before_s, not_before_s))
        os.fsync(file.fileno())
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.replace(path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    return file


def has_name(file: io.FileIO, path: Path) -> bool:
    """Tell if an open file still is the one at this path, and was not replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_private(path: Path) -> bool:
    """Tell if a plain file and its folder are the user's own, and nobody else can write to them."""
    try:
        file = path.lstat()
        folder = path.parent.stat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(file.st_mode) and all(
        info.st_uid == os.geteuid() and not info.st_mode & 0o022 for info in (file, folder)
    )


def user_name(uid: int) -> str:
    """Return the name of a user, or the number of one who has no name here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def access_problem(path: Path) -> str:
    """Return in words why the user can't keep a file or a folder here, or nothing."""
    # What is not there yet would be created in its folder.
    place = path if os.path.exists(path) else path.parent
    if not os.path.exists(place):
        return f"there is no folder {place}"
    owner = place.stat().st_uid
    # What root creates in the folder of a user, that user can't use later.
    if owner != os.geteuid() and (place == path or os.geteuid() == 0):
        return f"{place} belongs to {user_name(owner)}, and this is {user_name(os.geteuid())}"
    if not os.access(place, os.W_OK):
        return f"{place} can't be written to"
    return ""


def unsaved_warning(places: dict[str, Path]) -> str:
    """Return one warning about all that can't be saved in its place, or nothing."""
    problems = {what: access_problem(path) for what, path in places.items()}
    unsaved = [what for what, problem in problems.items() if problem]
    if not unsaved:
        return ""
    # The same home may be the reason for all.
    reasons = "; ".join(dict.fromkeys(problems[what] for what in unsaved))
    subject = " and ".join(unsaved).capitalize()
    return f"{subject} are not saved: {reasons}. Mend that, or start with --no-keep."


@contextlib.contextmanager
def temporary_draft(text: str) -> Iterator[Path]:
    """Give an editor a file with a text, in a folder of its own that nobody else can read.

    A shell waits until this program closes a pipe, and removes the folder then: so it is gone after
    the block, and also if the program is killed.
    """
    folder = tempfile.mkdtemp(prefix="llmchat-")
    remover = subprocess.Popen(
        ["sh", "-c", 'cat; rm -rf "$0"', folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What ends every process of the terminal is not to end this one.
        start_new_session=True,
    )
    try:
        draft = Path(folder, "prompt.md")
        draft.write_text(text, encoding="utf-8", errors="replace")
        yield draft
    finally:
        remover.communicate()


def as_lines(messages: Iterable[Message]) -> bytes:
    """Return messages as JSON Lines."""
    lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in messages]
    # A message may hold half of a surrogate pair, which UTF-8 can't.
    return "".join(lines).encode(errors="replace")


def as_markdown(messages: Iterable[Message]) -> bytes:
    """Return messages as Markdown to be read: thoughts are folded, control characters left out."""
    names = {"system": "System", "user": "You", "assistant": "Model"}
    parts = []
    for message in messages:
        parts.append(f"**{names[message['role']]}:**")
        if thought := message.get("reasoning_content"):
            parts.append(f"<details><summary>Thought</summary>\n\n{thought.strip()}\n\n</details>")
        parts.append(message["content"].strip())
    text = "\n\n".join(parts) + "\n\n"
    return strip_control_characters(text).encode(errors="replace")


def nesting_depth(value: object) -> int:
    """Return how many levels of lists and objects a JSON value has; text alone has none."""
    depth = 0
    level = [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
        ]
    return depth


def check_message(message: object, roles: Sequence[str]) -> None:
    """Raise `ValueError` if a JSON value is no message with one of the roles."""
    if not isinstance(message, dict) or message.get("role") not in roles:
        raise ValueError(f"this is no message with the role {' or '.join(roles)}")
    texts = (message.get("content"), message.get("reasoning_content", ""))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its content is no text")
    if nesting_depth(message) > MAX_NESTING:
        raise ValueError("it is nested too deep")


def parse_session(data: bytes) -> list[Message]:
    """Return the messages of JSON Lines with all their keys; blank lines are nothing.

    Raises `ValueError`, which names the line, for anything that is no conversation.
    """
    messages: list[Message] = []
    roles = ["system", "user"]
    for count, line in enumerate(decode_text(data).split("\n"), 1):
        if not line.strip():
            continue
        try:
            message = json.loads(line)
            check_message(message, roles)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {count}: {error_text(error)}") from error
        messages.append(message)
        roles = ["assistant"] if message["role"] == "user" else ["user"]
    return messages


class SessionInUseError(ChatError):
    """Another chat has the session file."""


class SessionFile:
    """A conversation on disk, one message a line; only one chat at a time has it.

    Invariant: the file holds exactly `messages`. It is written whole: no crash leaves half of it.
    """

    def __init__(self, path: Path, not_before_s: float = 0.0) -> None:
        """Open or create the file, and read it. No save dates it before `not_before_s`.

        Raises `ChatError`, with the file untouched, if it is no session.
        """
        self.path = path
        self._not_before_s = not_before_s
        with explain_errors(f"{path} can't be used as a session", "Name another file.", OSError):
            self._file = open_plain_file(path, "a+")
        try:
            self._lock()
            self.messages = self._read()
        except ChatError:
            self.close()
            raise
        self.modified = date_of(os.fstat(self._file.fileno()).st_mtime)

    @property
    def state_path(self) -> Path:
        """The file beside the session for the engine's state after the messages."""
        return self.path.with_name(f"{self.path.name}.state.safetensors")

    def _lock(self) -> None:
        what = f"{self.path} can't be locked"
        in_use = f"{self.path} is in use by another chat: name another file."
        with explain_errors(what, "Name a file on another disk.", OSError):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SessionInUseError(in_use) from error
            # The other chat may just have replaced the file.
            if not has_name(self._file, self.path):
                raise SessionInUseError(in_use)

    def _read(self) -> list[Message]:
        what = f"{self.path} is no session of llmchat"
        with explain_errors(what, "Name another file.", OSError, ValueError):
            return parse_session(read_whole(self._file, MAX_SESSION_BYTES))

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def save(self, messages: Sequence[Message]) -> None:
        """Make the file hold these messages; a crash leaves the old ones or these.

        Raises `ChatError`.
        """
        if messages == self.messages:
            return
        what = f"{self.path} could not be written"
        with explain_errors(what, "/save FILE writes it elsewhere.", OSError):
            lines = as_lines(messages)
            file = replace_file(self.path, lines, locked=True, not_before_s=self._not_before_s)
        self._file.close()
        self._file = file
        self.messages = list(messages)

    def rename(self, name: str) -> None:
        """Give the file another name in its folder. Raises `ChatError`."""
        path = self.path.with_name(name)
        with explain_errors(f"{self.path} could not be renamed", "", OSError):
            # The state is of the model that computed it: another name is another model.
            self.state_path.unlink(missing_ok=True)
            self.path.rename(path)
        self.path = path


class SavedChat(NamedTuple):
    """A saved chat, as far as its file tells without being read."""

    path: Path
    # The model that the chat was last held with, as the file's name has it.
    quoted_model: str
    modified_s: float
    size_bytes: int


class OpenedChat(NamedTuple):
    """A saved chat that goes on, and the model that it was last held with."""

    session: SessionFile
    model: str


def date_of(moment_s: float) -> datetime:
    """Return a file's date. Some file systems keep dates that no calendar has."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(moment_s)
    return datetime.max


def describe_moment(moment: datetime) -> str:
    """Return a day and a time as they are shown."""
    day = "today" if moment.date() == datetime.now().date() else str(moment.date())
    return f"{day}, {moment:%H:%M}"


class SavedChats:
    """The last chats, each in a session file named by its time and its model, for the user alone.

    The order of their files' dates is the order in which they were used last: also where the clock
    went back, a chat that is saved is dated after all others.
    """

    MAX_CHATS = 50
    # States are large, and a chat seldom goes on with any but the last ones.
    MAX_STATES = 5
    MAX_MODEL_BYTES = 180
    NAME = re.compile(r"(\d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d\.\d{6}) (\S+)\.jsonl")
    # What `replace_file` leaves if the chat is killed meanwhile.
    LEFTOVER = re.compile(r"\.llmchat-[0-9a-f]{8}")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _files(self) -> list[SavedChat]:
        """Return all saved chats; the one that was used last comes first. Raises `OSError`."""
        if not self.folder.exists():
            return []
        chats = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = self.NAME.fullmatch(entry.name)
                if not match or not entry.is_file(follow_symlinks=False):
                    continue
                # Another chat may just have removed it.
                with contextlib.suppress(FileNotFoundError):
                    info = entry.stat()
                    chat = SavedChat(Path(entry.path), match[2], info.st_mtime, info.st_size)
                    chats.append(chat)
        return sorted(chats, key=lambda chat: chat.modified_s, reverse=True)

    def _chats(self) -> list[SavedChat]:
        """Return the chats that can go on, in the order of their numbers. Raises `ChatError`."""
        with explain_errors(f"{self.folder} can't be read", "", OSError):
            # A chat of which everything was taken back is empty.
            return [chat for chat in self._files() if chat.size_bytes]

    @classmethod
    def _quoted_model(cls, model: str) -> str:
        """Return a model as the name of a file has it, wherever the program is started."""
        folder = Path(os.path.expanduser(model))
        name = str(folder.resolve()) if folder.is_dir() else model
        # The name of a file, also that of a state while it is written, has room for 255 bytes.
        return quote(os.fsencode(name), safe="")[-cls.MAX_MODEL_BYTES :]

    @staticmethod
    def _model(chat: SavedChat) -> str:
        return os.fsdecode(unquote_to_bytes(chat.quoted_model))

    @staticmethod
    def _date_after(chats: Sequence[SavedChat]) -> float:
        """Return the time that the chat used next is at least dated with, in seconds."""
        return max((chat.modified_s for chat in chats), default=0.0) + 0.001

    def create(self, model: str) -> SessionFile:
        """Begin the file of a new chat; remove the oldest of too many. Raises `ChatError`."""
        what = f"{self.folder} can't be used to keep conversations"
        with explain_errors(what, "Mend that, or start with --no-keep.", OSError):
            if problem := access_problem(self.folder):
                raise OSError(problem)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.folder.chmod(0o700)
            chats = self._files()
            self._remove_old(chats)
        started = f"{datetime.now():%Y-%m-%d %H.%M.%S.%f}"
        path = self.folder / f"{started} {self._quoted_model(model)}.jsonl"
        return SessionFile(path, self._date_after(chats))

    def _remove_old(self, chats: Sequence[SavedChat]) -> None:
        """Make room for one more chat. Raises `OSError`."""
        day_ago_s = time.time() - DAY_S
        for chat in chats[self.MAX_STATES - 1 :]:
            for state in self.folder.glob(f"{glob.escape(chat.path.name)}.*"):
                state.unlink(missing_ok=True)
        for chat in chats[self.MAX_CHATS - 1 :]:
            if chat.modified_s < day_ago_s:
                self._remove_unless_open(chat.path)
        for path in self.folder.iterdir():
            if self.LEFTOVER.fullmatch(path.name):
                # Another chat that is saving may have given the file its name just now.
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode) and status.st_mtime < day_ago_s:
                        path.unlink()

    @staticmethod
    def _remove_unless_open(path: Path) -> None:
        # A chat that is open elsewhere, gone already or not the user's own stays as it is.
        with contextlib.suppress(OSError), open_plain_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()

    def open_latest(self, model: str | None, warn: Callable[[str], None]) -> OpenedChat:
        """Open the chat that was used last, with this model if one is named.

        Raises `ChatError`, also if the chat is open elsewhere. A damaged one is passed over, and
        `warn` is told.
        """
        for chat in self._chats():
            if model and chat.quoted_model != self._quoted_model(model):
                continue
            try:
                return self._open(chat, model)
            except SessionInUseError as error:
                raise ChatError(
                    "The last chat is open in another llmchat: `llmchat --chats` lists all, and "
                    "`llmchat -c NUMBER` goes on with one of them."
                ) from error
            except ChatError as error:
                warn(f"Passed over: {error}")
        with_model = f" with {model}" if model else ""
        raise ChatError(f"There is no conversation{with_model} in {self.folder} to go on with.")

    def open_numbered(self, number: int) -> OpenedChat:
        """Open the chat that has this number in `rows`. Raises `ChatError`."""
        chats = self._chats()
        if not 1 <= number <= len(chats):
            raise ChatError(f"There is no chat {number}: `llmchat --chats` lists {len(chats)}.")
        return self._open(chats[number - 1], None)

    def _open(self, chat: SavedChat, model: str | None) -> OpenedChat:
        if problem := access_problem(chat.path):
            raise ChatError(f"{chat.path} can't go on: {problem}.")
        if model is None and len(chat.quoted_model) == self.MAX_MODEL_BYTES:
            raise ChatError(
                f"The name of the model is too long to be known from {chat.path}: "
                "name both, llmchat MODEL --session FILE."
            )
        # The folder of an older version may be open to others.
        with explain_errors(f"{self.folder} can't be used", "", OSError):
            self.folder.chmod(0o700)
        session = SessionFile(chat.path, self._date_after(self._chats()))
        return OpenedChat(session, model or self._model(chat))

    def rename(self, session: SessionFile, model: str) -> None:
        """Record the model that a saved chat is held with from now on. Raises `ChatError`."""
        match = self.NAME.fullmatch(session.path.name)
        # A session that the user has named is none of these.
        if session.path.parent != self.folder or not match:
            return
        name = f"{match[1]} {self._quoted_model(model)}.jsonl"
        if name != session.path.name:
            session.rename(name)

    def rows(self) -> list[list[str]]:
        """Return a line for each chat: number, time, model, turns and first words."""
        rows = []
        for number, chat in enumerate(self._chats(), 1):
            moment = describe_moment(date_of(chat.modified_s))
            turns, words = self._summary(chat)
            rows.append([str(number), moment, self._model(chat), turns, words])
        return [list(map(strip_control_characters, row)) for row in rows]

    @staticmethod
    def _summary(chat: SavedChat) -> tuple[str, str]:
        """Return how many turns a chat has, and its first words."""
        try:
            with open_plain_file(chat.path) as file:
                messages = parse_session(read_whole(file, MAX_SESSION_BYTES))
        except (OSError, ValueError) as error:
            return "", f"can't be read: {error_text(error)}"
        prompts = [message["content"] for message in messages if message["role"] == "user"]
        return counted(len(prompts), "turn"), shorten(" ".join(prompts[:1]), 50)


class PromptHistory:
    r"""The prompts of this day and earlier ones in a file for the user alone, one a line.

    Newlines and backslashes are written as \n and \\. The file is added to at every prompt. It is
    cut to its bounds when it is read and twice as large. Without `keep` it is only read.
    """

    MAX_ENTRIES = 1000
    MAX_BYTES = 1 << 20

    def __init__(self, path: str | Path, keep: bool = True) -> None:
        self._path = Path(path)
        self._keep = keep
        self._last = ""

    def load(self) -> list[str]:
        """Return the last prompts, the oldest first. Raises `OSError`."""
        if not self._path.exists():
            return []
        with self._locked() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - self.MAX_BYTES))
            lines = file.read(self.MAX_BYTES).removesuffix(b"\n").split(b"\n")
            if size == 0 or size > self.MAX_BYTES:
                # There is no line, or the first one may be half of one.
                del lines[0]
            recent = lines[-self.MAX_ENTRIES :]
            too_large = size > 2 * self.MAX_BYTES or len(lines) > 2 * self.MAX_ENTRIES
            if self._keep and too_large:
                replace_file(self._path, b"".join(line + b"\n" for line in recent)).close()
        prompts = [self._unescaped(line.decode(errors="replace")) for line in recent]
        self._last = prompts[-1] if prompts else ""
        return prompts

    @staticmethod
    def _unescaped(line: str) -> str:
        return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], line)

    def add(self, prompt: str) -> None:
        """Add a prompt, unless it is the last one again. Raises `OSError`."""
        escaped = prompt.replace("\\", "\\\\").replace("\n", "\\n")
        line = escaped.encode(errors="replace") + b"\n"
        # A prompt as large as all of the history would leave nothing else of it.
        if prompt == self._last or len(line) > self.MAX_BYTES:
            return
        self._last = prompt
        if self._keep:
            with self._locked() as file:
                self._append(file, line)

    @staticmethod
    def _append(file: io.FileIO, line: bytes) -> None:
        size = file.seek(0, os.SEEK_END)
        # On a full disk half a line would become part of the next one.
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[io.FileIO]:
        """Open the file while no other chat has it. Raises `OSError`."""
        while True:
            with open_plain_file(self._path, "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Another chat may have cut the file, which replaces it, while this one waited.
                if has_name(file, self._path):
                    os.fchmod(file.fileno(), 0o600)
                    yield file
                    return


# ---------------------------------------------------------------------------------------- Screen


# Codes that set the style of what follows on a terminal.
GREEN = "\x1b[32m"
RED = "\x1b[31m"
DIM = "\x1b[2m"
BOLD = "\x1b[1m"
CODE = "\x1b[36m"
PLAIN = "\x1b[0m"
ERASE_BELOW = "\x1b[J"

TAB_COLUMNS = 8


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
    # A skin tone, and what a zero-width joiner joins, belong to the character before them.
    JOINED = "[\U0001f3fb-\U0001f3ff]|(?<=\u200d)[^ \n]"
    WORD = re.compile(rf"[ \n]*[^ \n](?:[^ \n{WIDE}]|{JOINED})*|[ \n]+")
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
        activity = text.partition(": ")[0]
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
    shares it may do at any time. Raises `StreamError`.
    """
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(text)
        return
    raw = getattr(buffer, "raw", buffer)
    data = text.encode(stream.encoding, stream.errors or "strict")
    with stream_errors():
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
        """Make a screen; see `set_plain`."""
        self._stdout = stdout
        self._stderr = stderr
        # Somebody watches, and is to see thoughts too.
        self.interactive = interactive
        self.dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.styled = not (self.dumb or os.environ.get("NO_COLOR"))
        self.set_plain(plain)
        self._status: StatusLine | None = None
        # When the last reply ended, by `time.monotonic`.
        self.reply_ended_s = float("-inf")

    def set_plain(self, plain: bool) -> None:
        """Redraw no line from here on, for screen readers, or redraw them."""
        self._steady = self.dumb or plain

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
    """The kind of the part of a reply that is being shown."""

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
        elif piece.kind == "unclosed" and self._hides_thoughts:
            # What was hidden as a thought may be the answer.
            self._show_text(Section.ANSWER, text)

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
        since_s = time.monotonic()
        self._thinking_since_s = since_s
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
# this time, and is Enter, Backspace, "b", "f" or "d" (but not "find"), or the rest of a sequence
# ("[A").
ESCAPE_S = 1.0
AFTER_ESCAPE = re.compile(rb"[\r\n\x7f]|[bfd]\Z|[\[O].")

# An Esc that is pressed this soon after a reply has ended was meant to stop the reply.
LATE_ESCAPE_S = 1.0
ESCAPE = b"\x1b"
CTRL_C = b"\x03"
CTRL_D = b"\x04"
CTRL_U = b"\x15"
ENTERS = (b"\r", b"\n")
ALT_ENTER = b"\x1b\r"
BACKSPACE = b"\x7f"

# What a terminal that is gone is taken to send: Ctrl+U and Ctrl+D, which drop the line and leave.
TERMINAL_GONE = CTRL_U + CTRL_D

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


def text_key(char: str, modifiers: Modifiers) -> bytes:
    """Return the bytes of a printable character that was typed with modifiers."""
    capital = char.upper()
    data = (capital if modifiers & Modifiers.SHIFT else char).encode()
    if modifiers & Modifiers.CTRL:
        if not "@" <= capital <= "_":
            return b""
        data = bytes([ord(capital) & 0x1F])
    return ESCAPE + data if modifiers & Modifiers.ALT else data


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


def character_code(codes: list[bytes], modifiers: Modifiers) -> int:
    """Return the code of the character that a key of CSI u means with these modifiers.

    `codes` are those of the key, of what Shift makes of the key, and of the key in the same place
    on an English keyboard; the last two may be missing or empty.
    """
    by_index = {index: int(code or 0) for index, code in enumerate(codes)}
    shifted = by_index.get(1, 0)
    english = by_index.get(2, 0)
    if english and modifiers & (Modifiers.ALT | Modifiers.CTRL):
        return english
    # Enter and the like stay what they are.
    if shifted > ord(" ") and modifiers & Modifiers.SHIFT:
        return shifted
    return by_index[0]


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
        return character_key(character_code(parts[0], modifiers), modifiers)
    if last == b"~" and numbers[0] == MODIFY_OTHER_KEYS:
        return character_key(numbers[-1], modifiers)
    if last in RXVT_MODIFIERS:
        return editing_key(KEYS_BY_NUMBER.get(numbers[0]), modifiers | RXVT_MODIFIERS[last])
    if len(numbers) == 1:
        modifiers |= parse_modifiers(numbers[0])
    return letter_key(kind, last, modifiers)


def mark_long_runs(data: bytes) -> bytes:
    """Return the data with the marks of a paste around each run that is too long to be typed."""
    if PASTE_START in data:
        return data
    return LONG_RUN.sub(PASTE_START + rb"\g<0>" + PASTE_END, data)


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
        # Ctrl+C came as the sequence of a key, for which the terminal sends no signal.
        self._has_interrupt = False

    def has_items(self) -> bool:
        """Tell if `take` would return something."""
        return bool(self._items)

    def has_keys(self) -> bool:
        """Tell if anything but an Esc was typed, sorted or not."""
        return bool(self._items or self._arrived.strip(ESCAPE))

    def add(self, data: bytes) -> None:
        """Add what the terminal sent."""
        if self._holds_escape and not AFTER_ESCAPE.match(data):
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

    def take_interrupt(self) -> bool:
        """Tell if Ctrl+C came as the sequence of a key since this was asked last."""
        has_interrupt = self._has_interrupt
        self._has_interrupt = False
        return has_interrupt

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
            if match["sequence"] and keys == CTRL_C:
                self._has_interrupt = True
                continue
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


# The most bytes that the line editor is given at once.
CHUNK_BYTES = 1024

# A line editor does not tell when it begins to read, nor when it has read what it was given: until
# then its terminal is looked at this often.
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
        # Held by a thread that changes what follows.
        self._lock = threading.Lock()
        self._queue = KeyQueue()
        # The rest of what the line editor is being given, and what it got last in this line.
        self._outgoing = b""
        self.last_sent = b""
        # After an Enter the line editor got one more key, and nothing since.
        self._sent_after_enter = False
        # A line is being read, and what an Esc in it means: see `reading`.
        self._is_reading = False
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
                self._sent_after_enter = False
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
            with self._lock:
                # Enter did end the line, only late: the key after it is not for the next one.
                if self._sent_after_enter:
                    termios.tcflush(self._stdin, termios.TCIFLUSH)

    def has_typed_ahead(self) -> bool:
        """Tell if there are keys that the line editor has not been given."""
        with self._lock:
            unread, _, _ = select.select([self._terminal], [], [], 0)
            return bool(unread or self._outgoing or self._queue.has_keys())

    def _wake(self) -> None:
        """Have the thread look again at what there is to do."""
        os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        """Copy keys from the terminal to the line editor, until `close`."""
        # A signal that this thread got would not wake the main thread, which waits for input.
        block_signals()
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
        # Between the terminal and the queue nobody must look for what was typed ahead.
        with self._lock:
            data = b""
            with contextlib.suppress(OSError):
                data = os.read(self._terminal, 1 << 16)
            if data:
                self._queue.add(data)
                self._set_timer()
                return
        # The terminal is gone. It is always readable: this thread must not spin.
        time.sleep(BURST_S)
        # The rest of a key or a paste never comes.
        self._sort()
        with self._lock:
            self._queue.add(TERMINAL_GONE)
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
            interrupted = self._queue.take_interrupt()
            self._set_timer()
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        if escaped:
            self.on_escape()

    def _send(self) -> None:
        """Give the line editor the next part of a line."""
        with self._lock:
            if not self._is_reading:
                return
            if not self._outgoing:
                self._outgoing = self._to_editor(self._queue.take())
            if not self._outgoing:
                return
            self.last_sent = self._outgoing[:CHUNK_BYTES]
            self._sent_after_enter = False
            with contextlib.suppress(BlockingIOError):
                sent = os.write(self._pty_master, self.last_sent)
                self._outgoing = self._outgoing[sent:]
        if not self._outgoing and self.last_sent.endswith(ENTERS):
            self._wait_for_end_of_line()

    def _wait_for_end_of_line(self) -> None:
        """Give the line editor nothing of the next line while an Enter may still end this one.

        In a search, or after Ctrl+V, Enter does not; and libedit ends a search only when another
        key comes. So one key is sent that changes nothing: once it is read in this line, the line
        goes on.
        """
        if self._line_ended.wait(BURST_S):
            return
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._is_reading:
                self._sent_after_enter = True
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


# The longest line that libedit is given, in characters: see `enlarge_libedit_buffers`. Keys that
# libedit has not read yet are not counted.
MAX_LIBEDIT_LINE = 1500

# Libedit takes less time than this for a key.
SETTLED_S = 0.2


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


# Keys that begin with a character. Other keys may bring back what was deleted, as Ctrl+Y does.
TYPED_CHARACTER = re.compile(rb"[^\x00-\x1f\x7f]")

# What stands for a newline in a line of libedit, which can't hold one.
NEWLINE_SIGN = "␤"


class Prompt(NamedTuple):
    """What the user gave to be sent."""

    text: str
    # A single line whose beginning was typed: only such a line may be a command or a leave word.
    is_typed_line: bool


# The words that leave, in any case of letters, and with a slash too.
LEAVE_WORDS = ("quit", "bye", "exit")


def quoted_block(lines: Sequence[str]) -> Prompt:
    """Return the prompt that these lines are, after the three quotes that begin it."""
    block = "\n".join(lines).rstrip().removesuffix('"""')
    return Prompt(block.strip("\n"), is_typed_line=False)


def trim_prompt(text: str) -> str:
    """Return a text as it is sent: a line without the blanks around it, or a block as it is."""
    text = text.strip("\n")
    return text if "\n" in text else text.strip()


def typed_form(text: str) -> str:
    """Return what one types to send a text as it is: with its slash doubled, or in three quotes."""
    # The line editor is given no control characters.
    text = strip_control_characters(text)
    looks_quoted = text.startswith('"""')
    if "\n" in text:
        return f'"""{text}"""' if looks_quoted and text.endswith('"""') else text
    if text != trim_prompt(text):
        return f'"""{text}"""'
    if text.startswith("/"):
        return "/" + text
    if looks_quoted or text.lower() in LEAVE_WORDS:
        return f'"""{text}"""'
    return text


class Placeholders:
    """What stands in a line for texts that the line editor can't show well, until the line is sent.

    One looks like this: "[1: the beginning of the text… 20000 characters]".
    """

    def __init__(self) -> None:
        self._by_text: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_text.values())

    def add(self, text: str) -> str:
        """Return the placeholder of a text."""
        number = len(self._by_text) + 1
        beginning = shorten(text.replace(NEWLINE_SIGN, " "), 30)
        placeholder = f"[{number}: {beginning} {len(text)} characters]"
        return self._by_text.setdefault(text, placeholder)

    def add_after_command(self, line: str) -> str:
        """Return a line with a placeholder for its text: after its command, if it has one."""
        if not line.startswith("/"):
            return self.add(line)
        command, space, text = line.partition(" ")
        return command + space + self.add(text)

    def replaced_in(self, line: str) -> str:
        """Return a line with the texts in the place of their placeholders."""
        if not self._by_text:
            return line
        texts = {placeholder: text for text, placeholder in self._by_text.items()}
        any_placeholder = "|".join(map(re.escape, texts))
        return re.sub(any_placeholder, lambda match: texts[match[0]], line)

    def changed_in(self, line: str) -> str:
        """Return a placeholder that a line holds only the beginning of, or nothing."""
        for placeholder in self:
            beginning = placeholder[:10]
            if line.count(beginning) > line.count(placeholder):
                return placeholder
        return ""


class LineEditor:
    """Reads prompts; on a terminal with editing, history and completion from `open` to `close`.

    Elsewhere a line that was read is written after its prompt, so that a transcript reads the same.
    """

    def __init__(self, stdin: TextIO, screen: Screen, history: PromptHistory | None = None) -> None:
        self._stdin = stdin
        self._waiting_stdin = waiting_stream(stdin)
        self._piped_lines = PipedLines(self._waiting_stdin)
        self._screen = screen
        self._history = history
        self.interactive = stdin.isatty() and screen.interactive
        self._proxy = TerminalProxy(stdin, screen.dumb, self._to_editor)
        self._readline: Any = None
        self._libedit = False
        self._vi_keys = False
        self._placeholders = Placeholders()
        # Called, by another thread, with a text that was pasted into an empty line.
        self.on_first_paste: Callable[[str], None] = lambda text: None
        # The pasted texts, as they stand in the line that is being read.
        self._pasted: list[str] = []
        # The paste, or the draft of several lines, that this line began with.
        self._first_text = ""
        # What the prompt held when Ctrl+C dropped it.
        self._dropped = ""
        # The last line of the prompt that can't be sent.
        self._refused_line: RefusedLineError | None = None

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
        Raises `ChatError` for a prompt of a pipe that can't be sent, once all of it is read.
        """
        if text and self.interactive:
            text = self._offer(typed_form(text))
        self._screen.write("\n")
        self._dropped = ""
        self._refused_line = None
        lines: list[str] = []
        try:
            prompt = self._read_lines(lines, text)
        except KeyboardInterrupt:
            self._drop(lines)
            raise
        if self._refused_line and lines:
            raise ChatError(f"{self._refused_line} Nor is the rest of its block.")
        if self._refused_line:
            raise self._refused_line
        return prompt

    def line_has_text(self) -> bool:
        """Tell if there was something in the prompt when Ctrl+C dropped it."""
        return bool(self._dropped or (self.interactive and self._proxy.has_typed_ahead()))

    def add_to_history(self, prompt: Prompt, on_disk: bool = True) -> None:
        """Add a prompt of a terminal to what Up brings back, and to the history on disk."""
        if not self._screen.interactive:
            return
        line = prompt.text if prompt.is_typed_line else typed_form(prompt.text)
        if self._history and on_disk:
            with self._warned_of_history():
                self._history.add(line)
        if not self._readline:
            return
        # A command with a block that was pasted is to be a command when it comes back.
        if prompt.is_typed_line and "\n" in line:
            line = self._placeholders.add_after_command(line)
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
            # The name of a file may hold what can't stand in a line, and must not reach the screen.
            endings = [
                candidate[len(line) - len(text) :]
                for candidate in candidates
                if strip_control_characters(candidate) == candidate and "\n" not in candidate
            ]
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
            if TYPED_CHARACTER.match(item):
                self._forget_deleted_text()
            return self._libedit_keys(item) if self._libedit else item
        if item == "\n":
            text = NEWLINE_SIGN if self._libedit else item
        else:
            if self._line_is_blank():
                self._first_text = item
                self.on_first_paste(item)
            text = self._editor_text(item, pasted=True)
            self._pasted.append(text)
        keys = self._insertion(text)
        return self._in_place_of_long_line(keys) if self._libedit else keys

    def _forget_deleted_text(self) -> None:
        """Forget what this line began with if nothing is left: what follows is typed."""
        if not self._first_text or not self._line_is_blank():
            return
        # The line editor may still be at work on what it was given last.
        time.sleep(SETTLED_S)
        if self._line_is_blank():
            self._first_text = ""

    def _line_is_blank(self) -> bool:
        """Tell if nothing stands in the line editor's line but blanks."""
        # Libedit's buffer keeps the last text when the line becomes empty. Its Ctrl+U deletes the
        # whole line, but not with vi's keys.
        is_emacs_of_libedit = self._libedit and not self._vi_keys
        if is_emacs_of_libedit and self._proxy.last_sent.endswith(CTRL_U):
            return True
        return not self._current_line().strip()

    def _libedit_keys(self, keys: bytes) -> bytes:
        """Return keys that were typed as libedit is to get them."""
        sign = NEWLINE_SIGN.encode()
        if sign in keys:
            # A sign that was typed is itself.
            keys = keys.replace(sign, self._placeholders.add(NEWLINE_SIGN).encode())
        keys = LIBEDIT_SEQUENCE.sub(lambda match: LIBEDIT_BYTES[match[0]], keys)
        return self._in_place_of_long_line(keys)

    def _in_place_of_long_line(self, keys: bytes) -> bytes:
        """Return the keys; if there is no room, the line becomes a placeholder first."""
        if len(self._current_line()) + len(keys) <= MAX_LIBEDIT_LINE:
            return keys
        # While libedit is at work on earlier keys its buffer may hold a part of an older line.
        line = self._settled_line()
        if len(line) + len(keys) <= MAX_LIBEDIT_LINE:
            return keys
        kill_line = LIBEDIT_BYTES[Key.KILL_LINE.sequence]
        shorter_line = self._placeholders.add_after_command(self._text_of(line))
        return kill_line + shorter_line.encode(errors="replace") + keys

    def _settled_line(self) -> str:
        """Return what stands in the line editor's line once it has stood there for a moment."""
        while True:
            line = self._current_line()
            time.sleep(SETTLED_S)
            if line == self._current_line():
                return line

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
            return self._placeholders.add(text)
        return text.replace("\n", NEWLINE_SIGN) if self._libedit else text

    def _is_hard_for_libedit(self, text: str, pasted: bool) -> bool:
        """Tell if libedit needs a placeholder: it takes no long lines, and no newlines.

        A few lines that were typed, and come back, can be edited: a sign stands for each newline.
        """
        has_pasted_lines = pasted and "\n" in text
        is_long = len(text) > MAX_TYPED_RUN
        return has_pasted_lines or is_long or NEWLINE_SIGN in text

    def _current_line(self) -> str:
        """Return what stands in the line editor's line."""
        if not self._readline or not self._proxy.last_sent:
            return ""
        line: str = self._readline.get_line_buffer()
        # Until libedit reads the first key its buffer holds the line before, with its newline.
        return "" if self._libedit and line.endswith("\n") else line

    def _is_tall(self, text: str) -> bool:
        """Tell if a text would push out of the window what was said before it."""
        columns, rows = os.get_terminal_size(self._stdin.fileno())
        widths = [column_after(0, line) for line in text.splitlines()]
        text_rows = sum(1 + width // (columns or 80) for width in widths)
        return text_rows > (rows or 24) - 4

    def _offer(self, text: str) -> str:
        """Return the text to put into the next line: nothing, if Up is to bring it there."""
        # What was typed ahead is a prompt of its own.
        if not self._proxy.has_typed_ahead():
            return text
        self._add_history(text)
        self._screen.notice("Press Up to edit the prompt.")
        return ""

    def _read_lines(self, lines: list[str], text: str) -> Prompt:
        """Read a prompt; its lines so far are put into `lines`."""
        first = self._read_line("prompt -> ", text)
        block = trim_prompt(first.text)
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
        return quoted_block(lines)

    def _read_line(self, prompt: str, text: str = "") -> Prompt:
        """Read one line. Raises `EOFError`, and `KeyboardInterrupt` on Ctrl+C."""
        if self.interactive:
            line = self._edit_line(prompt, text)
            while placeholder := self._placeholders.changed_in(line):
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
        try:
            with stream_errors():
                line = self._piped_lines.read()
        except RefusedLineError as error:
            # The line may begin or end a block, which is refused as a whole.
            self._refused_line = error
            self._screen.write("\n")
            return error.text
        except ChatError:
            self._screen.write("\n")
            raise
        # Under mlx.launch somebody may be watching: the launcher's terminal has echoed the line.
        if not self._screen.interactive:
            self._screen.write(line.rstrip("\n") + "\n")
        return line

    def _read_while_output_is_piped(self, prompt: str) -> str:
        """Read a line from a terminal, with its prompt on standard error, as in `llmchat | tee`."""
        # The end of the last reply comes a little later, through the other program.
        time.sleep(BURST_S)
        self._screen.write_stderr(prompt)
        line = self._waiting_stdin.readline()
        if not line:
            self._screen.write_stderr("\n")
        return line

    def _edit_line(self, prompt: str, text: str) -> str:
        """Read a line with the line editor; return it as it stood there."""
        self._pasted.clear()
        self._first_text = text if "\n" in text else ""
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
        pasted = [*self._pasted, *self._placeholders]
        begins_pasted = any(
            line.lstrip().startswith(text.lstrip()) for text in pasted if text.strip()
        )
        typed = line
        for text in self._pasted:
            typed = typed.replace(text, "", 1)
        has_typed_newline = "\n" in typed or (self._libedit and NEWLINE_SIGN in typed)
        # A paste that was edited is no command either: "/clear everything" without its last word.
        whole_text = self._text_of(line)
        first_word = whole_text.lstrip().partition(" ")[0]
        was_pasted = bool(first_word) and first_word in self._first_text
        is_typed_line = not (begins_pasted or was_pasted or has_typed_newline)
        return Prompt(whole_text, is_typed_line)

    def _text_of(self, line: str) -> str:
        """Return the text that a line of the editor stands for."""
        if self._libedit:
            line = line.replace(NEWLINE_SIGN, "\n")
        return self._placeholders.replaced_in(line)

    def _drop(self, lines: list[str]) -> None:
        """Have Up bring back the lines of a prompt that Ctrl+C dropped."""
        line = self._parse_line(self._current_line())
        if lines:
            self._dropped = typed_form(quoted_block([*lines, line.text]).text)
        elif line.is_typed_line:
            self._dropped = line.text
        else:
            self._dropped = typed_form(trim_prompt(line.text))
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


# --------------------------------------------------------------------------------------- Signals


class OnInterrupt(enum.Enum):
    """What Ctrl+C does at this moment."""

    EXIT = "end the program"  # outside of an interactive chat, and while the model loads
    CANCEL = (
        "raise KeyboardInterrupt"  # a line is being typed, files are read, an answer is awaited
    )
    STOP = "note that a stop is requested"  # in a chat otherwise: the reply looks at the note


class Signals:
    """Handles Ctrl+C and the signals that end the program, as a context manager.

    A signal that ends the program leaves its exit status in `exit_status` and raises
    `KeyboardInterrupt`, so that everything is cleaned up on the way out. What Ctrl+C does in a chat
    depends on `on_interrupt`:

        EXIT  -- start_chat -->  STOP  <-- cancellable -->  CANCEL

    Python runs handlers in the main thread only, which never runs the engine: no signal can tear a
    computation.
    """

    # Sent by the program to itself. It is ignored by default, so no other program sends it.
    WAKE = signal.SIGURG

    def __init__(self) -> None:
        self.exit_status = 0
        self.on_interrupt = OnInterrupt.EXIT
        # The user has asked, by Ctrl+C or Esc, to stop what is going on.
        self.stop_requested = False

    def __enter__(self) -> Signals:
        # A signal that is ignored at the start stays ignored: SIGHUP under nohup, SIGINT in the
        # background of a script.
        self._old_handlers = [
            (number, signal.signal(number, self._handle))
            for number in ENDING_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        signal.signal(self.WAKE, lambda *_: None)
        wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_write, False)
        signal.set_wakeup_fd(self._wakeup_write)
        threading.Thread(target=self._watch, args=(wakeup_read,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup_write)
        for number, handler in self._old_handlers:
            signal.signal(number, handler)

    def _watch(self, wakeup_read: int) -> None:
        """Send the main thread a second signal after each one.

        `input()` misses a signal that arrives just before it begins to wait.
        """
        while data := os.read(wakeup_read, 1):
            if data[0] != self.WAKE:
                time.sleep(BURST_S)
                signal.pthread_kill(threading.main_thread().ident or 0, self.WAKE)
        os.close(wakeup_read)

    def start_chat(self) -> None:
        """From here on Ctrl+C stops what is going on, and not the program."""
        self.on_interrupt = OnInterrupt.STOP

    @contextlib.contextmanager
    def cancellable(self) -> Iterator[None]:
        """In a chat, have Ctrl+C raise `KeyboardInterrupt` in this block."""
        before = self.on_interrupt
        if before is OnInterrupt.STOP:
            self.on_interrupt = OnInterrupt.CANCEL
        try:
            yield
        finally:
            self.on_interrupt = before

    def request_stop(self) -> None:
        """Ask to stop what is going on. Any thread may call this."""
        self.stop_requested = True

    def exit_if_signalled(self) -> None:
        """Raise `SystemExit` if a signal should have ended the program, but a library went on."""
        if self.exit_status:
            raise SystemExit(self.exit_status)

    def _handle(self, signum: int, frame: object) -> None:
        if signum != signal.SIGINT or self.on_interrupt is OnInterrupt.EXIT:
            self.exit_status = 128 + signum
            raise KeyboardInterrupt
        self.stop_requested = True
        if self.on_interrupt is OnInterrupt.CANCEL:
            # The code that cleans up must not be interrupted again.
            self.on_interrupt = OnInterrupt.STOP
            raise KeyboardInterrupt


# -------------------------------------------------------------------------------------- Commands


class Command(NamedTuple):
    """A command of the chat."""

    # What may follow its name, for /help; empty if nothing may.
    arguments: str
    help: str
    run: Callable[[Chat, str], None]


COMMANDS: dict[str, Command] = {}

# A command: its name, and its text.
COMMAND_LINE = re.compile(r"(/[a-z]+|/\?)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)

# What commands that people know from other chats are here.
COMMANDS_ELSEWHERE = {
    "/list": "/model",
    "/load": "/model NAME",
    "/show": "/set",
    "/reset": "/clear",
    "/new": "/clear",
    "/regenerate": "/retry",
    "/set verbose": "/stats on",
    "/set quiet": "/stats off",
}
# The same of settings.
SETTINGS_ELSEWHERE = {"num_predict": "max-tokens", "repeat_penalty": "repetition-penalty"}
SLASH_HINT = "To send a line that starts with /, type //."


def command(
    name: str, arguments: str = ""
) -> Callable[[Callable[[Chat, str], None]], Callable[[Chat, str], None]]:
    """Declare a function as a command; the first line of its docstring is the help."""

    def declare(run: Callable[[Chat, str], None]) -> Callable[[Chat, str], None]:
        help_text = (run.__doc__ or "").partition("\n")[0].rstrip(".")
        COMMANDS[name] = Command(arguments, help_text, run)
        return run

    return declare


def find_command(line: str) -> tuple[Command, str]:
    """Return the command that a line names, and its text. Raises `ChatError`."""
    match = COMMAND_LINE.fullmatch(line.strip())
    assert match, "only such a line is a command"
    name = match[1].lower()
    text = (match[2] or "").strip()
    if name == "/?":
        name = "/help"
    if name.removeprefix("/") in LEAVE_WORDS:
        raise ChatError(f"{name} leaves if it stands alone: nothing was done. {SLASH_HINT}")
    for typed in (name, f"{name} {text}"):
        if typed in COMMANDS_ELSEWHERE:
            meant = COMMANDS_ELSEWHERE[typed]
            raise ChatError(f"{typed} is {meant} here; /help lists the commands.")
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "; /help lists them."
        raise ChatError(f"There is no command {name}{hint} {SLASH_HINT}")
    found = COMMANDS[name]
    if text and not found.arguments:
        raise ChatError(f"{name} takes no text: nothing was done. {SLASH_HINT}")
    return found, text


def matching_paths(start: str) -> list[str]:
    """Return the paths that begin like this, folders with a slash.

    A name that would change the line it is put into is left out: it holds a newline, a tab or a
    control character.
    """
    folder = start[: start.rfind("/") + 1]
    paths = []
    for path in sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*")):
        name = os.path.basename(path)
        if strip_control_characters(name) == name and not re.search(r"[\n\t]", name):
            paths.append(folder + name + ("/" if os.path.isdir(path) else ""))
    return paths


# A word of a shell's line: escaped and plain characters, and quoted parts, which may be unclosed.
SHELL_WORD = re.compile(
    r"""(?:\\(?:.|\Z)|'[^']*(?:'|\Z)|"(?:\\.|[^"\\])*(?:"|\\?\Z)|[^\s'"\\])+""", re.DOTALL
)


def quote_path(path: str, quote_mark: str) -> str:
    """Return a path as a shell takes it. In quotes, that of a folder is left open to go on."""
    if quote_mark == "'":
        path = "'" + path.replace("'", "'\\''")
    elif quote_mark == '"':
        path = '"' + re.sub(r'(["\\])', r"\\\1", path)
    else:
        return re.sub(r"""([\s'"\\])""", r"\\\1", path)
    return path if path.endswith("/") else path + quote_mark


def complete_last_path(words: str) -> list[str]:
    """Return what paths as a shell takes them may become if the last one is completed."""
    last_word = ""
    for match in SHELL_WORD.finditer(words):
        if match.end() == len(words):
            last_word = match[0]
    before = words[: len(words) - len(last_word)]
    quote_mark = last_word[:1] if last_word[:1] in ("'", '"') else ""
    try:
        (start,) = shlex.split(last_word + quote_mark) or [""]
    except ValueError:
        # The word ends in an escape, or in a quoted part that is not all of it.
        return []
    return [before + quote_path(path, quote_mark) for path in matching_paths(start)]


def completions(line: str) -> list[str]:
    """Return the lines that Tab may make of a line's beginning.

    They hold commands, keys of `/set` and file names; where there are none of these, a tab.
    """
    if not line.startswith("/"):
        return [line + "\t"]
    word, space, rest = line.partition(" ")
    candidates: Iterable[str] = ()
    if not space:
        candidates = [f"{name} " if each.arguments else name for name, each in COMMANDS.items()]
    elif word == "/set":
        candidates = (
            f"/set {key} "
            for key, (name, no) in KEYS.items()
            if OPTIONS[name].scope is Scope.CHAT and not no
        )
    elif word == "/save":
        candidates = [f"/save {path}" for path in matching_paths(rest)]
    elif word == "/model":
        candidates = [f"/model {name}" for name in [*cached_models(), *matching_paths(rest)]]
    elif word == "/file":
        candidates = [f"/file {paths}" for paths in complete_last_path(rest)]
    return [candidate for candidate in candidates if candidate.startswith(line)]


def put_in_clipboard(text: str, screen: Screen) -> str:
    """Put a text that a person is to read into the clipboard; return what was done.

    The first program that can takes it, or else the terminal is asked (OSC 52). Over ssh the
    programs fill the clipboard of the other machine: there the terminal is asked first. Raises
    `ChatError`.
    """
    text = strip_control_characters(text)
    data = text.encode(errors="replace")
    needed_variables = {
        "pbcopy": "HOME",
        "wl-copy": "WAYLAND_DISPLAY",
        "xclip -selection clipboard": "DISPLAY",
    }
    if screen.interactive and ("SSH_TTY" in os.environ or "SSH_CONNECTION" in os.environ):
        needed_variables = {}
    # Within tmux an OSC 52 of a program's own is dropped by default; this has tmux itself send one.
    needed_variables["tmux load-buffer -w -"] = "TMUX"
    for program, variable in needed_variables.items():
        words = program.split()
        if os.environ.get(variable) and shutil.which(words[0]):
            done = subprocess.run(words, input=data, stderr=subprocess.DEVNULL, check=False)
            if done.returncode == 0:
                return f"{len(text)} characters are copied."
    if not screen.interactive:
        raise ChatError("There is no clipboard here.")
    screen.write_codes(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    return f"{len(text)} characters went to the terminal, to be copied."


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


# What the keys do, for /help.
KEYS_HELP = (
    (", ".join(LEAVE_WORDS), "leave, as Ctrl+D does"),
    ("Ctrl+C, Esc", "stop the reply"),
    ("Ctrl+C", "drop the line, which Up brings back"),
    ("Up, Ctrl+R, Tab", "earlier prompts; find one; complete commands and file names"),
    ("Alt+Enter", "a new line, as Shift+Enter, and as Esc and then Enter"),
    ('"""', "begin and end a prompt of several lines"),
    ("//", "begin a prompt with a slash"),
    ("llmchat -c", "continue this chat later; llmchat --chats lists all"),
)


@command("/help")
def show_help(chat: Chat, text: str) -> None:
    """List the commands and keys."""
    rows = [(f"{name} {each.arguments}", each.help) for name, each in COMMANDS.items()]
    chat.screen.write(format_table([*rows, *KEYS_HELP]))


@command("/clear")
def clear(chat: Chat, text: str) -> None:
    """Start a new conversation; /undo brings this one back."""
    chat.autosave.start_new_file(chat.conversation.messages)
    chat.conversation.clear()
    chat.screen.notice("A new conversation.")


@command("/retry")
def retry(chat: Chat, text: str) -> None:
    """Generate the last reply again."""
    chat.show_reply(chat.conversation.retry())


@command("/undo")
def undo(chat: Chat, text: str) -> None:
    """Take the last turn back and edit its prompt."""
    chat.draft = chat.conversation.undo()
    if chat.draft:
        chat.screen.notice("The last turn is taken back.")
    else:
        chat.autosave.reopen_last_file()
        chat.screen.notice("The conversation is back.")


@command("/continue")
def continue_reply(chat: Chat, text: str) -> None:
    """Go on with a reply that was cut or stopped."""
    chat.show_reply(chat.conversation.continue_reply())


@command("/answer")
def answer(chat: Chat, text: str) -> None:
    """Answer now, after a thought was cut or stopped."""
    chat.show_reply(chat.conversation.continue_reply(end_thought=True))


@command("/system", "[TEXT]")
def system_prompt(chat: Chat, text: str) -> None:
    """Show or set the system prompt; - removes it."""
    if text:
        chat.settings.set_value("system", None if text == "-" else text, "here")
    shown = chat.settings.system or "There is no system prompt."
    if text:
        chat.screen.notice(f"The system prompt: {shown}" if text != "-" else shown)
    else:
        chat.screen.write(f"{strip_control_characters(shown)}\n")


def settings_table(settings: Settings, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return a row for each setting that may be changed in a chat: key, value, source."""
    rows = []
    for name in names:
        if OPTIONS[name].scope is Scope.CHAT:
            value = strip_control_characters(format_value(getattr(settings, name)))
            source = settings.sources.get(name, "default")
            rows.append((key_of(name), value, source))
    return rows


@command("/set", "[KEY VALUE]")
def change_setting(chat: Chat, text: str) -> None:
    """List settings, show one, or change it; VALUE default resets it."""
    settings = chat.settings
    key, _, value = re.sub(r"[\s=]+", " ", text, count=1).partition(" ")
    if key == "parameter" and value:
        name, _, number = value.partition(" ")
        name = SETTINGS_ELSEWHERE.get(name, name)
        if not find_key(name):
            raise ChatError(f"{shorten(name, 40)} is no setting here; /set lists those that are.")
        raise ChatError(f"That is /set {name} {number} here.")
    in_use = f"The model is {settings.model}; /model NAME takes another one."
    if key == "model":
        raise ChatError(in_use)
    found = find_key(key)
    can_show = found and OPTIONS[found.name].scope is Scope.CHAT
    if not value and (can_show or not key):
        names = [found.name] if found else list(OPTIONS)
        chat.screen.write(format_table(settings_table(settings, names)))
        if not key:
            chat.screen.notice(in_use)
        return
    if found and value == "default" and OPTIONS[found.name].scope is Scope.CHAT:
        settings.reset(found.name)
        name = found.name
    else:
        try:
            name = settings.set_from_text(key, value.strip(), "here")
        except argparse.ArgumentTypeError as error:
            raise ChatError(f"{shorten(key, 40)} {error}") from error
    shown = format_value(getattr(settings, name))
    chat.screen.notice(f"{key_of(name)} = {shown}")
    # The engine may still be at work.
    with chat.signals.cancellable():
        if name == "plain":
            chat.screen.set_plain(settings.plain)
        if name == "seed":
            chat.conversation.seed(settings.seed)
        if name == "think" and (note := chat.conversation.thinking_note()):
            chat.screen.notice(note)


@command("/stats", "[on|off]")
def show_statistics(chat: Chat, text: str) -> None:
    """Show statistics after each reply, or no longer."""
    if not text:
        text = "off" if chat.settings.stats else "on"
    change_setting(chat, f"stats {text}")


@command("/file", "[PATH ...]")
def add_files(chat: Chat, text: str) -> None:
    """Put files before the next prompt, or list them; - drops them."""
    if text == "-":
        chat.files = {}
    # A pattern may lead through all of a disk, and the engine may still be at work.
    with chat.signals.cancellable():
        if text not in ("", "-"):
            chat.add_files(text)
        for name, tokens in chat.file_sizes().items():
            chat.screen.notice(f"{name}: {tokens:,} tokens")
    if not chat.files:
        chat.screen.notice("No files wait for the next prompt.")


@command("/edit", "[TEXT]")
def edit(chat: Chat, text: str) -> None:
    """Edit TEXT, or the last prompt, in $VISUAL or $EDITOR."""
    program = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    chat.screen.notice(f"Editing with {program}; EDITOR names another program.")
    if not text and chat.conversation.messages:
        text = chat.conversation.messages[-2]["content"]
    what = f"{program} can't be used to edit"
    with explain_errors(what, "Set EDITOR to another one.", OSError, ValueError):
        with chat.editor.suspended(), temporary_draft(text) as file:
            words = [*shlex.split(program), str(file)]
            status = subprocess.run(words, check=False).returncode
            edited = decode_text(file.read_bytes()).strip("\n")
    if status:
        raise ChatError(f"{program} ended with status {status}: nothing is taken from it.")
    chat.draft = edited


# A block of code between fences: its fence and its text.
CODE_BLOCK = re.compile(r"^(```+|~~~+).*\n((?:.*\n)*?)\1", re.MULTILINE)


@command("/copy", "[code [N]]")
def copy_answer(chat: Chat, text: str) -> None:
    """Copy the last answer, or its last or Nth block of code."""
    if not chat.conversation.messages:
        raise ChatError("There is no answer to copy.")
    answer = chat.conversation.messages[-1]["content"].strip()
    parts = {"": answer}
    blocks = CODE_BLOCK.findall(answer)
    for count, (_, block) in enumerate(blocks, 1):
        parts[f"code {count}"] = block
        parts["code"] = block
    if text not in parts:
        raise ChatError(f"There is no such block of code: the last answer has {len(blocks)}.")
    if chat.hosts.rank:
        return
    chat.screen.notice(put_in_clipboard(parts[text], chat.screen))


@command("/save", "FILE")
def save(chat: Chat, text: str) -> None:
    """Write the conversation: *.md as Markdown, else as --session."""
    if not text:
        raise ChatError("/save needs the name of a file.")
    if chat.hosts.rank:
        return
    path = Path(os.path.expanduser(strip_quotes(text)))
    if os.path.exists(path):
        raise ChatError(f"{path} is there already, and was not replaced: name another file.")
    messages = with_system_prompt(chat.settings.system, chat.conversation.messages)
    data = as_markdown(messages) if path.suffix == ".md" else as_lines(messages)
    with explain_errors(
        f"{shorten(text)} could not be written", "Name another file.", OSError, ValueError
    ):
        replace_file(path, data).close()
    chat.screen.notice(f"{len(chat.conversation.messages)} messages are in {path}.")


@command("/model", "[NAME]")
def show_or_change_model(chat: Chat, text: str) -> None:
    """Show the models that are here, or go on with another one."""
    if text:
        chat.change_model(strip_quotes(text))
        return
    rows = [(f"{chat.settings.model}", "in use", "")]
    for name in cached_models():
        if name != chat.settings.model:
            rows.append((name, "in the cache", describe_bytes(folder_bytes(locate(name, None)))))
    chat.screen.write(format_table(rows))


# --------------------------------------------------------------------------------------- Program


# The last lines of a prompt that are shown of a conversation that is continued.
MAX_SHOWN_LINES = 10

# The first prompt waits this long for what the user should know about the model.
MAX_NOTE_WAIT_S = 0.1


class ModelLoader:
    """Finds and loads models for a chat, and says on the screen how far that is."""

    def __init__(self, screen: Screen, hosts: Hosts, engine: Engine) -> None:
        self._screen = screen
        self._hosts = hosts
        self._engine = engine
        self._progress = Progress("looking for it")

    @contextlib.contextmanager
    def status(self) -> Iterator[None]:
        """Have the status line tell how far this is, in this block."""
        with self._screen.status(lambda: self._progress.text()):
            yield

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    def find(self, settings: Settings) -> ModelFiles:
        """Find the model that the settings name, and download what is missing of it.

        All that can be known before is checked before. Raises `ChatError`.
        """
        found = find_model(settings, self._hosts, self._report)
        if settings.trust_remote_code and (owners := code_owners(found)):
            self._screen.notice(owners)
        use_private_kernels()
        if found.missing:
            self._engine.call(check_engine, found, settings, self._hosts)
        fetch_model(found, self._report)
        return found

    def load(self, found: ModelFiles, settings: Settings) -> Model:
        """Load a model that was found. Raises `ChatError`."""
        return self._engine.call(load_model, found, settings, self._hosts)


def load_first_model(settings: Settings, screen: Screen, loader: ModelLoader) -> Model:
    """Load the model that the settings name, and say so in a chat. Raises `ChatError`."""
    if settings.model is None:
        lines = [
            "no model is named.",
            "usage: llmchat MODEL [options]",
            f"example: llmchat {EXAMPLE_MODEL}",
        ]
        lines += [f"already here: {name}" for name in cached_models()]
        raise ChatError("\n".join(lines), 2)
    asked = settings.model
    settings.model = resolve_model_name(settings.model)
    if settings.prompt is None:
        screen.write(f"Loading model {settings.model}...\n")
    if asked != settings.model and screen.interactive:
        screen.notice(f"{asked} is {settings.model} here.")
    with loader.status():
        found = loader.find(settings)
        model = loader.load(found, settings)
    if settings.recommended and (sentence := apply_recommended(settings, found.folder)):
        screen.notice(sentence)
    if settings.prompt is None:
        screen.write("Model loaded successfully!\n")
    return model


class ModelChoice(NamedTuple):
    """A model, and the settings that belong to it alone."""

    model: str | None
    adapter: str | None
    revision: str | None
    trust_remote_code: bool

    @classmethod
    def of(cls, settings: Settings) -> ModelChoice:
        """Return what these settings choose."""
        return cls(settings.model, settings.adapter, settings.revision, settings.trust_remote_code)


class Autosave:
    """Writes the conversation to its session file before a reply, after it, and after a command.

    That it can't be written is said once, and the chat goes on.
    """

    def __init__(
        self,
        settings: Settings,
        session: SessionFile | None,
        saved_chats: SavedChats | None,
        show_error: Callable[[ChatError], None],
        notice: Callable[[str], None],
    ) -> None:
        """Without a `session` the first turn begins a file in `saved_chats`, if that is given."""
        self._notice = notice
        self._settings = settings
        self._saved_chats = saved_chats
        self._show_error = show_error
        self.session = session
        # The file that was left by the last `start_new_file`.
        self._last_path: Path | None = None
        self._has_failed = False

    @property
    def has_saved_chat(self) -> bool:
        """Whether the conversation is among the user's chats, and not in a file of its own."""
        in_own_file = self._settings.session is not None
        return not in_own_file and self.session is not None and bool(self.session.messages)

    def save(self, turns: Sequence[Message]) -> None:
        """Make the file hold these turns, after the system prompt."""
        try:
            self._save(turns)
            self._has_failed = False
        except ChatError as error:
            # A chat that is saved without being asked to be is no reason to fail.
            if not self._has_failed and self._settings.session:
                self._show_error(error)
            elif not self._has_failed:
                self._notice(str(error))
            self._has_failed = True

    def _save(self, turns: Sequence[Message]) -> None:
        if self.session is None and self._saved_chats and turns:
            self.session = self._saved_chats.create(str(self._settings.model))
        if self.session is None:
            return
        # A system prompt by itself is no conversation to go on with.
        if turns or self._settings.session:
            self.session.save(with_system_prompt(self._settings.system, turns))
        else:
            self.session.save([])

    def record_model(self) -> None:
        """Have the saved chat belong to the model that is in use now."""
        if self.session and self._saved_chats:
            self._saved_chats.rename(self.session, str(self._settings.model))

    def start_new_file(self, turns: Sequence[Message]) -> None:
        """Leave these turns in a file of their own: what follows is another conversation."""
        if not turns:
            return
        # /undo brings these turns back, and not those that an earlier file holds.
        self._last_path = None
        if self.session is None:
            return
        if self._settings.session is None:
            self.session.close()
            self._last_path = self.session.path
            self.session = None
        elif self._saved_chats:
            # The file that the user named holds the conversation that goes on.
            with contextlib.closing(self._saved_chats.create(str(self._settings.model))) as copy:
                copy.save(self.session.messages)

    def reopen_last_file(self) -> None:
        """Go on with the file that `start_new_file` left."""
        if self._last_path is None:
            return
        if self.session:
            self.session.close()
        path = self._last_path
        self.session = None
        self._last_path = None
        self.session = SessionFile(path)
        # Another model may have come since.
        self.record_model()


def show_traceback_if_debugging() -> None:
    """Show where an error came from if `LLMCHAT_DEBUG` is set, beside its sentence."""
    if os.environ.get("LLMCHAT_DEBUG"):
        traceback.print_exc()


def is_chat_on_terminal(settings: Settings, editor: LineEditor) -> bool:
    """Tell if somebody sits at the prompt: the input is no pipe, and not one prompt of a script."""
    return editor.interactive and settings.prompt is None


class Chat:
    """The loop: reads prompts and commands, shows replies. A turn that fails never ends it."""

    def __init__(
        self,
        conversation: Conversation,
        screen: Screen,
        editor: LineEditor,
        settings: Settings,
        *,
        signals: Signals | None = None,
        hosts: Hosts | None = None,
        loader: ModelLoader | None = None,
        session: SessionFile | None = None,
        saved_chats: SavedChats | None = None,
        files: dict[str, TextFile] | None = None,
        draft: str = "",
    ) -> None:
        self.conversation = conversation
        self.screen = screen
        self.editor = editor
        self.settings = settings
        self.signals = signals or Signals()
        self.hosts = hosts or Hosts()
        self._loader = loader
        # What the command line chose: adapter, revision and trust belong to its model alone.
        self._first_choice = ModelChoice.of(settings)
        self.autosave = Autosave(settings, session, saved_chats, self._show_error, screen.notice)
        # The files that go before the next prompt, by their real paths.
        self.files = files or {}
        # The text that stands in the next line for editing.
        self.draft = draft
        # Whether an error was shown.
        self.has_failed = False

    def run(self) -> None:
        """Talk until the user leaves."""
        is_leaving = False
        while True:
            # Pull a prompt from the user.
            try:
                prompt = self._read_prompt()
            except EOFError:
                break
            except ChatError as error:
                # A line that is piped in is no text.
                self._show_error(error)
                continue
            except KeyboardInterrupt:
                self.signals.exit_if_signalled()
                if self.editor.line_has_text():
                    is_leaving = False
                    continue
                if is_leaving:
                    break
                self.screen.notice("Press Ctrl+C again to leave, or type quit.")
                is_leaving = True
                continue
            is_leaving = False
            # A stop that came before the line was sent was not meant for its reply.
            self.signals.stop_requested = False
            if prompt.is_typed_line and prompt.text.lower().removeprefix("/") in LEAVE_WORDS:
                break
            # Show what comes of it, and write it down.
            if prompt.text:
                self._handle(prompt)
        if self.screen.interactive and self.autosave.has_saved_chat:
            self.screen.notice("llmchat -c continues this chat.")
        self.screen.write("Goodbye!\n")

    @property
    def reads_ahead(self) -> bool:
        """Whether the engine works while a prompt is typed."""
        # In a pipe nobody pauses to type. Several hosts would not read as far as each other.
        is_on_terminal = is_chat_on_terminal(self.settings, self.editor)
        return is_on_terminal and self.hosts.size == 1 and self.settings.read_ahead

    def warm_up(self) -> None:
        """Do now what reading ahead would begin with. Raises `ChatError` if the template fails."""
        self.conversation.warm_up(notes_memory=is_chat_on_terminal(self.settings, self.editor))
        self.show_notes()

    def _read_prompt(self) -> Prompt:
        draft = self.draft
        self.draft = ""
        self._show_waiting_files()
        self.signals.exit_if_signalled()
        if not self.reads_ahead:
            with self.signals.cancellable():
                return self.editor.read_prompt(draft)
        with self.conversation.read_ahead(self._file_contents()) as read_beginning:
            self.editor.on_first_paste = read_beginning
            with self.signals.cancellable():
                self.conversation.wait_until_warm(MAX_NOTE_WAIT_S)
                self.show_notes()
                return self.editor.read_prompt(draft)

    def show_notes(self) -> None:
        """Show what came up while nobody waited for the engine."""
        for note in self.conversation.take_notes():
            self.screen.notice(note)

    def _handle(self, prompt: Prompt) -> None:
        """Run a command, or send a prompt, and save the conversation.

        A `ChatError` or Ctrl+C does not end the chat, unless several hosts are out of step.
        """
        is_command = prompt.is_typed_line and COMMAND_LINE.fullmatch(prompt.text) is not None
        # What a command says, such as a system prompt, is on no disk.
        self.editor.add_to_history(prompt, on_disk=not is_command)
        try:
            if is_command:
                found, text = find_command(prompt.text)
                found.run(self, text)
            elif prompt.is_typed_line and prompt.text.startswith("//"):
                self.send(prompt.text[1:])
            else:
                self.send(prompt.text)
        except ChatError as error:
            self.signals.exit_if_signalled()
            # The other hosts do not know of an error of this one.
            if isinstance(error, EngineError) and self.hosts.size > 1:
                raise
            show_traceback_if_debugging()
            self._show_error(error)
        except KeyboardInterrupt:
            self.signals.exit_if_signalled()
            self.screen.notice("Stopped.")
        self.autosave.save(self.conversation.messages)

    def change_model(self, name: str) -> None:
        """Go on with another model, or with the one in use if that one can't be loaded.

        Raises `ChatError`, and `KeyboardInterrupt` on Ctrl+C while the model is found.
        """
        if self.hosts.size > 1 or self._loader is None:
            raise ChatError("Several hosts can't change their model: leave, and start with it.")
        wanted = dataclasses.replace(self.settings, **self._choice(name)._asdict())
        try:
            with self.signals.cancellable(), self._loader.status():
                found = self._loader.find(wanted)
                # What the engine computes for the old model must have ended.
                self.conversation.wait_until_idle()
        except KeyboardInterrupt:
            # The libraries must be done with the standard streams before a line is read.
            self.conversation.wait_until_idle()
            raise
        old = ModelChoice.of(self.settings)
        self.conversation.release_model()
        problem = self._load_in_place(found, wanted)
        if problem:
            self._load_again(problem)
            return
        self.screen.notice(f"The model is {wanted.model} now.")
        if (old.adapter, old.revision) not in (
            (None, None),
            (wanted.adapter, wanted.revision),
        ):
            self.screen.notice(f"--adapter and --revision are those of {old.model} alone.")
        self._adopt(wanted, found.folder)
        if not self.reads_ahead:
            self.warm_up()

    def _choice(self, name: str) -> ModelChoice:
        resolved = resolve_model_name(name)
        folders = [Path(name) for name in (resolved, str(self._first_choice.model))]
        is_same_folder = all(f.is_dir() for f in folders) and folders[0].samefile(folders[1])
        if is_same_folder or resolved == self._first_choice.model:
            return self._first_choice
        return ModelChoice(resolved, adapter=None, revision=None, trust_remote_code=False)

    def _load_in_place(self, found: ModelFiles, wanted: Settings) -> str:
        """Load a model where none is loaded any more; return why it can't be, or nothing."""
        assert self._loader is not None
        try:
            with self.signals.cancellable(), self._loader.status():
                self.conversation.use_model(self._loader.load(found, wanted))
        except ChatError as error:
            return str(error)
        except KeyboardInterrupt:
            self.signals.exit_if_signalled()
            return "Stopped."
        return ""

    def _load_again(self, problem: str) -> None:
        """Load the model that was in use, after another one could not be loaded."""
        assert self._loader is not None
        try:
            with self._loader.status():
                # A load that was interrupted goes on to its end.
                self.conversation.wait_until_idle()
                found = self._loader.find(self.settings)
                self.conversation.use_model(self._loader.load(found, self.settings))
        except ChatError:
            # This error ends the chat. Why the other model can't be used is to be seen before it.
            self._show_error(ChatError(problem))
            raise
        self._show_error(ChatError(f"{problem} {self.settings.model} is loaded again."))

    def _adopt(self, wanted: Settings, folder: Path) -> None:
        """Take the settings that belong to a model which was loaded."""
        for field, value in ModelChoice.of(wanted)._asdict().items():
            setattr(self.settings, field, value)
        for name, source in list(self.settings.sources.items()):
            if source == RECOMMENDATIONS_FILE:
                self.settings.reset(name)
        self.autosave.record_model()
        if self.settings.recommended and (sentence := apply_recommended(self.settings, folder)):
            self.screen.notice(sentence)

    def _show_error(self, error: ChatError) -> None:
        self.screen.notice(str(error), RED)
        self.has_failed = True

    def add_files(self, text: str) -> None:
        """Put the files that a line names before the next prompt. Raises `ChatError`."""
        with explain_errors(f"/file {shorten(text)}", "", ValueError):
            # The whole line may be one name, with spaces in it.
            one_name = os.path.exists(os.path.expanduser(text))
            names = [text] if one_name else shlex.split(text)
        with self.screen.status(lambda: "reading files"):
            files = read_texts(names)
            for file in files.values():
                self.conversation.check_size(file)
        self.files.update(files)

    def _file_contents(self) -> list[str]:
        return [file.content for file in self.files.values()]

    def _file_names(self) -> str:
        return ", ".join(file.name for file in self.files.values())

    def file_sizes(self) -> dict[str, int]:
        """Return the files that wait for the next prompt by name, with their sizes in tokens."""
        return {
            file.name: self.conversation.count_tokens(file.content) for file in self.files.values()
        }

    def _show_waiting_files(self) -> None:
        if self.files and self.screen.interactive:
            names = self._file_names()
            self.screen.notice(f"Before the next prompt: {names}; /file - drops that.")

    def send(self, prompt: str) -> None:
        """Show the reply to a prompt. Raises `ChatError`."""
        before = self.conversation.messages
        content = "\n\n".join([*self._file_contents(), prompt])
        # The prompt is saved before its reply comes, so that a crash loses only the reply.
        if self.settings.prompt is None:
            self.autosave.save([*before, {"role": "user", "content": content}])
        try:
            self.show_reply(self.conversation.reply(content))
        except PromptTooLongError as error:
            if not self.files:
                raise
            names = self._file_names()
            raise ChatError(f"{error} {names} stood before it: /file - drops that.") from error
        finally:
            if self.conversation.messages is before:
                # It was refused or stopped, or the engine failed: it stands in the next line.
                self.draft = prompt
            else:
                self.files = {}
                self.autosave.save(self.conversation.messages)

    def answer_once(self, prompt: str) -> int:
        """Show the one reply; return the exit status.

        Raises `ChatError`, also for a thought without an answer.
        """
        self.send(prompt)
        if not self.conversation.messages:
            raise ChatError("The model generated nothing: ask again, or in other words.")
        reply = self.conversation.messages[-1]
        if "finish_reason" in reply and not reply["content"]:
            raise ChatError(
                "The reply ended within its thought: --max-thought-tokens closes that sooner."
            )
        if not reply["content"].strip():
            raise ChatError("The reply holds no answer: ask again, or in other words.")
        return 1 if self.has_failed else 0

    def close(self) -> None:
        """Save the engine's state beside the session, if that is wanted."""
        session = self.autosave.session
        if not (self.settings.keep_state and session):
            return
        try:
            with self.screen.status(lambda: "saving the state"):
                self.conversation.save_state(session.state_path)
        except (OSError, ChatError) as error:
            # Only time is lost, and this must not hide why the chat ends.
            with contextlib.suppress(StreamError):
                self.screen.notice(f"The state is not saved: {root_cause_text(error)}.")

    def show_reply(self, pieces: Generator[Piece, None, None]) -> None:
        """Show the pieces of a reply as they come, until it ends or a stop is requested."""
        activity = "reading the prompt"

        view = ReplyView(self.screen, self.settings.hide_thoughts, self.settings.plain)
        # To close the generator is to stop the reply. It yields often, also while the engine works.
        with self.screen.status(lambda: activity), view, contextlib.closing(pieces):
            for piece in pieces:
                if piece is WAITING_PIECE:
                    if self.signals.stop_requested:
                        break
                    continue
                if piece.kind == "prefill" and piece.text:
                    activity = f"reading the prompt: {piece.text}"
                view.show(piece)
        self._show_ending(self.conversation.statistics)

    def _show_ending(self, statistics: Statistics) -> None:
        """Say how a reply ended, where that can't be seen."""
        finish_reason = statistics.finish_reason
        if self.signals.stop_requested and finish_reason != "stop":
            if statistics.generation_tokens:
                self.screen.notice(f"Stopped; {self._how_to_go_on(statistics)}.")
            else:
                self.screen.notice("Stopped.")
        elif finish_reason == "length":
            tokens = counted(statistics.answer_tokens or statistics.generation_tokens, "token")
            self.screen.notice(f"Cut at {tokens}; {self._how_to_go_on(statistics)}.")
        elif finish_reason == "stop" and not self.conversation.messages[-1]["content"].strip():
            self.screen.notice("(an empty reply)")
        if finish_reason and self.settings.stats:
            self.screen.notice(statistics.summary())

    def _how_to_go_on(self, statistics: Statistics) -> str:
        """Return what can be done about a reply that was cut or stopped."""
        reply = self.conversation.messages[-1]
        if statistics.remaining_tokens <= 0:
            return "the context is full"
        if self.settings.prompt is not None:
            return "--max-tokens allows more"
        if "reasoning_content" in reply and not reply["content"]:
            return "/continue goes on, /answer ends the thought"
        return "/continue goes on"


def welcome(chat: Chat) -> None:
    """Say how to go on, and with which conversation."""
    screen = chat.screen
    if screen.interactive:
        leave = "quit or Ctrl+D leaves"
        if not chat.editor.interactive:
            leave = f"on {chat.hosts.size} hosts · quit leaves"
        name = Path(str(chat.settings.model)).name
        screen.notice(f"{name} · /help lists the commands · {leave}")
    session = chat.autosave.session
    messages = chat.conversation.messages
    if not (session and messages):
        return
    turns = counted(len(messages) // 2, "turn")
    name = chat.settings.session or describe_moment(session.modified)
    screen.notice(f"Going on with {turns} of {name}.")
    if screen.interactive:
        # Files may stand before the prompt, which comes last.
        prompt, reply = (message["content"] for message in messages[-2:])
        lines = [f"> {line}" for line in prompt.splitlines()[-MAX_SHOWN_LINES:]]
        screen.notice("\n".join([*lines, reply]))


def open_session(
    settings: Settings, saved_chats: SavedChats, screen: Screen
) -> tuple[SessionFile | None, list[Message], str]:
    """Return the session file, its turns, and a last prompt that is still without its reply.

    The system prompt comes from the file unless one was given, and so does the model. Raises
    `ChatError`.
    """
    session = None
    if settings.session is not None and settings.resume:
        raise ChatError("-c goes on with a saved chat, --session with a file: leave out one.", 2)
    if settings.session is not None:
        session = SessionFile(Path(os.path.expanduser(settings.session)))
    elif settings.resume:
        if settings.keep is False and settings.sources["keep"] == "flag":
            raise ChatError("-c writes to the saved chat, and --no-keep to none: leave out one.", 2)
        named = ""
        if settings.sources.get("model") == "flag":
            named = str(settings.model)
        if settings.resume_number is not None:
            session, settings.model = saved_chats.open_numbered(settings.resume_number)
        else:
            model = resolve_model_name(named) if named else None
            session, settings.model = saved_chats.open_latest(model, screen.notice)
    messages = list(session.messages) if session else []
    draft = ""
    if messages and messages[-1]["role"] == "user":
        draft = messages.pop()["content"]
    if messages and messages[0]["role"] == "system":
        settings.system = settings.system or messages[0]["content"]
        del messages[0]
    return session, messages, draft


def can_save(
    saved_chats: SavedChats,
    saves_chats: bool,
    settings: Settings,
    screen: Screen,
    editor: LineEditor,
) -> bool:
    """Return whether chats can be saved; say it once if the home can't hold what it should."""
    places = {}
    if saves_chats:
        places["chats"] = saved_chats.folder
    if is_chat_on_terminal(settings, editor) and settings.keep is not False:
        places["prompts"] = Path(os.path.expanduser(HISTORY_FILE))
    if warning := unsaved_warning(places):
        screen.notice(warning)
    return not access_problem(saved_chats.folder)


def will_save_chats(settings: Settings, screen: Screen, hosts: Hosts) -> bool:
    """Return whether what has no session file of its own is saved among the user's chats."""
    if settings.prompt is not None or hosts.rank:
        return False
    if settings.keep is not None:
        return settings.keep or settings.resume
    # A chat that is piped in is only saved if that was asked for.
    is_typed = sys.stdin.isatty() or screen.interactive
    return is_typed or settings.resume or settings.session is not None


def new_files(settings: Settings, messages: Sequence[Message]) -> dict[str, TextFile]:
    """Return the files of the command line that the conversation has not got yet.

    So the same command on the same session can ask again about a document.
    """
    earlier = ""
    if settings.history:
        earlier = "\n".join(message["content"] for message in messages)
    files = read_texts(settings.file)
    return {path: file for path, file in files.items() if file.content not in earlier}


def open_chat(
    settings: Settings,
    screen: Screen,
    editor: LineEditor,
    hosts: Hosts,
    signals: Signals,
    engine: Engine,
    saved_chats: SavedChats,
) -> Chat:
    """Open the session, read the files and load the model. Raises `ChatError`."""
    session: SessionFile | None = None
    messages: list[Message] = []
    draft = ""
    if hosts.rank == 0:
        session, messages, draft = open_session(settings, saved_chats, screen)
    if hosts.size > 1:
        shared = [settings.model, settings.system, messages]
        settings.model, settings.system, messages = engine.call(hosts.broadcast, shared)
        # Each host holds only its part of the state.
        settings.keep_state = False
    if draft and not is_chat_on_terminal(settings, editor):
        name = settings.session or "the chat"
        screen.notice(f"The last prompt of {name} got no reply, and is left out: {draft}")
        draft = ""
    files = new_files(settings, messages)
    loader = ModelLoader(screen, hosts, engine)
    model = load_first_model(settings, screen, loader)
    conversation = Conversation(engine, model, settings, messages)
    if session and settings.keep_state and is_private(session.state_path):
        conversation.load_state(session.state_path)
    saves_chats = will_save_chats(settings, screen, hosts)
    if not can_save(saved_chats, saves_chats and session is None, settings, screen, editor):
        saves_chats = False
    return Chat(
        conversation,
        screen,
        editor,
        settings,
        signals=signals,
        hosts=hosts,
        loader=loader,
        session=session,
        saved_chats=saved_chats if saves_chats else None,
        files=files,
        draft=draft,
    )


def run(
    settings: Settings,
    screen: Screen,
    editor: LineEditor,
    hosts: Hosts,
    signals: Signals,
    engine: Engine,
) -> int:
    """Do what the command line asks for; return the exit status. Raises `ChatError`."""
    saved_chats = SavedChats(Path(os.path.expanduser(CHATS_FOLDER)))
    if settings.chats:
        rows = saved_chats.rows()
        screen.write(format_table(rows) or f"There are no saved chats in {saved_chats.folder}.\n")
        return 0
    prompt = None
    if settings.prompt is not None:
        prompt = one_shot_prompt(settings.prompt, sys.stdin, hosts.size > 1, screen.notice)
    elif notice := folder_config_notice(settings):
        screen.notice(notice)
    is_on_terminal = is_chat_on_terminal(settings, editor)
    if is_on_terminal:
        # Before the model loads: keys that are typed meanwhile wait for the prompt.
        editor.open(completions, signals.request_stop)
    chat = open_chat(settings, screen, editor, hosts, signals, engine, saved_chats)
    with contextlib.closing(chat):
        if not chat.reads_ahead:
            chat.warm_up()
        if prompt is not None:
            return chat.answer_once(prompt)
        welcome(chat)
        if is_on_terminal:
            signals.start_chat()
        chat.run()
    return 1 if chat.has_failed and not editor.interactive else 0


def repair_standard_streams() -> None:
    """Replace standard streams that were closed.

    The others are told to replace what they can't encode.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def open_terminal(hosts: Hosts, settings: Settings) -> Iterator[tuple[Screen, LineEditor]]:
    """Give this process its screen and its line editor, and leave the terminal as it was found.

    On other hosts than rank 0 nothing is seen.
    """
    out: TextIO = sys.stdout
    err: TextIO = sys.stderr
    history = None
    history_path = Path(os.path.expanduser(HISTORY_FILE))
    if hosts.rank:
        out = err = open(os.devnull, "w")
    elif not access_problem(history_path):
        history = PromptHistory(history_path, keep=settings.keep is not False)
    on_terminal = sys.stdin.isatty() and out.isatty()
    # mlx.launch sets COLUMNS for the processes that it starts if its own output is a terminal.
    launched_on_terminal = hosts.size > 1 and "COLUMNS" in os.environ
    screen = Screen(out, err, on_terminal or launched_on_terminal, settings.plain)
    editor = LineEditor(sys.stdin, screen, history)
    try:
        yield screen, editor
    finally:
        try:
            # A second Ctrl+C must not leave the terminal half put back.
            ignore_ending_signals()
        finally:
            editor.close()


def shared_settings(argv: Sequence[str] | None, hosts: Hosts, engine: Engine) -> Settings:
    """Return the settings of rank 0, on every host."""
    values: Any = None
    if hosts.rank == 0:
        values = vars(read_settings(argv))
    if hosts.size > 1:
        values = engine.call(hosts.broadcast, values)
    return Settings(**values)


# How long other hosts than rank 0 wait before they say an error.
OTHER_HOST_DELAY_S = 10.0


def show_last_error(message: str, hosts: Hosts) -> None:
    """Show the error that ends the program."""
    if hosts.rank:
        # An error that all hosts have met is said once: when rank 0 has ended, the launcher ends
        # the others.
        time.sleep(OTHER_HOST_DELAY_S)
        message = f"On {os.uname().nodename}: {message}"
    screen = Screen(sys.stdout, sys.stderr, interactive=False)
    screen.notice(f"llmchat: error: {message}", RED)


def run_with_signals(argv: Sequence[str] | None, engine: Engine) -> int:
    """Run the program with its signal handlers; return the exit status."""
    hosts = Hosts()
    signals = Signals()
    message = ""
    try:
        with signals:
            hosts = join_hosts(engine)
            settings = shared_settings(argv, hosts, engine)
            with open_terminal(hosts, settings) as (screen, editor):
                return run(settings, screen, editor, hosts, signals, engine)
    except ChatError as error:
        show_traceback_if_debugging()
        message = str(error)
        status = error.status
    except SystemExit as error:
        # Raised by argparse, or by `exit_if_signalled`.
        status = int(error.code or 0)
    except StreamError as error:
        show_traceback_if_debugging()
        cause = error.__cause__ or error
        # Python's own flush at exit must not fail once more on a standard output that is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
        message = f"Standard input or output can't be used any more: {error_text(cause)}."
        if isinstance(cause, BrokenPipeError):
            status = 128 + signal.SIGPIPE
            message = ""
    except BaseException:
        # A signal's KeyboardInterrupt may surface as another exception, for instance of an import.
        if not signals.exit_status:
            raise
        status = signals.exit_status
    # After a signal only a message that belongs to it is shown: of a download that was stopped.
    if message and signals.exit_status in (0, status):
        show_last_error(message, hosts)
    return signals.exit_status or status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status.

    If a model was loaded, this ends the process (see `Engine.end_process`).
    """
    if sys.version_info < (3, 9):
        needed = "Python 3.9 or newer is needed: there is no MLX for this one."
        print(f"llmchat: error: {needed}", file=sys.stderr)
        return 1
    repair_standard_streams()
    engine = Engine()
    try:
        status = run_with_signals(argv, engine)
    except BaseException:
        if not engine.was_used:
            raise
        traceback.print_exc()
        status = 1
    engine.end_process(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
