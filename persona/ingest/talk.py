"""Chat over MQTT: a request on …/chat/set, its reply on …/chat, both JSON.

The request is the body of /v1/chat/completions, or {"text": …} for one message; the same limits hold, and a refusal is
answered with the same error object. Whoever asks gets exactly one last answer: a completion or an error. With "stream"
chunks come before it. What came with the request as correlation goes out with each of its answers.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

import msgspec
import structlog

from persona import chat_openai
from persona.chat import Chat
from persona.chat_reply import Piece, Reply
from persona.domain import Caller
from persona.errors import Busy, NotFound, PersonaError, RequestError, TooLarge
from persona.ingest.connection import Lost, Packet
from persona.ingest.topics import Topics
from persona.settings import Settings
from persona.wire import convert, decode
from storage.users import Users

log = structlog.get_logger()

MOST = 64  # requests that are answered at once
MOST_OF_ONE = MOST // 4  # of them, one user's
LAST_SECONDS = 2.0  # in which answers that were cut short at the end may be published
GATHER = 0.1  # seconds of a stream that go into one chunk
MAX_CORRELATION = 256  # bytes
_REMEMBERED = 256  # requests that are not answered twice when the broker delivers them again


class Publish(Protocol):
    """Sends one answer. Raises Lost."""

    def __call__(self, topic: str, payload: bytes, *, correlation: bytes | None = None) -> Awaitable[None]: ...


class Talk:
    """Answers chat requests, each in a task of its own."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        chat: Chat,
        topics: Topics,
        base: Callable[[], str],
        clock: Callable[[], datetime],
        ended: Callable[[Reply], None],
    ) -> None:
        self._settings, self._users, self._chat, self._topics = settings, users, chat, topics
        self._base, self._clock, self._ended = base, clock, ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._places: Counter[str] = Counter()  # that are taken, by user
        self._replies: set[Reply] = set()
        self._heard: dict[bytes, None] = {}  # digests of requests

    def hear(self, user: str, packet: Packet, publish: Publish) -> None:
        """Begin to answer; returns at once. A repetition of what was heard is left alone."""
        if packet.retained:  # a stored question that nobody asks now
            return
        key = hashlib.sha256(b"%d\0%s\0%s" % (packet.mid, packet.topic.encode(), packet.payload)).digest()
        if packet.again and packet.qos and key in self._heard:
            return
        self._heard[key] = None
        while len(self._heard) > _REMEMBERED:
            del self._heard[next(iter(self._heard))]
        task = asyncio.create_task(self._answer(user, packet, publish), name="mqtt chat")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def room(self) -> None:
        """Wait until one more request may be begun, be it to be refused."""
        while len(self._tasks) >= 2 * MOST:
            await asyncio.wait(set(self._tasks), return_when=asyncio.FIRST_COMPLETED)

    async def drain(self, seconds: float) -> None:
        """Let answers under way end, for so long; then cut their replies short and let that be told."""
        if self._tasks and seconds > 0:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        for reply in self._replies:
            reply.abort()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=LAST_SECONDS)
        for task in set(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _answer(self, user: str, packet: Packet, publish: Publish) -> None:
        say = _Answers(self._topics.chat(user), publish, packet.correlation)
        try:
            await self._speak(user, packet, say)
        except PersonaError as error:
            await say.error(error)
        except Lost:
            log.warning("an answer over MQTT was lost with the connection")
        except Exception as error:
            log.error("chat over MQTT failed", kind=type(error).__name__)
            await say.error(PersonaError("Something went wrong on our side."))

    async def _speak(self, name: str, packet: Packet, say: "_Answers") -> None:
        if packet.reply_to is not None:
            if not self._topics.may_answer(name, packet.reply_to):
                own = self._topics.chat(name)
                raise RequestError(f"A response topic is {own} or lies below it.", code="unsupported_value")
            say.topic = packet.reply_to
        if packet.size > len(packet.payload):
            raise TooLarge(f"The payload has more than {self._settings.mqtt.max_payload} bytes.")
        body = say.understand(decode(packet.payload, object))
        with self._place(name):
            await self._reply(name, body, say)

    @contextlib.contextmanager
    def _place(self, user: str) -> Iterator[None]:
        """A place for as long as the block lasts. Raises Busy."""
        if self._places[user] >= MOST_OF_ONE:
            sentence = f"This user has {MOST_OF_ONE} chats over MQTT under way; wait for one of them to end."
            raise Busy(sentence, retry_after=5)
        if self._places.total() >= MOST:
            raise Busy("Too many chats over MQTT at once; try again in a moment.", retry_after=5)
        self._places[user] += 1
        try:
            yield
        finally:
            self._places -= Counter({user: 1})  # and nobody who has none is kept

    async def _reply(self, name: str, body: chat_openai.Completion, say: "_Answers") -> None:
        ask = chat_openai.understand(body, self._chat.limits)
        if ask.choices > 1:
            raise RequestError("Over MQTT a request has one reply: leave n out.", code="unsupported_value", param="n")
        user = await self._users.get(name) if name.isascii() else None
        if user is None:
            raise NotFound("There is no user of that name.", code="user_not_found")
        reply = await self._chat.reply(Caller(user, key_id=0, learn=user.learn), ask)
        reply.on_end(self._ended)
        self._replies.add(reply)
        try:
            await self._follow(reply, say, stream=bool(body.stream))
        finally:
            self._replies.discard(reply)
            reply.abort()

    async def _follow(self, reply: Reply, say: "_Answers", *, stream: bool) -> None:
        created = int(self._clock().timestamp())
        identity = f"chatcmpl-{secrets.token_hex(12)}"
        while not (gathered := await self._gather(reply)).finish:
            if stream and gathered.answer:
                head = chat_openai.head(reply, identity, created, self._base())
                await say.answer(chat_openai.chunk(head, {"content": gathered.answer}))
        head = chat_openai.head(reply, identity, created, self._base())
        if stream and gathered.answer:
            await say.answer(chat_openai.chunk(head, {"content": gathered.answer}))
        await say.answer(chat_openai.completion([reply], head, self._chat.spell))

    @staticmethod
    async def _gather(reply: Reply) -> Piece:
        """What is said within a moment, as one piece."""
        loop = asyncio.get_running_loop()
        texts: list[str] = []
        end = loop.time() + GATHER
        while (left := end - loop.time()) > 0 or not texts:
            piece = await reply.next(max(left, GATHER))
            if piece is None:
                continue
            texts.append(piece.answer)
            if piece.finish is not None:
                return Piece("", piece.finish, answer="".join(texts))
        return Piece("", answer="".join(texts))


class _Answers:
    """Where and how the answers to one request go out."""

    def __init__(self, topic: str, publish: Publish, correlation: bytes | None) -> None:
        self.topic = topic
        self._publish = publish
        self._property = correlation
        self._field: Any = None

    def understand(self, value: Any) -> chat_openai.Completion:
        """The body of a request, whose correlation is kept. Raises RequestError that names the field."""
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise RequestError('Send an object, such as {"text": "Hello"}.', code="invalid_type")
        self._field = _correlation(value.pop("correlation", None))
        if "text" in value and "messages" not in value:
            value["messages"] = [{"role": "user", "content": value.pop("text")}]
        value.setdefault("model", "persona")
        return convert(value, chat_openai.Completion)

    async def answer(self, body: dict[str, Any]) -> None:
        told = body if self._field is None else {**body, "correlation": self._field}
        await self._publish(self.topic, msgspec.json.encode(told), correlation=self._property)

    async def error(self, error: PersonaError) -> None:
        body = chat_openai.error_body(error)
        if isinstance(error, Busy):
            body["error"]["retry_after"] = error.retry_after
        try:
            await self.answer(body)
        except Lost:
            log.warning("a refusal over MQTT was lost with the connection", code=error.code)


def _correlation(value: Any) -> Any:
    if value is not None and len(msgspec.json.encode(value)) > MAX_CORRELATION:
        raise RequestError(f"correlation has at most {MAX_CORRELATION} bytes.", param="correlation")
    return value
