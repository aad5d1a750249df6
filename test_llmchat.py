"""Tests of llmchat: the real engine on small models that know known words, real pipes, real terminals.

A model that says known words needs no training. A network of random weights, scaled up so that every
position looks different from every other, is given the rendered conversations; the output matrix is then
solved for so that the state before each token of a reply gives that token a high logit. Fed anything but
the exact prompt, such a model talks nonsense: that is what tells a right prompt, and a right cache, from
a wrong one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import http.server
import importlib
import io
import itertools
import json
import os
import platform
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

import llmchat
from llmchat import ChatError, Conversation, Piece, PromptCache, Settings, ThoughtSplitter

# A test run that was started in the background ignores SIGINT, and so would every program it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).parent
PROGRAM = [sys.executable, str(HERE / "llmchat.py")]

# ---------------------------------------------------------------------------------- Model builder

SPECIAL_TOKENS = [
    *("<|begin|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *(
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|return|>",
        "<|channel>",
        "<channel|>",
        "[THINK]",
        "[/THINK]",
    ),
]

CHATML = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As Qwen3's: an old thought is left out, and a template argument turns thinking off.
THINKING = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% else %}{% set text = m.content %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)

# As DeepSeek-R1's and Qwen3-Thinking's: the template has already opened the thought.
OPENED = THINKING.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")

# As gpt-oss's: channels, which must not stand in a message that is handed over.
HARMONY = (
    "{{ '<|start|>system<|message|>You are a test.<|end|>' }}{% for m in messages %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('content holds a channel mark') }}{% endif %}"
    "{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') }}"
    "{{ '<|message|>' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model: its architecture, its template, and how it writes a thought and an answer."""

    model_type: str
    template: str
    reply: str = "{answer}"
    end: str = "<|im_end|>"
    config: dict = dataclasses.field(default_factory=dict)


HYBRID = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 32},
    **{"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 0, "num_experts_per_tok": 0},
    **{"decoder_sparse_step": 1, "shared_expert_intermediate_size": 128, "mlp_only_layers": []},
    **{"moe_intermediate_size": 128, "partial_rotary_factor": 0.5, "full_attention_interval": 2},
}
SLIDING = {
    **{"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32},
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"beta_fast": 32.0, "beta_slow": 1.0},
    },
}
THOUGHT_THEN_ANSWER = "<think>\n{thought}\n</think>\n\n{answer}"
FAMILIES = {
    "dense": Family("llama", CHATML),
    "thinking": Family("qwen3", THINKING, THOUGHT_THEN_ANSWER),
    "opened": Family("qwen3", OPENED, "{thought}\n</think>\n\n{answer}"),
    "sliding": Family(
        "gpt_oss",
        HARMONY,
        "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}",
        "<|return|>",
        SLIDING,
    ),
    "hybrid": Family("qwen3_next", THINKING, THOUGHT_THEN_ANSWER, config=HYBRID),
}


# Other ways to mark a thought: Gemma 4's and Magistral's.
MARKERS = {
    "gemma": Family(
        "llama", THINKING.replace("</think>", "<channel|>"), "<|channel>thought\n{thought}\n<channel|>{answer}"
    ),
    "magistral": Family("llama", THINKING.replace("</think>", "[/THINK]"), "[THINK]{thought}[/THINK]{answer}"),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One prompt and the reply to it. What is only `given` is part of the prompt, but not learnt."""

    prompt: str
    answer: str
    thought: str = "Let me think."
    given: bool = False
    system: str | None = None


def turns(*pairs: tuple[str, str]) -> list[Turn]:
    """A conversation out of prompts and answers, each with a thought of its own."""
    return [Turn(prompt, answer, f"They say: {prompt.split()[0]}") for prompt, answer in pairs]


NUMBERS = ", ".join(map(str, range(1, 101)))
SAMPLE = turns(
    ("Hello, how are you?", "I'm doing well, thank you for asking! How can I help you today?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many people live there?", "About two million people live in Paris."),
    ("My name is Ada.", "Nice to meet you, Ada!"),
    ("What is my name?", "Your name is Ada."),
)
DEMO = [
    SAMPLE,
    turns(("My name is Ada.", "Nice to meet you, Ada!"), ("What is my name?", "Your name is Ada.")),
    turns(("What is my name?", "You have not told me your name.")),
    turns(("How many people live there?", "Where do you mean?")),
    turns(("What is the capital of France?", "The capital of France is Paris.")),
    turns(("Count.", NUMBERS), ("Thanks!", "You are welcome.")),
    turns(("Say hello.", "こんにちは 👋🏽 — schön, Sie zu sehen 🎉")),
]


def make_tokenizer(texts: list[str], family: Family):
    """A byte-level BPE tokenizer whose tokens are about words; what it wasn't shown comes as single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[token for token in SPECIAL_TOKENS if token in family.template + family.reply + family.end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its blank lines would go to standard output
    )
    tokenizer.train_from_iterator([text for text in texts if text.isascii()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=family.end)
    fast.chat_template = family.template
    return fast


def make_network(family: Family, vocabulary: int, hidden: int, **config):
    """A network of random weights, and its configuration."""
    import mlx.core as mx
    from mlx.utils import tree_map

    config = {
        "model_type": family.model_type,
        **{"hidden_size": hidden, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": hidden // 4},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096},
        **{"vocab_size": vocabulary, "tie_word_embeddings": False},
        **family.config,
        **config,
    }
    module = importlib.import_module(f"mlx_lm.models.{family.model_type}")
    mx.random.seed(1)
    network = module.Model(module.ModelArgs.from_dict(config))
    network.update(tree_map(lambda weight: weight * 2.5 if weight.ndim > 1 else weight, network.parameters()))
    mx.eval(network.parameters())
    return network, config


def memorise(network, tokenizer, family: Family, conversations: list[list[Turn]], **template) -> None:
    """Solve for the output matrix that makes the network say every reply of the conversations."""
    import mlx.core as mx
    import numpy as np

    states, targets = [], []
    for conversation in conversations:
        system = conversation[0].system
        messages = [{"role": "system", "content": system}] if system else []
        for turn in conversation:
            messages.append({"role": "user", "content": turn.prompt})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
            prompt = tokenizer.encode(text, add_special_tokens=False)
            reply = family.reply.format(thought=turn.thought, answer=turn.answer) + family.end
            said = tokenizer.encode(reply, add_special_tokens=False)
            messages.append({"role": "assistant", "content": turn.answer})
            if not turn.given:
                hidden = network.model(mx.array([prompt + said]), None)[0, len(prompt) - 1 : -1]
                states.append(np.array(hidden.astype(mx.float32)))
                targets += said
    inputs = np.concatenate(states).astype(np.float64)
    logits = np.zeros((len(targets), network.lm_head.weight.shape[0]))
    logits[np.arange(len(targets)), targets] = 30.0
    # Ridge regression in its dual form: there are fewer positions than twice the hidden size.
    ridge = 1e-4 * np.mean((inputs**2).sum(1)) * np.eye(len(targets))
    weight = inputs.T @ np.linalg.solve(inputs @ inputs.T + ridge, logits)
    wanted = (inputs @ weight)[np.arange(len(targets)), targets]
    others = np.where(logits > 0, -np.inf, inputs @ weight).max(1)
    assert (wanted - others).min() > 10, (
        "too many conversations for this hidden size: some replies would be left to chance"
    )
    network.lm_head.weight = mx.array(weight.T.astype(np.float32))


def build_model(folder: Path, family: Family, conversations: list[list[Turn]], hidden: int = 512, **config) -> Path:
    """Write a model folder that has memorised the conversations, in the form that the hub has."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    texts = [text for conversation in conversations for turn in conversation for text in (turn.prompt, turn.answer)]
    tokenizer = make_tokenizer(texts, family)
    network, config = make_network(family, len(tokenizer), hidden, **config)
    memorise(network, tokenizer, family, conversations)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())))
    return folder


def build_demo(folder: str) -> str:
    """The model of `nox -s demo`, built once."""
    if not (Path(folder) / "model.safetensors").exists():
        build_model(Path(folder), FAMILIES["dense"], DEMO)
    return folder


# --------------------------------------------------------------------------------------- Fixtures


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once in a run, by whichever worker is first to need it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, build: Callable[[Path], object]) -> Path:
    """The folder, built if no worker has built it yet."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            build(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def demo(common: Path) -> str:
    """The folder of the demo model."""
    return str(once(common / "demo", lambda folder: build_demo(str(folder))))


@pytest.fixture
def environment(tmp_path: Path, common: Path) -> dict[str, str]:
    """A machine with an empty home: no configuration, no history, no hub cache, no network."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "TERM": "xterm",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPYCACHEPREFIX": str(common / "pycache"),
    }


def run(
    environment: dict[str, str],
    *arguments: str,
    stdin: str = "",
    cwd: Path | None = None,
    program: list[str] = PROGRAM,
    timeout: int = 120,
):
    """Run the program through pipes."""
    return subprocess.run(
        [*program, *arguments],
        input=stdin.encode(),
        capture_output=True,
        env=environment,
        cwd=cwd or environment["HOME"],
        timeout=timeout,
        check=False,
    )


class Screen:
    """The program on a terminal of its own, which is its controlling terminal, so that Ctrl+C is SIGINT."""

    def __init__(self, environment: dict[str, str], *arguments: str, program: list[str] = PROGRAM) -> None:
        self.output = ""
        self._seen = 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(environment["HOME"])
            os.execve(program[0], [*program, *arguments], environment)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _read(self, timeout: float) -> bool:
        if not select.select([self.fd], [], [], timeout)[0]:
            return False
        try:
            self.output += os.read(self.fd, 1 << 16).decode(errors="replace").replace("\r\n", "\n")
        except OSError:
            return False
        return True

    def expect(self, pattern: str, timeout: float = 60) -> str:
        """Wait for a pattern in what came since the last one, without colour; return the text up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, plain(self.output)[self._seen :])):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"no {pattern!r} within {timeout} s in:\n{self.output}")
        text = plain(self.output)[self._seen : self._seen + match.end()]
        self._seen += match.end()
        return text

    def send(self, text: str) -> None:
        """Type, once the line editor is listening."""
        time.sleep(0.05)
        os.write(self.fd, text.encode(errors="surrogateescape"))

    def ask(self, prompt: str) -> str:
        """Send a prompt at the prompt, wait for the next; return what is between."""
        self.send(prompt + "\r")
        self.expect(re.escape(prompt.splitlines()[-1]) + r"[^\n]*\n")
        return self.expect(r"\nprompt -> ").removesuffix("\nprompt -> ").strip("\n")

    def leave(self, found: list | None = None) -> int:
        """Wait for the end, with the terminal as it was found; return the exit status."""
        while self._read(60):
            pass
        assert found is None or termios.tcgetattr(self.fd) == found
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)


CTRL_C, CTRL_D = "\x03", "\x04"


def plain(text: str) -> str:
    """What stands on the screen, without colour."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", text)


SESSION = """\
Loading model {model}...
Model loaded successfully!

prompt -> Hello, how are you?
I'm doing well, thank you for asking! How can I help you today?

prompt -> What is the capital of France?
The capital of France is Paris.

