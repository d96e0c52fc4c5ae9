"""One chat request: from a model name to a reply that is on record.

The user's turn is committed before the first token is asked for. Whatever was generated is recorded with its finish
when the reply ends, however it ends, and a reply stays on one version from its first token to its last.
"""

import asyncio
import re
from asyncio import Semaphore
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import cast

import structlog

from persona import errors, frames
from persona import prompt as prompts
from persona.chat_foreign import documents, is_foreign, is_task
from persona.chat_format import Schemas
from persona.chat_reply import Ask, Choices, Mail, Reply, Sheet, Voice
from persona.chat_sampling import Limits
from persona.domain import (
    Caller,
    ChatTokenizer,
    Entry,
    EntryId,
    Fact,
    Finish,
    Message,
    Rendered,
    Role,
    User,
    UserId,
    Version,
    VersionState,
)
from persona.engine.faces import Serving
from persona.engine.protocol import (
    Chunk,
    GenerateRequest,
    PrefillRequest,
    Sampling,
    ScoreRequest,
    TokenLogprob,
    ref,
    replace,
)
from persona.errors import AdapterError, Busy, EngineDown, NotFound, RequestError, StorageFull, TooLarge
from persona.prompt import Prompt
from persona.settings import Settings
from storage.adapters import Adapters
from storage.events import Events
from storage.history import History, Placement

log = structlog.get_logger()

UNKNOWN_MODEL = "This model does not exist, or is not yours; GET /v1/models lists those that you may use."
_NUMBERED = re.compile(r"persona@([1-9][0-9]{0,8})")
_RECENT_ENTRIES = 512  # unabsorbed entries that are read at most; the token budget is far below it
_FACTS = 500  # facts, and states, that are looked at: the newest
_QUERY_CHARS = 2000  # of the last message that the search looks at
_AT_ONCE = 16  # replies to one request that the engine hears of at a time
_LIVE = timedelta(minutes=30)  # since its last reply, in which a conversation may go on at any moment
_LIVE_CONVERSATIONS = 4
_DEFAULT_RESERVE = 256  # tokens kept free for a reply that names no max_tokens


