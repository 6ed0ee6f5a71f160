"""Text in and out of a model: the tokenizer, its chat template, and decoding piece by piece.

Works from the files that Hugging Face tokenizers save (`tokenizer.json`,
`tokenizer_config.json`, `chat_template.jinja`) with the `tokenizers` and `jinja2` packages alone.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from qcompile.errors import ArtifactError, RecipeError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"

Message = Mapping[str, Any]
"""One turn of a chat: ``{"role": "user", "content": "..."}``, or what the template expects."""

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 5


class Tokenizer:
    """A tokenizer and its chat template.

    Args:
        backend: The tokenizer proper.
        config: The content of `tokenizer_config.json`.
        chat_template: A Jinja template in the manner of Hugging Face, if the model has one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        # A checkpoint may carry the settings of its last training batch.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_tokens = _special_tokens(config or {})
        self._chat_template = chat_template

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of an artifact.

        Raises:
            ArtifactError: If there is none, or a file of it cannot be read.
        """
        path = directory / TOKENIZER_NAME
        if not path.is_file():
            raise ArtifactError(
                f"{directory} has no {TOKENIZER_NAME}: text cannot be tokenized",
                remedy="use complete(), which takes and returns token ids, or compile a model that "
                "comes with its tokenizer",
            )
        try:
            backend = tokenizers.Tokenizer.from_str(_read(path))
        except Exception as error:
            # The package raises nothing narrower than Exception.
            raise ArtifactError(
                f"{path} cannot be read as a tokenizer: {error}",
                remedy="upgrade the package 'tokenizers', or compile the model again",
            ) from error
        config = _read_json(directory / TOKENIZER_CONFIG_NAME)
        return cls(backend, config=config, chat_template=_find_template(directory, config))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size()

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around one."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a chat up to where the model's answer begins; see `render_chat`."""
        text = self.render_chat(messages, **variables)
        # The template writes the special tokens itself.
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as the text that the model was trained on.

        Args:
            messages: The turns, oldest first.
            add_generation_prompt: Whether to open the answer of the model.
            **variables: Further variables of the template, such as ``enable_thinking=False``.

        Raises:
            ArtifactError: If the model has no chat template.
            RecipeError: If the template rejects the messages.
        """
        if self._chat_template is None:
            raise ArtifactError(
                "this model has no chat template",
                remedy="pass a plain prompt (a string) instead of messages",
            )
        if not messages:
            raise RecipeError("a chat needs at least one message")
        try:
            template = _environment().from_string(self._chat_template)
            return template.render(
                {
                    # Templates compare these with none.
                    "tools": None,
                    "documents": None,
                    **self._special_tokens,
                    **variables,
                    "messages": [dict(message) for message in messages],
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(
                f"the model's chat template is broken at line {error.lineno}: {error.message}",
                remedy="pass a plain prompt (a string) instead of messages",
            ) from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Templates compute with what the messages hold: anything may go wrong in them.
            raise RecipeError(
                f"the model's chat template rejects these messages: {error}",
                remedy='give each message a "role" and a "content" that the model knows',
            ) from error


class IncrementalDecoder:
    """Turns tokens into text as they come, never a part of a character.

    The pieces join to the text of all tokens. A token may hold only some bytes of a character;
    they are kept back until the character is whole.

    Args:
        tokenizer: Decodes the tokens.
        context: Tokens that stand before the first; some tokenizers drop a leading space.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._done = self._decode().rstrip(_REPLACEMENT)
        self._segment = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty when its character is not whole."""
        self._ids.append(token)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[len(self._done) :]
        if not piece:
            return ""
        self._done = whole
        if whole == text:
            self._forget()
        return piece

    def flush(self) -> str:
        """What was kept back, as replacement characters; ends the text."""
        return self._decode()[len(self._done) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _forget(self) -> None:
        """Keep only the tokens of the last piece, as context of the next one."""
        self._ids = self._ids[self._segment :]
        self._segment = len(self._ids)
        self._done = self._decode()


class StopMatcher:
    """Lets text through up to the first stop string, which may be cut over many pieces.

    Of several stop strings, the one that ends first counts, then the longest. So the result does
    not depend on how the text was cut, and nothing is let through that would be taken back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """The part of the text so far that no stop string can reach any more."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = self._longest_beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was kept back; the end has come, so no stop string will."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning_of_a_stop(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the answer for training masks; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    # The template comes with the model: it must not reach anything but its variables.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own filter: no HTML escapes.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... of a tokenizer config, plain or as described objects."""
    tokens = {}
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / CHAT_TEMPLATE_NAME
    if path.is_file():
        return _read(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
