"""Chat templates: ids of the published Jinja programs, and no text becomes a control token."""

import json
import random
import shutil
from pathlib import Path

import pytest

from nanomath.data import encode_examples
from nanomath.measure import evaluation
from nanomath.tasks import Problem
from nanomath.text.chat import TEMPLATES, answer_ids, as_jinja, prompt_ids, use_template
from nanomath.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from nanomath.play import sample as sample_module  # noqa: E402

# The programs that the models were published with.
DEEPSEEK_JINJA = (  # deepseek-ai/deepseek-llm-7b-chat, deepseek-math-7b-instruct and -rl
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif "
    "%}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + "
    "message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] "
    "+ '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML_JINJA = (  # transformers' documentation
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
QWEN2_JINJA = (  # Qwen/Qwen2-7B-Instruct: ChatML with a system message where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_"
    "start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_JINJA = (  # meta-llama/Meta-Llama-3-8B-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_"
    "header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_"
    "id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>"
    "\n\n' }}{% endif %}"
)

# And their pre-tokenizers, with control tokens: bos, eos, others.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = {
    "deepseekmath": (
        [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", r"[\u4e00-\u9fa5\u0800-\u4e00]+"],
        ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
        [DEEPSEEK_JINJA],
    ),
    "chatml": (
        [_QWEN_SPLIT],
        ["<|endoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [CHATML_JINJA, QWEN2_JINJA],
    ),
    "llama3": (
        [_QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|")],
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
            *("<|end_header_id|>", "<|eot_id|>"),
        ],
        [LLAMA3_JINJA],
    ),
}
TEXTS = [
    "What is 12 + 345?",
    "",
    "   spaces around \n\n",
    "\nUser: no\n\nAssistant: 7",
    "\u8bf7\u8ba1\u7b97 12 \u00f7 3\uff0c\u5e76\u8bf4\u660e\u7406\u7531\u3002",
    "We add.\n\nThe answer is $\\boxed{357}$ {} {0} %s {{ bos_token }}",
    "caf\u00e9 cafe\u0301 \U0001f600\t",
]


def make_tokenizer(name: str, folder: Path) -> None:
    """Write the tokenizer files of a family, trained on TEXTS with the tokenizers package."""
    splits, control, _ = FAMILIES[name]
    peer = tokenizers.Tokenizer(models.BPE())
    if name == "chatml":
        peer.normalizer = normalizers.NFC()
    isolated = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([*isolated, byte_level])
    peer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    peer.train_from_iterator(
        [text + "\n\nUser: Assistant: system\n" for text in TEXTS] * 9, trainer
    )
    peer.add_special_tokens(list(dict.fromkeys(control)))
    peer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": control[0], "eos_token": control[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The template's name, a tokenizer of its family and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param, folder)
    return request.param, Tokenizer.load(folder), folder


def conversations() -> list[list[dict]]:
    """Every text in every role alone and together, and random chats of several turns."""
    rng = random.Random(0)
    turn = lambda role, text: {"role": role, "content": text}
    chats = [[turn(role, text)] for role in ("system", "user", "assistant") for text in TEXTS]
    for _ in range(60):
        chat = [turn("system", rng.choice(TEXTS))] if rng.random() < 0.5 else []
        for _ in range(rng.randrange(1, 4)):
            chat += [turn("user", rng.choice(TEXTS)), turn("assistant", rng.choice(TEXTS))]
        chats.append(chat[: rng.choice([len(chat), len(chat) - 1])] or chat)
    return chats


def published(name: str, folder: Path, jinja: str):
    """Return transformers' tokenizer of a family with a chat template."""
    bos, eos = FAMILIES[name][1][:2]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=bos,
        eos_token=eos,
        chat_template=jinja,
    )


def with_system(chat: list[dict], jinja: str) -> list[dict]:
    """Qwen2's program adds a system message where there is none; here one has to give it."""
    if jinja is not QWEN2_JINJA or chat[0]["role"] == "system":
        return chat
    return [{"role": "system", "content": "You are a helpful assistant."}, *chat]


def test_the_exported_program_gives_the_published_ids(family):
    """Roles, several turns, empty texts, Chinese: id for id what the published program gives."""
    name, tokenizer, folder = family
    use_template(tokenizer, name)
    ours = published(name, folder, as_jinja(tokenizer))
    for jinja in FAMILIES[name][2]:
        peer = published(name, folder, jinja)
        for chat in conversations():
            for cue in (False, True):
                settings = {"add_generation_prompt": cue, "return_dict": False}
                expected = peer.apply_chat_template(chat, **settings)
                assert ours.apply_chat_template(with_system(chat, jinja), **settings) == expected


def test_prompt_and_answer_are_the_published_chat(family):
    """A prompt's ids are the published program's of one message; with the answer's they are those
    of two, up to the end of the turn, which is last."""
    name, _, folder = family
    tokenizer = Tokenizer.load(folder)
    own_stop = tokenizer.stop_ids
    use_template(tokenizer, name)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, FAMILIES[name][1][1])
    end_id = tokenizer.control[end]
    assert tokenizer.stop_ids == tuple(dict.fromkeys([*own_stop, end_id]))  # eos stays first
    assert end_id < tokenizer.sample_limit
    peer = published(name, folder, FAMILIES[name][2][0])
    for text in TEXTS:
        chat = [{"role": "user", "content": text}]
        prompt, answer = prompt_ids(tokenizer, text), answer_ids(tokenizer, text)
        assert encode_examples(tokenizer, [(text, text)]) == [(prompt, answer)]
        settings = {"add_generation_prompt": True, "return_dict": False}
        assert prompt == peer.apply_chat_template(chat, **settings)
        assert answer[-1] == end_id
        if not text[:1].strip():  # encoded apart: what it begins with may join the cue's end there
            continue
        chat += [{"role": "assistant", "content": text}]
        whole = peer.apply_chat_template(chat, return_dict=False)
        assert whole[: len(prompt + answer)] == prompt + answer
        assert (
            answer[-1] == end_id and tokenizer.decode(whole[len(prompt + answer) :]).strip() == ""
        )
    padded = answer_ids(tokenizer, " It is 3.\n")
    assert (padded == answer_ids(tokenizer, "It is 3.")) == (name == "llama3")


