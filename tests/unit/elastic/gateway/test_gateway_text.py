"""Tokenizer, incremental detokenisation and stop strings: a stream's pieces add up to the text, whatever the cuts."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.gateway.text import MAX_PENDING_TOKENS, REPLACEMENT, Detokenizer, StopMatcher
from elastic.gateway.tokenizer import Tokenizer
from membership.base.errors import ModelError, RequestError
from tests.support.tiny_tokenizer import write_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_encode_puts_bos_in_front_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world")
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "hello world"


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids) == "<user>hello\n<assistant>"


def test_a_refusal_of_the_template_is_the_clients_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tools here"):
        tokenizer.encode_chat([{"role": "tool", "content": "x"}])
    plain = Tokenizer(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "x"}])


def test_chat_template_in_a_file_and_among_several(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode_chat([])) == "default"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode_chat([])) == "file "


def test_missing_or_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        Tokenizer(tmp_path)


def test_token_bytes(tokenizer: Tokenizer) -> None:
    text = "the fox 😀 wörld"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(token) for token in ids[1:]).decode() == text
    assert tokenizer.token_bytes(0) == b"<s>"


@given(st.text(max_size=20).filter(lambda text: "s>" not in text))  # a special token is no text
def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)[1:]
    pieces = streamed(tokenizer, ids, prompt=tokenizer.encode("say: "))
    assert "".join(pieces) == text
    assert pieces[-1] == "" or text.endswith(REPLACEMENT), "nothing is left for the end"


@given(st.lists(st.integers(0, 300), max_size=2 * MAX_PENDING_TOKENS))
def test_any_tokens_stream_to_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_endless_garbage_is_not_held_for_ever(tokenizer: Tokenizer) -> None:
    garbage = next(token for token in range(300) if tokenizer.token_bytes(token) == b"\x80")
    pieces = streamed(tokenizer, [garbage] * 40)
    assert any(pieces[:MAX_PENDING_TOKENS])
    assert set("".join(pieces)) == {"\ufffd"}


def matched(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        fresh, hit = matcher.push(piece)
        out += fresh
        if hit:
            return out, True
    return out + matcher.flush(), False


def test_stop_string_over_several_pieces() -> None:
    assert matched(["END"], ["abE", "N", "Dxyz"]) == ("ab", True)
    assert matched(["END"], ["abE", "N", "x"]) == ("abENx", False)
    assert matched(["END"], ["abEN"]) == ("abEN", False)
    assert matched(["abc", "b"], ["abc"]) == ("a", True), "complete first wins, whatever the cuts"
    assert matched(["aab"], ["aa", "ab"]) == ("a", True)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\n", "User:"])
    assert matcher.push("hello U") == ("hello ", False)
    assert matcher.push("nited\n") == ("United", False)
    assert matcher.push("x") == ("\nx", False)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("abc", max_size=20),
    st.lists(st.integers(0, 20)),
)
def test_cuts_do_not_matter(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert matched(stops, pieces) == matched(stops, list(text)) == matched(stops, [text])


def test_torch_is_never_imported_by_the_tokenizer(directory: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from elastic.gateway.tokenizer import Tokenizer;"
        f"t = Tokenizer(Path({str(directory)!r})); t.encode_chat([{{'role': 'user', 'content': 'x'}}]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
