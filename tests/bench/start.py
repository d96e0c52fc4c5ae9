"""From the start of the service to the first token that a client reads, with the model in the cache.

    .venv/bin/python tests/bench/start.py [--starts 5]

`persona serve` in a home of its own, in a process of its own; a client asks with streaming again and again until it is
answered. The first start, which makes the home and a user, does not count. One JSON line: seconds of each, the median.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def service(port: int) -> Iterator[float]:
    """Runs meanwhile. Yields when it was started."""
    started = time.perf_counter()
    environment = os.environ | {"PERSONA_HTTP__PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "persona", "serve"], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def tries() -> Iterator[None]:
    """Again and again; ends the program where nothing has come of it for two minutes."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        yield
    sys.exit("The service was not ready within two minutes: nothing was measured.")


def first_token(port: int, key: str) -> None:
    """Returns once a piece of a reply has come."""
    body = {"model": "persona", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}
    url, head = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), {**head, "Content-Type": "application/json"})
    for _ in tries():
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                for line in reply:
                    if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)


def user(port: int) -> str:
    """A key of a new user, as soon as the service makes one."""
    environment = os.environ | {"PERSONA_HTTP__PORT": str(port)}
    command = [sys.executable, "-m", "persona", "users", "add", "bench", "--json"]
    for _ in tries():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return str(json.loads(done.stdout)["key"])
        time.sleep(0.5)
    raise AssertionError  # `tries` does not end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        os.environ["PERSONA_HOME"] = home
        with service(port):
            key = user(port)
            first_token(port, key)
        seconds = []
        for _ in range(options.starts):
            with service(port) as started:
                first_token(port, key)
                seconds.append(round(time.perf_counter() - started, 2))
    found = {"measure": "start to first token", "seconds": seconds, "median": round(statistics.median(seconds), 2)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
