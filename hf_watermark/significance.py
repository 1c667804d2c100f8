"""How unlikely a reading is: exact tails, as base-10 logarithms far below float range.

Bits and projections come from the key, so for any weights that never saw the key the soft statistic
is N(0, 1) and the matching bits are Binomial(T, 1/2). Every reading that could have been tried is
counted, and the tail multiplied by that count (Bonferroni), so that looking more often never helps.
"""

from __future__ import annotations

import math

from hf_watermark.errors import SchemeError

__all__ = [
    "corrected",
    "log10_binomial_tail",
    "log10_normal_tail",
    "log10_rademacher_tail",
    "odds_in_words",
]

_LN10 = math.log(10.0)
# 1 / (4 Q(sqrt 2)), about 3.178.
_BENTKUS_DZINDZALIETA = 1.0 / (2.0 * math.erfc(1.0))


def log10_normal_tail(t: float) -> float:
    """log10 P(Z >= t) for Z ~ N(0, 1).

    `math.erfc` is exact to rounding until it nears the end of float range; beyond t = 25 Laplace's
    continued fraction for Mills' ratio, Q(t) = phi(t) / (t + 1/(t + 2/(t + 3/(t + ...)))), has
    converged to rounding within 20 terms (Abramowitz & Stegun 26.2.14).

    Raises:
        SchemeError: If `t` is not a number.
    """
    if math.isnan(t):
        raise SchemeError("The statistic is not a number", expected="a finite value", got=t)
    if t == math.inf:
        return -math.inf
    if t < 25.0:
        return math.log10(0.5 * math.erfc(t / math.sqrt(2.0)))
    denominator = t
    for k in range(20, 0, -1):
        denominator = t + k / denominator
    log_density = -0.5 * t * t - 0.5 * math.log(2.0 * math.pi)
    return (log_density - math.log(denominator)) / _LN10


def log10_rademacher_tail(t: float) -> float:
    """An upper bound on log10 P(a_1 e_1 + ... + a_n e_n >= t), e_i = +-1 fair, sum a_i^2 <= 1.

    min(exp(-t^2/2), c Q(t)) with the best possible c = 1 / (4 Q(sqrt 2)), for all weights and n:
    Hoeffding 1963, theorem 2; Bentkus & Dzindzalieta 2015, "A tight Gaussian bound for weighted
    sums of Rademacher random variables", Bernoulli 21(2), theorem 1.1. The first is the smaller
    one below t = .67 alone.

    Args:
        t: The sum that was seen, in standard deviations.

    Raises:
        SchemeError: If `t` is not a number.
    """
    gaussian = math.log10(_BENTKUS_DZINDZALIETA) + log10_normal_tail(t)
    hoeffding = -0.5 * t * t / _LN10 if t > 0.0 else 0.0
    return min(hoeffding, gaussian)


def log10_binomial_tail(matched: int, bits: int) -> float:
    """log10 P(B >= matched) for B ~ Binomial(bits, 1/2), from exact integers.

    Raises:
        SchemeError: Unless 0 <= matched <= bits and bits >= 1.
    """
    if bits < 1 or not 0 <= matched <= bits:
        raise SchemeError(
            "The count of matching bits makes no sense",
            expected="0 <= matched <= bits, bits >= 1",
            got=f"matched={matched}, bits={bits}",
        )
    ways, term = 0, math.comb(bits, matched)
    for k in range(
        matched, bits + 1
    ):  # T = 4096: milliseconds, where T calls of comb take a second
        ways += term
        term = term * (bits - k) // (k + 1)
    size = ways.bit_length()  # taken out first: p near 1 must not drown in log10(2^T)
    return math.log10(ways / (1 << size)) + (size - bits) * math.log10(2.0)


def corrected(log10_p: float, tries: int) -> float:
    """The tail after Bonferroni's correction: log10 min(1, tries * p).

    Raises:
        SchemeError: If `tries` is less than one.
    """
    if tries < 1:
        raise SchemeError("At least one reading was tried", expected="tries >= 1", got=tries)
    return min(0.0, log10_p + math.log10(tries))


def odds_in_words(log10_p: float) -> str:
    """A chance as people say it: "1 in 10^18", "1 in 250", "about 1 in 2".

    Law: what is said is never rarer than what was found.
    """
    if math.isinf(log10_p):
        return "0"
    if log10_p <= -6.0:
        return f"1 in 10^{math.floor(-log10_p)}"
    odds = 10.0**-log10_p
    if odds < 10.0:
        return f"about 1 in {max(1, math.floor(odds))}"
    digits = 10 ** (math.floor(math.log10(odds)) - 1)
    return f"1 in {math.floor(odds / digits) * digits:,}"
