"""One file per method; importing one registers it. A new method adds its line here, and nothing else anywhere."""

from .eva import EVAConfig as EVAConfig
from .lora import LoRAConfig as LoRAConfig
