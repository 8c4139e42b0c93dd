"""One file per method; importing one registers it. A new method adds its line here, and nothing else anywhere."""

from .adalora import AdaLoRAConfig as AdaLoRAConfig
from .antipasto import AntiPaSTOConfig as AntiPaSTOConfig
from .bitfit import BitFitConfig as BitFitConfig
from .boft import BOFTConfig as BOFTConfig
from .corda import CorDAConfig as CorDAConfig
from .delora import DeLoRAConfig as DeLoRAConfig
from .dora import DoRAConfig as DoRAConfig
from .dylora import DyLoRAConfig as DyLoRAConfig
from .eva import EVAConfig as EVAConfig
from .hra import HRAConfig as HRAConfig
from .ia3 import IA3Config as IA3Config
from .ia3_ff import IA3FFConfig as IA3FFConfig
from .lora import LoRAConfig as LoRAConfig
from .lora_fa import LoRAFAConfig as LoRAFAConfig
from .lora_ga import LoRAGAConfig as LoRAGAConfig
from .lora_one import LoRAOneConfig as LoRAOneConfig
from .lora_xs import LoRAXSConfig as LoRAXSConfig
from .milora import MiLoRAConfig as MiLoRAConfig
from .oft import OFTConfig as OFTConfig
from .olora import OLoRAConfig as OLoRAConfig
from .pissa import PiSSAConfig as PiSSAConfig
from .psoft import PSOFTConfig as PSOFTConfig
from .road import RoadConfig as RoadConfig
from .ssvd import SSVDConfig as SSVDConfig
from .svft import SVFTConfig as SVFTConfig
