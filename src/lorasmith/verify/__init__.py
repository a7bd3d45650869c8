"""Black-box conformance of any OpenAI-compatible LoRA server: does every request get its own adapter, always?

It makes adapters that each say one word whatever the prompt, proves on the local base that their answers tell them
apart, has the server serve them, and asks. It knows servers only through HTTP.

May import: engine, inject, formats, bases, lora, errors
"""

from lorasmith.verify.apis import KINDS
from lorasmith.verify.client import Client
from lorasmith.verify.prepared import Prepared, read_prepared
from lorasmith.verify.probes import Prompts
from lorasmith.verify.run import SERVED, TESTS, Options, Tested, Verdict, make_prepared, verify

__all__ = [
    "KINDS", "SERVED", "TESTS", "Client", "Options", "Prepared", "Prompts", "Tested", "Verdict", "make_prepared",
    "read_prepared", "verify",
]  # fmt: skip
