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
    Model          finding it, checking it, loading it
    Prompt cache   the tokens whose state the engine holds, and the cheapest way to a new prompt
    Thoughts       telling a reasoning model's thoughts from its answer
    Conversation   messages, and replies as generators of pieces; never prints
    Session        a conversation on disk
    Terminal       reads prompts, shows pieces; knows nothing of MLX
    Program        commands, the chat loop, signals, `main`

Exit statuses: 0 done, 1 an error said in one sentence, 2 wrong usage or configuration, 130, 143 and
129 interrupted by SIGINT, SIGTERM or SIGHUP, 141 standard output closed.

What it refuses to be: a server, a downloader, a converter, an agent. It has no plug-ins, runs no code
from a model repository unless told to, and asks the network for nothing that is already on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import inspect
import io
import itertools
import json
import os
import re
import select
import signal
import stat
import sys
import termios
import threading
import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Dict, NamedTuple, NoReturn, TextIO

__version__ = "0.1.0"

MAX_TOKENS = 512
TEMPERATURE = 0.7
TOP_P = 0.9

# Tokens put through the model between two looks at Ctrl+C while a prompt is read (prefill).
# mlx-lm's own default is 2048, which a small model on a slow machine takes a second for.
PREFILL_STEP_TOKENS = 512

# Below this a temperature is as good as 0, and 1 / temperature overflows a float32 further down.
LEAST_TEMPERATURE = 1e-3

# mlx-lm's own default for how many last tokens a repetition penalty looks at.
REPETITION_CONTEXT_TOKENS = 20

# Linux takes no more than about this much of one wish to have a file read ahead, and forgets the rest.
READ_AHEAD_BYTES = 1 << 21

# What is quoted of another program's error: enough for a file's path and a reason.
READABLE_CHARACTERS = 300

# What ends the program, with 128 and its number; but Ctrl+C on a terminal, once the model is loaded.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# How long the way out may take on one of several hosts, and how long the others wait for rank 0 to end first.
LEAVE_S = 0.5

CONFIG_FILE = ".llmchat_config"
HISTORY_FILE = ".llmchat_history"
HISTORY_ENTRIES = 1000
HISTORY_BYTES = 1 << 20
LEAVE_WORDS = ("quit", "bye", "exit")
EXAMPLE_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"

# A message of a conversation: its role, its content, and whatever else a session file says of it.
Message = Dict[str, str]


# ---------------------------------------------------------------------------------------- Errors


class ChatError(Exception):
    """A finished sentence for the user: what happened, to what, and what would work instead."""

    def __init__(self, sentence: str, status: int = 1, *, fatal: bool = False) -> None:
        super().__init__(sentence)
        # What `main` is to return if nothing catches this: 1, or 2 for wrong usage or configuration.
        self.status = status
        # Whether the chat can't go on.
        self.fatal = fatal


def shortened(text: str) -> str:
    """A foreign text on one line, cut where nobody would read on."""
    text = " ".join(text.split())
    return text if len(text) <= READABLE_CHARACTERS else text[: READABLE_CHARACTERS - 1] + "…"


def one_line(error: BaseException) -> str:
    """What a foreign error says, on one short line and never empty."""
    return shortened(str(error)) or type(error).__name__


# -------------------------------------------------------------------------------------- Settings


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A question that names what is most like a mistyped word, or nothing."""
    near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def number(convert: Callable[[str], Any], low: float, high: float | None = None) -> Callable[[str], Any]:
    """A parser of one number in [low, high]; it raises `ArgumentTypeError` with the range."""
    kind = "a whole number" if convert is int else "a number"
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = convert(text)
            # Written so that a NaN, which compares false with everything, is refused.
            if low <= value <= (sys.float_info.max if high is None else high):
                return value
        raise argparse.ArgumentTypeError(f"must be {kind} {bounds}, not '{text}'")

    return parse


def switch(text: str) -> bool:
    """A yes or no as a config file or `/set` says it."""
    for words, value in ((("true", "yes", "on", "1"), True), (("false", "no", "off", "0"), False)):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"must be true or false, not '{text}'")


def option(
    default: Any,
    parse: Callable[[str], Any],
    help: str,
    *,
    flags: Sequence[str] = (),
    metavar: str | None = None,
    in_file: bool = True,
    in_chat: bool = False,
) -> Any:
    """Declare one parameter: everything that flags, config files and `/set` know of it is here."""
    about = {"parse": parse, "help": help, "flags": flags, "metavar": metavar, "in_file": in_file, "in_chat": in_chat}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass
class Settings:
    """Every parameter of the program. A field's name is its key, with `-` for `_`."""

    model: str | None = option(None, str, "a Hugging Face repository or a folder", metavar="MODEL")
    prompt: str | None = option(
        None,
        str,
        "print the reply to TEXT and leave; piped standard input is put before it, - is standard input alone",
        flags=["-p"],
        metavar="TEXT",
        in_file=False,
    )
    system: str | None = option(None, str, "the system prompt", metavar="TEXT", in_chat=True)
    max_tokens: int = option(
        MAX_TOKENS, number(int, 1), f"the longest reply, in tokens (default {MAX_TOKENS})", metavar="N", in_chat=True
    )
    temperature: float = option(
        TEMPERATURE,
        number(float, 0, 10),
        f"how freely words are chosen; 0 takes the likeliest (default {TEMPERATURE})",
        metavar="T",
        in_chat=True,
    )
    top_p: float = option(
        TOP_P,
        number(float, 0, 1),
        f"choose among the likeliest tokens with this total probability (default {TOP_P}; 0 or 1 is off)",
        metavar="P",
        in_chat=True,
    )
    top_k: int = option(
        0, number(int, 0), "choose among the K likeliest tokens (default 0: off)", metavar="K", in_chat=True
    )
    min_p: float = option(
        0.0,
        number(float, 0, 1),
        "leave out tokens less likely than P times the likeliest (default 0: off)",
        metavar="P",
        in_chat=True,
    )
    repetition_penalty: float = option(
        1.0,
        number(float, 0.01, 10),
        f"make the last {REPETITION_CONTEXT_TOKENS} tokens less likely (default 1: off)",
        metavar="X",
        in_chat=True,
    )
    seed: int | None = option(None, number(int, 0, 2**32 - 1), "make replies repeatable", metavar="N", in_chat=True)
    history: bool = option(True, switch, "send each prompt alone, without the turns before it", in_chat=True)
    think: bool | None = option(
        None, switch, "ask a reasoning model to think, or not to (default: as its template does)", in_chat=True
    )
    hide_thoughts: bool = option(False, switch, "show that a reasoning model thinks, not what", in_chat=True)
    stats: bool = option(False, switch, "show time, tokens and cache use after each reply", in_chat=True)
    session: str | None = option(
        None, str, "go on with the conversation in FILE (JSON Lines), and keep it there", metavar="FILE", in_file=False
    )
    adapter: str | None = option(None, str, "a LoRA adapter to load on top of the model", metavar="FOLDER")
    revision: str | None = option(None, str, "the branch, tag or commit of the repository", metavar="NAME")
    pipeline: bool = option(
        False, switch, "on several Macs: give each host whole layers of the model, not a share of every layer"
    )
    trust_remote_code: bool = option(False, switch, "run code that the model repository brings along", in_file=False)
    force: bool = option(False, switch, "load a model that seems too large for the memory, or not made for talking")

    # Where each value that is not a default came from: a file, "flag" or "here".
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, after the system prompt if there is one."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]


OPTIONS = {field.name.replace("_", "-"): field for field in dataclasses.fields(Settings) if "parse" in field.metadata}


def option_for(key: str, value: str) -> tuple[dataclasses.Field[Any], Any]:
    """The option and the value that `key = value` means, as in a config file or `/set`.

    Raises `ArgumentTypeError` for an unknown key or a bad value. `no-KEY` is a switch turned round.
    """
    name = key.lower().replace("_", "-")
    negated = name.startswith("no-") and name[3:] in OPTIONS and OPTIONS[name[3:]].metadata["parse"] is switch
    field = OPTIONS.get(name[3:] if negated else name)
    if field is None:
        raise argparse.ArgumentTypeError(f"is no setting{did_you_mean(name, OPTIONS)}")
    if not value:
        raise argparse.ArgumentTypeError("needs a value")
    parsed = field.metadata["parse"](value)
    return field, (not parsed if negated else parsed)


def read_config(path: Path) -> dict[str, Any]:
    """The parameters in a file of `key = value` lines; a `#` first in a line, or between blanks, starts a comment.

    A file that is not there says nothing. Raises `ChatError` naming file and line.
    """
    if not path.exists():
        return {}
    try:
        if not path.is_file():
            raise OSError("it is no file")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"{path} could not be read: {one_line(error)}. Mend or remove it.", 2) from error
    values: dict[str, Any] = {}
    for count, line in enumerate(lines, 1):
        text = re.sub(r"^\s*#.*|\s#(\s.*)?$", "", line).strip()
        if not text:
            continue
        key, equals, value = (part.strip() for part in text.partition("="))
        try:
            if not equals:
                raise argparse.ArgumentTypeError("is not of the form 'key = value'")
            field, parsed = option_for(key, value)
            if not field.metadata["in_file"]:
                raise argparse.ArgumentTypeError("can only be given on the command line")
        except argparse.ArgumentTypeError as error:
            raise ChatError(f"{path}:{count}: {key} {error}", 2) from error
        values[field.name] = parsed
    return values


