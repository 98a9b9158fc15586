"""What Prometheus reads at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minicpmv.serving.engine import LocalEngine
from minicpmv.serving.scheduler import Finish


FIRST_TOKEN = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)  # seconds
NEXT_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
REQUEST = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: LocalEngine) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter("minicpmv_requests", "Requests", ["route", "status"], registry=own)
        self._seconds = Histogram(
            "minicpmv_request_seconds", "Whole requests", ["route"], buckets=REQUEST, registry=own
        )
        self._prompt = Counter("minicpmv_prompt_tokens", "Tokens of prompts", registry=own)
        self._cached = Counter("minicpmv_cached_tokens", "Of them, not read again", registry=own)
        self._generated = Counter("minicpmv_generated_tokens", "Tokens of thoughts and answers", registry=own)
        first, following = "Seconds from a request that was read to its first token", "Seconds a token after the first"
        self._first = Histogram("minicpmv_time_to_first_token_seconds", first, buckets=FIRST_TOKEN, registry=own)
        self._next = Histogram("minicpmv_inter_token_seconds", following, buckets=NEXT_TOKEN, registry=own)
        for name, text, value in (
            ("minicpmv_requests_running", "Answers that are written", lambda: engine.stats().running),
            ("minicpmv_requests_waiting", "Requests that wait for room", lambda: engine.stats().waiting),
            ("minicpmv_prefix_cache_bytes", "States of earlier prompts", lambda: engine.stats().prefix_bytes),
        ):
            Gauge(name, text, registry=own).set_function(value)
        engine.on_finish = self.finished

    def finished(self, finish: Finish) -> None:
        """Count an answer."""
        self._prompt.inc(finish.prompt_tokens)
        self._cached.inc(finish.cached_tokens)
        self._generated.inc(finish.generated_tokens)
        self._first.observe(finish.seconds_to_first)
        if finish.generated_tokens > 1:
            self._next.observe((finish.seconds - finish.seconds_to_first) / (finish.generated_tokens - 1))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
