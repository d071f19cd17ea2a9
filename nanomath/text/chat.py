"""Chat templates: how messages become the token ids that a chat model was trained on.

A small fixed set. The template that a checkpoint brings is a Jinja program and is never run; the
layouts below give the same ids (tests compare them with the published programs), and `as_jinja`
writes such a program of them for others:

    plain         the text alone, after bos if the tokenizer begins texts so; for base models
    deepseekmath  DeepSeek-LLM chat, DeepSeekMath Instruct and RL: "User: ...", "Assistant: ..."
    chatml        <|im_start|>role ... <|im_end|>: Qwen and others. Qwen2 and 2.5 begin with a
                  system message of their own where a chat has none: here one has to give it
    llama3        Llama 3; Llama 3.1 and later put a date into the system message, which is not
                  added. White space around each message is dropped, as their template does

Control tokens go in by id and every message through Tokenizer.encode, which produces none of them:
no text can end a turn or begin another. `use_template` sets a tokenizer's template once; training,
sampling and evaluation then take their ids from `prompt_ids` and `answer_ids`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """Layouts of a chat: {} is a message's text, <|...|> a control token, <bos> and <eos> those of
    the tokenizer, <bos?> its bos if it begins texts with one. An answer is given after `start`, the
    turns before it, and `cue`."""

    start: str
    system: str
    user: str
    assistant: str  # begins with cue
    cue: str
    end: str  # ends the assistant's turn: sampling stops there
    strip: bool = False  # drop white space around each message


def _turn(opening: str, closing: str) -> dict[str, str]:
    roles = ("system", "user", "assistant")
    return {role: opening.format(role) + "{}" + closing for role in roles}


TEMPLATES = {
    "plain": Template("<bos?>", "{}", "{}", "{}<eos>", cue="", end="<eos>"),
    "deepseekmath": Template(
        "<bos>",
        system="{}\n\n",
        user="User: {}\n\n",
        assistant="Assistant: {}<eos>",
        cue="Assistant:",
        end="<eos>",
    ),
    "chatml": Template(
        "",
        **_turn("<|im_start|>{}\n", "<|im_end|>\n"),
        cue="<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
    "llama3": Template(
        "<bos>",
        **_turn("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strip=True,
    ),
}
CHOICES = ("auto", *TEMPLATES)  # of --chat_template
_CONTROL = re.compile(r"(<\|\w+\|>|<bos\??>|<eos>)")


def use_template(tokenizer: Any, name: str) -> str:
    """Set the template of a tokenizer, and stop its samples where an answer ends.

    name auto: the one that its checkpoint was trained with, which is saved beside it, else plain.
    Return a hint where that may not be the model's, else "". Raises ValueError naming the control
    tokens that the template needs and the tokenizer lacks.
    """
    name = tokenizer.template if name == "auto" else name
    if name not in tuple(TEMPLATES):
        raise ValueError(f"chat template {name!r}; known are {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    named = {*_CONTROL.findall(template.start + template.user + template.assistant)} - {"<bos?>"}
    if lacking := {token for token in named if not _control_ids(token, tokenizer)}:
        raise ValueError(
            f"the chat template {name} needs control tokens that this tokenizer lacks: "
            f"{' '.join(sorted(lacking))}; give another --chat_template"
        )
    tokenizer.template = name
    end_ids = _control_ids(template.end, tokenizer)
    tokenizer.stop_ids = tuple(dict.fromkeys([*tokenizer.stop_ids, *end_ids]))
    if name != "plain" or not tokenizer.program:
        return ""
    cues = {other: layout.cue for other, layout in TEMPLATES.items() if layout.cue}
    marks = {other: (_CONTROL.match(cue) or [cue])[0] for other, cue in cues.items()}
    fits = [other for other, mark in marks.items() if mark in tokenizer.program]
    known = f"--chat_template {' or '.join(fits)}" if fits else "its own, which is not known here"
    return (
        "note: the model comes with a chat template, but texts are laid out plain, as for a base "
        f"model; a chat model expects {known}"
    )


def as_jinja(tokenizer: Any) -> str:
    """Return the tokenizer's template as the Jinja program that other software runs."""
    layout = TEMPLATES[tokenizer.template]
    bos, eos = (tokenizer.names[f"{kind}_token"] for kind in ("bos", "eos"))
    texts = {"<bos>": bos, "<eos>": eos, "<bos?>": bos if tokenizer.add_bos else ""}
    content = "{{ message['content']" + " | trim" * layout.strip + " }}"

    def said(text: str) -> str:
        pieces = [texts.get(piece, piece) for piece in _CONTROL.split(text)]
        shown = [json.dumps(piece, ensure_ascii=False) for piece in "".join(pieces).split("{}")]
        return content.join("{{ " + piece + " }}" for piece in shown).replace('{{ "" }}', "")

    turns = [
        f"{{% {'el' * (role != 'system')}if message['role'] == '{role}' %}}{said(text)}"
        for role, text in vars(layout).items()
        if role in ("system", "user", "assistant")
    ]
    return (
        f"{said(layout.start)}{{% for message in messages %}}{''.join(turns)}"
        "{% else %}{{ raise_exception('a role is system, user or assistant') }}{% endif %}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{said(layout.cue)}{{% endif %}}"
    )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids that a prompt is given as: the only message, with the answer's beginning."""
    layout = TEMPLATES[tokenizer.template]
    return _encode([(layout.start, ""), (layout.user, prompt), (layout.cue, "")], tokenizer)


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Return the ids that follow prompt_ids: the answer and the token that ends its turn.

    Encoded apart from the prompt, as they are sampled.
    """
    layout = TEMPLATES[tokenizer.template]
    rest = layout.assistant.removeprefix(layout.cue)
    return _encode([(rest[: rest.index(layout.end) + len(layout.end)], answer)], tokenizer)


def _encode(turns: Sequence[tuple[str, str]], tokenizer: Any) -> list[int]:
    """Encode (layout, text of its {}) one after the other; text between two control tokens goes
    through the tokenizer in one piece."""
    ids: list[int] = []
    text, strip = "", TEMPLATES[tokenizer.template].strip
    for layout, content in turns:
        content = content.strip() if strip else content
        for piece in _CONTROL.split(layout):
            if not _CONTROL.fullmatch(piece):
                text += piece.replace("{}", content)
                continue
            ids += [*tokenizer.encode(text), *_control_ids(piece, tokenizer)]
            text = ""
    return ids + tokenizer.encode(text)


def _control_ids(token: str, tokenizer: Any) -> list[int]:
    if token == "<bos?>":
        return tokenizer.encode("", bos=True)
    own = {"<bos>": tokenizer.bos_id, "<eos>": tokenizer.eos_id}
    token_id = own[token] if token in own else tokenizer.control.get(token)
    return [] if token_id is None else [token_id]