def argument_parser() -> argparse.ArgumentParser:
    """The command line, made from the options. What is not given is left out of the namespace."""
    parser = argparse.ArgumentParser(
        prog="llmchat",
        usage="llmchat MODEL [options]",
        description="Talk with a local language model in the terminal.",
        epilog=f"Defaults can stand in ~/{CONFIG_FILE} and ./{CONFIG_FILE}: lines of 'key = value', keys as the flags.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for key, field in OPTIONS.items():
        about = field.metadata
        if key == "model":
            parser.add_argument(key, nargs="?", metavar=about["metavar"], help=about["help"])
        elif about["parse"] is switch:
            # Both ways round, so that a flag can overrule a file; help shows the one that changes something.
            shown = {True: field.default is not True, False: field.default is not False}
            for value, flag in ((True, f"--{key}"), (False, f"--no-{key}")):
                text = about["help"] if shown[value] else argparse.SUPPRESS
                parser.add_argument(flag, dest=field.name, action="store_const", const=value, help=text)
        else:
            flags = [*about["flags"], f"--{key}"]
            parser.add_argument(
                *flags, dest=field.name, type=about["parse"], metavar=about["metavar"], help=about["help"]
            )
    parser.add_argument("--version", action="version", version=f"llmchat {__version__}")
    return parser


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Defaults, then the config files of the home and the working folder, then the flags.

    Raises `ChatError` for a wrong config file; argparse itself leaves with 2 for wrong flags.
    """
    flags = vars(argument_parser().parse_args(argv))
    settings = Settings()
    files = [Path(os.path.expanduser("~")) / CONFIG_FILE, Path(CONFIG_FILE)]
    for source, values in [*((str(path), read_config(path)) for path in files), ("flag", flags)]:
        for name, value in values.items():
            setattr(settings, name, value)
            settings.sources[name] = source
    return settings


# ----------------------------------------------------------------------------------------- Hosts


# What mlx.launch sets for the processes that it starts, and mpirun for those that it starts for mlx.launch.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")

# A host that waits for another one keeps a core busy. So while nobody says anything, all meet only this often.
MEETING_S = 0.05


class Hosts:
    """The processes that hold one model together, each on a host of its own, or on a plain start just this one.

    Rank 0 alone reads, prints and writes files; the others do what it hands them. Every host has to make
    the same calls in the same order, since each returns only once all have made it. If a host is lost, they
    raise a fatal `ChatError`; one without a sentence, on other hosts than rank 0, leaves that to rank 0.
    """

    def __init__(self, group: Any = None) -> None:
        # MLX's own group; None on a plain start.
        self.group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1
        # Whether the others wait for what rank 0 shares next, and don't do what it has handed them.
        self._listening = True

    def _collect(self, collective: Callable[..., Any], value: Any) -> Any:
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        try:
            # Not beside but behind what the engine still has to do: it is one token ahead of the last reply.
            with mx.stream(generation_stream):
                result = collective(mx.array(value), group=self.group)
                mx.eval(result)
        except RuntimeError as error:
            self._listening = False
            raise ChatError(
                "" if self.rank else f"Another host is gone, so the chat can't go on: {one_line(error)}.", fatal=True
            ) from error
        return result

    def gather(self, value: int) -> list[int]:
        """The values that all hosts give, by rank."""
        if self.size == 1:
            return [value]
        import mlx.core as mx

        return list(self._collect(mx.distributed.all_gather, [value]).tolist())

    def share(self, value: Any = None, source: int = 0) -> Any:
        """What the host of rank `source` gives, on every host: anything that JSON knows."""
        if self.size == 1:
            return value
        import mlx.core as mx

        data = json.dumps(value).encode() if self.rank == source else b""
        while not (size := sum(self.gather(len(data)))):
            time.sleep(MEETING_S)
        # The sum of what one host gives, and of zeros.
        shared = self._collect(mx.distributed.all_sum, bytearray(data or size))
        return json.loads(bytes(shared))

    def meet(self) -> None:
        """Have nothing to share yet; rank 0 calls this while the others wait."""
        self.gather(0)

    @contextlib.contextmanager
    def lead(self, settings: Settings, **turn: Any) -> Iterator[None]:
        """Hand the others what they do next while rank 0 does it too, all with the same random numbers."""
        if self.size == 1:
            yield
            return
        import mlx.core as mx

        state: Any = mx.random.state
        high, low = state[0].tolist()
        self.share({**turn, "settings": dataclasses.asdict(settings), "seed": high << 32 | low})
        # The key that MLX makes of this is the one that is there already.
        mx.random.seed(high << 32 | low)
        self._listening = False
        yield
        self._listening = True

    def dismiss(self, status: int) -> None:
        """Have the others end with this status too, if they wait to be told something.

        After an error or a signal that they can't be told of, the launcher ends them.
        """
        if self.size > 1 and self.rank == 0 and self._listening:
            with contextlib.suppress(ChatError):
                self.share({"status": status})

    def in_turn(self, sentence: str) -> str:
        """What to say of an error, when it is this host's turn: if all have met it, rank 0 alone comes to say so.

        Once rank 0 has ended, the launcher ends the others.
        """
        if self.rank:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(LEAVE_S)
        return self._named(sentence)

    def _named(self, sentence: str) -> str:
        return f"On {os.uname().nodename}: {sentence}" if self.rank else sentence

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Have every host fail if one does: rank 0 with the first complaint there is, the others in silence."""
        complaint = ""
        try:
            yield
        except ChatError as error:
            if self.size == 1:
                raise
            complaint = self._named(str(error))
        if self.size > 1:
            complaints = [self.share(complaint, rank) for rank in range(self.size)]
            if any(complaints):
                raise ChatError(next(filter(None, complaints)) if self.rank == 0 else "")


def join_hosts() -> Hosts:
    """The hosts that mlx.launch started, seen from the environment that it sets; else this one alone.

    Raises `ChatError` where they can't be joined.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return Hosts()
    import mlx.core as mx

    # MLX waits for the others without looking at signals.
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
    try:
        return Hosts(mx.distributed.init(strict=True))
    except (RuntimeError, ValueError) as error:
        raise ChatError(
            f"The hosts that mlx.launch started can't be joined: {one_line(error)}. On one Mac, leave mlx.launch out."
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------- Model


# What mlx-lm loads, and beside it what mlx-lm's own `load` would download.
WEIGHTS = "model*.safetensors"
BESIDE_WEIGHTS = (
    *("*.json", "*.py", "*.txt", "*.jsonl", "*.jinja"),
    *("tokenizer.model", "*.tiktoken", "tiktoken.model"),
)
# Whose weights they are that MLX can't load, by the ending of their files.
OTHER_FORMATS = {".gguf": "GGUF", ".bin": "PyTorch", ".pt": "PyTorch", ".pth": "PyTorch", ".onnx": "ONNX"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tokenization_*.py")
# The last words of architectures that answer with a vector or a label. GPT2LMHeadModel and the like do talk.
SILENT_ARCHITECTURE = re.compile(r"(?<!LMHead)Model$|ForMaskedLM$|ForFeatureExtraction$|For\w*Classification$")

# The longest header that the safetensors format allows.
HEADER_BYTES = 100_000_000

GIB = 1 << 30
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_DISK = "Make room for it, or set HF_HOME to a folder on another disk."
KEPT = "Every finished file is kept; run the same command again to fetch the rest."


def hub_cache() -> Path:
    """The folder in which huggingface-hub keeps models: its own rule, said again so that nothing is imported."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def is_cached(folder: Path) -> bool:
    """Whether a model folder is one of the hub cache, so that what is missing or broken there can be downloaded."""
    return hub_cache() in folder.parents


def read_json(text: bytes) -> Any:
    """What stands in a JSON text. Raises `ValueError` for whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def weight_map(folder: Path) -> Any:
    """Which file holds each weight, by the index, of which nothing is certain."""
    return read_json((folder / "model.safetensors.index.json").read_bytes())["weight_map"]


# What may come of a `weight_map` and its use.
NO_WEIGHT_MAP = (OSError, ValueError, TypeError, KeyError, AttributeError)


def weight_files(folder: Path) -> list[Path]:
    """The weight files that a model folder should hold, whether or not they are there.

    An index names them; without one a shard's name says how many there are. Nothing found is an empty list.
    """
    with contextlib.suppress(*NO_WEIGHT_MAP):
        return sorted({folder / name for name in weight_map(folder).values()})
    found = []
    # What can't be the name of a folder is one in which nothing is found.
    with contextlib.suppress(OSError, ValueError):
        found = sorted(folder.glob(WEIGHTS))
    shard = re.fullmatch(r"(model.*-)\d+-of-(\d{5,6})\.safetensors", found[0].name) if found else None
    if shard is None:
        return found
    return [folder / f"{shard[1]}{n:05}-of-{shard[2]}.safetensors" for n in range(1, int(shard[2]) + 1)]


def missing_weights(folder: Path) -> list[str]:
    """The names of weight files that should be there and are not."""
    return [file.name for file in weight_files(folder) if not file.exists()]


def is_complete(folder: Path, *, weights: bool = True) -> bool:
    """Whether a folder of the hub cache holds all that loading needs, or all but weights that an index names.

    A file is only there when it is whole.
    """
    files = weight_files(folder)
    needed = [folder / "config.json", folder / "tokenizer_config.json", *(files if weights else ())]
    return bool(files) and all(file.exists() for file in needed)


def snapshot(name: str, revision: str | None) -> Path:
    """The folder of a repository in the hub cache, whether or not it is there; found without the hub's library."""
    repository = hub_cache() / ("models--" + name.replace("/", "--"))
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):
        commit = (repository / "refs" / commit).read_text().strip()
    return repository / "snapshots" / commit


def cached_models() -> list[str]:
    """The repositories in the hub cache that can be started without a download."""
    names = (entry.name[len("models--") :].replace("--", "/") for entry in sorted(hub_cache().glob("models--*")))
    return [name for name in names if is_complete(snapshot(name, None))]


def read_ahead(files: Sequence[Path]) -> None:
    """Have weight files read into the page cache in the background, while the libraries are imported."""
    buffer = bytearray(READ_AHEAD_BYTES)

    def ask(descriptor: int, offset: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        else:
            # macOS has no such call: there the bytes are read, and dropped.
            os.preadv(descriptor, [buffer], offset)

    def run() -> None:
        for file in files:
            # Whatever is wrong with a file is said by the load that follows.
            with contextlib.suppress(OSError), open(file, "rb", buffering=0) as stream:
                for offset in range(0, os.fstat(stream.fileno()).st_size, READ_AHEAD_BYTES):
                    ask(stream.fileno(), offset)

    threading.Thread(target=run, daemon=True).start()


def instruct_sibling(name: str) -> str:
    """The name under which a base model's instruct-tuned sibling most likely stands."""
    base = re.sub(r"[-_](base|pt)\b", "", name, flags=re.IGNORECASE)
    quantized = re.search(r"[-_](\d+bit|bf16|fp16|mxfp4|nvfp4|mlx).*$", base, flags=re.IGNORECASE)
    end = quantized.start() if quantized else len(base)
    return base[:end] + ("-it" if "gemma" in base.lower() else "-Instruct") + base[end:]


def mlx_twin(name: str) -> str:
    """The name under which a model that is there in another format most likely stands for MLX."""
    base = re.sub(r"[-_.]gguf$", "", name.rstrip("/").rpartition("/")[2], flags=re.IGNORECASE)
    return f"mlx-community/{base}-4bit"


def context_length(config: dict[str, Any]) -> int | None:
    """How many tokens the model was made for, by its configuration; None where it doesn't say."""
    for part in (config, config.get("text_config")):
        for key in (
            "max_position_embeddings",
            "n_positions",
            "max_sequence_length",
            "max_seq_len",
            "seq_length",
            "n_ctx",
        ):
            if isinstance(part, dict) and isinstance(part.get(key), int) and part[key] > 0:
                return int(part[key])
    return None


@dataclasses.dataclass
class Model:
    """A loaded model: the network, its tokenizer, what its configuration says, and who holds it."""

    name: str
    net: Any
    tokenizer: Any
    context_length: int | None
    hosts: Hosts = dataclasses.field(default_factory=Hosts)

    def render(self, messages: list[Message], think: bool | None = None) -> str:
        """The chat template's text for `messages`, up to where the reply starts.

        Raises `ChatError` where the template does.
        """
        # mlx-lm's wrapper tells every template to think; a user who said nothing gets the template's own
        # default, so the tokenizer inside is asked, unless mlx-lm brings the template along as a function.
        wrapped = getattr(self.tokenizer, "_chat_template", None) is not None
        tokenizer = self.tokenizer if wrapped else getattr(self.tokenizer, "_tokenizer", self.tokenizer)
        choice = {} if think is None else {"enable_thinking": think}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **choice)
        except Exception as error:
            raise ChatError(
                f"The chat template of {self.name} can't render this conversation: {one_line(error).rstrip('.')}."
                " Leave out the system prompt, or take turns back with /undo."
            ) from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """The token ids of a rendered text, which brings its own BOS."""
        # A flag or a file may hold what is no text: half a surrogate pair, which no tokenizer takes.
        text = text.encode(errors="replace").decode()
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def check_files(name: str, files: Collection[str]) -> None:
    """Raise `ChatError` unless the names of a folder's or repository's files are those of a model for MLX."""
    formats = sorted({OTHER_FORMATS[suffix] for suffix in {Path(file).suffix for file in files} & {*OTHER_FORMATS}})
    has_weights = bool(fnmatch.filter(files, WEIGHTS))
    if formats and not has_weights:
        raise ChatError(
            f"{name} holds its weights as {' and '.join(formats)} files, where MLX needs {WEIGHTS}:"
            f" {mlx_twin(name)} may hold the same model."
        )
    if "config.json" not in files:
        raise ChatError(f"{name} has no config.json: name the folder of a model, or a Hugging Face repository.")
    if not has_weights:
        raise ChatError(f"{name} holds no {WEIGHTS}: MLX can load no other format. Name another model.")


