"""The options of `minicpmv evaluate`, declared once, and what its commands make of them."""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv.commands import options, terminal
from minicpmv.errors import MiniCPMVError, require


if TYPE_CHECKING:
    from rich.table import Table

    from minicpmv.evaluate.endpoint import Endpoint
    from minicpmv.evaluate.judging import JudgeModel

DEFAULT_FOLDER = Path("runs")
JUDGE_OPTIONS = (
    "concurrency",
    "retries",
    "timeout",
    "token_parameter",
    "temperature",
    "reasoning_effort",
    "extra_body",
)  # of ChatClient
MODES: dict[str, Any] = {"on": True, "off": False, "auto": "auto"}


class EvaluateError(MiniCPMVError):
    """Options that do not go together, or a key that is not there."""


class Scoring(str, Enum):
    """Versions of the reference's rules."""

    before = "2025-07"
    published = "2025-09"
    current = "current"


class Clips(str, Enum):
    """How a video is sent to an endpoint."""

    frames = "frames"
    video_url = "video_url"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Model folder or Hub repository; this folder by default. With --endpoint, the name that it knows.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Samples for each row and seed; a whole data set by default, and 100 of drawn ones."
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of drawn samples.")]
Seeds = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Several seeds instead of --seed, such as 0,1,2: reports mean and spread."),
]
Rows = Annotated[str | None, typer.Option(metavar="LIST", help="Only these rows, such as count,chart.")]
Thinking = Annotated[
    str,
    typer.Option(
        metavar="WHEN",
        help="on, off, auto, or the rows that think, such as count,chart. Some rows decide it themselves.",
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Questions the model answers at once.")]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help=f"Folder for answers and results; by default one for each setting in {DEFAULT_FOLDER}/."
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Also write {row: {metric: value, "n": samples}} to this file.'),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-compatible API, such as http://127.0.0.1:8000/v1, instead of loading a model.",
    ),
]
ApiKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="With --endpoint: environment variable that holds the API key.")
]
Concurrency = Annotated[int, typer.Option(metavar="N", min=1, help="With --endpoint: requests in flight at once.")]
Retries = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="With --endpoint: further tries after a timeout or an answer 429 or 5xx."),
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="With --endpoint: limit of each try.")]
ClipsAs = Annotated[Clips, typer.Option(help="With --endpoint: send a video as images, or as a file.")]
Frames = Annotated[int, typer.Option(metavar="N", min=1, help="With --endpoint: images sent for a video.")]
ProcessorOptions = Annotated[
    bool,
    typer.Option(
        "--processor-options",
        help="With --endpoint: send a question's image options as mm_processor_kwargs (vLLM, minicpmv serve).",
    ),
]
NoThinkingSwitch = Annotated[
    bool,
    typer.Option(
        "--no-thinking-switch",
        help="With --endpoint: do not send chat_template_kwargs.enable_thinking, which some APIs refuse.",
    ),
]
ExtraBody = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='With --endpoint: more fields for every request, such as \'{"reasoning_effort": "low"}\'.'
    ),
]
TokenParameter = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="With --endpoint: what the API calls the most tokens of a reply: max_tokens, max_completion_tokens, or none.",
    ),
]
Temperature = Annotated[
    str,
    typer.Option(
        metavar="T",
        help="With --endpoint: a number for all questions; none, to send nothing about decoding; or question, as each wants.",
    ),
]
ReasoningEffort = Annotated[
    str | None, typer.Option(metavar="LEVEL", help="With --endpoint: sent as it is, such as low or high.")
]
Detail = Annotated[
    str | None,
    typer.Option(metavar="LEVEL", help="With --endpoint: of images, as OpenAI's API takes it: low or high."),
]
FrameSize = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="With --endpoint: longest side of frames in pixels, sent as JPEG."),
]

# --- Public benchmarks ---

