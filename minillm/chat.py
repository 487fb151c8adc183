"""Talk to a model in the terminal: `python -m minillm.chat [RUN]`.

Contract: replies go to stdout, everything else (what was loaded, what was cut, prompts for input where stdout is no
terminal) to stderr, so that `--prompt` and pipes give the reply alone. Works without DeepSpeed. Heavy imports happen
after the arguments are parsed and the model folder is found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from typing import TYPE_CHECKING

from minillm.compat.versions import INFERENCE, check_environment
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.threads import set_wait_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from minillm.inference.conversation import Conversation
    from minillm.inference.generate import Sampling
    from minillm.run_folder import ModelFolder

COMMANDS = """\
/reset   forget the conversation so far
/help    this list
/exit    leave (Ctrl-D does too)
Ctrl-C   stop the reply; a second one leaves"""

INTERRUPTED = 130  # the shell's code for a process ended by Ctrl-C
# A model may emit any byte; without its control characters it cannot steer the terminal.
_NO_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def build_parser() -> argparse.ArgumentParser:
    """The command line; stdlib only, so that --help is quick."""
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.chat"), description="Talk to a trained model.", epilog="In the chat:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "run", nargs="?", metavar="RUN",
        help="run name or folder, checkpoint, exported or Hugging Face folder (default: the newest run under runs/)",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="one shot: print the reply to TEXT on stdout and leave")
    parser.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default %(default)s)")
    sampling.add_argument("--top-p", type=float, default=0.9, help="nucleus, 1 is off (default %(default)s)")
    sampling.add_argument("--top-k", type=int, default=0, help="0 is off (default %(default)s)")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default %(default)s)")
    sampling.add_argument("--max-new-tokens", type=int, default=256, help="longest reply (default %(default)s)")
    sampling.add_argument("--seed", type=int, help="the same seed and messages give the same replies")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA, fp32 on CPU"
    )  # fmt: skip
    return parser


def note(message: str) -> None:
    """A line for the person, never part of the reply."""
    print(f"[minillm] {message}", file=sys.stderr, flush=True)


class Session:
    """One model, one conversation, one way of sampling; prints replies as they are generated."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        sampling: Sampling,
    ):
        from minillm.models.chat import context_length

        self._model, self._tokenizer, self.conversation = model, tokenizer, conversation
        self._sampling, self._context = sampling, context_length(model.config)

    def reply(self, text: str) -> None:
        """Answer `text` on stdout. On KeyboardInterrupt what was said so far is kept, and the interrupt goes on."""
        from minillm.inference.generate import ReplyStream

        reserve = min(self._sampling.max_new_tokens, self._context // 2)
        ids, forgotten = self.conversation.ask(text, self._context, reserve)
        if forgotten:
            turns = "turn" if forgotten == 1 else f"{forgotten} turns"
            note(f"the context of {self._context} tokens is full: forgot the oldest {turns}")
        stream = ReplyStream(self._model, self._tokenizer, ids, self._sampling)
        pieces = []
        try:
            for piece in stream:
                pieces.append(piece)
                print(piece.translate(_NO_CONTROLS) if sys.stdout.isatty() else piece, end="", flush=True)
        finally:
            print(flush=True)
            if pieces:
                self.conversation.answer("".join(pieces))
            else:
                self.conversation.take_back()
        if stream.finish_reason == "length":
            note(f"the reply was cut after {stream.num_new_tokens} tokens (--max-new-tokens)")
        elif stream.finish_reason == "context":
            note(f"the reply was cut: the context of {self._context} tokens is full")
        if self._sampling.seed is not None:
            # Counted by replies, so that a stopped one does not change those after it.
            self._sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + 1)


def read_message(interactive: bool) -> str | None:
    """The next line the person typed, None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    if not sys.stdout.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        return None


def converse(session: Session) -> int:
    """The read, reply, repeat loop; returns the exit code."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
        note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
    just_interrupted = False
    while True:
        try:
            message = read_message(interactive)
            just_interrupted = False
            if message is None or message.strip() == "/exit":
                if message is None and interactive:
                    print(file=sys.stderr)
                return 0
            handle(session, message)
        except UserError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            print(file=sys.stderr)
            if just_interrupted or not interactive:
                return INTERRUPTED
            # One Ctrl-C may have been meant for a reply that had just ended.
            just_interrupted = True
            note("interrupted; Ctrl-C again or Ctrl-D leaves")


def handle(session: Session, message: str) -> None:
    """Do a command, or have the model answer."""
    command = message.strip()
    if command == "/reset":
        session.conversation.reset()
        note("the conversation starts anew")
    elif command == "/help":
        print(COMMANDS, file=sys.stderr, flush=True)
    elif command.startswith("/") and command[1:].isalpha():
        note(f"there is no command {command}; /help lists them")
    elif command:
        session.reply(message)


def open_session(args: argparse.Namespace) -> Session:
    """Find and load what the arguments name, and say what it is."""
    from minillm.data.foreign_tokenizer import open_tokenizer
    from minillm.interop.load import load_model_folder
    from minillm.run_folder import describe_model_folder, resolve_model_folder

    folder = resolve_model_folder(args.run)
    origin = describe_model_folder(folder)

    from transformers.utils import logging as transformers_logging

    from minillm.inference.conversation import Conversation, chat_encoder, continuation_encoder
    from minillm.inference.generate import Sampling

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sampling = Sampling(
        args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens, args.seed
    )  # fmt: skip
    tokenizer = open_tokenizer(folder)
    is_base = origin.stage == "pretrain"
    encode = continuation_encoder(tokenizer) if is_base else chat_encoder(tokenizer)
    model = load_model_folder(folder, args.device, args.dtype)
    note(describe(model, origin))
    if is_base:
        note("this is a base model (stage: pretrain), without chat training: it continues your text")
    system = _from_command_line(args.system) if args.system else None
    return Session(model, tokenizer, Conversation(encode, system), sampling)


def describe(model: PreTrainedModel, origin: ModelFolder) -> str:
    """One line: which model, how large, where and in what it runs."""
    from minillm.models.chat import context_length

    name = f"{origin.run} step {origin.step} ({origin.path})" if origin.run else str(origin.path)
    dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(str(model.dtype).removeprefix("torch."), str(model.dtype))
    size = f"{model.num_parameters() / 1e6:,.2f}M parameters"
    return f"{name}: {size}, {model.device.type}, {dtype}, context {context_length(model.config)} tokens"


def _from_command_line(text: str) -> str:
    """Arguments that are not UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    set_wait_policy()
    args = build_parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        # A byte the terminal's encoding does not know must not end the chat. (None: started without that stream.)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with exit_on_user_error():
        check_environment(INFERENCE)
        try:
            session = open_session(args)
            if args.prompt is None:
                return converse(session)
            session.reply(_from_command_line(args.prompt))
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of our output left (`| head`): nobody is there to be told, not even by the last flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