def read_model_config(folder: Path, name: str) -> dict[str, Any]:
    """The `config.json` of a folder. Raises `ChatError` where it is broken."""
    try:
        config = read_json((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ChatError(f"config.json of {name} can't be read: {one_line(error)}. {mend(folder)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ChatError(
            f"config.json of {name} names no model_type, so this is no language model that mlx-lm can load."
            " Name another model."
        )
    return config


def check_config(name: str, config: dict[str, Any], files: Collection[str], settings: Settings) -> None:
    """Raise `ChatError` unless the model is one that mlx-lm knows, that talks, and that brings no code to run."""
    listed = config.get("architectures")
    architectures = [str(architecture) for architecture in listed] if isinstance(listed, list) else []
    silent = bool(architectures) and all(map(SILENT_ARCHITECTURE.search, architectures))
    if ("modules.json" in files or silent) and not settings.force:
        raise ChatError(
            f"{name} is made for embeddings or labels, not for talking: name a chat model such as {EXAMPLE_MODEL},"
            " or try it all the same with --force."
        )
    own_code = config.get("model_file")
    if own_code is None:
        check_model_type(name, config)
    elif not settings.trust_remote_code:
        # mlx-lm before 0.32 runs such a file unasked (CVE-2026-5843).
        raise ChatError(
            f"{name} wants to run its own code ({shortened(str(own_code))}): if you trust it,"
            " --trust-remote-code allows that."
        )


def check_model_type(name: str, config: dict[str, Any]) -> None:
    """Raise `ChatError` for a model that this mlx-lm has no network for."""
    import mlx_lm.utils

    # The look-up of mlx-lm's own `load`, which follows its tables of other names. A version that has moved it
    # says the same a little later, when it loads.
    look_up = getattr(mlx_lm.utils, "_get_classes", None)
    try:
        if look_up:
            look_up(config)
    except Exception as error:
        what = f"{name} is of type {shortened(config['model_type'])}, which mlx-lm {mlx_lm.__version__} doesn't know"
        if "vision_config" in config or config["model_type"].startswith(("clip", "siglip", "vit")):
            raise ChatError(
                f"{what}; it is a model for images: name a language model such as {EXAMPLE_MODEL}."
            ) from error
        raise ChatError(
            f"{what}; a newer mlx-lm may (and the newest may need a newer Python): update it, or name another model."
        ) from error


def memory_bytes() -> tuple[int, int]:
    """This machine's memory, and how much of it a model can use: on a Mac what Metal recommends at most."""
    import mlx.core as mx

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not mx.metal.is_available():
        return memory, memory
    device = (getattr(mx, "device_info", None) or mx.metal.device_info)()
    return memory, int(device.get("max_recommended_working_set_size") or memory)


def check_memory(name: str, weight_bytes: int, settings: Settings, hosts: Hosts) -> None:
    """Raise `ChatError` for weights that this machine can't hold, or this host's share of them."""
    memory, usable = memory_bytes()
    weight_bytes //= hosts.size
    if weight_bytes > usable and not settings.force:
        raise ChatError(
            f"{name} is too large: {weight_bytes / GIB:.1f} GiB of weights{' for each host' * (hosts.size > 1)}, where"
            f" this machine has {memory / GIB:.1f} GiB of memory, {usable / GIB:.1f} GiB of it usable for a model."
            " Name a smaller or more quantized one, or try it all the same with --force."
        )


def check_disk(name: str, missing_bytes: int) -> None:
    """Raise `ChatError` where the hub cache has no room for what is still to be downloaded."""
    import shutil

    folder = hub_cache()
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if missing_bytes > free:
        raise ChatError(
            f"{name} does not fit on the disk: {missing_bytes / GIB:.1f} GiB are still to be downloaded, where"
            f" {folder} has {free / GIB:.1f} GiB free. {OTHER_DISK}"
        )


def damage(file: Path) -> str:
    """What is wrong with a safetensors file, by its size and its header; nothing if it seems whole.

    Older versions of MLX load a file that was cut off without a word, and talk nonsense.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            start = stream.tell() + header_bytes
            if not 0 < header_bytes <= HEADER_BYTES or size < start:
                return "it is cut off, or no safetensors file"
            header = read_json(stream.read(header_bytes))
        ends = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
        whole = start + max((end for _, end in ends), default=0)
        if size < whole:
            return f"it is cut off: {size} of {whole} bytes are there"
        return "" if all(0 <= begin <= end for begin, end in ends) else "its header is broken"
    except OSError as error:
        return str(error.strerror)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "its header is broken"


def mend(folder: Path) -> str:
    """What to do about broken files in a model folder."""
    if is_cached(folder):
        return f"Remove {folder.parent.parent}, and it is downloaded again."
    return f"Put a whole copy of the model into {folder}."


def find_model(settings: Settings, hosts: Hosts) -> Path:
    """The folder of the model: the one that was named, or a repository's in the hub cache, downloaded if need be.

    Where several hosts hold the model its weights may still be missing: which ones each needs shows later.
    """
    name = str(settings.model)
    folder = Path(os.path.expanduser(name))
    may_be_repository = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    # A name that is too long for a path is none.
    with contextlib.suppress(OSError):
        if name and folder.is_dir():
            return folder
        may_be_repository = None if folder.exists() else may_be_repository
    if not may_be_repository:
        raise ChatError(
            f"'{shortened(name)}' is no model folder, and can't be the name of a repository: name a folder, or a"
            f" repository such as {EXAMPLE_MODEL}."
        )
    cached = snapshot(name, settings.revision)
    alone = hosts.size == 1
    if is_complete(cached, weights=alone):
        return cached
    return download(name, settings, hosts, [*BESIDE_WEIGHTS, *([WEIGHTS] if alone else [])])


def download(name: str, settings: Settings, hosts: Hosts, patterns: Sequence[str]) -> Path:
    """Fetch what is missing of a repository's files into the hub cache, its weights last.

    Raises `ChatError` for whatever stands in the way, before the weights where it can be known, and on Ctrl+C.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download

    try:
        info = HfApi().model_info(
            name, revision=settings.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        check_files(name, sizes)
        # By the revision's name, so that the cache notes which commit that is.
        folder = Path(hf_hub_download(name, "config.json", revision=settings.revision)).parent
        check_config(name, read_model_config(folder, name), sizes, settings)
        check_memory(name, sum(sizes[file] for file in fnmatch.filter(sizes, WEIGHTS)), settings, hosts)
        wanted = [file for file in sizes if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]
        missing = sorted((file for file in wanted if not (folder / file).exists()), key=sizes.__getitem__)
        check_disk(name, sum(map(sizes.__getitem__, missing)))
        # One after the other, and by this thread: huggingface-hub's snapshot_download waits on Ctrl+C until
        # the files that its threads are at are done.
        for file in missing:
            hf_hub_download(name, file, revision=folder.name)
    except ChatError:
        raise
    except KeyboardInterrupt as error:
        raise ChatError(f"The download of {name} was stopped. {KEPT}", 130) from error
    except Exception as error:
        raise ChatError(hub_failure(name, settings.revision, error)) from error
    return folder


def reason(error: BaseException) -> str:
    """Why a request failed, in the words of the system, which the libraries wrap in layers of their own."""
    while not (isinstance(error, OSError) and error.strerror):
        # Also where the libraries say "from None".
        inner = error.__cause__ or error.__context__
        if inner is None:
            return one_line(error).rstrip(".")
        error = inner
    return error.strerror


# What to say of huggingface-hub's errors, by class or else by HTTP status; hundreds stand for all of a kind.
HUB_FAILURES: dict[str | int, str] = {
    "GatedRepoError": "{name} is gated: ask for access at {hub}/{name}, then log in with 'hf auth login'.",
    "RepositoryNotFoundError": "There is no model {name} at {hub}, or it is private: check the name at {hub}/{name},"
    " or log in with 'hf auth login'.",
    "RevisionNotFoundError": "{name} has no revision {revision}: {hub}/{name}/tree/main lists its branches and tags.",
    "HFValidationError": f"'{{name}}' can't be the name of a repository: a name looks like {EXAMPLE_MODEL}.",
    "OfflineModeIsEnabled": "{what} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or name"
    " a model that is here (llmchat alone lists them).",
    401: "{hub} does not accept the token that is in use: log in again with 'hf auth login', or unset HF_TOKEN.",
    403: "{hub} refuses to hand out {name}: ask for access at {hub}/{name}, then log in with 'hf auth login'.",
    429: f"{{hub}} takes no more requests from here for now: wait some minutes, or log in with 'hf auth login'. {KEPT}",
    500: f"{{hub}} has a problem of its own (status {{status}}), so {{what}} could not be fetched: try later. {KEPT}",
}


def hub_failure(name: str, revision: str | None, error: BaseException) -> str:
    """What to say to the user of an error in a download."""
    from huggingface_hub import constants, errors

    # The client says that a file is in the cache neither, where what matters is why it was not fetched.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    hub, missing = constants.ENDPOINT, missing_weights(snapshot(name, revision))
    what = f"{missing[0]} of {name}" if missing else name
    if isinstance(error, errors.RepositoryNotFoundError) and "/" not in name:
        return f"There is no model {name} at {hub}; did you mean mlx-community/{name}?"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    for key in [*(kind.__name__ for kind in type(error).__mro__), status, status // 100 * 100]:
        if key in HUB_FAILURES:
            return HUB_FAILURES[key].format(name=name, hub=hub, revision=revision, what=what, status=status)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"The disk is too full for {what}. {OTHER_DISK} {KEPT}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} can't be used ({reason(error)}): set HF_HOME to a folder that you can write to."
    return f"{what} could not be fetched from {hub}: {reason(error)}. Check the network. {KEPT}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' chatter off the screen; what goes wrong comes as an exception, and is said once."""
    import logging

    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def check_folder(name: str, folder: Path, weights: list[Path], settings: Settings, hosts: Hosts) -> dict[str, Any]:
    """The `config.json` of a folder that can be loaded. Raises `ChatError` where that can't be."""
    try:
        names = [entry.name for entry in folder.iterdir()]
        # In the hub cache the weights of a model for several hosts may come later; they have been seen on the hub.
        if hosts.size == 1 or not is_cached(folder):
            check_files(name, names)
        config = read_model_config(folder, name)
        check_config(name, config, names, settings)
        check_memory(name, sum(file.stat().st_size for file in weights), settings, hosts)
    except OSError as error:
        raise ChatError(f"{name} can't be read: {one_line(error)}. {mend(folder)}") from error
    check_weights(name, folder, weights)
    return config


def check_weights(name: str, folder: Path, weights: Iterable[Path]) -> None:
    """Raise `ChatError` for a weight file that is damaged."""
    for file in weights:
        if wrong := damage(file):
            raise ChatError(f"{file.name} of {name} can't be loaded: {wrong}. {mend(folder)}")


def load_failure(name: str, folder: Path, error: Exception) -> str:
    """What to say to the user of an error of mlx-lm's `load`: what is missing, where that is why."""
    if "trust_remote_code" in str(error):
        return f"{name} wants to run its own code: if you trust it, --trust-remote-code allows that."
    if missing := missing_weights(folder):
        return f"{name} could not be loaded: {missing[0]} is missing. {mend(folder)}"
    if not any(any(folder.glob(tokenizer)) for tokenizer in TOKENIZERS):
        return f"{name} could not be loaded: it has no tokenizer ({', '.join(TOKENIZERS[:2])}). {mend(folder)}"
    return f"{name} could not be loaded: {one_line(error).rstrip('.')}. Its files may be damaged. {mend(folder)}"


def trusting(load: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """The arguments that tell one of mlx-lm's loaders whether to run a repository's code; older ones know but one."""
    trust = {"trust_remote_code": settings.trust_remote_code}
    parameters = inspect.signature(load).parameters
    return {
        **({"tokenizer_config": trust} if "tokenizer_config" in parameters else {}),
        **(trust if "trust_remote_code" in parameters else {}),
    }


def load_engine(name: str, folder: Path, settings: Settings, hosts: Hosts) -> tuple[Any, Any]:
    """The network, or this host's part of it, and the tokenizer. Raises `ChatError` where mlx-lm can't load them."""
    import mlx_lm.utils

    try:
        if hosts.size == 1:
            loaded = mlx_lm.load(str(folder), adapter_path=settings.adapter, **trusting(mlx_lm.load, settings))
        else:
            group = {"pipeline_group" if settings.pipeline else "tensor_group": hosts.group}
            loaded = mlx_lm.utils.sharded_load(str(folder), **group, **trusting(mlx_lm.utils.sharded_load, settings))
    except Exception as error:
        if hosts.size > 1 and isinstance(error, RuntimeError):
            # Most likely of another host's end, on which only that one can say more.
            raise ChatError(f"{name} could not be loaded on all hosts: {one_line(error)}.") from error
        raise ChatError(load_failure(name, folder, error)) from error
    return loaded[0], loaded[1]


def check_adapter(settings: Settings, hosts: Hosts) -> None:
    """Raise `ChatError` for an adapter that can't be loaded."""
    if settings.adapter and hosts.size > 1:
        raise ChatError("mlx-lm can't share an adapter among hosts: leave out --adapter, or use one host.")
    if settings.adapter and not (Path(settings.adapter) / "adapters.safetensors").exists():
        raise ChatError(f"There is no adapter in {settings.adapter}: name a folder that holds an adapters.safetensors.")


def split(name: str, folder: Path, settings: Settings, hosts: Hosts) -> list[str]:
    """The weight files that this host's part of the network needs, by name or all together by their pattern.

    Raises `ChatError` for a model that can't be split among so many hosts.
    """
    import mlx_lm.utils

    if not hasattr(mlx_lm.utils, "sharded_load"):
        raise ChatError(
            f"mlx-lm {mlx_lm.__version__} can't share a model among hosts: a newer one can, on Python 3.10 or later."
        )
    try:
        # Nothing is read yet: this is the way in which mlx-lm itself looks at what can be split.
        trust = trusting(mlx_lm.utils.load_model, settings)
        net, _ = mlx_lm.utils.load_model(folder, lazy=True, strict=False, **trust)
    except Exception as error:
        raise ChatError(load_failure(name, folder, error)) from error
    by_heads, by_layers = hasattr(net, "shard"), hasattr(getattr(net, "model", None), "pipeline")
    if settings.pipeline:
        if not by_layers:
            other = "leave out --pipeline" if by_heads else "name another model"
            raise ChatError(f"mlx-lm can't split {name} by its layers: {other}.")
        return split_layers(name, folder, net, hosts)
    if not by_heads:
        other = "--pipeline can" if by_layers else "name another model"
        raise ChatError(f"mlx-lm can't share the heads of {name} among hosts; {other}.")
    split_heads(name, net, hosts)
    return [file.name for file in weight_files(folder)] or [WEIGHTS]


def split_layers(name: str, folder: Path, net: Any, hosts: Hosts) -> list[str]:
    """The names of the weight files with this host's layers, and with what belongs to no layer."""
    count = len(net.model.layers)
    if count < hosts.size:
        raise ChatError(f"{name} can't be split by its layers among {hosts.size} hosts: it has {count}.")
    try:
        files = weight_map(folder).items()
        net.model.pipeline(hosts.group)
    except NO_WEIGHT_MAP as error:
        raise ChatError(f"{name} can't be split by its layers among {hosts.size} hosts: {one_line(error)}.") from error
    mine = range(net.model.start_idx, net.model.end_idx or 0)
    layers = [(file, re.search(r"(?:^|\.)layers\.(\d+)\.", key)) for key, file in files]
    return sorted({str(file) for file, layer in layers if layer is None or int(layer[1]) in mine})


def split_heads(name: str, net: Any, hosts: Hosts) -> None:
    """Raise `ChatError` unless every layer's heads can be shared out evenly; mlx-lm itself rounds their number down."""
    counts = [(part, key, count) for part in net.modules() for key, count in vars(part).items()]
    try:
        net.shard(hosts.group)
    except (ValueError, ZeroDivisionError) as error:
        raise ChatError(f"{name} can't be shared evenly among {hosts.size} hosts: {one_line(error)}.") from error
    for part, key, count in counts:
        share = vars(part)[key]
        if share != count and isinstance(count, int) and share * hosts.size != count:
            heads = ("key-value head" if "kv" in key or "key" in key else "head") + "s" * (count > 1)
            raise ChatError(
                f"{name} can't be shared evenly among {hosts.size} hosts: it has {count} {heads}. Take a number of"
                " hosts that divides that."
            )


def fetch_part(name: str, folder: Path, config: dict[str, Any], settings: Settings, hosts: Hosts) -> None:
    """Download what is missing of the weight files that this host needs.

    Raises `ChatError`, on all hosts if the model can't be split or is not the same on all, where that can't be.
    """
    version = [config, folder.name if is_cached(folder) else ""]
    with hosts.together():
        if hosts.share(version) != version:
            raise ChatError(f"{name} is another model here than on the first host, or another version of it.")
        needed = split(name, folder, settings, hosts)

    def missing() -> list[str]:
        names = [entry.name for entry in folder.iterdir()]
        return [file for file in needed if not fnmatch.filter(names, file)]

    if missing() and is_cached(folder):
        download(name, dataclasses.replace(settings, revision=folder.name), hosts, needed)
        check_weights(name, folder, sorted(folder.glob(WEIGHTS)))
    if lacking := missing():
        # mlx-lm would leave those weights to chance.
        raise ChatError(f"{name} could not be loaded: {lacking[0]} is missing. {mend(folder)}")


@quiet()
def load_model(settings: Settings, hosts: Hosts | None = None) -> Model:
    """Find, check and load the model. Raises `ChatError` for whatever stands in the way."""
    name, hosts = str(settings.model), hosts or Hosts()
    with hosts.together():
        folder = find_model(settings, hosts)
        files = sorted(folder.glob(WEIGHTS))
        if hosts.size == 1:
            read_ahead(files)
        config = check_folder(name, folder, files, settings, hosts)
        check_adapter(settings, hosts)
    if hosts.size > 1:
        fetch_part(name, folder, config, settings, hosts)
    net, tokenizer = load_engine(name, folder, settings, hosts)
    if tokenizer.chat_template is None and not getattr(tokenizer, "has_chat_template", False):
        other = instruct_sibling(name) if is_cached(folder) else EXAMPLE_MODEL
        raise ChatError(f"{name} has no chat template, so it can't hold a conversation; try {other}.")
    return Model(name, net, tokenizer, context_length(config), hosts)


# ---------------------------------------------------------------------------------- Prompt cache


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements two sequences start with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Stopped(Exception):
    """Raised by `PromptCache` within prefill when it was asked to stop; its own state is known then."""


class PromptCache:
    """Owns the engine's state. Invariant: whenever no call is under way, it is the state of exactly `self.tokens`.

    Given a new prompt it goes to the longest prefix that it can reach, and only the rest is computed.
    Plain KV caches are trimmed. Recurrent layers, and sliding windows once they have wrapped, can't be:
    of those a copy is kept at a place that the next turn is known to share (a snapshot), and going back
    means putting the copy in place and trimming the other layers to the same length. Resetting only some
    layers would give wrong words. Whenever the state can't be known, it is dropped.
    """

    def __init__(self, net: Any, hosts: Hosts | None = None) -> None:
        self._net = net
        self._hosts = hosts or Hosts()
        self.clear()
        # Whether every layer, on every host, can go back any number of tokens, now and later.
        self.can_trim = all(self._hosts.gather(not any(map(self._needs_copy, self._leaves()))))

    def clear(self) -> None:
        """Forget everything."""
        from mlx_lm.models.cache import make_prompt_cache

        self.tokens: list[int] = []
        self._layers: list[Any] = make_prompt_cache(self._net)
        # Two places are kept: this turn's, for the next turn and /retry, and the turn's before, for /undo.
        self._snapshots: list[tuple[int, list[Any]]] = []

    def _leaves(self) -> list[Any]:
        # A hybrid layer may hold several caches in a CacheList.
        return [leaf for layer in self._layers for leaf in getattr(layer, "caches", [layer])]

    @staticmethod
    def _needs_copy(leaf: Any) -> bool:
        # A sliding window (it has a max_size) says that it can be trimmed, until it wraps.
        return hasattr(leaf, "max_size") or not leaf.is_trimmable()

    def _take_snapshot(self) -> None:
        # Deep, because a wrapped sliding window writes into its arrays in place. Copying an MLX array
        # shares its memory until one of the two is written to. Only what can't be trimmed is copied.
        copies = [copy.deepcopy(vars(leaf)) if self._needs_copy(leaf) else None for leaf in self._leaves()]
        self._snapshots = [*self._snapshots[-1:], (len(self.tokens), copies)]

    def _restore_snapshot(self, length: int, copies: list[Any]) -> bool:
        surplus = len(self.tokens) - length
        for leaf, saved in zip(self._leaves(), copies):
            if saved is not None:
                vars(leaf).update(copy.deepcopy(saved))
            elif leaf.trim(surplus) != surplus:
                return False
        return True

    def rewind(self, prompt: Sequence[int]) -> int:
        """Go to the longest prefix of `prompt` that can be reached and leaves at least one token to compute.

        Returns its length: the tokens that `stream` will not put through the model again.
        """
        from mlx_lm.models.cache import trim_prompt_cache

        shared = common_prefix(self.tokens, prompt[:-1])
        surplus = len(self.tokens) - shared
        with self._dropped_on_error():
            if surplus and self.can_trim:
                # A chunked cache that has dropped its front can't tell which of it an earlier token would need.
                whole = not any(getattr(leaf, "start_position", 0) for leaf in self._leaves())
                trimmed: Any = trim_prompt_cache(self._layers, surplus) if whole else 0
                if trimmed != surplus:
                    self.clear()
            elif surplus:
                self._snapshots = [kept for kept in self._snapshots if kept[0] <= shared]
                if self._snapshots and self._restore_snapshot(*self._snapshots[-1]):
                    shared = self._snapshots[-1][0]
                else:
                    self.clear()
            self.tokens = self.tokens[:shared]
            # Hosts that hold different layers may have come to different places.
            if len(set(self._hosts.gather(len(self.tokens)))) > 1:
                self.clear()
        return len(self.tokens)

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except (Stopped, GeneratorExit, ChatError):
            # Raised between two calls of the engine, where its state is known.
            raise
        except Exception as error:
            self.clear()
            out_of_memory = isinstance(error, MemoryError) or re.search("memory|alloc", str(error), re.IGNORECASE)
            help = " A shorter prompt, /clear or a smaller model takes less memory." if out_of_memory else ""
            raise ChatError(
                f"The engine failed, so what it was saying is not kept: {one_line(error)}.{help}",
                # Nobody knows how far the other hosts have come.
                fatal=self._hosts.size > 1,
            ) from error
        except BaseException:
            self.clear()
            raise

    def stream(
        self,
        tokenizer: Any,
        prompt: list[int],
        shared: int,
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
        **options: Any,
    ) -> Generator[Any, None, None]:
        """Yield mlx-lm's responses to `prompt`, one a token, without end but the model's own.

        What the cache holds must be a prefix of the prompt: call `rewind` first. `shared` is how many
        tokens of the prompt the next turn will share: where a snapshot is due if one is needed. During
        prefill `progress(done, total)` is told of tokens and `stop` is asked; if that says yes, nothing is
        yielded. Between two responses the iterator may be kept, or closed: the engine runs one token
        ahead, so the state holds every token that was yielded.
        """
        import mlx.core as mx
        from mlx_lm import stream_generate
        from mlx_lm.generate import generate_step

        held = len(self.tokens)

        def on_chunk(done: int, total: int) -> None:
            # mlx-lm says this before and after each chunk, with the chunk's state computed.
            self.tokens = prompt[: held + done]
            progress(held + done, len(prompt))
            # After the last chunk of a reply's prompt the engine is already one token further.
            if done < total and stop():
                raise Stopped

        engine: dict[str, Any] = {
            "prompt_cache": self._layers,
            "prefill_step_size": PREFILL_STEP_TOKENS,
            "prompt_progress_callback": on_chunk,
        }
        with contextlib.suppress(Stopped), self._dropped_on_error():
            due = min(shared, len(prompt) - 1)
            if not self.can_trim and held < due:
                # With no token to generate this is mlx-lm's prefill alone.
                for _ in generate_step(mx.array(prompt[held:due]), self._net, max_tokens=0, **engine):
                    pass
                self._take_snapshot()
                held = due
            rest = mx.array(prompt[held:])
            responses = stream_generate(self._net, tokenizer, rest, max_tokens=-1, **engine, **options)
            with contextlib.closing(responses):
                for response in responses:
                    self.tokens.append(response.token)
                    yield response


# -------------------------------------------------------------------------------------- Thoughts


class Piece(NamedTuple):
    """A streamed unit of a reply: `answer` or `thought`, or a `notice` that is none of the model's words."""

    kind: str
    text: str


# What a reply is made of where no marker has been met yet, and what stands between two channels.
START, HIDDEN = "start", "hidden"


class ThoughtFormat(NamedTuple):
    """How a model marks its thoughts: in each kind of text, which marker starts which other kind."""

    markers: dict[str, dict[str, str]]
    start: str
    end: str

    def opened_by(self, prompt: str) -> str:
        """The thought marker with which the template has already started the reply, or nothing."""
        tail = prompt[prompt.rfind(self.start) :] if self.start and self.start in prompt else ""
        return tail if tail.strip() == self.start else ""


# OpenAI's harmony format (gpt-oss): a message of each channel, whose marks are special tokens.
HARMONY_CHANNELS = {
    "<|channel|>analysis<|message|>": "thought",
    "<|channel|>commentary<|message|>": "answer",
    "<|channel|>final<|message|>": "answer",
    "<|end|>": HIDDEN,
    "<|start|>assistant": HIDDEN,
}
HARMONY = ThoughtFormat(dict.fromkeys((START, "thought", "answer", HIDDEN), HARMONY_CHANNELS), "", "")
NO_THOUGHTS = ThoughtFormat({}, "", "")

# Markers that not every mlx-lm looks for, of Magistral, Seed-OSS and Gemma 4, and a token that gives each away.
OTHER_THINK_MARKERS = (
    ("[THINK]", "[/THINK]", "[THINK]"),
    ("<seed:think>", "</seed:think>", "<seed:think>"),
    ("<|channel>thought", "<channel|>", "<|channel>"),
)


def thought_format(tokenizer: Any) -> ThoughtFormat:
    """The markers that a tokenizer knows; looked up one by one, since a whole vocabulary takes its time."""

    def known(token: str) -> bool:
        return tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)

    if known("<|channel|>") and known("<|message|>"):
        return HARMONY
    own = [(tokenizer.think_start, tokenizer.think_end)] if tokenizer.has_thinking else []
    for start, end in [*own, *((start, end) for start, end, token in OTHER_THINK_MARKERS if known(token))]:
        # A thought can only start a reply: in an answer the same letters are just text.
        return ThoughtFormat({START: {start: "thought"}, "thought": {start: "thought", end: "answer"}}, start, end)
    return NO_THOUGHTS


class ThoughtSplitter:
    """Tells thoughts from the answer in streamed text; a marker may be split over pieces."""

    def __init__(self, format: ThoughtFormat, opened: bool = False) -> None:
        self._format = format
        self._kind = "thought" if opened else START
        self._held = ""

    def feed(self, text: str) -> Iterator[Piece]:
        """Yield what is certain of all the text so far."""
        self._held += text
        while True:
            markers = self._format.markers.get(self._kind, {})
            place, marker = min(((self._held.find(m), m) for m in markers if m in self._held), default=(0, ""))
            if not marker:
                break
            yield from self._take(place)
            # What stood before the marker may have begun the answer, where it is no marker any more.
            if marker in self._format.markers.get(self._kind, {}):
                self._held = self._held[len(marker) :]
                self._kind = markers[marker]
        yield from self._take(len(self._held) - self._partial_marker_length())

    def finish(self) -> Iterator[Piece]:
        """Yield what was held back, at the end of a reply; the beginning of a channel mark is no text."""
        yield from self._take(0 if self._held.startswith("<|") else len(self._held))

    def _partial_marker_length(self) -> int:
        # How much of the end may be the beginning of a marker.
        markers = self._format.markers.get(self._kind, {})
        longest = min(max(map(len, markers), default=1) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self._held[-n:]) for m in markers)), 0)

    def _take(self, length: int) -> Iterator[Piece]:
        text, self._held = self._held[:length], self._held[length:]
        if self._kind == START and text.strip():
            self._kind = "answer"
        if text and self._kind != HIDDEN:
            yield Piece("thought" if self._kind == "thought" else "answer", text)


def split_thought(text: str, format: ThoughtFormat) -> tuple[str, str]:
    """The thought and the answer in a whole reply."""
    splitter = ThoughtSplitter(format)
    pieces = [*splitter.feed(text), *splitter.finish()]
    thought, answer = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("thought", "answer"))
    return thought, answer


