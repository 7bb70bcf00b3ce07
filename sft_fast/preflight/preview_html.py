"""A preview as a self-contained HTML file."""

from __future__ import annotations

from html import escape

from sft_fast.metrics.html_page import page
from sft_fast.preflight.preview import Preview, Shown

LEGEND = (
    '<p>Legend: <span class="trained">trained</span>, <span class="masked">masked</span>, '
    '<span class="trained special">trained special token</span>, '
    '<span class="masked special">masked special token</span>. '
    '<span class="soft">Hover over a token for its id.</span></p>\n'
)


def preview_html(preview: Preview, title: str, num_bins: int) -> str:
    """The document; every text of the data is escaped."""
    tokens = sum(sample.num_tokens for sample in preview.samples)
    trained = sum(sample.num_supervised for sample in preview.samples)
    body = (
        f"<p>{len(preview.samples)} samples, {tokens} tokens, {trained} trained "
        f"({trained / max(tokens, 1):.1%}), rendered with {escape(preview.template)} template."
        f"</p>\n{LEGEND}"
    )
    if preview.rejected:
        items = "".join(f"<li>{escape(message)}</li>\n" for message in preview.rejected)
        body += f"<h2 class='warn'>Not used as they are</h2>\n<ul>{items}</ul>\n"
    body += bins_html(preview, num_bins)
    body += "<h2>Samples</h2>\n" + "".join(map(sample_html, preview.samples))
    return page(title, body)


def bins_html(preview: Preview, num_bins: int) -> str:
    """Packed rows as bars; the coloured end of a sample is its trained share."""
    if preview.bins is None:
        return ""
    rows = []
    for number in range(min(num_bins, preview.bins.num_bins)):
        parts = []
        for index in preview.bins.bin(number):
            sample = preview.samples[index]
            share = sample.num_supervised / sample.num_tokens
            width = sample.num_tokens / preview.capacity
            parts.append(
                f'<span style="width:{width:.3%};--share:{share:.1%}" '
                f'title="{escape(sample.summary())}"></span>'
            )
        rows.append(
            f'<div class="soft">row {number + 1}: {preview.bin_summary(number)}</div>'
            f'<div class="bin">{"".join(parts)}</div>\n'
        )
    note = (
        f"These {len(preview.samples)} samples alone; a run packs all of them. "
        "The coloured end of a sample is its trained share."
    )
    return f'<h2>Packing</h2>\n<p class="soft">{note}</p>\n{"".join(rows)}'


def sample_html(sample: Shown) -> str:
    """A sample as HTML: a span for each run of tokens, their ids as its title."""
    spans = "".join(
        f'<span class="{run.kind}" title="{", ".join(map(str, run.ids))}">{escape(run.text)}</span>'
        for run in sample.runs
    )
    warnings = "".join(f'<p class="warn">{escape(text)}</p>\n' for text in sample.warnings)
    return f'<p>{escape(sample.summary())}</p>\n{warnings}<div class="tokens">{spans}</div>\n'
