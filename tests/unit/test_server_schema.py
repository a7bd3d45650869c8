"""schemathesis against the running application: what the OpenAPI document says is what is answered.

Every operation, with values that fit its schema and values that do not, over a real socket: no 5xx, no status,
body or content type that the document does not name, and nothing accepted that the schema forbids.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from lorasmith.server import create_app
from lorasmith.server.keys import Tenant
from tests.support.served import in_thread
from tests.support.server import BASE_ID, NAMES, bearer, make_gateway, make_keys, write_place

schemathesis = pytest.importorskip("schemathesis", reason="the dev extra has it")
checks = schemathesis.checks
EXAMPLES = int(os.environ.get("LORASMITH_FUZZ", "8"))
# `drain` ends all service, and is tested by itself. A limit that only the server knows (the context, a name that
# is taken) makes a request that fits the schema a 400.
UNFIT = [checks.load_all_checks() or None]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("place"))
    keys = make_keys(Tenant("acme"), admin="boss")
    gateway = make_gateway(place, keys=keys, default_max_tokens=4, request_timeout_s=5)
    with in_thread(create_app(gateway)) as url:
        document = f"{url}/openapi.json"
        schema = schemathesis.openapi.from_url(document, headers=bearer("boss"))
        schema.config.update(base_url=url)
        yield schema.exclude(path="/admin/drain")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_answered_is_what_the_document_says(case):
    key = "boss" if case.path.startswith("/admin") or case.path in ("/metrics", "/ready") else "key-acme"
    response = case.call(headers=bearer(key), timeout=20)
    case.validate_response(response, excluded_checks=[c for c in schemathesis.checks.CHECKS.get_all() if c.__name__ == "positive_data_acceptance"])
