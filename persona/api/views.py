"""How the words of the domain look as JSON. Times are ISO 8601 in UTC."""

from datetime import datetime
from typing import Any

from jobs.figures import Figures
from persona.chat_reply import Reply, Sheet
from persona.domain import Entry, Fact, Run, User, Version
from persona.engine.protocol import Progress
from persona.prompt import Used
from storage.events import Letter, Row, Source
from storage.runs import ExampleRow
from storage.users import Key


def time(value: datetime | None) -> str | None:
    return value.isoformat() if value else None


def user(one: User) -> dict[str, Any]:
    return {
        "name": one.name,
        "learn": one.learn,
        "paused": one.paused,
        "active": one.active,
        "created": time(one.created),
    }


def key(one: Key) -> dict[str, Any]:
    return {
        "id": one.id,
        "label": one.label,
        "learn": one.learn,
        "created": time(one.created),
        "last_used": time(one.last_used),
        "revoked": time(one.revoked),
    }


def entry(one: Entry) -> dict[str, Any]:
    return {
        "id": one.id,
        "ts": time(one.ts),
        "role": one.role,
        "text": one.text,
        "origin": one.origin,
        "conversation": one.conversation,
        "tokens": one.tokens,
        "parent": one.parent,
        "context": [{"author": line.author, "text": line.text} for line in one.context],
        "version": one.version,
        "finish": one.finish,
        "rating": one.rating,
        "correction": one.correction,
    }


def event(one: Row) -> dict[str, Any]:
    return {
        "id": one.id,
        "kind": one.kind,
        "source": one.source or None,
        "seq": one.seq,
        "ts": time(one.ts),
        "received": time(one.received),
        "entry": one.entry_id,
    }


def source(one: Source) -> dict[str, Any]:
    return {
        "source": one.source or None,
        "last_seq": one.last_seq,
        "missing": one.missing,
        "gaps": one.gaps,
        "events": one.events,
        "duplicates": one.duplicates,
        "last": time(one.last),
    }


def fact(one: Fact) -> dict[str, Any]:
    return {"kind": one.kind, "key": one.key, "value": one.value, "ts": time(one.ts)}


def letter(one: Letter) -> dict[str, Any]:
    """A payload that is no text is shown as its hexadecimal digits."""
    text = None
    if one.payload is not None:
        try:
            text = one.payload.decode()
        except UnicodeDecodeError:
            text = one.payload.hex()
    return {
        "id": one.id,
        "user": one.name or None,
        "kind": one.kind or None,
        "source": one.source or None,
        "reason": one.reason,
        "detail": one.detail,
        "count": one.count,
        "first": time(one.first),
        "last": time(one.last),
        "payload": text,
    }


def version(one: Version, active: int | None, live: Figures | None = None) -> dict[str, Any]:
    return {
        "number": one.number,
        "model": f"persona@{one.number}",
        "state": one.state,
        "active": one.number == active,
        "watermark": one.watermark,
        "parent": one.parent,
        "base": one.base,
        "bytes": one.bytes,
        "sha256": one.sha256,
        "created": time(one.created),
        "run": one.run_id,
        "metrics": one.metrics,
        "rolled_back": one.rolled_back,
        "live": figures(live) if live else None,
    }


def figures(one: Figures) -> dict[str, Any]:
    """What the live check says of a version. `gain` and `interval` in nats per token, `against` 0: the bare base."""
    return {
        "against": one.against or 0,
        "messages": one.messages,
        "tokens": one.tokens,
        "gain": one.gain.mean,
        "interval": [one.gain.lower, one.gain.upper],
        "verdict": one.word,
    }


def run(one: Run, progress: Progress | None = None) -> dict[str, Any]:
    return {
        "id": one.id,
        "state": one.state,
        "created": time(one.created),
        "started": time(one.started),
        "ended": time(one.ended),
        "reason": one.reason,
        "version": one.version,
        "metrics": one.metrics,
        "progress": _progress(progress) if progress and not one.state.ended else None,
    }


def example(one: ExampleRow) -> dict[str, Any]:
    return {"entry": one.entry_id, "frame": one.frame, "tokens": one.tokens, "weight": one.weight}


def sheet(one: Sheet) -> dict[str, Any]:
    """A dry run: what the model would read, which entries stand in it, and which version would answer."""
    return {
        "model": one.voice.name,
        "version": one.voice.version.number if one.voice.version else None,
        "watermark": one.voice.version.watermark if one.voice.version else 0,
        "recorded": one.recorded,
        "tokens": len(one.prompt.rendered.tokens),
        "messages": [{"role": message.role, "content": message.text} for message in one.prompt.messages],
        "used": [_used(used) for used in one.prompt.used],
    }


def reply_headers(reply: Reply) -> dict[str, str]:
    """The turn's id is known once the reply is on record: in a stream it stands in the last chunk instead."""
    headers = {
        "x-persona-recorded": "true" if reply.recorded else "false",
        "x-persona-version": str(reply.version.number if reply.version else 0),
    }
    if reply.conversation:
        headers["x-persona-conversation"] = reply.conversation
    if reply.turn is not None:
        headers["x-persona-turn"] = str(reply.turn)
    return headers


def _used(one: Used) -> dict[str, Any]:
    return {"entry": one.entry_id, "key": one.key, "part": one.part, "tokens": one.tokens}


def _progress(one: Progress) -> dict[str, Any]:
    return {
        "step": one.step,
        "steps": one.steps,
        "loss": one.loss,
        "tokens": one.tokens,
        "seconds": one.seconds,
        "skipped": one.skipped,
        "resumed": one.resumed,
    }
