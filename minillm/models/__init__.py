"""The one decoder and its parts. Importing this registers it with transformers' AutoConfig and AutoModelForCausalLM.

Imports torch and transformers only, so that an exported folder can carry this code with it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.modeling_minillm import MiniLLMForCausalLM, MiniLLMModel

AutoConfig.register(MiniLLMConfig.model_type, MiniLLMConfig, exist_ok=True)
AutoModel.register(MiniLLMConfig, MiniLLMModel, exist_ok=True)
AutoModelForCausalLM.register(MiniLLMConfig, MiniLLMForCausalLM, exist_ok=True)

__all__ = ["MiniLLMConfig", "MiniLLMForCausalLM", "MiniLLMModel"]
