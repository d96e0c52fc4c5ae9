"""Publishes many messages as fast as the broker takes them: a process of its own, so that the service pays nothing.

    python tests/flood.py PORT USER PASSWORD COUNT [--qos 1] [--topic T] [--prefix x] [--rate N] [--size BYTES]

Waits for an acknowledgement of each message of QoS 1, connects again and repeats what was not acknowledged, as a
careful device does. Prints how many were acknowledged.
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
        self.client.on_publish = self._published

    def _published(self, client, data, mid, code, properties) -> None:  # type: ignore[no-untyped-def]
        with self.lock:
            self.acknowledged += 1
            self.lock.notify_all()

    def run(self) -> None:
        arguments = self.arguments
        self.client.connect("127.0.0.1", arguments.port, keepalive=10)
        self.client.loop_start()
        topic = arguments.topic or f"persona/u/{arguments.user}/events/message"
        started = time.monotonic()
        for number in range(arguments.count):
            if arguments.rate:
                time.sleep(max(0.0, started + number / arguments.rate - time.monotonic()))
            name = f"{arguments.prefix}{number}"
            body = {"id": name, "text": f"this is {name} " + "x" * arguments.size}
            if arguments.source:
                body |= {"source": arguments.source, "seq": number}
            bad = arguments.bad and number % arguments.bad == 0
            self.client.publish(topic, f"{name} is no JSON" if bad else json.dumps(body), qos=arguments.qos)
        with self.lock:
            self.lock.wait_for(lambda: self.acknowledged >= arguments.count, timeout=arguments.patience)
        self.client.disconnect()
        self.client.loop_stop()
        sys.stdout.write(f"{self.acknowledged}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("user")
    parser.add_argument("password")
    parser.add_argument("count", type=int)
    parser.add_argument("--qos", type=int, default=1)
    parser.add_argument("--topic", default="")
    parser.add_argument("--prefix", default="m")
    parser.add_argument("--source", default="")
    parser.add_argument("--bad", type=int, default=0, help="every so manieth message is no JSON")
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--patience", type=float, default=60.0)
    Device(parser.parse_args()).run()


if __name__ == "__main__":
    main()
