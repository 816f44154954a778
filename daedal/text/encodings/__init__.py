"""Chat formats that ship as programs instead of templates: DeepSeek V3, R1, V3.1, V3.2 and V4, both ways.

`formats` is the way in. Rendering: `messages` reads a conversation, one module per family writes it. Parsing: `lexer`
cuts an answer into text and tags, `stream` sorts these into reasoning, content and tool calls as they come, with the
tool grammar of `dsml_stream` or `token_calls`; `dsml` and `token_calls` also have the strict readers of whole answers.
Knows nothing of files, tokenizers or servers. No module here keeps state of its own.
"""
