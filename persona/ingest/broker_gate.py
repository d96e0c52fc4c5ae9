"""Who may speak to the embedded broker: one account. A plug-in that amqtt loads by its name."""

import hmac
from dataclasses import dataclass

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class Gate(BaseAuthPlugin):  # type: ignore[misc]
    """Lets in whoever knows the password."""

    async def authenticate(self, *, session: Session) -> bool:
        config = self.config
        told = (session.username or "", session.password or "")
        wanted = (config.username, config.password)
        return all(hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(told, wanted, strict=True))

    @dataclass
    class Config:
        """The account."""

        username: str
        password: str
