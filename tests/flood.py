"""Publishes many messages as fast as the broker takes them: a process of its own, so that the service pays nothing.

    python tests/flood.py PORT USER PASSWORD COUNT [--qos 1] [--topic T] [--prefix x] [--rate N] [--size BYTES]

Waits for an acknowledgement of each message of QoS 1, connects again and repeats what was not acknowledged. With
--source the events are numbered; with --careful they are sent again until persona says that it has them all, as a
device does that trusts no broker. Prints how many were acknowledged.
"""

import argparse
import json
import sys
import threading
import time

import paho.mqtt.client as mqtt


class Device:
    """A client that keeps every message until the broker has acknowledged it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(arguments.user, arguments.password)
        self.client.max_inflight_messages_set(200)
        self.client.reconnect_delay_set(min_delay=1, max_delay=1)
        self.lock = threading.Condition()
        self.acknowledged = 0
        self.numbered: dict[int, str] = {}  # sequence number → payload
        self.receipt = {"seq": -1, "missing": []}
        self.client.on_publish = self._published
        self.client.on_connect = self._connected
        self.client.on_message = self._told

    def _connected(self, client, data, flags, code, properties) -> None:  # type: ignore[no-untyped-def]
        if self.arguments.careful:
            client.subscribe(f"persona/u/{self.arguments.user}/received/{self.arguments.source}", qos=1)

    def _published(self, client, data, mid, code, properties) -> None:  # type: ignore[no-untyped-def]
        with self.lock:
            self.acknowledged += 1
            self.lock.notify_all()

    def _told(self, client, data, message) -> None:  # type: ignore[no-untyped-def]
        with self.lock:
            self.receipt = json.loads(message.payload)
            self.lock.notify_all()

    def run(self) -> None:
        arguments = self.arguments
        self.client.connect("127.0.0.1", arguments.port, keepalive=10)
        self.client.loop_start()
        self._send()
        with self.lock:
            self.lock.wait_for(lambda: self.acknowledged >= arguments.count, timeout=arguments.patience)
            acknowledged = self.acknowledged
        if arguments.careful:
            self._insist()
        self.client.disconnect()
        self.client.loop_stop()
        sys.stdout.write(f"{acknowledged}\n")

    def _send(self) -> None:
        arguments = self.arguments
        started = time.monotonic()
        for number in range(arguments.count):
            if arguments.rate:
                time.sleep(max(0.0, started + number / arguments.rate - time.monotonic()))
            name = f"{arguments.prefix}{number}"
            if arguments.bad and number % arguments.bad == 0:
                self._publish(f"{name} is no JSON")
                continue
            body = {"id": name, "text": f"this is {name} " + "x" * arguments.size}
            if arguments.source:
                body |= {"source": arguments.source, "seq": len(self.numbered)}
                self.numbered[len(self.numbered)] = json.dumps(body)
            self._publish(json.dumps(body))

    def _publish(self, payload: str) -> None:
        topic = self.arguments.topic or f"persona/u/{self.arguments.user}/events/message"
        self.client.publish(topic, payload, qos=self.arguments.qos)

    def _insist(self) -> None:
        """Send what has not arrived until it has; ids make repetitions harmless."""
        deadline = time.monotonic() + self.arguments.patience
        while (lost := self._lost()) and time.monotonic() < deadline:
            for number in lost:
                self._publish(self.numbered[number])
            with self.lock:
                self.lock.wait(timeout=3.0)

    def _lost(self) -> list[int]:
        with self.lock:
            beyond = range(self.receipt["seq"] + 1, len(self.numbered))
            gaps = [number for first, last in self.receipt["missing"] for number in range(first, last + 1)]
        return [*gaps, *beyond]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("user")
    parser.add_argument("password")
    parser.add_argument("count", type=int)
    parser.add_argument("--qos", type=int, default=1)
    parser.add_argument("--topic", default="")
    parser.add_argument("--prefix", default="m")
    parser.add_argument("--source", default="", help="name itself and number its events")
    parser.add_argument("--careful", action="store_true", help="send again until persona has everything")
    parser.add_argument("--bad", type=int, default=0, help="every so manieth message is no JSON")
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60.0)
    Device(parser.parse_args()).run()


if __name__ == "__main__":
    main()
