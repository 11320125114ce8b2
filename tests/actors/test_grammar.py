"""Answers that must follow a grammar do, whatever the model would say, and whoever computes it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from msgspec import structs

from actors.engine import Engine
from actors.grammar import (
    MOST_FORCED,
    MOST_GRAMMAR_BYTES,
    Constraint,
    Grammars,
    calmed,
    from_gbnf,
)
from actors.request import LENGTH, STOP, GenerateRequest
from sharding.batch import SamplingParams
from sharding.errors import RequestError
from sharding.gguf.reader import GGUFFile
from sharding.gguf.tokenizer import Tokenizer
from tests.actors.test_engine import collect
from tests.actors.test_replay import breaking
from tests.stages import GREEDY, generate, local_engine, tokens_of
from tests.tiny_gguf import bpe_vocabulary, spm_vocabulary, tiny_model

TOKENIZERS = {
    "bpe": Tokenizer.from_metadata(bpe_vocabulary()),
    "spm": Tokenizer.from_metadata(spm_vocabulary()),
}
BPE = TOKENIZERS["bpe"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "cats"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
AS_PERSON = f"start: %json {json.dumps(PERSON)}"
IS_PERSON = re.compile(r'\{"name": "(.*)", "age": (\d+), "likes": \[(.*)\]\}', re.DOTALL)


def allowed(constraint: Constraint) -> list[int]:
    """The tokens that may come next."""
    mask = np.frombuffer(constraint.allowed, np.uint8)
    found: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return found


def wander(tokenizer: Tokenizer, grammar: str, rng: random.Random, most: int) -> list[int]:
    """What a model without a mind of its own would say."""
    constraint, said = Grammars(lambda: tokenizer).compile(grammar), list[int]()
    while not constraint.complete and len(said) < 1000:
        assert constraint.error is None
        token = rng.choice(allowed(constraint))
        if token in tokenizer.stop_ids:
            break
        said += [token, *constraint.take(token, most)]
    return said


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "likes"] and IS_PERSON.fullmatch(text)
    assert len(person["name"]) <= 12 and 0 <= person["age"] <= 150
    assert len(person["likes"]) <= 3 and {*person["likes"]} <= {"tea", "cats"}


@pytest.mark.parametrize("most", [0, 1, 5, 100])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_is_drawn_keeps_to_the_schema(kind: str, most: int) -> None:
    tokenizer = TOKENIZERS[kind]
    for seed in range(20):
        said = wander(tokenizer, AS_PERSON, random.Random(seed), most)
        check_person(b"".join(map(tokenizer.token_bytes, said)).decode())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_that_can_only_follow_are_those_that_the_tokenizer_makes(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    text = '{"name": "the theory", "age": 44'
    grammar = f"start: {json.dumps(text)}"
    constraint = Grammars(lambda: tokenizer).compile(grammar)
    first = tokenizer.encode("{", add_special=False)[-1]
    said = [first]
    while not constraint.complete:
        said += constraint.take(said[-1], 100)
        if not constraint.complete:
            said.append(allowed(constraint)[0])
    # SentencePiece puts a space before what stands alone, which nothing here does.
    begun = len(tokenizer.encode("{", add_special=False)) - 1
    assert said == tokenizer.encode(text, add_special=False)[begun:]


def test_no_more_follow_than_are_asked_for() -> None:
    grammar = f"start: {json.dumps('a' + 'xyz' * 40)}"
    for most in (0, 3, MOST_FORCED, 1000):
        constraint = Grammars(lambda: BPE).compile(grammar)
        forced = constraint.take(BPE.encode("a", add_special=False)[0], most)
        assert len(forced) == min(most, MOST_FORCED)


def test_a_long_text_without_a_choice_is_not_looked_for_at_each_step() -> None:
    """It is still what is said, token for token."""
    text = "the theory " * 2000
    constraint = Grammars(lambda: BPE).compile(f"start: {json.dumps('x' + text)}")
    (letter,) = BPE.encode("x", add_special=False)
    assert constraint.take(letter, 100) == [] and constraint.error is None
    said = [letter]
    for _ in range(40):
        said.append(allowed(constraint)[0])
        assert constraint.take(said[-1], 100) == [] and not constraint.complete
    assert ("x" + text).startswith(BPE.decode(said))


def test_a_grammar_with_an_endless_text_does_not_end_the_engine() -> None:
    grammar = calmed('start: "a" /x+/ /x+/')
    constraint = Grammars(lambda: BPE).compile(grammar)
    (a,), (x,) = BPE.encode("a", add_special=False), BPE.encode("x", add_special=False)
    for token in (a, x, x, x):
        assert constraint.take(token, 100) == []
        assert x in allowed(constraint)


def test_an_answer_may_end_where_it_is_whole_and_not_before() -> None:
    constraint = Grammars(lambda: BPE).compile("start: /[0-9]+/")
    assert not set(BPE.stop_ids) & {*allowed(constraint)}
    constraint.take(BPE.encode("7", add_special=False)[0], 0)
    assert set(BPE.stop_ids) <= {*allowed(constraint)} and not constraint.complete
    constraint.take(BPE.stop_ids[0], 0)
    assert constraint.complete


def test_an_answer_goes_on_behind_what_another_engine_drew() -> None:
    grammars = Grammars(lambda: BPE)
    said = wander(BPE, AS_PERSON, random.Random(3), 0)
    whole = grammars.compile(AS_PERSON)
    for token in said[:9]:
        whole.take(token, 0)
    assert grammars.compile(AS_PERSON, said[:9]).allowed == whole.allowed
    assert grammars.compile(AS_PERSON).allowed != whole.allowed, "the grammar itself stays as it is"
    said = BPE.encode("all of it", add_special=False)
    over = grammars.compile('start: "all of it"', said)
    assert over.complete and set(allowed(over)) == {*BPE.stop_ids}, "no more than an end to draw"


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("start: foo", 'unknown name: "foo"'),
        ("start: /(/", 'invalid regex "(" (in regex): regex parse error:: unclosed group'),
        ('start: %json {"type": "thing"}', "Invalid type: thing"),
        ('start: %json {"$ref": "http://127.0.0.1/x"}', "retrieving it failed"),
        ('start: %json {"not": {}}', 'Unimplemented keys: ["not"]'),
        ("", "Empty grammar"),
        ("\x00", "cannot be used"),
        ("start: <[70000]>", "too large"),
        ('start: "' + "a" * MOST_GRAMMAR_BYTES + '"', f"more than {MOST_GRAMMAR_BYTES}"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_words(grammar: str, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        Grammars(lambda: BPE).compile(grammar)


def test_a_model_that_cannot_end_an_answer_is_not_guided() -> None:
    metadata = {k: v for k, v in bpe_vocabulary().items() if not k.endswith("eos_token_id")}
    names = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [name.replace("<|", "<!") for name in names]
    endless = Tokenizer.from_metadata(metadata)
    assert endless.stop_ids == ()
    with pytest.raises(RequestError, match="no token that ends an answer"):
        Grammars(lambda: endless).compile("start: /a+/")


def test_llama_cpps_notation() -> None:
    grammar = from_gbnf('root ::= "x" [0-9]{2} ws tail?\nws ::= " " | "\\n"\ntail ::= "!"')
    text = BPE.decode(wander(BPE, grammar, random.Random(1), 0))
    assert re.fullmatch(r"x\d\d[ \n]!?", text)
    # llama.cpp's own grammar for arithmetic: a number takes spaces behind it, and a line ends with
    # one of them.
    lines = 'root ::= ([0-9]+ ws "=" ws num "\\n")+\nnum ::= [0-9]+ ws\nws ::= [ \\t\\n]*'
    constraint = Grammars(lambda: BPE).compile(from_gbnf(lines))
    for token in BPE.encode("1 = 1\n", add_special=False):
        constraint.take(token, 0)
    assert constraint.error is None and BPE.stop_ids[0] in allowed(constraint)
    for wrong in ("root ::= missing", 'start ::= "x"', "root ::= (", "("):
        with pytest.raises(ValueError, match=r"\w"):
            from_gbnf(wrong)


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    return GGUFFile.from_bytes(tiny_model(layers=4, context=512))


def requests(seeds: range) -> list[GenerateRequest]:
    """Some with a grammar, some without, greedy and drawn."""
    asked = []
    for seed in seeds:
        sampling = GREEDY if seed % 3 == 0 else SamplingParams(seed=seed, repetition_penalty=1.2)
        sampling = structs.replace(sampling, stop_ids=BPE.stop_ids)
        prompt = [5 + seed, 9, 30 + seed] * (1 + 7 * seed)
        grammar = AS_PERSON if seed % 4 else ""
        asked.append(GenerateRequest(f"r{seed}", prompt, 150, sampling, grammar=grammar))
    return asked


@pytest.fixture(scope="module")
def alone(file: GGUFFile) -> list[list[int]]:
    """Each by itself, on one stage."""
    with closing(local_engine(file, 1, context=512)) as engine:
        return [generate(engine, request) for request in requests(range(8))]


@pytest.mark.parametrize(("stages", "chunk"), [(1, None), (2, 2), (3, 7), (2, 40)])
def test_answers_are_the_same_for_any_stages_and_chunks_and_together(
    file: GGUFFile, alone: list[list[int]], stages: int, chunk: int | None
) -> None:
    with closing(local_engine(file, stages, context=512, kv=8192, chunk=chunk)) as engine:
        heard = collect(engine, requests(range(8)))
        assert [tokens_of(events) for events in heard] == alone
        assert engine.stats().pages_free == engine.stats().pages
    for request, events in zip(requests(range(8)), heard, strict=True):
        if request.grammar and events[-1].finish_reason == STOP:
            check_person(Tokenizer.from_metadata(file.metadata).decode(tokens_of(events)))
    assert any(len(event.tokens) > 1 for events in heard for event in events)


def test_answers_are_the_same_over_a_pipeline_that_breaks(
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with breaking(monkeypatch, {3, 12, 24}, context=512, kv=8192) as engine:
        found = [tokens_of(events) for events in collect(engine, requests(range(5)))]
        assert engine.stats().epoch == 3
    with breaking(monkeypatch, set(), context=512, kv=8192) as engine:
        assert found == [tokens_of(events) for events in collect(engine, requests(range(5)))]


@pytest.fixture(scope="module")
def engine(file: GGUFFile) -> Iterator[Engine]:
    with closing(local_engine(file, context=512)) as running:
        yield running


def test_what_is_scored_is_drawn_one_by_one_with_the_models_own_probabilities(
    engine: Engine,
) -> None:
    """A mask is no opinion of the model's."""
    sampling = SamplingParams(temperature=0.0, logprobs=3, stop_ids=BPE.stop_ids)
    request = GenerateRequest("s", [5, 6, 7], 60, sampling, grammar=AS_PERSON)
    events = list(engine.generate(request))
    drawn = [choice for event in events for choice in event.tokens]
    assert all(len(event.tokens) <= 1 for event in events)
    assert len(drawn) > 8 and all(len(choice.top) == 3 for choice in drawn)
    assert any(choice.token not in dict(choice.top) for choice in drawn), "it would say otherwise"
    scored = GenerateRequest(
        "p", [5, 6, 7, *tokens_of(events)], 0, GREEDY, prompt_logprobs=3, cached=False
    )
    said = [choice for event in engine.generate(scored) for choice in event.prompt_scores]
    assert said[2:] == drawn, "the same as of a prompt"


