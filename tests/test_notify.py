"""The words between persona and its service manager, over real sockets."""

import os
import socket
import sys
from pathlib import Path

import pytest
from manager import Manager

from persona.errors import ConfigurationError
from persona.notify import Supervisor, inherited

ROOT = Path(__file__).parent.parent
OWN = str(os.getpid())


@pytest.mark.parametrize("abstract", [False, True])
def test_words_arrive_at_a_path_and_at_an_abstract_name(abstract: bool) -> None:
    with Manager(abstract=abstract) as manager:
        Supervisor.of({"NOTIFY_SOCKET": manager.address}).tell(READY=1, STATUS="Serving")
        assert manager.hear(5) == {"READY": "1", "STATUS": "Serving"}


def test_without_a_manager_every_word_is_lost_without_harm() -> None:
    manager = Supervisor.of({})
    manager.tell(READY=1)
    assert (manager.address, manager.watchdog) == (None, None)


def test_a_manager_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    Supervisor.of({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell(READY=1)


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    assert Supervisor.of({"WATCHDOG_USEC": "3000000"}).watchdog == 3.0
    assert Supervisor.of({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": OWN}).watchdog == 3.0
    assert Supervisor.of({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog is None
    assert Supervisor.of({"WATCHDOG_USEC": "0"}).watchdog is None


@pytest.mark.parametrize(
    "environ",
    [{"NOTIFY_SOCKET": "relative"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "-1"}, {"WATCHDOG_USEC": "²"}],
    ids=str,
)
def test_nonsense_of_a_manager_is_one_sentence(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(environ))):
        Supervisor.of(environ)


def test_no_socket_is_taken_that_was_meant_for_another_process() -> None:
    assert inherited({}) is None
    assert inherited({"LISTEN_FDS": "1", "LISTEN_PID": "1"}) is None
    assert inherited({"LISTEN_FDS": "1"}) is None
    assert inherited({"LISTEN_FDS": "0", "LISTEN_PID": OWN}) is None


@pytest.mark.parametrize("count", ["2", "99999999999", "one", "-1", ""])
def test_a_wrong_number_of_sockets_is_refused(count: str) -> None:
    with pytest.raises(ConfigurationError, match=r"LISTEN_FDS|single ListenStream"):
        inherited({"LISTEN_FDS": count, "LISTEN_PID": OWN})


PROGRAM = """
import os, sys
from persona.errors import ConfigurationError
from persona.notify import inherited
try:
    taken = inherited(os.environ)
    sys.exit(f"{taken.getsockname()[1]} inheritable {taken.get_inheritable()}")
except ConfigurationError as error:
    sys.exit(error.message)
"""


def told(listening: socket.socket, tmp_path: Path) -> str:
    """What a process says that is given this as its socket."""
    log = tmp_path / "log"
    with Manager() as manager:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        manager.start([sys.executable, "-c", PROGRAM], environ, listening=listening, log=log)
        assert manager.process is not None
        manager.process.wait(30)
    return log.read_text().strip()


def test_the_listening_socket_of_the_manager_is_taken_and_handed_to_no_child(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as good:
        assert told(good, tmp_path) == f"{good.getsockname()[1]} inheritable False"


def test_a_socket_that_does_not_listen_for_tcp_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        assert "not a listening TCP socket" in told(deaf, tmp_path)
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as no_socket:
        assert "descriptor 3 is no socket" in told(no_socket, tmp_path)  # type: ignore[arg-type]
