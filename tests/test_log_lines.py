"""A line of the log that cannot be written is lost, and nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from persona import logs
from persona.settings import Log


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_threat_23_a_log_on_a_full_disk_fails_nobody() -> None:
    with Path("/dev/full").open("w", encoding="utf-8", buffering=1) as full:
        logs.configure(Log(), full)
        structlog.get_logger().error("a line", user="ann")
        structlog.get_logger().info("another")
        os.close(full.fileno())  # else closing the file would tell what could not be written
        structlog.get_logger().warning("and one to a closed file")
        with pytest.raises(OSError, match="Bad file descriptor"):
            full.close()


def test_lines_are_written_at_once(tmp_path: Path) -> None:
    place = tmp_path / "log"
    with place.open("w", encoding="utf-8") as file:
        logs.configure(Log(json_lines=True), file)
        structlog.get_logger().info("said")
        assert '"event":"said"' in place.read_text(encoding="utf-8").replace(" ", "")
