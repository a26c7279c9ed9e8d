"""Measurements of tdlib against its peers: ``python -m benchmarks`` (``make bench``) writes ``results.json``.

Every row runs A (tdlib) and B (the peer) in one process, alternately, and reports the median and quartiles of
B's time / A's time over the pairs, with the error of both where they approximate something.
"""
