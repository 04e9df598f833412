"""Two oracles for products of quantized arrays, and Hypothesis strategies for their operands.

`error_bound` derives how far a result may lie from the exact product; `exact_operands` makes
operands whose product has to be exact, bit for bit, in any order of summation.
`lowbit.testing.strategies` needs Hypothesis.
"""

from lowbit.testing.bounds import assert_within_bound, error_bound, exact, gamma
from lowbit.testing.exactness import exact_operands

__all__ = ["assert_within_bound", "error_bound", "exact", "exact_operands", "gamma"]
