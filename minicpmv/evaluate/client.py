"""Chat completions over HTTP from any OpenAI-compatible API, several at a time: of models that are measured, and of judges.

What is special:
- failed connections, timeouts, and the answers 408, 409, 429 and 5xx are tried again by OpenAI's own client, after waits
  that double from half a second up to eight, or as long as the API asks for;
- whatever fails for good is explained in one line that names the remedy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from minicpmv.errors import MiniCPMVError, require


SHOWN = 300  # characters of an API's own message

Item = TypeVar("Item")
Result = TypeVar("Result")


class EndpointError(MiniCPMVError):
    """An endpoint cannot be asked, or does not answer: the message says why and what to do."""


class RefusedError(EndpointError):
    """An endpoint refuses one request; it may take others."""


class ChatClient:
    """One model behind one address.

    Args:
        url: of the API; it mostly ends with `/v1`.
        model: the name that the API knows.
        api_key: sent along; servers of your own mostly need none.
        concurrency: most requests in flight.
        retries: of each request.
        timeout: seconds for each try.
        token_parameter: what the API calls the most tokens of a reply: `"max_tokens"`, `"max_completion_tokens"`, or
            None to send no limit.
        temperature: `"question"`: as the question wants it, mostly greedy; a number: this one instead, and nothing else
            about decoding; None: nothing at all, since models that reason may refuse it.
        reasoning_effort: such as `"low"`, sent as it is; None: not sent.
        extra_body: more fields for every request.

    Raises:
        MissingPackageError: the client, openai, is not installed.
        EndpointError: `url` is no address.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 600.0,
        token_parameter: str | None = "max_tokens",
        temperature: float | Literal["question"] | None = "question",
        reasoning_effort: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ):
        require("endpoint", "openai")
        from openai import OpenAI

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{url!r} is not an address such as http://127.0.0.1:8000/v1")
        # To be shown: without a password.
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.model, self.concurrency = model, concurrency
        self.token_parameter, self.temperature = token_parameter, temperature
        self.reasoning_effort, self.extra_body = reasoning_effort, dict(extra_body or {})
        self.versions = {"openai": version("openai")}
        # The client insists on a key; a server of one's own ignores it.
        self._openai = OpenAI(base_url=url, api_key=api_key or "none", max_retries=retries, timeout=timeout)

    def check(self) -> None:
        """Ask the API for its models, before any question is made.

        Raises:
            EndpointError: it cannot be reached, or does not know the model.
        """
        import openai

        try:
            served = [model.id for model in self._openai.models.list()]
        except (openai.NotFoundError, openai.PermissionDeniedError):
            return  # it does not tell
        except openai.OpenAIError as error:
            raise self._explained(error, "a list of models") from error
        except (AttributeError, TypeError, ValueError):
            raise EndpointError(f"{self.url} does not answer as OpenAI's API does: it mostly ends with /v1") from None
        if served and self.model not in served:
            raise EndpointError(f"{self.url} does not serve {self.model}; it serves {', '.join(served[:10])}")

    def settings(self) -> dict[str, Any]:
        """Who is asked and what every request says, for JSON; never the key."""
        return {
            "endpoint": self.url,
            "model": self.model,
            "token_parameter": self.token_parameter,
            "temperature": self.temperature,
            "reasoning_effort": self.reasoning_effort,
            "extra_body": self.extra_body,
        }

    def request(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int, decoding: Mapping[str, Any], **more: Any
    ) -> dict[str, Any]:
        """The body of a request, by this API's habits.

        Args:
            messages: in OpenAI's form.
            decoding: temperature and its like, as the question wants them.
            more: further fields; `extra_body` outdoes them.
        """
        if self.temperature != "question":
            decoding = {} if self.temperature is None else {"temperature": self.temperature}
        fields = {**decoding, **more}
        if self.token_parameter is not None:
            fields[self.token_parameter] = max_tokens
        if self.reasoning_effort is not None:
            fields["reasoning_effort"] = self.reasoning_effort
        return {"model": self.model, "messages": list(messages), **fields, **self.extra_body}

    def complete(self, what: str, request: Mapping[str, Any]) -> Any:
        """One chat completion, as OpenAI's client returns it, with at least one choice.

        Args:
            what: is asked, for messages: "question 3 of mmstar".
            request: as `request` makes it.

        Raises:
            RefusedError: this request is refused.
            EndpointError: every try failed, or what came is no chat completion.
        """
        import openai

        # All but two fields go through extra_body, which takes names that the client does not know.
        others = {name: value for name, value in request.items() if name not in ("model", "messages")}
        try:
            reply = self._openai.chat.completions.create(
                model=request["model"], messages=request["messages"], extra_body=others
            )
        except openai.OpenAIError as error:
            raise self._explained(error, what) from error
        if not getattr(reply, "choices", None):
            raise EndpointError(f"{self.url} did not answer {what} with a chat completion: {reply!s:.{SHOWN}}")
        return reply

    def _explained(self, error: Exception, what: str) -> EndpointError:
        import openai

        reason = " ".join(str(error).split())[:SHOWN]
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self.url} took too long: allow more time (--timeout), or less --concurrency")
        if isinstance(error, openai.APIConnectionError):
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return EndpointError(f"{self.url} cannot be reached{cause}: is the server running, and is the port right?")
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return EndpointError(
                f"{self.url} refuses the key: name the variable that holds it (--api-key-env). {reason}"
            )
        if isinstance(error, openai.NotFoundError):
            return EndpointError(
                f"{self.url} knows no model {self.model}, or is not the address of an API (it mostly ends with /v1). {reason}"
            )
        if isinstance(error, (openai.RateLimitError, openai.InternalServerError)):
            return EndpointError(
                f"{self.url} failed on every try: run the same command again later, with less --concurrency. {reason}"
            )
        return RefusedError(f"{self.url} refuses {what}. {reason}")


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], lanes: int) -> Iterator[tuple[Item, Result]]:
    """What `work` makes of each item, several at a time, each as soon as it is there.

    Raises:
        BaseException: the first one that `work` raised, after the items under way are done.
    """
    todo: SimpleQueue[Item] = SimpleQueue()
    done: SimpleQueue[Any] = SimpleQueue()  # (item, result, error), and None as each lane ends
    for item in items:
        todo.put(item)
    stop = Event()

    def lane() -> None:
        while not (stop.is_set() or todo.empty()):
            try:
                item = todo.get_nowait()
            except Empty:  # another lane was faster
                break
            try:
                done.put((item, work(item), None))
            except BaseException as error:  # raised again below, in the thread that waits
                stop.set()
                done.put((item, None, error))
        done.put(None)

    # Not a pool: Python would wait for its threads at the end of an interrupted run, for minutes where models think.
    threads = [Thread(target=lane, daemon=True) for _ in range(min(lanes, len(items)))]
    for thread in threads:
        thread.start()
    failure, running = None, len(threads)
    try:
        while running:
            if (found := done.get()) is None:
                running -= 1
            elif found[2] is not None:
                failure = failure or found[2]
            else:
                yield found[0], found[1]
    finally:
        stop.set()
    if failure is not None:  # not before: what was under way has been answered, and paid for
        raise failure
