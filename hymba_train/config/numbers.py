"""The nearest numbers that work, for error lines."""

from __future__ import annotations


def multiples_around(value: int, base: int) -> str:
    """'nearest are 96 and 120': the multiples of ``base`` on either side of ``value``.

    >>> multiples_around(100, 24)
    'nearest are 96 and 120'
    """
    below, above = value // base * base, (value // base + 1) * base
    return f"nearest is {above}" if below == 0 else f"nearest are {below} and {above}"


def divisors_around(value: int, total: int) -> str:
    """'nearest are 5 and 10': the divisors of ``total`` on either side of ``value``.

    >>> divisors_around(6, 25)
    'nearest are 5 and 25'
    """
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d < value], [d for d in divisors if d > value]
    near = [str(d) for d in (*below[-1:], *above[:1])]
    return f"nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)}"