def test_the_length_limit_counts_what_is_not_drawn(engine: Engine) -> None:
    for most in range(1, 20):
        request = GenerateRequest("l", [5, 6], most, GREEDY, grammar=AS_PERSON)
        events = list(engine.generate(request))
        assert (len(tokens_of(events)), events[-1].finish_reason) == (most, LENGTH)


def test_an_answer_ends_by_itself_where_nothing_can_follow(engine: Engine) -> None:
    """Also without a token to end it, as with `ignore_eos`."""
    request = GenerateRequest("e", [5, 6], 40, GREEDY, grammar='start: "the end"')
    events = list(engine.generate(request))
    assert BPE.decode(tokens_of(events)) == "the end"
    assert events[-1].finish_reason == STOP
    for first in range(5, 15):
        nothing = GenerateRequest("n", [first, 6], 40, SamplingParams(), grammar='start: ""')
        (token,) = generate(engine, nothing)
        assert token in BPE.stop_ids
    open_end = GenerateRequest("o", [5, 6], 400, SamplingParams(seed=1), grammar="start: /[0-9]*/")
    events = list(engine.generate(open_end))
    assert events[-1].finish_reason == STOP and tokens_of(events)[-1] in BPE.stop_ids


def test_a_stop_token_among_those_that_follow_ends_the_answer(engine: Engine) -> None:
    (letter,) = BPE.encode("d", add_special=False)
    sampling = structs.replace(GREEDY, stop_ids=(letter,))
    events = list(
        engine.generate(GenerateRequest("x", [5], 40, sampling, grammar='start: "abcdefgh"'))
    )
    assert (BPE.decode(tokens_of(events)), events[-1].finish_reason) == ("abcd", STOP)


