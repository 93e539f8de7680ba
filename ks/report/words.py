"""The words for the losses of a study: fractions of the output energy, or increases of the loss of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ks.files.columns import FRACTION, INCREASE, INCREASE_FOR, LOSS, Column
from ks.model.prediction import per_token
from ks.moments.metric import LossMetric
from ks.report.verdict import Limit


def _either(energy: str, increase: str) -> property:
    """Return a property with the words for the output energy, or for an increase of the loss of the model."""
    return property(lambda words: increase if words.of_model else energy)


@dataclass(frozen=True)
class Words:
    """How texts speak of a loss. Losses are given relative to the zero predictor.

    loss_metric: of the study. unit: of the loss of the model; empty if no gradients were measured.
    predict_zero_loss: with `LossMetric.MODEL_LOSS`, the increase of the loss by the zero predictor, in this unit.
    """

    loss_metric: LossMetric = LossMetric.OUTPUT_ENERGY
    unit: str = ""
    predict_zero_loss: float = 1.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Words":
        """Return the words for a row of the summary; those of earlier versions are about output energy."""
        metric = LossMetric(row.get("loss_metric") or LossMetric.OUTPUT_ENERGY)
        return cls(metric, row.get("loss_unit") or "", row.get("predict_zero_loss") or 1.0)

    lose = _either("lose", "cost")
    loses = _either("loses", "costs")
    may_lose = _either("loses", "is predicted to cost")  # where no other sentence calls the loss predicted
    relative = _either("the relative loss", "the predicted increase of the loss")
    zero_loss = _either("output energy", "zero predictor's loss")
    small = _either(Limit.SMALL, Limit.SMALL_INCREASE)
    target_flag = _either("--target_relative_loss", "--target_loss_increase")

    @property
    def of_model(self) -> bool:
        return self.loss_metric is LossMetric.MODEL_LOSS

    @property
    def in_unit(self) -> str:
        return f", in {self.unit} per token" if self.unit else ", per token"

    @property
    def _short_unit(self) -> str:
        """Return a unit of one word with a space behind it; a longer one is no part of a number."""
        return f"{self.unit} " if len(self.unit.split()) == 1 else ""

    @property
    def label(self) -> str:
        """Return the label of an axis."""
        return f"loss increase ({self.axis_unit})" if self.of_model else "relative loss (output energy lost)"

    @property
    def axis_unit(self) -> str:
        """Return 'nats per token', or 'per token' for a unit that is too long for an axis or a heading."""
        return f"{self._short_unit}per token"

    def amounts(self, *losses: float) -> list[str]:
        """Return losses as '2%' or '0.004 nats', with as many digits as tell different ones apart."""
        if not self.of_model:
            return percents(*losses)
        numbers = significant(*(loss * self.predict_zero_loss for loss in losses))
        return [f"{number} {self._short_unit}".strip() for number in numbers]

    def whole(self, amount: str) -> str:
        """Return '2% of the output energy' or '0.004 nats per token'."""
        return f"{amount} per token" if self.of_model else f"{amount} of the output energy"

    def show(self, loss: float) -> str:
        return self.whole(*self.amounts(loss))

    def with_units(self, shown: Iterable[Column]) -> list[Column]:
        """Return columns of a table, those of the loss of the model in its unit; their legends end with it."""
        units = (INCREASE, LOSS) if self.of_model else (INCREASE,)
        if self.of_model:  # no fractions any more, by `in_its_unit`
            shown = [replace(column, form="{:.4g}") if column.unit == FRACTION else column for column in shown]
        return [
            replace(column, unit=self.axis_unit, legend=column.legend and f"{column.legend}{self.in_unit}")
            if column.unit in units
            else column
            for column in shown
        ]

    def in_its_unit(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with relative losses as it is, or under the loss of the model with increases in their place."""
        if not self.of_model:
            return dict(row)
        increases = {
            INCREASE_FOR[name]: value * self.predict_zero_loss
            for name, value in row.items()
            if name in INCREASE_FOR and value is not None
        }
        return {name: value for name, value in row.items() if name not in INCREASE_FOR} | increases

    def held_out(self, row: Mapping[str, Any]) -> Any:
        """Return the loss on held-out inputs, None without any, over that of the zero predictor on the other inputs.

        For the output energy, it is over that of the zero predictor on the held-out inputs.
        """
        relative = row.get("held_out_relative_loss")
        return relative if relative is None or not self.of_model else row["final_val_loss"] / self.predict_zero_loss

    def both_metrics(self, row: Mapping[str, Any]) -> list[str]:
        """Return a sentence on the increase of the loss of the model, if known; with the energy where it is new."""
        increase, energy = row.get("loss_increase"), row.get("energy_loss")
        if increase is None or energy is None:
            return []
        cost = f"Rank {row['rank']} is predicted to cost the model about {per_token(increase, self.unit)}"
        return [f"{cost}; it loses {percents(energy)[0]} of the output energy." if self.of_model else f"{cost}."]


def percents(*values: float) -> list[str]:
    """Return fractions in percent with two decimals; below 0.1%, these are significant digits."""

    def form(value: float, digits: int) -> str:
        return f"{100 * value:.{digits}{'f' if abs(value) >= 0.001 or not value else 'g'}}"

    return [(text.partition(".")[0] if float(text).is_integer() else text) + "%" for text in _apart(values, 2, form)]


def significant(*values: float) -> list[str]:
    """Return numbers with three significant digits."""
    return _apart(values, 3, lambda value, digits: f"{float(f'{value:.{digits}g}'):g}")


def _apart(values: Sequence[float], least: int, form: Callable[[float, int], str]) -> list[str]:
    """Return values with the least number of digits that tells different ones apart, six at most."""
    for digits in range(least, 7):
        texts = [form(value, digits) for value in values]
        if len({*texts}) == len({*values}):
            break
    return texts
