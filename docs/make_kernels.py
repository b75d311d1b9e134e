"""Print docs/kernels.svg: `python docs/make_kernels.py > docs/kernels.svg`."""

from __future__ import annotations

GREY, LIGHT, MIDDLE, DARK = "#e9ecef", "#d0e3f5", "#8bbbe8", "#2c6fb0"
shapes: list[str] = []


def box(x: float, y: float, width: float, height: float, fill: str, label: str = "") -> None:
    """A rectangle with a label in it."""
    shapes.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="#fff"/>')
    if label:
        colour = "#fff" if fill == DARK else "#222"
        text(x + width / 2, y + height / 2 + 4, label, anchor="middle", colour=colour)


def text(
    x: float, y: float, label: str, anchor: str = "start", colour: str = "#222", bold: bool = False
) -> None:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    shapes.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}"{weight}>{label}</text>')


def line(path: str, arrow: bool = True) -> None:
    """An arrow, or a dashed line."""
    style = 'marker-end="url(#tip)"' if arrow else 'stroke-dasharray="4 3"'
    shapes.append(f'<path d="{path}" fill="none" stroke="#444" {style}/>')


def spans(top: int) -> None:
    """One long sequence of narrow rows: two chunks of eight spans, in three passes."""
    text(20, top, "Spans: a long sequence of narrow rows", bold=True)
    for chunk in range(2):
        left = 150 + 400 * chunk
        box(left, top + 14, 392, 22, LIGHT, f"chunk {chunk} (a task)")
        for span in range(8):
            x, slot = left + 49 * span, 8 * chunk + span
            box(x, top + 38, 49, 22, GREY, f"slot {slot}")
            line(f"M{x + 4} {top + 76}h36")
            if slot < 15:
                across = 18 if span < 7 else 26
                line(f"M{x + 40} {top + 104}q{across / 2} -14 {across} 0")
            line(f"M{x + 4} {top + 128}h36")
    for y, label in ((42, "spans"), (68, "1  ends"), (94, "2  chain"), (118, "3  forward")):
        text(20, top + y + 12, label)
    text(
        150,
        top + 156,
        "1: all spans of a chunk advance together, from zero.  2: each slot gets the state that enters",
    )
    text(
        150, top + 174, "its span.  3: all spans advance together again, from that state, and write results."
    )


def relay(top: int) -> None:
    """Three threads that take turns at one sequence."""
    text(20, top, "Relay: one long sequence of wide rows, three threads", bold=True)
    for chunk in range(9):
        thread, x = chunk % 3, 150 + 72 * chunk
        y = top + 14 + 30 * thread
        for part, fill in enumerate((LIGHT, DARK, MIDDLE)):
            label = f"{('fetch', 'state', 'write')[part]} {chunk}"
            box(x + 72 * part, y, 70, 24, fill, label)
    for thread in range(3):
        text(20, top + 31 + 30 * thread, f"thread {thread}")
    text(
        150,
        top + 122,
        "time: one thread has the state at a time; the others fetch the next chunk or write the last",
    )


def decoder(top: int) -> None:
    """A packed matrix, and the stages of a layer."""
    text(20, top, "Panels: a weight matrix in memory", bold=True)
    for panel in range(3):
        for column in range(6):
            fill = DARK if (panel, column) == (1, 2) else (LIGHT, MIDDLE, LIGHT)[panel]
            box(60 + 40 * column, top + 30 + 44 * panel, 38, 40, fill, str(6 * panel + column))
        text(312, top + 54 + 44 * panel, f"panel {panel}")
    text(60, top + 22, "columns (inputs); numbers: the order in memory")
    text(20, top + 182, "A cell is 64 outputs of one column: four vectors.")
    text(20, top + 200, "A tile is up to six rows of inputs times one panel.")
    text(440, top, "Stages: tasks that two threads take", bold=True)
    stages = (("normalise", (70,), (70,)), ("u, v", (38, 38, 38), (38, 38, 38)), ("smooth v", (64,), (64,)))
    x = 500
    for name, first, second in (*stages, ("gate u", (36, 36, 36), (36, 36))):
        for thread, tasks in enumerate((first, second)):
            at = x
            for width in tasks:
                box(at, top + 40 + 34 * thread, width - 2, 28, MIDDLE)
                at += width
        x += max(sum(first), sum(second)) + 8
        text(x - 10, top + 30, name, anchor="end")
        line(f"M{x - 5} {top + 36}v76", arrow=False)
    for thread in range(2):
        text(440, top + 58 + 34 * thread, f"thread {thread}")
    text(440, top + 136, "A stage begins when all tasks of the one before are done")
    text(440, top + 154, "(dashed lines): two counters for each stage keep order.")


spans(30)
relay(260)
decoder(430)
print(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 650" font-family="sans-serif" font-size="13">'
)
print('<defs><marker id="tip" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">')
print('<path d="M0 0L6 3L0 6z" fill="#444"/></marker></defs>')
print('<rect width="960" height="650" fill="#fff"/>', *shapes, "</svg>", sep="\n")
