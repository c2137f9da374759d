"""The page: a Gradio chat about images, with the same models and queue as the API."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount
from starlette.types import Scope

from llava_ray.deployments.chat_page.answers import Answers
from llava_ray.deployments.chat_page.chat import Parameters, export, last_question, pieces_of, to_user_messages
from llava_ray.deployments.chat_page.events import PageEvents
from llava_ray.deployments.chat_page.examples import read_examples
from llava_ray.deployments.chat_page.guard import PageMiddleware
from llava_ray.deployments.chat_page.log import ConversationLog, LogKind
from llava_ray.deployments.chat_page.style import CSS, DOWNLOAD, HEAD
from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.refusal import RefusalError

_History = list[dict[str, Any]]

_MAX_SESSIONS = 256  # Gradio keeps each one's last chat in memory
_MAX_QUEUED_EVENTS = 512

_VOTES: dict[str, LogKind] = {"Upvote": "upvote", "Downvote": "downvote", "Flag": "flag"}
_TERMS = (
    "The model may produce inaccurate or offensive output: verify its answers. Upload only images "
    "that you are allowed to share. Enter sends, Shift+Enter starts a new line, Esc stops the answer."
)


def mount_page(app: FastAPI, front: Front) -> None:
    """Mount the page at the root of ``app``. With API keys, a key's name and the key are its login."""
    page = ChatPage(front)
    blocks = page.build()
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        root_path=front.settings.page_root_path or None,
        auth=page.answers.log_in if front.guard.keys else None,
        auth_message="Log in with the name of your API key, and the key.",
        max_file_size=front.settings.max_image_bytes,
        theme=gr.themes.Soft(
            font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=CSS,
        head=HEAD,
        footer_links=[],
        run_history=False,  # conversations are not stored in the browser either
        show_error=True,
    )
    gradio_app = next(route.app for route in app.routes if isinstance(route, Mount))
    assert isinstance(gradio_app, gr.routes.App)
    inputs = {number: [block.get_block_name() for block in fn.inputs] for number, fn in blocks.fns.items()}

    def find_user(cookies: Mapping[str, str]) -> str | None:
        """Return the user of one of Gradio's two login cookies, as Gradio itself does."""
        names = (f"access-token-{gradio_app.cookie_id}", f"access-token-unsecure-{gradio_app.cookie_id}")
        token = next((cookies[name] for name in names if cookies.get(name)), "")
        return gradio_app.tokens.get(token)

    def drop_session(name: str) -> None:
        """Make Gradio cancel a session's events and drop their results, which it would keep for ever."""
        queue = blocks._queue
        queue.pending_messages_per_session.pop(name, None)
        queue.pending_event_ids_session.pop(name, None)
        cleanups.add(cleanup := asyncio.ensure_future(queue.clean_events(session_hash=name)))
        cleanup.add_done_callback(cleanups.discard)

    cleanups: set[asyncio.Future[None]] = set()
    app.add_middleware(PageMiddleware, front, find_user, drop_session, PageEvents(inputs, page.uploads))


