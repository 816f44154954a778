"""Spellings of the special tokens that DeepSeek's chat formats are made of.

Facts of the published tokenizers (V3 to V4). The bar is U+FF5C and the low line U+2581, never their ASCII likenesses.
Knows nothing of ids: most of these are ordinary added tokens, and so remain visible in decoded text.
"""

BAR = "\N{FULLWIDTH VERTICAL LINE}"

BOS = f"<{BAR}begin▁of▁sentence{BAR}>"
EOS = f"<{BAR}end▁of▁sentence{BAR}>"
USER = f"<{BAR}User{BAR}>"
ASSISTANT = f"<{BAR}Assistant{BAR}>"
SYSTEM = f"<{BAR}System{BAR}>"  # of V4.1 alone
LATEST_REMINDER = f"<{BAR}latest_reminder{BAR}>"
THINK = "<think>"
THINK_END = "</think>"
SEARCH_BEGIN = f"<{BAR}search▁begin{BAR}>"  # came with V3.1
DSML = f"{BAR}DSML{BAR}"

TASKS = {name: f"<{BAR}{name}{BAR}>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
"""Quick instructions of V4, by the name that a message's `task` gives."""

CALLS_BEGIN = f"<{BAR}tool▁calls▁begin{BAR}>"
CALLS_END = f"<{BAR}tool▁calls▁end{BAR}>"
CALL_BEGIN = f"<{BAR}tool▁call▁begin{BAR}>"
CALL_END = f"<{BAR}tool▁call▁end{BAR}>"
CALL_SEPARATOR = f"<{BAR}tool▁sep{BAR}>"
OUTPUTS_BEGIN = f"<{BAR}tool▁outputs▁begin{BAR}>"
OUTPUTS_END = f"<{BAR}tool▁outputs▁end{BAR}>"
OUTPUT_BEGIN = f"<{BAR}tool▁output▁begin{BAR}>"
OUTPUT_END = f"<{BAR}tool▁output▁end{BAR}>"
