"""Runs an example as its readers would, and tells what happens.

python examples/run.py fastapi | plans | flask | django | outbound | llm-proxy

Starts a Redis of its own (or takes the one in RATELIMIT_URL), and with it two instances of the example, or the workers
and the API that they call. Then it plays the part of the clients, and prints their requests and the answers. Ends with
status 0 where all came as it should, and otherwise with 1; nothing that it has started outlives it.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

from ratelimit import Bandwidth, ProxyManager, RateLimitError
from ratelimit.demo.errors import DemoError
from ratelimit.demo.local_redis import find_binary, local_redis
from ratelimit.integrations.http import api_key
from ratelimit.runtime.signals import Interrupted, interruptible

HERE = Path(__file__).resolve().parent
QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
PATIENCE = 60
"""Seconds, for what takes one or two."""


class UntrueError(Exception):
    """The story has not come true."""


class SlowRedisError(Exception):
    """Redis has not answered within half a second, hence an instance has answered 503: the machine is busy."""


def check(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UntrueError(otherwise)


class Answer(NamedTuple):
    status: int
    fields: http.client.HTTPMessage
    body: bytes

    @property
    def shown(self) -> str:
        """In short: the fields that change from one answer to the next."""
        names = ("RateLimit", "Retry-After")
        return "  ".join([str(self.status), *(f"{name}: {self.fields[name]}" for name in names if name in self.fields)])

    @property
    def shown_whole(self) -> str:
        names = ("RateLimit-Policy", "RateLimit", "Retry-After", "Content-Type")
        fields = [f"  {name}: {self.fields[name]}" for name in names if name in self.fields]
        return "\n".join([f"  {self.status} {http.client.responses[self.status]}", *fields, f"  {self.body.decode()}"])


class Instance(NamedTuple):
    """A server process, and its children."""

    port: int

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> Answer:
        """Ask over a connection of its own."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request(method, path, headers=named)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
        if answer.status == 503:
            raise SlowRedisError
        return answer


class Keeper:
    """A process that cannot outlive this one: see keeper.py."""

    def __init__(self, command: Sequence[str], directory: Path, log: Path, variables: dict[str, str]) -> None:
        with log.open("wb") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-S", str(HERE / "keeper.py"), *command],
                cwd=directory,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._command = command
        self._log = log
        self._stdin = cast("IO[bytes]", self._keeper.stdin)
        self._stdout = cast("IO[bytes]", self._keeper.stdout)
        self.pid = int(self._stdout.readline() or 0)

    def check(self) -> None:
        """:raises DemoError: where the process has ended."""
        if self._keeper.poll() is not None:
            raise DemoError(f"this has ended: {shlex.join(self._command)}")

    def tell_last_words(self) -> None:
        if lines := self._log.read_text(errors="replace").splitlines()[-20:]:
            print("\n  ".join([f"from {shlex.join(self._command)}:", *lines]), file=sys.stderr)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self._stdin.close()

    def wait(self) -> None:
        self._keeper.wait()
        self._stdout.close()


