"""Chat templates that no tokenizer should bring; docs/make_reliability.py counts them."""

ENDLESS = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for i in range(90000) %}{% for j in range(90000) %}"
    "{% set ns.x = ns.x + 1 %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{% set x = 'x' * 100000000 %}{{ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x }}",
    "{{ [messages] * 1000000000 }}",
    "{% set ns = namespace(s='xxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ''.center(10000000000) }}",
)
"""Loops without an end, texts without a limit."""

FAILING = (
    "{% for m in %}",
    "{{ raise_exception('no such role\x1b[2J') }}",
    "{{ raise_exception('" + "x" * 5000 + "') }}",
    "{{ 1 / 0 }}",
    "{% include 'other' %}",
    "{% extends 'other' %}",
    "{% import 'os' as os %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.nothing.at.all }}",
    "{{ messages[99]['content'] }}",
    "{{ messages[0]['content'] + 1 }}",
    "{{ range(10 ** 9) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ undefined_function() }}",
    "{{ messages | nofilter }}",
    "{% break %}{% nonsense %}",
    "{{ '\\ud800' }}",
    "{{ [].pop() }}",
    "{{ {}['a'] }}{{ {}.a.b }}",
    "{{ int('x') }}",
    "{{ 'x'.encode('nonsense') }}",
)
"""Errors of every kind in what the template does."""
