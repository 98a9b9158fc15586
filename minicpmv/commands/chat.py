"""`minicpmv chat`: a conversation in the terminal, or line by line from a pipe.

What is special:
- Images and videos wait for the next question, and images are encoded while the user types it.
- Ctrl-C stops an answer, not the conversation: what was read of it stays in the history.
- Without a terminal every line is a question or a command, stdout gets the answers alone, and errors end in exit code 1.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.commands import media, options, terminal
from minicpmv.errors import MiniCPMVError, is_expected, one_line, one_line_errors, require


COMMANDS = {
    "/image FILE...": "show images with the next question",
    "/video FILE...": "show videos with the next question",
    "/think [on|off|auto]": "think before answering; without a word: the other way round",
    "/thought": "show what was thought for the last answer",
    "/retry": "answer the last question again",
    "/undo": "take back the last question and its answer",
    "/set NAME VALUE": "change temperature, seed, max_new_tokens or thinking_budget",
    "/reset": "begin anew",
    "/save FOLDER": "save the conversation with its images and videos",
    "/load FOLDER": "go on with a saved conversation",
    "/help": "this list",
    "/exit": "end; so does Ctrl-D",
}
KEYS = """\
Enter sends, Alt-Enter begins a new line; a text of several lines may also stand between \"\"\" and \"\"\".
The arrow keys bring earlier inputs back. The name of an image or video alone on a line shows it. Ctrl-C stops an answer."""
SETTINGS = {"temperature": float, "seed": int, "max_new_tokens": int, "thinking_budget": int}
QUOTES = '"""'


class CommandError(MiniCPMVError):
    """A command of the conversation that does not exist, or lacks something."""