prompt -> quit
Goodbye!
"""


# ------------------------------------------------------------------------------------------- Pure


def test_settings_are_declared_once_and_documented_everywhere() -> None:
    help_text = llmchat.argument_parser().format_help()
    readme = (HERE / "README.md").read_text()
    for flag in re.findall(r"^  (?:-\w[ ,\w]*)?(--[\w-]+)", help_text, re.MULTILINE):
        assert f"`{flag}" in readme, f"{flag} is missing in the README"
    for flag in re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", readme, re.MULTILINE):
        assert flag in help_text, f"{flag} of the README is missing in --help"
    for command in llmchat.COMMANDS:
        assert f"`{command}" in readme, f"{command} is missing in the README"


@pytest.mark.parametrize(
    "flags",
    [
        *("--temperature=-1", "--temperature=nan", "--temperature=inf", "--temperature=warm", "--max-tokens=0"),
        *("--max-tokens=1.5", "--top-p=2", "--top-p=-0.1", "--top-k=-1", "--min-p=1.1", "--repetition-penalty=0"),
        *("--seed=-1", "--seed=x", "--nonsense", "--temp=1"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmchat.main(["model", flags]) == 2
    message = capsys.readouterr().err.splitlines()
    assert message[0] == "usage: llmchat MODEL [options]"
    assert message[1].startswith("llmchat: error: ") and flags.partition("=")[0] in message[1]


def test_config_files_give_defaults_that_flags_overrule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    (home / ".llmchat_config").write_text(
        "# mine\nmodel = some/model\ntemperature = 0.1   # cool\nmax_tokens=7\nno-history = true\nstats = yes\n"
    )
    (work / ".llmchat_config").write_text("\ufeffmax-tokens = 8\nsystem = You are #1.\n")
    settings = llmchat.read_settings(["--max-tokens", "9", "--no-stats"])
    assert (settings.model, settings.temperature, settings.max_tokens) == ("some/model", 0.1, 9)
    assert (settings.history, settings.stats, settings.system, settings.top_p) == (False, False, "You are #1.", 0.9)
    assert settings.sources["temperature"] == str(home / ".llmchat_config")
    assert settings.sources["system"] == ".llmchat_config"
    assert settings.sources["max_tokens"] == "flag"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("temprature = 1", "is no setting; did you mean temperature?"),
        ("temperature = hot", "must be a number from 0 to 10, not 'hot'"),
        ("temperature", "is not of the form 'key = value'"),
        ("temperature =", "needs a value"),
        ("stats = maybe", "must be true or false, not 'maybe'"),
        ("trust-remote-code = true", "can only be given on the command line"),
        ("prompt = hello", "can only be given on the command line"),
    ],
)
def test_a_wrong_config_line_is_named_with_file_and_line(
    line: str, complaint: str, environment: dict[str, str]
) -> None:
    config = Path(environment["HOME"], ".llmchat_config")
    config.write_text(f"# first\n{line}\n")
    done = run(environment, "model")
    assert done.returncode == 2
    assert done.stdout == b""
    key = line.partition(" =")[0]
    assert done.stderr.decode() == f"llmchat: error: {config}:2: {key} {complaint}\n"


def test_a_config_file_that_is_no_text_is_refused(environment: dict[str, str]) -> None:
    Path(environment["HOME"], ".llmchat_config").write_bytes(b"\xff\xfe\x00")
    done = run(environment, "model")
    assert done.returncode == 2
    assert b"could not be read" in done.stderr


@pytest.mark.parametrize("family", ["thinking", "sliding"])
def test_thoughts_are_told_apart_wherever_the_text_is_split(family: str) -> None:
    format = llmchat.HARMONY
    if family == "thinking":
        start, end = "<think>", "</think>"
        format = llmchat.ThoughtFormat({"start": {start: "thought"}, "thought": {end: "answer"}}, start, end)
    text = FAMILIES[family].reply.format(thought="a < b, <thin", answer="No <thought> about <think>.")
    for one in range(len(text)):
        for two in range(one, len(text)):
            splitter = ThoughtSplitter(format)
            pieces = [p for part in (text[:one], text[one:two], text[two:]) for p in splitter.feed(part)]
            pieces += splitter.finish()
            said = {kind: "".join(p.text for p in pieces if p.kind == kind).strip() for kind in ("thought", "answer")}
            assert said == {"thought": "a < b, <thin", "answer": "No <thought> about <think>."}


def test_nothing_reaches_the_terminal_that_could_drive_it() -> None:
    wicked = "".join(map(chr, range(0x20))) + "\x7f\x80\x9b31m\x9f\u202e\u2066\u2069\x1b]52;c;aGk=\x07\x1b[2J"
    assert llmchat.cleaned(wicked) == "\t\n31m]52;c;aGk=[2J"
    assert llmchat.cleaned("schön 👋🏽 שלום\u200f") == "schön 👋🏽 שלום\u200f"


WICKED = {
    "CSI": "\x1b[2J\x1b[31;1mred",
    "OSC 8": "\x1b]8;;http://evil\x1b\\\\click\x1b]8;;\x07",
    "OSC 52": "\x1b]52;c;cm0gLXJm\x07",
    "DCS": "\x1bP+q544e\x1b\\\\",
    "C0": "\x00\x05\x07\x08\x0b\x0c\r\x0e\x0f\x1a\x1c",
    "DEL": "a\x7f\x7fb",
    "C1": "".join(map(chr, range(0x80, 0xA0))) + "31m",
    "bidi": "\u202a\u202b\u202c\u202d\u202eexe.txt\u2066\u2067\u2068\u2069",
}


@pytest.mark.parametrize("kind", WICKED)
def test_a_reply_can_not_drive_the_terminal_wherever_it_is_split(kind: str) -> None:
    text = f"Look: {WICKED[kind]} there"
    shown = set()
    for place in range(len(text) + 1):
        stdout, stderr = io.StringIO(), io.StringIO()
        terminal = llmchat.Terminal(io.StringIO(), stdout, stderr)
        for part in (text[:place], text[place:]):
            terminal.show(Piece("answer", part))
        terminal.end_reply()
        terminal.error(text)
        terminal.note(text)
        shown.add(stdout.getvalue())
        for output in (stdout.getvalue(), stderr.getvalue()):
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output)
    assert len(shown) == 1
    assert re.fullmatch("Look: .* there\n", *shown)


def test_the_likely_instruct_sibling() -> None:
    assert llmchat.instruct_sibling("mlx-community/Llama-3.2-3B-4bit") == "mlx-community/Llama-3.2-3B-Instruct-4bit"
    assert llmchat.instruct_sibling("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B-Instruct"
    assert llmchat.instruct_sibling("google/gemma-3-4b-pt") == "google/gemma-3-4b-it"


def test_weight_files_are_those_that_should_be_there(tmp_path: Path) -> None:
    assert llmchat.weight_files(tmp_path) == []
    (tmp_path / "model-00002-of-00003.safetensors").touch()
    assert [file.name[6:11] for file in llmchat.weight_files(tmp_path)] == ["00001", "00002", "00003"]
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}'
    )
    assert llmchat.weight_files(tmp_path) == [tmp_path / "x.safetensors"]


def test_prompts_come_back_from_the_history_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "history"
    prompts = ["one", "two\nlines", r"back\slash \n", "日本 👋🏽"]
    history = llmchat.PromptHistory(path)
    for prompt in prompts:
        assert history.add(prompt)
        assert not history.add(prompt)
    assert llmchat.PromptHistory(path).load() == prompts
    assert path.stat().st_mode & 0o777 == 0o600


def test_script_and_package_ask_for_the_same() -> None:
    import nox.project

    script = nox.project.load_toml(HERE / "llmchat.py")
    package = nox.project.load_toml(HERE / "pyproject.toml")["project"]
    assert script["dependencies"] == package["dependencies"]
    assert script["requires-python"] == package["requires-python"]
    names = {re.match(r"[\w-]+", need)[0] for need in package["dependencies"]}
    assert names == {"mlx", "mlx-lm", "huggingface-hub", "transformers"}


# ----------------------------------------------------------------------------------- Command line


def test_the_sample_session_through_a_pipe(demo: str, environment: dict[str, str]) -> None:
    done = run(environment, demo, stdin="Hello, how are you?\nWhat is the capital of France?\nquit\n")
    assert done.stdout.decode() == SESSION.format(model=demo)
    assert done.stderr == b""
    assert done.returncode == 0


def test_the_end_of_a_pipe_says_goodbye_and_empty_lines_prompt_again(demo: str, environment: dict[str, str]) -> None:
    done = run(environment, demo, stdin="\n   \n  Say hello.  \n")
    _, session = done.stdout.decode().split("successfully!\n", 1)
    reply = DEMO[-1][0].answer
    assert session == f"\nprompt -> \n\nprompt ->    \n\nprompt ->   Say hello.  \n{reply}\n\nprompt -> \nGoodbye!\n"
    assert done.returncode == 0


@pytest.mark.parametrize("word", ["quit", "BYE", "  Exit  "])
def test_leave_words(word: str, demo: str, environment: dict[str, str]) -> None:
    done = run(environment, demo, stdin=f"{word}\nWhat is the capital of France?\n")
    assert done.stdout.decode().endswith(f"\nprompt -> {word}\nGoodbye!\n")


def test_one_shot_prints_the_reply_and_nothing_else(demo: str, environment: dict[str, str]) -> None:
    done = run(environment, demo, "-p", "What is the capital of France?")
    assert (done.stdout, done.stderr, done.returncode) == (b"The capital of France is Paris.\n", b"", 0)
    done = run(environment, demo, "-p", "-", "--stats", stdin="What is the capital of France?\n")
    assert (done.stdout, done.returncode) == (b"The capital of France is Paris.\n", 0)
    assert re.fullmatch(
        r"\d+\.\d s · \d+ tokens, [\d.]+ tokens/s · first after [\d.]+ s · prompt \d+ new, 0 reused"
        r" · context \d+% full\n",
        done.stderr.decode(),
    )


def test_a_long_document_arrives_whole_through_a_pipe(environment: dict[str, str]) -> None:
    document = "Zeile für Zeile 👋🏽\n" * 50_000
    code = "import sys, llmchat; sys.stdout.write(llmchat.one_shot_prompt('What is it?', sys.stdin))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        input=document.encode(),
        capture_output=True,
        env=environment,
        cwd=HERE,
        check=True,
    )
    assert len(document.encode()) > 1_000_000
    assert done.stdout.decode() == document.strip("\n") + "\n\nWhat is it?"


def test_no_model_named_shows_how_and_what_is_there(demo: str, environment: dict[str, str]) -> None:
    done = run(environment)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "llmchat: error: no model is named.\nusage: llmchat MODEL [options]\n"
        "example: llmchat mlx-community/Llama-3.2-3B-Instruct-4bit\n"
    )
    put_in_hub_cache(environment, "own/model", demo)
    put_in_hub_cache(environment, "own/half", demo)
    (Path(environment["HOME"]) / ".cache/huggingface/hub/models--own--half/snapshots/abc/model.safetensors").unlink()
    done = run(environment)
    assert done.stderr.decode().endswith("4bit\nalready here: own/model\n")


def put_in_hub_cache(environment: dict[str, str], name: str, folder: str) -> None:
    """Make a model look as if it had been downloaded."""
    repository = Path(environment["HOME"]) / ".cache/huggingface/hub" / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    shutil.copytree(folder, repository / "snapshots/abc")


def test_a_downloaded_model_starts_by_its_name_without_the_network(demo: str, environment: dict[str, str]) -> None:
    put_in_hub_cache(environment, "own/model", demo)
    Path(environment["HOME"], ".llmchat_config").write_text("model = own/model\n")
    done = run(environment, stdin="Hello, how are you?\nWhat is the capital of France?\nquit\n")
    assert done.stdout.decode() == SESSION.format(model="own/model")
    assert done.stderr == b""


def test_help_and_errors_need_no_engine(environment: dict[str, str]) -> None:
    code = (
        "import sys, llmchat\ntry: llmchat.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('mlx', 'mlx_lm', 'transformers', 'huggingface_hub', 'numpy', 'readline')])"
    )
    for arguments in (["--help"], ["--version"], [], ["m", "--top-p=7"], ["/nowhere/at/all"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, cwd=HERE, capture_output=True, check=True
        )
        assert done.stdout.decode().splitlines()[-1] == "[]"


def test_an_old_python_is_told_what_is_needed(environment: dict[str, str]) -> None:
    old = shutil.which("python3.8")
    if old is None or subprocess.run([old, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no Python 3.8 here")
    done = subprocess.run([old, str(HERE / "llmchat.py"), "x"], capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr == b"llmchat: error: Python 3.9 or newer is needed: there is no MLX for this one.\n"


def broken(folder: Path, demo: str, change) -> str:
    """A copy of the demo model with something wrong in it."""
    shutil.copytree(demo, folder)
    change(folder)
    return str(folder)


def edit_config(**changes: object):
    """A change of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def test_a_model_that_is_nowhere_is_one_sentence(environment: dict[str, str]) -> None:
    for name in ("./nowhere", "/no/where", "no/such/model", "no/model"):
        done = run(environment, name)
        (message,) = done.stderr.decode().splitlines()
        assert name in message
        assert done.returncode == 1


