"""The book's figures, a module per chapter: small programs that take tables or tensors and return a Figure.

None computes a result, shows or saves: put the returned Figure last in a cell, or call ``fig.savefig``.
"""
