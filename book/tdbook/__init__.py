"""The book's own package: it runs the chapters, keeps their records, draws their figures and makes the pages.

It stands on `tdlib`, which knows nothing of it. The names here are those that a notebook needs most; they are
imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
