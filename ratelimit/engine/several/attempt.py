"""Calls about several buckets on their way through compare-and-swap: what is believed to be stored under each key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.core.algorithm import State, decode, encode
from ratelimit.engine.attempt import IMMEDIATE_ATTEMPTS, jittered_pause
from ratelimit.engine.last_seen import NOTHING_SEEN, UNKNOWN, Sighting
from ratelimit.engine.question import Course, Target
from ratelimit.engine.several.computing import computed, note_what_was_made
from ratelimit.engine.several.parts import Call
from ratelimit.engine.store_requests import Requests
from ratelimit.errors import BucketNotFoundError, ContentionError, StoreError, StoreTimeoutError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Lost, Swap


class Held:
    """One bucket of an attempt.

    :ivar before: the bytes that are believed to be stored; None: nothing.
    :ivar state: the state that these bytes hold; None also where they have not been decoded.
    :ivar after: the state that is to be stored; None: what is there stays.
    :ivar new: the bytes of that state.
    :ivar ttl: the time to live of these bytes, in milliseconds.
    :ivar seen: what was remembered of the key when the attempt began.
    :ivar trust: the trust in the key as far as this attempt has shown; see ``engine.delegation``.
    :ivar surprises: how often anything else was stored than was believed.
    """

    __slots__ = ("after", "before", "new", "seen", "state", "surprises", "target", "trust", "ttl")

    def __init__(self, target: Target, seen: Sighting) -> None:
        self.target = target
        self.seen = seen
        self.before, state, self.trust, _ = seen
        self.state: Any = state
        self.after: Any = None
        self.new = b""
        self.ttl = 0
        self.surprises = 0

    @property
    def must_exist(self) -> bool:
        """Whether a missing bucket is an error."""
        return self.target.must_exist_once_made and self.target.made

    def decoded(self) -> State | None:
        """Return the state that is believed to be stored."""
        if self.state is None and self.before is not None:
            self.state = decode(self.before, self.target.key)
        return self.state  # type: ignore[no-any-return]

    def show(self, before: bytes | None) -> None:
        """Go on from the bytes that the store has shown.

        :raises BucketNotFoundError: where nothing is stored, and this handle has made a bucket that must exist.
        """
        if before is None and self.must_exist:
            raise BucketNotFoundError(self.target.key)
        self.before, self.state = before, None

    def swap(self) -> Swap:
        """Return the swap of this bucket, which only compares where nothing is to be stored."""
        return Swap(self.target.stored_key, self.before, None if self.after is None else self.new, self.ttl)


class Attempt:
    """What is known about calls that are decided together, while they are.

    :param calls: in the order in which they are decided.
    :param holds: whether a request that is in flight is repeated when the caller is interrupted, so that its outcome is
        known; the interruption is then found in the course.
    :ivar held: the buckets, by their stored keys.
    :ivar now: the time to decide by; None: it has to be asked for.
    :ivar is_fresh: whether the store has shown all of ``before``, at one time, to this very attempt.
    :ivar is_changed: whether there is anything to be stored.
    :ivar must_look: whether the store is to be asked what is there before anything is computed.
    :ivar should_delegate: whether the store is to decide by itself.
    :ivar has_delegated: whether the store was asked to, which happens once at most.
    :ivar swaps: swaps that were lost.
    """

    is_fresh = False
    is_changed = False
    has_delegated = False
    swaps = 0

    def __init__(
        self, requests: Requests, calls: Sequence[Call], deadline: float | None, course: Course, *, holds: bool
    ) -> None:
        self.requests = requests
        self.calls = calls
        self.deadline = deadline
        self.course = course
        self.holds = holds
        self.held: dict[bytes, Held] = {}
        for call in calls:
            for target, _, _ in call:
                key = target.stored_key
                if key not in self.held:
                    self.held[key] = Held(target, requests.last_seen(key, NOTHING_SEEN))
        self.keys = list(self.held)
        buckets = self.held.values()
        self.only_reads = all(part.command.only_reads for call in calls for part in call)
        self.now: Any = requests.known_now(self.keys[0])
        # A store that can decide brings its time along with whatever it is asked.
        self.must_look = (self.now is None and requests.decide is not None) or any(
            held.before is None and (self.only_reads or held.must_exist) for held in buckets
        )
        needed = requests.habit.needed_trust
        doubts = not requests.tuning.swaps or any(held.trust < needed for held in buckets)
        self.should_delegate = doubts and not self.only_reads and self._is_delegable()

    def read_clock(self) -> Steps[None]:
        """Learn the time."""
        key = self.keys[0]
        now = self.requests.now(key)
        if now is None:
            now = self.requests.now_nanos(key, deadline=self.deadline)
        self.now = yield now

    def compute(self) -> list[list[Any]]:
        """Compute the next states, and return the answers of each call."""
        for held in self.held.values():
            held.after = None
        answers = []
        for call in self.calls:
            buckets = [self.held[part.target.stored_key] for part in call]
            befores = [held.decoded() if held.after is None else held.after for held in buckets]
            afters, found = computed(call, befores, self.now)
            answers.append(found)
            for held, after in zip(buckets, afters, strict=True):
                if after is not None:
                    held.after = after
        self.is_changed = False
        for held in self.held.values():
            if held.after is not None:
                self.is_changed = True
                held.new = encode(held.after)
                held.ttl = held.target.expiration.ttl_millis(held.after, self.now)
        return answers

    def ask(self) -> Any:
        """Send the swap of all buckets; return its answer, or what is awaited for it."""
        self.course.round_trips += 1
        return self.requests.swap_all([held.swap() for held in self.held.values()], deadline=self.deadline)  # type: ignore[misc]  # it is there

    def look(self) -> Steps[None]:
        """Ask the store what is there, which is a swap that stores nothing."""
        self.must_look = False
        for held in self.held.values():
            held.after = None
        self.is_changed = False
        self.shown((yield self.ask()))

    def shown(self, losses: Sequence[Lost | None] | None) -> None:
        """Go on from what the answer to a swap has shown of each bucket."""
        for held, loss in zip(self.held.values(), losses or (), strict=losses is not None):
            if loss is None:
                continue
            held.surprises += 1
            if self.is_changed or held.seen.stored is not None:
                held.trust = self.requests.habit.changed(held.seen, held.surprises)
            held.show(loss.state)
        self._begin_again()

    def _begin_again(self) -> None:
        """Compute again: at a later time, since the last refill may be later than the time that was read before."""
        self.is_fresh = True
        self.now = self.requests.known_now(self.keys[0])
        contended = self.swaps > 0 or self.course.round_trips > 1 or not self.requests.tuning.swaps
        self.should_delegate = contended and self._is_delegable() and (self.swaps > 0 or not self.only_reads)

    def shown_undecided(self, before: Sequence[bytes | None]) -> None:
        """Go on from what the store has shown when it could not decide."""
        for held, found in zip(self.held.values(), before, strict=True):
            held.show(found)
        self._begin_again()

    def lost(self, losses: Sequence[Lost | None]) -> Steps[None]:
        """Go on from the bytes of the writers that have won, after a pause where many swaps were lost.

        :raises ContentionError: where as many swaps were lost as may be.
        :raises StoreTimeoutError: where there is no time left.
        """
        if self.course.interruption is not None:
            # The swap was lost, so that nothing was consumed and nothing has to be undone.
            raise self.course.interruption
        self.swaps += self.is_changed
        self.shown(losses)
        key = next(
            (held.target.key for held, loss in zip(self.held.values(), losses, strict=True) if loss is not None), b""
        )
        late = self.is_late()
        if late or self.swaps >= self.requests.tuning.most_attempts:
            self._remember_what_was_shown()
            if late:
                raise StoreTimeoutError(key, f"there was no time left after {self.swaps} swaps that were lost")
            raise ContentionError(key, self.swaps)
        if self.is_changed and self.swaps >= IMMEDIATE_ATTEMPTS:
            yield self.requests.pause(jittered_pause(self.swaps))
            # Bytes that are older than the pause would lose to those who have not paused.
            self.must_look = True

    def is_late(self) -> bool:
        """Return whether there is no time left to ask the store."""
        return self.deadline is not None and self.requests.monotonic() >= self.deadline

    def may_repeat(self, failure: BaseException) -> bool:
        """Return whether a swap that ended with this failure may be sent again."""
        if not self.is_changed:
            if isinstance(failure, StoreError):
                # It was only looked.
                failure.in_doubt = False
            return False
        if isinstance(failure, StoreError):
            return failure.in_doubt and not self.is_late()
        return self.holds and not isinstance(failure, GeneratorExit)

    def won(self) -> None:
        """Remember what is stored after a swap that was carried out, or one that has found all as it was believed."""
        for held in self.held.values():
            trust = held.trust
            if trust <= 0 and not held.surprises:
                trust = 0 if held.seen.stored is None else self.requests.habit.proved(held.seen)
            elif trust == UNKNOWN:
                trust = 0
            if held.after is None:
                self._remember(held, held.before, held.state, trust)
            else:
                note_what_was_made(held.target, held.state, held.after)
                self._remember(held, held.new, held.after, trust)

    def explained(self, before: Sequence[bytes | None]) -> list[list[Any]]:
        """Compute the answers that belong to a decision of the store, which has replied what was stored before."""
        for held, found in zip(self.held.values(), before, strict=True):
            held.before, held.state = found, None
        # The script makes the same transition, to the byte.
        answers = self.compute()
        habit = self.requests.habit
        for held in self.held.values():
            seen, trust = held.seen, held.trust
            if held.after is not None:
                note_what_was_made(held.target, held.state, held.after)
            if not held.surprises and seen.stored is not None:
                trust = habit.proved(seen) if seen.stored == held.before else habit.changed(seen)
            elif trust == UNKNOWN:
                trust = 0
            if trust >= 0 or seen.stored is None:
                self._remember(held, held.before if held.after is None else held.new, held.after or held.state, trust)
            else:
                # Others write it. The next decision looks at it, and learns whether they still do.
                self._remember(held, None, None, trust)
        return answers

    def forget(self) -> None:
        """Expect nothing any more: nobody knows what is stored."""
        for held in self.held.values():
            self._remember(held, None, None, held.trust)

    def _remember_what_was_shown(self) -> None:
        for held in self.held.values():
            self._remember(held, held.before, None, held.trust)

    def _remember(self, held: Held, stored: bytes | None, state: State | None, trust: int) -> None:
        self.requests.remember(held.target.stored_key, Sighting(stored, state, trust, held.seen.behind))

    def _is_delegable(self) -> bool:
        can_delegate = self.requests.decide_all is not None and self.requests.tuning.delegates
        return can_delegate and not self.has_delegated
