"""Requests, cached text and adapters share pages in any order of events: nothing leaks, nobody reads what is another's.

The scheduler, the prefix cache, the shelf and the tiers are real; loads end when a rule says so. `written` is what the
pages really hold.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from persona.engine.pages import PagePool
from persona.engine.prefix import Owner
from persona.engine.protocol import AdapterRef
from persona.engine.scheduler import Scheduler
from persona.engine.sequence import Plan, Sequence
from persona.engine.shelf import Absent, Lease
from persona.engine.tiers import Tiers

SIZE = 4
REFS = [AdapterRef(user, number, "", "") for user in (1, 2, 3) for number in (1, 2)]
OWNERS = [Owner(user, None) for user in (1, 2, 3)] + [Owner(ref.user_id, ref) for ref in REFS]


class Value:
    """An adapter without numbers, on disk, in RAM or on the device. Known by identity."""

    def __init__(self, ref: AdapterRef) -> None:
        self.ref = ref

    def nbytes(self) -> int:
        return 1


class Rooms(RuleBasedStateMachine):
    """Arrivals, steps, loads, departures, flips and drops."""

    @initialize(
        pages=st.integers(4, 24),
        running=st.integers(1, 6),
        prefill=st.integers(1, 40),
        host=st.integers(1, 4),
        sizes=st.lists(st.integers(1, 4), min_size=len(REFS), max_size=len(REFS)),
    )
    def open(self, pages: int, running: int, prefill: int, host: int, sizes: list[int]) -> None:
        self.sizes = dict(zip(REFS, sizes, strict=True))
        self.loads: list[Callable[[], None]] = []
        pool = PagePool(pages, SIZE)
        read: Any = Value
        size: Any = lambda adapter: self.sizes[adapter.ref]  # noqa: E731
        self.tiers = Tiers(read, size, self._fill, pool=pool, host_budget=host, submit=self.loads.append)
        self.rooms = Scheduler(pool, self.tiers, max_running=running, max_waiting=3, prefill_tokens=prefill)
        self.running, self.prefill = running, prefill
        self.here: list[Sequence] = []
        self.owners: dict[int, Owner | None] = {}
        self.written: dict[tuple[int, int], object] = {}
        self.borrowed: list[Lease[Any]] = []
        self.count = self.drops = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        reply=st.integers(1, 30),
        background=st.booleans(),
        owner=st.sampled_from([None, *OWNERS]),
    )
    def arrive(self, prompt: list[int], reply: int, background: bool, owner: Owner | None) -> None:
        if not self.rooms.fits(len(prompt) + reply):
            return
        self.count += 1
        one = Sequence(self.count, list(prompt), len(prompt), len(prompt) + reply, background=background)
        one.owner = self.owners[one.id] = None if background else owner
        one.adapter, one.user_id = (owner.adapter, owner.user_id) if owner else (None, 0)
        one.targets = (1,) if background else ()
        self.here.append(one)
        self.rooms.add(one)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30), owner=st.sampled_from(OWNERS))
    def compute_ahead(self, prompt: list[int], owner: Owner) -> None:
        """The beginning of a prompt that is to come."""
        if not self.rooms.fits(len(prompt)):
            return
        self.count += 1
        one = Sequence(self.count, list(prompt), len(prompt), len(prompt), background=True, silent=True)
        one.owner = self.owners[one.id] = owner
        one.adapter, one.user_id = owner.adapter, owner.user_id
        self.here.append(one)
        self.rooms.add(one)

    @rule(admit=st.booleans())
    def step(self, admit: bool) -> None:
        self._step(admit)

    @rule(ref=st.sampled_from(REFS), background=st.booleans())
    def hear_of(self, ref: AdapterRef, background: bool) -> None:
        """A request is on its way in: its adapter is loaded meanwhile."""
        self.rooms.expect(ref, background=background)

    def _step(self, admit: bool = True) -> Plan:
        self._land()
        before = self.rooms.running
        plan = self.rooms.plan(admit=admit)
        assert admit or not before or not plan.admitted
        assert sum(s.end - s.start for s in plan.prefill) <= self.prefill
        members = [*plan.decode, *(s.sequence for s in plan.prefill)]
        assert len({id(s) for s in members}) == len(members)
        for one in plan.refused:
            assert one.adapter is not None
            assert self.rooms.pool.needed(one.limit) + self.sizes[one.adapter] > self.rooms.pool.total
            self.here.remove(one)
        assert len(members) == 1 or not any(one.silent for one in members), "nobody waits for what is computed ahead"
        for one in members:
            self._computes_with_its_adapter(one)
        for one in plan.decode:
            self._write(one, one.computed + 1)
        for segment in plan.prefill:
            assert segment.start == segment.sequence.computed < segment.end
            self._write(segment.sequence, segment.end)
        self.rooms.advanced(plan)
        for one in members:
            if not one.prefilling:
                self._extend(one)
        return plan

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def one_load_ends(self, data: st.DataObject) -> None:
        self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))()

    @rule(ref=st.sampled_from(REFS))
    def borrow(self, ref: AdapterRef) -> None:
        """As the gate's scoring does."""
        found = self.tiers.hold(ref)
        if not isinstance(found, Absent):
            self.borrowed.append(found)

    @precondition(lambda self: self.borrowed)
    @rule()
    def bring_back(self) -> None:
        self.tiers.release(self.borrowed.pop())

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.here)))

    @rule()
    def everybody_leaves(self) -> None:
        for one in list(self.here):
            self._end(one)
        assert self.rooms.idle
        self._everything_is_idle()

    @rule()
    def everybody_is_served(self) -> None:
        """Nobody waits for ever, however short memory is."""
        while self.borrowed:
            self.bring_back()
        for _ in range(2000):
            while self.loads:
                self.loads.pop(0)()
            plan = self._step()
            if self.rooms.idle:
                break
            assert plan or plan.refused or self.loads, "everybody waits for nothing"
        assert self.rooms.idle
        self._everything_is_idle()

    @rule(user=st.sampled_from([1, 2, 3]))
    def drop(self, user: int) -> None:
        self.tiers.drop(user)
        self.rooms.forget(user)
        self._is_nobodys(user)
        assert not any(ref in self.tiers.shelf for ref in REFS if ref.user_id == user)
        for owner in OWNERS:
            assert owner.user_id != user or not self._matches(owner)

    @rule(owner=st.sampled_from([owner for owner in OWNERS if owner.adapter]))
    def flip(self, owner: Owner) -> None:
        assert owner.adapter is not None
        kept = {one: self._matches(one) for one in (owner, Owner(owner.user_id, None))}
        self.tiers.flip(owner.adapter)
        self.rooms.prefix.forget(lambda o: o.user_id == owner.user_id and o.adapter not in (None, owner.adapter))
        assert {one: self._matches(one) for one in kept} == kept

    def _fill(self, adapter: Any, pages: list[int]) -> Any:
        made = Value(adapter.ref)
        assert pages == list(range(pages[0], pages[0] + self.sizes[adapter.ref]))
        self.written |= {(page, place): made for page in pages for place in range(SIZE)}
        return made

    def _land(self) -> None:
        for ref, error in self.tiers.landed():
            if error is not None:
                assert self.sizes[ref] > self.rooms.pool.total
                for one in [one for one in self.here if one.adapter == ref and not one.pages]:
                    self._end(one)

    def _is_nobodys(self, user: int) -> None:
        """What was computed for the user until now, and what still runs for them, must not be found again."""
        self.drops += 1

        def gone(owner: Owner | None) -> Owner | None:
            return owner._replace(user_id=-self.drops) if owner is not None and owner.user_id == user else owner

        self.owners = {number: gone(owner) for number, owner in self.owners.items()}
        for slot, what in self.written.items():
            if isinstance(what, tuple) and isinstance(what[0], Owner):
                self.written[slot] = gone(what[0]), what[1]

    def _matches(self, owner: Owner) -> int:
        return sum(len(self.rooms.prefix.match(owner, [*start, 9])) for start in product((0, 1), repeat=SIZE))

    def _computes_with_its_adapter(self, one: Sequence) -> None:
        assert (one.lease is None) == (one.adapter is None)
        if one.lease is not None:
            value = one.lease.value
            assert isinstance(value, Value)
            assert value.ref == one.adapter
            assert all(self.written[page, place] is value for page in one.lease.pages for place in range(SIZE))

    def _write(self, one: Sequence, end: int) -> None:
        """Compute up to `end`. What was there before, cached or not, must be this text under this owner."""
        whose = self.owners[one.id] or one.id
        for place in range(one.computed):
            slot = one.pages[place // SIZE], place % SIZE
            assert self.written[slot] == (whose, tuple(one.tokens[: place + 1]))
        for place in range(one.computed, end):
            self.written[one.pages[place // SIZE], place % SIZE] = whose, tuple(one.tokens[: place + 1])
        one.computed = end

    def _extend(self, one: Sequence) -> None:
        assert len(one.pages) * SIZE >= one.limit
        one.tokens.append(len(one.tokens) % 2)
        if one.background or len(one.tokens) >= one.limit:
            self._end(one)

    def _end(self, one: Sequence) -> None:
        self.here.remove(one)
        self.rooms.remove(one)
        assert one.pages == ()
        assert one.lease is None

    def _everything_is_idle(self) -> None:
        while self.borrowed:
            self.bring_back()
        while self.loads or self.tiers.arrived:
            while self.loads:
                self.loads.pop(0)()
            self._land()
        assert self.rooms.pool.available == self.rooms.pool.total

    @invariant()
    def nothing_leaked(self) -> None:
        if hasattr(self, "rooms"):
            self.rooms.check()
            assert self.rooms.running <= self.running
            assert self.rooms.running + self.rooms.waiting == len(self.here)
            leases = [*self.borrowed, *(one.lease for one in self.here if one.lease is not None)]
            for lease in self.tiers.shelf.leases:
                assert lease.users == sum(one is lease for one in leases) + (lease.value is None)


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
