"""How the book's files are checked: by pydantic models that convert nothing and refuse unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from tdlib.errors import DataError

Text = Annotated[str, StringConstraints(min_length=1)]


class Strict(BaseModel):
    """A table with exactly these keys; a number is no text, and text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], content: Any, where: str) -> M:
    """``content`` as the model. Raises DataError naming the file (``where``), the place and the value."""
    try:
        return model.model_validate(content)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = "/".join(map(str, first["loc"])) or "the top level"
        found = "" if first["type"] == "missing" else f", not {str(first['input'])[:100]!r}"
        raise DataError(f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}{found}") from problem