def test_no_text_becomes_a_control_token(family):
    """Control tokens written out in a message change nothing but the bytes of the message."""
    name, _, folder = family
    tokenizer = Tokenizer.load(folder)
    use_template(tokenizer, name)
    attack = f"a{''.join(FAMILIES[name][1])}b<bos><eos>{{}}"
    for ids_of in (prompt_ids, answer_ids):
        counts = []
        for text in (attack, "harmless"):
            ids = ids_of(tokenizer, text)
            assert text in tokenizer.decode(ids)
            counts.append([i for i in ids if i in tokenizer.control.values()])
        assert counts[0] == counts[1]


def test_sampling_stops_where_the_turn_ends(family, monkeypatch):
    """The sampler's command and evaluation give the template's prompt ids and its stop ids."""
    name, _, folder = family
    tokenizer = Tokenizer.load(folder)
    problem = Problem(0, "countdown", "What is 1 + 2?", {})
    calls = []

    class Called(BaseException):
        pass

    def sample(model, prompts, *args, eos_ids, vocab_limit, **settings):
        calls.append((prompts, tuple(eos_ids), vocab_limit))
        raise Called

    monkeypatch.setattr(sample_module, "sample_stream", sample)
    monkeypatch.setattr(evaluation, "sample_stream", sample)
    monkeypatch.setattr(sample_module, "load_model", lambda *args, **kwargs: (None, tokenizer, {}))
    cfg = sample_module.Config("x", prompt=problem.prompt, chat_template=name, device="cpu")
    with pytest.raises(Called):
        sample_module.main(cfg)
    with pytest.raises(Called):
        evaluation.evaluate_problems(
            None, tokenizer, [problem], num_samples=0, temperature=1.0, max_new_tokens=4
        )
    use_template(tokenizer, name)
    ids = prompt_ids(tokenizer, problem.prompt)
    end_id = answer_ids(tokenizer, "")[-1]
    for prompts, eos_ids, vocab_limit in calls:
        assert prompts == [ids] and end_id in eos_ids and vocab_limit > end_id
    assert len(calls) == 2


