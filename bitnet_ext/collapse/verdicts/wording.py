"""Numbers of a study as words: the forms that sentences, tables and pages share."""

from __future__ import annotations


def nats(value: float) -> str:
    """A quantity in nats: two decimals, three below 0.1."""
    text = f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"
    return "0.00" if float(text) == 0 else text


def count(value: float) -> str:
    """A count, or a mean of counts with one decimal."""
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def steps(value: float) -> str:
    """A step number with thousands separators."""
    return f"{int(value):,}"


def percent(share: float) -> str:
    """A share in per cent with two significant digits below 10 %."""
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:,.0f} %"
    return "under 0.01 %" if value < 0.01 else f"{value:.2g} %"


def signed(value: float) -> str:
    """A difference in nats with its sign; zero has none."""
    text = nats(abs(value))
    return text if float(text) == 0 else ("+" if value > 0 else "\N{MINUS SIGN}") + text


def unfinished_text(arm: str, seed: int, last_step: int, planned: int | None) -> str:
    """One unfinished run in words."""
    if last_step < 0:
        return f"{arm} seed {seed} (no evaluation yet)"
    return f"{arm} seed {seed} (at step {last_step:,}" + (f" of {planned:,})" if planned is not None else ")")
