"""The prefix cache: pages that earlier sequences filled serve later ones of the same user and version that begin alike.

Pure Python over integers. A block is one full page of tokens behind all that stands before it, so its key is its
owner or the block before it, and its tokens themselves: no hash can be mistaken for another.

    (user 7, version 3) ── block "a b c d" ── block "e f g h" ── block "i j k l"
                                          └── block "e f x y"

A block that a running sequence uses never leaves. The others are idle: they leave, longest unused first, when pages
are wanted (pages.py) or when their user has more than `quota` of them. Whoever uses a block uses all before it, and
lets go of the last one first, so the longest unused is never one that another stands behind. One that has to leave
for the place where it lies takes along what stands behind it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from persona.engine.pages import Idle, PagePool
from persona.engine.protocol import AdapterRef


class Owner(NamedTuple):
    """Whose text it is, and under which version its keys and values were computed."""

    user_id: int
    adapter: AdapterRef | None


class Block:
    """A full page of computed tokens. Known by identity."""

    __slots__ = ("behind", "known", "owner", "page", "parent", "since", "tokens", "users")

    def __init__(self, owner: Owner, parent: "Block | None", tokens: tuple[int, ...], page: int) -> None:
        self.owner, self.parent, self.tokens, self.page = owner, parent, tokens, page
        self.users = 0  # running sequences
        self.known = True  # whether a later sequence may find it
        self.behind: set[Block] = set()  # known ones that this one is the parent of
        self.since = 0  # when its last user let go of it, by the pool's clock

    @property
    def key(self) -> "Key":
        return self.parent or self.owner, self.tokens


Key = tuple[Block | Owner, tuple[int, ...]]


class PrefixCache:
    """All blocks, over the pages of `pool`."""

    def __init__(self, pool: PagePool, quota: float = 0.5) -> None:
        """quota: share of all pages that idle blocks of one user may hold."""
        self.pool = pool
        self._quota = max(1, int(pool.total * quota))
        self._blocks: dict[Key, Block] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()  # longest unused first
        self._idle_of: dict[int, OrderedDict[Block, None]] = {}  # the same by user
        pool.join(self)

    @property
    def idle_pages(self) -> int:
        """Pages that hold text which nobody is using."""
        return len(self._idle)

    def idle(self) -> Iterator[Idle]:
        for block in self._idle:
            yield Idle(block.since, (block.page,), partial(self._give_way, block))

    def match(self, owner: Owner, tokens: Sequence[int]) -> list[Block]:
        """The longest chain of blocks that `tokens` begin with; at least one token is left over."""
        size, found = self.pool.size, list[Block]()
        for start in range(0, len(tokens) - size, size):
            key: Key = (found[-1] if found else owner, tuple(tokens[start : start + size]))
            if (block := self._blocks.get(key)) is None:
                break
            found.append(block)
        return found

    def take(self, held: Sequence[Block], count: int) -> list[int] | None:
        """Hold a matched chain and get `count` pages; None, and nothing held, if there are not as many."""
        self._hold(held)
        pages = self.pool.take(count)
        if pages is None:
            self.release(held)
        return pages

    def keep(self, owner: Owner, before: Block | None, tokens: tuple[int, ...], page: int) -> Block | None:
        """A sequence has filled `page`: a new block, held by it. None if the same text is a block already."""
        block = Block(owner, before, tokens, page)
        if block.key in self._blocks or (before is not None and not before.known):
            return None
        self._blocks[block.key] = block
        if before is not None:
            before.behind.add(block)
        block.users = 1
        return block

    def release(self, held: Iterable[Block]) -> None:
        """A sequence lets go of its chain, first block first."""
        touched = set()
        for block in reversed(list(held)):
            block.users -= 1
            if block.users:
                continue
            if block.known:
                block.since = self.pool.now()
                self._idle[block] = None
                self._idle_of.setdefault(block.owner.user_id, OrderedDict())[block] = None
                touched.add(block.owner.user_id)
            else:
                self.pool.give([block.page])
        for user_id in touched:
            while len(mine := self._idle_of.get(user_id, ())) > self._quota:
                self._evict(next(iter(mine)))

    def forget(self, which: Callable[[Owner], bool]) -> None:
        """Blocks of these owners are found no more; those in use give their page back when they are let go of."""
        for block in [block for block in self._blocks.values() if which(block.owner)]:
            if block in self._idle:
                self._evict(block)
            elif block.known:
                del self._blocks[block.key]
                block.known = False

    def check(self, held: Sequence[Sequence[Block]], pages: Iterable[list[int]]) -> None:
        """Assert that every page is free, idle, held or owned, once, and that no chain has a gap.

        held: the chains of all sequences · pages: those that sequences own without a block, and those of adapters.
        """
        used: dict[Block, int] = {}
        for chain in held:
            for place, block in enumerate(chain):
                used[block] = used.get(block, 0) + 1
                assert block.parent is (chain[place - 1] if place else None), "a chain has a gap"
        assert all(block.users == count for block, count in used.items()), "a block is held by others than it counts"
        assert all(block.known and not block.users for block in self._idle), "an idle block is in use"
        known = set(self._blocks.values())
        assert all(block.parent is None or block.parent in known for block in known), "a block lost what is before it"
        assert {*self._idle, *(block for block in used if block.known)} == known, "a block is nobody's"
        assert all(block in (block.parent or block).behind for block in known if block.parent), "a block is forgotten"
        assert [*self._idle] == sorted(self._idle, key=lambda block: block.since), "the order of leaving is broken"
        by_user = [block for mine in self._idle_of.values() for block in mine]
        assert len(by_user) == len(self._idle)
        self.pool.check([*pages, [block.page for block in {*self._idle, *used}]])

    def _hold(self, chain: Iterable[Block]) -> None:
        for block in chain:
            if not block.users:
                self._leave_idle(block)
            block.users += 1

    def _give_way(self, block: Block) -> None:
        if block.known:
            self._evict(block)

    def _evict(self, block: Block) -> None:
        """With all that stand behind it, the last ones first. They are idle: whoever used one would use this one."""
        leaving = [block]
        for one in leaving:
            leaving += one.behind
        for one in reversed(leaving):
            if one.parent is not None:
                one.parent.behind.discard(one)
            self._leave_idle(one)
            del self._blocks[one.key]
            one.known = False
            self.pool.give([one.page])

    def _leave_idle(self, block: Block) -> None:
        del self._idle[block]
        mine = self._idle_of[block.owner.user_id]
        del mine[block]
        if not mine:
            del self._idle_of[block.owner.user_id]
