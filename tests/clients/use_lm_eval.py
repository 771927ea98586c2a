"""lm-eval's `local-completions`: how likely each continuation is, as JSON; and that it generates."""

from __future__ import annotations

import json
import os
import sys

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tests.clients.asked import KEY, MODEL, PROMPT, URL

os.environ["OPENAI_API_KEY"] = KEY
pairs = json.loads(sys.argv[2])
model = get_model("local-completions")(
    model=MODEL, base_url=f"{URL}/completions", tokenizer_backend="huggingface", tokenizer=sys.argv[1],
    num_concurrent=4, max_retries=1, batch_size=1, max_length=1024,
)  # fmt: skip
scores = model.loglikelihood([Instance("loglikelihood", {}, tuple(pair), at) for at, pair in enumerate(pairs)])
until = {"until": ["."], "max_gen_toks": 16, "temperature": 0}
assert model.generate_until([Instance("generate_until", {}, (PROMPT, until), 0)])[0]
print(json.dumps(scores))
