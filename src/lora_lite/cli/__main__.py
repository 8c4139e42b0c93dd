"""`python -m lora_lite.cli`, for `torchrun -m lora_lite.cli train ...`."""

from . import main

raise SystemExit(main())