def as_template_expects(message: Message, format: ThoughtFormat, template: str) -> Message:
    """A message in the form in which its model's own template can leave old thoughts out.

    Replies are kept as the model said them. gpt-oss's template refuses channel marks and takes the parts
    apart. Other templates know what to do with a thought if they name its end; those that don't are given
    the answer alone. A thought that was stopped is closed, or the template would take it for an answer.
    """
    text = message["content"]
    if message["role"] != "assistant" or not format.markers:
        return message
    thought, answer = split_thought(text, format)
    if format is HARMONY:
        # A mark in a place of its own would make the template refuse every later turn.
        thought, answer = (re.sub(r"<\|\w+\|>", "", part) for part in (thought, answer))
        return {**message, "content": answer, **({"thinking": thought} if thought else {})}
    if not thought:
        return message
    if format.end in template:
        return message if format.end in text else {**message, "content": text + format.end}
    return {**message, "content": answer.lstrip("\n")}


# ---------------------------------------------------------------------------------- Conversation


@dataclasses.dataclass
class Statistics:
    """Of one reply. Times are counted from the prompt on."""

    prompt_tokens: int
    cached_tokens: int
    context_length: int | None
    generation_tokens: int = 0
    time_to_first_token_s: float = 0.0
    seconds: float = 0.0
    finish_reason: str | None = None

    def line(self) -> str:
        """The statistics as one line."""
        # The first token belongs to the prefill, not to the decode time.
        decode_s = self.seconds - self.time_to_first_token_s
        generation_tps = (self.generation_tokens - 1) / decode_s if self.generation_tokens > 1 and decode_s else 0.0
        new = self.prompt_tokens - self.cached_tokens
        used = self.prompt_tokens + self.generation_tokens
        context = f"{used / self.context_length:.0%} full" if self.context_length else f"{used} tokens"
        return (
            f"{self.seconds:.1f} s · {self.generation_tokens} tokens, {generation_tps:.1f} tokens/s"
            f" · first after {self.time_to_first_token_s:.2f} s · prompt {new} new, {self.cached_tokens} reused"
            f" · context {context}"
        )


