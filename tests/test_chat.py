"""The chat as a person meets it: in this process where that is enough, in a pipe and at a terminal where it is not."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minillm import chat
from tests.support.tiny_run import tiny_model, tiny_tokenizer, write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "talk", "sft", (10, 20))
    return tmp_path / "runs"


def answer(model, messages, num_tokens):
    """What greedy decoding with transformers' own template and `generate` says."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    output = model.generate(prompt, max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt.shape[1] :])


def run_chat(monkeypatch, capsys, *arguments, stdin=""):
    """Exit code, stdout and stderr of the chat with `stdin` piped in."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
    capsys.readouterr()
    code = chat.main([*arguments, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_shot_prints_the_reply_alone(runs, monkeypatch, capsys):
    code, out, err = run_chat(
        monkeypatch, capsys, "--prompt", "你好 len?", "--system", "简短", "--temperature", "0", "--max-new-tokens", "20"
    )
    messages = [{"role": "system", "content": "简短"}, {"role": "user", "content": "你好 len?"}]
    assert (code, out) == (0, answer(tiny_model(seed=20), messages, 20) + "\n")
    size = f"{tiny_model().num_parameters() / 1e6:.2f}M parameters"
    for part in ("talk step 20", "runs/talk/checkpoints/step-000020", size, "cpu, fp32, context 128 tokens"):
        assert part in err
    assert "cut after 20 tokens" in err
    assert "base model" not in err


def test_a_pipe_is_a_conversation(runs, monkeypatch, capsys):
    arguments = ("talk", "--temperature", "0", "--max-new-tokens", "10")
    code, out, err = run_chat(monkeypatch, capsys, *arguments, stdin="你好\n\n/help\n/frob\nmore\n/reset\nmore")
    model = tiny_model(seed=20)
    first = [{"role": "user", "content": "你好"}]
    reply = answer(model, first, 10)
    more = {"role": "user", "content": "more"}
    second = answer(model, [*first, {"role": "assistant", "content": reply}, more], 10)
    assert (code, out) == (0, f"{reply}\n{second}\n{answer(model, [more], 10)}\n")
    assert "/reset   forget" in err
    assert "no command /frob" in err
    code, out, _ = run_chat(monkeypatch, capsys, *arguments, stdin="/exit\nnot read")
    assert (code, out) == (0, "")


def test_full_context_forgets_the_oldest_and_says_so(runs, monkeypatch, capsys):
    lines = "a b c d\n" * 4 + "x " * 200 + "\nx\n"
    code, out, err = run_chat(monkeypatch, capsys, "--temperature", "0", "--max-new-tokens", "30", stdin=lines)
    assert code == 0
    assert "the context of 128 tokens is full: forgot the oldest turn" in err
    assert "error: this message takes" in err
    assert out.endswith("\n")
    assert err.index("error: this message takes") < err.rindex("forgot the oldest")


def test_seed_repeats_a_session(runs, monkeypatch, capsys):
    def session(seed):
        return run_chat(monkeypatch, capsys, "--seed", seed, "--max-new-tokens", "12", stdin="hi\nhi\n")[1]

    assert session("1") == session("1") != session("2")


def test_base_model_is_named_and_continues(runs, monkeypatch, capsys):
    write_run(runs, "base", "pretrain", (5,))
    code, out, err = run_chat(
        monkeypatch, capsys, "base", "--prompt", "len returns", "--temperature", "0", "--max-new-tokens", "10"
    )
    prompt = tiny_tokenizer()("len returns", return_tensors="pt").input_ids
    output = tiny_model(seed=5).generate(prompt, max_new_tokens=10, do_sample=False)
    assert (code, out) == (0, tiny_tokenizer().decode(output[0, prompt.shape[1] :]) + "\n")
    assert err.count("base model") == 1


def test_damaged_newest_checkpoint_is_named_and_the_older_one_talks(runs, monkeypatch, capsys):
    path = runs / "talk/checkpoints/step-000020/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    arguments = ("--prompt", "hi", "--temperature", "0", "--max-new-tokens", "6", "--dtype", "bf16")
    code, out, err = run_chat(monkeypatch, capsys, *arguments)
    expected = answer(tiny_model(seed=10).to(torch.bfloat16), [{"role": "user", "content": "hi"}], 6)
    assert (code, out) == (0, expected + "\n")
    assert "step-000020/model.safetensors has" in err
    assert "talk step 10" in err
    assert "bf16" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "there is no run or folder 'nobody'"),
        (["--temperature", "-1", "--prompt", "x"], "temperature is -1.0"),
        (["--prompt", "x " * 200], "shorten it"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(runs, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        run_chat(monkeypatch, capsys, *arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line.startswith("error: ") and message in line]


def test_a_fresh_process_needs_no_deepspeed_and_takes_bytes_that_are_no_text(runs):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module('minillm.chat', run_name='__main__')\n"
        "finally: print('deepspeed' in sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--seed", "1", "--max-new-tokens", "8", "--prompt", b"\xff\xe4 hi"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode("utf-8").endswith("\n")
    assert result.stderr.decode().splitlines()[-1] == "False"


class Terminal:
    """The chat at a pseudo-terminal, as a person has it."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LANG": "C.UTF-8"}
        environment.pop("LC_ALL", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minillm.chat", *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def expect(self, text, timeout=120):
        """Read until `text` shows; returns what came before it and forgets it."""
        deadline = time.monotonic() + timeout
        wanted = text.encode()
        while wanted not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not show; seen: {self.seen.decode(errors='replace')}"
            self.seen += os.read(self._master, 65536)
        before, _, self.seen = self.seen.partition(wanted)
        return before.decode(errors="replace")

    def expect_prompt(self):
        """Read until the prompt shows and the chat waits for a key.

        CPython's readline prints the prompt before it waits, and a Ctrl-C that falls between the two is noticed only
        at the next key: no person is that quick, a test is.
        """
        self.expect("> ")
        asleep = 0
        while asleep < 10:
            time.sleep(0.02)
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0

    def type(self, text):
        os.write(self._master, text.encode())


def test_at_a_terminal_ctrl_c_stops_the_reply_and_a_second_one_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", "endless", "sft", (1,), context=1_000_000)
    terminal = Terminal("--temperature", "0", "--max-new-tokens", "900000", "--device", "cpu")
    terminal.expect_prompt()
    terminal.type("说说\r")
    terminal.expect("说说\r\n")
    time.sleep(0.5)  # some of the reply
    terminal.type("\x03")
    assert len(terminal.expect("interrupted")) > 10
    terminal.expect_prompt()
    terminal.type("/reset\r")
    terminal.expect("starts anew")
    terminal.expect_prompt()
    terminal.type("\x03")
    terminal.expect("again or Ctrl-D leaves")
    terminal.expect_prompt()
    terminal.type("\x03")
    assert terminal.process.wait(timeout=60) == 130


def test_end_of_input_at_a_terminal_leaves(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert chat.read_message(interactive=True) is None
