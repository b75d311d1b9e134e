"""For transformers' trust_remote_code=True: the classes of the installed package mhesa."""

from mhesa.hf import ByteTokenizer, MhesaConfig, MhesaForCausalLM, MhesaModel  # noqa: F401
