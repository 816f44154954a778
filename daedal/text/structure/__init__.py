"""Structured output: answers that cannot but match a JSON schema, or a format's spelling of tool calls.

`shape` says what is wanted, `bounds` what is not taken, `lark` and `parameters` write it as a grammar, `structures` has
llguidance make of it, under limits, what `masks` asks before each token. Knows nothing of models, requests and HTTP.
"""
