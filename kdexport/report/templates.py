"""The templates of the pages, for jinja2 with escaping: one file each, without scripts, fonts or anything to load."""

STYLE = """
:root{color-scheme:light dark;
--paper:#fff;--raised:#f5f7fa;--ink:#18202c;--muted:#556071;--grid:#ccd3dd;--first:#1763ad;
--second:#a04e00;--bad:#b3261e;--good:#1b6e3a;--good-paper:#e6f4ea;--bad-paper:#fbe9e7}
@media(prefers-color-scheme:dark){:root{--paper:#12161d;--raised:#1b212b;--ink:#e4e9f1;--muted:#a3aebf;--grid:#3a4454;
--first:#6cb2f5;--second:#f2a65a;--bad:#ff8a7a;--good:#7ad39a;--good-paper:#14301f;--bad-paper:#3b1a17}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.75rem;line-height:1.2;margin:.2rem 0 .8rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0;max-width:52rem}
.muted,figcaption,caption{color:var(--muted);font-size:.875rem}
.verdict{display:flex;gap:.7rem;align-items:baseline;flex-wrap:wrap;padding:.7rem 1rem;border-radius:.5rem;
max-width:none;background:var(--good-paper);border-left:.4rem solid var(--good)}
.verdict.bad{background:var(--bad-paper);border-color:var(--bad)}
.verdict strong{font-size:1.1rem;color:var(--good)}.verdict.bad strong{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.3rem}
th,td{text-align:left;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
thead th{color:var(--muted);font-weight:600;font-size:.875rem}
tbody th{font-weight:600}
td.number,th.number{text-align:right}
td.bad{color:var(--bad);font-weight:700}
.short{white-space:nowrap}
td small{display:block;color:var(--muted);font-size:.8125rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:1rem;margin-top:1rem}
.plots>figure,.card{background:var(--raised);border-radius:.5rem;padding:.9rem;margin:0;min-width:0}
.plots h3{margin:0 0 .4rem}
.plot svg{display:block;width:100%;max-width:30rem;height:auto;margin:0 auto}
.plot svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1rem;margin-top:1rem}
.images figure{margin:0;background:var(--raised);border-radius:.5rem;padding:.7rem}
.images img{display:block;width:96px;height:96px;image-rendering:pixelated;border-radius:.25rem;margin-bottom:.4rem}
.images figcaption{overflow-wrap:anywhere}
pre{background:var(--raised);padding:.7rem 1rem;border-radius:.5rem;overflow-x:auto;font-size:.875rem}
code{font-family:ui-monospace,Menlo,Consolas,monospace}
dl{display:grid;grid-template-columns:minmax(8rem,max-content) 1fr;gap:.25rem 1.2rem;margin:.5rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
details{margin:.8rem 0;border:1px solid var(--grid);border-radius:.5rem;padding:.5rem .9rem}
summary{cursor:pointer;font-weight:600}
details h3{margin-top:1.6rem}
.classes{columns:12rem;padding-left:1.2rem;margin:.4rem 0}
.classes li{overflow-wrap:anywhere;break-inside:avoid}
:focus-visible{outline:3px solid var(--first);outline-offset:2px}
@media(max-width:40rem){
.cards thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.cards,.cards tbody,.cards tr,.cards th,.cards td,.cards caption{display:block}
.cards tr{background:var(--raised);border-radius:.5rem;padding:.6rem .9rem;margin-bottom:.7rem}
.cards th,.cards td,.cards td.number{border:0;padding:.12rem 0;text-align:left}
.cards td{display:grid;grid-template-columns:8.5rem 1fr}
.cards td::before{content:attr(data-label);color:var(--muted);grid-row:span 2}
.cards .short{white-space:nowrap}
td small{grid-column:2}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}
}
@media print{
:root{color-scheme:light;--paper:#fff;--raised:#fff;--ink:#000;--muted:#444;--grid:#bbb;--first:#1763ad;--second:#a04e00;
--bad:#b3261e;--good:#1b6e3a;--good-paper:#fff;--bad-paper:#fff}
body{font-size:10.5pt}main{max-width:none;padding:0}
.verdict{border:1px solid;border-left-width:.4rem}
figure,tr,dl,pre{break-inside:avoid}h2,h3{break-after:avoid}thead{display:table-header-group}
.plots{grid-template-columns:1fr 1fr}.plots>figure{border:1px solid var(--grid)}
.scroll{overflow:visible}details:not([open]){display:none}
}
"""

