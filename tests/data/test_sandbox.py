"""The sandbox of chat templates: what hostile ones try, and what decent ones may."""

from __future__ import annotations

import pytest

from raytune_ft.data.templating import sandbox_limits
from raytune_ft.data.templating.sandbox import Renderer
from raytune_ft.errors import DataError, ModelError

MESSAGES = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yo"}]
GROW = "{% set ns = namespace(v=START) %}{% for i in range(99) %}{% set ns.v = NEXT %}{% endfor %}"


def grow(start: str, following: str, use: str = "") -> str:
    return GROW.replace("START", start).replace("NEXT", following) + use


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    ],
)
def test_endless_loops_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_limits, "MAX_STEPS", 2000)
    with pytest.raises(ModelError, match=r"fails: (Overflow|Security|Recursion)Error"):
        Renderer(source).render({"messages": MESSAGES})


def test_calls_that_double_at_every_depth_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_limits, "MAX_STEPS", 2000)
    source = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    with pytest.raises(ModelError, match="more than 2,000 turns of its loops"):
        Renderer(source + "{{ f(60) }}").render({})


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_limits, "MAX_SECONDS", -1.0)
    with pytest.raises(ModelError, match="seconds"):
        Renderer("{% for m in messages %}x{% endfor %}").render({"messages": MESSAGES})


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ '\t'.expandtabs(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ 2 ** (10**9) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ 'a'.translate({97: 'b' * 10**6}) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 'a\n' | indent(10**9) }}",
        "{{ ('a' * 10**6).join(['b'] * 10**5) }}",
        "{{ (['b'] * 10**5) | join('a' * 10**6) }}",
        grow("'aaaaaaaa'", "ns.v + ns.v"),
        grow("'aaaaaaaa'", "ns.v ~ ns.v"),
        grow("'aaaaaaaa'", "ns.v | replace('a', ns.v)"),
        grow("'aaaaaaaa'", "ns.v.replace('a', ns.v)"),
        grow("3", "ns.v * ns.v"),
        grow("[1]", "[ns.v, ns.v]", "{{ ns.v }}"),
        grow("[1]", "[ns.v, ns.v]", "{{ ns.v | string | length }}"),
        grow("[1]", "[ns.v, ns.v]", "{{ ns.v | tojson | length }}"),
        grow("[1]", "[ns.v, ns.v]", "{{ (ns.v ~ '') | length }}"),
        grow("[1]", "[ns.v, ns.v]", "{{ ('%s' % (ns.v,)) | length }}"),
        "{% set b = 'a' * 10**6 %}{% for i in range(99) %}{{ b }}{% endfor %}",
        "{% set b = 'a' * 10**6 %}{% set x %}{% for i in range(99) %}{{ b }}{% endfor %}"
        "{% endset %}",
    ],
)
def test_large_values_are_never_made(source: str) -> None:
    with pytest.raises(ModelError, match="chat template fails: SecurityError"):
        Renderer(source).render({"messages": MESSAGES})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum(10**6) }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "{{ namespace(**{'_x': 1}) }}",
        "{{ undefined.attribute }}",
    ],
)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises(ModelError, match="chat template fails"):
        Renderer(source).render({"messages": MESSAGES})


@pytest.mark.parametrize("source", ["{{ 'a' | center(9) }}", "{% for %}", "{{ [1] | random }}"])
def test_what_is_no_template_is_said_at_once(source: str) -> None:
    with pytest.raises(ModelError, match="chat template cannot be read"):
        Renderer(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ messages[0].content }}", "a1hé"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ 'x\ny' | indent(2) }}", "x\n  y"),
        ("{{ 'a-b' | replace('-', '+') }}{{ 'a-b'.replace('-', '+') }}", "a+ba+b"),
        ("{{ '%s' % 'a' }}{{ '{}'.format('f') }}{{ ' a' | trim | upper }}", "afA"),
        ("{{ [1] + [2] }}{{ 7 % 5 }}{{ 3 * 4 }}{{ messages[::-1][0].content }}", "[1, 2]212yo"),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ loop.length }}"
         "{% endfor %}", "2"),
        ("{% macro f(function, context) %}{{ function ~ context }}{% endmacro %}"
         "{{ f(function=1, context=2) }}", "12"),
    ],
)  # fmt: skip
def test_decent_templates_work_as_ever(source: str, expected: str) -> None:
    assert Renderer(source).render({"messages": MESSAGES}) == expected


def test_blocks_of_what_is_generated_are_bracketed() -> None:
    renderer = Renderer("a{% generation %}b{{ x }}{% endgeneration %}d")
    assert renderer.has_generation_marks
    assert renderer.render({"x": "c"}) == "abcd"
    assert renderer.render({"x": "c"}, ("<", ">")) == "a<bc>d"
    assert not Renderer("ab").has_generation_marks


def test_a_template_may_refuse() -> None:
    with pytest.raises(DataError, match="refuses the messages: no"):
        Renderer("{{ raise_exception('no') }}").render({})


def test_words_that_a_template_looks_for_are_known() -> None:
    source = "{% if '</think>' in x and x.startswith('<a>') and x != 'user' %}<no>{% endif %}"
    assert Renderer(source).literals == ("</think>", "<a>")
