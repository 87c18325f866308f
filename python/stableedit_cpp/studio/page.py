"""The page: where things are on it, and which event asks the desk for what."""

from __future__ import annotations

import gradio as gr

from stableedit_cpp.studio.charts import CHART_CSS
from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.events import Events
from stableedit_cpp.studio.rows import STATES
from stableedit_cpp.studio.shipping import KINDS, exports_of
from stableedit_cpp.studio.words import WORDS_CSS

__all__ = ["CSS", "HEADERS", "make_page", "make_theme"]

HEADERS = ["prompt", "answer", "state", "since", "turn", "id"]
_FILES = [".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".parquet", ".gz"]
_TICK = 1.0  # seconds between two looks at the worker

CSS = (
    CHART_CSS
    + WORDS_CSS
    + """
.gradio-container { width: 100%; max-width: 76rem !important; margin: 0 auto; }
.beside { align-self: end; }
#edits, #turns { --font-mono: var(--font); }
"""
)


def make_theme() -> gr.themes.Base:
    """Fonts of the system: the page loads nothing from elsewhere."""
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gr.themes.Default(font=fonts[0], font_mono=fonts[1], primary_hue="blue", neutral_hue="slate")


def make_page(desk: Desk) -> gr.Blocks:
    """The page over a desk; any number of tabs may show it. Every event is also an endpoint of its API."""
    events = Events(desk)
    with gr.Blocks(title=f"{desk.view.directory} · StableEdit studio", analytics_enabled=False) as page:
        for call in (events.status, events.job, events.rollback):  # for programs; the page asks otherwise
            gr.api(call, api_name=call.__name__)
        seen = gr.State(0)
        heading = gr.HTML()
        with gr.Group():
            work = gr.HTML(padding=True)
        stop = gr.Button("Stop after this turn", size="sm", visible=False)
        with gr.Tab("Edit"):
            _edit_tab(events)
        with gr.Tab("Ask"):
            asked = _ask_tab(events)
        with gr.Tab("Edits"):
            table, shown, text, state, chosen = _table_tab(events)
        with gr.Tab("History"):
            turns = _history_tab(events)
        with gr.Tab("Charts"):
            charts = gr.HTML(padding=True)
        with gr.Tab("Export"):
            _export_tab(events, desk)

        quiet = {"show_progress": "hidden"}
        stop.click(events.stop, None, None, api_name="stop", **quiet)
        views = [seen, heading, table, shown, turns, charts]
        timer = gr.Timer(_TICK)
        timer.tick(events.work, None, [work, stop], queue=False, api_visibility="private", **quiet)
        timer.tick(events.refresh, [seen, text, state], views, queue=False, api_visibility="private", **quiet)
        for change in (text.change, state.change):
            change(events.table, [text, state], [table, shown], api_name=False, **quiet)
        table.select(events.choose, [text, state], [chosen, asked], api_visibility="private", **quiet)
        page.load(events.work, None, [work, stop], api_visibility="private", **quiet)
    page.queue(default_concurrency_limit=None)
    return page


def _edit_tab(events: Events) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", placeholder="The capital of Australia is")
            answer = gr.Textbox(label="New answer", placeholder="Canberra")
            with gr.Accordion("More", open=False):
                subject = gr.Textbox(label="Subject", info="as the prompt has it; MEMIT and AlphaEdit need it")
                paraphrases = gr.Textbox(label="Paraphrases, one a line", lines=3)
            add = gr.Button("Edit", variant="primary")
        with gr.Column():
            file = gr.File(label="Or a file of edits: JSON, CSV, Excel, Parquet", file_types=_FILES, height=160)
            drop = gr.Button("Edit the file")
    message = gr.Markdown()
    add.click(events.add_fact, [prompt, answer, subject, paraphrases], message, api_name="add_fact")
    answer.submit(events.add_fact, [prompt, answer, subject, paraphrases], message, api_visibility="private")
    drop.click(events.add_file, file, message, api_name="add_file")


def _ask_tab(events: Events) -> gr.Textbox:
    prompt = gr.Textbox(label="Prompt", placeholder="anything; also in the middle of a stream of edits")
    with gr.Accordion("More", open=False):
        room = gr.Slider(1, 200, 24, step=1, label="New tokens at most")
    ask = gr.Button("Ask both", variant="primary")
    with gr.Row():
        edited = gr.Textbox(label="Edited model", lines=4, interactive=False)
        unedited = gr.Textbox(label="Unedited model", lines=4, interactive=False)
    for event, named in ((ask.click, {"api_name": "ask"}), (prompt.submit, {"api_visibility": "private"})):
        event(events.ask, [prompt, room], [edited, unedited], **named)
    return prompt


def _table_tab(events: Events) -> tuple[gr.Dataframe, gr.Markdown, gr.Textbox, gr.Dropdown, gr.Textbox]:
    with gr.Row():
        text = gr.Textbox(label="Find", placeholder="words of id, prompt or answer")
        state = gr.Dropdown(["all", *STATES], value="all", label="State")
    shown = gr.Markdown()
    table = gr.Dataframe(
        headers=HEADERS,
        datatype=["str", "str", "str", "str", "number", "str"],
        interactive=False,
        wrap=True,
        max_height=420,
        column_widths=["270px", "160px", "120px", "190px", "60px", "140px"],
        label="Edits, the newest first; choose one to revert it",
        elem_id="edits",
    )
    with gr.Row():
        audit = gr.Button("Audit: what holds?")
        repair = gr.Button("Repair what is forgotten", variant="primary")
    with gr.Row():
        chosen = gr.Textbox(label="Id of the edit", placeholder="choose a row", scale=3)
        revert = gr.Button("Revert it", variant="stop", scale=1, elem_classes="beside")
    message = gr.Markdown()
    audit.click(events.audit, None, message, api_name="audit")
    repair.click(events.repair, None, message, api_name="repair")
    revert.click(events.revert, chosen, message, api_name="revert")
    return table, shown, text, state, chosen


def _history_tab(events: Events) -> gr.Dataframe:
    turns = gr.Dataframe(
        headers=["turn", "when", "what"],
        datatype=["number", "str", "str"],
        interactive=False,
        wrap=True,
        max_height=420,
        column_widths=["60px", "170px", "700px"],
        label="The turns in the model, the newest first; choose the one to go back to",
        elem_id="turns",
    )
    with gr.Row():
        turn = gr.Textbox(label="Turn", placeholder="choose a row", scale=3)
        back = gr.Button("Roll back to it ...", scale=1, elem_classes="beside")
    turns.select(events.choose_turn, None, turn, api_visibility="private", show_progress="hidden")
    with gr.Group(visible=False) as asking:
        question = gr.Markdown(padding=True)
        with gr.Row():
            sure = gr.Button("Roll back", variant="stop")
            keep = gr.Button("Keep everything")
    message = gr.Markdown()
    back.click(events.ask_whether, turn, [asking, question], api_visibility="private")
    keep.click(lambda: gr.Group(visible=False), None, asking, api_visibility="private")
    sure.click(events.rollback, turn, message, api_visibility="private")
    sure.click(lambda: gr.Group(visible=False), None, asking, api_visibility="private")
    return turns


def _export_tab(events: Events, desk: Desk) -> None:
    kinds = [(f"{kind}: {what}", kind) for kind, what in KINDS.items()]
    kind = gr.Radio(kinds, value="delta", label=f"Into {exports_of(desk.session.directory)}")
    export = gr.Button("Export", variant="primary")
    message = gr.Markdown()
    export.click(events.export, kind, message, api_name="export")