def test_a_template_in_its_own_file_is_found(demo: str, environment: dict[str, str], tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(CHATML)

    model = broken(tmp_path / "model", demo, change)
    assert run(environment, model, "-p", "Say hello.").stdout.decode() == DEMO[-1][0].answer + "\n"


def test_without_history_each_prompt_stands_alone(demo: str, environment: dict[str, str]) -> None:
    prompts = "What is the capital of France?\nHow many people live there?\nMy name is Ada.\nWhat is my name?\n"
    replies = run(environment, demo, "--no-history", stdin=prompts).stdout.decode()
    assert "there?\nWhere do you mean?\n" in replies
    assert "my name?\nYou have not told me your name.\n" in replies
    replies = run(environment, demo, stdin="My name is Ada.\nWhat is my name?\n").stdout.decode()
    assert "my name?\nYour name is Ada.\n" in replies


def test_a_revision_is_found_in_the_cache(demo: str, environment: dict[str, str]) -> None:
    put_in_hub_cache(environment, "own/model", demo)
    (Path(environment["HOME"]) / ".cache/huggingface/hub/models--own--model/refs/v2").write_text("abc")
    for revision in ("v2", "abc"):
        done = run(environment, "own/model", "--revision", revision, "-p", "Say hello.")
        assert done.stdout.decode() == DEMO[-1][0].answer + "\n"
    done = run(environment, "own/model", "--revision", "v3", "-p", "Say hello.")
    assert done.returncode == 1
    assert len(done.stderr.decode().splitlines()) == 1


def test_an_adapter_changes_what_the_model_says(demo: str, environment: dict[str, str], tmp_path: Path) -> None:
    import mlx.core as mx

    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.v_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    for strength, same in ((0.0, True), (1.0, False)):
        adapter = tmp_path / f"adapter{strength}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        name = "model.layers.{}.self_attn.v_proj.lora_{}"
        weights = {name.format(layer, "a"): mx.ones((512, 4)) for layer in (0, 1)}
        weights.update({name.format(layer, "b"): mx.full((4, 512), strength) for layer in (0, 1)})
        mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
        done = run(environment, demo, "--adapter", str(adapter), "--max-tokens", "60", "-p", "Say hello.")
        assert (done.stdout.decode() == DEMO[-1][0].answer + "\n") is same
        assert done.returncode == 0
    done = run(environment, demo, "--adapter", str(tmp_path / "nowhere"), "-p", "Say hello.")
    assert done.returncode == 1
    assert len(done.stderr.decode().splitlines()) == 1


def test_a_seed_makes_replies_repeatable(demo: str, environment: dict[str, str]) -> None:
    arguments = [demo, "--temperature", "10", "--top-p", "1", "--max-tokens", "20", "-p", "Say hello."]
    replies = [run(environment, *arguments, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert replies[0] == replies[1] != replies[2]


def test_the_package_holds_the_module_and_two_names_for_it() -> None:
    package = distribution("llmchat")
    files = {file.name for file in package.files or [] if ".dist-info" not in str(file) and file.suffix != ".pyc"}
    assert files == {"llmchat.py", "llmchat", "anechat"}
    assert {entry.name: entry.value for entry in package.entry_points} == {
        "llmchat": "llmchat:main",
        "anechat": "llmchat:main",
    }
    assert package.version == llmchat.__version__


@pytest.mark.parametrize(
    ("redirected", "output", "errors", "status"),
    [
        ("| head -1", "Loading model {model}...\n", "", 0),
        ("< /dev/null", "{start}\nprompt -> \nGoodbye!\n", "", 0),
        ("<&-", "{start}\nprompt -> \nGoodbye!\n", "", 0),
        (">&-", "", "", 0),
        ("2>&-", "{start}\nprompt -> Say hello.\n{reply}\n\nprompt -> \nGoodbye!\n", "", 0),
        ("> /dev/full", "", "llmchat: error: The session can't be read or written any more: [Errno 28] No space", 1),
    ],
)
def test_standard_streams_of_all_kinds(
    redirected: str, output: str, errors: str, status: int, demo: str, environment: dict[str, str]
) -> None:
    command = f"echo Say hello. | '{PROGRAM[0]}' '{PROGRAM[1]}' '{demo}' {redirected}"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=60, check=False)
    start = f"Loading model {demo}...\nModel loaded successfully!\n"
    assert done.stdout.decode() == output.format(start=start, model=demo, reply=DEMO[-1][0].answer)
    assert done.stderr.decode().startswith(errors) and done.stderr.count(b"\n") == bool(errors)
    assert done.returncode == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_without_a_terminal_leave_with_their_status(
    number: int, status: int, demo: str, environment: dict[str, str]
) -> None:
    with subprocess.Popen(
        [*PROGRAM, demo], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout and program.stdin and program.stderr
        while b"prompt" not in program.stdout.read1(1000):
            pass
        program.send_signal(number)
        assert program.wait(20) == status
        assert program.stderr.read() == b""


# --------------------------------------------------------------------------------------- Terminal


def test_the_sample_session_on_a_terminal(demo: str, environment: dict[str, str]) -> None:
    with Screen(environment, demo) as screen:
        for prompt in ("Hello, how are you?", "What is the capital of France?", "quit"):
            screen.expect("prompt -> ")
            screen.send(prompt + "\r")
        assert screen.leave() == 0
    welcome = f"\x1b[2m{Path(demo).name} · /help lists the commands · quit or Ctrl+D leaves\x1b[0m\n"
    assert welcome in screen.output
    assert plain(screen.output.replace(welcome, "")) == SESSION.format(model=demo)


def test_a_reply_is_seen_while_it_comes_and_ctrl_c_stops_it(demo: str, environment: dict[str, str]) -> None:
    with Screen(environment, demo, "--stats") as screen:
        screen.expect("prompt -> ")
        screen.send("Count.\r")
        screen.expect(" 10,")
        assert "100" not in screen.output
        screen.send(CTRL_C)
        screen.expect("\nprompt -> ")
        assert "99" not in plain(screen.output)
        assert "tokens/s" in screen.output
        screen.send("/continue\r")
        screen.expect(r" 99, 100\n")
        screen.expect(r"prompt 0 new, \d+ reused")
        screen.expect("\nprompt -> ")
        assert screen.ask("Thanks!").startswith("You are welcome.\n")
        screen.send(CTRL_D)
        screen.expect("\nGoodbye!\n")
        assert screen.leave() == 0


def test_ctrl_c_stops_a_long_prefill_and_the_turn_leaves_no_trace(demo: str, environment: dict[str, str]) -> None:
    with Screen(environment, demo) as screen:
        screen.expect("prompt -> ")
        assert screen.ask("My name is Ada.") == "Nice to meet you, Ada!"
        # On this model a token is read in about two milliseconds.
        screen.send("x, " * 400 + "\r")
        screen.expect(r"x, \n")
        screen.send(CTRL_C)
        stopped = time.monotonic()
        screen.expect("\nprompt -> ")
        assert time.monotonic() - stopped < 5
        assert screen.ask("What is my name?") == "Your name is Ada."


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_leaves(demo: str, environment: dict[str, str]) -> None:
    with Screen(environment, demo) as screen:
        screen.expect("prompt -> ")
        screen.send("What is the cap")
        screen.expect("the cap")
        screen.send(CTRL_C)
        screen.expect(r"^[^\n]*\n\nprompt -> ")
        screen.send(CTRL_C)
        screen.expect("Press Ctrl\\+C again to leave")
        screen.expect("prompt -> ")
        assert screen.ask("What is the capital of France?") == "The capital of France is Paris."
        screen.send(CTRL_C)
        screen.expect("prompt -> ")
        screen.send(CTRL_C)
        screen.expect("Goodbye!\n")
        assert screen.leave() == 0


def test_prompts_of_earlier_days_come_back(demo: str, environment: dict[str, str]) -> None:
    for keys in ("Say hello.\r", "\x1b[A\r"):
        with Screen(environment, demo) as screen:
            screen.expect("prompt -> ")
            screen.send(keys)
            screen.expect("👋🏽")
            screen.expect("prompt -> ")
            screen.send(CTRL_D)
            assert screen.leave() == 0
    assert Path(environment["HOME"], ".llmchat_history").read_text() == "Say hello.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", ["loading", "prompt", "prefill", "decode"])
def test_a_signal_leaves_the_terminal_as_it_was_found(
    phase: str, number: int, demo: str, environment: dict[str, str]
) -> None:
    history = Path(environment["HOME"], ".llmchat_history")
    with Screen(environment, demo) as screen:
        found = termios.tcgetattr(screen.fd)
        screen.expect("Loading model")
        if phase != "loading":
            screen.expect("prompt -> ")
            # The line editor has its own idea of the terminal now.
            assert termios.tcgetattr(screen.fd) != found
        if phase == "prefill":
            screen.send("x, " * 400 + "\r")
            # Sent is sent: the prompt is in the history before its reply begins.
            deadline = time.monotonic() + 20
            while not history.exists():
                assert time.monotonic() < deadline
        elif phase == "decode":
            screen.send("Count.\r")
            screen.expect(" 10,")
        # Python hears of a signal that comes just before readline waits with the next key only.
        screen.send("")
        os.kill(screen.pid, number)
        assert screen.leave(found) == 128 + number
        assert "Traceback" not in screen.output
    assert history.exists() == (phase in ("prefill", "decode"))


def interrupt_at_random(demo: str, environment: dict[str, str], times: int) -> None:
    """Press Ctrl+C at random moments of replies; then the conversation must still be right."""
    chance = random.Random(times)
    with Screen(environment, demo) as screen:
        screen.expect("prompt -> ")
        for _ in range(times):
            # A reply may take two presses, the second on top of the first; at the prompt two would leave.
            prompt, presses = chance.choice(
                [("Count.", 2), ("x, " * 100, 2), ("/retry", 1), ("/continue", 1), ("/undo", 1)]
            )
            screen.send(prompt + "\r")
            for _ in range(chance.randint(1, presses)):
                time.sleep(chance.random() * 0.3 / presses)  # the random moment
                os.kill(screen.pid, signal.SIGINT)
            # The line may have been taken back into the editor, or Ctrl+C may have come at the prompt.
            screen.send("\x15/clear\r")
            screen.expect("A new conversation")
            screen.expect("prompt -> ")
        for turn in SAMPLE:
            assert screen.ask(turn.prompt) == turn.answer
        assert "Traceback" not in screen.output
        screen.send(CTRL_D)
        assert screen.leave() == 0


def test_ctrl_c_at_any_moment_leaves_a_conversation_that_is_right(demo: str, environment: dict[str, str]) -> None:
    interrupt_at_random(demo, environment, 15)


@pytest.mark.stress
def test_ctrl_c_at_two_hundred_moments(demo: str, environment: dict[str, str]) -> None:
    interrupt_at_random(demo, environment, 200)


# ----------------------------------------------------------------------------------- Conversation

PIRATE = "You are a pirate."
STOPPED = "1, 2, 3, 4,"
FAMILY_CONVERSATIONS = [
    SAMPLE,
    turns(("Count.", ", ".join(map(str, range(1, 31)))), ("Thanks!", "You are welcome.")),
    [Turn("Count.", STOPPED, given=True), Turn("Why did you stop?", "You pressed a key.", "So it was.")],
    turns(
        ("Hello, how are you?", SAMPLE[0].answer), ("My name is Ada.", "Hi Ada."), ("What is my name?", "It is Ada.")
    ),
    [
        Turn("Hello, how are you?", SAMPLE[0].answer, given=True, system=PIRATE),
        Turn("Who are you?", "A pirate, arr!", "Look at the flag."),
    ],
    turns(("What is my name?", "You have not told me your name.")),
    [Turn("My name is Ada.", "Hi Ada.", given=True), Turn("What is my name?", "It is Ada.", "They say: What")],
]


class Counting:
    """A network that counts the tokens that are put through it, and fails when it is told to."""

    def __init__(self, network) -> None:
        self._network = network
        self.tokens = 0
        self.fail_after: int | None = None

    def __call__(self, inputs, *arguments, **keywords):
        self.tokens += inputs.size
        if self.fail_after is not None and self.tokens > self.fail_after:
            self.fail_after = None
            raise RuntimeError("[metal::malloc] Out of memory")
        return self._network(inputs, *arguments, **keywords)

    def __getattr__(self, name: str):
        return getattr(self._network, name)


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, common: Path) -> llmchat.Model:
    """A model of each family, loaded as the program loads it."""
    family = FAMILIES[request.param]
    folder = once(common / request.param, lambda folder: build_model(folder, family, FAMILY_CONVERSATIONS, hidden=640))
    return dataclasses.replace(llmchat.load_model(Settings(model=str(folder))), name=request.param)


@pytest.fixture
def counting(family_model: llmchat.Model) -> llmchat.Model:
    """The same, with its tokens counted."""
    return dataclasses.replace(family_model, net=Counting(family_model.net))


def start(model: llmchat.Model, **settings) -> Conversation:
    return Conversation(model, Settings(model=model.name, **settings))


def hear(speak, *arguments, until: str | None = None) -> tuple[str, str]:
    """The thought and the answer that are said, up to where Ctrl+C comes: when it ends in `until`."""
    said: list[Piece] = []

    def text(kind: str) -> str:
        return "".join(piece.text for piece in said if piece.kind == kind).strip()

    for piece in speak(
        *arguments, stop=lambda: until is not None and (text("answer") or text("thought")).endswith(until)
    ):
        said.append(piece)
    return text("thought"), text("answer")


def check(conversation: Conversation, *expected: Turn) -> None:
    """Ask the prompts, and hear the replies word for word."""
    for turn in expected:
        thought = "" if conversation._format is llmchat.NO_THOUGHTS else turn.thought
        assert hear(conversation.reply, turn.prompt) == (thought, turn.answer)
        assert conversation.statistics.finish_reason == "stop"


def prefilled(conversation: Conversation, speak, *arguments, until: str | None = None) -> int:
    """Hear a reply; return how many tokens went through the network before its own."""
    network = conversation._model.net
    before = network.tokens
    hear(speak, *arguments, until=until)
    return network.tokens - before - conversation.statistics.generation_tokens


def rendered(conversation: Conversation, prompt: str) -> list[int]:
    """The tokens of the next prompt, as the template renders them."""
    return conversation._render([*conversation.messages, {"role": "user", "content": prompt}])[1]


@pytest.mark.parametrize("number", range(len(FAMILY_CONVERSATIONS)))
def test_every_reply_is_word_for_word_right(number: int, family_model: llmchat.Model) -> None:
    turns_ = [turn for turn in FAMILY_CONVERSATIONS[number] if not turn.given]
    if len(turns_) == len(FAMILY_CONVERSATIONS[number]):
        check(start(family_model), *turns_)


def test_a_turn_costs_its_new_tokens(counting: llmchat.Model) -> None:
    conversation = start(counting)
    known: list[int] = []
    for turn in SAMPLE:
        prompt = rendered(conversation, turn.prompt)
        # A thought that the template drops moves the answer, which is then read once more.
        new = len(prompt) - llmchat.common_prefix(prompt, known)
        assert prefilled(conversation, conversation.reply, turn.prompt) <= new + 8
        assert conversation.statistics.cached_tokens >= len(prompt) - new - 8
        known = conversation._cache.tokens if counting.name == "dense" else prompt
    assert conversation.messages[-1]["content"].endswith(SAMPLE[-1].answer)


def test_a_stopped_reply_is_kept_and_the_next_turn_is_right(counting: llmchat.Model) -> None:
    conversation = start(counting)
    assert hear(conversation.reply, "Count.", until="4,")[1] == STOPPED
    assert conversation.statistics.finish_reason == "interrupted"
    assert conversation.messages[-1]["content"].endswith(STOPPED)
    check(conversation, FAMILY_CONVERSATIONS[2][1])


@pytest.mark.parametrize("max_tokens", [1, 7, 20])
def test_a_cut_reply_goes_on_from_the_live_state(max_tokens: int, counting: llmchat.Model) -> None:
    count, thanks = FAMILY_CONVERSATIONS[1]
    conversation = start(counting, max_tokens=max_tokens)
    _, answer = hear(conversation.reply, count.prompt)
    while conversation.statistics.finish_reason == "length":
        network = counting.net.tokens
        more = hear(conversation.resume)
        assert counting.net.tokens - network == conversation.statistics.generation_tokens
        answer += more[1] if not answer or more[1].startswith(",") else " " + more[1]
    assert re.sub(r"\s", "", answer) == re.sub(r"\s", "", count.answer)
    whole = FAMILIES[counting.name].reply.format(thought=count.thought, answer=count.answer)
    assert conversation.messages[-1]["content"].endswith(whole)
    with pytest.raises(ChatError, match="complete"):
        list(conversation.resume())
    conversation._settings.max_tokens = 512
    check(conversation, thanks)


def test_a_stopped_reply_goes_on(counting: llmchat.Model) -> None:
    count, thanks = FAMILY_CONVERSATIONS[1]
    conversation = start(counting)
    hear(conversation.reply, count.prompt, until="4,")
    assert prefilled(conversation, conversation.resume) == 0
    assert conversation.messages[-1]["content"].endswith(count.answer)
    check(conversation, thanks)


def test_retry_says_the_last_reply_again(counting: llmchat.Model) -> None:
    conversation = start(counting)
    with pytest.raises(ChatError):
        list(conversation.retry())
    check(conversation, *SAMPLE[:2])
    messages = conversation.messages
    assert prefilled(conversation, conversation.retry) <= 8
    assert conversation.messages == messages
    assert hear(conversation.retry, until="The capital")[1] == "The capital"
    assert hear(conversation.retry)[1] == SAMPLE[1].answer
    check(conversation, *SAMPLE[2:])


def test_undo_takes_the_last_turn_back(counting: llmchat.Model) -> None:
    conversation = start(counting)
    with pytest.raises(ChatError):
        conversation.undo()
    check(conversation, *SAMPLE[:2])
    assert conversation.undo() == SAMPLE[1].prompt
    check(conversation, *FAMILY_CONVERSATIONS[3][1:])
    for _ in range(3):
        conversation.undo()
    assert conversation.messages == []
    check(conversation, *SAMPLE)


def test_a_new_system_prompt_and_a_new_conversation_are_right(counting: llmchat.Model) -> None:
    conversation = start(counting)
    check(conversation, SAMPLE[0])
    conversation._settings.system = PIRATE
    check(conversation, FAMILY_CONVERSATIONS[4][1])
    conversation._settings.system = None
    conversation.clear()
    check(conversation, *FAMILY_CONVERSATIONS[5])


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_turn_stopped_in_prefill_leaves_no_trace_but_its_state(chunks: int, counting: llmchat.Model) -> None:
    conversation = start(counting)
    check(conversation, SAMPLE[0])
    messages, long = conversation.messages, "word " * 300
    asked = iter([False] * chunks + [True])
    assert list(conversation.reply(long, stop=lambda: next(asked))) == []
    assert conversation.messages == messages
    assert conversation.statistics.finish_reason is None
    if chunks == 1 and counting.name == "dense":
        # What was read before the stop need not be read again.
        read = len(conversation._cache.tokens)
        assert read > llmchat.PREFILL_STEP_TOKENS
    check(conversation, *SAMPLE[1:])


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_failing_engine_leaves_no_trace(when: str, counting: llmchat.Model) -> None:
    conversation = start(counting)
    counting.net.fail_after = counting.net.tokens + (1 if when == "prefill" else 45)
    with pytest.raises(ChatError, match=r"Out of memory.* smaller model"):
        hear(conversation.reply, "Count.")
    assert conversation.messages == []
    assert conversation._cache.tokens == []
    check(conversation, *SAMPLE[:2])
    messages = conversation.messages
    counting.net.fail_after = counting.net.tokens + 1
    with pytest.raises(ChatError):
        hear(conversation.retry)
    assert conversation.messages == messages
    check(conversation, *SAMPLE[2:])


def test_a_reply_that_nobody_hears_out_is_kept_as_far_as_it_was_heard(counting: llmchat.Model) -> None:
    conversation = start(counting)
    pieces = conversation.reply(SAMPLE[0].prompt)
    said = next(pieces).text + next(pieces).text
    pieces.close()
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert said in conversation.messages[-1]["content"]
    assert hear(conversation.retry)[1] == SAMPLE[0].answer


def test_the_engine_holds_exactly_the_tokens_that_are_said_to_be_held(counting: llmchat.Model) -> None:
    import mlx.core as mx

    conversation = start(counting)
    check(conversation, *SAMPLE[:2])
    hear(conversation.reply, "Count.", until="4,")
    hear(conversation.retry, until="7,")
    held, layers = list(conversation._cache.tokens), conversation._cache._layers
    fresh = PromptCache(counting.net)
    probe = mx.array([[held[0]]])
    counting.net(mx.array([held]), cache=fresh._layers)
    one, other = (counting.net(probe, cache=cache)[0, -1] for cache in (layers, fresh._layers))
    assert mx.abs(one - other).max().item() < 0.01 * mx.abs(other).max().item()


def test_a_repetition_penalty_sees_the_same_tokens_whatever_the_cache_held() -> None:
    import mlx.core as mx

    # The engine shows all tokens of its own call, or the last one and what follows.
    for shown in ([1, 2, 3], [3]):
        process = llmchat.repetition_penalty(2.0, [1, 2, 3])
        assert process(mx.array(shown), mx.ones((1, 6))).tolist() == [[1, 0.5, 0.5, 0.5, 1, 1]]
        assert process(mx.array([*shown, 5]), mx.ones((1, 6))).tolist() == [[1, 0.5, 0.5, 0.5, 1, 0.5]]


def test_a_reply_with_a_repetition_penalty_does_not_depend_on_the_cache(counting: llmchat.Model) -> None:
    conversation = start(counting, repetition_penalty=10.0, temperature=0.0, max_tokens=40)
    first = hear(conversation.reply, "Count.")
    assert hear(conversation.retry) == first
    conversation._cache.clear()
    assert hear(conversation.retry) == first


def test_thinking_is_only_switched_when_the_user_says_so(family_model: llmchat.Model) -> None:
    conversation = start(family_model)
    question = [{"role": "user", "content": "Hello"}]
    by_default = family_model.render(question)
    assert "</think>" not in by_default
    if family_model.name in ("thinking", "hybrid"):
        assert family_model.render(question, think=True) == by_default
        assert family_model.render(question, think=False) == by_default + "<think>\n\n</think>\n\n"
    assert conversation._render(question)[0] == by_default


@pytest.mark.parametrize("name", MARKERS)
def test_thoughts_are_found_by_other_markers(name: str, tmp_path: Path) -> None:
    build_model(tmp_path / name, MARKERS[name], [SAMPLE])
    model = llmchat.load_model(Settings(model=str(tmp_path / name)))
    conversation = start(dataclasses.replace(model, net=Counting(model.net)))
    check(conversation, *SAMPLE[:2])
    assert SAMPLE[0].thought in conversation.messages[1]["content"]
    assert SAMPLE[0].thought not in conversation._render(conversation.messages)[0]
    check(conversation, *SAMPLE[2:])


def test_a_thought_that_was_cut_is_closed_before_the_next_turn(family_model: llmchat.Model) -> None:
    conversation = start(family_model)
    hear(conversation.reply, SAMPLE[0].prompt, until="They s")
    text = conversation._render([*conversation.messages, {"role": "user", "content": "b"}])[0]
    if conversation._format is not llmchat.NO_THOUGHTS:
        assert conversation.messages[-1]["content"].endswith("They s")
        assert "They s" not in text


def test_what_is_left_of_a_conversation_is_right_when_its_first_turn_is_left_out(counting: llmchat.Model) -> None:
    hello, name, question = FAMILY_CONVERSATIONS[3]
    conversation = start(counting)
    check(conversation, hello, name)
    prompt = rendered(conversation, question.prompt)
    conversation._model.context_length = int(len(prompt) * 1.32)
    pieces = list(conversation.reply(question.prompt))
    assert pieces[0].text.startswith("The first turn no longer fits the model's")
    assert "".join(piece.text for piece in pieces if piece.kind == "answer").strip() == question.answer
    assert conversation.statistics.prompt_tokens < len(prompt) - 20
    assert len(conversation.messages) == 6


def test_the_oldest_turns_are_left_out_when_the_context_is_full(counting: llmchat.Model) -> None:
    conversation = start(dataclasses.replace(counting, context_length=160), max_tokens=32)
    notices = []
    for turn in SAMPLE * 2:
        pieces = list(conversation.reply(turn.prompt))
        assert conversation.statistics.prompt_tokens + 32 <= 160
        notices += [piece.text for piece in pieces if piece.kind == "notice"]
    assert notices[0].endswith("the model's 160 tokens: left out from here on.")
    assert len(notices) < 8
    assert len(conversation.messages) == 20
    with pytest.raises(ChatError, match="too long"):
        list(conversation.reply("word " * 200))
    assert len(conversation.messages) == 20


def test_a_failing_turn_does_not_end_the_chat(counting: llmchat.Model) -> None:
    conversation = start(counting)
    check(conversation, SAMPLE[0])
    counting.net.fail_after = counting.net.tokens + 1
    prompts = io.StringIO("Count.\nMy name is Ada.\n/nope\n/set top-k 2000\nWhat is my name?\n")
    stdout, stderr = io.StringIO(), io.StringIO()
    terminal = llmchat.Terminal(prompts, stdout, stderr)
    llmchat.Chat(conversation, terminal, conversation._settings, llmchat.Interrupts()).run()
    failure, nope, chosen = stderr.getvalue().splitlines()
    assert failure.startswith("llmchat: error: The engine failed, so what it was saying is not kept: [metal::malloc]")
    assert nope.startswith("llmchat: error: There is no command /nope;")
    assert chosen == "top-k = 2000"
    assert stdout.getvalue().endswith("prompt -> What is my name?\nIt is Ada.\n\nprompt -> \nGoodbye!\n")


# ---------------------------------------------------------------------------------------- Session

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! 👋🏽\n<think>"}]
BYE = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "\u0085\u2028 See you."}]


