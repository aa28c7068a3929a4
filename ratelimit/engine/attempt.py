"""One decision on its way through compare-and-swap: what is believed to be stored, and what was tried so far."""

from __future__ import annotations

from typing import Any, Final

from ratelimit.core.algorithm import State, decode, encode, out_of_range
from ratelimit.core.commands import TryConsume, TryConsumeAndReturnRemaining, execute
from ratelimit.core.results import ConsumptionProbe
from ratelimit.engine.cancellation import seen_through
from ratelimit.engine.last_seen import NOTHING_SEEN, UNKNOWN, Sighting
from ratelimit.engine.question import Question, new_tuple
from ratelimit.engine.store_requests import Requests
from ratelimit.errors import BucketNotFoundError, ContentionError, StoreError, StoreTimeoutError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Lost

# A decision that has lost this many swaps pauses before the next. Each pause is drawn at random between nothing and a
# longest that doubles, so that writers that have collided do not meet again.
IMMEDIATE_ATTEMPTS: Final = 4
_SHORTEST_PAUSE_NANOS: Final = 500_000
_LONGEST_PAUSE_NANOS: Final = 16_000_000


class Attempt:
    """What is known about one decision while it is made.

    :ivar before: the bytes that are believed to be stored; None: nothing.
    :ivar state: the state that these bytes hold; None also where they have not been decoded.
    :ivar after: the state that was computed last; None where nothing is to be stored, or only its bytes were computed.
    :ivar is_fresh: whether the store has shown ``before`` to this very decision, and not to an earlier one.
    :ivar swaps: swaps that this decision has lost.
    :ivar now: the time to decide by; None: it has to be asked for.
    :ivar is_ready: whether all is known that a decision is computed from.
    :ivar must_read: whether the store must be read for that.
    :ivar should_delegate: whether the store is to decide by itself.
    :ivar has_delegated: whether the store was asked to, which happens once at most.
    :ivar learns: whether the decision of the store is to show how much the key can be trusted.
    :ivar trust: the trust in the key as far as this decision has shown; see ``delegation``.
    :ivar behind: how often of late a strict request was not run.
    :ivar new: the bytes that were computed last, to be stored by a swap.
    :ivar ttl: the time to live of these bytes, in milliseconds.
    :ivar seen: what the manager had seen under the key when this decision began.
    :ivar answer: the answer that goes with the swap that this decision began with.
    :ivar asked: what the store was asked to decide; None: nothing yet.
    :ivar usual: the usual request that this decision began with, outside of the loop; None where there was none.
    :ivar outcome: the reply to that request, or the ``StoreError`` in its place, which the loop has yet to look at.
    """

    # The class holds the defaults, because most decisions are over after one swap and set none of these.
    is_fresh: bool = False
    after: Any = None
    is_ready: bool = True
    swaps: int = 0
    must_read: bool = False
    should_delegate: bool = False
    has_delegated: bool = False
    learns: bool = False
    new: bytes = b""
    ttl: int = 0
    answer: Any = None
    asked: Any = None
    usual: Any = None
    outcome: Any = None

    def __init__(self, requests: Requests, question: Question) -> None:
        self.requests = requests
        self.question = question
        ((target, self.terms, command),) = question.parts
        self.target = target
        self.command = command
        key = target.stored_key
        self.seen = seen = requests.last_seen(key, NOTHING_SEEN)
        self.before, state, self.trust, self.behind = seen
        self.state: Any = state
        self.now: Any = requests.known_now(key)
        if self.trust < requests.habit.needed_trust or not requests.tuning.swaps:
            # This is what _is_delegable returns at this time.
            self.should_delegate = requests.decide is not None and requests.tuning.delegates and not command.only_reads
        if self.now is None or self.should_delegate or self.before is None or command.only_reads:
            self.is_ready = False
            if self.now is None or command.only_reads or target.must_exist_once_made:
                self.must_read = self._must_read_first()

    @property
    def must_exist(self) -> bool:
        """Whether a missing bucket is an error."""
        return self.target.must_exist_once_made and self.target.made

    def read(self) -> Steps[None]:
        """Read what is stored."""
        self.must_read = False
        self.question.course.round_trips += 1
        self.shown((yield self.requests.get(self.target.stored_key, deadline=self.question.deadline)))

    def read_clock(self) -> Steps[None]:
        """Learn the time."""
        key = self.target.stored_key
        now = self.requests.now(key)
        if now is None:
            # No read has brought the time along, so that the store is asked for it.
            now = self.requests.now_nanos(key, deadline=self.question.deadline)
        self.now = yield now

    def compute(self) -> tuple[bool, Any]:
        """Compute the next state and the answer; return whether there is a state to store, and the answer."""
        before, command = self.before, self.command
        self.after = None
        if before is not None:
            if type(command) is TryConsume or type(command) is TryConsumeAndReturnRemaining:
                configuration, version, _ = self.terms
                everyday = configuration.algorithm.everyday
                if everyday is not None and (head := everyday.head_of(configuration, version)) is not None:
                    done = everyday.consumed(head, before, command.tokens, self.now)
                    if done:
                        self.new, remaining, full = done
                        self.ttl = self.target.expiration.ttl_until(full, is_new_when_full=head.is_new_when_full)
                        return True, True if type(command) is TryConsume else ConsumptionProbe(True, remaining, 0, full)
                    if done is False and not self.is_fresh:
                        # What is remembered never refuses alone: the answer will be another one.
                        return False, None
            if self.state is None:
                self.state = decode(before, self.target.key)
        try:
            self.after, answer = execute(command, self.terms, self.state, self.now)
        except ArithmeticError as error:
            raise out_of_range(before or b"", self.target.key) from error
        if self.after is None:
            return False, answer
        self.new = encode(self.after)
        self.ttl = self.target.expiration.ttl_millis(self.after, self.now)
        return True, answer

    def swap(self) -> Steps[Lost | None]:
        """Return the steps that replace ``before`` by ``new``; nothing is sent until they are run."""
        requests, question, target = self.requests, self.question, self.target
        question.course.round_trips += 1
        if self.usual is not None:
            return self._swap_that_was_sent()
        if question.holds:
            return self._swap_seen_through()
        return requests.swapping(target.stored_key, self.before, self.new, self.ttl, question.deadline)

    def _swap_that_was_sent(self) -> Steps[Lost | None]:
        reply = self.taken_reply()
        express: Any = self.requests.express
        key, deadline = self.target.stored_key, self.question.deadline
        return (yield from express.swapped(key, self.before, self.new, self.ttl, deadline=deadline, reply=reply))  # type: ignore[no-any-return]

    def taken_reply(self) -> Any:
        """Return the reply to the usual request, and forget that this was sent.

        :raises StoreError: which has come in place of the reply.
        """
        outcome = self.outcome
        self.usual = self.outcome = None
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    def _swap_seen_through(self) -> Steps[Lost | None]:
        question = self.question
        swap = self.requests.swap(self.target.stored_key, self.before, self.new, self.ttl, deadline=question.deadline)
        return (yield from seen_through(swap, question.course))  # type: ignore[no-any-return]

    def may_repeat(self, failure: BaseException) -> bool:
        """Return whether a swap that ended with this failure may be sent again.

        It may not if it certainly was not carried out, or if nobody is left to wait for another reply.
        """
        if isinstance(failure, StoreError):
            return failure.in_doubt and not self.is_late()
        return self.question.holds and not isinstance(failure, GeneratorExit)

    def remembered(self, answer: Any) -> Any:
        """Remember what the store has shown, and return the answer of a command that stores nothing."""
        seen, trust = self.seen, self.trust
        if trust == UNKNOWN:
            trust = 0
        elif self.swaps == 0 and seen.stored is not None and seen.stored != self.before:
            trust = self.requests.habit.changed(seen)
        self.remember(self.before, self.state, trust)
        return answer

    def won(self, answer: Any) -> Any:
        """Remember what the swap has stored, and return the answer of its command."""
        trust, after = self.trust, self.after
        if trust <= 0 and self.swaps == 0:
            trust = 0 if self.is_fresh else self.requests.habit.proved(self.seen)
        if after is not None:
            self.note_what_was_made(self.state, after)
        self.requests.remember(self.target.stored_key, new_tuple(Sighting, (self.new, after, trust, self.behind)))
        return answer

    def note_what_was_made(self, before: State | None, after: State | None) -> None:
        """Note that the bucket was made, or its configuration replaced, if so.

        :param after: the state that was stored; None: ``before`` has stayed.
        """
        if before is None or (after is not None and before.configuration_version != after.configuration_version):
            self.target.made = True

    def states(self) -> tuple[State | None, State]:
        """Return the state that was to be replaced, and the one that was to replace it."""
        key = self.target.key
        return None if self.before is None else decode(self.before, key), decode(self.new, key)

    def remember(self, stored: bytes | None, state: State | None, trust: int) -> None:
        """Remember what is stored, if anybody knows, and how much that can be trusted."""
        self.requests.remember(self.target.stored_key, Sighting(stored, state, trust, self.behind))

    def lost(self, loss: Lost) -> Steps[None]:
        """Go on from the bytes of the writer that has won, after a pause where many swaps were lost.

        :raises ContentionError: where this decision has lost as many swaps as it may.
        :raises StoreTimeoutError: where there is no time left.
        """
        if self.question.course.interruption is not None:
            # The swap was lost, so that nothing was consumed and nothing has to be undone.
            raise self.question.course.interruption
        requests = self.requests
        self.swaps += 1
        self.trust = requests.habit.changed(self.seen, self.swaps)
        self.shown(loss.state)
        late = self.is_late()
        if late or self.swaps >= requests.tuning.most_attempts:
            self.remember(self.before, None, self.trust)
            if late:
                raise StoreTimeoutError(
                    self.target.key, f"there was no time left after {self.swaps} swaps that were lost"
                )
            raise ContentionError(self.target.key, self.swaps)
        if self.swaps >= IMMEDIATE_ATTEMPTS:
            yield requests.pause(jittered_pause(self.swaps))
            yield from self.read()

    def is_late(self) -> bool:
        """Return whether there is no time left to ask the store."""
        deadline = self.question.deadline
        return deadline is not None and self.requests.monotonic() >= deadline

    def must_read_again(self) -> None:
        """Let the next round begin with a read, since what is remembered never refuses alone."""
        self.is_ready, self.must_read, self.now = False, True, None

    def shown(self, before: bytes | None) -> None:
        """Go on from the bytes that the store has shown.

        :raises BucketNotFoundError: where nothing is stored, and this handle has made a bucket that must exist.
        """
        if before is None and self.must_exist:
            raise BucketNotFoundError(self.target.key)
        # The time is read again: the winner's refill may be later than the time of the swap that was lost.
        self.before, self.state, self.is_fresh, self.now = before, None, True, None
        self.is_ready = False
        self.should_delegate = self._is_contended() and self._is_delegable()

    def _is_contended(self) -> bool:
        # After two round trips that brought no answer, a swap could be lost as well.
        return self.swaps > 0 or self.question.course.round_trips > 1 or not self.requests.tuning.swaps

    def _must_read_first(self) -> bool:
        if self.command.only_reads or (self.before is None and self.must_exist):
            return True
        # A store that can decide brings its time along with a read.
        return self.now is None and self.requests.decide is not None

    def _is_delegable(self) -> bool:
        # A command that only reads is answered from its read, unless that shows a bucket to be made or replaced.
        can_delegate = self.requests.decide is not None and not self.has_delegated and self.requests.tuning.delegates
        return can_delegate and (self.swaps > 0 or not self.command.only_reads)


def jittered_pause(swaps: int) -> int:
    """Return how long to pause, in nanoseconds, after so many swaps that were lost."""
    longest = min(_SHORTEST_PAUSE_NANOS << min(swaps - IMMEDIATE_ATTEMPTS, 20), _LONGEST_PAUSE_NANOS)
    return fork_safety.chance.randrange(longest)
