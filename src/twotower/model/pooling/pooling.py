"""Protocol of the poolings: the map from the embeddings of a field of many codes to one vector, or several."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from twotower.kinds import Kind


class Pooling(Kind):
    """Pooling of the embeddings of a bag or a history."""

    needs_time_order: ClassVar[bool] = False
    """True if the age of an interaction counts, so that training needs `train.history_scope = "causal"`."""
    reads_windows: ClassVar[bool] = False
    """True if it reads the latest `window` interactions, and training windows of the whole history."""

    window: int = Field(
        0, ge=0, description="Number of latest interactions that the pooling reads at once. 0: the whole history."
    )

    @property
    def pieces(self) -> int:
        """Number of vectors of the field's width that the pooling gives side by side."""
        return 1

    @property
    def in_order(self) -> bool:
        """True if the vector depends on the order of the codes."""
        return self.needs_time_order or self.reads_windows

    @model_validator(mode="after")
    def _check_window(self) -> Pooling:
        if self.reads_windows and self.window < 2:
            raise ValueError(f"pooling '{self.kind}' reads a limited history; set window, such as 200 (at least 2)")
        if self.window and not self.reads_windows:
            raise ValueError(f"pooling '{self.kind}' reads the whole history; leave out window, or set max_length")
        return self