def test_a_bad_grammar_is_refused_before_anything_runs(engine: Engine) -> None:
    with pytest.raises(RequestError, match="unknown name"):
        engine.submit(GenerateRequest("b", [5], 4, grammar="start: foo"), lambda event: None)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_a_grammar_that_fails_on_its_way_costs_its_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Constraint, token: int, most: int) -> list[int]:
        self.error = "the answer's grammar failed: too complex"
        return []

    monkeypatch.setattr(Constraint, "take", fail)
    asked = [
        GenerateRequest("f", [5, 6], 20, GREEDY, grammar=AS_PERSON),
        GenerateRequest("g", [5, 6], 20, GREEDY),
    ]
    failed, other = collect(engine, asked)
    assert failed[-1].error == "the answer's grammar failed: too complex"
    assert failed[-1].suspect, "its client is not told to try again"
    assert len(tokens_of(other)) == 20 and other[-1].finish_reason == LENGTH
    assert engine.stats().pages_free == engine.stats().pages


def test_choices_hold_only_what_was_asked_for(engine: Engine) -> None:
    grammar = 'start: "yes" | "no" | "perhaps"'
    answers = set()
    for seed in range(12):
        sampling = SamplingParams(temperature=2.0, seed=seed, stop_ids=BPE.stop_ids)
        answers.add(
            BPE.decode(generate(engine, GenerateRequest("c", [5], 9, sampling, grammar=grammar)))
        )
    assert answers <= {"yes", "no", "perhaps"} and len(answers) > 1
