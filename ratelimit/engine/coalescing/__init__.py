"""The layer that lets one question at a time ask for a bucket, and carries those that arrive meanwhile together.

Callers of one process that want the same bucket at once would only lose swaps to each other, more of them the more they
are. Here the first question goes on. Those that come meanwhile queue; when the first is answered, all that wait are
decided by one command, in order, and each gets its answer. Nobody waits for more than the question in flight and the
one that carries its own command, unless hundreds of different commands wait, which are carried in parts. Every answer
is the one that the caller would have had in that order, one by one.

Of threads, the one that can wait longest leads the others: it asks for all. For tasks, one of the layer's own does
that, so that a caller is woken once, by its answer, and nobody's cancellation touches the others.

A question that fails shares its error, for they had all asked for the same. A caller that is cancelled in the queue is
not charged; once the swap is sent it is seen through. Nobody waits beyond a deadline of its own.
"""