AsPublished = Annotated[
    bool,
    typer.Option(
        "--as-published",
        help="Ask as the authors' own code does: their prompts, thinking, sampling or beams, small images enlarged, "
        "three runs where they think. Plain by default: greedy, general prompts, one run.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the data; by default where `minicpmv evaluate get` puts them."),
]
Fixtures = Annotated[
    bool,
    typer.Option(
        "--fixtures",
        help="About 20 drawn questions of each data set instead of the data, with answers of 32 tokens: to see that "
        "everything runs.",
    ),
]
Rules = Annotated[
    Scoring,
    typer.Option("--scoring", help="Time of the rules, where they changed; 2025-09 is that of the published figures."),
]
PublicRules = Annotated[
    Scoring | None,
    typer.Option(
        "--scoring",
        help="Time of the rules, where they changed: 2025-09, that of the published figures, with --as-published; else current.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Rules without the reference's defects: not comparable with published figures."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Most tokens of an answer, below the suites' own limits."),
]
PublicSamples = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Questions of each row and seed; all by default.")
]
PublicSeeds = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Seeds of what is drawn by chance, such as 0,1,2; by default 0, and 0,1,2 where the published figure is a mean "
        "of three.",
    ),
]
Fps = Annotated[
    float, typer.Option(metavar="N", min=0.01, callback=options.finite, help="Videos: frames a second to look at.")
]
MaxNumFrames = Annotated[
    int, typer.Option(metavar="N", min=1, help="Videos: groups of frames, before frames are packed more tightly.")
]
MaxNumPacking = Annotated[int, typer.Option(metavar="N", min=1, max=6, help="Videos: most frames in a group.")]
Packing = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Videos: ask every question with the same frames in groups of so many, such as 1,3,6."
    ),
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        help="A question that cannot be asked (a missing video, an endpoint's filter) counts as wrong, instead of ending the run.",
    ),
]
JudgeEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="OpenAI-compatible API of a language model that judges where rules do not decide."
    ),
]
JudgeModelName = Annotated[str | None, typer.Option("--judge-model", metavar="NAME", help="The name that it knows.")]
JudgeKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable that holds the judge's API key.")
]
JudgePrices = Annotated[
    str | None,
    typer.Option(
        metavar="IN,OUT",
        help="Prices of a million tokens that the judge reads and writes, to tell the cost beforehand.",
    ),
]
JudgeCache = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the judge's replies; ~/.cache/minicpmv/judge by default.")
]
JudgeOptions = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='How the judge\'s API wants its requests, such as \'{"token_parameter": "max_completion_tokens", '
        '"temperature": null}\'.',
    ),
]
JudgeYes = Annotated[
    bool,
    typer.Option("--judge-yes", help="Agree to what asking the judge costs; without it, a run ends by telling that."),
]


def names(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",")] if text else None


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from error


def json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object")
    return value


def thinking_of(text: str) -> Any:
    return MODES[text] if text in MODES else names(text) or []


@dataclass(kw_only=True)
class EndpointOptions:
    """The options of a command that may ask an endpoint. [`with_endpoint`] adds them to its own."""

    endpoint: EndpointUrl = None
    api_key_env: ApiKeyEnv = None
    concurrency: Concurrency = 8
    retries: Retries = 6
    timeout: Timeout = 600
    clips: ClipsAs = Clips.frames
    frames: Frames = 32
    frame_size: FrameSize = None
    processor_options: ProcessorOptions = False
    no_thinking_switch: NoThinkingSwitch = False
    token_parameter: TokenParameter = "max_tokens"
    temperature: Temperature = "question"
    reasoning_effort: ReasoningEffort = None
    detail: Detail = None
    extra_body: ExtraBody = None

    def __post_init__(self) -> None:
        self.fields = json_object(self.extra_body)

    def check(self, model: str | None) -> None:
        """Refuse an endpoint that cannot be asked, before anything is read."""
        if self.endpoint:
            require("endpoint", "openai")
            if model is None:
                raise EvaluateError("--endpoint also needs --model NAME: the name that the endpoint knows")

    def open(self, model: str) -> "Endpoint | None":
        """The endpoint, which is there and knows the model; None where the options name none."""
        if not self.endpoint:
            return None
        from minicpmv.evaluate.endpoint import Endpoint

        opened = Endpoint(
            self.endpoint,
            model,
            api_key=api_key("--api-key-env", self.api_key_env),
            concurrency=self.concurrency,
            retries=self.retries,
            timeout=self.timeout,
            clips=self.clips.value,
            frames=self.frames,
            frame_size=self.frame_size,
            processor_options=self.processor_options,
            thinking_switch=not self.no_thinking_switch,
            token_parameter=None if self.token_parameter == "none" else self.token_parameter,
            temperature=temperature_of(self.temperature),
            reasoning_effort=self.reasoning_effort,
            detail=self.detail,
            extra_body=self.fields,
        )
        opened.check()
        return opened


def with_endpoint(command: Callable[..., None]) -> Callable[..., None]:
    """The command with [`EndpointOptions`] as options of its own, where its signature has `asked`."""
    added = inspect.signature(EndpointOptions).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        command(asked=EndpointOptions(**{name: given.pop(name) for name in added}), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += added.values() if parameter.name == "asked" else [parameter]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # this is what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def open_answerer(
    model: str | None,
    revision: str | None,
    trust_remote_code: bool,
    batch_size: int,
    device: Any = None,
    asked: EndpointOptions | None = None,
) -> tuple[str, Any]:
    """The name to show and the answerer: the endpoint where one is named, else the model in this process.

    Args:
        device: of this process; None where it is the only one.
    """
    if model and asked and (endpoint := asked.open(model)):
        return model, endpoint
    from minicpmv.checkpoint import attend_without_plans, load
    from minicpmv.evaluate.answerers import LocalModel

    name = model or "."
    attend_without_plans()
    device_map = "auto" if device is None else {"": device}
    loaded = load(name, revision=revision, trust_remote_code=trust_remote_code, device_map=device_map)
    return name, LocalModel(*loaded, batch_size)


