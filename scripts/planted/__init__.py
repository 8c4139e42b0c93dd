"""Known bugs, room by room: each is one change of one text of the package, and the tests that must turn red."""

from __future__ import annotations

from .bug import PACKAGE as PACKAGE
from .bug import ROOT as ROOT
from .bug import Bug as Bug
from .core import BUGS as CORE
from .files import BUGS as FILES
from .ops import BUGS as OPS
from .trust import BUGS as TRUST
from .variants import BUGS as VARIANTS
from .verbs import BUGS as VERBS
from .wings import BUGS as WINGS

BUGS: list[Bug] = [*CORE, *OPS, *VARIANTS, *VERBS, *WINGS, *FILES, *TRUST]
