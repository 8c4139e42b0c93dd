"""One file per method; importing one registers it. A new method adds its line here, and nothing else anywhere."""

from .ablation import AblationConfig as AblationConfig
from .adalora import AdaLoRAConfig as AdaLoRAConfig
from .antipasto import AntiPaSTOConfig as AntiPaSTOConfig
from .bitfit import BitFitConfig as BitFitConfig
from .boft import BOFTConfig as BOFTConfig
from .caa import CAAConfig as CAAConfig
from .corda import CorDAConfig as CorDAConfig
from .delora import DeLoRAConfig as DeLoRAConfig
from .direft import DiReFTConfig as DiReFTConfig
from .dora import DoRAConfig as DoRAConfig
from .dylora import DyLoRAConfig as DyLoRAConfig
from .ether import ETHERConfig as ETHERConfig
from .ether_plus import ETHERPlusConfig as ETHERPlusConfig
from .eva import EVAConfig as EVAConfig
from .goft import GOFTConfig as GOFTConfig
from .hra import HRAConfig as HRAConfig
from .ia3 import IA3Config as IA3Config
from .ia3_ff import IA3FFConfig as IA3FFConfig
from .lora import LoRAConfig as LoRAConfig
from .lora_fa import LoRAFAConfig as LoRAFAConfig
from .lora_ga import LoRAGAConfig as LoRAGAConfig
from .lora_one import LoRAOneConfig as LoRAOneConfig
from .lora_xs import LoRAXSConfig as LoRAXSConfig
from .loreft import LoReFTConfig as LoReFTConfig
from .milora import MiLoRAConfig as MiLoRAConfig
from .noreft import NoReFTConfig as NoReFTConfig
from .oft import OFTConfig as OFTConfig
from .olora import OLoRAConfig as OLoRAConfig
from .pca_steering import PCASteeringConfig as PCASteeringConfig
from .pissa import PiSSAConfig as PiSSAConfig
from .psoft import PSOFTConfig as PSOFTConfig
from .road import RoadConfig as RoadConfig
from .s_steer import SSteerConfig as SSteerConfig
from .ssvd import SSVDConfig as SSVDConfig
from .svft import SVFTConfig as SVFTConfig
from .token_rows import TokenRowsConfig as TokenRowsConfig
from .whole import WholeConfig as WholeConfig

__all__ = [name for name in dir() if name.endswith("Config")]  # pyright: ignore[reportUnsupportedDunderAll]
"""The config classes and no file: `lora_lite.lora` is not a name."""