@dataclasses.dataclass
class Reply:
    """A reply under way. It is kept when it was cut or stopped, so that it can go on from the live state."""

    messages: list[Message]
    # The first of the messages that the next turn sends.
    first: int
    responses: Generator[Any, None, None]
    splitter: ThoughtSplitter
    # The thought marker with which the template began the reply, and all that the model said after it.
    opened: str
    said: str = ""


def never() -> bool:
    """Don't stop."""
    return False


def unwatched(done: int, total: int) -> None:
    """Nobody watches the prefill."""


def repetition_penalty(penalty: float, prompt: list[int]) -> Callable[[Any, Any], Any]:
    """mlx-lm's penalty, shown the end of the whole prompt.

    mlx-lm shows a logits processor only the tokens of its own call (all, or in older versions the last):
    what the cache already holds would go unpunished.
    """
    import mlx.core as mx
    from mlx_lm.sample_utils import make_logits_processors

    (penalize,) = make_logits_processors(repetition_penalty=penalty, repetition_context_size=REPETITION_CONTEXT_TOKENS)
    context = mx.array(prompt[-REPETITION_CONTEXT_TOKENS:])
    shown = None

    def process(tokens: Any, logits: Any) -> Any:
        nonlocal shown
        shown = len(tokens) if shown is None else shown
        return penalize(mx.concatenate([context, tokens[shown:]]), logits)

    return process


def sampling(model: Model, settings: Settings, prompt: list[int]) -> dict[str, Any]:
    """How the next tokens are chosen, as mlx-lm's `stream_generate` takes it."""
    from mlx_lm.sample_utils import make_sampler

    # mlx-lm refuses a top_k that leaves nothing out.
    vocabulary = model.tokenizer.vocab_size

    def sampler(logprobs: Any) -> Any:
        # Made anew for each token, so that a changed setting reaches a reply that is continued.
        return make_sampler(
            temp=settings.temperature if settings.temperature >= LEAST_TEMPERATURE else 0.0,
            top_p=settings.top_p,
            min_p=settings.min_p,
            top_k=settings.top_k if settings.top_k < vocabulary else 0,
        )(logprobs)

    penalty = settings.repetition_penalty
    return {
        "sampler": sampler,
        "logits_processors": None if penalty == 1 else [repetition_penalty(penalty, prompt)],
    }


