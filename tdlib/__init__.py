"""tdlib: compress neural networks by tensor decompositions.

    cost = tdlib.count(model, (3, 32, 32))
    plan = tdlib.plan(model, (3, 32, 32), format="tucker2", ratio=2.4)
    small = tdlib.decompose(model, plan)
    print(tdlib.compare(model, small, (3, 32, 32)))
    tdlib.save(small, "small.safetensors")

`__init__.pyi` lists the public names. They are imported on first use, so that the command line's help does
not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