class Stage:
    """What an example is made of while it runs; the end of the block ends it all.

    :param url: of Redis.
    """

    def __init__(self, name: str, url: str, workers: int = 1) -> None:
        self.directory = HERE / name
        self.url = url
        self.workers = workers
        self._keepers: list[Keeper] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="ratelimit-example-", ignore_cleanup_errors=True)
        self.scratch = Path(self._temporary.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for keeper in self._keepers:
            keeper.stop()
        for keeper in self._keepers:
            keeper.wait()
        if isinstance(error, Exception):
            for keeper in self._keepers:
                keeper.tell_last_words()
        self._temporary.cleanup()

    def start(self, *command: str, **variables: str) -> Keeper:
        """Start a program of Python's in the directory of the example."""
        log = self.scratch / f"{len(self._keepers)}.log"
        keeper = Keeper([sys.executable, *command], self.directory, log, {"RATELIMIT_URL": self.url, **variables})
        self._keepers.append(keeper)
        return keeper

    def serve(self, *command: str, **variables: str) -> Instance:
        """Start a server, on a free port that stands for PORT in the command, and wait until it listens there."""
        port = free_port()
        words = [word.replace("PORT", str(port)) for word in command]
        say(f"$ {shlex.join(words[1:] if words[0] == '-m' else ['python', *words])}")
        keeper = self.start(*words, **{"PORT": str(port), **variables})
        deadline = time.monotonic() + PATIENCE
        while not listens(port):
            keeper.check()
            check(time.monotonic() < deadline, f"nothing listens on port {port}")
            time.sleep(0.02)
        return Instance(port)

    def uvicorn(self, app: str = "app:app", **variables: str) -> Instance:
        options = ["--no-proxy-headers", "--no-access-log", "--workers", str(self.workers), "--port", "PORT"]
        return self.serve("-m", "uvicorn", app, *options, **variables)

    def gunicorn(self, app: str = "app:app") -> Instance:
        options = ["--workers", str(self.workers), "--bind", "127.0.0.1:PORT"]
        return self.serve("-m", "gunicorn", app, *options, HOME=str(self.scratch))  # where it makes a control socket


def free_port() -> int:
    """A port that is free, below those that outgoing connections get."""
    while True:
        port = random.randrange(11000, 21000)
        with suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
        return True
    return False


def say(*words: object) -> None:
    print(*words, flush=True)


# Ten tokens, fifteen requests.


def uvicorns(stage: Stage) -> list[Instance]:
    return [stage.uvicorn(), stage.uvicorn()]


def gunicorns(stage: Stage) -> list[Instance]:
    return [stage.gunicorn(), stage.gunicorn()]


def one_of_each(stage: Stage) -> list[Instance]:
    return [stage.gunicorn("app:wsgi"), stage.uvicorn("app:asgi")]


def tell_of_ten_tokens(policy: str, instances: Sequence[Instance]) -> str:
    say("\nTen tokens an hour, fifteen requests, to the instances in turn:")
    turns = cycle(instances)
    answers: list[Answer] = []
    for number in range(1, 16):
        instance = next(turns)
        answers.append(instance.ask())
        say(f"{number:>4}  port {instance.port}  {answers[-1].shown}")
        expect(answers[-1], policy, quota=10, window=3600, left=10 - number)
    say(f"\nThe last answer, with all that the client is told:\n{answers[-1].shown_whole}")
    return "Ten were admitted, and five were refused until the next token comes."


def expect(answer: Answer, policy: str, *, quota: int, window: int, left: int) -> None:
    """The answer is what a client of this policy should get: negative, what is left is a refusal."""
    check(answer.status == (200 if left >= 0 else 429), "that is not the status it should be")
    check(
        answer.fields["RateLimit-Policy"] == f'"{policy}";q={quota};w={window}', "the policy is not what it should be"
    )
    limit = re.fullmatch(r'"(.+)";r=(\d+);t=(\d+)', answer.fields["RateLimit"] or "")
    check(limit is not None and limit[1] == policy, "RateLimit is not of the form it should be")
    assert limit is not None
    seconds, token = int(limit[3]), window // quota
    check(int(limit[2]) == max(0, left), f"{max(0, left)} tokens should be left")
    check(0 < seconds <= token, f"a token comes every {token} seconds")
    if left < 0:
        check(answer.fields["Retry-After"] == str(seconds), "Retry-After should say when the next token comes")
        check(answer.fields["Content-Type"] == "application/problem+json", "it should have a problem's type")
        problem = json.loads(answer.body)
        check(problem["type"] == QUOTA_EXCEEDED, f"a problem should have the type {QUOTA_EXCEEDED}")
        check(problem["violated-policies"] == [policy], "a problem should name the policy")
    else:
        check("Retry-After" not in answer.fields, "Retry-After is for refusals")


# Plans.

PLANS = {"free": 20, "basic": 40, "professional": 100}
PLANS_TTL = 1.1
"""Seconds, in which all processes hear of a new plan; see plans/app.py."""


def instances_with_customers(stage: Stage) -> list[Instance]:
    database = str(stage.scratch / "customers.sqlite3")
    return [stage.uvicorn(DATABASE=database), stage.uvicorn(DATABASE=database)]


def tell_of_plans(policy: str, instances: Sequence[Instance]) -> str:
    def use_up(path: str, quota: int, used: int, key: str) -> None:
        """Make all requests that are left, and one too many for each instance."""
        turns = cycle(instances)
        for number in range(used + 1, quota + len(instances) + 1):
            instance = next(turns)
            answer = instance.ask(path, x_api_key=key)
            if number in (used + 1, used + 2) or number >= quota:
                say(f"{number:>5}  port {instance.port}  {answer.shown}")
            elif number == used + 3:
                say("  ...")
            expect(answer, policy, quota=quota, window=3600, left=quota - number)

    used = 0
    for plan, quota in PLANS.items():
        answer = instances[0].ask(f"/plan/{plan}", "PUT", x_api_key="key-of-acme")
        say(f"\nPUT /plan/{plan}  port {instances[0].port}  {answer.status}")
        check(answer.status == 204, "that is not the status it should be")
        time.sleep(PLANS_TTL)
        say(f"\nacme has the plan {plan}, {quota} requests an hour, and has made {used} of them to /search:")
        use_up("/search", quota, used, "key-of-acme")
        used = quota
    say("\nIts requests to /reports/{year} count apart:")
    answer = instances[1].ask("/reports/2026", x_api_key="key-of-acme")
    say(f"       port {instances[1].port}  {answer.shown}")
    expect(answer, policy, quota=100, window=3600, left=99)
    say("\nSo do those of globex, which has the plan professional:")
    use_up("/search", 100, 0, "key-of-globex")
    say("\nA key that nobody has gets no bucket:")
    answer = instances[0].ask("/search", x_api_key="made up")
    say(f"       port {instances[0].port}  {answer.shown}")
    check(answer.status == 401, "that is not the status it should be")
    return "Each customer had what its plan says, on each route, and a new plan counted within a second everywhere."


def plan_keys() -> list[str]:
    customer = api_key(secret=os.environ.get("API_KEY_SECRET", "a secret for examples only"))
    hashed = [customer.hashed(key) for key in ("key-of-acme", "key-of-globex")]
    return [f"plans-example:{key}|{route}" for key in hashed for route in ("/search", "/reports/{year}")]


class Example(NamedTuple):
    """An example with two instances, a policy of this name for its clients, and a story about them."""

    policy: str
    instances: Callable[[Stage], list[Instance]]
    keys: Callable[[], list[str]]
    story: Callable[[str, Sequence[Instance]], str]


def ten_tokens(policy: str, instances: Callable[[Stage], list[Instance]]) -> Example:
    return Example(policy, instances, lambda: [f"{policy}:127.0.0.1"], tell_of_ten_tokens)


EXAMPLES = {
    "fastapi": ten_tokens("fastapi-example", uvicorns),
    "plans": Example("plans-example", instances_with_customers, plan_keys, tell_of_plans),
    "flask": ten_tokens("flask-example", gunicorns),
    "django": ten_tokens("django-example", one_of_each),
}


# Workers that call somebody else's API.

WORKERS = 8
RATE = 20
JITTER = 0.2
"""Seconds that a call may be late by, without that another one has overtaken it."""
OUTBOUND_KEY = "outbound:example-api"


class Call(NamedTuple):
    """See outbound/api.py."""

    worker: str
    asked: float
    arrived: float
    status: int


def calls_of(api: Instance) -> list[Call]:
    return [Call(*each) for each in json.loads(api.ask("/calls").body)]


def tell_of_workers(stage: Stage, seconds: float, manager: ProxyManager) -> str:
    api = stage.serve("api.py")
    say(f"$ python worker.py    (x {WORKERS})")
    workers = [stage.start("worker.py", API_URL=f"http://127.0.0.1:{api.port}") for _ in range(WORKERS)]
    deadline = time.monotonic() + PATIENCE
    while len({call.worker for call in calls_of(api)}) < WORKERS:
        for worker in workers:
            worker.check()
        check(time.monotonic() < deadline, "not all workers call")
        time.sleep(0.05)

    say(f"\nAll workers call, for {seconds:g} seconds:")
    begin = time.monotonic()
    victim = str(workers[0].pid)
    sleep_until(begin + seconds / 2, api, begin)
    os.kill(workers[0].pid, signal.SIGKILL)
    killed = time.monotonic()
    say(f"  worker {victim} is killed")
    sleep_until(begin + seconds, api, begin)
    end = time.monotonic()
    consumed = manager.snapshot(OUTBOUND_KEY).consumed_tokens
    calls = calls_of(api)

    at_work = [call for call in calls if begin <= call.arrived <= end]
    survivors = {str(worker.pid) for worker in workers[1:]}
    in_share = Counter(call.worker for call in at_work if call.worker in survivors)
    say("\n   worker  calls  longest wait")
    for name in [str(each.pid) for each in workers]:
        own = [call for call in at_work if call.worker == name]
        longest = max((call.arrived - call.asked for call in own), default=0)
        say(f"{name:>9}  {len(own):>5}  {longest:>10.2f} s{'  (killed)' * (name == victim)}")

    first, last = min(call.asked for call in calls), max(call.arrived for call in calls)
    refused = sum(call.status != 200 for call in calls)
    quota = RATE * (last - begin)
    overtaken = count_overtaken(at_work)
    lost = consumed - len(calls)
    say(f"\nrefused: {refused} of {len(calls)}")
    say(f"use of the quota: {len(at_work)} of {quota:.0f}, {len(at_work) / quota:.0%}")
    say(f"overtaken by another call by more than {JITTER:g} s: {overtaken} of {len(at_work)}")
    say(f"reserved and not called: {lost}, for {WORKERS - 1} workers that wait and one that is dead")
    check(refused == 0, "some calls were refused")
    check(len(calls) <= 1 + RATE * (last - first) + 1, "there were more calls than the limit allows")
    check(end - last < 3, "the others did not go on")
    check(all(call.worker != victim for call in calls if call.asked > killed), "the worker that was killed went on")
    check(len(at_work) >= 0.9 * quota, "the quota was not used")
    check(overtaken <= 0.05 * len(at_work), "calls were not served in their order")
    check(len(in_share) == WORKERS - 1 and min(in_share.values()) >= 0.6 * max(in_share.values()), "some got less")
    check(lost <= WORKERS, "more than one reservation was lost")
    return "No call was refused, the quota was used, and who came first was served first."


def sleep_until(then: float, api: Instance, begin: float) -> None:
    while (rest := then - time.monotonic()) > 0:
        time.sleep(min(rest, 5))
        calls = calls_of(api)
        refused = sum(call.status != 200 for call in calls)
        say(f"{time.monotonic() - begin:>5.1f} s: {len(calls)} calls, {refused} refused")


def count_overtaken(calls: Iterable[Call]) -> int:
    """How many arrived later than others that were asked for later, both by more than the jitter."""
    by_arrival = sorted(calls, key=lambda call: call.arrived)
    overtaken, newest, before = 0, float("-inf"), 0
    for call in by_arrival:
        while by_arrival[before].arrived < call.arrived - JITTER:
            newest = max(newest, by_arrival[before].asked)
            before += 1
        overtaken += newest > call.asked + JITTER
    return overtaken


# Clients of a language model.

CLIENTS = 10
USERS = ("alice", "bob", "carol", "dave", "erin")
TOKENS_OF_A_USER = Bandwidth.greedy(1_500, 1)
TOKENS_OF_AN_ORGANISATION = Bandwidth.greedy(3_000, 1)
ORGANISATION = "acme"
MOST_TOKENS = 400
"""The most that a client asks for at once; see llm_proxy/client.py."""
LEAST_USE = 0.95
"""The part of the limit that is used at least, while there is always somebody who wants more."""
LLM_KEYS = [
    f"llm-{what}:{whose}"
    for what in ("requests", "tokens")
    for whose in (*[f"user:{{{ORGANISATION}}}:{user}" for user in USERS], f"organisation:{{{ORGANISATION}}}")
]


def tell_of_tokens(stage: Stage, seconds: float, manager: ProxyManager) -> str:
    bill = stage.scratch / "bill"
    model = stage.serve("-m", "uvicorn", "model:app", "--no-access-log", "--port", "PORT")
    variables = {
        "MODEL_URL": f"http://127.0.0.1:{model.port}",
        "BILLING": str(bill),
        "TOKENS_OF_A_USER": str(TOKENS_OF_A_USER),
        "TOKENS_OF_AN_ORGANISATION": str(TOKENS_OF_AN_ORGANISATION),
    }
    proxies = cycle([stage.uvicorn(**variables), stage.uvicorn(**variables)])
    say(f"$ python client.py    (x {CLIENTS})")
    users = cycle(USERS)
    begin = time.monotonic()
    clients = [
        stage.start("client.py", PROXY_URL=f"http://127.0.0.1:{next(proxies).port}", LLM_USER=next(users))
        for _ in range(CLIENTS)
    ]
    # The time of the story begins when the burst is used up, which the bucket has saved for it.
    while Bill.read(bill).tokens.total() < TOKENS_OF_AN_ORGANISATION.capacity:
        for client in clients:
            client.check()
        check(time.monotonic() < begin + PATIENCE, "nobody gets any tokens")
        time.sleep(0.05)
    say(f"\n{CLIENTS} clients ask, for {seconds:g} seconds:")
    first, before = time.monotonic(), Bill.read(bill).tokens.total()
    time.sleep(seconds / 2)
    os.kill(clients[0].pid, signal.SIGKILL)
    say(f"  a client of {USERS[0]} is killed in mid-stream")
    time.sleep(max(0.0, first + seconds - time.monotonic()))
    used_meanwhile, last = Bill.read(bill).tokens.total() - before, time.monotonic()
    for client in clients[1:]:
        os.kill(client.pid, signal.SIGKILL)
    return account_for_tokens(bill, manager, used_meanwhile, last - first, last - begin)


class Bill(NamedTuple):
    """What the proxies have settled, by user."""

    requests: Counter[str]
    tokens: Counter[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        found = cls(Counter(), Counter())
        if path.exists():
            for line in path.read_text().split("\n")[:-1]:
                user, tokens = line.split()
                found.requests[user] += 1
                found.tokens[user] += int(tokens)
        return found

    def by_key(self) -> dict[str, int]:
        """What each bucket should have charged."""
        used = [[*[counted[user] for user in USERS], counted.total()] for counted in (self.requests, self.tokens)]
        return dict(zip(LLM_KEYS, used[0] + used[1], strict=True))


def account_for_tokens(
    bill: Path, manager: ProxyManager, used_meanwhile: int, seconds: float, all_seconds: float
) -> str:
    """Compare the bill with the buckets, once the last stream has been settled."""

    def charged() -> dict[str, int]:
        return {key: manager.snapshot(key).consumed_tokens for key in LLM_KEYS}

    deadline = time.monotonic() + PATIENCE
    while (billed := Bill.read(bill).by_key()) != charged() and time.monotonic() < deadline:
        time.sleep(0.2)
    say("\n        used  charged")
    for key, tokens in billed.items():
        say(f"{tokens:>12,}  {charged()[key]:>7,}  {key}")
    rate, capacity = TOKENS_OF_AN_ORGANISATION.refill_tokens, TOKENS_OF_AN_ORGANISATION.capacity
    share = used_meanwhile / (rate * seconds)
    say(f"\nuse of the limit, once its burst was used up: {share:.0%}")
    # What is given back while others wait may be used by newcomers at once: one estimate for each call under way.
    bound, used = capacity + rate * all_seconds + CLIENTS * MOST_TOKENS, billed[LLM_KEYS[-1]]
    say(f"used in all: {used:,} of at most {bound:,.0f}")
    check(charged() == billed, "what was charged is not what was used")
    check(used <= bound, "more was used than the limit allows")
    check(share >= LEAST_USE, "the limit was not used")
    return "What was charged is what was used, to the token, and the limit was used."


# The program.


@contextmanager
def redis_url() -> Generator[str]:
    if url := os.environ.get("RATELIMIT_URL"):
        yield url
        return
    with local_redis(find_binary()) as url:
        yield url


@contextmanager
def without_buckets(manager: ProxyManager, keys: Iterable[str]) -> Generator[None]:
    """Begin with new buckets, and leave none."""

    def remove() -> None:
        for key in keys:
            manager.remove(key)

    remove()
    try:
        yield
    finally:
        with suppress(RateLimitError):
            remove()


def run(name: str, seconds: float, workers: int, *, serve: bool) -> str:
    with redis_url() as url, ProxyManager.from_url(url, "1/hour", prefix="ratelimit:", timeout=PATIENCE) as manager:
        if name == "outbound":
            with without_buckets(manager, [OUTBOUND_KEY]), Stage(name, url) as stage:
                return tell_of_workers(stage, seconds, manager)
        if name == "llm-proxy":
            # The buckets of tokens have a prefix of their own.
            with (
                ProxyManager.from_url(url, "1/hour", timeout=PATIENCE) as tokens,
                without_buckets(tokens, LLM_KEYS),
                Stage("llm_proxy", url) as stage,
            ):
                return tell_of_tokens(stage, seconds, tokens)
        example = EXAMPLES[name]
        keys = example.keys()
        with without_buckets(manager, keys), Stage(name, url, workers) as stage:
            instances = example.instances(stage)
            if serve:
                say(f"\nRATELIMIT_URL={url}")
                for instance in instances:
                    say(f"http://127.0.0.1:{instance.port}/")
                say("Ctrl-C ends it.")
                while True:
                    time.sleep(PATIENCE)
            for _ in range(3):
                try:
                    with without_buckets(manager, keys):
                        return example.story(example.policy, instances)
                except SlowRedisError:
                    say("Redis did not answer within half a second: all over again.")
            raise DemoError("this machine is too slow")


WITHOUT_REQUESTS = ("outbound", "llm-proxy")
"""Examples whose workers or clients make the requests."""


def check_packages() -> None:
    """:raises DemoError: where one that an example needs is not installed."""
    missing = [name for name in ("django", "fastapi", "flask", "gunicorn", "httpx", "uvicorn") if not find_spec(name)]
    if missing:
        raise DemoError(f"{', '.join(missing)} missing; run: pip install 'ratelimit-redis[examples]'")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=[*EXAMPLES, *WITHOUT_REQUESTS])
    parser.add_argument("--seconds", type=float, default=30, help="for how long workers or clients work")
    parser.add_argument("--workers", type=int, default=1, help="processes of each instance")
    parser.add_argument("--serve", action="store_true", help="start the instances, and leave the requests to you")
    arguments: Any = parser.parse_args()
    if arguments.serve and arguments.name in WITHOUT_REQUESTS:
        parser.error(f"there is nothing to ask in {arguments.name}")
    try:
        with interruptible():
            check_packages()
            say(f"\n{run(arguments.name, arguments.seconds, arguments.workers, serve=arguments.serve)}")
    except UntrueError as error:
        say(f"\nBut: {error}.")
        return 1
    except (DemoError, RateLimitError, OSError, http.client.HTTPException) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        return interruption.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
