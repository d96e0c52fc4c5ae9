"""Structured lines on stdout: ours as they are written, those of libraries by their place only.

User text is in no line, at any level. A library's message or an exception's text may quote a user, so neither is ever
shown: what remains is who complained, where in the code, and the kind of the error.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from persona.settings import Log

log = structlog.get_logger()


def configure(settings: Log, file: TextIO | None = None) -> None:
    """Set up logging for this process, to `file` in place of stdout."""
    level = getattr(logging, settings.level.upper())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _only_kind,
            _renderer(settings.json_lines),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Lines(file or sys.stdout),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[Foreign(logging.WARNING)], level=logging.WARNING, force=True)


def loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the event loop reports of tasks and callbacks that nobody awaits."""
    error = context.get("exception")
    log.error("event loop error", kind=type(error).__name__ if error else "none", where=_place(error))


class _Lines:
    """Writes lines. One that cannot be written, on a full disk or to a reader that is gone, is lost: whoever logs goes
    on, and a last resort that logs stays one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            self._file.write(line + "\n")
            self._file.flush()

    debug = info = warning = error = critical = msg


class Foreign(logging.Handler):
    """Lines of libraries: name, place and kind of error, never the message."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        write = log.error if record.levelno >= logging.ERROR else log.warning
        write("library", logger=record.name, where=f"{record.filename}:{record.lineno}", kind=kind)


def _only_kind(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An exception that somebody logs becomes its kind and place."""
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exception() if given else None
    if error is not None:
        event["kind"], event["where"] = type(error).__name__, _place(error)
    return event


def _place(error: BaseException | None) -> str:
    trace = error.__traceback__ if error else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}" if trace else "?"


def _renderer(json_lines: bool) -> Any:
    return structlog.processors.JSONRenderer() if json_lines else structlog.dev.ConsoleRenderer(colors=False)