def temperature_of(text: str) -> float | str | None:
    if text in ("question", "none"):
        return None if text == "none" else text
    try:
        return options.finite(float(text))
    except ValueError as error:
        raise typer.BadParameter(f"--temperature {text!r} is no number, and neither question nor none") from error


def api_key(flag: str, variable: str | None) -> str | None:
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if variable and not key:
        raise EvaluateError(f"{flag}: the environment has no variable {variable}, or it is empty")
    return key


def open_judge(
    endpoint: str | None,
    model: str | None,
    key_env: str | None,
    prices: str | None,
    cache: Path | None,
    more: dict[str, Any],
    yes: bool,
) -> "JudgeModel | None":
    """The judge that the options name, which is there and knows the model; None where they name none."""
    if not endpoint:
        if model:
            raise EvaluateError("--judge-model also needs --judge-endpoint URL")
        return None
    if model is None:
        raise EvaluateError("--judge-endpoint also needs --judge-model NAME: the name that it knows")
    if unknown := sorted(set(more) - set(JUDGE_OPTIONS)):
        raise EvaluateError(f"--judge-options: no option {', '.join(unknown)}; there are {', '.join(JUDGE_OPTIONS)}")
    from minicpmv.evaluate.client import ChatClient
    from minicpmv.evaluate.judging import JudgeModel

    client = ChatClient(endpoint, model, api_key=api_key("--judge-key-env", key_env), **more)
    client.check()
    return JudgeModel(client, cache, confirmed=yes, prices=two_numbers(prices) if prices else None)


def two_numbers(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not two numbers such as 0.15,0.6") from error
    return first, second


def run_name(benchmark: str, model: str, settings: dict[str, Any]) -> str:
    """What a run's folder is called unless it is named."""
    from minicpmv.evaluate.sample_log import fingerprint

    return f"{benchmark}-{terminal.shown_name(model).replace('/', '-')}-{fingerprint(settings)[:8]}"


def full_name(model: str) -> str:
    """A model for the record: that of `.` is the folder's."""
    return model if Path(model).name else str(Path(model).resolve())


def show_results(results: dict[str, Any]) -> str:
    """The table of one run: a line for each metric of each row, and what is to be known about them."""
    import io
    import sys

    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, force_terminal=sys.stdout.isatty())
    console.print(as_table(results))
    for note in notes(results):
        console.print(note, markup=False, highlight=False)
    return text.getvalue()


def as_table(results: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from minicpmv.evaluate.comparison import percent, sample_counts, title_of

    several = len(results["seeds"]) > 1
    table = Table(
        title=f"{title_of(results)}: {escape(results['model'])}",
        caption=f"{' or '.join(map(str, sample_counts(results)))} samples a row, seed{'s' * several} {', '.join(map(str, results['seeds']))}"
        + "; mean ± standard deviation over seeds" * several,
    )
    for heading in ("row", "metric"):
        table.add_column(heading)
    for heading in ("%", "n"):
        table.add_column(heading, justify="right")
    for row, summary in results["rows"].items():
        name, count = row + " ↓" * summary["lower_is_better"], str(summary["n"])
        for metric, value in summary["mean"].items():
            std = summary["std"][metric]
            if metric in summary.get("points", ()) and value is not None:
                figure = f"{value:.4g}" + ("" if std is None else f" ± {std:.2g}") + " points"
            else:
                figure = percent(value, std)
            table.add_row(name, metric, figure, count)
            name = count = ""
    for name, value in results.get("averages", {}).items():
        table.add_row(name, "average", percent(value), "")
    return table


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader has to know before comparing the figures with published ones."""
    from minicpmv.evaluate.comparison import frames_in_words

    found = []
    for row, summary in results["rows"].items():
        if summary.get("judge") == "rules only" and summary["undecided"]:
            found.append(f"{row}: rules only; {summary['undecided']} answers are left to a judge (--judge-endpoint)")
        if shown := summary.get("video"):
            cost = f"{summary['prompt_tokens']:.0f} tokens read and " if summary["prompt_tokens"] else ""
            cost += f"{summary['seconds']:.2f} seconds a question" if summary["seconds"] else "seconds unknown"
            found.append(f"{row}: frames of a video: {frames_in_words(shown)}; {cost}")
        if summary.get("failed"):
            found.append(
                f"{row}: {summary['failed']} questions could not be asked, and count as wrong: see error in the log"
            )
        if summary.get("cut_off"):
            found.append(f"{row}: {summary['cut_off']} answers were cut off at the most tokens")
    return found