class Conversation:
    """The messages, and the model's replies to them.

    Invariant: between two calls `messages` alternates user and assistant, and ends with an assistant's. A
    reply is a generator of pieces that works while it is consumed. If it fails, or is stopped before it has
    said anything, messages are what they were; stopped later, they keep what was said.
    """

    def __init__(self, model: Model, settings: Settings, messages: Sequence[Message] = ()) -> None:
        self._model = model
        self._settings = settings
        self._format = thought_format(model.tokenizer)
        self._cache = PromptCache(model.net, model.hosts)
        self._live: Reply | None = None
        # Messages before this one are not sent: they no longer fit.
        self._first = 0
        self.messages = list(messages)
        self.statistics: Statistics | None = None
        self.seed(settings.seed)

    def seed(self, seed: int | None) -> None:
        """Make what is sampled from here on repeatable; None leaves chance to chance."""
        import mlx.core as mx

        if seed is not None:
            mx.random.seed(seed)

    def reply(
        self, prompt: str, stop: Callable[[], bool] = never, progress: Callable[[int, int], None] = unwatched
    ) -> Iterator[Piece]:
        """Yield the reply to `prompt`. `stop` is asked after each token and each chunk of the prefill.

        Raises `ChatError` if the template refuses the prompt, the context has no room for it, or the
        engine fails.
        """
        return self._turn(self.messages, prompt, stop, progress)

    def retry(
        self, stop: Callable[[], bool] = never, progress: Callable[[int, int], None] = unwatched
    ) -> Iterator[Piece]:
        """Yield another reply to the last prompt, in place of the last one. Raises like `reply`."""
        if not self.messages:
            raise ChatError("There is no reply to say again.")
        *before, prompt, _ = self.messages
        return self._turn(before, prompt["content"], stop, progress)

    def resume(self, stop: Callable[[], bool] = never) -> Iterator[Piece]:
        """Go on with a reply that was cut or stopped, from the live state: nothing is computed again."""
        live, held, limit = self._live, len(self._cache.tokens), self._model.context_length
        if live is None:
            raise ChatError("There is nothing to continue: the last reply is complete.")
        if limit and held >= limit:
            raise ChatError(f"The reply can't go on: the model's {limit} tokens are full. /clear starts over.")
        started, budget = time.perf_counter(), self._budget(held)
        with self._model.hosts.lead(self._settings, budget=budget):
            yield from self._speak(live, Statistics(held, held, limit), started, stop)

    def undo(self) -> str:
        """Take the last turn back; return its prompt."""
        if not self.messages:
            raise ChatError("There is no turn to take back.")
        self._drop_live()
        *self.messages, prompt, _ = self.messages
        # What is left may fit again.
        self._first = 0
        return prompt["content"]

    def clear(self) -> None:
        """Start over. What the engine holds stays: a new conversation may start with the same tokens."""
        self._drop_live()
        self.messages = []
        self._first = 0

    def close(self) -> None:
        """Free the model."""
        import mlx.core as mx

        self._drop_live()
        del self._cache, self._model
        mx.clear_cache()

    def _drop_live(self) -> None:
        if self._live is not None:
            self._live.responses.close()
            self._live = None

    def _render(self, messages: list[Message]) -> tuple[str, list[int]]:
        template = str(self._model.tokenizer.chat_template)
        expected = [as_template_expects(message, self._format, template) for message in messages]
        text = self._model.render(self._settings.with_system(expected), self._settings.think)
        return text, self._model.encode(text)

    def _fit(self, messages: list[Message], first: int) -> tuple[int, str, list[int]]:
        """The first message that is sent, and the prompt's text and tokens. Raises `ChatError` if nothing fits."""
        text, tokens = self._render(messages[first:])
        limit = self._model.context_length
        if limit is None:
            return first, text, tokens
        room = min(self._settings.max_tokens, limit // 4)
        if len(tokens) + room <= limit:
            return first, text, tokens
        # Leaving out turns moves all the others, so they are computed again: do it seldom, a quarter at a time.
        while len(tokens) + room > limit * 3 // 4 and first < len(messages) - 1:
            first += 2
            text, tokens = self._render(messages[first:])
        if len(tokens) + room > limit:
            raise ChatError(
                f"The prompt is too long: {len(tokens)} tokens, with {room} kept for the reply, where"
                f" {self._model.name} takes {limit}. Shorten it{' or lower max-tokens' if len(tokens) < limit else ''}."
            )
        return first, text, tokens

    def _shared_with_next_turn(self, messages: list[Message], tokens: list[int]) -> int:
        """How many tokens of this prompt the next one will start with, whatever is said until then.

        That leaves out, for example, a thought that the template opened and will not repeat.
        """
        made_up = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
        return common_prefix(tokens, self._render([*messages, *made_up])[1])

    def _budget(self, prompt_tokens: int) -> int:
        limit = self._model.context_length
        return min(self._settings.max_tokens, limit - prompt_tokens) if limit else self._settings.max_tokens

    def _turn(
        self,
        before: list[Message],
        prompt: str,
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> Iterator[Piece]:
        started = time.perf_counter()
        messages = [*before, {"role": "user", "content": prompt}]
        first = min(self._first, len(before)) if self._settings.history else len(before)
        fitting, text, tokens = self._fit(messages, first)
        if fitting > first:
            left_out = fitting // 2
            turns = "The first turn no longer fits" if left_out == 1 else f"The first {left_out} turns no longer fit"
            yield Piece("notice", f"{turns} the model's {self._model.context_length} tokens: left out from here on.")
        self._drop_live()
        shared = 0 if self._cache.can_trim else self._shared_with_next_turn(messages[fitting:], tokens)
        opened = self._format.opened_by(text)
        splitter = ThoughtSplitter(self._format, bool(opened))
        # What --no-history leaves out is left out of this turn only.
        later = fitting if self._settings.history else min(self._first, len(before))
        turn = {"tokens": tokens, "shared": shared, "budget": self._budget(len(tokens))}
        with self._model.hosts.lead(self._settings, **turn):
            statistics = Statistics(len(tokens), self._cache.rewind(tokens), self._model.context_length)
            choice = sampling(self._model, self._settings, tokens)
            responses = self._cache.stream(self._model.tokenizer, tokens, shared, stop, progress, **choice)
            live = Reply(messages, later, responses, splitter, opened)
            yield from self._speak(live, statistics, started, stop)

    def _speak(self, live: Reply, statistics: Statistics, started: float, stop: Callable[[], bool]) -> Iterator[Piece]:
        """Yield pieces of a reply, then keep what was said. `started` is the `perf_counter` of the prompt."""
        self.statistics = statistics
        budget = self._budget(statistics.prompt_tokens)
        self._live = None
        failed = True
        try:
            for response in itertools.islice(live.responses, budget):
                live.said += response.text
                statistics.generation_tokens += 1
                statistics.seconds = time.perf_counter() - started
                statistics.time_to_first_token_s = statistics.time_to_first_token_s or statistics.seconds
                statistics.finish_reason = response.finish_reason
                yield from live.splitter.feed(response.text)
                if statistics.finish_reason is None and stop():
                    statistics.finish_reason = "interrupted"
                    break
            if statistics.finish_reason == "stop":
                yield from live.splitter.finish()
            elif statistics.finish_reason is None and statistics.generation_tokens == budget:
                statistics.finish_reason = "length"
            failed = False
        except GeneratorExit:
            # Whoever consumes the reply has heard enough.
            failed = False
            raise
        finally:
            complete = statistics.finish_reason == "stop"
            # A first token may be half a character: nothing is said yet, but the reply can go on.
            keep = not failed and (bool(live.said) or statistics.generation_tokens > 0)
            if keep:
                self.messages = [*live.messages, {"role": "assistant", "content": live.opened + live.said}]
                self._first = live.first
            if keep and not complete:
                self._live = live
            else:
                live.responses.close()


def follow(hosts: Hosts) -> int:
    """Do on another host what rank 0 does, until it leaves; return the exit status that it leaves with.

    Of the conversation this host knows the tokens alone. Raises `ChatError` like `load_model` and `PromptCache`.
    """
    import mlx.core as mx

    turn = hosts.share()
    if "status" in turn:
        return int(turn["status"])
    settings = Settings(**turn["settings"])
    model = load_model(settings, hosts)
    cache = PromptCache(model.net, hosts)
    responses: Iterator[Any] = iter(())
    while "status" not in (turn := hosts.share()):
        vars(settings).update(turn["settings"])
        mx.random.seed(turn["seed"])
        if "tokens" in turn:
            tokens = turn["tokens"]
            cache.rewind(tokens)
            choice = sampling(model, settings, tokens)
            responses = cache.stream(model.tokenizer, tokens, turn["shared"], never, unwatched, **choice)
        for _ in itertools.islice(responses, turn["budget"]):
            pass
    return int(turn["status"])


# --------------------------------------------------------------------------------------- Session


def as_line(message: Message) -> bytes:
    """A message as a line of JSON Lines."""
    return json.dumps(message, ensure_ascii=False).encode(errors="replace") + b"\n"


def parse_message(line: bytes, before: Sequence[Message]) -> Message:
    """The message in a line of a session, with whatever further keys it has. Raises `ValueError`."""
    message = read_json(line)
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise ValueError("this is no message with a content")
    allowed = ["assistant"] if before and before[-1]["role"] == "user" else ["user"] if before else ["system", "user"]
    if message.get("role") not in allowed:
        raise ValueError(f"the role must be {' or '.join(allowed)}")
    return message


def write_whole(path: Path, messages: Iterable[Message]) -> None:
    """Write a conversation so that the file is either the old one or all of the new. Raises `OSError`."""
    import tempfile

    # What the name leads to is replaced, so that a link stays one.
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(map(as_line, messages))
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def open_locked(path: Path) -> io.FileIO:
    """Open or create a file that nobody else has open this way. Raises `OSError`, or `BlockingIOError` if one has."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600), "r+b", buffering=0)
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


# How every line begins that `as_line` writes, and so every line that can be torn.
LINE_START = b'{"role": "'


class SessionFile:
    """A conversation on disk, one message a line, mode 0600; only one chat at a time has it.

    Invariant: between calls the file holds exactly `messages`. What was taken back is cut off its end, and
    what is new is appended and synced, so that a crash can tear nothing but the last line.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file, and read it. Raises `ChatError`, with the file untouched, if it is no session."""
        self._path = path
        self.messages: list[Message] = []
        # Where each message's line ends, in bytes.
        self._ends: list[int] = []
        # What the user should know of the file.
        self.warning = ""
        try:
            self._file = open_locked(path)
            with contextlib.ExitStack() as on_error:
                on_error.callback(self.close)
                self._read()
                os.fchmod(self._file.fileno(), 0o600)
                on_error.pop_all()
        except BlockingIOError as error:
            raise ChatError(f"{path} is in use by another chat: leave that one, or name another file.") from error
        except OSError as error:
            raise ChatError(f"{path} can't be used as a session: {error.strerror}. Name another file.") from error

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def _read(self) -> None:
        lines = self._file.read().splitlines(keepends=True)
        for count, line in enumerate(lines, 1):
            try:
                self.messages.append(parse_message(line, self.messages))
            except ValueError as error:
                whole = line.endswith(b"\n") or type(error) is ValueError
                if whole or line[: len(LINE_START)] != LINE_START[: len(line)]:
                    complaint = f"{self._path} is no session of llmchat: line {count}: {one_line(error)}."
                    raise ChatError(f"{complaint} Name another file.") from error
                self._set_aside(lines.pop())
        self._ends = list(itertools.accumulate(map(len, lines)))
        if lines and not lines[-1].endswith(b"\n"):
            self._file.write(b"\n")
            self._ends[-1] += 1

    def _set_aside(self, line: bytes) -> None:
        aside = Path(f"{self._path}.torn")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as file:
            file.write(line + b"\n")
        self._file.seek(-len(line), os.SEEK_END)
        self._file.truncate()
        self.warning = f"The last line of {self._path} was torn; it is set aside in {aside}."

    def save(self, messages: Sequence[Message]) -> None:
        """Make the file hold these messages, on disk when this returns. Raises `ChatError`."""
        same = common_prefix(messages, self.messages)
        if same == len(messages) == len(self.messages):
            return
        try:
            if self.messages and messages and not same:
                # A new system prompt changes the first line: appending all the others again is no place to crash.
                write_whole(self._path, messages)
                replaced, self._file = self._file, open_locked(self._path)
                replaced.close()
                self._ends = list(itertools.accumulate(len(as_line(message)) for message in messages))
            else:
                self._replace_end(same, messages[same:])
        except OSError as error:
            raise ChatError(f"{self._path} could not be written: {error.strerror}. /save FILE may.") from error
        self.messages = list(messages)

    def _replace_end(self, same: int, messages: Sequence[Message]) -> None:
        self.messages, self._ends = self.messages[:same], self._ends[:same]
        end = self._ends[-1] if self._ends else 0
        lines = [as_line(message) for message in messages]
        self._file.truncate(end)
        self._file.seek(end)
        if self._file.write(b"".join(lines)) != sum(map(len, lines)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())
        self._ends += list(itertools.accumulate(map(len, lines), initial=end))[1:]


# -------------------------------------------------------------------------------------- Terminal


# What could drive a terminal or turn text round: C0 but newline and tab, DEL, C1, and the bidirectional
# embeddings, overrides and isolates (https://www.unicode.org/reports/tr9/). Without them no escape sequence
# is one, so a piece can be cleaned by itself, wherever a sequence was split.
UNSAFE = dict.fromkeys(
    [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)


def cleaned(text: str) -> str:
    """The text without anything that could drive a terminal."""
    return text.translate(UNSAFE)


GREEN, DIM, PLAIN, ERASE_BELOW = "\x1b[32m", "\x1b[2m", "\x1b[0m", "\x1b[J"

# Before a wait is worth a line that tells of it.
PATIENCE_S = 1.0

# Pasted lines follow each other faster than this, and typed ones don't.
BURST_S = 0.03

# After this mlx.launch has passed on what it was given.
LAUNCHER_S = 0.15

# The first GNU readline that ends the line itself at Ctrl+D when it has pastes marked: 8.1.
MARKED_PASTES_VERSION = 0x0801


class PromptHistory:
    """The prompts of this day and earlier ones: in a file, one a line, newlines and backslashes escaped.

    The file is added to at every prompt, and cut back to its bounds when it is read and twice as large.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = ""

    def load(self) -> list[str]:
        """The last prompts, oldest first. Raises `OSError`."""
        try:
            # Not to wait for a writer, should this be a named pipe.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return []
        with open(descriptor, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - HISTORY_BYTES))
            lines = file.read(HISTORY_BYTES).split(b"\n")
        # What stands before the first newline may be half a line, and what stands after the last is nothing.
        lines = [line for line in lines[size > HISTORY_BYTES :] if line]
        kept = lines[-HISTORY_ENTRIES:]
        if size > 2 * HISTORY_BYTES or len(lines) > 2 * HISTORY_ENTRIES:
            self._rewrite(kept)
        prompts = [
            re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], line.decode(errors="replace"))
            for line in (line.replace(b"\0", b"") for line in kept)  # which a power cut leaves
        ]
        self._last = prompts[-1] if prompts else ""
        return prompts

    def add(self, prompt: str) -> bool:
        """Write a prompt down, unless it was the last one too. Raises `OSError`."""
        if prompt == self._last:
            return False
        self._last = prompt
        line = prompt.replace("\\", "\\\\").replace("\n", "\\n").encode(errors="replace") + b"\n"
        if len(line) > HISTORY_BYTES:
            return True
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
        with open(descriptor, "wb") as file:
            file.write(line)
        return True

    def _rewrite(self, lines: list[bytes]) -> None:
        # What the name leads to is replaced, so that a link to a file elsewhere stays one.
        path = self._path.resolve()
        new = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines(line + b"\n" for line in lines)
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()


