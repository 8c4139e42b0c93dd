"""What the words mean: the variant contract, the registry, configs and errors (floor 1).

The names here are those that a page needs.
"""

from .config import AdapterConfig as AdapterConfig
from .config import Role as Role
from .config import matches as matches
from .errors import ConfigError as ConfigError
from .errors import StateError as StateError
from .layer import Layer as Layer
from .layer import Span as Span
from .layer import StagedLayer as StagedLayer
from .registry import register as register
from .spec import ParamSpec as ParamSpec
from .targets import Gram as Gram
from .targets import StepTargets as StepTargets
from .targets import Targets as Targets
from .variant import Variant as Variant