def reread(path: Path) -> list[dict[str, str]]:
    """What a session file holds for whoever opens it next."""
    session = llmchat.SessionFile(path)
    session.close()
    return session.messages


def test_a_session_file_holds_what_was_saved_last(tmp_path: Path) -> None:
    path = tmp_path / "session"
    session = llmchat.SessionFile(path)
    system = [{"role": "system", "content": "Be brief."}]
    for messages in (
        HELLO[:1],
        HELLO,
        [*HELLO, *BYE],
        HELLO,
        HELLO,
        [*system, *HELLO],
        [*system, *HELLO, *BYE],
        [],
        BYE,
    ):
        session.save(messages)
        assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == messages
    with pytest.raises(ChatError, match="in use by another chat"):
        llmchat.SessionFile(path)
    session.close()
    assert reread(path) == BYE
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_session_of_other_hands_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "session"
    theirs = '{"content":"Hello",  "role":"user", "at": 5}\n{"role": "assistant", "content": "Hi"}'
    path.write_text(theirs)
    session = llmchat.SessionFile(path)
    session.save([*session.messages, *BYE])
    assert path.read_text().startswith(theirs + "\n")
    assert session.messages[0]["at"] == 5
    session.close()
    assert reread(path)[2:] == BYE


def test_a_torn_last_line_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "session"
    whole = b"".join(map(llmchat.as_line, [*HELLO, *BYE]))
    third = len(whole) - len(llmchat.as_line(BYE[1]))
    for end in range(third + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        session = llmchat.SessionFile(path)
        assert session.messages == [*HELLO, BYE[0]]
        assert path.read_bytes() == whole[:third]
        assert "torn" in session.warning
        session.close()
    aside = tmp_path / "session.torn"
    assert aside.read_bytes().startswith(whole[third : third + 1] + b"\n" + whole[third : third + 2] + b"\n")
    assert aside.stat().st_mode & 0o777 == 0o600
    path.write_bytes(whole[:-1])
    assert reread(path) == [*HELLO, *BYE]


@pytest.mark.parametrize(
    "content",
    [
        *(b"hello", b"hello\n", b"{\n}\n", b"{}", b"[1]", b"\x00" * 9, b"\xff\xfe\n", b"[" * 99999, b"{\\rtf1 Dear}"),
        *(
            b'{"role": "tool", "content": "x"}\n',
            b'{"role": "user", "content": 5}\n',
            b'{"role": "user"}\n{',
            b'{"a": 1',
        ),
        llmchat.as_line(HELLO[1]),
        llmchat.as_line(HELLO[0]) * 2,
        llmchat.as_line(HELLO[0]) + b"\n" + llmchat.as_line(HELLO[1]),
    ],
)
def test_what_is_no_session_is_refused_untouched(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "session"
    path.write_bytes(content)
    with pytest.raises(ChatError, match="is no session of llmchat: line"):
        llmchat.SessionFile(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_session_that_can_not_be_a_file_is_one_sentence(environment: dict[str, str]) -> None:
    for name in ("/", "no/such/folder/file"):
        done = run(environment, "some/model", "--session", name)
        assert done.returncode == 1
        assert re.fullmatch(rf"llmchat: error: {name} can't be used as a session: .*\.\n", done.stderr.decode())


def save_until_killed(path: Path, acknowledge: int) -> None:
    """Talk into a session file, telling how many messages are saved; with now and then one taken back."""
    session = llmchat.SessionFile(path)
    for _ in range(10_000):
        count = len(session.messages)
        message = {"role": "assistant" if count % 2 else "user", "content": f"{count} " + "x" * 5000}
        session.save([*session.messages, message])
        os.write(acknowledge, len(session.messages).to_bytes(4, "big"))


def test_a_killed_chat_loses_no_message_that_was_saved(tmp_path: Path) -> None:
    chance = random.Random(1)
    for case in range(100):
        path = tmp_path / str(case)
        told, acknowledge = os.pipe()
        pid = os.fork()
        if pid == 0:
            save_until_killed(path, acknowledge)
        os.close(acknowledge)
        os.read(told, 4)
        time.sleep(chance.random() * 0.02)  # the random moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = 1
        while number := os.read(told, 4):
            acknowledged = int.from_bytes(number, "big")
        os.close(told)
        assert acknowledged <= len(reread(path)) <= acknowledged + 1


def test_a_chat_goes_on_where_it_was_left(demo: str, environment: dict[str, str]) -> None:
    session = Path(environment["HOME"], "chat.jsonl")
    arguments = [demo, "--session", str(session)]
    assert run(environment, *arguments, stdin="My name is Ada.\n").returncode == 0
    done = run(environment, *arguments, stdin="What is my name?\n/save copy.jsonl\n/save copy.jsonl\n/undo\n")
    assert "prompt -> What is my name?\nYour name is Ada.\n" in done.stdout.decode()
    going_on, saved, refused, undone = done.stderr.decode().splitlines()
    assert going_on == f"Going on with 1 turn of {session}."
    assert saved == "4 messages are in copy.jsonl."
    assert refused == "llmchat: error: copy.jsonl is there already, and was not replaced: name another file."
    assert undone == "The last turn is taken back."
    copy = Path(environment["HOME"], "copy.jsonl")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [message["content"] for message in reread(copy)][2:] == ["What is my name?", "Your name is Ada."]
    assert [message["content"] for message in reread(session)] == ["My name is Ada.", "Nice to meet you, Ada!"]
    assert run(environment, *arguments, "-p", "What is my name?").stdout == b"Your name is Ada.\n"
    assert len(reread(session)) == 4


def test_odd_names_and_odd_text_never_end_a_chat(demo: str, environment: dict[str, str]) -> None:
    home = Path(environment["HOME"])
    os.mkfifo(home / "fifo")
    (home / "real").mkdir()
    (home / "link").symlink_to(home / "real/session")
    prompts = (
        f"/save a\0b\n/save {'a' * 300}\n/save fifo\n/save no/folder/x\n/exit\n/system\tBe \ud800 brief.\n/quiet\n"
    )
    done = subprocess.run(
        [*PROGRAM, demo, "--session", "link", "--max-tokens", "1"],
        input=prompts.encode(errors="surrogatepass") + b"Say hello.\n/continue\n",
        env=environment,
        cwd=home,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    told = [line.removeprefix("llmchat: error: ") for line in done.stderr.decode().splitlines()]
    assert "embedded null" in told[0] and told[0].endswith("Name another file.")
    assert "File name too long" in told[1]
    assert told[2] == "fifo is there already, and was not replaced: name another file."
    assert "No such file or directory" in told[3]
    assert told[4] == "Type exit, without the slash, to leave."
    assert told[5].startswith("system = Be ")
    assert told[6].startswith("There is no command /quiet")
    assert told[7:] == ["Cut at 1 tokens; /continue goes on."] * 2
    assert done.stdout.decode().endswith("\nGoodbye!\n")
    assert (home / "link").is_symlink()
    assert [message["role"] for message in reread(home / "real/session")] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", ["fifo", "/dev/null", "/"])
def test_a_session_must_be_a_regular_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    mode = Path("/dev/null").stat().st_mode
    with pytest.raises(ChatError, match="can't be used as a session"):
        llmchat.SessionFile(tmp_path / name)
    assert Path("/dev/null").stat().st_mode == mode


def test_one_shots_with_nothing_to_say_or_no_place_to_be(demo: str, environment: dict[str, str]) -> None:
    nothing = "llmchat: error: There is nothing to reply to: give -p a text, or pipe one in.\n"
    for prompt in ("", "-"):
        done = run(environment, demo, "-p", prompt)
        assert (done.returncode, done.stderr.decode()) == (1, nothing)
    session = Path(environment["HOME"], "chat.jsonl")
    session.write_bytes(llmchat.as_line({"role": "user", "content": "Lost?"}))
    done = run(environment, demo, "--session", str(session), "-p", "Say hello.")
    assert done.stderr.decode() == f"The last prompt in {session} got no reply, and is left out: Lost?\n"
    assert done.stdout.decode() == DEMO[-1][0].answer + "\n"
    done = run(environment, demo, "--session", str(session), "-p", "word " * 5000)
    assert done.returncode == 1 and "too long" in done.stderr.decode()
    assert len(reread(session)) == 2
    gone = Path(environment["HOME"], "gone")
    gone.mkdir()
    command = f"cd '{gone}' && rmdir '{gone}' && '{PROGRAM[0]}' '{PROGRAM[1]}' '{demo}' -p x"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, timeout=60, check=False)
    assert b"The folder you are in is gone" in done.stderr.splitlines()[-1]
    os.mkfifo(Path(environment["HOME"], ".llmchat_config"))
    assert run(environment, demo, "-p", "x").returncode == 2


def test_what_is_asked_back_can_be_left_and_a_slash_comes_back_as_it_was_typed(
    demo: str, environment: dict[str, str]
) -> None:
    Path(environment["HOME"], "there").touch()
    Path(environment["HOME"], ".llmchat_history").write_bytes(b"a\0b\n")
    with Screen(environment, demo) as screen:
        screen.expect("prompt -> ")
        assert screen.ask("My name is Ada.") == "Nice to meet you, Ada!"
        screen.send("/save there\r")
        screen.expect(r"Replace there\? \[y/N\] ")
        screen.send(CTRL_D)
        screen.expect("was not replaced")
        screen.expect("prompt -> ")
        screen.send("//clear\r")
        screen.expect("\nprompt -> ")
        screen.send("/undo\r")
        screen.expect("taken back[^/]*prompt -> //clear")
        screen.send("\x15" + "xy, " * 3000 + "\r")
        screen.expect("too long.*\n\nprompt -> xy, xy")
        screen.send("\x15")
        assert screen.ask("What is my name?") == "Your name is Ada."


def test_history_comes_back_when_it_is_switched_on_again(counting: llmchat.Model) -> None:
    conversation = start(counting)
    check(conversation, *FAMILY_CONVERSATIONS[3][:2])
    conversation._settings.history = False
    check(conversation, *FAMILY_CONVERSATIONS[5])
    assert hear(conversation.retry)[1] == FAMILY_CONVERSATIONS[5][0].answer
    conversation.undo()
    conversation._settings.history = True
    check(conversation, FAMILY_CONVERSATIONS[3][2])


def test_turns_that_fit_again_after_an_undo_are_sent_again(counting: llmchat.Model) -> None:
    conversation = start(counting)
    check(conversation, *FAMILY_CONVERSATIONS[3][:2])
    conversation._model.context_length = int(len(rendered(conversation, "b" * 30)) * 1.32)
    assert "notice" in [piece.kind for piece in conversation.reply("b" * 30)]
    conversation.undo()
    conversation._model.context_length = 4096
    check(conversation, FAMILY_CONVERSATIONS[3][2])


def test_a_prompt_whose_reply_was_lost_waits_in_the_line(demo: str, environment: dict[str, str]) -> None:
    session = Path(environment["HOME"], "chat.jsonl")
    with Screen(environment, demo, "--session", str(session)) as screen:
        screen.expect("prompt -> ")
        screen.send("Count.\r")
        screen.expect(" 10,")
        os.kill(screen.pid, signal.SIGKILL)
    assert reread(session) == [{"role": "user", "content": "Count."}]
    with Screen(environment, demo, "--session", str(session)) as screen:
        screen.expect("prompt -> Count.")
        screen.send("\r")
        screen.expect(" 100\n")
        screen.expect("prompt -> ")
        screen.send(CTRL_D)
        assert screen.leave() == 0
    assert [message["content"] for message in reread(session)] == ["Count.", NUMBERS]


# ------------------------------------------------------------------------------------- Benchmarks

RUNS = 5
DECODE_TOKENS = 128
MEMORY_TOKENS = 16
PAUSE_S = 0.5

THINGS = ("tea", "rain", "bread", "music", "chess", "rivers", "snow", "paper", "wood", "stars")
TALK = [Turn(f"Tell me about {thing}.", f"About {thing}: it is old and good.", "Hm.") for thing in THINGS]
LARGE = {
    **{"intermediate_size": 5632, "num_hidden_layers": 24},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64},
}

# The installed program, since its peer is installed too.
INSTALLED = [sys.executable, "-m", "llmchat"]

# Children that run a whole chat and say last, on standard error, how much memory MLX held at most.
PEAK = "import mlx.core as mx, sys; main(*arguments); print(mx.get_peak_memory(), file=sys.stderr)"
OUR_CHAT = f"import sys; from llmchat import main; arguments = [sys.argv[1:]]; {PEAK}"
THEIR_CHAT = f"from mlx_lm.chat import main; arguments = []; {PEAK}"


class Figure(NamedTuple):
    """One row of the table: what was measured, beside its peer or its floor."""

    name: str
    ours: float
    peer: float
    unit: str
    target: str
    met: bool


def at_most(limit: float, name: str, ours: float, peer: float, unit: str) -> Figure:
    """A figure that must not exceed `limit` times its peer."""
    return Figure(name, ours, peer, unit, f"at most {limit:.3g}", ours <= limit * peer)


def at_least(limit: float, name: str, ours: float, peer: float, unit: str) -> Figure:
    """A figure that must reach `limit` times its peer."""
    return Figure(name, ours, peer, unit, f"at least {limit:.3g}", ours >= limit * peer)


def print_table(figures: list[Figure]) -> None:
    """Print the figures as one aligned table; a ratio is llmchat's figure over its peer's."""
    rows = [("figure", "llmchat", "peer or floor", "ratio", "target", "met")]
    for figure in figures:
        ours, peer = (f"{value:.3g} {figure.unit}" for value in (figure.ours, figure.peer))
        rows.append(
            (figure.name, ours, peer, f"{figure.ours / figure.peer:.3f}", figure.target, "yes" if figure.met else "no")
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, ours, peer, ratio, target, met in rows:
        print(
            f"{name:{widths[0]}}  {ours:>{widths[1]}}  {peer:>{widths[2]}}"
            f"  {ratio:>{widths[3]}}  {target:{widths[4]}}  {met}"
        )


def medians(*measures: Callable[[], float]) -> list[float]:
    """The median of each measure; they take turns, after a first round that only warms up."""
    rounds = [[measure() for measure in measures] for _ in range(RUNS + 1)][1:]
    return [median(column) for column in zip(*rounds)]


def bench_environment(cache: Path) -> dict[str, str]:
    """The machine as it is, but with an empty home, and compiled modules kept in the cache folder."""
    (cache / "home").mkdir(parents=True, exist_ok=True)
    slowing = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
    kept = {key: value for key, value in os.environ.items() if key not in slowing}
    mine = {"HOME": str(cache / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(cache / "pycache")}
    return {**kept, **mine}


def build_large(folder: Path) -> Path:
    """A llama of 1.06 G random weights in 4 bits, 600 MB, written once; it is loaded, but asked nothing."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    if (folder / "model.safetensors").exists():
        return folder
    family = FAMILIES["dense"]
    tokenizer = make_tokenizer([turn.prompt + turn.answer for turn in TALK], family)
    network, config = make_network(family, len(tokenizer), 2048, **LARGE)
    network.set_dtype(mx.bfloat16)
    nn.quantize(network, group_size=64, bits=4)
    config.update(eos_token_id=tokenizer.eos_token_id, quantization={"group_size": 64, "bits": 4})
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(network.parameters())))
    return folder


def build_talking(folder: Path, name: str) -> Path:
    """A small model of a family that has memorised the talk of ten turns, the dense one also to count; written once."""
    if not (folder / "model.safetensors").exists():
        count = [turns(("Count.", NUMBERS))] if name == "dense" else []
        build_model(folder, FAMILIES[name], [TALK, *count], hidden=640)
    return folder


# Whole processes


def seconds_to_exit(command: list[str], environment: dict[str, str]) -> float:
    """How long a whole process takes."""
    started = time.perf_counter()
    subprocess.run(command, env=environment, cwd=environment["HOME"], capture_output=True, check=True)
    return time.perf_counter() - started


def seconds_to_prompt(command: list[str], environment: dict[str, str]) -> float:
    """How long a process takes to ask for the first prompt, on a pipe."""
    seen = b""
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=environment["HOME"],
    ) as process:
        # llmchat's prompt, mlx-lm's as of 0.32 (a bracket), and as it was before.
        while not re.search("prompt -> |\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}|>> ".encode(), seen):
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            assert chunk, f"{command} ended without a prompt:\n{seen.decode()}"
            seen += chunk
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def evict(file: Path) -> None:
    """Take a file out of the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_evict(file: Path) -> bool:
    """Whether `evict` makes a file slower to read."""
    if not hasattr(os, "posix_fadvise"):
        return False

    def seconds_to_read(prepare: Callable[[Path], object]) -> float:
        prepare(file)
        started = time.perf_counter()
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 22):
                pass
        return time.perf_counter() - started

    return seconds_to_read(evict) > 1.5 * seconds_to_read(Path.stat)


def bench_starts(cache: Path) -> list[Figure]:
    """From the command to help, and to the first prompt."""
    environment = bench_environment(cache)
    model = build_large(cache / "large")
    weights = model / "model.safetensors"
    engine = [sys.executable, "-m", "mlx_lm", "chat"]
    bare = [sys.executable, "-c", f"from mlx_lm import load; load({str(model)!r}); print('prompt -> ', flush=True)"]
    commands = [[*INSTALLED, str(model)], [*engine, "--model", str(model)], bare]

    def start(command: list[str], cold: bool = False) -> float:
        if cold:
            evict(weights)
        return seconds_to_prompt(command, environment)

    ours, chat = medians(*(lambda c=c: seconds_to_exit([*c, "--help"], environment) for c in (INSTALLED, engine)))
    figures = [at_most(1 / 15, "--help, peer mlx_lm.chat", ours, chat, "s")]
    ours, chat, load = medians(*(lambda c=c: start(c) for c in commands))
    figures.append(at_most(1.0, "start to prompt, peer mlx_lm.chat", ours, chat, "s"))
    figures.append(at_most(1.05, "start to prompt, floor mlx_lm.load", ours, load, "s"))
    if can_evict(weights):
        ours, chat = medians(*(lambda c=c: start(c, cold=True) for c in commands[:2]))
        figures.append(at_most(0.85, "start, weights not in memory, peer mlx_lm.chat", ours, chat, "s"))
    else:
        print("Weights could not be taken out of memory here: the start from disk is left out.")
    return figures


def peak_memory_mb(code: str, arguments: list[str], leave_word: str, environment: dict[str, str]) -> float:
    """The most memory, in MB, that MLX holds in a chat of three turns."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input="\n".join([*(turn.prompt for turn in TALK[:3]), leave_word, ""]).encode(),
        capture_output=True,
        env=environment,
        cwd=HERE,
        check=True,
    )
    return int(done.stderr.split()[-1]) / 1e6


def bench_memory(cache: Path) -> Figure:
    """Peak memory of a chat."""
    environment = bench_environment(cache)
    model = str(build_talking(cache / "dense", "dense"))
    length = ["--max-tokens", str(MEMORY_TOKENS)]
    sampling = ["--temp", str(llmchat.TEMPERATURE), "--top-p", str(llmchat.TOP_P)]
    ours, chat = medians(
        lambda: peak_memory_mb(OUR_CHAT, [model, *length], "quit", environment),
        lambda: peak_memory_mb(THEIR_CHAT, ["--model", model, *length, *sampling], "q", environment),
    )
    return at_most(1.03, "peak memory, 3 turns, peer mlx_lm.chat", ours, chat, "MB")


# Turns


def least_tokens(tokenizer, family: Family) -> list[int]:
    """For each turn of the talk, the tokens of its prompt that stand in no prompt or reply before it.

    Made from the template and the words alone. Where the template drops a thought, the answer after it counts.
    """
    least, known, messages = [], [], []
    for turn in TALK:
        messages.append({"role": "user", "content": turn.prompt})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        least.append(len(prompt) - llmchat.common_prefix(prompt, known))
        said = family.reply.format(thought=turn.thought, answer=turn.answer) + family.end
        known = prompt + tokenizer.encode(said, add_special_tokens=False)
        messages.append({"role": "assistant", "content": turn.answer})
    return least


def talk(conversation: Conversation) -> Iterator[llmchat.Statistics]:
    """Have the talk of ten turns; yield each turn's statistics."""
    for turn in TALK:
        pieces = [*conversation.reply(turn.prompt)]
        answer = "".join(piece.text for piece in pieces if piece.kind == "answer").strip()
        assert answer == turn.answer, f"the model said {answer!r}, so its state is wrong"
        yield conversation.statistics


def bench_tokens(cache: Path, name: str) -> Figure:
    """Tokens put through the model before a reply, at the worst of the turns 2 to 10."""
    model = llmchat.load_model(Settings(model=str(build_talking(cache / name, name))))
    least = least_tokens(model.tokenizer._tokenizer, FAMILIES[name])
    model.net = counter = Counting(model.net)
    put, before = [], 0
    for statistics in talk(Conversation(model, Settings())):
        # The engine runs one token ahead: each token of the reply has been put through when it is heard.
        put.append(counter.tokens - before - statistics.generation_tokens)
        before = counter.tokens
    ours, floor = max(zip(put[1:], least[1:]), key=lambda pair: pair[0] - pair[1])
    return Figure(f"tokens put through a turn, {name}", ours, floor, "tokens", "at most 8 more", ours <= floor + 8)


def bench_first_token(model: llmchat.Model) -> Figure:
    """Time to first token late in a talk, against early in it."""
    rounds = [[turn.time_to_first_token_s for turn in talk(Conversation(model, Settings()))] for _ in range(RUNS + 1)]
    # The first round warms up.
    early, late = (1e3 * median(times[turn - 1] for times in rounds[1:]) for turn in (2, len(TALK)))
    return at_most(1.3, "time to first token, turn 10, peer turn 2", late, early, "ms")


def our_decode_tps(model: llmchat.Model) -> float:
    """Tokens/s of a reply, all that llmchat does included, from the first token on."""
    conversation = Conversation(model, Settings(max_tokens=DECODE_TOKENS))
    started = time.perf_counter()
    assert "12, 13, 14" in "".join(piece.text for piece in conversation.reply("Count."))
    seconds = time.perf_counter() - started - conversation.statistics.time_to_first_token_s
    assert conversation.statistics.generation_tokens == DECODE_TOKENS
    return (DECODE_TOKENS - 1) / seconds


def bare_decode_tps(model: llmchat.Model) -> float:
    """Tokens/s of the same reply from mlx-lm alone, from the first token on."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    prompt = model.encode(model.render([{"role": "user", "content": "Count."}]))
    sampler = make_sampler(temp=llmchat.TEMPERATURE, top_p=llmchat.TOP_P)
    responses = stream_generate(model.net, model.tokenizer, prompt, max_tokens=DECODE_TOKENS, sampler=sampler)
    next(responses)
    started = time.perf_counter()
    for _ in range(DECODE_TOKENS - 1):
        next(responses)
    return (DECODE_TOKENS - 1) / (time.perf_counter() - started)


def launched_decode_tps(program: list[str], clear: str, leave: str, cache: Path) -> float:
    """The tokens/s that a chat on two hosts, both of them here, says of its replies; the first only warms up.

    Prompts come one by one, each some time after the last reply, as from a person.
    """
    rate = rf"{DECODE_TOKENS} tokens(?:,| ·) ([\d.]+) tok"
    output = ""
    with subprocess.Popen(
        [*launch(2), *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=bench_environment(cache),
    ) as process:
        for replies in range(1, RUNS + 2):
            process.stdin.write(f"{clear}\nCount.\n".encode())
            process.stdin.flush()
            while len(re.findall(rate, output)) < replies:
                data = os.read(process.stdout.fileno(), 1 << 16)
                assert data, output
                output += data.decode(errors="replace")
            time.sleep(PAUSE_S)
        process.communicate(f"{leave}\n".encode())
    return median(map(float, re.findall(rate, output)[1:]))


def bench_launched(cache: Path) -> Figure:
    """Decoding on two hosts, beside mlx-lm's own chat under the same launcher."""
    model, tokens = str(build_talking(cache / "dense", "dense")), str(DECODE_TOKENS)
    sampler = ["--top-p", str(llmchat.TOP_P), "--max-tokens", tokens]
    ours = [*INSTALLED[1:], model, "--stats", *sampler, "--temperature", str(llmchat.TEMPERATURE)]
    theirs = ["-m", "mlx_lm", "chat", "--model", model, *sampler, "--temp", str(llmchat.TEMPERATURE)]
    our_tps, their_tps = medians(
        lambda: launched_decode_tps(ours, "/clear", "quit", cache), lambda: launched_decode_tps(theirs, "r", "q", cache)
    )
    # mlx-lm counts the first token too, but not its time.
    their_tps *= (DECODE_TOKENS - 1) / DECODE_TOKENS
    return at_least(0.98, "decode on two hosts, peer mlx_lm.chat", our_tps, their_tps, "tokens/s")


def bench(cache: str) -> None:
    """Print llmchat's figures beside those of mlx-lm, all from this run. Only the cache folder is written to."""
    # A folder for each engine: an older one can not read the tokenizers that a newer one writes.
    folder = Path(cache).resolve() / f"mlx-lm-{version('mlx-lm')}"
    figures = bench_starts(folder)
    figures += [bench_tokens(folder, name) for name in FAMILIES]
    model = llmchat.load_model(Settings(model=str(folder / "dense")))
    figures.append(bench_first_token(model))
    ours, bare = medians(lambda: our_decode_tps(model), lambda: bare_decode_tps(model))
    figures.append(at_least(0.98, "decode, floor mlx_lm.stream_generate", ours, bare, "tokens/s"))
    figures.append(bench_memory(folder))
    if CAN_SHARE:
        figures.append(bench_launched(folder))
    print_table(figures)
    print(f"Medians of {RUNS}; Python {platform.python_version()}, mlx-lm {version('mlx-lm')}, {platform.platform()}")


# ------------------------------------------------------------------------------------ Line editor

# Reads prompts as the program does, with nothing behind it. After `wait` it is busy until told to go on.
EDITOR = """
import os, signal, sys, time
from pathlib import Path
folder, marked, *draft = sys.argv[1:]
sys.path.insert(0, folder)
import llmchat
signal.signal(signal.SIGTERM, llmchat.Leave())
history = Path(os.environ["HOME"], ".llmchat_history")
marked_pastes = {"asked": None, "marked": True, "burst": False}[marked]
terminal = llmchat.Terminal(sys.stdin, sys.stdout, sys.stderr, history, marked_pastes)
terminal.open_line_editor(llmchat.completions)
try:
    while True:
        try:
            prompt = terminal.read_prompt(*draft)
        except KeyboardInterrupt:
            terminal.note("dropped" if terminal.typed() else "empty")
            continue
        except EOFError:
            break
        draft = []
        terminal.remember(prompt)
        terminal.note(f"got {len(prompt)} {prompt[:50]!r}")
        if prompt == "wait":
            while not Path("go").exists():
                time.sleep(0.01)
            Path("go").unlink()
finally:
    terminal.close()
"""


def edit(environment: dict[str, str], pastes: str = "asked", draft: str = "") -> Screen:
    """The line editor on a terminal, at its first prompt."""
    screen = Screen(environment, str(HERE), pastes, draft, program=[sys.executable, "-c", EDITOR])
    screen.expect("prompt -> ")
    return screen


def got(screen: Screen, keys: str) -> str:
    """Type; return the prompt that arrives, with its length."""
    screen.send(keys)
    text = screen.expect(r"\ngot (\d+ .*)\n")
    screen.expect("prompt -> ")
    return text.rpartition("\ngot ")[2].strip()


UP = "\x1b[A"
BLOCK = "def f():\r\treturn 1\r\r  What is it?"
BLOCK_GOT = f"{len(BLOCK)} 'def f():\\n\\treturn 1\\n\\n  What is it?'"


@pytest.mark.parametrize("pastes", ["marked", "burst"])
def test_a_pasted_block_is_one_prompt_and_comes_back_whole(pastes: str, environment: dict[str, str]) -> None:
    paste = f"\x1b[200~{BLOCK}\x1b[201~" if pastes == "marked" else BLOCK
    with edit(environment, pastes) as screen:
        screen.send(paste)
        screen.expect(r"What is it\?")
        assert got(screen, "\r") == BLOCK_GOT
        assert got(screen, UP + "\r") == BLOCK_GOT
        screen.send(CTRL_D)
        assert screen.leave() == 0
        # The terminal marks pastes only for the line editor.
        switches = re.findall(r"\x1b\[\?2004([hl])", screen.output)
        assert switches == (["h", "l"] * 3 if pastes == "marked" else [])
    with edit(environment, pastes) as screen:
        assert got(screen, UP + "\r") == BLOCK_GOT
    assert Path(environment["HOME"], ".llmchat_history").read_text() == "def f():\\n\treturn 1\\n\\n  What is it?\n"


@pytest.mark.parametrize("pastes", ["marked", "burst"])
def test_what_is_typed_ahead_stays_unseen_separate_and_whole(pastes: str, environment: dict[str, str]) -> None:
    with edit(environment, pastes) as screen:
        screen.send("wait\r")
        screen.expect("got 4 'wait'\n")
        screen.send("first\rwait\r")
        Path(environment["HOME"], "go").touch()
        assert screen.expect("got 5 'first'\n") == "\nprompt -> first\ngot 5 'first'\n"
        screen.expect("got 4 'wait'\n")
        # Longer than a line of a terminal that waits for whole lines.
        screen.send("x" * 6000)
        Path(environment["HOME"], "go").touch()
        assert got(screen, "\r").startswith("6000 ")


@pytest.mark.parametrize("pastes", ["marked", "burst"])
@pytest.mark.parametrize("length", [1025, 4097, 20000])
def test_a_long_line_arrives_whole(length: int, pastes: str, environment: dict[str, str]) -> None:
    with edit(environment, pastes) as screen:
        assert got(screen, "x" * length + "\r").startswith(f"{length} ")


def test_the_way_of_pasting_is_what_the_line_editor_knows(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        gnu = subprocess.run(
            [sys.executable, "-c", "import readline; print(readline.__doc__)"], capture_output=True, check=True
        )
        assert ("\x1b[?2004h" in screen.output) == (b"GNU" in gnu.stdout)


def test_three_quotes_hold_several_lines(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        screen.send('"""\r')
        screen.expect(r"\.\.\. ")
        screen.send('  one\rsay """ two\r')
        screen.expect(r"two\n\.\.\. ")
        assert got(screen, '"""\r') == r"""17 '  one\nsay \"\"\" two'""".replace('\\"', '"')
        assert got(screen, '"""in one line"""\r') == "11 'in one line'"
        screen.send('"""first\r')
        screen.expect(r"\.\.\. ")
        screen.send(CTRL_C)
        screen.expect("dropped\n\nprompt -> ")
        assert got(screen, "next\r") == "4 'next'"


def test_a_pasted_block_may_start_with_three_quotes(environment: dict[str, str]) -> None:
    with edit(environment, "marked") as screen:
        assert got(screen, '\x1b[200~"""Doc."""\rx = 1\x1b[201~\r') == '16 \'"""Doc."""\\nx = 1\''
        assert got(screen, '\x1b[200~"""one\rtwo"""\x1b[201~\r') == "7 'one\\ntwo'"


def test_ctrl_c_tells_a_dropped_line_from_an_empty_one(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        for keys, said in (("abc", "dropped"), ("", "empty"), ("abc", "dropped"), ("abc\x15", "empty")):
            screen.send(keys)
            screen.expect(re.escape(keys.strip("\x15")))
            screen.send(CTRL_C)
            assert screen.expect(r"prompt -> ").endswith(f"\n{said}\n\nprompt -> ")


def test_a_draft_stands_in_the_line(environment: dict[str, str]) -> None:
    with edit(environment, draft="What is\nit") as screen:
        assert got(screen, "?\r") == r"11 'What is\nit?'"
        assert got(screen, "next\r") == "4 'next'"


def test_earlier_prompts_are_searched(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        for prompt in ("Say hello.", "Count."):
            got(screen, prompt + "\r")
        assert got(screen, "\x12hell\r") == "10 'Say hello.'"


def test_tab_completes_commands_settings_and_files(environment: dict[str, str]) -> None:
    Path(environment["HOME"], "my notes.jsonl").touch()
    with edit(environment) as screen:
        assert got(screen, "/se\ttemp\t0\r") == "18 '/set temperature 0'"
        assert got(screen, "/save my no\t\r") == "20 '/save my notes.jsonl'"
        assert got(screen, "a\tb\r") == r"3 'a\tb'"


def test_completions_are_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.txt", ".hidden", "wicked\x1b[2J"):
        (tmp_path / name).touch()
    (tmp_path / "folder" / "own").mkdir(parents=True)
    complete = llmchat.completions
    assert "/set " in complete("/s")
    assert complete("/he") == ["/help"]
    assert complete("/sy") == ["/system "]
    assert complete("/set top-") == ["/set top-p ", "/set top-k "]
    assert complete("/set top-k 1") == complete("/help me") == complete("/set model") == []
    assert complete("/save ") == ["/save folder/", "/save one.txt"]
    assert complete("/save .") == ["/save .hidden"]
    assert complete("/save folder/") == ["/save folder/own/"]
    assert complete(f"/save {tmp_path}/o") == [f"/save {tmp_path}/one.txt"]
    assert complete("/save nowhere/") == []


@pytest.mark.parametrize(
    ("change", "coloured"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_the_prompt_is_coloured_only_where_colour_is_wanted(
    change: dict[str, str], coloured: bool, environment: dict[str, str]
) -> None:
    with edit({**environment, **change}) as screen:
        got(screen, "hello\r")
        screen.send(CTRL_D)
        assert screen.leave() == 0
        assert ("\x1b[32mprompt ->\x1b[0m " in screen.output) is coloured
        ours = re.sub(r"\x1b\[\?2004[hl]", "", screen.output)
        assert ("\x1b" in ours) is coloured
        if "TERM" in change:
            assert ours == screen.output


def test_the_colour_does_not_count_as_width(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        # The prompt's 10 columns and these fill two rows of 80 but for 5; the colour's 9 would begin a third.
        screen.send("x" * 145)
        screen.expect("x{145}")
        assert got(screen, "\x01\r").startswith("145 ")
        assert screen.output.count("\x1b[A") == 1


def test_bytes_that_are_no_text_do_not_end_the_chat(environment: dict[str, str]) -> None:
    with edit(environment) as screen:
        got(screen, "a\udcffb\r")
        assert got(screen, "next\r") == "4 'next'"


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("status", [0, 143])
def test_the_terminal_is_left_as_it_was_found(status: int, busy: bool, environment: dict[str, str]) -> None:
    fresh, other = pty.openpty()
    found = termios.tcgetattr(fresh)
    os.close(fresh)
    os.close(other)
    with edit(environment) as screen:
        screen.send("wait\r" if busy else "typed")
        screen.expect("got 4 'wait'\n" if busy else "typed")
        assert termios.tcgetattr(screen.fd) != found
        if status:
            screen.send("")
            os.kill(screen.pid, signal.SIGTERM)
        else:
            Path(environment["HOME"], "go").touch()
            screen.send("\x15" + CTRL_D)
        assert screen.leave(found) == status
        assert plain(screen.output).endswith("\n")


PIECES = """
import sys
sys.path.insert(0, sys.argv[1])
import llmchat
terminal = llmchat.Terminal(sys.stdin, sys.stdout, sys.stderr)
terminal.hide_thoughts = sys.argv[2] == "hide"
for piece in sys.argv[3:]:
    kind, _, text = piece.partition(":")
    if kind == "end":
        terminal.end_reply()
    else:
        terminal.show(llmchat.Piece(kind, text))
"""


def shown(environment: dict[str, str], *pieces: str) -> str:
    """What a terminal gets for pieces of a reply."""
    program = [sys.executable, "-c", PIECES, str(HERE)]
    with Screen({**environment, "TERM": "dumb"}, *pieces, program=program) as screen:
        assert screen.leave() == 0
        return screen.output


def test_thoughts_and_answers_are_a_blank_line_apart(environment: dict[str, str]) -> None:
    pieces = ["thought:\n", "thought:Well", "thought:.\n", "answer:\n\n", "answer:Yes.\n", "answer:\nNo.\n", "end"]
    assert shown(environment, "show", *pieces) == "Well.\n\nYes.\n\nNo.\n"
    assert shown(environment, "show", "thought:\n\n", "answer:\n\nYes.", "end") == "Yes.\n"
    assert shown(environment, "show", "answer:Yes.", "thought:Well", "end") == "Yes.\n\nWell\n"


def test_a_hidden_thought_is_counted_and_folded(environment: dict[str, str]) -> None:
    counted = "\rthinking: 0 s\r" + " " * 13 + "\rthought for 0.0 s\n"
    thought = ["thought:\n", "thought:Well", "thought:."]
    assert shown(environment, "hide", *thought, "answer:\nYes.", "end") == counted + "\nYes.\n"
    # Ctrl+C in a thought, and a thought after an answer.
    assert shown(environment, "hide", *thought, "end") == counted
    assert shown(environment, "hide", "answer:Yes.", *thought, "end") == "Yes.\n\n" + counted
    assert shown(environment, "hide", "thought:\n\n", "answer:\nYes.", "end") == "Yes.\n"


def test_the_history_is_bounded_and_rewritten_only_when_it_has_doubled(tmp_path: Path) -> None:
    path, link = tmp_path / "history", tmp_path / "link"
    link.symlink_to(path)
    bound = llmchat.HISTORY_ENTRIES
    for count, left in ((2 * bound, 2 * bound), (2 * bound + 1, bound)):
        path.write_text("".join(f"{n}\n" for n in range(count)))
        assert llmchat.PromptHistory(link).load() == [str(n) for n in range(count - bound, count)]
        assert path.read_text().count("\n") == left
    assert path.stat().st_mode & 0o777 == 0o600
    assert link.is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["history", "link"]


def test_a_huge_history_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "history"
    with path.open("wb") as file:
        file.truncate(100_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\n\xff\xfe last\n")
    assert llmchat.PromptHistory(path).load() == ["last but one", "\ufffd\ufffd last"]
    assert path.read_bytes() == b"last but one\n\xff\xfe last\n"
    # What would push everything else out is not written down.
    assert llmchat.PromptHistory(path).add("x" * llmchat.HISTORY_BYTES)
    assert path.stat().st_size < 100


@pytest.mark.parametrize("case", ["directory", "read-only", "nowhere", "unreadable", "pipe"])
def test_a_history_that_can_not_be_used_is_a_warning(case: str, environment: dict[str, str], tmp_path: Path) -> None:
    path = Path(environment["HOME"], ".llmchat_history")
    if case == "directory":
        path.mkdir()
    elif case == "pipe":
        os.mkfifo(path)
    elif case == "unreadable":
        path.touch(0)
        if os.access(path, os.R_OK):
            pytest.skip("nothing is unreadable for root")
    elif case == "read-only":
        # Where not even root may write.
        environment["HOME"] = "/proc"
        if not Path("/proc/self").exists():
            pytest.skip("there is no /proc here")
    else:
        path.symlink_to(tmp_path / "no" / "where")
    with edit(environment) as screen:
        assert got(screen, "one\r") == "3 'one'"
        assert got(screen, "two\r") == "3 'two'"
        assert got(screen, UP + UP + "\r") == "3 'one'"
        assert screen.output.count("Prompts are not kept for another day") == 1


# --------------------------------------------------------------------------------------- Loading


class Hub:
    """A hub on 127.0.0.1 as far as the client needs one, which counts requests and fails when it is told to."""

    COMMIT = "c0ffee" + "0" * 34

    def __init__(self) -> None:
        # Of each repository: its files by name, or the size of one that is only claimed to be there.
        self.repositories: dict[str, dict[str, bytes | int]] = {}
        # By repository, or by repository and file: a status and error code to answer, or "cut" or "stall".
        self.faults: dict[str, tuple[int, str] | str] = {}
        self.requests: list[str] = []
        self.stalled = threading.Event()
        self._resume = threading.Event()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._resume.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, folder: str | Path, **claimed: int) -> None:
        """Publish a model folder; `claimed` are sizes of files by stem that are not what they are."""
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        sizes = {path.name: claimed[path.stem] for path in Path(folder).iterdir() if path.stem in claimed}
        self.repositories[name] = {**files, **sizes}

    def fetched(self, pattern: str = r"GET .*\.safetensors") -> list[str]:
        """The names of the files that were asked for since the last time."""
        names = [request.rpartition("/")[2] for request in self.requests if re.match(pattern, request)]
        self.requests.clear()
        return names

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.requests.append(f"{handler.command} {path}")
        match = re.fullmatch(r"/api/models/(?P<name>.+?)(/revision/(?P<revision>.+))?", path) or re.fullmatch(
            r"/(?P<name>.+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path
        )
        found = match.groupdict() if match else {}
        name, revision, file = (found.get(key) for key in ("name", "revision", "file"))
        fault = self.faults.get(f"{name}/{file}" if file else name)
        if fault == "stall":
            self.stalled.set()
            self._resume.wait(60)
            handler.close_connection = True
        elif isinstance(fault, tuple):
            self._send(handler, *fault)
        elif name not in self.repositories:
            self._send(handler, 404, "RepoNotFound")
        elif revision not in (None, "main", "dev", self.COMMIT):
            self._send(handler, 404, "RevisionNotFound")
        elif file is None:
            self._send(handler, 200, body=json.dumps(self._about(name)).encode())
        elif file not in self.repositories[name]:
            self._send(handler, 404, "EntryNotFound")
        else:
            self._send(handler, 200, body=self.repositories[name][file], cut=fault == "cut")

    def _about(self, name: str) -> dict[str, object]:
        files = self.repositories[name].items()
        sizes = {file: body if isinstance(body, int) else len(body) for file, body in files}
        siblings = [{"rfilename": file, "size": size, "blobId": file} for file, size in sizes.items()]
        return {"id": name, "modelId": name, "sha": self.COMMIT, "siblings": siblings, "tags": [], "private": False}

    def _send(self, handler, status: int, code: str = "", body: bytes = b"", cut: bool = False) -> None:
        start = int(re.sub(r"\D", "", handler.headers.get("Range", "")) or 0)
        handler.send_response(206 if start else status)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if code:
            handler.send_header("X-Error-Code", code)
        handler.send_header("X-Repo-Commit", self.COMMIT)
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        if handler.command == "GET":
            # A cut connection comes with half of the file, then with nothing.
            handler.wfile.write(body[start : (len(body) // 2 if cut else None)])
            handler.close_connection = handler.close_connection or cut


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def online(environment: dict[str, str], hub: Hub) -> dict[str, str]:
    """The same machine with a network, which has nothing but the hub in it."""
    kept = {key: value for key, value in environment.items() if key != "HF_HUB_OFFLINE"}
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return {**kept, **timeouts, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}


def fork_each() -> None:
    """Run `llmchat.main` with each of the lists of arguments on standard input, in a fork of this process.

    The libraries are imported once, before; MLX computes nothing until then, since its threads don't
    outlive a fork. Prints a list of statuses (negative: a signal, -9 also after 20 s) and output.
    """
    # Not mlx_lm itself, which opens a stream when it is imported: with an older MLX that is a thread.
    for library in ("transformers.models.auto.tokenization_auto", "huggingface_hub.hf_api", "mlx.nn"):
        importlib.import_module(library)
    cases, results = json.load(sys.stdin), []
    for arguments in cases:
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            pid = os.fork()
            if pid == 0:
                for fd, target in enumerate((os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno())):
                    os.dup2(target, fd)
                status = 99
                try:
                    status = llmchat.main(arguments)
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(status)
            deadline = time.monotonic() + 20
            while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.005)
            status = os.WEXITSTATUS(ended[1]) if os.WIFEXITED(ended[1]) else -os.WTERMSIG(ended[1])
            texts = [os.pread(file.fileno(), 1 << 20, 0).decode() for file in (stdout, stderr)]
            results.append([status, *texts])
    print(json.dumps(results))


def main_in_forks(environment: dict[str, str], *cases: list[str]) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of the program for each list of arguments."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_llmchat; test_llmchat.fork_each()"],
        input=json.dumps(cases).encode(),
        capture_output=True,
        env={**environment, "PYTHONPATH": str(HERE)},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [tuple(result) for result in json.loads(done.stdout)]


def the_sentence(result: tuple[int, str, str], status: int = 1) -> str:
    """What a failed start said on standard error, which must be one line."""
    assert result[0] == status, result
    (line,) = result[2].splitlines()
    assert line.startswith("llmchat: error: ")
    return line[len("llmchat: error: ") :]


def split_in_two(folder: Path) -> None:
    """Make two shards and their index of a model's weights."""
    import mlx.core as mx

    weights = mx.load(str(folder / "model.safetensors"))
    names = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    # The output matrix comes last, so that the larger part is in the second.
    keys = sorted(weights)
    parts = [keys[: len(keys) // 3], keys[len(keys) // 3 :]]
    for name, part in zip(names, parts):
        mx.save_safetensors(str(folder / name), {key: weights[key] for key in part})
    index = {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="session")
def sharded(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with its weights in two files."""
    folder = Path(broken(tmp_path_factory.mktemp("models") / "sharded", demo, split_in_two))
    edit_config(architectures=["LlamaForCausalLM"])(folder)
    return folder


def test_what_the_hub_refuses_is_one_sentence(demo: str, hub: Hub, online: dict[str, str]) -> None:
    for name in ("own/model", "own/gated", "own/gated-too"):
        hub.put(name, demo)
    hub.faults = {
        "own/private": (401, "RepoNotFound"),
        "own/gated/config.json": (401, "GatedRepo"),
        "own/gated-too": (403, "GatedRepo"),
        "own/forbidden": (403, ""),
        "own/busy": (429, ""),
        "own/down": (500, ""),
        "own/away": (503, ""),
        "own/silent": "stall",
    }
    login = "log in with 'hf auth login'."
    private = f"at {hub.url}, or it is private: check the name at {hub.url}/"
    kept = "Every finished file is kept; run the same command again to fetch the rest."
    sentences = {
        "Llama-3.2-3B": f"There is no model Llama-3.2-3B at {hub.url}; did you mean mlx-community/Llama-3.2-3B?",
        "own/nothing": f"There is no model own/nothing {private}own/nothing, or {login}",
        "own/private": f"There is no model own/private {private}own/private, or {login}",
        "own/gated": f"own/gated is gated: ask for access at {hub.url}/own/gated, then {login}",
        "own/gated-too": f"own/gated-too is gated: ask for access at {hub.url}/own/gated-too, then {login}",
        "own/forbidden": f"{hub.url} refuses to hand out own/forbidden: ask for access at {hub.url}/own/forbidden,"
        f" then {login}",
        "own/busy": f"{hub.url} takes no more requests from here for now: wait some minutes, or {login} {kept}",
        "own/down": f"{hub.url} has a problem of its own (status 500), so own/down could not be fetched: try later."
        f" {kept}",
        "own/away": f"{hub.url} has a problem of its own (status 503), so own/away could not be fetched: try later."
        f" {kept}",
        "own/silent": f"own/silent could not be fetched from {hub.url}: timed out. Check the network. {kept}",
        "": "'' is no model folder, and can't be the name of a repository: name a folder, or a repository such as ",
        "own/--name": "'own/--name' is no model folder",
        "x" * 300 + "\x1b": f"'{'x' * 299}…' is no model folder",
        "own/na--me": "'own/na--me' can't be the name of a repository: a name looks like mlx-community/Llama-3.2-3B-",
    }
    revisions = [["own/model", "--revision", revision] for revision in ("no", "x" * 300)]
    *results, unknown, too_long = main_in_forks(online, *([name] for name in sentences), *revisions)
    for (name, sentence), result in zip(sentences.items(), results):
        assert the_sentence(result).startswith(sentence), name
        assert result[1] == f"Loading model {llmchat.cleaned(name)}...\n"
    where = f"{hub.url}/own/model/tree/main lists its branches and tags."
    assert the_sentence(unknown) == f"own/model has no revision no: {where}"
    assert the_sentence(too_long) == f"own/model has no revision {'x' * 300}: {where}"
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [("http://127.0.0.1:9", "Connection refused"), ("http://nowhere.invalid", r"[\w ]*[Nn]ame[\w ]*")],
)
def test_without_a_network_a_download_is_one_sentence(endpoint: str, why: str, online: dict[str, str]) -> None:
    done = run({**online, "HF_ENDPOINT": endpoint}, "own/model")
    assert done.returncode == 1
    kept = "Every finished file is kept; run the same command again to fetch the rest."
    expected = f"own/model could not be fetched from {endpoint}: {why}. Check the network. {kept}\n"
    assert re.fullmatch(f"llmchat: error: {expected}", done.stderr.decode())


def test_what_can_be_known_is_said_before_the_weights_come(demo: str, hub: Hub, online: dict[str, str]) -> None:
    weights = "model.safetensors"
    vision = {"model_type": "clip", "vision_config": {}}
    for name, config, files in [
        ("own/Model-GGUF", {}, {"Model-Q4_K_M.gguf": 9, weights: None, "config.json": None}),
        ("own/torch", {}, {"pytorch_model.bin": 9, weights: None}),
        ("own/empty", {}, {weights: None}),
        ("own/unknown", {"model_type": "brandnew"}, {}),
        ("own/vision", vision, {}),
        ("own/bert", {"model_type": "bert", "architectures": ["BertModel"]}, {}),
        ("own/qwen-embedding", {"architectures": ["LlamaForCausalLM"]}, {"modules.json": b"[]"}),
        ("own/code", {"model_file": "run_me.py"}, {"run_me.py": b"open('ran', 'w')"}),
        ("own/large", {}, {weights: 1 << 50}),
    ]:
        hub.put(name, demo)
        repository = hub.repositories[name]
        repository.update({"config.json": json.dumps({**json.loads(repository["config.json"]), **config}).encode()})
        repository.update(files)
        hub.repositories[name] = {file: body for file, body in repository.items() if body is not None}
    sentences = {
        "own/Model-GGUF": "own/Model-GGUF holds its weights as GGUF files, where MLX needs model*.safetensors:"
        " mlx-community/Model-4bit may hold the same model.",
        "own/torch": "own/torch holds its weights as PyTorch files, where MLX needs model*.safetensors:"
        " mlx-community/torch-4bit may hold the same model.",
        "own/empty": "own/empty holds no model*.safetensors: MLX can load no other format. Name another model.",
        "own/unknown": r"own/unknown is of type brandnew, which mlx-lm [\d.]+ doesn't know; a newer mlx-lm may (and"
        " the newest may need a newer Python): update it, or name another model.",
        "own/vision": r"own/vision is of type clip, which mlx-lm [\d.]+ doesn't know; it is a model for images: name a"
        " language model such as mlx-community/Llama-3.2-3B-Instruct-4bit.",
        "own/bert": "own/bert is made for embeddings or labels, not for talking: name a chat model such as"
        " mlx-community/Llama-3.2-3B-Instruct-4bit, or try it all the same with --force.",
        "own/qwen-embedding": "own/qwen-embedding is made for embeddings or labels, not for talking: ",
        "own/code": "own/code wants to run its own code (run_me.py): if you trust it, --trust-remote-code allows that.",
        "own/large": r"own/large is too large: 1048576.0 GiB of weights, where this machine has [\d.]+ GiB of memory,"
        r" [\d.]+ GiB of it usable for a model. Name a smaller or more quantized one, or try it all the same with",
    }
    results = main_in_forks(online, *([name] for name in sentences), ["own/large", "--force"])
    for sentence, result in zip(sentences.values(), results):
        pattern = re.escape(sentence).replace(r"\[\\d\.\]\+", r"[\d.]+")
        assert re.match(pattern, the_sentence(result)), result
    assert re.fullmatch(
        r"own/large does not fit on the disk: 1048576.0 GiB are still to be downloaded, where \S+/hub has [\d.]+ GiB"
        r" free. Make room for it, or set HF_HOME to a folder on another disk.",
        the_sentence(results[-1]),
    )
    assert hub.fetched() == []


def test_a_model_is_downloaded_once_and_then_needs_no_hub(demo: str, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", demo)
    say_hello = ["own/model", "-p", "Say hello."]
    said = (0, DEMO[-1][0].answer + "\n", "")
    assert main_in_forks(online, say_hello) == [said]
    assert hub.fetched() == ["model.safetensors"]
    by_commit = [*say_hello, "--revision", hub.COMMIT]
    assert main_in_forks(online, say_hello, by_commit) == [said, said]
    assert hub.requests == []
    # Another branch that is at the same commit: the hub is asked where it is, and nothing else.
    branch = [*say_hello, "--revision", "dev"]
    assert main_in_forks(online, branch, branch) == [said, said]
    assert hub.fetched("GET .*/resolve/") == []
    hub.close()
    whole, damaged = (hub_cache(online) / f"models--own--{name}" for name in ("model", "damaged"))
    shutil.copytree(whole, damaged, symlinks=True)
    os.truncate(damaged / "snapshots" / hub.COMMIT / "model.safetensors", 5000)
    *results, broken = main_in_forks(online, say_hello, by_commit, branch, ["own/damaged"])
    assert results == [said, said, said]
    assert the_sentence(broken).endswith(f" bytes are there. Remove {damaged}, and it is downloaded again.")


def hub_cache(environment: dict[str, str]) -> Path:
    """Where the hub's client keeps models on this machine."""
    return Path(environment["HOME"]) / ".cache/huggingface/hub"


def test_a_download_shows_its_progress_on_a_terminal(demo: str, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", demo)
    with Screen(online, "own/model") as screen:
        # tqdm writes nothing on a terminal without columns, which is how a new one starts.
        fcntl.ioctl(screen.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        screen.expect(r"model\.safetensors: +100%")
        screen.expect("Model loaded successfully!")


def test_a_download_that_was_cut_goes_on_with_the_rest(sharded: Path, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", sharded)
    second = "model-00002-of-00002.safetensors"
    hub.faults = {f"own/model/{second}": "cut"}
    cut = run(online, "own/model")
    message = cut.stderr.decode()
    assert cut.returncode == 1
    assert message.startswith(f"llmchat: error: {second} of own/model could not be fetched from {hub.url}: ")
    assert message.endswith(
        " Check the network. Every finished file is kept; run the same command again to fetch the rest.\n"
    )
    assert len(message.splitlines()) == 1
    hub.fetched()
    hub.faults = {"own/model": (503, "")}
    assert f"so {second} of own/model could not be fetched: try later." in run(online, "own/model").stderr.decode()
    offline = run({**online, "HF_HUB_OFFLINE": "1"}, "own/model")
    assert f"{second} of own/model is not in the cache, and HF_HUB_OFFLINE" in offline.stderr.decode()
    hub.faults = {}
    done = run(online, "own/model", "-p", "Say hello.")
    assert (done.stdout.decode(), done.stderr) == (DEMO[-1][0].answer + "\n", b"")
    assert hub.fetched("GET .*/resolve/") == [second]


def test_ctrl_c_in_a_download_says_what_is_kept(sharded: Path, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", sharded)
    hub.faults = {"own/model/model-00002-of-00002.safetensors": "stall"}
    patient = {**online, "HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    # A script that runs the tests in the background has SIGINT ignored, and so would the program. What is
    # handled here is not ignored there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*PROGRAM, "own/model"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=patient, cwd=patient["HOME"]
    )
    signal.signal(signal.SIGINT, before)
    try:
        assert hub.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=5)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert stderr.decode() == (
        "llmchat: error: The download of own/model was stopped. Every finished file is kept; run the same command"
        " again to fetch the rest.\n"
    )
    hub.faults = {}
    hub.fetched()
    assert run(online, "own/model", "-p", "Say hello.").returncode == 0
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]


def test_a_full_disk_is_one_sentence(demo: str, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", demo)
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", *PROGRAM]
    done = subprocess.run([*limited, "own/model"], capture_output=True, env=online, cwd=online["HOME"], check=False)
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "llmchat: error: The disk is too full for own/model. Make room for it, or set HF_HOME to a folder on another"
        " disk. Every finished file is kept; run the same command again to fetch the rest.\n"
    )


def test_a_cache_that_can_not_be_written_is_one_sentence(demo: str, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/model", demo)
    home = Path(online["HOME"], "a file")
    home.touch()
    (result,) = main_in_forks({**online, "HF_HOME": str(home)}, ["own/model"])
    expected = rf"{home}\S* can't be used \(Not a directory\): set HF_HOME to a folder that you can write to\."
    assert re.fullmatch(expected, the_sentence(result))


def cut_off(file: str, length: int):
    """A change that keeps only the beginning of a file."""
    return lambda folder: os.truncate(folder / file, length)


def lose(*files: str):
    """A change that takes files away."""
    return lambda folder: [(folder / file).unlink() for file in files]


def own_tokenizer(folder: Path) -> None:
    lose("tokenizer.json")(folder)
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    own = {"auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "tokenization_own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def own_network(folder: Path) -> None:
    edit_config(model_file="run_me.py")(folder)
    (folder / "run_me.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def unreadable(file: str):
    """A change that makes a file nothing that can be read, also not by root."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(file)

    return change


def too_large(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1 << 42)


WHOLE_COPY = " Put a whole copy of the model into {model}."
LOCAL_FAILURES = {
    "no config": (lose("config.json"), "{model} has no config.json: name the folder of a model, or a Hugging Face"),
    "no weights": (lose("model.safetensors"), "{model} holds no model*.safetensors: MLX can load no other format."),
    "half the weights": (
        cut_off("model.safetensors", 5000),
        "model.safetensors of {model} can't be loaded: it is cut off: 5000 of \\d+ bytes are there." + WHOLE_COPY,
    ),
    "half a header": (
        cut_off("model.safetensors", 50),
        "model.safetensors of {model} can't be loaded: it is cut off, or no safetensors file." + WHOLE_COPY,
    ),
    "garbage": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x09" + bytes(7) + b"x" * 99),
        "model.safetensors of {model} can't be loaded: its header is broken." + WHOLE_COPY,
    ),
    "wrong shapes": (
        edit_config(hidden_size=256),
        "{model} could not be loaded: .*shape.*. Its files may be damaged." + WHOLE_COPY,
    ),
    "a type of today": (edit_config(model_type="brandnew"), "{model} is of type brandnew, which mlx"),
    "broken JSON": (cut_off("config.json", 20), "config.json of {model} can't be read: .*char.*." + WHOLE_COPY),
    "deep JSON": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "config.json of {model} can't be read: it is nested too deeply." + WHOLE_COPY,
    ),
    "no type": (edit_config(model_type=None), "config.json of {model} names no model_type, so this"),
    "no tokenizer": (
        lose("tokenizer.json", "tokenizer_config.json"),
        "{model} could not be loaded: it has no tokenizer (tokenizer.json, tokenizer.model)." + WHOLE_COPY,
    ),
    "broken tokenizer": (
        cut_off("tokenizer.json", 99),
        "{model} could not be loaded: Failed to parse tokenizer.json: .*. Its files may be damaged." + WHOLE_COPY,
    ),
    "own tokenizer": (
        own_tokenizer,
        "{model} wants to run its own code: if you trust it, --trust-remote-code allows that.",
    ),
    "own network": (
        own_network,
        "{model} wants to run its own code (run_me.py): if you trust it, --trust-remote-code allows that.",
    ),
    "unreadable weights": (
        unreadable("model.safetensors"),
        "{model} can't be read: .*model.safetensors'." + WHOLE_COPY,
    ),
    "unreadable config": (
        unreadable("config.json"),
        "config.json of {model} can't be read: .*symbolic links.*config.json'." + WHOLE_COPY,
    ),
    "no template": (lose("chat_template.jinja"), "{model} has no chat template, so it can't hold a conversation; try"),
    "too large": (too_large, "{model} is too large: 4096.0 GiB of weights, where this machine has"),
    "GGUF": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        "{model} holds its weights as GGUF files, where MLX needs model*.safetensors: mlx-community/",
    ),
    "a shard is missing": (
        lambda folder: [split_in_two(folder), lose("model-00001-of-00002.safetensors")(folder)],
        "{model} could not be loaded: model-00001-of-00002.safetensors is missing." + WHOLE_COPY,
    ),
    "embeddings": (
        edit_config(architectures=["LlamaModel"]),
        "{model} is made for embeddings or labels, not for talking: name a chat model such as ",
    ),
}


def test_a_folder_that_can_not_be_loaded_is_one_sentence(
    demo: str, environment: dict[str, str], tmp_path: Path
) -> None:
    models = {case: broken(tmp_path / case.replace(" ", "-"), demo, LOCAL_FAILURES[case][0]) for case in LOCAL_FAILURES}
    raising = broken(
        tmp_path / "raising",
        demo,
        lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception(1) }}"),
    )
    forced = [models["embeddings"], "--force"]
    no_adapter = [demo, "--adapter", str(tmp_path / "nowhere")]
    cases = [*([model] for model in models.values()), forced, [raising, "-p", "Hi"], no_adapter]
    *results, started, template, adapter = main_in_forks(environment, *cases)
    for (case, model), result in zip(models.items(), results):
        pattern = re.escape(LOCAL_FAILURES[case][1]).replace(r"\.\*", ".*").replace(r"\\d\+", r"\d+")
        assert re.match(pattern.replace(re.escape("{model}"), re.escape(model)), the_sentence(result)), (case, result)
        assert len(the_sentence(result)) < 700
        assert not Path(model, "ran").exists()
    assert started[0] == 0
    assert the_sentence(template).startswith(f"The chat template of {raising} can't render this conversation: ")
    assert the_sentence(adapter).startswith("There is no adapter in ")


STRANGE_VALUES = [
    *(None, True, False, 0, -1, 1, 3, 0.5, 1e300, 10**9, 10**12, 10**30, float("nan")),
    *("", "x", "../x", "\0", "\ud800", "x" * 5000, "{{", [], [None], [[]], {}, {"x": None}),
]


def mutate_json(value: object, chance: random.Random) -> object:
    """The value with something strange at a random place in it."""
    if not value or not isinstance(value, (dict, list)) or chance.random() < 0.1:
        return chance.choice(STRANGE_VALUES)
    changed = value.copy()
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    if chance.random() < 0.1:
        del changed[key]
    else:
        changed[key] = mutate_json(value[key], chance)
    return changed


def mutate(folder: Path, chance: random.Random) -> str:
    """Spoil a model folder at random; returns what was done."""
    kind = chance.choice(["bytes", "truncate", "delete", "swap", "json", "json", "json", "header"])
    files = sorted(folder.iterdir())
    if kind in ("json", "header"):
        files = [file for file in files if file.suffix == (".json" if kind == "json" else ".safetensors")]
    file, other = chance.sample(files, 2)
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "truncate":
        os.truncate(file, chance.randrange(file.stat().st_size))
    elif kind == "json":
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text()), chance)))
    else:
        content = bytearray(file.read_bytes())
        for _ in range(chance.choice([1, 4, 64])):
            content[chance.randrange(min(len(content), 2500 if kind == "header" else 1 << 40))] = chance.randrange(256)
        file.write_bytes(content)
    return f"{kind} {file.name}"


@pytest.mark.parametrize("cases", [15, pytest.param(300, marks=pytest.mark.stress)])
def test_a_spoilt_model_loads_or_is_one_sentence(
    cases: int, sharded: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    for batch in range(0, cases, 50):
        folders = {seed: tmp_path / str(seed) for seed in range(batch, min(cases, batch + 50))}
        done = [mutate(shutil.copytree(sharded, folder), random.Random(seed)) for seed, folder in folders.items()]
        for what, result in zip(done, main_in_forks(environment, *([str(folder)] for folder in folders.values()))):
            status, stdout, stderr = result
            if status:
                assert len(the_sentence(result)) < 1000, what
            else:
                assert stdout.endswith("Model loaded successfully!\n\nprompt -> \nGoodbye!\n"), what
                assert stderr == "", what
        for folder in folders.values():
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------ Hosts

CAN_SHARE = tuple(map(int, version("mlx-lm").split(".")[:2])) >= (0, 31)
needs_sharding = pytest.mark.skipif(not CAN_SHARE, reason="this mlx-lm can't share a model among hosts")


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 in a row that nobody listens on."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))


def launch(count: int) -> list[str]:
    """The start of a command line that starts Python on so many hosts, all of them here."""
    launcher = str(Path(sys.executable).parent / "mlx.launch")
    port = str(free_ports(count)[0])
    return [launcher, "-n", str(count), "--backend", "ring", "--starting-port", port, "--python", sys.executable]


def start_hosts(environments: list[dict[str, str]], *arguments: str) -> list[subprocess.Popen]:
    """Start the program once for each environment as the launcher would, but without it."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(len(environments))]
    hostfile = Path(environments[0]["HOME"]) / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    return [
        subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
            cwd=environment["HOME"],
        )
        for rank, environment in enumerate(environments)
    ]


def ends(hosts: list[subprocess.Popen], stdin: str = "") -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each, once all have ended; only rank 0 is given input."""
    try:
        results = []
        for rank, host in enumerate(hosts):
            out, err = host.communicate(stdin.encode() if rank == 0 else None, timeout=120)
            results.append((host.returncode, out.decode(), err.decode()))
        return results
    finally:
        for host in hosts:
            host.kill()


def wait_for(process: subprocess.Popen, wanted: str) -> str:
    """What a process writes until this comes."""
    output = ""
    while wanted not in output:
        data = os.read(process.stdout.fileno(), 1 << 16)
        assert data, output
        output += data.decode()
    return output


def homes(environment: dict[str, str], count: int) -> list[dict[str, str]]:
    """The environment, and others with a home of their own."""
    others = [Path(environment["HOME"]).parent / f"home-{rank}" for rank in range(1, count)]
    for home in others:
        home.mkdir()
    return [environment, *({**environment, "HOME": str(home)} for home in others)]


@pytest.fixture(scope="session")
def shardable(common: Path) -> Callable[[str, int], str]:
    """Folders of models of a family with so many layers, and with an index, built when they are asked for."""

    def build(folder: Path) -> None:
        family, layers = folder.stem.split("-")
        build_model(folder, FAMILIES[family], FAMILY_CONVERSATIONS, hidden=640, num_hidden_layers=int(layers))
        split_in_two(folder)

    return lambda family, layers: str(once(common / f"{family}-{layers}", build))


class Dictated(llmchat.Model):
    """A model whose next prompt can be given as tokens."""

    tokens: list[int] | None = None

    def encode(self, text: str) -> list[int]:
        return self.tokens or super().encode(text)


def lead_conversations(folder: str, pipeline: str) -> None:
    """Be one of several hosts; as rank 0 hold all the conversations that the model knows, and more.

    If the others did anything else than rank 0, the words would turn to noise.
    """
    hosts = llmchat.join_hosts()
    if hosts.rank:
        raise SystemExit(llmchat.follow(hosts))
    settings = Settings(model=folder, pipeline=bool(pipeline))
    with hosts.lead(settings):
        model = Dictated(**vars(llmchat.load_model(settings, hosts)))
        conversation = Conversation(model, settings)
    for talk in FAMILY_CONVERSATIONS:
        conversation.clear()
        conversation.messages = [message for turn in talk if turn.given for message in as_messages(turn)]
        settings.system = talk[0].system
        check(conversation, *(turn for turn in talk if not turn.given))
    settings.system = None
    # Cut, and gone on with; said again, and taken back.
    conversation.clear()
    for limit, speak in ((7, lambda **stop: conversation.reply("Count.", **stop)), (1, conversation.resume)):
        settings.max_tokens = limit
        hear(speak)
        assert conversation.statistics.finish_reason == "length"
    settings.max_tokens = 512
    hear(conversation.resume)
    assert conversation.messages[-1]["content"].endswith("28, 29, 30")
    check(conversation, FAMILY_CONVERSATIONS[1][1])
    hear(conversation.retry)
    assert conversation.messages[-1]["content"].endswith("You are welcome.")
    conversation.undo()
    check(conversation, FAMILY_CONVERSATIONS[1][1])
    # What is left to chance comes out the same on every host: all hold these tokens, or some would start anew.
    conversation.seed(5)
    settings.temperature, settings.max_tokens = 10.0, 40
    hear(conversation.reply, "My name is Ada.")
    said = [*conversation._cache.tokens]
    model.tokens, settings.max_tokens = [*said, said[-1]], 1
    hear(conversation.reply, "And so on.")
    assert conversation.statistics.cached_tokens == len(said) > 100, conversation.statistics
    print("every word was right")
    hosts.dismiss(0)


def as_messages(turn: Turn) -> list[dict[str, str]]:
    """A turn as it stands in a conversation."""
    return [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]


@needs_sharding
@pytest.mark.parametrize(
    ("count", "family", "layers", "pipeline"),
    [
        (2, "dense", 2, False),
        pytest.param(2, "sliding", 2, False, marks=pytest.mark.stress),
        pytest.param(2, "hybrid", 2, True, marks=pytest.mark.stress),
        pytest.param(4, "dense", 2, False, marks=pytest.mark.stress),
        pytest.param(4, "opened", 2, False, marks=pytest.mark.stress),
        pytest.param(4, "sliding", 2, False, marks=pytest.mark.stress),
        pytest.param(4, "hybrid", 4, True, marks=pytest.mark.stress),
    ],
)
def test_hosts_hold_every_conversation_word_for_word(
    count: int, family: str, layers: int, pipeline: bool, shardable, environment: dict[str, str]
) -> None:
    code = "import sys, test_llmchat; test_llmchat.lead_conversations(*sys.argv[1:])"
    importing = {**environment, "PYTHONPATH": str(HERE)}
    arguments = ["-c", code, shardable(family, layers), "yes" * pipeline]
    done = run(importing, *arguments, program=launch(count), timeout=300)
    assert done.stdout == b"every word was right\n", done.stderr.decode()


@needs_sharding
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_the_sample_session_on_several_hosts(count: int, demo: str, environment: dict[str, str]) -> None:
    stdin = "".join(f"{turn.prompt}\n" for turn in SAMPLE) + "/retry\n/undo\nWhat is my name?\nquit\n"
    alone = run(environment, demo, "--stats", stdin=stdin)
    launched = [*launch(count), PROGRAM[1]]
    done = run(environment, demo, "--stats", stdin=stdin, program=launched, timeout=240)
    assert SAMPLE[-1].answer in done.stdout.decode()
    assert done.stdout == alone.stdout
    # What is computed, and what is reused.
    costs, floor = (re.findall(r"prompt \d+ new, \d+ reused", text.decode()) for text in (done.stderr, alone.stderr))
    assert costs == floor
    assert len(costs) == len(SAMPLE) + 2


@needs_sharding
def test_rank_0_alone_reads_and_writes(demo: str, environment: dict[str, str]) -> None:
    environments = homes(environment, 2)
    (Path(environments[1]["HOME"]) / ".llmchat_config").write_text("temperature = nonsense\nmax-tokens = 1\n")
    stdin = "What is the capital of France?\n/save copy\n"
    environments = [{**each, "COLUMNS": "80"} for each in environments]
    results = ends(start_hosts(environments, demo, "--session", "talk"), stdin)
    assert [status for status, _, _ in results] == [0, 0]
    assert results[0][1] == (
        f"Loading model {demo}...\nModel loaded successfully!\n\nprompt -> What is the capital of France?\n"
        "The capital of France is Paris.\n\nprompt -> /save copy\n\nprompt -> \nGoodbye!\n"
    )
    assert results[1][1:] == ("", "")
    first, second = ({path.name for path in Path(each["HOME"]).iterdir()} for each in environments)
    assert first == {"hosts.json", "talk", "copy", ".llmchat_history"}
    assert second == {".llmchat_config"}


@needs_sharding
@pytest.mark.parametrize(
    ("change", "flags", "complaint"),
    [
        (edit_config(num_attention_heads=5, num_key_value_heads=5), [], "it has 5 heads"),
        (edit_config(num_key_value_heads=1), [], "it has 1 key-value head."),
        (None, ["--pipeline"], "can't split {model} by its layers: leave out --pipeline"),
        (None, ["--adapter", "."], "can't share an adapter among hosts"),
        (None, ["--nonsense"], "unrecognized arguments: --nonsense"),
        (None, ["-p", "-"], "never tells where standard input ends"),
    ],
)
def test_what_can_not_be_shared_is_one_sentence_said_once(
    change, flags: list[str], complaint: str, demo: str, environment: dict[str, str], tmp_path: Path
) -> None:
    model = broken(tmp_path / "model", demo, change) if change else demo
    results = ends(start_hosts([environment] * 2, model, *flags))
    statuses = {status for status, _, _ in results}
    assert statuses == {2 if "--nonsense" in flags else 1}, results
    said = [line for _, _, err in results for line in err.splitlines() if line.startswith("llmchat: error: ")]
    assert len(said) == 1, results
    assert complaint.format(model=model) in said[0]
    assert not any(out or err for _, out, err in results[1:])


@pytest.mark.skipif(CAN_SHARE, reason="this mlx-lm can")
def test_an_mlx_lm_that_can_not_share_a_model_says_so_once(demo: str, environment: dict[str, str]) -> None:
    results = ends(start_hosts([environment] * 2, demo))
    assert [status for status, _, _ in results] == [1, 1]
    assert "can't share a model among hosts: a newer one can, on Python 3.10 or later." in results[0][2]
    assert results[1][1:] == ("", "")


@needs_sharding
def test_what_is_wrong_on_one_host_alone_is_said_with_its_name(demo: str, environment: dict[str, str]) -> None:
    environments = homes(environment, 2)
    shutil.copytree(demo, Path(environment["HOME"]) / "model")
    results = ends(start_hosts(environments, "~/model"))
    assert [status for status, _, _ in results] == [1, 1]
    assert f"llmchat: error: On {platform.node()}: '~/model' is no model folder" in results[0][2]
    assert results[1][1:] == ("", "")


def hosts_of(launcher: subprocess.Popen, mark: str) -> list[int]:
    """The numbers of the running processes with this word among their arguments, by rank, without the launcher."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=", "-o", "args="], capture_output=True, check=True
    ).stdout.decode()
    return sorted({int(line.split()[0]) for line in listed.splitlines() if mark in line} - {launcher.pid})


ENDINGS = ["SIGINT all", "SIGTERM launcher", "SIGTERM 0", "SIGTERM 1", "SIGINT 0", "SIGKILL 0", "SIGKILL 1"]
MOMENTS = ["loading", "prompt", "reply"]


@needs_sharding
@pytest.mark.parametrize(
    ("count", "ending", "moment"),
    [
        *((2, "SIGINT all", "prompt"), (2, "SIGTERM 1", "loading"), (2, "SIGTERM launcher", "reply")),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in itertools.product((2, 4), ENDINGS, MOMENTS)),
    ],
)
def test_every_ending_ends_every_host(
    count: int, ending: str, moment: str, demo: str, environment: dict[str, str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.symlink_to(demo)
    launcher = subprocess.Popen(
        [*launch(count), str(HERE / "llmchat.py"), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        wait_for(launcher, "Loading" if moment == "loading" else "prompt ->")
        if moment == "reply":
            launcher.stdin.write(b"Count.\n")
            launcher.stdin.flush()
            wait_for(launcher, "1, 2, 3")
        hosts = hosts_of(launcher, str(model))
        assert len(hosts) == count
        name, target = ending.split()
        if target == "all":
            os.killpg(launcher.pid, getattr(signal, name))
        else:
            os.kill(launcher.pid if target == "launcher" else hosts[int(target)], getattr(signal, name))
        deadline = time.monotonic() + 20
        while left := hosts_of(launcher, str(model)):
            assert time.monotonic() < deadline, f"{left} of {hosts} are still there"
            time.sleep(0.02)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.communicate()


FAILS_ON_ONE_HOST = """
import os
from mlx_lm.models import llama
ModelArgs = llama.ModelArgs
class Model(llama.Model):
    def __call__(self, *arguments, **keywords):
        if os.environ["MLX_RANK"] == "1" and os.path.exists({marker!r}):
            raise RuntimeError("[metal::malloc] Out of memory")
        return super().__call__(*arguments, **keywords)
"""


@needs_sharding
def test_an_engine_that_fails_on_one_host_ends_all(demo: str, environment: dict[str, str], tmp_path: Path) -> None:
    marker = tmp_path / "fail"

    def fail_on_one_host(folder: Path) -> None:
        edit_config(model_file="fails.py")(folder)
        (folder / "fails.py").write_text(FAILS_ON_ONE_HOST.format(marker=str(marker)))

    model = broken(tmp_path / "model", demo, fail_on_one_host)
    hosts = start_hosts([environment] * 2, model, "--trust-remote-code", "--session", "talk")
    hosts[0].stdin.write(b"What is the capital of France?\n")
    hosts[0].stdin.flush()
    wait_for(hosts[0], "Paris.\n\nprompt -> ")
    marker.touch()
    hosts[0].stdin.write(b"How many people live there?\n")
    results = ends(hosts, "")
    assert [status for status, _, _ in results] == [1, 1], results
    assert f"llmchat: error: On {platform.node()}: The engine failed" in results[1][2]
    assert "connection to a peer was lost" in results[0][2]
    # The prompt is kept, and what came before.
    assert len(reread(Path(environment["HOME"]) / "talk")) == 3


@needs_sharding
def test_a_host_that_is_lost_between_two_prompts_ends_the_chat(demo: str, environment: dict[str, str]) -> None:
    hosts = start_hosts([environment] * 2, demo)
    wait_for(hosts[0], "prompt -> ")
    hosts[1].kill()
    hosts[0].wait(60)
    results = ends(hosts)
    assert [status for status, _, _ in results] == [1, -signal.SIGKILL]
    assert results[0][2].count("llmchat: error: Another host is gone, so the chat can't go on: ") == 1


@needs_sharding
def test_hosts_with_another_version_of_the_model_are_found_out(demo: str, environment: dict[str, str]) -> None:
    environments = homes(environment, 2)
    for each, context in zip(environments, (4096, 2048)):
        broken(Path(each["HOME"]) / "model", demo, edit_config(max_position_embeddings=context))
    results = ends(start_hosts(environments, "~/model"))
    assert [status for status, _, _ in results] == [1, 1]
    assert f"On {platform.node()}: ~/model is another model here than on the first host" in results[0][2]
    assert results[1][1:] == ("", "")


@needs_sharding
def test_each_host_downloads_only_what_it_needs(shardable, demo: str, hub: Hub, online: dict[str, str]) -> None:
    hub.put("own/layers", split_by_layers(shardable("hybrid", 2)))
    hub.put("own/heads", demo)
    environments = homes(online, 2)
    end, middle, beginning = (f"model-{n}.safetensors" for n in (2, 1, 0))
    for name, flags, needed in (
        ("own/layers", ["--pipeline"], [{middle, end}, {beginning, end}]),
        ("own/heads", [], [{"model.safetensors"}] * 2),
    ):
        # The second time nobody is asked.
        for url in (hub.url, "http://127.0.0.1:9"):
            there = [{**each, "HF_ENDPOINT": url} for each in environments]
            results = ends(start_hosts(there, name, *flags, "-p", SAMPLE[0].prompt))
            assert [status for status, _, _ in results] == [0, 0], results
            assert results[0][1] == SAMPLE[0].answer + "\n"
            assert results[1][1:] == ("", "")
        caches = [hub_cache(each) / ("models--" + name.replace("/", "--")) for each in environments]
        assert [{path.name for path in cache.rglob("*.safetensors")} for cache in caches] == needed


def split_by_layers(folder: str) -> Path:
    """A copy of a model whose first two layers have files of their own, and all else a third one."""
    import mlx.core as mx

    copy = Path(f"{folder}-split")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    parts: dict[str, dict] = {}
    for file in Path(folder).glob("*.safetensors"):
        for key, weight in mx.load(str(file)).items():
            layer = re.search(r"layers\.(\d+)\.", key)
            parts.setdefault(f"model-{layer[1] if layer else 2}.safetensors", {})[key] = weight
    for name, part in parts.items():
        mx.save_safetensors(str(copy / name), part)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@needs_sharding
def test_no_code_of_a_tokenizer_runs_on_any_host(demo: str, environment: dict[str, str], tmp_path: Path) -> None:
    model = broken(tmp_path / "model", demo, own_tokenizer)
    results = ends(start_hosts([environment] * 2, model))
    assert 0 not in [status for status, _, _ in results]
    assert "wants to run its own code" in results[0][2]
    assert not (Path(model) / "ran").exists()


def test_lines_from_a_launcher_are_shown_once(environment: dict[str, str]) -> None:
    code = (
        "import sys, llmchat; meetings = []; terminal = llmchat.Terminal(sys.stdin, sys.stdout, sys.stderr);"
        "terminal.read_from_launcher(lambda: meetings.append(1) or len(meetings) == 1 and print('idle', flush=True))\n"
        "while prompt := terminal.read_prompt(): print(repr(prompt))"
    )
    for watched in (False, True):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": str(HERE), **({"COLUMNS": "80"} if watched else {})},
        ) as process:
            # Two lines are there before their prompts, the second in pieces; the last is typed at its prompt.
            process.stdin.write("one\ntwö".encode()[:-1])
            process.stdin.flush()
            output = wait_for(process, "idle")
            process.stdin.write("twö\n\n".encode()[-3:])
            process.stdin.close()
            output += process.stdout.read().decode()
        typed = "" if watched else "twö\n"
        assert output == f"\nprompt -> one\n'one'\n\nprompt -> idle\n{typed}'twö'\n\nprompt -> \n"
