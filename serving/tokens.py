"""Tokens for clients: /tokenize, /detokenize and /tokenizer_info, without HTTP.

They take vLLM's field names and llama.cpp's; where the two differ in a default, the name that was
used decides. Slow for long texts: run them in a thread.
"""

from __future__ import annotations

from serving.openai import DetokenizeRequest, TokenizeRequest
from serving.openai_answers import (
    DetokenizeAnswer,
    TokenizeAnswer,
    TokenizerInfo,
    TokenPiece,
)
from serving.prepare import check_model, check_tokens, refuse_unsupported
from serving.service import Service, Tokenizer
from sharding.errors import RequestError


def tokenize(body: TokenizeRequest, service: Service) -> TokenizeAnswer:
    """The tokens of a text. Raises `RequestError` unless exactly one text is given."""
    if (body.prompt is None) == (body.content is None):
        raise RequestError("exactly one of prompt and content is needed", "prompt")
    check_model(body.model, service.model)
    refuse_unsupported(body.model_extra)
    text = body.content if body.prompt is None else body.prompt
    assert text is not None
    ids = service.tokenizer.encode(
        text, add_special=_add_special(body), parse_special=body.parse_special is not False
    )
    return TokenizeAnswer(
        tokens=[_piece(service.tokenizer, token) for token in ids] if body.with_pieces else ids,
        count=len(ids),
        max_model_len=service.model.context,
    )


def _add_special(body: TokenizeRequest) -> bool:
    given = {body.add_special, body.add_special_tokens} - {None}
    if len(given) > 1:
        message = "add_special and add_special_tokens are the same and must not differ"
        raise RequestError(message, "add_special")
    return bool(given.pop()) if given else body.prompt is not None


def _piece(tokenizer: Tokenizer, token: int) -> TokenPiece:
    raw = tokenizer.token_bytes(token)
    try:
        return TokenPiece(id=token, piece=raw.decode())
    except UnicodeDecodeError:
        return TokenPiece(id=token, piece=list(raw))


def detokenize(body: DetokenizeRequest, service: Service) -> DetokenizeAnswer:
    """The text of tokens, special ones included. Raises `RequestError` for an unknown token."""
    check_model(body.model, service.model)
    check_tokens(body.tokens, service.tokenizer, "tokens")
    text = service.tokenizer.decode(body.tokens, skip_special=False)
    return DetokenizeAnswer(prompt=text, content=text)


def tokenizer_info(service: Service) -> TokenizerInfo:
    """What the tokenizer adds and knows."""
    tokenizer = service.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return TokenizerInfo(
        vocab_size=tokenizer.vocab_size,
        max_model_len=service.model.context,
        add_bos_token=tokenizer.add_bos,
        bos_token=None if bos is None else tokenizer.token_text(bos),
        bos_token_id=bos,
        eos_token=None if eos is None else tokenizer.token_text(eos),
        eos_token_id=eos,
        stop_token_ids=list(tokenizer.stop_ids),
        chat_template=tokenizer.chat_template,
    )
