"""Requests and responses: OpenAI's completions and chat, and our own scores and sessions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StringConstraints,
    model_validator,
)

from mhesa.inference.continuation import FinishReason
from mhesa.serve.sessions import SessionInfo
from mhesa.tokenizers.chat import Role

SESSION_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SessionName = Annotated[str, StringConstraints(pattern=SESSION_NAME)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), AfterValidator(lambda seed: seed % (1 << 64))]
Item = TypeVar("Item")
# Lists stop at their first wrong item: an error for each of a million items would take a gigabyte.
Items = Annotated[list[Item], Field(fail_fast=True)]
TokenIds = Items[Annotated[StrictInt, Field(ge=0, lt=1 << 31)]]
Texts = Items[str]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
ScoreUnit = Literal["token", "character", "word", "sentence", "line", "text"]
# Units whose items have surprisal, and neither entropy nor rank.
PLAIN_UNITS = ("line", "text")
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]

# Values that clients send in a field that they do not use.
EMPTY: tuple[Any, ...] = (None, "", [], {})
# Values that mean the same as an omitted field. Of fields that this server does not support, only these are
# accepted.
IGNORED_VALUES: dict[str, tuple[Any, ...]] = {
    "seed": (-1,),
    "top_k": (-1,),
    "best_of": (*EMPTY, 1),
    "function_call": (*EMPTY, "none", "auto"),
    "include_obfuscation": (*EMPTY, True, False),
    "modalities": (*EMPTY, ["text"]),
    "parallel_tool_calls": (*EMPTY, True, False),
    "prompt_cache_retention": (*EMPTY, "in_memory", "in-memory"),
    "reasoning_effort": (*EMPTY, "none", "medium"),
    "response_format": (*EMPTY, {"type": "text"}),
    "service_tier": (*EMPTY, "auto", "default"),
    "store": (None, False),
    "tool_choice": (*EMPTY, "none", "auto"),
    "verbosity": (*EMPTY, "medium"),
    # Without members it asks for a search.
    "web_search_options": (None,),
    # Fields of vLLM's and llama.cpp's requests to tokenise.
    "continue_final_message": (None, False),
    "with_pieces": (None, False),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "mm_processor_kwargs"), EMPTY),
    **dict.fromkeys(
        ("audio", "functions", "moderation", "prediction", "prompt_cache_options", "suffix", "tools"), EMPTY
    ),
    # Fields of a message, which a client may send back as it was received.
    **dict.fromkeys(
        ("annotations", "parsed", "prompt_cache_breakpoint", "refusal", "tool_call_id", "tool_calls"), EMPTY
    ),
}


class RequestBody(BaseModel):
    """A request's body; an unknown field is an error.

    As in OpenAI's API, an optional field that is null or empty is the same as one that is not there. So are
    fields of OpenAI's that this server does not have, if they ask for nothing.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        if value in IGNORED_VALUES.get(name, ()):
            return True
        field = cls.model_fields.get(name)
        if field is None or field.is_required():
            return False
        return value is None or (field.default is None and value in EMPTY)


class StreamOptions(RequestBody):
    """What a stream sends beside the text."""

    include_usage: bool = Field(default=False, description="Send the counts of tokens at the end.")
    continuous_usage_stats: bool = Field(default=False, description="Send them with every event.")


class GenerationRequest(RequestBody):
    """What completions and chat have in common."""

    model: str | None = Field(None, description="The model's name; the one that is served if omitted.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token.")
    top_k: int | None = Field(None, ge=0, le=1 << 31, description="0 and -1 are all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    n: int | None = Field(None, ge=1, le=1 << 31, description="How many texts for each prompt.")
    stop: str | Texts | None = Field(None, description="A text ends before the first of these.")
    seed: Seed | None = Field(None, description="Makes the texts repeatable; -1 is the same as none.")
    stream: bool | None = Field(None, description="Send the text as it is written, as server-sent events.")
    stream_options: StreamOptions | None = None
    session: SessionName | None = Field(
        None, description="Continue the stored session of this name, and store it again at the end."
    )
    user: str | None = Field(None, description="Ignored.")
    frequency_penalty: Penalty | None = Field(
        None, description="Subtracted from a token's logit for each time that it is in the text."
    )
    presence_penalty: Penalty | None = Field(
        None, description="Subtracted from the logits of tokens that are in the text."
    )
    logit_bias: dict[TokenName, Bias] | None = Field(
        None, description="Added to the logits of these token ids; -100 rules a token out."
    )


class CompletionRequest(GenerationRequest):
    """Texts that continue prompts."""

    prompt: str | TokenIds | Texts | Items[TokenIds] = Field(
        "", description="A text, a list of texts, token ids, or a list of these; empty begins a new text."
    )
    max_tokens: int | None = Field(None, ge=0, le=1 << 31, description="16 if omitted.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=1 << 31,
        description="Give log-probabilities, and this many of the likeliest tokens beside each.",
    )
    echo: bool | None = Field(None, description="Give the prompt back before the text.")

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "def main(", "max_tokens": 64, "temperature": 0.8}]}
    )


