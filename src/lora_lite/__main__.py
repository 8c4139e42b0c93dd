"""`python -m lora_lite`, the same as `lora-lite`."""

from .cli import main

raise SystemExit(main())
