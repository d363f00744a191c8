"""The numbers that a recipe may hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["LARGEST", "Bits", "Count", "Fraction", "Number", "Positive", "Rate"]

LARGEST = 2**31 - 1
"""What any count may be: beyond it libraries fail, each in its own way and some only after all the work."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bits = Annotated[int, Field(ge=2, le=8)]
