"""`helm test`: one streamed answer of the served model, through the Service. Standard library only.

serves.py URL [ADMIN [POD SECONDS]]

With ADMIN, the URL of the admin API, a rank is killed as well while answers stream: each must be whole, and have the
tokens that it had before. What was seen is written as one line of JSON. The token is in ELASTIC_ADMIN_TOKEN. With POD
that pod is deleted then, and answers stream until its successor is ready, within so many seconds.
"""

import json
import os
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

KEYS = Path("/etc/elastic-ep/api-keys/keys")  # NAME:KEY and perhaps limits, one a line
KUBERNETES = Path("/etc/elastic-ep/kubernetes")  # who we are to its API
TIMEOUT_S = 120
PROMPTS = ["The", "A rank", "One two three", "In the end"]
TOKENS = 64
POLL_S = 0.2
POD_POLL_S = 1


class Failed(Exception):
    """What the test is there to find, in words."""


class Unanswered(Failed):
    """The Kubernetes API gave no answer, or none for now."""


def connection(url):
    if url.scheme == "http":
        return HTTPConnection(url.netloc, timeout=TIMEOUT_S)
    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is of the name that clients use, not the Service's
    context.verify_mode = ssl.CERT_NONE
    return HTTPSConnection(url.netloc, timeout=TIMEOUT_S, context=context)


def api_key():
    named = [line.split() for line in KEYS.read_text().splitlines()] if KEYS.exists() else []
    keys = [words[0].partition(":")[2] for words in named if words and not words[0].startswith("#")]
    return keys[0] if keys else ""


def lines_of(url, key, method, path, body=None):
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    asked = connection(urlsplit(url))
    try:
        asked.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = asked.getresponse()
        lines = [line.decode().strip() for line in answer if line.strip()]
    except (OSError, HTTPException) as error:
        raise Failed(f"{method} {path}: {error!r}") from error
    finally:
        asked.close()
    if answer.status not in (200, 202):
        raise Failed(f"{method} {path}: {answer.status} {lines}")
    return lines


def streamed(url, **asked):
    """The choices that an answer's lines have."""
    lines = lines_of(url, api_key(), "POST", "/v1/completions", {"stream": True, **asked})
    choices = [each for line in lines if line.startswith("data: {") for each in json.loads(line[6:]).get("choices", ())]
    if not choices or lines[-1] != "data: [DONE]":
        raise Failed(f"the stream did not end as it should: {lines[-3:]}")
    return choices


def tokens(url, model, prompt):
    asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    found = [token for each in streamed(url, model=model, **asked) for token in each["logprobs"]["tokens"]]
    if len(found) != TOKENS:
        raise Failed(f"{len(found)} of {TOKENS} tokens")
    return found


def status(admin):
    return json.loads("".join(lines_of(admin, os.environ["ELASTIC_ADMIN_TOKEN"], "GET", "/admin/v1/status")))


def until(admin, holds, what):
    """The first status for which this holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not holds(found := status(admin)):
        if time.monotonic() > deadline:
            raise Failed(f"no {what} within {TIMEOUT_S} s: {found}")
        time.sleep(POLL_S)
    return found


def serving(found, slot):
    return [each["incarnation"] for each in found["ranks"] if each["rank"] == slot and each["state"] == "serving"]


def kill(admin, begun):
    """Kill a rank once each client has had an answer; return the receipt's part about it."""
    for each in begun:
        if not each.wait(TIMEOUT_S):
            raise Failed("a client has had no answer")
    before = until(admin, lambda found: found["state"] == "serving" and not found["operation"], "whole cluster")
    slot = next(each["rank"] for each in before["ranks"] if each["state"] == "serving")
    path, by = f"/admin/v1/ranks/{slot}/kill", {"by": "helm test"}
    killed = json.loads("".join(lines_of(admin, os.environ["ELASTIC_ADMIN_TOKEN"], "POST", path, by)))
    at, incarnation = time.monotonic(), killed["incarnation"]
    until(admin, lambda found: {*serving(found, slot)} - {incarnation}, f"successor of rank {slot}")
    took_s = round(time.monotonic() - at, 1)
    return {"rank": slot, "incarnation": incarnation, "exactness": before["exactness"], "successor_after_s": took_s}


