"""`helm test`: one streamed answer of the served model, through the Service. Standard library only. serves.py URL"""

import json
import ssl
import sys
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

KEYS = Path("/etc/elastic-ep/api-keys/keys")  # NAME:KEY and perhaps limits, one a line
TIMEOUT_S = 120


def connection(url):
    if url.scheme == "http":
        return HTTPConnection(url.netloc, timeout=TIMEOUT_S)
    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is of the name that clients use, not the Service's
    context.verify_mode = ssl.CERT_NONE
    return HTTPSConnection(url.netloc, timeout=TIMEOUT_S, context=context)


def lines_of(method, path, body=None):
    headers = {"Content-Type": "application/json"}
    named = [line.split() for line in KEYS.read_text().splitlines()] if KEYS.exists() else []
    keys = [words[0].partition(":")[2] for words in named if words and not words[0].startswith("#")]
    if keys:
        headers["Authorization"] = f"Bearer {keys[0]}"
    asked = connection(urlsplit(sys.argv[1]))
    asked.request(method, path, json.dumps(body) if body else None, headers)
    answer = asked.getresponse()
    lines = [line.decode().strip() for line in answer if line.strip()]
    if answer.status != 200:
        sys.exit(f"{method} {path}: {answer.status} {lines}")
    return lines


model = json.loads("".join(lines_of("GET", "/v1/models")))["data"][0]["id"]
lines = lines_of("POST", "/v1/completions", {"model": model, "prompt": "The", "max_tokens": 16, "stream": True})
texts = [each["text"] for line in lines if line.startswith("data: {") for each in json.loads(line[6:])["choices"]]
if lines[-1] != "data: [DONE]" or not texts:
    sys.exit(f"the stream did not end as it should: {lines[-3:]}")
sys.stdout.write(f"{model} answers: {''.join(texts)!r}\n")
