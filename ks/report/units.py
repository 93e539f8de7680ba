"""The unit of the losses in the figures of a study: the relative loss, where it is known."""

from dataclasses import dataclass

import pandas as pd

from ks.report.study import MEAN_SQUARED_ERROR, Study

RELATIVE_LABEL = "relative loss (output energy lost)"


@dataclass(frozen=True)
class Units:
    """Divisors of the losses of a study, and the name of the result.

    train, validation: loss of the zero predictor on the inputs that each kind of loss is measured on, in the unit of
    the losses; 1 where the losses stay as they are. relative: whether they become fractions of the output energy.
    label: of an axis. squared_label: of the unit on disk.
    """

    train: float
    validation: float
    relative: bool
    label: str
    squared_label: str

    def show(self, loss: float) -> str:
        """Return a loss of these units as text."""
        if not self.relative:
            return f"{loss:.3g}"
        return f"{loss:.2%}" if loss >= 0.001 else f"{100 * loss:.2g}%"


def units_of(study: Study) -> Units:
    """Return the units of a study; only mean squared errors with a known zero predictor are relative."""
    if study.loss_label != MEAN_SQUARED_ERROR or study.predict_zero_loss is None:
        return Units(1.0, 1.0, False, study.loss_label, study.loss_label)
    held_out = study.held_out_predict_zero_loss or study.predict_zero_loss
    return Units(study.predict_zero_loss, held_out, True, RELATIVE_LABEL, study.loss_label)


def losses_of(study: Study, units: Units) -> pd.DataFrame:
    """Return the losses of every rank in these units, as floats.

    Returns:
        columns rank, status, train, validation, exact (population loss), best (the exact one, else validation),
        lower and upper (the bounds of its floor), train_se, validation_se, parameters; NaN where unknown.
    """
    rows, nan = study.summary.sort_values("rank").reset_index(drop=True), float("nan")
    losses = pd.DataFrame({"rank": rows["rank"], "status": rows["status"]})
    for name, column, unit in (
        ("train", "final_train_loss", units.train),
        ("validation", "final_val_loss", units.validation),
        ("exact", "population_loss", units.train),
        ("lower", "loss_floor", units.train),
        ("upper", "loss_floor_upper", units.train),
        ("train_se", "final_train_loss_se", units.train),
        ("validation_se", "final_val_loss_se", units.validation),
        ("parameters", "parameters", 1.0),
    ):
        losses[name] = rows[column].astype(float) / unit if column in rows else nan
    losses["best"] = losses["exact"].fillna(losses["validation"])
    losses["bracketed"] = rows["loss_floor_is_exact"].eq(False)
    losses["upper"] = losses["upper"].where(losses["bracketed"], losses["lower"])
    return losses
