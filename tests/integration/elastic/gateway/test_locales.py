"""A checkpoint's files are read as UTF-8, whatever the locale of the process that reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic.gateway.tokenizer import Tokenizer
from tests.support.wild_tokenizers import write_wild_tokenizer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("locale", ["C", "de_DE.ISO-8859-1"])
def test_files_are_utf_8_in_every_locale(tmp_path: Path, locale: str) -> None:
    write_wild_tokenizer(tmp_path, "deepseek")
    (tmp_path / "chat_template.jinja").write_text("ÄÖ日{{ eos_token }}{{ messages[0].content }}", encoding="utf-8")
    program = (
        "import sys, locale; from pathlib import Path; from elastic.gateway.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer(Path(sys.argv[1]))\n"
        "ids = tokenizer.encode_chat([{'role': 'user', 'content': '\\xfc'}])\n"
        "print(locale.getpreferredencoding(False), ascii(tokenizer.decode(ids)), *ids)"
    )
    subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE.ISO-8859-1")], check=True, timeout=60
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=plain | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LOCPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    encoding, text, *ids = done.stdout.split()
    assert encoding == ("ANSI_X3.4-1968" if locale == "C" else "ISO-8859-1")
    assert (text, [*map(int, ids)]) == (
        ascii("ÄÖ日ü"), Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "ü"}]),
    )  # fmt: skip
