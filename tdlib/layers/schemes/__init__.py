"""The factorisations themselves, one file per family; `tdlib.layers.formats` lists them by format."""
