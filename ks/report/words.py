"""The words for the losses of a study: fractions of the output energy, or increases of the loss of the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ks.files.columns import Column
from ks.model.prediction import per_token
from ks.moments.metric import LossMetric
from ks.report.verdict import Limit


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

    @property
    def of_model(self) -> bool:
        return self.loss_metric is LossMetric.MODEL_LOSS

    @property
    def lose(self) -> str:
        return "cost" if self.of_model else "lose"

    @property
    def loses(self) -> str:
        return f"{self.lose}s"

    @property
    def may_lose(self) -> str:
        """Return the verb for a loss that stands alone, with no other sentence that calls it predicted."""
        return "is predicted to cost" if self.of_model else "loses"

    @property
    def quantity(self) -> str:
        return "the increase of the loss of the model" if self.of_model else "the fraction of the output energy lost"

    @property
    def zero_loss(self) -> str:
        return "zero predictor's loss" if self.of_model else "output energy"

    @property
    def in_unit(self) -> str:
        return f", in {self.unit} per token" if self.unit else ", per token"

    @property
    def _short_unit(self) -> str:
        """Return a unit of one word with a space behind it; a longer one is no part of a number."""
        return f"{self.unit} " if len(self.unit.split()) == 1 else ""

    @property
    def relative(self) -> str:
        """Return the name of a loss in the middle of a sentence."""
        return "the predicted increase of the loss" if self.of_model else "the relative loss"

    @property
    def label(self) -> str:
        """Return the label of an axis."""
        return f"loss increase ({self.per_token})" if self.of_model else "relative loss (output energy lost)"

    @property
    def per_token(self) -> str:
        return f"{self._short_unit}per token"

    @property
    def small(self) -> Limit:
        """Return the limit of a rank that has little to gain."""
        return Limit.SMALL_INCREASE if self.of_model else Limit.SMALL

    @property
    def target_flag(self) -> str:
        return "--target_loss_increase" if self.of_model else "--target_relative_loss"

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
        """Return columns of a table, with the unit in the legends of increases of the loss of the model."""
        increases = ("loss_increase", *(["loss_floor"] if self.of_model else []))
        return [
            replace(column, legend=f"{column.legend}{self.in_unit}") if column.name in increases else column
            for column in shown
        ]

    def held_out(self, row: Mapping[str, Any]) -> Any:
        """Return the loss on held-out inputs, None without any, over that of the zero predictor on the other inputs.

        For the output energy, it is over that of the zero predictor on the held-out inputs.
        """
        relative = row.get("held_out_relative_loss")
        return relative if relative is None or not self.of_model else row["final_val_loss"] / self.predict_zero_loss

    def both_metrics(self, row: Mapping[str, Any]) -> list[str]:
        """Return a sentence with the increase of the loss of the model and the energy lost; none if not known."""
        increase, energy = row.get("loss_increase"), row.get("energy_loss")
        if increase is None or energy is None:
            return []
        cost = f"Rank {row['rank']} is predicted to cost the model about {per_token(increase, self.unit)}"
        return [f"{cost}; it loses {percents(energy)[0]} of the output energy."]


def percents(*values: float) -> list[str]:
    """Return fractions in percent with two decimals, or with as many as tell different ones apart, six at most.

    Below 0.1%, these are significant digits.
    """
    for digits in range(2, 7):
        texts = [f"{100 * value:.{digits}{'f' if abs(value) >= 0.001 or not value else 'g'}}" for value in values]
        if len({*texts}) == len({*values}):
            break
    return [(text.partition(".")[0] if float(text).is_integer() else text) + "%" for text in texts]


def significant(*values: float) -> list[str]:
    """Return numbers with three significant digits, or with as many as tell different ones apart, six at most."""
    for digits in range(3, 7):
        texts = [f"{float(f'{value:.{digits}g}'):g}" for value in values]
        if len({*texts}) == len({*values}):
            break
    return texts
