"""A broker inside the service, so that `make run` shows MQTT on a machine that has none.

For trying out only: it listens on the loopback, has one account whose password is made anew at each start, and forgets
what it holds when it ends. Who cares for their events runs Mosquitto with configs/mosquitto.conf.
"""

import contextlib
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

from persona.errors import ConfigurationError
from persona.settings import Mqtt

ADDRESS = "127.0.0.1"
USER = "persona"


@dataclass(frozen=True, slots=True)
class Account:
    """Where the broker listens and what it asks for."""

    port: int
    password: str


@contextlib.asynccontextmanager
async def embedded(settings: Mqtt) -> AsyncIterator[Account]:
    """Run the broker. Raises ConfigurationError if amqtt is not installed or the port is taken."""
    try:
        from amqtt.broker import Broker
        from amqtt.contexts import BrokerConfig, ListenerConfig
        from amqtt.errors import BrokerError
    except ImportError:
        raise ConfigurationError("mqtt.embedded needs amqtt: install persona[demo], or name a broker.") from None
    logging.getLogger("amqtt").setLevel(logging.CRITICAL)
    logging.getLogger("transitions").setLevel(logging.CRITICAL)
    account = Account(settings.port or _free(), secrets.token_urlsafe(12))
    plugin = f"{__name__.rsplit('.', 1)[0]}.broker_gate.Gate"
    gate = {"username": USER, "password": account.password}
    config = BrokerConfig(
        listeners={"default": ListenerConfig(bind=f"{ADDRESS}:{account.port}")}, plugins={plugin: gate}
    )
    broker = Broker(config)
    try:
        await broker.start()
    except BrokerError:
        raise ConfigurationError(f"{ADDRESS} port {account.port} is taken; set mqtt.port, or 0 for any.") from None
    try:
        yield account
    finally:
        await broker.shutdown()


def reached(settings: Mqtt, account: Account) -> Mqtt:
    """How a client connects to it: amqtt speaks MQTT 3.1.1, without encryption."""
    return settings.model_copy(
        update={"host": ADDRESS, "port": account.port, "username": USER, "version": "3.1.1", "tls": False}
    )


def _free() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port
