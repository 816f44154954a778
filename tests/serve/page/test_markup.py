"""An answer's text becomes markup only where the page says so, whatever the text."""

import re

from selenium import webdriver

RENDERED = {
    "plain": "<p>plain</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# Title\ntext": "<h3>Title</h3><p>text</p>",
    "- a\n- **b**\n\n- c\nend": "<ul><li>a</li><li><strong>b</strong></li><li>c</li></ul><p>end</p>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "`a*b*c` and *d*": "<p><code>a*b*c</code> and <em>d</em></p>",
    "2 * 3 * 4, snake_case_name, **open": "<p>2 * 3 * 4, snake_case_name, **open</p>",
    "```html\n<b>**x**</b>\n```\nafter": "html<pre><code>&lt;b&gt;**x**&lt;/b&gt;</code></pre><p>after</p>",
    "```\nunfinished": "<pre><code>unfinished</code></pre>",
    "```<img/src=x>\n1\n```": "&lt;img/src=x&gt;<pre><code>1</code></pre>",
    "| a | **b** |\n|---|:-:|\n| <i> | 2 |\nend": (
        "<table><tbody><tr><th>a</th><th><strong>b</strong></th></tr><tr><td>&lt;i&gt;</td><td>2</td></tr></tbody>"
        "</table><p>end</p>"
    ),
    "[here](https://a.example/?b=1)": '<p><a href="https://a.example/?b=1" title="https://a.example/?b=1">here</a></p>',
    "[x](javascript:alert(1)) ![x](http://a/b)": '<p>[x](javascript:alert(1)) !<a href="http://a/b" title="http://a/b">x</a></p>',
    '[x](https://a" onclick="alert(1))': '<p>[x](https://a" onclick="alert(1))</p>',
    "[" * 20_000: f"<p>{'[' * 20_000}</p>",
    "|" + "-" * 20_000 + "\n|" + "-" * 20_000: f"<p>|{'-' * 20_000}<br>|{'-' * 20_000}</p>",
    "<script>alert(1)</script>": "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>",
    "a" + "`" * 20_000: f"<p>a{'`' * 20_000}</p>",
    "*a " * 7_000: f"<p>{'*a ' * 7_000}</p>",
}


# What is around code and tables, and how a link opens: the same in all.
FRAME = re.compile(
    r'</?div[^>]*>|<button class="bare copy"[^>]*>.*?</button>| tabindex="0"| target="_blank"'
    r' rel="noopener noreferrer"'
)


def test_an_answer_becomes_markup_only_where_the_page_says_so(browser: webdriver.Chrome, address: str) -> None:
    browser.get(address)
    script = """
        const [text, done] = arguments;
        const box = document.createElement("div");
        import("/markdown.js").then(({ render }) => { box.append(render(text)); done(box.innerHTML); });
    """
    for text, markup in RENDERED.items():
        assert FRAME.sub("", browser.execute_async_script(script, text)) == markup, text[:40]