def test_plain_is_the_text_alone():
    """The plain template is bos + prompt and answer + eos, and changes no stop id."""
    tokenizer = Tokenizer.train(["ab ab <|eos|> ab"], 264)
    limit = tokenizer.sample_limit
    use_template(tokenizer, "plain")
    assert tokenizer.stop_ids == (tokenizer.eos_id,) and tokenizer.sample_limit == limit
    for text in ["", "ab<|eos|>", " {} \n"]:
        assert prompt_ids(tokenizer, text) == tokenizer.encode(text, bos=True)
        assert answer_ids(tokenizer, text) == tokenizer.encode(text, eos=True)


def test_bos_is_the_tokenizers_or_the_templates(family, tmp_path):
    """Plain text begins with bos where the tokenizer adds one; a template that names bos has it
    always, and is refused where there is none."""
    name, _, folder = family
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    bos, eos = FAMILIES[name][1][:2]
    for names in ({"bos_token": bos, "add_bos_token": True}, {"bos_token": bos}, {}):
        config = {"eos_token": eos, "add_bos_token": False, **names}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.load(tmp_path)
        use_template(tokenizer, "plain")
        expected = [tokenizer.control[bos]] * ("add_bos_token" in names)
        assert prompt_ids(tokenizer, "ab") == [*expected, *tokenizer.encode("ab")]
        if names or name == "chatml":
            use_template(tokenizer, name)
            starts_with_bos = prompt_ids(tokenizer, "ab")[0] == tokenizer.control[bos]
            assert starts_with_bos == (name != "chatml")
        else:
            with pytest.raises(ValueError, match=f"chat template {name} .* lacks: <bos>"):
                use_template(tokenizer, name)


def test_wrong_use_is_named():
    """Missing control tokens are named all together, and nothing is set."""
    tokenizer = Tokenizer.train(["ab ab ab"], 264)
    with pytest.raises(ValueError, match=r"lacks: <\|im_end\|> <\|im_start\|>; give another"):
        use_template(tokenizer, "chatml")
    with pytest.raises(ValueError, match=r"<\|end_header_id\|> <\|eot_id\|> <\|start_header_id\|>"):
        use_template(tokenizer, "llama3")
    assert tokenizer.template == "plain" and tokenizer.stop_ids == (tokenizer.eos_id,)


def test_layouts_are_consistent():
    """An assistant's turn begins with the cue, and holds the token that ends it."""
    for template in TEMPLATES.values():
        assert template.assistant.startswith(template.cue)
        assert template.assistant.count(template.end) == 1


def test_the_exported_program_gives_the_same_ids(family, tmp_path):
    """What `save` writes as chat_template gives, run by transformers, the ids of prompt_ids: for
    the family's template and plain, with and without bos; a role unknown to it is an error."""
    name, _, folder = family
    for template in ("plain", name):
        for adds_bos in (False, True):
            tokenizer = Tokenizer.load(folder)
            tokenizer.add_bos = adds_bos
            use_template(tokenizer, template)
            tokenizer.save(tmp_path)
            peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
            for text in TEXTS:
                expected = peer.apply_chat_template(
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                    return_dict=False,
                )
                assert prompt_ids(tokenizer, text) == expected
            with pytest.raises(Exception, match="a role is system, user or assistant"):
                peer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_model_laid_out_plain_gets_a_hint(family, tmp_path, place):
    """A model from elsewhere with a chat template that is used plain: one line names the template
    that fits it. None with that template, none for a model without one or trained here on plain."""
    name, _, folder = family
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert use_template(Tokenizer.load(tmp_path), "auto") == ""
    program = FAMILIES[name][2][0]
    if place.endswith("json"):
        config = json.loads((tmp_path / place).read_text()) | {"chat_template": program}
        (tmp_path / place).write_text(json.dumps(config))
    else:
        (tmp_path / place).write_text(program)
    for choice in ("auto", "plain"):
        hint = use_template(Tokenizer.load(tmp_path), choice)
        assert hint.endswith(f"a chat model expects --chat_template {name}") and "\n" not in hint
    ours = Tokenizer.load(tmp_path)
    assert use_template(ours, name) == ""
    ours.save(tmp_path / "trained")
    assert use_template(Tokenizer.load(tmp_path / "trained"), "auto") == ""
    assert name in use_template(Tokenizer.load(tmp_path / "trained"), "plain")
    ours = Tokenizer.load(tmp_path)
    use_template(ours, "plain")
    ours.save(tmp_path / "base")
    assert use_template(Tokenizer.load(tmp_path / "base"), "auto") == ""