MACROS = """
{%- macro table(shown, cards=false) -%}
<div class="scroll" tabindex="0" role="region" aria-label="{{ shown.title }}">
<table{% if cards %} class="cards" role="table"{% endif %}>
{%- if shown.note %}<caption>{{ shown.note }}</caption>{% endif %}
<thead{% if cards %} role="rowgroup"{% endif %}><tr{% if cards %} role="row"{% endif %}>
{%- for cell in shown.header %}<th scope="col"{% if cards %} role="columnheader"{% endif %}>{{ cell }}</th>{% endfor -%}
</tr></thead>
<tbody{% if cards %} role="rowgroup"{% endif %}>
{%- for row in shown.rows %}<tr{% if cards %} role="row"{% endif %}>
{%- for cell in row %}
{%- if cards and loop.first %}<th scope="row" role="rowheader">{{ cell }}</th>
{%- else %}<td{% if cards %} role="cell" data-label="{{ shown.header[loop.index0] }}"{% endif %}
{%- if cell is failing %} class="bad"{% endif %}>
{%- if not cards %}{{ cell }}{% else %}{% for part in cell.split("\\n") %}
{%- if not loop.first %}<small>{{ part }}</small>
{%- else %}<span{% if part|length < 20 %} class="short"{% endif %}>{{ part }}</span>
{%- endif %}{% endfor %}{% endif %}</td>
{%- endif %}{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
{%- endmacro -%}
{%- macro plot(shown) -%}
<figure><h3>{{ shown.title }}</h3><div class="plot" role="img" aria-label="{{ shown.said }}">{{ shown.svg }}</div>
<figcaption>{{ shown.caption }}</figcaption></figure>
{%- endmacro -%}
"""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kdexport"><title>{{ title }}</title><style>{{ style }}</style></head>
<body><main>
"""
_FOOT = "</main></body></html>\n"

REPORT = (
    '{%- from "macros" import table, plot -%}'
    + _HEAD
    + """<header><h1>{{ name }}</h1>
<p class="verdict{% if bad %} bad{% endif %}"><strong>{{ word }}</strong><span>{{ sentence }}</span></p>
<p class="muted">{{ facts }}</p></header>
<section aria-labelledby="targets"><h2 id="targets">Targets</h2>
{{ table(targets, cards=true) }}
{%- for line in target_notes %}<p class="muted">{{ line }}</p>{% endfor %}
</section>
<section aria-labelledby="accuracy"><h2 id="accuracy">Accuracy, latency and size</h2>
{%- for line in missing %}<p class="muted">{{ line }}</p>{% endfor %}
<div class="plots">{% for shown in plots %}{{ plot(shown) }}
{% endfor %}</div>
{%- for shown in numbers %}<details><summary>{{ shown.title }}</summary>{{ table(shown) }}</details>{% endfor %}
</section>
{%- if images_title %}<section aria-labelledby="flips"><h2 id="flips">{{ images_title }}</h2>
<p class="muted">{{ images_note }}</p>
<div class="images">{% for image in images %}<figure>
{%- if image.source %}<img src="{{ image.source }}" alt="{{ image.said }}" width="96" height="96">{% endif -%}
<figcaption><strong>{{ image.label }}</strong>
{%- for line in image.lines %}<br>{{ line }}{% endfor %}</figcaption></figure>
{% endfor %}</div></section>{% endif %}
<section aria-labelledby="merge"><h2 id="merge">Student and teacher</h2>
<div class="plots">{% for shown in student_plots %}{{ plot(shown) }}{% endfor %}
<div class="card">{{ table(student) }}</div></div>
</section>
<section aria-labelledby="use"><h2 id="use">How to run it</h2>
<pre tabindex="0"><code>{{ commands }}</code></pre>
<dl>{% for what, value in use %}<dt>{{ what }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<details{% if classes|length <= 24 %} open{% endif %}>
<summary>{{ classes|length }} classes, in the order of the logits</summary>
<ol class="classes" start="0">{% for name in classes %}<li><bdi>{{ name }}</bdi></li>{% endfor %}</ol></details>
</section>
<section aria-labelledby="certificate"><h2 id="certificate">Certificate</h2>
<p>Every check and where the bundle comes from. <code>kdexport verify BUNDLE</code> repeats the checks.</p>
<details><summary>{{ tables|length }} tables: {{ tables|map(attribute="title")|join(", ") }}</summary>
{%- for shown in tables %}<h3>{{ shown.title }}</h3>{{ table(shown) }}{% endfor %}
</details></section>
"""
    + _FOOT
)

DIFF = (
    '{%- from "macros" import table, plot -%}'
    + _HEAD
    + """<header><h1>{{ name }}</h1>
<p class="verdict{% if bad %} bad{% endif %}"><strong>{{ word }}</strong><span>{{ sentence }}</span></p></header>
{%- for shown in tables %}<section><h2>{{ shown.title }}</h2>{{ table(shown, cards=true) }}</section>
{% endfor %}
<section><h2>Targets beside each other</h2><div class="plots">{{ plot(picture) }}</div></section>
"""
    + _FOOT
)

HISTORY = (
    '{%- from "macros" import table, plot -%}'
    + _HEAD
    + """<header><h1>{{ name }}</h1><p class="muted">{{ sentence }}</p></header>
<div class="plots">{% for shown in plots %}{{ plot(shown) }}{% endfor %}</div>
{%- for shown in tables %}<section><h2>{{ shown.title }}</h2>{{ table(shown, cards=true) }}</section>{% endfor %}
"""
    + _FOOT
)