def chat(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Images and videos to show with the first question."),
    ] = None,
    model: options.Model = ".",
    think: options.Think = False,
    auto_think: options.AutoThink = False,
    thinking_budget: options.ThinkingBudget = None,
    system: options.System = "",
    max_new_tokens: options.MaxNewTokens = 2048,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Most tokens of the conversation, whose oldest turns are dropped; 16384 by default.",
        ),
    ] = None,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    fps: options.Fps = None,
    max_slice_nums: options.MaxSliceNums = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Talk with a model about images, videos and anything else; /help in the conversation lists its commands.

    Examples:

    \b
      minicpmv chat
      minicpmv chat cat.jpg dog.jpg -m nano --think
      printf 'What is this?\\n/reset\\nAnd what are you?\\n' | minicpmv chat cat.jpg
    """
    import sys

    from rich.console import Console

    files = files or []
    settings = options.answer_options(
        think, auto_think, thinking_budget, max_new_tokens, temperature, seed, fps, max_slice_nums
    )
    console = Console(stderr=True, highlight=False)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with one_line_errors(), terminal.device_memory():
        if is_terminal:
            require("chat", "prompt_toolkit")
        media.check_media(files)
        conversation = Conversation(
            *terminal.load_shown(console, model, revision, trust_remote_code),
            console,
            terminal.shown_name(model),
            system_prompt=system,
            max_tokens=max_tokens,
            **settings,
        )
        conversation.show(files)
    if is_terminal:
        console.print("[dim]/help lists the commands, Ctrl-D ends.[/dim]")
    read = prompt_reader() if is_terminal else read_line

    failed = False
    while conversation.goes_on and (line := read(conversation.prompt)) is not None:
        try:
            with one_interrupt(), terminal.device_memory():
                conversation.take(line, read)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            terminal.write("")
            terminal.note("stopped")
        except terminal.OutputError as error:
            raise SystemExit(f"minicpmv: {error}") from error
        except ValueError as error:
            if not is_expected(error):
                raise
            failed = True
            print(f"minicpmv: {one_line(error)}", file=sys.stderr)
    if failed and not is_terminal:
        raise SystemExit(1)


def read_line(prompt: str) -> str | None:
    """The next line of a pipe; None at the end."""
    import sys

    with one_line_errors():
        try:
            return sys.stdin.buffer.readline().decode() or None
        except UnicodeDecodeError as error:
            raise CommandError(
                "stdin is text that is not UTF-8; convert it, as in: iconv -f latin1 -t utf-8"
            ) from error


class Conversation:
    """A session, what waits to be shown to the model, and the commands that concern both.

    Args:
        console: where it is seen that something happens.
        name: what the model is called.
        settings: those of a session.
    """

    def __init__(
        self, model: Any, processor: Any, console: Any, name: str, enable_thinking: bool | str, **settings: Any
    ) -> None:
        from minicpmv.chat import ChatSession  # imports torch

        self.model, self.processor, self.console, self.name = model, processor, console, name
        self.sessions = ChatSession
        self.thinking, self.settings = enable_thinking, settings
        self.session = self.sessions(model, processor, **settings)
        self.changed: dict[str, Any] = {}  # settings of answers since then
        self.waiting: list[Any] = []  # images and videos for the next question
        self.is_noted = False  # what the model knows
        self.output: Any = None  # the last answer; None where nothing came of the last question
        self.goes_on = True

    @property
    def prompt(self) -> str:
        count = len(self.waiting)
        return f"[{count} to show] >>> " if count else ">>> "

    def take(self, line: str, read: Callable[[str], str | None]) -> None:
        """Do what a line says; `read` gives the following ones of a text between quotes.

        Raises:
            MiniCPMVError: it cannot be done; the conversation is as it was.
        """
        line = line.strip()
        if line.startswith(QUOTES):
            while not (line.endswith(QUOTES) and len(line) >= 2 * len(QUOTES)):
                following = read("... ")
                if following is None:
                    raise CommandError(f"the text that began with {QUOTES} has no end; close it with {QUOTES}")
                line = f"{line}\n{following.rstrip()}"
            self.ask(line[len(QUOTES) : -len(QUOTES)].strip())
        elif files := media_names(line):
            self.show(files)
        elif line.startswith("/"):
            name, _, rest = line.partition(" ")
            self.command(name, rest.strip())
        elif line:
            self.ask(line)

    def command(self, name: str, rest: str) -> None:
        if name in ("/image", "/video", "/save", "/load") and not rest:
            raise CommandError(f"{name} needs a {'folder' if name in ('/save', '/load') else 'file'}; see /help")
        folder = Path(rest).expanduser()
        if name in ("/image", "/video"):
            self.show(file_names(rest), name.removeprefix("/"))
        elif name == "/think":
            modes: dict[str, bool | str] = {"on": True, "off": False, "auto": "auto", "": not self.thinking}
            if rest not in modes:
                raise CommandError(f"/think {rest} does not exist; choose on, off or auto")
            self.thinking = modes[rest]
            shown = {value: word for word, value in modes.items() if word}[self.thinking]
            terminal.note(f"thinking is {shown}")
        elif name == "/thought":
            if self.output is None or self.output.reasoning is None:
                raise CommandError("nothing was thought for the last answer; /think switches it on")
            terminal.write(self.output.reasoning)
        elif name == "/undo":
            self.undo()
            terminal.note("the last question and its answer are taken back")
        elif name == "/retry":
            self.retry()
        elif name == "/set":
            self.set(*rest.split(maxsplit=1))
        elif name == "/reset":
            # A new session, not session.reset(): a conversation that was loaded ends here too.
            self.session = self.sessions(self.model, self.processor, **self.settings)
            self.waiting, self.output = [], None
            terminal.note("the conversation begins anew")
        elif name == "/save":
            try:
                self.session.save(folder)
            except OSError as error:
                raise CommandError(f"the conversation cannot be saved: {error}") from error
            terminal.note(f"saved in {folder}")
        elif name == "/load":
            settings = {key: value for key, value in self.settings.items() if key != "system_prompt"}
            self.session = self.sessions.load(folder, self.model, self.processor, **settings)  # which brings its own
            self.waiting, self.output = [], None
            turns = sum(message["role"] == "user" for message in self.session.history)
            terminal.note(f"going on after {turns} question{'s' * (turns != 1)}")
        elif name == "/help":
            width = max(map(len, COMMANDS))
            terminal.write("\n".join(f"{command:{width}}  {what}" for command, what in COMMANDS.items()) + f"\n{KEYS}")
        elif name in ("/exit", "/quit", "/bye"):
            self.goes_on = False
        else:
            raise CommandError(
                f"{name} is no command; /help lists them. A question that begins with / goes in {QUOTES}"
            )

    def undo(self) -> list:
        """Take back the last turn; returns the content of its question."""
        if not any(message["role"] == "user" for message in self.session.history):
            raise CommandError("there is no question to take back; ask one first")
        self.output = None
        return self.session.undo()

    def retry(self) -> None:
        """Ask the last question again; where nothing comes of it, the old answer stays."""
        before, output = self.session, self.output
        self.session = before.fork()
        try:
            self.send(self.undo())
        finally:
            if self.output is None:
                self.session, self.output = before, output

    def set(self, name: str = "", value: str = "") -> None:
        """Change a setting of the answers that follow."""
        if name not in SETTINGS:
            raise CommandError(f"/set needs the name of a setting ({', '.join(SETTINGS)}) and its value")
        try:
            number = SETTINGS[name](value)
            if not 0 <= number < float("inf"):
                raise ValueError
        except ValueError as error:
            raise CommandError(f"/set {name} {value}: give a number, such as /set {name} 1") from error
        self.changed |= options.decoding_options(number) if name == "temperature" else {name: number}
        terminal.note(f"{name} is {number}")

    def show(self, files: list[str], kind: str | None = None) -> None:
        """Let images and videos wait for the next question: all of them, or in case of an error none."""
        parts = []
        for file in files:
            with self.console.status(f"Looking at {file}"):
                slices = self.settings.get("images_kwargs", {}).get("max_slice_nums")
                parts.append(media.media_part(self.model, self.processor, file, slices, kind))
        self.waiting += parts

    def ask(self, question: str) -> None:
        try:
            self.send([*self.waiting, {"type": "text", "text": question}])
        finally:
            if self.output is not None:  # else the images still wait
                self.waiting = []

    def send(self, content: list) -> None:
        """Ask, and write the answer as it comes; `output` tells whether something came, if only in part."""
        self.output = None
        pieces = self.session.send(content, stream=True, enable_thinking=self.thinking, **self.changed)
        try:
            with pieces:
                terminal.show_answer(pieces, self.processor, self.console)
        finally:
            self.output = pieces.output
        terminal.note_limit(pieces.output, (self.settings | self.changed)["max_new_tokens"])
        if len(content) > 1 and not self.is_noted:
            terminal.note_knowledge(self.model, self.name)
            self.is_noted = True


def file_names(text: str) -> list[str]:
    """The files of a line: one whose name has spaces, or several as in a shell.

    Raises:
        CommandError: a quote is not closed.
    """
    if media.is_file(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CommandError(f"{text}: {error}; close the quote, or put a backslash before it") from error


def media_names(line: str) -> list[str]:
    """The files of a line that holds nothing but existing images and videos, as a terminal writes it when they are
    dragged onto it; else none."""
    try:
        files = file_names(line)
    except CommandError:
        return []
    return files if all(media.looks_like_media(file) and media.is_file(file) for file in files) else []


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Ctrl-C counts once: the model stops after the token that it is writing, and until then nothing else may."""
    import signal

    def stop(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prompt_reader() -> Callable[[str], str | None]:
    """A function (prompt) -> what the user typed, None at the end; with a history over conversations and completion."""
    import os

    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter, WordCompleter, merge_completers
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    file = Path(typer.get_app_dir("minicpmv")) / "history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))  # it holds what people wrote
        history: History = FileHistory(str(file))
    except OSError as error:
        terminal.note(f"inputs are not remembered after this conversation: {error}")
        history = InMemoryHistory()

    names = [command.split()[0] for command in COMMANDS]
    files = PathCompleter(expanduser=True)
    folders = PathCompleter(expanduser=True, only_directories=True)
    arguments = {
        "/image": files,
        "/video": files,
        "/save": folders,
        "/load": folders,
        "/think": {"on", "off", "auto"},
        "/set": set(SETTINGS),
    }
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        completer=merge_completers(
            # Of NestedCompleter's own words none would fit behind a slash.
            [WordCompleter(names, sentence=True), NestedCompleter.from_nested_dict(arguments)],
            deduplicate=True,
        ),
        complete_while_typing=False,
        prompt_continuation="... ",
    )

    def read(prompt):
        while True:
            try:
                return session.prompt(prompt)
            except KeyboardInterrupt:
                terminal.note("Ctrl-D or /exit ends the conversation")
            except EOFError:
                return None

    return read
