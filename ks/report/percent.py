"""Relative losses as text."""


def percents(*values: float) -> list[str]:
    """Return fractions in percent with two decimals, or with as many as tell different ones apart, six at most."""
    for decimals in range(2, 7):
        texts = [f"{100 * value:.{decimals}f}" for value in values]
        if len({*texts}) == len({*values}) and all(float(text) or not value for text, value in zip(texts, values)):
            break
    return [_without_zeros(text) + "%" for text in texts]


def _without_zeros(text: str) -> str:
    """Return a number without needless zeros: 10.00 is 10."""
    return text.rstrip("0").rstrip(".") if "." in text and set(text.partition(".")[2]) == {"0"} else text
