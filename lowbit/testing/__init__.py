"""Two oracles for products of quantized arrays, and what tests of them are made of.

`error_bound` derives how far a result may lie from the exact product; `exact_operands` makes
operands whose product has to be exact, bit for bit, in any order of summation.
`lowbit.testing.conformance` holds one kernel to both; `lowbit.testing.strategies` needs Hypothesis.
"""

from lowbit.testing.bounds import assert_within_bound, error_bound, exact, gamma
from lowbit.testing.exactness import exact_operands
from lowbit.testing.operands import random_qarray

__all__ = [
    "assert_within_bound",
    "error_bound",
    "exact",
    "exact_operands",
    "gamma",
    "random_qarray",
]