class Chat:
    """Answers for users. `context` is the engine's length of a sequence, `base` the hash of its weights."""

    def __init__(
        self,
        settings: Settings,
        history: History,
        events: Events,
        adapters: Adapters,
        engine: Serving,
        tokenizer: ChatTokenizer,
        clock: Callable[[], datetime],
        context: Callable[[], int],
        base: Callable[[], str],
    ) -> None:
        self._settings = settings
        self._history = history
        self._events = events
        self._adapters = adapters
        self._engine = engine
        self._tokenizer = tokenizer
        self._clock = clock
        self._context = context
        self.base = base
        self.running: set[Reply] = set()
        self.disk_full = False  # the last write found no space
        self._schemas = Schemas()
        self._gone: set[UserId] = set()  # who were forgotten: their ids are never given again
        self._closing = False

    async def removed(self, user_id: UserId, numbers: object) -> None:
        """Something of a user was deleted, or the user: then nothing is answered any more, whoever knew the key."""
        self._schemas.forget()
        if numbers is None:
            self._gone.add(user_id)

    @property
    def limits(self) -> Limits:
        return Limits(self._settings.prompt.max_reply_tokens, self._tokenizer.vocab)

    def spell(self, token: int) -> bytes:
        """What a token stands for."""
        return self._tokenizer.piece(token)

    async def reply(self, caller: Caller, ask: Ask) -> Reply:
        """The reply to an ask that wants no more than one; as `replies`."""
        (reply,) = (await self.replies(caller, ask)).replies
        return reply

    async def replies(self, caller: Caller, ask: Ask) -> Choices:
        """Store the user's turn, compose the prompt and start to generate.

        Raises NotFound for a model that the caller does not have, TooLarge for a conversation that does not fit,
        RequestError for a schema that cannot be followed.
        """
        if self._closing:
            raise Busy("The service is stopping; try again in a moment.", retry_after=5)
        await self._schemas.check(ask.sampling.grammar, caller.user.id)
        sheet = await self._sheet(caller, ask, store=True)
        return self._begin(caller, ask, [sheet])

    async def continuations(self, caller: Caller, ask: Ask, prompts: Sequence[list[int]]) -> Choices:
        """Go on with raw tokens, `ask.choices` times with each: no template, no history, nothing on record.

        Raises NotFound for a model that the caller does not have, TooLarge for what does not fit.
        """
        if self._closing:
            raise Busy("The service is stopping; try again in a moment.", retry_after=5)
        voice = await self._voice(caller.user, ask.model)
        longest = max(map(len, prompts)) + (ask.max_tokens or 0)
        if longest > self._context():
            sentence = f"Prompt and reply together are {longest} tokens; at most {self._context()} fit."
            raise TooLarge(sentence, code="context_length_exceeded", param="prompt")
        sheets = [Sheet(voice, None, Prompt((), Rendered(tokens, ()), ()), False) for tokens in prompts]
        return self._begin(caller, ask, sheets)

    def _begin(self, caller: Caller, ask: Ask, sheets: Sequence[Sheet]) -> Choices:
        """Start the replies, sheet by sheet, a few at once: a long list of prompts must not fill the engine's queue.

        The first choice of a sheet begins alone: what the engine then has of their prompt the others need not compute.
        """
        if caller.user.id in self._gone:  # while the body arrived, say
            raise NotFound("There is no such user.")
        mail: Mail = asyncio.Queue()
        made: list[Reply] = []
        for sheet in sheets:
            first = None
            for _ in range(ask.choices):
                made.append(Reply(caller, ask, sheet, len(made), mail, first))
                first = first or made[-1]
        turns = Semaphore(_AT_ONCE)
        for reply in made:
            self._start(reply, turns)
        return Choices(made, mail)

    def _start(self, reply: Reply, turns: Semaphore) -> None:
        reply.task = asyncio.create_task(self._in_turn(reply, turns))
        self.running.add(reply)
        reply.task.add_done_callback(lambda _: self._leave(reply))

    async def why(self, caller: Caller, ask: Ask) -> Sheet:
        """What a reply to `ask` would be made of; stores and generates nothing."""
        return await self._sheet(caller, ask, store=False)

    async def warm(self, user: User, version: Version) -> None:
        """Have the engine compute, in idle time, how the user's live conversations begin under `version`: their next
        replies then begin as soon as they would have under the version before."""
        since = self._clock() - _LIVE
        for tail in await self._history.live(user.id, since, limit=_LIVE_CONVERSATIONS):
            turns = await self._history.conversation(user.id, tail)
            tokens = await self._beginning(user, version, turns)
            await self._engine.prefill(PrefillRequest(tokens, ref(version), user.id))

    async def drain(self, seconds: float) -> None:
        """Take no new request, let running replies end for `seconds`, then cut them short, recorded."""
        self._closing = True
        tasks = [reply.task for reply in self.running if reply.task]
        if tasks and seconds > 0:
            await asyncio.wait(tasks, timeout=seconds)
        await self._cut(set(self.running))

    async def silence(self, user: User) -> None:
        """End every running reply of one user."""
        await self._cut({reply for reply in self.running if reply.caller.user.id == user.id})

    async def _cut(self, replies: set[Reply]) -> None:
        for reply in replies:
            reply.abort()
        if tasks := [reply.task for reply in replies if reply.task]:
            await asyncio.wait(tasks)

    def _leave(self, reply: Reply) -> None:
        self.running.discard(reply)
        reply.end(Finish.ABORT)  # a task cancelled before its first step never came to its end

    # From an ask to a prompt.

    async def _sheet(self, caller: Caller, ask: Ask, *, store: bool) -> Sheet:
        voice = await self._voice(caller.user, ask.model)
        await self._check_fit(ask, voice)
        if not voice.personal:
            return Sheet(voice, None, await self._compose(ask, voice), recorded=False)
        # What stands in the user's role of a draft is what others said: it must never train as the user's words.
        wanted = ask.store and caller.learn and voice.name != "me" and not is_foreign(ask.messages)
        placement, stored = await self._place(caller, ask, store=store and wanted)
        prompt = await self._personal(caller.user, ask, voice, placement)
        return Sheet(voice, placement, prompt, recorded=stored if store else wanted)

    async def _voice(self, user: User, name: str) -> Voice:
        if name == "base":
            return Voice(name, "", None, personal=False)
        if name == "me":
            return Voice(name, frames.DRAFT_SYSTEM, await self._serving(user), personal=True)
        if name == "persona":
            return Voice(name, self._settings.prompt.system, await self._serving(user), personal=True)
        return Voice(name, self._settings.prompt.system, await self._numbered(user, name), personal=True)

    async def _serving(self, user: User) -> Version | None:
        return self._awake(await self._adapters.active(user.id))

    async def _numbered(self, user: User, name: str) -> Version:
        match = _NUMBERED.fullmatch(name)
        version = await self._adapters.get(user.id, int(match[1])) if match else None
        if version is None or version.state is not VersionState.PUBLISHED or self._awake(version) is None:
            raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")
        return version

    def _awake(self, version: Version | None) -> Version | None:
        """A version trained on other weights than the engine's sleeps: the base answers in its place."""
        return version if version is not None and version.base == self.base() else None

    async def _place(self, caller: Caller, ask: Ask, *, store: bool) -> tuple[Placement, bool]:
        """Match the conversation to stored turns and store the new one: (placement, whether it was stored)."""
        try:
            placement = await self._match(caller, ask, store=store)
        except StorageFull:
            self.disk_full = True
            log.error("reply goes unrecorded: the disk is full", user=caller.user.name)
            return await self._match(caller, ask, store=False), False
        self.disk_full = self.disk_full and not store
        return placement, store

    async def _match(self, caller: Caller, ask: Ask, *, store: bool) -> Placement:
        return await self._history.place(
            caller.user.id,
            ask.messages,
            conversation_id=ask.conversation,
            now=self._clock(),
            count=self._count,
            store=store,
        )

    async def _personal(self, user: User, ask: Ask, voice: Voice, placement: Placement) -> Prompt:
        if is_task(ask.messages):  # about the conversation that it quotes, not about the user
            return await self._compose(ask, voice)
        known = self._known(user, ask, voice, placement)
        recent, facts, retrieved, states = await self._history.view(known)
        relevant = prompts.relevant(states, _question(ask))
        return await self._compose(
            ask, voice, _elsewhere(recent, placement), _elsewhere(retrieved, placement), facts, relevant
        )

    async def _known(
        self, user: User, ask: Ask, voice: Voice, placement: Placement
    ) -> tuple[list[Entry], list[Fact], list[Entry], list[Fact]]:
        """Recent entries and facts, and what is found for the question, entries and states."""
        watermark = voice.version.watermark if voice.version else EntryId(0)
        recent = await self._history.recent(user.id, watermark, exclude=placement.known, limit=_RECENT_ENTRIES)
        facts = await self._events.facts(user.id, "fact", limit=_FACTS)
        if voice.name == "me":  # its last message is what others said, as in training: nothing is put before it
            return recent, facts, [], []
        found = await self._retrieve(user, ask, placement)
        return recent, facts, found, await self._events.facts(user.id, "state", limit=_FACTS)

    async def _beginning(self, user: User, version: Version, turns: Sequence[Entry]) -> list[int]:
        """What the next prompt of a conversation begins with: all but its newest message and what is found for it."""
        voice = Voice("persona", self._settings.prompt.system, version, personal=True)
        ask = Ask(voice.name, tuple(Message(turn.role, turn.text) for turn in turns), Sampling())
        known = [turn.id for turn in turns]
        recent = await self._history.recent(user.id, version.watermark, exclude=known, limit=_RECENT_ENTRIES)
        facts = await self._events.facts(user.id, "fact", limit=_FACTS)
        prompt = await self._compose(ask, voice, recent, facts=facts)
        rendered = await asyncio.to_thread(self._tokenizer.render, prompt.messages, reply=False)
        return list(rendered.tokens)

    async def _retrieve(self, user: User, ask: Ask, placement: Placement) -> list[Entry]:
        limits = self._settings.prompt
        if not limits.retrieved_entries or not limits.retrieved_tokens:
            return []
        limit = limits.retrieved_entries
        return await self._history.search(user.id, _question(ask), limit=limit, exclude=placement.known)

    async def _check_fit(self, ask: Ask, voice: Voice) -> None:
        """Refuse what cannot fit before anything is stored. A token has at least a byte: what is short surely fits."""
        size = sum(len(message.text.encode()) + 16 for message in ask.messages) + len(voice.system)
        if size > self._room(ask):
            await self._compose(ask, voice)

    async def _compose(
        self,
        ask: Ask,
        voice: Voice,
        recent: Sequence[Entry] = (),
        retrieved: Sequence[Entry] = (),
        facts: Sequence[Fact] = (),
        states: Sequence[Fact] = (),
    ) -> Prompt:
        limits = self._settings.prompt
        return await asyncio.to_thread(
            prompts.compose,
            system=voice.system,
            recent=recent,
            conversation=ask.messages,
            retrieved=retrieved,
            tokenizer=self._tokenizer,
            budget=prompts.Budget(
                self._room(ask),
                limits.recent_tokens,
                limits.retrieved_tokens,
                limits.facts_tokens,
                limits.states_tokens,
            ),
            facts=facts,
            states=states,
            think=False if ask.sampling.grammar else ask.think,  # a thought would not be of the form
        )

    def _room(self, ask: Ask) -> int:
        """Tokens that the prompt may have. Raises TooLarge when max_tokens alone fills the context."""
        context = self._context()
        reserve = ask.max_tokens or min(_DEFAULT_RESERVE, context // 4, self._settings.prompt.max_reply_tokens)
        if reserve >= context:
            sentence = f"max_tokens leaves no room for a prompt in a context of {context} tokens."
            raise TooLarge(sentence, code="context_length_exceeded", param="max_tokens")
        return context - reserve

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    # From a prompt to a recorded reply.

    async def _in_turn(self, reply: Reply, turns: Semaphore) -> None:
        if reply.before is not None:
            await reply.before.begun.wait()
        async with turns:
            await self._run(reply)

    async def _run(self, reply: Reply) -> None:
        """Generate and record. Only `Reply.abort` cancels this task, and never while it records."""
        failure: Exception | None = None
        try:
            finish = await self._speak(reply)
        except asyncio.CancelledError:
            finish = Finish.ABORT
        except Exception as error:
            finish, failure = Finish.ERROR, error
        reply.settled = True
        try:
            await self._record(reply, finish)
        except Exception as error:
            failure = failure or error
        reply.end(finish, failure)

    async def _speak(self, reply: Reply) -> Finish:
        while True:
            try:
                return await self._stream(reply)
            except AdapterError as error:
                if reply.tokens or reply.echoed or reply.version is None:
                    raise
                await self._fall_back(reply, reply.version, error.message)

    async def _stream(self, reply: Reply) -> Finish:
        if reply.ask.echo and reply.echoed is None:
            reply.echo(await self._told(reply))
        if reply.ask.max_tokens == 0:
            return Finish.LENGTH
        chunks = cast(AsyncGenerator[Chunk], self._generate(reply))
        async with aclosing(chunks):
            async for chunk in chunks:
                reply.hear(chunk)
                if chunk.finish == Finish.ERROR:
                    failure = errors.named(chunk.kind) if chunk.kind else EngineDown
                    raise failure(chunk.error or "The engine failed in the middle of the reply; try again.")
                if chunk.finish is not None:
                    return Finish(chunk.finish)
        raise EngineDown("The engine ended the reply without a reason; try again.")

    async def _told(self, reply: Reply) -> list[TokenLogprob]:
        """Log-probabilities of the prompt from its second token on, if they are wanted."""
        tokens, top, other = reply.sheet.prompt.rendered.tokens, reply.ask.sampling.logprobs, reply.before
        if top is None:
            return []
        if other is not None and other.echoed is not None and other.version == reply.version:
            return other.echoed
        adapter = ref(reply.version) if reply.version else None
        return await self._engine.tell(
            ScoreRequest(tokens, list(range(1, len(tokens))), adapter, top, reply.caller.user.id)
        )

    def _generate(self, reply: Reply) -> AsyncIterator[Chunk]:
        tokens = reply.sheet.prompt.rendered.tokens
        room = min(self._context() - len(tokens), self._settings.prompt.max_reply_tokens)
        asked = reply.ask.sampling
        # Each choice has chance of its own, and the same again for the same seed.
        seed = None if asked.seed is None else asked.seed + reply.index % reply.ask.choices
        sampling = replace(asked, max_tokens=min(reply.ask.max_tokens or room, room), seed=seed)
        adapter = ref(reply.version) if reply.version else None
        return self._engine.generate(GenerateRequest(tokens, sampling, adapter, reply.caller.user.id))

    async def _fall_back(self, reply: Reply, broken: Version, reason: str) -> None:
        """Quarantine the version that the engine cannot serve and go on with the one before it."""
        user, sheet = reply.caller.user, reply.sheet
        previous = await self._adapters.quarantine(user.id, broken.number, reason)
        log.error("version is corrupt and quarantined", user=user.name, version=broken.number)
        if sheet.voice.name not in ("persona", "me"):
            raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")
        voice = Voice(sheet.voice.name, sheet.voice.system, self._awake(previous), personal=True)
        if sheet.placement is None:  # raw text: the same prompt for every version
            reply.sheet = Sheet(voice, None, sheet.prompt, recorded=False)
            return
        prompt = await self._personal(user, reply.ask, voice, sheet.placement)
        reply.sheet = Sheet(voice, sheet.placement, prompt, sheet.recorded)

    async def _record(self, reply: Reply, finish: Finish) -> None:
        placement, user = reply.sheet.placement, reply.caller.user
        if not reply.recorded or placement is None:
            return
        try:
            reply.turn = await self._history.reply(
                user.id,
                placement,
                reply.answer,
                finish=finish,
                version=reply.version.number if reply.version else None,
                now=self._clock(),
                tokens=reply.tokens,
            )
        except StorageFull:
            self.disk_full, reply.recorded = True, False
            log.error("reply goes unrecorded: the disk is full", user=user.name)
        except Busy:  # what was said is worth more than its record
            reply.recorded = False
            log.error("reply goes unrecorded: another program holds the database's lock", user=user.name)
        except NotFound:  # the user was forgotten meanwhile
            reply.recorded = False


def _elsewhere(entries: list[Entry], placement: Placement) -> list[Entry]:
    """Without earlier replies to the very turn that is answered again: a new reply shall not lean on them."""
    return [entry for entry in entries if placement.tail is None or entry.parent != placement.tail]


def _question(ask: Ask) -> str:
    """What entries and states are looked for by: the user's last words, while tools are called too."""
    words = next((m.text for m in reversed(ask.messages) if m.role is Role.USER), "")
    return words[documents(words) :][:_QUERY_CHARS]


def require_question(messages: tuple[Message, ...]) -> None:
    """Raises RequestError unless somebody waits for an answer."""
    last = messages[-1] if messages else None
    if last is None or last.role not in (Role.USER, Role.TOOL) or not last.text.strip():
        raise RequestError("The last message has to be the user's, and not empty.", param="messages")
