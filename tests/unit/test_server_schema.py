"""schemathesis against the running application: what the OpenAPI document says is what is answered.

Every operation, with values that fit its schema and values that do not, over a real socket: no 5xx, no status,
body or content type that the document does not name, and nothing accepted that the schema forbids.
"""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from lorasmith.server import create_app
from lorasmith.server.keys import Tenant
from tests.support.served import in_thread
from tests.support.server import bearer, make_gateway, make_keys, write_place

schemathesis = pytest.importorskip("schemathesis", reason="the dev extra has it")
schemathesis.checks.load_all_checks()
# A limit that only the server knows (the context, a name that is taken) makes a fitting request a 400.
UNFIT = ("positive_data_acceptance",)
CHECKS = schemathesis.checks.CHECKS.get_all()
PHASES = (Phase.explicit, Phase.generate)  # no shrinking: schemathesis prints the request that failed


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    place = write_place(tmp_path_factory.mktemp("place"))
    keys = make_keys(Tenant("acme"), admin="boss")
    gateway = make_gateway(place, keys=keys, default_max_tokens=4)
    with in_thread(create_app(gateway)) as url:
        document = httpx.get(f"{url}/openapi.json", headers=bearer("boss")).json()
        for operation in (o for methods in document["paths"].values() for o in methods.values()):
            operation.pop("security", None)  # keys are put in below; they have tests of their own
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=url)
        yield schema.exclude(path="/admin/drain")  # it ends all service, and has tests of its own


def validate(case) -> None:
    is_inner = case.path.startswith("/admin") or case.path in ("/metrics", "/ready")
    response = case.call(headers=bearer("boss" if is_inner else "key-acme"), timeout=120)
    case.validate_response(response, checks=[c for c in CHECKS if c.__name__ not in UNFIT])


def check_all(api, examples: int) -> tuple[int, list[str]]:
    """Each operation with fitting and with unfitting values; how many there were, and what is wrong."""
    wrong = []
    operations = [found.ok() for found in api.get_all_operations()]
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            run = given(case=operation.as_strategy(generation_mode=mode))(validate)
            run = settings(
                max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES
            )(run)
            try:
                run()
            except Unsatisfiable:  # nothing can be wrong about a request that has no parts
                continue
            except BaseExceptionGroup as error:
                wrong += [f"{operation.label} {mode.value}: {one}" for one in error.exceptions]
    return len(operations), wrong


def test_what_is_answered_is_what_the_document_says(api):
    count, wrong = check_all(api, 6)
    assert count >= 20
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_same_at_length(api):
    _, wrong = check_all(api, 200)
    assert not wrong, "\n".join(wrong)
