"""Numbers for Prometheus, in a registry of our own.

No label ever holds a name, a key or a word of a user: routes are templates, the rest are closed sets.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from persona.chat_reply import Reply
from persona.domain import Finish
from persona.engine.protocol import Health

_ENGINE = {
    "running": "sequences that are decoded",
    "waiting": "requests that wait for a place",
    "resident": "adapters on the device",
    "resident_bytes": "bytes of these",
    "adapter_pages": "pages of memory that they take",
    "host": "adapters in RAM, from where they come back without their files",
    "host_bytes": "bytes of these",
    "loads": "adapters brought to the device since the engine started",
    "disk_loads": "of these, adapters read from disk",
    "loaded_bytes": "bytes of adapters brought to the device",
    "free_pages": "pages of memory that a request could get",
    "cached_pages": "of these, pages that hold the beginning of earlier prompts",
    "prompt_tokens": "tokens of prompts since the engine started",
    "cached_tokens": "of these, tokens that the prefix cache had",
    "pages": "pages of memory in all",
    "training": "1 while a run trains",
    "steps": "forward passes since the engine started",
    "slices": "training slices since the engine started",
    "generated": "tokens generated since the engine started",
    "memory": "bytes that the engine occupies",
    "base_bytes": "bytes of the base weights",
}


class Counted(Collector):
    """A counter by one label whose numbers somebody else counts."""

    def __init__(self, name: str, text: str, label: str, read: Callable[[], Mapping[str, int]]) -> None:
        self._name, self._text, self._label, self.read = name, text, label, read

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=[self._label])
        for value, number in self.read().items():
            family.add_metric([value], number)
        yield family


class Metrics:
    """What the service counts, and what it asks the engine at each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self.requests = counter("persona_requests", "HTTP requests answered", ["method", "route", "status"])
        self.seconds = Histogram(
            "persona_request_seconds", "time to answer, streams to their end", ["route"], registry=self.registry
        )
        self.replies = counter("persona_replies", "replies by the way they ended", ["finish"])
        self.unrecorded = counter("persona_replies_unrecorded", "replies that history does not hold")
        self.prompt_tokens = counter("persona_prompt_tokens", "tokens of prompts")
        self.reply_tokens = counter("persona_reply_tokens", "tokens of replies")
        self.refused_keys = counter("persona_refused_keys", "requests with no key or a wrong one")
        self.streams = gauge("persona_replies_running", "replies under way")
        self.engine_up = gauge("persona_engine_up", "1 if the engine answers")
        self.mqtt_up = gauge("persona_mqtt_up", "1 while there is a broker")
        self.events = Counted("persona_events", "events by what became of them", "outcome", dict)
        self.dead_letters = Counted("persona_dead_letters", "refused events by reason", "reason", dict)
        self.mqtt = Counted("persona_mqtt", "connections to the broker, and sessions that it lost", "what", dict)
        self.live = Counted("persona_live_checks", "messages that judged a version, versions rolled back", "what", dict)
        for counted in (self.events, self.dead_letters, self.mqtt, self.live):
            self.registry.register(counted)
        self._engine = {name: gauge(f"persona_engine_{name}", text) for name, text in _ENGINE.items()}

    def reply(self, reply: Reply) -> None:
        """Count a reply that has ended."""
        self.replies.labels(reply.finish or Finish.ABORT).inc()
        self.prompt_tokens.inc(len(reply.sheet.prompt.rendered.tokens))
        self.reply_tokens.inc(reply.tokens)
        if not reply.recorded:
            self.unrecorded.inc()

    def page(self, health: Health | None, running: int) -> bytes:
        """The text that Prometheus scrapes."""
        self.streams.set(running)
        self.engine_up.set(health is not None)
        for name, value in self._engine.items():
            value.set(getattr(health, name) if health else 0)
        return generate_latest(self.registry)