class Terminal:
    """Reads prompts and shows pieces: the session goes to standard output, all else to standard error.

    On a terminal the line editor is on and thoughts are shown. Elsewhere a line that was read is written
    after its prompt, and thoughts are left out, so that a transcript reads the same either way. A launcher
    that stands between a terminal and this program leaves it something of both.
    """

    def __init__(
        self,
        stdin: TextIO,
        stdout: TextIO,
        stderr: TextIO,
        history: Path | None = None,
        marked_pastes: bool | None = None,
    ) -> None:
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr
        for stream in (stdin, stdout, stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Bytes that are no text, or text that the terminal has no bytes for, are no reason to stop.
                stream.reconfigure(errors="replace")
        self.interactive = stdin.isatty() and stdout.isatty()
        # Whether somebody watches, and is to see thoughts too.
        self.watched = self.interactive
        # What is done while a launcher has no line to hand on, what it has handed on of later lines, and whether
        # standard error was the last that was written to.
        self._idle: Callable[[], None] | None = None
        self._ahead = b""
        self._noted = False
        self._dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._styled = not (self._dumb or os.environ.get("NO_COLOR"))
        self.hide_thoughts = False
        self._readline: Any = None
        self._libedit = False
        # Whether the line editor tells a paste from typing; None asks the editor that is there.
        self._marked_pastes = marked_pastes
        # The modes in which the terminal was found: what `tcgetattr` says.
        self._found: list[Any] | None = None
        self._history = PromptHistory(history) if history else None
        self._history_failed = False
        # Of the prompt being read: its lines so far, and what an earlier one left in the editor's buffer.
        self._lines: list[str] = []
        self._stale = ""
        # Of the reply being shown: the kind of its last piece, newlines that may turn out to end it, and
        # when a thought began that is hidden.
        self._kind = ""
        self._newlines = ""
        self._thought_s = 0.0
        # When a wait began, and the line that is on the screen for as long as something lasts.
        self._waiting_s = 0.0
        self._status = ""

    # Writing

    def write(self, text: str) -> None:
        """Put text into the session."""
        if self._noted and self._idle:
            # The launcher looks for output ten times a second: this would stand before what was noted before it.
            time.sleep(LAUNCHER_S)
        self._noted = False
        self._stdout.write(text)
        self._stdout.flush()

    def note(self, text: str) -> None:
        """Tell the user something that is not part of the session, dim on a terminal."""
        self._write_dim(cleaned(text), "\n")
        self._noted = True

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self._stderr.write(f"llmchat: error: {cleaned(text)}\n")
        self._stderr.flush()
        self._noted = True

    def progress(self, done: int, total: int) -> None:
        """Show how much of a long prompt has been read, on a terminal."""
        now = time.monotonic()
        if not (done and self._waiting_s):
            self._waiting_s = now
        if now - self._waiting_s > PATIENCE_S:
            self._show_status(f"reading the prompt: {done} of {total} tokens")

    def show(self, piece: Piece) -> None:
        """Show a piece of a reply. Newlines around thought and answer are replaced by a blank line between."""
        if piece.kind == "thought" and (self.hide_thoughts or not self.watched):
            self._hide_thought(piece.text)
            return
        self._end_status()
        if piece.kind == "notice":
            self.note(piece.text)
        else:
            self._fold_thought()
            self._show_text(piece.kind, cleaned(piece.text))

    def end_reply(self) -> None:
        """Finish the line of a reply, if there was one."""
        self._end_status()
        self._fold_thought()
        if self._kind:
            self._end_section()
            self.write("\n")
            self._kind = ""

    def _write_dim(self, text: str, end: str = "") -> None:
        dim = self._stderr.isatty() and self._styled
        self._stderr.write(f"{DIM}{text}{PLAIN}{end}" if dim else text + end)
        self._stderr.flush()

    def _show_status(self, text: str) -> None:
        """Show a line that doesn't last, on a terminal. It is kept narrow, as only one row can be taken back."""
        if self._stderr.isatty():
            text = text[: (os.get_terminal_size(self._stderr.fileno()).columns or 80) - 1]
            if text != self._status:
                self._write_dim("\r" + text.ljust(len(self._status)))
                self._status = text

    def _end_status(self) -> None:
        self._waiting_s = 0.0
        if self._status:
            self._write_dim("\r" + " " * len(self._status) + "\r")
            self._status = ""

    def _show_text(self, kind: str, text: str) -> None:
        if kind != self._kind:
            text = text.lstrip("\n")
            if not text:
                return
            self._begin_section(kind)
        text = self._newlines + text
        self._newlines = text[len(text.rstrip("\n")) :]
        self.write(text.rstrip("\n"))

    def _begin_section(self, kind: str) -> None:
        if self._kind:
            self._end_section()
            self.write("\n\n")
        self._kind = kind
        self.write(DIM if kind == "thought" and self._styled else "")

    def _end_section(self) -> None:
        self._newlines = ""
        self.write(PLAIN if self._kind == "thought" and self._styled else "")

    def _hide_thought(self, text: str) -> None:
        if not self._thought_s:
            if not text.strip():
                return
            self._thought_s = time.monotonic()
            if self.watched:
                self._begin_section("hidden thought")
        self._show_status(f"thinking: {time.monotonic() - self._thought_s:.0f} s")

    def _fold_thought(self) -> None:
        if self._thought_s and self.watched:
            text = f"thought for {time.monotonic() - self._thought_s:.1f} s"
            self.write(f"{DIM}{text}{PLAIN}" if self._styled else text)
        self._thought_s = 0.0

    # Reading

    def read_from_launcher(self, idle: Callable[[], None]) -> None:
        """Take lines as mlx.launch hands them on, whole, and already shown by the terminal that they were typed at.

        `idle` is called again and again while there is none.
        """
        self.interactive = False
        # So it tells the processes that its own output is a terminal.
        self.watched = "COLUMNS" in os.environ
        self._idle = idle

    def open_line_editor(self, complete: Callable[[str], Iterable[str]]) -> None:
        """Switch on editing, history and completion, on a terminal, until `close`.

        `complete` says which whole lines the beginning of a line may become.
        """
        if not self.interactive:
            return
        try:
            import readline
        except ImportError:
            # Some Pythons are built without it; the terminal's own line editing has to do then.
            return
        self._readline = readline
        # Before Python 3.13 only the docstring says which of the two it is.
        self._libedit = getattr(readline, "backend", "") == "editline" or "libedit" in (readline.__doc__ or "")
        if self._marked_pastes is None:
            version = self._readline._READLINE_RUNTIME_VERSION
            self._marked_pastes = not self._libedit and not self._dumb and version >= MARKED_PASTES_VERSION
        readline.set_auto_history(False)
        with self._warned_of_history():
            for prompt in self._history.load() if self._history else []:
                readline.add_history(prompt)
        self._bind_keys(complete)
        self._found = termios.tcgetattr(self._stdin)
        self._listen_quietly()

    def close(self) -> None:
        """Leave the terminal as it was found, whatever was under way."""
        with contextlib.suppress(OSError):
            self.end_reply()
        with contextlib.suppress(termios.error):
            self._switch_off(0)

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
        readline.parse_and_bind("bind ^I rl_complete" if self._libedit else "tab: complete")
        if self._marked_pastes:
            # Python switches it off. The editor has the terminal mark pastes only while it reads.
            readline.parse_and_bind("set enable-bracketed-paste on")

    def _switch_off(self, modes: int) -> None:
        """Have the terminal do as it was found to, but for some modes."""
        if self._found:
            settings = [*self._found]
            settings[3] &= ~modes
            termios.tcsetattr(self._stdin, termios.TCSANOW, settings)

    def _listen_quietly(self) -> None:
        """Keep what is typed for the next prompt unseen and whole.

        The terminal would show it in the middle of a reply, and cut lines that are longer than 1024 (macOS)
        or 4096 bytes (Linux).
        """
        self._switch_off(termios.ECHO | termios.ICANON)

    def read_line(self, prompt: str, text: str = "") -> str:
        """Read one line; `text` stands in it for editing. Raises `EOFError`, and `KeyboardInterrupt` on Ctrl+C.

        It holds newlines if a paste did, or a text that came back from the history.
        """
        if self.interactive:
            return self._edit_line(prompt, text)
        self.write(prompt)
        line, shown = self._next_line()
        if not line:
            self.write("\n")
            raise EOFError
        line = line.rstrip("\n")
        if not shown:
            self.write(cleaned(line) + "\n")
        return line

    def _next_line(self) -> tuple[str, bool]:
        """The next line with its end, or nothing; and whether a terminal has shown it, after the prompt, already."""
        if self._idle is None:
            return self._stdin.readline(), False
        shown = False
        while b"\n" not in self._ahead:
            if not select.select([self._stdin], [], [], MEETING_S)[0]:
                self._idle()
                shown = self.watched
            elif data := os.read(self._stdin.fileno(), io.DEFAULT_BUFFER_SIZE):
                self._ahead += data
            else:
                break
        line, end, self._ahead = self._ahead.partition(b"\n")
        return (line + end).decode(errors="replace"), shown

    def _edit_line(self, prompt: str, text: str) -> str:
        if self._styled and self._readline:
            # The marks take the colour out of the editor's count of columns. libedit loses what no character follows.
            prompt = f"\x01{GREEN}\x02{prompt.rstrip()}\x01{PLAIN}\x02 "
        if self._readline:
            self._stale = self._readline.get_line_buffer() if self._libedit else ""
            self._readline.set_startup_hook(lambda: self._readline.insert_text(text.replace("\0", "")))
        # The editors look at these: GNU's shows nothing where nothing was shown, libedit no longer knows Ctrl+D.
        self._switch_off(0 if self._libedit else termios.ICANON)
        try:
            return input(prompt)
        except EOFError:
            self.write("" if self._marked_pastes else "\n")
            raise
        except BaseException:
            # The cursor may stand in the first of several rows.
            self.write("\n" + ERASE_BELOW * self._styled)
            raise
        finally:
            self._listen_quietly()

    def read_prompt(self, text: str = "") -> str:
        """Read a prompt: a line, a paste, or what is typed between three quotes. Raises like `read_line`."""
        if text and self._libedit:
            # It has no hook to put text into a line.
            self._readline.add_history(text)
            self.note("Press the up arrow to edit the prompt.")
        self._lines = []
        self.write("\n")
        self._read_lines("prompt -> ", text)
        block = "\n".join(self._lines).strip("\n")
        if "\n" not in block:
            block = block.strip()
        # A paste that only starts with three quotes is no beginning: program text often does.
        if not block.startswith('"""') or ("\n" in block and self._is_open()):
            return block
        try:
            while self._is_open():
                self._read_lines("... ")
        except EOFError:
            if self.interactive:
                raise
        return "\n".join(self._lines).strip()[3:].removesuffix('"""').strip("\n")

    def _read_lines(self, prompt: str, text: str = "") -> None:
        """Read a line, or all lines of a paste.

        Where nothing marks a paste, it is lines that come in one burst; not if the first was there before the
        prompt was: then they were typed ahead, or are a script.
        """
        alone = self._marked_pastes or self._has_input(0)
        self._lines.append(self.read_line(prompt, text))
        while not alone and self._has_input(BURST_S):
            self._lines.append(self.read_line("... "))

    def _has_input(self, timeout_s: float) -> bool:
        return self.interactive and bool(select.select([self._stdin], [], [], timeout_s)[0])

    def _is_open(self) -> bool:
        return not "\n".join(self._lines).strip()[3:].endswith('"""')

    def typed(self) -> bool:
        """Whether there was something in the prompt when Ctrl+C came."""
        # libedit empties its buffer only when something is typed.
        return bool(self._lines) or (
            self._readline is not None and self._readline.get_line_buffer() not in ("", self._stale)
        )

    def remember(self, prompt: str) -> None:
        """Add a prompt that somebody typed to the history, in the line editor and on disk."""
        if self._history is None or not self.watched:
            return
        new = True
        with self._warned_of_history():
            new = self._history.add(prompt)
        if new and self._readline:
            self._readline.add_history(prompt)

    @contextlib.contextmanager
    def _warned_of_history(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._history_failed:
                self.note(f"Prompts are not kept for another day: {one_line(error)}")
            self._history_failed = True


# --------------------------------------------------------------------------------------- Program


class Interrupts:
    """Ctrl+C on a terminal: it drops the line that is being read, and otherwise asks a reply to stop.

    Nothing but reading a line, or a second press on an engine that doesn't stop, is torn from its work.
    """

    def __init__(self) -> None:
        self._reading = False
        self._pressed = False

    def __call__(self, signum: int, frame: object) -> None:
        """Handle SIGINT."""
        if self._reading or self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def stop(self) -> bool:
        """Whether a reply is to stop."""
        return self._pressed

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """While a line is read, Ctrl+C is raised as `KeyboardInterrupt`; an earlier press is forgotten."""
        self._pressed = False
        self._reading = True
        try:
            yield
        finally:
            self._reading = False


class Command(NamedTuple):
    """What `/help`, completion and the README say of a command."""

    arguments: str
    help: str


COMMANDS = {
    "/help": Command("", "list the commands"),
    "/clear": Command("", "start a new conversation"),
    "/retry": Command("", "say the last reply again"),
    "/undo": Command("", "take the last turn back and edit its prompt"),
    "/continue": Command("", "go on with a reply that was cut or stopped"),
    "/system": Command("[TEXT]", "show or set the system prompt; - removes it"),
    "/set": Command("[KEY VALUE]", "list the settings, or change one"),
    "/stats": Command("", "show statistics after each reply, or no longer"),
    "/save": Command("FILE", "write the conversation, as --session does"),
}


def completions(line: str) -> list[str]:
    """The lines that Tab may make of the beginning of one: commands, keys of `/set`, file names, or just a tab."""
    if not line.startswith("/"):
        return [line + "\t"]
    command, space, rest = line.partition(" ")
    if not space:
        wholes = [f"{name} " if about.arguments else name for name, about in COMMANDS.items()]
    elif command == "/set":
        wholes = [f"/set {key} " for key, field in OPTIONS.items() if field.metadata["in_chat"]]
    elif command == "/save":
        wholes = [f"/save {name}" for name in file_names(rest)]
    else:
        wholes = []
    return [whole for whole in wholes if whole.startswith(line)]


def file_names(start: str) -> list[str]:
    """The files whose names begin so, folders with a slash; hidden ones only if asked for."""
    folder, name = os.path.split(start)
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [entry.name + "/" * entry.is_dir() for entry in entries if entry.name.startswith(name)]
    except OSError:
        return []
    head = start[: len(start) - len(name)]
    return sorted(head + entry for entry in found if cleaned(entry) == entry and (name or entry[0] != "."))


def as_typed(prompt: str) -> str:
    """What must be typed to send a prompt: one that starts with a slash takes two."""
    return "/" + prompt if prompt.startswith("/") else prompt


class Chat:
    """The loop: reads prompts and commands, shows replies. A turn that fails never ends it."""

    def __init__(
        self,
        conversation: Conversation,
        terminal: Terminal,
        settings: Settings,
        interrupts: Interrupts,
        session: SessionFile | None = None,
    ) -> None:
        self._conversation = conversation
        self._terminal = terminal
        self._settings = settings
        self._interrupts = interrupts
        self._session = session
        # What stands in the next line for editing.
        self.draft = ""

    def run(self) -> None:
        """Talk until the user leaves."""
        leaving = False
        while True:
            try:
                prompt = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self._terminal.interactive:
                    raise
                if leaving:
                    break
                leaving = not self._terminal.typed()
                if leaving:
                    self._terminal.note("Press Ctrl+C again to leave, or type quit.")
                continue
            leaving = False
            if prompt.lower() in LEAVE_WORDS:
                break
            if prompt:
                self._answer(prompt)
        self._terminal.write("Goodbye!\n")

    def _read(self) -> str:
        draft, self.draft = self.draft, ""
        with self._interrupts.raised():
            return self._terminal.read_prompt(draft)

    def _answer(self, prompt: str) -> None:
        self._terminal.remember(prompt)
        self._attempt(lambda: self._obey(prompt))
        self._attempt(self._keep)

    def _attempt(self, step: Callable[[], None]) -> None:
        # What goes wrong is said, and the chat goes on.
        try:
            step()
        except ChatError as error:
            if error.fatal:
                raise
            self._terminal.end_reply()
            self._terminal.error(str(error))
        except KeyboardInterrupt:
            if not self._terminal.interactive:
                raise
            self._terminal.end_reply()

    def _obey(self, prompt: str) -> None:
        word, rest = [*prompt.split(None, 1), ""][:2]
        if word in COMMANDS:
            getattr(self, "_" + word[1:])(rest.strip())
        elif word[1:] in LEAVE_WORDS and word[0] == "/":
            raise ChatError(f"Type {word[1:]}, without the slash, to leave.")
        elif re.fullmatch(r"/[a-z]+", word):
            hint = did_you_mean(word, COMMANDS) or "; /help lists them."
            raise ChatError(f"There is no command {word}{hint} To send a line that starts with /, type //.")
        else:
            text = prompt[1:] if prompt.startswith("//") else prompt
            self._attempt(lambda: self._keep(text))
            self.draft = prompt
            self._show(self._conversation.reply(text, self._interrupts.stop, self._terminal.progress))
            # A prompt that was refused, or that the engine failed on, stands in the next line for editing.
            self.draft = ""

    def reply_once(self, prompt: str) -> None:
        """Answer one prompt. Raises `ChatError`."""
        self._keep(prompt)
        try:
            self._show(self._conversation.reply(prompt, progress=self._terminal.progress))
        except ChatError:
            self._keep()
            raise
        self._keep()

    def _messages(self) -> list[Message]:
        return self._settings.with_system(self._conversation.messages)

    def _keep(self, prompt: str | None = None) -> None:
        # A prompt is kept before its reply comes: a crash loses only the reply.
        asked = [] if prompt is None else [{"role": "user", "content": prompt}]
        if self._session:
            self._session.save([*self._messages(), *asked])

    def _show(self, pieces: Iterator[Piece]) -> None:
        self._terminal.hide_thoughts = self._settings.hide_thoughts
        for piece in pieces:
            self._terminal.show(piece)
        self._terminal.end_reply()
        statistics = self._conversation.statistics
        if statistics and statistics.finish_reason == "length":
            advice = "/continue goes on" if self._settings.prompt is None else "--max-tokens allows more"
            self._terminal.note(f"Cut at {statistics.generation_tokens} tokens; {advice}.")
        if statistics and statistics.finish_reason and self._settings.stats:
            self._terminal.note(statistics.line())

    def _help(self, rest: str) -> None:
        rows = [(f"{name} {command.arguments}".strip(), command.help) for name, command in COMMANDS.items()]
        keys = self._terminal.interactive
        rows += [(", ".join(LEAVE_WORDS), "leave" + " (Ctrl+D too)" * keys)]
        rows += [("Ctrl+C", "stop the reply, or drop the line")] * keys
        width = max(len(left) for left, _ in rows)
        self._terminal.write("".join(f"{left:{width}}  {right}\n" for left, right in rows))

    def _clear(self, rest: str) -> None:
        self._conversation.clear()
        self._terminal.note("A new conversation.")

    def _retry(self, rest: str) -> None:
        self._show(self._conversation.retry(self._interrupts.stop, self._terminal.progress))

    def _undo(self, rest: str) -> None:
        self.draft = as_typed(self._conversation.undo())
        self._terminal.note("The last turn is taken back.")

    def _continue(self, rest: str) -> None:
        self._show(self._conversation.resume(self._interrupts.stop))

    def _system(self, rest: str) -> None:
        if rest:
            self._set(f"system {rest}")
        else:
            self._terminal.write(f"{cleaned(self._settings.system or 'There is no system prompt.')}\n")

    def _stats(self, rest: str) -> None:
        self._set(f"stats {'false' if self._settings.stats else 'true'}")

    def _set(self, rest: str) -> None:
        key, _, value = rest.partition(" ")
        if not key:
            self._list_settings()
            return
        try:
            field, parsed = option_for(key, value.strip())
            if not field.metadata["in_chat"]:
                raise argparse.ArgumentTypeError("can't be changed in a chat")
        except argparse.ArgumentTypeError as error:
            raise ChatError(f"{key} {error}") from error
        if field.name == "system" and parsed == "-":
            parsed = None
        setattr(self._settings, field.name, parsed)
        self._settings.sources[field.name] = "here"
        if field.name == "seed":
            self._conversation.seed(parsed)
        self._terminal.note(f"{field.name.replace('_', '-')} = {shown_value(parsed)}")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ChatError("/save needs the name of a file.")
        path = Path(os.path.expanduser(rest))
        try:
            if path.exists() and not (path.is_file() and self._may_replace(path)):
                raise ChatError(f"{path} is there already, and was not replaced: name another file.")
            write_whole(path, self._messages())
        except (OSError, ValueError) as error:
            raise ChatError(f"{shortened(rest)} could not be written: {reason(error)}. Name another file.") from error
        self._terminal.note(f"{len(self._conversation.messages)} messages are in {path}.")

    def _may_replace(self, path: Path) -> bool:
        if not self._terminal.interactive:
            return False
        with self._interrupts.raised(), contextlib.suppress(EOFError):
            return self._terminal.read_line(f"Replace {cleaned(str(path))}? [y/N] ").strip().lower() in ("y", "yes")
        return False

    def _list_settings(self) -> None:
        rows = [
            (key, shown_value(getattr(self._settings, field.name)), self._settings.sources.get(field.name, "default"))
            for key, field in OPTIONS.items()
            if field.metadata["in_chat"]
        ]
        widths = [max(len(row[n]) for row in rows) for n in (0, 1)]
        for key, value, source in rows:
            self._terminal.write(f"{key:{widths[0]}}  {cleaned(value):{widths[1]}}  {source}\n")


def shown_value(value: Any) -> str:
    """A parameter's value as a config file would say it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def one_shot_prompt(text: str, stdin: TextIO, launched: bool = False) -> str:
    """What `-p TEXT` sends: piped standard input goes before TEXT, and is all there is if TEXT is `-`."""
    if launched and text == "-":
        raise ChatError("mlx.launch never tells where standard input ends: give --prompt the text itself.")
    piped = "" if stdin.isatty() or launched else stdin.read().strip("\n")
    prompt = piped if text == "-" else "\n\n".join(part for part in (piped, text) if part)
    if not prompt.strip():
        raise ChatError("There is nothing to reply to: give -p a text, or pipe one in.")
    return prompt


def open_session(settings: Settings) -> tuple[SessionFile | None, list[Message], str]:
    """The session file, the turns in it, and a last prompt that is still without its reply.

    The system prompt comes from the file unless one was given. Raises `ChatError`.
    """
    if settings.session is None:
        return None, [], ""
    session = SessionFile(Path(os.path.expanduser(settings.session)))
    messages = list(session.messages)
    draft = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else ""
    if messages and messages[0]["role"] == "system":
        settings.system = settings.system or messages[0]["content"]
        del messages[0]
    return session, messages, draft


def welcome(settings: Settings, terminal: Terminal, hosts: Hosts, turns: int) -> None:
    """Say that the model is there, to somebody who watches also how to go on, and how many turns the session has."""
    terminal.write("Model loaded successfully!\n")
    if terminal.watched:
        among = f" on {hosts.size} hosts" if hosts.size > 1 else ""
        leave = "quit or Ctrl+D leaves" if terminal.interactive else "quit leaves"
        terminal.note(f"{Path(str(settings.model)).name}{among} · /help lists the commands · {leave}")
    if turns:
        terminal.note(f"Going on with {turns} turn{'s' * (turns > 1)} of {settings.session}.")


def run(settings: Settings, terminal: Terminal, hosts: Hosts) -> None:
    """Load the model, then chat or answer one prompt. Raises `ChatError`."""
    try:
        Path.cwd()
    except OSError as error:
        raise ChatError("The folder you are in is gone: change to another one.") from error
    chatting = settings.prompt is None
    prompt = one_shot_prompt(str(settings.prompt), sys.stdin, hosts.size > 1) if not chatting else ""
    if chatting:
        terminal.write(f"Loading model {cleaned(str(settings.model))}...\n")
    session, messages, draft = open_session(settings)
    if session and session.warning:
        terminal.note(session.warning)
    if draft and not (chatting and terminal.interactive):
        terminal.note(f"The last prompt in {settings.session} got no reply, and is left out: {draft}")
    with hosts.lead(settings):
        conversation = Conversation(load_model(settings, hosts), settings, messages)
    interrupts = Interrupts()
    chat = Chat(conversation, terminal, settings, interrupts, session)
    chat.draft = as_typed(draft)
    try:
        if not chatting:
            chat.reply_once(prompt)
            return
        welcome(settings, terminal, hosts, len(messages) // 2)
        if terminal.interactive:
            signal.signal(signal.SIGINT, interrupts)
        terminal.open_line_editor(completions)
        chat.run()
    finally:
        conversation.close()
        if session:
            session.close()


def missing_model() -> ChatError:
    """What to say where no model is named: how to, and which are there already."""
    lines = ["no model is named.", "usage: llmchat MODEL [options]", f"example: llmchat {EXAMPLE_MODEL}"]
    return ChatError("\n".join([*lines, *(f"already here: {name}" for name in cached_models())]), 2)


def start(argv: Sequence[str] | None, terminal: Terminal, hosts: Hosts) -> int:
    """Run with these arguments; return 0. Raises `ChatError`; argparse itself leaves for wrong usage."""
    settings = read_settings(argv)
    if settings.model is None:
        raise missing_model()
    run(settings, terminal, hosts)
    return 0


class Leave:
    """Leaves on SIGTERM or SIGHUP; what is under way is cleaned up on the way out."""

    def __init__(self) -> None:
        # The exit status, once there is one.
        self.status = 0

    def __call__(self, signum: int, frame: object) -> NoReturn:
        """Handle a signal."""
        self.status = 128 + signum
        raise SystemExit(self.status)


def leave_in_time() -> None:
    """End this process soon after a signal, or after its launcher, even where it waits for another host.

    Python handles a signal only between two of its own steps, and a step of the engine may never end then.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    launcher = os.getppid()

    def watch() -> None:
        number = signal.SIGHUP.value
        while os.getppid() == launcher:
            if select.select([reader], [], [], LEAVE_S)[0]:
                number = os.read(reader, 1)[0]
                break
        # It may still leave by itself, and better.
        time.sleep(LEAVE_S)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def open_closed_streams() -> None:
    """Stand in for standard streams that were closed, in the order in which they get their numbers back."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the one place where errors become exit statuses."""
    if sys.version_info < (3, 9):
        print("llmchat: error: Python 3.9 or newer is needed: there is no MLX for this one.", file=sys.stderr)
        return 1
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    leave = Leave()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup, SIGHUP is to be ignored.
        if handlers[number] is not signal.SIG_IGN:
            signal.signal(number, leave)
    open_closed_streams()
    terminal = Terminal(sys.stdin, sys.stdout, sys.stderr, Path(os.path.expanduser("~")) / HISTORY_FILE)
    hosts = Hosts()
    try:
        hosts = join_hosts()
        if hosts.size > 1:
            leave_in_time()
            terminal.read_from_launcher(hosts.meet)
        status = start(argv, terminal, hosts) if hosts.rank == 0 else follow(hosts)
    except ChatError as error:
        if str(error) and not leave.status:
            terminal.error(hosts.in_turn(str(error)))
        # An import that a signal breaks off may say so with an error of its own.
        status = leave.status or error.status
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as error:
        # Of argparse, or of a signal.
        status = int(error.code or 0)
    except OSError as error:
        # Python's own flush at exit must not fail once more on a standard output that is gone, or full.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 1
        if status == 1:
            terminal.error(f"The session can't be read or written any more: {one_line(error)}.")
    finally:
        terminal.close()
        for number, handler in handlers.items():
            # A launcher ends all hosts once one has ended; by now this one has a status, and little left to do.
            signal.signal(number, handler if hosts.size == 1 else lambda *_: None)
    hosts.dismiss(status)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
