"""One file per method; importing one registers it. A new method adds its line here, and nothing else anywhere."""

from .corda import CorDAConfig as CorDAConfig
from .eva import EVAConfig as EVAConfig
from .lora import LoRAConfig as LoRAConfig
from .lora_ga import LoRAGAConfig as LoRAGAConfig
from .lora_one import LoRAOneConfig as LoRAOneConfig
