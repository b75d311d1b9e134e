"""Text as tokens and back: what vLLM's and llama.cpp's servers have in common."""

from __future__ import annotations

import numpy as np

from mhesa.errors import InputError
from mhesa.serve.api import protocol
from mhesa.serve.api.completions import render
from mhesa.serve.api.errors import invalid
from mhesa.serve.api.service import Service, utf8


def tokenize(service: Service, body: protocol.TokenizeRequest) -> protocol.Tokens:
    """The tokens of a text or a conversation."""
    service.check_model(body.model)
    ids = _tokens(service, body)
    names = [service.token_name(token) for token in ids.tolist()] if body.return_token_strs else None
    most = service.settings.limits.prompt_tokens
    return protocol.Tokens(tokens=ids.tolist(), count=len(ids), max_model_len=most, token_strs=names)


def detokenize(service: Service, body: protocol.DetokenizeRequest) -> protocol.Detokenized:
    """The text of tokens."""
    service.check_model(body.model)
    service.check_token(max(body.tokens, default=0), "tokens")
    special = {token: text.encode() for token, text in service.special_tokens.items()}
    pieces = (special.get(token, service.token_bytes[token]) for token in body.tokens)
    text = b"".join(pieces).decode("utf-8", "replace")
    return protocol.Detokenized(prompt=text, content=text)


def tokenizer_info(service: Service) -> protocol.TokenizerInfo:
    """What a client needs to know of the tokenizer."""
    tokenizer = service.tokenizer
    return protocol.TokenizerInfo(
        bos_token=tokenizer.eos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


def _tokens(service: Service, body: protocol.TokenizeRequest) -> np.ndarray:
    if body.messages:
        return render(service, body.messages, body.add_generation_prompt)
    text = body.prompt or body.content
    utf8(text, "prompt")
    if not body.parse_special or not any(name in text for name in service.special_tokens.values()):
        return service.encode(text, "prompt")
    try:
        return service.encode(service.tokenizer.encode_with_special_tokens(text), "prompt")
    except InputError as error:
        raise invalid(str(error), "prompt") from error