def kubernetes(method, pod):
    """The pod as the Kubernetes API has it; nothing if there is none."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
    token, namespace = ((KUBERNETES / each).read_text().strip() for each in ("token", "namespace"))
    context = ssl.create_default_context(cafile=str(KUBERNETES / "ca.crt"))
    asked = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}"
    try:
        asked.request(method, path, headers={"Authorization": f"Bearer {token}"})
        answer = asked.getresponse()
        text = answer.read().decode()
    except (OSError, HTTPException) as error:
        raise Unanswered(f"{method} {path}: {error!r}") from error
    finally:
        asked.close()
    if answer.status == 429 or answer.status >= 500:
        raise Unanswered(f"{method} {path}: {answer.status} {text}")
    if answer.status not in (200, 202, 404):
        raise Failed(f"{method} {path}: {answer.status} {text}")
    return json.loads(text) if answer.status != 404 else {}


def uid(found):
    return found.get("metadata", {}).get("uid", "")


def is_ready(found):
    conditions = found.get("status", {}).get("conditions", ())
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def is_other(pod, before):
    """Whether there is a ready one of this name, and why that is not known if it is not."""
    try:
        found = kubernetes("GET", pod)
    except Unanswered as error:  # in so many looks there may be one while its etcd elects a leader
        return False, f"; {error}"
    return uid(found) not in ("", before) and is_ready(found), ""


def delete(pod, within_s):
    """Delete it, as for an update or an eviction; return the receipt's part about it once the next one is ready."""
    before, at = uid(kubernetes("GET", pod)), time.monotonic()
    if not before:
        raise Failed(f"there is no pod {pod}")
    kubernetes("DELETE", pod)
    while not (other := is_other(pod, before))[0]:
        if time.monotonic() - at > within_s:
            raise Failed(f"no other pod {pod} was ready within {within_s} s{other[1]}")
        time.sleep(POD_POLL_S)
    return {"deleted": pod, "ready_after_s": round(time.monotonic() - at, 1)}


def kill_while_streaming(url, admin, model, pod, within_s):
    """The receipt. Clients go on until a successor serves, so answers stream at the death whenever it comes."""
    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        wanted = list(pool.map(lambda prompt: tokens(url, model, prompt), PROMPTS))
        over, begun, lost = threading.Event(), [threading.Event() for _ in PROMPTS], []

        def client(number):
            answers = altered = 0
            while not over.is_set():
                answers += 1
                try:
                    altered += tokens(url, model, PROMPTS[number]) != wanted[number]
                except Failed as error:
                    lost.append(str(error))
                begun[number].set()
            return answers, altered

        clients = [pool.submit(client, number) for number in range(len(PROMPTS))]
        try:
            receipt = kill(admin, begun) | (delete(pod, within_s) if pod else {})
        finally:
            over.set()
        counts = [each.result(TIMEOUT_S) for each in clients]
    answers, altered = (sum(each) for each in zip(*counts, strict=True))
    compared = receipt["exactness"] == "invariant"  # else tokens may depend on the batch
    kept = not lost and not (compared and altered)
    return {**receipt, "answers": answers, "lost": len(lost), "altered": altered, "errors": lost[:3], "kept": kept}


def main(url, admin="", pod="", within_s="0"):
    model = json.loads("".join(lines_of(url, api_key(), "GET", "/v1/models")))["data"][0]["id"]
    text = "".join(each["text"] for each in streamed(url, model=model, prompt="The", max_tokens=16))
    sys.stdout.write(f"{model} answers: {text!r}\n")
    if admin:
        receipt = kill_while_streaming(url, admin, model, pod, int(within_s))
        sys.stdout.write(json.dumps(receipt) + "\n")
        if not receipt["kept"]:
            raise Failed("what was killed or deleted was felt by clients")


try:
    main(*sys.argv[1:])
except Failed as failed:
    sys.exit(str(failed))