class TextPart(RequestBody):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(RequestBody):
    """A turn of a conversation."""

    role: Role
    content: str | Items[TextPart] = Field("", description="Only an assistant's may be null or missing.")
    name: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"content of a message with the role {self.role} must be a text")
        return self

    def text(self) -> str:
        """The content as one text."""
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class ChatRequest(GenerationRequest):
    """The next turn of a conversation."""

    messages: Items[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, le=1 << 31, description="As many as the server allows if omitted."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=1 << 31, description="A newer name of max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1 << 31)
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")


class ScoreRequest(RequestBody):
    """Texts whose surprisal is measured."""

    model: str | None = None
    input: str | Texts = Field(description="A text, or several that are measured each by itself.")
    by: ScoreUnit = Field("line", description="What each item of the answer is.")

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "first line\nsecond line\n"}]})


class TokenizeRequest(RequestBody):
    """A text or a conversation to tokenise: one of `prompt`, `content` and `messages`."""

    model: str | None = None
    prompt: str = Field("", description="A text.")
    content: str = Field("", description="A text, as llama.cpp's clients call it.")
    messages: Items[Message] | None = Field(
        None, min_length=1, description="A conversation, in the form of the model's chat template."
    )
    add_generation_prompt: bool = Field(
        default=True, description="End a conversation with the words that begin an answer."
    )
    parse_special: bool = Field(
        default=True,
        description="Make tokens of the names of special tokens in a text. Completions never do.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Nothing is added to a text: the server itself begins it with an end of text."
    )
    add_special: bool | None = Field(None, description="The same, as llama.cpp's clients call it.")
    return_token_strs: bool | None = Field(None, description="Give the texts of the tokens too.")

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Once upon a time"}]})

    @model_validator(mode="after")
    def _has_one_text(self) -> TokenizeRequest:
        if len(self.model_fields_set & {"prompt", "content", "messages"}) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self


class DetokenizeRequest(RequestBody):
    """Tokens to make a text of."""

    model: str | None = None
    tokens: TokenIds

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [79, 110, 99, 101]}]})


class ForkRequest(RequestBody):
    """A copy of a session to make."""

    to: SessionName = Field(description="The copy's name.")


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextObject(BaseModel):
    """What responses and events with texts have in common."""

    id: str
    object: str
    created: int
    model: str


class CompletionLogprobs(BaseModel):
    """Log-probabilities in nats, token by token; null for a token that begins a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(TextObject):
    """An event of a stream: pieces of texts, or at the end the counts of tokens alone."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Completion(CompletionChunk):
    """Texts that continue prompts."""

    usage: Usage


class ChatToken(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatScoredToken(ChatToken):
    """A token, and the likeliest in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities in nats, token by token."""

    content: list[ChatScoredToken] | None
    refusal: None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(TextObject):
    """The next turn of a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What an event adds to a message: its role first, then pieces of text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TextObject):
    """An event of a stream: pieces of answers, or at the end the counts of tokens alone."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parameters: int
    state_bytes: int


class Models(BaseModel):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class ScoredItem(BaseModel):
    """A part of a text, and its surprisal in bits.

    Of tokens, characters, words and sentences `entropy` says how many bits were to be expected of the token
    that the part begins in, and `rank` is that token's: 1 if none was likelier.
    """

    text: str
    offset: int = Field(description="Where it begins, in bytes.")
    bytes: int
    bits: float
    entropy: float | None = None
    rank: int | None = None


class ScoredText(BaseModel):
    """A text's surprisal."""

    index: int
    bytes: int
    bits: float
    bits_per_byte: float | None
    items: list[ScoredItem]


class Score(BaseModel):
    """Surprisal of texts."""

    object: Literal["score"]
    model: str
    by: ScoreUnit
    data: list[ScoredText]
    usage: Usage


class Tokens(BaseModel):
    """The tokens of a text, and the largest number that a prompt may have."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """The text of tokens, under the names that vLLM and llama.cpp give it; special tokens by name."""

    prompt: str
    content: str


class TokenizerInfo(BaseModel):
    """The tokenizer's special tokens and its chat template."""

    bos_token: str
    eos_token: str
    pad_token: str
    chat_template: str | None


class SessionList(BaseModel):
    """Sessions by name; `has_more` asks for the next page with `after`."""

    object: Literal["list"]
    data: list[SessionInfo]
    has_more: bool


class Deleted(BaseModel):
    """A session that was deleted."""

    object: Literal["session"]
    name: str
    deleted: bool


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "stopping", "failed"]
