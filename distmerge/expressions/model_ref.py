"""The boundary between a model as a recipe names it and where it lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from distmerge.checkpoints.location import Location, locate, split_adapter
from distmerge.checkpoints.renaming import Rule, read_rules
from distmerge.credentials import redact
from distmerge.errors import RecipeError


class ModelRef(BaseModel):
    """A model as a recipe names it."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(min_length=1)
    """A directory, file, URL or Hub id, perhaps with @revision and +adapter."""
    revision: str | None = None
    lora: ModelRef | None = None
    """A LoRA adapter that is applied to it."""
    rename: Annotated[tuple[Rule, ...], BeforeValidator(read_rules)] = ()
    """What its tensors are called instead of what its files call them."""

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, given: Any) -> Any:
        while isinstance(given, Mapping) and "model" in given and "path" not in given:
            inner = given["model"]
            inner = dict(inner) if isinstance(inner, Mapping) else {"path": inner}
            also = {key: given[key] for key in ("lora", "rename") if given.get(key) is not None}
            given = {**inner, **also}
        return {"path": given} if isinstance(given, str) else given

    @property
    def location(self) -> Location:
        """Where it is; asks the local disk, no server. Raises CheckpointNotFound, RecipeError."""
        if self.lora is None:
            return locate(self.path, revision=self.revision)
        if self.lora.rename:
            raise RecipeError(
                f"rename holds for models, not for the adapter {self.lora}.",
                "an adapter is fitted to the names in its base's files",
                fix="{model: org/base, lora: org/adapter, rename: ...} renames the base",
            )
        if split_adapter(self.path)[1] is not None or self.lora.location.adapter is not None:
            raise RecipeError(f"{self} names two adapters.", fix="one +adapter, or one lora:")
        return replace(locate(self.path, revision=self.revision), adapter=self.lora.location)

    def __repr_args__(self) -> Iterator[tuple[str, str | None]]:
        yield "path", redact(self.path)
        yield "revision", self.revision
        yield "lora", None if self.lora is None else str(self.lora)

    def __str__(self) -> str:
        own = redact(self.path) + (f"@{self.revision}" if self.revision else "")
        return own if self.lora is None else f"{own}+{self.lora}"
