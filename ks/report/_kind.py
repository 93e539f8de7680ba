from enum import Enum


class LossKind(Enum):
    MEAN_SQUARED_ERROR = "mean squared error per output"
    QUADRATIC = "q"
    OTHER = "o"