class ChatPage:
    """The page's layout and event handlers."""

    def __init__(self, front: Front) -> None:
        """Initialise the page for the models of ``front``."""
        self.front = front
        self.settings = front.settings
        self.uploads = Uploads(
            Path(gr.utils.get_upload_folder()), front.settings.max_images, front.settings.max_body_bytes
        )
        self.answers = Answers(front, self.uploads)
        self.examples = read_examples(front.settings.page_examples)
        self.names = [name for source in front.gateway.sources for name in source.names]
        folder = front.settings.page_log_dir
        self.log = ConversationLog(Path(folder), front.settings.page_log_days) if folder else None

    def build(self) -> gr.Blocks:
        """Build the page."""
        with gr.Blocks(title=self.settings.page_title, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            self.lay_out()
            self.connect(blocks)
        # Gradio checks the location of files only for an app that its own server has started.
        blocks.has_launched = True
        blocks.state_session_capacity = _MAX_SESSIONS
        return blocks.queue(api_open=False, default_concurrency_limit=None, max_size=_MAX_QUEUED_EVENTS)

    def lay_out(self) -> None:
        """Create the components, in tab order."""
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# {self.settings.page_title}", elem_id="title")
            self.model = gr.Dropdown(
                self.names,
                value=self.names[0],
                label="Model",
                elem_id="model",
                show_label=False,
                container=False,
                min_width=160,
                interactive=True,
            )
        self.chat = gr.Chatbot(
            elem_id="chat",
            label="Conversation",
            show_label=False,
            placeholder="Ask a question, with or without images.",
            examples=self.examples or None,
            buttons=["copy"],
            feedback_options=None,
        )
        self.status = gr.HTML(elem_id="status", padding=False)
        self.box = gr.MultimodalTextbox(
            elem_id="box",
            label="Your question",
            show_label=False,
            placeholder="Ask about images: drop, paste or attach them",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            autofocus=True,
            max_plain_text_length=self.settings.max_text_chars,
        )
        with gr.Row(elem_id="actions"):
            self.stop = gr.Button("Stop", elem_id="stop", interactive=False, variant="stop", size="sm")
            self.again = gr.Button("Regenerate", elem_id="again", interactive=False, size="sm")
            self.edit = gr.Button("Edit", elem_id="edit", interactive=False, size="sm")
            self.clear = gr.Button("Clear", elem_id="clear", size="sm")
            self.votes = [
                gr.Button(label, elem_id=vote, interactive=False, size="sm") for label, vote in _VOTES.items()
            ]
            self.export = gr.Button("Export", elem_id="export", interactive=False, size="sm")
        self.written = gr.Textbox(visible=False)
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            self.temperature = gr.Slider(0, 1, 0.2, step=0.1, label="Temperature", elem_id="temperature")
            self.top_p = gr.Slider(0.05, 1, 0.7, step=0.05, label="Top P", elem_id="top_p")
            self.max_tokens = gr.Slider(1, 1024, 512, step=1, label="Max output tokens", elem_id="max_tokens")
        self.agreed = gr.Checkbox(
            False,
            label=f"Store this conversation and its images for {self.settings.page_log_days} days to improve the model",
            elem_id="agreed",
            visible=self.log is not None,
        )
        gr.Markdown(_TERMS)

    def connect(self, blocks: gr.Blocks) -> None:
        """Connect the components' events to their handlers."""
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [self.model, self.temperature, self.top_p, self.max_tokens, self.agreed]
        buttons = [self.stop, self.again, self.edit, self.export, *self.votes]
        answer: dict[str, Any] = {
            "fn": self.answer,
            "inputs": [self.chat, *settings],
            "outputs": [self.chat, self.status, *buttons],
            "concurrency_limit": None,  # the replicas' queue is the only one
            **hidden,
        }
        blocks.load(self.choose, None, self.model, **hidden)
        self.box.submit(self.ask, [self.box, self.chat], [self.box, self.chat], **hidden).success(**answer)
        self.chat.example_select(self.ask_example, self.chat, self.chat, **hidden).success(**answer)
        self.again.click(self.undo, self.chat, self.chat, **hidden).success(**answer)
        self.stop.click(self.end, None, None, **hidden)
        self.edit.click(self.edit_last, self.chat, [self.chat, self.box, self.status, *buttons], **hidden)
        gr.on(
            [self.clear.click, self.chat.clear],
            self.new_chat,
            None,
            [self.chat, self.box, self.status, *buttons],
            **hidden,
        )
        for button, vote in zip(self.votes, _VOTES.values(), strict=True):
            button.click(self.voting(vote), [self.chat, *settings], [self.status, *self.votes], **hidden)
        self.export.click(self.log_turn, [self.chat, *settings], self.written, **hidden).success(
            None, self.written, None, js=DOWNLOAD, **hidden
        )

    async def choose(self, request: gr.Request) -> Any:
        """Select the model of a link's query: ``?model=NAME``."""
        wanted = request.query_params.get("model", self.names[0])
        if wanted not in self.names:
            gr.Warning(f"There is no model {wanted[:100]!r}; available: {', '.join(self.names)}")
            wanted = self.names[0]
        return gr.Dropdown(value=wanted)

    async def ask(self, box: dict[str, Any], history: _History) -> tuple[Any, _History]:
        """Move the question from the box to the chat."""
        messages = to_user_messages(box)
        if not messages:
            raise gr.Error("Type a question or attach an image first.", print_exception=False)
        return {"text": "", "files": []}, [*history, *messages]

    async def ask_example(self, history: _History, example: gr.SelectData) -> _History:
        """Add one of the examples to the chat."""
        if not 0 <= example.index < len(self.examples):
            raise gr.Error("There is no such example.", print_exception=False)
        chosen = self.examples[example.index]
        # The chatbot has replaced the paths by Gradio's file objects in the upload folder.
        files = [file["path"] if isinstance(file, dict) else file for file in chosen.get("files", ())]
        return [*history, *to_user_messages({"text": chosen["text"], "files": files})]

    async def undo(self, history: _History) -> _History:
        """Remove the last answer."""
        while history and history[-1]["role"] == "assistant":
            history = history[:-1]
        return history

    async def answer(
        self,
        history: _History,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        agreed: bool,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Stream the answer; show a failure under the chat, where the question can be repeated."""
        parameters = Parameters(model, temperature, top_p, int(max_tokens))
        chat, summary = history, ""
        yield (history, "…", *_buttons_while(writing=True))
        try:
            session = str(request.session_hash)
            async for chat, metrics in self.answers.write(history, parameters, session, _scope_of(request)):
                summary = str(metrics)
                yield (chat, escape(summary), *[gr.skip()] * (4 + len(_VOTES)))
        except RefusalError as error:
            yield (chat, _failure(error), *_buttons_while(answered=bool(history)))
            return
        await self.keep("chat", agreed, chat, parameters, summary)
        yield (chat, escape(summary), *_buttons_while(answered=True, complete=len(chat) > len(history)))

    async def end(self, request: gr.Request) -> None:
        """Stop the running answer."""
        self.answers.stop(str(request.session_hash))

    async def edit_last(self, history: _History) -> tuple[Any, ...]:
        """Move the last question with its images from the chat back to the box."""
        begin = last_question(history)
        pieces = [piece for message in history[begin:] if message["role"] == "user" for piece in pieces_of(message)]
        box = {
            "text": "\n".join(piece for piece in pieces if isinstance(piece, str)),
            "files": [piece["path"] for piece in pieces if not isinstance(piece, str)],
        }
        return (history[:begin], box, "", *_buttons_while(answered=begin > 0, complete=begin > 0))

    async def new_chat(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop the running answer and clear the chat."""
        self.answers.stop(str(request.session_hash))
        return ([], {"text": "", "files": []}, "", *_buttons_while())

    def voting(self, vote: LogKind) -> Any:
        """Return the handler of a vote's button."""

        async def count(
            history: _History,
            model: str,
            temperature: float,
            top_p: float,
            max_tokens: float,
            agreed: bool,
            request: gr.Request,
        ) -> tuple[Any, ...]:
            try:
                self.answers.admit(_scope_of(request))
            except RefusalError as error:
                return (_failure(error), *[gr.skip()] * len(_VOTES))
            self.front.metrics.votes.labels(model, vote).inc()
            await self.keep(vote, agreed, history, Parameters(model, temperature, top_p, int(max_tokens)))
            suffix = " with the conversation" if agreed and self.log else ""
            return (f"Thank you: your {vote} was counted{suffix}.", *[gr.Button(interactive=False)] * len(_VOTES))

        return count

    async def log_turn(
        self,
        history: _History,
        model: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
        agreed: bool,
        request: gr.Request,
    ) -> str:
        """Return the chat as the text of a file; raise an error if no request could hold it."""
        del agreed
        parameters = Parameters(model, temperature, top_p, int(max_tokens))
        try:
            self.answers.admit(_scope_of(request))
            with self.answers.holding(history, _scope_of(request)):
                return await asyncio.to_thread(export, history, parameters, self.uploads)
        except RefusalError as error:
            raise gr.Error(error.refused.message, print_exception=False) from None

    async def keep(
        self, kind: LogKind, agreed: bool, history: _History, parameters: Parameters, figures: str = ""
    ) -> None:
        """Log the chat, if there is a log and the user agreed."""
        if self.log is None or not agreed:
            return
        try:
            await asyncio.to_thread(self.log.write, kind, history, parameters, self.uploads, figures)
        except OSError as error:
            gr.Warning(f"The conversation could not be stored: {error.strerror}")
        except RefusalError as error:
            gr.Warning(f"The conversation could not be stored: {error.refused.message}")


def _scope_of(request: gr.Request) -> Scope:
    """Return the ASGI scope of an event's HTTP request, with its user."""
    assert request.request is not None
    return request.request.scope


def _buttons_while(*, writing: bool = False, answered: bool = False, complete: bool = False) -> list[Any]:
    """Return the state of the buttons stop, regenerate, edit, export and votes."""
    can = [writing, answered, answered, answered, *[complete] * len(_VOTES)]
    return [gr.Button(interactive=one) for one in can]


def _failure(error: RefusalError) -> str:
    """Format an error for display and for screen readers."""
    return f'<span class="failed" role="alert">{escape(error.refused.message)}</span>'
