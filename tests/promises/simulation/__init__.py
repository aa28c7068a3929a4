"""Deterministic simulation: many clients and one store that fails in every way, in virtual time.

All that happens in a schedule follows from its seed. The clients run the library's own decisions (``BucketProxy``,
``swapping``, ``LastSeen``) against a store whose answers a scheduler holds in its hands:

- ``world``: virtual time, the queue of events, and the one source of chance;
- ``server``: what is stored, with its expiry, and a replica that lags behind; ``script``: what ``decide.lua`` does;
- ``network``: the store as a client sees it: requests and replies that are late, lost or doubled, and deadlines;
- ``clients``: processes, each with several decisions under way at once, that may be interrupted or stopped anywhere;
- ``bucket``: a token bucket in exact numbers, written from the definition and with nothing of the library's; and
  ``window``, a fixed window, for schedules over a second algorithm;
- ``ledger``: what was stored, answered and lost, and the rules that all of that keeps;
- ``schedules``: what a seed stands for, and the run;
- ``several``: schedules of decisions about several buckets at once, with a server and a ledger of their own.

One thing that follows from the bytes alone is excused; ``test_excuses`` shows it.

``python -m tests.promises.simulation`` runs as many schedules as wanted, and replays one.
"""
