"""One file per method; importing one registers it. A new method adds its line here, and nothing else anywhere."""

from .adalora import AdaLoRAConfig as AdaLoRAConfig
from .corda import CorDAConfig as CorDAConfig
from .delora import DeLoRAConfig as DeLoRAConfig
from .dora import DoRAConfig as DoRAConfig
from .dylora import DyLoRAConfig as DyLoRAConfig
from .eva import EVAConfig as EVAConfig
from .hra import HRAConfig as HRAConfig
from .lora import LoRAConfig as LoRAConfig
from .lora_fa import LoRAFAConfig as LoRAFAConfig
from .lora_ga import LoRAGAConfig as LoRAGAConfig
from .lora_one import LoRAOneConfig as LoRAOneConfig
from .milora import MiLoRAConfig as MiLoRAConfig
from .olora import OLoRAConfig as OLoRAConfig
from .pissa import PiSSAConfig as PiSSAConfig
