"""Types of the configuration's fields: what is allowed, and how a written value becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AllowInfNan, BeforeValidator, Strict

LARGEST: Final = 2**63 - 1
"""Largest whole number: steps, tokens and seeds are 64-bit integers in the plan."""
ALPHA_DECIMALS: Final = 9
"""Decimal places of `replay.alpha`, so that its exact arithmetic fits into 64-bit integers."""
TOKENIZER_KINDS: Final = ("sentencepiece", "hf", "tiktoken")


@dataclass(frozen=True)
class Note:
    """Metadata of a field's type: more about what is allowed, for messages and `--help`."""

    text: str


def _whole(value: Any) -> Any:
    """Takes 1e9 for the whole number it is; leaves anything else as it was given."""
    if (
        isinstance(value, Decimal)
        and value.is_finite()
        and abs(value) <= LARGEST
        and value == value.to_integral_value()
    ):
        return int(value)
    return value


def _real(value: Any) -> Any:
    """Numbers of a file arrive as exact decimals."""
    return float(value) if isinstance(value, Decimal) else value


def _exact_share(value: Any) -> Any:
    """Keeps the digits that were written; a binary float would make 0.29 a little less."""
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("not a number")
    share = Decimal(value)
    exponent = share.normalize().as_tuple().exponent if share.is_finite() else None
    if not isinstance(exponent, int) or -exponent > ALPHA_DECIMALS:
        raise ValueError("not finite, or too many decimal places")
    return share


Text = Annotated[str, Strict(), MinLen(1)]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, BeforeValidator(_whole), Strict(), Ge(1), Le(LARGEST)]
CountOrZero = Annotated[int, BeforeValidator(_whole), Strict(), Ge(0), Le(LARGEST)]
Positive = Annotated[float, BeforeValidator(_real), Strict(), AllowInfNan(False), Gt(0)]
NotNegative = Annotated[float, BeforeValidator(_real), Strict(), AllowInfNan(False), Ge(0)]
Share = Annotated[float, BeforeValidator(_real), Strict(), AllowInfNan(False), Ge(0), Le(1)]
ShareBelowOne = Annotated[float, BeforeValidator(_real), Strict(), AllowInfNan(False), Ge(0), Lt(1)]
Alpha = Annotated[
    Decimal,
    BeforeValidator(_exact_share),
    Ge(0),
    Lt(1),
    Note(
        f"with at most {ALPHA_DECIMALS} decimal places, taken exactly; "
        "1 would leave no fresh row in a batch, so that no task ever advances"
    ),
]
