"""A conversation, or a text, that keeps what it has computed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.arguments import TEXTS, count, is_ids, place
from puna.chat_template import answer_message, plain_tools, with_pictures
from puna.errors import InvalidRequest, OutOfMemory
from puna.options import Request
from puna.running import BuiltPrompt, Deadline, prefill, read
from puna.session_notes import Notes, read_notes, write_notes
from puna.types import Chunk, Completion

if TYPE_CHECKING:
    from puna import _core
    from puna.engine import Engine, Messages, Prompt

# Branches computed as one batch, where memory allows it.
_BRANCHES = 64


class Session:
    """A conversation with one model, or a text that it has read. Made by `Engine.session`.

    The KV cache of everything so far is kept, so a turn computes only its own tokens. A session
    does one thing at a time; fork() makes a second one that continues from here, branch() asks
    many questions at once.

    Attributes:
        messages: What was said, as `Engine.chat` takes it; may be edited between turns.
        tools: JSON schemas of functions that the model may call, for the whole conversation. What
            a call gave back is a message, such as {"role": "ipython", "content": "7"}.
    """

    def __init__(
        self,
        engine: Engine,
        session: _core.Session,
        path: Path | None = None,
        *,
        readonly: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Wraps a core session, opened from `path` if that is given; use `Engine.session`."""
        self._engine = engine
        self._session = session
        self._path = path
        self._readonly = readonly
        self._lock = threading.Lock()
        self._reads = False  # holds a text
        self._closed = False
        self.messages: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] = plain_tools(tools) or []
        if path is not None:
            try:
                self._take_notes(read_notes(path), tools is None)
            except BaseException:
                session.close()  # and with it the directory, for others to open
                raise

    def _take_notes(self, notes: Notes, with_tools: bool) -> None:
        self.messages, self._reads = notes.messages, notes.reads
        if with_tools:
            self.tools = notes.tools
        if notes.pending and notes.computed == self._session.length:
            self._session.append(notes.pending)

    # --- texts -----------------------------------------------------------------------------------

    def append(self, text: Prompt | Iterator[Prompt], *, allow_special: bool = False) -> None:
        """Reads text, or token ids, after all that the session holds, and computes it.

        An iterator of pieces of text (or of arrays of ids) is computed while it arrives, so that
        ten million tokens are never in Python at once.

        The first text gets the begin-of-text token in front; ids are taken as they are. Of a
        session that was opened from a path, whole chunks are durable when this returns. With
        Ctrl-C, what was read so far stays computed, and the next call goes on from there.

        Raises:
            InvalidRequest: The session holds a conversation, or the prompt makes no sense.
            ContextOverflow: The text is longer than the context has room.
        """
        with self._busy():
            if isinstance(text, Iterator):
                self._require_text()
                self._reads = True
                first = self._session.length == 0
                pieces = self._engine._arriving(text, allow_special, first)
                read(self._session, pieces, Deadline(None))
            else:
                self._append(self._session, text, allow_special)
                self._reads = True
            prefill(self._session, Deadline(None), self._engine._progress)
            if self._path is not None:
                self._session.flush()

    def truncate(self, length: int) -> None:
        """Forgets the text from token `length` on.

        What the session computed of the rest is kept as far as it can be restored exactly: to any
        place among the last few hundred tokens, to page boundaries (256 tokens) in the current
        attention chunk, and to chunk boundaries before it. The tokens from there to `length` are
        computed again when they are needed.

        A directory that the session was opened from goes along with the next chunk, or save(). To
        cut a session on disk that does not open any more, see `Engine.truncate`. Of a conversation,
        drop messages: `del session.messages[2:]`.

        Raises:
            InvalidRequest: The session holds a conversation, or has no such length.
        """
        with self._busy():
            self._require_text()
            self._session.truncate(count("length", length))
            if self._path is None or self._readonly:
                return
            if read_notes(self._path).pending:
                # They were of the text that is forgotten.
                write_notes(self._path, Notes([], reads=True))

    def branch(
        self, prompts: Sequence[Prompt], *, allow_special: bool = False, **options: Any
    ) -> list[Completion]:
        """Continues the session with each of the prompts, as if each were the only one.

        The session itself stays as it is. All branches read the keys and values that they share
        together, so that many questions about one long text cost little more than one.

        Args:
            prompts: What each branch adds: questions if the session is a conversation, else text
                or token ids, as for `append`.
            allow_special: Read special tokens written in a text, such as "<|eot|>", as such.
            **options: As for `Engine.generate`.

        Returns:
            A Completion per prompt; with n > 1, n per prompt, in order.
        """
        request = self._engine._request("branch", options, ("allow_special",))
        if not isinstance(prompts, Sequence) or isinstance(prompts, TEXTS) or is_ids(prompts):
            raise InvalidRequest(
                f"prompts is {prompts!r:.80}; it must be a list of texts, or of lists of token ids",
                param="prompts",
            )
        deadline = Deadline(request.timeout)
        results: list[Completion] = []
        done = 0
        with self._busy():
            size = _BRANCHES
            while len(prompts) > done:
                try:
                    results += self._branch(
                        prompts[done : done + size], allow_special, request, deadline
                    )
                except OutOfMemory:
                    # Every branch writes on pages of its own.
                    if size == 1:
                        raise
                    size = (size + 1) // 2
                else:
                    done += size
        return results

    def _branch(
        self, prompts: Sequence[Prompt], allow_special: bool, request: Request, deadline: Deadline
    ) -> list[Completion]:
        """Some branches as one batch."""
        sessions = []
        for prompt in prompts:
            session = self._session.fork()
            if self.messages:
                built = self._question(prompt)
                session.prompt(built.tokens, built.pixels, reuse=False)
            else:
                self._append(session, prompt, allow_special)
            sessions.append(session)
        return self._engine._complete(sessions, request, deadline)

    def _append(self, session: _core.Session, text: Prompt, allow_special: bool) -> None:
        self._require_text()
        built = self._engine._raw_prompt(text, allow_special, None, first=session.length == 0)
        session.append(built.tokens)

    def _require_text(self) -> None:
        if self.messages:
            raise InvalidRequest(
                "this session holds a conversation: go on with chat(), or open another session"
            )

    def _question(self, prompt: Prompt) -> BuiltPrompt:
        if not isinstance(prompt, str):
            raise InvalidRequest(
                "this session holds a conversation: its branches are questions, not token ids",
                param="prompts",
            )
        return self._rendered([{"role": "user", "content": prompt}])

    def _rendered(self, added: list[dict[str, Any]]) -> BuiltPrompt:
        """The whole conversation with some messages more."""
        return self._engine._chat_prompt([*self.messages, *added], None, self.tools)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise InvalidRequest(
                "this session is in the middle of an answer: finish or close() that stream first, "
                "or fork() before it"
            )
        try:
            self._require_open()
            yield
        finally:
            self._lock.release()

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidRequest("this session was closed; open another with Engine.session()")

    # --- conversations ---------------------------------------------------------------------------

    def chat(
        self, message: Messages, *, images: Sequence[Any] | None = None, **options: Any
    ) -> Completion:
        """Says something and returns the answer; both become part of the conversation.

        Args:
            message: A string (a user message) or messages to add.
            images: Pictures that go with it.
            **options: As for `Engine.generate`, without n.
        """
        chunks = list(self._turn("chat", message, images, options))
        last = chunks[-1]
        assert last.finish_reason and last.usage and last.timings and last.seed is not None
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            finish_reason=last.finish_reason,
            stop=last.stop,
            usage=last.usage,
            logprobs=tuple(item for chunk in chunks for item in chunk.logprobs),
            seed=last.seed,
            timings=last.timings,
            attention=last.attention,
        )

    def stream(
        self, message: Messages, *, images: Sequence[Any] | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """As `chat`, piece by piece.

        If the loop is left early, what was said so far stays; if the turn fails before the first
        word, the conversation is as it was.
        """
        return self._turn("stream", message, images, options)

    def _turn(
        self,
        function: str,
        message: Messages,
        images: Sequence[Any] | None,
        options: Mapping[str, Any],
    ) -> Iterator[Chunk]:
        request = self._engine._request(function, options, ("images",))
        if request.n != 1:
            raise InvalidRequest(f"n is {request.n}; a session has one answer", param="n")
        self._require_open()
        if self._reads:
            raise InvalidRequest(
                "this session holds a text, not a conversation: ask with branch(), or open another"
            )
        # Decoded once: the conversation is rendered again at every turn.
        added = with_pictures(message, images)
        prompt = self._rendered(added)
        return self._run(added, prompt, len(self.messages), request)

    def _run(
        self, added: list[dict[str, Any]], prompt: BuiltPrompt, before: int, request: Request
    ) -> Iterator[Chunk]:
        said: list[str] = []
        first: list[int] = []  # ids
        with self._busy():
            try:
                if len(self.messages) != before:  # another turn came since the call
                    prompt = self._rendered(added)
                self._session.prompt(prompt.tokens, prompt.pixels, reuse=True)
                deadline = Deadline(request.timeout)
                for chunk in self._engine._chunks(self._session, request, deadline):
                    said.append(chunk.text)
                    first += chunk.tokens[: 2 - len(first)]
                    yield chunk
            finally:
                if said:
                    special = self._engine.tokenizer.special_tokens
                    marks = [special.get("<|python_start|>"), special.get("<|python_end|>")]
                    answer = answer_message("".join(said), calls=first == marks)
                    self.messages += [*added, answer]

    # --- the rest --------------------------------------------------------------------------------

    def fork(self) -> Session:
        """A second conversation that continues from here; what was computed is shared."""
        self._require_open()
        other = Session(self._engine, self._session.fork())
        other._reads = self._reads
        other.messages, other.tools = list(self.messages), list(self.tools)
        return other

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Writes the session to a directory, from which `Engine.session` opens it again.

        What is there already of the same text is not written again, and what other saved sessions
        share with this one takes no more room on the same file system.

        Args:
            path: The directory; None is where the session was opened.

        Raises:
            SessionMismatch: There is another model's session at `path`, one in use, or files that
                are no session's.
            InvalidRequest: `messages` holds what is no message.
            OSError: It cannot be written; what was saved there before is still good.
        """
        self._require_open()
        if path is None and self._path is None:
            raise InvalidRequest("this session was not opened from a path: give one", param="path")
        directory = self._path if path is None else place("path", path)
        assert directory is not None
        with self._busy():
            # As they were edited: pictures decoded, and what is no message refused first.
            messages = with_pictures(self.messages) if self.messages else []
            self._session.save(os.fspath(directory))
            computed = len(self) - self._session.pending()
            pending = self._session.tokens(computed)
            notes = Notes(messages, self._reads, computed, pending, self.tools)
            write_notes(directory, notes)

    def close(self) -> None:
        """Frees what the session holds and lets others write where it was opened.

        What was not saved is lost, and the session can do nothing more. One that is simply dropped
        is closed when its engine is next asked for something.
        """
        if self._closed:
            return
        with self._busy():
            self._closed = True
            self._session.close()
            self.messages, self.tools, self._reads, self._path = [], [], False, None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokens(self) -> list[int]:
        """The ids held, in order."""
        return self._session.tokens()

    def __len__(self) -> int:
        """Tokens held."""
        return self._session.length
