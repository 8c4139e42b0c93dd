"""The contract, one file per promise. The order of these imports is the order of the checks."""

# ruff: noqa: I001 -- the order is the point
from . import page as page
from . import base_read_only as base_read_only
from . import identity as identity
from . import nothing_silent as nothing_silent
from . import all_or_nothing as all_or_nothing
from . import merging as merging
from . import dtypes as dtypes
from . import same_seed as same_seed
from . import selection as selection
from . import saving as saving
from . import training as training
from . import width as width
from . import fields as fields
from . import tensors as tensors
from .suite import CHECKS as CHECKS
from .suite import PROMISES as PROMISES
from .suite import applies as applies
