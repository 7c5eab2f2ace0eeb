"""Sources of data: one string opens any of them as a :class:`Dataset` with a :class:`DataSpec`."""

from .arrays import from_array
from .base import Dataset, Subset
from .dataset import DATASETS, open_dataset
from .spec import DataSpec

__all__ = ["DATASETS", "DataSpec", "Dataset", "Subset", "from_array", "open_dataset"]
