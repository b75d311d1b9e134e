"""The model for transformers: importing this package registers it with the `Auto*` classes.

>>> import mhesa.hf
>>> from transformers import AutoConfig
>>> AutoConfig.for_model("mhesa", hidden_size=64).hidden_size
64
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from mhesa.hf.cache import MhesaCache
from mhesa.hf.configuration import MhesaConfig
from mhesa.hf.modeling import MhesaForCausalLM, MhesaModel, MhesaPreTrainedModel
from mhesa.hf.tokenization import ByteTokenizer

__all__ = [
    "ByteTokenizer",
    "MhesaCache",
    "MhesaConfig",
    "MhesaForCausalLM",
    "MhesaModel",
    "MhesaPreTrainedModel",
]

AutoConfig.register("mhesa", MhesaConfig, exist_ok=True)
AutoModel.register(MhesaConfig, MhesaModel, exist_ok=True)
AutoModelForCausalLM.register(MhesaConfig, MhesaForCausalLM, exist_ok=True)
AutoTokenizer.register(MhesaConfig, tokenizer_class=ByteTokenizer, exist_ok=True)
