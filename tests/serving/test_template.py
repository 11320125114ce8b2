"""Chat templates render as their authors meant, and hostile ones end in an error."""

from __future__ import annotations

import threading
import tracemalloc
from datetime import datetime

import pytest

from serving.template import ChatTemplate
from sharding.errors import RequestError
from tests.serving.fakes import ByteTokenizer

HI: list[dict[str, object]] = [{"role": "user", "content": "hi"}]
CPU_S = 0.3
MOST_MEMORY_BYTES = 200 << 20


def render(
    source: str, messages: list[dict[str, object]] | None = None, prompt: bool = True
) -> str:
    template = ChatTemplate(ByteTokenizer(source), now=lambda: datetime(2026, 1, 2), cpu_s=CPU_S)
    return template.render(messages or HI, prompt)


def failure(source: str) -> str:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.param == "messages"
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{% endfor %}", "[user] hi"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ messages[0].get('name') is none }}{{ missing is defined }}", "TrueFalse"),
        ("{{ {'b': 1, 'a': ['é', none]} | tojson }}", '{"b": 1, "a": ["é", null]}'),
        ("{{ [{'a': 1}] | tojson(indent=2) }}", '[\n  {\n    "a": 1\n  }\n]'),
        ("{{ strftime_now('%d %b %Y') }}", "02 Jan 2026"),
        ("{{ 'a</think> b'.split('</think>')[-1].lstrip() }}", "b"),
        ("{{ 'x-y'.replace('-', '+') ~ 1 ~ none }}", "x+y1None"),
        ("{{ '%s is %d' | format('a', 3) }}{{ '%5.1f|' % 2.25 }}", "a is 3  2.2|"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ [3, 1, 2] | sort | join }}{{ 'ab' | upper }}{{ 'a b' | title }}", "123ABA B"),
        ("{{ 'a\nb' | indent(2) }}{{ ' x ' | trim }}{{ '<' | e }}", "a\n  bx&lt;"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}", "3"),
        ("{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ f(3, y=4) }}", "1234"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [1, 2] %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set t %}a{{ 1 }}{% endset %}{{ t | length }}", "2"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ messages[::-1][0].content[:1] }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}", "h3332"),
        ("{{ 'a' if tools else 'b' }}{{ 3 is odd }}{{ 'u' in 'user' }}", "bTrueTrue"),
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
    ],
)
def test_what_published_templates_use_works(source: str, text: str) -> None:
    assert render(source) == text


def test_a_model_without_template_but_with_its_tokens_speaks_chatml() -> None:
    text = ChatTemplate(ByteTokenizer()).render([*HI, {"role": "assistant", "content": "yo"}], True)
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_model_without_any_template_says_so() -> None:
    class Plain(ByteTokenizer):
        def encode(
            self, text: str, *, add_special: bool = True, parse_special: bool = True
        ) -> list[int]:
            return super().encode(text, add_special=add_special, parse_special=False)

    with pytest.raises(RequestError, match="/v1/completions"):
        ChatTemplate(Plain()).render(HI, True)


@pytest.mark.parametrize(
    ("source", "role"),
    [("{{ messages[0].role }}", "system"), ("{{ messages[0].role }}{# developer #}", "developer")],
)
def test_a_developer_is_a_system_to_templates_that_do_not_know_it(source: str, role: str) -> None:
    assert render(source, [{"role": "developer", "content": ""}]) == role


def test_the_client_reads_why_a_template_refuses_its_messages() -> None:
    assert "roles must alternate" in failure("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ x.y }}", "{% if %}", "{{ none + 1 }}"])
def test_a_broken_template_is_an_error_of_the_request(source: str) -> None:
    assert "chat template failed" in failure(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ messages | map(attribute='__class__.__mro__') | list }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages.append)(1) }}",
        "{{ namespace }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_of_python_can_be_reached(source: str) -> None:
    """CVE-2024-34359: a model file's template ran code on the machine that loaded it."""
    try:
        text = render(source)
    except RequestError:
        return
    assert text in ("", "[Undefined]")


NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{%% set x = 'aaaaaaaa' %%}%s{{ x }}"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{% for i in range(10**9) %}{% endfor %}", id="long range"),
        pytest.param(NESTED, id="nested ranges that print nothing"),
        pytest.param(
            "{% for i in range(9999) %}{% for j in range(9999) if 0 %}{% endfor %}{% endfor %}",
            id="filtered ranges",
        ),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", id="endless recursion"),
        pytest.param(
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
            "{{ f(99) }}",
            id="branching recursion",
        ),
        pytest.param("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", id="recursive"),
        pytest.param("{{ 'a' * 10**9 }}", id="repeated text"),
        pytest.param("{{ 10**9 * 'a' }}", id="text repeated from the left"),
        pytest.param("{{ [0] * 10**9 }}", id="repeated list"),
        pytest.param("{{ 9 ** 9 ** 9 ** 9 }}", id="power"),
        pytest.param("{{ '%1000000000d' | format(1) }}", id="wide format filter"),
        pytest.param("{{ '%1000000000d' % 1 }}", id="wide format operator"),
        pytest.param("{{ '%*d' % (10**9, 1) }}", id="starred width"),
        pytest.param("{{ '%((a))999999999d' % {'(a)': 1} }}", id="width behind a nested key"),
        pytest.param("{{ '%1000000000d' is odd }}", id="format hidden in a test"),
        pytest.param("{{ 'a' | center(10**9) }}", id="center"),
        pytest.param("{{ '{:1000000000}'.format(1) }}", id="str.format"),
        pytest.param("{{ 'a'.zfill(10**9) }}", id="zfill"),
        pytest.param("{{ [1] | tojson(indent=10**9) }}", id="wide JSON"),
        pytest.param("{{ 'a' | indent(10**9) }}", id="wide indentation"),
        pytest.param("{{ 1 | round(10**9, 'ceil') }}", id="round"),
        pytest.param("{{ ('a' * 400).replace('a', 'b' * 10**6) }}", id="replace"),
        pytest.param("{{ ('a' * 10**6) | join(range(99999)) }}", id="join a text"),
        pytest.param("{{ range(99999) | join('b' * 10**6) }}", id="join with a text"),
        pytest.param("{{ ('a ' * 10**6).split() }}", id="split into small parts"),
        pytest.param("{{ ('Ā' * 10**6) | list }}", id="list of characters"),
        pytest.param(DOUBLED % ("{% set x = x ~ x %}" * 40), id="doubling by ~"),
        pytest.param(DOUBLED % ("{% set x = x + x %}" * 40), id="doubling by +"),
        pytest.param(DOUBLED % ("{% set x %}{{ x }}{{ x }}{% endset %}" * 40), id="block set"),
        pytest.param(DOUBLED % ("{% set x = [x, x] %}" * 40), id="list of lists, printed"),
        pytest.param(DOUBLED % ("{% set x = (x, x) %}" * 40 + "{{ x | tojson }}"), id="as JSON"),
        pytest.param(DOUBLED % ("{% set x = {0: x, 1: x} %}" * 40), id="dict of dicts"),
        pytest.param(
            "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% endif %}{{ varargs }}"
            "{% endmacro %}{{ f(60) }}",
            id="varargs of varargs",
        ),
        pytest.param(
            "{% set l = range(99999) | list %}{% for i in l %}{% if -1 in l %}{% endif %}"
            "{% endfor %}",
            id="slow comparisons",
        ),
        pytest.param("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", id="deep parentheses"),
        pytest.param("{{" + "1+" * 20000 + "1 }}", id="long sum"),
        pytest.param("{{ " + "9" * 10000 + " }}", id="long number"),
        pytest.param("a" * 300_000, id="long template"),
        pytest.param("{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}", id="output"),
    ],
)
def test_a_template_that_wants_too_much_ends_in_an_error(source: str) -> None:
    """One such template in a model file would hang or kill the server at the first request.

    A refusal that comes after the gigabyte was made comes too late, hence the look at the memory.
    """
    tracemalloc.start()
    try:
        assert "chat template failed" in failure(source)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY_BYTES
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_within_the_limits() -> None:
    """The limits are for templates, not for people with books: 8 MB of text in 2000 messages."""
    source = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '\n' }}"
        "{% endfor %}"
    )
    messages: list[dict[str, object]] = [{"role": "user", "content": "word " * 800}] * 2000
    template = ChatTemplate(ByteTokenizer(source))
    assert len(template.render(messages, True)) > 7_000_000


def test_threads_render_with_allowances_of_their_own() -> None:
    """A shared allowance would let one client's messages use up another's."""
    template = ChatTemplate(ByteTokenizer("{{ messages[0].content * 1000 }}"))
    rendered: list[str] = []

    def work() -> None:
        rendered.append(template.render(HI, True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == ["hi" * 1000] * 4
